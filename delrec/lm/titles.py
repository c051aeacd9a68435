"""All titles of a catalogue, tokenised once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from delrec.data.prepared import Data
from delrec.lm import check
from delrec.lm.model import LM
from delrec.lm.text import encode, must_have_vectors
from delrec.runtime import stop

MOST_UNKNOWN = 0.2  # share of unknown tokens in titles that is still gone on with


@dataclass
class Titles:
    """The tokens of all titles: item i owns tok[ptr[i] : ptr[i + 1]]."""

    ptr: np.ndarray  # int64 (I + 2,)
    tok: np.ndarray  # int64 (M,)
    vocab: np.ndarray  # the tokens that occur in titles, and the separator's, ascending
    index: np.ndarray  # int64 (V,): a token's place in vocab
    head: torch.Tensor  # the head's rows of vocab
    bias: torch.Tensor | None  # and its biases

    def of(self, i: int | np.integer) -> np.ndarray:
        """The tokens of item i's title."""
        return self.tok[self.ptr[i] : self.ptr[i + 1]]

    @cached_property
    def on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ptr, tok) beside the head, copied there once: title i owns tok[ptr[i] : ptr[i + 1]]."""
        return tuple(torch.as_tensor(a).to(self.head.device) for a in (self.ptr, self.tok))

    @cached_property
    def firsts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ptr, tok) of titles' first tokens alone, beside the head."""
        ptr = np.concatenate([[0], np.arange(len(self.ptr) - 1)])
        tok = self.tok[self.ptr[1:-1]]
        return tuple(torch.as_tensor(a).to(self.head.device) for a in (ptr, tok))

    def padded(
        self, items_BC: np.ndarray, end: list[int] | tuple[int, ...] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (B, C, T) and lengths (B, C) of items, each followed by the tokens `end`."""
        n_BC = self.ptr[items_BC + 1] - self.ptr[items_BC]
        T = int(n_BC.max())
        at = np.minimum(self.ptr[items_BC][..., None] + np.arange(T), len(self.tok) - 1)
        tok = np.where(np.arange(T) < n_BC[..., None], self.tok[at], 0)
        tok = np.concatenate([tok, np.zeros((*n_BC.shape, len(end)), np.int64)], 2)
        for j, e in enumerate(end):
            np.put_along_axis(tok, (n_BC + j)[..., None], e, 2)
        return tok, n_BC + len(end)


def tokenise_titles(lm: LM, data: Data, max_title: int = 32, allow_unknown: bool = True) -> Titles:
    """All titles, each of at most max_title tokens; an empty one is the separator."""
    ids = [encode(lm, t)[:max_title] for t in data.titles]
    ids = [t or list(lm.sep) for t in ids]
    ids[0] = []
    ptr = np.concatenate([[0], np.cumsum([len(t) for t in ids])]).astype(np.int64)
    tok = np.concatenate([np.asarray(t, np.int64) for t in ids])
    tell_unknown(lm, data.titles, ids, allow_unknown)
    return titles_of(lm, ptr, tok)


def with_more(lm: LM, titles: Titles, more: list[str], max_title: int) -> Titles:
    """The titles, and more of them behind; none of those has more tokens than the longest of them,
    so that prompts have the room they had.
    """
    longest = min(max_title, int(np.diff(titles.ptr).max()))
    ids = [encode(lm, title)[:longest] or list(lm.sep) for title in more]
    ptr = titles.ptr[-1] + np.cumsum([len(row) for row in ids])
    tok = np.concatenate([titles.tok, *(np.asarray(row, np.int64) for row in ids)])
    return titles_of(lm, np.concatenate([titles.ptr, ptr]).astype(np.int64), tok)


def titles_of(lm: LM, ptr: np.ndarray, tok: np.ndarray) -> Titles:
    """Titles by their tokens, with what of the head they are scored by."""
    vocab = np.unique(np.concatenate([tok, lm.sep]))
    must_have_vectors(lm, vocab)
    index = np.zeros(lm.head_VD.shape[0], np.int64)
    index[vocab] = np.arange(len(vocab))
    rows = torch.as_tensor(vocab, device=lm.device)
    head = lm.head_VD.detach()[rows].contiguous()
    bias = None if lm.bias_V is None else lm.bias_V.detach()[rows]
    return Titles(ptr, tok, vocab, index, head, bias)


def tell_unknown(lm: LM, titles: list[str], ids: list[list[int]], allowed: bool) -> None:
    """Says which share of the titles' tokens the tokenizer does not know, and how many titles it
    cannot tell apart; refuses over a fifth unless allowed."""
    tokens = [t for row in ids for t in row]
    texts = {}  # {tokens: the titles that are these}
    unknown = tokens.count(lm.tok.unk_token_id) / max(len(tokens), 1)
    for text, row in zip(titles[1:], ids[1:]):
        texts.setdefault(tuple(row), set()).add(text)
    alike = sum(len(same) for same in texts.values() if len(same) > 1)
    if not unknown and not alike:
        return
    line = (
        f"the tokenizer of {lm.name}: {unknown:.1%} of the titles' tokens are unknown to it, and "
        f"it cannot tell {alike} of {len(titles) - 1} titles apart"
    )
    if unknown > MOST_UNKNOWN and not allowed:
        stop(f"{line}; take an LM of these titles' language, or go on with --allow-unknown")
    check.say_once(line)
