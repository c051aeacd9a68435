"""Raw files of publishers as they lie there: below a folder, inside a zip, one record a line; their
cells checked.
"""

import ast
import gzip
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import polars as pl
from tqdm import tqdm

from delrec.data.forms import open_bytes, stop_at_broken_gzip
from delrec.data.times import MISSING, Clock, Where, clock_of
from delrec.runtime import CACHE, stop

# one of them is in a line that names half a character: as an escape, or as bytes that json takes
ESCAPES = (b"\\u", b"\\U", b"\xed")


@dataclass(frozen=True)
class RawFile:
    """A file below a folder, or in a zip in it."""

    path: Path  # in a zip as if that were a folder: ml-1m.zip/ml-1m/ratings.dat
    size: int
    archive: Path | None = None  # the zip
    member: zipfile.ZipInfo | None = None  # in it


def find(folder: Path, *names: str, needed: bool = True) -> Path | None:
    """The first file of one of these names (or patterns) in a folder, below it, or in a zip in it,
    which is unpacked into the cache. None where there is none and it is not needed. Several of one
    name are refused, unless they are copies.
    """
    for look in (files_below, files_in_zips):
        for name in names:
            found = look(folder, name)
            if not are_copies(found):
                stop(
                    f"{folder} holds {listed(found, folder)}, which differ; move all but one of "
                    "them out of it"
                )
            if found:
                return on_disk(found[0])
    if needed:
        stop(
            f"{folder} holds no {' or '.join(names)}; put it there (data/README.md says where it "
            "comes from)"
        )
    return None


def are_copies(files: list[RawFile]) -> bool:
    """True unless two of the files hold different things."""
    if len(files) < 2:
        return True
    return len({file.size for file in files}) == 1 and len({crc_of(file) for file in files}) == 1


def crc_of(file: RawFile) -> int:
    """The CRC-32 of what a file holds, as zips have it."""
    if file.member:
        return file.member.CRC
    crc = 0
    with open(file.path, "rb") as f:
        while piece := f.read(2**20):
            crc = zlib.crc32(piece, crc)
    return crc


def listed(files: list[RawFile], folder: Path) -> str:
    """Where files stand in a folder, in words."""
    return " and ".join(str(file.path.relative_to(folder)) for file in files)


def files_below(folder: Path, *names: str) -> list[RawFile]:
    """The files of some names (or patterns) in a folder and below it, name by name."""
    found = [path for name in names for path in sorted(folder.rglob(name)) if path.is_file()]
    return [RawFile(path, path.stat().st_size) for path in found]


def files_in_zips(folder: Path, *names: str) -> list[RawFile]:
    """The same in the zips that lie in a folder."""
    found = []
    for archive in sorted(folder.glob("*.zip")):
        try:
            with zipfile.ZipFile(archive) as z:
                members = z.infolist()
        except zipfile.BadZipFile as bad:
            stop_at_broken_zip(archive, bad)
        found += [
            RawFile(archive / member.filename.lstrip("/"), member.file_size, archive, member)
            for member in members
        ]
    return [file for name in names for file in found if file.path.match(name)]


def on_disk(file: RawFile) -> Path:
    """The path of a file; one in a zip is unpacked into the cache, to a place that is named by what
    it holds: another zip may have the same name.
    """
    if file.member is None:
        return file.path
    path = CACHE / "raw" / f"{file.archive.stem}-{file.member.CRC:08x}" / file.path.name
    if path.exists() and path.stat().st_size == file.size:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            zipfile.ZipFile(file.archive) as z,
            z.open(file.member) as source,
            open(f"{path}.part", "wb") as target,
        ):
            shutil.copyfileobj(source, target, 2**20)
    except (zipfile.BadZipFile, zlib.error) as bad:
        stop_at_broken_zip(file.archive, bad)
    os.replace(f"{path}.part", path)
    return path


def stop_at_broken_zip(archive: Path, bad: Exception) -> NoReturn:
    """Stops at a zip that is not whole."""
    stop(f"{archive} is not a whole zip file ({bad}); download it again")


def records(path: Path, notes: list[str] | None = None) -> Iterator[tuple[int, dict]]:
    """Yields (line, record) of a file of JSON or Python literals, one a line (.gz or not), with a
    progress bar. Literals are parsed, never run. Lines that hold nothing are left out, and said in
    notes.
    """
    bar = tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=path.name,
        leave=False,
        disable=None,
    )
    empty = 0
    with open(path, "rb") as raw, bar:
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            for n, line in enumerate(lines, 1):
                if n % 20000 == 0:
                    bar.update(raw.tell() - bar.n)
                if not line.strip():
                    continue
                record = record_of(line, path, n)
                if record:
                    yield n, record
                else:
                    empty += 1
        except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
            stop_at_broken_gzip(path, bad)
    if empty and notes is not None:
        notes.append(f"{path.name}: {empty:,} lines hold null or an empty record")


def record_of(line: bytes, path: Path, n: int) -> dict | None:
    """The record of line n; None for a null."""
    try:
        record = json.loads(line)
    except ValueError:
        try:
            record = ast.literal_eval(line.decode("utf-8-sig"))
        except (ValueError, SyntaxError, UnicodeDecodeError, RecursionError, MemoryError):
            cut = "" if line.endswith(b"\n") else ", and it has no end: the file was cut"
            stop(
                f"{path}, line {n}: neither JSON nor a Python literal{cut}; download the file "
                "again, or write one record a line"
            )
    if record is not None and not isinstance(record, dict):
        kind = "a list" if isinstance(record, list) else type(record).__name__
        stop(
            f"{path}, line {n}: {kind} where a record was expected; write one record a line, such "
            'as {"asin": "B0001", "title": "Tea"}'
        )
    if any(sign in line for sign in ESCAPES):
        return without_halves(record)
    return record


def without_halves(value: object) -> object:
    """The same with texts that can be written: JSON and literals may name the two halves of a
    character beyond 16 bits (surrogates), which are joined; a half alone becomes U+FFFD.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_halves(one) for one in value]
    if isinstance(value, dict):
        return {without_halves(key): without_halves(one) for key, one in value.items()}
    return value


def value_of(record: dict, names: tuple[str, ...], path: Path, line: int) -> str:
    """The first of some entries that a record has, as text without blanks around it."""
    for name in names:
        value = record.get(name)
        if value is not None and str(value).strip() not in MISSING:
            return str(value).strip()
    stop(
        f"{path}, line {line}: the record has no {' or '.join(names)} (it has "
        f"{', '.join(map(str, list(record)[:8]))}); download the file again, or leave out the line"
    )


def place_in(path: Path, lines: Sequence[int] | np.ndarray) -> Where:
    """Says where a row stands. lines: of each row its line."""

    def place(row: int) -> str:
        return f"{path}, line {int(lines[row])}"

    return place


def clock_in(column: pl.Series, place: Where) -> Clock:
    """The times of a publisher's file."""
    return clock_of(column, "timestamp", place)


def stop_at_missing(columns: dict[str, pl.Series], place: Where) -> None:
    """Stops at the first cell without a value. columns: what they hold, in words -> cells."""
    for what, column in columns.items():
        missing = column.is_null() | column.is_in(MISSING)
        if missing.any():
            stop(
                f"{place(missing.arg_max())}: no {what}; download the file again, or leave out the "
                "line"
            )


def bytes_of(path: Path) -> bytes:
    """What a publisher's file holds (.gz or not)."""
    try:
        with open_bytes(path) as f:
            return f.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
        stop_at_broken_gzip(path, bad)


def lines_of(path: Path, notes: list[str]) -> list[str]:
    """The lines of a publisher's file (.gz or not): UTF-8, as it is when it was saved again, and
    latin-1 where a line is not, as some are published.
    """
    data = bytes_of(path)
    try:
        return data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        lines = [line_of(line) for line in data.split(b"\n")]
        notes.append(f"{path.name}: lines that are not UTF-8 are read as latin-1")
        return lines


def line_of(line: bytes) -> str:
    """The text of a line, UTF-8 or else latin-1."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def split_lines(
    path: Path, separator: str, names: dict[str, int], width: int, notes: list[str]
) -> tuple[pl.DataFrame, Where]:
    """Cells of a file, and where each row stands. names: our name -> the cell's place; width: how
    many cells a line has at least. Blank lines are left out, and a header that names a userID or
    an id.
    """
    lines = pl.Series(lines_of(path, notes)).str.strip_chars_end("\r")
    kept = np.flatnonzero((lines.str.strip_chars() != "").to_numpy())
    if len(kept) and re.match(r"(userid|id|user_id)\W", lines[int(kept[0])], re.IGNORECASE):
        kept = kept[1:]
    lines = lines[kept]
    place = place_in(path, kept + 1)
    if not len(lines):
        stop(f"{path} is empty; download it again")
    short = lines.str.count_matches(separator, literal=True) < width - 1
    if short.any():
        row = short.arg_max()
        cells = lines[row].split(separator)
        last = ", the last one: the file was cut" if row == len(lines) - 1 else ""
        stop(
            f"{place(row)}: {len(cells)} cells between {separator!r} where {width} are "
            f"expected{last}; download the file again, or leave out the line"
        )
    cells = lines.str.splitn(separator, width + 1).struct
    rows = {
        name: cells.field(f"field_{n}").str.strip_chars().rename(name) for name, n in names.items()
    }
    return pl.DataFrame(rows), place


def titles_from(item: pl.Series, title: pl.Series, place: Where) -> dict[str, str]:
    """{raw item id: title} of one row per item; an item with two titles is refused."""
    stop_at_missing({"item": item}, place)
    titles = {}
    for row, (i, t) in enumerate(zip(item, title.fill_null(""))):
        if titles.setdefault(i, t) != t:
            stop(
                f"{place(row)}: item {i!r} is there twice, as {titles[i][:60]!r} and {t[:60]!r}; "
                "expected one row per item, leave out one of them"
            )
    return titles
