"""What a conventional model trains on: windows with a target behind each place, and negatives.

Names: B sequences, L window, I items (ids 1..I, 0 pads on the left).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from types import SimpleNamespace

import numpy as np
import torch

from delrec.backbone import dllm2rec
from delrec.backbone.bert4rec import hide
from delrec.backbone.models import ALL
from delrec.data.prepared import Data, batch_of, runs_of_targets, users
from delrec.processes import Ranks

# an epoch of a small log is a few steps: it has more of them, and waits longer
LEAST_STEPS, LEAST_WAIT = 1000, 150


@dataclass
class Batch:
    """Windows of one step, of all processes."""

    seq_BL: np.ndarray  # items, 0 pads on the left, MASK where one is hidden (BERT4Rec)
    target_BL: np.ndarray  # the item after each position (or hidden there), 0 where none is asked
    negative: np.ndarray | None  # of --loss bce and of KDA (B, L), of sampled and gbce (n,)
    last_B: np.ndarray  # the place of each window's last target in data.items

    @property
    def n_targets(self) -> int:
        """How many targets there are."""
        return int(np.count_nonzero(self.target_BL))

    def of(self, ranks: Ranks) -> list[torch.Tensor | None]:
        """(items, targets, negatives or None) of this process' rows as tensors; columns of nothing
        but padding are cut off."""
        L = (self.seq_BL != 0).any(0).sum()

        def mine(rows):
            if rows is None:
                return None
            own = rows[ranks.rank :: ranks.world, -L:] if rows.ndim == 2 else rows
            return torch.from_numpy(own).to(ranks.device)

        return [mine(rows) for rows in (self.seq_BL, self.target_BL, self.negative)]


def steps_of_epoch(cfg: SimpleNamespace, data: Data) -> int:
    """How many batches the windows of an epoch fill, at least one."""
    first, _ = runs_of_targets(data, span_of(cfg), np.random.default_rng(0))
    return max(ceil(len(first) / cfg.batch), 1)


def lengthen(cfg: SimpleNamespace, asked: dict[str, int | None], data: Data) -> None:
    """Raises epochs and patience, where nobody asked for others, until they make LEAST_STEPS and
    LEAST_WAIT steps of the optimiser.

    After five epochs of five steps a GRU4Rec still ranked below chance, and was stopped.
    """
    n_steps = steps_of_epoch(cfg, data)
    for key, least in (("epochs", LEAST_STEPS), ("patience", LEAST_WAIT)):
        if asked[key] is None and cfg.epochs:  # without any the model is not trained at all
            setattr(cfg, key, max(getattr(cfg, key), ceil(least / n_steps)))


def span_of(cfg: SimpleNamespace) -> int:
    """How many targets a window may have: one where a model has one state a window, or --one-target
    was given."""
    return 1 if ALL[cfg.model].one_state or cfg.one_target else cfg.history


class Targets:
    """Every training target once an epoch, in windows that are cut anew in each. For a model of
    hidden items the same windows, in which each epoch hides others."""

    def __init__(self, cfg: SimpleNamespace, data: Data):
        self.cfg, self.data = cfg, data
        self.is_target = np.zeros(len(data.items), bool)
        self.is_target[data.train] = True
        # with a user's first item, which is input only
        have = np.union1d(data.train, np.asarray(data.ptr)[:-1])
        self.seen = np.unique(users(data, have) * (data.n_items + 1) + data.items[have])
        self.span = span_of(cfg)

    def epoch(self, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The batches of an epoch: pairs of the windows' first and last targets."""
        rng = np.random.default_rng([self.cfg.seed, epoch])
        first, last = runs_of_targets(self.data, self.span, rng)
        order = rng.permutation(len(first))
        starts = range(0, len(order), self.cfg.batch)
        rows = [order[i : i + self.cfg.batch] for i in starts]
        return [(first[at], last[at]) for at in rows]

    def batch(self, first: np.ndarray, last: np.ndarray, epoch: int, step: int) -> Batch:
        """The windows of a step."""
        cfg, data, negative = self.cfg, self.data, None
        seq_BL, target_BL = batch_of(data, first, last, cfg.history, self.is_target)
        rng = np.random.default_rng([cfg.seed, epoch, step])
        if ALL[cfg.model].cloze:
            seq_BL, target_BL = hide(seq_BL, target_BL, rng)
        if cfg.loss in ("bce", "bpr"):
            negative = negatives(data, first, target_BL, self.seen, rng)
        elif cfg.loss in ("sampled", "gbce"):
            negative = rng.integers(1, data.n_items + 1, cfg.negatives)
        return Batch(seq_BL, target_BL, negative, last)

    def taught_by(
        self, teacher: dllm2rec.Teacher, batch: Batch, epoch: int, step: int, ranks: Ranks
    ) -> Callable:
        """What loss_of adds of a teacher, whose unlisted items are drawn like negatives."""
        rng = np.random.default_rng([self.cfg.seed, epoch, step, 1])
        unlisted_BL = negatives(self.data, batch.last_B, batch.target_BL, self.seen, rng)
        return teacher.term(batch.last_B, batch.target_BL, unlisted_BL, ranks)


def negatives(
    data: Data, first: np.ndarray, target_BL: np.ndarray, seen: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """One item per target (B, L), uniform over those the user has not in the training part.

    `seen`: sorted user * (I+1) + item.
    """
    user_BL = np.broadcast_to(users(data, first)[:, None], target_BL.shape)
    item_BL = rng.integers(1, data.n_items + 1, target_BL.shape)
    # a user who has nearly everything keeps what the last draw gave
    for _ in range(20):
        key_BL = user_BL * (data.n_items + 1) + item_BL
        bad_BL = seen[np.minimum(np.searchsorted(seen, key_BL), len(seen) - 1)] == key_BL
        if not bad_BL.any():
            break
        item_BL[bad_BL] = rng.integers(1, data.n_items + 1, int(bad_BL.sum()))
    return item_BL
