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
    bias, weight = torch.randn(V, generator=g), torch.rand(N, 3, generator=g)
    tok = torch.randint(0, V, (N, 3), generator=g)
    weight[N // 2] = 0
    return x, head, bias, tok, weight


def in_fp64(x, head, bias, tok, weight):
    x, head, bias, weight = (t.double() for t in (x, head, bias, weight))
    logit = x @ head.T + bias
    p = logit.softmax(1)
    g = (p * weight.sum(1, keepdim=True)).scatter_add(1, tok, -weight)
    return logit.logsumexp(1), p @ head, g.T @ x, g.sum(0)


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
    x, head, bias, tok, weight = inputs(60, 700, 20, torch.bfloat16)
    bias[:450] = -1e30  # whole tiles of them
    tok = tok % 250 + 450
    found = cpu.softmax_sums(x, head, bias, tok, weight)
    alone = cpu.softmax_sums(x, head[450:].contiguous(), bias[450:], tok - 450, weight)
    assert not found[2][:450].any() and not found[3][:450].any()
    for one, other in zip(found, (alone[0], alone[1], alone[2], alone[3])):
        torch.testing.assert_close(one[-len(other) :], other, atol=2e-2, rtol=1e-2)


def test_large_logits_neither_overflow_nor_vanish():
    x, head, bias, tok, weight = inputs(9, 300, 16, torch.float32)
    given = x * 100, head * 10, bias, tok, weight
    for one, true in zip(cpu.softmax_sums(*given), in_fp64(*given)):
        torch.testing.assert_close(one.double(), true, atol=0.1, rtol=1e-3)


def test_gaps_between_the_head_s_rows_are_not_read():
    x, head, *rest = inputs(60, 300, 20, torch.bfloat16)
    gaps = poisoned(head)[: len(head)]
    assert gaps.stride(0) > 20
    for one, other in zip(cpu.softmax_sums(x, gaps, *rest), cpu.softmax_sums(x, head, *rest)):
        assert torch.equal(one, other)


def test_where_the_target_is_sure_what_is_left_of_its_gradient_is_right():
    x, head, bias, tok, weight = inputs(300, 400, 40, torch.bfloat16)
    for sure in (0.1, 0.3, 0.6, 1):  # 1 - p of the target down to .0002
        one = head[tok[:, 0]] * sure
        given = one, head, bias, tok[:, :1], torch.ones(300, 1)
        for found, true in zip(cpu.softmax_sums(*given)[2:], in_fp64(*given)[2:]):
            assert (found - true).norm() < 4e-3 * true.norm()


def test_without_positions_there_is_no_gradient():
    x, head, bias, tok, weight = inputs(5, 30, 8, torch.bfloat16)
    log_sum, mean, dhead, dbias = cpu.softmax_sums(x[:0], head, bias, tok[:0], weight[:0])
    assert log_sum.shape == (0,) and mean.shape == (0, 8) and not dhead.any() and not dbias.any()


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
