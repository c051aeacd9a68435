"""checkpoints.py: a stopped run that goes on is bit for bit the run that was never stopped; damage,
full disks, refusals; exploding numbers.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import stages
from click.testing import CliRunner
from safetensors.torch import load_file
from scripts import ROOT

import distill
import finetune
import train_backbone
from delrec.processes import sum_gradients
from delrec.runtime import beside, read_json
from delrec.training import checkpoints
from delrec.training.log import Log

QUICK = ["--epochs", 3, "--patience", 9, "--width", 16, "--batch", 16, "--history", 8]


@pytest.fixture
def jobs(toy, backbone, decoder, chain, on_cpu, tmp_path):
    """{script: (its main, its arguments without --out)}"""
    to_prompt, to_delrec = stages(toy, backbone, decoder, chain.prompt, "OUT")
    to_prompt[to_prompt.index("--out") + 1] = "OUT"
    jobs = {
        "train_backbone": (train_backbone.main, ["--dataset", toy.folder, "--out", "OUT", *QUICK]),
        "distill": (distill.main, to_prompt),
        "finetune": (finetune.main, to_delrec),
    }
    return {
        name: (
            main,
            lambda out, *more, args=args: (
                [str(out if a == "OUT" else a) for a in args]
                + ["--checkpoint-every", "1", *map(str, more)]
            ),
        )
        for name, (main, args) in jobs.items()
    }


def run(main, args, code=0):
    result = CliRunner().invoke(main, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def weights(out):
    """Every tensor a finished run left, and its log without the clock."""
    tensors = {}
    for path in sorted(p for p in out.rglob("*.safetensors")):
        tensors |= {f"{path.name}:{k}": t for k, t in load_file(path).items()}
    tensors |= {p.name: torch.as_tensor(np.load(p)) for p in sorted(out.glob("*.npy"))}
    log = [
        {k: v for k, v in json.loads(line).items() if k != "time"}
        for line in (out / "log.jsonl").read_text().splitlines()
    ]
    return tensors, log


def kept_in(out):
    """Where the checkpoints of a run stand that is not finished."""
    return beside(out, "unfinished") / "checkpoints"


def same(a, b):
    (tensors, log), (others, other_log) = weights(a), weights(b)
    assert tensors.keys() == others.keys() and tensors
    return log == other_log and all(
        torch.equal(
            t.nan_to_num(-7) if t.is_floating_point() else t,
            others[k].nan_to_num(-7) if t.is_floating_point() else others[k],
        )
        for k, t in tensors.items()
    )


def stop_and_resume(jobs, name, tmp_path, monkeypatch, after, spoil=None):
    """A run stopped after `after` steps and resumed in tmp_path/name; spoil(tensors) changes what
    is read back.
    """
    main, args = jobs[name]
    shutil.rmtree(tmp_path / name, ignore_errors=True)  # the run of another call
    with monkeypatch.context() as m:
        calls = []
        m.setattr(checkpoints, "stop_asked", lambda ranks: calls.append(1) or len(calls) == after)
        assert "stopped as asked after step" in run(
            main, args(tmp_path / name), checkpoints.STOPPED
        )
    assert not (tmp_path / name / "config.json").exists() and checkpoints.complete(
        kept_in(tmp_path / name)
    )
    # a new process knows nothing of the old one
    torch.manual_seed(99)
    with monkeypatch.context() as m:
        if spoil:
            load = checkpoints.Saver.load
            m.setattr(
                checkpoints.Saver,
                "load",
                lambda self: (lambda found: (spoil(found[1]), found)[1])(load(self)),
            )
        out = run(main, args(tmp_path / name, "--resume"))
    assert "continuing from step" in out and not list(tmp_path.glob(f"{name}.*"))
    assert (
        not (tmp_path / name / "checkpoints").exists() and not (tmp_path / name / "lock").exists()
    )
    return tmp_path / name


@pytest.fixture
def whole(jobs, tmp_path):
    """whole(script) -> the folder of a run that was never stopped."""

    def get(name):
        main, args = jobs[name]
        run(main, args(tmp_path / f"{name}-whole"))
        return tmp_path / f"{name}-whole"

    return get


@pytest.mark.parametrize(
    "name, steps", [("train_backbone", (3, 10)), ("distill", (1, 3)), ("finetune", (2, 4, 6))]
)
def test_a_stopped_run_that_goes_on_is_the_run_that_was_never_stopped(
    jobs, whole, tmp_path, monkeypatch, name, steps
):
    want = whole(name)
    for n in steps:
        assert same(stop_and_resume(jobs, name, tmp_path, monkeypatch, n), want), n


@pytest.mark.parametrize("name", ["train_backbone", "distill", "finetune"])
def test_a_resumed_run_counts_the_time_before_it_was_stopped(jobs, tmp_path, monkeypatch, name):
    load = checkpoints.Saver.load
    monkeypatch.setattr(
        checkpoints.Saver,
        "load",
        lambda self: (lambda found: (found[0], found[1], found[2] | {"seconds": 1e4}))(load(self)),
    )
    assert (
        read_json(stop_and_resume(jobs, name, tmp_path, monkeypatch, 3) / "config.json")["seconds"]
        > 1e4
    )


def test_the_time_left_goes_by_the_steps_of_this_process(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    # 90 steps of an earlier process took none of this one's time
    log = Log(None, 100, "x", SimpleNamespace(main=True), done=90)
    now[0] = 20.0
    log.step(91)
    assert capsys.readouterr().out.endswith("| 180 s left\n")
    log.close()


def zero(prefix):
    def spoil(tensors):
        keys = [k for k in tensors if k.startswith(prefix)]
        assert keys
        for k in keys:
            tensors[k] = torch.zeros_like(tensors[k])

    return spoil


@pytest.mark.parametrize(
    "name, after, spoil",
    [
        ("train_backbone", 3, zero("opt.")),
        ("train_backbone", 3, zero("best.weights.")),
        ("train_backbone", 3, lambda _: torch.manual_seed(5)),
        ("distill", 2, zero("lion.")),
        ("distill", 2, zero("param.")),
        ("finetune", 2, zero("lion.")),
        ("finetune", 2, zero("adalora.exp_avg_ipt/")),
        ("finetune", 2, zero("adalora.exp_avg_unc/")),
        ("finetune", 2, zero("param.")),
    ],
)
def test_the_test_would_fail_without_one_of_them(
    jobs, whole, tmp_path, monkeypatch, name, after, spoil
):
    try:
        assert not same(
            stop_and_resume(jobs, name, tmp_path, monkeypatch, after, spoil), whole(name)
        )
    except AssertionError as e:
        # without its importances the allocator misses its budget: that too is a difference
        if "AdaLoRA kept rank" not in str(e):
            raise


def stopped(jobs, name, out, monkeypatch, after=3):
    main, args = jobs[name]
    with monkeypatch.context() as m:
        calls = []
        m.setattr(checkpoints, "stop_asked", lambda ranks: calls.append(1) or len(calls) == after)
        run(main, args(out, "--overwrite"), checkpoints.STOPPED)
    return checkpoints.complete(kept_in(out))


def test_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    jobs, whole, tmp_path, monkeypatch
):
    main, args = jobs["distill"]
    want = whole("distill")
    for damage in (
        lambda p: p.write_bytes(p.read_bytes()[:-3]),
        lambda p: p.write_bytes(bytes([p.read_bytes()[0] ^ 1]) + p.read_bytes()[1:]),
        lambda p: p.unlink(),
    ):
        for part in ("tensors.safetensors", "state.json"):
            kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)
            assert [step for step, _ in kept] == [2, 3]
            damage(kept[-1][1] / part)
            said = run(main, args(tmp_path / "run", "--resume"))
            assert (
                "step-000003 is damaged" in said
                and "continuing from step 2" in said
                and same(tmp_path / "run", want)
            )


def test_a_save_that_breaks_off_anywhere_leaves_the_older_checkpoints(
    jobs, whole, tmp_path, monkeypatch
):
    main, args = jobs["distill"]
    want = whole("distill")
    for where in ("save_file", "fsync", "replace", "dumps"):
        kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)

        def broken(*a, **k):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as m:
            target = {
                "save_file": (checkpoints, "save_file"),
                "fsync": (checkpoints.os, "fsync"),
                "replace": (checkpoints.os, "replace"),
                "dumps": (checkpoints.hashlib, "file_digest"),
            }[where]
            write = checkpoints.Saver.write
            m.setattr(
                checkpoints.Saver,
                "write",
                lambda self, *a: (m.setattr(*target, broken), write(self, *a)),
            )
            # from the beginning, so that a save comes at once
            m.setattr(checkpoints.Saver, "load", lambda self: None)
            said = run(main, args(tmp_path / "run", "--resume"), 1)
        assert (
            "could not be written" in said
            and "No space left" in said
            and "that of step 3 is whole" in said
            and said.count("Error") == 1
        ), said
        assert [p for _, p in checkpoints.complete(kept_in(tmp_path / "run"))] == [
            p for _, p in kept
        ], where
        assert "continuing from step 3" in run(main, args(tmp_path / "run", "--resume"))
        # the log of steps 2 and 3 is gone
        assert all(
            torch.equal(t, weights(want)[0][k]) for k, t in weights(tmp_path / "run")[0].items()
        )


@pytest.mark.parametrize(
    "more, says",
    [
        (["--lr", 0.123], "lr was"),
        (["--seed", 5], "seed was"),
        (["--samples", 8], "samples was"),
        (["--h", 2], "h was"),
    ],
)
def test_flags_that_shape_the_answer_cannot_change(jobs, tmp_path, monkeypatch, more, says):
    main, args = jobs["distill"]
    kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)
    said = run(main, args(tmp_path / "run", "--resume", *more), 1)
    assert (
        says in said
        and "cannot resume" in said
        and checkpoints.complete(kept_in(tmp_path / "run")) == kept
    )


def test_another_lm_data_set_or_number_of_processes_cannot_go_on(jobs, tmp_path, monkeypatch):
    kept = stopped(jobs, "distill", tmp_path / "run", monkeypatch)
    meta = json.loads((kept[-1][1] / "meta.json").read_text())
    for key, value in (("data_hash", "0"), ("lm", "0"), ("processes", 2)):
        (kept[-1][1] / "meta.json").write_text(
            json.dumps(meta | {"made_with": meta["made_with"] | {key: value}})
        )
        main, args = jobs["distill"]
        assert f"{key.replace('_', '-')} was {value}, now it is" in run(
            main, args(tmp_path / "run", "--resume"), 1
        )


def test_flags_that_do_not_shape_it_may_change(jobs, whole, tmp_path, monkeypatch):
    main, args = jobs["distill"]
    stopped(jobs, "distill", tmp_path / "run", monkeypatch)
    run(
        main,
        args(
            tmp_path / "run",
            "--resume",
            "--micro",
            2,
            "--gradient-checkpointing",
            "--checkpoint-every",
            3,
        ),
    )
    (tensors, _), (others, _) = weights(tmp_path / "run"), weights(whole("distill"))
    for k, t in tensors.items():
        torch.testing.assert_close(t, others[k], rtol=1e-4, atol=1e-4)


def test_resuming_nothing_begins_and_resuming_a_finished_run_ends(jobs, whole, tmp_path):
    main, args = jobs["distill"]
    assert "no checkpoint" in run(main, args(tmp_path / "new", "--resume")) and same(
        tmp_path / "new", whole("distill")
    )
    before = (tmp_path / "new" / "config.json").read_bytes()
    assert (
        "is finished" in run(main, args(tmp_path / "new", "--resume"))
        and (tmp_path / "new" / "config.json").read_bytes() == before
    )


@pytest.mark.parametrize("name", ["train_backbone", "distill", "finetune"])
def test_numbers_that_explode_stop_before_the_update(jobs, tmp_path, monkeypatch, name):
    main, args = jobs[name]
    kept = stopped(jobs, name, tmp_path / "run", monkeypatch)
    module = sys.modules[main.callback.__module__]
    source = sum_gradients if name == "train_backbone" else module.sum_gradients

    def explode(params, ranks):
        source(params, ranks)
        params[0].grad.view(-1)[3] = torch.nan

    monkeypatch.setattr(module, "sum_gradients", explode)
    said = run(main, args(tmp_path / "run", "--resume"), 1)
    assert (
        "1 of " in said
        and "gradients are not finite" in said
        and "step 4" in said
        and "samples " in said
    ), said
    assert checkpoints.complete(kept_in(tmp_path / "run")) == kept


def test_an_adapter_that_did_not_move_is_an_error(jobs, tmp_path, monkeypatch):
    main, args = jobs["finetune"]
    monkeypatch.setattr(finetune.Lion, "step", lambda self: None)
    monkeypatch.setattr(
        "peft.tuners.adalora.layer.RankAllocator.mask_to_budget",
        lambda self, model, budget: {
            n: [True] * 3 + [False] * 3 for n, p in model.named_parameters() if "lora_E" in n
        },
    )
    said = run(main, args(tmp_path / "run"), 1)
    assert "did not move" in said or "AdaLoRA kept rank" in said
    assert not (tmp_path / "run" / "config.json").exists()


# ---------------------------------------------------------------- real processes

WRAPPER = (
    "from delrec.lm import model; model.has_fast_bf16 = lambda: False; import {name}; "
    "{name}.main({args!r})"
)


@pytest.fixture
def start(fork):
    """start(script's name, args): a process that runs it."""
    return lambda name, args: fork(WRAPPER.format(name=name, args=[str(a) for a in args]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_ended_goes_on(jobs, whole, start, tmp_path, number):
    _, args = jobs["distill"]
    process = start("distill", args(tmp_path / "run"))
    until = time.time() + 300
    while (
        not checkpoints.complete(kept_in(tmp_path / "run"))
        and process.poll() is None
        and time.time() < until
    ):
        time.sleep(0.005)
    process.send_signal(number)
    said, _ = process.communicate(timeout=300)
    ended = process.returncode
    if ended == 0:
        pytest.skip("the run was over before the signal came")
    assert ended == (-9 if number == signal.SIGKILL else checkpoints.STOPPED), said
    process = start("distill", args(tmp_path / "run", "--resume"))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "continuing from step" in said, said
    torch.set_num_threads(1)
    assert same(tmp_path / "run", whole("distill"))


DYING = """import os, sys
sys.path.insert(0, {root!r})
import distill
from delrec.lm import model
from delrec.training import checkpoints
model.has_fast_bf16 = lambda: False
save, again = checkpoints.Saver.save, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def and_die(self, step, *rest):
    save(self, step, *rest)
    if step == 3 and self.ranks.rank == 1 and again < {times}:
        os.kill(os.getpid(), 9)
checkpoints.Saver.save = and_die
distill.main({args!r})
"""


def dying(jobs, tmp_path, restarts):
    """distill.py by two processes of torchrun, one of which dies after three steps; .said."""
    _, args = jobs["distill"]
    (tmp_path / "dying.py").write_text(
        DYING.format(root=str(ROOT), times=1, args=args(tmp_path / "run"))
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            f"--max-restarts={restarts}",
            str(tmp_path / "dying.py"),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    done.said = done.stdout + done.stderr
    return done


def test_a_process_that_dies_is_started_again_and_the_run_goes_on(jobs, whole, tmp_path):
    done = dying(jobs, tmp_path, restarts=1)
    assert done.returncode == 0 and "continuing from step" in done.said, done.said
    (tensors, log), (others, other_log) = weights(tmp_path / "run"), weights(whole("distill"))
    assert [line["step"] for line in log] == [line["step"] for line in other_log]
    for k, t in tensors.items():
        torch.testing.assert_close(t, others[k], rtol=1e-5, atol=1e-5)
