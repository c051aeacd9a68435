"""How one state of a recommender answers: its items, its model, and nothing that changes."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from delrec.runtime import Run
from delrec.serving.asking import Question
from delrec.serving.catalogue import Catalogue, Filters
from delrec.serving.lookup import Unknown, told
from delrec.serving.ranking import ScoresAfter, Wanted, best_of, has_probabilities, log_sums
from delrec.serving.results import Answer, Items, Names, Refused
from delrec.serving.vectors import Likeness, likeness_of

CELLS = 2**22  # scores that exist at once
MOST = 256  # histories that are scored at once


@dataclass(frozen=True)
class Plan:
    """How questions are to be answered."""

    top: int  # items of an answer
    wanted: Wanted  # the items that may be in it
    unknown: tuple[Unknown, ...]  # names of its filters that nobody has


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
        return Plan(int(top), Wanted(allowed_I, bool(keep_seen)), tuple(unknown))

    def answers(self, asked: list[Question], plan: Plan) -> Iterator[Answer]:
        """Yields the answer to each question, some at a time; for a history without a known item
        the items that most people took.
        """
        for some, s_BI, log_sum_B in self.scored(asked, plan.wanted):
            best = self.items_of(*best_of(s_BI, plan.top), log_sum_B)
            for question, items in zip(some, best):
                short = self.why_short(question, plan, len(items))
                yield self.answer(question, items, plan.unknown, short)

    def scored(
        self, asked: list[Question], wanted: Wanted
    ) -> Iterator[tuple[list[Question], np.ndarray, np.ndarray]]:
        """Yields (questions, their scores (B, I+1), the logs of the sum of exp of all trained
        items' scores, None where the run has no probabilities), some questions at a time.
        """
        for at in range(0, len(asked), self.at_once):
            some = asked[at : at + self.at_once]
            olds = [np.array(question.found.items, np.int64) for question in some]
            known_B = np.array([len(old) > 0 for old in olds])
            s_BI = np.tile(self.catalogue.count_I, (len(olds), 1))
            log_sum_B = np.full(len(olds), None)
            if known_B.any():
                known = [old for old in olds if len(old)]
                s_BI[known_B], log_sum_B[known_B] = self.model_scores(known, wanted)
            yield some, wanted.mask(s_BI, olds), log_sum_B

    def model_scores(
        self, olds: list[np.ndarray], wanted: Wanted
    ) -> tuple[np.ndarray, list[float | None]]:
        """(the model's scores (B, I+1) after histories, the logs of their sums)."""
        scores_after = self.open()
        with self.turn:
            s_BI = scores_after(olds, wanted)
        if np.isnan(s_BI.max(1)).any():
            raise Refused(
                f"the scores of {self.run.folder} are not numbers: its weights are broken; "
                "train it again"
            )
        if not self.has_probabilities:
            return s_BI, [None] * len(olds)
        return s_BI, log_sums(s_BI[:, : self.catalogue.data.n_items + 1])

    @property
    def at_once(self) -> int:
        """How many histories are scored at once."""
        return max(1, min(MOST, CELLS // (self.catalogue.n_items + 1)))

    @functools.cached_property
    def names(self) -> Names:
        """What the items are called."""
        lookup = self.catalogue.lookup
        return Names(lookup.ids, lookup.titles, self.catalogue.data.n_items)

    @functools.cached_property
    def likeness(self) -> Likeness:
        """What items are alike by."""
        loaded_IE = getattr(self.scores_after, "vectors", None)
        return likeness_of(self.run, self.catalogue, loaded_IE)

    def alike(self, asked: list[Question], plan: Plan) -> Iterator[Answer]:
        """Yields the items that are most like the last item of each question."""
        for question in asked:
            stop_without_history(question)
            item = question.found.items[-1]
            cosine_1I = plan.wanted.mask(self.likeness.cosines(item)[None].copy(), [[item]])
            (items,) = self.items_of(*best_of(cosine_1I, plan.top), [None])
            seen = [] if plan.wanted.keep_seen else ["the item itself is not shown"]
            short = said_of_top(plan, len(items), seen)
            answer = self.answer(question, items, plan.unknown, short)
            yield replace(answer, remarks=(*answer.remarks, f"alike by {self.likeness.by}"))

    def items_of(
        self, item_Bk: np.ndarray, score_Bk: np.ndarray, log_sum_B: Sequence[float | None]
    ) -> list[Items]:
        """Some items of each row with their scores; those that were not ranked (-inf) stand last
        and are left out.
        """
        n_B = (score_Bk > -np.inf).sum(1).tolist()
        rows = zip(item_Bk.tolist(), score_Bk.tolist(), n_B, log_sum_B)
        return [Items(self.names, i_k[:n], s_k[:n], log_sum) for i_k, s_k, n, log_sum in rows]

    def answer(
        self,
        question: Question,
        items: Items,
        unknown: tuple[Unknown, ...],
        short: str | None = None,
    ) -> Answer:
        """The answer to a question. unknown: names of its filters that nobody has; all
        answers share them, there may be thousands. short: why it has fewer items than were asked
        for.
        """
        found, ids = question.found, self.catalogue.lookup.ids
        return Answer(
            items=items,
            history=tuple(map(ids.__getitem__, found.items)),
            unknown=(*found.unknown, *unknown) if found.unknown else unknown,
            remarks=tuple(found.remarks),
            short=short,
            popular=not found.items,
            user=question.user,
        )

    def why_short(self, question: Question, plan: Plan, found: int) -> str | None:
        """Why an answer to a history has only so many items; None where it has all asked for."""
        if found >= plan.top:
            return None
        known, seen = bool(question.found.items), []
        if known and not plan.wanted.keep_seen:
            seen = ["items of the history are not shown (--keep-seen shows them)"]
        choose = getattr(self.scores_after, "choose", None) if known else None
        pool = choose.size if choose and choose.scorer else None
        return said_of_top(plan, found, seen, pool)


def said_of_top(plan: Plan, found: int, seen: list[str], pool: int | None = None) -> str | None:
    """The sentence about an answer with fewer items than were asked for. seen: what is said of
    what is in the history; pool: the items that an LM on titles ranks, where they are not all.
    """
    if found >= plan.top:
        return None
    left = {0: "no item is", 1: "1 item is"}.get(found, f"{found} items are")
    filters, why = "what --only, --exclude and --where leave out", list(seen)
    if plan.wanted.allowed_I is not None:
        why.append(f"nor {filters}" if seen else f"{filters} is not shown")
    if pool:
        why.append(f"the LM ranks the best {pool} of its backbone alone (--pool)")
    said = ", ".join(why) or "the catalogue holds no more"
    return f"{left} left of the {plan.top} asked for: {said}"


def stop_without_history(question: Question) -> None:
    """Refuses a question that needs a history and has no known item."""
    if not question.found.items:
        unknown = told(question.found.unknown)
        raise Refused(
            "the history holds no known item"
            + (f" ({unknown})" if unknown else "")
            + "; give titles or ids of the catalogue"
        )
