"""Items that training never saw, as models ask for them (made in delrec/serving/new_items.py)."""

from typing import Protocol

import numpy as np


class Unseen(Protocol):
    """A items that training never saw, as rows of any table of the trained ones."""

    def rows(self, table: np.ndarray, /) -> np.ndarray:
        """Their rows float32 (A, X) of a table (I+1, X)."""

    def doubt(self, table: np.ndarray, /) -> np.ndarray:
        """The covariance float32 (X, X) of what is not known of these rows."""
