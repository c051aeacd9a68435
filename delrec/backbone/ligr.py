"""eSASRec (arXiv 2508.06450): SASRec's objective with LiGR layers, whose residuals are gated.

Names: B sequences, L window, R rows that are computed (the last of L), E width, I items.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from delrec.backbone.layers import Attention, Dropout, seen


class ESASRec(nn.Module):
    """Two LiGR blocks. Positions are counted from the end of the window, as SASRec's; there is no
    norm after the last block.
    """

    one_state, cloze = False, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        E = cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.position = nn.Embedding(cfg.history, E)
        self.blocks = nn.ModuleList(LiGR(E, cfg.dropout) for _ in range(2))
        self.drop = Dropout(cfg.dropout)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states x_BLE after the items seq_BL; with `last` only the last one's, x_B1E."""
        L, see_BLL = seq_BL.shape[1], seen(seq_BL)
        y_BLE = self.drop(self.item(seq_BL) + self.position.weight[:L].flip(0))
        y_BLE = self.blocks[0](y_BLE, see_BLL, L)
        return self.blocks[1](y_BLE, see_BLL, 1 if last else L)


class LiGR(nn.Module):
    """y <- y + sigmoid(G_1 y) * Drop(MHA(LN_1 y)), then y <- y + sigmoid(G_2 y) * Drop(FF(LN_2 y)).
    The gates G have a bias and read y itself, not its norm.
    """

    def __init__(self, E: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.gate1, self.gate2 = nn.Linear(E, E), nn.Linear(E, E)
        self.attention, self.ff = Attention(E, 1, dropout), SwiGLU(E, dropout)
        self.drop = Dropout(dropout)

    def forward(self, y_BLE: torch.Tensor, see_BLL: torch.Tensor, rows: int) -> torch.Tensor:
        """y_BRE at the last R = `rows` positions. see_BLL: does a position (row) see another?"""
        a_BRE = self.attention(self.norm1(y_BLE), see_BLL, rows)
        y_BRE = y_BLE[:, -rows:]
        y_BRE = y_BRE + self.gate1(y_BRE).sigmoid() * self.drop(a_BRE)
        return y_BRE + self.gate2(y_BRE).sigmoid() * self.drop(self.ff(self.norm2(y_BRE)))


class SwiGLU(nn.Module):
    """FF(v) = W_2 Drop(silu(W_1 v) * W_3 v), of inner width 4 E, without biases."""

    def __init__(self, E: int, dropout: float):
        super().__init__()
        self.w1, self.w3 = nn.Linear(E, 4 * E, bias=False), nn.Linear(E, 4 * E, bias=False)
        self.w2 = nn.Linear(4 * E, E, bias=False)
        self.drop = Dropout(dropout)

    def forward(self, v_BLE: torch.Tensor) -> torch.Tensor:
        """x_BLE."""
        return self.w2(self.drop(F.silu(self.w1(v_BLE)) * self.w3(v_BLE)))
