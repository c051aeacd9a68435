"""How one state of a recommender answers: its items, its model, and nothing that changes."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from delrec.runtime import Run
from delrec.serving.asking import Question
from delrec.serving.catalogue import Catalogue, Filters
from delrec.serving.lookup import Unknown
from delrec.serving.ranking import ScoresAfter, Wanted, best_of, has_probabilities, log_sums
from delrec.serving.results import Answer, Item, Refused
from delrec.serving.vectors import Likeness, likeness_of

CELLS = 2**22  # scores that exist at once
MOST = 256  # histories that are scored at once


@dataclass(frozen=True)
class Plan:
    """How questions are to be answered."""

    top: int  # items of an answer
    wanted: Wanted  # the items that may be in it
    unknown: list[Unknown]  # names of its filters that nobody has


class Answerer:
    """A run, the items it ranks, and how it answers. Threads may ask at once: an LM's passes take
    turns.
    """

    def __init__(self, catalogue: Catalogue, open_scorer: Callable[[], ScoresAfter], run: Run):
        """open_scorer: opens the run's model, at the first question; run: its configuration."""
        self.catalogue, self.run = catalogue, run
        self.has_probabilities = has_probabilities(run)
        self.open_scorer, self.scores_after = open_scorer, None
        self.lock = threading.Lock()
        self.turn = contextlib.nullcontext() if run.stage == "train_backbone" else threading.Lock()

    def open(self) -> ScoresAfter:
        """The run's function of histories (see ranking.py); the model is loaded once."""
        if self.scores_after is None:
            with self.lock:
                if self.scores_after is None:
                    self.scores_after = self.open_scorer()
        return self.scores_after

    def plan(self, top: int = 10, *, keep_seen: bool = False, **filters: Any) -> Plan:
        """How questions are to be answered; what cannot be meant is refused."""
        if isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1:
            raise Refused(f"top is {top!r:.60}, expected a whole number of at least 1")
        allowed_I, unknown = self.catalogue.allowed(Filters(**filters))
        return Plan(int(top), Wanted(allowed_I, bool(keep_seen)), unknown)

    def answers(self, asked: list[Question], plan: Plan) -> Iterator[Answer]:
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
        popular, scores = None, self.scores_of(known, wanted)
        for question in asked:
            if question.found.items:
                yield question, *next(scores)
                continue
            if popular is None:
                count_I = self.catalogue.count_I[None].copy()
                popular = wanted.mask(count_I, [np.zeros(0, np.int64)])[0]
            yield question, popular, None

    def scores_of(
        self, asked: list[Question], wanted: Wanted
    ) -> Iterator[tuple[np.ndarray, float | None]]:
        """Yields the scores (I+1,) after histories, and the log of their sum, as scored does."""
        batch = max(1, min(MOST, CELLS // (self.catalogue.n_items + 1)))
        scores_after = self.open() if asked else None
        for at in range(0, len(asked), batch):
            olds = [np.array(q.found.items, np.int64) for q in asked[at : at + batch]]
            with self.turn:
                s_BI = scores_after(olds, wanted)
            if np.isnan(s_BI.max(1)).any():
                raise Refused(
                    f"the scores of {self.run.folder} are not numbers: its weights are broken; "
                    "train it again"
                )
            log_sums_B = [None] * len(olds)
            if self.has_probabilities:
                log_sums_B = log_sums(s_BI[:, : self.catalogue.data.n_items + 1]).tolist()
            yield from zip(wanted.mask(s_BI, olds), log_sums_B)

    @functools.cached_property
    def likeness(self) -> Likeness:
        """What items are alike by."""
        return likeness_of(self.run, self.catalogue)

    def alike(self, asked: list[Question], plan: Plan) -> Iterator[Answer]:
        """Yields the items that are most like the last item of each question."""
        for question in asked:
            stop_without_history(question)
            item = question.found.items[-1]
            cosine_I = plan.wanted.mask(self.likeness.cosines(item)[None].copy(), [[item]])[0]
            items = self.items_of(best_of(cosine_I, plan.top), cosine_I, None)
            answer = self.answer(question, items, plan.unknown, plan.top)
            yield replace(answer, remarks=(*answer.remarks, f"alike by {self.likeness.by}"))

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
