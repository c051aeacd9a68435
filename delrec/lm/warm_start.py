"""Stage 2 that goes on from a finished run of finetune.py, on a log that has grown since (--from).

The run's adapter trains on at the ranks that AdaLoRA found for it, and so do the maps of item
vectors; its soft prompt stays. An item that the run never saw needs nothing: its title is read, or
its vector, which is the backbone's. The optimiser begins anew.
"""

from pathlib import Path
from types import SimpleNamespace

from delrec.data import grown
from delrec.data.grown import counted, known_before, said
from delrec.data.prepared import Data
from delrec.lm.listed import backbone_digest
from delrec.lm.model import located
from delrec.lm.prompts import DEFAULTS, must_have_words
from delrec.lm.ranker import own_files
from delrec.names import NAMES
from delrec.processes import Ranks
from delrec.runtime import Run, folder_of, is_run, load_run, stop, usual_run

# what shapes prompts and weights: it is the run's, and nothing else may be typed
FIXED = ("llm", *DEFAULTS, "k", "adapt", "init_r", "target_r", "alpha", "prune_end")
# of the training: the run's, unless something else is typed
TAKEN = ("loss", "samples", "C", "pool", "draw", "batch", "lr", "lr_maps", "lr_prompt")
TAKEN += ("weight_decay", "warmup")
TAKEN += ("dropout", "orthogonal", "val_samples", "evals", "calibrate", "allow_unknown")
# flags that say with what a run begins, or from what it learns
REFUSED = {
    "soft_prompt": "its own soft prompt stays",
    "maps": "its own maps train on",
    "teacher": "no teacher helps it",
    "kd": "no teachers help it",
    "layers": "it keeps its layers",
    "lambda_ms": "what its inner blocks say is not asked",
    "without_fold": "it has learnt of all users",
    "keep_rps": "a backbone that went on has no folds",
    "residual": "its scores are its own, and a backbone that went on has no folds",
    "paper": "its own choices stay",
}


def settle(cfg: SimpleNamespace, typed: set[str], data: Data, ranks: Ranks) -> Run:
    """The run cfg.from_run, which is told. Gives each flag that nobody typed its value. Stops where
    one was typed that the run fixes, and where it cannot be gone on from."""
    run = load_run(cfg.from_run, stages=["finetune"])
    must_be_plain(run)
    must_have_words(run, data)
    for flag, instead in REFUSED.items():
        if getattr(cfg, flag):
            stop(
                f"{said(flag)} and --from were given, but --from goes on with {run.folder} as it "
                f"is: {instead}; leave {said(flag)} out, or train from scratch without --from"
            )
    own = DEFAULTS | grown.own_values(run, (*FIXED, *TAKEN)) | {"llm": located(run.llm)}
    grown.settle(cfg, typed, own, FIXED, run)
    cfg.soft_prompt = run.soft_prompt
    cfg.backbone = cfg.backbone or str(usual_run(data, "sasrec"))
    own_files(run)  # stops where one is missing
    from_I, n_before = known_before(run, data)
    note = note_on_backbone(run, cfg, data)
    if ranks.main:
        known = f"{(from_I > 0).sum()} of {data.n_items} items were there when it was trained"
        print(f"going on from {run.folder}: {known}, {counted(from_I, n_before)}", flush=True)
        print(note, end="", flush=True)
    return run


def must_be_plain(run: Run) -> None:
    """Stops at a run that is made of more than an adapter, or that left users out."""
    made = {key: getattr(run, key, None) for key in ("teacher", "layers", "lambda_ms")}
    made |= {"adapt all": getattr(run, "adapt", "qv") == "all"}  # as it is typed
    made |= {key: getattr(run, key, None) for key in ("without_fold", "residual")}
    if getattr(run, "user_states", None):
        stop(
            f"the items of {run.folder} carry user states (distill.py --user-states), and a "
            "backbone that went on has no folds for them; name a run on another soft prompt, or "
            "train from scratch without --from"
        )
    for flag, is_so in made.items():
        if is_so:
            stop(
                f"{run.folder} was trained with {said(flag)}, and --from cannot go on with that; "
                f"name a run of finetune.py without {said(flag)}, or train from scratch without "
                "--from"
            )


# ---------------------------------------------------------------- the backbone


def note_on_backbone(run: Run, cfg: SimpleNamespace, data: Data) -> str:
    """A line where the vectors that the LM reads may not mean what the run learnt; else nothing.
    Stops at a backbone of another log or kind. cfg: backbone, input."""
    folder = folder_of("runs", cfg.backbone)
    if not is_run(folder):
        return ""  # who reads it says so
    backbone = load_run(folder, stages=["train_backbone"])
    kind, own = getattr(backbone, "model", "sasrec"), run.settings["backbone"]
    goes_on = (
        f"python train_backbone.py --dataset {cfg.dataset} --from {run.backbone_run} --out NAME"
    )
    if backbone.data_hash != data.meta["hash"]:
        stop(
            f"the backbone {folder} was trained on another preparation than {data.folder} holds; "
            f"go on from it too: {goes_on}; and give it as --backbone NAME"
        )
    if NAMES.get(kind, kind) != own:
        stop(
            f"{run.folder} was trained with {own}, the backbone {folder} is {NAMES.get(kind, kind)}"
            f"; make another one: {goes_on}; and give it as --backbone NAME"
        )
    if cfg.input == "titles" or went_on_from(backbone, run):
        return ""
    return (
        f"note: the backbone {folder} did not go on from {run.backbone_run}, so its item vectors "
        f"may lie in another space than those that {run.folder} has learnt to read; make it with: "
        f"{goes_on}\n"
    )


def went_on_from(backbone: Run, run: Run) -> bool:
    """True for the backbone of an LM's run, and for one that went on from it (train_backbone.py
    --from), in however many steps. One on the way that is gone is taken for it."""
    if backbone_digest(backbone.folder) == run.backbone_digest:
        return True
    wanted, seen = Path(run.backbone_run).resolve(), set()
    place = getattr(backbone, "from_run", None)
    while place and place not in seen:
        if Path(place).resolve() == wanted or not is_run(place):
            return True
        seen.add(place)
        place = getattr(load_run(place), "from_run", None)
    return False
