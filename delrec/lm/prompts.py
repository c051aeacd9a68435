"""The prompts as token arrays: prefix + tail.

The prefix (instruction + soft prompt) is the same for all samples of a task, so a decoder-only LM
computes its keys and values once (reading.py). A tail holds what a sample shows and asks. Slots of
the soft prompt, the mask and items' vectors are negative numbers (text.py): no title can spell
them.
"""

import copy

import numpy as np

from delrec.data.prepared import Data
from delrec.lm.model import LM
from delrec.lm.text import ITEM, MASK, SLOT, encode, must_have_vectors
from delrec.lm.titles import Titles
from delrec.runtime import stop

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# w MCP (DELRec, Table III): what a backbone does, in words where the soft prompt would stand. Ours,
# as the paper does not print its own.
PATTERN = {
    "SASRec": "{b} weighs all {n}s of the history by how much they say about the last one: {n}s "
    "liked by users with a similar recent history come next.",
    "GRU4Rec": "{b} reads the {n}s one after another and remembers what matters: the latest {n}s "
    "count most, older ones fade.",
    "Caser": "{b} looks for patterns among the last few {n}s, pairs and triples that follow one "
    "another, and adds the user's general taste.",
}
# One instruction a task (section IV-A), in our words: stage 2, and stage 1's two tasks.
INSTRUCTIONS = {
    "history": "Say which {n} the user will choose next; the way {b} recommends is a reference.",
    "ta": "Follow the order of time as {b} does: say which {n} came last before the next one.",
    "rps": "Recommend as {b} does: say which {n} it puts first after these.",
}


class Prompts:
    """The prefix of a task, and the tails of the three prompts.

    Each tail comes as (tokens, at): `at` are the places of the tokens of history titles. Where a
    prompt is too long, the oldest history goes first.
    """

    def __init__(
        self, lm: LM, data: Data, titles: Titles, settings: dict, k: int = 0, shown: str = "titles"
    ):
        """settings: a run's (ranker.py). k: slots of the soft prompt; 0 leaves it out and the words
        about it. shown: a history item is its title, its vector (ids: E4SRec), or both (hybrid:
        LLaRA, arXiv 2312.02445)."""
        self.lm, self.titles, self.shown = lm, titles, shown
        self.noun, verb = data.meta["words"]["noun"], data.meta["words"]["verb"]
        self.backbone = settings["backbone"]
        self.letters = settings["verbalizer"] == "letter"
        self.lists = settings["show"] or self.letters
        self.sep = np.asarray(lm.sep)
        self.texts = {}
        # room for the title that a forced pass appends, or for its masks
        self.longest = int(np.diff(titles.ptr).max()) + len(self.sep)
        self.budget = min(settings["max_tokens"] or lm.max_tokens, lm.max_tokens)
        pattern = self.pattern_told(k, settings.get("words", False))
        about = self.text(f"{self.noun.capitalize()}s the user {verb}, oldest first:")
        self.prefixes = {}
        for task, words in INSTRUCTIONS.items():
            words = words.format(b=self.backbone, n=self.noun)
            asked = [self.text(words)] if settings.get("instruct", False) else []
            parts = [np.asarray(lm.start, np.int64), *asked, *pattern, about]
            self.prefixes[task] = np.concatenate(parts)
        # the last token of the prefix begins every tail, so that the first title's first token has
        # a state that predicts it
        self.prefix, self.begins = self.prefixes["history"][:-1], about[-1:]

    def asking(self, task: str) -> "Prompts":
        """The same prompts behind the instruction of a task: history, ta or rps."""
        other = copy.copy(self)
        other.prefix = self.prefixes[task][:-1]
        return other

    def history(
        self, items: np.ndarray | list[int], cand: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, at) of stage 2: what comes after these items? (DELRec, section IV-C)"""
        return self.tail(items, self.listed(cand))

    def temporal_analysis(
        self, items: np.ndarray, a: int, cand: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, at) of stage 1, TA (DELRec, section IV-B): items i_1..i_n; the example solves
        i_{a-1} from i_a, the question asks i_{n-1} given i_n."""
        example = [
            self.text(f"The next {self.noun} was:"),
            self.item(items[a - 1]),
            self.text(f"So the most recent {self.noun} was:"),
            self.item(items[a - 2]),
            self.text(f"Later {self.noun}s:"),
            *(self.item(i) for i in items[a - 1 : -2]),
        ]
        question = [
            self.text(f"The next {self.noun} was:"),
            self.item(items[-1]),
            *self.listed(cand)[:-1],
            self.text(f"So the most recent {self.noun} was:"),
        ]
        return self.tail(items[: a - 2], example + question)

    def pattern(
        self, items: np.ndarray, ranked: np.ndarray, cand: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, at) of stage 1, RPS (DELRec, section IV-B): the backbone ranked r_1..r_h after
        these items; told are r_2..r_h, asked is r_1. Of vectors the whole list is asked, so none of
        it is told."""
        if self.shown == "ids":
            return self.history(items)
        told = [
            self.text(f"{self.backbone}'s choices after its first:"),
            *(self.line(r) for r in ranked[1:]),
            *self.listed(cand)[:-1],
            self.text(f"{self.backbone}'s first choice:"),
        ]
        return self.tail(items, told)

    # ------------------------------------------------ the pieces

    def text(self, words: str) -> np.ndarray:
        """The tokens of some words and the separator, made once."""
        if words not in self.texts:
            tokens = np.asarray(encode(self.lm, words) + list(self.lm.sep), np.int64)
            must_have_vectors(self.lm, tokens)
            self.texts[words] = tokens
        return self.texts[words]

    def line(self, i: int | np.integer) -> np.ndarray:
        """The title of item i and the separator."""
        return np.concatenate([self.titles.of(i), self.sep])

    def item(self, i: int | np.integer) -> np.ndarray:
        """Item i of a history as it is shown."""
        vector = np.array([ITEM - i], np.int64)
        if self.shown == "titles":
            return self.line(i)
        if self.shown == "ids":
            return vector
        return np.concatenate([self.titles.of(i), vector, self.sep])

    def pattern_told(self, k: int, in_words: bool) -> list[np.ndarray]:
        """What stands for the backbone in the prefix: k slots, its pattern in words, or nothing."""
        about = f"How {self.backbone} recommends {self.noun}s:"
        if k:
            return [np.asarray(encode(self.lm, about), np.int64), np.full(k, SLOT), self.sep]
        if in_words:
            told = PATTERN.get(self.backbone, PATTERN["SASRec"])
            return [self.text(f"{about} {told.format(b=self.backbone, n=self.noun)}")]
        return []

    def listed(self, cand: np.ndarray | None) -> list[np.ndarray]:
        """The candidates, with letters where they are asked for; nothing where none are listed."""
        if cand is None or not self.lists:
            return []
        marks = [np.zeros(0, np.int64)] * len(cand)
        if self.letters:
            letters = LETTERS[: len(cand)]
            marks = [np.asarray(encode(self.lm, f"{x}. "), np.int64) for x in letters]
        lines = [np.concatenate([mark, self.line(c)]) for mark, c in zip(marks, cand)]
        return [
            self.text(f"Candidate {self.noun}s:"),
            *lines,
            self.text(f"The next {self.noun}:"),
        ]

    def tail(
        self, old: np.ndarray | list[int], rest: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The tail and its `at`. old: history items, of which the first may be dropped; rest: what
        must stay."""
        kept = len(self.prefix) + len(self.lm.end) + 2 + self.longest + sum(map(len, rest))
        room = self.budget - kept
        lines = [self.item(i) for i in old]
        while lines and sum(map(len, lines)) > room:
            lines.pop(0)
        if room < 0:
            stop(
                f"a prompt needs {self.budget - room} tokens without any history, the limit is "
                f"{self.budget}; use fewer candidates or slots, or shorter titles"
            )
        tokens = np.concatenate([self.begins, *lines, *rest, [MASK]]).astype(np.int64)
        begin = len(self.begins)
        return tokens, np.arange(begin, begin + sum(map(len, lines)))
