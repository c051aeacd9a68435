"""evaluate.py --free: what an LM writes of its own accord, and which answers count."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tuning import BY_MEAN, SMALL

import evaluate
import finetune
from delrec.data.prepared import candidates
from delrec.evaluation.free import MORE, answers, named_in, shares, titles_as_read
from delrec.lm import hints
from delrec.lm.prompts import MASK
from delrec.lm.ragged import of_padded
from delrec.lm.ranker import open_run, shown_histories
from delrec.lm.reading import read, read_prefix
from delrec.runtime import load_run


@pytest.fixture
def tuned(toy, decoder, run, on_cpu, tmp_path):
    """A run with a soft prompt, adapters and listed candidates."""
    out = tmp_path / "tuned"
    small = f"--dataset {toy.folder} --llm {decoder} {SMALL}".replace("--no-show", "--show")
    run(finetune.main, f"{small} {BY_MEAN} --soft-prompt random --k 5 --out {out}")
    return out


def test_it_writes_on_behind_the_prompt_that_titles_are_scored_by(tuned, toy, alone, monkeypatch):
    r, _ = open_run(load_run(tuned, toy), toy, torch.device("cpu"))
    which = np.arange(4)
    most = int(np.diff(r.titles.ptr).max()) + MORE
    said = answers(r, "val", which, 15, alone)
    cand_nC = candidates(toy, "val", 15, which)
    cand_nC = np.take_along_axis(cand_nC, hints.listing(r, "val", 15, which), 1)
    old = of_padded(shown_histories(r, np.asarray(toy.val)[which]))
    tails, _ = r.prompts.histories(old, cand_nC)
    start = read_prefix(r.lm, r.prompts.prefix, r.P)
    ends = r.lm.model.generation_config.eos_token_id
    for n in which:
        tail, tokens = tails[n], []
        while len(tokens) < most and ends not in tokens:
            x_1D = read(r.lm, start, [np.array([*tail[:-1], *tokens, MASK])])
            tokens.append(int((x_1D.float() @ r.lm.head_VD.float().T).argmax()))
        text = r.lm.tok.decode(tokens, skip_special_tokens=True).strip()
        assert said[n] == " ".join((text.splitlines() or [""])[0].split())


def test_an_answer_counts_if_it_names_one_candidate():
    titles = ["", "Alien (1979)", "Aliens", "Alien", "Heat (1995)"]
    assert named_in("I say HEAT (1995).", np.array([1, 2, 4]), titles) == [4]
    assert named_in("aliens", np.array([2, 3]), titles) == [2, 3]
    assert named_in("Heat", np.array([2, 4]), titles) == []
    found = shares([[4], [2], [2, 3], []], [4, 3, 2, 1])
    assert found == {"valid": 0.5, "hr@1": 0.25, "hr@1_of_valid": 0.5}
    assert shares([[]], [1]) == {"valid": 0, "hr@1": 0, "hr@1_of_valid": 0}


def test_titles_are_compared_as_the_lm_reads_them(tuned, toy):
    r, _ = open_run(load_run(tuned, toy), toy, torch.device("cpu"))
    assert titles_as_read(r)[1:] == [" ".join(title.split()) for title in toy.titles[1:]]
    r.titles = replace(r.titles, ptr=r.titles.ptr.copy())
    r.titles.ptr[2:] -= 1  # the first title loses its last token
    cut = titles_as_read(r)[1]
    assert cut and toy.titles[1].startswith(cut) and cut != toy.titles[1]


def test_a_table_of_answers_is_written(tuned, toy, run):
    said = run(evaluate.main, f"--ckpt {tuned} --free --val-samples 12")
    assert "one candidate named" in said.output and said.json["n"] == 12
    kept = json.loads((tuned / "free.json").read_text())
    assert len(kept["answers"]) == 12
    valid = [len(a["candidates_named"]) == 1 for a in kept["answers"]]
    assert kept["valid"] == np.mean(valid) == said.json["valid"]


def test_what_writes_no_titles_is_refused(tuned, toy, sasrec, encoder, run, refused, tmp_path):
    assert "--free is about an LM" in refused(evaluate.main, f"--ckpt {sasrec} --free")
    small = f"--dataset {toy.folder} --llm {encoder} {SMALL} {BY_MEAN} --soft-prompt none"
    run(finetune.main, f"{small} --out {tmp_path}/encoder")
    says = refused(evaluate.main, f"--ckpt {tmp_path}/encoder --free")
    assert "but --free asks an LM to write on; name a run of a decoder-only LM" in says
