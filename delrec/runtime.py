"""What stands under everything: run folders found, locked and put in their place, what this machine
is. How a command refuses, and files read and written whole, stand in files.py.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, TextIO

import numpy as np
import torch

from delrec import places
from delrec.files import (
    described,
    first_line,
    follow_umask,
    must_be_writable,
    not_allowed,
    read_json,
    read_npy,
    read_tensors,
    said_by_system,
    stop,
    whole_or_auto,
    why_not_writable,
    write_json,
    write_npy,
    write_tensors,
    write_text,
    writing,
)
from delrec.no_run import meant_instead, no_config_of_run, why_no_run
from delrec.places import beside, is_folder

try:
    import fcntl  # locks that die with their owner
except ImportError:  # not on Windows: there nobody is refused
    fcntl = None

__all__ = [  # also of files.py and places.py, by this module's name
    "described",
    "first_line",
    "follow_umask",
    "is_folder",
    "must_be_writable",
    "not_allowed",
    "read_npy",
    "read_tensors",
    "whole_or_auto",
    "why_not_writable",
    "write_json",
    "write_npy",
    "write_tensors",
    "write_text",
    "writing",
]
ROOT = Path(__file__).resolve().parent.parent


def cache_folder() -> Path:
    """Where what is fetched, built or found once is kept: $XDG_CACHE_HOME/delrec, or
    ~/.cache/delrec. For a user without a home folder it is one that nobody can make.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delrec"
    except RuntimeError:  # HOME is not set, and the system does not know the user
        return Path(os.devnull) / "no-home" / "delrec"


CACHE = cache_folder()


class Prepared(Protocol):
    """What the floors under the data know of it; delrec.data.prepared.Data holds more."""

    name: str
    folder: Path
    folder_name: str  # what its runs stand under
    meta: dict[str, Any]  # meta.json


def place_of_new(kind: str, name: Path | str) -> Path:
    """The whole path of a folder that is to be written: `name` where it is a path (places.is_path),
    else <kind>/<name> of the program's root. kind: data or runs.
    """
    is_path = places.is_path(kind, name, ROOT)
    return Path(os.path.abspath(name)) if is_path else ROOT / kind / name


def folder_of(kind: str, name: Path | str) -> Path:
    """The whole path of the folder that `name` means: a path, or what is called so under <kind>/
    of the program's root or of the current folder. One name of two is refused."""
    found = places.standing(kind, name, ROOT)
    if len(found) > 1:
        stop(f"{name} may be {found[0]} or {found[1]}; write the one that is meant as a whole path")
    return found[0]


def usual_run(data: Prepared, name: str, runs: Iterable["Run"] = ()) -> Path:
    """Where runs/<dataset>/<name> stands, which nobody typed (places.usual): beside the runs that
    were asked about, beside the data, or where a name means it."""
    near = [*(run.folder for run in runs), data.folder]
    return places.usual(f"{data.folder_name}/{name}", near, data.meta["hash"], ROOT)


# ------------------------------------------------ folders that are whole at every moment
#
# A run, an export or a prepared folder is built in <folder>.unfinished and put in its place by
# renames. Its mark (config.json, meta.json) is written last: a folder that holds it is whole.


def put_in_place(folder: Path, keep: Path | None = None) -> None:
    """Makes <folder>.unfinished, which is whole, the new `folder`. The old one goes, or to `keep`.

    If the process is ended between two of the renames, `complete_renames` completes them.
    """
    new, old = beside(folder, "unfinished"), keep or beside(folder, "replaced")
    place = Path(str(new).removesuffix(".unfinished"))
    shutil.rmtree(new / "checkpoints", ignore_errors=True)
    (new / "started.json").unlink(missing_ok=True)
    if place.exists():
        if keep is None:
            shutil.rmtree(old, ignore_errors=True)  # of a process that was ended while removing it
        os.replace(place, old)
    os.replace(new, place)
    (place / "lock").unlink(missing_ok=True)
    if keep is None:
        shutil.rmtree(old, ignore_errors=True)


def between_renames(folder: Path, mark: str) -> bool:
    """True while put_in_place has taken the old `folder` away and not yet put the new one there."""
    whole = (beside(folder, "unfinished") / mark).exists()
    return not folder.exists() and (whole or beside(folder, "replaced").exists())


def complete_renames(folder: Path, mark: str) -> None:
    """Completes the put_in_place of a process that was ended between two of its renames."""
    new, old = beside(folder, "unfinished"), beside(folder, "replaced")
    if not new.exists() and not old.exists():
        return
    until = time.time() + 10
    while between_renames(folder, mark) and owner(new) and time.time() < until:
        time.sleep(0.02)  # its owner is doing it
    if owner(new):
        return
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif (new / mark).exists():
            put_in_place(folder)
        elif old.exists():
            os.replace(old, folder)
    except FileNotFoundError:  # another process completed it just now
        pass


# what this process builds: folder -> its open lock, None on a system without locks
HELD: dict[Path, TextIO | None] = {}


def owner(folder: Path) -> str | None:
    """The number of another live process that builds in `folder`, as text, or None."""
    if fcntl is None or folder in HELD:
        return None
    try:
        with open(folder / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except OSError:  # no such file, or a file system without locks
        return None
    return None


def locked(file: TextIO) -> bool:
    """True if the lock of an open file is now ours, and the file is still in its place."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    there = os.path.exists(file.name)
    return there and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))


def lock(folder: Path) -> None:
    """Makes `folder`, if it is not there, and marks it as this process's until it ends. Stops where
    another process works in it, or where it cannot be written."""
    unlock(folder)
    try:
        must_be_writable(folder)
        folder.mkdir(parents=True, exist_ok=True)
        HELD[folder] = None if fcntl is None else locked_file(folder)
    except OSError as bad:
        stop(said_by_system(bad) or f"{folder} cannot be written ({bad}); name another folder")


def locked_file(folder: Path) -> TextIO:
    """The file `lock` of a folder, whose lock is now ours; it holds this process's number."""
    until = time.time() + 1  # whoever only looks at the lock holds it for a moment
    file = open(folder / "lock", "a+")  # noqa: SIM115 (held open as long as the lock is)
    while not locked(file):
        file.close()
        if time.time() > until:
            stop(in_use(folder, owner(folder)))
        time.sleep(0.02)
        folder.mkdir(parents=True, exist_ok=True)  # its owner may have taken it away
        file = open(folder / "lock", "a+")  # noqa: SIM115
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def unlock(folder: Path) -> None:
    """Takes this process's mark from a folder."""
    if file := HELD.pop(folder, None):
        file.close()


@contextlib.contextmanager
def adding_to(folder: Path, patience: float = 1) -> Iterator[None]:
    """Holds a finished run while something is added to it: whoever reads, changes and writes a file
    of it meets nobody. Stops where another process holds it for longer than `patience` seconds.

    The lock is that of config.json itself, and goes with its owner.
    """
    if fcntl is None or folder in HELD:
        yield
        return
    until = time.time() + patience
    while not locked(file := open(folder / "config.json")):  # noqa: SIM115 (held open)
        file.close()
        if time.time() > until:
            stop(
                f"another process is adding scores to {folder}; wait until that is finished, or "
                "end it"
            )
        time.sleep(0.02)
    HELD[folder] = file
    try:
        yield
    finally:
        unlock(folder)


def empty(new: Path) -> None:
    """Takes everything out of a folder that is built in, but its lock."""
    for path in new.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def in_use(folder: Path, number: str | None) -> str:
    """The sentence about a folder in which another process is at work."""
    return (
        f"{folder} is being written by process {number}; "
        "wait until that is finished, end it, or name another folder"
    )


def machine() -> str:
    """This machine in words: its GPUs, or its CPU and cores."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else "cpu"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(gpus) or f"{cpu}, {os.cpu_count()} cores"


def versions() -> dict:
    """The versions a result may depend on; nothing is imported to learn them."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "numpy": np.__version__,
    }


def commit() -> str | None:
    """The short hash of this clone's last commit; None outside a clone."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def is_run(folder: Path | str) -> bool:
    """True for a finished run of these scripts."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except PermissionError:  # which says nothing about what it is
        stop(not_allowed(path))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"stage", "dataset", "data_hash"} <= set(config)


class Run(SimpleNamespace):
    """A finished run: what its config.json holds, as attributes. Every run has these; each stage
    adds its own.
    """

    folder: Path  # where it stands
    stage: str  # train_backbone, distill, finetune or lm (evaluate.py --llm)
    dataset: str  # the name of its data
    data_hash: str  # of their preparation


def config_of_run(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder, with whole paths, as things stand now."""
    return places.found(read_json(folder / "config.json"), folder, ROOT)


def as_kept(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run's record as its folder keeps it: paths relative to the root of runs and data."""

    def run_named(name):
        return next(filter(is_run, places.standing("runs", name, ROOT)), None)

    return places.kept(record, places.root_of(folder, ROOT), run_named)


def place_of(run: Run, name: Path | str) -> str:
    """A folder, or an LM's name, as what is written into a run's folder says it."""
    return as_kept({"llm": str(name)}, run.folder)["llm"]


def is_another_meant(name: Path | str) -> str:
    """What stands behind a name that is no run: ' (is my-shop/sasrec meant?)', or nothing."""
    return meant_instead(name, folder_of("runs", name), ROOT, is_run)


def when(run: Run) -> str:
    """When a run was finished, as text."""
    at = getattr(run, "finished", None) or (run.folder / "config.json").stat().st_mtime
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def stop_if_replaced(run: Run) -> None:
    """Ends the process if another run stands in the folder by now: nothing may be added to it."""
    config = read_json(run.folder / "config.json")
    if config.get("finished") != getattr(run, "finished", None):
        stop(
            f"{run.folder} was replaced by another run while this command read the earlier one; "
            "nothing was written, run it again"
        )


def load_run(
    name: Path | str, data: Prepared | None = None, stages: list[str] | None = None
) -> Run:
    """The run in a finished run folder (or a name under runs/). stages: those that are expected.

    Another data set's run is refused."""
    folder = folder_of("runs", name)
    complete_renames(folder, "config.json")
    if not (folder / "config.json").exists():
        new = beside(folder, "unfinished")
        if number := owner(new):
            stop(f"{folder} is no run yet: process {number} makes it now, in {new}; wait for it")
        stop(why_no_run(name, folder, ROOT, is_run))
    if not is_run(folder):
        read_json(folder / "config.json")
        stop(no_config_of_run(folder))
    run = Run(**config_of_run(folder), folder=folder)
    if stages and run.stage not in stages:
        stop(f"{folder} holds a {run.stage} run, expected one of: {', '.join(stages)}")
    if data is not None and run.data_hash != data.meta["hash"]:
        kept = Path(f"{getattr(data, 'folder', '')}@{run.data_hash}")
        stop(
            f"{folder} was trained on another preparation of {run.dataset} "
            f"(hash {run.data_hash}, data folder has {data.meta['hash']}); "
            + (f"that one is kept, use --dataset {kept}" if kept.is_dir() else "train it again")
        )
    return run
