"""A run as a folder that can be shared (evaluate.py --card): README.md, and beside the weights what
answering needs, as JSON and safetensors.

    items.json            titles, raw ids, further columns, order of popularity; no user, no history
    neutral.safetensors   what calibration subtracts
    backbone/             where a run answers by its backbone: the weights, and what they are
    .gitignore            what stays at home: all that is read only by tables
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from delrec.backbone.models import is_ours, must_be_ours
from delrec.backbone.ranking import must_hold_model
from delrec.data.prepared import Data
from delrec.data.shared import ITEMS, write_items
from delrec.data.terms import terms_of
from delrec.lm.export import ranks_all
from delrec.lm.prompts import must_have_words
from delrec.lm.residual import keep_backbone
from delrec.places import BACKBONE
from delrec.runtime import (
    Run,
    adding_to,
    is_run,
    load_run,
    must_be_writable,
    read_json,
    read_npy,
    stop,
    stop_if_replaced,
    usual_run,
    write_tensors,
    write_text,
)
from delrec.serving.card_text import card_text

# git and the Hub leave out what is not named; the Hub reads this file at an upload
IGNORED = """# what is shared of this run; see README.md
*
!*/
!/.gitignore
!/README.md
!*.json
!*.safetensors
/export/
/folds.safetensors
"""


def write_card(run: Run, data: Data, table: Path, overwrite: bool = False) -> None:
    """Makes a run's folder one that can be shared, and says what to look at before. table: the
    folder of the table that the card shows, if it is there; overwrite: a README.md anew.
    """
    readme = run.folder / "README.md"
    if readme.exists() and not overwrite:
        stop(f"{readme} is there already, and may hold your own words; --overwrite writes it anew")
    if run.stage == "train_backbone":
        must_hold_model(run)
        must_be_ours(run)
    else:
        must_have_words(run, data)
    must_be_writable(run.folder)
    text = card_text(run, data, table)  # before a file says that the folder is one that is shared
    with adding_to(run.folder):
        stop_if_replaced(run)
        write_items(data, run.folder)
        share_neutral(run, data)
        backbone = share_backbone(run, data)
        write_text(run.folder / ".gitignore", IGNORED)
        write_text(readme, text)
    print(f"written: {readme}, {ITEMS}" + (f", {BACKBONE}/" if backbone else ""))
    for line in to_look_at(run, data, backbone):
        print(line)
    print(f"share it with: hf upload OWNER/NAME {run.folder}", flush=True)


def share_neutral(run: Run, data: Data) -> None:
    """Writes what a run's calibration subtracts as safetensors."""
    if not getattr(run, "calibration", 0):
        return
    neutral_I = read_npy(run.folder / "neutral.npy", (data.n_items + 1,))
    neutral_I = torch.from_numpy(np.array(neutral_I, np.float32))
    write_tensors(run.folder / "neutral.safetensors", {"neutral": neutral_I})


def asks_backbone(run: Run) -> bool:
    """True for a run that answers by its backbone: it ranks the best of those, or its items are
    alike by the backbone's vectors.
    """
    if run.stage == "train_backbone":
        return False
    if run.stage != "lm" and not (run.folder / "items.safetensors").exists():
        return True
    return not ranks_all(run)


def share_backbone(run: Run, data: Data) -> Path | None:
    """Where the backbone of a run stands now, inside its folder; None where it asks none, or there
    is none of the same data and of ours.
    """
    if not asks_backbone(run):
        return None
    source = Path(getattr(run, "backbone_run", None) or usual_run(data, "sasrec", [run]))
    if not is_run(source):
        return None
    backbone, has_weights = load_run(source), (source / "model.safetensors").exists()
    if backbone.data_hash != data.meta["hash"] or not has_weights or not is_ours(backbone):
        return None
    return keep_backbone(source, run.folder)


# ---------------------------------------------------------------- what to look at before


def to_look_at(run: Run, data: Data, backbone: Path | None) -> Iterator[str]:
    """Yields what is to be said before a run is shared."""
    terms = terms_of(data.meta)
    if terms.forbidden:
        yield (
            f"WARNING: {data.name} may not be redistributed without permission ({terms.said}), and "
            f"{ITEMS} holds its titles: do not make this folder public unless you have it"
        )
    elif terms.known:
        yield f"the terms of {data.name}: {terms.said}; {ITEMS} holds its titles"
    else:
        yield f"the terms of {data.name} are not known here; look before you share"
    if asks_backbone(run) and not backbone:
        yield "no backbone of it is here to be shared: whoever loads it gives pool=0 (slower)"
    if getattr(run, "residual_counts", False):
        yield (
            "it counts in the log (finetune.py --residual-counts), which is not shared: whoever "
            "loads it needs the prepared data"
        )
    named = {str(p.relative_to(run.folder)) for p in shared_json(run.folder) if names_a_place(p)}
    if named:
        yield f"{', '.join(sorted(named))} name folders of this machine; look before you share"


def shared_json(folder: Path) -> list[Path]:
    """The JSON files of a run's folder that are shared, without the items."""
    found = folder.rglob("*.json")
    return [p for p in found if p.name != ITEMS and p.relative_to(folder).parts[0] != "export"]


def names_a_place(path: Path) -> bool:
    """Does a JSON file name a folder of this machine by its whole path?"""
    return any(os.path.isabs(text) and os.path.exists(text) for text in texts_in(read_json(path)))


def texts_in(value: Any) -> Iterator[str]:
    """Yields the texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)
