"""The items of a run that is shared: what answering needs of the data, and nobody's history.

items.json in a run's folder holds titles, raw ids, further columns, the items in the order of their
popularity, those that training never saw, the words of the prompts, and the data's hash. It holds
no user and no count.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from delrec.data.counts import popularity
from delrec.data.prepared import ITEMS, Data, item_columns, raw_item_ids
from delrec.data.titles import CONTROL, LONGEST
from delrec.runtime import Run, read_json, stop, write_json


@dataclass(frozen=True, eq=False)
class Items:
    """What is known of the items of a shared run, beside their titles."""

    ids: list[str]  # (I,): the raw ids of the items 1..I
    columns: dict[str, list[str]]  # (I,) each: the further columns of items.csv
    popular: np.ndarray  # int64 (I,): the items, those that most people took first
    trained: np.ndarray  # int64, sorted: the items that training saw


def write_items(data: Data, folder: Path) -> None:
    """Writes items.json into a run's folder."""
    count_I = np.bincount(data.items, minlength=data.n_items + 1)
    words = data.meta["words"]
    record = {
        "dataset": data.name,
        "hash": data.meta["hash"],
        "words": {"noun": words["noun"], "verb": words["verb"]},
        "titles": data.titles[1:],
        "ids": raw_item_ids(data)[1:],
        "columns": item_columns(data),
        "popular": (np.argsort(-count_I[1:], kind="stable") + 1).tolist(),
        "untrained": (np.flatnonzero(popularity(data)[1:] == 0) + 1).tolist(),
    }
    write_json(folder / ITEMS, record)


def data_of_items(run: Run) -> Data:
    """What a shared run's items.json knows of its data: no interactions, no users. One that cannot
    be meant is refused.
    """
    path = run.folder / ITEMS
    record = read_json(path)
    n_items = items_in(path, record)
    if record["hash"] != run.data_hash:
        refuse(path, f"it is of other data (hash {record['hash']!r:.30}) than the run")
    none = np.zeros(0, np.int64)
    return Data(
        name=record["dataset"],
        folder=run.folder,
        folder_name=record["dataset"],
        meta={key: record[key] for key in ("hash", "words")} | {"name": record["dataset"]},
        items=none.astype(np.int32),
        ptr=np.zeros(1, np.int64),
        times=None,
        titles=["", *record["titles"]],
        train=none,
        val=none,
        test=none,
        n_items=n_items,
        n_users=0,
        shared=Items(
            ids=record["ids"],
            columns=record["columns"],
            popular=np.array(record["popular"], np.int64),
            trained=np.setdiff1d(np.arange(1, n_items + 1), record["untrained"]),
        ),
    )


# ---------------------------------------------------------------- what may stand there


def refuse(path: Path, fault: str) -> NoReturn:
    """Stops at an items.json that evaluate.py --card did not write so."""
    stop(f"{path} cannot be used: {fault}; fetch it again, or ask whoever shared it")


def items_in(path: Path, record: Any) -> int:
    """How many items a record of items.json holds, I; one of another shape is refused."""
    keys = ("dataset", "hash", "words", "titles", "ids", "columns", "popular", "untrained")
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        refuse(path, f"it lacks {', '.join(missing)}")
    words, columns = record["words"], record["columns"]
    if not isinstance(words, dict) or not isinstance(columns, dict):
        refuse(path, "its words and its columns are not named")
    named = {"name and words": [record["dataset"], record["hash"]]}
    named["name and words"] += [words.get("noun"), words.get("verb")]
    named |= {"titles": record["titles"], "ids": record["ids"]} | columns
    for name, some in named.items():
        if not isinstance(some, list) or not all(isinstance(text, str) for text in some):
            refuse(path, f"its {name:.60} are no texts")
    n = len(record["titles"])
    for name, some in ({"ids": record["ids"]} | columns).items():
        if len(some) != n:
            refuse(path, f"it holds {n} titles, but {len(some)} {name:.60}")
    for title in record["titles"]:
        if not title.strip() or len(title) > LONGEST or CONTROL.search(title):
            refuse(path, f"{title!r:.60} is no title of one line of at most {LONGEST} characters")
    if not n or len(set(record["ids"])) != n:
        refuse(path, "it holds no item, or an id twice")
    if not is_numbers(record["popular"], n) or sorted(record["popular"]) != [*range(1, n + 1)]:
        refuse(path, f"its order of popularity does not name each of the items 1 to {n} once")
    if not is_numbers(record["untrained"], n) or len(set(record["untrained"])) == n:
        refuse(path, f"its untrained items are not some of the items 1 to {n}")
    return n


def is_numbers(given: Any, most: int) -> bool:
    """Is it a list of whole numbers from 1 to `most`?"""
    return isinstance(given, list) and all(
        type(number) is int and 1 <= number <= most for number in given
    )
