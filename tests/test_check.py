"""An LM is read right or refused by name: what is measured at load, and what its files may be."""

import json
import shutil
from types import SimpleNamespace

import click
import pytest
import torch
from conftest import bpe_tokenizer, randomise, save
from safetensors.torch import load_file, save_file

import finetune
from delrec.lm import check, layers, model, passes, pretrained
from delrec.lm.model import load_lm
from delrec.lm.text import embed, random_soft_prompt, token_scale
from delrec.lm.titles import tokenise_titles

CPU = torch.device("cpu")
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 269060552\n"


def sentence(call, *args, **kwargs):
    with pytest.raises(click.ClickException) as e:
        call(*args, **kwargs)
    assert "\n" not in e.value.message
    return e.value.message


def opened(folder, dtype=torch.float32, **more):
    return load_lm(str(folder), CPU, dtype, **more)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known of any LM."""
    monkeypatch.setattr(check, "CACHE", tmp_path / "fresh")
    return tmp_path / "fresh" / "checked"


@pytest.fixture
def copy(decoder, tmp_path):
    return lambda name="copy": shutil.copytree(decoder, tmp_path / name)


# --------------------------------------------------------------- the fastest way that says the same


def test_a_llama_is_read_by_the_fastest_way_without_a_word(decoder, fresh, capsys):
    m = opened(decoder)
    fast = ["fused", "packed"] if "fused" in passes.candidates_of(m) else ["packed"]
    assert m.paths == [*fast, "rows"] and m.reach == float("inf")
    assert m.scale == 1 and not m.own_head
    assert capsys.readouterr().out == ""


def wrong_by(size):
    """A pass like pass_packed whose states are off by `size` times their own spread."""
    right = passes.pass_packed

    def run(*args):
        x_ND = right(*args)
        noise = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(0))
        return x_ND + (size * x_ND.float().std() * noise).to(x_ND.dtype)

    return run


def test_a_way_that_says_something_else_is_not_taken_and_is_told(
    decoder, fresh, monkeypatch, capsys
):
    monkeypatch.setattr(passes, "can_fuse", lambda lm: False)
    monkeypatch.setattr(passes, "pass_packed", wrong_by(0.01))
    m = opened(decoder)
    assert m.paths == ["padded", "rows"]
    said = capsys.readouterr().out
    assert (
        said.startswith(f"{decoder}: read padded rows, because packed ones")
        and said.count("\n") == 1
    )


@pytest.mark.parametrize("times, taken", [(0.2, True), (20, False)])
def test_in_bf16_a_way_may_be_off_by_twice_what_the_model_is_off_itself(
    decoder, fresh, monkeypatch, times, taken
):
    monkeypatch.setattr(passes, "can_fuse", lambda lm: False)
    # bf16 keeps 8 bits: a state is off by some 2^-9 of its size at each of a few roundings
    monkeypatch.setattr(passes, "pass_packed", wrong_by(times * 2**-8))
    m = opened(decoder, torch.bfloat16)
    assert ("packed" in m.paths) == taken
    assert m.model.dtype == torch.bfloat16 and m.head_VD.dtype == torch.bfloat16


def test_a_model_that_fails_in_bf16_is_read_in_fp32(decoder, fresh, monkeypatch, capsys):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def only_fp32(self, *args, **kwargs):
        if self.dtype == torch.bfloat16:
            raise RuntimeError("expected m1 and m2 to have the same dtype")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", only_fp32)
    monkeypatch.setattr(model, "has_fast_bf16", lambda: True)
    m = load_lm(decoder, CPU)
    assert m.dtype == torch.float32 and m.packs
    assert "computes in fp32: in torch.bfloat16 the model itself fails" in capsys.readouterr().out
    assert "cannot be read in torch.bfloat16" in sentence(opened, decoder, torch.bfloat16)


def test_the_measurement_leaves_every_weight_as_it_was(decoder, fresh):
    was = opened(decoder, torch.bfloat16, checked=False)
    now = opened(decoder, torch.bfloat16)
    for a, b in zip(was.model.state_dict().values(), now.model.state_dict().values()):
        assert torch.equal(a, b) and a.dtype == b.dtype


def behind_the_head(monkeypatch, change):
    """Llama's logits go through `change` on their way out."""
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def changed(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)


def test_logits_times_a_number_are_the_head_s_times_that_number(decoder, fresh, monkeypatch):
    behind_the_head(monkeypatch, lambda x: x / 8)
    m = opened(decoder)
    assert m.scale == pytest.approx(1 / 8, rel=1e-5) and not m.own_head and m.packs


def test_capped_logits_are_asked_of_the_model_itself(decoder, fresh, monkeypatch, capsys):
    behind_the_head(monkeypatch, lambda x: 3 * torch.tanh(x / 3))
    m = opened(decoder)
    assert m.own_head and m.packs
    assert "by logits of the model itself" in capsys.readouterr().out


def test_logits_that_do_not_follow_from_the_states_are_refused(decoder, fresh, monkeypatch):
    behind_the_head(
        monkeypatch, lambda x: x + torch.arange(x.shape[1])[None, :, None] % 7 * x.std()
    )
    says = sentence(opened, decoder)
    assert decoder in says and "no way of reading it here gives the scores" in says
    assert "--no-check-llm" in says and opened(decoder, checked=False).packs


def test_tokens_that_say_more_than_their_vectors_are_refused(decoder, fresh, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def changed(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        out.logits = out.logits if input_ids is None else out.logits * 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    assert "from vectors in place of tokens" in sentence(opened, decoder)


# ---------------------------------------------------------------- measured once


def test_what_was_found_is_kept_for_the_same_lm_only(decoder, copy, fresh, monkeypatch):
    opened(decoder)
    assert len(list(fresh.iterdir())) == 1
    measured = []
    plain = check.wanted_of
    monkeypatch.setattr(check, "wanted_of", lambda *a: measured.append(1) or plain(*a))
    again = opened(copy())  # the same files elsewhere
    assert not measured and again.paths == opened(decoder).paths and again.attends
    other = copy("other")
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    (other / "config.json").write_text(json.dumps(config))
    opened(other)
    assert len(measured) == 1
    for kept in fresh.iterdir():
        kept.write_text('{"paths":')
    opened(decoder)
    assert len(measured) == 2


def test_what_was_found_is_said_again(decoder, fresh, monkeypatch, capsys):
    behind_the_head(monkeypatch, lambda x: 3 * torch.tanh(x / 3))
    first = opened(decoder)
    said = capsys.readouterr().out
    again = opened(decoder)
    assert said and capsys.readouterr().out == said
    assert (again.paths, again.own_head, again.scale) == (first.paths, first.own_head, first.scale)


def test_a_cache_that_cannot_be_written_stops_nothing(decoder, fresh, tmp_path):
    (tmp_path / "fresh").write_text("a file where a folder should be")
    assert opened(decoder).packs


# ---------------------------------------------------------------- files that are not whole


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


# ---------------------------------------------------------------- nothing of a folder runs

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


# ------------------------------------------------------------ titles that a tokenizer does not know


def data_of(toy, titles):
    return SimpleNamespace(**{**vars(toy), "titles": ["", *titles], "n_items": len(titles)})


CHINESE = ["国王的新衣", "流浪地球", "新闻联播", "شهر النور"]


def test_titles_that_a_tokenizer_cannot_tell_apart_are_counted(load, toy, capsys):
    m = load("encoder_decoder")
    check.say_once.cache_clear()
    data = data_of(toy, ["Silver River", "Hidden Letter", "Golden Harbour"] * 9 + CHINESE[:2])
    tokenise_titles(m, data, allow_unknown=False)
    said = capsys.readouterr().out
    share = float(said.split(": ")[1].split("%")[0])
    assert 1 < share < 20 and f"cannot tell 2 of {data.n_items} titles apart" in said
    tokenise_titles(m, data, allow_unknown=False)
    assert capsys.readouterr().out == ""  # once a process


def test_over_a_fifth_of_unknown_tokens_needs_a_flag(load, toy, capsys):
    m = load("encoder_decoder")
    check.say_once.cache_clear()
    says = sentence(tokenise_titles, m, data_of(toy, CHINESE), allow_unknown=False)
    assert "cannot tell 3 of 4 titles apart" in says and "--allow-unknown" in says
    tokenise_titles(m, data_of(toy, CHINESE), allow_unknown=True)
    assert "cannot tell 3 of 4" in capsys.readouterr().out


def test_a_byte_level_tokenizer_knows_every_title(load, toy, capsys):
    tokenise_titles(load("decoder"), data_of(toy, CHINESE), allow_unknown=False)
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------- vectors as long as the model sees them


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


# ---------------------------------------------------------------- layers of other names


@pytest.mark.parametrize("adapt", ["qv", "linear"])
def test_gpt2_is_adapted_though_its_layers_are_no_linear_ones(
    adapt, toy, backbone, script, on_cpu, tmp_path
):
    from transformers import GPT2Config, GPT2LMHeadModel

    tok = bpe_tokenizer()
    config = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=512)
    folder = save(tmp_path / "gpt2", randomise(GPT2LMHeadModel(config), 4), tok)
    names = layers.adapt_modules(opened(folder), adapt)
    assert {n.split(".")[-1] for n in names} == (
        {"c_attn"} if adapt == "qv" else {"c_attn", "c_proj", "c_fc"}
    )
    flags = ["--dataset", toy.folder, "--backbone", backbone, "--llm", folder, "--adapt", adapt]
    flags += ["--soft-prompt", "none", "--samples", 48, "--batch", 8, "--val-samples", 8]
    flags += ["--evals", 1, "--init-r", 4, "--target-r", 2, "--out", tmp_path / "run"]
    script(finetune.main, *flags)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(bool((t != 0).any()) for k, t in adapter.items() if "lora_E" in k)
    merged = opened(tmp_path / "run").model
    plain = opened(folder).model
    moved = [not torch.equal(a, b) for a, b in zip(merged.parameters(), plain.parameters())]
    assert any(moved)


def test_a_model_s_kind_is_told_by_its_architecture_first():
    from transformers import BertConfig, GPT2Config, RobertaConfig, T5Config

    assert pretrained.kind_of(T5Config()) == "encoder-decoder"
    assert pretrained.kind_of(BertConfig()) == pretrained.kind_of(RobertaConfig()) == "encoder"
    assert pretrained.kind_of(GPT2Config()) == "decoder"
    causal = BertConfig(architectures=["BertLMHeadModel"], is_decoder=True)
    assert pretrained.kind_of(causal) == "decoder"
