"""Rows of different lengths in one array, so that many prompts are formed at once.

Row b is flat[ptr[b] : ptr[b + 1]]. What joins, takes or pads rows makes a few arrays for all of
them, and no array a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(eq=False)
class Ragged(Sequence):
    """Rows of different lengths, one behind the other. A row is a view, so it costs no copy."""

    flat: np.ndarray  # int64 (M,)
    ptr: np.ndarray  # int64 (n + 1,): where each row begins, and where the last one ends

    def __len__(self) -> int:
        return len(self.ptr) - 1

    def __getitem__(self, b: int) -> np.ndarray:
        b = range(len(self))[b]
        return self.flat[self.ptr[b] : self.ptr[b + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        edges = self.ptr.tolist()
        return (self.flat[begin:end] for begin, end in zip(edges, edges[1:]))

    @property
    def lengths(self) -> np.ndarray:
        """How long each row is (n,)."""
        return np.diff(self.ptr)

    def take(self, which_n: np.ndarray) -> Ragged:
        """Rows number `which`, in that order."""
        first_n = self.ptr[which_n]
        length_n = self.ptr[which_n + 1] - first_n
        return Ragged(self.flat[spans(first_n, length_n)], pointers(length_n))

    def keep(self, kept_M: np.ndarray) -> Ragged:
        """The same rows with some of their entries only."""
        return Ragged(self.flat[kept_M], pointers(kept_M)[self.ptr])

    def cut(self, begin: int, end: int | None = None) -> Ragged:
        """row[begin:end] of every row."""
        length_n = self.lengths
        begin_n, end_n = (
            np.clip(length_n + x if x < 0 else x, 0, length_n)
            for x in (begin, len(self.flat) if end is None else end)
        )
        cut_n = np.maximum(end_n - begin_n, 0)
        return Ragged(self.flat[spans(self.ptr[:-1] + begin_n, cut_n)], pointers(cut_n))


def pointers(length_n: np.ndarray) -> np.ndarray:
    """Where rows of these lengths begin, and where the last ends: int64 (n + 1,)."""
    return np.concatenate([[0], np.cumsum(length_n)]).astype(np.int64)


def spans(first_n: np.ndarray, length_n: np.ndarray) -> np.ndarray:
    """The places first[i] .. first[i] + length[i] - 1 of every i, one behind the other."""
    ptr = pointers(length_n)
    return np.arange(ptr[-1]) + np.repeat(first_n - ptr[:-1], length_n)


def ragged(rows: Sequence) -> Ragged:
    """Some arrays or lists as one Ragged; a Ragged stays what it is."""
    if isinstance(rows, Ragged):
        return rows
    if not len(rows):
        return Ragged(np.zeros(0, np.int64), np.zeros(1, np.int64))
    flat = np.concatenate([np.asarray(row, np.int64) for row in rows])
    return Ragged(flat, pointers(np.array([len(row) for row in rows])))


def of_matrix(row_nX: np.ndarray) -> Ragged:
    """The rows of a matrix."""
    n, X = row_nX.shape
    return Ragged(row_nX.reshape(-1).astype(np.int64), np.arange(n + 1) * X)


def of_padded(row_nX: np.ndarray) -> Ragged:
    """The rows of a matrix of items without its padding, which is 0."""
    real_nX = row_nX > 0
    return Ragged(row_nX[real_nX].astype(np.int64), pointers(real_nX.sum(1)))


def same(row: Sequence[int], n: int) -> Ragged:
    """The same row n times."""
    return of_matrix(np.broadcast_to(np.asarray(row, np.int64), (n, len(row))))


def beside(*parts: Ragged) -> Ragged:
    """Row b of the first part, then of the second, and so on, for every b."""
    parts = [part for part in parts if len(part.flat)] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    length_Pn = np.stack([part.lengths for part in parts])
    ptr = pointers(length_Pn.sum(0))
    first_Pn = ptr[:-1] + np.cumsum(length_Pn, 0) - length_Pn
    flat = np.empty(ptr[-1], np.int64)
    for part, first_n, length_n in zip(parts, first_Pn, length_Pn):
        flat[spans(first_n, length_n)] = part.flat
    return Ragged(flat, ptr)


def below(*parts: Ragged) -> Ragged:
    """The rows of the first part, then those of the second, and so on."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.flat for part in parts]), pointers(lengths))


def pad(rows: Sequence, value: int = 0) -> np.ndarray:
    """Rows of different lengths as one int64 array (rows, longest), padded on the right."""
    rows = ragged(rows)
    return pad_all(rows.ptr, (rows.flat, value))[0]


def pad_all(ptr: np.ndarray, *flats: tuple[np.ndarray, int]) -> list[np.ndarray]:
    """Arrays (flat, value of its padding) whose rows begin at ptr, each as int64 (rows, longest),
    padded on the right."""
    length_n, padded = np.diff(ptr), []
    shape = (len(length_n), length_n.max())
    at_M = spans(np.arange(shape[0]) * shape[1], length_n)
    for flat, value in flats:
        all_of = np.full(shape[0] * shape[1], value, np.int64)
        all_of[at_M] = flat
        padded.append(all_of.reshape(shape))
    return padded
