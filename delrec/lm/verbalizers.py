"""From a state of the LM to a score for each title: the four verbalizers, and products of vectors.

likelihood   the mean log probability of a title's tokens, behind one another (ours)
mean         the mean of the logits of a title's tokens at the mask
first        the logit of its first token
letter       the logit of its letter in the list of candidates
items        the state's product with the item's vector (--input ids, E4SRec)
"""

import numpy as np
import torch

from delrec.kernels import verbalizer as kernels
from delrec.lm import items, own_head
from delrec.lm.prompts import LETTERS
from delrec.lm.reading import read
from delrec.lm.text import encode
from delrec.runtime import stop


def letter_ids(lm, C) -> np.ndarray:
    """One token per letter as it stands in front of a candidate (C,); refused where they are not
    single and distinct."""
    if len(LETTERS) < C:
        stop(
            f"--verbalizer letter has {len(LETTERS)} letters but there are {C} candidates; use at "
            f"most {len(LETTERS)}"
        )
    ids = [encode(lm, x) for x in LETTERS[:C]]
    if any(len(i) != 1 for i in ids) or len({i[0] for i in ids}) < C:
        stop(
            f"{lm.name}: its tokenizer does not keep the letters A..{LETTERS[C - 1]} as one token "
            "each; use another --verbalizer"
        )
    return np.array([i[0] for i in ids])


def tokens_asked(lm, cand_BC, titles, verbalizer) -> tuple:
    """The tokens (B, C, T) whose mean logit at the mask is a candidate's score, and how many of
    them there are (B, C)."""
    if verbalizer == "letter":
        letters_C = letter_ids(lm, cand_BC.shape[1])
        tok_BCT = np.broadcast_to(letters_C[None, :, None], (*cand_BC.shape, 1))
        return tok_BCT, np.ones(cand_BC.shape, int)
    tok_BCT, n_BC = titles.padded(cand_BC)
    return tok_BCT, np.minimum(n_BC, 1) if verbalizer == "first" else n_BC


def verbalise(lm, x_BD, cand_BC, titles, verbalizer) -> torch.Tensor:
    """Candidates' scores (B, C) from one state a prompt."""
    if verbalizer == "items":
        item_BCe = lm.items.E[torch.as_tensor(cand_BC, device=lm.device)]
        return (items.item_space(lm, x_BD)[:, None] * item_BCe).sum(-1)
    tok_BCT, n_BC = (
        torch.as_tensor(np.ascontiguousarray(a, np.int32)).to(lm.device)
        for a in tokens_asked(lm, cand_BC, titles, verbalizer)
    )
    if lm.own_head:
        return own_head.candidate_scores(lm, x_BD, tok_BCT, n_BC)
    return kernels.candidate_scores(scaled(lm, x_BD), lm.head_VD, tok_BCT, n_BC, lm.bias_V)


def verbalise_all(lm, x_BD, titles, verbalizer) -> torch.Tensor:
    """Scores (B, I + 1) of the whole catalogue from one state a prompt: mean, first or items."""
    if verbalizer == "items":
        return items.item_space(lm, x_BD) @ lm.items.E.T
    ptr, tok = titles.ptr, titles.tok
    if verbalizer == "first":
        tok, ptr = tok[ptr[1:-1]], np.concatenate([[0], np.arange(len(ptr) - 1)])
    ptr, tok = (torch.as_tensor(a).to(lm.device) for a in (ptr, tok))
    if lm.own_head:
        return own_head.catalogue_scores(lm, x_BD, ptr, tok)
    return kernels.catalogue_scores(scaled(lm, x_BD), lm.head_VD, ptr, tok, lm.bias_V)


def scaled(lm, x_ND) -> torch.Tensor:
    """States times what the LM multiplies its logits by after the head (Granite, Cohere)."""
    return x_ND if lm.scale == 1 else x_ND * lm.scale


def log_likelihood(lm, x_ND, titles, words, ptr, normalise=False) -> torch.Tensor:
    """log P of titles, each the sum of its tokens' (or their mean), among the tokens that occur in
    titles: see kernels.title_likelihood."""
    if not lm.own_head:
        x_ND = scaled(lm, x_ND)
        return kernels.title_likelihood(
            x_ND, titles.head, words, ptr, titles.bias, normalise=normalise
        )
    vocab = torch.as_tensor(titles.vocab, device=lm.device)
    return own_head.title_likelihood(lm, x_ND, vocab, words, ptr, normalise)


def score(lm, start, tails, cand_BC, titles, verbalizer, at=None):
    """score_BC fp32: what the LM says at the mask of prompt b for candidate c. With `at` (see read)
    also the log probability of each of those tail tokens, (M,)."""
    if verbalizer == "likelihood":
        score_BC, past = score_likelihood(lm, start, tails, cand_BC, titles, at)
    else:
        x_BD = read(lm, start, tails, at=at)
        x_BD, past = x_BD if at is not None else (x_BD, None)
        score_BC = verbalise(lm, x_BD, cand_BC, titles, verbalizer)
    if at is None:
        return score_BC
    words = np.concatenate([titles.index[t[a]] for t, a in zip(tails, at)])
    words = torch.as_tensor(words, device=lm.device)
    each = torch.arange(len(words) + 1, device=lm.device)
    return score_BC, log_likelihood(lm, past, titles, words, each)


def score_likelihood(lm, start, tails, cand_BC, titles, at) -> tuple:
    """Candidates' scores (B, C) by the likelihood of their titles, and the states `at`."""
    tok_BCT, n_BC = titles.padded(cand_BC, lm.sep if lm.kind == "decoder" else ())
    x_ND = read(lm, start, tails, tok_BCT, n_BC, at)
    x_ND, past = x_ND if at is not None else (x_ND, None)
    real = np.arange(tok_BCT.shape[2]) < n_BC[..., None]
    words = torch.as_tensor(titles.index[tok_BCT[real]], device=lm.device)
    ptr = torch.as_tensor(np.concatenate([[0], np.cumsum(n_BC.reshape(-1))]), device=lm.device)
    # per token (ours): on ml-100k the sum over tokens gives the plain LM HR@1 .21 and a
    # cross-entropy of 7.8, the mean .25 and 2.4
    score_N = log_likelihood(lm, x_ND, titles, words, ptr, normalise=True)
    return score_N.view(cand_BC.shape), past
