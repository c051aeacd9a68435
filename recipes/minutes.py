"""How long each row of make table2 takes, reckoned from its commands and from rates.

The rates are of two cores without a GPU, ml-100k and the embedded LM (docs/results/speed.md,
docs/commands.md); those marked so were reckoned from seconds of one core. Another machine has
others, so this says whether it is minutes or days.
"""

import shlex
from pathlib import Path

import torch

from delrec.lm.pretrained import EMBEDDED
from recipes.runs import Plan
from recipes.stage import flags_typed

# minutes of a training without folds; BERT4Rec's, LRURec's and KDA's reckoned
TRAINED = {"sasrec": 2, "gru4rec": 1.5, "caser": 1.5, "lrurec": 3, "bert4rec": 3, "seqsim": 0.3}
KDA_EPOCH, KDA_RANKED, KDA_EPOCHS = 1.7, 4.5, 25  # ranks every item after every sample
FOLD = 0.45  # of a training, with its answers; on one core .55
# samples a second
TITLES, TITLES_SCORED = 0.88, 2.45  # `likelihood`
LISTED, LISTED_SCORED, BEHIND_LIST = 0.6, 3.4, 1.75  # 400 tokens, candidates among them
WINDOWS, WINDOWS_OF_STAGE_1, VECTORS_SCORED = 10.0, 2.1, 12.0
SUMMARIES = 3.5  # reckoned (2.1 on one core); blocks of 5 items
BLOCK = 5
NEUTRAL = 90  # samples that the titles of the catalogue cost, with a calibration
TEST = 9853  # samples, where all are asked
INSIDE = 0.25  # of them have the truth in a backbone's list
FREE = 2.0  # free answers a second, reckoned
BEGUN = 0.3  # minutes until a command is at work
TABLE = 2  # minutes of the tests of a table


def say(plan: Plan) -> None:
    """Prints what each command takes; nothing where the rates are of something else."""
    known = (plan.dataset, plan.llm, plan.procs) == ("ml-100k", EMBEDDED, 1)
    if not known or torch.cuda.is_available():
        return
    tested = plan.test_samples or TEST
    found = [(said_of(w), minutes_of(w, tested)) for w in map(shlex.split, plan.printed)]
    print("\n# minutes on two cores without a GPU, one after the other, by recipes/minutes.py:")
    for name, minutes in found:
        print(f"# {name:<44}{minutes:>7.1f}")
    total = sum(minutes for _, minutes in found)
    print(f"# {'all':<44}{total:>7.1f}, {total / 60:.1f} hours; finished runs cost nothing\n")


def said_of(words: list[str]) -> str:
    """A command by its script and its run or table."""
    flags = flags_typed(words[1:])
    name = Path(flags.get("--out", flags.get("--ckpt"))[0]).name
    return f"{words[1]} {name}" + (" --free" if "--free" in flags else "")


def minutes_of(words: list[str], tested: int) -> float:
    """What a command takes, which is given as its words; what a table scores of a run counts to the
    run. tested: the table's samples."""
    flags = flags_typed(words[1:])
    if words[1] == "train_backbone.py":
        return BEGUN + trained(flags)
    if words[1] == "evaluate.py":
        return BEGUN + of_table(flags, tested)
    reads = flags.get("--input", ["titles"])[-1]
    rate, scored = rates_of(reads, flags)
    asked = number(flags, "--val-samples") * number(flags, "--evals", 1)
    if words[1] == "finetune.py":  # fused and tested, which a distilled prompt is not
        asked += number(flags, "--val-samples") + tested
    elif reads == "ids":
        rate = WINDOWS_OF_STAGE_1
    asked *= number(flags, "--orders", 1)
    asked += NEUTRAL if reads != "ids" and "--calibrate" not in flags else 0
    seconds = number(flags, "--samples") / rate + asked / scored
    return BEGUN + seconds / 60 + summarised(flags, tested)


def number(flags: dict[str, list], flag: str, default: float = 0) -> float:
    """The value of a flag."""
    return float(flags.get(flag, [default])[-1])


def rates_of(reads: str, flags: dict[str, list]) -> tuple[float, float]:
    """(samples a second in training, in scoring) of an LM."""
    if reads == "ids":
        return WINDOWS, VECTORS_SCORED
    if flags.get("--verbalizer") == ["letter"]:
        return LISTED, LISTED_SCORED
    # a title's likelihood may be read behind the list
    return (LISTED, BEHIND_LIST) if "--show" in flags else (TITLES, TITLES_SCORED)


def trained(flags: dict[str, list]) -> float:
    """The minutes of a conventional model."""
    model = flags.get("--model", ["sasrec"])[-1]
    if model == "kda":
        return KDA_EPOCH * number(flags, "--epochs", KDA_EPOCHS) + KDA_RANKED
    return TRAINED[model] * (1 + FOLD * number(flags, "--folds"))


def summarised(flags: dict[str, list], tested: int) -> float:
    """The minutes in which an LM writes the summaries of a run."""
    if "recurrent" not in flags.get("--summary", [""])[-1]:
        return 0
    histories = number(flags, "--samples") + 2 * number(flags, "--val-samples") + tested
    return histories * -(-number(flags, "--history", 25) // BLOCK) / SUMMARIES / 60


def of_table(flags: dict[str, list], tested: int) -> float:
    """The minutes of a table beside what it scores of its runs: the plain LM, lists of a backbone,
    free answers."""
    val = number(flags, "--val-samples")
    if "--free" in flags:
        return val / FREE / 60
    seconds = (2 * val + tested + NEUTRAL) / TITLES_SCORED if "--llm" in flags else 0
    seconds += INSIDE * tested / LISTED_SCORED if "--two-stage" in flags else 0
    seconds += tested / TITLES_SCORED if "--shuffle-history" in flags else 0
    return TABLE + seconds / 60
