"""How a log becomes samples: duplicates, ties, k-core, numbering, titles, the split, the
candidates (the rules in words: data/README.md).

M interactions, U users, I items (ids 1..I, 0 pads), n samples of a split.
"""

from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import polars as pl

from delrec.data.candidates import draw_candidates
from delrec.data.log import Ids, ItemColumns, Log, Rows
from delrec.data.prepared import subset
from delrec.data.titles import clean_title, without_placeholders
from delrec.runtime import stop

PARTS = ("train", "val", "test")
CANDIDATES = (15, 20, 100)
# what is advised where positions begin anew in each of a split's files: there is no time to go by
NUMBER_ON = "number the positions on through the three files"


@dataclass
class Rules:
    """What a user may choose of the rules."""

    # "temporal", "leave-one-out" or "files" (the log's own); None: temporal where times exist
    split: str | None = None
    core: int = 5  # interactions that every user and item keeps at least
    # order of equal times: "shuffled", "item" for that of the item ids, "file" for that of the rows
    ties: str = "shuffled"
    seed: int = 0  # of the candidates
    max_eval: int | None = None  # at most so many validation and test samples each


@dataclass
class Interactions:
    """The interactions that are left of a log, users one after another, each in time order."""

    user: np.ndarray  # int64 (M,): 0..U-1
    item: np.ndarray  # int64 (M,): 1..I
    when: np.ndarray  # int64 (M,): times or positions
    ptr: np.ndarray  # int64 (U+1,): user u owns [ptr[u]:ptr[u+1]]
    pairs: np.ndarray  # int64, sorted: the distinct user * (I + 1) + item
    user_ids: list[str]  # (U,): raw ids
    item_ids: list[str]  # (I,): raw ids; that of item i stands at i - 1
    raw: dict[str, int]  # users, items, interactions before anything was dropped
    duplicates: int  # interactions dropped because they were there twice
    part: np.ndarray | None = None  # int8 (M,): 0, 1, 2 where the log's files say it
    timed: bool = True  # False: `when` holds positions

    @property
    def n_items(self) -> int:
        """How many items there are, I."""
        return len(self.item_ids)

    def pair_of(self) -> np.ndarray:
        """Of every interaction its user * (I + 1) + item: int64 (M,)."""
        return self.user * (self.n_items + 1) + self.item


@dataclass
class Titles:
    """The titles of the items 1..I as they are written, and what was done to them."""

    text: list[str]  # (I,)
    blank: int  # titles that were blank and are now 'item ID'
    cleaned: int  # titles that cleaning changed
    cut: int  # titles that were too long


@dataclass
class Samples:
    """A split: which interactions are targets of training, validation and test."""

    part: np.ndarray  # int8 (M,): 0, 1, 2 for train, val, test
    cuts: list[int] | None  # the two times that a temporal split cuts at
    of: dict[str, np.ndarray]  # train, val, test -> int64 (n,), sorted: places of the targets


@dataclass
class Preparation:
    """What the rules made of a log."""

    left: Interactions
    titles: Titles
    samples: Samples
    arrays: dict[str, np.ndarray]  # name of an .npy file -> what it holds
    columns: pl.DataFrame | None  # of items, beside titles: a row an item


def apply_rules(log: Log, rules: Rules) -> Preparation:
    """The preparation of a log. rules.split must be one of the three splits."""
    left = interactions_of(rows_by(rules, log), rules.core, rules.ties)
    titles = titles_of(left.item_ids, log.titles)
    samples = samples_of(left, rules)
    arrays = {"items": left.item.astype(np.int32), "ptr": left.ptr}
    if log.rows.timed:
        arrays["times"] = left.when
    arrays |= samples.of
    arrays |= candidates_of(left, samples, rules.seed)
    return Preparation(left, titles, samples, arrays, columns_of(left.item_ids, log.columns))


# ---------------------------------------------------------------- interactions


def rows_by(rules: Rules, log: Log) -> Rows:
    """The rows of a log, without the split of its files where another one is asked for."""
    return log.rows if rules.split == "files" else replace(log.rows, part=None)


def interactions_of(rows: Rows, core: int, ties: str) -> Interactions:
    """The interactions of a log without duplicates, in order, after the k-core, numbered anew."""
    user_ids, user = number(rows.user)
    item_ids, item = number(rows.item)
    raw = {"users": len(user_ids), "items": len(item_ids), "interactions": len(user)}
    order = np.lexsort((item, rows.when, user))
    user, item, when = user[order], item[order], rows.when[order]
    first = np.ones(len(user), bool)
    first[1:] = (np.diff(user) != 0) | (np.diff(item) != 0) | (np.diff(when) != 0)
    if rows.part is not None:
        stop_if_in_two_parts(rows, order, first, user_ids[user], item_ids[item])
    user, item, when = user[first], item[first], when[first]
    row = order[first]
    # by item id, a model of ids could read the target off the id of the item before it
    if ties != "item" or rows.part is not None:
        key = {"item": item, "file": row}.get(ties)
        key = np.random.default_rng(0).random(len(user)) if key is None else key
        # training comes first where a part of the log's own ends within equal times
        keys = (key, when, user) if rows.part is None else (key, rows.part[row], when, user)
        order = np.lexsort(keys)
        item, when, row = item[order], when[order], row[order]
    keep = k_core(user, item, core)
    if not keep.any():
        stop(
            f"nothing is left of {raw['interactions']:,} interactions when every user and item "
            f"must have {core}; give a larger log or a smaller --core"
        )
    left_users, user = np.unique(user[keep], return_inverse=True)
    left_items, item = np.unique(item[keep], return_inverse=True)
    item += 1  # 0 is the padding
    many = np.bincount(user, minlength=len(left_users))
    return Interactions(
        user=user,
        item=item,
        when=when[keep],
        ptr=np.concatenate([[0], np.cumsum(many)]).astype(np.int64),
        pairs=np.unique(user * (len(left_items) + 1) + item),
        user_ids=user_ids[left_users].to_list(),
        item_ids=item_ids[left_items].to_list(),
        raw=raw,
        duplicates=int((~first).sum()),
        part=None if rows.part is None else rows.part[row][keep],
        timed=rows.timed,
    )


def stop_if_in_two_parts(
    rows: Rows, order: np.ndarray, first: np.ndarray, user: pl.Series, item: pl.Series
) -> None:
    """Stops if a row stands in two parts of the log's own split. first, user, item: of the rows in
    this order, first those that differ from the row before.
    """
    twice = np.flatnonzero(~first[1:] & (np.diff(rows.part[order]) != 0)) + 1
    if len(twice):
        row = int(twice[0])
        advice = "leave out --split files" if rows.timed else NUMBER_ON
        stop(
            f"--split files: {len(twice):,} rows stand in two of the files, the first is user "
            f"{user[row]!r} with item {item[row]!r}; leave them out of one, or {advice}"
        )


def number(raw: Ids) -> tuple[pl.Series, np.ndarray]:
    """Raw ids (a list or Strings) -> the sorted distinct ids, and each row's index among them.

    The order is numeric if every id is an integer, else that of the strings' bytes; so it depends
    neither on the order of the rows nor on a hash seed.
    """
    raw = pl.Series("id", raw, dtype=pl.String)
    ids = raw.unique()
    bad = ids.filter(ids.str.contains(r"[\x00-\x1f\x7f-\x{9f}\x{2028}\x{2029}]"))
    if len(bad):
        stop(
            f"the id {bad.sort()[0]!r} holds a line break or control character, expected plain "
            "text; change it in both files"
        )
    if ids.str.contains("^-?[0-9]{1,18}$").all():
        ids = pl.DataFrame([ids, ids.cast(pl.Int64).alias("n")]).sort("n", "id")["id"]
    else:
        ids = ids.sort()
    code_of = pl.DataFrame([ids]).with_row_index("code")
    rows = raw.to_frame().join(code_of, on="id", how="left", maintain_order="left")
    return ids, rows["code"].to_numpy().astype(np.int64)


def k_core(user: np.ndarray, item: np.ndarray, core: int) -> np.ndarray:
    """Mask (M,) of the interactions left when users and items with fewer than `core` of them are
    dropped until none is left to drop.
    """
    left = np.arange(len(user))
    while len(left):
        u, i = user[left], item[left]
        enough = (np.bincount(u)[u] >= core) & (np.bincount(i)[i] >= core)
        if enough.all():
            break
        left = left[enough]
    keep = np.zeros(len(user), bool)
    keep[left] = True
    return keep


# ---------------------------------------------------------------- titles


def titles_of(item_ids: list[str], raw_titles: dict[str, str]) -> Titles:
    """The titles of the items, clean; a blank one becomes 'item ID'."""
    unknown = [i for i in item_ids if i not in raw_titles]
    if unknown:
        stop(
            f"{len(unknown):,} of {len(item_ids):,} items have no row in the item table, the "
            f"first is {unknown[0]!r}{near_id(unknown[0], raw_titles)}; add them, or leave out "
            "their interactions with --drop-incomplete"
        )
    clean = [clean_title(raw_titles[i]) for i in item_ids]
    text = without_placeholders([title for title, _ in clean])
    cleaned = sum(
        title != " ".join(raw_titles[i].split()) for i, title in zip(item_ids, text, strict=True)
    )
    return Titles(
        text=[title or f"item {i}" for i, title in zip(item_ids, text)],
        blank=text.count(""),
        cleaned=cleaned,
        cut=sum(was_cut for _, was_cut in clean),
    )


def columns_of(item_ids: list[str], columns: ItemColumns | None) -> pl.DataFrame | None:
    """The further columns of items, a row for each of the items 1..I."""
    if columns is None:
        return None
    row_of = dict(zip(reversed(columns.item.to_list()), reversed(range(len(columns.item)))))
    return columns.cells[[row_of[i] for i in item_ids]]


def near_id(raw: str, raw_titles: dict[str, str]) -> str:
    """In words, the id of the item table that may be meant: it differs in zeros in front, in a
    '.0' behind, or in case.
    """

    def bare(i: str) -> str:
        return i.removesuffix(".0").lstrip("0").lower()

    meant = next((i for i in raw_titles if bare(i) == bare(raw)), None)
    return f" (there is {meant!r}: write both in one way)" if meant else ""


# ---------------------------------------------------------------- the split


def split_of(split: str | None, timed: bool) -> str:
    """The split that was asked for, or the one that fits the log."""
    if split is None:
        return "temporal" if timed else "leave-one-out"
    if split == "temporal" and not timed:
        stop(
            "a temporal split needs a timestamp on every row and this log has positions only; use "
            "--split leave-one-out"
        )
    return split


def samples_of(left: Interactions, rules: Rules) -> Samples:
    """The samples of a split: every interaction of a part that has an earlier one of the same
    user.
    """
    if rules.split == "files":
        part, cuts = parts_of_files(left), None
    elif rules.split == "temporal":
        part, cuts = parts_of_time(left.when)
    else:
        part, cuts = last_two_apart(left.ptr), None
    has_history = np.arange(len(part)) != left.ptr[left.user]
    samples = {s: np.flatnonzero((part == n) & has_history) for n, s in enumerate(PARTS)}
    if rules.max_eval:
        for n, s in enumerate(("val", "test")):
            samples[s] = samples[s][subset(len(samples[s]), rules.max_eval, [0, n])]
    for s, index in samples.items():
        if not len(index):
            stop(
                f"the {rules.split} split leaves no {s} sample of {len(part):,} interactions of "
                f"{len(left.user_ids):,} users; "
                "give a larger log, a smaller --core or another --split"
            )
    return Samples(part, cuts, samples)


def parts_of_files(left: Interactions) -> np.ndarray:
    """The part 0, 1, 2 (train, val, test) of every interaction, int8 (M,), as the log's files have
    it. Within a user training must come first and test last: else training would see the future.
    """
    if left.part is None:
        stop(
            "--split files keeps the split of a log in files named .train, .valid and .test, and "
            f"this log has none; use {'--split temporal or ' * left.timed}--split leave-one-out"
        )
    back = (np.diff(left.part) < 0) & (np.diff(left.user) == 0)
    if back.any():
        user = left.user_ids[left.user[int(back.argmax())]]
        many = len(np.unique(left.user[1:][back]))
        advice = "leave out --split files, the log is then split by time"
        stop(
            f"--split files: {many:,} of {len(left.user_ids):,} users have a row of a later part "
            f"before one of an earlier part, the first is user {user!r}: training would see their "
            f"future; {advice if left.timed else NUMBER_ON}"
        )
    return left.part


def last_two_apart(ptr: np.ndarray) -> np.ndarray:
    """The part 0, 1, 2 (train, val, test) of every interaction, int8 (M,): a user's last one is
    test, the second last val.
    """
    part = np.zeros(ptr[-1], np.int8)
    has_two = np.diff(ptr) > 1
    part[ptr[1:][has_two] - 2] = 1
    part[ptr[1:] - 1] = 2
    return part


def parts_of_time(when: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The part 0, 1, 2 (train, val, test) of every interaction, int8 (M,), and the two times that
    cut them. Equal times fall into the same part, so no model sees in training what happened when
    the first validation target did.
    """
    M, clock = len(when), np.sort(when)
    cuts = [int(clock[M * 8 // 10]), int(clock[M * 9 // 10])]
    return np.searchsorted(cuts, when, side="right").astype(np.int8), cuts


# ---------------------------------------------------------------- candidates


def candidates_of(left: Interactions, samples: Samples, seed: int) -> dict[str, np.ndarray]:
    """The candidates of every split (training has none of 100): name of a file -> int32 (n, C).

    Where one user leaves too few items to draw from, the larger C are left out; for the smallest C
    the log is refused.
    """
    n_items = left.n_items
    free = n_items - np.bincount(left.pairs // (n_items + 1))  # items that a user never touched
    fewest = min(int(free[left.user[index]].min()) for index in samples.of.values())
    drawn = {}
    for C in CANDIDATES:
        if fewest < C - 1:
            line = (
                f"{C} candidates need {C - 1} items a user never touched, and of {n_items:,} items "
                f"one user leaves only {fewest}"
            )
            if min(CANDIDATES) == C:
                asked = np.unique(np.concatenate([left.user[i] for i in samples.of.values()]))
                full = [left.user_ids[u] for u in asked if free[u] < C - 1]
                stop_at_full_users(full, fewest, n_items, C)
            print(f"note, harmless: {line}; candidates_*_{C}.npy are not written")
            continue
        for s in ("val", "test") if C > 20 else ("val", "test", "train"):
            drawn[f"candidates_{s}_{C}"] = candidates_of_part(left, samples, s, C, seed)
    return drawn


def stop_at_full_users(full: list[str], fewest: int, n_items: int, C: int) -> NoReturn:
    """Stops at users who touched so many items that no C candidates are left. full: their raw
    ids; fewest: the items that the fullest of them leaves.
    """
    named = ", ".join(repr(user) for user in full[:3])
    if len(full) > 3:
        named += f" and {len(full) - 3:,} more"
    who = f"user {named} leaves" if len(full) == 1 else f"users {named} leave fewer, one of them"
    stop(
        f"{C} candidates need {C - 1} items a user never touched, and of {n_items:,} items {who} "
        f"only {fewest}; leave the rows of {'that user' if len(full) == 1 else 'those users'} out "
        "of the log, as an account that many people share is no user, or give a log with more items"
    )


def candidates_of_part(
    left: Interactions, samples: Samples, s: str, C: int, seed: int
) -> np.ndarray:
    """The candidates of train, val or test: int32 (n, C)."""
    pairs = left.pairs
    if s == "train":  # its negatives must not tell what a user will touch later
        pairs = np.unique(left.pair_of()[samples.part == 0])
    target, user = left.item[samples.of[s]], left.user[samples.of[s]]
    rng = np.random.default_rng([seed, ("val", "test", "train").index(s), C])
    return draw_candidates(target, user, pairs, left.n_items, C, rng)
