"""delrec.Recommender over language models: probabilities where they are trained, threads, pools."""

import numpy as np
import pytest
from recommenders import answers_of_threads

from delrec import Recommender
from delrec.runtime import load_run
from delrec.serving import ranking as serving
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
    assert answer.short.startswith("3 items are left of the 10 asked for: items of the history")
    assert answer.short.endswith("the LM ranks the best 3 of its backbone alone (pool=)")
    kept = rec.recommend(ids=["3", "9"], only=["3", "50"], keep_seen=True)
    assert set(kept.ids) == {"3", "50"}
    assert len(rec.score(ids=["3"], candidates=stock).items) == 5  # a score is asked of each


def test_a_score_lists_the_items_in_the_backbones_order(listing, toy, on_cpu, monkeypatch):
    rec, listed, score = Recommender.load(listing), [], serving.score_listed
    rec.add_items({"new": "The Silver River"})

    def noted(ranker, shown, cand_nC, *more):
        listed.append(cand_nC)
        return score(ranker, shown, cand_nC, *more)

    monkeypatch.setattr(serving, "score_listed", noted)
    asked = ["7", "50", "22", "3"]
    found = rec.score(ids=["3", "9"], candidates=[*asked, "new"])
    assert found.ids == [*asked, "new"]
    s_I = rec.now.open().choose.scorer([np.array([3, 9])])[0]
    (old_C,), (new_C,) = listed
    assert {7, 50, 22, 3} < set(old_C) and len(set(old_C)) == 15 == len(old_C)
    assert (np.diff(s_I[old_C]) <= 0).all()
    others = [i for i in np.argsort(-s_I, kind="stable") if i not in (0, 3, 9, 7, 50, 22, 61)]
    assert set(old_C) - {7, 50, 22, 3} == set(others[:11])
    assert new_C[:10].tolist() == old_C[:10].tolist() and set(new_C[10:]) == {61}
    listed.clear()
    rec.explain(ids=["3", "9"], item="20")
    assert set(rec.recommend(ids=["3", "9"], only=["7", "22"]).ids) == {"7", "22"}
    assert all(len(set(items)) == 15 for cand_nC in listed for items in cand_nC)


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
