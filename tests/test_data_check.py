"""data/check.py: what must hold of a prepared folder holds, and what is planted is found."""

import numpy as np
import pytest
from logs import prepared, random_log, run, toy

from delrec.data.prepared import users

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


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[:, :-1],  # a column too few
        lambda a: np.concatenate([a, a[:, :1]], 1),  # a column too many
        lambda a: a[:-1],  # a row too few
        lambda a: np.concatenate([a, a[:1]]),  # a row too many
        lambda a: a.ravel(),  # no rows at all
    ],
)
@pytest.mark.parametrize("part", ["candidates_val_15", "candidates_train_20"])
def test_candidates_of_the_wrong_shape_are_a_bad_line(tmp_path, part, change):
    data, _ = prepared(tmp_path, random_log())
    path = data.folder / f"{part}.npy"
    np.save(path, change(np.load(path)))
    result = run("toy", "--out", tmp_path / "out", "--check")
    bad = [line for line in result.output.splitlines() if line.startswith("BAD")]
    assert bad == [f"BAD  {path.name}: a row for every sample, of the right width: 1 of 1"]
    assert result.exit_code == 1 and "checks failed; prepare it again" in result.output


def test_titles_like_the_target_s_are_counted(tmp_path):
    titles = {str(i): "the same" for i in range(1, 41)}
    prepared(tmp_path, toy(), titles=titles)
    result = run("toy", "--out", tmp_path / "out", "--check")
    assert (
        result.exit_code == 0
        and "another item of the target's title (counted, not an error): 5 of 5" in result.output
    ), result.output
