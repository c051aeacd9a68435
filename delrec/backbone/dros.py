"""DROS (SIGIR 2023): a term that keeps a model's largest scores small, added to any loss.

L = L_base + alpha mean_N log sum_i exp(p_i (s_i - y_i)^2 / beta), over all I items; s_i: the score
of item i, y_i: 1 for the target, else 0, p_i = ((n_i + 1) / sum_j (n_j + 1))^.05, n_i: how often i
is a training target; beta = 1, as in the authors' code. In effect a soft cap on the largest |s_i|:
the softmax of the exponents gives nearly all of its weight to scores above some 4.

Names: N positions with a target, E width, I items.
"""

from types import SimpleNamespace

import numpy as np
import torch
from torch.autograd.function import FunctionCtx

from delrec.backbone.by_rows import loss_by_rows
from delrec.data.prepared import Data

POWER = 0.05  # of an item's share of the targets: .57 for rare items, .74 for common ones


class Worst(torch.autograd.Function):
    """Sum over N positions of weight_N log sum_i exp(p_i (s_i - y_i)^2).

    d / d s_i = q_i 2 p_i (s_i - y_i), q the softmax of the exponents.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_NE: torch.Tensor,
        item_IE: torch.Tensor,
        bias_I: torch.Tensor,
        target_N: torch.Tensor,
        weight_N: torch.Tensor,
        p_I: torch.Tensor,
    ) -> torch.Tensor:
        """The sum, a scalar. target_N: rows of item_IE."""

        def part(s_nI, at):
            target, weight = target_N[at, None], weight_N[at]
            d = s_nI.scatter_add_(1, target, torch.full_like(target, -1, dtype=s_nI.dtype))  # s - y
            exponent = p_I * d * d
            loss = (weight * exponent.logsumexp(1)).sum()
            return loss, exponent.softmax(1) * (2 * p_I * d) * weight[:, None]

        loss, gradients = loss_by_rows(x_NE, item_IE, bias_I, part)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x_NE, item_IE and bias_I; none of the others."""
        return (*(grad * d for d in ctx.saved_tensors), None, None, None)


def shares(data: Data) -> np.ndarray:
    """p fp32 (I,) of items 1..I, from the training part alone."""
    n_I = np.bincount(data.items[data.train], minlength=data.n_items + 1)[1:] + 1.0
    return ((n_I / n_I.sum()) ** POWER).astype(np.float32)


class Robust:
    """alpha times DROS's term of some positions (train_backbone.py --dros alpha)."""

    def __init__(self, cfg: SimpleNamespace, data: Data, device: torch.device):
        self.alpha = cfg.dros
        self.p_I = torch.from_numpy(shares(data)).to(device)

    def term(
        self,
        model: torch.nn.Module,
        x_NE: torch.Tensor,
        target_N: torch.Tensor,
        weight_N: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """alpha sum_N weight_N log sum_i exp(..), weights 1 where none are given. target_N: items
        1..I."""
        weight_N = torch.ones_like(x_NE[:, 0]) if weight_N is None else weight_N
        items = (model.item.weight[1:], model.bias[1:])
        return self.alpha * Worst.apply(x_NE, *items, target_N - 1, weight_N, self.p_I)
