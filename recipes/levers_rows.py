"""The plan of the levers: every row of the screen, how it differs from the first, what it is
compared with; and what is trained in full beside a combination of levers.
"""

import re
from dataclasses import dataclass, replace

from delrec.runtime import stop

SASREC, TITLES = "sasrec", "sasrec-titles"
BASE, MANY = "delrec", 8  # MANY: so many times stage 1's windows
MADE, SOFT = "--augment all", "--augment all --soft 1"
KD = "--kd {backbone} --kd {gru4rec} --kd co-occurrence"  # in braces: runs


@dataclass(frozen=True)
class Row:
    """A run of the plan, by how it differs from the first one."""

    minus: str  # the row that it is compared with: the same but for what its name says
    distill: str = ""  # more flags of stage 1
    finetune: str = ""  # of stage 2
    controls: tuple[str, ...] = ()  # rows that it must beat, too
    windows: int = 1  # of stage 1: so many times its budget
    backbone: str = SASREC
    random_lm: bool = False  # the same LM with random weights, in both stages
    random_prompt: bool = False  # its maps, with vectors that nothing trained as the soft prompt
    script: str = "finetune.py"  # or the one that makes a row without an LM


ROWS = {
    "sasrec": Row("", script="train_backbone.py"),
    "delrec": Row("sasrec", controls=("untrained-maps", "random-lm")),
    "untrained-maps": Row("delrec", random_prompt=True),
    "random-lm": Row("delrec", random_lm=True),
    # a: on top of the backbone's scores
    "residual": Row(
        "delrec",
        finetune="--residual backbone",
        controls=("sasrec", "residual-permuted", "residual-random-lm", "mlp"),
    ),
    "residual-permuted": Row("residual", finetune="--residual permuted"),
    "residual-random-lm": Row("residual", finetune="--residual backbone", random_lm=True),
    "mlp": Row("sasrec", script="recipes/mlp.py"),
    "residual-dropout": Row("residual", finetune="--residual backbone --residual-dropout .3"),
    "residual-counts": Row("residual", finetune="--residual backbone --residual-counts"),
    # titles in the item vectors that the LM reads
    "sasrec-titles": Row("sasrec", backbone=TITLES, script="train_backbone.py"),
    "titles": Row("delrec", backbone=TITLES, controls=("sasrec-titles",)),
    "titles-residual": Row(
        "titles", finetune="--residual backbone", backbone=TITLES, controls=("sasrec-titles",)
    ),
    # c: taught by several models
    "kd": Row("delrec", finetune=KD, controls=("kd-permuted", "kd-one")),
    "kd-permuted": Row("kd", finetune=f"{KD} --kd-permute"),
    "kd-one": Row("kd", finetune="--kd {backbone}"),
    # e: stage 1 on histories that nobody has, beside as many real windows
    "windows": Row("delrec", windows=MANY),
    "made": Row("windows", MADE, controls=("made-random", "made-untrained"), windows=MANY),
    "made-random": Row("made", "--augment random", windows=MANY),
    "made-untrained": Row("made", MADE, windows=MANY, random_prompt=True),
    "made-soft": Row("made", SOFT, controls=("made-soft-untrained",), windows=MANY),
    "made-soft-untrained": Row("made-soft", SOFT, windows=MANY, random_prompt=True),
    # f: stage 1's loss kept in stage 2
    "keep-rps": Row("delrec", finetune="--keep-rps .3", controls=("keep-rps-permuted",)),
    "keep-rps-permuted": Row("keep-rps", finetune="--keep-rps .3 --keep-rps-permuted"),
    # d: items that carry the user's state
    "user-states": Row("delrec", "--user-states backbone", controls=("user-states-permuted",)),
    "user-states-permuted": Row("user-states", "--user-states permuted"),
    # g: against learning by heart; the row without each is its control
    "ema": Row("delrec", finetune="--ema .999"),
    "drop-items": Row("delrec", finetune="--drop-items .1"),
    "r-drop": Row("delrec", finetune="--r-drop .5", controls=("two-passes",)),
    "two-passes": Row("r-drop", finetune="--r-drop 1e-9"),
}


# ---------------------------------------------------------------- which rows


def screened(levers: tuple[str, ...]) -> dict[str, Row]:
    """The rows that --levers names, with what each is compared with; all if it names none."""
    asked = [name.strip() for text in levers for name in text.split(",")] or list(ROWS)
    for name in asked:
        if name not in ROWS:
            stop(f"--levers names {name or 'nothing'}; the rows are {', '.join(ROWS)}")
        asked += [x for x in (ROWS[name].minus, *ROWS[name].controls) if x and x not in asked]
    return {name: row for name, row in ROWS.items() if name in asked}


def all_levers() -> list[str]:
    """The rows that may be carried: those that are no control of another."""
    controls = {name for row in ROWS.values() for name in row.controls}
    lms = [name for name, row in ROWS.items() if row.script == "finetune.py"]
    return [name for name in lms if name not in (*controls, BASE)]


def combined(text: str) -> tuple[str, Row]:
    """The name and the row of levers joined by +."""
    members, seen = text.split("+"), set()
    for name in members:
        if name not in all_levers():
            stop(f"--carry names {name or 'nothing'}; the levers are {', '.join(all_levers())}")
        words = f"{ROWS[name].distill} {ROWS[name].finetune}".split()
        flags = {word for word in words if word.startswith("--")}
        if twice := seen & flags:
            stop(f"--carry {text} has {sorted(twice)[0]} twice; join levers that share no flag")
        seen |= flags
    each = [ROWS[name] for name in members]
    row = Row(
        BASE,
        " ".join(filter(None, (one.distill for one in each))),
        " ".join(filter(None, (one.finetune for one in each))),
        windows=max(one.windows for one in each),
        backbone=TITLES if TITLES in [one.backbone for one in each] else SASREC,
    )
    return "-and-".join(members), row


def is_residual(row: Row) -> bool:
    """True if a row adds to its backbone's scores."""
    return "--residual" in row.finetune


def alone(row: Row) -> Row:
    """A row without what adds it to its backbone's scores."""
    kept = re.sub(r"--residual-counts|--(lr-)?residual\S* \S+", "", row.finetune)
    return replace(row, finetune=" ".join(kept.split()))


def alone_name(name: str, row: Row) -> str:
    """The name of a combination without what adds it to its backbone's scores."""
    rest = alone(row)
    is_base = not rest.distill and not rest.finetune and rest.windows == 1
    return BASE if is_base and rest.backbone == SASREC else f"{name}-alone"


def beside(name: str, row: Row) -> dict[str, Row]:
    """The controls that stand beside the first combination in full."""
    found = {f"{name}-random-lm": replace(row, random_lm=True)}
    if "--user-states" not in row.distill:  # whose map goes with the soft prompt
        found[f"{name}-untrained"] = replace(row, random_prompt=True)
    found[f"mlp-{row.backbone}"] = replace(row, script="recipes/mlp.py")
    return found | {alone_name(name, row): alone(row)}
