"""data/prepare.py: exact arrays of a toy log, no leak, candidates, determinism, bad input, the
embedded defaults.
"""

import gzip
import io
import json
import os
import subprocess
import sys
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import drawing

from delrec.data import prepare
from delrec.data import raw as reading
from delrec.data.prepared import candidates, load_data, users

SCRIPT = Path(prepare.__file__)


def toy():
    """User 8 has items 1..20 at times 1..20, user 9 items 21..40 at times 21..40; user 7 has a tie
    (5 and 3 at 10), a repeat (5 again at 35) and a duplicate row (39 at 45).
    """
    rows = [(8, i, i) for i in range(1, 21)] + [(9, i, i) for i in range(21, 41)]
    return rows + [(7, 39, 45), (7, 5, 10), (7, 3, 10), (7, 5, 35), (7, 39, 45)]


def write(folder, rows, header="user,item,timestamp", titles=None, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [header] + [
        ",".join([f"{prefix}{row[0]}", f"{prefix}{row[1]}", *map(str, row[2:])]) for row in rows
    ]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    titles = titles or {
        f"{prefix}{item}": f"Title {item}"
        for item in sorted({row[1] for row in rows}, reverse=True)
    }
    (folder / "items.csv").write_text(
        "item,title\n" + "".join(f'{item},"{title}"\n' for item, title in titles.items())
    )
    return folder


def run(*args):
    return CliRunner().invoke(prepare.main, [str(arg) for arg in args])


def prepared(tmp_path, rows, *args, ties="item", **kwargs):
    result = run(
        "toy",
        "--raw",
        write(tmp_path / "raw", rows, **kwargs),
        "--out",
        tmp_path / "out",
        "--core",
        1,
        "--ties",
        ties,
        *args,
    )
    assert result.exit_code == 0, result.output
    return load_data(str(tmp_path / "out")), result.output


def contents(folder):
    """Every file's bytes, but of meta.json without where the log came from."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    meta = json.loads(files["meta.json"])
    return files | {
        "meta.json": {
            key: value for key, value in meta.items() if key not in ("source", "raw_sha256")
        }
    }


# ---------------------------------------------------------------- the protocol


def test_temporal_split_of_the_toy_log(tmp_path):
    data, output = prepared(tmp_path, toy())
    assert (
        data.items.dtype == np.int32
        and data.ptr.dtype == data.times.dtype == data.train.dtype == np.int64
    )
    assert data.items.tolist() == [3, 5, 5, 39, *range(1, 41)]
    assert data.ptr.tolist() == [0, 4, 24, 44]
    assert data.times.tolist() == [10, 10, 35, 45, *range(1, 41)]
    assert data.meta["cuts"] == [34, 37]  # places 35 and 39 of the 44 sorted times
    assert data.train.tolist() == [1, *range(5, 24), *range(25, 37)]
    assert data.val.tolist() == [2, 37, 38, 39]
    assert data.test.tolist() == [3, 40, 41, 42, 43]
    assert data.titles == [""] + [f"Title {i}" for i in range(1, 41)]
    assert (data.folder / "raw_users.txt").read_text() == "7\n8\n9\n"
    meta = data.meta
    assert meta["raw"] == {"users": 3, "items": 40, "interactions": 45} and meta["duplicates"] == 1
    assert (
        meta["cold"] == {"items": 7, "val": 3, "test": 5}
        and meta["ties"] == 1
        and meta["repeats"] == round(1 / 44, 6)
    )
    assert meta["candidates"] == [15, 20] and "candidates_*_100.npy are not written" in output
    assert "train 32, val 4, test 5" in output


def test_leave_one_out_split_of_the_toy_log(tmp_path):
    data, _ = prepared(tmp_path, toy(), "--split", "leave-one-out")
    assert data.train.tolist() == [1, *range(5, 22), *range(25, 42)]
    assert data.val.tolist() == [2, 22, 42] and data.test.tolist() == [3, 23, 43]
    # 19, 20, 39, 40 are only targets
    assert data.meta["cuts"] is None and data.meta["cold"] == {"items": 4, "val": 2, "test": 3}


def test_position_is_an_order_without_times(tmp_path):
    data, _ = prepared(tmp_path, toy(), header="user,item,position")
    assert data.times is None and not (data.folder / "times.npy").exists()
    assert data.meta["split"] == "leave-one-out" and data.meta["order"] == "position"
    assert data.items.tolist() == [3, 5, 5, 39, *range(1, 41)]


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


def test_k_core_is_iterated():
    # item 2 has one row; without it user 2 has one; without that everybody left has two
    user, item = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 1, 2])
    assert prepare.k_core(user, item, 2).tolist() == [True] * 4 + [False] * 2
    assert not prepare.k_core(user, item, 3).any()
    assert prepare.k_core(user, item, 1).all()


def test_ids_are_in_numeric_order_only_if_all_are_integers():
    assert prepare.number(["10", "9", "10", "-1"])[0].to_list() == ["-1", "9", "10"]
    assert prepare.number(["10", "9", "x"])[0].to_list() == ["10", "9", "x"]
    assert prepare.number(["10", "9", "10"])[1].tolist() == [1, 0, 1]


def random_log(n=3000, prefix=""):
    rng = np.random.default_rng(1)
    return [
        (f"{prefix}{u}", f"{prefix}{i}", t) for u, i, t in rng.integers(0, [60, 300, 500], (n, 3))
    ]


@pytest.mark.parametrize("split", ["temporal", "leave-one-out"])
def test_nothing_leaks(tmp_path, split):
    data, _ = prepared(tmp_path, random_log(), "--split", split)
    t80, t90 = data.meta["cuts"] or (None, None)
    assert not set(data.train) & set(data.val) and not set(data.val) & set(data.test)
    for name, index in (("train", data.train), ("val", data.val), ("test", data.test)):
        assert (np.diff(index) > 0).all()
        begin = data.ptr[users(data, index)]
        assert (index > begin).all()  # at least one earlier item
        for n, start in zip(index, begin):
            assert (data.times[start:n] <= data.times[n]).all()
        if split == "temporal":
            low, high = {"train": (0, t80), "val": (t80, t90), "test": (t90, 10**9)}[name]
            assert (low <= data.times[index]).all() and (data.times[index] < high).all()
    if split == "leave-one-out":
        assert np.array_equal(data.test, data.ptr[1:] - 1) and np.array_equal(
            data.val, data.ptr[1:] - 2
        )


@pytest.mark.parametrize("ties", ["item", "shuffled"])
def test_ties_in_time_are_in_item_order_only_on_request(tmp_path, ties):
    data, _ = prepared(tmp_path, random_log(), ties=ties)
    owner = np.repeat(np.arange(data.n_users), np.diff(data.ptr))
    tied = (np.diff(owner) == 0) & (np.diff(data.times) == 0)
    assert tied.sum() == data.meta["ties"] > 30
    rising = (np.diff(data.items)[tied] > 0).mean()
    assert rising == 1 if ties == "item" else 0.2 < rising < 0.8


# ---------------------------------------------------------------- candidates


@pytest.mark.parametrize("C", [15, 20, 100])
def test_candidates_hold_the_target_once_and_nothing_the_user_touched(tmp_path, C):
    data, _ = prepared(tmp_path, random_log())
    for split in ("val", "test"):
        target = np.asarray(data.items[getattr(data, split)])
        rows, owner = candidates(data, split, C), users(data, getattr(data, split))
        assert rows.shape == (len(target), C) and rows.min() >= 1 and rows.max() <= data.n_items
        assert ((rows == target[:, None]).sum(1) == 1).all()
        assert all(len(set(row)) == C for row in rows)
        for row, u, t in zip(rows, owner, target):
            assert set(row) & set(data.items[data.ptr[u] : data.ptr[u + 1]]) == {t}
        where = (rows == target[:, None]).argmax(1)
        assert len(set(where)) > 5  # shuffled


def test_candidates_are_uniform_even_for_users_who_leave_few():
    # user 0 touched items 1..4 of 20, user 1 all but 14: each free item must appear equally often
    touched = np.sort(np.concatenate([np.arange(1, 5), 21 + np.arange(15, 21)]))
    user = np.repeat([0, 1], 4000)
    rows = prepare.draw_candidates(
        np.where(user == 0, 1, 20), user, touched, 20, 15, np.random.default_rng(0)
    )
    count = np.bincount(rows[:4000].ravel(), minlength=21)
    assert count[1] == 4000 and (count[2:5] == 0).all()
    assert abs(count[5:] / 4000 - 14 / 16).max() < 0.03
    assert (np.bincount(rows[4000:].ravel(), minlength=21)[1:15] == 4000).all()


def test_seed_changes_the_candidates_and_nothing_else(tmp_path):
    write(tmp_path / "raw", toy())
    for seed in (0, 1):
        assert (
            run(
                "toy",
                "--raw",
                tmp_path / "raw",
                "--core",
                1,
                "--seed",
                seed,
                "--out",
                tmp_path / str(seed),
            ).exit_code
            == 0
        )
    a, b = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert {name for name in a if a[name] != b[name]} == {"meta.json"} | {
        name for name in a if name.startswith("candidates")
    }
    assert a["meta.json"]["hash"] != b["meta.json"]["hash"]


# ---------------------------------------------------------------- determinism


def test_neither_hash_seed_nor_row_order_matter(tmp_path):
    rows = random_log(prefix="x")
    shuffled = [rows[i] for i in np.random.default_rng(2).permutation(len(rows))]
    titles = {item: f"The {item}" for item in sorted({row[1] for row in rows})}
    folders = []
    for seed, log, names in (("1", rows, titles), ("2", shuffled, dict(reversed(titles.items())))):
        raw, out = write(tmp_path / f"raw{seed}", log, titles=names), tmp_path / f"out{seed}"
        subprocess.run(
            [sys.executable, SCRIPT, "toy", "--raw", raw, "--out", out],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
        folders.append(out)
    assert contents(folders[0]) == contents(folders[1])
    with drawing():
        assert run("toy", "--raw", tmp_path / "raw1", "--out", tmp_path / "again").exit_code == 0
    assert all(
        (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
        for path in folders[0].iterdir()
    )


# ---------------------------------------------------------------- titles and words


def test_titles_are_cleaned_and_counted(tmp_path):
    titles = {str(i): f"Title {i}" for i in range(1, 41)}
    titles |= {
        "1": "  two\nlines\tand\x07 a bell ",
        "2": " ",
        "3": "Title 4",
        "5": 'a ""quoted"" one, with a comma',
    }
    data, output = prepared(tmp_path, toy(), titles=titles)
    assert data.titles[1:6] == [
        "two lines and a bell",
        "item 2",
        "Title 4",
        "Title 4",
        'a "quoted" one, with a comma',
    ]
    assert (
        data.meta["titles"] | {"words": 0, "characters": 0}
        == {"blank": 1, "duplicate": 1, "cleaned": 1, "cut": 0, "words": 0, "characters": 0}
        and "1 blank" in output
        and len(data.titles) == 41
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


@pytest.mark.parametrize(
    "filed, plain",
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Tin Drum, The (Blechtrommel, Die) (1979)", "The Tin Drum (Die Blechtrommel) (1979)"),
        ("unknown", "unknown"),
        (
            "Maybe, Maybe Not (Bewegte Mann, Der) (1994)",
            "Maybe, Maybe Not (Der Bewegte Mann) (1994)",
        ),
        ("I, The Jury (1982)", "I, The Jury (1982)"),
        ("Affair to Remember, An (1957)", "An Affair to Remember (1957)"),
    ],
)
def test_articles_stand_in_front(filed, plain):
    assert reading.plain_title(filed) == plain


@pytest.mark.parametrize(
    "text, clean",
    [
        ("Salt &amp; Pepper &quot;Set&quot;", 'Salt & Pepper "Set"'),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("R&D, AT&T; x", "R&D, AT&T; x"),
        ("&#39;til &#x4e2d;", "'til 中"),
        ("<b>Bold</b> <span class='x'>move</span><br/>now", "Bold move now"),
        ("I <3 you, 2 > 1", "I <3 you, 2 > 1"),
        ("a\x00b\u2028c\td", "a b c d"),
        ("国王 – Король", "国王 – Король"),
    ],
)
def test_a_title_is_plain_text(text, clean):
    assert prepare.clean_title(text) == (clean, False)


def test_a_title_too_long_is_cut_behind_a_word():
    title, cut = prepare.clean_title("word " * 400)
    assert cut and title == " ".join(["word"] * 50) and len(title) == 249
    assert prepare.clean_title("x" * 10_000) == ("x" * prepare.LONGEST, True)
    assert prepare.clean_title("y" * prepare.LONGEST) == ("y" * prepare.LONGEST, False)


# ---------------------------------------------------------------- other forms of one's own log


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
        ({"user": None}, "is blank"),
        ({"timestamp": 1.5}, "is Float64"),
        ({"timestamp": -1}, "holds -1"),
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


def test_recbole_s_atomic_files(tmp_path):
    raw, rows = tmp_path / "raw", random_log()
    raw.mkdir()
    (raw / "toy.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{u}\t{i}\t4\t{t}\n" for u, i, t in rows)
    )
    (raw / "toy.item").write_text(
        "item_id:token\tmovie_title:token_seq\tclass:token_seq\n"
        + "".join(f"{i}\tTitle {i}\tx\n" for i in sorted({r[1] for r in rows}))
    )
    same_as_csv(tmp_path, raw)
    (raw / "toy.item").unlink()
    assert "no .item file" in run("toy", "--raw", raw, "--out", tmp_path / "bad").output


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.replace("3,", '"3",'),
        lambda text: text.replace(",5\n", ", 5 \n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n7,", "\n 7 ,"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_quick_reader_reads_as_the_careful_one_or_not_at_all(
    tmp_path, monkeypatch, change, packed
):
    raw = write(tmp_path / "raw", random_log(500))
    text = change((raw / "interactions.csv").read_text())
    path = raw / ("interactions.csv" + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    quick, careful = (
        reading.quick_log(path, "user", "item", ("timestamp", "position")),
        reading.read_rows(path, "user", "item", "timestamp", "position"),
    )
    assert (quick is None) == ('"' in text)
    if quick:
        assert [quick[0].to_list(), quick[1].to_list(), quick[2].tolist(), quick[3]] == [
            careful[0],
            careful[1],
            careful[2].tolist(),
            careful[3],
        ]


# -------------------------------------------------- published data sets, in their publishers' files


def packed(path, lines):
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


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


def movielens(raw, rows, zipped):
    files = {
        "ratings.dat": "".join(f"{u}::{i}::5::{t}\n" for u, i, t in rows),
        "movies.dat": "".join(
            f"{i}::Misérables {i}, Les (1995)::Drama\n" for i in sorted({r[1] for r in rows})
        ),
    }
    if zipped:
        with zipfile.ZipFile(raw / "ml-1m.zip", "w") as z:
            for name, text in files.items():
                z.writestr(f"ml-1m/{name}", text.encode("latin-1"))
    else:
        for name, text in files.items():
            (raw / name).write_bytes(text.encode("latin-1"))


def test_other_published_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CACHE", tmp_path / "cache")
    rows = [tuple(map(int, r)) for r in random_log()]
    raws = {
        name: tmp_path / name
        for name in ("ml-1m", "ml-zip", "ml-latest-small", "steam", "kuairec", "lastfm")
    }
    for raw in raws.values():
        raw.mkdir()
    movielens(raws["ml-1m"], rows, False), movielens(raws["ml-zip"], rows, True)
    (raws["ml-latest-small"] / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n" + "".join(f"{u},{i},4.5,{t}\n" for u, i, t in rows)
    )
    (raws["ml-latest-small"] / "movies.csv").write_text(
        "movieId,title,genres\n"
        + "".join(f'{i},"Misérables {i}, Les (1995)",Drama\n' for i in sorted({r[1] for r in rows}))
    )

    def day(t):
        return str(np.datetime64(int(t), "D"))

    lines = [
        {"username": f"{u}", "product_id": str(i), "date": day(t), "text": 'it\'s "good" [h1]'}
        for u, i, t in rows
    ] + [{"username": "", "product_id": "1", "date": day(1)}]
    packed(
        raws["steam"] / "steam_reviews.json.gz",
        [repr(r).replace("'username'", "u'username'") for r in lines],
    )
    packed(
        raws["steam"] / "steam_games.json.gz",
        [
            repr({"id": str(i), "app_name": f"Misérables {i}, Les (1995)"})
            for i in sorted({r[1] for r in rows})
        ],
    )
    (raws["kuairec"] / "small_matrix.csv").write_text(
        "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
        + "".join(f"{u},{i},1,1,x,x,{t}.25,{2.5}\n" for u, i, t in rows)
        + "1,1,1,1,x,x,7.0,1.9\n1,1,1,1,,,,3.0\n"
    )
    (raws["kuairec"] / "kuairec_caption_category.csv").write_text(
        "video_id,manual_cover_text,caption,topic_tag\n"
        + "".join(f'{i},UNKNOWN,"国王, {i}",[]\n' for i in sorted({r[1] for r in rows}))
    )
    (raws["lastfm"] / "user_taggedartists-timestamps.dat").write_text(
        "userID\tartistID\ttagID\ttimestamp\n"
        + "".join(
            f"{u}\t{i}\t{k}\t{1104537600000 + 1000 * t}\n" for u, i, t in rows for k in (1, 2)
        )
        + "1\t1\t1\t-428720400000\n"
    )
    (raws["lastfm"] / "artists.dat").write_text(
        "id\tname\turl\tpictureURL\n"
        + "".join(f"{i}\tArtist {i}\tx\ty\n" for i in sorted({r[1] for r in rows}))
    )
    want, _ = prepared(tmp_path / "csv", random_log(), ties="shuffled")
    titles = {
        "ml": "Les Misérables {} (1995)",
        "steam": "Misérables {}, Les (1995)",
        "kuairec": "国王, {}",
        "lastfm": "Artist {}",
    }
    for case, raw in raws.items():
        name = "ml-1m" if case == "ml-zip" else case
        result = run(name, "--raw", raw, "--out", tmp_path / "out", "--core", 1, "--overwrite")
        assert result.exit_code == 0, result.output
        data = load_data(str(tmp_path / "out"))
        assert (data.items == want.items).all() and (data.train == want.train).all(), case
        first = (data.folder / "raw_items.txt").read_text().split("\n")[0]
        assert data.titles[1] == next(t for k, t in titles.items() if case.startswith(k)).format(
            first
        ), case
        assert {
            "steam": "1 reviews without",
            "kuairec": "2 of 3,002 rows",
            "lastfm": "1 rows dated before",
        }.get(case, "") in result.output
        assert reading.SOURCES[name].noun == data.meta["words"]["noun"]
    (raws["steam"] / "steam_games.json.gz").unlink()
    assert (
        "holds no steam_games.json.gz"
        in run("steam", "--raw", raws["steam"], "--out", tmp_path / "bad").output
    )
    # parsed, never run
    packed(raws["steam"] / "steam_games.json.gz", ["{'id': __import__('os').getcwd()}"])
    assert (
        "line 1: neither JSON nor a Python literal"
        in run("steam", "--raw", raws["steam"], "--out", tmp_path / "bad").output
    )
    assert not (tmp_path / "bad").exists()


def test_a_broken_download_is_continued_and_an_unreachable_host_says_what_to_do(
    tmp_path, monkeypatch
):
    import http.server
    import threading

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    body, asked = bytes(range(256)) * 9000, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            start = int(asked[-1][6:-1]) if asked[-1] else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            # the first attempt breaks off
            self.wfile.write(body[start:] if start else body[: 2**20])

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f"http://127.0.0.1:{server.server_port}/file.gz", tmp_path / "a" / "file.gz"
    with pytest.raises(click.ClickException) as e:
        reading.download(url, path, "the page")
    assert (
        "by hand (the page)" in e.value.message
        and "it continues" in e.value.message
        and not path.exists()
    )
    reading.download(url, path, "the page")
    assert (
        path.read_bytes() == body
        and asked == [None, f"bytes={2**20}-"]
        and not list(tmp_path.rglob("*.part"))
    )
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(reading, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(reading.urllib.request, "urlopen", offline)
    result = run("beauty", "--out", tmp_path / "out")
    assert (
        result.exit_code == 1
        and "download ratings_Beauty.csv by hand" in result.output
        and "--raw FOLDER" in result.output
        and result.output.count("\n") == 1
    )


# ---------------------------------------------------------------- what a prepared folder must hold

SPOIL = {
    "candidates_test_15": (
        "nothing the user ever touched",
        lambda a, d: np.where(
            np.arange(15) == (a[0] != d.items[d.test[0]]).argmax(),
            d.items[d.ptr[users(d, d.test[:1])[0]]],
            a[:1],
        ),
    ),
    "candidates_val_20": (
        "stands in its row exactly once",
        lambda a, d: np.where(a == d.items[d.val][:, None], a[:, :1] + a[:, 1:2], a),
    ),
    "candidates_train_15": (
        "no item stands in a row twice",
        lambda a, d: np.concatenate([a[:, :-1], a[:, :1]], 1),
    ),
    "train": ("every target falls into its part of time", lambda a, d: np.append(a, d.test[:1])),
    "test": ("a sample has a history", lambda a, d: np.append(d.ptr[:1], a[1:])),
    "times": ("in time order", lambda a, d: a[::-1].copy()),
}


def test_checks_hold_for_both_splits(tmp_path):
    for split in ("temporal", "leave-one-out"):
        prepared(tmp_path / split, random_log(), "--split", split)
        result = run("toy", "--out", tmp_path / split / "out", "--check")
        assert (
            result.exit_code == 0 and "checks hold" in result.output and "BAD" not in result.output
        ), result.output


@pytest.mark.parametrize("part", SPOIL)
def test_checks_find_what_is_planted(tmp_path, part):
    data, _ = prepared(tmp_path, random_log())
    says, spoil = SPOIL[part]
    array = np.load(data.folder / f"{part}.npy")
    new = spoil(array, data)
    if len(new) < len(array) and part.startswith("cand"):
        new = np.concatenate([new, array[1:]])
    np.save(data.folder / f"{part}.npy", new.astype(array.dtype))
    result = run("toy", "--out", tmp_path / "out", "--check")
    assert result.exit_code == 1 and any(
        says in line and line.startswith("BAD") for line in result.output.splitlines()
    ), result.output


def test_titles_like_the_target_s_are_counted(tmp_path):
    titles = {str(i): "the same" for i in range(1, 41)}
    prepared(tmp_path, toy(), titles=titles)
    result = run("toy", "--out", tmp_path / "out", "--check")
    assert (
        result.exit_code == 0
        and "another item of the target's title (counted, not an error): 5 of 5" in result.output
    ), result.output


def test_the_synthetic_log_has_the_shape_it_says(tmp_path):
    from delrec.data import synthetic

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


# ----------------------------------------------------- bad input: one sentence, nothing left behind


def replace(name, old, new):
    def change(raw):
        text = (raw / name).read_bytes()
        assert old in text
        (raw / name).write_bytes(text.replace(old, new, 1))

    return change


BAD = {
    "no interactions file": (
        lambda raw: (raw / "interactions.csv").unlink(),
        [],
        "holds no interactions.csv",
    ),
    "no items file": (lambda raw: (raw / "items.csv").unlink(), [], "holds no items.csv"),
    "empty file": (lambda raw: (raw / "interactions.csv").write_text(""), [], "is empty"),
    "header only": (
        lambda raw: (raw / "interactions.csv").write_text("user,item,timestamp\n"),
        [],
        "no rows",
    ),
    "no user column": (
        replace("interactions.csv", b"user,", b"who,"),
        [],
        "the header names who, item, timestamp",
    ),
    "no time column": (
        replace("interactions.csv", b"timestamp", b"when"),
        [],
        "timestamp or position",
    ),
    "no title column": (
        replace("items.csv", b"item,title", b"item,name"),
        [],
        "expected the columns item,title",
    ),
    "time is a date": (
        replace("interactions.csv", b"8,2,2\n", b"8,2,2014-01-02\n"),
        [],
        "line 3: timestamp '2014-01-02' is not a whole",
    ),
    "time is no finite number": (
        replace("interactions.csv", b"8,2,2\n", b"8,2,nan\n"),
        [],
        "line 3: timestamp 'nan' is not a whole",
    ),
    "time is blank": (
        replace("interactions.csv", b"8,2,2\n", b"8,2,\n"),
        [],
        "line 3: timestamp '' is not a whole",
    ),
    "time is negative": (
        replace("interactions.csv", b"8,2,2\n", b"8,2,-2\n"),
        [],
        "line 3: timestamp '-2' is negative",
    ),
    "user is blank": (
        replace("interactions.csv", b"8,2,2\n", b" ,2,2\n"),
        [],
        "line 3: the user is blank",
    ),
    "too many cells": (
        replace("items.csv", b'"Title 39"', b"Title, 39"),
        [],
        "line 3: 3 cells where the header names 2",
    ),
    "open quote": (replace("items.csv", b'"Title 39"', b'"Title 39'), [], "items.csv, line "),
    "line break in an id": (
        replace("interactions.csv", b"8,2,2\n", b'"8\n8",2,2\n'),
        [],
        "the id '8\\n8' holds a line break",
    ),
    "item without title": (
        replace("items.csv", b'39,"Title 39"\n', b""),
        [],
        "1 of 40 items have no row in the item table, the first is",
    ),
    "item twice": (
        replace("items.csv", b'39,"Title', b'40,"Title'),
        [],
        "line 3: item '40' is there twice",
    ),
    "not UTF-8": (
        replace("items.csv", b"Title 39", b"Misx\xe9rables"),
        [],
        "line 3: byte 0xe9 is not UTF-8",
    ),
    "broken gzip": (
        lambda raw: (raw / "items.csv").rename(raw / "items.csv.gz"),
        [],
        "is not a whole gzip file",
    ),
    "nothing left": (lambda raw: None, ["--core", "3"], "nothing is left of 45 interactions"),
    "a part without a sample": (
        lambda raw: (raw / "interactions.csv").write_text(
            "user,item,timestamp\n" + "".join(f"{u},{i},5\n" for u in (1, 2) for i in range(1, 30))
        ),
        [],
        "leaves no train sample",
    ),
    "catalogue too small": (
        lambda raw: (raw / "interactions.csv").write_text(
            "user,item,timestamp\n"
            + "".join(f"{u},{i},{i}\n" for u in (1, 2) for i in range(1, 15))
        ),
        [],
        "15 candidates need 14 items",
    ),
    "time split of an order": (
        replace("interactions.csv", b"timestamp", b"position"),
        ["--split", "temporal"],
        "--split leave-one-out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, case):
    change, args, says = BAD[case]
    raw = write(tmp_path / "raw", toy())
    change(raw)
    result = run(
        "toy",
        "--raw",
        raw,
        "--out",
        tmp_path / "out",
        *([] if "--core" in args else ["--core", 1]),
        *args,
    )
    assert result.exit_code == 1 and says in result.output, result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize("name", [".hidden", "a/b", "..", "", "a b"])
def test_bad_name(name):
    result = run(name, "--raw", "anywhere")
    assert result.exit_code == 1 and "cannot name a folder" in result.output


def test_unknown_name_lists_the_known_ones():
    result = run("netflix")
    assert (
        result.exit_code == 1
        and "ml-100k, ml-1m, " in result.output
        and "smollm2-135m" in result.output
        and "--raw FOLDER" in result.output
    )


def test_only_a_prepared_folder_is_replaced(tmp_path):
    raw, out = write(tmp_path / "raw", toy()), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    result = run("toy", "--raw", raw, "--out", out, "--core", 1)
    assert (
        result.exit_code == 1
        and "is no prepared folder" in result.output
        and (out / "thesis.txt").exists()
    )
    result = run("toy", "--raw", raw, "--out", raw, "--core", 1)
    assert (
        result.exit_code == 1
        and "would replace it" in result.output
        and (raw / "items.csv").exists()
    )


def test_a_failed_run_leaves_the_older_preparation(tmp_path, monkeypatch):
    data, _ = prepared(tmp_path, toy())
    before = contents(data.folder)

    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_json", full)
    result = run(
        "toy", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--core", 2, "--seed", 3
    )
    assert result.exit_code == 1 and "Error: " in result.output
    result = run(
        "toy",
        "--raw",
        tmp_path / "raw",
        "--out",
        tmp_path / "out",
        "--core",
        1,
        "--seed",
        3,
        "--overwrite",
    )
    assert result.exit_code == 1 and "No space left" in result.output
    assert contents(data.folder) == before and sorted(path.name for path in tmp_path.iterdir()) == [
        "out",
        "raw",
    ]


# ---------------------------------------------------------------- the embedded defaults


def fake_pip(monkeypatch, returncode=0, stderr="", wheel=None):
    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        if wheel:
            (Path(command[command.index("--dest") + 1]) / wheel).write_bytes(b"something else")
        return SimpleNamespace(returncode=returncode, stdout="", stderr=stderr)

    monkeypatch.setattr(reading.subprocess, "run", pip)


def offline(*_, **__):
    raise urllib.error.URLError("no network")


def test_no_network_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(reading.urllib.request, "urlopen", offline)
    fake_pip(
        monkeypatch,
        1,
        "WARNING: Retrying\nERROR: No matching distribution found for recbole==1.2.1\n[notice] a "
        "newer pip exists\n",
    )
    result = run("ml-100k", "--out", tmp_path / "out")
    assert (
        result.exit_code == 1
        and "it said: ERROR: No matching distribution" in result.output
        and "no network" in result.output
    )
    assert (
        "Retrying" not in result.output
        and "notice" not in result.output
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize("name", ["ml-100k", "smollm2-135m"])
def test_a_changed_wheel_is_not_used(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(reading.urllib.request, "urlopen", offline)
    fake_pip(monkeypatch, wheel=(reading.RECBOLE if name == "ml-100k" else reading.SMOLLM2)[0])
    result = run(name, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "nothing of it was used" in result.output
    assert not list((tmp_path / "cache").rglob("*.whl")) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ml_100k_counts_and_the_same_from_both_sources(tmp_path, monkeypatch):
    result = run("ml-100k", "--out", tmp_path / "wheel")
    assert result.exit_code == 0, result.output
    data = load_data(str(tmp_path / "wheel"))
    assert (data.n_users, data.n_items, len(data.items)) == (943, 1349, 99287)
    assert {s: len(getattr(data, s)) for s in ("train", "val", "test")} == {
        "train": 78678,
        "val": 9813,
        "test": 9853,
    }
    assert data.meta["raw"] == {"users": 943, "items": 1682, "interactions": 100000}
    assert (
        data.meta["words"] == {"noun": "movie", "verb": "watched"}
        and data.meta["hash"] == "9ff9b32111c7701f"
    )
    assert {
        "Toy Story (1995)",
        "The Usual Suspects (1995)",
        "Les Misérables (1995)",
        "unknown",
    } <= set(data.titles)

    # GroupLens' archive holds the same log in another form: rebuild that form, with its latin-1 and
    # a stray blank
    wheel = reading.CACHE / "wheels" / reading.RECBOLE[0]
    inter, item = reading.members(
        wheel, [f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")]
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("ml-100k/u.data", inter.split(b"\n", 1)[1])
        cells = [line.split("\t") for line in item.decode().splitlines()[1:]]
        titles = [
            (raw, "unknown" if year == "unkonwn" else f"{name} ({year}) ")
            for raw, name, year, _ in cells
        ]
        z.writestr(
            "ml-100k/u.item",
            "".join(f"{raw}|{title}|01-Jan-1995||0|1\n" for raw, title in titles).encode("latin-1"),
        )
    monkeypatch.setattr(reading, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        reading.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(archive.getvalue())
    )
    fake_pip(monkeypatch, 1, "No module named pip")
    result = run("ml-100k", "--out", tmp_path / "archive")
    assert result.exit_code == 0 and "GroupLens" in result.output, result.output
    assert contents(tmp_path / "wheel") == contents(tmp_path / "archive")


@pytest.mark.slow
def test_the_embedded_language_model_is_dense_tied_and_sensible():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = reading.fetch_llm()
    assert (
        reading.fetch_llm() == folder
        and not list(folder.glob("*.gguf"))
        and not folder.with_suffix(".tmp").exists()
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        AutoTokenizer.from_pretrained(folder),
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and getattr(
        model, "hf_quantizer", None
    ) is None
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(
        model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    )
    for title in ("Les Misérables (1995)", "L'Enfer (1994)", "国王"):
        assert tokenizer.decode(tokenizer(title)["input_ids"], skip_special_tokens=True) == title


def test_a_training_user_who_touched_everything_is_refused_and_does_not_hang(tmp_path):
    rows = [(0, i, i) for i in range(40)] + [
        (u, i, 1000 + 40 * u + i) for u in range(1, 6) for i in range(20)
    ]
    result = run(
        "toy", "--raw", write(tmp_path / "raw", rows), "--out", tmp_path / "out", "--core", 1
    )
    assert (
        result.exit_code == 1
        and "one user leaves only 0" in result.output
        and not (tmp_path / "out").exists()
    )
