"""The rows of a table: who ranks the candidates, with which scores.

First the floors, which need no training; then the runs, backbones before LMs; then rows fused of
two others. rows is {name: Row}, in this order.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delrec.backbone import titled
from delrec.backbone.text import names_of as names_of_text
from delrec.data.counts import LAST, cooccurrence, popularity
from delrec.data.floors import best_weight, fused, similarity_to
from delrec.data.prepared import Data, histories, load_data, load_data_of
from delrec.evaluation.scores import Part, Scorer, scores_of
from delrec.evaluation.stats import SEED, unseeded
from delrec.lm import listed
from delrec.lm.pretrained import seed_and_name
from delrec.lm.prompts import lists_candidates, settings_of_run
from delrec.no_run import must_open
from delrec.processes import Ranks
from delrec.runtime import Run, complete_renames, folder_of, load_run, stop, usual_run

STAGES = ["lm", "train_backbone", "distill", "finetune"]  # the order of the rows


@dataclass
class Row:
    """What ranks the candidates: a run, a floor, or two rows fused."""

    val_nC: np.ndarray  # its scores on validation, by which what is chosen is chosen
    test_nC: np.ndarray  # its scores on the test part
    note: str  # what it is, and what it chose
    run: Run | None = None  # the run whose scores they are
    compared: bool = True  # does it stand in the paired tests?


def open_runs(names: list[str], dataset: str | None, ranks: Ranks) -> tuple[list[Run], Data]:
    """(the runs of some folders, the data they were trained on). Without `dataset` it is the
    first run's own.
    """
    stages = ["train_backbone", "distill", "finetune", "lm"]
    runs = [load_run(name, stages=stages) for name in names]
    for run in runs:
        must_open(run)
    data = load_data_of(runs[0]) if runs and not dataset else load_data(dataset or "ml-100k")
    if runs and ranks.main:
        place = data.folder
        if place.resolve() != Path(getattr(runs[0], "data_folder", place)).resolve():
            print(
                f"{runs[0].folder} was trained on the preparation that stands in {place} now "
                f"(hash {data.meta['hash']}): that one is used",
                flush=True,
            )
    for run in runs:
        load_run(run.folder, data)  # refuses another data set's run
        listed.say_if_another(run, ranks)
    return runs, data


def runs_of(rows: dict[str, Row]) -> dict[str, Run]:
    """{name: run} of the rows that are runs."""
    return {name: row.run for name, row in rows.items() if row.run}


def names_of(rows: dict[str, Row]) -> dict[Path, str]:
    """{run folder: name} of the rows that are runs."""
    return {run.folder: name for name, run in runs_of(rows).items()}


# ---------------------------------------------------------------- floors


def floor_rows(data: Data, val: Part, test: Part) -> dict[str, Row]:
    """The rows that need no training."""
    # what they count is counted once for both parts
    samples = np.concatenate([val.samples, test.samples])
    cand_nC = np.concatenate([val.cand_nC, test.cand_nC])

    def floor(score_nC, note):
        n = len(val.samples)
        return Row(score_nC[:n], score_nC[n:], note, compared=False)

    return {
        "chance": floor(np.zeros(cand_nC.shape), "constant scores"),
        "popularity": floor(popularity(data)[cand_nC], "training interactions of the item"),
        "co-occurrence": floor(
            cooccurrence(data, samples, cand_nC),
            "within 5 steps in training, over the root of both counts, L=10, decay .8",
        ),
        "title-similarity": floor(
            similarity_to(data, histories(data, samples, LAST), cand_nC),
            "TF-IDF cosine to the history, L=10, decay .8",
        ),
    }


# ---------------------------------------------------------------- runs


def in_order(
    runs: list[Run], backbone: Run | None, taken: Collection[str]
) -> list[tuple[str, Run]]:
    """(name of its row, run) of every run, in the order of the rows; the table's backbone, where
    nobody gave it, comes last. taken: names of other rows.
    """
    runs = sorted(runs, key=lambda run: STAGES.index(run.stage))
    if backbone and backbone.folder not in [run.folder for run in runs]:
        runs = [*runs, backbone]
    names = distinct_names([run.folder for run in runs], taken)
    return [(names[run.folder], run) for run in runs]


def distinct_names(folders: Sequence[Path], taken: Collection[str]) -> dict[Path, str]:
    """{run folder: name of its row}: the folder's own name, with as many parents as it takes.

    No two rows have one name; seeds of X (X-s0, X-s1, ..) are seeds of one row only where they
    stand in one folder; and a run X beside them is none of them.
    """
    parents = dict.fromkeys(folders, 0)
    while True:
        names = {f: "/".join(f.parts[-1 - more :]) for f, more in parents.items()}
        short = [f for f in parents if parents[f] + 2 < len(f.parts)]  # the root is no name
        mistaken = [f for f in short if names[f] in taken or is_mistaken(f, names)]
        if not mistaken:
            return names
        for folder in mistaken:
            parents[folder] += 1


def is_mistaken(folder: Path, names: dict[Path, str]) -> bool:
    """True if a folder's name says that it holds a seed of a row that it does not belong to."""
    own = names[folder]
    alike = [f for f in names if f != folder and unseeded(names[f]) == unseeded(own)]
    elsewhere = any(f.parent != folder.parent for f in alike)
    return elsewhere or bool(alike) and SEED.search(own) is None


def add_run(
    rows: dict[str, Row],
    name: str,
    run: Run,
    scorer: Scorer,
    val: Part,
    test: Part,
    with_shuffled: bool = False,
) -> None:
    """Adds the row of a run under a name (see in_order); with_shuffled: also one of the run when it
    sees its histories in a random order.
    """
    val_nC, test_nC = scores_of(scorer, run, val), scores_of(scorer, run, test)
    rows[name] = Row(val_nC, test_nC, note_of(run), run)
    if not with_shuffled:
        return
    if run.stage in ("distill", "finetune") and listed.shows_backbone(run):
        # what its prompts hold of a backbone must not tell the real order
        backbone = load_run(run.settings["backbone_run"], scorer.data)
        scores_of(scorer, backbone, test, shuffled=True)
    test_nC = scores_of(scorer, run, test, shuffled=True)
    rows[f"{name}, shuffled"] = Row(val_nC, test_nC, "its history in a random order")


def note_of(run: Run) -> str:
    """What a run chose, where it differs from the paper."""
    if run.stage == "train_backbone":
        is_told = hasattr(run, "note") or not hasattr(run, "loss")  # every run of ours has one
        return note_of_another(run) if is_told else note_of_backbone(run)
    parts = prompt_notes(settings_of_run(run))
    if getattr(run, "augment", None):
        soft = f", soft target, T {run.soft:g}" if run.soft else ""
        parts.append(f"made histories ({run.augment}{soft})")
    if getattr(run, "user_states", None):
        whose = "its user's state" if run.user_states == "backbone" else "somebody else's state"
        parts.append(f"items carry {whose}")
    if run.stage == "finetune":
        parts += tuning_notes(run)
    if getattr(run, "calibration", 0):
        parts.append(f"calibration {run.calibration}")
    return ", ".join(parts)


def note_of_another(run: Run) -> str:
    """What the config.json of somebody else's model says of it, in one line."""
    return " ".join(str(getattr(run, "note", "")).split()) or "somebody else's"


def note_of_backbone(run: Run) -> str:
    """What a backbone was trained by, where it differs from the paper."""
    note = titled.note_of(run) or f"{run.loss} loss"
    for term in ("dros", "contrast"):
        note += f", --{term} {getattr(run, term):g}" if getattr(run, term, 0) else ""
    if getattr(run, "contrast", 0) and run.contrast_tau != 0.5:  # the default
        note += f" (tau {run.contrast_tau:g})"
    note += f", mean of the steps, {run.ema:g}" if getattr(run, "ema", 0) else ""
    note += ", a window a target" if getattr(run, "one_target", False) else ""
    if getattr(run, "teacher", None):
        note += f", taught by {Path(run.teacher).name} (lam {run.lam}, eta {run.eta})"
    if getattr(run, "text", None):
        sources = "+".join(Path(name).name for name in names_of_text(run.text))
        way = f"{run.text_in or ''}{shape_of_text(run)}".removeprefix(", ")
        note += f", titles' vectors: {sources}" + (f" ({way})" if way else "")
        note += ", permuted" if run.permute_text else ""
        note += ", new items are no negatives" if getattr(run, "cold_out", False) else ""
    if getattr(run, "from_run", None):
        note += f", went on from {Path(run.from_run).name}"
    if getattr(run, "backbone_run", None):  # recipes/mlp.py
        note += f", an MLP on the state of {Path(run.backbone_run).name}"
    return note


def shape_of_text(run: Run) -> str:
    """What else was said of a run's titles' vectors, where it differs from the defaults."""
    usual = {"text_whiten": None, "text_width": None, "text_graph": 0.0, "eta": 1.0}
    said = {key: getattr(run, key, value) for key, value in usual.items()}
    named = [f", {k.removeprefix('text_')} {v:g}" for k, v in said.items() if v != usual[k]]
    return "".join(named) + ("" if getattr(run, "offset", True) else ", no offset")


def prompt_notes(settings: dict) -> list[str]:
    """What an LM's prompt holds, and how its answer is read."""
    length = f"L={settings['history']}"
    vectors = "permuted vectors" if settings["permute_vectors"] else "vectors"
    if settings["input"] == "ids":
        return [f"items as {vectors}, all scored at once", length]
    are = f"listed in {settings['order']} order" if lists_candidates(settings) else "not listed"
    notes = [settings["verbalizer"], f"candidates {are}", length]
    if (orders := settings["orders"]) > 1:
        notes.append(f"mean over {orders} orders")
    if (hint := settings["hint"]) != "none":
        said = {"backbone": "", "shuffled": ", in any order", "permuted": ", another user's"}
        notes.append(f"RecRanker-style hint of {settings['backbone']}'s best{said[hint]}")
    notes += [f"summary {settings['summary']}"] if settings["summary"] else []
    return [f"titles and {vectors}", *notes] if settings["input"] == "hybrid" else notes


def tuning_notes(run: Run) -> list[str]:
    """How an LM was fine-tuned."""
    notes = []
    if seed_and_name(getattr(run, "llm_from", run.llm))[0] is not None:
        notes.append("random weights")
    if getattr(run, "layers", None):
        teacher = f"taught by {Path(run.teacher).name}" if run.teacher else "no teacher"
        notes.append(f"{run.layers} layers, {teacher}")
    if getattr(run, "residual", None):
        whose = "" if run.residual == "backbone" else ", after somebody else's history"
        counts = " and to counts and titles" if getattr(run, "residual_counts", False) else ""
        notes.append(f"added to its backbone's scores{whose}{counts}")
    if getattr(run, "kd", None):
        whose = " of other samples" if run.kd_permute else ""
        names = "+".join(Path(name).name for name in run.kd)
        notes.append(f"taught by {names}{whose} (a {run.kd_weight:g}, T {run.kd_temp:g})")
    if getattr(run, "keep_rps", 0):
        whose = "another user's lists" if run.keep_rps_permuted else "its backbone's lists"
        notes.append(f"kept near {whose} (W {run.keep_rps:g})")
    if getattr(run, "from_run", None):
        notes.append(f"went on from {Path(run.from_run).name}")
    if getattr(run, "pool", "stored") == "backbone":
        notes.append("trained on its backbone's lists")
    if getattr(run, "draw", "uniform") == "importance":
        notes.append("users drawn by ln n")
    if getattr(run, "ema", 0):
        notes.append(f"mean of the steps, {run.ema:g}")
    if getattr(run, "drop_items", 0):
        notes.append(f"items dropped in training, {run.drop_items}")
    if getattr(run, "r_drop", 0):
        notes.append(f"two passes alike, {run.r_drop:g}")
    prompt = Path(run.soft_prompt).name if run.soft_prompt else "none"
    return [
        *notes,
        f"loss {run.loss}",
        f"AdaLoRA on {run.adapt}" if run.adapt != "all" else f"all weights trained, lr {run.lr}",
        f"{run.samples} samples",
        f"soft prompt {prompt}",
    ]


def find_backbone(runs: list[Run], data: Data, ranks: Ranks) -> Run | None:
    """The backbone that a table is about: the first one given, else one that a run was trained
    with, else runs/<dataset>/sasrec; None if there is none of this preparation.
    """
    given = [run for run in runs if run.stage == "train_backbone"]
    if given:
        return given[0]
    trained_with = [Path(run.backbone_run) for run in runs if getattr(run, "backbone_run", None)]
    for place in [*trained_with, None]:
        folder = place or usual_run(data, "sasrec", runs)
        complete_renames(folder, "config.json")
        if not (folder / "config.json").exists():
            continue
        backbone = load_run(folder)
        if backbone.data_hash == data.meta["hash"]:
            return backbone
        if ranks.main:
            print(
                f"{folder} was trained on another preparation (hash {backbone.data_hash}), so "
                "it is no row here",
                flush=True,
            )
    return None


# ---------------------------------------------------------------- fused rows


def pairs_with_backbone(
    rows: dict[str, Row], runs: list[Run], backbone: Run
) -> list[tuple[str, str]]:
    """The pairs of rows that every table fuses: the backbone with what counts pairs, and with what
    knows the titles (the floors an LM's row, alone or fused, has to beat); each LM with its own
    backbone, where that is a row; the plain LM, which has none, with this one.
    """
    names = names_of(rows)
    base = names[backbone.folder]
    pairs = [(base, "co-occurrence"), (base, "title-similarity")]
    for run in runs:
        if run.stage in ("finetune", "lm"):
            own = row_of_backbone(rows, run) if getattr(run, "backbone_run", None) else base
            pairs += [(own, names[run.folder])] if own else []
    return pairs


def row_of_backbone(rows: dict[str, Row], run: Run) -> str | None:
    """The row of the backbone that an LM was trained with: of its folder, or of the same weights
    (those trained with folds are those trained without); None where it is no row.
    """
    folder, names = folder_of("runs", run.backbone_run), names_of(rows)
    if folder in names:
        return names[folder]
    digest = listed.backbone_digest(folder) or getattr(run, "backbone_digest", None)
    backbones = {n: r for n, r in runs_of(rows).items() if r.stage == "train_backbone"}
    same = [n for n, r in backbones.items() if digest == listed.backbone_digest(r.folder)]
    return same[0] if digest and same else None


def add_fused(rows: dict[str, Row], pairs: list[tuple[str, str]], is_target_nC: np.ndarray) -> None:
    """Adds a row for each pair of rows (a, b): a + b, the weight chosen on validation, whose
    targets are given. A fused row may be fused again.
    """
    for a, b in dict.fromkeys(pairs):
        for name in (a, b):
            if name not in rows:
                stop(f"--fuse names the row {name}, but the rows are {', '.join(rows)}")
        w = best_weight(rows[a].val_nC, rows[b].val_nC, is_target_nC)
        rows[f"{a}+{b}"] = Row(
            fused(rows[a].val_nC, rows[b].val_nC, w),
            fused(rows[a].test_nC, rows[b].test_nC, w),
            f"weight of {b} {w:.2f}, chosen on validation",
        )


def reference_of(rows: dict[str, Row], backbone: Run | None, asked: str | None = None) -> str:
    """The row that the others are tested against: the one asked for, else the backbone, else the
    first run.
    """
    reference = asked
    if not reference and backbone:
        reference = names_of(rows)[backbone.folder]
    if not reference:
        reference = next(name for name, row in rows.items() if row.compared)
    if reference not in rows:
        stop(f"--reference names the row {reference}, but the rows are {', '.join(rows)}")
    return reference
