"""What a refusal advises about a table's columns: the flags that name them, a header where there is
none, numbers where there is no time. Every command in it works as it stands.
"""

import re
import shlex
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NoReturn

import polars as pl

from delrec.data.cells import (
    LOOKED_AT,
    first_cells,
    guessed_by_cells,
    guessed_in_cells,
    guessed_titles,
    is_time,
    times_among,
    without_birthdays,
)
from delrec.data.forms import form_of, open_text
from delrec.data.hints import FLAGS, IDS, WORD, Columns, Request, command_for, guessed, plain
from delrec.data.joins import stop_at_half_of_a_row
from delrec.data.json_tables import is_json
from delrec.data.own_files import Files, with_new_items, with_new_log, without_items
from delrec.data.remedies import frame_of, lines_of, literal, new_table, python
from delrec.data.tables import Table, as_text, joined, read_table, split_rows
from delrec.data.time_formats import fitting_formats
from delrec.runtime import stop

# a name in a header that is none: a number or several, a date, 'MOVIE:' of Netflix, an address
CELL = re.compile(r"[0-9]+([.,:/ T-][0-9APMTZ.,:/ -]*)?|https?://.*|\[.*\]")

# how RecBole's files are written
TYPED = ', separator="\\t", quote_style="never"'
# a column that numbers a user's orders
POSITION = re.compile(r"order_?(number|no|nr)|position|sequence|(^|_)(seq|step|rank)($|_)", re.I)


def stop_unless_columns(
    tables: list[Table], names: Columns, request: Request, files: Files
) -> None:
    """Stops if the tables lack the columns of an interaction, and says how to name them."""
    table = tables[0]  # of others joined() says where they differ from it
    header = table.header
    missing = [role for role in ("user", "item") if vars(names)[role] not in header]
    if names.timestamp not in header and names.position not in header:
        missing.append("timestamp")
    if not files.items and names.title not in header:
        missing.append("title")
    if not missing:
        return
    stop_at_histories(table, missing)
    stop_without_header(table, request, files)
    stop_at_half_of_a_row(table, request, files, missing)
    expected = f"{names.user},{names.item} and {names.timestamp} or {names.position}"
    if not files.items:
        expected += f", and {names.title or 'title'}, as there is no table of titles"
    known = [name for role, name in vars(names).items() if role not in missing]
    free = [name for name in header if name not in known]
    cells = first_cells(table, [*free, *filter(None, [names.title])], request.encoding)
    user = names.user if names.user in header else guessed(free, missing).get("user")
    cells = without_birthdays(cells, table, user, request.encoding)
    found = guessed_in_cells(cells, names.title, missing)
    request = replace(request, columns=replace(request.columns, **found))
    missing = [role for role in missing if role not in found]
    free = [name for name in free if name not in found.values()]
    advice = f"name yours: {command_for(request, free, missing)}"
    is_told = "timestamp" in guessed(free, missing) or times_among(cells)
    if "timestamp" in missing and not is_told:
        advice += "; " + numbering(table, names.position, request, files, free, missing)
        if numbers := next(filter(POSITION.search, free), None):
            others = [role for role in missing if role != "timestamp"]
            flag = f"{FLAGS['position']} {shlex.quote(numbers)}"
            advice = f"name yours: {command_for(request, free, others, flag)}"
    if "title" in missing and "title" not in guessed(free, missing):
        advice = on_titles(request, names, free, missing)
    stop(
        f"{table.path}: the header names {', '.join(header)}; expected the columns {expected}; "
        f"{advice}"
    )


def stop_at_histories(table: Table, missing: list[str]) -> None:
    """Stops at a table of whole histories."""
    lists = [name for name in table.header if name.endswith("_list")]
    if lists and "timestamp" in missing:
        stop(
            f"{table.path} holds histories ({', '.join(lists)}), not interactions; give the "
            "log they were made of, one row an interaction"
        )


def on_titles(request: Request, names: Columns, free: list[str], missing: list[str]) -> str:
    """What to do where no column is a title: another table, or the ids in place of titles."""
    others = [role for role in missing if role != "title"]
    found = guessed(free, others)
    item = found.get("item", "COLUMN") if "item" in others else names.item
    rest = command_for(request, free, others)
    first = "add a table of titles, items.csv (item,title), in the same folder"
    if "--interactions" in request.command:
        first = f"give a table of titles (item,title): {rest} --items ITEMS"
    return f"{first}; {by_ids(request, free, others, item)}"


def by_ids(request: Request, free: list[str], missing: list[str], item: str) -> str:
    """What to do where there are no titles. free, missing: as of command_for; item: the column of
    the ids, in place of any that was named for the titles."""
    untitled = replace(request, columns=replace(request.columns, title=None))
    command = f"{command_for(untitled, free, missing)} {FLAGS['title']} {shlex.quote(item)}"
    return f"or, if there are no titles, call the items by their ids: {command}"


def stop_unless_titles(
    table: Table, names: Columns, item: pl.Series, request: Request, files: Files
) -> None:
    """Stops if a table of titles lacks a column, and says how to name or rename it. item: the ids
    in the log.
    """
    missing = [role for role in ("item", "title") if vars(names)[role] not in table.header]
    if not missing:
        return
    stop_without_header(table, request, files, of_titles=True)
    free = [name for name in table.header if name != names.item]
    said = f"name yours: {command_for(request, free, missing)}"
    if "item" in missing:
        said = renaming(table, names, item, request, files)
    elif "title" not in guessed(free, missing):
        alone = replace(request, command=without_items(request.command, files))
        said += f"; {by_ids(alone, [], [], names.item)}"
    stop(
        f"{table.path}: the header names {', '.join(table.header)}; expected the columns "
        f"{names.item},{names.title or 'title'}; {said}"
    )


def renaming(table: Table, names: Columns, item: pl.Series, request: Request, files: Files) -> str:
    """What to do where the ids in a table of titles are called otherwise than in the log: another
    --item-column would not be in the log.
    """
    said = f"the item column must have the same name in both files, {names.item}"
    old = column_of_ids(table, item, request.encoding, files)
    if is_json(table.path):
        return f"{said}: call {old} so"
    new, name, how = new_table(files.items, "renamed"), names.item, ""
    free, was = [column for column in table.header if column != old], old
    if table.types:
        new, how = new_table(files.items, "renamed", ".item"), TYPED
        was, name = f"{old}:{table.types.get(old, 'token')}", f"{name}:token"
    rows = f"{frame_of(files.items, request.encoding)}.rename({{{literal(was)}: {literal(name)}}})"
    code = python(f"{rows}.write_csv({literal(str(new))}{how})")
    command, then = with_new_items(request.command, files, new)
    missing = [] if names.title in table.header else ["title"]
    command = command_for(replace(request, command=command), free, missing)
    return f"{said}; so rename {old}: {code}{then}; and then: {command}"


def column_of_ids(table: Table, item: pl.Series, encoding: str | None, files: Files) -> str:
    """The column of a table of titles that holds most of the log's ids, by name where none does."""
    asked = [name for name in table.header if name and table.header.count(name) == 1]
    share = {}
    if not is_json(table.path):
        rows = joined([read_table(path, asked, encoding) for path in files.items]).rows
        ids = item.unique()
        texts = {name: as_text(rows[name]) for name in asked}
        share = {
            name: ids.is_in(text.unique().implode()).mean()
            for name, text in texts.items()
            if text is not None
        }
    by_name = guessed(asked, ["item"]).get("item", "COLUMN")
    # of two that hold the ids equally often, the one that is called an id
    best = max(share, key=lambda name: (share[name], plain(name).endswith(IDS)), default=None)
    return best if best and share[best] else by_name


def numbering(
    table: Table, position: str, request: Request, files: Files, free: list[str], missing: list[str]
) -> str:
    """What to do where a table has neither times nor positions. position: the column that numbers
    the rows; free: the columns by which those of the missing roles are guessed.
    """
    said = (
        f"if no column tells when, and the rows stand in order, number them in a column {position}"
    )
    log = files.interactions
    if is_json(table.path):
        return said
    new, name, how = new_table(log, "numbered"), position, ""
    if table.types:
        new, name = new_table(log, "numbered", ".inter"), f"{position}:float"
        how = TYPED
    rows = f"{frame_of(log, request.encoding)}.with_row_index({literal(name)})"
    code = python(f"{rows}.write_csv({literal(str(new))}{how})")
    command, then = with_new_log(request.command, files, new)
    others = [role for role in missing if role != "timestamp"]
    command = command_for(replace(request, command=command), free, others)
    return f"{said}: {code}{then}; and then: {command}"


# ---------------------------------------------------------------- tables without a header


@dataclass
class Cells:
    """The first cells of a table, by columns, and how its lines become a csv."""

    columns: list[pl.Series]
    separator: str
    lines: str  # the command that prints the lines, the cells between `separator`
    numbered: str  # the same, with a number behind each
    position_is_there: bool = False  # does `lines` number them already?


def stop_without_header(
    table: Table, request: Request, files: Files, of_titles: bool = False
) -> None:
    """Stops if the first line of a table is a row, with the header that its cells suggest."""
    looks_so = any(CELL.fullmatch(name) for name in table.header) or any(
        fitting_formats(pl.Series([name])) for name in table.header if re.search("[0-9]", name)
    )
    if not looks_so or table.types:
        return
    if re.fullmatch("[0-9]+:", table.header[0]):
        stop_at_blocks(table, request, files)
    paths = files.items if of_titles else files.interactions
    cells = cells_of(table, paths, request.encoding)
    if not of_titles:
        stop_at_lists(table, cells.columns)
    roles = guessed_titles(cells.columns) if of_titles else guessed_by_cells(cells.columns)
    names = [f"more{n}" for n in range(1, len(cells.columns) + 1)]
    for role, at in roles.items():
        names[at] = role
    lines, note = cells.lines, ""
    if cells.position_is_there:
        names[2] = "position"
    elif not of_titles and "timestamp" not in roles:
        names.append("position")
        lines = cells.numbered
        note = "; no column tells when, so the rows are numbered: is that their order?"
    stop_with_header(table, request, files, cells.separator.join(names), lines, note, of_titles)


def stop_at_lists(table: Table, columns: list[pl.Series]) -> None:
    """Stops at cells that hold several ids each."""
    for n, column in enumerate(columns, 1):
        lists = column.str.contains(r"^(\S*[0-9]\S*\s+){2,}\S*[0-9]\S*$")
        if lists.mean() > 0.3 and not is_time(column) and len(columns) > 1:
            stop(
                f"{table.path}: column {n} holds several ids in a cell "
                f"({column.filter(lists)[0][:60]!r}), so a row is no interaction; write one row "
                "for each of them: user,item and timestamp or position"
            )


def stop_with_header(
    table: Table,
    request: Request,
    files: Files,
    header: str,
    lines: str,
    note: str = "",
    of_titles: bool = False,
) -> NoReturn:
    """Stops with the command that puts a header in front and the one that reads what it makes."""
    new, then = new_table(files.items if of_titles else files.interactions, "named"), ""
    if of_titles:
        command, then = with_new_items(request.command, files, new)
        flags = command_for(request, [], [])[len(request.command) :]
        command += re.sub(rf" --(item|title)-column {WORD}", "", flags)
    else:
        command, then = with_new_log(request.command, files, new)
        if not files.items and not re.search(r"\btitle\b", header):
            command += " --title-column item"
    first = ", ".join(table.header)
    stop(
        f"{table.path} has no header, its first line is {first[:120]!r}; put one in front (the "
        f"names are guessed by the cells, correct what is wrong{note}): "
        f"(echo {shlex.quote(header)}; {lines}) > {shlex.quote(str(new))}{then}; "
        f"and then: {command}"
    )


def stop_at_blocks(table: Table, request: Request, files: Files) -> NoReturn:
    """Stops at Netflix' way: a line 'MOVIE:' and below it a line for each user."""
    awk = """awk -v OFS=, '{sub(/\\r$/, "")} /:$/ {sub(/:/, ""); m = $0; next} {print m, $0}'"""
    lines = f"{lines_of(files.interactions, request.encoding)} | {awk}"
    stop_with_header(table, request, files, "item,user,rating,timestamp", lines)


def cells_of(table: Table, paths: list[Path], encoding: str | None) -> Cells:
    """The first cells of a table without a header, which is in these files; where blanks part them,
    or a line is a user and all its items, the command that prints them makes a csv.
    """
    form, first, _ = form_of(table.path, [], encoding)
    with open_text(table.path, form) as f:
        for _ in range(form.skipped):
            f.readline()
        rows = [row for _, row in islice(split_rows(f, form), LOOKED_AT)]
    separator = form.separator
    lines = lines_of(paths, encoding)
    awk = f"{lines} | awk -v OFS={shlex.quote(separator)}"
    whole = '{sub(/\\r$/, "")} NF'  # lines that hold anything
    numbered = f"{awk} '{whole} {{print $0, NR}}'"
    position_is_there = False
    if len(first) == 1 and len(first[0].split()) > 1:
        rows = [row[0].split() for row in rows if row]
        lines = f"{awk} '{whole} {{$1 = $1; print}}'"
        numbered = f"{awk} '{whole} {{$1 = $1; print $0, NR}}'"
        if len({len(row) for row in rows}) > 1 or len(rows[0]) > 8:
            lines = f"{awk} '{whole} {{for (n = 2; n <= NF; n++) print $1, $n, n}}'"
            rows = [[row[0], item, str(n)] for row in rows for n, item in enumerate(row[1:])]
            position_is_there = True
    rows = [row for row in rows if len(row) == len(rows[0])]
    columns = [pl.Series(column, dtype=pl.String).str.strip_chars() for column in zip(*rows)]
    return Cells(columns, separator, lines, numbered, position_is_there)
