"""A run as one function of histories: their scores of the whole catalogue.

A backbone and an LM that reads one state score every item; an LM that scores title by title
(likelihood), or lists its candidates, ranks the best of its backbone's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import Data
from delrec.lm.ragged import ragged
from delrec.lm.ranker import Ranker, open_run, reads_all, score_catalogue, score_tails
from delrec.lm.reading import Start, read_prefix
from delrec.processes import Ranks
from delrec.runtime import Run, folder_of, load_run, stop


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
# f(histories, what is wanted) -> the items that are ranked after each
Choose = Callable[[list[np.ndarray], Wanted], list[np.ndarray] | np.ndarray]


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
        scores_after = history_scorer(run)
        return lambda olds, _: scores_after(olds)
    ranker, penalty_I = open_run(run, data, ranks.device, shard)
    if reads_all(ranker):
        with torch.no_grad():
            start = read_prefix(ranker.lm, ranker.prompts.prefix, ranker.P, ranker.cache)
        return partial(scores_in_one_pass, ranker, start, penalty_I)
    # a prompt that lists its candidates ranks as many as it was trained with
    size = min(pool or run.C, run.C) if ranker.show else pool
    if ranker.show and size < (pool or data.n_items) and ranks.main and said:
        print(
            f"{run.folder} lists the candidates in its prompt, {run.C} at a time: it ranks its "
            f"backbone's {size} best, not --pool {pool}",
            flush=True,
        )
    choose = pool_chooser(run, data, size, ranker.show)
    width = size if ranker.show else min(50, data.n_items)
    name = "rank" if said else None
    return partial(scores_of_pool, PoolRanker(ranker, penalty_I, choose, width, ranks, name))


def has_probabilities(run: Run) -> bool:
    """True for a run whose scores were trained as those of a softmax over the whole catalogue, and
    are not changed since: a backbone without --loss bce, an LM on vectors, one of --loss catalogue.
    """
    if run.stage == "train_backbone":
        return getattr(run, "loss", None) in ("ce", "sampled")
    settings = getattr(run, "settings", {})
    if run.stage != "finetune" or getattr(run, "calibration", 0) or settings.get("show"):
        return False
    on_vectors = settings.get("verbalizer") == "items"
    return on_vectors or getattr(run, "loss", None) == "catalogue"


def best_of(s_I: np.ndarray, top: int) -> np.ndarray:
    """The `top` best items of one history's scores that were ranked, the best first, ties by the
    smaller number: int64.
    """
    items = np.arange(len(s_I))
    if top < len(s_I):
        least = np.partition(s_I, len(s_I) - top)[len(s_I) - top]
        items = np.flatnonzero(s_I >= least)
    best = items[np.argsort(-s_I[items], kind="stable")[:top]]
    return best[s_I[best] > -np.inf]


def log_sums(s_BI: np.ndarray) -> np.ndarray:
    """log sum_i exp(s_bi) of each row, float32 (B,): what a score less it is the log probability
    of.
    """
    most_B1 = s_BI.max(1, keepdims=True)
    return np.log(np.exp(s_BI - most_B1).sum(1)) + most_B1[:, 0]


def scores_in_one_pass(
    ranker: Ranker, start: Start, penalty_I: np.ndarray, olds: list[np.ndarray], _: Wanted
) -> np.ndarray:
    """Scores (B, I+1) by an LM that reads one state. start: its prefix, already read."""
    tails, _ = ranker.prompts.histories(ragged([old[-ranker.history :] for old in olds]))
    return score_catalogue(ranker, start, tails) - penalty_I


@dataclass
class PoolRanker:
    """An LM that scores some items after a history, a block of them a prompt."""

    ranker: Ranker
    penalty_I: np.ndarray  # what each item's score is lowered by
    choose: Choose  # f(histories, what is wanted) -> the items that it ranks after each
    width: int  # items of a block
    ranks: Ranks  # the processes
    name: str | None = None  # of its progress; None: nothing is printed


def scores_of_pool(pool: PoolRanker, olds: list[np.ndarray], wanted: Wanted) -> np.ndarray:
    """Scores (B, I+1) of the chosen items after each history; -inf for all others."""
    ranker, width = pool.ranker, pool.width
    blocks, owner = [], []
    for b, items in enumerate(pool.choose(olds, wanted)):
        # np.resize repeats the first items in the last block
        for block in np.resize(items, (-(-len(items) // width), width)):
            blocks.append(block)
            owner.append(b)
    s_BI = np.full((len(olds), ranker.data.n_items + 1), -np.inf, np.float32)
    if not blocks:
        return s_BI
    shown = [olds[b][-ranker.history :] for b in owner]
    tails, _ = ranker.prompts.histories(ragged(shown), np.array(blocks))
    score_nC = score_tails(ranker, tails, np.array(blocks), pool.ranks, pool.name)
    for b, block, score_C in zip(owner, blocks, score_nC):
        s_BI[b, block] = score_C - pool.penalty_I[block]
    return s_BI


def pool_chooser(run: Run, data: Data, size: int, listed: bool = False) -> Choose:
    """f(histories, Wanted) -> the items an LM ranks after each: the `size` best of its backbone
    among those that are wanted, or all of those (size 0; Wanted.each). listed: it cannot rank the
    whole catalogue.
    """

    def all_wanted(olds, wanted):
        s_BI = wanted.mask(np.zeros((len(olds), data.n_items + 1), np.float32), olds)
        return [np.flatnonzero(s_I == 0) for s_I in s_BI]

    if not size or size >= data.n_items:
        return all_wanted
    own = getattr(run, "backbone_run", None)
    folder = Path(own or folder_of("runs", f"{data.folder_name}/sasrec"))
    or_all = "" if listed else ", or give --pool 0 (slower)"
    if not (folder / "config.json").exists():
        stop(
            f"no backbone in {folder} to choose the {size} titles the LM ranks; train one with "
            f"train_backbone.py{or_all}"
        )
    try:
        scores_after = history_scorer(load_run(folder, data))
    except click.ClickException as refused:
        stop(f"{refused.message}{or_all}")

    def best(olds, wanted):
        if wanted.each:
            return all_wanted(olds, wanted)
        s_BI = wanted.mask(scores_after(olds), olds)
        best_BK = np.argsort(-s_BI, axis=1, kind="stable")[:, :size]
        return [best[np.isfinite(s_I[best])] for s_I, best in zip(s_BI, best_BK)]

    return best
