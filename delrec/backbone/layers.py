"""Layers that several conventional models are made of.

Names: B sequences, L window, R rows that are computed (the last of L), E width, H heads.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class Dropout(nn.Dropout):
    """Dropout from uniform numbers: on a CPU torch's own draws Bernoulli numbers, which takes four
    times as long, a quarter of a training step.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of any shape: in training a share p of it is 0, and the rest grows by 1 / (1 - p)."""
        return (
            x * ((torch.rand_like(x) >= self.p) / (1 - self.p)) if self.training and self.p else x
        )


def seen(seq_BL: torch.Tensor) -> torch.Tensor:
    """see_BLL: does a position (row) see another? It sees itself (always, so that no row of the
    softmax is empty) and the real items before it.
    """
    L = seq_BL.shape[1]
    see_LL = torch.ones(L, L, dtype=torch.bool, device=seq_BL.device).tril()
    own_LL = torch.eye(L, dtype=torch.bool, device=seq_BL.device)
    return see_LL & (seq_BL != 0)[:, None, :] | own_LL


class Attention(nn.Module):
    """H heads of attention: W_o softmax(Q K' / sqrt(E / H)) V, with dropout of the softmax."""

    def __init__(self, E: int, heads: int, dropout: float):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(E, E), nn.Linear(E, 2 * E), nn.Linear(E, E)
        self.drop, self.heads = Dropout(dropout), heads

    def forward(self, y_BLE: torch.Tensor, see_BLL: torch.Tensor, rows: int) -> torch.Tensor:
        """x_BRE at the last R = `rows` positions. see_BLL: does a position (row) see another?"""
        k_BLE, v_BLE = self.kv(y_BLE).chunk(2, -1)
        q_BHRD, k_BHLD, v_BHLD = map(self.by_head, (self.q(y_BLE[:, -rows:]), k_BLE, v_BLE))
        a_BHRL = (q_BHRD @ k_BHLD.transpose(2, 3) * q_BHRD.shape[-1] ** -0.5).masked_fill(
            ~see_BLL[:, None, -rows:], -torch.inf
        )
        z_BHRD = self.drop(a_BHRL.softmax(-1)) @ v_BHLD
        return self.out(z_BHRD.transpose(1, 2).flatten(2))

    def by_head(self, x_BLE: torch.Tensor) -> torch.Tensor:
        """x_BHLD, the E columns dealt out to the heads, D = E / H each."""
        return x_BLE.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PositionWise(nn.Module):
    """LN(Drop(W_2 gelu(W_1 y)) + y), of inner width 4 E."""

    def __init__(self, E: int, dropout: float, inner_dropout: float = 0.0, eps: float = 1e-12):
        super().__init__()
        self.inner, self.outer = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
        self.norm = nn.LayerNorm(E, eps=eps)
        self.drop, self.inner_drop = Dropout(dropout), Dropout(inner_dropout)

    def forward(self, y_BLE: torch.Tensor) -> torch.Tensor:
        """x_BLE."""
        inner_BLF = self.inner_drop(F.gelu(self.inner(y_BLE)))
        return self.norm(self.drop(self.outer(inner_BLF)) + y_BLE)


def begin_small(model: nn.Module) -> None:
    """Draws every matrix of a model from N(0, .02), as BERT does; biases are 0."""
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
