"""Histories that nobody has, for stage 1 on item vectors (distill.py --augment; ours).

Recommendation Pattern Simulating asks what the backbone would show, not what a user did next. So
any history can be asked about, and there are more than users have: parts of theirs, two of theirs
in one, or theirs as the backbone itself would go on with them. All come from what users did up to
their last training target. The backbone is another part of the house, so whoever trains gives what
makes its scores (backbone/ranking.py).

Names: N reads, L items of a window, I items, h items of a list.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import Data, users
from delrec.lm import items
from delrec.lm.ragged import ragged
from delrec.lm.ranker import Ranker, asking
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.residual import ROWS, BackboneScores
from delrec.lm.rps import listwise, soft_target
from delrec.lm.windows import must_fit
from delrec.runtime import stop

WAYS = ("crop", "drop", "splice", "walk")  # of --augment all, in turn
SHORTEST = 3  # items of a crop
DROPPED = 0.2  # share of the items that drop leaves out


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --augment and --soft: [(is it so?, sentence)]."""
    return [
        (
            cfg.augment and cfg.input != "ids",
            f"--augment makes windows of items, --input is {cfg.input}; use --input ids, or leave "
            "--augment out",
        ),
        (
            cfg.augment and cfg.tasks == "ta",
            "--augment makes histories for RPS, --tasks is ta; use --tasks both or rps, or leave "
            "--augment out",
        ),
        (
            cfg.augment and cfg.without_fold,
            "--augment asks the full model, which has learnt from the users of --without-fold; "
            "leave one of them out",
        ),
        (
            cfg.soft and not cfg.augment,
            "--soft needs the backbone's scores of all items, and stored lists hold none; add "
            "--augment all, or leave --soft out",
        ),
    ]


def said(cfg: SimpleNamespace, backbone_run: Path) -> str:
    """What RPS learns from, as a line."""
    what = "drawn items" if cfg.augment == "random" else f"what users did ({cfg.augment})"
    return f"{backbone_run}: the full model answers histories that nobody has, made of {what}"


# ---------------------------------------------------------------- histories


@dataclass
class MadeWindow:
    """A history as a prompt that is read after every item of it."""

    tail: np.ndarray  # tokens behind the prefix
    at: np.ndarray  # places in it of the vectors whose predecessors are read besides the mask
    items: np.ndarray  # oldest first, int64

    @property
    def target(self) -> np.ndarray:
        """One entry for each read."""
        return self.items


class MadeWindows:
    """Windows of at most L items that nobody has. Each belongs to its number, and is the same
    whoever asks for it."""

    def __init__(
        self, cfg: SimpleNamespace, data: Data, known: np.ndarray, backbone: BackboneScores
    ):
        """known: the training samples (places in data.train) of whose users histories are made.
        cfg: augment, history, h, seed."""
        self.data, self.backbone = data, backbone
        self.L, self.seed = cfg.history, cfg.seed
        self.ways = WAYS if cfg.augment == "all" else (cfg.augment,)
        places = np.sort(np.asarray(data.train)[known])
        user_U, targets_U = np.unique(users(data, places), return_counts=True)
        # a user's items up to the last training target: what comes later is never shown
        first_U, last_U = data.ptr[user_U], places[np.cumsum(targets_U) - 1]
        length_U = last_U - first_U + 1
        # once for each window that the user's targets fill
        windows_U = np.where(length_U >= SHORTEST, -(-targets_U // cfg.history), 0)
        self.first_n, self.length_n = (np.repeat(x, windows_U) for x in (first_U, length_U))
        if not len(self.first_n) or cfg.history < SHORTEST:
            stop(
                f"--augment makes histories of stretches of {SHORTEST} items, but no user of "
                f"{data.name} has as many in training, or --history {cfg.history} shows fewer; "
                "leave it out"
            )
        if data.n_items < cfg.history + cfg.h:
            stop(
                f"--augment needs {cfg.h} items to list after {cfg.history} others, the catalogue "
                f"has {data.n_items}; lower --h or --history"
            )

    def prompts(self, r: Ranker, which: np.ndarray) -> list[MadeWindow]:
        """The windows of some numbers as prompts of a ranker."""
        made = self.histories(which)
        batch = []
        for old, tail, at in zip(made, *r.prompts.histories(ragged(made))):
            must_fit(len(at), len(old))
            batch.append(MadeWindow(tail, at[1:], old))
        return batch

    def histories(self, which: np.ndarray) -> list[np.ndarray]:
        """The histories of some numbers, int64, oldest first."""
        made, walks = [], []
        for i, number in enumerate(which.tolist()):
            rng, way = np.random.default_rng([self.seed, 7, number]), number % len(self.ways)
            whole = self.stretch(rng)
            if self.ways[way] == "walk":
                walks.append((i, len(whole), rng))
                made.append(whole[: len(whole) - len(whole) // 2])
            else:
                made.append(getattr(self, self.ways[way])(whole, rng))
        self.walk(made, walks)
        return made

    def stretch(self, rng: np.random.Generator) -> np.ndarray:
        """At most L items that followed one another, of a user who is drawn as often as windows
        are cut from what the user did."""
        n = rng.integers(len(self.length_n))
        length = min(self.L, int(self.length_n[n]))
        first = self.first_n[n] + rng.integers(self.length_n[n] - length + 1)
        return self.data.items[first : first + length].astype(np.int64)

    def crop(self, whole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A part of a stretch, of at least 3 items."""
        n = rng.integers(SHORTEST, len(whole) + 1)
        first = rng.integers(len(whole) - n + 1)
        return whole[first : first + n]

    def drop(self, whole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A stretch without each of its items with probability .2; three stay."""
        luck = rng.random(len(whole))
        return whole[luck >= min(DROPPED, np.sort(luck)[-SHORTEST])]

    def splice(self, whole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The first half of a stretch and the second half of another, no item twice."""
        first, other = whole[: len(whole) // 2], self.stretch(rng)
        second = other[len(other) // 2 :]
        return np.concatenate([first, second[~np.isin(second, first)]])

    def random(self, whole: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """As many items as a stretch has, uniform: the control."""
        return rng.choice(self.data.n_items, len(whole), replace=False) + 1

    def walk(self, made: list[np.ndarray], walks: list[tuple]) -> None:
        """Lets the backbone go on with some of the histories: the next item is drawn from
        P(i) = softmax(y)_i over the items that are not in it, until it is as long as its stretch.
        walks: (place in `made`, that length, generator)."""
        while walks := [walk for walk in walks if len(made[walk[0]]) < walk[1]]:
            y_BI = scores_of_new(self.backbone, [made[i] for i, *_ in walks]).double().cpu().numpy()
            for y_I, (i, _, rng) in zip(y_BI, walks):
                # the largest of y + Gumbel noise is a draw from softmax(y)
                drawn = 1 + (y_I + rng.gumbel(size=len(y_I))).argmax()
                made[i] = np.append(made[i], drawn)


# ---------------------------------------------------------------- what the backbone says of them


def scores_of_new(backbone: BackboneScores, olds: list[np.ndarray]) -> torch.Tensor:
    """y, a backbone's scores of the items 1..I after histories: (N, I), -inf for those that a
    history holds, as in its lists."""
    parts = [backbone.scores(olds[i : i + ROWS]) for i in range(0, len(olds), ROWS)]
    y_NI = torch.cat(parts).clone()  # what autograd may keep
    row_M = np.repeat(np.arange(len(olds)), [len(old) for old in olds])
    y_NI[torch.as_tensor(row_M), torch.as_tensor(np.concatenate(olds))] = -torch.inf
    return y_NI[:, 1:]


def before_reads(windows: list[MadeWindow]) -> list[np.ndarray]:
    """The history that each read has seen, in the order of read_examples: whole ones first."""
    whole = [w.items for w in windows]
    return whole + [old[:n] for old in whole for n in range(1, len(old))]


class Answered:
    """RPS on made windows: what the backbone says after every item."""

    def __init__(self, r: Ranker, backbone: BackboneScores, cfg: SimpleNamespace):
        """cfg: h, soft."""
        self.r, self.backbone = asking(r, "rps"), backbone
        self.h, self.T = cfg.h, cfg.soft

    def reads(self, windows: list[MadeWindow]) -> int:
        """The number that the sum of the losses is divided by."""
        return sum(len(w.items) for w in windows)

    def loss(self, windows: list[MadeWindow]) -> torch.Tensor:
        """L_RPS as a sum, from E W_out x: Plackett-Luce of the backbone's best h, or with --soft
        the KL from its softened scores."""
        r = self.r
        x_ND = read_examples(r.lm, read_prefix(r.lm, r.prompts.prefix, r.P, r.cache), windows)
        # The full model's answers: it was trained with no target after such a history. (Only what
        # followed inside a crop, a drop, or the half of a splice was a target after a longer one.)
        y_NI = scores_of_new(self.backbone, before_reads(windows))
        e_NE = items.item_space(r.lm, x_ND)
        s_NI = items.scores_in_tables(r.lm, e_NE, np.zeros(len(e_NE), np.int64))
        if self.T:
            return soft_target(s_NI, y_NI, self.T).sum()
        return listwise(s_NI, y_NI.topk(self.h).indices + 1).sum()
