"""LRURec (arXiv 2310.02367): a linear recurrence of complex numbers, each of which turns and fades.

Names: B sequences, L window, R rows that are computed (the last of L), E width, S = 2 E complex
numbers of a state, I items.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn as nn

from delrec.backbone.layers import Dropout, PositionWise

SLOWEST, FASTEST = 0.99, 0.8  # |lambda| at the start lies between


class LRURec(nn.Module):
    """Two blocks of a recurrence and a position-wise layer; no positions."""

    one_state, cloze = False, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        E = cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.norm, self.drop = nn.LayerNorm(E), Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(E, cfg.dropout) for _ in range(2))

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states x_BLE after the items seq_BL; with `last` only the last one's, x_B1E."""
        L, real_BL = seq_BL.shape[1], seq_BL != 0
        y_BLE = self.norm(self.drop(self.item(seq_BL)))
        y_BLE = self.blocks[0](y_BLE, real_BL, L)
        return self.blocks[1](y_BLE, real_BL, 1 if last else L)


class Block(nn.Module):
    """y <- LN(Drop(Re(W_out h)) + y), then y <- LN(Drop(W_2 Drop(gelu(W_1 y))) + y)."""

    def __init__(self, E: int, dropout: float):
        super().__init__()
        self.lru, self.norm, self.drop = LRU(E), nn.LayerNorm(E), Dropout(dropout)
        self.ffn = PositionWise(E, dropout, inner_dropout=dropout, eps=self.norm.eps)

    def forward(self, y_BLE: torch.Tensor, real_BL: torch.Tensor, rows: int) -> torch.Tensor:
        """y_BRE at the last R = `rows` positions. real_BL: False where padding is."""
        x_BRE = self.lru(y_BLE, real_BL, rows)
        return self.ffn(self.norm(self.drop(x_BRE) + y_BLE[:, -rows:]))


class LRU(nn.Module):
    """h_t = lambda * h_{t-1} + gamma * (W_in y_t + b), lambda = exp(-exp nu + i exp theta); says
    Re(W_out h_t). gamma keeps the size of h. Complex weights are two real ones.
    """

    def __init__(self, E: int):
        super().__init__()
        S = 2 * E
        self.inward, self.outward = nn.Linear(E, 2 * S), nn.Linear(2 * S, E)
        # |lambda|^2 is uniform between its ends, the angle over the circle
        square_S = FASTEST**2 + torch.rand(S) * (SLOWEST**2 - FASTEST**2)
        self.nu = nn.Parameter((-0.5 * square_S.log()).log())
        self.theta = nn.Parameter((2 * math.pi * torch.rand(S)).log())
        self.log_gamma = nn.Parameter(0.5 * (1 - square_S).log())

    def forward(self, y_BLE: torch.Tensor, real_BL: torch.Tensor, rows: int) -> torch.Tensor:
        """x_BRE at the last R = `rows` positions. Padding adds nothing, so it carries nothing
        over."""
        u_BLS = self.log_gamma.exp() * torch.complex(*self.inward(y_BLE).chunk(2, -1))
        h_BRS = recurrence(u_BLS * real_BL[..., None], self.lam())[:, -rows:]
        return self.outward(torch.cat([h_BRS.real, h_BRS.imag], -1))

    def lam(self) -> torch.Tensor:
        """lambda, complex (S,)."""
        return torch.exp(torch.complex(-self.nu.exp(), self.theta.exp()))


def recurrence(u_BLS: torch.Tensor, lam_S: torch.Tensor) -> torch.Tensor:
    """h_t = lambda * h_{t-1} + u_t for all t, in log2 L passes instead of L steps: after a pass h_t
    holds the last n inputs, and takes the n before them from h_{t-n}, which fade by lambda^n.
    """
    h_BLS, n = u_BLS, 1
    while n < u_BLS.shape[1]:
        h_BLS = torch.cat([h_BLS[:, :n], h_BLS[:, n:] + lam_S * h_BLS[:, :-n]], 1)
        lam_S, n = lam_S * lam_S, 2 * n
    return h_BLS
