"""The table of recipes/backbones.py: means over seeds, what a model costs, what was published.

Everything but the costs stands in evaluate.py's metrics.json (delrec/evaluation/measure.py).
"""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from delrec.data.prepared import Data
from delrec.evaluation.lines import rows_as_json
from delrec.evaluation.stats import Test
from delrec.evaluation.wording import ABOUT_ONE_SEED, as_markdown, gain_text, mark, short
from delrec.runtime import load_run, write_text, writing
from delrec.serving.latency import latencies, parameters

PUBLISHED = Path(__file__).resolve().parent.parent / "data" / "papers.csv"
COUNTS = ("co-occurrence", "title-similarity")  # what each row is fused with, in this order
PAIR = ("sasrec-titles", "sasrec-permuted")  # is it what titles say?
FLOORS = ("chance", "popularity", *COUNTS)
ALL_ITEMS = ("hr@10", "hr@20", "ndcg@10", "ndcg@20")
# key of a number -> its head, its decimals
COLUMNS = {
    "hr@10": ("HR@10", 4),
    "hr@20": ("HR@20", 4),
    "ndcg@10": ("NDCG@10", 4),
    "ndcg@20": ("NDCG@20", 4),
    "hr@1": ("HR@1 of 15", 3),
    "fused": ("fused", 3),
    "coverage": ("coverage@10", 3),
    "debiased": ("HR@10 debiased", 4),
    "parameters": ("parameters", 0),
    "minutes": ("minutes", 1),
    "ms": ("ms", 2),
}
UNITS = {"minutes": "min", "ms": "ms"}


@dataclass
class Line:
    """A row of the table."""

    name: str
    seeds: int  # 0: nothing is trained
    means: dict[str, float]  # key of COLUMNS -> the mean over seeds
    deviations: dict[str, float] = field(default_factory=dict)  # over seeds, where several
    tests: dict[str, Test | None] = field(default_factory=dict)  # against the first row
    published: str = ""


# ---------------------------------------------------------------- the numbers


def lines_of(table: dict, rows: dict[str, list[str]], folder: Path, data: Data) -> list[Line]:
    """The floors, then each row. table: metrics.json; rows: {row: its runs, one a seed}, the one
    that the others are tested against first; folder: of these runs."""
    lines = [Line(name, 0, numbers_of(table, name)) for name in FLOORS]
    base = next(iter(rows))
    for name, runs in rows.items():
        each = [numbers_of(table, run) for run in runs]
        line = Line(
            name, len(runs), {key: float(np.mean([x[key] for x in each])) for key in each[0]}
        )
        if len(runs) > 1:
            line.deviations = {k: float(np.std([x[k] for x in each], ddof=1)) for k in each[0]}
        line.means |= costs_of([folder / run for run in runs], data)
        line.tests = tests_of(table, name, runs, base)
        line.published = published(data, name)
        lines.append(line)
    return lines


def numbers_of(table: dict, row: str) -> dict[str, float]:
    """What metrics.json says of one of its rows, by the keys of COLUMNS; a key is left out where it
    says nothing."""
    full, beside = table["full"].get(row, {}), table["beyond"]["rows"].get(row, {})
    fused = table["rows"].get("+".join((row, *COUNTS)), {})
    found = {metric: full.get(metric) for metric in ALL_ITEMS}
    found |= {"hr@1": table["rows"][row]["hr@1"], "fused": fused.get("hr@1")}
    found |= {"coverage": beside.get("coverage"), "debiased": beside.get("hr@10_debiased")}
    return {key: value for key, value in found.items() if value is not None}


def costs_of(folders: list[Path], data: Data) -> dict[str, float]:
    """Parameters and ms a request of a row's first run, and the mean minutes that its runs took."""
    runs = [load_run(folder) for folder in folders]
    print(f"timing {runs[0].folder.name}", flush=True)
    minutes = float(np.mean([run.seconds for run in runs])) / 60
    alone, *_ = latencies(runs[0], data)
    return {"parameters": parameters(runs[0]), "minutes": minutes, "ms": alone}


def tests_of(table: dict, name: str, runs: list[str], base: str) -> dict[str, Test | None]:
    """The tests of a row against the first one by the keys of COLUMNS: of means over seeds where
    there are several, else of the run; fused, of both rows fused."""
    if len(runs) > 1:
        near, far = (table[kind][name].get("test") for kind in ("seeds", "full_seeds"))
    else:
        near, far = table["rows"][runs[0]]["test"], table["full_against"].get(runs[0])
    found = {"hr@1": near["hr@1"]} if near else {}
    found |= {metric: far[metric] for metric in ("hr@20", "ndcg@20")} if far else {}
    ends = ["+".join((row, *COUNTS)) for row in (name, base)]
    planned = table["planned"].get(" - ".join(ends))
    return found | ({"fused": planned["hr@1"]} if planned else {})


def published(data: Data, row: str) -> str:
    """What papers print for a row on this log, with source and protocol (data/papers.csv); nothing
    for a log of another split, or of another number of items."""
    said = []
    with open(PUBLISHED, encoding="utf-8") as f:
        for x in csv.DictReader(f):
            log = (x["dataset"], x["split"], x["items"] or str(data.n_items), x["row"])
            if log == (data.name, data.meta["split"], str(data.n_items), row):
                given = [(m, float(x[m])) for m in ALL_ITEMS if x[m]]
                figures = ", ".join(f"{m.upper()} {short(value, 4)}" for m, value in given)
                said.append(f"{figures} ({x['source']}; {x['protocol']})")
    return "; ".join(said)


# ---------------------------------------------------------------- the table


def with_published(grid: list[list], lines: list[Line]) -> list[list]:
    """A grid (its head, then a row a line) with a last column of what was published; as it is where
    nothing was."""
    said = [line.published for line in lines]
    return [[*row, x] for row, x in zip(grid, ["published", *said])] if any(said) else grid


def grid_of(lines: list[Line]) -> list[list[str]]:
    """The table's head and rows as cells for a reader."""
    head = ["row", "seeds", *(head for head, _ in COLUMNS.values())]
    body = [
        [line.name, str(line.seeds or ""), *(for_reader(line, key) for key in COLUMNS)]
        for line in lines
    ]
    return with_published([head, *body], lines)


def for_reader(line: Line, key: str) -> str:
    """A number with its marks; nothing where there is none."""
    if key not in line.means:
        return ""
    if key == "parameters":
        return f"{line.means[key]:,.0f}"
    return short(line.means[key], COLUMNS[key][1]) + mark(line.tests.get(key))


def as_text(grid: list[list[str]]) -> list[str]:
    """A grid as aligned lines: names and what was published left, numbers right."""
    wide = [max(map(len, column)) for column in zip(*grid)]
    is_left = [head in ("row", "published") for head in grid[0]]

    def aligned(text, width, left):
        return text.ljust(width) if left else text.rjust(width)

    return ["  ".join(map(aligned, row, wide, is_left)).rstrip() for row in grid]


def legend(table: dict, lines: list[Line]) -> list[str]:
    """What columns and marks mean, and what titles say beyond other items' titles."""
    base = next(line.name for line in lines if line.seeds)
    means = "means over seeds" if table["seeds"] else ABOUT_ONE_SEED
    said = [
        f"{means}. HR@10 to NDCG@20: all {table['items']} items, history masked; HR@1: "
        f"among {table['candidates']} candidates; fused: HR@1 with {' and '.join(COUNTS)}, weights "
        "chosen on validation; coverage: share of the items that stand in some list of ten; "
        "debiased: without the targets that many users have (docs/protocol.md)",
        f"marks of HR@1, HR@20, NDCG@20: against {base}; of fused: against {base} fused. * shown "
        "to differ, in either direction (adjusted p < .05), ** p < .01, = equal within the margin",
        "minutes: a training with all that it ranks, others beside it; ms: one request alone on "
        "one core, its history to the ranked items",
    ]
    pair = " - ".join(PAIR)
    if pair in table["planned"]:
        near, far = table["planned"][pair]["hr@1"], table["full_planned"][pair]["hr@20"]
        said.append(
            f"{' minus '.join(PAIR)}: HR@1 {gain_text(near)}, HR@20 over all items "
            f"{gain_text(far, 4)}"
        )
    if any(line.published for line in lines):
        said.append("published: printed by others, with settings of their own: not a target")
    return said


def write_csv(path: Path, lines: list[Line]) -> None:
    """The table as numbers without marks, and the deviations over seeds."""
    spread = [key for key in COLUMNS if any(key in line.deviations for line in lines)]
    grid = [["row", "seeds", *COLUMNS, *(f"{key} deviation" for key in spread)]]
    for line in lines:
        numbers = [line.means.get(key) for key in COLUMNS]
        numbers += [line.deviations.get(key) for key in spread]
        rounded = [x if x is None else round(x, 6) for x in numbers]
        grid.append([line.name, line.seeds, *rounded])
    with writing(path) as f:
        csv.writer(f, lineterminator="\n").writerows(with_published(grid, lines))


def last_line(lines: list[Line]) -> str:
    """The numbers as one JSON object, with what they were made on."""
    return rows_as_json(
        (f"{key}.{line.name}", value, UNITS.get(key, ""))
        for line in lines
        for key, value in line.means.items()
    )


def report(table: dict, lines: list[Line], folder: Path) -> None:
    """Writes backbones.txt .md .csv, prints the table, and as the last line its numbers as JSON."""
    grid, about = grid_of(lines), legend(table, lines)
    text = [table["protocol"], "", *as_text(grid), "", *about]
    marked = [table["protocol"], "", *as_markdown(grid), "", *(f"- {x}" for x in about)]
    write_text(folder / "backbones.txt", "\n".join(text) + "\n")
    write_text(folder / "backbones.md", "\n".join(marked) + "\n")
    write_csv(folder / "backbones.csv", lines)
    print("\n" + "\n".join(text) + "\n")
    print(f"written: {folder}/backbones.txt .md .csv, and evaluate.py's table.txt, metrics.json")
    print(last_line(lines))
