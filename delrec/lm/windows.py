"""Windows of items, what --input ids trains on: one prompt, and the next item is predicted after
every item of it (E4SRec, arXiv 2312.02443).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.prepared import Data, batch_of, runs_of_targets, users
from delrec.lm import twice
from delrec.lm.counted import beside
from delrec.lm.items import in_tables, item_space, scores_in_tables, table_of
from delrec.lm.ragged import Ragged, of_padded
from delrec.lm.ranker import Ranker
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.residual import WEIGHT, told, weights_of, with_backbone_state
from delrec.lm.user_states import carrying
from delrec.runtime import stop

if TYPE_CHECKING:
    from delrec.lm.ensemble import Ensemble
    from delrec.lm.kept import KeptLists


@dataclass
class WindowPrompt:
    """A window as a prompt with several targets, the one read at the mask first."""

    tail: np.ndarray  # tokens behind the prefix
    at: np.ndarray  # places in it of the vectors whose predecessors are read besides the mask
    place: np.ndarray  # of each read's target in data.items
    target: np.ndarray  # its item
    table: np.ndarray  # and the table of item vectors it is looked up in (items.Folds)
    number: int  # the window's, among the training samples


class Windows:
    """n windows of at most L items: every training target once an epoch, the windows cut anew in
    each."""

    def __init__(self, data: Data, L: int, n: int, seed: int):
        self.first_n, self.last_n = draw_windows(data, L, n, seed)
        self.is_target = np.zeros(len(data.items), bool)
        self.is_target[data.train] = True
        self.places = self.last_n  # that a window is known by
        _, target_nL = batch_of(data, self.first_n, self.last_n, L, self.is_target)
        self.n_reads = (target_nL != 0).sum(1)

    def prompts(self, r: Ranker, number_n: np.ndarray) -> list[WindowPrompt]:
        """The windows of some numbers as prompts of a ranker."""
        batch, last_n = [], self.last_n[number_n]
        table_n = table_of(r.lm, users(r.data, last_n))
        seq_nL, target_nL = batch_of(
            r.data, self.first_n[number_n], last_n, r.history, self.is_target
        )
        shown = of_padded(seq_nL)
        tails, ats = r.prompts.histories(shown)
        targets = Ragged(target_nL[seq_nL > 0], shown.ptr)
        tails = carrying(r.lm, in_tables(r.lm, tails, table_n), ats, last_n)
        windows = zip(number_n, last_n, table_n, targets, tails, ats)
        for number, end, table, target, tail, at in windows:
            must_fit(len(at), len(target))
            # a vector's state predicts the vector after it; the last one's is read at the mask
            inner = np.flatnonzero(target[:-1])
            place = end + 1 - len(target) + np.append(len(target) - 1, inner)
            item, table_m = r.data.items[place].astype(np.int64), np.full(len(place), table)
            batch.append(WindowPrompt(tail, at[inner + 1], place, item, table_m, int(number)))
        return batch


def draw_windows(data: Data, L: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and last target (places in data.items) of n windows of L items: every training
    target once an epoch, the windows cut anew in each.
    """
    first, last, epoch = [], [], 0
    while sum(map(len, first)) < n:
        rng = np.random.default_rng([seed, epoch])
        first_e, last_e = runs_of_targets(data, L, rng)
        order = rng.permutation(len(first_e))
        first.append(first_e[order])
        last.append(last_e[order])
        epoch += 1
    return np.concatenate(first)[:n], np.concatenate(last)[:n]


def must_fit(shown: int, n: int) -> None:
    """Stops where a prompt shows fewer items of a window than it has."""
    if shown < n:
        stop(
            f"a window of {n} items does not fit the prompt, {shown} do; raise --max-tokens or "
            "lower --history"
        )


def targets_of(batch: list[WindowPrompt], key: str = "target") -> np.ndarray:
    """The targets (or places, tables) of windows in the order of read_examples: masks first."""
    at_masks = [getattr(e, key)[0] for e in batch]
    others = [getattr(e, key)[1:] for e in batch]
    return np.concatenate([at_masks, *others]).astype(np.int64)


class ByVectors:
    """Each next item of a window among all I, scored by its vector (E4SRec)."""

    def __init__(
        self, r: Ranker, ensemble: Ensemble | None, kept: KeptLists | None, r_drop: float = 0
    ):
        """ensemble: who shares the loss with the next item; kept: the lists that are asked for
        beside it; r_drop: the weight of two passes being alike."""
        self.r, self.r_drop = r, r_drop
        self.ensemble, self.kept = ensemble, kept

    def losses(self, batch: list[WindowPrompt]) -> dict[str, torch.Tensor]:
        """The parts of the loss as sums over the targets of a batch."""
        scores, parts = partial(self.scores, batch), partial(self.parts, batch=batch)
        return twice.losses(scores, parts, self.r_drop) if self.r_drop else parts(scores())

    def scores(self, batch: list[WindowPrompt]) -> torch.Tensor:
        """The scores of all items (N, I) at the reads of a batch, by a pass of the LM."""
        r = self.r
        x_ND = read_examples(r.lm, read_prefix(r.lm, r.prompts.prefix, r.P, r.cache), batch)
        return self.scores_from(item_space(r.lm, x_ND), batch)

    def parts(self, s_NI: torch.Tensor, batch: list[WindowPrompt]) -> dict[str, torch.Tensor]:
        """The parts of the loss from the scores of a pass."""
        losses = {"candidates": self.cross_entropy(s_NI, batch)}
        if self.ensemble:
            losses = self.ensemble.losses(losses["candidates"], s_NI, targets_of(batch, "place"))
        return losses | self.kept.losses(s_NI, batch) if self.kept else losses

    def loss_from(self, e_NE: torch.Tensor, batch: list[WindowPrompt]) -> torch.Tensor:
        """L_ce from e = W_out x."""
        return self.cross_entropy(self.scores_from(e_NE, batch), batch)

    def cross_entropy(self, s_NI: torch.Tensor, batch: list[WindowPrompt]) -> torch.Tensor:
        """L_ce = - log softmax over all items of their scores s."""
        target_N = torch.as_tensor(targets_of(batch), device=s_NI.device)
        return F.cross_entropy(s_NI, target_N - 1, reduction="sum")

    def scores_from(self, e_NE: torch.Tensor, batch: list[WindowPrompt]) -> torch.Tensor:
        """E W_out x, the scores of all items (N, I), added to the backbone's with --residual. e_NE:
        W_out x."""
        lm, table_N, place_N = self.r.lm, targets_of(batch, "table"), targets_of(batch, "place")
        u_NE = told(lm, place_N, table_N)
        s_NI = scores_in_tables(lm, with_backbone_state(lm, e_NE, u_NE), table_N)
        if u_NE is None or lm.items.residual.counts is None:
            return s_NI
        with torch.no_grad():
            y_NI = scores_in_tables(lm, u_NE, table_N)
            z_xNI = lm.items.residual.counts.of_reads(place_N)
        # what counts add to y, which s holds
        added_NI = beside(y_NI, z_xNI, weights_of(lm)) - y_NI
        return s_NI + lm.items.maps[WEIGHT].weight * added_NI
