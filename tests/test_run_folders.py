"""A finished run is never destroyed by a command.

Neither by one that is refused, nor stopped, nor killed, nor one that fails at any rename.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from run_folders import QUICK, Killed, contents, dying, names
from scripts import ROOT, sentence
from stopped_runs import run
from toys import popular, write_backbone

import finetune
import train_backbone
from delrec import runtime
from delrec.lm import layers
from delrec.runtime import (
    beside,
    complete_renames,
    load_run,
    lock,
    put_in_place,
    read_json,
    write_json,
)
from delrec.training import checkpoints, run_folders

# ------------------------------------------------ a finished run


def test_a_finished_run_is_replaced_only_when_asked(train, toy, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    train()
    (out / "scores_test_15_shuffled.npy").write_bytes(b"of the first")
    before = contents(out)
    says = train("--seed", 1, code=1).error
    assert f"{out} holds a finished train_backbone run (20" in says and toy.meta["hash"] in says
    assert "--overwrite replaces it" in says and "--out names another folder" in says
    assert contents(out) == before and names(out.parent) == ["sasrec"]
    said = train("--seed", 1, "--overwrite").output
    assert "stays as it is until this run replaces it" in said and names(out.parent) == ["sasrec"]
    assert load_run(out).seed == 1 and load_run(out).out == str(out)
    assert set(contents(out)) == set(before) - {"scores_test_15_shuffled.npy"}
    assert contents(out)["model.safetensors"] != before["model.safetensors"]
    assert "there is nothing to resume" in train("--resume", "--overwrite").output
    assert load_run(out).seed == 1


def test_a_finished_run_is_not_asked_what_it_learnt_from(train, tmp_path):
    train()
    gone = tmp_path / "gone"  # which alone knew whether it had --dros
    for flags in (f"--text {gone}.npy", f"--teacher {gone}", f"--from {gone} --dros 2"):
        assert "there is nothing to resume" in train("--resume", *flags.split()).output
        assert "gone" in train("--overwrite", *flags.split(), code=1).error
        assert "gone" in train("--resume", *flags.split(), "--out", tmp_path / "new", code=1).error


def test_a_refused_command_leaves_the_finished_run_and_nothing_else(
    toy, backbone, decoder, script, on_cpu, tmp_path, monkeypatch
):
    for names_of in ("QV", "QKV"):  # an LM whose attention has no projections to adapt
        monkeypatch.setattr(layers, names_of, ("nowhere",))
    out = write_backbone(tmp_path / "runs" / "delrec", toy, popular(toy))  # any finished run
    before = contents(out)
    args = [
        "--dataset",
        toy.folder,
        "--backbone",
        backbone,
        "--llm",
        decoder,
        "--out",
        out,
        "--overwrite",
        "--soft-prompt",
        "none",
        "--samples",
        80,
        "--verbalizer",
        "mean",
    ]
    assert "has no attention projections" in script(finetune.main, *args, code=1).error
    assert contents(out) == before and names(out.parent) == ["delrec"]


def test_ctrl_c_leaves_the_finished_run_and_resume_replaces_it(train, interrupted, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    train()
    before = contents(out)
    interrupted(lambda: train("--seed", 1, "--overwrite"), 0)
    assert contents(out) == before and names(out.parent) == ["sasrec"]  # nothing of worth was begun
    interrupted(lambda: train("--seed", 1, "--overwrite"), 3)
    assert contents(out) == before and names(out.parent) == ["sasrec", "sasrec.unfinished"]
    says = train("--seed", 1, code=1).error
    assert "was killed at step 3; --resume continues it, --overwrite begins anew" in says
    assert contents(out) == before
    assert "continuing from step 3" in train("--seed", 1, "--resume").output
    assert load_run(out).seed == 1 and names(out.parent) == ["sasrec"]
    assert not {"checkpoints", "lock", "started.json"} & set(names(out))


def test_a_killed_first_run_is_not_begun_anew_unasked(train, interrupted, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    interrupted(train, 3)
    says = sentence(load_run, out)
    assert "it was stopped; the command that began it, with --resume, finishes it" in says
    assert "was killed at step 3" in train(code=1).error
    assert "continuing" not in train("--overwrite").output and names(out.parent) == ["sasrec"]


def test_kill_9_leaves_the_finished_run(train, toy, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    train()
    before = contents(out)
    args = [
        "--dataset",
        toy.folder,
        "--out",
        out,
        *QUICK,
        "--seed",
        1,
        "--overwrite",
        "--epochs",
        500,
        "--patience",
        500,
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_backbone.py"), *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    until = time.time() + 120
    while (
        not checkpoints.complete(out.with_name("sasrec.unfinished") / "checkpoints")
        and time.time() < until
    ):
        time.sleep(0.01)
    says = train("--overwrite", code=1).error
    assert f"is being written by process {process.pid}" in says and contents(out) == before
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    assert contents(out) == before
    assert "was killed at step" in train(code=1).error
    train("--overwrite", "--seed", 2)
    assert load_run(out).seed == 2 and names(out.parent) == ["sasrec"]


# ------------------------------------------------ torchrun --max-restarts


@pytest.fixture
def attempt(monkeypatch):
    """attempt(n): from now on this is what a job of torchrun's started the n-th time, 0 the first;
    its launcher keeps a store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=store.port, TORCHELASTIC_USE_AGENT_STORE=True)

    def start(n):
        for name, value in job.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(n))

    yield start


def test_a_job_started_again_before_a_checkpoint_still_replaces_the_old_run(
    train, interrupted, attempt, tmp_path
):
    out = tmp_path / "runs" / "sasrec"
    train()
    attempt(0)
    interrupted(lambda: train("--seed", 1, "--overwrite"), 0)
    assert load_run(out).seed == 0 and names(out.parent) == ["sasrec"]
    attempt(1)
    train("--seed", 1, "--overwrite")
    assert load_run(out).seed == 1
    attempt(2)  # another process died after the run had its place: it is not trained once more
    said = train("--seed", 1, "--overwrite").output
    assert "there is nothing to resume" in said and load_run(out).seed == 1


def test_a_job_started_again_goes_on_with_its_own_run_and_with_no_other(
    train, interrupted, attempt, tmp_path
):
    out = tmp_path / "runs" / "sasrec"
    interrupted(train, 3)  # an older run
    attempt(0)
    assert "was killed at step 3" in train(code=1).error
    attempt(1)
    assert "was killed at step 3" in train(code=1).error  # which is not swallowed
    interrupted(lambda: train("--seed", 1, "--overwrite"), 4)
    attempt(2)
    assert "continuing from step 4" in train("--seed", 1, "--overwrite").output
    assert load_run(out).seed == 1


def test_a_job_that_was_asked_to_stop_is_not_gone_on_with_by_torchrun(
    train, toy, attempt, monkeypatch, tmp_path
):
    out = tmp_path / "runs" / "sasrec"
    args = [str(word) for word in ("--dataset", toy.folder, "--out", out, *QUICK)]
    attempt(0)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stop_asked", lambda ranks: True)
        run(train_backbone.main, args, checkpoints.STOPPED)
    before = contents(out.parent)
    for n in (1, 2):
        attempt(n)
        assert "was asked to stop" in run(train_backbone.main, args, checkpoints.STOPPED)
        assert contents(out.parent) == before
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC")]:
        monkeypatch.delenv(name)
    assert "continuing from step 1" in train("--resume").output  # another job


# ------------------------------------------------ what a killed run left


def test_what_was_left_without_a_checkpoint_is_not_read(toy, alone, tmp_path):
    folder, cfg = tmp_path / "runs" / "x", SimpleNamespace(resume=True)
    new = beside(folder, "unfinished")
    left = ["teacher_states.npy", "lm/config.json", "backbone/model.safetensors", "log.jsonl"]
    for kept in (False, True):
        for path in [new / name for name in left]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("of another run")
        if kept:
            (new / "checkpoints" / "step-000003").mkdir(parents=True)
            write_json(new / "checkpoints" / "step-000003" / "meta.json", {})
        run_folders.start_run(folder, "finetune", cfg, toy, alone)
        assert [(new / name).exists() for name in left] == 4 * [kept]
        run_folders.leave(new)
        assert new.exists() == kept


def test_a_damaged_checkpoint_of_another_run_is_refused_too(train, interrupted, tmp_path):
    interrupted(train, 3)
    kept = beside(tmp_path / "runs" / "sasrec", "unfinished") / "checkpoints"
    for path in kept.glob("*/tensors.safetensors"):
        path.write_bytes(b"")
    assert "seed was 0, now it is 1" in train("--seed", 1, "--resume", code=1).error


# ------------------------------------------------ every rename


def built(folder, version, mark):
    new = beside(folder, "unfinished")
    lock(new)
    (new / "checkpoints").mkdir()
    for name in ("a", "b"):
        (new / name).write_text(version)
    write_json(new / mark, {"version": version})


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("n", range(5))
def test_a_process_that_dies_at_any_rename_leaves_one_whole_folder(
    tmp_path, monkeypatch, n, first, kept
):
    folder, mark = tmp_path / "x", "config.json"
    keep = tmp_path / "x@old" if kept else None
    if not first:
        built(folder, "old", mark)
        put_in_place(folder)
    built(folder, "new", mark)
    with monkeypatch.context() as patch:
        calls = dying(patch, n)
        try:
            put_in_place(folder, keep)
            assert len(calls) <= n
        except Killed:
            pass
    runtime.unlock(beside(folder, "unfinished"))  # what the kernel does for a process that died
    complete_renames(folder, mark)
    version = read_json(folder / mark)["version"]
    assert version in ("old", "new") and {(folder / x).read_text() for x in ("a", "b")} == {version}
    assert not beside(folder, "replaced").exists()
    if first:
        assert version == "new"
    if kept and not first and version == "new":
        assert {(keep / x).read_text() for x in ("a", "b")} == {"old"}
    if version == "old":  # the finished one still waits for its place
        assert (beside(folder, "unfinished") / mark).exists()


def test_a_finished_run_that_found_no_place_is_put_there_by_resume(train, tmp_path, monkeypatch):
    out = tmp_path / "runs" / "sasrec"
    train()
    before = contents(out)

    def full(*_):
        raise OSError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(run_folders, "put_in_place", full)
        says = train("--seed", 1, "--overwrite", code=1).error
    assert "is finished and whole in" in says and "--resume" in says and contents(out) == before
    assert "was killed before it was put in its place" in train("--seed", 1, code=1).error
    assert "is finished" in train("--seed", 1, "--resume").output and load_run(out).seed == 1


# ------------------------------------------------ whose folder it is


def test_a_folder_of_something_else_is_never_emptied(train, script, toy, decoder, on_cpu, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    built = beside(out, "unfinished")  # where a run would be built
    for path in (out / "thesis.txt", out / "checkpoints" / "epoch1.pt", built / "thesis.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years of work")
        before = contents(out.parent)
        for more in ([], ["--overwrite"], ["--resume"]):
            assert "holds no run" in train(*more, code=1).error
            assert contents(out.parent) == before
    shutil.rmtree(out)
    assert f"{built} is there and holds no run" in train("--overwrite", code=1).error
    assert names(built) == ["thesis.txt"]
    lm = shutil.copytree(decoder, tmp_path / "lm")  # its config.json is not of a run
    before = contents(lm)
    assert (
        "holds no run"
        in script(
            train_backbone.main, "--dataset", toy.folder, "--out", lm, *QUICK, "--overwrite", code=1
        ).error
    )
    assert contents(lm) == before


def test_a_folder_that_holds_other_runs_is_not_replaced(train, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    train()
    inner = shutil.copytree(out, out / "inner")
    assert f"holds the run {inner}" in train("--overwrite", code=1).error
    assert load_run(inner).stage == "train_backbone"
    # a copy of a backbone that a run answers by is a part of the run, a whole run of that name not
    copy = (out / "inner").rename(out / "backbone")
    assert f"holds the run {copy}" in train("--overwrite", code=1).error
    (copy / "log.jsonl").unlink()
    train("--overwrite")
    assert not copy.exists()


def test_a_second_process_is_refused_while_the_first_lives(train, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    new = beside(out, "unfinished")
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\n"
        "from delrec.runtime import lock\n"
        f"lock(Path({str(new)!r}))\nprint('mine', flush=True)\ntime.sleep(100)"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "mine\n"
    for more in ([], ["--overwrite"], ["--resume"]):
        assert f"is being written by process {first.pid}" in train(*more, code=1).error
    first.kill()
    first.wait()
    first.stdout.close()
    train()
    assert names(out.parent) == ["sasrec"]


def test_without_fcntl_nobody_is_refused(train, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "fcntl", None)
    train()
    train("--overwrite", "--seed", 1)
    assert load_run(tmp_path / "runs" / "sasrec").seed == 1


def test_two_prepared_folders_of_one_name_have_runs_of_their_own(
    toy, script, on_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    for name in ("one", "two"):
        shutil.copytree(toy.folder, tmp_path / "data" / name)
        script(train_backbone.main, "--dataset", name, *QUICK)
    assert names(tmp_path / "runs") == ["one", "two"] and load_run("one/sasrec").dataset == "toy"
    says = script(train_backbone.main, "--dataset", "two", *QUICK, code=1).error
    assert str(tmp_path / "runs" / "two" / "sasrec") in says
