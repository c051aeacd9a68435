"""Tables as files: csv with any separator, RecBole's atomic files, parquet; packed or not, in one
file or in the parts that Spark writes.
"""

import csv
import gzip
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
import polars as pl
from click import ClickException

from delrec.data.forms import (
    HEAD,
    SEPARATORS,
    Form,
    form_of,
    head_of,
    open_text,
    stop_at_bad_byte,
    stop_at_broken_gzip,
    stop_at_width,
)
from delrec.runtime import stop

LONGEST_CELL = 2**24
NO_SEPARATOR = "\x01"  # stands in no text
TABLES_WITH_A_LOG = {"_delta_log": "Delta", ".hoodie": "Hudi"}  # a folder in theirs -> whose
DIGITS_OF_A_TIME = 9  # since 1973, in seconds


@dataclass
class Table:
    """Some columns of a file, or of the files that are one table."""

    path: Path  # of the first file
    header: list[str]  # all its columns
    rows: pl.DataFrame  # (n, those that were asked for), text without blanks around it
    place: Callable[[int], str]  # where a row stands, in words
    notes: list[str]  # what is said of how it was read
    types: dict[str, str]  # RecBole's type of a column
    separator: str | None = None  # of text


def read_table(
    path: Path, names: list[str], encoding: str | None = None, header: list[str] | None = None
) -> Table:
    """Those of the columns `names` that a file has; a folder is the table that Spark wrote. header:
    of a file that has none.
    """
    if path.is_dir():
        return joined([read_table(part, names, encoding) for part in parts_of_spark(path)])
    if path.suffix == ".parquet":
        return read_parquet(path, names)
    form, found, types = form_of(path, names, encoding)
    if header is None:
        header = found
    else:
        form.headers = 0
    notes = []
    if not set(names) & set(header):
        rows, lines = pl.DataFrame(), None
    else:
        rows, lines = rows_of_text(path, form, header, names, notes)
    stop_if_cut(path, form, header, rows)
    first = form.above + 1
    if form.separator != "," and not form.typed and ".tsv" not in path.suffixes:
        notes.append(f"{path.name}: its cells are separated by {SEPARATORS[form.separator]}")
    if form.encoding != (encoding or "utf-8-sig"):
        read_as = "UTF-8" if form.encoding == "utf-8-sig" else form.encoding
        notes.append(f"{path.name} is read as {read_as}")

    def place(row: int) -> str:
        return f"{path}, line {first + row if lines is None else lines[row]}"

    return Table(path, header, rows, place, notes, types, form.separator)


def read_header(path: Path) -> list[str]:
    """The columns that a file names, none where it cannot be read as text."""
    if path.suffix == ".parquet":
        return read_parquet(path, []).header
    if b"\0" in head_of(path) or path.stat().st_size == 0:
        return []
    try:
        return form_of(path, [], "latin-1")[1]
    except ClickException:
        return []


def first_rows(path: Path, names: list[str], encoding: str | None, most: int) -> pl.DataFrame:
    """Those columns of the first rows of a text file; none of a parquet file or a folder."""
    if path.is_dir() or path.suffix == ".parquet":
        return pl.DataFrame()
    form, header, _ = form_of(path, names, encoding)
    return careful_rows(path, form, header, names, most)[0]


def joined(tables: list[Table]) -> Table:
    """Tables of the same columns as one, in their order."""
    if len(tables) == 1:
        return tables[0]
    ends = np.cumsum([len(table.rows) for table in tables])

    def place(row: int) -> str:
        n = int(np.searchsorted(ends, row, side="right"))
        return tables[n].place(row - int(ends[n - 1] if n else 0))

    first = tables[0]
    for table in tables:
        if set(table.rows.columns) != set(first.rows.columns):
            stop(
                f"{table.path} has the columns {', '.join(table.header)} and {first.path} "
                f"{', '.join(first.header)}; the parts of a log must have the same"
            )
    rows = pl.concat([t.rows.select(first.rows.columns) for t in tables], how="vertical_relaxed")
    notes = list(dict.fromkeys(note for table in tables for note in table.notes))
    return replace(first, rows=rows, place=place, notes=notes)


def parts_of_spark(folder: Path) -> list[Path]:
    """The files that hold rows in a folder that Spark (or another writer of parts) made; what its
    writers hide (_temporary/, .x) is none.
    """
    for log, kind in TABLES_WITH_A_LOG.items():
        if (folder / log).is_dir():
            stop(
                f"{folder} is a {kind} table: only its {log} says which files are still part of "
                "it; write what it holds as parquet, such as "
                f"spark.read.format('{kind.lower()}').load(FOLDER).write.parquet(NEW), and give "
                "that folder"
            )
    parts = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.stat().st_size
        and not any(name.startswith(("_", ".")) for name in path.relative_to(folder).parts)
        and (is_table(path.name) or path.name.startswith("part-"))
    ]
    kinds = {path.suffix == ".parquet" for path in parts}
    if len(kinds) != 1:
        stop(
            f"{folder} is a folder and holds {'parquet beside other' if kinds else 'no'} parts of "
            "a table; expected files like part-00000.csv or part-00000.parquet"
        )
    return parts


def is_table(name: str) -> bool:
    """True for a name of a file that can be read as a table."""
    return bool(re.search(r"\.(csv|tsv|txt|inter|item)(\.gz)?$|\.parquet$", name))


def rows_of_text(
    path: Path, form: Form, header: list[str], names: list[str], notes: list[str]
) -> tuple[pl.DataFrame, np.ndarray | None]:
    """The columns of a file of text and each row's line, None where it is its number.

    Who writes without quotes leaves those of a text as they are ("5 apples), so the file is no csv.
    Where every line has its cells and no quote opens one that is asked for, both ways of writing
    mean the same rows, and a note says so.
    """
    if rows := quick_rows(path, form, header, names):
        return rows
    try:
        return careful_rows(path, form, header, names)
    except ClickException:
        rows = quick_rows(path, form, header, names, as_signs=True)
        if not rows:
            raise
    notes.append(f"{path.name}: quotes do not close as in csv, so each line is read as one row")
    return rows


# ---------------------------------------------------------------- all at once


def quick_rows(
    path: Path, form: Form, header: list[str], names: list[str], as_signs: bool = False
) -> tuple[pl.DataFrame, np.ndarray | None] | None:
    """The columns of a plain file, by polars: 22 million rows in seconds; and each row's line
    where it is not its number.

    None where anything is out of the ordinary (a quote, a cell too many, not UTF-8): then
    careful_rows, line by line, reads it or says what is wrong. as_signs: a quote is a sign like any
    other, unless it opens one of these cells.
    """
    place = {name: header.index(name) for name in names if name in header}
    if form.encoding != "utf-8-sig" or len(set(header)) < len(header) or form.headers > 1:
        return None
    rows = polars_rows(path, form.separator, form.above, len(header), list(place.values()))
    if rows is None or not len(rows):
        return None
    quote = '^"' if as_signs else '"'
    if form.quoted and any(
        column.str.contains(quote, literal=not as_signs).any() for column in rows
    ):
        return None
    kept = whole_lines(path, form, len(header), as_signs)
    if kept is None:
        return None
    lines = None
    if len(kept) < len(rows):  # blank lines
        rows, lines = rows[kept], kept + form.above + 1
    rows = rows.fill_null("")
    columns = [
        pl.col(str(i)).str.strip_chars().alias(name)
        for name, i in sorted(place.items(), key=lambda item: item[1])
    ]
    return rows.select(columns), lines


def polars_rows(
    path: Path, separator: str, skipped: int, width: int, places: list[int]
) -> pl.DataFrame | None:
    """The columns of text at some places, None if polars refuses the file."""
    try:
        return pl.read_csv(
            path,
            separator=separator,
            has_header=False,
            skip_lines=skipped,
            infer_schema=False,
            quote_char=None,
            raise_if_empty=False,
            schema={str(i): pl.String for i in range(width)},
            columns=sorted(places),
            glob=False,
        )
    except (OSError, ValueError, EOFError, zlib.error, pl.exceptions.PolarsError):
        return None


def whole_lines(path: Path, form: Form, width: int, as_signs: bool) -> np.ndarray | None:
    """The places, below the header, of the lines that hold anything; None if one of them has too
    many or too few cells, or ends within a quoted cell (unless as_signs: see quick_rows). Polars
    looks for too many only in the first line, where it reads some of the columns.
    """
    lines = polars_rows(path, NO_SEPARATOR, form.above, 1, [0])
    if lines is None:
        return None
    line = lines["0"].fill_null("").str.strip_chars_end("\r")
    blank = line.str.strip_chars(f" {form.separator}") == ""
    if (~blank & (line.str.count_matches(form.separator, literal=True) != width - 1)).any():
        return None
    quoted = form.quoted and not as_signs
    if quoted and (line.str.count_matches('"', literal=True) % 2 == 1).any():
        return None
    return np.flatnonzero(~blank.to_numpy())


def tail_of(path: Path) -> bytes:
    """The last bytes of a file that is not packed; of a packed one nothing."""
    if path.suffix == ".gz":
        return b""
    with open(path, "rb") as f:
        size = f.seek(0, 2)
        f.seek(max(0, size - HEAD))
        return f.read()


def stop_if_cut(path: Path, form: Form, header: list[str], rows: pl.DataFrame) -> None:
    """Stops if the last line has no end and too few cells, or ends with a time of fewer digits than
    every other: there the file was cut.
    """
    tail = tail_of(path)
    if form.encoding != "utf-8-sig" or not tail or tail.endswith((b"\n", b"\r")) or len(rows) < 3:
        return
    line = tail.rpartition(b"\n")[2].decode(errors="replace").rstrip()
    cells = line.split(form.separator)
    column = rows[header[-1]] if header[-1] in rows.columns else None
    is_short = len(cells) < len(header) and '"' not in line
    if column is not None and column.str.contains("^[0-9]+$").all():
        others = column.head(-1).str.len_bytes().min() or 0
        is_short |= len(column[-1]) < others and others >= DIGITS_OF_A_TIME
    if is_short:
        stop(
            f"{path}: its last line, {line[-80:]!r}, has no end and is shorter than the others, so "
            "the file was cut; copy it again, or leave out that line"
        )


# ---------------------------------------------------------------- line by line


def careful_rows(
    path: Path, form: Form, header: list[str], names: list[str], most: int | None = None
) -> tuple[pl.DataFrame, np.ndarray]:
    """The columns of a file and each row's line, with a sentence for whatever is wrong. most: rows
    that are read, None for all.
    """
    asked = [name for name in names if name in header]
    for name in asked:
        if header.count(name) > 1:
            stop(f"{path}: the header names {name} twice; give each column a name of its own")
    places = [header.index(name) for name in asked]
    cells, lines = [[] for _ in asked], []
    for line, row in islice(rows_by_line(path, form, len(header)), most):
        lines.append(line)
        for column, at in zip(cells, places):
            # an id occurs on many rows and is kept once
            column.append(sys.intern(row[at].strip()))
    columns = {name: pl.Series(column, dtype=pl.String) for name, column in zip(asked, cells)}
    return pl.DataFrame(columns), np.array(lines, np.int64)


def rows_by_line(path: Path, form: Form, width: int) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells) of the rows below the header. Lines without anything are left out."""
    csv.field_size_limit(LONGEST_CELL)
    number = 0
    try:
        with open_text(path, form) as f:
            for _ in range(form.skipped):
                f.readline()
            number = form.skipped
            for number, row in split_rows(f, form):
                if number <= form.above or not any(cell.strip() for cell in row):
                    continue
                if len(row) != width:
                    stop_at_width(path, number, len(row), width, form)
                yield number, row
    except UnicodeDecodeError:
        stop_at_bad_byte(path, form)
    except csv.Error as bad:
        stop(
            f"{path}, line {number + 1} or below: {bad}; write the file as plain csv, a quote "
            "inside a quoted cell doubled"
        )
    except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
        stop_at_broken_gzip(path, bad)


def split_rows(f: TextIO, form: Form) -> Iterator[tuple[int, list[str]]]:
    """Yields (line, cells) of an open file from where it stands; the header is one of them."""
    if form.quoted:
        reader = csv.reader(f, delimiter=form.separator, strict=True)
        for row in reader:
            yield reader.line_num + form.skipped, row
        return
    for number, line in enumerate(f, form.skipped + 1):
        yield number, line.rstrip("\r\n").split(form.separator)


# ---------------------------------------------------------------- parquet


def read_parquet(path: Path, names: list[str]) -> Table:
    """Those of the columns `names` that a parquet file has; text without blanks around it."""
    try:
        header = list(pl.read_parquet_schema(path))
        asked = [name for name in dict.fromkeys(names) if name in header]  # ids may be titles too
        rows = pl.read_parquet(path, columns=asked)
    except (OSError, pl.exceptions.PolarsError) as bad:
        stop(f"{path} cannot be read as parquet ({str(bad).splitlines()[0][:150]}); write it again")
    notes = []
    for name in rows.columns:
        column = rows[name]
        if column.dtype == pl.Binary:
            rows = rows.with_columns(text_of_bytes(path, column, notes))
        elif column.dtype in (pl.Categorical, pl.Enum):  # a category is its text
            rows = rows.with_columns(column.cast(pl.String))
        elif column.dtype.is_float():  # no number is no value
            rows = rows.with_columns(column.fill_nan(None))
    rows = rows.with_columns(pl.col(pl.String).str.strip_chars())
    return Table(path, header, rows, lambda row: f"{path}, row {row + 1}", notes, {})


def as_text(column: pl.Series) -> pl.Series | None:
    """A column as text, null where it has no value; None of a kind that has no text: lists, spans
    of time."""
    if column.dtype.is_nested():  # a list becomes text that nobody wrote
        return None
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError:
        return None


def text_of_bytes(path: Path, column: pl.Series, notes: list[str]) -> pl.Series:
    """A column of bytes as text: UTF-8, or hexadecimal where all have one length, as UUIDs have."""
    try:
        return column.cast(pl.String)
    except pl.exceptions.ComputeError:
        if column.bin.size().drop_nulls().n_unique() > 1:
            stop(
                f"{path}: the column {column.name} holds bytes that are not UTF-8, expected text; "
                "write it again as text"
            )
    notes.append(f"{path.name}: the bytes of {column.name} are read as hexadecimal numbers")
    return column.bin.encode("hex")
