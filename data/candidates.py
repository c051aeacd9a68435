"""Drawing candidates: each sample's target among items that its user never touched.

n samples, I items (ids 1..I), C candidates. A pair is the key user * (I + 1) + item.
"""

import numpy as np

BLOCK = 65536  # rows drawn at once, so that memory stays small


def draw_candidates(
    target: np.ndarray,
    user: np.ndarray,
    pairs: np.ndarray,
    n_items: int,
    C: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Candidates int32 (n, C): each row its target and C-1 items drawn uniformly without repetition
    from those its user never touched, in random order. pairs: what was touched, sorted.
    """
    touched = Pairs(pairs)
    cand_nC = np.empty((len(target), C), np.int32)
    for start in range(0, len(target), BLOCK):
        rows = slice(start, start + BLOCK)
        first_key = user[rows] * (n_items + 1)
        others = draw_others(first_key, touched, n_items, C - 1, rng)
        together = np.concatenate([target[rows, None], others], 1)
        cand_nC[rows] = rng.permuted(together, axis=1)
    return cand_nC


def draw_others(
    first_key: np.ndarray, touched: "Pairs", n_items: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Items int64 (rows, count), drawn uniformly without repetition from those the row's user never
    touched; first_key is user * (I + 1). What is touched or there twice is drawn again until
    nothing is.
    """
    others = rng.integers(1, n_items + 1, (len(first_key), count))
    todo = np.arange(len(first_key))  # rows that may not be right yet
    while len(todo):
        drawn = others[todo]
        again = touched.hold(first_key[todo, None] + drawn) | repeated(drawn)
        drawn[again] = rng.integers(1, n_items + 1, again.sum())
        others[todo] = drawn
        todo = todo[again.any(1)]
    return others


def repeated(items: np.ndarray) -> np.ndarray:
    """Mask of the entries that stand earlier in their row already."""
    in_order = np.sort(items, axis=1)
    rows = np.flatnonzero((in_order[:, 1:] == in_order[:, :-1]).any(1))  # few: only they are traced
    order = np.argsort(items[rows], axis=1, kind="stable")
    in_order = in_order[rows]
    mask = np.zeros(items.shape, bool)
    mask[rows[:, None], order[:, 1:]] = in_order[:, 1:] == in_order[:, :-1]
    return mask


class Pairs:
    """A set of pairs that answers for millions of keys at once."""

    def __init__(self, pairs: np.ndarray) -> None:
        """pairs: sorted keys, at least one."""
        self.pairs = pairs
        # most keys asked for are not there: one look into a table of one byte a slot says so
        self.bits = max(int(len(pairs)).bit_length() + 3, 10)
        self.maybe = np.zeros(2**self.bits, bool)
        self.maybe[self.slot(pairs)] = True

    def slot(self, keys: np.ndarray) -> np.ndarray:
        """A key's slot in the table (Fibonacci hashing)."""
        return (keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - self.bits)

    def hold(self, keys: np.ndarray) -> np.ndarray:
        """Mask, of the keys' shape, of those that are in the set."""
        found = self.maybe[self.slot(keys)]
        sure = keys[found]
        place = np.minimum(np.searchsorted(self.pairs, sure), len(self.pairs) - 1)
        found[found] = self.pairs[place] == sure
        return found
