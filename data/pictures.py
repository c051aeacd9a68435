"""One page of histograms of a prepared folder."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from delrec.data.prepared import Data

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = "#4477aa"
RED = "#cc3311"


def draw_pictures(data: Data, path: Path) -> None:
    """Writes the page: history lengths, popularity, words of titles, interactions over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    draw_lengths(axes[0, 0], data)
    draw_popularity(axes[0, 1], data)
    draw_title_words(axes[1, 0], data)
    draw_times(axes[1, 1], data)
    meta = data.meta
    figure.suptitle(
        f"{meta['name']}: {meta['users']:,} users, {meta['items']:,} items, "
        f"{meta['interactions']:,} interactions, sparsity {meta['sparsity']:.2%}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_lengths(axes: "Axes", data: Data) -> None:
    """How many users have how many interactions."""
    lengths = np.diff(data.ptr)
    edges = np.unique(np.geomspace(1, lengths.max() + 1, 40).astype(int))
    axes.hist(lengths, edges, color=BLUE)
    axes.set(
        title="interactions of a user",
        xscale="log",
        yscale="log",
        xlabel=f"median {int(np.median(lengths))}, most {lengths.max():,}",
        ylabel="users",
    )


def draw_popularity(axes: "Axes", data: Data) -> None:
    """How many interactions each item has, the most popular first."""
    counts = np.sort(np.bincount(data.items, minlength=data.n_items + 1)[1:])[::-1]
    first_tenth = counts[: max(len(counts) // 10, 1)].sum() / counts.sum()
    axes.plot(np.arange(1, len(counts) + 1), counts, color=BLUE)
    axes.set(
        title="popularity",
        xscale="log",
        yscale="log",
        ylabel="interactions",
        xlabel=f"items, most popular first; the first tenth has {first_tenth:.0%}",
    )


def draw_title_words(axes: "Axes", data: Data) -> None:
    """How many words and marks the titles have."""
    words = np.array([len(re.findall(r"\w+|[^\w\s]", title)) for title in data.titles[1:]])
    axes.hist(words, np.arange(words.max() + 2) - 0.5, color=BLUE)
    axes.set(
        title="words and marks of a title",
        ylabel="items",
        xlabel=f"median {int(np.median(words))}, most {words.max()}",
    )


def draw_times(axes: "Axes", data: Data) -> None:
    """When the interactions were, with the cuts of a temporal split."""
    if data.times is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "no times, only an order", ha="center")
        return
    axes.hist(np.asarray(data.times), 60, color=BLUE)
    cuts = data.meta["cuts"] or []
    for cut in cuts:
        axes.axvline(cut, color=RED)
    axes.set(
        title="interactions over time"
        + (" (red: where validation and test begin)" if cuts else ""),
        xlabel="time",
        ylabel="interactions",
    )
