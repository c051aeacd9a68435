"""Co-occurrence and title similarity, which need no training, as scores of all items beside those
of a model: of training samples out of fold.

Names: N reads, I items, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from delrec.data.counts import Neighbours, near_in_training, neighbours_of, scores_of_catalogue
from delrec.data.prepared import Data, histories, users
from delrec.data.words import Words

LAST = 10  # items of a history that they know, as in tables
# z of a count is at most so much among all items, as far as the best of a trained model's scores
# stands out. Among 15 candidates none can exceed sqrt(14) = 3.7
FARTHEST = 4.0


def standard(x_NS: torch.Tensor, farthest: float = math.inf) -> torch.Tensor:
    """z of each row, (x - mean) / sd, at most `farthest`."""
    sd_N1 = x_NS.std(1, keepdim=True, correction=0).clamp(min=1e-9)
    return ((x_NS - x_NS.mean(1, keepdim=True)) / sd_N1).clamp(max=farthest)


@dataclass
class Counted:
    """Co-occurrence with the last items of a history, counted without the users of a sample's
    fold."""

    data: Data
    fold_U: np.ndarray
    near_K: list[Neighbours]  # of each fold
    device: torch.device
    farthest: float = FARTHEST

    def scores(self, place_N: np.ndarray) -> torch.Tensor:
        """y (N, I): as the row of tables scores candidates (data/counts.py)."""
        old_NL = histories(self.data, place_N, LAST)
        y_NI = np.empty((len(place_N), self.data.n_items + 1), np.float32)
        for fold, own in by_fold(self.fold_U[users(self.data, place_N)]):
            y_NI[own] = scores_of_catalogue(self.near_K[fold], old_NL[own])
        return torch.from_numpy(y_NI[:, 1:]).to(self.device)


def by_fold(fold_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each fold that occurs, and the rows that are of it."""
    for fold in np.unique(fold_N):
        yield int(fold), np.flatnonzero(fold_N == fold)


def counted(data: Data, fold_U: np.ndarray, device: torch.device) -> Counted:
    """What is counted of the users' folds."""
    fold_n = fold_U[users(data, data.train)]
    others = [replace(data, train=data.train[fold_n != f]) for f in range(int(fold_U.max()) + 1)]
    return Counted(data, fold_U, [neighbours_of(near_in_training(d)) for d in others], device)


def sparse_bags(words: Words, titles: Sequence[str]) -> torch.Tensor:
    """The words of titles, weighted, sparse fp32 (n, V)."""
    id_nT, weight_nT = words.bags(titles)
    row, column = np.nonzero(weight_nT)
    at = torch.from_numpy(np.stack([row, id_nT[row, column]]))
    weights = torch.from_numpy(weight_nT[row, column])
    shape = (len(titles), max(len(words), 1))
    return torch.sparse_coo_tensor(at, weights, shape, check_invariants=False).coalesce()
