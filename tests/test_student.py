"""delrec/lm/student.py: the LM that stage 2 trains."""

import json
from types import SimpleNamespace

import pytest
import torch

import finetune
from delrec.lm.draws import Draws, drops


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


@pytest.mark.parametrize("rates", [{}, {"dropout": 0.1}, {"layerdrop": 0.5}])
def test_dropout_that_is_no_module_is_looked_after_too(rates):
    from transformers import OPTConfig, OPTForCausalLM

    shape = dict(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)
    off = dict(vocab_size=9, word_embed_proj_dim=8, dropout=0.0, attention_dropout=0.0)
    lm = OPTForCausalLM(OPTConfig(**shape, **off | rates))
    assert not any(isinstance(m, torch.nn.Dropout) for m in lm.modules())
    cfg = SimpleNamespace(cache_prefix=True, shard=False, residual_dropout=0)
    assert bool(Draws(cfg, lm, 4).state_dict()) == bool(rates)


def test_a_rate_of_a_part_counts_and_that_of_a_head_which_is_not_read_does_not():
    from transformers import GPT2Config, GPTNeoXConfig, T5GemmaConfig

    parts, still = T5GemmaConfig(), GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    assert still.summary_first_dropout
    for config in (GPTNeoXConfig(classifier_dropout=0.1), still, parts):
        assert not drops(SimpleNamespace(config=config, modules=list))
    parts.decoder.dropout_rate = 0.1
    assert drops(SimpleNamespace(config=parts, modules=list))
