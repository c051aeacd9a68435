"""delrec/lm/wording.py: a run is asked in the words that it was trained on, or not at all."""

import shutil

import pytest
import torch
from chain import stages
from commands import edit_config
from scripts import sentence

import evaluate
import finetune
from delrec.lm import wording
from delrec.lm.prompts import DEFAULTS
from delrec.lm.ranker import open_run
from delrec.lm.wording import pattern_of, wording_of
from delrec.runtime import load_run

PLAIN = DEFAULTS | {"backbone": "SASRec"}
OTHERS = {  # flags, and the sentences that prompts of them hold
    "history": ({}, ["ABOUT history", "ABOUT backbone"]),
    "instruct": ({"instruct": True}, ["INSTRUCTIONS history", "ABOUT history"]),
    "show": ({"show": True}, ["WORDS candidates", "WORDS next"]),
    "hint": ({"verbalizer": "letter", "hint": "backbone"}, ["WORDS hint", "WORDS candidates"]),
    "summary": ({"summary": "words"}, ["ABOUT summary", "WORDS latest"]),
    "words": ({"words": True}, ["PATTERN SASRec"]),
}


@pytest.mark.parametrize("flags, held", OTHERS.values(), ids=OTHERS)
def test_a_digest_is_of_the_sentences_that_prompts_hold(flags, held, monkeypatch):
    settings = PLAIN | flags
    before = wording_of(settings), wording_of(settings, stage_1=True)
    for place in held:
        name, key = place.split()
        with monkeypatch.context() as patch:
            patch.setitem(getattr(wording, name), key, "Another {n}:")
            assert wording_of(settings) != before[0], place
    for place in ("PATTERN Caser", "WORDS choices", "INSTRUCTIONS rps"):  # of nobody's answers
        name, key = place.split()
        with monkeypatch.context() as patch:
            patch.setitem(getattr(wording, name), key, "Another {n}:")
            assert wording_of(settings) == before[0], place
            same = name == "PATTERN" or name == "INSTRUCTIONS" and "instruct" not in flags
            assert (wording_of(settings, stage_1=True) == before[1]) == same, place


def test_a_run_is_not_asked_in_words_that_it_has_not_seen(
    chain, toy, backbone, decoder, refused, script, on_cpu, monkeypatch, tmp_path
):
    folder = shutil.copytree(chain.delrec, tmp_path / "delrec")
    says = f"{folder} was trained on prompts with other fixed words than delrec/lm/wording.py has"
    _, tune = stages(toy, backbone, decoder, chain.prompt, tmp_path / "x")
    monkeypatch.setitem(wording.ABOUT, "history", "{N}s that the user {v}, the oldest first:")
    assert says in refused(evaluate.main, f"--ckpt {folder} --limit 4 --val-samples 8")
    prompt = script(finetune.main, *tune, code=1).error
    assert f"{chain.prompt} was trained on prompts with other fixed words" in prompt
    going_on = f"--dataset {toy.folder} --from {folder} --out {tmp_path}/x"
    assert says in refused(finetune.main, going_on)
    # a run of an earlier version does not say its words
    settings = {k: v for k, v in load_run(folder).settings.items() if k != "wording"}
    edit_config(folder, settings=settings)
    ranker, _ = open_run(load_run(folder), toy, torch.device("cpu"))
    prefix = ranker.prompts.prefix
    assert "Movies that the user" in ranker.lm.tok.decode(prefix[prefix >= 0])


def test_words_about_a_backbone_that_has_none_are_refused(
    toy, backbone, decoder, script, on_cpu, tmp_path, monkeypatch
):
    mine = edit_config(shutil.copytree(backbone, tmp_path / "mine"), model="fism")
    _, tune = stages(toy, backbone, decoder, "words", tmp_path / "x")
    said = script(finetune.main, *tune, "--backbone", mine, code=1).error
    assert "PATTERN in delrec/lm/wording.py has none for 'fism'; add a sentence there" in said
    assert "SASRec" in wording.PATTERN and pattern_of("fism") == wording.PATTERN["SASRec"]
    monkeypatch.setitem(wording.PATTERN, "fism", "{b} adds up how alike the {n}s are.")
    tune[tune.index("--samples") + 1] = "48"
    script(finetune.main, *tune, "--backbone", mine)
    assert load_run(tmp_path / "x").settings["words"]
    del wording.PATTERN["fism"]
    assert "fixed words" in sentence(open_run, load_run(tmp_path / "x"), toy, torch.device("cpu"))
