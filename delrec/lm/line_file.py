"""A file of lines that several processes add to: one at a time, and a kill loses a line at most."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl  # locks that die with their owner
except ImportError:  # not on Windows: there nobody waits for another process
    fcntl = None


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[BinaryIO]:
    """A file open to be added to, made if it is not there. No other process adds to it then."""
    with open(path, "a+b") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def lines_from(path: Path, begin: int) -> tuple[bytes, int]:
    """The whole lines of a file from a byte on, and where they end; none of a file that is not
    there."""
    if not path.exists():
        return b"", 0
    begin = begin if begin <= os.path.getsize(path) else 0  # it was made anew
    with open(path, "rb") as file:
        file.seek(begin)
        found = file.read()
    size = found.rfind(b"\n") + 1
    return found[:size], begin + size


def add_lines(file: BinaryIO, lines: list[str]) -> None:
    """Adds lines to a file that alone_with opened. A line that somebody was killed in stays, as one
    that cannot be read."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        lines = lines if file.read(1) == b"\n" else ["", *lines]
    file.write("".join(f"{line}\n" for line in lines).encode())
    file.flush()
    os.fsync(file.fileno())
