"""What the commands that a refusal prints are made of. They work as they stand on whatever a log's
table is: one file or several, packed or not, of any separator and encoding.
"""

import codecs
import json
import re
import shlex
from itertools import groupby
from pathlib import Path

from delrec.data.forms import form_of, head_of, is_wide
from delrec.data.tables import parts_of_spark

MANY = 3  # files of which a pattern is shorter than their names
# rows that hold nothing are none, as everywhere
NOT_BLANK = ".filter(~p.all_horizontal(p.all().is_null()))"
# a name that holds a line break is read with a blank there
ONE_LINE = '.rename(lambda name: " ".join(name.split()))'


def files_in(paths: list[Path]) -> list[Path]:
    """The files of some paths, those in folders one by one."""
    return [file for p in paths for file in (parts_of_spark(p) if p.is_dir() else [p])]


def new_table(paths: list[Path], word: str, end: str = ".csv") -> Path:
    """Where a command writes what it makes of a table: beside its file, or, if it is several,
    beside their folder, in which one more file would be read as a part.
    """
    first = paths[0]
    folder = first if first.is_dir() else first.parent
    if first.is_file() and len(paths) == 1:
        return first.with_name(f"{first.name.split('.')[0]}-{word}{end}")
    folder = folder if folder.name.strip(".") else folder.resolve()
    return folder.with_name(f"{folder.name.split('.')[0]}-{word}{end}")


def pattern_of(files: list[Path]) -> tuple[Path, str] | None:
    """The folder and the pattern that names some files and no other that holds anything, None
    where there is no such pattern, or they are few.
    """
    folder = files[0].parent
    found = [p for p in sorted(folder.glob("part-*")) if p.is_file() and p.stat().st_size]
    return (folder, "part-*") if len(files) > MANY and found == sorted(files) else None


# ---------------------------------------------------------------- in the shell


def lines_of(paths: list[Path], encoding: str | None) -> str:
    """The command that prints the lines of a table's files, one file after another: unpacked,
    without byte order marks and without lines above the header, each with an end.
    """
    files = files_in(paths)
    encodings = {form_of(file, [], encoding)[0].encoding for file in files}
    ways = groupby(files, lambda file: way_of(file, encoding, is_mixed=len(encodings) > 1))
    loops = []
    for (first, *rest), group in ways:
        if len(files) == 1:
            return " | ".join([f"{first} {shlex.quote(str(files[0]))}", *rest])
        group = list(group)
        names = " ".join(shlex.quote(str(file)) for file in group)
        if found := pattern_of(group):
            names = f"{shlex.quote(str(found[0]))}/{found[1]}"
        # awk 1 ends the last line of a file that does not end it
        steps = " | ".join([f'{first} "$f"', *rest, "awk 1"])
        loops.append(f"for f in {names}; do {steps}; done")
    return loops[0] if len(loops) == 1 else f"{{ {'; '.join(loops)}; }}"


def way_of(file: Path, encoding: str | None, is_mixed: bool) -> tuple[str, ...]:
    """The commands that, one after another, print a file. is_mixed: do others of the table have
    another encoding?
    """
    form, head = form_of(file, [], encoding)[0], head_of(file)
    way = ["gunzip -c" if file.suffix == ".gz" else "cat"]
    if form.encoding == "utf-8-sig":
        if head.startswith(codecs.BOM_UTF8):
            way.append("tail -c +4")
    elif is_mixed or is_wide(form.encoding):
        # an encoding that has ASCII's bytes stays, the command behind names it
        name = re.sub("-([bl]e)$", r"\1", codecs.lookup(form.encoding).name)
        way.append(f"iconv -f {name} -t UTF-8")
    if form.skipped:
        way.append(f"tail -n +{form.skipped + 1}")
    return tuple(way)


# ---------------------------------------------------------------- in Python


def frame_of(paths: list[Path], encoding: str | None) -> str:
    """Python's expression of a table as a frame of polars, its cells text; p is polars."""
    files = files_in(paths)
    if len(files) == 1:
        return call_for(literal(str(files[0])), files[0], encoding)
    calls = []
    for call, group in groupby(files, lambda file: call_for("f", file, encoding)):
        group = list(group)
        names = literal([str(file) for file in group])
        if found := pattern_of(group):
            folder = f'__import__("pathlib").Path({literal(str(found[0]))})'
            names = f"sorted({folder}.glob({literal(found[1])})) if f.stat().st_size"
        calls.append(f"*[{call} for f in {names}]")
    return f"p.concat([{', '.join(calls)}], how={literal('diagonal_relaxed')})"


def call_for(file: str, path: Path, encoding: str | None) -> str:
    """Python's expression of one file as a frame. file: the expression of its name."""
    if path.suffix == ".parquet":
        return f"p.read_parquet({file})"
    form = form_of(path, [], encoding)[0]
    flags = ["infer_schema=False"]
    if form.separator != ",":
        flags.append(f"separator={literal(form.separator)}")
    if not form.quoted:
        flags.append("quote_char=None")
    if form.skipped:
        flags.append(f"skip_lines={form.skipped}")
    if form.encoding != "utf-8-sig":
        opener = '__import__("gzip").open' if path.suffix == ".gz" else "open"
        file = f'{opener}({file}, "rb").read().decode("{form.encoding}").encode()'
    names = ONE_LINE if form.headers > 1 else ""
    return f"p.read_csv({', '.join([file, *flags])}){names}{NOT_BLANK}"


def literal(value: str | list[str]) -> str:
    """Python's text or list of texts in double quotes, which the shell's single ones keep."""
    return json.dumps(value, ensure_ascii=False)


def python(code: str) -> str:
    """The command that runs some code, in which p is polars."""
    return f"python -c {shlex.quote(f'import polars as p; {code}')}"
