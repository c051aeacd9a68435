"""Titles that tell a language model nothing, and how many items and test rows they touch."""

import re
from collections import Counter

import numpy as np

from delrec.data.prepared import Data
from delrec.runtime import read_npy

MANY = 0.05  # a share of titles or of test rows from which on a line is loud
MOST = 0.5  # a share of items from which on one title for several is a sign of a wrong column
SHARED = "share their title with another item"
RIGHT_ONES = "are --user-column, --item-column and --title-column the right ones?"
MARKUP = re.compile(r"<[A-Za-z/!]|https?://|\{.*[;:].*\}|&[a-z]+;")


def faults_of_folder(data: Data, raw: dict[str, str] | None = None) -> list[str]:
    """The loud lines about the titles of a prepared folder. raw: {raw id: title} before
    cleaning.
    """
    path = data.folder / "raw_items.txt"
    ids = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    if len(ids) != data.n_items:
        ids = [""] * data.n_items
    test_items = np.asarray(data.items)[np.asarray(data.test)].astype(np.int64)
    cand_nC, path = None, data.folder / "candidates_test_15.npy"
    if path.exists():
        cand_nC = np.asarray(read_npy(path))
        if cand_nC.ndim != 2 or len(cand_nC) != len(test_items) or cand_nC.max() > data.n_items:
            cand_nC = None  # --check says so
    return faults_of_titles(data.titles[1:], ids, test_items, cand_nC, raw)


def faults_of_titles(
    titles: list[str],
    item_ids: list[str],
    test_items: np.ndarray,
    test_candidates: np.ndarray | None,
    raw: dict[str, str] | None = None,
) -> list[str]:
    """Loud lines about titles that are none, of many items, markup or numbers alone. titles,
    item_ids: (I,); test_items: (n,), 1..I; test_candidates: (n, C) where they exist; raw: {raw id:
    title} before cleaning, for the examples.
    """
    many = Counter(titles)
    blank_I = np.array([title == f"item {i}" for title, i in zip(titles, item_ids)])
    kinds = {
        "have no title and are called by their id": blank_I,
        SHARED: np.array([many[title] > 1 for title in titles]),
        "have markup or an address in their title": np.array(
            [bool(MARKUP.search(title)) for title in titles]
        ),
        "have a title without a letter": ~blank_I
        & np.array([not any(c.isalpha() for c in title) for title in titles]),
    }
    lines = []
    for said, faulty_I in kinds.items():
        of_titles, of_rows = faulty_I.mean(), faulty_I[test_items - 1].mean()
        if max(of_titles, of_rows) <= MANY:
            continue
        lines.append(
            f"WARNING: {faulty_I.sum():,} of {len(titles):,} items ({of_titles:.0%}, targets of "
            f"{of_rows:.0%} of the test rows) {said}: {examples(faulty_I, titles, item_ids, raw)}"
            + (f"; {RIGHT_ONES}" if said == SHARED and of_titles > MOST else "")
        )
    return lines + faults_of_rows(titles, test_items, test_candidates)


def examples(
    faulty_I: np.ndarray, titles: list[str], item_ids: list[str], raw: dict[str, str] | None
) -> str:
    """Three of the faulty titles, as they were before cleaning where that is known."""
    found = []
    for n in np.flatnonzero(faulty_I)[:3]:
        before = " ".join((raw or {}).get(item_ids[n], "").split())
        was = f" (was {before[:50]!r})" if before and before != titles[n] else ""
        found.append(f"{titles[n][:50]!r}{was}")
    return ", ".join(found) + (" .." if faulty_I.sum() > 3 else "")


def has_twin(title_number: np.ndarray, cand_nC: np.ndarray, target_n1: np.ndarray) -> np.ndarray:
    """Mask (n,) of the rows in which another candidate has the target's title. title_number:
    (I+1,), equal for items of the same title.
    """
    is_same = title_number[cand_nC] == title_number[target_n1]
    return (is_same & (cand_nC != target_n1)).any(1)


def faults_of_rows(
    titles: list[str], test_items: np.ndarray, test_candidates: np.ndarray | None
) -> list[str]:
    """A loud line where many test rows cannot be answered by a title."""
    if test_candidates is None:
        return []
    number = np.unique(["", *titles], return_inverse=True)[1]
    twin_n = has_twin(number, test_candidates, test_items[:, None])
    if twin_n.mean() <= MANY:
        return []
    shown = list(dict.fromkeys(titles[i - 1][:50] for i in test_items[twin_n]))[:3]
    return [
        f"WARNING: {twin_n.mean():.0%} of the test rows hold another candidate with the target's "
        f"title ({', '.join(map(repr, shown))}): no model can tell the two by title"
    ]
