"""What evaluate.py measured as tables: markdown, LaTeX, CSV, and cells for the page.

Everything is made from one dict (metrics.json, see measure.py); nothing here measures.
"""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from delrec.data.prepared import Data
from delrec.evaluation.comparisons import AMONG_CANDIDATES, Comparison
from delrec.evaluation.lines import table_lines
from delrec.evaluation.wording import (
    ABOUT_PAPER,
    ABOUT_SEEDS,
    about_marks,
    as_markdown,
    below,
    cells_of,
    ends_text,
    gain_text,
    has_latency,
    has_paper,
    heads_of,
    least,
    mark,
    of_metric,
    short,
)
from delrec.runtime import (
    Run,
    must_be_writable,
    place_of_new,
    stop,
    why_not_writable,
    write_text,
    writing,
)

Table = tuple[list[str], list[list]]  # (head, rows of cells)
TESTED = ("p", "p_adjusted", "p_t", "least", "p_equal")  # of a test, in table.csv


# ---------------------------------------------------------------- tables for a reader


def main_table(result: dict, escape: Callable[[str], str]) -> Table:
    """The rows for a reader, as (head, rows of cells): name, metrics with marks, intervals and the
    least difference seen, what the paper has, what was chosen. escape(text) writes a name.
    """
    paper = has_paper(result)
    head = ["row", "HR@1", "least", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "least", "MRR"]
    if paper:
        head += ["paper: HR@1", "NDCG@10"]
    body = []
    for name, row in result["rows"].items():
        cells = [
            escape(name),
            marked(row, "hr@1"),
            least(of_metric(row, "hr@1")),
            short(row["hr@5"]),
            short(row["hr@10"]),
            short(row["ndcg@5"]),
            marked(row, "ndcg@10"),
            least(of_metric(row, "ndcg@10")),
            short(row["mrr"]),
        ]
        if paper:
            printed = row["paper"] or {"hr@1": None, "ndcg@10": None}
            cells += [short(printed["hr@1"]), short(printed["ndcg@10"])]
        body.append([*cells, escape(row["note"])])
    return with_said([*head, "chosen"], body, result, escape)


def with_said(head: list, body: list[list], result: dict, escape: Callable[[str], str]) -> Table:
    """A table of all rows with a last column of what evaluate.py --notes says; as it is without."""
    if "said" not in result:
        return head, body
    said = [escape(row["said"]) for row in result["rows"].values()]
    return [*head, result["said"]["head"]], [[*row, x] for row, x in zip(body, said)]


def marked(row: dict, metric: str) -> str:
    """A metric of a row with its marks and interval."""
    ends = ends_text(row[f"{metric}_interval"], short)
    return f"{short(row[metric])}{mark(of_metric(row, metric))} {ends}"


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
            escape(gain_of(v, "hr@1")),
            escape(gain_of(v, "ndcg@10")),
        ]
        for name, v in result["seeds"].items()
    ]
    return head, body


def mean_text(v: dict, metric: str) -> str:
    """A mean over seeds with deviation and interval."""
    mean, deviation = v[metric]
    ends = ends_text(v[f"{metric}_interval"], short)
    return f"{short(mean)} ± {short(deviation)} {ends}"


def gain_of(v: dict, metric: str) -> str:
    """By how much a mean over seeds is above the reference's; nothing where there is none."""
    return gain_text(v["test"][metric]) if v["against"] else ""


def tests_table(name: str, comparisons: dict[str, Comparison], metrics: Sequence[str]) -> Table:
    """Comparisons as (head, rows of cells). name: the head over their names."""
    digits = 3 if metrics == AMONG_CANDIDATES else 4
    body = [
        [row, *(cell for m in metrics for cell in cells_of(comparison[m], digits))]
        for row, comparison in comparisons.items()
    ]
    return [name, *heads_of(metrics)], body


def markdown(result: dict) -> str:
    """table.md."""

    def escape(s):
        return s.replace("|", "\\|")

    def grid(head, body):
        return [*as_markdown([head, *body]), ""]

    lines = [result["protocol"], "", *grid(*main_table(result, escape)), about_marks(result)]
    if result["seeds"]:
        lines += ["", *grid(*seeds_table(result, escape)), ABOUT_SEEDS]
    if has_paper(result):
        lines += ["", ABOUT_PAPER]
    lines += [x for line in below(result) for x in ("", escape(line))]
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
    head += ["NDCG@10", "NDCG@10 low", "NDCG@10 high", "MRR"]
    for metric in AMONG_CANDIDATES:
        head += [f"{key.replace('_', ' ')} {metric.upper()}" for key in TESTED]
    if paper:
        head += ["paper HR@1", "paper NDCG@10"]
    if latency:
        head += ["ms", "ms on", "parameters"]
    body = []
    for name, row in result["rows"].items():
        cells = [name, row["hr@1"], *row["hr@1_interval"], row["hr@5"], row["hr@10"]]
        cells += [row["ndcg@5"], row["ndcg@10"], *row["ndcg@10_interval"], row["mrr"]]
        for metric in AMONG_CANDIDATES:
            test = of_metric(row, metric) or {}
            cells += [test.get(key) for key in TESTED]
        if paper:
            printed = row["paper"] or {"hr@1": None, "ndcg@10": None}
            cells += [printed["hr@1"], printed["ndcg@10"]]
        if latency:
            timed = (row["ms"][0], row["ms_on"], row["parameters"]) if "ms" in row else (None,) * 3
            cells += timed
        body.append([*cells, row["note"]])
    return with_said([*head, "chosen"], body, result, str)


def table_folder(cfg: SimpleNamespace, runs: list[Run], data: Data) -> Path:
    """The folder of the table's files. Stops, before the work, where they or the page cannot be
    written."""
    plain_lm = place_of_new("runs", cfg.llm_out or f"{data.folder_name}/lm")
    out = Path(cfg.out or (runs[-1].folder if runs else plain_lm) / "evaluation")
    if why := why_not_writable(out):
        stop(why if cfg.out else f"{why}; --out names another folder for the table")
    if cfg.page:
        must_be_writable(Path(cfg.page).parent)
        Path(cfg.page).parent.mkdir(parents=True, exist_ok=True)
    return out


def write_tables(folder: Path, result: dict) -> None:
    """Writes table.txt, .md, .tex, .csv to a folder."""
    write_text(folder / "table.txt", "\n".join(table_lines(result)) + "\n")
    write_text(folder / "table.md", markdown(result))
    write_text(folder / "table.tex", latex(result))
    head, body = csv_table(result)
    with writing(folder / "table.csv") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(head)
        for cells in body:
            writer.writerow([round(x, 6) if isinstance(x, float) else x for x in cells])
