"""HR, NDCG, MRR of one target among C candidates or all items (ties count as every order they could
fall in).
"""

import numpy as np

from delrec.runtime import stop


def compare(score_BC: np.ndarray, target_BC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(greater, equal), each (B,): how many others score above the target, and exactly as it does.
    target_BC is a 0/1 mask with one 1 a row.
    """
    if not np.isfinite(score_BC).all():
        stop("scores hold a value that is not finite; nothing can be ranked by them")
    own = (score_BC * target_BC).sum(1, keepdims=True)
    return (score_BC > own).sum(1), (score_BC == own).sum(1) - 1


def metrics(
    greater: np.ndarray | list[int], equal: np.ndarray | list[int], ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """HR@k, NDCG@k, MRR and rank of each sample: {name: (n,)}. greater, equal: of compare, (n,).

    A tie of e+1 items fills the ranks greater+1 .. greater+e+1; the value is the mean over those
    ranks, so constant scores give HR@1 = 1/C. rank = 1 + greater + equal/2, the mean of the same
    ranks.
    """
    greater, equal = np.asarray(greater, np.int64), np.asarray(equal, np.int64)
    top = int((greater + equal).max(initial=0)) + 2
    place = np.arange(1, top + 1)

    def mean(gain):
        return (
            np.concatenate([[0], np.cumsum(gain)])[greater + equal + 1]
            - np.concatenate([[0], np.cumsum(gain)])[greater]
        ) / (equal + 1)

    out = {f"hr@{k}": mean((place <= k).astype(float)) for k in ks}
    out |= {f"ndcg@{k}": mean((place <= k) / np.log2(place + 1)) for k in ks if k > 1}
    return out | {"mrr": mean(1 / place), "rank": 1 + greater + equal / 2}


def chance(C: int, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """The metrics of constant scores over C candidates."""
    return {m: float(v[0]) for m, v in metrics([0], [C - 1], ks).items()}


# ---------------------------------------------------------------- how near two rankings are


def kendall(a_nC: np.ndarray, b_nC: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of each row of two scores (n, C): 1 the same order, 0 no relation, -1 the
    reverse; pairs tied in one count for half its weight.
    """
    i, j = np.triu_indices(a_nC.shape[1], 1)
    x, y = np.sign(a_nC[:, i] - a_nC[:, j]), np.sign(b_nC[:, i] - b_nC[:, j])
    return (x * y).sum(1) / np.maximum(np.sqrt((x != 0).sum(1) * (y != 0).sum(1)), 1)


def agreement(a_nC: np.ndarray, b_nC: np.ndarray) -> np.ndarray:
    """How far two scores agree on the first place (n,): 1 if both name the same one candidate, less
    where first places are tied.
    """

    def first(score_nC):
        is_first_nC = score_nC == score_nC.max(1, keepdims=True)
        return is_first_nC / is_first_nC.sum(1, keepdims=True)

    return np.minimum(first(a_nC), first(b_nC)).sum(1)
