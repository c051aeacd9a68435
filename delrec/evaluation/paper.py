"""What DELRec prints: which of its methods a run is, the numbers of its tables, the points of its
Figure 8.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from delrec.data import prepared
from delrec.evaluation.stats import Intervals, RowMetrics, ends_of, unseeded
from delrec.evaluation.wording import SHOWN
from delrec.lm.pretrained import seed_and_name
from delrec.names import NAMES
from delrec.places import LMS, PLACES
from delrec.runtime import Run, read_json
from delrec.training.checkpoints import MAY_CHANGE

PRINTED = Path(prepared.__file__).with_name("paper.csv")  # in an installed delrec too
DATASETS = {
    "ml-100k": "MovieLens-100K",
    "steam": "Steam",
    "beauty": "Beauty",
    "home-kitchen": "Home & Kitchen",
    "kuairec": "KuaiRec",
}
PLAIN_LMS = {"google/flan-t5-xl": "Flan-T5-XL", "google/flan-t5-large": "Flan-T5-Large"}
# their flags are those of a variant of DELRec; the recipe's name tells them apart
OTHER_METHODS = {
    "llara": "LLaRA",
    "llamarec": "LlamaRec",
    "recranker": "RecRanker",
    "trsr-words": "LLM-TRSR",
    "trsr-recurrent": "LLM-TRSR",
    "llmseqprompt": "LLMSEQPROMPT",
    "e4srec": None,
    "half-lm": None,
}
# what the recipe's controls of these methods are called: nobody prints a number for one
CONTROLS = ("llara-", "llamarec-", "recranker-", "trsr-")
# conventional models that read titles, by --model and --text-in
OF_TITLES = {
    ("seqsim", None): "LLMSEQSIM",
    ("bert4rec", "start"): "LLM2BERT4Rec",
    ("kda", None): "KDALRD",
}
# flags of ours in either stage: a run with one is no method of DELRec's
OURS = ("residual", "user_states", "keep_rps", "augment", "kd", "ema", "drop_items", "r_drop")
WITHOUT_STAGE_1 = {"none": "w/o SP", "words": "w MCP", "random": "w USP"}
OF_ONE_TASK = {"rps": "w/o TA", "ta": "w/o RPS"}
# in which runs of one point of Figure 8 may differ
NO_CHOICE = {*MAY_CHANGE, "seed", "folder"}


def printed_numbers(dataset: str, method: str | None) -> dict | None:
    """The numbers DELRec prints for a method (data/paper.csv); None where it prints none.

    Its protocol is another one: see the README.
    """
    with open(PRINTED, encoding="utf-8") as f:
        for row in csv.DictReader(f):
            if row["dataset"] == DATASETS.get(dataset) and row["method"] == method:
                numbers = {m: float(row[m]) for m in SHOWN if m in row}
                return numbers | {"table": row["table"], "method": method}
    return None


def stage_1(run: Run) -> dict:
    """The configuration of the distillation a fine-tuned run took its soft prompt from; {} if there
    was none.
    """
    prompt = Path(run.soft_prompt) / "config.json"
    return read_json(prompt) if prompt.exists() else {}


def paper_method(run: Run) -> str | None:
    """What DELRec's tables call a run like this one, by what it is; None if they have none."""
    if run.stage == "train_backbone":
        model, way = getattr(run, "model", None), getattr(run, "text_in", None)
        titled = getattr(run, "text", None) or getattr(run, "teacher", None)
        if getattr(run, "permute_text", False):
            return None
        return OF_TITLES.get((model, way)) if titled else NAMES.get(model)
    if is_control(run):
        return None
    if run.stage == "lm":
        return PLAIN_LMS.get(run.llm, "Bert-Large" if "bert-large" in run.llm.lower() else None)
    if run.stage == "distill":
        return "w/o LSR"
    return variant(run)


def is_control(run: Run) -> bool:
    """True for an LM with random weights, one that was trained whole, or one that our own flags
    taught: no method of DELRec's."""
    whole = getattr(run, "adapt", None) == "all"
    ours = any(getattr(run, key, None) for key in OURS)
    return seed_and_name(run.llm)[0] is not None or whole or ours


def variant(run: Run) -> str | None:
    """What DELRec's tables call a fine-tuned run: DELRec, one of its variants, or another method
    that fine-tunes.
    """
    # the maps of stage 1 without its soft prompt
    maps_alone = run.soft_prompt in ("none", "random") and getattr(run, "maps", None)
    if run.teacher or run.layers or maps_alone:
        return None
    if getattr(run, "from_run", None):
        return None
    name = unseeded(run.folder.name)
    if name in OTHER_METHODS:
        return OTHER_METHODS[name]
    if name.startswith(CONTROLS):
        return None
    if run.soft_prompt in WITHOUT_STAGE_1:
        return WITHOUT_STAGE_1[run.soft_prompt]
    if getattr(run, "lr_prompt", 0):
        return "w ULSR"
    distilled = stage_1(run)
    if distilled.get("augment"):
        return None
    if distilled.get("tasks") in OF_ONE_TASK:
        return OF_ONE_TASK[distilled["tasks"]]
    return "w UDPSM" if distilled.get("lr_lm") else f"DELRec ({run.settings['backbone']})"


# ---------------------------------------------------------------- Figure 8


def sweeps_of(runs: dict[str, Run], value: RowMetrics, low_high: Intervals) -> dict:
    """Points of Figure 8: runs that differ in their soft prompts' k or h only, and in their seeds,
    {"k": {"80": {hr@1, low, high}}}; only where there are three points or more.

    runs: {row: run}; value: {row: metrics per sample}; low_high: {row: {metric: interval}}.
    """
    made = {name: flags_of(run) for name, run in runs.items() if run.stage == "finetune"}
    made = {name: flags for name, flags in made.items() if {"k", "h"} <= set(flags)}
    sweeps = {}
    for swept in ("k", "h"):
        levels = {
            name: tuple((flag, x) for flag, x in flags.items() if flag != swept)
            for name, flags in made.items()
        }
        # the others stay at their usual values; among equals the first row's
        known = list(levels.values())
        usual = max(dict.fromkeys(known), key=known.count, default=None)
        points = {}
        for name, level in levels.items():
            if level == usual:
                points.setdefault(made[name][swept], []).append(name)
        if len(points) > 2:
            sweeps[swept] = {
                level: point_of(names, value, low_high) for level, names in points.items()
            }
    return sweeps


def point_of(names: list[str], value: RowMetrics, low_high: Intervals) -> dict:
    """{hr@1, low, high}: means over some rows."""
    low, high = ends_of(np.mean([low_high[name]["hr@1"] for name in names], 0))
    mean = np.mean([value[name]["hr@1"].mean() for name in names])
    return {"hr@1": float(mean), "low": low, "high": high}


def flags_of(run: Run) -> dict[str, str]:
    """{flag: value} of both stages of a fine-tuned run, stage 1's by their names and stage 2's as
    "tuned <name>", in the order of the names; without what is no choice (NO_CHOICE).
    """
    # older ones do not say how items are shown
    flags = {"input": "titles", **chosen(stage_1(run))} if stage_1(run) else {}
    own = chosen(vars(run))
    # stage 1's flags say what its soft prompt and its maps are; k is of an untrained one
    places = ["soft_prompt"] + ["maps"] * (getattr(run, "maps", None) == run.soft_prompt)
    own = {flag: x for flag, x in own.items() if flag not in {"k", *places}}
    return dict(sorted((flags | {f"tuned {flag}": x for flag, x in own.items()}).items()))


def chosen(config: dict) -> dict[str, str]:
    """{flag: its value as text} that a run was given, which its configuration says in front of its
    data's folder; what is off is left out, and runs and LMs are named without their seeds.
    """
    keys = list(config)
    keys = keys[: keys.index("data_folder")] if "data_folder" in config else keys
    values = {key: config[key] for key in keys if key not in NO_CHOICE}
    return {key: text_of(key, x) for key, x in values.items() if x}  # earlier ones lack some flags


def text_of(key: str, value: Any) -> str:
    """A flag's value as text; of runs and LMs the name without its seed."""
    several = [str(x) for x in (value if isinstance(value, list) else [value])]
    if key in LMS:
        named = [seed_and_name(name) for name in several]
        several = [name if seed is None else f"random:{name}" for seed, name in named]
    if key in PLACES:
        several = ["/".join(map(unseeded, name.split("/"))) for name in several]
    return " ".join(several)
