"""recipes/circle.py: all its stages on a tiny LM, in this process."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from delrec import runtime
from delrec.evaluation.scores import part_of, places_in_test
from delrec.runtime import load_run, write_json
from recipes import circle

SMALL = "--layers 2 --windows 80 --small-windows 80 --val-samples 10 --test-samples 30 --procs 1"


@pytest.mark.parametrize("layers", [1, 5, 7, 11, 25, 31])
def test_layers_that_make_one_block_are_refused_before_anything_trains(here, refused, layers):
    said = refused(circle.main, f"--layers {layers}")  # the embedded LM has 30
    assert f"--layers {layers}: " in said and not here.ran
    fits = [int(n) for n in said.split("one of ")[1].split(", ")]
    assert {2, 3, 6, 20, 30} <= set(fits) and not {1, 5, 7, 11, 25} & set(fits)
    for n in fits:
        circle.must_be_taught(circle.Circle("toy", "smollm2-135m", n, 80, 80, 10, 1, 0))


def test_the_layers_are_those_of_the_lm_also_of_a_run_s(here, refused, deep, encoder, tmp_path):
    assert refused(circle.main, f"--llm {deep} --layers 3").endswith("one of 2, 4")
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    run = {"stage": "finetune", "dataset": "toy", "data_hash": "0", "llm": str(deep)}
    write_json(tmp_path / "run" / "config.json", run)
    said = refused(circle.main, f"--llm {tmp_path}/run --layers 3")
    assert said.endswith("one of 2, 4")
    assert refused(circle.main, f"--llm {encoder} --layers 2").endswith("use another --llm")
    assert not here.ran


@pytest.mark.long
def test_the_circle_closes(here, toy, decoder, tmp_path):
    llm = shutil.copytree(decoder, tmp_path / "lm")
    args = ["--dataset", str(toy.folder), "--llm", str(llm), *SMALL.split()]
    done = CliRunner().invoke(circle.main, args)
    if done.exception:
        raise done.exception
    rows = {x["name"]: x["value"] for x in json.loads(done.output.strip().splitlines()[-1])["rows"]}
    gains = {f"slmrec.hr@1_vs_teacher{end}" for end in ("", "_low", "_high")}
    speed = {"slmrec.speedup.inference", "slmrec.speedup.training", "dllm2rec.latency_ms"}
    assert gains | speed | {"dllm2rec.hr20_gain", "dllm2rec.p_value"} <= set(rows)
    table = json.loads((here.root / "toy" / "circle" / "metrics.json").read_text())["rows"]
    gain = rows["slmrec.hr@1_vs_teacher"]
    assert gain == pytest.approx(table["slmrec"]["hr@1"] - table["e4srec"]["hr@1"], abs=1e-4)
    assert rows["slmrec.hr@1_vs_teacher_low"] <= gain <= rows["slmrec.hr@1_vs_teacher_high"]
    assert rows["dllm2rec.latency_ms"] > 0 and 0 < rows["circle.minutes"] < 60
    taught = load_run(here.root / "toy" / "circle" / "sasrec-taught")
    assert taught.teacher == str(here.root / "toy" / "circle" / "slmrec") and len(here.ran) == 10
    again = CliRunner().invoke(circle.main, args)
    # the export, which finds all of it there, and the table
    assert not again.exception and len(here.ran) == 12
    assert "circle.minutes" not in again.output and "no time of the whole" in again.output


def test_a_tie_of_the_small_lm_is_no_miss(toy, make_backbone, tmp_path, monkeypatch):
    """All scores of both are equal, so either has the next item first once in fifteen; the teacher
    has it first in the samples of even places.
    """
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    asked = circle.Circle("toy", "lm", 1, 80, 80, 10, 1, 30)
    for name in ("slmrec", "e4srec"):
        make_backbone(asked.folder / name, toy, lambda samples: np.zeros((len(samples), 61)))
    path = asked.folder / "e4srec" / "scores_test_15.npy"
    score_nC = np.load(path)
    part = part_of(toy, "test", np.arange(len(toy.test)), 15)
    score_nC[::2] = part.is_target_nC[::2]
    np.save(path, score_nC)
    even = places_in_test(toy, 30, 0) % 2 == 0
    mean, low, high = circle.minus_teacher(asked, toy)
    assert mean == pytest.approx(1 / 15 - np.where(even, 1, 1 / 15).mean())
    assert low < mean < high < 0


def test_a_circle_of_which_a_part_was_there_is_not_made_in_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(circle, "stage", lambda folder, *_, **__: folder.mkdir(parents=True))
    asked = circle.Circle("toy", "lm", 1, 80, 80, 10, 1, 0)
    asked.make("sasrec", "train_backbone.py")
    assert asked.in_one_go
    (asked.folder / "e4srec.unfinished" / "checkpoints").mkdir(parents=True)
    asked.make("e4srec", "finetune.py")
    assert not asked.in_one_go
    asked.in_one_go = True
    (asked.folder / "caser").mkdir()
    (asked.folder / "caser" / "config.json").touch()
    monkeypatch.setattr(circle, "stage", lambda *_, **__: None)
    asked.make("caser", "train_backbone.py")
    assert not asked.in_one_go
