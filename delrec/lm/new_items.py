"""Items that an LM never saw in training: their titles are read, their vectors are given."""

import copy
from dataclasses import replace

import numpy as np
import torch

from delrec.data.unseen import Unseen
from delrec.lm.calibration import neutral_scores
from delrec.lm.prompts import Prompts
from delrec.lm.ranker import Ranker
from delrec.lm.residual import residual_of
from delrec.lm.titles import with_more
from delrec.lm.user_states import users_of
from delrec.processes import Ranks


def with_items(r: Ranker, titles: list[str], unseen: Unseen) -> Ranker:
    """The ranker with items behind the trained ones, whose scores it does not change.

    unseen: the rows of these items, which an LM on vectors asks for. r: a ranker without added
    items.
    """
    lm = copy.copy(r.lm)  # the model itself is the same; the ranker as it was still answers
    if lm.items is not None:
        rows = torch.from_numpy(unseen.rows(lm.items.E.cpu().numpy()))
        lm.set_items(replace(lm.items, new=rows.to(lm.device)))
    if own := residual_of(lm):
        counts = own.counts and own.counts.with_titles(titles)
        grown = replace(own, backbone=own.backbone.with_items(unseen), counts=counts)
        if lm.offset is not None:
            lm.set_offset(replace(lm.offset, asked=grown))
        else:
            lm.set_items(replace(lm.items, residual=grown))
    if own := users_of(lm):
        backbone = own.asked.backbone.with_items(unseen)
        grown = replace(own, asked=replace(own.asked, backbone=backbone))
        lm.set_items(replace(lm.items, users=grown))
    data = replace(r.data, titles=[*r.data.titles, *titles], n_items=r.data.n_items + len(titles))
    lm.set_author(lm.author and replace(lm.author, lm=lm, data=data))
    grown = with_more(lm, r.titles, titles, r.settings["max_title"])
    k, shown = 0 if r.P is None else len(r.P), r.settings["input"]
    prompts = Prompts(lm, data, grown, r.settings, k, shown)
    return replace(r, lm=lm, data=data, titles=grown, prompts=prompts, trained=r.titles)


def grown_penalty(r: Ranker, penalty_I: np.ndarray, calibration: float, ranks: Ranks) -> np.ndarray:
    """What calibration subtracts from each item's score (I+1,), the added ones' behind. r: with
    added items; penalty_I: of the trained ones.
    """
    new_A = np.arange(len(penalty_I), r.data.n_items + 1)
    neutral_A = np.zeros(len(new_A), np.float32)
    if calibration:
        neutral_A = neutral_scores(r, ranks, new_A)[new_A]
    return np.concatenate([penalty_I, calibration * neutral_A]).astype(np.float32)
