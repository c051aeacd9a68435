"""Items without a history: vectors from their titles' words, by a map fitted on the trained items.

Ridge regression: with X the bags of words of the trained items' titles and Y their rows of a table
(item vectors, and biases where a model has them), W is the least |X W - Y|^2 + r |W|^2, and a new
title x has the row mean(Y) + x W. Conjugate gradients solve it: X is sparse, and stays so.

What titles leave open is known, too. With W of one half of the trained items, the residuals of the
other half have a covariance S. An item whose row is y + e, e ~ N(0, S), has in a softmax on average
the weight E exp(u . (y + e)) = exp(u . y + u' S u / 2), u = (x, 1) the state of a history: so its
score is u . y + u' S u / 2 (ours). By u . y alone it stands too low.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from delrec.data.counts import seen_in_training
from delrec.data.prepared import Data
from delrec.data.words import Words

# r, where a title has norm 1; 3 tells a little more of the vectors of items that were left out, and
# finds fewer of these items (docs/serving.md)
RIDGE = 1.0
STEPS = 60  # of conjugate gradients, at most
CLOSE = 1e-4  # share of the first residual at which they end


class TitleMap:
    """From titles to rows of any table of the trained items."""

    def __init__(self, data: Data):
        self.items = seen_in_training(data)
        titles = [data.titles[i] for i in self.items]
        self.words = Words(titles)
        self.X = sparse_bags(self.words, titles)
        self.fitted: dict[str, torch.Tensor] = {}  # W by the table it was fitted to
        self.left: dict[str, np.ndarray] = {}  # S, likewise

    def rows_of(self, table: np.ndarray, titles: list[str]) -> np.ndarray:
        """Rows float32 (A, X) of titles in a table (I+1, X) of the trained items."""
        Y, name = self.own_rows(table)
        mean = Y.mean(0)
        if name not in self.fitted:
            self.fitted[name] = ridge(self.X, Y - mean)
        return (mean + torch.sparse.mm(sparse_bags(self.words, titles), self.fitted[name])).numpy()

    def doubt(self, table: np.ndarray) -> np.ndarray:
        """S float32 (X, X): the covariance of what titles do not tell of rows of a table."""
        Y, name = self.own_rows(table)
        if name not in self.left:
            half = torch.arange(len(Y)) % 2 == 0
            squares = (left.T @ left for left in (self.residuals(Y, of) for of in (half, ~half)))
            self.left[name] = (sum(squares) / len(Y)).numpy()
        return self.left[name]

    def residuals(self, Y: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
        """What the map of the items `fitted` (a mask) leaves of the rows of the others."""
        mean, rest = Y[fitted].mean(0), torch.where(~fitted)[0]
        W = ridge(self.X.index_select(0, torch.where(fitted)[0]), Y[fitted] - mean)
        return Y[rest] - mean - torch.sparse.mm(self.X.index_select(0, rest), W)

    def own_rows(self, table: np.ndarray) -> tuple[torch.Tensor, str]:
        """(the rows of the trained items, their digest)."""
        Y = np.ascontiguousarray(table[self.items], np.float32)
        return torch.from_numpy(Y), hashlib.sha256(Y.data).hexdigest()


@dataclass(frozen=True)
class Unseen:
    """Items that training never saw, by their titles."""

    map: TitleMap
    titles: list[str]

    def rows(self, table: np.ndarray) -> np.ndarray:
        """Their rows (A, X) of a table (I+1, X) of the trained items."""
        return self.map.rows_of(table, self.titles)

    def doubt(self, table: np.ndarray) -> np.ndarray:
        """S (X, X), the covariance of what these rows leave open."""
        return self.map.doubt(table)


def sparse_bags(words: Words, titles: list[str]) -> torch.Tensor:
    """The words of titles, weighted, sparse fp32 (n, V)."""
    id_nT, weight_nT = words.bags(titles)
    row, column = np.nonzero(weight_nT)
    at = torch.from_numpy(np.stack([row, id_nT[row, column]]))
    weights = torch.from_numpy(weight_nT[row, column])
    shape = (len(titles), max(len(words), 1))
    return torch.sparse_coo_tensor(at, weights, shape, check_invariants=False).coalesce()


def ridge(X: torch.Tensor, Y: torch.Tensor, r: float = RIDGE) -> torch.Tensor:
    """W (V, E), the least |X W - Y|^2 + r |W|^2: conjugate gradients, each column on its own. X:
    sparse (n, V); Y: (n, E).
    """
    Xt = X.t().coalesce()
    W = torch.zeros(X.shape[1], Y.shape[1])
    left = torch.sparse.mm(Xt, Y)  # the residual of (X'X + r) W = X'Y
    way, square_E = left.clone(), (left * left).sum(0)
    enough_E = square_E * CLOSE**2
    for _ in range(STEPS):
        if (square_E <= enough_E).all():
            break
        moved = torch.sparse.mm(Xt, torch.sparse.mm(X, way)) + r * way
        step_E = square_E / (way * moved).sum(0).clamp(min=1e-30)
        W += step_E * way
        left -= step_E * moved
        now_E = (left * left).sum(0)
        way = left + now_E / square_E.clamp(min=1e-30) * way
        square_E = now_E
    return W
