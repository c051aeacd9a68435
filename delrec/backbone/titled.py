"""The models of train_backbone.py that are made of titles, LLMSEQSIM and KDA_LRD: what they take of
the script's flags, and what they are.
"""

from types import SimpleNamespace

import torch

from delrec.backbone import seqsim
from delrec.backbone.dllm2rec import Given
from delrec.backbone.models import TITLED
from delrec.backbone.options import OF_LISTS
from delrec.backbone.results import Protocol
from delrec.backbone.seqsim import SeqSim
from delrec.data.prepared import Data
from delrec.names import NAMES
from delrec.processes import Ranks
from delrec.runtime import Run

DEFAULTS = {
    # not trained: of these only the window means something, and the width is that of the vectors
    "seqsim": dict(history=50, width=1, dropout=0, lr=1e-3, batch=128, epochs=0, patience=1),
    # LRD's code but for the patience, which is 5 there
    "kda": dict(
        history=20,
        width=64,
        dropout=0,
        lr=1e-3,
        batch=256,
        epochs=100,
        patience=10,
        latent=8,
        latent_weight=10.0,
    ),
}
# flags of what other models learn, and why such a model has no use for them
OF_OTHERS = OF_LISTS | {"from_run", "loss", "negatives", "teacher", "lam", "eta", "offset"}
OF_OTHERS |= {"text_in", "cold_out", "dros", "contrast", "contrast_tau", "one_target"}
UNUSED = {
    "seqsim": OF_OTHERS | {"width", "dropout", "lr", "batch", "epochs", "patience", "folds", "ema"},
    "kda": OF_OTHERS,
}
WHY = {
    "seqsim": "which is not trained: it compares titles' vectors, and chooses how on validation",
    "kda": "which has a loss of its own, and no states: it reads a history through each candidate",
}
LOSSES = {"seqsim": "none", "kda": "bpr"}  # as a run's record names what it was trained by


def faults(cfg: SimpleNamespace, moved: set[str]) -> list[tuple[bool, str]]:
    """What cannot be meant with such a model: (is it so?, a sentence). moved: the names of flags
    that were typed with another value than their default."""
    if cfg.model not in TITLED:
        return []
    reads_titles = cfg.model == "seqsim" or cfg.latent != 0 and cfg.latent_weight != 0
    idle_by = "latent 0" if cfg.latent == 0 else "latent-weight 0"
    idle = sorted(moved & UNUSED[cfg.model])
    first = idle and f"--{idle[0].removesuffix('_run').replace('_', '-')}"
    return [
        (
            first,
            f"{first} means nothing with --model {cfg.model}, {WHY[cfg.model]}; leave {first} out",
        ),
        (
            cfg.text and not reads_titles,
            f"--text {cfg.text} changes nothing with --{idle_by}, as no title is read then; leave "
            "--text out",
        ),
        (
            reads_titles and not cfg.text,
            f"--model {cfg.model} is made of titles' vectors, and was given none; name them with "
            "--text (tfidf, minilm, an LM's run or an .npy file)",
        ),
    ]


def settle(cfg: SimpleNamespace, given: Given, data: Data) -> None:
    """Gives the flags that nobody may type the values that such a model has."""
    if cfg.model not in TITLED:
        return
    cfg.loss, cfg.text_in = LOSSES[cfg.model], None
    if cfg.model == "seqsim":
        cfg.width = cfg.text_width or given.text.about(data)["text_numbers"]


def choose(model: torch.nn.Module, protocol: Protocol, ranks: Ranks) -> None:
    """Chooses on validation what such a model has to choose, and says what."""
    if isinstance(model, SeqSim):
        line = seqsim.choose(model, lambda: protocol.validate(model, ranks))
        if ranks.main:
            print(line, flush=True)


def note_of(run: Run) -> str | None:
    """What such a run's row is, in words; None for a run of another model."""
    if getattr(run, "model", None) == "seqsim":
        return f"{NAMES[run.model]}-style: no training, {run.similarity}, weights {run.decay}"
    if getattr(run, "model", None) == "kda":
        told = f"{run.latent} latent relations" if run.latent else "relation 0 alone"
        told += "" if run.latent_weight else ", which titles do not tell"
        return f"{NAMES[run.model]}-style: {told}, no times"
    return None
