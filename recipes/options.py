"""Options that several recipes have."""

import click

from recipes.runs import FOLDS

dataset_option = click.option(
    "--dataset", default="ml-100k", help="name under data/; ml-100k is prepared here, others before"
)
batch_option = click.option(
    "--batch",
    default=0,
    type=click.IntRange(0),
    help="windows of a step of both stages; 0: the scripts' own, 16. Short histories train faster "
    "with 64",
)
procs_option = click.option(
    "--procs", default=1, type=click.IntRange(1), help="processes (GPUs) of each stage, by torchrun"
)
folds_option = click.option(
    "--folds",
    default=FOLDS,
    type=click.IntRange(2),
    help="folds of users: a backbone answers those of each by a model that never saw them; fewer "
    "train faster, on less",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="print the commands, run nothing")
