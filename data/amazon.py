"""Amazon's reviews of a category, as published in 2014, 2018 and 2023: ratings as csv with or
without a header, or reviews of one record a line, with the meta file that holds the titles.
"""

import re
import sys
from array import array
from pathlib import Path

import numpy as np
import polars as pl

from delrec.data.log import Log, Rows, digests, rows_of
from delrec.data.own_files import PARTS
from delrec.data.raw_files import (
    clock_in,
    find,
    place_in,
    records,
    stop_at_missing,
    value_of,
)
from delrec.data.tables import Table, joined, read_table
from delrec.runtime import stop

# what the publishers call a column, in lower case
NAMES = {
    "user": ("user_id", "userid", "reviewerid"),
    "item": ("parent_asin", "asin", "productid", "item_id"),
    "time": ("timestamp", "unixreviewtime", "sort_timestamp"),
}
RECORDS = (".jsonl.gz", ".jsonl", ".json.gz", ".json")
META = re.compile(r"^meta_(.+?)(?:\.jsonl?(?:\.gz)?)?$")


def categories(folder: Path) -> list[str]:
    """The categories whose meta file and ratings or reviews a folder holds."""
    found = {m[1] for path in folder.rglob("meta_*") if (m := META.match(path.name))}
    return sorted(category for category in found if read_from(folder, category))


def category_of(meta: Path) -> str:
    """The category of a meta file."""
    return META.match(meta.name)[1]


def read_from(folder: Path, category: str) -> list[Path]:
    """The files of a category's interactions: all ratings, else the parts of a split, else the
    reviews, else those of the 5-core; none where there are none.
    """
    ends = (".csv", ".csv.gz")
    stems = (f"ratings_{category}", category)
    ratings = find(folder, *(stem + end for stem in stems for end in ends), needed=False)
    if ratings:
        return [ratings]
    split = [
        path
        for part in PARTS
        if (path := find(folder, *(f"{category}.{part}{end}" for end in ends), needed=False))
    ]
    if split:
        return split
    stems = (f"reviews_{category}", category, f"reviews_{category}_5", f"{category}_5")
    reviews = find(folder, *(stem + end for stem in stems for end in RECORDS), needed=False)
    return [reviews] if reviews else []


def read_amazon(folder: Path, category: str | tuple[str, ...]) -> Log:
    """The log of a category (of several names, the one that is there). Products without a title
    in the meta file get none.
    """
    names = (category,) if isinstance(category, str) else category
    there = [name for name in names if read_from(folder, name)]
    if len(there) > 1:
        stop(
            f"{folder} holds {' and '.join(there)}; name the one you mean: python data/prepare.py "
            f"{there[0]} --raw {folder}"
        )
    name = there[0] if there else names[0]
    read = read_from(folder, name)
    if not read:
        find(folder, f"ratings_{name}.csv", f"{name}.csv", *(f"{name}_5{end}" for end in RECORDS))
    meta = find(folder, *(f"meta_{name}{end}" for end in RECORDS))
    notes = []
    if ".csv" in read[0].suffixes:
        rows = amazon_ratings(read, notes)
    else:
        rows = amazon_reviews(read[0], notes)
    return Log(
        rows=rows,
        titles=amazon_titles(meta, rows, notes),
        source=f"Amazon reviews, {', '.join(path.name for path in read)}, {meta.name}",
        raw_sha256=digests(*read, meta),
        notes=notes,
    )


def amazon_titles(meta: Path, rows: Rows, notes: list[str]) -> dict[str, str]:
    """{raw item id: title} of the items that have interactions, the first that is not blank."""
    titles = dict.fromkeys(rows.item.unique().to_list(), "")
    for _, record in records(meta, notes):
        for name in ("parent_asin", "asin"):
            item = record.get(name)
            if item in titles and not titles[item]:
                title = record.get("title") or ""
                titles[item] = str(title[0] if isinstance(title, list) else title)
    if titles and not any(titles.values()):
        notes.append(f"{meta.name} holds no title of these products: is it of another release?")
    return titles


def amazon_ratings(paths: list[Path], notes: list[str]) -> Rows:
    """The rows of ratings_X.csv (2014: user, item, rating, time), X.csv (2018: item first), or of
    csv with a header (2023, Kaggle), in one file or in the parts of a split.
    """
    parts = [part_of_name(path) for path in paths]
    tables = [ratings_table(path) for path in paths]
    table = joined(tables)
    rows = table.rows
    stop_at_missing({"user": rows["user"], "product": rows["item"]}, table.place)
    clock = clock_in(rows["time"], table.place)
    notes += clock.notes
    part = None
    if {0, 1, 2} <= set(parts):
        part = np.repeat(np.array(parts, np.int8), [len(t.rows) for t in tables])
    elif parts != [None]:
        notes.append(f"only {', '.join(path.name for path in paths)}: not the whole log")
    made = rows_of(rows["user"], rows["item"], clock.when)
    made.part = part
    return made


def part_of_name(path: Path) -> int | None:
    """Which part of a split a file holds."""
    return next((PARTS[word[1:]] for word in path.suffixes if word[1:] in PARTS), None)


def ratings_table(path: Path) -> Table:
    """The columns user, item and time of a csv of ratings, with or without a header."""
    header = read_table(path, []).header
    low = [name.lower() for name in header]
    places = {
        ours: next((low.index(name) for name in theirs if name in low), None)
        for ours, theirs in NAMES.items()
    }
    if None not in places.values():
        names = {header[place]: ours for ours, place in places.items()}
        table = read_table(path, list(names))
        table.rows = table.rows.rename(names)
        return table
    if any(name in low for names in NAMES.values() for name in names) or len(header) < 4:
        stop(
            f"{path}: the first line is {', '.join(header)}; expected a user, a product, a rating "
            "and a time, or a header with user_id, parent_asin and timestamp"
        )
    first, second = ("user", "item") if path.name.startswith("ratings_") else ("item", "user")
    columns = [first, second, "rating", "time", *(f"column {n}" for n in range(5, len(header) + 1))]
    return read_table(path, ["user", "item", "time"], header=columns)


def amazon_reviews(path: Path, notes: list[str]) -> Rows:
    """The rows of a file of reviews, one record a line."""
    user, item, when = [], [], []
    lines = array("q")
    for line, record in records(path, notes):
        user.append(sys.intern(value_of(record, ("reviewerID", "user_id"), path, line)))
        item.append(sys.intern(value_of(record, ("parent_asin", "asin"), path, line)))
        when.append(value_of(record, ("unixReviewTime", "timestamp", "sort_timestamp"), path, line))
        lines.append(line)
    if not user:
        stop(f"{path} holds no review; download it again")
    clock = clock_in(pl.Series(when, dtype=pl.String), place_in(path, lines))
    notes += clock.notes
    return rows_of(user, item, clock.when)
