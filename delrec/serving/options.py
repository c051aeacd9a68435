"""The options of evaluate.py that ask one run for ranked titles."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from delrec.runtime import stop
from delrec.serving.keywords import key_of

answer_options = (
    click.option(
        "--history",
        help="titles, or raw item ids, with ' | ' between them, oldest first: print ranked titles "
        "instead of a table",
    ),
    click.option(
        "--history-json",
        help='the same as a JSON list: a title may hold \' | \', and {"id": "12"} is only an id',
    ),
    click.option("--user", help="the same for a user of the log, by the raw id"),
    click.option("--similar", help="the items most like one, a title or a raw id"),
    click.option(
        "--top",
        default=10,
        type=click.IntRange(1),
        help="with a history, --user and --serve: how many titles",
    ),
    click.option(
        "--only",
        metavar="FILE",
        help="rank only these items: raw ids (or titles), one a line",
    ),
    click.option("--exclude", metavar="FILE", help="rank all but these items: the same"),
    click.option(
        "--where",
        multiple=True,
        metavar="COLUMN=VALUE",
        help="rank only items whose column of items.csv holds this; of one column several values "
        "may be given, and of several columns all must fit",
    ),
    click.option(
        "--keep-seen",
        is_flag=True,
        help="also rank what is in the history: some things are bought again",
    ),
    click.option(
        "--serve",
        help='a file of histories, one JSON object a line: {"history": ["title or id", ..]}; '
        "answers go to --out, or beside the file",
    ),
    click.option(
        "--pool",
        default=100,
        type=click.IntRange(0),
        help="with --history, --user, --serve and --latency: an LM that cannot score the catalogue "
        "in one pass ranks the backbone's best so many items; 0 = all",
    ),
)

TO_ASK = ("--history", "--history-json", "--user", "--serve", "--similar")
# how a question is answered: the flags without which it does nothing
ONLY_WITH = dict.fromkeys(("--top", "--only", "--exclude", "--where", "--keep-seen"), TO_ASK)
ONLY_WITH["--pool"] = (*TO_ASK[:-1], "--latency")


def asks_one_run(cfg: SimpleNamespace, typed: set[str]) -> str | None:
    """The flag that asks one run for something else than a table; None for a table. What says how
    to answer, and nothing is asked, is refused. typed: the names of the flags that were."""
    flags = (*TO_ASK, "--export", "--export-onnx", "--probe", "--free", "--card")
    value = {flag: getattr(cfg, key_of(flag)) for flag in flags}
    given = [flag for flag in flags if value[flag] not in (None, False)]
    if len(given) > 1:
        stop(f"{' and '.join(given)} were given, one at a time is answered; leave the others out")
    for flag, others in ONLY_WITH.items():
        if key_of(flag) in typed and not any(getattr(cfg, key_of(other)) for other in others):
            *some, last = others
            stop(
                f"{flag} belongs to {', '.join(some)} or {last}, and none was given; add one, or "
                f"leave {flag} out"
            )
    return given[0] if given else None


def options_of(cfg: SimpleNamespace) -> dict[str, Any]:
    """What Recommender.plan takes, of what was typed."""
    return {
        "top": cfg.top,
        "keep_seen": cfg.keep_seen,
        "only": lines_of_file(cfg.only, "--only") if cfg.only else None,
        "exclude": lines_of_file(cfg.exclude, "--exclude") if cfg.exclude else None,
        "where": values_of(cfg.where) if cfg.where else None,
    }


def lines_of_file(path: str, flag: str) -> list[str]:
    """The lines of a file that are not blank."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as bad:
        why = getattr(bad, "strerror", None) or "it is not UTF-8"
        stop(f"{flag} {path} cannot be read ({why}); give a file of ids, one a line")
    return [line.strip() for line in text.splitlines() if line.strip()]


def values_of(given: tuple[str, ...]) -> dict[str, list[str]]:
    """{column: the values it may hold} of texts COLUMN=VALUE."""
    values: dict[str, list[str]] = {}
    for text in given:
        column, separator, value = text.partition("=")
        if not separator or not column.strip():
            stop(f"--where {text} names no column and value; give it as --where category=tea")
        values.setdefault(column.strip(), []).append(value.strip())
    return values
