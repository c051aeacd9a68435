"""data/joins.py: two tables that tell an interaction together are joined by the command of the
refusal, run as it stands, and by no column that holds ids of two things.
"""

import gzip
import shlex
import subprocess
import sys

import polars as pl
import pytest
from own_logs import ROWS, folder, is_the_log, refusal, request

from delrec.data.own import read_file, read_own

COMMAND = "python data/prepare.py shop --interactions RAW"


def joined(said, **places):
    """The table that the command of a refusal writes, and the command behind it."""
    code, _, command = said.partition("join the two: ")[2].partition("; and then: ")
    words = shlex.split(code)
    for key, name in places.items():
        words = [word.replace(f'"{key}"', f'"{name}"') for word in words]
    subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True)
    flags = shlex.split(command)
    return pl.read_csv(flags[flags.index("--interactions") + 1], infer_schema=False), command


def lines(*rows, between=","):
    return "".join(between.join(map(str, row)) + "\n" for row in rows)


def test_orders_and_their_lines_are_joined_by_the_command(tmp_path):
    """Instacart's way, and any data base's: who stands in one table and what in the other."""
    raw = folder(
        tmp_path,
        orders__csv="order_id,user_id,order_number\n"
        + "".join(f"{u}{i},{u},{i}\n" for u, i, _ in ROWS),
        order_products__csv="order_id,product_id,reordered\n"
        + "".join(f"{u}{i},{i},1\n" for u, i, _ in reversed(ROWS)),
        products__csv="product_id,title\n" + "".join(f"{i},Tea {i}\n" for i in range(5)),
    )
    for half in ("orders.csv", "order_products.csv"):
        said = refusal(read_file, raw / half, raw / "products.csv", request(command=COMMAND))
        _, command = joined(said)
        new = raw / f"{half[:-4]}-joined.csv"
        assert command == f"{COMMAND.replace('RAW', str(new))} --items {raw}/products.csv"
        said = refusal(read_file, new, raw / "products.csv", request(command="X"))
        assert said.endswith(
            "name yours: X --position-column order_number --user-column user_id "
            "--item-column product_id"
        )
        columns = {"user": "user_id", "item": "product_id", "position": "order_number"}
        log = read_file(new, raw / "products.csv", request(**columns))
        assert is_the_log(log, [(u, i, i) for u, i, _ in ROWS]) and not log.rows.timed
        new.unlink()


ORDERS = [("id", "customer_id", "created_at"), *((n, f"c{n}", 100 + n) for n in range(1, 5))]
# no line is of the order that has its own id, but line 3
LINES = [("id", "order_id", "product_id"), *((n, (9 - n) // 2, f"p{n}") for n in range(1, 9))]
ITEMS = lines(("product_id", "title"), *((f"p{n}", f"Tea {n}") for n in range(1, 9)))


def pairs(frame):
    return sorted(zip(frame["customer_id"], frame["product_id"]))


WANT = sorted((f"c{order}", item) for _, order, item in LINES[1:] if order)


@pytest.mark.parametrize("half", ["orders.csv", "order_items.csv"])
def test_an_order_s_own_id_meets_the_order_id_of_its_lines_and_never_their_id(tmp_path, half):
    raw = folder(tmp_path, orders__csv=lines(*ORDERS), order_items__csv=lines(*LINES))
    folder(raw, products__csv=ITEMS)
    said = refusal(read_file, raw / half, raw / "products.csv", request(command=COMMAND))
    frame, command = joined(said)
    assert pairs(frame) == WANT and command.endswith(f"--items {raw}/products.csv")


@pytest.mark.parametrize("half", ["orders.csv", "lines.csv"])
def test_orders_that_every_store_numbers_anew_are_joined_by_both_ids(tmp_path, half):
    orders = [(s, n, f"{s}-{n}") for s in range(3) for n in range(4)]
    rows = [(s, n, f"p{s}{n}{k}") for s in range(3) for n in range(4) for k in range(2)]
    raw = folder(
        tmp_path,
        orders__csv=lines(("store_id", "order_id", "customer_id"), *orders),
        lines__csv=lines(("store_id", "order_id", "product_id"), *rows),
    )
    frame, _ = joined(refusal(read_file, raw / half, None, request(command=COMMAND)))
    assert len(frame) == 24
    assert pairs(frame) == sorted((f"{s}-{n}", item) for s, n, item in rows)


def test_where_no_column_makes_one_row_of_a_row_the_key_is_asked_for(tmp_path):
    raw = folder(
        tmp_path,
        export_a__csv=lines(*ORDERS),
        export_b__csv=lines(*LINES),
        visits__csv=lines(("shop_id", "customer_id"), (1, "a"), (1, "b")),
    )
    said = refusal(read_file, raw / "export_b.csv", None, request(command=COMMAND))
    assert "export_a.csv does, and it cannot be told which columns" in said
    frame, _ = joined(said, KEY="order_id", KEY_THERE="id")
    assert pairs(frame) == WANT
    folder(raw / "b", plays__csv=lines(("shop_id", "item_id"), (1, "x"), (1, "y")))
    (raw / "visits.csv").rename(raw / "b" / "visits.csv")
    said = refusal(read_file, raw / "b" / "plays.csv", None, request(command=COMMAND))
    assert "left_on=[" in said and "KEY_THERE" in said


def written(form, rows, path):
    """The rows in a file of some form; its path."""
    if form == "parquet":
        path = path.with_suffix(".parquet")
        pl.DataFrame(rows[1:], rows[0], orient="row").write_parquet(path)
        return path
    text = lines(*rows, between=";")
    data = text.encode("utf-16" if form.startswith("utf-16") else "utf-8")
    if form == "sep":
        data = b"sep=;\n" + data
    path = path.with_suffix(".csv.gz") if form.endswith("gz") else path
    path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    return path


@pytest.mark.parametrize("form", ["semicolons", "utf-16", "utf-16 gz", "gz", "sep", "parquet"])
def test_tables_of_every_form_are_joined(tmp_path, form):
    home = tmp_path / "d'Artagnan"
    home.mkdir()
    orders = written(form, ORDERS, home / "orders.csv")
    written("semicolons", LINES, home / "order_items.csv")
    frame, _ = joined(refusal(read_file, orders, None, request(command=COMMAND)))
    assert pairs(frame) == WANT


def test_all_files_of_both_tables_are_joined(tmp_path):
    raw = folder(
        tmp_path / "raw",
        interactions_1__csv=lines(*LINES[:4]),
        interactions_2__csv=lines(LINES[0], *LINES[4:]),
        orders_2023__csv=lines(*ORDERS[:3]),
        orders_2024__csv=lines(ORDERS[0], *ORDERS[3:]),
    )
    said = refusal(read_own, raw, request(command="python data/prepare.py shop --raw RAW"))
    frame, command = joined(said)
    assert pairs(frame) == WANT and f"--interactions {tmp_path}/raw-joined.csv" in command


def test_titles_in_several_files_stay_whole(tmp_path):
    raw = folder(tmp_path / "raw", interactions__csv=lines(*LINES), orders__csv=lines(*ORDERS))
    first, *rows = ITEMS.splitlines(keepends=True)
    folder(raw, items_1__csv=first + "".join(rows[:3]), items_2__csv=first + "".join(rows[3:]))
    said = refusal(read_own, raw, request(command=f"python data/prepare.py shop --raw {raw}"))
    code, _, command = said.partition("join the two: ")[2].partition("; and then: ")
    code = code.replace("python -c", f"{shlex.quote(sys.executable)} -c")
    subprocess.run(["bash", "-c", code], check=True)
    assert command == f"python data/prepare.py shop --raw {raw}"
    columns = {"user": "customer_id", "item": "product_id", "timestamp": "created_at"}
    log = read_own(raw, request(**columns))
    assert sorted(zip(log.rows.user, log.rows.item)) == WANT and len(log.titles) == 8
