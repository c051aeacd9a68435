"""Ranked titles for histories from any run (evaluate.py --history, --history-json, --serve).

A run answers through one function, ranking(...): histories in, scores of the catalogue out.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from delrec.data.prepared import Data
from delrec.processes import Ranks
from delrec.runtime import stop
from delrec.serving.lookup import Found, Lookup
from delrec.serving.output import AnswerFile, say, say_json
from delrec.serving.ranking import ScoresAfter
from delrec.serving.requests import Request, catalogue_of, found_in, read_requests
from delrec.training.log import Log


def not_answered(found: Found, data: Data) -> str:
    """Why a history without a known title has no answer: the same of one and of a line of many."""
    unknown = "; ".join(map(str, found.unknown))
    return (
        "the history holds no known title"
        + (f" ({unknown})" if unknown else "")
        + f"; give titles of {catalogue_of(data)}"
    )


def said_of_top(top: int, found: int) -> str:
    """The line about an answer with fewer titles than --top asks for."""
    return (
        f"--top {top}: {found} titles were ranked (none of the history, and an LM may rank a part "
        "of the catalogue: see --pool), so there are no more"
    )


def best_of(s_I: np.ndarray, lookup: Lookup, top: int) -> list[dict]:
    """The `top` best items of one history's scores, as [{item, id, title, score}]."""
    return [
        {
            "item": int(i),
            "id": lookup.ids[i],
            "title": lookup.titles[i],
            "score": round(float(s_I[i]), 4),
        }
        for i in np.argsort(-s_I, kind="stable")[:top]
        if np.isfinite(s_I[i])
    ]


# ---------------------------------------------------------------- one history


def answer_history(
    history: str | list, data: Data, top: int, open_ranking: Callable[[], ScoresAfter], ranks: Ranks
) -> None:
    """Prints the `top` titles for one history, 'title | title' or a list of names; what is not in
    the catalogue is named and left out.

    open_ranking() returns the run's function of histories; it is called once a title is known.
    """
    began = time.time()
    lookup = Lookup(data)
    try:
        found = found_in(history, lookup)
    except ValueError as bad:
        stop(str(bad))
    if not found.items:
        stop(f"{not_answered(found, data)}; with ' | ' between them")
    rank = open_ranking()
    ready = time.time()
    s_I = rank([np.array(found.items, np.int64)])[0]
    ms = 1000 * (time.time() - ready)
    if not ranks.main:
        return
    best, ids = best_of(s_I, lookup, top), [lookup.ids[i] for i in found.items]
    unknown = "; ".join(map(str, found.unknown))
    say(
        *([f"left out: {unknown}"] if unknown else []),
        "history: " + " | ".join(lookup.titles[i] for i in found.items),
        "its ids: " + " | ".join(ids),
        *(f"{n:3}. {x['title']}   {x['score']:.3f}   id {x['id']}" for n, x in enumerate(best, 1)),
        *([said_of_top(top, len(best))] if len(best) < top else []),
        *(f"note: {remark}" for remark in found.remarks),
        f"{ms:.1f} ms to rank (the first request of a process is the slowest), "
        f"{time.time() - began:.1f} s with loading",
    )
    said = {"history": found.items, "history_ids": ids, "top": best}
    said |= {"unknown": [u.asked.text for u in found.unknown], "remarks": found.remarks}
    say_json(said | {"ms": round(ms, 2)})


# ---------------------------------------------------------------- a file of histories


def answer_file(
    path: Path | str,
    out: Path | str | None,
    data: Data,
    top: int,
    open_ranking: Callable[[], ScoresAfter],
    ranks: Ranks,
) -> None:
    """Answers a file of histories, one JSON object a line with "history" (a list of names, or
    'title | title'; other keys are copied): the same lines with "history_ids", "top", "unknown" and
    "remarks", or with "error" where a line cannot be read or has no known title. Written to `out`,
    or beside the file.

    open_ranking() returns the run's function of histories; it is called once the file is read.
    """
    lookup = Lookup(data)
    requests = read_requests(path, data, lookup)
    out = Path(out or f"{Path(path).with_suffix('')}.answers.jsonl")
    file = AnswerFile(out, Path(path)) if ranks.main else None
    least = top  # titles of an answer
    try:
        rank = open_ranking()
        began = time.time()
        for answers in answers_to(requests, data, lookup, top, rank, ranks):
            least = min([least, *(len(a["top"]) for a in answers if "error" not in a)])
            if file:
                file.add(answers)
        seconds = time.time() - began
    except BaseException:
        if file:
            file.give_up()
        raise
    if file:
        file.close()
        if least < top:
            say(said_of_top(top, least))
        say_what_was_answered(requests, out, seconds)


def say_what_was_answered(requests: list[Request], out: Path, seconds: float) -> None:
    """Prints how many requests were answered, and which lines could not be read."""
    errors = [request.error for request in requests if request.error]
    nobody = sum(not request.found.items for request in requests) - len(errors)
    said = sum(bool(request.found.remarks) for request in requests)
    more = [f"{len(errors) - 10} more lines cannot be read"] if len(errors) > 10 else []
    say(
        *errors[:10],
        *more,
        f"{len(requests) - len(errors)} histories answered in {out}"
        + (f", {nobody} of them without a known title" if nobody else "")
        + (f', {said} of them with "remarks" on names that several items have' if said else "")
        + (f'; {len(errors)} lines cannot be read, their answers hold "error"' if errors else ""),
    )
    counts = {"out": str(out), "histories": len(requests), "without_known_title": nobody}
    counts |= {"unreadable": len(errors), "with_remarks": said}
    say_json(counts | {"ms_per_history": round(1000 * seconds / len(requests), 3)})


def answers_to(
    requests: list[Request],
    data: Data,
    lookup: Lookup,
    top: int,
    rank: ScoresAfter,
    ranks: Ranks,
    batch: int = 64,
) -> Iterator[list[dict]]:
    """Yields the answers, some at a time, in the order of the requests."""
    log = Log(None, len(requests), "serve", ranks, "history")
    for at in range(0, len(requests), batch):
        part = requests[at : at + batch]
        olds = [np.array(r.found.items, np.int64) for r in part if r.found.items]
        scored = iter(rank(olds) if olds else ())
        yield [
            answer_to(request, best_of(next(scored), lookup, top), data, lookup)
            if request.found.items
            else answer_to(request, [], data, lookup)
            for request in part
        ]
        with contextlib.suppress(OSError):  # nobody looks at the progress: the work goes on
            log.step(at + len(part))
    log.close()


def answer_to(request: Request, best: list[dict], data: Data, lookup: Lookup) -> dict:
    """The answer to a request: what was given, the items it was read as, and the best."""
    found = request.found
    answer = request.given | {
        "history_ids": [lookup.ids[i] for i in found.items],
        "top": best,
        "unknown": [
            {"id" if u.asked.kind == "id" else "title": u.asked.text, "nearest": u.nearest}
            for u in found.unknown
        ],
        "remarks": found.remarks,
    }
    error = request.error
    if not error and not found.items:
        error = not_answered(found, data)
    return answer | ({"error": error} if error else {})
