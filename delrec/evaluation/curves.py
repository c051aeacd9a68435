"""Training curves from the runs' logs. Every loss has axes of its own, with the validation of the
runs that lower it: numbers of different losses cannot be compared.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from delrec.evaluation.drawing import subplots
from delrec.runtime import read_json
from delrec.training.log import entries_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# stage 1 has two losses; (key of a loss, its task, key of its validation)
OF_TASKS = (("loss_ta", "TA", "val_ta"), ("loss_rps", "RPS", "val_rps"))
VALIDATIONS = ("val_hr@1", "val_hr@1_of_15")
# --loss of train_backbone.py
OF_BACKBONES = {
    "ce": "over all items",
    "sampled": "over sampled items",
    "gbce": "binary, sampled items",
    "bce": "binary, one negative",
}
# what a validation is, over its axes
QUALITIES = {
    "val_ta": "validation: share of TA right",
    "val_rps": "validation: share of RPS right",
    "val_hr@1": "validation: HR@1",
    "val_hr@1_of_15": "validation: HR@1 of 15 candidates",
}


@dataclass
class Log:
    """What a run wrote while it was trained."""

    config: dict  # its config.json
    entries: list[dict]  # those that name a step


@dataclass
class Curve:
    """One loss of a run, and its validation: two arrays each, share of the steps and value."""

    run: str
    loss: tuple[np.ndarray, np.ndarray]
    quality: tuple[np.ndarray, np.ndarray]
    title: str  # over the axes of its validation


def logs_of(names: dict[Path, str]) -> dict[str, Log]:
    """{row: its run's log}; runs without a loss in one are left out. names: {run folder: row}."""
    logs = {}
    for folder, name in names.items():
        if (folder / "log.jsonl").exists():
            entries = entries_of(folder)
            config = folder / "config.json"
            known = read_json(config) if config.exists() else {}
            logs[name] = Log(known, [e for e in entries if "step" in e and is_of(e, known)])
    return {name: log for name, log in logs.items() if panels_of({name: log})}


def is_of(entry: dict, config: dict) -> bool:
    """True for an entry of the training whose weights a run has: an MLP is trained at several
    learning rates, one after the other, each from its first epoch."""
    return config.get("model") != "mlp" or entry.get("name") == f"lr {config['lr']:g}"


# ---------------------------------------------------------------- which loss


def panels_of(logs: dict[str, Log]) -> dict[str, list[Curve]]:
    """{loss in words: the curves that may share its axes}."""
    panels = {}
    for run, log in logs.items():
        keys = {key for entry in log.entries for key in entry}
        if "loss" in keys:
            quality = next((key for key in VALIDATIONS if key in keys), VALIDATIONS[0])
            curve = Curve(run, points(log, "loss"), points(log, quality), QUALITIES[quality])
            panels.setdefault(loss_of(log), []).append(curve)
        for key, task, quality in OF_TASKS:
            loss = points(log, key)
            if loss[1].any():  # 0 all along: a task that was not asked
                curve = Curve(run, loss, points(log, quality), QUALITIES[quality])
                panels.setdefault(f"stage 1, {task}: {ranked_by(log)}", []).append(curve)
    return panels


def loss_of(log: Log) -> str:
    """The loss of a backbone's or stage 2's log in words: equal where numbers can be compared."""
    config, taught = log.config, ""
    if config.get("teacher"):
        taught = ", and a teacher's terms"
    elif config.get("lambda_ms"):
        taught = ", and its blocks' own terms"
    if config.get("stage") == "finetune":
        return f"stage 2: {ranked_by(log)}{taught}"
    if config.get("stage") == "train_backbone":
        return f"backbone: {OF_BACKBONES.get(config.get('loss'), 'loss')}{taught}"
    return f"{log.entries[0].get('name', 'loss')}: loss"


def ranked_by(log: Log) -> str:
    """What an LM's cross-entropy is over."""
    config = log.config
    kind = config.get("loss", "candidates")
    if config.get("input") == "ids" or kind == "catalogue":
        return "over all items"
    candidates = f"over {config['C']} candidates" if "C" in config else "over candidates"
    words = "over the words of titles"
    return {"titles": words, "both": f"{candidates}, and {words}"}.get(kind, candidates)


def points(log: Log, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(share of the steps, value) of every entry of a log that has a key, two arrays."""
    last = max(log.entries[-1]["step"], 1)
    found = [(e["step"] / last, e[key]) for e in log.entries if key in e]
    return np.array([x for x, _ in found]), np.array([y for _, y in found])


# ---------------------------------------------------------------- drawn


def curves_figure(logs: dict[str, Log]) -> "Figure":
    """Loss and validation of every run against its own steps, a row of axes for every loss."""
    panels, place = panels_of(logs), {run: i for i, run in enumerate(logs)}
    fig, axes = subplots(9, 2.6 * len(panels) + 0.4, 2, len(panels), squeeze=False)
    handles = {}
    for (title, curves), (left, right) in zip(panels.items(), axes):
        for curve in curves:
            i = place[curve.run]
            style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
            handles[curve.run] = draw_curve(left, *smoothed(*curve.loss), **style)
            draw_curve(right, *curve.quality, **style)
        left.set_title(f"loss of {title}", fontsize="small")
        right.set_title(curves[0].title, fontsize="small")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_xlim(-0.03, 1.03)
    for ax in axes[-1]:
        ax.set_xlabel("share of the training")
    shown = {run: handles[run] for run in logs if handles.get(run)}
    fig.legend(shown.values(), shown, loc="outside right upper", fontsize="small")
    return fig


def smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve's moving means, as steps are noisy; the curve itself where it has few points."""
    if len(y) <= 40:
        return x, y
    width = len(y) // 20
    return x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid")


def draw_curve(ax: "Axes", x: np.ndarray, y: np.ndarray, **style: object) -> object:
    """The line that was drawn; few points are marked, None where there are none."""
    if not len(y):
        return None
    return ax.plot(x, y, marker="o" if len(y) < 12 else None, **style)[0]
