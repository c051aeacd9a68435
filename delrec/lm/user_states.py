"""A soft prompt that knows the user (distill.py --input ids --user-states; ours): each item of a
history also tells the LM what the backbone makes of the history up to it.

    v_t = W_in e_t + b_in + W_p u_t / l,    u_t = (nbar x_t, sd)

x_t is the backbone's state after i_1..i_t, and u_t the same in the units of the item vectors, as
--residual has it: E u_t are the backbone's scores. l is the usual length of u. W_p begins at 0, so
the run begins as one without it. Stage 1 trains W_p, stage 2 keeps it as the soft prompt is kept.

Input-dependent prompts are usually vectors of their own (IDPG, arXiv 2204.04497). Here they cannot
be. The reads of a window share one prompt, in which each sees what stands before it. Slots in front
of the history would tell all of them one user state: that of the last read holds the answers to
those before it, and that of the first is stale. Slots behind the history are seen by the last read
alone. With x_t on item t a read sees the states of its own history and of its beginnings, and none
of a later item.

In training x_t is out of fold (residual.py): the state of the sample whose target follows item t.
Where no such sample was answered, the item carries nothing. At scoring the full model is asked
after every beginning of the history, of which the run's folder holds a copy.

Names: M tokens or beginnings of histories, E width of the states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from delrec.data.prepared import Data, subset, users, with_lists
from delrec.lm.ragged import Ragged, pointers, ragged, spans
from delrec.lm.residual import (
    ROWS,
    Olds,
    Residual,
    ScoresOf,
    fold_states,
    residual_of,
    scales,
)
from delrec.lm.text import ITEM, tokens_width
from delrec.places import BACKBONE
from delrec.runtime import Run, load_run, read_tensors, stop

if TYPE_CHECKING:
    from delrec.lm.items import Items
    from delrec.lm.model import LM

MAP = "user"  # the name of W_p among the maps
MEASURED = 4096  # samples of which the usual length of u is taken
# A token ITEM - (i + STRIDE r) is item i, which carries the state of number r; 0: it carries none
STRIDE = 1 << 32


class StateMap(torch.nn.Module):
    """W_p u / l."""

    def __init__(self, width: int, to: int, length: float = 1.0):
        """width: of u; to: of a token's vector; length: l."""
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(to, width))
        self.register_buffer("length", torch.tensor(length))

    def forward(self, u_ME: torch.Tensor) -> torch.Tensor:
        """What u (M, width) adds to items' vectors."""
        return F.linear(u_ME / self.length, self.weight)


@dataclass
class UserStates:
    """Whose states items carry."""

    asked: Residual  # the backbone, in training also its states out of fold
    scale_2: torch.Tensor  # (nbar, sd) of the full model
    history: int  # items before a target that the states of a prompt are made of
    known_M: np.ndarray | None = None  # places in data.items of the targets that have a state
    shown: torch.Tensor | None = None  # at scoring: u of the items in the prompts that are read

    def u(self, row_M: np.ndarray, table_M: np.ndarray) -> torch.Tensor:
        """u fp32 (M, E+1) by what tokens carry: in training the place of the target that follows,
        at scoring the number in `shown`; 0 where they carry nothing. table: of items.Folds."""
        if self.shown is not None:
            nothing = self.shown.new_zeros(1, self.shown.shape[1])
            return torch.cat([nothing, self.shown])[torch.as_tensor(row_M, device=nothing.device)]
        has_M = row_M > 0
        u_NE = self.asked.states.u(row_M[has_M], table_M[has_M])
        u_ME = u_NE.new_zeros(len(row_M), u_NE.shape[1])
        u_ME[torch.from_numpy(has_M)] = u_NE
        return u_ME

    def after(self, olds: list[np.ndarray]) -> torch.Tensor:
        """u (M, E+1) of the full model after histories, oldest first."""
        blocks = (olds[i : i + ROWS] for i in range(0, len(olds), ROWS))
        x_ME = torch.cat([self.asked.after(block) for block in blocks]).float()
        nbar, sd = self.scale_2.to(x_ME.device)
        return torch.cat([nbar * x_ME, sd.expand(len(x_ME), 1)], 1)


def users_of(lm: LM) -> UserStates | None:
    """Whose states the items of an LM carry; None where they carry none."""
    return lm.items.users if lm.items is not None else None


def asked_of(lm: LM) -> Residual | None:
    """The backbone that an LM asks for states or scores; None where it asks none."""
    own = users_of(lm)
    return own.asked if own else residual_of(lm)


def vectors(items: Items, id_M: np.ndarray, e_MD: torch.Tensor) -> torch.Tensor:
    """What the LM reads of items' tokens: e = W_in e_t + b, and what each carries. id: ITEM - the
    tokens."""
    row_M = id_M // STRIDE
    if items.users is None or not row_M.any():
        return e_MD
    u_ME = items.users.u(row_M, id_M % STRIDE // len(items.E)).to(e_MD.device)
    return e_MD + items.maps[MAP](u_ME)


# ---------------------------------------------------------------- whose, and which map


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --user-states: [(is it so?, sentence)]."""
    return [
        (
            cfg.user_states and cfg.input != "ids",
            f"--user-states are carried by item vectors, --input is {cfg.input}; use --input ids, "
            "or leave --user-states out",
        ),
        (
            cfg.user_states and cfg.tasks == "ta",
            "--user-states are told in RPS alone, as they know what TA asks, and --tasks is ta; "
            "use --tasks both or rps, or leave --user-states out",
        ),
        (
            cfg.user_states and cfg.augment,
            "--user-states are out of fold, and nobody answered the histories of --augment so; "
            "leave one of them out",
        ),
    ]


def settle(cfg: SimpleNamespace, prompt_run: Run | None) -> None:
    """Sets cfg.user_states in stage 2, which are those of the soft prompt's run. Stops where they
    cannot be told."""
    cfg.user_states = getattr(prompt_run, "user_states", None)
    if not cfg.user_states:
        return
    carried = f"the items of {prompt_run.folder} carry user states (distill.py --user-states)"
    if cfg.input != "ids":
        stop(f"{carried}, --input is {cfg.input}; use --input ids, or another --soft-prompt")
    if cfg.teacher:
        stop(
            f"{carried}, which no teacher was told; leave --teacher out, or use another "
            "--soft-prompt"
        )


def add_states(lm: LM, cfg: SimpleNamespace, data: Data, place: Path, scores_of: ScoresOf) -> None:
    """From now on the items of `lm`, which reads vectors, carry the states of the backbone in the
    folder `place`, by a map W_p = 0. cfg: user_states, history, seed."""
    items = lm.items
    of = SimpleNamespace(residual=cfg.user_states, residual_dropout=0.0, seed=cfg.seed)
    states = fold_states(of, data, place, items.folds)
    listed = with_lists(place, data)
    known_M = np.zeros(len(data.items), bool)
    known_M[data.train[listed]] = True
    some = data.train[listed[subset(len(listed), MEASURED, 0)]]
    u_NE = states.u(some, items.folds.fold_U[users(data, some)] + 1)
    to, length = tokens_width(lm), float(u_NE.norm(dim=1).mean())
    items.maps[MAP] = StateMap(u_NE.shape[1], to, max(length, 1e-6)).to(lm.device)
    own = opened(lm, place, data, scores_of, (cfg.user_states, cfg.history))
    own = replace(own, asked=replace(own.asked, states=states), known_M=known_M)
    lm.set_items(replace(items, users=own))


def take_states(
    lm: LM, cfg: SimpleNamespace, data: Data, place: Path, scores_of: ScoresOf, start: Path
) -> None:
    """What add_states does, with the map of the run in the folder `start`, which stays."""
    if lm.kind != "decoder":
        stop(f"user states need a decoder-only LM, {lm.name} is an {lm.kind} LM; use another")
    add_states(lm, cfg, data, place, scores_of)
    t = read_tensors(start / "items.safetensors")
    own = lm.items.maps[MAP]
    names = {name: f"{MAP}.{name}" for name in own.state_dict()}
    if any(name not in t for name in names.values()) or t[f"{MAP}.weight"].shape != (
        own.weight.shape
    ):
        stop(f"{start}/items.safetensors lacks the map of its user states; distil it again")
    own.load_state_dict({name: t[key] for name, key in names.items()})
    own.requires_grad_(False)


def open_states(lm: LM, run: Run, data: Data, scores_of: ScoresOf | None) -> None:
    """Gives the LM of a finished run whose items carry states the backbone in the run's folder."""
    if not getattr(run, "user_states", None):
        return
    if scores_of is None:
        raise ValueError(f"{run.folder} reads a backbone's states: open it with what makes them")
    if MAP not in lm.items.maps:
        stop(f"{run.folder}/items.safetensors lacks the map of its user states; train it again")
    of = (run.user_states, run.settings["history"])
    own = opened(lm, run.folder / BACKBONE, data, scores_of, of)
    lm.set_items(replace(lm.items, users=own))


def opened(lm: LM, place: Path, data: Data, scores_of: ScoresOf, of: tuple[str, int]) -> UserStates:
    """The states of the full model in a backbone's folder. of: backbone or permuted, and how many
    items a prompt shows."""
    backbone = scores_of(load_run(place, data, stages=["train_backbone"])).on(lm.device)
    t = read_tensors(place / "model.safetensors")
    scale_2 = scales(t["item.weight"].float(), t["bias"].float())
    whose, shown = of
    asked = Residual(backbone, place, data, whose == "permuted")
    return UserStates(asked, scale_2, backbone.history + shown - 1)


# ---------------------------------------------------------------- prompts whose items carry them


def carrying(lm: LM, tails: Ragged, ats: Ragged, last_n: np.ndarray) -> Ragged:
    """The prompts of windows whose items carry the states out of fold. ats: the items' places in
    them; last: the places in data.items of the windows' last targets."""
    own = users_of(lm)
    if own is None:
        return tails
    # in data.items the targets of a window follow one another, and each its item
    place_M = spans(last_n + 1 - ats.lengths, ats.lengths)
    flat = tails.flat.copy()
    at_M = np.repeat(tails.ptr[:-1], ats.lengths) + ats.flat
    flat[at_M] -= STRIDE * np.where(own.known_M[place_M], place_M, 0)
    return Ragged(flat, tails.ptr)


@contextlib.contextmanager
def told(lm: LM, tails: Sequence[np.ndarray], olds: Olds) -> Iterator[Sequence[np.ndarray]]:
    """The prompts of histories, whose items carry, inside, what the full model makes of each of
    their beginnings. olds: the whole histories; None: nothing is carried."""
    own, tails = users_of(lm), ragged(tails)
    is_item_M = tails.flat <= ITEM
    if own is None or olds is None or not is_item_M.any():
        yield tails
        return
    shown_B = np.diff(pointers(is_item_M)[tails.ptr])
    begun = [old[: len(old) - n] for old, m in zip(olds, shown_B) for n in range(m)[::-1]]
    last_M = np.array([old[-1] if len(old) else 0 for old in begun])
    if not np.array_equal(last_M, ITEM - tails.flat[is_item_M]):
        raise ValueError("the items of a prompt are not the last ones of its history")
    flat, items = tails.flat.copy(), lm.items
    flat[is_item_M] -= STRIDE * np.arange(1, len(begun) + 1)
    lm.set_items(replace(items, users=replace(own, shown=own.after(begun))))
    try:
        yield Ragged(flat, tails.ptr)
    finally:
        lm.set_items(items)
