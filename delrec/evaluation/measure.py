"""The dict that a table, its figures and its page are made of (metrics.json): the rows' metrics,
their intervals, and tests of what differs.

Keys: protocol, dataset, n, items, candidates, hash, chance, reference, rows {name: {note, metrics,
intervals, p against the reference, paper}}, seeds, tests, full, full_tests, full_seeds (the same
over the whole catalogue), groups, sweeps.
"""

from pathlib import Path

import numpy as np

from delrec.data.prepared import Data, users
from delrec.evaluation.floors import full_ranking_of, popularity
from delrec.evaluation.groups import by_group
from delrec.evaluation.paper import paper_method, printed_numbers, sweeps_of
from delrec.evaluation.rows import Row, names_of, runs_of
from delrec.evaluation.scores import Part
from delrec.evaluation.stats import Intervals, RowMetrics, difference, interval, over_seeds
from delrec.evaluation.tables import FULL, SHOWN
from delrec.metrics import chance, compare, metrics
from delrec.runtime import read_npy


def metrics_of(rows: dict[str, Row], test: Part) -> RowMetrics:
    """{row: {metric: its value for each sample (n,)}} among the candidates."""
    return {name: metrics(*compare(row.test_nC, test.is_target_nC)) for name, row in rows.items()}


def measured(
    rows: dict[str, Row],
    value: RowMetrics,
    data: Data,
    test: Part,
    reference: str,
    max_history: int = 0,
) -> dict:
    """What can be said of the rows on the test part. value: what metrics_of returns; reference: the
    row that the others are tested against; max_history: how the samples were chosen.
    """
    user = users(data, test.samples)
    C = test.cand_nC.shape[1]
    low_high = intervals_of(value, user)
    compared = [name for name, row in rows.items() if row.compared]
    return {
        "protocol": protocol_of(data, user, C, max_history),
        "dataset": data.name,
        "n": len(user),
        "items": data.n_items,
        "candidates": C,
        "hash": data.meta["hash"],
        "chance": chance(C),
        "reference": reference,
        "rows": shown_rows(rows, value, low_high, user, reference, data.name),
        "seeds": over_seeds(value, user, reference),
        "tests": paired_tests(value, compared, user),
        **over_all_items(names_of(rows), data, test.which, user, reference),
        "groups": by_group(value, data, test.samples),
        "sweeps": sweeps_of(runs_of(rows), value, low_high),
    }


def protocol_of(data: Data, user: np.ndarray, C: int, max_history: int) -> str:
    """The protocol in words. user: whose each sample is."""
    cold = f", those with at most {max_history} earlier items" if max_history else ""
    return (
        f"{data.name} (hash {data.meta['hash']}), {data.meta['split']} split, test part, "
        f"{len(user)} of {len(data.test)} samples of {len(np.unique(user))} users{cold}, "
        f"{C} stored candidates (target + {C - 1} uniform from items the user never touched); "
        "ties count as the mean over their orders; [95 % bootstrap interval over users]"
    )


def intervals_of(value: RowMetrics, user: np.ndarray) -> Intervals:
    """{row: {hr@1, ndcg@10: (low, high)}}."""
    ends = {
        m: interval(np.stack([v[m] for v in value.values()], 1), user).T
        for m in ("hr@1", "ndcg@10")
    }
    return {name: {m: ends[m][i] for m in ends} for i, name in enumerate(value)}


def shown_rows(
    rows: dict[str, Row],
    value: RowMetrics,
    low_high: Intervals,
    user: np.ndarray,
    reference: str,
    dataset: str,
) -> dict:
    """The rows as metrics.json holds them: note, means, intervals, the p of the difference from the
    reference, and what the paper prints for a run like it.
    """
    shown = {}
    for name, row in rows.items():
        v = value[name]
        shown[name] = {"note": row.note, **{m: float(v[m].mean()) for m in SHOWN}}
        for m, ends in low_high[name].items():
            shown[name][f"{m}_interval"] = list(map(float, ends))
        if name not in (reference, "chance"):
            against = difference(v, value[reference], user)
            shown[name]["p_hr@1"] = max(against["p_mcnemar_hr@1"], against["p_t_hr@1"])
            shown[name]["p_ndcg@10"] = against["p_t_ndcg@10"]
        method = paper_method(row.run) if row.run else None
        shown[name]["paper"] = printed_numbers(dataset, method)
    return shown


def paired_tests(
    value: RowMetrics, names: list[str], user: np.ndarray, hr: int = 1, ndcg: int = 10
) -> dict[str, dict]:
    """{"b - a": test of the difference} of every two rows, a before b."""
    return {
        f"{b} - {a}": difference(value[b], value[a], user, hr, ndcg)
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def over_all_items(
    names: dict[Path, str], data: Data, which: np.ndarray, user: np.ndarray, reference: str
) -> dict:
    """full, full_tests, full_seeds: metrics over the whole catalogue, for runs that ranked it
    (full_test.npy: greater, equal, -1: not asked) behind chance and popularity; the paired tests
    between them; and means over seeds. names: {run folder: row}.
    """
    ks, value = (1, 5, 10, 20), {}
    for folder, name in names.items():
        if (folder / "full_test.npy").exists():
            greater, equal = read_npy(folder / "full_test.npy", (len(data.test), 2))[which].T
            if greater.min() >= 0:
                value[name] = metrics(greater, equal, ks)
    if not value:
        return {"full": {}, "full_tests": {}, "full_seeds": {}}
    samples = np.asarray(data.test)[which]
    floors = {"chance": np.zeros(data.n_items + 1), "popularity": popularity(data)}
    full = {
        name: metrics(*full_ranking_of(score_I, data, samples), ks)
        for name, score_I in floors.items()
    }
    full |= value
    return {
        "full": {name: {m: float(v[m].mean()) for m in FULL} for name, v in full.items()},
        "full_tests": paired_tests(value, list(value), user, 20, 20),
        "full_seeds": over_seeds(value, user, reference, ("hr@20", "ndcg@20")),
    }
