"""What validation says of the levers, as a table; the test part is not read."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delrec.data.prepared import Data, candidates, load_data, users
from delrec.data.run_files import ranks_in
from delrec.evaluation.stats import Test, clusters_of, difference, least_found
from delrec.evaluation.wording import short
from delrec.metrics import compare, metrics
from delrec.runtime import config_of_run, folder_of, is_run, read_npy, write_json, write_text
from recipes.controls import quality

C = 15  # candidates

# {row: (the row that it is compared with, its controls)}
Compared = dict[str, tuple[str, tuple[str, ...]]]


@dataclass
class Line:
    """A row of the table."""

    full: float  # NDCG@10 over all items
    hit_n: np.ndarray  # HR@1 among the candidates, of each sample
    step: int  # the chosen one, of a conventional model the epoch
    minutes: float


def asked_by(folder: Path) -> np.ndarray:
    """The places of the validation samples that chose a run's step."""
    return np.flatnonzero(np.isfinite(read_npy(folder / f"scores_val_{C}.npy")).all(1))


def line_of(folder: Path, data: Data, which: np.ndarray) -> Line:
    """What validation says of a run on some of its samples, at the chosen step."""
    score_nC = read_npy(folder / f"scores_val_{C}.npy")[which]
    target_n1 = data.items[data.val[which]][:, None]
    hit_n = metrics(*compare(score_nC, candidates(data, "val", C, which) == target_n1))["hr@1"]
    config = config_of_run(folder)
    is_lm = config["stage"] == "finetune"
    full = quality(folder) if is_lm else float(gains(folder, data, which).mean())
    step = config["best_step" if is_lm else "best_epoch"]
    return Line(full, hit_n, step, minutes(config))


def gains(folder: Path, data: Data, which: np.ndarray) -> np.ndarray:
    """NDCG@10 over all items of each sample, of a conventional model."""
    return metrics(*ranks_in(folder / "full_val.npy", data, "val")[which].T)["ndcg@10"]


def minutes(config: dict) -> float:
    """The minutes of a run's training, of an LM also those of its stage 1."""
    before = {str(config.get(key)) for key in ("soft_prompt", "maps")}
    folders = {folder_of("runs", name) for name in before if is_run(folder_of("runs", name))}
    return (config["seconds"] + sum(config_of_run(x)["seconds"] for x in folders)) / 60


def above_all(name: str, lines: dict[str, Line], compared: Compared) -> bool:
    """True if a row's NDCG@10 over all items is above that of what it is compared with, and above
    all of its controls."""
    minus, controls = compared[name]
    return all(lines[name].full > lines[other].full for other in (minus, *controls))


def table_lines(lines: dict[str, Line], compared: Compared, test_of: Callable) -> list[str]:
    """The rows of the table. test_of: a row minus another, in HR@1."""
    wide = max(map(len, lines)) + 2
    found = [
        f"{'row':<{wide}}{'minus':<{wide}}{'NDCG@10 all':>12}{'diff.':>9}{'HR@1 of 15':>12}"
        f"{'diff.':>8}{'least':>7}{'chosen':>8}{'minutes':>9}"
    ]
    for name, line in lines.items():
        minus = compared[name][0]
        row = f"{name:<{wide}}{minus:<{wide}}{line.full:>12.4f}"
        if minus:
            test: Test = test_of(name, minus)
            row += f"{line.full - lines[minus].full:>+9.4f}{line.hit_n.mean():>12.3f}"
            row += f"{test['difference']:>+8.3f}{short(test['least']):>7}"
        else:
            row += f"{'':>9}{line.hit_n.mean():>12.3f}{'':>15}"
        found.append(f"{row}{line.step:>8}{line.minutes:>9.1f}")
    return found


def report(dataset: str, folders: dict[str, Path], compared: Compared, out: Path) -> None:
    """Prints the table, and writes it as levers.txt and levers.json."""
    data = load_data(dataset)
    conventional = [x for x in folders.values() if config_of_run(x)["stage"] == "train_backbone"]
    lms = [x for x in folders.values() if x not in conventional]
    which = asked_by(lms[0])
    user_n = users(data, data.val[which])
    lines = {name: line_of(folder, data, which) for name, folder in folders.items()}

    def test_of(a, b):
        return difference(lines[a].hit_n, lines[b].hit_n, user_n)

    controls = {name for _, names in compared.values() for name in names}
    levers = [name for name, folder in folders.items() if folder in lms and name not in controls]
    better = [name for name in levers if above_all(name, lines, compared)]
    clusters = clusters_of(user_n)
    text = [
        f"{dataset}: {len(which)} validation samples of {len(clusters.count_G)} users, one seed, "
        "each run at its chosen step. NDCG@10 over all items chooses. least: the smallest true "
        "difference in HR@1 that one paired t-test finds four times in five",
        *table_lines(lines, compared, test_of),
        "",
        f"above what they are compared with and above their controls, by NDCG@10 over all items: "
        f"{', '.join(better) or 'no row'}",
    ]
    if conventional:
        gain_n = gains(conventional[0], data, which)
        # of two rows that share nothing but their samples' number; paired rows show less
        least = least_found(float(np.sqrt(2 * gain_n.var() / len(which))), clusters.worth - 1)
        text.append(
            f"NDCG@10 over all items is kept as a mean alone, so its differences cannot be paired; "
            f"two rows without anything in common would show {short(least, 4)}"
        )
    rows = {
        name: {
            "minus": compared[name][0],
            "val_full_ndcg@10": line.full,
            "val_hr@1": float(line.hit_n.mean()),
            "chosen": line.step,
            "minutes": round(line.minutes, 2),
        }
        for name, line in lines.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "levers.txt", "\n".join(text) + "\n")
    write_json(out / "levers.json", {"dataset": dataset, "samples": len(which), "rows": rows})
    print("\n" + "\n".join(text) + f"\n\nwritten: {out / 'levers.txt'}, levers.json", flush=True)
