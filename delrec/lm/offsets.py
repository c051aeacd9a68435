"""Stage 2 on top of the backbone where titles are scored (--residual with --input titles, hybrid).

    s_BC = a v_BC + g y_BC,    y_BC = x_B . e_C + b_C

v is what the verbalizer says of the candidates' titles, y what the backbone says of them. a begins
at 0 and g at 1, both train: the run begins as its backbone, and learns what that lacks.

In training y is said by a model that has not seen the sample's user, as in residual.py, whose u and
E_f these are: E_f u is y up to one number a row, which a softmax does not see.

Names: B prompts, C candidates, I items, E width of the item vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from delrec.data.prepared import Data, users
from delrec.lm import items, residual
from delrec.lm.prompts import settings_of_run
from delrec.lm.residual import OWN, WEIGHT, Residual, ScoresOf, asked_by, fold_states, weight
from delrec.runtime import Run, load_run, read_tensors, stop, write_tensors

if TYPE_CHECKING:
    from delrec.lm.model import LM
    from delrec.lm.samples import Example

FILE = "offset.safetensors"


@dataclass
class Offset:
    """What the scores of an LM's titles are added to."""

    asked: Residual
    maps: torch.nn.ModuleDict  # a and g
    folds: items.Folds | None = None  # what training samples are told by, while the run trains


def first_weights() -> torch.nn.ModuleDict:
    """a, which begins at 0, and g, which begins at 1."""
    a = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(a.weight)
    return torch.nn.ModuleDict({OWN: a, WEIGHT: weight()})


def add_backbone(
    lm: LM,
    cfg: SimpleNamespace,
    data: Data,
    asked: tuple[Path, ScoresOf],
    maps: torch.nn.ModuleDict,
) -> torch.nn.ModuleDict:
    """From now on the scores that `lm` gives are added to those of a backbone, which they begin as:
    titles' here, vectors' as residual.py has it. The maps that train: `maps`, and of titles a and
    g. asked: the backbone's folder, and what makes its scores."""
    place, scores_of = asked
    if cfg.input == "ids":
        residual.add_backbone(lm, cfg, data, place, scores_of)
        return maps
    E = items.item_vectors(place, data.n_items)
    folds = items.folds_of(place, E)
    states = fold_states(cfg, data, place, folds)
    folds.tables = folds.tables.to(lm.device)
    backbone = scores_of(load_run(place, data)).on(lm.device)
    own = Residual(backbone, place, data, cfg.residual == "permuted", states)
    weights = first_weights().to(lm.device)
    lm.set_offset(Offset(own, weights, folds))
    return torch.nn.ModuleDict({**maps, "offset": weights})


def beside(lm: LM, v_BC: torch.Tensor, cand_BC: np.ndarray, batch: list[Example]) -> torch.Tensor:
    """a v + g y of the candidates of training samples; v itself without a backbone to add to."""
    own = lm.offset
    if own is None:
        return v_BC
    place_B = np.concatenate([e.place for e in batch])
    table_B = own.folds.fold_U[users(own.asked.data, place_B)] + 1
    u_BE = own.asked.states.u(place_B, table_B).to(lm.device)
    # E_f of each sample's fold, at its candidates
    row_BC = table_B[:, None] * (own.asked.data.n_items + 1) + cand_BC
    E_BCE = own.folds.tables[torch.from_numpy(row_BC).to(lm.device)]
    y_BC = (E_BCE @ u_BE[..., None])[..., 0]
    return own.maps[OWN].weight * v_BC + own.maps[WEIGHT].weight * y_BC


# ---------------------------------------------------------------- run folders


def save_offset(lm: LM, folder: Path) -> None:
    """Writes a and g into a run folder."""
    tensors = {name: p.detach().cpu() for name, p in lm.offset.maps.state_dict().items()}
    write_tensors(folder / FILE, tensors)


def open_backbone(lm: LM, run: Run, data: Data, scores_of: ScoresOf | None) -> None:
    """Gives the LM of a finished run of --residual the backbone that stands in the run's folder,
    and where titles are scored the weights that save_offset wrote."""
    asked, folder = asked_by(lm, run, data, scores_of), run.folder
    if asked is None:
        return
    if settings_of_run(run)["input"] == "ids":
        lm.set_items(replace(lm.items, residual=asked))
        return
    maps, tensors = first_weights(), read_tensors(folder / FILE)
    if {name: t.shape for name, t in tensors.items()} != {
        name: p.shape for name, p in maps.state_dict().items()
    }:
        stop(f"{folder / FILE} does not hold two weights; train the run again")
    maps.load_state_dict(tensors)
    lm.set_offset(Offset(asked, maps.to(lm.device).requires_grad_(False)))
