"""How tests run the four scripts (in this process, as several, on the CPU in fp32), and read what
they refuse.
"""

import contextlib
import json
import socket
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def fp32():
    """with fp32(): fp32 on the CPU, whatever the machine has, so that sums can be compared closely,
    and with two processes.
    """
    from delrec.kernels import cpu

    @contextlib.contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(cpu, "has_fast_bf16", lambda: False)
            yield

    return patched


@pytest.fixture
def on_cpu(fp32):
    with fp32():
        yield


@pytest.fixture(scope="session")
def script():
    """script(main, args...) runs a script in this process; returns click's result with .json, the
    object of its last line.
    """

    def run(main, *args, code=0):
        result = CliRunner().invoke(main, [str(a) for a in args])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        last = result.stdout.strip().split("\n")[-1]
        result.json = json.loads(last) if last.startswith("{") else None
        result.error = result.stderr[result.stderr.find("Error: ") :].strip() if code else ""
        # one sentence, no stack trace
        assert not code or (result.error and "\n" not in result.error), result.output
        return result

    return run


TWO = """import json, sys
import torch.distributed as dist
from delrec.kernels import cpu
import distill, evaluate, finetune, train_backbone
cpu.has_fast_bf16 = lambda: False
{before}
for name, args, last in json.loads({jobs!r}):
    script = sys.modules[name]
    if not last:                                         # one process group for all of them
        script.finish = lambda ranks: dist.barrier()
    script.main(args, standalone_mode=False)
"""


@pytest.fixture(scope="session")
def fork():
    """fork(code, env, n): n new processes that run some Python, without starting Python."""
    from forked import Mother

    with Mother(ROOT) as mother:
        yield mother.fork


@pytest.fixture(scope="session")
def two_processes(fork):
    """two_processes([(script's name, args), ...]): one after another by two gloo processes (or n)
    such as torchrun makes, fp32 on the CPU; before: lines of Python that each process runs first.
    Returns what the first prints. torchrun itself is used by other tests."""

    def run(jobs, n=2, before=""):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        told = [
            (name, [str(a) for a in args], job == len(jobs) - 1)
            for job, (name, args) in enumerate(jobs)
        ]
        code = TWO.format(jobs=json.dumps(told), before=before)
        who = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(n)} for r in range(n)]
        processes = [fork(code, meet | w) for w in who]
        said = [p.communicate(timeout=300)[0] for p in processes]
        assert not any(p.returncode for p in processes), "\n".join(said)
        return said[0]

    return run


def sentence(call, *args, **kwargs):
    """The one line with which a call refuses."""
    with pytest.raises(click.ClickException) as e:
        call(*args, **kwargs)
    assert "\n" not in e.value.message
    return e.value.message
