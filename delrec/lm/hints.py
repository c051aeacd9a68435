"""What a prompt shows of a backbone: the order of its candidates, a hint, or the candidates.

--hint is RecRanker's (arXiv 2312.16018): the titles that another recommender puts
first among the candidates. --pool backbone is LlamaRec's (arXiv 2311.02089): the candidates are the
backbone's own list. What of this stands in a training prompt is out of fold where the backbone has
folds (docs/out_of_fold.md).
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import Data, candidates, with_lists
from delrec.data.run_files import lists_in, scores_in
from delrec.lm.prompts import lists_candidates, settings_of_run
from delrec.processes import Ranks
from delrec.runtime import Run, load_run, stop

HINTED = 5  # titles of a hint
SEED = 11  # of orders, beside a run's own seed


@dataclass
class Shown:
    """What of a ranker is asked here: a finished run tells it without its LM."""

    settings: dict
    data: Data
    backbone_run: str  # the backbone's folder
    order: str  # of listed candidates
    show: bool  # are candidates listed?
    shuffled: bool = False  # are histories shown in a random order?


def of_run(run: Run, data: Data) -> Shown:
    """What a finished run's prompts show."""
    s = settings_of_run(run)
    return Shown(s, data, s["backbone_run"], s["order"], lists_candidates(s))


def pooled(cfg: SimpleNamespace) -> bool:
    """True where training prompts list the backbone's own list (--pool backbone)."""
    return cfg.pool == "backbone"


def reads_lists(cfg: SimpleNamespace) -> bool:
    """True where training prompts hold what a backbone said of the sample."""
    return cfg.order == "backbone" or pooled(cfg) or cfg.hint != "none"


def say_what_differs(cfg: SimpleNamespace, ranks: Ranks) -> None:
    """Prints what a run in the style of a paper leaves out or does otherwise, a line each
    (docs/methods.md says more)."""
    if ranks.main and cfg.hint != "none":
        print(
            "RecRanker-style, its list task: no dislikes and no scores of one title, as there are "
            "no ratings; no pairs, no clusters of users; our words",
            flush=True,
        )
    if ranks.main and (pooled(cfg) or cfg.loss == "letter"):
        print(
            "LlamaRec-style: the step is chosen among the stored candidates of validation, not in "
            "pools; AdaLoRA for LoRA; our words",
            flush=True,
        )


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant: [(is it so?, sentence)]."""
    listed = lists_candidates(vars(cfg))
    sorted_by = cfg.order == "backbone"
    typed_here = not (cfg.teacher or cfg.from_run)  # else the order is another run's
    asks_none = cfg.loss in ("catalogue", "titles") and not listed
    return [
        (
            (cfg.hint != "none" or cfg.orders > 1) and not listed,
            "--hint and --orders are about the candidates that a prompt lists, but none are; add "
            "--show or --verbalizer letter, or leave them out",
        ),
        (
            sorted_by and typed_here and not listed,
            "--order backbone sorts the candidates that a prompt lists, but none are; add --show "
            "or --verbalizer letter, or leave it out",
        ),
        (
            # with --from both are that run's; a teacher's are not its student's
            cfg.pool == "backbone" and asks_none and not cfg.from_run,
            f"--pool backbone is about the candidates of a training prompt, but --loss {cfg.loss} "
            "asks for none and none are listed; add --show, use --loss candidates, or leave "
            "--pool out",
        ),
        (
            cfg.hint == "permuted" and cfg.without_fold,
            "--hint permuted may show a sample the hint of a user that --without-fold leaves out; "
            "leave one of them out",
        ),
        (
            cfg.orders > 1 and sorted_by,
            f"--orders {cfg.orders} moves the candidates, --order backbone sorts them; leave one "
            "of them out",
        ),
        (
            cfg.orders > cfg.C,
            f"--orders {cfg.orders} moves a list of {cfg.C} candidates to more places than it has; "
            f"use at most {cfg.C}",
        ),
        (
            cfg.pool == "backbone" and sorted_by,
            "--pool backbone puts the truth into a list that lacks it, and in --order backbone it "
            "would always stand last there; use --order shuffled",
        ),
        (
            cfg.loss == "letter" and cfg.verbalizer != "letter",
            f"--loss letter trains letters, --verbalizer {cfg.verbalizer} reads none; use "
            "--verbalizer letter",
        ),
        (
            cfg.loss == "letter" and (cfg.teacher or cfg.lambda_ms),
            "--loss letter reads two states a prompt, --teacher and --lambda-ms compare at one; "
            "use --loss candidates",
        ),
    ]


# ---------------------------------------------------------------- orders


def listing(r: Shown, split: str, C: int, which: np.ndarray) -> np.ndarray:
    """The order in which the prompt lists the candidates of some samples of a split, as places in
    the stored rows: int64 (n, C)."""
    if r.order == "shuffled" or not r.show:
        return np.broadcast_to(np.arange(C), (len(which), C))
    return by_backbone(r, split, C, which)


def by_backbone(r: Shown, split: str, C: int, which: np.ndarray) -> np.ndarray:
    """The stored candidates of some samples, the backbone's best first, as places in the stored
    rows: int64 (n, C)."""
    name = f"scores_{split}_{C}{'_shuffled' if r.shuffled else ''}.npy"
    path = Path(r.backbone_run) / name
    if not path.exists():
        stop(
            f"candidates in the backbone's order need {path}; train the backbone with "
            "train_backbone.py, or the LM with finetune.py --order shuffled --hint none"
        )
    must_be_of_data(r.backbone_run, r.data)
    score_nC = scores_in(path, r.data, split, C)[which]
    return np.argsort(-score_nC, axis=1, kind="stable")


def must_be_of_data(backbone_run: Path | str, data: Data) -> None:
    """Stops where a backbone is of another preparation: what it stored is of other samples."""
    if (Path(backbone_run) / "config.json").exists():
        load_run(backbone_run, data)


def moved(C: int, orders: int) -> list[np.ndarray]:
    """So many orders of C places, each begun C / orders places after the one before: with C of
    them every candidate stands once at every place, and what an LM thinks of a place cancels."""
    return [(np.arange(C) + k * C // orders) % C for k in range(orders)]


def anew(rows_nC: np.ndarray, seed: int, number_n: np.ndarray) -> np.ndarray:
    """Rows in another order each, that belongs to a seed and the row's number."""
    rngs = [np.random.default_rng([SEED, seed, int(number)]) for number in number_n]
    return np.stack([rng.permutation(row) for rng, row in zip(rngs, rows_nC)])


# ---------------------------------------------------------------- pools


def pool_of(folder: Path | str, data: Data, split: str, C: int, which: np.ndarray) -> np.ndarray:
    """A backbone's C best items after some samples of a split, best first, none of the history:
    int64 (n, C)."""
    path = Path(folder) / f"topk_{split}.npy"
    if not path.exists():
        stop(f"a pool needs {path}, the backbone's lists; train it with train_backbone.py")
    must_be_of_data(folder, data)
    lists = lists_in(path, data, split, which)
    if lists.shape[1] < C:
        stop(
            f"{folder} lists {lists.shape[1]} items a sample, a pool of {C} needs more; train it "
            f"again with train_backbone.py --top-h {C} --overwrite and its other flags as before"
        )
    pool_nC = lists[:, :C].astype(np.int64)
    if not pool_nC.all():
        stop(f"{path} lists fewer than {C} items for some samples; lower --candidates")
    return pool_nC


def with_truth(pool_nC: np.ndarray, target_n: np.ndarray) -> np.ndarray:
    """Pools to train on: where one lacks the truth, its last item gives way to it."""
    lacks_n = ~(pool_nC == target_n[:, None]).any(1)
    pool_nC = pool_nC.copy()
    pool_nC[lacks_n, -1] = target_n[lacks_n]
    return pool_nC


# ---------------------------------------------------------------- hints


def hints_of(
    r: Shown, split: str, C: int, which: np.ndarray, pool: bool = False
) -> np.ndarray | None:
    """What the prompts of some samples of a split say the backbone would choose, int64 (n, h), best
    first; None where they say nothing. pool: of its own list, not of the stored candidates."""
    kind = r.settings["hint"]
    if kind == "none":
        return None
    asked = others_of(r, split, which) if kind == "permuted" else which
    if pool:
        best_nC = pool_of(r.backbone_run, r.data, split, C, asked)
    else:
        place_nC = by_backbone(r, split, C, asked)
        best_nC = np.take_along_axis(candidates(r.data, split, C, asked), place_nC, 1)
    hint_nh = best_nC[:, :HINTED]
    return anew(hint_nh, 0, which) if kind == "shuffled" else hint_nh


def others_of(r: Shown, split: str, which: np.ndarray) -> np.ndarray:
    """For each sample the one half the split away, and so another user's: the control of a hint."""
    listed = np.arange(len(getattr(r.data, split)))
    if split == "train":
        listed = with_lists(r.backbone_run, r.data)
    return listed[(np.searchsorted(listed, which) + len(listed) // 2) % len(listed)]


def hint_of_best(settings: dict, best_nC: np.ndarray) -> np.ndarray | None:
    """What prompts say the backbone would choose, int64 (n, h), of candidates that are given best
    first, where nobody's sample is asked; None where they say nothing."""
    kind = settings["hint"]
    if kind == "none":
        return None
    if kind == "permuted":
        stop(
            "the run reads another user's hint, a control that only evaluate.py's table can score; "
            "name a run of finetune.py --hint backbone"
        )
    hint_nh = best_nC[:, :HINTED]
    return anew(hint_nh, 0, np.arange(len(hint_nh))) if kind == "shuffled" else hint_nh
