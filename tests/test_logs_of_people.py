"""data/own.py: logs as people have them, in several files, with columns, encodings and separators
of their own, and what is said of those that are not whole.
"""

import gzip

import polars as pl
import pytest
from click import ClickException

from delrec.data.hints import Columns, Request, guessed
from delrec.data.own import read_file, read_own

ROWS = [(u, i, 1_500_000_000 + 10 * i + u) for u in range(3) for i in range(5)]
HEAD = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


def tabbed(rows, head=HEAD):
    return head + "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in rows)


def table(rows, head="user,item,timestamp", separator=","):
    lines = [head.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    return "\n".join(lines) + "\n"


TITLES = table([(i, f"Tea {i}") for i in range(5)], "item,title")
ATOMIC_TITLES = "item_id:token\ttitle:token_seq\n" + "".join(f"{i}\tTea {i}\n" for i in range(5))


def folder(tmp_path, **files):
    """A folder of files; two underscores in a name stand for a dot, three for a slash."""
    for name, text in files.items():
        path = tmp_path / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return tmp_path


def request(*, command="python data/prepare.py shop --raw RAW", **more):
    columns = {key: more.pop(key) for key in list(more) if key in vars(Columns())}
    return Request(columns=Columns(**columns), command=command, **more)


def is_the_log(log, rows=ROWS):
    found = zip(log.rows.user, log.rows.item, log.rows.when.tolist())
    assert sorted(found) == sorted((str(u), str(i), t) for u, i, t in rows)
    assert log.titles == {str(i): f"Tea {i}" for i in range(5)}
    return True


def refusal(read, *args):
    with pytest.raises(ClickException) as refused:
        read(*args)
    assert "\n" not in refused.value.message
    return refused.value.message


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


def test_a_table_without_a_header_is_said_to_have_none(tmp_path):
    path = folder(tmp_path, shop__csv=table(ROWS[1:], "1,2,1500000000")) / "shop.csv"
    said = refusal(read_file, path, None, request())
    assert "write a first line that names the 3 columns" in said


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_separator_is_found_and_said(tmp_path, separator):
    titles = table([(i, f"Tea {i}") for i in range(5)], "item,title", separator)
    text = table(ROWS, separator=separator)
    log = read_own(folder(tmp_path, interactions__csv=text, items__csv=titles), request())
    assert is_the_log(log) and "interactions.csv: its cells are separated by" in log.notes[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "windows-1252"])
def test_other_encodings_are_read(tmp_path, encoding):
    titles = TITLES.replace("Tea", "Tee für")
    raw = folder(
        tmp_path, interactions__csv=table(ROWS).encode(encoding), items__csv=titles.encode(encoding)
    )
    if encoding == "windows-1252":
        said = refusal(read_own, raw, request())
        assert "items.csv, line 2: byte 0xfc is not UTF-8" in said
        assert "--encoding windows-1252" in said
    given = encoding if encoding == "windows-1252" else None
    assert read_own(raw, request(encoding=given)).titles["3"] == "Tee für 3"


def test_a_byte_order_mark_is_skipped_in_recbole_s_files(tmp_path):
    mark = b"\xef\xbb\xbf"
    raw = folder(
        tmp_path, a__inter=mark + tabbed(ROWS).encode(), a__item=mark + ATOMIC_TITLES.encode()
    )
    assert is_the_log(read_own(raw, request()))


def test_blank_lines_are_no_rows_and_later_lines_keep_their_numbers(tmp_path):
    text = table(ROWS).replace("\n1,", "\n\n,,\n1,", 1) + "\n\r\n"
    raw = folder(tmp_path, interactions__csv=text, items__csv=TITLES + "\n\n")
    assert is_the_log(read_own(raw, request()))
    folder(raw, interactions__csv=text.replace("\n2,0,", "\n ,0,"))
    assert "interactions.csv, line 14: the user is blank" in refusal(read_own, raw, request())


@pytest.mark.parametrize("end", ["2,4", "2,4,15000", "2"])
def test_a_file_that_was_cut_is_said_to_be(tmp_path, end):
    text = table(ROWS[:-1]) + end
    raw = folder(tmp_path, interactions__csv=text, items__csv=TITLES)
    assert "the file was cut" in refusal(read_own, raw, request())


def test_a_last_line_without_an_end_is_read(tmp_path):
    raw = folder(tmp_path, interactions__csv=table(ROWS).rstrip("\n"), items__csv=TITLES)
    assert is_the_log(read_own(raw, request()))


@pytest.mark.parametrize(
    "start, says",
    [
        (b"PK\x03\x04xx", "a zip file or an Excel sheet; unpack it, or save the sheet as csv"),
        (b"PAR1", "is parquet; give its name the ending .parquet"),
        (b"a\0b", "is no text (it holds zero bytes)"),
        (b"", "is empty, expected a header line and rows"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, start, says):
    path = folder(tmp_path, shop__csv=start) / "shop.csv"
    assert says in refusal(read_file, path, None, request())


# ---------------------------------------------------------------- ids and titles


@pytest.mark.parametrize("form", ["csv", "recbole", "parquet"])
def test_an_item_twice_and_a_blank_id_are_refused_in_every_format(tmp_path, form):
    def files(rows, titles):
        if form == "recbole":
            text = (
                ATOMIC_TITLES.partition("\n")[0] + "\n" + "".join(f"{i}\t{t}\n" for i, t in titles)
            )
            return folder(tmp_path, a__inter=tabbed(rows), a__item=text)
        if form == "csv":
            items = table(titles, "item,title")
            return folder(tmp_path, interactions__csv=table(rows), items__csv=items)
        for name, cells, columns in (
            ("interactions", rows, ["user", "item", "timestamp"]),
            ("items", titles, ["item", "title"]),
        ):
            frame = pl.DataFrame(cells, schema=columns, orient="row", strict=False)
            frame.write_parquet(tmp_path / f"{name}.parquet")
        return tmp_path

    titles = [(str(i), f"Tea {i}") for i in range(5)]
    text = [(str(u), str(i), t) for u, i, t in ROWS]
    assert is_the_log(read_own(files(text, titles), request()))
    said = refusal(read_own, files(text, [*titles, ("3", "Coffee")]), request())
    assert "item '3' is there twice, as 'Tea 3' and 'Coffee'" in said
    assert is_the_log(read_own(files(text, [*titles, ("3", "Tea 3")]), request()))
    for blank, word in (("", "is blank"), ("nan", "is 'nan'"), ("null", "is 'null'")):
        raw = files([*text, (blank, "1", 1_500_000_000)], titles)
        assert f"the user {word}" in refusal(read_own, raw, request())
        assert is_the_log(read_own(raw, request(drop_incomplete=True)))


def test_incomplete_rows_are_left_out_on_request_and_counted(tmp_path):
    rows = [*ROWS, ("", 1, 1_500_000_000), (1, 2, ""), (1, 9, 1_500_000_000)]
    raw = folder(tmp_path, interactions__csv=table(rows), items__csv=TITLES)
    log = read_own(raw, request(drop_incomplete=True))
    assert is_the_log(log)
    assert log.notes == [
        "2 of 18 rows without a user, an item or a timestamp are left out",
        "1 of 16 rows of items without a row in the item table are left out",
    ]


def test_ids_that_became_floats_are_the_whole_numbers_they_were(tmp_path):
    rows = [(f"{u}.0", f"{i}.0", f"{t}.0") for u, i, t in ROWS]
    assert is_the_log(
        read_own(folder(tmp_path, interactions__csv=table(rows), items__csv=TITLES), request())
    )


def test_titles_in_the_interactions_own_column_and_the_last_one_counts(tmp_path):
    rows = [(u, i, t, f"Tea {i}") for u, i, t in ROWS] + [(1, 3, 5, "Old tea"), (1, 3, 1_6e8, "")]
    path = folder(tmp_path, shop__csv=table(rows, "user,item,timestamp,title")) / "shop.csv"
    log = read_file(path, None, request())
    assert log.titles == {str(i): f"Tea {i}" for i in range(5)}
    assert "1 items had more than one title, the last one counts: item 3 was" in log.notes[-1]
    raw = folder(tmp_path / "raw", interactions__csv=path.read_bytes())
    assert read_own(raw, request()).titles == log.titles
    said = refusal(read_file, path, None, request(title="name"))
    assert "and name, as there is no table of titles" in said and "--title-column title" in said
