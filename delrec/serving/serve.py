"""Ranked titles for histories from any run, and what serving costs (evaluate.py --history, --serve,
--latency).

Every run answers through one function, ranking(...): a backbone and an LM that reads one state
score the whole catalogue; an LM that scores title by title (likelihood), or lists its candidates,
ranks the best of its backbone's.
"""

import difflib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import histories, subset
from delrec.lm.model import is_lm_run
from delrec.lm.ranker import open_run, reads_all, score_catalogue, score_tails
from delrec.lm.reading import read_prefix
from delrec.runtime import CACHE, folder_of, load_run, stop
from delrec.training.log import Log

# ---------------------------------------------------------------- titles


def known_titles(data):
    """Title in lower case -> item id, the first of equals."""
    by_title = {}
    for i, t in enumerate(data.titles[1:], 1):
        by_title.setdefault(t.lower(), i)
    return by_title


def find_titles(titles, data, by_title):
    """Titles -> (item ids int64, [(unknown title, nearest titles)]). A beginning that only one
    title has is that title.
    """
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
    return "; ".join(
        f"no title '{t}'" + (f", nearest: {' | '.join(near)}" if near else "")
        for t, near in unknown
    )


# ---------------------------------------------------------------- scores after any history


def backbone_ranking(run):
    """f(list of histories, oldest first) -> scores float32 (B, I+1), padding at -inf."""
    from delrec.backbone import models

    if not (run.folder / "model.safetensors").exists():
        stop(
            f"{run.folder} holds lists but no model.safetensors, so it cannot score a new history; "
            "for an LM's run give --pool 0, which needs no backbone"
        )
    model = models.load(run.folder)

    @torch.no_grad()
    def f(olds):
        seq = np.zeros((len(olds), run.history), np.int64)
        for row, old in zip(seq, olds):
            tail = old[-run.history :]
            row[run.history - len(tail) :] = tail
        return models.score(model, torch.as_tensor(seq)).float().numpy()

    return f


def ranking(run, data, ranks, pool=100, shard=False):
    """f(list of histories as item ids, oldest first) -> scores float32 (B, I+1); -inf: padding, the
    history, and what was not ranked.

    pool: how many of its backbone's best an LM ranks that cannot score the catalogue in one pass;
    0: all items.
    """
    if run.stage == "train_backbone":
        score = backbone_ranking(run)
    else:
        r, penalty_I = open_run(run, data, ranks.device, shard)
        if reads_all(r):
            with torch.no_grad():
                start = read_prefix(r.lm, r.prompts.prefix, r.P, r.cache)

            def score(olds):
                return (
                    score_catalogue(
                        r, start, [r.prompts.history(old[-r.history :])[0] for old in olds]
                    )
                    - penalty_I
                )
        else:
            # a prompt that lists its candidates ranks as many as it was trained with
            size = min(pool or run.C, run.C) if r.show else pool
            best = pool_of(run, data, size)

            def score(olds):
                s_BI, tails, blocks, owner = (
                    np.full((len(olds), data.n_items + 1), -np.inf, np.float32),
                    [],
                    [],
                    [],
                )
                for b, (old, items) in enumerate(zip(olds, best(olds))):
                    width = size if r.show else min(50, data.n_items)
                    for block in np.resize(items, (-(-len(items) // width), width)):
                        (
                            tails.append(r.prompts.history(old[-r.history :], block)[0]),
                            blocks.append(block),
                            owner.append(b),
                        )
                for b, block, s in zip(
                    owner, blocks, score_tails(r, tails, np.array(blocks), ranks, "rank")
                ):
                    s_BI[b, block] = s - penalty_I[block]
                return s_BI

    def f(olds):
        s_BI = score(olds)
        for s_I, old in zip(s_BI, olds):
            s_I[0] = s_I[old] = -np.inf
        return s_BI

    return f


def pool_of(run, data, size):
    """f(histories) -> the items an LM ranks after each: the `size` best of its backbone, none of
    the history (0: the whole catalogue).
    """
    backbone = Path(
        getattr(run, "backbone_run", None) or folder_of("runs", f"{data.folder_name}/sasrec")
    )
    if not size or size >= data.n_items:
        return lambda olds: [np.setdiff1d(np.arange(1, data.n_items + 1), old) for old in olds]
    if not (backbone / "config.json").exists():
        stop(
            f"no backbone in {backbone} to choose the {size} titles the LM ranks; train one, or "
            "give --pool 0 (slower)"
        )
    score = backbone_ranking(load_run(backbone, data))

    def f(olds):
        s_BI = score(olds)
        for s_I, old in zip(s_BI, olds):
            s_I[old] = -np.inf
        return np.argsort(-s_BI, axis=1, kind="stable")[:, :size]

    return f


def best_of(s_I, data, top):
    return [
        {"item": int(i), "title": data.titles[i], "score": round(float(s_I[i]), 4)}
        for i in np.argsort(-s_I, kind="stable")[:top]
        if np.isfinite(s_I[i])
    ]


# ---------------------------------------------------------------- one history, a file of them


def answer(run, data, text, top, pool, ranks, shard=False):
    """Print the `top` titles for one history 'title | title'; titles that are not in the catalogue
    are said and left out.
    """
    began = time.time()
    old, unknown = find_titles([t for t in text.split("|") if t.strip()], data, known_titles(data))
    if not len(old):
        stop(
            "the history holds no known title"
            + (f" ({about(unknown)})" if unknown else "")
            + f"; give titles of {data.folder / 'titles.txt'} with ' | ' between them"
        )
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
        print(
            f"{ms:.1f} ms to rank (the first request of a process is the slowest), "
            f"{time.time() - began:.1f} s with loading"
        )
        print(
            json.dumps(
                {
                    "history": old.tolist(),
                    "unknown": [t for t, _ in unknown],
                    "top": pairs,
                    "ms": round(ms, 2),
                },
                ensure_ascii=False,
            )
        )


def serve(run, data, path, out, top, pool, ranks, shard=False, batch=64):
    """Answers for a file of histories, one JSON object a line with "history" (a list of titles, or
    'title | title'; other keys are copied): the same lines with "top" and "unknown". Written to
    `out` when all are done.
    """
    requests, by_title = [], known_titles(data)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as bad:
        stop(
            f"{path} cannot be read as UTF-8 text ({bad}); give a file of JSON objects, one a line"
        )
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            titles = request["history"]
            titles = titles.split("|") if isinstance(titles, str) else [t + "" for t in titles]
        except (ValueError, KeyError, TypeError):
            stop(
                f'{path} line {n} is {line[:60]!r}; expected {{"history": ["title", ..]}} or '
                '{"history": "title | title"}'
            )
        old, unknown = find_titles([t for t in titles if t.strip()], data, by_title)
        requests.append((request, old, unknown))
    if not any(len(old) for _, old, _ in requests):
        stop(
            f"no line of {path} has a known title (line 1: "
            f"{about(requests[0][2]) if requests and requests[0][2] else 'none given'}); "
            f"give titles of {data.folder / 'titles.txt'}"
        )
    out = Path(out or f"{Path(path).with_suffix('')}.answers.jsonl")
    rank, answers = ranking(run, data, ranks, pool, shard), []
    log, began = Log(None, len(requests), "serve", ranks, "history"), time.time()
    for i in range(0, len(requests), batch):
        part = requests[i : i + batch]
        scored = (
            iter(rank([old for _, old, _ in part if len(old)]))
            if any(len(old) for _, old, _ in part)
            else iter(())
        )
        for request, old, unknown in part:
            answers.append(
                {
                    **request,
                    "top": best_of(next(scored), data, top) if len(old) else [],
                    "unknown": [{"title": t, "nearest": near} for t, near in unknown],
                }
            )
        log.step(i + len(part))
    log.close()
    seconds = time.time() - began
    if ranks.main:
        tmp = Path(f"{out}.tmp")
        tmp.write_text(
            "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), encoding="utf-8"
        )
        os.replace(tmp, out)
        nobody = sum(not len(old) for _, old, _ in requests)
        print(
            f"{len(requests)} histories answered in {out}"
            + (f", {nobody} of them without a known title" if nobody else "")
        )
        print(
            json.dumps(
                {
                    "out": str(out),
                    "histories": len(requests),
                    "without_known_title": nobody,
                    "ms_per_history": round(1000 * seconds / len(requests), 3),
                }
            )
        )


# ---------------------------------------------------------------- what serving costs


def milliseconds(rank, olds, batch, seconds=3):
    """Median time a request takes when `batch` come at once."""
    spent, began, at = [], time.time(), 0
    rank(olds[:batch])
    while len(spent) < 5 or (time.time() - began < seconds and len(spent) < 200):
        at = (at + batch) % (len(olds) - batch)
        start = time.time()
        rank(olds[at : at + batch])
        spent.append(time.time() - start)
    return 1000 * float(np.median(spent)) / batch


def latencies(run, data):
    """(ms at batch 1 on one core, ms at batch 1, ms a request at batch 64)."""
    alone = SimpleNamespace(
        rank=0,
        world=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        main=True,
    )
    rank = ranking(run, data, alone)
    olds = [
        h[h > 0] for h in histories(data, np.asarray(data.test)[subset(len(data.test), 512, 0)], 50)
    ]
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
    # a run as LM: its adapter is merged into its own LM's weights
    while is_lm_run(base.llm):
        base = load_run(base.llm)
    folder = CACHE / base.llm if base.llm == "smollm2-135m" else folder_of("runs", base.llm)
    folder = folder if folder.is_dir() else Path(cached_file(base.llm, "config.json")).parent
    own = [
        run.folder / name
        for name in (
            "items.safetensors",
            "soft_prompt.safetensors",
            "adapter/adapter_model.safetensors",
        )
    ]
    for path in [*filter(Path.exists, own), *folder.glob("*.safetensors")]:
        with safe_open(path, "np") as f:
            total += sum(int(np.prod(f.get_slice(k).get_shape())) for k in f.keys())  # noqa: SIM118 (no dict)
    return total
