"""export.py: what a teacher says of every training sample, for a conventional student."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import edit_config
from stopped_runs import killed_at

import evaluate
import train_backbone
from delrec.data.prepared import histories, subset
from delrec.lm import export
from delrec.lm.model import load_lm
from delrec.lm.prompts import DEFAULTS
from delrec.lm.ranker import open_run, score_catalogue
from delrec.lm.reading import read_prefix
from delrec.lm.text import encode
from delrec.runtime import load_run

CPU = torch.device("cpu")
# options of evaluate.py --export
FIVE = SimpleNamespace(export_k=5, limit=0, shard=False, overwrite=False, folds=())


def export_of(folder) -> dict:
    """The arrays of a run's export by the names of their files."""
    return {f.stem: np.load(f) for f in (folder / "export").glob("*.npy")}


def test_an_export_holds_the_best_items_and_what_the_teacher_thinks_of_the_truth(
    student, toy, on_cpu
):
    written = export_of(student)
    topk, truth, listed = (written[name] for name in ("topk", "truth", "listed"))
    assert topk.shape == listed.shape == (len(toy.train), 5)
    assert truth.shape == (len(toy.train),)
    trained = load_run(student, toy)
    assert trained.folder == student
    r, _ = open_run(trained, toy, CPU)
    start = read_prefix(r.lm, r.prompts.prefix, None)
    for n in (0, 17, len(toy.train) - 1):
        old = histories(toy, toy.train[[n]], 50)[0]
        old = old[old > 0]
        s = score_catalogue(r, start, [r.prompts.history(old[-6:])[0]])[0]
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        assert truth[n] == pytest.approx(p[toy.items[toy.train[n]]], rel=1e-3)
        s[old] = -np.inf
        assert topk[n].tolist() == np.argsort(-s, kind="stable")[:5].tolist()
        assert listed[n] == pytest.approx(p[topk[n]], rel=1e-3)


def test_an_export_holds_the_mean_state_of_each_title(student, toy, on_cpu):
    Z = export_of(student)["titles"]
    lm = load_lm(load_run(student, toy).llm, CPU, torch.float32)
    ids = torch.tensor([lm.start + encode(lm, toy.titles[7])])
    with torch.no_grad():
        want = lm.model.base_model(input_ids=ids).last_hidden_state[0, len(lm.start) :].mean(0)
    np.testing.assert_allclose(Z[7], want, rtol=1e-3, atol=1e-3)
    assert not Z[0].any()


@pytest.fixture
def unexported(student, tmp_path):
    """A copy of the student without its export."""
    copy = shutil.copytree(student, tmp_path / "student")
    shutil.rmtree(copy / "export")
    return copy


def same_export(a, b):
    """Two exports hold the same numbers."""
    one, two = export_of(a), export_of(b)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)


def test_a_killed_export_goes_on(student, unexported, toy, alone, refused, on_cpu, monkeypatch):
    trained = load_run(unexported, toy)
    monkeypatch.setattr(export, "CHUNK", 100)
    killed_at(monkeypatch, export, 3, lambda: export.export(trained, toy, alone, FIVE))
    assert not (unexported / "export").exists()
    says = refused(train_backbone.main, f"--dataset {toy.folder} --teacher {unexported}")
    assert "no complete export" in says
    assert "--export" in says
    export.export(trained, toy, alone, FIVE)
    same_export(student, unexported)


def test_two_processes_export_as_one(student, unexported, two_processes):
    two_processes([("evaluate", f"--ckpt {unexported} --export --export-k 5".split())])
    same_export(student, unexported)


def test_an_lm_that_ranks_title_by_title_exports_its_backbone_s_list_in_its_own_order(
    chain, toy, backbone, run, on_cpu, tmp_path
):
    copy = edit_config(shutil.copytree(chain.delrec, tmp_path / "delrec"), C=8)
    run(evaluate.main, f"--ckpt {copy} --export --export-k 5 --limit 30")
    topk, asked = export_of(copy)["topk"], subset(len(toy.train), 30, 0)
    assert (np.flatnonzero(topk[:, 0]) == asked).all()
    lists = np.load(backbone / "topk_train.npy")[:, :7]
    assert all(set(topk[n]) <= set(lists[n]) for n in asked)
    assert any(topk[n].tolist() != lists[n][:5].tolist() for n in asked)


def test_the_end_of_a_short_list_is_no_item(toy, alone, monkeypatch):
    """0 stands behind the last item of a user who took nearly all others."""

    def best_is_nothing(r, shown, cand_BC, *_):
        return np.where(cand_BC == 0, 9.0, cand_BC / 60).astype(np.float32)

    monkeypatch.setattr(export, "score_listed", best_is_nothing)
    samples = np.array([4])
    target, old = toy.items[toy.train[4]], histories(toy, toy.train[samples], 60)[0]
    new = [i for i in range(1, 61) if i not in old and i != target][:3]
    r = SimpleNamespace(data=toy, history=6, settings=DEFAULTS)
    no_penalty = np.zeros(61, np.float32)
    got = export.rows_of_lists(r, no_penalty, samples, np.array([[*new, 0, 0]]), 4, alone)[0]
    assert got[:4].tolist() == [*reversed(new), 0]
    assert got[3 + 4] == 0 and got[4:].sum() == pytest.approx(1)


def test_calibration_counts_in_an_export(toy, alone, monkeypatch):
    """What scores best does so without any history, so it is not listed: over the backbone's lists
    as over the catalogue."""
    samples = np.array([4])
    target, old = toy.items[toy.train[4]], histories(toy, toy.train[samples], 60)[0]
    new = [i for i in range(1, 61) if i not in old and i != target][:3]
    said_1I, penalty_I = np.full((1, 61), -50, np.float32), np.zeros(61, np.float32)
    said_1I[0, new], penalty_I[new[0]] = [3, 2, 1], 9
    prompts = SimpleNamespace(histories=lambda old: (None, None))
    r = SimpleNamespace(data=toy, history=6, settings=DEFAULTS, prompts=prompts)
    monkeypatch.setattr(export, "score_listed", lambda r, old, cand_BC, *_: said_1I[:, cand_BC[0]])
    monkeypatch.setattr(
        export, "over_catalogue", lambda r, tails, columns, f, *_: f(np.array([0]), said_1I)
    )
    listed = export.rows_of_lists(r, penalty_I, samples, np.array([new]), 2, alone)
    for (row,) in (listed, export.rows_over_catalogue(r, penalty_I, samples, 2, alone)):
        assert row[:2].tolist() == [new[1], new[2]]
        p = np.exp([2, 1, -6]) / np.exp([2, 1, -6]).sum()
        assert row[2:4] == pytest.approx(p[:2], rel=1e-4)


def test_a_backbone_has_nothing_to_export(sasrec, refused, on_cpu):
    assert "is a backbone" in refused(evaluate.main, f"--ckpt {sasrec} --export")
