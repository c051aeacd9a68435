"""Files read and written whole, and the one way in which a command refuses."""

import contextlib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import click
import numpy as np
import torch

# of a file system that cannot set room aside
CANNOT = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
NOT_ALLOWED = {errno.EACCES, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT}
NO_HOME = (
    "there is no folder for what is fetched and kept (HOME is not set, and the system does not "
    "know this user): set HOME or XDG_CACHE_HOME to a folder that can be written"
)
PROBE = 2**20  # bytes that a folder must have room for before work begins


def stop(sentence: str) -> NoReturn:
    """The one way a script refuses: a sentence with what was found, what was expected and what to
    do; exit code 1.
    """
    raise click.ClickException(sentence)


def first_line(bad: BaseException, most: int = 150) -> str:
    """An exception in one line: its type and the first line of its words, `most` characters."""
    return f"{type(bad).__name__}: {(str(bad).strip().splitlines() or ['no message'])[0][:most]}"


class Script(click.Command):
    """A command that says in a sentence what the system did not allow: a file that may not be
    opened, a full disk."""

    def invoke(self, ctx: click.Context) -> Any:
        """What the command returns."""
        try:
            return super().invoke(ctx)
        except OSError as bad:
            if (sentence := said_by_system(bad)) is None:
                raise
            stop(sentence)


def described(doc: str) -> dict[str, Any]:
    """click's settings for a script whose --help is its file's docstring: lines that are indented
    (examples) stay as they are, others are wrapped.
    """
    paragraphs = [
        "\b\n" + p if any(line.startswith("    ") for line in p.splitlines()) else p
        for p in doc.strip().split("\n\n")
    ]
    return {
        "cls": Script,
        "help": "\n\n".join(paragraphs),
        "context_settings": {"show_default": True, "max_content_width": 140},
    }


def whole_or_auto(
    ctx: click.Context, param: click.Parameter, value: int | str | None
) -> int | str | None:
    """The value of an option that is a number above 0, 'auto', or not given: click's callback."""
    return value if value in ("auto", None) else click.IntRange(1).convert(value, param, ctx)


# ------------------------------------------------ what the system does not allow


def said_by_system(bad: OSError) -> str | None:
    """The sentence about a file that may not be opened, or that found no room; None about any other
    error."""
    where = bad.filename2 or bad.filename or "a file"
    if str(where).startswith(os.devnull):
        return NO_HOME
    if bad.errno in NOT_ALLOWED:
        return not_allowed(where)
    if bad.errno == errno.EROFS:
        return f"{where} cannot be written: its file system is read-only; name another folder"
    if bad.errno in FULL:
        return f"{where} cannot be written: no space is left there; free some and run this again"
    return None


def not_allowed(path: Path | str) -> str:
    """The sentence about what this user may not open, with its owner and its mode."""
    return (
        f"{path} may not be opened by this user ({owner_and_mode(path)}); "
        "ask its owner for access, or work on a copy"
    )


def owner_and_mode(path: Path | str) -> str:
    """Whose a file is and who may use it, as words: of the file itself, or of the folder that hides
    it or that it was to stand in."""
    path = Path(os.path.abspath(path))
    for place in (path, *path.parents):
        try:
            found = os.stat(place)
        except OSError:
            continue
        about = f"mode {stat.S_IMODE(found.st_mode):04o}, owner {name_of_user(found.st_uid)}"
        return about if place == path else f"{place} has {about}"
    return "no folder above it can be seen"


def name_of_user(uid: int) -> str:
    """A user's name; the number where there is none."""
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):  # not on Windows; a number without an entry
        return str(uid)


def why_not_writable(folder: Path | str) -> str | None:
    """Why nothing can be written into a folder, which may not be there yet, as a sentence; None
    where something can."""
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if str(place) == os.devnull:
        return NO_HOME
    if not place.is_dir():
        return f"{folder} cannot be written: {place} is no folder; name another one"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(PROBE))
            file.flush()
    except OSError as bad:
        if bad.errno in NOT_ALLOWED:
            return f"{folder} cannot be written by this user ({owner_and_mode(folder)})"
        bad.filename = str(folder)
        return said_by_system(bad) or f"{folder} cannot be written ({first_line(bad)})"
    return None


def must_be_writable(folder: Path | str) -> None:
    """Stops where nothing can be written into a folder: asked before the work."""
    if why := why_not_writable(folder):
        stop(f"{why}; name another folder, or ask for access" if "by this user" in why else why)


# ------------------------------------------------ reading


def unreadable(path: Path | str, kind: str, bad: Exception, again: str = "make it") -> NoReturn:
    """Stops: a file cannot be read as what it should be, or may not be read by this user."""
    if isinstance(bad, PermissionError) or isinstance(bad, OSError) and bad.errno in NOT_ALLOWED:
        stop(not_allowed(path))
    stop(f"{path} cannot be read as {kind} ({str(bad).splitlines()[0][:120]}); {again} again")


def read_npy(path: Path | str, shape: tuple[int | None, ...] | None = None) -> np.ndarray:
    """An .npy file, memory-mapped, never unpickled. shape: what it must have, None where anything
    goes.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as bad:
        unreadable(path, "an array", bad)
    if shape is not None and (
        array.ndim != len(shape)
        or any(want is not None and have != want for have, want in zip(array.shape, shape))
    ):
        stop(
            f"{path} has shape {array.shape}, expected "
            f"({', '.join('any' if n is None else str(n) for n in shape)}); it belongs to "
            "other "
            "data, make it again"
        )
    return array


def read_json(path: Path | str) -> Any:
    """What a JSON file holds; one that cannot be read is refused."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as bad:
        unreadable(path, "JSON", bad)


def read_tensors(path: Path | str, *only: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file by name: all, or those of `only` that it has. One that
    cannot be read is refused.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open(path, "rb").close()  # safetensors says of a file it may not open that there is none
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name in only or not only]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as bad:
        unreadable(path, "safetensors", bad, "train it")


# ------------------------------------------------ writing


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """The name under which a file is to be written; then it is renamed to `path`. Whole or not at
    all, and never met by another process that writes the same file."""
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    except OSError as bad:
        tmp.unlink(missing_ok=True)
        if bad.filename is None or bad.filename == str(tmp):  # a full disk names no file
            bad.filename = str(path)
        raise
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path | str, mode: str = "w") -> Iterator[IO]:
    """A file open to be written, whole or not at all: under another name, flushed, renamed."""
    kind = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with replacing(path) as tmp, open(tmp, mode, **kind) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path | str, value: Any) -> None:
    """Writes a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Writes a text as UTF-8, whole or not at all."""
    with writing(path) as file:
        file.write(text)


def write_npy(path: Path | str, array: np.ndarray) -> None:
    """Writes an array as .npy, whole or not at all."""
    with writing(path, "wb") as file:
        np.save(file, array)


def new_npy(path: Path | str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A new .npy file of zeros, memory-mapped, to be filled bit by bit. Its room is set aside now
    where the system can: a disk that is full later would end the process without a word."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    try:
        with open(path, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    except OSError as bad:
        if bad.errno not in CANNOT:
            Path(path).unlink()
            bad.filename = str(path)
            raise
    return array


def write_tensors(path: Path | str, tensors: dict[str, torch.Tensor]) -> None:
    """Writes tensors as safetensors, whole or not at all, as readable as every other file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as tmp:
        try:
            save_file(tensors, tmp)
        except SafetensorError as bad:  # its words hold what the system said
            raise OSError(number_in(str(bad)), str(bad), str(path)) from bad
        follow_umask(tmp)
        with open(tmp, "r+b") as file:
            os.fsync(file.fileno())


def number_in(words: str) -> int | None:
    """The system's number of an error in a library's words, such as 'No space left on device (os
    error 28)'."""
    found = words.partition("(os error ")[2].partition(")")[0]
    return int(found) if found.isdigit() else None


def follow_umask(path: Path) -> None:
    """Makes a file, or every file of a folder, as readable as what this user writes usually is:
    safetensors writes under a name of its own, for the owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(0o666 & ~umask)
