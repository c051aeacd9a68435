"""Histories as they are given: a file of requests, a line each; or one, as text or as JSON."""

import codecs
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delrec.data.prepared import Data
from delrec.runtime import stop
from delrec.serving.lookup import Asked, Found, Lookup, told

EXPECTED = '{"history": ["title or id", ..]} or {"history": "title | title"}'
OURS = ("history_ids", "top", "unknown", "remarks", "error")  # what an answer adds to a request


def found_in(history: Any, lookup: Lookup) -> Found:
    """The items of a history: 'title | title', or a list of names. A name is a text (a title or a
    raw id), a whole number (a raw id), {"id": ..} or {"title": ..}. Raises ValueError for others.
    """
    if isinstance(history, str):
        names, remarks = lookup.split(history)
        found = lookup.find(names)
        return Found(found.items, found.unknown, remarks + found.remarks)
    if not isinstance(history, list):
        raise ValueError(f"the history is {json.dumps(history)[:60]}, expected a list or a text")
    return lookup.find([asked_of(name) for name in history])


def asked_of(name: Any) -> Asked:
    """One name of a list."""
    if isinstance(name, str):
        return Asked(name)
    if is_whole(name):
        return Asked(str(name), "id")
    if isinstance(name, dict):
        if isinstance(name.get("id"), str) or is_whole(name.get("id")):
            return Asked(str(name["id"]), "id")
        if isinstance(name.get("title"), str):
            return Asked(name["title"], "title")
    raise ValueError(
        f"the history holds {json.dumps(name)[:60]}, expected titles or ids, as text or as "
        '{"id": ..} or {"title": ..}'
    )


def is_whole(value: Any) -> bool:
    """Is it a whole number? (To Python, true and false are too.)"""
    return isinstance(value, int) and not isinstance(value, bool)


def catalogue_of(data: Data) -> str:
    """Where the titles and ids stand that a history may hold, in words."""
    core = data.meta.get("core", 1)
    rare = f"; items with fewer than {core} interactions are not in it" if core > 1 else ""
    return f"{data.folder / 'titles.txt'} or ids of {data.folder / 'raw_items.txt'}{rare}"


def history_of_json(text: str) -> list:
    """The list that --history-json holds."""
    try:
        history = json.loads(text)
    except (ValueError, RecursionError) as bad:
        stop(f'--history-json is no JSON ({bad}); give a list, \'["title", {{"id": "12"}}]\'')
    if not isinstance(history, list):
        stop('--history-json holds no list; give \'["title", {"id": "12"}]\'')
    return history


# ---------------------------------------------------------------- a file


@dataclass
class Request:
    """One line of a file of histories."""

    line: int  # its number
    given: dict  # what the line holds; the answer repeats it
    found: Found = field(default_factory=lambda: Found([], [], []))
    error: str | None = None  # why it cannot be read, with the line's number


def read_requests(path: Path | str, data: Data, lookup: Lookup) -> list[Request]:
    """The requests of a file, one for each line that is not blank; a file without a single known
    title is refused.
    """
    try:
        text = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as bad:
        stop(f"{path} cannot be read ({bad.strerror}); give a file of JSON objects, one a line")
    # bytes end a line at CR and LF only: JSON may hold Unicode's other line ends
    lines = enumerate(text.splitlines(), 1)
    requests = [request_of(n, line, lookup) for n, line in lines if line.strip()]
    if not any(request.found.items for request in requests):
        first = "it is empty"
        if requests:
            unknown = told(requests[0].found.unknown)
            first = requests[0].error or f"line {requests[0].line}: {unknown or 'none given'}"
        stop(f"no line of {path} has a known title ({first}); give titles of {catalogue_of(data)}")
    return requests


def request_of(n: int, line: bytes, lookup: Lookup) -> Request:
    """The request of line n."""
    given = {}
    try:
        given = object_of(line)
        if "history" not in given:
            raise ValueError(f'it holds no "history"; expected {EXPECTED}')
        return Request(n, given, found_in(given["history"], lookup))
    except (ValueError, RecursionError) as bad:
        return Request(n, given, error=f"line {n}: {bad}")


def object_of(line: bytes) -> dict:
    """The object of a line, without the keys of an earlier answer."""
    try:
        text = line.decode()
    except UnicodeDecodeError as bad:
        raise ValueError(f"byte 0x{line[bad.start]:02x} is not UTF-8") from bad
    try:
        given = json.loads(text)
        json.dumps(given)  # the answer repeats it: what cannot be written is not read
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"{text[:60]!r} is no JSON object; expected {EXPECTED}")
    return {key: value for key, value in given.items() if key not in OURS}
