"""Text as tokens, tokens as vectors, and which LM it is.

A prompt is an int array: token ids, SLOT where a soft-prompt vector goes, MASK where the filler is
read, ITEM - i where item i stands as a vector (--input ids | hybrid; what it carries besides is
told by larger numbers: user_states.py). The three are negative, so no title and no tokenizer can
produce them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from delrec.lm.transfer import on_device
from delrec.runtime import stop

if TYPE_CHECKING:
    from delrec.lm.model import LM

SLOT, MASK, ITEM = -1, -2, -100


# ---------------------------------------------------------------- which LM is it?


def digest(*tensors: torch.Tensor) -> str:
    """16 hex digits that tell tensors apart."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().float().cpu().contiguous().numpy().data)
    return h.hexdigest()[:16]


def fingerprint(lm: LM) -> str:
    """16 hex digits of an LM: its tokenizer's vocabulary, its size, a piece of every weight; the
    same in every dtype that it is loaded in."""
    h = hashlib.sha256(json.dumps(sorted(lm.tok.get_vocab().items())).encode())
    for name, p in lm.model.named_parameters():
        p = p.full_tensor() if lm.sharded and hasattr(p, "full_tensor") else p
        h.update(f"{name} {tuple(p.shape)} {digest(p.flatten()[:64].bfloat16())}".encode())
    return h.hexdigest()[:16]


# ---------------------------------------------------------------- text, tokens, vectors


def encode(lm: LM, text: str) -> list[int]:
    """The tokens of plain text; what spells a special token stays text (titles are data)."""
    ids = lm.tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if lm.special & set(ids):
        # a tokenizer that ignores split_special_tokens: break the spelling up
        for s in lm.tok.all_special_tokens:
            text = text.replace(s, s.strip("<>[]|"))
        ids = lm.tok(text, add_special_tokens=False)["input_ids"]
        ids = [t for t in ids if t not in lm.special]
    return ids


def must_have_vectors(lm: LM, ids: Iterable[int]) -> None:
    """Stops at a token that the tokenizer knows and the model has no vector for."""
    rows = min(lm.model.get_input_embeddings().weight.shape[0], lm.head_VD.shape[0])
    last = max(map(int, ids), default=0)
    if last >= rows:
        stop(
            f"the tokenizer of {lm.name} knows {len(lm.tok)} tokens, its model {rows}: "
            f"{lm.tok.convert_ids_to_tokens(last)!r} has no vector; save the model after "
            "resize_token_embeddings, or take the tokenizer that it was trained with"
        )


def width(lm: LM) -> int:
    """D: the width of the states that the head reads."""
    return lm.head_VD.shape[1]


def tokens_width(lm: LM) -> int:
    """The width of a token's vector, which need not be D (OPT, ALBERT)."""
    return lm.model.get_input_embeddings().weight.shape[1]


def token_scale(lm: LM) -> float:
    """How many times as long as its stored row a token's vector is (Gemma scales it on the way)."""
    with torch.no_grad():
        rows = lm.model.get_input_embeddings().weight
        ids = torch.arange(min(64, len(rows)), device=lm.device)
        seen = vectors_of(lm, ids).float().norm()
        stored = rows[ids].float().norm()
    return float(seen / stored) if stored > 0 else 1.0


def random_soft_prompt(lm: LM, k: int, seed: int) -> torch.Tensor:
    """k tokens' vectors drawn at random, which a soft prompt begins as: fp32 (k, D)."""
    rows = torch.randperm(len(lm.head_VD), generator=torch.Generator().manual_seed(seed))[:k]
    last = len(lm.model.get_input_embeddings().weight) - 1
    with torch.no_grad():
        return vectors_of(lm, rows.clamp(max=last).to(lm.device)).float().clone()


def vectors_of(lm: LM, ids: torch.Tensor) -> torch.Tensor:
    """The vectors of tokens as the model's layers are given them."""
    vectors = lm.model.get_input_embeddings()(ids)
    if not isinstance(vectors, torch.Tensor):
        stop(
            f"{lm.name}: its embedding gives more than a vector a token "
            f"({type(lm.model).__name__}), so no soft prompt can stand beside them; use another LM"
        )
    return vectors if lm.factor == 1 else vectors * lm.factor


def embed(lm: LM, ids_BQ: np.ndarray, P_kD: torch.Tensor | None) -> torch.Tensor:
    """Tokens' vectors (B, Q, D) in the LM's dtype, the soft prompt at the slots in order, items'
    vectors at their places. Which tokens are which is looked up here, never on the device."""
    ids_BQ = np.asarray(ids_BQ)
    e_BQD = vectors_of(lm, on_device(np.maximum(ids_BQ, 0), lm.device)).to(lm.dtype)
    slot_BQ = ids_BQ == SLOT
    if P_kD is not None and slot_BQ.any():
        nth_BQ = np.clip(np.cumsum(slot_BQ, 1) - 1, 0, len(P_kD) - 1)
        spliced = P_kD.to(lm.dtype)[on_device(nth_BQ, lm.device)]
        e_BQD = torch.where(on_device(slot_BQ, lm.device)[..., None], spliced, e_BQD)
    item_BQ = ids_BQ <= ITEM
    if lm.items is not None and item_BQ.any():
        vectors_ND = lm.items.vectors(ITEM - ids_BQ[item_BQ])
        item_BQ = on_device(item_BQ, lm.device)[..., None]
        e_BQD = e_BQD.masked_scatter(item_BQ, vectors_ND.to(lm.dtype))
    return e_BQD
