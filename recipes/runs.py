"""The runs that the paper's tables are made of: backbones, soft prompts, fine-tuned LMs."""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from delrec import runtime
from delrec.backbone.presets import PRESETS
from delrec.lm.listed import backbone_digest
from delrec.lm.pretrained import EMBEDDED, config_of, kind_of, seed_and_name, text_config
from delrec.runtime import config_of_run, is_run
from recipes.stage import stage, typed

LONGEST_LIST = 25  # of a backbone's run: what Figure 8 needs
BATCH, BATCH_OF_PAPER = 16, 20  # of the scripts, without --paper and with it
LEAST = 5  # steps of stage 2: its AdaLoRA has nothing to reallocate in fewer
FOLDS = 5  # of a backbone's users: what is trained on it reads what it says of unseen ones
# conventional models with titles in their item vectors -> flags of train_backbone.py
TITLED = {
    "sasrec-titles": "--model sasrec --text tfidf+minilm",
    "bsarec-titles": "--model bsarec --text tfidf+minilm --ema .998",
}


@dataclass
class Plan:
    """What a recipe is asked for."""

    dataset: str
    also: Sequence[str]  # table5: more data sets
    llm: str
    seeds: int  # runs of everything that has an LM
    backbone_seeds: int  # of backbones, where they are what is to be beaten
    input: str  # what DELRec's rows read: titles, ids or hybrid
    budget: int  # training windows (or samples) of stage 2
    prompt_budget: int  # of stage 1; 0: a quarter of the budget
    batch: int  # windows of a step of both stages; 0: the scripts' own
    test_samples: int  # 0: all
    val_samples: int  # that choose a run's step, and a fusion's weight
    paper: bool  # DELRec's rows by the paper's own choices
    procs: int  # processes of each stage
    jobs: int  # seeds side by side
    dry_run: bool  # print the commands, run nothing
    controls: bool = False  # table2: the control rows too
    folds: int = FOLDS  # of a backbone's users, for what is trained on it
    choose: str = "full"  # levers: what LMs' steps are chosen by, finetune.py --choose
    evals: int = 0  # validations of stage 2; 0: by the budget, at least two
    printed: list = field(default_factory=list)  # by a dry run, so that each is printed once
    quiet: bool = False  # a dry run that only collects the commands

    @property
    def step(self) -> int:
        """Samples of the largest step of any row."""
        return self.batch or (BATCH_OF_PAPER if self.paper else BATCH)

    @property
    def least(self) -> int:
        """The fewest samples of stage 2 that are steps enough."""
        return LEAST * self.step


@dataclass
class Variant:
    """How a row of Tables III and IV differs from DELRec."""

    soft_prompt: str = "distilled"  # or what finetune.py takes in its place
    distill: Sequence = ()  # flags of stage 1, which then makes a soft prompt for this row alone
    finetune: Sequence = ()  # flags of stage 2


VARIANTS = {
    "delrec": Variant(),
    "no-prompt": Variant(soft_prompt="none"),  # the paper's w/o SP and w/o DPSM
    "words": Variant(soft_prompt="words"),  # w MCP
    "untrained": Variant(soft_prompt="random"),  # w USP
    "maps": Variant(soft_prompt="none"),  # the maps of stage 1 without its soft prompt; ours
    "untrained-maps": Variant(soft_prompt="random"),  # these maps with untrained vectors; ours
    "no-ta": Variant(distill=["--tasks", "rps"]),  # w/o TA
    "no-rps": Variant(distill=["--tasks", "ta"]),  # w/o RPS
    "moved-lm": Variant(distill=["--lr-lm", 1e-4]),  # w UDPSM
    "moved-prompt": Variant(finetune=["--lr-prompt", 5e-3]),  # w ULSR
}


class Runs:
    """The runs of one data set, LM and seed. Each method makes one unless it is there, and returns
    its folder's name under runs/.
    """

    def __init__(self, plan: Plan, dataset: str, seed: int, job: int = 0) -> None:
        self.plan, self.dataset = plan, dataset
        self.seed, self.job = seed, job  # job: its number among the seeds side by side
        self.name = Path(dataset).name
        random, llm = seed_and_name(plan.llm)
        llm = llm.rstrip("/").split("/")[-1] + ("" if random is None else f"-random{random}")
        own_prompt_budget = f"-{plan.prompt_budget}" if plan.prompt_budget else ""
        own_batch = f"-batch{plan.batch}" if plan.batch else ""
        self.home = f"{self.name}/{llm}-{plan.input}-{plan.budget}{own_prompt_budget}{own_batch}"

    @property
    def steps(self) -> list:
        """The flags of how much a step sees."""
        return ["--batch", self.plan.batch, "--micro", self.plan.batch] if self.plan.batch else []

    @property
    def paper(self) -> list:
        """The flag of DELRec's own choices, for DELRec's rows."""
        return ["--paper"] if self.plan.paper else []

    def run(self, name: str, *args: object) -> str:
        """The name of a run, once its command has been run (or printed, by a dry run)."""
        args = [*args, "--seed", self.seed, "--out", name]
        if self.plan.dry_run:
            self.print_once(typed(args, self.plan.procs))
            return name
        folder = runtime.ROOT / "runs" / name
        stage(folder, *args, procs=self.plan.procs, jobs=self.plan.jobs, job=self.job)
        return name

    def print_once(self, command: str) -> None:
        """Prints a command unless this dry run printed it before."""
        if command in self.plan.printed:
            return
        self.plan.printed.append(command)
        if not self.plan.quiet:
            print(command)

    def backbone(
        self, model: str = "sasrec", folds: int | None = None, beside: bool = False
    ) -> str:
        """A conventional model, which answers its training samples out of fold; folds=0 where
        nobody learns from it. One that another recipe made without folds stays as it is; beside it
        the same is trained with them, which `beside` asks for in any case.
        """
        folds = self.plan.folds if folds is None else folds
        options = ["--dataset", self.dataset, *model_flags(model, self.name)]
        options += ["--top-h", LONGEST_LIST]
        name = self.named(model)
        if beside or folds and answers_in_sample(runtime.ROOT / "runs" / name):
            name = self.named(f"{model}-folds")
        return self.run(name, "train_backbone.py", *options, "--folds", folds)

    def row(self, model: str = "sasrec") -> str:
        """The row of a backbone that others learn from: its run without folds where both are there,
        as all recipes name that one alike, and the model must be the same.
        """
        own, name = self.backbone(model), self.named(model)
        if own != name and not self.plan.dry_run:
            stop_unless_same(*(runtime.ROOT / "runs" / run for run in (own, name)))
        return name

    def named(self, name: str) -> str:
        """The name of a conventional model's run of this seed."""
        return f"{self.name}/{name}-s{self.seed}"

    def conventional(self, name: str, flags: Sequence) -> str:
        """A conventional model by its flags. Nobody learns from it, so it lists few samples."""
        options = ["--dataset", self.dataset, *flags, "--lists", 1000]
        return self.run(self.named(name), "train_backbone.py", *options)

    def taught(self, name: str, model: str, teacher: str, flags: Sequence) -> str:
        """A conventional model that learns from an LM's export."""
        options = ["--dataset", self.dataset, "--model", model, "--teacher", teacher, *flags]
        return self.run(f"{self.home}/{name}-s{self.seed}", "train_backbone.py", *options)

    def export(self, name: str, folds: Sequence[str] = ()) -> None:
        """The export of an LM's run; `folds`: the runs that answer, each for its fold."""
        args = ["evaluate.py", "--ckpt", name, "--export"]
        args += [x for run in folds for x in ("--folds", run)]
        if self.plan.dry_run:
            self.print_once(typed(args, self.plan.procs))
            return
        folder = runtime.ROOT / "runs" / name / "export"
        stage(folder, *args, procs=self.plan.procs, jobs=self.plan.jobs, job=self.job)

    def prompt(
        self,
        name: str = "prompt",
        model: str = "sasrec",
        flags: Sequence = (),
        reads: str = "",
        llm: str = "",
        windows: int = 0,
    ) -> str:
        """Stage 1, from the backbone `model`, with more flags, on items as `reads` says, for
        another LM than the plan's, if one is named, and of another number of windows.
        """
        reads, plan = reads or self.plan.input, self.plan
        least = 2 * plan.step
        budget = windows or plan.prompt_budget or min(max(plan.budget // 4, least), 20000)
        if plan.input == "ids" and reads != "ids":  # a title costs more than a vector
            budget = max(budget // 4, least)
        # distill.py's default rate, said so that a finished prompt of another rate is not taken
        vectors = ["--input", "ids", "--lr", 5e-4] if reads == "ids" else []
        options = ["--dataset", self.dataset, "--llm", llm or plan.llm]
        options += ["--backbone", self.backbone(model), *vectors]
        options += ["--samples", budget, *self.steps, *self.paper]
        options += ["--val-samples", plan.val_samples, "--evals", 2, *flags]
        return self.run(f"{self.home}/{name}-s{self.seed}", "distill.py", *options)

    def tuned(
        self,
        name: str,
        soft_prompt: str,
        flags: Sequence = (),
        reads: str = "",
        llm: str = "",
        backbone: str = "",
    ) -> str:
        """Stage 2 on items as `reads` says, of the LM `llm` (default: the plan's).

        With a distilled soft prompt it takes its backbone from that, else `backbone` or SASRec.
        """
        reads, plan = reads or self.plan.input, self.plan
        samples = plan.budget
        if plan.input == "ids" and reads != "ids":  # a title costs more than a vector
            samples = max(samples // 4, plan.least)
        options = ["--dataset", self.dataset, "--llm", llm or plan.llm]
        options += ["--input", reads, "--soft-prompt", soft_prompt]
        if soft_prompt in ("none", "random", "words"):
            options += ["--backbone", backbone or self.backbone()]
        options += ["--samples", samples, *self.steps, "--val-samples", plan.val_samples]
        evals = plan.evals or max(2, min(plan.budget // 2000, 6))
        options += ["--evals", evals, *flags]
        return self.run(f"{self.home}/{name}-s{self.seed}", "finetune.py", *options)

    def variant(self, name: str) -> str:
        """A row of Tables III and IV."""
        variant = VARIANTS[name]
        soft_prompt = variant.soft_prompt
        if variant.distill:
            soft_prompt = self.prompt(f"prompt-{name}", flags=variant.distill)
        elif soft_prompt == "distilled":
            soft_prompt = self.prompt()
        flags = [*self.paper, *variant.finetune]
        if name in ("maps", "untrained-maps"):
            flags += ["--maps", self.prompt()]
        return self.tuned(name, soft_prompt, flags)

    def halves(self) -> list[str]:
        """DELRec on the first half of the LM's layers: without stage 1, and with a soft prompt that
        was distilled for that half.
        """
        layers = kind_and_layers(self.plan.llm)[1] // 2
        without = self.tuned("half-no-prompt", "none", [*self.paper, "--layers", layers])
        half = str(runtime.ROOT / "runs" / without / "lm")  # what that run left of the LM
        soft_prompt = self.prompt("prompt-half-lm", llm=half)
        return [without, self.tuned("half-lm", soft_prompt, self.paper, llm=half)]

    def listed(self, h: int) -> str:
        """DELRec whose stage 1 is told a list of h items, on titles: there a longer list is a
        longer prompt; of vectors it is only asked for.
        """
        reads = "titles" if self.plan.input == "ids" else self.plan.input
        soft_prompt = self.prompt(f"prompt-{reads}-h{h}", flags=["--h", h], reads=reads)
        return self.tuned(f"{reads}-h{h}", soft_prompt, self.paper, reads)

    def delrec(self, model: str = "sasrec") -> str:
        """DELRec distilled from a backbone."""
        if model == "sasrec":
            return self.variant("delrec")
        return self.tuned(f"delrec-{model}", self.prompt(f"prompt-{model}", model), self.paper)

    def table_folder(self, recipe: str) -> Path:
        """The folder of a recipe's table."""
        return runtime.ROOT / "runs" / self.home / recipe

    def evaluate(self, recipe: str, runs: Sequence[str], *flags: object) -> Path:
        """The folder of a recipe's table of these runs."""
        out = self.table_folder(recipe)
        args = ["evaluate.py", "--ckpt", *dict.fromkeys(runs)]
        args += ["--limit", self.plan.test_samples, "--val-samples", self.plan.val_samples]
        args += ["--out", out, "--report", out / f"{recipe}.html", *flags]
        if "--llm" in flags:
            args += ["--llm-out", f"{self.home}/lm"]
        procs = self.plan.procs * self.plan.jobs  # no seed runs beside the table
        if 0 < torch.cuda.device_count() < procs:
            procs = self.plan.procs
        if self.plan.dry_run:
            self.print_once(typed(args, procs))
        else:
            stage(None, *args, procs=procs)
        return out


def model_flags(model: str, dataset: str) -> list[str]:
    """The flags of a conventional model on a data set. SASRec with titles has the settings that a
    search found there, if one was made."""
    if model == "sasrec-titles" and dataset in PRESETS:
        return ["--preset", dataset]
    return TITLED.get(model, f"--model {model}").split()


def stop_unless_same(own: Path, row: Path) -> None:
    """Ends the process if two runs of a backbone, with folds and without, are not one model: sums
    of other lengths on another number of threads are enough.
    """
    if backbone_digest(own) != backbone_digest(row):
        sys.exit(
            f"recipes: {row} would be the row of the backbone that LMs learn from, but they learn "
            f"from {own}, which was trained on other threads or by another version; move the first "
            "one away, and the same command goes on"
        )


def answers_in_sample(folder: Path) -> bool:
    """True for a finished backbone that was trained without folds."""
    return is_run(folder) and not config_of_run(folder).get("folds")


def kind_and_layers(llm: str) -> tuple[str, int]:
    """An LM's kind (decoder, encoder-decoder, encoder) and how many layers it has."""
    _, llm = seed_and_name(llm)
    if llm == EMBEDDED:
        # the embedded one may not be here yet (--dry-run)
        return "decoder", 30
    config = config_of(llm)
    return kind_of(config), text_config(config).num_hidden_layers


def of_decoders(plan: Plan, names: list[str], needing: list[str]) -> list[str]:
    """The rows that the plan's LM can have: those of `needing` need a decoder-only one."""
    kind, _ = kind_and_layers(plan.llm)
    if kind == "decoder":
        return names
    print(
        f"without {', '.join(needing)}: {plan.llm} is an {kind} LM, these need a decoder-only one",
        flush=True,
    )
    return [name for name in names if name not in needing]


# ---------------------------------------------------------------- side by side


def side_by_side(plan: Plan, makes: Sequence[Callable[[int], Any]]) -> list:
    """What make(job) returns for each of `makes`, plan.jobs of them at a time; job: which of them
    it is, with its share of the cores or GPUs.
    """
    places = SimpleQueue()
    for job in range(plan.jobs):
        places.put(job)

    def one(make):
        job = places.get()
        try:
            return make(job)
        finally:
            places.put(job)

    if plan.jobs == 1:
        return [one(make) for make in makes]
    with ThreadPoolExecutor(plan.jobs) as pool:
        return list(pool.map(one, makes))


def each_seed(plan: Plan, rows: Callable[[Runs], list[str]], dataset: str = "") -> list[str]:
    """Names of the runs that rows(Runs) makes of every seed, seed by seed."""

    def make(seed, job):
        return rows(Runs(plan, dataset or plan.dataset, seed, job))

    made = side_by_side(plan, [partial(make, seed) for seed in range(plan.seeds)])
    return [name for of_seed in made for name in of_seed]


def more_seeds(plan: Plan, models: list[str]) -> list[str]:
    """Names of more runs of backbones, which cost minutes: --backbone-seeds of them, whatever
    --seeds says of the LMs.
    """
    names = []
    for seed in range(plan.seeds, plan.backbone_seeds):
        runs = Runs(plan, plan.dataset, seed)
        names += [runs.backbone(model, folds=0) for model in models]
    return names


def compare_flags(plan: Plan, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The flags of evaluate.py that compare rows, of several seeds their means."""
    end = "-s0" if plan.seeds == 1 else ""  # means over seeds have none
    return [flag for a, b in pairs for flag in ("--compare", f"{a}{end}", f"{b}{end}")]


def evaluate(
    plan: Plan,
    recipe: str,
    names: list[str],
    *flags: object,
    dataset: str = "",
) -> Path:
    """The folder of a recipe's table."""
    return Runs(plan, dataset or plan.dataset, 0).evaluate(recipe, names, *flags)
