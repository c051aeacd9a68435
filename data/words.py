"""Titles as bags of words, TF-IDF."""

import math
import re

import numpy as np


class Words:
    """The words of some titles, and what each weighs: rarer ones more."""

    def __init__(self, titles: list[str]):
        bags = [set(words_of(title)) for title in titles]
        self.number = {word: i for i, word in enumerate(sorted(set().union(*bags)))}
        numbers = [self.number[word] for bag in bags for word in bag]
        in_titles = np.bincount(numbers, minlength=len(self.number))
        self.weight = [math.log(len(titles) / (1 + n)) for n in in_titles]

    def __len__(self) -> int:
        """How many words there are."""
        return len(self.number)

    def bag(self, title: str) -> dict[int, float]:
        """{number of a word: how often it stands in a title, times its weight}; words that stand in
        none of the titles are left out.
        """
        words = words_of(title)
        known = {self.number[word]: words.count(word) for word in words if word in self.number}
        return {word: n * self.weight[word] for word, n in known.items()}

    def bags(self, titles: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Bags of norm 1: word numbers (n, T), weights fp32 (n, T), 0 where a title has fewer."""
        bags = [self.bag(title) for title in titles]
        T = max(max(map(len, bags), default=0), 1)
        id_nT = np.zeros((len(bags), T), np.int64)
        weight_nT = np.zeros((len(bags), T), np.float32)
        for n, bag in enumerate(bags):
            id_nT[n, : len(bag)] = list(bag)
            weight_nT[n, : len(bag)] = list(bag.values())
        norm_n1 = np.linalg.norm(weight_nT, axis=1, keepdims=True)
        return id_nT, weight_nT / np.maximum(norm_n1, 1e-9)


def words_of(title: str) -> list[str]:
    """The words of a title, in small letters."""
    return re.findall(r"\w+", title.lower())


def tfidf(titles: list[str]) -> tuple[np.ndarray, np.ndarray, int]:
    """Bags of words of titles, TF-IDF, each of norm 1: word numbers (I, T), weights fp32 (I, T), 0
    where a title has fewer, number of words.
    """
    words = Words(titles)
    return *words.bags(titles), len(words)
