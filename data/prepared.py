"""A prepared folder as data/prepare.py writes it, and what is read of it: histories, windows,
candidates.

Names carry their shape. B users in a batch, L history length, I items (ids 1..I, 0 pads), C
candidates, T words of a title, n samples of a split.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from delrec import places, runtime
from delrec.places import by_likeness, hash_in, is_like
from delrec.runtime import Run, complete_renames, folder_of, read_json, read_npy, stop

if TYPE_CHECKING:
    from delrec.data.shared import Items

ITEMS = "items.json"  # of a run's folder that is shared (shared.py)
COLUMNS = "item_columns.csv"  # what a prepared folder keeps of items beside titles


@dataclass(eq=False)
class Data:
    """A prepared folder, its arrays memory-mapped. M interactions, U users, I items, n samples."""

    name: str  # the data set's
    folder: Path
    folder_name: str  # what its runs stand under
    meta: dict  # meta.json (data/README.md)
    items: np.ndarray  # int32 (M,): ids 1..I, users one after another, each in time order
    ptr: np.ndarray  # int64 (U+1,): user u owns items[ptr[u]:ptr[u+1]]
    times: np.ndarray | None  # int64 (M,); None where only an order is known
    titles: list[str]  # (I+1,): titles[0] is the padding item's
    train: np.ndarray  # int64 (n,), sorted: where in items each sample's target is
    val: np.ndarray  # the same
    test: np.ndarray  # the same
    n_items: int  # I
    n_users: int  # U
    shared: Items | None = None  # of a run that came without its data: nobody's interactions


def load_data(name: str) -> Data:
    """The data of a folder written by data/prepare.py; `name` is the folder or stands in data/."""
    folder = folder_of("data", name)
    complete_renames(folder, "meta.json")
    if not (folder / "meta.json").exists():
        stop(not_prepared(folder))
    meta = read_json(folder / "meta.json")
    if not {"name", "hash", "words", "split"} <= set(meta) or not (folder / "titles.txt").exists():
        stop(
            f"{folder} is no prepared folder (titles.txt or an entry of meta.json is missing); "
            "prepare it again with data/prepare.py"
        )

    def load(part):
        return read_npy(folder / f"{part}.npy", (None,))

    items, ptr = load("items"), load("ptr")
    titles = [""] + (folder / "titles.txt").read_text(encoding="utf-8").split("\n")[:-1]
    data = Data(
        name=meta["name"],
        folder=folder,
        folder_name=Path(os.path.abspath(folder)).name,
        meta=meta,
        items=items,
        ptr=ptr,
        times=load("times") if (folder / "times.npy").exists() else None,
        titles=titles,
        train=load("train"),
        val=load("val"),
        test=load("test"),
        n_items=len(titles) - 1,
        n_users=len(ptr) - 1,
    )
    stop_unless_consistent(data)
    return data


def not_prepared(folder: Path) -> str:
    """The sentence about a folder that holds no prepared data set: which ones there are, what is
    most like it first, and how to prepare this one.
    """
    here = runtime.ROOT / "data"
    known = {
        p.parent.name
        for data in (here, places.current_folder(runtime.ROOT) / "data")
        for p in data.glob("*/meta.json")
        if p.parent.suffix not in (".unfinished", ".replaced")
    }
    names = by_likeness(folder.name, known)
    is_here = folder.resolve().parent == here.resolve()
    mistyped = bool(names) and is_like(folder.name, names[0])
    return (
        f"no prepared data set in {folder}; "
        + (f"is {names[0]} meant? " if mistyped else "")
        + f"prepared here: {', '.join(names) or 'none'}. "
        f"{'Else prepare' if mistyped else 'Prepare'} it with: "
        f"python data/prepare.py {folder.name}"
        + ("" if folder.name == "ml-100k" else " --raw FOLDER")
        + ("" if is_here else f" --out {folder}")
    )


def stop_unless_consistent(data: Data) -> None:
    """Stops if the arrays and titles of a prepared folder do not fit each other."""
    highest = int(data.items.max(initial=0))
    if highest > data.n_items or int(data.items.min(initial=1)) < 1:
        stop(
            f"{data.folder}: item id {int(data.items.max())} but only {data.n_items} titles (ids "
            "begin at 1); prepare it again"
        )
    last = max(int(part.max(initial=0)) for part in (data.train, data.val, data.test))
    end = int(data.ptr[-1])
    if last >= len(data.items) or end != len(data.items) or (np.diff(data.ptr) < 0).any():
        stop(
            f"{data.folder}: its arrays do not fit each other ({len(data.items)} interactions, "
            f"users up to {end}, samples up to {last}); prepare it again"
        )


def raw_item_ids(data: Data) -> list[str]:
    """(I+1,): the id that each item has in the raw log; that of the padding item is blank."""
    return ["", *raw_ids(data, "items", data.n_items)]


def raw_user_ids(data: Data) -> list[str]:
    """(U,): the id that each user has in the raw log."""
    return raw_ids(data, "users", data.n_users)


def raw_ids(data: Data, what: str, n: int) -> list[str]:
    """The n ids of the items or users in the raw log."""
    if data.shared is not None:
        return data.shared.ids if what == "items" else []
    path = folder_now(data) / f"raw_{what}.txt"
    try:
        ids = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as bad:
        stop(f"{path} cannot be read ({bad.strerror}), it holds the {what}' own ids; prepare again")
    if len(ids) != n:
        stop(f"{path} holds {len(ids)} ids but there are {n} {what}; prepare again")
    return ids


def item_columns(data: Data) -> dict[str, list[str]]:
    """{name: the cells of the items 1..I} of what is known of items beside titles, as text;
    blank where a cell was. Nothing where there are none.
    """
    if data.shared is not None:
        return data.shared.columns
    path = folder_now(data) / COLUMNS
    if not path.exists():
        return {}
    import polars as pl  # a process that filters nothing does without

    try:
        table = pl.read_csv(path, infer_schema=False).fill_null("")
    except (OSError, ValueError, pl.exceptions.PolarsError) as bad:
        stop(f"{path} cannot be read ({str(bad).splitlines()[0][:120]}); prepare again")
    if len(table) != data.n_items:
        stop(f"{path} holds {len(table)} rows but there are {data.n_items} items; prepare again")
    return {name: table[name].to_list() for name in table.columns}


def distinct_titles(data: Data) -> list[str]:
    """(I+1,): the titles; behind one that several items have stands the item's raw id."""
    count = Counter(data.titles)
    if max(count.values()) == 1:
        return data.titles
    named = zip(data.titles, raw_item_ids(data))
    return [f"{title} [id {raw}]" if count[title] > 1 else title for title, raw in named]


def hash_of(folder: Path) -> str | None:
    """The hash of the preparation in a folder, None where there is none."""
    complete_renames(folder, "meta.json")
    if not (folder / "meta.json").exists():
        return None
    return read_json(folder / "meta.json").get("hash")


def kept_as(folder: Path, digest: str) -> Path:
    """Where the preparation of that hash is kept when another takes its place in `folder`."""
    return Path(f"{folder}@{digest}")


def folder_now(data: Data) -> Path:
    """Where the preparation that was loaded stands now: kept under its hash, where another has
    taken its place since.
    """
    digest = data.meta["hash"]
    for place in (data.folder, kept_as(data.folder, digest)):
        if hash_of(place) == digest:
            return place
    stop(
        f"{data.folder} was prepared anew while this process read the earlier preparation "
        f"(hash {digest}), which is not kept; start it again"
    )


def places_of_data(run: Run) -> Iterator[Path]:
    """Yields where the preparation that a run was trained on may stand: in its own data_folder, or
    kept under its hash where another has taken that place.
    """
    first = Path(getattr(run, "data_folder", None) or runtime.ROOT / "data" / run.dataset)
    names = dict.fromkeys((first.name, run.dataset))
    roots = (runtime.ROOT, places.current_folder(runtime.ROOT))
    for place in (first, *(root / "data" / name for root in roots for name in names)):
        yield place
        yield kept_as(place, run.data_hash)


def folder_of_data(run: Run) -> Path | None:
    """Where the preparation that a run was trained on stands; None where it is not here. The files
    of a run that somebody shared may name any folder: there none is touched.
    """
    read = hash_in if (run.folder / ITEMS).exists() else hash_of
    return next((p for p in places_of_data(run) if read(p) == str(run.data_hash)), None)


def load_data_of(run: Run) -> Data:
    """The preparation a run was trained on. (load_run says what is wrong where it is not here.)

    run: what load_run returns.
    """
    place = folder_of_data(run)
    if place is None and (run.folder / ITEMS).exists():
        stop(
            f"the data that {run.folder} was trained on are not here; name them with --dataset, or "
            "ask it from Python (docs/sharing.md)"
        )
    return load_data(str(place or next(places_of_data(run))))


def users(data: Data, samples: np.ndarray) -> np.ndarray:
    """The user (0..U-1) each sample belongs to: int64 (n,)."""
    return np.searchsorted(data.ptr, samples, side="right") - 1


def histories(data: Data, samples: np.ndarray, L: int) -> np.ndarray:
    """The last L items before each sample's target, padded on the left with 0: int64 (n, L)."""
    samples = np.asarray(samples)
    at = samples[:, None] - np.arange(L, 0, -1)[None, :]
    inside = at >= data.ptr[users(data, samples)][:, None]
    return np.where(inside, data.items[np.maximum(at, 0)], 0).astype(np.int64)


def shuffled(old_nL: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Histories (n, L) in another order, drawn once for each sample; padding stays where it is."""
    new_nL = old_nL.copy()
    for row, sample in zip(new_nL, samples):
        row[row > 0] = np.random.default_rng([7, int(sample)]).permutation(row[row > 0])
    return new_nL


def runs_of_targets(
    data: Data, span: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The first and last index into data.items of each run: every user's training targets are cut
    into runs of at most `span` interactions. Where a user needs several, the cuts move from epoch
    to epoch, so a target is met with longer and shorter histories.
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


def batch_of(
    data: Data, first: np.ndarray, last: np.ndarray, L: int, is_target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Windows that end at each run's last target: inputs seq_BL, and target_BL with 0 where a
    position is not of the run. The places of the window before the run hold the history that fits,
    as input only. All inputs come before a training target of the same user.

    is_target: mask (M,) of the training targets.
    """
    place_BL = last[:, None] - np.arange(L - 1, -1, -1)
    inside_BL = np.maximum(place_BL, 0)
    in_run_BL = (place_BL >= first[:, None]) & is_target[inside_BL]
    target_BL = np.where(in_run_BL, data.items[inside_BL], 0).astype(np.int64)
    return histories(data, last, L), target_BL


def halves_of_validation(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """The places in data.val of its two halves, which share no user and are the same for every run.

    On the first a run chooses its step and its calibration; on the second, which no run has chosen
    anything on, the weights of fused rows are chosen. Of one user all samples are in the first.
    """
    user_n = users(data, np.asarray(data.val))
    user_G, count_G = np.unique(user_n, return_counts=True)
    if len(user_G) < 2:
        return np.arange(len(user_n)), np.arange(0)
    order = np.random.default_rng(0).permutation(len(user_G))
    so_far = np.cumsum(count_G[order])
    cut = 1 + int(np.abs(so_far[:-1] - so_far[-1] / 2).argmin())  # users in the first half
    is_first_n = np.isin(user_n, user_G[order[:cut]])
    return np.flatnonzero(is_first_n), np.flatnonzero(~is_first_n)


def candidates(
    data: Data, split: str, C: int, which: np.ndarray | slice = slice(None)
) -> np.ndarray:
    """The stored candidates of a split, or of some of its samples: int64 (n, C), each row holding
    its target exactly once.
    """
    folder = folder_now(data)
    path = folder / f"candidates_{split}_{C}.npy"
    if not path.exists():
        have = sorted(int(p.stem.split("_")[2]) for p in folder.glob(f"candidates_{split}_*.npy"))
        stop(
            f"{data.folder} holds no {C} candidates for {split}, it holds {have} (the catalogue "
            f"has {data.n_items} items); choose one of those, or prepare the data again"
        )
    return read_npy(path, (len(getattr(data, split)), C))[which].astype(np.int64)


def with_lists(backbone_run: Path | str, data: Data) -> np.ndarray:
    """The training samples (indices) that a backbone wrote a list for: all, or those of its
    --lists.
    """
    path = Path(backbone_run) / "topk_train.npy"
    if not path.exists():
        return np.arange(len(data.train))
    return np.flatnonzero(read_npy(path, (len(data.train), None))[:, 0])


def subset(n: int, limit: int | None, seed: int | list[int]) -> np.ndarray:
    """At most `limit` of n samples (all without a limit), the same ones for every run: sorted int64
    indices. seed: what numpy's default_rng takes.
    """
    if not limit or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:limit])
