"""Which items are alike: the cosine of what a run knows of them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from delrec.data.words import Words
from delrec.lm.counted import sparse_bags
from delrec.runtime import Run, is_run, load_run, read_tensors, stop, stop_if_replaced
from delrec.serving.catalogue import Catalogue


@dataclass(frozen=True)
class Likeness:
    """A vector of norm 1 for each item."""

    unit_IE: torch.Tensor  # fp32 (I+1, E), sparse where it is words
    by: str  # what the vectors are, in words

    def cosines(self, item: int) -> np.ndarray:
        """The cosine of every item with one, float32 (I+1,)."""
        own_E1 = self.unit_IE[item].to_dense()[:, None]
        return (self.unit_IE @ own_E1)[:, 0].numpy()


def likeness_of(run: Run, catalogue: Catalogue, loaded_IE: torch.Tensor | None) -> Likeness:
    """The item vectors of a run: a backbone's own; those an LM is shown, or its backbone's; where
    there are none the words of the titles. loaded_IE: those that its model holds (I+1, E); None
    where it is not loaded, or holds none.
    """
    folder = run.folder if loaded_IE is not None else folder_of_vectors(run)
    if folder is None:
        titles = catalogue.lookup.titles
        return Likeness(sparse_bags(Words(titles), titles), "the words of the titles")
    table_IE = loaded_IE if loaded_IE is not None else table_in(folder)
    if len(table_IE) != catalogue.data.n_items + 1:
        stop(
            f"{folder} holds the vectors of {len(table_IE) - 1} items by now, expected "
            f"{catalogue.data.n_items}: it was trained anew; load the run again"
        )
    if catalogue.added:
        titles = list(catalogue.added.values())
        new = catalogue.title_map.rows_of(table_IE.numpy(), titles)
        table_IE = torch.cat([table_IE, torch.from_numpy(new)])
    unit_IE = table_IE / table_IE.norm(dim=1, keepdim=True).clamp(min=1e-9)
    return Likeness(unit_IE, f"the item vectors of {folder}")


def folder_of_vectors(run: Run) -> Path | None:
    """The run whose item vectors a run goes by: itself, or its backbone; None where there is none
    of the same data.
    """
    if run.stage == "train_backbone" or (run.folder / "items.safetensors").exists():
        stop_if_replaced(run)
        return run.folder
    if run.stage == "lm":  # it was made without one
        return None
    own = Path(getattr(run, "backbone_run", None) or run.folder)
    if not is_run(own) or not (own / "model.safetensors").exists():
        return None
    return own if load_run(own).data_hash == run.data_hash else None


def table_in(folder: Path) -> torch.Tensor:
    """The item vectors of a run, fp32 (I+1, E)."""
    on_vectors = folder / "items.safetensors"
    if on_vectors.exists():
        return read_tensors(on_vectors, "E")["E"].float()[:, :-1]  # without the bias
    return read_tensors(folder / "model.safetensors", "item.weight")["item.weight"].float()
