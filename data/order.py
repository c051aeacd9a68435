"""Does the order of a log say anything? Ties in time and what an order of ids gives away, the rules
that a shuffling destroys, and what it takes from a model that needs no training.

After "Does It Look Sequential?" (arXiv 2408.12008). M interactions, I items (ids 1..I, 0 pads),
n samples, L history length.
"""

from collections.abc import Callable

import numpy as np

from delrec.data.counts import Neighbours, near_in_training, neighbours_of, scores_of_catalogue
from delrec.data.log import Log
from delrec.data.prepared import Data, candidates, subset, users
from delrec.data.rules import Rules, candidates_of_part, interactions_of, rows_by, samples_of
from delrec.metrics import compare, metrics
from delrec.significance import sign_flip, user_sums

C = 15  # candidates of a sample, stored for every log
SEEDS = range(5)  # of every shuffling
MOST_SAMPLES = 5_000  # test samples that are ranked again and again
LEAST, SURE = 5, 0.1  # a rule holds more often, and for a larger share of what it begins with
LONG = 5  # earlier items: a history that has an order worth the name

# ---------------------------------------------------------------- ties


def is_tied(data: Data) -> np.ndarray:
    """Mask [M] of the interactions with the time of the user's interaction before; where only an
    order is known, none.
    """
    tied = np.zeros(len(data.items), bool)
    if data.times is not None:
        owner = users(data, np.arange(len(data.items)))
        tied[1:] = (np.diff(data.times) == 0) & (np.diff(owner) == 0)
    return tied


def ties_of(log: Log, rules: Rules, data: Data) -> dict:
    """How many interactions and test targets are in a tie, and how often the rule "the lowest
    candidate id above the last item's" is right when ties stand in each of three orders.

    rules: those of the preparation, its split named.
    """
    tied = is_tied(data)
    orders = {ties: ties for ties in ("shuffled", "item", "file")}
    if not tied.any():
        orders = {"untied": rules.ties}
    return {
        "known": data.times is not None,
        "share": float(tied.mean()),
        "share_test": float(tied[np.asarray(data.test)].mean()),
        "chance": 1 / C,
        "next_id": {name: next_id(log, rules, ties) for name, ties in orders.items()},
    }


def next_id(log: Log, rules: Rules, ties: str) -> float:
    """The share of the test targets that are the lowest candidate id above the last item's, when
    equal times stand in this order. No such candidate: not right.
    """
    left = interactions_of(rows_by(rules, log), rules.core, ties)
    samples = samples_of(left, rules)
    test = samples.of["test"]
    cand_nC = candidates_of_part(left, samples, "test", C, rules.seed).astype(np.int64)
    above_nC = np.where(cand_nC > left.item[test - 1][:, None], cand_nC, left.n_items + 1)
    return float((above_nC.min(1) == left.item[test]).mean())


# ---------------------------------------------------------------- rules


def count_rules(item: np.ndarray, user: np.ndarray) -> tuple[int, int]:
    """How many sequential rules hold: (of two items, of three).

    a -> b is a rule if b came right after a more than LEAST times and count(ab) / count(a) > SURE;
    ab -> c if count(abc) > LEAST and count(abc) / count(ab) > SURE.
    """
    I1, item = int(item.max()) + 1, item.astype(np.int64)
    follows = user[1:] == user[:-1]
    pair = (item[:-1] * I1 + item[1:])[follows]
    pairs, which, times = np.unique(pair, return_inverse=True, return_counts=True)
    two = (times > LEAST) & (times > SURE * np.bincount(item)[pairs // I1])
    # the number of the pair that begins at each interaction
    pair_at = np.zeros(len(follows), np.int64)
    pair_at[follows] = which
    triple = (pair_at[:-1] * I1 + item[2:])[follows[:-1] & follows[1:]]
    triples, times_3 = np.unique(triple, return_counts=True)
    three = (times_3 > LEAST) & (times_3 > SURE * times[triples // I1])
    return int(two.sum()), int(three.sum())


def rules_under_shuffling(data: Data) -> dict[str, dict]:
    """{two, three: {rules, shuffled, change}}: the rules of the whole log, their mean number when
    every user's items are permuted, and R = shuffled / rules - 1 (None without any rule).
    """
    item = np.asarray(data.items)
    user = users(data, np.arange(len(item)))
    real, shuffled = count_rules(item, user), []
    for seed in SEEDS:
        order = np.lexsort((np.random.default_rng(seed).random(len(item)), user))
        shuffled.append(count_rules(item[order], user))
    found = {}
    for name, rules, after in zip(("two", "three"), real, np.mean(shuffled, 0)):
        change = float(after / rules - 1) if rules else None
        found[name] = {"rules": rules, "shuffled": float(after), "change": change}
    return found


# ---------------------------------------------------------------- what a model loses


def permuted(old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The whole history in a random order."""
    return rng.permutation(old)


def permuted_but_last(old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All but the last item in a random order: what is lost then is order, not recency."""
    return np.append(rng.permutation(old[:-1]), old[-1])


def last_two_swapped(old: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The last two items in each other's place."""
    return np.append(old[:-2], old[:-3:-1])


VARIANTS: dict[str, Callable] = {
    "whole history": permuted,
    "all but the last item": permuted_but_last,
    "only the last two swapped": last_two_swapped,
}


def windows_of(
    data: Data, samples: np.ndarray, change: Callable | None, seed: int = 0, L: int = 10
) -> np.ndarray:
    """The last L items of each history after a change of the whole of it (None: as it is), padded
    on the left with 0: int64 (n, L).
    """
    rng, old_nL = np.random.default_rng(seed), np.zeros((len(samples), L), np.int64)
    for old_L, sample, begin in zip(old_nL, samples, data.ptr[users(data, samples)]):
        old = np.array(data.items[begin:sample])  # a permutation of nothing wants it writable
        tail = (change(old, rng) if change else old)[-L:]
        old_L[L - len(tail) :] = tail
    return old_nL


def answers(
    data: Data, near: Neighbours, samples: np.ndarray, cand_nC: np.ndarray, old_nL: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What co-occurrence answers: (HR@1 among the candidates, HR@10 and NDCG@10 over all items with
    the history masked, float64 (n, 3); its ten best items in any order, 0 where fewer stood near,
    (n, 10)).
    """
    target_n1 = data.items[samples].astype(np.int64)[:, None]
    begins = data.ptr[users(data, samples)]
    values, lists = [], []
    rows = max(1, 2**22 // (data.n_items + 1))
    for i in range(0, len(samples), rows):
        at = slice(i, i + rows)
        s_nI = scores_of_catalogue(near, old_nL[at])
        near_nC = np.take_along_axis(s_nI, cand_nC[at], 1)
        own_n1 = np.take_along_axis(s_nI, target_n1[at], 1)
        s_nI[:, 0] = -np.inf
        for s_I, begin, sample in zip(s_nI, begins[at], samples[at]):
            s_I[data.items[begin:sample]] = -np.inf
        top_n10 = np.argpartition(-s_nI, 10, axis=1)[:, :10]
        lists.append(np.where(np.take_along_axis(s_nI, top_n10, 1) > 0, top_n10, 0))
        np.put_along_axis(s_nI, target_n1[at], own_n1, 1)
        full = metrics((s_nI > own_n1).sum(1), (s_nI == own_n1).sum(1) - 1)
        among = metrics(*compare(near_nC, cand_nC[at] == target_n1[at]))
        values.append(np.stack([among["hr@1"], full["hr@10"], full["ndcg@10"]], 1))
    return np.concatenate(values), np.concatenate(lists)


def jaccard(a_nk: np.ndarray, b_nk: np.ndarray) -> np.ndarray:
    """|A n B| / |A u B| of the lists of each sample, 0 is no item; 1 for two empty ones: (n,)."""
    shared_n = ((a_nk[:, :, None] == b_nk[:, None]) & (a_nk[:, :, None] > 0)).sum((1, 2))
    union_n = (a_nk > 0).sum(1) + (b_nk > 0).sum(1) - shared_n
    return np.where(union_n > 0, shared_n / np.maximum(union_n, 1), 1.0)


def shuffling_of(data: Data) -> dict:
    """What co-occurrence loses when the histories of the test part are shuffled; the model and the
    targets stay.

    {samples, length_1: share of histories of one item, which no shuffling changes, long: share of
    five and more, variants: {name: {metric: before, after, p; jaccard; long: the same metrics on
    long histories}}}. After: the mean over the seeds; p: sign-flip over users.
    """
    which = subset(len(data.test), MOST_SAMPLES, 0)
    samples = np.asarray(data.test)[which]
    cand_nC, user_n = candidates(data, "test", C, which), users(data, samples)
    near = neighbours_of(near_in_training(data))
    real_nR, list_n10 = answers(data, near, samples, cand_nC, windows_of(data, samples, None))
    earlier_n = samples - data.ptr[user_n]
    found = {}
    for name, change in VARIANTS.items():
        seeds = [0] if change is last_two_swapped else SEEDS  # nothing is drawn there
        after, alike = [], []
        for seed in seeds:
            old_nL = windows_of(data, samples, change, seed)
            value_nR, changed_n10 = answers(data, near, samples, cand_nC, old_nL)
            after.append(value_nR)
            alike.append(jaccard(list_n10, changed_n10).mean())
        after_nR, is_long = np.mean(after, 0), earlier_n >= LONG
        found[name] = {
            **compared(real_nR, after_nR, user_n),
            "jaccard": float(np.mean(alike)),
            "long": compared(real_nR[is_long], after_nR[is_long], user_n[is_long]),
        }
    return {
        "samples": len(samples),
        "users": len(np.unique(user_n)),
        "length_1": float((earlier_n == 1).mean()),
        "long": float((earlier_n >= LONG).mean()),
        "variants": found,
    }


def compared(before_nR: np.ndarray, after_nR: np.ndarray, user_n: np.ndarray) -> dict:
    """{hr@1, hr@10, ndcg@10: {before, after, p}}; empty without a sample."""
    if not len(user_n):
        return {}
    p_R = sign_flip(user_sums(after_nR - before_nR, user_n))
    ends = zip(before_nR.mean(0).tolist(), after_nR.mean(0).tolist(), p_R.tolist())
    return {
        metric: {"before": before, "after": after, "p": p}
        for metric, (before, after, p) in zip(("hr@1", "hr@10", "ndcg@10"), ends)
    }
