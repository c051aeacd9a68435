"""What distill.py refuses, each in one sentence, before the LM is asked anything."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from commands import edit_config, metrics_of

import common
import distill
from delrec import runtime
from delrec.data.prepared import users


def test_a_missing_backbone_says_how_to_train_it(toy, refused, tmp_path, monkeypatch):
    nothing = tmp_path / "nothing"
    says = refused(distill.main, f"--dataset {toy.folder} --backbone {nothing}")
    assert f"no backbone in {nothing}" in says
    assert f"python train_backbone.py --dataset {toy.folder}" in says
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    usual = tmp_path / "runs" / "toy" / "sasrec"
    assert f"no backbone in {usual}" in refused(distill.main, f"--dataset {toy.folder}")


def test_a_backbone_of_other_data_is_refused(toy, backbone, refused, tmp_path):
    other = shutil.copytree(backbone, tmp_path / "other")
    edit_config(other, data_hash="0123456789abcdef")
    says = refused(distill.main, f"--dataset {toy.folder} --backbone {other}")
    assert "was trained on another preparation" in says


def test_lists_that_are_too_short_are_refused(toy, backbone, refused):
    says = refused(distill.main, f"--dataset {toy.folder} --backbone {backbone} --h 13")
    assert "lists 12 items per sample, --h is 13" in says
    assert "train_backbone.py --top-h 13 --overwrite and its other flags as before" in says


def test_fewer_samples_than_a_step_are_refused(toy, backbone, refused):
    says = refused(
        distill.main, f"--dataset {toy.folder} --backbone {backbone} --samples 8 --batch 9"
    )
    assert "--samples 8 are not a step of --batch 9; raise --samples" in says


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("options", ["", "--input ids"])
def test_lists_of_users_who_took_nearly_everything_are_refused(
    toy, backbone, refused, tmp_path, split, options
):
    lists = shutil.copytree(backbone, tmp_path / "lists")
    topk_nh = np.load(lists / f"topk_{split}.npy")
    topk_nh[3, 5:] = 0  # as best_items writes it behind the last item
    np.save(lists / f"topk_{split}.npy", topk_nh)
    to_prompt = f"--dataset {toy.folder} --backbone {lists} {options} --llm {tmp_path}/nothing"
    says = refused(distill.main, to_prompt)
    assert f"topk_{split}.npy lists fewer than 10 items for 1 samples" in says
    assert says.endswith("lower --h to 5")
    # five of each are enough, and then it is the LM that is missing
    assert "no language model" in refused(distill.main, f"{to_prompt} --h 5")


@pytest.mark.parametrize(
    "options, says",
    [
        ("--a 9 --history 10", "--a 9 must be at least 3 and at most --history 10 minus 2"),
        ("--a 2", "--a 2 must be at least 3"),
        ("--input ids --verbalizer mean", "--verbalizer is about titles"),
        ("--input ids --paper", "--paper is about titles"),
        ("--loss catalogue", "from one state, --verbalizer likelihood cannot; use mean or first"),
        (
            "--rps-candidates release --candidates 8 --h 10",
            "puts the backbone's 10 items (--h) among --candidates 8; raise it",
        ),
        ("--candidates 55 --h 10", "need 65 items, the catalogue has 60"),
        ("--dataset nowhere", "no prepared data set in"),
        ("--input ids --augment all --without-fold 0", "learnt from the users of --without-fold"),
    ],
)
def test_relations_that_cannot_hold_are_refused(options, says, toy, backbone, refused):
    where = f"--dataset {toy.folder} --backbone {backbone}"
    assert says in refused(distill.main, f"{where} {options}")


@pytest.fixture
def to_short_histories(toy, backbone, decoder, on_cpu, tmp_path, monkeypatch):
    """distill.py's options for the toy data with validation histories of less than 8 items."""
    few = toy.val - toy.ptr[users(toy, toy.val)] < 8
    assert few.any()
    lists = shutil.copytree(backbone, tmp_path / "lists")
    np.save(lists / "topk_val.npy", np.load(backbone / "topk_val.npy")[few])
    (lists / "scores_val_15.npy").unlink()
    short = replace(toy, val=toy.val[few])
    monkeypatch.setattr(common, "load_data", lambda name: short)
    return f"--dataset {toy.folder} --backbone {lists} --llm {decoder} --a 8 --k 2 --h 5"


def test_histories_too_short_for_temporal_analysis_are_a_sentence(
    to_short_histories, run, refused, tmp_path
):
    out = tmp_path / "p"
    says = refused(distill.main, f"{to_short_histories} --out {out}")
    assert "no validation history has the 10 items Temporal Analysis needs" in says
    assert "--tasks rps" in says
    assert not out.exists()
    # without that task they are enough
    rps = "--tasks rps --verbalizer mean --samples 16 --evals 1"
    run(distill.main, f"{to_short_histories} --out {out} {rps}")
    result = metrics_of(out)
    assert set(result["after"]) == {"rps", "rps_loss"}
    assert result["n_ta"] == 0
    assert result["agreement"] == {}  # a folder of lists has no scores to compare with


def test_a_loss_that_explodes_stops_the_run(to_distil, refused, on_cpu, tmp_path):
    out = tmp_path / "p"
    wild = "--k 3 --samples 64 --lr 0.1 --weight-decay 1e20 --val-samples 8 --evals 1"
    says = refused(distill.main, f"{to_distil} --out {out} {wild}")
    assert "lower --lr" in says
    assert not (out / "config.json").exists()
