"""A run as one function of histories: their scores of the whole catalogue.

A backbone and an LM that reads one state score every item; an LM that scores title by title
(likelihood), or lists its candidates, ranks the best of its backbone's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import torch

from delrec.backbone.ranking import HistoryScorer, history_scorer, in_order
from delrec.data.prepared import Data
from delrec.data.unseen import Unseen
from delrec.lm import hints, new_items
from delrec.lm.prompts import settings_of_run
from delrec.lm.ragged import ragged
from delrec.lm.ranker import Ranker, open_run, reads_all, score_catalogue, score_listed
from delrec.lm.reading import Start, read_prefix
from delrec.processes import Ranks
from delrec.runtime import Run, load_run, stop, usual_run


@dataclass(frozen=True)
class Wanted:
    """Which items are to be ranked after some histories."""

    allowed_I: np.ndarray | None = None  # bool (I+1,); None: every item
    keep_seen: bool = False  # also those of the history itself
    each: bool = False  # all of them, however many an LM would choose among

    def mask(self, s_BI: np.ndarray, olds: list[np.ndarray]) -> np.ndarray:
        """The scores, -inf for the padding item and for what is not wanted; changed in place."""
        s_BI[:, 0] = -np.inf
        if self.allowed_I is not None:
            s_BI[:, ~self.allowed_I] = -np.inf
        if not self.keep_seen:
            for s_I, old in zip(s_BI, olds):
                s_I[old] = -np.inf
        return s_BI


UNSEEN = Wanted()
# f(histories as item ids, oldest first; what is wanted) -> scores float32 (B, I+1) of all items;
# -inf: padding, and what was not ranked; what is not wanted may have one
ScoresAfter = Callable[[list[np.ndarray], Wanted], np.ndarray]


def ranking(
    run: Run, data: Data, ranks: Ranks, pool: int = 100
) -> Callable[[list[np.ndarray]], np.ndarray]:
    """f(list of histories as item ids, oldest first) -> scores float32 (B, I+1); -inf: padding, the
    history, and what was not ranked. pool: as of run_scorer.
    """
    scores_after = run_scorer(run, data, ranks, pool)
    return lambda olds: UNSEEN.mask(scores_after(olds, UNSEEN), olds)


def run_scorer(
    run: Run,
    data: Data,
    ranks: Ranks,
    pool: int = 100,
    shard: bool = False,
    said: bool = True,
) -> ScoresAfter:
    """f(list of histories, Wanted) -> scores float32 (B, I+1), of a run of any kind.

    pool: how many of its backbone's best an LM ranks that cannot score the catalogue in one pass;
    0: all items. said: is its progress printed?
    """
    if run.stage == "train_backbone":
        return BackboneScorer(history_scorer(run))
    told = ranks if said else None
    ranker, penalty_I = open_run(run, data, ranks.device, shard, history_scorer, told)
    if reads_all(ranker):
        with torch.no_grad():
            start = read_prefix(ranker.lm, ranker.prompts.prefix, ranker.P, ranker.cache)
        return OnePass(run, ranker, penalty_I, ranks, start)
    # a prompt that lists its candidates ranks as many as it was trained with
    size = min(pool or run.C, run.C) if ranker.show else pool
    if ranker.show and size < (pool or data.n_items) and ranks.main and said:
        print(
            f"{run.folder} lists the candidates in its prompt, {run.C} at a time: it ranks its "
            f"backbone's {size} best, not --pool {pool}",
            flush=True,
        )
    told = ranker.show and (ranker.order == "backbone" or ranker.settings["hint"] != "none")
    choose = pool_chooser(run, data, size, ranker.show, told)
    width = size if ranker.show else min(50, data.n_items)
    return PoolRanker(run, ranker, penalty_I, ranks, choose, width, "rank" if said else None)


def has_probabilities(run: Run) -> bool:
    """True for a run whose scores were trained as those of a softmax over the whole catalogue, and
    are not changed since: a backbone of --loss ce or sampled, an LM on vectors, one of --loss
    catalogue.
    """
    if run.stage == "train_backbone":
        return getattr(run, "loss", None) in ("ce", "sampled")
    settings = settings_of_run(run)
    if run.stage != "finetune" or getattr(run, "calibration", 0) or settings["show"]:
        return False
    on_vectors = settings["verbalizer"] == "items"
    return on_vectors or getattr(run, "loss", None) == "catalogue"


def best_of(s_BI: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(items, scores) (B, k) of the `top` best items of each row, or all of them, the best first,
    ties by the smaller number; what is behind a score of -inf was not ranked.
    """
    s_BI = torch.from_numpy(s_BI)
    best_Bk = in_order(s_BI, min(top, s_BI.shape[1]))
    return best_Bk.numpy(), s_BI.gather(1, best_Bk).numpy()


def log_sums(s_BI: np.ndarray) -> list[float]:
    """log sum_i exp(s_bi) of each row: what a score less it is the log probability of."""
    return torch.from_numpy(s_BI).logsumexp(1).tolist()


# ---------------------------------------------------------------- the kinds of run


@dataclass(frozen=True)
class BackboneScorer:
    """A conventional model."""

    scorer: HistoryScorer

    @property
    def vectors(self) -> torch.Tensor:
        """The trained items' vectors, fp32 (I+1, E)."""
        return self.scorer.model.item.weight.detach().float().cpu()

    def __call__(self, olds: list[np.ndarray], wanted: Wanted) -> np.ndarray:
        """Scores (B, I+1) of every item."""
        return self.scorer(olds)

    def with_items(self, titles: list[str], unseen: Unseen) -> "BackboneScorer":
        """This scorer with items that training never saw."""
        return BackboneScorer(self.scorer.with_items(unseen))


@dataclass(frozen=True)
class OnePass:
    """An LM that reads one state for the whole catalogue."""

    run: Run
    ranker: Ranker
    penalty_I: np.ndarray  # what each item's score is lowered by
    ranks: Ranks  # the processes
    start: Start  # the prompts' prefix, already read

    @property
    def vectors(self) -> torch.Tensor | None:
        """The vectors of the trained items that the LM is shown, fp32 (I+1, E); None: it is shown
        none.
        """
        return vectors_shown(self.ranker)

    def __call__(self, olds: list[np.ndarray], wanted: Wanted) -> np.ndarray:
        """Scores (B, I+1) of every item."""
        shown = ragged([old[-self.ranker.history :] for old in olds])
        tails, _ = self.ranker.prompts.histories(shown)
        return score_catalogue(self.ranker, self.start, tails, olds) - self.penalty_I

    def with_items(self, titles: list[str], unseen: Unseen) -> "OnePass":
        """This scorer with items that training never saw."""
        return replace(self, **grown_parts(self, titles, unseen))


@dataclass(frozen=True)
class PoolRanker:
    """An LM that scores some items after a history, a block of them a prompt."""

    run: Run
    ranker: Ranker
    penalty_I: np.ndarray  # what each item's score is lowered by
    ranks: Ranks  # the processes
    choose: "Chooser"  # the items that it ranks after each history
    width: int  # items of a block
    name: str | None  # of its progress; None: nothing is printed

    @property
    def vectors(self) -> torch.Tensor | None:
        """The vectors of the trained items that the LM is shown, fp32 (I+1, E); None: it is shown
        none.
        """
        return vectors_shown(self.ranker)

    def __call__(self, olds: list[np.ndarray], wanted: Wanted) -> np.ndarray:
        """Scores (B, I+1) of the chosen items after each history; -inf for all others."""
        s_BI = np.full((len(olds), self.ranker.data.n_items + 1), -np.inf, np.float32)
        chosen = self.choose(olds, wanted)
        if self.ranker.trained is None:
            self.score_blocks(self.ranker, self.blocks(chosen), olds, s_BI)
            return s_BI
        # the trained items in prompts of their own: their scores are the bits that they were
        last = len(self.ranker.trained.ptr) - 2
        trained = replace(self.ranker, titles=self.ranker.trained)
        old = [items[items <= last] for items in chosen]
        self.score_blocks(trained, self.blocks(old), olds, s_BI)
        new = [items[items > last] for items in chosen]
        beside = s_BI.copy()
        self.score_blocks(self.ranker, self.blocks(new, beside=old), olds, beside)
        s_BI[:, last + 1 :] = beside[:, last + 1 :]
        return s_BI

    def blocks(
        self, chosen: list[np.ndarray], beside: list[np.ndarray] | None = None
    ) -> list[tuple[int, np.ndarray]]:
        """(history, items of a prompt) of the items chosen for each. beside: what a prompt that
        lists its candidates lists in front of new ones.
        """
        width, found = self.width, []
        for b, items in enumerate(chosen):
            ahead = np.zeros(0, np.int64)
            if beside is not None and self.ranker.show:
                ahead = np.asarray(beside[b][: width - max(1, width // 3)])
            free = width - len(ahead)
            # np.resize repeats the first items in the last block
            for block in np.resize(items, (-(-len(items) // free), free)):
                found.append((b, np.concatenate([ahead, block])))
        return found

    def score_blocks(
        self,
        ranker: Ranker,
        blocks: list[tuple[int, np.ndarray]],
        olds: list[np.ndarray],
        s_BI: np.ndarray,
    ) -> None:
        """Writes the scores of blocks of items into s_BI."""
        if not blocks:
            return
        cand_nC = np.array([block for _, block in blocks]).astype(np.int64)
        shown = ragged([olds[b][-ranker.history :] for b, _ in blocks])
        hint_nh = hints.hint_of_best(ranker.settings, cand_nC)
        whole = [olds[b] for b, _ in blocks]
        score_nC = score_listed(ranker, shown, cand_nC, hint_nh, self.ranks, self.name, whole)
        for (b, _), block, score_C in zip(blocks, cand_nC, score_nC):
            s_BI[b, block] = score_C - self.penalty_I[block]

    def with_items(self, titles: list[str], unseen: Unseen) -> "PoolRanker":
        """This scorer with items that training never saw."""
        choose = self.choose.with_items(len(titles), unseen)
        return replace(self, choose=choose, **grown_parts(self, titles, unseen))


def vectors_shown(ranker: Ranker) -> torch.Tensor | None:
    """The vectors of the trained items that an LM is shown, without the bias, fp32 (I+1, E)."""
    shown = ranker.lm.items
    return None if shown is None else shown.E[:, :-1].float().cpu()


def grown_parts(of: OnePass | PoolRanker, titles: list[str], unseen: Unseen) -> dict:
    """The ranker and the penalty of an LM with items that training never saw."""
    ranker = new_items.with_items(of.ranker, titles, unseen)
    calibration = getattr(of.run, "calibration", 0)
    penalty_I = new_items.grown_penalty(ranker, of.penalty_I, calibration, of.ranks)
    return {"ranker": ranker, "penalty_I": penalty_I}


@dataclass(frozen=True)
class Chooser:
    """Which items an LM ranks after each history: the `size` best of its backbone among those that
    are wanted, or all of those (no scorer; Wanted.each); as many of the added ones beside them.
    """

    n_items: int  # of the catalogue, with the added ones
    trained: int  # without
    size: int
    scorer: Callable[[list[np.ndarray]], np.ndarray] | None  # the backbone
    told: bool = False  # does the prompt tell what the backbone said of the items?

    def __call__(self, olds: list[np.ndarray], wanted: Wanted) -> list[np.ndarray]:
        """The items after each history, the best first."""
        if self.told:
            return self.in_full_lists(olds, wanted)
        if self.scorer is None or wanted.each:
            s_BI = wanted.mask(np.zeros((len(olds), self.n_items + 1), np.float32), olds)
            return [np.flatnonzero(s_I == 0) for s_I in s_BI]
        s_BI = wanted.mask(self.scorer(olds), olds)
        return [self.best(s_I) for s_I in s_BI]

    def in_full_lists(self, olds: list[np.ndarray], wanted: Wanted) -> list[np.ndarray]:
        """The wanted items, the best first, those added last. The last list of trained ones is
        filled with the backbone's best of the others, so that a hint is none of a single item.
        """
        s_BI, found = self.scorer(olds), []
        most = None if wanted.each else self.size
        is_wanted_BI = wanted.mask(np.zeros_like(s_BI), olds) == 0
        is_other_BI = (UNSEEN.mask(np.zeros_like(s_BI), olds) == 0) & ~is_wanted_BI
        for s_I, is_wanted_I, is_other_I in zip(s_BI, is_wanted_BI, is_other_BI):
            best_I = np.argsort(-s_I, kind="stable")
            old_I, new_I = best_I[best_I <= self.trained], best_I[best_I > self.trained]
            asked = old_I[is_wanted_I[old_I]][:most]
            ahead = max(len(asked) - 1, 0) // self.size * self.size
            last = np.concatenate([asked[ahead:], old_I[is_other_I[old_I]]])[: self.size]
            last = np.resize(last, self.size if len(last) else 0)  # of a small catalogue: repeated
            last = last[np.argsort(-s_I[last], kind="stable")]
            found.append(np.concatenate([asked[:ahead], last, new_I[is_wanted_I[new_I]][:most]]))
        return found

    def best(self, s_I: np.ndarray) -> np.ndarray:
        """The best trained items, and behind them the best of the added ones."""
        first = self.trained + 1
        new = self.ranked(s_I[first:]) + first
        return np.concatenate([self.ranked(s_I[:first]), new])

    def ranked(self, s_I: np.ndarray) -> np.ndarray:
        """The best of some items that may be ranked at all."""
        (best_k,), (score_k,) = best_of(s_I[None], self.size)
        return best_k[score_k > -np.inf]

    def with_items(self, n: int, unseen: Unseen) -> "Chooser":
        """This chooser with n items that training never saw."""
        scorer = self.scorer and self.scorer.with_items(unseen)
        return replace(self, n_items=self.trained + n, scorer=scorer)


def pool_chooser(
    run: Run, data: Data, size: int, listed: bool = False, told: bool = False
) -> Chooser:
    """Which items an LM ranks after each history: the `size` best of its backbone (0: the whole
    catalogue). listed: it cannot rank the whole catalogue. told: as of Chooser.
    """
    if not told and (not size or size >= data.n_items):
        return Chooser(data.n_items, data.n_items, size, None)
    own = getattr(run, "backbone_run", None)
    folder = Path(own or usual_run(data, "sasrec", [run]))
    or_all = "" if listed else ", or give --pool 0 (slower)"
    if not (folder / "config.json").exists():
        stop(
            f"no backbone in {folder} to choose the {size} titles the LM ranks; train one with "
            f"train_backbone.py{or_all}"
        )
    try:
        scorer = history_scorer(load_run(folder, data))
    except click.ClickException as refused:
        stop(f"{refused.message}{or_all}")
    return Chooser(data.n_items, data.n_items, size, scorer, told)
