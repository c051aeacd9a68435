"""Co-occurrence and title similarity, which need no training, as scores of all items beside those
of a model: of training samples out of fold, and with finetune.py --residual-counts as the tables'
fused rows have them.

    f = y, then for x = co-occurrence, x = title similarity:  f <- f + g_x sd(f) z_x
    z_x = (x - mean(x)) / sd(x)

y are a backbone's scores after a history. mean and sd are over the items that are asked: among
candidates f ranks as two rows of evaluate.py --fuse do, one behind the other, at the weights
w = g / (1 + g). Among 15 candidates no z is above sqrt(14) = 3.7. Among all items nearly all counts
are 0, the few others stand up to sqrt(I) out, and f would be one of them whatever y says: there z
is at most 4.

Names: N reads, B histories, S items asked, C candidates, I items, A added items, V words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.counts import (
    Near,
    Neighbours,
    near_in_training,
    neighbours_of,
    scores_of_catalogue,
    together,
)
from delrec.data.floors import (
    WEIGHTS,
    Bags,
    best_weight,
    fused,
    places_for_fusion,
    profiles,
    similarity_to,
)
from delrec.data.prepared import Data, candidates, histories, users
from delrec.data.words import Words

MAP = "counts"  # the name of (g of co-occurrence, g of title similarity) among the maps
LAST = 10  # items of a history that they know, as in tables
FARTHEST = 4.0  # what z is at most among all items
ROWS = 512  # histories of a block
# of the late fusion, that are tried: at 1 nothing would be left of what was there before
FUSED = WEIGHTS[:-1]


def standard(
    x_NS: torch.Tensor, farthest: float = math.inf, trained: int | None = None
) -> torch.Tensor:
    """z of each row, at most `farthest`; mean and sd of its first `trained` items (None: all)."""
    own_NS = x_NS[:, :trained].contiguous()  # summed in one order, whatever stands behind them
    sd_N1 = own_NS.std(1, keepdim=True, correction=0).clamp(min=1e-9)
    return ((x_NS - own_NS.mean(1, keepdim=True)) / sd_N1).clamp(max=farthest)


def beside(
    y_NS: torch.Tensor, z_xNS: Sequence[torch.Tensor], g_x: torch.Tensor, trained: int | None = None
) -> torch.Tensor:
    """f (N, S). g: a number for each z; trained: as of standard."""
    for g, z_NS in zip(g_x, z_xNS):
        # a row of equal scores, as --residual-dropout leaves, has no slope of its sd
        own_NS = y_NS[:, :trained].contiguous()
        var_N1 = own_NS.var(1, keepdim=True, correction=0).clamp(min=1e-12)
        y_NS = y_NS + g * var_N1.sqrt() * z_NS
    return y_NS


def weights(g_x: Sequence[float] = (0.0, 0.0)) -> torch.nn.Linear:
    """(g of co-occurrence, g of title similarity) as a map."""
    own = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        own.weight.copy_(torch.tensor([list(g_x)]))
    return own


# ---------------------------------------------------------------- out of fold


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


# ---------------------------------------------------------------- after any history


@dataclass
class Counts:
    """Co-occurrence in the whole training part, and title similarity."""

    data: Data
    near: Near
    neighbours: Neighbours
    titles: Titles  # of the items 0..I, and behind them those added
    device: torch.device
    out_of_fold: Counted | None = None  # of training samples, while the run trains

    def of_all(self, olds: list[np.ndarray]) -> list[torch.Tensor]:
        """z (B, I+A) of both, of every item after histories, oldest first."""
        old_BL, last = padded(olds), self.data.n_items
        alike_BI = self.titles.alike(old_BL)
        # what was added never stood beside anything
        known_BL = np.where(old_BL <= last, old_BL, 0)
        count_BI = torch.from_numpy(scores_of_catalogue(self.neighbours, known_BL)[:, 1:])
        count_BI = F.pad(count_BI, (0, alike_BI.shape[1] - last))
        return [self.standard(count_BI), self.standard(alike_BI)]

    def of_reads(self, place_N: np.ndarray) -> list[torch.Tensor]:
        """z (N, I) of both at training targets, by their places in data.items; counts out of
        fold."""
        blocks = [place_N[i : i + ROWS] for i in range(0, len(place_N), ROWS)]
        counts = [self.standard(self.out_of_fold.scores(place)) for place in blocks]
        olds = [histories(self.data, place, LAST) for place in blocks]
        alike = [self.standard(self.titles.alike(old_NL)) for old_NL in olds]
        return [torch.cat(counts), torch.cat(alike)]

    def of_candidates(self, olds: list[np.ndarray], cand_BC: np.ndarray) -> list[np.ndarray]:
        """Both scores (B, C) of candidates after histories, as the tables' rows have them."""
        old_BL = padded(olds)
        alike_BC = similarity_to(self.data, old_BL, cand_BC, titles=self.titles.bags)
        return [together(self.near, old_BL, cand_BC), alike_BC]

    def beside_all(
        self, y_BI: torch.Tensor, olds: list[np.ndarray], g_x: torch.Tensor
    ) -> torch.Tensor:
        """f (B, I+A+1) of all items after histories; y: the scores there are."""
        f_BI = beside(y_BI[:, 1:], self.of_all(olds), g_x, self.data.n_items)
        return torch.cat([y_BI[:, :1], f_BI], 1)

    def beside_candidates(
        self, y_BC: torch.Tensor, olds: list[np.ndarray], cand_BC: np.ndarray, g_x: torch.Tensor
    ) -> torch.Tensor:
        """f (B, C) of candidates after histories; y: the scores there are."""
        both = [torch.from_numpy(x) for x in self.of_candidates(olds, cand_BC)]
        return beside(y_BC, [standard(x.to(y_BC.device)) for x in both], g_x)

    def standard(self, x_BI: torch.Tensor) -> torch.Tensor:
        """z of all items; that of the trained ones is the same without the added ones."""
        return standard(x_BI.to(self.device), FARTHEST, self.data.n_items)

    def with_titles(self, titles: list[str]) -> Counts:
        """The same with items behind the trained ones."""
        return replace(self, titles=titles_of(self.data, titles))


@dataclass
class Titles:
    """Titles as words."""

    bags: Bags  # as words.tfidf has them
    weight_IV: torch.Tensor  # the same, sparse

    def alike(self, old_BL: np.ndarray) -> torch.Tensor:
        """The similarity (B, I+A) of all items' titles to histories."""
        profile_VB = torch.from_numpy(profiles(self.bags, old_BL)).T.contiguous()
        return (self.weight_IV @ profile_VB)[1:].T


def titles_of(data: Data, added: Sequence[str] = ()) -> Titles:
    """The titles of the trained items, and of some added ones, whose words weigh what they do
    without them."""
    words, titles = Words(data.titles), [*data.titles, *added]
    return Titles((*words.bags(titles), len(words)), sparse_bags(words, titles))


def sparse_bags(words: Words, titles: Sequence[str]) -> torch.Tensor:
    """The words of titles, weighted, sparse fp32 (n, V)."""
    id_nT, weight_nT = words.bags(titles)
    row, column = np.nonzero(weight_nT)
    at = torch.from_numpy(np.stack([row, id_nT[row, column]]))
    weights = torch.from_numpy(weight_nT[row, column])
    shape = (len(titles), max(len(words), 1))
    return torch.sparse_coo_tensor(at, weights, shape, check_invariants=False).coalesce()


def padded(olds: Sequence[np.ndarray]) -> np.ndarray:
    """The last items of histories, oldest first, padded on the left with 0: int64 (B, LAST)."""
    old_BL = np.zeros((len(olds), LAST), np.int64)
    for row_L, old in zip(old_BL, olds):
        tail = old[-LAST:]
        row_L[LAST - len(tail) :] = tail
    return old_BL


def counts_of(data: Data, device: torch.device, fold_U: np.ndarray | None = None) -> Counts:
    """Both of a log. fold_U: the fold of each user, for a run that trains."""
    near = near_in_training(data)
    own = None if fold_U is None else counted(data, fold_U, device)
    return Counts(data, near, neighbours_of(near), titles_of(data), device, own)


class Scores(Protocol):
    """A model's scores after any history, as residual.Residual has them."""

    history: int  # items of a history that are seen

    def scores(self, olds: list[np.ndarray], /) -> torch.Tensor:
        """y (B, I+1) after histories, oldest first."""


def first_weights(counts: Counts, model: Scores, cfg: SimpleNamespace) -> torch.nn.Linear:
    """The map of the weights at which validation fuses a model with co-occurrence, and then both
    with title similarity, as evaluate.py --fuse chooses them. cfg: val_samples, C."""
    data = counts.data
    which = places_for_fusion(data, cfg.val_samples)
    samples, cand_nC = data.val[which], candidates(data, "val", cfg.C, which)
    olds = [old[old > 0] for old in histories(data, samples, model.history)]
    y_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(olds), ROWS):
        y_BI = model.scores(olds[i : i + ROWS]).float().cpu().numpy()
        y_nC[i : i + ROWS] = np.take_along_axis(y_BI, cand_nC[i : i + ROWS], 1)
    found = []
    for x_nC in counts.of_candidates(olds, cand_nC):
        w = best_weight(y_nC, x_nC, cand_nC == data.items[samples][:, None], FUSED)
        y_nC = fused(y_nC, x_nC, w)
        found.append(w / (1 - w))
    return weights(found)


def said(g_x: torch.Tensor, data: Data, val_samples: int) -> str:
    """What a run begins as, in a line."""
    n = len(places_for_fusion(data, val_samples))
    count, alike = (g_x / (1 + g_x)).tolist()
    return (
        f"it begins as its backbone + co-occurrence (weight {count:.2f}) + title similarity "
        f"({alike:.2f}), chosen on {n} validation samples as evaluate.py --fuse does"
    )
