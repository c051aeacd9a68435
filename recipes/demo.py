"""make demo: ML-100K and a real LLM through all stages on this machine, then the table.

    python recipes/demo.py            about 15 minutes on 2 cores

Every stage is one of the commands of the README, with fewer samples. Its runs stand in
runs/ml-100k/demo/; a second demo makes them anew.

The last line is one JSON object with the demo's minutes, its peak memory and the table's rows.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import click

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.runtime import described, is_run, load_run, settle, when

ROOT = runtime.ROOT
TEST_SAMPLES = 300
HOME = "ml-100k/demo"  # its own runs: those of the README's commands are never touched
STAGES = [  # (run that it writes, command)
    (None, "data/prepare.py ml-100k"),
    (None, "data/prepare.py smollm2-135m"),
    ("sasrec", f"train_backbone.py --dataset ml-100k --out {HOME}/sasrec --overwrite"),
    (
        "prompt",
        f"distill.py --dataset ml-100k --backbone {HOME}/sasrec --out {HOME}/prompt "
        "--samples 64 --val-samples 48 --evals 1 --overwrite",
    ),
    (
        "delrec",
        f"finetune.py --dataset ml-100k --soft-prompt {HOME}/prompt --out {HOME}/delrec "
        "--samples 192 --val-samples 100 --evals 1 --overwrite",
    ),
    (
        "lm",
        f"evaluate.py --llm smollm2-135m --llm-out {HOME}/lm --ckpt {HOME}/sasrec {HOME}/delrec "
        f"--dataset ml-100k --limit {TEST_SAMPLES} --val-samples 100 --overwrite",
    ),
]


def say_what_is_replaced(name: str) -> None:
    """Prints a line if the demo ran before.

    Each stage is made anew: the minutes are those of all stages.
    """
    folder = runtime.ROOT / "runs" / HOME / name
    settle(folder, "config.json")
    if is_run(folder):
        print(
            f"=== {folder}, finished {when(load_run(folder))}, is replaced once the new one is",
            flush=True,
        )


def last_line_of(command: str) -> str:
    """The last line that a stage prints; one that fails ends the demo."""
    last = ""
    process = subprocess.Popen(
        [sys.executable, "-u", *command.split()],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    if process.wait():
        sys.exit(
            f"demo: '{command.split()[0]}' stopped with exit code {process.returncode}; "
            "its message is above"
        )
    return last


def peak_gb() -> float:
    """The most memory that a stage has held, in GB."""
    unit = 2**20 if sys.platform != "darwin" else 2**30
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit


@click.command(**described(__doc__))
def main() -> None:
    """Every stage of the README on ML-100K, small, and the table."""
    began, minutes = time.time(), []
    for name, command in STAGES:
        print(f"\n=== python {command}", flush=True)
        if name:
            say_what_is_replaced(name)
        start = time.time()
        last = last_line_of(command)
        minutes.append(f"{command.split()[0]} {(time.time() - start) / 60:.1f}")
    result = json.loads(last)
    print("\nminutes: " + ", ".join(minutes))
    all_minutes = round((time.time() - began) / 60, 2)
    result["rows"] = [
        {"name": "demo.minutes", "value": all_minutes, "unit": "min", "goal": 15},
        {"name": "demo.peak_gb", "value": round(peak_gb(), 2), "unit": "GB", "goal": 8},
        *result["rows"],
    ]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
