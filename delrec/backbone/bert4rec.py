"""BERT4Rec (arXiv 1904.06690): a window is read in both directions, and hidden items are told.

It has a state where an item is hidden, not after each position. In training some items of a window
are hidden (cloze); a history gets one hidden item more behind it, and the state there says what
comes next.

Names: B sequences, L window, R rows that are computed (the last of L), E width, I items.
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn

from delrec.backbone.layers import Attention, Dropout, PositionWise, begin_small

MASK = -1  # stands for a hidden item; numbers above I are those of added items
HIDDEN = 0.2  # share of a window's items that training hides
HEADS = 2
EPS = 1e-12  # of the norms


class BERT4Rec(nn.Module):
    """Two post-norm blocks without a direction. Positions are counted from the end of the window.
    The vector of a hidden item is a parameter of its own: `item` has I + 1 rows, as in every model.
    """

    one_state, cloze = False, True

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        E = cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.position = nn.Embedding(cfg.history, E)
        self.mask = nn.Parameter(0.02 * torch.randn(E))
        self.norm, self.drop = nn.LayerNorm(E, eps=EPS), Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(E, cfg.dropout) for _ in range(2))
        self.history = cfg.history
        begin_small(self)

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states x_BLE of windows in which MASK hides items. With `last` those of histories,
        x_B1E: a hidden item is put behind their last L - 1 items, and the state is read there."""
        if last:
            hidden_B1 = torch.full_like(seq_BL[:, :1], MASK)
            seq_BL = torch.cat([seq_BL, hidden_B1], 1)[:, -self.history :]
        L, is_hidden_BL = seq_BL.shape[1], seq_BL == MASK
        x_BLE = self.item(seq_BL.masked_fill(is_hidden_BL, 0))
        x_BLE = torch.where(is_hidden_BL[..., None], self.mask, x_BLE)
        y_BLE = self.drop(self.norm(x_BLE + self.position.weight[:L].flip(0)))
        # each position sees itself and all that is no padding, before it and behind it
        own_LL = torch.eye(L, dtype=torch.bool, device=seq_BL.device)
        see_BLL = (seq_BL != 0)[:, None, :] | own_LL
        y_BLE = self.blocks[0](y_BLE, see_BLL, L)
        return self.blocks[1](y_BLE, see_BLL, 1 if last else L)


class Block(nn.Module):
    """y <- LN(Drop(MHA(y)) + y), then y <- LN(Drop(W_2 gelu(W_1 y)) + y)."""

    def __init__(self, E: int, dropout: float):
        super().__init__()
        self.attention, self.norm = Attention(E, HEADS, dropout), nn.LayerNorm(E, eps=EPS)
        self.ffn, self.drop = PositionWise(E, dropout), Dropout(dropout)

    def forward(self, y_BLE: torch.Tensor, see_BLL: torch.Tensor, rows: int) -> torch.Tensor:
        """y_BRE at the last R = `rows` positions. see_BLL: does a position (row) see another?"""
        a_BRE = self.attention(y_BLE, see_BLL, rows)
        return self.ffn(self.norm(self.drop(a_BRE) + y_BLE[:, -rows:]))


def hide(
    seq_BL: np.ndarray, target_BL: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(windows in which MASK hides some items, those items and 0 elsewhere). Of items seq_BL and
    the items that follow them; the windows end with the last of these. At least one item of each
    window is hidden, the last where none was drawn.
    """
    whole_BL = np.concatenate([seq_BL[:, 1:], target_BL[:, -1:]], 1)
    is_hidden_BL = (rng.random(whole_BL.shape) < HIDDEN) & (whole_BL > 0)
    is_hidden_BL[~is_hidden_BL.any(1), -1] = True
    return np.where(is_hidden_BL, MASK, whole_BL), np.where(is_hidden_BL, whole_BL, 0)


def faults(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    """What cannot be meant where BERT4Rec is trained: (is it so?, a sentence)."""
    if cfg.model != "bert4rec":
        return []
    return [
        (
            cfg.history < 2,
            "--history 1 leaves BERT4Rec no item to read, because the hidden one takes a place of "
            "the window; give 2 or more",
        ),
        (
            bool(cfg.width % HEADS),
            f"--width {cfg.width} cannot be dealt out to BERT4Rec's {HEADS} heads; give an even "
            "number",
        ),
        (
            bool(cfg.teacher and cfg.lam),
            f"--lam {cfg.lam} teaches what comes after a history, but BERT4Rec learns items in the "
            "midst of one; leave --lam out (--eta gives it the titles' vectors)",
        ),
    ]
