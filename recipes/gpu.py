"""make gpu: every row that only a GPU fills, in at most nine minutes, stage by stage.

    make gpu                                        on a machine with a card, python and torch
    make gpu WHEELS=wheels                          the same without a network (docs/gpu.md)
    make gpu-rehearse                               the same program on a CPU, with tiny shapes
    python recipes/gpu.py --stages kernels lms      only these stages

Each stage is a process of its own with a time box, and writes its rows at once, one JSON object a
line: a hang, a crash or a cut loses the rest of one stage. What a stage did not reach gets a row
without a value that says why. Stages that end early leave their time to the next ones.

The command line is read by argparse, not click: a bare machine has no click before --wheels.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# run as a script, only this folder is on the path
ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from recipes import gpu_wheels  # noqa: E402
from recipes.gpu_rows import PLAN, Rows, read, unexpected  # noqa: E402

MEASURED, REHEARSAL = "runs/gpu", "runs/gpu-rehearsal"  # folders: a toy's runs stay apart
BOXES = {"checks": 110, "kernels": 60, "lms": 100, "chain": 165, "variants": 85}  # seconds
REHEARSED = dict.fromkeys(BOXES, 300)  # beside other work; alone far less
MODULES = {
    "checks": "gpu_checks",
    "kernels": "gpu_kernels",
    "lms": "gpu_lm",
    "chain": "gpu_chain",
    "variants": "gpu_variants",
}


def options() -> argparse.Namespace:
    """What was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        help="folder for rows.jsonl and what the stages print (default: of --rehearse "
        f"{REHEARSAL}, else {MEASURED})",
    )
    add("--stages", nargs="+", choices=list(PLAN), default=list(PLAN), help="only these")
    add("--rehearse", action="store_true", help="tiny shapes on a CPU, Triton interpreted")
    add("--quick", action="store_true", help="with --rehearse: leave out what takes long")
    add("--wheels", type=Path, help="folder of wheels for what this python lacks")
    # how the stages are started
    add("--stage", choices=list(PLAN), help=argparse.SUPPRESS)
    add("--card", default="", help=argparse.SUPPRESS)
    typed = parser.parse_args()
    typed.out = typed.out or (REHEARSAL if typed.rehearse else MEASURED)
    return typed


def card_of(rehearse: bool) -> str:
    """The card's name, by nvidia-smi: this process never touches the card."""
    if rehearse:
        return "CPU, rehearsal on tiny shapes"
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split("\n")
    except (OSError, subprocess.TimeoutExpired):
        names = []
    names = [name.strip() for name in names if name.strip()]
    if not names:
        sys.exit(
            "gpu: nvidia-smi names no card on this machine; make gpu-rehearse runs the same "
            "program on a CPU"
        )
    return names[0] if len(names) == 1 else f"{len(names)} x {names[0]}"


def commit() -> str | None:
    """The commit of this tree."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or None
    return None


# ---------------------------------------------------------------- a stage


def run_here(typed: argparse.Namespace) -> None:
    """Runs one stage in this process, which was started for it."""
    import importlib

    stage = importlib.import_module(f"recipes.{MODULES[typed.stage]}")
    rows = Rows(Path(typed.out) / "rows.jsonl", typed.stage, typed.card, commit())
    sys.stderr = sys.stdout
    stage.measure(rows, rehearse=typed.rehearse, quick=typed.quick, out=Path(typed.out))


def run_boxed(name: str, typed: argparse.Namespace, env: dict[str, str], box: float) -> str:
    """Why the process of a stage ended before its last row; "" where it did not. It gets `box`
    seconds.
    """
    command = [sys.executable, "-u", str(ROOT / "recipes" / "gpu.py"), "--stage", name]
    command += ["--out", str(typed.out), "--card", typed.card]
    command += ["--rehearse"] * typed.rehearse + ["--quick"] * typed.quick
    printed = Path(typed.out) / f"{name}.out"
    with open(printed, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(box)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    if code is None:
        return f"the stage's time box of {box:.0f} s ended"
    lines = [line for line in printed.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {code}: {(lines or ['nothing'])[-1].strip()[:200]}" if code else ""


def end_group(process: subprocess.Popen) -> None:
    """Ends a stage's process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_stages(typed: argparse.Namespace, env: dict[str, str]) -> None:
    """Runs the stages that were asked for, one after the other."""
    boxes = REHEARSED if typed.rehearse else BOXES
    until = time.time() + sum(boxes[name] for name in typed.stages)
    for i, name in enumerate(typed.stages):
        later = sum(boxes[other] for other in typed.stages[i + 1 :])
        began, box = time.time(), until - time.time() - later
        why = run_boxed(name, typed, env, box)
        print(f"\n=== {name}: {time.time() - began:.0f} s of {box:.0f}{why and f'; {why}'}")
        sys.stdout.flush()
        rows = Rows(Path(typed.out) / "rows.jsonl", name, typed.card, commit())
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            for missing in rows.missing():
                rows.add(missing, None, why or "the stage ended without it")
        say([row for row in read(rows.path) if row["name"] in rows.names])


# ---------------------------------------------------------------- what is said


def say(rows: list[dict]) -> None:
    """Prints rows as a table."""
    for row in rows:
        value, goal = row["value"], row["goal"]
        said = f"{value:>14,.4f} {row['unit']}" if value is not None else f"  null: {row['reason']}"
        print(f"{row['name']:<58}{said}" + (f"  (goal {goal})" if goal is not None else ""))


# what the ways of a shape are compared with: the same work by the product's way
COMPARED = {"ms_per_request": ("in batch", "mask"), "ms": ("one body", "alone_body")}


def winners(rows: list[dict]) -> list[str]:
    """A line for each shape on which variants were measured: the fastest, and by how much."""
    shapes: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        parts = row["name"].split(".")
        # a whole request by itself has no rival
        if parts[0] == "variant" and parts[-1] in COMPARED and parts[2] != "alone" and row["value"]:
            shapes.setdefault((parts[1], parts[-1]), {})[parts[2]] = row["value"]
    lines = []
    for (name, unit), found in shapes.items():
        where, other = COMPARED[unit]
        best = min(found, key=found.get)
        by = f"{other}, by which it is judged, was not measured"
        if other in found:
            by = f"{found[other] / found[best]:.2f} times as fast as {other}"
        lines.append(f"{name}, {where}: {best} won with {found[best]:.3f} ms a request, {by}")
    return lines


def main() -> None:
    """Every stage, its rows, and which variant won."""
    typed = options()
    if typed.stage:
        run_here(typed)
        return
    typed.card = card_of(typed.rehearse)
    out = Path(typed.out)
    out.mkdir(parents=True, exist_ok=True)
    typed.out = out.resolve()
    rows = out / "rows.jsonl"
    if rows.exists():  # of an earlier time: kept
        rows.rename(out / f"rows-{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl")
    env = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if typed.rehearse else {})
    if typed.rehearse:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if typed.wheels:
        env |= gpu_wheels.install(typed.wheels, typed.out / "site")
    began = time.time()
    run_stages(typed, env)
    print("\n=== which variant won")
    print("\n".join(winners(read(rows))) or "none was measured")
    print(f"\n{typed.card}: {time.time() - began:.0f} s; rows in {rows}")
    if typed.rehearse and (lost := unexpected(read(rows))):
        first = f"{lost[0]['name']} ({lost[0]['reason']})"
        sys.exit(f"gpu: {len(lost)} rows lack a value that a CPU gives too, {first} the first")


if __name__ == "__main__":
    main()
