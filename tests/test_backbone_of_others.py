"""A backbone of somebody else, with its weights (docs/run_folder.md): its code is not here, and
every command that needs it says so in one sentence.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

import evaluate
import train_backbone
from delrec import Recommender
from delrec.runtime import load_run, write_json
from delrec.serving import card, onnx_file, ranking


# the second calls itself as one of ours does
@pytest.fixture(params=["fism", "sasrec"])
def mine(request, backbone, toy, tmp_path):
    """The folder of a backbone of somebody else: what docs/run_folder.md asks for, no more."""
    folder = shutil.copytree(backbone, tmp_path / "runs" / "toy" / "mine")
    named = {"stage": "train_backbone", "model": request.param, "dataset": str(toy.folder)}
    write_json(folder / "config.json", named | {"data_hash": toy.meta["hash"]})
    rng, I1 = np.random.default_rng(0), toy.n_items + 1
    weights = {"item.weight": rng.normal(size=(I1, 4)), "bias": np.zeros(I1)}
    save_file({k: w.astype(np.float32) for k, w in weights.items()}, folder / "model.safetensors")
    return folder


NOT_HERE = "is a model of your own, '{}', whose code is not here"


def test_what_asks_it_of_a_new_history_is_refused(mine, toy, script, refused, request, monkeypatch):
    monkeypatch.setattr(onnx_file, "stop_unless_installed", lambda: None)
    says = NOT_HERE.format(request.node.callspec.params["mine"])
    asked = script(evaluate.main, "--ckpt", mine, "--history", toy.titles[3], code=1).error
    assert says in asked and "train one with train_backbone.py" in asked
    assert says in refused(evaluate.main, f"--ckpt {mine} --export-onnx")
    with pytest.raises(ValueError, match=says):
        Recommender.load(mine)
    lm = SimpleNamespace(backbone_run=str(mine))
    with pytest.raises(Exception, match=f"{says}.*, or give --pool 0"):
        ranking.pool_chooser(lm, toy, 15)
    going_on = f"--dataset {toy.folder} --out {mine.parent}/x --from {mine}"
    assert "which cannot be trained here" in refused(train_backbone.main, going_on)


def names_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_it_cannot_be_shared_and_its_folder_stays_as_it_is(mine, refused):
    before = names_in(mine)
    assert "whose code is not here" in refused(evaluate.main, f"--ckpt {mine} --card")
    assert names_in(mine) == before


def test_an_lm_that_learnt_from_it_is_shared_without_it(mine, toy, capsys, monkeypatch):
    lm = mine.parent / "lm"
    lm.mkdir()
    flags = {"llm": "some/lm", "backbone": str(mine), "input": "titles", "C": 15}
    where = {"dataset": toy.name, "data_folder": str(toy.folder), "data_hash": toy.meta["hash"]}
    more = {"backbone_run": str(mine), "settings": {"verbalizer": "mean", "show": False}}
    write_json(lm / "config.json", {"stage": "finetune", **flags, **where, **more})
    run = load_run(lm)
    with monkeypatch.context() as patch:  # a card that cannot be written leaves no half of one
        patch.setattr(card, "card_text", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            card.write_card(run, toy, lm / "evaluation")
    assert names_in(lm) == ["config.json"]
    card.write_card(run, toy, lm / "evaluation")
    made = (lm / "README.md").read_text().split("## Commands that made it")[1]
    assert "\n# toy/mine: a model of your own\npython finetune.py" in made
    assert "no backbone of it is here to be shared" in capsys.readouterr().out
    assert not (lm / "backbone").exists()
