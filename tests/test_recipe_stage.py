"""recipes/stage.py: a finished run is used again, a killed one goes on, seeds run side by side."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipe_runs import refused_recipe, run_recipe, script_mains
from torch.distributed.launcher import api as launcher_api

from delrec import runtime
from delrec.runtime import folder_of, write_json
from recipes import runs, stage

TITLES = ["--input", "titles", "--budget", "80"]


def test_a_finished_run_of_another_budget_is_not_taken_for_this_one(here, toy, decoder):
    args = ["table3", "--dataset", toy.folder, "--llm", decoder, "--seeds", 1, *TITLES]
    folder = here.root / "toy" / "tiny-llama-titles-80" / "no-prompt-s0"
    folder.mkdir(parents=True)
    made = {"stage": "finetune", "input": "titles", "samples": 640, "seed": 0}
    write_json(folder / "config.json", made)
    assert "was made with --samples 640, here it is 80" in refused_recipe(*args)
    other = {"samples": 80, "backbone_run": "/elsewhere/runs/toy/gru4rec-s0"}
    write_json(folder / "config.json", made | other)
    assert "gru4rec-s0, here it is toy/sasrec-s0" in refused_recipe(*args)


def test_a_recipe_reads_where_its_stages_write(here, toy, decoder, tmp_path, monkeypatch):
    """Its stages run in the program's root, whatever stands in the current folder."""
    own, ran = tmp_path / "own", []
    shutil.copytree(toy.folder, own / "data" / "ml-100k")
    monkeypatch.chdir(own)
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr(stage, "run_to_its_end", lambda line, **_: ran.append(line[2:]) or failed)
    args = ["table3", "--llm", decoder, "--seeds", 1, *TITLES]
    assert "stopped with exit code 1" in refused_recipe(*args)
    assert ran == [["data/prepare.py", "ml-100k"]]  # not that of the current folder
    said = run_recipe(*args, "--dataset", "data/ml-100k", "--dry-run")
    assert f"--dataset {own}/data/ml-100k " in said and Path.cwd() == own
    flags = f"--text data/ml-100k --model sasrec --from {tmp_path}/nothing"
    assert stage.whole("flags", flags) == flags.replace("data", f"{own}/data")


def test_a_finished_run_of_another_lm_is_not_taken_for_this_one(tmp_path):
    made = {"llm": "huggingface/tiny", "soft_prompt": "none"}
    for llm, refusal in (("other/tiny", "huggingface/tiny, here it is other/tiny"), ("tiny", "")):
        with pytest.raises(SystemExit, match=f"was made with --llm {refusal}"):
            stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", "--llm", llm])
    stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", "--llm", "huggingface/tiny"])


def test_an_lm_is_the_one_it_was_cut_or_moved_from(tmp_path):
    prompt = tmp_path / "prompt"
    prompt.mkdir()
    made = {"stage": "distill", "dataset": "toy", "data_hash": "0", "llm": "a/tiny"}
    write_json(prompt / "config.json", made)
    cut = {"llm": str(tmp_path / "lm"), "llm_from": "a/tiny", "soft_prompt": "none"}
    moved = {"llm": str(prompt), "soft_prompt": str(prompt)}
    for made in (cut, moved):
        stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", "--llm", "a/tiny"])
        with pytest.raises(SystemExit, match="was made with --llm"):
            stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", "--llm", "b/tiny"])


def test_a_run_by_the_papers_choices_is_not_taken_for_one_without(tmp_path):
    plain = ["finetune.py", "--samples", 80]
    for made, args in ((False, [*plain, "--paper"]), (True, plain)):
        with pytest.raises(SystemExit, match=f"was made with --paper {made}, here it is"):
            stage.stop_if_made_otherwise(tmp_path, {"paper": made}, args)
    stage.stop_if_made_otherwise(tmp_path, {"paper": True}, ["finetune.py", "--paper", "--seed", 0])
    stage.stop_if_made_otherwise(tmp_path, {"samples": 80}, plain)  # a backbone, an earlier run


def test_runs_of_another_batch_stand_beside_those_of_the_default(here, toy, decoder):
    args = ["table3", "--dataset", toy.folder, "--llm", decoder, "--seeds", 1, "--dry-run"]
    args += ["--input", "titles", "--budget", 320]
    assert "--out toy/tiny-llama-titles-320/delrec-s0" in run_recipe(*args)
    said = run_recipe(*args, "--batch", 64)
    assert "--out toy/tiny-llama-titles-320-batch64/delrec-s0" in said
    assert "--out toy/sasrec-s0" in said  # a backbone has a batch of its own


def test_a_backbone_with_folds_serves_where_none_are_asked_for_and_not_the_other_way(tmp_path):
    asked = ["train_backbone.py", "--model", "gru4rec", "--folds"]
    stage.stop_if_made_otherwise(tmp_path, {"model": "gru4rec", "folds": 5}, [*asked, 0])
    with pytest.raises(SystemExit, match="was made with --folds 0, here it is 5"):
        stage.stop_if_made_otherwise(tmp_path, {"model": "gru4rec", "folds": 0}, [*asked, 5])


def test_a_backbone_without_folds_is_trained_again_beside_it_where_they_are_needed(
    here, toy, decoder
):
    args = ["table3", "--dataset", toy.folder, "--llm", decoder, "--seeds", 1, *TITLES]
    assert "folds-s0" not in run_recipe(*args, "--dry-run")
    folder = here.root / "toy" / "sasrec-s0"
    folder.mkdir(parents=True)
    made = {"stage": "train_backbone", "dataset": "toy", "data_hash": "0", "folds": 0}
    write_json(folder / "config.json", made)
    said = run_recipe(*args, "--dry-run")
    assert "--folds 5 --seed 0 --out toy/sasrec-folds-s0" in said
    assert "--backbone toy/sasrec-folds-s0" in said and "--backbone toy/sasrec-s0" not in said
    assert "--ckpt toy/sasrec-s0 " in said  # the same model, by the name that all recipes know
    write_json(folder / "config.json", made | {"folds": 5})
    assert "folds-s0" not in run_recipe(*args, "--dry-run")


def test_the_row_of_a_backbone_is_the_model_that_was_learnt_from(tmp_path):
    own, row = tmp_path / "sasrec-folds-s0", tmp_path / "sasrec-s0"
    for folder in (own, row):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"the same")
    runs.stop_unless_same(own, row)
    (row / "model.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit, match="move the first one away"):
        runs.stop_unless_same(own, row)


def test_two_seeds_run_side_by_side_each_in_its_order(here, toy, decoder, monkeypatch):
    meet, ran, lock = threading.Barrier(2), [], threading.Lock()

    def run(line, env, stdout, **_):
        # the table, by as many processes as stood side by side
        args = line[2:] if line[1] == "-u" else line[4:]
        seed = args[args.index("--seed") + 1] if "--seed" in args else None
        with lock:
            ran.append((args[0], seed, env.get("OMP_NUM_THREADS"), getattr(stdout, "name", None)))
        if args[0] == "train_backbone.py":
            meet.wait(60)  # passes only when both seeds are at it
        if seed is not None:
            folder = folder_of("runs", args[args.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            stdout.write("said\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(stage, "run_to_its_end", run)
    monkeypatch.setattr(stage.os, "cpu_count", lambda: 8)
    # two is what a machine without GPUs gets
    out = run_recipe("table3", "--dataset", toy.folder, "--llm", decoder, "--seeds", 2, *TITLES)
    order = ["train_backbone.py", *["finetune.py"] * 3, "distill.py", "finetune.py"]
    for seed in "01":
        own = [x for x in ran if x[1] == seed]
        assert [x[0] for x in own] == order and {x[2] for x in own} == {"4"}
        printed = own[-1][3]
        assert printed.endswith(f"delrec-s{seed}.out") and Path(printed).read_text() == "said\n"
    assert out.count(" took ") == len(ran) - 1
    assert [x[:2] for x in ran if x[0] == "evaluate.py"] == [("evaluate.py", None)]


def test_a_stage_that_fails_ends_the_recipe(here, toy, decoder, monkeypatch):
    monkeypatch.setattr(stage, "run_to_its_end", lambda line, **_: SimpleNamespace(returncode=75))
    said = refused_recipe("table3", "--dataset", toy.folder, "--llm", decoder)
    assert "stopped with exit code 75" in said


def test_a_stage_that_is_there_says_what_it_was_made_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    runs = tmp_path / "runs"
    base = {"stage": "train_backbone", "dataset": "toy", "data_hash": "0"}
    parts = {"backbone_run": str(runs / "sasrec"), "soft_prompt": str(runs / "prompt")}
    made = {
        "sasrec": {"finished": 100.0},
        "prompt": {"finished": 200.0, "seconds": 50.0, **parts},
    }
    for name, more in made.items():
        (runs / name).mkdir(parents=True)
        write_json(runs / name / "config.json", base | more)
    stage.stage(runs / "prompt", "distill.py", "--dataset", "toy")
    said = capsys.readouterr().out
    assert "is there" in said and "was made before" not in said
    write_json(runs / "sasrec" / "config.json", base | {"finished": 300.0})
    stage.stage(runs / "prompt", "distill.py", "--dataset", "toy")
    said = capsys.readouterr().out
    assert f"made before {runs / 'sasrec'} (1970-01-01" in said
    assert "python distill.py --dataset toy --overwrite" in said


@pytest.mark.parametrize("key, value", [("text", "tfidf+{}"), ("text", "{}+tfidf"), ("kd", ["{}"])])
def test_one_of_several_parts_of_a_stage_that_was_made_again_is_said(
    key, value, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    lm, run = tmp_path / "runs" / "lm", tmp_path / "runs" / "run"
    named = [value[0].format(lm)] if isinstance(value, list) else value.format(lm)
    made = {lm: {"finished": 300.0}, run: {"finished": 200.0, "seconds": 50.0, key: named}}
    for folder, more in made.items():
        folder.mkdir(parents=True)
        base = {"stage": "finetune", "dataset": "toy", "data_hash": "0"}
        write_json(folder / "config.json", base | more)
    stage.stage(run, "finetune.py", "--dataset", "toy")
    assert f"made before {lm} (1970-01-01" in capsys.readouterr().out


def test_a_killed_stage_goes_on_from_the_folder_it_is_built_in(tmp_path, monkeypatch):
    ran = []

    def run(line, **_):
        ran.append(line)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(stage, "run_to_its_end", run)
    stage.stage(tmp_path / "a", "distill.py")
    (tmp_path / "b.unfinished" / "checkpoints").mkdir(parents=True)
    stage.stage(tmp_path / "b", "distill.py")
    assert "--resume" not in ran[0] and ran[1][-1] == "--resume"


SAVES_WHEN_ASKED_TO_STOP = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "began").touch()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to tell the stage")
def test_a_recipe_that_is_killed_leaves_no_training_behind(tmp_path):
    training = [sys.executable, "-c", SAVES_WHEN_ASKED_TO_STOP, str(tmp_path)]
    recipe = multiprocessing.get_context("fork").Process(
        target=stage.exit_code, args=(training, {}, None)
    )
    recipe.start()
    wait_for(tmp_path / "began")
    recipe.kill()
    wait_for(tmp_path / "saved")


SAVES_FOR_A_SECOND = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(number, frame):
    time.sleep(1)
    (folder / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGINT, stop)
(folder / "began").touch()
time.sleep(60)
"""


def test_at_a_ctrl_c_a_recipe_ends_after_the_training_that_saves(tmp_path):
    def recipe_in_a_terminal():
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches both of them
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            stage.exit_code([sys.executable, "-c", SAVES_FOR_A_SECOND, str(tmp_path)], {}, None)
        except KeyboardInterrupt:
            assert (tmp_path / "saved").exists()
            sys.exit(130)

    recipe = multiprocessing.get_context("fork").Process(target=recipe_in_a_terminal)
    recipe.start()
    wait_for(tmp_path / "began")
    os.killpg(recipe.pid, signal.SIGINT)
    recipe.join(30)
    assert recipe.exitcode == 130


def test_torchrun_gives_a_stopped_training_time_to_save(monkeypatch):
    config = launcher_api.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2)
    if not hasattr(config, "shutdown_timeout"):
        pytest.skip("torchrun of torch before 2.12 always waits 30 seconds")
    for seconds in (600, 45):  # what a user has set stays
        monkeypatch.setattr(stage.os, "environ", stage.environment(2, 1, 0))
        config = launcher_api.LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2)
        assert config.shutdown_timeout == seconds
        monkeypatch.setattr(stage.os, "environ", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "45"})


def wait_for(path):
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name} after 30 s"
        time.sleep(0.05)


def test_a_number_is_the_same_however_it_is_written(tmp_path):
    made = {"lr": 0.0005, "dropout": 0.2}
    stage.stop_if_made_otherwise(tmp_path, made, ["train.py", "--lr", "5e-4", "--dropout", ".2"])
    with pytest.raises(SystemExit, match="was made with --lr 0.0005, here it is 5e-3"):
        stage.stop_if_made_otherwise(tmp_path, made, ["train.py", "--lr", "5e-3"])


def test_a_run_of_an_earlier_preparation_is_not_taken_for_one_of_this(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    run = tmp_path / "runs" / "shop" / "trial"
    (tmp_path / "data" / "shop").mkdir(parents=True)
    run.mkdir(parents=True)
    write_json(tmp_path / "data" / "shop" / "meta.json", {"hash": "1"})
    made = {"stage": "train_backbone", "dataset": "shop", "data_hash": "1"}
    write_json(run / "config.json", made)
    stage.stage(run, "train_backbone.py", "--dataset", "shop")
    write_json(tmp_path / "data" / "shop" / "meta.json", {"hash": "2"})
    with pytest.raises(SystemExit, match="another preparation of shop .hash 1, now 2"):
        stage.stage(run, "train_backbone.py", "--dataset", "shop")


def other_than_made(param):
    """(what a config holds of an option, a command line that asks for something else)."""
    key, flag = "backbone_run" if param.name == "backbone" else param.name, param.opts[0]
    if param.secondary_opts:
        return {key: True}, param.secondary_opts
    if param.is_flag:
        return {key: True}, []
    made, asked = (1, 2) if flag in stage.AT_LEAST else ("one", "two")
    return {key: [made] if param.multiple else made}, [flag, asked]


@pytest.mark.parametrize("script", ["train_backbone.py", "distill.py", "finetune.py"])
def test_a_run_of_another_value_of_any_flag_is_not_taken_for_this_one(script, tmp_path):
    """Also of a flag that is added later: it shapes a run, or stands in stage.NOT_SHAPING."""
    flags = {param.opts[0]: param for param in script_mains()[script].params}
    assert len(flags) > 20
    for flag in flags.keys() - {*stage.NOT_SHAPING}:
        made, asked = other_than_made(flags[flag])
        with pytest.raises(SystemExit, match=f"was made with {flag} "):
            stage.stop_if_made_otherwise(tmp_path, made, [script, *asked, "--seed", 0])


def test_what_only_the_machine_needs_may_be_another(tmp_path):
    made = {"micro": 8, "shard": True, "cache_prefix": True, "checkpoint_every": 5, "lists": 200}
    asked = ["--micro", "auto", "--no-cache-prefix", "--checkpoint-every", 0, "--lists", 100]
    stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", *asked])


def test_of_a_flag_that_is_repeated_every_value_counts(tmp_path):
    made = {"kd": ["/elsewhere/runs/toy/sasrec", "/elsewhere/runs/toy/caser"], "candidates": 3}
    kd = ["--kd", "toy/sasrec", "--kd", "toy/caser"]
    stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", *kd])
    with pytest.raises(SystemExit, match="was made with --kd .* here it is toy/sasrec"):
        stage.stop_if_made_otherwise(tmp_path, made, ["finetune.py", *kd[:2]])


def test_a_run_that_went_on_has_the_switches_of_the_first(tmp_path):
    made = {"permute_text": True, "from_run": "/elsewhere/runs/toy/old"}
    stage.stop_if_made_otherwise(tmp_path, made, ["train_backbone.py", "--from", "toy/old"])
