"""What an LM run writes for DLLM2Rec's student (arXiv 2405.00338): lists, confidence, the titles'
vectors. train_backbone.py --teacher reads it.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import Data, histories, subset
from delrec.data.run_files import lists_in
from delrec.files import new_npy
from delrec.lm import crossfit
from delrec.lm.crossfit import Part
from delrec.lm.hints import hint_of_best
from delrec.lm.items import show_fold
from delrec.lm.listed import backbone_digest
from delrec.lm.model import LM
from delrec.lm.ragged import ragged
from delrec.lm.ranker import Ranker, open_run, over_catalogue, reads_all, score_listed
from delrec.lm.residual import ScoresOf
from delrec.processes import Ranks
from delrec.runtime import (
    Run,
    beside,
    complete_renames,
    empty,
    lock,
    place_of,
    put_in_place,
    read_json,
    stop,
    stop_if_replaced,
    unlock,
    write_json,
    write_npy,
)
from delrec.training.log import Log

BATCH = 128  # titles of a pass

CHUNK = 1024  # samples between two writes


# ---------------------------------------------------------------- the titles' vectors


@torch.no_grad()
def title_vectors(r: Ranker, ranks: Ranks) -> np.ndarray:
    """Z float32 (I+1, D): the mean of the LM's last states over a title's tokens.

    An LM that never saw titles in training (--input ids) is asked without its adapter.
    """
    order = np.argsort(-np.diff(r.titles.ptr)[1:], kind="stable") + 1
    log = Log(None, len(order), "title vectors", ranks, "title")
    vectors_ID = None
    unadapted = contextlib.nullcontext()
    if r.verbalizer == "items" and r.lm.adapter:
        unadapted = r.lm.adapter.disable_adapter()
    with unadapted:
        for i in range(0, len(order), BATCH):
            z_BD = mean_states(r.lm, [r.titles.of(j) for j in order[i : i + BATCH]])
            if vectors_ID is None:
                vectors_ID = np.zeros((r.data.n_items + 1, z_BD.shape[1]), np.float32)
            vectors_ID[order[i : i + BATCH]] = z_BD
            log.step(min(i + BATCH, len(order)))
    log.close()
    return vectors_ID


def mean_states(lm: LM, titles: list[np.ndarray]) -> np.ndarray:
    """The mean of the LM's last states over each title's own tokens: float32 (B, D)."""
    rows = [np.concatenate([lm.start, title, lm.end]).astype(np.int64) for title in titles]
    ids_BQ = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    own_BQ = torch.zeros(ids_BQ.shape, dtype=torch.bool)
    real_BQ = torch.zeros(ids_BQ.shape, dtype=torch.long)
    for b, row in enumerate(rows):
        ids_BQ[b, : len(row)] = torch.from_numpy(row)
        real_BQ[b, : len(row)] = 1
        own_BQ[b, len(lm.start) : len(row) - len(lm.end)] = True
    body = lm.model.get_encoder() if lm.kind == "encoder-decoder" else lm.body
    more = {"use_cache": False} if lm.kind == "decoder" else {}
    out = body(input_ids=ids_BQ.to(lm.device), attention_mask=real_BQ.to(lm.device), **more)
    x_BQD = out.last_hidden_state.float().cpu()
    return ((x_BQD * own_BQ[..., None]).sum(1) / own_BQ.sum(1, keepdim=True)).numpy()


# ---------------------------------------------------------------- one export, whole or not yet


def made_of(run: Run, data: Data, K: int, n: int) -> dict:
    """What an export was made of, so that an unfinished one is continued by the same only."""
    made = {
        "run": place_of(run, run.folder),
        "llm": place_of(run, run.llm),
        "trained": getattr(run, "seconds", 0),
        "best_step": getattr(run, "best_step", 0),
        "data_hash": data.meta["hash"],
        "K": K,
        "samples": n,
    }
    if ranks_all(run):
        return made
    # it ranks that one's lists
    return made | {"backbone_digest": backbone_digest(run.backbone_run)}


def ranks_all(run: Run) -> bool:
    """True for a run that ranks the whole catalogue; another ranks its backbone's lists."""
    s = run.settings
    return reads_all(SimpleNamespace(verbalizer=s["verbalizer"], show=s["show"]))


def must_be_made_so(folder: Path, made: dict) -> None:
    """Stops where the complete export in `folder` was made of something else."""
    have = read_json(folder / "meta.json")
    for key in made:
        if have[key] != made[key]:
            stop(
                f"{folder} holds a complete export whose {key.replace('_', ' ')} was "
                f"{have[key]}, now "
                f"it is {made[key]}; --overwrite replaces it once the new one is complete"
            )


def samples_done(tmp: Path, made: dict, n: int, ranks: Ranks) -> int:
    """How many of the n samples an unfinished export of the same has, the same on every rank; the
    folder is now this process's, empty where nothing is continued."""
    done = 0
    if ranks.main:
        lock(tmp)
        progress = tmp / "progress.json"
        if progress.exists() and read_json(progress)["made"] == made:
            done = read_json(progress)["done"]
            print(f"continuing after {done} of {n} samples ({tmp})", flush=True)
        else:
            empty(tmp)
    if ranks.world > 1:
        t = torch.tensor(done, device=ranks.device)
        torch.distributed.broadcast(t, 0)
        done = int(t)
    return done


@dataclass
class Files:
    """The arrays of an export, a row a training sample, written as they are filled."""

    topk: np.ndarray  # int32 (n, K): the run's best items, 0 where there is none
    truth: np.ndarray  # float32 (n,): the probability of the true item
    listed: np.ndarray  # float32 (n, K): those of the listed ones

    def store(self, samples: np.ndarray, rows: np.ndarray) -> None:
        """Writes the rows (B, 2K+1) of some samples (see rows_of)."""
        K = self.topk.shape[1]
        self.topk[samples] = rows[:, :K].astype(np.int32)
        self.listed[samples] = rows[:, K : 2 * K]
        self.truth[samples] = rows[:, -1]
        for file in (self.topk, self.truth, self.listed):
            file.flush()


def open_files(tmp: Path, n: int, K: int, new: bool) -> Files:
    """The files of an export of n samples, new or to be continued."""

    def array(name, dtype, shape):
        return new_npy(tmp / name, dtype, shape) if new else np.load(tmp / name, mmap_mode="r+")

    return Files(
        topk=array("topk.npy", np.int32, (n, K)),
        truth=array("truth.npy", np.float32, (n,)),
        listed=array("listed.npy", np.float32, (n, K)),
    )


# ---------------------------------------------------------------- the command


@torch.no_grad()
def export(
    run: Run, data: Data, ranks: Ranks, cfg: SimpleNamespace, scores_of: ScoresOf | None = None
) -> None:
    """Writes RUN/export/, what train_backbone.py --teacher reads: for every training sample (or
    `limit` of them) topk.npy int32 (n, K), the run's best items over the whole catalogue, none of
    the history (0: sample not asked); truth.npy float32 (n,) and listed.npy (n, K), the probability
    it gives the true item and the listed ones; titles.npy float32 (I+1, D), title vectors. A run
    that scores title by title ranks its backbone's list. Killed, the same command goes on. A whole
    export that was made another way is replaced only with `overwrite`, and only by a whole one.

    cfg: export_k (K), limit, overwrite, shard, folds (runs --without-fold, which answer in the
    run's place). scores_of: as of open_run.
    """
    folder, K = run.folder / "export", cfg.export_k
    which = subset(len(data.train), cfg.limit, 0)
    made = made_of(run, data, K, len(which))
    parts = crossfit.parts_of(run, cfg.folds, data, which)
    made |= crossfit.told(parts)
    complete_renames(folder, "meta.json")
    if (folder / "meta.json").exists() and not cfg.overwrite:
        must_be_made_so(folder, made)
        if ranks.main:
            print(f"{folder} is complete")
        return
    lists = None if ranks_all(run) else backbone_lists(run, data, K)
    if lists is not None:
        which = np.intersect1d(which, np.flatnonzero(lists[:, 0]))
        parts = crossfit.parts_of(run, cfg.folds, data, which)
    tmp = beside(folder, "unfinished")
    first = samples_done(tmp, made, len(which), ranks)
    files = open_files(tmp, len(data.train), K, new=not first) if ranks.main else None
    log = Log(None, len(which), "export", ranks, "sample", first)
    lms, done, began = Opened(data, ranks, cfg.shard, scores_of), first, time.time()
    for samples, rows in answers(lms, parts, lists, K, first):
        done += len(samples)
        if ranks.main:
            files.store(samples, rows)
            write_json(tmp / "progress.json", {"done": done, "made": made})
        log.step(done)
    log.close()
    rate = (len(which) - first) / max(time.time() - began, 1e-9)
    Z = title_vectors(lms.of(run)[0], ranks)
    if ranks.main:
        write_npy(tmp / "titles.npy", Z)
        told = {
            **made,
            "asked": len(which),
            "catalogue": "whole" if lists is None else "the backbone's list",
            "samples_per_second": round(rate, 1),
        }
        write_json(tmp / "meta.json", told)
        (tmp / "progress.json").unlink()
        stop_if_replaced(run)
        put_in_place(folder)
        unlock(tmp)
        report(folder, files, data, which, rate)


@dataclass
class Opened:
    """The run that answers now, as a ranker; one at a time, as an LM fills the memory."""

    data: Data
    ranks: Ranks
    shard: bool
    scores_of: ScoresOf | None = None  # as of open_run
    folder: Path | None = None  # the run's
    found: tuple[Ranker, np.ndarray] | None = None  # the ranker, and what it subtracts per item

    def of(self, run: Run, fold: int | None = None) -> tuple[Ranker, np.ndarray]:
        """A run as a ranker that is shown the item vectors of a fold, and its penalty (I+1,)."""
        if self.folder != run.folder:
            self.found = None
            more = (self.shard, self.scores_of, self.ranks)
            self.found = open_run(run, self.data, self.ranks.device, *more)
            self.folder = run.folder
        lm = self.found[0].lm
        if fold is not None and lm.items is not None:
            show_fold(lm, run, fold)
        return self.found


def answers(
    lms: Opened, parts: list[Part], lists: np.ndarray | None, K: int, first: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(samples, their rows (B, 2K+1): see rows_of) of all parts one after the other, without the
    first so many samples, which are done. lists: the backbone's, None: over the whole catalogue."""
    for part in parts:
        todo = part.samples[first:]
        first = max(first - len(part.samples), 0)
        for i in range(0, len(todo), CHUNK):
            samples = todo[i : i + CHUNK]
            r, penalty_I = lms.of(part.run, part.fold)
            if lists is None:
                yield samples, rows_over_catalogue(r, penalty_I, samples, K, lms.ranks)
            else:
                listed = lists[samples]
                yield samples, rows_of_lists(r, penalty_I, samples, listed, K, lms.ranks)


def report(folder: Path, files: Files, data: Data, which: np.ndarray, rate: float) -> None:
    """Prints what an export holds: a line to read, and one JSON object."""
    K = files.topk.shape[1]
    true_n1 = data.items[data.train[which]][:, None]
    among = float((files.topk[which] == true_n1).any(1).mean())
    print(
        f"{len(which)} training samples, {rate:.1f} a second; mean probability of the truth "
        f"{float(np.mean(files.truth[which])):.4f}, "
        f"among the {K} listed {among:.3f}"
    )
    told = {
        "stage": "export",
        "out": str(folder),
        "samples": len(which),
        "samples_per_second": round(rate, 1),
    }
    print(json.dumps(told))


# ---------------------------------------------------------------- what the LM says of some samples


def targets_and_histories(data: Data, samples: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The true items (B,) of some training samples, and all items before each."""
    target_B = data.items[data.train[samples]].astype(np.int64)
    longest = int(np.diff(data.ptr).max())
    return target_B, [h[h > 0] for h in histories(data, data.train[samples], longest)]


def rows_over_catalogue(
    r: Ranker, penalty_I: np.ndarray, samples: np.ndarray, K: int, ranks: Ranks
) -> np.ndarray:
    """The rows (B, 2K+1) of some training samples, over the whole catalogue."""
    target_B, olds = targets_and_histories(r.data, samples)
    tails, _ = r.prompts.histories(ragged([old[-r.history :] for old in olds]))

    def rows(j, s_BI):
        return rows_of(s_BI - penalty_I, target_B[j], [olds[x] for x in j], K)

    return over_catalogue(r, tails, 2 * K + 1, rows, ranks, None, olds)


def rows_of_lists(
    r: Ranker, penalty_I: np.ndarray, samples: np.ndarray, list_BC: np.ndarray, K: int, ranks: Ranks
) -> np.ndarray:
    """The rows (B, 2K+1) of some training samples, over the backbone's lists; the truth, where it
    is not listed, is scored for its probability only."""
    target_B, olds = targets_and_histories(r.data, samples)
    inside_B = (list_BC == target_B[:, None]).any(1)
    last_B = np.where(inside_B, list_BC[:, -1], target_B)
    cand_BC = np.concatenate([list_BC, last_B[:, None]], 1)
    shown, hint_Bh = ragged([old[-r.history :] for old in olds]), hint_of_best(r.settings, cand_BC)
    s_BC = score_listed(r, shown, cand_BC, hint_Bh, ranks, "export", olds)
    s_BC -= penalty_I[cand_BC]
    s_BI = np.full((len(samples), r.data.n_items + 1), -np.inf, np.float32)
    np.put_along_axis(s_BI, cand_BC, s_BC, 1)
    s_BI[:, 0] = -np.inf  # no item, but the end of a list that has no more
    unranked = [
        old if inside else np.append(old, true)
        for old, inside, true in zip(olds, inside_B, target_B)
    ]
    return rows_of(s_BI, target_B, unranked, K)


def rows_of(
    s_BI: np.ndarray, target_B: np.ndarray, unranked: list[np.ndarray], K: int
) -> np.ndarray:
    """(B, 2K+1): the K best items but those of `unranked`, their probabilities, the truth's."""
    p_BI = np.exp(s_BI - s_BI.max(1, keepdims=True))
    p_BI /= p_BI.sum(1, keepdims=True)
    for s_I, items in zip(s_BI, unranked):
        s_I[items] = -np.inf
    top_BK = np.argpartition(-s_BI, K - 1, axis=1)[:, :K]
    order_BK = np.argsort(-np.take_along_axis(s_BI, top_BK, 1), axis=1, kind="stable")
    top_BK = np.take_along_axis(top_BK, order_BK, 1)
    top_BK = np.where(np.isfinite(np.take_along_axis(s_BI, top_BK, 1)), top_BK, 0)
    p_BK = np.take_along_axis(p_BI, top_BK, 1) * (top_BK > 0)
    p_true_B1 = np.take_along_axis(p_BI, target_B[:, None], 1)
    return np.concatenate([top_BK, p_BK, p_true_B1], 1).astype(np.float32)


def backbone_lists(run: Run, data: Data, K: int) -> np.ndarray:
    """The backbone's lists of the training samples, as many as the run was trained to rank."""
    path = Path(run.backbone_run) / "topk_train.npy"
    if not path.exists():
        stop(
            f"{run.folder} scores title by title and so ranks its backbone's lists, but there is "
            f"no {path}; train the backbone with train_backbone.py"
        )
    lists = lists_in(path, data, "train")
    needed = run.C - 1
    if needed < K:
        stop(
            f"{run.folder} ranks {needed} items and the truth, as it was trained to, --export-k is "
            f"{K}; lower it to {needed}"
        )
    if lists.shape[1] < needed:
        stop(
            f"{path} lists {lists.shape[1]} items a sample, {needed} are needed; train "
            f"the backbone again with train_backbone.py --top-h {needed} --overwrite and its other "
            "flags as before"
        )
    return np.asarray(lists[:, : run.C - 1], np.int64)
