"""make circle: from the backbone to the LM, to a small LM, and back to a backbone.

    python recipes/circle.py                                   99 minutes, one core a stage
    python recipes/circle.py --dataset beauty --windows 8000   other data, prepared before

The backbone at the end serves in a millisecond. Every stage is one of the README's commands; a
finished one is not repeated, so a circle that was killed goes on where it stood.

The table: HR@1 and NDCG@10 among 15 candidates with intervals, HR@20 and NDCG@20 over all items,
parameters, time a request takes at batch 1 and 64 (one history to the ranked catalogue, on one core
and on all; an LM's on the GPU where there is one), time of training. The last line is one JSON
object.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.prepared import Data, load_data
from delrec.evaluation.scores import gain_over, places_in_test, stored_metrics
from delrec.evaluation.wording import ends_text
from delrec.kernels.bench import Row, report
from delrec.lm.model import is_lm_run
from delrec.lm.slmrec import blocks_of
from delrec.runtime import described, load_run, read_json, stop
from delrec.serving.latency import latencies, parameters, timed_on
from recipes.runs import FOLDS, kind_and_layers
from recipes.stage import in_root, prepare, stage, was_killed

ROWS = {
    "sasrec": "backbone",
    "e4srec": "LM, items as vectors, distilled soft prompt",
    "small": "{n} layers, no teacher",
    "slmrec": "{n} layers, taught by the LM",
    "sasrec-taught": "backbone, taught by the small LM",
    "caser": "a weaker backbone",
    "caser-taught": "the same, taught by the small LM (lists and titles)",
}


@dataclass
class Circle:
    """What the circle is asked for."""

    dataset: str
    llm: str
    layers: int  # of the small LM
    windows: int  # of history, that the LM is trained on
    small_windows: int  # that the small LMs are trained on
    val_samples: int  # that choose the step of each LM
    procs: int  # processes that share the LM's work
    test_samples: int  # of the table; 0: all
    in_one_go: bool = True  # no stage was there, or begun, before

    @property
    def home(self) -> str:
        """Its runs under runs/: those of the README's commands have seen other samples."""
        return f"{Path(self.dataset).name}/circle"

    @property
    def folder(self) -> Path:
        """The folder of its runs."""
        return runtime.ROOT / "runs" / self.home

    def run(self, name: str) -> str:
        """The name of one of its runs."""
        return f"{self.home}/{name}"

    def make(self, name: str, *command: object, procs: int = 1) -> None:
        """Runs the stage that makes one of its runs."""
        folder = self.folder / name
        if (folder / "config.json").exists() or was_killed(folder):
            self.in_one_go = False
        stage(folder, *command, "--out", self.run(name), procs=procs)


@dataclass
class Measured:
    """What the table and the JSON rows are made of."""

    table: dict  # evaluate.py's metrics.json
    ms: dict  # row -> ms of a request: alone (on what: timed_on), on all cores, one of 64
    hit_gain: float  # HR@1 of slmrec minus e4srec's
    hit_low: float  # its interval
    hit_high: float
    minutes: float | None  # that the circle took; None where it was not made in one go


# ---------------------------------------------------------------- the stages


def run_stages(circle: Circle) -> None:
    """Backbone, LM, small LM, backbones taught by the small LM; then the table of all of them."""
    train = ["train_backbone.py", "--dataset", circle.dataset]
    from_small = ["--teacher", circle.run("slmrec")]
    lists_and_titles = ["--lam", 0.1, "--eta", 0.3]
    circle.make("sasrec", *train, "--folds", FOLDS)  # what the LM learns from is out of fold
    make_lms(circle)
    circle.make("sasrec-taught", *train, *from_small)
    circle.make("caser", *train, "--model", "caser")
    circle.make("caser-taught", *train, "--model", "caser", *from_small, *lists_and_titles)
    table = ["evaluate.py", "--ckpt", *map(circle.run, ROWS)]
    table += ["--limit", circle.test_samples, "--val-samples", circle.val_samples]
    stage(None, *table, "--out", circle.folder, procs=circle.procs)


def make_lms(circle: Circle) -> None:
    """A soft prompt from the backbone, the LM, a small LM with and without a teacher, and what the
    taught one exports for the backbones.
    """
    on_lm = ["--dataset", circle.dataset, "--llm", circle.llm]
    distill = ["distill.py", *on_lm, "--backbone", circle.run("sasrec")]
    distill += ["--input", "ids", "--samples", 128, "--val-samples", 48, "--evals", 1]
    tune = ["finetune.py", *on_lm, "--val-samples", circle.val_samples, "--evals", 4]
    ids = ["--input", "ids", "--soft-prompt", circle.run("prompt")]
    small = ["--samples", circle.small_windows, "--layers", circle.layers]
    taught = ["--teacher", circle.run("e4srec")]
    export = ["evaluate.py", "--ckpt", circle.run("slmrec"), "--export"]
    procs = circle.procs
    circle.make("prompt", *distill, procs=procs)
    circle.make("e4srec", *tune, *ids, "--samples", circle.windows, procs=procs)
    circle.make("small", *tune, *ids, *small, procs=procs)
    circle.make("slmrec", *tune, *taught, *small, procs=procs)
    stage(circle.folder / "slmrec" / "export", *export, procs=procs)


def must_be_taught(circle: Circle) -> None:
    """Stops where the small LM and its teacher would be cut into one block, whose inner states
    teach nothing: finetune.py says so once the teacher is trained."""
    llm = circle.llm
    while is_lm_run(llm):  # it has as many layers as the LM that it was trained on
        llm = load_run(llm).llm
    kind, whole = kind_and_layers(llm)
    depths = range(1, whole + 1) if kind == "decoder" else ()
    fits = [n for n in depths if blocks_of([whole, n]) > 1]
    if circle.layers in fits:
        return
    remedy = (
        f"use --layers with one of {', '.join(map(str, fits))}" if fits else "use another --llm"
    )
    stop(
        f"--layers {circle.layers}: the small LM learns from blocks of its teacher's layers, and "
        f"{circle.llm} ({kind}, {whole} layers) cannot be cut so with it; {remedy}"
    )


def prepare_all(circle: Circle) -> None:
    """Prepares the embedded data set and the embedded LM, where they are asked for."""
    prepare(circle.dataset)
    if circle.llm == "smollm2-135m":
        stage(None, "data/prepare.py", circle.llm)


# ---------------------------------------------------------------- the table


def measure(circle: Circle, data: Data, began: float) -> Measured:
    """Times every row's requests, and compares the small LM with its teacher. began: time.time()
    when the circle did.
    """
    ms = {}
    for name in ROWS:
        print(f"timing {name}", flush=True)
        ms[name] = latencies(load_run(circle.folder / name), data)
    mean, low, high = minus_teacher(circle, data)
    table = read_json(circle.folder / "metrics.json")
    # a killed stage's own seconds are those since it went on, so they are not added up instead
    minutes = (time.time() - began) / 60 if circle.in_one_go else None
    return Measured(table, ms, mean, low, high, minutes)


def minus_teacher(circle: Circle, data: Data) -> list[float]:
    """[HR@1 of the small LM minus its teacher's on the table's samples, the ends of its
    interval].
    """
    which = places_in_test(data, circle.test_samples, 0)
    own_n, teacher_n = (
        stored_metrics(circle.folder / name, data, which)["hr@1"] for name in ("slmrec", "e4srec")
    )
    return gain_over(own_n, teacher_n, data, which).tolist()


def table_lines(circle: Circle, measured: Measured) -> list[str]:
    """The table as it is printed."""
    head = (
        f"{'':14} {'HR@1':>6} {'':14} {'NDCG@10':>8} {'':14} {'HR@20':>6} {'NDCG@20':>8} "
        f"{'parameters':>12} {'ms, alone':>10} {'ms':>8} {'ms of 64':>9} {'minutes':>8}"
    )
    rows = [row_line(circle, measured, name) for name in ROWS]
    alone = measured.table["tests"]["slmrec - small"]
    taught = (
        f"taught minus not, {circle.layers} layers: HR@1 {said(alone['hr@1'])}, NDCG@10 "
        f"{said(alone['ndcg@10'])}"
    )
    backbones = [backbone_line(measured, name) for name in ("sasrec", "caser")]
    of_lms = timed_on(load_run(circle.folder / "e4srec"))
    timed = f"ms, alone: a request alone, a backbone's on one core, an LM's on {of_lms}"
    minutes = "no time of the whole: a stage was there, or begun, before"
    if measured.minutes is not None:
        minutes = f"{measured.minutes:.1f} minutes"
    return [measured.table["protocol"], "", head, *rows, "", timed, taught, *backbones, minutes]


def row_line(circle: Circle, measured: Measured, name: str) -> str:
    """A run's line of the table."""
    run = load_run(circle.folder / name)
    row, full = measured.table["rows"][name], measured.table["full"][name]
    hr, ndcg = ends_text(row["hr@1_interval"]), ends_text(row["ndcg@10_interval"])
    one_core, all_cores, of_64 = measured.ms[name]
    return (
        f"{name:14} {row['hr@1']:6.3f} {hr:<14} {row['ndcg@10']:8.3f} {ndcg:<14} "
        f"{full['hr@20']:6.4f} {full['ndcg@20']:8.4f} "
        f"{parameters(run):12,} {one_core:10.2f} {all_cores:8.2f} {of_64:9.2f} "
        f"{run.seconds / 60:8.1f}   {ROWS[name].format(n=circle.layers)}"
    )


def backbone_line(measured: Measured, name: str) -> str:
    """What a backbone gains when it is taught."""
    test = measured.table["full_tests"][f"{name}-taught - {name}"]
    return (
        f"taught {name} minus {name}, all items: HR@20 {said(test['hr@20'])}, NDCG@20 "
        f"{said(test['ndcg@20'])}"
    )


def said(test: dict) -> str:
    """A difference with the p of the sign-flip test, and the least that would have been found."""
    return f"{test['difference']:+.4f} (p = {test['p']:.2g}, least {test['least']:.4f})"


def json_rows(circle: Circle, measured: Measured) -> list[Row]:
    """The rows of the last line: all that was measured."""
    table, ms = measured.table, measured.ms
    teacher, student = (load_run(circle.folder / name) for name in ("e4srec", "slmrec"))
    speedup = student.samples_per_second / teacher.samples_per_second
    with_states = teacher.train_seconds / (student.train_seconds + student.states_seconds)
    alone = table["tests"]["slmrec - small"]
    taught = table["full_tests"]["sasrec-taught - sasrec"]
    weaker = table["full_tests"]["caser-taught - caser"]
    gain = taught["hr@20"]["difference"] / table["full"]["sasrec"]["hr@20"]
    weaker_gain = weaker["hr@20"]["difference"] / table["full"]["caser"]["hr@20"]
    faster = ms["e4srec"][0] / ms["sasrec-taught"][0]
    places = (timed_on(teacher), timed_on(load_run(circle.folder / "sasrec-taught")))
    unit = "x" if places[0] == places[1] else f"x, {places[0]} against {places[1]}"
    whole = []
    if measured.minutes is not None:
        whole = [Row("circle.minutes", measured.minutes, "min", 45)]
    return [
        Row("slmrec.speedup.inference", ms["e4srec"][2] / ms["slmrec"][2], "x", 3),
        Row("slmrec.speedup.training", speedup, "x", 3),
        Row("slmrec.speedup.training_with_states", with_states, "x"),
        Row("slmrec.hr@1_vs_teacher", measured.hit_gain, ""),
        Row("slmrec.hr@1_vs_teacher_low", measured.hit_low, ""),
        Row("slmrec.hr@1_vs_teacher_high", measured.hit_high, ""),
        Row("slmrec.hr@1_vs_untaught", alone["hr@1"]["difference"], ""),
        Row("slmrec.vs_untaught_p", alone["hr@1"]["p"], ""),
        Row("dllm2rec.latency_ms", ms["sasrec-taught"][0], "ms", 2),
        Row("dllm2rec.times_faster_than_teacher", faster, unit, 100),
        Row("dllm2rec.hr20_gain", gain, ""),
        Row("dllm2rec.p_value", taught["hr@20"]["p"], ""),
        Row("dllm2rec.caser.hr20_gain", weaker_gain, ""),
        Row("dllm2rec.caser.p_value", weaker["hr@20"]["p"], ""),
        *whole,
    ]


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="name under data/; ml-100k is prepared here")
@click.option("--llm", default="smollm2-135m", help="the LM; Hugging Face id or folder")
@click.option("--layers", default=6, type=click.IntRange(1), help="layers of the small LM")
@click.option(
    "--windows",
    default=4096,
    type=click.IntRange(80),
    help="windows of history that the LM is trained on",
)
@click.option(
    "--small-windows",
    default=8192,
    type=click.IntRange(80),
    help="windows that the small LMs are trained on, with and without teacher",
)
@click.option(
    "--val-samples",
    default=1000,
    type=click.IntRange(1),
    help="validation samples that choose the step of each LM",
)
@click.option(
    "--procs",
    default=0,
    type=click.IntRange(0),
    help="processes that share the LM's work, by torchrun; 0: one for each GPU, without a GPU "
    "two (1.4 times as fast as one with two threads)",
)
@click.option(
    "--test-samples", default=0, type=click.IntRange(0), help="test samples of the table; 0 = all"
)
def main(**options: Any) -> None:
    """Backbone, LM, small LM, backbone again: every stage, then one table."""
    began = time.time()
    circle = Circle(**in_root(**options))
    circle.procs = circle.procs or torch.cuda.device_count() or min(os.cpu_count(), 2)
    must_be_taught(circle)
    prepare_all(circle)
    run_stages(circle)
    measured = measure(circle, load_data(circle.dataset), began)
    table = "\n".join(table_lines(circle, measured)) + "\n"
    print("\n" + table)
    (circle.folder / "circle.txt").write_text(table, encoding="utf-8")
    report(json_rows(circle, measured), torch.get_num_threads())


if __name__ == "__main__":
    main()
