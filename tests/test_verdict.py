"""The verdict of planted tables: which row is best, and is that shown?"""

import pytest

from delrec.evaluation.verdict import plain_p, verdict

FLOORS = {"chance": 0.2, "popularity": 0.4}


def outcome(difference, p=1.0, p_equal=1.0, least=0.03, margin=0.01):
    """A test of one metric."""
    return {
        "difference": difference,
        "p_adjusted": p,
        "p_equal": p_equal,
        "least": least,
        "margin": margin,
    }


def planted(values, tests=(), reference="sasrec", full=None, against=(), **more):
    """A result: NDCG@10 of rows among 15 candidates beside the floors, their tests against the
    reference; NDCG@20 over all items."""
    values = {**FLOORS, **values}
    tests = {name: {"ndcg@10": test} for name, test in dict(tests).items()}
    rows = {name: {"ndcg@10": v, "test": tests.get(name)} for name, v in values.items()}
    return {
        "candidates": 15,
        "items": 1682,
        "reference": reference,
        "floors": list(FLOORS),
        "rows": rows,
        "seeds": {},
        "full": {name: {"ndcg@20": v} for name, v in (full or {}).items()},
        "full_against": {name: {"ndcg@20": t} for name, t in dict(against).items()},
        "full_seeds": {},
    } | more


def first(*args, **more):
    return verdict(planted(*args, **more))[0]


TWO = {"sasrec": 0.55, "delrec": 0.567}


def test_a_difference_that_is_shown():
    said = first(TWO, {"delrec": outcome(0.017, p=0.02)})
    assert said == (
        "By NDCG@10 among 15 candidates, the best row is delrec: .567, which is .017 above the "
        "reference, sasrec; the difference is shown (p = .02 after Holm)."
    )


def test_a_row_that_is_shown_to_be_equal():
    said = first(TWO, {"delrec": outcome(0.017, p=0.3, p_equal=0.01, margin=0.05)})
    assert "delrec: .567, which is .017 above the reference, sasrec" in said
    assert said.endswith("the two are shown to be equal within .050 (p = .01).")
    assert "difference is shown" not in said


def test_rows_that_are_not_told_apart():
    said = first(TWO, {"delrec": outcome(0.017, p=0.3, least=0.04)})
    # `least` is of one test alone, so it says nothing of a p after Holm
    assert said.endswith("the two are not told apart (p = .3 after Holm).")
    assert "shown" not in said and "equal" not in said


def test_p_at_the_border_is_not_a_difference():
    assert "not told apart (p = .05 after" in first(TWO, {"delrec": outcome(0.017, p=0.05)})
    assert "is shown (p < .05 after" in first(TWO, {"delrec": outcome(0.017, p=0.0499)})


def test_a_difference_that_is_shown_and_counts_as_equal():
    said = first(TWO, {"delrec": outcome(0.017, p=0.001, p_equal=0.01, margin=0.05)})
    assert "the difference is shown (p = .001 after Holm)" in said
    assert said.endswith("and shown to be within .050, which counts as equal.")


def test_the_reference_is_best_and_the_next_is_told_apart_from_it():
    said = first(
        {"sasrec": 0.6, "delrec": 0.567, "caser": 0.5},
        {"delrec": outcome(-0.033, p=0.0004), "caser": outcome(-0.1, p=1.0)},
    )
    assert (
        "the best row is the reference, sasrec: .600, which is .033 above the next, delrec" in said
    )
    assert said.endswith("the difference is shown (p < .001 after Holm).")


def test_the_only_trained_row_is_set_against_the_best_floor():
    said = first({"sasrec": 0.6}, {"popularity": outcome(-0.2, p=0.01)})
    assert "the reference, sasrec: .600, which is .200 above the next, popularity, a floor" in said
    assert "the difference is shown (p = .01" in said


def test_a_floor_that_is_best_is_called_one_and_the_best_trained_row_is_named_too():
    low = {"sasrec": 0.35, "delrec": 0.38}
    tests = {"popularity": outcome(0.05, p=0.01), "delrec": outcome(0.03, p=0.4)}
    floor, trained, _ = verdict(planted(low, tests))
    assert (
        "the best row is popularity, a floor that needs no training: .400, which is .050" in floor
    )
    assert "above the reference, sasrec; the difference is shown (p = .01" in floor
    assert "the best trained row is delrec: .380, which is .030 above the reference" in trained
    assert "not told apart (p = .4" in trained


def test_a_floor_that_is_best_beside_one_trained_row():
    _, trained, _ = verdict(planted({"sasrec": 0.35}, {"popularity": outcome(0.05, p=0.01)}))
    assert "the only trained row is sasrec: .350" in trained


def test_a_floor_is_best_and_is_the_reference():
    said = first({"sasrec": 0.35}, {"sasrec": outcome(-0.05, p=0.01)}, reference="popularity")
    assert "the best row is the reference, popularity, a floor that needs no training: .400" in said
    assert "which is .050 above the next, sasrec; the difference is shown" in said


def test_without_a_reference_nothing_counts_as_tested():
    said = first(TWO, reference=None)
    assert said.endswith(
        "the best row is delrec: .567; there is no reference, so no difference was tested."
    )


def test_one_row():
    result = planted(TWO)
    result["rows"] = {"sasrec": result["rows"]["sasrec"]}
    said = verdict(result)[0]
    assert "the only row is sasrec: .550" in said and "reference" not in said


def test_a_sweep_shows_no_difference():
    said = first(TWO, {"delrec": outcome(0.017, p=None, p_equal=None)})
    assert said.endswith("the table is exploratory, so no difference in it counts as shown.")


def test_rows_with_the_same_number_are_all_named():
    said = first(TWO | {"caser": 0.567}, {"delrec": outcome(0.017, p=0.02)})
    assert "delrec: .567 (caser has as much), which is .017 above" in said
    said = first({"sasrec": 0.6, "delrec": 0.6}, {"delrec": outcome(0.0, p=1.0)})
    assert "the reference, sasrec: .600, level with the next, delrec; the two are not told" in said


@pytest.mark.parametrize(
    ("gap", "words"),
    [(0.0004, ".0400, which is .0004 above"), (0.00001, ".0400, which is under .0001 above")],
)
def test_a_small_difference_does_not_vanish(gap, words):
    low = {"chance": 0.0, "popularity": 0.0, "sasrec": 0.04 - gap, "delrec": 0.04}
    assert words in first(low, {"delrec": outcome(gap)})


# ---------------------------------------------------------------- over all items, over seeds


def test_over_all_items_another_row_may_be_best():
    full = {"chance": 0.001, "popularity": 0.03, "sasrec": 0.12, "delrec": 0.11}
    near, all_items = verdict(
        planted(
            TWO,
            {"delrec": outcome(0.017, p=0.02)},
            full=full,
            against={"delrec": outcome(-0.01, p=0.04, margin=0.003)},
        )
    )
    assert "the best row is delrec" in near
    assert all_items == (
        "By NDCG@20 over all 1682 items, the best row is the reference, sasrec: .120, which is "
        ".010 above the next, delrec; the difference is shown (p = .04 after Holm)."
    )


def test_a_floor_over_all_items_is_not_tested():
    full = {"chance": 0.001, "popularity": 0.13, "sasrec": 0.12, "delrec": 0.125}
    against = {"delrec": outcome(0.005, p=0.04)}
    _, floor, trained = verdict(
        planted(TWO, {"delrec": outcome(0.017)}, full=full, against=against)
    )
    assert "popularity, a floor that needs no training: .130, which is .010 above" in floor
    assert floor.endswith("these two were not tested.")
    assert "the best trained row is delrec" in trained and "p = .04" in trained


def test_a_reference_that_does_not_rank_all_items():
    full = {"chance": 0.001, "popularity": 0.03, "delrec": 0.11}
    said = verdict(planted(TWO, {"delrec": outcome(0.017)}, full=full))[-1]
    assert said.endswith(
        "the best row is delrec: .110; the reference, sasrec, is not ranked here, so no difference "
        "was tested."
    )


def test_a_table_whose_rows_rank_no_catalogue_says_so():
    said = verdict(planted(TWO, {"delrec": outcome(0.017)}))
    assert said[1:] == ["No row ranks all 1682 items, so nothing is said of that."]


def test_means_over_seeds_are_judged_by_their_own_tests():
    rows = {"sasrec-s0": 0.55, "sasrec-s1": 0.53, "delrec-s0": 0.6, "delrec-s1": 0.5}
    seeds = {
        "sasrec": {"ndcg@10": [0.54, 0.014], "against": None},
        "delrec": {
            "ndcg@10": [0.55, 0.07],
            "against": "sasrec",
            "test": {"ndcg@10": outcome(0.01, p=0.6)},
        },
    }
    means, lucky, _ = verdict(
        planted(rows, {"delrec-s0": outcome(0.05, p=0.01)}, reference="sasrec-s0", seeds=seeds)
    )
    assert "the best row is delrec-s0: .600" in lucky and "is shown (p = .01" in lucky
    assert means.startswith("By NDCG@10 among 15 candidates, as means over seeds, the best row is")
    assert "delrec: .550, which is .010 above the reference, sasrec" in means
    assert "not told apart (p = .6" in means


def test_a_reference_of_one_seed_stands_among_the_means():
    rows = {"sasrec": 0.56, "delrec-s0": 0.55, "delrec-s1": 0.53}
    seeds = {
        "delrec": {
            "ndcg@10": [0.54, 0.01],
            "against": "sasrec",
            "test": {"ndcg@10": outcome(-0.02, p=0.01)},
        }
    }
    said = verdict(planted(rows, {"delrec-s0": outcome(-0.01)}, seeds=seeds))[0]
    assert "as means over seeds, the best row is the reference, sasrec: .560" in said
    assert "which is .020 above the next, delrec; the difference is shown" in said


# ---------------------------------------------------------------- how it is written


def test_a_p_has_one_digit():
    said = [plain_p(p) for p in (1.0, 0.31, 0.05, 0.0499, 0.046, 0.02, 0.001, 0.0009, 0.0)]
    assert said == [
        "p = 1", "p = .3", "p = .05", "p < .05", "p < .05", "p = .02", "p = .001", "p < .001",
        "p < .001",
    ]  # fmt: skip


@pytest.mark.parametrize("p, t, says", [(0.01, 0.04, "shown"), (0.01, 0.06, "not shown")])
def test_the_primary_comparison_stands_first(p, t, says):
    test = outcome(0.012, p=max(p, t), least=0.009) | {"interval": [0.004, 0.02], "p": p, "p_t": t}
    pair = {"pair": "delrec - sasrec", "metric": "hr@1", "test": test}
    said = verdict(planted(TWO, {"delrec": outcome(0.017)}, primary=pair))
    assert said[0] == (
        "The primary comparison, HR@1 among 15 candidates, delrec - sasrec: +.012 [+.004, +.020], "
        f"sign-flip p=.01, t p={str(t)[1:]}; {says} (both p below .05; judged alone, so nothing is "
        "adjusted). Least true difference that this test finds four times in five: .009. "
        "Everything below is secondary."
    )
    assert said[1:] == verdict(planted(TWO, {"delrec": outcome(0.017)}))
