"""The floors that every table holds, which need no training and no LM (popularity, similarity of
titles, co-occurrence), and the fusion of two rows.
"""

import numpy as np

from delrec.data.prepared import Data, histories, tfidf, users
from delrec.metrics import compare, metrics


def in_training(data: Data) -> np.ndarray:
    """Which interactions are training: all up to each user's last training target, bool [M]."""
    last = np.full(data.n_users, -1)
    np.maximum.at(last, users(data, data.train), data.train)
    return np.arange(len(data.items)) <= np.repeat(last, np.diff(data.ptr))


def popularity(data: Data) -> np.ndarray:
    """Training interactions per item: float32 [I+1]."""
    return np.bincount(data.items[in_training(data)], minlength=data.n_items + 1).astype(np.float32)


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


def title_similarity(
    data: Data,
    samples: np.ndarray,
    cand_nC: np.ndarray,
    L: int = 10,
    decay: float = 0.8,
    chunk: int = 1000,
) -> np.ndarray:
    """TF-IDF cosine of each candidate's title to the history, item j steps ago weighing decay^j:
    float32 (n, C).
    """
    id_IT, weight_IT, V = tfidf(data.titles)
    weight_L = decay ** np.arange(L - 1, -1, -1)
    score_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(samples), chunk):
        old_nL = histories(data, samples[i : i + chunk], L)
        profile = np.zeros((len(old_nL), V), np.float32)
        row = np.arange(len(old_nL))[:, None, None]
        weighted_nLT = weight_IT[old_nL] * weight_L[None, :, None]
        np.add.at(profile, (row, id_IT[old_nL]), weighted_nLT)
        profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-9)
        c = cand_nC[i : i + chunk]
        score_nC[i : i + chunk] = (profile[row, id_IT[c]] * weight_IT[c]).sum(2)
    return score_nC


def cooccurrence(
    data: Data,
    samples: np.ndarray,
    cand_nC: np.ndarray,
    L: int = 10,
    decay: float = 0.8,
    span: int = 5,
    chunk: int = 1000,
) -> np.ndarray:
    """How often each candidate stood within `span` of the history's items in the training part,
    over the root of both counts; item j steps ago weighs decay^j: float32 (n, C).
    """
    I1 = data.n_items + 1
    user = users(data, np.arange(len(data.items)))
    known = in_training(data)
    count = np.bincount(data.items[known], minlength=I1)
    pairs = []
    for d in range(1, span + 1):
        both = known[d:] & (user[d:] == user[:-d])
        a, b = data.items[:-d][both].astype(np.int64), data.items[d:][both].astype(np.int64)
        pairs.append(np.minimum(a, b) * I1 + np.maximum(a, b))
    pair, times = np.unique(np.concatenate(pairs), return_counts=True)
    weight_L = decay ** np.arange(L - 1, -1, -1)
    score_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(samples) if len(pair) else 0, chunk):
        old_nL1 = histories(data, samples[i : i + chunk], L)[:, :, None]
        c_n1C = cand_nC[i : i + chunk][:, None]
        wanted = np.minimum(old_nL1, c_n1C) * I1 + np.maximum(old_nL1, c_n1C)
        at = np.searchsorted(pair, wanted).clip(max=len(pair) - 1)
        times_nLC = np.where((pair[at] == wanted) & (old_nL1 > 0), times[at], 0)
        together_nLC = times_nLC / np.sqrt(np.maximum(count[old_nL1] * count[c_n1C], 1))
        score_nC[i : i + chunk] = (together_nLC * weight_L[None, :, None]).sum(1)
    return score_nC


def standard(x_nC: np.ndarray) -> np.ndarray:
    """Each row to mean 0 and deviation 1, so that scores of different kinds can be added."""
    return (x_nC - x_nC.mean(1, keepdims=True)) / np.maximum(x_nC.std(1, keepdims=True), 1e-9)


WEIGHTS = tuple(np.linspace(0, 1, 21))  # that fusion tries


def fused(a_nC: np.ndarray, b_nC: np.ndarray, w: float) -> np.ndarray:
    """(1-w) a + w b of two rows' scores, each standardised."""
    return (1 - w) * standard(a_nC) + w * standard(b_nC)


def best_weight(
    a_nC: np.ndarray,
    b_nC: np.ndarray,
    is_target_nC: np.ndarray,
    weights: tuple[float, ...] = WEIGHTS,
) -> float:
    """The weight of b with which two rows' fused scores are best (NDCG@10); on validation."""

    def quality(w):
        return metrics(*compare(fused(a_nC, b_nC, w), is_target_nC))["ndcg@10"].mean()

    return float(max(weights, key=quality))
