"""delrec/lm/student.py: the LM that stage 2 trains."""

import json

import pytest

import finetune


@pytest.mark.parametrize("form", ["titles", "hybrid"])
def test_inner_blocks_score_titles_by_the_head_whatever_stands_for_an_item(
    form, toy, sasrec, decoder, script, on_cpu, tmp_path
):
    flags = ["--dataset", toy.folder, "--backbone", sasrec, "--llm", decoder, "--input", form]
    flags += ["--soft-prompt", "none", "--verbalizer", "mean", "--order", "shuffled", "--lr", 0.01]
    flags += ["--blocks", 2, "--lambda-ms", 0.5, "--samples", 48, "--batch", 8, "--val-samples", 8]
    script(finetune.main, *flags, "--init-r", 4, "--target-r", 2, "--out", tmp_path / "run")
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    terms = [json.loads(line)["ms"] for line in lines]
    assert all(term > 0 for term in terms) and terms[-1] < terms[0]
