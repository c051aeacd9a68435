"""What controls without meaning share: what belongs to one item or history, given to another,
always the same one.
"""

import zlib

import numpy as np


def order_of_others(n_items: int, kind_I: np.ndarray | None = None) -> np.ndarray:
    """For each item the one whose row it takes, int64 (I+1,); the padding item keeps its own.

    All items stand in one random order, and each takes the row of the next of its kind. So none
    keeps its own. kind_I: bool (I+1,); None where all are of one kind."""
    kind_I = np.zeros(n_items + 1, bool) if kind_I is None else kind_I
    ring = np.random.default_rng(8).permutation(n_items) + 1
    order = np.arange(n_items + 1)
    for group in (ring[kind_I[ring]], ring[~kind_I[ring]]):
        order[group] = np.roll(group, -1)
    return order


def drawn_by(items: np.ndarray, n: int) -> int:
    """A number 0..n-1 that belongs to a history."""
    return zlib.crc32(np.asarray(items, np.int64).tobytes()) % n
