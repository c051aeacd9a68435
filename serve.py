"""Ranked titles for histories from any run, and what a run teaches a smaller one (evaluate.py --history, --serve, --export).

Every run answers through one function, ranking(...): a backbone and an LM that reads one state score the whole catalogue; an LM that scores
title by title (likelihood), or lists its candidates, ranks the best of its backbone's.
"""
import difflib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common import CACHE, Log, folder_of, histories, load_run, read_json, read_npy, stop, subset, write_json, write_npy


# ---------------------------------------------------------------- titles

def known_titles(data):
    """Title in lower case -> item id, the first of equals."""
    by_title = {}
    for i, t in enumerate(data.titles[1:], 1):
        by_title.setdefault(t.lower(), i)
    return by_title


def find_titles(titles, data, by_title):
    """Titles -> (item ids int64, [(unknown title, nearest titles)]). A beginning that only one title has is that title."""
    found, unknown = [], []
    for t in titles:
        key = t.strip().lower()
        if key not in by_title:
            starts = [k for k in by_title if key and k.startswith(key)]
            if len(starts) != 1:
                near = starts[:3] or difflib.get_close_matches(key, by_title, 3, 0.5)
                unknown.append((t.strip(), [data.titles[by_title[k]] for k in near]))
                continue
            key = starts[0]
        found.append(by_title[key])
    return np.array(found, np.int64), unknown


def about(unknown):
    return "; ".join(f"no title '{t}'" + (f", nearest: {' | '.join(near)}" if near else "") for t, near in unknown)


# ---------------------------------------------------------------- scores after any history

def backbone_ranking(run):
    """f(list of histories, oldest first) -> scores float32 (B, I+1), padding at -inf."""
    import train_backbone as B
    if not (run.folder / "model.safetensors").exists():
        stop(f"{run.folder} holds lists but no model.safetensors, so it cannot score a new history; for an LM's run give --pool 0, which needs no backbone")
    model = B.load(run.folder)

    @torch.no_grad()
    def f(olds):
        seq = np.zeros((len(olds), run.history), np.int64)
        for row, old in zip(seq, olds):
            tail = old[-run.history:]
            row[run.history - len(tail):] = tail
        return B.score(model, torch.as_tensor(seq)).float().numpy()
    return f


def ranking(run, data, ranks, pool=100, shard=False):
    """f(list of histories as item ids, oldest first) -> scores float32 (B, I+1); -inf: padding, the history, and what was not ranked.

    pool: how many of its backbone's best an LM ranks that cannot score the catalogue in one pass; 0: all items."""
    if run.stage == "train_backbone":
        score = backbone_ranking(run)
    else:
        import lm as L
        r, penalty_I = L.open_run(run, data, ranks.device, shard)
        if L.reads_all(r):
            with torch.no_grad():
                start = L.begin(r.lm, r.prompts.prefix, r.P, r.cache)
            score = lambda olds: L.score_catalogue(r, start, [r.prompts.history(old[-r.history:])[0] for old in olds]) - penalty_I
        else:
            size = min(pool or run.C, run.C) if r.show else pool     # a prompt that lists its candidates ranks as many as it was trained with
            best = pool_of(run, data, size)

            def score(olds):
                s_BI, tails, blocks, owner = np.full((len(olds), data.n_items + 1), -np.inf, np.float32), [], [], []
                for b, (old, items) in enumerate(zip(olds, best(olds))):
                    width = size if r.show else min(50, data.n_items)
                    for block in np.resize(items, (-(-len(items) // width), width)):
                        tails.append(r.prompts.history(old[-r.history:], block)[0]), blocks.append(block), owner.append(b)
                for b, block, s in zip(owner, blocks, L.score_tails(r, tails, np.array(blocks), ranks, "rank")):
                    s_BI[b, block] = s - penalty_I[block]
                return s_BI

    def f(olds):
        s_BI = score(olds)
        for s_I, old in zip(s_BI, olds):
            s_I[0] = s_I[old] = -np.inf
        return s_BI
    return f


def pool_of(run, data, size):
    """f(histories) -> the items an LM ranks after each: the `size` best of its backbone, none of the history (0: the whole catalogue)."""
    backbone = Path(getattr(run, "backbone_run", None) or folder_of("runs", f"{data.name}/sasrec"))
    if not size or size >= data.n_items:
        return lambda olds: [np.setdiff1d(np.arange(1, data.n_items + 1), old) for old in olds]
    if not (backbone / "config.json").exists():
        stop(f"no backbone in {backbone} to choose the {size} titles the LM ranks; train one, or give --pool 0 (slower)")
    score = backbone_ranking(load_run(backbone, data))

    def f(olds):
        s_BI = score(olds)
        for s_I, old in zip(s_BI, olds):
            s_I[old] = -np.inf
        return np.argsort(-s_BI, axis=1, kind="stable")[:, :size]
    return f


def best_of(s_I, data, top):
    return [{"item": int(i), "title": data.titles[i], "score": round(float(s_I[i]), 4)} for i in np.argsort(-s_I, kind="stable")[:top] if np.isfinite(s_I[i])]


# ---------------------------------------------------------------- one history, a file of them

def answer(run, data, text, top, pool, ranks, shard=False):
    """Print the `top` titles for one history 'title | title'; titles that are not in the catalogue are said and left out."""
    began = time.time()
    old, unknown = find_titles([t for t in text.split("|") if t.strip()], data, known_titles(data))
    if not len(old):
        stop("the history holds no known title" + (f" ({about(unknown)})" if unknown else "") + f"; give titles of {data.folder / 'titles.txt'} with ' | ' between them")
    rank = ranking(run, data, ranks, pool, shard)
    ready = time.time()
    s_I = rank([old])[0]
    ms = 1000 * (time.time() - ready)
    if ranks.main:
        if unknown:
            print(f"left out: {about(unknown)}")
        print("history: " + " | ".join(data.titles[i] for i in old))
        pairs = best_of(s_I, data, top)
        for n, x in enumerate(pairs, 1):
            print(f"{n:3}. {x['title']}   {x['score']:.3f}")
        print(f"{ms:.1f} ms to rank (the first request of a process is the slowest), {time.time() - began:.1f} s with loading")
        print(json.dumps({"history": old.tolist(), "unknown": [t for t, _ in unknown], "top": pairs, "ms": round(ms, 2)}, ensure_ascii=False))


def serve(run, data, path, out, top, pool, ranks, shard=False, batch=64):
    """Answers for a file of histories, one JSON object a line with "history" (a list of titles, or 'title | title'; other keys are copied):
    the same lines with "top" and "unknown". Written to `out` when all are done."""
    requests, by_title = [], known_titles(data)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as bad:
        stop(f"{path} cannot be read as UTF-8 text ({bad}); give a file of JSON objects, one a line")
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            titles = request["history"]
            titles = titles.split("|") if isinstance(titles, str) else [t + "" for t in titles]
        except (ValueError, KeyError, TypeError):
            stop(f'{path} line {n} is {line[:60]!r}; expected {{"history": ["title", ..]}} or {{"history": "title | title"}}')
        old, unknown = find_titles([t for t in titles if t.strip()], data, by_title)
        requests.append((request, old, unknown))
    if not any(len(old) for _, old, _ in requests):
        stop(f"no line of {path} has a known title (line 1: {about(requests[0][2]) if requests and requests[0][2] else 'none given'}); "
             f"give titles of {data.folder / 'titles.txt'}")
    out = Path(out or f"{Path(path).with_suffix('')}.answers.jsonl")
    rank, answers = ranking(run, data, ranks, pool, shard), []
    log, began = Log(None, len(requests), "serve", ranks, "history"), time.time()
    for i in range(0, len(requests), batch):
        part = requests[i:i + batch]
        scored = iter(rank([old for _, old, _ in part if len(old)])) if any(len(old) for _, old, _ in part) else iter(())
        for request, old, unknown in part:
            answers.append({**request, "top": best_of(next(scored), data, top) if len(old) else [], "unknown": [{"title": t, "nearest": near} for t, near in unknown]})
        log.step(i + len(part))
    log.close()
    seconds = time.time() - began
    if ranks.main:
        tmp = Path(f"{out}.tmp")
        tmp.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")
        os.replace(tmp, out)
        nobody = sum(not len(old) for _, old, _ in requests)
        print(f"{len(requests)} histories answered in {out}" + (f", {nobody} of them without a known title" if nobody else ""))
        print(json.dumps({"out": str(out), "histories": len(requests), "without_known_title": nobody, "ms_per_history": round(1000 * seconds / len(requests), 3)}))


# ---------------------------------------------------------------- what serving costs

def milliseconds(rank, olds, batch, seconds=3):
    """Median time a request takes when `batch` come at once."""
    spent, began, at = [], time.time(), 0
    rank(olds[:batch])
    while len(spent) < 5 or (time.time() - began < seconds and len(spent) < 200):
        at = (at + batch) % (len(olds) - batch)
        start = time.time()
        rank(olds[at:at + batch])
        spent.append(time.time() - start)
    return 1000 * float(np.median(spent)) / batch


def latencies(run, data):
    """(ms at batch 1 on one core, ms at batch 1, ms a request at batch 64)."""
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"), main=True)
    rank = ranking(run, data, alone)
    olds = [h[h > 0] for h in histories(data, np.asarray(data.test)[subset(len(data.test), 512, 0)], 50)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = milliseconds(rank, olds, 1)
    torch.set_num_threads(threads)
    return one, milliseconds(rank, olds, 1), milliseconds(rank, olds, 64)


def parameters(run):
    """Numbers a run needs to serve."""
    if run.stage == "train_backbone":
        return run.parameters
    from safetensors import safe_open
    from transformers.utils import cached_file
    total, base = 0, run
    while (folder_of("runs", base.llm) / "adapter").is_dir():        # a run as LM: its adapter is merged into its own LM's weights
        base = load_run(base.llm)
    folder = CACHE / base.llm if base.llm == "smollm2-135m" else folder_of("runs", base.llm)
    folder = folder if folder.is_dir() else Path(cached_file(base.llm, "config.json")).parent
    own = [run.folder / name for name in ("items.safetensors", "soft_prompt.safetensors", "adapter/adapter_model.safetensors")]
    for path in [*filter(Path.exists, own), *folder.glob("*.safetensors")]:
        with safe_open(path, "np") as f:
            total += sum(int(np.prod(f.get_slice(k).get_shape())) for k in f.keys())
    return total


# ---------------------------------------------------------------- what a run teaches (DLLM2Rec, arXiv 2405.00338)

@torch.no_grad()
def title_vectors(r, ranks):
    """Z float32 (I+1, D): the mean of the LM's last states over a title's tokens. An LM that never saw titles in training (--input ids) is asked
    without its adapter."""
    import contextlib
    lm, out = r.lm, np.zeros((r.data.n_items + 1, r.lm.head_VD.shape[1]), np.float32)
    body = lm.model.get_encoder() if lm.kind == "encoder-decoder" else lm.model.base_model
    lengths = np.diff(r.titles.ptr)
    order = np.argsort(-lengths[1:], kind="stable") + 1
    log = Log(None, len(order), "title vectors", ranks, "title")
    with lm.adapter.disable_adapter() if r.verbalizer == "items" and hasattr(lm, "adapter") else contextlib.nullcontext():
        for i in range(0, len(order), 128):
            rows = [np.concatenate([lm.start, r.titles.tok[r.titles.ptr[j]:r.titles.ptr[j + 1]], lm.end]).astype(np.int64) for j in order[i:i + 128]]
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
            own = torch.zeros(ids.shape, dtype=torch.bool)
            real = torch.zeros(ids.shape, dtype=torch.long)
            for b, row in enumerate(rows):
                ids[b, :len(row)], real[b, :len(row)] = torch.from_numpy(row), 1
                own[b, len(lm.start):len(row) - len(lm.end)] = True
            more = {} if lm.kind != "decoder" else {"use_cache": False}
            x_BQD = body(input_ids=ids.to(lm.device), attention_mask=real.to(lm.device), **more).last_hidden_state.float().cpu()
            out[order[i:i + 128]] = ((x_BQD * own[..., None]).sum(1) / own.sum(1, keepdim=True)).numpy()
            log.step(min(i + 128, len(order)))
    log.close()
    return out


def made_of(run, data, K, n):
    """What an export was made of, so that an unfinished one is continued by the same only."""
    return {"run": str(run.folder), "llm": run.llm, "trained": getattr(run, "seconds", 0), "best_step": getattr(run, "best_step", 0), "data_hash": data.meta["hash"], "K": K, "samples": n}


@torch.no_grad()
def export(run, data, ranks, K=10, limit=0, shard=False, chunk=1024):
    """RUN/export/ for train_backbone.py --teacher: for every training sample (or `limit` of them) topk.npy int32 (n, K), the run's best items
    over the whole catalogue, none of the history (0: sample not asked); truth.npy float32 (n,) and listed.npy (n, K), the probability it
    gives the true item and the listed ones; titles.npy float32 (I+1, D), the LM's title vectors. An LM that scores title by title ranks its
    backbone's list. Killed, the same command goes on."""
    import lm as L
    folder, tmp = run.folder / "export", run.folder / "export.tmp"
    which = subset(len(data.train), limit, 0)
    made = made_of(run, data, K, len(which))
    if folder.exists() and read_json(folder / "meta.json") | made == read_json(folder / "meta.json"):
        if ranks.main:
            print(f"{folder} is complete")
        return
    r, penalty_I = L.open_run(run, data, ranks.device, shard)
    whole = L.reads_all(r)
    lists = None if whole else backbone_lists(run, data, K)
    if lists is not None:
        which = np.intersect1d(which, np.flatnonzero(lists[:, 0]))
    done = 0
    if ranks.main:
        shutil.rmtree(folder, ignore_errors=True)
        if (tmp / "progress.json").exists() and read_json(tmp / "progress.json")["made"] == made:
            done = read_json(tmp / "progress.json")["done"]
            print(f"continuing after {done} of {len(which)} samples ({tmp})", flush=True)
        else:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
    if ranks.world > 1:
        t = torch.tensor(done, device=ranks.device)
        torch.distributed.broadcast(t, 0)
        done = int(t)
    n, files = len(data.train), {}
    if ranks.main:
        for name, dtype, shape in (("topk", np.int32, (n, K)), ("truth", np.float32, (n,)), ("listed", np.float32, (n, K))):
            files[name] = np.lib.format.open_memmap(tmp / f"{name}.npy", "r+" if done else "w+", dtype, shape)
    log, began, first = Log(None, len(which), "export", ranks, "sample", done), time.time(), done
    for i in range(done, len(which), chunk):
        part = which[i:i + chunk]
        target = data.items[data.train[part]].astype(np.int64)
        olds = [h[h > 0] for h in histories(data, data.train[part], int(np.diff(data.ptr).max()))]
        if whole:
            tails = [r.prompts.history(old[-r.history:])[0] for old in olds]
            rows = L.over_catalogue(r, tails, 2 * K + 1, lambda j, s_BI: rows_of(s_BI - penalty_I, target[j], [olds[x] for x in j], K), ranks, name=None)
        else:
            # the backbone's list, and the truth, where it is not there, for its probability only
            inside = (lists[part] == target[:, None]).any(1)
            cand = np.concatenate([lists[part], np.where(inside, lists[part][:, -1], target)[:, None]], 1)
            tails = [r.prompts.history(old[-r.history:], c)[0] for old, c in zip(olds, cand)]
            s_BC = L.score_tails(r, tails, cand, ranks, "export") - penalty_I[cand]
            s_BI = np.full((len(part), data.n_items + 1), -np.inf, np.float32)
            np.put_along_axis(s_BI, cand, s_BC, 1)
            rows = rows_of(s_BI, target, [old if ok else np.append(old, t) for old, ok, t in zip(olds, inside, target)], K)
        if ranks.main:
            files["topk"][part], files["listed"][part], files["truth"][part] = rows[:, :K].astype(np.int32), rows[:, K:2 * K], rows[:, -1]
            for f in files.values():
                f.flush()
            write_json(tmp / "progress.json", {"done": i + len(part), "made": made})
        log.step(i + len(part))
    log.close()
    rate = (len(which) - first) / max(time.time() - began, 1e-9)
    Z = title_vectors(r, ranks)
    if ranks.main:
        write_npy(tmp / "titles.npy", Z)
        write_json(tmp / "meta.json", {**made, "asked": len(which), "catalogue": "whole" if whole else "the backbone's list", "samples_per_second": round(rate, 1)})
        (tmp / "progress.json").unlink()
        os.replace(tmp, folder)
        print(f"{len(which)} training samples, {rate:.1f} a second; mean probability of the truth {float(np.mean(files['truth'][which])):.4f}, "
              f"among the {K} listed {float((files['topk'][which] == data.items[data.train[which]][:, None]).any(1).mean()):.3f}")
        print(json.dumps({"stage": "export", "out": str(folder), "samples": len(which), "samples_per_second": round(rate, 1)}))


def rows_of(s_BI, target, olds, K):
    """(B, 2K+1): the K best items outside the history, their probabilities, the truth's."""
    p_BI = np.exp(s_BI - s_BI.max(1, keepdims=True))
    p_BI /= p_BI.sum(1, keepdims=True)
    for s_I, old in zip(s_BI, olds):
        s_I[old] = -np.inf
    top = np.argpartition(-s_BI, K - 1, axis=1)[:, :K]
    top = np.take_along_axis(top, np.argsort(-np.take_along_axis(s_BI, top, 1), axis=1, kind="stable"), 1)
    top = np.where(np.isfinite(np.take_along_axis(s_BI, top, 1)), top, 0)
    return np.concatenate([top, np.take_along_axis(p_BI, top, 1) * (top > 0), np.take_along_axis(p_BI, target[:, None], 1)], 1).astype(np.float32)


def backbone_lists(run, data, K):
    """The backbone's lists of the training samples, as many as the run was trained to rank."""
    path = Path(run.backbone_run) / "topk_train.npy"
    if not path.exists():
        stop(f"{run.folder} scores title by title and so ranks its backbone's lists, but there is no {path}; train the backbone with train_backbone.py")
    lists = read_npy(path, (len(data.train), None))
    if lists.shape[1] < max(K, run.C - 1):
        stop(f"{path} lists {lists.shape[1]} items a sample, {max(K, run.C - 1)} are needed; train the backbone with --top-h {max(K, run.C - 1)}")
    return np.asarray(lists[:, :run.C - 1], np.int64)
