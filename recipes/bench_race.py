"""How long until SASRec is good? train_backbone.py beside RecTools and RecBole, on one log.

    python recipes/bench_race.py --rectools PYTHON --recbole PYTHON    a python that has it, from
        python3 -m venv /tmp/rectools
        /tmp/rectools/bin/pip install torch "rectools[torch]"
        python3 -m venv /tmp/recbole
        /tmp/recbole/bin/pip install torch recbole==1.2.1 "numpy<2" "pandas<2.2"
    python recipes/bench_race.py --dataset beauty --flags "--preset beauty" --rectools PYTHON

All learn from the same interactions, and after each epoch rank all items for the same validation
samples, those that choose our epoch; what a user had is left out. Each has its own defaults, but
trains until it has waited ours for a better epoch (--patience), or for --minutes. RecTools runs
with each --window as well, since its epochs read only the last so many purchases of a user.

A row says what was reached and when, and the time of ours and theirs to the level that both
reached. Theirs is the time of training steps alone; ours has its start and validations in it, too.
Seconds are the processor's, so that other work on the machine counts little. They take turns,
nothing runs at once. The last line is one JSON object.
"""

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.data.bench import measured, said_by, samples_of, write_counts
from delrec.data.prepared import Data, halves_of_validation, histories, load_data, users
from delrec.runtime import ROOT, described, machine, stop

RECBOLES_WINDOW = 50  # its default, and that of its users


@dataclass
class Run:
    """How good a program was after each of its epochs."""

    name: str
    seconds: np.ndarray  # (epochs,) of the processor, since training began
    quality: np.ndarray  # (epochs,) NDCG@10 among all items, history masked

    def reaches(self, level: float) -> float:
        """The seconds until it is first as good as that."""
        return float(self.seconds[np.argmax(self.quality >= level)])

    def row(self, ours: "Run") -> dict:
        """What is printed of it."""
        level = min(self.quality.max(), ours.quality.max())
        at, best = self.reaches(level), int(self.quality.argmax())
        return {
            "program": self.name,
            "best": round(float(self.quality[best]), 4),
            "epoch": best + 1,
            "epochs": len(self.quality),
            "seconds": round(float(self.seconds[best]), 1),
            "level": round(float(level), 4),
            "theirs": round(at, 1),
            "ours": round(ours.reaches(level), 1),
            "ratio": round(at / ours.reaches(level), 2),
        }


# ---------------------------------------------------------------- what all learn from


def samples_that_choose(data: Data) -> np.ndarray:
    """The validation samples by which train_backbone.py chooses its epoch."""
    return np.asarray(data.val)[halves_of_validation(data)[0]]


def write_work(data: Data, path: Path, limits: dict) -> None:
    """Writes the interactions of training and the samples that are ranked. limits: seconds and
    patience of a run."""
    last_U = np.full(len(data.ptr) - 1, -1)
    np.maximum.at(last_U, users(data, np.asarray(data.train)), np.asarray(data.train))
    at = np.arange(len(data.items))
    owner = users(data, at)
    trained = at <= last_U[owner]

    samples = samples_that_choose(data)
    had_nL = histories(data, samples, int(np.diff(data.ptr).max()))
    asked, place = np.nonzero(had_nL)
    work = dict(
        train_user=owner[trained],
        train_item=data.items[trained].astype(np.int64),
        asked_sample=asked,
        asked_item=had_nL[asked, place],
        val_target=data.items[samples].astype(np.int64),
    )
    np.savez(path, **work, **limits)


def write_for_recbole(data: Data, path: Path, limits: dict) -> None:
    """The same as a sample a target, which is how RecBole trains."""
    samples = samples_that_choose(data)
    parts = {"": np.asarray(data.train), "val_": samples}
    work = {
        prefix + key: array
        for prefix, index in parts.items()
        for key, array in samples_of(data, index, RECBOLES_WINDOW)
    }
    work["val_had"] = histories(data, samples, int(np.diff(data.ptr).max()))
    np.savez(path, **work, **limits, L=RECBOLES_WINDOW, n_items=data.n_items, epochs=10**6)


# ---------------------------------------------------------------- the programs


def run_ours(data: Data, flags: str, room: Path) -> Run:
    """train_backbone.py's curve, from its log."""
    args = ["--dataset", data.folder, *shlex.split(flags), "--lists", 1000]
    took = measured("train_backbone.py", *args, "--out", room / "ours")
    lines = [json.loads(line) for line in (room / "ours" / "log.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "val_ndcg@10" in line and line["step"] > 0]
    seconds, quality = (np.array([line[key] for line in epochs]) for key in ("time", "val_ndcg@10"))
    busy = took.processor_seconds / took.seconds  # less than 1 where other programs ran
    return Run(f"train_backbone.py {flags}".strip(), seconds * busy, quality)


def run_theirs(name: str, python: str, program: Path, args: list, room: Path) -> Run:
    """The curve that a rival's program prints."""
    found = said_by(python, program, args, room)
    return Run(name, *np.array(found["curve"]).T)


def rivals(
    rectools: str | None, recbole: str | None, windows: tuple[int, ...], threads: int, room: Path
) -> list[tuple]:
    """The arguments of run_theirs for each rival, but the last."""
    found = []
    if rectools:
        program, work = ROOT / "recipes" / "rectools_epochs.py", room / "work.npz"
        for window in (0, *windows):
            name = f"RecTools, its last {window}" if window else "RecTools, its defaults"
            found.append((name, rectools, program, [work, window, threads]))
    if recbole:
        args = [room / "recbole.npz", "sasrec", threads, room / "recbole", room / "scores.npy"]
        program = ROOT / "data" / "recbole_epoch.py"
        found.append(("RecBole, its defaults", recbole, program, args))
    return found


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="a prepared data set")
@click.option("--flags", default="", help="further flags of train_backbone.py, as one text")
@click.option("--rectools", help="a python that has rectools with torch")
@click.option("--recbole", help="a python that has recbole 1.2.1")
@click.option(
    "--window",
    "windows",
    multiple=True,
    type=click.IntRange(2),
    default=[20, 50],
    help="items of a history in RecTools, beside its own 100; may be given several times",
)
@click.option("--minutes", default=30.0, type=click.FloatRange(0.1), help="a rival trains at most")
@click.option("--patience", default=10, type=click.IntRange(1), help="epochs a rival waits")
@click.option("--threads", default=1, type=click.IntRange(1), help="of rivals")
def main(
    dataset: str,
    flags: str,
    rectools: str | None,
    recbole: str | None,
    windows: tuple[int, ...],
    minutes: float,
    patience: int,
    threads: int,
) -> None:
    """How long until SASRec is good, here, with RecTools and with RecBole?"""
    if not rectools and not recbole:
        stop("name a rival: --rectools PYTHON or --recbole PYTHON (see --help)")
    data = load_data(dataset)
    print(f"{machine()}, {threads} thread(s)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        room = Path(folder)
        limits = {"seconds": 60 * minutes, "patience": patience}
        write_work(data, room / "work.npz", limits)
        write_for_recbole(data, room / "recbole.npz", limits)
        write_counts(data, room / "recbole" / "ours")
        ours = run_ours(data, flags, room)
        print_row(ours.row(ours))
        rows = [ours.row(ours)]
        for rival in rivals(rectools, recbole, windows, threads, room):
            rows.append(run_theirs(*rival, room).row(ours))
            print_row(rows[-1])
    print(json.dumps({"dataset": dataset, "threads": threads, "rows": rows}))


def print_row(row: dict) -> None:
    """Prints a row as a sentence."""
    print(
        f"{row['program']}: NDCG@10 {row['best']:.4f} after {row['seconds']:.0f} s, epoch "
        f"{row['epoch']} of {row['epochs']}; {row['level']:.4f} after {row['theirs']:.0f} s, ours "
        f"after {row['ours']:.0f} s ({row['ratio']:.1f} times)",
        flush=True,
    )


if __name__ == "__main__":
    main()
