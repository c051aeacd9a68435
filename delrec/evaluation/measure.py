"""The dict that a table, its figures and its page are made of (metrics.json): the rows' metrics,
their intervals, and tests of what differs.

Keys: protocol, dataset, n, users, users_worth (G_eff), items, candidates, hash, chance; reference,
margin, margin_full, exploratory (see comparisons.Planned); floors (rows that need no training);
rows {name: {note, metrics, intervals, test against the reference, paper}}, copies (copying.py),
seeds, primary (None, or its pair, metric, test), planned, tests (every pair); full, full_against,
full_planned, full_tests, full_seeds (the same over the whole catalogue); beyond (see beyond.py),
groups, sweeps. evaluate.py adds two_stage.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from delrec.data.counts import full_ranking_of, popularity
from delrec.data.prepared import Data, users
from delrec.data.run_files import ranks_in
from delrec.evaluation.beyond import beyond
from delrec.evaluation.comparisons import (
    AMONG_CANDIDATES,
    OVER_ALL_ITEMS,
    Compared,
    Comparison,
    Planned,
    against_reference,
    every_pair,
    over_seeds,
    planned_pairs,
    primary_pair,
)
from delrec.evaluation.copying import copies_of
from delrec.evaluation.groups import by_group
from delrec.evaluation.paper import paper_method, printed_numbers, sweeps_of
from delrec.evaluation.rows import Row, names_of, runs_of
from delrec.evaluation.scores import Part
from delrec.evaluation.stats import (
    Clusters,
    Intervals,
    RowMetrics,
    clusters_of,
    ends_of,
    interval,
)
from delrec.evaluation.wording import FULL, SHOWN
from delrec.metrics import chance, compare, metrics

FULL_KS = (1, 5, 10, 20)  # HR@k and NDCG@k over the whole catalogue


def metrics_of(rows: dict[str, Row], test: Part) -> RowMetrics:
    """{row: {metric: its value for each sample (n,)}} among the candidates."""
    return {name: metrics(*compare(row.test_nC, test.is_target_nC)) for name, row in rows.items()}


def measured(
    rows: dict[str, Row],
    value: RowMetrics,
    data: Data,
    test: Part,
    planned: Planned,
    max_history: int = 0,
) -> dict:
    """What can be said of the rows on the test part. value: what metrics_of returns; planned: what
    is compared; max_history: how the samples were chosen.
    """
    user = users(data, test.samples)
    C, clusters = test.cand_nC.shape[1], clusters_of(user)
    low_high = intervals_of(value, user)
    full = full_metrics(names_of(rows), data, test)
    floors = [name for name, row in rows.items() if not row.compared]
    compared = Compared(value, user, planned.margin, floors=floors)
    of_interest = [name for name in rows if name not in floors]
    printed_for = "" if planned.exploratory else data.name  # the paper names no row of a sweep
    return {
        "protocol": protocol_of(data, clusters, C, max_history),
        "dataset": data.name,
        "n": len(user),
        "users": len(clusters.count_G),
        "users_worth": clusters.worth,
        "items": data.n_items,
        "candidates": C,
        "hash": data.meta["hash"],
        "chance": chance(C),
        "reference": planned.reference,
        "margin": planned.margin,
        "margin_full": planned.margin_full,
        "exploratory": planned.exploratory,
        "floors": floors,
        "rows": shown_rows(
            rows, value, low_high, against_reference(compared, planned), printed_for
        ),
        "copies": copies_of(rows, data, test),
        "seeds": over_seeds(compared, planned),
        "primary": primary_pair(compared, planned),
        "planned": planned_pairs(compared, planned),
        "tests": every_pair(compared, of_interest),
        **over_all_items(full, user, planned),
        "beyond": beyond(names_of(rows), value, full, data, test.which),
        "groups": by_group(value, full, data, test.samples),
        "sweeps": sweeps_of(runs_of(rows), value, low_high),
    }


def protocol_of(data: Data, clusters: Clusters, C: int, max_history: int) -> str:
    """The protocol in words. clusters: whose the samples are."""
    cold = f", those with at most {max_history} earlier items" if max_history else ""
    n, G = clusters.count_G.sum(), len(clusters.count_G)
    return (
        f"{data.name} (hash {data.meta['hash']}), {data.meta['split']} split, test part, "
        f"{n} of {len(data.test)} samples of {G} users{cold}, who tell as much as "
        f"{clusters.worth:.3g} users with equally many samples (G_eff); {C} stored candidates "
        f"(target + {C - 1} uniform from items the user never touched); ties count as the mean "
        "over their orders; [95 % bootstrap interval over users]"
    )


def intervals_of(value: RowMetrics, user: np.ndarray) -> Intervals:
    """{row: {hr@1, ndcg@10: (low, high)}}."""
    ends = {
        m: interval(np.stack([v[m] for v in value.values()], 1), user).T for m in AMONG_CANDIDATES
    }
    return {name: {m: ends[m][i] for m in ends} for i, name in enumerate(value)}


def shown_rows(
    rows: dict[str, Row],
    value: RowMetrics,
    low_high: Intervals,
    against: dict[str, Comparison],
    dataset: str,
) -> dict:
    """The rows as metrics.json holds them: note, means, intervals, the test against the reference
    (None for itself and for chance), and what the paper prints for a run like it on `dataset`.
    """
    shown = {}
    for name, row in rows.items():
        v = value[name]
        shown[name] = {"note": row.note, **{m: float(v[m].mean()) for m in SHOWN}}
        for m, ends in low_high[name].items():
            shown[name][f"{m}_interval"] = ends_of(ends)
        shown[name]["test"] = against.get(name)
        method = paper_method(row.run) if row.run else None
        shown[name]["paper"] = printed_numbers(dataset, method)
    return shown


def full_metrics(names: dict[Path, str], data: Data, test: Part) -> RowMetrics:
    """{row: {metric: its value for each sample (n,)}} over the whole catalogue: of chance and
    popularity, then of the runs that ranked it (full_test.npy: greater, equal, -1: not asked).

    names: {run folder: row}.
    """
    found = {}
    for name, score_I in (("chance", np.zeros(data.n_items + 1)), ("popularity", popularity(data))):
        found[name] = metrics(*full_ranking_of(score_I, data, test.samples), FULL_KS)
    for folder, name in names.items():
        if (folder / "full_test.npy").exists():
            greater, equal = ranks_in(folder / "full_test.npy", data, "test")[test.which].T
            if greater.min() >= 0:
                found[name] = metrics(greater, equal, FULL_KS)
    return found


def over_all_items(full: RowMetrics, user: np.ndarray, planned: Planned) -> dict:
    """full, full_against, full_planned, full_tests, full_seeds: the means over the whole catalogue;
    the runs against the reference, in pairs, and as means over seeds. full: of full_metrics.
    """
    value = {name: v for name, v in full.items() if name not in ("chance", "popularity")}
    if not value:
        return {f"full{kind}": {} for kind in ("", "_against", "_planned", "_tests", "_seeds")}
    compared = Compared(value, user, planned.margin_full, OVER_ALL_ITEMS)
    pairs = [pair for pair in planned.pairs if compared.knows(*pair)]
    return {
        "full": {name: {m: float(v[m].mean()) for m in FULL} for name, v in full.items()},
        "full_against": against_reference(compared, planned),
        "full_planned": planned_pairs(compared, replace(planned, pairs=pairs)),
        "full_tests": every_pair(compared, list(value)),
        "full_seeds": over_seeds(compared, planned),
    }
