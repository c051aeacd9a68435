"""recipes/retrain.py: the log of before holds nothing of the test part, under the same ids."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from delrec.data.prepared import load_data, raw_item_ids
from recipes import retrain


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The root of runs and data is a folder of the test's."""
    monkeypatch.setattr(retrain.runtime, "ROOT", tmp_path)
    return tmp_path


def names_of(data):
    """{(raw item, time)} of the interactions of a prepared folder."""
    ids = raw_item_ids(data)
    return {(ids[item], int(time)) for item, time in zip(data.items, data.times)}


def test_the_log_of_before_ends_where_the_test_part_begins(toy, make_data, here):
    later_M = retrain.is_later(toy)
    assert later_M[toy.test].all() and not later_M[toy.train].any() and not later_M[toy.val].any()
    assert toy.times[later_M].min() > toy.times[~later_M].max()
    retrain.write_log(here / "raw", toy, ~later_M)
    lines = (here / "raw" / "interactions.csv").read_text().splitlines()[1:]
    found = [line.split(",") for line in lines]
    kept = names_of(toy) - {
        (raw_item_ids(toy)[i], int(t)) for i, t in zip(toy.items[later_M], toy.times[later_M])
    }
    assert {(item.strip('"'), int(time)) for _, item, time in found} >= kept
    assert len(found) == (~later_M).sum()


def test_another_preparation_has_a_log_of_before_of_its_own(toy, here, monkeypatch):
    made = []
    monkeypatch.setattr(retrain, "stage", lambda folder, script, name, *flags: made.append(name))

    def before(data):
        name = retrain.prepare_before(data)
        folder = here / "data" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "meta.json").touch()
        return name

    first = before(toy)
    assert before(toy) == first and made == [first]
    meta = toy.meta | {"hash": "0123456789abcdef"}
    other = shutil.copytree(toy.folder, here / "other")
    (other / "meta.json").write_text(json.dumps(meta))
    second = before(replace(toy, folder=other, meta=meta))
    assert second != first and made == [first, second]


def test_where_only_an_order_is_known_each_users_last_one_is_later(toy):
    last = np.asarray(toy.ptr)[1:] - 1
    one_left_out = replace(toy, test=last, meta=toy.meta | {"split": "leave-one-out"})
    later_M = retrain.is_later(one_left_out)
    assert (np.flatnonzero(later_M) == last).all()


def test_what_is_written_is_prepared_again_as_it_is(toy, here, script):
    from delrec.data import prepare

    retrain.write_log(here / "raw", toy, np.ones(len(toy.items), bool))
    where = ["--raw", here / "raw", "--out", here / "again", "--core", 1]
    script(prepare.main, "again", *where)
    again = load_data(str(here / "again"))
    assert names_of(again) == names_of(toy)
    assert again.titles == toy.titles and len(again.items) == len(toy.items)


def test_chance_stands_beside_the_rows(toy, capsys):
    row = {"minutes": 2.0, "epochs": 3, "best": 1, "hr@1 candidates15": 0.5}
    row |= {"ndcg@10 full": 0.1, "hr@10 full": 0.2}
    means = retrain.print_rows({"scratch": [row, row | {"minutes": 4.0}]}, toy)
    assert means["scratch"]["minutes"] == 3
    assert means["chance"]["hr@1 candidates15"] == pytest.approx(1 / 15)
    chance = 10 / toy.n_items  # but what the users had is masked
    assert 1.05 * chance < means["chance"]["hr@10 full"] < 2 * chance
    assert "chance" in capsys.readouterr().out


def test_the_metrics_of_a_row_stand_in_a_runs_metrics(sasrec):
    from delrec.runtime import write_json

    write_json(sasrec.parent / "sasrec.cpu.json", {"seconds": 90.0})
    row = retrain.numbers_of(sasrec)
    assert row["minutes"] == 1.5 and row["epochs"] == 2
    assert 0 <= row["hr@1 candidates15"] <= 1 and 0 <= row["hr@10 full"] <= 1
