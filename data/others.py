"""What controls without meaning share: what belongs to one item or history, given to another,
always the same one.
"""

import zlib

import numpy as np

from delrec.data.prepared import Data, histories, users


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


def rows_of_others(user_n: np.ndarray, seed: int) -> np.ndarray:
    """For each sample the row of another user's (n,), as long as no user has over half of them.

    The users stand in a random order, each with all samples, and each sample takes the one that
    stands as far behind it as the longest user is long."""
    rank_U = np.random.default_rng([seed, 8]).permutation(int(user_n.max()) + 1)
    ring, row_n = np.argsort(rank_U[user_n], kind="stable"), np.empty(len(user_n), np.int64)
    row_n[ring] = np.roll(ring, -np.bincount(user_n).max())
    return row_n


def sample_of_another(data: Data, items: np.ndarray) -> int:
    """The training sample (a place in data.items) that a history draws: of a user who has not had
    all of its items, as whoever asks has. Of anybody where all users had them."""
    n = len(data.train)
    first = drawn_by(items, n)
    for i in range(n if len(items) else 0):
        place = data.train[(first + i) % n]
        (user,) = users(data, [place])
        if not np.isin(items, data.items[data.ptr[user] : data.ptr[user + 1]]).all():
            return place
    return data.train[first]


def history_of_another(data: Data, items: np.ndarray, L: int) -> np.ndarray:
    """The last L items at most before the training sample that a history draws, oldest first."""
    (other_L,) = histories(data, np.array([sample_of_another(data, items)]), L)
    return other_L[other_L > 0]
