"""distill.py: the soft prompt learns what the backbone does and nothing else can tell."""

import numpy as np
import pytest
import torch
from commands import metrics_of, prompt_of
from distilling import SMALL

import distill
from delrec.lm import prompt_training
from delrec.lm.text import random_soft_prompt

NONE = 1e-20  # a learning rate that moves no fp32 number


def always_choosing(folder, data, make_backbone, first):
    """A backbone whose first choice is always first(n)[i] for sample i of n; what follows is
    arbitrary.
    """

    def score(samples):
        s = np.random.default_rng(0).random((len(samples), data.n_items + 1))
        s[np.arange(len(samples)), first(len(samples))] = 10
        return s

    return make_backbone(folder, data, score)


@pytest.fixture(scope="module")
def learn(toy, decoder, make_backbone, run, fp32, tmp_path_factory):
    """learn(first, lr, more) -> metrics.json and the last P: distil a backbone that always chooses
    first(n), with P of 16 vectors.
    """

    def distil(first, lr, more=""):
        folder = tmp_path_factory.mktemp("learn")
        teacher = always_choosing(folder / "teacher", toy, make_backbone, first)
        where = f"--dataset {toy.folder} --backbone {teacher} --llm {decoder}"
        task = f"--k 16 {SMALL} --verbalizer mean --tasks rps --val-samples 80 --evals 3"
        samples = 560 if lr > NONE else 40
        out = folder / "prompt"
        with fp32():
            run(distill.main, f"{where} --out {out} {task} --samples {samples} --lr {lr} {more}")
        return metrics_of(out), prompt_of(out)

    return distil


@pytest.fixture
def one_of_three(toy):
    """first(n): always one of three titles of a word."""
    kind = [i for i in range(1, toy.n_items + 1) if "Velvet" in toy.titles[i]][:3]
    return lambda n: np.random.default_rng(1).choice(kind, n)


@pytest.mark.parametrize("over", ["candidates", "catalogue"])
def test_the_soft_prompt_learns_what_only_the_backbone_knows(over, learn, one_of_three):
    # nothing in the prompt says what it chooses, the LM is frozen: only P can carry it
    result, _ = learn(one_of_three, 0.1, f"--loss {over}")
    before, after = result["before"], result["after"]
    # chance .1, and the other two are often among the options
    assert before["rps"] < 0.2
    assert after["rps"] > 0.45
    assert after["rps_loss"] < before["rps_loss"] - 1
    # it was not asked to learn the other task
    assert abs(after["ta"] - before["ta"]) < 0.15


def test_without_learning_rate_nothing_is_learnt(learn, one_of_three, load):
    result, P = learn(one_of_three, NONE)
    assert result["after"] == result["before"]
    assert torch.equal(P, random_soft_prompt(load("decoder"), 16, 0))


def test_without_a_pattern_nothing_is_learnt(learn, toy):
    result, _ = learn(lambda n: np.random.default_rng(1).integers(1, toy.n_items + 1, n), 0.1)
    assert result["after"]["rps"] < 0.25


def test_every_sample_is_taught_its_own_list(
    toy, backbone, to_distil, run, on_cpu, tmp_path, monkeypatch
):
    tasks_of, seen = distill.tasks_of, []
    lists = {s: np.load(backbone / f"topk_{s}.npy")[:, :3] for s in ("train", "val")}

    def checked(r, samples, ranked, *args):
        split = "train" if samples[0] in toy.train else "val"
        rows = np.searchsorted(getattr(toy, split), samples)
        assert np.array_equal(ranked, lists[split][rows])
        seen.append((split, len(samples)))
        return tasks_of(r, samples, ranked, *args)

    monkeypatch.setattr(distill, "tasks_of", checked)
    monkeypatch.setattr(prompt_training, "tasks_of", checked)
    few = "--k 2 --tasks both --samples 16 --lr 0.01 --val-samples 12 --evals 1"
    run(distill.main, f"{to_distil} --out {tmp_path}/p {few}")
    assert seen == [("val", 12), ("train", 8), ("train", 8)]
