"""What does going on cost, and what does it give? train_backbone.py --from against from scratch.

    python recipes/retrain.py                                  ml-100k, SASRec, three seeds
    python recipes/retrain.py --dataset beauty --seeds 1       other data, prepared before

The data set is the log of today. The log of before is made of it: without the interactions of its
test part, prepared in the same way (users and items with too few interactions go, which come back
as new ones). Where there are times that is the last tenth of all interactions, in a leave-one-out
split each user's last one.

Three rows a seed, all of them ranked on the test part of today's log, which no row was trained on
or chosen by:
    scratch    trained on today's log
    from       trained on the log of before, then --from that run on today's log
    before     that run as it was, carried over and not trained (--from, --epochs 0)
The minutes are those of the second training alone: the first one was made a week ago. They are of
the processor, one core's, so that other work on the machine does not count; its clock's stand in
each run's config.json.

The last line is one JSON object. evaluate.py prints the table, with chance and the other floors.
"""

import json
import resource
import sys
from pathlib import Path

import click
import numpy as np

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.counts import chance_over_all
from delrec.data.prepared import Data, load_data, raw_item_ids
from delrec.metrics import chance
from delrec.runtime import described, load_run, read_json, write_json, write_text
from recipes.stage import in_root, prepare, stage

# no later stage reads these runs' lists
FEW = ["--lists", 1000]
SHOWN = {"candidates15": ("hr@1",), "full": ("ndcg@10", "hr@10")}


def is_later(data: Data) -> np.ndarray:
    """(M,): the interactions that the log of before does not have."""
    if data.meta["split"] == "temporal" and data.times is not None:
        return np.asarray(data.times) >= data.times[data.test].min()
    later_M = np.zeros(len(data.items), bool)
    later_M[data.test] = True
    return later_M


def write_log(folder: Path, data: Data, kept_M: np.ndarray) -> None:
    """Writes some interactions of a prepared folder as a raw log, under their raw ids."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = raw_item_ids(data)
    user_M = np.repeat(np.arange(data.n_users), np.diff(data.ptr))
    # where only an order is known, it is the place among the user's
    place_M = np.arange(len(data.items)) if data.times is None else data.times
    rows = zip(user_M[kept_M], data.items[kept_M], place_M[kept_M])
    lines = [f"u{user},{csv(ids[item])},{place}\n" for user, item, place in rows]
    column = "position" if data.times is None else "timestamp"
    write_text(folder / "interactions.csv", f"user,item,{column}\n" + "".join(lines))
    lines = [f"{csv(raw)},{csv(title)}\n" for raw, title in zip(ids[1:], data.titles[1:])]
    write_text(folder / "items.csv", "item,title\n" + "".join(lines))


def csv(text: str) -> str:
    """A cell of a csv."""
    return '"' + text.replace('"', '""') + '"'


def prepare_before(data: Data) -> str:
    """The name of the prepared log of before."""
    # another preparation of today's log has another test part, which this one would hold
    name = f"{data.folder_name}-before-{data.meta['hash'][:8]}"
    if not (runtime.ROOT / "data" / name / "meta.json").exists():
        raw, words = runtime.ROOT / "runs" / name / "raw", data.meta["words"]
        write_log(raw, data, ~is_later(data))
        flags = ["--raw", raw, "--core", data.meta["core"], "--split", data.meta["split"]]
        flags += ["--noun", words["noun"], "--verb", words["verb"]]
        stage(None, "data/prepare.py", name, *flags)
    return name


def train(name: str, dataset: str, flags: list) -> Path:
    """The folder of a trained run, under runs/<dataset>/. What it took of the processor is kept
    beside it: a killed and continued one counts from its last start."""
    folder = runtime.ROOT / "runs" / Path(dataset).name / name
    is_there, began = (folder / "config.json").exists(), processor_seconds()
    stage(folder, "train_backbone.py", "--dataset", dataset, "--out", folder, *flags)
    if not is_there:
        write_json(Path(f"{folder}.cpu.json"), {"seconds": processor_seconds() - began})
    return folder


def processor_seconds() -> float:
    """What all stages so far took of the processor, on all cores together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def numbers_of(folder: Path) -> dict[str, float]:
    """What a row shows of a run: minutes, epochs, and the test part's metrics."""
    run, test = load_run(folder), read_json(folder / "metrics.json")["test"]
    seconds = read_json(Path(f"{folder}.cpu.json"))["seconds"]
    found = {"minutes": seconds / 60, "epochs": run.epochs_run, "best": run.best_epoch}
    return found | {
        f"{metric} {space}": test[space][metric]
        for space, names in SHOWN.items()
        for metric in names
    }


def print_rows(rows: dict[str, list[dict]], data: Data) -> dict[str, dict]:
    """Prints the mean of every row over its seeds, and chance; returns the means."""
    means = {
        name: {key: float(np.mean([seed[key] for seed in seeds])) for key in seeds[0]}
        for name, seeds in rows.items()
    }
    among = {"candidates15": chance(15), "full": chance_over_all(data, data.test)}
    means["chance"] = {
        f"{metric} {space}": among[space][metric]
        for space, names in SHOWN.items()
        for metric in names
    }
    columns = list(next(iter(means.values())))
    print("\n" + f"{'':10}" + "".join(f"{column:>19}" for column in columns))
    for name, row in means.items():
        cells = [f"{row[column]:19.4f}" if column in row else " " * 19 for column in columns]
        print(f"{name:10}" + "".join(cells))
    return means


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="name under data/, or a prepared folder")
@click.option("--model", default="sasrec", help="a model of train_backbone.py")
@click.option("--seeds", default=3, type=click.IntRange(1), help="runs of every row")
def main(dataset: str, model: str, seeds: int) -> None:
    """Going on from a run against training from scratch, on a log that has grown."""
    dataset = in_root(dataset=dataset)["dataset"]
    prepare(dataset)
    data = load_data(dataset)
    before = prepare_before(data)
    old = load_data(before)
    print(
        f"{data.name}: {len(old.items)} of {len(data.items)} interactions, {old.n_users} of "
        f"{data.n_users} users, {old.n_items} of {data.n_items} items were there before",
        flush=True,
    )
    rows, runs = {"scratch": [], "from": [], "before": []}, []
    for seed in range(seeds):
        flags, name = ["--model", model, "--seed", seed, *FEW], f"retrain-{model}"
        start = train(f"{name}-s{seed}", before, flags)
        on = ["--from", start, "--seed", seed, *FEW]
        folders = {
            "scratch": train(f"{name}-scratch-s{seed}", dataset, flags),
            "from": train(f"{name}-from-s{seed}", dataset, on),
            "before": train(f"{name}-before-s{seed}", dataset, [*on, "--epochs", 0]),
        }
        runs += folders.values()
        for row, folder in folders.items():
            rows[row].append(numbers_of(folder))
    out = runtime.ROOT / "runs" / data.folder_name / f"retrain-{model}"
    stage(None, "evaluate.py", "--ckpt", *runs, "--out", out, "--exploratory")
    means = print_rows(rows, data)
    print(json.dumps({"dataset": data.name, "model": model, "seeds": rows, "means": means}))


if __name__ == "__main__":
    main()
