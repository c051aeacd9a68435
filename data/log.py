"""A log as it was read: what every reader gives and data/rules.py takes."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

Ids = pl.Series | list[str]  # raw ids: Strings of polars, or a list


@dataclass
class Rows:
    """The interactions of a log, in the order they were read."""

    user: pl.Series  # raw ids, String
    item: pl.Series  # raw ids, String
    when: np.ndarray  # int64: a time or a position
    timed: bool  # is it a time?
    part: np.ndarray | None = None  # int8: 0, 1, 2 for train, val, test where the files say it


@dataclass
class ItemColumns:
    """What is known of items beside their titles; they are filtered by it."""

    item: pl.Series  # raw ids, String
    cells: pl.DataFrame  # a row for each, a column for each further column, text


@dataclass
class Log:
    """Interactions, titles, and where they come from."""

    rows: Rows  # one interaction each
    titles: dict[str, str]  # raw item id -> title as it was read
    source: str  # where the log comes from, in words
    raw_sha256: dict[str, str]  # name of a file that was read -> its digest
    notes: list[str] = field(default_factory=list)  # lines about rows left out
    columns: ItemColumns | None = None  # None: nothing beside titles


def rows_of(user: Ids, item: Ids, when: np.ndarray | list[int], timed: bool = True) -> Rows:
    """Rows of raw ids (lists or polars Strings) and of times or positions, in any container."""
    return Rows(ids_of(user), ids_of(item), np.asarray(when, np.int64), timed)


def ids_of(ids: Ids) -> pl.Series:
    """Raw ids as polars Strings."""
    return ids if isinstance(ids, pl.Series) else pl.Series(ids, dtype=pl.String)


def sha256(data: bytes) -> str:
    """The digest of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digests(*paths: Path) -> dict[str, str]:
    """{name: sha256} of files, read a piece at a time."""
    found = {}
    for path in paths:
        with open(path, "rb") as f:
            found[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return found
