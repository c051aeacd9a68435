"""make gpu: its plan, its time boxes, what it takes along, and its quick rehearsal on this CPU."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scripts import ROOT
from torch.nn.attention import SDPBackend

from delrec.kernels.bench import Candidates
from delrec.lm.bench.random_lms import random_lm, random_prompts
from delrec.lm.bench.work import K
from delrec.lm.reading import read_prefix
from delrec.lm.text import random_soft_prompt
from recipes import gpu, gpu_attention, gpu_chain, gpu_checks, gpu_tiny, gpu_variants, gpu_wheels
from recipes.gpu_lm import on_a_card
from recipes.gpu_rows import BACKENDS, GATHERS, LEFT_OUT, PLAN, Rows, read, unexpected

NAMES = {name for stage in PLAN.values() for name in stage()}


@pytest.fixture
def gpu_kernels():
    """The module of stage kernels, which needs Triton."""
    pytest.importorskip("triton")
    from recipes import gpu_kernels

    return gpu_kernels


def row(name, value, reason="x"):
    return {"name": name, "value": value, "reason": reason, "unit": "ms", "goal": None}


def test_the_stages_fit_into_nine_minutes_with_what_starts_them():
    assert list(gpu.BOXES) == list(PLAN) and sum(gpu.BOXES.values()) <= 530
    assert sum(len(stage()) for stage in PLAN.values()) == len(NAMES)


def test_the_quick_rehearsal_gives_every_row_of_the_plan_a_number_or_a_reason(tmp_path):
    command = [sys.executable, "recipes/gpu.py", "--rehearse", "--quick", "--out", str(tmp_path)]
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    rows = read(tmp_path / "rows.jsonl")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {r["name"] for r in rows} == NAMES and len(rows) == len(NAMES)
    assert all(r["value"] is not None or r["reason"] for r in rows)
    assert {"unit", "goal", "card", "commit", "date"} <= rows[0].keys()
    numbers = {r["name"] for r in rows if r["value"] is not None}
    for stage in ("kernels", "lms", "variants"):
        expected = {n for n in PLAN[stage]() if not unexpected([row(n, 1.0)])}
        missing = expected - numbers
        assert not unexpected([r for r in rows if r["name"] in missing])
    assert "chain.vectors.hr1" in numbers and "variant.llama-8b.flex.ms_per_request" in numbers
    assert "won with" in done.stdout


def test_a_stage_that_hangs_loses_only_its_own_rows(tmp_path, monkeypatch):
    slow = tmp_path / "recipes" / "gpu.py"
    slow.parent.mkdir()
    slow.write_text("import time; time.sleep(60)")
    typed = SimpleNamespace(out=tmp_path, card="c", rehearse=True, quick=False, stages=["checks"])
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "REHEARSED", {"checks": 0.5})
    gpu.run_stages(typed, dict(os.environ))
    rows = read(tmp_path / "rows.jsonl")
    assert {r["name"] for r in rows} == set(PLAN["checks"]())
    assert all(r["value"] is None and "time box" in r["reason"] for r in rows)


def test_what_failed_says_why_and_the_stage_goes_on(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", "checks", "card", "abc")

    def fails():
        rows.add("checks.kernels.passed", 3)
        raise ValueError("too small\nmore")

    rows.attempt("checks.kernels", fails)
    rows.add("checks.resume.same_bits", True)
    first, second, third = read(rows.path)
    assert (first["value"], second["value"], third["value"]) == (3, None, 1)
    assert second["name"] == "checks.kernels.failed"
    assert second["reason"] == "ValueError: too small"
    assert rows.missing() == ["checks.two_cards.same_bits"]


def test_a_row_outside_the_plan_is_a_fault(tmp_path):
    with pytest.raises(KeyError):
        Rows(tmp_path / "rows.jsonl", "checks", "card", None).add("checks.other", 1)


def test_a_line_that_a_kill_cut_in_two_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"name": "a", "value": 1}\n{"name": "b", "va')
    assert [r["name"] for r in read(tmp_path / "rows.jsonl")] == ["a"]


def test_a_rehearsal_fails_for_rows_that_a_cpu_could_have_measured():
    fine = [row("lm.x.peak_gb", None), row("lm.x.mfu", None, LEFT_OUT), row("lm.y.mfu", 0.5)]
    assert unexpected(fine) == []
    assert unexpected([*fine, row("lm.x.mfu", None)]) == [row("lm.x.mfu", None)]


def test_a_rehearsal_has_a_folder_of_its_own(monkeypatch):
    for typed, out in ([], gpu.MEASURED), (["--rehearse"], gpu.REHEARSAL):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *typed])
        assert gpu.options().out == out
    assert f"--rehearse --out {gpu.REHEARSAL}\n" in (ROOT / "Makefile").read_text()


def test_seconds_of_a_backbone_that_an_earlier_time_trained_are_no_row_of_today(tmp_path):
    world = gpu_chain.World(tmp_path / "chain", True, torch.device("cpu"))
    world.backbone.mkdir()
    (world.backbone / "config.json").write_text('{"seconds": 7}')
    rows = Rows(tmp_path / "rows.jsonl", "chain", "card", None)
    world.make_backbone(rows)
    [told] = read(rows.path)
    assert told["name"] == "chain.backbone.seconds" and told["value"] is None
    assert "earlier time" in told["reason"] and unexpected([told]) == []


def test_a_tie_in_the_chain_is_the_mean_of_its_orders(toy, make_backbone, tmp_path):
    folder = make_backbone(tmp_path / "lm", toy, lambda samples: np.zeros((len(samples), 61)))
    score_nC = np.load(folder / "scores_test_15.npy")
    score_nC[3:] = np.nan  # nobody asked
    np.save(folder / "scores_test_15.npy", score_nC)
    which = gpu_chain.asked_of(folder)
    assert which.tolist() == [0, 1, 2]
    assert gpu_chain.hits_of(folder, toy, which) == pytest.approx(1 / 15)


def test_the_fastest_variant_of_each_shape_is_named():
    rows = [row(f"variant.a.{way}.ms_per_request", ms) for way, ms in (("mask", 4), ("flex", 2))]
    rows += [row("variant.b.mask.ms_per_request", 1), row("variant.b.flex.ms_per_request", None)]
    rows += [row("variant.c.mask.ms_per_request", None), row("variant.c.flex.ms_per_request", 3)]
    first, second, third = gpu.winners(rows)
    assert re.match(r"a, in batch: flex won with 2.000 ms .* 2.00 times as fast as mask", first)
    assert second.startswith("b, in batch: mask won")
    assert third.endswith(
        "flex won with 3.000 ms a request, mask, by which it is judged, was not measured"
    )


def test_a_graph_of_the_body_is_compared_with_the_body_not_with_the_whole_request():
    rows = [row("variant.a.alone.ms", 9), row("variant.a.alone_body.ms", 4)]
    [line] = gpu.winners([*rows, row("variant.a.alone_graph.ms", 2)])
    assert "alone_graph won" in line and "2.00 times as fast as alone_body" in line


def test_a_folder_without_wheels_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no wheel"):
        gpu_wheels.install(tmp_path, tmp_path / "site")


def test_wheels_of_what_is_there_are_not_installed(tmp_path, monkeypatch):
    for name in ("click-8.1.8-py3-none-any.whl", "recbole-1.2.1-py3-none-any.whl"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(gpu_wheels.subprocess, "run", lambda command: pytest.fail(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    env = gpu_wheels.install(tmp_path, tmp_path / "site")
    assert env["PIP_FIND_LINKS"] == str(tmp_path) and env["PIP_NO_INDEX"] == "1"
    assert json.dumps(env)


@torch.no_grad()
@pytest.mark.parametrize("way", ["no mask", "packed", "packed behind a kept prefix"])
def test_no_way_to_attend_asks_the_device_for_token_ids(way, monkeypatch):
    # tensors without memory: as on a card, they give no numpy array
    device = torch.device("meta")
    lm = on_a_card(random_lm("tiny", gpu_tiny.llama_config(), device, torch.float32))
    prompts = random_prompts(lm, 3, 130)
    start = read_prefix(lm, prompts.prefix, random_soft_prompt(lm, K, 0))
    tokens = 130 - 1  # the mask itself is not read
    if way == "no mask":
        answer = SimpleNamespace(last_hidden_state=torch.empty(3, tokens, 64, device=device))
        monkeypatch.setattr(lm.body, "forward", lambda inputs_embeds, use_cache: answer)
        monkeypatch.setattr(gpu_attention, "scored", lambda lm, prompts, x_BD: x_BD)
        assert gpu_attention.by_nothing(lm, prompts, start).shape == (3, 64)
        return
    kept = len(prompts.prefix) if way.endswith("prefix") else 0
    packed = gpu_attention.Packed(lm, prompts, start, kept > 0)
    assert packed.x_1MD.shape == (1, 3 * (tokens - kept), 64) and packed.x_1MD.device == device


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_flash_which_takes_no_mask_is_given_none(backend, monkeypatch):
    device, masks = torch.device("cpu"), []
    lm = on_a_card(random_lm("tiny", gpu_tiny.llama_config(), device, torch.float32))
    prompts = random_prompts(lm, 2, 130)
    prompts.tails[1] = prompts.tails[1][9:]
    start = read_prefix(lm, prompts.prefix, random_soft_prompt(lm, K, 0))
    attend = torch.nn.functional.scaled_dot_product_attention

    def told(*args, attn_mask=None, is_causal=False, **more):
        masks.append((attn_mask is None, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", told)
    monkeypatch.setitem(gpu_variants.KINDS, backend, SDPBackend.MATH)
    gpu_variants.by_backend(backend)(lm, prompts, start)
    assert set(masks) == {(True, True) if backend == "flash" else (False, False)}
    assert "variant.flan-t5-xl.sdpa_flash.ms_per_request" not in NAMES


# the makers' numbers: MB of the second-level cache, GB of memory
@pytest.mark.parametrize("cache, memory", [(6, 24), (72, 24), (40, 40), (50, 80), (60, 141)])
@pytest.mark.parametrize("label", GATHERS)
def test_the_gathers_go_past_the_cards_cache_and_fit_its_memory(gpu_kernels, label, cache, memory):
    B, C, T, D, V = GATHERS[label]
    read = B * C * (0.75 * T)  # titles of T/2 to T tokens
    held = int(V * (1 - math.exp(-read / V)) * D * 2)  # of the different ones
    n = gpu_kernels.draws_needed(held, V * D * 2, cache * 10**6, memory * 10**9)
    assert n * held >= 4 * cache * 10**6
    assert n * V * D * 2 <= memory * 10**9 / 4 and n <= 64


def test_each_gather_has_tokens_and_a_head_of_its_own(gpu_kernels, monkeypatch):
    first = Candidates.draw(torch.device("cpu"), torch.bfloat16, (2, 3, 4), 16, 50)
    monkeypatch.setattr(gpu_kernels, "cache_bytes", lambda device: 2 * first.held())
    monkeypatch.setattr(gpu_kernels, "memory_bytes", lambda device: 10**6)
    draws = gpu_kernels.draws_of(first)
    assert len(draws) == 8
    assert len({c.head_VD.data_ptr() for c in draws}) == len({c.tok_BCT.data_ptr() for c in draws})
    assert len({c.head_VD.data_ptr() for c in draws}) == 8


@pytest.mark.parametrize("alike", [True, False])
def test_a_resume_that_differs_is_told_apart_from_runs_that_always_differ(
    alike, tmp_path, monkeypatch, capsys
):
    def run(command, procs=1):
        folder = command[command.index("--out") + 1]
        folder.mkdir(parents=True, exist_ok=True)
        value = 1.0 if "--resume" not in command and (alike or folder.name == "whole") else 2.0
        save_file({"x": torch.tensor([value])}, folder / "model.safetensors")

    def started(typed, **more):
        checkpoint = tmp_path / "killed.unfinished" / "checkpoints" / "1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "meta.json").write_text("{}")
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    run(["--out", tmp_path / "whole"])
    monkeypatch.setattr(gpu_checks, "run", run)
    popen = SimpleNamespace(Popen=started, DEVNULL=None)
    monkeypatch.setattr(gpu_checks, "subprocess", popen)
    rows = Rows(tmp_path / "rows.jsonl", "checks", "card", None)
    gpu_checks.check_resume(rows, ["x.py", "--overwrite"], tmp_path / "whole")
    assert read(rows.path)[0]["value"] == 0
    assert f"never stopped left the same bits: {alike}" in capsys.readouterr().out
