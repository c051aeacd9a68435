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
    """Sum over positions n and targets k of weight_NK log sum_i exp(p_i (s_i - y_i)^2).

    d / d s_i = q_i 2 p_i (s_i - y_i), q the softmax of the exponents.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_NE: torch.Tensor,
        item_IE: torch.Tensor,
        bias_I: torch.Tensor,
        target_NK: torch.Tensor,
        weight_NK: torch.Tensor,
        p_I: torch.Tensor,
    ) -> torch.Tensor:
        """The sum, a scalar. target_NK: rows of item_IE, none twice but where the weight is 0."""

        def part(s_nI, at):
            return worst_and_gradient(s_nI, target_NK[at], weight_NK[at], p_I)

        loss, gradients = loss_by_rows(x_NE, item_IE, bias_I, part)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x_NE, item_IE and bias_I; none of the others."""
        return (*(grad * d for d in ctx.saved_tensors), None, None, None)


def worst_and_gradient(
    s_NI: torch.Tensor, target_NK: torch.Tensor, weight_NK: torch.Tensor, p_I: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Worst's sum, its gradient of the scores s_NI). The catalogue is summed once a position: its
    K sums differ only in its K targets. In sum k item k is the target, the others are ordinary."""
    counts_NK = weight_NK > 0  # what has no weight is no target: an item like all the rest
    s_NK, p_NK = s_NI.gather(1, target_NK), p_I[target_NK]
    as_other_NK = (p_NK * s_NK**2).masked_fill(~counts_NK, -torch.inf)
    as_target_NK = p_NK * (s_NK - 1) ** 2
    # fills the places that have no weight
    a_target_N1 = target_NK.gather(1, counts_NK.int().argmax(1, keepdim=True))

    # in place: a step spends its time on reading and writing these N x I numbers
    exponent_NI = (s_NI * s_NI).mul_(p_I)
    exponent_NI.scatter_(1, torch.where(counts_NK, target_NK, a_target_N1), -torch.inf)
    most_N1 = exponent_NI.amax(1, keepdim=True).clamp(min=-1e30)  # if all are targets
    e_NI = exponent_NI.sub_(most_N1).exp_()
    rest_N1 = most_N1 + e_NI.sum(1, keepdim=True).log()
    # row k: item k is the target, the others are not
    exponent_NKK = as_other_NK[:, None].repeat(1, target_NK.shape[1], 1)
    exponent_NKK.diagonal(dim1=1, dim2=2).copy_(as_target_NK)
    whole_NK = torch.logaddexp(rest_N1, exponent_NKK.logsumexp(2))

    q_NKK = (exponent_NKK - whole_NK[..., None]).exp() * weight_NK[..., None]
    own_NK = q_NKK.diagonal(dim1=1, dim2=2)
    d_NK = 2 * p_NK * (q_NKK.sum(1) * s_NK - own_NK)
    share_N1 = (weight_NK * (most_N1 - whole_NK).exp()).sum(1, keepdim=True)
    d_NI = e_NI.mul_(s_NI).mul_(2 * p_I).mul_(share_N1)
    d_NI.scatter_add_(1, target_NK, d_NK * counts_NK)
    return (weight_NK * whole_NK).sum(), d_NI


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
        target_NK: torch.Tensor,
        weight_NK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """alpha sum_NK weight_NK log sum_i exp(..), weights 1 where none are given. target_NK:
        items 1..I, or 0 where the weight is 0."""
        if weight_NK is None:
            weight_NK = torch.ones_like(target_NK, dtype=x_NE.dtype)
        items = (model.item.weight[1:], model.bias[1:])
        row_NK = (target_NK - 1).clamp(min=0)
        return self.alpha * Worst.apply(x_NE, *items, row_NK, weight_NK, self.p_I)
