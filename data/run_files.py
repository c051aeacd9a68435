"""What a run's folder says of the samples of a split: scores, lists, ranks in the whole catalogue.

Any model may have written them (docs/run_folder.md), so whoever reads them gets numbers that can
be meant, or a sentence that names the first row that cannot.

n samples, C candidates, h items of a list, I items (ids 1..I, 0 where a list has no more).
"""

from pathlib import Path

import numpy as np

from delrec.data.prepared import Data
from delrec.runtime import read_npy, stop

KINDS = {"iu": "whole numbers (int32)", "iuf": "numbers (float32)"}  # of numpy's dtypes


def scores_in(path: Path, data: Data, split: str, C: int) -> np.ndarray:
    """The scores (n, C) in a file of a run, NaN where nobody asked."""
    return of_kind("iuf", path, (len(getattr(data, split)), C))


def finite_scores(path: Path, data: Data, split: str, C: int, which: np.ndarray) -> np.ndarray:
    """The scores (m, C) of the samples `which` in a file of a run; one that is no number stops."""
    score_nC = scores_in(path, data, split, C)
    must_be_finite(score_nC, path, which)
    return np.asarray(score_nC[which])


def must_be_finite(
    score_nC: np.ndarray, path: Path, which: np.ndarray, again: str = "write the file again"
) -> None:
    """Stops where a score of the samples `which` is NaN or infinite. score_nC: all rows of the file
    at `path`; again: what to do then."""
    bad_mC = ~np.isfinite(score_nC[which])
    if bad_mC.any():
        row, place = np.argwhere(bad_mC)[0]
        more = bad_mC.any(1).sum() - 1
        others = f" (and such in {more} other rows)" if more else ""
        stop(
            f"{path} holds {score_nC[which[row], place]} in row {which[row]}, for candidate "
            f"{place}{others}, expected a finite score of every candidate (for one that is left "
            f"out a number below the others); {again}"
        )


def lists_in(
    path: Path, data: Data, split: str, which: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """The items (n, h) of the samples `which` in a file of a run, best first, zeros behind the last
    one."""
    n = len(getattr(data, split))
    list_nh = of_kind("iu", path, (n, None))[which]
    outside_nh = (list_nh < 0) | (list_nh > data.n_items)
    outside_nh[:, 1:] |= (list_nh[:, 1:] != 0) & (list_nh[:, :-1] == 0)
    if outside_nh.any():
        row = np.flatnonzero(outside_nh.any(1))[0]
        item, place = list_nh[row, outside_nh[row]][0], np.arange(n)[which][row]
        stop(
            f"{path} lists item {item} in row {place}, expected ids of 1 to {data.n_items} (their "
            "numbers in the prepared folder), and 0 only behind the last one; write the file again"
        )
    return list_nh


def ranks_in(path: Path, data: Data, split: str) -> np.ndarray:
    """How many items stand above each target, and how many level with it, in a file of a run:
    int64 (n, 2), -1 and -1 where nobody asked."""
    rank_n2 = of_kind("iu", path, (len(getattr(data, split)), 2)).astype(np.int64)
    others = data.n_items - 1
    wrong_n = (rank_n2 < 0).any(1) | (rank_n2 > others).any(1) | (rank_n2.sum(1) > others)
    wrong_n &= (rank_n2 != -1).any(1)
    if wrong_n.any():
        row = np.flatnonzero(wrong_n)[0]
        above, level = rank_n2[row]
        stop(
            f"{path} says in row {row} that {above} items are above the target and {level} level "
            f"with it, expected two counts among the {others} others, or -1 and -1 where nobody "
            "asked; write the file again"
        )
    return rank_n2


def of_kind(kinds: str, path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """The array in a file, whose dtype must be one of some kinds."""
    array = read_npy(path, shape)
    if array.dtype.kind not in kinds:
        stop(
            f"{path} holds values of type {array.dtype}, expected {KINDS[kinds]}; write the file "
            "again"
        )
    return array
