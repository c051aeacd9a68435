"""Whole splits: batches, the order of candidates, neutral scores and calibration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_cases import NothingFetched
from lm_cases import ALL, SETTINGS, lines, naive, rank_with, windows
from scripts import sentence

from delrec.data.prepared import candidates, halves_of_validation, histories
from delrec.evaluation import plain as plain_lm
from delrec.kernels import verbalizer as kernels
from delrec.lm import ranker as ranking
from delrec.lm.batches import batches_of
from delrec.lm.calibration import (
    CALIBRATIONS,
    best_calibration,
    calibrate,
    calibrate_among,
    neutral_scores,
)
from delrec.lm.ranker import catalogue_later, make_ranker, score_samples, score_tails
from delrec.lm.reading import read_prefix

pytest_plugins = ["lm_fixtures"]


def test_batches_hold_every_prompt_once_within_their_budget():
    cost = np.random.default_rng(0).integers(1, 90, 200)
    batches = batches_of(cost, 300)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    assert all(len(b) * cost[b].max() <= 300 for b in batches) and len(batches) < 60
    # like lengths together
    assert all(cost[a].min() >= cost[b].max() for a, b in zip(batches, batches[1:]))
    # one too dear stands alone
    assert [b.tolist() for b in batches_of(np.array([500, 2, 3]), 300)] == [[0], [2, 1]]
    assert batches_of(np.zeros(0, int), 300) == []


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "likelihood"])
def test_neither_the_batch_nor_its_padding_changes_a_score(load, kind, toy, verbalizer, alone):
    r = rank_with(load, kind, toy, k=3, verbalizer=verbalizer)
    old, cand = windows(toy, 7)
    old[0], old[1] = old[0][:1], old[1][:0]  # very short next to very long
    tails = [r.prompts.history(h, c)[0] for h, c in zip(old, cand)]
    assert len({len(t) for t in tails}) > 4
    cand = cand[:, :4]
    single = np.concatenate([score_tails(r, [t], c[None], alone) for t, c in zip(tails, cand)])
    for tokens in (1, 200, 10**6):
        np.testing.assert_allclose(
            score_tails(r, tails, cand, alone, tokens=tokens), single, rtol=1e-5, atol=1e-5
        )
    back = score_tails(r, tails[::-1], cand[::-1], alone, tokens=300)[::-1]
    np.testing.assert_allclose(back, single, rtol=1e-5, atol=1e-5)


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "likelihood"])
def test_neutral_scores_are_those_of_a_prompt_without_history(
    load, plain, kind, toy, alone, verbalizer
):
    r = rank_with(load, kind, toy, k=3, verbalizer=verbalizer)
    neutral = neutral_scores(r, alone, chunk=7)  # 60 items do not divide by 7
    assert neutral.shape == (toy.n_items + 1,) and neutral[0] == 0
    np.testing.assert_allclose(neutral, neutral_scores(r, alone), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        want = naive(plain(kind), r, r.prompts.history([])[0], [1, 17, 60], r.P)
    np.testing.assert_allclose(neutral[[1, 17, 60]], want, rtol=1e-5, atol=1e-4)
    assert (
        lines(r.lm, toy, r.titles, np.concatenate([r.prompts.prefix, r.prompts.history([])[0]]))
        == []
    )
    # other histories, the same titles
    data = SimpleNamespace(**vars(toy) | {"items": toy.items[::-1].copy()})
    assert np.array_equal(
        neutral,
        neutral_scores(
            make_ranker(r.lm, data, SETTINGS | {"verbalizer": verbalizer}, r.P), alone, chunk=7
        ),
    )


def test_a_letter_has_no_neutral_score(load, toy, alone):
    assert not neutral_scores(rank_with(load, "decoder", toy, verbalizer="letter"), alone).any()


def test_calibration_removes_a_planted_bias_and_only_that():
    rng = np.random.default_rng(0)
    cand = np.stack([rng.permutation(60)[:15] + 1 for _ in range(400)])
    target = cand[:, 4]
    signal = rng.normal(size=cand.shape) + 2.5 * (cand == target[:, None])
    bias = 5 * rng.normal(size=61)
    assert calibrate_among(signal + bias[cand], cand, bias, target) == 1
    assert calibrate_among(signal + 0.5 * bias[cand], cand, bias, target) == 0.5
    # a neutral score that only disturbs
    assert calibrate_among(signal, cand, bias, target) == 0


@pytest.mark.parametrize("verbalizer, weight", [("mean", 1), ("likelihood", 0)])
def test_calibration_looks_at_all_items_where_the_lm_reads_them_all(
    verbalizer, weight, load, toy, alone, monkeypatch
):
    # over all items a bias hides how often each comes; among the candidates there is none
    often, bias = np.bincount(toy.items, minlength=61), 500 * np.random.default_rng(0).random(61)
    said = np.where(np.arange(61), often + bias, -np.inf)
    monkeypatch.setattr(
        ranking, "catalogue_later", lambda r, start, tails, _: lambda: np.stack([said] * len(tails))
    )
    r, which = rank_with(load, "decoder", toy, verbalizer=verbalizer), np.arange(20)
    cand = candidates(toy, "val", 15)[which]
    score = 1.0 * (cand == toy.items[toy.val[which]][:, None])
    assert calibrate(r, which, score, bias, alone) == weight


def test_calibration_is_chosen_by_the_ten_first_places():
    # without it every other truth is first and the rest are lost; with it all are second
    lost, second = (np.array([0, 20]), np.zeros(2, int)), (np.ones(2, int), np.zeros(2, int))
    assert best_calibration([lost, *[second] * (len(CALIBRATIONS) - 1)]) == 0.1


def test_the_plain_lm_is_calibrated_on_users_that_fusion_does_not_choose_on(
    toy, alone, monkeypatch
):
    asked = []
    monkeypatch.setattr(plain_lm, "neutral_scores", lambda r, ranks: np.zeros(61))
    monkeypatch.setattr(plain_lm, "calibrate", lambda r, which, *_: asked.extend(which) or 0.3)
    cfg = SimpleNamespace(calibrate=True, val_samples=0)
    scorer = SimpleNamespace(data=toy, ranks=alone, C=15, prompts=0, seconds=0)
    known_nC = np.zeros((len(toy.val), 15), np.float32)
    assert plain_lm.calibrated(None, cfg, scorer, known_nC).weight == 0.3
    first, second = halves_of_validation(toy)
    assert sorted(asked) == first.tolist() and not set(asked) & set(second)


def test_a_target_that_the_user_had_before_is_ranked_and_not_listed(alone, monkeypatch):
    said_1I = np.array([[-np.inf, 5, 9, 7, 6]], np.float32)
    data = SimpleNamespace(items=np.array([1, 2, 1]), ptr=np.array([0, 3]), test=np.array([2]))
    prompts = SimpleNamespace(histories=lambda old: (None, None))
    lm = SimpleNamespace(items=None, offset=None)
    r = SimpleNamespace(data=data, prompts=prompts, lm=lm, history=2, shuffled=False)
    monkeypatch.setattr(ranking, "candidates", lambda *_: np.array([[1, 3]]))
    monkeypatch.setattr(
        ranking, "over_catalogue", lambda r, tails, columns, f, *_: f(np.array([0]), said_1I)
    )
    penalty_2I = np.array([[0, 0, 0, 0, 0], [0, 0, 0, 3, 0]], np.float32)
    _, full_2n2, list_nK = ranking.score_and_rank(r, "test", np.array([0]), 2, alone, penalty_2I)
    # items 3 and 4 are better than the target, with the second penalty item 4; item 2 is masked
    assert full_2n2.tolist() == [[[2, 0]], [[1, 0]]]
    assert list_nK[0, :3].tolist() == [3, 4, 0]


@ALL
@pytest.mark.parametrize("order", ["shuffled", "backbone"])
def test_a_split_is_scored_at_its_stored_places_in_whatever_order_the_prompt_lists_it(
    load, plain, kind, toy, backbone, alone, order
):
    r = rank_with(load, kind, toy, k=2, show=True, order=order, backbone_run=str(backbone))
    which, cand = np.array([40, 3, 17]), candidates(toy, "val", 15)
    scores = score_samples(r, "val", which, 15, alone)
    by_backbone = np.load(backbone / "scores_val_15.npy")
    for row, n in zip(scores, which):
        listed = (
            cand[n] if order == "shuffled" else cand[n][np.argsort(-by_backbone[n], kind="stable")]
        )
        h = histories(toy, toy.val[[n]], 10)[0]
        tail = r.prompts.history(h[h > 0], listed)[0]
        assert lines(r.lm, toy, r.titles, tail)[-15:] == listed.tolist()
        with torch.no_grad():
            want = naive(plain(kind), r, tail, cand[n], r.P).numpy()
        np.testing.assert_allclose(row, want, rtol=1e-5, atol=1e-5 * max(1, abs(want).max()))


def test_two_ranks_share_a_split(load, toy, alone, monkeypatch):
    r = rank_with(load, "decoder", toy, k=2)
    which = np.arange(5, 12)
    whole, parts = score_samples(r, "val", which, 15, alone), []

    def gathered(rows, index, n, ranks):
        parts.append((index, rows))
        return np.zeros((n, rows.shape[1]), np.float32)

    monkeypatch.setattr(ranking, "gather_rows", gathered)
    for rank in (0, 1):
        score_samples(r, "val", which, 15, SimpleNamespace(rank=rank, world=2, main=False))
    assert sorted(np.concatenate([i for i, _ in parts])) == list(range(7))
    for index, rows in parts:
        np.testing.assert_allclose(rows, whole[index], rtol=1e-5, atol=1e-5)


def test_an_order_without_the_backbone_s_scores_is_a_sentence(load, toy, alone, tmp_path):
    r = rank_with(load, "decoder", toy, show=True, order="backbone", backbone_run=str(tmp_path))
    says = sentence(score_samples, r, "val", np.arange(3), 15, alone)
    assert str(tmp_path / "scores_val_15.npy") in says and "--order shuffled" in says


@pytest.mark.parametrize("verbalizer", ["mean", "first"])
def test_scores_of_the_catalogue_are_begun_without_waiting_for_a_number(
    load, toy, verbalizer, monkeypatch
):
    r = rank_with(load, "decoder", toy, k=3, verbalizer=verbalizer, show=False)
    # the pass and the kernels that a GPU has
    monkeypatch.setattr(r.lm, "paths", ["padded", "rows"])
    monkeypatch.setattr(kernels, "choose", lambda impl, x: "ref")
    old, _ = windows(toy, 4)
    tails = [r.prompts.history(h[: n + 1])[0] for n, h in enumerate(old)]
    want = ranking.score_catalogue(r, read_prefix(r.lm, r.prompts.prefix, r.P), tails)
    start = read_prefix(r.lm, r.prompts.prefix, r.P)
    with NothingFetched():
        scores = catalogue_later(r, start, tails)
    np.testing.assert_array_equal(scores(), want)
