"""The paper's tables and figures, each by one command.

make headline, table2, table3, table4, fig8, table5 and coldstart run it:

    python recipes/tables.py headline --budget 12288 --prompt-budget 1024 --test-samples 0
                                    does it beat its backbone? some ninety minutes on 2 cores
    python recipes/tables.py table3
                                    ml-100k, the embedded LM, two seeds, items as vectors, a budget
                                    for 2 cores: half an hour
    python recipes/tables.py table3 --input titles --budget 192 --test-samples 1000
                                    the same variants with items as titles, over night
    python recipes/tables.py table2 --dataset beauty --llm google/flan-t5-xl --input titles \\
        --budget 50000 --seeds 3 --procs 10 --test-samples 0
                                    ten GPUs
    python recipes/tables.py fig8 --dry-run
                                    only print the commands

Every stage is a command of the README. Runs stand under
runs/<dataset>/<llm>-<input>-<budget>[-<prompt budget>]/, backbones under runs/<dataset>/, all with
their seed (-s0, -s1, ..). Finished ones are not repeated, killed ones go on from their checkpoint.
A recipe ends in the folder .../<recipe>/: table.txt .md .tex .csv, figures, a page.

The budget is the windows of histories (with --input titles the samples) that stage 2 sees. Stage 1
sees --prompt-budget, or a quarter as many, at most 20,000; table2's methods that read titles see a
quarter of the windows.

Two seeds run side by side, each on its share of the cores or GPUs: on 2 cores more is done than by
one after the other, as a process with two threads keeps 1.2 cores busy. What a stage prints then
stands in <its run folder>.out.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import click
import numpy as np
import torch

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.prepared import load_data
from delrec.evaluation import stats
from delrec.runtime import (
    described,
    read_json,
)
from recipes.stage import stage

# DELRec, Tables III and IV: variant -> (flags of stage 1 or the soft prompt that goes without one,
# flags of stage 2). The paper calls no-prompt w/o SP and w/o DPSM, words w MCP, untrained w USP,
# no-ta w/o TA, no-rps w/o RPS, moved-lm w UDPSM, moved-prompt w ULSR; maps (distilled maps, no soft
# prompt) is ours
VARIANTS = {
    "delrec": ([], []),
    "no-prompt": ("none", []),
    "words": ("words", []),
    "untrained": ("random", []),
    "maps": ("none", []),
    "no-ta": (["--tasks", "rps"], []),
    "no-rps": (["--tasks", "ta"], []),
    "moved-lm": (["--lr-lm", 1e-4], []),
    "moved-prompt": ([], ["--lr-prompt", 5e-3]),
    "half-lm": ([], []),
}
# other methods of Table II that are flags here: name -> (--input, flags)
OTHERS = {
    "llara": ("hybrid", ["--verbalizer", "letter", "--order", "shuffled"]),
    "llamarec": ("titles", ["--verbalizer", "letter", "--order", "backbone"]),
    "llmseqprompt": (
        "titles",
        ["--loss", "titles", "--verbalizer", "likelihood", "--order", "shuffled"],
    ),
    "e4srec": ("ids", []),
}
KS, HS = (20, 40, 60, 80, 100, 120), (5, 10, 15, 20, 25)


class Recipe:
    """The stages of one data set and LM: each method runs one unless it is there, and returns its
    folder's name under runs/.
    """

    def __init__(self, c, dataset, seed):
        self.c, self.data, self.seed, self.job = c, dataset, seed, 0
        self.name = Path(dataset).name
        self.home = f"{self.name}/{c.llm.rstrip('/').split('/')[-1]}-{c.input}-{c.budget}" + (
            f"-{c.prompt_budget}" if c.prompt_budget else ""
        )

    def run(self, name, *args):
        stage(
            runtime.ROOT / "runs" / name,
            *args,
            "--seed",
            self.seed,
            "--out",
            name,
            procs=self.c.procs,
            jobs=self.c.jobs,
            job=self.job,
            dry=self.c.dry_run,
        )
        return name

    def backbone(self, model="sasrec"):
        return self.run(
            f"{self.name}/{model}-s{self.seed}",
            "train_backbone.py",
            "--dataset",
            self.data,
            "--model",
            model,
            "--top-h",
            max(HS),
        )

    def prompt(self, name="prompt", model="sasrec", flags=()):
        """Stage 1. --lr is distill.py's default, said so that a finished prompt of another rate is
        not taken for this one.
        """
        return self.run(
            f"{self.home}/{name}-s{self.seed}",
            "distill.py",
            "--dataset",
            self.data,
            "--llm",
            self.c.llm,
            "--backbone",
            self.backbone(model),
            *(["--input", "ids", "--lr", 5e-4] if self.c.input == "ids" else []),
            "--samples",
            self.c.prompt_budget or min(max(self.c.budget // 4, 32), 20000),
            "--evals",
            2,
            *flags,
        )

    def tune(self, name, soft_prompt, *flags, model="sasrec", reads=None):
        """Stage 2, on what `reads` or else --input says.

        With a distilled soft prompt it takes its backbone from that.
        """
        reads = reads or self.c.input
        samples = (
            max(self.c.budget // 4, 80)
            if self.c.input == "ids" and reads != "ids"
            else self.c.budget
        )
        own = (
            ["--backbone", self.backbone(model)]
            if soft_prompt in ("none", "random", "words")
            else []
        )
        return self.run(
            f"{self.home}/{name}-s{self.seed}",
            "finetune.py",
            "--dataset",
            self.data,
            "--llm",
            self.c.llm,
            "--input",
            reads,
            "--soft-prompt",
            soft_prompt,
            *own,
            "--samples",
            samples,
            "--val-samples",
            min(samples, 1000 if reads == "ids" else 200),
            "--evals",
            max(2, min(self.c.budget // 2000, 6)),
            *flags,
        )

    def variant(self, name):
        """A row of Tables III and IV."""
        one, two = VARIANTS[name]
        soft_prompt = (
            one
            if isinstance(one, str)
            else self.prompt(f"prompt-{name}", flags=one)
            if one
            else self.prompt()
        )
        if name == "half-lm":
            two = ["--layers", shape(self.c.llm)[1] // 2]
        if name == "maps":
            two = ["--maps", self.prompt()]
        return self.tune(name, soft_prompt, *two)

    def delrec(self, model="sasrec"):
        if model == "sasrec":
            return self.variant("delrec")
        return self.tune(f"delrec-{model}", self.prompt(f"prompt-{model}", model))

    def evaluate(self, recipe, runs, *flags, val_samples=500):
        procs, gpus = self.c.procs * self.c.jobs, torch.cuda.device_count()
        out = runtime.ROOT / "runs" / self.home / recipe
        stage(
            None,
            "evaluate.py",
            "--ckpt",
            *dict.fromkeys(runs),
            "--limit",
            self.c.test_samples,
            "--val-samples",
            val_samples,
            "--out",
            out,
            "--report",
            out / f"{recipe}.html",
            *flags,
            *(["--llm-out", f"{self.home}/lm"] if "--llm" in flags else []),
            procs=self.c.procs if 0 < gpus < procs else procs,
            dry=self.c.dry_run,
        )
        return out


def shape(llm):
    """An LM's kind (decoder, encoder-decoder, encoder) and how many layers it has."""
    if llm == "smollm2-135m":
        # the embedded one may not be here yet (--dry-run)
        return "decoder", 30
    from delrec.lm.pretrained import config_of, kind_of, text_config

    config = config_of(llm)
    return kind_of(config), text_config(config).num_hidden_layers


def decoder_only(c, names, what):
    """The rows that c's LM can have: those named in `what` need a decoder-only one."""
    if (kind := shape(c.llm)[0]) == "decoder":
        return names
    print(
        f"without {', '.join(what)}: {c.llm} is an {kind} LM, these need a decoder-only one",
        flush=True,
    )
    return [n for n in names if n not in what]


# ---------------------------------------------------------------- the recipes


def each_seed(c, rows, dataset=None):
    """rows(Recipe) -> names of runs, for every seed, --jobs of them side by side: all names, seed
    by seed.
    """
    free = SimpleQueue()  # places side by side
    for job in range(c.jobs):
        free.put(job)

    def one(seed):
        r = Recipe(c, dataset or c.dataset, seed)
        r.job = free.get()
        try:
            return rows(r)
        finally:
            free.put(r.job)

    with ThreadPoolExecutor(c.jobs) as pool:
        return [
            run for runs in (pool.map if c.jobs > 1 else map)(one, range(c.seeds)) for run in runs
        ]


def more_seeds(c, models):
    """Backbones cost minutes: three seeds of them at least, whatever --seeds says of the LMs."""
    return [Recipe(c, c.dataset, seed).backbone(m) for seed in range(c.seeds, 3) for m in models]


def headline(c):
    """Does DELRec beat its own backbone? Alone, and against the strongest that goes without an LM:
    backbones fused with each other and with counts of pairs.
    """
    runs, fused = (
        each_seed(
            c, lambda r: [r.backbone(), r.backbone("gru4rec"), r.delrec(), r.variant("no-prompt")]
        )
        + more_seeds(c, ["sasrec", "gru4rec"]),
        [],
    )
    for s in range(max(c.seeds, 3)):
        fused += [
            "--fuse",
            f"sasrec-s{s}",
            f"gru4rec-s{s}",
            "--fuse",
            f"sasrec-s{s}+gru4rec-s{s}",
            "co-occurrence",
        ]
    for s in range(c.seeds):
        fused += [
            "--fuse",
            f"delrec-s{s}",
            "co-occurrence",
            "--fuse",
            f"no-prompt-s{s}",
            "co-occurrence",
        ]
    if c.seeds > 1:
        fused += [
            "--fuse",
            "delrec-s0",
            "delrec-s1",
            "--fuse",
            "delrec-s0+delrec-s1",
            "co-occurrence",
            "--fuse",
            "delrec-s0+delrec-s1+co-occurrence",
            "gru4rec-s0",
        ]
    return Recipe(c, c.dataset, 0).evaluate(
        "headline", runs, *fused, "--reference", "sasrec-s0", val_samples=1000
    )


def table2(c):
    """Backbones, the plain LM, other methods that are flags here, DELRec with each backbone and
    without stage 1 (of item vectors: E4SRec).
    """
    others = {
        name: OTHERS[name]
        for name in decoder_only(c, list(OTHERS), ["llmseqprompt"])
        if name != "e4srec" or c.input != "ids"
    }
    runs = each_seed(
        c,
        lambda r: (
            [r.backbone(m) for m in ("sasrec", "gru4rec", "caser")]
            + [r.tune(n, "none", *flags, reads=reads) for n, (reads, flags) in others.items()]
            + [r.variant("no-prompt")]
            + [r.delrec(m) for m in ("sasrec", "gru4rec", "caser")]
        ),
    ) + more_seeds(c, ["sasrec", "gru4rec", "caser"])
    return Recipe(c, c.dataset, 0).evaluate(
        "table2", runs, "--dataset", c.dataset, "--llm", c.llm, "--reference", "sasrec-s0"
    )


def table3(c):
    """What the soft prompt is worth: none, words instead, untrained vectors, distilled; of item
    vectors also the distilled maps without it.
    """
    names = ["no-prompt", "words", "untrained", *(["maps"] if c.input == "ids" else []), "delrec"]
    runs = each_seed(c, lambda r: [r.backbone()] + [r.variant(v) for v in names])
    return Recipe(c, c.dataset, 0).evaluate("table3", runs, "--reference", "delrec-s0")


def table4(c):
    """What each part is worth: without stage 1, without stage 2, without a task, with more that
    moves, with half of the LM.
    """
    names = decoder_only(
        c,
        ["no-prompt", "no-ta", "no-rps", "moved-lm", "moved-prompt", "half-lm", "delrec"],
        ["half-lm"],
    )
    # w/o LSR: the distilled prompt alone
    runs = each_seed(c, lambda r: [r.backbone(), r.prompt()] + [r.variant(v) for v in names])
    return Recipe(c, c.dataset, 0).evaluate("table4", runs, "--reference", "delrec-s0")


def fig8(c):
    """HR@1 against the soft prompt's length k and the list's length h."""
    ks, hs = [k for k in KS if k != 80], [h for h in HS if h != 10]
    runs = each_seed(
        c,
        lambda r: (
            [r.backbone(), r.delrec()]
            + [r.tune(f"k{k}", r.prompt(f"prompt-k{k}", flags=["--k", k])) for k in ks]
            + [r.tune(f"h{h}", r.prompt(f"prompt-h{h}", flags=["--h", h])) for h in hs]
        ),
    )
    return Recipe(c, c.dataset, 0).evaluate("fig8", runs)


def table5(c):
    """DELRec and its backbone on data sets of different density: --dataset, and those of --also."""
    lines = [
        f"{'data set':<14}{'density':>9}{'sasrec':>9}{'delrec':>9}{'gain':>9}  p            fused  "
        f" (HR@1, means over {c.seeds} seeds; p: paired t of them, users as clusters)"
    ]
    for name in [c.dataset, *c.also]:
        out = Recipe(c, name, 0).evaluate(
            "table5", each_seed(c, lambda r: [r.backbone(), r.delrec()], name)
        )
        if not c.dry_run:
            data, table = load_data(name), read_json(out / "metrics.json")

            def mean(row):
                return np.mean(
                    [v["hr@1"] for n, v in table["rows"].items() if stats.unseeded(n) == row]
                )

            p = (
                table["seeds"]["delrec"]["p_hr@1"]
                if table["seeds"]
                else table["rows"]["delrec-s0"]["p_hr@1"]
            )
            lines.append(
                f"{Path(name).name:<14}{len(data.items) / data.n_users / data.n_items:>9.4%}"
                f"{mean('sasrec'):>9.3f}{mean('delrec'):>9.3f}"
                f"{mean('delrec') - mean('sasrec'):>+9.3f} "
                f" {p:<12.3g}"
                f"{mean('sasrec+delrec'):>6.3f}"
            )
    if not c.dry_run:
        print("\n" + "\n".join(lines))
    return out


def coldstart(c):
    """The same rows on cold users: test samples with at most two earlier items."""
    runs = each_seed(
        c,
        lambda r: (
            [r.backbone(m) for m in ("sasrec", "gru4rec", "caser")]
            + [r.variant("no-prompt"), r.delrec()]
        ),
    )
    return Recipe(c, c.dataset, 0).evaluate(
        "coldstart", runs, "--max-history", 2, "--dataset", c.dataset, "--llm", c.llm
    )


RECIPES = {f.__name__: f for f in (headline, table2, table3, table4, fig8, table5, coldstart)}


@click.command(
    **described(__doc__ + "\n" + "\n\n".join(f"{n}: {f.__doc__}" for n, f in RECIPES.items()))
)
@click.argument("recipe", type=click.Choice(list(RECIPES)))
@click.option(
    "--dataset", default="ml-100k", help="name under data/; ml-100k is prepared here, others before"
)
@click.option("--also", multiple=True, help="table5: another data set; may be repeated")
@click.option("--llm", default="smollm2-135m", help="the LM; Hugging Face id or folder")
@click.option(
    "--seeds", default=2, type=click.IntRange(1), help="runs of everything, seeds 0, 1, .."
)
@click.option(
    "--input",
    default="ids",
    type=click.Choice(["titles", "ids", "hybrid"]),
    help="what DELRec's rows read: see finetune.py --input; ids needs a decoder-only LM",
)
@click.option(
    "--budget",
    default=512,
    type=click.IntRange(80),
    help="training windows of stage 2 (with --input titles and hybrid: samples)",
)
@click.option(
    "--prompt-budget",
    default=0,
    type=click.IntRange(0),
    help="training windows of stage 1; 0: a quarter of --budget, at most 20,000",
)
@click.option(
    "--test-samples",
    default=2000,
    type=click.IntRange(0),
    help="test samples of the table, the same for all rows; 0 = all",
)
@click.option(
    "--procs", default=1, type=click.IntRange(1), help="processes (GPUs) of each stage, by torchrun"
)
@click.option(
    "--jobs",
    default=0,
    type=click.IntRange(0),
    help="seeds side by side, each with its share of the cores, or --procs GPUs of its own; 0: "
    "as many as the GPUs allow, 2 without",
)
@click.option("--dry-run", is_flag=True, help="print the commands, run nothing")
def main(recipe, **config):
    c = SimpleNamespace(**config)
    c.jobs = (
        1
        if c.dry_run
        else min(
            c.jobs
            or max(torch.cuda.device_count() // c.procs, 1 if torch.cuda.is_available() else 2),
            c.seeds,
        )
    )
    if c.input == "ids" and (kind := shape(c.llm)[0]) != "decoder":
        sys.exit(
            "recipes: stage 1 on item vectors (--input ids) reads a state after every item, which "
            f"needs a decoder-only LM; {c.llm} is an {kind} LM: add --input titles"
        )
    if not c.dry_run:
        for name in [c.dataset, *c.also]:
            if name == "ml-100k" and not (runtime.ROOT / "data" / name / "meta.json").exists():
                stage(None, "data/prepare.py", name)
            load_data(name)  # says how to prepare it
        if c.llm == "smollm2-135m":
            stage(None, "data/prepare.py", c.llm)
    out = RECIPES[recipe](c)
    if not c.dry_run:
        print(f"\n{recipe}: {out}/table.txt .md .tex .csv, figures, {recipe}.html")


if __name__ == "__main__":
    main()
