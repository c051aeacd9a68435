"""Every score of the named families against plain transformers.

Each on the path that a CPU takes and padded, as on a GPU; without and with a soft prompt; for
every verbalizer; after short prompts and after one longer than any window. Families that may also
be refused stand in tests/all.
"""

import numpy as np
import pytest
import torch
from families import AUTO, EXACT, RIGHT_OR_REFUSED, WIDE, write
from plain import Reference, faults, load_here, make_prompts


def cases(families):
    """Each family as a CPU reads it, and decoders, of which a GPU packs none, also padded."""
    own = [pytest.param(f, False, id=f"{f}-own") for f in families]
    return own + [pytest.param(f, True, id=f"{f}-padded") for f in families if f.kind == "decoder"]


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """reference(family) -> its folder and plain scores, made once."""
    made = {}

    def get(family):
        if family.name not in made:
            folder = write(family, tmp_path_factory.mktemp("families") / family.name)
            made[family.name] = Reference(family, folder, toy)
        return made[family.name]

    return get


@pytest.mark.parametrize("family, padded", cases(EXACT))
def test_a_family_scores_as_plain_transformers(reference, family, padded):
    wanted = reference(family)
    assert faults(wanted, load_here(wanted.folder, padded)) == {}


# ---------------------------------------------------------------- that these tests can fail

PARTICULAR = [
    ("gemma2", {"sliding_window": 512}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2-capped", {"final_logit_softcapping": None}),
    ("gemma3", {"sliding_window": 512}),
    ("gemma3-wide", {"sliding_window": 512}),
    ("granite", {"logits_scaling": 1.0}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"attention_multiplier": 1.0}),
    ("cohere", {"logit_scale": 1.0}),
    ("cohere2", {"sliding_window": 512}),
    ("qwen3-window", {"sliding_window": 512}),
    ("phi3-window", {"sliding_window": 512}),
    ("modernbert", {"local_attention": 512}),
    ("modernbert-wide", {"local_attention": 512}),
    ("mistral-short", {"sliding_window": 512}),
    ("mistral-wide", {"sliding_window": 512}),
    ("qwen2-short", {"sliding_window": 512}),
    ("qwen2-wide", {"sliding_window": 512}),
    ("gpt-oss-short", {"sliding_window": 512}),
    ("gpt-oss-wide", {"sliding_window": 512}),
    ("phi3-long-rope", {"original_max_position_embeddings": 512}),
    ("falcon-h1", {"lm_head_multiplier": 1.0}),
    ("falcon-h1", {"key_multiplier": 1.0}),
    ("llama4-short", {"attention_chunk_size": 512}),
    ("llama4-wide", {"attention_chunk_size": 512}),
    ("llama4-wide", {"attn_temperature_tuning": False}),
]


@pytest.mark.parametrize("name, otherwise", PARTICULAR, ids=str)
def test_what_is_particular_to_a_family_moves_its_plain_scores(reference, name, otherwise):
    family = next(f for f in EXACT + RIGHT_OR_REFUSED if f.name == name)
    wanted = reference(family)
    changed = AUTO[family.kind].from_pretrained(wanted.folder, dtype=torch.float32, **otherwise)
    tokens = np.random.default_rng(0).integers(20, 100, 100)
    with torch.no_grad():
        logits = changed.eval()(input_ids=torch.tensor(tokens)[None]).logits[0]
        difference = wanted.plain.logits(tokens.tolist()) - logits
    assert difference[-1].abs().max() > 0.01


def test_the_longest_prompt_outgrows_every_window(load, toy):
    for kind in ("decoder", "encoder_decoder", "encoder"):
        tails, _ = make_prompts(load(kind), toy, None)
        assert max(map(len, tails)) > 2 * WIDE
