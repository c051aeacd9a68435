"""Log-likelihood of titles, values and gradients, against loops in fp64."""

import weakref

import pytest
import torch
from kernel_cases import DTYPES, close, fp64, leaves, loop_likelihood, no_worse, poisoned, titles_of

from delrec.kernels import reference

pytest_plugins = ["kernel_fixtures"]


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


def test_gaps_between_the_head_s_rows_are_not_read(ops):
    x, head, tok, ptr, b = titles_of()
    one, two = leaves(x)[0], leaves(x)[0]
    want = ops.title_likelihood(one, head, tok, ptr, b)
    got = ops.title_likelihood(two, poisoned(head)[: len(head)], tok, ptr, b)
    close(got.detach(), want.detach())
    want.sum().backward(), got.sum().backward()
    close(two.grad, one.grad, 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, D", [(1, 2, 1), (7, 300, 64), (60, 1000, 33), (250, 2600, 96)])
def test_likelihood_and_gradient_round_no_worse_than_torch(ops, dtype, N, V, D):
    # more rows than a block, more words than a tile; odd widths, large logits
    if ops.name == "interpreted" and N > 60 and dtype != torch.float32:
        pytest.skip("ten seconds in the interpreter; the smaller ones round alike")
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


@pytest.mark.parametrize("gradient", [False, True])
def test_one_tile_of_the_logits_exists_at_a_time(gradient, monkeypatch):
    pytest.importorskip("triton")
    from delrec.kernels import gpu

    class Launched:
        """A kernel that does nothing."""

        def __getitem__(self, grid):
            return lambda *args, **kwargs: probabilities.append(weakref.ref(args[8]))

    tiles, probabilities = [], []

    def product(a, b):
        made = a @ b
        if made.shape[1] == 16:  # a tile, not a part of the gradient
            assert not any(t() is not None for t in (*tiles, *probabilities))
            tiles.append(weakref.ref(made))
        return made

    monkeypatch.setattr(gpu, "absorb_kernel", Launched())
    monkeypatch.setattr(gpu, "product", product)
    x, head = torch.randn(5, 8), torch.randn(64, 8)
    gpu.log_probs(x, head, torch.zeros(5, dtype=torch.int32), None, gradient, rows=3, tile=16)
    assert len(tiles) == 2 * 4
