"""Prompts as arrays: what they tell, in which order, and what goes where they are too long."""

import click
import numpy as np
import pytest
from lm_cases import ALL, lines, pattern, rank_with, temporal_analysis, windows
from scripts import sentence

from delrec.lm.prompts import LETTERS
from delrec.lm.ranker import asking
from delrec.lm.text import MASK, SLOT, encode
from delrec.lm.verbalizers import letter_ids


@ALL
@pytest.mark.parametrize("show", [False, True])
@pytest.mark.parametrize("k", [0, 7])
def test_a_prompt_has_one_mask_k_slots_the_history_in_order_and_the_candidates_if_shown(
    load, kind, toy, k, show
):
    r = rank_with(load, kind, toy, k=k, show=show)
    for h, c in zip(*windows(toy)):
        tail, at = r.prompts.history(h, c)
        prompt = np.concatenate([r.prompts.prefix, tail])
        assert (prompt == SLOT).sum() == k and (prompt == MASK).sum() == 1
        if k:
            slots = np.flatnonzero(prompt == SLOT)
            # the constant part comes first
            assert np.array_equal(slots, slots[0] + np.arange(k)) and slots[-1] < len(
                r.prompts.prefix
            )
        assert lines(r.lm, toy, r.titles, prompt) == [*h, *(c if show else [])]
        told = np.concatenate([[*r.titles.of(i), *r.lm.sep] for i in h])
        # `at` are the places of the history's tokens
        assert tail[at].tolist() == told.tolist()
        words = r.lm.tok.decode([t for t in prompt if t >= 0]).lower()
        assert ("sasrec" in words) == (k > 0) and "watched" in words


@ALL
def test_each_task_begins_with_an_instruction_of_its_own_where_it_is_asked_for(load, kind, toy):
    plain, r = (rank_with(load, kind, toy, k=3, instruct=asked) for asked in (False, True))
    asked = [asking(r, task) for task in ("history", "ta", "rps")]
    assert len({tuple(each.prompts.prefix) for each in asked}) == 3
    assert np.array_equal(asked[0].prompts.prefix, r.prompts.prefix)
    for each in asked:
        prefix = each.prompts.prefix
        assert (prefix == SLOT).sum() == 3
        # the instruction stands before all else, what follows it stays
        rest = plain.prompts.prefix[len(r.lm.start) :]
        assert np.array_equal(prefix[-len(rest) :], rest)
        assert np.array_equal(prefix[: len(r.lm.start)], r.lm.start)
        (h, *_), (c, *_) = windows(toy)
        assert np.array_equal(each.prompts.history(h, c)[0], plain.prompts.history(h, c)[0])
    for task in ("ta", "rps"):
        assert np.array_equal(asking(plain, task).prompts.prefix, plain.prompts.prefix)


@ALL
def test_letters_stand_in_front_of_the_candidates(load, kind, toy):
    r = rank_with(load, kind, toy, verbalizer="letter")
    (h, *_), (c, *_) = windows(toy)
    tail = r.prompts.history(h, c)[0].tolist()
    start = 0
    for x, item in zip(LETTERS, c):
        line = encode(r.lm, f"{x}. ") + r.titles.of(item).tolist() + list(r.lm.sep)
        at = next(i for i in range(start, len(tail)) if tail[i : i + len(line)] == line)
        assert at >= start
        start = at + len(line)
    assert letter_ids(r.lm, 15).tolist() == [encode(r.lm, x)[0] for x in LETTERS[:15]]


@ALL
def test_truncation_drops_the_oldest_history_and_nothing_else(load, kind, toy):
    full = rank_with(load, kind, toy, k=4, show=True)
    h, c = next((h, c) for h, c in zip(*windows(toy, 30)) if len(h) == 10)
    whole = {
        f: len(full.prompts.prefix) + len(make(full, h, c)) + len(full.lm.end)
        for f, make in MAKERS.items()
    }
    seen = set()
    for cut in range(0, 60, 3):
        for f, make in MAKERS.items():
            r = rank_with(load, kind, toy, k=4, show=True, max_tokens=whole[f] - cut)
            try:
                tail = make(r, h, c)
            except click.ClickException as e:
                assert (
                    "tokens without any history" in e.message
                    and f"the limit is {whole[f] - cut}" in e.message
                )
                continue
            prompt = np.concatenate([r.prompts.prefix, tail])
            assert len(prompt) + len(r.lm.end) <= whole[f] - cut + 1
            assert (prompt == SLOT).sum() == 4 and (prompt == MASK).sum() == 1
            told, complete = (
                lines(r.lm, toy, r.titles, tail),
                lines(r.lm, toy, r.titles, make(full, h, c)),
            )
            dropped = len(complete) - len(told)
            gone = DROPPABLE[f][:dropped]
            assert len(gone) == dropped
            assert told == [i for at, i in enumerate(complete) if at not in gone]
            seen.add((f, dropped))
    assert len({d for f, d in seen if f == "history"}) > 3  # it did truncate
    assert any(d > 3 for f, d in seen if f == "ta")  # and more than the example's history


MAKERS = {
    "history": lambda r, h, c: r.prompts.history(h, c)[0],
    "pattern": lambda r, h, c: pattern(r, h, c[:5], c),
    "ta": lambda r, h, c: temporal_analysis(r, h, 5, c),
}


# places of what may go, in the order in which it goes; TA at a = 5 tells the example's history,
# i_5 and i_4, then i_5 .. i_8 as later ones
DROPPABLE = {"history": range(10), "pattern": range(10), "ta": [0, 1, 2, 5, 6, 7, 8]}


@ALL
def test_a_budget_too_small_is_one_sentence_with_both_numbers(load, kind, toy):
    r = rank_with(load, kind, toy, k=30, show=True, max_tokens=60)
    (h, *_), (c, *_) = windows(toy)
    says = sentence(r.prompts.history, h, c)
    assert "the limit is 60" in says and "fewer candidates or slots" in says
    assert "which distill.py and finetune.py --max-tokens raise" in says
    most = rank_with(load, kind, toy, show=True, max_tokens=10**6)
    says_most = sentence(most.prompts.history, h, np.resize(c, 2000))
    assert "--max-tokens" not in says_most  # there is nothing to raise
    needed = int(says.split("needs ")[1].split()[0])
    assert (
        len(rank_with(load, kind, toy, k=30, show=True, max_tokens=needed).prompts.history(h, c)[0])
        > 0
    )


@ALL
@pytest.mark.parametrize("n, a", [(10, 4), (10, 6), (7, 4), (6, 4), (5, 3), (10, 8)])
def test_temporal_analysis_tells_the_spec_s_order_and_never_its_answer(load, kind, toy, n, a):
    r = rank_with(load, kind, toy, k=3)
    i = [None, *range(11, 11 + n)]  # i[1]..i[n]
    told = lines(
        r.lm,
        toy,
        r.titles,
        np.concatenate([r.prompts.prefix, temporal_analysis(r, i[1:], a)]),
    )
    assert told == [*i[1 : a - 1], i[a], i[a - 1], *i[a : n - 1], i[n]]
    assert i[n - 1] not in told
    cand = np.array([40, i[n - 1], 41])
    shown = rank_with(load, kind, toy, k=3, show=True)
    assert lines(r.lm, toy, r.titles, temporal_analysis(shown, i[1:], a, cand)) == [*told, *cand]


@ALL
def test_the_pattern_tells_all_choices_but_the_first(load, kind, toy):
    h, ranked, cand = np.array([1, 2, 3]), np.arange(20, 30), np.array([40, 20, 41])
    for show in (False, True):
        r = rank_with(load, kind, toy, k=3, show=show)
        tail = pattern(r, h, ranked, cand)
        assert lines(r.lm, toy, r.titles, tail) == [
            1,
            2,
            3,
            *range(21, 30),
            *(cand if show else []),
        ]
        assert tail[-1] == MASK
        assert "sasrec" in r.lm.tok.decode([t for t in tail if t >= 0]).lower()
