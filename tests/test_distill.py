"""distill.py end to end on tiny LMs: what it writes, and that only the soft prompt moves."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import stages
from commands import log_of, metrics_of, prompt_of
from distilling import SMALL
from safetensors.torch import load_file
from tiny_lms import KINDS

import distill
from delrec.lm import differences, model, prompt_training
from delrec.lm.balance import Balance, weights
from delrec.lm.text import random_soft_prompt
from delrec.runtime import load_run


@pytest.fixture
def distil_again(toy, backbone, decoder, script, on_cpu, tmp_path):
    """distil_again(options) -> (the folder of the chain's stage 1 made once more, what it said)."""
    args, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")

    def distil(options="", code=0):
        return tmp_path / "prompt", script(distill.main, *args, *options.split(), code=code).output

    return distil


# ---------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves_behind(chain, toy, decoder):
    files = {p.name for p in chain.prompt.iterdir()}
    assert {"config.json", "log.jsonl", "metrics.json", "soft_prompt.safetensors"} <= files
    P = prompt_of(chain.prompt)
    assert P.shape == (6, 32)
    assert P.dtype == torch.float32
    assert torch.isfinite(P).all()
    run = load_run(chain.prompt, toy, ["distill"])
    assert (run.llm, run.k) == (decoder, 6)
    assert (run.backbone, run.settings["history"]) == ("SASRec", 6)


def test_a_run_tells_how_the_lm_answered_before_and_after(chain):
    result, last = metrics_of(chain.prompt), chain.distilled.json
    assert set(result["before"]) == {"ta", "rps", "ta_loss", "rps_loss"}
    assert set(result["before"]) == set(result["after"])
    assert result["chance"] == 1 / 8
    assert all(np.isfinite(v) for when in ("before", "after") for v in result[when].values())
    assert result["n_rps"] == 20
    assert last["stage"] == "distill"
    assert last["rps_after"] == round(result["after"]["rps"], 4)
    assert last["chance"] == 0.125
    assert "prompts/s" in chain.distilled.output


def test_the_log_holds_each_step_its_rate_and_the_weights_of_the_losses(chain):
    log = log_of(chain.prompt)
    assert [line["step"] for line in log] == list(range(1, 7))
    assert sum("val_rps_loss" in line for line in log) == 2
    # warm-up, then decay
    assert max(line["lr"] for line in log) <= 0.05
    assert log[-1]["lr"] < log[1]["lr"]
    assert all(0 < line["lam_ta"] < 1 for line in log)
    assert len({line["lam_ta"] for line in log}) > 3


def test_the_best_step_is_the_one_with_the_lowest_validation_loss(chain):
    log = [line for line in log_of(chain.prompt) if "val_rps_loss" in line]
    result = metrics_of(chain.prompt)
    best = min(log, key=lambda line: line["val_ta_loss"] + line["val_rps_loss"])
    assert result["best_step"] == best["step"]
    assert result["after"]["rps_loss"] == best["val_rps_loss"]


# ---------------------------------------------------------------- what moves


def test_weights_of_the_two_losses():
    # norms 5 and 20: 5^-1/2 : 20^-1/2 = 2 : 1
    g_TA, g_RPS = torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([[0.0, 12], [16, 0]])
    zero, no_sample = torch.zeros(2, requires_grad=True), torch.zeros(2, 2)
    assert weights("gradnorm", g_TA, g_RPS, zero).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert weights("gradnorm", g_TA, g_TA, zero).tolist() == pytest.approx([0.5, 0.5])
    assert weights("fixed", g_TA, g_RPS, zero).tolist() == [0.5, 0.5]
    s = torch.tensor([np.log(2.0), np.log(0.5)], dtype=torch.float32, requires_grad=True)
    assert weights("uncertainty", g_TA, g_RPS, s).tolist() == pytest.approx([0.5, 2])
    assert not weights("uncertainty", g_TA, g_RPS, s).requires_grad
    # a batch without a TA sample leaves RPS its say
    assert weights("gradnorm", no_sample, g_RPS, zero).tolist() == [0, 1]
    assert weights("gradnorm", no_sample, no_sample, zero).tolist() == [0, 0]


def test_learnt_variances_come_to_the_losses_and_wait_for_a_sample():
    # exp(-s) loss + s is least at s = log loss
    for asked, want in (([True, True], [np.log(2), np.log(0.5)]), ([True, False], [np.log(2), 0])):
        balance = Balance(SimpleNamespace(balance="uncertainty", tasks="both"))
        for _ in range(500):
            balance.learn([2.0, 0.5], asked)
        assert balance.log_var.tolist() == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_soft_prompt_moves(
    kind, request, toy, backbone, run, on_cpu, tmp_path, monkeypatch
):
    opened, load_lm = [], model.load_lm

    def load_and_keep(*args, **more):
        opened.append(load_lm(*args, **more))
        return opened[-1]

    monkeypatch.setattr(prompt_training, "load_lm", load_and_keep)
    llm, out = request.getfixturevalue(kind), tmp_path / "prompt"
    few = "--verbalizer mean --tasks both --samples 24 --lr 0.05 --val-samples 20 --evals 1"
    where = f"--dataset {toy.folder} --backbone {backbone} --llm {llm} --out {out}"
    run(distill.main, f"{where} --k 4 {SMALL} {few}")
    stored = load_file(f"{llm}/model.safetensors")
    fresh = load_lm(llm, torch.device("cpu"), torch.float32)
    after = list(opened[0].model.named_parameters())
    for (name, p), want in zip(after, fresh.model.parameters()):
        assert torch.equal(p, want), name
        assert not p.requires_grad, name
        assert p.grad is None, name
    assert all(torch.equal(stored[n], p) for n, p in after if n in stored)
    moved = (prompt_of(out) - random_soft_prompt(fresh, 4, 0)).abs()
    assert (moved > 0).float().mean() > 0.9  # every vector of P has a gradient


@pytest.mark.parametrize(
    "choice",
    [
        "--balance uncertainty",
        "--balance fixed --tasks ta",
        "--verbalizer letter",
        "--verbalizer first --show",
        "--verbalizer likelihood --show --val-samples 0",
        "--loss catalogue --show --instruct --rps-candidates release",
    ],
)
def test_every_choice_runs(choice, to_distil, run, tmp_path):
    # in the LM's usual dtype on this machine
    few = "--k 3 --tasks both --samples 16 --lr 0.01 --val-samples 12 --evals 1"
    result = run(distill.main, f"{to_distil} --out {tmp_path}/prompt {few} {choice}")
    assert np.isfinite(result.json["rps_after"])
    for line in log_of(tmp_path / "prompt"):
        assert np.isfinite([line["loss_ta"], line["loss_rps"]]).all()


def test_paper_sets_the_paper_s_choices_unless_typed(toy, backbone, decoder, run, on_cpu, tmp_path):
    where = f"--dataset {toy.folder} --backbone {backbone} --llm {decoder}"
    few = "--k 3 --a 3 --h 3 --candidates 8 --samples 8 --batch 8 --val-samples 8 --evals 1"
    paper = f"{where} {few} --paper"
    said = run(distill.main, f"{paper} --out {tmp_path}/a").output
    a = load_run(tmp_path / "a")
    assert {k: getattr(a, k) for k in distill.PAPER} == distill.PAPER | {"samples": 8, "batch": 8}
    # what stays different is said, once
    assert all(said.count(f"  - {line}\n") == 1 for line in differences.STAGE_1)
    assert a.settings["verbalizer"] == distill.PAPER["verbalizer"] == "mean"
    assert a.settings["show"] is True
    run(distill.main, f"{paper} --out {tmp_path}/b --verbalizer first --lr 0.5 --no-show")
    b = load_run(tmp_path / "b")
    assert (b.verbalizer, b.lr, b.show) == ("first", 0.5, False)
    assert (b.history, b.balance) == (10, "gradnorm")


@pytest.mark.parametrize(
    "dataset, more, a",
    [("ml-100k", {}, 4), ("steam", {}, 6), ("steam", {"paper": False}, 4), ("steam", {"a": 3}, 3)],
)
def test_the_paper_s_example_is_longer_on_steam_and_home_kitchen(dataset, more, a):
    cfg = {"paper": True, "a": None, "input": "titles", "tasks": "both", "rps_candidates": "random"}
    flags = {
        "C": 15,
        "h": 10,
        "micro": 4,
        "augment": None,
        "soft": None,
        "user_states": None,
    } | distill.PAPER
    cfg = SimpleNamespace(**cfg | flags | more)
    distill.settle(cfg, set(), dataset)
    assert cfg.a == a


# ---------------------------------------------------------------- what a run promises


def test_the_same_seed_gives_the_same_prompt(distil_again, chain):
    folder, _ = distil_again()
    assert torch.equal(prompt_of(folder), prompt_of(chain.prompt))
    same = (chain.prompt / "metrics.json").read_bytes()
    assert (folder / "metrics.json").read_bytes() == same
    folder, _ = distil_again("--seed 1 --overwrite")
    assert not torch.equal(prompt_of(folder), prompt_of(chain.prompt))


def test_micro_batches_do_not_change_the_gradient(distil_again, chain):
    folder, _ = distil_again("--micro 3")
    torch.testing.assert_close(prompt_of(folder), prompt_of(chain.prompt), rtol=0, atol=1e-4)
    want = [line["loss_rps"] for line in log_of(chain.prompt)]
    assert [line["loss_rps"] for line in log_of(folder)] == pytest.approx(want, rel=1e-4)


def test_memory_options_do_not_change_the_prompt(distil_again, chain):
    folder, said = distil_again("--micro auto --gradient-checkpointing")
    torch.testing.assert_close(prompt_of(folder), prompt_of(chain.prompt), rtol=0, atol=1e-4)
    assert "--micro auto: a prompt takes" in said
    assert "minutes to go" in said
    assert load_run(folder).micro >= 1
    _, said = distil_again("--micro many", code=2)
    assert "many" in said


def test_two_processes_give_the_prompt_and_the_metrics_of_one(chain, twins):
    one, two = metrics_of(chain.prompt), metrics_of(twins.prompt)
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(prompt_of(twins.prompt), prompt_of(chain.prompt), **near)
    assert two["best_step"] == one["best_step"]
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-5)
    names = ("loss_ta", "loss_rps", "lam_ta")
    for a, b in zip(log_of(chain.prompt), log_of(twins.prompt)):
        assert [b[k] for k in names] == pytest.approx([a[k] for k in names], rel=1e-4)
    assert load_run(twins.prompt).world == 2
    assert twins.printed.count("distill: ") == 1
