"""A column of a table of the user's: as ids, as text, and where a cell has no value."""

from pathlib import Path

import polars as pl

from delrec.data.json_tables import is_json, read_json_table
from delrec.data.tables import Table, as_text, read_table
from delrec.data.times import MISSING, Where
from delrec.runtime import stop

# ids that may be rounded numbers, what codes do not have of these, and numbers as they should be
ROUNDED = r"^[0-9]([.,][0-9]+)?[eE]\+?[0-9]{2}$"
NOT_OF_CODES = "[.,+]"
PLAIN_NUMBER = r"^-?[0-9]+([.,][0-9]+)?$"


def read_any(path: Path, names: list[str], encoding: str | None) -> Table:
    """Those of the columns `names` that a file of any format has."""
    if is_json(path):
        return read_json_table(path, names)
    return read_table(path, names, encoding)


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
