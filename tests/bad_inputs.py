"""Bad input to every script, and what the sentence says that refuses it."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from click.testing import CliRunner
from logs import BAD as BAD_LOGS
from logs import toy as toy_rows
from logs import write
from toys import popular, prepare_log, title_of, write_backbone

import distill
import evaluate
import finetune
import train_backbone
from delrec.data import prepare

MAINS = {
    "train": train_backbone.main,
    "distill": distill.main,
    "finetune": finetune.main,
    "evaluate": evaluate.main,
    "prepare": prepare.main,
}


@dataclass
class Bad:
    """One bad input."""

    script: str
    args: str  # {data}, {raw}, {backbone}, {none}, {out} are folders of its world
    says: str  # part of the sentence
    change: Callable = None  # what is done to the world first


def world(folder: Path) -> SimpleNamespace:
    """A prepared log of 30 users and 40 items, and a backbone's run folder."""
    rng = np.random.default_rng(0)
    rows = [
        (u, int(i), 100 * n + u)
        for u in range(30)
        for n, i in enumerate(rng.permutation(40)[:14] + 1)
    ]
    data = prepare_log(folder, rows, {i: title_of(i) for i in range(1, 41)})
    return SimpleNamespace(
        data=data.folder,
        raw=folder / "raw",
        backbone=write_backbone(folder / "sasrec", data, popular(data)),
        none=folder / "nothing",
        out=folder / "out",
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def fewer_rows(path):
    np.save(path, np.load(path)[1:])


TRAIN = "--dataset {data} --epochs 0 --out {out}"
DISTILL = "--dataset {data} --backbone {backbone} --out {out}"
FINETUNE = "--dataset {data} --backbone {backbone} --soft-prompt none --out {out}"
EVALUATE = "--ckpt {backbone}"


def objects(w):
    np.save(w.data / "items.npy", np.array([{}], object), allow_pickle=True)


def two_columns(w):
    np.save(w.data / "val.npy", np.zeros((2, 2), np.int64))


def ids_of_0(w):
    np.save(w.data / "items.npy", np.load(w.data / "items.npy") * 0)


def users_moved(w):
    np.save(w.data / "ptr.npy", np.load(w.data / "ptr.npy") + 1)


def samples_moved(w):
    np.save(w.data / "test.npy", np.load(w.data / "test.npy") + 10**6)


def one_user(w):
    write(w.raw.parent / "one", [(1, i, i) for i in range(1, 30)])


UNREADABLE = "cannot be read as an array"
NOT_PREPARED = "no prepared data set"
DATA = {
    "unknown data set": Bad("train", "--dataset netflix", NOT_PREPARED),
    "a folder that is not prepared": Bad("train", "--dataset {raw}", NOT_PREPARED),
    "an array cut short": Bad(
        "train", TRAIN, f"items.npy {UNREADABLE}", lambda w: cut(w.data / "items.npy")
    ),
    "an array of Python objects": Bad("train", TRAIN, UNREADABLE, objects),
    "an array of another shape": Bad("train", TRAIN, "expected (any)", two_columns),
    "no array": Bad(
        "train", TRAIN, "ptr.npy cannot be read", lambda w: (w.data / "ptr.npy").unlink()
    ),
    "meta.json is not JSON": Bad(
        "train", TRAIN, "cannot be read as JSON", lambda w: cut(w.data / "meta.json")
    ),
    "meta.json lacks the hash": Bad(
        "train", TRAIN, "is no prepared folder", lambda w: (w.data / "meta.json").write_text("{}")
    ),
    "titles are missing": Bad(
        "train", TRAIN, "is no prepared folder", lambda w: (w.data / "titles.txt").unlink()
    ),
    "fewer titles than items": Bad(
        "train",
        TRAIN,
        "but only 2 titles",
        lambda w: (w.data / "titles.txt").write_text("a\nb\n"),
    ),
    "item ids below 1": Bad("train", TRAIN, "titles (ids begin at 1)", ids_of_0),
    "users that do not fit": Bad("train", TRAIN, "do not fit each other", users_moved),
    "samples beyond the log": Bad("train", TRAIN, "do not fit each other", samples_moved),
    "candidates of other samples": Bad(
        "train",
        TRAIN,
        "candidates_val_15.npy has shape",
        lambda w: fewer_rows(w.data / "candidates_val_15.npy"),
    ),
    "a raw folder that is not there": Bad(
        "prepare", "x --raw {none} --out {out}", "there is no folder"
    ),
    "a name that leaves its folder": Bad("prepare", "../x --raw {raw}", "cannot name a folder"),
    "one user only": Bad(
        "prepare", "x --raw {raw}/../one --out {out} --core 1", "15 candidates need", one_user
    ),
}
RUNS = {
    "no backbone": Bad("distill", "--dataset {data} --backbone {none}", "no backbone in"),
    "a backbone that is not finished": Bad(
        "distill", DISTILL, "no backbone in", lambda w: (w.backbone / "config.json").unlink()
    ),
    "a config that is not JSON": Bad(
        "distill", DISTILL, "cannot be read as JSON", lambda w: cut(w.backbone / "config.json")
    ),
    "a config of something else": Bad(
        "distill",
        DISTILL,
        "is no run of these scripts",
        lambda w: (w.backbone / "config.json").write_text("[1]"),
    ),
    "a run of another stage": Bad(
        "distill",
        DISTILL,
        "holds a finetune run",
        lambda w: edit(w.backbone / "config.json", stage="finetune"),
    ),
    "a run of other data": Bad(
        "distill",
        DISTILL,
        "another preparation",
        lambda w: edit(w.backbone / "config.json", data_hash="0"),
    ),
    "no lists": Bad(
        "distill",
        DISTILL,
        "lacks topk_train.npy",
        lambda w: (w.backbone / "topk_train.npy").unlink(),
    ),
    "lists of other samples": Bad(
        "distill",
        DISTILL,
        "topk_val.npy has shape",
        lambda w: fewer_rows(w.backbone / "topk_val.npy"),
    ),
    "lists cut short": Bad(
        "distill", DISTILL, UNREADABLE, lambda w: cut(w.backbone / "topk_train.npy")
    ),
    "no soft prompt": Bad("finetune", "--dataset {data} --soft-prompt {none}", "no soft prompt in"),
    "a soft prompt that is a backbone": Bad(
        "finetune", "--dataset {data} --soft-prompt {backbone}", "holds a train_backbone run"
    ),
    "a teacher that is not there": Bad(
        "finetune", f"{FINETUNE} --teacher {{none}}", "is no run folder"
    ),
    "a teacher that is a backbone": Bad(
        "finetune", f"{FINETUNE} --teacher {{backbone}}", "holds a train_backbone run"
    ),
    "a teacher that exported nothing": Bad(
        "train", f"{TRAIN} --teacher {{backbone}}", "holds no export"
    ),
    "an export that was cut off": Bad(
        "train",
        f"{TRAIN} --teacher {{backbone}}",
        "holds no complete export",
        lambda w: (w.backbone / "export.unfinished").mkdir(),
    ),
    "no run to evaluate": Bad("evaluate", "--ckpt {none}", "is no run folder"),
    "an unfinished run": Bad(
        "evaluate", EVALUATE, "unfinished run", lambda w: (w.backbone / "config.json").unlink()
    ),
    "scores of other samples": Bad(
        "evaluate",
        EVALUATE,
        "scores_test_15.npy has shape",
        lambda w: fewer_rows(w.backbone / "scores_test_15.npy"),
    ),
    "scores cut short": Bad(
        "evaluate", EVALUATE, UNREADABLE, lambda w: cut(w.backbone / "scores_test_15.npy")
    ),
}
OPTIONS = {
    "a list longer than the catalogue": Bad(
        "train", f"{TRAIN} --top-h 41", "more than the 40 items"
    ),
    "a flag that is no number": Bad("train", f"{TRAIN} --lr abc", "not a valid float"),
    "a flag that does not exist": Bad("train", f"{TRAIN} --learning-rate 1", "No such option"),
    "titles' vectors only, but none": Bad("train", f"{TRAIN} --no-offset", "needs --teacher"),
    "lists shorter than h": Bad("distill", f"{DISTILL} --h 13", "--h is 13"),
    "an example that is too short": Bad("distill", f"{DISTILL} --a 2", "--a 2 must be at least 3"),
    "an example that does not fit": Bad(
        "distill", f"{DISTILL} --a 9", "at most --history 10 minus 2"
    ),
    "too many candidates": Bad("distill", f"{DISTILL} --candidates 39", "the catalogue has 40"),
    "an unknown LM": Bad("distill", f"{DISTILL} --llm /nowhere/llm", "no language model"),
    "an LM folder of rubbish": Bad("distill", f"{DISTILL} --llm {{data}}", "no language model"),
    "micro-batches of nothing": Bad("distill", f"{DISTILL} --micro 0", "0 is not in the range"),
    "nothing to reallocate": Bad(
        "finetune", f"{FINETUNE} --init-r 4 --target-r 4", "--target-r 4 must be below"
    ),
    "a comparison with nobody": Bad("finetune", f"{FINETUNE} --lambda-norm 1", "no --teacher"),
    "an input that does not exist": Bad("finetune", f"{FINETUNE} --input words", "is not one of"),
    "a loss on titles between vectors": Bad(
        "finetune", f"{FINETUNE} --input hybrid --loss titles", "need --loss candidates"
    ),
    "an export of a backbone": Bad("evaluate", f"{EVALUATE} --export", "is a backbone"),
    "a history without a known title": Bad(
        "evaluate", f"{EVALUATE} --history 'qqqq zzzz'", "no known title"
    ),
    "a file of histories that is not there": Bad(
        "evaluate", f"{EVALUATE} --serve {{data}}/none.jsonl", "cannot be read"
    ),
    "a file of histories that is none": Bad(
        "evaluate", f"{EVALUATE} --serve {{data}}/titles.txt", "line 1"
    ),
    "histories for two runs": Bad(
        "evaluate", f"{EVALUATE} {{backbone}} --history x", "2 were given"
    ),
    "candidates nobody stored": Bad(
        "evaluate", f"{EVALUATE} --candidates 16", "holds no 16 candidates"
    ),
}
OWN = DATA | RUNS | OPTIONS
BAD_INPUTS = [*OWN, *(f"prepare: {case}" for case in BAD_LOGS)]


def clear(case: str, folder: Path) -> bool:
    """True if this input is refused with one sentence that says what it should, an exit code, and
    nothing left behind.
    """
    if case in OWN:
        bad, places = OWN[case], world(folder)
        if bad.change:
            bad.change(places)
        script, says, out = bad.script, bad.says, places.out
        args = [arg.format(**vars(places)) for arg in shlex.split(bad.args)]
    else:
        change, more, says = BAD_LOGS[case.removeprefix("prepare: ")]
        raw, out = write(folder / "raw", toy_rows()), folder / "out"
        change(raw)
        script, args = "prepare", ["toy", "--raw", raw, "--out", out, *more]
        if "--core" not in more:
            args += ["--core", 1]
    result = CliRunner().invoke(MAINS[script], [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = result.output[result.output.find("Error: ") :].strip()
    assert result.exit_code in (1, 2), result.output
    assert says in text and "\n" not in text, result.output
    assert not (out / "config.json").exists() and not (out / "meta.json").exists()
    assert not list(folder.glob("*.tmp"))
    return True
