"""delrec.Recommender: ids, titles, users in, ranked ids out; filters, what cannot be meant."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from recommenders import answers_of_threads, by_number, recommender_of
from scripts import ROOT
from toys import prepare_log

from delrec import Recommender
from delrec.runtime import load_run
from delrec.serving.ranking import best_of
from delrec.serving.results import Answers


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """40 articles with ids a01 .. a40 and titles Article 1 .. 40; customers 0 .. 19."""
    rows = [(u, f"a{(u * 7 + n) % 40 + 1:02d}", 10 * n + u) for u in range(20) for n in range(12)]
    titles = {f"a{i:02d}": f"Article {i}" for i in range(1, 41)}
    return prepare_log(tmp_path_factory.mktemp("shop"), rows, titles)


@pytest.fixture(scope="module")
def rec(shop):
    """Ranks by number: a40 is the best."""
    return recommender_of(shop)


@pytest.fixture(scope="module")
def trained(sasrec):
    return Recommender.load(sasrec)


# ---------------------------------------------------------------- what is asked


def test_a_history_is_given_by_titles_by_ids_or_by_its_user(rec):
    by_title = rec.recommend(["Article 3", "article 39"], top=2)
    assert by_title.ids == ["a40", "a38"] and by_title.titles == ["Article 40", "Article 38"]
    assert by_title.history == ("a03", "a39") and by_title.user is None
    assert rec.recommend(ids=["a03", "a39"], top=2).items == by_title.items
    of_user = rec.recommend(user=3, top=3)
    assert of_user.history == tuple(f"a{i}" for i in range(22, 34)) and of_user.user == "3"
    assert of_user.ids == ["a40", "a39", "a38"] and not of_user.popular


def test_lists_of_histories_are_answered_in_their_order(rec):
    many = rec.recommend([["a40"], ["Article 1", "a39"], []], top=1)
    assert isinstance(many, Answers) and [a.ids for a in many] == [["a39"], ["a40"], ["a07"]]
    assert [a.ids for a in rec.recommend(ids=[["a40"], ["a39"]], top=1)] == [["a39"], ["a40"]]
    users = rec.recommend(users=["0", "nobody", "1"], top=1)
    assert [a.user for a in users] == ["0", "nobody", "1"]
    assert [a.popular for a in users] == [False, True, False]
    assert rec.recommend(users=[]).answers == ()
    arrays = rec.recommend(ids=[np.array(["a40"]), np.array(["a39"])], top=1)
    assert [a.ids for a in arrays] == [["a39"], ["a40"]]


def test_what_can_be_read_only_once_is_read_once(rec):
    old = ["Article 3", "a39"]
    want = rec.recommend(old, top=2)
    assert want == rec.recommend(iter(old), top=2) == rec.recommend(map(str, old), top=2)
    assert rec.recommend(ids=(i for i in ["a03", "a39"]), top=2).history == ("a03", "a39")
    assert rec.score(iter(old), iter(["a07"])) == rec.score(old, ["a07"])
    many = rec.recommend((iter([name]) for name in old), top=2)
    assert many == rec.recommend([[name] for name in old], top=2)


def test_many_histories_are_answered_as_one_by_one(trained, toy):
    olds = [[str(i), str(i + 3)] for i in range(1, 50)]
    many = trained.recommend(ids=olds, top=5)
    for old, answer in zip(olds, many):
        one = trained.recommend(ids=old, top=5)
        assert one.ids == answer.ids
        assert [x.score for x in one.items] == pytest.approx([x.score for x in answer.items], 1e-4)


def test_a_trained_run_says_what_its_lists_say_with_probabilities(trained, sasrec, toy):
    lists = np.load(sasrec / "topk_test.npy")
    sample = int(toy.test[0])
    begin = int(toy.ptr[np.searchsorted(toy.ptr, sample, "right") - 1])
    old = [str(i) for i in toy.items[begin:sample]]
    answer = trained.recommend(ids=old, top=20)
    assert answer.ids == [str(i) for i in lists[0]]  # this log's ids are the numbers
    everything = trained.score(ids=old, candidates=[str(i) for i in range(1, 61)])
    assert sum(x.probability for x in everything.items) == pytest.approx(1, abs=1e-5)
    of = {x.id: (x.score, x.probability) for x in everything.items}
    assert all(of[x.id] == (x.score, x.probability) for x in answer.items)


def test_a_customer_without_a_known_history_gets_what_most_people_took(rec, shop):
    count = np.bincount(shop.items, minlength=41)
    best = np.argsort(-count[1:], kind="stable")[:4] + 1
    for answer in (
        rec.recommend(user="4711", top=4),
        rec.recommend([], top=4),
        rec.recommend(["zzzz qqqq"], top=4),
    ):
        assert answer.popular and answer.ids == [f"a{i:02d}" for i in best]
        assert [x.score for x in answer.items] == count[best].tolist()
        assert all(x.probability is None for x in answer.items)
    assert str(rec.recommend(user="4711").unknown[0]) == "no user '4711'"
    without = rec.recommend([], top=2, exclude=[f"a{best[0]:02d}"])
    assert without.ids == [f"a{i:02d}" for i in best[1:3]]


def test_unknown_titles_and_ids_are_reported_and_left_out(rec):
    answer = rec.recommend(["Artikel 11", "a02", {"id": "x9"}])
    assert answer.history == ("a02",) and not answer.popular
    assert [u.asked.text for u in answer.unknown] == ["Artikel 11", "x9"]
    assert "Article 11" in answer.unknown[0].nearest
    assert [u.asked.text for u in rec.recommend(ids=["Article 1", "a02"]).unknown] == ["Article 1"]


# ---------------------------------------------------------------- filters


def test_only_and_exclude_say_what_may_be_in_an_answer(rec):
    stock = {"a01", "a05", "a07", "gone"}
    answer = rec.recommend(["a05"], only=stock, top=5)
    assert answer.ids == ["a07", "a01"] and [u.asked.text for u in answer.unknown] == ["gone"]
    assert rec.recommend(["a05"], only=stock, exclude=["a07"]).ids == ["a01"]
    assert rec.recommend(["a05"], exclude=["a40", "Article 39"], top=1).ids == ["a38"]
    assert rec.recommend(["a05"], only=np.array(["a01", "a02"])).ids == ["a02", "a01"]


def test_answers_share_the_names_of_a_stock_list_that_nobody_has(rec):
    stock = ["a01", "a02", *(f"gone{n}" for n in range(2000))]
    by_users = rec.recommend(users=range(20), only=stock)
    by_score = rec.score(users=range(20), candidates=stock)
    for answers in (by_users, by_score):
        assert len(answers[0].unknown) == 2000
        assert len({id(answer.unknown) for answer in answers}) == 1
    of_both = rec.recommend(["Article 1", "nothing"], only=stock).unknown
    assert [u.asked.text for u in of_both[:2]] == ["nothing", "gone0"] and len(of_both) == 2001


def test_a_refusal_names_ten_of_many_unknown_names(rec):
    names = [f"x{n}" for n in range(500)]
    with pytest.raises(ValueError, match="no item with the id 'x9' and 490 more.; give") as refused:
        rec.score(ids=names, candidates=["a01"])
    assert len(str(refused.value)) < 500


def test_seen_items_are_left_out_unless_they_may_be_bought_again(rec):
    assert rec.recommend(["a40", "a02"], top=2).ids == ["a39", "a38"]
    assert rec.recommend(["a40", "a02"], top=2, keep_seen=True).ids == ["a40", "a39"]
    assert rec.recommend(["a40"], only=["a40"], keep_seen=True).ids == ["a40"]
    gone = rec.recommend(["a40"], only=["a40"])
    assert gone.items == () and gone.short.startswith("no item is left of the 10 asked for")


def test_more_than_a_run_can_rank_is_said(rec):
    answer = rec.recommend(["a40"], top=100)
    assert len(answer.items) == 39 and answer.short == (
        "39 items are left of the 100 asked for: items of the history are not shown "
        "(keep_seen=True shows them)"
    )
    every = rec.recommend(["a40"], top=100, keep_seen=True)
    assert every.short.endswith(
        "40 items are left of the 100 asked for: the catalogue holds no more"
    )
    assert rec.recommend(["a40"], top=39).short is None


def test_candidates_are_scored_in_their_order_also_those_of_the_history(rec):
    answer = rec.score(["a40", "a01"], ["a07", "Article 40", "nothing", "a02"])
    assert [(x.id, x.score) for x in answer.items] == [("a07", 7), ("a40", 40), ("a02", 2)]
    assert [u.asked.text for u in answer.unknown] == ["nothing"]
    assert [a.ids for a in rec.score(users=[1, 2], candidates=["a07"])] == [["a07"], ["a07"]]


def test_a_candidate_is_one_item_whoever_else_has_its_title(tmp_path):
    rows = [(u, f"a{(u * 7 + n) % 40 + 1:02d}", 10 * n + u) for u in range(20) for n in range(12)]
    twins = {f"a{i:02d}": "Mug" if i in (5, 9) else f"Article {i}" for i in range(1, 41)}
    rec = recommender_of(prepare_log(tmp_path, rows, twins))
    answer = rec.score(["a40"], ["a07", "Mug", "a09", "a02", "Mug"])
    assert answer.ids == ["a07", "a05", "a09", "a02", "a05"]
    (said,) = answer.remarks
    assert said.startswith("'Mug' is the title of 2 items (ids a05, a09); a05 was taken")
    assert "Mug" not in rec.recommend(["a40"], exclude=["Mug"], top=40).titles
    assert rec.recommend(["a40"], only=["Mug"]).ids == ["a09", "a05"]


def test_ties_go_to_the_smaller_number(shop):
    rule = recommender_of(shop, lambda olds, _: np.zeros((len(olds), 41), np.float32))
    assert rule.recommend(["a02"], top=3).ids == ["a01", "a03", "a04"]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("shape", [(2, 0), (0, 5), (1, 3)])
def test_the_best_of_few_or_no_items_are_as_many(shape):
    items, scores = best_of(np.zeros(shape, np.float32), 5)
    assert items.shape == scores.shape == (shape[0], min(shape[1], 5))


def test_the_best_of_many_rows_are_the_best_whatever_is_tied():
    rng = np.random.default_rng(0)
    for top in (1, 3, 12, 30):
        s_BI = rng.integers(0, 8, (40, 30)).astype(np.float32)
        s_BI[rng.random(s_BI.shape) < 0.5] = -np.inf
        s_BI[0] = -np.inf
        for s_I, best_k, score_k in zip(s_BI, *best_of(s_BI, top)):
            expected = sorted(np.flatnonzero(s_I > -np.inf), key=lambda i: (-s_I[i], i))[:top]
            ranked = score_k > -np.inf
            assert best_k[ranked].tolist() == expected
            assert score_k[ranked].tolist() == s_I[expected].tolist()


def test_the_items_of_an_answer_are_a_tuple_to_whoever_looks(rec):
    answer = rec.recommend(["Article 3"], top=3)
    items = tuple(answer.items)
    assert answer.items == items and hash(answer.items) == hash(items)
    assert answer.items[-1] == items[2] and answer.items[:2] == items[:2] and len(items) == 3
    assert repr(answer.items) == repr(items) and answer == rec.recommend(["Article 3"], top=3)
    assert answer != rec.recommend(["Article 3"], top=2) and items[0] in answer.items
    sent = pickle.dumps(answer)
    assert pickle.loads(sent) == answer and b"Article 20" not in sent  # not the whole catalogue


def test_answers_become_tables(rec):
    table = rec.recommend(users=["0", "nobody"], top=2).to_polars()
    assert table.columns[:5] == ["question", "user", "rank", "id", "title"]
    assert table["question"].to_list() == [0, 0, 1, 1] and table["rank"].to_list() == [1, 2, 1, 2]
    assert table["popular"].to_list() == [False, False, True, True]
    assert rec.recommend(ids=["a40"], only=["a40"]).to_polars().shape == (0, 9)
    with pytest.raises(AttributeError):
        rec.recommend(["a01"]).items[0].score = 3


# ---------------------------------------------------------------- bad input


BAD = {
    "nothing is asked": (lambda rec: rec.recommend(), "none were given"),
    "two are asked": (lambda rec: rec.recommend(["a01"], user="1"), "history and user were given"),
    "a number for a history": (lambda rec: rec.recommend(3), "a history is 3, expected a list"),
    "not a number in a history": (lambda rec: rec.recommend([float("nan")]), "holds NaN, expected"),
    "nothing in a history": (lambda rec: rec.recommend(["a01", None]), "holds null"),
    "not a number for an id": (lambda rec: rec.recommend(ids=[float("nan")]), "ids holds nan"),
    "not a number for a user": (lambda rec: rec.recommend(user=float("nan")), "a user is nan"),
    "one user for several": (lambda rec: rec.recommend(users="12"), "give a list of users"),
    "none at the top": (lambda rec: rec.recommend(["a01"], top=0), "top is 0, expected a whole"),
    "half at the top": (lambda rec: rec.recommend(["a01"], top=2.5), "top is 2.5"),
    "nothing left": (
        lambda rec: rec.recommend(["a01"], only=["x1", "x2"]),
        "no item is left by only (2 names are of no item, such as 'x1', 'x2')",
    ),
    "everything excluded": (
        lambda rec: rec.recommend(["a01"], only=["a02"], exclude=["a02"]),
        "no item is left by only and exclude",
    ),
    "not a number in stock": (lambda rec: rec.recommend([], only=[float("nan")]), "only holds nan"),
    "a number for a list": (lambda rec: rec.recommend([], exclude=2.5), "exclude is 2.5; give ids"),
    "no such column": (
        lambda rec: rec.recommend([], where={"category": "tea"}),
        "keeps no column 'category', nor any other beside the titles; those of a table of orders "
        "are not kept: give articles and their columns in a file of their own with data/prepare.py",
    ),
    "no column at all": (lambda rec: rec.recommend([], where="tea"), "where is 'tea'; give a col"),
    "no candidates": (lambda rec: rec.score(["a01"]), "was given no candidates"),
    "unknown candidates": (lambda rec: rec.score(["a01"], ["x"]), "no candidate is known"),
    "a score for nobody": (lambda rec: rec.score(user="x", candidates=["a01"]), "no user 'x'"),
    "no such run": (lambda rec: Recommender.load("runs/none"), "is no run folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_one_sentence(case, rec):
    ask, says = BAD[case]
    with pytest.raises(ValueError) as refused:
        ask(rec)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_wrong_word_is_pythons_own_refusal(rec):
    with pytest.raises(TypeError, match="keep_sen"):
        rec.recommend(["a01"], keep_sen=True)


def test_scores_that_are_no_numbers_are_refused(shop):
    rule = recommender_of(shop, lambda olds, _: np.full((len(olds), 41), np.nan, np.float32))
    with pytest.raises(ValueError, match="are not numbers"):
        rule.recommend(["a01"])


def test_a_run_of_another_data_set_is_refused(sasrec, shop):
    with pytest.raises(ValueError, match="was trained on another preparation"):
        Recommender.load(sasrec, dataset=str(shop.folder))


def test_long_histories_and_long_titles_are_answered(trained):
    long = trained.recommend(ids=[str(i % 60 + 1) for i in range(10_000)], top=3, keep_seen=True)
    recent = trained.recommend(ids=[str(i % 60 + 1) for i in range(9_900, 10_000)], keep_seen=True)
    assert long.ids == recent.ids[:3] and len(long.history) == 10_000
    answer = trained.recommend(["x" * 10_000, "y " * 5_000])
    assert answer.popular and len(answer.unknown) == 2


# ---------------------------------------------------------------- threads, and what an import costs


def test_threads_get_the_answers_of_one(trained):
    olds = [[str(i), str(60 - i)] for i in range(1, 25)]
    alone = [trained.recommend(ids=old) for old in olds]
    assert answers_of_threads(trained, olds) == alone


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = (
        "import sys, delrec; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    code += "; from delrec import Recommender; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"], done.stderr


def test_a_run_is_loaded_once(shop):
    opened = []

    def scorer():
        opened.append(1)
        return by_number

    rule = recommender_of(shop)
    rule.now.open_scorer = scorer
    assert not opened
    rule.recommend(["a01"])
    rule.recommend(["a01"])
    assert opened == [1]


def test_the_recommender_of_a_run_keeps_its_configuration(trained, sasrec):
    assert trained.run.folder == load_run(sasrec).folder and trained.run.stage == "train_backbone"
