"""What the files of an LM may be: whole, its own, and nothing that would be run."""

import json
import shutil

import click
import pytest
import torch
from lm_cases import opened
from safetensors.torch import load_file, save_file
from scripts import sentence
from tiny_lms import bpe_tokenizer, randomise, save

from delrec.lm import pretrained
from delrec.lm.model import load_lm

pytest_plugins = ["lm_fixtures"]


def test_an_unknown_lm_is_one_sentence(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    for name in (str(tmp_path), str(tmp_path / "no such folder")):
        says = sentence(load_lm, name, cpu)
        assert says.startswith(f"no language model '{name}': expected smollm2-135m, a folder")


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_an_lm_without_a_mask_token_is_one_sentence(kind, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "maskless")
    tok = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if kind == "encoder":
        config.pop("mask_token")
    else:  # the sentinels are called something else
        tok = json.loads(json.dumps(tok).replace("<extra_id_", "<other_id_"))
        config = json.loads(json.dumps(config).replace("<extra_id_", "<other_id_"))
    (folder / "tokenizer.json").write_text(json.dumps(tok))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    says = sentence(load_lm, str(folder), torch.device("cpu"))
    assert "its tokenizer has no mask token" in says and str(folder) in says


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"


def test_a_head_that_is_not_in_the_files_is_refused_not_invented(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    body = {k: v for k, v in weights.items() if not k.startswith("lm_head")}
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    says = sentence(opened, folder)
    assert "lack 1 weights of LlamaForCausalLM, lm_head.weight the first" in says


def test_a_layer_that_is_not_in_the_files_is_refused(copy):
    folder = copy()
    weights = load_file(folder / "model.safetensors")
    less = {k: v for k, v in weights.items() if ".layers.1." not in k}
    save_file(less, folder / "model.safetensors", {"format": "pt"})
    assert "lack 9 weights" in sentence(opened, folder)


def test_a_sentence_encoder_has_no_head_to_ask(encoder, tmp_path):
    from transformers import AutoTokenizer, BertForMaskedLM

    whole = BertForMaskedLM.from_pretrained(encoder)
    folder = save(tmp_path / "st", whole.bert, AutoTokenizer.from_pretrained(encoder))
    says = sentence(opened, folder)
    assert "of BertForMaskedLM, cls.predictions" in says and "random numbers are no model" in says


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_called_one(copy, name):
    folder = copy()
    (folder / name).write_text(LFS)
    assert f"{folder / name} is a pointer that git-lfs left" in sentence(opened, folder)


def test_cut_weights_are_one_sentence(copy):
    folder = copy()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"the weights of '{folder}' could not be loaded" in sentence(opened, folder)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_a_quantised_folder_whose_library_is_missing_is_one_sentence(copy, method):
    from importlib.util import find_spec

    if find_spec({"awq": "gptqmodel", "gptq": "optimum"}.get(method, method.replace("-", "_"))):
        pytest.skip(f"the library of {method} is here")
    folder = copy()
    how = {"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": True}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": how}
    (folder / "config.json").write_text(json.dumps(config))
    says = sentence(opened, folder)
    assert "could not be loaded (ImportError" in says and "install" in says


def llama(folder, tok, **sizes):
    """A tiny random Llama with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    base = dict(
        vocab_size=len(tok), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return save(folder, randomise(LlamaForCausalLM(LlamaConfig(**base | sizes)), 5), tok)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tmp_path):
    tok = bpe_tokenizer()
    folder = llama(tmp_path / "small", tok, vocab_size=280)
    says = sentence(opened, folder)
    assert f"knows {len(tok)} tokens, its model 280" in says and "resize_token_embeddings" in says


CODE = """
from pathlib import Path
Path({mark!r}).write_text("code of the folder ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class XConfig(LlamaConfig):
    model_type = "xxx"
class XModel(LlamaForCausalLM):
    config_class = XConfig
class XTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(copy, tmp_path, monkeypatch):
    """with_code(model_type, tokenizer): an LM folder that brings code; .ran: the file it would
    write.
    """

    def no_questions(*_):
        raise AssertionError("a question was asked on standard input")

    monkeypatch.setattr("builtins.input", no_questions)
    mark = tmp_path / "RAN"

    def make(model_type, tokenizer=False):
        folder = copy(f"code-{model_type}-{tokenizer}")
        (folder / "x.py").write_text(CODE.format(mark=str(mark)))
        config = json.loads((folder / "config.json").read_text())
        auto = {"AutoConfig": "x.XConfig", "AutoModelForCausalLM": "x.XModel"}
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": model_type, "auto_map": auto})
        )
        if tokenizer:
            path = folder / "tokenizer_config.json"
            told = json.loads(path.read_text())
            told |= {"tokenizer_class": "XTokenizer"}
            told |= {"auto_map": {"AutoTokenizer": ["x.XTokenizer", "x.XTokenizer"]}}
            path.write_text(json.dumps(told))
        return folder

    make.ran = mark
    return make


def test_an_lm_that_needs_code_of_its_folder_is_refused_and_none_of_it_runs(with_code):
    folder = with_code("xxx")
    says = sentence(opened, folder)
    assert f"'{folder}' needs code of its own" in says and not with_code.ran.exists()


def test_an_lm_that_transformers_knows_is_read_without_the_folder_s_code(
    with_code, decoder, capsys
):
    m = opened(with_code("llama"))
    assert "brings code of its own (auto_map), which is not run" in capsys.readouterr().out
    assert torch.equal(m.head_VD, opened(decoder).head_VD) and not with_code.ran.exists()


def test_a_tokenizer_s_code_does_not_run_either(with_code):
    try:
        opened(with_code("llama", tokenizer=True))
    except click.ClickException as refused:
        assert "needs code of its own" in refused.message
    assert not with_code.ran.exists()


def test_weights_that_only_the_folder_s_code_knows_are_refused(with_code):
    folder = with_code("llama")
    weights = load_file(folder / "model.safetensors") | {"model.extra.weight": torch.ones(3)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    says = sentence(opened, folder)
    assert "does not read 1 of the weights" in says and "model.extra.weight the first" in says


def test_a_model_s_kind_is_told_by_its_architecture_first():
    from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config

    assert pretrained.kind_of(T5Config()) == "encoder-decoder"
    assert pretrained.kind_of(BertConfig()) == pretrained.kind_of(RobertaConfig()) == "encoder"
    assert pretrained.kind_of(GPT2Config()) == "decoder"
    causal = BertConfig(architectures=["BertLMHeadModel"], is_decoder=True)
    assert pretrained.kind_of(causal) == "decoder"
