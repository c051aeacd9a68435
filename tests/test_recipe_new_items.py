"""recipes/new_items.py: what is held out is in no log and no history that is asked."""

import csv

import numpy as np
from recommenders import recommender_of

from recipes import new_items


def test_held_out_items_are_nowhere_but_among_the_targets(toy, tmp_path):
    is_out_I = new_items.held_out(toy, 0.2, 0)
    assert is_out_I.sum() == int(0.2 * len(np.unique(toy.items[toy.train]))) > 5
    new_items.write_log(tmp_path, toy, is_out_I)
    with open(tmp_path / "interactions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (~is_out_I[toy.items]).sum()
    assert not {row["item"] for row in rows} & {str(i) for i in np.flatnonzero(is_out_I)}
    histories, targets, user = new_items.asked(toy, is_out_I)
    assert len(histories) == len(targets) == len(user) > 0
    assert all(is_out_I[int(target)] for target in targets)
    assert not any(is_out_I[int(i)] for old in histories for i in old)


def test_hits_count_the_first_places(toy):
    def rule(olds, wanted):
        """The higher an item's number, the better."""
        return np.tile(np.arange(61, dtype=np.float32), (len(olds), 1))

    rec = recommender_of(toy, rule)
    new = [str(i) for i in range(1, 21)]
    found = new_items.hits(rec, [["1"], ["1"]], ["41", "15"], new)
    assert found["hr@20 of all"].tolist() == [1, 0]
    assert found["hr@10 of new"].tolist() == [0, 1]
