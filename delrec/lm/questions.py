"""What stage 1 asks the LM (DELRec, arXiv 2406.11156, section IV-B): Temporal Analysis (TA) and
Recommendation Pattern Simulating (RPS), as prompts with candidates.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from delrec.data.prepared import histories, users
from delrec.lm.items import in_tables, table_of
from delrec.lm.ragged import Ragged, of_padded, ragged
from delrec.lm.ranker import Ranker, asking

TASKS = ("ta", "rps")


class Question(NamedTuple):
    """A prompt of one task: which of the candidates is it?"""

    tail: np.ndarray  # tokens behind the prefix
    cand: np.ndarray  # candidates (C,)
    label: int  # the place of the right one among them
    sample: int  # whose it is, a place in data.items
    table: int = 0  # of item vectors, by which it is scored (items.Folds)


def ta_options(r: Ranker, window: np.ndarray, C: int, rng: np.random.Generator) -> np.ndarray:
    """The candidates (C,) of Temporal Analysis: the label i_{n-1} and random others. window:
    i_1..i_n."""
    label = window[-2]
    return rng.permutation(np.append(draw(r, C - 1, {label}, rng), label))


def rps_options(
    r: Ranker, ranked: np.ndarray, cfg: SimpleNamespace, rng: np.random.Generator
) -> np.ndarray:
    """The candidates (C,) of Recommendation Pattern Simulating: the label r_1 and random others
    that are not among r_1..r_h; as the authors' release draws them r_1..r_h and C - h others.
    ranked: r_1..r_h; cfg: C, rps_candidates."""
    kept = ranked if cfg.rps_candidates == "release" else ranked[:1]
    others = draw(r, cfg.C - len(kept), set(ranked.tolist()), rng)
    return rng.permutation(np.append(others, kept))


def questions_of(
    tails: Ragged, cand_nC: np.ndarray, label_n: np.ndarray, sample_n: np.ndarray
) -> list[Question]:
    """Prompts of samples with their candidates, of which label_n are right."""
    place_n = (cand_nC == label_n[:, None]).argmax(1)
    return [Question(*each) for each in zip(tails, cand_nC, place_n.tolist(), sample_n.tolist())]


def in_training(r: Ranker, questions: list[Question]) -> list[Question]:
    """The questions of training samples, each with the item vectors of its user's fold: the full
    model's were fitted to the answers."""
    table_n = table_of(r.lm, users(r.data, np.array([q.sample for q in questions], int)))
    tails = in_tables(r.lm, ragged([q.tail for q in questions]), table_n)
    return [
        q._replace(tail=tail, table=int(table)) for q, tail, table in zip(questions, tails, table_n)
    ]


def draw(r: Ranker, n: int, taken: set, rng: np.random.Generator) -> np.ndarray:
    """n items (n,), uniform without repetition, none of them taken."""
    taken, out = set(map(int, taken)), []
    while len(out) < n:
        i = int(rng.integers(1, r.data.n_items + 1))
        if i not in taken:
            taken.add(i)
            out.append(i)
    return np.array(out, np.int64)


def tasks_of(
    r: Ranker,
    samples: np.ndarray,
    ranked: np.ndarray,
    cfg: SimpleNamespace,
    seed: int,
    asked: tuple[str, ...] = TASKS,
) -> tuple[list[Question], list[Question]]:
    """The TA and the RPS questions of samples (indices into data.items), two lists; the same for
    the same seed, whoever computes them. asked: the tasks whose prompts are made, the list of the
    other is empty. cfg: a, C, rps_candidates.

    The window i_1..i_n ends with the item before the sample's target: TA learns from the history
    alone, RPS from what the backbone answered to it. Windows shorter than a + 2 ask no TA.
    """
    windows, cand = of_padded(histories(r.data, samples, r.history)), {"ta": [], "rps": []}
    long_n = windows.lengths >= cfg.a + 2
    for sample, window, top in zip(samples, windows, ranked):
        rng = np.random.default_rng([seed, int(sample)])
        if len(window) >= cfg.a + 2:
            cand["ta"].append(ta_options(r, window, cfg.C, rng))  # drawn first, asked or not
        if "rps" in asked:
            cand["rps"].append(rps_options(r, top, cfg, rng))
    ta, rps = [], []
    if cand["ta"] and "ta" in asked:
        cand_nC, windows_n = np.stack(cand["ta"]), windows.take(np.flatnonzero(long_n))
        tails, _ = asking(r, "ta").prompts.temporal_analyses(windows_n, cfg.a, cand_nC)
        ta = questions_of(tails, cand_nC, windows_n.cut(-2, -1).flat, samples[long_n])
    if cand["rps"]:
        cand_nC = np.stack(cand["rps"])
        tails, _ = asking(r, "rps").prompts.patterns(windows, ranked, cand_nC)
        rps = questions_of(tails, cand_nC, ranked[:, 0], samples)
    return ta, rps
