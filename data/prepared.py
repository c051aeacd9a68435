"""A prepared folder as data/prepare.py writes it, and what is read of it: histories, windows,
candidates.

Names carry their shape. B users in a batch, L history length, I items (ids 1..I, 0 pads), C
candidates, T words of a title, n samples of a split.
"""

import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from delrec import runtime
from delrec.runtime import folder_of, read_json, read_npy, settle, stop


def load_data(name):
    """A folder written by data/prepare.py, memory-mapped.

    items int32 [M] (users one after another, in time order), ptr int64 [U+1], times int64 [M] or
    None, titles [I+1] (titles[0] is the padding item), train/val/test int64 (index into items of
    each sample's target), meta (see data/README.md).
    """
    folder = folder_of("data", name)
    settle(folder, "meta.json")
    if not (folder / "meta.json").exists():
        known = sorted(
            p.parent.name
            for p in (runtime.ROOT / "data").glob("*/meta.json")
            if p.parent.suffix not in (".unfinished", ".replaced")
        )
        elsewhere = folder.resolve().parent != (runtime.ROOT / "data").resolve()
        stop(
            f"no prepared data set in {folder}; prepared here: {', '.join(known) or 'none'}. "
            f"Prepare it with: python data/prepare.py {folder.name}"
            + ("" if folder.name == "ml-100k" else " --raw FOLDER")
            + (f" --out {folder}" if elsewhere else "")
        )
    meta = read_json(folder / "meta.json")

    def load(part):
        return read_npy(folder / f"{part}.npy", (None,))

    if not {"name", "hash", "words", "split"} <= set(meta) or not (folder / "titles.txt").exists():
        stop(
            f"{folder} is no prepared folder (titles.txt or an entry of meta.json is missing); "
            "prepare it again with data/prepare.py"
        )
    data = SimpleNamespace(
        name=meta["name"],
        folder=folder,
        meta=meta,
        items=load("items"),
        ptr=load("ptr"),
        times=load("times") if (folder / "times.npy").exists() else None,
        titles=[""] + (folder / "titles.txt").read_text(encoding="utf-8").split("\n")[:-1],
        train=load("train"),
        val=load("val"),
        test=load("test"),
    )
    data.n_items, data.n_users = len(data.titles) - 1, len(data.ptr) - 1
    data.folder_name = Path(os.path.abspath(folder)).name  # what its runs stand under
    if int(data.items.max(initial=0)) > data.n_items or int(data.items.min(initial=1)) < 1:
        stop(
            f"{folder}: item id {int(data.items.max())} but only {data.n_items} titles (ids begin "
            "at 1); prepare it again"
        )
    last = max(int(part.max(initial=0)) for part in (data.train, data.val, data.test))
    if (
        last >= len(data.items)
        or int(data.ptr[-1]) != len(data.items)
        or (np.diff(data.ptr) < 0).any()
    ):
        stop(
            f"{folder}: its arrays do not fit each other ({len(data.items)} interactions, users up "
            f"to {int(data.ptr[-1])}, samples up to {last}); prepare it again"
        )
    return data


def hash_of(folder):
    """The hash of the preparation in a folder, None where there is none."""
    settle(folder, "meta.json")
    return read_json(folder / "meta.json").get("hash") if (folder / "meta.json").exists() else None


def kept_as(folder, digest):
    """Where the preparation of that hash is kept when another takes its place in `folder`."""
    return Path(f"{folder}@{digest}")


def load_data_of(run):
    """The preparation a run was trained on: in its own data_folder, or kept under its hash where
    another has taken that place. (load_run says what is wrong where neither holds it.)"""
    own = Path(getattr(run, "data_folder", None) or folder_of("data", run.dataset))
    here = [runtime.ROOT / "data" / name for name in dict.fromkeys((own.name, run.dataset))]
    for folder in [f for place in (own, *here) for f in (place, kept_as(place, run.data_hash))]:
        if hash_of(folder) == run.data_hash:
            return load_data(str(folder))
    return load_data(str(own))


def users(data, samples):
    """The user (0..U-1) each sample belongs to."""
    return np.searchsorted(data.ptr, samples, side="right") - 1


def histories(data, samples, L):
    """The last L items before each sample's target, padded on the left with 0: int64 (n, L)."""
    samples = np.asarray(samples)
    at = samples[:, None] - np.arange(L, 0, -1)[None, :]
    inside = at >= data.ptr[users(data, samples)][:, None]
    return np.where(inside, data.items[np.maximum(at, 0)], 0).astype(np.int64)


def tfidf(titles):
    """Bags of words of titles, TF-IDF, each of norm 1: word numbers (I, T), weights fp32 (I, T), 0
    where a title has fewer, number of words.
    """
    words = [re.findall(r"\w+", t.lower()) for t in titles]
    vocab = {w: i for i, w in enumerate(sorted({w for t in words for w in t}))}
    df = np.bincount([vocab[w] for t in words for w in set(t)], minlength=len(vocab))
    T = max(max(map(len, words)), 1)
    id_IT, weight_IT = np.zeros((len(words), T), np.int64), np.zeros((len(words), T), np.float32)
    for i, t in enumerate(words):
        counts = {vocab[w]: t.count(w) for w in t}
        id_IT[i, : len(counts)] = list(counts)
        weight_IT[i, : len(counts)] = [
            n * math.log(len(titles) / (1 + df[w])) for w, n in counts.items()
        ]
    return (
        id_IT,
        weight_IT / np.maximum(np.linalg.norm(weight_IT, axis=1, keepdims=True), 1e-9),
        len(vocab),
    )


def shuffled(old_nL, samples):
    """Histories in another order, drawn once for each sample; padding stays where it is."""
    out = old_nL.copy()
    for row, sample in zip(out, samples):
        row[row > 0] = np.random.default_rng([7, int(sample)]).permutation(row[row > 0])
    return out


def runs_of_targets(data, span, rng):
    """Cut every user's training targets into runs of at most `span` interactions: the first and
    last index into data.items of each. Where a user needs several, the cuts move from epoch to
    epoch, so a target is met with longer and shorter histories.
    """
    target = np.sort(np.asarray(data.train))
    user = users(data, target)
    # the user's last training target
    end = target[np.searchsorted(user, user, side="right") - 1]
    start = target[np.searchsorted(user, user, side="left")]
    shift = rng.integers(0, span, data.n_users)[user] * (end - start >= span)
    run = (end - target + shift) // span
    new = np.flatnonzero((np.diff(user) != 0) | (np.diff(run) != 0))
    return target[np.r_[0, new + 1]], target[np.r_[new, len(target) - 1]]


def batch_of(data, first, last, L, is_target):
    """Windows that end at each run's last target: inputs seq_BL, and target_BL with 0 where a
    position is not of the run. The places of the window before the run hold the history that fits,
    as input only. All inputs come before a training target of the same user.
    """
    at_BL = last[:, None] - np.arange(L - 1, -1, -1)
    own_BL = (at_BL >= first[:, None]) & is_target[np.maximum(at_BL, 0)]
    return histories(data, last, L), np.where(own_BL, data.items[np.maximum(at_BL, 0)], 0).astype(
        np.int64
    )


def candidates(data, split, C, which=slice(None)):
    """The stored candidates of a split, or of some of its samples: int64 (n, C), each row holding
    its target exactly once.
    """
    path = data.folder / f"candidates_{split}_{C}.npy"
    if not path.exists():
        have = sorted(
            int(p.stem.split("_")[2]) for p in data.folder.glob(f"candidates_{split}_*.npy")
        )
        stop(
            f"{data.folder} holds no {C} candidates for {split}, it holds {have} (the catalogue "
            f"has {data.n_items} items); "
            "choose one of those, or prepare the data again"
        )
    if hash_of(data.folder) != data.meta["hash"]:
        stop(
            f"{data.folder} was prepared anew while this command read the earlier preparation "
            "(hash "
            f"{data.meta['hash']}); run it again"
        )
    return read_npy(path, (len(getattr(data, split)), C))[which].astype(np.int64)


def with_lists(backbone_run, data):
    """The training samples (indices) that a backbone wrote a list for: all, or those of its
    --lists.
    """
    path = Path(backbone_run) / "topk_train.npy"
    return (
        np.flatnonzero(read_npy(path, (len(data.train), None))[:, 0])
        if path.exists()
        else np.arange(len(data.train))
    )


def subset(n, limit, seed):
    """At most `limit` of n samples, the same ones for every run: sorted int64 indices."""
    return (
        np.arange(n)
        if not limit or limit >= n
        else np.sort(np.random.default_rng(seed).permutation(n)[:limit])
    )
