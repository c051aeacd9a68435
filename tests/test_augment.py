"""distill.py --augment: RPS on histories that nobody has; --soft: the backbone's softmax."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import metrics_of
from safetensors.torch import save_file
from vector_runs import DISTIL

import distill
from delrec.lm.augment import WAYS, MadeWindow, MadeWindows, before_reads, scores_of_new
from delrec.lm.rps import soft_target

N, KNOWN, SEEN = 120, 30, 12  # items; those of people; those that are shown in training


def steps_from(last: int) -> np.ndarray:
    """How far each item 0..N stands behind the one after `last`: round the circle of 1..KNOWN or
    that of the others, whichever holds it, and then round the other."""
    item = np.arange(N + 1)
    inner = item <= KNOWN
    n, first = (KNOWN, 1) if last <= KNOWN else (N - KNOWN, KNOWN + 1)
    own = inner == (last <= KNOWN)
    return np.where(own, (item - last - 1) % n, n + (item - first) % N)


class Rule:
    """A backbone that names the next number, then the one after it."""

    history = 10

    def scores(self, olds):
        y_BI = torch.tensor(np.stack([-steps_from(int(old[-1])) for old in olds])).float()
        y_BI[:, 0] = -torch.inf
        return y_BI

    def on(self, device):
        return self


@pytest.fixture(scope="module")
def half(make_data, tmp_path_factory):
    """100 users of the items 1..12, and after them 27 of the items 1..30, in any order; what else
    there is was looked at by nobody else."""
    rng, rows = np.random.default_rng(0), [(f"once {i}", i, 0) for i in range(SEEN + 1, N + 1)]
    for user in range(127):
        of, begin = (SEEN, 10) if user < 100 else (KNOWN, 1000)
        items = rng.choice(of, 10, replace=False) + 1
        rows += [(user, i, begin + 10 * t + user % 7) for t, i in enumerate(items)]
    titles = {i: f"Film {i}" for i in range(1, N + 1)}
    return make_data(tmp_path_factory.mktemp("half"), rows, titles, "half")


@pytest.fixture(scope="module")
def ruled(half, make_backbone, tmp_path_factory):
    """The rule's run folder, with vectors without meaning."""

    def score(samples):
        return np.stack([-steps_from(last) for last in half.items[np.asarray(samples) - 1]])

    folder = make_backbone(tmp_path_factory.mktemp("ruled") / "rule", half, score)
    e = torch.randn(N + 1, 32, generator=torch.Generator().manual_seed(0))
    save_file({"item.weight": e, "bias": e[:, 0].clone()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def agreement(half, ruled, decoder, run, fp32, tmp_path_factory):
    """agreement(options) -> how often a distilled LM names the rule's first on validation."""
    home = tmp_path_factory.mktemp("prompts")

    def distilled(options):
        out = home / (options.replace(" ", "") or "plain")
        learn = "--tasks rps --samples 800 --lr 0.02 --lr-maps 0.01 --evals 1 --val-samples 0"
        where = f"--dataset {half.folder} --backbone {ruled} --llm {decoder} --out {out}"
        with fp32(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(distill, "history_scorer", lambda run: Rule())
            run(distill.main, f"{where} {DISTIL} {learn} {options}")
        return metrics_of(out)["agreement"]

    return distilled


def test_made_histories_teach_what_the_few_real_ones_do_not(agreement):
    import time
    for options in ("", "--augment walk", "--augment walk --soft 1", "--augment all", "--augment random"):
        began = time.process_time()
        print(options, agreement(options), time.process_time() - began)
