"""delrec/serving/latency.py: how long a request takes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from delrec.evaluation.figures import latency_figure
from delrec.evaluation.wording import where_timed
from delrec.serving.latency import milliseconds, timed_on


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


def test_a_table_says_on_what_its_requests_were_timed(monkeypatch):
    runs = {"sasrec": SimpleNamespace(stage="train_backbone")}
    runs |= {"delrec": SimpleNamespace(stage="finetune"), "lm": SimpleNamespace(stage="lm")}

    def told(*names):
        interval = {"hr@1": 0.5, "hr@1_interval": [0.4, 0.6]}
        rows = {name: interval | {"ms": [1.0], "ms_on": timed_on(runs[name])} for name in names}
        result = {"rows": rows | {"chance": {}}, "candidates": 15}
        (axis,) = latency_figure(result).axes
        assert axis.get_xlabel().endswith(where_timed(result))
        return where_timed(result)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told("sasrec", "delrec", "lm") == "on one core"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert told("sasrec") == "on one core"
    assert told("delrec", "lm") == "on the GPU"
    assert told("sasrec", "delrec") == "a backbone's on one core, an LM's on the GPU"
