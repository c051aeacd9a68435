"""A backbone that is a rule, a log whose training shows few of the items it is asked about, and
LMs that were taught it.
"""

import numpy as np
import pytest
import torch
from commands import edit_config, metrics_of
from safetensors.torch import save_file
from vector_runs import DISTIL

N, KNOWN, SEEN = 120, 16, 10  # items; those of people; those that are shown in training
LEARN = (
    "--tasks rps --samples 1280 --batch 16 --micro 16 --lr 0.02 --lr-maps 0.01 --evals 1 "
    "--val-samples 0 --history 10"
)


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


@pytest.fixture(scope="session")
def half(make_data, tmp_path_factory):
    """100 users of the items 1..10, and after them 27 of the items 1..16, in any order; what else
    there is was looked at by nobody else."""
    rng, rows = np.random.default_rng(0), [(f"once {i}", i, 0) for i in range(SEEN + 1, N + 1)]
    for user in range(127):
        of, begin = (SEEN, 10) if user < 100 else (KNOWN, 1000)
        items = rng.choice(of, 10, replace=False) + 1
        rows += [(user, i, begin + 10 * t + user % 7) for t, i in enumerate(items)]
    titles = {i: f"Film {i}" for i in range(1, N + 1)}
    return make_data(tmp_path_factory.mktemp("half"), rows, titles, "half")


@pytest.fixture(scope="session")
def ruled(half, make_backbone, tmp_path_factory):
    """The rule's run folder, with vectors without meaning."""

    def score(samples):
        return np.stack([-steps_from(last) for last in half.items[np.asarray(samples) - 1]])

    folder = make_backbone(tmp_path_factory.mktemp("ruled") / "rule", half, score)
    e = torch.randn(N + 1, 32, generator=torch.Generator().manual_seed(0))
    save_file({"item.weight": e, "bias": e[:, 0].clone()}, folder / "model.safetensors")
    return edit_config(folder, folds=3)  # it has learnt of nobody


@pytest.fixture(scope="session")
def of_rule(half, ruled, decoder, run, fp32, tmp_path_factory):
    """of_rule(options) -> what metrics.json says of an LM that learnt the rule's lists, and in
    `folder` where its run stands."""
    import distill

    home, found = tmp_path_factory.mktemp("prompts"), {}

    def of(options):
        if options not in found:
            out = home / f"run{len(found)}"
            where = f"--dataset {half.folder} --backbone {ruled} --llm {decoder} --out {out}"
            with fp32(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(distill, "history_scorer", lambda run: Rule())
                run(distill.main, f"{where} {DISTIL} {LEARN} {options}")
            found[options] = metrics_of(out) | {"folder": out}
        return found[options]

    return of
