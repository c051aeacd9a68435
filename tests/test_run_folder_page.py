"""docs/run_folder.md: its re-ranker runs as the page has it, and the table shows it."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from commands import edit_config, metrics_of
from scripts import ROOT, sentence

import evaluate
from delrec import Recommender, runtime
from delrec.data.prepared import candidates
from delrec.lm.soft_prompt import prompt_run_of
from delrec.runtime import write_json

PAGE = (ROOT / "docs" / "run_folder.md").read_text(encoding="utf-8")
[SECTION] = re.findall(r"## Your own re-ranker\n(.*?)\n## ", PAGE, re.S)


@pytest.fixture
def made(toy, sasrec, tmp_path, monkeypatch):
    """What the Python of the section leaves: its names. Its data and its SASRec are small."""
    data = shutil.copytree(toy.folder, tmp_path / "data" / "ml-100k")
    write_json(data / "meta.json", toy.meta | {"name": "ml-100k"})
    shutil.copytree(sasrec, tmp_path / "runs" / "ml-100k" / "sasrec")
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", SECTION, re.S):
        exec(compile(example, "docs/run_folder.md", "exec"), names)
    return names


def test_the_re_ranker_of_the_page_is_a_row(made, script, on_cpu):
    [command] = re.findall(r"python evaluate.py (.*)", SECTION)
    script(evaluate.main, *command.split(), "--out", "out")
    table = metrics_of(made["mine"].parents[2] / "out")
    assert table["rows"]["mine"]["note"] == "SASRec + words of the last title"
    assert list(table["planned"]) == ["mine - sasrec"] and table["reference"] == "sasrec"
    assert "SASRec + words" in (made["mine"].parents[2] / "out" / "table.txt").read_text()
    # the model says of the last split's histories what it stored
    cand_nC = candidates(made["data"], "test", 15)
    stored_nC = np.load(made["mine"].parent / "sasrec" / "scores_test_15.npy")
    score_nC = np.take_along_axis(made["score_BI"], cand_nC, 1)
    np.testing.assert_allclose(score_nC, stored_nC[: len(score_nC)], atol=1e-4)


@pytest.mark.parametrize(
    "note, shown", [("", "somebody else's"), ("two\nlines  of it", "two lines of it")]
)
def test_the_note_is_one_line_whatever_stands_in_it(made, script, on_cpu, note, shown):
    edit_config(made["mine"], note=note)
    script(evaluate.main, "--ckpt", "ml-100k/mine", "--out", "out")
    assert metrics_of(made["mine"].parents[2] / "out")["rows"]["mine"]["note"] == shown


def test_a_model_of_ones_own_that_calls_itself_an_lm_is_told_its_stage(made, refused):
    edit_config(made["mine"], stage="finetune")
    says = "config.json says stage 'finetune', but lacks llm and settings of a run of these scripts"
    for flags in ("", " --history-json []"):
        refusal = refused(evaluate.main, f"--ckpt ml-100k/mine{flags}")
        assert says in refusal and "has the stage 'train_backbone'" in refusal
    with pytest.raises(ValueError, match=says):
        Recommender.load("ml-100k/mine")
    prompt = SimpleNamespace(soft_prompt="ml-100k/mine")
    assert says in sentence(prompt_run_of, prompt, made["data"])
