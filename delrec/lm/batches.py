"""Prompts in batches: what they cost, and which go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from delrec.lm.ragged import ragged
from delrec.training.memory import CPU_TOKENS

if TYPE_CHECKING:
    from delrec.lm.model import LM
    from delrec.lm.ranker import Ranker


def batches_of(cost: np.ndarray | list[int], budget: int) -> list[np.ndarray]:
    """Indices (n,) in batches of like cost, the dearest first. A batch costs at most `budget`, each
    in it taken to cost as much as its dearest."""
    order, cost = np.argsort(-np.asarray(cost), kind="stable"), np.asarray(cost)
    batches, done = [], 0
    while done < len(order):
        some = max(budget // max(int(cost[order[done]]), 1), 1)
        batches.append(order[done : done + some])
        done += some
    return batches


def tokens_of(lm: LM) -> int:
    """Tokens of a pass without gradients."""
    return 65536 if lm.device.type == "cuda" else CPU_TOKENS


def costs_of(r: Ranker, tails: Sequence[np.ndarray], cand_nC: np.ndarray) -> np.ndarray:
    """How many tokens of a pass each prompt takes, (n,)."""
    cost = ragged(tails).lengths
    decoder = r.lm.kind == "decoder"
    # every title is read in a prompt of its own
    alone = r.lm.kind == "encoder" or r.lm.paths[:1] == ["rows"]
    if not decoder or not r.cache or alone:
        cost = cost + len(r.prompts.prefix)
    if r.verbalizer == "likelihood":
        cost = cost * (cand_nC.shape[1] if alone else 1) + np.diff(r.titles.ptr)[cand_nC].sum(1)
    return cost
