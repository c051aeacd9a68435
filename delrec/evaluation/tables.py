"""What evaluate.py measured as tables: text, markdown, LaTeX, CSV.

Everything is made from one dict (metrics.json, see measure.py); nothing here measures.
"""

import csv
from collections.abc import Callable
from pathlib import Path

Table = tuple[list[str], list[list]]  # (head, rows of cells)
SHOWN = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
# over all items
FULL = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
ABOUT_PAPER = (
    "paper: what DELRec prints for the method or variant of that name, with titles, Flan-T5-XL "
    "and a protocol of its own (README); not a target"
)
ABOUT_SEEDS = (
    "mean ± standard deviation over seeds [95 % interval over users]; p: paired t of the "
    "samples' means over seeds, users as clusters"
)


# ---------------------------------------------------------------- numbers as text


def mark(p: float | None) -> str:
    """The stars of a p: ** below .01, * below .05; none where there is no test (None)."""
    if p is None or not p < 0.05:
        return ""
    return "**" if p < 0.01 else "*"


def p_text(p: float) -> str:
    """A p with its stars."""
    # 1 - (1 - p) in fp64 is no finer
    return (f"p={p:.3g}" if p >= 1e-15 else "p<1e-15") + mark(p)


def short(x: float | None) -> str:
    """A metric as .571; nothing for None."""
    if x is None:
        return ""
    text = f"{x:.3f}"
    return text.replace("0.", ".", 1) if abs(x) < 1 else text


def interval_text(v: dict) -> str:
    """HR@1 of a row in a group, with its interval."""
    return f"{v['hr@1']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"


def seeds_text(v: dict, metrics: tuple[str, ...]) -> str:
    """Mean and deviation over seeds, and the difference from the reference."""
    text = "  ".join(f"{m.upper()} {v[m][0]:.4f} +- {v[m][1]:.4f}" for m in metrics)
    if v["against"]:
        gains = [f"{v[m + '_gain']:+.4f} {p_text(v['p_' + m])}" for m in metrics]
        text += f"  against {v['against']}: " + "  ".join(gains)
    return text


def about_marks(result: dict) -> str:
    """What the stars mean."""
    return (
        f"* p < .05, ** p < .01 against {result['reference']} (HR@1: the larger p of exact "
        "McNemar and paired t; NDCG@10: paired t, users as clusters)"
    )


def has_paper(result: dict) -> bool:
    """True if the paper prints a number for any row."""
    return any(row["paper"] for row in result["rows"].values())


def has_latency(result: dict) -> bool:
    """True if any row was timed."""
    return any("ms" in row for row in result["rows"].values())


# ---------------------------------------------------------------- text


def table_lines(result: dict) -> list[str]:
    """The lines of table.txt, which evaluate.py also prints."""
    wide = max(28, *(len(name) + 2 for name in result["rows"]))
    return [
        *rows_as_text(result, wide),
        *seeds_as_text(result, wide),
        *tests_as_text(result["tests"]),
        *full_as_text(result, wide),
        *full_tests_as_text(result["full_tests"]),
        *groups_as_text(result, wide),
    ]


def rows_as_text(result: dict, wide: int) -> list[str]:
    """Protocol, the main table, what its marks and columns mean."""
    paper, latency = has_paper(result), has_latency(result)
    head = (
        f"{'row':<{wide}}{'HR@1':>7}   {'':<15}{'HR@5':>7}{'HR@10':>7}{'NDCG@5':>8}{'NDCG@10':>9}  "
        f" {'':<15}{'MRR':>6}"
    )
    if paper:
        head += f"{'paper HR@1':>12}{'NDCG@10':>9}"
    if latency:
        head += f"{'ms':>9}{'parameters':>14}"
    lines = [result["protocol"], "", f"{head}  chosen"]
    for name, row in result["rows"].items():
        line = row_as_text(name, row, wide)
        if paper:
            line += paper_as_text(row["paper"])
        if latency:
            line += latency_as_text(row)
        lines.append(f"{line}  {row['note']}")
    lines += ["", about_marks(result)]
    if latency:
        lines.append("ms: one request alone on one core, its history to the ranked titles (median)")
    if paper:
        lines.append(ABOUT_PAPER)
    return lines


def row_as_text(name: str, row: dict, wide: int) -> str:
    """The metrics of a row, with marks and intervals."""
    low, high = row["hr@1_interval"]
    low_10, high_10 = row["ndcg@10_interval"]
    return (
        f"{name:<{wide}}{row['hr@1']:>7.3f}{mark(row.get('p_hr@1')):<2} [{low:.3f}, {high:.3f}] "
        f"{row['hr@5']:>7.3f}{row['hr@10']:>7.3f}{row['ndcg@5']:>8.3f}"
        f"{row['ndcg@10']:>9.3f}{mark(row.get('p_ndcg@10')):<2} [{low_10:.3f}, {high_10:.3f}]"
        f"{row['mrr']:>6.3f}"
    )


def paper_as_text(printed: dict | None) -> str:
    """The paper's two numbers, or the place where they would stand."""
    return f"{printed['hr@1']:>12.3f}{printed['ndcg@10']:>9.3f}" if printed else f"{'':>21}"


def latency_as_text(row: dict) -> str:
    """Milliseconds and parameters, or the place where they would stand."""
    return f"{row['ms'][0]:>9.2f}{row['parameters']:>14,}" if "ms" in row else f"{'':>23}"


def seeds_as_text(result: dict, wide: int) -> list[str]:
    """Means over seeds, among candidates and over all items."""
    if not result["seeds"]:
        return []
    lines = [
        "",
        "over seeds: mean and standard deviation; p of the difference of the samples' means "
        "over seeds (paired t, users as clusters)",
    ]
    for name, v in result["seeds"].items():
        said = seeds_text(v, ("hr@1", "ndcg@10"))
        lines.append(f"{name:<{wide}}{v['seeds']} seeds  {said}")
    for name, v in result["full_seeds"].items():
        lines.append(f"{name:<{wide}}all items  {seeds_text(v, ('hr@20', 'ndcg@20'))}")
    return lines


def tests_as_text(tests: dict[str, dict]) -> list[str]:
    """The paired tests among candidates."""
    if not tests:
        return []
    lines = [
        "",
        "paired tests (first minus second): HR@1 by exact McNemar and by paired t, NDCG@10 by "
        "paired t, users as clusters; * p < .05, ** p < .01",
    ]
    lines += [
        f"{name:<48} HR@1 {t['hr@1']:+.3f} {p_text(t['p_mcnemar_hr@1']):<12} "
        f"{p_text(t['p_t_hr@1']):<12} NDCG@10 {t['ndcg@10']:+.3f} "
        f"{p_text(t['p_t_ndcg@10'])}"
        for name, t in tests.items()
    ]
    return lines


def full_as_text(result: dict, wide: int) -> list[str]:
    """The metrics over the whole catalogue."""
    if not result["full"]:
        return []
    lines = [
        "",
        f"all {result['items']} items, history masked, the same samples (chance HR@10 "
        f"{result['full']['chance']['hr@10']:.4f}):",
    ]
    for name, v in result["full"].items():
        lines.append(f"{name:<{wide}}" + "  ".join(f"{m.upper()} {v[m]:.4f}" for m in FULL))
    return lines


def full_tests_as_text(tests: dict[str, dict]) -> list[str]:
    """The paired tests over the whole catalogue."""
    if not tests:
        return []
    lines = ["", "paired tests over all items:"]
    lines += [
        f"{name:<48} HR@20 {t['hr@20']:+.4f} {p_text(t['p_mcnemar_hr@20']):<12} "
        f"{p_text(t['p_t_hr@20']):<12} NDCG@20 {t['ndcg@20']:+.4f} "
        f"{p_text(t['p_t_ndcg@20'])}"
        for name, t in tests.items()
    ]
    return lines


def groups_as_text(result: dict, wide: int) -> list[str]:
    """HR@1 of every row in every group."""
    lines = []
    for kind, groups in result["groups"].items():
        lines += ["", f"HR@1 by {kind}; [95 % interval]"]
        heads = [f"{group} ({v['n']})" for group, v in groups.items()]
        lines.append(f"{'':<{wide}}" + "".join(f"{head:>24}" for head in heads))
        for name in result["rows"]:
            cells = [interval_text(v["rows"][name]) for v in groups.values()]
            lines.append(f"{name:<{wide}}" + "".join(f"{cell:>24}" for cell in cells))
    return lines


# ---------------------------------------------------------------- tables for a reader


def main_table(result: dict, escape: Callable[[str], str]) -> Table:
    """The rows for a reader, as (head, rows of cells): name, metrics with marks and intervals, what
    the paper has, what was chosen. escape(text) writes a name.
    """
    paper = has_paper(result)
    head = ["row", "HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"]
    if paper:
        head += ["paper: HR@1", "NDCG@10"]
    body = []
    for name, row in result["rows"].items():
        cells = [
            escape(name),
            marked(row, "hr@1"),
            short(row["hr@5"]),
            short(row["hr@10"]),
            short(row["ndcg@5"]),
            marked(row, "ndcg@10"),
            short(row["mrr"]),
        ]
        if paper:
            printed = row["paper"] or {"hr@1": None, "ndcg@10": None}
            cells += [short(printed["hr@1"]), short(printed["ndcg@10"])]
        body.append([*cells, escape(row["note"])])
    return [*head, "chosen"], body


def marked(row: dict, metric: str) -> str:
    """A metric of a row with its marks and interval."""
    low, high = row[f"{metric}_interval"]
    return f"{short(row[metric])}{mark(row.get(f'p_{metric}'))} [{short(low)}, {short(high)}]"


def seeds_table(result: dict, escape: Callable[[str], str]) -> Table:
    """The rows of which there are several seeds, for a reader, as (head, rows of cells): means with
    deviation and interval, and the difference from the reference's.
    """
    head = ["mean over seeds", "seeds", "HR@1", "NDCG@10", "against", "HR@1", "NDCG@10"]
    body = [
        [
            escape(name),
            str(v["seeds"]),
            mean_text(v, "hr@1"),
            mean_text(v, "ndcg@10"),
            escape(v["against"] or ""),
            escape(gain_text(v, "hr@1")),
            escape(gain_text(v, "ndcg@10")),
        ]
        for name, v in result["seeds"].items()
    ]
    return head, body


def mean_text(v: dict, metric: str) -> str:
    """A mean over seeds with deviation and interval."""
    mean, deviation = v[metric]
    low, high = v[f"{metric}_interval"]
    return f"{short(mean)} ± {short(deviation)} [{short(low)}, {short(high)}]"


def gain_text(v: dict, metric: str) -> str:
    """By how much a mean over seeds is above the reference's; nothing where there is none."""
    return f"{v[f'{metric}_gain']:+.3f} ({p_text(v[f'p_{metric}'])})" if v["against"] else ""


def markdown(result: dict) -> str:
    """table.md."""

    def escape(s):
        return s.replace("|", "\\|")

    def line(cells):
        return "| " + " | ".join(cells) + " |"

    def grid(head, body):
        return [line(head), line(["---"] * len(head)), *map(line, body), ""]

    lines = [result["protocol"], "", *grid(*main_table(result, escape)), about_marks(result)]
    if result["seeds"]:
        lines += ["", *grid(*seeds_table(result, escape)), ABOUT_SEEDS]
    if has_paper(result):
        lines += ["", ABOUT_PAPER]
    return "\n".join(lines) + "\n"


LATEX_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "<": "$<$",
        ">": "$>$",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "\\": "\\textbackslash{}",
    }
)


def latex(result: dict) -> str:
    """table.tex."""

    def escape(s):
        return s.translate(LATEX_SPECIAL)

    def grid(head, body):
        return [
            "\\begin{tabular}{l" + "r" * (len(head) - 2) + "l}",
            "\\hline",
            " & ".join(map(escape, head)) + " \\\\",
            "\\hline",
            *(" & ".join(cells).replace("±", "$\\pm$") + " \\\\" for cells in body),
            "\\hline",
            "\\end{tabular}",
        ]

    lines = [f"% {result['protocol']}", *grid(*main_table(result, escape))]
    lines.append(f"% {about_marks(result)}")
    if result["seeds"]:
        lines += ["", *grid(*seeds_table(result, escape)), f"% {ABOUT_SEEDS}"]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- CSV, files


def csv_table(result: dict) -> Table:
    """The main table as (head, rows of cells) of numbers, which have no marks."""
    paper, latency = has_paper(result), has_latency(result)
    head = ["row", "HR@1", "HR@1 low", "HR@1 high", "HR@5", "HR@10", "NDCG@5"]
    head += ["NDCG@10", "NDCG@10 low", "NDCG@10 high", "MRR", "p HR@1", "p NDCG@10"]
    if paper:
        head += ["paper HR@1", "paper NDCG@10"]
    if latency:
        head += ["ms", "parameters"]
    body = []
    for name, row in result["rows"].items():
        cells = [name, row["hr@1"], *row["hr@1_interval"], row["hr@5"], row["hr@10"]]
        cells += [row["ndcg@5"], row["ndcg@10"], *row["ndcg@10_interval"], row["mrr"]]
        cells += [row.get("p_hr@1"), row.get("p_ndcg@10")]
        if paper:
            printed = row["paper"] or {"hr@1": None, "ndcg@10": None}
            cells += [printed["hr@1"], printed["ndcg@10"]]
        if latency:
            cells += [row["ms"][0], row["parameters"]] if "ms" in row else [None, None]
        body.append([*cells, row["note"]])
    return [*head, "chosen"], body


def write_tables(folder: Path, result: dict) -> None:
    """Writes table.txt, .md, .tex, .csv to a folder."""
    (folder / "table.txt").write_text("\n".join(table_lines(result)) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown(result), encoding="utf-8")
    (folder / "table.tex").write_text(latex(result), encoding="utf-8")
    head, body = csv_table(result)
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(head)
        for cells in body:
            writer.writerow([round(x, 6) if isinstance(x, float) else x for x in cells])
