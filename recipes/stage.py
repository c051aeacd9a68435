"""A stage of a recipe: a command of the README, run unless its run is finished."""

import ctypes
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Any

import click
import torch

from delrec import runtime
from delrec.backbone.text import names_of as names_of_text
from delrec.data.prepared import load_data
from delrec.lm.listed import backbone_digest
from delrec.places import RANDOM, current_folder, hash_in
from delrec.processes import run_to_its_end
from delrec.runtime import (
    beside,
    complete_renames,
    config_of_run,
    folder_of,
    is_run,
    load_run,
    when,
)
from delrec.serving.keywords import key_of

# Linux tells a process when its parent has ended (prctl); loaded here, as a forked one should not
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None) if sys.platform == "linux" else None, 1
# flags that do not say what a run is, but where it stands, how it is made, what becomes of it
NOT_SHAPING = ("--dataset", "--out", "--resume", "--overwrite", "--checkpoint-every", "--micro")
NOT_SHAPING += ("--shard", "--gradient-checkpointing", "--cache-prefix", "--check-llm")
NOT_SHAPING += ("--allow-unknown",)  # of a data set the hash is looked at
AT_LEAST = ("--lists", "--top-h")  # a run that has more of it serves too
# switches: where one is not typed it is off, unless it is another run's
SWITCHES = ("--paper", "--permute-text", "--permute-vectors", "--cold-out", "--one-target")
SWITCHES += ("--kd-permute", "--keep-rps-permuted", "--residual-counts", "--fp32")
# where a run's config calls a flag otherwise
KEYS = {"--backbone": "backbone_run", "--candidates": "C", "--from": "from_run"}


def stage(folder: Path | None, *args: object, procs: int = 1, jobs: int = 1, job: int = 0) -> None:
    """Runs a command of the README, and ends this process where it fails.

    folder: the run that the command makes, None if it makes none. A finished one is used again, one
    that was killed goes on. jobs: how many stages run side by side, of which this is number `job`;
    where there are several, what a stage prints stands in <folder>.out.
    """
    if folder is not None and folder.name != "export":  # evaluate.py looks what made an export
        complete_renames(folder, "config.json")
        if (folder / "config.json").exists():
            reuse(folder, args)
            return
        if was_killed(folder):
            args = [*args, "--resume"]
    printed = f"{folder}.out" if jobs > 1 else None
    print(f"\n=== {typed(args, procs)}" + (f" > {printed}" if printed else ""), flush=True)
    began = time.time()
    command = [*launcher(procs, jobs), *map(str, args)]
    code = exit_code(command, environment(procs, jobs, job), printed)
    if code:
        sys.exit(
            f"{Path(sys.argv[0]).stem}: '{args[0]}' stopped with exit code {code}; its message is "
            f"{f'in {printed}' if printed else 'above'}. The same command goes on from here"
        )
    if printed:
        print(f"=== {folder} took {(time.time() - began) / 60:.1f} minutes", flush=True)


def in_root(**typed: Any) -> dict[str, Any]:
    """What was typed, its paths whole. From here to its end a recipe stands in the program's root,
    where its stages run: both read the same there, and write where they read."""
    if current_folder(runtime.ROOT).resolve() != runtime.ROOT.resolve():
        typed = {key: whole(key, value) for key, value in typed.items()}
        click.get_current_context().with_resource(chdir(runtime.ROOT))
    return typed


def whole(key: str, value: Any) -> Any:
    """A value as it was typed; one with a / that is there from the current folder, as a whole path.
    Of several values, and of the words of --flags, each."""
    if isinstance(value, tuple):
        return tuple(whole(key, each) for each in value)
    if not isinstance(value, str) or os.sep not in value:
        return value
    if key == "flags":
        return shlex.join(whole("", word) for word in shlex.split(value))
    prefix, name = RANDOM.fullmatch(value).groups("")
    return prefix + os.path.abspath(name) if os.path.exists(name) else value


def prepare(dataset: str) -> None:
    """Prepares the embedded data set unless it is there; says of another how it is prepared."""
    if dataset == "ml-100k" and not (folder_of("data", dataset) / "meta.json").exists():
        stage(None, "data/prepare.py", dataset)
    load_data(dataset)


def places() -> int:
    """How many trainings fit side by side, each with a core or a GPU of its own."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def was_killed(folder: Path) -> bool:
    """Whether a killed run left checkpoints, in its own folder (earlier versions) or beside it."""
    kept = (beside(folder, "unfinished") / "checkpoints", folder / "checkpoints")
    return any(path.is_dir() for path in kept)


def typed(args: Sequence, procs: int = 1) -> str:
    """A command as a user types it."""
    program = f"torchrun --nproc_per_node={procs}" if procs > 1 else "python"
    return f"{program} {shlex.join(map(str, args))}"


def launcher(procs: int, jobs: int) -> list[str]:
    """This Python, or torchrun in it; torchruns side by side have ports of their own."""
    if procs == 1:
        return [sys.executable, "-u"]
    own_port = ["--standalone"] if jobs > 1 else []
    torchrun = ["-m", "torch.distributed.run", *own_port, f"--nproc_per_node={procs}"]
    return [sys.executable, *torchrun]


def environment(procs: int, jobs: int, job: int) -> dict[str, str]:
    """A stage's environment: its share of the cores, GPUs of its own where there are enough."""
    env = dict(os.environ)
    if procs > 1 or jobs > 1:  # torchrun's own choice is one thread
        env["OMP_NUM_THREADS"] = str(max(os.cpu_count() // (procs * jobs), 1))
    # seconds that torchrun gives a stopped training to save (torch 2.12 on); 30 may be too few
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if jobs > 1 and torch.cuda.device_count() >= procs * jobs:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus()[job * procs : (job + 1) * procs])
    return env


def visible_gpus() -> list[str]:
    """The names of the GPUs that this process may use: those it was given, or all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def exit_code(command: list[str], env: dict[str, str], printed: str | None) -> int:
    """Runs a command; what it prints is appended to the file `printed`, if one is named. At a
    Ctrl-C this process ends only after the command, which saves."""
    if printed:
        Path(printed).parent.mkdir(parents=True, exist_ok=True)
    with open(printed, "a") if printed else nullcontext() as out:
        streams = dict(stdout=out, stderr=out, preexec_fn=end_with_parent)
        done = run_to_its_end(command, cwd=runtime.ROOT, env=env, **streams)
    return done.returncode


def end_with_parent() -> None:
    """For subprocess's preexec_fn: the new process gets a SIGTERM when the one that started it
    ends, however that ends. So a training saves and stops, and none goes on that nobody waits for.
    """
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def reuse(folder: Path, args: Sequence) -> None:
    """Says that a finished run is used again, and what it was made of that was trained again since.

    One that was made with other values of the flags that shape it is not the one asked for, and
    ends the process.
    """
    made = {"input": "titles", **config_of_run(folder)}
    stop_if_made_otherwise(folder, made, args)
    stop_if_of_other_data(folder, made, args)
    print(f"=== {folder} is there", flush=True)
    if newer := made_before(folder, made):
        print(
            f"    but it was made before {' and '.join(newer)} was trained again; to make it anew: "
            f"{typed(args)} --overwrite",
            flush=True,
        )
    unfinished = beside(folder, "unfinished")
    if (unfinished / "checkpoints").is_dir():
        print(f"    {unfinished}, which would replace it, was killed; it is left alone", flush=True)


def stop_if_made_otherwise(folder: Path, made: dict, args: Sequence) -> None:
    """Ends the process if a flag that shapes a run has another value in its config. Every flag
    does, but for those of NOT_SHAPING."""
    asked = flags_typed(args)
    if "--from" not in asked:
        asked = {switch: [False] for switch in SWITCHES} | asked
    for flag, values in asked.items():
        key = KEYS.get(flag, key_of(flag))
        if flag in NOT_SHAPING or key not in made or serves(flag, made, key, values):
            continue
        sys.exit(
            f"{Path(sys.argv[0]).stem}: {folder} was made with {flag} {made[key]}, here it is "
            f"{' '.join(map(str, values))}; move that folder away, or ask for what made it"
        )


def flags_typed(args: Sequence) -> dict[str, list]:
    """{flag: its values} of a command; of a switch [True], of --no-switch {--switch: [False]}."""
    found, words = {}, [*map(str, args[1:]), "--"]
    for word, after in zip(words, words[1:]):
        if not word.startswith("--"):
            continue
        alone = after.startswith("--")
        if alone and word.startswith("--no-"):
            found[f"--{word.removeprefix('--no-')}"] = [False]
        else:
            found.setdefault(word, []).append(True if alone else after)
    return found


def serves(flag: str, made: dict, key: str, values: list) -> bool:
    """Whether a run whose config is `made` is what a flag of these values asks for."""
    if (flag, values) == ("--folds", ["0"]):  # folds only add files
        return True
    if flag == "--llm":
        return same_llm(made, values[-1])
    if flag in AT_LEAST:
        return made[key] >= int(values[-1])
    if isinstance(made[key], list):
        return len(made[key]) == len(values) and all(map(same_value, made[key], values))
    return same_value(made[key], values[-1])


def stop_if_of_other_data(folder: Path, made: dict, args: Sequence) -> None:
    """Ends the process if the data set was prepared anew, with another result, since the run."""
    dataset = next((value for flag, value in zip(args, args[1:]) if flag == "--dataset"), None)
    now = hash_in(folder_of("data", str(dataset))) if dataset else None
    if now and made.get("data_hash", now) != now:
        sys.exit(
            f"{Path(sys.argv[0]).stem}: {folder} was trained on another preparation of {dataset} "
            f"(hash {made['data_hash']}, now {now}); move that folder away"
        )


def same_value(made: object, asked: object) -> bool:
    """Whether a flag's value in a config is the one asked for, as a number (.2 is 0.2) or by name:
    a run is named by its folder."""
    try:
        return float(str(made)) == float(str(asked))
    except ValueError:
        return Path(str(made)).name == Path(str(asked)).name


def same_llm(made: dict, asked: object) -> bool:
    """Whether --llm of a run was the one asked for, by its whole name or folder. One that was cut
    knows what it was of; one that its soft prompt moved is the LM of that run, too.
    """
    from delrec.lm.model import located  # who trains a backbone needs no LM

    names = {made[key] for key in ("llm", "llm_from") if key in made}
    if made.get("soft_prompt") in names and is_run(Path(made["soft_prompt"])):
        names.add(config_of_run(Path(made["soft_prompt"]))["llm"])
    return located(str(asked)) in map(located, names)


def name_of(flags: Sequence[str]) -> str:
    """Flags as a part of a folder's name, so that runs of other flags are not taken for these."""
    return "-".join(flag.strip("-").replace("/", "-") for flag in flags)


def made_before(folder: Path, made: dict) -> list[str]:
    """Of what the run in `folder` was made of (backbone, soft prompt, teachers, sources of text,
    maps, LM, the run it went on from), what was finished after it began.
    """
    if "finished" not in made:  # of earlier versions
        return []
    began, newer = made["finished"] - made["seconds"], []
    keys = ("backbone_run", "soft_prompt", "teacher", "maps", "llm", "from_run")
    named = [(key, made.get(key)) for key in keys] + [("kd", name) for name in made.get("kd") or ()]
    named += [("text", name) for name in names_of_text(made.get("text") or "none")]
    for key, name in named:
        source = folder_of("runs", name or "none")
        if source == folder or not is_run(source):
            continue
        if key == "backbone_run" and made.get("backbone_digest") == (backbone_digest(source) or 0):
            continue  # trained again, with the same result
        if config_of_run(source).get("finished", 0) > began + 0.1:
            newer.append(f"{source} ({when(load_run(source))})")
    return list(dict.fromkeys(newer))
