"""What an item's score rests on, in ways that can be checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from delrec.data.counts import times_of
from delrec.lm.attention import shares_of_history
from delrec.lm.residual import residual_of
from delrec.lm.user_states import users_of
from delrec.serving.answerer import Answerer, stop_without_history
from delrec.serving.asking import Question
from delrec.serving.catalogue import Catalogue
from delrec.serving.ranking import Wanted
from delrec.serving.results import Item, Refused

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, slots=True)
class Reason:
    """An item of the history, and what it has to do with the score."""

    id: str
    title: str
    lowers: float  # by how much the score is lower without it; below 0: higher
    # how often the two stood within five steps of each other in training; None: nobody's
    # interactions are here (of a shared run)
    together: int | None
    attention: float | None  # its share of the LM's attention, where that was asked


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an item's score rests on."""

    item: Item
    reasons: tuple[Reason, ...]  # what lowers the score most comes first

    def to_polars(self) -> pl.DataFrame:
        """A table with a row a reason."""
        import polars as pl

        rows = [(r.id, r.title, r.lowers, r.together, r.attention) for r in self.reasons]
        types = {"id": pl.String, "title": pl.String, "lowers": pl.Float64, "together": pl.Int64}
        return pl.DataFrame(rows, types | {"attention": pl.Float64}, orient="row")


def explanation(now: Answerer, question: Question, item: int, attention: bool) -> Explanation:
    """What the score of an item after a history rests on: each item of the part of the history that
    the run sees is left out once, and the score asked again.
    """
    stop_without_history(question)
    old = np.array(question.found.items, np.int64)
    shown = list(dict.fromkeys(old[-seen_by(now) :].tolist()))
    without = [old[old != i] for i in shown]
    wanted = Wanted(now.catalogue.mask_of([item]), keep_seen=True, each=True)
    (whole_I,), (log_sum,) = now.model_scores([old], wanted)
    lower = []
    for at in range(0, len(without), now.at_once):
        s_BI, _ = now.model_scores(without[at : at + now.at_once], wanted)
        lower += (whole_I[item] - s_BI[:, item]).tolist()
    shares = attention_to(now, old) if attention else {}
    titles, ids = now.catalogue.lookup.titles, now.catalogue.lookup.ids
    reasons = [
        Reason(ids[i], titles[i], low, times_together(now.catalogue, i, item), shares.get(i))
        for i, low in zip(shown, lower)
    ]
    (found,) = now.items_of(np.array([[item]]), whole_I[None, [item]], [log_sum])
    return Explanation(found[0], tuple(sorted(reasons, key=lambda reason: -reason.lowers)))


def seen_by(now: Answerer) -> int:
    """How many items of a history a run sees, L."""
    run = now.run
    if run.stage == "train_backbone":
        return run.history
    shown = run.settings["history"]
    if getattr(run, "residual", None):  # its backbone sees a history of its own
        shown = max(shown, residual_of(now.open().ranker.lm).history)
    if getattr(run, "user_states", None):  # it is asked after every beginning of what is shown
        shown = max(shown, users_of(now.open().ranker.lm).history)
    return shown


def times_together(catalogue: Catalogue, a: int, b: int) -> int | None:
    """How often two items stood near each other in training; 0 for an added one, None where it
    cannot be known.
    """
    first, second = min(a, b), max(a, b)
    if second > catalogue.data.n_items:
        return 0
    near = catalogue.near
    if near is None:
        return None
    pair = np.array([first * (catalogue.data.n_items + 1) + second])
    return int(times_of(pair, near.pair, near.times)[0])


def attention_to(now: Answerer, old: np.ndarray) -> dict[int, float]:
    """{item: its share of the attention of the LM}."""
    ranker = getattr(now.open(), "ranker", None)
    if ranker is None:
        raise Refused(
            f"{now.run.folder} is no LM, so it has no attention to tell; leave attention out"
        )
    with now.turn:
        return shares_of_history(ranker, old)
