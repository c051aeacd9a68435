"""How a file of text is written: packed or not, in which encoding, with which separator; and the
sentences about one that cannot be read.
"""

import codecs
import csv
import gzip
import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import NoReturn, TextIO

from delrec.runtime import stop

SEPARATORS = {",": "','", ";": "';'", "\t": "tabs", "|": "'|'"}
ATOMIC = (".inter", ".item")  # RecBole's: tabs, no quotes, a header of name:type
HEAD = 2**16  # bytes that are looked at to see what a file is
BINARY = {
    b"PK\x03\x04": "a zip file or an Excel sheet; unpack it, or save the sheet as csv",
    b"\xd0\xcf\x11\xe0": "an old Excel sheet; save it as csv",
    b"PAR1": "parquet; give its name the ending .parquet",
    b"\x28\xb5\x2f\xfd": "packed with zstd; unpack it: zstd -d FILE",
    b"\x1f\x8b": "packed with gzip; give its name the ending .gz",
    b"BZh": "packed with bzip2; unpack it: bunzip2 FILE",
    b"SQLite": "a data base; write the table as csv",
}


@dataclass
class Form:
    """How a file of text is written."""

    separator: str = ","
    quoted: bool = True  # may a cell stand in quotes?
    encoding: str = "utf-8-sig"
    skipped: int = 0  # lines before the header
    typed: bool = False  # a header of name:type
    headers: int = 1  # lines of the header; 0: the columns are known without one

    @property
    def above(self) -> int:
        """How many lines stand above the first row."""
        return self.skipped + self.headers


def head_of(path: Path) -> bytes:
    """The first bytes of a file, unpacked."""
    try:
        with open_bytes(path) as f:
            return f.read(HEAD)
    except OSError as bad:
        stop_at_unreadable(path, bad)
    except (EOFError, zlib.error) as bad:
        stop_at_broken_gzip(path, bad)


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A file, unpacked where its name ends with .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def open_text(path: Path, form: Form) -> TextIO:
    """A file of text, unpacked where its name ends with .gz."""
    newline = "" if form.quoted else "\n"  # a cell in quotes may hold any line break
    return io.TextIOWrapper(open_bytes(path), encoding=form.encoding, newline=newline)


def form_of(
    path: Path, names: list[str], encoding: str | None
) -> tuple[Form, list[str], dict[str, str]]:
    """How a file is written, its header, and RecBole's types of the columns. The separator is the
    one that finds most of the wanted names in the header, then most columns.
    """
    head = head_of(path)
    for magic, said in BINARY.items():
        if head.startswith(magic):
            if path.suffix == ".zip":
                said = (
                    f"a zip file; unpack it: unzip {quote(str(path))} -d {quote(str(path.parent))}"
                )
            stop(f"{path} is {said}")
    form = Form(encoding=encoding or "utf-8-sig")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        form.encoding = "utf-16"
    elif encoding and is_utf8(path, encoding):
        form.encoding = "utf-8-sig"
    elif b"\0" in head and not encoding:
        stop(f"{path} is no text (it holds zero bytes); save it as UTF-8, or say --encoding")
    lines = first_lines(path, form, head)
    while lines and (not lines[0].strip() or re.fullmatch(r"sep=.", lines[0].strip())):
        form.skipped += 1
        lines.pop(0)
    if not lines:
        stop(f"{path} is empty, expected a header line and rows")
    if path.suffix in ATOMIC:
        cells = [cell.partition(":") for cell in lines[0].split("\t")]
        form.separator, form.quoted, form.typed = "\t", False, True
        return form, [c[0].strip() for c in cells], {c[0].strip(): c[2].strip() for c in cells}
    headers = {separator: header_in(lines, separator) for separator in SEPARATORS}
    form.separator = max(
        headers, key=lambda s: (len(set(names) & set(headers[s][0])), len(headers[s][0]))
    )
    header, form.headers = headers[form.separator]
    return form, header, {}


def is_wide(encoding: str) -> bool:
    """True for UTF-16 and UTF-32; False for an encoding that does not exist."""
    try:
        return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    except LookupError:
        return False


def is_utf8(path: Path, encoding: str) -> bool:
    """True for a file that is UTF-8 and cannot be `encoding`, which is named for all files of a log
    and seldom of all: it holds letters beyond ASCII. Plain ASCII may be another encoding of 7 bits,
    and with zero bytes one of 16 or 32.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    is_ascii = True
    try:
        with open_bytes(path) as f:
            while piece := f.read(2**20):
                decoder.decode(piece)
                is_ascii &= piece.isascii()
                if b"\0" in piece:
                    return False
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError, EOFError, zlib.error):
        return False  # whoever reads the file says what is wrong with it
    return not is_ascii or is_wide(encoding)


def first_lines(path: Path, form: Form, head: bytes) -> list[str]:
    """The lines of a file's head."""
    try:
        text = codecs.getincrementaldecoder(form.encoding)().decode(head)
    except UnicodeDecodeError:
        stop_at_bad_byte(path, form)
    except LookupError:
        stop(f"--encoding {form.encoding}: no such encoding; utf-8, windows-1252, latin-1 are some")
    return re.split(r"\r\n|\n|\r", text)


def header_in(lines: list[str], separator: str) -> tuple[list[str], int]:
    """The names in the header that lines begin with, and on how many of them it stands: a name in
    quotes may hold line breaks, which are blanks here.
    """
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=separator, strict=True)
    try:
        cells = next(reader, [])
    except csv.Error:  # a quote that nothing closes
        return cells_of(lines[0], separator), 1
    return [re.sub(r"\s*\n\s*", " ", cell.strip()) for cell in cells], max(reader.line_num, 1)


def cells_of(line: str, separator: str) -> list[str]:
    """The names in a line."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return [cell.strip().strip('"') for cell in line.split(separator)]


def stop_at_width(path: Path, line: int, found: int, width: int, form: Form) -> NoReturn:
    """Stops at a line of too many or too few cells."""
    advice = "write the file again"
    if form.quoted and found > width:
        advice = f"put a cell that holds {SEPARATORS[form.separator]} in quotes"
    elif found < width:
        advice = "fill in what is missing; if it is the last line, the file was cut: copy it again"
    stop(f"{path}, line {line}: {found} cells where the header names {width}; {advice}")


def stop_at_bad_byte(path: Path, form: Form | None = None) -> NoReturn:
    """Stops with the line and the byte that is not of the encoding (None: UTF-8)."""
    encoding = form.encoding if form else "utf-8-sig"
    with open_bytes(path) as f:
        for n, line in enumerate(f, 1):
            try:
                line.decode("utf-8" if encoding == "utf-8-sig" else encoding)
            except UnicodeDecodeError as bad:
                byte = f"{path}, line {n}: byte 0x{line[bad.start]:02x} is not"
                if form is None:
                    stop(f"{byte} UTF-8; save the file as UTF-8")
                if encoding != "utf-8-sig":
                    stop(f"{byte} {encoding}; give another --encoding")
                stop(
                    f"{byte} UTF-8; save the file as UTF-8, or read a file of your own with "
                    "--encoding windows-1252 if it comes from Windows or Excel"
                )
    stop(f"{path} is not {encoding}; give another --encoding")


def stop_at_broken_gzip(path: Path, bad: Exception) -> NoReturn:
    """Stops at a packed file that is not whole."""
    stop(f"{path} is not a whole gzip file ({bad}); copy or download it again")


def stop_at_unreadable(path: Path, bad: OSError) -> NoReturn:
    """Stops at a file that cannot be opened."""
    if isinstance(bad, gzip.BadGzipFile):
        stop_at_broken_gzip(path, bad)
    stop(f"{path} cannot be read ({bad.strerror or bad}); is the name right, may you read it?")
