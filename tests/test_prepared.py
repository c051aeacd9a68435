"""delrec/data/prepared.py: histories, candidates and subsets of a prepared folder."""

import shutil
from types import SimpleNamespace

import numpy as np
from scripts import sentence

from delrec import runtime
from delrec.data.floors import places_for_fusion
from delrec.data.prepared import (
    candidates,
    distinct_titles,
    halves_of_validation,
    histories,
    load_data,
    raw_item_ids,
    subset,
    users,
)


def two_users():
    """User 0 owns items 5 6 7, user 1 owns 1 2, user 2 owns 9."""
    return SimpleNamespace(items=np.array([5, 6, 7, 1, 2, 9], np.int32), ptr=np.array([0, 3, 5, 6]))


def test_histories_are_left_padded_and_never_cross_users():
    rows = histories(two_users(), np.array([0, 2, 3, 4, 5]), 3)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 0, 0], [0, 5, 6], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    # the last L, the oldest dropped
    assert histories(two_users(), [2], 1).tolist() == [[6]]
    assert users(two_users(), np.arange(6)).tolist() == [0, 0, 0, 1, 1, 2]


def test_histories_of_the_toy_data_are_the_users_own_items(toy):
    samples = np.concatenate([toy.train, toy.val, toy.test])
    for sample, row in zip(samples, histories(toy, samples, 10)):
        u = next(u for u in range(toy.n_users) if toy.ptr[u] <= sample < toy.ptr[u + 1])
        before = toy.items[toy.ptr[u] : sample][-10:]
        assert row.tolist() == [0] * (10 - len(before)) + before.tolist()


def test_candidates_that_do_not_exist_name_those_that_do(toy):
    assert candidates(toy, "val", 15).shape == (len(toy.val), 15)
    says = sentence(candidates, toy, "val", 16)
    assert "no 16 candidates for val" in says and "[15, 20]" in says and str(toy.n_items) in says


def test_a_subset_is_sorted_stable_and_grows_by_adding():
    a, b = subset(1000, 50, 0), subset(1000, 60, 0)
    assert len(set(a)) == 50 and (np.diff(a) > 0).all() and set(a) < set(b)
    assert np.array_equal(a, subset(1000, 50, 0)) and not np.array_equal(a, subset(1000, 50, 1))
    for limit in (0, None, 7, 8):
        assert subset(7, limit, 0).tolist() == list(range(7))


def test_validation_has_two_halves_of_different_users(toy):
    first, second = halves_of_validation(toy)
    assert sorted([*first, *second]) == list(range(len(toy.val)))
    one, other = (set(users(toy, np.asarray(toy.val)[half])) for half in (first, second))
    assert one and other and not one & other
    assert abs(len(first) - len(second)) < 0.3 * len(toy.val)
    again = halves_of_validation(toy)
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])
    # users are drawn: the first half is not the first users
    assert min(other) < max(one)


def test_halves_are_near_in_samples_where_users_are_uneven():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ptr = np.cumsum([0, *rng.permutation([40, 5, 6, 30, 7, 12])])
        data = SimpleNamespace(val=np.arange(100), ptr=ptr, folder="shop")
        first, second = halves_of_validation(data)
        assert 25 <= len(first) <= 75 and len(first) + len(second) == 100
    lone = SimpleNamespace(val=np.arange(3), ptr=np.array([0, 5]), folder="shop")
    assert [len(half) for half in halves_of_validation(lone)] == [3, 0]
    assert "all 3 validation samples are one user's" in sentence(places_for_fusion, lone, 0)


def test_unknown_data_set_says_what_to_type(tmp_path, monkeypatch, toy):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    shutil.copytree(toy.folder, tmp_path / "data" / "games")
    says = sentence(load_data, "netflix")
    assert "prepared here: games" in says and "python data/prepare.py netflix --raw FOLDER" in says
    assert sentence(load_data, "ml-100k").endswith("python data/prepare.py ml-100k")
    assert load_data("games").n_items == toy.n_items
    shutil.copytree(toy.folder, tmp_path / "data" / "my-shop")
    says = sentence(load_data, "myshop")  # before the command that would prepare what is there
    assert "is my-shop meant? prepared here: my-shop, games. Else prepare it" in says
    assert "meant?" not in sentence(load_data, "netflix")
    assert "prepared here: games" in sentence(load_data, str(tmp_path / "elsewhere"))


def test_items_without_a_title_are_refused(tmp_path, toy):
    shutil.copytree(toy.folder, tmp_path / "toy")
    lines = (tmp_path / "toy" / "titles.txt").read_text().split("\n")
    (tmp_path / "toy" / "titles.txt").write_text("\n".join(lines[:-2]) + "\n")
    assert f"item id {toy.n_items} but only {toy.n_items - 1} titles" in sentence(
        load_data, str(tmp_path / "toy")
    )


def test_titles_that_several_items_have_are_told_apart_by_their_raw_ids(tmp_path):
    (tmp_path / "raw_items.txt").write_text("a\nb\nc\n")
    titles = ["", "Mug", "Tea", "Mug"]
    data = SimpleNamespace(
        folder=tmp_path, titles=titles, n_items=3, shared=None, meta={"hash": None}
    )
    assert raw_item_ids(data) == ["", "a", "b", "c"]
    assert distinct_titles(data) == ["", "Mug [id a]", "Tea", "Mug [id c]"]
