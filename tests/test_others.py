"""Controls without meaning: a history of somebody else."""

from types import SimpleNamespace

import numpy as np
import pytest
from kinds import owner

from delrec.data.prepared import histories
from delrec.lm.residual import Residual
from delrec.lm.summaries import OtherUsers


@pytest.mark.parametrize("kind", ["residual", "summary"])
def test_nobody_is_answered_by_a_history_of_his_own(kind, shelves, tmp_path):
    control = Residual(SimpleNamespace(history=8), tmp_path, shelves, True).of_another
    control = control if kind == "residual" else OtherUsers(shelves, 8).history
    for place in (*shelves.train, *shelves.test):
        old = histories(shelves, np.array([place]), 8)[0]
        old = old[old > 0]
        for asked in (old, old[::-1]):  # in any order
            other = control(asked)
            assert owner(shelves, other) != owner(shelves, old)
            assert np.array_equal(other, control(asked.copy()))
    assert len(control(np.zeros(0, int)))
