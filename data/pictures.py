"""One page of histograms of a prepared folder, and the page of its audit."""

import re
import textwrap
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
    if without_times(axes, data):
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


def without_times(axes: "Axes", data: Data) -> bool:
    """Whether the log has no times; its place then says so."""
    if data.times is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "no times, only an order", ha="center")
    return data.times is None


# ---------------------------------------------------------------- the audit's page


def draw_audit(found: dict, data: Data, path: Path) -> None:
    """Writes the page of an audit. found: what audit.py found (audit.json)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(15, 8))
    ties = found["ties"]
    draw_bars(axes[0, 0], '"the next id" is right, by the order of ties', ties["next_id"])
    axes[0, 0].axhline(ties["chance"], color=RED)
    axes[0, 0].set_xlabel(f"{ties['share']:.1%} of the interactions in a tie (red: chance)")
    rules = found["rules"]
    bars = {f"{n} items": v["rules"] for n, v in rules.items()}
    bars |= {f"{n}, shuffled": v["shuffled"] for n, v in rules.items()}
    draw_bars(axes[0, 1], "rules of what comes next", bars)
    variants = found["shuffling"]["variants"]
    first = next(iter(variants.values()))["ndcg@10"]["before"]
    bars = {"as it is": first} | {name: v["ndcg@10"]["after"] for name, v in variants.items()}
    draw_bars(axes[0, 2], "co-occurrence's NDCG@10, histories shuffled", bars)
    draw_gaps(axes[1, 0], data)
    bars = {f"{part} {kind}": v for part, of in found["cold"].items() for kind, v in of.items()}
    bars |= {"repeats in test": found["repeats"]["test"]}
    if found["future"]:
        bars |= {"future that leave-one-out shows": found["future"]["share"]}
    draw_bars(axes[1, 1], "never seen in training, repeats, leave-one-out", bars)
    popularity = found["popularity"]
    bars = {"top 1 %": popularity["top_1"], "top 10 %": popularity["top_10"]}
    bars |= dict(zip(("thirds 1-2", "thirds 2-3", "thirds 1-3"), popularity["thirds"] or ()))
    bars |= {k: popularity[k] for k in ("overall", "recent") if k in popularity}
    draw_bars(axes[1, 2], "popularity: targets, correlations, HR@10", bars)
    figure.suptitle(
        f"{found['name']}, {found['split']} split, {found['test']:,} test targets: the audit"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(axes: "Axes", title: str, bars: dict[str, float]) -> None:
    """A bar for each value, which stands above it."""
    drawn = axes.bar(range(len(bars)), list(bars.values()), color=BLUE)
    axes.bar_label(drawn, [f"{value:.3g}" for value in bars.values()], fontsize="small")
    labels = [textwrap.fill(label, 11) for label in bars]
    axes.set_xticks(range(len(bars)), labels, fontsize="small")
    axes.set_title(title)


def draw_gaps(axes: "Axes", data: Data) -> None:
    """The times between a user's interaction and the one before."""
    if without_times(axes, data):
        return
    owner = np.repeat(np.arange(data.n_users), np.diff(data.ptr))
    gap = np.diff(data.times)[np.diff(owner) == 0]
    edges = np.unique(np.geomspace(1, gap.max() + 2, 40).astype(np.int64))
    axes.hist(gap + 1, edges, color=BLUE)
    axes.set(
        title="time between a user's interactions",
        xscale="log",
        ylabel="interactions",
        xlabel="units of the log, plus 1",
    )
