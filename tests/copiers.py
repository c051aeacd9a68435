"""A log without any pattern, a backbone that knows the truth, and an LM that can do one thing: to
count how often a title stands in its prompt.
"""

import numpy as np
import pytest
import torch
from tiny_lms import bpe_tokenizer, save

TITLES = "BDEFGHIJKLNOPQUVWXYZ0123456789"  # one token each, and none of a prompt's words has one


@pytest.fixture(scope="session")
def noise(tmp_path_factory, make_data):
    """100 users with 12 of 30 items each, drawn: no history says what comes next."""
    rng, rows = np.random.default_rng(0), []
    for user in range(100):
        times = np.sort(rng.choice(1000, 12, replace=False))
        rows += [(user, i + 1, t) for i, t in zip(rng.choice(30, 12, replace=False), times)]
    titles = dict(enumerate(TITLES, 1))
    return make_data(tmp_path_factory.mktemp("noise"), rows, titles, "noise")


def scores_with_truth(data, value=10.0):
    """score(samples): drawn scores below 1, that of the truth is `value`."""

    def score(samples):
        s = np.random.default_rng(0).random((len(samples), data.n_items + 1))
        s[np.arange(len(samples)), data.items[samples]] = value
        return s

    return score


@pytest.fixture(scope="session")
def knower(noise, make_backbone, tmp_path_factory):
    """A backbone of this log that ranks the truth first."""
    folder = tmp_path_factory.mktemp("knower") / "sasrec"
    return make_backbone(folder, noise, scores_with_truth(noise))


def counter(folder, gain):
    """The folder of a one-layer Llama that attends to all tokens alike and says `gain` times the
    mean of what it saw. With 0 it says nothing, and can learn to.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = bpe_tokenizer()
    shape = dict(hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ids = dict(bos_token_id=3, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True)
    config = LlamaConfig(vocab_size=len(tok), max_position_embeddings=1024, **shape, **ids)
    model, n = LlamaForCausalLM(config).eval(), len(TITLES)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        drawn = torch.randn(len(tok), 64 - n, generator=torch.Generator().manual_seed(0))
        table.copy_(torch.cat([torch.zeros(len(tok), n), 0.3 * drawn], 1))
        table[[tok.convert_tokens_to_ids(title) for title in TITLES]] = torch.eye(n, 64)
        layer = model.model.layers[0]
        layer.self_attn.q_proj.weight.zero_()
        layer.self_attn.v_proj.weight.copy_(torch.eye(64))
        layer.self_attn.o_proj.weight.copy_(gain * torch.eye(64))
        layer.mlp.down_proj.weight.zero_()
    return save(folder, model, tok)


@pytest.fixture(scope="session")
def learner(tmp_path_factory):
    """The LM that says nothing, and can learn to count."""
    return counter(tmp_path_factory.mktemp("lms") / "learner", 0.0)


@pytest.fixture(scope="session")
def counts(tmp_path_factory):
    """The LM that counts."""
    return counter(tmp_path_factory.mktemp("lms") / "counts", 5.0)
