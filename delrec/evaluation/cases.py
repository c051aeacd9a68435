"""The case study: test histories with each run's answer."""

from dataclasses import dataclass

import numpy as np

from delrec.data.prepared import Data, distinct_titles, histories
from delrec.evaluation.paper import stage_1
from delrec.evaluation.scores import Part
from delrec.evaluation.stats import RowMetrics, unseeded
from delrec.runtime import Run

STAGES = ["lm", "finetune", "distill", "train_backbone"]  # in the order of what is to be seen
MOST = 8  # runs side by side
BEST = 5  # answers of each


@dataclass
class Case:
    """One test history and what the runs say of it."""

    history: list  # titles, the oldest first
    truth: str  # the title that came next
    place: dict  # {run: rank of the truth among the candidates}
    answers: dict  # {run: [(title, is it the truth?)]}, the best first


def told_apart(runs: dict[str, Run], reference: str) -> list[str]:
    """The names of the runs that the case study shows side by side: the reference, the plain LM,
    what has a distilled prompt, other LMs, backbones; one seed of each. runs: {row: run}.
    """

    def place(name):
        run = runs[name]
        undistilled = run.stage == "finetune" and not stage_1(run)
        return name != reference, STAGES.index(run.stage), undistilled

    one_seed = {}
    for name in sorted(runs, key=place):
        one_seed.setdefault(unseeded(name), name)
    return list(one_seed.values())[:MOST]


def cases_of(
    data: Data,
    test: Part,
    scores: dict[str, np.ndarray],
    value: RowMetrics,
    n: int = 60,
) -> list[Case]:
    """n cases, drawn once; half of them where the runs disagree on the first place.

    scores: {run: (n, C)} of the runs that are shown; value: {row: metrics per sample}.
    """
    first = np.stack([score_nC.argmax(1) for score_nC in scores.values()])
    differ = np.flatnonzero((first != first[0]).any(0))
    rng = np.random.default_rng(0)
    chosen = rng.permutation(differ)[: n // 2]
    rest = np.setdiff1d(np.arange(len(test.samples)), chosen)
    others = rng.permutation(rest)[: n - len(chosen)]
    titles = distinct_titles(data)
    return [case_of(data, titles, test, int(i), scores, value) for i in [*chosen, *others]]


def case_of(
    data: Data,
    titles: list[str],
    test: Part,
    i: int,
    scores: dict[str, np.ndarray],
    value: RowMetrics,
) -> Case:
    """The i-th test sample as a case. titles: those of all items, all different."""
    old = histories(data, test.samples[i : i + 1], 10)[0]
    truth = int(data.items[test.samples[i]])
    answers = {}
    for name, score_nC in scores.items():
        order = np.argsort(-score_nC[i], kind="stable")[:BEST]
        items = [int(item) for item in test.cand_nC[i][order]]
        answers[name] = [(titles[item], item == truth) for item in items]
    return Case(
        history=[titles[item] for item in old if item],
        truth=titles[truth],
        place={name: float(value[name]["rank"][i]) for name in scores},
        answers=answers,
    )
