"""The similarity of titles, a floor that every table holds beside those that are counted
(data/counts.py), and the fusion of two rows.
"""

import numpy as np

from delrec.data.counts import CHUNK, weights_of
from delrec.data.prepared import Data
from delrec.data.words import tfidf
from delrec.metrics import compare, metrics


def similarity_to(data: Data, old_nL: np.ndarray, cand_nC: np.ndarray) -> np.ndarray:
    """TF-IDF cosine (n, C) of each candidate's title to a history, padded on the left with 0; the
    item j steps ago weighs DECAY^j.
    """
    id_IT, weight_IT, V = tfidf(data.titles)
    weight_L = weights_of(old_nL.shape[1])
    score_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(old_nL), CHUNK):
        old, c = old_nL[i : i + CHUNK], cand_nC[i : i + CHUNK]
        profile = np.zeros((len(old), V), np.float32)
        row = np.arange(len(old))[:, None, None]
        weighted_nLT = weight_IT[old] * weight_L[None, :, None]
        np.add.at(profile, (row, id_IT[old]), weighted_nLT)
        profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-9)
        score_nC[i : i + CHUNK] = (profile[row, id_IT[c]] * weight_IT[c]).sum(2)
    return score_nC


def standard(x_nC: np.ndarray) -> np.ndarray:
    """Each row to mean 0 and deviation 1, so that scores of different kinds can be added."""
    return (x_nC - x_nC.mean(1, keepdims=True)) / np.maximum(x_nC.std(1, keepdims=True), 1e-9)


WEIGHTS = tuple(np.linspace(0, 1, 21))  # that fusion tries


def fused(a_nC: np.ndarray, b_nC: np.ndarray, w: float) -> np.ndarray:
    """(1-w) a + w b of two rows' scores, each standardised."""
    return (1 - w) * standard(a_nC) + w * standard(b_nC)


def best_weight(a_nC: np.ndarray, b_nC: np.ndarray, is_target_nC: np.ndarray) -> float:
    """The weight of b with which two rows' fused scores are best (NDCG@10); on validation."""

    def quality(w):
        return metrics(*compare(fused(a_nC, b_nC, w), is_target_nC))["ndcg@10"].mean()

    return float(max(WEIGHTS, key=quality))
