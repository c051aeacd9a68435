"""Small runs of finetune.py on titles, and a run opened again."""

import numpy as np
import pytest
import torch

import finetune
from delrec.lm.ranker import open_run, score_samples
from delrec.runtime import load_run

SMALL = (
    "--no-show --order shuffled --history 4 --max-title 32 --max-tokens 1024 --adapt qv "
    "--init-r 4 --target-r 2 --alpha 8 --dropout 0 --orthogonal 0.1 --candidates 15 --batch 8 "
    "--micro 8 --weight-decay 1e-6 --warmup 0.1 --seed 0 --samples 48 --lr 0.01 --val-samples 16 "
    "--evals 1"
)
BY_MEAN = "--loss candidates --verbalizer mean --no-calibrate"


@pytest.fixture(scope="session")
def to_tune(toy, decoder):
    """finetune.py's options that train the tiny decoder for six steps on the toy data."""
    return f"--dataset {toy.folder} --llm {decoder} {SMALL}"


@pytest.fixture(scope="module")
def tune(command, run, fp32, tmp_path_factory):
    """tune(name, options) -> the run of finetune.py, made once. command: a fixture of the test's
    file, from options to a command line without --out."""
    home = tmp_path_factory.mktemp("tuned")

    def get(name, options):
        if not (home / name).exists():
            with fp32():
                run(finetune.main, f"{command(options)} --out {home / name}")
        return home / name

    return get


def stored_scores(folder) -> tuple:
    """(which validation samples a run scored, their scores)."""
    stored = np.load(folder / "scores_val_15.npy")
    asked = np.flatnonzero(np.isfinite(stored).all(1))
    return asked, stored[asked]


def scores_again(folder, data, ranks) -> tuple:
    """(the scores of the stored samples by the run opened anew, its ranker, its penalty)."""
    ranker, penalty = open_run(load_run(folder, data, ["finetune"]), data, torch.device("cpu"))
    asked, _ = stored_scores(folder)
    return score_samples(ranker, "val", asked, 15, ranks), ranker, penalty


def opens_as_stored(folder, data, ranks, rtol, atol):
    """A run opened anew gives the scores it stored."""
    found, _, _ = scores_again(folder, data, ranks)
    np.testing.assert_allclose(found, stored_scores(folder)[1], rtol=rtol, atol=atol)
