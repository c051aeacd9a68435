"""Stage checks of make gpu: what must be right before anything is fast."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from delrec.runtime import ROOT, beside
from recipes import gpu_tiny
from recipes.gpu_rows import LEFT_OUT, Rows

FLAGS = (
    "--soft-prompt none --samples 64 --batch 8 --micro 4 --val-samples 8 --evals 1 "
    "--checkpoint-every 1 --overwrite"
)
# the rehearsal's part of the kernels' tests; make test runs them all
BRIEF = "tests/test_kernels_candidates.py"
INTERPRETED = "equal_the_loop and interpreted or (shape1 and interpreted)"


def measure(rows: Rows, rehearse: bool, quick: bool, out: Path) -> None:
    """Writes the rows of the kernels' tests, of a killed run, and of two cards."""
    if quick:
        rows.leave("", LEFT_OUT)
        return
    rows.attempt("checks.kernels", test_kernels, rows, rehearse)
    data = gpu_tiny.log(out / "toy")
    backbone = gpu_tiny.backbone(data, out / "toy" / "sasrec")
    llm = gpu_tiny.lm(out / "toy" / "lm") if rehearse else "smollm2-135m"
    command = ["finetune.py", "--dataset", data, "--backbone", backbone, "--llm", llm]
    command += FLAGS.split()
    whole = out / "toy" / "whole"
    run([*command, "--out", whole])
    rows.attempt("checks.resume", check_resume, rows, command, whole)
    rows.attempt("checks.two_cards", check_two_cards, rows, command, whole, rehearse)


def test_kernels(rows: Rows, rehearse: bool) -> None:
    """Writes how many of the kernels' tests pass on the device: every kernel, forward and backward,
    against fp64, twice bit by bit, on ragged and strided shapes.
    """
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_kernels_*.py"))
    chosen = ["-k", INTERPRETED, BRIEF] if rehearse else ["-m", "gpu", *files]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(pytest, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?)", done.stdout)}
    if not counts:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"pytest ended with {done.returncode}: {said[-1]}")
    rows.add("checks.kernels.passed", counts.get("passed", 0))
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    rows.add("checks.kernels.failed", failed)


def run(command: list, procs: int = 1) -> None:
    """Runs a script to its end; raises RuntimeError with its last line where it fails."""
    launcher = [sys.executable, "-u"]
    if procs > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={procs}"]
    done = subprocess.run([*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said[-1]}")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run left."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{path.name}:{key}": t for path in files for key, t in load_file(path).items()}


def same_bits(a: Path, b: Path) -> bool:
    """Whether two runs left the same tensors, bit for bit."""
    one, two = tensors_of(a), tensors_of(b)
    return bool(one) and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def check_resume(rows: Rows, command: list, whole: Path) -> None:
    """Writes whether a run that was killed after its first checkpoint and went on equals one that
    was never stopped.
    """
    name, killed = "checks.resume.same_bits", whole.with_name("killed")
    kept = beside(killed, "unfinished") / "checkpoints"
    shutil.rmtree(kept, ignore_errors=True)  # of an earlier time that was cut
    typed = [sys.executable, "-u", *map(str, command), "--out", str(killed)]
    process = subprocess.Popen(typed, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(kept.glob("*/meta.json")):
        time.sleep(0.02)
    if process.poll() is not None:
        rows.add(name, None, f"the run ended with {process.returncode} before it could be killed")
        return
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run([*(arg for arg in command if arg != "--overwrite"), "--out", killed, "--resume"])
    same = same_bits(whole, killed)
    rows.add(name, same)
    if not same:  # by the resume, or is no run on this card like another?
        again = whole.with_name("again")
        run([*command, "--out", again])
        print(f"two runs that were never stopped left the same bits: {same_bits(whole, again)}")


def check_two_cards(rows: Rows, command: list, whole: Path, rehearse: bool) -> None:
    """Writes whether two processes, a card each (NCCL; in the rehearsal gloo), leave what one
    leaves.
    """
    name, two = "checks.two_cards.same_bits", whole.with_name("two")
    if not rehearse and torch.cuda.device_count() < 2:
        rows.add(name, None, "this machine has one card")
        return
    run([*command, "--out", two], procs=2)
    rows.add(name, same_bits(whole, two))
