"""models.py: the conventional networks."""

from types import SimpleNamespace

import pytest
import torch

from delrec.backbone import models
from train_backbone import ALL


@pytest.mark.parametrize("model", models.ALL)
def test_padding_changes_no_score(model):
    torch.manual_seed(0)
    cfg = SimpleNamespace(**(ALL[model] | dict(history=5, width=8, dropout=0.5)))
    net = models.build(model, 30, cfg).eval()
    for p in net.parameters():
        # large enough that a difference shows
        p.data.mul_(5 if p.dim() > 1 else 1)
    with torch.no_grad():
        alone = models.score(net, [[3, 7]])
        nothing = models.score(net, [[0, 0, 0]])
        batch = models.score(net, [[0, 0, 0, 3, 7], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    assert torch.isfinite(batch[:, 1:]).all()
    assert (batch[:, 0] == -torch.inf).all()
    torch.testing.assert_close(alone[0], batch[0])
    torch.testing.assert_close(nothing[0], batch[2], rtol=1e-4, atol=1e-4)
