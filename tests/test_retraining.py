"""docs/retraining.md: its commands, week after week."""

import re

import pytest
from click.testing import CliRunner
from logs import random_log, write
from run_folders import QUICK
from scripts import ROOT

import evaluate
import finetune
import train_backbone
from delrec import runtime
from delrec.backbone.models import load
from delrec.data import prepare
from delrec.data.prepared import load_data
from delrec.runtime import load_run

MAINS = {"train_backbone.py": train_backbone.main, "evaluate.py": evaluate.main}
MAINS["finetune.py"] = finetune.main
SMALL_LM = "--soft-prompt random --k 3 --batch 8 --samples 40 --evals 1 --val-samples 10"
SMALL_LM += " --init-r 4 --target-r 2 --order shuffled --verbalizer mean --no-calibrate"


def commands_of(page, heading):
    """The commands of the blocks under a heading, each block a list of lists of words."""
    text = (ROOT / "docs" / page).read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    return [[line.split()[1:] for line in block.splitlines()] for block in blocks]


@pytest.fixture
def do(script, tmp_path):
    """do(words of a command) runs it, with a small model where a first one is trained."""

    def run(name, *words):
        words = [str(tmp_path / "raw") if word == "FOLDER" else word for word in words]
        if name == "data/prepare.py":
            done = CliRunner().invoke(prepare.main, [*words, "--core", "1"])
            assert done.exit_code == 0, done.output
        elif "--export-onnx" not in words:  # needs packages of its own
            first = name == "train_backbone.py" and "--from" not in words
            script(MAINS[name], *words, *(QUICK if first else ()))

    return run


def test_the_weekly_commands_work_week_after_week_and_go_on_from_the_last_run(
    do, on_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    first, weekly, (back,) = commands_of("retraining.md", "The commands of a week")
    for week in range(3):
        write(tmp_path / "raw", random_log(1500 + 300 * week))
        last = load(load_run("my-shop/sasrec").folder).state_dict() if week else None
        for command in weekly if week else first:
            do(*command)
        run = load_run("my-shop/sasrec")
        assert run.data_hash == load_data("my-shop").meta["hash"]
        if week:
            still = load(load_run("my-shop/still").folder).state_dict()
            name = "position.weight"
            assert (still[name] == last[name]).all()
            assert (load(run.folder).state_dict()[name] != last[name]).any()
    do(*back)
    assert (load(load_run("my-shop/sasrec").folder).state_dict()[name] == last[name]).all()


def test_an_lm_goes_on_in_its_place_too(do, on_cpu, fp32, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    first, weekly, _ = commands_of("retraining.md", "The commands of a week")
    (lm_too, *_) = commands_of("retraining.md", "An LM too")
    train = ["finetune.py", "--dataset", "my-shop", "--llm", decoder, *SMALL_LM.split()]
    write(tmp_path / "raw", random_log(600))
    with fp32():
        for command in (*first, train):
            do(*command)
        write(tmp_path / "raw", random_log(700))
        for command in (weekly[0], weekly[2], *lm_too):
            do(*command)
    run = load_run("my-shop/delrec")
    assert run.data_hash == load_data("my-shop").meta["hash"] and run.from_run == str(run.folder)
