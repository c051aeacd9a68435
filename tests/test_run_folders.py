"""A finished run, export or preparation is never destroyed by a command.

Neither by one that is refused, nor stopped, nor killed, nor one that fails at any rename.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from scripts import ROOT
from test_prepare import random_log, write
from toys import popular, write_backbone

import common
import evaluate
import finetune
import train_backbone
from delrec import runtime
from delrec.data import prepare
from delrec.data.prepared import load_data, load_data_of
from delrec.lm import export, layers
from delrec.runtime import beside, load_run, lock, put_in_place, read_json, settle, write_json
from delrec.training import checkpoints
from recipes import demo
from recipes import stage as stages

QUICK = ["--epochs", 2, "--width", 16, "--batch", 16, "--history", 8, "--checkpoint-every", 1]


def contents(folder):
    """{path inside the folder: its bytes}."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def train(toy, script, on_cpu, tmp_path):
    """train(flags..) trains a small backbone into tmp_path/runs/sasrec, a folder of its own."""

    def run(*args, code=0):
        return script(
            train_backbone.main,
            "--dataset",
            toy.folder,
            "--out",
            tmp_path / "runs" / "sasrec",
            *QUICK,
            *args,
            code=code,
        )

    return run


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(call, step): Ctrl-C comes after the checkpoint of that step; 0: before any."""

    def run(call, step):
        save = checkpoints.Saver.save

        def stops(self, at, *rest):
            if step:
                save(self, at, *rest)
            if at >= step:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.Saver, "save", stops)
            with pytest.raises((KeyboardInterrupt, SystemExit, AssertionError)):
                call()

    return run


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
    assert (
        "there is nothing to resume" in train("--resume", "--overwrite").output
        and load_run(out).seed == 1
    )


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
    assert "is an unfinished run (no config.json)" in sentence(load_run, out)
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


def sentence(call, *args, **kwargs):
    with pytest.raises(click.ClickException) as e:
        call(*args, **kwargs)
    assert "\n" not in e.value.message
    return e.value.message


# ------------------------------------------------ every rename


class Killed(BaseException):
    """Nothing in the code catches it: what kill -9 leaves."""


def dying(patch, n):
    """From now on the n-th (from 0) rename or removal of a folder ends the process instead."""
    calls = []

    def counted(real):
        def call(path, *args, **kwargs):
            if Path(path).is_dir():
                calls.append(path)
                if len(calls) == n + 1:
                    raise Killed
            return real(path, *args, **kwargs)

        return call

    patch.setattr(runtime.os, "replace", counted(os.replace))
    patch.setattr(runtime.shutil, "rmtree", counted(shutil.rmtree))
    return calls


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
    settle(folder, mark)
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
        patch.setattr(common, "put_in_place", full)
        says = train("--seed", 1, "--overwrite", code=1).error
    assert "is finished and whole in" in says and "--resume" in says and contents(out) == before
    assert "was killed before it was put in its place" in train("--seed", 1, code=1).error
    assert "is finished" in train("--seed", 1, "--resume").output and load_run(out).seed == 1


# ------------------------------------------------ whose folder it is


def test_a_folder_of_something_else_is_never_emptied(train, script, toy, decoder, on_cpu, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    for more in ([], ["--overwrite"], ["--resume"]):
        assert (
            "holds no run" in train(*more, code=1).error
            and (out / "thesis.txt").read_text() == "years of work"
        )
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
    assert (
        f"holds the run {inner}" in train("--overwrite", code=1).error
        and load_run(inner).stage == "train_backbone"
    )


def test_what_an_earlier_version_left_of_a_killed_run_goes_on(train, interrupted, tmp_path):
    out = tmp_path / "runs" / "sasrec"
    interrupted(train, 3)
    os.replace(beside(out, "unfinished"), out)
    assert f"{out} holds a run that was killed at step 3" in train(code=1).error
    assert "continuing from step 3" in train("--resume").output and names(out.parent) == ["sasrec"]


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


# ------------------------------------------------ the backbone that an LM run lists by

NOTE = "note: the backbone "


@pytest.fixture
def listing(chain, toy, backbone, tmp_path, alone):
    """A fine-tuned run that lists its candidates by a backbone of its own: .run, .backbone."""
    from delrec.lm.listed import backbone_digest

    own = shutil.copytree(backbone, tmp_path / "sasrec")
    run = shutil.copytree(chain.delrec, tmp_path / "delrec")
    config = read_json(run / "config.json")
    settings = config["settings"] | {
        "order": "backbone",
        "show": True,
        "backbone_run": str(own),
        "backbone_digest": backbone_digest(own),
    }
    write_json(
        run / "config.json",
        config
        | {
            "settings": settings,
            "backbone_run": str(own),
            "backbone_digest": backbone_digest(own),
            "calibration": 0,
        },
    )
    return SimpleNamespace(run=run, backbone=own)


def train_again(folder):
    """Another backbone in the same place."""
    for split in ("val", "test"):
        path = folder / f"scores_{split}_15.npy"
        np.save(path, -np.load(path))
    np.save(folder / "topk_train.npy", np.load(folder / "topk_train.npy")[:, ::-1])


def test_an_lm_run_stores_the_backbone_it_lists_by(chain, backbone):
    from delrec.lm.listed import backbone_digest

    for folder in (chain.prompt, chain.delrec):
        run = load_run(folder)
        assert (
            run.backbone_digest == run.settings["backbone_digest"] == backbone_digest(backbone)
            and len(run.backbone_digest) == 16
        )


def test_a_backbone_that_was_trained_again_is_said_in_one_line(listing, script, on_cpu, tmp_path):
    def ask(*args):
        return script(
            evaluate.main,
            "--ckpt",
            listing.run,
            "--limit",
            6,
            "--val-samples",
            6,
            "--out",
            tmp_path / "out",
            *args,
        ).output

    assert NOTE not in ask()
    stored = np.load(listing.run / "scores_test_15.npy")
    train_again(listing.backbone)
    said = ask()
    assert (
        said.count(NOTE) == 1
        and str(listing.run) in said
        and str(listing.backbone) in said
        and "it was trained 20" in said
    )
    assert (
        "lists its candidates in another order than it learned" in said
        and "scores_test_15, scores_val_15 stand as they were made" in said
    )
    np.testing.assert_array_equal(np.load(listing.run / "scores_test_15.npy"), stored)
    said = ask("--limit", 8)  # more samples: never a mix of two orders
    assert (
        said.count(NOTE) == 1
        and "scores_test_15.npy was made with another backbone, so it is made again" in said
    )
    new = np.load(listing.run / "scores_test_15.npy")
    assert np.isfinite(new).all(1).sum() == 8 and not np.array_equal(
        new[np.isfinite(stored)], stored[np.isfinite(stored)]
    )
    history = script(evaluate.main, "--ckpt", listing.run, "--history", "zzz", code=1)
    assert history.output.count(NOTE) == 1
    config = read_json(listing.run / "config.json")
    write_json(
        listing.run / "config.json", {k: v for k, v in config.items() if k != "backbone_digest"}
    )  # of an earlier version
    assert NOTE not in ask("--limit", 8)


def test_finetune_says_that_the_prompt_was_distilled_from_another_backbone(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    prompt, own = (
        shutil.copytree(chain.prompt, tmp_path / "prompt"),
        shutil.copytree(backbone, tmp_path / "sasrec"),
    )
    config = read_json(prompt / "config.json")
    write_json(
        prompt / "config.json",
        config
        | {"backbone_run": str(own), "settings": config["settings"] | {"backbone_run": str(own)}},
    )

    def tune():
        return script(
            finetune.main,
            "--dataset",
            toy.folder,
            "--llm",
            decoder,
            "--soft-prompt",
            prompt,
            "--out",
            tmp_path / "run",
            "--overwrite",
            "--samples",
            80,
            "--val-samples",
            4,
            "--evals",
            1,
            "--verbalizer",
            "mean",
            "--history",
            4,
            "--init-r",
            4,
            "--target-r",
            2,
            "--order",
            "shuffled",
            "--no-calibrate",
        ).output

    assert NOTE not in tune()
    train_again(own)
    said = tune()
    assert (
        said.count(NOTE) == 1
        and str(prompt) in said
        and "what the run learned is of the earlier one" in said
    )


# ------------------------------------------------ preparing again


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """shop(flags..) prepares data/shop under a root of its own; returns click's result."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    raw = write(tmp_path / "raw", random_log(1500))

    def run(*args):
        return CliRunner().invoke(
            prepare.main, ["shop", "--raw", str(raw), "--core", "1", *map(str, args)]
        )

    return run


def test_preparing_again_with_the_same_result_replaces_nothing(shop, tmp_path):
    assert shop().exit_code == 0
    inode = (tmp_path / "data" / "shop" / "items.npy").stat().st_ino
    again = shop()
    assert again.exit_code == 0 and "holds this preparation already" in again.output
    assert (tmp_path / "data" / "shop" / "items.npy").stat().st_ino == inode and names(
        tmp_path / "data"
    ) == ["shop"]
    other = shop("--noun", "product")  # the hash does not hold the words of the prompts
    assert other.exit_code == 1 and "other words" in other.output and "--overwrite" in other.output
    assert (
        shop("--noun", "product", "--overwrite").exit_code == 0
        and load_data("shop").meta["words"]["noun"] == "product"
    )
    assert names(tmp_path / "data") == ["shop"]


def test_a_new_preparation_keeps_the_old_one_while_runs_use_it(shop, script, on_cpu, tmp_path):
    assert shop().exit_code == 0
    old = load_data("shop").meta["hash"]
    script(train_backbone.main, "--dataset", "shop", *QUICK)
    before = contents(tmp_path / "data" / "shop")
    refused = shop("--seed", 1)
    assert (
        refused.exit_code == 1
        and old in refused.output
        and "--overwrite replaces it" in refused.output
        and f"shop@{old}" in refused.output
    )
    assert contents(tmp_path / "data" / "shop") == before and names(tmp_path / "data") == ["shop"]
    done = shop("--seed", 1, "--overwrite")
    assert done.exit_code == 0 and "the earlier one stays" in done.output
    assert (
        names(tmp_path / "data") == ["shop", f"shop@{old}"]
        and contents(tmp_path / "data" / f"shop@{old}") == before
    )
    assert load_data(f"shop@{old}").meta["hash"] == old != load_data("shop").meta["hash"]
    assert load_data_of(load_run("shop/sasrec")).folder == tmp_path / "data" / f"shop@{old}"
    said = script(evaluate.main, "--ckpt", "shop/sasrec").output
    assert f"shop@{old}" in said.split("\n")[0] and "that one is used" in said
    says = script(evaluate.main, "--ckpt", "shop/sasrec", "--dataset", "shop", code=1).error
    assert (
        "another preparation" in says and f"--dataset {tmp_path / 'data' / f'shop@{old}'}" in says
    )
    second = load_data("shop").meta["hash"]  # no run knows the second one: it goes
    assert shop("--seed", 2, "--overwrite").exit_code == 0
    assert names(tmp_path / "data") == ["shop", f"shop@{old}"] and load_data("shop").meta[
        "hash"
    ] not in (old, second)
    assert CliRunner().invoke(prepare.main, [f"shop@{old}", "--check"]).exit_code == 0


def test_a_killed_run_keeps_its_preparation_too(shop, script, on_cpu, interrupted, tmp_path):
    assert shop().exit_code == 0
    old = load_data("shop").meta["hash"]
    interrupted(lambda: script(train_backbone.main, "--dataset", "shop", *QUICK), 3)
    assert (
        shop("--seed", 1, "--overwrite").exit_code == 0
        and (tmp_path / "data" / f"shop@{old}").is_dir()
    )


@pytest.mark.parametrize("n", range(3))
def test_a_preparation_that_dies_at_any_rename_leaves_a_whole_one(
    shop, script, on_cpu, tmp_path, n
):
    assert shop().exit_code == 0
    old = load_data("shop").meta["hash"]
    (tmp_path / "runs").mkdir()
    write_json(tmp_path / "runs" / "config.json", {"data_hash": old})
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, n)
        with contextlib.suppress(Killed):
            shop("--seed", 1, "--overwrite")
    data = load_data("shop")
    assert CliRunner().invoke(prepare.main, ["shop", "--check"]).exit_code == 0
    assert data.meta["hash"] == old or load_data(f"shop@{old}").meta["hash"] == old


# ------------------------------------------------ exports, and the LM without training


def test_a_complete_export_is_replaced_only_when_asked_and_only_by_a_complete_one(
    chain, script, on_cpu, tmp_path, monkeypatch
):
    run = shutil.copytree(chain.delrec, tmp_path / "delrec")
    config = json.loads((run / "config.json").read_text()) | {"C": 8}
    (run / "config.json").write_text(json.dumps(config))

    def ask(*args, code=0):
        return script(evaluate.main, "--ckpt", run, "--export", "--limit", 6, *args, code=code)

    ask("--export-k", 5)
    before = contents(run / "export")
    assert "is complete" in ask("--export-k", 5).output
    says = ask("--export-k", 4, code=1).error
    assert (
        "whose K was 5, now it is 4" in says
        and "--overwrite" in says
        and contents(run / "export") == before
    )
    with monkeypatch.context() as patch:
        patch.setattr(export, "title_vectors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        CliRunner().invoke(
            evaluate.main,
            ["--ckpt", str(run), "--export", "--limit", "6", "--export-k", "4", "--overwrite"],
        )
    assert contents(run / "export") == before and (run / "export.unfinished").is_dir()
    assert "continuing after 6" in ask("--export-k", 4, "--overwrite").output
    assert (
        read_json(run / "export" / "meta.json")["K"] == 4
        and not (run / "export.unfinished").exists()
    )


def test_the_plain_lm_is_used_again_and_another_one_is_refused(
    toy, backbone, decoder, script, on_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    other = shutil.copytree(decoder, tmp_path / "other")

    def ask(llm, *args, code=0):
        return script(
            evaluate.main,
            "--llm",
            llm,
            "--dataset",
            toy.folder,
            "--ckpt",
            backbone,
            "--verbalizer",
            "mean",
            "--prompt-history",
            3,
            "--limit",
            6,
            "--val-samples",
            6,
            "--out",
            tmp_path / "out",
            *args,
            code=code,
        )

    folder = tmp_path / "runs" / "toy" / "lm"
    ask(decoder)
    before = contents(folder)
    said = ask(decoder).output
    assert "was made the same way" in said and "samples/s scored by LMs" not in said
    assert (
        contents(folder).keys() == before.keys()
        and contents(folder)["scores_test_15.npy"] == before["scores_test_15.npy"]
    )
    for more, says in (([], "whose llm was"), (["--val-samples", 5], "whose llm was")):
        assert (
            says in (e := ask(other, *more, code=1).error)
            and "--overwrite" in e
            and "--llm-out" in e
        )
    assert "whose val samples was 6, now it is 5" in ask(decoder, "--val-samples", 5, code=1).error
    assert contents(folder)["config.json"] == before["config.json"] and names(folder.parent) == [
        "lm"
    ]
    ask(other, "--llm-out", "toy/other-lm")
    assert load_run("toy/other-lm").llm == str(other) and load_run("toy/lm").llm == decoder
    ask(other, "--overwrite")
    assert load_run("toy/lm").llm == str(other)


# ------------------------------------------------ demo, circle, recipes


def test_the_demo_replaces_its_own_runs_only_and_says_so(toy, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    mains = {
        "train_backbone.py": train_backbone.main,
        "finetune.py": finetune.main,
        "evaluate.py": evaluate.main,
    }
    seen = []

    class Stage:
        def __init__(self, line, **_):
            seen.append(line[2:])
            self.stdout = ['{"rows": []}\n']
            if line[2] in mains:  # every flag exists
                mains[line[2]].make_context(line[2], list(line[3:]))
                assert "--overwrite" in line

        def wait(self):
            return 0

    monkeypatch.setattr(demo.subprocess, "Popen", Stage)
    said = CliRunner().invoke(demo.main, [], catch_exceptions=False).output
    assert len(seen) == 6 and "is replaced" not in said
    outs = [
        line[line.index(flag) + 1]
        for line in seen
        for flag in ("--out", "--llm-out")
        if flag in line
    ]
    assert outs == [f"ml-100k/demo/{name}" for name in ("sasrec", "prompt", "delrec", "lm")]
    shutil.copytree(backbone, tmp_path / "runs" / "ml-100k" / "demo" / "sasrec")
    said = CliRunner().invoke(demo.main, [], catch_exceptions=False).output
    assert said.count("is replaced once the new one is") == 1 and "demo/sasrec, finished 20" in said


def test_a_stage_that_is_there_says_what_it_was_made_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    runs = tmp_path / "runs"
    base = {"stage": "train_backbone", "dataset": "toy", "data_hash": "0"}
    for name, more in (
        ("sasrec", {"finished": 100.0}),
        (
            "prompt",
            {
                "finished": 200.0,
                "seconds": 50.0,
                "backbone_run": str(runs / "sasrec"),
                "soft_prompt": str(runs / "prompt"),
            },
        ),
    ):
        (runs / name).mkdir(parents=True)
        write_json(runs / name / "config.json", base | more)
    stages.stage(runs / "prompt", "distill.py", "--dataset", "toy")
    assert "is there" in (said := capsys.readouterr().out) and "was made before" not in said
    write_json(runs / "sasrec" / "config.json", base | {"finished": 300.0})
    stages.stage(runs / "prompt", "distill.py", "--dataset", "toy")
    said = capsys.readouterr().out
    assert (
        f"made before {runs / 'sasrec'} (1970-01-01" in said
        and "python distill.py --dataset toy --overwrite" in said
    )


def test_a_killed_stage_goes_on_from_the_folder_it_is_built_in(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(
        stages.subprocess,
        "run",
        lambda line, **_: ran.append(line) or SimpleNamespace(returncode=0),
    )
    stages.stage(tmp_path / "a", "distill.py")
    (tmp_path / "b.unfinished" / "checkpoints").mkdir(parents=True)
    stages.stage(tmp_path / "b", "distill.py")
    assert "--resume" not in ran[0] and ran[1][-1] == "--resume"
