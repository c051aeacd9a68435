"""Statistics worked by hand: intervals, and tests of differences over users."""

import math

import numpy as np
import pytest

from delrec import significance
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


def test_one_user_has_no_interval():
    """A width of zero would say that all users are like this one."""
    assert np.isnan(stats.interval(np.array([0, 1, 1]), np.array([3, 3, 3]))).all()
    assert np.isnan(stats.interval(np.zeros((3, 4)), np.array([3, 3, 3]))).all()
    assert stats.interval(np.zeros((3, 4)), np.array([3, 3, 3])).shape == (2, 4)
    assert stats.ends_of(np.array([np.nan, np.nan])) == [None, None]


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
        (1000, 1.962, 0.05),
        (10, 0, 1),
    ],
)
def test_paired_t_equals_the_table_when_every_user_has_one_sample(df, t, p):
    a, b, user = sample_with_t(t, df + 1), np.zeros(df + 1), np.arange(df + 1)
    assert stats.difference(a, b, user)["p_t"] == pytest.approx(p, abs=2e-4)
    assert stats.difference(b, a, user[::-1] * 7)["p_t"] == pytest.approx(p, abs=2e-4)


def test_a_user_s_samples_count_as_one():
    d = sample_with_t(2.228, 11)
    # the same difference seen again and again proves nothing new
    for times in (2, 5):
        user = np.repeat(np.arange(11), times)
        found = stats.difference(np.repeat(d, times), np.zeros(11 * times), user)
        assert found["p_t"] == pytest.approx(0.05, abs=2e-4)
    # counted as 55 users it would
    assert stats.difference(np.repeat(d, 5), np.zeros(55), np.arange(55))["p_t"] < 0.001


def t_alone(d_n, user_n):
    """The p_t of stats.difference without its sign flips, which are too slow to simulate."""
    clusters = stats.clusters_of(user_n)
    se = stats.standard_error(clusters.sums(d_n[:, None])[:, 0], clusters.count_G)
    return stats.t_test(d_n.mean(), se, clusters.worth - 1)


def test_paired_t_at_its_edges():
    x, zeros, users = np.random.default_rng(0).random(20), np.zeros(20), np.arange(20)
    assert stats.difference(x, x, users)["p_t"] == 1
    # one user: nothing can be said by t
    assert stats.difference(x + x, x, zeros)["p_t"] == 1
    assert stats.difference(x + 1, x, zeros)["p_t"] == 1
    assert stats.difference(np.ones(20), zeros, users)["p_t"] == 0
    rejected = np.mean(
        [
            t_alone(r.normal(size=40) - r.normal(size=40), np.arange(40) // 2) < 0.05
            for r in map(np.random.default_rng, range(400))
        ]
    )
    assert 0.02 < rejected < 0.09  # of true nulls


@pytest.mark.parametrize("t", [0.0, 0.3, 2.0, 12.706, 1e3, 1e9])
def test_student_s_tail_has_its_closed_forms(t):
    one, two = 0.5 - math.atan(t) / math.pi, (1 - t / math.sqrt(2 + t * t)) / 2
    assert stats.t_tail(t, 1) == pytest.approx(one, rel=1e-6, abs=1e-15)
    assert stats.t_tail(t, 2) == pytest.approx(two, rel=1e-6, abs=1e-15)


def test_student_s_tail_with_less_than_one_and_with_many_degrees_of_freedom():
    # T = Z / sqrt(chi2 / df); few uneven users are worth less than two
    rng, df = np.random.default_rng(0), 0.5
    drawn = rng.normal(size=10**6) / np.sqrt(rng.gamma(df / 2, 2, 10**6) / df)
    for t in (0.5, 5, 100):
        assert stats.t_tail(t, df) == pytest.approx((drawn > t).mean(), abs=0.002)
    assert stats.t_tail(1.959964, 1e7) == pytest.approx(0.025, abs=1e-6)
    assert stats.t_tail(10, 1e6) == pytest.approx(7.62e-24, rel=0.01)


# ---------------------------------------------------------------- users as clusters


def test_kish_worked_by_hand():
    assert stats.kish(np.array([40, 5, 5])) == pytest.approx(2500 / 1650)
    assert stats.kish(np.full(166, 7)) == pytest.approx(166)
    user = np.repeat([3, 1, 2], [40, 5, 5])
    assert stats.clusters_of(user).worth == pytest.approx(2500 / 1650)


def test_uneven_users_have_fewer_degrees_of_freedom():
    # the standard error by hand; 20 users of 2 samples, one of 60
    rng, user = np.random.default_rng(0), np.repeat(np.arange(21), [2] * 20 + [60])
    d = rng.normal(size=100)
    sums = np.array([(d[user == g] - d.mean()).sum() for g in range(21)])
    se = math.sqrt(21 / 20 * (sums**2).sum()) / 100
    df = 100**2 / (20 * 2**2 + 60**2) - 1
    found = stats.difference(d, np.zeros(100), user)
    assert found["se"] == pytest.approx(se)
    assert found["least"] == pytest.approx(stats.least_found(se, df))
    assert found["p_t"] == pytest.approx(2 * stats.t_tail(abs(d.mean()) / se, df))
    assert found["p_t"] == pytest.approx(t_alone(d, user))
    assert df < 2


def flip_p(sums):
    """p of the sign-flip test of the users' sums."""
    sums = np.array(sums, float)
    return significance.share_as_large(significance.sign_flips(sums[:, None])[:, 0], sums.sum())


def test_the_sign_flip_test_worked_by_hand():
    # 6 of 32 patterns reach 9
    assert flip_p([3, 1, 2, -1, 4]) == 6 / 32
    # five users are never significant at .05
    assert flip_p([1, 1, 1, 1, 1]) == 2 / 32
    assert flip_p([0, 0, 0]) == flip_p([7]) == flip_p([2, -2]) == 1
    # .1 + .2 and .3 are one number
    assert flip_p([0.1, 0.2, -0.3]) == 1
    # a user with nothing to say changes nothing
    assert flip_p([3, 1, 2, -1, 4, 0, 0]) == 6 / 32


def test_drawn_signs_come_near_all_signs_and_never_to_nought():
    few = np.random.default_rng(1).normal(0.4, 1, significance.EXACT)
    more = np.append(few, [0.0, 0.0])  # as good as nothing, but now patterns are drawn
    assert len(significance.sign_flips(more[:, None])) == significance.DRAWS
    assert flip_p(more) == pytest.approx(flip_p(few), abs=0.015)
    assert flip_p(np.ones(40)) == 1 / (1 + significance.DRAWS)
    assert flip_p(more) == flip_p(more)


@pytest.mark.parametrize("draws", [199, 200])
def test_drawn_signs_are_never_taken_for_all_signs(draws):
    flipped = significance.sign_flips(np.ones((40, 1)), draws=draws)[:, 0]
    assert draws <= len(flipped) <= 201
    assert significance.share_as_large(flipped, 40) == 1 / (1 + len(flipped))


def test_all_pairs_at_once_are_each_pair_alone():
    rng, user = np.random.default_rng(0), np.repeat(np.arange(30), rng_sizes(30))
    value = {name: {"hr@1": rng.integers(0, 2, len(user)) / 1} for name in "abcd"}
    together = stats.Differences(value, "hr@1", stats.clusters_of(user), 0.01)
    for a, b in ("ab", "ca", "dc"):
        alone = stats.difference(value[a]["hr@1"], value[b]["hr@1"], user)
        assert together.between(a, b) == pytest.approx(alone)
    means = together.between(["a", "b"], ["c", "d"])
    half = [(value[x]["hr@1"] + value[y]["hr@1"]) / 2 for x, y in ("ab", "cd")]
    assert means == pytest.approx(stats.difference(*half, user))


def rng_sizes(G):
    """Uneven numbers of samples of G users."""
    return np.random.default_rng(5).integers(1, 12, G)


UNEVEN = (120, 60, 40, 20, 15, 12, 10, 8, 6, 4, 3, 2)


def null_difference(rng):
    """Differences of samples of uneven users where no row is better: each user leans to one row,
    a fifth of the samples are won by one of the two.
    """
    user = np.repeat(np.arange(len(UNEVEN)), UNEVEN)
    lean = rng.normal(0, 0.3, len(UNEVEN))[user]
    won = np.where(rng.random(len(user)) < 0.5 + lean, 1.0, -1.0)
    return np.where(rng.random(len(user)) < 0.2, won, 0.0), user


def test_the_printed_p_alarms_as_often_as_it_says_on_uneven_users():
    rng, trials = np.random.default_rng(0), 600
    printed, naive = [], []
    for _ in range(trials):
        d, user = null_difference(rng)
        printed.append(stats.difference(d, np.zeros(len(d)), user)["p"] < 0.05)
        naive.append(t_alone(d, np.arange(len(d))) < 0.05)
    assert 0.02 < np.mean(printed) < 0.075
    # samples counted as users: several times too many
    assert np.mean(naive) > 0.15
    # and what is there is found
    found = [
        stats.difference(d + (rng.random(len(d)) < 0.4), np.zeros(len(d)), user)["p"] < 0.05
        for d, user in (null_difference(rng) for _ in range(50))
    ]
    assert np.mean(found) > 0.9


def test_fifty_samples_of_a_user_are_not_fifty_users():
    user = np.repeat(np.arange(10), 50)
    # six users' samples are all won, four users' all lost
    won = np.where(user < 6, 1.0, 0.0)
    found = stats.difference(won, 1 - won, user)
    assert found["p"] > 0.4 and found["p_t"] > 0.4
    assert found["difference"] == pytest.approx(0.2)


def test_every_user_counted_alike_is_a_second_number():
    # one user's hundred samples are lost, twenty users' only ones won
    user = np.r_[np.zeros(100), np.arange(1, 21)]
    found = stats.difference(np.where(user == 0, 0.0, 1.0), np.where(user == 0, 1.0, 0.0), user)
    assert found["difference"] == pytest.approx(-80 / 120)
    assert found["of_users"] == pytest.approx(19 / 21)
    assert found["p"] > 0.5 and found["p_of_users"] < 0.01
    even = stats.difference(np.ones(6), np.zeros(6), np.repeat([0, 1, 2], 2))
    assert even["of_users"] is None and even["p_of_users"] is None


# ---------------------------------------------------------------- equality, many tests


def test_equality_worked_by_hand():
    # (.01 - .004) / .003 = 2.00 and / .006 = 1.00, 55 degrees of freedom
    assert stats.equality_test(0.004, 0.003, 55, 0.01) == pytest.approx(0.025, abs=5e-4)
    assert stats.equality_test(-0.004, 0.006, 55, 0.01) == pytest.approx(0.16, abs=2e-3)
    # outside of the margin nothing is equal
    assert stats.equality_test(0.012, 0.003, 55, 0.01) > 0.5
    assert stats.equality_test(0.0, 0.0, 55, 0.01) == 0
    assert stats.equality_test(0.02, 0.0, 55, 0.01) == 1


def test_one_user_shows_neither_a_difference_nor_equality():
    found = stats.difference(np.ones(30), np.zeros(30), np.zeros(30))
    assert found["p"] == found["p_t"] == found["p_equal"] == 1
    assert found["se"] is None and found["least"] is None


def test_holm_worked_by_hand():
    assert stats.holm([0.001, 0.012, 0.020, 0.20]) == pytest.approx([0.004, 0.036, 0.040, 0.20])
    # in any order; none above 1, none below the one before
    assert stats.holm([0.20, 0.001, 0.020, 0.012]) == pytest.approx([0.20, 0.004, 0.040, 0.036])
    assert stats.holm([0.03, 0.02]) == pytest.approx([0.04, 0.04])
    assert stats.holm([0.6, 0.9]) == [1, 1] and stats.holm([]) == []


def test_seeds_enter_the_standard_error_as_worked_by_hand():
    # SE over users .0037; deviations .004 of 3 seeds and .001 of 2
    n = 400
    z = sample_with_t(0, n)
    value = {"a": {"hr@1": 0.017 + z * 0.0037 * math.sqrt(n)}, "b": {"hr@1": np.zeros(n)}}
    differences = stats.Differences(value, "hr@1", stats.clusters_of(np.arange(n)), 0.01)
    alone = differences.between("a", "b")
    both = differences.between("a", "b", 0.004**2 / 3 + 0.001**2 / 2)
    assert alone["se"] == pytest.approx(0.0037)
    assert both["se"] == pytest.approx(0.0044, abs=5e-5)
    assert both["difference"] / both["se"] == pytest.approx(3.9, abs=0.06)
    assert both["p_t"] > alone["p_t"] and both["p"] == alone["p"]
    assert both["least"] == pytest.approx(2.8 * both["se"], rel=0.01)


def test_the_least_difference_of_few_degrees_of_freedom():
    assert stats.t_above(0.025, 10) == pytest.approx(2.228, abs=1e-3)
    assert stats.t_above(0.2, 10) == pytest.approx(0.879, abs=1e-3)
    assert stats.least_found(0.01, 1e6) == pytest.approx(0.028, abs=1e-4)
    assert stats.least_found(1, 3) == pytest.approx(3.182 + 0.978, abs=2e-3)


def test_degrees_of_freedom_of_users_and_seeds_worked_by_hand():
    # variances 1 of 55 and 3 of 4 degrees of freedom: 16 / (1 / 55 + 9 / 4)
    assert stats.joined_df([(1, 55), (3, 4)]) == pytest.approx(7.05, abs=0.01)
    assert stats.joined_df([(2, 55), (0, 4)]) == 55
    assert stats.joined_df([(0, 55), (0, 4)]) == 55


def test_two_seeds_a_side_do_not_make_a_false_star_of_many_users():
    # 20,000 users: what differs is the seeds' luck alone, deviation .02
    rng, found = np.random.default_rng(0), []
    for _ in range(1000):
        of_users, mean_2R = 1e-6, rng.normal(0, 0.02, (2, 2))
        off = rng.normal(0, 1e-3) + mean_2R[0].mean() - mean_2R[1].mean()
        s2 = mean_2R.var(1, ddof=1).mean()
        df = stats.joined_df([(of_users, 19999), (s2, 2)])
        found.append(stats.t_test(off, math.sqrt(of_users + s2), df))
    assert 0.02 < np.mean(np.array(found) < 0.05) < 0.07  # .16 with 19,999 degrees of freedom


def test_a_row_s_name_without_its_seeds():
    names = ("sasrec-s0+delrec-s12", "my-shop", "delrec-s1, shuffled", "small-s")
    want = ["sasrec+delrec", "my-shop", "delrec, shuffled", "small-s"]
    assert [stats.unseeded(name) for name in names] == want
