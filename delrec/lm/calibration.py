"""Calibration: a title's score under an empty history, times a weight chosen on validation, is
subtracted from its score.
"""

from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import candidates
from delrec.lm.ranker import Ranker, reads_all, score_and_rank, score_tails
from delrec.metrics import compare, metrics
from delrec.processes import Ranks

CALIBRATIONS = (0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1)  # weights that are tried


def settled(
    cfg: SimpleNamespace, r: Ranker, which: np.ndarray, score_nC: np.ndarray, ranks: Ranks
) -> tuple[np.ndarray, float]:
    """The scores that --calibrate subtracts from each item (I+1,), and their weight: 0 without it.
    score: of the candidates of the validation samples `which`."""
    if not cfg.calibrate:
        return np.zeros(r.data.n_items + 1, np.float32), 0.0
    neutral_I = neutral_scores(r, ranks)
    return neutral_I, calibrate(r, which, score_nC, neutral_I, ranks)


def neutral_scores(
    r: Ranker, ranks: Ranks, items: np.ndarray | None = None, chunk: int = 60
) -> np.ndarray:
    """Each title's score under the same prompt with no history and no candidates: float32 (I+1,),
    which calibration subtracts. items: those that are asked for, 0 for others; None: all."""
    if r.verbalizer == "letter":
        # a letter says nothing about an item
        return np.zeros(r.data.n_items + 1, np.float32)
    name = "neutral prompt" if items is None else None
    items = np.arange(1, r.data.n_items + 1) if items is None else items
    # np.resize repeats the first items in the last block
    blocks = np.resize(items, (-(-len(items) // chunk), chunk))
    tails = [r.prompts.history([])[0]] * len(blocks)
    scores = np.zeros(r.data.n_items + 1, np.float32)
    scores[blocks] = score_tails(r, tails, blocks, ranks, name)
    return scores


def calibrate(
    r: Ranker, which: np.ndarray, score_nC: np.ndarray, neutral_I: np.ndarray, ranks: Ranks
) -> float:
    """The weight w of the neutral score with which score - w * neutral is best on validation
    samples `which`: by NDCG@10 over all items where the LM reads them all at once, else among the
    candidates, whose scores are given."""
    C = score_nC.shape[1]
    if not reads_all(r):
        target_n = r.data.items[r.data.val[which]]
        return calibrate_among(score_nC, candidates(r.data, "val", C, which), neutral_I, target_n)
    penalty_WI = np.outer(CALIBRATIONS, neutral_I).astype(np.float32)
    _, full_Wn2, _ = score_and_rank(r, "val", which, C, ranks, penalty_WI, "calibrate")
    return best_calibration([full_n2.T for full_n2 in full_Wn2])


def calibrate_among(
    score_nC: np.ndarray, cand_nC: np.ndarray, neutral_I: np.ndarray, target_n: np.ndarray
) -> float:
    """The weight w with which score - w * neutral is best among candidates."""
    is_target_nC = cand_nC == target_n[:, None]
    left = [score_nC - w * neutral_I[cand_nC] for w in CALIBRATIONS]
    return best_calibration([compare(left_nC, is_target_nC) for left_nC in left])


def best_calibration(places: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The weight with the best NDCG@10, the smaller of equal ones. places: (greater, equal) of the
    targets with each of CALIBRATIONS."""
    gains = [metrics(*greater_and_equal)["ndcg@10"].mean() for greater_and_equal in places]
    return float(CALIBRATIONS[int(np.argmax(gains))])
