"""What stage 1 asks the LM (DELRec, arXiv 2406.11156, section IV-B): Temporal Analysis (TA) and
Recommendation Pattern Simulating (RPS), as prompts with candidates.
"""

from typing import NamedTuple

import numpy as np

from delrec.data.prepared import histories
from delrec.lm.ranker import Ranker


class Question(NamedTuple):
    """A prompt of one task: which of the candidates is it?"""

    tail: np.ndarray  # tokens behind the prefix
    cand: np.ndarray  # candidates (C,)
    label: int  # the place of the right one among them


def ta_sample(r: Ranker, window: np.ndarray, a: int, C: int, rng: np.random.Generator) -> Question:
    """A question of Temporal Analysis: which item is i_{n-1}? window: i_1..i_n, n >= a + 2."""
    label = window[-2]
    cand = draw(r, C - 1, {label}, rng)
    cand = rng.permutation(np.append(cand, label))
    tail, _ = r.prompts.temporal_analysis(window, a, cand)
    return Question(tail, cand, int((cand == label).argmax()))


def rps_sample(
    r: Ranker, window: np.ndarray, ranked: np.ndarray, C: int, rng: np.random.Generator
) -> Question:
    """A question of Recommendation Pattern Simulating: which item is r_1? ranked: the backbone's
    r_1..r_h after this window."""
    cand = draw(r, C - 1, set(ranked.tolist()), rng)
    cand = rng.permutation(np.append(cand, ranked[0]))
    tail, _ = r.prompts.pattern(window, ranked, cand)
    return Question(tail, cand, int((cand == ranked[0]).argmax()))


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
    r: Ranker, samples: np.ndarray, ranked: np.ndarray, a: int, C: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """The TA and the RPS questions of samples (indices into data.items), two lists; the same for
    the same seed, whoever computes them.

    The window i_1..i_n ends with the item before the sample's target: TA learns from the history
    alone, RPS from what the backbone answered to it. Windows shorter than a + 2 ask no TA.
    """
    ta, rps = [], []
    for sample, old, top in zip(samples, histories(r.data, samples, r.history), ranked):
        window, rng = old[old > 0], np.random.default_rng([seed, int(sample)])
        if len(window) >= a + 2:
            ta.append(ta_sample(r, window, a, C, rng))
        rps.append(rps_sample(r, window, top, C, rng))
    return ta, rps
