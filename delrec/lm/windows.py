"""Windows of items, what --input ids trains on: one prompt, and the next item is predicted after
every item of it.
"""

from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import batch_of, runs_of_targets
from delrec.runtime import stop


def draw_windows(data, L, n, seed):
    """The first and last target (places in data.items) of n windows of L items: every training
    target once an epoch, the windows cut anew in each.
    """
    first, last, epoch = [], [], 0
    while sum(map(len, first)) < n:
        rng = np.random.default_rng([seed, epoch])
        first_e, last_e = runs_of_targets(data, L, rng)
        order, epoch = rng.permutation(len(first_e)), epoch + 1
        first.append(first_e[order]), last.append(last_e[order])
    return np.concatenate(first)[:n], np.concatenate(last)[:n]


def window_prompts(r, first, last, is_target):
    """Windows as prompts: tail, at (places of the vectors whose predecessors are read besides the
    mask), place (of each read's target in data.items, the mask's first), target (its item).
    is_target: which places of data.items may be one, (M,).
    """
    batch = []
    for end, seq, target in zip(last, *batch_of(r.data, first, last, r.history, is_target)):
        target = target[seq > 0]
        tail, at = r.prompts.history(seq[seq > 0])
        if len(at) < len(target):
            stop(
                f"a window of {len(target)} items does not fit the prompt, {len(at)} do; raise "
                "--max-tokens or lower --history"
            )
        # a vector's state predicts the vector after it; the last one's is read at the mask
        inner = np.flatnonzero(target[:-1])
        place = end + 1 - len(target) + np.append(len(target) - 1, inner)
        batch.append(
            SimpleNamespace(
                tail=tail,
                at=at[inner + 1],
                place=place,
                target=r.data.items[place].astype(np.int64),
            )
        )
    return batch


def targets_of(batch, key="target"):
    """The targets (or places) of some windows in the order of lm.read_examples: masks first."""
    return np.concatenate(
        [[getattr(e, key)[0] for e in batch], *(getattr(e, key)[1:] for e in batch)]
    ).astype(np.int64)
