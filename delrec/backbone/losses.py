"""What a conventional model learns from: its own targets, and a teacher's lists (DLLM2Rec).

Every loss is a sum over N positions. A position has a state x_N (E,) and a target item; item i
scores y_i = x . e_i + b_i.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import FunctionCtx

from delrec.backbone.by_rows import Gradients, loss_by_rows
from delrec.backbone.dros import Robust
from delrec.kernels import cpu

CALIBRATION = 0.75  # t of gBCE, the paper's
FEW = 128  # positions
LEAST = -1e30  # stands for a bias of -inf, which the kernel cannot take


class CrossEntropy(torch.autograd.Function):
    """Sum over N positions of -sum_k weight_NK log softmax(x_NE . item_IE + bias_I)[target_NK];
    without weights K is 1.

    d logit = softmax - one-hot. With `bf16` the products are of bf16 numbers, their sums fp32.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_NE: torch.Tensor,
        item_IE: torch.Tensor,
        bias_I: torch.Tensor,
        target_NK: torch.Tensor,
        weight_NK: torch.Tensor | None = None,
        bf16: bool = False,
    ) -> torch.Tensor:
        """The sum, a scalar. x (N, E), items (I, E), biases (I,), targets and weights (N, K)."""
        if weight_NK is None:
            weight_NK = torch.ones(1, device=x_NE.device).expand(target_NK.shape)
        loss_and_gradients = in_bf16 if bf16 else in_fp32
        loss, gradients = loss_and_gradients(x_NE, item_IE, bias_I, target_NK, weight_NK)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of x_NE, item_IE and bias_I; none of the others."""
        return (*(grad * d for d in ctx.saved_tensors), None, None, None)


def in_fp32(
    x_NE: torch.Tensor,
    item_IE: torch.Tensor,
    bias_I: torch.Tensor,
    target_NK: torch.Tensor,
    weight_NK: torch.Tensor,
) -> tuple[torch.Tensor, Gradients]:
    """(CrossEntropy's sum, its gradients), all in fp32."""

    def part(s_nI, at):
        p, target, weight = s_nI.softmax(1), target_NK[at], weight_NK[at]
        loss = -(weight * p.gather(1, target).clamp(min=1e-37).log()).sum()
        p *= weight.sum(1, keepdim=True)
        return loss, p.scatter_add_(1, target, -weight)

    return loss_by_rows(x_NE, item_IE, bias_I, part)


def in_bf16(
    x_NE: torch.Tensor,
    item_IE: torch.Tensor,
    bias_I: torch.Tensor,
    target_NK: torch.Tensor,
    weight_NK: torch.Tensor,
) -> tuple[torch.Tensor, Gradients]:
    """The same on a CPU, whose products multiply bf16 numbers: of x and e, and of the gradients.

    sum_k w_k (S - y_k), S = log sum_i exp y_i, y_i = x . e_i + b_i; w is the sum over k of w_k.
    """
    bias_I = bias_I.clamp(min=LEAST)
    x_NE, item_IE = x_NE.bfloat16().contiguous(), item_IE.bfloat16().contiguous()
    S_N, mean_NE, ditem_IE, dbias_I = cpu.softmax_sums(x_NE, item_IE, bias_I, target_NK, weight_NK)
    w_N, weight_NK = weight_NK.sum(1), weight_NK.contiguous()
    # targets by the same rounded numbers: where one is sure, S - y and the gradients are small
    own_NE = F.embedding_bag(target_NK, item_IE.float(), per_sample_weights=weight_NK, mode="sum")
    y_N = (own_NE * x_NE).sum(1) + (weight_NK * bias_I[target_NK]).sum(1)
    return (w_N * S_N - y_N).sum(), (w_N[:, None] * mean_NE - own_NE, ditem_IE, dbias_I)


# ---------------------------------------------------------------- the targets


def catalogue_loss(
    model: torch.nn.Module, x_NE: torch.Tensor, target_N: torch.Tensor
) -> torch.Tensor:
    """- log softmax over all I items, summed (ours: --loss ce); items that model.barred_I bars have
    no part in it (--cold-out)."""
    return over_catalogue(model, x_NE, target_N[:, None] - 1)


def over_catalogue(
    model: torch.nn.Module,
    x_NE: torch.Tensor,
    row_NK: torch.Tensor,
    weight_NK: torch.Tensor | None = None,
) -> torch.Tensor:
    """CrossEntropy over a model's items 1..I. row_NK: the targets, 0 is item 1."""
    bf16 = multiplies_bf16(model, x_NE)
    items = (model.item.weight[1:], open_bias(model))
    return CrossEntropy.apply(x_NE, *items, row_NK, weight_NK, bf16)


def multiplies_bf16(model: torch.nn.Module, x_NE: torch.Tensor) -> bool:
    """True if the softmax over all items multiplies bf16 numbers: on a CPU that does it in
    hardware, where twice as many fit in an instruction, unless --fp32 was given. Few positions gain
    less than it takes to pack the items."""
    fits = x_NE.device.type == "cpu" and len(x_NE) >= FEW
    return fits and not model.fp32 and cpu.has_fast_bf16() and cpu.library() is not None


def open_bias(model: torch.nn.Module) -> torch.Tensor:
    """The biases (I,) of items 1..I, -inf at those that are barred (--cold-out)."""
    bias_I = model.bias[1:]
    return bias_I if model.barred_I is None else bias_I + model.barred_I


def is_barred(model: torch.nn.Module, item_X: torch.Tensor) -> torch.Tensor:
    """Mask of the items that are barred (--cold-out), of the same shape; 0 pads and is none."""
    if model.barred_I is None:
        return torch.zeros_like(item_X, dtype=torch.bool)
    return (model.barred_I[(item_X - 1).clamp(min=0)] != 0) & (item_X > 0)


def sampled_loss(
    model: torch.nn.Module, x_NE: torch.Tensor, target_N: torch.Tensor, negative_n: torch.Tensor
) -> torch.Tensor:
    """- log softmax over the target and n items drawn uniformly, shared by all positions, summed.
    Each stands for (I - 1) / n items, so the sum below the fraction is right on average (arXiv
    1412.2007, section 3)."""
    s_N, s_Nn = scores_beside(model, x_NE, target_N, negative_n)
    stands_for = np.log((len(model.bias) - 2) / len(negative_n))
    return (torch.logaddexp(s_N, (s_Nn + stands_for).logsumexp(1)) - s_N).sum()


def scores_beside(
    model: torch.nn.Module, x_NE: torch.Tensor, target_N: torch.Tensor, negative_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The targets' scores (N,), and those of drawn items beside each (N, n), -inf where the drawn
    one is the target."""
    s_N = (model.item(target_N) * x_NE).sum(-1) + model.bias[target_N]
    s_Nn = torch.addmm(model.bias[negative_n], x_NE, model.item(negative_n).T)
    return s_N, s_Nn.masked_fill(negative_n == target_N[:, None], -torch.inf)


def calibrated_loss(
    model: torch.nn.Module,
    x_NE: torch.Tensor,
    target_N: torch.Tensor,
    negative_n: torch.Tensor,
    t: float = CALIBRATION,
) -> torch.Tensor:
    """gBCE (arXiv 2308.07192): binary cross-entropy whose positive part has the power beta: fewer
    items are drawn than there are. Ours: all positions share the k = n drawn items.

    L = - (beta log sigmoid(s+) + sum_k log(1 - sigmoid(s_k))) / (k + 1), beta from the share alpha
    of the items that is drawn: t = 0 is plain binary cross-entropy, t = 1 fully calibrated.
    """
    s_N, s_Nk = scores_beside(model, x_NE, target_N, negative_n)
    k = len(negative_n)
    beta = power_of_truth(k, len(model.bias) - 1, t)
    return (beta * F.softplus(-s_N) + F.softplus(s_Nk).sum(1)).sum() / (k + 1)


def power_of_truth(k: int, n_items: int, t: float = CALIBRATION) -> float:
    """beta = alpha (t (1 - 1 / alpha) + 1 / alpha), alpha = k / (I - 1); at most 1, where a small
    catalogue is drawn more than once."""
    alpha = min(1.0, k / max(n_items - 1, 1))
    return alpha * (t * (1 - 1 / alpha) + 1 / alpha)


def binary_loss(
    model: torch.nn.Module, x_NE: torch.Tensor, target_N: torch.Tensor, negative_N: torch.Tensor
) -> torch.Tensor:
    """Binary cross-entropy of the target against one item that the user never had (the papers'
    own: --loss bce)."""
    both_2N = torch.stack([target_N, negative_N])
    score_2N = (model.item(both_2N) * x_NE).sum(-1) + model.bias[both_2N]
    return F.softplus(-score_2N[0]).sum() + F.softplus(score_2N[1]).sum()


# ---------------------------------------------------------------- a teacher's lists


def list_weights(
    model: torch.nn.Module,
    x_NE: torch.Tensor,
    item_NK: torch.Tensor,
    weight_NK: torch.Tensor,
    trust_N: torch.Tensor,
    cfg: SimpleNamespace,
) -> torch.Tensor:
    """w (N, K), what each listed item counts (arXiv 2405.00338, section 4).

    item_NK: 0 where nothing is listed; weight_NK: the fixed part of the weights; trust_N: m, what a
    list counts. The weight of consistency comes here. A barred item counts as not listed.
    """
    listed_NK = (item_NK > 0) & ~is_barred(model, item_NK)
    weight_NK = weight_NK * listed_NK
    if cfg.w_consistency:
        consistent_NK = in_own_best(model, x_NE, item_NK)
        weight_NK = weight_NK + cfg.w_consistency * consistent_NK * listed_NK
    # w(r) = m w(r) / sum_r w(r), even where all w(r) are 0
    even_NK = listed_NK / listed_NK.sum(1, keepdim=True).clamp(min=1)
    sum_N1 = weight_NK.sum(1, keepdim=True)
    w_NK = torch.where(sum_N1 > 0, weight_NK / sum_N1.clamp(min=1e-9), even_NK)
    return trust_N[:, None] * w_NK


def list_loss(
    model: torch.nn.Module,
    x_NE: torch.Tensor,
    item_NK: torch.Tensor,
    w_NK: torch.Tensor,
    negative_N: torch.Tensor | None = None,
    robust: Robust | None = None,
) -> torch.Tensor:
    """L_d: the listed items against the catalogue, or against one unlisted item each (the paper's
    sigmoid), then with DROS's term of every listed item as the target, if there is one. Barred
    items are neither; w_NK is 0 there."""
    if negative_N is None:
        return over_catalogue(model, x_NE, (item_NK - 1).clamp(min=0), w_NK)
    y_NK = (model.item(item_NK) * x_NE[:, None]).sum(-1) + model.bias[item_NK]
    y_N = (model.item(negative_N) * x_NE).sum(-1) + model.bias[negative_N]
    is_unlisted_N = (item_NK != negative_N[:, None]).all(1) & ~is_barred(model, negative_N)
    loss = (w_NK * (F.softplus(-y_NK) + (F.softplus(y_N) * is_unlisted_N)[:, None])).sum()
    if robust:
        loss = loss + robust.term(model, x_NE, item_NK, w_NK)
    return loss


@torch.no_grad()
def in_own_best(model: torch.nn.Module, x_NE: torch.Tensor, item_NK: torch.Tensor) -> torch.Tensor:
    """True (N, K) where a listed item is among the student's own best K."""
    rows, K = max(1, 2**22 // len(model.bias)), item_NK.shape[1]
    inside = []
    for x, item in zip(x_NE.split(rows), item_NK.split(rows)):
        y_NI = torch.addmm(open_bias(model), x, model.item.weight[1:].T)
        least = y_NI.topk(min(K, y_NI.shape[1])).values[:, -1:]
        inside.append(y_NI.gather(1, (item - 1).clamp(min=0)) >= least)
    return torch.cat(inside)
