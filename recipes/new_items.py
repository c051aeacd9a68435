"""What is a title worth, where an item has no history? Items are held out, and added again.

    python recipes/new_items.py --dataset ml-100k --epochs 30      some minutes on one core
    python recipes/new_items.py --dataset beauty --flags "--text tfidf"
    python recipes/new_items.py --dataset beauty --cold-out --flags "--text tfidf"

A tenth of the items is taken out of the log, a backbone is trained on what is left, and
Recommender.add_items brings them back by their titles. With --cold-out the items stay in the
catalogue, training and validation do not see them, and train_backbone.py --cold-out ranks them.
Of the test part's interactions with such an item it says how often the item is among the first 20
of all, and among the first 10 of the held-out ones. Beside that:

    permuted titles    the same with the held-out titles permuted
    title similarity   TF-IDF cosine of each title to the history; nothing is trained
    trained            the same model on the whole log, asked with the same histories
    chance             and popularity, which never shows an item that nobody has bought

New items take places from others. So each row also says how often the targets of all other samples
are among the first 20, with the held-out items in the ranking and without.

The last line is one JSON object.
"""

import csv
import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.counts import in_training, popularity
from delrec.data.floors import similarity_to
from delrec.data.prepared import Data, load_data, raw_item_ids, raw_user_ids, users
from delrec.evaluation.stats import interval
from delrec.ranges import Number
from delrec.runtime import described, stop
from delrec.serving.recommender import Recommender
from recipes.stage import in_root, name_of, stage

TOP, TOP_NEW = 20, 10  # places that count, among all items and among the held-out ones


def held_out(data: Data, share: float, seed: int) -> np.ndarray:
    """Bool (I+1,): a share of the items that training saw, drawn at random."""
    seen = np.flatnonzero(popularity(data)[1:]) + 1
    drawn = np.random.default_rng(seed).choice(seen, int(share * len(seen)), replace=False)
    is_out_I = np.zeros(data.n_items + 1, bool)
    is_out_I[drawn] = True
    return is_out_I


def write_log(folder: Path, data: Data, is_out_I: np.ndarray, in_test: bool = False) -> None:
    """Writes the log of a prepared folder without the held-out items, as csv; with in_test each
    part of the split is a file, and that of the test has the items."""
    folder.mkdir(parents=True, exist_ok=True)
    part_M = part_of(data) if in_test else np.zeros(len(data.items), int)
    kept_M = ~is_out_I[data.items] | (in_test & (part_M == 2))
    for part, name in enumerate(["train", "val", "test"] if in_test else [""]):
        path = folder / f"interactions.{name}.csv".replace("..", ".")
        write_interactions(path, data, np.flatnonzero(kept_M & (part_M == part)))
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title"])
        rows.writerows(zip(raw_item_ids(data)[1:], data.titles[1:]))


def part_of(data: Data) -> np.ndarray:
    """Which part of the split an interaction belongs to (M,): 0 training, 1 validation, 2 test; -1
    where it stands in a later part and is no sample of it."""
    part_M = np.where(in_training(data), 0, -1)
    part_M[np.asarray(data.val)], part_M[np.asarray(data.test)] = 1, 2
    return part_M


def write_interactions(path: Path, data: Data, which: np.ndarray) -> None:
    """Writes some interactions as csv."""
    item_ids, user_ids = raw_item_ids(data), raw_user_ids(data)
    # where only an order is known, it is the place in the log
    place_M = np.arange(len(data.items)) if data.times is None else data.times
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "position" if data.times is None else "timestamp"])
        for at, user in zip(which, users(data, which)):
            rows.writerow([user_ids[user], item_ids[data.items[at]], int(place_M[at])])


@dataclass
class Asked:
    """The test part's interactions with held-out items."""

    old: list[np.ndarray]  # the history of each, without held-out items
    target_n: np.ndarray  # the items, by their numbers in the whole log
    user_n: np.ndarray

    def last(self, L: int) -> np.ndarray:
        """The last L items of the histories, padded on the left with 0: (n, L)."""
        return np.stack([np.pad(items[-L:], (max(L - len(items), 0), 0)) for items in self.old])


def asked(data: Data, is_out_I: np.ndarray, out: bool = True) -> Asked:
    """The test samples with a held-out target, or with another one; a sample with nothing left of
    its history is left out."""
    old, targets, of_user = [], [], []
    samples = np.asarray(data.test)
    for sample, user in zip(samples, users(data, samples)):
        items = data.items[data.ptr[user] : sample]
        items = items[~is_out_I[items]]
        if is_out_I[data.items[sample]] == out and len(items):
            old.append(items)
            targets.append(data.items[sample])
            of_user.append(user)
    return Asked(old, np.array(targets), np.array(of_user))


@dataclass
class Hits:
    """Of some samples: is the target among the first places?"""

    hit_n: np.ndarray  # 1 where it is, else 0
    user_n: np.ndarray


def first_of(rec: Recommender, ids: list[str], question: Asked, top: int, **among: list) -> Hits:
    """Is the target among the first `top`? ids: the raw id of each item of the whole log; among:
    which items are ranked, as Recommender.recommend takes it."""
    histories = [[ids[i] for i in items] for items in question.old]
    answers = rec.recommend(ids=histories, top=top, **among)
    targets = [ids[i] for i in question.target_n]
    return Hits(np.array([t in a.ids for t, a in zip(targets, answers)], float), question.user_n)


def hits(
    rec: Recommender, ids: list[str], question: Asked, others: Asked, new: list[str]
) -> dict[str, Hits]:
    """{what: hits} of held-out targets over all items and over the held-out ones, and of the other
    targets with the held-out items in the ranking and without."""
    return {
        f"hr@{TOP} of all": first_of(rec, ids, question, TOP),
        f"hr@{TOP_NEW} of new": first_of(rec, ids, question, TOP_NEW, only=new),
        f"others' hr@{TOP}": first_of(rec, ids, others, TOP),
        f"others' hr@{TOP} without them": first_of(rec, ids, others, TOP, exclude=new),
    }


def similarity_hits(data: Data, question: Asked, is_out_I: np.ndarray) -> dict[str, Hits]:
    """The same by title similarity; a tie counts against the target."""
    every_I = np.arange(1, data.n_items + 1)
    of_all, of_new = [], []
    for i in range(0, len(question.old), 100):
        part = Asked(*(rows[i : i + 100] for rows in vars(question).values()))
        cand_nI = np.broadcast_to(every_I, (len(part.old), data.n_items))
        score_nI = similarity_to(data, part.last(10), cand_nI)
        for row, items in enumerate(part.old):  # as Recommender leaves them out
            score_nI[row, items - 1] = -np.inf
        own_n = score_nI[np.arange(len(part.old)), part.target_n - 1]
        before_nI = score_nI >= own_n[:, None]
        of_all.append(before_nI.sum(1) <= TOP)
        of_new.append(before_nI[:, is_out_I[1:]].sum(1) <= TOP_NEW)
    return {
        f"hr@{TOP} of all": Hits(np.concatenate(of_all).astype(float), question.user_n),
        f"hr@{TOP_NEW} of new": Hits(np.concatenate(of_new).astype(float), question.user_n),
    }


def permuted(titles: dict[str, str], seed: int) -> dict[str, str]:
    """The titles at other ids: in a random order each id gets the next one's, so that none keeps
    its own."""
    order = np.random.default_rng([seed, 1]).permutation(list(titles)).tolist()
    return {at: titles[taken] for at, taken in zip(order, [*order[1:], *order[:1]])}


@dataclass
class Runs:
    """What is compared, run folders of train_backbone.py."""

    without: Path  # training never saw the held-out items
    permuted: Path | None  # the same by other items' titles, where --cold-out ranks them
    trained: Path  # on the whole log


def make_runs(data: Data, is_out_I: np.ndarray, flags: list, cold_out: bool) -> Runs:
    """Prepares the log without the held-out items and trains what is compared. flags: of
    train_backbone.py."""
    if data.meta["split"] == "files":
        stop(
            f"{data.folder} is split by its own files, and a log without some items has none of "
            "them; prepare it with --split temporal or --split leave-one-out for this program"
        )
    without = prepared_without(data, is_out_I, cold_out)
    cold = ["--cold-out"] * cold_out
    return Runs(
        trained_on(without, [*flags, *cold]),
        trained_on(without, [*flags, *cold, "--permute-text"]) if cold_out else None,
        trained_on(data.folder, flags),
    )


def prepared_without(data: Data, is_out_I: np.ndarray, cold_out: bool) -> str:
    """The name of the prepared log without the held-out items; with cold_out its test part has
    them."""
    # another share, seed or log holds out others: a log without these is taken for none of them
    which = hashlib.sha256(data.meta["hash"].encode() + is_out_I.tobytes()).hexdigest()[:8]
    name = f"{data.folder_name}-{'cold' if cold_out else 'without'}-{which}"
    raw = runtime.ROOT / "runs" / "new-items" / name
    if not (runtime.ROOT / "data" / name / "meta.json").exists():
        write_log(raw, data, is_out_I, in_test=cold_out)
        split = "files" if cold_out else data.meta["split"]
        stage(None, "data/prepare.py", name, "--raw", raw, "--core", 1, "--split", split)
    return name


def trained_on(dataset: str | Path, flags: list) -> Path:
    """A backbone's run on a prepared folder."""
    run = runtime.ROOT / "runs" / Path(dataset).name / name_of(["new", *flags[1:]])
    stage(run, "train_backbone.py", "--dataset", dataset, *flags, "--out", run)
    return run


def compared(
    runs: Runs, data: Data, question: Asked, is_out_I: np.ndarray, seed: int
) -> dict[str, dict[str, Hits]]:
    """{row: {what: hits}}. Without a run of permuted titles the items are added by add_items."""
    ids, others = raw_item_ids(data), asked(data, is_out_I, out=False)
    titles = {ids[i]: data.titles[i] for i in np.flatnonzero(is_out_I)}

    def found(run, added=None):
        rec = Recommender.load(run)
        if added:
            rec.add_items(added)
        return hits(rec, ids, question, others, list(titles))

    if runs.permuted:
        by_titles = {"titles": found(runs.without), "permuted titles": found(runs.permuted)}
    else:
        exchanged = permuted(titles, seed)
        by_titles = {
            "titles": found(runs.without, titles),
            "permuted titles": found(runs.without, exchanged),
        }
    return by_titles | {
        "title similarity": similarity_hits(data, question, is_out_I),
        "trained": found(runs.trained),
    }


def print_rows(rows: dict[str, dict[str, Hits]], question: Asked, n: int, new: int) -> None:
    """Prints the rows and one JSON object. n: items, new: held-out ones among them."""
    said = {"asked": len(question.old), "users": len(set(question.user_n)), "new": new}
    for row, each in rows.items():
        for what, of in each.items():
            mean, (low, high) = of.hit_n.mean(), interval(of.hit_n, of.user_n)
            said[f"{row}: {what}"] = [round(float(x), 4) for x in (mean, low, high)]
            print(f"{row:<16} {what:<28} {mean:.3f} [{low:.3f}, {high:.3f}]", flush=True)
    of_all, of_new = min(TOP / n, 1), min(TOP_NEW / new, 1)
    said[f"chance: hr@{TOP} of all"] = round(of_all, 4)
    said[f"chance: hr@{TOP_NEW} of new"] = round(of_new, 4)
    print(f"by chance {of_all:.3f} of all, {of_new:.3f} of new")
    print(json.dumps(said))


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="name under data/, or a prepared folder")
@click.option("--model", default="sasrec", help="the backbone")
@click.option("--epochs", default=30, help="that it is trained for, at most")
@click.option("--flags", default="", help="more flags of train_backbone.py")
@click.option(
    "--cold-out",
    is_flag=True,
    help="the items stay in the catalogue, and train_backbone.py --cold-out ranks them (--flags "
    "names the --text); else add_items does",
)
@click.option(
    "--share",
    default=0.1,
    type=Number(0, 1, min_open=True, max_open=True),
    help="of the items that are held out",
)
@click.option("--seed", default=0, type=click.IntRange(0), help="of the draw")
def main(
    dataset: str, model: str, epochs: int, flags: str, cold_out: bool, share: float, seed: int
) -> None:
    """What titles are worth where an item has no history."""
    dataset, flags = in_root(dataset=dataset, flags=flags).values()
    data = load_data(dataset)
    is_out_I = held_out(data, share, seed)
    if cold_out:  # the catalogue has what the log has: of the held-out items those of its test part
        is_out_I &= np.isin(np.arange(len(is_out_I)), data.items[data.test])
    question = asked(data, is_out_I)
    if not question.old:
        stop(
            f"none of the {len(data.test)} test samples of {data.folder} asks for one of the "
            f"{is_out_I.sum()} held-out items after a history; hold out more (--share), or take a "
            "larger log"
        )
    more = ["--model", model, "--epochs", str(epochs), *shlex.split(flags)]
    runs = make_runs(data, is_out_I, more, cold_out)
    rows = compared(runs, data, question, is_out_I, seed)
    print_rows(rows, question, data.n_items, int(is_out_I.sum()))


if __name__ == "__main__":
    main()
