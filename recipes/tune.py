"""Which settings does a conventional model want on a log? A random search on validation.

    python recipes/tune.py --dataset beauty --model sasrec --trials 24
    python recipes/tune.py --dataset beauty --model gru4rec --jobs 4       four trials side by side
    python recipes/tune.py --dataset beauty --flags "--loss sampled"       all trials with a flag
    python recipes/tune.py --dataset beauty --flags "--text tfidf+minilm"  titles in item vectors

Trial 0 has the model's own defaults, the others are drawn from GRID, each once; with --text also
from TEXT: how titles enter. Successive halving
(arXiv 1502.07943): all trials are trained for a few epochs, the best third of them three times as
long, and so on; at most three are trained to their own end. Each round trains from scratch, so that
a run of it is what its command alone makes. On a small log, where few epochs are hardly a step, the
first round is longer: models that have not begun to learn cannot be told apart.

What counts is the NDCG@10 over all items on validation. No row of the test part is read here:
train_backbone.py ranks it, as always, and this program does not look.

Every trial is a run under runs/<dataset>/tune-<model>/, whose name ends in what --flags says and,
where it is not 0, in the seed (-s1). A finished one is not repeated, a killed one goes on: so the
same command goes on where it was killed, and one with more --trials adds to it. The folder's
tune.txt has the table, tune.json the same, with all that was spent.
"""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
from tqdm import tqdm

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.backbone.batches import LEAST_WAIT, steps_of_epoch
from delrec.backbone.text import FIRST_WIDE
from delrec.backbone.titled import UNUSED
from delrec.data.prepared import Data, load_data
from delrec.runtime import described, load_run, write_json, write_text
from delrec.training.log import entries_of
from recipes.runs import side_by_side
from recipes.stage import in_root, name_of, places, prepare, stage, typed
from train_backbone import ALL

# the values that a trial may have, and those of single models
GRID = {
    "width": (50, 64, 100, 128, 256),
    "dropout": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "lr": (3e-4, 5e-4, 1e-3, 2e-3),
    "batch": (64, 128, 256),
    "history": (20, 50),
}
OWN = {"caser": {"history": (5, 10)}, "bsarec": {"history": (50,)}}
# what a trial may have besides where --flags holds --text
TEXT = {"text-in": ("fold", "adaptor", "alphafuse"), "text-whiten": (0.0, 0.5, 1.0)}
FIRST = 4  # epochs of the first round, at least
THIRD = 3  # of the trials of a round, one in so many goes on, so many times as long
# no later stage reads these runs' lists
FEW = ["--lists", 1000]
# what --flags cannot say, because this program says it
SAID = ("dataset", "model", "seed", "out", "lists", "resume", "overwrite")


@dataclass
class Trial:
    """One setting of the search."""

    number: int
    settings: dict  # flag of train_backbone.py -> value; empty: the model's defaults
    found: float = -1.0  # its NDCG@10 on validation in the last round that it was in
    epochs: int = 0  # of that round; 0: its own end
    minutes: float = 0.0  # of all its rounds

    @property
    def flags(self) -> list:
        """Its settings as they are typed."""
        return [x for flag, value in self.settings.items() for x in (f"--{flag}", value)]


def names_in(flags: str) -> list[str]:
    """The words of --flags, each as the name of a flag: --text=tfidf is text."""
    return [word.removeprefix("--").partition("=")[0] for word in shlex.split(flags)]


def grid_of(model: str, flags: str) -> dict[str, tuple]:
    """The values that a trial of a model may have, where all trials have these flags: none that
    train_backbone.py refuses beside them."""
    said = names_in(flags)
    grid = GRID | OWN.get(model, {}) | (TEXT if "text" in said else {})
    refused = {flag.replace("_", "-") for flag in UNUSED.get(model, ())}
    refused |= {"text-whiten"} if "text-graph" in said else set()
    grid = {flag: values for flag, values in grid.items() if flag not in refused}
    if "text-width" in said and "text-in" in grid:
        grid["text-in"] = tuple(way for way in grid["text-in"] if way not in FIRST_WIDE)
    return grid


def draw(grid: dict[str, tuple], n: int, seed: int) -> list[Trial]:
    """The defaults and n - 1 other settings; the first of them are the same whatever n is."""
    size = int(np.prod([len(values) for values in grid.values()]))
    if n - 1 > size:
        sys.exit(f"tune: --trials {n} is more than the grid's {size} settings; ask for fewer")
    places = np.random.default_rng(seed).permutation(size)[: n - 1]
    trials = [Trial(0, {})]
    for number, place in enumerate(places, 1):
        at = np.unravel_index(place, [len(values) for values in grid.values()])
        settings = {flag: grid[flag][i] for flag, i in zip(grid, at)}
        trials.append(Trial(number, settings))
    return trials


def stop_if_untrained(model: str) -> None:
    """Ends the process if a model has no epochs that rounds could be made of."""
    if "epochs" in UNUSED.get(model, ()):
        sys.exit(
            f"tune: --model {model} is not trained, and chooses its settings on validation by "
            f"itself; run train_backbone.py --model {model} --text tfidf"
        )


def stop_if_said(flags: str) -> None:
    """Ends the process if --flags holds a flag that trials differ in, or that this program gives:
    the later one on a command line counts, and the table would say what is not so."""
    for name in names_in(flags):
        if name in GRID | TEXT:
            sys.exit(f"tune: --flags holds --{name}, which trials differ in; leave it out")
        if name == "from":
            sys.exit(
                "tune: --flags holds --from, whose run has its width and history, which trials "
                "differ in; leave it out"
            )
        if name in SAID:
            sys.exit(f"tune: --flags holds --{name}, which this program gives; leave it out")


def rounds(n: int, first: int) -> list[tuple[int, int]]:
    """(trials, epochs) of each round; the last one trains to the end (0 epochs): as many as the
    round before leaves, three at most."""
    found, epochs = [], first
    while n > THIRD:
        found.append((n, epochs))
        n, epochs = -(-n // THIRD), epochs * THIRD
    return [*found, (n, 0)]


def first_round(model: str, flags: str, data: Data) -> int:
    """The epochs of a first round: enough for LEAST_WAIT steps of the trial with the fewest, that
    of the largest batch and the longest history."""
    grid = grid_of(model, flags)
    fewest = SimpleNamespace(
        model=model,
        batch=max(grid["batch"]),
        history=max(grid["history"]),
        one_target="one-target" in names_in(flags),
    )
    return max(FIRST, ceil(LEAST_WAIT / steps_of_epoch(fewest, data)))


def best_on_validation(folder: Path) -> float:
    """The NDCG@10 over all items on validation of a run's best epoch."""
    return max(line["val_ndcg@10"] for line in entries_of(folder) if "val_ndcg@10" in line)


@dataclass
class Search:
    """What is asked for."""

    dataset: str
    model: str
    trials: int
    first: int  # epochs of the first round
    jobs: int
    seed: int
    flags: str  # of train_backbone.py, for all trials

    @property
    def grid(self) -> dict[str, tuple]:
        """The values that a trial may have."""
        return grid_of(self.model, self.flags)

    @property
    def folder(self) -> Path:
        """The folder of its runs and its table."""
        name = name_of(["tune", self.model, *shlex.split(self.flags)])
        name += f"-s{self.seed}" if self.seed else ""
        return runtime.ROOT / "runs" / Path(self.dataset).name / name

    def command(self, trial: Trial) -> list:
        """What trains a trial to its own end, without the folder."""
        on = ["train_backbone.py", "--dataset", self.dataset, "--model", self.model]
        return [*on, *shlex.split(self.flags), *trial.flags, "--seed", self.seed]

    def train(self, trial: Trial, epochs: int, job: int) -> None:
        """Trains a trial for so many epochs, 0 to its end, and notes what it found."""
        name = f"{trial.number:03}-" + (f"{epochs}-epochs" if epochs else "whole")
        folder = self.folder / name
        cut = ["--epochs", epochs, "--patience", epochs] if epochs else []
        args = [*self.command(trial), *cut, *FEW, "--out", folder]
        stage(folder, *args, jobs=self.jobs, job=job)
        trial.found, trial.epochs = best_on_validation(folder), epochs
        trial.minutes += load_run(folder).seconds / 60

    def train_all(self, trials: list[Trial], epochs: int) -> None:
        """Trains every trial of a round, some side by side."""
        label = f"{epochs} epochs each" if epochs else "to the end"
        with tqdm(total=len(trials), desc=f"{len(trials)} trials, {label}", unit="trial") as bar:

            def one(trial, job):
                self.train(trial, epochs, job)
                bar.update()

            side_by_side(self, [partial(one, trial) for trial in trials])

    def run(self) -> list[Trial]:
        """All trials, best first: those that went further stand before the others."""
        trials = draw(self.grid, self.trials, self.seed)
        alive, out = trials, []
        for n, epochs in rounds(len(trials), self.first):
            out = alive[n:] + out
            alive = alive[:n]
            self.train_all(alive, epochs)
            alive.sort(key=lambda trial: -trial.found)
        return alive + out


# ---------------------------------------------------------------- the table


def table_lines(search: Search, ranked: list[Trial]) -> list[str]:
    """The table, best trial first, and the command that trains the best."""
    flags = list(search.grid)
    head = f"{'trial':>5}" + "".join(f"{flag:>13}" for flag in flags)
    lines = [
        f"{search.dataset}, {search.model}: {len(ranked)} trials, seed {search.seed}, "
        f"{sum(trial.minutes for trial in ranked):.1f} minutes of training; NDCG@10 over all items "
        "on validation; a trial of few epochs went no further",
        f"{head}{'epochs':>10}{'val ndcg@10':>13}{'minutes':>9}",
    ]
    for trial in ranked:
        values = "".join(f"{trial.settings.get(flag, 'default')!s:>13}" for flag in flags)
        length = trial.epochs or "to end"
        lines.append(
            f"{trial.number:>5}{values}{length!s:>10}{trial.found:13.5f}{trial.minutes:9.2f}"
        )
    return [*lines, "", f"the best one: {typed(search.command(ranked[0]))}"]


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="name under data/, or a prepared folder")
@click.option(
    "--model", default="sasrec", type=click.Choice(list(ALL)), help="a model of train_backbone.py"
)
@click.option(
    "--trials", default=24, type=click.IntRange(1), help="settings tried, the defaults among them"
)
@click.option(
    "--first",
    type=click.IntRange(1),
    help=f"epochs of the first round; {FIRST}, on a small log as many as make {LEAST_WAIT} steps",
)
@click.option(
    "--jobs",
    default=0,
    type=click.IntRange(0),
    help="trials side by side, each with its share of the cores or GPUs; 0: one a core, or a GPU",
)
@click.option("--seed", default=0, type=click.IntRange(0), help="of the draws, and of every trial")
@click.option("--flags", default="", help="flags of train_backbone.py that all trials have")
def main(**options) -> None:
    """Search a model's settings on validation."""
    stop_if_untrained(options["model"])
    stop_if_said(options["flags"])
    search = Search(**in_root(**options))
    search.jobs = min(search.jobs or places(), search.trials)
    prepare(search.dataset)
    data = load_data(search.dataset)
    search.first = search.first or first_round(search.model, search.flags, data)
    ranked = search.run()
    lines = table_lines(search, ranked)
    write_text(search.folder / "tune.txt", "\n".join(lines) + "\n")
    rows = [vars(trial) for trial in ranked]
    write_json(
        search.folder / "tune.json", {"command": vars(search), "grid": search.grid, "trials": rows}
    )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
