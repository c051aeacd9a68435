"""What may be said of a difference between rows of a table: intervals and tests over users.

A user's samples are not independent of each other, so users are what is drawn and tested. Notation:
d is a metric of row A minus row B on one sample; S_g the sum of d over the n_g samples of user g;
n all samples, G all users; the difference of the rows is the mean of d, sum_g S_g / n.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from delrec.significance import draws_of, share_as_large, sign_flips, user_sums

RowMetrics = dict[str, dict[str, np.ndarray]]  # {row: {metric: its value for each sample (n,)}}
Intervals = dict[str, dict[str, np.ndarray]]  # {row: {metric: the ends of its interval (2,)}}
Test = dict[str, float | None]  # what Differences.between returns

SEED = re.compile(r"-s(\d+)(?=$|\+|,)")  # in a row's name


def unseeded(name: str) -> str:
    """A row's name without its seeds: delrec-s1 -> delrec, sasrec-s0+delrec-s1 -> sasrec+delrec."""
    return SEED.sub("", name)


def interval(
    value_nR: np.ndarray, user_n: np.ndarray, draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """95 % bootstrap interval (2,) of the mean, resampling users (a user's samples are not
    independent); of several columns (n, R) at once: (2, R). NaN for one user, who tells nothing of
    others.
    """
    _, row = np.unique(user_n, return_inverse=True)
    if row.max(initial=0) == 0:
        return np.full((2, *np.shape(value_nR)[1:]), np.nan)
    columns = np.asarray(value_nR, float).reshape(len(row), -1).T
    total, count = np.stack([np.bincount(row, c) for c in columns], 1), np.bincount(row)
    rng, means = np.random.default_rng(seed), []
    # 50 draws at a time: draws x users would not fit for large data
    for _ in range(0, draws, 50):
        times = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), 50)
        means.append((times @ total) / (times @ count)[:, None])
    low_high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low_high if np.ndim(value_nR) > 1 else low_high[:, 0]


def ends_of(low_high: np.ndarray) -> list[float | None]:
    """The ends of an interval as JSON holds them: None where there is none."""
    return [None if math.isnan(end) else float(end) for end in low_high]


# ---------------------------------------------------------------- users


@dataclass
class Clusters:
    """The users whose samples a table is about."""

    row_n: np.ndarray  # the number (0..G-1) of each sample's user
    count_G: np.ndarray  # n_g, the samples of each user

    @property
    def worth(self) -> float:
        """How many users with equally many samples they are worth (Kish)."""
        return kish(self.count_G)

    @property
    def even(self) -> bool:
        """True if all users have equally many samples."""
        return bool((self.count_G == self.count_G[0]).all())

    def sums(self, value_nR: np.ndarray) -> np.ndarray:
        """The sums over each user's samples of some columns, (G, R)."""
        return user_sums(value_nR, self.row_n)


def clusters_of(user_n: np.ndarray) -> Clusters:
    """The clusters of samples. user_n: whose each sample is."""
    _, row_n, count_G = np.unique(user_n, return_inverse=True, return_counts=True)
    return Clusters(row_n, count_G)


def kish(count_G: np.ndarray) -> float:
    """G_eff = (sum n_g)^2 / sum n_g^2: G users of these sizes tell as much as G_eff of one size."""
    return float(count_G.sum() ** 2 / (count_G.astype(float) ** 2).sum())


# ---------------------------------------------------------------- Student's t


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t for t >= 0: I_x(df/2, 1/2) / 2 with x = df / (df + t^2)."""
    x, rest = df / (df + t * t), t * t / (df + t * t)
    if x < (df / 2 + 1) / (df / 2 + 2.5):
        return incomplete_beta(df / 2, 0.5, x, rest) / 2
    return (1 - incomplete_beta(0.5, df / 2, rest, x)) / 2  # where its fraction converges


def incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, by its continued fraction from the last
    term to the first. rest: 1 - x.
    """
    if x <= 0:
        return 0.0
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log(rest)
    value = 1.0
    for m in range(40 + 4 * math.isqrt(int(max(a, b))), 0, -1):
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + even / (1 + odd / value)
    return math.exp(log_front) / a / (1 - (a + b) * x / (a + 1) / value)


def standard_error(sum_G: np.ndarray, count_G: np.ndarray) -> float:
    """SE of the mean of d: SE^2 = G/(G-1) sum_g (S_g - n_g mean)^2 / n^2; infinite for one user,
    who tells nothing of others.
    """
    G, n = len(sum_G), count_G.sum()
    if G < 2:
        return math.inf
    off_G = sum_G - count_G * (sum_G.sum() / n)
    return math.sqrt(G / (G - 1) * (off_G**2).sum()) / n


def t_test(mean: float, se: float, df: float) -> float:
    """p of mean = 0, two-sided."""
    if se == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * t_tail(abs(mean) / se, df) if math.isfinite(se) else 1.0


def t_above(p: float, df: float) -> float:
    """The t >= 0 with P(T > t) = p < 1/2, by halving."""
    low, high = 0.0, 1.0
    while t_tail(high, df) > p and high < 1e9:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > p else (low, middle)
    return high


def least_found(se: float, df: float) -> float:
    """The smallest true difference that one t-test at .05 finds four times in five: 2.8 SE, and
    more where there are few degrees of freedom.
    """
    return (t_above(0.025, df) + t_above(0.2, df)) * se


def joined_df(parts: Sequence[tuple[float, float]]) -> float:
    """The degrees of freedom of a sum of estimated variances v, each with its df (Satterthwaite):
    (sum v)^2 / sum (v^2 / df).
    """
    total = sum(v for v, _ in parts)
    if total == 0 or not math.isfinite(total):
        return parts[0][1]
    return total**2 / sum(v * v / df for v, df in parts if v)


def equality_test(mean: float, se: float, df: float, margin: float) -> float:
    """p of TOST, two one-sided tests of |difference| >= margin: small where the rows are equal
    within the margin. t = (margin - |mean|) / SE is the smaller of both.
    """
    inside = margin - abs(mean)
    if se == 0:
        return 0.0 if inside > 0 else 1.0
    if not math.isfinite(se):
        return 1.0
    tail = t_tail(abs(inside) / se, df)
    return tail if inside > 0 else 1 - tail


def holm(p: Sequence[float]) -> list[float]:
    """p values of several tests, each adjusted for all of them (Holm): sorted, the k-th of m is
    max over j <= k of min(1, (m - j + 1) p_j).
    """
    p = np.asarray(p, float)
    order, m = np.argsort(p, kind="stable"), len(p)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((m - np.arange(m)) * p[order]))
    return adjusted.tolist()


# ---------------------------------------------------------------- rows compared


class Differences:
    """The differences between the rows of a table in one metric, tested."""

    def __init__(self, value: RowMetrics, metric: str, clusters: Clusters, margin: float):
        self.place = {name: i for i, name in enumerate(value)}
        self.clusters, self.margin = clusters, margin
        self.sum_GR = clusters.sums(np.stack([row[metric] for row in value.values()], 1))
        draws = draws_of(len(value))
        self.flipped_PR = sign_flips(self.sum_GR, draws=draws)
        # the mean over users of each user's mean, where it is another number
        self.mean_GR, self.flipped_means_PR = None, None
        if not clusters.even:
            self.mean_GR = self.sum_GR / clusters.count_G[:, None]
            self.flipped_means_PR = sign_flips(self.mean_GR, draws=draws)

    def between(
        self, a: Sequence[str], b: Sequence[str], of_seeds: float = 0.0, seeds_df: float = math.inf
    ) -> Test:
        """The mean of rows `a` minus the mean of rows `b`. of_seeds: what training again with other
        seeds adds to the squared standard error, s_A^2 / R_A + s_B^2 / R_B; seeds_df: the degrees
        of freedom of s.

        difference, se; p of the sign-flip test, p_t of the paired t; least: the smallest true
        difference that this t alone, before Holm, finds with power .8; margin, and p_equal of being
        equal within it;
        of_users, p_of_users: the same with every user counted alike, None where that is no other
        number. p_adjusted: None, Holm's once it is known.
        """
        w_R = np.zeros(len(self.place))
        for rows, sign in ((a, 1), (b, -1)):
            for name in rows:
                w_R[self.place[name]] += sign / len(rows)
        sum_G, count_G = self.sum_GR @ w_R, self.clusters.count_G
        mean = rounded(sum_G.sum() / count_G.sum())
        of_users = standard_error(sum_G, count_G) ** 2
        se = rounded(math.sqrt(of_users + of_seeds))
        known = math.isfinite(se)
        df = joined_df([(of_users, self.clusters.worth - 1), (of_seeds, seeds_df)])
        found = {
            "difference": mean,
            "se": se if known else None,
            "p": share_as_large(self.flipped_PR @ w_R, sum_G.sum()),
            "p_t": t_test(mean, se, df),
            "p_adjusted": None,
            "least": least_found(se, df) if known else None,
            "margin": self.margin,
            "p_equal": equality_test(mean, se, df, self.margin),
            "of_users": None,
            "p_of_users": None,
        }
        if self.mean_GR is not None:
            mean_G = self.mean_GR @ w_R
            found["of_users"] = rounded(mean_G.mean())
            found["p_of_users"] = share_as_large(self.flipped_means_PR @ w_R, mean_G.sum())
        return found


def rounded(x: float) -> float:
    """The number; 0 for what only rounding leaves of equal rows."""
    return 0.0 if abs(x) < 1e-12 else float(x)


def difference(a_n: np.ndarray, b_n: np.ndarray, user_n: np.ndarray, margin: float = 0.01) -> Test:
    """The mean of a minus that of b, two values of every sample, tested (Differences.between)."""
    value = {"a": {"value": np.asarray(a_n, float)}, "b": {"value": np.asarray(b_n, float)}}
    return Differences(value, "value", clusters_of(user_n), margin).between("a", "b")
