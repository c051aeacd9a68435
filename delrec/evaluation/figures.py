"""What evaluate.py measured as figures, each made from one dict (metrics.json, see measure.py); the
training curves are made from the runs' logs (curves.py).
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from delrec.evaluation.curves import curves_figure, logs_of
from delrec.evaluation.drawing import BLUE, GREY, ORANGE, subplots
from delrec.evaluation.wording import where_timed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures_of(result: dict, names: dict[Path, str]) -> dict[str, "Figure"]:
    """{name: figure} of all that this result holds. names: {run folder: row}, for their logs."""
    drawn = {"table": rows_figure(result)}
    if result["seeds"]:
        drawn["seeds"] = seeds_figure(result)
    for kind in result["groups"]:
        drawn[f"by-{kind.split()[0]}"] = groups_figure(result, kind)
    for name in result["sweeps"]:
        drawn[f"against-{name}"] = sweep_figure(result, name)
    if sum("ms" in row for row in result["rows"].values()) > 1:
        drawn["latency"] = latency_figure(result)
    if logs := logs_of(names):
        drawn["training"] = curves_figure(logs)
    return drawn


def write_figures(folder: Path, drawn: dict[str, "Figure"]) -> None:
    """Writes the figures as <name>.png; those of an earlier table that this one lacks go."""
    import matplotlib.pyplot as plt

    for name in ("table", "seeds", "by-*", "against-*", "latency", "training"):
        for old in folder.glob(f"{name}.png"):
            old.unlink()
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


# ---------------------------------------------------------------- rows


def rows_figure(result: dict) -> "Figure":
    """HR@1 of every row with its interval, chance as a line: also the ablations' figure."""
    names = [name for name in result["rows"] if name != "chance"][::-1]
    mean = np.array([result["rows"][name]["hr@1"] for name in names])
    ends = np.array([result["rows"][name]["hr@1_interval"] for name in names], float)
    fig, ax = subplots(7, 0.36 * len(names) + 1.3)
    ax.errorbar(mean, range(len(names)), xerr=np.abs(ends.T - mean), fmt="o", capsize=3, color=BLUE)
    ax.axvline(
        1 / result["candidates"],
        color=GREY,
        linestyle="--",
        label=f"chance 1/{result['candidates']}",
    )
    ax.axvline(
        result["rows"][result["reference"]]["hr@1"],
        color=ORANGE,
        linewidth=0.8,
        label=result["reference"],
    )
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, None)
    ax.set_xlabel(
        f"HR@1 among {result['candidates']} candidates, {result['dataset']}, n = {result['n']}, 95 "
        "% interval over users"
    )
    fig.legend(loc="outside upper right", ncols=2)
    ax.grid(axis="x", alpha=0.3)
    return fig


def seeds_figure(result: dict) -> "Figure":
    """HR@1 of every row of which there are several seeds: the mean with its interval, each seed as
    a small mark.
    """
    seeds = dict(reversed(result["seeds"].items()))
    fig, ax = subplots(7, 0.36 * len(seeds) + 1.3)
    for y, v in enumerate(seeds.values()):
        mean = v["hr@1"][0]
        low, high = np.array(v["hr@1_interval"], float)
        ax.errorbar(
            mean,
            y,
            xerr=np.maximum([[mean - low], [high - mean]], 0),
            fmt="o",
            capsize=3,
            color=BLUE,
        )
        ax.plot(v["hr@1_each"], [y] * v["seeds"], "|", markersize=11, color=ORANGE)
    ax.set_yticks(range(len(seeds)), seeds)
    ax.set_xlabel(
        f"HR@1 among {result['candidates']} candidates (chance {1 / result['candidates']:.3f}), "
        f"{result['dataset']}, n = {result['n']}\n"
        "mean over seeds, 95 % interval over users; marks: each seed"
    )
    ax.grid(axis="x", alpha=0.3)
    return fig


def groups_figure(result: dict, kind: str) -> "Figure":
    """HR@1 of every run in each group."""
    groups = result["groups"][kind]
    names = [name for name in result["rows"] if name != "chance" and "+" not in name]
    fig, ax = subplots(7, 4.2)
    for i, name in enumerate(names):
        v = [group["rows"][name] for group in groups.values()]
        mean = np.array([x["hr@1"] for x in v])
        low, high = (np.array([x[end] for x in v], float) for end in ("low", "high"))
        ax.errorbar(
            np.arange(len(groups)) + 0.6 * (i / max(len(names) - 1, 1) - 0.5),
            mean,
            yerr=np.maximum([mean - low, high - mean], 0),
            fmt="os^Dvp*X<>"[i % 10],
            capsize=2,
            label=name,
            fillstyle="full" if i < 10 else "none",
        )
    ax.axhline(1 / result["candidates"], color=GREY, linestyle="--", label="chance")
    ax.set_xticks(range(len(groups)), [f"{g}\nn = {v['n']}" for g, v in groups.items()])
    ax.set_ylim(0, 1)
    ax.set_xlabel(kind)
    ax.set_ylabel(f"HR@1 among {result['candidates']}, 95 % interval")
    fig.legend(loc="outside right upper", fontsize="small")
    ax.grid(axis="y", alpha=0.3)
    return fig


def sweep_figure(result: dict, name: str) -> "Figure":
    """HR@1 against the soft prompt's length k or the list's length h (DELRec, Figure 8)."""
    points = result["sweeps"][name]
    x = sorted(points, key=int)
    fig, ax = subplots(5, 3.4)
    keys = ("hr@1", "low", "high")
    mean, low, high = (np.array([points[v][m] for v in x], float) for m in keys)
    ax.errorbar(
        [int(v) for v in x],
        mean,
        yerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
        fmt="o-",
        capsize=3,
        color=BLUE,
    )
    ax.axhline(
        result["rows"][result["reference"]]["hr@1"],
        color=ORANGE,
        linewidth=0.8,
        label=result["reference"],
    )
    fig.legend(loc="outside upper right")  # within the axes it would hide a point
    ax.set_xlabel(
        {"k": "vectors of the soft prompt, k", "h": "length of the backbone's list, h"}[name]
    )
    ax.set_ylabel(f"HR@1 among {result['candidates']}, 95 % interval")
    ax.grid(alpha=0.3)
    return fig


def latency_figure(result: dict) -> "Figure":
    """HR@1 against the time of a request."""
    fig, ax = subplots(6, 3.8)
    for name, row in result["rows"].items():
        if "ms" not in row:
            continue
        mean, (low, high) = row["hr@1"], np.array(row["hr@1_interval"], float)
        ax.errorbar(
            row["ms"][0],
            mean,
            yerr=np.maximum([[mean - low], [high - mean]], 0),
            fmt="o",
            capsize=2,
            color=BLUE,
        )
        ax.annotate(
            name,
            (row["ms"][0], row["hr@1"]),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize="small",
        )
    ax.set_xscale("log")
    ax.margins(x=0.25)
    ax.set_xlabel(f"ms a request, alone, {where_timed(result)}")
    ax.set_ylabel(f"HR@1 among {result['candidates']}, 95 % interval")
    ax.grid(alpha=0.3)
    return fig
