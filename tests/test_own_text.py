"""data/forms.py, tables.py, own.py: separators, encodings, blank and cut lines, blank ids, an item
twice, titles in the log's own column.
"""

import gzip

import polars as pl
import pytest
from own_logs import (
    ATOMIC_TITLES,
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


@pytest.mark.parametrize("orders", ["windows-1252", "utf-16-le", "utf-8"])
@pytest.mark.parametrize("items", ["utf-8", "utf-8-sig", "utf-16", "windows-1252"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_encoding_is_of_the_files_that_are_not_utf8(tmp_path, orders, items, packed):
    if orders != "windows-1252" and items == "windows-1252":
        return  # two encodings that no byte tells apart
    given = "utf-16-le" if orders == "utf-16-le" else "windows-1252"
    rows = [(f"Jürgen{u}", i, t) for u, i, t in ROWS]
    orders, items = (
        table(rows).encode(orders),
        TITLES.replace("Tea", "Tee für").encode(items),
    )
    raw = folder(tmp_path, interactions__csv=orders, items__csv=items)
    if packed:
        for path in list(raw.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    log = read_own(raw, request(encoding=given))
    assert log.titles == {str(i): f"Tee für {i}" for i in range(5)}
    assert set(log.rows.user) == {f"Jürgen{u}" for u in range(3)}


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


def test_a_cell_too_many_in_a_later_line_is_named(tmp_path):
    rows = [(u, i, "3,50" if n > 8 else "4", t) for n, (u, i, t) in enumerate(ROWS)]
    text = table(rows, "user,item,price,timestamp")
    raw = folder(tmp_path, interactions__csv=text, items__csv=TITLES)
    said = refusal(read_own, raw, request())
    assert "interactions.csv, line 11: 5 cells where the header names 4" in said
    titles = table([(i, f"Tea {i}", "tea") for i in range(5)], "item,title,category")
    titles = titles.replace("Tea 3", "Tea, green, 100 g")
    raw = folder(tmp_path, interactions__csv=table(ROWS), items__csv=titles)
    assert "items.csv, line 5: 5 cells where the header names 3" in refusal(
        read_own, raw, request()
    )


@pytest.mark.parametrize("order", ["timestamp", "position"])
def test_a_line_break_in_a_quoted_cell_that_nobody_asks_for_makes_no_row(order, tmp_path):
    review = '"good\nbig, red, nice, 5"'
    rows = [(u, i, t, review if (u, i) == (1, 2) else "good") for u, i, t in ROWS]
    text = table(rows, f"user,item,{order},review")
    raw = folder(tmp_path, interactions__csv=text, items__csv=TITLES)
    assert is_the_log(read_own(raw, request()))


@pytest.mark.parametrize("note", ['"5 apples', '"y" said "he'])
@pytest.mark.parametrize("at", [2, 3])
def test_a_quote_that_csv_does_not_know_is_a_sign_where_nobody_asks(note, at, tmp_path):
    """As in exports without quotes, Amazon's of reviews."""
    rows = [(u, i, t, note if (u, i) == (1, 2) else "good") for u, i, t in ROWS]
    rows = [(*row[:at], row[3], *row[at:3]) for row in rows]
    names = ["user", "item", "timestamp"]
    text = table(rows, ",".join([*names[:at], "note", *names[at:]]), "\t")
    raw = folder(tmp_path, interactions__csv=text, items__csv=TITLES)
    log = read_own(raw, request())
    assert is_the_log(log)
    assert any("interactions.csv: quotes do not close as in csv" in said for said in log.notes)
    folder(raw, interactions__csv=text.replace("\n2\t0\t", "\n\t0\t"))
    assert "line 12: the user is blank" in refusal(read_own, raw, request())
    # the users could be "0" or 0
    folder(raw, interactions__csv=text.replace("\n0\t", '\n"0"\t'))
    assert "write the file as plain csv" in refusal(read_own, raw, request())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("user", ["user", "customer no"])
def test_a_line_break_in_the_header_is_a_blank(tmp_path, user, end):
    head = f'"{user}";item;timestamp;"Amount (EUR)"'
    rows = [(u, i, t, "3,50") for u, i, t in ROWS]
    text = table(rows, head, ";").replace("r no", f"r{end}no").replace("t (", f"t{end}(")
    raw = folder(tmp_path, interactions__csv=text, items__csv=TITLES)
    if user != "user":
        assert "the header names customer no, item" in refusal(read_own, raw, request())
    assert is_the_log(read_own(raw, request(user=user)))
    folder(raw, interactions__csv=text.replace("\n2;0;", "\n;0;"))
    said = refusal(read_own, raw, request(user=user))
    assert f"line {13 if user == 'user' else 14}: the user is blank" in said


def test_a_last_line_without_an_end_is_read(tmp_path):
    raw = folder(tmp_path, interactions__csv=table(ROWS).rstrip("\n"), items__csv=TITLES)
    assert is_the_log(read_own(raw, request()))


@pytest.mark.parametrize(
    "start, says",
    [
        (b"PK\x03\x04xx", "a zip file or an Excel sheet; unpack it, or save the sheet as csv"),
        (b"\x1f\x8b\x08", "is packed with gzip; give its name the ending .gz"),
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
    for blank, word in (
        ("", "is blank"),
        ("nan", "is 'nan'"),
        ("null", "is 'null'"),
        ("NA", "is 'NA'"),
    ):
        raw = files([*text, (blank, "1", 1_500_000_000)], titles)
        assert f"the user {word}" in refusal(read_own, raw, request())
        assert is_the_log(read_own(raw, request(drop_incomplete=True)))


@pytest.mark.parametrize("drop", [False, True])
def test_an_order_without_any_value_is_none(drop, tmp_path):
    head, asked = "user,item,timestamp,position", request(drop_incomplete=drop)

    def raw(name, rows):
        text = table(rows, head)
        return folder(tmp_path / name, interactions__csv=text, items__csv=TITLES)

    log = read_own(raw("times", [(u, i, t, "") for u, i, t in ROWS]), asked)
    assert is_the_log(log) and log.rows.timed and not log.notes
    log = read_own(raw("places", [(u, i, "", t) for u, i, t in ROWS]), asked)
    assert is_the_log(log) and not log.rows.timed and "so the order is the position" in log.notes[0]
    said = refusal(read_own, raw("none", [(u, i, "", "") for u, i, _ in ROWS]), asked)
    assert "no row has a value in the column timestamp; name another" in said


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


def test_ids_that_are_titles_are_written_as_the_ids_are(tmp_path):
    text = table([(u, f"{i}.0", t) for u, i, t in ROWS])
    path = folder(tmp_path, shop__csv=text, only__csv="item\n" + "17.0\n4.0\n") / "shop.csv"
    ids = {str(i): str(i) for i in range(5)}
    assert read_file(path, None, request(title="item")).titles == ids
    log = read_file(path, tmp_path / "only.csv", request(title="item"))
    assert log.titles == {"17": "17", "4": "4"}
    pl.DataFrame(
        {"user": [1, 1], "item": [17.0, 4.0], "timestamp": [1_500_000_000, 1_500_000_001]}
    ).write_parquet(tmp_path / "shop.parquet")
    log = read_file(tmp_path / "shop.parquet", None, request(title="item"))
    assert log.titles == {"17": "17", "4": "4"}


def test_ids_of_a_parquet_that_became_floats_are_whole_numbers(tmp_path):
    frame = pl.DataFrame({"user": [1.0, 2e15], "item": [0.0, 1.0], "timestamp": [5, 6]})
    frame.write_parquet(tmp_path / "interactions.parquet")
    raw = folder(tmp_path, items__csv=TITLES)
    assert read_own(raw, request()).rows.user.to_list() == ["1", "2000000000000000"]
    frame.with_columns(timestamp=pl.Series([5, None])).write_parquet(raw / "interactions.parquet")
    assert "row 2: timestamp is blank" in refusal(read_own, raw, request())


def test_no_number_in_a_parquet_is_no_time(tmp_path):
    times = [float(t) for _, _, t in ROWS] + [float("nan")]
    users, items = ([str(row[n]) for row in ROWS] + ["2"] for n in (0, 1))
    pl.DataFrame({"user": users, "item": items, "timestamp": times}).write_parquet(
        folder(tmp_path, items__csv=TITLES) / "interactions.parquet"
    )
    said = refusal(read_own, tmp_path, request())
    assert "row 16: timestamp is blank" in said and "--drop-incomplete" in said
    assert is_the_log(read_own(tmp_path, request(drop_incomplete=True)))


def test_bytes_of_a_parquet_are_text_or_ids_of_one_length(tmp_path):
    def written(ids):
        path = folder(tmp_path) / "shop.parquet"
        item = [f"Tea {i}".encode() for _, i, _ in ROWS]
        columns = {"user": ids, "item": item, "timestamp": [t for _, _, t in ROWS]}
        pl.DataFrame(columns).write_parquet(path)
        return path

    uuids = [bytes([u]) + b"\xff" * 15 for u, _, _ in ROWS]
    log = read_file(written(uuids), None, request(title="item"))
    assert set(log.rows.user) == {f"0{u}{'ff' * 15}" for u in range(3)}
    assert set(log.rows.item) == {f"Tea {i}" for i in range(5)}
    assert "shop.parquet: the bytes of user are read as hexadecimal numbers" in log.notes
    said = refusal(read_file, written([b"\xff" * (u + 1) for u, _, _ in ROWS]), None, request())
    assert "the column user holds bytes that are not UTF-8" in said


def test_ids_that_a_spreadsheet_rounded_are_refused(tmp_path):
    raw = folder(
        tmp_path, items__csv=TITLES, interactions__csv=table([(1, "4.00638E+12", 1_500_000_000)])
    )
    said = refusal(read_own, raw, request())
    assert "line 2: the item '4.00638E+12' was rounded by a spreadsheet" in said


@pytest.mark.parametrize("ids", [["7e12", "2E05", "a3f1"], ["10e10", "1e10", "7e12", "x"]])
def test_codes_that_look_like_rounded_numbers_are_codes(ids, tmp_path):
    text = table([(i, 1, 1_500_000_000) for i in ids])
    raw = folder(tmp_path, items__csv=TITLES, interactions__csv=text)
    assert read_own(raw, request()).rows.user.to_list() == ids


@pytest.mark.parametrize(
    "ids", [["7e12", "12", ""], ["7e12", "2e05"], ["B00X", "4.00638e+12"], ["B00X", "4E+12"]]
)
def test_rounded_numbers_are_refused_beside_numbers_and_beside_codes(ids, tmp_path):
    text = table([(i, 1, 1_500_000_000) for i in ids])
    raw = folder(tmp_path, items__csv=TITLES, interactions__csv=text)
    assert "was rounded by a spreadsheet" in refusal(read_own, raw, request(drop_incomplete=True))


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
