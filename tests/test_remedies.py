"""data/remedies.py, advice.py: the commands of a refusal take all files of a log, in whatever form
they are, and write beside them; run as they stand.
"""

import gzip
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from own_logs import (
    ATOMIC_TITLES,
    COMMAND,
    HEAD,
    ROWS,
    TITLES,
    folder,
    is_the_log,
    refusal,
    request,
    tabbed,
    table,
)

from delrec.data.own import read_file, read_own
from delrec.data.reading import Place, stop_at_wrong_place


def follow(said):
    """The log that a refusal's commands lead to, run as they stand."""
    found = re.search(
        r"(?:wrong[^)]*\): |in a column position: |so rename [^:]*: |put them in a folder: )"
        "(.*); and then: (.*)",
        said,
    )
    command = found[1].replace("python -c", f"{shlex.quote(sys.executable)} -c")
    subprocess.run(["bash", "-c", command], check=True)
    words = shlex.split(found[2])[3:]
    flags = dict(zip(words[::2], words[1::2]))
    roles = {
        "user": "--user-column",
        "item": "--item-column",
        "timestamp": "--time-column",
        "title": "--title-column",
    }
    asked = request(
        command=found[2],
        encoding=flags.get("--encoding"),
        **{role: flags.get(flag) for role, flag in roles.items()},
    )
    if "--raw" in flags:
        return read_own(Path(flags["--raw"]), asked)
    items = flags.get("--items")
    return read_file(Path(flags["--interactions"]), Path(items) if items else None, asked)


def cells(rows):
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.mark.parametrize("parts", [2, 5])
def test_a_spark_folder_without_headers_is_read_whole(tmp_path, parts):
    at = [ROWS[15 * n // parts : 15 * (n + 1) // parts] for n in range(parts)]
    log = folder(
        tmp_path / "log's",
        _SUCCESS=b"",
        **{f"part-{n:05}__csv": cells(rows).rstrip("\n") for n, rows in enumerate(at)},
    )
    folder(log, **{"part-99999__csv": b""})
    items = folder(tmp_path, items__csv=TITLES) / "items.csv"
    typed = f"{COMMAND} --interactions {shlex.quote(str(log))} --items {items}"
    said = refusal(read_file, log, items, request(command=typed))
    assert is_the_log(follow(said)) and (tmp_path / "log's-named.csv").exists()
    assert ("part-*" in said) == (parts > 3)


@pytest.mark.parametrize("second", ["utf-8", "utf-8-sig", "utf-16", "windows-1252", "gz", "sep"])
def test_files_of_several_years_without_headers_are_read_whole(tmp_path, second):
    rows = [(f"Jürgen{u}", f"i{i}", t) for u, i, t in ROWS]
    text = cells(rows[7:])
    encoding = second if second.startswith(("utf", "win")) else "utf-8"
    later = ("sep=,\n" * (second == "sep") + text).encode(encoding)
    name = "interactions_2024__csv"
    files = {f"{name}__gz": gzip.compress(later)} if second == "gz" else {name: later}
    raw = folder(tmp_path / "raw", interactions_2023__csv=cells(rows[:7]), **files)
    folder(raw, items__csv=table([(f"i{i}", f"Tea {i}") for i in range(5)], "item,title"))
    typed = f"{COMMAND} --raw {raw}" + " --encoding windows-1252" * (second == "windows-1252")
    given = "windows-1252" if second == "windows-1252" else None
    log = follow(refusal(read_own, raw, request(command=typed, encoding=given)))
    found = zip(log.rows.user, log.rows.item, log.rows.when.tolist())
    assert sorted(found) == sorted(rows) and len(log.titles) == 5


def test_rows_without_a_time_in_several_files_are_numbered_through(tmp_path):
    pairs = [row[:2] for row in ROWS]
    raw = folder(tmp_path / "raw", a_1__csv=cells(pairs[:7]), a_2__csv=cells(pairs[7:]) + "\n\n")
    for n in (1, 2):
        (raw / f"a_{n}.csv").rename(raw / f"interactions_{n}.csv")
    folder(raw, items__csv=TITLES)
    log = follow(refusal(read_own, raw, request(command=f"{COMMAND} --raw {raw}")))
    assert not log.rows.timed and len(log.rows.user) == len(ROWS)
    in_order = sorted(zip(log.rows.when.tolist(), log.rows.user, log.rows.item))
    assert [(int(u), int(i)) for _, u, i in in_order] == pairs


@pytest.mark.parametrize("form", ["csv", "crlf", "utf-16", "parquet", "spark", "years", "inter"])
def test_rows_with_a_header_are_numbered_whatever_file_they_are_in(tmp_path, form):
    pairs = [row[:2] for row in ROWS]
    raw = folder(tmp_path / "it's", items__csv=TITLES)
    first, second = (table(rows, "user;item", ";") for rows in (pairs[:7], pairs[7:]))
    path = raw / "shop.csv"
    items = raw / "items.csv"
    if form in ("csv", "crlf", "utf-16"):
        text = table(pairs, "user;item", ";").replace("\n", "\r\n" if form == "crlf" else "\n")
        path.write_bytes(text.encode("utf-16" if form == "utf-16" else "utf-8"))
    elif form == "parquet":
        path = raw / "shop.parquet"
        pl.DataFrame(pairs, ["user", "item"], orient="row").write_parquet(path)
    elif form == "spark":
        path = raw / "log"
        folder(path, **{"part-0__csv": first, "part-1__csv": second})
    elif form == "years":
        folder(raw, interactions_1__csv=first, interactions_2__csv=second)
    else:
        path, items = raw / "shop.inter", raw / "shop.item"
        head = HEAD.replace("\ttimestamp:float", "")
        path.write_text(head + "".join(f"{u}\t{i}\t4\n" for u, i in pairs))
        items.write_text(ATOMIC_TITLES)
    if form == "years":
        said = refusal(read_own, raw, request(command=f"{COMMAND} --raw {shlex.quote(str(raw))}"))
    else:
        typed = f"{COMMAND} --interactions {shlex.quote(str(path))} --items X"
        said = refusal(read_file, path, items, request(command=typed))
    log = follow(said)
    assert log.rows.when.tolist() == list(range(15)) and not log.rows.timed
    assert is_the_log(log, [(u, i, n) for n, (u, i) in enumerate(pairs)])


def test_new_titles_of_a_log_in_several_files_take_the_old_ones_place(tmp_path):
    raw = folder(
        tmp_path / "raw",
        interactions_1__csv=table(ROWS[:7]),
        interactions_2__csv=table(ROWS[7:]),
        items__csv=TITLES.partition("\n")[2],
    )
    said = refusal(read_own, raw, request(command=f"{COMMAND} --raw {raw}"))
    assert is_the_log(follow(said)) and (raw / "old-items.csv").exists()


def test_a_later_file_of_other_columns_is_said_to_be_one(tmp_path):
    raw = folder(tmp_path, interactions_1__csv=table(ROWS[:7]), interactions_2__csv=cells(ROWS[7:]))
    said = refusal(read_own, folder(raw, items__csv=TITLES), request())
    assert "the parts of a log must have the same" in said


@pytest.mark.parametrize("form", ["csv", "utf-16", "break", "parquet", "years", "inter", "json"])
def test_ids_of_another_name_in_the_table_of_titles_are_renamed(tmp_path, form):
    """--item-column is of both files: the ids of one of them must change their name."""
    raw, path = tmp_path / "it's", tmp_path / "it's" / "shop.csv"
    rows = [(f"p{i}", 5 - i, f"Tea {i}", f"{i} g") for i in range(5)]
    log = [(u, f"p{i}", t) for u, i, t in ROWS]
    head = "customer_id,product_id,created_at"
    text = table(rows, "id;stock;name;weight", ";")
    if form == "break":
        text = text.replace("id;", '"product\nid";', 1)
    folder(raw, products__csv=text.encode("utf-16" if form == "utf-16" else "utf-8"))
    folder(raw, shop__csv=table(log, head))
    items = raw / "products.csv"
    columns = {"user": "customer_id", "item": "product_id", "timestamp": "created_at"}
    if form == "parquet":
        items = raw / "products.parquet"
        names = ["id", "stock", "name", "weight"]
        pl.DataFrame(rows, names, orient="row").write_parquet(items)
    elif form == "inter":
        path, items = raw / "shop.inter", raw / "shop.item"
        path.write_text(tabbed(log))
        text = "sku:token\tstock:float\tname:token_seq\tweight:token_seq\n"
        items.write_text(text + "".join("\t".join(map(str, row)) + "\n" for row in rows))
        columns = {}
    elif form == "json":
        items = raw / "products.json"
        pl.DataFrame(rows, ["id", "stock", "name", "weight"], orient="row").write_ndjson(items)
    typed = f"{COMMAND} --interactions {shlex.quote(str(path))} --items X"
    read, places = read_file, (path, items)
    if form == "years":
        folder(raw, interactions_1__csv=table(log[:7], head))
        folder(raw, interactions_2__csv=table(log[7:], head))
        items.rename(raw / "items.csv")
        typed, read, places = f"{COMMAND} --raw {shlex.quote(str(raw))}", read_own, (raw,)
    said = refusal(read, *places, request(command=typed, **columns))
    assert "the item column must have the same name in both files" in said
    if form == "json":
        return
    found = follow(said)
    assert sorted(zip(found.rows.user, found.rows.item)) == sorted((str(u), i) for u, i, _ in log)
    assert found.titles == {f"p{i}": f"Tea {i}" for i in range(5)}
    assert found.columns.cells["weight"].to_list() == [f"{i} g" for i in range(5)]
    assert found.columns.cells.columns == ["stock", "weight"]


def test_a_log_in_several_files_stays_whole_where_there_are_no_titles(tmp_path):
    raw = folder(
        tmp_path / "raw",
        interactions_1__csv=table(ROWS[:7]),
        interactions_2__csv=table(ROWS[7:]),
        items__csv="item,weight\n0,5\n",
    )
    said = refusal(read_own, raw, request(command=f"{COMMAND} --raw {raw}"))
    move, _, command = said.partition("by their ids: ")[2].partition(" && ")
    subprocess.run(["bash", "-c", move], check=True)
    assert command == f"{COMMAND} --raw {raw} --title-column item"
    assert len(read_own(raw, request(title="item")).rows.user) == len(ROWS)


@pytest.mark.parametrize("years", [1, 2])
@pytest.mark.parametrize("timed", [True, False])
def test_titles_in_several_files_stay_whole(tmp_path, years, timed):
    rows = ROWS if timed else [row[:2] for row in ROWS]
    at = [rows[:7], rows[7:]] if years == 2 else [rows]
    raw = folder(
        tmp_path / "raw",
        **{f"interactions_{n}__csv": cells(part) for n, part in enumerate(at)},
        items_1__csv=table([(i, f"Tea {i}") for i in (0, 1)], "item,title"),
        items_2__csv=table([(i, f"Tea {i}") for i in (2, 3, 4)], "item,title"),
    )
    log = follow(refusal(read_own, raw, request(command=f"{COMMAND} --raw {raw}")))
    assert log.titles == {str(i): f"Tea {i}" for i in range(5)}
    assert len(log.rows.user) == len(ROWS) and log.rows.timed == timed


def test_files_of_the_same_columns_beside_titles_are_one_log_in_a_folder(tmp_path):
    raw = folder(
        tmp_path / "raw",
        orders_1__csv=table(ROWS[:7]),
        orders_2__csv=table(ROWS[7:]),
        products__csv=TITLES,
    )
    said = refusal(read_own, raw, request(command=f"{COMMAND} --raw {raw}"))
    assert "orders_1.csv, orders_2.csv have the same columns" in said
    assert is_the_log(follow(said))


def test_a_zip_and_its_folder_are_named_so_that_the_shell_reads_them(tmp_path):
    path = tmp_path / "it's here" / "shop.zip"
    path.parent.mkdir()
    path.touch()
    said = refusal(stop_at_wrong_place, Place(path, None, None), request())
    assert shlex.split(said.partition("lies in: ")[2]) == ["--raw", str(path.parent)]
