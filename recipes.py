"""The paper's tables and figures, each by one command (make headline, table2, table3, table4, fig8, table5, coldstart).

    python recipes.py headline --input ids --budget 12288 --prompt-budget 64    does it beat its backbone? (make headline; some two and a half hours on 2 cores)
    python recipes.py table3                                                    ml-100k, the embedded LM, two seeds, a budget for 2 cores
    python recipes.py table3 --input ids --budget 4096                          the same variants with items as vectors (E4SRec's input)
    python recipes.py table2 --dataset beauty --llm google/flan-t5-xl --budget 50000 --procs 10       ten GPUs
    python recipes.py fig8 --dry-run                                            only print the commands

Every stage is a command of the README. Runs stand under runs/<dataset>/<llm>-<input>-<budget>[-<prompt budget>]/, backbones under runs/<dataset>/, all with their seed (-s0, -s1,
..); finished ones are not repeated, killed ones go on from their checkpoint. A recipe ends in the folder .../<recipe>/: table.txt .md .tex .csv, figures, a page.
The budget is the samples (with --input ids the windows) that stage 2 sees; stage 1 sees --prompt-budget, or a third as many, at most 20,000.
"""
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click

import common

# DELRec, Tables III and IV: variant -> (what the table calls it, flags of stage 1, flags of stage 2; None: stage 1's default run, no stage 2)
VARIANTS = {"delrec": ("default", [], []), "no-prompt": ("w/o SP = w/o DPSM", None, ["--soft-prompt", "none"]), "words": ("w MCP", None, ["--soft-prompt", "words"]),
            "untrained": ("w USP", None, ["--soft-prompt", "random"]), "no-ta": ("w/o TA", ["--tasks", "rps"], []), "no-rps": ("w/o RPS", ["--tasks", "ta"], []),
            "moved-lm": ("w UDPSM", ["--lr-lm", 1e-4], []), "moved-prompt": ("w ULSR", [], ["--lr-prompt", 5e-3]), "half-lm": ("half of the LM", [], [])}
# other methods of Table II that are flags here (spec: each a row of the same four scripts)
OTHERS = {"llara": ["--input", "hybrid", "--verbalizer", "letter", "--order", "shuffled"], "llamarec": ["--verbalizer", "letter", "--order", "backbone"],
          "llmseqprompt": ["--loss", "titles", "--verbalizer", "likelihood", "--order", "shuffled"], "e4srec": ["--input", "ids"]}
SHOWN = set()       # commands that --dry-run has printed: each once
KS, HS = (20, 40, 60, 80, 100, 120), (5, 10, 15, 20, 25)


def stage(folder, *args, procs=1, dry=False):
    """Run a command of the README unless its run is finished; --resume takes up one that was killed. dry: print it only."""
    if not dry and folder is not None and (folder / ("meta.json" if folder.name == "export" else "config.json")).exists():
        print(f"=== {folder} is there", flush=True)
        return
    resume = ["--resume"] if folder is not None and (folder / "checkpoints").is_dir() else []
    line, many = [str(a) for a in (*args, *resume)], procs > 1 and args[0] != "data/prepare.py"
    shown = f"{f'torchrun --nproc_per_node={procs}' if many else 'python'} {shlex.join(line)}"
    if dry:
        if shown not in SHOWN:
            print(shown)
        SHOWN.add(shown)
        return
    print(f"\n=== {shown}", flush=True)
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={procs}"] if many else ["-u"]
    threads = {"OMP_NUM_THREADS": str(max(os.cpu_count() // procs, 1))} if many else {}      # torchrun's own choice is 1
    if code := subprocess.run([sys.executable, *launch, *line], cwd=common.ROOT, env=os.environ | threads).returncode:
        sys.exit(f"{Path(sys.argv[0]).stem}: '{args[0]}' stopped with exit code {code}; its message is above. The same command goes on from here")


class Recipe:
    """The stages of one data set and LM: each method runs one unless it is there, and returns its folder's name under runs/."""

    def __init__(self, c, dataset, seed):
        self.c, self.data, self.seed = c, dataset, seed
        self.name = Path(dataset).name
        self.home = f"{self.name}/{c.llm.rstrip('/').split('/')[-1]}-{c.input}-{c.budget}" + (f"-{c.prompt_budget}" if c.prompt_budget else "")

    def run(self, name, *args):
        stage(common.ROOT / "runs" / name, *args, "--seed", self.seed, "--out", name, procs=self.c.procs, dry=self.c.dry_run)
        return name

    def backbone(self, model="sasrec"):
        return self.run(f"{self.name}/{model}-s{self.seed}", "train_backbone.py", "--dataset", self.data, "--model", model, "--top-h", max(HS))

    def prompt(self, name="prompt", model="sasrec", flags=()):
        return self.run(f"{self.home}/{name}-s{self.seed}", "distill.py", "--dataset", self.data, "--llm", self.c.llm, "--backbone", self.backbone(model), "--samples",
                        self.c.prompt_budget or min(max(self.c.budget // 3, 32), 20000), "--evals", 2, *flags)

    def tune(self, name, *flags, model="sasrec"):
        """Stage 2. A run with a soft prompt takes its backbone from it."""
        own = [] if "--input" in flags else ["--input", self.c.input]
        own += [] if "--soft-prompt" in flags and flags[flags.index("--soft-prompt") + 1] not in ("none", "random", "words") else ["--backbone", self.backbone(model)]
        return self.run(f"{self.home}/{name}-s{self.seed}", "finetune.py", "--dataset", self.data, "--llm", self.c.llm, "--samples", self.c.budget, "--evals", max(2, min(self.c.budget // 2000, 6)), *own, *flags)

    def variant(self, name):
        """A row of Tables III and IV."""
        _, one, two = VARIANTS[name]
        if one is None:
            return self.tune(name, *two)
        prompt = self.prompt() if not one else self.prompt(f"prompt-{name}", flags=one)
        if name == "half-lm":
            two = ["--layers", layers(self.c.llm) // 2]
        return self.tune(name, "--soft-prompt", prompt, *two)

    def delrec(self, model="sasrec"):
        if model == "sasrec":
            return self.variant("delrec")
        return self.tune(f"delrec-{model}", "--soft-prompt", self.prompt(f"prompt-{model}", model))

    def evaluate(self, recipe, runs, *flags, val_samples=500):
        out = common.ROOT / "runs" / self.home / recipe
        stage(None, "evaluate.py", "--ckpt", *dict.fromkeys(runs), "--limit", self.c.test_samples, "--val-samples", val_samples, "--out", out, "--report", out / f"{recipe}.html", *flags,
              procs=self.c.procs, dry=self.c.dry_run)
        return out


def layers(llm):
    """How many layers an LM has."""
    from transformers import AutoConfig
    return AutoConfig.from_pretrained(common.CACHE / llm if llm == "smollm2-135m" else llm).num_hidden_layers


# ---------------------------------------------------------------- the recipes

def headline(c):
    """Does DELRec beat its own backbone? Alone, and against the strongest that goes without an LM: backbones fused with each other and with counts of pairs."""
    runs, fused = [], []
    for seed in range(c.seeds):
        r = Recipe(c, c.dataset, seed)
        runs += [r.backbone(), r.backbone("gru4rec"), r.variant("no-prompt"), r.delrec()]
        fused += ["--fuse", f"delrec-s{seed}", "co-occurrence", "--fuse", f"sasrec-s{seed}", f"gru4rec-s{seed}", "--fuse", f"sasrec-s{seed}+gru4rec-s{seed}", "co-occurrence"]
    return Recipe(c, c.dataset, 0).evaluate("headline", runs, *fused, "--reference", "sasrec-s0", val_samples=1000)


def table2(c):
    """Backbones, the plain LM, other methods that are flags here, DELRec with each backbone."""
    runs = []
    for seed in range(c.seeds):
        r = Recipe(c, c.dataset, seed)
        runs += [r.backbone(m) for m in ("sasrec", "gru4rec", "caser")] + [r.tune(n, *flags, "--soft-prompt", "none") for n, flags in OTHERS.items()]
        runs += [r.delrec(m) for m in ("sasrec", "gru4rec", "caser")]
    return Recipe(c, c.dataset, 0).evaluate("table2", runs, "--dataset", c.dataset, "--llm", c.llm, "--reference", "sasrec-s0")


def table3(c):
    """What the soft prompt is worth: none, words instead, untrained vectors, distilled."""
    runs = [Recipe(c, c.dataset, s).variant(v) for s in range(c.seeds) for v in ("no-prompt", "words", "untrained", "delrec")]
    return Recipe(c, c.dataset, 0).evaluate("table3", [f"{Path(c.dataset).name}/sasrec-s{s}" for s in range(c.seeds)] + runs, "--reference", "delrec-s0")


def table4(c):
    """What each part is worth: without stage 1, without stage 2, without a task, with more that moves, with half of the LM."""
    runs = [Recipe(c, c.dataset, s).variant(v) for s in range(c.seeds) for v in ("no-prompt", "no-ta", "no-rps", "moved-lm", "moved-prompt", "half-lm", "delrec")]
    prompts = [f"{Recipe(c, c.dataset, s).home}/prompt-s{s}" for s in range(c.seeds)]       # w/o LSR: the distilled prompt alone
    return Recipe(c, c.dataset, 0).evaluate("table4", [f"{Path(c.dataset).name}/sasrec-s{s}" for s in range(c.seeds)] + prompts + runs, "--reference", "delrec-s0")


def fig8(c):
    """HR@1 against the soft prompt's length k and the list's length h."""
    runs = []
    for s in range(c.seeds):
        r = Recipe(c, c.dataset, s)
        runs.append(r.variant("delrec"))
        for k in KS:
            runs += [r.tune(f"k{k}", "--soft-prompt", r.prompt(f"prompt-k{k}", flags=["--k", k]))] if k != 80 else []
        for h in HS:
            runs += [r.tune(f"h{h}", "--soft-prompt", r.prompt(f"prompt-h{h}", flags=["--h", h]))] if h != 10 else []
    return Recipe(c, c.dataset, 0).evaluate("fig8", [f"{Path(c.dataset).name}/sasrec-s0"] + runs)


def table5(c):
    """DELRec and its backbone on data sets of different density: --dataset, and those of --also."""
    lines = [f"{'data set':<14}{'density':>9}{'sasrec':>9}{'delrec':>9}{'gain':>9}  p (McNemar)   fused"]
    for name in [c.dataset, *c.also]:
        runs = []
        for seed in range(c.seeds):
            r = Recipe(c, name, seed)
            runs += [r.backbone(), r.delrec()]
        out = Recipe(c, name, 0).evaluate("table5", runs)
        if not c.dry_run:
            data, table = common.load_data(name), common.read_json(out / "metrics.json")
            rows, test = table["rows"], table["tests"]["delrec-s0 - sasrec-s0"]
            lines.append(f"{Path(name).name:<14}{len(data.items) / data.n_users / data.n_items:>9.4%}{rows['sasrec-s0']['hr@1']:>9.3f}{rows['delrec-s0']['hr@1']:>9.3f}{test['hr@1']:>+9.3f}  "
                         f"{test['p_mcnemar_hr@1']:<12.3g}{rows['sasrec-s0+delrec-s0']['hr@1']:>9.3f}")
    if not c.dry_run:
        print("\n" + "\n".join(lines))
    return out


def coldstart(c):
    """The same rows on cold users: test samples with at most two earlier items."""
    runs = []
    for seed in range(c.seeds):
        r = Recipe(c, c.dataset, seed)
        runs += [r.backbone(m) for m in ("sasrec", "gru4rec", "caser")] + [r.variant("no-prompt"), r.delrec()]
    return Recipe(c, c.dataset, 0).evaluate("coldstart", runs, "--max-history", 2, "--dataset", c.dataset, "--llm", c.llm)


RECIPES = {f.__name__: f for f in (headline, table2, table3, table4, fig8, table5, coldstart)}


@click.command(**common.described(__doc__ + "\n" + "\n\n".join(f"{n}: {f.__doc__}" for n, f in RECIPES.items())))
@click.argument("recipe", type=click.Choice(list(RECIPES)))
@click.option("--dataset", default="ml-100k", help="name under data/; ml-100k is prepared here, others before")
@click.option("--also", multiple=True, help="table5: another data set; may be repeated")
@click.option("--llm", default="smollm2-135m", help="the LM; Hugging Face id or folder")
@click.option("--seeds", default=2, type=click.IntRange(1), help="runs of everything, seeds 0, 1, ..")
@click.option("--budget", default=192, type=click.IntRange(80), help="training samples of stage 2 (with --input ids: windows)")
@click.option("--prompt-budget", default=0, type=click.IntRange(0), help="training samples of stage 1; 0: a third of --budget, at most 20,000")
@click.option("--input", default="titles", type=click.Choice(["titles", "ids", "hybrid"]), help="what DELRec's rows read: see finetune.py --input")
@click.option("--test-samples", default=1000, type=click.IntRange(0), help="test samples of the table, the same for all rows; 0 = all")
@click.option("--procs", default=1, type=click.IntRange(1), help="processes (GPUs) of each stage, by torchrun")
@click.option("--dry-run", is_flag=True, help="print the commands, run nothing")
def main(recipe, **config):
    c = SimpleNamespace(**config)
    if not c.dry_run:
        for name in [c.dataset, *c.also]:
            if name == "ml-100k" and not (common.ROOT / "data" / name / "meta.json").exists():
                stage(None, "data/prepare.py", name)
            common.load_data(name)                       # says how to prepare it
        if c.llm == "smollm2-135m":
            stage(None, "data/prepare.py", c.llm)
    out = RECIPES[recipe](c)
    if not c.dry_run:
        print(f"\n{recipe}: {out}/table.txt .md .tex .csv, figures, {recipe}.html")


if __name__ == "__main__":
    main()
