"""What time does to a log: gaps between a user's interactions, users and items that training never
saw, repeats, what leave-one-out would tell of the future, how popularity moves.

M interactions, I items (ids 1..I, 0 pads).
"""

import numpy as np

from delrec.data.counts import full_ranking_of, in_training, popularity
from delrec.data.prepared import Data, subset, users
from delrec.data.rules import last_two_apart
from delrec.metrics import metrics
from delrec.significance import sign_flip, user_sums

DAY = 86_400
SESSION = 1_800  # seconds: a longer gap ends a session
RECENT = 7  # days of training that a recent popularity counts
MOST_SAMPLES = 20_000  # test samples that are ranked

# ---------------------------------------------------------------- gaps


def seconds_of(times: np.ndarray) -> float | None:
    """How many seconds the unit of some times is: 1, 1e-3, 1e-6, 1e-9, or None where they are no
    times since 1970 in such a unit (they would lie before 1973 or after 5000).
    """
    middle = float(np.median(times))
    for unit in (1.0, 1e-3, 1e-6, 1e-9):
        if 1e8 <= middle * unit < 1e11:
            return unit
    return None


def gaps_of(data: Data) -> dict | None:
    """The times between a user's interaction and the one before, in the log's own unit: {unit:
    seconds of one or None, deciles: the nine of them, zero, session: shares without a gap and
    within a session, days_only, life: the median user's time from first to last}; None without
    times.
    """
    if data.times is None:
        return None
    times, unit = np.asarray(data.times), seconds_of(data.times)
    owner = users(data, np.arange(len(times)))
    gap = np.diff(times)[np.diff(owner) == 0]
    life = times[data.ptr[1:] - 1] - times[data.ptr[:-1]]
    day = round(DAY / unit) if unit else None
    return {
        "unit": unit,
        "deciles": np.percentile(gap, np.arange(10, 100, 10)).tolist(),
        "zero": float((gap == 0).mean()),
        "session": float((gap * unit < SESSION).mean()) if unit else None,
        "days_only": bool(day and (times % day == 0).all()),
        "life": float(np.median(life)),
    }


# ---------------------------------------------------------------- who and what is new, what is not


def training_part(data: Data) -> np.ndarray:
    """Mask [M] of the interactions that the split gives to training."""
    if data.meta["split"] == "temporal":
        return np.asarray(data.times) < data.meta["cuts"][0]
    if data.meta["split"] == "files":
        return in_training(data)
    return last_two_apart(np.asarray(data.ptr)) == 0


def cold_of(data: Data) -> dict[str, dict]:
    """{val, test: {users, items: shares of the samples whose user, whose target has no training
    interaction}}.
    """
    known = training_part(data)
    owner = users(data, np.arange(len(data.items)))
    seen_U = np.bincount(owner[known], minlength=data.n_users) > 0
    seen_I = np.bincount(data.items[known], minlength=data.n_items + 1) > 0
    return {
        part: {
            "users": float((~seen_U[owner[index]]).mean()),
            "items": float((~seen_I[data.items[index]]).mean()),
        }
        for part, index in (("val", np.asarray(data.val)), ("test", np.asarray(data.test)))
    }


def repeats_of(data: Data) -> dict[str, float]:
    """{all, test, at_once: share of all interactions, of the test targets, with an item that the
    user had before; of all interactions with the item of the one before}.
    """
    item, owner = np.asarray(data.items), users(data, np.arange(len(data.items)))
    _, first = np.unique(owner * (data.n_items + 1) + item, return_index=True)
    again = np.ones(len(item), bool)
    again[first] = False
    at_once = (np.diff(item) == 0) & (np.diff(owner) == 0)
    return {
        "all": float(again.mean()),
        "test": float(again[np.asarray(data.test)].mean()),
        "at_once": float(at_once.sum() / len(item)),
    }


# ---------------------------------------------------------------- the future in the training part


def future_of(data: Data) -> dict[str, float] | None:
    """What leave-one-out (each user's last item for the test, the second last for validation, all
    others for training) would tell of the future; None without times.

    {any: share of its test targets that lie before a training interaction of another user, share:
    of the training interactions, how many lie after a test target, the mean over targets, item:
    share of the targets whose own item somebody's training interaction after them holds}. After:
    at a later time.
    """
    if data.times is None:
        return None
    item, times = np.asarray(data.items), np.asarray(data.times)
    part = last_two_apart(np.asarray(data.ptr))
    first = np.repeat(data.ptr[:-1], np.diff(data.ptr))
    test = np.flatnonzero((part == 2) & (np.arange(len(part)) > first))  # those with a history
    clock = np.sort(times[part == 0])
    # a user's own training interactions are never later than his last
    later = len(clock) - np.searchsorted(clock, times[test], side="right")
    last_I = np.full(data.n_items + 1, np.iinfo(np.int64).min)
    np.maximum.at(last_I, item[part == 0], times[part == 0])
    return {
        "any": float((later > 0).mean()),
        "share": float((later / len(clock)).mean()),
        "item": float((last_I[item[test]] > times[test]).mean()),
    }


# ---------------------------------------------------------------- how popularity moves


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks of a and b, equal values at their mean rank; 0 where
    one of them is constant.
    """
    ranks = []
    for x in (a, b):
        _, place, times = np.unique(x, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(times) - (times - 1) / 2)[place])
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])


def thirds_of(data: Data) -> list[float] | None:
    """The rank correlations of the items' popularity in the first and second third of the
    interactions by time, in the second and third, in the first and third; None without times.
    """
    if data.times is None:
        return None
    place = np.argsort(np.argsort(data.times, kind="stable"), kind="stable")
    third = place * 3 // len(place)
    count = [np.bincount(data.items[third == n], minlength=data.n_items + 1)[1:] for n in range(3)]
    return [rank_correlation(count[a], count[b]) for a, b in ((0, 1), (1, 2), (0, 2))]


def popularity_of(data: Data) -> dict:
    """{thirds: of thirds_of, top_1, top_10: share of the test targets that are among the most
    popular 1 and 10 % of the items in training, overall, recent: HR@10 over all items of
    popularity in the whole training and in its last seven days (histories masked), recent_count:
    interactions of those days, p: of their difference}. The last four only of a temporal split of
    times with a known unit.
    """
    count_I = popularity(data)
    place = np.argsort(np.argsort(-count_I[1:], kind="stable"), kind="stable")
    target = data.items[np.asarray(data.test)]
    found = {"thirds": thirds_of(data)}
    for percent in (1, 10):
        most = max(1, round(data.n_items * percent / 100))
        found[f"top_{percent}"] = float((place[target - 1] < most).mean())
    unit = None if data.times is None else seconds_of(data.times)
    if unit and data.meta["split"] == "temporal":
        found |= recent_popularity(data, count_I, RECENT * DAY / unit)
    return found


def recent_popularity(data: Data, count_I: np.ndarray, length: float) -> dict[str, float]:
    """{overall, recent, recent_count, p} of popularity_of. length: of the recent time, in the
    log's unit.
    """
    known, times = in_training(data), np.asarray(data.times)
    recent = known & (times > times[known].max() - length)
    recent_I = np.bincount(data.items[recent], minlength=data.n_items + 1).astype(np.float32)
    samples = np.asarray(data.test)[subset(len(data.test), MOST_SAMPLES, 0)]
    a, b = (
        metrics(*full_ranking_of(score_I, data, samples))["hr@10"]
        for score_I in (count_I, recent_I)
    )
    p = sign_flip(user_sums((b - a)[:, None], users(data, samples)))
    return {
        "overall": float(a.mean()),
        "recent": float(b.mean()),
        "recent_count": int(recent.sum()),
        "p": float(p[0]),
    }
