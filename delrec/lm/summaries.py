"""What a prompt says of a whole history before its last items: LLM-TRSR (arXiv 2403.13325, section
4), with words in place of sentences.

A history is cut into blocks of 5 items, the oldest first. A block's summary v_n is its 8 heaviest
words, by the sum of their titles' TF-IDF; the history's is

    S_n = .8 S_{n-1} + v_n,

told as its 16 heaviest words. Behind it stand the last 3 items, which are in it too (section 4.3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from delrec.data.counts import seen_in_training
from delrec.data.others import history_of_another
from delrec.data.prepared import Data
from delrec.data.words import Words
from delrec.lm import written
from delrec.lm.ragged import Ragged, ragged
from delrec.runtime import stop

LONGEST = 25  # items of a history that is summarised, where nobody typed --history
SHOWN = 3  # items behind a summary
HEAVIEST = 8  # words of a block
TOLD = 16  # words of a summary
DECAY = 0.8  # of the weights, from a block to the next


@dataclass
class Summaries:
    """What prompts can say of a history, as rows of numbers of texts."""

    texts: list[str]
    of: Callable[[np.ndarray], list[int]]  # the texts of a history that is not empty

    def told(self, old: Ragged) -> Ragged:
        """The texts' numbers of each history; none of an empty one."""
        return ragged([self.of(items) if len(items) else [] for items in old])


def open_summaries(data: Data, settings: dict) -> Summaries | None:
    """The summaries of a run's settings; None where there are none."""
    kind = settings["summary"]
    if kind is None:
        return None
    if kind == "empty":
        return Summaries([], lambda items: [])
    found = Kept(data, settings["summaries"]) if "recurrent" in kind else BlockWords(data)
    if not kind.startswith("permuted"):
        return Summaries(found.texts, found.of)
    others = OtherUsers(data, settings["history"])
    return Summaries(found.texts, lambda items: found.of(others.history(items)))


def defaults(cfg: SimpleNamespace) -> dict:
    """What is set where nobody typed it."""
    return {"history": LONGEST} if cfg.summary else {}


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant: [(is it so?, sentence)]."""
    return [
        (
            cfg.summary and cfg.input == "ids",
            "--summary tells of titles before the last ones, but --input is ids; use --input "
            "titles or hybrid, or leave --summary out",
        ),
        (
            (cfg.summary or "").startswith("permuted") and cfg.without_fold,
            f"--summary {cfg.summary} may tell a sample of the history of a user that "
            "--without-fold leaves out; leave one of them out",
        ),
    ]


class BlockWords:
    """The words of histories' blocks. They weigh what they weigh among the titles that occur in
    training."""

    def __init__(self, data: Data):
        words = Words(["", *(data.titles[i] for i in seen_in_training(data))])
        self.texts = [f" {word}," for word in words.number]
        self.id_IT, self.weight_IT = words.bags(data.titles)

    def of(self, items: np.ndarray) -> list[int]:
        """The numbers of the words that summarise a history, the heaviest first."""
        merged = {}
        for i in range(0, len(items), written.BLOCK):
            merged = {word: DECAY * weight for word, weight in merged.items()}
            add(merged, heaviest(self.weights_of(items[i : i + written.BLOCK]), HEAVIEST))
        return [word for word, _ in heaviest(merged, TOLD)]

    def weights_of(self, items: np.ndarray) -> dict[int, float]:
        """{word: the sum of its TF-IDF} over the titles of a block."""
        row, col = np.nonzero(self.weight_IT[items] > 0)
        ids, weights = (of_IT[items][row, col].tolist() for of_IT in (self.id_IT, self.weight_IT))
        total = {}
        add(total, zip(ids, weights))
        return total


def add(total: dict[int, float], more) -> None:
    """Adds pairs (word, weight) to a sum of weights."""
    for word, weight in more:
        total[word] = total.get(word, 0.0) + weight


def heaviest(weight_of: dict[int, float], n: int) -> list[tuple[int, float]]:
    """The n heaviest words with their weights, the heaviest first, ties by the smaller number."""
    return sorted(weight_of.items(), key=lambda pair: (-pair[1], pair[0]))[:n]


class Kept:
    """The summaries that an LM wrote (written.py), each a text of its own."""

    def __init__(self, data: Data, name: str):
        kept = written.texts_of(data, name)
        self.number = {key: i for i, key in enumerate(sorted(kept))}
        self.texts = [f" {kept[key]}" for key in self.number]

    def of(self, items: np.ndarray) -> list[int]:
        """The number of a history's summary."""
        key = written.keys_of(items)[-1]
        if key not in self.number:
            stop(
                f"nobody wrote a summary of one of the histories ({len(items)} items), only of "
                "those of the log's samples; take a run of finetune.py --summary words"
            )
        return [self.number[key]]


class OtherUsers:
    """A history of another user for each history, of at most L items as a run's own are: the
    control whose summaries say nothing."""

    def __init__(self, data: Data, L: int):
        if not len(data.train):
            stop("a summary of another user needs the log, which a shared run lacks")
        self.data, self.L = data, L

    def history(self, items: np.ndarray) -> np.ndarray:
        """The history before a training sample, always the same one for these items: of one who
        has not all of them, which a user's own would."""
        return history_of_another(self.data, items, self.L)

    def histories(self, old: Ragged) -> Ragged:
        """Those of all histories that are not empty."""
        return ragged([self.history(items) for items in old if len(items)])
