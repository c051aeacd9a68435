"""Recommender.similar and explain: what items are alike by, and what a score rests on."""

import shutil

import numpy as np
import pytest
import torch
from commands import edit_config
from recommenders import recommender_of

import evaluate
from delrec import Recommender
from delrec.runtime import load_run, read_tensors, write_tensors
from delrec.serving.catalogue import Catalogue


@pytest.fixture
def load(request, on_cpu):
    """load(fixture) -> the recommender of its run."""
    return lambda name: Recommender.load(request.getfixturevalue(name), pool=9)


@pytest.mark.parametrize("name", ["sasrec", "teacher", "by_title"])
def test_alike_is_the_cosine_of_item_vectors(name, load, sasrec):
    rec = load(name)
    table = read_tensors(sasrec / "model.safetensors")["item.weight"].numpy()[1:]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosine = unit @ unit[6]
    cosine[6] = -np.inf
    want = np.argsort(-cosine, kind="stable")[:5]
    answer = rec.similar("7", top=5)
    assert answer.ids == [str(i + 1) for i in want] and answer.history == ("7",)
    np.testing.assert_allclose([x.score for x in answer.items], cosine[want], atol=1e-5)
    assert "the item vectors of" in answer.remarks[-1]
    assert [a.history for a in rec.similar(["7", 8], top=1)] == [("7",), ("8",)]
    assert [a.history for a in rec.similar(iter(["7", 8]), top=1)] == [("7",), ("8",)]
    few = rec.similar("7", only=["3", "9", "7"])
    assert set(few.ids) == {"3", "9"} and few.short == (
        "2 items are left of the 10 asked for: the item itself is not shown, nor what only=, "
        "exclude= and where= leave out"
    )


def replaced(folder):
    """Puts the run of a log with one article more into a run's folder."""
    tensors = read_tensors(folder / "model.safetensors")
    table = tensors["item.weight"]
    more = torch.cat([table[:1], table.flip(0)])
    write_tensors(folder / "model.safetensors", tensors | {"item.weight": more})
    edit_config(folder, finished=1.0, n_items=61, data_hash="another")


def test_a_loaded_run_tells_what_is_alike_by_its_own_vectors(sasrec, toy, tmp_path, alone):
    folder = shutil.copytree(sasrec, tmp_path / "run")
    want = Recommender.load(folder)
    first = want.similar("7", top=5).items
    want.add_items({"twin": "Silver Machine"})
    rec, late = (Recommender.load(folder) for _ in range(2))
    unopened = Recommender.of_run(load_run(folder, toy), Catalogue(toy), alone)
    replaced(folder)
    assert rec.similar("7", top=5).items == first
    late.add_items({"twin": "Silver Machine"})
    assert late.similar("7", top=9).items == want.similar("7", top=9).items
    with pytest.raises(ValueError, match="was replaced by another run"):
        unopened.similar("7")


def test_vectors_of_another_number_of_items_are_refused(sasrec, toy, tmp_path, alone):
    folder = shutil.copytree(sasrec, tmp_path / "run")
    config = load_run(folder, toy)
    replaced(folder)
    edit_config(folder, finished=config.finished)
    with pytest.raises(ValueError, match="holds the vectors of 61 items by now, expected 60"):
        Recommender.of_run(config, Catalogue(toy), alone).similar("7")


def test_added_items_are_alike_by_their_titles(load, toy):
    rec = load("sasrec")
    rec.add_items({"twin": "Silver Machine", "other": "qqqq"})
    answer = rec.similar("twin", top=60)
    assert "twin" not in answer.ids and answer.new == ["other"]
    assert {"twin", "other"} <= set(rec.similar("7", top=61).ids)


def test_where_there_are_no_vectors_words_tell_what_is_alike(chain, toy, on_cpu):
    rec = Recommender.load(chain.delrec, pool=0)
    answer = rec.similar(toy.titles[9], top=3)  # its backbone is a rule
    assert answer.remarks[-1] == "alike by the words of the titles"
    own = set(toy.titles[9].split())
    assert all(own & set(title.split()) for title in answer.titles)


def test_a_reason_is_what_leaving_it_out_shows(load):
    rec = load("sasrec")
    old = ["3", "9", "12", "3"]
    found = rec.explain(ids=old, item="20")
    whole = rec.score(ids=old, candidates=["20"]).items[0]
    assert found.item == whole
    assert {reason.id for reason in found.reasons} == {"3", "9", "12"}
    for reason in found.reasons:
        left = [i for i in old if i != reason.id]
        lower = whole.score - rec.score(ids=left, candidates=["20"]).items[0].score
        assert reason.lowers == pytest.approx(lower, abs=1e-4) and reason.attention is None
    lowers = [reason.lowers for reason in found.reasons]
    assert lowers == sorted(lowers, reverse=True)
    assert found.to_polars().shape == (3, 5)
    assert len(rec.explain(ids=["5"], item="20").reasons) == 1


def test_a_planted_reason_comes_first_with_how_often_they_stood_together(toy):
    def rule(olds, wanted):
        """Item 20 is good after item 9, whatever else there is."""
        s_BI = np.zeros((len(olds), 61), np.float32)
        s_BI[:, 20] = [5.0 * (9 in old) + len(old) / 10 for old in olds]
        return s_BI

    rec = recommender_of(toy, rule)
    rec.run.history = 20
    found = rec.explain(ids=["3", "9", "12"], item="20")
    assert [reason.id for reason in found.reasons][0] == "9"
    assert found.reasons[0].lowers == pytest.approx(5.1)
    items, at = toy.items.tolist(), toy.ptr.tolist()
    together = 0
    last = np.full(toy.n_users, -1)
    owner = np.searchsorted(toy.ptr, toy.train, "right") - 1
    np.maximum.at(last, owner, toy.train)
    for begin, end in zip(at[:-1], last + 1):
        for p in range(begin, end):
            for q in range(p + 1, min(p + 6, end)):
                together += {items[p], items[q]} == {9, 20}
    assert found.reasons[0].together == together > 0


@pytest.mark.parametrize("name", ["one_pass", "teacher", "by_title", "hybrid"])
def test_the_attention_of_an_lm_is_shared_among_the_history(name, load):
    rec = load(name)
    found = rec.explain(ids=["3", "9", "12"], item="20", attention=True)
    shares = [reason.attention for reason in found.reasons]
    assert all(0 < share < 1 for share in shares) and sum(shares) < 1
    before = rec.recommend(ids=["3", "9"])
    rec.explain(ids=["3", "9", "12"], item="20", attention=True)
    assert rec.recommend(ids=["3", "9"]) == before  # it reads as it did


BAD = {
    "an unknown item": (lambda rec: rec.similar("zzzz qqqq"), "no title 'zzzz qqqq'"),
    "attention of a backbone": (
        lambda rec: rec.explain(["3"], "9", attention=True),
        "is no LM, so it has no attention",
    ),
    "no history": (lambda rec: rec.explain([], "9"), "the history holds no known item"),
    "no item": (lambda rec: rec.explain(["3"]), "was given no item"),
    "an item nobody knows": (lambda rec: rec.explain(["3"], "zzzz"), "no title 'zzzz'"),
    "many histories": (lambda rec: rec.explain([["3"], ["4"]], "9"), "several histories"),
    "not a number": (lambda rec: rec.similar(float("nan")), "holds NaN"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_a_sentence(case, load):
    ask, says = BAD[case]
    with pytest.raises(ValueError) as refused:
        ask(load("sasrec"))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_the_command_line_says_what_is_alike(sasrec, toy, script, on_cpu, load):
    result = script(evaluate.main, "--ckpt", sasrec, "--similar", "7", "--top", 3)
    assert [t["id"] for t in result.json["top"]] == load("sasrec").similar("7", top=3).ids
    assert result.json["like"] == "7" and f"like: {toy.titles[7]}" in result.output
    says = script(evaluate.main, "--ckpt", sasrec, "--similar", "zzzz qqqq", code=1).error
    assert "no title 'zzzz qqqq'" in says or "holds no known item" in says
