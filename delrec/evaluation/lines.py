"""What evaluate.py measured as text: the lines of table.txt, and the last line that it prints."""

import json
from collections.abc import Iterable, Sequence

from delrec.evaluation.beyond import beyond_as_text
from delrec.evaluation.comparisons import AMONG_CANDIDATES, OVER_ALL_ITEMS, Comparison
from delrec.evaluation.copying import copies_as_text
from delrec.evaluation.stats import RowMetrics
from delrec.evaluation.two_stage import two_stages_as_text
from delrec.evaluation.verdict import ABOUT_VERDICT, verdict
from delrec.evaluation.wording import (
    ABOUT_PAPER,
    ABOUT_PLANNED,
    ABOUT_SEEDS,
    FULL,
    about_marks,
    about_tests,
    below,
    cells_of,
    ends_text,
    group_head,
    has_latency,
    has_paper,
    heads_of,
    interval_text,
    least,
    mark,
    of_metric,
    said_by_users,
    seeds_text,
    where_timed,
)
from delrec.runtime import commit, machine, versions

UNPLANNED = "of every two rows, which nobody planned: not adjusted, no marks"


def table_lines(result: dict) -> list[str]:
    """The lines of table.txt; what it comes to stands first."""
    wide = max(28, *(len(name) + 2 for name in result["rows"]))
    return [
        *verdict(result),
        f"({ABOUT_VERDICT}.)",
        "",
        *rows_as_text(result, wide),
        *copies_as_text(result),
        *seeds_as_text(result, wide),
        *tests_as_text(result),
        *full_as_text(result, wide),
        *two_stages_as_text(result, wide),
        *beyond_as_text(result, wide),
        *groups_as_text(result, wide),
    ]


def rows_as_text(result: dict, wide: int) -> list[str]:
    """Protocol, the main table, what its marks and columns mean."""
    paper, latency = has_paper(result), has_latency(result)
    head = (
        f"{'row':<{wide}}{'HR@1':>7}   {'':<16}{'least':>5}{'HR@5':>7}{'HR@10':>7}{'NDCG@5':>8}"
        f"{'NDCG@10':>9}   {'':<16}{'least':>5}{'MRR':>7}"
    )
    if paper:
        head += f"{'paper HR@1':>12}{'NDCG@10':>9}"
    if latency:
        head += f"{'ms':>9}{'parameters':>14}"
    said, noted = result.get("said"), max(len(row["note"]) for row in result["rows"].values())
    last = f"{'chosen':<{noted}}  {said['head']}" if said else "chosen"
    lines = [result["protocol"], "", f"{head}  {last}"]
    for name, row in result["rows"].items():
        line = row_as_text(name, row, wide)
        if paper:
            line += paper_as_text(row["paper"])
        if latency:
            line += latency_as_text(row)
        last = f"{row['note']:<{noted}}  {row['said']}".rstrip() if said else row["note"]
        lines.append(f"{line}  {last}")
    lines += ["", about_marks(result)]
    if latency:
        said = "ms: one request alone, its history to the ranked titles (median)"
        lines.append(f"{said}, {where_timed(result)}")
    if paper:
        lines.append(ABOUT_PAPER)
    return [*lines, *below(result)]


def row_as_text(name: str, row: dict, wide: int) -> str:
    """The metrics of a row, with marks, intervals, and the least difference seen."""
    near, good = of_metric(row, "hr@1"), of_metric(row, "ndcg@10")
    ends, ends_10 = ends_text(row["hr@1_interval"]), ends_text(row["ndcg@10_interval"])
    return (
        f"{name:<{wide}}{row['hr@1']:>7.3f}{mark(near):<3}{ends:<14} "
        f"{least(near):>5}{row['hr@5']:>7.3f}{row['hr@10']:>7.3f}{row['ndcg@5']:>8.3f}"
        f"{row['ndcg@10']:>9.3f}{mark(good):<3}{ends_10:<14} {least(good):>5}"
        f"{row['mrr']:>7.3f}"
    )


def paper_as_text(printed: dict | None) -> str:
    """The paper's two numbers, or the place where they would stand."""
    return f"{printed['hr@1']:>12.3f}{printed['ndcg@10']:>9.3f}" if printed else f"{'':>21}"


def latency_as_text(row: dict) -> str:
    """Milliseconds and parameters, or the place where they would stand."""
    return f"{row['ms'][0]:>9.2f}{row['parameters']:>14,}" if "ms" in row else f"{'':>23}"


def last_line(value: RowMetrics) -> str:
    """The metrics as one JSON object, with what they were made on. value: {row: metrics per
    sample}.
    """
    return rows_as_json(
        (f"{m}.{name}", float(v[m].mean()), "")
        for name, v in value.items()
        for m in AMONG_CANDIDATES
    )


def rows_as_json(rows: Iterable[tuple[str, float, str]]) -> str:
    """Numbers as one JSON object, with what they were made on. rows: name, value, unit of each."""
    told = [
        {"name": name, "value": round(value, 4), "unit": unit, "goal": None}
        for name, value, unit in rows
    ]
    made_on = {"machine": machine(), "versions": versions(), "commit": commit()}
    return json.dumps(made_on | {"rows": told})


# ---------------------------------------------------------------- comparisons


def seeds_as_text(result: dict, wide: int) -> list[str]:
    """Means over seeds, among candidates and over all items."""
    if not result["seeds"]:
        return []
    lines = ["", f"over seeds: {ABOUT_SEEDS}"]
    for name, v in result["seeds"].items():
        said = seeds_text(v, AMONG_CANDIDATES)
        lines.append(f"{name:<{wide}}{v['seeds']} seeds  {said}")
    for name, v in result["full_seeds"].items():
        lines.append(f"{name:<{wide}}all items  {seeds_text(v, OVER_ALL_ITEMS)}")
    tested = {name: v["test"] for name, v in result["seeds"].items() if v["against"]}
    return lines + users_as_text(tested)


def tests_as_text(result: dict) -> list[str]:
    """The comparisons among candidates: with the reference, and the planned pairs; where none was
    planned, every other pair.
    """
    reference = result["reference"]
    rows = {name: row["test"] for name, row in result["rows"].items() if row["test"]}
    lines = ["", f"paired tests, row minus {reference}. {about_tests(result)}"]
    lines += [*grid(rows, AMONG_CANDIDATES), *users_as_text(rows)]
    return lines + pairs_as_text(result, AMONG_CANDIDATES)


def pairs_as_text(result: dict, metrics: Sequence[str], among: str = "") -> list[str]:
    """The planned pairs; where none was planned, every pair without the reference. among: what the
    keys begin with, full_ over all items.
    """
    if planned := result[f"{among}planned"]:
        title = ABOUT_PLANNED[bool(result["seeds"])]
        return ["", title, *grid(planned, metrics), *users_as_text(planned)]
    every, reference = result[f"{among}tests"], result["reference"]
    others = {name: t for name, t in every.items() if reference not in name.split(" - ")}
    return ["", UNPLANNED, *grid(others, metrics)] if others else []


def grid(comparisons: dict[str, Comparison], metrics: Sequence[str]) -> list[str]:
    """Comparisons as aligned lines under a head."""
    digits = 4 if metrics == OVER_ALL_ITEMS else 3
    wide = max(48, *(len(name) + 1 for name in comparisons)) if comparisons else 48
    tests = [[comparison[m] for m in metrics] for comparison in comparisons.values()]
    adjusted = any(t["p_adjusted"] is not None for row in tests for t in row)
    lines = [f"{'':<{wide}}" + aligned(heads_of(metrics, adjusted))]
    for name, row in zip(comparisons, tests):
        cells = [cell for t in row for cell in cells_of(t, digits)]
        lines.append(f"{name:<{wide}}" + aligned(cells))
    return lines


def aligned(cells: Iterable[str]) -> str:
    """The cells of comparisons, each in its column."""
    widths = (12, 9, 9, 9, 8)
    return "".join(f"{cell:>{widths[i % 5]}}" for i, cell in enumerate(cells))


def users_as_text(comparisons: dict[str, Comparison]) -> list[str]:
    """The line that names what looks otherwise when every user counts alike, if anything does."""
    said = said_by_users(comparisons)
    return [said] if said else []


# ---------------------------------------------------------------- over all items, groups


def full_as_text(result: dict, wide: int) -> list[str]:
    """The metrics over the whole catalogue, and their comparisons."""
    if not result["full"]:
        return []
    lines = [
        "",
        f"all {result['items']} items, history masked, the same samples (chance HR@10 "
        f"{result['full']['chance']['hr@10']:.4f}):",
    ]
    for name, v in result["full"].items():
        lines.append(f"{name:<{wide}}" + "  ".join(f"{m.upper()} {v[m]:.4f}" for m in FULL))
    reference, against = result["reference"], result["full_against"]
    if against:
        margin = f"= is equal within {result['margin_full']:g}"
        lines += ["", f"paired tests over all items, row minus {reference}; {margin}:"]
        lines += [*grid(against, OVER_ALL_ITEMS), *users_as_text(against)]
    return lines + pairs_as_text(result, OVER_ALL_ITEMS, "full_")


def groups_as_text(result: dict, wide: int) -> list[str]:
    """HR@1 of every row in every group; HR@20 over all items of the rows that rank them."""
    lines = []
    for kind, groups in result["groups"].items():
        lines += ["", f"HR@1 by {kind}; [95 % interval]"]
        heads = [group_head(group, v) for group, v in groups.items()]
        cell = max([24, *(len(head) + 2 for head in heads)])
        lines.append(f"{'':<{wide}}" + "".join(f"{head:>{cell}}" for head in heads))
        for name in result["rows"]:
            cells = [interval_text(v["rows"][name]) for v in groups.values()]
            lines.append(f"{name:<{wide}}" + "".join(f"{text:>{cell}}" for text in cells))
        if result["full"]:
            lines.append(f"HR@20 over all items by {kind}")
        for name in result["full"]:
            cells = [v["all_items"][name] for v in groups.values()]
            lines.append(f"{name:<{wide}}" + "".join(f"{hr:>{cell}.3f}" for hr in cells))
    return lines
