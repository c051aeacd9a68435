"""The comparisons of a table: every row with the reference, means over seeds, pairs planned before.

A comparison is {metric: Test} (stats.py). What a table asks at once is adjusted at once (Holm): its
rows against the reference, its means over seeds against theirs, its planned pairs; each metric by
itself. Pairs that nobody planned are not adjusted, and get no star.

One pair may be the primary comparison: what an experiment was made to ask. It is judged alone, by
one metric, so nothing adjusts it, and it is not among the others.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from delrec.evaluation.stats import (
    SEED,
    Differences,
    RowMetrics,
    Test,
    clusters_of,
    ends_of,
    holm,
    interval,
    unseeded,
)
from delrec.runtime import stop

Comparison = dict[str, Test]  # {metric: test}
AMONG_CANDIDATES = ("hr@1", "ndcg@10")  # the metrics that are compared
LEAST_PAIRS = 3  # seeds, from which the differences of pairs tell how far other seeds would differ
OVER_ALL_ITEMS = ("hr@20", "ndcg@20")
PRIMARY = "hr@1"  # the metric that the primary comparison is judged by


@dataclass
class Planned:
    """What a table compares, fixed before its test part is scored."""

    reference: str  # the row that the others are compared with
    pairs: Sequence[tuple[str, str]] = ()  # more: rows, or means over seeds (rows unseeded)
    margin: float = 0.01  # differences below it count as equal, among candidates
    margin_full: float = 0.003  # the same over all items
    exploratory: bool = False  # a sweep: nothing was asked before, so nothing is marked
    primary: tuple[str, str] | None = None  # the one pair that is judged alone


class Compared:
    """The rows of a table, compared over the same samples.

    value: {row: metrics per sample}; user_n: whose each sample is; floors: rows that no seed can
    change.
    """

    def __init__(
        self,
        value: RowMetrics,
        user_n: np.ndarray,
        margin: float,
        metrics: tuple[str, str] = AMONG_CANDIDATES,
        floors: Collection[str] = (),
    ):
        self.value, self.user_n = value, user_n
        self.metrics, self.floors = metrics, floors
        clusters = clusters_of(user_n)
        self.differences = {m: Differences(value, m, clusters, margin) for m in metrics}
        self.seeds = {}  # {row without its seeds: its rows}
        for name in value:
            self.seeds.setdefault(unseeded(name), []).append(name)
        # a fused row repeats the seeds of its members; "X, shuffled" those of X
        self.several = [
            names
            for row, names in self.seeds.items()
            if len(names) > 1 and "+" not in row and ", " not in row and not self.all_alike(names)
        ]
        self.seeds_df = sum(len(names) - 1 for names in self.several)
        self.variance = {m: self.pooled_variance(m) for m in metrics}

    def all_alike(self, names: list[str]) -> bool:
        """True if rows have the same values of all samples: whatever made them reads no seed."""
        first, *others = (self.value[name] for name in names)
        return all(np.array_equal(first[m], other[m]) for other in others for m in self.metrics)

    def pooled_variance(self, metric: str) -> float:
        """s^2 of a metric over seeds, from all rows with several of them that are trained: the
        mean of the s_r^2 of R_r seeds, each weighing R_r - 1.
        """
        each = [[self.value[name][metric].mean() for name in names] for names in self.several]
        off = sum((len(x) - 1) * np.var(x, ddof=1) for x in each)
        return off / max(self.seeds_df, 1)

    def knows(self, a: str, b: str) -> bool:
        """True if a and b are two rows, or two rows without their seeds."""
        return {a, b} <= set(self.value) or {a, b} <= set(self.seeds)

    def rows(self, a: str, b: str) -> Comparison:
        """Row a minus row b: what is said holds of these two trained models."""
        return {m: self.differences[m].between([a], [b]) for m in self.metrics}

    def means(self, a: str, b: str) -> Comparison:
        """The mean over the seeds of a minus that of b (rows without their seeds); the standard
        error holds for other seeds too. Where no row has several seeds, what they add is not known,
        and what is said holds of these trained models.
        """
        return {
            m: self.differences[m].between(self.seeds[a], self.seeds[b], *self.of_seeds(a, b, m))
            for m in self.metrics
        }

    def of_samples(self, name: str) -> np.ndarray:
        """The primary metric of each sample (n,), of a row or as the mean over a row's seeds."""
        names = [name] if name in self.value else self.seeds[name]
        return np.mean([self.value[each][PRIMARY] for each in names], 0)

    def of_seeds(self, a: str, b: str, metric: str) -> tuple[float, float]:
        """(what other seeds would add to the squared standard error of a minus b, its degrees of
        freedom).

        Where both have the same seeds, s_d^2 / R, s_d the deviation of the R differences: runs of
        one seed share what they were made of (DELRec and its backbone, with stage 1 and without),
        which cancels. Else s^2 / R_a + s^2 / R_b, as if none did.
        """
        if pairs := paired_by_seed(self.seeds[a], self.seeds[b]):
            each = [self.value[x][metric].mean() - self.value[y][metric].mean() for x, y in pairs]
            return float(np.var(each, ddof=1)) / len(each), len(each) - 1
        trained = [self.seeds[row] for row in (a, b) if row not in self.floors]
        return sum(self.variance[metric] / len(names) for names in trained), max(self.seeds_df, 1)


def paired_by_seed(a: list[str], b: list[str]) -> list[tuple[str, str]]:
    """Pairs of the rows of a and b that have the same seeds; none unless all of at least three do.
    Two differences tell too little of their deviation: p < .05 in 12 % of true nulls (of three in
    8 %, at most, simulated).
    """
    rows_a, rows_b = ({tuple(seeds_in(name)): name for name in names} for names in (a, b))
    if len(rows_a) < LEAST_PAIRS or len(rows_a) < len(a) or len(rows_b) < len(b):
        return []
    return [(rows_a[s], rows_b[s]) for s in rows_a] if rows_a.keys() == rows_b.keys() else []


def seeds_in(name: str) -> list[str]:
    """The seeds in a row's name, each once: delrec-s1 has 1, sasrec-s0+delrec-s1 has 0 and 1."""
    return sorted(set(SEED.findall(name)))


def printed_p(test: Test) -> float:
    """The p that a comparison of a row with the reference is judged by: the sign-flip test's."""
    return test["p"]


def larger_p(test: Test) -> float:
    """The p that means over seeds and planned pairs are judged by: the larger of sign-flip test,
    which knows users, and t, which of means knows users and seeds.
    """
    return max(test["p"], test["p_t"])


def adjust(
    comparisons: dict[str, Comparison],
    planned: Planned,
    p_of: Callable[[Test], float] = printed_p,
) -> dict[str, Comparison]:
    """The comparisons with p_adjusted, Holm's over all of them; an exploratory table's stay
    without, and claim no equality.
    """
    for m in next(iter(comparisons.values()), {}):
        tests = [comparison[m] for comparison in comparisons.values()]
        adjusted = holm([p_of(test) for test in tests])
        for test, p in zip(tests, adjusted):
            test["p_adjusted"] = None if planned.exploratory else p
            test["p_equal"] = None if planned.exploratory else test["p_equal"]
    return comparisons


# ---------------------------------------------------------------- what a table compares


def against_reference(compared: Compared, planned: Planned) -> dict[str, Comparison]:
    """{row: row minus reference}; {} where the reference is not among the rows."""
    reference = planned.reference
    if reference not in compared.value:
        return {}
    names = [name for name in compared.value if name not in (reference, "chance")]
    return adjust({name: compared.rows(name, reference) for name in names}, planned)


def every_pair(compared: Compared, names: Sequence[str]) -> dict[str, Comparison]:
    """{"b - a": b minus a} of every two of some rows, a before b; nothing is adjusted."""
    return {f"{b} - {a}": compared.rows(b, a) for i, a in enumerate(names) for b in names[i + 1 :]}


def planned_pairs(compared: Compared, planned: Planned) -> dict[str, Comparison]:
    """{"a - b": a minus b} of the planned pairs: of two rows, or of two means over seeds."""
    found = {f"{a} - {b}": of_pair(compared, a, b) for a, b in planned.pairs}
    return adjust(found, planned, larger_p)


def of_pair(compared: Compared, a: str, b: str, flag: str = "--compare") -> Comparison:
    """a minus b, two rows or two means over seeds. flag: what names them."""
    if not compared.knows(a, b):
        means = [name for name in compared.seeds if name not in compared.value]
        stop(
            f"{flag} takes two rows or two means over seeds, it names {a} and {b}; the rows "
            f"are {', '.join(compared.value)}; the means are {', '.join(means) or 'none'}"
        )
    return compared.rows(a, b) if {a, b} <= set(compared.value) else compared.means(a, b)


def primary_pair(compared: Compared, planned: Planned) -> dict | None:
    """{pair, metric, test} of the primary comparison, None where there is none. The test has its
    own p in p_adjusted, the larger one of sign-flip test and t, and the interval of the difference
    over users.
    """
    if planned.primary is None:
        return None
    a, b = planned.primary
    test = of_pair(compared, a, b, "--primary")[PRIMARY]
    gain_n = compared.of_samples(a) - compared.of_samples(b)
    test |= {"p_adjusted": larger_p(test), "interval": ends_of(interval(gain_n, compared.user_n))}
    return {"pair": f"{a} - {b}", "metric": PRIMARY, "test": test}


def over_seeds(compared: Compared, planned: Planned) -> dict[str, dict]:
    """Rows of which there are several seeds, {row: {seeds, its mean and deviation in each metric,
    <metric>_interval of the samples' means over seeds, <metric>_each, against, test}}; test is the
    mean minus that of `against`, the reference's.
    """
    base = unseeded(planned.reference)
    several = {row: names for row, names in compared.seeds.items() if len(names) > 1}
    found = {row: {"seeds": len(names)} for row, names in several.items()}
    for m in compared.metrics if several else ():
        of_seeds = {row: [compared.value[name][m] for name in several[row]] for row in several}
        mean_nR = np.stack([np.mean(values, 0) for values in of_seeds.values()], 1)
        low_high = interval(mean_nR, compared.user_n).T
        for own, values, ends in zip(found.values(), of_seeds.values(), low_high):
            each = [float(value.mean()) for value in values]
            own[m] = [float(np.mean(each)), float(np.std(each, ddof=1))]
            own |= {f"{m}_interval": ends_of(ends), f"{m}_each": each}
    for row, own in found.items():
        own["against"] = base if base in compared.seeds and base != row else None
    tested = {row: compared.means(row, base) for row, own in found.items() if own["against"]}
    for row, test in adjust(tested, planned, larger_p).items():
        found[row]["test"] = test
    return found
