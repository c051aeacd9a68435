"""Every conventional model on one log, five seeds each, in one table; no LM is trained.

    python recipes/backbones.py --dataset beauty --seeds 5         hours on 2 cores
    python recipes/backbones.py --models sasrec,gru4rec --seeds 1  some of the rows, to see it run
    python recipes/backbones.py --dataset beauty --dry-run         only print the commands

Rows: each conventional model that needs no titles, and SASRec with titles in its item vectors,
beside the same with every title at another item. BSARec, which costs most, and the rows with titles
get three seeds at most. Each model has settings of a paper (docs/commands.md), so a row says what a
model reaches with these, not what its layers alone are worth.

Every run is a command of train_backbone.py. It stands in runs/<dataset>/backbones/ with its seed. A
finished one is not repeated, and a killed one goes on; so the same command with more seeds or rows
adds to what is there. Trainings run side by side, each on its own share of the cores: a process
with two threads keeps 1.2 cores busy.

Then one evaluate.py over all of them. Each row is also fused with co-occurrence and title
similarity, whose weights are chosen on validation. Planned before: each row against SASRec, alone
and fused, and titles against other items' titles.

The folder ends with backbones.txt .md .csv, and what evaluate.py writes (metrics.json, table.txt).
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.backbone.models import MODELS as NETWORKS
from delrec.data.prepared import load_data
from delrec.runtime import described, read_json
from recipes.backbones_table import COUNTS, PAIR, lines_of, report
from recipes.options import dataset_option, dry_run_option
from recipes.runs import side_by_side
from recipes.stage import in_root, places, prepare, stage, typed

TEXT = "tfidf+minilm"


@dataclass
class Model:
    """A row of the table."""

    flags: str  # of train_backbone.py
    most: int = 100  # seeds that it gets, however many are asked for


MODELS = {
    **{name: Model(f"--model {name}") for name in NETWORKS},
    "bsarec": Model("--model bsarec", most=3),  # a window a target: 20 to 50 times the positions
    "sasrec-titles": Model(f"--model sasrec --text {TEXT}", most=3),
    "sasrec-permuted": Model(f"--model sasrec --text {TEXT} --permute-text", most=3),
}
FEW = ["--lists", 1000]  # no later stage reads these runs' lists
VAL_SAMPLES = 1000  # that choose the weights of fusion


@dataclass
class Asked:
    """What is asked for."""

    dataset: str
    seeds: int
    models: list[str]  # rows, in the order of MODELS; the others are tested against the first
    jobs: int  # trainings side by side

    @property
    def home(self) -> str:
        """The folder of its runs and tables, under runs/. Other recipes' backbones also answer out
        of fold, which would count as minutes of training here."""
        return f"{Path(self.dataset).name}/backbones"

    @property
    def folder(self) -> Path:
        """The same as a path."""
        return runtime.ROOT / "runs" / self.home

    @property
    def base(self) -> str:
        """The row that the others are tested against."""
        return self.models[0]

    def runs(self, model: str) -> list[str]:
        """The names of a row's runs, one a seed."""
        return [f"{model}-s{seed}" for seed in range(min(self.seeds, MODELS[model].most))]

    def trainings(self) -> list[tuple[str, list]]:
        """(name of a run, the command that makes it) of all runs, seed by seed: what was killed
        early has whole seeds."""
        found = []
        for seed in range(self.seeds):
            for model in self.models:
                if seed < MODELS[model].most:
                    name = f"{model}-s{seed}"
                    args = ["train_backbone.py", "--dataset", self.dataset]
                    args += [*MODELS[model].flags.split(), *FEW, "--seed", seed]
                    found.append((name, [*args, "--out", f"{self.home}/{name}"]))
        return found

    def evaluation(self) -> list:
        """The command of the table: all runs, what is fused of each, what is compared."""
        runs = [name for model in self.models for name in self.runs(model)]
        args = ["evaluate.py", "--ckpt", *(f"{self.home}/{name}" for name in runs)]
        args += ["--reference", self.runs(self.base)[0], "--val-samples", VAL_SAMPLES]
        first, second = COUNTS
        for name in runs:
            args += ["--fuse", name, first, "--fuse", f"{name}+{first}", second]
        for a, b in self.pairs():
            args += ["--compare", a, b]
        return [*args, "--out", self.folder]

    def pairs(self) -> list[tuple[str, str]]:
        """The planned pairs of means over seeds. A row alone against the first one needs no plan:
        every table has it."""
        fused = "+".join(("", *COUNTS))
        pairs = [(f"{model}{fused}", f"{self.base}{fused}") for model in self.models[1:]]
        return [*pairs, PAIR] if set(PAIR) <= set(self.models) else pairs


# ---------------------------------------------------------------- the stages


def train_all(asked: Asked) -> None:
    """Trains every run, some side by side."""

    def one(name, args, job):
        stage(asked.folder / name, *args, jobs=asked.jobs, job=job)

    side_by_side(asked, [partial(one, *training) for training in asked.trainings()])


def rows_named(names: tuple[str, ...]) -> list[str]:
    """The rows that --models names, in the order of MODELS; all of them where it names none."""
    asked = [name.strip() for text in names for name in text.split(",")]
    for name in asked:
        if name not in MODELS:
            sys.exit(
                f"backbones: --models names {name or 'nothing'}, which is no row; the rows are "
                f"{', '.join(MODELS)}"
            )
    return [name for name in MODELS if name in asked or not asked]


@click.command(**described(__doc__))
@dataset_option
@click.option(
    "--seeds",
    default=5,
    type=click.IntRange(1, 100),
    help="runs of every row, seeds 0, 1, ..; of BSARec and of the rows with titles three at most",
)
@click.option(
    "--models",
    multiple=True,
    help=f"rows, as a,b or repeated; all if not given: {', '.join(MODELS)}",
)
@click.option(
    "--jobs",
    default=0,
    type=click.IntRange(0),
    help="trainings side by side, each with its share of the cores or GPUs; 0: one a core, or a "
    "GPU",
)
@dry_run_option
def main(dry_run: bool, models: tuple[str, ...], **options: Any) -> None:
    """Train every conventional model, then make one table of them."""
    asked = Asked(models=rows_named(models), **in_root(**options))
    if dry_run:
        print("\n".join(typed(args) for _, args in asked.trainings()))
        print(typed(asked.evaluation()))
        return
    asked.jobs = min(asked.jobs or places(), len(asked.trainings()))
    prepare(asked.dataset)
    train_all(asked)
    stage(None, *asked.evaluation())
    table, data = read_json(asked.folder / "metrics.json"), load_data(asked.dataset)
    rows = {model: asked.runs(model) for model in asked.models}
    report(table, lines_of(table, rows, asked.folder, data), asked.folder)


if __name__ == "__main__":
    main()
