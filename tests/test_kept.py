"""finetune.py --keep-rps: stage 1's loss on the backbone's lists beside stage 2's."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import stopped_runs
import torch
import torch.nn.functional as F
from commands import edit_config, log_of
from stopped_runs import same, stop_and_resume
from vector_runs import TUNE

import finetune
from delrec.data.prepared import users
from delrec.lm import kept
from delrec.lm.ranker import open_run, score_samples
from delrec.lm.windows import WindowPrompt
from delrec.metrics import agreement
from delrec.runtime import load_run

CPU = torch.device("cpu")
LONG = "--samples 240 --evals 1"  # 30 steps


@pytest.fixture(scope="module")
def unseen(next_number, tmp_path_factory):
    """The rule's run folder, as one that answered out of fold."""
    folder = tmp_path_factory.mktemp("unseen") / "rule"
    return edit_config(shutil.copytree(next_number, folder), folds=3)


@pytest.fixture(scope="module")
def command(toy, unseen, decoder):
    """finetune.py's options on item vectors, without --out."""
    return f"--dataset {toy.folder} --llm {decoder} --backbone {unseen} {TUNE}"


@pytest.fixture(scope="module")
def prompt(distilled, unseen, tmp_path_factory):
    """The run of a prompt that has learnt the rule's lists."""
    folder = shutil.copytree(distilled, tmp_path_factory.mktemp("prompt") / "prompt")
    settings = load_run(folder).settings | {"backbone_run": str(unseen)}
    return edit_config(folder, backbone_run=str(unseen), settings=settings)


@pytest.fixture(scope="module")
def tune(command, prompt, run, fp32, tmp_path_factory):
    """tune(options) -> the run of finetune.py that begins as the distilled LM, made once."""
    home, made = tmp_path_factory.mktemp("tuned"), {}

    def get(options):
        if options not in made:
            made[options] = home / f"run{len(made)}"
            with fp32():
                where = f"{command} --soft-prompt {prompt} --out {made[options]}"
                run(finetune.main, f"{where} {LONG} {options}")
        return made[options]

    return get


@pytest.fixture
def near(toy, unseen, alone, on_cpu):
    """near(run) -> how often it names the backbone's first among 15."""
    stored_nC = np.load(unseen / "scores_val_15.npy")

    def of(folder):
        r, _ = open_run(load_run(folder, toy), toy, CPU)
        s=score_samples(r, "val", np.arange(len(toy.val)), 15, alone)
        print(s[:3].round(2), stored_nC[:3], (s.argmax(1)==stored_nC.argmax(1)).sum(), s.argmax(1)[:30], stored_nC.argmax(1)[:30])
        return agreement(score_samples(r, "val", np.arange(len(toy.val)), 15, alone), stored_nC)

    return lambda folder: float(of(folder).mean())


def test_x(tune, near, distilled):
    import time
    print("stage1", near(distilled))
    for o in ("",):
        b = time.process_time()
        f = tune(o)
        print(o, near(f), time.process_time()-b, [round(l["loss"],3) for l in log_of(f)][::3], [round(l.get("rps",0),3) for l in log_of(f)][::3], [l.get("val_full_ndcg@10") for l in log_of(f)if "val_hr@1" in l])
