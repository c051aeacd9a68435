"""Bad input to every script: one clear sentence, an exit code that is not zero, nothing
half-written.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from test_prepare import BAD, write
from test_prepare import toy as toy_rows
from toys import popular, prepare_log, title_of, write_backbone

import distill
import evaluate
import finetune
import train_backbone
from delrec.data import prepare
from delrec.runtime import ROOT

MAINS = {
    "train": train_backbone.main,
    "distill": distill.main,
    "finetune": finetune.main,
    "evaluate": evaluate.main,
    "prepare": prepare.main,
}


def world(folder):
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
        backbone=write_backbone(folder / "sasrec", data, popular(data)),
        out=folder / "out",
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def edit(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def fewer_rows(path):
    np.save(path, np.load(path)[1:])


def TRAIN(w):
    return ["--dataset", w.data, "--epochs", 0, "--out", w.out]


def DISTILL(w):
    return ["--dataset", w.data, "--backbone", w.backbone, "--out", w.out]


def FINETUNE(w):
    return [
        "--dataset",
        w.data,
        "--backbone",
        w.backbone,
        "--soft-prompt",
        "none",
        "--out",
        w.out,
    ]


def EVALUATE(w):
    return ["--ckpt", w.backbone]


# what is wrong: (script, its arguments, what is done to the files first, what the sentence says)
OWN = {
    "unknown data set": ("train", lambda w: ["--dataset", "netflix"], None, "no prepared data set"),
    "a folder that is not prepared": (
        "train",
        lambda w: ["--dataset", w.data.parent / "raw"],
        None,
        "no prepared data set",
    ),
    "an array cut short": (
        "train",
        TRAIN,
        lambda w: cut(w.data / "items.npy"),
        "items.npy cannot be read as an array",
    ),
    "an array of Python objects": (
        "train",
        TRAIN,
        lambda w: np.save(w.data / "items.npy", np.array([{}], object), allow_pickle=True),
        "cannot be read as an array",
    ),
    "an array of another shape": (
        "train",
        TRAIN,
        lambda w: np.save(w.data / "val.npy", np.zeros((2, 2), np.int64)),
        "expected (any)",
    ),
    "no array": ("train", TRAIN, lambda w: (w.data / "ptr.npy").unlink(), "ptr.npy cannot be read"),
    "meta.json is not JSON": (
        "train",
        TRAIN,
        lambda w: cut(w.data / "meta.json"),
        "cannot be read as JSON",
    ),
    "meta.json lacks the hash": (
        "train",
        TRAIN,
        lambda w: (w.data / "meta.json").write_text("{}"),
        "is no prepared folder",
    ),
    "titles are missing": (
        "train",
        TRAIN,
        lambda w: (w.data / "titles.txt").unlink(),
        "is no prepared folder",
    ),
    "fewer titles than items": (
        "train",
        TRAIN,
        lambda w: (w.data / "titles.txt").write_text("a\nb\n"),
        "but only 2 titles",
    ),
    "item ids below 1": (
        "train",
        TRAIN,
        lambda w: np.save(w.data / "items.npy", np.load(w.data / "items.npy") * 0),
        "titles (ids begin at 1)",
    ),
    "users that do not fit": (
        "train",
        TRAIN,
        lambda w: np.save(w.data / "ptr.npy", np.load(w.data / "ptr.npy") + 1),
        "do not fit each other",
    ),
    "samples beyond the log": (
        "train",
        TRAIN,
        lambda w: np.save(w.data / "test.npy", np.load(w.data / "test.npy") + 10**6),
        "do not fit each other",
    ),
    "candidates of other samples": (
        "train",
        TRAIN,
        lambda w: fewer_rows(w.data / "candidates_val_15.npy"),
        "candidates_val_15.npy has shape",
    ),
    "a list longer than the catalogue": (
        "train",
        lambda w: [*TRAIN(w), "--top-h", 41],
        None,
        "more than the 40 items",
    ),
    "a flag that is no number": (
        "train",
        lambda w: [*TRAIN(w), "--lr", "abc"],
        None,
        "not a valid float",
    ),
    "a flag that does not exist": (
        "train",
        lambda w: [*TRAIN(w), "--learning-rate", 1],
        None,
        "No such option",
    ),
    "no backbone": (
        "distill",
        lambda w: ["--dataset", w.data, "--backbone", w.data.parent / "nothing"],
        None,
        "no backbone in",
    ),
    "a backbone that is not finished": (
        "distill",
        DISTILL,
        lambda w: (w.backbone / "config.json").unlink(),
        "no backbone in",
    ),
    "a config that is not JSON": (
        "distill",
        DISTILL,
        lambda w: cut(w.backbone / "config.json"),
        "cannot be read as JSON",
    ),
    "a config of something else": (
        "distill",
        DISTILL,
        lambda w: (w.backbone / "config.json").write_text("[1]"),
        "is no run of these scripts",
    ),
    "a run of another stage": (
        "distill",
        DISTILL,
        lambda w: edit(w.backbone / "config.json", stage="finetune"),
        "holds a finetune run",
    ),
    "a run of other data": (
        "distill",
        DISTILL,
        lambda w: edit(w.backbone / "config.json", data_hash="0"),
        "another preparation",
    ),
    "no lists": (
        "distill",
        DISTILL,
        lambda w: (w.backbone / "topk_train.npy").unlink(),
        "lacks topk_train.npy",
    ),
    "lists of other samples": (
        "distill",
        DISTILL,
        lambda w: fewer_rows(w.backbone / "topk_val.npy"),
        "topk_val.npy has shape",
    ),
    "lists cut short": (
        "distill",
        DISTILL,
        lambda w: cut(w.backbone / "topk_train.npy"),
        "cannot be read as an array",
    ),
    "lists shorter than h": ("distill", lambda w: [*DISTILL(w), "--h", 13], None, "--h is 13"),
    "an example that is too short": (
        "distill",
        lambda w: [*DISTILL(w), "--a", 2],
        None,
        "--a 2 must be at least 3",
    ),
    "an example that does not fit": (
        "distill",
        lambda w: [*DISTILL(w), "--a", 9],
        None,
        "at most --history 10 minus 2",
    ),
    "too many candidates": (
        "distill",
        lambda w: [*DISTILL(w), "--candidates", 39],
        None,
        "the catalogue has 40",
    ),
    "an unknown LM": (
        "distill",
        lambda w: [*DISTILL(w), "--llm", "/nowhere/llm"],
        None,
        "no language model",
    ),
    "an LM folder of rubbish": (
        "distill",
        lambda w: [*DISTILL(w), "--llm", w.data],
        None,
        "no language model",
    ),
    "micro-batches of nothing": (
        "distill",
        lambda w: [*DISTILL(w), "--micro", 0],
        None,
        "0 is not in the range",
    ),
    "no soft prompt": (
        "finetune",
        lambda w: ["--dataset", w.data, "--soft-prompt", w.data.parent / "nothing"],
        None,
        "no soft prompt in",
    ),
    "a soft prompt that is a backbone": (
        "finetune",
        lambda w: ["--dataset", w.data, "--soft-prompt", w.backbone],
        None,
        "holds a train_backbone run",
    ),
    "nothing to reallocate": (
        "finetune",
        lambda w: [*FINETUNE(w), "--init-r", 4, "--target-r", 4],
        None,
        "--target-r 4 must be below",
    ),
    "a teacher that is not there": (
        "finetune",
        lambda w: [*FINETUNE(w), "--teacher", w.data.parent / "nothing"],
        None,
        "is no run folder",
    ),
    "a teacher that is a backbone": (
        "finetune",
        lambda w: [*FINETUNE(w), "--teacher", w.backbone],
        None,
        "holds a train_backbone run",
    ),
    "a comparison with nobody": (
        "finetune",
        lambda w: [*FINETUNE(w), "--lambda-norm", 1],
        None,
        "no --teacher",
    ),
    "an input that does not exist": (
        "finetune",
        lambda w: [*FINETUNE(w), "--input", "words"],
        None,
        "is not one of",
    ),
    "a loss on titles between vectors": (
        "finetune",
        lambda w: [*FINETUNE(w), "--input", "hybrid", "--loss", "titles"],
        None,
        "need --loss candidates",
    ),
    "a teacher that exported nothing": (
        "train",
        lambda w: [*TRAIN(w), "--teacher", w.backbone],
        None,
        "holds no export",
    ),
    "an export that was cut off": (
        "train",
        lambda w: [*TRAIN(w), "--teacher", w.backbone],
        lambda w: (w.backbone / "export.unfinished").mkdir(),
        "holds no complete export",
    ),
    "titles' vectors only, but none": (
        "train",
        lambda w: [*TRAIN(w), "--no-offset"],
        None,
        "needs --teacher",
    ),
    "an export of a backbone": (
        "evaluate",
        lambda w: [*EVALUATE(w), "--export"],
        None,
        "is a backbone",
    ),
    "a history without a known title": (
        "evaluate",
        lambda w: [*EVALUATE(w), "--history", "qqqq zzzz"],
        None,
        "no known title",
    ),
    "a file of histories that is not there": (
        "evaluate",
        lambda w: [*EVALUATE(w), "--serve", w.data / "none.jsonl"],
        None,
        "cannot be read",
    ),
    "a file of histories that is none": (
        "evaluate",
        lambda w: [*EVALUATE(w), "--serve", w.data / "titles.txt"],
        None,
        "line 1",
    ),
    "histories for two runs": (
        "evaluate",
        lambda w: [*EVALUATE(w), w.backbone, "--history", "x"],
        None,
        "2 were given",
    ),
    "no run to evaluate": (
        "evaluate",
        lambda w: ["--ckpt", w.data.parent / "nothing"],
        None,
        "is no run folder",
    ),
    "an unfinished run": (
        "evaluate",
        EVALUATE,
        lambda w: (w.backbone / "config.json").unlink(),
        "unfinished run",
    ),
    "scores of other samples": (
        "evaluate",
        EVALUATE,
        lambda w: fewer_rows(w.backbone / "scores_test_15.npy"),
        "scores_test_15.npy has shape",
    ),
    "scores cut short": (
        "evaluate",
        EVALUATE,
        lambda w: cut(w.backbone / "scores_test_15.npy"),
        "cannot be read as an array",
    ),
    "candidates nobody stored": (
        "evaluate",
        lambda w: [*EVALUATE(w), "--candidates", 16],
        None,
        "holds no 16 candidates",
    ),
    "a raw folder that is not there": (
        "prepare",
        lambda w: ["x", "--raw", w.data.parent / "nothing", "--out", w.out],
        None,
        "holds no interactions.csv",
    ),
    "a name that leaves its folder": (
        "prepare",
        lambda w: ["../x", "--raw", w.data.parent / "raw"],
        None,
        "cannot name a folder",
    ),
    "one user only": (
        "prepare",
        lambda w: [
            "x",
            "--raw",
            write(w.data.parent / "one", [(1, i, i) for i in range(1, 30)]),
            "--out",
            w.out,
            "--core",
            1,
        ],
        None,
        "15 candidates need",
    ),
}
BAD_INPUTS = [*OWN, *(f"prepare: {case}" for case in BAD)]


def clear(case, folder):
    """True if this input is refused with one sentence that says what it should, an exit code, and
    nothing left behind.
    """
    if case in OWN:
        script, args, change, says = OWN[case]
        w = world(folder)
        if change:
            change(w)
        args, out = args(w), w.out
    else:
        change, more, says = BAD[case.removeprefix("prepare: ")]
        raw = write(folder / "raw", toy_rows())
        change(raw)
        script, out = "prepare", folder / "out"
        args = [
            "toy",
            "--raw",
            raw,
            "--out",
            out,
            *([] if "--core" in more else ["--core", 1]),
            *more,
        ]
    result = CliRunner().invoke(MAINS[script], [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    text = result.output[result.output.find("Error: ") :].strip()
    assert result.exit_code in (1, 2) and says in text and "\n" not in text, result.output
    assert (
        not (out / "config.json").exists()
        and not (out / "meta.json").exists()
        and not list(folder.glob("*.tmp"))
    )
    return True


@pytest.mark.parametrize("case", OWN)
def test_bad_input_is_one_sentence(case, tmp_path):
    assert clear(case, tmp_path)


def test_there_are_many_of_them():
    assert len(BAD_INPUTS) >= 60 and ROOT.exists()
