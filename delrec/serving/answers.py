"""Ranked titles for histories from any run (evaluate.py --history, --serve).

A run answers through one function, ranking(...): histories in, scores of the catalogue out.
"""

import difflib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delrec.data.prepared import Data
from delrec.processes import Ranks
from delrec.runtime import stop
from delrec.serving.ranking import ScoresAfter
from delrec.training.log import Log

Unknown = tuple[str, list[str]]  # a title that is not in the catalogue, and the nearest that are

# ---------------------------------------------------------------- titles


def known_titles(data: Data) -> dict[str, int]:
    """{title in lower case: item id}; of equal titles the first."""
    by_title = {}
    for i, t in enumerate(data.titles[1:], 1):
        by_title.setdefault(t.lower(), i)
    return by_title


def find_titles(
    titles: list[str], data: Data, by_title: dict[str, int]
) -> tuple[np.ndarray, list[Unknown]]:
    """(item ids int64 (n,), [(unknown title, nearest titles)]) of some titles. A beginning that
    only one title has is that title.
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


def sentence_of(unknown: list[Unknown]) -> str:
    """The titles that are not in the catalogue, each with the nearest that are."""
    return "; ".join(
        f"no title '{t}'" + (f", nearest: {' | '.join(near)}" if near else "")
        for t, near in unknown
    )


def best_of(s_I: np.ndarray, data: Data, top: int) -> list[dict]:
    """The `top` best items of one history's scores, as [{item, title, score}]."""
    return [
        {"item": int(i), "title": data.titles[i], "score": round(float(s_I[i]), 4)}
        for i in np.argsort(-s_I, kind="stable")[:top]
        if np.isfinite(s_I[i])
    ]


# ---------------------------------------------------------------- one history


def answer_history(
    text: str, data: Data, top: int, open_ranking: Callable[[], ScoresAfter], ranks: Ranks
) -> None:
    """Prints the `top` titles for one history 'title | title'; titles that are not in the catalogue
    are named and left out.

    open_ranking() returns the run's function of histories; it is called once a title is known.
    """
    began = time.time()
    old, unknown = find_titles([t for t in text.split("|") if t.strip()], data, known_titles(data))
    if not len(old):
        stop(
            "the history holds no known title"
            + (f" ({sentence_of(unknown)})" if unknown else "")
            + f"; give titles of {data.folder / 'titles.txt'} with ' | ' between them"
        )
    rank = open_ranking()
    ready = time.time()
    s_I = rank([old])[0]
    ms = 1000 * (time.time() - ready)
    if not ranks.main:
        return
    if unknown:
        print(f"left out: {sentence_of(unknown)}")
    print("history: " + " | ".join(data.titles[i] for i in old))
    best = best_of(s_I, data, top)
    for n, x in enumerate(best, 1):
        print(f"{n:3}. {x['title']}   {x['score']:.3f}")
    print(
        f"{ms:.1f} ms to rank (the first request of a process is the slowest), "
        f"{time.time() - began:.1f} s with loading"
    )
    said = {"history": old.tolist(), "unknown": [t for t, _ in unknown], "top": best}
    print(json.dumps(said | {"ms": round(ms, 2)}, ensure_ascii=False))


# ---------------------------------------------------------------- a file of histories


@dataclass
class Request:
    """One line of a file of histories."""

    given: dict  # what the line holds; the answer repeats it
    old: np.ndarray  # the items of its history that are known, oldest first
    unknown: list[Unknown]  # (title, nearest titles) of those that are not


def answer_file(
    path: Path | str,
    out: Path | str | None,
    data: Data,
    top: int,
    open_ranking: Callable[[], ScoresAfter],
    ranks: Ranks,
) -> None:
    """Answers a file of histories, one JSON object a line with "history" (a list of titles, or
    'title | title'; other keys are copied): the same lines with "top" and "unknown". Written to
    `out`, or beside the file, when all are done.

    open_ranking() returns the run's function of histories; it is called once the file is read.
    """
    requests = read_requests(path, data)
    out = Path(out or f"{Path(path).with_suffix('')}.answers.jsonl")
    rank = open_ranking()
    began = time.time()
    answers = answers_to(requests, data, top, rank, ranks)
    seconds = time.time() - began
    if not ranks.main:
        return
    tmp = Path(f"{out}.tmp")
    lines = [json.dumps(a, ensure_ascii=False) + "\n" for a in answers]
    tmp.write_text("".join(lines), encoding="utf-8")
    os.replace(tmp, out)
    nobody = sum(not len(request.old) for request in requests)
    print(
        f"{len(requests)} histories answered in {out}"
        + (f", {nobody} of them without a known title" if nobody else "")
    )
    said = {"out": str(out), "histories": len(requests), "without_known_title": nobody}
    print(json.dumps(said | {"ms_per_history": round(1000 * seconds / len(requests), 3)}))


def read_requests(path: Path | str, data: Data) -> list[Request]:
    """The requests of a file; one that cannot be read, or has no known title at all, is refused."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as bad:
        stop(
            f"{path} cannot be read as UTF-8 text ({bad}); give a file of JSON objects, one a line"
        )
    by_title = known_titles(data)
    requests = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            titles = given["history"]
            titles = titles.split("|") if isinstance(titles, str) else [t + "" for t in titles]
        except (ValueError, KeyError, TypeError):
            stop(
                f'{path} line {n} is {line[:60]!r}; expected {{"history": ["title", ..]}} or '
                '{"history": "title | title"}'
            )
        old, unknown = find_titles([t for t in titles if t.strip()], data, by_title)
        requests.append(Request(given, old, unknown))
    if not any(len(request.old) for request in requests):
        first = sentence_of(requests[0].unknown) if requests else ""
        stop(
            f"no line of {path} has a known title (line 1: {first or 'none given'}); "
            f"give titles of {data.folder / 'titles.txt'}"
        )
    return requests


def answers_to(
    requests: list[Request], data: Data, top: int, rank: ScoresAfter, ranks: Ranks, batch: int = 64
) -> list[dict]:
    """An answer for each request, in their order: what was given, "top" and "unknown"."""
    answers = []
    log = Log(None, len(requests), "serve", ranks, "history")
    for i in range(0, len(requests), batch):
        part = requests[i : i + batch]
        olds = [request.old for request in part if len(request.old)]
        scored = iter(rank(olds) if olds else ())
        for request in part:
            best = best_of(next(scored), data, top) if len(request.old) else []
            unknown = [{"title": t, "nearest": near} for t, near in request.unknown]
            answers.append({**request.given, "top": best, "unknown": unknown})
        log.step(i + len(part))
    log.close()
    return answers
