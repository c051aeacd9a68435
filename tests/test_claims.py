"""Two processes at one run folder: the second is refused, by a lock that dies with its owner."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import sentence
from toys import popular, write_backbone

from delrec.evaluation import scores
from delrec.runtime import HELD, adding_to, beside, load_run, unlock, write_json
from delrec.training import claims
from delrec.training.claims import claim
from delrec.training.run_folders import finish_run, leave, start_run


def flags(**more):
    """The flags of a training script that claim reads."""
    return SimpleNamespace(resume=False, overwrite=False, checkpoint_every=0, out=None, **more)


@pytest.fixture
def another():
    """another(call, *args): a process that makes a call and then lives until the test ends, or
    until .end(); its number is .pid."""
    children = []

    def start(call, *args):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                call(*args)
                os.write(writer, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        assert os.read(reader, 1) == b"x", "the other process failed"
        os.close(reader)

        def end():
            if child in children:
                children.remove(child)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

        children.append(child)
        return SimpleNamespace(pid=child, end=end)

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(autouse=True)
def let_go():
    """What this process holds is let go at the end of a test."""
    yield
    for folder in list(HELD):
        unlock(folder)


def test_the_second_is_refused_from_the_door_on_until_the_first_ends(another, alone, tmp_path):
    folder = tmp_path / "runs" / "x"
    first = another(claim, folder, flags(), alone)  # which now loads its LM, for minutes
    for more in ({}, {"overwrite": True}, {"resume": True}):
        cfg = flags()
        vars(cfg).update(more)
        says = sentence(claim, folder, cfg, alone)
        assert f"is being written by process {first.pid}; wait" in says
    assert f"process {first.pid} makes it now" in sentence(load_run, folder)
    first.end()
    claim(folder, flags(), alone)
    assert beside(folder, "unfinished") in HELD and not folder.exists()
    leave(beside(folder, "unfinished"))
    assert list(folder.parent.iterdir()) == []  # a command that then refused leaves nothing


def test_a_run_that_was_finished_meanwhile_is_not_replaced(alone, tmp_path, monkeypatch, toy):
    folder, hold = tmp_path / "runs" / "x", claims.hold

    def late(new):
        write_backbone(folder, toy, popular(toy))  # another process was faster
        hold(new)

    monkeypatch.setattr(claims, "hold", late)
    says = sentence(claim, folder, flags(), alone)
    assert f"{folder} holds a finished train_backbone run" in says and "--overwrite" in says


def test_only_a_script_that_can_resume_is_told_to(alone, tmp_path, toy):
    folder = tmp_path / "runs" / "lm"
    step = beside(folder, "unfinished") / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    write_json(step / "meta.json", {})
    write_json(beside(folder, "unfinished") / "started.json", {})
    says = sentence(claim, folder, flags(), alone)
    assert "--resume continues it, --overwrite begins anew" in says
    plain_lm = SimpleNamespace(resume=False, overwrite=False)  # evaluate.py --llm
    says = sentence(claim, folder, plain_lm, alone)
    assert "--overwrite begins anew" in says and "--resume" not in says
    write_backbone(tmp_path / "runs" / "other", toy, popular(toy))
    says = sentence(claim, tmp_path / "runs" / "other", plain_lm, alone)
    assert "--llm-out names another folder" in says and " --out" not in says


def test_a_run_without_resume_that_found_no_place_is_moved_by_hand(
    alone, tmp_path, toy, monkeypatch
):
    folder = tmp_path / "runs" / "x"
    cfg = SimpleNamespace(resume=False, overwrite=False)
    new, record = start_run(folder, "lm", cfg, toy, alone)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    monkeypatch.setattr("delrec.training.run_folders.write_json", lambda *_: None)
    says = sentence(finish_run, folder, record)
    assert f"mv {new} {folder}" in says and "--resume" not in says


def held(folder):
    """Holds a run's folder while something is added to it, until the process ends."""
    hold = adding_to(Path(folder))
    hold.__enter__()
    HELD["for ever"] = hold


def test_a_run_that_is_scored_by_one_command_is_refused_to_another(another, backbone, toy, alone):
    run = load_run(backbone)
    first = another(held, backbone)
    with pytest.raises(Exception) as refused, scores.alone_at(run, alone):
        raise AssertionError("nobody was refused")
    assert f"another process is adding scores to {backbone}" in refused.value.message
    first.end()
    with scores.alone_at(run, alone), adding_to(backbone):  # which it does itself
        assert backbone in HELD
    assert backbone not in HELD and not (backbone / "lock").exists()


def test_a_table_is_made_though_its_scores_cannot_be_kept(backbone, capsys):
    def add():
        raise OSError(28, "No space left on device", "scores_test_15.npy")

    scores.keep(load_run(backbone), add)
    said = capsys.readouterr().out
    assert f"not kept in {backbone}, for the table alone" in said and "No space left" in said
