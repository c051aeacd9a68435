"""A trained run as one object that answers: the API of the package.

    from delrec import Recommender
    rec = Recommender.load("runs/my-shop/sasrec")
    rec.recommend(["Green tea 100 g", "Teapot, small"], top=10)
    rec.recommend(user="4711", only=in_stock, exclude=["sku-7"], where={"category": "tea"})

It answers for every kind of run. Ids and titles are the raw log's. Answers may be asked for by
several threads at once.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import click
import numpy as np

from delrec.data.prepared import load_data, load_data_of
from delrec.processes import Ranks, own_device
from delrec.runtime import Run, load_run
from delrec.serving.asking import Question, questions
from delrec.serving.catalogue import Catalogue, Filters
from delrec.serving.lookup import Unknown
from delrec.serving.ranking import (
    ScoresAfter,
    Wanted,
    best_of,
    has_probabilities,
    log_sums,
    run_scorer,
)
from delrec.serving.results import Answer, Answers, Item, Refused

CELLS = 2**22  # scores that exist at once
MOST = 256  # histories that are scored at once


class Who(TypedDict, total=False):
    """Whose history it is, where no titles are given; each may be a list of histories."""

    ids: Any  # raw ids, oldest first
    user: Any  # a user of the log, with all the items the log has
    users: Any  # several


class Options(Who, total=False):
    """What may be asked beside a history."""

    only: Any  # ids of the items that may be in the answer
    exclude: Any  # ids of items that may not
    where: dict[str, Any]  # {a further column of items.csv: the value, or several}
    keep_seen: bool  # may the items of the history be in it? False


@dataclass(frozen=True)
class Plan:
    """How questions are to be answered."""

    top: int  # items of an answer
    wanted: Wanted  # the items that may be in it
    unknown: list[Unknown]  # names of its filters that nobody has


def in_python(method: Callable) -> Callable:
    """The method, whose refusals are ValueErrors."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except click.ClickException as refused:
            raise Refused(refused.message) from None

    return call


class Recommender:
    """A run that ranks items for histories."""

    def __init__(self, catalogue: Catalogue, open_scorer: Callable[[], ScoresAfter], run: Run):
        """open_scorer: opens the run's model, at the first question; run: its configuration."""
        self.run, self.has_probabilities = run, has_probabilities(run)
        self._catalogue = catalogue
        self._open_scorer, self._scores_after = open_scorer, None
        self._lock = threading.Lock()

    @classmethod
    @in_python
    def load(cls, run: Path | str, *, dataset: str | None = None, pool: int = 100) -> "Recommender":
        """The recommender of a run folder, or of a run's name under runs/; its model is loaded.

        dataset: the prepared data, where they are not where the run says. pool: how many of its
        backbone's best an LM ranks that reads title by title; 0: all items.
        """
        found = load_run(run)
        data = load_data(dataset) if dataset else load_data_of(found)
        load_run(found.folder, data)  # of another data set: refused
        recommender = cls.of_run(found, Catalogue(data), Ranks(0, 1, own_device(0)), pool)
        recommender.open()
        return recommender

    @classmethod
    def of_run(
        cls,
        run: Run,
        catalogue: Catalogue,
        ranks: Ranks,
        pool: int = 100,
        shard: bool = False,
        said: bool = False,
    ) -> "Recommender":
        """The recommender of a run, whose model is loaded at the first question. said: is the
        progress of long answers printed?
        """
        data = catalogue.data
        return cls(catalogue, lambda: run_scorer(run, data, ranks, pool, shard, said), run)

    def open(self) -> ScoresAfter:
        """The run's function of histories (see ranking.py); the model is loaded once."""
        if self._scores_after is None:
            with self._lock:
                if self._scores_after is None:
                    self._scores_after = self._open_scorer()
        return self._scores_after

    @property
    def catalogue(self) -> Catalogue:
        """The items that can be named and ranked."""
        return self._catalogue

    # ------------------------------------------------ answers

    @in_python
    def recommend(
        self, history: Any = None, *, top: int = 10, **options: Unpack[Options]
    ) -> Answer | Answers:
        """The `top` best items for a history, or for each of several: without those of the history
        unless keep_seen, and of those that only, exclude and where allow.

        history: titles (or raw ids), oldest first; or ids=[..] or user=".." or users=[..].
        """
        who = {name: options.pop(name) for name in ("ids", "user", "users") if name in options}
        plan = self.plan(top, **options)
        asked, many = questions(self.catalogue, history, **who)
        answers = tuple(self.answers(asked, plan))
        return Answers(answers) if many else answers[0]

    @in_python
    def score(
        self, history: Any = None, candidates: Any = None, **who: Unpack[Who]
    ) -> Answer | Answers:
        """The scores of candidates (ids or titles) after a history, or after each of several, in
        the order of the candidates; those of the history are scored like others.
        """
        asked, many = questions(self.catalogue, history, **who)
        if candidates is None:
            raise Refused("score() was given no candidates; give ids or titles of the catalogue")
        items, unknown = self.catalogue.named(candidates, "candidates")
        if not items:
            raise Refused("no candidate is known; give ids or titles of the catalogue")
        for question in asked:
            stop_without_history(question)
        wanted = Wanted(self.mask_of(items), keep_seen=True, each=True)
        answers = tuple(
            self.answer(question, self.items_of(np.array(items), s_I, log_sum), unknown)
            for question, s_I, log_sum in self.scored(asked, wanted)
        )
        return Answers(answers) if many else answers[0]

    # ------------------------------------------------ how an answer is made

    def plan(self, top: int = 10, *, keep_seen: bool = False, **filters: Any) -> "Plan":
        """How questions are to be answered; what cannot be meant is refused."""
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
            raise Refused(f"top is {top!r:.60}, expected a whole number of at least 1")
        allowed_I, unknown = self.catalogue.allowed(Filters(**filters))
        return Plan(int(top), Wanted(allowed_I, bool(keep_seen)), unknown)

    def answers(self, asked: list[Question], plan: "Plan") -> Iterator[Answer]:
        """Yields the answer to each question, some at a time; for a history without a known item
        the items that most people took.
        """
        for question, s_I, log_sum in self.scored(asked, plan.wanted):
            items = self.items_of(best_of(s_I, plan.top), s_I, log_sum)
            yield self.answer(question, items, plan.unknown, plan.top)

    def scored(
        self, asked: list[Question], wanted: Wanted
    ) -> Iterator[tuple[Question, np.ndarray, float | None]]:
        """Yields (question, scores (I+1,), log of the sum of exp of all trained items' scores, or
        None where the run has no probabilities), some questions at a time.
        """
        known = [question for question in asked if question.found.items]
        batch = max(1, min(MOST, CELLS // (self.catalogue.n_items + 1)))
        popular = None
        scores = self.scores_of(known, wanted, batch)
        for question in asked:
            if question.found.items:
                yield question, *next(scores)
                continue
            if popular is None:
                count_I = self.catalogue.count_I[None].copy()
                popular = wanted.mask(count_I, [np.zeros(0, np.int64)])[0]
            yield question, popular, None

    def scores_of(
        self, asked: list[Question], wanted: Wanted, batch: int
    ) -> Iterator[tuple[np.ndarray, float | None]]:
        """Yields the scores (I+1,) of questions with a history, and the log of their sum."""
        for at in range(0, len(asked), batch):
            olds = [np.array(q.found.items, np.int64) for q in asked[at : at + batch]]
            s_BI = self.open()(olds, wanted)
            if np.isnan(s_BI.max(1)).any():
                raise Refused(
                    f"the scores of {self.run.folder} are not numbers: its weights are broken; "
                    "train it again"
                )
            log_sums_B = [None] * len(olds)
            if self.has_probabilities:
                log_sums_B = log_sums(s_BI[:, : self.catalogue.data.n_items + 1]).tolist()
            yield from zip(wanted.mask(s_BI, olds), log_sums_B)

    def items_of(
        self, chosen: np.ndarray, s_I: np.ndarray, log_sum: float | None
    ) -> tuple[Item, ...]:
        """Some items with their scores."""
        titles, ids = self.catalogue.lookup.titles, self.catalogue.lookup.ids
        trained = self.catalogue.data.n_items
        found = []
        for i, score in zip(chosen.tolist(), s_I[chosen].tolist()):
            is_new = i > trained
            sure = None if log_sum is None or is_new else math.exp(score - log_sum)
            found.append(Item(ids[i], titles[i], score, sure, is_new))
        return tuple(found)

    def answer(
        self,
        question: Question,
        items: tuple[Item, ...],
        unknown: list[Unknown],
        top: int = 0,
    ) -> Answer:
        """The answer to a question. unknown: names of its filters that nobody has."""
        found, ids = question.found, self.catalogue.lookup.ids
        return Answer(
            items=items,
            history=tuple(ids[i] for i in found.items),
            unknown=tuple(found.unknown + unknown),
            remarks=tuple(found.remarks),
            short=said_of_top(top, len(items)) if len(items) < top else None,
            popular=not found.items,
            user=question.user,
        )

    def mask_of(self, items: list[int]) -> np.ndarray:
        """Bool (I+1,): true for some items."""
        mask_I = np.zeros(self.catalogue.n_items + 1, bool)
        mask_I[items] = True
        return mask_I


def said_of_top(top: int, found: int) -> str:
    """The sentence about an answer with fewer items than were asked for."""
    return (
        f"{found} of {top} items are ranked: none of the history, what filters allow, and an LM "
        "may rank a part of the catalogue (its pool)"
    )


def stop_without_history(question: Question) -> None:
    """Refuses a question that needs a history and has no known item."""
    if not question.found.items:
        unknown = "; ".join(map(str, question.found.unknown))
        raise Refused(
            "the history holds no known item"
            + (f" ({unknown})" if unknown else "")
            + "; give titles or ids of the catalogue"
        )
