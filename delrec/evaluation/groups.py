"""Groups of test samples: where is a row good, and where not?"""

import numpy as np

from delrec.data.counts import popularity, times_next
from delrec.data.prepared import Data, users
from delrec.evaluation.stats import RowMetrics, ends_of, interval


def groups_of(data: Data, samples: np.ndarray, split: str) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {group: mask (n,)}}: by the length of the history, by how often the target occurs in
    training, by how often it came right after the history's last item there, by time (of a temporal
    split). Groups without a sample are left out.
    """
    earlier = samples - data.ptr[users(data, samples)]
    seen = popularity(data)[data.items[samples]]
    next_to = times_next(data, samples)
    kinds = {
        "items in the history": {
            "1-2, cold": earlier < 3,
            "3-9": (earlier >= 3) & (earlier < 10),
            "10-49": (earlier >= 10) & (earlier < 50),
            "50+": earlier >= 50,
        },
        "interactions of the target in training": {
            "0, unseen": seen < 1,
            "1-9": (seen >= 1) & (seen < 10),
            "10-99": (seen >= 10) & (seen < 100),
            "100+": seen >= 100,
        },
        "pair of last item and target in training": {
            "never": next_to < 1,
            "1-4": (next_to >= 1) & (next_to < 5),
            "5+": next_to >= 5,
        },
    }
    if data.times is not None and split == "temporal":
        whole = np.sort(np.asarray(data.test))  # its thirds, whichever samples are drawn
        place = np.argsort(np.argsort(data.times[whole], kind="stable"), kind="stable")
        third = (place * 3 // max(len(whole), 1))[np.searchsorted(whole, samples)]
        kinds["time within the test part"] = {
            "first third": third == 0,
            "second third": third == 1,
            "last third": third == 2,
        }
    return {
        kind: {group: mask for group, mask in groups.items() if mask.any()}
        for kind, groups in kinds.items()
    }


def by_group(
    value: RowMetrics, full: RowMetrics, data: Data, samples: np.ndarray
) -> dict[str, dict[str, dict]]:
    """HR@1 and NDCG@10 of every row in every group, and HR@1's interval; HR@20 over all items of
    the rows that rank them: {kind: {group: {n, users, rows: {row: {hr@1, ndcg@10, low, high}},
    all_items: {row: hr@20}}}}.

    value, full: {row: metrics per sample} among the candidates, over all items.
    """
    user = users(data, samples)
    return {
        kind: {
            group: {
                **in_group(value, mask, user),
                "all_items": {name: float(v["hr@20"][mask].mean()) for name, v in full.items()},
            }
            for group, mask in groups.items()
        }
        for kind, groups in groups_of(data, samples, data.meta["split"]).items()
    }


def in_group(value: RowMetrics, mask: np.ndarray, user: np.ndarray) -> dict:
    """{n, users, rows: {row: {hr@1, ndcg@10, low, high}}} of the samples in a group."""
    hits = np.stack([v["hr@1"][mask] for v in value.values()], 1)
    ends = interval(hits, user[mask], draws=500).T
    rows = {}
    for (name, v), (low, high) in zip(value.items(), map(ends_of, ends)):
        rows[name] = {
            "hr@1": float(v["hr@1"][mask].mean()),
            "ndcg@10": float(v["ndcg@10"][mask].mean()),
            "low": low,
            "high": high,
        }
    return {"n": int(mask.sum()), "users": len(np.unique(user[mask])), "rows": rows}
