"""data/published.py, data/sources.py: published data sets, in their publishers' files."""

import json
import re
import zipfile

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from logs import packed, prepared, random_log, replace, run
from scripts import ROOT, sentence

from delrec.data import prepare, raw_files, synthetic
from delrec.data.amazon import read_amazon
from delrec.data.prepared import load_data
from delrec.data.published import stop_unless_utf8
from delrec.data.sources import SOURCES


def amazon(raw, layout):
    """The random log as Amazon's files of a category, in one of the layouts met in the wild."""
    rows = [(f"A{u:013d}", f"B{i:09d}", int(t)) for u, i, t in (map(int, r) for r in random_log())]
    items = sorted({r[1] for r in rows})
    if layout == "2014 ratings":
        (raw / "ratings_Beauty.csv").write_text("".join(f"{u},{i},5.0,{t}\n" for u, i, t in rows))
    elif layout == "2018 ratings":
        (raw / "Beauty.csv").write_text("".join(f"{i},{u},5.0,{t}\n" for u, i, t in rows))
    else:
        packed(
            raw / ("reviews_Beauty_5.json.gz" if layout == "2014 reviews" else "Beauty_5.json.gz"),
            [
                json.dumps(
                    {
                        "overall": 5.0,
                        "reviewerID": u,
                        "asin": i,
                        "unixReviewTime": t,
                        "reviewText": "{'asin': 'B'}",
                    }
                )
                for u, i, t in rows
            ],
        )
    record = {
        i: {"asin": i, "title": f"Salt &amp; Pepper {n}", "price": 3.5} for n, i in enumerate(items)
    }
    record[items[3]].pop("title")
    packed(
        raw / "meta_Beauty.json.gz",
        [
            repr(r) if "2014" in layout else json.dumps(r)
            for r in [{"asin": "unknown", "title": "x"}, *record.values()]
        ],
    )
    return items


@pytest.mark.parametrize("layout", ["2014 ratings", "2018 ratings", "2014 reviews", "2018 reviews"])
def test_amazon_s_layouts_are_one_log(tmp_path, layout):
    raw = tmp_path / "raw"
    raw.mkdir()
    items = amazon(raw, layout)
    result = run("beauty", "--raw", raw, "--out", tmp_path / "out", "--core", 1)
    assert result.exit_code == 0, result.output
    data = load_data(str(tmp_path / "out"))
    assert (
        data.n_items == len(items)
        and data.n_users == 60
        and data.meta["words"] == {"noun": "product", "verb": "bought"}
    )
    assert data.titles[1:6] == [
        "Salt & Pepper 0",
        "Salt & Pepper 1",
        "Salt & Pepper 2",
        f"item {items[3]}",
        "Salt & Pepper 4",
    ]
    assert "as published it had 2,023,070" in result.output and data.meta["titles"]["blank"] == 1
    want, _ = prepared(tmp_path / "csv", random_log(), ties="shuffled")
    assert all(
        (np.load(data.folder / f"{part}.npy") == np.load(want.folder / f"{part}.npy")).all()
        for part in ("items", "ptr", "times", "train", "val", "test")
    )


# each writes the random log as a publisher's files


def movielens(raw, rows, items):
    files = {
        "ratings.dat": "".join(f"{u}::{i}::5::{t}\n" for u, i, t in rows),
        "movies.dat": "".join(f"{i}::Misérables {i}, Les (1995)::Drama\n" for i in items),
    }
    for name, text in files.items():
        (raw / name).write_bytes(text.encode("latin-1"))


def movielens_zip(raw, rows, items):
    movielens(raw, rows, items)
    with zipfile.ZipFile(raw / "ml-1m.zip", "w") as z:
        for name in ("ratings.dat", "movies.dat"):
            z.write(raw / name, f"ml-1m/{name}")
            (raw / name).unlink()


def movielens_csv(raw, rows, items):
    (raw / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},4.5,{t}\n" for u, i, t in rows)
    )
    (raw / "movies.csv").write_text(
        "movieId,title,genres\n"
        + "".join(f'{i},"Misérables {i}, Les (1995)",Drama\n' for i in items)
    )


def steam(raw, rows, items):
    def day(t):
        return str(np.datetime64(int(t), "D"))

    lines = [
        {"username": f"{u}", "product_id": str(i), "date": day(t), "text": 'it\'s "good" [h1]'}
        for u, i, t in rows
    ] + [{"username": "", "product_id": "1", "date": day(1)}]
    packed(
        raw / "steam_reviews.json.gz",
        [repr(r).replace("'username'", "u'username'") for r in lines],
    )
    packed(
        raw / "steam_games.json.gz",
        [repr({"id": str(i), "app_name": f"Misérables {i}, Les (1995)"}) for i in items],
    )


def kuairec(raw, rows, items):
    (raw / "small_matrix.csv").write_text(
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
        + "".join(f"{u},{i},1,1,x,x,{t}.25,{2.5}\n" for u, i, t in rows)
        + "1,1,1,1,x,x,7.0,1.9\n1,1,1,1,,,,3.0\n"
    )
    (raw / "kuairec_caption_category.csv").write_text(
        "video_id,manual_cover_text,caption,topic_tag\n"
        + "".join(f'{i},UNKNOWN,"国王, {i}",[]\n' for i in items)
    )


def lastfm(raw, rows, items):
    (raw / "user_taggedartists-timestamps.dat").write_text(
        "userID\tartistID\ttagID\ttimestamp\n"
        + "".join(
            f"{u}\t{i}\t{k}\t{1104537600000 + 1000 * t}\n" for u, i, t in rows for k in (1, 2)
        )
        + "1\t1\t1\t-428720400000\n"
    )
    (raw / "artists.dat").write_text(
        "id\tname\turl\tpictureURL\n" + "".join(f"{i}\tArtist {i}\tx\ty\n" for i in items)
    )


# the data set, who writes its files, the title of an item, and what is said of rows left out
FORMS = {
    "ml-1m": ("ml-1m", movielens, "Les Misérables {} (1995)", ""),
    "ml-1m zipped": ("ml-1m", movielens_zip, "Les Misérables {} (1995)", ""),
    "ml-latest-small": ("ml-latest-small", movielens_csv, "Les Misérables {} (1995)", ""),
    "steam": ("steam", steam, "Misérables {}, Les (1995)", "1 reviews without"),
    "kuairec": ("kuairec", kuairec, "国王, {}", "2 of 3,002 rows"),
    "lastfm": ("lastfm", lastfm, "Artist {}", "1 rows dated before"),
}


def published_files(raw, publisher):
    rows = [tuple(map(int, r)) for r in random_log()]
    raw.mkdir()
    publisher(raw, rows, sorted({r[1] for r in rows}))
    return raw


@pytest.mark.parametrize("form", FORMS)
def test_other_published_forms(tmp_path, monkeypatch, form):
    name, publisher, title, note = FORMS[form]
    monkeypatch.setattr(raw_files, "CACHE", tmp_path / "cache")
    raw = published_files(tmp_path / "raw", publisher)
    want, _ = prepared(tmp_path / "csv", random_log(), ties="shuffled")
    result = run(name, "--raw", raw, "--out", tmp_path / "out", "--core", 1, "--overwrite")
    assert result.exit_code == 0, result.output
    data = load_data(str(tmp_path / "out"))
    assert (data.items == want.items).all() and (data.train == want.train).all()
    first = (data.folder / "raw_items.txt").read_text().split("\n")[0]
    assert data.titles[1] == title.format(first)
    assert note in result.output
    assert SOURCES[name].noun == data.meta["words"]["noun"]


def test_each_data_set_known_by_name_is_listed_and_each_reader_shown():
    page = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    rows = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    for name, source in SOURCES.items():
        assert re.search(rf"[ (]{name}[,)]", " ".join(prepare.__doc__.split())), name
        assert f"`{name}`" in rows, f"the table of data/README.md lacks {name}"
        shown = {SOURCES[form[0]].read for form in FORMS.values()}
        # Amazon's layouts have a test of their own
        assert source.read in shown | {read_amazon}, f"FORMS shows no file of {name}"


def test_lines_of_cells_are_read_packed_and_a_cut_file_is_named(tmp_path):
    path, lines = tmp_path / "plays.tsv.gz", ["userID\titem", "7\tTeä", "8\tSalt"]
    packed(path, lines)
    rows, place = raw_files.split_lines(path, "\t", {"user": 0, "item": 1}, 2, [])
    assert rows.rows() == [("7", "Teä"), ("8", "Salt")] and place(1) == f"{path}, line 3"
    stop_unless_utf8(path)
    path.write_bytes(path.read_bytes()[:-9])
    for read in (stop_unless_utf8, lambda path: raw_files.lines_of(path, [])):
        assert sentence(read, path).startswith(f"{path} is not a whole gzip file")


def test_a_missing_file_is_named_and_a_literal_is_parsed_never_run(tmp_path):
    raw = published_files(tmp_path / "raw", steam)
    (raw / "steam_games.json.gz").unlink()
    assert (
        "holds no steam_games.json.gz"
        in run("steam", "--raw", raw, "--out", tmp_path / "bad").output
    )
    packed(raw / "steam_games.json.gz", ["{'id': __import__('os').getcwd()}"])
    assert (
        "line 1: neither JSON nor a Python literal"
        in run("steam", "--raw", raw, "--out", tmp_path / "bad").output
    )
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "name, publisher, file, old, line",
    [
        ("kuairec", kuairec, "small_matrix.csv", b",x,x,", 2),
        ("kuairec", kuairec, "kuairec_caption_category.csv", b"UNKNOWN", 2),
        ("lastfm", lastfm, "user_taggedartists-timestamps.dat", b"\t1\t", 2),
        ("ml-latest-small", movielens_csv, "ratings.csv", b",4.5,", 2),
    ],
)
def test_a_bad_byte_in_a_publisher_s_file_is_named(tmp_path, name, publisher, file, old, line):
    raw = published_files(tmp_path / "raw", publisher)
    replace(file, old, b"\xe9" + old)(raw)
    result = run(name, "--raw", raw, "--out", tmp_path / "bad")
    said = f"Error: {raw / file}, line {line}: byte 0xe9 is not UTF-8; save the file as UTF-8"
    assert result.exit_code == 1 and result.output.startswith(said), result.output
    assert not (tmp_path / "bad").exists()


def test_the_synthetic_log_has_the_shape_it_says(tmp_path):
    result = CliRunner().invoke(synthetic.main, [str(tmp_path / "raw"), "--divide", "1000"])
    assert result.exit_code == 0, result.output
    rows = pl.read_csv(tmp_path / "raw" / "Home_and_Kitchen.csv", has_header=False)
    assert (rows[:, 1].n_unique(), rows[:, 0].n_unique(), len(rows)) == (9767, 1286, 21928)
    result = run("home-kitchen", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    data = load_data(str(tmp_path / "out"))
    assert (
        data.meta["raw"] == {"users": 9767, "items": 1286, "interactions": 21928}
        and 200 < data.n_users < 2000
    )
    assert run("home-kitchen", "--out", tmp_path / "out", "--check").exit_code == 0
