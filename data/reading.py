"""Which reader takes what a user names: a data set known by name, a publisher's files of another
category or release, or a log of one's own.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import click
from click.core import ParameterSource

from delrec.data.amazon import categories, category_of
from delrec.data.fetch import fetch_ml100k
from delrec.data.hints import FLAGS, Columns, Request
from delrec.data.log import Log
from delrec.data.movielens import is_movielens
from delrec.data.own import read_file, read_own
from delrec.data.own_files import is_own_log, with_file
from delrec.data.sources import SOURCES, Source, amazon, movielens, read_source
from delrec.runtime import stop


@dataclass
class Place:
    """Where the user says the log is; all None: it is fetched."""

    raw: Path | None  # a folder
    interactions: Path | None  # a file
    items: Path | None  # a table of titles beside it


@dataclass
class Found:
    """A log, and what is known of its data set."""

    log: Log
    source: Source | None  # None: a log of one's own
    words: dict[str, str]  # noun and verb of its prompts


def command_as_typed(context: click.Context) -> str:
    """The command as it was typed, without the columns' flags."""
    words = ["python data/prepare.py", shlex.quote(context.params["name"])]
    for option in context.command.params:
        source = context.get_parameter_source(option.name)
        if source != ParameterSource.COMMANDLINE or isinstance(option, click.Argument):
            continue
        if hasattr(Columns, option.name):
            continue
        words.append(option.opts[0])
        if not option.is_flag:
            words.append(shlex.quote(str(context.params[option.name])))
    return " ".join(words)


def read_log(name: str, place: Place, request: Request, min_watch: float | None) -> Found:
    """The log that a name and a place mean."""
    stop_at_wrong_place(place, request)
    if place.interactions:
        return own(read_file(place.interactions, place.items, request))
    source = SOURCES.get(name)
    if place.raw and is_own_log(place.raw):
        return own(read_own(place.raw, request))
    if place.raw and not source:
        source = recognised(name, place.raw, request)
        if source is None:
            return own(read_own(place.raw, request))
    if min_watch is not None and name != "kuairec":
        stop(f"--min-watch is of kuairec and {name} has no lengths; leave it out")
    stop_at_flags_of_own(name, request)
    if source is None:
        return Found(fetch_ml100k(), None, {"noun": "movie", "verb": "watched"})
    log = read_source(name, source, place.raw, min_watch)
    return Found(log, source, {"noun": source.noun, "verb": source.verb})


def own(log: Log) -> Found:
    """A log of one's own."""
    return Found(log, None, {"noun": "item", "verb": "interacted with"})


def recognised(name: str, folder: Path, request: Request) -> Source | None:
    """The data set whose publisher's files a folder holds: a category of Amazon's, a release of
    MovieLens; None if it holds neither.
    """
    found = categories(folder)
    if len(found) > 1:
        named = [c for c in found if c.lower() == name.lower().replace("-", "_")]
        if not named:
            stop(
                f"{folder} holds {len(found)} categories of Amazon's, {', '.join(found)}; name the "
                f"one you mean: {request.command.replace(f' {name} ', f' {found[0]} ', 1)}"
            )
        found = named
    if found:
        return amazon(found[0])
    if is_movielens(folder):
        return movielens(name, None)
    stop_at_half(folder)
    return None


def stop_at_half(folder: Path) -> None:
    """Stops at one file of Amazon's without its other."""
    for path in sorted(folder.rglob("meta_*.json*")):
        category = category_of(path)
        stop(
            f"{folder} holds {path.name} and no interactions of {category}; put {category}.csv, "
            f"{category}_5.json.gz or reviews_{category}_5.json.gz beside it"
        )
    for path in sorted(folder.rglob("*_5.json*")):
        category = path.name.split("_5.json")[0].removeprefix("reviews_")
        stop(
            f"{folder} holds {path.name} and no titles; put meta_{category}.json.gz beside it, "
            "which is on the page of the reviews"
        )


def stop_at_wrong_place(place: Place, request: Request) -> None:
    """Stops at a place that cannot be meant."""
    raw = place.raw
    if place.items and not place.interactions:
        stop(
            "--items is the table of titles of --interactions FILE; in the folder of --raw it is "
            "called items.csv"
        )
    if raw and place.interactions:
        stop("--raw names a folder and --interactions a file: give one of them")
    if raw and raw.is_file():
        if raw.suffix == ".zip":
            folder = shlex.quote(str(raw.parent))
            stop(f"{raw} is a file; give the folder it lies in: --raw {folder}")
        stop(f"{raw} is a file; give it so: {with_file(request.command, raw)}")
    if raw and not raw.is_dir():
        stop(f"there is no folder {raw}; is its name right?")


def stop_at_flags_of_own(name: str, request: Request) -> None:
    """Stops at flags that say how one's own files are read, where the files are a publisher's."""
    given = [FLAGS[role] for role, column in vars(request.columns).items() if column]
    given += ["--encoding"] * bool(request.encoding)
    given += ["--time-format"] * bool(request.time_format)
    given += ["--drop-incomplete"] * request.drop_incomplete
    if given:
        stop(
            f"{', '.join(given)}: for files of your own, and those of {name} are read as their "
            "publisher writes them; leave it out, or give the file with --interactions FILE"
        )
