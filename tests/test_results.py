"""results.py: the lists and scores that a conventional model leaves for the next stages."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import metrics_of
from cycle import N_ITEMS, QUICK
from scripts import sentence

from delrec.backbone import models
from delrec.backbone.ranking import best_items, rank_all
from delrec.backbone.results import begin_at_popularity
from delrec.data.prepared import candidates, histories, users, with_lists
from delrec.runtime import load_run

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def short(train_on_cycle, tmp_path_factory):
    """A short SASRec run, dropout 0: .out, .json and what was printed, .said."""
    out = tmp_path_factory.mktemp("runs") / "sasrec"
    result = train_on_cycle(out, f"{QUICK} --dropout 0")
    return SimpleNamespace(out=out, json=result.json, said=result.output)


def starts(data, samples):
    """Where the histories of some samples begin in data.items."""
    return data.ptr[users(data, samples)]


# ---------------------------------------------------------------- what a run leaves


def test_lists_and_scores_have_their_shapes(cycle, short):
    for s in SPLITS:
        top = np.load(short.out / f"topk_{s}.npy")
        assert top.shape == (len(getattr(cycle, s)), 20)
        assert top.dtype == np.int32
    for s in ("val", "test"):
        n = len(getattr(cycle, s))
        full = np.load(short.out / f"full_{s}.npy")
        assert full.shape == (n, 2)
        assert full.dtype == np.int32
        assert (full >= 0).all()
        for C in cycle.meta["candidates"]:
            scores = np.load(short.out / f"scores_{s}_{C}.npy")
            assert scores.shape == (n, C)
            assert scores.dtype == np.float32
            assert np.isfinite(scores).all()


@pytest.mark.parametrize("split", ["val", "test"])
def test_chance_over_all_items_leaves_out_what_the_user_had(cycle, short, split):
    samples = getattr(cycle, split)
    earlier = [cycle.items[s:e] for s, e in zip(starts(cycle, samples), samples)]
    left_n = [N_ITEMS - len(set(old) - {cycle.items[e]}) for old, e in zip(earlier, samples)]
    (row,) = [line for line in short.said.splitlines() if line.startswith(f"chance {split} full")]
    hr_1, _, hr_10 = map(float, row.split()[3:6])
    assert hr_10 == pytest.approx(np.mean([10 / n for n in left_n]), abs=1e-4) and hr_10 > 0.105
    assert hr_1 == pytest.approx(np.mean([1 / n for n in left_n]), abs=1e-4)


def test_a_run_says_how_good_it_is_and_how_it_was_made(cycle, short):
    written = metrics_of(short.out)
    assert written["protocol"]
    assert {"candidates15", "full"} <= set(written["val"])
    assert {"candidates15", "full"} <= set(written["test"])
    config = load_run(str(short.out), cycle, ["train_backbone"])
    assert (config.model, config.lr, config.history) == ("sasrec", 1e-3, 8)
    assert config.n_items == N_ITEMS
    measured = {"val_hr@1", "val_ndcg@10", "test_hr@1", "test_ndcg@10", "test_full_ndcg@10"}
    about = {"stage", "out", "seconds", "epochs_run", "samples_per_second", "peak_gb"}
    assert measured | about <= set(short.json)
    # the untrained model
    assert json.loads((short.out / "log.jsonl").read_text().splitlines()[0])["step"] == 0


def test_lists_hold_no_history_no_padding_no_item_twice(cycle, short):
    for s in SPLITS:
        samples, lists = getattr(cycle, s), np.load(short.out / f"topk_{s}.npy")
        for row, n, begin in zip(lists, samples, starts(cycle, samples)):
            assert len(set(row)) == 20
            assert row.min() >= 1
            assert not set(row) & set(cycle.items[begin:n].tolist())


def test_a_loaded_run_gives_what_was_stored(cycle, short):
    model = models.load(str(short.out))
    with torch.no_grad():
        # longer than its window
        score = models.score(model, histories(cycle, cycle.test, 30)).numpy()
    picked = np.take_along_axis(score, candidates(cycle, "test", 15), 1)
    np.testing.assert_allclose(picked, np.load(short.out / "scores_test_15.npy"), atol=1e-5)
    own = score[np.arange(len(score)), cycle.items[cycle.test]].copy()
    for row, n, b in zip(score, cycle.test, starts(cycle, cycle.test)):
        row[cycle.items[b:n]] = -np.inf
    # a repeated target stays in the ranking
    score[np.arange(len(score)), cycle.items[cycle.test]] = own
    greater = (score > own[:, None]).sum(1)
    stored = np.load(short.out / "full_test.npy")
    assert np.abs(stored[:, 0] - greater).max() <= 1
    assert (stored[:, 0] == greater).mean() > 0.99


def test_lists_for_some_training_samples_only(cycle, train_on_cycle, tmp_path):
    whole_run, some_run = tmp_path / "all", tmp_path / "some"
    train_on_cycle(whole_run, f"{QUICK} --dropout 0")
    train_on_cycle(some_run, f"{QUICK} --dropout 0 --lists 50")
    some, whole = (np.load(out / "topk_train.npy") for out in (some_run, whole_run))
    has = with_lists(some_run, cycle)
    assert len(has) == 50
    assert len(with_lists(whole_run, cycle)) == len(cycle.train) == len(some)
    assert (some[has] == whole[has]).all()
    assert not np.delete(some, has, 0).any()
    scores = np.load(some_run / "scores_train_15.npy")
    assert np.isfinite(scores[has]).all()
    assert np.isnan(np.delete(scores, has, 0)).all()
    for name in ("scores_test_15.npy", "full_val.npy", "topk_test.npy"):
        assert (np.load(some_run / name) == np.load(whole_run / name)).all()


# ---------------------------------------------------------------- the pieces


def test_best_items_orders_ties_by_id_and_fills_with_0():
    none = -torch.inf
    tied = [none, -1.0, 2.0, -0.0, 0.0, 2.0, -3.0]
    few = [none, none, 5.0, none, none, none, -9.0]
    assert best_items(torch.tensor([tied, few]), 5).tolist() == [[2, 5, 3, 4, 1], [2, 6, 0, 0, 0]]


def test_a_target_that_the_user_had_before_is_ranked_and_not_listed(alone):
    data = SimpleNamespace(items=np.array([1, 2, 1]), ptr=np.array([0, 3]), n_items=4)
    model = models.build("sasrec", 4, SimpleNamespace(history=2, width=4, dropout=0))
    model.bias.data = torch.tensor([0.0, 5, 9, 7, 6])
    found = rank_all(model, data, np.array([2]), alone, h=4)
    # items 3 and 4 are better than the target, item 2 is masked
    assert found["full"].tolist() == [[2, 0]]
    assert found["list"].tolist() == [[3, 4, 0, 0]]


def test_scores_that_are_not_finite_may_be_the_rate_s_fault_or_the_model_s(alone):
    data = SimpleNamespace(items=np.array([1, 2, 1]), ptr=np.array([0, 3]), n_items=4)
    model = models.build("sasrec", 4, SimpleNamespace(history=2, width=4, dropout=0))
    model.norm.weight.data.fill_(torch.nan)
    said = sentence(rank_all, model, data, np.array([2]), alone)
    assert "a smaller train_backbone.py --lr" in said and "its forward may give NaN" in said


@pytest.mark.parametrize("loss, more", [("ce", 1), ("gbce", 0.625 / 2)])
def test_biases_begin_where_the_loss_has_its_optimum_without_a_history(loss, more):
    # alpha = 2 / 4, so beta = .5 (.75 (1 - 2) + 2) = .625, and an item is drawn twice as often
    data = SimpleNamespace(items=np.array([1, 1, 3]), train=np.arange(3), n_items=5)
    model = SimpleNamespace(bias=torch.nn.Parameter(torch.zeros(6)))
    begin_at_popularity(model, data, SimpleNamespace(loss=loss, negatives=2))
    want = np.array([3, 1, 2, 1, 1]) / 9 * 5 * more
    np.testing.assert_allclose(model.bias[1:].detach().exp(), want, rtol=1e-5)
