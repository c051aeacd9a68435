"""windows.py: windows of items, in which every training target is asked once an epoch."""

from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import users
from delrec.lm import windows
from delrec.lm.ragged import Ragged, beside, ragged, same
from delrec.lm.text import ITEM, MASK


def ranker_of(data):
    """What Windows.prompts needs of a ranker: an item is one token, between a first and a mask."""

    def histories(old):
        n = len(old)
        vectors = Ragged(ITEM - old.flat, old.ptr)
        at = [np.arange(1, length + 1) for length in old.lengths]
        return beside(same([0], n), vectors, same([MASK], n)), ragged(at)

    prompts, lm = SimpleNamespace(histories=histories), SimpleNamespace(items=None)
    return SimpleNamespace(data=data, history=6, prompts=prompts, lm=lm)


def epoch_of(data):
    """(first, last, prompt) of the windows of one epoch."""
    drawn, asked = windows.Windows(data, 6, 500, 0), 0
    prompts = drawn.prompts(ranker_of(data), np.arange(500))
    for window in zip(drawn.first_n, drawn.last_n, prompts):
        yield window
        asked += len(window[2].target)
        if asked == len(data.train):
            return


def test_windows_meet_every_training_target_once_an_epoch(toy):
    count, seen = 0, []
    for first, last, e in epoch_of(toy):
        count += len(e.target)
        seen += range(first, last + 1)
    assert sorted(set(seen) & set(toy.train.tolist())) == sorted(toy.train.tolist())
    assert count == len(toy.train)


def test_the_targets_of_a_window_are_its_items_the_last_one_first(toy):
    for _, last, e in epoch_of(toy):
        assert e.target[0] == toy.items[last]
        assert len(e.target) == len(e.at) + 1
        assert e.place[0] == last
        assert (toy.items[e.place] == e.target).all()
        assert (np.diff(e.place[1:]) > 0).all()


def test_a_target_sees_only_what_came_before_it(toy):
    for _, last, e in epoch_of(toy):
        user = users(toy, np.array([last]))[0]
        whole = toy.items[toy.ptr[user] : last + 1].tolist()
        for place, target in zip(e.at, e.target[1:]):
            # the state before the vector of the target predicts it
            assert e.tail[place] == ITEM - target
        assert (ITEM - e.tail[1:-1]).tolist() == whole[-len(e.tail) + 1 : -1]


def test_windows_know_how_many_targets_each_has(toy):
    drawn = windows.Windows(toy, 6, 100, 0)
    prompts = drawn.prompts(ranker_of(toy), np.arange(100))
    assert drawn.n_reads.tolist() == [len(e.target) for e in prompts]
    assert drawn.places.tolist() == [e.place[0] for e in prompts]
    assert [e.number for e in prompts] == list(range(100))
