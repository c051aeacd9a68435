"""Tables in JSON: one record a line (packed or not), or one list of records."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl

from delrec.data.forms import head_of, open_bytes
from delrec.data.raw_files import place_in, records, without_halves
from delrec.data.tables import Table
from delrec.runtime import stop

ENDS = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
LOOKED_AT = 1000  # records whose entries are the header


def is_json(path: Path) -> bool:
    """True for a name of a file of JSON."""
    return path.name.lower().endswith(ENDS)


def read_json_table(path: Path, names: list[str]) -> Table:
    """Those of the entries `names` that the records of a file have, as text without blanks around
    it; what a record lacks is blank.
    """
    columns = {name: [] for name in names}
    lines, header, notes = [], {}, []
    for line, record in records_of(path, notes):
        if len(lines) < LOOKED_AT:
            header |= dict.fromkeys(map(str, record))
        lines.append(line)
        for name, column in columns.items():
            column.append(text_of(record.get(name), name, path, line))
    if not lines:
        stop(f"{path} is empty, expected one record a line")
    rows = {
        name: pl.Series(column, dtype=pl.String)
        for name, column in columns.items()
        if name in header or any(column)
    }
    place = place_in(path, np.array(lines))
    return Table(path, list(header), pl.DataFrame(rows), place, notes, {})


def records_of(path: Path, notes: list[str]) -> Iterator[tuple[int, dict]]:
    """Yields (line, record) of records one a line, and (number, record) of one list of them."""
    if not head_of(path).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from records(path, notes)
        return
    try:
        with open_bytes(path) as f:
            text = f.read().decode("utf-8-sig")
        found = json.loads(text)
    except ValueError as bad:
        stop(f"{path} is no whole list of JSON ({bad}); copy it again, or write one record a line")
    if "\\u" in text:
        found = without_halves(found)
    for number, record in enumerate(found, 1):
        if not isinstance(record, dict):
            stop(f"{path}, record {number}: expected names and values, such as {{'user': 1}}")
        yield number, record


def text_of(value: object, name: str, path: Path, line: int) -> str:
    """An entry as text; one that holds several is refused."""
    if value is None:
        return ""
    if isinstance(value, dict) and len(value) == 1:  # a data base's {'$oid': ..}, {'$date': ..}
        value = next(iter(value.values()))
    if isinstance(value, (dict, list)):
        stop(
            f"{path}, line {line}: {name} holds {json.dumps(value)[:60]}, expected one value; "
            "write one record for each"
        )
    return str(value).strip()
