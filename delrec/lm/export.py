"""What an LM run writes for DLLM2Rec's student (arXiv 2405.00338): lists, confidence, the titles'
vectors. train_backbone.py --teacher reads it.
"""

import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import histories, subset
from delrec.lm.listed import backbone_digest
from delrec.lm.ranker import open_run, over_catalogue, reads_all, score_tails
from delrec.runtime import (
    beside,
    empty,
    lock,
    put_in_place,
    read_json,
    read_npy,
    settle,
    stop,
    stop_if_replaced,
    unlock,
    write_json,
    write_npy,
)
from delrec.training.log import Log


@torch.no_grad()
def title_vectors(r, ranks):
    """Z float32 (I+1, D): the mean of the LM's last states over a title's tokens.

    An LM that never saw titles in training (--input ids) is asked without its adapter.
    """
    lm, out = r.lm, None
    body = lm.model.get_encoder() if lm.kind == "encoder-decoder" else lm.body
    lengths = np.diff(r.titles.ptr)
    order = np.argsort(-lengths[1:], kind="stable") + 1
    log = Log(None, len(order), "title vectors", ranks, "title")
    with (
        lm.adapter.disable_adapter()
        if r.verbalizer == "items" and lm.adapter
        else contextlib.nullcontext()
    ):
        for i in range(0, len(order), 128):
            rows = [
                np.concatenate(
                    [lm.start, r.titles.tok[r.titles.ptr[j] : r.titles.ptr[j + 1]], lm.end]
                ).astype(np.int64)
                for j in order[i : i + 128]
            ]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            own = torch.zeros(ids.shape, dtype=torch.bool)
            real = torch.zeros(ids.shape, dtype=torch.long)
            for b, row in enumerate(rows):
                ids[b, : len(row)], real[b, : len(row)] = torch.from_numpy(row), 1
                own[b, len(lm.start) : len(row) - len(lm.end)] = True
            more = {} if lm.kind != "decoder" else {"use_cache": False}
            x_BQD = (
                body(input_ids=ids.to(lm.device), attention_mask=real.to(lm.device), **more)
                .last_hidden_state.float()
                .cpu()
            )
            out = np.zeros((r.data.n_items + 1, x_BQD.shape[2]), np.float32) if out is None else out
            out[order[i : i + 128]] = (
                (x_BQD * own[..., None]).sum(1) / own.sum(1, keepdim=True)
            ).numpy()
            log.step(min(i + 128, len(order)))
    log.close()
    return out


def made_of(run, data, K, n):
    """What an export was made of, so that an unfinished one is continued by the same only."""
    made = {
        "run": str(run.folder),
        "llm": run.llm,
        "trained": getattr(run, "seconds", 0),
        "best_step": getattr(run, "best_step", 0),
        "data_hash": data.meta["hash"],
        "K": K,
        "samples": n,
    }
    s = run.settings
    if reads_all(SimpleNamespace(verbalizer=s["verbalizer"], show=s["show"])):
        return made
    # it ranks that one's lists
    return made | {"backbone_digest": backbone_digest(run.backbone_run)}


@torch.no_grad()
def export(run, data, ranks, K=10, limit=0, shard=False, chunk=1024, overwrite=False):
    """RUN/export/ for train_backbone.py --teacher: for every training sample (or `limit` of them)
    topk.npy int32 (n, K), the run's best items over the whole catalogue, none of the history (0:
    sample not asked); truth.npy float32 (n,) and listed.npy (n, K), the probability it gives the
    true item and the listed ones; titles.npy float32 (I+1, D), the LM's title vectors. An LM that
    scores title by title ranks its backbone's list. Killed, the same command goes on. A complete
    export that was made another way is replaced only with `overwrite`, and only by a complete one.
    """
    folder = run.folder / "export"
    tmp = beside(folder, "unfinished")
    which = subset(len(data.train), limit, 0)
    made = made_of(run, data, K, len(which))
    settle(folder, "meta.json")
    if (folder / "meta.json").exists() and not overwrite:
        have = read_json(folder / "meta.json")
        for key in made:
            if have.get(key, made[key]) != made[key]:
                stop(
                    f"{folder} holds a complete export whose {key.replace('_', ' ')} was "
                    f"{have[key]}, now "
                    f"it is {made[key]}; --overwrite replaces it once the new one is complete"
                )
        if ranks.main:
            print(f"{folder} is complete")
        return
    r, penalty_I = open_run(run, data, ranks.device, shard)
    whole = reads_all(r)
    lists = None if whole else backbone_lists(run, data, K)
    if lists is not None:
        which = np.intersect1d(which, np.flatnonzero(lists[:, 0]))
    done = 0
    if ranks.main:
        lock(tmp)
        if (tmp / "progress.json").exists() and read_json(tmp / "progress.json")["made"] == made:
            done = read_json(tmp / "progress.json")["done"]
            print(f"continuing after {done} of {len(which)} samples ({tmp})", flush=True)
        else:
            empty(tmp)
    if ranks.world > 1:
        t = torch.tensor(done, device=ranks.device)
        torch.distributed.broadcast(t, 0)
        done = int(t)
    n, files = len(data.train), {}
    if ranks.main:
        for name, dtype, shape in (
            ("topk", np.int32, (n, K)),
            ("truth", np.float32, (n,)),
            ("listed", np.float32, (n, K)),
        ):
            files[name] = np.lib.format.open_memmap(
                tmp / f"{name}.npy", "r+" if done else "w+", dtype, shape
            )
    log, began, first = Log(None, len(which), "export", ranks, "sample", done), time.time(), done
    for i in range(done, len(which), chunk):
        part = which[i : i + chunk]
        target = data.items[data.train[part]].astype(np.int64)
        olds = [h[h > 0] for h in histories(data, data.train[part], int(np.diff(data.ptr).max()))]
        if whole:
            tails = [r.prompts.history(old[-r.history :])[0] for old in olds]
            rows = over_catalogue(
                r,
                tails,
                2 * K + 1,
                lambda j, s_BI: rows_of(s_BI - penalty_I, target[j], [olds[x] for x in j], K),
                ranks,
                name=None,
            )
        else:
            # the backbone's list, and the truth, where it is not there, for its probability only
            inside = (lists[part] == target[:, None]).any(1)
            cand = np.concatenate(
                [lists[part], np.where(inside, lists[part][:, -1], target)[:, None]], 1
            )
            tails = [r.prompts.history(old[-r.history :], c)[0] for old, c in zip(olds, cand)]
            s_BC = score_tails(r, tails, cand, ranks, "export") - penalty_I[cand]
            s_BI = np.full((len(part), data.n_items + 1), -np.inf, np.float32)
            np.put_along_axis(s_BI, cand, s_BC, 1)
            rows = rows_of(
                s_BI,
                target,
                [old if ok else np.append(old, t) for old, ok, t in zip(olds, inside, target)],
                K,
            )
        if ranks.main:
            files["topk"][part], files["listed"][part], files["truth"][part] = (
                rows[:, :K].astype(np.int32),
                rows[:, K : 2 * K],
                rows[:, -1],
            )
            for f in files.values():
                f.flush()
            write_json(tmp / "progress.json", {"done": i + len(part), "made": made})
        log.step(i + len(part))
    log.close()
    rate = (len(which) - first) / max(time.time() - began, 1e-9)
    Z = title_vectors(r, ranks)
    if ranks.main:
        write_npy(tmp / "titles.npy", Z)
        write_json(
            tmp / "meta.json",
            {
                **made,
                "asked": len(which),
                "catalogue": "whole" if whole else "the backbone's list",
                "samples_per_second": round(rate, 1),
            },
        )
        (tmp / "progress.json").unlink()
        stop_if_replaced(run)
        put_in_place(folder)
        unlock(tmp)
        true_n1 = data.items[data.train[which]][:, None]
        among = float((files["topk"][which] == true_n1).any(1).mean())
        print(
            f"{len(which)} training samples, {rate:.1f} a second; mean probability of the truth "
            f"{float(np.mean(files['truth'][which])):.4f}, "
            f"among the {K} listed {among:.3f}"
        )
        print(
            json.dumps(
                {
                    "stage": "export",
                    "out": str(folder),
                    "samples": len(which),
                    "samples_per_second": round(rate, 1),
                }
            )
        )


def rows_of(s_BI, target, olds, K):
    """(B, 2K+1): the K best items outside the history, their probabilities, the truth's."""
    p_BI = np.exp(s_BI - s_BI.max(1, keepdims=True))
    p_BI /= p_BI.sum(1, keepdims=True)
    for s_I, old in zip(s_BI, olds):
        s_I[old] = -np.inf
    top = np.argpartition(-s_BI, K - 1, axis=1)[:, :K]
    top = np.take_along_axis(
        top, np.argsort(-np.take_along_axis(s_BI, top, 1), axis=1, kind="stable"), 1
    )
    top = np.where(np.isfinite(np.take_along_axis(s_BI, top, 1)), top, 0)
    return np.concatenate(
        [
            top,
            np.take_along_axis(p_BI, top, 1) * (top > 0),
            np.take_along_axis(p_BI, target[:, None], 1),
        ],
        1,
    ).astype(np.float32)


def backbone_lists(run, data, K):
    """The backbone's lists of the training samples, as many as the run was trained to rank."""
    path = Path(run.backbone_run) / "topk_train.npy"
    if not path.exists():
        stop(
            f"{run.folder} scores title by title and so ranks its backbone's lists, but there is "
            f"no {path}; train the backbone with train_backbone.py"
        )
    lists = read_npy(path, (len(data.train), None))
    if lists.shape[1] < max(K, run.C - 1):
        stop(
            f"{path} lists {lists.shape[1]} items a sample, {max(K, run.C - 1)} are needed; train "
            f"the backbone with --top-h {max(K, run.C - 1)}"
        )
    return np.asarray(lists[:, : run.C - 1], np.int64)
