"""Items that a service adds: vectors from their titles' words, by the map of the trained items
(delrec/backbone/by_title.py).
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from delrec.backbone.by_title import left_open, ridge
from delrec.data.counts import seen_in_training
from delrec.data.prepared import Data
from delrec.data.words import Words
from delrec.lm.counted import sparse_bags


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
            self.left[name] = left_open(self.X, Y).numpy()
        return self.left[name]

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
