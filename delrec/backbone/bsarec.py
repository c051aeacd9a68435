"""BSARec (arXiv 2312.10325): attention beside a filter of low and high frequencies.

The filter is circular: every position hears every other, also later ones and the padding, which has
its position vector. So L is a part of the model, padding is put back where it was cut off, and only
the last position is asked.

Names: B sequences, L window, R rows that are computed (the last of L), E width, I items.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from delrec.backbone.layers import Attention, Dropout, PositionWise, begin_small, seen

ALPHA = 0.7  # the filter's share
C = 5  # the filter keeps the lowest C // 2 + 1 frequencies
EPS = 1e-12  # of the norms


class BSARec(nn.Module):
    """Two post-norm blocks over items and absolute positions of the window."""

    one_state, cloze = True, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        L, E = cfg.history, cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.position = nn.Embedding(L, E)
        self.norm, self.drop = nn.LayerNorm(E, eps=EPS), Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(E, cfg.dropout) for _ in range(2))
        self.register_buffer("low_LL", low_pass(L, C), persistent=False)
        self.history = L
        begin_small(self)

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """x_B1E: the state after the last item of seq_BL, with `last` and without."""
        seq_BL = F.pad(seq_BL, (self.history - seq_BL.shape[1], 0))
        y_BLE = self.drop(self.norm(self.item(seq_BL) + self.position.weight))
        see_BLL = seen(seq_BL)
        y_BLE = self.blocks[0](y_BLE, see_BLL, self.low_LL)
        return self.blocks[1](y_BLE, see_BLL, self.low_LL[-1:])


class Block(nn.Module):
    """LN(FFN(alpha d + (1 - alpha) a)): d is filtered, a attends."""

    def __init__(self, E: int, dropout: float):
        super().__init__()
        self.beta = nn.Parameter(torch.randn(1, 1, E))
        self.attention = Attention(E, 1, dropout)
        self.norm_d, self.norm_a = nn.LayerNorm(E, eps=EPS), nn.LayerNorm(E, eps=EPS)
        self.ffn, self.drop = PositionWise(E, dropout), Dropout(dropout)

    def forward(
        self, y_BLE: torch.Tensor, see_BLL: torch.Tensor, low_RL: torch.Tensor
    ) -> torch.Tensor:
        """y_BRE at the last R positions. see_BLL: does a position (row) see another? low_RL: the
        last R rows of the low-pass filter."""
        R = len(low_RL)
        y_BRE, low_BRE = y_BLE[:, -R:], low_RL @ y_BLE
        high_BRE = y_BRE - low_BRE
        d_BRE = self.norm_d(self.drop(low_BRE + self.beta**2 * high_BRE) + y_BRE)
        a_BRE = self.norm_a(self.drop(self.attention(y_BLE, see_BLL, R)) + y_BRE)
        return self.ffn(ALPHA * d_BRE + (1 - ALPHA) * a_BRE)


def low_pass(L: int, c: int) -> torch.Tensor:
    """H (L, L): of y over L positions, H y keeps the c // 2 + 1 lowest frequencies.

    Fourier transform, cut and inverse are one fixed matrix: H[t, s] is the mean over the kept
    frequencies f of cos(2 pi f (t - s) / L), each twice (f and L - f) but for 0 and L / 2.
    """
    lag_LL = torch.arange(L)[:, None] - torch.arange(L)
    H_LL = torch.zeros(L, L, dtype=torch.float64)
    for f in range(min(c // 2, L // 2) + 1):
        times = 1 if f in (0, L / 2) else 2
        H_LL += times * torch.cos(2 * math.pi * f * lag_LL.double() / L) / L
    return H_LL.float()
