"""An LM is read right or refused by name: what is measured at load."""

import json

import pytest
import torch
from families import EXACT, RIGHT_OR_REFUSED, write
from lm_cases import CPU, opened, wrong_by
from scripts import sentence

from delrec.kernels import cpu
from delrec.lm import check, passes
from delrec.lm.model import load_lm

pytest_plugins = ["lm_fixtures"]


def test_a_llama_is_read_by_the_fastest_way_without_a_word(decoder, fresh, capsys):
    m = opened(decoder)
    fast = ["fused", "packed"] if "fused" in passes.passes_to_try(m) else ["packed"]
    assert m.paths == [*fast, "rows"] and m.reach == float("inf")
    assert m.scale == 1 and not m.own_head
    assert capsys.readouterr().out == ""


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
    monkeypatch.setattr(cpu, "has_fast_bf16", lambda: True)
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


@pytest.mark.parametrize("name", ["bloom", "gemma2", "gemma2-capped", "lfm2"])
def test_on_trust_an_lm_that_the_fastest_way_cannot_read_is_refused(name, tmp_path):
    [family] = [f for f in [*EXACT, *RIGHT_OR_REFUSED] if f.name == name]
    folder = write(family, tmp_path / name)
    says = sentence(opened, folder, checked=False)
    assert says.startswith(f"{folder} (") and "the fastest way of reading it fails" in says
    assert "leave out --no-check-llm" in says
    assert opened(folder).paths[0] == "rows"  # what the advice leads to


def test_tokens_that_say_more_than_their_vectors_are_refused(decoder, fresh, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def changed(self, input_ids=None, **kwargs):
        out = forward(self, input_ids=input_ids, **kwargs)
        out.logits = out.logits if input_ids is None else out.logits * 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    assert "from vectors in place of tokens" in sentence(opened, decoder)


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


def test_what_was_found_with_the_c_loops_holds_for_this_cpu_and_these_loops(
    decoder, fresh, monkeypatch
):
    if "fused" not in opened(decoder).paths:
        pytest.skip("no C++ compiler here")
    for other in ("cpu_features", "key_of"):
        monkeypatch.setattr(cpu, other, lambda *_, other=other: f"another {other}")
        opened(decoder)
    assert len(list(fresh.iterdir())) == 3
    assert passes.made_of(["packed"]) == "" != passes.made_of(["fused", "packed"])


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
