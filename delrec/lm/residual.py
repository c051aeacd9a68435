"""Stage 2 on top of the backbone (--residual): what the LM says is added to what the backbone says.

    s_BI = E (W_out h_B + b_out) + g y_BI,    y_BI = x_B . e_I + b_I

(--input ids; offsets.py has the same for titles)

h is the LM's state, x the backbone's, y the backbone's scores. W_out and b_out begin at 0 and g,
one number that trains, at 1: the run begins as its backbone, and learns what that lacks.

In training y is E_f u, up to one number a row that a softmax does not see: u = (nbar x, sd), E_f
the item vectors that the LM is shown (items.py), nbar the mean norm of the backbone's own, sd the
deviation of its biases. x is then the state of a model that has not seen the user
(backbone/folds.py). The full model knows the answers to its training samples, and an LM that is
told them learns to be silent.

With --residual-counts co-occurrence and title similarity join y (counted.py).

At scoring the backbone itself is asked, of which the run's folder holds a copy. It is another part
of the house, so whoever opens a run gives what makes its scores (backbone/ranking.py).

Names: B prompts, N reads, n training samples, K folds, I items, E width of the item vectors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from delrec.data.others import history_of_another, rows_of_others
from delrec.data.prepared import Data, histories, shuffled, users, with_lists
from delrec.data.unseen import Unseen
from delrec.files import replacing
from delrec.lm import counted
from delrec.lm.counted import Counts
from delrec.lm.lists import so_that_it_has_folds
from delrec.places import BACKBONE
from delrec.runtime import Run, load_run, read_json, read_npy, stop, write_json

if TYPE_CHECKING:
    from delrec.lm.items import Folds
    from delrec.lm.model import LM

# of a backbone's configuration: what its model is made of
KEPT = ("stage", "model", "loss", "history", "width", "dropout", "n_items", "dataset", "data_hash")
STATELESS = ("kda",)  # models that read a history through each candidate
WEIGHT = "residual"  # the name of g among the maps
OWN = "verbalizer"  # that of a, what the scores of titles are multiplied with (offsets.py)
ROWS = 512  # histories that the backbone is asked at a time
# Set where nobody typed it: Lion moves every number by its rate, and at the maps' usual rate W_out
# drowns the backbone in a few steps. With titles it is two numbers that have a way to go.
RATES = {"ids": 1e-5, "titles": 1e-2, "hybrid": 1e-2}


class BackboneScores(Protocol):
    """The scores of a backbone after any history."""

    history: int  # items of a history that it sees

    def scores(self, olds: list[np.ndarray], /) -> torch.Tensor:
        """y (B, I+1) after histories, oldest first; -inf for the padding item."""

    def states(self, olds: list[np.ndarray], /) -> torch.Tensor:
        """x (B, E) after histories, oldest first."""

    def on(self, device: torch.device, /) -> BackboneScores:
        """These scores, computed there."""

    def with_items(self, unseen: Unseen, /) -> BackboneScores:
        """These scores with items behind the trained ones."""


# what makes the scores of a backbone's run (delrec.backbone.ranking.history_scorer)
ScoresOf = Callable[[Run], BackboneScores]
Olds = Sequence[np.ndarray] | None  # whole histories, oldest first; None where no backbone is asked


@dataclass
class Residual:
    """What an LM's scores are added to."""

    backbone: BackboneScores
    folder: Path  # the backbone's
    data: Data
    permuted: bool = False  # the control: what it says after somebody else's history
    states: FoldStates | None = None  # of training samples, while the run trains
    counts: Counts | None = None  # what joins y (counted.py)

    @property
    def history(self) -> int:
        """Items of a history that are seen."""
        return max(self.backbone.history, counted.LAST if self.counts else 0)

    def scores(self, olds: list[np.ndarray]) -> torch.Tensor:
        """y (B, I+1) after histories, oldest first."""
        return self.backbone.scores(self.meant(olds))

    def after(self, olds: list[np.ndarray]) -> torch.Tensor:
        """x (B, E) after histories, oldest first."""
        return self.backbone.states(self.meant(olds))

    def meant(self, olds: list[np.ndarray]) -> list[np.ndarray]:
        """The histories that the backbone is asked about, as it sees them."""
        olds = [old[-self.backbone.history :] for old in olds]
        return [self.of_another(old) for old in olds] if self.permuted else olds

    def of_another(self, old: np.ndarray) -> np.ndarray:
        """The history of another user's training sample, which the given one draws."""
        if not len(self.data.train):
            stop(
                "a run of finetune.py --residual permuted or distill.py --user-states permuted "
                "answers by histories of the log, which is not here; give its prepared data, or "
                "share a run that keeps to its own"
            )
        return history_of_another(self.data, old, self.backbone.history)


@dataclass
class FoldStates:
    """The backbone's states of training samples, each of the model that has not seen its user."""

    x_nE: np.ndarray  # fp16, memory-mapped; turned as the folds' item vectors are
    row_n: np.ndarray  # the row that a sample reads: its own, or with permuted another user's
    places_n: np.ndarray  # of the samples in data.items, sorted
    scale_K2: torch.Tensor  # (nbar, sd) of each fold
    dropout: float  # share of the reads that are told nothing

    def u(self, place_N: np.ndarray, table_N: np.ndarray) -> torch.Tensor:
        """u fp32 (N, E+1) of reads, by the places of their targets in data.items and the tables of
        item vectors that they are looked up in (items.Folds)."""
        row_N = self.row_n[np.searchsorted(self.places_n, place_N)]
        x_NE = torch.from_numpy(self.x_nE[row_N].astype(np.float32))
        nbar_N1, sd_N1 = self.scale_K2[table_N - 1].split(1, 1)
        u_NE = torch.cat([nbar_N1 * x_NE, sd_N1], 1)
        if self.dropout:  # by the generator that seed_dropout has seeded
            u_NE = u_NE * (torch.rand(len(u_NE), 1) >= self.dropout)
        return u_NE


def defaults(cfg: SimpleNamespace) -> dict:
    """What is set where nobody typed it."""
    return {"lr_residual": RATES[cfg.input]} if cfg.residual else {}


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --residual: [(is it so?, sentence)]."""
    return [
        (
            cfg.residual and cfg.loss != "candidates",
            f"--residual adds the backbone's scores of the candidates, --loss {cfg.loss} asks for "
            "others; leave one of them out",
        ),
        (
            cfg.residual_counts and cfg.input != "ids",
            f"--residual-counts adds to what vectors score, --input is {cfg.input}; leave one of "
            "them out",
        ),
        (
            cfg.residual and cfg.teacher,
            "--residual and --teacher both say what the LM's scores are held to; leave one of them "
            "out",
        ),
        (
            cfg.residual and cfg.permute_vectors,
            "--permute-vectors moves the item vectors that --residual scores by; use --residual "
            "permuted, or leave one of them out",
        ),
        (
            cfg.residual and cfg.lambda_ms,
            "--lambda-ms asks inner blocks for scores, by maps that begin at random, and with "
            "--residual they would move how much its backbone counts; leave one of them out",
        ),
        (
            cfg.residual_dropout and not cfg.residual,
            "--residual-dropout leaves out what --residual adds; add --residual backbone, or leave "
            "it out",
        ),
        (
            cfg.lr_residual and not cfg.residual,
            "--lr-residual is the rate of what --residual adds; add --residual backbone, or leave "
            "it out",
        ),
        (
            cfg.residual_counts and not cfg.residual,
            "--residual-counts adds to what --residual adds; add --residual backbone, or leave it "
            "out",
        ),
    ]


# ---------------------------------------------------------------- training


def add_backbone(
    lm: LM, cfg: SimpleNamespace, data: Data, place: Path, scores_of: ScoresOf
) -> None:
    """From now on the scores of `lm`, which has items, are added to those of the backbone in the
    folder `place`, which they begin as. cfg: residual, residual_dropout, residual_counts,
    val_samples, C, seed."""
    items = lm.items
    with torch.no_grad():
        items.maps["out"].weight.zero_()
        items.maps["out"].bias.zero_()
    items.maps[WEIGHT] = weight().to(lm.device)
    permuted = cfg.residual == "permuted"
    states = fold_states(cfg, data, place, items.folds)
    backbone = scores_of(load_run(place, data)).on(lm.device)
    own = Residual(backbone, place, data, permuted, states)
    if cfg.residual_counts:
        own.counts = counted.counts_of(data, lm.device, items.folds.fold_U)
        items.maps[counted.MAP] = counted.first_weights(own.counts, own, cfg).to(lm.device)
    lm.set_items(replace(items, residual=own))


def weight() -> torch.nn.Linear:
    """g, which begins at 1."""
    g = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(g.weight)
    return g


def scales(e_IE: torch.Tensor, b_I: torch.Tensor) -> torch.Tensor:
    """(nbar, sd): the mean norm of the items' vectors, and the deviation of their biases."""
    return torch.stack([e_IE[1:].norm(dim=1).mean(), b_I[1:].std().clamp(min=1e-6)])


def stop_without_folds(place: Path, flag: str = "--residual") -> None:
    """Stops at a backbone that has not answered out of fold. flag: what needs that."""
    config = place / "config.json"
    if config.exists() and read_json(config).get("model") in STATELESS:
        stop(f"{flag} needs a state of each history, {place} is of a model without; name another")
    for name in ("folds.safetensors", "states_train.npy"):
        if not (place / name).exists():
            stop(
                f"{flag} needs a backbone that answered its training samples out of fold, but "
                f"{place} lacks {name}; {so_that_it_has_folds(place)}"
            )


def fold_states(cfg: SimpleNamespace, data: Data, place: Path, folds: Folds) -> FoldStates:
    """The states that a backbone's run folder holds. folds: its item vectors (items.Folds)."""
    x_nE = read_npy(place / "states_train.npy", (len(data.train), None))
    row_n = np.arange(len(data.train))
    if cfg.residual == "permuted":
        listed = with_lists(place, data)
        user_n = users(data, data.train[listed])
        fold_n = folds.fold_U[user_n]
        for fold in np.unique(fold_n):  # in another fold's space a state means nothing
            own = fold_n == fold
            row_n[listed[own]] = listed[own][rows_of_others(user_n[own], cfg.seed)]
    return FoldStates(x_nE, row_n, np.asarray(data.train), folds.scale_K2, cfg.residual_dropout)


def told(lm: LM, place_N: np.ndarray, table_N: np.ndarray) -> torch.Tensor | None:
    """u (N, E+1) of training reads; None where there is no backbone to add to."""
    if lm.items.residual is None:
        return None
    return lm.items.residual.states.u(place_N, table_N).to(lm.device)


def with_backbone_state(lm: LM, e_NE: torch.Tensor, u_NE: torch.Tensor | None) -> torch.Tensor:
    """W_out h + g u, what the item vectors are multiplied with, of training reads; e_NE: W_out h;
    u: what they are told."""
    return e_NE if u_NE is None else e_NE + lm.items.maps[WEIGHT].weight * u_NE


# ---------------------------------------------------------------- scoring


def residual_of(lm: LM) -> Residual | None:
    """What an LM's scores are added to, or None."""
    if lm.offset is not None:
        return lm.offset.asked
    return lm.items.residual if lm.items is not None else None


def parts_of(lm: LM) -> tuple[torch.Tensor | float, torch.Tensor]:
    """(a, g): what the LM's scores and its backbone's are multiplied with; a is 1 for vectors."""
    if lm.offset is not None:
        return lm.offset.maps[OWN].weight, lm.offset.maps[WEIGHT].weight
    return 1.0, lm.items.maps[WEIGHT].weight


def histories_of(lm: LM, data: Data, samples: np.ndarray, mixed: bool) -> Olds:
    """The histories of samples (places in data.items) as the LM's backbone sees them, oldest first;
    None where it has none. mixed: in a random order."""
    own, carried = residual_of(lm), lm.items.users if lm.items is not None else None
    if own is None and carried is None:
        return None
    if mixed and carried is not None:
        stop(
            "evaluate.py --shuffle-history shows a history in an order that it never had, and its "
            "items carry the states of the one it had (distill.py --user-states); leave it out"
        )
    seen = [own.history] if own else []
    old_nL = histories(data, samples, max(seen + ([carried.history] if carried else [])))
    old_nL = shuffled(old_nL, samples) if mixed else old_nL
    return [old[old > 0] for old in old_nL]


def weights_of(lm: LM) -> torch.Tensor | None:
    """The weights of counts (2,), as they are now; None without --residual-counts."""
    if residual_of(lm).counts is None:
        return None
    return lm.items.maps[counted.MAP].weight[0]


def told_of_weights(lm: LM) -> dict:
    """What config.json says of how much is added to what the LM says."""
    a, g = parts_of(lm)
    found = {"residual_weight": round(g.item(), 4)}
    if lm.offset is not None:
        found["verbalizer_weight"] = round(a.item(), 4)
    if residual_of(lm).counts:
        found["counts_weights"] = [round(g, 4) for g in weights_of(lm).tolist()]
    return found


def with_backbone_scores(lm: LM, s_BI: torch.Tensor, olds: Olds) -> torch.Tensor:
    """a times the LM's scores s (B, I+1) and g times its backbone's after histories; s itself where
    it has none."""
    own = residual_of(lm)
    if own is None:
        return s_BI
    olds = list(olds)
    y_BI = own.scores(olds)
    if own.counts:
        y_BI = own.counts.beside_all(y_BI, olds, weights_of(lm))
    a, g = parts_of(lm)
    return a * s_BI + g * y_BI


@torch.no_grad()
def with_backbone_scores_of_candidates(
    lm: LM, score_nC: np.ndarray, olds: Olds, cand_nC: np.ndarray, among_all: bool = False
) -> np.ndarray:
    """a times the LM's scores (n, C) of some candidates and g times its backbone's after histories;
    the LM's alone where it has none. among_all: they hold the backbone's already, as all items have
    them, and counts are standardised among the candidates instead."""
    own, found = residual_of(lm), [np.zeros((0, cand_nC.shape[1]), np.float32)]
    if own is None or among_all and own.counts is None:
        return score_nC
    (a, g), g_x = parts_of(lm), weights_of(lm)
    for i in range(0, len(cand_nC), ROWS):
        some, cand_BC = olds[i : i + ROWS], cand_nC[i : i + ROWS]
        y_BI = own.scores(some)
        at_BC = torch.from_numpy(cand_BC).to(y_BI.device)
        f_BC = y_BC = y_BI.gather(1, at_BC)
        if own.counts:
            f_BC = own.counts.beside_candidates(y_BC, some, cand_BC, g_x)
        if among_all:
            f_BC = f_BC - own.counts.beside_all(y_BI, some, g_x).gather(1, at_BC)
        found.append((g * f_BC).cpu().numpy())
    return np.float32(float(a)) * score_nC + np.concatenate(found)


# ---------------------------------------------------------------- run folders


def keep_backbone(source: Path, run_folder: Path) -> Path:
    """Where the backbone of a run stands now, inside the run's folder: its weights, and what they
    are."""
    place, config = run_folder / BACKBONE, read_json(source / "config.json")
    place.mkdir(exist_ok=True)
    with replacing(place / "model.safetensors") as new:
        shutil.copyfile(source / "model.safetensors", new)
    write_json(place / "config.json", {key: config[key] for key in KEPT if key in config})
    return place


def asked_by(lm: LM, run: Run, data: Data, scores_of: ScoresOf | None) -> Residual | None:
    """The backbone in the folder of a finished run of --residual; None for another run. lm: opened
    with the run's items."""
    if not getattr(run, "residual", None):
        return None
    if scores_of is None:
        raise ValueError(f"{run.folder} adds a backbone's scores: open it with what makes them")
    own = load_run(run.folder / BACKBONE, data, stages=["train_backbone"])
    found = Residual(scores_of(own).on(lm.device), own.folder, data, run.residual == "permuted")
    if getattr(run, "residual_counts", False):
        if counted.MAP not in lm.items.maps:
            stop(f"{run.folder}/items.safetensors lacks the weights of counts; train it again")
        if data.shared is not None:
            stop(
                f"{run.folder} counts in the log, which is not here; give its prepared data, or "
                "share a run of finetune.py without --residual-counts"
            )
        found.counts = counted.counts_of(data, lm.device)
    return found
