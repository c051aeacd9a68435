"""Controls without meaning: a history of somebody else."""

from types import SimpleNamespace

import numpy as np
import pytest

from delrec.data.prepared import histories, users
from delrec.lm.residual import Residual
from delrec.lm.summaries import OtherUsers


@pytest.fixture(scope="module")
def shelves(make_data, tmp_path_factory):
    """Three users, each of whom takes items of a shelf of his own, so an item tells whose it is."""
    rows = [(u, 20 * u + t, 100 * u + t) for u in range(3) for t in range(1, 20)]
    titles = {item: f"Film {item}" for _, item, _ in rows}
    return make_data(tmp_path_factory.mktemp("shelves"), rows, titles, "shelves")


def owner(data, items) -> int:
    """The user whose shelf some items are of."""
    (user,) = {int(users(data, [np.flatnonzero(data.items == item)[0]])[0]) for item in items}
    return user


@pytest.mark.parametrize("kind", ["residual", "summary"])
def test_nobody_is_answered_by_a_history_of_his_own(kind, shelves, tmp_path):
    control = Residual(SimpleNamespace(history=8), tmp_path, shelves, True).of_another
    control = control if kind == "residual" else OtherUsers(shelves).history
    for place in (*shelves.train, *shelves.test):
        old = histories(shelves, np.array([place]), 8)[0]
        old = old[old > 0]
        for asked in (old, old[::-1]):  # in any order
            other = control(asked)
            assert owner(shelves, other) != owner(shelves, old)
            assert np.array_equal(other, control(asked.copy()))
    assert len(control(np.zeros(0, int)))
