"""Prompts formed many at a time: the same arrays, bit for bit, as one after another."""

from functools import partial

import click
import numpy as np
import pytest
from lm_cases import ALL, rank_with
from plain_prompts import PlainPrompts, TooLong
from scripts import sentence

from delrec.lm.ragged import Ragged, below, beside, of_padded, pad, ragged, same
from delrec.lm.ranker import asking
from delrec.lm.verbalizers import letter_ids

FORMS = [
    dict(show=show, verbalizer=verbalizer, k=k, instruct=k > 3)
    for show, verbalizer, k in [
        (False, "mean", 0),
        (True, "mean", 5),
        (False, "letter", 3),
        (True, "likelihood", 0),
    ]
]


def drawn(rng, shortest):
    """(histories, candidates, lists) of some users, long and short ones mixed."""
    lengths = rng.integers(shortest, 14, rng.integers(1, 9))
    old = [rng.integers(1, 61, length) for length in lengths]
    ranked, cand = (rng.integers(1, 61, (len(old), width)) for width in (6, 15))
    return old, cand, ranked


def told_places(at):
    """How many tokens tell the history, after a look that they begin at 1 and follow another."""
    assert at.tolist() == list(range(1, len(at) + 1))
    return len(at)


def must_be_alike(together, alone):
    tails, ats = together
    assert len(tails) == len(ats) == len(alone)
    for tail, at, (wanted, told) in zip(tails, ats, alone):
        assert tail.dtype == wanted.dtype == np.int64
        assert tail.tolist() == wanted.tolist()
        assert told_places(at) == told


def asked(r, rng):
    """Pairs (prompts formed together, the same formed one by one) of every kind, as calls."""
    (old, cand, ranked), (long, long_cand, _) = drawn(rng, 0), drawn(rng, 6)
    ta, rps, a = asking(r, "ta").prompts, asking(r, "rps").prompts, int(rng.integers(3, 5))
    plain, plain_ta, plain_rps = map(PlainPrompts, (r.prompts, ta, rps))
    rows, long_rows, steps = ragged(old), ragged(long), [a] * len(long)
    return [
        (partial(r.prompts.histories, rows), partial(map, plain.history, old)),
        (partial(r.prompts.histories, rows, cand), partial(map, plain.history, old, cand)),
        (
            partial(ta.temporal_analyses, long_rows, a, long_cand),
            partial(map, plain_ta.temporal_analysis, long, steps, long_cand),
        ),
        (
            partial(rps.patterns, rows, ranked, cand),
            partial(map, plain_rps.pattern, old, ranked, cand),
        ),
    ]


@ALL
@pytest.mark.parametrize("shown", ["titles", "ids", "hybrid"])
@pytest.mark.parametrize("form", FORMS)
def test_prompts_formed_together_are_those_formed_one_by_one(load, kind, toy, shown, form):
    rng = np.random.default_rng(0)
    for max_tokens in (1024, *rng.integers(120, 420, 5).tolist()):
        r = rank_with(load, kind, toy, input=shown, **form, max_tokens=max_tokens)
        for together, alone in asked(r, rng):
            try:
                wanted = list(alone())
            except TooLong as needed:
                assert f"needs {needed} tokens" in sentence(together)
                assert max_tokens < 1024
            else:
                must_be_alike(together(), wanted)


def test_no_prompts_at_all_are_none(load, toy):
    r = rank_with(load, "decoder", toy, show=True)
    tails, at = r.prompts.histories(ragged([]), np.zeros((0, 15), int))
    assert len(tails) == len(at) == 0


def test_more_candidates_than_letters_are_refused_where_they_are_scored(load, toy):
    r = rank_with(load, "decoder", toy, verbalizer="letter")
    cand = np.arange(1, 31)
    assert np.array_equal(
        r.prompts.history([1, 2], cand)[0], PlainPrompts(r.prompts).history([1, 2], cand)[0]
    )
    with pytest.raises(click.ClickException, match="26 letters"):
        letter_ids(r.lm, 30)


# ---------------------------------------------------------------- rows of different lengths


def test_rows_are_cut_taken_joined_and_padded_as_lists_are():
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(0, 6))
        rows, others = (
            [rng.integers(-5, 9, rng.integers(0, 5)).tolist() for _ in range(n)] for _ in range(2)
        )
        got = ragged(rows)
        assert [row.tolist() for row in got] == rows
        assert [got[b].tolist() for b in range(-n, n)] == rows + rows
        for begin, end in rng.integers(-6, 7, (4, 2)).tolist():
            assert [row.tolist() for row in got.cut(begin, end)] == [r[begin:end] for r in rows]
        assert [row.tolist() for row in got.cut(2)] == [row[2:] for row in rows]
        which = rng.integers(0, n, 7) if n else np.zeros(0, int)
        assert [row.tolist() for row in got.take(which)] == [rows[i] for i in which]
        both = beside(got, ragged(others), same([7, 8], n))
        assert [row.tolist() for row in both] == [a + b + [7, 8] for a, b in zip(rows, others)]
        assert [row.tolist() for row in below(got, ragged(others))] == rows + others
        kept = got.keep(got.flat > 0)
        assert [row.tolist() for row in kept] == [[x for x in row if x > 0] for row in rows]
        if n:
            longest = max(map(len, rows))
            assert pad(got, -9).tolist() == [row + [-9] * (longest - len(row)) for row in rows]


def test_a_padded_matrix_is_rows_of_its_items():
    rows = of_padded(np.array([[0, 0, 4], [1, 2, 3], [0, 0, 0]]))
    assert [row.tolist() for row in rows] == [[4], [1, 2, 3], []]
    assert isinstance(rows, Ragged) and rows.flat.dtype == np.int64
