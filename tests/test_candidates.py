"""data/candidates.py: each row its target and items that its user never touched."""

import numpy as np
import pytest
from logs import contents, prepared, random_log, run, toy, write

from delrec.data.candidates import draw_candidates
from delrec.data.counts import in_training
from delrec.data.prepared import candidates, users


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


def test_training_candidates_know_what_a_user_had_and_not_what_comes(tmp_path):
    data, _ = prepared(tmp_path, random_log())

    def pairs(user, item):
        return user * (data.n_items + 1) + item

    def touched(where):
        return pairs(users(data, where), data.items[where])

    cand_nC = candidates(data, "train", 15)
    pair_nC = pairs(users(data, data.train)[:, None], cand_nC)
    had_nC = np.isin(pair_nC, touched(np.flatnonzero(in_training(data))))
    assert np.array_equal(had_nC, cand_nC == data.items[data.train][:, None])
    assert (np.isin(pair_nC, touched(data.val)) & ~had_nC).any()


def test_candidates_are_uniform_even_for_users_who_leave_few():
    # user 0 touched items 1..4 of 20, user 1 all but 14: each free item must appear equally often
    touched = np.sort(np.concatenate([np.arange(1, 5), 21 + np.arange(15, 21)]))
    user = np.repeat([0, 1], 4000)
    rows = draw_candidates(
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


def test_a_training_user_who_touched_everything_is_refused_and_does_not_hang(tmp_path):
    rows = [(0, i, i) for i in range(40)] + [
        (u, i, 1000 + 40 * u + i) for u in range(1, 6) for i in range(20)
    ]
    result = run(
        "toy", "--raw", write(tmp_path / "raw", rows), "--out", tmp_path / "out", "--core", 1
    )
    assert (
        result.exit_code == 1
        and "of 40 items user '0' leaves only 0; leave the rows of that user out" in result.output
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "full, says",
    [(1, "user 'guest0' leaves only 5;"), (5, "users 'guest0', 'guest1', 'guest2' and 2 more")],
)
def test_users_who_touched_nearly_everything_are_named_and_without_them_it_works(
    tmp_path, full, says
):
    guests = [(f"guest{g}", i, 40 * g + i) for g in range(full) for i in range(35)]
    others = [(f"c{u}", (7 * u + i) % 40, 50 * u + i) for u in range(30) for i in range(6)]
    for rows, refused in ((guests + others, True), (others, False)):
        raw = write(tmp_path / "raw", rows)
        result = run("toy", "--raw", raw, "--out", tmp_path / "out", "--core", 1)
        assert result.exit_code == refused, result.output
        assert (says in result.output) == refused, result.output
