"""recipes/bench_race.py: what the programs learn from and are asked, and what a row says."""

import sys

import numpy as np
import torch

from delrec.data import recbole_epoch
from delrec.data.prepared import histories, users
from recipes.bench_race import Run, run_ours, run_theirs, write_for_recbole, write_work

LIMITS = {"seconds": 60.0, "patience": 3}


def test_a_row_compares_the_times_to_the_level_that_both_reached():
    ours = Run("ours", np.array([10.0, 20.0, 30.0]), np.array([0.2, 0.5, 0.4]))
    worse = Run("worse", np.array([40.0, 80.0, 120.0]), np.array([0.1, 0.3, 0.2]))
    better = Run("better", np.array([100.0, 200.0]), np.array([0.5, 0.6]))
    row = worse.row(ours)
    assert (row["level"], row["theirs"], row["ours"], row["ratio"]) == (0.3, 80, 20, 4)
    row = better.row(ours)
    assert (row["level"], row["theirs"], row["ours"], row["ratio"]) == (0.5, 100, 20, 5)
    assert (row["best"], row["epoch"], row["epochs"], row["seconds"]) == (0.6, 2, 2, 200)


def test_rivals_learn_from_our_interactions_and_none_of_later_parts(toy, tmp_path):
    write_work(toy, tmp_path / "work.npz", LIMITS)
    work = np.load(tmp_path / "work.npz")
    user, item = work["train_user"], work["train_item"]
    later = np.concatenate([toy.val, toy.test])
    first = np.asarray(toy.ptr)[:-1]
    of_training = np.union1d(toy.train, first[np.isin(first + 1, toy.train)])
    assert len(user) == len(of_training) and not np.isin(of_training, later).any()
    np.testing.assert_array_equal(item, toy.items[of_training])
    np.testing.assert_array_equal(user, users(toy, of_training))


def test_rivals_are_asked_with_whole_histories_in_their_order(toy, tmp_path):
    write_work(toy, tmp_path / "work.npz", LIMITS)
    work = np.load(tmp_path / "work.npz")
    assert 0 < len(work["val_target"]) < len(toy.val)
    for n, target in enumerate(work["val_target"]):
        history = work["asked_item"][work["asked_sample"] == n]
        samples = np.flatnonzero(toy.items == target)
        whole = [histories(toy, np.array([s]), 99)[0] for s in samples]
        assert any(np.array_equal(h[h > 0], history) for h in whole)


def test_recboles_samples_leave_out_what_a_user_had(toy, tmp_path, monkeypatch):
    write_for_recbole(toy, tmp_path / "recbole.npz", LIMITS)
    work = np.load(tmp_path / "recbole.npz")
    # a model that knows the history by heart, then the target
    score = torch.zeros(len(work["val_target"]), toy.n_items + 1)
    score.scatter_(1, torch.from_numpy(work["val_had"]), 2.0)
    score.scatter_(1, torch.from_numpy(work["val_target"])[:, None], 1.0)
    monkeypatch.setattr(recbole_epoch, "scores_of", lambda *args: score.clone())
    assert recbole_epoch.validation_ndcg(None, work) == 1


def test_our_curve_is_that_of_the_log_and_a_rivals_what_its_program_prints(toy, tmp_path):
    ours = run_ours(toy, "--epochs 2 --width 8", tmp_path)
    assert ours.name == "train_backbone.py --epochs 2 --width 8" and len(ours.quality) == 2
    assert (np.diff(ours.seconds) > 0).all() and (ours.quality >= 0).all()
    program = tmp_path / "rival.py"
    program.write_text("import sys\nprint('{\"curve\": [[1, 0.1], [' + sys.argv[1] + ', 0.2]]}')\n")
    rival = run_theirs("rival", sys.executable, program, [7], tmp_path)
    assert rival.seconds.tolist() == [1, 7] and rival.quality.tolist() == [0.1, 0.2]
