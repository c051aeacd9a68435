"""What may be said of a difference: bootstrap intervals over users, paired tests, means over
seeds.
"""

import math
import re

import numpy as np

RowMetrics = dict[str, dict[str, np.ndarray]]  # {row: {metric: its value for each sample (n,)}}
Intervals = dict[str, dict[str, np.ndarray]]  # {row: {metric: the ends of its interval (2,)}}


def interval(
    value_nR: np.ndarray, user_n: np.ndarray, draws: int = 2000, seed: int = 0
) -> np.ndarray:
    """95 % bootstrap interval (2,) of the mean, resampling users (a user's samples are not
    independent); of several columns (n, R) at once: (2, R).
    """
    _, row = np.unique(user_n, return_inverse=True)
    columns = np.asarray(value_nR, float).reshape(len(row), -1).T
    total, count = np.stack([np.bincount(row, c) for c in columns], 1), np.bincount(row)
    rng, means = np.random.default_rng(seed), []
    # 50 draws at a time: draws x users would not fit for large data
    for _ in range(0, draws, 50):
        times = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), 50)
        means.append((times @ total) / (times @ count)[:, None])
    low_high = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return low_high if np.ndim(value_nR) > 1 else low_high[:, 0]


def paired_t(a_n: np.ndarray, b_n: np.ndarray, user_n: np.ndarray) -> float:
    """p of the paired t-test of mean(a) = mean(b), users as clusters (with one sample a user, the
    ordinary test).
    """
    d = np.asarray(a_n - b_n, float)
    _, row = np.unique(user_n, return_inverse=True)
    per_user = np.bincount(row, d - d.mean())
    G = len(per_user)
    se = math.sqrt((per_user**2).sum() * G / max(G - 1, 1)) / len(d)
    if G < 2:  # one user tells nothing of others
        return 1.0
    if se == 0:
        return 1.0 if d.mean() == 0 else 0.0
    t, df = abs(d.mean()) / se, G - 1
    # with x = tan(angle) sqrt(df) the density of t is cos(angle)^(df-1)
    x = np.linspace(0, math.atan(t / math.sqrt(df)), 4001)
    y = np.linspace(0, math.pi / 2, 4001)
    within = np.trapezoid(np.cos(x) ** (df - 1), x)
    return float(max(0.0, 1 - within / np.trapezoid(np.cos(y) ** (df - 1), y)))


def mcnemar(hit_a: np.ndarray, hit_b: np.ndarray) -> float:
    """p of the exact McNemar test of two 0/1 columns: the binomial test of the samples on which
    only one of them is right.
    """
    only_a, only_b = int((hit_a & ~hit_b).sum()), int((~hit_a & hit_b).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    log_p = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * sum(map(math.exp, log_p)))


def difference(
    a: dict[str, np.ndarray],
    b: dict[str, np.ndarray],
    user: np.ndarray,
    hr: int = 1,
    ndcg: int = 10,
) -> dict[str, float]:
    """The metrics of row a minus those of row b, tested: HR by McNemar, which takes samples of one
    user as independent and knows no ties (they are left out), and by the paired t; NDCG by the
    paired t.
    """
    hit, gain = f"hr@{hr}", f"ndcg@{ndcg}"
    whole = np.isin(a[hit], (0, 1)) & np.isin(b[hit], (0, 1))
    return {
        hit: float((a[hit] - b[hit]).mean()),
        f"p_mcnemar_{hit}": mcnemar(a[hit][whole] == 1, b[hit][whole] == 1),
        f"p_t_{hit}": paired_t(a[hit], b[hit], user),
        gain: float((a[gain] - b[gain]).mean()),
        f"p_t_{gain}": paired_t(a[gain], b[gain], user),
    }


def unseeded(name: str) -> str:
    """A row's name without its seeds: delrec-s1 -> delrec, sasrec-s0+delrec-s1 -> sasrec+delrec."""
    return re.sub(r"-s\d+(?=$|\+|,)", "", name)


def over_seeds(
    value: RowMetrics, user: np.ndarray, reference: str, keys: tuple[str, ...] = ("hr@1", "ndcg@10")
) -> dict[str, dict]:
    """Rows of which there are several seeds: mean and deviation, the interval of the samples' means
    over seeds, and tests of those against the reference's.
    """
    groups = {}
    for name in value:
        groups.setdefault(unseeded(name), []).append(name)
    if not any(len(names) > 1 for names in groups.values()):
        return {}
    mean = {
        g: {m: np.mean([value[n][m] for n in names], 0) for m in keys}
        for g, names in groups.items()
    }
    base, found = unseeded(reference), {}
    for g, names in groups.items():
        if len(names) == 1:
            continue
        each = {m: [value[n][m].mean() for n in names] for m in keys}
        found[g] = {
            "seeds": len(names),
            **{m: [float(np.mean(x)), float(np.std(x, ddof=1))] for m, x in each.items()},
            "against": base if base in groups and base != g else None,
            **{f"{m}_interval": list(map(float, interval(mean[g][m], user))) for m in keys},
            **{f"{m}_each": list(map(float, x)) for m, x in each.items()},
        }
        if found[g]["against"]:
            found[g] |= {f"{m}_gain": float((mean[g][m] - mean[base][m]).mean()) for m in keys}
            found[g] |= {f"p_{m}": paired_t(mean[g][m], mean[base][m], user) for m in keys}
    return found
