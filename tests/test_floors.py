"""Floors and fusion worked by hand, and groups of samples."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from delrec.data import counts, floors
from delrec.data.prepared import candidates, histories, users
from delrec.evaluation.groups import groups_of
from delrec.evaluation.rows import Row, add_fused
from delrec.metrics import compare, metrics


def three_titles():
    return SimpleNamespace(titles=["", "Red car", "RED boat!", "blue sky", "car, car"])


def test_title_similarity_by_hand():
    # document frequency: red 2, car 2, boat 1, blue 1, sky 1 of 4 titles; idf = log(5 / (1 + df))
    two, one = math.log(5 / 3), math.log(5 / 2)
    cand = np.array([[1, 2, 3, 4]])
    red_boat = two * two / (math.hypot(two, two) * math.hypot(two, one))
    score = floors.similarity_to(three_titles(), np.array([[0, 1]]), cand)
    # 'car, car' points where 'car' does
    assert score[0].tolist() == pytest.approx([1, red_boat, 0, math.sqrt(0.5)], abs=1e-6)
    # 'blue sky' then 'Red car': the older one weighs .8, the profile's length is hypot(.8, 1)
    score = floors.similarity_to(three_titles(), np.array([[0, 3, 1]]), cand)
    assert score[0].tolist() == pytest.approx(
        [
            1 / math.hypot(0.8, 1),
            red_boat / math.hypot(0.8, 1),
            0.8 / math.hypot(0.8, 1),
            math.sqrt(0.5) / math.hypot(0.8, 1),
        ],
        abs=1e-6,
    )
    # no history, no similarity
    assert not floors.similarity_to(three_titles(), np.array([[0, 0]]), cand).any()


def test_title_similarity_goes_in_chunks(toy, monkeypatch):
    old, cand = histories(toy, toy.test[:30], 10), candidates(toy, "test", 15)[:30]
    whole = floors.similarity_to(toy, old, cand)
    monkeypatch.setattr(floors, "CHUNK", 7)
    np.testing.assert_allclose(floors.similarity_to(toy, old, cand), whole, atol=1e-6)
    assert whole.min() >= 0 and whole.max() <= 1 + 1e-6 and whole.std() > 0.05


def test_how_often_a_target_came_right_after_the_last_item_by_hand():
    # users 1 2 | 1 2 1 | 2 1 2; the second half of each is not training, but for the middle user
    items = np.array([1, 2, 3, 1, 2, 1, 2, 1, 2], np.int32)
    data = SimpleNamespace(
        items=items,
        ptr=np.array([0, 3, 6, 9]),
        n_users=3,
        n_items=3,
        train=np.array([1, 4, 5]),
    )
    # training pairs: 1 2 (twice), 2 1; 2 3 is a test pair, and no pair joins two users
    assert counts.times_next(data, np.array([1, 2, 5, 7, 8])).tolist() == [2, 0, 1, 1, 2]


def test_without_a_pair_in_training_none_was_seen():
    data = SimpleNamespace(
        items=np.array([1, 2], np.int32), ptr=np.array([0, 2]), n_users=1, n_items=2
    )
    data.train = np.zeros(0, np.int64)
    assert counts.times_next(data, np.array([1])).tolist() == [0]


def test_popularity_counts_training_only(toy):
    found = counts.popularity(toy)
    # targets stand in order: the last one of each user remains
    last = {u: s for u, s in zip(users(toy, toy.train), toy.train)}
    # a user's first item is no target, but training all the same
    read = [toy.items[s] for u in last for s in range(toy.ptr[u], last[u] + 1)]
    assert found[0] == 0 and found.sum() == len(read) > len(toy.train)
    assert all(found[i] == read.count(i) for i in (1, 7, 30, 60))


def test_popularity_over_the_catalogue_masks_the_history_once(toy):
    count = np.bincount(toy.items[toy.train], minlength=toy.n_items + 1)
    greater, equal = counts.full_ranking_of(count, toy, np.asarray(toy.test))
    for n, sample in enumerate(toy.test):
        target = toy.items[sample]
        others = (
            set(range(1, toy.n_items + 1))
            - set(toy.items[toy.ptr[users(toy, [sample])[0]] : sample].tolist())
            - {target}
        )
        assert greater[n] == sum(count[i] > count[target] for i in others) and equal[n] == sum(
            count[i] == count[target] for i in others
        )


def test_a_target_that_the_user_had_before_is_ranked_all_the_same():
    data = SimpleNamespace(
        items=np.array([1, 2, 1]), ptr=np.array([0, 3]), train=np.array([1]), n_items=3, n_users=1
    )
    greater, equal = counts.full_ranking_of(np.array([0, 5, 3, 1]), data, np.array([2]))
    assert (greater.tolist(), equal.tolist()) == ([0], [0])


def test_cooccurrence_worked_by_hand():
    # two users; training: a b c | b c d, each user's last item is the test target
    data = SimpleNamespace(
        items=np.array([1, 2, 3, 9, 2, 3, 4, 8]),
        ptr=np.array([0, 4, 8]),
        train=np.array([1, 2, 5, 6]),
        n_items=9,
        n_users=2,
    )
    cand = np.array([[1, 2, 3, 4, 9, 8]] * 2)
    s = counts.cooccurrence(data, np.array([3, 7]), cand)

    def pair(n, a, b):
        return n / np.sqrt(a * b)

    # counts in training: 1: 1, 2: 2, 3: 2, 4: 1; user 0's history is 1 2 3, the oldest weighs .64
    assert s[0] == pytest.approx(
        [
            0.8 * pair(1, 2, 1) + pair(1, 2, 1),
            0.64 * pair(1, 1, 2) + pair(2, 2, 2),
            0.64 * pair(1, 1, 2) + 0.8 * pair(2, 2, 2),
            0.8 * pair(1, 2, 1) + pair(1, 2, 1),
            0,
            0,
        ]
    )
    # the test targets 9 and 8 never stood beside anything in training
    assert not s[:, 4:].any()


def test_cooccurrence_finds_planted_pairs(make_data, tmp_path):
    rng, rows = np.random.default_rng(0), []
    # items come in pairs 2i-1, 2i; which pair comes next is random
    for u in range(120):
        items = np.concatenate(
            [[2 * i - 1, 2 * i] for i in rng.choice(np.arange(1, 31), 8, replace=False)]
        )
        rows += [(u, i, 100 * u + t) for t, i in enumerate(items)]
    data = make_data(
        tmp_path, rows, {i: f"title {i}" for i in range(1, 61)}, "pairs", "--split", "leave-one-out"
    )
    samples, cand = np.asarray(data.test), candidates(data, "test", 15)
    m = metrics(
        *compare(counts.cooccurrence(data, samples, cand), cand == data.items[samples][:, None])
    )
    assert m["hr@1"].mean() > 0.9  # the last item is the second of a pair


# ---------------------------------------------------------------- fusion


def test_standardised_scores_and_a_constant_row():
    x = floors.standard(np.array([[1.0, 2, 3], [5, 5, 5]]))
    assert (
        x.mean(1).tolist() == pytest.approx([0, 0])
        and x[0].std() == pytest.approx(1)
        and not x[1].any()
    )


def planted(rng, n, knows, signal):
    """Scores of n x 15 candidates, target first, for which the signal is there on the samples that
    `knows` says.
    """
    score = rng.normal(size=(n, 15))
    score[knows, 0] += signal
    return score


def fuse(a, b, target):
    """The fused row of two pairs of scores (validation, test): its scores on the test part, and the
    weight that its note tells.
    """
    rows = {"a": Row(*a, "one"), "b": Row(*b, "another")}
    add_fused(rows, [("a", "b")], target)
    weight = re.fullmatch(r"weight of b (\S+), chosen on validation", rows["a+b"].note).group(1)
    return rows["a+b"].test_nC, float(weight)


def test_fusion_finds_what_each_knows_alone_and_keeps_out_what_knows_nothing(alone):
    rng, n = np.random.default_rng(0), 400
    target = np.zeros((n, 15), bool)
    target[:, 0] = True
    # validation and test: one knows these, the other the rest
    half = [rng.random(n) < 0.5 for _ in range(2)]
    a, b = [[planted(rng, n, h ^ flip, 8) for h in half] for flip in (False, True)]
    noise = [rng.normal(size=(n, 15)) * 1000 for _ in range(2)]

    def hr(score):
        return metrics(*compare(score, target))["hr@1"].mean()

    fused, w = fuse(a, b, target)
    assert hr(fused) > max(hr(a[1]), hr(b[1])) + 0.1 and 0.2 < w < 0.8
    a = [planted(rng, n, slice(None), 2) for _ in range(2)]
    fused, w = fuse(a, noise, target)
    assert w <= 0.15 and hr(fused) > hr(a[1]) - 0.05 and fuse(noise, a, target)[1] >= 0.85
    # the weight comes from validation alone: a test part that says the opposite does not change it
    assert fuse((a[0], noise[1]), (noise[0], a[1]), target)[1] == w


# ---------------------------------------------------------------- groups


def masks_of(data, samples, kind) -> dict[str, list[int]]:
    """{group: the places in `samples` of those in it}."""
    groups = groups_of(data, samples, "leave-one-out")[kind]
    return {group: np.flatnonzero(mask).tolist() for group, mask in groups.items()}


def test_where_the_groups_of_histories_begin_and_end():
    data = SimpleNamespace(
        items=np.arange(1, 52), ptr=np.array([0, 51]), train=np.array([1]), n_items=51, n_users=1
    )
    data.times = None
    found = masks_of(data, np.array([1, 2, 3, 9, 10, 49, 50]), "items in the history")
    assert found == {"1-2, cold": [0, 1], "3-9": [2, 3], "10-49": [4, 5], "50+": [6]}


def test_where_the_groups_of_counts_begin_and_end():
    # in training: items 2 to 6 so often, the pair (7, 8) five times and (8, 7) four
    trained = np.concatenate([np.repeat([2, 3, 4, 5, 6], [1, 9, 10, 99, 100]), [7, 8] * 5])
    tested = np.array([9, 1, 2, 3, 4, 5, 6, 7, 8, 7])
    data = SimpleNamespace(
        items=np.concatenate([trained, tested]),
        ptr=np.array([0, 219, 229, 239]),
        train=np.delete(np.arange(1, 229), 218),
        n_items=9,
        n_users=3,
        times=None,
    )
    samples = np.arange(230, 239)  # the targets 1 2 3 4 5 6 7 8 7
    found = masks_of(data, samples, "interactions of the target in training")
    assert found == {"0, unseen": [0], "1-9": [1, 2, 6, 7, 8], "10-99": [3, 4], "100+": [5]}
    found = masks_of(data, samples, "pair of last item and target in training")
    # 2 3, 3 4, 4 5 and 5 6 stood so once
    assert found == {"never": [0, 1, 6], "1-4": [2, 3, 4, 5, 8], "5+": [7]}


def test_groups_cover_every_sample_once(toy):
    samples = np.asarray(toy.test)
    groups = groups_of(toy, samples, "temporal")
    assert len(groups) == 4
    for kind, masks in groups.items():
        assert (np.sum(list(masks.values()), 0) == 1).all(), kind
    cold = groups["items in the history"].get("1-2, cold", np.zeros(len(samples), bool))
    earlier = samples - toy.ptr[users(toy, samples)]
    assert np.array_equal(cold, earlier < 3)
    first = toy.times[samples[groups["time within the test part"]["first third"]]]
    last = toy.times[samples[groups["time within the test part"]["last third"]]]
    assert first.max() <= last.min() and len(groups_of(toy, samples, "leave-one-out")) == 3
    # of fewer samples each stays in the third that it has in the whole part
    few = samples[::5]
    for third, mask in groups_of(toy, few, "temporal")["time within the test part"].items():
        assert np.array_equal(mask, groups["time within the test part"][third][::5])
