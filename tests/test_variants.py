"""The variants of DELRec that its Tables III and IV compare: what each does to stage 1 and 2."""

import numpy as np
import pytest
import torch
from chain import stages
from click.testing import CliRunner
from safetensors.torch import load_file

import distill
import evaluate
import finetune
from delrec.backbone.models import NAMES
from delrec.data.prepared import subset
from delrec.lm.model import load_lm
from delrec.lm.prompts import PATTERN
from delrec.lm.ranker import make_ranker, open_run, score_samples
from delrec.lm.text import SLOT
from delrec.runtime import load_run
from delrec.training import checkpoints


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
    assert len({PATTERN[x] for x in NAMES.values()}) == 3


def test_words_are_scored_as_they_were_trained(
    toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    _, tune = stages(toy, backbone, decoder, "words", tmp_path / "words")
    script(finetune.main, *tune, "--backbone", backbone)
    run = load_run(tmp_path / "words", toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    assert r.P is None
    assert "SASRec weighs all movies" in r.lm.tok.decode(r.prompts.prefix)
    assert evaluate.paper_method(run) == "w MCP"
    val = subset(len(toy.val), 30, 0)
    np.testing.assert_allclose(
        score_samples(r, "val", val, 15, alone),
        np.load(tmp_path / "words" / "scores_val_15.npy")[val],
        atol=1e-4,
    )


def test_stage_2_moves_the_prompt_only_if_asked(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    _, tune = stages(toy, backbone, decoder, chain.prompt, tmp_path / "moved")
    script(finetune.main, *tune, "--lr-prompt", 0.01)
    before, after = (
        load_file(f / "soft_prompt.safetensors")["prompt_embeddings"]
        for f in (chain.prompt, tmp_path / "moved")
    )
    assert (before - after).abs().max() > 0.005
    run = load_run(tmp_path / "moved", toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    val = subset(len(toy.val), 30, 0)
    np.testing.assert_allclose(
        score_samples(r, "val", val, 15, alone),
        np.load(tmp_path / "moved" / "scores_val_15.npy")[val],
        atol=1e-4,
    )
    assert evaluate.paper_method(run) == "w ULSR"
    assert (
        "--soft-prompt is none"
        in script(
            finetune.main,
            *tune,
            "--lr-prompt",
            0.01,
            "--soft-prompt",
            "none",
            "--overwrite",
            code=1,
        ).error
    )


def test_stage_1_moves_the_lm_only_if_asked_and_stage_2_goes_on_from_it(
    toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    distil, tune = stages(toy, backbone, decoder, tmp_path / "prompt", tmp_path / "delrec")
    script(distill.main, *distil, "--lr-lm", 0.003)
    weights = load_file(tmp_path / "prompt" / "adapter" / "adapter_model.safetensors")
    assert weights and all(p.abs().max() > 0 for p in weights.values())
    moved, plain = (
        load_lm(str(tmp_path / "prompt"), torch.device("cpu"), torch.float32),
        load_lm(decoder, torch.device("cpu"), torch.float32),
    )
    changed = [
        n
        for (n, a), b in zip(moved.model.named_parameters(), plain.model.parameters())
        if not torch.equal(a, b)
    ]
    assert changed and all("q_proj" in n or "v_proj" in n for n in changed)
    script(finetune.main, *tune)
    run = load_run(tmp_path / "delrec", toy)
    assert run.llm == str(tmp_path / "prompt") and evaluate.paper_method(run) == "w UDPSM"
    r, _ = open_run(run, toy, torch.device("cpu"))
    val = subset(len(toy.val), 30, 0)
    np.testing.assert_allclose(
        score_samples(r, "val", val, 15, alone),
        np.load(tmp_path / "delrec" / "scores_val_15.npy")[val],
        atol=1e-4,
    )
    # again, without: nothing of the adapter stays
    script(distill.main, *distil, "--overwrite")
    assert not (tmp_path / "prompt" / "adapter").exists()


def test_a_killed_stage_1_with_an_adapter_goes_on_exactly(
    toy, backbone, decoder, script, on_cpu, tmp_path
):
    for name, stop_at in (("whole", None), ("cut", 3)):
        args, _ = stages(toy, backbone, decoder, tmp_path / name, "")
        args += ["--lr-lm", 0.003, "--checkpoint-every", 1]
        if stop_at:
            with pytest.MonkeyPatch.context() as patch:
                save = checkpoints.Saver.save

                def save_and_die(self, step, *rest):
                    save(self, step, *rest)
                    if step == stop_at:
                        raise KeyboardInterrupt

                patch.setattr(checkpoints.Saver, "save", save_and_die)
                CliRunner().invoke(distill.main, [str(a) for a in args])
            assert not (tmp_path / name / "config.json").exists()
            args += ["--resume"]
        script(distill.main, *args)
    for part in ("soft_prompt.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / n / part) for n in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part
