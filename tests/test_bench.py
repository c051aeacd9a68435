"""The benchmarks' own parts, on shapes small enough to test: what is timed must be what it says."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import NothingFetched
from scripts import ROOT

from delrec.kernels import bench as kernel_bench
from delrec.kernels import cpu
from delrec.lm.bench.memory import account, saved_tensors
from delrec.lm.bench.random_lms import random_lm, random_prompts
from delrec.lm.bench.work import C, K
from delrec.lm.reading import read_prefix
from delrec.lm.text import SLOT, random_soft_prompt

CPU = torch.device("cpu")


def small():
    from transformers import LlamaConfig, T5Config

    return {
        "t5": T5Config(
            vocab_size=400,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        ),
        "llama": LlamaConfig(
            vocab_size=400,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    }


def test_random_lms_score_prompts_of_the_length_asked_for():
    for name, config in small().items():
        m = random_lm(name, config, CPU, torch.float32)
        prompts = random_prompts(m, 3, 150)
        assert all(len(prompts.prefix) + len(tail) == 150 for tail in prompts.tails)
        assert (prompts.prefix == SLOT).sum() == K
        P = random_soft_prompt(m, K, 0).requires_grad_()
        score = prompts.score(m, read_prefix(m, prompts.prefix, P))
        assert score.shape == (3, C) and score.std() > 0
        score.log_softmax(1)[:, 0].sum().backward()
        assert P.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi3", "Olmo2"])
def test_families_of_decoders_say_the_same_packed_padded_and_fused(family):
    import transformers

    sizes = dict(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = getattr(transformers, f"{family}Config")(**sizes)
    torch.manual_seed(0)
    m = random_lm(family, config, CPU, torch.float32)
    for name, p in m.model.named_parameters():
        # biases and norms that do something
        torch.nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)
    assert ("fused" in m.paths) == (
        family in ("Llama", "Qwen2", "Mistral") and cpu.library() is not None
    )
    prompts = random_prompts(m, 3, 150)
    prompts.tails[1] = prompts.tails[1][10:]
    P, scores = random_soft_prompt(m, K, 0), []

    for paths in (m.paths, ["packed"], ["padded"], ["rows"]):
        lm = replace(m, paths=paths)
        for cache in (True, False):
            start = read_prefix(lm, prompts.prefix, P, cache)
            scores.append(prompts.score(lm, start, "likelihood"))
            # the fused loops, where there are any
            with torch.no_grad():
                start = read_prefix(lm, prompts.prefix, P, cache)
                scores.append(prompts.score(lm, start, "likelihood"))
    assert scores[0].std() > 0.1
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-4, atol=1e-5)


def test_the_memory_account_lists_what_autograd_keeps(capsys):
    w, x = torch.nn.Linear(8, 8, bias=False), torch.ones(5, 8, requires_grad=True)
    kinds = saved_tensors(lambda: torch.tanh(w(x)), w)
    # the input of the product and the output of tanh; not the weight
    assert kinds == {((5, 8), torch.float32): (2, 320)}
    rows = []
    account(rows, CPU, "t5", small()["t5"], tokens=130, dtype=torch.float32)
    values = {name: value for name, value, *_ in rows}
    assert (
        0
        < values["account.t5.stage2_gradient_checkpointing.kept_gb"]
        < values["account.t5.stage2.kept_gb"]
    )
    assert "kept for backward by one prompt of 130 tokens" in capsys.readouterr().out


def test_kernel_rows_on_a_small_shape_without_the_looks_at_inputs_that_the_product_never_makes():
    with NothingFetched():
        rows = kernel_bench.candidate_scores(CPU, torch.bfloat16, (2, 3, 4), 16, 50, 1e9)
        rows += kernel_bench.title_likelihood(CPU, torch.float32, 20, 16, 60)
        rows += kernel_bench.catalogue(CPU, torch.float32, 300, 16, 60, B=4)
    names = [row.name for row in rows]
    assert "candidate_scores.cpu.bf16.2x3x4x16.vs_full_logits" in names
    assert "title_likelihood.cpu.fp32.20x60.memory_vs_full_logits" in names
    assert "catalogue.cpu.300.fp32.ms_per_user" in names and len(names) == len(set(names))


def test_what_stands_behind_a_titles_end_is_not_among_the_bytes_that_must_be_read():
    c = kernel_bench.Candidates.draw(CPU, torch.float32, (1, 2, 4), 16, 50)
    c.tok_BCT = torch.tensor([[[1, 2, 3, 4], [2, 5, 6, 7]]], dtype=torch.int32)
    c.n_BC = torch.tensor([[2, 3]], dtype=torch.int32)
    c.weight_BCT = torch.tensor([[[0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0]]])
    rows = 4  # of 1, 2, 5 and 6
    assert c.held() == (1 + rows) * 16 * 4 + 8 * 4 + 2 * 2 * 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
def test_the_peak_of_a_process_is_not_its_starters():
    held = np.ones(2**30, np.uint8)
    code = "from delrec.training.memory import peak_gb; print(peak_gb())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert 0.05 < float(done.stdout) < 0.8 < held.nbytes / 2**30


def test_peak_memory_is_what_a_call_adds():
    size = kernel_bench.extra_bytes(lambda: torch.ones(64 * 2**20).sum(), CPU)
    if size is None:
        pytest.skip("this system does not tell a process's high-water mark")
    assert 0.9 * 256 * 2**20 < size < 1.3 * 256 * 2**20
