"""The variants of DELRec that its Tables III and IV compare: what each does to stage 1 and 2."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import stages
from safetensors.torch import load_file
from tuning import stored_scores

import distill
import finetune
from delrec.evaluation.paper import paper_method, printed_numbers
from delrec.lm.model import load_lm
from delrec.lm.ranker import make_ranker, open_run, score_samples
from delrec.lm.text import SLOT
from delrec.lm.wording import PATTERN
from delrec.names import NAMES
from delrec.runtime import load_run


def test_the_pattern_in_words_stands_where_the_vectors_stood(load, toy):
    m = load("decoder")
    settings = {
        "verbalizer": "mean",
        "show": False,
        "history": 5,
        "max_title": 32,
        "max_tokens": 1000,
        "backbone": "GRU4Rec",
        "order": "shuffled",
        "backbone_run": "",
        "words": True,
    }
    said = m.tok.decode(make_ranker(m, toy, settings).prompts.prefix)
    assert "GRU4Rec reads the movies one after another" in said
    assert "Movies the user watched" in said
    plain = make_ranker(m, toy, settings | {"words": False}).prompts.prefix
    assert SLOT not in plain and "GRU4Rec" not in m.tok.decode(plain)
    assert len({PATTERN[x] for x in NAMES.values()}) == len(NAMES)


def opened_again(folder, toy, alone):
    """A run and its ranker, which scores the validation part as it did when it was trained."""
    run = load_run(folder, toy)
    ranker, _ = open_run(run, toy, torch.device("cpu"))
    val, stored = stored_scores(folder)
    assert len(val) == 30
    again = score_samples(ranker, "val", val, 15, alone)
    np.testing.assert_allclose(again, stored, atol=1e-4)
    return run, ranker


def test_words_are_scored_as_they_were_trained(
    toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    _, tune = stages(toy, backbone, decoder, "words", tmp_path / "words")
    script(finetune.main, *tune, "--backbone", backbone)
    run, ranker = opened_again(tmp_path / "words", toy, alone)
    assert ranker.P is None
    assert "SASRec weighs all movies" in ranker.lm.tok.decode(ranker.prompts.prefix)
    assert paper_method(run) == "w MCP"


def test_stage_2_moves_the_prompt_only_if_asked(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    _, tune = stages(toy, backbone, decoder, chain.prompt, tmp_path / "moved")
    script(finetune.main, *tune, "--lr-prompt", 0.01)
    before, after = (
        load_file(folder / "soft_prompt.safetensors")["prompt_embeddings"]
        for folder in (chain.prompt, tmp_path / "moved")
    )
    assert (before - after).abs().max() > 0.005
    run, _ = opened_again(tmp_path / "moved", toy, alone)
    assert paper_method(run) == "w ULSR"
    without = ["--lr-prompt", 0.01, "--soft-prompt", "none", "--overwrite"]
    assert "--soft-prompt is none" in script(finetune.main, *tune, *without, code=1).error


def test_stage_1_moves_the_lm_only_if_asked_and_stage_2_goes_on_from_it(
    toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    prompt = tmp_path / "prompt"
    distil, tune = stages(toy, backbone, decoder, prompt, tmp_path / "delrec")
    script(distill.main, *distil, "--lr-lm", 0.003)
    weights = load_file(prompt / "adapter" / "adapter_model.safetensors")
    assert weights and all(p.abs().max() > 0 for p in weights.values())
    moved, plain = (
        load_lm(str(folder), torch.device("cpu"), torch.float32) for folder in (prompt, decoder)
    )
    pairs = zip(moved.model.named_parameters(), plain.model.parameters())
    changed = [name for (name, a), b in pairs if not torch.equal(a, b)]
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)
    script(finetune.main, *tune)
    run, _ = opened_again(tmp_path / "delrec", toy, alone)
    assert run.llm == str(prompt) and paper_method(run) == "w UDPSM"
    # again, without: nothing of the adapter stays
    script(distill.main, *distil, "--overwrite")
    assert not (prompt / "adapter").exists()


def test_a_killed_stage_1_with_an_adapter_goes_on_exactly(
    toy, backbone, decoder, script, on_cpu, interrupted, tmp_path
):
    def distil(name, *more):
        args, _ = stages(toy, backbone, decoder, tmp_path / name, "")
        script(distill.main, *args, "--lr-lm", 0.003, "--checkpoint-every", 1, *more)

    distil("whole")
    interrupted(lambda: distil("cut"), 3)
    assert not (tmp_path / "cut" / "config.json").exists()
    distil("cut", "--resume")
    for part in ("soft_prompt.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / name / part) for name in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part


@pytest.mark.parametrize(
    "flags, method",
    [
        (dict(model="sasrec", text_in="fold"), "SASRec"),
        (dict(model="sasrec", text="minilm", text_in="fold"), None),
        (dict(model="seqsim", text="minilm", text_in=None), "LLMSEQSIM"),
        (dict(model="bert4rec", text="minilm", text_in="start"), "LLM2BERT4Rec"),
        (dict(model="bert4rec", text="minilm", text_in="fold"), None),
        (dict(model="seqsim", text="minilm", text_in=None, permute_text=True), None),
        (dict(model="kda", text="tfidf", text_in=None), "KDALRD"),
    ],
)
def test_a_conventional_run_has_the_numbers_of_what_it_is(flags, method):
    run = SimpleNamespace(stage="train_backbone", **flags)
    assert paper_method(run) == method
    assert (printed_numbers("beauty", method) is None) == (method is None)
