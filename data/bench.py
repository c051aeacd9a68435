"""How long preparing and training take at the size of Amazon Home & Kitchen 2018.

    python data/bench.py                     make bench-data; about half an hour on 2 cores, 24 GB,
                                             8 GB of disk
    python data/bench.py --quick             a tenth and a hundredth of the size only
    python data/bench.py --recbole PYTHON    and against RecBole: a python that has recbole 1.2.1,
        from: python3 -m venv /tmp/rb
              /tmp/rb/bin/pip install recbole==1.2.1 "numpy<2" "pandas<2.2"

Preparing runs as a process of its own: seconds are wall time from the files on disk to the prepared
folder, memory is that process's peak. The log is synthetic (data/synthetic.py). An epoch against
RecBole's: the same samples (every training target of ml-100k once), the same width and window
(RecBole's default of 50 items, Caser 5), about 2,048 targets a step (RecBole's default), both with
cross-entropy over all items, on the same machine, one after the other. Last line: one JSON object.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from delrec.data.prepared import Data, candidates, histories, load_data, users  # noqa: E402
from delrec.kernels.bench import report  # noqa: E402
from delrec.metrics import compare, metrics  # noqa: E402

# windows of a step, so that it has about 2,048 targets
WINDOWS = {"sasrec": 128, "gru4rec": 128, "caser": 2048}
# items a window has, RecBole's default; Caser 5
HISTORY = {"sasrec": 50, "gru4rec": 50, "caser": 5}


@dataclass
class Measured:
    """A process that ran."""

    seconds: float  # wall time
    processor_seconds: float
    gb: float  # its peak of memory
    said: str  # what it printed

    def last_line(self) -> dict:
        """The JSON object it printed at the end."""
        return json.loads(self.said.strip().split("\n")[-1])


def measured(*args: object) -> Measured:
    """One of our programs, run to its end; stops if it fails."""
    began = time.time()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        sys.exit(f"bench: {' '.join(map(str, args))} failed:\n{text[-2000:]}")
    # never below what this process holds, which is little beside a log of millions
    spent = usage.ru_utime + usage.ru_stime
    return Measured(time.time() - began, spent, usage.ru_maxrss / 2**20, text)


# ---------------------------------------------------------------- the size of Home & Kitchen
#
# A row of the report is (name, value or None, unit, goal or None).


def prepare_home_kitchen(room: Path, divide: int) -> Iterator[tuple]:
    """Yields the rows of preparing a log `divide` times smaller, into prepared-DIVIDE."""
    name = "prepare.home-kitchen" + (f"-{divide}" if divide > 1 else "")
    raw, out = room / f"raw-{divide}", room / f"prepared-{divide}"
    measured("data/synthetic.py", raw, "--divide", divide)
    prepared = measured(
        "data/prepare.py", "home-kitchen", "--raw", raw, "--out", out, "--max-eval", 20000
    )
    print(prepared.said, flush=True)
    shutil.rmtree(raw)
    began = time.time()
    load_data(str(out))
    opened = time.time() - began
    has_goal = divide == 1
    yield f"{name}.seconds", prepared.seconds, "s", 120 if has_goal else None
    yield f"{name}.peak_gb", prepared.gb, "GB", 6 if has_goal else None
    yield f"{name}.open_seconds", opened, "s", None
    measured("data/prepare.py", "home-kitchen", "--out", out, "--check")


def train_home_kitchen(room: Path) -> Iterator[tuple]:
    """Yields the rows of an epoch of SASRec on the log of full size."""
    data = room / "prepared-1"
    options = ["--out", room / "run", "--overwrite", "--loss", "sampled", "--epochs", 1]
    trained = measured("train_backbone.py", "--dataset", data, *options, "--lists", 20000)
    print(trained.said, flush=True)
    rate = trained.last_line()["samples_per_second"]
    samples = len(load_data(str(data)).train)
    yield "train.sasrec.home-kitchen.s_per_million", 1e6 / rate, "s", None
    yield "train.sasrec.home-kitchen.peak_gb", trained.gb, "GB", 24
    yield "train.sasrec.home-kitchen.samples", samples, "samples", None


# ---------------------------------------------------------------- against RecBole


@dataclass
class Comparison:
    """What a model of ours and RecBole's are compared with."""

    data: Data  # ml-100k
    room: Path  # folder for the files written meanwhile
    python: str  # a python that has recbole
    threads: int
    epochs: int  # 1: only the time of an epoch; more: also what is learned

    def settings(self, model: str) -> dict:
        """The defaults of train_backbone.py; for the time of an epoch with RecBole's window."""
        import train_backbone

        settings = dict(train_backbone.DEFAULTS[model])
        if self.epochs == 1:
            settings["history"] = HISTORY[model]
        return settings


def compare_models(
    room: Path, python: str | None, threads: int, models: tuple[str, ...], epochs: int
) -> Iterator[tuple]:
    """Yields the rows of all models; null where there is no python with RecBole."""
    data = load_data("ml-100k")
    if python is None:
        for model in models:
            yield f"epoch.{model}.ml-100k.vs_recbole", None, "x", 20
        return
    write_counts(data, room / "recbole" / "ours")
    comparison = Comparison(data, room, python, threads, epochs)
    for model in models:
        yield from against_recbole(comparison, model)


def against_recbole(comparison: Comparison, model: str) -> Iterator[tuple]:
    """Yields the rows of one model: an epoch over the same samples; with more epochs the quality
    instead, our defaults, the best of both by validation, test scores through our metrics.
    """
    write_for_recbole(comparison, model)
    theirs = train_theirs(comparison, model)
    ours = train_ours(comparison, model)
    if comparison.epochs > 1:
        yield from compare_quality(comparison, model)
        return
    yield f"epoch.{model}.ml-100k.vs_recbole", theirs / ours, "x", 20
    yield f"epoch.{model}.ml-100k.seconds", ours, "s", None
    yield f"epoch.{model}.ml-100k.recbole_seconds", theirs, "s", None


def write_for_recbole(comparison: Comparison, model: str) -> None:
    """Writes work.npz: the samples and the settings."""
    data, settings = comparison.data, comparison.settings(model)
    samples = {}
    for s in ("train", "val", "test"):
        prefix = "" if s == "train" else f"{s}_"
        for key, array in samples_of(data, np.asarray(getattr(data, s)), settings["history"]):
            samples[prefix + key] = array
    samples["val_had"] = histories(data, np.asarray(data.val), int(np.diff(data.ptr).max()))
    np.savez(
        comparison.room / "work.npz",
        **samples,
        L=settings["history"],
        width=settings["width"],
        dropout=settings["dropout"],
        lr=1e-3,
        batch=2048,
        n_items=data.n_items,
        epochs=comparison.epochs,
        patience=settings["patience"],
    )


def write_counts(data: Data, folder: Path) -> None:
    """Writes a RecBole data set that only tells how many users and items there are."""
    folder.mkdir(parents=True)
    user = [*users(data, np.arange(len(data.items))), *[0] * data.n_items]
    item = [*data.items, *range(1, data.n_items + 1)]
    rows = (f"{u}\t{i}\t{t}\n" for t, (u, i) in enumerate(zip(user, item)))
    header = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "ours.inter").write_text(header + "".join(rows))


def samples_of(data: Data, index: np.ndarray, L: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the samples as RecBole's models take them: histories padded on the right, their
    lengths, users and targets.
    """
    history_nL = histories(data, index, L)  # padded on the left
    length = (history_nL > 0).sum(1)
    place_nL = (np.arange(L) + (L - length)[:, None]) % L
    yield "seq", np.take_along_axis(history_nL, place_nL, 1)
    yield "length", length
    yield "user", users(data, index) + 1
    yield "target", data.items[index].astype(np.int64)


def train_theirs(comparison: Comparison, model: str) -> float:
    """The seconds of an epoch of RecBole's model; scores.npy holds what it says of the test
    samples, if there are several epochs.
    """
    room = comparison.room
    args = [room / "work.npz", model, comparison.threads, room / "recbole", room / "scores.npy"]
    program = ROOT / "data" / "recbole_epoch.py"
    return said_by(comparison.python, program, args, room)["seconds"]


def said_by(python: str, program: Path, args: list, room: Path) -> dict:
    """The JSON object that a program prints last; another python runs it, in the folder `room`."""
    # alone in a folder: beside our files its imports could meet ours
    copy = shutil.copy(program, room / f"run_{program.name}")
    done = subprocess.run(
        [python, str(copy), *map(str, args)], capture_output=True, text=True, cwd=room
    )
    if done.returncode:
        sys.exit(f"bench: {program.name} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    print(done.stderr[-1500:], flush=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


def train_ours(comparison: Comparison, model: str) -> float:
    """The seconds of an epoch of our model; its run folder is run-MODEL."""
    options = ["--model", model, "--out", comparison.room / f"run-{model}", "--overwrite"]
    if comparison.epochs == 1:
        options += ["--epochs", 3, "--batch", WINDOWS[model], "--history", HISTORY[model]]
    trained = measured("train_backbone.py", "--dataset", "ml-100k", *options)
    return len(comparison.data.train) / trained.last_line()["samples_per_second"]


def compare_quality(comparison: Comparison, model: str) -> Iterator[tuple]:
    """Yields the rows of both models' metrics on the test samples, and prints the differences."""
    data, room = comparison.data, comparison.room
    theirs = their_metrics(data, np.load(room / "scores.npy"))
    ours = our_metrics(data, room / f"run-{model}")
    rng = np.random.default_rng(0)
    owner = users(data, np.asarray(data.test))
    for name, mine in ours.items():
        difference = mine - theirs[name]
        low, high = interval(difference, owner, rng)
        print(
            f"{model} {name}: ours {mine.mean():.4f}, RecBole's {theirs[name].mean():.4f}, "
            f"difference {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}] (95 %, over users)",
            flush=True,
        )
        yield f"quality.{model}.ml-100k.{name}.ours", float(mine.mean()), "", None
        yield f"quality.{model}.ml-100k.{name}.recbole", float(theirs[name].mean()), "", None


def quality_of(full: dict, near: dict) -> dict[str, np.ndarray]:
    """The metrics that are compared, (n,) each, of those over all items and over 15 candidates."""
    return {
        "full.ndcg@10": full["ndcg@10"],
        "full.hr@10": full["hr@10"],
        "candidates15.hr@1": near["hr@1"],
    }


def our_metrics(data: Data, run: Path) -> dict[str, np.ndarray]:
    """The metrics of a run folder of train_backbone.py."""
    is_target = candidates(data, "test", 15) == targets_of_test(data)
    near = compare(np.load(run / "scores_test_15.npy"), is_target)
    return quality_of(metrics(*np.load(run / "full_test.npy").T), metrics(*near))


def their_metrics(data: Data, score_nI: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of scores of all items; the user's earlier items do not count, as with ours."""
    target = targets_of_test(data)
    of_target = np.take_along_axis(score_nI, target, 1)
    score_nI[:, 0] = -np.inf
    before = histories(data, np.asarray(data.test), int(np.diff(data.ptr).max()))
    np.put_along_axis(score_nI, before, -np.inf, 1)
    np.put_along_axis(score_nI, target, of_target, 1)
    full = metrics((score_nI > of_target).sum(1), (score_nI == of_target).sum(1) - 1)
    cand = candidates(data, "test", 15)
    finite_nI = np.where(np.isfinite(score_nI), score_nI, -1e9)
    near = compare(np.take_along_axis(finite_nI, cand, 1), cand == target)
    return quality_of(full, metrics(*near))


def targets_of_test(data: Data) -> np.ndarray:
    """The targets of the test samples: int64 (n, 1)."""
    return data.items[np.asarray(data.test)].astype(np.int64)[:, None]


def interval(difference: np.ndarray, owner: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The 95 % interval of a mean difference, over users drawn with repetition."""
    total, count = np.bincount(owner, difference), np.bincount(owner)
    present = np.flatnonzero(count)
    means = []
    for _ in range(2000):
        drawn = rng.choice(present, len(present))
        means.append(total[drawn].sum() / count[drawn].sum())
    return np.quantile(means, (0.025, 0.975))


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="a tenth and a hundredth of the size only")
@click.option("--only", type=click.Choice(["size", "recbole"]), help="one of the two parts")
@click.option(
    "--recbole",
    "python",
    default=None,
    type=str,
    help="a python that has recbole 1.2.1; without it those rows are null",
)
@click.option(
    "--epochs",
    default=1,
    type=click.IntRange(1),
    help="epochs of RecBole's models; above 1 also compares quality, with the same patience as "
    "ours",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["sasrec", "gru4rec", "caser"],
    type=click.Choice(["sasrec", "gru4rec", "caser"]),
    help="which to compare",
)
@click.option("--threads", default=2, type=click.IntRange(1), help="threads on the CPU")
def main(
    quick: bool,
    only: str | None,
    python: str | None,
    epochs: int,
    models: tuple[str, ...],
    threads: int,
) -> None:
    """Preparing and training at the size of Home & Kitchen, and our backbones against RecBole's on
    ml-100k.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if only != "recbole":
            for divide in (100, 10) if quick else (100, 10, 1):
                rows += prepare_home_kitchen(Path(folder), divide)
            if not quick:
                rows += train_home_kitchen(Path(folder))
        if only != "size":
            rows += compare_models(Path(folder), python, threads, models, epochs)
    report(rows, threads)


if __name__ == "__main__":
    main()
