"""What is counted in the training part: popularity, and which items stand near each other. It ranks
without any training.

M interactions, I items (ids 1..I, 0 pads), n samples, C candidates, L history length.
"""

from dataclasses import dataclass

import numpy as np

from delrec.data.prepared import Data, histories, users
from delrec.metrics import metrics

LAST = 10  # items of a history that count
DECAY = 0.8  # the weight of an item beside that of the next one
SPAN = 5  # steps: items so far apart stand near each other
CHUNK = 1000  # samples that are scored at once


def in_training(data: Data) -> np.ndarray:
    """Which interactions are training: all up to each user's last training target, bool [M]."""
    last = np.full(data.n_users, -1)
    np.maximum.at(last, users(data, data.train), data.train)
    return np.arange(len(data.items)) <= np.repeat(last, np.diff(data.ptr))


def popularity(data: Data) -> np.ndarray:
    """Training interactions per item: float32 [I+1]."""
    return np.bincount(data.items[in_training(data)], minlength=data.n_items + 1).astype(np.float32)


def seen_in_training(data: Data) -> np.ndarray:
    """The items that training saw: int64, sorted."""
    if data.shared is not None:
        return data.shared.trained
    return np.flatnonzero(popularity(data)[1:]) + 1


def full_ranking_of(
    score_I: np.ndarray, data: Data, samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(greater, equal) of each sample's target in the catalogue by one score per item, the user's
    earlier items masked as for the backbones.
    """
    target_n = data.items[samples]
    ranked, own_n = np.sort(score_I[1:]), score_I[target_n]
    above = len(ranked) - np.searchsorted(ranked, own_n, "right")
    level = np.searchsorted(ranked, own_n, "right") - np.searchsorted(ranked, own_n, "left") - 1
    for n, (sample, begin) in enumerate(zip(samples, data.ptr[users(data, samples)])):
        old = np.unique(data.items[begin:sample])
        old = score_I[old[old != target_n[n]]]
        above[n] -= (old > own_n[n]).sum()
        level[n] -= (old == own_n[n]).sum()
    return above, level


def chance_over_all(data: Data, samples: np.ndarray) -> dict[str, float]:
    """The mean metrics of constant scores of the whole catalogue, the user's earlier items masked:
    whoever has had much is asked about fewer."""
    ranks = full_ranking_of(np.zeros(data.n_items + 1), data, samples)
    return {name: float(value_n.mean()) for name, value_n in metrics(*ranks).items()}


def times_next(data: Data, samples: np.ndarray) -> np.ndarray:
    """How often each sample's target came right after its history's last item in the training part,
    of any user: int64 (n,).
    """
    items, user = data.items.astype(np.int64), users(data, np.arange(len(data.items)))
    pair = items[:-1] * (data.n_items + 1) + items[1:]  # of places p and p + 1
    known = in_training(data)[1:] & (user[1:] == user[:-1])
    pairs, times = np.unique(pair[known], return_counts=True)
    return times_of(pair[np.asarray(samples) - 1], pairs, times)


def times_of(asked: np.ndarray, pairs: np.ndarray, times: np.ndarray) -> np.ndarray:
    """How often each asked pair was counted, int64 of its shape. pairs: sorted; times: theirs."""
    if not len(pairs):
        return np.zeros(asked.shape, np.int64)
    at = np.searchsorted(pairs, asked).clip(max=len(pairs) - 1)
    return np.where(pairs[at] == asked, times[at], 0)


# ---------------------------------------------------------------- which items stand near each other


@dataclass
class Near:
    """How often two items stood within SPAN steps of each other in the training part."""

    pair: np.ndarray  # int64, sorted: smaller id * (I + 1) + larger id
    times: np.ndarray  # int64: how often
    count_I: np.ndarray  # int64 (I+1,): training interactions of each item


def near_in_training(data: Data) -> Near:
    """The pairs of items that stood within SPAN steps in the training part, counted."""
    I1 = data.n_items + 1
    user = users(data, np.arange(len(data.items)))
    known = in_training(data)
    pairs = []
    for d in range(1, SPAN + 1):
        both = known[d:] & (user[d:] == user[:-d])
        a, b = data.items[:-d][both].astype(np.int64), data.items[d:][both].astype(np.int64)
        pairs.append(np.minimum(a, b) * I1 + np.maximum(a, b))
    pair, times = np.unique(np.concatenate(pairs), return_counts=True)
    return Near(pair, times, np.bincount(data.items[known], minlength=I1))


def weights_of(L: int) -> np.ndarray:
    """DECAY^j for the item j steps before the last, oldest first: float64 (L,)."""
    return DECAY ** np.arange(L - 1, -1, -1)


def cooccurrence(data: Data, samples: np.ndarray, cand_nC: np.ndarray) -> np.ndarray:
    """How often each candidate stood within SPAN of the history's items in the training part,
    over the root of both counts; item j steps ago weighs DECAY^j: float32 (n, C).
    """
    old_nL = histories(data, samples, LAST)
    return together(near_in_training(data), old_nL, cand_nC)


def together(near: Near, old_nL: np.ndarray, cand_nC: np.ndarray) -> np.ndarray:
    """The co-occurrence (n, C) of candidates with histories, padded on the left with 0."""
    I1, weight_L = len(near.count_I), weights_of(old_nL.shape[1])
    score_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(old_nL), CHUNK):
        old_nL1 = old_nL[i : i + CHUNK, :, None]
        c_n1C = cand_nC[i : i + CHUNK][:, None]
        wanted = np.minimum(old_nL1, c_n1C) * I1 + np.maximum(old_nL1, c_n1C)
        times_nLC = np.where(old_nL1 > 0, times_of(wanted, near.pair, near.times), 0)
        both_nLC = near.count_I[old_nL1] * near.count_I[c_n1C]
        together_nLC = times_nLC / np.sqrt(np.maximum(both_nLC, 1))
        score_nC[i : i + CHUNK] = (together_nLC * weight_L[None, :, None]).sum(1)
    return score_nC


@dataclass
class Neighbours:
    """For every item the items that stood near it in training, and how strongly."""

    ptr: np.ndarray  # int64 (I+2,): item i owns [ptr[i]:ptr[i+1]]
    item: np.ndarray  # int64: the neighbours
    weight: np.ndarray  # float64: times near each other over the root of both counts


def neighbours_of(near: Near) -> Neighbours:
    """The pairs of items as a list of neighbours of each, in both directions."""
    I1 = len(near.count_I)
    a, b = near.pair // I1, near.pair % I1
    weight = near.times / np.sqrt(near.count_I[a] * near.count_I[b])
    twice = a != b  # an item beside itself is its own neighbour once
    first, second = np.r_[a, b[twice]], np.r_[b, a[twice]]
    order = np.argsort(first, kind="stable")
    ptr = np.searchsorted(first[order], np.arange(I1 + 1))
    return Neighbours(ptr, second[order], np.r_[weight, weight[twice]][order])


def scores_of_catalogue(near: Neighbours, old_nL: np.ndarray) -> np.ndarray:
    """The co-occurrence of every item with some histories (0: padding), as `cooccurrence` scores
    candidates: float32 (n, I+1).
    """
    n, L = old_nL.shape
    I1 = len(near.ptr) - 1
    many_nL = np.where(old_nL > 0, near.ptr[old_nL + 1] - near.ptr[old_nL], 0)
    many = many_nL.ravel()
    # the neighbours of every item of every history, one after another
    place = np.arange(many.sum()) + np.repeat(
        near.ptr[old_nL.ravel()] - np.cumsum(many) + many, many
    )
    weight = near.weight[place] * np.repeat(np.tile(weights_of(L), n), many)
    row = np.repeat(np.arange(n), many_nL.sum(1))
    score = np.bincount(row * I1 + near.item[place], weight, minlength=n * I1)
    return score.reshape(n, I1).astype(np.float32)
