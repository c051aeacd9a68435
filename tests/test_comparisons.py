"""What a table compares: rows with the reference, means over seeds, planned pairs; its marks."""

import math

import numpy as np
import pytest
from scripts import sentence

from delrec.evaluation import stats
from delrec.evaluation.comparisons import (
    Compared,
    Planned,
    against_reference,
    every_pair,
    over_seeds,
    paired_by_seed,
    planned_pairs,
    primary_pair,
)
from delrec.evaluation.wording import ABOUT_PLANNED, mark, said_by_users

N = 600
USER = np.arange(N) // 2
BASE = np.random.default_rng(0).random(N)


def row(gain, seed):
    """The metrics of a row that is better than BASE by `gain`."""
    value = BASE + gain + 0.1 * np.random.default_rng([9, seed]).normal(size=N)
    return {"hr@1": (value > 0.5).astype(float), "ndcg@10": value}


def shifted(*gains):
    """A reference, and rows above it by so much in NDCG@10, all with the same noise over users."""
    noise = np.repeat(np.random.default_rng(1).normal(0, 0.1, N // 2), 2)
    noise -= noise.mean()
    value = {"base": {"hr@1": BASE, "ndcg@10": BASE}}
    return value | {f"row{i}": dict.fromkeys(("hr@1", "ndcg@10"), BASE + noise + gain)
                    for i, gain in enumerate(gains)}  # fmt: skip


# ---------------------------------------------------------------- marks


def test_stars_go_by_the_p_that_is_adjusted_for_the_rows_of_the_table():
    # a p of about .02 is a star alone, and none among ten rows of the same
    se = 0.1 / math.sqrt(N / 2)
    for rows, stars in ((1, "*"), (10, "")):
        compared = Compared(shifted(*[2.2 * se] * rows), USER, 0.0001)
        against = against_reference(compared, Planned("base"))
        assert len(against) == rows
        for comparison in against.values():
            test = comparison["ndcg@10"]
            assert 0.01 < test["p"] < 0.05
            assert test["p_adjusted"] == pytest.approx(min(1, rows * test["p"]))
            assert mark(test) == stars


def test_a_large_table_can_have_two_stars():
    """With 9,999 signs p is .0001 at least, and of 120 rows .012 after Holm."""
    users = np.arange(N) % 30
    compared = Compared(shifted(*[0.2] * 120), users, 0.01)
    against = against_reference(compared, Planned("base"))
    assert {mark(c["ndcg@10"]) for c in against.values()} == {"**"}
    # of 50 rows and fewer nothing is another: the same signs are drawn
    for rows, draws in ((4, 9999), (50, 9999), (51, 10_199)):
        compared = Compared(shifted(*[0.2] * (rows - 1)), users, 0.01)
        assert len(compared.differences["ndcg@10"].flipped_PR) == draws
        assert compared.rows("row0", "base")["ndcg@10"]["p"] == 1 / (1 + draws)


def test_two_stars_one_equality_and_nothing():
    se = 0.1 / math.sqrt(N / 2)
    value = shifted(9 * se, 0, 2 * se)
    against = against_reference(Compared(value, USER, 3 * se), Planned("base"))
    assert [mark(c["ndcg@10"]) for c in against.values()] == ["**", "=", ""]
    # a difference may be shown and be smaller than the margin
    against = against_reference(Compared(value, USER, 20 * se), Planned("base"))
    assert mark(against["row0"]["ndcg@10"]) == "**="


def test_an_exploratory_table_and_pairs_that_nobody_planned_have_no_marks():
    compared = Compared(shifted(0.2, 0), USER, 0.05)
    swept = against_reference(compared, Planned("base", exploratory=True))
    pairs = every_pair(compared, list(compared.value))
    assert [mark(c["ndcg@10"]) for c in swept.values()] == ["", ""]
    assert {mark(c["ndcg@10"]) for c in pairs.values()} == {""}
    assert pairs["row0 - base"]["ndcg@10"]["p"] < 0.001
    assert list(pairs) == ["row0 - base", "row1 - base", "row1 - row0"]
    assert mark(None) == ""


def test_chance_and_the_reference_are_not_compared():
    value = {"chance": row(0, 0), **shifted(0.1)}
    assert list(against_reference(Compared(value, USER, 0.01), Planned("base"))) == ["row0"]
    assert against_reference(Compared(value, USER, 0.01), Planned("elsewhere")) == {}


def test_what_users_say_otherwise_is_said():
    # a user with many samples, all lost; twenty with one each, all won
    user = np.r_[np.zeros(100), np.arange(1, 21)]
    won = np.where(user == 0, 0.0, 1.0)
    value = {
        name: dict.fromkeys(("hr@1", "ndcg@10"), v) for name, v in (("a", won), ("b", 1 - won))
    }
    against = against_reference(Compared(value, user, 0.01), Planned("b"))
    said = said_by_users(against)
    assert "a HR@1 +0.905 (p=.0001)" in said and "a NDCG@10" in said
    even = against_reference(Compared(shifted(0.1, 0), USER, 0.01), Planned("base"))
    assert said_by_users(even) is None


# ---------------------------------------------------------------- seeds


def seeded():
    """Three seeds of a base, two of something better, one row alone."""
    value = {f"base-s{s}": row(0, s) for s in range(3)}
    value |= {f"better-s{s}": row(0.1, 5 + s) for s in range(2)}
    return value | {"alone": row(0, 8)}


def test_a_row_that_reads_no_seed_does_not_say_how_much_seeds_matter():
    value = seeded()
    without = Compared(value, USER, 0.05)
    compared = Compared(value | {f"rule-s{s}": row(0, 9) for s in range(3)}, USER, 0.05)
    assert compared.variance == without.variance and compared.seeds_df == without.seeds_df == 3
    # two rows that differ in one sample are two trainings
    other = {m: v.copy() for m, v in row(0, 9).items()}
    other["hr@1"][0] += 1
    again = Compared(value | {"rule-s0": row(0, 9), "rule-s1": other}, USER, 0.05)
    assert again.seeds_df == 4


def test_seeds_are_averaged_and_tested_together():
    value = seeded()
    found = over_seeds(Compared(value, USER, 0.01), Planned("base-s0"))
    assert set(found) == {"base", "better"}
    assert found["base"]["against"] is None and "test" not in found["base"]
    better = found["better"]
    assert better["against"] == "base" and better["seeds"] == 2
    both = [value[f"better-s{s}"]["hr@1"].mean() for s in (0, 1)]
    assert better["hr@1"] == pytest.approx([np.mean(both), abs(both[0] - both[1]) / np.sqrt(2)])
    low, high = better["hr@1_interval"]
    assert low < better["hr@1"][0] < high
    mean = np.mean([value[f"better-s{s}"]["hr@1"] for s in (0, 1)], 0)
    assert (low, high) == pytest.approx(stats.interval(mean, USER))
    assert better["hr@1_each"] == pytest.approx(both)
    test = better["test"]["ndcg@10"]
    assert test["difference"] == pytest.approx(0.1, abs=0.02)
    assert test["p"] == 1e-4 and mark(test) == "**"
    alone = {"a": row(0, 0), "b-s0": row(0, 1)}
    assert over_seeds(Compared(alone, USER, 0.01), Planned("a")) == {}


def test_the_standard_error_of_means_holds_for_other_seeds():
    value = seeded()
    compared = Compared(value, USER, 0.01)
    for m in ("hr@1", "ndcg@10"):
        each = [
            [value[f"{name}-s{s}"][m].mean() for s in range(n)]
            for name, n in (("base", 3), ("better", 2))
        ]
        # s^2 from both rows, weighing 2 and 1
        s2 = (2 * np.var(each[0], ddof=1) + np.var(each[1], ddof=1)) / 3
        a, b = (
            np.mean([value[f"{name}-s{s}"][m] for s in range(n)], 0)
            for name, n in (("better", 2), ("base", 3))
        )
        users_alone = stats.difference(a, b, USER)
        test = compared.means("better", "base")[m]
        assert test["se"] ** 2 == pytest.approx(users_alone["se"] ** 2 + s2 / 2 + s2 / 3)
        assert test["p"] == users_alone["p"] and test["p_t"] > users_alone["p_t"]
        parts = [(users_alone["se"] ** 2, compared.differences[m].clusters.worth - 1)]
        df = stats.joined_df([*parts, (s2 / 2 + s2 / 3, 3)])
        assert test["p_t"] == pytest.approx(stats.t_test(test["difference"], test["se"], df))


def paired(gains, noise=0.0):
    """Rows base-s0, base-s1, .. that differ by far more than what better-s0, .. is above each."""
    value = {}
    for s, gain in enumerate(gains):
        own = BASE + 0.1 * s
        value[f"base-s{s}"] = dict.fromkeys(("hr@1", "ndcg@10"), own)
        user_part = noise * np.random.default_rng(7).normal(size=len(BASE))
        value[f"better-s{s}"] = dict.fromkeys(("hr@1", "ndcg@10"), own + gain + user_part)
    return value


def test_runs_of_the_same_seeds_are_compared_in_pairs():
    gains = np.array([0.012, 0.008, 0.010])
    compared = Compared(paired(gains, noise=0.02), USER, 0.01)
    test = compared.means("better", "base")["hr@1"]
    a, b = (
        np.mean([compared.value[f"{name}-s{s}"]["hr@1"] for s in range(3)], 0)
        for name in ("better", "base")
    )
    users_alone = stats.difference(a, b, USER)
    of_seeds = np.var(gains, ddof=1) / 3
    assert test["se"] ** 2 == pytest.approx(users_alone["se"] ** 2 + of_seeds)
    parts = [(users_alone["se"] ** 2, compared.differences["hr@1"].clusters.worth - 1)]
    df = stats.joined_df([*parts, (of_seeds, 2)])
    assert test["p_t"] == pytest.approx(stats.t_test(test["difference"], test["se"], df))
    # seed by seed it is better; as if its seeds were others than the base's it could be luck
    value = {
        name.replace("better-s", "better-s1"): rows
        for name, rows in paired(gains, noise=0.02).items()
    }
    others = Compared(value, USER, 0.01).means("better", "base")["hr@1"]
    assert test["p_t"] < 0.05 and others["p_t"] > 0.5


@pytest.mark.parametrize(
    "a, b, found",
    [
        (["a-s0", "a-s1", "a-s2"], ["b-s2", "b-s0", "b-s1"], 3),
        (["a-s0", "a-s1"], ["b-s0", "b-s1"], 0),  # two differences tell too little
        (["a-s0", "a-s1", "a-s2"], ["b-s0", "b-s1", "b-s3"], 0),
        (["a-s0", "a-s1", "a-s2", "a-s3"], ["b-s0", "b-s1", "b-s2"], 0),
        (["a-s0+b-s0", "a-s1+b-s1", "a-s2+b-s2"], ["b-s0", "b-s1", "b-s2"], 3),
        (["a-s0+b-s1", "a-s0+b-s2", "a-s1+b-s2"], ["b-s0", "b-s1", "b-s2"], 0),
        (["a-s0", "a-s1", "a-s2"], ["counts"], 0),
    ],
)
def test_which_rows_are_pairs(a, b, found):
    pairs = paired_by_seed(a, b)
    assert len(pairs) == found
    assert all(x.split("-s")[-1] == y.split("-s")[-1] for x, y in pairs)


@pytest.mark.parametrize("again", ["base-s{}+alone", "base-s{}, shuffled"])
def test_rows_that_repeat_seeds_do_not_count_them_again(again):
    value = seeded()
    alone = Compared(value, USER, 0.01)
    fused = Compared(value | {again.format(s): row(s, s) for s in range(3)}, USER, 0.01)
    for m in ("hr@1", "ndcg@10"):
        same = fused.means("better", "base")[m]["p_t"]
        assert same == pytest.approx(alone.means("better", "base")[m]["p_t"])


def test_seeds_that_disagree_take_a_star_away():
    # on these users A is better by far; its seeds differ by more than that
    value = {f"base-s{s}": {"hr@1": BASE, "ndcg@10": BASE} for s in (0, 1)}
    for s, gain in enumerate((0.3, -0.1)):
        value[f"wild-s{s}"] = dict.fromkeys(("hr@1", "ndcg@10"), BASE + gain)
    test = over_seeds(Compared(value, USER, 0.01), Planned("base-s0"))["wild"]["test"]["hr@1"]
    assert test["p"] == 1e-4 and test["p_t"] > 0.3
    assert test["p_adjusted"] == test["p_t"] and mark(test) == ""


def test_what_no_seed_can_change_adds_nothing():
    value = {"counts": row(0, 0), "base-s0": row(0, 1), "base-s1": row(0.02, 2)}
    fixed = Compared(value, USER, 0.01, floors=["counts"]).means("base", "counts")
    trained = Compared(value, USER, 0.01).means("base", "counts")
    assert fixed["ndcg@10"]["se"] < trained["ndcg@10"]["se"]


# ---------------------------------------------------------------- planned pairs


def test_planned_pairs_are_of_rows_or_of_means():
    compared = Compared(seeded(), USER, 0.01)
    pairs = [("better-s0", "base-s1"), ("better", "alone")]
    found = planned_pairs(compared, Planned("base-s0", pairs))
    assert list(found) == ["better-s0 - base-s1", "better - alone"]
    of_rows, of_means = (comparison["ndcg@10"] for comparison in found.values())
    assert of_rows["se"] == compared.rows("better-s0", "base-s1")["ndcg@10"]["se"]
    assert of_means["se"] == compared.means("better", "alone")["ndcg@10"]["se"]
    largest = [max(test["p"], test["p_t"]) for test in (of_rows, of_means)]
    assert [of_rows["p_adjusted"], of_means["p_adjusted"]] == pytest.approx(stats.holm(largest))
    assert all("adjusted: the larger of p and t" in said for said in ABOUT_PLANNED.values())
    says = sentence(planned_pairs, compared, Planned("base-s0", [("better", "base-s0")]))
    assert "it names better and base-s0" in says and "the means are base, better" in says


# ---------------------------------------------------------------- the primary comparison


def test_the_primary_comparison_is_not_adjusted_and_the_others_are():
    se = 0.1 / math.sqrt(N / 2)
    compared = Compared(shifted(*[2.2 * se] * 4), USER, 0.0001)
    pairs = [(f"row{i}", "base") for i in (1, 2, 3)]
    planned = Planned("base", pairs, primary=("row0", "base"))
    found, others = primary_pair(compared, planned), planned_pairs(compared, planned)
    test = found["test"]
    assert (found["pair"], found["metric"]) == ("row0 - base", "hr@1")
    assert test["p_adjusted"] == max(test["p"], test["p_t"]) < 0.05
    assert "row0 - base" not in others and len(others) == 3
    for other in others.values():  # the same gain
        assert other["hr@1"]["p_adjusted"] == pytest.approx(3 * test["p_adjusted"])
        assert other["hr@1"]["p_adjusted"] > 0.05
    assert primary_pair(compared, Planned("base", pairs)) is None


def test_the_primary_comparison_of_means_has_their_interval_and_knows_seeds():
    value = seeded()
    compared = Compared(value, USER, 0.01)
    test = primary_pair(compared, Planned("base-s0", primary=("better", "base")))["test"]
    a, b = (
        np.mean([value[f"{name}-s{s}"]["hr@1"] for s in range(n)], 0)
        for name, n in (("better", 2), ("base", 3))
    )
    assert test["interval"] == pytest.approx(stats.interval(a - b, USER))
    assert test["se"] == compared.means("better", "base")["hr@1"]["se"]
    says = sentence(primary_pair, compared, Planned("base-s0", primary=("better", "worse")))
    assert says.startswith("--primary takes two rows")
