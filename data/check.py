"""What must hold of a prepared folder: no leak, candidates as promised, everything in order.

M interactions, U users, I items, n samples of a split, C candidates.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delrec.data.prepared import Data, histories, load_data
from delrec.data.title_faults import faults_of_folder, has_twin
from delrec.runtime import read_npy, stop

PARTS = ("train", "val", "test")
MOST_HISTORIES = 20_000  # samples of a split whose histories are looked at
MOST_ROWS = 100_000  # rows of a file of candidates that are looked at


@dataclass
class Finding:
    """What was checked, and how often it does not hold."""

    what: str
    broken: int  # how many break it
    of: int  # of how many
    is_error: bool = True  # False: only counted

    @property
    def failed(self) -> bool:
        """True if a rule does not hold."""
        return self.is_error and self.broken > 0


def finding(what: str, broken: np.ndarray) -> Finding:
    """The finding of a mask that is True where the rule is broken."""
    return Finding(what, int(np.count_nonzero(broken)), int(np.size(broken)))


def check_folder(folder: Path) -> None:
    """Prints what holds of a prepared folder and stops if anything does not."""
    data = load_data(str(folder))
    findings = list(check(data))
    for f in findings:
        print(f"{'BAD ' if f.failed else 'ok  '} {f.what}: {f.broken:,} of {f.of:,}")
    for line in faults_of_folder(data):
        print(line)
    bad = sum(f.failed for f in findings)
    if bad:
        stop(f"{folder}: {bad} of {len(findings)} checks failed; prepare it again")
    print(f"{folder}: all {len(findings)} checks hold")


def check(data: Data) -> Iterator[Finding]:
    """Yields a finding for every rule: order, samples, split, candidates."""
    owner = np.repeat(np.arange(data.n_users), np.diff(data.ptr))
    items = np.asarray(data.items, np.int64)
    samples = {s: np.asarray(getattr(data, s)) for s in PARTS}
    yield from check_items(data, owner, items)
    yield from check_samples(data, owner, samples)
    if data.meta["split"] == "temporal":
        yield from check_temporal(data, samples)
    elif data.meta["split"] == "files":
        yield check_files(data, owner, samples)
    else:
        yield check_leave_one_out(data, owner, samples)
    pair = owner * (data.n_items + 1) + items
    touched = np.unique(pair)
    known = np.unique(pair[samples["train"]]) if len(samples["train"]) else touched[:0]
    title_number = np.unique(data.titles, return_inverse=True)[1]
    for path in sorted(data.folder.glob("candidates_*.npy")):
        s = path.stem.split("_")[1]
        pairs = known if s == "train" else touched
        stored = Stored(path, items[samples[s]], owner[samples[s]], pairs)
        yield from check_candidates(stored, title_number)


def check_items(data: Data, owner: np.ndarray, items: np.ndarray) -> Iterator[Finding]:
    """Are the interactions in order, and the items numbered? owner: each interaction's user."""
    if data.times is not None:
        same_user = owner[1:] == owner[:-1]
        yield finding(
            "interactions stand in time order within their user",
            (np.diff(data.times) < 0) & same_user,
        )
    yield finding(
        "items are numbered 1..I and each has a title", (items < 1) | (items > data.n_items)
    )


def check_samples(
    data: Data, owner: np.ndarray, samples: dict[str, np.ndarray]
) -> Iterator[Finding]:
    """Is a sample of one part, with a history of earlier items of its user and nothing else?"""
    every = np.concatenate(list(samples.values()))
    yield finding("a sample belongs to one part only", np.bincount(every, minlength=len(owner)) > 1)
    yield finding("a sample has a history", every == data.ptr[owner[every]])
    for s, index in samples.items():
        index = index[:MOST_HISTORIES]
        place = index[:, None] - np.arange(50, 0, -1)
        outside = (place < data.ptr[owner[index]][:, None]) | (place >= index[:, None])
        yield finding(
            f"{s}: a history holds what came before its target, of the same user, and nothing else",
            (histories(data, index, 50) > 0) & outside,
        )


def check_temporal(data: Data, samples: dict[str, np.ndarray]) -> Iterator[Finding]:
    """Is every target on its side of the cuts?"""
    low, high = data.meta["cuts"]
    times = {s: np.asarray(data.times)[index] for s, index in samples.items()}
    wrong = {
        "train": times["train"] >= low,
        "val": (times["val"] < low) | (times["val"] >= high),
        "test": times["test"] < high,
    }
    for s in PARTS:
        yield finding(f"{s}: every target falls into its part of time", wrong[s])


def check_leave_one_out(data: Data, owner: np.ndarray, samples: dict[str, np.ndarray]) -> Finding:
    """Are the last items test, and the second last ones val?"""
    last = data.ptr[owner + 1] - 1
    test, val = samples["test"], samples["val"]
    wrong = np.concatenate([test != last[test], val != last[val] - 1])
    return finding("test holds last items, val second last ones", wrong)


def check_files(data: Data, owner: np.ndarray, samples: dict[str, np.ndarray]) -> Finding:
    """Do a user's training targets stand before those of validation, and these before test's?"""
    place = np.concatenate(list(samples.values()))
    part = np.repeat(np.arange(3), [len(index) for index in samples.values()])
    order = np.argsort(place, kind="stable")
    same_user = np.diff(owner[place[order]]) == 0
    return finding(
        "a user's train targets stand before val's, and these before test's",
        same_user & (np.diff(part[order]) < 0),
    )


@dataclass
class Stored:
    """A file of candidates and what its rows must fit."""

    path: Path  # candidates_SPLIT_C.npy
    target: np.ndarray  # int64 (n,): each row's target
    user: np.ndarray  # int64 (n,): each row's user
    pairs: np.ndarray  # sorted user * (I + 1) + item: what may not be drawn


def check_candidates(stored: Stored, title_number: np.ndarray) -> Iterator[Finding]:
    """Does every row hold its target, and besides it only items its user never touched?

    title_number: (I+1,), equal for items of the same title.
    """
    name, n_items = stored.path.name, len(title_number) - 1
    split, C = stored.path.stem.split("_")[1:]
    cand_nC = read_npy(stored.path)
    has_wrong_shape = cand_nC.shape != (len(stored.target), int(C))
    yield finding(
        f"{name}: a row for every sample, of the right width", np.array([has_wrong_shape])
    )
    if has_wrong_shape:
        return  # whose row each is, nobody knows
    cand_nC = np.asarray(cand_nC[:MOST_ROWS], np.int64)
    yield finding(f"{name}: its items are 1..I", (cand_nC < 1) | (cand_nC > n_items))
    cand_nC = np.clip(cand_nC, 1, n_items)
    target, user = stored.target[: len(cand_nC), None], stored.user[: len(cand_nC), None]
    is_target = cand_nC == target
    yield finding(f"{name}: the target stands in its row exactly once", is_target.sum(1) != 1)
    is_twice = (np.diff(np.sort(cand_nC, 1), axis=1) == 0).any(1)
    yield finding(f"{name}: no item stands in a row twice", is_twice)
    pair = user * (n_items + 1) + cand_nC
    place = np.minimum(np.searchsorted(stored.pairs, pair), len(stored.pairs) - 1)
    is_touched = stored.pairs[place] == pair
    touched = "the user touched in training" if split == "train" else "the user ever touched"
    yield finding(f"{name}: nothing {touched} but the target", (is_touched & ~is_target).any(1))
    twin_n = has_twin(title_number, cand_nC, target)
    yield Finding(
        f"{name}: rows with another item of the target's title (counted, not an error)",
        int(twin_n.sum()),
        len(twin_n),
        is_error=False,
    )
