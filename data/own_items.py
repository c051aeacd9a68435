"""What a user's log says of its items: their titles, and the further columns of their table."""

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import polars as pl

from delrec.data.advice import stop_unless_titles
from delrec.data.hints import Columns, Request, command_for
from delrec.data.log import ItemColumns, Rows
from delrec.data.own_columns import ids_in, is_missing, read_any, stop_at_blank, text_in
from delrec.data.own_files import Files
from delrec.data.raw_files import titles_from
from delrec.data.tables import Table, as_text, first_rows, joined
from delrec.data.titles import LONGEST
from delrec.runtime import stop

LOOKED_AT = 10_000  # rows of a log that tell which columns are long texts

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


# ---------------------------------------------------------------- further columns


def further_columns(
    files: Files, names: Columns, request: Request
) -> tuple[ItemColumns | None, list[str]]:
    """What is known of items beside ids and titles, None where it is nothing; and what is said of
    columns that are not kept. It stands in the table of titles, or where there is none in the
    log's further columns.
    """
    paths, where = files.items or files.interactions, "the log"
    taken = {"", *vars(names).values()}
    if files.items:
        where = "the table of titles"
        taken = {"", names.item, names.title or title_of(files, names, request)}
    headers = [read_any(path, [], request.encoding).header for path in paths]
    further = [
        name
        for name in headers[0]
        if name not in taken and all(header.count(name) == 1 for header in headers)
    ]
    if not further:
        return None, []
    long = long_texts(paths[0], further, request.encoding)
    wanted = [names.item, *(name for name in further if name not in long)]
    try:
        table = joined([read_any(path, wanted, request.encoding) for path in paths])
    except click.ClickException as refused:
        return None, [f"further columns of {where} are not kept: {refused.message}"]
    kept, notes = texts_to_filter_by(table.rows, further, where)
    if not kept:
        return None, notes
    columns = ItemColumns(ids_in(table, names.item), pl.DataFrame(kept))
    if files.items:
        return columns, notes + note_on_rows_that_differ(columns)
    columns, said = one_value_an_item(columns)
    return columns, notes + said


def long_texts(path: Path, names: list[str], encoding: str | None) -> set[str]:
    """Those of the columns of a text file that are longer than a title in one of the first rows: a
    log's reviews, which need not be read again to know that nothing can be filtered by them.
    """
    try:
        rows = first_rows(path, names, encoding, LOOKED_AT)
    except click.ClickException:  # who reads all of it says what is wrong, or reads it otherwise
        return set()
    return {name for name in rows.columns if is_long(as_one_line(rows[name]))}


def is_long(text: pl.Series) -> bool:
    """True of text that is longer than a title somewhere."""
    return bool((text.str.len_chars() > LONGEST).any())


def as_one_line(text: pl.Series) -> pl.Series:
    """Text whose gaps are one blank each."""
    return text.str.replace_all(r"\s+", " ")


def texts_to_filter_by(
    rows: pl.DataFrame, further: list[str], where: str
) -> tuple[dict[str, pl.Series], list[str]]:
    """{column: its cells as text}, and what is said of columns that are not kept: several values in
    a cell, spans of time, or texts longer than a title. where: the columns stand.
    """
    kept = {}
    for name in filter(rows.columns.__contains__, further):
        text = as_text(rows[name])
        if text is not None:
            text = as_one_line(text.fill_null(""))
            if not is_long(text):
                kept[name] = text
    lost = [name for name in further if name not in kept]
    if not lost:
        return kept, []
    return kept, [
        f"columns of {where} that nothing can be filtered by, since a cell holds several values, a "
        f"span of time or over {LONGEST} characters, are not kept: {', '.join(lost)}"
    ]


def one_value_an_item(columns: ItemColumns) -> tuple[ItemColumns | None, list[str]]:
    """Those of a log's columns that have one value for each item, a row an item, None where there
    is none; and what is said of the others. A cell without a value says nothing.
    """
    rows = columns.cells.with_columns(columns.item.alias(""))  # no further column is called so
    rows = rows.filter(~is_missing(rows[""]))
    found, varied = rows.select("").unique(maintain_order=True), {}
    for name in columns.cells.columns:
        pairs = rows.select("", name).filter(~is_missing(rows[name])).unique(maintain_order=True)
        twice = pairs.filter(pairs[""].is_duplicated())
        if len(twice):
            varied[name] = twice
        else:
            found = found.join(pairs, on="", how="left", maintain_order="left")
    kept = None
    if found.width > 1:
        kept = ItemColumns(found[""], found.drop("").fill_null(""))
    if not varied:
        return kept, []
    name, twice = next(iter(varied.items()))
    first = twice[0, ""]
    values = twice.filter(twice[""] == first)[name].to_list()
    return kept, [
        f"columns of the log in which rows of one item differ are not kept: {', '.join(varied)} "
        f"(of item {first} the {name} is {' and '.join(map(repr, values[:2]))}); to filter answers "
        "by one, give its value of each item in a table of titles (--items)"
    ]


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
