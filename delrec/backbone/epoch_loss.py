"""The loss that an epoch logs."""

import torch

from delrec.processes import Ranks, sum_over_ranks


class EpochLoss:
    """The mean loss of an epoch, from sums that every process keeps of its own rows and the number
    of all their targets; a part of a checkpoint."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.mean, self.n_targets = ranks, None, 0
        self.total = torch.zeros((), device=ranks.device)

    def add(self, loss: torch.Tensor) -> None:
        """Adds a sum over some targets."""
        self.total += loss.detach()

    def count(self, n_targets: int) -> None:
        """Adds a step's targets, those of all processes."""
        self.n_targets += n_targets

    def close(self) -> None:
        """Ends an epoch."""
        self.mean = sum_over_ranks(self.total, self.ranks).item() / self.n_targets
        self.total, self.n_targets = torch.zeros_like(self.total), 0

    def fields(self) -> dict:
        """What is logged: nothing before the first epoch."""
        return {} if self.mean is None else {"loss": self.mean}

    def state_dict(self) -> dict:
        """Every process' sum of this epoch, its targets so far, and the mean of the last."""
        zero = torch.zeros_like(self.total)
        own = [self.total if r == self.ranks.rank else zero for r in range(self.ranks.world)]
        return {
            "totals": torch.stack([sum_over_ranks(t, self.ranks) for t in own]),
            "n_targets": self.n_targets,
            "mean": self.mean,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes this process' sum, the targets so far, and the mean of the last epoch."""
        self.total = state["totals"][self.ranks.rank].to(self.ranks.device)
        self.n_targets, self.mean = state["n_targets"], state["mean"]
