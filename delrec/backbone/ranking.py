"""A conventional model's ranks, lists and scores: of whole splits, and after any history."""

import copy

import numpy as np
import torch

from delrec.backbone import by_title
from delrec.backbone.models import TITLED, Grown, load, score_from, scores_of, state
from delrec.data.prepared import Data, histories, users
from delrec.data.unseen import Unseen
from delrec.processes import Ranks, gather_rows
from delrec.runtime import Run, stop


@torch.no_grad()
def rank_all(
    model: torch.nn.Module,
    data: Data,
    samples: np.ndarray,
    ranks: Ranks,
    h: int = 0,
    cand: dict[int, np.ndarray] | None = None,
    states: bool = False,
) -> dict:
    """What the model says of some samples, by scoring the catalogue once for each:

    full (n, 2) = (greater, equal), how many items score above and equal to the target; list (n, h),
    its best items; for each C of cand {C: (n, C)} the scores (n, C) of those candidates; and with
    states the state (n, E) that the scores were made of. All earlier items of the user are masked
    in list and full; in full the target is not, even where the user had it before. Samples are
    taken by length of history (no padding beyond the batch's own) and shared out over the ranks.
    """
    model.eval()
    states = states and not hasattr(model, "scores")  # it has none
    samples = np.asarray(samples)
    before = samples - np.asarray(data.ptr)[users(data, samples)]
    order = np.argsort(np.minimum(before, model.history), kind="stable")
    mine = order[ranks.rank :: ranks.world] if ranks.rank < len(order) else order[:1]
    rows = max(1, min(512, 2**24 // data.n_items))
    parts = {"full": [], "list": [], "state": [], **{C: [] for C in cand or ()}}

    def put(x):
        return torch.from_numpy(np.asarray(x, np.int64)).to(ranks.device)

    for i in range(0, len(mine), rows):
        at = mine[i : i + rows]
        x_BE = state(model, put(histories(data, samples[at], model.history)))
        if states:
            parts["state"].append(x_BE.cpu())
        score_BI = score_from(model, x_BE)
        target_B1 = put(data.items[samples[at]])[:, None]
        own_B1 = score_BI.gather(1, target_B1)
        if not torch.isfinite(own_B1).all():
            stop(
                "the model's scores are not finite; train it with a smaller train_backbone.py "
                "--lr; if you wrote the model, its forward may give NaN where a window is padded"
            )
        for C in cand or ():
            parts[C].append(score_BI.gather(1, put(cand[C][at])).cpu())
        row, old = earlier_items(data, samples[at], before[at])
        score_BI[put(row), put(old)] = -torch.inf
        if h:
            parts["list"].append(best_items(score_BI, h).cpu())
        score_BI.scatter_(1, target_B1, own_B1)
        parts["full"].append(places(score_BI, own_B1).cpu())
    whole = {
        k: gather_rows(torch.cat(v).numpy(), mine, len(samples), ranks)
        for k, v in parts.items()
        if v
    }
    return whole | {k: whole[k].astype(np.int32) for k in ("full", "list") if k in whole}


def places(score_BI: torch.Tensor, own_B1: torch.Tensor) -> torch.Tensor:
    """(B, 2): how many items of a row score above its own, and how many others equal to it."""
    # torch sums 32-bit numbers five times as fast as the 64-bit ones that it would take by itself
    above_B = (score_BI > own_B1).sum(1, dtype=torch.int32)
    equal_B = (score_BI == own_B1).sum(1, dtype=torch.int32) - 1
    return torch.stack([above_B, equal_B], 1)


def earlier_items(
    data: Data, samples: np.ndarray, before: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The flat list of every (row, earlier item) of some samples, which have `before` of them."""
    place = np.arange(before.sum()) + np.repeat(samples - np.cumsum(before), before)
    return np.repeat(np.arange(len(samples)), before), data.items[place]


def best_items(score_BI: torch.Tensor, h: int) -> torch.Tensor:
    """The h best items (B, h) of each row, ties by the smaller id, 0 where a row has no more."""
    top_Bh = in_order(score_BI, h)
    return top_Bh.masked_fill(score_BI.gather(1, top_Bh) == -torch.inf, 0)


def in_order(score_BI: torch.Tensor, h: int) -> torch.Tensor:
    """The columns (B, h) of the h highest scores of each row, ties by the smaller one; those at
    -inf come last, in no set order."""
    # if the next score equals the last one kept, topk chose by chance
    best_BK, top_BK = score_BI.topk(min(h + 1, score_BI.shape[1]))
    top_Bh = top_BK[:, :h]
    if 0 < h < top_BK.shape[1]:
        last_B, next_B = best_BK[:, h - 1], best_BK[:, h]
        tied_B = (last_B == next_B) & (next_B > -torch.inf)
        top_Bh[tied_B] = best_by_id(score_BI[tied_B], h)
    top_Bh = top_Bh.sort(1).values
    own_Bh = score_BI.gather(1, top_Bh)
    return top_Bh.gather(1, own_Bh.argsort(dim=1, descending=True, stable=True))


def best_by_id(score_BI: torch.Tensor, h: int) -> torch.Tensor:
    """The h best items of each row, in any order. Of equal scores the smaller ids are kept.

    Score and id share one int64: the bits of a float sort like the float once those of negative
    ones are flipped.
    """
    bits_BI = (score_BI + 0.0).view(torch.int32).long()
    bits_BI = torch.where(bits_BI < 0, bits_BI ^ 0x7FFFFFFF, bits_BI)
    key_BI = (bits_BI << 32) - torch.arange(score_BI.shape[1], device=score_BI.device)
    return key_BI.topk(h).indices


# ---------------------------------------------------------------- scores after any history


class HistoryScorer:
    """A backbone's scores after any history."""

    def __init__(
        self,
        model: torch.nn.Module,
        bias_A: torch.Tensor | None = None,
        doubt: torch.Tensor | None = None,
    ):
        """bias_A: the biases of added items, whose vectors the model's table then holds (Grown);
        doubt: S (E+1, E+1), the covariance of what is not known of their vectors and biases."""
        self.model, self.bias_A, self.doubt = model, bias_A, doubt

    @property
    def history(self) -> int:
        """How many items of a history it sees, L."""
        return self.model.history

    def on(self, device: torch.device) -> "HistoryScorer":
        """This scorer, computed there; it must have no added items."""
        return HistoryScorer(self.model.to(device))

    def __call__(self, olds: list[np.ndarray]) -> np.ndarray:
        """Scores float32 (B, I+1) after histories, oldest first; padding at -inf. Those of added
        items stand behind; the others' are the same bits without them.
        """
        return self.scores(olds).float().cpu().numpy()

    @torch.inference_mode()
    def scores(self, olds: list[np.ndarray]) -> torch.Tensor:
        """Scores (B, I+1) after histories, as a tensor where the model is."""
        x_BE = self.states(olds)
        score_BI = score_from(self.model, x_BE)
        if self.bias_A is not None:
            score_BA = scores_of(self.model, x_BE, self.model.item.new_AE, self.bias_A)
            score_BI = torch.cat([score_BI, score_BA + self.lift(x_BE)], 1)
        return score_BI

    def lift(self, x_BE: torch.Tensor) -> torch.Tensor | float:
        """What doubt adds to the score of each added item (B, 1)."""
        return 0.0 if self.doubt is None else by_title.lift(x_BE, self.doubt)[:, None]

    @torch.inference_mode()
    def states(self, olds: list[np.ndarray]) -> torch.Tensor:
        """The states x (B, E) that those are made of."""
        L = self.model.history
        seq_BL = np.zeros((len(olds), L), np.int64)
        for seq_L, old in zip(seq_BL, olds):
            tail = old[-L:]
            seq_L[L - len(tail) :] = tail
        return state(self.model, torch.as_tensor(seq_BL))

    def with_items(self, unseen: Unseen) -> "HistoryScorer":
        """This scorer with items behind the trained ones."""
        model = copy.copy(self.model)
        model._modules = dict(self.model._modules)
        trained = model.item.weight.detach()
        table = torch.cat([trained, model.bias.detach()[:, None]], 1).cpu().numpy()
        rows, doubt = torch.from_numpy(unseen.rows(table)).to(trained.device), None
        if not isinstance(model, tuple(TITLED.values())):  # theirs are no softmax of x . e
            doubt = torch.from_numpy(unseen.doubt(table)).to(trained.device)
        model.item = Grown(model.item, rows[:, :-1].contiguous())
        return HistoryScorer(model, rows[:, -1].contiguous(), doubt)


def must_hold_model(run: Run) -> None:
    """Stops where a backbone's run holds what a model said, but not the model."""
    if not (run.folder / "model.safetensors").exists():
        stop(
            f"{run.folder} holds lists but no model.safetensors, so it cannot score a new history; "
            "bring its model, or train one with train_backbone.py"
        )


def history_scorer(run: Run) -> HistoryScorer:
    """The scores of a backbone's run after any history."""
    must_hold_model(run)
    return HistoryScorer(load(run.folder))
