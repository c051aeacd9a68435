"""What a recommender answers: plain frozen dataclasses, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
class Names:
    """What items are called, by their numbers; those behind the trained ones were added."""

    ids: list[str]
    titles: list[str]
    trained: int  # items that training saw


class Items(Sequence):
    """The ranked items of an answer, a tuple of Item to whoever looks; each is made when it is
    read. Making them all would take longer than a small model's scores.
    """

    __slots__ = ("log_sum", "names", "numbers", "scores")

    def __init__(
        self, names: Names, numbers: list[int], scores: list[float], log_sum: float | None
    ):
        """log_sum: of the exp of all trained items' scores; None: the run has no probabilities."""
        self.names, self.log_sum = names, log_sum
        self.numbers, self.scores = numbers, scores

    def item(self, number: int, score: float) -> Item:
        """One of them."""
        names, is_new = self.names, number > self.names.trained
        sure = None if self.log_sum is None or is_new else math.exp(score - self.log_sum)
        return Item(names.ids[number], names.titles[number], score, sure, is_new)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, self.numbers, self.scores)

    def __getitem__(self, n: int | slice) -> Item | tuple[Item, ...]:
        if isinstance(n, slice):
            return tuple(map(self.item, self.numbers[n], self.scores[n]))
        return self.item(self.numbers[n], self.scores[n])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Items | tuple) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple:
        return tuple, (tuple(self),)  # a copy elsewhere needs no catalogue


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer about one history."""

    items: Sequence[Item]  # the best first; of score() in the order of the candidates
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
