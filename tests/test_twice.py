"""finetune.py --r-drop: every prompt is read twice, and both answers are to be alike."""

import numpy as np
import pytest
import torch
from commands import log_of
from stopped_runs import goes_on_to_the_last_bit
from tiny_lms import bpe_tokenizer, randomise, save
from torch.nn.functional import kl_div
from vector_runs import TUNE

import finetune
from delrec.lm import twice


@pytest.fixture(scope="module")
def to_ids(toy, sasrec, decoder):
    """finetune.py's options that train the tiny decoder on vectors, with much dropout."""
    begun = f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} --soft-prompt none"
    return f"{begun} {TUNE} --dropout .5"


def test_the_divergence_is_that_of_both_sides():
    p, q = torch.randn(2, 5, 7).log_softmax(-1)
    sides = [kl_div(b, a, log_target=True, reduction="sum") for a, b in ((p, q), (q, p))]
    # scores are known up to a constant of their row
    found = twice.divergence(p + torch.randn(5, 1), q + torch.randn(5, 1))
    torch.testing.assert_close(found, sum(sides))
    assert twice.divergence(p, p + 3) < 1e-6


def test_the_loss_is_the_mean_of_two_passes_and_their_distance():
    one, two = torch.randn(2, 5, 7)
    passes = iter([one, two])

    def parts(s_NI):
        return {"candidates": s_NI.square().sum(), "rps": s_NI.sum()}

    found = twice.losses(lambda: next(passes), parts, 0.8)
    assert sorted(found) == ["apart", "candidates", "rps"]
    torch.testing.assert_close(found["rps"], (one.sum() + two.sum()) / 2)
    torch.testing.assert_close(found["apart"], 0.2 * twice.divergence(one, two))


def test_passes_become_alike_where_that_counts(to_ids, run, on_cpu, tmp_path):
    """`apart` over a, so as it is without the weight: it counts much, or next to nothing."""
    options = f"{to_ids} --samples 240 --lr 1e-2"

    def apart(a):
        run(finetune.main, f"{options} --r-drop {a} --out {tmp_path}/{a}")
        told = [line["apart"] / a for line in log_of(tmp_path / str(a)) if "apart" in line]
        return np.mean(told[-10:])

    much, little = apart(100.0), apart(1e-6)
    assert 0 < much < little / 3, (much, little)


@pytest.mark.parametrize("without", ["--dropout 0", "--adapt all"])
def test_an_lm_s_own_dropout_tells_passes_apart_too(without, to_ids, run, on_cpu, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tok = bpe_tokenizer()
    config = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=1, n_head=4, n_positions=256)
    llm = save(tmp_path / "gpt2", randomise(GPT2LMHeadModel(config), 4), tok)
    run(finetune.main, f"{to_ids} --llm {llm} {without} --r-drop .5 --out {tmp_path}/run")
    apart = [line["apart"] for line in log_of(tmp_path / "run") if "apart" in line]
    assert apart and min(apart) > 1e-3


def test_a_killed_run_goes_on_to_the_last_bit(to_ids, on_cpu, tmp_path, monkeypatch):
    goes_on_to_the_last_bit(finetune.main, f"{to_ids} --r-drop .5", tmp_path, monkeypatch, after=4)


def test_what_cannot_be_meant_is_one_sentence(to_ids, refused, teacher, on_cpu, tmp_path):
    def says(options):
        return refused(finetune.main, f"{to_ids} --r-drop .5 {options} --out {tmp_path}/x")

    assert "raise --dropout" in says("--dropout 0")
    assert "leave --adapt all out" in says("--adapt all")
    assert "--input is hybrid" in says("--input hybrid")
    assert "leave one of them out" in says("--lambda-ms .1 --blocks 1")
    assert not (tmp_path / "x").exists()
