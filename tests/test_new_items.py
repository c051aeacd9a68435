"""Recommender.add_items: items that training never saw, for every kind of run."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from recommenders import recommender_of

from delrec import Recommender
from delrec.backbone.by_title import ridge
from delrec.backbone.models import MODELS, build
from delrec.backbone.ranking import HistoryScorer
from delrec.serving.new_items import TitleMap, sparse_bags
from train_backbone import DEFAULTS

KINDS = {
    "SASRec": "sasrec",
    "a taught SASRec": "taught",
    "an LM on titles, in one pass": "one_pass",
    "an LM on titles, title by title": "by_title",
    "an LM that lists candidates": "listing",
    "an LM on vectors": "teacher",
    "SLMRec": "student",
    "an LM on both": "hybrid",
    "a plain LM": "plain_lm",
}
NEW = {"n1": "The Silver River Returns", "n2": "x" * 10_000, "n3": "Golden Orchard zzz"}
OLDS = [["3", "9"], ["12"], [str(i) for i in range(20, 60)]]


@pytest.fixture
def load(request, on_cpu):
    """load(kind) -> the recommender of a run of that kind, which ranks 9 of a pool."""

    def recommender(kind):
        pool = 0 if kind == "a plain LM" else 9  # nobody says which backbone is its own
        return Recommender.load(request.getfixturevalue(KINDS[kind]), pool=pool)

    return recommender


@pytest.mark.parametrize("kind", KINDS)
def test_added_items_are_ranked_and_change_nobody_s_score(kind, load):
    rec = load(kind)
    before = rec.recommend(ids=OLDS, top=60)
    candidates = [str(i) for i in range(1, 41)]
    scored = rec.score(ids=OLDS, candidates=candidates)
    assert not before[0].new and all(a.items for a in before)
    rec.add_items(NEW)
    after = rec.recommend(ids=OLDS, top=80)
    for a, b in zip(before, after):
        assert [x for x in b.items if not x.is_new] == list(a.items)  # to the last bit
        assert sorted(b.new) == ["n1", "n2", "n3"]
        assert all(np.isfinite(x.score) and x.probability is None for x in b.items if x.is_new)
    again = rec.score(ids=OLDS, candidates=[*candidates, *NEW])
    for a, b in zip(scored, again):
        assert b.items[:40] == a.items and b.new == list(NEW)


def known(like, times=1.0, doubt=None):
    """Unseen items whose rows are those of others, times a number; doubt: what is open of them."""

    def doubt_of(table):
        return np.zeros([table.shape[1]] * 2, np.float32) if doubt is None else doubt

    return SimpleNamespace(rows=lambda table: table[like] * np.float32(times), doubt=doubt_of)


def test_an_item_s_score_is_the_log_of_its_mean_weight_in_a_softmax():
    torch.manual_seed(0)
    model = build("sasrec", 60, SimpleNamespace(history=8, width=16, dropout=0)).eval()
    half = np.random.default_rng(0).normal(size=(17, 17)).astype(np.float32) / 12
    S = half @ half.T
    scorer = HistoryScorer(model)
    olds = [np.array([3, 9]), np.array([12])]
    found = scorer.with_items(known([5], 1, S))(olds)
    u_BX = np.concatenate([scorer.states(olds).numpy(), np.ones((2, 1))], 1)
    drawn_nX = np.random.default_rng(1).multivariate_normal(np.zeros(17), S, 200_000)
    weight_B = np.exp(found[:, [5]] + u_BX @ drawn_nX.T).mean(1)  # E exp(u . (y + e))
    np.testing.assert_allclose(found[:, 61], np.log(weight_B), atol=0.02)
    assert (found[:, 61] > found[:, 5] + 0.1).all()


def test_a_model_that_is_no_softmax_has_no_use_for_doubt():
    torch.manual_seed(0)
    model = build("seqsim", 60, SimpleNamespace(history=8, width=16)).eval()
    olds = [np.array([3, 9]), np.array([12])]
    before = HistoryScorer(model)
    grown = before.with_items(known([5, 7], 1, np.eye(17, dtype=np.float32)))
    np.testing.assert_allclose(grown(olds)[:, 61:], before(olds)[:, [5, 7]], rtol=1e-5, atol=1e-6)


def test_words_that_no_trained_title_has_make_a_title_say_less(toy):
    words = TitleMap(toy)
    table = np.random.default_rng(0).normal(size=(61, 5)).astype(np.float32)
    known = toy.titles[words.items[0]]
    mean = table[words.items].mean(0)
    rows = words.rows_of(table, [known, f"{known} qqa qqb qqc qqd qqe qqf qqg qqh", "qqa qqb"])
    far = np.linalg.norm(rows - mean, axis=1)
    assert far[1] < 0.5 * far[0] and far[2] < 1e-6
    # told apart by length alone
    np.testing.assert_allclose((rows[1] - mean) / far[1], (rows[0] - mean) / far[0], atol=1e-4)


def test_what_titles_leave_open_is_measured_on_items_that_the_map_did_not_see(toy):
    words, rng = TitleMap(toy), np.random.default_rng(0)
    W = torch.randn(words.X.shape[1], 3, generator=torch.Generator().manual_seed(0))
    told_nX = (words.X @ W).numpy()
    table = np.zeros((61, 3), np.float32)
    table[words.items] = told_nX + rng.normal(size=told_nX.shape) * [0, 1, 5]
    found = words.doubt(table)
    by_words = words.doubt(np.where(np.arange(3) == 0, table, 0).astype(np.float32))
    # the map of half of the items is not exact, so words alone leave something too
    assert found[0, 0] == pytest.approx(by_words[0, 0], rel=1e-3)  # columns are fitted apart
    assert 0 < found[0, 0] < found[1, 1] < found[2, 2]
    assert 0.7 * 25 < found[2, 2] < 2 * 25
    # a map that was fitted to these items themselves would leave less than the noise
    inside = words.rows_of(table, [toy.titles[i] for i in words.items]) - table[words.items]
    assert (inside[:, 2] ** 2).mean() < 0.7 * 25


@pytest.mark.parametrize("name", MODELS)
def test_every_backbone_takes_items_and_keeps_its_scores(name):
    torch.manual_seed(0)
    cfg = SimpleNamespace(**(DEFAULTS[name] | dict(history=8, width=16, dropout=0)))
    model = build(name, 60, cfg).eval()
    olds = [np.array([3, 9]), np.array([12]), np.arange(20, 60)]
    before = HistoryScorer(model)
    want = before(olds)
    grown = before.with_items(known([5, 7], 1.5))
    assert np.array_equal(grown(olds)[:, :61], want) and np.array_equal(before(olds), want)
    np.testing.assert_allclose(grown(olds)[:, 61:], want[:, [5, 7]] * 1.5, rtol=1e-5, atol=1e-6)
    seen = grown([np.array([3, 61])])
    assert np.isfinite(seen[0, 1:]).all() and not np.array_equal(seen, grown([np.array([3])]))


@pytest.mark.parametrize("kind", ["SASRec", "an LM on titles, in one pass", "an LM on vectors"])
def test_added_items_can_stand_in_a_history_and_more_can_follow(kind, load):
    rec = load(kind)
    rec.add_items({" n1\t": NEW["n1"]})
    first = rec.recommend(ids=["3", "n1"], top=60)
    assert first.history == ("3", "n1") and "n1" not in first.ids and not first.popular
    assert first.items != rec.recommend(ids=["3"], top=60).items
    assert rec.recommend(["the silver river returns"]).history == ("n1",)
    rec.add_items({"n3": NEW["n3"]})
    assert rec.recommend(ids=["3", "n1"], top=60, exclude=["n3"]).items == first.items
    only = rec.recommend(ids=["3"], only=["n1", "n3"])
    assert sorted(only.ids) == ["n1", "n3"] == sorted(only.new)


def test_a_vector_that_the_words_of_titles_make_is_found_again(toy):
    words = TitleMap(toy)
    W = torch.randn(len(words.words), 5, generator=torch.Generator().manual_seed(0))
    table = np.zeros((61, 5), np.float32)
    table[words.items] = (
        sparse_bags(words.words, [toy.titles[i] for i in words.items]) @ W
    ).numpy() + 3
    found = words.rows_of(table, ["Golden Machine (1994)", "zzzz qqqq"])
    mean = table[words.items].mean(0)
    np.testing.assert_allclose(found[1], mean, atol=1e-5)  # words that nobody knows: the mean
    want = (sparse_bags(words.words, ["Golden Machine (1994)"]) @ W).numpy()[0] + 3
    assert np.corrcoef(found[0] - mean, want - mean)[0, 1] > 0.7


def test_the_map_is_the_ridge_regression_of_a_formula():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(30, 8)) * (rng.random((30, 8)) < 0.4)
    Y = rng.normal(size=(30, 3))
    want = np.linalg.solve(X.T @ X + 0.7 * np.eye(8), X.T @ Y)
    dense = torch.tensor(X, dtype=torch.float32)
    got = ridge(dense.to_sparse(), torch.tensor(Y).float(), 0.7)
    torch.testing.assert_close(
        got, ridge(dense, torch.tensor(Y).float(), 0.7), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)


def test_a_state_with_new_items_takes_turns_from_the_first_moment(load):
    turns = []

    class Watched(Recommender):
        def __setattr__(self, name, value):
            turns.extend([value.turn] if name == "now" else [])
            super().__setattr__(name, value)

    rec = Watched(load("an LM on vectors").now)
    rec.add_items({"n1": NEW["n1"]})
    assert len(turns) == 2 and turns[0] is turns[1]


BAD = {
    "no items": ({}, "expected {id: title}"),
    "a list": (["n1"], "expected {id: title}"),
    "one that is there": ({"3": "A title"}, "the item '3' is there already"),
    "one that is there, with blanks": ({"3 ": "A title"}, "the item '3' is there already"),
    "one that is given twice": ({"n9": "A", " n9": "B"}, "the item 'n9' is there already"),
    "no id": ({" ": "A title"}, "the item '' has the title 'A title'"),
    "no title": ({"n9": "  "}, "the item 'n9' has the title '  '"),
    "not a number": ({"n9": float("nan")}, "the item 'n9' has the title nan"),
    "not a number for an id": ({float("nan"): "A title"}, "add_items is nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_added_is_a_sentence_and_adds_nothing(case, toy):
    given, says = BAD[case]
    rec = recommender_of(toy)
    now = rec.now
    with pytest.raises(ValueError) as refused:
        rec.add_items(given)
    assert says in str(refused.value) and rec.now is now
