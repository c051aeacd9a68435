"""What stage 1 asks the LM (DELRec, arXiv 2406.11156, section IV-B): Temporal Analysis (TA) and
Recommendation Pattern Simulating (RPS), as prompts with candidates.
"""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from delrec.data.prepared import histories
from delrec.lm.ranker import Ranker, asking

TASKS = ("ta", "rps")


class Question(NamedTuple):
    """A prompt of one task: which of the candidates is it?"""

    tail: np.ndarray  # tokens behind the prefix
    cand: np.ndarray  # candidates (C,)
    label: int  # the place of the right one among them


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


def question(cand_C: np.ndarray, label: int, prompt: tuple[np.ndarray, np.ndarray]) -> Question:
    """A prompt (tokens, at) with its candidates, of which `label` is right."""
    return Question(prompt[0], cand_C, int((cand_C == label).argmax()))


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
    ta, rps = [], []
    prompts = {task: asking(r, task).prompts for task in TASKS}
    for sample, old, top in zip(samples, histories(r.data, samples, r.history), ranked):
        window, rng = old[old > 0], np.random.default_rng([seed, int(sample)])
        if len(window) >= cfg.a + 2:
            cand_C = ta_options(r, window, cfg.C, rng)  # drawn first, asked or not
            if "ta" in asked:
                prompt = prompts["ta"].temporal_analysis(window, cfg.a, cand_C)
                ta.append(question(cand_C, window[-2], prompt))
        if "rps" in asked:
            cand_C = rps_options(r, top, cfg, rng)
            rps.append(question(cand_C, top[0], prompts["rps"].pattern(window, top, cand_C)))
    return ta, rps
