"""The softmax over all rows of a head: its logarithm and its gradients, against fp64."""

import pytest
import torch
from kernel_cases import DTYPES, available, poisoned

from delrec.kernels import cpu

# what a weight p of a row is rounded to before it is multiplied
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-5}
# one of each; nothing a multiple of a block; more rows than a chunk, more items than a tile; strips
# of one, two and three registers
SHAPES = [(1, 1, 1), (3, 5, 8), (50, 200, 33), (193, 401, 100), (400, 1000, 17), (7, 2500, 150)]


@pytest.fixture(autouse=True)
def library():
    available("cpp")


def inputs(N, V, D, dtype):
    g = torch.Generator().manual_seed(N)
    x, head = (torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (V, D)))
    bias, weight = torch.randn(V, generator=g), torch.rand(N, generator=g)
    weight[N // 2] = 0
    return x, head, bias, weight


def in_fp64(x, head, bias, weight):
    x, head, bias, weight = (t.double() for t in (x, head, bias, weight))
    logit = x @ head.T + bias
    p, share = logit.softmax(1), logit.softmax(1) * weight[:, None]
    return logit.logsumexp(1), p @ head, share.T @ x, share.sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, V, D", SHAPES)
def test_sums_and_gradients_equal_fp64(N, V, D, dtype):
    given = inputs(N, V, D, dtype)
    found, wanted = cpu.softmax_sums(*given), in_fp64(*given)
    for one, true, tolerance in zip(found, wanted, (1e-5, *[TOLERANCE[dtype]] * 2, 1e-5)):
        assert one.dtype == torch.float32
        error = (one - true).abs().max() / true.abs().max().clamp(min=1)
        assert error < tolerance, error


def test_rows_that_are_barred_have_no_part():
    x, head, bias, weight = inputs(60, 700, 20, torch.bfloat16)
    bias[:450] = -1e30  # whole tiles of them
    found = cpu.softmax_sums(x, head, bias, weight)
    alone = cpu.softmax_sums(x, head[450:].contiguous(), bias[450:].contiguous(), weight)
    assert not found[2][:450].any() and not found[3][:450].any()
    for one, other in zip(found, (alone[0], alone[1], alone[2], alone[3])):
        torch.testing.assert_close(one[-len(other) :], other, atol=2e-2, rtol=1e-2)


def test_large_logits_neither_overflow_nor_vanish():
    x, head, bias, weight = inputs(9, 300, 16, torch.float32)
    given = x * 100, head * 10, bias, weight
    for one, true in zip(cpu.softmax_sums(*given), in_fp64(*given)):
        torch.testing.assert_close(one.double(), true, atol=0.1, rtol=1e-3)


def test_gaps_between_the_head_s_rows_are_not_read():
    x, head, bias, weight = inputs(60, 300, 20, torch.bfloat16)
    gaps = poisoned(head)[: len(head)]
    assert gaps.stride(0) > 20
    for one, other in zip(
        cpu.softmax_sums(x, gaps, bias, weight), cpu.softmax_sums(x, head, bias, weight)
    ):
        assert torch.equal(one, other)


def test_the_number_of_threads_changes_no_bit():
    given = inputs(500, 1500, 64, torch.bfloat16)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(cpu.softmax_sums(*given))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0]))
