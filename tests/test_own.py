"""data/own.py: a log of one's own as csv, parquet or RecBole's files, whatever its columns are
called.
"""

import gzip

import polars as pl
import pytest
from logs import contents, prepared, random_log, replace, run, toy, write

from delrec.data.forms import form_of
from delrec.data.hints import Request
from delrec.data.own import read_own
from delrec.data.prepared import load_data
from delrec.data.tables import careful_rows, quick_rows


def test_timestamp_beats_position_only_if_every_row_has_one(tmp_path):
    rows = [(u, i, t, 1000 - t) for u, i, t in toy()]
    header = "user,item,timestamp,position"
    data, _ = prepared(tmp_path, rows, header=header)
    assert data.meta["order"] == "timestamp" and data.items[0] == 3
    data, output = prepared(
        tmp_path, [(*rows[0][:2], "", rows[0][3]), *rows[1:]], "--overwrite", header=header
    )
    assert (
        data.meta["order"] == "position"
        and data.items[0] == 39
        and "1 of 45 rows have no timestamp" in output
    )


def test_words_and_gzip_and_bom(tmp_path):
    raw = write(tmp_path / "raw", toy())
    for name in ("interactions.csv", "items.csv"):
        (raw / f"{name}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + (raw / name).read_bytes()))
        (raw / name).unlink()
    assert (
        run(
            "toy",
            "--raw",
            raw,
            "--out",
            tmp_path / "out",
            "--core",
            1,
            "--noun",
            "product",
            "--verb",
            "bought",
        ).exit_code
        == 0
    )
    assert load_data(str(tmp_path / "out")).meta["words"] == {"noun": "product", "verb": "bought"}


def same_as_csv(tmp_path, raw, *args):
    """Whatever the form of the log, the prepared folder is the one of the plain csv."""
    want, _ = prepared(tmp_path / "csv", random_log())
    result = run(
        "toy", "--raw", raw, "--out", tmp_path / "out", "--core", 1, "--ties", "item", *args
    )
    assert result.exit_code == 0, result.output
    assert load_data(str(tmp_path / "out")).meta["hash"] == want.meta["hash"]
    assert contents(tmp_path / "out")["raw_users.txt"] == contents(want.folder)["raw_users.txt"]


def test_columns_of_other_names_and_columns_too_many(tmp_path):
    raw = write(tmp_path / "raw", [(*row, 5) for row in random_log()], header="who,what,when,stars")
    (raw / "items.csv").write_text(
        (raw / "items.csv").read_text().replace("item,title", "what,name", 1)
    )
    same_as_csv(
        tmp_path,
        raw,
        "--user-column",
        "who",
        "--item-column",
        "what",
        "--time-column",
        "when",
        "--title-column",
        "name",
    )


def test_parquet(tmp_path):
    raw, rows = write(tmp_path / "raw", random_log()), random_log()
    (raw / "interactions.csv").unlink()
    pl.DataFrame(
        {
            "extra": [1.5] * len(rows),
            "user": [int(r[0]) for r in rows],
            "item": [str(r[1]) for r in rows],
            "timestamp": [int(r[2]) for r in rows],
        }
    ).write_parquet(raw / "interactions.parquet")
    same_as_csv(tmp_path, raw)
    for change, says in (
        ({"user": None}, "no row has a value in the column user"),
        ({"timestamp": "soon"}, "row 1: timestamp 'soon' is neither a number nor a date"),
        ({"timestamp": -1}, "row 1: timestamp '-1' is before 1970"),
    ):
        column, value = next(iter(change.items()))
        frame = pl.DataFrame(
            {"user": ["1", "2"], "item": ["1", "2"], "timestamp": [1, 2]}
        ).with_columns(pl.lit(value, dtype=None if value is not None else pl.String).alias(column))
        frame.write_parquet(raw / "interactions.parquet")
        result = run("toy", "--raw", raw, "--out", tmp_path / "bad")
        assert (
            result.exit_code == 1 and says in result.output and not (tmp_path / "bad").exists()
        ), result.output
    (raw / "interactions.parquet").write_bytes(b"PAR1 and nothing")
    assert "cannot be read as parquet" in run("toy", "--raw", raw, "--out", tmp_path / "bad").output


def recbole(raw):
    """The random log as RecBole's atomic files."""
    rows = random_log()
    raw.mkdir()
    (raw / "toy.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in rows)
    )
    (raw / "toy.item").write_text(
        "item_id:token\tmovie_title:token_seq\tclass:token_seq\n"
        + "".join(f"{i}\tTitle {i}\tx\n" for i in sorted({r[1] for r in rows}))
    )
    return raw


def test_recbole_s_atomic_files(tmp_path):
    raw = recbole(tmp_path / "raw")
    same_as_csv(tmp_path, raw)
    (raw / "toy.item").unlink()
    assert "no .item file" in run("toy", "--raw", raw, "--out", tmp_path / "bad").output


@pytest.mark.parametrize(
    "name, old, line",
    [("toy.inter", b"user_id", 1), ("toy.inter", b"\t4\t", 2), ("toy.item", b"Title 1\t", 3)],
)
def test_a_bad_byte_in_recbole_s_files_is_named(tmp_path, name, old, line):
    raw = recbole(tmp_path / "raw")
    replace(name, old, b"\xe9" + old)(raw)
    result = run("toy", "--raw", raw, "--out", tmp_path / "bad")
    said = f"Error: {raw / name}, line {line}: byte 0xe9 is not UTF-8; save the file as UTF-8"
    assert result.exit_code == 1 and result.output.startswith(said), result.output
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.replace("3,", '"3",'),
        lambda text: text.replace(",5\n", ", 5 \n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n7,", "\n 7 ,"),
        lambda text: text + "\n\n",
        lambda text: text.replace("\n7,", "\n\n7,").replace("\n8,", "\n,,\n8,"),
        lambda text: text.replace(",", ";"),
        lambda text: "\ufeffsep=,\n" + text,
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_quick_reader_reads_as_the_careful_one_or_not_at_all(
    tmp_path, monkeypatch, change, packed
):
    raw = write(tmp_path / "raw", random_log(500))
    text = change((raw / "interactions.csv").read_text())
    path = raw / ("interactions.csv.gz" if packed else "interactions.csv")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    names = ["user", "item", "timestamp"]
    form, header, _ = form_of(path, names, None)
    quick, (careful, lines) = (
        read(path, form, header, names) for read in (quick_rows, careful_rows)
    )
    assert (quick is None) == ('"' in text)
    if quick:
        assert quick[0].select(names).equals(careful.select(names))
        assert quick[1] is None or (quick[1] == lines).all()


def asked_about(folder, time_of, column="timestamp"):
    """What is said of a column of numbers, time_of(user, number of its row), that may be no times:
    50 users have 12 rows each."""
    rows = [(u, 7 * (u + n) % 40, time_of(u, n)) for u in range(50) for n in range(12)]
    log = read_own(write(folder, rows, header=f"user,item,{column}"), Request())
    return [note for note in log.notes if "are they times?" in note]


NO_TIMES = {
    "1 to 5": lambda u, n: (u + n * n) % 5 + 1,  # a rating
    "0.5 to 4.5": lambda u, n: (u + n * n) % 9 / 2 + 0.5,
    "1 to 101": lambda u, n: 1 + 99 * (n == 3) + n % 2,  # a quantity
    "1 to 4": lambda u, n: n // 3 + 1,  # orders of several rows
}
TIMES = {
    "a position": lambda u, n: n + 1,
    "a position with gaps": lambda u, n: 3 * n + u % 5,
    "seconds since the log began": lambda u, n: 977 * u + 5003 * (n // 2),
    "days": lambda u, n: f"2024-01-{n // 2 + 1:02}",
    "days in digits": lambda u, n: 20240101 + n // 2,
    "days in seconds": lambda u, n: 1_700_000_000 + 86_400 * (n // 2),
}


@pytest.mark.parametrize("values", NO_TIMES)
def test_small_numbers_that_come_again_in_rows_of_a_user_may_be_no_times(values, tmp_path):
    (note,) = asked_about(tmp_path, NO_TIMES[values])
    assert f"different numbers, {values}, and " in note
    assert "--time-column" in note and "--position-column" in note


@pytest.mark.parametrize("kind", TIMES)
def test_times_and_positions_are_not_asked_about(kind, tmp_path):
    assert not asked_about(tmp_path, TIMES[kind])


def test_an_order_that_is_named_one_may_come_again(tmp_path):
    assert not asked_about(tmp_path, NO_TIMES["1 to 4"], "position")
