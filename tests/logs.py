"""Small logs for the tests of data/: how to write them, prepare them and spoil them."""

import gzip
import json

import numpy as np
from click.testing import CliRunner

from delrec.data import prepare
from delrec.data.prepared import load_data


def toy():
    """User 8 has items 1..20 at times 1..20, user 9 items 21..40 at times 21..40; user 7 has a tie
    (5 and 3 at 10), a repeat (5 again at 35) and a duplicate row (39 at 45).
    """
    rows = [(8, i, i) for i in range(1, 21)] + [(9, i, i) for i in range(21, 41)]
    return rows + [(7, 39, 45), (7, 5, 10), (7, 3, 10), (7, 5, 35), (7, 39, 45)]


def random_log(n=3000, prefix=""):
    rng = np.random.default_rng(1)
    return [
        (f"{prefix}{u}", f"{prefix}{i}", t) for u, i, t in rng.integers(0, [60, 300, 500], (n, 3))
    ]


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


def packed(path, lines):
    path.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode()))


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


# ------------------------------------------ what may be wrong with a log: how to spoil one, the
# options to prepare it with, and what is said then


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
    "no items file": (
        lambda raw: (raw / "items.csv").unlink(),
        [],
        "add a table of titles, items.csv (item,title), in the same folder",
    ),
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
        "line 3: timestamp '2014-01-02' is not a number, as other rows have it",
    ),
    "time is no finite number": (
        replace("interactions.csv", b"8,2,2\n", b"8,2,nan\n"),
        [],
        "line 3: timestamp is 'nan', no value",
    ),
    "time is blank": (
        replace("interactions.csv", b"8,2,2\n", b"8,2,\n"),
        [],
        "line 3: timestamp is blank; give the row a time, or leave out such rows with --drop-inc",
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
