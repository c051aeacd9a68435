"""A prompt formed alone, piece after piece: what prompts formed many at a time must equal."""

from functools import cache

import numpy as np

from delrec.lm.prompts import LETTERS
from delrec.lm.text import ITEM, MASK, encode


class TooLong(Exception):
    """How many tokens a prompt needs without any history, which are too many."""


class PlainPrompts:
    """The tails of a ranker's prompts as lists of tokens, and how many tell the history."""

    def __init__(self, prompts):
        self.p, self.lm = prompts, prompts.lm
        self.encode = cache(lambda words: encode(self.lm, words))

    def text(self, words):
        return self.encode(words) + list(self.lm.sep)

    def line(self, i):
        return self.p.titles.of(i).tolist() + list(self.lm.sep)

    def item(self, i):
        vector = {"titles": [], "ids": [ITEM - i], "hybrid": [ITEM - i]}[self.p.shown]
        if self.p.shown == "ids":
            return vector
        return self.p.titles.of(i).tolist() + vector + list(self.lm.sep)

    def listed(self, cand):
        if cand is None or not self.p.lists:
            return []
        marks = [self.encode(f"{x}. ") if self.p.letters else [] for x in LETTERS]
        line = self.line if self.p.shown == "ids" else self.item
        lines = [mark + line(c) for mark, c in zip(marks, cand)]
        noun = self.p.noun
        return [self.text(f"Candidate {noun}s:"), *lines, self.text(f"The next {noun}:")]

    def history(self, items, cand=None):
        return self.tail(items, self.listed(cand))

    def temporal_analysis(self, items, a, cand=None):
        noun = self.p.noun
        following, recent = f"The next {noun} was:", f"So the most recent {noun} was:"
        example = [self.text(following), self.item(items[a - 1])]
        example += [self.text(recent), self.item(items[a - 2])]
        example.append(self.text(f"Later {noun}s:"))
        later = list(map(self.item, items[a - 1 : -2]))
        question = [self.text(following), self.item(items[-1])]
        question += [*self.listed(cand)[:-1], self.text(recent)]
        room = self.room(example + question)
        before = items[: a - 2] if sum(map(len, later)) <= room else []
        while sum(map(len, later)) > room:
            later.pop(0)
        return self.tail(before, example + later + question)

    def pattern(self, items, ranked, cand=None):
        if self.p.shown == "ids":
            return self.history(items)
        told = [self.text(f"{self.p.backbone}'s choices after its first:")]
        told += [*map(self.line, ranked[1:]), *self.listed(cand)[:-1]]
        return self.tail(items, [*told, self.text(f"{self.p.backbone}'s first choice:")])

    def tail(self, old, rest):
        lines, room = [self.item(i) for i in old], self.room(rest)
        while sum(map(len, lines)) > room:
            lines.pop(0)
        begin = self.p.prefixes["history"][-1:].tolist()
        told = sum(map(len, lines))
        return np.array(sum([begin, *lines, *rest, [MASK]], []), np.int64), told

    def room(self, rest):
        kept = len(self.p.prefix) + len(self.lm.end) + 2 + self.p.longest + sum(map(len, rest))
        if kept > self.p.budget:
            raise TooLong(kept)
        return self.p.budget - kept
