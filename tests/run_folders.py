"""Runs that are replaced, interrupted or killed, and what is left in their folders."""

import os
import shutil
from pathlib import Path

import pytest

from delrec import runtime
from delrec.training import checkpoints

QUICK = ["--epochs", 2, "--width", 16, "--batch", 16, "--history", 8, "--checkpoint-every", 1]


def contents(folder):
    """{path inside the folder: its bytes}."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def names(folder):
    """What stands in a folder."""
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def train(toy, script, on_cpu, tmp_path):
    """train(flags..) trains a small backbone into tmp_path/runs/sasrec, a folder of its own."""
    import train_backbone

    where = ["--dataset", toy.folder, "--out", tmp_path / "runs" / "sasrec"]

    def run(*args, code=0):
        return script(train_backbone.main, *where, *QUICK, *args, code=code)

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
