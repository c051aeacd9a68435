"""Ranked titles for histories on the command line (evaluate.py --history, --user, --serve): a
Recommender's answers, printed or written into a file.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delrec.data.prepared import Data
from delrec.processes import Ranks
from delrec.runtime import stop
from delrec.serving.answerer import Answerer, Plan
from delrec.serving.asking import Question, found_of, questions
from delrec.serving.lookup import Found, told
from delrec.serving.output import AnswerFile, say, say_json
from delrec.serving.requests import Request, catalogue_of, read_requests
from delrec.serving.results import Answer, Refused
from delrec.training.log import Log

BATCH = 64  # requests that are answered at once


def not_answered(found: Found, data: Data) -> str:
    """Why a history without a known title has no answer: the same of one and of a line of many."""
    unknown = told(found.unknown)
    return (
        "the history holds no known title"
        + (f" ({unknown})" if unknown else "")
        + f"; give titles of {catalogue_of(data)}"
    )


@contextlib.contextmanager
def on_the_command_line() -> Iterator[None]:
    """What an Answerer refuses is refused as commands do it."""
    try:
        yield
    except Refused as bad:
        stop(str(bad))


def listed(answerer: Answerer, answer: Answer) -> list[dict]:
    """The items of an answer as [{item, id, title, score, ..}]."""
    number_of = answerer.catalogue.lookup.by_id
    return [
        {"item": number_of[x.id], "id": x.id, "title": x.title, "score": round(x.score, 4)}
        | ({} if x.probability is None else {"probability": round(x.probability, 6)})
        for x in answer.items
    ]


# ---------------------------------------------------------------- one history


def answer_history(answerer: Answerer, ranks: Ranks, options: dict[str, Any], **who: Any) -> None:
    """Prints the best titles for one history, 'title | title' or a list of names (history=), or for
    a user of the log (user=); what is not in the catalogue is named and left out. options: as of
    Answerer.plan.
    """
    began = time.time()
    with on_the_command_line():
        (question,), _ = questions(answerer.catalogue, **who)
        plan = answerer.plan(**options)
        if not question.found.items and not question.user:
            said = not_answered(question.found, answerer.catalogue.data)
            stop(f"{said}; with ' | ' between them")
        answerer.open()
        ready = time.time()
        answer = next(answerer.answers([question], plan))
    ms = 1000 * (time.time() - ready)
    if not ranks.main:
        return
    best = listed(answerer, answer)
    say(
        *lines_of(answerer, question, answer),
        f"{ms:.1f} ms to rank (the first request of a process is the slowest), "
        f"{time.time() - began:.1f} s with loading",
    )
    said = {"history": question.found.items, "history_ids": list(answer.history), "top": best}
    said |= {"unknown": [u.asked.text for u in answer.unknown], "remarks": list(answer.remarks)}
    say_json(said | {"popular": answer.popular, "ms": round(ms, 2)})


def lines_of(answerer: Answerer, question: Question, answer: Answer) -> list[str]:
    """What is printed of an answer."""
    titles = answerer.catalogue.lookup.titles
    unknown = told(answer.unknown)
    return [
        *([f"left out: {unknown}"] if unknown else []),
        "history: " + " | ".join(titles[i] for i in question.found.items),
        "its ids: " + " | ".join(answer.history),
        *ranked_lines(answer),
    ]


def ranked_lines(answer: Answer) -> list[str]:
    """What is printed of the items of an answer."""
    return [
        *(["no history is known: these are what most people took"] if answer.popular else []),
        *(
            f"{n:3}. {x.title}   {x.score:.3f}   id {x.id}"
            + ("   (no history: by its title)" if x.is_new else "")
            for n, x in enumerate(answer.items, 1)
        ),
        *([f"note: {answer.short}"] if answer.short else []),
        *(f"note: {remark}" for remark in answer.remarks),
    ]


def answer_similar(answerer: Answerer, ranks: Ranks, options: dict[str, Any], item: str) -> None:
    """Prints the items most like one, a title or a raw id. options: as of Answerer.plan."""
    with on_the_command_line():
        plan = answerer.plan(**options)
        found = found_of(answerer.catalogue, [item], "either")
        answer = next(answerer.alike([Question(found)], plan))
    if ranks.main:
        title = answerer.catalogue.lookup.titles[found.items[-1]]
        say(f"like: {title}   id {answer.history[0]}", *ranked_lines(answer))
        say_json({"like": answer.history[0], "top": listed(answerer, answer)})


# ---------------------------------------------------------------- a file of histories


def answer_file(
    answerer: Answerer,
    ranks: Ranks,
    options: dict[str, Any],
    path: Path | str,
    out: Path | str | None,
) -> None:
    """Answers a file of histories, one JSON object a line with "history" (a list of names, or
    'title | title'; other keys are copied): the same lines with "history_ids", "top", "unknown" and
    "remarks", or with "error" where a line cannot be read or has no known title. Written to `out`,
    or beside the file. options: as of Answerer.plan.
    """
    catalogue = answerer.catalogue
    with on_the_command_line():
        plan = answerer.plan(**options)
    requests = read_requests(path, catalogue.data, catalogue.lookup)
    out = Path(out or f"{Path(path).with_suffix('')}.answers.jsonl")
    file = AnswerFile(out, Path(path)) if ranks.main else None
    short = []  # why answers have fewer titles than were asked for
    try:
        answerer.open()
        began = time.time()
        with on_the_command_line():
            for answers in answers_to(requests, answerer, plan, ranks, short):
                if file:
                    file.add(answers)
        seconds = time.time() - began
    except BaseException:
        if file:
            file.give_up()
        raise
    if file:
        file.close()
        strange = told(plan.unknown)
        say(*([f"left out of the filters: {strange}"] if strange else []))
        say(*(f"note: {said}" for said in short[:1]))
        say_what_was_answered(requests, out, seconds)


def say_what_was_answered(requests: list[Request], out: Path, seconds: float) -> None:
    """Prints how many requests were answered, and which lines could not be: those that cannot be
    read, and those without a known title.
    """
    errors = [request.error for request in requests if request.error]
    nobody = sum(not request.found.items for request in requests) - len(errors)
    answered = len(requests) - len(errors) - nobody
    said = sum(bool(request.found.items and request.found.remarks) for request in requests)
    more = [f"{len(errors) - 10} more lines cannot be read"] if len(errors) > 10 else []
    say(
        *errors[:10],
        *more,
        f"{answered} histories answered in {out}"
        + (f', {said} of them with "remarks" on names that several items have' if said else "")
        + (f'; {nobody} lines have no known title, their answers hold "error"' if nobody else "")
        + (f'; {len(errors)} lines cannot be read, their answers hold "error"' if errors else ""),
    )
    counts = {"out": str(out), "histories": len(requests), "without_known_title": nobody}
    counts |= {"unreadable": len(errors), "with_remarks": said}
    say_json(counts | {"ms_per_history": round(1000 * seconds / answered, 3)})


def answers_to(
    requests: list[Request],
    answerer: Answerer,
    plan: Plan,
    ranks: Ranks,
    short: list[str],
) -> Iterator[list[dict]]:
    """Yields the answers, some at a time, in the order of the requests; adds to `short` why some
    have fewer titles.
    """
    log = Log(None, len(requests), "serve", ranks, "history")
    for at in range(0, len(requests), BATCH):
        part = requests[at : at + BATCH]
        asked = [Question(request.found) for request in part if request.found.items]
        answers = answerer.answers(asked, plan)
        said = []
        for request in part:
            answer = next(answers) if request.found.items else None
            if answer and answer.short:
                short.append(answer.short)
            said.append(answer_to(request, answer, answerer))
        yield said
        with contextlib.suppress(OSError):  # nobody looks at the progress: the work goes on
            log.step(at + len(part))
    log.close()


def answer_to(request: Request, answer: Answer | None, answerer: Answerer) -> dict:
    """The answer to a request: what was given, the items it was read as, and the best."""
    found = request.found
    line = request.given | {
        "history_ids": list(answer.history) if answer else [],
        "top": listed(answerer, answer) if answer else [],
        "unknown": [
            {"id" if u.asked.kind == "id" else "title": u.asked.text, "nearest": u.nearest}
            for u in found.unknown
        ],
        "remarks": found.remarks,
    }
    error = request.error
    if not error and not found.items:
        error = not_answered(found, answerer.catalogue.data)
    return line | ({"error": error} if error else {})
