"""delrec.Recommender over language models: probabilities where they are trained, threads, pools."""

import numpy as np
import pytest
from recommenders import answers_of_threads

from delrec import Recommender
from delrec.runtime import load_run
from delrec.serving.ranking import ranking

OLDS = [["3", "9"], ["12", "40", "7"]]


@pytest.mark.parametrize(
    "name", ["teacher", "student", "one_pass", "by_title", "listing", "hybrid"]
)
def test_an_lm_answers_with_what_it_ranks(name, request, toy, alone, on_cpu):
    folder = request.getfixturevalue(name)
    rec = Recommender.load(folder, pool=9)
    s_BI = ranking(load_run(folder, toy), toy, alone, 9)([np.array([3, 9]), np.array([12, 40, 7])])
    for answer, s_I in zip(rec.recommend(ids=OLDS, top=5), s_BI):
        want = np.argsort(-s_I, kind="stable")[:5]
        assert answer.ids == [str(i) for i in want]
        assert [x.score for x in answer.items] == s_I[want].tolist()


def test_a_probability_is_there_where_it_was_trained(teacher, student, by_title, one_pass, on_cpu):
    for folder in (teacher, student):
        rec = Recommender.load(folder)
        items = rec.score(ids=["3", "9"], candidates=[str(i) for i in range(1, 61)]).items
        assert sum(x.probability for x in items) == pytest.approx(1, abs=1e-5)
    for folder in (by_title, one_pass):  # trained among candidates, or calibrated
        assert Recommender.load(folder, pool=9).recommend(ids=["3"]).items[0].probability is None


def test_a_pool_is_chosen_among_what_is_allowed(by_title, on_cpu):
    rec = Recommender.load(by_title, pool=3)
    stock = ["50", "51", "52", "53", "3"]
    answer = rec.recommend(ids=["3", "9"], only=stock)
    assert set(answer.ids) <= {"50", "51", "52", "53"} and len(answer.ids) == 3
    assert "3 of 10 items are ranked" in answer.short
    kept = rec.recommend(ids=["3", "9"], only=["3", "50"], keep_seen=True)
    assert set(kept.ids) == {"3", "50"}
    assert len(rec.score(ids=["3"], candidates=stock).items) == 5  # a score is asked of each


@pytest.mark.parametrize("name", ["teacher", "by_title"])
def test_threads_get_the_answers_of_one(name, request, on_cpu):
    rec = Recommender.load(request.getfixturevalue(name), pool=9)
    olds = [[str(i), str(60 - i)] for i in range(1, 9)]
    alone = [rec.recommend(ids=old) for old in olds]
    assert answers_of_threads(rec, olds) == alone


def test_an_answer_prints_nothing(by_title, toy, on_cpu, capsys):
    rec = Recommender.load(by_title, pool=9)
    rec.add_items({"new": "The Silver River"})
    capsys.readouterr()
    rec.recommend(ids=OLDS)
    rec.score(ids=["3"], candidates=["4", "new"])
    assert capsys.readouterr().out == ""
