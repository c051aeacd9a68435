"""A hint of the backbone's best, several orders of the candidates, users drawn by weight: --hint,
--orders, --draw (RecRanker).
"""

from types import SimpleNamespace

import numpy as np
import pytest
from commands import metrics_of
from copiers import scores_with_truth
from lm_cases import SETTINGS, lines, opened
from stopped_runs import same, stop_and_resume
from tuning import SMALL, opens_as_stored

import evaluate
import finetune
from delrec.data.prepared import candidates, users
from delrec.evaluation.copying import copied
from delrec.lm import hints, ranker, samples
from delrec.lm.ranker import make_ranker, score_samples
from delrec.serving.ranking import UNSEEN, Chooser, PoolRanker, Wanted

LISTED = f"--soft-prompt none {SMALL} --history 1 --show --verbalizer mean --no-calibrate"


@pytest.fixture
def one_title(monkeypatch):
    """A hint is one title: an LM that counts can follow it."""
    monkeypatch.setattr(hints, "HINTED", 1)


def hinted(llm, data, backbone, **more):
    """A ranker whose prompts hold a hint."""
    settings = SETTINGS | {"show": True, "hint": "backbone", "backbone_run": str(backbone)} | more
    return make_ranker(opened(llm), data, settings)


def test_the_lm_learns_to_follow_a_hint_and_not_another_users(
    noise, knower, learner, run, on_cpu, one_title, alone, tmp_path
):
    args = (
        f"--dataset {noise.folder} --llm {learner} --backbone {knower} {LISTED} --adapt all "
        "--samples 2048 --batch 32 --micro 32 --evals 2 --val-samples 60"
    )

    def tune(name, more):
        return run(finetune.main, f"{args} {more} --out {tmp_path / name}")

    learnt = tune("hint", "--hint backbone --orders 2")
    assert learnt.json["val_hr@1"] > 0.9  # chance .067
    assert "trained on them, so it knows the truth too often" in learnt.output  # it has no folds
    assert "RecRanker-style, its list task: no dislikes" in learnt.output
    opens_as_stored(tmp_path / "hint", noise, alone, rtol=1e-3, atol=1e-3)
    for control in ("permuted", "none"):
        assert tune(control, f"--hint {control}").json["val_hr@1"] < 0.3
    both = f"--ckpt {tmp_path}/hint {tmp_path}/permuted --limit 30 --val-samples 20"
    said = run(evaluate.main, both).output
    copies = metrics_of(tmp_path / "permuted" / "evaluation")["copies"]
    assert copies["hint"]["copied"] > 0.9 and copies["hint"]["named_right"] == 1
    assert copies["permuted"]["named_right"] < 0.3
    assert "hint: its first choice is what the prompt names first in" in said
    assert "RecRanker-style hint of SASRec's best, another user's" in said


def test_how_often_a_first_choice_is_copied_by_hand():
    own_n, first_n, target_n = np.array([1, 2, 3]), np.array([1, 9, 3]), np.array([1, 2, 4])
    assert copied(own_n, first_n, target_n) == pytest.approx(
        {"copied": 2 / 3, "named_right": 1 / 3, "right_where_copied": 1 / 2, "right_elsewhere": 1}
    )


def test_a_hint_is_what_the_backbone_said_of_the_sample_out_of_fold(
    noise, counts, make_backbone, tmp_path
):
    # its scores of training samples are another model's than those of validation
    folder = make_backbone(tmp_path / "sasrec", noise, scores_with_truth(noise))
    out_of_fold = np.random.default_rng(5).random((len(noise.train), 15)).astype(np.float32)
    np.save(folder / "scores_train_15.npy", out_of_fold)
    which = np.arange(40, 52)
    cand_nC = candidates(noise, "train", 15, which)
    best_nh = np.take_along_axis(cand_nC, np.argsort(-out_of_fold[which], 1)[:, :5], 1)
    cfg = SimpleNamespace(C=15, seed=0, loss="candidates", history=3, input="titles")
    cfg.pool, cfg.orders = "stored", 1

    def told(hint, at=which):
        r = hinted(counts, noise, folder, hint=hint)
        batch = samples.examples(r, cfg, at, np.zeros(len(at), bool), at)
        found = [lines(r.lm, noise, r.titles, e.tail) for e in batch]
        assert all(items[-15:] == e.cand.tolist() for items, e in zip(found, batch))
        return np.array([items[-20:-15] for items in found])

    np.testing.assert_array_equal(told("backbone"), best_nh)
    np.testing.assert_array_equal(np.sort(told("shuffled")), np.sort(best_nh))
    assert not np.array_equal(told("shuffled"), best_nh)
    others = (which + len(noise.train) // 2) % len(noise.train)
    np.testing.assert_array_equal(told("permuted"), told("backbone", others))
    own, other = (users(noise, noise.train[at]) for at in (which, others))
    assert not (own == other).any()


def test_the_mean_over_orders_cancels_what_an_lm_thinks_of_a_place(
    noise, knower, counts, alone, monkeypatch
):
    """An LM that likes late places more than anything, and then the low numbers."""

    def likes_places(r, tails, cand_nC, *_, **__):
        return (np.arange(15) * 100 - cand_nC).astype(np.float32)

    monkeypatch.setattr(ranker, "score_tails", likes_places)
    which = np.arange(20)
    cand_nC = candidates(noise, "val", 15, which)

    def scores(orders):
        r = hinted(counts, noise, knower, hint="none", orders=orders)
        return score_samples(r, "val", which, 15, alone)

    assert (scores(1).argmax(1) == 14).all()
    np.testing.assert_allclose(scores(15), 700 - cand_nC)  # every candidate at every place
    assert np.ptp(scores(2) + cand_nC, axis=1).max() < np.ptp(scores(1) + cand_nC, axis=1).min()


def test_position_shifting_shows_a_sample_in_another_order_at_every_read(noise, knower, counts):
    cfg = SimpleNamespace(C=15, seed=0, loss="candidates", history=3, input="titles")
    cfg.pool, cfg.orders = "stored", 2
    r = hinted(counts, noise, knower, hint="none")
    which, at = np.full(40, 7), np.arange(40)
    batch = samples.examples(r, cfg, which, np.zeros(40, bool), at)
    stored = set(candidates(noise, "train", 15, which[:1])[0].tolist())
    assert all(set(e.cand.tolist()) == stored and e.cand[e.truth] == e.target[0] for e in batch)
    assert len({e.truth for e in batch}) > 8  # of 15 places
    again = samples.examples(r, cfg, which[:3], np.zeros(3, bool), at[:3])
    assert all(np.array_equal(a.tail, b.tail) for a, b in zip(again, batch))


def test_users_are_drawn_by_the_logarithm_of_their_interactions():
    n_U = np.array([3, 12, 150])
    ptr = np.r_[0, np.cumsum(n_U + 2)]  # two more each, which are not for training
    train = np.concatenate([np.arange(1, n) + start for n, start in zip(n_U, ptr)])
    data = SimpleNamespace(train=train, ptr=ptr, n_users=3)
    known, first = np.arange(len(train)), []
    for seed in range(1500):
        order = samples.by_importance(data, known, np.random.default_rng(seed))
        assert len(order) == len(known) == len(set(order.tolist()))
        first.append(order[0])
    share = np.bincount(users(data, train[first]), minlength=3) / len(first)
    np.testing.assert_allclose(share, np.log(n_U) / np.log(n_U).sum(), atol=0.04)


def test_an_answer_hints_at_the_best_of_its_own_pool(noise, knower, counts, alone, one_title):
    r = hinted(counts, noise, knower)
    pool = np.arange(20, 5, -1)

    def answered(r):
        of = PoolRanker(None, r, np.zeros(31), alone, lambda olds, wanted: [pool], 15, None)
        return of([np.array([1, 2])], UNSEEN)[0]

    best = answered(r)
    assert best.argmax() == 20 and np.isfinite(best).sum() == 15
    r.settings = r.settings | {"hint": "none"}
    assert np.ptp(answered(r)[pool]) == 0  # each stands there once


@pytest.mark.parametrize(
    "asked, named",
    [([3, 30], [30]), ([30], [30]), ([3], [30]), (list(range(2, 31)), [15, 30])],
)
def test_scores_of_any_items_are_hinted_at_the_backbones_best(
    asked, named, noise, knower, counts, alone, one_title
):
    """The backbone likes high numbers, and the LM follows the hint of each of its prompts."""
    choose = Chooser(30, 30, 15, lambda olds: np.tile(np.arange(31.0), (len(olds), 1)), told=True)
    of = PoolRanker(None, hinted(counts, noise, knower), np.zeros(31), alone, choose, 15, None)
    wanted = Wanted(np.isin(np.arange(31), asked), keep_seen=True, each=True)
    s_I = of([np.array([1, 2])], wanted)[0]
    assert np.isfinite(s_I[asked]).all()
    assert s_I[named].min() > np.delete(s_I, named).max()  # asked for or not


def test_a_stopped_run_with_a_hint_goes_on_as_if_nothing_had_happened(
    noise, knower, learner, run, on_cpu, tmp_path, monkeypatch
):
    args = (
        f"--dataset {noise.folder} --llm {learner} --backbone {knower} {LISTED} --hint backbone "
        "--orders 2 --draw importance --checkpoint-every 1"
    )
    run(finetune.main, f"{args} --out {tmp_path}/whole")
    jobs = {"finetune": (finetune.main, lambda out, *more: [*args.split(), "--out", out, *more])}
    assert same(stop_and_resume(jobs, "finetune", tmp_path, monkeypatch, 3), tmp_path / "whole")


@pytest.mark.parametrize(
    "more, says",
    [
        ("--hint backbone --no-show", "about the candidates that a prompt lists, but none are"),
        ("--orders 2 --no-show", "about the candidates that a prompt lists, but none are"),
        ("--orders 2 --order backbone", "--orders 2 moves the candidates"),
        ("--orders 16", "--orders 16 moves a list of 15 candidates to more places"),
        ("--pool backbone --order backbone", "it would always stand last there"),
        ("--hint permuted --without-fold 0", "a user that --without-fold leaves out"),
        ("--order backbone --no-show", "--order backbone sorts the candidates that a prompt lists"),
        ("--pool backbone --no-show --loss catalogue", "--loss catalogue asks for none"),
        ("--pool backbone --no-show --loss titles", "--loss titles asks for none"),
    ],
)
def test_what_cannot_be_meant_is_refused(more, says, noise, knower, counts, refused, tmp_path):
    args = f"--dataset {noise.folder} --llm {counts} --backbone {knower} {LISTED}"
    assert says in refused(finetune.main, f"{args} {more} --out {tmp_path}/x")


@pytest.mark.parametrize("other", ["teacher", "from_run"])
def test_an_order_that_is_another_run_s_is_not_refused(other):
    cfg = SimpleNamespace(order="backbone", show=False, verbalizer="mean", teacher="", from_run="")
    vars(cfg).update(hint="none", orders=1, C=15, pool="stored", loss="candidates", lambda_ms=0)
    cfg.without_fold = ()
    said = "sorts the candidates that a prompt lists"
    assert any(said in sentence for wrong, sentence in hints.faults(cfg) if wrong)
    setattr(cfg, other, "a run")
    assert not any(wrong for wrong, _ in hints.faults(cfg))


def test_a_pool_that_is_the_run_s_gone_on_from_is_not_refused():
    cfg = SimpleNamespace(order="shuffled", show=False, verbalizer="mean", teacher="", from_run="")
    vars(cfg).update(hint="none", orders=1, C=15, pool="backbone", loss="catalogue", lambda_ms=0)
    cfg.without_fold = ()
    for other, refused in (("teacher", True), ("from_run", False)):  # a teacher's pool is its own
        now = SimpleNamespace(**vars(cfg) | {other: "a run"})
        found = [sentence for wrong, sentence in hints.faults(now) if wrong]
        assert bool(found) == refused and all("leave --pool out" in each for each in found)


def test_a_control_answers_nobody(noise, knower, counts):
    says = "another user's hint, a control"
    with pytest.raises(Exception, match=says):
        hints.hint_of_best({"hint": "permuted"}, np.zeros((1, 15)))
