"""Which levers make DELRec better? Each is screened alone on validation; what is kept is then
trained in full and asked about the test part, once.

    python recipes/levers.py --dataset beauty                    the screen (many hours on 2 cores)
    python recipes/levers.py --levers residual,ema               some of it
    python recipes/levers.py --dataset beauty --carry titles+residual --carry titles+residual+ema
                                                                 two combinations in full, the table
    python recipes/levers.py --dry-run                           only print the commands

The screen trains one seed, 4,096 windows in stage 2 and 512 in stage 1. The first row is DELRec on
item vectors, out of fold, with stage 1; each further row differs from the row named under "minus"
in what its name says and in nothing else. ROWS in recipes/levers_rows.py is the whole plan. The
screen prints what validation says at each run's chosen step: NDCG@10 over all items, which levers
are chosen by, and HR@1 of 15. It runs no evaluate.py and reads nothing of the test part.

--carry names the levers that are kept, joined by +, at most two combinations. Each is trained in
full (12,288 and 1,024 windows, three seeds), the first with controls beside it: random weights, its
maps with an untrained soft prompt, the same without --residual, an MLP on its backbone's state.
Then evaluate.py makes one table of them and of the strongest rows without an LM.

The primary comparison is fixed here. On beauty it is the first combination with both counts
against SASRec and BSARec, both with titles, with both counts, in HR@1 of 15. An LM on top of its
backbone's scores is two models, so two models without an LM are what it must beat. Everything else
is secondary, and adjusted (Holm).

Every run is a command of the scripts. It stands in runs/<dataset>/<llm>-ids-<budget>-<prompt
budget>/ with its seed, where make headline finds and leaves its own. Finished ones are used again,
killed ones go on. The screen ends in levers/levers.txt there, the table in levers/table.txt.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.runtime import described, stop
from recipes.ensembles import BOTH, with_both_counts
from recipes.levers_rows import (
    BASE,
    ROWS,
    SASREC,
    TITLES,
    Row,
    alone_name,
    beside,
    combined,
    is_residual,
    screened,
)
from recipes.levers_table import report
from recipes.options import (
    batch_option,
    dataset_option,
    dry_run_option,
    folds_option,
    procs_option,
)
from recipes.runs import Plan, Runs, side_by_side
from recipes.stage import in_root, name_of
from recipes.tables import check, jobs_of, prepare_all

TWO = "bsarec-titles"  # the second model of the bar
BAR = f"{TITLES}+{TWO}+{BOTH}"  # the strongest mixture of two models without an LM
PRIMARY_ON = "beauty"  # the data set of the primary comparison


# ---------------------------------------------------------------- the stages


def llm_of(runs: Runs, row: Row) -> str:
    """The LM of a row; "" for the plan's."""
    return f"random-{runs.seed}:{runs.plan.llm}" if row.random_lm else ""


def prompt(runs: Runs, row: Row) -> str:
    """The run of a row's stage 1. Rows that differ in stage 2 alone have the same."""
    own = row.distill.split()
    own += [f"x{row.windows}"] if row.windows > 1 else []
    own += [row.backbone] if row.backbone != SASREC else []
    own += ["random-lm"] if row.random_lm else []
    windows = row.windows * runs.plan.prompt_budget if row.windows > 1 else 0
    options = dict(flags=row.distill.split(), llm=llm_of(runs, row), windows=windows)
    return runs.prompt(name_of(["prompt", *own]), row.backbone, **options)


def mlp(runs: Runs, name: str, row: Row) -> str:
    """An MLP on the state of a row's backbone."""
    options = ["--dataset", runs.dataset, "--backbone", runs.backbone(row.backbone)]
    return runs.run(runs.named(name), "recipes/mlp.py", *options, "--choose", runs.plan.choose)


def made(runs: Runs, name: str, row: Row) -> str:
    """The run of a row."""
    if row.script == "train_backbone.py":
        return runs.row(row.backbone)
    if row.script == "recipes/mlp.py":
        return mlp(runs, name, row)
    own, backbone = prompt(runs, row), runs.backbone(row.backbone)
    names = {"backbone": backbone}
    if "{gru4rec}" in row.finetune:
        names["gru4rec"] = runs.backbone("gru4rec")
    flags = row.finetune.format(**names).split()
    if row.random_prompt:
        flags += ["--maps", own]
    if runs.plan.choose != "full":
        flags += ["--choose", runs.plan.choose]
    vectors = "random" if row.random_prompt else own
    return runs.tuned(name, vectors, flags, llm=llm_of(runs, row), backbone=backbone)


def make_all(plan: Plan, rows: dict[str, Row]) -> dict[tuple[str, int], str]:
    """{(row, seed): its run} of all rows and seeds: first what several rows are made of (backbones,
    then soft prompts), so that no two jobs make the same one."""
    seeds = range(plan.seeds)
    models = dict.fromkeys(row.backbone for row in rows.values())
    models |= {"gru4rec": None} if any("{gru4rec}" in r.finetune for r in rows.values()) else {}
    lms = [row for row in rows.values() if row.script == "finetune.py"]
    prompts = {(row.distill, row.windows, row.backbone, row.random_lm): row for row in lms}

    def backbone(model, seed, job):
        Runs(plan, plan.dataset, seed, job).backbone(model)

    def stage_1(row, seed, job):
        prompt(Runs(plan, plan.dataset, seed, job), row)

    def stage_2(name, seed, job):
        return made(Runs(plan, plan.dataset, seed, job), name, rows[name])

    side_by_side(plan, [partial(backbone, model, s) for s in seeds for model in models])
    side_by_side(plan, [partial(stage_1, row, s) for s in seeds for row in prompts.values()])
    asked = [(name, s) for s in seeds for name in rows]
    return dict(zip(asked, side_by_side(plan, [partial(stage_2, *one) for one in asked])))


def screen(plan: Plan, rows: dict[str, Row]) -> None:
    """Trains every row with one seed and says what validation says of it."""
    runs = {name: run for (name, _), run in make_all(plan, rows).items()}
    if not plan.dry_run:
        folders = {name: runtime.ROOT / "runs" / run for name, run in runs.items()}
        home = Runs(plan, plan.dataset, 0).home
        compared = {name: (row.minus, row.controls) for name, row in rows.items()}
        report(plan.dataset, folders, compared, runtime.ROOT / "runs" / home / "levers")


def carried(combinations: tuple[str, ...]) -> dict[str, Row]:
    """{name: row} of the combinations that --carry names."""
    named = dict(combined(text) for text in combinations)
    if named and not is_residual(next(iter(named.values()))):
        stop(
            f"--carry {combinations[0]} is first, but the primary comparison is about an LM on top "
            "of its backbone's scores; name a combination with residual first"
        )
    return named


def carry(plan: Plan, named: dict[str, Row]) -> Path:
    """Trains the combinations in full, with what they are compared with, and makes the table."""
    first, row = next(iter(named.items()))
    rows = {name: ROWS[name] for name in dict.fromkeys([row.backbone, SASREC, BASE])}
    rows |= {**named, **beside(first, row)}
    names = list(make_all(plan, rows).values())

    def without_lm(model, seed, job):
        return Runs(plan, plan.dataset, seed, job).backbone(model, folds=0)

    # a second SASRec with titles for each, of a seed of its own
    of_bar = [(TITLES, s) for s in range(2 * plan.seeds)] + [(TWO, s) for s in range(plan.seeds)]
    of_bar = [(model, s) for model, s in of_bar if model != row.backbone or s >= plan.seeds]
    names += side_by_side(plan, [partial(without_lm, *one) for one in of_bar])
    flags = [*fusions(plan, named), *comparisons(plan, named, row.backbone)]
    return Runs(plan, plan.dataset, 0).evaluate(
        "levers", names, "--reference", f"{row.backbone}-s0", *flags
    )


# ---------------------------------------------------------------- the table of the test part


def fusions(plan: Plan, named: dict[str, Row]) -> list[str]:
    """The flags of evaluate.py that fuse: each combination with both counts, and as many models
    without an LM."""
    pairs = []
    for s in range(plan.seeds):
        titles = f"{TITLES}-s{s}"
        two = [(titles, f"{TWO}-s{s}"), (titles, f"{TITLES}-s{s + plan.seeds}")]
        singles = [*(f"{name}-s{s}" for name in (BASE, *named)), titles]
        for row in singles:
            pairs += with_both_counts(row)
        for pair in two:
            pairs += [pair, *with_both_counts("+".join(pair))]
    return [flag for pair in pairs for flag in ("--fuse", *pair)]


def comparisons(plan: Plan, named: dict[str, Row], backbone: str) -> list[str]:
    """The flags of evaluate.py that compare: the primary pair, then what is secondary."""
    first, *others = named
    # late: the same two models, fused when both are done
    late = f"{backbone}+{alone_name(first, named[first])}"
    of_first = dict.fromkeys([backbone, BASE, late, *beside(first, named[first])])
    pairs = [(first, other) for other in of_first]
    bars = [BASE, TITLES, f"{TITLES}+{TITLES}"]
    pairs += [(f"{first}+{BOTH}", f"{other}+{BOTH}") for other in bars]
    for second in others:
        pairs += [(second, first), (f"{second}+{BOTH}", BAR)]
    primary = (f"{first}+{BOTH}", BAR)
    is_primary = Path(plan.dataset).name == PRIMARY_ON
    flags = ["--primary" if is_primary else "--compare", *primary]
    return flags + [flag for pair in pairs for flag in ("--compare", *pair)]


# ---------------------------------------------------------------- the command


def settled(plan: Plan, is_full: bool) -> Plan:
    """The plan with the numbers that nobody typed."""
    plan.seeds = plan.seeds or (3 if is_full else 1)
    plan.backbone_seeds = plan.seeds
    # the primary comparison is among candidates, and a fusion's weight is chosen among them
    plan.choose = "candidates" if is_full else "full"
    plan.budget = plan.budget or (12288 if is_full else 4096)
    plan.prompt_budget = plan.prompt_budget or (1024 if is_full else 512)
    plan.jobs = jobs_of(plan)
    check(plan)
    return plan


@click.command(**described(__doc__))
@dataset_option
@click.option(
    "--levers", multiple=True, help="rows of the screen, as a,b or repeated; all if not given"
)
@click.option(
    "--carry",
    "carry_",
    multiple=True,
    metavar="A+B",
    help="instead of the screen: levers that are kept, joined by +, trained in full and asked "
    "about the test part; twice at most, the first with residual",
)
@click.option("--llm", default="smollm2-135m", help="a decoder-only LM; Hugging Face id or folder")
@click.option(
    "--seeds", default=0, type=click.IntRange(0), help="with --carry: seeds 0, 1, ..; 0: three"
)
@click.option(
    "--budget",
    default=0,
    type=click.IntRange(0),
    help="training windows of stage 2; 0: 4,096, with --carry 12,288",
)
@click.option(
    "--prompt-budget",
    default=0,
    type=click.IntRange(0),
    help="training windows of stage 1; 0: 512, with --carry 1,024",
)
@batch_option
@folds_option
@click.option(
    "--test-samples",
    default=0,
    type=click.IntRange(0),
    help="with --carry: test samples of the table; 0 = all",
)
@click.option(
    "--val-samples",
    default=1000,
    type=click.IntRange(1),
    help="validation samples that choose the step of each run, and the weight of each fusion",
)
@procs_option
@click.option(
    "--jobs",
    default=0,
    type=click.IntRange(0),
    help="runs side by side, each with its share of the cores, or --procs GPUs of its own; 0: as "
    "many as the GPUs allow, 2 without",
)
@dry_run_option
def main(levers: tuple[str, ...], carry_: tuple[str, ...], **options: Any) -> None:
    """Screen levers on validation, or carry some of them to the test part."""
    if not carry_ and (options["seeds"] or options["test_samples"]):
        stop("--seeds and --test-samples are of the table of --carry; the screen has one seed")
    if carry_ and levers:
        stop("--levers names rows of the screen, --carry what is trained in full; leave one out")
    if len(carry_) > 2:
        stop(f"--carry takes two combinations at most, {len(carry_)} were given; name fewer")
    options = in_root(**options)
    plan = settled(
        Plan(**options, also=(), backbone_seeds=0, input="ids", paper=False), bool(carry_)
    )
    rows = carried(carry_) or screened(levers)  # a name of none is refused before anything is made
    if not plan.dry_run:
        prepare_all(plan)
    if not carry_:
        return screen(plan, rows)
    out = carry(plan, rows)
    if not plan.dry_run:
        print(f"\nlevers: {out}/table.txt .md .tex .csv, figures, {out.name}.html")


if __name__ == "__main__":
    main()
