"""prepare.py --audit: what is planted in a log is found, what is not there is not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from logs import prepared, run, toy, write
from pictures import drawing

from delrec.data import counts, drift, order
from delrec.data.audit import popularity_block
from delrec.data.prepared import candidates, histories
from delrec.metrics import metrics

DAY = 86_400
BEGIN = 1_400_000_000  # 2014


def walks(users=90, items=60, steps=12):
    """Everybody begins anywhere and takes the next number, in a circle."""
    rng = np.random.default_rng(0)
    rows = []
    for u in range(users):
        first, when = rng.integers(0, items), np.sort(rng.choice(10_000, steps, replace=False))
        rows += [(u, (first + n) % items + 1, BEGIN + 60 * t) for n, t in enumerate(when)]
    return rows


def tastes(users=450, steps=8):
    """Everybody takes eight of the ten things of his group, in any order."""
    rng = np.random.default_rng(0)
    rows = []
    for u in range(users):
        when = np.sort(rng.choice(10_000, steps, replace=False))
        liked = rng.permutation(10)[:steps] + 10 * (u % 6) + 1
        rows += [(u, i, BEGIN + 60 * t) for i, t in zip(liked, when)]
    return rows


def pages(descending=False):
    """Everybody has three moments, in each of them eight items, by number in the file."""
    rng, rows = np.random.default_rng(0), []
    for u in range(150):
        for when in np.sort(rng.choice(10_000, 3, replace=False)):
            items = sorted(rng.choice(60, 8, replace=False) + 1, reverse=descending)
            rows += [(u, i, BEGIN + 60 * when) for i in items]
    return rows


def audited(tmp_path, rows, *args, **kwargs):
    """(audit.json, what was printed) of a log that was prepared with --audit."""
    data, output = prepared(tmp_path, rows, "--audit", *args, **kwargs)
    return json.loads((data.folder / "audit.json").read_text()), output


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return audited(tmp_path_factory.mktemp("walk"), walks())


@pytest.fixture(scope="module")
def taste(tmp_path_factory):
    return audited(tmp_path_factory.mktemp("taste"), tastes())


# ---------------------------------------------------------------- order


def test_shuffling_destroys_a_planted_order(walk):
    found, output = walk
    two = found["rules"]["two"]
    assert two["rules"] == 60 and two["change"] < -0.95
    whole = found["shuffling"]["variants"]["whole history"]
    for metric in ("hr@1", "hr@10", "ndcg@10"):
        assert whole[metric]["after"] <= whole[metric]["before"]
    assert whole["ndcg@10"]["after"] < 0.8 * whole["ndcg@10"]["before"]
    assert whole["ndcg@10"]["p"] < 0.01 and whole["jaccard"] < 1
    assert whole["long"]["ndcg@10"]["p"] < 0.01
    assert "the order holds them" in output
    assert "no loss is seen: no order" not in output


def test_without_an_order_nothing_is_lost(taste):
    found, output = taste
    two = found["rules"]["two"]
    assert two["rules"] > 20 and abs(two["change"]) < 0.3
    for name, variant in found["shuffling"]["variants"].items():
        for metric in ("hr@1", "hr@10", "ndcg@10"):
            assert variant[metric]["p"] > 0.01, (name, metric)
    assert "it is little more than popularity" in output and "no loss is seen" in output


def test_ties_by_item_id_give_the_next_item_away(tmp_path):
    found, output = audited(tmp_path, pages(), ties="shuffled")
    right = found["ties"]["next_id"]
    assert right["file"] == right["item"] > 0.25 and right["shuffled"] < 0.12
    assert 0.8 < found["ties"]["share"] < 0.9 and found["ties"]["share_test"] > 0.8
    assert "ties by item id and as in the file give the answer away" in output
    # a file that stands the other way round gives nothing to this rule
    found, output = audited(tmp_path / "down", pages(descending=True), ties="shuffled")
    right = found["ties"]["next_id"]
    assert right["item"] > 0.25 and right["file"] < 0.05
    assert "ties by item id give the answer away" in output


def test_ties_as_in_the_file_keep_its_order(tmp_path):
    rows = [(u, i, 7) for u in (1, 2) for i in (3, 40, 5, 22)]
    rows += [(3 + i % 4, i, i) for i in range(1, 41)]
    data, _ = prepared(tmp_path, rows, ties="file")
    assert data.items[: data.ptr[2]].tolist() == [3, 40, 5, 22] * 2
    data, _ = prepared(tmp_path / "by id", rows, ties="item")
    assert data.items[: data.ptr[2]].tolist() == [3, 5, 22, 40] * 2


def test_rules_by_hand():
    # 1 2 3 six times, 1 4 fifty-four times: 1 -> 2 has 6 of 60 = .1, which is not over .1
    item = np.array([1, 2, 3] * 6 + [1, 4] * 54)
    user = np.repeat(np.arange(60), [3] * 6 + [2] * 54)
    assert order.count_rules(item, user) == (2, 1)  # 2 -> 3, 1 -> 4; 1 2 -> 3
    assert order.count_rules(item[3:], user[3:]) == (1, 0)  # five times 1 2 3 are too few


def test_six_of_ten_shared_items_are_6_of_14():
    a, b = np.arange(1, 11)[None], np.r_[np.arange(1, 7), np.arange(21, 25)][None]
    assert order.jaccard(a, b)[0] == pytest.approx(6 / 14)
    assert order.jaccard(a * 0, a * 0)[0] == 1 and order.jaccard(a, a * 0)[0] == 0


def test_each_variant_changes_what_it_says(toy):
    sample = np.asarray(toy.test)[:40]
    whole, but_last, swapped = (
        order.windows_of(toy, sample, change, L=14) for change in order.VARIANTS.values()
    )
    real = order.windows_of(toy, sample, None, L=14)
    assert np.array_equal(real, histories(toy, sample, 14))
    for changed in (whole, but_last, swapped):
        assert np.array_equal(np.sort(changed, 1), np.sort(real, 1))
    assert (whole[:, -1] != real[:, -1]).any()
    assert (but_last[:, -1] == real[:, -1]).all() and (but_last != real).any()
    two = real[:, -2] > 0
    assert np.array_equal(swapped[two, -2:], real[two, :-3:-1])
    assert np.array_equal(swapped[:, :-2], real[:, :-2])


def test_the_catalogue_is_scored_as_candidates_are(toy):
    samples, cand = np.asarray(toy.test)[:30], candidates(toy, "test", 15)[:30]
    near = counts.neighbours_of(counts.near_in_training(toy))
    score = counts.scores_of_catalogue(near, histories(toy, samples, 10))
    of_candidates = counts.cooccurrence(toy, samples, cand)
    np.testing.assert_allclose(np.take_along_axis(score, cand, 1), of_candidates, rtol=1e-5)
    assert of_candidates.max() > 0
    value, top = order.answers(toy, near, samples, cand, histories(toy, samples, 10))
    for n, (sample, s) in enumerate(zip(samples, score.copy())):
        begin = toy.ptr[np.searchsorted(toy.ptr, sample, side="right") - 1]
        own = s[toy.items[sample]]
        s[toy.items[begin:sample]] = s[0] = -np.inf
        assert set(top[n]) - {0} == {i for i in np.argsort(-s)[:10] if s[i] > 0}
        hit = metrics([(s > own).sum()], [(s == own).sum() - 1])["hr@10"][0]
        assert value[n, 1] == pytest.approx(hit)


# ---------------------------------------------------------------- time


def small(items, times, ptr, **parts):
    items, times = np.array(items), np.array(times)
    return SimpleNamespace(
        items=items,
        times=times,
        ptr=np.array(ptr),
        n_items=int(items.max()),
        n_users=len(ptr) - 1,
        **{part: np.array(index) for part, index in parts.items()},
    )


def test_leave_one_out_s_future_by_hand():
    # training: user 0 item 1 at 1; user 1 item 4 at 1, item 3 at 4. Targets: item 3 at 3, 6 at 6
    data = small([1, 2, 3, 4, 3, 5, 6], [1, 2, 3, 1, 4, 5, 6], [0, 3, 7])
    assert drift.future_of(data) == pytest.approx({"any": 1 / 2, "share": 1 / 6, "item": 1 / 2})


def test_gaps_and_repeats_by_hand():
    data = small([1, 1, 2, 1, 3, 3], BEGIN + np.array([0, 0, 60, 7200, 5, 65]), [0, 4, 6])
    data.test = np.array([3, 5])
    gaps = drift.gaps_of(data)
    assert gaps["unit"] == 1 and gaps["zero"] == 1 / 4 and gaps["session"] == 3 / 4
    assert gaps["deciles"][4] == 60 and gaps["life"] == (7200 + 60) / 2 and not gaps["days_only"]
    repeats = drift.repeats_of(data)
    assert repeats == pytest.approx({"all": 3 / 6, "test": 1, "at_once": 2 / 6})
    data.times = data.times // DAY * DAY
    assert drift.gaps_of(data)["days_only"]
    assert drift.seconds_of(np.array([BEGIN * 1000])) == 1e-3
    assert drift.seconds_of(np.array([17])) is None


def test_cold_samples_by_hand():
    data = small([1, 2, 3, 1, 2, 5], [1, 2, 9, 3, 8, 9], [0, 3, 6], val=[4], test=[2, 5])
    data.meta = {"split": "temporal", "cuts": [3, 9]}  # training: items 1, 2 of user 0
    assert drift.cold_of(data) == {
        "val": {"users": 1, "items": 0},
        "test": {"users": 0.5, "items": 1},
    }
    data.meta = {"split": "leave-one-out", "cuts": None}  # training: item 1 of both
    assert drift.cold_of(data) == {
        "val": {"users": 0, "items": 1},
        "test": {"users": 0, "items": 1},
    }


def test_cold_targets_are_those_that_the_preparation_counted(tmp_path):
    for split in ("temporal", "leave-one-out"):
        data, _ = prepared(tmp_path / split, toy(), "--split", split)
        for part, v in drift.cold_of(data).items():
            assert v["items"] == data.meta["cold"][part] / data.meta["samples"][part]


def test_rank_correlation_by_hand():
    assert drift.rank_correlation(np.array([10, 20, 90]), np.array([1, 9, 2])) == pytest.approx(0.5)
    assert drift.rank_correlation(np.array([3, 1, 2]), np.array([9, 5, 7])) == pytest.approx(1)
    # equal values at their mean rank: 1.5 1.5 3 against 1 2 3
    half = drift.rank_correlation(np.array([4, 4, 8]), np.array([1, 2, 3]))
    assert half == pytest.approx(np.sqrt(3) / 2)
    assert drift.rank_correlation(np.ones(3), np.arange(3)) == 0


def test_a_new_fashion_is_found_by_recent_popularity(tmp_path):
    rng, rows = np.random.default_rng(0), [(900 + i // 9, i, BEGIN) for i in range(1, 81)]
    for u in range(100):
        days = np.sort(rng.integers(0, 100, 12))
        # from day 70 on other items are liked
        rows += [
            (u, rng.integers(1, 11) + 40 * (d >= 70), BEGIN + DAY * int(d) + k)
            for k, d in enumerate(days)
        ]
    found, output = audited(tmp_path, rows)
    popularity = found["popularity"]
    assert popularity["recent"] > popularity["overall"] + 0.2 and popularity["p"] < 0.01
    first, _, both = popularity["thirds"]
    assert both < first - 0.1
    assert "the recent one is the floor" in output


def test_a_p_that_shows_nothing_is_not_said_to_show_equality():
    found = {"top_1": 0.1, "top_10": 0.2, "thirds": None, "recent_count": 40}

    def means(overall, recent, p):
        return popularity_block(found | {"overall": overall, "recent": recent, "p": p}).means

    for recent in (0.06, 0.07, 0.08):
        said = means(0.07, recent, 0.8)
        assert "no difference is shown" in said and "p=0.8" in said and "no better" not in said
    assert "the recent one is the floor" in means(0.07, 0.08, 0.01)
    assert "a lower floor" in means(0.07, 0.06, 0.01)


# ---------------------------------------------------------------- the page

BLOCKS = (
    "1. ties",
    "2. rules of what comes next",
    "3. histories shuffled",
    "4. gaps",
    "5. cold users and items",
    "6. repeats",
    "7. leave-one-out against the clock",
    "8. popularity",
)


def test_the_page_has_every_block_and_says_what_each_means(tmp_path):
    with drawing():
        data, output = prepared(tmp_path, walks(), "--audit")
    lines = output.splitlines()
    assert [line for line in lines if line in BLOCKS] == list(BLOCKS)
    assert sum(line.startswith("   => ") for line in lines) == len(BLOCKS)
    assert data.meta["hash"] in output and "nothing is trained here" in output
    assert (data.folder / "audit.png").read_bytes()[:4] == b"\x89PNG"
    # a prepared folder with its page is still one: the same command prepares nothing anew
    again = run("toy", "--raw", tmp_path / "raw", "--out", data.folder, "--core", 1, "--audit")
    assert "1. ties" in again.output or "holds another preparation" in again.output


@pytest.mark.parametrize("split", ["temporal", "leave-one-out"])
def test_every_kind_of_log_has_a_page(tmp_path, split):
    found, output = audited(tmp_path, toy(), "--split", split)
    assert "the unit of the times is not known" in output
    assert found["future"] and "recent" not in found["popularity"]


def test_a_log_without_times_says_so(tmp_path):
    found, output = audited(tmp_path, toy(), header="user,item,position")
    assert found["gaps"] is found["future"] is found["popularity"]["thirds"] is None
    assert "only an order is known, as published" in output
    assert list(found["ties"]["next_id"]) == ["untied"]
    raw = write(tmp_path / "raw", toy(), header="user,item,position")
    refused = run("toy", "--raw", raw, "--out", tmp_path / "x", "--audit", "--split", "temporal")
    assert refused.exit_code == 1 and "needs a timestamp on every row" in refused.output
