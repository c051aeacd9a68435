"""The paper's tables and figures, each by one command.

make headline, control, table2 to table5, fig8, coldstart, layers, students and parts run it:

    python recipes/tables.py headline --budget 4096 --prompt-budget 512 --test-samples 4000
                                    does it beat its backbone? five seeds of backbones, three of LMs
    python recipes/tables.py headline --seeds 1 --backbone-seeds 1 --test-samples 300
                                    the same, quick and small: to see it run
    python recipes/tables.py control --budget 4096 --prompt-budget 512 --test-samples 4000
                                    is it the language model? (hours)
    python recipes/tables.py table3
                                    ml-100k, the embedded LM, two seeds, items as vectors, a budget
                                    for 2 cores: 50 to 80 minutes
    python recipes/tables.py table3 --input titles --budget 192 --test-samples 1000
                                    the same variants with items as titles, over night
    python recipes/tables.py table2
                                    every system of Table II, one seed, small: two hours
    python recipes/tables.py table2 --controls --seeds 3
                                    the same with each method's controls, three seeds
    python recipes/tables.py table2 --dataset beauty --llm google/flan-t5-xl --input titles \\
        --paper --budget 50000 --seeds 3 --procs 10 --test-samples 0 --val-samples 1000
                                    ten GPUs
    python recipes/tables.py layers --budget 4096 --test-samples 0
                                    a small LM of each depth, with and without a teacher (SLMRec)
    python recipes/tables.py students --dataset beauty --seeds 1 --folds 3 --budget 8192 \\
        --test-samples 0
                                    DLLM2Rec's three students, alone and taught by a small LM
    python recipes/tables.py parts --also beauty --budget 8192 --test-samples 0
                                    each part of what an LM teaches SASRec and Caser (DLLM2Rec)
    python recipes/tables.py fig8 --dry-run
                                    only print the commands

Every stage is a command of the README. Runs stand under
runs/<dataset>/<llm>-<input>-<budget>[-<prompt budget>]/, backbones under runs/<dataset>/, all with
their seed (-s0, -s1, ..). Finished ones are not repeated, killed ones go on from their checkpoint.
A recipe ends in the folder .../<recipe>/: table.txt .md .tex .csv, figures, a page.

The budget is the windows of histories (with --input titles the samples) that stage 2 sees. Stage 1
sees --prompt-budget, or a quarter as many, at most 20,000; table2's methods that read titles see a
quarter of the windows. Every run chooses its step, and every fusion its weight, on 1,000 validation
samples (--val-samples; table2 100), each on another half of the users.

Two seeds run side by side, each on its share of the cores or GPUs: on 2 cores more is done than by
one after the other, as a process with two threads keeps 1.2 cores busy. What a stage prints then
stands in <its run folder>.out.
"""

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.data.prepared import load_data
from delrec.evaluation import stats
from delrec.evaluation.scores import places_in_test
from delrec.lm.pretrained import EMBEDDED, seed_and_name
from delrec.runtime import described, read_json
from recipes.controls import control
from recipes.ensembles import controls, fusions
from recipes.options import (
    batch_option,
    dataset_option,
    dry_run_option,
    folds_option,
    procs_option,
)
from recipes.runs import (
    LEAST,
    Plan,
    each_seed,
    evaluate,
    kind_and_layers,
    more_seeds,
    of_decoders,
)
from recipes.stage import in_root, prepare, stage
from recipes.students import layers, parts, students
from recipes.table2 import BACKBONES, SMALL, table2

# Figure 8; k beside DELRec's own 80
PROMPT_LENGTHS = (20, 40, 60, 100, 120)
LIST_LENGTHS = (5, 10, 15, 20, 25)
COLD = 2  # earlier items of a cold user, at most
# recipe -> seeds of what has an LM, and of backbones, where nobody typed them
SEEDS, BACKBONE_SEEDS = {"headline": 3, "table2": 1}, {"headline": 5}
# recipe -> windows of stage 2, test and validation samples, where nobody typed them
BUDGETS, TESTS, VALS = {"table2": SMALL}, {"table2": 300}, {"table2": 100}


# ---------------------------------------------------------------- the recipes


def headline(plan: Plan) -> Path:
    """Does DELRec beat its own backbone? Alone; and fused, against as many members without an LM:
    backbones fused with each other, with counts of pairs and with likeness of titles, among them a
    SASRec with titles in its item vectors.
    """

    def rows(runs):
        backbones = [runs.row("sasrec")]
        backbones += [runs.backbone(name, folds=0) for name in ("gru4rec", "sasrec-titles")]
        return [*backbones, runs.delrec(), runs.variant("no-prompt")]

    names = each_seed(plan, rows) + more_seeds(plan, ["sasrec", "gru4rec", "sasrec-titles"])
    flags = [*fusions(plan), *controls(plan), "--reference", "sasrec-s0"]
    return evaluate(plan, "headline", names, *flags)


def table3(plan: Plan) -> Path:
    """What the soft prompt is worth: none, words instead, untrained vectors, distilled; of item
    vectors also the distilled maps without it, and with untrained vectors.
    """
    maps = ["maps", "untrained-maps"] if plan.input == "ids" else []
    variants = ["no-prompt", "words", "untrained", *maps, "delrec"]

    def rows(runs):
        return [runs.row(), *map(runs.variant, variants)]

    return evaluate(plan, "table3", each_seed(plan, rows), "--reference", "delrec-s0")


def table4(plan: Plan) -> Path:
    """What each part is worth: without stage 1, without stage 2, without a task, with more that
    moves; and half of the LM, without stage 1 and with it.
    """
    variants = ["no-prompt", "no-ta", "no-rps", "moved-lm", "moved-prompt", "delrec"]
    with_halves = of_decoders(plan, ["half-lm"], ["half-lm"])

    def rows(runs):  # the distilled prompt alone is the paper's w/o LSR
        names = [runs.row(), runs.prompt(), *map(runs.variant, variants)]
        return names + (runs.halves() if with_halves else [])

    return evaluate(plan, "table4", each_seed(plan, rows), "--reference", "delrec-s0")


def fig8(plan: Plan) -> Path:
    """HR@1 against the soft prompt's length k, and on titles against the list's length h. A sweep:
    its rows are not marked.
    """

    def rows(runs):
        names = [runs.row(), runs.delrec()]
        for k in PROMPT_LENGTHS:
            prompt = runs.prompt(f"prompt-k{k}", flags=["--k", k])
            names.append(runs.tuned(f"k{k}", prompt, runs.paper))
        return names + [runs.listed(h) for h in LIST_LENGTHS]

    return evaluate(plan, "fig8", each_seed(plan, rows), "--exploratory")


def table5(plan: Plan) -> Path:
    """DELRec and its backbone on data sets of different density: --dataset, and those of --also."""

    def rows(runs):
        return [runs.row(), runs.delrec()]

    lines = [
        f"{'data set':<14}{'density':>9}{'sasrec':>9}{'delrec':>9}{'gain':>9}  p            fused  "
        f" (HR@1, means over {plan.seeds} seeds; p: sign-flip test of them over users)"
    ]
    for dataset in [plan.dataset, *plan.also]:
        names = each_seed(plan, rows, dataset)
        out = evaluate(plan, "table5", names, dataset=dataset)
        if not plan.dry_run:
            lines.append(density_line(dataset, read_json(out / "metrics.json")))
    if not plan.dry_run:
        print("\n" + "\n".join(lines))
    return out


def density_line(dataset: str, table: dict) -> str:
    """A data set's line of Table V."""
    data = load_data(dataset)
    density = len(data.items) / data.n_users / data.n_items

    def mean(row):
        rows = table["rows"].items()
        return np.mean([v["hr@1"] for name, v in rows if stats.unseeded(name) == row])

    tested = table["seeds"]["delrec"] if table["seeds"] else table["rows"]["delrec-s0"]
    gain = mean("delrec") - mean("sasrec")
    return (
        f"{Path(dataset).name:<14}{density:>9.4%}{mean('sasrec'):>9.3f}{mean('delrec'):>9.3f}"
        f"{gain:>+9.3f}  {tested['test']['hr@1']['p']:<12.3g}{mean('sasrec+delrec'):>6.3f}"
    )


def coldstart(plan: Plan) -> Path:
    """The same rows on cold users: test samples with at most two earlier items."""
    if not plan.dry_run:  # a log that has none is refused before hours of training
        places_in_test(load_data(plan.dataset), 0, COLD)

    def rows(runs):
        backbones = [runs.row(model) for model in BACKBONES]
        return [*backbones, runs.variant("no-prompt"), runs.delrec()]

    flags = ["--max-history", COLD, "--dataset", plan.dataset, "--llm", plan.llm]
    return evaluate(plan, "coldstart", each_seed(plan, rows), *flags)


OF_DELREC = (headline, control, table2, table3, table4, fig8, table5, coldstart)
RECIPES = {f.__name__: f for f in (*OF_DELREC, layers, students, parts)}


# ---------------------------------------------------------------- the command


def jobs_of(plan: Plan) -> int:
    """--jobs, or as many as the GPUs allow, two without."""
    if plan.dry_run:
        return 1
    jobs = 2
    if torch.cuda.is_available():
        jobs = max(torch.cuda.device_count() // plan.procs, 1)
    return plan.jobs or jobs


def check(plan: Plan) -> None:
    """Ends the process if the plan's LM cannot read its input, the paper's choices are not of it,
    or the budgets are less than stages need."""
    if plan.paper and plan.input != "titles":
        sys.exit(
            f"recipes: --paper is about titles, but --input is {plan.input}; add --input titles"
        )
    if plan.budget < plan.least:
        sys.exit(
            f"recipes: --budget {plan.budget} is less than the {LEAST} steps of {plan.step} that "
            f"stage 2 needs; ask for {plan.least} or more"
        )
    if 0 < plan.prompt_budget < plan.step:
        sys.exit(
            f"recipes: --prompt-budget {plan.prompt_budget} is less than a step of {plan.step}; "
            "ask for that or more"
        )
    kind, _ = kind_and_layers(plan.llm)
    if plan.input == "ids" and kind != "decoder":
        sys.exit(
            "recipes: stage 1 on item vectors (--input ids) reads a state after every item, which "
            f"needs a decoder-only LM; {plan.llm} is an {kind} LM: add --input titles"
        )


def prepare_all(plan: Plan) -> None:
    """Makes the embedded data set and LM; for others it says how they are prepared."""
    for name in [plan.dataset, *plan.also]:
        prepare(name)
    if seed_and_name(plan.llm)[1] == EMBEDDED:
        stage(None, "data/prepare.py", EMBEDDED)


@click.command(
    **described(__doc__ + "\n" + "\n\n".join(f"{n}: {f.__doc__}" for n, f in RECIPES.items()))
)
@click.argument("recipe", type=click.Choice(list(RECIPES)))
@dataset_option
@click.option("--also", multiple=True, help="table5, parts: another data set; may be repeated")
@click.option("--llm", default="smollm2-135m", help="the LM; Hugging Face id or folder")
@click.option(
    "--seeds",
    default=0,
    type=click.IntRange(0),
    help="runs of everything that has an LM, seeds 0, 1, ..; 0: 2, headline 3, table2 1",
)
@click.option(
    "--backbone-seeds",
    default=0,
    type=click.IntRange(0),
    help="runs of the backbones in headline and table2, never fewer than --seeds; 0: 5 and 1",
)
@click.option(
    "--input",
    default="ids",
    type=click.Choice(["titles", "ids", "hybrid"]),
    help="what DELRec's rows read: see finetune.py --input; ids needs a decoder-only LM",
)
@click.option(
    "--budget",
    type=click.IntRange(1),
    help="training windows of stage 2 (with --input titles and hybrid: samples); 512, table2 1024",
)
@click.option(
    "--prompt-budget",
    default=0,
    type=click.IntRange(0),
    help="training windows of stage 1; 0: a quarter of --budget, at most 20,000",
)
@batch_option
@folds_option
@click.option(
    "--test-samples",
    type=click.IntRange(0),
    help="test samples of the table, the same for all rows; 0 = all; 2000, table2 300",
)
@click.option(
    "--val-samples",
    type=click.IntRange(1),
    help="validation samples that choose the step of each run, and the weight of each fusion; "
    "1000, table2 100; fewer only to see it run",
)
@procs_option
@click.option(
    "--jobs",
    default=0,
    type=click.IntRange(0),
    help="seeds side by side, each with its share of the cores, or --procs GPUs of its own; 0: "
    "as many as the GPUs allow, 2 without",
)
@click.option(
    "--paper",
    is_flag=True,
    help="with --input titles: DELRec's own rows by --paper of distill.py and finetune.py; the "
    "budget stays this command's",
)
@click.option("--controls", is_flag=True, help="table2: each method's controls beside its row")
@dry_run_option
def main(recipe: str, **options: Any) -> None:
    """Run every stage of a recipe, then make its table."""
    plan = Plan(**in_root(**options))
    plan.seeds = plan.seeds or SEEDS.get(recipe, 2)
    plan.budget = plan.budget or BUDGETS.get(recipe, 512)
    if plan.test_samples is None:  # 0 means all
        plan.test_samples = TESTS.get(recipe, 2000)
    plan.val_samples = plan.val_samples or VALS.get(recipe, 1000)
    plan.backbone_seeds = max(plan.backbone_seeds or BACKBONE_SEEDS.get(recipe, 0), plan.seeds)
    plan.jobs = min(jobs_of(plan), plan.seeds)
    check(plan)
    if not plan.dry_run:
        prepare_all(plan)
    out = RECIPES[recipe](plan)
    if not plan.dry_run:
        print(f"\n{recipe}: {out}/table.txt .md .tex .csv, figures, {out.name}.html")


if __name__ == "__main__":
    main()
