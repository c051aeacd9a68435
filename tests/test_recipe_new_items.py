"""recipes/new_items.py: what is held out is in no log and no history that is asked."""

import csv

import numpy as np
from recommenders import recommender_of

from delrec.data.counts import in_training
from recipes import new_items


def test_held_out_items_are_nowhere_but_among_the_targets(toy, tmp_path):
    is_out_I = new_items.held_out(toy, 0.2, 0)
    assert is_out_I.sum() == int(0.2 * len(np.unique(toy.items[toy.train]))) > 5
    new_items.write_log(tmp_path, toy, is_out_I)
    with open(tmp_path / "interactions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == (~is_out_I[toy.items]).sum()
    assert not {row["item"] for row in rows} & {str(i) for i in np.flatnonzero(is_out_I)}
    asked = new_items.asked(toy, is_out_I)
    assert len(asked.old) == len(asked.target_n) == len(asked.user_n) > 0
    assert is_out_I[asked.target_n].all()
    assert not any(is_out_I[items].any() for items in asked.old)
    padded = asked.last(3)
    assert padded.shape == (len(asked.old), 3) and (padded[:, -1] > 0).all()


def test_items_that_stay_in_the_catalogue_are_in_the_test_part_alone(toy, tmp_path):
    is_out_I = new_items.held_out(toy, 0.2, 0)
    is_out_I &= np.isin(np.arange(toy.n_items + 1), toy.items[toy.test])
    new_items.write_log(tmp_path / "raw", toy, is_out_I, in_test=True)
    rows = {}
    for part in ("train", "val", "test"):
        with open(tmp_path / "raw" / f"interactions.{part}.csv", newline="") as file:
            rows[part] = [int(row["item"]) for row in csv.DictReader(file)]
    held = set(np.flatnonzero(is_out_I).tolist())
    assert not held & {*rows["train"], *rows["val"]}
    assert sorted(rows["test"]) == sorted(toy.items[toy.test].tolist()) and held <= {*rows["test"]}
    assert len(rows["val"]) == (~is_out_I[toy.items[toy.val]]).sum()
    assert len(rows["train"]) == (in_training(toy) & ~is_out_I[toy.items]).sum()


def test_where_only_an_order_is_known_the_log_is_in_that_order(toy, tmp_path):
    from dataclasses import replace

    ordered = replace(toy, times=None)
    new_items.write_log(tmp_path, ordered, np.zeros(toy.n_items + 1, bool))
    with open(tmp_path / "interactions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["item"]) for row in rows] == toy.items.tolist()
    assert [int(row["position"]) for row in rows] == list(range(len(toy.items)))


def test_title_similarity_finds_a_new_item_by_its_words(toy):
    from dataclasses import replace

    # every title has a word of its own; 60 is called like 7
    titles = ["", *(f"word{i}" for i in range(1, 60)), "word7"]
    named = replace(toy, titles=titles)
    is_out_I = np.zeros(61, bool)
    is_out_I[[60, *range(20, 40)]] = True
    asked = new_items.Asked([np.array([7]), np.array([8])], np.array([60, 60]), np.array([0, 1]))
    found = new_items.similarity_hits(named, asked, is_out_I)
    assert found["hr@20 of all"].hit_n.tolist() == [1, 0]
    assert found["hr@10 of new"].hit_n.tolist() == [1, 0]


def test_hits_count_the_first_places(toy):
    def rule(olds, wanted):
        """The higher an item's number, the better."""
        return np.tile(np.arange(61, dtype=np.float32), (len(olds), 1))

    rec = recommender_of(toy, rule)
    ids, new = [str(i) for i in range(61)], [str(i) for i in [*range(1, 21), 50]]

    def of(*targets):
        n = len(targets)
        return new_items.Asked([np.array([60])] * n, np.array(targets), np.arange(n))

    found = new_items.hits(rec, ids, of(50, 15), of(41, 40, 39), new)
    found = {what: hits.hit_n.tolist() for what, hits in found.items()}
    assert found == {
        "hr@20 of all": [1, 0],
        "hr@10 of new": [1, 1],
        "others' hr@20": [1, 1, 0],
        "others' hr@20 without them": [1, 1, 1],
    }


def test_each_test_sample_with_a_history_is_asked_once(toy):
    is_out_I = new_items.held_out(toy, 0.2, 0)
    new, others = (new_items.asked(toy, is_out_I, out) for out in (True, False))
    assert is_out_I[new.target_n].all() and not is_out_I[others.target_n].any()
    assert len(toy.test) * 0.9 < len(new.old) + len(others.old) <= len(toy.test)


def test_a_log_without_other_items_is_a_log_of_its_own(toy, monkeypatch, tmp_path):
    monkeypatch.setattr(new_items.runtime, "ROOT", tmp_path)
    did = []
    monkeypatch.setattr(new_items, "stage", lambda *args, **_: did.append([str(a) for a in args]))

    def prepared_for(share, seed=0, cold_out=False):
        did.clear()
        is_out_I = new_items.held_out(toy, share, seed)
        new_items.make_runs(toy, is_out_I, ["--model", "sasrec"], cold_out)
        return next(args[2] for args in did if args[1] == "data/prepare.py")

    names = [prepared_for(0.1), prepared_for(0.2), prepared_for(0.1, seed=1)]
    names.append(prepared_for(0.1, cold_out=True))
    assert [args[0].rsplit("/", 1)[1] for args in did[1:]] == [
        "new-sasrec-cold-out",
        "new-sasrec-cold-out-permute-text",
        "new-sasrec",
    ]
    assert len(set(names)) == 4 and prepared_for(0.1) == names[0]


def test_a_test_part_that_asks_for_no_held_out_item_is_one_sentence(toy):
    from click.testing import CliRunner

    done = CliRunner().invoke(
        new_items.main, ["--dataset", str(toy.folder), "--share", "0.001"], catch_exceptions=False
    )
    assert done.exit_code == 1 and "hold out more (--share)" in done.output


def test_permuted_titles_leave_no_item_its_own():
    titles = {f"i{n}": f"title {n}" for n in range(12)}
    for seed in range(5):
        other = new_items.permuted(titles, seed)
        assert sorted(other.values()) == sorted(titles.values()) and other.keys() == titles.keys()
        assert not any(other[i] == titles[i] for i in titles)
