"""The layers of an LM: which are adapted, and computed again."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_cases import ALL, opened, rank_with, windows
from safetensors.torch import load_file
from tiny_lms import bpe_tokenizer, randomise, save

import finetune
from delrec.lm import layers, verbalizers
from delrec.lm.layers import adapt_modules, checkpoint_layers
from delrec.lm.model import load_lm
from delrec.lm.reading import read_prefix
from delrec.training import memory
from delrec.training.memory import CPU_TOKENS, extra_bytes, largest_micro, micro_of


@pytest.mark.parametrize(
    "adapt, adapted",
    [("qv", {"c_attn"}), ("mlp", {"c_proj", "c_fc"}), ("linear", {"c_attn", "c_proj", "c_fc"})],
)
def test_gpt2_is_adapted_though_its_layers_are_no_linear_ones(
    adapt, adapted, toy, backbone, script, on_cpu, tmp_path
):
    from transformers import GPT2Config, GPT2LMHeadModel

    tok = bpe_tokenizer()
    config = GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=4, n_positions=512)
    folder = save(tmp_path / "gpt2", randomise(GPT2LMHeadModel(config), 4), tok)
    names = layers.adapt_modules(opened(folder), adapt)
    assert {n.split(".")[-1] for n in names} == adapted
    assert adapt != "mlp" or all(".mlp." in n for n in names)
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


@ALL
def test_gradient_checkpointing_changes_memory_and_nothing_else(request, toy, kind):
    from peft import LoraConfig, get_peft_model

    from delrec.lm.bench.memory import saved_tensors

    kept = []

    def gradients(again):
        r = rank_with(
            lambda _: load_lm(request.getfixturevalue(kind), torch.device("cpu"), torch.float64),
            kind,
            toy,
            k=4,
            verbalizer="likelihood",
        )
        torch.manual_seed(1)
        adapter = get_peft_model(
            r.lm.model,
            LoraConfig(
                target_modules=adapt_modules(r.lm, "qv"),
                r=2,
                lora_dropout=0.3,
                init_lora_weights=False,
            ),
        ).train()
        if again:
            checkpoint_layers(r.lm.model)
        old, cand = windows(toy, 4)
        tails, P = (
            [r.prompts.history(h, c)[0] for h, c in zip(old, cand)],
            r.P.double().requires_grad_(),
        )

        def loss():
            torch.manual_seed(2)  # the dropout of both
            return (
                verbalizers.score(
                    r.lm,
                    read_prefix(r.lm, r.prompts.prefix, P),
                    tails,
                    cand,
                    r.titles,
                    "likelihood",
                )
                .log_softmax(1)[:, 2]
                .sum()
            )

        kept.append(sum(size for _, size in saved_tensors(loss, r.lm.model).values()))
        value = loss()
        value.backward()
        return [value.detach(), P.grad] + [p.grad for p in adapter.parameters() if p.requires_grad]

    results = [gradients(again) for again in (False, True)]
    assert kept[1] < 0.5 * kept[0]
    assert all(g.abs().max() > 0 for g in results[0])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_as_many_prompts_at_a_time_as_memory_holds(monkeypatch, alone, capsys):
    def step(m):  # 200 MB, and 64 MB a prompt
        return torch.ones((200 + 64 * m) * 2**18).sum()

    if extra_bytes(lambda: None, alone.device) is None:
        pytest.skip("this system does not tell a process's high-water mark")
    for free, tail, want in (
        (2**30, 10, range(9, 11)),
        (2**20, 10, [1]),  # a second prompt is not tried
        (2**40, CPU_TOKENS // 3, [3]),
        (2**30, CPU_TOKENS, [1]),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert largest_micro(step, [np.zeros(tail)] * 9, alone.device, alone) in want
    assert "would fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "micro, batch, room, passes, could, tried",
    [
        (4, 8, 57, 1, 4, 2),  # ten GPUs: one sample each, a pass may have four
        (4, 80, 57, 4, 4, 2),
        (8, 8, 3, 1, 3, 2),  # a card that holds three
        ("auto", 80, 57, 8, 57, 2),
        (1, 8, 1, 1, 1, 1),  # twice the first would not fit: no second prompt is tried
    ],
)
def test_several_gpus_say_what_each_has_room_for(
    micro, batch, room, passes, could, tried, monkeypatch, capsys
):
    passed = []

    def loss(samples):
        passed.append(len(samples))
        return torch.ones(1, requires_grad=True)

    def extra(f, device):  # 100 bytes, of them 60 for each prompt
        f()
        return 40 + 60 * passed[-1]

    free = 150 if room == 1 else (100 + 60 * (room - 1)) / 0.8 + 1
    monkeypatch.setattr(memory, "extra_bytes", extra)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "max_over_ranks", lambda x, ranks: x)
    ten = SimpleNamespace(world=10, device=torch.device("cuda", 0), main=True)
    samples = [SimpleNamespace(tail=np.zeros(n)) for n in range(1, 9)]
    assert micro_of(micro, batch, [(loss, samples)], ten) == (passes, could)
    assert f"{room} would fit" in capsys.readouterr().out
    assert max(passed) == tried


def test_a_number_is_taken_as_it_is_without_a_try_where_no_gpus_share_a_batch(alone):
    gpu = SimpleNamespace(world=1, device=torch.device("cuda", 0), main=True)
    for ranks in (alone, gpu):
        assert micro_of(4, 8, iter([None]), ranks) == (4, 4)
        assert micro_of(4, 3, iter([None]), ranks) == (3, 4)
