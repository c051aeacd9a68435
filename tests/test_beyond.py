"""What stands beside accuracy: debiased rates, lists, clean targets, by hand and in a table."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from delrec.data import counts
from delrec.data.prepared import users
from delrec.evaluation import beyond
from delrec.lm.ranker import best_items
from delrec.metrics import metrics


def test_the_twenty_targets_of_the_hit_item_weigh_three_tenths():
    count = [1, 1, 2, 3, 3, 4, 20]
    target = np.repeat(np.arange(1, 8), count)
    weight, border = beyond.debiasing_weights(target, np.arange(34))
    assert border == 6 and weight[target == 7] == pytest.approx(0.3)
    assert (weight[target < 7] == 1).all()
    # right on the hit item alone: 20 of 34, but 6 of 20 once it is weighed
    hit = (target == 7).astype(float)
    found = beyond.accuracy(hit, weight, None)
    assert found == {"hr@1_debiased": pytest.approx(6 / 20)}


def test_debiased_and_clean_are_the_same_metrics_of_fewer_samples():
    """How many test users have a target, and whether ties are many, is counted over the whole test
    part, not over the samples that --limit draws: 34 users, an item before and a target each.
    """
    target = np.repeat(np.arange(1, 8), [1, 1, 2, 3, 3, 4, 20])
    items, times = np.zeros(68, int), np.arange(68)
    items[::2], items[1::2] = 8, target
    times[1::2] -= target == 7  # the twenty of the hit item have the time before
    places = {"ptr": np.arange(0, 69, 2), "train": np.arange(0, 68, 2), "test": np.arange(1, 68, 2)}
    data = SimpleNamespace(items=items, times=times, n_items=8, n_users=34, **places)
    which = np.array([0, 5, 9, 33])  # one of them is a user of the hit item
    hit = np.array([0.0, 0, 0, 1])
    found = beyond.beyond({}, {"popularity": {"hr@1": hit}}, {}, data, which)
    assert found["border"] == 6 and found["thinned"] == 1 / 4
    assert found["rows"]["popularity"]["hr@1_debiased"] == pytest.approx(0.3 / 3.3)
    assert found["clean"] == {"n": 3, "share": 3 / 4}
    alone = beyond.beyond({}, {"popularity": {"hr@1": hit[:3]}}, {}, data, which[:3])
    assert alone["border"] == 6 and alone["clean"] == {"n": 3, "share": 1}
    data.ptr, data.n_users = np.array([0, 68]), 1  # one user has them all: no item is a hit
    assert beyond.beyond({}, {"popularity": {"hr@1": hit}}, {}, data, which)["thinned"] == 0


def test_an_item_that_one_user_has_again_and_again_is_no_hit():
    target = np.r_[np.repeat(np.arange(1, 7), [1, 1, 2, 3, 3, 4]), np.full(20, 7)]
    user = np.r_[np.arange(14), np.full(20, 99)]
    assert (beyond.debiasing_weights(target, user)[0] == 1).all()


def test_gini_by_hand():
    assert beyond.gini(np.array([2, 2, 2, 2])) == 0
    assert beyond.gini(np.array([0, 4, 0, 0])) == pytest.approx(3 / 4)
    assert beyond.gini(np.array([3, 1])) == pytest.approx(1 / 4)


def test_coverage_and_share_of_popular_items_by_hand():
    # training: item 1 five times, item 2 three, item 3 twice; item 4 never
    items = np.repeat([1, 2, 3, 4], [5, 3, 2, 1])
    data = SimpleNamespace(
        items=items, n_items=4, n_users=1, ptr=np.array([0, 11]), train=np.arange(1, 10)
    )
    list_nK = np.array([[1, 2], [1, 2], [3, 0]])
    found = beyond.of_lists(list_nK, data, user=np.array([0, 0, 1]))
    assert found["coverage"] == 3 / 4
    # user 0: (.5 + .3) / 2, user 1: .2, whose list holds one item
    assert found["arp"] == pytest.approx((0.4 + 0.2) / 2)
    assert found["gini"] == pytest.approx(beyond.gini(np.array([2, 2, 1, 0])))


def test_clean_targets_are_told_apart_where_ties_are_many():
    times = np.array([0, 0, 5, 5, 9])
    data = SimpleNamespace(times=times)
    clean = beyond.clean_targets(data, np.array([1, 2, 3, 4]))
    assert clean.tolist() == [False, True, False, True]
    assert beyond.clean_targets(data, np.array([2, 4])) is None
    assert beyond.clean_targets(SimpleNamespace(times=None), np.array([1])) is None


def test_the_best_items_come_first_and_what_is_masked_is_no_item():
    score = np.random.default_rng(0).normal(size=(6, 40)).round(1).astype(np.float32)
    score[:, 0] = -np.inf
    score[3, 5:] = -np.inf
    best = best_items(score)
    for row, s in zip(best, score):
        right = [i for i in np.argsort(-s, kind="stable")[:10] if s[i] > -np.inf]
        assert sorted(s[row[row > 0]]) == sorted(s[right])
        assert (np.diff(s[row[row > 0]]) <= 0).all() and 0 not in row[: len(right)]
    assert sorted(best[3]) == [0] * 6 + [1, 2, 3, 4]


@pytest.fixture
def table(toy, backbone, script, on_cpu, tmp_path):
    """metrics.json of a backbone whose ties are many, and where its tables stand."""
    data = shutil.copytree(toy.folder, tmp_path / "toy")
    times = np.array(toy.times)
    times[toy.test[::2]] = times[toy.test[::2] - 1]  # every second test target
    np.save(data / "times.npy", times)
    out = tmp_path / "out"
    args = ["--dataset", data, "--candidates", 15, "--out", out, "--report", out / "page.html"]
    script(evaluate.main, "--ckpt", backbone, *args)
    return SimpleNamespace(found=json.loads((out / "metrics.json").read_text()), out=out)


def test_a_table_says_what_its_lists_show(table, toy, backbone):
    row = table.found["beyond"]["rows"]["sasrec"]
    lists = np.load(backbone / "topk_test.npy")[:, :10]
    assert row["coverage"] == len(set(lists.ravel()) - {0}) / toy.n_items
    greater, equal = np.load(backbone / "full_test.npy").T
    hit = metrics(greater, equal)["hr@10"]
    assert row["hr@10"] == pytest.approx(hit.mean())
    weight, _ = beyond.debiasing_weights(toy.items[toy.test], users(toy, toy.test))
    assert row["hr@10_debiased"] == pytest.approx((weight * hit).sum() / weight.sum())
    # the backbone ranks by popularity: its lists are as popular as any can be
    popular = table.found["beyond"]["rows"]["popularity"]
    assert row["arp"] == pytest.approx(popular["arp"], rel=0.05)
    assert popular["hr@10"] == pytest.approx(table.found["full"]["popularity"]["hr@10"])
    assert row["arp"] > (counts.popularity(toy) / counts.popularity(toy).sum())[1:].mean() * 1.2
    assert "coverage" not in table.found["beyond"]["rows"]["co-occurrence"]


def test_clean_targets_have_a_column_of_their_own(table, toy, backbone):
    found = table.found["beyond"]
    n = len(toy.test)
    assert found["clean"] == {"n": n // 2, "share": pytest.approx(n // 2 / n)}
    ranks = np.load(backbone / "ranks_test_15.npy")
    hit = found["rows"]["sasrec"]["hr@1_clean"]
    assert hit == pytest.approx((ranks[1::2] == 1).mean())
    assert found["rows"]["chance"]["hr@1_clean"] == pytest.approx(1 / 15)
    text = (table.out / "table.txt").read_text()
    assert "HR@1 of 15 clean" in text and "coverage@10" in text and "clean: the" in text
    assert "Beside accuracy" in (table.out / "page.html").read_text()


def test_without_ties_there_is_no_column_of_clean_targets(toy, backbone, script, on_cpu, tmp_path):
    script(evaluate.main, "--ckpt", backbone, "--limit", 40, "--out", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())["beyond"]
    assert found["clean"] is None and "hr@1_clean" not in found["rows"]["sasrec"]
    assert "clean" not in (tmp_path / "table.txt").read_text().split("beside accuracy")[1]


def test_lists_that_are_too_short_leave_the_cells_empty(toy, backbone, script, on_cpu, tmp_path):
    short = shutil.copytree(backbone, tmp_path / "short")
    np.save(short / "topk_test.npy", np.load(short / "topk_test.npy")[:, :7])
    script(evaluate.main, "--ckpt", short, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "coverage" not in found["beyond"]["rows"]["short"]
    assert "hr@10_debiased" in found["beyond"]["rows"]["short"]
