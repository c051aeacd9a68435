"""What evaluate.py measured, written down: text, markdown, LaTeX, CSV, figures, and a page with the
case study.

Everything is made from one dict (metrics.json) and the run folders; nothing here measures. Keys of
the dict: protocol, n, candidates, reference, rows {name: {note, metrics, intervals, p against the
reference, paper}}, seeds, tests, full, full_tests, groups, sweeps.
"""

import base64
import csv
import html
import io
import json
from pathlib import Path

import numpy as np

from delrec.runtime import ROOT

SHOWN = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
# over all items
FULL = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
PAPER_NAME = {
    "ml-100k": "MovieLens-100K",
    "steam": "Steam",
    "beauty": "Beauty",
    "home-kitchen": "Home & Kitchen",
    "kuairec": "KuaiRec",
}


def of_paper(dataset, method):
    """The numbers DELRec prints for a method (data/paper.csv), or None.

    Its protocol is another one: see the README.
    """
    with open(ROOT / "data" / "paper.csv", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            if row["dataset"] == PAPER_NAME.get(dataset) and row["method"] == method:
                return {m: float(row[m]) for m in SHOWN if m in row} | {
                    "table": row["table"],
                    "method": method,
                }
    return None


ABOUT_PAPER = (
    "paper: what DELRec prints for the method or variant of that name, with titles, Flan-T5-XL "
    "and a protocol of its own (README); not a target"
)


def mark(p):
    return "**" if p is not None and p < 0.01 else "*" if p is not None and p < 0.05 else ""


def p_text(p):
    # no finer: 1 - (1 - p) in fp64
    return (f"p={p:.3g}" if p >= 1e-15 else "p<1e-15") + mark(p)


def about_marks(result):
    return (
        f"* p < .05, ** p < .01 against {result['reference']} (HR@1: the larger p of exact "
        "McNemar and paired t; NDCG@10: paired t, users as clusters)"
    )


# ---------------------------------------------------------------- text


def text(result):
    """table.txt, which is also what evaluate.py prints."""
    rows, lines = result["rows"], [result["protocol"], ""]
    paper, ms = any(r["paper"] for r in rows.values()), any("ms" in r for r in rows.values())
    wide = max(28, *(len(n) + 2 for n in rows))
    lines.append(
        f"{'row':<{wide}}{'HR@1':>7}   {'':<15}{'HR@5':>7}{'HR@10':>7}{'NDCG@5':>8}{'NDCG@10':>9}  "
        f" {'':<15}{'MRR':>6}"
        + (f"{'paper HR@1':>12}{'NDCG@10':>9}" if paper else "")
        + (f"{'ms':>9}{'parameters':>14}" if ms else "")
        + "  chosen"
    )
    for name, v in rows.items():
        (a, b), (c, d) = v["hr@1_interval"], v["ndcg@10_interval"]
        told = (
            (
                f"{v['paper']['hr@1']:>12.3f}{v['paper']['ndcg@10']:>9.3f}"
                if v["paper"]
                else f"{'':>21}"
            )
            if paper
            else ""
        )
        told += (
            (f"{v['ms'][0]:>9.2f}{v['parameters']:>14,}" if "ms" in v else f"{'':>23}")
            if ms
            else ""
        )
        lines.append(
            f"{name:<{wide}}{v['hr@1']:>7.3f}{mark(v.get('p_hr@1')):<2} [{a:.3f}, {b:.3f}] "
            f"{v['hr@5']:>7.3f}{v['hr@10']:>7.3f}{v['ndcg@5']:>8.3f}"
            f"{v['ndcg@10']:>9.3f}{mark(v.get('p_ndcg@10')):<2} [{c:.3f}, "
            f"{d:.3f}]{v['mrr']:>6.3f}{told}  {v['note']}"
        )
    lines += ["", about_marks(result)]
    if ms:
        lines += ["ms: one request alone on one core, its history to the ranked titles (median)"]
    if paper:
        lines += [ABOUT_PAPER]
    if result["seeds"]:
        lines += [
            "",
            "over seeds: mean and standard deviation; p of the difference of the samples' means "
            "over seeds (paired t, users as clusters)",
        ]
        lines += [
            f"{name:<{wide}}{v['seeds']} seeds  {seeds_text(v, ('hr@1', 'ndcg@10'))}"
            for name, v in result["seeds"].items()
        ]
        lines += [
            f"{name:<{wide}}all items  {seeds_text(v, ('hr@20', 'ndcg@20'))}"
            for name, v in result["full_seeds"].items()
        ]
    if result["tests"]:
        lines += [
            "",
            "paired tests (first minus second): HR@1 by exact McNemar and by paired t, NDCG@10 by "
            "paired t, users as clusters; * p < .05, ** p < .01",
        ]
        lines += [
            f"{n:<48} HR@1 {t['hr@1']:+.3f} {p_text(t['p_mcnemar_hr@1']):<12} "
            f"{p_text(t['p_t_hr@1']):<12} NDCG@10 {t['ndcg@10']:+.3f} "
            f"{p_text(t['p_t_ndcg@10'])}"
            for n, t in result["tests"].items()
        ]
    if result["full"]:
        lines += [
            "",
            f"all {result['items']} items, history masked, the same samples (chance HR@10 "
            f"{result['full']['chance']['hr@10']:.4f}):",
        ]
        lines += [
            f"{name:<{wide}}" + "  ".join(f"{m.upper()} {v[m]:.4f}" for m in FULL)
            for name, v in result["full"].items()
        ]
    if result["full_tests"]:
        lines += ["", "paired tests over all items:"]
        lines += [
            f"{n:<48} HR@20 {t['hr@20']:+.4f} {p_text(t['p_mcnemar_hr@20']):<12} "
            f"{p_text(t['p_t_hr@20']):<12} NDCG@20 {t['ndcg@20']:+.4f} "
            f"{p_text(t['p_t_ndcg@20'])}"
            for n, t in result["full_tests"].items()
        ]
    for kind, groups in result["groups"].items():
        lines += ["", f"HR@1 by {kind}; [95 % interval]"]
        lines += [
            f"{'':<{wide}}"
            + "".join(f"{g + ' (' + str(v['n']) + ')':>24}" for g, v in groups.items())
        ]
        lines += [
            f"{name:<{wide}}" + "".join(f"{cell(g['rows'][name]):>24}" for g in groups.values())
            for name in rows
        ]
    return lines


def cell(v):
    return f"{v['hr@1']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"


def seeds_text(v, keys):
    """Mean and deviation over seeds, and what the reference differs by."""
    return "  ".join(f"{m.upper()} {v[m][0]:.4f} +- {v[m][1]:.4f}" for m in keys) + (
        f"  against {v['against']}: "
        + "  ".join(f"{v[m + '_gain']:+.4f} {p_text(v['p_' + m])}" for m in keys)
        if v["against"]
        else ""
    )


# ---------------------------------------------------------------- tables for others


def table(result):
    """The main table as (head, rows of cells): what markdown, LaTeX and CSV share.

    Numbers keep their marks apart.
    """
    rows = result["rows"]
    paper, ms = any(r["paper"] for r in rows.values()), any("ms" in r for r in rows.values())
    head = [
        "row",
        "HR@1",
        "HR@1 low",
        "HR@1 high",
        "HR@5",
        "HR@10",
        "NDCG@5",
        "NDCG@10",
        "NDCG@10 low",
        "NDCG@10 high",
        "MRR",
        "p HR@1",
        "p NDCG@10",
    ]
    head += ["paper HR@1", "paper NDCG@10"] * paper + ["ms", "parameters"] * ms + ["chosen"]
    body = []
    for name, v in rows.items():
        line = [
            name,
            v["hr@1"],
            *v["hr@1_interval"],
            v["hr@5"],
            v["hr@10"],
            v["ndcg@5"],
            v["ndcg@10"],
            *v["ndcg@10_interval"],
            v["mrr"],
            v.get("p_hr@1"),
            v.get("p_ndcg@10"),
        ]
        if paper:
            line += [v["paper"]["hr@1"], v["paper"]["ndcg@10"]] if v["paper"] else [None, None]
        if ms:
            line += [v["ms"][0], v["parameters"]] if "ms" in v else [None, None]
        body.append([*line, v["note"]])
    return head, body


def short(x):
    """A metric as .571."""
    return "" if x is None else f"{x:.3f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.3f}"


def lines_of(result, one):
    """The rows for a reader: name, metrics with marks and intervals, what the paper has, what was
    chosen. one(name) writes a name.
    """
    rows = result["rows"]
    paper = any(r["paper"] for r in rows.values())
    head = (
        ["row", "HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR"]
        + ["paper: HR@1", "NDCG@10"] * paper
        + ["chosen"]
    )
    body = []
    for name, v in rows.items():

        def with_interval(m):
            return (
                f"{short(v[m])}{mark(v.get('p_' + m))} [{short(v[m + '_interval'][0])}, "
                f"{short(v[m + '_interval'][1])}]"
            )

        body.append(
            [
                one(name),
                with_interval("hr@1"),
                short(v["hr@5"]),
                short(v["hr@10"]),
                short(v["ndcg@5"]),
                with_interval("ndcg@10"),
                short(v["mrr"]),
                *(
                    [short(v["paper"]["hr@1"]), short(v["paper"]["ndcg@10"])]
                    if v["paper"]
                    else ["", ""]
                )
                * paper,
                one(v["note"]),
            ]
        )
    return head, body


def seeds_of(result, one):
    """The rows of which there are several seeds, for a reader: means with deviation and interval,
    and what they differ by from the reference's.
    """
    head, body = ["mean over seeds", "seeds", "HR@1", "NDCG@10", "against", "HR@1", "NDCG@10"], []
    for name, v in result["seeds"].items():

        def with_interval(m):
            return (
                f"{short(v[m][0])} ± {short(v[m][1])} [{short(v[m + '_interval'][0])}, "
                f"{short(v[m + '_interval'][1])}]"
            )

        def gain(m):
            return one(f"{v[m + '_gain']:+.3f} ({p_text(v['p_' + m])})") if v["against"] else ""

        body.append(
            [
                one(name),
                str(v["seeds"]),
                with_interval("hr@1"),
                with_interval("ndcg@10"),
                one(v["against"] or ""),
                gain("hr@1"),
                gain("ndcg@10"),
            ]
        )
    return head, body


ABOUT_SEEDS = (
    "mean ± standard deviation over seeds [95 % interval over users]; p: paired t of the "
    "samples' means over seeds, users as clusters"
)


def markdown(result):
    one, line = lambda s: s.replace("|", "\\|"), lambda cells: "| " + " | ".join(cells) + " |"

    def grid(head, body):
        return [line(head), line(["---"] * len(head)), *map(line, body), ""]

    return (
        "\n".join(
            [
                result["protocol"],
                "",
                *grid(*lines_of(result, one)),
                about_marks(result),
                *(["", *grid(*seeds_of(result, one)), ABOUT_SEEDS] if result["seeds"] else []),
                *(["", ABOUT_PAPER] if any(r["paper"] for r in result["rows"].values()) else []),
            ]
        )
        + "\n"
    )


def latex(result):
    special = str.maketrans(
        {c: f"\\{c}" for c in "&%$#_{}"}
        | {
            "<": "$<$",
            ">": "$>$",
            "~": "\\textasciitilde{}",
            "^": "\\textasciicircum{}",
            "\\": "\\textbackslash{}",
        }
    )

    def escape(s):
        return s.translate(special)

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

    return (
        "\n".join(
            [
                f"% {result['protocol']}",
                *grid(*lines_of(result, escape)),
                f"% {about_marks(result)}",
                *(
                    ["", *grid(*seeds_of(result, escape)), f"% {ABOUT_SEEDS}"]
                    if result["seeds"]
                    else []
                ),
            ]
        )
        + "\n"
    )


def write_tables(out, result):
    """table.txt, .md, .tex, .csv in a folder."""
    (out / "table.txt").write_text("\n".join(text(result)) + "\n", encoding="utf-8")
    (out / "table.md").write_text(markdown(result), encoding="utf-8")
    (out / "table.tex").write_text(latex(result), encoding="utf-8")
    head, body = table(result)
    with open(out / "table.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(
            [round(x, 6) if isinstance(x, float) else x for x in line] for line in body
        )


# ---------------------------------------------------------------- figures

BLUE, ORANGE, GREY = "#1f5fa8", "#c8641e", "#777777"


def figure(width, height):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def rows_figure(result):
    """HR@1 of every row with its interval, chance as a line: also the ablations' figure."""
    names = [n for n in result["rows"] if n != "chance"][::-1]
    mean = np.array([result["rows"][n]["hr@1"] for n in names])
    ends = np.array([result["rows"][n]["hr@1_interval"] for n in names])
    fig, ax = figure(7, 0.36 * len(names) + 1.3)
    ax.errorbar(mean, range(len(names)), xerr=np.abs(ends.T - mean), fmt="o", capsize=3, color=BLUE)
    ax.axvline(
        1 / result["candidates"],
        color=GREY,
        linestyle="--",
        label=f"chance 1/{result['candidates']}",
    )
    ax.axvline(
        result["rows"][result["reference"]]["hr@1"],
        color=ORANGE,
        linewidth=0.8,
        label=result["reference"],
    )
    ax.set_yticks(range(len(names)), names)
    ax.set_xlim(0, None)
    ax.set_xlabel(
        f"HR@1 among {result['candidates']} candidates, {result['dataset']}, n = {result['n']}, 95 "
        "% interval over users"
    )
    fig.legend(loc="outside upper right", ncols=2)
    ax.grid(axis="x", alpha=0.3)
    return fig


def seeds_figure(result):
    """HR@1 of every row of which there are several seeds: the mean with its interval, each seed as
    a small mark.
    """
    seeds = dict(reversed(result["seeds"].items()))
    fig, ax = figure(7, 0.36 * len(seeds) + 1.3)
    for y, v in enumerate(seeds.values()):
        mean, (low, high) = v["hr@1"][0], v["hr@1_interval"]
        ax.errorbar(
            mean,
            y,
            xerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
            fmt="o",
            capsize=3,
            color=BLUE,
        )
        ax.plot(v["hr@1_each"], [y] * v["seeds"], "|", markersize=11, color=ORANGE)
    ax.set_yticks(range(len(seeds)), seeds)
    ax.set_xlabel(
        f"HR@1 among {result['candidates']} candidates (chance {1 / result['candidates']:.3f}), "
        f"{result['dataset']}, n = {result['n']}\nmean over seeds, 95 % interval over "
        "users; "
        "marks: each seed"
    )
    ax.grid(axis="x", alpha=0.3)
    return fig


def groups_figure(result, kind):
    """HR@1 of every run in each group."""
    groups = result["groups"][kind]
    names = [n for n in result["rows"] if n != "chance" and "+" not in n]
    fig, ax = figure(7, 4.2)
    for i, name in enumerate(names):
        v = [g["rows"][name] for g in groups.values()]
        mean = np.array([x["hr@1"] for x in v])
        at = np.arange(len(groups)) + 0.6 * (i / max(len(names) - 1, 1) - 0.5)
        ax.errorbar(
            at,
            mean,
            yerr=[
                np.maximum(mean - [x["low"] for x in v], 0),
                np.maximum([x["high"] for x in v] - mean, 0),
            ],
            fmt="os^Dvp*X<>"[i % 10],
            capsize=2,
            label=name,
            fillstyle="full" if i < 10 else "none",
        )
    ax.axhline(1 / result["candidates"], color=GREY, linestyle="--", label="chance")
    ax.set_xticks(range(len(groups)), [f"{g}\nn = {v['n']}" for g, v in groups.items()])
    ax.set_ylim(0, 1)
    ax.set_xlabel(kind)
    ax.set_ylabel(f"HR@1 among {result['candidates']}, 95 % interval")
    fig.legend(loc="outside right upper", fontsize="small")
    ax.grid(axis="y", alpha=0.3)
    return fig


def curves_figure(folders):
    """Loss and validation of every run against its own steps; None where no run has a log."""
    logs = {}
    for folder in folders:
        path = Path(folder) / "log.jsonl"
        if path.exists():
            entries = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
            logs[Path(folder).name] = [e for e in entries if "step" in e]
    logs = {n: e for n, e in logs.items() if e}
    if not logs:
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, (name, entries) in enumerate(logs.items()):
        last = max(entries[-1]["step"], 1)
        for ax, keys in (
            (left, ("loss", "loss_rps")),
            (right, ("val_hr@1", "val_hr@1_of_15", "val_rps")),
        ):
            points = [(e["step"] / last, e[k]) for e in entries for k in keys if k in e]
            if points:
                x, y = map(np.array, zip(*points))
                # the mean of a moving window: steps are noisy
                if ax is left and len(y) > 40:
                    w = len(y) // 20
                    x, y = x[w - 1 :], np.convolve(y, np.ones(w) / w, "valid")
                ax.plot(
                    x,
                    y,
                    marker="o" if len(y) < 12 else None,
                    label=name if ax is left else None,
                    color=f"C{i % 10}",
                    linestyle="-" if i < 10 else "--",
                )
    for ax, title in (
        (left, "training loss"),
        (right, "validation HR@1 (distillation: RPS accuracy)"),
    ):
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel("share of the training")
        ax.grid(alpha=0.3)
    fig.legend(loc="outside right upper", fontsize="small")
    return fig


def sweep_figure(result, name):
    """HR@1 against the soft prompt's length k or the list's length h (DELRec, Figure 8)."""
    points = result["sweeps"][name]
    x = sorted(points, key=int)
    fig, ax = figure(5, 3.4)
    mean, low, high = (np.array([points[v][m] for v in x]) for m in ("hr@1", "low", "high"))
    ax.errorbar(
        [int(v) for v in x],
        mean,
        yerr=[np.maximum(mean - low, 0), np.maximum(high - mean, 0)],
        fmt="o-",
        capsize=3,
        color=BLUE,
    )
    ax.axhline(
        result["rows"][result["reference"]]["hr@1"],
        color=ORANGE,
        linewidth=0.8,
        label=result["reference"],
    )
    fig.legend(loc="outside upper right")  # within the axes it would hide a point
    ax.set_xlabel(
        {"k": "vectors of the soft prompt, k", "h": "length of the backbone's list, h"}[name]
    )
    ax.set_ylabel(f"HR@1 among {result['candidates']}, 95 % interval")
    ax.grid(alpha=0.3)
    return fig


def latency_figure(result):
    """HR@1 against the time of a request."""
    rows = {n: v for n, v in result["rows"].items() if "ms" in v}
    fig, ax = figure(6, 3.8)
    for name, v in rows.items():
        ax.errorbar(
            v["ms"][0],
            v["hr@1"],
            yerr=[
                [max(v["hr@1"] - v["hr@1_interval"][0], 0)],
                [max(v["hr@1_interval"][1] - v["hr@1"], 0)],
            ],
            fmt="o",
            capsize=2,
            color=BLUE,
        )
        ax.annotate(
            name,
            (v["ms"][0], v["hr@1"]),
            textcoords="offset points",
            xytext=(6, 4),
            fontsize="small",
        )
    ax.set_xscale("log")
    ax.margins(x=0.25)
    ax.set_xlabel("ms a request, alone, on one core")
    ax.set_ylabel(f"HR@1 among {result['candidates']}, 95 % interval")
    ax.grid(alpha=0.3)
    return fig


def figures(result, folders):
    """{name: figure} of all that this result holds."""
    out = {"table": rows_figure(result)} | (
        {"seeds": seeds_figure(result)} if result["seeds"] else {}
    )
    out |= {f"by-{kind.split()[0]}": groups_figure(result, kind) for kind in result["groups"]}
    out |= {f"against-{name}": sweep_figure(result, name) for name in result["sweeps"]}
    if sum("ms" in r for r in result["rows"].values()) > 1:
        out["latency"] = latency_figure(result)
    curves = curves_figure(folders)
    return out | ({"training": curves} if curves else {})


def write_figures(out, made):
    import matplotlib.pyplot as plt

    for old in (
        p
        for name in ("table", "seeds", "by-*", "against-*", "latency", "training")
        for p in out.glob(f"{name}.png")
    ):
        # what this table does not hold must not lie beside it
        old.unlink()
    for name, fig in made.items():
        fig.savefig(out / f"{name}.png", dpi=130)
        plt.close(fig)


def inline(fig):
    """A figure as the src of an <img>: nothing to fetch."""
    f = io.StringIO()
    fig.savefig(f, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(f.getvalue().encode()).decode()


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --right: #1f7a3d; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 70rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td:last-child, th:last-child { text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem; } figcaption { font-size: .85rem; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .7rem; } summary { cursor: pointer; overflow-wrap: anywhere; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .8rem; }
.answers ol { margin: .2rem 0; padding-left: 1.5rem; font-size: .9rem; } .answers h3 { font-size: .95rem; margin: .4rem 0 0; }
.true { color: var(--right); font-weight: 600; } input { font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .8rem; } .note { font-size: .9rem; }
"""
SCRIPT = """
const box = document.getElementById("search"), cases = [...document.querySelectorAll("#cases details")], said = document.getElementById("found");
function search() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let n = 0;
  for (const c of cases) { const hit = words.every(w => c.textContent.toLowerCase().includes(w)); c.hidden = !hit; n += hit; }
  said.textContent = n + " of " + cases.length + " histories";
}
box.addEventListener("input", search); search();
"""


def html_table(head, body):
    def line(tag, cells):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return (
        "<div "
        f'class="scroll"><table><thead>{line("th", head)}</thead><tbody>{"".join(line("td", r) for r in body)}</tbody></table></div>'
    )


def case_html(case):
    """One history with every run's answer side by side. case: history (titles), truth, answers
    {run: [(title, is truth)]}, place {run: rank of the truth}.
    """
    esc = html.escape
    told = ", ".join(f"{esc(run)} {place:g}." for run, place in case["place"].items())
    lists = "".join(
        f"<div><h3>{esc(run)}</h3><ol>"
        + "".join(f"<li{' class=true' if right else ''}>{esc(t)}</li>" for t, right in top)
        + "</ol></div>"
        for run, top in case["answers"].items()
    )
    return (
        f"<details><summary>{esc(' | '.join(case['history'][-3:]))} &rarr; <span "
        f'class="true">{esc(case["truth"])}</span> &middot; {told}</summary>'
        f'<p class="note">history: {esc(" | ".join(case["history"]))}</p><div '
        f'class="answers">{lists}</div></details>'
    )


def page(path, result, made, cases, configs, command):
    """One file that needs no network: tables, figures, protocol, configurations, case study."""
    esc, parts = html.escape, []
    parts.append(
        f"<h1>{esc(result['dataset'])}: {len(result['rows'])} rows, {result['n']} test samples</h1>"
    )
    parts.append(
        f'<p>{esc(result["protocol"])}</p><p class="note">{esc(about_marks(result))}. Chance: HR@1 '
        f"{short(result['chance']['hr@1'])}, NDCG@10 {short(result['chance']['ndcg@10'])}. "
        f"Everything chosen was chosen on validation. Written by <code>{esc(command)}</code></p>"
    )
    parts.append("<h2>Among candidates</h2>" + html_table(*lines_of(result, str)))
    if result["seeds"]:
        parts.append(
            "<h2>Over seeds</h2>"
            + html_table(*seeds_of(result, str))
            + f'<p class="note">{esc(ABOUT_SEEDS)}</p>'
        )
    if result["full_seeds"]:
        parts.append(
            html_table(
                ["over all items", "seeds", "mean ± deviation, against the reference"],
                [
                    [n, v["seeds"], seeds_text(v, ("hr@20", "ndcg@20"))]
                    for n, v in result["full_seeds"].items()
                ],
            )
        )
    if result["full"]:
        parts.append(
            f"<h2>Over all {result['items']} items</h2>"
            + html_table(
                ["row", *(m.upper() for m in FULL)],
                [[n, *(f"{v[m]:.4f}" for m in FULL)] for n, v in result["full"].items()],
            )
        )
    for kind, groups in result["groups"].items():
        parts.append(
            f"<h2>HR@1 by {esc(kind)}</h2>"
            + html_table(
                ["row", *(f"{g} ({v['n']})" for g, v in groups.items())],
                [[n, *(cell(g["rows"][n]) for g in groups.values())] for n in result["rows"]],
            )
        )
    parts.append(
        "<h2>Figures</h2>"
        + "".join(
            f'<figure><img alt="{esc(name)}" '
            f'src="{inline(fig)}"><figcaption>{esc(name.replace("-", " "))}</figcaption></figure>'
            for name, fig in made.items()
        )
    )
    if result["tests"]:
        parts.append(
            "<h2>Paired tests</h2>"
            + html_table(
                ["first - second", "HR@1", "McNemar", "paired t", "NDCG@10", "paired t"],
                [
                    [
                        n,
                        f"{t['hr@1']:+.3f}",
                        p_text(t["p_mcnemar_hr@1"]),
                        p_text(t["p_t_hr@1"]),
                        f"{t['ndcg@10']:+.3f}",
                        p_text(t["p_t_ndcg@10"]),
                    ]
                    for n, t in result["tests"].items()
                ],
            )
        )
    parts.append(
        '<h2>Histories and answers</h2><p class="note">The stored candidates as each run ranks '
        "them, the best first; the true next item is marked. After each history: the place "
        "of the "
        "truth.</p>"
        '<input id="search" type="search" placeholder="search titles" aria-label="search '
        'titles"><p class="note" id="found"></p>'
        f'<div id="cases">{"".join(map(case_html, cases))}</div>'
    )
    parts.append(
        "<h2>Configurations</h2>"
        + "".join(
            f"<details><summary>{esc(name)}</summary><pre>{esc(json.dumps(config, indent=1, ensure_ascii=False))}</pre></details>"
            for name, config in configs.items()
        )
    )
    body = "\n".join(parts)
    tmp = Path(f"{path}.tmp")
    tmp.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1">'
        f'<title>{esc(result["dataset"])}</title><link rel="icon" '
        f'href="data:,"><style>{STYLE}</style></head><body>\n{body}\n<script>{SCRIPT}</script></body></html>\n',
        encoding="utf-8",
    )
    tmp.replace(path)
