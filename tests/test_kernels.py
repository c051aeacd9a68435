"""The verbalizer against loops in fp64: values, gradients, memory that must not be touched, bad
input; for the reference, the C++ loops and the Triton kernels (Triton's interpreter on a CPU;
`pytest -m gpu` runs the same tests on a device).
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delrec.kernels import cpu, reference
from delrec.kernels import verbalizer as kernels

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (B, C, T, V, D): one of each; nothing a multiple of a block; titles longer than a block of tokens,
# more than one block of everything
SHAPES = [(1, 1, 1, 7, 8), (3, 5, 7, 101, 48), (2, 15, 33, 211, 300), (9, 4, 6, 997, 577)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def available(impl):
    if impl == "cpp" and not cpu.library():
        pytest.skip("no C++ compiler here")
    if impl == "interpreted" and (
        torch.cuda.is_available() or pytest.importorskip("triton") is None
    ):
        pytest.skip("with a GPU the Triton kernels run on it (-m gpu)")
    if impl == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return SimpleNamespace(
        impl={"interpreted": "triton", "gpu": "triton"}.get(impl, impl),
        device="cuda" if impl == "gpu" else "cpu",
        name=impl,
        **{
            f: on(
                getattr(kernels, f),
                {"interpreted": "triton", "gpu": "triton"}.get(impl, impl),
                "cuda" if impl == "gpu" else "cpu",
            )
            for f in kernels.__all__
        },
    )


def on(function, impl, device):
    """The function with its tensors carried to the device and its results back (gradients flow
    through both).
    """

    def call(*args, **kwargs):
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        out = function(*args, impl=impl, **kwargs)
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return call


@pytest.fixture(params=["ref", "cpp", "interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def ops(request):
    return available(request.param)


def close(got, true, tol=2e-6):
    """fp32 against fp64, relative to the largest number there is."""
    assert got.dtype == torch.float32 and got.shape == true.shape
    assert (got.double() - true).abs().max() <= tol * true.abs().max().clamp(min=1)


def no_worse(got, torchs, true, dtype):
    """The error against fp64 is at most torch's own in this dtype, plus a little."""
    scale = true.abs().max().clamp(min=1)
    assert (got.double() - true).abs().max() <= (torchs.double() - true).abs().max() + TOLERANCE[
        dtype
    ] * scale


def inputs(seed=0, B=3, C=7, T=5, V=23, D=13, bias=True, dtype=torch.float32):
    """Ragged titles: some empty, some of one token, tokens repeated; places beyond a title's end
    hold tokens that must not count.
    """
    g = torch.Generator().manual_seed(seed)
    x, head, b = (
        torch.randn(B, D, generator=g),
        torch.randn(V, D, generator=g),
        torch.randn(V, generator=g),
    )
    tok, n = (
        torch.randint(0, V, (B, C, T), generator=g),
        torch.randint(0, T + 1, (B, C), generator=g),
    )
    for c, length in enumerate((T, 1, 0)[:C]):
        n[0, c] = length
    tok[0, 0] = tok[0, 0, 0]  # one token T times
    return x.to(dtype), head.to(dtype), tok, n, b.to(dtype) if bias else None


def loop_scores(x, head, tok, n, bias):
    """mean over t < n of head[tok] . x + bias[tok], one number at a time."""
    rows = []
    for b in range(tok.shape[0]):
        for c in range(tok.shape[1]):
            logits = [
                head[v] @ x[b] + (0 if bias is None else bias[v])
                for v in tok[b, c, : n[b, c]].tolist()
            ]
            rows.append(sum(logits) / len(logits) if logits else x.new_zeros(()))
    return torch.stack(rows).view(tok.shape[:2])


def fp64(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def poisoned(head, seed=0):
    """The same head inside a larger buffer of NaN: rows stand further apart than D, and one more
    row, the last, is NaN.
    """
    V, D = head.shape
    room = torch.full((V + 1, D + 9), torch.nan, dtype=head.dtype)
    room[:V, 2 : D + 2] = head
    return room[:, 2 : D + 2]


# ---------------------------------------------------------------- mean logits of candidates


@pytest.mark.parametrize("bias", [True, False])
def test_candidate_scores_and_gradients_equal_the_loop(ops, bias):
    x, head, tok, n, b = inputs(bias=bias)
    upstream = torch.randn(tok.shape[:2], generator=torch.Generator().manual_seed(9))
    got, true = leaves(x, head, b), fp64(x, head, b)
    score, want = (
        ops.candidate_scores(got[0], got[1], tok, n, got[2]),
        loop_scores(true[0], true[1], tok, n, true[2]),
    )
    close(score.detach(), want.detach())
    (score * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    for g, t in zip(got, true):
        if g is not None:
            close(g.grad, t.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_and_gradients_round_no_worse_than_torch(ops, dtype, shape):
    B, C, T, V, D = shape
    x, head, tok, n, b = inputs(1, B, C, T, V, D, True, dtype)
    upstream = torch.randn(B, C, generator=torch.Generator().manual_seed(9))

    def logit(x_, h, b_):
        return (
            torch.nn.functional.linear(x_, h, b_)[torch.arange(B)[:, None, None], tok]
            * (torch.arange(T) < n[..., None])
        ).sum(2) / n.clamp(min=1)

    results = []
    for f, cast in (
        (lambda *a: ops.candidate_scores(a[0], a[1], tok, n, a[2]), lambda t: t),
        (logit, lambda t: t),
        (logit, torch.Tensor.double),
    ):
        leaf = leaves(cast(x), cast(head), cast(b))
        score = f(*leaf)
        (score * upstream.to(score.dtype)).sum().backward()
        results.append([score.detach(), *[t.grad for t in leaf]])
    assert (
        results[0][0].dtype == torch.float32 and results[0][1].dtype == results[0][2].dtype == dtype
    )
    for got, torchs, true in zip(*results):
        no_worse(got, torchs, true, dtype)


def test_empty_title_scores_zero_and_has_no_gradient(ops):
    x, head, tok, n, b = inputs()
    x, head, b = leaves(x, head, b)
    score = ops.candidate_scores(x, head, tok, torch.zeros_like(n), b)
    assert (score == 0).all()
    score.sum().backward()
    assert not x.grad.any() and not head.grad.any() and not b.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_a_title_s_own_rows_is_read(ops, dtype):
    # padding points at a row of NaN, and NaN stands between the rows of the head
    x, head, tok, n, b = inputs(2, 4, 6, 19, 37, 45, True, dtype)
    bad = torch.where(torch.arange(19) < n[..., None], tok, 37)
    want, xs, got = leaves(x)[0], leaves(x)[0], poisoned(head)
    clean = ops.candidate_scores(want, head, tok, n, b)
    score = ops.candidate_scores(
        xs, got, bad, n, torch.cat([b, torch.full((1,), torch.nan, dtype=dtype)])
    )
    assert torch.equal(score, clean)
    clean.sum().backward(), score.sum().backward()
    assert torch.equal(xs.grad, want.grad) and xs.grad.isfinite().all()


@pytest.mark.parametrize("where", ["behind", "out of range"])
def test_padding_may_hold_any_number(ops, where):
    x, head, tok, n, b = inputs()
    noise = torch.where(
        torch.arange(tok.shape[2]) < n[..., None],
        tok,
        (tok * 7 + 3) % len(head) if where == "behind" else -(10**6),
    )
    assert torch.equal(
        ops.candidate_scores(x, head, tok, n, b), ops.candidate_scores(x, head, noise, n, b)
    )
    assert torch.equal(
        ops.candidate_scores(x, head, tok.int(), n.int(), b),
        ops.candidate_scores(x, head, noise.int(), n.int(), b),
    )


def test_candidates_may_stand_in_any_order_and_scores_are_linear_in_x(ops):
    x, head, tok, n, b = inputs()
    order = torch.randperm(tok.shape[1], generator=torch.Generator().manual_seed(1))
    score = ops.candidate_scores(x, head, tok, n, b)
    assert torch.equal(
        ops.candidate_scores(x, head, tok[:, order], n[:, order], b), score[:, order]
    )
    torch.testing.assert_close(
        ops.candidate_scores(2 * x, head, tok, n),
        2 * ops.candidate_scores(x, head, tok, n),
        rtol=0,
        atol=0,
    )
    assert ops.candidate_scores(x[:1], head, tok[:1, :1], n[:1, :1], b).shape == (1, 1)


@pytest.mark.parametrize(
    "which", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_asks_gets_a_gradient(ops, which):
    x, head, tok, n, b = inputs()
    tensors = [t.clone().requires_grad_(w) for t, w in zip((x, head, b), which)]
    ops.candidate_scores(tensors[0], tensors[1], tok, n, tensors[2]).sum().backward()
    every = leaves(x, head, b)
    ops.candidate_scores(every[0], every[1], tok, n, every[2]).sum().backward()
    for t, whole, w in zip(tensors, every, which):
        assert (t.grad is not None) == w and (not w or torch.equal(t.grad, whole.grad))


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 20),
    st.integers(2, 60),
    st.integers(1, 70),
    st.sampled_from(DTYPES),
    st.booleans(),
)
def test_any_shape(B, C, T, V, D, dtype, bias):
    x, head, tok, n, b = inputs(B * 7 + C, B, C, T, V, D, bias, dtype)
    want = loop_scores(x.double(), head.double(), tok, n, None if b is None else b.double())
    for impl in (
        ["ref"] + ["cpp"] * bool(cpu.library()) + ["triton"] * (not torch.cuda.is_available())
    ):
        close(kernels.candidate_scores(x, head, tok, n, b, impl=impl), want, 3e-6)


def test_gradcheck_of_the_definitions():
    x, head, tok, n, b = inputs()
    x, head, b = fp64(x, head, b)
    assert torch.autograd.gradcheck(
        lambda *a: reference.candidate_scores(a[0], a[1], tok, n, a[2]), (x, head, b)
    )
    x2, head2, tok2, _, b2 = titles_of()
    assert torch.autograd.gradcheck(
        lambda *a: reference.log_probs(a[0], a[1], tok2, a[2], 4), fp64(x2, head2, b2)
    )


# ---------------------------------------------------------------- log-likelihood of titles


def titles_of(seed=0, lengths=(3, 0, 1, 5, 2), V=23, D=13, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    ptr = torch.tensor([0, *lengths]).cumsum(0)
    tok = torch.randint(0, V, (N,), generator=g)
    tok[3:6] = tok[3]  # a repeated token
    return (
        torch.randn(N, D, generator=g).to(dtype),
        torch.randn(V, D, generator=g).to(dtype),
        tok,
        ptr,
        torch.randn(V, generator=g).to(dtype),
    )


def loop_likelihood(x, head, tok, ptr, bias, normalise):
    out = []
    for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist()):
        logp = [
            (head @ x[i] + (0 if bias is None else bias)).log_softmax(0)[tok[i]]
            for i in range(a, b)
        ]
        out.append(sum(logp) / (len(logp) if normalise else 1) if logp else x.new_zeros(()))
    return torch.stack(out)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trains", ["x", "everything"])
def test_title_likelihood_and_gradients_equal_the_loop(ops, bias, normalise, trains):
    x, head, tok, ptr, b = titles_of()
    got, true = leaves(x, head, b if bias else None), fp64(x, head, b if bias else None)
    if trains == "x":
        got[1].requires_grad_(False), bias and got[2].requires_grad_(False)
    score, want = (
        ops.title_likelihood(got[0], got[1], tok, ptr, got[2], normalise),
        loop_likelihood(true[0], true[1], tok, ptr, true[2], normalise),
    )
    assert (want.detach()[[0, 2, 3, 4]] < 0).all() and score[1] == 0
    close(score.detach(), want.detach())
    upstream = torch.tensor([1.0, 5, -2, 0.5, 3])
    (score * upstream).sum().backward()
    (want * upstream.double()).sum().backward()
    for g, t in zip(got, true):
        if g is not None and g.requires_grad:
            close(g.grad, t.grad, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, D", [(1, 2, 1), (7, 300, 64), (60, 1000, 33), (250, 2600, 96)])
def test_likelihood_and_gradient_round_no_worse_than_torch(ops, dtype, N, V, D):
    # more rows than a block, more words than a tile; odd widths, large logits
    g = torch.Generator().manual_seed(N)
    x, head, b = (torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (V, D), (V,)))
    tok, ptr = torch.randint(0, V, (N,), generator=g), torch.arange(N + 1)

    def plain(x_, h, b_):
        return torch.nn.functional.linear(x_, h, b_).log_softmax(1).gather(1, tok[:, None])[:, 0]

    results = []
    for f, cast in (
        (lambda x_, h, b_: ops.title_likelihood(x_, h, tok, ptr, b_), lambda t: t),
        (plain, lambda t: t),
        (plain, torch.Tensor.double),
    ):
        leaf = leaves(cast(x))[0]
        score = f(leaf, cast(head), cast(b))
        (score * torch.linspace(-1, 2, N)).sum().backward()
        results.append((score.detach(), leaf.grad))
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == dtype
    for got, torchs, true in zip(*results):
        no_worse(got, torchs, true, dtype)


def test_chunks_change_neither_the_definition_nor_its_gradient():
    results = []
    for chunk in (1, 4, 11, 1024):
        x, head, tok, _, b = titles_of()
        x, head, b = leaves(x, head, b)
        logp = reference.log_probs(x, head, tok, b, chunk)
        (logp * torch.linspace(-1, 2, len(tok))).sum().backward()
        results.append((logp.detach(), x.grad, head.grad, b.grad))
    for other in results[:-1]:
        for a, whole in zip(other, results[-1]):
            torch.testing.assert_close(a, whole, rtol=1e-5, atol=1e-5)


def test_tiles_of_the_triton_path_change_nothing():
    gpu = pytest.importorskip("delrec.kernels.gpu")
    if torch.cuda.is_available():
        pytest.skip("with a GPU: test_likelihood_and_gradient_round_no_worse_than_torch")
    x, head, tok, _, b = titles_of(3, (10, 13), 300, 24)
    whole = gpu.log_probs(x, head, tok.int(), b, True)
    for rows, tile in ((7, 64), (100, 133)):
        for a, w in zip(gpu.log_probs(x, head, tok.int(), b, True, rows, tile), whole):
            torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)


def test_likelihoods_of_all_continuations_sum_to_one(ops):
    _, head, _, _, b = titles_of()
    x = torch.randn(1, 13, generator=torch.Generator().manual_seed(4)).expand(23, -1)
    score = ops.title_likelihood(x, head, torch.arange(23), torch.arange(24), b)
    assert score.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_one_word_far_above_all_others_is_certain(ops):
    # logits of 1e4: exponentials overflow unless the maximum is taken out first, and a word far
    # below must underflow to nothing
    head = torch.eye(8) * 1e4
    x = torch.eye(8)[[3, 3]].requires_grad_()
    score = ops.title_likelihood(x, head, torch.tensor([3, 5]), torch.arange(3))
    assert score.tolist() == [0, -1e4]
    score.sum().backward()
    assert (
        x.grad.isfinite().all()
        and x.grad[0].abs().max() == 0
        and x.grad[1, 5] == 1e4
        and x.grad[1, 3] == -1e4
    )


def test_no_title_at_all(ops):
    x, head, tok, _, b = titles_of()
    assert ops.title_likelihood(
        x[:0], head, tok[:0], torch.zeros(3, dtype=torch.long), b
    ).tolist() == [0, 0]


# ---------------------------------------------------------------- the whole catalogue


def catalogue(seed=0, lengths=(0, 2, 1, 4, 2, 3), V=23, D=13, B=3, dtype=torch.float32):
    """Item 4 has item 1's title; item 0 is the padding item without tokens."""
    x, head, tok, ptr, b = titles_of(seed, lengths, V, D, dtype)
    tok[ptr[4] : ptr[5]] = tok[ptr[1] : ptr[2]]
    return (
        torch.randn(B, D, generator=torch.Generator().manual_seed(seed + 1)).to(dtype),
        head,
        ptr,
        tok,
        b,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_catalogue_scores_equal_the_candidates_of_the_same_titles(ops, bias, dtype):
    x, head, ptr, tok, b = catalogue(dtype=dtype)
    b = b if bias else None
    n = ptr.diff()
    padded = torch.zeros(len(n), int(n.max()), dtype=torch.long)
    for i in range(len(n)):
        padded[i, : n[i]] = tok[ptr[i] : ptr[i + 1]]
    want = loop_scores(
        x.double(),
        head.double(),
        padded.expand(3, -1, -1),
        n.expand(3, -1),
        None if b is None else b.double(),
    )
    close(ops.catalogue_scores(x, head, ptr, tok, b), want)
    # a part of the catalogue
    close(ops.catalogue_scores(x, head, ptr[2:6], tok, b), want[:, 2:5])


def test_many_equal_titles_are_listed_by_id(ops):
    # 600 items of three titles: a sort that is not stable mixes them up
    x, head, *_ = inputs(B=2)
    tok = torch.arange(600) % 3
    for k in (450, 50):
        ids, best = ops.catalogue_topk(x, head, torch.arange(601), tok, k)
        for row in range(2):
            score = head[:3] @ x[row]
            order = sorted(range(600), key=lambda i: (-score[i % 3].item(), i))
            assert ids[row].tolist() == order[:k]


@pytest.mark.parametrize("B", [1, 19, 70])
def test_every_device_lists_the_same_items(ops, B):
    # whole numbers: sums are exact, ties are everywhere, and -0 and 0 are one number
    if ops.name == "interpreted" and B > 19:
        pytest.skip("half a minute in the interpreter, and no other case")
    n_items, g = 400, torch.Generator().manual_seed(B)
    head, x = (
        torch.randint(-2, 3, (40, 6), generator=g).float(),
        torch.randint(-2, 3, (B, 6), generator=g).float(),
    )
    ptr = torch.cat(
        [torch.zeros(1, dtype=torch.long), torch.randint(0, 4, (n_items,), generator=g).cumsum(0)]
    )
    tok, seen = (
        torch.randint(0, 40, (int(ptr[-1]),), generator=g),
        torch.randint(-1, n_items, (B, 30), generator=g),
    )
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 20, seen)
    score = (x @ head.t())[:, tok].double()
    for row in range(B):
        mean = [
            score[row, a:b].mean().item() if b > a else None
            for a, b in zip(ptr[:-1].tolist(), ptr[1:].tolist())
        ]
        left = [i for i in range(n_items) if mean[i] is not None and i not in seen[row].tolist()]
        want = sorted(left, key=lambda i: (-torch.tensor(mean[i]).float().item(), i))[:20]
        assert ids[row].tolist() == want
        assert best[row].tolist() == pytest.approx([mean[i] for i in want], abs=1e-6)


def test_top_of_the_catalogue_leaves_out_what_was_seen_and_says_where_it_ends(ops):
    x, head, ptr, tok, b = catalogue()
    score = ops.catalogue_scores(x, head, ptr, tok, b)
    assert torch.equal(score[:, 1], score[:, 4])
    seen = torch.tensor([[-1, -1], [3, -1], [5, 2]])
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 7, seen, b)
    assert ids.dtype == torch.int64 and ids.shape == best.shape == (3, 7)
    for row in range(3):
        want = sorted(
            (i for i in range(1, 6) if i not in seen[row].tolist()),
            key=lambda i: (-score[row, i].item(), i),
        )
        # item 0 has no title
        assert ids[row].tolist() == want + [-1] * (7 - len(want))
        assert (
            torch.equal(best[row, : len(want)], score[row, want])
            and (best[row, len(want) :] == -torch.inf).all()
        )
    ids, best = ops.catalogue_topk(x, head, ptr, tok, 2, bias_V=b)
    assert torch.equal(best, score[:, 1:].topk(2, 1).values)


# --------------------------------------------------------- the same bits, and no memory but its own


def test_two_runs_give_the_same_bits(ops):
    x, head, tok, n, b = inputs(5, 6, 9, 14, 200, 96, True, torch.bfloat16)
    xs, hs, ts, ptr, bs = titles_of(5, (30, 20, 50), 900, 64, torch.bfloat16)
    runs = []
    for _ in range(2):
        leaf, row = leaves(x)[0], leaves(xs)[0]
        score, like = (
            ops.candidate_scores(leaf, head, tok, n, b),
            ops.title_likelihood(row, hs, ts, ptr, bs),
        )
        (score.sum() + like.sum()).backward()
        runs.append(
            (
                score.detach(),
                like.detach(),
                leaf.grad,
                row.grad,
                *ops.catalogue_topk(xs, hs, ptr, ts, 3),
            )
        )
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_the_number_of_threads_changes_no_bit():
    available("cpp")
    x, head, tok, n, b = inputs(5, 6, 9, 14, 200, 96, True, torch.bfloat16)
    xs, hs, ts, ptr, bs = titles_of(5, (300, 20, 150), 3000, 64, torch.bfloat16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaf, row = leaves(x)[0], leaves(xs)[0]
            score, like = (
                kernels.candidate_scores(leaf, head, tok, n, b, impl="cpp"),
                kernels.title_likelihood(row, hs, ts, ptr, bs, impl="cpp"),
            )
            (score.sum() + like.sum()).backward()
            runs.append(
                (
                    score.detach(),
                    like.detach(),
                    leaf.grad,
                    row.grad,
                    *kernels.catalogue_topk(xs, hs, ptr, ts, 2, impl="cpp"),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for a, c in zip(runs[0], other):
            assert torch.equal(a, c)


def guarded(shape, dtype=torch.float32):
    """An output between guard words, and a function that says whether they still stand."""
    size = int(torch.tensor(shape).prod())
    room = torch.full((size + 64,), 77, dtype=dtype)
    return room[32 : 32 + size].view(shape), lambda: bool(
        (room[:32] == 77).all() and (room[32 + size :] == 77).all()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, C, T, V, D", SHAPES)
def test_the_loops_write_nothing_beside_their_outputs(dtype, B, C, T, V, D):
    available("cpp")
    x, head, tok, n, b = inputs(3, B, C, T, V, D, True, dtype)
    tok, n, b, head = tok.int(), n.int(), b.float(), poisoned(head)[:V]
    out = {
        name: guarded(shape)
        for name, shape in (
            ("score", (B, C)),
            ("pool", (B, C, D)),
            ("logp", (B,)),
            ("diff", (B, D)),
            ("top", (B, 3)),
            ("all", (B, C)),
        )
    }
    ids = guarded((B, 3), torch.int64)
    tables = guarded((-(-B // 16), V, 16))
    cpu.call(
        "scores", cpu.dtype(head), x, head, head.stride(0), tok, n, out["score"][0], B, C, T, D
    )
    cpu.call("pool", cpu.dtype(head), head, head.stride(0), tok, n, out["pool"][0], B * C, T, D)
    cpu.call(
        "likelihood",
        cpu.dtype(head),
        x,
        head,
        head.stride(0),
        b,
        tok[:, 0, 0].contiguous(),
        out["logp"][0],
        out["diff"][0],
        B,
        V,
        D,
    )
    cpu.call("logits", cpu.dtype(head), x, head, head.stride(0), b, tables[0], B, V, D)
    ptr = torch.arange(0, C * T + 1, T)
    cpu.call(
        "topk",
        tables[0],
        ptr,
        tok[0].contiguous(),
        C,
        min(B, 16),
        3,
        torch.full((B, 1), -1),
        1,
        ids[0],
        out["top"][0],
    )
    cpu.call("catalogue", tables[0], ptr, tok[0].contiguous(), C, min(B, 16), out["all"][0])
    for name, (tensor, stands) in {**out, "ids": ids, "tables": tables}.items():
        assert stands(), name
        assert name in ("top", "all", "ids") or tensor.isfinite().all(), name


# ---------------------------------------------------------------- bad input


def bad_scores(**change):
    x, head, tok, n, b = inputs()
    return dict(dict(x_BD=x, head_VD=head, tok_BCT=tok, n_BC=n, bias_V=b), **change)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(x_BD=torch.zeros(13)), r"x_BD has shape \(13,\), expected 2"),
        (dict(x_BD=torch.zeros(3, 12)), r"x and head_VD have shapes \(3, 12\), \(23, 13\)"),
        (
            dict(x_BD=torch.zeros(4, 13)),
            r"tok_BCT, n_BC and x_BD have shapes \(3, 7, 5\), \(3, 7\), \(4, 13\)",
        ),
        (
            dict(x_BD=torch.zeros(3, 13).bfloat16()),
            r"x of shape \(3, 13\) is torch.bfloat16, head_VD of shape \(23, 13\) is torch.float32",
        ),
        (
            dict(x_BD=torch.zeros(3, 13).long(), head_VD=torch.zeros(23, 13).long()),
            "expected floating point",
        ),
        (dict(tok_BCT=torch.zeros(3, 7)), "tok_BCT has shape"),
        (dict(tok_BCT=torch.zeros(3, 7, 5)), "tok_BCT is torch.float32, expected integers"),
        (
            dict(tok_BCT=torch.full((3, 7, 5), 23)),
            r"tok_BCT of shape \(3, 7, 5\) holds 23, expected 0..22",
        ),
        (
            dict(tok_BCT=torch.full((3, 7, 5), 23).int(), n_BC=torch.ones(3, 7).int()),
            "holds 23, expected 0..22",
        ),
        (dict(tok_BCT=torch.full((3, 7, 5), 2**40)), "holds 1099511627776"),
        (dict(tok_BCT=torch.full((3, 7, 5), -1)), "holds -1"),
        (
            dict(n_BC=torch.full((3, 7), 6)),
            r"n_BC of shape \(3, 7\) holds 6, expected 0..5: lengths are 0..T, tok_BCT has shape "
            r"\(3, 7, 5\)",
        ),
        (dict(n_BC=torch.full((3, 6), 1)), "C in the first two"),
        (dict(bias_V=torch.zeros(22)), r"bias_V and head_VD have shapes \(22,\), \(23, 13\)"),
        (
            dict(head_VD=torch.zeros(13, 23).t()),
            r"head_VD of shape \(23, 13\) has strides \(1, 23\), x has shape \(3, 13\)",
        ),
        (dict(head_VD=torch.zeros(1, 13).expand(23, 13)), r"strides \(0, 1\)"),
    ],
)
def test_candidate_scores_refuses_in_words(ops, change, says):
    args = bad_scores(**change)
    with pytest.raises(ValueError, match=says):
        ops.candidate_scores(
            args["x_BD"], args["head_VD"], args["tok_BCT"], args["n_BC"], args["bias_V"]
        )


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(tok=torch.zeros(10, dtype=torch.long)),
            r"tok_N and x_ND have shapes \(10,\), \(11, 13\)",
        ),
        (dict(tok=torch.full((11,), 99)), "holds 99, expected 0..22"),
        (dict(ptr=torch.tensor([0, 5, 3, 11])), "ptr_T1 of shape"),
        (dict(ptr=torch.tensor([0, 5, 12])), "0..11, the length of tok_N"),
        (dict(ptr=torch.tensor([0, 5])), "runs from 0 to 5, expected 0 to the 11 rows"),
        (dict(ptr=torch.zeros(0, dtype=torch.long)), "one more entry than titles"),
    ],
)
def test_title_likelihood_refuses_in_words(ops, change, says):
    x, head, tok, ptr, b = titles_of()
    args = dict(tok=tok, ptr=ptr) | change
    with pytest.raises(ValueError, match=says):
        ops.title_likelihood(x, head, args["tok"], args["ptr"], b)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(k=0), "k is 0"),
        (dict(tok=torch.full((12,), 23)), "holds 23"),
        (dict(ptr=torch.tensor([0, 13])), "0..12, the length of tok_M"),
        (dict(seen=torch.zeros(2, 4).long()), r"seen_BS and x_BD have shapes \(2, 4\), \(3, 13\)"),
        (dict(seen=torch.zeros(3, 4)), "seen_BS is torch.float32"),
    ],
)
def test_catalogue_refuses_in_words(ops, change, says):
    x, head, ptr, tok, b = catalogue()
    args = dict(ptr=ptr, tok=tok, k=3, seen=None) | change
    with pytest.raises(ValueError, match=says):
        ops.catalogue_topk(x, head, args["ptr"], args["tok"], args["k"], args["seen"], b)


def test_an_implementation_that_cannot_is_refused():
    x, head, tok, n, _ = inputs()
    with pytest.raises(ValueError, match="expected 'auto', 'ref', 'cpp' or 'triton'"):
        kernels.candidate_scores(x, head, tok, n, impl="cuda")
    with pytest.raises(ValueError, match="takes fp32, bf16 and fp16, x is torch.float64"):
        kernels.candidate_scores(x.double(), head.double(), tok, n, impl="triton")
    # auto: the reference
    assert kernels.candidate_scores(x.double(), head.double(), tok, n).dtype == torch.float64


# ---------------------------------------------------------------- building

PROBE = """
import torch
from delrec.kernels import cpu, verbalizer as kernels
g = torch.Generator().manual_seed(0)
x, head, tok, n = torch.randn(2, 5, generator=g), torch.randn(9, 5, generator=g), torch.randint(0, 9, (2, 3, 4), generator=g), torch.full((2, 3), 4)
for _ in range(2):
    assert torch.equal(kernels.candidate_scores(x, head, tok, n), kernels.candidate_scores(x, head, tok, n, impl="ref"))
assert cpu.library() is None
"""


@pytest.mark.parametrize(
    "env, says",
    [({"PATH": ""}, "no C++ compiler (g++) found"), ({"CXX": "false"}, "failed: no message")],
)
def test_without_a_compiler_torch_does_the_work_and_one_line_says_so(tmp_path, env, says):
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("kernels:") == 1 and says in done.stderr and "plain torch" in done.stderr
    )


def test_a_second_process_finds_the_library_built(tmp_path):
    available("cpp")
    script, made = "import delrec.kernels.cpu as c, sys; sys.exit(c.library() is None)", []
    for _ in range(2):
        assert (
            subprocess.run(
                [sys.executable, "-c", script],
                cwd=ROOT,
                env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            ).returncode
            == 0
        )
        files = list((tmp_path / "delrec" / "kernels").iterdir())
        made.append([(f.name, f.stat().st_mtime_ns) for f in files])
    assert made[0] == made[1] and len(made[0]) == 1 and files[0].suffix == ".so"


COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from delrec.kernels import gpu

def build(kernel, sm, pointers, constants):
    names = kernel.arg_names
    kinds = {n: pointers.get(n, "i32") for n in names}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in names}
    aligned = [i for i, n in enumerate(names) if n not in constants and (kinds[n].startswith("*") or n in ("D", "stride_w", "stride_l", "n", "v0"))]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": 4})

half = {"X": "*bf16", "W": "*bf16", "TOK": "*i32", "LEN": "*i32", "S": "*fp32", "G": "*fp32", "DX": "*fp32"}
runs = {"*fp32": ("L", "BIAS", "M", "S", "PICK", "SHRINK"), "*i32": ("TOK",), "*bf16": ("P",)}
absorb = {n: kind for kind, ns in runs.items() for n in ns}
top = {"L": "*fp32", "PTR": "*i64", "TOK": "*i32", "SEEN": "*i64", "KEYS": "*i64"}
tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
for sm in (86, 90):
    for kernel, pointers, constants, vector in (
            (gpu.scores_kernel, half, {"BLOCK_T": 16, "BLOCK_D": 256}, True), (gpu.scores_dx_kernel, half, {"BLOCK_T": 16, "BLOCK_D": 256}, True),
            (gpu.absorb_kernel, absorb, {"HAS_BIAS": True, "GRADIENT": True, "BLOCK": 2048}, True), (gpu.topk_kernel, top, {"BLOCK_I": 256, "BLOCK_B": 8, "K": 32}, False)):
        built = build(kernel, sm, pointers, constants)
        assert f".target sm_{sm}" in built.asm["ptx"] and len(built.asm["cubin"]) > 0, kernel
        assert not vector or "ld.global.v4" in built.asm["ptx"] or "ld.global.v2" in built.asm["ptx"], kernel
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(built.asm["cubin"]), f.flush()
            usage = subprocess.run([str(tool), "-res-usage", f.name], capture_output=True, text=True).stdout
        line = next(x for x in usage.splitlines() if "STACK" in x)
        assert "STACK:0" in line, (kernel, line)
        print(kernel.fn.__name__, sm, line.strip())
"""


def test_triton_kernels_compile_for_two_generations_of_gpus_without_one():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("STACK:0") == 8


# ---------------------------------------------------------------- a decoder's layer in C++


def rows_of_segments(shape):
    """[(tail, [title lengths])] -> segment of each token, ptr."""
    rows = [
        [0] * m + [c + 1 for c, n in enumerate(titles) for _ in range(n)] for m, titles in shape
    ]
    return torch.tensor(sum(rows, []), dtype=torch.int32), torch.tensor(
        np.cumsum([0, *map(len, rows)])
    )


def plain_attention(q, k, v, cos, sin, past, seg, ptr, scale):
    """In fp64, a row and a head at a time, under a mask."""
    q, k, v, cos, sin = (t.double() for t in (q, k, v, cos, sin))

    def turn(x):
        return (
            x * cos[:, None]
            + torch.cat([-x[..., x.shape[2] // 2 :], x[..., : x.shape[2] // 2]], 2) * sin[:, None]
        )

    q, k, out = turn(q), turn(k), torch.zeros_like(q)
    for lo, hi in zip(ptr[:-1].tolist(), ptr[1:].tolist()):
        s = seg[lo:hi]
        sees = ((s[None] == 0) | (s[None] == s[:, None])).tril()
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            keys, values, mask = k[lo:hi, g], v[lo:hi, g], sees
            if past is not None:
                keys, values = (
                    torch.cat([p[0, g].double(), x]) for p, x in zip(past, (keys, values))
                )
                mask = torch.cat([torch.ones(hi - lo, past[0].shape[2], dtype=torch.bool), sees], 1)
            out[lo:hi, h] = (q[lo:hi, h] @ keys.T * scale).masked_fill(~mask, -torch.inf).softmax(
                1
            ) @ values
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "H, G, d, kept, shape",
    [
        (9, 3, 64, 110, [(30, [3, 5, 1]), (7, []), (1, [2, 2])]),
        (4, 4, 16, 0, [(5, [4]), (13, [])]),
        (8, 1, 128, 3, [(60, [10] * 5)]),
        (2, 1, 6, 5, [(9, [2])]),
        (3, 3, 2, 0, [(1, [])]),
        (6, 2, 80, 1, [(150, [60, 1]), (49, [])]),
    ],
)
def test_attention_of_packed_rows(dtype, H, G, d, kept, shape):
    if not cpu.library():
        pytest.skip("no C++ compiler")
    g = torch.Generator().manual_seed(0)
    seg, ptr = rows_of_segments(shape)

    def draw(*size):
        return torch.randn(*size, generator=g).to(dtype)

    q, k, v, angle = (
        draw(len(seg), H, d) * 2,
        draw(len(seg), G, d),
        draw(len(seg), G, d),
        torch.rand(len(seg), d // 2, generator=g) * 6,
    )
    cos, sin = (torch.cat([f(angle)] * 2, 1).to(dtype) for f in (torch.cos, torch.sin))
    past = (draw(1, G, kept, d), draw(1, G, kept, d)) if kept else None
    want = plain_attention(q, k, v, cos, sin, past, seg, ptr, d**-0.5)
    got = cpu.attention(q, k, v, cos, sin, past, seg, ptr, d**-0.5)
    torch.testing.assert_close(
        got.double(),
        want,
        rtol=1e-5 if dtype == torch.float32 else 2e-2,
        atol=1e-5 if dtype == torch.float32 else 2e-2,
    )
    threads = torch.get_num_threads()
    # a sum belongs to one thread, whatever their number
    try:
        for n in (1, 5):
            torch.set_num_threads(n)
            assert torch.equal(cpu.attention(q, k, v, cos, sin, past, seg, ptr, d**-0.5), got)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_norms_and_gates(dtype, tolerance):
    if not cpu.library():
        pytest.skip("no C++ compiler")
    g = torch.Generator().manual_seed(0)
    x, add, w = (torch.randn(*size, generator=g).to(dtype) for size in ((13, 70), (13, 70), (70,)))
    for more in (None, add):
        y = x.clone()
        out = cpu.rms_norm(y, more, w, 1e-5)
        total = x if more is None else x + add
        assert torch.equal(y, total)
        torch.testing.assert_close(
            out.double(),
            torch.nn.functional.rms_norm(total.double(), (70,), w.double(), 1e-5),
            rtol=tolerance,
            atol=1e-6,
        )
    gate, up = (
        (torch.randn(5003, generator=g) * 20).to(dtype),
        torch.randn(5003, generator=g).to(dtype),
    )
    gate[:2] = torch.tensor([-200.0, 200.0])
    want = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(cpu.silu_mul(gate, up).double(), want, rtol=tolerance, atol=1e-6)
