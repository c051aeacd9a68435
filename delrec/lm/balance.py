"""How much each of stage 1's two tasks weighs in its loss (DELRec, section IV-B: the weights are
dynamic).
"""

from types import SimpleNamespace

import torch

from delrec.training.loop import OptimiserState


def weights(
    how: str, g_TA: torch.Tensor, g_RPS: torch.Tensor, log_var: torch.Tensor
) -> torch.Tensor:
    """lam_TA and lam_RPS (2,).

    gradnorm (of the authors' release, here held fixed in the gradient): lam proportional to
    ||g||^-1/2, their sum 1. uncertainty: exp(-s) of learnt log-variances s. fixed: 1/2 each.
    """
    if how == "gradnorm":
        norm = torch.stack([g_TA.norm(), g_RPS.norm()])
        # a task without a sample in this batch has no say
        w = norm.clamp(min=1e-12) ** -0.5 * (norm > 0)
        return w / w.sum().clamp(min=1e-12)
    return torch.exp(-log_var.detach()) if how == "uncertainty" else torch.tensor([0.5, 0.5])


class Balance:
    """The weights of the two losses, and what is learnt of them; a part of a checkpoint."""

    def __init__(self, cfg: SimpleNamespace):
        self.how = cfg.balance if cfg.tasks == "both" else "alone"
        self.log_var = torch.zeros(2, requires_grad=True)
        self.optimiser = torch.optim.Adam([self.log_var], lr=1e-2)
        self.learnt = OptimiserState(self.optimiser)

    def weights(self, g_TA: torch.Tensor, g_RPS: torch.Tensor) -> torch.Tensor:
        """lam_TA and lam_RPS, from the two gradients of the soft prompt."""
        if self.how == "alone":
            return torch.tensor([1.0, 1.0])
        return weights(self.how, g_TA, g_RPS, self.log_var)

    def learn(self, losses: list[float], asked: list[bool]) -> None:
        """One step of s, which follows L = exp(-s) loss + s. asked: had each task a sample?"""
        if self.how != "uncertainty":
            return
        rate = torch.exp(-self.log_var.detach())
        self.log_var.grad = (1 - rate * torch.tensor(losses)) * torch.tensor(asked)
        self.optimiser.step()

    def state_dict(self) -> dict:
        """What is learnt, and what its optimiser knows."""
        return {"log_var": self.log_var, **self.learnt.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on with what was learnt."""
        self.log_var.data.copy_(state.pop("log_var"))
        self.learnt.load_state_dict(state)
