"""Runs of the three training scripts that are stopped, killed and resumed, and what they leave."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import stages
from click.testing import CliRunner
from safetensors.torch import load_file
from scripts import ROOT

from delrec.runtime import beside
from delrec.training import checkpoints

QUICK = ["--epochs", 3, "--patience", 9, "--width", 16, "--batch", 16, "--history", 8]
QUICK += ["--seed", 4]  # its untrained model stays the best: what a checkpoint says of it matters
WRAPPER = (
    "from delrec.kernels import cpu; cpu.has_fast_bf16 = lambda: False; import {name}; "
    "{name}.main({args!r})"
)
# a script of torchrun's, of which the second process dies after three steps
DYING = """import os, sys
sys.path.insert(0, {root!r})
import train_backbone
from delrec.training import checkpoints
save, again = checkpoints.Saver.save, int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def and_die(self, step, *rest):
    save(self, step, *rest)
    if step == 3 and self.ranks.rank == 1 and again < {times}:
        os.kill(os.getpid(), 9)
checkpoints.Saver.save = and_die
train_backbone.main({args!r})
"""


@pytest.fixture
def jobs(toy, backbone, decoder, chain, on_cpu):
    """{script: (its main, a function of its folder and more options: its arguments)}"""
    import distill
    import finetune
    import train_backbone

    to_prompt, to_delrec = stages(toy, backbone, decoder, chain.prompt, "OUT")
    to_prompt[to_prompt.index("--out") + 1] = "OUT"
    to_backbone = ["--dataset", toy.folder, "--out", "OUT", *QUICK]

    def job(main, args):
        def args_for(out, *more):
            placed = [str(out if a == "OUT" else a) for a in args]
            return [*placed, "--checkpoint-every", "1", *map(str, more)]

        return main, args_for

    return {
        "train_backbone": job(train_backbone.main, to_backbone),
        "distill": job(distill.main, to_prompt),
        "finetune": job(finetune.main, to_delrec),
    }


def run(main, args, code=0) -> str:
    """What a script prints that ends with `code`."""
    result = CliRunner().invoke(main, args)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="session")
def wholes(tmp_path_factory):
    """Where runs that were never stopped are kept for all tests. Nobody may write there."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(jobs, wholes):
    """whole(script) -> the folder of a run that was never stopped."""

    def get(name):
        main, args = jobs[name]
        if not (wholes / name).exists():
            run(main, args(wholes / name))
        return wholes / name

    return get


@pytest.fixture
def start(fork):
    """start(script's name, args): a process that runs it."""
    return lambda name, args: fork(WRAPPER.format(name=name, args=[str(a) for a in args]))


# ---------------------------------------------------------------- what a run leaves


def kept_in(out):
    """Where the checkpoints of a run stand that is not finished."""
    return beside(out, "unfinished") / "checkpoints"


def weights(out) -> tuple[dict, list]:
    """Every tensor a finished run left, and its log without the clock."""
    tensors = {}
    for path in sorted(out.rglob("*.safetensors")):
        tensors |= {f"{path.name}:{k}": t for k, t in load_file(path).items()}
    tensors |= {p.name: torch.as_tensor(np.load(p)) for p in sorted(out.glob("*.npy"))}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if k != "time"} for line in lines]


def same(a, b) -> bool:
    """Whether two runs left the same, bit for bit."""
    (tensors, log), (others, other_log) = weights(a), weights(b)
    assert tensors.keys() == others.keys() and tensors
    return log == other_log and not different(tensors, others)


def different(tensors, others) -> list:
    """The names of tensors that differ; NaN equals NaN."""

    def comparable(t):
        return t.nan_to_num(-7) if t.is_floating_point() else t

    return [k for k, t in tensors.items() if not torch.equal(comparable(t), comparable(others[k]))]


# ---------------------------------------------------------------- stopping


def stopped(jobs, name, out, monkeypatch, after=3) -> list:
    """The checkpoints of a run that was stopped after so many steps."""
    main, args = jobs[name]
    steps = []

    def stop_asked(ranks):
        steps.append(1)
        return len(steps) == after

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stop_asked", stop_asked)
        said = run(main, args(out, "--overwrite"), checkpoints.STOPPED)
    assert "stopped as asked after step" in said
    return checkpoints.complete(kept_in(out))


def stop_and_resume(jobs, name, tmp_path, monkeypatch, after, spoil=None):
    """The folder tmp_path/name of a run that was stopped after `after` steps and resumed;
    spoil(tensors) changes what is read back.
    """
    main, args = jobs[name]
    out = tmp_path / name
    shutil.rmtree(out, ignore_errors=True)  # the run of another call
    assert stopped(jobs, name, out, monkeypatch, after)
    assert not (out / "config.json").exists()
    # a new process knows nothing of the old one
    torch.manual_seed(99)
    load = checkpoints.Saver.load

    def load_spoiled(self):
        found = load(self)
        if found:  # the run of a fold begins anew
            spoil(found[1])
        return found

    with monkeypatch.context() as patch:
        if spoil:
            patch.setattr(checkpoints.Saver, "load", load_spoiled)
        said = run(main, args(out, "--resume"))
    assert "continuing from step" in said and not list(tmp_path.glob(f"{name}.*"))
    assert not (out / "checkpoints").exists() and not (out / "lock").exists()
    return out


def goes_on_to_the_last_bit(main, options, tmp_path, monkeypatch, after):
    """A run of one script that is stopped after `after` steps and resumed is that which nothing
    stopped. options: its command line without --out."""

    def args(out, *more):
        return [*f"{options} --out {out} --checkpoint-every 1".split(), *map(str, more)]

    run(main, args(tmp_path / "whole"))
    cut = stop_and_resume({"on": (main, args)}, "on", tmp_path, monkeypatch, after)
    assert same(tmp_path / "whole", cut)


def dying(args):
    """train_backbone.py by two processes of torchrun, one of which dies after three steps and
    is started again; .said.
    """
    script = Path(args[args.index("--out") + 1]).with_name("dying.py")
    script.write_text(DYING.format(root=str(ROOT), times=1, args=args))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, *meet, str(script)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    done.said = done.stdout + done.stderr
    return done


def killed_at(monkeypatch, module, n, work) -> list:
    """Kills work() right after `module` has written its n-th JSON file; what it had written."""
    write, written = module.write_json, []

    def write_and_die(path, value):
        write(path, value)
        written.append(value)
        if len(written) == n:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            work()
    return written
