"""recipes/bench_rectools.py: the shop's files, the measure of quality, our program's run."""

import csv
import sys

import numpy as np
import pytest

import train_backbone
from delrec.data import prepare
from delrec.data.prepared import Data
from delrec.serving import fitting
from recipes import bench_rectools
from recipes.bench_rectools import (
    OURS,
    Measured,
    Program,
    chance,
    hits,
    popular,
    programs,
    read_log,
    write_shop,
)

TITLES = ["Green tea", "Black tea", "White tea", 'Tea "Iced", 1 l', "Herbal tea"]


@pytest.fixture
def small(tmp_path):
    """A prepared folder: the first user took items 5, 1, 2 and 3, the second 2 and 1, the third 4.

    In the raw log an item's id is ten times its number, a user's one hundred times.
    """
    (tmp_path / "raw_items.txt").write_text("10\n20\n30\n40\n50\n")
    (tmp_path / "raw_users.txt").write_text("100\n200\n300\n")
    none = np.zeros(0, np.int64)
    return Data(
        name="small",
        folder=tmp_path,
        folder_name="small",
        meta={"hash": None, "words": {"noun": "tea", "verb": "bought"}},
        items=np.array([5, 1, 2, 3, 2, 1, 4]),
        ptr=np.array([0, 4, 6, 7]),
        times=np.array([50, 100, 400, 900, 200, 500, 300]),
        titles=["", *TITLES],
        train=none,
        val=none,
        test=none,
        n_items=5,
        n_users=3,
    )


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_a_shop_s_log_is_in_time_order_without_what_was_taken_last(small, tmp_path):
    shop = write_shop(tmp_path / "shop", small, 1000)
    assert shop.last == {"c100": "a30", "c200": "a10"}  # of one purchase none is held out
    assert table(tmp_path / "shop" / "interactions.csv") == [
        ["customer", "article", "time"],
        ["c100", "a50", "1970-01-01T00:00:50"],
        ["c100", "a10", "1970-01-01T00:01:40"],
        ["c200", "a20", "1970-01-01T00:03:20"],
        ["c300", "a40", "1970-01-01T00:05:00"],
        ["c100", "a20", "1970-01-01T00:06:40"],
    ]
    assert table(tmp_path / "shop" / "items.csv") == [
        ["article", "name", "category"],
        *([f"a{n}0", name, "tea"] for n, name in enumerate(TITLES, 1)),
    ]
    assert (tmp_path / "shop" / "everyone.txt").read_text() == "c100\nc200\n"
    assert shop.asked == ["c100", "c200"] and len(shop.stock) == 2  # half of the four in the log
    one = write_shop(tmp_path / "one", small, 1)
    assert len(one.last) == 1 and len(table(tmp_path / "one" / "interactions.csv")) == 7


def test_found_is_who_has_the_last_article_among_ten():
    last = {"c100": "a30", "c200": "a10", "c300": "a90", "c400": "a10"}
    eleven = [f"a{n}" for n in range(20, 30)] + ["a90"]
    best = {"c100": ["a70", "a30"], "c200": ["a20"], "c300": eleven}  # the fourth has no answer
    assert hits(best, last).tolist() == [1, 0, 0, 0]


def test_popularity_and_chance_leave_out_what_a_customer_has(small, tmp_path):
    write_shop(tmp_path / "shop", small, 1000)
    taken = read_log(tmp_path / "shop")
    assert taken == {"c100": ["a50", "a10", "a20"], "c200": ["a20"], "c300": ["a40"]}
    assert popular(taken, ["c100", "c200"]) == {"c100": ["a40"], "c200": ["a50", "a10", "a40"]}
    many = {"c100": [f"a{n}" for n in range(5)], "c200": [f"a{n}" for n in range(45)]}
    assert chance(many, ["c100", "c200"]) == pytest.approx((10 / 40 + 1) / 2)


@pytest.fixture
def in_process(script, monkeypatch):
    """The two commands that fit runs, in this process."""
    mains = {"prepare.py": prepare.main, "train_backbone.py": train_backbone.main}
    monkeypatch.setattr(
        fitting, "run_script", lambda path, args, said: script(mains[path.name], *args)
    )


def test_our_program_prints_ten_articles_in_stock_and_answers_for_everyone(
    toy, in_process, tmp_path, monkeypatch, capsys
):
    shop = write_shop(tmp_path, toy, 1000)
    (program,) = programs(0, None)
    assert program.lines == 7 and "epochs" not in program.text
    assert ", **names, epochs=3)" in programs(3, None)[0].text
    monkeypatch.chdir(tmp_path)
    names = {"everyone": list(shop.last)}
    small = OURS.format(settings=", epochs=1, width=8")
    exec(small + program.answers, names)
    bench_rectools.stop_unless_printed(capsys.readouterr().out, program, shop)
    assert list(names["best"]) == list(shop.last) and len(shop.last) == 60
    taken = read_log(tmp_path)
    for who, articles in names["best"].items():
        assert len(articles) == 10 and not set(articles) & set(taken[who])


# a program that says of every customer the same ten of the articles in stock
TEN = """
stock = open("stock.txt").read().split()
for who in open("asked.txt").read().split():
    for article in stock[:{n}]:
        print(who, article, "a name")
"""
SAME = "best = {who: stock[:10] for who in everyone}"


def test_without_rectools_the_rest_runs_and_says_how_to_get_it(toy, script, tmp_path, monkeypatch):
    ten = Program("ten", sys.executable, TEN.format(n=10), SAME)
    monkeypatch.setattr(bench_rectools, "programs", lambda epochs, python: [ten])
    result = script(bench_rectools.main, "--dataset", toy.folder, "--repeats", 2)
    assert 'install torch "rectools[torch]"' in result.output
    shop = write_shop(tmp_path, toy, 1000)
    share = np.mean([article in sorted(shop.stock)[:10] for article in shop.last.values()])
    (row,) = result.json["rows"]
    assert row["program"] == "ten" and row["lines"] == 4
    assert row["found"] == pytest.approx(share, abs=1e-4) and row["low"] < share < row["high"]
    assert 0 < row["processor_seconds"] < 10 and row["seconds"] > 0 and 0 < row["peak_gb"] < 1
    assert result.json["customers"] == 60 and result.json["rectools"] is None
    assert 0.15 < result.json["floors"]["chance"] < 0.3  # ten of about 47
    assert result.json["differences"] == []


@pytest.mark.parametrize(
    "text, says",
    [
        (TEN.format(n=9), "did not print ten articles in stock"),
        ("raise ValueError('no such column')", "ended: ValueError: no such column"),
    ],
)
def test_a_program_that_fails_ends_the_bench(text, says, toy, script, monkeypatch):
    wrong = Program("wrong", sys.executable, text, SAME)
    monkeypatch.setattr(bench_rectools, "programs", lambda epochs, python: [wrong])
    refused = script(bench_rectools.main, "--dataset", toy.folder, code=1)
    assert says in refused.error


def test_a_difference_is_between_the_programs_of_a_pair():
    made = [Program(name, "", "", "") for name in ("ours", "theirs")]
    found = [np.array([1, 1, 0, 1.0]), np.array([0, 1, 0, 0.0])]
    runs = {p: [Measured(1, 1, 1, hit_n)] for p, hit_n in zip(made, found)}
    (row,) = bench_rectools.differences(runs)
    assert row["programs"] == ["ours", "theirs"] and row["mean"] == 0.5
    assert row["low"] == 0 and row["high"] == 1


def test_a_python_that_is_not_there_is_a_sentence(toy, script):
    refused = script(bench_rectools.main, "--dataset", toy.folder, "--python", "nowhere", code=1)
    assert "--python nowhere cannot be run" in refused.error
