"""What the four scripts share: starting and finishing a run, the forecast, the look at
gradients.
"""

import os
import shutil
import time
from types import SimpleNamespace

import click
import numpy as np
import torch

from delrec.processes import finish, max_over_ranks
from delrec.runtime import (
    HELD,
    beside,
    commit,
    empty,
    in_use,
    is_run,
    load_run,
    lock,
    machine,
    owner,
    put_in_place,
    settle,
    stop,
    unlock,
    versions,
    when,
    write_json,
)
from delrec.training.checkpoints import complete
from delrec.training.memory import peak_gb, total_bytes


def forecast(step_seconds, steps, validation_seconds, validations, ranks):
    """One line after the first measured steps: the time and the memory that the run will take."""
    if not ranks.main:
        return
    left = np.median(step_seconds) * (steps - len(step_seconds)) + validation_seconds * validations
    gpu, total = ranks.device.type == "cuda", total_bytes(ranks.device)
    used = torch.cuda.max_memory_allocated() / 2**30 if gpu else peak_gb()
    print(
        f"{len(step_seconds)} steps took {np.median(step_seconds):.2f} s each: about "
        f"{left / 60:.1f} minutes to go for {steps - len(step_seconds)} steps and "
        f"{validations} "
        f"validations; {used:.1f} GB of {'the GPU' if gpu else 'memory'} at the peak so far"
        + (f", it has {total / 2**30:.0f}" if total else ""),
        flush=True,
    )


# ------------------------------------------------ options that several scripts share


def options(*group):
    """One decorator of several options, which --help shows in this order."""

    def add(command):
        for option in reversed(group):
            command = option(command)
        return command

    return add


# a killed run
going_on = options(
    click.option(
        "--resume",
        is_flag=True,
        help="continue a killed run from its newest checkpoint, as if it had never stopped",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="replace the finished run in --out, once this one is finished; begin a killed one "
        "anew",
    ),
    click.option(
        "--checkpoint-every",
        default=0,
        type=click.IntRange(0),
        help="steps between checkpoints; 0: as often as costs under 5 % of the time",
    ),
)
# what a prompt holds, and how the LM is read
prompt_options = options(
    click.option(
        "--history",
        default=None,
        type=click.IntRange(1),
        help="items of history in a prompt, L; 10, with --input ids 20",
    ),
    click.option(
        "--max-title",
        default=32,
        type=click.IntRange(1),
        help="tokens of a title, longer ones are cut",
    ),
    click.option(
        "--max-tokens",
        default=1024,
        type=click.IntRange(1),
        help="tokens of a prompt; the oldest history is dropped to fit",
    ),
    click.option(
        "--check-llm/--no-check-llm",
        default=True,
        help="compare the LM's scores with plain transformers' before the work (seconds, once for "
        "each LM), and take the fastest way that says the same",
    ),
    click.option(
        "--allow-unknown",
        is_flag=True,
        help="go on with a tokenizer that does not know over a fifth of the titles' tokens",
    ),
)
# what a pass keeps in memory; the numbers stay
memory_options = options(
    click.option(
        "--gradient-checkpointing",
        is_flag=True,
        help="keep each layer's input only and compute it again in backward: a third more time, "
        "far "
        "less memory",
    ),
    click.option(
        "--shard",
        is_flag=True,
        help="divide the LM's layers among the processes of torchrun (FSDP2), for an LM that does "
        "not fit one card; the same numbers, slower",
    ),
    click.option(
        "--cache-prefix/--no-cache-prefix",
        default=True,
        help="decoder-only LMs: compute the prompt's constant part once per forward pass "
        "instead of "
        "once per prompt; the same numbers",
    ),
)


def settled(ctx, config, paper):
    """(the flags as a namespace, the names of those typed): with --paper, the paper's value of each
    that was not typed."""
    typed = {k for k in config if ctx.get_parameter_source(k).name == "COMMANDLINE"}
    chosen = {k: v for k, v in paper.items() if config["paper"] and k not in typed}
    return SimpleNamespace(**{k: chosen.get(k, v) for k, v in config.items()}), typed


# ------------------------------------------------ a run folder, from the door to its place


def claim(folder, cfg, ranks):
    """Nothing, where a run may be written to `folder`; else says why not. Nothing is touched yet.

    A finished run needs --overwrite, one that was killed --resume or --overwrite, a folder of
    something else another --out. With --resume a finished run ends here, with exit code 0.
    """
    verdict, why = 0, None
    if ranks.main:
        settle(folder, "config.json")
        adopt(folder, cfg.resume)
        why = refusal(folder, cfg.resume, cfg.overwrite)
        finished = cfg.resume and not beside(folder, "unfinished").exists() and is_run(folder)
        verdict = 2 if why else 1 if finished else 0
    if ranks.world > 1:
        verdict = int(max_over_ranks(verdict, ranks))
    if why:
        stop(why)
    if verdict == 2:
        raise SystemExit(1)  # the first process says why
    if verdict == 1:
        if ranks.main:
            print(
                f"{folder} is finished, there is nothing to resume; "
                "--overwrite instead of --resume does it again",
                flush=True,
            )
        finish(ranks)
        raise SystemExit(0)


def adopt(folder, resume):
    """With --resume: a finished run that was killed before it had its place is put there, and what
    earlier versions left of a killed run in `folder` itself becomes <folder>.unfinished."""
    new = beside(folder, "unfinished")
    if not resume or owner(new):
        return
    if (new / "config.json").exists():
        put_in_place(folder)
    elif killed_inside(folder) and not new.exists():
        os.replace(folder, new)


def killed_inside(folder):
    """True for a killed run of earlier versions, which built in the run folder itself."""
    return (folder / "checkpoints").is_dir() and not (folder / "config.json").exists()


def refusal(folder, resume, overwrite):
    """Why no run may be written to `folder`, as a sentence; None where one may."""
    new = beside(folder, "unfinished")
    if number := owner(new):
        return in_use(new, number)
    finished = is_run(folder)
    if (
        not finished
        and not killed_inside(folder)
        and folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        return (
            f"{folder} is there and holds no run (no config.json of these scripts), so it is left "
            "as it is; name another folder with --out"
        )
    inner = [
        p.parent for p in folder.rglob("config.json") if p.parent != folder and is_run(p.parent)
    ]
    if inner:
        return (
            f"{folder} holds the run {inner[0]}, which would go with it; "
            "move that one away, or name another folder with --out"
        )
    if resume or overwrite:
        return None
    if (new / "config.json").exists():
        return (
            f"{new} holds a finished run that was killed before it was put in its place; "
            "--resume does that, --overwrite begins anew"
        )
    for place in (new, folder):
        if (not finished or place == new) and (kept := complete(place / "checkpoints")):
            return (
                f"{place} holds a run that was killed at step {kept[-1][0]}; "
                "--resume continues it, --overwrite begins anew"
            )
    if finished:
        run = load_run(folder)
        return (
            f"{folder} holds a finished {run.stage} run ({when(run)}, data hash {run.data_hash}); "
            "--overwrite replaces it once the new one is finished, --out names another folder"
        )
    return None


def start_run(folder, stage, cfg, data, ranks):
    """(where to build the run, the record that finish_run writes to config.json).

    The run is built in <folder>.unfinished; what is stored in it names the final `folder`. With
    cfg.resume, log and checkpoints of a killed run stay there.
    """
    new = beside(folder, "unfinished")
    record = {
        "stage": stage,
        **vars(cfg),
        "dataset": data.name,
        "data_folder": str(data.folder),
        "data_hash": data.meta["hash"],
        "world": ranks.world,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "started": time.time(),
    }
    if ranks.main:
        lock(new)
        if not getattr(cfg, "resume", False):
            empty(new)
        write_json(new / "started.json", record)
        if context := click.get_current_context(silent=True):
            context.call_on_close(lambda: leave(new))
        print(
            f"{stage}: " + " ".join(f"{k}={v}" for k, v in vars(cfg).items() if v is not None),
            flush=True,
        )
        if is_run(folder):
            print(f"{folder} stays as it is until this run replaces it", flush=True)
    return new, record


def leave(new):
    """At the end of a command: what it did not finish stays only if --resume can use it."""
    if new in HELD:
        kept = complete(new / "checkpoints") or (new / "config.json").exists()
        if not kept and not (new / "teacher_states.npy").exists():
            shutil.rmtree(new, ignore_errors=True)
        unlock(new)


def finish_run(folder, record):
    """The record as it is stored. config.json is written last, then the run is put in its place."""
    new = beside(folder, "unfinished")
    record["seconds"] = round(time.time() - record.pop("started"), 1)
    record["finished"] = round(time.time(), 3)
    record["peak_gb"] = round(peak_gb(), 2)
    write_json(new / "config.json", record)
    try:
        put_in_place(folder)
    except OSError as bad:
        stop(
            f"the run is finished and whole in {new}, but could not be put in its place ({bad}); "
            "the same command with --resume does that"
        )
    unlock(new)
    return record


def stop_unless_finite(params, step, samples, data, losses=0.0):
    """Ends the run, before anything is updated, if a gradient (or a loss) is not finite.

    Both are sums over all processes, so all end."""
    grads = torch.stack(torch._foreach_norm([p.grad for p in params if p.grad is not None]))
    if not np.isfinite(losses).all() or not torch.isfinite(grads).all():
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        stop(
            f"step {step}: {int((~torch.isfinite(grads)).sum())} of {len(grads)} gradients are not "
            "finite"
            + (f", the loss is {losses}" if losses else "")
            + f" (samples {shown} of {data.name}); nothing was "
            "updated and the last checkpoint is good; lower --lr and run again, or look at those "
            "samples"
        )
