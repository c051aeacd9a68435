"""Reading an LM at its mask: a prompt is prefix + tail -> the states that the head would read.

The prefix (instruction + soft prompt) is the same for all samples, so a decoder-only LM computes
its keys and values once. The three kinds of LM are three `read_...` functions, of which an LM gets
its own at load; only decoders have passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from delrec.lm import passes
from delrec.lm.passes import Rows, pad
from delrec.lm.text import MASK, SLOT, embed
from delrec.runtime import stop

if TYPE_CHECKING:
    from delrec.lm.model import LM
    from delrec.lm.samples import Example
    from delrec.lm.windows import WindowPrompt

# of the reads (N, D); where the history's tokens are read too, also theirs (M, D)
States = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
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
    cache=False leaves them to every prompt: the same numbers, slower (encoders see every token
    from every other, so they have nothing to keep). Nor is it kept while a sharded LM trains:
    FSDP fetches a layer's weights when a gradient reaches the layer's output, and the prefix's
    gradient enters at its keys and values."""
    keeps = cache and lm.attends and lm.kind == "decoder" and lm.paths[0] != "rows"
    if not keeps or lm.sharded and torch.is_grad_enabled():
        return Start(prefix, P_kD, None)
    ids = torch.as_tensor(prefix, device=lm.device)[None]
    out = lm.body(inputs_embeds=embed(lm, ids, P_kD), use_cache=True)
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
    tails: list[np.ndarray],
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
    at: list[np.ndarray] | None = None,
) -> States:
    """The states that the head would read, from one pass of the LM over prefix + tails[b].

    (B, D) at the mask; or with titles (tok_BCT, n_BC) (N, D), the states that predict each of their
    tokens in the order b, c, t < n[b, c], from a forced pass in which every title follows its own
    prompt; and with at (places in each tail, decoder-only) also (M, D), the states that predict
    those tail tokens.
    """
    if at is None:
        return lm.reader(lm, start, tails, tok_BCT, n_BC)
    if lm.kind != "decoder":
        stop(
            f"{lm.name}: the loss on history titles needs a decoder-only LM; use "
            "finetune.py --loss candidates"
        )
    return lm.reader(lm, start, tails, tok_BCT, n_BC, at)


def read_examples(lm: LM, start: Start, batch: list[Example] | list[WindowPrompt]) -> torch.Tensor:
    """The states at all reads of some training examples (tail, at, target), masks first: (N, D)."""
    several = any(len(e.target) > 1 for e in batch)
    at = [e.at for e in batch] if several else None
    x = read(lm, start, [e.tail for e in batch], at=at)
    return torch.cat(x) if several else x


# ---------------------------------------------------------------- decoder-only


def read_decoder(
    lm: LM,
    start: Start,
    tails: list[np.ndarray],
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
    at: list[np.ndarray] | None = None,
) -> States:
    """The states of a decoder-only LM (see read), by the best of its passes that is right here."""
    if any(tail[-1] != MASK for tail in tails):
        stop("a decoder-only LM reads the token after the prompt: the mask must stand last")
    path = path_of(lm, start, tails, tok_BCT)
    if path == "rows":
        return read_one_title_a_row(lm, start, tails, tok_BCT, n_BC, at)
    rows = rows_of_prompts(start, tails, tok_BCT, n_BC)
    reads = rows.reads
    past = []
    if at is not None:
        in_rows = len(start.prefix) - rows.kept
        past = [in_rows + at_b - 1 for at_b in at]
    rows.reads = [*reads, *past]
    if path == "fused":
        x_ND = passes.pass_fused(lm, rows)
    elif path == "packed":
        x_ND = passes.pass_packed(lm, rows)
    else:
        x_ND = passes.pass_padded(lm, rows)
    return x_ND if at is None else states_and_past(x_ND, reads, past)


def states_and_past(
    x_ND: torch.Tensor, reads: list[np.ndarray], past: list[np.ndarray]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states at the reads, and those that predict the history's tokens."""
    return x_ND.split([sum(map(len, reads)), sum(map(len, past))])


def path_of(
    lm: LM, start: Start, tails: list[np.ndarray], tok_BCT: np.ndarray | None = None
) -> str:
    """The pass that a decoder is read by: the best that is right, which behind the end of a window
    that its layers attend in is one row a title."""
    longest = len(start.prefix) + max(map(len, tails))
    longest += 0 if tok_BCT is None else tok_BCT.shape[2]
    if longest > lm.reach:
        return "rows"
    fused = not torch.is_grad_enabled()
    return next(path for path in lm.paths if fused or path != "fused")


def rows_of_prompts(
    start: Start, tails: list[np.ndarray], tok_BCT: np.ndarray | None, n_BC: np.ndarray | None
) -> Rows:
    """One row a prompt: its tail, then its C titles, each of which sees the prefix, the tail and
    itself only; where no keys and values are kept, the prefix stands in front of each tail."""
    ahead = start.prefix if start.kv is None else start.prefix[:0]
    rows = Rows(
        tokens=[],
        segments=[],
        places=[],
        reads=[],
        kept=len(start.prefix) - len(ahead),
        kv=start.kv,
        P_kD=start.P if len(ahead) else None,
    )
    C = 0 if tok_BCT is None else tok_BCT.shape[1]
    for b, tail in enumerate(tails):
        m = len(ahead) + len(tail) - 1
        tokens = [ahead, tail[:-1]]
        segments = [np.zeros(m, int)]
        places = [np.arange(m)]
        reads = [] if C else [[m - 1]]
        begin = m
        for c in range(C):
            n = max(n_BC[b, c] - 1, 0)  # the last token predicts nothing we need
            tokens.append(tok_BCT[b, c, :n])
            segments.append(np.full(n, c + 1))
            places.append(np.arange(m, m + n))
            if n_BC[b, c]:  # token 0 of a title is predicted at the mask, token t by token t-1
                reads += [[m - 1], np.arange(begin, begin + n)]
            begin += n
        rows.tokens.append(np.concatenate(tokens))
        rows.segments.append(np.concatenate(segments))
        rows.places.append(np.concatenate(places) + rows.kept)
        rows.reads.append(np.concatenate(reads).astype(int) if reads else np.zeros(0, int))
    return rows


def read_one_title_a_row(
    lm: LM,
    start: Start,
    tails: list[np.ndarray],
    tok_BCT: np.ndarray | None,
    n_BC: np.ndarray | None,
    at: list[np.ndarray] | None,
) -> States:
    """The same with one row a title: prefix, tail, title. The history's tokens are read in a
    prompt's first row."""
    C = 0 if tok_BCT is None else tok_BCT.shape[1]
    rows, reads, past = [], [], []
    for b, tail in enumerate(tails):
        before = np.concatenate([start.prefix, tail[:-1]])
        m = len(before)
        for c in range(max(C, 1)):
            n = max(n_BC[b, c] - 1, 0) if C else 0
            rows.append(np.concatenate([before, tok_BCT[b, c, :n]]) if C else before)
            told = not C or n_BC[b, c] > 0
            reads.append(np.arange(m - 1, m + n) if told else np.zeros(0, int))
            asked = at is not None and c == 0
            past.append(len(start.prefix) + at[b] - 1 if asked else np.zeros(0, int))
    index = reads if at is None else [*reads, *past]
    x_ND = rows_apart(lm, start.P, rows, index)
    return x_ND if at is None else states_and_past(x_ND, reads, past)


def rows_apart(
    lm: LM, P_kD: torch.Tensor | None, rows: list[np.ndarray], index: list[np.ndarray]
) -> torch.Tensor:
    """The states at `index`, rows within the LM's window in one pass and longer ones in another: a
    model that goes by the longest row of a pass (LongRoPE) must not let it change the others."""
    within = np.array([len(row) <= (lm.window or lm.reach) for row in rows])
    if within.all() or not within.any() or lm.tapped is not None:
        return passes.pass_rows(lm, P_kD, rows, index)
    states = [None] * len(index)
    for side in (within, ~within):
        which = np.flatnonzero(side)
        turns = [t for t in range(len(index)) if side[t % len(rows)]]
        part = [index[t] for t in turns]
        x_ND = passes.pass_rows(lm, P_kD, [rows[i] for i in which], part)
        for t, x in zip(turns, x_ND.split([len(i) for i in part])):
            states[t] = x
    return torch.cat(states)


# ---------------------------------------------------------------- encoders


def fill(
    lm: LM, start: Start, tails: list[np.ndarray], n: np.ndarray | None = None
) -> list[np.ndarray]:
    """Prefix + tail + the tokenizer's closing specials, with the mask's own token in the mask's
    place: n[b] of them in row b (default 1)."""
    rows = []
    for b, tail in enumerate(tails):
        i = int(np.flatnonzero(np.asarray(tail) == MASK)[0])
        masks = np.full(1 if n is None else n[b], lm.mask_id)
        row = np.concatenate([start.prefix, tail[:i], masks, tail[i + 1 :], lm.end])
        rows.append(row.astype(np.int64))
    return rows


def read_encoder_decoder(
    lm: LM,
    start: Start,
    tails: list[np.ndarray],
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
) -> torch.Tensor:
    """The states of an encoder-decoder (see read). The mask is a sentinel in the encoder's text;
    its filler is the first thing the decoder says after that sentinel."""
    ids_BQ = torch.as_tensor(pad(fill(lm, start, tails), PAD)).to(lm.device)
    real_BQ = ids_BQ != PAD
    enc_BQD = lm.model.get_encoder()(
        inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=real_BQ.long()
    ).last_hidden_state
    first = torch.tensor([lm.decoder_start, lm.mask_id], device=lm.device)
    if tok_BCT is None:
        return decoded(lm, enc_BQD, real_BQ.long(), first.expand(len(tails), 2))[:, 1]
    B, C, T = tok_BCT.shape
    tok = torch.as_tensor(tok_BCT.reshape(B * C, T)).long().to(lm.device)
    ids = torch.cat([first.expand(B * C, 2), tok[:, :-1]], 1)
    # the C decoder rows of a prompt share its encoder states, and so the keys and values made of
    # them, where `attention` is asked
    if lm.attends:
        x = decoded(lm, enc_BQD, real_BQ[:, None, None], ids)[:, 1:]
    else:
        enc, real = (t.repeat_interleave(C, 0) for t in (enc_BQD, real_BQ.long()))
        x = decoded(lm, enc, real, ids)[:, 1:]
    n = torch.as_tensor(n_BC.reshape(-1, 1)).to(lm.device)
    return x[torch.arange(T, device=lm.device) < n]


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
    tails: list[np.ndarray],
    tok_BCT: np.ndarray | None = None,
    n_BC: np.ndarray | None = None,
) -> torch.Tensor:
    """The states of an encoder (see read), at its own mask token; a title of n tokens is read from
    n masks at once (each blind to the others: a pseudo-likelihood)."""
    if tok_BCT is None:
        n = np.ones(len(tails), int)
    else:
        n = n_BC.reshape(-1)
        tails = [t for t in tails for _ in range(n_BC.shape[1])]
    rows = fill(lm, start, tails, n)
    ids_BQ = torch.as_tensor(pad(rows, PAD)).to(lm.device)
    x_BQD = lm.model(
        inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=(ids_BQ != PAD).long()
    ).logits
    mask_at = [np.flatnonzero(t == MASK)[0] + len(start.prefix) for t in tails]
    Q = ids_BQ.shape[1]
    where = np.concatenate([b * Q + m + np.arange(k) for b, (m, k) in enumerate(zip(mask_at, n))])
    return x_BQD.flatten(0, 1)[torch.as_tensor(where, device=lm.device)]
