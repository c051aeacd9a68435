"""What a loaded LM knows of itself, and the vectors it takes in place of tokens."""

import json

import numpy as np
import pytest
import torch
from lm_cases import ALL, SETTINGS, lines, opened
from scripts import sentence
from tiny_lms import bpe_tokenizer, randomise, save, t5, wordpiece_tokenizer

from delrec.lm import model
from delrec.lm.ranker import make_ranker
from delrec.lm.soft_prompt import load_soft_prompt, save_soft_prompt
from delrec.lm.text import SLOT, embed, encode, random_soft_prompt, token_scale, width


@ALL
def test_what_is_loaded_is_frozen_and_knows_its_kind(load, kind):
    m = load(kind)
    assert m.kind == {"decoder": "decoder", "encoder": "encoder"}.get(kind, "encoder-decoder")
    assert (
        not any(p.requires_grad for p in m.model.parameters())
        and not m.model.training
        and m.dtype == torch.float32
    )
    assert width(m) == 32 and len(m.head_VD) == len(m.tok)
    assert (m.bias_V is not None) == (kind == "encoder")
    around = m.tok("Silver River")["input_ids"]
    assert around == [*m.start, *encode(m, "Silver River"), *m.end]


def test_a_t5_reads_past_the_length_it_was_trained_at(tmp_path, toy):
    folder = tmp_path / "t5"
    t5(folder)
    config = json.loads((folder / "config.json").read_text())
    # as t5-large and flan-t5-xl ship
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 512}))
    r = make_ranker(opened(folder, checked=False), toy, SETTINGS | {"max_tokens": 2048}, None)
    long = np.resize(np.arange(1, toy.n_items + 1), 150)
    tail, _ = r.prompts.history(long)
    assert len(tail) > 600 and lines(r.lm, toy, r.titles, tail) == long.tolist()


@pytest.fixture
def without_new_lines(tmp_path):
    """The folder of a decoder whose tokenizer reads a new line as a blank, as BERT's does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = wordpiece_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return save(tmp_path / "lm", randomise(LlamaForCausalLM(config), 5), tok)


def test_a_decoder_without_a_new_line_ends_titles_with_a_semicolon(without_new_lines, toy):
    m = opened(without_new_lines)
    assert not encode(m, "\n") and m.sep == encode(m, ";")
    r = make_ranker(m, toy, SETTINGS | {"verbalizer": "likelihood"}, None)
    tail, _ = r.prompts.history(np.array([3, 1, 2]))
    assert lines(m, toy, r.titles, tail) == [3, 1, 2]


def test_a_tokenizer_without_a_separator_is_refused(without_new_lines, monkeypatch):
    monkeypatch.setattr(model, "encode", lambda lm, text: [])
    said = sentence(opened, without_new_lines, checked=False)
    assert "no token for a new line or a semicolon" in said and without_new_lines in said


def test_a_head_of_its_own_is_not_the_embedding(load):
    flan, t5 = load("flan"), load("encoder_decoder")
    assert not torch.equal(flan.head_VD, flan.model.get_input_embeddings().weight)
    assert torch.equal(t5.head_VD, t5.model.get_input_embeddings().weight)


def test_slots_take_the_vectors_in_order(load):
    m = load("decoder")
    P = torch.arange(3.0)[:, None].expand(3, 32)
    ids = torch.tensor([[5, SLOT, SLOT, 7, SLOT]])
    e = embed(m, ids, P)
    assert e[0, [1, 2, 4], 0].tolist() == [0, 1, 2]
    assert torch.equal(e[0, [0, 3]], m.model.get_input_embeddings().weight[[5, 7]])


def test_a_soft_prompt_begins_as_long_as_a_token_that_the_model_scales(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    tok = bpe_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tok), hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=512,
    )  # fmt: skip
    m = opened(save(tmp_path / "gemma3", randomise(Gemma3ForCausalLM(config), 2), tok))
    stored = m.model.get_input_embeddings().weight
    assert token_scale(m) == pytest.approx(8, rel=1e-2)  # sqrt(64)
    P_kD = random_soft_prompt(m, 200, 0)
    seen = embed(m, torch.arange(200)[None], None)[0]
    assert P_kD.norm(dim=1).mean() == pytest.approx(float(seen.norm(dim=1).mean()), rel=0.05)
    assert P_kD.norm(dim=1).mean() > 6 * stored.norm(dim=1).mean()


def test_a_token_that_the_model_does_not_scale_is_as_long_as_its_row(load):
    m = load("decoder")
    rows = torch.randperm(len(m.head_VD), generator=torch.Generator().manual_seed(3))[:5]
    assert token_scale(m) == 1
    assert torch.equal(random_soft_prompt(m, 5, 3), m.model.get_input_embeddings().weight[rows])


def test_a_soft_prompt_survives_the_disk_and_another_width_does_not(load, tmp_path):
    m = load("decoder")
    P = random_soft_prompt(m, 5, 0)
    rows = m.model.get_input_embeddings().weight
    assert P.dtype == torch.float32 and all((rows == p).all(1).any() for p in P)
    assert torch.equal(P, random_soft_prompt(m, 5, 0)) and not torch.equal(
        P, random_soft_prompt(m, 5, 1)
    )
    save_soft_prompt(tmp_path, P.requires_grad_())
    assert torch.equal(load_soft_prompt(tmp_path, m), P)
    save_soft_prompt(tmp_path, torch.zeros(5, 33))
    assert "of width 33" in sentence(load_soft_prompt, tmp_path, m)
