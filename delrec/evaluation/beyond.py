"""What stands beside accuracy: how much of the catalogue the lists show, how popular it is, and
accuracy without the targets that are easy because they are popular or because times tie.

A row that gains HR and loses coverage and debiased HR has learnt popularity. After RecTools'
metrics. n samples, I items (ids 1..I, 0 pads), K = 10 items of a list.
"""

from pathlib import Path

import numpy as np

from delrec.data.counts import popularity
from delrec.data.prepared import Data, users
from delrec.data.run_files import lists_in
from delrec.evaluation.stats import RowMetrics

K = 10
MANY_TIES = 0.05  # a share of ties among the test targets from which on clean ones are told apart


def beyond(
    names: dict[Path, str], value: RowMetrics, full: RowMetrics, data: Data, which: np.ndarray
) -> dict:
    """{border, thinned, clean, rows: {row: the numbers that it has}}.

    border: of debiasing, counted over the whole test part as the weights are; thinned: share of the
    samples that weigh less than 1; clean: {n, share} of the targets without a tie, None where ties
    are few in the whole part. A row: hr@1_debiased and hr@1_clean among the candidates; hr@10 and
    hr@10_debiased over all items for a run that ranked them; coverage, arp, gini of its lists.

    names: {run folder: row}; value, full: {row: metrics per sample} among the candidates and over
    all items; which: the samples' places in the test part.
    """
    whole = np.asarray(data.test)  # what is easy is counted there, whichever samples are drawn
    weight, border = debiasing_weights(data.items[whole], users(data, whole))
    clean = clean_targets(data, whole)
    samples, weight, clean = whole[which], weight[which], None if clean is None else clean[which]
    user = users(data, samples)
    rows = {name: accuracy(v["hr@1"], weight, clean) for name, v in value.items()}
    for name in rows.keys() & full.keys():
        rows[name] |= over_all(full[name][f"hr@{K}"], weight)
    rows["popularity"] |= of_lists(popular_lists(data, samples), data, user)
    for folder, name in names.items():
        if (list_nK := lists_of(folder, data, which)) is not None:
            rows[name] |= of_lists(list_nK, data, user)
    return {
        "border": border,
        "thinned": float((weight < 1).mean()),
        "clean": None if clean is None else {"n": int(clean.sum()), "share": float(clean.mean())},
        "rows": rows,
    }


# ---------------------------------------------------------------- accuracy without the easy targets


def debiasing_weights(target: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, int]:
    """(the weight of every sample (n,), border): w = min(1, border / c) of a target that c test
    users have, border = int(Q3 + 1.5 (Q3 - Q1)) over the counts c of the items that are targets.

    RecTools thins the targets above the border at random; the weights are the mean over that.
    """
    pair = np.unique(np.stack([target, user]), axis=1)
    item, count = np.unique(pair[0], return_counts=True)
    low, high = np.percentile(count, [25, 75])
    border = int(high + 1.5 * (high - low))
    return np.minimum(1, border / count)[np.searchsorted(item, target)], border


def clean_targets(data: Data, samples: np.ndarray) -> np.ndarray | None:
    """Mask (n,) of the samples whose target has another time than the user's interaction before;
    None where ties are few or times are not known.
    """
    if data.times is None:
        return None
    times = np.asarray(data.times)
    clean = times[samples] != times[samples - 1]  # a sample has an earlier one of its user
    return clean if 1 - clean.mean() > MANY_TIES else None


def accuracy(hit: np.ndarray, weight: np.ndarray, clean: np.ndarray | None) -> dict[str, float]:
    """{hr@1_debiased: sum w hit / sum w, hr@1_clean}. hit: HR@1 of each sample."""
    found = {"hr@1_debiased": float((weight * hit).sum() / weight.sum())}
    if clean is not None and clean.any():
        found["hr@1_clean"] = float(hit[clean].mean())
    return found


def over_all(hit: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """{hr@10, hr@10_debiased} over all items. hit: HR@10 of each sample."""
    return {
        "hr@10": float(hit.mean()),
        "hr@10_debiased": float((weight * hit).sum() / weight.sum()),
    }


# ---------------------------------------------------------------- lists


def lists_of(folder: Path, data: Data, which: np.ndarray) -> np.ndarray | None:
    """The run's K best items of each sample, its history masked (n, K); None where it stored no
    lists, shorter ones, or none of some sample.
    """
    if not (folder / "topk_test.npy").exists():
        return None
    list_nh = lists_in(folder / "topk_test.npy", data, "test", which)
    return list_nh[:, :K] if list_nh.shape[1] >= K and (list_nh[:, 0] > 0).all() else None


def popular_lists(data: Data, samples: np.ndarray) -> np.ndarray:
    """The K most popular items that each history does not hold, (n, K)."""
    ranked = np.argsort(-popularity(data)[1:], kind="stable") + 1
    list_nK = np.zeros((len(samples), K), np.int64)
    for list_K, sample, begin in zip(list_nK, samples, data.ptr[users(data, samples)]):
        old = np.asarray(data.items[begin:sample])
        first = ranked[: K + len(old)]
        best = first[~np.isin(first, old)][:K]
        list_K[: len(best)] = best
    return list_nK


def of_lists(list_nK: np.ndarray, data: Data, user: np.ndarray) -> dict[str, float]:
    """{coverage: share of the catalogue that stands in some list, arp: share of the training
    interactions that a listed item has, mean of a list, then of a user, then over users, gini: of
    how often each item is listed, 0 for all alike}.
    """
    shown_I = np.bincount(list_nK[list_nK > 0], minlength=data.n_items + 1)[1:]
    count_I = popularity(data)
    is_item_nK = list_nK > 0
    share_n = (count_I / count_I.sum())[list_nK].sum(1) / np.maximum(is_item_nK.sum(1), 1)
    _, row = np.unique(user, return_inverse=True)
    return {
        "coverage": float((shown_I > 0).mean()),
        "arp": float((np.bincount(row, share_n) / np.bincount(row)).mean()),
        "gini": gini(shown_I),
    }


def gini(count_I: np.ndarray) -> float:
    """The Gini coefficient sum_i (2 i - I - 1) x_i / (I sum x), x in rising order, i from 1."""
    x_I, I1 = np.sort(count_I), len(count_I)
    return float(((2 * np.arange(1, I1 + 1) - I1 - 1) * x_I).sum() / (I1 * x_I.sum()))


# ---------------------------------------------------------------- the table


def beyond_columns(result: dict) -> dict[str, tuple[str, int]]:
    """{key of a number beside accuracy: (its head, its decimals)}, in the table's order."""
    C = result["candidates"]
    columns = {
        "hr@10": ("HR@10 all", 3),
        "hr@10_debiased": ("debiased", 3),
        "coverage": ("coverage@10", 3),
        "arp": ("ARP@10", 5),
        "gini": ("Gini@10", 3),
        "hr@1_debiased": (f"HR@1 of {C} debiased", 3),
    }
    if result["beyond"]["clean"]:
        columns["hr@1_clean"] = (f"HR@1 of {C} clean", 3)
    return columns


def beyond_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """The numbers beside accuracy as (head, rows of cells); a cell is empty where a row has no such
    number.
    """
    columns = beyond_columns(result)
    head = ["row", *(name for name, _ in columns.values())]
    body = [
        [name, *(f"{v[key]:.{n}f}" if key in v else "" for key, (_, n) in columns.items())]
        for name, v in result["beyond"]["rows"].items()
    ]
    return head, body


def about_beyond(result: dict) -> str:
    """What the columns mean."""
    found = result["beyond"]
    said = (
        "all: over the whole catalogue, history masked; debiased: a target that c test users have "
        f"weighs min(1, {found['border']} / c), {found['thinned']:.0%} of the samples weigh less "
        "than 1; coverage@10: share of the catalogue that stands in some list; ARP@10: share of "
        "the training interactions that a listed item has, on average; Gini@10: of how often each "
        "item is listed; empty: the row ranks no catalogue, or its run stored no lists"
    )
    if found["clean"]:
        said += (
            f"; clean: the {found['clean']['n']:,} targets ({found['clean']['share']:.0%}) whose "
            "time is not that of the user's interaction before"
        )
    return said


def beyond_as_text(result: dict, wide: int) -> list[str]:
    """The lines of the table for table.txt."""
    head, body = beyond_table(result)
    lines = ["", "beside accuracy"]
    for name, *cells in [head, *body]:
        cells = [f"{cell:>{len(column) + 2}}" for cell, column in zip(cells, head[1:])]
        lines.append(f"{name:<{wide}}" + "".join(cells))
    return [*lines, about_beyond(result)]
