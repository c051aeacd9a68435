"""common.py: a run that is started and finished; and what every script's --help shows."""

import importlib
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from run_folders import names
from scripts import sentence

from common import finish_run, held, start_run, unused
from delrec.runtime import load_run


def test_a_run_is_complete_when_its_config_is_there(tmp_path, toy, alone):
    out, cfg = tmp_path / "run", SimpleNamespace(lr=0.1, C=15)
    # the second is built beside the first, which stays whole
    for n in range(2):
        new, record = start_run(out, "finetune", cfg, toy, alone)
        (new / "which").write_text(str(n))
        assert not (new / "config.json").exists()
        if n:
            assert load_run(out).stage == "finetune" and (out / "which").read_text() == "0"
        else:
            assert f"{out} is an unfinished run" in sentence(load_run, out)
        finish_run(out, record)
        assert (out / "which").read_text() == str(n) and names(tmp_path) == ["run"]
    run = load_run(str(out), toy, stages=["finetune"])
    assert run.stage == "finetune" and run.lr == 0.1 and run.C == 15
    assert run.folder == out and run.data_hash == toy.meta["hash"]
    assert run.seconds >= 0
    assert run.peak_gb > 0
    assert run.dataset == "toy"
    assert {"torch", "peft"} <= set(run.versions)


@pytest.mark.parametrize(
    "batch, prompts, world, says",
    [
        (8, 8, 1, "a step holds 8 samples (--batch)"),
        (8, 16, 1, "a step holds 8 samples (--batch), at most 16 prompts of two tasks"),
        (12, 12, 10, "a step holds 12 samples (--batch): at most 2 for each of 10 processes"),
        (20, 20, 10, "a step holds 20 samples (--batch): at most 2 for each of 10 processes"),
        (
            8,
            8,
            10,
            "a step holds 8 samples (--batch): at most 1 for each of 10 processes, none for 2 of "
            "them",
        ),
    ],
)
def test_what_a_step_holds_is_a_sentence(batch, prompts, world, says):
    assert held(batch, prompts, world) == says


@pytest.mark.parametrize("batch, could, world", [(8, 8, 1), (8, 4, 2), (40, 4, 10), (7, 16, 1)])
def test_where_a_step_fills_the_processes_no_other_batch_is_named(batch, could, world):
    cfg = SimpleNamespace(batch=batch, samples=640, lr=0.02)
    assert unused(cfg, could, world) is None


def test_the_batch_that_fills_the_processes_is_named_with_what_it_changes():
    said = unused(SimpleNamespace(batch=8, samples=640, lr=2e-2), 4, 10)
    assert "--batch 40. " in said and "16 steps instead of 80" in said
    assert "--samples 3200" in said and "--lr stays 0.02" in said  # 3200 / 40 = 80


@pytest.mark.parametrize(
    "script",
    [
        "train_backbone",
        "distill",
        "finetune",
        "evaluate",
        "recipes/tables",
        "recipes/circle",
        "recipes/demo",
        "data/prepare",
    ],
)
def test_help_shows_the_examples_and_every_option_says_what_it_does(script):
    module = script.replace("/", ".").replace("data.", "delrec.data.")
    command = importlib.import_module(module).main
    shown = CliRunner().invoke(command, ["--help"], terminal_width=100)
    assert shown.exit_code == 0
    lines = [line.strip() for line in shown.output.splitlines()]
    # examples stand on lines of their own
    examples = [line for line in lines if line.startswith((f"python {script}.py ", "torchrun "))]
    assert len(examples) >= (1 if script == "recipes/demo" else 2)
    options = [p for p in command.params if getattr(p, "param_type_name", "") == "option"]
    assert not [p.name for p in options if not p.help and p.name != "help"]
