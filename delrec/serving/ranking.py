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

# f(histories as item ids, oldest first) -> scores float32 (B, I+1) of the catalogue
ScoresAfter = Callable[[list[np.ndarray]], np.ndarray]
# f(histories) -> the items that are ranked after each
Choose = Callable[[list[np.ndarray]], list[np.ndarray] | np.ndarray]


def ranking(
    run: Run, data: Data, ranks: Ranks, pool: int = 100, shard: bool = False
) -> ScoresAfter:
    """f(list of histories as item ids, oldest first) -> scores float32 (B, I+1); -inf: padding, the
    history, and what was not ranked.

    pool: how many of its backbone's best an LM ranks that cannot score the catalogue in one pass;
    0: all items.
    """
    scores_after = run_scorer(run, data, ranks, pool, shard)

    def rank(olds):
        s_BI = scores_after(olds)
        for s_I, old in zip(s_BI, olds):
            s_I[0] = s_I[old] = -np.inf
        return s_BI

    return rank


def run_scorer(run: Run, data: Data, ranks: Ranks, pool: int, shard: bool) -> ScoresAfter:
    """f(list of histories) -> scores float32 (B, I+1), of a run of any kind."""
    if run.stage == "train_backbone":
        return history_scorer(run)
    ranker, penalty_I = open_run(run, data, ranks.device, shard)
    if reads_all(ranker):
        with torch.no_grad():
            start = read_prefix(ranker.lm, ranker.prompts.prefix, ranker.P, ranker.cache)
        return partial(scores_in_one_pass, ranker, start, penalty_I)
    # a prompt that lists its candidates ranks as many as it was trained with
    size = min(pool or run.C, run.C) if ranker.show else pool
    if ranker.show and size < (pool or data.n_items) and ranks.main:
        print(
            f"{run.folder} lists the candidates in its prompt, {run.C} at a time: it ranks its "
            f"backbone's {size} best, not --pool {pool}",
            flush=True,
        )
    choose = pool_chooser(run, data, size, ranker.show)
    width = size if ranker.show else min(50, data.n_items)
    return partial(scores_of_pool, PoolRanker(ranker, penalty_I, choose, width, ranks))


def scores_in_one_pass(
    ranker: Ranker, start: Start, penalty_I: np.ndarray, olds: list[np.ndarray]
) -> np.ndarray:
    """Scores (B, I+1) by an LM that reads one state. start: its prefix, already read."""
    tails, _ = ranker.prompts.histories(ragged([old[-ranker.history :] for old in olds]))
    return score_catalogue(ranker, start, tails) - penalty_I


@dataclass
class PoolRanker:
    """An LM that scores some items after a history, a block of them a prompt."""

    ranker: Ranker
    penalty_I: np.ndarray  # what each item's score is lowered by
    choose: Choose  # f(histories) -> the items that it ranks after each
    width: int  # items of a block
    ranks: Ranks  # the processes


def scores_of_pool(pool: PoolRanker, olds: list[np.ndarray]) -> np.ndarray:
    """Scores (B, I+1) of the chosen items after each history; -inf for all others."""
    ranker, width = pool.ranker, pool.width
    blocks, owner = [], []
    for b, items in enumerate(pool.choose(olds)):
        # np.resize repeats the first items in the last block
        for block in np.resize(items, (-(-len(items) // width), width)):
            blocks.append(block)
            owner.append(b)
    shown = [olds[b][-ranker.history :] for b in owner]
    tails, _ = ranker.prompts.histories(ragged(shown), np.array(blocks))
    score_nC = score_tails(ranker, tails, np.array(blocks), pool.ranks, "rank")
    s_BI = np.full((len(olds), ranker.data.n_items + 1), -np.inf, np.float32)
    for b, block, score_C in zip(owner, blocks, score_nC):
        s_BI[b, block] = score_C - pool.penalty_I[block]
    return s_BI


def pool_chooser(run: Run, data: Data, size: int, listed: bool = False) -> Choose:
    """f(histories) -> the items an LM ranks after each: the `size` best of its backbone, none of
    the history (0: the whole catalogue). listed: it cannot rank the whole catalogue.
    """
    if not size or size >= data.n_items:
        catalogue = np.arange(1, data.n_items + 1)
        return lambda olds: [np.setdiff1d(catalogue, old) for old in olds]
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

    def best(olds):
        s_BI = scores_after(olds)
        for s_I, old in zip(s_BI, olds):
            s_I[old] = -np.inf
        return np.argsort(-s_BI, axis=1, kind="stable")[:, :size]

    return best
