"""Recommenders whose run is a rule, and small runs of every kind to load."""

import threading
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


def answers_of_threads(rec, olds) -> list:
    """The answers after histories of ids, each asked for by a thread of its own."""
    got = [None] * len(olds)

    def ask(n):
        got[n] = rec.recommend(ids=olds[n])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(olds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


# ---------------------------------------------------------------- runs

SMALL = "--k 3 --batch 8 --samples 40 --evals 1 --val-samples 10 --init-r 4 --target-r 2"


@pytest.fixture(scope="session")
def small_lm(toy, sasrec, decoder):
    """finetune.py's options of a small LM on the trained SASRec."""
    return (
        f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} --soft-prompt random {SMALL}"
    )


@pytest.fixture(scope="session")
def tune_small(small_lm, run, fp32, tmp_path_factory):
    """tune_small(name, options): the folder of a finished run of finetune.py."""
    import finetune

    def tune(name, options):
        folder = tmp_path_factory.mktemp(name) / name
        with fp32():
            run(finetune.main, f"{small_lm} {options} --out {folder}")
        return folder

    return tune


@pytest.fixture(scope="session")
def one_pass(tune_small):
    """A run that reads the whole catalogue from one state."""
    return tune_small("mean", "--verbalizer mean --order shuffled")


@pytest.fixture(scope="session")
def by_title(tune_small):
    """A run that reads title by title, calibrated."""
    return tune_small("likelihood", "--order shuffled --calibrate")


@pytest.fixture(scope="session")
def listing(tune_small):
    """A run whose prompts list the candidates."""
    return tune_small("letter", "--verbalizer letter --order backbone")


@pytest.fixture(scope="session")
def hybrid(tune_small):
    """A run that is shown titles beside vectors."""
    return tune_small("hybrid", "--input hybrid")


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
