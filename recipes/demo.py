"""make demo: ML-100K and a real LLM through all stages on this machine, then the table.

    python recipes/demo.py            about 15 minutes on 2 cores

Every stage is one of the commands of the README, seed 0, with fewer samples. Items are vectors of
the backbone in both stages, as an LM learns most from them. Stage 2 trains the LM's first 6 layers
(SLMRec): five times as fast as all 30, so the same minutes hold more windows. All test samples are
ranked, among 15 candidates and among all items. One more row reads titles by all 30 layers, for
fewer minutes and test samples. The backbone is trained to its own end; what it says of training
samples is in sample (no --folds).
The runs stand in runs/ml-100k/demo/, with the table's page demo.html; a second demo makes them
anew.

At the end it says by how much DELRec differs from its backbone, with the interval, whatever the
sign, and where the page is. The last line is one JSON object with the difference, the demo's
minutes, its peak memory and the tables' rows.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.prepared import Data, load_data, users
from delrec.evaluation.scores import gain_over, stored_metrics
from delrec.metrics import metrics
from delrec.runtime import complete_renames, described, is_run, load_run, read_npy, when
from delrec.training.memory import peak_gb
from recipes.stage import end_with_parent, in_root

ROOT = runtime.ROOT
HOME = "ml-100k/demo"  # its own runs: those of the README's commands are never touched
PAGE = f"runs/{HOME}/demo.html"
STAGES = [  # (run that it writes, command)
    (None, "data/prepare.py ml-100k"),
    (None, "data/prepare.py smollm2-135m"),
    ("sasrec", f"train_backbone.py --dataset ml-100k --out {HOME}/sasrec --overwrite"),
    (
        "prompt",
        f"distill.py --dataset ml-100k --backbone {HOME}/sasrec --out {HOME}/prompt --input ids "
        "--samples 128 --val-samples 48 --evals 1 --overwrite",
    ),
    (
        "delrec",
        f"finetune.py --dataset ml-100k --soft-prompt {HOME}/prompt --out {HOME}/delrec "
        "--input ids --layers 6 --samples 8192 --val-samples 1000 --evals 5 --overwrite",
    ),
    (
        "titles",
        f"finetune.py --dataset ml-100k --soft-prompt none --backbone {HOME}/sasrec "
        f"--out {HOME}/titles --samples 48 --batch 8 --val-samples 30 --evals 1 --overwrite",
    ),
    (
        None,
        f"evaluate.py --ckpt {HOME}/titles --limit 60 --val-samples 30",
    ),
    (
        None,
        f"evaluate.py --ckpt {HOME}/sasrec {HOME}/delrec --val-samples 1000 --report {PAGE}",
    ),
]


def say_what_is_replaced(name: str) -> None:
    """Prints a line if the demo ran before.

    Each stage is made anew: the minutes are those of all stages.
    """
    folder = runtime.ROOT / "runs" / HOME / name
    complete_renames(folder, "config.json")
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
        preexec_fn=end_with_parent,
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


def minus_backbone(data: Data, home: Path) -> dict[str, list[float]]:
    """What DELRec's row is above its backbone's on the whole test part, as {metric: [mean, low,
    high]}: the paired difference, and the ends of its interval over users."""
    own, backbones = values(home / "delrec", data), values(home / "sasrec", data)
    own_nR, backbones_nR = (np.stack([*found.values()], 1) for found in (own, backbones))
    return dict(zip(own, gain_over(own_nR, backbones_nR, data).T.tolist()))


def values(folder: Path, data: Data) -> dict[str, np.ndarray]:
    """What evaluate.py stored of a run, as {metric: its value for each test sample (n,)}."""
    near = stored_metrics(folder, data)
    greater_n, equal_n = np.asarray(read_npy(folder / "full_test.npy")).T
    full = metrics(greater_n, equal_n, ks=(10, 20))
    return {
        "hr@1 of 15": near["hr@1"],
        "ndcg@10 of 15": near["ndcg@10"],
        "hr@20 of all": full["hr@20"],
        "ndcg@10 of all": full["ndcg@10"],
    }


def print_end(gains: dict[str, list[float]], data: Data, minutes: list[str]) -> None:
    """Prints how long each stage took, what minus_backbone found, and where the page is."""
    print("\nminutes: " + ", ".join(minutes))
    n_users = len(np.unique(users(data, np.asarray(data.test))))
    print(f"\nDELRec minus its backbone, {len(data.test)} test samples of {n_users} users, seed 0:")
    for name, (mean, low, high) in gains.items():
        print(f"  {name:15} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    print(f"\nthe page of this table, with its figures, for a browser: {runtime.ROOT / PAGE}")


def gain_rows(gains: dict[str, list[float]]) -> list[dict]:
    """The same as rows of the last line."""
    ends = ("minus_backbone", "minus_backbone_low", "minus_backbone_high")
    return [
        {"name": f"demo.{end}.{name}", "value": round(value, 4), "unit": "", "goal": None}
        for name, found in gains.items()
        for end, value in zip(ends, found)
    ]


@click.command(**described(__doc__))
def main() -> None:
    """Every stage of the README on ML-100K, small, and the tables."""
    in_root()
    began, minutes, tables = time.time(), [], []
    for name, command in STAGES:
        print(f"\n=== python {command}", flush=True)
        if name:
            say_what_is_replaced(name)
        start = time.time()
        last = last_line_of(command)
        minutes.append(f"{command.split()[0]} {(time.time() - start) / 60:.1f}")
        if command.startswith("evaluate.py"):
            tables.append(json.loads(last))
    all_minutes, held = round((time.time() - began) / 60, 2), peak_gb(children=True)
    data = load_data("ml-100k")
    gains = minus_backbone(data, runtime.ROOT / "runs" / HOME)
    print_end(gains, data, minutes)
    of_titles, result = tables
    result["rows"] = [
        {"name": "demo.minutes", "value": all_minutes, "unit": "min", "goal": 15},
        {"name": "demo.peak_gb", "value": round(held, 2), "unit": "GB", "goal": 8},
        *gain_rows(gains),
        *result["rows"],
        *(row for row in of_titles["rows"] if row["name"].endswith(".titles")),
    ]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
