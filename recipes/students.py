"""What teaching is worth: small LMs of every depth with and without a teacher (SLMRec), what each
of DLLM2Rec's students learns from an LM, and each part of that.
"""

from pathlib import Path

import numpy as np

from delrec.evaluation.drawing import BLUE, GREEN, GREY, ORANGE, subplots
from delrec.runtime import read_json, stop
from recipes.runs import Plan, Runs, compare_flags, each_seed, evaluate, kind_and_layers

# SLMRec's Figure 2; the whole LM is added
DEPTHS = (2, 4, 6, 10, 20, 30)
WAYS = {"alone": GREY, "maps": GREEN, "taught": BLUE}  # rows of a depth, and their colours
SMALL = 6  # layers of the LM that teaches conventional models
# DLLM2Rec's parts: row -> flags of train_backbone.py
LISTS = ["--lam", 0.1, "--eta", 0]
TITLES = ["--lam", 0, "--eta", 0.3]
PARTS = {
    "lists": LISTS,
    "no-position": [*LISTS, "--w-position", 0],
    "no-confidence": [*LISTS, "--w-confidence", 0],
    "all-confidence": [*LISTS, "--w-confidence", 1],
    "permuted": [*LISTS, "--confidence", "permuted"],
    "warm": [*LISTS, "--temperature", 1],
    "listed": [*LISTS, "--confidence", "listed"],
    "no-consistency": [*LISTS, "--w-consistency", 0],
    "one-negative": [*LISTS, "--list-loss", "sigmoid"],
    "eta-0.1": ["--lam", 0, "--eta", 0.1],
    "eta-0.3": TITLES,
    "eta-1": ["--lam", 0, "--eta", 1],
    "no-offset": [*TITLES, "--no-offset"],
    "both": ["--lam", 0.1, "--eta", 0.3],
}
# DLLM2Rec's students: row -> model, its flags, flags of it that need a teacher
STUDENTS = {
    "gru4rec": ("gru4rec", [], []),
    "sasrec": ("sasrec", [], []),
    "dros": ("sasrec", ["--loss", "bce", "--dros", 0.5], ["--list-loss", "sigmoid"]),
}


# ---------------------------------------------------------------- SLMRec: the curve of layers


def layers(plan: Plan) -> Path:
    """SLMRec's Figure 2: the LM's first 2, 4, 6, 10, 20 and all layers on item vectors, all on
    --budget windows: alone, without a teacher; maps, which begins with the maps that the whole LM
    has trained; taught by it (b = 2), which begins with them, too. So what the teacher says is
    taught minus maps. Also writes layers.txt and layers.png.
    """
    kind, whole = kind_and_layers(plan.llm)
    if kind != "decoder" or whole % 2:  # finetune.py says so once the teacher is trained
        stop(
            f"layers teaches LMs that are cut into two blocks of layers, and {plan.llm} ({kind}, "
            f"{whole} layers) cannot be; use another --llm, a decoder with an even number of them"
        )
    depths = [*(n for n in DEPTHS if n < whole), whole]

    def rows(runs):
        teacher = runs.tuned(f"alone-{whole}", "none", reads="ids")
        names = [runs.row()]
        for n in depths:
            cut = ["--layers", n]
            taught = [*cut, "--teacher", teacher, "--blocks", 2]
            names.append(runs.tuned(f"alone-{n}", "none", cut, "ids") if n < whole else teacher)
            names.append(runs.tuned(f"maps-{n}", "none", [*cut, "--maps", teacher], "ids"))
            names.append(runs.tuned(f"taught-{n}", "none", taught, "ids"))
        return names

    names = each_seed(plan, rows)
    out = evaluate(plan, "layers", names, "--reference", f"alone-{whole}-s0")
    if not plan.dry_run:
        table = read_json(out / "metrics.json")
        text = "\n".join(lines_of(table, depths, plan.seeds)) + "\n"
        (out / "layers.txt").write_text(text, encoding="utf-8")
        print(f"\n{text}")
        draw(table, depths, plan.seeds, out / "layers.png")
    return out


def mean_of(table: dict, name: str, seeds: int, metric: str, space: str = "rows") -> float:
    """The mean of a metric over the seeds of a row. space: rows (among candidates), full."""
    return float(np.mean([table[space][f"{name}-s{s}"][metric] for s in range(seeds)]))


def lines_of(table: dict, depths: list[int], seeds: int) -> list[str]:
    """The curve as a table: each depth alone, with the teacher's maps, taught, and what the teacher
    adds to its maps."""
    shown = [("rows", "hr@1"), ("rows", "ndcg@10"), ("full", "hr@20"), ("full", "ndcg@20")]
    head = "".join(f"{space + ' ' + metric:>31}" for space, metric in shown)
    lines = [
        f"{table['dataset']}, n = {table['n']}, rows: among {table['candidates']}, full: among all "
        f"{table['items']} items; means over {seeds} seeds: alone, maps, taught, taught minus maps",
        f"{'layers':10}{head}",
    ]
    for n in depths:
        line = f"{n:<10}"
        for space, metric in shown:
            alone, maps, taught = (
                mean_of(table, f"{how}-{n}", seeds, metric, space) for how in WAYS
            )
            line += f"{alone:10.4f}{maps:7.4f}{taught:7.4f}{taught - maps:+7.4f}"
        lines.append(line)
    return lines


def draw(table: dict, depths: list[int], seeds: int, path: Path) -> None:
    """Writes the curve as a figure: NDCG@10 against layers, a mark for each seed."""
    import matplotlib.pyplot as plt

    fig, ax = subplots(5.5, 3.6)
    for how, colour in WAYS.items():
        mean = [mean_of(table, f"{how}-{n}", seeds, "ndcg@10") for n in depths]
        ax.plot(depths, mean, "o-", color=colour, label=how)
        for s in range(seeds):
            each = [table["rows"][f"{how}-{n}-s{s}"]["ndcg@10"] for n in depths]
            ax.plot(depths, each, "_", color=colour)
    backbone = mean_of(table, "sasrec", seeds, "ndcg@10")
    ax.axhline(backbone, color=ORANGE, linewidth=0.8, label="sasrec")
    ax.set_xlabel("layers of the LM")
    ax.set_ylabel(f"NDCG@10 among {table['candidates']}")
    ax.grid(alpha=0.3)
    fig.legend(loc="outside upper right", ncols=3)
    fig.savefig(path, dpi=130)
    plt.close(fig)


# ---------------------------------------------------------------- DLLM2Rec: students, parts


def students(plan: Plan) -> Path:
    """DLLM2Rec's students (GRU4Rec, SASRec, DROS with its paper's one negative), each alone and
    taught by a small LM on item vectors of --budget windows, out of fold (--folds folds of users,
    an LM without each); and with the LM's vectors of titles made of bags of words, without an LM.
    """

    def rows(runs):
        teacher = outside(runs)
        names = [runs.row(), runs.backbone("gru4rec", folds=0)]
        names.append(runs.conventional("dros", ["--model", "sasrec", *STUDENTS["dros"][1]]))
        for student, (model, own, taught) in STUDENTS.items():
            flags = [*PARTS["both"], *own, *taught]
            names.append(runs.taught(f"{student}-taught", model, teacher, flags))
            names.append(runs.taught(f"{student}-bags", model, "tfidf", [*TITLES, *own]))
        return names

    pairs = [pair for s in STUDENTS for pair in ((f"{s}-taught", s), (f"{s}-taught", f"{s}-bags"))]
    flags = ["--reference", "sasrec-s0", *compare_flags(plan, pairs)]
    return evaluate(plan, "students", each_seed(plan, rows), *flags)


def parts(plan: Plan) -> Path:
    """DLLM2Rec's parts (place, confidence, agreement, titles) on SASRec and Caser, for --dataset
    and those of --also: two tables a data set. The teacher is a small LM on item vectors, of
    --budget windows; its lists are out of fold (five folds of users, an LM without each), but for
    the row in-sample. Rows: lists with everything; without place, confidence, agreement; with all
    of the confidence, with another sample's, at temperature 1, in the listed item; with one
    negative; titles alone at each eta, without an own vector of each item; both.
    """

    def rows(runs):
        inside, outside = teachers(runs)
        names = [runs.row(), runs.row("caser")]
        for student in ("sasrec", "caser"):
            for row, flags in PARTS.items():
                names.append(runs.taught(f"{student}-{row}", student, outside, flags))
            names.append(runs.taught(f"{student}-in-sample", student, inside, LISTS))
        return names

    for dataset in [plan.dataset, *plan.also]:
        names = each_seed(plan, rows, dataset)
        for student in ("sasrec", "caser"):
            own = [name for name in names if Path(name).name.startswith(f"{student}-")]
            flags = ["--reference", f"{student}-s0"]
            out = evaluate(plan, f"parts-{student}", own, *flags, dataset=dataset)
    return out


def teachers(runs: Runs) -> tuple[str, str]:
    """Two runs with an export: in sample, of an LM that was trained on all users; and out of
    fold."""
    inside = runs.tuned("small", "none", cut(runs), "ids", backbone=runs.backbone())
    runs.export(inside)
    return inside, outside(runs)


def outside(runs: Runs) -> str:
    """A run whose export is out of fold: of an LM for each fold of users, trained without it."""
    on = runs.backbone()
    without = [
        runs.tuned(
            f"small-f{fold}", "none", [*cut(runs), "--without-fold", fold], "ids", backbone=on
        )
        for fold in range(runs.plan.folds)
    ]
    runs.export(without[0], without)
    return without[0]


def cut(runs: Runs) -> list:
    """The flags of the small LM's depth."""
    return ["--layers", min(SMALL, kind_and_layers(runs.plan.llm)[1])]
