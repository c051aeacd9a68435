"""A run's folder: begun beside its place, left, finished and put there."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from delrec.processes import Ranks
from delrec.runtime import (
    HELD,
    Prepared,
    as_kept,
    beside,
    commit,
    empty,
    is_run,
    lock,
    machine,
    put_in_place,
    stop,
    unlock,
    versions,
    write_json,
)
from delrec.training.checkpoints import complete
from delrec.training.memory import peak_gb


def start_run(
    folder: Path, stage: str, cfg: SimpleNamespace, data: Prepared, ranks: Ranks
) -> tuple[Path, dict[str, Any]]:
    """(where to build the run, the record that finish_run writes to config.json).

    The run is built in <folder>.unfinished; what is stored in it names the final `folder`. With
    cfg.resume, what a killed run left stays there if it has a checkpoint, which tells whose it is.
    """
    new = beside(folder, "unfinished")
    record = {
        "stage": stage,
        **vars(cfg),
        **({"out": str(folder)} if hasattr(cfg, "out") else {}),
        "dataset": data.name,
        "data_folder": str(data.folder),
        "data_hash": data.meta["hash"],
        "prompt_words": data.meta.get("words"),  # which the hash does not hold
        "world": ranks.world,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "started": time.time(),
    }
    if ranks.main:
        hold(new)
        if not (getattr(cfg, "resume", False) and complete(new / "checkpoints")):
            empty(new)
        write_json(new / "started.json", as_kept(record, folder))
        print(
            f"{stage}: " + " ".join(f"{k}={v}" for k, v in vars(cfg).items() if v is not None),
            flush=True,
        )
        if is_run(folder):
            print(f"{folder} stays as it is until this run replaces it", flush=True)
    return new, record


def hold(new: Path) -> None:
    """Marks a folder in which a run is built as this process's, until its command ends."""
    if new in HELD:
        return
    lock(new)
    if context := click.get_current_context(silent=True):
        context.call_on_close(lambda: leave(new))


def leave(new: Path) -> None:
    """At the end of a command: what it did not finish stays only if --resume can use it."""
    if new in HELD:
        if not complete(new / "checkpoints") and not (new / "config.json").exists():
            shutil.rmtree(new, ignore_errors=True)
        unlock(new)


def finish_run(folder: Path, record: dict[str, Any], earlier: float = 0.0) -> dict[str, Any]:
    """The record as it is stored. config.json is written last, then the run is put in its place.
    earlier: seconds that it took before it was killed, which count too."""
    new = beside(folder, "unfinished")
    record["seconds"] = round(time.time() - record.pop("started") + earlier, 1)
    record["finished"] = round(time.time(), 3)
    record["peak_gb"] = round(peak_gb(), 2)
    write_json(new / "config.json", as_kept(record, folder))
    try:
        put_in_place(folder)
    except OSError as bad:
        goes_on = "the same command with --resume does that"
        if "checkpoint_every" not in record:  # a script without --resume
            goes_on = f"move it there: mv {new} {folder}"
        stop(
            f"the run is finished and whole in {new}, but could not be put in its place ({bad}); "
            f"{goes_on}"
        )
    unlock(new)
    return record
