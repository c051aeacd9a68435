"""May a run be written to a folder? Asked at the door, before anything in it is touched."""

from pathlib import Path
from types import SimpleNamespace

import click

from delrec.places import BACKBONE
from delrec.processes import (
    Ranks,
    finish,
    job_began,
    max_over_ranks,
    restarted,
    stopped_before,
)
from delrec.runtime import (
    beside,
    complete_renames,
    in_use,
    is_run,
    load_run,
    owner,
    put_in_place,
    read_json,
    stop,
    when,
)
from delrec.training.checkpoints import STOPPED, complete
from delrec.training.run_folders import hold

FREE, FINISHED, REFUSED = range(3)


def stay_stopped(ranks: Ranks) -> None:
    """Ends the process, as before, where torchrun --max-restarts started it again though the job
    was asked to stop. A later job goes on."""
    if stopped_before():
        if ranks.main:
            print("this job was asked to stop, so it does not go on", flush=True)
        finish(ranks)
        raise SystemExit(STOPPED)


def begun_by_this_job(folder: Path, ranks: Ranks) -> bool:
    """True on all processes where torchrun --max-restarts started them again and the run at
    `folder`, finished or not, is of this job: it goes on as with --resume. What stood there before
    the job is not its own; of that the command says what it was typed to say."""
    began, own = job_began() if ranks.main else 0.0, False
    if not restarted():
        return False
    if ranks.main:
        own = any(at >= began for at in times_of(folder))
    return bool(max_over_ranks(own, ranks)) if ranks.world > 1 else own


def times_of(folder: Path) -> list[float]:
    """When what stands at a run's place was begun, and when it was finished."""
    new = beside(folder, "unfinished")
    begun = [path for path in [new / "started.json"] if path.exists()]
    whole = [place / "config.json" for place in (new, folder) if is_run(place)]
    return [read_json(path).get("started", 0) for path in begun] + [
        read_json(path).get("finished", 0) for path in whole
    ]


def claim(folder: Path, cfg: SimpleNamespace, ranks: Ranks) -> None:
    """Returns where a run may be written to `folder`; else the process ends and says why. The place
    where it is built is this process's from here on: a second one is refused at the door.

    What a killed process left between two renames is completed first; no finished run is lost.
    A finished run needs --overwrite, one that was killed --resume or --overwrite, a folder of
    something else another --out. With --resume a finished run ends here, with exit code 0.
    """
    verdict, why = FREE, None
    if ranks.main:
        complete_renames(folder, "config.json")
        adopt(folder, cfg.resume)
        why = refusal(folder, cfg)
        finished = cfg.resume and not beside(folder, "unfinished").exists() and is_run(folder)
        verdict = FINISHED if finished else FREE
        why = why or (None if finished else taken(folder, cfg))
        verdict = REFUSED if why else verdict
    if ranks.world > 1:
        verdict = int(max_over_ranks(verdict, ranks))
    if why:
        stop(why)
    if verdict == REFUSED:
        raise SystemExit(1)  # the first process says why
    if verdict == FINISHED:
        if ranks.main:
            print(
                f"{folder} is finished, there is nothing to resume; "
                "--overwrite instead of --resume does it again",
                flush=True,
            )
        finish(ranks)
        raise SystemExit(0)


def taken(folder: Path, cfg: SimpleNamespace) -> str | None:
    """Takes the place where the run is built; why that cannot be, as a sentence: another process
    was faster (it may even have finished since `refusal` was asked), or nothing can be written."""
    try:
        hold(beside(folder, "unfinished"))
    except click.ClickException as refused:
        return refused.message
    return refusal(folder, cfg)


def adopt(folder: Path, resume: bool) -> None:
    """With --resume: a finished run that was killed before it had its place is put there."""
    new = beside(folder, "unfinished")
    if resume and not owner(new) and (new / "config.json").exists():
        put_in_place(folder)


def something_else(folder: Path) -> bool:
    """True for what no run of these scripts left: it is not theirs to replace or to empty."""
    if not folder.is_dir():
        return folder.exists()
    begun = folder.name.endswith(".unfinished") and any(
        (folder / name).exists() for name in ("lock", "started.json")
    )
    return any(folder.iterdir()) and not (begun or is_run(folder))


def refusal(folder: Path, cfg: SimpleNamespace) -> str | None:
    """Why no run may be written to `folder`, as a sentence; None where one may."""
    new = beside(folder, "unfinished")
    if number := owner(new):
        return in_use(new, number)
    finished, another = is_run(folder), f"name another folder with {out_flag(cfg)}"
    for place in filter(something_else, (folder, new)):
        return (
            f"{place} is there and holds no run (no config.json of these scripts), so it is left "
            f"as it is; {another}"
        )
    parts = [folder / BACKBONE] if is_copy(folder / BACKBONE) else []
    inner = [
        p.parent
        for p in folder.rglob("config.json")
        if p.parent not in (folder, *parts) and is_run(p.parent)
    ]
    if inner:
        return (
            f"{folder} holds the run {inner[0]}, which would go with it; "
            f"move that one away, or {another}"
        )
    return None if cfg.resume or cfg.overwrite else in_the_way(folder, finished, cfg)


def is_copy(inner: Path) -> bool:
    """True for a copy of a run: it has no log."""
    return not (inner / "log.jsonl").exists()


def in_the_way(folder: Path, finished: bool, cfg: SimpleNamespace) -> str | None:
    """What of an earlier run would be lost without --resume or --overwrite, as a sentence; None
    where nothing would."""
    new = beside(folder, "unfinished")
    goes_on = "--resume {}, " if hasattr(cfg, "checkpoint_every") else ""  # else it has no --resume
    if (new / "config.json").exists():
        return (
            f"{new} holds a finished run that was killed before it was put in its place; "
            f"{goes_on.format('does that')}--overwrite begins anew"
        )
    if kept := complete(new / "checkpoints"):
        return (
            f"{new} holds a run that was killed at step {kept[-1][0]}; "
            f"{goes_on.format('continues it')}--overwrite begins anew"
        )
    if finished:
        run = load_run(folder)
        return (
            f"{folder} holds a finished {run.stage} run ({when(run)}, data hash {run.data_hash}); "
            f"--overwrite replaces it once the new one is finished, {out_flag(cfg)} names another "
            "folder"
        )
    return None


def out_flag(cfg: SimpleNamespace) -> str:
    """The flag of the command that names the run's folder: evaluate.py's --out is of its table."""
    return "--out" if hasattr(cfg, "out") else "--llm-out"
