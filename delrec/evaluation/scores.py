"""The scores of runs: those stored in their folders, and those that are computed and stored there.

An LM run is scored once (scores_test_15.npy, NaN where nobody asked); backbones bring theirs. So
runs are compared without loading a model.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from delrec.backbone.models import is_ours
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import (
    Data,
    candidates,
    histories,
    shuffled,
    subset,
    users,
)
from delrec.data.run_files import must_be_finite, scores_in
from delrec.evaluation.stats import RowMetrics, interval
from delrec.lm import listed
from delrec.lm.ranker import (
    Ranker,
    open_run,
    penalty_of,
    reads_all,
    score_and_rank,
    score_samples,
)
from delrec.metrics import compare, metrics
from delrec.processes import Ranks
from delrec.runtime import (
    Run,
    adding_to,
    load_run,
    read_npy,
    stop,
    stop_if_replaced,
    write_npy,
)

PATIENCE = 60  # seconds that a command waits to add to a run that another one is adding to
BATCH = 256  # histories that a backbone scores at once


@dataclass
class Part:
    """The samples of a split that a table is about."""

    split: str  # val or test
    which: np.ndarray  # their places in the split, int64 (n,)
    samples: np.ndarray  # where in data.items the target of each stands (n,)
    cand_nC: np.ndarray  # the stored candidates
    is_target_nC: np.ndarray  # bool, one candidate a row is the target


def part_of(data: Data, split: str, which: np.ndarray, C: int) -> Part:
    """The part of a split that holds its samples `which`."""
    samples = np.asarray(getattr(data, split))[which]
    cand_nC = candidates(data, split, C, which)
    return Part(split, which, samples, cand_nC, cand_nC == data.items[samples][:, None])


def places_in_test(data: Data, limit: int, max_history: int) -> np.ndarray:
    """Places in the test split: of those with at most `max_history` earlier items (0: all), at most
    `limit` (0: all), the same ones for every run.
    """
    which = np.arange(len(data.test))
    if max_history:
        test = np.asarray(data.test)
        which = which[(test - data.ptr[users(data, test)]) <= max_history]
        if not len(which):
            stop(
                f"no test sample of {data.name} has at most {max_history} earlier items "
                "(--max-history; of a 5-core with leave-one-out none has 2); raise it, leave it "
                "out, or take another log or split"
            )
    return which[subset(len(which), limit, 0)]


@dataclass
class Scorer:
    """What runs are scored with: one LM is in memory at a time."""

    data: Data  # the prepared folder
    C: int  # stored candidates of a sample
    ranks: Ranks  # the processes
    shard: bool = False  # are an LM's layers divided among them?
    # run folder -> (ranker, penalty float32 [I+1]) in memory
    opened: dict[Path, tuple[Ranker, np.ndarray]] = field(default_factory=dict)
    prompts: int = 0  # how many LMs have scored
    seconds: float = 0.0  # how long that took


def opened(scorer: Scorer, run: Run) -> tuple[Ranker, np.ndarray]:
    """(ranker, penalty float32 [I+1]) of an LM run; the one before leaves the memory."""
    if run.folder not in scorer.opened:
        scorer.opened.clear()
        more = (scorer.shard, history_scorer, scorer.ranks)
        scorer.opened[run.folder] = open_run(run, scorer.data, scorer.ranks.device, *more)
    return scorer.opened[run.folder]


def scores_of(scorer: Scorer, run: Run, part: Part, shuffled: bool = False) -> np.ndarray:
    """The run's scores (n, C) of a part, its calibration subtracted; what is not in its folder yet
    is computed and stored there. shuffled: as if each history had another order.
    """
    name = f"scores_{part.split}_{scorer.C}"
    path = run.folder / (f"{name}_shuffled.npy" if shuffled else f"{name}.npy")
    score_nC, missing = scored_so_far(scorer, run, part, path)
    if len(missing) and run.stage == "train_backbone":
        if not shuffled:
            stop_without_scores(run, path, score_nC, part.which)
        score_nC[missing] = shuffled_backbone(scorer, run, part.split, missing)
        store_shuffled(path, score_nC, run, scorer.ranks)
    elif len(missing):
        with alone_at(run, scorer.ranks):  # another process may have added to it just now
            score_nC, missing = scored_so_far(scorer, run, part, path)
            if len(missing):
                score_nC[missing] = scored_by_lm(scorer, run, part.split, missing, shuffled)
                store(path, score_nC, run, scorer.ranks)
    return score_nC[part.which] - penalty_of(run, scorer.data)[part.cand_nC]


def stop_without_scores(run: Run, path: Path, score_nC: np.ndarray, which: np.ndarray) -> NoReturn:
    """Stops: a backbone's folder lacks scores of the samples `which`, or holds some that rank
    nothing."""
    again = "write the file again"
    if is_ours(run):
        again = "train the backbone again: its scores are written at the end of train_backbone.py"
    if path.exists():
        must_be_finite(score_nC, path, which, again)
    begins, _, C = path.stem.rpartition("_")
    have = sorted(p.name for p in run.folder.glob(f"{begins}_*.npy") if "shuffled" not in p.name)
    others = f", but {', '.join(have)} (--candidates)" if have else ""
    stop(f"{path}, scores of {C} candidates, is not there{others}; {again}")


def stored_metrics(
    folder: Path, data: Data, which: np.ndarray | None = None, C: int = 15
) -> dict[str, np.ndarray]:
    """{metric: its value for each sample (n,)} of a run among the candidates, by the scores that
    its folder holds of all test samples, or of those at the places `which`; ties count as in every
    table, which the stored ranks alone cannot tell.
    """
    run = load_run(folder, data)
    part = part_of(data, "test", np.arange(len(data.test)) if which is None else which, C)
    score_nC = scores_in(folder / f"scores_test_{C}.npy", data, "test", C)
    score_nC = score_nC[part.which] - penalty_of(run, data)[part.cand_nC]
    return metrics(*compare(score_nC, part.is_target_nC))


def gain_over(
    value_nR: np.ndarray, other_nR: np.ndarray, data: Data, which: np.ndarray | None = None
) -> np.ndarray:
    """What one run is above another in a metric (n,), or in several (n, R), of all test samples or
    of those at the places `which`: [mean, low, high], the paired difference and the ends of its
    interval over users, (3,) or (3, R).
    """
    gain_nR, test = value_nR - other_nR, np.asarray(data.test)
    owner_n = users(data, test if which is None else test[which])
    return np.stack([gain_nR.mean(0), *interval(gain_nR, owner_n)])


def scored_so_far(
    scorer: Scorer, run: Run, part: Part, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the whole split that are stored, NaN where nobody asked; the places in it that are
    still missing of a part)."""
    score_nC = np.full((len(getattr(scorer.data, part.split)), scorer.C), np.nan, np.float32)
    if path.exists():
        score_nC = np.array(scores_in(path, scorer.data, part.split, scorer.C))
    missing = part.which[~np.isfinite(score_nC[part.which]).all(1)]
    if len(missing) and path.exists() and is_of_another_backbone(run, path.stem):
        if scorer.ranks.main:
            print(
                f"{path} was made with another backbone, so it is made again as far as it is asked "
                "for",
                flush=True,
            )
        score_nC[:] = np.nan
        missing = part.which
    return score_nC, missing


@contextlib.contextmanager
def alone_at(run: Run, ranks: Ranks) -> Iterator[None]:
    """Holds a run's folder while it is scored: a second command that would do the same work, and
    write the same files, is refused."""
    with adding_to(run.folder) if ranks.main else contextlib.nullcontext():
        if ranks.world > 1:
            torch.distributed.barrier()
        yield


def stored(path: Path, empty: np.ndarray) -> np.ndarray:
    """What an earlier evaluation wrote, or `empty` where there was none; the shape must be that of
    empty.
    """
    return np.array(read_npy(path, empty.shape)) if path.exists() else empty


def is_of_another_backbone(run: Run, name: str) -> bool:
    """True if the run lists its candidates by a backbone, and its scores `name` were made with
    another one than the one there now.
    """
    now = listed.digest_now(run)
    return bool(now) and listed.noted(run).get(name, now) != now


def store_ranks(runs: dict[str, Run], value: RowMetrics, test: Part, n: int) -> None:
    """Stores in each run's folder the rank of the target for every sample of the table, among the
    n of the test part; NaN where nobody asked. runs: {row: run}; value: {row: metrics per sample}.
    """

    def add(run, name):
        path = run.folder / f"ranks_test_{test.cand_nC.shape[1]}.npy"
        rank_n = stored(path, np.full(n, np.nan, np.float32))
        rank_n[test.which] = value[name]["rank"]
        write_npy(path, rank_n)

    for name, run in runs.items():
        keep(run, partial(add, run, name))


def keep(run: Run, add: Callable[[], None]) -> None:
    """Adds to a run's folder what was found out about it. Where that cannot be written a line says
    so, and the table is made all the same."""
    stop_if_replaced(run)
    try:
        with adding_to(run.folder, PATIENCE):
            add()
    except OSError as bad:
        print(f"note: not kept in {run.folder}, for the table alone: {bad}", flush=True)


# ---------------------------------------------------------------- an LM


def scored_by_lm(
    scorer: Scorer, run: Run, split: str, which: np.ndarray, shuffled: bool
) -> np.ndarray:
    """Scores (n, C) by the run's LM. One that reads the whole catalogue at once also ranks it: that
    is stored beside (full_test.npy, and the best items in topk_test.npy).
    """
    ranker, penalty_I = opened(scorer, run)
    ranker = replace(ranker, shuffled=shuffled)
    C, ranks = scorer.C, scorer.ranks
    began, name = time.time(), f"{run.folder.name} {split}"
    if split == "test" and reads_all(ranker) and not shuffled:
        score_nC, full, list_nK = score_and_rank(
            ranker, split, which, C, ranks, penalty_I[None], name
        )
        if ranks.main:
            keep(run, partial(store_catalogue, run, len(scorer.data.test), which, full[0], list_nK))
    else:
        score_nC = score_samples(ranker, split, which, C, ranks, name=name)
    scorer.prompts += len(which)
    scorer.seconds += time.time() - began
    return score_nC


def store(path: Path, score_nC: np.ndarray, run: Run, ranks: Ranks) -> None:
    """Stores scores in the folder of their run, and notes which backbone listed the candidates."""

    def add():
        write_npy(path, score_nC)
        if now := listed.digest_now(run):
            listed.note(run, path.stem, now)

    if ranks.main:
        keep(run, add)


def store_catalogue(
    run: Run, n: int, which: np.ndarray, full_n2: np.ndarray, list_nK: np.ndarray
) -> None:
    """Stores what a run says of the whole catalogue for some of the n test samples."""
    store_rows(run.folder / "full_test.npy", n, which, full_n2, empty=-1)
    store_rows(run.folder / "topk_test.npy", n, which, list_nK, empty=0)


def store_rows(path: Path, n: int, which: np.ndarray, rows: np.ndarray, empty: int) -> None:
    """Stores rows of whole numbers for some of n samples beside those there already; `empty` where
    nobody asked.
    """
    whole = stored(path, np.full((n, rows.shape[1]), empty, np.int32))
    whole[which] = rows
    write_npy(path, whole)


# ---------------------------------------------------------------- a backbone, histories shuffled


def shuffled_backbone(scorer: Scorer, run: Run, split: str, which: np.ndarray) -> np.ndarray:
    """Scores (n, C) of a backbone that sees its histories in a random order: what it stored is of
    the real order, and scoring again is quick.
    """
    data = scorer.data
    scores_after = history_scorer(run)
    cand_nC = candidates(data, split, scorer.C, which)
    samples = np.asarray(getattr(data, split))[which]
    score_nC = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(which), BATCH):
        part = samples[i : i + BATCH]
        old_nL = shuffled(histories(data, part, run.history), part)
        s_BI = scores_after([old[old > 0] for old in old_nL])
        score_nC[i : i + BATCH] = np.take_along_axis(s_BI, cand_nC[i : i + BATCH], 1)
    return score_nC


def store_shuffled(path: Path, score_nC: np.ndarray, run: Run, ranks: Ranks) -> None:
    """Stores a backbone's scores; LMs that list by it read them next."""
    if ranks.main:
        with adding_to(run.folder, PATIENCE):
            write_npy(path, score_nC)
    if ranks.world > 1:
        torch.distributed.barrier()
