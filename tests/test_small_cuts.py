"""What a run cannot rank is said, not cut silently; an empty history is answered one way; what a
library says to its developers is not printed above an answer.
"""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from recommenders import RULE, by_number, recommender_of
from scripts import sentence
from toys import popular, write_backbone
from transformers import AutoConfig
from transformers.utils import logging

from delrec.lm import export, pretrained
from delrec.lm.prompts import DEFAULTS
from delrec.runtime import read_json, write_json
from delrec.serving import answers, latency, ranking
from delrec.serving.answerer import Answerer
from delrec.serving.catalogue import Catalogue


def twenty(olds, wanted):
    """Scores of the catalogue: the higher the item's number, the better; 20 items are ranked."""
    s_BI = by_number(olds, wanted, 60)
    s_BI[:, :41] = -np.inf
    return s_BI


def test_fewer_titles_than_asked_for_are_said(toy, alone, capsys):
    rule = recommender_of(toy, twenty).now
    answers.answer_history(rule, alone, {"top": 50}, history=toy.titles[3])
    said = capsys.readouterr().out
    assert "note: 20 items are left of the 50 asked for" in said
    assert len(json.loads(said.splitlines()[-1])["top"]) == 20
    answers.answer_history(rule, alone, {"top": 20}, history=toy.titles[3])
    assert "asked for" not in capsys.readouterr().out


def test_an_empty_history_has_the_same_answer_alone_and_in_a_file(toy, alone, tmp_path, capsys):
    rule = recommender_of(toy, twenty).now
    says = sentence(answers.answer_history, rule, alone, {"top": 5}, history=" | ")
    (tmp_path / "ask.jsonl").write_text(
        json.dumps({"history": []}) + "\n" + json.dumps({"history": [toy.titles[3]]}) + "\n"
    )
    answers.answer_file(rule, alone, {"top": 25}, tmp_path / "ask.jsonl", None)
    lines = (tmp_path / "ask.answers.jsonl").read_text().splitlines()
    empty, known = map(json.loads, lines)
    assert says.startswith(empty["error"]) and empty["top"] == [] and "error" not in known
    assert (
        len(known["top"]) == 20 and "note: 20 items are left of the 25" in capsys.readouterr().out
    )


def test_answers_that_cannot_be_written_are_known_before_the_work(toy, alone, tmp_path):
    (tmp_path / "ask.jsonl").write_text(json.dumps({"history": [toy.titles[3]]}))
    (tmp_path / "file").write_text("x")

    def work():
        raise AssertionError("the LM was opened")

    out = tmp_path / "file" / "said.jsonl"
    rule = Answerer(Catalogue(toy), work, RULE)
    says = sentence(answers.answer_file, rule, alone, {}, tmp_path / "ask.jsonl", out)
    assert f"{out} cannot be written" in says


@pytest.mark.parametrize("show", [True, False])
@pytest.mark.parametrize("pool", [0, 9, 30])
def test_a_pool_that_a_run_cannot_rank_is_said(show, pool, toy, alone, monkeypatch, capsys):
    ranker = SimpleNamespace(show=show, data=toy, order="shuffled", settings=DEFAULTS)
    run = SimpleNamespace(stage="finetune", settings={}, C=15, folder=Path("runs/x"))
    monkeypatch.setattr(ranking, "open_run", lambda *_: (ranker, np.zeros(61)))
    monkeypatch.setattr(ranking, "reads_all", lambda _: False)
    monkeypatch.setattr(ranking, "pool_chooser", lambda *args: args)
    ranking.run_scorer(run, toy, alone, pool, False)
    said = capsys.readouterr().out
    cut = f"it ranks its backbone's 15 best, not --pool {pool}"
    assert (cut in said) == (show and pool != 9)


def test_pool_0_is_not_suggested_to_whom_it_does_not_help(toy, tmp_path):
    run = SimpleNamespace(backbone_run=str(tmp_path / "none"))
    says = sentence(ranking.pool_chooser, run, toy, 15, True)
    assert "no backbone in" in says and "--pool" not in says
    assert "--pool 0" in sentence(ranking.pool_chooser, run, toy, 15)
    write_backbone(tmp_path / "none", toy, popular(toy))  # lists without a model
    says = sentence(ranking.pool_chooser, run, toy, 15, True)
    assert "no model.safetensors" in says and "--pool" not in says
    assert "--pool 0" in sentence(ranking.pool_chooser, run, toy, 15)


def test_an_export_of_more_items_than_a_run_ranks_is_refused(backbone, toy):
    run = SimpleNamespace(backbone_run=str(backbone), folder=backbone, C=8)
    says = sentence(export.backbone_lists, run, toy, 10)
    assert "ranks 7 items and the truth" in says and "--export-k is 10" in says
    assert export.backbone_lists(run, toy, 5).shape == (len(toy.train), 7)


def test_what_libraries_tell_their_developers_is_not_printed(decoder, monkeypatch, capfd):
    real = AutoConfig.from_pretrained

    def told(*args, **kwargs):
        warnings.warn("`torch_dtype` is deprecated", FutureWarning, stacklevel=1)
        logging.get_logger("transformers").warning("`tokenizer_class` is not what it was")
        return real(*args, **kwargs)

    monkeypatch.setattr(AutoConfig, "from_pretrained", told)
    loud = logging.get_verbosity()
    pretrained.config_and_tokenizer(decoder, decoder)
    assert capfd.readouterr().err == "" and logging.get_verbosity() == loud


@pytest.mark.parametrize("kind", ["decoder", "encoder", "encoder-decoder"])
def test_a_configuration_without_architectures_is_told_by_its_model_type(kind, tmp_path):
    of = {"decoder": "llama", "encoder": "bert", "encoder-decoder": "t5"}
    write_json(tmp_path / "config.json", {"model_type": of[kind]})
    assert pretrained.kind_of(pretrained.config_of(tmp_path)) == kind
    write_json(tmp_path / "config.json", {"model_type": of[kind], "architectures": None})
    assert pretrained.kind_of(pretrained.config_of(tmp_path)) == kind


def test_the_parameters_of_an_lm_in_a_bin_are_those_of_its_safetensors(decoder, tmp_path):
    config = read_json(Path(decoder) / "config.json")
    write_json(tmp_path / "config.json", config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    run = SimpleNamespace(stage="lm", folder=tmp_path / "run", llm=decoder)
    stored = latency.parameters(run)
    run.llm = str(tmp_path)
    assert latency.parameters(run) == stored > 1000
