"""finetune.py --residual: what it reads of a backbone's folder."""

import numpy as np
import torch

from delrec.lm import residual


def test_dropout_leaves_out_a_share_of_the_reads():
    states = residual.FoldStates(
        np.ones((9, 3), np.float16), np.arange(9), np.arange(9), torch.tensor([[2.0, 5.0]]), 0.25
    )
    torch.manual_seed(0)
    u_NE = states.u(np.zeros(4000, int), np.ones(4000, int))
    told = u_NE.any(1)
    assert 0.22 < 1 - told.float().mean() < 0.28
    assert torch.equal(u_NE[told][0], torch.tensor([2.0, 2.0, 2.0, 5.0]))
