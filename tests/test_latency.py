"""delrec/serving/latency.py: how long a request takes."""

import numpy as np
import pytest

from delrec.serving.latency import milliseconds


@pytest.mark.parametrize(
    "n, batch, asked", [(512, 64, 64), (65, 64, 64), (64, 64, 64), (40, 64, 40)]
)
def test_as_many_requests_come_at_once_as_there_are(n, batch, asked):
    olds = [np.array([i + 1]) for i in range(n)]
    sizes = []

    def rank(part):
        sizes.append(len(part))
        return np.zeros((len(part), 3), np.float32)

    assert milliseconds(rank, olds, batch, seconds=0.01) > 0
    assert set(sizes) == {asked} and len(sizes) > 5
