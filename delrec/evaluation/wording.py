"""Numbers, tests and their marks as a table writes them, and the sentences that explain them."""

from collections.abc import Callable, Sequence

from delrec.evaluation.comparisons import OVER_ALL_ITEMS, Comparison
from delrec.evaluation.stats import Test
from delrec.significance import draws_of

SHOWN = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
# over all items
FULL = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
ABOUT_PAPER = (
    "paper: what DELRec prints for the method or variant of that name, with titles, Flan-T5-XL "
    "and a protocol of its own (README); not a target"
)
ABOUT_SEEDS = (
    "mean ± standard deviation over seeds [95 % interval over users], then the difference from the "
    "mean of the row named. p: sign-flip test, which holds for other users; t: paired t whose "
    "standard error holds for other users and other seeds (SE^2 = SE_users^2 + s^2 / R + s^2 / R', "
    "R and R' seeds, s from all rows with several; rows of the same three or more seeds are "
    "paired, SE_users^2 + s_d^2 / R, s_d of their differences; degrees of freedom by "
    "Satterthwaite); a star needs both p, adjusted for all rows of this table (Holm)"
)

ABOUT_ONE_SEED = "no row has several seeds, so p and t hold of these trained models alone"
ADJUSTED_PAIRS = "adjusted: the larger of p and t, for all these pairs (Holm)"
# by whether any row has several seeds
ABOUT_PLANNED = {
    True: "planned pairs, rows or means over seeds (of means, t holds for other seeds too); "
    f"{ADJUSTED_PAIRS}",
    False: f"planned pairs; {ABOUT_ONE_SEED}; {ADJUSTED_PAIRS}",
}


# ---------------------------------------------------------------- numbers


def mark(test: Test | None) -> str:
    """The marks of a test: ** or * where a difference is shown (adjusted p < .01, < .05), = where
    equality within the margin is (TOST, p < .05); none where nothing was tested or planned.
    """
    if test is None or test["p_adjusted"] is None:
        return ""
    p, equal = test["p_adjusted"], "=" if test["p_equal"] < 0.05 else ""
    return ("**" if p < 0.01 else "*" if p < 0.05 else "") + equal


def p_number(p: float | None) -> str:
    """A p as .034 or 2e-05; nothing for None."""
    if p is None:
        return ""
    return "<1e-15" if p < 1e-15 else f"{p:.2g}".replace("0.", ".", 1)


def p_text(p: float) -> str:
    """A p with its name: p=.034."""
    text = p_number(p)
    return f"p{text}" if text.startswith("<") else f"p={text}"


def short(x: float | None, digits: int = 3) -> str:
    """A metric as .571; nothing for None."""
    if x is None:
        return ""
    text = f"{x:.{digits}f}"
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def ends_text(ends: Sequence[float | None], text: Callable[[float], str] = "{:.3f}".format) -> str:
    """An interval in brackets; what stands there where one user has none."""
    return "[one user]" if ends[0] is None else f"[{', '.join(map(text, ends))}]"


def interval_text(v: dict) -> str:
    """HR@1 of a row in a group, with its interval."""
    return f"{v['hr@1']:.3f} {ends_text((v['low'], v['high']))}"


def group_head(group: str, v: dict) -> str:
    """The head over a group: its samples and users."""
    return f"{group} ({v['n']} of {v['users']} users)"


def least(test: Test | None, digits: int = 3) -> str:
    """The smallest difference that one test alone finds with power .8; nothing without a test."""
    return short(test["least"] if test else None, digits)


def of_metric(row: dict, metric: str) -> Test | None:
    """A row's test against the reference in one metric; None where there is none."""
    return row["test"][metric] if row.get("test") else None


def cells_of(test: Test, digits: int = 3) -> list[str]:
    """A test as cells: difference with marks, p, adjusted p, p of t, least."""
    return [
        f"{test['difference']:+.{digits}f}{mark(test)}",
        p_number(test["p"]),
        p_number(test["p_adjusted"]),
        p_number(test["p_t"]),
        least(test, digits),
    ]


def heads_of(metrics: Sequence[str], adjusted: bool = True) -> list[str]:
    """The heads over cells_of of some metrics. adjusted: is there an adjusted p?"""
    own = ["p", "adjusted" if adjusted else "", "t", "least"]
    return [head for m in metrics for head in (m.upper(), *own)]


def gain_text(test: Test, digits: int = 3) -> str:
    """A difference between means over seeds, with its tests."""
    both_p = f"{p_text(test['p'])}, t {p_text(test['p_t'])}"
    return f"{test['difference']:+.{digits}f}{mark(test)} ({both_p}, least {least(test, digits)})"


def seeds_text(v: dict, metrics: Sequence[str]) -> str:
    """Mean and deviation over seeds, and the difference from the reference."""
    text = "  ".join(f"{m.upper()} {v[m][0]:.4f} +- {v[m][1]:.4f}" for m in metrics)
    if v["against"]:
        gains = [f"{m.upper()} {gain_text(v['test'][m], 4)}" for m in metrics]
        text += f"  against {v['against']}: " + "  ".join(gains)
    return text


def as_markdown(grid: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown. grid: its head, then its rows."""
    head, *body = grid
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body]]


# ---------------------------------------------------------------- sentences


def about_marks(result: dict) -> str:
    """What the marks of the rows mean, and the column "least"."""
    reference = result["reference"]
    found = (
        f"least: the smallest true difference from {reference} that one test alone, before Holm, "
        "shows on these samples four times in five"
    )
    if result["exploratory"]:
        return f"a sweep: nothing was asked before it was made, so no row is marked; {found}"
    return (
        f"* shown to differ from {reference} (adjusted p < .05), ** p < .01; a star does not say "
        "which way: the row is better where its number is the higher one, worse where it is the "
        f"lower one; = shown to be equal to it within {short(result['margin'])} (TOST, p < .05), "
        f"no mark: neither is shown; {found}"
    )


def about_tests(result: dict) -> str:
    """What the columns of a comparison mean."""
    draws = draws_of(len(result["rows"]))
    return (
        "p: sign-flip test, how often the difference is as large when each user's sign is drawn "
        f"(all patterns of few users, else {draws:,}, so none is below "
        f"{p_number(1 / (1 + draws))}); adjusted: p after Holm, for all rows of the table at once; "
        "t: p of the paired t-test, users as clusters, "
        f"{result['users_worth'] - 1:.3g} degrees of freedom (G_eff - 1); both hold for other "
        "users, not for other seeds"
    )


def said_by_users(comparisons: dict[str, Comparison]) -> str | None:
    """A sentence that names the comparisons which look otherwise, in sign or significance, when
    every user counts alike and not every sample; None where there are none.
    """
    differing = []
    for name, comparison in comparisons.items():
        for m, test in comparison.items():
            if test["of_users"] is None:
                continue
            other_sign = test["difference"] * test["of_users"] < 0
            if other_sign or (test["p"] < 0.05) != (test["p_of_users"] < 0.05):
                digits = 4 if m in OVER_ALL_ITEMS else 3
                number = f"{test['of_users']:+.{digits}f} ({p_text(test['p_of_users'])})"
                differing.append(f"{name} {m.upper()} {number}")
    if not differing:
        return None
    return (
        "with every user counted alike, not every sample, sign or significance is another: "
        + "; ".join(differing)
    )


def has_paper(result: dict) -> bool:
    """True if the paper prints a number for any row."""
    return any(row["paper"] for row in result["rows"].values())


def has_latency(result: dict) -> bool:
    """True if any row was timed."""
    return any("ms" in row for row in result["rows"].values())


def below(result: dict) -> list[str]:
    """The lines that evaluate.py --notes adds below the rows."""
    return result["said"]["below"] if "said" in result else []


def where_timed(result: dict) -> str:
    """On what the rows' requests were timed."""
    places = {row["ms_on"] for row in result["rows"].values() if "ms" in row}
    if len(places) == 1:
        return f"on {places.pop()}"
    return "a backbone's on one core, an LM's on the GPU"
