"""data/own.py, own_files.py, hints.py: logs in several files, with columns of their own names; the
command that a refusal shows works.
"""

import gzip
import json
import re
import shutil
import zipfile
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

from delrec.data.hints import guessed
from delrec.data.own import read_file, read_own

# ---------------------------------------------------------------- several files


def parts(first="train", second="valid", third="test"):
    return {
        f"shop__{first}__inter": tabbed(ROWS[:9]),
        f"shop__{second}__inter": tabbed(ROWS[9:12]),
        f"shop__{third}__inter": tabbed(ROWS[12:]),
        "shop__item": ATOMIC_TITLES,
    }


def test_recbole_s_files_of_a_split_are_one_log(tmp_path):
    log = read_own(folder(tmp_path, **parts()), request())
    assert is_the_log(log) and log.rows.part is None
    assert "shop.train.inter" in log.notes[0] and "read as one" in log.notes[0]


def test_recbole_s_split_is_kept_on_request(tmp_path):
    log = read_own(folder(tmp_path, **parts()), request(keep_parts=True))
    part = dict(zip(zip(log.rows.user, log.rows.item), log.rows.part.tolist()))
    assert [part[str(u), str(i)] for u, i, _ in ROWS] == [0] * 9 + [1] * 3 + [2] * 3


def test_logs_that_do_not_belong_together_are_named(tmp_path):
    files = {"a__inter": tabbed(ROWS), "b__inter": tabbed(ROWS), "a__item": ATOMIC_TITLES}
    said = refusal(read_own, folder(tmp_path, **files), request())
    assert "a.inter, b.inter, which are not the parts of one log" in said
    assert f"python data/prepare.py shop --interactions {tmp_path}/a.inter" in said
    assert is_the_log(read_file(tmp_path / "a.inter", None, request()))


def test_csv_in_several_files_is_one_log_and_its_whole_stands_alone(tmp_path):
    years = {"interactions_2019__csv": table(ROWS[:7]), "interactions_2020__csv": table(ROWS[7:])}
    assert is_the_log(read_own(folder(tmp_path, **years, items__csv=TITLES), request()))
    folder(tmp_path, interactions__csv=table(ROWS[:3]))
    log = read_own(tmp_path, request())
    assert is_the_log(log, ROWS[:3]) and "interactions_2020.csv: not read" in log.notes[0]
    folder(tmp_path, interactions__test__csv=table(ROWS[:3]))
    assert "which is the log?" in refusal(read_own, tmp_path, request())


@pytest.mark.parametrize("twice, what", [("interactions", "log"), ("items", "table of titles")])
def test_one_table_in_two_files_is_asked_for_with_a_command_that_works(tmp_path, twice, what):
    raw = folder(tmp_path, interactions__csv=table(ROWS), items__csv=TITLES)
    text = (raw / f"{twice}.csv").read_bytes()
    (raw / f"{twice}.csv.gz").write_bytes(gzip.compress(text))
    said = refusal(read_own, raw, request())
    named = re.search(
        r"which is the (.*)\? Name it: .* --interactions (\S+) --items (\S+), or", said
    )
    assert named[1] == what and is_the_log(read_file(Path(named[2]), Path(named[3]), request()))
    other = "items" if twice == "interactions" else "interactions"
    (raw / f"{other}.csv").rename(raw / f"{other}_2019.csv")
    shutil.copy(raw / f"{other}_2019.csv", raw / f"{other}_2020.csv")
    said = refusal(read_own, raw, request())
    assert said.endswith(f"which is the {what}? Move the others away")


def test_files_of_one_log_must_have_the_same_columns(tmp_path):
    other = table(ROWS[7:], "user,item,position")
    files = {"interactions_1__csv": table(ROWS[:7]), "interactions_2__csv": other}
    said = refusal(read_own, folder(tmp_path, **files, items__csv=TITLES), request())
    assert "the parts of a log must have the same" in said


@pytest.mark.parametrize("place", ["interactions__csv___", "interactions___", ""])
def test_the_parts_that_spark_writes_are_one_log(tmp_path, place):
    files = {
        f"{place}part-00000-a__csv": table(ROWS[:7]),
        f"{place}part-00001-a__csv__gz": gzip.compress(table(ROWS[7:]).encode()),
        f"{place}part-00002-a__csv": b"",
        f"{place}part-00003-a__csv": "user,item,timestamp\n",
        f"{place}_SUCCESS": b"",
        f"{place}.part-00000-a__csv.crc": b"x",
    }
    folder(tmp_path / "log", **files)
    items = folder(tmp_path, titles__csv=TITLES) / "titles.csv"
    if place:
        items.rename(tmp_path / "log" / "items.csv")
        assert is_the_log(read_own(tmp_path / "log", request()))
    else:
        assert is_the_log(read_file(tmp_path / "log", items, request()))


def test_what_a_writer_of_parts_hides_is_no_part(tmp_path):
    hidden = "interactions____temporary___0___attempt_1___part-00001"
    files = {"interactions___part-00000__csv": table(ROWS), f"{hidden}__csv": table(ROWS)}
    files |= {"interactions___.tmp___part-00002__csv": table(ROWS), "items__csv": TITLES}
    raw = folder(tmp_path, **files)
    assert (raw / "interactions" / "_temporary" / "0" / "attempt_1" / "part-00001.csv").exists()
    assert is_the_log(read_own(raw, request()))
    (raw / "interactions" / "_delta_log").mkdir()
    said = refusal(read_own, raw, request())
    assert "interactions is a Delta table" in said and "write.parquet" in said


@pytest.mark.parametrize("form", ["parquet", "parts", "csv", "jsonl"])
def test_ids_are_the_titles_where_there_are_none(form, tmp_path):
    frame = pl.DataFrame(ROWS, ["user", "item", "timestamp"], orient="row")
    path = tmp_path / f"shop.{form}".replace("parts", "parquet")
    if form == "parts":
        path.mkdir()
        frame.head(6).write_parquet(path / "part-0.parquet")
        frame.tail(-6).write_parquet(path / "part-1.parquet")
    else:
        getattr(frame, {"jsonl": "write_ndjson"}.get(form, f"write_{form}"))(path)
    assert "--title-column item" in refusal(read_file, path, None, request(command=COMMAND))
    log = read_file(path, None, request(title="item"))
    assert log.titles == {str(i): str(i) for i in range(5)} and len(log.rows.user) == len(ROWS)


def test_parquet_in_parts_and_titles_in_parquet(tmp_path):
    frame = pl.DataFrame(ROWS, schema=["user", "item", "timestamp"], orient="row")
    raw = folder(tmp_path, interactions__parquet____SUCCESS=b"")
    (raw / "interactions.parquet").mkdir(exist_ok=True)
    frame.head(6).write_parquet(raw / "interactions.parquet" / "part-0.snappy.parquet")
    frame.tail(-6).write_parquet(raw / "interactions.parquet" / "part-1.snappy.parquet")
    titles = pl.DataFrame({"item": range(5), "title": [f"Tea {i}" for i in range(5)]})
    titles.write_parquet(raw / "items.parquet")
    assert is_the_log(read_own(raw, request()))


# ---------------------------------------------------------------- columns


def test_column_flags_count_in_recbole_s_files(tmp_path):
    raw = folder(
        tmp_path,
        shop__inter=tabbed(ROWS, HEAD.replace("item_id", "sku").replace("timestamp", "at")),
        shop__item="sku:token\tslogan:token_seq\n" + ATOMIC_TITLES.partition("\n")[2],
    )
    assert is_the_log(read_own(raw, request(item="sku", timestamp="at", title="slogan")))
    said = refusal(read_own, raw, request(item="sku", timestamp="at"))
    assert "none is a title (title:token_seq" in said and "--title-column COLUMN" in said
    assert "--item-column sku" in refusal(read_own, raw, request(timestamp="at"))


@pytest.mark.parametrize(
    "head, title",
    [
        ("item_id:token\tbrand_name:token\titem_name:token_seq", "item_name"),
        ("item_id:token\tstore_name:token_seq\ttitle:token_seq", "title"),
        ("item_id:token\ttitle_length:float\tmovie_title:token_seq", "movie_title"),
        ("item_id:token\tname:token_seq\ttitle:token", "title"),
    ],
)
def test_only_a_real_title_is_taken_for_one(tmp_path, head, title):
    names = [cell.split(":")[0] for cell in head.split("\t")]
    rows = [
        "\t".join(str(i) if n == "item_id" else f"Tea {i}" if n == title else "9" for n in names)
        for i in range(5)
    ]
    text = "\n".join([head, *rows]) + "\n"
    assert is_the_log(read_own(folder(tmp_path, a__inter=tabbed(ROWS), a__item=text), request()))


def test_histories_of_recbole_are_no_interactions(tmp_path):
    text = "user_id:token\titem_id_list:token_seq\titem_id:token\n1\t1 2\t3\n"
    raw = folder(tmp_path, a__inter=text, a__item=ATOMIC_TITLES)
    assert "holds histories (item_id_list), not interactions" in refusal(read_own, raw, request())


@pytest.mark.parametrize(
    "header, want",
    [
        ("customer_id order_time article_no article_name", [0, 2, 1, 3]),
        ("Bestelldatum Kundennummer Artikelnummer Bezeichnung Menge", [1, 2, 0, 3]),
        ("InvoiceNo StockCode Description InvoiceDate CustomerID", [4, 1, 3, 2]),
        ("userId movieId rating timestamp title", [0, 1, 3, 4]),
        ("user_id item_id last_watch_dt title", [0, 1, 2, 3]),
        ("Bestelldatum Kunde Artikelnr Artikel Artikeltype Menge", [1, 2, 0, 3]),
        ("t_dat customer_id article_id prod_name", [1, 2, 0, 3]),
        ("Référence Libellé Date Prix Client", [4, 0, 2, 1]),
        ("Cliente Artículo Nombre Fecha Precio", [0, 1, 3, 2]),
        ("klant artikelnr omschrijving datum", [0, 1, 3, 2]),
        ("user_id item_id ts title", [0, 1, 2, 3]),
        ("Geburtsdatum Kunde Artikelnr Artikel Kaufdatum", [1, 2, 4, 3]),
        ("Email Lineitem_name Lineitem_sku Created_at Billing_Name Vendor", [0, 2, 3, 1]),
        ("Item_# Item_Name SKU Order_Date Customer_User_ID", [4, 2, 3, 1]),
        ("product_name product_id username user_id created_at", [3, 1, 4, 0]),
    ],
)
def test_a_refusal_guesses_the_columns_by_their_names(tmp_path, header, want):
    names = header.split()
    found = guessed(names, ["user", "item", "timestamp", "title"])
    roles = ("user", "item", "timestamp", "title")
    assert [names.index(found[role]) for role in roles] == want


def test_the_command_in_a_refusal_works(tmp_path):
    text = table([(t, u, i, f"Tea {i}") for u, i, t in ROWS], "at when,Kunde,Artikelnr,Artikelname")
    path = folder(tmp_path, shop__csv=text) / "shop.csv"
    said = refusal(read_file, path, None, request(command="X", timestamp="at when"))
    assert (
        "name yours: X --user-column Kunde --item-column Artikelnr --time-column 'at when' "
        "--title-column Artikelname" in said
    )
    columns = {"user": "Kunde", "item": "Artikelnr", "title": "Artikelname"}
    assert is_the_log(read_file(path, None, request(timestamp="at when", **columns)))


JSON = [json.dumps({"user": u, "item": i, "timestamp": t, "x": None}) for u, i, t in ROWS]


@pytest.mark.parametrize(
    "name, text",
    [
        ("shop.jsonl", "\n".join(JSON) + "\n\n"),
        ("shop.json.gz", gzip.compress("\n".join(JSON).encode())),
        ("shop.json", "[" + ",\n".join(JSON) + "]\n"),
    ],
)
def test_json_is_read_one_record_a_line_or_in_one_list(tmp_path, name, text):
    path = folder(tmp_path, **{name.replace(".", "__"): text}) / name
    titles = "".join(json.dumps({"item": i, "title": f"Tea {i}", "a": []}) + "\n" for i in range(5))
    items = folder(tmp_path, items__json=titles) / "items.json"
    assert is_the_log(read_file(path, items, request()))
    said = refusal(read_file, items, None, request(user="a", timestamp="item"))
    assert "items.json, line 1: a holds [], expected one value" in said


@pytest.mark.parametrize("name", ["shop.jsonl", "shop.json"])
def test_half_a_character_in_json_is_no_end(tmp_path, name):
    made = [f'{{"user": {u}, "item": {i}, "timestamp": {t}, "title": "TITLE"}}' for u, i, t in ROWS]
    text = "\n".join(made) if name == "shop.jsonl" else f"[{', '.join(made)}]"
    for written, title in (
        (r"Tea \ud83d", "Tea \ufffd"),
        (r"Tea \ude00 \ud83d\ude00 \u00e9", "Tea \ufffd 😀 é"),
    ):
        (tmp_path / name).write_text(text.replace("TITLE", written))
        log = read_file(tmp_path / name, None, request())
        assert set(log.titles.values()) == {title}


def test_a_column_without_any_value_is_said_and_another_named(tmp_path):
    text = table([(u, "NA", i, t) for u, i, t in ROWS], "sessionId,userId,item,timestamp")
    path = folder(tmp_path, views__csv=text, items__csv=TITLES) / "views.csv"
    said = refusal(read_file, path, tmp_path / "items.csv", request(command="X", user="userId"))
    assert said.endswith("in the column userId; name another: X --user-column sessionId")
    assert is_the_log(read_file(path, tmp_path / "items.csv", request(user="sessionId")))


def test_parts_by_the_values_of_a_column_are_one_log(tmp_path):
    frame = pl.DataFrame(ROWS, schema=["user", "item", "timestamp"], orient="row")
    frame = frame.with_columns(pl.format("Tea {}", "item").alias("title"))
    for day, rows in (("1", frame.head(6)), ("2", frame.tail(-6))):
        (tmp_path / f"dt={day}").mkdir()
        rows.write_parquet(tmp_path / f"dt={day}" / "0.parquet")
    assert is_the_log(read_own(tmp_path, request()))


def test_files_of_the_same_columns_are_said_to_be_one_log(tmp_path):
    rows = [(u, i, t, f"Tea {i}") for u, i, t in ROWS]
    head = "user,item,timestamp,title"
    folder(tmp_path, january__csv=table(rows[:7], head), february__csv=table(rows[7:], head))
    said = refusal(read_own, tmp_path, request(command=f"{COMMAND} --raw {tmp_path}"))
    assert said.endswith(f"read them as one log: {COMMAND} --interactions {tmp_path}")
    assert is_the_log(read_file(tmp_path, None, request()))


def test_a_zip_is_refused_with_the_command_that_unpacks_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "shop.zip", "w") as z:
        z.writestr("shop.csv", table(ROWS))
    said = refusal(read_file, tmp_path / "shop.zip", None, request())
    assert said.endswith(f"unpack it: unzip {tmp_path}/shop.zip -d {tmp_path}")


@pytest.mark.parametrize(
    "files, says",
    [
        (["BX-Ratings.csv", "BX-Books.csv"], "--interactions {}/BX-Ratings.csv --items {}/BX-Bo"),
        (["a_business.json", "a_review.json"], "{}/a_review.json --items {}/a_business.json"),
        (["a.csv", "movies.csv", "links.csv"], "--interactions {}/a.csv --items {}/movies.csv"),
        (["data/interactions.csv"], "but {}/data does: python data/prepare.py shop --raw {}/data"),
        (
            ["readme.md"],
            "holds no interactions.csv but readme.md; expected interactions.csv (user, item",
        ),
    ],
)
def test_files_of_other_names_are_named_in_the_command(tmp_path, files, says):
    for n, name in enumerate(files):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x" * (100 - n))
    said = refusal(read_own, tmp_path, request(command=f"{COMMAND} --raw {tmp_path}"))
    assert says.format(tmp_path, tmp_path) in said
