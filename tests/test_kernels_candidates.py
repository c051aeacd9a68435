"""Mean logits of candidates, values and gradients, against loops in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    SHAPES,
    close,
    fp64,
    inputs,
    leaves,
    loop_scores,
    moved,
    no_worse,
    poisoned,
    titles_of,
)

from delrec.kernels import cpu, reference
from delrec.kernels import verbalizer as kernels

pytest_plugins = ["kernel_fixtures"]


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


def test_a_head_with_gaps_has_them_on_the_device_too():
    head = poisoned(torch.arange(12.0).view(3, 4))
    there = moved(head, "meta")  # as on a GPU: nothing of it lies here
    assert there.shape == (4, 4) and there.stride() == (13, 1) and there.storage_offset() == 2
    assert torch.equal(moved(head, "cpu")[:3], torch.arange(12.0).view(3, 4))


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
