"""The page of a table (evaluate.py --report): one HTML file that needs no network.

It says what the table comes to, then holds tables, figures, protocol, configurations, and the case
study, whose histories can be searched. Its frame, style and script are page.html.
"""

import base64
import html
import io
import json
import shlex
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from delrec.evaluation.beyond import about_beyond, beyond_columns, beyond_table
from delrec.evaluation.cases import Case
from delrec.evaluation.comparisons import AMONG_CANDIDATES, OVER_ALL_ITEMS, Comparison
from delrec.evaluation.tables import main_table, seeds_table, tests_table
from delrec.evaluation.verdict import ABOUT_VERDICT, ALL, NEAR, verdict
from delrec.evaluation.wording import (
    ABOUT_PLANNED,
    ABOUT_SEEDS,
    FULL,
    about_marks,
    about_tests,
    below,
    group_head,
    interval_text,
    said_by_users,
    seeds_text,
    short,
)
from delrec.runtime import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOLD_ROW = "Bold row: the highest {}; whether that is shown, the first lines say"
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path,
    result: dict,
    drawn: dict[str, "Figure"],
    cases: list[Case],
    configs: dict[str, dict],
    command: str,
) -> None:
    """Writes the page of a result, whole or not at all.

    drawn: {name: figure}; cases: what cases_of returns; configs: {row: a run's configuration};
    command: the line that makes this table again.
    """
    sections = [
        heading(result, command),
        *tables_of(result),
        figures_of(drawn),
        paired_tests(result),
        case_study(cases),
        configurations(configs),
    ]
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    whole = template.substitute(
        title=html.escape(result["dataset"]), body="\n".join(filter(None, sections))
    )
    write_text(path, whole)


# ---------------------------------------------------------------- sections


def heading(result: dict, command: str) -> str:
    """What the page is about: what it comes to, how many rows and samples, the protocol, the
    command.
    """
    dataset, protocol = html.escape(result["dataset"]), html.escape(result["protocol"])
    chance = result["chance"]
    first, *more = (f"<p>{html.escape(sentence)}</p>" for sentence in verdict(result))
    return (
        f"<h1>{dataset}: {len(result['rows'])} rows, {result['n']} test samples</h1>\n"
        f'<div id="verdict"><div class="first">{first}</div>{"".join(more)}'
        f"{note(ABOUT_VERDICT)}</div>"
        f'<p>{protocol}</p><p class="note">{html.escape(about_marks(result))}. '
        f"Chance: HR@1 {short(chance['hr@1'])}, NDCG@10 {short(chance['ndcg@10'])}. "
        "Everything chosen was chosen on validation. "
        f"Written by <code>{html.escape(command)}</code></p>"
    )


def tables_of(result: dict) -> list[str]:
    """The tables: among candidates, over seeds, over all items, by groups; those there are."""
    best = highest([row[NEAR] for row in result["rows"].values()])
    table = html_table(*main_table(result, str), rows=best, words=1 + ("said" in result))
    said = "".join(map(note, below(result)))
    return [
        f"<h2>Among candidates</h2>{table}{note(BOLD_ROW.format('NDCG@10'))}{said}",
        *tables_of_seeds(result),
        *table_over_all_items(result),
        table_beside_accuracy(result),
        *tables_by_group(result),
    ]


def tables_of_seeds(result: dict) -> list[str]:
    """Means over seeds, among candidates and over all items; those there are."""
    sections, seeds, full = [], result["seeds"], result["full_seeds"]
    if seeds:
        best = highest([v[NEAR][0] for v in seeds.values()])
        table = html_table(*seeds_table(result, str), rows=best, words=2)
        bold = note(BOLD_ROW.format("mean NDCG@10"))
        sections.append(f"<h2>Over seeds</h2>{table}{bold}{note(ABOUT_SEEDS)}")
    if full:
        head = ["over all items", "seeds", "mean ± deviation, against the reference"]
        body = [[name, v["seeds"], seeds_text(v, OVER_ALL_ITEMS)] for name, v in full.items()]
        table = html_table(head, body, rows=highest([v[ALL][0] for v in full.values()]), words=1)
        sections.append(table + note(BOLD_ROW.format("mean NDCG@20")))
    return sections


def table_over_all_items(result: dict) -> list[str]:
    """The metrics over the whole catalogue, if any row ranks it."""
    if not result["full"]:
        return []
    head = ["row", *(m.upper() for m in FULL)]
    body = [[name, *(f"{v[m]:.4f}" for m in FULL)] for name, v in result["full"].items()]
    table = html_table(head, body, rows=highest([v[ALL] for v in result["full"].values()]))
    title = f"<h2>Over all {result['items']} items</h2>"
    return [title + table + note(BOLD_ROW.format("NDCG@20"))]


def table_beside_accuracy(result: dict) -> str:
    """What stands beside accuracy; only of hit rates more is better."""
    found, cells = result["beyond"]["rows"].values(), set()
    for column, key in enumerate(beyond_columns(result), 1):
        if key.startswith("hr@"):
            cells |= {(row, column) for row in highest([v.get(key) for v in found])}
    table = html_table(*beyond_table(result), cells=cells)
    bold = "Bold: the highest number of each HR column; of the others neither end is the better one"
    return f"<h2>Beside accuracy</h2>{table}{note(bold)}{note(about_beyond(result))}"


def tables_by_group(result: dict) -> list[str]:
    """The rows in every group: HR@1 among candidates; HR@20 over all items, of those that rank
    them.
    """

    def near(group, name):
        return group["rows"][name]["hr@1"], interval_text(group["rows"][name])

    def over_all(group, name):
        return group["all_items"][name], f"{group['all_items'][name]:.3f}"

    sections, bold = [], note("Bold: the highest number of each group")
    for kind, groups in result["groups"].items():
        by = f"by {html.escape(kind)}"
        sections.append(f"<h2>HR@1 {by}</h2>{table_of_groups(groups, result['rows'], near)}{bold}")
        if result["full"]:
            table = table_of_groups(groups, result["full"], over_all)
            sections.append(f"<h3>HR@20 over all items {by}</h3>{table}{bold}")
    return sections


def table_of_groups(
    groups: dict[str, dict],
    names: Iterable[str],
    cell: Callable[[dict, str], tuple[float, str]],
) -> str:
    """Rows in every group, the highest of each group in bold. cell(group, row): its number and how
    that is written.
    """
    head = ["row", *(group_head(group, v) for group, v in groups.items())]
    found = [[cell(group, name) for group in groups.values()] for name in names]
    columns = enumerate(zip(*found), 1)
    best = {(row, i) for i, column in columns for row in highest([x for x, _ in column])}
    body = [[name, *(text for _, text in line)] for name, line in zip(names, found)]
    return html_table(head, body, cells=best)


def figures_of(drawn: dict[str, "Figure"]) -> str:
    """All figures, inside the page."""
    shown = [
        f'<figure><div class="scroll" tabindex="0"><img alt="{html.escape(name)}" '
        f'src="{inline(figure)}"></div>'
        f"<figcaption>{html.escape(name.replace('-', ' '))}</figcaption></figure>"
        for name, figure in drawn.items()
    ]
    return "<h2>Figures</h2>" + "".join(shown)


def paired_tests(result: dict) -> str:
    """The comparisons with the reference and the planned ones, among candidates and over all items;
    every other pair stands in metrics.json.
    """
    reference = result["reference"]
    rows = {name: row["test"] for name, row in result["rows"].items() if row["test"]}
    planned = result["planned"]
    sections = [
        "<h2>Paired tests</h2>",
        note(about_tests(result)),
        note(ABOUT_PLANNED[bool(result["seeds"])]) if planned else "",
        compared(f"row minus {reference}", rows, AMONG_CANDIDATES),
        compared("planned pairs", planned, AMONG_CANDIDATES, False),
        compared(f"row minus {reference}, all items", result["full_against"], OVER_ALL_ITEMS),
        compared("planned pairs, all items", result["full_planned"], OVER_ALL_ITEMS, False),
    ]
    return "\n".join(filter(None, sections))


def compared(
    name: str, comparisons: dict[str, Comparison], metrics: tuple[str, str], ranked: bool = True
) -> str:
    """Comparisons as a table, and what looks otherwise when every user counts alike; nothing where
    there are none. name: the head over their names; ranked: all with one reference, so that one is
    the best.
    """
    if not comparisons:
        return ""
    said, best, bold = said_by_users(comparisons), set(), ""
    if ranked:
        gains = [comparison[metrics[1]]["difference"] for comparison in comparisons.values()]
        best = {row for row in highest(gains) if gains[row] > 0}
        bold = note(
            f"Bold row: the one furthest above the reference in {metrics[1].upper()}"
            if best
            else f"No row is bold: none is above the reference in {metrics[1].upper()}"
        )
    table = html_table(*tests_table(name, comparisons, metrics), rows=best)
    return table + bold + (note(said) if said else "")


def case_study(cases: list[Case]) -> str:
    """Histories with every run's answers, and the box that searches them."""
    return (
        '<h2>Histories and answers</h2><p class="note">The stored candidates as each run ranks '
        "them, the best first; the true next item is marked. After each history: the place of the "
        "truth.</p>"
        '<input id="search" type="search" placeholder="search titles" aria-label="search titles">'
        '<p class="note" id="found"></p>'
        f'<div id="cases">{"".join(map(case_html, cases))}</div>'
    )


def configurations(configs: dict[str, dict]) -> str:
    """Every run's configuration, folded."""
    shown = []
    for name, config in configs.items():
        text = html.escape(json.dumps(config, indent=1, ensure_ascii=False))
        shown.append(f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>")
    return "<h2>Configurations</h2>" + "".join(shown)


# ---------------------------------------------------------------- pieces


def note(text: str) -> str:
    """A paragraph of small print."""
    return f'<p class="note">{html.escape(text)}</p>'


def highest(numbers: Iterable[float | None]) -> set[int]:
    """The places of the highest of some numbers; none where there is no other to be above."""
    known = {place: x for place, x in enumerate(numbers) if x is not None}
    if len(known) < 2:
        return set()
    return {place for place, x in known.items() if x == max(known.values())}


def html_table(
    head: list[str],
    body: list[list],
    rows: Collection[int] = (),
    cells: Collection[tuple[int, int]] = (),
    words: int = 0,
) -> str:
    """A table of cells, which may be anything with a text, in a box of its own that scrolls
    sideways. rows, cells: the places of what is best, in bold; words: how many of the last columns
    hold words.
    """

    def row_html(i, texts):
        marked = [' class="best"' if (i, j) in cells else "" for j in range(len(texts))]
        line = "".join(f"<td{m}>{html.escape(str(x))}</td>" for m, x in zip(marked, texts))
        return f'<tr class="best">{line}</tr>' if i in rows else f"<tr>{line}</tr>"

    heads = "".join(f"<th>{html.escape(x)}</th>" for x in head)
    lines = "".join(row_html(i, texts) for i, texts in enumerate(body))
    kind = f' class="words-{words}"' if words else ""
    return (
        f'<div class="scroll" tabindex="0"><table{kind}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def case_html(case: Case) -> str:
    """One history with every run's answers side by side."""
    places = ", ".join(f"{html.escape(run)} {place:g}." for run, place in case.place.items())
    lists = "".join(answers_html(run, best) for run, best in case.answers.items())
    return (
        f"<details><summary>{html.escape(' | '.join(case.history[-3:]))} &rarr; "
        f'<span class="true">{html.escape(case.truth)}</span> &middot; {places}</summary>'
        f'<p class="note">history: {html.escape(" | ".join(case.history))}</p>'
        f'<div class="answers">{lists}</div></details>'
    )


def answers_html(run: str, best: list[tuple[str, bool]]) -> str:
    """One run's best titles, the true one marked."""
    items = "".join(
        f"<li{' class=true' if is_truth else ''}>{html.escape(title)}</li>"
        for title, is_truth in best
    )
    return f"<div><h3>{html.escape(run)}</h3><ol>{items}</ol></div>"


def inline(figure: "Figure") -> str:
    """A figure as the src of an <img>: nothing to fetch."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue().encode()).decode()


def command_line(context: click.Context) -> str:
    """What was typed, as one line: what makes this table again. context: click's."""

    def is_typed(parameter):
        return context.get_parameter_source(parameter.name).name == "COMMANDLINE"

    line = ["python", "evaluate.py"]
    typed = filter(is_typed, context.command.params)
    # the runs first
    for p in sorted(typed, key=lambda p: p.name not in ("ckpt", "more")):
        value = context.params[p.name]
        if getattr(p, "is_flag", False):
            line.append(p.opts[0] if value else p.secondary_opts[0])
        elif p.param_type_name == "argument":
            line += map(str, value)
        else:
            for one in value if p.multiple else [value]:
                line.append(p.opts[0])
                line += map(str, one if isinstance(one, tuple) else [one])
    return shlex.join(line)
