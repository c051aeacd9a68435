"""Statistics worked by hand: intervals, paired tests, means over seeds."""

import math

import numpy as np
import pytest

from delrec.evaluation import stats

# ---------------------------------------------------------------- intervals and tests


def test_the_interval_covers_the_truth_as_often_as_it_says(alone):
    # 60 users with 1 to 8 samples each; half of what varies is the user's own
    rng = np.random.default_rng(1)
    covered, wide, narrow = 0, [], []
    for trial in range(400):
        count = rng.integers(1, 9, 60)
        user = np.repeat(np.arange(60), count)
        value = 3 + rng.normal(size=60)[user] + rng.normal(size=len(user))
        low, high = stats.interval(value, user, draws=300, seed=trial)
        covered += low <= 3 <= high
        wide.append(high - low)
        alone = stats.interval(value, np.arange(len(user)), draws=300, seed=trial)
        narrow.append(alone[1] - alone[0])
    assert 0.90 < covered / 400 < 0.97
    # samples of one user are not independent: ignoring that is too bold
    assert np.mean(wide) > 1.3 * np.mean(narrow)


def test_the_interval_of_a_constant_is_the_constant_and_repeats():
    assert stats.interval(np.full(9, 0.25), np.arange(9)).tolist() == [0.25, 0.25]
    value, user = np.random.default_rng(0).random(50), np.arange(50) // 3
    assert np.array_equal(stats.interval(value, user), stats.interval(value, user))
    assert stats.interval(value[::-1], user[::-1]) == pytest.approx(stats.interval(value, user))


def sample_with_t(t, n):
    """n differences whose ordinary t statistic is t."""
    z = np.random.default_rng(n).normal(size=n)
    z = (z - z.mean()) / z.std(ddof=1)
    return z + t / math.sqrt(n)


@pytest.mark.parametrize(
    "df, t, p",
    [
        (10, 2.228, 0.05),
        (10, 3.169, 0.01),
        (1, 12.706, 0.05),
        (2, 4.303, 0.05),
        (30, 2.042, 0.05),
        (30, 2.750, 0.01),
        (100, 1.984, 0.05),
        (5, 0.727, 0.5),
        (20000, 1.960, 0.05),
        (10, 0, 1),
    ],
)
def test_paired_t_equals_the_table_when_every_user_has_one_sample(df, t, p):
    a = sample_with_t(t, df + 1)
    assert stats.paired_t(a, np.zeros(df + 1), np.arange(df + 1)) == pytest.approx(p, abs=2e-4)
    assert stats.paired_t(np.zeros(df + 1), a, np.arange(df + 1)[::-1] * 7) == pytest.approx(
        p, abs=2e-4
    )


def test_a_user_s_samples_count_as_one():
    d = sample_with_t(2.228, 11)
    # the same difference seen again and again proves nothing new
    for times in (2, 5):
        assert stats.paired_t(
            np.repeat(d, times), np.zeros(11 * times), np.repeat(np.arange(11), times)
        ) == pytest.approx(0.05, abs=2e-4)
    # counted as 55 users it would
    assert stats.paired_t(np.repeat(d, 5), np.zeros(55), np.arange(55)) < 0.001


def test_paired_t_at_its_edges():
    x = np.random.default_rng(0).random(20)
    assert stats.paired_t(x, x, np.arange(20)) == 1
    # one user: nothing can be said by t
    assert stats.paired_t(x + x, x, np.zeros(20)) == stats.paired_t(x + 1, x, np.zeros(20)) == 1
    assert stats.paired_t(np.ones(20), np.zeros(20), np.arange(20)) == 0
    rejected = np.mean(
        [
            stats.paired_t(r.normal(size=40), r.normal(size=40), np.arange(40) // 2) < 0.05
            for r in map(np.random.default_rng, range(400))
        ]
    )
    assert 0.02 < rejected < 0.09  # of true nulls


def hits(only_a, only_b, both=5, none=7):
    a = [1] * only_a + [0] * only_b + [1] * both + [0] * none
    b = [0] * only_a + [1] * only_b + [1] * both + [0] * none
    return np.array(a, bool), np.array(b, bool)


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (1, 8, 2 * (1 + 9) / 2**9),
        (8, 1, 2 * (1 + 9) / 2**9),
        (0, 6, 2 / 2**6),
        (5, 5, 1),
        (0, 0, 1),
        (2, 3, 1),
        (3, 12, 2 * (1 + 15 + 105 + 455) / 2**15),
        (0, 2000, 0),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert stats.mcnemar(*hits(only_a, only_b)) == pytest.approx(p, rel=1e-6, abs=1e-12)
    assert stats.mcnemar(*hits(only_a, only_b, both=300, none=900)) == stats.mcnemar(
        *hits(only_a, only_b)
    )


def test_mcnemar_leaves_ties_out():
    # a row of ties is right half the time, as the other
    half, right = np.full(200, 0.5), np.tile([0.0, 1.0], 100)

    def row(hr):
        return {"hr@1": hr, "ndcg@10": hr}

    assert stats.difference(row(right), row(half), np.arange(200))["p_mcnemar_hr@1"] == 1
    a, b = (x.astype(float) for x in hits(1, 8))
    with_ties = stats.difference(
        row(np.append(a, half)), row(np.append(b, np.ones(200))), np.arange(len(a) + 200)
    )
    assert with_ties["p_mcnemar_hr@1"] == pytest.approx(stats.mcnemar(*hits(1, 8)))


def test_fifty_samples_of_a_user_are_not_fifty_users():
    user = np.repeat(np.arange(10), 50)
    # six users' samples are all won, four users' all lost
    won = np.where(user < 6, 1.0, 0.0)
    rows = [{m: x for m in ("hr@1", "ndcg@10")} for x in (won, 1 - won)]
    d = stats.difference(*rows, user)
    assert d["p_mcnemar_hr@1"] < 1e-4 and d["p_t_hr@1"] > 0.4 and d["hr@1"] == pytest.approx(0.2)


# ---------------------------------------------------------------- seeds


def test_seeds_are_averaged_and_tested_together():
    rng = np.random.default_rng(0)
    user, base = np.arange(600) // 2, rng.random(600)

    def row(gain):
        return {
            "hr@1": (base + gain + 0.3 * rng.normal(size=600) > 0.5).astype(float),
            "ndcg@10": base + gain + 0.1 * rng.normal(size=600),
        }

    value = {
        "base-s0": row(0),
        "base-s1": row(0),
        "better-s0": row(0.1),
        "better-s1": row(0.1),
        "alone": row(0),
    }
    found = stats.over_seeds(value, user, "base-s0")
    assert (
        set(found) == {"base", "better"}
        and found["base"]["against"] is None
        and found["better"]["against"] == "base"
    )
    both = [value[f"better-s{s}"]["hr@1"].mean() for s in (0, 1)]
    assert found["better"]["hr@1"] == pytest.approx(
        [np.mean(both), abs(both[0] - both[1]) / np.sqrt(2)]
    )
    low, high = found["better"]["hr@1_interval"]
    assert low < found["better"]["hr@1"][0] < high and (low, high) == pytest.approx(
        stats.interval(np.mean([value[f"better-s{s}"]["hr@1"] for s in (0, 1)], 0), user)
    )
    assert found["better"]["hr@1_each"] == pytest.approx(both)
    assert (
        found["better"]["ndcg@10_gain"] == pytest.approx(0.1, abs=0.02)
        and found["better"]["p_ndcg@10"] < 1e-6
    )
    assert stats.over_seeds({"a": row(0), "b-s0": row(0)}, user, "a") == {}
    assert [
        stats.unseeded(x)
        for x in ("sasrec-s0+delrec-s12", "my-shop", "delrec-s1, shuffled", "small-s")
    ] == ["sasrec+delrec", "my-shop", "delrec, shuffled", "small-s"]
