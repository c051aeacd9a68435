"""make soak: kill -9 at random moments, again and again, and see that nothing is lost.

Not part of make test (test_checkpoints.py has a short version).

python -m pytest -q -s tests/soak.py              KILLS=50 kills over the three training scripts on
a tiny LM and the toy data; about ten minutes
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from bad_inputs import BAD_INPUTS, clear
from stopped_runs import different, kept_in, weights

from delrec.kernels.bench import report
from delrec.training import checkpoints

KILLS = int(os.environ.get("KILLS", 50))
LONGER = {
    "train_backbone": ["--epochs", 12],
    "distill": ["--samples", 480],
    "finetune": ["--samples", 480],
}


@dataclass
class Script:
    """A script that is killed."""

    name: str
    args: Callable  # args(out, more options..): its arguments
    start: Callable  # start(name, args): a process of it
    seconds: float = 0.0  # that it works, from its first checkpoint on

    def run(self, out, *more):
        return self.start(self.name, self.args(out, *LONGER[self.name], *more))


@dataclass
class Count:
    """What happened to all scripts."""

    kills: int = 0
    resumes: int = 0
    lost: int = 0  # most steps that a kill cost beyond its last checkpoint
    differ: int = 0  # tensors that differ from those of the run that was never killed


def test_soak(jobs, start, tmp_path):
    count, rng = Count(), random.Random(0)
    for n, name in enumerate(jobs):
        script = Script(name, jobs[name][1], start)
        whole = tmp_path / f"{name}-whole"
        script.seconds = seconds_of(script, whole)
        left, runs = KILLS // 3 + (n < KILLS % 3), 0
        while left > 0:
            out = tmp_path / f"{name}-{runs}"
            left -= kill_and_resume(script, out, left, count, rng)
            runs += 1
            compare(script, out, whole, count)
    good = sum(clear(case, tmp_path / f"bad-{i}") for i, case in enumerate(BAD_INPUTS))
    report(
        [
            ("soak.kills", count.kills, "", None),
            ("soak.resumes", count.resumes, "", None),
            ("soak.lost_steps_max", count.lost, "steps", 0),
            ("soak.weights_differ", count.differ, "tensors", 0),
            ("soak.bad_inputs", len(BAD_INPUTS), "", 40),
            ("soak.bad_inputs_clear", good, "", len(BAD_INPUTS)),
        ],
        1,
    )
    assert count.differ == 0 and count.lost == 0
    assert count.kills >= KILLS and good == len(BAD_INPUTS)


def seconds_of(script, out) -> float:
    """How long a run works that is not killed, from its first checkpoint on."""
    process, began = script.run(out), None
    while process.poll() is None:
        if began is None and checkpoints.complete(kept_in(out)):
            began = time.time()
        time.sleep(0.002)
    ended = time.time()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    return ended - (began or ended)


def kill_and_resume(script, out, most, count, rng) -> int:
    """Runs a script to its end through at most so many kills; how many there were."""
    kills, resume = 0, []
    while True:
        process = script.run(out, *resume)
        count.resumes += len(resume)
        resume = ["--resume"]
        if kills < most and killed(process, out, rng.random() * script.seconds / 3):
            kills += 1
            count.kills += 1
            count.lost = max(count.lost, steps_lost(script, out))
            continue
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said
        return kills


def killed(process, out, pause) -> bool:
    """Kills a process some time after its next checkpoint; False if it has ended before."""
    before = checkpoints.complete(kept_in(out))
    while process.poll() is None and checkpoints.complete(kept_in(out)) == before:
        time.sleep(0.002)
    time.sleep(pause)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return True


def steps_lost(script, out) -> int:
    """Steps that were logged and are in no checkpoint, beyond the one that is being made."""
    built = kept_in(out).parent if kept_in(out).parent.exists() else out
    # the log of train_backbone.py counts epochs; a finished run has no checkpoints
    if script.name == "train_backbone" or (built / "config.json").exists():
        return 0
    lines = (built / "log.jsonl").read_text().splitlines()
    logged = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    kept = checkpoints.complete(kept_in(out))
    return max(max(logged, default=0) - (kept[-1][0] if kept else 0) - 1, 0)


def compare(script, out, whole, count):
    """Counts the tensors of a killed run that differ; its log has to be the same."""
    (tensors, log), (want, want_log) = weights(out), weights(whole)
    count.differ += len(different(tensors, want))
    assert log == want_log, f"{script.name}: the log of a killed run differs"
    print(
        f"{script.name}: {count.kills} kills, {count.resumes} resumes so far, "
        f"{count.differ} tensors differ",
        flush=True,
    )
