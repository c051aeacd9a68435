"""The small pieces of an optimiser's step that the training scripts share."""

from collections.abc import Iterable
from itertools import accumulate, pairwise
from math import ceil

import numpy as np
import torch

from delrec.processes import Ranks, shares, sum_over_ranks
from delrec.runtime import Prepared, stop


def warm_then_fall(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a share of its peak: it rises over the share `warmup` of the
    steps, and falls to 0 over all of them."""
    return min((step + 1) / max(warmup * steps, 1), (steps - step) / steps)


def evenly(n: int, first: float, steps: int) -> set[int]:
    """n of the steps (0 is the first), evenly from step number `first` to the last; one is the
    last."""
    gap = (steps - first) / max(n - 1, 1)
    return {round(steps - gap * i) - 1 for i in range(n)}


def ends_of_parts(n: int, steps: int) -> set[int]:
    """The last of the steps (0 is the first) of each of n parts of them, which are as long."""
    return {round(steps * (i + 1) / n) - 1 for i in range(n)}


def set_learning_rates(optimiser: torch.optim.Optimizer, share: float) -> None:
    """Gives each group of parameters its "peak" times `share`."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * share


def groups_of(*params_and_rates: tuple[list[torch.Tensor], float]) -> list[dict]:
    """An optimiser's groups of (parameters, peak learning rate), the empty ones left out."""
    return [{"params": p, "lr": lr, "peak": lr} for p, lr in params_and_rates if p]


def zero_gradients(params: list[torch.Tensor]) -> None:
    """Gradients of 0: a process without work adds zeros to the sum over all."""
    for p in params:
        p.grad = torch.zeros_like(p)


def forget_gradients(params: Iterable[torch.Tensor]) -> None:
    """No gradients, not gradients of 0: an optimiser leaves these as they are, momentum too."""
    for p in params:
        p.grad = None


def set_gradients(params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
    """Gives each parameter one of these gradients."""
    for p, grad in zip(params, grads):
        p.grad = grad


def micro_batches(
    n: int, micro: int, ranks: Ranks, even: bool = False, before: int = 0
) -> list[tuple[slice, int]]:
    """The parts of a batch of n samples that this process computes: pairs (slice, weight). weight
    is 1, or 0 for a pass that is made for company only (`even`: see processes.shares).

    before: samples of this step that were dealt out before these. The next go to the processes
    that have fewer, so that over all of them no process has two more than another."""
    return shares(passes_of(n, micro, ranks.world), ranks, even, before)


def passes_of(n: int, micro: int, world: int) -> list[slice]:
    """The passes over a batch of n samples, dealt out in turn to the processes.

    They are those that one process makes, `micro` samples each, where those can be dealt out so
    that no process has two samples more than another. Where they cannot, as many smaller passes
    for each process: waiting for a whole micro-batch of another costs more than rounding."""
    sizes = [min(micro, n - i) for i in range(0, n, micro)]
    loads = [sum(sizes[rank::world]) for rank in range(world)]
    if max(loads) - min(loads) > 1:
        count = min(world * ceil(n / (world * micro)), n)
        sizes = [n // count + (i < n % count) for i in range(count)]
    return [slice(*ends) for ends in pairwise(accumulate(sizes, initial=0))]


def seed_dropout(seed: int, step: int, first: int) -> None:
    """Seeds a micro-batch's dropout, the same whichever process computes it. In micro-batches of
    another size it draws other numbers."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, first]).generate_state(1)[0]))


class Totals:
    """The loss of a step, and the parts that are named, summed over passes and processes (fp32)."""

    def __init__(self, names: tuple[str, ...] = ()):
        self.names, self.sums = ("loss", *names), torch.zeros(1 + len(names))

    def add(self, loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> None:
        """Adds what one pass gave."""
        given = {**parts, "loss": loss}
        # item() waits for the GPU: only what is named is read
        named = [given.get(name, 0.0) for name in self.names]
        self.sums += torch.tensor([float(torch.as_tensor(x).detach()) for x in named])

    def over(self, ranks: Ranks) -> dict[str, float]:
        """The sums over all processes by name; parts that are 0 are left out."""
        sums = zip(self.names, sum_over_ranks(self.sums, ranks).tolist())
        return {name: x for name, x in sums if x or name == "loss"}


def stop_unless_finite(
    params: list[torch.Tensor],
    step: int | str,
    samples: np.ndarray,
    data: Prepared,
    losses: float | list[float] = 0.0,
) -> None:
    """Ends the run, before anything is updated, if a gradient (or a loss) is not finite.

    Both are sums over all processes, so all end."""
    grads = torch.stack(torch._foreach_norm([p.grad for p in params if p.grad is not None]))
    bad = int((~torch.isfinite(grads)).sum())
    if bad or not np.isfinite(losses).all():
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        said = f", the loss is {losses}" if losses else ""
        stop(
            f"step {step}: {bad} of {len(grads)} gradients are not finite{said} (samples {shown} "
            f"of {data.name}); nothing was updated and the last checkpoint is good; lower --lr "
            "and run again, or look at those samples"
        )
