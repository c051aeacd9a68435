"""A trained run as one object that answers: the API of the package.

    from delrec import Recommender
    rec = Recommender.load("runs/my-shop/sasrec")
    rec.recommend(["Green tea 100 g", "Teapot, small"], top=10)
    rec.recommend(user="4711", only=in_stock, exclude=["sku-7"], where={"category": "tea"})

It answers for every kind of run. Ids and titles are the raw log's. Answers may be asked for by
several threads at once.
"""

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import click
import numpy as np

from delrec.processes import Ranks, own_device
from delrec.runtime import Run
from delrec.serving import fitting
from delrec.serving.answerer import Answerer, stop_without_history
from delrec.serving.asking import Question, found_of, questions, read_once
from delrec.serving.catalogue import Catalogue
from delrec.serving.explaining import Explanation, explanation
from delrec.serving.keywords import in_keywords
from delrec.serving.lookup import told
from delrec.serving.new_items import Unseen
from delrec.serving.ranking import ScoresAfter, Wanted, run_scorer
from delrec.serving.results import Answer, Answers, Refused
from delrec.serving.shared import in_one_sentence, opened

SWITCHES = {"keep-seen"}  # flags of evaluate.py without a value that are keywords here


class Who(TypedDict, total=False):
    """Whose history it is, where no titles are given; each may be a list of histories."""

    ids: Any  # raw ids, oldest first
    user: Any  # a user of the log, with all the items the log has
    users: Any  # several


class Kept(TypedDict, total=False):
    """Which items may be in an answer."""

    only: Any  # ids of the items that may be in the answer
    exclude: Any  # ids of items that may not
    where: dict[str, Any]  # {a further column of items.csv: the value, or several}
    keep_seen: bool  # may the items of the history be in it? False


class Options(Who, Kept, total=False):
    """What may be asked beside a history."""


def in_python(method: Callable) -> Callable:
    """The method, whose refusals are ValueErrors."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except click.ClickException as refused:
            raise Refused(in_keywords(refused.message, SWITCHES)) from None

    return call


def in_words(answer: Answer) -> Answer:
    """The answer, whose sentence about its length names keywords, not flags."""
    return replace(answer, short=in_keywords(answer.short, SWITCHES)) if answer.short else answer


class Recommender:
    """A run that ranks items for histories."""

    def __init__(self, now: Answerer):
        self.now = now  # replaced, never changed, when items are added
        self.adding = threading.Lock()
        self.trained: ScoresAfter | None = None  # the model, before items were added

    @classmethod
    @in_python
    def load(
        cls,
        run: Path | str,
        *,
        dataset: str | None = None,
        llm: str | None = None,
        pool: int = 100,
    ) -> "Recommender":
        """The recommender of a run folder, of a run's name under runs/, or of a shared run on the
        Hugging Face Hub (owner/name); its model is loaded.

        dataset, llm: the prepared data, and the LM it was trained on, where they are not where the
        run says. pool: how many of its backbone's best an LM ranks that reads title by title; 0:
        all items.
        """
        found, data = opened(run, dataset, llm)
        with in_one_sentence(found):
            catalogue = Catalogue(data)
            catalogue.read()
            recommender = cls.of_run(found, catalogue, Ranks(0, 1, own_device(0)), pool)
            recommender.now.open()
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
        return cls(
            Answerer(catalogue, lambda: run_scorer(run, data, ranks, pool, shard, said), run)
        )

    @classmethod
    @in_python
    def fit(
        cls,
        interactions: Any,
        items: Any = None,
        *,
        name: str = "my-data",
        model: str = "sasrec",
        said: bool = False,
        **flags: Any,
    ) -> "Recommender":
        """The recommender of a backbone that is trained on a log, in runs/<name>/<model> of the
        current folder; the prepared data stand in data/<name>.

        interactions: a path, or a frame of polars or pandas, with the columns user, item and
        timestamp (or position). items: the same with item, title, and whatever answers are to be
        filtered by; None: the titles are a column of the interactions. said: is the progress
        printed? flags: those of data/prepare.py and train_backbone.py, as user_column="customer",
        core=1, epochs=20, overwrite=True.
        """
        return cls.load(fitting.fit(interactions, items, name, model, said, flags))

    @property
    def run(self) -> Run:
        """The run's configuration."""
        return self.now.run

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
        now = self.now
        plan = now.plan(top, **options)
        asked, many = questions(now.catalogue, history, **who)
        answers = tuple(map(in_words, now.answers(asked, plan)))
        return Answers(answers) if many else answers[0]

    @in_python
    def score(
        self, history: Any = None, candidates: Any = None, **who: Unpack[Who]
    ) -> Answer | Answers:
        """The scores of candidates (ids or titles) after a history, or after each of several, in
        the order of the candidates; those of the history are scored like others.
        """
        now = self.now
        asked, many = questions(now.catalogue, history, **who)
        if candidates is None:
            raise Refused("score() was given no candidates; give ids or titles of the catalogue")
        items, unknown, remarks = now.catalogue.candidates(candidates)
        if not items:
            raise Refused("no candidate is known; give ids or titles of the catalogue")
        for question in asked:
            stop_without_history(question)
        wanted = Wanted(now.catalogue.mask_of(items), keep_seen=True, each=True)
        answers, shared = [], tuple(unknown)
        for some, s_BI, log_sum_B in now.scored(asked, wanted):
            item_BC = np.tile(items, (len(some), 1))
            scored = now.items_of(item_BC, s_BI[:, items], log_sum_B)
            for each in zip(some, scored):
                answer = now.answer(*each, shared)
                answers.append(replace(answer, remarks=(*answer.remarks, *remarks)))
        return Answers(tuple(answers)) if many else answers[0]

    @in_python
    def similar(self, item: Any, *, top: int = 10, **filters: Unpack[Kept]) -> Answer | Answers:
        """The items most like one (a title or an id), or each of a list: the score is the cosine of
        their vectors, the remark says which.
        """
        now = self.now
        plan = now.plan(top, **filters)
        item = read_once(item)
        many = isinstance(item, list)
        some = item if many else [item]
        asked = [Question(found_of(now.catalogue, [one], "either")) for one in some]
        answers = tuple(map(in_words, now.alike(asked, plan)))
        return Answers(answers) if many else answers[0]

    @in_python
    def explain(
        self, history: Any = None, item: Any = None, *, attention: bool = False, **who: Unpack[Who]
    ) -> Explanation:
        """What the score of an item (a title or an id) after a history rests on: by how much it is
        lower without each item of the history, how often the two stood together in training, and,
        if attention is asked, the share of the LM's attention.
        """
        now = self.now
        asked, many = questions(now.catalogue, history, **who)
        if many:
            raise Refused("explain() was given several histories; give one at a time")
        if item is None:
            raise Refused("explain() was given no item; give a title or an id of the catalogue")
        found = found_of(now.catalogue, [item], "either")
        if not found.items:
            raise Refused(told(found.unknown) or f"the item {item!r:.60} is blank")
        return explanation(now, asked[0], found.items[0], attention)

    # ------------------------------------------------ items without a history

    @in_python
    def add_items(self, items: Mapping[str, str]) -> None:
        """From now on also ranks items that training never saw, {raw id: title}.

        An LM on titles reads the title. A backbone, and an LM on vectors, is given a vector made of
        its words (new_items.py). The scores of all others stay, bit for bit; answers say which
        items are new.
        """
        with self.adding:
            now = self.now
            catalogue = now.catalogue.with_items(items)
            titles = list(catalogue.added.values())
            self.trained = self.trained or now.open()

            unseen = Unseen(catalogue.title_map, titles)
            with now.turn:
                scorer = self.trained.with_items(titles, unseen)
            grown = Answerer(catalogue, lambda: scorer, now.run)
            grown.turn = now.turn  # it is the same LM
            grown.open()
            self.now = grown
