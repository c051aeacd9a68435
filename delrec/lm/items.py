"""Items as vectors: what --input ids (E4SRec, arXiv 2312.02443) and hybrid (LLaRA, arXiv
2312.02445) show an LM instead of, or beside, titles.

lm.items holds E, the frozen item vectors of a backbone, and two linear maps: maps.in takes an
item's vector to the width of the LM's embeddings, maps.out an LM's state back to the space of E,
where an item scores by its product with the state. A window of items is one prompt, and every
position of it predicts the item after it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.others import order_of_others
from delrec.data.prepared import Data
from delrec.lm import counted, residual, user_states
from delrec.lm.model import LM
from delrec.lm.prompts import settings_of_run
from delrec.lm.ragged import Ragged
from delrec.lm.residual import Residual, scales
from delrec.lm.text import ITEM, digest, token_scale, tokens_width
from delrec.lm.transfer import on_device
from delrec.lm.user_states import STRIDE, StateMap, UserStates
from delrec.runtime import Run, load_run, read_tensors, stop, write_tensors

# of a run of --residual, and of --residual-counts
ADDED = {f"{residual.WEIGHT}.weight", f"{counted.MAP}.weight"}
CARRIED = {f"{user_states.MAP}.{name}" for name in ("weight", "length")}  # of --user-states


@dataclass
class Folds:
    """Item vectors of the models that a backbone's run trained without a part of the users
    (train_backbone.py --folds). Table 0 holds E, table f + 1 the vectors of fold f."""

    tables: torch.Tensor  # fp32 ((K+1) (I+1), de)
    fold_U: np.ndarray  # the fold of each user
    scale_K2: torch.Tensor  # what the vectors and the biases of each fold were divided by


@dataclass
class Items:
    """A backbone's item vectors and the maps between them and an LM."""

    E: torch.Tensor  # fp32 (I+1, de), frozen; the padding item's row is 0
    maps: torch.nn.ModuleDict  # "in": de -> width of a token, "out": D -> de, "block1", ..: D -> de
    folds: Folds | None = None  # of a backbone that answered out of fold; for training samples
    new: torch.Tensor | None = None  # fp32 (A, de): vectors of items added behind the trained ones
    residual: Residual | None = None  # what the scores are added to (residual.py)
    users: UserStates | None = None  # whose states items carry (user_states.py)

    def vectors(self, id_M: np.ndarray) -> torch.Tensor:
        """What the LM reads of items' tokens, ITEM - id (M,): vectors (M, D)."""
        rows_ME = self.rows(on_device(id_M % STRIDE, self.E.device))
        return user_states.vectors(self, id_M, self.maps["in"](rows_ME))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The vectors of items, by their numbers (in training: by their places in the folds'
        tables).
        """
        table = self.E if self.folds is None else self.folds.tables
        if self.new is None:
            return table[ids]
        is_new = ids >= len(table)
        old_rows = table[ids.masked_fill(is_new, 0)]
        new_rows = self.new[(ids - len(table)).clamp(min=0)]
        return torch.where(is_new[..., None], new_rows, old_rows)


def defaults(cfg: SimpleNamespace) -> dict:
    """What is set where nobody typed it."""
    return {"curriculum": "sample"} if cfg.input == "hybrid" and not cfg.from_run else {}


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant in stage 2: [(is it so?, sentence)]."""
    return [
        (
            cfg.maps and cfg.input == "titles",
            "--maps begins the maps of item vectors, but --input is titles; use --input ids or "
            "hybrid, or leave --maps out",
        ),
        (
            cfg.permute_vectors and cfg.input == "titles",
            "--permute-vectors gives items other vectors, but --input is titles; use --input ids "
            "or hybrid, or leave it out",
        ),
        (
            cfg.curriculum and (cfg.input != "hybrid" or cfg.from_run),
            "--curriculum says when vectors come beside titles, which is asked only with --input "
            "hybrid and without --from; leave it out",
        ),
    ]


def load_items(lm: LM, backbone_run: Path | str, n_items: int, taught: int = 0) -> None:
    """Gives the LM the frozen item vectors of a backbone and untrained maps: E fp32 (I+1, de),
    maps.in (de -> D), maps.out (D -> de), and for each of `taught` inner blocks maps.block1, ..
    (E4SRec, SLMRec: arXiv 2405.17890, sections 3 and 4).
    """
    E, folds = item_vectors(backbone_run, n_items), None
    if (Path(backbone_run) / "folds.safetensors").exists():
        folds = folds_of(backbone_run, E)
        folds.tables = folds.tables.to(lm.device)
    de, D = E.shape[1], lm.head_VD.shape[1]
    maps = {"in": torch.nn.Linear(de, tokens_width(lm)), "out": torch.nn.Linear(D, de)}
    maps |= {f"block{j}": torch.nn.Linear(D, de) for j in range(1, taught + 1)}
    # vectors as long as the tokens' own, as the model sees them
    long = float(lm.model.get_input_embeddings().weight.float().std()) * token_scale(lm)
    with torch.no_grad():
        maps["in"].weight.normal_(std=long)
        maps["in"].bias.zero_()
    lm.set_items(Items(E.to(lm.device), torch.nn.ModuleDict(maps).to(lm.device), folds))


def item_vectors(backbone_run: Path | str, n_items: int) -> torch.Tensor:
    """E fp32 (I+1, de) of a backbone's run folder.

    An item scores x . e + b in the backbone, so its vector here is (e, b), each part scaled to a
    norm of about 1.
    """
    path = Path(backbone_run) / "model.safetensors"
    if not path.exists():
        stop(
            f"items are shown as the vectors of a backbone, but there is no {path}; train one with "
            "train_backbone.py"
        )
    tensors = read_tensors(path)
    if "relation" in tensors:  # KDA_LRD
        stop(
            f"{path} holds a model that reads a history through each candidate, so its item "
            "vectors score nothing by themselves; use finetune.py --input titles, or another run"
        )
    e, b = tensors.get("item.weight"), tensors.get("bias")
    if e is None or b is None or len(e) != n_items + 1 or b.shape != (n_items + 1,):
        stop(
            f"{path} lacks item.weight and bias of {n_items + 1} rows; expected a run of "
            "train_backbone.py on this data set"
        )
    return joined(e.float(), b.float())


def joined(e_IE: torch.Tensor, b_I: torch.Tensor) -> torch.Tensor:
    """(e, b) of every item, each part scaled to a norm of about 1: (I+1, E+1)."""
    long, wide = scales(e_IE, b_I)
    e_IE, b_I = e_IE / long, (b_I - b_I[1:].mean()) / wide
    E = torch.cat([e_IE, b_I[:, None]], 1)
    E[0] = 0
    return E


# ---------------------------------------------------------------- out of fold


def folds_of(backbone_run: Path | str, E: torch.Tensor) -> Folds:
    """The folds' item vectors of a backbone's run folder, behind the full model's, E."""
    path = Path(backbone_run) / "folds.safetensors"
    t = read_tensors(path)
    if not {"fold", "item.weight", "bias"} <= set(t) or t["bias"].shape[1:] != E.shape[:1]:
        stop(f"{path} does not hold the folds of {len(E) - 1} items; train the backbone again")
    parts = [(e.float(), b.float()) for e, b in zip(t["item.weight"], t["bias"])]
    tables = torch.cat([E, *(joined(e, b) for e, b in parts)])
    return Folds(tables, t["fold"].numpy(), torch.stack([scales(e, b) for e, b in parts]))


def vectors_digest(lm: LM) -> str:
    """16 hex digits that tell the item vectors of training apart from others."""
    return digest(lm.items.E if lm.items.folds is None else lm.items.folds.tables)


def table_of(lm: LM, user_B: np.ndarray) -> np.ndarray:
    """The table of item vectors that training samples of these users read (B,); 0 where there are
    no folds."""
    folds = lm.items.folds if lm.items else None
    return np.zeros(len(user_B), np.int64) if folds is None else folds.fold_U[user_B] + 1


def show_fold(lm: LM, run: Run, fold: int) -> None:
    """From now on the LM of a run that is only read is shown the item vectors of a fold of its
    backbone, and scores by them."""
    E = item_vectors(run.backbone_run, len(lm.items.E) - 1)
    tables = folds_of(run.backbone_run, E).tables.view(-1, *E.shape)
    lm.set_items(Items(tables[fold + 1].to(lm.device), lm.items.maps))
    if getattr(run, "permute_vectors", False):
        permute(lm)


def permute(lm: LM) -> None:
    """Gives each item the vector of another, in every fold the same one's: the control without
    meaning."""
    E = lm.items.E
    order = others(E)
    folds = lm.items.folds
    if folds is not None:
        tables = folds.tables.view(-1, *E.shape)[:, order].flatten(0, 1)
        folds = replace(folds, tables=tables)
    lm.set_items(replace(lm.items, E=E[order], folds=folds))


def others(E: torch.Tensor) -> torch.Tensor:
    """For each item vector (I+1, de) the row that its item reads permuted: int64 (I+1,)."""
    return torch.from_numpy(order_of_others(len(E) - 1)).to(E.device)


def in_tables(lm: LM, tails: Ragged, table_B: np.ndarray) -> Ragged:
    """Prompts' tokens, each with the items' vectors of its table."""
    if not table_B.any():
        return tails
    further_M = np.repeat(table_B * len(lm.items.E), tails.lengths)
    return Ragged(np.where(tails.flat <= ITEM, tails.flat - further_M, tails.flat), tails.ptr)


def scores_in_tables(lm: LM, e_NE: torch.Tensor, table_N: np.ndarray) -> torch.Tensor:
    """s = E e of the items 1..I, (N, I), each row with the item vectors of its table."""
    if lm.items.folds is None:
        return e_NE @ lm.items.E[1:].T
    tables = lm.items.folds.tables.view(-1, *lm.items.E.shape)
    s_NI = e_NE.new_empty(len(e_NE), len(lm.items.E) - 1)
    for table in np.unique(table_N):
        own = torch.as_tensor(np.flatnonzero(table_N == table), device=e_NE.device)
        s_NI = s_NI.index_copy(0, own, e_NE[own] @ tables[table, 1:].T)
    return s_NI


# ---------------------------------------------------------------- run folders


def save_items(lm: LM, folder: Path) -> None:
    """Writes the item vectors and the two maps into a run folder."""
    write_tensors(
        folder / "items.safetensors",
        {"E": lm.items.E.cpu()}
        | {
            k: v.detach().cpu().contiguous()
            for k, v in lm.items.maps.state_dict().items()
            if not k.startswith("block")
        },
    )


def read_items(
    lm: LM, folder: Path | str, n_items: int | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What save_items wrote: E and the maps' own tensors by name. n_items: None: of however many
    items."""
    t = read_tensors(Path(folder) / "items.safetensors")
    want, D = {"E", "in.weight", "in.bias", "out.weight", "out.bias"}, lm.head_VD.shape[1]
    if (
        set(t) - ADDED not in (want, want | CARRIED)
        or t["in.weight"].shape != (tokens_width(lm), t["E"].shape[1])
        or t["out.weight"].shape[1] != D
        or t.get(f"{user_states.MAP}.weight", t["in.weight"]).shape != t["in.weight"].shape
        or n_items not in (None, len(t["E"]) - 1)
    ):
        of = "items'" if n_items is None else f"{n_items} items'"
        stop(
            f"{folder}/items.safetensors does not hold the {of} vectors and maps of an LM of width "
            f"{D}; train the run again"
        )
    return t.pop("E"), t


def open_items(lm: LM, folder: Path, n_items: int) -> None:
    """Gives the LM what save_items wrote, for a run that is only read."""
    E, tensors = read_items(lm, folder, n_items)
    (D_in, de), D = tensors["in.weight"].shape, tensors["out.weight"].shape[1]
    maps = torch.nn.ModuleDict({"in": torch.nn.Linear(de, D_in), "out": torch.nn.Linear(D, de)})
    if f"{residual.WEIGHT}.weight" in tensors:
        maps[residual.WEIGHT] = residual.weight()
    if f"{counted.MAP}.weight" in tensors:
        maps[counted.MAP] = counted.weights()
    if set(tensors) >= CARRIED:
        maps[user_states.MAP] = StateMap(de, D_in)
    maps.load_state_dict(tensors)
    lm.set_items(Items(E.to(lm.device), maps.to(lm.device).requires_grad_(False)))


def maps_folder(cfg: SimpleNamespace, data: Data, prompt_run: Run | None) -> str | None:
    """The run whose maps these begin as: --maps, or the soft prompt's if it was distilled with
    --input ids; None for untrained ones."""
    if cfg.maps:
        return str(load_run(cfg.maps, data, stages=["distill", "finetune"]).folder)
    reads_vectors = cfg.input != "titles" and prompt_run and prompt_run.stage == "distill"
    if reads_vectors and settings_of_run(prompt_run)["input"] == "ids":
        return str(prompt_run.folder)
    return None


def load_maps(lm: LM, folder: Path | str, n_items: int, permuted: bool) -> None:
    """Sets the maps to those of another run, which must have seen the same item vectors: the items'
    own, or, where this run's will be permuted too, permuted ones."""
    E, tensors = read_items(lm, folder, n_items)
    mine, E = lm.items.E, E.to(lm.device)
    if not torch.equal(E, mine):
        if not torch.equal(E, mine[others(mine)]):
            stop(
                f"{folder} was trained on the item vectors of another backbone; give its "
                "--backbone, or distil again from this one"
            )
        if not permuted:
            stop(
                f"{folder} was trained with --permute-vectors, so its maps have learnt nothing of "
                "the items' own vectors; add --permute-vectors, or leave --maps out"
            )
    of_this_run = ADDED | CARRIED  # the first begin anew, the others come with the soft prompt
    own = {name: t for name, t in tensors.items() if name not in of_this_run}
    lm.items.maps.load_state_dict({**lm.items.maps.state_dict(), **own})


def keep_maps(lm: LM, folder: Path | str) -> None:
    """Sets the maps to those of a run on a log with fewer items, whose vectors were as wide."""
    E, tensors = read_items(lm, folder, None)
    if E.shape[1] != lm.items.E.shape[1]:
        stop(
            f"{folder} reads item vectors of width {E.shape[1]}, those of the backbone now are "
            f"{lm.items.E.shape[1]} wide; give the --backbone that train_backbone.py --from makes "
            "of its own"
        )
    lm.items.maps.load_state_dict(tensors)


def first_maps(
    lm: LM, cfg: SimpleNamespace, backbone_run: Path | str, n_items: int, inner: int
) -> torch.nn.ModuleDict:
    """The maps that train beside the adapters, as a ModuleDict: between item vectors and the LM,
    and behind so many `inner` blocks of it."""
    torch.manual_seed(cfg.seed)
    load_items(lm, backbone_run, n_items, inner)
    if cfg.maps:  # what stage 1 distilled into them
        load_maps(lm, cfg.maps, n_items, cfg.permute_vectors)
    if cfg.permute_vectors:
        permute(lm)
    return lm.items.maps


def share_maps(lm: LM, teacher: LM) -> None:
    """Sets the maps to the teacher's (ours), whose states the student `lm` is to meet."""
    maps = lm.items.maps
    maps.load_state_dict({**maps.state_dict(), **teacher.items.maps.state_dict()})
    lm.set_items(Items(teacher.items.E, maps, lm.items.folds))
    teacher.items.folds = lm.items.folds  # both read the same prompts


def item_space(lm: LM, x_ND: torch.Tensor) -> torch.Tensor:
    """The LM's states in the space of the backbone's item vectors, (N, de): E4SRec's second map."""
    return lm.items.maps["out"](x_ND.float())
