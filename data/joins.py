"""The command that joins two tables which tell an interaction together, such as orders and their
lines.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from click import ClickException

from delrec.data.hints import IDS, Request, guessed, plain
from delrec.data.json_tables import is_json
from delrec.data.own_files import FLAG_ITEMS, ITEMS, Files, with_new_log
from delrec.data.remedies import frame_of, literal, new_table, python
from delrec.data.tables import Table, is_table, joined, read_header, read_table
from delrec.runtime import stop

# names that say "the id of this table": the same one in two tables are ids of two things
BARE = re.compile(r"_?(id|no\.?|nr\.?|number|nummer|code|key|uuid|guid)")
PLURAL = "(s|es|n|en|e)?"


@dataclass
class Other:
    """A table beside the log that names what the log lacks."""

    paths: list[Path]  # its files
    keys: list[tuple[str, str]]  # the log's column and its own that hold the same ids
    told: bool  # do these keys make one row of a row?


def stop_at_half_of_a_row(table: Table, request: Request, files: Files, missing: list[str]) -> None:
    """Stops at one of two tables that tell an interaction together, with the command that joins
    them, or with the one that lacks no more than the key.
    """
    lacks = [
        role
        for role in ("user", "item")
        if role in missing and role not in guessed(table.header, [role])
    ]
    log = files.interactions
    if len(lacks) != 1 or any(is_json(path) or path.suffix == ".inter" for path in log):
        return
    tables = tables_beside(log)
    others = [
        other
        for paths in tables
        if (other := other_table(log, table.header, paths, lacks, request.encoding))
    ]
    if not others:
        return
    other = min(others, key=lambda other: not other.told)
    new = new_table(log, "joined")
    titles = [path for path in files.items if path not in other.paths]
    named = [p[0] for p in tables if ITEMS.search(p[0].name) and p != other.paths]
    read = replace(files, items=titles or named[:1])
    command, then = with_new_log(re.sub(FLAG_ITEMS, "", request.command), read, new)
    names = ", ".join(path.name for path in other.paths)
    if other.told:
        by = ", ".join(own if own == its else f"{own} = {its}" for own, its in other.keys)
        said, on = f"by {by}; join the two", other.keys
    else:
        said = (
            "and it cannot be told which columns of the two hold the same ids; put them in place "
            "of KEY and KEY_THERE and join the two"
        )
        on = [("KEY", "KEY_THERE")]
    code = python(join_of(log, other.paths, on, new, request.encoding))
    stop(
        f"{table.path} names no {lacks[0]}, but {names} does, {said}: {code}{then}; "
        f"and then: {command}"
    )


def tables_beside(log: list[Path]) -> list[list[Path]]:
    """The tables in the folder of a log, without its own files; those of one header are one."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for path in sorted(log[0].parent.iterdir()):
        # what such a command made before is no table of its own
        is_other = path not in log and path.suffix != ".inter" and "-joined." not in path.name
        if path.is_file() and is_table(path.name) and is_other:
            found.setdefault(tuple(read_header(path)), []).append(path)
    return list(found.values())


def other_table(
    log: list[Path], header: list[str], paths: list[Path], lacks: list[str], encoding: str | None
) -> Other | None:
    """What a table has to do with a log that lacks a role; None where it does not name it either,
    or where the two have no ids in common.
    """
    there = read_header(paths[0])
    shared = [name for name in header if name in there and plain(name).endswith(IDS)]
    if not guessed([name for name in there if name not in shared], lacks):
        return None
    keys = [(name, name) for name in shared if not BARE.fullmatch(plain(name))]
    # an id of the whole table, by the name that the other table has for it
    taken = {name for name, _ in keys}
    keys += [
        (own, its)
        for own in header
        for its in there
        if not {own, its} & taken and (names_it(log[0], own, its) or names_it(paths[0], its, own))
    ]
    if not keys:
        return Other(paths, [], told=False) if shared else None
    return Other(paths, keys, told=is_a_key(log, paths, keys, encoding))


def names_it(path: Path, own: str, foreign: str) -> bool:
    """True if `foreign` is what other tables call the id `own` of the table in a file: id of
    orders.csv is order_id elsewhere.
    """
    end = plain(own).strip("_.")
    if not BARE.fullmatch(plain(own)) or not plain(foreign).rstrip(".").endswith(end):
        return False
    thing = re.sub("[^a-z]", "", plain(foreign).rstrip(".").removesuffix(end)).removesuffix("y")
    words = re.split("[^a-z]+", plain(re.sub("([a-z])([A-Z])", r"\1_\2", path.name.split(".")[0])))
    words = [word for word in words if word]
    return bool(thing and words) and any(
        re.fullmatch(f"{thing}(y|ies|{PLURAL})", name) for name in (words[-1], "".join(words))
    )


def is_a_key(
    log: list[Path], paths: list[Path], keys: list[tuple[str, str]], encoding: str | None
) -> bool:
    """True if the keys name one row of at least one of two tables, and some rows meet: else a row
    would become many, or none.
    """
    try:
        own, its = (
            joined([read_table(path, names, encoding) for path in of]).rows.select(names)
            for of, names in zip((log, paths), ([a for a, _ in keys], [b for _, b in keys]))
        )
    except (ClickException, pl.exceptions.PolarsError):
        return False
    own, its = (
        frame.cast(pl.String)
        .rename({name: str(n) for n, name in enumerate(frame.columns)})
        .filter(pl.all_horizontal(pl.all() != ""))
        for frame in (own, its)
    )
    if not len(own.join(its, on=own.columns, how="semi")):
        return False
    return any(frame.n_unique() == len(frame) for frame in (own, its))


def join_of(
    log: list[Path],
    paths: list[Path],
    keys: list[tuple[str, str]],
    new: Path,
    encoding: str | None,
) -> str:
    """The code that joins two tables by their keys, as text, and writes a new one."""
    own, its = [own for own, _ in keys], [its for _, its in keys]
    own_names, its_names = literal(own), literal(its)
    on = f"on={own_names}" if own == its else f"left_on={own_names}, right_on={its_names}"
    left, right = (
        f"{frame_of(of, encoding)}.with_columns(p.col({literal(names)}).cast(p.String))"
        if any(path.suffix == ".parquet" or path.is_dir() for path in of)
        else frame_of(of, encoding)
        for of, names in ((log, own), (paths, its))
    )
    first = 'maintain_order="left"'
    return f"{left}.join({right}, {on}, {first}).write_csv({literal(str(new))})"
