"""A user's own log: interactions.csv(.gz) or .parquet with items.csv(.gz), or RecBole's .inter and
.item.
"""

import csv
import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import polars as pl

from delrec.data.log import Log, Rows, digests, rows_of
from delrec.runtime import stop


@dataclass
class Columns:
    """What the columns are called in the user's files."""

    user: str = "user"
    item: str = "item"  # in both files
    timestamp: str = "timestamp"
    position: str = "position"  # an order, where there is no time
    title: str = "title"


def is_own_log(folder: Path) -> bool:
    """True for a folder that holds interactions.* or RecBole's *.inter."""
    return any(sorted(folder.glob(pattern)) for pattern in ("interactions.*", "*.inter"))


def read_own(folder: Path, columns: Columns) -> Log:
    """The log in a folder of the user's."""
    if sorted(folder.glob("*.inter")):
        return read_recbole(folder)
    inter = find_table(folder, "interactions", (".csv", ".csv.gz", ".parquet"))
    items = find_table(folder, "items", (".csv", ".csv.gz"))
    if inter.suffix == ".parquet":
        rows = read_parquet(inter, columns)
    else:
        rows = quick_rows(inter, columns) or read_rows(inter, columns)
    return Log(
        rows=rows,
        titles=read_titles(items, columns.item, columns.title),
        source=f"{inter.name}, {items.name}",
        raw_sha256=digests(inter, items),
    )


def find_table(folder: Path, stem: str, endings: tuple[str, ...]) -> Path:
    """The first of the files stem.ending that the folder holds."""
    for ending in endings:
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    stop(
        f"{folder} holds no {' or '.join(stem + ending for ending in endings)}; expected "
        "interactions (user,item and timestamp or position) and items "
        "(item,title), or RecBole's .inter and .item"
    )


# ---------------------------------------------------------------- csv, line by line


def open_text(path: Path) -> TextIO:
    """A .csv or .csv.gz, opened for reading as UTF-8; a byte order mark is skipped."""
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def read_table(path: Path, names: list[str]) -> Iterator:
    """Yields the header of a .csv or .csv.gz, then (line number, its cells under `names`); None
    where there is no such column.
    """
    try:
        with open_text(path) as f:
            rows = csv.reader(f, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if not header:
                stop(f"{path} is empty, expected a header line and rows")
            places = [header.index(name) if name in header else None for name in names]
            yield header
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    stop(
                        f"{path}, line {rows.line_num}: {len(row)} cells where the header names "
                        f"{len(header)}; put a cell that holds a comma in quotes"
                    )
                yield rows.line_num, [None if i is None else row[i] for i in places]
    except UnicodeDecodeError:
        stop_at_bad_byte(path)
    except csv.Error as bad:
        stop(
            f"{path}, line {rows.line_num}: {bad}; write the file as plain csv, a quote inside a "
            "quoted cell doubled"
        )
    except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
        stop(f"{path} is not a whole gzip file ({bad}); copy it again")


def stop_at_bad_byte(path: Path) -> None:
    """Stops with the line and the byte that is not UTF-8."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
        for n, line in enumerate(f, 1):
            try:
                line.decode()
            except UnicodeDecodeError as bad:
                stop(
                    f"{path}, line {n}: byte 0x{line[bad.start]:02x} is not UTF-8; save the "
                    "file as UTF-8"
                )


def whole(text: str, path: Path, line: int, what: str) -> int:
    """A time or position: a whole number that is not negative and fits 64 bits ('3.0' passes: a
    column with gaps is often written so).
    """
    value = text.strip().removesuffix(".0")
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        stop(
            f"{path}, line {line}: {what} {text!r} is not a whole number of at most 18 digits; "
            "give seconds (or any whole unit) since 1970, or a position 0, 1, 2, ..."
        )
    if value.startswith("-"):
        stop(
            f"{path}, line {line}: {what} {text!r} is negative, expected 0 or more; correct or "
            "leave out the row"
        )
    return int(value)


@dataclass(slots=True)
class Row:
    """A line of interactions.csv."""

    line: int  # its number in the file
    user: str
    item: str
    timestamp: str | None  # None: there is no such column
    position: str | None


def read_rows(path: Path, columns: Columns) -> Rows:
    """interactions.csv(.gz) line by line, with a sentence for whatever is wrong."""
    names = [columns.user, columns.item, columns.timestamp, columns.position]
    table = read_table(path, names)
    header = next(table)
    has_order = columns.timestamp in header or columns.position in header
    if columns.user not in header or columns.item not in header or not has_order:
        stop(
            f"{path}: the header names {', '.join(header)}; expected the columns "
            f"{columns.user},{columns.item} and {columns.timestamp} or {columns.position} "
            "(map other names with --user-column, --item-column, --time-column, --position-column)"
        )
    # an id occurs on many rows and is kept once
    rows = [
        Row(line, sys.intern(user.strip()), sys.intern(item.strip()), timestamp, position)
        for line, (user, item, timestamp, position) in table
    ]
    if not rows:
        stop(f"{path} holds a header and no rows, expected one row per interaction")
    for row in rows:
        if not row.user or not row.item:
            stop(
                f"{path}, line {row.line}: the {'item' if row.user else 'user'} is blank; give it "
                "an id or leave out the row"
            )
    timed = every_row_has_a_time(rows, header, path, columns)
    if timed:
        when = [whole(row.timestamp, path, row.line, columns.timestamp) for row in rows]
    else:
        when = [whole(row.position, path, row.line, columns.position) for row in rows]
    return rows_of([row.user for row in rows], [row.item for row in rows], when, timed)


def every_row_has_a_time(rows: list[Row], header: list[str], path: Path, columns: Columns) -> bool:
    """True if the timestamp orders the log. Where both columns exist it counts only if every row
    has one: times with gaps give no order.
    """
    if columns.timestamp not in header:
        return False
    if columns.position not in header:
        return True
    gaps = sum(not row.timestamp.strip() for row in rows)
    if gaps:
        print(
            f"{path.name}: {gaps:,} of {len(rows):,} rows have no {columns.timestamp}, so the "
            f"order is the {columns.position}"
        )
    return gaps == 0


def read_titles(path: Path, item_column: str, title_column: str) -> dict[str, str]:
    """{raw item id: title} of a .csv or .csv.gz with one row per item."""
    table = read_table(path, [item_column, title_column])
    header = next(table)
    if not {item_column, title_column} <= set(header):
        stop(
            f"{path}: the header names {', '.join(header)}; expected the columns "
            f"{item_column},{title_column} (map other names with --item-column, "
            "--title-column)"
        )
    titles = {}
    for line, (item, title) in table:
        if item.strip() in titles:
            stop(
                f"{path}, line {line}: item {item.strip()!r} is there twice, expected one row per "
                "item; leave out one of them"
            )
        titles[item.strip()] = title
    return titles


# ---------------------------------------------------------------- csv, all at once

WHOLE = r"^[0-9]{1,18}(\.0)?$"  # what `whole` takes


def quick_table(path: Path, names: list[str]) -> pl.DataFrame | None:
    """Those of the columns `names` that a plain .csv has, as stripped Strings, by polars: 22
    million rows in seconds.

    None where anything is out of the ordinary (a quote, a cell too many, not UTF-8): then
    read_table, line by line, reads it or says what is wrong.
    """
    try:
        with open_text(path) as f:
            header = [name.strip() for name in f.readline().strip().split(",")]
        if '"' in "".join(header) or len(set(header)) < len(header):
            return None
        place = {name: header.index(name) for name in names if name in header}
        rows = pl.read_csv(
            path,
            has_header=False,
            skip_rows=1,
            infer_schema=False,
            quote_char=None,
            raise_if_empty=False,
            schema={str(i): pl.String for i in range(len(header))},
            columns=sorted(place.values()),
        )
    except (OSError, ValueError, EOFError, zlib.error, pl.exceptions.PolarsError):
        return None
    if not len(rows) or any(
        column.null_count() or column.str.contains('"', literal=True).any() for column in rows
    ):
        return None
    return rows.select(pl.col(str(i)).str.strip_chars().alias(name) for name, i in place.items())


def quick_rows(path: Path, columns: Columns) -> Rows | None:
    """The rows of an ordinary interactions.csv(.gz), else None."""
    clocks = (columns.timestamp, columns.position)
    table = quick_table(path, [columns.user, columns.item, *clocks])
    if table is None or not {columns.user, columns.item} <= set(table.columns):
        return None
    # the timestamp where every row has one, else the position
    present = [name for name in clocks if name in table.columns]
    clock = next((name for name in present if table[name].str.contains(WHOLE).all()), None)
    if clock is None or clock != present[0]:  # read_rows says how many rows have no timestamp
        return None
    user, item = table[columns.user], table[columns.item]
    if (user.str.len_bytes() == 0).any() or (item.str.len_bytes() == 0).any():
        return None
    when = table[clock].str.strip_suffix(".0").cast(pl.Int64).to_numpy()
    return rows_of(user, item, when, clock == columns.timestamp)


# ---------------------------------------------------------------- parquet


def read_parquet(path: Path, columns: Columns) -> Rows:
    """interactions.parquet: ids of any type; times whole numbers or dates, which become seconds."""
    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as bad:
        stop(f"{path} cannot be read as parquet ({str(bad).splitlines()[0][:150]}); write it again")
    clocks = [name for name in (columns.timestamp, columns.position) if name in table.columns]
    clock = next((name for name in clocks if not table[name].null_count()), None)
    if not {columns.user, columns.item} <= set(table.columns) or clock is None:
        stop(
            f"{path}: the columns are {', '.join(table.columns)}; expected {columns.user}, "
            f"{columns.item} and {columns.timestamp} or {columns.position} without gaps "
            "(map other names with --user-column, --item-column, --time-column, --position-column)"
        )
    if table[clock].dtype in (pl.Datetime, pl.Date):
        when = table[clock].cast(pl.Datetime("ms")).dt.timestamp("ms").to_numpy() // 1000
    elif table[clock].dtype.is_integer():
        when = table[clock].cast(pl.Int64).to_numpy()
    else:
        stop(f"{path}: the column {clock} is {table[clock].dtype}, expected whole numbers or times")
    ids = {
        name: table[name].cast(pl.String).str.strip_chars() for name in (columns.user, columns.item)
    }
    for name, column in ids.items():
        if column.null_count() or (column.str.len_bytes() == 0).any():
            stop(
                f"{path}: a cell of the column {name} is blank; give it an id or leave out the row"
            )
    if len(when) and when.min() < 0:
        stop(f"{path}: the column {clock} holds {when.min()}, expected 0 or more")
    return rows_of(ids[columns.user], ids[columns.item], when, clock == columns.timestamp)


# ---------------------------------------------------------------- RecBole's atomic files


def read_recbole(folder: Path) -> Log:
    """NAME.inter and NAME.item: tabs, a header of name:type. The title is the first column whose
    name holds title or name.
    """
    inter = sorted(folder.glob("*.inter"))[0]
    items = next(iter(sorted(folder.glob("*.item"))), None)
    if items is None:
        stop(f"{folder} holds {inter.name} but no .item file; titles are read from it")

    table = atomic_table(inter)
    header = next(table)
    user, item, time = (place_of(header, inter, n) for n in ("user_id", "item_id", "timestamp"))
    rows = [
        (
            row[user].strip(),
            row[item].strip(),
            whole(row[time].split(".")[0], inter, n, "timestamp"),
        )
        for n, row in table
    ]

    table = atomic_table(items)
    header = next(table)
    item, title = place_of(header, items, "item_id"), place_within(header, items, "title", "name")
    return Log(
        rows=rows_of([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]),
        titles={row[item].strip(): row[title] for _, row in table},
        source=f"{inter.name}, {items.name}",
        raw_sha256=digests(inter, items),
    )


def atomic_table(path: Path) -> Iterator:
    """Yields the names in the header of an atomic file, then (line number, its cells)."""
    try:
        with open(path, encoding="utf-8") as f:
            header = [cell.split(":")[0] for cell in f.readline().rstrip("\n").split("\t")]
            yield header
            for n, line in enumerate(f, 2):
                row = line.rstrip("\n").split("\t")
                if len(row) != len(header):
                    stop(
                        f"{path}, line {n}: {len(row)} cells where the header names {len(header)}; "
                        "write the file again"
                    )
                yield n, row
    except UnicodeDecodeError:
        stop_at_bad_byte(path)


def place_of(header: list[str], path: Path, name: str) -> int:
    """Where the column of that name stands."""
    if name not in header:
        stop(f"{path}: the header names {', '.join(header)}; expected {name}")
    return header.index(name)


def place_within(header: list[str], path: Path, *parts: str) -> int:
    """Where the first column stands whose name holds one of the parts."""
    for place, name in enumerate(header):
        if any(part in name for part in parts):
            return place
    stop(f"{path}: the header names {', '.join(header)}; expected {parts[0]}")
