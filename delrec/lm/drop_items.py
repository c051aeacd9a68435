"""History items that a training prompt lacks (--drop-items), which keep stage 2 from learning its
samples by heart.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from delrec.lm.text import ITEM


def without_items(batch: list, p: float, seed: int) -> list:
    """Training prompts in each of which an item's vector is 0 with probability p, drawn by the
    prompt's number: the same ones in whichever process and after a kill.

    The item's place stays, and what is asked there: the LM reads what W_in makes of 0, its bias,
    and must go by the others. Taken out, it would take with it the place from which its successor
    is predicted, and the loss would be of other reads than without.
    """
    found = []
    for prompt in batch:
        place_M = np.flatnonzero(prompt.tail <= ITEM)
        gone = np.random.default_rng([seed, 7, prompt.number]).random(len(place_M)) < p
        tail = prompt.tail.copy()
        tail[place_M[gone]] = ITEM  # the padding item, whose vector is 0
        found.append(replace(prompt, tail=tail))
    return found


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --drop-items: [(is it so?, sentence)]."""
    return [
        (
            cfg.drop_items and cfg.input != "ids",
            f"--drop-items empties item vectors, --input is {cfg.input}; use --input ids, or leave "
            "it out",
        )
    ]
