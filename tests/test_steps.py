"""steps.py: the small pieces of an optimiser's step."""

from types import SimpleNamespace

import pytest
import torch
from click import ClickException

from delrec.training import steps
from delrec.training.steps import micro_batches, warm_then_fall


def ranks_of(world):
    """Stand-ins for the processes of a run."""
    return [SimpleNamespace(rank=rank, world=world) for rank in range(world)]


# ---------------------------------------------------------------- learning rates


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_the_end():
    shares = [warm_then_fall(step, 20, 0.2) for step in range(20)]
    assert shares[:4] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 17 / 20])
    assert shares[3:] == pytest.approx([(20 - step) / 20 for step in range(3, 20)])
    assert min(shares) > 0  # no step is wasted, the first and the last neither


@pytest.mark.parametrize(
    "n, first, total, want",
    [
        (4, 20, 100, {19, 46, 72, 99}),
        (3, 2, 5, {1, 3, 4}),
        (4, 25, 100, {24, 49, 74, 99}),
        (2, 2.5, 5, {1, 4}),
        (1, 20, 100, {99}),
        (2, 100, 100, {99}),
        (9, 2, 5, {1, 2, 3, 4}),
    ],
)
def test_steps_are_picked_evenly_from_the_first_that_counts_to_the_last(n, first, total, want):
    assert steps.evenly(n, first, total) == want


@pytest.mark.parametrize(
    "total, n, want",
    [(10, 2, {4, 9}), (10, 1, {9}), (10, 3, {2, 6, 9}), (3, 3, {0, 1, 2}), (10, 0, set())],
)
def test_parts_of_the_steps_are_as_long_and_the_last_ends_with_the_last(total, n, want):
    assert steps.ends_of_parts(n, total) == want


@pytest.mark.parametrize("steps_and_warmup", [(20, 0.0), (1, 0.5), (4, 0.05)])
def test_without_a_whole_step_of_warm_up_the_rate_begins_at_its_peak(steps_and_warmup):
    assert warm_then_fall(0, *steps_and_warmup) == 1


def test_each_group_has_its_own_peak_and_empty_groups_are_left_out():
    w, maps = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(2))
    groups = steps.groups_of(([w], 0.1), ([], 0.5), ([maps], 0.02))
    optimiser = SimpleNamespace(param_groups=groups)
    steps.set_learning_rates(optimiser, 0.5)
    steps.set_learning_rates(optimiser, 0.25)  # of the peak, not of the rate before
    rates = [(group["params"], group["lr"]) for group in optimiser.param_groups]
    assert rates == [([w], pytest.approx(0.025)), ([maps], pytest.approx(0.005))]


# ---------------------------------------------------------------- micro-batches


def samples_of(parts, n) -> list[list[int]]:
    """The samples of those parts that count."""
    return [list(range(n))[part] for part, own in parts if own]


@pytest.mark.parametrize("n, micro", [(8, 4), (8, 1), (7, 3), (1, 4), (5, 1), (0, 4), (24, 9)])
@pytest.mark.parametrize("world", [1, 2, 3, 10])
@pytest.mark.parametrize("even", [False, True])
def test_every_sample_is_dealt_out_once_and_no_process_has_two_more_than_another(
    n, micro, world, even
):
    dealt = [samples_of(micro_batches(n, micro, ranks, even), n) for ranks in ranks_of(world)]
    assert sorted(x for parts in dealt for part in parts for x in part) == list(range(n))
    assert all(0 < len(part) <= micro for parts in dealt for part in parts)
    loads = [sum(map(len, parts)) for parts in dealt]
    assert max(loads) - min(loads) <= 1
    passes = max(map(len, dealt))
    assert passes == -(-max(loads) // micro)  # as few as that many samples take


@pytest.mark.parametrize(
    "n, micro, world", [(8, 4, 2), (16, 4, 2), (7, 3, 2), (8, 1, 10), (8, 3, 3), (30, 3, 10)]
)
def test_micro_batches_that_come_out_even_are_those_of_one_process(n, micro, world):
    (alone,) = ranks_of(1)
    want = samples_of(micro_batches(n, micro, alone), n)
    dealt = [samples_of(micro_batches(n, micro, ranks), n) for ranks in ranks_of(world)]
    assert sorted(sum(dealt, [])) == want
    assert [part for parts in dealt for part in parts[:1]] == want[:world]  # in turn


def test_micro_batches_that_do_not_come_out_even_are_smaller():
    (alone,) = ranks_of(1)
    assert samples_of(micro_batches(10, 4, alone), 10) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    dealt = [samples_of(micro_batches(10, 4, ranks), 10) for ranks in ranks_of(2)]
    assert dealt == [[[0, 1, 2], [6, 7]], [[3, 4, 5], [8, 9]]]


@pytest.mark.parametrize("first, second, micro", [(8, 8, 4), (5, 8, 2), (3, 3, 3), (0, 7, 4)])
@pytest.mark.parametrize("world", [2, 3, 10, 16])
@pytest.mark.parametrize("even", [False, True])
def test_over_two_tasks_of_a_step_no_process_has_two_samples_more_than_another(
    first, second, micro, world, even
):
    loads, passes = [], []
    for ranks in ranks_of(world):
        tasks = [
            micro_batches(first, micro, ranks, even),
            micro_batches(second, micro, ranks, even, first),
        ]
        counted = [samples_of(parts, n) for parts, n in zip(tasks, (first, second))]
        loads.append(sum(map(len, sum(counted, []))))
        passes.append([len(parts) for parts in tasks])
    assert sum(loads) == first + second
    assert max(loads) - min(loads) <= 1
    assert not even or passes == passes[:1] * world  # a sharded LM's passes are made together


def test_with_even_all_processes_make_as_many_passes_and_those_for_company_weigh_0():
    dealt = [micro_batches(5, 2, ranks, even=True) for ranks in ranks_of(2)]
    assert [[own for _, own in parts] for parts in dealt] == [[1, 1], [1, 0]]
    assert dealt[1][1][0] == slice(0, 2)  # a real micro-batch


def test_dropout_belongs_to_the_seed_the_step_and_the_micro_batch():
    def drawn(*where):
        steps.seed_dropout(*where)
        return torch.rand(4).tolist()

    first = drawn(0, 3, 8)
    torch.manual_seed(99)
    assert drawn(0, 3, 8) == first
    for other in ((1, 3, 8), (0, 4, 8), (0, 3, 0), (0, 8, 3)):
        assert drawn(*other) != first


# ---------------------------------------------------------------- sums


def test_zero_gradients_leave_no_gradient_behind():
    w, v = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(2)
    steps.zero_gradients([w, v])
    assert w.grad.tolist() == [0, 0]
    assert v.grad.tolist() == [0, 0, 0]  # also of a parameter that had none


def test_totals_add_up_passes_and_name_what_is_not_0(alone):
    totals = steps.Totals(("titles", "candidates", "cos"))
    totals.add(torch.tensor(3.0), {"titles": torch.tensor(1.0), "candidates": torch.tensor(2.0)})
    totals.add(torch.tensor(0.5), {"candidates": torch.tensor(0.5)})
    assert totals.over(alone) == {"loss": 3.5, "titles": 1.0, "candidates": 2.5}
    assert steps.Totals(("titles",)).over(alone) == {"loss": 0.0}


def test_totals_without_names_keep_the_loss_alone(alone):
    totals = steps.Totals()
    totals.add(torch.tensor(3.0), {"candidates": torch.tensor(3.0)})
    assert totals.over(alone) == {"loss": 3.0}


# ---------------------------------------------------------------- numbers that are not finite


def params_with(*grads):
    """Parameters with these gradients."""
    params = [torch.nn.Parameter(torch.zeros(2)) for _ in grads]
    for p, grad in zip(params, grads):
        p.grad = None if grad is None else torch.tensor(grad)
    return params


def refusal(params, samples, **losses):
    """The sentence of stop_unless_finite; None if all is well."""
    try:
        steps.stop_unless_finite(params, 12, samples, SimpleNamespace(name="toy"), **losses)
    except ClickException as e:
        return e.message


def test_finite_gradients_and_losses_go_on():
    params = params_with([1.0, -2.0], None, [0.0, 1e15])
    assert refusal(params, [4, 5]) is None
    assert refusal(params, [4, 5], losses=2.5) is None
    assert refusal(params, [4, 5], losses=[2.5, 0.0]) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradients_that_are_not_finite_end_the_run_and_name_step_and_samples(bad):
    params = params_with([1.0, 2.0], [0.0, bad], None, [bad, bad])
    says = refusal(params, [31, 7, 5])
    assert says.startswith("step 12: 2 of 3 gradients are not finite (samples 31, 7, 5 of toy)")
    assert "lower --lr" in says


@pytest.mark.parametrize("losses", [float("nan"), [1.0, float("inf")]])
def test_a_loss_that_is_not_finite_ends_the_run_though_the_gradients_are(losses):
    says = refusal(params_with([1.0, 2.0]), [31], losses=losses)
    assert f"0 of 1 gradients are not finite, the loss is {losses} (samples 31 of toy)" in says


def test_of_many_samples_the_first_eight_are_named():
    says = refusal(params_with([float("nan"), 0.0]), list(range(100, 120)))
    assert "(samples 100, 101, 102, 103, 104, 105, 106, 107, ... of toy)" in says
    says = refusal(params_with([float("nan"), 0.0]), list(range(8)))
    assert "(samples 0, 1, 2, 3, 4, 5, 6, 7 of toy)" in says
