"""Further columns of items, in items.csv or in a log's one table: kept by data/prepare.py, a row an
item, for filters of answers."""

import json
import re
from decimal import Decimal

import click
import numpy as np
import polars as pl
import pytest
from logs import random_log, run, toy, write
from recommenders import by_number, recommender_of

import evaluate
from delrec.data import own_items
from delrec.data.prepared import item_columns, load_data
from delrec.runtime import load_run
from delrec.serving.options import ONLY_WITH, TO_ASK, answer_options

ITEMS = [(i, f"Title {i}", "tea" if i % 2 else "coffee, black", i % 3 or "") for i in range(1, 41)]


def with_columns(folder, header="item,title,category,shelf", items=ITEMS, name="items.csv"):
    """The toy log with a table of titles that has further columns."""
    write(folder, toy())
    lines = [",".join(f'"{cell}"' for cell in row) for row in reversed(items)]
    (folder / "items.csv").unlink()
    (folder / name).write_text("\n".join([header, *lines]) + "\n")
    return folder


def prepare(tmp_path, *args, code=0):
    """What is printed when tmp_path/raw is prepared into tmp_path/out."""
    said = run("toy", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--core", 1, *args)
    assert said.exit_code == code, said.output
    return said.output


def test_further_columns_are_kept_in_the_order_of_the_items(tmp_path):
    with_columns(tmp_path / "raw")
    said = prepare(tmp_path)
    data = load_data(str(tmp_path / "out"))
    kept = item_columns(data)
    assert list(kept) == ["category", "shelf"] == data.meta["columns"]
    assert kept["category"] == ["tea", "coffee, black"] * 20
    assert kept["shelf"][:4] == ["1", "2", "", "1"]
    assert "category, shelf" in said
    assert "nothing was replaced" in prepare(tmp_path)


def test_a_column_that_is_blank_here_and_there_keeps_its_rows(tmp_path):
    items = [(i, f"Title {i}", "" if i % 4 else "x") for i in range(1, 41)]
    with_columns(tmp_path / "raw", "item,title,mark", items)
    prepare(tmp_path)
    assert item_columns(load_data(str(tmp_path / "out"))) == {"mark": ["", "", "", "x"] * 10}


def test_without_further_columns_there_is_no_file(tmp_path):
    write(tmp_path / "raw", toy())
    prepare(tmp_path)
    assert not (tmp_path / "out" / "item_columns.csv").exists()
    data = load_data(str(tmp_path / "out"))
    assert item_columns(data) == {} and data.meta["columns"] == []


def test_rows_of_an_item_that_differ_in_a_column_are_said(tmp_path):
    again = [(4, "Title 4", "tea", ""), (7, "Title 7", "tea", "1"), (5, "Title 5", "milk", "2")]
    with_columns(tmp_path / "raw", items=[*ITEMS, *again])
    said = prepare(tmp_path)
    assert "2 items have several rows that differ beside the title, the first one counts" in said
    assert "of item 5 the category is 'milk' and 'tea'" in said
    kept = item_columns(load_data(str(tmp_path / "out")))["category"]
    assert kept[3:5] == ["tea", "milk"]
    with_columns(tmp_path / "raw", items=[*ITEMS, ITEMS[0]])
    assert "several rows" not in prepare(tmp_path, "--overwrite")


def test_texts_are_no_filter_and_that_is_said(tmp_path):
    items = [(i, f"Title {i}", "word " * 60, "a") for i in range(1, 41)]
    with_columns(tmp_path / "raw", "item,title,story,kind", items)
    assert "over 250 characters, are not kept: story" in prepare(tmp_path)
    assert list(item_columns(load_data(str(tmp_path / "out")))) == ["kind"]


def test_columns_are_no_part_of_the_hash_and_replaced_only_when_asked(tmp_path):
    with_columns(tmp_path / "raw")
    prepare(tmp_path)
    before = json.loads((tmp_path / "out" / "meta.json").read_text())["hash"]
    moved = [(*row[:2], "shelf", row[3]) for row in ITEMS]
    with_columns(tmp_path / "raw", items=moved)
    assert "columns of items" in prepare(tmp_path, code=1)
    prepare(tmp_path, "--overwrite")
    data = load_data(str(tmp_path / "out"))
    assert data.meta["hash"] == before and set(item_columns(data)["category"]) == {"shelf"}


def test_fields_of_recboles_items_are_kept(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = "".join(f"{u}\t{i}\t{t}\n" for u, i, t in random_log(2000))
    (folder / "x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + rows)
    items = "".join(f"{i}\tFilm {i}\t{1990 + i % 5}\n" for i in range(300))
    (folder / "x.item").write_text(
        "item_id:token\tmovie_title:token_seq\trelease_year:token\n" + items
    )
    prepare(tmp_path)
    data = load_data(str(tmp_path / "out"))
    assert list(item_columns(data)) == ["release_year"]
    assert set(item_columns(data)["release_year"]) <= {str(1990 + n) for n in range(5)}


def one_table(folder, *columns, name="interactions.csv"):
    """A log of one table, its titles in a column of it, with further columns: a name and
    cell(user, item) each."""
    header = ",".join(["user,item,timestamp,title", *(name for name, _ in columns)])
    rows = [
        [user, item, when, f"Title {item}", *(cell(user, item) for _, cell in columns)]
        for user, item, when in toy()
    ]
    folder.mkdir(exist_ok=True)
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (folder / name).write_text(f"{header}\n{text}")


@pytest.mark.parametrize(
    "story",
    [
        lambda user, item: "word " * 60 * (user == 8),  # long in the first rows
        lambda user, item: "word " * 60 * (user == 7),  # long in the last ones
        lambda user, item: 'a 5" screen ' * 30,  # no csv, but read as one row a line
    ],
)
def test_a_long_text_of_a_log_is_kept_out_wherever_it_stands(tmp_path, story, monkeypatch):
    monkeypatch.setattr(own_items, "LOOKED_AT", 20)
    one_table(tmp_path / "raw", ("story", story), ("shelf", lambda user, item: item % 3))
    assert "over 250 characters, are not kept: story" in prepare(tmp_path)
    assert list(item_columns(load_data(str(tmp_path / "out")))) == ["shelf"]


def test_what_one_table_says_of_each_item_is_kept_and_what_differs_is_said(tmp_path):
    one_table(
        tmp_path / "raw",
        ("category", lambda user, item: "tea" if item % 2 else "coffee"),
        ("shelf", lambda user, item: "" if user == 7 else item % 3),  # 7's rows say nothing
        ("amount", lambda user, item: user),
        ("story", lambda user, item: "word " * 60),
        ("channel", lambda user, item: user % 2),
    )
    said = prepare(tmp_path)
    kept = item_columns(load_data(str(tmp_path / "out")))
    assert list(kept) == ["category", "shelf"] and "item columns        category, shelf\n" in said
    assert kept["category"] == ["tea", "coffee"] * 20
    assert kept["shelf"] == [str(i % 3) for i in range(1, 41)]
    assert "in which rows of one item differ are not kept: amount, channel (of item 3 the" in said
    assert "the amount is '8' and '7')" in said and "in a table of titles (--items)" in said
    assert "columns of the log that nothing can be filtered by" in said and "kept: story" in said


def test_a_table_that_says_nothing_more_of_items_has_no_columns(tmp_path):
    one_table(tmp_path / "raw")
    assert "item columns" not in prepare(tmp_path)
    one_table(tmp_path / "raw", ("amount", lambda user, item: user))
    assert "not kept: amount (of item 3" in prepare(tmp_path)  # the same preparation
    assert item_columns(load_data(str(tmp_path / "out"))) == {}


def test_parts_of_one_table_are_asked_together_what_they_say_of_items(tmp_path):
    category = ("category", lambda user, item: item % 2)
    one_table(tmp_path / "raw", category, name="interactions_1.csv")
    one_table(tmp_path / "raw", category, name="interactions_2.csv")
    prepare(tmp_path)
    assert item_columns(load_data(str(tmp_path / "out"))) == {"category": ["1", "0"] * 20}
    one_table(tmp_path / "raw", ("category", lambda user, item: 2), name="interactions_2.csv")
    assert "of item 1 the category is '1' and '2'" in prepare(tmp_path, "--overwrite")


# ---------------------------------------------------------------- filters


@pytest.fixture
def rec(tmp_path):
    """40 items, the odd ones tea; ranks by number."""
    with_columns(tmp_path / "raw")
    prepare(tmp_path)
    return recommender_of(load_data(str(tmp_path / "out")), by_number)


def test_answers_are_filtered_by_any_column(rec):
    assert rec.recommend(ids=[1], where={"category": "tea"}, top=2).ids == ["39", "37"]
    assert rec.recommend(ids=[1], where={"category": "tea", "shelf": 2}, top=2).ids == ["35", "29"]
    assert rec.recommend(ids=[1], where={"shelf": [1, "2"]}, top=3).ids == ["40", "38", "37"]
    both = rec.recommend(ids=[1], where={"category": "tea"}, exclude=["39"], only=["39", "5", "6"])
    assert both.ids == ["5"]
    assert all(int(i) % 2 for i in rec.recommend([], where={"category": "tea"}, top=5).ids)


def test_a_column_or_a_value_that_nothing_has_is_a_sentence(rec):
    with pytest.raises(ValueError, match="no column 'brand'.* it keeps: category, shelf"):
        rec.recommend(ids=[1], where={"brand": "x"})
    with pytest.raises(ValueError, match="no item is left by where"):
        rec.recommend(ids=[1], where={"category": "milk"})
    with pytest.raises(ValueError, match="where category holds nan"):
        rec.recommend(ids=[1], where={"category": [float("nan")]})


PRICES = ["3.0", "3", "3.5", "007", "1e3", "12345678901234567", "12345678901234568", "0.1"]
PRICES += ["true", "True", "FALSE", "n/a", "1_0", "", "nan", "-0.0"]


@pytest.fixture(scope="module")
def priced(tmp_path_factory):
    """Finds the prices of the items whose price is a value."""
    folder = tmp_path_factory.mktemp("priced")
    items = [(i, f"Title {i}", PRICES[i - 1] if i <= len(PRICES) else "x") for i in range(1, 41)]
    with_columns(folder / "raw", "item,title,price", items)
    prepare(folder)
    rec = recommender_of(load_data(str(folder / "out")), by_number)

    def found(value):
        answer = rec.recommend([], where={"price": value}, keep_seen=True, top=40)
        return sorted(PRICES[int(i) - 1] for i in answer.ids)

    return found


@pytest.mark.parametrize(
    "value, cells",
    [
        (3, ["3", "3.0"]),
        (3.0, ["3", "3.0"]),
        ("3", ["3"]),
        ("3.00", ["3", "3.0"]),
        (np.float64(3.5), ["3.5"]),
        (np.float32(0.1), ["0.1"]),
        (Decimal("0.10"), ["0.1"]),
        (np.array([3.5, 1000.0]), ["1e3", "3.5"]),
        (pl.Series([7, None]).drop_nulls(), ["007"]),
        ({7, "n/a"}, ["007", "n/a"]),
        (12345678901234567, ["12345678901234567"]),
        (0, ["-0.0"]),
        (True, ["True", "true"]),
        ("true", ["true"]),
        ([np.True_, False], ["FALSE", "True", "true"]),
        ("false", ["FALSE"]),
    ],
)
def test_numbers_are_compared_as_numbers_and_truth_values_as_their_words(priced, value, cells):
    assert priced(value) == cells


@pytest.mark.parametrize(
    "value, says",
    [
        (None, "where price is None; give a value, or several as a list"),
        ({"a": 1}, "where price is {'a': 1}; give a value, or several as a list"),
        ([3, None], "where price holds None, expected values as text, numbers, or True and False"),
        (float("nan"), "where price holds nan, expected values as text"),
        (4.0, "no item is left by where"),
        (10, "no item is left by where"),
    ],
)
def test_what_no_column_can_hold_is_a_sentence_about_values(priced, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        priced(value)


def test_the_command_line_filters_too(sasrec, toy, script, on_cpu, tmp_path):
    (tmp_path / "stock.txt").write_text("\ufeff7\n9\n\n12\nnone\n")
    ask = ["--ckpt", sasrec, "--history", "3 | 12", "--only", tmp_path / "stock.txt"]
    got = script(evaluate.main, *ask)
    assert {t["id"] for t in got.json["top"]} == {"7", "9"} and got.json["unknown"] == ["none"]
    assert (
        "note: 2 items are left of the 10 asked for: items of the history are not shown "
        "(--keep-seen shows them), nor what --only, --exclude and --where leave out\n" in got.output
    )
    kept = script(evaluate.main, *ask, "--keep-seen").json
    assert {t["id"] for t in kept["top"]} == {"7", "9", "12"}
    (tmp_path / "long.txt").write_text("7\n" + "".join(f"gone{n}\n" for n in range(500)))
    many = script(evaluate.main, *ask[:4], "--only", tmp_path / "long.txt")
    (line,) = [line for line in many.output.splitlines() if line.startswith("left out: ")]
    assert line.endswith("'gone9' and 490 more") and len(many.json["unknown"]) == 500
    without = script(evaluate.main, *ask[:4], "--exclude", tmp_path / "stock.txt", "--top", 60)
    assert not {"7", "9", "12"} & {t["id"] for t in without.json["top"]}
    says = script(evaluate.main, *ask[:4], "--where", "brand=x", code=1).error
    assert "keeps no column 'brand', nor any other beside the titles" in says
    assert "names no column" in script(evaluate.main, *ask[:4], "--where", "x", code=1).error
    nowhere = script(evaluate.main, *ask[:4], "--only", tmp_path / "no", code=1).error
    assert "--only" in nowhere and "cannot be read" in nowhere


IDLE = {"--top": [3], "--only": ["no"], "--exclude": ["no"], "--where": ["a=b"], "--keep-seen": []}


@pytest.mark.parametrize("flag, value", [*IDLE.items(), ("--pool", [9])])
def test_what_says_how_to_answer_is_refused_where_nothing_is_asked(flag, value, sasrec, script):
    says = script(evaluate.main, "--ckpt", sasrec, flag, *value, code=1).error
    assert f"{flag} belongs to --history, --history-json, --user" in says
    assert says.endswith(f"and none was given; add one, or leave {flag} out")
    if flag == "--pool":  # likeness asks no pool
        says = script(evaluate.main, "--ckpt", sasrec, "--similar", "3", flag, *value, code=1).error
        assert "--serve or --latency, and none was given" in says


def test_every_option_of_answers_asks_or_belongs_to_one_that_does():
    main = click.Command("x", params=[])
    for option in answer_options:
        main = option(main)
    flags = {flag for param in main.params for flag in param.opts}
    assert flags == {*TO_ASK, *ONLY_WITH}


def test_a_file_of_histories_is_filtered_alike(sasrec, toy, script, on_cpu, tmp_path):
    (tmp_path / "stock.txt").write_text("7\n9\nnone\n")
    (tmp_path / "ask.jsonl").write_text('{"history": ["3"]}\n{"history": ["9"]}\n')
    ask = ["--ckpt", sasrec, "--serve", tmp_path / "ask.jsonl", "--only", tmp_path / "stock.txt"]
    said = script(evaluate.main, *ask).output
    lines = (tmp_path / "ask.answers.jsonl").read_text().splitlines()
    assert [{t["id"] for t in json.loads(line)["top"]} for line in lines] == [{"7", "9"}, {"7"}]
    assert "left out of the filters: no item with the id 'none'" in said


def test_the_command_line_answers_a_user_of_the_log(sasrec, toy, script, on_cpu):
    answer = script(evaluate.main, "--ckpt", sasrec, "--user", "5", "--top", 3).json
    assert answer["history"] == toy.items[toy.ptr[5] : toy.ptr[6]].tolist()
    assert len(answer["top"]) == 3 and not answer["popular"]
    nobody = script(evaluate.main, "--ckpt", sasrec, "--user", "who")
    assert nobody.json["popular"] and "these are what most people took" in nobody.output
    assert "no user 'who'" in nobody.output
    assert load_run(sasrec).data_hash == toy.meta["hash"]
