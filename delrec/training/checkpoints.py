"""Checkpoints: a run that was killed anywhere continues with --resume as if nothing had happened.

runs/<dataset>/<name>.unfinished/checkpoints/step-000123/ holds tensors.safetensors (weights,
optimiser, the best so far, the random state of every process), state.json (numbers) and meta.json
(sha256 of both, and what the run was made with). A checkpoint is written under a temporary name,
flushed and renamed; the two newest are kept, and all go when the run is finished. Nothing is
pickled.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from delrec.processes import Ranks, finish, max_over_ranks, note_stop
from delrec.runtime import Prepared, as_kept, not_allowed, stop, write_tensors

# exit code of a run that was asked to stop (SIGTERM, Ctrl-C) and saved: sysexits.h's "try again
# later"
STOPPED = 75
FORM = 3  # of what a checkpoint holds: one of another form is not continued
# flags that do not change the answer; stage 2's dropout draws other numbers with another micro,
# cache_prefix or shard, and draws.Draws looks after that
MAY_CHANGE = {
    "out",
    "resume",
    "overwrite",
    "checkpoint_every",
    "micro",
    "cache_prefix",
    "gradient_checkpointing",
    "shard",
    "check_llm",
    "allow_unknown",
}
NOTED = (
    "\nasked to stop: the step is finished and saved first, and after the last step the run is "
    "finished; a second time ends it at once\n"
)
asked = []


def note(number: int, _: object) -> None:
    """Notes a signal and says so; a second one ends the process at once."""
    if asked:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    asked.append(number)
    with contextlib.suppress(OSError):  # print may be at work, and cannot be called again then
        os.write(2, NOTED.encode())


def listen() -> None:
    """From now on SIGTERM and Ctrl-C are noted, for the loop to finish its step and save. What was
    noted between two loops (of a backbone and its folds) stays so: the next one stops."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def stop_asked(ranks: Ranks) -> bool:
    """True on all processes if any was asked to stop."""
    return bool(asked) if ranks.world == 1 else max_over_ranks(len(asked), ranks) > 0


def made_with(cfg: SimpleNamespace, data: Prepared, ranks: Ranks, lm: str | None = None) -> dict:
    """What must be the same for a checkpoint to be continued: every flag that shapes the answer,
    the data, the LM, the number of processes.
    """
    flags = {k: v for k, v in vars(cfg).items() if k not in MAY_CHANGE}
    return json.loads(
        json.dumps(
            flags
            | {"dataset": data.name, "data_hash": data.meta["hash"], "processes": ranks.world}
            | ({"lm": lm, "prompt_words": data.meta.get("words")} if lm else {})
        )
    )


class Saver:
    """Writes checkpoints of one run. every: steps between two, 0 = as often as costs under a
    twentieth of the time.
    """

    def __init__(self, out: Path, every: int, made: dict, ranks: Ranks):
        self.folder, self.every = Path(out) / "checkpoints", every
        self.made, self.ranks = as_kept(made, Path(out)), ranks
        self.cost, self.since = 0.0, time.time()

    def due(self, step: int) -> bool:
        """True on all processes if a checkpoint is to be written after this step."""
        if self.every:
            return step % self.every == 0
        due = time.time() - self.since >= 20 * self.cost
        if self.ranks.world == 1:
            return due
        return max_over_ranks(due and self.ranks.main, self.ranks) > 0

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Writes a checkpoint: tensors by name, and a state of what JSON can hold.

        Every process calls it; the first one writes.
        """
        began, rngs = time.time(), {}
        for name, rng in random_states(self.ranks.device).items():
            each = [rng]
            if self.ranks.world > 1:
                each = [
                    torch.empty_like(rng, device=self.ranks.device) for _ in range(self.ranks.world)
                ]
                dist.all_gather(each, rng.to(self.ranks.device))
            rngs |= {f"{name}.{rank}": state for rank, state in enumerate(each)}
        if self.ranks.main:
            try:
                self.write(step, tensors | rngs, state)
            except OSError as bad:
                kept = complete(self.folder)
                stop(
                    f"the checkpoint of step {step} could not be written to {self.folder} ({bad}); "
                    + (f"that of step {kept[-1][0]} is whole: " if kept else "")
                    + "free the space and run the same command with --resume"
                )
        self.cost, self.since = time.time() - began, time.time()

    def write(self, step: int, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Writes a checkpoint, whole or not at all; all but the two newest are removed."""
        final = self.folder / f"step-{step:06d}"
        tmp = Path(f"{final}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        try:
            write_tensors(
                tmp / "tensors.safetensors",
                {k: t.detach().cpu().contiguous() for k, t in tensors.items()},
            )
            (tmp / "state.json").write_text(json.dumps(state))
            files = {}
            for name in ("tensors.safetensors", "state.json"):
                with open(tmp / name, "rb") as f:
                    files[name] = hashlib.file_digest(f, "sha256").hexdigest()
                    os.fsync(f.fileno())
            meta = {"step": step, "form": FORM, "files": files, "made_with": self.made}
            with open(tmp / "meta.json", "w") as f:
                f.write(json.dumps(meta))
                f.flush()
                os.fsync(f.fileno())
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        # of a run that was resumed from an older one
        shutil.rmtree(final, ignore_errors=True)
        os.replace(tmp, final)
        flush_folder(self.folder)
        for _, old in complete(self.folder)[:-2]:
            shutil.rmtree(old)

    def load(self) -> tuple[int, dict[str, torch.Tensor], dict] | None:
        """(step, tensors, state) of the newest whole checkpoint, the random state set; None if
        there is none.
        """
        for step, folder in reversed(complete(self.folder)):
            try:
                meta = json.loads((folder / "meta.json").read_text())
                self.must_continue(meta)  # a damaged one's too: what else is kept is of that run
                for name, digest in meta["files"].items():
                    with open(folder / name, "rb") as f:
                        if hashlib.file_digest(f, "sha256").hexdigest() != digest:
                            raise ValueError(f"{name} is not what was written")
                tensors = load_file(folder / "tensors.safetensors")
                state = json.loads((folder / "state.json").read_text())
            except PermissionError as bad:
                stop(not_allowed(bad.filename or folder))
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as bad:
                if self.ranks.main:
                    print(f"{folder} is damaged ({bad}); trying the one before it", flush=True)
                continue
            own = {name: f"{name}.{self.ranks.rank}" for name in ("rng", "gpu_rng")}
            own = {name: tensors.pop(key) for name, key in own.items() if key in tensors}
            set_random_states(own, self.ranks.device)
            if self.ranks.main:
                print(f"continuing from step {step} ({folder})", flush=True)
            return step, tensors, state
        if self.ranks.main:
            print(f"no checkpoint in {self.folder}; beginning at the beginning", flush=True)
        return None

    def must_fit(self) -> None:
        """Stops as `load` would where a checkpoint that is kept is not continued: asked before work
        that one needs. What is damaged is left to `load`."""
        for _, folder in complete(self.folder):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                self.must_continue(json.loads((folder / "meta.json").read_text()))

    def must_continue(self, meta: dict) -> None:
        """Stops if a checkpoint was made with something else than this run, or by a version that
        stored other things."""
        if meta.get("form") != FORM:
            stop(
                f"cannot resume {self.folder.parent}: its checkpoint was written by an earlier "
                "version; finish it with that version, or begin anew with --overwrite instead of "
                "--resume"
            )
        for key, was in meta["made_with"].items():
            if (now := self.made.get(key)) != was:
                flag = key.replace("_", "-")
                stop(
                    f"cannot resume {self.folder.parent}: {flag} was {was}, now it is {now}; "
                    "run it as it was, or with --overwrite instead of --resume from the beginning"
                )

    def end(self, step: int) -> NoReturn:
        """Ends the process of a run that was asked to stop, and says how to go on."""
        asked.clear()
        if self.ranks.main:
            print(
                f"stopped as asked after step {step}, saved in {self.folder}; "
                f"run the same command with --resume to continue (exit code {STOPPED})",
                flush=True,
            )
            note_stop()
        finish(self.ranks)
        raise SystemExit(STOPPED)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """What this process draws next, uint8: by the CPU's generator, and by its GPU's, which draws
    the dropout there."""
    if device.type != "cuda":
        return {"rng": torch.get_rng_state()}
    return {"rng": torch.get_rng_state(), "gpu_rng": torch.cuda.get_rng_state(device)}


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Lets each generator go on from its state. A checkpoint of a CPU has none of a GPU's."""
    torch.set_rng_state(states["rng"])
    if device.type == "cuda" and "gpu_rng" in states:
        torch.cuda.set_rng_state(states["gpu_rng"], device)


def flush_folder(folder: Path) -> None:
    """Has a folder's names written to the disk, where the system can (Windows opens no folders)."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    os.fsync(number)
    os.close(number)


def complete(folder: Path) -> list[tuple[int, Path]]:
    """[(step, folder)] of the checkpoints that were finished, oldest first."""
    found = [
        p
        for p in folder.glob("step-*")
        if p.suffix != ".tmp" and (p / "meta.json").exists() and p.name[5:].isdigit()
    ]
    return sorted((int(p.name[5:]), p) for p in found)
