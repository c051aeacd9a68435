"""evaluate.py --export-onnx: a backbone as one file that answers without torch."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import ROOT

import evaluate
import train_backbone
from delrec.backbone import graphs
from delrec.backbone.models import ALL, MODELS, build, load, score
from delrec.data.prepared import raw_item_ids
from delrec.serving import onnx_file

# `make` installs both; where there is no wheel of them, the rest is tested all the same
needs_onnx = pytest.mark.skipif(
    not os.environ.get("CI") and any(map(onnx_file.is_missing, onnx_file.NEEDED)),
    reason="needs pip install onnx onnxruntime",
)
EXAMPLE = re.compile(r"```python\n(.*?)```", re.S)


@pytest.fixture(scope="module")
def trained(cycle, train_on_cycle, tmp_path_factory):
    """{model: a run folder trained for an epoch}."""
    place, small = tmp_path_factory.mktemp("runs"), "--epochs 1 --width 16 --batch 64"
    for model in MODELS:
        train_on_cycle(place / model, f"--model {model} {small}")
    return {model: place / model for model in MODELS}


@pytest.fixture
def exported(trained, run):
    """exported(model) -> (its file, ready to answer; the model)."""

    def export(name):
        said = run(evaluate.main, f"--ckpt {trained[name]} --export-onnx").json
        assert said["difference"] < 1e-5 and said["histories"] > 50
        return onnx_file.session_of(said["out"]), load(trained[name])

    return export


def ask(session, history, left_out=((0,),), k=5):
    """(scores, items) of the file; histories may have different lengths."""
    longest = max(map(len, history))
    rows = [[0] * (longest - len(row)) + list(row) for row in history]
    given = np.array(rows, np.int64).reshape(len(rows), longest)
    left_out = np.broadcast_to(np.array(left_out, np.int64), (len(rows), len(left_out[0])))
    asked = {"history": given, "left_out": left_out, "k": np.array([k])}
    return session.run(None, asked)


# ---------------------------------------------------------------- it says what the model says


@needs_onnx
@pytest.mark.parametrize("name", MODELS)
def test_the_file_answers_what_the_model_says_whatever_the_lengths(name, exported):
    session, model = exported(name)
    rng = np.random.default_rng(0)
    lengths = (0, 1, 2, 5, 19, 20, 21, 70)
    histories = [rng.integers(1, 101, n) for n in lengths]
    for asked in (histories, *([history] for history in histories)):
        scores, items = ask(session, asked, k=100)
        for row, item, history in zip(scores, items, asked):
            with torch.no_grad():
                want = score(model, torch.tensor([[0, *history]]))[0, 1:].numpy()
            assert (np.sort(item) == np.arange(1, 101)).all()
            np.testing.assert_allclose(row, want[item - 1], atol=1e-5)
            assert (np.diff(row) <= 0).all()


@needs_onnx
def test_items_that_are_left_out_are_not_answered_and_few_that_are_left_end_in_zeros(exported):
    session, _ = exported("sasrec")
    first, items = ask(session, [[3, 4]], k=100)
    best = items[0][:2]
    scores, again = ask(session, [[3, 4]], [[0, *best]], k=100)
    assert (again[0] == [*items[0][2:], 0, 0]).all()
    assert (scores[0, -2:] == -np.inf).all()
    np.testing.assert_array_equal(scores[0, :-2], first[0, 2:])
    assert ask(session, [[3, 4]], k=7)[1].shape == (1, 7)
    assert ask(session, [[3, 4]], k=1000)[1].shape == (1, 100)  # there are no more


@needs_onnx
def test_equal_scores_stand_in_the_order_of_the_numbers(cycle, trained):
    model = load(trained["gru4rec"])
    model.item.weight.data.zero_()
    model.bias.data = torch.tensor([0.0] + [1.0, 2.0] * 50)
    run = SimpleNamespace(model="gru4rec", history=model.history)
    content = onnx_file.serialised(onnx_file.file_of(model, run, cycle))
    _, items = ask(onnx_file.session_of(content), [[1]], k=60)
    assert (items[0] == [*range(2, 101, 2), *range(1, 21, 2)]).all()


@needs_onnx
def test_titles_and_raw_ids_come_with_the_file(exported, cycle):
    session, _ = exported("caser")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["titles"]) == cycle.titles
    assert json.loads(about["ids"]) == raw_item_ids(cycle)
    assert about["window"] == "5" and about["data_hash"] == cycle.meta["hash"]


@needs_onnx
def test_the_example_of_the_documents_answers_with_onnxruntime_and_numpy_only(
    toy, sasrec, run, tmp_path
):
    run(evaluate.main, f"--ckpt {sasrec} --export-onnx --out {tmp_path}/shop.onnx")
    [code] = EXAMPLE.findall((ROOT / "docs" / "onnx.md").read_text(encoding="utf-8"))
    assert len(list(filter(None, code.splitlines()))) == 12
    code = code.replace("runs/ml-100k/sasrec/model.onnx", f"{tmp_path}/shop.onnx")
    code = code.replace('"1", "95", "172"', '"1", "12", "40"')
    code += "import sys\nprint(sorted({'torch', 'delrec', 'onnx'} & set(sys.modules)))\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    history = " | ".join(toy.titles[i] for i in (1, 12, 40))
    top = run_history(sasrec, history)
    assert lines[-1] == "[]" and not done.stderr
    assert [line.split("(id ")[1] for line in lines[:-1]] == [f"{x['id']})" for x in top]
    assert [line.split("  ")[1] for line in lines[:-1]] == [x["title"] for x in top]


def run_history(folder, history):
    """What evaluate.py --history answers."""
    from click.testing import CliRunner

    args = ["--ckpt", str(folder), "--history", history]
    said = CliRunner().invoke(evaluate.main, args)
    return json.loads(said.stdout.splitlines()[-1])["top"]


# ---------------------------------------------------------------- taught backbones


@needs_onnx
def test_a_backbone_that_titles_taught_is_written_too(cycle, run, tmp_path):
    out, taught = tmp_path / "taught", "--teacher tfidf --epochs 1 --width 16 --batch 16"
    run(train_backbone.main, f"--dataset {cycle.folder} --out {out} {taught}")
    assert run(evaluate.main, f"--ckpt {out} --export-onnx").json["difference"] < 1e-5


# ---------------------------------------------------------------- refusals


@needs_onnx
def test_a_file_that_says_something_else_is_not_written(trained, refused, tmp_path, monkeypatch):
    def other(graph, model, seq_BL):
        return graph.add("Mul", graphs.sasrec(graph, model, seq_BL), np.float32(1.01))

    monkeypatch.setitem(onnx_file.GRAPHS, "sasrec", other)
    (tmp_path / "here").mkdir()
    where = f"--ckpt {trained['sasrec']} --export-onnx --out {tmp_path}/here"
    assert "differ from the model's by" in refused(evaluate.main, where)
    assert not list((tmp_path / "here").iterdir())


@needs_onnx
def test_a_file_above_two_gigabytes_is_refused(trained, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 1000)
    where = f"--ckpt {trained['sasrec']} --export-onnx --out {tmp_path}/a.onnx"
    assert "ONNX allows 2" in refused(evaluate.main, where)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_sentence_with_the_command(trained, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it was not installed
    says = refused(evaluate.main, f"--ckpt {trained['sasrec']} --export-onnx")
    assert "onnxruntime" in says and "pip install onnx onnxruntime" in says
    assert not (trained["sasrec"] / "model.onnx.tmp").exists()


def test_a_run_without_a_model_and_a_run_of_an_lm_are_refused(backbone, refused, monkeypatch):
    monkeypatch.setattr(onnx_file, "stop_unless_installed", lambda: None)
    says = refused(evaluate.main, f"--ckpt {backbone} --export-onnx")
    assert "holds lists but no model.safetensors" in says
    lm = SimpleNamespace(stage="finetune", folder="runs/x/delrec")
    with pytest.raises(Exception, match="is a run of finetune, and --export-onnx writes backbones"):
        onnx_file.stop_unless_backbone(lm)


def test_every_backbone_has_a_graph():
    assert set(graphs.GRAPHS) == set(MODELS)


@needs_onnx
def test_the_best_of_a_large_catalogue_are_the_best(cycle):
    torch.manual_seed(0)
    model = build("gru4rec", 50_000, SimpleNamespace(width=8, history=5, dropout=0.0)).eval()
    torch.nn.init.normal_(model.bias)
    run = SimpleNamespace(model="gru4rec", history=5)
    content = onnx_file.serialised(onnx_file.file_of(model, run, cycle))
    _, items = ask(onnx_file.session_of(content), [[7, 49_999]], k=300)
    with torch.no_grad():
        want = score(model, [[7, 49_999]]).topk(300).indices
    assert (items == want.numpy()).all()


def test_the_page_names_the_backbones_that_are_not_written():
    (said,) = re.findall(r"It works for .*?\.\n", (ROOT / "docs" / "onnx.md").read_text(), re.S)
    assert {name for name in ALL if f"`{name}`" in said} == set(ALL) - set(graphs.GRAPHS)
