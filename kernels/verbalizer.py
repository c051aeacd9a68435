"""The verbalizer: what the LM head says at the mask -> scores of titles, exact (fp32 sums) and
without ever holding B x V logits.

Three public functions and a helper. reference.py is the definition, checks.py what is refused,
cpu.py the C++ loops, gpu.py the Triton kernels; the tensors' device decides (impl="auto"),
impl="ref", "cpp" or "triton" decides otherwise. Dtypes: x and head both fp32, bf16 or fp16 (fp64:
reference only); token ids and lengths of any integer dtype, int32 without a copy. Wrong input
raises ValueError with the tensors' names and shapes. known=True leaves out the look at the numbers
in token ids, lengths and pointers, for which a GPU is waited for: the caller has looked at them
once. Names: B rows, C candidates, T tokens of a title (padded), N title positions, V vocabulary, D
width, I titles of a catalogue, M their tokens.
"""

from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .checks import (
    catalogue_must_fit,
    head_must_fit,
    must_be_integers,
    must_be_within,
    must_cover,
    must_have_rank,
    refuse_shapes,
    titles_must_fit,
)
from .reference import real, weights

__all__ = ["candidate_scores", "title_likelihood", "catalogue_topk", "catalogue_scores"]


def candidate_scores(
    x_BD: Tensor,
    head_VD: Tensor,
    tok_BCT: Tensor,
    n_BC: Tensor,
    bias_V: Tensor | None = None,
    impl: str = "auto",
    known: bool = False,
) -> Tensor:
    """score[b, c] = mean over t < n[b, c] of logit(tok[b, c, t]) at x[b] (arXiv 2406.11156, the
    verbalizer): fp32 (B, C).

    n = 1 everywhere gives the first-token and the letter verbalizer. An empty title (n = 0) scores
    0, with no gradient. Differentiable in x, and in head and bias where they ask for it; what
    stands behind a title's n tokens is never read.
    """
    must_have_rank(x_BD, "x_BD", 2)
    must_have_rank(tok_BCT, "tok_BCT", 3)
    must_have_rank(n_BC, "n_BC", 2)
    head_must_fit(x_BD, head_VD, bias_V)
    if tok_BCT.shape[:2] != n_BC.shape or len(tok_BCT) != len(x_BD):
        refuse_shapes(
            "tok_BCT, n_BC and x_BD",
            (tok_BCT, n_BC, x_BD),
            "B alike in all three and C in the first two",
        )
    must_be_integers(tok_BCT, "tok_BCT")
    must_be_integers(n_BC, "n_BC")
    if not known:
        titles_must_fit(tok_BCT, n_BC, len(head_VD))
    which = choose(impl, x_BD)
    if which == "ref" or not tok_BCT.numel() or not x_BD.shape[1]:
        return reference.candidate_scores(x_BD, head_VD, tok_BCT, n_BC, bias_V)
    return _CandidateScores.apply(
        x_BD, head_VD, bias_V, tok_BCT.int().contiguous(), n_BC.int().contiguous(), which
    )


def title_likelihood(
    x_ND: Tensor,
    head_VD: Tensor,
    tok_N: Tensor,
    ptr_T1: Tensor,
    bias_V: Tensor | None = None,
    normalise: bool = False,
    impl: str = "auto",
    known: bool = False,
) -> Tensor:
    """log P(title) = sum over its tokens of log softmax(logits at x[i])[tok[i]]; title j owns the
    rows ptr[j]:ptr[j+1]. fp32 (titles,).

    normalise divides by the number of tokens. An empty title scores 0. Differentiable in x; in head
    and bias by the reference, which is slower. The N x V logits exist in tiles only.
    """
    must_have_rank(x_ND, "x_ND", 2)
    must_have_rank(tok_N, "tok_N", 1)
    must_have_rank(ptr_T1, "ptr_T1", 1)
    head_must_fit(x_ND, head_VD, bias_V)
    if len(tok_N) != len(x_ND):
        refuse_shapes("tok_N and x_ND", (tok_N, x_ND), "one token per row of x")
    must_be_integers(tok_N, "tok_N")
    if not known:
        must_cover(ptr_T1, "ptr_T1", tok_N, "tok_N")
        must_be_within(tok_N, "tok_N", len(head_VD), f"head_VD has shape {tuple(head_VD.shape)}")
    which = choose(impl, x_ND)
    trains = torch.is_grad_enabled() and (
        head_VD.requires_grad or (bias_V is not None and bias_V.requires_grad)
    )
    if which == "ref" or trains or not x_ND.numel():
        logp_N = reference.log_probs(x_ND, head_VD, tok_N, bias_V)
    else:
        logp_N = _LogProbs.apply(x_ND, head_VD, bias_V, tok_N.int().contiguous(), which)
    n_T = ptr_T1.long().diff()
    score_T = logp_N[:0]
    if len(n_T):
        score_T = torch.segment_reduce(logp_N, "sum", lengths=n_T, unsafe=True, initial=0)
    return score_T / n_T.clamp(min=1) if normalise else score_T


@torch.no_grad()
def catalogue_scores(
    x_BD: Tensor,
    head_VD: Tensor,
    ptr_I1: Tensor,
    tok_M: Tensor,
    bias_V: Tensor | None = None,
    impl: str = "auto",
    known: bool = False,
) -> Tensor:
    """The mean-logit score of every title of a catalogue in CSR form (title i owns
    tok[ptr[i]:ptr[i+1]]): fp32 (B, I), 0 for an empty title. Part of a catalogue: ptr_I1[a:b + 1]
    with the same tok_M. No gradient.
    """
    catalogue_must_fit(x_BD, head_VD, ptr_I1, tok_M, bias_V, known)
    if choose(impl, x_BD) != "cpp" or not x_BD.numel():
        return reference.catalogue_scores(x_BD, head_VD, ptr_I1, tok_M, bias_V)
    return backend("cpp").catalogue_scores(
        x_BD.contiguous(),
        head_VD,
        ptr_I1.long().contiguous(),
        tok_M.int().contiguous(),
        fp32(bias_V),
    )


@torch.no_grad()
def catalogue_topk(
    x_BD: Tensor,
    head_VD: Tensor,
    ptr_I1: Tensor,
    tok_M: Tensor,
    k: int,
    seen_BS: Tensor | None = None,
    bias_V: Tensor | None = None,
    impl: str = "auto",
    known: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k best titles of a catalogue per row and their scores: int64 and fp32 (B, k), best first,
    equal scores by lower id on every device. seen_BS: ids to leave out, negative ones do not count.
    Empty titles never appear; -1 and -inf where fewer than k remain.
    """
    catalogue_must_fit(x_BD, head_VD, ptr_I1, tok_M, bias_V, known)
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    seen_BS = torch.full((len(x_BD), 1), -1, device=x_BD.device) if seen_BS is None else seen_BS
    must_have_rank(seen_BS, "seen_BS", 2)
    must_be_integers(seen_BS, "seen_BS")
    if len(seen_BS) != len(x_BD):
        refuse_shapes("seen_BS and x_BD", (seen_BS, x_BD), "B alike")
    which = choose(impl, x_BD)
    if which == "ref" or not x_BD.numel():
        return reference.catalogue_topk(x_BD, head_VD, ptr_I1, tok_M, k, seen_BS, bias_V)
    return backend(which).catalogue_topk(
        x_BD.contiguous(),
        head_VD,
        ptr_I1.long().contiguous(),
        tok_M.int().contiguous(),
        k,
        seen_BS.long().contiguous(),
        fp32(bias_V),
    )


# ---------------------------------------------------------------- gradients


class _CandidateScores(torch.autograd.Function):
    """d score[b, c] / d x[b] = 1/n sum_t head[tok[b, c, t]]."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        tok_BCT: Tensor,
        n_BC: Tensor,
        which: str,
    ) -> Tensor:
        score_BC, kept = backend(which).scores(
            x_BD.contiguous(), head_VD, tok_BCT, n_BC, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(x_BD, head_VD, tok_BCT, n_BC, kept)
        ctx.which = which
        ctx.bias_dtype = None if bias_V is None else bias_V.dtype
        if bias_V is None:
            return score_BC
        return score_BC + (bias_V.float()[real(tok_BCT, n_BC)] * weights(tok_BCT, n_BC)).sum(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BC: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, head_VD, tok_BCT, n_BC, kept = ctx.saved_tensors
        to_x, to_head, to_bias = ctx.needs_input_grad[:3]
        dx_BD = dhead_VD = dbias_V = None
        if to_x:
            g_BC = g_BC.float().contiguous()
            dx_BD = backend(ctx.which).scores_dx(g_BC, kept, head_VD, tok_BCT, n_BC).to(x_BD.dtype)
        # not in DELRec, whose head is frozen: G[b, v], then one product
        if to_head or to_bias:
            G_BV = token_gradients(g_BC, tok_BCT, n_BC, len(head_VD))
            if to_head:
                dhead_VD = (G_BV.t() @ x_BD.float()).to(head_VD.dtype)
            if to_bias:
                dbias_V = G_BV.sum(0).to(ctx.bias_dtype)
        return dx_BD, dhead_VD, dbias_V, None, None, None


def token_gradients(g_BC: Tensor, tok_BCT: Tensor, n_BC: Tensor, V: int) -> Tensor:
    """The gradient of each token's logit: fp32 (B, V)."""
    each_BCT = g_BC.float()[..., None] * weights(tok_BCT, n_BC)
    G_BV = torch.zeros(len(g_BC), V, device=g_BC.device)
    return G_BV.scatter_add_(1, real(tok_BCT, n_BC).flatten(1), each_BCT.flatten(1))


class _LogProbs(torch.autograd.Function):
    """d log P(tok[i]) / d x[i] = head[tok[i]] - sum_v P(v) head[v], made along with the value, so
    backward is one multiplication.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, bias_V: Tensor | None, tok_N: Tensor, which: str
    ) -> Tensor:
        logp_N, diff_ND = backend(which).log_probs(
            x_ND.contiguous(), head_VD, tok_N, fp32(bias_V), ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(diff_ND)
        ctx.dtype = x_ND.dtype
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, ...]:
        (diff_ND,) = ctx.saved_tensors
        return (g_N[:, None] * diff_ND).to(ctx.dtype), None, None, None, None


# ---------------------------------------------------------------- who computes


def choose(impl: str, x: Tensor) -> str:
    """'ref', 'cpp' or 'triton' for a tensor. auto: Triton on CUDA, C++ on a CPU where it could be
    built, else the reference.
    """
    if impl not in ("auto", "ref", "cpp", "triton"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'ref', 'cpp' or 'triton'")
    fast = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if impl == "auto":
        if not fast:
            return "ref"
        if x.is_cuda:
            return "triton" if find_spec("triton") else "ref"
        return "cpp" if x.device.type == "cpu" and backend("cpp").library() else "ref"
    if impl != "ref" and not fast:
        raise ValueError(f"impl={impl!r} takes fp32, bf16 and fp16, x is {x.dtype}; use impl='ref'")
    if impl == "cpp" and (x.device.type != "cpu" or not backend("cpp").library()):
        raise ValueError(
            f"impl='cpp' needs tensors on the CPU and a C++ compiler; x is on {x.device}"
        )
    return impl


def backend(which: str) -> ModuleType:
    """The module of 'cpp' or 'triton'; triton only exists on Linux, and takes half a second to
    import.
    """
    if which == "cpp":
        from . import cpu

        return cpu
    from . import gpu

    return gpu


def fp32(t: Tensor | None) -> Tensor | None:
    """A tensor in fp32, in one piece; None stays None."""
    return None if t is None else t.float().contiguous()
