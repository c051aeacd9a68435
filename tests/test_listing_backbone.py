"""The backbone that an LM run lists its candidates by: a run says when it was trained again."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import finetune
from delrec.lm.listed import backbone_digest
from delrec.runtime import load_run, read_json, write_json

NOTE = "note: the backbone "
QUICK_TUNE = (
    "--samples 80 --val-samples 4 --evals 1 --verbalizer mean --history 4 --init-r 4 "
    "--target-r 2 --order shuffled --no-calibrate"
)


@pytest.fixture
def listing(chain, toy, backbone, tmp_path, alone):
    """A fine-tuned run that lists its candidates by a backbone of its own: .run, .backbone."""
    own = shutil.copytree(backbone, tmp_path / "sasrec")
    run = shutil.copytree(chain.delrec, tmp_path / "delrec")
    config = read_json(run / "config.json")
    listed_by = {"backbone_run": str(own), "backbone_digest": backbone_digest(own)}
    settings = config["settings"] | {"order": "backbone", "show": True} | listed_by
    del settings["wording"]  # as if it were trained on such prompts
    config |= {"settings": settings, "calibration": 0} | listed_by
    write_json(run / "config.json", config)
    return SimpleNamespace(run=run, backbone=own)


def train_again(folder):
    """Another backbone in the same place."""
    for split in ("val", "test"):
        path = folder / f"scores_{split}_15.npy"
        np.save(path, -np.load(path))
    np.save(folder / "topk_train.npy", np.load(folder / "topk_train.npy")[:, ::-1])


def test_an_lm_run_stores_the_backbone_it_lists_by(chain, backbone):
    for folder in (chain.prompt, chain.delrec):
        run = load_run(folder)
        assert run.backbone_digest == run.settings["backbone_digest"] == backbone_digest(backbone)
        assert len(run.backbone_digest) == 16


def test_a_backbone_that_was_trained_again_is_said_in_one_line(listing, script, on_cpu, tmp_path):
    small = ["--limit", 6, "--val-samples", 6, "--out", tmp_path / "out"]

    def ask(*args):
        return script(evaluate.main, "--ckpt", listing.run, *small, *args).output

    assert NOTE not in ask()
    stored = np.load(listing.run / "scores_test_15.npy")
    train_again(listing.backbone)
    said = ask()
    assert said.count(NOTE) == 1 and "it was trained 20" in said
    assert str(listing.run) in said and str(listing.backbone) in said
    assert "lists its candidates in another order than it learned" in said
    assert "scores_test_15, scores_val_15 stand as they were made" in said
    np.testing.assert_array_equal(np.load(listing.run / "scores_test_15.npy"), stored)
    said = ask("--limit", 8)  # more samples: never a mix of two orders
    assert said.count(NOTE) == 1
    assert "scores_test_15.npy was made with another backbone, so it is made again" in said
    new, before = np.load(listing.run / "scores_test_15.npy"), np.isfinite(stored)
    assert np.isfinite(new).all(1).sum() == 8
    assert not np.array_equal(new[before], stored[before])
    history = script(evaluate.main, "--ckpt", listing.run, "--history", "zzz", code=1)
    assert history.output.count(NOTE) == 1
    config = read_json(listing.run / "config.json")
    del config["backbone_digest"]
    write_json(listing.run / "config.json", config)  # of an earlier version
    assert NOTE not in ask("--limit", 8)


def test_finetune_says_that_the_prompt_was_distilled_from_another_backbone(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    prompt = shutil.copytree(chain.prompt, tmp_path / "prompt")
    own = shutil.copytree(backbone, tmp_path / "sasrec")
    config = read_json(prompt / "config.json")
    settings = config["settings"] | {"backbone_run": str(own)}
    write_json(prompt / "config.json", config | {"backbone_run": str(own), "settings": settings})
    args = ["--dataset", toy.folder, "--llm", decoder, "--soft-prompt", prompt]
    args += ["--out", tmp_path / "run", "--overwrite", *QUICK_TUNE.split()]

    def tune():
        return script(finetune.main, *args).output

    assert NOTE not in tune()
    train_again(own)
    said = tune()
    assert said.count(NOTE) == 1 and str(prompt) in said
    assert "what the run learned is of the earlier one" in said
