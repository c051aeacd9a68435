"""What is said of a name that is no finished run: what stands there, and which run may be meant."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from delrec import places
from delrec.files import stop
from delrec.places import BACKBONE, beside, by_likeness, entry, is_like, root_of

IsRun = Callable[[Path], bool]  # true for the folder of a finished run
DEEP = 4  # folders under runs/ in which a run may stand: recipes have several
MOST = 3  # runs that are named
OF_LMS = ("llm", "settings")  # what the config.json of every LM's run names
ENDINGS = (".unfinished", ".replaced")


def why_no_run(name: Path | str, folder: Path, own: Path, is_run: IsRun) -> str:
    """The sentence about a folder without config.json, and what to do. name: as it was typed; own:
    the program's root."""
    new = beside(folder, "unfinished")
    if new.exists():
        how, started = ", with --resume, finishes it", new / "started.json"
        if started.exists() and entry(started, "checkpoint_every") is None:  # it has no --resume
            how = " makes it anew"
        return (
            f"{folder} is an unfinished run: it was stopped; the command that began it{how}, "
            "or name another run"
        )
    if inner := list(runs_in(folder, is_run, 2)):
        return f"{folder} holds runs: {', '.join(inner[:MOST])}; give {name}/{inner[0]}"
    what = "an unfinished run (no config.json)" if folder.exists() else "no run folder"
    train = "train it first (train_backbone.py, distill.py, finetune.py)"
    if found := nearest(name, folder, own, is_run):
        return f"{folder} is {what}; finished here: {', '.join(found)}; name one, or {train}"
    return f"{folder} is {what}, and no run is finished here; {train}"


def no_config_of_run(folder: Path) -> str:
    """The sentence about a folder whose config.json lacks what every run has."""
    return (
        f"{folder}/config.json does not name stage, dataset and data_hash, so it is no run of "
        "these scripts; train it again"
    )


def must_open(run: SimpleNamespace) -> None:
    """Stops at a folder that calls itself an LM's run and lacks what opens one: somebody else's, as
    a rule."""
    lacks = [key for key in OF_LMS if not hasattr(run, key)]
    if run.stage != "train_backbone" and lacks:
        stop(
            f"{run.folder}/config.json says stage {run.stage!r}, but lacks {' and '.join(lacks)} "
            "of a run of these scripts; a model of your own, of whatever kind, has the stage "
            "'train_backbone' (docs/run_folder.md)"
        )


def meant_instead(name: Path | str, folder: Path, own: Path, is_run: IsRun) -> str:
    """What stands behind a name that is no run where it is mistyped, ' (is .. meant?)', or
    nothing."""
    found = nearest(name, folder, own, is_run)
    return f" (is {found[0]} meant?)" if found and is_like(str(name), found[0]) else ""


def nearest(name: Path | str, folder: Path, own: Path, is_run: IsRun) -> list[str]:
    """A few finished runs, those most like `name` first: by their names under runs/ of the
    program's root or the current folder, by whole paths beside `folder` elsewhere."""
    here = dict.fromkeys(os.path.realpath(root) for root in (own, places.current_folder(own)))
    named = {}
    for root in dict.fromkeys([*here, os.path.realpath(root_of(folder, own))]):
        for inner in runs_in(Path(root) / "runs", lambda place: True, DEEP):
            named[inner if root in here else str(Path(root) / "runs" / inner)] = (root, inner)
    tail = "/".join(Path(name).parts[-2:])
    like = by_likeness(tail, {inner for _, inner in named.values()})
    place = {inner: n for n, inner in enumerate(like)}
    found = []
    for shown, (root, inner) in sorted(named.items(), key=lambda item: place[item[1][1]]):
        if len(found) < MOST and is_run(Path(root) / "runs" / inner):
            found.append(shown)
    return found


def runs_in(folder: Path, is_run: IsRun, deep: int) -> list[str]:
    """The names under a folder of the runs in it, at most so many folders deep, in their order; no
    part of a run is one."""
    found = []
    for level in range(1, deep + 1):
        for path in sorted(folder.glob("*/" * level + "config.json")):
            inner = path.parent.relative_to(folder)
            parts = [str(above) for above in inner.parents]
            is_part = inner.name == BACKBONE or any(above in found for above in parts)
            is_built = any(part.endswith(ENDINGS) for part in inner.parts)
            if not is_part and not is_built and os.access(path, os.R_OK) and is_run(path.parent):
                found.append(str(inner))
    return found
