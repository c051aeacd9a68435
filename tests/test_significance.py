"""The sign-flip test over users: worked by hand, and right where nothing differs."""

import numpy as np
import pytest

from delrec import significance
from delrec.significance import sign_flip, user_sums


def test_six_of_32_patterns_reach_the_sum_of_3_1_2_minus_1_4():
    assert sign_flip(np.array([[3.0], [1], [2], [-1], [4]]))[0] == pytest.approx(6 / 32)
    # five users can never be significant at .05
    assert sign_flip(np.ones((5, 1)))[0] == pytest.approx(2 / 32)


def test_several_differences_are_tested_at_once():
    total = np.array([[3.0, 1, 0], [1, 1, 0], [2, 1, 0], [-1, 1, 0], [4, 1, 0]])
    assert sign_flip(total).tolist() == pytest.approx([6 / 32, 2 / 32, 1])


def test_a_user_s_samples_are_added_up():
    difference = np.array([[1.0, 0], [2, 0], [-1, 5]])
    assert user_sums(difference, np.array([7, 3, 7])).tolist() == [[2, 0], [0, 5]]


def test_drawn_signs_say_what_all_signs_say(monkeypatch):
    total = np.random.default_rng(0).normal(0.3, 1, (12, 3))
    exact = sign_flip(total)
    monkeypatch.setattr(significance, "EXACT", 0)
    drawn = sign_flip(total)
    assert np.abs(drawn - exact).max() < 0.02 and exact.min() < 0.5
    assert np.array_equal(drawn, sign_flip(total))
    assert drawn.min() >= 1 / 10_000


def test_what_differs_is_found_and_what_does_not_is_not():
    rng = np.random.default_rng(1)
    # many users, one of them with most of the samples
    size = np.r_[400, np.full(40, 5)]
    noise = rng.normal(size=(41, 200)) * size[:, None]
    assert (sign_flip(noise) < 0.05).mean() < 0.1
    assert (sign_flip(noise + size[:, None] * 3) < 0.05).all()
