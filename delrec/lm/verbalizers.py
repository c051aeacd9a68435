"""From states of the LM to a score for each title: the verbalizers (DELRec, section IV-C), and
products of vectors.

With z the logits that the LM's head gives at the mask of a prompt, and w_1 .. w_n the tokens of the
title of candidate c, s(c) is
    mean         1/n (z[w_1] + .. + z[w_n])     the paper's
    first        z[w_1]                         what its released code does
    letter       z[the letter of c]             LlamaRec's: c's letter in the list of candidates
    likelihood   1/n (log P(w_1 | prompt) + .. + log P(w_n | prompt, w_1 .. w_n-1))     ours
    items        (W x) . e_c                    E4SRec's, --input ids: W a map of the state x at the
                                                mask, e_c the item's vector
The first three are the mean logit of some tokens, and so one function with three sets of tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from delrec.kernels import verbalizer as kernels
from delrec.lm import items, own_head
from delrec.lm.model import LM
from delrec.lm.prompts import LETTERS
from delrec.lm.ragged import pointers, ragged
from delrec.lm.reading import Start, read
from delrec.lm.text import encode
from delrec.lm.titles import Titles
from delrec.lm.transfer import on_device
from delrec.runtime import stop

SCORES_ALL = ("mean", "first", "items")  # from one state the whole catalogue
CELLS = 2**24  # logits and scores that exist at once in a loss over the catalogue: 64 MB


def score(
    lm: LM,
    start: Start,
    tails: Sequence[np.ndarray],
    cand_BC: np.ndarray,
    titles: Titles,
    verbalizer: str,
) -> torch.Tensor:
    """score_BC fp32: what the LM says at the mask of prompt b for candidate c."""
    if verbalizer != "likelihood":
        return verbalise(lm, read(lm, start, tails), cand_BC, titles, verbalizer)
    tok_BCT, n_BC = titles.padded(cand_BC, lm.sep if lm.kind == "decoder" else ())
    return likelihoods(lm, read(lm, start, tails, tok_BCT, n_BC), tok_BCT, n_BC, titles)


def score_and_past(
    lm: LM,
    start: Start,
    tails: Sequence[np.ndarray],
    cand_BC: np.ndarray,
    titles: Titles,
    verbalizer: str,
    at: Sequence[np.ndarray],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `score` gives of a decoder-only LM, and the log probability (M,) of each of the tail
    tokens `at` (see read)."""
    tails, at = ragged(tails), ragged(at)
    told = titles.padded(cand_BC, lm.sep) if verbalizer == "likelihood" else (None, None)
    states = read(lm, start, tails, *told, at)
    x_ND, past_MD = states.tensor_split([len(states) - len(at.flat)])
    if verbalizer == "likelihood":
        score_BC = likelihoods(lm, x_ND, *told, titles)
    else:
        score_BC = verbalise(lm, x_ND, cand_BC, titles, verbalizer)
    words = titles.index[tails.flat[at.flat + np.repeat(tails.ptr[:-1], at.lengths)]]
    words = on_device(words, lm.device)
    each = torch.arange(len(words) + 1, device=lm.device)
    return score_BC, log_likelihood(lm, past_MD, titles, words, each)


# ---------------------------------------------------------------- one state a prompt


def verbalise(
    lm: LM, x_BD: torch.Tensor, cand_BC: np.ndarray, titles: Titles, verbalizer: str
) -> torch.Tensor:
    """Candidates' scores (B, C) from one state a prompt: mean, first, letter or items."""
    if verbalizer == "items":
        item_BCe = lm.items.rows(on_device(cand_BC, lm.device))
        return (items.item_space(lm, x_BD)[:, None] * item_BCe).sum(-1)
    if verbalizer == "letter":
        return mean_logits(lm, x_BD, *letters_of(lm, cand_BC))
    must_be_of_titles(verbalizer)
    tok_BCT, n_BC = titles.padded(cand_BC)
    if verbalizer == "first":
        n_BC = np.minimum(n_BC, 1)
    return mean_logits(lm, x_BD, tok_BCT, n_BC)


def must_be_of_titles(verbalizer: str) -> None:
    """Stops at a verbalizer other than the two that score a title by its tokens' logits: it must
    not score as one of them."""
    if verbalizer not in ("mean", "first"):
        stop(
            f"--verbalizer {verbalizer} has no score here, expected mean or first; add what its "
            "score is to delrec/lm/verbalizers.py"
        )


def mean_logits(lm: LM, x_BD: torch.Tensor, tok_BCT: np.ndarray, n_BC: np.ndarray) -> torch.Tensor:
    """s(b, c) = 1/n sum_{t < n} z_b[tok_bct], with n = n_bc: fp32 (B, C)."""
    tokens, lengths = (
        on_device(np.ascontiguousarray(a, np.int32), lm.device) for a in (tok_BCT, n_BC)
    )
    if lm.own_head:
        return own_head.candidate_scores(lm, x_BD, tokens, lengths)
    return kernels.candidate_scores(
        scaled(lm, x_BD), lm.head_VD, tokens, lengths, lm.bias_V, known=True
    )


def letters_of(lm: LM, cand_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each candidate's letter as tokens (B, C, 1), and their number, 1 everywhere (B, C)."""
    letters_C = letter_ids(lm, cand_BC.shape[1])
    tok_BCT = np.broadcast_to(letters_C[None, :, None], (*cand_BC.shape, 1))
    return tok_BCT, np.ones(cand_BC.shape, int)


def letter_ids(lm: LM, C: int) -> np.ndarray:
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


def stop_unless_lm_can(lm: LM, loss: str) -> None:
    """Ends the process if a loss of finetune.py asks the LM what only a decoder-only one says."""
    if loss in ("titles", "both") and lm.kind != "decoder":
        stop(
            f"{lm.name} is an {lm.kind} LM, but --loss {loss} asks for every token of the history, "
            "which needs a decoder-only LM; use --loss candidates"
        )
    if loss == "letter" and (lm.kind != "decoder" or lm.tok.eos_token_id is None):
        stop(
            f"{lm.name} is an {lm.kind} LM, its end token {lm.tok.eos_token}, but --loss letter "
            "asks what comes behind the letter, which needs a decoder-only LM with an end token; "
            "use --loss candidates"
        )


def letter_and_end(
    lm: LM, start: Start, tails: Sequence[np.ndarray], place_B: np.ndarray, C: int
) -> torch.Tensor:
    """1/2 (log P(letter | prompt) + log P(end | prompt, letter)) among all tokens of the LM, (B,),
    for the letters of the candidates at place_B: what LlamaRec's training raises (arXiv 2311.02089;
    its dataloader/llm.py ends each text with the end token, and asks for the last two)."""
    end_B = np.full(len(place_B), lm.tok.eos_token_id)
    tok_B2 = np.stack([letter_ids(lm, C)[place_B], end_B], 1)
    x_ND = read(lm, start, tails, tok_B2[:, None], np.full((len(tok_B2), 1), 2))
    words_N = on_device(tok_B2.reshape(-1), lm.device)
    ptr = torch.arange(0, 2 * len(tok_B2) + 1, 2, device=lm.device)
    if lm.own_head:
        every = torch.arange(len(lm.head_VD), device=lm.device)
        return own_head.title_likelihood(lm, x_ND, every, words_N, ptr, normalise=True)
    return kernels.title_likelihood(
        scaled(lm, x_ND), lm.head_VD, words_N, ptr, lm.bias_V, normalise=True, known=True
    )


def verbalise_all(lm: LM, x_BD: torch.Tensor, titles: Titles, verbalizer: str) -> torch.Tensor:
    """Scores (B, I + 1) of the whole catalogue from one state a prompt: mean, first or items."""
    if verbalizer == "items":
        return items.item_space(lm, x_BD) @ lm.items.E.T
    ptr, tok = tokens_of_all(titles, verbalizer)
    if lm.own_head:
        return own_head.catalogue_scores(lm, x_BD, ptr, tok)
    return kernels.catalogue_scores(scaled(lm, x_BD), lm.head_VD, ptr, tok, lm.bias_V, known=True)


def tokens_of_all(titles: Titles, verbalizer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ptr, tok): the tokens that item i is scored by are tok[ptr[i] : ptr[i + 1]]."""
    must_be_of_titles(verbalizer)
    return titles.firsts if verbalizer == "first" else titles.on_device


def loss_over_all(
    lm: LM, x_BD: torch.Tensor, target_B: torch.Tensor, titles: Titles, verbalizer: str
) -> torch.Tensor:
    """The sum over b of - log softmax(s_b1 .. s_bI)[target_b]: the cross-entropy over the whole
    catalogue (the paper's), by mean or first; of vectors in training it is items.scores_in_tables.
    Some rows at a time, made again in backward, so that at most CELLS logits and scores exist at
    once."""
    rows = max(CELLS // (len(titles.vocab) + len(titles.ptr)), 1)
    parts = zip(x_BD.split(rows), target_B.split(rows))
    more = (titles, verbalizer)
    losses = [checkpoint(loss_of_rows, lm, x, t, *more, use_reentrant=False) for x, t in parts]
    return torch.stack(losses).sum()


def loss_of_rows(
    lm: LM, x_BD: torch.Tensor, target_B: torch.Tensor, titles: Titles, verbalizer: str
) -> torch.Tensor:
    """The loss of loss_over_all, with all its scores at once."""
    score_BI = catalogue_scores_with_gradient(lm, x_BD, titles, verbalizer)
    return F.cross_entropy(score_BI, target_B - 1, reduction="sum")


def catalogue_scores_with_gradient(
    lm: LM, x_BD: torch.Tensor, titles: Titles, verbalizer: str
) -> torch.Tensor:
    """What verbalise_all says of the items 1..I, fp32 (B, I), with a gradient of x, which its
    kernels do not give: s = T z, with z the logits of the tokens that occur in titles, and T the
    share of each in an item's."""
    if lm.own_head:
        return verbalise_all(lm, x_BD, titles, verbalizer)[:, 1:]
    ptr, tok = tokens_of_all(titles, verbalizer)
    z_WB = titles.head.float() @ scaled(lm, x_BD).float().T
    z_WB = z_WB if titles.bias is None else z_WB + titles.bias.float()[:, None]
    word_M = torch.as_tensor(titles.index, device=lm.device)[tok]
    return F.embedding_bag(word_M, z_WB.contiguous(), ptr[1:-1], mode="mean").T


def scaled(lm: LM, x_ND: torch.Tensor) -> torch.Tensor:
    """States times what the LM multiplies its logits by after the head (Granite, Cohere)."""
    return x_ND if lm.scale == 1 else x_ND * lm.scale


# ---------------------------------------------------------------- a state for each token of a title


def likelihoods(
    lm: LM, x_ND: torch.Tensor, tok_BCT: np.ndarray, n_BC: np.ndarray, titles: Titles
) -> torch.Tensor:
    """s(b, c) = 1/n sum_t log P(w_t | prompt b, w_<t) for the tokens w of candidate c's title (and
    the separator behind it, in decoders), from the states that predict them: (B, C)."""
    real_BCT = np.arange(tok_BCT.shape[2]) < n_BC[..., None]
    words_N = on_device(titles.index[tok_BCT[real_BCT]], lm.device)
    ptr = on_device(pointers(n_BC.reshape(-1)), lm.device)
    # per token (ours): on ml-100k the sum over tokens gives the plain LM HR@1 .21 and a
    # cross-entropy of 7.8, the mean .25 and 2.4
    score_N = log_likelihood(lm, x_ND, titles, words_N, ptr, normalise=True)
    return score_N.view(n_BC.shape)


def log_likelihood(
    lm: LM,
    x_ND: torch.Tensor,
    titles: Titles,
    words_N: torch.Tensor,
    ptr: torch.Tensor,
    normalise: bool = False,
) -> torch.Tensor:
    """log P of titles, each the sum of its tokens' (or their mean), among the tokens that occur in
    titles: see kernels.title_likelihood."""
    if not lm.own_head:
        x_ND = scaled(lm, x_ND)
        return kernels.title_likelihood(
            x_ND, titles.head, words_N, ptr, titles.bias, normalise=normalise, known=True
        )
    vocab = torch.as_tensor(titles.vocab, device=lm.device)
    return own_head.title_likelihood(lm, x_ND, vocab, words_N, ptr, normalise)
