"""delrec/runtime.py: names of folders, files that are whole or not there, runs that are refused."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import sentence

from delrec import runtime
from delrec.runtime import folder_of, load_run, write_json, write_npy


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
