"""delrec/training/log.py: the log of a run, and the time that is left."""

import json
import time
from types import SimpleNamespace

import pytest

from delrec import files
from delrec.training.log import Log, cut_log


def test_the_log_is_one_object_a_line_and_only_the_main_process_writes(tmp_path, alone, capsys):
    log = Log(tmp_path, 3, "train", alone)
    for step in (1, 2, 3):
        log.step(step, loss=1 / step)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["loss"] == 0.5
    assert lines[0]["name"] == "train"
    assert "train 3/3 | loss 0.3333" in capsys.readouterr().out
    silent = Log(tmp_path / "other", 3, "train", SimpleNamespace(main=False))
    silent.step(3, loss=1.0)
    silent.close()
    assert not (tmp_path / "other").exists() and capsys.readouterr().out == ""


def test_the_time_left_goes_by_the_steps_of_this_process(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    # 90 steps of an earlier process took none of this one's time
    log = Log(None, 100, "x", SimpleNamespace(main=True), done=90)
    now[0] = 20.0
    log.step(91)
    assert capsys.readouterr().out.endswith("| 180 s left\n")
    log.close()


def test_a_log_is_cut_whole_or_not_at_all(tmp_path, alone, monkeypatch):
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"name": name, "step": n}) + "\n" for n in (1, 2, 3) for name in "ab"]
    path.write_text("".join(lines) + '{"name": "a", "st')  # killed while it wrote a line
    before = path.read_text()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            cut_log(tmp_path, "a", 1, alone)
    assert path.read_text() == before
    cut_log(tmp_path, "a", 1, alone)
    assert path.read_text() == "".join(lines[:2] + lines[3::2])
    assert list(tmp_path.iterdir()) == [path]
