"""data/rules.py: the exact arrays of a toy log, no leak, ties, k-core, numbering."""

import numpy as np
import pytest
from click import ClickException
from logs import prepared, random_log, toy

from delrec.data import rules
from delrec.data.log import Log, rows_of
from delrec.data.order import next_id
from delrec.data.prepared import users


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


def test_k_core_is_iterated():
    # item 2 has one row; without it user 2 has one; without that everybody left has two
    user, item = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 1, 0, 1, 1, 2])
    assert rules.k_core(user, item, 2).tolist() == [True] * 4 + [False] * 2
    assert not rules.k_core(user, item, 3).any()
    assert rules.k_core(user, item, 1).all()


def test_ids_are_in_numeric_order_only_if_all_are_integers():
    assert rules.number(["10", "9", "10", "-1"])[0].to_list() == ["-1", "9", "10"]
    assert rules.number(["10", "9", "x"])[0].to_list() == ["10", "9", "x"]
    assert rules.number(["10", "9", "10"])[1].tolist() == [1, 0, 1]


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


def log_in_parts(rows):
    """A log of (user, item, time, part) and the rules that keep its split."""
    user, item, when, part = zip(*rows)
    made = rows_of([str(u) for u in user], [str(i) for i in item], list(when))
    made.part = np.array(part, np.int8)
    titles = {str(i): f"Title {i}" for i in item}
    return Log(made, titles, "test", {}), rules.Rules(split="files", core=1)


def test_the_split_of_the_log_s_own_files_is_kept():
    rows = [(u, i, i, 0 if i < 15 else 1 if i < 18 else 2) for u in (1, 2) for i in range(20)]
    rows += [(3, i + 20, 5, i // 10) for i in range(30)]  # one time for all: training comes first
    for ties in ("shuffled", "item", "file"):
        log, kept = log_in_parts(rows)
        kept.ties = ties
        made = rules.apply_rules(log, kept)
        assert made.left.part.tolist() == ([0] * 15 + [1] * 3 + [2] * 2) * 2 + sorted(
            [0, 1, 2] * 10
        )
        assert made.samples.of["test"].tolist() == [18, 19, 38, 39, *range(60, 70)]
        assert made.samples.of["train"].tolist() == [*range(1, 15), *range(21, 35), *range(41, 50)]


@pytest.mark.parametrize(
    "more, says",
    [
        ([(1, 3, 3, 2)], "1 rows stand in two of the files, the first is user '1' with item '3'"),
        ([(2, 39, 0, 2)], "1 of 2 users have a row of a later part before one of an earlier part"),
    ],
)
def test_a_split_that_shows_training_its_future_is_refused(more, says):
    rows = [(u, i, i, 0 if i < 15 else 1 if i < 18 else 2) for u in (1, 2) for i in range(20)]
    for timed in (True, False):
        log, kept = log_in_parts(rows + more)
        log.rows.timed = timed
        with pytest.raises(ClickException) as refused:
            rules.apply_rules(log, kept)
        said = refused.value.message
        assert says in said and ("leave out --split files" in said) == timed
        assert ("number the positions on through the three files" in said) != timed


def test_the_split_of_a_log_s_files_counts_only_where_it_is_asked_for():
    rows = [(u, i, i // 4, 0 if i < 15 else 1 if i < 18 else 2) for u in (1, 2) for i in range(20)]
    rows += [(3, i + 20, i // 4, 0) for i in range(30)]
    log, kept = log_in_parts([*rows, (1, 3, 0, 2)])  # one row stands in two of the files
    kept.split = "leave-one-out"
    got = rules.apply_rules(log, kept)
    audited = next_id(log, kept, "shuffled")
    log.rows.part = None
    want = rules.apply_rules(log, kept)
    assert (got.left.item == want.left.item).all() and got.left.part is None
    assert audited == next_id(log, kept, "shuffled")


def test_a_split_that_no_file_has_is_refused():
    log, kept = log_in_parts([(1, i, i, 0) for i in range(40)])
    log.rows.part = None
    for timed, advice in ((True, "--split temporal or --split l"), (False, "--split leave-one-o")):
        log.rows.timed = timed
        with pytest.raises(ClickException) as refused:
            rules.apply_rules(log, kept)
        assert f"this log has none; use {advice}" in refused.value.message
