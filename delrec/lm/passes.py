"""The ways through a decoder-only LM's body: one pass over rows of tokens -> the states at the
reads.

A row is what stands behind the kept prefix: a prompt's tail, then its C titles, each of which
sees the prefix, the tail and itself only. Every pass takes the same arguments and says the same
numbers:
    rows      one title a row, under the model's own mask and attention: right for every causal LM
    padded    rows padded to one length, under a mask of ours
    packed    rows one behind the other, no padding, attention piece by piece (CPU)
    fused     the same without gradients, layer by layer, by kernels/cpu.cpp (CPU, Llama)
Which of them a model is read by is measured at load: check.py."""

import sys
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from delrec.lm.text import embed

BLOCK = 256  # queries of a piece in pass_packed


def pad(rows, value=0) -> np.ndarray:
    """Rows of different lengths -> one int64 array padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for i, r in enumerate(rows):
        out[i, : len(r)] = r
    return out


def picked(first, index) -> np.ndarray:
    """Places within each row, once or several times around the rows -> places in all of them, which
    begin at `first`."""
    return np.concatenate([first[b % len(first)] + i for b, i in enumerate(index)]).astype(int)


def reads_of(lm, x_BQD, index_N) -> torch.Tensor:
    """The states at the reads (N, D), and in lm.tapped those of the blocks."""
    if lm.tapped:
        lm.tapped = [t.flatten(0, 1)[index_N] for t in lm.tapped]
    return x_BQD.flatten(0, 1)[index_N]


# ---------------------------------------------------------------- the four passes


def pass_rows(lm, P_kD, rows, index) -> torch.Tensor:
    """The states at `index` of whole rows (nothing is kept in front of them), padded on the right,
    which a causal model does not see: (N, D)."""
    ids_BQ = torch.as_tensor(pad(rows)).to(lm.device)
    length_B = torch.tensor([len(r) for r in rows], device=lm.device)
    B, Q = ids_BQ.shape
    real_BQ = (torch.arange(Q, device=lm.device) < length_B[:, None]).long()
    more = {} if bool(real_BQ.all()) else {"attention_mask": real_BQ}
    lm.tapped = None if lm.tapped is None else []
    x_BQD = body(lm, inputs_embeds=embed(lm, ids_BQ, P_kD), use_cache=False, **more)
    return reads_of(lm, x_BQD, torch.as_tensor(picked(np.arange(B) * Q, index), device=lm.device))


def body(lm, **inputs) -> torch.Tensor:
    """The last states (B, Q, D) of the LM's body, as its head reads them."""
    return lm.body(**inputs).last_hidden_state


def pass_padded(lm, kv, P_kD, kept, rows, segments, places, index) -> torch.Tensor:
    """The states at `index` (an array for each row, or several for each, one round of the rows
    after the other) of rows padded to one length, under a mask: (N, D)."""
    B = len(rows)
    ids_BQ = torch.as_tensor(pad(rows)).to(lm.device)
    seg_BQ = torch.as_tensor(pad(segments, -1)).to(lm.device)
    pos_BQ = torch.as_tensor(pad(places)).to(lm.device)
    Q = ids_BQ.shape[1]
    sees_QQ = torch.ones(Q, Q, dtype=torch.bool, device=lm.device).tril()
    own_BQQ = (seg_BQ[:, None, :] == 0) | (seg_BQ[:, None, :] == seg_BQ[:, :, None])
    prefix_BQK = torch.ones(B, Q, kept, dtype=torch.bool, device=lm.device)
    mask_BQK = torch.cat([prefix_BQK, own_BQQ & sees_QQ], 2)
    more = {"packed": SimpleNamespace(kv=kv, pieces=None)} if kv else {}
    lm.tapped = None if lm.tapped is None else []
    x_BQD = body(
        lm,
        inputs_embeds=embed(lm, ids_BQ, P_kD),
        attention_mask=mask_BQK[:, None],
        position_ids=pos_BQ,
        use_cache=False,
        **more,
    )
    return reads_of(lm, x_BQD, torch.as_tensor(picked(np.arange(B) * Q, index), device=lm.device))


def pass_packed(lm, kv, P_kD, kept, rows, segments, places, index, block=BLOCK) -> torch.Tensor:
    """The same with all rows one behind the other, no padding: `attention` takes them apart
    again, in blocks of queries that see the prefix, what stands before the block in its row's
    tail, and what stands before them in the block."""
    pieces, masks = [], {}
    for seg in segments:
        m = int(
            (seg == 0).sum()
        )  # the tail; behind it whole titles, about `block` tokens at a time
        ends = np.flatnonzero(np.diff(seg, append=-1)) + 1  # where a segment ends
        edges, first = [*range(0, m, block), m], len(pieces)
        while edges[-1] < len(seg):
            after = ends[ends > edges[-1]]
            edges.append(int(max(after[0], *after[after <= edges[-1] + block], 0)))
        for i, j in zip(edges[:-1], edges[1:]):
            before = min(i, m)
            key = (kept + before, seg[i:j].tobytes())
            if key not in masks:
                masks[key] = {1: mask_of_piece(lm, seg[i:j], kept + before)}
            earlier = range(first, first + sum(e < before for e in edges[:-1]))
            pieces.append(SimpleNamespace(length=j - i, before=earlier, masks=masks[key]))
    ids_1M, pos_1M = (torch.as_tensor(np.concatenate(r))[None] for r in (rows, places))
    if P_kD is not None:  # every row holds all the slots
        P_kD = P_kD.repeat(len(rows), 1)
    lm.tapped = None if lm.tapped is None else []
    x_1MD = body(
        lm,
        inputs_embeds=embed(lm, ids_1M, P_kD),
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        position_ids=pos_1M,
        use_cache=False,
        packed=SimpleNamespace(kv=kv, pieces=pieces),
    )
    starts = np.cumsum([0, *map(len, rows)])[:-1]
    return reads_of(lm, x_1MD, torch.as_tensor(picked(starts, index)))


def mask_of_piece(lm, seg, before) -> torch.Tensor:
    """0 and -inf (n, before + n): the n queries of a piece see all that stands before it, and of it
    what stands before them in their own segment."""
    own = np.tril(seg[:, None] == seg[None, :])
    sees = np.concatenate([np.ones((len(seg), before), bool), own], 1)
    return torch.zeros(sees.shape, dtype=lm.dtype).masked_fill(torch.as_tensor(~sees), -torch.inf)


def pass_fused(lm, kv, P_kD, kept, rows, segments, places, index) -> torch.Tensor:
    """The same without gradients, layer by layer, where the layers are Llama's: between the matrix
    products stand the loops of kernels/cpu.cpp, and the last layer is computed for the states read
    only."""
    from delrec.kernels import cpu

    base = lm.body
    ids_1M, pos_1M = (torch.as_tensor(np.concatenate(r))[None] for r in (rows, places))
    ptr = np.cumsum([0, *map(len, rows)])
    seg_M = torch.as_tensor(np.concatenate(segments), dtype=torch.int32)
    read_N, ptr = torch.as_tensor(picked(ptr[:-1], index)), torch.as_tensor(ptr)
    # every row holds all the slots
    x_MD = embed(lm, ids_1M, P_kD if P_kD is None else P_kD.repeat(len(rows), 1))[0]
    cos_Md, sin_Md = (t[0].contiguous() for t in base.rotary_emb(x_MD[None], pos_1M))
    more_MD, tapped = None, []  # more: what the residual connection adds next

    def norm(x, module):
        return cpu.rms_norm(x, more_MD, module.weight, module.variance_epsilon)

    for i, layer in enumerate(base.layers):
        attention, mlp = layer.self_attn, layer.mlp
        n_MD = norm(x_MD, layer.input_layernorm)
        q_MHd, k_MGd, v_MGd = (
            f(n_MD).view(len(n_MD), -1, attention.head_dim).contiguous()
            for f in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        before = kv[i] if kv else None
        o_MHd = cpu.attention(
            q_MHd, k_MGd, v_MGd, cos_Md, sin_Md, before, seg_M, ptr, attention.scaling
        )
        if i == len(base.layers) - 1:
            x_MD, o_MHd = x_MD[read_N], o_MHd[read_N]
        more_MD = attention.o_proj(o_MHd.flatten(1))
        n_MD = norm(x_MD, layer.post_attention_layernorm)
        more_MD = mlp.down_proj(cpu.silu_mul(mlp.gate_proj(n_MD), mlp.up_proj(n_MD)))
        if i in lm.taps:
            tapped.append(x_MD[read_N] + more_MD[read_N])
    x_ND = norm(x_MD, base.norm)
    lm.tapped = None if lm.tapped is None else [*tapped, x_ND]
    return x_ND


# ---------------------------------------------------------------- which of them could be right


def candidates_of(lm) -> list:
    """The passes that are worth trying for a decoder whose attention is ours, fastest first."""
    ways = ["padded"]
    if lm.device.type == "cpu":  # on a GPU one call per piece would cost more than the padding
        ways.insert(0, "packed")
        if can_fuse(lm):
            ways.insert(0, "fused")
    return ways


def can_fuse(lm) -> bool:
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


def own_attention(model):
    """Lets the model attend by `attention` below. Returns a function that puts its own attention
    back, or None, and nothing is changed, where a model cannot be given an attention."""
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


def attention(module, query, key, value, attention_mask, scaling=None, packed=None, **kwargs):
    """Attention as transformers asks for it, query (B, H, Q, d), key and value (B, G, K, d), with
    three things of ours: the kept prefix in front of the keys, the rows of pass_packed piece by
    piece, and candidates that share their prompt's encoder states."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    dropout = kwargs.get("dropout", 0.0)
    if len(query) > len(key):
        # C candidates of a prompt stand under each other as if they were more queries
        C, Q = len(query) // len(key), query.shape[2]
        under = query.unflatten(0, (-1, C)).transpose(1, 2).flatten(2, 3)
        o = F.scaled_dot_product_attention(
            under, key, value, attn_mask=attention_mask, scale=scaling, dropout_p=dropout
        )
        return o.unflatten(2, (C, Q)).permute(0, 2, 3, 1, 4).flatten(0, 1), None
    if packed is None:
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if packed.pieces is None:
        key, value = (
            torch.cat([kept.expand(len(t), -1, -1, -1), t], 2)
            for kept, t in zip(packed.kv[module.layer_idx], (key, value))
        )
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attention_in_pieces(module, query, key, value, scaling, packed, dropout), None


def attention_in_pieces(module, query, key, value, scaling, packed, dropout):
    """Attention of packed rows (1, M, H, d). The H / G query heads that share keys stand under each
    other too: the same sums, fewer and larger products."""
    (_, H, _, d), G, out = query.shape, key.shape[1], []
    lengths = [p.length for p in packed.pieces]
    query, key, value = (t.split(lengths, 2) for t in (query, key, value))
    prefix = [[t] for t in packed.kv[module.layer_idx]] if packed.kv else [[], []]
    for n, piece in enumerate(packed.pieces):
        k, v = (
            torch.cat([*first, *(t[i] for i in piece.before), t[n]], 2)
            for first, t in zip(prefix, (key, value))
        )
        if H // G not in piece.masks:  # made once for all layers, and for pieces of one shape
            piece.masks[H // G] = piece.masks[1].repeat(H // G, 1)
        o = F.scaled_dot_product_attention(
            query[n].reshape(1, G, H // G * piece.length, d),
            k,
            v,
            attn_mask=piece.masks[H // G],
            scale=scaling,
            dropout_p=dropout,
        )
        out.append(o.view(1, H, piece.length, d))
    return torch.cat(out, 2).transpose(1, 2)
