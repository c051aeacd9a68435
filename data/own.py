"""A user's own log: csv with any separator, parquet, RecBole's .inter and .item, in one file or in
several, the titles in a table of their own or in the interactions' columns.
"""

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import polars as pl

from delrec.data.advice import stop_unless_columns, stop_unless_titles
from delrec.data.hints import Columns, Request, command_for
from delrec.data.json_tables import is_json, read_json_table
from delrec.data.log import ItemColumns, Log, Rows, digests, rows_of
from delrec.data.own_files import Files, atomic, files_of, item_of, part_of
from delrec.data.raw_files import titles_from
from delrec.data.remedies import files_in
from delrec.data.tables import Table, as_text, joined, read_table
from delrec.data.times import MISSING, Where, clock_of, position_of
from delrec.data.titles import LONGEST
from delrec.runtime import stop

USUAL = Columns("user", "item", "timestamp", "position", "title")
RECBOLE = Columns("user_id", "item_id", "timestamp", "position")
# ids that may be rounded numbers, what codes do not have of these, and numbers as they should be
ROUNDED = r"^[0-9]([.,][0-9]+)?[eE]\+?[0-9]{2}$"
NOT_OF_CODES = "[.,+]"
PLAIN_NUMBER = r"^-?[0-9]+([.,][0-9]+)?$"


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


def read_any(path: Path, names: list[str], encoding: str | None) -> Table:
    """Those of the columns `names` that a file of any format has."""
    if is_json(path):
        return read_json_table(path, names)
    return read_table(path, names, encoding)


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
    return rows_of(user, item, clock.when, timed), kept, [*notes, *clock.notes]


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


def is_missing(column: pl.Series) -> pl.Series:
    """Mask of the cells without a value, however a program writes that."""
    missing = column.is_null()
    return missing | column.is_in(MISSING) if column.dtype == pl.String else missing


def ids_in(table: Table, name: str) -> pl.Series:
    """A column of ids as text; '17850.0', as columns with gaps are often written, is 17850."""
    column, text = table.rows[name], text_in(table, name, "one id")
    if column.dtype.is_float() and (column.drop_nulls() % 1 == 0).all():
        text = column.cast(pl.Int64, strict=False).cast(pl.String).fill_null("")
    stop_at_rounded_ids(text, name, table)
    known = text.filter(text != "") if column.dtype == pl.String else text
    if known.head(1).str.ends_with(".0").all() and known.str.contains(r"^-?[0-9]+\.0$").all():
        return text.str.strip_suffix(".0")
    return text


def text_in(table: Table, name: str, expected: str) -> pl.Series:
    """A column as text, blank where it has no value; a stop at a kind that has no text."""
    text = as_text(table.rows[name])
    if text is None:
        kind = table.rows[name].dtype
        stop(f"{table.path}: the column {name} is {kind}, expected {expected} in each row")
    return text.fill_null("")


def stop_at_rounded_ids(text: pl.Series, name: str, table: Table) -> None:
    """Stops at ids like 4.00638E+12: a spreadsheet rounded them, so several became one. 7e12 alone
    is one only among numbers: among other ids it is a code, as hexadecimal ones are.
    """
    rounded = text.str.contains(ROUNDED)
    if not rounded.any():
        return
    if not text.filter(rounded).str.contains(NOT_OF_CODES).any():
        others = text.filter(~rounded & ~is_missing(text))
        if not others.str.contains(PLAIN_NUMBER).all():
            return
    row = rounded.arg_max()
    stop(
        f"{table.place(row)}: the {name} {text[row]!r} was rounded by a spreadsheet, so "
        "different ones became one; export the table again with that column as text"
    )


def stop_at_blank(ids: pl.Series, what: str, place: Where) -> None:
    """Stops at the first id that is none."""
    missing = is_missing(ids)
    if missing.any():
        row = missing.arg_max()
        said = f"is {ids[row]!r}, which is how programs write no value" if ids[row] else "is blank"
        stop(
            f"{place(row)}: the {what} {said}; give it an id, or leave out such rows with "
            "--drop-incomplete"
        )


# ---------------------------------------------------------------- titles


def titles_in(
    files: Files, names: Columns, item: pl.Series, request: Request
) -> tuple[dict[str, str], list[str]]:
    """{raw item id: title} of a table with one row per item, and what is said of it. item: the ids
    in the log.
    """
    encoding = request.encoding
    tables = [
        read_any(path, list(filter(None, vars(names).values())), encoding) for path in files.items
    ]
    if not names.title:
        names = replace(names, title=title_column(tables[0], request))
        tables = [read_any(path, [names.item, names.title], encoding) for path in files.items]
    stop_unless_titles(tables[0], names, item, request, files)
    return titles_of_table(joined(tables), names.item, names.title, request.drop_incomplete)


def titles_of_table(
    table: Table, item_column: str, title_column: str, drop: bool = False
) -> tuple[dict[str, str], list[str]]:
    """{raw item id: title} of a table, and what is said of it. drop: leave out rows without an
    item.
    """
    item = ids_in(table, item_column)
    title = item
    if title_column != item_column:  # ids as titles are the ids as they are kept
        title = text_in(table, title_column, "one title")
    kept = np.arange(len(item))
    if drop:
        kept = np.flatnonzero(~is_missing(item).to_numpy())
    item, title = item[kept], title[kept]
    stop_at_blank(item, "item", lambda row: table.place(int(kept[row])))
    titles = dict(zip(item.to_list(), title.to_list()))
    if len(titles) < len(item):
        # refuses two titles of an item
        titles_from(item, title, lambda row: table.place(int(kept[row])))
    return titles, table.notes


def further_columns(
    files: Files, names: Columns, request: Request
) -> tuple[ItemColumns | None, list[str]]:
    """What the table of titles holds beside ids and titles, None where it is nothing; and what is
    said of columns that are not kept: several values in a cell, spans of time, or texts longer than
    a title.
    """
    if not files.items:
        return None, []
    headers = [read_any(path, [names.item], request.encoding).header for path in files.items]
    taken = {"", names.item, names.title or title_of(files, names, request)}
    further = [
        name
        for name in headers[0]
        if name not in taken and all(header.count(name) == 1 for header in headers)
    ]
    if not further:
        return None, []
    wanted = [names.item, *further]
    try:
        table = joined([read_any(path, wanted, request.encoding) for path in files.items])
    except click.ClickException as refused:
        return None, [f"further columns of the table of titles are not kept: {refused.message}"]
    kept = {}
    for name in filter(table.rows.columns.__contains__, further):
        text = as_text(table.rows[name])
        if text is not None:
            text = text.fill_null("").str.replace_all(r"\s+", " ")
            if (text.str.len_chars().max() or 0) <= LONGEST:
                kept[name] = text
    lost = [name for name in further if name not in kept]
    notes = []
    if lost:
        notes = [
            f"columns of the table of titles that nothing can be filtered by, since a cell holds "
            f"several values, a span of time or over {LONGEST} characters, are not kept: "
            + ", ".join(lost)
        ]
    if not kept:
        return None, notes
    columns = ItemColumns(ids_in(table, names.item), pl.DataFrame(kept))
    return columns, notes + note_on_rows_that_differ(columns)


def note_on_rows_that_differ(columns: ItemColumns) -> list[str]:
    """A line where several rows of an item, of one title, differ in another column."""
    rows = columns.cells.with_columns(columns.item.alias("")).unique(maintain_order=True)
    item = rows[""]
    twice = item.filter(item.is_duplicated() & ~is_missing(item))
    if not len(twice):
        return []
    name, values = next(
        (name, column.unique(maintain_order=True).to_list())
        for name, column in rows.filter(item == twice[0]).to_dict().items()
        if column.n_unique() > 1
    )
    return [
        f"{twice.n_unique():,} items have several rows that differ beside the title, the first one "
        f"counts: of item {twice[0]} the {name} is {' and '.join(map(repr, values[:2]))}"
    ]


def title_of(files: Files, names: Columns, request: Request) -> str:
    """The column of titles of RecBole's .item, which nobody named."""
    return title_column(read_any(files.items[0], [names.item], request.encoding), request)


def title_column(table: Table, request: Request) -> str:
    """The column of titles in RecBole's .item: the one that is text of several words and whose
    name is title, else ends with it, else with name; a single word is a title only if so called.
    """
    text = [n for n in table.header if table.types.get(n, "token_seq") in ("token_seq", "")]
    words = [n for n in table.header if table.types.get(n) == "token"]

    def ending(names: list[str], end: str) -> list[str]:
        return sorted((n for n in names if n.lower().endswith(end)), key=lambda n: n.lower() != end)

    found = ending(text, "title") + ending(words, "title") + ending(text, "name")
    if not found:
        stop(
            f"{table.path}: the header names {', '.join(table.header)}; none is a title "
            "(title:token_seq or item_name:token_seq); name it: "
            f"{command_for(request, table.header, ['title'])}"
        )
    return found[0]


def titles_of_rows(
    table: Table, names: Columns, rows: Rows, kept: np.ndarray
) -> tuple[dict[str, str], list[str]]:
    """{raw item id: title} from the interactions' own rows, and what is said of it: the last title
    that an item had counts.
    """
    if names.title == names.item:  # ids as titles are the ids as they are kept
        return {item: item for item in rows.item.unique().to_list()}, []
    title = text_in(table, names.title, "one title")[kept]
    seen = pl.DataFrame({"item": rows.item, "title": title, "when": rows.when})
    named = seen.filter(~is_missing(seen["title"])).sort("when", "title")
    last = named.group_by("item").agg(pl.col("title").last(), pl.col("title").n_unique().alias("n"))
    titles = dict.fromkeys(rows.item.unique().to_list(), "")
    titles |= dict(zip(last["item"].to_list(), last["title"].to_list()))
    many = last.filter(pl.col("n") > 1)
    if not len(many):
        return titles, []
    example = many["item"].min()
    names_of = named.filter(pl.col("item") == example)["title"].unique(maintain_order=True)
    return titles, [
        f"{len(many):,} items had more than one title, the last one counts: item {example} was "
        + " and ".join(map(repr, names_of.to_list()[-2:]))
    ]


def with_title(rows: Rows, titles: dict[str, str]) -> tuple[Rows, list[str]]:
    """The rows of items that the table of titles knows, and what is said of the others."""
    known = rows.item.is_in(list(titles)).to_numpy()
    if known.all():
        return rows, []
    at = np.flatnonzero(known)
    if not len(at):
        stop("no item of the interactions has a row in the item table; are the ids the same?")
    part = None if rows.part is None else rows.part[at]
    kept = Rows(rows.user[at], rows.item[at], rows.when[at], rows.timed, part)
    lost = len(known) - len(at)
    return kept, [
        f"{lost:,} of {len(known):,} rows of items without a row in the item table are left out"
    ]
