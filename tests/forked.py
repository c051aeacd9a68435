"""Processes that need no seconds to start: copies of one that has imported everything.

A process that uses an LM imports torch, transformers and peft for some eight seconds. Tests that
need real processes, to talk to each other or to be killed, ask a Mother for them: she has imported
all that and computed nothing, and forks.

    python tests/forked.py ROOT    is the mother: a JSON object a line on standard input is a child
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

IMPORTS = """
import peft, torch, distill, evaluate, finetune, train_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
torch.set_num_threads(1)
"""


@dataclass
class Child:
    """A forked process, used as subprocess.Popen's."""

    pid: int
    said: Path  # a file of what it prints
    ended: Path  # a file of its exit code, there once it has ended
    returncode: int | None = None

    def poll(self):
        """The exit code (minus the signal's number), or None while it runs."""
        if self.returncode is None and self.ended.exists():
            self.returncode = int(self.ended.read_text())
        return self.returncode

    def send_signal(self, number):
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout):
        """What it printed, once it has ended; killed where that takes too long."""
        until = time.time() + timeout
        while self.poll() is None:
            if time.time() > until:
                self.send_signal(9)
                raise subprocess.TimeoutExpired(f"child {self.pid}", timeout)
            time.sleep(0.01)
        return self.said.read_text(), None


class Mother:
    """with Mother(root) as mother: mother.fork(code, env) is a Child that runs the code."""

    def __init__(self, root):
        self.folder, self.made = Path(tempfile.mkdtemp()), 0
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def fork(self, code, env=()) -> Child:
        """A child that runs `code` as __main__ with more environment variables."""
        self.made += 1
        said, ended = (self.folder / f"{self.made}.{end}" for end in ("said", "ended"))
        job = {"code": code, "env": dict(env), "said": str(said), "ended": str(ended)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return Child(int(self.process.stdout.readline()), said, ended)


def run_child(job):
    """In the child: runs the code and leaves as Python would."""
    os.environ.update(job["env"])
    file = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 0
    try:
        exec(compile(job["code"], "<child>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch(job):
    """In a process between mother and child: tells the child's number, waits, notes how it
    ended.
    """
    child = os.fork()
    if child == 0:
        run_child(job)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    new = Path(job["ended"] + ".new")
    new.write_text(str(os.waitstatus_to_exitcode(status)))
    new.rename(job["ended"])
    os._exit(0)


def main(root):
    sys.path.insert(0, root)
    exec(IMPORTS)
    for line in sys.stdin:
        if os.fork() == 0:
            watch(json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1])
