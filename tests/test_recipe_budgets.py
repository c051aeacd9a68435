"""What a recipe asks of its stages: enough samples, the same choices in all rows, its own GPUs."""

import pytest
from recipe_runs import refused_recipe, run_recipe

from recipes import stage, table2


@pytest.fixture
def asked(toy, decoder):
    """asked(recipe, flags..) -> the commands that a dry run prints."""

    def commands(name, *flags):
        args = ["--dataset", toy.folder, "--llm", decoder, "--seeds", 1, "--dry-run", *flags]
        return run_recipe(name, *args).splitlines()

    return commands


def numbers(lines, script, flag):
    """What the commands of a script give to a flag."""
    return [int(x.split(f"{flag} ")[1].split()[0]) for x in lines if f"{script} " in x]


@pytest.mark.parametrize("name", ["table2", "fig8", "table4"])
def test_every_run_has_steps_enough_of_a_large_batch(name, asked):
    lines = asked(name, "--batch", 64, "--budget", 512)
    assert min(numbers(lines, "finetune.py", "--samples")) >= 5 * 64
    assert min(numbers(lines, "distill.py", "--samples")) >= 2 * 64


def test_a_budget_of_too_few_steps_is_refused_before_anything_runs(toy, decoder):
    on = ["--dataset", toy.folder, "--llm", decoder, "--seeds", 1]
    said = refused_recipe("table3", *on, "--batch", 64, "--budget", 319)
    assert "--budget 319 is less than the 5 steps of 64" in said and "320 or more" in said
    # the paper's own steps are larger
    paper = ["--input", "titles", "--paper", "--budget", 80]
    assert "5 steps of 20 that stage 2 needs; ask for 100" in refused_recipe("table3", *on, *paper)
    said = refused_recipe("table3", *on, "--batch", 64, "--budget", 320, "--prompt-budget", 63)
    assert "--prompt-budget 63 is less than a step of 64" in said


@pytest.mark.parametrize("name", ["table3", "table4", "fig8"])
def test_the_papers_choices_are_those_of_every_row(name, asked):
    lines = asked(name, "--input", "titles", "--paper")
    of_lms = [x for x in lines if "finetune.py" in x or "distill.py" in x]
    assert len(of_lms) >= 5 and all("--paper" in x for x in of_lms)


def test_table2_of_an_lm_that_is_no_decoder_has_no_command_that_it_refuses(toy, encoder_decoder):
    args = ["--dataset", toy.folder, "--llm", encoder_decoder, "--seeds", 1, "--dry-run"]
    out = run_recipe("table2", *args, "--input", "titles")
    # verbalizers.stop_unless_lm_can
    assert "--loss letter" not in out and "llamarec" not in out.split("\n", 1)[1]
    assert "llamarec" in table2.OF_DECODERS and "llamarec" in out.split("\n", 1)[0]


def test_jobs_share_the_gpus_that_were_given(monkeypatch):
    monkeypatch.setattr(stage.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a,7")
    shares = [stage.environment(2, 2, job)["CUDA_VISIBLE_DEVICES"] for job in (0, 1)]
    assert shares == ["4,5", "GPU-a,7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    shares = [stage.environment(2, 2, job)["CUDA_VISIBLE_DEVICES"] for job in (0, 1)]
    assert shares == ["0,1", "2,3"]


def test_an_export_that_is_there_is_asked_what_it_was_made_of(tmp_path, monkeypatch):
    """evaluate.py knows: its own LM and those that answered for folds may be newer."""
    ran = []
    monkeypatch.setattr(stage, "exit_code", lambda command, *_: ran.append(command) or 0)
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    (export / "meta.json").write_text("{}")
    stage.stage(export, "evaluate.py", "--ckpt", "run", "--export")
    assert len(ran) == 1 and "--resume" not in ran[0]
