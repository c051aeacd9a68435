"""The commands of a card: every run that a run was made of, in order, with the exports between."""

import numpy as np
import pytest

from delrec.runtime import load_run, read_json, write_json
from delrec.serving.commands import commands


@pytest.fixture
def made(toy, tmp_path):
    """made(name, stage, **config) -> the folder of a finished run of the toy data."""

    def make(name, stage="train_backbone", **config):
        folder = tmp_path / "runs" / "toy" / name
        folder.mkdir(parents=True)
        if stage == "train_backbone":
            config = {"model": "sasrec", **config}
        where = {"data_folder": str(toy.folder), "data_hash": toy.meta["hash"], "n_items": 60}
        write_json(folder / "config.json", {"stage": stage, **config, "dataset": "toy", **where})
        return folder

    return make


@pytest.fixture
def lm(made):
    """The folder of an LM that learnt from a backbone."""
    return tune(made, "lm1", made("sasrec"))


def tune(made, name, backbone, **flags):
    """The folder of an LM of finetune.py."""
    place = str(backbone)
    return made(name, "finetune", llm="some/lm", backbone=place, backbone_run=place, **flags)


def commands_of(folder, toy):
    """(script, its folder or its --ckpt, is it an export?) of each command but the first."""
    lines = [line.replace("\\\n", " ").split() for line in commands(load_run(folder), toy)]
    assert lines[0][1] == "data/prepare.py"
    flag = {line[1]: "--ckpt" if line[1] == "evaluate.py" else "--out" for line in lines}
    return [(x[1], x[x.index(flag[x[1]]) + 1], "--export" in x) for x in lines[1:]]


TO_THE_LM = [("train_backbone.py", "toy/sasrec", False), ("finetune.py", "toy/lm1", False)]
AND_THE_STUDENT = [("train_backbone.py", "toy/young", False), ("evaluate.py", "toy/young", False)]


@pytest.mark.parametrize(
    "flags", [{"teacher": "{}"}, {"text": "{}"}, {"text": "tfidf+{}"}, {"text": "{}+tfidf"}]
)
def test_what_a_backbone_read_of_an_lm_is_made_before_it(flags, made, lm, toy):
    young = made("young", **{flag: value.format(lm) for flag, value in flags.items()})
    export = ("evaluate.py", "toy/lm1", True)
    assert commands_of(young, toy) == [*TO_THE_LM, export, *AND_THE_STUDENT]


def test_a_plus_in_a_run_s_name_joins_nothing(made, toy):
    plus = tune(made, "lm+1", made("sasrec"))
    young = made("young", text=f"tfidf+{plus}")
    export = ("evaluate.py", "toy/lm+1", True)
    lm = ("finetune.py", "toy/lm+1", False)
    assert commands_of(young, toy) == [TO_THE_LM[0], lm, export, *AND_THE_STUDENT]
    assert any("--text tfidf+toy/lm+1" in line for line in commands(load_run(young), toy))


def test_an_lm_that_teaches_an_lm_needs_no_export(made, lm, toy):
    small = tune(made, "small", lm.parent / "sasrec", teacher=str(lm))
    found = commands_of(small, toy)
    assert found[:2] == TO_THE_LM and not any(is_export for *_, is_export in found)


def test_the_runs_that_answered_in_an_export_are_made_before_it(made, lm, toy):
    half = tune(made, "half", lm.parent / "sasrec", without_fold=[0])
    (lm / "export").mkdir()
    write_json(lm / "export" / "meta.json", {"out_of_fold": {"runs/toy/half": {}}})
    young = made("young", text=f"tfidf+{lm}")
    said = commands(load_run(young), toy)
    assert "python evaluate.py --ckpt toy/lm1 --export --folds toy/half" in said
    places = [place for _, place, _ in commands_of(young, toy)]
    assert half.is_dir() and places.index("toy/half") < places.index("toy/lm1")


@pytest.mark.parametrize("log", ["the log of now", "an earlier log"])
@pytest.mark.parametrize("samples, says", [(90, ""), (89, " --limit 89")])
def test_an_export_s_command_writes_the_same_lists(samples, says, log, made, lm, toy):
    (lm / "export").mkdir()
    write_json(lm / "export" / "meta.json", {"K": 20, "samples": samples})
    np.save(lm / "export" / "topk.npy", np.ones((90, 20), np.int32))
    young = made("young", teacher=str(lm))
    if log == "an earlier log":
        for folder in (lm.parent / "sasrec", lm, young):
            write_json(
                folder / "config.json", read_json(folder / "config.json") | {"data_hash": log}
            )
        young = made("grown", from_run=str(young))
    said = commands(load_run(young), toy)
    export = said.index(f"python evaluate.py --ckpt toy/lm1 --export --export-k 20{says}")
    heading = f"# on an earlier log, whose preparation has the hash {log}:"
    assert said[0] == heading if log == "an earlier log" else heading not in said
    assert export < next(n for n, line in enumerate(said) if "--out toy/young" in line)


def test_a_part_of_the_text_that_is_gone_is_said_by_its_own_name(made, lm, toy):
    young = made("young", text=f"tfidf+{lm.parent}/gone")
    assert "# toy/gone is not here any more" in commands(load_run(young), toy)
