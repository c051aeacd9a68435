"""The verbalizer in plain torch: the definition that every faster implementation must equal.

logit(v) = head_VD[v] . x_D + bias_V[v], summed in fp32 whatever the inputs' dtype (in fp64 for fp64
inputs).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def exact(t: Tensor | None) -> Tensor | None:
    """A tensor in fp32; one in fp64 stays so."""
    return None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))


def weights(tok_BCT: Tensor, n_BC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """1/n for the tokens of a title, 0 behind them: (B, C, T)."""
    inside_BCT = torch.arange(tok_BCT.shape[2], device=n_BC.device) < n_BC[..., None]
    return inside_BCT.to(dtype) / n_BC.clamp(min=1)[..., None]


def real(tok_BCT: Tensor, n_BC: Tensor) -> Tensor:
    """The tokens, 0 behind a title's end: int64."""
    behind_BCT = torch.arange(tok_BCT.shape[2], device=n_BC.device) >= n_BC[..., None]
    return tok_BCT.long().masked_fill(behind_BCT, 0)


def candidate_scores(
    x_BD: Tensor, head_VD: Tensor, tok_BCT: Tensor, n_BC: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """score[b, c] = mean over t < n[b, c] of logit(tok[b, c, t]) at x[b]; 0 for an empty title.
    fp32 (B, C).

    Linear in the head, so the title's rows are pooled first and dotted once: nothing of size
    B*C*T*D or B*V is made.
    """
    B, C, T = tok_BCT.shape
    weight_NT = weights(tok_BCT, n_BC, exact(x_BD[:0]).dtype).view(B * C, T)
    tok_NT = real(tok_BCT, n_BC).view(B * C, T)
    # only the rows that occur are widened to fp32
    used_U, at_NT = tok_NT.unique(return_inverse=True)
    row_ND = F.embedding_bag(
        at_NT.view_as(tok_NT), exact(head_VD[used_U]), mode="sum", per_sample_weights=weight_NT
    )
    score_BC = torch.einsum("bd,bcd->bc", exact(x_BD), row_ND.view(B, C, -1))
    if bias_V is None:
        return score_BC
    return score_BC + (exact(bias_V)[tok_NT] * weight_NT).sum(1).view(B, C)


def log_probs_of_chunk(
    x_ND: Tensor, head_VD: Tensor, tok_N: Tensor, bias_V: Tensor | None
) -> Tensor:
    """The same with all its logits at once."""
    logit_NV = F.linear(exact(x_ND), exact(head_VD), exact(bias_V))
    return logit_NV.gather(1, tok_N[:, None])[:, 0] - logit_NV.logsumexp(1)


def log_probs(
    x_ND: Tensor, head_VD: Tensor, tok_N: Tensor, bias_V: Tensor | None = None, chunk: int = 1024
) -> Tensor:
    """log softmax(logits at x[i])[tok[i]]: fp32 (N,). The logits of at most `chunk` rows exist at a
    time, in backward too (recomputed).
    """
    parts = [
        checkpoint(
            log_probs_of_chunk,
            x_ND[i : i + chunk],
            head_VD,
            tok_N[i : i + chunk].long(),
            bias_V,
            use_reentrant=False,
        )
        for i in range(0, len(tok_N), chunk)
    ]
    return torch.cat(parts) if parts else exact(x_ND.sum(1))


def catalogue_scores(
    x_BD: Tensor, head_VD: Tensor, ptr_I1: Tensor, tok_M: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """The mean-logit score of every title of a catalogue given as CSR: fp32 (B, I); 0 for an empty
    title. The V logits come first: with many titles that is far less work than gathering the rows
    of each.

    What stands before the first title and behind the last is a bag of its own, and left out: to cut
    it off, a GPU would be waited for.
    """
    logit_VB = F.linear(exact(head_VD), exact(x_BD))
    logit_VB = logit_VB if bias_V is None else logit_VB + exact(bias_V)[:, None]
    begins_I2 = F.pad(ptr_I1.long(), (1, 0))
    score_I2B = F.embedding_bag(tok_M.long(), logit_VB.contiguous(), begins_I2, mode="mean")
    return score_I2B[1:-1].t()


def catalogue_topk(
    x_BD: Tensor,
    head_VD: Tensor,
    ptr_I1: Tensor,
    tok_M: Tensor,
    k: int,
    seen_BS: Tensor,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best titles of each row and their scores: int64 and fp32 (B, k).

    Equal scores by lower id; titles in seen and empty ones are left out; -1 and -inf where fewer
    than k remain.
    """
    score_BI = catalogue_scores(x_BD, head_VD, ptr_I1, tok_M, bias_V)
    score_BI = score_BI.masked_fill(ptr_I1.diff() == 0, -torch.inf)
    n_items = score_BI.shape[1]
    row_N, at_N = ((seen_BS >= 0) & (seen_BS < n_items)).nonzero(as_tuple=True)
    score_BI[row_N, seen_BS[row_N, at_N].long()] = -torch.inf
    score_BI = F.pad(score_BI, (0, max(k - n_items, 0)), value=-torch.inf)
    score_BI, id_BI = score_BI.sort(dim=1, descending=True, stable=True)
    score_Bk, id_Bk = score_BI[:, :k], id_BI[:, :k]
    return id_Bk.masked_fill(score_Bk == -torch.inf, -1), score_Bk
