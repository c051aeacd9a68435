"""The similarity of titles, a floor that every table holds beside those that are counted
(data/counts.py), and the fusion of two rows, whose weight is chosen on validation.
"""

import numpy as np

from delrec.data.counts import CHUNK, weights_of
from delrec.data.prepared import Data, halves_of_validation, subset
from delrec.data.words import tfidf
from delrec.metrics import compare, metrics
from delrec.runtime import stop

Bags = tuple[np.ndarray, np.ndarray, int]  # titles as words: what words.tfidf gives


def similarity_to(
    data: Data, old_nL: np.ndarray, cand_nC: np.ndarray, titles: Bags | None = None
) -> np.ndarray:
    """TF-IDF cosine (n, C) of each candidate's title to a history, padded on the left with 0; the
    item j steps before the last weighs DECAY^j. titles: what words.tfidf gives of the data's; None:
    it is asked.
    """
    titles = titles or tfidf(data.titles)
    id_IT, weight_IT, _ = titles
    score_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(old_nL), CHUNK):
        profile, c = profiles(titles, old_nL[i : i + CHUNK]), cand_nC[i : i + CHUNK]
        row = np.arange(len(c))[:, None, None]
        score_nC[i : i + CHUNK] = (profile[row, id_IT[c]] * weight_IT[c]).sum(2)
    return score_nC


def profiles(titles: Bags, old_nL: np.ndarray) -> np.ndarray:
    """The words of histories, padded on the left with 0, each of norm 1: float32 (n, V). titles: of
    the items 0..I.
    """
    id_IT, weight_IT, V = titles
    profile = np.zeros((len(old_nL), V), np.float32)
    row = np.arange(len(old_nL))[:, None, None]
    weighted_nLT = weight_IT[old_nL] * weights_of(old_nL.shape[1])[None, :, None]
    np.add.at(profile, (row, id_IT[old_nL]), weighted_nLT)
    return profile / np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-9)


def standard(x_nC: np.ndarray) -> np.ndarray:
    """Each row to mean 0 and deviation 1, so that scores of different kinds can be added."""
    return (x_nC - x_nC.mean(1, keepdims=True)) / np.maximum(x_nC.std(1, keepdims=True), 1e-9)


WEIGHTS = tuple(np.linspace(0, 1, 21))  # that fusion tries


def fused(a_nC: np.ndarray, b_nC: np.ndarray, w: float) -> np.ndarray:
    """(1-w) a + w b of two rows' scores, each standardised."""
    return (1 - w) * standard(a_nC) + w * standard(b_nC)


def places_for_fusion(data: Data, limit: int) -> np.ndarray:
    """Places in the validation split on which weights of fusion are chosen: of its second half, at
    most `limit` (0: all), the same ones for every run.
    """
    _, second = halves_of_validation(data)
    if not len(second):
        stop(
            f"{data.folder}: all {len(data.val)} validation samples are one user's, but weights of "
            "fusion are chosen on users that no run was chosen on; prepare it with more users"
        )
    return second[subset(len(second), limit, 0)]


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
