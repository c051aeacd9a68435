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
from delrec.lm.model import LM
from delrec.lm.ragged import Ragged, ragged
from delrec.lm.written import Author
from delrec.processes import Ranks
from delrec.runtime import Run, stop

LONGEST = 25  # items of a history that is summarised, where nobody typed --history
SHOWN = 3  # items behind a summary
HEAVIEST = 8  # words of a block
TOLD = 16  # words of a summary
DECAY = 0.8  # of the weights, from a block to the next


@dataclass
class Summaries:
    """What prompts can say of a history, as rows of numbers of texts."""

    texts: list[str]  # more may follow while histories are told
    of: Callable[[list[np.ndarray]], list[list[int]]]  # the texts of histories that are not empty

    def told(self, old: Ragged) -> Ragged:
        """The texts' numbers of each history; none of an empty one."""
        rows, full = [[] for _ in old], np.flatnonzero(old.lengths)
        for i, numbers in zip(full, self.of([old[i] for i in full])):
            rows[i] = numbers
        return ragged(rows)


def open_summaries(data: Data, settings: dict, author: Author | None = None) -> Summaries | None:
    """The summaries of a run's settings; None where there are none. author: who writes those that
    an LM writes."""
    kind = settings["summary"]
    if kind is None:
        return None
    if kind == "empty":
        return Summaries([], lambda olds: [[] for _ in olds])
    found = Written(author) if "recurrent" in kind else BlockWords(data)
    if not kind.startswith("permuted"):
        return Summaries(found.texts, found.of_all)
    others = OtherUsers(data, settings["history"])
    return Summaries(found.texts, lambda olds: found.of_all([others.history(old) for old in olds]))


def author_of(run: Run, lm: LM, data: Data, ranks: Ranks | None) -> Author | None:
    """Who writes the summaries that a finished run tells; None where no LM does. ranks: as of
    open_run."""
    settings = run.settings
    if "recurrent" not in (settings.get("summary") or ""):
        return None
    origin = getattr(run, "llm_from", run.llm)  # a cut or a whole LM was another one before
    together = ranks or Ranks(0, 1, lm.device)
    return Author(lm, data, settings["summaries"], origin, together, says=ranks is not None)


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

    def of_all(self, olds: list[np.ndarray]) -> list[list[int]]:
        """The numbers of the words of histories."""
        return [self.of(items) for items in olds]

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


class Written:
    """The summaries that an LM writes (written.py), each a text of its own."""

    def __init__(self, author: Author):
        self.author, self.texts, self.number = author, [], {}

    def of_all(self, olds: list[np.ndarray]) -> list[list[int]]:
        """The numbers of histories' summaries, those that nobody has written yet written now."""
        self.author.write(olds)
        return [[self.number_of(f" {self.author.of(items)}")] for items in olds]

    def number_of(self, text: str) -> int:
        """The number of a text, which is among the texts from now on."""
        if text not in self.number:
            self.number[text] = len(self.texts)
            self.texts.append(text)
        return self.number[text]


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
