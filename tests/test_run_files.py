"""delrec/data/run_files.py: what somebody else wrote into a run's folder is meant, or refused in a
sentence that names the file, the row and what is wrong.
"""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from commands import edit_config
from scripts import sentence

import evaluate
from delrec.data.run_files import lists_in, ranks_in
from delrec.lm.prompt_training import Nearness


@pytest.fixture
def mine(backbone, toy, tmp_path):
    """A copy of the toy backbone's folder, whose files may be spoilt."""
    return shutil.copytree(backbone, tmp_path / "mine")


def with_one(value, *place, kind=None):
    """A change that puts a value into one place of an array."""

    def change(array):
        array = array.astype(kind or array.dtype)
        array[place] = value
        return array

    return change


def spoilt(path, change):
    """The path of a file whose array was changed."""
    np.save(path, change(np.load(path)))
    return path


# ---------------------------------------------------------------- ranks in the whole catalogue


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda full: full + 100_000, "says in row 0 that 1000"),
        (with_one(60, 7, 0), "says in row 7 that 60 items are above the target and 0 level"),
        (with_one(30, 7), "says in row 7 that 30 items are above the target and 30 level"),
        (with_one((-1, 3), 7), "says in row 7 that -1 items"),
        (with_one(-2, 7), "says in row 7 that -2 items"),
        (with_one(np.nan, 7, kind=float), "values of type float64, expected whole numbers (int32)"),
        (lambda full: full.astype(str), "values of type <U"),
    ],
    ids=["far too high", "I above", "I in all", "half asked", "-2", "NaN", "text"],
)
def test_ranks_that_no_target_can_have_are_refused(mine, toy, change, says):
    path = spoilt(mine / "full_test.npy", change)
    said = sentence(ranks_in, path, toy, "test")
    assert said.startswith(f"{path} ") and says in said and said.endswith("write the file again")


def test_ranks_of_the_last_item_and_those_that_nobody_asked_are_read(mine, toy):
    """59 of 60 items above the target, or all level with it."""
    full = np.load(mine / "full_test.npy")
    full[:3] = (59, 0), (0, 59), (-1, -1)
    np.save(mine / "full_test.npy", full.astype(np.uint8).astype(np.int8))
    assert (ranks_in(mine / "full_test.npy", toy, "test") == full).all()


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize(
    "change, says",
    [
        (with_one(61, 7, 3), "lists item 61 in row 7, expected ids of 1 to 60"),
        (lambda lists: np.full_like(lists, -1), "lists item -1 in row 0"),
        (with_one(0, 7, 3), "in row 7, expected ids"),  # a hole
        (lambda lists: lists.astype(float), "values of type float64, expected whole numbers"),
    ],
    ids=["above I", "all -1", "a hole", "floats"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_lists_of_no_items_are_refused(mine, toy, split, change, says):
    path = spoilt(mine / f"topk_{split}.npy", change)
    said = sentence(lists_in, path, toy, split)
    assert said.startswith(f"{path} ") and says in said and said.endswith("write the file again")


def test_lists_may_be_short_and_missing(mine, toy):
    lists = np.load(mine / "topk_test.npy")
    lists[7, 4:], lists[8] = 0, 0
    np.save(mine / "topk_test.npy", lists)
    assert (lists_in(mine / "topk_test.npy", toy, "test") == lists).all()


@pytest.mark.parametrize("name", ["full_test.npy", "topk_test.npy"])
def test_a_table_is_not_made_of_them(mine, refused, on_cpu, name):
    spoilt(mine / name, lambda array: array + 100_000)
    assert name in refused(evaluate.main, f"--ckpt {mine}")
    assert not (mine / "evaluation").exists()


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    "change, says",
    [
        (with_one(np.nan, 7, 3), "holds nan in row 7, for candidate 3, expected a finite score"),
        (lambda scores: scores * np.nan, "holds nan in row 0, for candidate 0 (and such in 84 "),
        (with_one(-np.inf, slice(None), 2), "holds -inf in row 0, for candidate 2 (and such in 84"),
        (
            lambda scores: scores.astype(str),
            "holds values of type <U32, expected numbers (float32)",
        ),
    ],
    ids=["one NaN", "all NaN", "a column of -inf", "text"],
)
def test_scores_that_rank_nothing_are_refused(mine, refused, on_cpu, change, says):
    path = spoilt(mine / "scores_test_15.npy", change)
    said = refused(evaluate.main, f"--ckpt {mine}")
    assert f"{path} {says}" in said and said.endswith("write the file again")


def test_stage_1_reads_no_such_scores(mine, toy):
    path = spoilt(mine / "scores_val_15.npy", lambda scores: scores * np.nan)
    cfg = SimpleNamespace(C=15, val_samples=0, seed=0)
    assert sentence(Nearness, cfg, toy, mine).startswith(f"{path} holds nan in row ")


def test_scores_of_other_candidates_are_named(mine, refused, on_cpu):
    shutil.copy(mine / "scores_test_15.npy", mine / "scores_test_15_shuffled.npy")
    sentence = refused(evaluate.main, f"--ckpt {mine} --candidates 20")
    assert "scores_val_20.npy, scores of 20 candidates, is not there" in sentence
    assert "but scores_val_15.npy (--candidates); write the file again" in sentence


def test_who_trained_here_is_told_to_train_again(mine, toy, refused, on_cpu):
    edit_config(mine, n_items=toy.n_items)
    (mine / "scores_val_15.npy").unlink()
    sentence = refused(evaluate.main, f"--ckpt {mine}")
    assert "is not there; train the backbone again" in sentence
