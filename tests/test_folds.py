"""folds.py: what the next stages read of a training sample comes from a model without its user."""

import itertools
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import stopped_runs
import torch
from cycle import QUICK
from safetensors.torch import load_file
from stopped_runs import same, stop_and_resume

import distill
import finetune
import train_backbone
from delrec.backbone import folds, results
from delrec.backbone.models import load
from delrec.backbone.ranking import rank_all
from delrec.data.prepared import histories, users
from delrec.lm import items
from delrec.lm.questions import in_training, tasks_of
from delrec.lm.ragged import ragged
from delrec.lm.ranker import make_ranker
from delrec.runtime import load_run
from delrec.training import checkpoints

MEMORISE = "--width 48 --batch 16 --lr 3e-3 --epochs 30 --patience 30 --dropout 0 --history 8"


@pytest.fixture(scope="module")
def noise(make_data, tmp_path_factory):
    """80 users who take any of 60 items at any time: nothing but memory tells what comes next."""
    rng = np.random.default_rng(0)
    rows = [(u, int(rng.integers(1, 61)), u + 10 * t) for u in range(80) for t in range(14)]
    titles = {i: f"Film {i}" for i in range(1, 61)}
    return make_data(tmp_path_factory.mktemp("noise"), rows, titles)


@pytest.fixture(scope="module")
def folded(noise, run, tmp_path_factory):
    """A SASRec of the noise that answers out of fold. Validation says that every epoch is better
    than the one before, so it learns its samples by heart.
    """
    out, count = tmp_path_factory.mktemp("folded") / "sasrec", itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results.Protocol, "validate", lambda *_: {"val_ndcg@10": next(count)})
        run(train_backbone.main, f"--dataset {noise.folder} --out {out} {MEMORISE} --folds 4")
    return out


def first_is_truth(run_folder, data, split="train"):
    """How often the first of a list is the truth."""
    target_n = data.items[getattr(data, split)]
    return float((np.load(run_folder / f"topk_{split}.npy")[:, 0] == target_n).mean())


def test_what_a_model_memorised_is_not_said_out_of_fold(folded, noise):
    rates = load_run(folded).out_of_fold["rates"]["length"]
    assert rates["hr@1"]["in_sample"] > 0.6, rates
    assert rates["hr@1"]["out_of_fold"] < 0.05, rates
    assert first_is_truth(folded, noise) < 0.05
    assert rates["hr@1"]["closed"] > 0.8


def test_validation_and_test_are_answered_by_the_full_model(folded, noise, alone):
    got = rank_all(load(folded), noise, noise.test, alone, 20, states=True)
    assert (np.load(folded / "topk_test.npy") == got["list"]).all()
    stored = np.load(folded / "states_test.npy").astype(np.float32)
    np.testing.assert_allclose(stored, got["state"], rtol=2e-3, atol=2e-3)


def test_rotated_states_and_vectors_give_the_fold_s_own_lists(folded, noise):
    t = load_file(folded / "folds.safetensors")
    x_nE = torch.from_numpy(np.load(folded / "states_train.npy")).float()
    lists = np.load(folded / "topk_train.npy")
    fold_n = t["fold"].numpy()[users(noise, noise.train)]
    target_n = noise.items[noise.train]
    same = []
    for n, (x, f) in enumerate(zip(x_nE, fold_n)):
        s_I = t["item.weight"][f] @ x + t["bias"][f]
        s_I[0] = -torch.inf
        begin = noise.ptr[users(noise, noise.train[n : n + 1])[0]]
        s_I[noise.items[begin : noise.train[n]].tolist()] = -torch.inf
        same.append(int(s_I.argmax()) == lists[n, 0])
    assert np.mean(same) > 0.98  # states are stored in fp16
    assert len(set(fold_n)) == 4
    assert (target_n > 0).all()


def test_no_user_of_a_fold_trains_its_model(noise):
    fold_U = folds.folds_of_users(noise.n_users, 4, 0)
    sizes = np.bincount(fold_U)
    assert sizes.max() - sizes.min() <= 1
    met = []
    for f in range(4):
        rest = folds.without(noise, fold_U, f)
        left_out = np.setdiff1d(noise.train, rest.train)
        assert set(fold_U[users(noise, left_out)]) == {f}
        assert f not in fold_U[users(noise, rest.train)]
        met += left_out.tolist()
    assert sorted(met) == noise.train.tolist()


def test_a_rotation_is_found_again():
    g = torch.Generator().manual_seed(0)
    E = torch.randn(50, 8, generator=g)
    Q = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    turned, weight = E @ Q.T, torch.ones(50)
    turned[:25], weight[:25] = torch.randn(25, 8, generator=g), 0  # items that count for nothing
    found = folds.rotation(turned, E, weight)
    torch.testing.assert_close(found, Q, rtol=1e-4, atol=1e-4)


class Listed:
    """What gaps reads of a protocol."""

    def __init__(self, data):
        self.data, self.cand = data, {"train": {}, "val": {}}
        self.listed = np.arange(len(data.train))


def ranked(samples, is_hit):
    """What rank_all would say if the target stood first where is_hit, else tenth."""
    return {"full": np.stack([np.where(is_hit, 0, 9), np.zeros(len(samples), int)], 1)}


def test_the_gap_is_measured_at_validation_s_lengths(toy):
    """A rate that depends on nothing but the length is no gap, though lengths differ."""

    def got(split):
        samples = getattr(toy, split)
        return ranked(samples, samples - toy.ptr[users(toy, samples)] > 6)

    train, val = got("train"), got("val")
    row = folds.gaps(Listed(toy), 14, train, train, val)["length"]["hr@1"]
    assert row["in_sample"] == pytest.approx(row["val"], abs=1e-3)
    assert (train["full"][:, 0] == 0).mean() < (val["full"][:, 0] == 0).mean() - 0.2


def test_a_gap_that_is_of_the_targets_is_none_once_they_are_matched(toy):
    count_I = np.bincount(toy.items[toy.train], minlength=toy.n_items + 1)
    # in validation the rare ones come more often than in training
    rare = replace(toy, val=toy.val[count_I[toy.items[toy.val]] < 30])

    def got(split, own):
        samples = getattr(rare, split)
        return ranked(samples, count_I[toy.items[samples]] - own >= 10)

    train = got("train", own=1)
    tables = folds.gaps(Listed(rare), 14, train, train, got("val", own=0))
    by_length, by_both = (tables[k]["hr@1"] for k in ("length", "length and target"))
    assert by_both["in_sample"] == pytest.approx(by_both["val"], abs=1e-3)
    assert abs(by_length["in_sample"] - by_length["val"]) > 0.01


# ---------------------------------------------------------------- killed, refused


def test_a_run_that_was_stopped_in_a_fold_goes_on(cycle, tmp_path, monkeypatch):
    def args(out, *more):
        options = f"--dataset {cycle.folder} --out {out} {QUICK} --folds 2 --checkpoint-every 1"
        return [*options.split(), *map(str, more)]

    jobs = {"folds": (train_backbone.main, args)}
    said = stopped_runs.run(train_backbone.main, args(tmp_path / "whole"))
    assert "fold 2 of 2" in said
    # an epoch has 30 steps: the second of the first fold
    cut = stop_and_resume(jobs, "folds", tmp_path, monkeypatch, after=95)
    assert same(tmp_path / "whole", cut)


def test_the_seconds_of_a_run_that_was_stopped_in_a_fold_are_those_of_all_its_parts(
    cycle, tmp_path, monkeypatch
):
    out = tmp_path / "sasrec"
    args = f"--dataset {cycle.folder} --out {out} {QUICK} --folds 2".split()
    add = folds.Answers.add

    def signalled(*given, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return add(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(folds.Answers, "add", signalled)
        stopped_runs.run(train_backbone.main, args, checkpoints.STOPPED)
    # the full model and both folds, of which the second was begun, seem to take an hour more each
    found = checkpoints.Saver.load

    def an_hour_later(saver):
        step, tensors, state = found(saver)
        return step, tensors, state | {"seconds": state["seconds"] + 3600}

    monkeypatch.setattr(checkpoints.Saver, "load", lambda s: found(s) and an_hour_later(s))
    stopped_runs.run(train_backbone.main, [*args, "--resume"])
    assert 3 * 3600 < load_run(out).seconds < 3 * 3600 + 60


@pytest.mark.parametrize("where", ["rank_splits", "add"])
def test_a_signal_between_two_trainings_is_not_lost(cycle, tmp_path, monkeypatch, where):
    """It comes while the full model's lists are made, or those of the first fold."""
    out = tmp_path / "sasrec"
    args = f"--dataset {cycle.folder} --out {out} {QUICK} --folds 2".split()
    owner = results.Protocol if where == "rank_splits" else folds.Answers
    rank = getattr(owner, where)

    def signalled(*args, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        return rank(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, signalled)
        said = stopped_runs.run(train_backbone.main, args, checkpoints.STOPPED)
    assert "stopped as asked after step 1" in said and not checkpoints.asked
    fold = 0 if where == "rank_splits" else 1
    assert f"fold {fold + 1} of 2" in said
    assert checkpoints.complete(stopped_runs.kept_in(out) / f"fold-{fold}" / "checkpoints")
    assert "continuing from step 1" in stopped_runs.run(train_backbone.main, [*args, "--resume"])


def test_a_fold_without_a_listed_sample_has_its_vectors_all_the_same(cycle, run, tmp_path):
    out = tmp_path / "sasrec"
    few = f"{QUICK} --folds 4 --lists 2"  # at least two folds of them have none
    run(train_backbone.main, f"--dataset {cycle.folder} --out {out} {few}")
    listed = np.load(out / "topk_train.npy")[:, 0] > 0
    assert listed.sum() == 2 and len(load_file(out / "folds.safetensors")["bias"]) == 4
    assert np.isfinite(list(load_run(out).out_of_fold["rates"]["length"]["hr@1"].values())).all()


@pytest.mark.parametrize("options, said", [("--folds 1", "choose 2"), ("--folds 999", "choose 2")])
def test_folds_that_cannot_be_are_refused(cycle, refused, tmp_path, options, said):
    text = refused(
        train_backbone.main, f"--dataset {cycle.folder} --out {tmp_path / 'x'} {options}"
    )
    assert said in text


# ---------------------------------------------------------------- what the LM reads


def test_a_training_prompt_shows_its_fold_s_vectors(folded, noise, load):
    lm = load("decoder")
    try:
        items.load_items(lm, folded, noise.n_items)
        tables = lm.items.folds.tables.view(5, noise.n_items + 1, -1)
        assert torch.equal(tables[0], lm.items.E)
        user = np.array([0, 1, 2, 3])
        table_B = items.table_of(lm, user)
        assert (table_B == lm.items.folds.fold_U[user] + 1).all()
        for table in table_B:
            tail = items.in_tables(lm, ragged([[7, -100 - 5, -2]]), np.array([table]))[0]
            assert (tail[[0, 2]] == [7, -2]).all()
            vector = lm.items.folds.tables[-100 - tail[1]]
            assert torch.equal(vector, tables[table, 5])
        e_NE = torch.randn(4, tables.shape[2])
        s_NI = items.scores_in_tables(lm, e_NE, table_B)
        for s_I, e, table in zip(s_NI, e_NE, table_B):
            torch.testing.assert_close(s_I, tables[table, 1:] @ e)
    finally:
        lm.items = None


@pytest.mark.parametrize("over", ["candidates", "catalogue"])
def test_temporal_analysis_never_reads_the_vectors_fitted_to_its_answers(folded, noise, load, over):
    lm = load("decoder")
    texts = {"history": 8, "max_title": 32, "max_tokens": 1024, "order": "shuffled"}
    scores = {"verbalizer": "items", "show": False, "backbone": "SASRec", "input": "ids"}
    cfg = SimpleNamespace(a=4, C=9, rps_candidates="random")
    try:
        items.load_items(lm, folded, noise.n_items)
        r = make_ranker(lm, noise, texts | scores | {"backbone_run": ""})
        samples = noise.train[:40]
        ta, _ = tasks_of(r, samples, np.ones((40, 3), int), cfg, 0, ("ta",))
        asked = in_training(r, ta)
        loss = distill.Asked(r, "ta", over).loss(asked).item()
        folds = lm.items.folds
        own = folds.tables.view(5, noise.n_items + 1, -1)
        # the same by hand, user by user, with the fold's vectors in the full model's place
        want = 0.0
        for question, plain in zip(asked, ta):
            assert question.table == folds.fold_U[users(noise, np.array([plain.sample]))[0]] + 1
            lm.items = replace(lm.items, E=own[question.table], folds=None)
            want += distill.Asked(r, "ta", over).loss([plain]).item()
        lm.items = replace(lm.items, E=torch.randn_like(own[0]), folds=folds)
        folds.tables[: noise.n_items + 1] = lm.items.E  # the full model's vectors do not matter
        assert distill.Asked(r, "ta", over).loss(asked).item() == loss
        assert loss == pytest.approx(want, rel=1e-4)
    finally:
        lm.items = None


def test_both_stages_train_on_the_folds_vectors(folded, noise, decoder, run, on_cpu, tmp_path):
    small = f"--dataset {noise.folder} --llm {decoder} --backbone {folded} --input ids --history 6"
    small += " --batch 8 --micro 4 --samples 48 --val-samples 20 --evals 1"
    run(distill.main, f"{small} --k 4 --a 3 --h 3 --candidates 10 --out {tmp_path / 'prompt'}")
    adapters = "--init-r 4 --target-r 2 --dropout 0"
    run(
        finetune.main,
        f"{small} {adapters} --soft-prompt {tmp_path / 'prompt'} --out {tmp_path / 'delrec'}",
    )
    # served by the full model's vectors alone
    kept = load_file(tmp_path / "delrec" / "items.safetensors")
    assert torch.equal(kept["E"], items.item_vectors(folded, noise.n_items))
    assert len(histories(noise, noise.test[:1], 6))
