"""The plain LM (evaluate.py --llm): a run without any training, but for its calibration, whose
weight is chosen on validation.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import Data, halves_of_validation, subset
from delrec.evaluation.scores import Scorer
from delrec.lm.calibration import calibrate, neutral_scores
from delrec.lm.model import LM, load_lm
from delrec.lm.prompts import DEFAULTS
from delrec.lm.ranker import Ranker, make_ranker, penalty_of, reads_all, score_samples
from delrec.lm.wording import wording_of
from delrec.processes import Ranks
from delrec.runtime import (
    Run,
    complete_renames,
    config_of_run,
    is_run,
    load_run,
    place_of_new,
    read_npy,
    stop,
    when,
    write_npy,
)
from delrec.training.claims import claim
from delrec.training.run_folders import finish_run, start_run

WORDS = "prompt_words"
CHOSEN = {"val_samples", "calibrate"}  # of a run: what its calibration is chosen on


def plain_lm(cfg: SimpleNamespace, data: Data, scorer: Scorer) -> Run:
    """--llm: the LM without any training, as a finished run; one that was made the same way is used
    again, with what was scored by it.
    """
    ranks = scorer.ranks
    folder = place_of_new("runs", cfg.llm_out or f"{data.folder_name}/lm")
    lm = load_lm(cfg.llm, ranks.device, shard=cfg.shard, checked=cfg.check_llm)
    made = made_of(cfg, lm, data)
    ranker = make_ranker(lm, data, made["settings"])
    if not made_the_same_way(folder, made, cfg.overwrite, ranks):
        known = scored_before(folder, made)
        asked = {key: made[key] for key in ("llm", "C", "val_samples", "calibrate")}
        asked = SimpleNamespace(**asked, resume=False, overwrite=cfg.overwrite)
        claim(folder, asked, ranks)
        new, record = start_run(folder, "lm", asked, data, ranks)
        found = calibrated(ranker, asked, scorer, known.pop(f"scores_val_{cfg.C}", None))
        if not stays_true(folder, ranker, found.weight):
            known = {}
        if ranks.main:
            write_npy(new / "neutral.npy", found.neutral_I)
            write_npy(new / f"scores_val_{cfg.C}.npy", found.score_nC)
            for name, scores in known.items():
                write_npy(new / f"{name}.npy", scores)
            made |= {"calibration": found.weight, "soft_prompt": "none"}
            finish_run(folder, record | made | {"out": str(folder)})
        if ranks.world > 1:
            torch.distributed.barrier()
    return open_plain(folder, ranker, scorer)


def made_of(cfg: SimpleNamespace, lm: LM, data: Data) -> dict:
    """What the run is made of, as its config.json says it: two of the same score alike."""
    settings = {
        "verbalizer": cfg.verbalizer,
        "show": cfg.show,
        "order": "shuffled",
        "backbone_run": "",
        "history": cfg.prompt_history,
        "max_title": 32,
        "max_tokens": 1024,
        "backbone": "",
        "allow_unknown": cfg.allow_unknown,
    }
    return {
        "llm": cfg.llm,
        "llm_fingerprint": lm.identity,
        "C": cfg.C,
        "val_samples": cfg.val_samples,
        "calibrate": cfg.calibrate,
        "settings": settings | {"wording": wording_of(DEFAULTS | settings)},
        "data_hash": data.meta["hash"],
        WORDS: data.meta["words"],
    }


def made_the_same_way(folder: Path, made: dict, overwrite: bool, ranks: Ranks) -> bool:
    """True (a line says so) if `folder` holds the plain LM's run of these settings; a run of other
    settings is refused. With --overwrite always False.
    """
    complete_renames(folder, "config.json")
    if overwrite or not is_run(folder):
        return False
    have = config_of_run(folder)
    for key in differences(have, made):
        keeps = ", and keeps its scores that stay true" if key in CHOSEN else ""
        stop(
            f"{folder} holds a {have['stage']} run whose {key.replace('_', ' ')} was "
            f"{have.get(key)}, now it is {made[key]}; --overwrite replaces it{keeps}, --llm-out "
            "names another folder"
        )
    if ranks.main:
        print(
            f"{folder} was made the same way ({when(load_run(folder))}): its scores are used again",
            flush=True,
        )
    return True


def differences(have: dict, made: dict) -> list[str]:
    """In what a stored run differs from one that would be made now. The LM is known by what it
    holds, not by where it stands."""
    same_lm = have.get("llm_fingerprint") == made["llm_fingerprint"]
    return [key for key in made if have.get(key) != made[key] and not (key == "llm" and same_lm)]


def scored_before(folder: Path, made: dict) -> dict[str, np.ndarray]:
    """{name: array} of the scores that the run in `folder` holds, where a new one would score the
    same and differs in nothing but its calibration; else nothing."""
    if not is_run(folder):
        return {}
    differ = differences(config_of_run(folder), made)
    if not differ or set(differ) - CHOSEN:
        return {}
    kept = [f"scores_val_{made['C']}", f"scores_test_{made['C']}", "full_test", "topk_test"]
    return {x: np.array(read_npy(p)) for x in kept if (p := folder / f"{x}.npy").exists()}


def stays_true(folder: Path, ranker: Ranker, weight: float) -> bool:
    """Whether what the run in `folder` says of the test part holds with another calibration. An LM
    that reads the whole catalogue at once has ranked it with its own, in the pass that scored the
    candidates: with another weight both are made again.
    """
    if not is_run(folder) or not reads_all(ranker):
        return True
    return config_of_run(folder).get("calibration") == weight


@dataclass
class Calibrated:
    """What the plain LM's run folder holds beside its configuration."""

    neutral_I: np.ndarray  # each title's score with no history
    score_nC: np.ndarray  # of the validation part, NaN where nobody asked
    weight: float  # of the neutral score, which is subtracted


def calibrated(
    ranker: Ranker, cfg: SimpleNamespace, scorer: Scorer, known_nC: np.ndarray | None
) -> Calibrated:
    """Scores some validation samples of the first half and chooses the weight on them; without
    calibration it is 0, and nothing is scored. known_nC: scores of an earlier run, NaN where it
    asked nobody.
    """
    data, ranks, C = scorer.data, scorer.ranks, scorer.C
    neutral_I = np.zeros(data.n_items + 1, np.float32)
    score_nC = np.full((len(data.val), C), np.nan, np.float32) if known_nC is None else known_nC
    if not cfg.calibrate:
        return Calibrated(neutral_I, score_nC, 0.0)
    neutral_I = neutral_scores(ranker, ranks)
    first, _ = halves_of_validation(data)
    val = first[subset(len(first), cfg.val_samples, 0)]
    began, missing = time.time(), val[~np.isfinite(score_nC[val]).all(1)]
    if len(missing):
        score_nC[missing] = score_samples(ranker, "val", missing, C, ranks, name="lm val")
    scorer.prompts += len(missing)
    scorer.seconds += time.time() - began
    weight = calibrate(ranker, val, score_nC[val], neutral_I, ranks)
    return Calibrated(neutral_I, score_nC, weight)


def open_plain(folder: Path, ranker: Ranker, scorer: Scorer) -> Run:
    """The finished run of the plain LM, which stays in memory for the scorer."""
    run = load_run(folder, scorer.data)
    scorer.opened[run.folder] = ranker, penalty_of(run, scorer.data)
    return run
