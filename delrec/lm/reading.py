"""Reading an LM at its mask: a prompt is prefix + tail -> the states that the head would read.

The prefix (instruction + soft prompt) is the same for all samples, so a decoder-only LM computes
its keys and values once. The three kinds of LM are three `read` functions; only decoders have
passes.
"""

from types import SimpleNamespace

import numpy as np
import torch

from delrec.lm import passes
from delrec.lm.passes import pad
from delrec.lm.text import MASK, SLOT, embed
from delrec.runtime import stop

PAD = SLOT - 9  # behind the end of an encoder's row


def read_prefix(lm, prefix, P_kD=None, cache=True) -> SimpleNamespace:
    """Everything about the prefix that does not depend on the sample. Gradients flow to P and to
    adapters where enabled.

    A decoder-only LM computes the prefix's keys and values here, once for all prompts;
    cache=False leaves them to every prompt: the same numbers, slower (encoders see every token
    from every other, so they have nothing to keep). Nor is it kept while a sharded LM trains:
    FSDP fetches a layer's weights when a gradient reaches the layer's output, and the prefix's
    gradient enters at its keys and values."""
    keeps = cache and lm.attends and lm.kind == "decoder" and lm.paths[0] != "rows"
    if not keeps or lm.sharded and torch.is_grad_enabled():
        return SimpleNamespace(prefix=prefix, P=P_kD, kv=None)
    ids = torch.as_tensor(prefix, device=lm.device)[None]
    out = lm.body(inputs_embeds=embed(lm, ids, P_kD), use_cache=True)
    cache = getattr(out, "cache", None) or out.past_key_values  # its name up to transformers 5.23
    kv = [(layer.keys, layer.values) for layer in cache.layers]
    whole = all(keys.shape[2] == len(prefix) for keys, _ in kv)  # a window may keep the end only
    return SimpleNamespace(prefix=prefix, P=P_kD, kv=kv if whole else None)


def read(lm, start, tails, tok_BCT=None, n_BC=None, at=None):
    """One pass of the LM over prefix + tails[b].

    Returns x: the states the head would read, (B, D) at the mask; or with titles (tok_BCT, n_BC:
    numpy) (N, D), the states that predict each of their tokens in the order b, c, t < n[b, c],
    from a forced pass in which every title follows its own prompt; and with at (a list of index
    arrays into the tails, decoder-only) also (M, D), the states that predict those tail tokens.
    """
    if at is not None and lm.kind != "decoder":
        stop(
            f"{lm.name}: the loss on history titles needs a decoder-only LM; use --loss candidates"
        )
    if lm.kind == "encoder":
        return read_encoder(lm, start, tails, tok_BCT, n_BC)
    if lm.kind == "encoder-decoder":
        return read_encoder_decoder(lm, start, tails, tok_BCT, n_BC)
    if any(tail[-1] != MASK for tail in tails):
        stop("a decoder-only LM reads the token after the prompt: the mask must stand last")
    if way(lm, start, tails, tok_BCT) == "rows":
        return read_rows(lm, start, tails, tok_BCT, n_BC, at)
    return read_decoder(lm, start, tails, tok_BCT, n_BC, at)


def read_examples(lm, start, batch) -> torch.Tensor:
    """The states at all reads of some training examples (tail, at, target), masks first: (N, D)."""
    several = any(len(e.target) > 1 for e in batch)
    at = [e.at for e in batch] if several else None
    x = read(lm, start, [e.tail for e in batch], at=at)
    return torch.cat(x) if several else x


# ---------------------------------------------------------------- decoder-only


def way(lm, start, tails, tok_BCT=None) -> str:
    """The pass that a decoder is read by: the best that is right, which behind the end of a window
    that its layers attend in is one row a title."""
    longest = len(start.prefix) + max(map(len, tails))
    longest += 0 if tok_BCT is None else tok_BCT.shape[2]
    if longest > lm.reach:
        return "rows"
    fused = not torch.is_grad_enabled()
    return next(path for path in lm.paths if fused or path != "fused")


def read_decoder(lm, start, tails, tok_BCT, n_BC, at):
    """One row a sample: its tail, then its C titles, each of which sees the prefix, the tail and
    itself only."""
    # what of the prefix stands in the rows, and what in the cache
    ahead = start.prefix if start.kv is None else start.prefix[:0]
    kept = len(start.prefix) - len(ahead)
    C = 0 if tok_BCT is None else tok_BCT.shape[1]
    rows, segments, places, reads, past = [], [], [], [], []
    for b, tail in enumerate(tails):
        m = len(ahead) + len(tail) - 1
        row, seg, pos = [ahead, tail[:-1]], [np.zeros(m, int)], [np.arange(m)]
        get, q = [] if C else [[m - 1]], m
        for c in range(C):
            n = max(n_BC[b, c] - 1, 0)  # the last token predicts nothing we need
            row.append(tok_BCT[b, c, :n])
            seg.append(np.full(n, c + 1))
            pos.append(np.arange(m, m + n))
            if n_BC[b, c]:  # token 0 of a title is predicted at the mask, token t by token t-1
                get += [[m - 1], np.arange(q, q + n)]
            q += n
        rows.append(np.concatenate(row))
        segments.append(np.concatenate(seg))
        places.append(np.concatenate(pos) + kept)
        reads.append(np.concatenate(get).astype(int) if get else np.zeros(0, int))
        past.append(len(ahead) + at[b] - 1 if at is not None else [])
    P_kD = start.P if len(ahead) else None
    run = {
        "padded": passes.pass_padded,
        "packed": passes.pass_packed,
        "fused": passes.pass_fused,
    }[way(lm, start, tails, tok_BCT)]
    index = reads if at is None else [*reads, *past]
    x_ND = run(lm, start.kv, P_kD, kept, rows, segments, places, index)
    return x_ND if at is None else x_ND.split([sum(map(len, reads)), sum(map(len, past))])


def read_rows(lm, start, tails, tok_BCT, n_BC, at):
    """One row a title: prefix, tail, title. The history's tokens are read in a sample's first
    row."""
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
    return x_ND if at is None else x_ND.split([sum(map(len, reads)), sum(map(len, past))])


def rows_apart(lm, P_kD, rows, index) -> torch.Tensor:
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


def fill(lm, start, tails, n=None) -> list:
    """Prefix + tail + the tokenizer's closing specials, with the mask's own token in the mask's
    place: n[b] of them in row b (default 1)."""
    rows = []
    for b, tail in enumerate(tails):
        i = int(np.flatnonzero(np.asarray(tail) == MASK)[0])
        masks = np.full(1 if n is None else n[b], lm.mask_id)
        row = np.concatenate([start.prefix, tail[:i], masks, tail[i + 1 :], lm.end])
        rows.append(row.astype(np.int64))
    return rows


def read_encoder_decoder(lm, start, tails, tok_BCT, n_BC) -> torch.Tensor:
    """The mask is a sentinel in the encoder's text; its filler is the first thing the decoder says
    after that sentinel."""
    ids_BQ = torch.as_tensor(pad(fill(lm, start, tails), PAD)).to(lm.device)
    real_BQ = ids_BQ != PAD
    from transformers.modeling_outputs import BaseModelOutput

    encoder = lm.model.get_encoder()
    enc = encoder(
        inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=real_BQ.long()
    ).last_hidden_state
    first = torch.tensor([lm.decoder_start, lm.mask_id], device=lm.device)

    def decode(states, mask, ids):
        encoded = BaseModelOutput(last_hidden_state=states)
        return lm.model(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids, use_cache=False
        ).logits

    if tok_BCT is None:
        return decode(enc, real_BQ.long(), first.expand(len(tails), 2))[:, 1]
    B, C, T = tok_BCT.shape
    tok = torch.as_tensor(tok_BCT.reshape(B * C, T)).long().to(lm.device)
    dec = torch.cat([first.expand(B * C, 2), tok[:, :-1]], 1)
    # the C decoder rows of a prompt share its encoder states, and so the keys and values made of
    # them, where `attention` is asked
    if lm.attends:
        x = decode(enc, real_BQ[:, None, None], dec)[:, 1:]
    else:
        x = decode(enc.repeat_interleave(C, 0), real_BQ.long().repeat_interleave(C, 0), dec)[:, 1:]
    n = torch.as_tensor(n_BC.reshape(-1, 1)).to(lm.device)
    return x[torch.arange(T, device=lm.device) < n]


def read_encoder(lm, start, tails, tok_BCT, n_BC) -> torch.Tensor:
    """The LM's own mask token; a title of n tokens is read from n masks at once (each blind to the
    others: a pseudo-likelihood)."""
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
