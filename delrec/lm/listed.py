"""The backbone an LM run lists its candidates by: is it still the one the run was trained with?

A run of distill.py or finetune.py stores backbone_digest. `listed_by.json` in its folder says
with which backbone the scores were made that an evaluation stored there. Runs without a digest,
which earlier versions made, say nothing.
"""

import hashlib
from pathlib import Path

from delrec.data.prepared import Data
from delrec.lm.prompts import lists_candidates, settings_of_run
from delrec.names import NAMES
from delrec.processes import Ranks
from delrec.runtime import (
    Run,
    complete_renames,
    folder_of,
    load_run,
    read_json,
    usual_run,
    when,
    write_json,
)


def backbone_of(name: str | None, data: Data, prompt_run: Run | None = None) -> tuple[str, Path]:
    """The conventional model: what the prompt calls it, and its run folder. It must be of the same
    data: its split says what it has seen. name: the folder; the soft prompt's own, or
    runs/<dataset>/sasrec if None."""
    name = name or (prompt_run and prompt_run.backbone_run)
    folder = folder_of("runs", name) if name else usual_run(data, "sasrec")
    if prompt_run:
        return prompt_run.settings["backbone"], folder
    model = "sasrec"
    if (folder / "config.json").exists():
        model = getattr(load_run(folder, data, stages=["train_backbone"]), "model", "sasrec")
    return NAMES.get(model, model), folder


def backbone_digest(folder: Path | str) -> str | None:
    """16 hex digits of a backbone: of its weights, else of its lists; None where there is none."""
    complete_renames(Path(folder), "config.json")
    for name in ("model.safetensors", "topk_train.npy"):
        if found := digest_of_file(Path(folder) / name):
            return found
    return None


def lists_digest(folder: Path | str) -> str | None:
    """16 hex digits of a backbone's lists of training samples, which also say what samples it
    lists; None where it wrote none."""
    return digest_of_file(Path(folder) / "topk_train.npy")


def digest_of_file(path: Path) -> str | None:
    """16 hex digits of what a file holds; None where there is none."""
    if not path.exists():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def shows_backbone(run: Run) -> bool:
    """True for a run whose prompts list the candidates in its backbone's order, or hint at what it
    would choose."""
    s = settings_of_run(run)
    return s["order"] == "backbone" and lists_candidates(s) or s["hint"] != "none"


def digest_now(run: Run) -> str | None:
    """The digest of the backbone that a run's scores depend on; None if they depend on none."""
    if not shows_backbone(run) or not getattr(run, "backbone_digest", None):
        return None
    return backbone_digest(run.settings["backbone_run"])


def noted(run: Run) -> dict[str, str | None]:
    """{name of stored scores: digest of the backbone they were made with}."""
    path = run.folder / "listed_by.json"
    made = {p.stem: run.backbone_digest for p in run.folder.glob("scores_val_*.npy")}
    return made | (read_json(path) if path.exists() else {})


def note(run: Run, name: str, digest: str | None) -> None:
    """Stores which backbone the scores `name` were made with."""
    write_json(run.folder / "listed_by.json", noted(run) | {name: digest})


def say_if_another(run: Run, ranks: Ranks) -> None:
    """Prints one line if the backbone of an LM run is not the one it, or its scores, knew."""
    trained = getattr(run, "backbone_digest", None)
    if not ranks.main or not trained or run.stage not in ("distill", "finetune"):
        return
    now = backbone_digest(run.backbone_run)
    stored = noted(run) if shows_backbone(run) else {}
    others = sorted(name for name, digest in stored.items() if digest != now)
    if now is None or (now == trained and not others):
        return
    about = f"the backbone {run.backbone_run} of {run.folder} is another than "
    about += "the run was trained with" if now != trained else "some of its scores were made with"
    backbone = Path(run.backbone_run)
    if (backbone / "config.json").exists():
        about += f" (it was trained {when(load_run(backbone))})"
    if not shows_backbone(run):
        means = "what the run learned is of the earlier one; the scores it gives do not change"
    elif now == trained:
        means = f"{', '.join(others)} stand as they were made, new scores follow the one there now"
    else:
        means = (
            "the run lists its candidates in another order than it learned, or hints at others, "
            "so train it again, or bring the earlier backbone back"
        )
        if others:
            means += f"; {', '.join(others)} stand as they were made"
    print(f"note: {about}: {means}", flush=True)
