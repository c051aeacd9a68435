"""A log that has grown since a run was trained: what the run knew of it, by raw ids.

Names: I items of the new data (ids 1..I, 0 pads), J items of the run's.
"""

from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import Data, load_data_of, raw_item_ids
from delrec.runtime import Run, load_run, stop


def known_before(run: Run, data: Data) -> tuple[np.ndarray, int]:
    """(the number (I+1,) that each item had in the data of the run, by its raw id, 0 where it had
    none; J). Stops where those data are not here, or of another shop."""
    old_data = load_data_of(run)
    load_run(run.folder, old_data)  # stops where those are others
    return places_in(old_data, data), old_data.n_items


def places_in(old_data: Data, data: Data) -> np.ndarray:
    """(I+1,): the number that each item had in the old data, by its raw id; 0 where it had none.
    Stops where the ids are of another shop."""
    number_of = {raw: number for number, raw in enumerate(raw_item_ids(old_data))}
    from_I = np.array([number_of.get(raw, 0) for raw in raw_item_ids(data)])
    both = np.flatnonzero(from_I)
    if not len(both):
        stop(
            f"no item of {data.folder} has a raw id that {old_data.folder} knows, so there is "
            "nothing to go on from; train from scratch without --from"
        )
    other = [i for i in both if data.titles[i] != old_data.titles[from_I[i]]]
    if 2 * len(other) > len(both):
        i = other[0]
        stop(
            f"{len(other)} of the {len(both)} raw ids that {data.folder} and {old_data.folder} "
            f"share stand for another title (the first: '{data.titles[i]}' and "
            f"'{old_data.titles[from_I[i]]}'), so this is another log; train from scratch without "
            "--from"
        )
    return from_I


def counted(from_I: np.ndarray, n_before: int) -> str:
    """How many items are new and how many are gone, as the end of a sentence. from_I, n_before: as
    known_before gives them."""
    known = int((from_I > 0).sum())
    gone = n_before - known
    said = f"{len(from_I) - 1 - known} are new"
    return said + (f", {gone} are no longer there" if gone else "")


# ---------------------------------------------------------------- flags of a run that goes on


def own_values(run: Run, flags: tuple[str, ...]) -> dict[str, object]:
    """What a run says of some flags. A flag that the run does not know yet is left out."""
    return {flag: getattr(run, flag) for flag in flags if hasattr(run, flag)}


def settle(
    cfg: SimpleNamespace, typed: set[str], own: dict[str, object], fixed: tuple[str, ...], run: Run
) -> None:
    """Gives each flag of `own`, the run's values, that nobody typed the run's value. Stops where
    another value was typed of a flag that `fixed` names."""
    for key in fixed:
        given, was = getattr(cfg, key), own.get(key)  # None: an old run that does not say it
        if key in typed and given != was:
            stop(
                f"{said(key, given)} was given, but {run.folder} has {said(key, was)}, which "
                f"--from cannot change; leave {said(key, given)} out, or train from scratch "
                "without --from"
            )
    for key, value in own.items():
        if key not in typed:
            setattr(cfg, key, value)


def said(flag: str, value: object = None) -> str:
    """A flag as it is typed, with its value where one is given."""
    name = flag.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}" if value is None else f"--{name} {value}"
