"""Which files of a folder are the user's log, and which its titles."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from delrec.data.hints import WORD, Request
from delrec.data.json_tables import is_json
from delrec.data.remedies import new_table
from delrec.data.tables import is_table, read_header
from delrec.runtime import stop

# the word in a file's name that says which part of a split it holds -> train 0, val 1, test 2
PARTS = {"train": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}
PART = re.compile(rf"(?:^|[._-])({'|'.join(PARTS)})(?=[._-]|$)", re.IGNORECASE)
# the word in a file's name that says it is the table of the items
ITEMS = re.compile(
    "item|product|article|movie|book|game|anime|title|meta|song|artist|business|news|place|venue",
    re.IGNORECASE,
)
# what says that a file holds interactions, whose table of items is larger at times
EVENTS = re.compile("review|interaction|event|order|rating|transaction|click|log|action", re.I)
EXPECTED = (
    "expected interactions.csv (user, item and timestamp or position) and items.csv (item, title), "
    "also .tsv, .csv.gz or .parquet, or RecBole's .inter and .item"
)


@dataclass
class Files:
    """The files of a log; each may be a folder that Spark wrote."""

    interactions: list[Path]
    items: list[Path]  # none: the titles stand in the interactions
    notes: list[str]  # what is said of the choice

    @property
    def is_recbole(self) -> bool:
        """True for RecBole's atomic files."""
        return self.interactions[0].suffix == ".inter"


def part_of(path: Path) -> int | None:
    """Which part of a split a file's name says it holds: 0, 1, 2 for train, val, test."""
    found = PART.search(path.name)
    return PARTS[found[1].lower()] if found else None


def is_own_log(folder: Path) -> bool:
    """True for a folder that holds interactions.*, RecBole's *.inter or Spark's parts."""
    return bool(tables(folder, "interactions") or atomic(folder) or has_parts(folder))


def atomic(folder: Path) -> list[Path]:
    """RecBole's interactions in a folder."""
    return sorted(folder.glob("*.inter"))


def has_parts(folder: Path) -> bool:
    """True for a folder that Spark wrote, also by the values of a column (dt=2024-01-31/)."""
    return any(p.is_file() for p in folder.glob("part-*")) or any(
        p.is_file() and is_table(p.name) for p in folder.glob("*=*/**/*")
    )


def tables(folder: Path, stem: str) -> list[Path]:
    """The tables STEM.csv, STEM-2019.csv, STEM.train.csv .. of a folder, of any format; a folder
    counts where it holds parts.
    """
    return [
        path
        for path in sorted(folder.glob(f"{stem}*"))
        if re.match(rf"{stem}([._-]|$)", path.name)
        and (is_table(path.name) or path.is_dir())
        and (path.is_file() or any(is_table(part.name) for part in path.rglob("part*")))
    ]


def files_of(folder: Path, request: Request) -> Files:
    """The files of the log in a folder."""
    if atomic(folder):
        return recbole_files(folder, request)
    if has_parts(folder):
        return Files([folder], [], [])
    found = tables(folder, "interactions")
    if not found:
        stop_without_interactions(folder, request)
    items = tables(folder, "items")
    chosen, notes = whole(folder, "interactions", found, items, request)
    items, more = whole(folder, "items", items, chosen, request)
    return Files(chosen, items, notes + more)


def whole(
    folder: Path, stem: str, found: list[Path], others: list[Path], request: Request
) -> tuple[list[Path], list[str]]:
    """Which of the tables of a stem make up the whole, and what is said of it: the one that has no
    more than the stem for a name, else all of them. others: the tables of the other stem.
    """
    plain = [path for path in found if path.name.split(".")[0] == stem and part_of(path) is None]
    parts = [path for path in found if path not in plain]
    split = [path for path in parts if part_of(path) is not None]
    if len(plain) > 1 or (plain and split):
        names = ", ".join(path.name for path in plain + split)
        is_log = stem == "interactions"
        question = f"{folder} holds {names}; which is the {'log' if is_log else 'table of titles'}?"
        if len(others) > 1:  # a command names one file of each
            stop(f"{question} Move the others away")
        log, titles = (plain, others) if is_log else (others, plain)
        command = with_file(request.command, log[0])
        if titles:
            command = with_items(command, titles[0])
        stop(f"{question} Name it: {command}, or move the others away")
    if plain and parts:
        return plain, [f"{', '.join(path.name for path in parts)}: not read, {plain[0].name} is"]
    if len(parts) > 1:
        return parts, [f"{', '.join(path.name for path in parts)} are read as one"]
    return plain or parts, []


def with_file(command: str, path: Path) -> str:
    """The command with a file in place of the folder."""
    flag = f"--interactions {shlex.quote(str(path))}"
    return re.sub(rf"--(raw|interactions) {WORD}", lambda _: flag, command)


FLAG_ITEMS = f" --items {WORD}"


def with_items(command: str, path: Path) -> str:
    """The command with a table of titles."""
    return f"{re.sub(FLAG_ITEMS, '', command)} --items {shlex.quote(str(path))}"


def with_new_log(command: str, files: Files, new: Path) -> tuple[str, str]:
    """The command that takes a new table of interactions, and what must be done before. Titles in
    several files are named by their folder alone: there the new table takes the old one's place.
    """
    if len(files.items) < 2:
        command = with_file(command, new)
        return with_items(command, files.items[0]) if files.items else command, ""
    place = files.items[0].with_name("interactions.csv")
    return command, set_aside(files.interactions) + moved(new, place)


def with_new_items(command: str, files: Files, new: Path) -> tuple[str, str]:
    """The same for a new table of titles and a log in several files."""
    if len(files.interactions) == 1:
        return with_items(with_file(command, files.interactions[0]), new), ""
    place = files.interactions[0].with_name("items.csv")
    return command, set_aside(files.items) + moved(new, place)


def without_items(command: str, files: Files) -> str:
    """The command without a table of titles; where the folder alone names the log, what moves the
    table away is in front.
    """
    command = re.sub(FLAG_ITEMS, "", command)
    if len(files.interactions) == 1:
        return with_file(command, files.interactions[0])
    return f"{set_aside(files.items)} && {command}".removeprefix(" && ")


def set_aside(paths: list[Path]) -> str:
    """What gives files names by which they are not read."""
    return "".join(moved(path, path.with_name(f"old-{path.name}")) for path in paths)


def moved(path: Path, place: Path) -> str:
    """What moves a file, behind another command."""
    return f" && mv {shlex.quote(str(path))} {shlex.quote(str(place))}"


def recbole_files(folder: Path, request: Request) -> Files:
    """NAME.inter, or NAME.train.inter, NAME.valid.inter and NAME.test.inter, with the .item."""
    found = atomic(folder)
    names = ", ".join(path.name for path in found)
    logs = {PART.sub("", path.stem) for path in found}
    split = [path for path in found if part_of(path) is not None]
    if len(logs) > 1 or len(split) not in (0, len(found)):
        stop(
            f"{folder} holds {names}, which are not the parts of one log; name the one you mean: "
            f"{with_file(request.command, found[0])}"
        )
    notes = [f"{names} are read as one"] if len(found) > 1 else []
    return Files(found, [item_of(folder, logs.pop())], notes)


def item_of(folder: Path, log: str) -> Path:
    """The .item file of a log of RecBole's."""
    found = sorted(folder.glob("*.item"))
    own = [path for path in found if path.stem == log]
    if not found:
        stop(
            f"{folder} holds {log}.inter but no .item file; titles are read from it: give a file "
            f"{log}.item with item_id:token and title:token_seq"
        )
    if not own and len(found) > 1:
        stop(
            f"{folder} holds {', '.join(path.name for path in found)} and none is {log}.item; give "
            "the one of this log that name"
        )
    return (own or found)[0]


def stop_without_interactions(folder: Path, request: Request) -> None:
    """Stops with what the folder holds, and how to name a file in it."""
    if folder.is_file():
        stop(f"{folder} is a file; give it so: {with_file(request.command, folder)}")
    if not folder.is_dir():
        stop(f"there is no folder {folder}; {EXPECTED} in the folder of --raw")
    everything = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    here = [p for p in everything if is_table(p.name) or is_json(p)]
    below = [p.parent for p in sorted(folder.glob("*/*")) if is_own_log(p.parent)]
    if not here and below:
        command = re.sub(
            f"--raw {WORD}", lambda _: f"--raw {shlex.quote(str(below[0]))}", request.command
        )
        stop(f"{folder} holds no interactions.csv, but {below[0]} does: {command}")
    if not here:
        names = ", ".join(path.name for path in everything[:8])
        stop(f"{folder} holds no interactions.csv{f' but {names}' * bool(names)}; {EXPECTED}")
    if len(here) > 1 and is_one_table(here):
        stop(
            f"{folder} holds no interactions.csv but {', '.join(p.name for p in here[:8])}, all "
            f"with the same columns; read them as one log: {with_file(request.command, folder)}"
        )
    largest = max(here, key=how_likely)
    log = [p for p in here if p == largest or is_one_table([largest, p])]
    others = sorted((p for p in here if p not in log), key=lambda p: not ITEMS.search(p.name))
    more = f" --items {shlex.quote(str(others[0]))}" if others else ""
    said, named = "Or name the file: ", largest
    if len(log) > 1:
        named = new_table(log, "log", "")
        files = " ".join(shlex.quote(str(path)) for path in log)
        place = shlex.quote(str(named))
        said = (
            f"{', '.join(p.name for p in log)} have the same columns; if they are one log, put "
            f"them in a folder: mkdir {place} && cp {files} {place}; and then: "
        )
    stop(
        f"{folder} holds no interactions.csv but {', '.join(p.name for p in here[:8])}; "
        f"{EXPECTED}. {said}{with_file(request.command, named)}{more}"
    )


def is_one_table(paths: list[Path]) -> bool:
    """True if all the files name the same columns."""
    if any(map(is_json, paths)):
        return False
    headers = [read_header(path) for path in paths]
    return len(headers[0]) > 1 and all(header == headers[0] for header in headers)


def how_likely(path: Path) -> tuple[bool, int]:
    """What orders files by how likely they hold the interactions."""
    is_named = bool(EVENTS.search(path.name)) and not ITEMS.search(path.name)
    return is_named, path.stat().st_size
