"""delrec/runtime.py: names of folders, files that are whole or not there, runs that are refused."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import sentence

from delrec import runtime
from delrec.data.earlier import runs_on
from delrec.data.prepared import load_data, load_data_of
from delrec.lm.lists import read_lists
from delrec.runtime import (
    beside,
    folder_of,
    load_run,
    place_of_new,
    usual_run,
    write_json,
    write_npy,
)


def test_a_name_means_a_folder_under_runs_unless_it_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    # the default of distill.py
    assert folder_of("runs", "toy/prompt") == tmp_path / "root" / "runs" / "toy" / "prompt"
    assert folder_of("data", "beauty") == tmp_path / "root" / "data" / "beauty"
    assert folder_of("runs", tmp_path / "new") == tmp_path / "new"
    assert folder_of("runs", "runs/toy/new").resolve() == tmp_path / "runs" / "toy" / "new"
    assert folder_of("runs", "../new").resolve() == tmp_path.parent / "new"
    (tmp_path / "toy" / "mine").mkdir(parents=True)
    assert folder_of("runs", "toy/mine").resolve() == tmp_path / "toy" / "mine"
    too_long = "x" * 5000
    assert folder_of("runs", too_long) == tmp_path / "root" / "runs" / too_long


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """The current folder, of a shop; the program's root is tmp_path/program."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path / "program")
    (tmp_path / "shop").mkdir()
    monkeypatch.chdir(tmp_path / "shop")
    return tmp_path / "shop"


def test_a_short_name_means_what_stands_in_the_current_folder_too(shop, toy, backbone):
    own, clone = (root / "runs" / "toy" / "sasrec" for root in (shop, runtime.ROOT))
    shutil.copytree(backbone, own)
    assert load_run("toy/sasrec").folder == own == usual_run(toy, "sasrec")
    assert place_of_new("runs", "toy/sasrec") == clone  # --out stays in the program's root
    shutil.copytree(backbone, clone)
    says = sentence(load_run, "toy/sasrec")
    assert str(own) in says and str(clone) in says and "whole path" in says
    assert usual_run(toy, "sasrec") == clone  # nobody typed it: never refused
    assert load_run("runs/toy/sasrec").folder == own and load_run(clone).folder == clone
    config = json.loads((clone / "config.json").read_text())
    write_json(clone / "config.json", config | {"data_hash": "of another shop"})
    assert usual_run(toy, "sasrec") == own  # the data tell them apart
    shutil.rmtree(own)
    assert load_run("toy/sasrec").folder == clone
    beside(own, "unfinished").mkdir()  # a run that is made just now
    assert "may be" in sentence(load_run, "toy/sasrec")
    shutil.rmtree(shop / "runs")
    (shop / "runs").symlink_to(runtime.ROOT / "runs")
    assert load_run("toy/sasrec").folder == clone  # one folder by two ways


def test_a_name_that_is_no_run_is_told_what_may_be_meant(shop, toy, backbone):
    own, clone = (root / "runs" for root in (shop, runtime.ROOT))
    assert "no run is finished here; train it first" in sentence(load_run, "my-shop/sasrec")
    for place in (
        own / "my-shop" / "sasrec",
        own / "my-shop" / "gru4rec",
        clone / "beauty" / "mine",
    ):
        shutil.copytree(backbone, place)
    shutil.copytree(backbone, own / "my-shop" / "sasrec" / "backbone")  # a part of a run
    says = sentence(load_run, "my-shop/sasrek")
    assert "is no run folder; finished here: my-shop/sasrec, my-shop/gru4rec, beauty/mine;" in says
    says = sentence(load_run, "my-shop")
    assert says.endswith("my-shop holds runs: gru4rec, sasrec; give my-shop/gru4rec")
    os.replace(own / "my-shop" / "sasrec", own / "my-shop" / "sasrec.unfinished")
    (own / "my-shop" / "sasrec.unfinished" / "config.json").unlink()  # killed
    says = sentence(load_run, "my-shop/sasrec")
    assert "is an unfinished run: it was stopped; the command that began it, with --resume" in says
    write_json(own / "my-shop" / "sasrec.unfinished" / "started.json", {"stage": "lm"})
    assert "--resume" not in sentence(load_run, "my-shop/sasrec")  # evaluate.py --llm has none
    away = shop.parent / "away" / "runs"
    shutil.copytree(backbone, away / "toy" / "sasrec")
    assert f"finished here: {away / 'toy' / 'sasrec'}, " in sentence(load_run, away / "toy" / "sas")


def test_a_mistyped_backbone_is_not_to_be_trained(shop, toy, backbone):
    shutil.copytree(backbone, shop / "runs" / "toy" / "sasrec")
    says = sentence(read_lists, "toy/sasrek", toy, "--dataset toy")
    assert "no backbone in" in says and "toy/sasrek (is toy/sasrec meant?); train it" in says
    assert "meant?" not in sentence(read_lists, "toy/caser", toy, "--dataset toy")


def test_a_short_name_of_data_means_the_current_folder_s_too(shop, toy, backbone):
    own, clone = (root / "data" / "my-shop" for root in (shop, runtime.ROOT))
    shutil.copytree(toy.folder, own)
    assert load_data("my-shop").folder == own
    shutil.copytree(toy.folder, clone)
    says = sentence(load_data, "my-shop")
    assert str(own) in says and str(clone) in says
    meta = json.loads((clone / "meta.json").read_text())
    write_json(clone / "meta.json", meta | {"hash": "of another shop"})
    run = load_run(backbone)
    run.data_folder, run.dataset = None, "my-shop"
    assert load_data_of(run).folder == own  # a run knows its data by their hash


def test_whole_paths_need_no_current_folder(shop, toy, backbone):
    """A service goes on where the folder that it was started in was replaced."""
    shop.rmdir()
    assert load_data_of(load_run(backbone)).folder == toy.folder
    shutil.copytree(backbone, runtime.ROOT / "runs" / "toy" / "sasrec")
    assert load_run("toy/sasrec").folder == runtime.ROOT / "runs" / "toy" / "sasrec"
    assert runs_on(toy.meta["hash"], toy.folder) == [str(load_run("toy/sasrec").folder)]
    assert "toy/sasrec" in sentence(load_run, "toy/sasrek")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"title": "Les Misérables"})
    write_npy(tmp_path / "a.npy", np.arange(3))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "title": "Les Misérables"
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npy"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime.os, "fsync", full)
    for path, write, value in (
        (tmp_path / "a.json", write_json, {}),
        (tmp_path / "a.npy", write_npy, np.zeros(9)),
        (tmp_path / "new.npy", write_npy, np.zeros(9)),
    ):
        with pytest.raises(OSError):
            write(path, value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "title": "Les Misérables"
    }
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2] and not (tmp_path / "new.npy").exists()


def test_refused_runs_say_why(tmp_path, toy, backbone, monkeypatch):
    assert "is no run folder" in sentence(load_run, tmp_path / "nothing")
    assert "holds a train_backbone run, expected one of: distill, finetune" in sentence(
        load_run, backbone, toy, ["distill", "finetune"]
    )
    other = SimpleNamespace(meta=toy.meta | {"hash": "0123"})
    says = sentence(load_run, backbone, other)
    assert toy.meta["hash"] in says and "0123" in says and "train it again" in says
    monkeypatch.setattr(runtime, "ROOT", tmp_path)  # a name is looked for under runs/
    shutil.copytree(backbone, tmp_path / "runs" / "toy" / "sasrec")
    assert load_run("toy/sasrec", toy).folder == tmp_path / "runs" / "toy" / "sasrec"
