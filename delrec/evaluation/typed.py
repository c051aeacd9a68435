"""The rows that options name (--reference, --fuse, --compare, --primary), as people type them: a
run by its folder's name, also where its row needs more parents.
"""

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace

from delrec.evaluation.stats import unseeded
from delrec.runtime import Run, stop


def settle_names(
    cfg: SimpleNamespace, named: list[tuple[str, Run]], floors: Collection[str]
) -> None:
    """Puts the names of rows in the place of what was typed, in cfg; stops, before a run is scored,
    at a name that no row will have. named: (name of its row, run); floors: the rows before those.
    """
    folders = {name: run.folder for name, run in named}
    rows = [*floors, *folders]
    means = Counter(map(unseeded, rows))

    def row(typed: str) -> str | None:
        return typed if typed in rows else row_of_folder(typed, folders)

    def row_or_mean(typed: str) -> str | None:  # what the table calls so comes first
        return typed if means[typed] > 1 else row(typed)

    cfg.reference = cfg.reference and settled(cfg.reference, row)
    cfg.fuse = [tuple(settled(typed, row) for typed in pair) for pair in cfg.fuse]
    cfg.compare = [tuple(settled(typed, row_or_mean) for typed in pair) for pair in cfg.compare]
    if cfg.primary:
        cfg.primary = tuple(settled(typed, row_or_mean) for typed in cfg.primary)

    asked = [("--fuse", name) for pair in cfg.fuse for name in pair]
    if cfg.reference:
        asked.append(("--reference", cfg.reference))
    for flag, name in asked:
        if name not in rows and not made_later([name]):
            stop(f"{flag} names the row {name}, but the rows are {', '.join(rows)}")
    if cfg.primary and cfg.exploratory:
        stop("--primary names what was planned, --exploratory says nothing was; leave one out")
    if cfg.primary in cfg.compare:
        stop(
            "--primary is judged alone, and --compare would count the same pair among the others; "
            "leave it out there"
        )
    pairs = [("--compare", pair) for pair in cfg.compare]
    pairs += [("--primary", cfg.primary)] if cfg.primary else []
    for flag, pair in pairs:
        now = set(pair) - made_later(pair)
        if not (now <= set(rows) or now <= set(means)):
            others = [mean for mean in means if mean not in rows]
            stop(
                f"{flag} takes two rows or two means over seeds, it names {' and '.join(pair)}; "
                f"the rows are {', '.join(rows)}; the means are {', '.join(others) or 'none'}"
            )


def row_of_folder(typed: str, folders: dict[str, Path]) -> str | None:
    """The row of the one run whose folder ends so; None of none or several. folders: {row: its
    run's}.
    """
    parts = Path(typed).parts
    found = [row for row, folder in folders.items() if folder.parts[-len(parts) :] == parts]
    return found[0] if len(found) == 1 else None


def settled(typed: str, row: Callable[[str], str | None]) -> str:
    """The name of a row that was typed: of a run, of one in another way ("X, shuffled"), or of
    several fused ("X+Y"); what no row answers stays as it is.
    """
    if name := row(typed):
        return name
    members = [member.partition(", ") for member in typed.split("+")]
    names = [row(own) for own, _, _ in members]
    if None in names:
        return typed
    return "+".join(f"{name}{comma}{way}" for name, (_, comma, way) in zip(names, members))


def made_later(names: Collection[str]) -> set[str]:
    """Those of some names that a row may have which is made of the runs' rows."""
    return {name for name in names if "+" in name or ", " in name}
