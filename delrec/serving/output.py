"""Answers leave this process: on screen, or in a file. What was scored is never lost to a full
disk, a closed pipe or a letter that cannot be shown.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from delrec.runtime import stop


def json_line(value: Any, encoding: str = "utf-8") -> str:
    """A value as one line of JSON; with escapes where the encoding lacks a letter."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(value)
    return line


def say(*lines: str) -> None:
    """Prints lines, letters that the terminal lacks escaped; to stderr where stdout's disk is
    full.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(f"{line}\n" for line in lines)
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on; click ends the process
        raise
    except OSError as bad:
        sys.stdout = sys.stderr  # what is left in its buffer is not tried again at the end
        click.echo(text, err=True, nl=False)
        stop(f"the output cannot be written ({bad.strerror}); the answer stands above instead")


def say_json(*values: Any) -> None:
    """Prints values as JSON, one a line."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    say(*(json_line(value, encoding) for value in values))


class AnswerFile:
    """A file of answers, one a line, written as they come: beside its place until all are there.

    From the first answer that cannot be written on, they are printed.
    """

    def __init__(self, out: Path, requests: Path):
        self.out, self.path = out, Path(f"{out}.tmp")
        self.lines: list[str] = []  # of all answers
        self.size = 0  # bytes of the lines that are written
        self.bad: OSError | None = None  # why the file ends early
        if out.is_dir() or (out.exists() and requests.exists() and out.samefile(requests)):
            kind = "a folder" if out.is_dir() else "the file of the requests itself"
            stop(f"{out} is {kind}; name another file for the answers with --out")
        if out.parent == Path("/dev") or (out.exists() and not out.is_file()):
            self.path = out  # a device or a pipe, which nothing may take the place of
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "wb", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as bad:
            stop(f"{out} cannot be written ({bad.strerror}); name another file with --out")

    def add(self, answers: list[dict]) -> None:
        """Writes answers."""
        lines = [json_line(answer) + "\n" for answer in answers]
        self.lines += lines
        if self.bad is None:
            try:
                self.write("".join(lines).encode())
                return
            except OSError as bad:
                self.bad = bad
                if self.path.is_file():
                    os.truncate(self.path, self.size)  # no half line stays
        say_json(*answers)

    def write(self, data: bytes) -> None:
        """Writes bytes, all of them."""
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.size += len(data)

    def close(self) -> None:
        """Puts the file in its place."""
        if self.bad is None and self.path != self.out:
            try:
                os.fsync(self.file.fileno())
            except OSError as bad:  # some systems notice a full disk only now
                self.bad = bad
                say_json(*map(json.loads, self.lines))
        self.file.close()
        if self.bad:
            stop(
                f"{self.path} cannot be written ({self.bad.strerror}); the answers that are not in "
                "it are printed above, free the space or name another file with --out"
            )
        if self.path == self.out:
            return
        try:
            os.replace(self.path, self.out)
        except OSError as bad:
            stop(f"{self.out} cannot be replaced ({bad.strerror}); the answers are in {self.path}")

    def give_up(self) -> None:
        """Says where the answers are that were scored before something else failed."""
        self.file.close()
        if self.lines:
            click.echo(f"{len(self.lines)} answers were scored and stand in {self.path}", err=True)
        elif self.path != self.out:
            self.path.unlink(missing_ok=True)
