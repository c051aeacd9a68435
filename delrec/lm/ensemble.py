"""Stage 2 taught by several conventional models at once (--kd): beside the next item the LM learns
what they say of all items.

    L = (1 - a) CE + a T^2 KL(p_T || p),    p = softmax(s / T)
    p_T = softmax(c z / T),    z = mean over teachers of (y - mean(y)) / sd(y)

s are the LM's scores of the I items, y a teacher's, mean and sd those of a row of y, and c the sd
of the best teacher: so one teacher at T = 1 says exactly what it says by itself. Of counts z is at
most 4: nearly all are 0, so the few others stand up to sqrt(I) out, and p_T would be one of them
whatever the other teachers say. An item of the history has probability 0, as in the teachers'
lists. The KL is between the S items that p_T holds most likely, each by itself, and all others
together. T^2 keeps the gradient's size as T grows.

A teacher that was trained on a sample knows its target, and p_T would be the next item again. So
each sample is answered by a model that has not seen its user (backbone/folds.py): its stored state
times that model's item vectors. Nothing is kept of what they say, a pass computes its own.

The idea is known (Hinton et al., arXiv 1503.02531; of recommenders HetComp, arXiv 2303.01130); this
form of it for an LM that ranks is ours.

Names: N reads, S items, I items in all, n training samples, K folds, E width of a teacher.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.others import rows_of_others
from delrec.data.prepared import Data, halves_of_validation, histories, users
from delrec.data.run_files import ranks_in
from delrec.lm.counted import by_fold, counted, standard
from delrec.lm.crossfit import COUNTED, may_learn_from, runs_of, user_folds
from delrec.lm.ranker import Ranker
from delrec.lm.residual import stop_without_folds
from delrec.lm.rps import with_rest
from delrec.metrics import metrics
from delrec.runtime import load_run, read_npy, read_tensors, stop

MOST = 100  # S
TELLS = ("folds.safetensors", "topk_train.npy")  # of a teacher's run
DEFAULTS = {"kd_weight": 0.5, "kd_temp": 1.0}


class Teacher(Protocol):
    """A conventional model that answers training samples out of fold."""

    farthest: float  # what its z is at most

    def scores(self, place_N: np.ndarray, /) -> torch.Tensor:
        """y (N, I) of samples by the places of their targets in data.items."""


@dataclass
class OutOfFold:
    """What a run of train_backbone.py --folds says of training samples."""

    data: Data
    fold_U: np.ndarray  # the fold of each user
    # fp16, memory-mapped: a sample's state in the model that has not seen its user
    x_nE: np.ndarray
    e_KIE: torch.Tensor  # the items' vectors of each fold's model
    b_KI: torch.Tensor  # and their biases
    farthest: float = math.inf

    def scores(self, place_N: np.ndarray) -> torch.Tensor:
        """y = x . e + b of the items 1..I (N, I), each row by its fold's model."""
        x_NE = self.x_nE[np.searchsorted(self.data.train, place_N)].astype(np.float32)
        x_NE = torch.from_numpy(x_NE).to(self.b_KI.device)
        y_NI = x_NE.new_empty(len(place_N), self.b_KI.shape[1])
        for fold, own in by_fold(self.fold_U[users(self.data, place_N)]):
            own = torch.from_numpy(own).to(x_NE.device)
            y_NI[own] = torch.addmm(self.b_KI[fold], x_NE[own], self.e_KIE[fold].T)
        return y_NI[:, 1:]


@dataclass
class Ensemble:
    """Teachers, and how much they are listened to."""

    data: Data
    teachers: Sequence[Teacher]
    best: int  # which of them is as sharp as p_T shall be
    weight: float  # a
    temp: float  # T
    row_n: np.ndarray  # what a sample learns from: its own, or with --kd-permute another user's

    def losses(
        self, ce: torch.Tensor, s_NI: torch.Tensor, place_N: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The two terms of L as sums over reads. ce: CE; s: the LM's scores of the items 1..I;
        place: of the targets in data.items."""
        a, T = self.weight, self.temp
        top_NS, p_NR = self.targets(place_N)
        # KL(p_T || p) = sum_i p_T(i) (log p_T(i) - log p(i)), i the S items and the rest
        log_p_NR = with_rest((s_NI / T).log_softmax(1), top_NS)
        kl = F.kl_div(log_p_NR, p_NR, reduction="sum")
        # L = (1 - a) CE + a T^2 KL(p_T || p)
        return {"candidates": (1 - a) * ce, "kd": a * T**2 * kl}

    @torch.no_grad()
    def targets(self, place_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(the places among the items 1..I of the S that p_T holds most likely (N, S), their
        probabilities and at the end that of all others (N, S+1))."""
        place_N = self.data.train[self.row_n[np.searchsorted(self.data.train, place_N)]]
        z_NI, c_N1 = 0, None
        for i, teacher in enumerate(self.teachers):
            y_NI = teacher.scores(place_N)
            sd_N1 = y_NI.std(1, keepdim=True, correction=0).clamp(min=1e-9)
            # z = mean over teachers of (y - mean(y)) / sd(y)
            z_NI = z_NI + standard(y_NI, teacher.farthest) / len(self.teachers)
            c_N1 = sd_N1 if i == self.best else c_N1
        # p_T = softmax(c z / T), 0 for what the user had
        log_p_NI = self.without_history(c_N1 * z_NI / self.temp, place_N).log_softmax(1)
        top_NS = log_p_NI.topk(min(MOST, log_p_NI.shape[1] - 1)).indices
        return top_NS, with_rest(log_p_NI, top_NS).exp()

    def without_history(self, z_NI: torch.Tensor, place_N: np.ndarray) -> torch.Tensor:
        """Scores with -inf for the items that a user had before."""
        before_N = place_N - self.data.ptr[users(self.data, place_N)]
        old_NL = torch.from_numpy(histories(self.data, place_N, int(before_N.max())))
        z_NI = F.pad(z_NI, (1, 0))  # the padding item, by which rows of a matrix are filled
        return z_NI.scatter(1, old_NL.to(z_NI.device), -torch.inf)[:, 1:]


# ---------------------------------------------------------------- from the flags


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --kd: [(is it so?, sentence)]."""
    about = (cfg.kd_weight, cfg.kd_temp, cfg.kd_permute or None)
    return [
        (
            cfg.kd and cfg.input != "ids",
            f"--kd compares scores of all items by their vectors, --input is {cfg.input}; use "
            "--input ids, or leave --kd out",
        ),
        (
            cfg.kd and cfg.teacher,
            "--kd and --teacher both teach this LM; leave one of them out",
        ),
        (
            cfg.kd and not runs_of(cfg),
            f"--kd {COUNTED} has no folds and no sharpness of its own; name a run of "
            "train_backbone.py --folds beside it, with another --kd",
        ),
        (
            not cfg.kd and any(value is not None for value in about),
            "--kd-weight, --kd-temp and --kd-permute are about the teachers of --kd; name one, or "
            "leave them out",
        ),
    ]


def opened(cfg: SimpleNamespace, r: Ranker) -> Ensemble | None:
    """The teachers that --kd names; None without it. cfg: kd, kd_weight, kd_temp, kd_permute,
    residual, without_fold."""
    if not cfg.kd:
        return None
    data, device = r.data, r.lm.device
    folders = [load_run(name, data, stages=["train_backbone"]).folder for name in runs_of(cfg)]
    teachers = [out_of_fold(data, folder, device) for folder in folders]
    best = int(np.argmax([quality(folder, data) for folder in folders]))
    if COUNTED in cfg.kd:
        teachers.append(counted(data, teachers[0].fold_U, device))
    row_n = np.arange(len(data.train))
    if cfg.kd_permute:
        known = may_learn_from(cfg, data, r.backbone_run)
        row_n[known] = known[rows_of_others(users(data, data.train[known]), 0)]
    return Ensemble(data, teachers, best, cfg.kd_weight, cfg.kd_temp, row_n)


def out_of_fold(data: Data, folder: Path, device: torch.device) -> OutOfFold:
    """The teacher that a backbone's run folder holds."""
    stop_without_folds(folder, "--kd")
    t = read_tensors(folder / "folds.safetensors")
    if "item.weight" not in t:
        stop(f"{folder} has no item vectors whose product with a state scores; name another run")
    x_nE = read_npy(folder / "states_train.npy", (len(data.train), None))
    e_KIE, b_KI = (t[name].float().to(device) for name in ("item.weight", "bias"))
    return OutOfFold(data, user_folds(folder, data), x_nE, e_KIE, b_KI)


def quality(folder: Path, data: Data) -> float:
    """A backbone's NDCG@10 over all items, on the half of validation that chooses."""
    greater_n, equal_n = ranks_in(folder / "full_val.npy", data, "val").T
    return float(
        metrics(greater_n, equal_n, ks=(10,))["ndcg@10"][halves_of_validation(data)[0]].mean()
    )


def digests(cfg: SimpleNamespace) -> list[str]:
    """What tells the teachers apart from others that stood in the same folders: their folds' models
    and which samples they list."""
    found = []
    for folder in runs_of(cfg):
        h = hashlib.sha256()
        for name in TELLS:
            h.update((folder / name).read_bytes())
        found.append(h.hexdigest()[:16])
    return found
