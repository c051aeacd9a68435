"""adalora.py: the orthogonality of the adapter, and ranks that are reallocated to a budget."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import adapter_of, log_of
from tuning import BY_MEAN, stored_scores

import finetune
from delrec.lm import samples
from delrec.lm.adalora import add_adalora, go_on, orthogonality, pruning_steps
from delrec.lm.layers import adapt_modules
from delrec.lm.model import adapted, load_lm
from delrec.runtime import load_run


def fake(**params):
    return SimpleNamespace(named_parameters=lambda: params.items())


def test_orthogonality_by_hand():
    eye = torch.eye(4)
    assert orthogonality(fake(lora_A=eye[:3], lora_B=eye[:, :3])) == 0
    # 2I: A A^T - I = 3I of size 3, Frobenius norm 3 sqrt(3); the other matrix adds 0; E is not
    # counted
    doubled = fake(x_lora_A=2 * eye[:3], x_lora_B=eye[:, :3], lora_E=eye)
    assert orthogonality(doubled).item() == pytest.approx(3 * 3**0.5 / 2)
    mixed = fake(
        a_lora_A=2 * eye[:3],
        b_lora_A=eye[:2],
        a_lora_B=eye[:, :3],
        b_lora_B=3 * torch.eye(5)[:, :2],
    )
    assert orthogonality(mixed).item() == pytest.approx((3 * 3**0.5 + 8 * 2**0.5) / 4)


@pytest.mark.parametrize(
    "kind, qv, mlp, linear",
    [
        ("decoder", 4, 6, 14),
        ("encoder_decoder", 12, 12, 38),
        ("flan", 12, 12, 38),
        ("encoder", 4, 4, 13),
    ],
)
def test_adapted_layers(load, kind, qv, mlp, linear):
    # two layers each; T5: q and v of the encoder, of the decoder and of the decoder's look at the
    # encoder
    m = load(kind)
    names = adapt_modules(m, "qv")
    assert len(names) == qv
    queries_and_values = {"q_proj", "v_proj", "q", "v", "query", "value"}
    assert {n.split(".")[-1] for n in names} <= queries_and_values
    of_mlp = adapt_modules(m, "mlp")
    assert len(of_mlp) == mlp
    assert not any("attention" in n.lower() or "attn" in n for n in of_mlp)
    every = adapt_modules(m, "linear")
    assert set(of_mlp) < set(every)
    head = m.model.get_output_embeddings()
    assert set(names) < set(every)
    assert all(m.model.get_submodule(n) is not head for n in every)
    assert len(every) == sum(isinstance(x, torch.nn.Linear) for x in m.model.modules()) - 1


def test_ranks_are_reallocated_to_the_budget(chain):
    # q and v of two layers, 6 each; 3 each on average
    assert load_run(chain.delrec).rank == [4 * 6, 4 * 3]
    values = {n: w for n, w in adapter_of(chain.delrec).items() if "lora_E" in n}
    kept = {n: w.shape[0] for n, w in values.items()}
    assert sum(kept.values()) == 12
    # some layers got more than others
    assert len(set(kept.values())) > 1
    assert all(w.any() for w in values.values())


@pytest.mark.parametrize(
    "share, steps, want", [(0.2, 100, (4, 20)), (0.5, 100, (10, 50)), (0.2, 5, (1, 2))]
)
def test_ranks_are_cut_for_the_last_time_where_prune_end_says(share, steps, want, load):
    cfg = SimpleNamespace(init_r=4, target_r=2, alpha=8, dropout=0.0, prune_end=share)
    lm = load("decoder")
    adapter = add_adalora(lm, adapt_modules(lm, "qv"), cfg, steps)
    try:
        assert pruning_steps(adapter) == (*want, steps)
    finally:
        adapter.unload()


@pytest.mark.parametrize("goes_on", [False, True])
def test_of_a_bf16_lm_only_the_adapters_own_weights_train(goes_on, chain, decoder):
    lm = load_lm(decoder, torch.device("cpu"), torch.bfloat16, checked=False)
    if goes_on:
        adapter = go_on(lm, load_run(chain.delrec), dropout=0.1)
    else:
        cfg = SimpleNamespace(init_r=4, target_r=2, alpha=8, dropout=0.0, prune_end=0.2)
        adapter = add_adalora(lm, adapt_modules(lm, "qv"), cfg, 10)
    kinds = {name.split(".")[-2] for name, p in adapter.named_parameters() if p.requires_grad}
    assert kinds == {"lora_A", "lora_B", "lora_E"}


def test_an_adapter_is_opened_as_it_was_saved_whatever_the_lm_computes_in(chain, decoder):
    saved = adapter_of(chain.delrec)
    for dtype in (torch.float32, torch.bfloat16):
        lm = load_lm(decoder, torch.device("cpu"), dtype, checked=False)
        named = adapted(lm, load_run(chain.delrec)).named_parameters()
        opened = {name.replace(".default", ""): p for name, p in named}
        assert all(torch.equal(opened[name], w) for name, w in saved.items())


def best_at(number):
    """Validation.ask, of which call number `number` is perfect, while the others know nothing."""
    made = []

    def planted(valid, r, ranks):
        made.append(valid)
        truth_nC = valid.cand_nC == valid.target_n[:, None]
        known = truth_nC if len(made) == number else np.zeros(truth_nC.shape)
        hit, gain = valid.quality(known.astype(np.float32))
        return known.astype(np.float32), {"val_hr@1": hit, "val_ndcg@10": gain}

    return planted


def test_an_early_peak_behind_the_last_cut_is_found(to_tune, run, on_cpu, tmp_path, monkeypatch):
    found = {}
    for number in (1, 4):
        out = tmp_path / str(number)
        monkeypatch.setattr(samples.Validation, "ask", best_at(number))
        more = "--soft-prompt none --samples 160 --evals 4 --prune-end 0.2"
        said = run(finetune.main, f"{to_tune} {BY_MEAN} {more} --out {out}").output
        assert "ranks 16 -> 8 between step 1 and 4 of 20" in said
        assert [line["step"] for line in log_of(out) if "val_hr@1" in line] == [4, 9, 15, 20]
        found[number] = load_run(out)
        assert found[number].rank == [16, 8]
        scores = stored_scores(out)[1]
        assert (scores.sum(1) == 1).all() and (scores.max(1) == 1).all()
    assert (found[1].best_step, found[4].best_step) == (4, 20)
    early, late = (adapter_of(tmp_path / str(number)) for number in (1, 4))
    assert any(not torch.equal(early[name], late[name]) for name in early if "lora_A" in name)


class ZeroingLion(finetune.Lion):
    """Its steps leave a 0 where the largest singular value was: Lion moves by multiples of the
    learning rate, so a kept value returns to exactly 0 now and then.
    """

    def step(self):
        super().step()
        params = [p for group in self.param_groups for p in group["params"]]
        value = max((p for p in params if p.shape[1] == 1), key=lambda p: p.abs().max())
        value.data[value.abs().argmax()] = 0


def test_a_kept_singular_value_may_be_zero(to_tune, run, on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "Lion", ZeroingLion)
    run(finetune.main, f"{to_tune} {BY_MEAN} --soft-prompt none --out {tmp_path}/run")
    assert load_run(tmp_path / "run").rank == [16, 8]
