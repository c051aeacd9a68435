"""What is a title worth, where an item has no history? Items are held out, and added again.

    python recipes/new_items.py --dataset ml-100k --epochs 30      some minutes on one core

A tenth of the items is taken out of the log, a backbone is trained on what is left, and
Recommender.add_items brings them back by their titles. Of the test part's interactions with such an
item it says how often the item is among the first 20 of all, and among the first 10 of the
held-out ones; beside that by chance, and with the held-out titles permuted. The last line is one
JSON object.
"""

import csv
import json
import sys
from pathlib import Path

import click
import numpy as np

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.counts import popularity
from delrec.data.prepared import Data, load_data, raw_item_ids, raw_user_ids, users
from delrec.evaluation.stats import interval
from delrec.runtime import described
from delrec.serving.recommender import Recommender
from recipes.stage import stage

TOP, TOP_NEW = 20, 10  # places that count, among all items and among the held-out ones


def held_out(data: Data, share: float, seed: int) -> np.ndarray:
    """Bool (I+1,): a share of the items that training saw, drawn at random."""
    seen = np.flatnonzero(popularity(data)[1:]) + 1
    drawn = np.random.default_rng(seed).choice(seen, int(share * len(seen)), replace=False)
    is_out_I = np.zeros(data.n_items + 1, bool)
    is_out_I[drawn] = True
    return is_out_I


def write_log(folder: Path, data: Data, is_out_I: np.ndarray) -> None:
    """Writes the log of a prepared folder without the held-out items, as csv."""
    folder.mkdir(parents=True, exist_ok=True)
    item_ids, user_ids = raw_item_ids(data), raw_user_ids(data)
    user = users(data, np.arange(len(data.items)))
    with open(folder / "interactions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "timestamp"])
        for place in np.flatnonzero(~is_out_I[data.items]):
            rows.writerow(
                [user_ids[user[place]], item_ids[data.items[place]], int(data.times[place])]
            )
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["item", "title"])
        rows.writerows(zip(item_ids[1:], data.titles[1:]))


def asked(data: Data, is_out_I: np.ndarray) -> tuple[list[list[str]], list[str], np.ndarray]:
    """(histories without held-out items, the held-out targets, their users) of the test part."""
    ids = raw_item_ids(data)
    histories, targets, of_user = [], [], []
    samples = np.asarray(data.test)
    for sample, user in zip(samples, users(data, samples)):
        old = data.items[data.ptr[user] : sample]
        old = old[~is_out_I[old]]
        if is_out_I[data.items[sample]] and len(old):
            histories.append([ids[i] for i in old])
            targets.append(ids[data.items[sample]])
            of_user.append(user)
    return histories, targets, np.array(of_user)


def hits(
    rec: Recommender, histories: list[list[str]], targets: list[str], new: list[str]
) -> dict[str, np.ndarray]:
    """{what: 1 where the target is among the first places} over all items and over the new ones."""
    of_all = rec.recommend(ids=histories, top=TOP)
    of_new = rec.recommend(ids=histories, top=TOP_NEW, only=new)
    return {
        f"hr@{TOP} of all": np.array([t in a.ids for t, a in zip(targets, of_all)], float),
        f"hr@{TOP_NEW} of new": np.array([t in a.ids for t, a in zip(targets, of_new)], float),
    }


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="a prepared data set with times")
@click.option("--model", default="sasrec", help="the backbone")
@click.option("--epochs", default=30, help="that it is trained for, at most")
@click.option("--share", default=0.1, help="of the items that are held out")
@click.option("--seed", default=0, help="of the draw")
def main(dataset: str, model: str, epochs: int, share: float, seed: int) -> None:
    """What add_items is worth for a backbone."""
    data = load_data(dataset)
    is_out_I = held_out(data, share, seed)
    name = f"{data.folder_name}-without-{seed}"
    raw = runtime.ROOT / "runs" / "new-items" / name
    write_log(raw, data, is_out_I)
    run = runtime.ROOT / "runs" / name / model
    stage(None, *f"data/prepare.py {name} --raw {raw} --core 1".split())
    stage(run, *f"train_backbone.py --dataset {name} --model {model} --epochs {epochs}".split())
    ids = raw_item_ids(data)
    titles = {ids[i]: data.titles[i] for i in np.flatnonzero(is_out_I)}
    order = np.random.default_rng([seed, 1]).permutation(list(titles.values())).tolist()
    histories, targets, user = asked(data, is_out_I)
    found = {"asked": len(targets), "users": len(set(user)), "new": len(titles)}
    for row, given in (("titles", titles), ("permuted titles", dict(zip(titles, order)))):
        rec = Recommender.load(run)
        rec.add_items(given)
        for what, hit_n in hits(rec, histories, targets, list(titles)).items():
            low, high = interval(hit_n, user)
            found[f"{row}: {what}"] = [round(float(x), 4) for x in (hit_n.mean(), low, high)]
            print(f"{row:<16} {what:<14} {hit_n.mean():.3f} [{low:.3f}, {high:.3f}]", flush=True)
    found[f"chance: hr@{TOP} of all"] = round(TOP / data.n_items, 4)
    found[f"chance: hr@{TOP_NEW} of new"] = round(TOP_NEW / len(titles), 4)
    print(f"by chance {TOP / data.n_items:.3f} of all, {TOP_NEW / len(titles):.3f} of new")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
