"""Public reports of the neighbours, tried here: each test says what should be."""

import json
import os
import shutil
import subprocess
import sys

import click
import numpy as np
import pytest
import torch
from families import AUTO, RIGHT_OR_REFUSED, llama_like, old_decoder, write
from safetensors.torch import load_file, save_file
from scripts import ROOT, sentence
from tiny_lms import randomise, save, wordpiece_tokenizer

import evaluate
import finetune
from delrec.lm import layers
from delrec.lm.model import load_lm
from delrec.lm.reading import read, read_prefix
from delrec.lm.text import MASK

CPU = torch.device("cpu")
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 200,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip


def opened(folder):
    return load_lm(str(folder), CPU, torch.float32)


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def copy(decoder, tmp_path):
    return lambda name="copy": shutil.copytree(decoder, tmp_path / name)


@pytest.fixture
def tune(toy, backbone, script, on_cpu):
    """tune(llm, run, ..): finetune.py, a few steps."""
    flags = ["--dataset", toy.folder, "--backbone", backbone, "--soft-prompt", "none"]
    flags += ["--samples", 48, "--batch", 8, "--val-samples", 8, "--evals", 1]
    flags += ["--init-r", 4, "--target-r", 2]
    return lambda llm, run, *more, code=0: script(
        finetune.main, *flags, "--llm", llm, "--out", run, *more, code=code
    )


@pytest.fixture
def rank(script, on_cpu):
    """rank(run): evaluate.py on a few samples."""
    flags = ["--limit", 20, "--candidates", 15, "--val-samples", 10]
    return lambda run, code=0: script(evaluate.main, "--ckpt", run, *flags, code=code)


@torch.no_grad()
def off_at_the_mask(folder, *lengths):
    """How far the logits at the mask are from plain transformers', prompts of some lengths in one
    batch, in standard deviations of the logits."""
    lm = opened(folder)
    draw = np.random.default_rng(0)
    prefix = np.concatenate([lm.start, draw.integers(20, 400, 20)]).astype(np.int64)
    tails = [draw.integers(20, 400, n - len(prefix)) for n in lengths]
    x = read(lm, read_prefix(lm, prefix), [np.append(t, MASK) for t in tails])
    plain = AUTO["decoder"].from_pretrained(folder, dtype=torch.float32).eval()
    rows = [torch.as_tensor(np.concatenate([prefix, t]))[None] for t in tails]
    wanted = torch.stack([plain(input_ids=row).logits[0, -1] for row in rows])
    return float((x @ lm.head_VD.T - wanted).abs().max() / wanted.std())


# ---------------------------------------------------------------- silent wrong scores


def test_a_window_just_below_the_longest_prompt_is_a_window(tmp_path):
    family = llama_like("mistral", "Mistral", head_dim=8, sliding_window=480)
    assert off_at_the_mask(write(family, tmp_path / "lm"), 300, 505) < 1e-3


def test_a_short_prompt_beside_a_long_one_keeps_the_short_rope_factors(tmp_path):
    sizes = {"rope_parameters": LONG, "original_max_position_embeddings": 200}
    folder = write(llama_like("phi3", "Phi3", **sizes), tmp_path / "lm")
    assert off_at_the_mask(folder, 120) < 1e-3
    assert off_at_the_mask(folder, 120, 270) < 1e-3


def test_a_long_prompt_behind_a_kept_prefix_has_the_long_rope_factors(tmp_path):
    sizes = {"rope_parameters": LONG, "original_max_position_embeddings": 200}
    assert off_at_the_mask(write(llama_like("phi3", "Phi3", **sizes), tmp_path / "lm"), 270) < 1e-3


def test_a_run_is_not_scored_by_another_lm_at_the_same_place(copy, tune, rank, tmp_path):
    folder, run = copy("lm"), tmp_path / "run"
    tune(folder, run)
    other = AUTO["decoder"].from_pretrained(folder)
    randomise(other, 77).save_pretrained(folder)
    assert "another LM" in rank(run, code=1).error


@pytest.mark.parametrize("other", ["wider", "encoder"])
def test_a_run_whose_lm_became_another_architecture_is_one_sentence(
    other, copy, encoder, tune, rank, tmp_path
):
    folder, run = copy("lm"), tmp_path / "run"
    tune(folder, run)
    shutil.rmtree(folder)
    if other == "encoder":
        shutil.copytree(encoder, folder)
    else:
        write(llama_like("wide", "Llama", hidden_size=48), folder)
    rank(run, code=1)


def test_weights_of_the_file_that_the_model_does_not_read_are_told(copy, capsys):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    try:
        opened(folder)
        said = capsys.readouterr().out
    except click.ClickException as refused:
        said = refused.message
    assert "q_proj.bias" in said


def test_an_lm_of_the_hub_that_brings_code_and_weights_for_it_is_refused(
    copy, tmp_path, monkeypatch
):
    import huggingface_hub.constants
    from transformers.utils import hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder, revision = copy(), "0" * 40
    edit(folder, auto_map={"AutoModelForCausalLM": "x.XModel"})
    weights = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.ones(3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "does not read 1 of the weights" in sentence(opened, folder)
    there = tmp_path / "hub" / "models--me--code"
    shutil.copytree(folder, there / "snapshots" / revision)
    (there / "refs").mkdir()
    (there / "refs" / "main").write_text(revision)
    assert "does not read 1 of the weights" in sentence(opened, "me/code")


def test_the_vision_tower_of_an_lm_gets_no_adapters(tmp_path):
    family = next(f for f in RIGHT_OR_REFUSED if f.name == "gemma3-vision")
    names = layers.adapt_modules(opened(write(family, tmp_path / "lm")))
    assert len(names) == 4 and not [n for n in names if "vision" in n]


# ---------------------------------------------------------------- code that a folder names


FAKE = """
def get_kernel(name, *args, **kwargs):
    print("ASKED", name)
    raise RuntimeError("it would be downloaded and run")

def __getattr__(name):
    return lambda *args, **kwargs: lambda f: f
"""
LOAD = """
import sys, torch
from delrec.lm.model import load_lm
load_lm(sys.argv[1], torch.device("cpu"), torch.float32, checked=False)
"""


def test_a_folder_names_no_kernel_that_is_fetched_and_run(copy, tmp_path):
    (tmp_path / "kernels.py").write_text(FAKE)  # as if Hugging Face's package were installed
    (tmp_path / "kernels-0.18.2.dist-info").mkdir()
    told = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n"
    (tmp_path / "kernels-0.18.2.dist-info" / "METADATA").write_text(told)
    folder = copy()
    edit(folder, attn_implementation="kernels-community/flash-attn2")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, timeout=200,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert "ASKED" not in done.stdout


def test_a_run_finds_its_lm_from_anywhere(copy, tune, tmp_path, monkeypatch):
    copy("lm")
    monkeypatch.chdir(tmp_path)
    tune("lm", tmp_path / "run")
    named = json.loads((tmp_path / "run" / "config.json").read_text())["llm"]
    assert named == str(tmp_path / "lm")  # "lm" elsewhere is another folder, or the hub's "lm"


# ---------------------------------------------------------------- stack traces


def test_layers_of_an_lm_whose_config_lists_them_are_cut_or_refused(tune, tmp_path):
    family = old_decoder(
        "gpt_neo", "GPTNeo", hidden_size=32, num_layers=2, num_heads=4, window_size=40,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=512,
    )  # fmt: skip
    try:
        tune(write(family, tmp_path / "lm"), tmp_path / "run", "--layers", 1)
    except AssertionError:  # refused: one sentence would do too
        assert not (tmp_path / "run").exists()


def test_prompts_are_no_longer_than_an_lm_whose_config_says_max_seq_len(tune, tmp_path):
    family = old_decoder("mpt", "Mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=128)
    assert opened(write(family, tmp_path / "lm")).max_tokens <= 126


def test_an_lm_with_an_unmerged_adapter_in_its_folder_is_adapted_or_refused_by_name(
    copy, tune, tmp_path
):
    from peft import LoraConfig, get_peft_model

    folder = copy()
    how = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    get_peft_model(AUTO["decoder"].from_pretrained(folder), how).save_pretrained(tmp_path / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "lora" / name, folder)
    for adapt in ("qv", "linear"):
        try:
            lm = opened(folder)
            assert [n for n in layers.adapt_modules(lm, adapt) if "lora" not in n]
            tune(folder, tmp_path / adapt, "--adapt", adapt)
        except click.ClickException as refused:
            assert "adapter" in refused.message and "projections" not in refused.message


def test_a_name_that_is_too_long_for_a_file_is_one_sentence():
    sentence(opened, "a" * 300)


# ---------------------------------------------------------------- misleading sentences


def test_a_model_folder_with_a_folder_adapter_in_it_is_a_model(copy):
    folder = copy()
    (folder / "adapter").mkdir()
    assert opened(folder).kind == "decoder"


def test_a_mask_token_without_a_vector_is_called_that(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "lm")
    tok = wordpiece_tokenizer()
    tok.add_special_tokens({"mask_token": "<mask>"})
    tok.save_pretrained(folder)
    says = sentence(opened, folder)
    assert "'<mask>' has no vector" in says


def test_weights_of_another_size_are_named(copy):
    folder = copy()
    edit(folder, vocab_size=500)
    says = sentence(opened, folder)
    assert "above report" not in says and "embed_tokens" in says


def test_an_encoder_that_calls_its_head_lm_head_is_an_encoder(tmp_path):
    from transformers import FlaubertConfig, FlaubertWithLMHeadModel

    tok = wordpiece_tokenizer()
    config = FlaubertConfig(vocab_size=len(tok), emb_dim=32, n_layers=2, n_heads=4, n_langs=1)
    folder = save(tmp_path / "lm", randomise(FlaubertWithLMHeadModel(config), 3), tok)
    try:
        assert opened(folder).kind == "encoder"
    except click.ClickException as refused:
        assert "download or save them again" not in refused.message
