"""Answers for histories: titles found, unknown ones said, the same answers one by one and from a
file; what --export writes.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from toys import popular

import evaluate
from delrec.data.prepared import users
from delrec.lm.ranker import open_run, score_tails
from delrec.runtime import load_run
from delrec.serving import ranking
from delrec.serving.lookup import Asked, Lookup


def test_titles_are_found_by_name_by_case_and_by_a_beginning_that_is_enough(toy):
    def find(*titles):
        return Lookup(toy).find([Asked(title) for title in titles])

    assert find(toy.titles[3].upper(), f" {toy.titles[10].lower()} ").items == [3, 10]
    alone = next(
        i
        for i in range(1, 61)
        if sum(t.lower().startswith(toy.titles[i][:-2].lower()) for t in toy.titles) == 1
    )
    assert find(toy.titles[alone][:-2]).items == [alone]
    found = find(toy.titles[3], toy.titles[10][:-1] + "x", "zzzz qqqq")
    assert found.items == [3] and [u.asked.text for u in found.unknown] == [
        toy.titles[10][:-1] + "x",
        "zzzz qqqq",
    ]
    assert toy.titles[10] in found.unknown[0].nearest and found.unknown[1].nearest == []


def answer(script, run, text, *args, **kwargs):
    """What evaluate.py --history says."""
    return script(evaluate.main, "--ckpt", run, "--history", text, *args, **kwargs)


def test_a_history_is_answered_with_the_best_titles_of_the_catalogue(
    chain, toy, script, on_cpu, alone
):
    old = [12, 3, 40]
    result = answer(
        script, chain.delrec, " | ".join(toy.titles[i] for i in old), "--top", 7, "--pool", 0
    )
    run = load_run(chain.delrec, toy)
    ranker, penalty = open_run(run, toy, torch.device("cpu"))
    items = np.array([i for i in range(1, 61) if i not in old])
    score = (
        score_tails(ranker, [ranker.prompts.history(np.array(old))[0]], items[None], alone)[0]
        - penalty[items]
    )
    best = items[np.argsort(-score, kind="stable")][:7]
    assert (
        result.json["history"] == old and [t["item"] for t in result.json["top"]] == best.tolist()
    )
    assert [t["score"] for t in result.json["top"]] == pytest.approx(
        np.sort(score)[::-1][:7].tolist(), rel=1e-4, abs=1e-3
    )
    lines = result.output.split("\n")
    for n, i in enumerate(best, 1):
        assert any(line.strip().startswith(f"{n}. {toy.titles[i]}   ") for line in lines)
    assert "ms to rank" in result.output and result.json["ms"] > 0


def test_the_lm_ranks_the_backbone_s_best_and_nothing_else(
    chain, toy, backbone, script, on_cpu, monkeypatch
):
    score_I = popular(toy)([0])[0].astype(np.float32)

    def by_popularity(run):
        assert run.folder == backbone
        return lambda olds: np.where(np.arange(61) == 0, -np.inf, np.tile(score_I, (len(olds), 1)))

    monkeypatch.setattr(ranking, "history_scorer", by_popularity)
    result = answer(
        script, chain.delrec, toy.titles[2] + " | " + toy.titles[5], "--top", 20, "--pool", 9
    )
    best = [i for i in np.argsort(-score_I, kind="stable") if i not in (0, 2, 5)][:9]
    assert {t["item"] for t in result.json["top"]} == set(best)
    whole = answer(
        script, chain.delrec, toy.titles[2] + " | " + toy.titles[5], "--top", 60, "--pool", 0
    )
    # never what was watched
    assert sorted(t["item"] for t in whole.json["top"]) == [
        i for i in range(1, 61) if i not in (2, 5)
    ]
    order = [t["item"] for t in whole.json["top"] if t["item"] in best]
    # in the order the whole catalogue has them
    assert [t["item"] for t in result.json["top"]] == order


def test_unknown_and_ambiguous_titles_are_a_sentence_with_the_nearest(chain, toy, script):
    says = answer(script, chain.delrec, toy.titles[7][:-1] + "x", "--pool", 0, code=1).error
    assert "no title" in says and toy.titles[7] in says
    both = next(
        t
        for t in toy.titles[1:]
        if sum(o.lower().startswith(t[:6].lower()) for o in toy.titles) > 1
    )[:6]
    says = answer(script, chain.delrec, both, code=1).error
    assert f"no title '{both}'" in says and says.count(" | ") >= 1
    assert (
        str(toy.folder / "titles.txt")
        in answer(script, chain.delrec, "国王的新衣 zzzzzz qqqq", code=1).error
    )
    assert "holds no known title" in answer(script, chain.delrec, " | ", code=1).error


def test_a_history_is_answered_by_one_run_with_its_backbone_at_hand(
    chain, toy, backbone, script, on_cpu, tmp_path, monkeypatch
):
    says = script(
        evaluate.main, "--ckpt", chain.delrec, backbone, "--history", toy.titles[1], code=1
    ).error
    assert "2 were given" in says
    lonely = shutil.copytree(chain.delrec, tmp_path / "lonely")
    config = json.loads((lonely / "config.json").read_text()) | {
        "backbone_run": str(tmp_path / "nothing")
    }
    (lonely / "config.json").write_text(json.dumps(config))
    says = answer(script, lonely, toy.titles[1], "--pool", 10, code=1).error
    assert f"no backbone in {tmp_path / 'nothing'}" in says and "--pool 0" in says


def test_unknown_titles_are_left_out_and_said(chain, toy, script, on_cpu):
    whole = answer(script, chain.delrec, f"{toy.titles[2]} | {toy.titles[5]}", "--pool", 0)
    part = answer(
        script,
        chain.delrec,
        f"{toy.titles[2]} | no such thing at all | {toy.titles[5]}",
        "--pool",
        0,
    )
    assert (
        part.json["unknown"] == ["no such thing at all"] and part.json["top"] == whole.json["top"]
    )
    assert (
        "left out: no title 'no such thing at all'" in part.output
        and "left out" not in whole.output
    )


def test_a_backbone_answers_with_the_lists_it_wrote(sasrec, toy, alone):
    rank = ranking.ranking(load_run(sasrec, toy), toy, alone)
    lists = np.load(sasrec / "topk_test.npy")
    olds = [
        toy.items[toy.ptr[users(toy, np.array([s]))[0]] : s].astype(np.int64) for s in toy.test[:9]
    ]
    s = rank(olds)
    for row, want, old in zip(s, lists, olds):
        assert (
            np.argsort(-row, kind="stable")[:20].tolist() == want.tolist()
            and (row[old] == -np.inf).all()
        )


@pytest.mark.parametrize("which", ["backbone", "one pass", "title by title"])
def test_a_file_is_answered_as_its_lines_one_by_one(
    which, request, chain, sasrec, toy, script, on_cpu, tmp_path
):
    run = {"backbone": sasrec, "title by title": chain.delrec}.get(which)
    run = run or request.getfixturevalue("one_pass")
    # its backbone is a rule without a model
    flags = ["--top", 5, "--pool", 0 if which == "title by title" else 9]
    histories = [[3, 9], [12], [40, 41, 2, 7], []]
    lines = [
        {"user": n, "history": [toy.titles[i] for i in h] + ["never heard of it"] * (n == 1)}
        for n, h in enumerate(histories)
    ]
    lines[2]["history"] = " | ".join(lines[2]["history"])
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + "\n")
    result = script(evaluate.main, "--ckpt", run, "--serve", tmp_path / "ask.jsonl", *flags)
    answers = [json.loads(x) for x in (tmp_path / "ask.answers.jsonl").read_text().splitlines()]
    assert [a["user"] for a in answers] == [0, 1, 2, 3]
    assert answers[3]["top"] == [] and result.json["without_known_title"] == 1
    assert [u["title"] for u in answers[1]["unknown"]] == ["never heard of it"]
    assert not answers[0]["unknown"]
    for n in range(3):
        history = " | ".join(toy.titles[i] for i in histories[n])
        one, many = answer(script, run, history, *flags).json["top"], answers[n]["top"]
        assert [t["item"] for t in one] == [t["item"] for t in many] and len(many) == 5
        assert [t["score"] for t in one] == pytest.approx([t["score"] for t in many], abs=2e-3)


def test_lists_without_a_model_cannot_choose_what_an_lm_ranks(chain, toy, script, on_cpu):
    assert (
        "no model.safetensors"
        in answer(script, chain.delrec, toy.titles[2], "--pool", 9, code=1).error
    )


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "line 1"),
        ('{"titles": []}', "expected"),
        ('{"history": 3}', "line 1"),
        ('{"history": ["a", 3.5]}', "line 1"),
        ("[]", "line 1"),
        ('{"history": ["qqqq zzzz"]}', "known title"),
        ("", "known title"),
    ],
)
def test_a_file_that_cannot_be_answered_is_a_sentence_and_leaves_nothing(
    text, says, sasrec, script, tmp_path
):
    (tmp_path / "ask.jsonl").write_text(text)
    assert (
        says
        in script(evaluate.main, "--ckpt", sasrec, "--serve", tmp_path / "ask.jsonl", code=1).error
    )
    assert [p.name for p in tmp_path.iterdir()] == ["ask.jsonl"]
    assert (
        "cannot be read"
        in script(evaluate.main, "--ckpt", sasrec, "--serve", tmp_path / "none.jsonl", code=1).error
    )
