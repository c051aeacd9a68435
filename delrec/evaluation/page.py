"""The page of a table (evaluate.py --report): one HTML file that needs no network.

It holds tables, figures, protocol, configurations, and the case study, whose histories can be
searched. Its frame, style and script are page.html.
"""

import base64
import html
import io
import json
import shlex
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from delrec.evaluation.beyond import about_beyond, beyond_table
from delrec.evaluation.cases import Case
from delrec.evaluation.comparisons import AMONG_CANDIDATES, OVER_ALL_ITEMS, Comparison
from delrec.evaluation.tables import main_table, seeds_table, tests_table
from delrec.evaluation.wording import (
    ABOUT_SEEDS,
    FULL,
    about_marks,
    about_tests,
    interval_text,
    said_by_users,
    seeds_text,
    short,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    tmp = Path(f"{path}.tmp")
    tmp.write_text(whole, encoding="utf-8")
    tmp.replace(path)


# ---------------------------------------------------------------- sections


def heading(result: dict, command: str) -> str:
    """What the page is about: how many rows and samples, the protocol, the command."""
    dataset, protocol = html.escape(result["dataset"]), html.escape(result["protocol"])
    chance = result["chance"]
    return (
        f"<h1>{dataset}: {len(result['rows'])} rows, {result['n']} test samples</h1>\n"
        f'<p>{protocol}</p><p class="note">{html.escape(about_marks(result))}. '
        f"Chance: HR@1 {short(chance['hr@1'])}, NDCG@10 {short(chance['ndcg@10'])}. "
        "Everything chosen was chosen on validation. "
        f"Written by <code>{html.escape(command)}</code></p>"
    )


def tables_of(result: dict) -> list[str]:
    """The tables: among candidates, over seeds, over all items, by groups; those there are."""
    sections = ["<h2>Among candidates</h2>" + html_table(*main_table(result, str))]
    if result["seeds"]:
        table = html_table(*seeds_table(result, str))
        sections.append(f"<h2>Over seeds</h2>{table}{note(ABOUT_SEEDS)}")
    if result["full_seeds"]:
        head = ["over all items", "seeds", "mean ± deviation, against the reference"]
        body = [
            [name, v["seeds"], seeds_text(v, OVER_ALL_ITEMS)]
            for name, v in result["full_seeds"].items()
        ]
        sections.append(html_table(head, body))
    if result["full"]:
        head = ["row", *(m.upper() for m in FULL)]
        body = [[name, *(f"{v[m]:.4f}" for m in FULL)] for name, v in result["full"].items()]
        sections.append(f"<h2>Over all {result['items']} items</h2>" + html_table(head, body))
    table = html_table(*beyond_table(result))
    sections.append(f"<h2>Beside accuracy</h2>{table}{note(about_beyond(result))}")
    for kind, groups in result["groups"].items():
        head = ["row", *(f"{group} ({v['n']})" for group, v in groups.items())]
        body = [
            [name, *(interval_text(v["rows"][name]) for v in groups.values())]
            for name in result["rows"]
        ]
        sections.append(f"<h2>HR@1 by {html.escape(kind)}</h2>" + html_table(head, body))
        body = [
            [name, *(f"{v['all_items'][name]:.3f}" for v in groups.values())]
            for name in result["full"]
        ]
        if body:
            sections.append("<p>HR@20 over all items</p>" + html_table(head, body))
    return sections


def figures_of(drawn: dict[str, "Figure"]) -> str:
    """All figures, inside the page."""
    shown = [
        f'<figure><img alt="{html.escape(name)}" src="{inline(figure)}">'
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
    sections = [
        "<h2>Paired tests</h2>",
        note(about_tests(result)),
        compared(f"row minus {reference}", rows, AMONG_CANDIDATES),
        compared("planned pairs", result["planned"], AMONG_CANDIDATES),
        compared(f"row minus {reference}, all items", result["full_against"], OVER_ALL_ITEMS),
        compared("planned pairs, all items", result["full_planned"], OVER_ALL_ITEMS),
    ]
    return "\n".join(filter(None, sections))


def compared(name: str, comparisons: dict[str, Comparison], metrics: tuple[str, str]) -> str:
    """Comparisons as a table, and what looks otherwise when every user counts alike; nothing where
    there are none. name: the head over their names.
    """
    if not comparisons:
        return ""
    said = said_by_users(comparisons)
    return html_table(*tests_table(name, comparisons, metrics)) + (note(said) if said else "")


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


def html_table(head: list[str], body: list[list]) -> str:
    """A table of cells, which may be anything with a text."""

    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    rows = "".join(line("td", cells) for cells in body)
    return (
        f'<div class="scroll"><table><thead>{line("th", head)}</thead>'
        f"<tbody>{rows}</tbody></table></div>"
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
