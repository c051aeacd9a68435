"""Titles as bags of words, TF-IDF."""

import math
import re
from collections import Counter

import numpy as np


class Words:
    """The words of some titles, and what each weighs: rarer ones more."""

    def __init__(self, titles: list[str]):
        bags = [set(words_of(title)) for title in titles]
        self.number = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
        numbers = [self.number[word] for bag in bags for word in bag]
        in_titles = np.bincount(numbers, minlength=len(self.number))
        self.weight = [math.log(len(titles) / (1 + n)) for n in in_titles]
        self.unknown = math.log(max(len(titles), 1))  # what a word weighs that stands in none

    def __len__(self) -> int:
        """How many words there are."""
        return len(self.number)

    def bag(self, title: str) -> tuple[dict[int, float], float]:
        """({number of a word: how often it stands in a title, times its weight}, the square of what
        the words weigh that stand in none of the titles).
        """
        known, unknown = {}, 0
        for word, n in Counter(words_of(title)).items():
            if word in self.number:
                known[self.number[word]] = n * self.weight[self.number[word]]
            else:
                unknown += n * n
        return known, self.unknown**2 * unknown

    def bags(self, titles: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bags of norm 1: word numbers (n, T), weights fp32 (n, T), 0 where a title has fewer.

        Words that stand in none of the titles count in the norm, so a title of which little is
        known has a short bag.
        """
        bags = [self.bag(title) for title in titles]
        T = max((len(known) for known, _ in bags), default=0)
        id_nT = np.zeros((len(bags), max(T, 1)), np.int64)
        weight_nT = np.zeros(id_nT.shape, np.float32)
        for n, (known, _) in enumerate(bags):
            id_nT[n, : len(known)] = list(known)
            weight_nT[n, : len(known)] = list(known.values())
        unknown_n = np.array([unknown for _, unknown in bags], np.float32)
        norm_n = np.sqrt((weight_nT**2).sum(1) + unknown_n)
        return id_nT, weight_nT / np.maximum(norm_n, 1e-9)[:, None]


def words_of(title: str) -> list[str]:
    """The words of a title, in small letters."""
    return re.findall(r"\w+", title.lower())


def tfidf(titles: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Bags of words of titles, TF-IDF, each of norm 1: word numbers (I, T), weights fp32 (I, T), 0
    where a title has fewer, number of words.
    """
    words = Words(titles)
    return *words.bags(titles), len(words)
