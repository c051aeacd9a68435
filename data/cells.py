"""What the cells of a table say that its columns are, where no name says it."""

import polars as pl
from click import ClickException

from delrec.data.hints import NEVER, guessed, plain
from delrec.data.tables import Table, as_text, read_table
from delrec.data.time_formats import fitting_formats
from delrec.data.times import DOTTED, EARLIEST, ISO, LATEST, UNITS

LOOKED_AT = 1000  # rows by whose cells columns are guessed


# ---------------------------------------------------------------- tables with a header


def first_cells(table: Table, names: list[str], encoding: str | None) -> dict[str, pl.Series]:
    """{column: its first cells, as text} of those of the columns that are not blank there; nothing
    of one that cannot be read, or has no text."""
    text = text_columns(table, names, encoding, LOOKED_AT)
    return {name: cells for name, cells in text.items() if (cells != "").any()}


def text_columns(
    table: Table, names: list[str], encoding: str | None, n: int | None = None
) -> dict[str, pl.Series]:
    """{column: its first n cells as text, or all} of those of the columns that can be read so."""
    asked = [name for name in names if name and table.header.count(name) == 1]
    # of a parquet one by one: what cannot be read in it is a column
    parts = [[name] for name in asked] if table.path.suffix == ".parquet" else [asked]
    found = {}
    for part in parts:
        try:
            rows = read_table(table.path, part, encoding).rows[:n]
        except (ClickException, pl.exceptions.PolarsError):
            continue
        texts = {column.name: as_text(column) for column in rows.get_columns()}
        found |= {
            name: text.fill_null("").str.strip_chars()
            for name, text in texts.items()
            if text is not None
        }
    return found


def without_birthdays(
    cells: dict[str, pl.Series], table: Table, user: str | None, encoding: str | None
) -> dict[str, pl.Series]:
    """The cells without the columns of dates that are the same in every row of a user. All rows are
    looked at: among the first, each user may have one order. user: the column of the users where
    it is known."""
    dates = [name for name in times_among(cells) if name != user]
    if not user or not dates:
        return cells
    rows = pl.DataFrame(text_columns(table, [user, *dates], encoding))
    users = rows[user].n_unique() if user in rows else 1
    if users in (1, len(rows)):  # one user, or each comes once
        return cells
    birthdays = {
        name
        for name in rows.columns
        if name != user and rows[name].n_unique() > 1 and rows[[user, name]].n_unique() == users
    }
    return {name: column for name, column in cells.items() if name not in birthdays}


def times_among(cells: dict[str, pl.Series]) -> list[str]:
    """The columns whose cells are all dates; numbers may as well be ids."""
    return [
        name
        for name, column in cells.items()
        if not column.str.contains("^[0-9]*$").all() and is_time(column.filter(column != ""))
    ]


def item_among(cells: dict[str, pl.Series], title: str | None) -> str | None:
    """The one column that has a value for each title, and a title for each value; None where there
    is none, or several, or where too few titles come twice to tell: the number of a row has one
    title too."""
    if title not in cells or cells[title].n_unique() > len(cells[title]) / 2:
        return None
    found = [
        name
        for name, column in cells.items()
        if name != title
        and not any(word in plain(name) for word in NEVER)
        and not is_decimal(column)
        and not is_words(column)  # a text about the item, which its id is not
        and tells(column, cells[title])
        and tells(cells[title], column)
    ]
    return found[0] if len(found) == 1 else None


def guessed_in_cells(
    cells: dict[str, pl.Series], title: str | None, missing: list[str]
) -> dict[str, str]:
    """Role -> the column of a table's free ones whose cells say it, of the roles that no name
    says. title: the column of the titles where it is known."""
    named, found = guessed([name for name in cells if name != title], missing), {}
    title = named.get("title", title)
    taken = {*named.values()} - {title}
    left = {name: column for name, column in cells.items() if name not in taken}
    times = times_among(left)
    if "timestamp" in missing and "timestamp" not in named and len(times) == 1:
        found["timestamp"] = times[0]
    if "item" in missing and "item" not in named:
        item = item_among({n: c for n, c in left.items() if n not in times}, title)
        found |= {"item": item} if item else {}
    return found


# ---------------------------------------------------------------- tables without one


def guessed_by_cells(columns: list[pl.Series]) -> dict[str, int]:
    """Role -> place of the column whose cells look like it: a time is one by its form, a title is
    words, a user stands first, an item has as many values as a title and stands near it.
    """
    places = range(len(columns))
    time = next((n for n in places if is_time(columns[n])), None)
    words = [n for n in places if n != time and n and is_words(columns[n])]
    whole = [n for n in places if n != time and n not in words and not is_decimal(columns[n])]
    found = {"user": whole[0] if whole else 0}
    ids = [n for n in whole if n != found["user"] and columns[n].n_unique() > 1]
    if words:
        title = words[0]
        near = [n for n in ids if 0 < title - n <= 2 and tells(columns[n], columns[title])]
        ids = near or ids
        if near:
            found["title"] = title
        else:  # the words are the only name that the item has
            ids = [title]
    if ids:
        found["item"] = max(ids, key=lambda n: columns[n].n_unique())
    return found if time is None else found | {"timestamp": time}


def guessed_titles(columns: list[pl.Series]) -> dict[str, int]:
    """The item and the title of a table of titles: the first column, and the one of most words."""
    words = [n for n in range(1, len(columns)) if is_words(columns[n])]
    return {"item": 0, "title": words[0] if words else min(1, len(columns) - 1)}


def is_time(column: pl.Series) -> bool:
    """True for cells that are all times: dates of any form, numbers of 1979 to 2103."""
    if column.str.contains(ISO).all() or column.str.contains(DOTTED).all():
        return True
    if column.str.contains(r"^[0-9]{9,19}$").all():
        number = column.cast(pl.Float64)
        return any(
            bool(((number >= EARLIEST * 10**d) & (number <= LATEST * 10**d)).all()) for d in UNITS
        )
    return bool(fitting_formats(column)) and not column.str.contains("^[0-9]+$").all()


def is_words(column: pl.Series) -> bool:
    """True for cells of which many are several words, one of them of letters alone."""
    return bool(column.str.contains(r"(^| )\p{L}{3,} \S|\S \p{L}{3,}($| )").mean() > 0.3)


def is_decimal(column: pl.Series) -> bool:
    """True for cells that are all numbers and some of them with a fraction."""
    is_number = column.str.contains(r"^-?[0-9]*[.,]?[0-9]+$").all()
    return bool(is_number and column.str.contains("[.,]").any())


def tells(ids: pl.Series, titles: pl.Series) -> bool:
    """True if (nearly) every id has one title only."""
    pairs = pl.DataFrame({"id": ids, "title": titles}).n_unique()
    return ids.n_unique() > 1 and pairs <= 1.1 * ids.n_unique()
