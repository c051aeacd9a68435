"""Is it the language model? What stands in for the pre-trained LM, and the table of it."""

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from delrec import runtime
from delrec.runtime import load_run
from delrec.training.log import entries_of
from recipes.runs import Plan, Runs, each_seed, kind_and_layers, side_by_side


@dataclass
class Control:
    """An LM of the same architecture and tokenizer with random weights."""

    layers: int = 0  # the first so many of them, all of whose weights train; 0: all, with adapters
    # of which one is chosen on validation
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)

    @property
    def flags(self) -> list:
        """What finetune.py is told beside --llm."""
        return ["--layers", self.layers, "--adapt", "all"] if self.layers else []


CONTROLS = {
    "random": Control(rates=(1e-3, 3e-3, 1e-2)),
    "two-layers": Control(layers=2),
    "six-layers": Control(layers=6),
}


def control(plan: Plan) -> Path:
    """Is it the language model? An LM on item vectors (without stage 1) against itself with random
    weights, against its first 2 and 6 layers with random weights that are all trained, an MLP on
    the backbone's state, and the backbone, which answers out of fold; tested against the LM's row.

    The transformers see the same windows, as many. The learning rate of each is the best of some on
    validation (seed 0, a quarter of the budget), the MLP's too; the LM has its default.
    """
    if plan.input != "ids":
        sys.exit("recipes: control is about LMs on item vectors; leave --input out")
    _, most = kind_and_layers(plan.llm)
    names = [name for name, each in CONTROLS.items() if each.layers <= most]
    rows = each_seed(plan, of_the_lm)
    rates = {name: chosen_rate(plan, name) for name in names}
    rows += each_seed(plan, lambda runs: [row(runs, name, rates[name]) for name in names])
    return Runs(plan, plan.dataset, 0).evaluate("control", rows, "--reference", "no-prompt-s0")


def of_the_lm(runs: Runs) -> list[str]:
    """The rows of a seed that need no choice: backbone, MLP, LM."""
    options = ["--dataset", runs.dataset, "--backbone", runs.backbone(), "--choose", "full"]
    mlp = runs.run(f"{runs.name}/mlp-s{runs.seed}", "recipes/mlp.py", *options)
    return [runs.row(), mlp, runs.variant("no-prompt")]


def row(runs: Runs, name: str, rate: float) -> str:
    """The run of a control, with its seed's own random weights, at a learning rate."""
    flags = [*CONTROLS[name].flags, "--lr", rate]
    llm, backbone = f"random-{runs.seed}:{runs.plan.llm}", runs.backbone()
    return runs.tuned(f"{name}-lr{rate:g}", "none", flags, llm=llm, backbone=backbone)


def chosen_rate(plan: Plan, name: str) -> float:
    """The learning rate at which a control is best on validation, seed 0, a quarter of the
    budget.
    """
    rates = CONTROLS[name].rates
    short = replace(plan, budget=max(plan.budget // 4, plan.least))

    def make(rate, job):
        return row(Runs(short, plan.dataset, 0, job), name, rate)

    runs = side_by_side(plan, [partial(make, rate) for rate in rates])
    if plan.dry_run:  # nothing is known yet: the middle one
        return sorted(rates)[1]
    found = [quality(runtime.ROOT / "runs" / run) for run in runs]
    best = rates[int(np.argmax(found))]
    said = ", ".join(f"{rate:g}: {x:.4f}" for rate, x in zip(rates, found))
    print(f"=== {name}: learning rate {best:g} by NDCG@10 on validation ({said})", flush=True)
    return best


def quality(folder: Path) -> float:
    """The NDCG@10 on validation of a run's best step: over all items where it was logged, else
    among the candidates.
    """
    best = load_run(folder).best_step
    line = next(x for x in entries_of(folder) if x["step"] == best and "val_ndcg@10" in x)
    return line.get("val_full_ndcg@10", line["val_ndcg@10"])
