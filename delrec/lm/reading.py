"""Reading an LM at its mask: a prompt is prefix + tail -> the states that the head would read.

The prefix (instruction + soft prompt) is the same for all samples, so a decoder-only LM computes
its keys and values once. The three kinds of LM are three `read_...` functions, of which an LM gets
its own at load; only decoders have passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from delrec.lm import passes
from delrec.lm.passes import Reads, Rows
from delrec.lm.ragged import Ragged, beside, pad, pointers, ragged, same, spans
from delrec.lm.text import MASK, SLOT, embed
from delrec.lm.transfer import on_device
from delrec.runtime import stop

if TYPE_CHECKING:
    from delrec.lm.model import LM
    from delrec.lm.samples import Example
    from delrec.lm.windows import WindowPrompt

PAD = SLOT - 9  # behind the end of an encoder's row


@dataclass
class Start:
    """What all prompts begin with."""

    prefix: np.ndarray  # its tokens
    P: torch.Tensor | None  # the soft prompt (k, D) at its slots
    kv: list | None  # its keys and values, layer by layer, where they are kept


def read_prefix(
    lm: LM, prefix: np.ndarray, P_kD: torch.Tensor | None = None, cache: bool = True
) -> Start:
    """Everything about the prefix that does not depend on the sample. Gradients flow to P and to
    adapters where enabled.

    A decoder-only LM computes the prefix's keys and values here, once for all prompts;
    cache=False leaves them to every prompt: the same numbers but for dropout, slower (encoders see
    every token from every other, so they have nothing to keep). Nor is it kept while a sharded LM
    trains: FSDP fetches a layer's weights when a gradient reaches the layer's output, and the
    prefix's gradient enters at its keys and values."""
    keeps = cache and lm.attends and lm.kind == "decoder" and lm.paths[0] != "rows"
    if not keeps or lm.sharded and torch.is_grad_enabled():
        return Start(prefix, P_kD, None)
    out = lm.body(inputs_embeds=embed(lm, prefix[None], P_kD), use_cache=True)
    kept = getattr(out, "cache", None) or out.past_key_values  # its name up to transformers 5.23
    kv = [(layer.keys, layer.values) for layer in kept.layers]
    whole = all(keys.shape[2] == len(prefix) for keys, _ in kv)  # a window may keep the end only
    return Start(prefix, P_kD, kv if whole else None)


def reader_of(kind: str) -> Callable:
    """The function that reads an LM of a kind; chosen once, when the LM is loaded."""
    if kind == "encoder":
        return read_encoder
    return read_encoder_decoder if kind == "encoder-decoder" else read_decoder


def read(
    lm: LM,
    start: Start,
    tails: Sequence[np.ndarray],
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
    at: Sequence[np.ndarray] | None = None,
) -> torch.Tensor:
    """The states that the head would read, from one pass of the LM over prefix + tails[b].

    (B, D) at the mask; or with titles (tok_BCT, n_BC) (N, D), the states that predict each of their
    tokens in the order b, c, t < n[b, c], from a forced pass in which every title follows its own
    prompt. With at (places in each tail, decoder-only) M more rows stand behind them, the states
    that predict those tail tokens.
    """
    tails = ragged(tails)
    if at is None:
        return lm.reader(lm, start, tails, tok_BCT, n_BC)
    return lm.reader(lm, start, tails, tok_BCT, n_BC, at)


def read_examples(lm: LM, start: Start, batch: list[Example] | list[WindowPrompt]) -> torch.Tensor:
    """The states at all reads of some training examples (tail, at, target), masks first: (N, D)."""
    several = any(len(e.target) > 1 for e in batch)
    at = [e.at for e in batch] if several else None
    return read(lm, start, [e.tail for e in batch], at=at)


# ---------------------------------------------------------------- decoder-only


def read_decoder(
    lm: LM,
    start: Start,
    tails: Ragged,
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
    at: Sequence[np.ndarray] | None = None,
) -> torch.Tensor:
    """The states of a decoder-only LM (see read), by the best of its passes that is right here."""
    if (tails.flat[tails.ptr[1:] - 1] != MASK).any():
        stop("a decoder-only LM reads the token after the prompt: the mask must stand last")
    path = path_of(lm, start, tails, tok_BCT)
    if path == "rows":
        return read_one_title_a_row(lm, start, tails, tok_BCT, n_BC, at)
    rows = rows_of_prompts(start, tails, tok_BCT, n_BC)
    if at is not None:
        rows.reads = rows.reads + before_places(at, len(start.prefix) - rows.kept)
    if path == "fused":
        return passes.pass_fused(lm, rows)
    if path == "packed":
        return passes.pass_packed(lm, rows)
    return passes.pass_padded(lm, rows)


def before_places(at: Sequence[np.ndarray], begin: int, every: int = 1) -> Reads:
    """Reads of the states that predict the history's tokens. at: their places in the tails, which
    begin at `begin`; every: how many rows a tail has, of which the first is read."""
    at = ragged(at)
    row_B = np.arange(len(at)) * every
    return Reads(np.repeat(row_B, at.lengths), begin + at.flat - 1)


def path_of(lm: LM, start: Start, tails: Ragged, tok_BCT: np.ndarray | None = None) -> str:
    """The pass that a decoder is read by: the best that is right, which behind the end of a window
    that its layers attend in is one row a title."""
    longest = len(start.prefix) + tails.lengths.max()
    longest += 0 if tok_BCT is None else tok_BCT.shape[2]
    if longest > lm.reach:
        return "rows"
    fused = not torch.is_grad_enabled()
    return next(path for path in lm.paths if fused or path != "fused")


def rows_of_prompts(
    start: Start, tails: Ragged, tok_BCT: np.ndarray | None, n_BC: np.ndarray | None
) -> Rows:
    """One row a prompt: its tail, then its C titles, each of which sees the prefix, the tail and
    itself only; where no keys and values are kept, the prefix stands in front of each tail."""
    ahead = start.prefix if start.kv is None else start.prefix[:0]
    kept = len(start.prefix) - len(ahead)
    before = beside(same(ahead, len(tails)), tails.cut(0, -1))
    m_B = before.lengths
    places = spans(np.zeros(len(tails), int), m_B) + kept
    alone = Reads(np.arange(len(tails)), m_B - 1)
    P_kD = start.P if len(ahead) else None
    if tok_BCT is None:
        segments = np.zeros(len(before.flat), int)
        return Rows(before, segments, places, alone, kept, start.kv, P_kD)
    title = titles_told(tok_BCT, n_BC)
    rows = partial(Ragged, ptr=title.ptr)
    segments = beside(Ragged(np.zeros(len(before.flat), int), before.ptr), rows(title.c + 1))
    places = beside(Ragged(places, before.ptr), rows(title.t + m_B[title.b] + kept))
    tokens = beside(before, rows(title.tokens))
    reads = reads_of_titles(n_BC, m_B)
    return Rows(tokens, segments.flat, places.flat, reads, kept, start.kv, P_kD)


class TitlesTold(NamedTuple):
    """The tokens of titles that stand behind their prompts: all but each title's last, which
    predicts nothing we need."""

    b: np.ndarray  # of each token: its prompt
    c: np.ndarray  # its title
    t: np.ndarray  # its place in the title
    tokens: np.ndarray
    ptr: np.ndarray  # those of prompt b are ptr[b] .. ptr[b + 1] - 1


def titles_told(tok_BCT: np.ndarray, n_BC: np.ndarray) -> TitlesTold:
    """The tokens of titles that stand behind their prompts."""
    told_BCT = np.arange(tok_BCT.shape[2]) < n_BC[..., None] - 1
    return TitlesTold(*told_BCT.nonzero(), tok_BCT[told_BCT], pointers(told_BCT.sum((1, 2))))


def reads_of_titles(n_BC: np.ndarray, m_B: np.ndarray) -> Reads:
    """The reads of titles whose tokens stand in their prompt's row, which tells m tokens before
    them: token 0 is predicted at the mask, token t by token t - 1."""
    told_BC = np.maximum(n_BC - 1, 0)
    begin_BC = m_B[:, None] + np.cumsum(told_BC, 1) - told_BC
    b, c, t = (np.arange(n_BC.max()) < n_BC[..., None]).nonzero()
    return Reads(b, np.where(t == 0, m_B[b] - 1, begin_BC[b, c] + t - 1))


def read_one_title_a_row(
    lm: LM,
    start: Start,
    tails: Ragged,
    tok_BCT: np.ndarray | None,
    n_BC: np.ndarray | None,
    at: Sequence[np.ndarray] | None,
) -> torch.Tensor:
    """The states of a decoder-only LM (see read), with one row a title: prefix, tail, title. The
    history's tokens are read in a prompt's first row."""
    C = 1 if tok_BCT is None else tok_BCT.shape[1]
    rows = beside(same(start.prefix, len(tails)), tails.cut(0, -1))
    rows = rows.take(np.repeat(np.arange(len(tails)), C))
    n_N, m_N = np.ones(len(rows), int), rows.lengths
    if tok_BCT is not None:
        n_N = n_BC.reshape(-1)
        title = titles_told(tok_BCT.reshape(len(rows), 1, -1), n_N[:, None])
        rows = beside(rows, Ragged(title.tokens, title.ptr))
    reads = Reads(np.repeat(np.arange(len(rows)), n_N), spans(m_N - 1, n_N))
    if at is not None:
        reads = reads + before_places(at, len(start.prefix), every=C)
    return rows_apart(lm, start.P, rows, reads)


def rows_apart(lm: LM, P_kD: torch.Tensor | None, rows: Ragged, reads: Reads) -> torch.Tensor:
    """The states at the reads, rows within the LM's window in one pass and longer ones in another:
    a model that goes by the longest row of a pass (LongRoPE) must not let it change the others."""
    within = rows.lengths <= (lm.window or lm.reach)
    if within.all() or not within.any() or lm.tapped is not None:
        return passes.pass_rows(lm, P_kD, rows, reads)
    states, order = [], []
    for side in (within, ~within):
        mine = np.flatnonzero(side[reads.row])
        row = (np.cumsum(side) - 1)[reads.row[mine]]  # its number among the rows of this pass
        part = Reads(row, reads.place[mine])
        states.append(passes.pass_rows(lm, P_kD, rows.take(np.flatnonzero(side)), part))
        order.append(mine)
    back = on_device(np.argsort(np.concatenate(order)), lm.device)
    return torch.cat(states)[back]


# ---------------------------------------------------------------- encoders


def fill(lm: LM, start: Start, tails: Ragged, n_B: np.ndarray) -> Ragged:
    """Prefix + tail + the tokenizer's closing specials, with the mask's own token in the mask's
    place: n[b] of them in row b."""
    masks_M = tails.flat == MASK
    times_M = np.ones(len(masks_M), int)
    times_M[masks_M] = n_B
    tokens = np.where(masks_M, lm.mask_id, tails.flat)
    ptr = pointers(times_M)[tails.ptr]
    B = len(tails)
    told = Ragged(np.repeat(tokens, times_M), ptr)
    return beside(same(start.prefix, B), told, same(lm.end, B))


def read_encoder_decoder(
    lm: LM,
    start: Start,
    tails: Ragged,
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
) -> torch.Tensor:
    """The states of an encoder-decoder (see read). The mask is a sentinel in the encoder's text;
    its filler is the first thing the decoder says after that sentinel."""
    ids_BQ = pad(fill(lm, start, tails, np.ones(len(tails), int)), PAD)
    real_BQ = on_device(ids_BQ != PAD, lm.device)
    enc_BQD = lm.model.get_encoder()(
        inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=real_BQ.long()
    ).last_hidden_state
    first = torch.tensor([lm.decoder_start, lm.mask_id], device=lm.device)
    if tok_BCT is None:
        return decoded(lm, enc_BQD, real_BQ.long(), first.expand(len(tails), 2))[:, 1]
    B, C, T = tok_BCT.shape
    tok = on_device(tok_BCT.reshape(B * C, T).astype(np.int64), lm.device)
    ids = torch.cat([first.expand(B * C, 2), tok[:, :-1]], 1)
    # the C decoder rows of a prompt share its encoder states, and so the keys and values made of
    # them, where `attention` is asked
    if lm.attends:
        x = decoded(lm, enc_BQD, real_BQ[:, None, None], ids)[:, 1:]
    else:
        enc, real = (t.repeat_interleave(C, 0) for t in (enc_BQD, real_BQ.long()))
        x = decoded(lm, enc, real, ids)[:, 1:]
    told = np.flatnonzero(np.arange(T) < n_BC.reshape(-1, 1))  # counted here: a GPU is not asked
    return x.flatten(0, 1)[on_device(told, lm.device)]


def decoded(
    lm: LM, encoded_BQD: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The states of the decoder's tokens `ids`, which its head would read, over encoder states."""
    from transformers.modeling_outputs import BaseModelOutput

    return lm.model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded_BQD),
        attention_mask=mask,
        decoder_input_ids=ids,
        use_cache=False,
    ).logits


def read_encoder(
    lm: LM,
    start: Start,
    tails: Ragged,
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
) -> torch.Tensor:
    """The states of an encoder (see read), at its own mask token; a title of n tokens is read from
    n masks at once (each blind to the others: a pseudo-likelihood)."""
    if tok_BCT is None:
        n = np.ones(len(tails), int)
    else:
        n = n_BC.reshape(-1)
        tails = tails.take(np.repeat(np.arange(len(tails)), n_BC.shape[1]))
    rows = fill(lm, start, tails, n)
    ids_BQ = pad(rows, PAD)
    real_BQ = on_device((ids_BQ != PAD).astype(int), lm.device)
    x_BQD = lm.model(inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=real_BQ).logits
    mask_at = np.flatnonzero(tails.flat == MASK) - tails.ptr[:-1] + len(start.prefix)
    where = spans(np.arange(len(tails)) * ids_BQ.shape[1] + mask_at, n)
    return x_BQD.flatten(0, 1)[on_device(where, lm.device)]
