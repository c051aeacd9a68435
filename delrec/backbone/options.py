"""The options of train_backbone.py that say what a conventional model learns beside its targets."""

from types import SimpleNamespace
from typing import Any

import click

from delrec.backbone.models import ALL, TITLED
from delrec.names import NAMES
from delrec.ranges import ABOVE_0, FROM_0, Number

# a teacher: what a conventional model learns from an LM
dllm2rec_options = (
    click.option(
        "--teacher",
        help="run folder of an LM after evaluate.py --ckpt RUN --export; tfidf: no LM, the titles' "
        "vectors are bags of words (the control); --text names other vectors",
    ),
    click.option(
        "--lam",
        default=0.0,
        type=FROM_0,
        help="weight of the teacher's lists, lambda (paper: .1 to 1); 0: without; they helped "
        "Caser (.1), not SASRec",
    ),
    click.option(
        "--list-loss",
        default="softmax",
        type=click.Choice(["softmax", "sigmoid"]),
        help="listed items against the catalogue, or against one unlisted item (the paper)",
    ),
    click.option("--w-position", default=0.3, type=FROM_0, help="weight of a listed item's place"),
    click.option(
        "--w-confidence",
        default=0.5,
        type=FROM_0,
        help="weight of the teacher's confidence, g: a list counts 1 + g (c / mean c - 1), at most "
        "1; with --confidence listed the weight of an item within its list",
    ),
    click.option(
        "--w-consistency",
        default=0.1,
        type=FROM_0,
        help="weight of being in the student's own best K",
    ),
    click.option(
        "--confidence",
        default="truth",
        type=click.Choice(["truth", "permuted", "listed"]),
        help="c = exp(-(1 - p) / T), p the teacher's probability of the true item: how much its "
        "list counts (paper's text); permuted: that of another sample (the control); of the listed "
        "item: within its list only (its code)",
    ),
    click.option("--temperature", default=0.3, type=ABOVE_0, help="of the confidence, T"),
    click.option(
        "--eta",
        default=1.0,
        type=FROM_0,
        help="weight of the titles' vectors in the item vectors (paper: .1 to 1); 0: without",
    ),
    click.option(
        "--offset/--no-offset", default=True, help="learn a vector of each item beside its title's"
    ),
)
# DROS and CL4SRec, terms that may be added to any loss; how the training goes
added_options = (
    click.option(
        "--dros",
        default=0.0,
        type=FROM_0,
        help="weight alpha of DROS's term, which keeps the largest scores small (paper: .5, with "
        "--loss bce); 0: without",
    ),
    click.option(
        "--contrast",
        default=0.0,
        type=FROM_0,
        help="weight w of CL4SRec's term: two changed copies of a history shall have states alike "
        "(.1 is usual); 0: without",
    ),
    click.option("--contrast-tau", default=0.5, type=ABOVE_0, help="its temperature, tau"),
    click.option(
        "--one-target",
        is_flag=True,
        help="a window of its own for every target, as Caser and BSARec always have it: many times "
        "as much work an epoch (a control: what is that alone worth?)",
    ),
    click.option(
        "--ema",
        default=0.0,
        type=Number(0, 1, max_open=True),
        help="validate and keep the mean of the steps, each weighing so many times the next one "
        "(.998 on beauty, .99 on ml-100k); 0: the step itself",
    ),
    click.option(
        "--fp32",
        is_flag=True,
        help="32-bit numbers in the softmax over all items, as on all CPUs that do not multiply "
        "16-bit ones (bf16) in hardware; on those that do it takes twice as long",
    ),
)

# what KDA takes beside --text; without it, it is a control of its own
kda_options = (
    click.option(
        "--latent",
        type=click.IntRange(0),
        help="kda: relations of two items that their titles tell, beside having been taken by one "
        "user, 8; 0: that one alone (a control)",
    ),
    click.option(
        "--latent-weight",
        type=FROM_0,
        help="kda: weight of the loss by which titles tell relations, L_LRD, 10; 0: they tell "
        "nothing (a control)",
    ),
)

OF_LISTS = {"list_loss", "w_position", "w_confidence", "w_consistency", "confidence", "temperature"}

# flags whose default is the model's own
OWN = ("history", "width", "dropout", "lr", "batch", "epochs", "patience")


def half_registered(cfg: SimpleNamespace, defaults: dict[str, dict]) -> list[tuple[Any, str]]:
    """What a model lacks that was added in one place and not in another: (is it so?, a sentence).
    defaults: of each model its row of DEFAULTS."""
    model, row = cfg.model, defaults.get(cfg.model)
    file = "delrec/backbone/titled.py" if model in TITLED else "train_backbone.py"
    lacking = [key for key in OWN if key not in (row or OWN)]
    unknown = [key for key in row or () if key not in vars(cfg)]
    return [
        (
            model not in ALL,
            f"{model} has a row in DEFAULTS of {file}, but stands in no table of "
            "delrec/backbone/models.py; add its class to MODELS there",
        ),
        (
            row is None,
            f"{model} stands in delrec/backbone/models.py, but has no row in DEFAULTS of {file}; "
            f"add one with {', '.join(OWN)}",
        ),
        (
            lacking,
            f"the row of {model} in DEFAULTS of {file} lacks {', '.join(lacking)}; add what is "
            "missing",
        ),
        (
            unknown,
            f"the row of {model} in DEFAULTS of {file} names {', '.join(unknown)}, which is no "
            "flag; add one to delrec/backbone/options.py, or make it a constant beside the class",
        ),
        (
            model not in NAMES,
            f"{model} has no name for people; add one to NAMES in delrec/names.py",
        ),
    ]


def idle(cfg: SimpleNamespace, moved: set[str]) -> list[tuple[bool, str]]:
    """Flags that would change nothing: (is it so?, a sentence). moved: the names of those that were
    typed with another value than their default."""

    def beside(flag, is_idle, needed):
        name = f"--{flag.replace('_', '-')}"
        sentence = f"{name} changes nothing without {needed}; give that too, or leave {name} out"
        return flag in moved and is_idle, sentence

    has_lists, model = cfg.teacher and cfg.lam, ALL[cfg.model]
    may_list = cfg.teacher != "tfidf" and cfg.model != "bert4rec"  # those refuse --lam
    return [
        (
            cfg.teacher and cfg.text and not has_lists,
            f"--teacher changes nothing beside --text {cfg.text} without --lam, as the titles' "
            f"vectors are that text's; {'give --lam, or ' if may_list else ''}leave --teacher out",
        ),
        (
            cfg.text and not cfg.eta,
            f"--text {cfg.text} changes nothing with --eta 0; raise --eta, or leave --text out",
        ),
        (
            cfg.teacher and not (cfg.eta or cfg.lam),
            f"--teacher changes nothing with --eta 0{' and without --lam' if may_list else ''}; "
            f"raise --eta, {'give --lam, ' if may_list else ''}or leave --teacher out",
        ),
        (
            cfg.one_target and model.one_state,
            f"--one-target changes nothing with --model {cfg.model}, each target of which has a "
            "window of its own; leave --one-target out",
        ),
        (
            cfg.one_target and model.cloze,
            f"--one-target is about models that predict the next item, --model {cfg.model} learns "
            "items hidden anywhere in a window; leave --one-target out",
        ),
        beside("contrast_tau", not cfg.contrast, "--contrast"),
        beside("negatives", cfg.loss not in ("sampled", "gbce"), "--loss sampled or gbce"),
        beside("latent", cfg.model != "kda", "--model kda"),
        beside("latent_weight", cfg.model != "kda" or cfg.latent == 0, "--model kda and --latent"),
        beside("lam", cfg.lam and not cfg.teacher, "--teacher"),
        beside("eta", cfg.eta and not (cfg.teacher or cfg.text), "--text"),
        *(beside(flag, not has_lists, "--teacher and --lam") for flag in sorted(OF_LISTS)),
    ]
