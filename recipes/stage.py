"""A stage of a recipe: a command of the README, run unless its run is finished."""

import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from delrec import runtime
from delrec.lm.listed import backbone_digest
from delrec.runtime import beside, folder_of, is_run, load_run, read_json, settle, when

# flags that shape a run: a finished one of other values is not the one asked for
SHAPING = (
    "--samples",
    "--seed",
    "--input",
    "--k",
    "--h",
    "--tasks",
    "--model",
    "--lr",
    "--lr-lm",
    "--lr-prompt",
    "--layers",
    "--backbone",
    "--soft-prompt",
    "--maps",
    "--verbalizer",
    "--order",
    "--loss",
    "--val-samples",
    "--evals",
)
SHOWN = set()  # commands that --dry-run has printed: each once


def stage(folder, *args, procs=1, jobs=1, job=0, dry=False):
    """Run a command of the README unless its run is finished; --resume takes up one that was
    killed. jobs: how many stand side by side, of which this is number `job`. dry: print it only.
    """
    resume = []
    if not dry and folder is not None:
        mark = "meta.json" if folder.name == "export" else "config.json"
        settle(folder, mark)
        if (folder / mark).exists():
            reuse(folder, mark, args)
            return
        kept = (beside(folder, "unfinished") / "checkpoints", folder / "checkpoints")
        resume = ["--resume"] if any(path.is_dir() for path in kept) else []
    line, many = [str(a) for a in (*args, *resume)], procs > 1 and args[0] != "data/prepare.py"
    shown = f"{f'torchrun --nproc_per_node={procs}' if many else 'python'} {shlex.join(line)}"
    if dry:
        if shown not in SHOWN:
            print(shown)
        SHOWN.add(shown)
        return
    print(f"\n=== {shown}" + (f" > {folder}.out" if jobs > 1 else ""), flush=True)
    launch = (
        [
            "-m",
            "torch.distributed.run",
            *(["--standalone"] if jobs > 1 else []),
            f"--nproc_per_node={procs}",
        ]
        if many
        else ["-u"]
    )
    # torchrun's own choice is 1
    own = (
        {"OMP_NUM_THREADS": str(max(os.cpu_count() // (procs * jobs), 1))}
        if many or jobs > 1
        else {}
    )
    if jobs > 1 and torch.cuda.device_count() >= procs * jobs:
        own["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(job * procs, (job + 1) * procs)))
    if jobs > 1:
        folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with open(f"{folder}.out", "a") if jobs > 1 else nullcontext() as out:
        code = subprocess.run(
            [sys.executable, *launch, *line],
            cwd=runtime.ROOT,
            env=os.environ | own,
            stdout=out,
            stderr=out,
        ).returncode
    if code:
        sys.exit(
            f"{Path(sys.argv[0]).stem}: '{args[0]}' stopped with exit code {code}; its message is "
            f"{f'in {folder}.out' if jobs > 1 else 'above'}. The same command goes on from "
            "here"
        )
    if jobs > 1:
        print(f"=== {folder} took {(time.time() - began) / 60:.1f} minutes", flush=True)


def reuse(folder, mark, args):
    """Says that a finished run is used again, and what it was made of that is another by now.

    One that was made with other values of the flags that shape it is not the one asked for, and
    ends the process.
    """
    if mark == "meta.json":
        print(f"=== {folder} is there", flush=True)
        return
    made = {"input": "titles", **read_json(folder / mark)}
    for flag, value in zip(args, args[1:]):
        key = (
            "backbone_run"
            if flag == "--backbone"
            else str(flag).removeprefix("--").replace("-", "_")
        )
        # a run is named by its folder
        if flag in SHAPING and key in made and Path(str(made[key])).name != Path(str(value)).name:
            sys.exit(
                f"{Path(sys.argv[0]).stem}: {folder} was made with {flag} {made[key]}, here it is "
                f"{value}; move that folder away, or ask for what made it"
            )
    print(f"=== {folder} is there", flush=True)
    if newer := made_before(folder, made):
        print(
            f"    but it was made before {' and '.join(newer)} was trained again; to make it anew: "
            f"python {shlex.join(map(str, args))} --overwrite",
            flush=True,
        )
    if (beside(folder, "unfinished") / "checkpoints").is_dir():
        print(
            f"    {beside(folder, 'unfinished')}, which would replace it, was killed; it is left "
            "alone",
            flush=True,
        )


def made_before(folder, made):
    """What the run in `folder` was made of (backbone, soft prompt, teacher, maps, LM) and was
    finished after it began.
    """
    if "finished" not in made:  # of earlier versions
        return []
    began, newer = made["finished"] - made["seconds"], []
    for key in ("backbone_run", "soft_prompt", "teacher", "maps", "llm"):
        source = folder_of("runs", made.get(key) or "none")
        if source == folder or not is_run(source):
            continue
        if key == "backbone_run" and made.get("backbone_digest") == (backbone_digest(source) or 0):
            continue  # trained again, with the same result
        if read_json(source / "config.json").get("finished", 0) > began + 0.1:
            newer.append(f"{source} ({when(load_run(source))})")
    return list(dict.fromkeys(newer))
