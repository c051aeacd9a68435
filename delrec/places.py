"""Where the folders stand that a run's config.json names: the data, the backbone, the LM ..

They are kept relative to the root of runs and data, so that a project can be copied, moved or
mounted elsewhere and reads and writes only itself. The root of a run is the folder that holds the
`runs` it stands in; of a run in no such folder it is the program's own. What lies inside the root
is kept as data/toy, runs/toy/sasrec or, an LM, ./models/llama; what lies outside by its whole path.
"""

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any

KINDS = ("runs", "data")  # the folders that a root holds
MARKS = {"runs": "config.json", "data": "meta.json"}  # what is written last into one of theirs
FOLDERS = ("data_folder", "backbone_run", "out")  # always a folder, there or not
RUNS = ("soft_prompt", "teacher", "kd", "maps", "backbone", "from_run", "text")  # a run, or a word
LMS = ("llm", "llm_from")  # a folder, a run, or the id of an LM
PLACES = {*FOLDERS, *RUNS, *LMS}
BACKBONE = "backbone"  # the folder, in a run's, of a copy of the backbone that it answers by
WORDS = {"none", "random", "words", "tfidf", "minilm", "co-occurrence"}  # that stand for no run
LIKE = 0.8  # difflib's ratio of two names, from which on one may be the other, mistyped
JOIN = "+"  # between sources of text; a name or a path may hold one, too
RANDOM = re.compile(r"(random(?:-\d+)?:)?(.*)", re.DOTALL)  # in front of an LM: random weights


# ------------------------------------------------ what a name means


def is_folder(name: Path | str) -> bool:
    """True for the name of a folder; False also for a name that is too long to be one."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def is_path(kind: str, name: Path | str, own: Path) -> bool:
    """True for a name that is a path itself: it is absolute, begins with '.' or with the kind, or
    one of the kind stands there. Any other folder there hides nothing (raw files in ./my-shop): it
    is meant by a name with a slash alone, where nothing was made that is called so. kind: data or
    runs; own: the program's root."""
    path = Path(name)
    if path.is_absolute() or str(name).startswith(".") or path.parts[:1] == (kind,):
        return True
    if is_there(path, MARKS[kind]):
        return True
    return len(path.parts) != 1 and is_folder(path) and not made(kind, name, own)


def beside(folder: Path | str, ending: str) -> Path:
    """The folder <folder>.<ending>; where `folder` is a link, beside what it links to."""
    folder = Path(folder)
    if os.path.islink(folder) or folder.name in ("", ".."):
        folder = folder.resolve()
    return Path(f"{folder}.{ending}")


def current_folder(own: Path) -> Path:
    """The folder that a command is typed in: it may be a root of runs and data, too. own: the
    program's root, which stands for it where it was removed (a service's, when it was replaced).
    """
    try:
        return Path(os.path.abspath("."))
    except OSError:
        return own


def standing(kind: str, name: Path | str, own: Path) -> list[Path]:
    """Where what a name means stands, finished or begun: its path, or under <kind>/ of the
    program's root and of the current folder. Where it stands nowhere, the program's place alone.
    """
    if is_path(kind, name, own):
        return [Path(os.path.abspath(name))]
    places = under_roots(kind, name, own)
    begun = [place for place in places if is_folder(place)] or places
    return made(kind, name, own) or begun[:1]


def under_roots(kind: str, name: Path | str, own: Path) -> list[Path]:
    """<kind>/<name> of the program's root, then of the current folder where that is another."""
    places = [root / kind / name for root in (own, current_folder(own))]
    same = os.path.realpath(places[0]) == os.path.realpath(places[1])
    return places[:1] if same else places


def made(kind: str, name: Path | str, own: Path) -> list[Path]:
    """Where what is called so under <kind>/ was made whole, or is being made."""
    return [place for place in under_roots(kind, name, own) if is_there(place, MARKS[kind])]


def usual(name: str, near: Iterable[Path], digest: str, own: Path) -> Path:
    """Where the run stands that a command needs and nobody named, finished or begun: under runs/ of
    the roots of the folders `near`, of the program's and of the current folder. The first that was
    trained on the data of that hash, else the first; where there is none, the program's place.

    name: <dataset>/<name>. near: what was asked about.
    """
    roots = [above.parent for folder in near for above in folder.parents if above.name in KINDS]
    places = [root / "runs" / name for root in (*roots, own, current_folder(own))]
    found = [place for place in places if is_there(place, MARKS["runs"])]
    of_data = [place for place in found if entry(place / "config.json", "data_hash") == digest]
    return [*of_data, *found, own / "runs" / name][0]


def sources(text: str, stands: Callable[[str], Any]) -> list[str]:
    """The sources that + joins in a text. The name of one may hold a + itself: the longest that
    `stands` says is there counts whole."""
    parts, found = text.split(JOIN), []
    while parts:
        joined = (JOIN.join(parts[:n]) for n in range(len(parts), 1, -1))
        found.append(next(filter(stands, joined), parts[0]))
        parts = parts[found[-1].count(JOIN) + 1 :]
    return found


def is_there(folder: Path, mark: str) -> bool:
    """True where something was made whole in a folder, or is being made for it."""
    places = (folder / mark, beside(folder, "unfinished"), beside(folder, "replaced"))
    return any(map(os.path.exists, places))


def by_likeness(name: str, known: Iterable[str]) -> list[str]:
    """Names, those most like one first: what is meant where it is mistyped."""

    def likeness(other):
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return sorted(known, key=lambda other: (-likeness(other), other))


def is_like(name: str, other: str) -> bool:
    """True where a name may be another, mistyped."""
    return bool(difflib.get_close_matches(name.lower(), [other.lower()], cutoff=LIKE))


# ------------------------------------------------ the root that a run belongs to


def root_of(folder: Path | str, own: Path) -> Path:
    """The root of runs and data that a run's folder belongs to. own: the program's."""
    place = Path(os.path.abspath(folder))
    above = [p.parent for p in place.parents if p.name == "runs"]
    if inside(place, own):
        above.append(own)
    return max(above, key=lambda root: len(root.parts), default=own)


def inside(path: PurePath, root: Path) -> bool:
    """True for a path within a root, as they are written or as links lead."""
    return path.is_relative_to(root) or Path(path).resolve().is_relative_to(root.resolve())


def changed(config: dict, change: Callable[[str, str], str], stands: Callable[[str], Any]) -> dict:
    """A configuration whose places are change(key, value), those of its settings too, and each of
    several. stands: as of sources."""

    def one(key, value):
        if not (isinstance(value, str) and value):
            return value
        parts = sources(value, stands) if key == "text" else [value]
        return JOIN.join(part if part in WORDS else change(key, part) for part in parts)

    new = dict(config)
    for key, value in config.items():
        if key == "settings" and isinstance(value, dict):
            new[key] = changed(value, change, stands)  # its "backbone" is a name in prompts
        elif key in PLACES:
            several = isinstance(value, list)
            new[key] = [one(key, each) for each in value] if several else one(key, value)
    return new


# ------------------------------------------------ as they are kept


def relative(path: Path | str, root: Path) -> str:
    """A place as a configuration keeps it: relative to the root, or whole where it lies outside."""
    path = Path(os.path.abspath(path))
    for place, above in ((path, root), (path.resolve(), root.resolve())):
        if place.is_relative_to(above):
            found = place.relative_to(above)
            if len(above.parts) > 1 or found.parts[:1] in [(kind,) for kind in KINDS]:
                return found.as_posix()
    return str(path)


def kept(config: dict, root: Path, run_named: Callable[[str], Path | None]) -> dict:
    """A configuration as it is stored. run_named: the folder of the finished run that a name means,
    None where there is none."""

    def keep(key, value):
        prefix, name = RANDOM.fullmatch(value).groups("") if key in LMS else ("", value)
        whole = os.path.isabs(name)
        place = name if whole or key in FOLDERS else key != "backbone" and run_named(name)
        if not place:
            return value
        place = relative(place, root)
        is_path = os.path.isabs(place) or place.startswith("runs/")
        return prefix + (place if is_path or key not in LMS else f"./{place}")

    return changed(config, keep, lambda name: run_named(name) or os.path.exists(name))


# ------------------------------------------------ as they are found again


def found(config: dict, folder: Path, own: Path) -> dict:
    """The configuration of the run in `folder` with whole paths, of what stands under its root.
    own: the program's root, where the rest may stand."""
    root = root_of(folder, own)

    def find(key, value):
        prefix, name = RANDOM.fullmatch(value).groups("") if key in LMS else ("", value)
        return value if os.path.isabs(name) else prefix + relative_place(key, name)

    def relative_place(key, name):
        if key in (*LMS, "backbone") and not name.startswith(("./", "runs/")):
            return name  # an id, a name in prompts, or a run as it was typed
        kind = "data" if key == "data_folder" else "runs"
        for above in dict.fromkeys((root, own)):
            for place in (above / name, above / kind / name):
                if place.is_dir():
                    return str(place)
        return str(root / name) if name.startswith(("./", "runs/", "data/")) else name

    config = changed(config, find, lambda name: os.path.exists(find("text", name)))
    return config | {"out": str(folder)} if config.get("out") else config


def hash_in(folder: Path) -> str | None:
    """The hash of the prepared data in a folder; None where there are none."""
    return entry(folder / "meta.json", "hash")


def entry(file: Path, key: str) -> str | None:
    """An entry of a JSON file; None where it has none, or cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
