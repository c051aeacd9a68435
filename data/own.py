"""A user's own log: csv with any separator, parquet, RecBole's .inter and .item, in one file or in
several, the titles in a table of their own or in the interactions' columns.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from delrec.data.advice import stop_unless_columns
from delrec.data.hints import Columns, Request, command_for
from delrec.data.log import Log, Rows, digests, rows_of
from delrec.data.own_columns import ids_in, is_missing, read_any, stop_at_blank, text_in
from delrec.data.own_files import Files, atomic, files_of, item_of, part_of
from delrec.data.own_items import further_columns, titles_in, titles_of_rows, with_title
from delrec.data.remedies import files_in
from delrec.data.tables import Table, joined
from delrec.data.times import EARLIEST, Clock, clock_of, position_of
from delrec.runtime import stop

USUAL = Columns("user", "item", "timestamp", "position", "title")
RECBOLE = Columns("user_id", "item_id", "timestamp", "position")


def read_own(folder: Path, request: Request) -> Log:
    """The log in a folder of the user's."""
    return read_files(files_of(folder, request), request)


def read_file(path: Path, items: Path | None, request: Request) -> Log:
    """The log in one file (or one folder of Spark's). items: a table of titles; None: they stand
    in the log's own columns, for RecBole's .inter in the .item beside it.
    """
    for given in filter(None, (path, items)):
        if not given.exists():
            stop(f"there is no file {given}; is its name right?")
    if path.is_dir() and atomic(path):
        stop(f"{path} is a folder of RecBole's files; give it with --raw instead")
    titles = [items] if items else []
    if path.suffix == ".inter" and not items:
        titles = [item_of(path.parent, path.stem)]
    return read_files(Files([path], titles, []), request)


def read_files(files: Files, request: Request) -> Log:
    """The log in some files."""
    names = request.columns.where_none(RECBOLE if files.is_recbole else USUAL)
    asked = [name for name in vars(names).values() if name]
    read = [read_any(path, asked, request.encoding) for path in files.interactions]
    stop_unless_columns(read, names, request, files)
    table = joined(read)
    part = parts_of(files.interactions, read) if request.keep_parts else None
    rows, kept, notes = rows_in(table, names, request)
    if part is not None:
        rows = replace(rows, part=part[kept])
    notes = [*files.notes, *table.notes, *notes]
    if files.items:
        titles, more = titles_in(files, names, rows.item, request)
    else:
        titles, more = titles_of_rows(table, names, rows, kept)
    columns, said = further_columns(files, names, request)
    notes += more + said
    if request.drop_incomplete:
        rows, more = with_title(rows, titles)
        notes += more
    paths = files_in([*files.interactions, *files.items])
    source = ", ".join(path.name for path in paths[:6]) + (" .." if len(paths) > 6 else "")
    return Log(rows, titles, source, digests(*paths), list(dict.fromkeys(notes)), columns)


def parts_of(paths: list[Path], tables: list[Table]) -> np.ndarray:
    """Of every row the part 0, 1, 2 (train, val, test) that its file's name says, int8."""
    parts = [part_of(path) for path in paths]
    if None in parts or not {0, 1, 2} <= set(parts):
        stop(
            f"--split files needs files named .train, .valid and .test, found "
            f"{', '.join(path.name for path in paths)}; leave out --split files"
        )
    return np.repeat(np.array(parts, np.int8), [len(table.rows) for table in tables])


# ---------------------------------------------------------------- interactions


def rows_in(table: Table, names: Columns, request: Request) -> tuple[Rows, np.ndarray, list[str]]:
    """The rows of a table of interactions, which of its rows they are, and what is said of it."""
    if not len(table.rows):
        stop(f"{table.path} holds a header and no rows, expected one row per interaction")
    ids = {role: ids_in(table, vars(names)[role]) for role in ("user", "item")}
    clocks = [name for name in (names.timestamp, names.position) if name in table.header]
    missing = {name: is_missing(table.rows[name]) for name in clocks}
    gaps = {name: int(mask.sum()) for name, mask in missing.items()}
    for role, column in ids.items():
        stop_at_empty(column, role, table, names, request)
    # one without any value is as if it were not there, unless no other is
    fullest = min(clocks, key=gaps.__getitem__)
    stop_at_empty(table.rows[fullest], "timestamp", table, names, request)
    name, notes = clocks[0], []
    # a time counts if every row has one: times with gaps give no order
    if len(clocks) == 2 and gaps[name] and gaps[clocks[1]] < gaps[name]:
        notes.append(
            f"{table.path.name}: {gaps[name]:,} of {len(table.rows):,} rows have no {name}, so the "
            f"order is the {clocks[1]}"
        )
        name = clocks[1]
    kept = np.arange(len(table.rows))
    if request.drop_incomplete:
        lacks = is_missing(ids["user"]) | is_missing(ids["item"]) | missing[name]
        kept = np.flatnonzero(~lacks.to_numpy())
        if len(kept) < len(lacks):
            notes.append(
                f"{len(lacks) - len(kept):,} of {len(lacks):,} rows without a user, an item or a "
                f"{name} are left out"
            )
        if not len(kept):
            stop(f"{table.path}: no row has a user, an item and a {name}")

    def place(row: int) -> str:
        return table.place(int(kept[row]))

    user, item, time = ids["user"], ids["item"], table.rows[name]
    if len(kept) < len(table.rows):
        user, item, time = user[kept], item[kept], time[kept]
    stop_at_blank(user, "user", place)
    stop_at_blank(item, "item", place)
    timed = name == names.timestamp
    if timed:
        clock = clock_of(time, name, place, request.time_format)
    else:
        text_in(table, name, "one number")
        clock = position_of(time, name, place)
    rows = rows_of(user, item, clock.when, timed)
    if timed:
        notes += note_on_no_times(rows, time, clock)
    return rows, kept, [*notes, *clock.notes]


def stop_at_empty(
    column: pl.Series, role: str, table: Table, names: Columns, request: Request
) -> None:
    """Stops at a column without any value, with the command that names another."""
    if not is_missing(column).all():
        return
    free = [name for name in table.header if name not in vars(names).values()]
    given = replace(request, columns=replace(request.columns, **{role: None}))
    stop(
        f"{table.path}: no row has a value in the column {column.name}; name another: "
        f"{command_for(given, free, [role])}"
    )


def note_on_no_times(rows: Rows, time: pl.Series, clock: Clock) -> list[str]:
    """A line where the column of times seems to hold something else, such as ratings or quantities:
    numbers too small for dates, few different ones, which come again in the rows of a user. A
    position does not come again.
    """
    if clock.when.max() >= EARLIEST // 3 * 10**clock.decimals:
        return []
    frame = pl.DataFrame({"user": rows.user, "item": rows.item, "when": rows.when}).unique()
    different = frame["when"].n_unique()
    again = frame.select("user", "when").is_duplicated().mean()
    if different > len(frame) / 4 or again < 0.02:  # a clock's, or positions
        return []
    least, most = time[int(clock.when.argmin())], time[int(clock.when.argmax())]
    return [
        f"{time.name} has {different:,} different numbers, {least} to {most}, and {again:.0%} of "
        "the rows have the same one as another row of their user: are they times? If not, name "
        "another column with --time-column; if they number a user's orders, name this one with "
        "--position-column"
    ]
