"""questions.py: what Temporal Analysis and Recommendation Pattern Simulating ask."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_cases import naive

from delrec.data.prepared import users
from delrec.lm.questions import tasks_of
from delrec.lm.ranker import asking, make_ranker
from delrec.lm.text import random_soft_prompt
from distill import Asked

pytest_plugins = ["lm_fixtures"]
CFG = SimpleNamespace(a=4, C=9, rps_candidates="random")


@pytest.fixture(scope="module")
def ranker(load, toy):
    """The tiny decoder with a history of 8 titles and 4 vectors of soft prompt; each task has an
    instruction of its own."""
    m = load("decoder")
    texts = {"history": 8, "max_title": 32, "max_tokens": 1024, "order": "shuffled"}
    scores = {"verbalizer": "mean", "show": False, "backbone": "SASRec", "backbone_run": ""}
    settings = texts | scores | {"instruct": True}
    return make_ranker(m, toy, settings, random_soft_prompt(m, 4, 0))


@pytest.fixture
def lists(backbone):
    """The backbone's first six items for each training sample."""
    return np.load(backbone / "topk_train.npy")[:, :6]


def test_samples_are_the_same_whoever_makes_them(ranker, toy, lists):
    which, ranked = toy.train[5:25], lists[5:25]
    ta, rps = tasks_of(ranker, which, ranked, CFG, 0)
    lengths = np.minimum(which - toy.ptr[users(toy, which)], 8)
    assert len(rps) == 20
    assert len(ta) == (lengths >= 6).sum() < 20
    again_ta, again_rps = tasks_of(ranker, which, ranked, CFG, 0)
    for a, b in zip(ta + rps, again_ta + again_rps):
        assert np.array_equal(a.tail, b.tail)
        assert np.array_equal(a.cand, b.cand)
        assert a.label == b.label
    # no matter with whom
    alone = tasks_of(ranker, which[7:8], ranked[7:8], CFG, 0)[1][0]
    assert np.array_equal(alone.cand, rps[7].cand)
    other = tasks_of(ranker, which, ranked, CFG, 1)[1]
    assert any(not np.array_equal(a.cand, b.cand) for a, b in zip(rps, other))


def test_pattern_simulating_asks_for_the_backbone_s_first_choice(ranker, toy, lists):
    which, ranked = toy.train[:60], lists[:60]
    _, rps = tasks_of(ranker, which, ranked, CFG, 0)
    for (_, cand, label, *_), top in zip(rps, ranked):
        assert cand[label] == top[0]
        assert len(set(cand)) == 9
        assert set(cand) & set(top) == {top[0]}
        assert min(cand) >= 1
        assert max(cand) <= toy.n_items
    assert len({q.label for q in rps}) > 5  # the answer stands anywhere
    # the truth has no special place: it is an option as often as any item that is neither told nor
    # asked
    truths = toy.items[which]
    told = [(truth in q.cand) for truth, q, top in zip(truths, rps, ranked) if truth not in top]
    assert np.mean(told) < 0.4  # by chance 8 of 54


def test_temporal_analysis_asks_for_the_item_before_the_last(ranker, toy, lists):
    which = toy.train[:60]
    ta, _ = tasks_of(ranker, which, lists[:60], CFG, 0)
    starts = toy.ptr[users(toy, which)]
    windows = [toy.items[max(s - 8, start) : s] for s, start in zip(which, starts)]
    for (_, cand, label, *_), window in zip(ta, [w for w in windows if len(w) >= 6]):
        assert cand[label] == window[-2]
        assert len(set(cand)) == 9
        assert (cand == window[-2]).sum() == 1
    assert len({q.label for q in ta}) > 5


@pytest.mark.parametrize("task", ["ta", "rps"])
def test_only_what_is_asked_is_made_and_its_numbers_stay(task, ranker, toy, lists):
    both = dict(zip(("ta", "rps"), tasks_of(ranker, toy.train[:40], lists[:40], CFG, 0)))
    one = dict(zip(("ta", "rps"), tasks_of(ranker, toy.train[:40], lists[:40], CFG, 0, (task,))))
    (other,) = {"ta", "rps"} - {task}
    assert both[other] and one[other] == []
    for a, b in zip(both[task], one[task], strict=True):
        assert np.array_equal(a.tail, b.tail) and np.array_equal(a.cand, b.cand)


def test_the_release_lists_all_that_the_backbone_chose(ranker, toy, lists):
    which, ranked = toy.train[:60], lists[:60]
    release = SimpleNamespace(**vars(CFG) | {"rps_candidates": "release"})
    for (_, cand, label, *_), top in zip(tasks_of(ranker, which, ranked, release, 0)[1], ranked):
        assert cand[label] == top[0]
        assert len(set(cand)) == 9
        assert set(top) < set(cand)


@pytest.mark.parametrize("over", ["candidates", "catalogue"])
@pytest.mark.parametrize("task", ["ta", "rps"])
def test_a_task_s_loss_is_that_of_the_plain_lm_behind_its_own_instruction(
    task, over, ranker, plain, toy, lists
):
    questions = dict(zip(("ta", "rps"), tasks_of(ranker, toy.train[30:40], lists[30:40], CFG, 0)))
    asked = questions[task][:3]
    want, own = 0.0, asking(ranker, task)
    for q in asked:
        items = q.cand if over == "candidates" else np.arange(1, toy.n_items + 1)
        with torch.no_grad():
            scores = naive(plain("decoder"), own, q.tail, items, own.P)
        label = items.tolist().index(q.cand[q.label])
        want += F.cross_entropy(scores[None], torch.tensor([label])).item()
    got = Asked(ranker, task, over).loss(asked).item()
    assert got == pytest.approx(want, rel=1e-4)
