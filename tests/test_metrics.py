"""delrec/metrics.py: ranks and metrics with ties, worked out by hand."""

import itertools

import numpy as np
import pytest
from scripts import sentence

from delrec.metrics import chance, compare, metrics


def test_metrics_of_hand_worked_rows():
    # the target first; fourth; first with two equals (ranks 1..3); fifth or sixth; eleventh
    m = metrics([0, 3, 0, 4, 10], [0, 0, 2, 1, 0])
    log2 = np.log2
    assert m["hr@1"] == pytest.approx([1, 0, 1 / 3, 0, 0])
    assert m["hr@5"] == pytest.approx([1, 1, 1, 1 / 2, 0])
    assert m["hr@10"] == pytest.approx([1, 1, 1, 1, 0])
    assert m["ndcg@5"] == pytest.approx(
        [1, 1 / log2(5), (1 + 1 / log2(3) + 1 / 2) / 3, 1 / log2(6) / 2, 0]
    )
    assert m["ndcg@10"] == pytest.approx(
        [1, 1 / log2(5), (1 + 1 / log2(3) + 1 / 2) / 3, (1 / log2(6) + 1 / log2(7)) / 2, 0]
    )
    assert m["mrr"] == pytest.approx(
        [1, 1 / 4, (1 + 1 / 2 + 1 / 3) / 3, (1 / 5 + 1 / 6) / 2, 1 / 11]
    )
    assert m["rank"].tolist() == [1, 4, 2, 5.5, 11]
    assert "ndcg@1" not in m


def test_a_tie_counts_as_the_mean_over_every_order_it_could_fall_in():
    score, place = np.array([2, 1, 1, 1, 0, 3]), 2  # the target ties with two others
    m = metrics(*compare(score[None], np.eye(6)[[place]]), ks=(1, 2, 3))
    values = []
    # stable sort of every permutation: every way of breaking the ties
    for order in itertools.permutations(range(6)):
        rank = [order[i] for i in np.argsort(-score[list(order)], kind="stable")].index(place) + 1
        values.append([rank <= 2, rank <= 3, (rank <= 3) / np.log2(rank + 1), 1 / rank, rank])
    assert [m[k][0] for k in ("hr@2", "hr@3", "ndcg@3", "mrr", "rank")] == pytest.approx(
        np.mean(values, 0)
    )


@pytest.mark.parametrize("C", [2, 15, 20, 100])
def test_constant_scores_are_chance_not_success(C):
    target = np.eye(C)[[0, C - 1, C // 2]]
    greater, equal = compare(np.full((3, C), 7.5), target)
    assert greater.tolist() == [0] * 3 and equal.tolist() == [C - 1] * 3
    m = metrics(greater, equal)
    assert m["hr@1"] == pytest.approx(1 / C)
    assert m["hr@5"] == pytest.approx(min(5 / C, 1))
    assert (m["rank"] == (C + 1) / 2).all()
    assert chance(C) == pytest.approx({k: v[0] for k, v in m.items()})


def test_compare_reads_the_target_from_its_mask():
    score = np.array([[0.1, 0.5, 0.3], [-2.0, -1.0, -3.0], [0.0, 0.0, 1.0]])
    greater, equal = compare(score, np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], bool))
    assert greater.tolist() == [1, 0, 1] and equal.tolist() == [0, 0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    assert "not finite" in sentence(compare, np.array([[1, bad, 0.0]]), np.array([[1, 0, 0]]))
