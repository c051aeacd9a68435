"""What torchrun --nproc_per_node=10 makes of a step: ten processes train as one, all have work."""

import json
from types import SimpleNamespace

import pytest
import torch
from chain import stages
from commands import log_of, prompt_of, same_run
from cycle import QUICK

import distill
import finetune
import train_backbone

RECORD = """
import json, os
from delrec.backbone.batches import Batch
from delrec.training import steps
deal, rows = steps.micro_batches, Batch.of
def note(kind, n):
    with open("{folder}/" + os.environ["RANK"], "a") as file:
        print(json.dumps([kind, n]), file=file)
def dealing(n, micro, ranks, even=False, before=0):
    parts = deal(n, micro, ranks, even, before)
    n = sum(own * (part.stop - part.start) for part, own in parts)
    note("second" if before else "first", n)
    return parts
def taking(batch, ranks):
    mine = rows(batch, ranks)
    note("windows", len(mine[0]))
    return mine
steps.micro_batches, Batch.of = dealing, taking
"""


def jobs_of(folder, chain_of, cycle):
    """The three trainings, a few steps each; the names of their folders are said in `folder`."""
    to_prompt, to_delrec = chain_of(folder / "prompt", folder / "delrec")
    few = "--evals 1 --val-samples 8"
    return [
        ("distill", [*to_prompt, *f"--samples 24 {few}".split()]),
        ("finetune", [*to_delrec, *f"--batch 12 --micro 8 --samples 60 {few}".split()]),
        (
            "train_backbone",
            f"--dataset {cycle.folder} --out {folder}/sasrec {QUICK} --epochs 1 --dropout 0 "
            "--batch 96".split(),
        ),
    ]


@pytest.fixture(scope="module")
def ten(toy, backbone, decoder, cycle, script, fp32, two_processes, tmp_path_factory):
    """Three trainings by one process and by ten: .one and .ten, folders of runs; .said of both;
    .dealt, what each of the ten was given, call by call."""
    folder = tmp_path_factory.mktemp("ten")
    for name in ("one", "ten", "dealt"):
        (folder / name).mkdir()

    def chain_of(prompt, delrec):
        to_prompt, _ = stages(toy, backbone, decoder, prompt, "")
        _, to_delrec = stages(toy, backbone, decoder, folder / "one" / "prompt", delrec)
        return to_prompt, to_delrec

    mains = {"distill": distill, "finetune": finetune, "train_backbone": train_backbone}
    with fp32():
        said = [
            script(mains[name].main, *args).output
            for name, args in jobs_of(folder / "one", chain_of, cycle)
        ]
    jobs = jobs_of(folder / "ten", chain_of, cycle)
    by_ten = two_processes(jobs, 10, RECORD.format(folder=folder / "dealt"))
    texts = [(folder / "dealt" / str(rank)).read_text() for rank in range(10)]
    dealt = [[json.loads(line) for line in text.splitlines()] for text in texts]
    said = {"one": "".join(said), "ten": by_ten}
    return SimpleNamespace(one=folder / "one", ten=folder / "ten", said=said, dealt=dealt)


def test_ten_processes_train_as_one(ten):
    prompts = [prompt_of(folder / "prompt") for folder in (ten.ten, ten.one)]
    torch.testing.assert_close(*prompts, rtol=1e-5, atol=1e-5)
    for a, b in zip(log_of(ten.one / "prompt"), log_of(ten.ten / "prompt")):
        losses = [[line[k] for k in ("loss_ta", "loss_rps", "lam_ta")] for line in (a, b)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    same_run(ten.ten / "delrec", ten.one / "delrec")
    one, other = (log_of(folder / "sasrec") for folder in (ten.one, ten.ten))
    assert len(one) == 2 and len(other) == 2
    assert other[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)


def loads_of(ten, kinds) -> list[list[int]]:
    """What each of the ten had in each step (B steps, 10): samples of these kinds of calls."""
    counts = [[n for kind, n in calls if kind in kinds] for calls in ten.dealt]
    return [list(loads) for loads in zip(*counts, strict=True)]


def test_no_process_has_two_prompts_more_than_another(ten):
    firsts, seconds = loads_of(ten, ["first"]), loads_of(ten, ["second"])
    assert len(seconds) == 3 and len(firsts) == 3 + 5  # of stage 1, then of stage 2
    for ta, rps in zip(firsts, seconds):  # stage 1: two tasks a step, eight samples
        loads = [a + b for a, b in zip(ta, rps)]
        assert sum(rps) == 8 and sum(ta) > 2
        assert min(loads) >= 1 and max(loads) <= 2  # nobody is idle, though a task has eight
    for loads in firsts[3:]:
        assert sorted(loads) == [1] * 8 + [2] * 2  # twelve samples
    windows = loads_of(ten, ["windows"])
    assert len(windows) > 3
    assert all(max(loads) - min(loads) <= 1 for loads in windows)
    assert [sum(loads) for loads in windows[:-1]] == [96] * (len(windows) - 1)


def test_the_start_says_what_a_step_holds_and_what_would_fill_the_processes(ten):
    stage_1, stage_2 = (
        "a step holds 8 samples (--batch), at most 16 prompts of two tasks",
        ("a step holds 12 samples (--batch)"),
    )
    backbone = "a step holds 96 windows (--batch)"
    for line in (f"{stage_1}, in passes of at most 4", f"{stage_2}, in passes of at most 8"):
        assert ten.said["one"].count(f"{line}\n") == 1
    assert f"{backbone}\n" in ten.said["one"]
    assert "on every process" not in ten.said["one"]
    share = "at most 2 for each of 10 processes, in passes of at most"
    for line in (f"{stage_1}: {share} 1", f"{stage_2}: {share} 2"):
        assert ten.said["ten"].count(f"{line}\n") == 1
    assert ten.said["ten"].count(f"{backbone}: at most 10 for each of 10 processes\n") == 1
    assert "passes of 4 (--micro) on every process are --batch 40." in ten.said["ten"]
    assert "1 steps instead of 3 (as many with --samples 120); --lr stays 0.05" in ten.said["ten"]
    assert "passes of 8 (--micro) on every process are --batch 80." in ten.said["ten"]
    assert ten.said["ten"].count("on every process") == 2
