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

import torch
from test_bad_input import BAD_INPUTS, clear
from test_checkpoints import jobs, kept_in, start, weights  # noqa: F401 (pytest finds the fixture by its name)

from delrec.kernels.bench import report
from delrec.training import checkpoints

KILLS = int(os.environ.get("KILLS", 50))
LONGER = {
    "train_backbone": ["--epochs", 12],
    "distill": ["--samples", 480],
    "finetune": ["--samples", 480],
}


def test_soak(jobs, tmp_path):  # noqa: F811
    kills = resumes = differ = lost = runs = 0
    rng = random.Random(0)
    for n, name in enumerate(jobs):
        args = jobs[name][1]
        process = start(name, args(tmp_path / f"{name}-whole", *LONGER[name]))
        began = None
        # how long it works, from its first checkpoint on
        while process.poll() is None:
            began = began or (
                time.time() if checkpoints.complete(kept_in(tmp_path / f"{name}-whole")) else None
            )
            time.sleep(0.002)
        assert process.returncode == 0, process.communicate()[0]
        process.communicate()
        works, want = time.time() - (began or time.time()), weights(tmp_path / f"{name}-whole")
        mine = 0
        while mine < KILLS // 3 + (n < KILLS % 3):
            out, runs, first = tmp_path / f"{name}-{runs}", runs + 1, True
            while True:
                process = start(name, args(out, *LONGER[name], *([] if first else ["--resume"])))
                resumes += not first
                first = False
                if mine < KILLS // 3 + (n < KILLS % 3):
                    before = checkpoints.complete(kept_in(out))
                    while process.poll() is None and checkpoints.complete(kept_in(out)) == before:
                        time.sleep(0.002)
                    time.sleep(rng.random() * works / 3)
                    if process.poll() is None:
                        process.send_signal(signal.SIGKILL)
                        process.communicate()
                        mine, kills = mine + 1, kills + 1
                        built = kept_in(out).parent if kept_in(out).parent.exists() else out
                        logged = [
                            json.loads(line)["step"]
                            for line in (built / "log.jsonl").read_text().splitlines()
                            if line.endswith("}")
                        ]
                        kept = checkpoints.complete(kept_in(out))
                        # its log counts epochs; a finished run has no checkpoints
                        if name != "train_backbone" and not (built / "config.json").exists():
                            lost = max(
                                lost, max(logged, default=0) - (kept[-1][0] if kept else 0) - 1
                            )
                        continue
                said = process.communicate()[0]
                assert process.returncode == 0, said
                break
            tensors, log = weights(out)
            differ += sum(
                not torch.equal(
                    t.nan_to_num(-7) if t.is_floating_point() else t,
                    want[0][k].nan_to_num(-7) if t.is_floating_point() else want[0][k],
                )
                for k, t in tensors.items()
            )
            assert log == want[1], f"{name}: the log of a killed run differs"
            print(
                f"{name}: {mine} kills, {resumes} resumes so far, {differ} tensors differ",
                flush=True,
            )
    good = sum(clear(case, tmp_path / f"bad-{i}") for i, case in enumerate(BAD_INPUTS))
    report(
        [
            ("soak.kills", kills, "", None),
            ("soak.resumes", resumes, "", None),
            ("soak.lost_steps_max", max(lost, 0), "steps", 0),
            ("soak.weights_differ", differ, "tensors", 0),
            ("soak.bad_inputs", len(BAD_INPUTS), "", 40),
            ("soak.bad_inputs_clear", good, "", len(BAD_INPUTS)),
        ],
        1,
    )
    assert differ == 0 and lost <= 0 and kills >= KILLS and good == len(BAD_INPUTS)
