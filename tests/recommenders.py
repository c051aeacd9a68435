"""Recommenders whose run is a rule, and small runs of every kind to load."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from delrec.serving.answerer import Answerer
from delrec.serving.catalogue import Catalogue
from delrec.serving.recommender import Recommender

RULE = SimpleNamespace(stage="train_backbone", folder=Path("runs/rule"), loss="ce")


def by_number(olds, wanted=None, n_items=40):
    """Scores of a catalogue: the higher an item's number, the better."""
    return np.tile(np.arange(n_items + 1, dtype=np.float32), (len(olds), 1))


def recommender_of(data, scores_after=by_number, run=RULE) -> Recommender:
    """The recommender of a rule, f(histories, what is wanted) -> scores."""
    return Recommender(Answerer(Catalogue(data), lambda: scores_after, run))


# ---------------------------------------------------------------- runs

SMALL = "--k 3 --batch 8 --samples 40 --evals 1 --val-samples 10 --init-r 4 --target-r 2"


@pytest.fixture(scope="session")
def small_lm(toy, sasrec, decoder):
    """finetune.py's options of a small LM on the trained SASRec."""
    return (
        f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} --soft-prompt random {SMALL}"
    )


def tuned(run, fp32, folder, options):
    """A finished run of finetune.py."""
    import finetune

    with fp32():
        run(finetune.main, f"{options} --out {folder}")
    return folder


@pytest.fixture(scope="session")
def one_pass(small_lm, run, fp32, tmp_path_factory):
    """A run that reads the whole catalogue from one state."""
    folder = tmp_path_factory.mktemp("one_pass") / "mean"
    return tuned(run, fp32, folder, f"{small_lm} --verbalizer mean --order shuffled")


@pytest.fixture(scope="session")
def by_title(small_lm, run, fp32, tmp_path_factory):
    """A run that reads title by title, calibrated."""
    folder = tmp_path_factory.mktemp("by_title") / "likelihood"
    return tuned(run, fp32, folder, f"{small_lm} --order shuffled --calibrate")


@pytest.fixture(scope="session")
def listing(small_lm, run, fp32, tmp_path_factory):
    """A run whose prompts list the candidates."""
    folder = tmp_path_factory.mktemp("listing") / "letter"
    return tuned(run, fp32, folder, f"{small_lm} --verbalizer letter --order backbone")


@pytest.fixture(scope="session")
def hybrid(small_lm, run, fp32, tmp_path_factory):
    """A run that is shown titles beside vectors."""
    folder = tmp_path_factory.mktemp("hybrid") / "hybrid"
    return tuned(run, fp32, folder, f"{small_lm} --input hybrid")


@pytest.fixture(scope="session")
def plain_lm(toy, decoder, run, fp32, tmp_path_factory):
    """The run of an LM without any training."""
    import evaluate

    folder = tmp_path_factory.mktemp("plain") / "lm"
    few = "--limit 5 --val-samples 10"
    with fp32():
        run(evaluate.main, f"--llm {decoder} --dataset {toy.folder} --llm-out {folder} {few}")
    return folder


@pytest.fixture(scope="session")
def taught(toy, student, run, fp32, tmp_path_factory):
    """A SASRec that an LM's export taught."""
    import train_backbone

    folder = tmp_path_factory.mktemp("taught") / "sasrec-taught"
    small = "--epochs 1 --width 16 --eta 1"
    with fp32():
        run(
            train_backbone.main,
            f"--dataset {toy.folder} --teacher {student} {small} --out {folder}",
        )
    return folder
