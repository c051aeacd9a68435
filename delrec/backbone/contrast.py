"""CL4SRec (arXiv 2010.14395): two changed copies of a history shall have states alike.

L = L_base + w L_cl. Each view of a history is made by one of three changes: a run of it is kept
(crop), some items are hidden (mask), a run is shuffled (reorder). z is the state after a view's
last item. Of the 2B states of a batch, each shall be nearest to the other view of its history:

    L_cl = mean - log exp(cos(z, z+) / tau) / sum_{z' != z} exp(cos(z, z') / tau)

Ours: the cosine, as states after a LayerNorm have dot products too large to learn from; and other
windows of the same user are no negatives.

Names: B histories, L window, E width, I items (0 pads on the left, I + 1 is the mask).
"""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from delrec.backbone.batches import Batch
from delrec.backbone.models import Grown
from delrec.data.prepared import Data, users
from delrec.processes import Ranks, sum_over_ranks

RUN, HIDDEN = 0.6, 0.3  # shares of a history that crop keeps, reorder shuffles; that mask hides


def crop(items: np.ndarray, rng: np.random.Generator, mask: int) -> np.ndarray:
    """A run of a history, at least one item long."""
    n = max(int(RUN * len(items)), 1)
    at = rng.integers(len(items) - n + 1)
    return items[at : at + n]


def hide(items: np.ndarray, rng: np.random.Generator, mask: int) -> np.ndarray:
    """A history with some of its items replaced by the mask."""
    hidden = items.copy()
    hidden[rng.permutation(len(items))[: int(HIDDEN * len(items))]] = mask
    return hidden


def reorder(items: np.ndarray, rng: np.random.Generator, mask: int) -> np.ndarray:
    """A history of which a run is shuffled."""
    n = int(RUN * len(items))
    at = rng.integers(len(items) - n + 1)
    mixed = items.copy()
    mixed[at : at + n] = rng.permutation(items[at : at + n])
    return mixed


CHANGES = (crop, hide, reorder)


def views_of(seq_BL: np.ndarray, mask: int, rng: np.random.Generator) -> np.ndarray:
    """(2, B, L): two views of every history by two different changes, padded on the left; a history
    of one item is both its views."""
    views_2BL = np.zeros((2, *seq_BL.shape), seq_BL.dtype)
    for row, seq_L in enumerate(seq_BL):
        items = seq_L[seq_L != 0]
        for view, change in zip(views_2BL[:, row], rng.permutation(len(CHANGES))):
            changed = CHANGES[change](items, rng, mask) if len(items) > 1 else items
            view[len(view) - len(changed) :] = changed
    return views_2BL


def info_nce(z_2BE: torch.Tensor, user_B: torch.Tensor, tau: float) -> torch.Tensor:
    """L_cl of B pairs of states. user_B: whose history each is."""
    B = z_2BE.shape[1]
    z_XE = F.normalize(z_2BE.flatten(0, 1), dim=1)  # X = 2B
    user_X = user_B.repeat(2)
    positive_X = (torch.arange(2 * B, device=z_XE.device) + B) % (2 * B)
    same_XX = user_X[:, None] == user_X
    same_XX[torch.arange(2 * B, device=z_XE.device), positive_X] = False
    s_XX = (z_XE @ z_XE.T / tau).masked_fill(same_XX, -torch.inf)
    return F.cross_entropy(s_XX, positive_X)


class Contrast:
    """w L_cl of a batch (train_backbone.py --contrast w)."""

    def __init__(self, cfg: SimpleNamespace, data: Data):
        self.cfg, self.data = cfg, data

    def term(
        self, model: nn.Module, batch: Batch, at: tuple[int, int], ranks: Ranks
    ) -> torch.Tensor:
        """w L_cl over the histories of all processes; at: (epoch, step). Its gradient is that of
        this process' own states, so that the sum over the processes is the whole one."""
        rng = np.random.default_rng([self.cfg.seed, *at, 2])
        # what BERT4Rec hides for its own sake is put back
        seq_BL = np.where(batch.seq_BL < 0, batch.target_BL, batch.seq_BL)
        views_2BL = views_of(seq_BL, self.data.n_items + 1, rng)
        user_B = torch.from_numpy(users(self.data, batch.last_B)).to(ranks.device)
        mine = slice(ranks.rank, None, ranks.world)
        own = [states(model, torch.from_numpy(view[mine]).to(ranks.device)) for view in views_2BL]
        z_2BE = torch.zeros(2, len(user_B), self.cfg.width, device=ranks.device)
        z_2BE[:, mine] = torch.stack([z.detach() for z in own])
        z_2BE = sum_over_ranks(z_2BE, ranks)
        z_2BE[:, mine] = torch.stack(own)
        return self.cfg.contrast * info_nce(z_2BE, user_B, self.cfg.contrast_tau)


def add_mask(model: nn.Module, cfg: SimpleNamespace) -> None:
    """Gives the model the mask's vector, which trains along."""
    start_E = 0.02 * torch.randn(cfg.width, generator=torch.Generator().manual_seed(cfg.seed))
    model.hidden = nn.Parameter(start_E.to(model.bias.device))


def drop_mask(model: nn.Module) -> None:
    """Takes it out of a trained model: only views have masks."""
    del model.hidden


def states(model: nn.Module, view_BL: torch.Tensor) -> torch.Tensor:
    """The states (B, E) after views, in which item I + 1 is the mask."""
    if not len(view_BL):  # a process without a row of a small last batch
        return torch.zeros(0, 1, device=view_BL.device) * model.hidden
    items = model.item
    model.item = Grown(items, model.hidden[None])
    try:
        return model(view_BL, last=True)[:, -1]
    finally:
        model.item = items
