"""data/advice.py: a table without a header gets the one that its cells suggest, and the two
commands of the refusal, run as they stand, lead to the log.
"""

import gzip
import re
import shlex
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from own_logs import ROWS, TITLES, folder, is_the_log, refusal, request, table

from delrec.data.own import read_file

COMMAND = "python data/prepare.py shop --interactions RAW"


def follow(said):
    """The log that a refusal leads to, both its commands run as they stand."""
    found = re.search(
        r"what is wrong[^)]*\): (\(.*); and then: python data/prepare.py shop (.*)", said
    )
    subprocess.run(["bash", "-c", found[1]], check=True)
    words = shlex.split(found[2])
    flags = dict(zip(words[::2], words[1::2]))
    items = flags.get("--items")
    return read_file(
        Path(flags["--interactions"]),
        Path(items) if items else None,
        request(title=flags.get("--title-column")),
    )


def iso(time):
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%dT%H:%M:%SZ}"


def with_titles(rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


PUBLIC = {
    "check-ins__txt__gz": gzip.compress(
        with_titles((u, iso(t), 30.25 + i, -97.5, i) for u, i, t in ROWS).encode()
    ),
    "clicks__dat": "".join(f"{u},{iso(t)},{i},0\n" for u, i, t in ROWS),
    "my ratings__dat": "".join(f"{u},{i},4.5,{t}\n" for u, i, t in ROWS),
    "blanks__txt": "".join(f"{u} {i} {t}\n" for u, i, t in ROWS),
    "sheet__csv": "".join(f"{u};{i};{t}\r\n" for u, i, t in ROWS),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_table_without_a_header_gets_the_names_that_its_cells_suggest(tmp_path, name):
    path = folder(tmp_path, **{name: PUBLIC[name]}) / name.replace("__", ".")
    log = follow(refusal(read_file, path, None, request(command=COMMAND)))
    log.titles = {item: f"Tea {title}" for item, title in log.titles.items()}
    assert is_the_log(log) and log.rows.timed


def test_words_are_titles_of_the_ids_beside_them(tmp_path):
    rows = [(f"user_{u}", iso(t), i, f"Green tea {i}", f"t{t}", f"Song no {t}") for u, i, t in ROWS]
    path = folder(tmp_path, plays__tsv=with_titles(rows)) / "plays.tsv"
    log = follow(refusal(read_file, path, None, request(command=COMMAND)))
    assert log.titles == {str(i): f"Green tea {i}" for i in range(5)}
    assert log.rows.when.min() == 1_500_000_000 and set(log.rows.user) == {
        "user_0",
        "user_1",
        "user_2",
    }


@pytest.mark.parametrize(
    "text", ["0 0\n0 1\n0 2\n1 2\n1 0\n", "0 0 1 2\n1 2 0\n"], ids=["pairs", "sequences"]
)
def test_rows_without_a_time_are_numbered(tmp_path, text):
    path = folder(tmp_path, Beauty__txt=text) / "Beauty.txt"
    log = follow(refusal(read_file, path, None, request(command=COMMAND)))
    of_user = {user: [i for u, i, _ in rows_by_when(log) if u == user] for user in ("0", "1")}
    assert of_user == {"0": ["0", "1", "2"], "1": ["2", "0"]} and not log.rows.timed


def rows_by_when(log):
    by_when = sorted(zip(log.rows.when.tolist(), log.rows.user, log.rows.item))
    return [(u, i, n) for n, (_, u, i) in enumerate(by_when)]


SHOP = "Bestellt am;Kunde;ArtNr;Bezeichnung;Preis EUR"


def of_a_shop(when, n=12):
    """A shop's table without a name that says the time or the item; prices are each article's."""
    rows = [(when(t), f"K{t % 4}", f"{t % 5:03d}", f"Tee {t % 5}", f"{t % 5},50") for t in range(n)]
    return table(rows, SHOP.replace(";", ","), ";")


def test_a_time_and_an_item_are_found_by_their_cells(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text(of_a_shop(lambda t: f"2024-01-{1 + t:02d}T10:00:00"))
    said = refusal(read_file, path, None, request(command=COMMAND))
    assert said.endswith(
        f"name yours: {COMMAND} --user-column Kunde --item-column ArtNr "
        "--time-column 'Bestellt am' --title-column Bezeichnung"
    )
    flags = shlex.split(said.partition(COMMAND)[2])
    roles = ("user", "item", "timestamp", "title")
    log = read_file(path, None, request(**dict(zip(roles, flags[1::2]))))
    assert log.rows.timed and log.titles == {f"{i:03d}": f"Tee {i}" for i in range(5)}


NO_TEXT = {
    "spans": [timedelta(n) for n in range(12)],
    "bytes": [b"\xff" * (n + 1) for n in range(12)],
    "lists": [[n] for n in range(12)],
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_column_without_text_hides_none_of_the_others(tmp_path, kind):
    path = tmp_path / "shop.parquet"
    text = of_a_shop(lambda t: f"2024-01-{1 + t:02d}T10:00:00")
    shop = pl.read_csv(text.encode(), separator=";", infer_schema=False)
    shop.with_columns(pl.Series("Lieferung", NO_TEXT[kind])).write_parquet(path)
    said = refusal(read_file, path, None, request(command=COMMAND))
    assert "--item-column ArtNr --time-column 'Bestellt am' --title-column Bezeichnung" in said


def test_spans_of_time_are_no_ids_no_titles_and_no_positions(tmp_path):
    path, spans = tmp_path / "shop.parquet", NO_TEXT["spans"]
    columns = {"user": ["a"] * 12, "item": ["1"] * 12, "position": range(12), "title": ["Tea"] * 12}
    for name, what in {"item": "one id", "title": "one title", "position": "one number"}.items():
        pl.DataFrame(columns | {name: spans}).write_parquet(path)
        said = refusal(read_file, path, None, request())
        assert f"the column {name} is Duration" in said and f"expected {what} in each row" in said
    titles = tmp_path / "titles.parquet"
    pl.DataFrame({"item": ["1"], "title": ["Tea"], "lead": spans[:1]}).write_parquet(titles)
    pl.DataFrame(columns).write_parquet(path)
    log = read_file(path, titles, request())
    assert log.columns is None and any("are not kept: lead" in note for note in log.notes)
    pl.DataFrame({"sku": ["1"], "title": ["Tea"], "lead": spans[:1]}).write_parquet(titles)
    assert "so rename sku" in refusal(read_file, path, titles, request(command=COMMAND))


@pytest.mark.parametrize(
    "further, n_titles",
    [
        (lambda row, title: str(row), 950),  # nearly every title differs, as rows do
        (lambda row, title: f"A long text about {title}", 5),
    ],
)
def test_what_differs_with_every_row_and_what_is_a_text_is_no_item(tmp_path, further, n_titles):
    titles = [n * 7 % n_titles for n in range(1000)]
    rows = [(f"K{n % 9}", f"Tea {t}", further(n, t), "2024-01-05") for n, t in enumerate(titles)]
    text = table(rows, "Kunde,Buchtitel,Feld,Bestellt am", ";")
    (tmp_path / "shop.csv").write_text(text)
    said = refusal(read_file, tmp_path / "shop.csv", None, request(command=COMMAND))
    assert "--title-column Buchtitel" in said and "Feld " not in said.partition(COMMAND)[2]


@pytest.mark.parametrize("when", [lambda t: f"1700000{t:03d}", lambda t: "soon"])
def test_numbers_that_may_be_ids_and_words_are_no_time(tmp_path, when):
    (tmp_path / "shop.csv").write_text(of_a_shop(when))
    said = refusal(read_file, tmp_path / "shop.csv", None, request(command=COMMAND))
    assert "--time-column COLUMN" in said and "number them in a column position" in said


def test_of_two_columns_of_dates_none_is_guessed_and_no_rows_are_numbered(tmp_path):
    text = of_a_shop(lambda t: f"2024-01-{1 + t:02d}").replace("Preis EUR", "Versand am")
    (tmp_path / "shop.csv").write_text(re.sub(r"[0-9],50", "02.02.2024", text))
    said = refusal(read_file, tmp_path / "shop.csv", None, request(command=COMMAND))
    assert "--time-column COLUMN" in said and "number them" not in said


@pytest.mark.parametrize("user", ["Kunde", "user"])
@pytest.mark.parametrize("when", ["17000{:05d}", "2024-01-05T10:{:02d}"])
def test_a_date_that_each_user_has_one_of_is_no_time(tmp_path, user, when):
    rows = [
        (f"K{t % 4}", t % 5, f"Tee {t % 5}", f"0{1 + t % 4}.02.1980", when.format(t))
        for t in range(12)
    ]
    text = table(rows, f"{user},ArtNr,Bezeichnung,Geboren,Gekauft", ";")
    (tmp_path / "shop.csv").write_text(text)
    said = refusal(read_file, tmp_path / "shop.csv", None, request(command=COMMAND))
    is_date = "T" in when
    assert ("--time-column Gekauft" in said) == is_date and "--time-column Geboren" not in said
    assert ("number them in a column position" in said) != is_date


def test_a_date_is_a_birthday_only_by_all_rows(tmp_path):
    """Each of the first 1000 rows is of another user or of the same order."""
    rows = [
        (f"K{n % 500}", n % 5, f"Tee {n % 5}", f"{1 + n % 500 // 20:02d}.02.2024")
        for n in range(1000)
    ]
    rows += [(f"K{n}", n % 5, f"Tee {n % 5}", "01.03.2024") for n in range(5)]
    (tmp_path / "shop.csv").write_text(table(rows, "Kunde,ArtNr,Bezeichnung,Gekauft", ";"))
    said = refusal(read_file, tmp_path / "shop.csv", None, request(command=COMMAND))
    assert "--time-column Gekauft" in said


def test_netflix_s_blocks_and_a_table_of_titles_without_a_header_are_read(tmp_path):
    text = "".join(
        f"{i}:\n" + "".join(f"{u},3,2005-09-{10 + 3 * i + u}\n" for u in range(3)) for i in range(5)
    )
    titles = "".join(f"{i},2003,Tea of year {i}\n" for i in range(5))
    raw = folder(tmp_path, combined__txt=text, movies__csv=titles)
    said = refusal(read_file, raw / "combined.txt", raw / "movies.csv", request(command=COMMAND))
    command = said.partition("and then: ")[2]
    again = re.search(r"wrong\): (\(.*); and then", said)[1]
    subprocess.run(["bash", "-c", again], check=True)
    named = raw / "combined-named.csv"
    log = follow(refusal(read_file, named, raw / "movies.csv", request(command=command)))
    assert log.titles == {str(i): f"Tea of year {i}" for i in range(5)}
    assert sorted(log.rows.item) == sorted(str(i) for _, i, _ in ROWS)


def test_a_folder_with_an_apostrophe_has_commands_that_work(tmp_path):
    raw = tmp_path / "d'Artagnan's shop"
    text = "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)
    folder(raw, orders__csv=text, items__csv=TITLES)
    typed = f"python data/prepare.py shop --interactions {shlex.quote(str(raw / 'orders.csv'))}"
    typed += f" --items {shlex.quote(str(raw / 'items.csv'))}"
    said = refusal(read_file, raw / "orders.csv", raw / "items.csv", request(command=typed))
    assert is_the_log(follow(said))


def test_several_ids_in_a_cell_are_no_interaction(tmp_path):
    text = with_titles(
        (n, f"U{u}", iso(t), "N1 N2 N3", f"N{i}-1 N4-0") for n, (u, i, t) in enumerate(ROWS)
    )
    path = folder(tmp_path, behaviors__tsv=text) / "behaviors.tsv"
    said = refusal(read_file, path, None, request(command=COMMAND))
    assert "column 4 holds several ids in a cell ('N1 N2 N3')" in said


def test_without_titles_the_items_are_called_by_their_ids(tmp_path):
    path = folder(tmp_path, shop__csv=table(ROWS)) / "shop.csv"
    said = refusal(read_file, path, None, request(command=COMMAND))
    assert said.endswith(f"call the items by their ids: {COMMAND} --title-column item")
    log = read_file(path, None, request(title="item"))
    assert log.titles == {str(i): str(i) for i in range(5)}
    mine = folder(tmp_path, mine__csv=table(ROWS, "user,article id,timestamp")) / "mine.csv"
    said = refusal(read_file, mine, None, request(command=COMMAND))
    assert said.endswith(f"{COMMAND} --item-column 'article id' --title-column 'article id'")
    said = refusal(read_file, path, None, request(title="nmae", command=COMMAND))  # mistyped
    assert said.endswith(f"call the items by their ids: {COMMAND} --title-column item")
    properties = folder(tmp_path, properties__csv="item,property\n0,a\n") / "properties.csv"
    said = refusal(read_file, path, properties, request(command=f"{COMMAND} --items P"))
    by_ids = f"ids: {COMMAND.replace('RAW', str(path))} --title-column item"
    assert said.endswith(by_ids)
    mistyped = request(title="nmae", command=f"{COMMAND} --items P")
    assert refusal(read_file, path, properties, mistyped).endswith(by_ids)
    assert is_the_log(read_file(path, folder(tmp_path, t__csv=TITLES) / "t.csv", request()))
