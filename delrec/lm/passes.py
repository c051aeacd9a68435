"""The ways through a decoder-only LM's body: one pass over rows of tokens -> the states at the
reads.

A row is what stands behind the kept prefix: a prompt's tail, then its C titles, each of which
sees the prefix, the tail and itself only. Every pass takes the same rows and says the same
numbers:
    rows      one title a row, under the model's own mask and attention: right for every causal LM
    padded    rows padded to one length, under a mask of ours
    packed    rows one behind the other, no padding, attention piece by piece (CPU)
    fused     the same without gradients, layer by layer, by kernels/cpu.cpp (CPU, Llama)
Which of them a model is read by is measured at load: check.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from delrec.lm.ragged import Ragged, pad, pad_all
from delrec.lm.text import embed
from delrec.lm.transfer import on_device

if TYPE_CHECKING:
    from delrec.lm.model import LM

BLOCK = 256  # queries of a piece in pass_packed


@dataclass
class Reads:
    """States that are read, in this order: of each its row, and its place in the row."""

    row: np.ndarray
    place: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def __add__(self, more: Reads) -> Reads:
        row = np.concatenate([self.row, more.row])
        return Reads(row, np.concatenate([self.place, more.place]))

    def among(self, first_B: np.ndarray) -> np.ndarray:
        """Their places among all tokens, where row b begins at first[b]."""
        return first_B[self.row] + self.place


@dataclass
class Rows:
    """What stands behind the kept prefix in one pass, a row a prompt."""

    tokens: Ragged  # of each row
    segments: np.ndarray  # of each token: 0 in the tail, c + 1 in title c
    places: np.ndarray  # of each token: its position, counted from the prompt's begin
    reads: Reads
    kept: int  # tokens of the prefix whose keys and values are kept
    kv: list | None  # those keys and values, layer by layer
    P_kD: torch.Tensor | None  # the soft prompt, where its slots stand in the rows

    def padded(self) -> list[np.ndarray]:
        """Tokens, segments and places (B, Q), padded to the longest row; the padding is of segment
        -1, which no token sees."""
        return pad_all(
            self.tokens.ptr, (self.tokens.flat, 0), (self.segments, -1), (self.places, 0)
        )


@dataclass
class Piece:
    """Queries of a packed row that attend together."""

    length: int  # how many
    before: range  # the pieces of the same row that they see
    masks: dict[int, torch.Tensor]  # {heads that share keys: the mask for so many}


@dataclass
class Packed:
    """What `attention` is told of a pass whose prefix is kept."""

    kv: list | None  # keys and values of the prefix, layer by layer
    pieces: list[Piece] | None  # None: the rows are padded, under a mask


def at_reads(lm: LM, x_BQD: torch.Tensor, index_N: np.ndarray) -> torch.Tensor:
    """The states at the reads (N, D); of the layers' states that lm keeps, those at the reads."""
    at_N = on_device(index_N, lm.device)
    lm.keep_tapped([t.flatten(0, 1)[at_N] for t in lm.tapped or []])
    return x_BQD.flatten(0, 1)[at_N]


# ---------------------------------------------------------------- the four passes


def pass_rows(lm: LM, P_kD: torch.Tensor | None, rows: Ragged, reads: Reads) -> torch.Tensor:
    """The states at the reads of whole rows (nothing is kept in front of them): (N, D). They are
    padded on the right, which a causal model does not see."""
    ids_BQ = pad(rows)
    B, Q = ids_BQ.shape
    real_BQ = np.arange(Q) < rows.lengths[:, None]
    more = {}
    if not real_BQ.all():
        more["attention_mask"] = on_device(real_BQ.astype(int), lm.device)
    x_BQD = last_states(lm, inputs_embeds=embed(lm, ids_BQ, P_kD), **more)
    return at_reads(lm, x_BQD, reads.among(np.arange(B) * Q))


def last_states(lm: LM, **inputs: Any) -> torch.Tensor:
    """The last states (B, Q, D) of the LM's body, as its head reads them."""
    lm.forget_tapped()
    return lm.body(**inputs, use_cache=False).last_hidden_state


def pass_padded(lm: LM, rows: Rows) -> torch.Tensor:
    """The states at the reads of rows padded to one length, under a mask: (N, D)."""
    ids_BQ, seg_BQ, pos_BQ = rows.padded()
    seg_BQ, pos_BQ = on_device(seg_BQ, lm.device), on_device(pos_BQ, lm.device)
    B, Q = ids_BQ.shape
    sees_QQ = torch.ones(Q, Q, dtype=torch.bool, device=lm.device).tril()
    own_BQQ = (seg_BQ[:, None, :] == 0) | (seg_BQ[:, None, :] == seg_BQ[:, :, None])
    prefix_BQK = torch.ones(B, Q, rows.kept, dtype=torch.bool, device=lm.device)
    mask_BQK = torch.cat([prefix_BQK, own_BQQ & sees_QQ], 2)
    more = {"packed": Packed(rows.kv, None)} if rows.kv else {}
    x_BQD = last_states(
        lm,
        inputs_embeds=embed(lm, ids_BQ, rows.P_kD),
        attention_mask=mask_BQK[:, None],
        position_ids=pos_BQ,
        **more,
    )
    return at_reads(lm, x_BQD, rows.reads.among(np.arange(B) * Q))


def pass_packed(lm: LM, rows: Rows) -> torch.Tensor:
    """The states at the reads (N, D), all rows one behind the other, no padding: `attention` takes
    them apart again, in blocks of queries that see the prefix, what stands before the block in its
    row's tail, and what stands before them in the block."""
    x_1MD = last_states(
        lm,
        inputs_embeds=packed_vectors(lm, rows),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=torch.as_tensor(rows.places)[None],
        packed=Packed(rows.kv, pieces_of(lm, rows)),
    )
    return at_reads(lm, x_1MD, rows.reads.among(rows.tokens.ptr))


def packed_vectors(lm: LM, rows: Rows) -> torch.Tensor:
    """The vectors (1, M, D) of rows one behind the other."""
    P_kD = rows.P_kD
    if P_kD is not None:  # every row holds all the slots
        P_kD = P_kD.repeat(len(rows.tokens), 1)
    return embed(lm, rows.tokens.flat[None], P_kD)


def pieces_of(lm: LM, rows: Rows) -> list[Piece]:
    """The pieces of all rows in order; pieces of one shape share their masks."""
    pieces, masks = [], {}
    for seg in Ragged(rows.segments, rows.tokens.ptr):
        tail = int((seg == 0).sum())
        edges = edges_of(seg, tail)
        first = len(pieces)
        for i, j in zip(edges[:-1], edges[1:]):
            before = min(i, tail)
            key = (rows.kept + before, seg[i:j].tobytes())
            if key not in masks:
                masks[key] = {1: mask_of_piece(lm, seg[i:j], rows.kept + before)}
            earlier = range(first, first + sum(e < before for e in edges[:-1]))
            pieces.append(Piece(j - i, earlier, masks[key]))
    return pieces


def edges_of(seg: np.ndarray, tail: int) -> list[int]:
    """Where a row's pieces begin, and its end: blocks of the tail's tokens, behind it whole titles,
    about BLOCK tokens at a time."""
    ends = np.flatnonzero(np.diff(seg, append=-1)) + 1  # where a segment ends
    edges = [*range(0, tail, BLOCK), tail]
    while edges[-1] < len(seg):
        after = ends[ends > edges[-1]]
        fits = after[after <= edges[-1] + BLOCK]
        edges.append(int(fits[-1] if len(fits) else after[0]))
    return edges


def mask_of_piece(lm: LM, seg: np.ndarray, before: int) -> torch.Tensor:
    """0 and -inf (n, before + n): the n queries of a piece see all that stands before it, and of it
    what stands before them in their own segment."""
    own = np.tril(seg[:, None] == seg[None, :])
    sees = np.concatenate([np.ones((len(seg), before), bool), own], 1)
    return torch.zeros(sees.shape, dtype=lm.dtype).masked_fill(torch.as_tensor(~sees), -torch.inf)


def pass_fused(lm: LM, rows: Rows) -> torch.Tensor:
    """The states at the reads (N, D) of packed rows without gradients, layer by layer, where the
    layers are Llama's: between the matrix products stand the loops of kernels/cpu.cpp, and the last
    layer is computed for the states read only."""
    from delrec.kernels import cpu

    base = lm.body
    ptr = torch.as_tensor(rows.tokens.ptr)
    seg_M = torch.as_tensor(rows.segments, dtype=torch.int32)
    read_N = torch.as_tensor(rows.reads.among(rows.tokens.ptr))
    x_MD = packed_vectors(lm, rows)[0]
    pos_1M = torch.as_tensor(rows.places)[None]
    cos_Md, sin_Md = (t[0].contiguous() for t in base.rotary_emb(x_MD[None], pos_1M))
    more_MD = None  # what the residual connection adds next
    tapped = []
    for i, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        n_MD = add_and_norm(x_MD, more_MD, layer.input_layernorm)
        q_MHd, k_MGd, v_MGd = (
            f(n_MD).view(len(n_MD), -1, attention.head_dim).contiguous()
            for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        before = rows.kv[i] if rows.kv else None
        o_MHd = cpu.attention(
            q_MHd, k_MGd, v_MGd, cos_Md, sin_Md, before, seg_M, ptr, attention.scaling
        )
        if i == len(base.layers) - 1:
            x_MD, o_MHd = x_MD[read_N], o_MHd[read_N]
        more_MD = attention.o_proj(o_MHd.flatten(1))
        n_MD = add_and_norm(x_MD, more_MD, layer.post_attention_layernorm)
        more_MD = mlp.down_proj(cpu.silu_mul(mlp.gate_proj(n_MD), mlp.up_proj(n_MD)))
        if i in lm.taps:
            tapped.append(x_MD[read_N] + more_MD[read_N])
    x_ND = add_and_norm(x_MD, more_MD, base.norm)
    lm.keep_tapped([*tapped, x_ND])
    return x_ND


def add_and_norm(
    x_MD: torch.Tensor, more_MD: torch.Tensor | None, norm: torch.nn.Module
) -> torch.Tensor:
    """The norm of x + more (None: of x); the sum is left in x."""
    from delrec.kernels import cpu

    return cpu.rms_norm(x_MD, more_MD, norm.weight, norm.variance_epsilon)


# ---------------------------------------------------------------- which of them could be right


def passes_to_try(lm: LM) -> list[str]:
    """The passes that are worth trying for a decoder whose attention is ours, fastest first."""
    ways = ["padded"]
    if lm.device.type == "cpu":  # on a GPU one call per piece would cost more than the padding
        ways.insert(0, "packed")
        if can_fuse(lm):
            ways.insert(0, "fused")
    return ways


def made_of(ways: list[str]) -> str:
    """What the passes stand on outside this package: of fused the C++ loops, how python calls them,
    and the compiler and CPU that they are built by and for."""
    if "fused" not in ways:
        return ""
    from delrec.kernels import cpu

    return cpu.key_of(cpu.compiler_here()) + Path(cpu.__file__).read_text()


def can_fuse(lm: LM) -> bool:
    """True where the layers are named and built as Llama's, and a C++ compiler is at hand."""
    from delrec.kernels import cpu

    config = lm.model.config
    return (
        not lm.sharded
        and lm.dtype in (torch.float32, torch.bfloat16)
        and config.model_type in ("llama", "mistral", "qwen2")
        and config.hidden_act == "silu"
        and cpu.library() is not None
    )


# ---------------------------------------------------------------- attention


def attend_by_ours(model: torch.nn.Module) -> Callable | None:
    """A function that puts the model's own attention back; from now on the model attends by
    `attention` below. None, and nothing is changed, where it cannot be given an attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    takes = model._supports_attention_backend
    if model.config.is_encoder_decoder:
        takes = model.config.model_type in ("t5", "mt5")
    if not takes or not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return None
    AttentionInterface.register("delrec", attention)
    AttentionMaskInterface.register("delrec", sdpa_mask)
    before = [
        (part.config, part.config._attn_implementation)
        for part in model.modules()
        if hasattr(getattr(part, "config", None), "_attn_implementation")
    ]
    model.set_attn_implementation("delrec")
    # some releases of transformers leave out an encoder's and a decoder's copies of the config
    for config, _ in before:
        config._attn_implementation = "delrec"

    def put_back():
        for config, name in before:
            config._attn_implementation = name

    return put_back


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as transformers asks for it, query (B, H, Q, d), key and value (B, G, K, d), with
    three things of ours: the kept prefix in front of the keys, the rows of pass_packed piece by
    piece, and candidates that share their prompt's encoder states."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    dropout = kwargs.get("dropout", 0.0)
    # C rows of queries for one of keys: a prompt's candidates share its encoder states
    if len(query) > len(key):
        return attention_of_candidates(query, key, value, attention_mask, scaling, dropout), None
    if packed is None:
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    prefix = packed.kv[module.layer_idx] if packed.kv else None
    if packed.pieces is None:
        key, value = (
            torch.cat([kept.expand(len(t), -1, -1, -1), t], 2)
            for kept, t in zip(prefix, (key, value))
        )
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attention_in_pieces(query, key, value, prefix, packed.pieces, scaling, dropout), None


def attention_of_candidates(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention of C candidates of a prompt, which share its keys and values: they stand under each
    other as if they were more queries. (B C, Q, H, d)."""
    C, Q = len(query) // len(key), query.shape[2]
    under = query.unflatten(0, (-1, C)).transpose(1, 2).flatten(2, 3)
    o = F.scaled_dot_product_attention(
        under, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout
    )
    return o.unflatten(2, (C, Q)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def attention_in_pieces(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
    pieces: list[Piece],
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention of packed rows (1, M, H, d); prefix: its keys and values, or None. The H / G query
    heads that share keys stand under each other too: the same sums, fewer and larger products."""
    H, d = query.shape[1], query.shape[3]
    G = key.shape[1]
    lengths = [piece.length for piece in pieces]
    queries, keys, values = (t.split(lengths, 2) for t in (query, key, value))
    first = [[t] for t in prefix] if prefix else [[], []]
    attended = []
    for n, piece in enumerate(pieces):
        k, v = (
            torch.cat([*kept, *(t[i] for i in piece.before), t[n]], 2)
            for kept, t in zip(first, (keys, values))
        )
        if H // G not in piece.masks:  # made once for all layers, and for pieces of one shape
            piece.masks[H // G] = piece.masks[1].repeat(H // G, 1)
        o = F.scaled_dot_product_attention(
            queries[n].reshape(1, G, H // G * piece.length, d),
            k,
            v,
            attn_mask=piece.masks[H // G],
            scale=scaling,
            dropout_p=dropout,
        )
        attended.append(o.view(1, H, piece.length, d))
    return torch.cat(attended, 2).transpose(1, 2)
