"""Ways to attend that stage variants of make gpu compares: a mask, none, flex attention, nested
tensors. Each scores the same prompts, without a gradient; none of them is the product's.

A way is a function of (lm, prompts, start) that returns score_BC; the prompts' lengths differ.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from delrec.lm.bench.work import Prompts
from delrec.lm.model import LM
from delrec.lm.passes import pad
from delrec.lm.reading import Start
from delrec.lm.text import embed
from delrec.lm.verbalizers import verbalise


def by_mask(lm: LM, prompts: Prompts, start: Start) -> torch.Tensor:
    """The product's own way: padded rows under a mask, the prefix's keys and values kept."""
    return prompts.score(lm, start)


def scored(lm: LM, prompts: Prompts, x_BD: torch.Tensor) -> torch.Tensor:
    """score_BC of states at the mask."""
    return verbalise(lm, x_BD, prompts.cand_BC, prompts.titles, "mean")


def by_nothing(lm: LM, prompts: Prompts, start: Start) -> torch.Tensor:
    """Whole prompts padded on the right, attention causal and without a mask: what stands behind a
    prompt's end is seen by nothing that is read. Nothing of the prefix is kept.
    """
    rows = [np.concatenate([prompts.prefix, tail[:-1]]) for tail in prompts.tails]
    x_BQD = embed(lm, pad(rows), start.P)
    x_BQD = lm.body(inputs_embeds=x_BQD, use_cache=False).last_hidden_state
    end_B = torch.tensor([len(row) - 1 for row in rows], device=lm.device)
    return scored(lm, prompts, x_BQD[torch.arange(len(rows), device=lm.device), end_B])


# ---------------------------------------------------------------- rows one behind the other


class Packed:
    """Prompts one behind the other, and how their rows attend."""

    def __init__(self, lm: LM, prompts: Prompts, start: Start, kept: bool) -> None:
        self.kept = len(start.prefix) if kept else 0  # tokens whose keys and values are kept
        self.kv = start.kv if kept else None
        self.lm, ahead = lm, prompts.prefix[: 0 if kept else None]
        rows = [np.concatenate([ahead, tail[:-1]]) for tail in prompts.tails]
        self.lengths = [len(row) for row in rows]
        places = np.concatenate([np.arange(n) + self.kept for n in self.lengths])
        self.place_1M = torch.as_tensor(places)[None].to(lm.device)
        P_kD = None if kept else start.P.repeat(len(rows), 1)
        self.x_1MD = embed(lm, np.concatenate(rows)[None], P_kD)
        ends = np.cumsum([0, *self.lengths])
        self.offsets = torch.as_tensor(ends).to(lm.device)

    def states(self, attend: Callable) -> torch.Tensor:
        """The states at each row's end, where layers attend by attend(layer, q, k, v, scale)."""
        from transformers import AttentionInterface

        def attention(module, query, key, value, mask, scaling=None, **kwargs):
            o_1HMd = attend(module.layer_idx, query, key, value, scaling)
            return o_1HMd.transpose(1, 2), None

        AttentionInterface.register("delrec_bench", attention)
        with attending(self.lm.model, "delrec_bench"):
            x_1MD = self.lm.body(
                inputs_embeds=self.x_1MD,
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.lm.device),
                position_ids=self.place_1M,
                use_cache=False,
            ).last_hidden_state
        return x_1MD[0, self.offsets[1:] - 1]


@contextmanager
def attending(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Within it the model attends by the attention of this name."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before):
            config._attn_implementation = own


def flex_of(device: torch.device) -> Callable:
    """flex_attention: compiled on CUDA, where alone it has a kernel for this."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device.type == "cuda" else flex_attention


def by_flex(flex: Callable, lm: LM, prompts: Prompts, start: Start) -> torch.Tensor:
    """Packed rows, the prefix's keys and values kept, under a block mask of flex attention."""
    from torch.nn.attention.flex_attention import create_block_mask

    packed = Packed(lm, prompts, start, kept=start.kv is not None)
    kept, M = packed.kept, packed.x_1MD.shape[1]
    lengths = torch.tensor(packed.lengths, device=lm.device)
    row_M = torch.repeat_interleave(torch.arange(len(lengths), device=lm.device), lengths)

    def sees(b, h, q, k):
        own = (k - kept).clamp(min=0)
        return (k < kept) | ((row_M[q] == row_M[own]) & (q >= own))

    mask = create_block_mask(sees, None, None, M, kept + M, device=lm.device)

    def attend(layer, q, k, v, scale):
        if packed.kv is not None:
            before = packed.kv[layer]
            k, v = (torch.cat([old, new], 2) for old, new in zip(before, (k, v)))
        return flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)

    return scored(lm, prompts, packed.states(attend))


def by_nested(lm: LM, prompts: Prompts, start: Start) -> torch.Tensor:
    """Packed rows as nested tensors; the prefix stands in each of them."""
    packed = Packed(lm, prompts, start, kept=False)
    sizes = {"min_seqlen": min(packed.lengths), "max_seqlen": max(packed.lengths)}

    def attend(layer, q, k, v, scale):
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        nested = [
            torch.nested.nested_tensor_from_jagged(
                t[0].transpose(0, 1).contiguous(), packed.offsets, **sizes
            ).transpose(1, 2)
            for t in (q, k, v)
        ]
        return causal(nested, scale)[None].transpose(1, 2)

    return scored(lm, prompts, packed.states(attend))


def causal(nested: list[torch.Tensor], scale: float) -> torch.Tensor:
    """(M, H, d): causal attention of nested queries, keys and values (B, H, rows, d)."""
    if nested[0].is_cuda:
        o = F.scaled_dot_product_attention(*nested, is_causal=True, scale=scale)
        return o.transpose(1, 2).values()
    # torch has no such kernel on a CPU: there row by row
    parts = [
        F.scaled_dot_product_attention(*(t[None] for t in row), is_causal=True, scale=scale)
        for row in zip(*(t.unbind() for t in nested))
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def ways_of(lm: LM) -> dict[str, Callable]:
    """{name: way} of an LM; an encoder-decoder, whose scores have a bias of places, has one."""
    if lm.kind != "decoder":
        return {"mask": by_mask}
    flex = partial(by_flex, flex_of(lm.device))
    return {"mask": by_mask, "causal": by_nothing, "flex": flex, "nested": by_nested}
