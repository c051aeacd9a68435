"""evaluate.py --neighbours (LLMSEQPROMPT): a title that is written counts for titles like it."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from commands import metrics_of
from kinds import KINDS
from scripts import sentence

import evaluate
from delrec.evaluation.neighbours import add_neighbours, counted
from delrec.evaluation.rows import Row
from delrec.evaluation.scores import part_of
from delrec.metrics import compare, metrics

LM = SimpleNamespace(settings={"verbalizer": "likelihood"})


def hits(row, part) -> float:
    """HR@1 of a row's test scores."""
    return metrics(*compare(row.test_nC, part.is_target_nC))["hr@1"].mean()


@pytest.fixture
def parts(fans):
    """The validation and the test part of the data of kinds: in validation the next item is of a
    kind, and so it is asked of both.
    """
    val = part_of(fans, "val", np.arange(len(fans.val)), 15)
    return val, part_of(fans, "val", np.arange(len(fans.val)), 15)


def test_an_lm_that_writes_only_titles_like_the_truth_finds_it(fans, parts, alone):
    """It writes every other title of the truth's kind, and never the truth itself."""
    kind = np.array([title.split()[0] if title else "" for title in fans.titles])
    val, test = parts
    target_n1 = fans.items[val.samples][:, None]
    alike_nC = (kind[val.cand_nC] == kind[target_n1]) & (val.cand_nC != target_n1)
    asked = alike_nC.sum(1) > 1
    assert asked.mean() > 0.5 and np.isin(kind[target_n1], KINDS).all()
    for part in parts:
        for key in ("which", "samples", "cand_nC", "is_target_nC"):
            setattr(part, key, getattr(part, key)[asked])
    written_nC = np.where(alike_nC, 0.0, -5.0)[asked].astype(np.float32)
    rows = {"lm": Row(written_nC, written_nC, "", LM)}
    add_neighbours(rows, "tfidf", fans, val, test, alone)
    alike = np.mean(1 / (1 + alike_nC[asked].sum(1)))
    assert list(rows) == ["lm", "lm, tfidf neighbours", "lm, others' tfidf neighbours"]
    assert hits(rows["lm"], test) == 0
    ndcg = [
        metrics(*compare(row.test_nC, test.is_target_nC))["ndcg@10"].mean() for row in rows.values()
    ]
    assert ndcg[1] > ndcg[0] + 0.1 and ndcg[1] > ndcg[2] + 0.1, (ndcg, alike)


def test_what_is_counted_is_the_sum_over_written_titles():
    Z_ID = np.array([[0, 0], [2, 0], [3, 4], [0, 1], [-1, 0]], float)
    score_nC, cand_nC = np.array([[0.0, -1, -2, -0.5]]), np.array([[1, 2, 3, 4]])
    p = np.exp(score_nC[0] / 0.5) / np.exp(score_nC[0] / 0.5).sum()
    cos = np.array([[1, 0.6, 0, 0], [0.6, 1, 0.8, 0], [0, 0.8, 1, 0], [0, 0, 0, 1]])
    found = counted(score_nC, cand_nC, Z_ID, 0.5)
    np.testing.assert_allclose(found[0], cos @ p, rtol=1e-6)
    many = counted(np.repeat(score_nC, 5, 0), np.repeat(cand_nC, 5, 0), Z_ID, 0.5, chunk=2)
    np.testing.assert_allclose(many, np.repeat(found, 5, 0), rtol=1e-6)


def test_rows_that_write_no_titles_have_no_neighbours(fans, parts, alone):
    score_nC = np.zeros(parts[0].cand_nC.shape, np.float32)
    letters = SimpleNamespace(settings={"verbalizer": "letter"})
    rows = {"floor": Row(score_nC, score_nC, ""), "letters": Row(score_nC, score_nC, "", letters)}
    said = sentence(add_neighbours, rows, "tfidf", fans, *parts, alone)
    assert "none of the runs scores by likelihood" in said


def test_an_lm_that_lists_its_candidates_has_neighbours_and_one_of_shuffled_histories_none(
    fans, parts, alone
):
    score_nC = np.zeros(parts[0].cand_nC.shape, np.float32)
    listing = Row(score_nC, score_nC, "likelihood, candidates listed in shuffled order", LM)
    shuffled = Row(score_nC, score_nC, "its history in a random order")  # as add_run makes it
    rows = {"lm": listing, "lm, shuffled": shuffled}
    add_neighbours(rows, "tfidf", fans, *parts, alone)
    assert len(rows) == 4 and not any("lm, shuffled, " in name for name in rows)


def test_with_and_without_neighbours_stand_in_one_table(by_title, run, on_cpu, tmp_path):
    lm = shutil.copytree(by_title, tmp_path / "lm")
    run(evaluate.main, f"--ckpt {lm} --limit 20 --val-samples 20 --neighbours tfidf --out {lm}/t")
    rows = metrics_of(lm / "t")["rows"]
    assert {"lm", "lm, tfidf neighbours", "lm, others' tfidf neighbours"} <= set(rows)
    assert "temperature" in rows["lm, tfidf neighbours"]["note"]
