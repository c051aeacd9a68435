"""The running mean of the steps of a training (--ema of train_backbone.py and finetune.py)."""

import contextlib
from collections.abc import Iterator

import torch


class Averaged:
    """The running mean of what trains, which is validated and written in its place (Polyak
    averaging with a memory).

        mean_t = sum_s d^(t-s) w_s / sum_s d^(t-s)

    over the steps s that count: in stage 2 those whose ranks are AdaLoRA's final ones. Before, a
    step's value may be cut, and the mean is what trains. The sum in the denominator makes the first
    step's weight as small as it is old: with d^t alone the mean would remember for 1 / (1 - d)
    steps where it began.
    """

    def __init__(self, params: list[torch.Tensor], d: float):
        """d: from 0 to 1; with 0 there is no mean, and what trains stands for itself."""
        self.params, self.d = params, d
        self.n = 0.0  # sum_s d^(t-s)
        self.means = [p.detach().clone() for p in params] if d else []

    @torch.no_grad()
    def take(self, counts: bool = True) -> None:
        """Takes a step's values into the mean. counts: false while it is only what trains."""
        self.n = 1 + self.d * self.n if counts else 0.0
        for mean, p in zip(self.means, self.params):
            # mean_t = mean_(t-1) + (w_t - mean_(t-1)) / n_t,  n_t = 1 + d n_(t-1)
            mean.lerp_(p, 1 / max(self.n, 1.0))

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, what trains has the mean's values."""
        kept = [p.detach().clone() for p in self.params] if self.d else []
        set_values(self.params, self.means)
        try:
            yield
        finally:
            set_values(self.params, kept)

    def state_dict(self) -> dict:
        """{number: mean}, and n; nothing where there is no mean."""
        return {"n": self.n, **{str(i): m for i, m in enumerate(self.means)}} if self.d else {}

    def load_state_dict(self, state: dict) -> None:
        """Makes the mean what it was."""
        self.n = state.get("n", 0.0)
        set_values(self.means, [state[str(i)] for i in range(len(self.means))])


@torch.no_grad()
def set_values(params: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Gives tensors the values of others; none where there are no others."""
    for p, value in zip(params, values):
        p.copy_(value)
