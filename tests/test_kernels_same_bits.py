"""The kernels say the same bits in every run, and touch no memory but their own."""

import pytest
import torch
from kernel_cases import DTYPES, SHAPES, available, inputs, leaves, poisoned, titles_of

from delrec.kernels import cpu
from delrec.kernels import verbalizer as kernels

pytest_plugins = ["kernel_fixtures"]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, C, T, V, D", SHAPES)
def test_scores_have_the_same_bits_in_training_and_without_a_gradient(ops, dtype, B, C, T, V, D):
    x, head, tok, n, b = inputs(5, B, C, T, V, D, True, dtype)
    trained = ops.candidate_scores(leaves(x)[0], head, tok, n, b)
    assert torch.equal(trained.detach(), ops.candidate_scores(x, head, tok, n, b))


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
    tok, n, b = tok.int(), n.int(), b.float()
    head = poisoned(head)[:V]
    out = {
        name: guarded(shape)
        for name, shape in (
            ("score", (B, C)),
            ("mean", (B, C, D)),
            ("dx", (B, D)),
            ("logp", (B,)),
            ("diff", (B, D)),
            ("top", (B, 3)),
            ("all", (B, C)),
        )
    }
    ids = guarded((B, 3), torch.int64)
    tables = guarded((-(-B // 16), V, 16))
    titles = (cpu.dtype(head), x, head, head.stride(0), tok, n, out["score"][0])
    cpu.call("scores", *titles, None, B, C, T, D)
    cpu.call("scores", *titles, out["mean"][0], B, C, T, D)
    cpu.call("scores_dx", out["score"][0], out["mean"][0], out["dx"][0], B, C, D)
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
