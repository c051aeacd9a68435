"""What a recommender answers: plain frozen dataclasses, and tables of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from delrec.serving.lookup import Unknown

if TYPE_CHECKING:
    import polars as pl


class Refused(ValueError):
    """A question that cannot be answered: one sentence with what was found, what was expected and
    what to do.
    """


@dataclass(frozen=True, slots=True)
class Item:
    """A ranked item."""

    id: str  # as the log and items.csv have it
    title: str
    score: float  # the run's own; in a popular list how often it was taken (shared: its place)
    probability: float | None  # of being the next, among all trained items; None: the run has none
    is_new: bool  # was it added, without a history?


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer about one history."""

    items: tuple[Item, ...]  # the best first; of score() in the order of the candidates
    history: tuple[str, ...]  # the ids that the history was read as, oldest first
    unknown: tuple[Unknown, ...]  # names that nobody has, left out; str(..) says what is near
    remarks: tuple[str, ...]  # sentences about names that several items have
    short: str | None  # why there are fewer items than were asked for, as a sentence
    popular: bool  # no item of the history is known: the items that most people took
    user: str | None  # whose history it is, where a user was named

    @property
    def ids(self) -> list[str]:
        """The ids of the items."""
        return [item.id for item in self.items]

    @property
    def titles(self) -> list[str]:
        """The titles of the items."""
        return [item.title for item in self.items]

    @property
    def new(self) -> list[str]:
        """The ids of the items that have no history: they were added."""
        return [item.id for item in self.items if item.is_new]

    def to_polars(self) -> pl.DataFrame:
        """A table with a row an item."""
        return table_of([self])


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers about several histories, in their order."""

    answers: tuple[Answer, ...]

    def __len__(self) -> int:
        return len(self.answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self.answers)

    def __getitem__(self, n: int) -> Answer:
        return self.answers[n]

    def to_polars(self) -> pl.DataFrame:
        """A table with a row an item of an answer; `question` counts the histories from 0."""
        return table_of(self.answers)


def table_of(answers: list[Answer] | tuple[Answer, ...]) -> pl.DataFrame:
    """A table with a row an item of an answer."""
    import polars as pl

    rows = [
        (n, a.user, rank, x.id, x.title, x.score, x.probability, x.is_new, a.popular)
        for n, a in enumerate(answers)
        for rank, x in enumerate(a.items, 1)
    ]
    types = {
        "question": pl.Int64,
        "user": pl.String,
        "rank": pl.Int64,
        "id": pl.String,
        "title": pl.String,
        "score": pl.Float64,
        "probability": pl.Float64,
        "is_new": pl.Boolean,
        "popular": pl.Boolean,
    }
    return pl.DataFrame(rows, types, orient="row")
