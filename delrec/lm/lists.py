"""A backbone's lists, what stage 1 learns from: what it would show next after every sample."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import Data, with_lists
from delrec.data.run_files import lists_in
from delrec.names import NAMES
from delrec.runtime import (
    Run,
    complete_renames,
    folder_of,
    is_another_meant,
    load_run,
    stop,
    usual_run,
)


@dataclass
class Lists:
    """What a backbone would show next after every training and validation sample."""

    folder: Path  # its run
    backbone: str  # as prompts call it
    train: np.ndarray  # items, best first, int32 (n, h); 0 where it wrote none
    val: np.ndarray
    folds: int = 0  # train is what so many models say that had not seen the sample's user
    learnt: bool = True  # is it a model that was trained on those samples at all?

    def top(self, split: str, which: np.ndarray, h: int) -> np.ndarray:
        """The first h of the lists of some samples of a split."""
        return getattr(self, split)[which][:, :h]


def read_lists(name: str | None, data: Data, train_it: str) -> Lists:
    """The lists in a backbone's run folder; runs/<dataset>/sasrec if `name` is None. train_it: the
    options that train_backbone.py needs to make the folder."""
    folder = folder_of("runs", name) if name else usual_run(data, "sasrec")
    complete_renames(folder, "config.json")
    if not (folder / "config.json").exists():
        named, other = (f" --out {name}", is_another_meant(name)) if name else ("", "")
        train = f"python train_backbone.py {train_it}{named}"
        stop(f"no backbone in {folder}{other}; train it with: {train}")
    run = load_run(folder, data, stages=["train_backbone"])
    arrays = {}
    for split in ("train", "val"):
        path = folder / f"topk_{split}.npy"
        if not path.exists():
            stop(
                f"{folder} lacks topk_{split}.npy, the backbone's lists; train it again "
                "with train_backbone.py --overwrite and its other flags as before"
            )
        arrays[split] = lists_in(path, data, split)
    model = getattr(run, "model", "the recommender")
    folds = getattr(run, "folds", 0)
    return Lists(folder, NAMES.get(model, model), **arrays, folds=folds, learnt=has_learnt(run))


def has_learnt(run: Run) -> bool:
    """True for a backbone that was trained on its training samples; LLMSEQSIM was not."""
    return getattr(run, "optimiser", None) != "none"


def so_that_it_has_folds(folder: Path | str) -> str:
    """What to do about a backbone's run that has no folds, the end of a sentence."""
    folder = Path(folder)
    if (folder / "config.json").exists() and not has_learnt(load_run(folder)):
        return "it is of a model that is not trained, so it has none; name another backbone"
    return "train the backbone with train_backbone.py --folds 5"


def said_of_folds(folder: Path | str, folds: int, learnt: bool = True) -> str:
    """Whether what a backbone says of training samples is out of fold, as a line."""
    if folds:
        return (
            f"{folder}: training samples are answered out of fold, by models that had not seen "
            f"their user ({folds} folds)"
        )
    if not learnt:
        return f"{folder}: training samples are answered by what was trained on none of them"
    return (
        f"{folder}: training samples are answered by the model that was trained on them, so "
        "it knows the truth too often; train_backbone.py --folds 5, from scratch, does not"
    )


def must_list(lists: Lists, cfg: SimpleNamespace, data: Data) -> None:
    """Stops where a backbone's lists are too short or too few for stage 1, or the catalogue is."""
    if lists.train.shape[1] < cfg.h:
        stop(
            f"{lists.folder} lists {lists.train.shape[1]} items per sample, --h is {cfg.h}; "
            f"train it again with train_backbone.py --top-h {cfg.h} --overwrite and its other "
            "flags as before"
        )
    if cfg.input == "ids" and (n := len(with_lists(lists.folder, data))) < len(data.train):
        stop(
            f"--input ids asks for the backbone's list after every item; {lists.folder} lists {n} "
            f"of {len(data.train)} training samples: train it again with "
            f"train_backbone.py --lists {len(data.train)} --overwrite and its other flags as "
            "before"
        )
    must_be_full(lists, cfg.h, ("train", "val"), "lower --h to {}")
    if data.n_items < cfg.C + cfg.h:
        stop(
            f"{cfg.C} candidates outside a list of {cfg.h} need {cfg.C + cfg.h} items, the "
            f"catalogue has {data.n_items}; lower --candidates or --h"
        )


def must_be_full(lists: Lists, h: int, splits: tuple[str, ...], so: str) -> None:
    """Stops where 0 stands in the first h places of a list that was written: its user took nearly
    all of a small catalogue. so: what to do, {} the length that all have."""
    for split in splits:
        list_nh = getattr(lists, split)[:, :h]
        length_n = np.count_nonzero(list_nh, axis=1)
        length_n = length_n[length_n > 0] if split == "train" else length_n  # those of --lists
        short = length_n < list_nh.shape[1]
        if short.any():
            least = length_n.min()
            stop(
                f"{lists.folder}/topk_{split}.npy lists fewer than {list_nh.shape[1]} items for "
                f"{short.sum()} samples, whose users took nearly all others; "
                + (so.format(least) if least else "leave such users out of the log")
            )
