"""The verbalizer in plain torch: the definition that every faster implementation must equal.

logit(v) = head_VD[v] . x_D + bias_V[v], accumulated in fp32 whatever the inputs' dtype.
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def candidate_scores(x_BD, head_VD, tok_BCT, n_BC, bias_V=None):
    """score[b, c] = mean over t < n[b, c] of logit(tok[b, c, t]) at x[b]; 0 for an empty title. fp32 (B, C).

    Linear in the head, so the title's rows are pooled first and dotted once: nothing of size B*C*T*D or B*V is made.
    """
    B, C, T = tok_BCT.shape
    n_N = n_BC.reshape(-1).long()
    real = torch.arange(T, device=tok_BCT.device) < n_N[:, None]
    weight_NT = real.to(torch.promote_types(head_VD.dtype, torch.float32)) / n_N.clamp(min=1)[:, None]
    tok_NT = tok_BCT.reshape(B * C, T).masked_fill(~real, 0).long()
    used_U, at_NT = tok_NT.unique(return_inverse=True)       # only the rows that occur are widened to fp32
    row_ND = F.embedding_bag(at_NT.view_as(tok_NT), head_VD[used_U].to(weight_NT.dtype), mode="sum", per_sample_weights=weight_NT)
    score_BC = torch.einsum("bd,bcd->bc", x_BD.to(row_ND.dtype), row_ND.view(B, C, -1))
    return score_BC if bias_V is None else score_BC + (bias_V.float()[tok_NT] * weight_NT).sum(1).view(B, C)


def _token_log_probs(x_ND, head_VD, tok_N, bias_V):
    logit_NV = F.linear(x_ND, head_VD, None if bias_V is None else bias_V.to(x_ND.dtype)).float()
    return logit_NV.gather(1, tok_N[:, None])[:, 0] - logit_NV.logsumexp(1)


def title_likelihood(x_ND, head_VD, tok_N, ptr_T1, bias_V=None, normalise=False, chunk=1024):
    """log P(title) = sum over its tokens of log softmax(logits at x[i])[tok[i]]; title j owns rows ptr[j]:ptr[j+1]. fp32 (titles,).

    normalise divides by the number of tokens. The logits of at most `chunk` rows exist at a time, in backward too (recomputed).
    """
    tok_N = tok_N.long()
    parts = [checkpoint(_token_log_probs, x_ND[i:i + chunk], head_VD, tok_N[i:i + chunk], bias_V, use_reentrant=False)
             for i in range(0, len(tok_N), chunk)]
    logp_N = torch.cat(parts) if parts else x_ND.sum(1).float()
    n_T = ptr_T1.long().diff()
    title_N = torch.repeat_interleave(torch.arange(len(n_T), device=x_ND.device), n_T)
    score_T = torch.zeros(len(n_T), device=x_ND.device).index_add(0, title_N, logp_N)
    return score_T / n_T.clamp(min=1) if normalise else score_T


def catalogue_scores(x_BD, head_VD, ptr_I1, tok_M, bias_V=None):
    """The mean-logit score of every title of a catalogue given as CSR: fp32 (B, I). With many titles the V logits come first."""
    logit_VB = F.linear(head_VD, x_BD).float()
    logit_VB = logit_VB if bias_V is None else logit_VB + bias_V.float()[:, None]
    return F.embedding_bag(tok_M.long(), logit_VB.contiguous(), ptr_I1[:-1].long(), mode="mean").t()


def catalogue_topk(x_BD, head_VD, ptr_I1, tok_M, k, seen_BI=None, bias_V=None):
    """The k best titles per row: (ids int64 (B, k), scores fp32 (B, k)); seen ones left out, ties by lower id."""
    score_BI = catalogue_scores(x_BD, head_VD, ptr_I1, tok_M, bias_V)
    if seen_BI is not None:
        score_BI = score_BI.masked_fill(seen_BI, -torch.inf)
    score_BI, id_BI = score_BI.sort(dim=1, descending=True, stable=True)
    return id_BI[:, :k], score_BI[:, :k]
