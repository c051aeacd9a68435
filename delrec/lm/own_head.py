"""Scores of titles from logits that the model itself gives, where they are no product of a state
with the head's rows (it caps them behind the head, say). Slower: all V logits of the states read
exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from delrec.kernels.reference import real, weights

if TYPE_CHECKING:
    from delrec.lm.model import LM

ROWS = 256  # states whose logits over the whole vocabulary exist at once


def own_logits(lm: LM, x_ND: torch.Tensor) -> torch.Tensor:
    """The decoder's own logits (N, V) for states that its head would read: its forward, with the
    body answering these states, so that all it does before, in and after the head is done."""
    base, states = lm.body, x_ND.to(lm.dtype)[None]
    forward = base.forward
    base.forward = lambda *_, **__: Answer(states)
    try:
        return lm.model(inputs_embeds=states, use_cache=False).logits[0]
    finally:
        base.forward = forward


class Answer(dict):
    """What a model's body returns: its last states by name or number, None for all else."""

    def __init__(self, states: torch.Tensor):
        super().__init__(last_hidden_state=states)
        self.last_hidden_state = states

    def __getitem__(self, key: int | str):
        return self.last_hidden_state if key in (0, "last_hidden_state") else None

    def __getattr__(self, name: str):
        return None


def candidate_scores(
    lm: LM, x_BD: torch.Tensor, tok_BCT: torch.Tensor, n_BC: torch.Tensor
) -> torch.Tensor:
    """The mean logit of the n tokens of each title: fp32 (B, C)."""
    logit_BV = own_logits(lm, x_BD).float()
    tok_BX = real(tok_BCT, n_BC).flatten(1)
    logit_BCT = logit_BV.gather(1, tok_BX).view(tok_BCT.shape)
    return (logit_BCT * weights(tok_BCT, n_BC)).sum(2)


def title_likelihood(
    lm: LM,
    x_ND: torch.Tensor,
    vocab_W: torch.Tensor,
    words_N: torch.Tensor,
    ptr_T1: torch.Tensor,
    normalise: bool,
) -> torch.Tensor:
    """log P of titles among the W tokens that occur in titles, the sum over a title's tokens or
    their mean: fp32 (titles,). Title j owns the rows ptr[j]:ptr[j+1]; words are places in
    vocab."""
    parts = [own_logits(lm, x)[:, vocab_W].float().log_softmax(1) for x in x_ND.split(ROWS)]
    log_p_N = torch.cat(parts).gather(1, words_N.long()[:, None])[:, 0]
    n_T = ptr_T1.long().diff()
    score_T = torch.segment_reduce(log_p_N, "sum", lengths=n_T, unsafe=True, initial=0)
    return score_T / n_T.clamp(min=1) if normalise else score_T


def catalogue_scores(
    lm: LM, x_BD: torch.Tensor, ptr_I1: torch.Tensor, tok_M: torch.Tensor
) -> torch.Tensor:
    """The mean logit of every title of a catalogue: fp32 (B, I)."""
    logit_VB = own_logits(lm, x_BD).float().T.contiguous()
    return F.embedding_bag(tok_M.long(), logit_VB, ptr_I1.long()[:-1], mode="mean").t()
