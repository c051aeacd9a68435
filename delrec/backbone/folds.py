"""Out-of-fold answers: what the next stages read of a training sample comes from a model that has
not seen its user.

A model knows the targets it was trained on: its first choice for a training sample is the truth far
more often than it will be on new ones. Whoever learns from such lists, or from item vectors fitted
to the same targets, learns to trust them too much. So the users are divided into K folds, each
answered by a model that was trained on the others (cross-fitting: Dao et al., arXiv 2104.09732).

A model's scores x . e + b do not change if x and e are rotated together. So the item vectors of
each fold, and its states, are rotated as near to the full model's as can be: one LM reads them all.

Names: K folds, U users, I items, E width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.backbone.ranking import rank_all
from delrec.backbone.results import Protocol
from delrec.data.prepared import Data, users
from delrec.metrics import compare, metrics
from delrec.processes import Ranks
from delrec.runtime import write_npy, write_tensors

COUNTS = (1, 3, 10, 30, 100, 300)  # where groups of targets begin, by occurrences in training


def folds_of_users(n_users: int, K: int, seed: int) -> np.ndarray:
    """The fold 0..K-1 of each user, int64 (U,): drawn, as even as can be."""
    return np.random.default_rng([seed, 5]).permutation(n_users) % K


def fold_of_samples(data: Data, fold_U: np.ndarray) -> np.ndarray:
    """The fold of each training sample's user, (n,)."""
    return fold_U[users(data, data.train)]


def without(data: Data, fold_U: np.ndarray, fold: int) -> Data:
    """The data without the training samples of a fold's users."""
    return replace(data, train=data.train[fold_of_samples(data, fold_U) != fold])


def rotation(of_IE: torch.Tensor, onto_IE: torch.Tensor, weight_I: torch.Tensor) -> torch.Tensor:
    """The orthogonal Q (E, E) with the least sum_i w_i |of_i Q - onto_i|^2 (Procrustes)."""
    u_EE, _, vt_EE = torch.linalg.svd(of_IE.T @ (weight_I[:, None] * onto_IE))
    return u_EE @ vt_EE


@dataclass
class Answers:
    """What the K models say, gathered one after the other."""

    data: Data
    protocol: Protocol
    fold_U: np.ndarray
    full: torch.nn.Module  # the model that was trained on all users
    got: dict  # of the training samples: Protocol.rank_splits, replaced fold by fold

    def __post_init__(self):
        count_I = np.bincount(self.data.items[self.data.train], minlength=self.data.n_items + 1)
        self.weight_I = torch.from_numpy(count_I).float()
        self.vectors, self.biases, self.cosines = [], [], []

    def add(self, fold: int, model: torch.nn.Module, ranks: Ranks, top_h: int) -> None:
        """Takes the answers of a fold's model to the samples it has not seen, and its item vectors,
        turned; of a model without states the answers alone."""
        Q_EE = None if hasattr(model, "scores") else self.turn(model)
        listed = self.protocol.listed
        own = fold_of_samples(self.data, self.fold_U)[listed] == fold
        if not own.any():  # few samples are listed, and none of this fold's
            return
        cand = {C: cand_nC[own] for C, cand_nC in self.protocol.cand["train"].items()}
        found = rank_all(
            model, self.data, self.data.train[listed[own]], ranks, top_h, cand, states=True
        )
        if Q_EE is not None:
            found["state"] = (torch.from_numpy(found["state"]).float() @ Q_EE).numpy()
        for key, rows in found.items():
            self.got[key][listed[own]] = rows

    def turn(self, model: torch.nn.Module) -> torch.Tensor:
        """The rotation (E, E) of a fold's model onto the full one, by which its item vectors are
        kept."""
        of_IE, onto_IE = (m.item.weight.detach().cpu().float() for m in (model, self.full))
        Q_EE = rotation(of_IE, onto_IE, self.weight_I)
        turned_IE = of_IE @ Q_EE
        cosine_I = torch.cosine_similarity(turned_IE, onto_IE)
        self.cosines.append(float((cosine_I * self.weight_I).sum() / self.weight_I.sum()))
        self.vectors.append(turned_IE)
        self.biases.append(model.bias.detach().cpu().float())
        return Q_EE

    @property
    def cosine(self) -> float | None:
        """The mean cosine of the turned item vectors and the full model's; None without any."""
        return round(float(np.mean(self.cosines)), 4) if self.cosines else None

    def write(self, out: Path) -> None:
        """Writes folds.safetensors: fold (U,), and unless the models have no states item.weight
        (K, I+1, E) and bias (K, I+1)."""
        tensors = {"fold": torch.from_numpy(self.fold_U)}
        if self.vectors:
            tensors["item.weight"] = torch.stack(self.vectors)
            tensors["bias"] = torch.stack(self.biases)
        write_tensors(out / "folds.safetensors", tensors)


def write_states(out: Path, got: dict[str, dict]) -> None:
    """Writes the states of the samples of every split, if the model has any, fp16 (n, E); a sample
    without a list has zeros."""
    for split, found in got.items():
        if "state" in found:
            write_npy(out / f"states_{split}.npy", found["state"].astype(np.float16))


# ---------------------------------------------------------------- did it help?


def rates(protocol: Protocol, split: str, got: dict) -> dict[str, np.ndarray]:
    """Each metric of the samples that got a list, {name: (n,)}."""
    data = protocol.data
    which = protocol.listed if split == "train" else np.arange(len(getattr(data, split)))
    target_n = data.items[getattr(data, split)[which]]
    m = metrics(*got["full"][which].T)
    found = {"hr@1": m["hr@1"], "ndcg@10": m["ndcg@10"]}
    for C in protocol.cand[split]:
        right_nC = protocol.cand[split][C] == target_n[:, None]
        found[f"hr@1_of_{C}"] = metrics(*compare(got[C][which], right_nC))["hr@1"]
    return found


def gap(
    cell_n: np.ndarray, val_cell_n: np.ndarray, parts: tuple[dict, dict, dict]
) -> dict[str, dict]:
    """How far the training samples' rates are from validation's: {metric: {in_sample, out_of_fold,
    val, closed}}. parts: rates of the model's own training samples, the same out of fold, and of
    validation. closed: the share of the distance that is gone.

    Training samples are other ones than validation's (shorter histories, for instance), so the
    rates are means over cells, weighted as validation has them. cell_n, val_cell_n: each sample's.
    """
    cells = np.unique(np.concatenate([cell_n, val_cell_n]))
    at_n, val_at_n = np.searchsorted(cells, cell_n), np.searchsorted(cells, val_cell_n)
    size = np.bincount(at_n, minlength=len(cells))
    share = np.bincount(val_at_n, minlength=len(cells)) * (size > 0)
    weight_n = (share / np.maximum(size, 1) / share.sum())[at_n]
    known_n = size[val_at_n] > 0
    inside, outside, val = parts
    table = {}
    for name in inside:
        seen, unseen = (float((part[name] * weight_n).sum()) for part in (inside, outside))
        new = float(val[name][known_n].mean())
        closed = 1 - abs(unseen - new) / max(abs(seen - new), 1e-9)
        row = {"in_sample": seen, "out_of_fold": unseen, "val": new, "closed": closed}
        table[name] = {key: round(x, 4) for key, x in row.items()}
    return table


def gaps(protocol: Protocol, L: int, inside: dict, outside: dict, val: dict) -> dict[str, dict]:
    """The gap with samples matched in two ways: by the length of their history (up to L), and by
    that and how often the target occurs among the other training targets: new items come and go,
    so validation's targets are harder by themselves.

    inside, outside, val: what rank_all found of training samples (Protocol.rank_splits) by the
    model itself and out of fold, and of validation.
    """
    data = protocol.data
    count_I = np.bincount(data.items[data.train], minlength=data.n_items + 1)

    def lengths(samples):
        return np.minimum(samples - data.ptr[users(data, samples)], L)

    def counts(samples, own):
        return np.digitize(count_I[data.items[samples]] - own, COUNTS)

    train = data.train[protocol.listed]
    length_n, val_length_n = lengths(train), lengths(data.val)
    more = len(COUNTS) + 1
    both_n = length_n * more + counts(train, own=1)
    val_both_n = val_length_n * more + counts(data.val, own=0)
    parts = (
        rates(protocol, "train", inside),
        rates(protocol, "train", outside),
        rates(protocol, "val", val),
    )
    return {
        "length": gap(length_n, val_length_n, parts),
        "length and target": gap(both_n, val_both_n, parts),
    }


def print_gaps(tables: dict[str, dict], K: int, cosine: float | None) -> None:
    """Prints what gaps found, for people."""
    turned = "" if cosine is None else f" (rotated item vectors: cosine {cosine:.2f})"
    print(
        f"\n{K} folds: training samples answered by a model that has not seen their user{turned}. "
        "Matched to validation by the length of the history, and by that and how often the target "
        "occurs in training:"
    )
    for matched, table in tables.items():
        head = f"{'in sample':>12}{'out of fold':>13}{'validation':>12}{'gap closed':>12}"
        print(f"by {matched:19}{head}")
        for name, row in table.items():
            shown = f"{row['in_sample']:12.4f}{row['out_of_fold']:13.4f}{row['val']:12.4f}"
            print(f"{name:22}{shown}{row['closed']:11.0%}")


def faults(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    """What cannot be meant by --folds, whatever the data are: (is it so?, a sentence)."""
    return [
        (
            cfg.folds == 1,
            "--folds 1 leaves nobody to train on; choose 2 or more (5 is usual)",
        ),
        (
            cfg.folds and cfg.teacher,
            "--folds trains without a fold's users, but what --teacher says was learnt from all of "
            "them; leave one of the two out",
        ),
    ]


def too_many(cfg: SimpleNamespace, data: Data) -> tuple[bool, str]:
    """The fault of more folds than users: (is it so?, a sentence)."""
    return (
        cfg.folds > data.n_users,
        f"--folds {cfg.folds} leaves a fold without a user; choose 2 to {data.n_users} (5 is "
        "usual)",
    )
