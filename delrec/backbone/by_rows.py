"""Losses of the scores of all items, without ever holding the scores of all positions.

Names: N positions, E width, I items.
"""

from collections.abc import Callable

import torch

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def loss_by_rows(
    x_NE: torch.Tensor,
    item_IE: torch.Tensor,
    bias_I: torch.Tensor,
    part: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, Gradients]:
    """(the sum of a loss over N positions, its gradients of x_NE, item_IE and bias_I).

    Works on a few positions at a time and takes the gradients on the way, so that the N x I scores
    never exist at once: faster in cache, and a large catalogue fits. part(s_nI, at): the loss of
    the positions `at`, whose scores are s_nI = x . e + b, and its gradient of these scores.
    """
    rows = max(1, 2 ** (28 if x_NE.is_cuda else 22) // len(item_IE))
    dx_NE, ditem_IE = torch.empty_like(x_NE), torch.zeros_like(item_IE)
    dbias_I, loss = torch.zeros_like(bias_I), x_NE.new_zeros(())
    for first in range(0, len(x_NE), rows):
        at = slice(first, first + rows)
        part_loss, ds_nI = part(torch.addmm(bias_I, x_NE[at], item_IE.T), at)
        loss = loss + part_loss
        torch.mm(ds_nI, item_IE, out=dx_NE[at])
        ditem_IE.addmm_(ds_nI.T, x_NE[at])
        dbias_I += ds_nI.sum(0)
    return loss, (dx_NE, ditem_IE, dbias_I)
