"""What a table comes to in plain sentences, the first lines of table.txt and of the page: the
primary comparison, where one was named; which row is best, by how much against the reference, and
whether that difference is shown.

Made from one dict (metrics.json, see measure.py); nothing here measures.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from delrec.evaluation.comparisons import AMONG_CANDIDATES, OVER_ALL_ITEMS, Comparison
from delrec.evaluation.stats import Test, unseeded
from delrec.evaluation.wording import ends_text, p_text, short

NEAR, ALL = AMONG_CANDIDATES[1], OVER_ALL_ITEMS[1]  # the metrics that say which row is best
ABOUT_VERDICT = (
    "NDCG@k: 1 where the true next item is ranked first, less the lower it stands, 0 below place "
    "k; the mean over the samples. Reference: the row that the others are compared with. p after "
    "Holm: how often a difference as large comes by chance alone, adjusted for all rows of the "
    "table; below .05 the difference is shown. Equal within a margin: a test of its own (TOST) "
    "shows that the true difference is smaller than the margin, p < .05"
)


@dataclass
class Ranking:
    """Rows as one metric ranks them."""

    where: str  # what they rank
    metric: str
    value: dict[str, float]  # {row: the metric}
    test: dict[str, Test]  # {row: row minus reference}, of the rows that were tested
    reference: str | None
    floors: Collection[str]  # rows that need no training
    kind: str = "row"

    def best_first(self) -> list[str]:
        """The rows, the best first; among equals the reference stands before others."""
        return sorted(self.value, key=lambda row: (-self.value[row], row != self.reference))

    def trained(self) -> "Ranking":
        """The ranking of the trained rows, without the floors."""
        value = {row: v for row, v in self.value.items() if row not in self.floors}
        return replace(self, value=value, kind="trained row")


def verdict(result: dict) -> list[str]:
    """The sentences: the primary comparison, if any; among candidates, then over all items; each of
    means over seeds where there are several, then of single rows, of which the best may be a lucky
    seed; of a table whose best row is a floor also of its trained rows.
    """
    rankings = [*means_over_seeds(result, NEAR), among_candidates(result)]
    if result["full"]:
        rankings += [*means_over_seeds(result, ALL), over_all_items(result)]
    said = [of_primary(result)] if result.get("primary") else []
    for ranking in rankings:
        said.append(sentence(ranking))
        trained = ranking.trained()
        if ranking.best_first()[0] in ranking.floors and trained.value:
            said.append(sentence(trained))
    if not result["full"]:
        said.append(f"No row ranks all {result['items']} items, so nothing is said of that.")
    return said


# ---------------------------------------------------------------- what is ranked


def among_candidates(result: dict) -> Ranking:
    """The rows among the candidates."""
    rows = result["rows"]
    tests = {name: row["test"] for name, row in rows.items()}
    value = {name: row[NEAR] for name, row in rows.items()}
    return ranking_of(result, NEAR, value, tests)


def over_all_items(result: dict) -> Ranking:
    """The rows that rank all items, with chance and popularity."""
    value = {name: v[ALL] for name, v in result["full"].items()}
    return ranking_of(result, ALL, value, result["full_against"])


def means_over_seeds(result: dict, metric: str) -> list[Ranking]:
    """The means over seeds with the reference's, which may be of one seed; nothing where there are
    not two of them.
    """
    of_rows, of_seeds = ("rows", "seeds") if metric == NEAR else ("full", "full_seeds")
    rows, seeds = result[of_rows], result[of_seeds]
    reference = result["reference"] and unseeded(result["reference"])
    value = {name: v[metric][0] for name, v in seeds.items()}
    own = [v[metric] for name, v in rows.items() if unseeded(name) == reference]
    if seeds and own:
        value.setdefault(reference, sum(own) / len(own))
    if len(value) < 2:
        return []
    tests = {name: v.get("test") for name, v in seeds.items()}
    ranking = ranking_of(result, metric, value, tests)
    return [replace(ranking, where=f"{ranking.where}, as means over seeds", reference=reference)]


def ranking_of(
    result: dict, metric: str, value: dict[str, float], tests: dict[str, Comparison | None]
) -> Ranking:
    """Some rows of a result by a metric. tests: {row: row minus reference}, None: not tested."""
    known = {name: test[metric] for name, test in tests.items() if test}
    where = f"over all {result['items']} items"
    if metric == NEAR:
        where = f"among {result['candidates']} candidates"
    return Ranking(where, metric, value, known, result["reference"], result["floors"])


# ---------------------------------------------------------------- sentences


def of_primary(result: dict) -> str:
    """The primary comparison: its difference with interval and p, what it could have seen."""
    metric, test = result["primary"]["metric"].upper(), result["primary"]["test"]
    shown = "shown" if test["p_adjusted"] < 0.05 else "not shown"
    return (
        f"The primary comparison, {metric} among {result['candidates']} candidates, "
        f"{result['primary']['pair']}: {signed(test['difference'])} "
        f"{ends_text(test['interval'], signed)}, sign-flip {p_text(test['p'])}, "
        f"t {p_text(test['p_t'])}; {shown} (both p below .05; judged alone, so nothing is "
        f"adjusted). Least true difference that this test finds four times in five: "
        f"{short(test['least'])}. Everything below is secondary."
    )


def signed(x: float) -> str:
    """A difference as +.012."""
    return f"{x:+.3f}".replace("0.", ".", 1)


def sentence(ranking: Ranking) -> str:
    """Which row is best, by how much, and whether that is shown."""
    best, *others = ranking.best_first()
    reference, of_best = ranking.reference, short(ranking.value[best])
    by = f"By {ranking.metric.upper()} {ranking.where}, the"
    if not others:
        return (
            f"{by} only {ranking.kind} is {best}: {of_best}; nothing is there to compare it with."
        )
    own = best == reference
    begin = f"{by} best {ranking.kind} is {'the reference, ' if own else ''}{best}"
    begin += ", a floor that needs no training" if best in ranking.floors else ""
    if reference not in ranking.value:
        return f"{begin}: {of_best}; {missing(reference)}, so no difference was tested."
    other = others[0] if own else reference
    test = ranking.test.get(other if own else best)
    gap = test["difference"] if test else ranking.value[best] - ranking.value[other]
    number, distance = of_difference(ranking.value[best], abs(gap))
    role = f"{'the next' if own else 'the reference'}, {other}"
    role += ", a floor that needs no training" if other in ranking.floors else ""
    level = [row for row in others if ranking.value[row] == ranking.value[best] and row != other]
    also = f" ({listed(level)} has as much)" if len(level) == 1 else ""
    also = f" ({listed(level)} have as much)" if len(level) > 1 else also
    return f"{begin}: {number}{also}, {distance} {role}; {shown_or_not(test)}."


def missing(reference: str | None) -> str:
    """Why there is no difference from the reference."""
    if reference is None:
        return "there is no reference"
    return f"the reference, {reference}, is not ranked here"


def of_difference(value: float, gap: float) -> tuple[str, str]:
    """(the best row's number, how far it is above another), in three decimals; in four where the
    difference would vanish.
    """
    if gap == 0:
        return short(value), "level with"
    if gap >= 0.0005:
        return short(value), f"which is {short(gap)} above"
    least = short(gap, 4) if gap >= 0.00005 else "under .0001"
    return short(value, 4), f"which is {least} above"


def shown_or_not(test: Test | None) -> str:
    """What a test says of a difference."""
    if test is None:
        return "these two were not tested"
    if test["p_adjusted"] is None:
        return "the table is exploratory, so no difference in it counts as shown"
    p = f"{plain_p(test['p_adjusted'])} after Holm"
    is_equal = test["p_equal"] < 0.05
    within = f"within {short(test['margin'])}"
    if test["p_adjusted"] < 0.05:
        also = f", and shown to be {within}, which counts as equal" if is_equal else ""
        return f"the difference is shown ({p}){also}"
    if is_equal:
        return f"the two are shown to be equal {within} ({plain_p(test['p_equal'])})"
    return f"the two are not told apart ({p})"


def plain_p(p: float) -> str:
    """A p with one digit: p = .02; what would be rounded up to .05 is said to be below it."""
    if p < 0.001:
        return "p < .001"
    digit = f"{p:.1g}"
    if p < 0.05 <= float(digit):
        return "p < .05"
    return f"p = {digit.replace('0.', '.', 1)}"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence: a, b and c."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
