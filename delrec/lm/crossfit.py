"""Cross-fitting of an LM: runs that were trained without a part of the users answer for those
users' training samples, so what a student reads of a sample comes from an LM that has not seen it.

The folds of the users are the backbone's own (train_backbone.py --folds). A run of finetune.py or
distill.py --without-fold leaves out one or several of them: two runs, each without half of the
folds, answer for everybody at the price of two trainings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import Data, users, with_lists
from delrec.lm.listed import backbone_digest, backbone_of
from delrec.lm.lists import so_that_it_has_folds
from delrec.lm.model import is_lm_run
from delrec.lm.prompts import DEFAULTS, settings_of_run
from delrec.lm.text import digest
from delrec.runtime import Run, folder_of, load_run, place_of, read_tensors, stop

COUNTED = "co-occurrence"  # the teacher of --kd that is no run

# --------------------------------------------------------------- a run that leaves users out


def user_folds(backbone_run: Path | str, data: Data) -> np.ndarray:
    """The fold 0..K-1 of each user (U,), as a backbone's run folder holds it."""
    path = Path(backbone_run) / "folds.safetensors"
    if not path.exists():
        stop(
            f"{backbone_run} has no folds of users (no folds.safetensors); "
            + so_that_it_has_folds(backbone_run)
        )
    fold = read_tensors(path, "fold").get("fold")
    if fold is None or fold.shape != (data.n_users,):
        stop(
            f"{path} does not hold the folds of {data.n_users} users; train the backbone again "
            "with train_backbone.py --folds 5"
        )
    return fold.numpy()


def folds_digest(fold_U: np.ndarray) -> str:
    """16 hex digits that tell one division of the users from another."""
    return digest(torch.from_numpy(fold_U))


def settle_folds(
    cfg: SimpleNamespace, data: Data, prompt_run: Run | None = None, teacher_run: Run | None = None
) -> None:
    """Checks --without-fold, and notes the folds in cfg.folds_digest: a part of what the run was
    made with. What it begins with or learns from must not have seen those users either."""
    if not cfg.without_fold:
        return
    _, backbone_run = backbone_of(cfg.backbone, data, prompt_run)
    fold_U, left_out = user_folds(backbone_run, data), set(cfg.without_fold)
    K = int(fold_U.max()) + 1
    if max(left_out) >= K or len(left_out) == K:
        stop(
            f"--without-fold {' '.join(map(str, sorted(left_out)))}: {backbone_run} has the folds "
            f"0 to {K - 1}; leave out some of them, not all"
        )
    cfg.without_fold, cfg.folds_digest = sorted(left_out), folds_digest(fold_U)
    named = filter(None, [getattr(cfg, "maps", None), is_lm_run(cfg.llm) and cfg.llm])
    for run in filter(None, [teacher_run, prompt_run, *map(load_run, named)]):
        same = getattr(run, "folds_digest", None) == cfg.folds_digest
        seen = left_out - set(getattr(run, "without_fold", None) or ()) if same else left_out
        if seen:
            stop(
                f"--without-fold: {run.folder} has seen the users of fold {numbers(seen)}, and "
                "this run would learn of them from it; train it with the same --without-fold, or "
                "leave it out"
            )


def may_learn_from(cfg: SimpleNamespace, data: Data, backbone_run: Path | str) -> np.ndarray:
    """The training samples (places in data.train, sorted) that a run may learn from."""
    known = np.arange(len(data.train))
    told = getattr(cfg, "residual", None) or getattr(cfg, "user_states", None)
    states_of = [backbone_run] if told else []
    for place in (*states_of, *runs_of(cfg)):  # without a list there is no state either
        known = np.intersect1d(known, with_lists(place, data))
    if not cfg.without_fold:
        return known
    fold_n = user_folds(backbone_run, data)[users(data, data.train[known])]
    return known[~np.isin(fold_n, cfg.without_fold)]


def runs_of(cfg: SimpleNamespace) -> list[Path]:
    """The folders of the runs among the teachers of --kd."""
    named = getattr(cfg, "kd", None) or ()
    return [folder_of("runs", name) for name in named if name != COUNTED]


# ---------------------------------------------------------------- who answers what


@dataclass
class Part:
    """Training samples that one run answers."""

    run: Run
    fold: int | None  # of their users, whose item vectors are shown; None: the full backbone's
    samples: np.ndarray  # places in data.train


def parts_of(run: Run, names: Sequence[str], data: Data, which: np.ndarray) -> list[Part]:
    """Who answers the training samples `which`: the run itself or, where `names` are given, of
    those runs the one that has not seen the sample's user."""
    if not names:
        return [Part(run, None, which)]
    fold_U = user_folds(run.backbone_run, data)
    runs = [load_run(name, data, stages=["finetune"]) for name in names]
    for other in runs:
        must_belong(other, run, fold_U)
    answers = {}
    for other in runs:
        for fold in other.without_fold:
            answers.setdefault(fold, other)
    if missing := set(range(int(fold_U.max()) + 1)) - answers.keys():
        stop(
            f"--folds: no run was trained without the users of fold {numbers(missing)}, so nobody "
            f"can answer for them; train one with finetune.py "
            f"--without-fold {min(missing)} --backbone {run.backbone_run} and the other flags of "
            f"{run.folder}"
        )
    fold_n = fold_U[users(data, data.train[which])]
    return [
        Part(other, fold, which[fold_n == fold])
        for other in runs
        for fold in other.without_fold
        if answers[fold] is other
    ]


def must_belong(other: Run, run: Run, fold_U: np.ndarray) -> None:
    """Stops unless a run was trained without a part of the users, on the folds that the backbone of
    `run` has now, and reads the same prompts."""
    for each in (run, other):
        if getattr(each, "residual", None):
            stop(
                f"--folds: {each.folder} adds to the scores of its full backbone, which has seen "
                "everybody; use runs of finetune.py without --residual"
            )
        if getattr(each, "user_states", None):
            stop(
                f"--folds: the items of {each.folder} carry the states of its full backbone, which "
                "has seen everybody; use runs on a soft prompt of distill.py without --user-states"
            )
    if not getattr(other, "without_fold", None):
        stop(
            f"--folds: {other.folder} was trained on all users; name runs of finetune.py "
            "--without-fold"
        )
    theirs, now = other.backbone_digest, backbone_digest(run.backbone_run)
    if theirs != now or other.folds_digest != folds_digest(fold_U):
        stop(
            f"--folds: {other.folder} was trained on the folds of another backbone than "
            f"{run.backbone_run}, that of {run.folder}, holds now; train it again with "
            f"finetune.py --backbone {run.backbone_run} --overwrite and its other flags as before"
        )
    for key in DEFAULTS:
        theirs, ours = (settings_of_run(one)[key] for one in (other, run))
        if theirs != ours:
            stop(
                f"--folds: {other.folder} was trained with {key} {theirs}, {run.folder} with "
                f"{ours}; their answers cannot be put together"
            )


def told(parts: list[Part]) -> dict:
    """What an export's meta.json says of who answered: {run: what it left out, when it was
    trained}; empty where the run answered for itself."""
    answered = {
        place_of(part.run, part.run.folder): {
            "without_fold": part.run.without_fold,
            "trained": getattr(part.run, "seconds", 0),
            "best_step": getattr(part.run, "best_step", 0),
        }
        for part in parts
        if part.fold is not None
    }
    return {"out_of_fold": answered}


def numbers(folds: set[int]) -> str:
    """Numbers of folds as text."""
    return ", ".join(map(str, sorted(folds)))
