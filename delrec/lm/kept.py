"""Stage 2 that keeps what stage 1 taught (finetune.py --input ids --keep-rps; ours).

    loss = L_CE + w(step) L_RPS

L_CE asks for the true next item (windows.py), L_RPS for the backbone's list after the same history:
Plackett-Luce of r_1..r_h (rps.py), on the scores that L_CE is made of, so it costs no pass. w falls
from --keep-rps to 0 at two thirds of the steps; the last third is stage 2 as it is.

The lists are out of fold: those of a model that was trained on a sample mostly begin with its
target, and would only repeat L_CE.

Names: N reads, I items, n training samples, h items of a list.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.others import rows_of_others
from delrec.data.prepared import users, with_lists
from delrec.lm.lists import Lists, must_be_full, read_lists
from delrec.lm.ranker import Ranker
from delrec.lm.rps import listwise
from delrec.lm.text import digest
from delrec.lm.windows import targets_of
from delrec.runtime import Run, stop

LISTED = 10  # h, where no prompt was distilled
ENDS = 2 / 3  # share of the steps after which nothing is kept


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --keep-rps: [(is it so?, sentence)]."""
    return [
        (
            cfg.keep_rps and cfg.input != "ids",
            f"--keep-rps needs the scores of all items at every read, --input is {cfg.input}; use "
            "--input ids, or leave --keep-rps out",
        ),
        (
            cfg.keep_rps_permuted and not cfg.keep_rps,
            "--keep-rps-permuted says whose lists --keep-rps keeps; add --keep-rps .3, or leave it "
            "out",
        ),
        (
            cfg.keep_rps_permuted and cfg.without_fold,
            "--keep-rps-permuted may give a sample the list of a user that --without-fold leaves "
            "out; leave one of them out",
        ),
    ]


@dataclass
class KeptLists:
    """The backbone's lists of training samples, as one more part of stage 2's loss."""

    ranked_nh: np.ndarray  # items, best first
    places_n: np.ndarray  # of the samples in data.items, sorted
    weight: float  # W: w before the first step
    batch: int  # samples of a step
    n_steps: int
    digest: str  # of all that the backbone lists

    def share(self, step: int) -> float:
        """w(step) = W max(0, 1 - step / (2/3 n_steps)), the first step being 0."""
        return self.weight * max(0.0, 1 - step / (ENDS * self.n_steps))

    def losses(self, s_NI: torch.Tensor, batch: list) -> dict[str, torch.Tensor]:
        """w L_RPS as a sum over the reads of a batch, whose prompts are all of one step. s: their
        scores of the items 1..I."""
        share = self.share(batch[0].number // self.batch)
        row_N = np.searchsorted(self.places_n, targets_of(batch, "place"))
        ranked_Nh = torch.from_numpy(self.ranked_nh[row_N].astype(np.int64)).to(s_NI.device)
        return {"rps": share * listwise(s_NI, ranked_Nh).sum()}


# ---------------------------------------------------------------- of which lists


def opened(
    cfg: SimpleNamespace, r: Ranker, prompt_run: Run | None, n_steps: int
) -> KeptLists | None:
    """The lists that --keep-rps keeps; None without it. cfg: keep_rps, keep_rps_permuted, batch,
    dataset, seed. prompt_run: whose soft prompt stage 2 begins with."""
    if not cfg.keep_rps:
        return None
    lists, train = lists_of(cfg, r), np.asarray(r.data.train)
    h = getattr(prompt_run, "h", LISTED)  # as many as stage 1 taught
    must_be_full(lists, h, ("train",), "begin with a run of distill.py --h {}")
    ranked_nh = lists.train[:, :h]
    if cfg.keep_rps_permuted:
        ranked_nh = ranked_nh[rows_of_others(users(r.data, train), cfg.seed)]
    told = digest(torch.tensor(lists.train))
    return KeptLists(ranked_nh, train, cfg.keep_rps, cfg.batch, n_steps, told)


def lists_of(cfg: SimpleNamespace, r: Ranker) -> Lists:
    """The lists in the backbone's run folder; stops unless they are out of fold."""
    lists = read_lists(r.backbone_run, r.data, f"--dataset {cfg.dataset}")
    if lists.learnt and not lists.folds:
        stop(
            f"--keep-rps needs a backbone that answered its training samples out of fold, and "
            f"{lists.folder} was trained on them; train it with train_backbone.py --folds 5"
        )
    if (n := len(with_lists(lists.folder, r.data))) < len(lists.train):
        stop(
            f"--keep-rps needs a list after every item; {lists.folder} lists {n} of "
            f"{len(lists.train)} training samples: train it again with train_backbone.py --lists "
            f"{len(lists.train)} --overwrite and its other flags as before"
        )
    return lists
