"""A shop's short program with delrec and with RecTools, side by side: time, memory, quality.

    python recipes/bench_rectools.py --python PYTHON      PYTHON has rectools, from:
        python3 -m venv /tmp/rectools
        /tmp/rectools/bin/pip install torch "rectools[torch]"
    python recipes/bench_rectools.py --epochs 0 --epochs 10    also with ten epochs for both

A prepared data set is written as a shop's csv files. Each program trains a SASRec on them and
prints the ten best articles in stock for some customers. It runs as a process of its own, from its
first import to its last line; several runs take turns. What the customers took last is in no file:
behind its last line each program is asked for the ten best of all articles that a customer has not
had, and the quality is the share of customers whose last article is among them. The last line is
one JSON object.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.data.prepared import Data, load_data, raw_item_ids, raw_user_ids, subset, users
from delrec.evaluation.stats import interval
from delrec.runtime import ROOT, described, machine, stop

# ---------------------------------------------------------------- the two programs

OURS = """\
from delrec import Recommender
names = dict(user_column="customer", item_column="article", time_column="time")
rec = Recommender.fit("interactions.csv", "items.csv", title_column="name", **names{settings})
asked, in_stock = (open(file).read().split() for file in ("asked.txt", "stock.txt"))
for answer in rec.recommend(users=asked, only=in_stock):
    for item in answer.items:
        print(answer.user, item.id, item.title)
"""
THEIRS = """\
import pandas as pd
from rectools.dataset import Dataset
from rectools.models import SASRecModel
names = dict(customer="user_id", article="item_id", time="datetime")
dataset = Dataset.construct(pd.read_csv("interactions.csv").rename(columns=names).assign(weight=1))
model = SASRecModel({settings}).fit(dataset)
asked, in_stock = (open(file).read().split() for file in ("asked.txt", "stock.txt"))
best = model.recommend(asked, dataset, k=10, filter_viewed=True, items_to_recommend=in_stock)
best = best.merge(pd.read_csv("items.csv"), left_on="item_id", right_on="article")
print(best[["user_id", "item_id", "name"]].to_string(header=False, index=False))
"""
# behind a program's last line: what it has cost so far, and what it says of every customer
ENDING = """
import json, resource, time
ended = time.time()
own, child = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
# ru_maxrss of a process begins with the memory of the one that started it; VmHWM does not
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
everyone = open("everyone.txt").read().split()
{answers}
cost = dict(
    ended=ended,
    processor_seconds=own.ru_utime + own.ru_stime + child.ru_utime + child.ru_stime,
    peak_gb=(int(peak.split()[1]) + child.ru_maxrss) / 2**20,
)
json.dump(dict(cost=cost, best=best), open("measured.json", "w"))
"""
OUR_ANSWERS = "best = {answer.user: answer.ids for answer in rec.recommend(users=everyone)}"
THEIR_ANSWERS = """\
table = model.recommend(
    everyone, dataset, k=10, filter_viewed=True, on_unsupported_targets="ignore"
)
best = table.groupby("user_id")["item_id"].agg(list).to_dict()"""
INSTALLED = """
import json
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("rectools", "pytorch-lightning", "torch")}))
"""
WITHOUT = (
    "{python} has no rectools with torch, so only our half runs; get it with: python3 -m venv "
    '/tmp/rectools && /tmp/rectools/bin/pip install torch "rectools[torch]", and add --python '
    "/tmp/rectools/bin/python"
)


@dataclass(frozen=True)
class Program:
    """A program of a few lines that is measured."""

    name: str
    python: str
    text: str
    answers: str  # lines that set `best` to {customer: ten articles} for `everyone`

    @property
    def lines(self) -> int:
        """How many lines of code it has."""
        return sum(bool(line.strip()) for line in self.text.splitlines())


def programs(epochs: int, python: str | None) -> list[Program]:
    """Our program, and theirs where there is a python that has it. epochs: 0: as many as each does
    by itself.
    """
    said = f"--epochs {epochs}" if epochs else "as it comes"
    given = f"epochs={epochs}" if epochs else ""
    ours = OURS.format(settings=f", {given}" if given else "")
    made = [Program(f"delrec, {said}", sys.executable, ours, OUR_ANSWERS)]
    if python:
        theirs = THEIRS.format(settings=given)
        made.append(Program(f"RecTools, {said}", python, theirs, THEIR_ANSWERS))
    return made


# ---------------------------------------------------------------- the shop


@dataclass(frozen=True)
class Shop:
    """A shop's files, and what was held out of them."""

    folder: Path
    last: dict[str, str]  # {customer: the article that is to be found}
    stock: set[str]
    asked: list[str]  # customers whose ten best in stock are printed


def write_shop(folder: Path, data: Data, customers: int) -> Shop:
    """The shop whose csv files are written into a folder: interactions.csv in the order of time,
    items.csv, stock.txt (half of the articles), asked.txt (ten customers). Of `customers` drawn
    ones the last purchase is left out; everyone.txt names them.
    """
    if data.times is None:
        stop(f"{data.folder} has no times, and both programs read some; name data with times")
    article_I = [f"a{raw}" for raw in raw_item_ids(data)]
    customer_U = [f"c{raw}" for raw in raw_user_ids(data)]
    can_lose = np.flatnonzero(np.diff(data.ptr) > 1)
    held_U = can_lose[subset(len(can_lose), customers, 0)]
    place_of_last = np.asarray(data.ptr)[held_U + 1] - 1
    kept = np.setdiff1d(np.arange(len(data.items)), place_of_last)
    kept = kept[np.argsort(np.asarray(data.times)[kept], kind="stable")]
    rows = [
        (customer_U[user], article_I[data.items[place]], as_text(data.times[place]))
        for place, user in zip(kept, users(data, kept))
    ]
    sold = sorted({article for _, article, _ in rows})
    rng = np.random.default_rng(0)
    stock = {sold[i] for i in rng.permutation(len(sold))[: len(sold) // 2]}
    last = {customer_U[u]: article_I[data.items[p]] for u, p in zip(held_U, place_of_last)}
    shop = Shop(folder, last, stock, list(last)[:10])

    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "interactions.csv", ("customer", "article", "time"), rows)
    named = [(article_I[i], data.titles[i], data.meta["words"]["noun"]) for i in catalogue(data)]
    write_csv(folder / "items.csv", ("article", "name", "category"), named)
    for name, ids in (("stock", sorted(stock)), ("asked", shop.asked), ("everyone", last)):
        (folder / f"{name}.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return shop


def catalogue(data: Data) -> range:
    """The numbers of all items."""
    return range(1, data.n_items + 1)


def as_text(seconds: int) -> str:
    """A time as a shop writes it."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%S")


def write_csv(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Writes a table."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        table.writerows(rows)


def read_log(folder: Path) -> dict[str, list[str]]:
    """{customer: its articles} of a shop's interactions.csv."""
    taken = {}
    with open(folder / "interactions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            taken.setdefault(row["customer"], []).append(row["article"])
    return taken


# ---------------------------------------------------------------- quality


def hits(best: dict[str, list[str]], last: dict[str, str]) -> np.ndarray:
    """1 for each customer whose last article is among its ten best, else 0; of one without an
    answer 0: float64 (customers,).
    """
    return np.array([last[who] in best.get(who, [])[:10] for who in last], float)


def popular(taken: dict[str, list[str]], customers: list[str]) -> dict[str, list[str]]:
    """{customer: the ten articles that were taken most often, of those it has not had}."""
    count = Counter(article for articles in taken.values() for article in articles)
    ranked = [article for article, _ in count.most_common()]
    best = {}
    for who in customers:
        had = set(taken[who])
        best[who] = [article for article in ranked if article not in had][:10]
    return best


def chance(taken: dict[str, list[str]], customers: list[str]) -> float:
    """The share that ten articles drawn at random would find, of those a customer has not had."""
    n_articles = len({article for articles in taken.values() for article in articles})
    unseen = np.array([n_articles - len(set(taken[who])) for who in customers])
    return float(np.minimum(10 / np.maximum(unseen, 10), 1).mean())


# ---------------------------------------------------------------- measuring


@dataclass
class Measured:
    """What a program cost, from the start of its process to its last line."""

    seconds: float
    processor_seconds: float  # of all its processes
    peak_gb: float  # its own peak and that of the largest process it started
    hit_n: np.ndarray  # per customer: was the last article found?


def measured(program: Program, shop: Shop, folder: Path, threads: int) -> Measured:
    """What a program costs, run as a new process in a new folder that holds the shop's files."""
    folder.mkdir()
    for path in shop.folder.iterdir():
        (folder / path.name).symlink_to(path)
    ending = ENDING.format(answers=program.answers)
    (folder / "program.py").write_text(program.text + ending, encoding="utf-8")
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "POLARS_MAX_THREADS": str(threads)}
    env["PYTHONPATH"] = str(ROOT) if program.python == sys.executable else ""
    command = [program.python, "program.py"]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    if done.returncode:
        last_words = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        stop(f"the program of {program.name} ended: {last_words}")
    found = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    stop_unless_printed(done.stdout, program, shop)
    cost = found["cost"]
    seconds = cost.pop("ended") - began
    return Measured(seconds, **cost, hit_n=hits(found["best"], shop.last))


def stop_unless_printed(text: str, program: Program, shop: Shop) -> None:
    """Stops unless a program printed ten articles in stock for each customer that was asked for."""
    printed = [line.split()[:2] for line in text.splitlines() if line.split()]
    count = Counter(who for who, *article in printed if set(article) <= shop.stock)
    if any(count[who] != 10 for who in shop.asked):
        stop(f"the program of {program.name} did not print ten articles in stock a customer")


def installed(python: str) -> dict[str, str] | None:
    """The versions of rectools and of what its SASRec needs; None where a python lacks them."""
    try:
        done = subprocess.run([python, "-c", INSTALLED], capture_output=True, text=True)
    except OSError as bad:
        stop(f"--python {python} cannot be run ({bad.strerror}); name a python that has rectools")
    return json.loads(done.stdout) if done.returncode == 0 else None


def row_of(program: Program, runs: list[Measured], shop: Shop) -> dict:
    """A row of the table: medians over the runs, and the share of customers, with its interval."""
    hit_n = np.mean([run.hit_n for run in runs], axis=0)
    middle = {
        name: round(float(np.median([getattr(run, name) for run in runs])), 2)
        for name in ("seconds", "processor_seconds", "peak_gb")
    }
    shown = {"program": program.name, "lines": program.lines} | middle
    low, high = interval(hit_n, np.arange(len(shop.last)))
    found = {"found": hit_n.mean(), "low": low, "high": high}
    return shown | {name: round(float(x), 5) for name, x in found.items()}


def differences(runs: dict[Program, list[Measured]]) -> list[dict]:
    """Ours minus theirs, of each pair of programs, with its interval over customers."""
    made, found = list(runs), []
    for ours, theirs in zip(made[::2], made[1::2]):
        more_n = np.mean([run.hit_n for run in runs[ours]], axis=0)
        more_n -= np.mean([run.hit_n for run in runs[theirs]], axis=0)
        ends = (more_n.mean(), *interval(more_n, np.arange(len(more_n))))
        mean, low, high = (round(float(x), 5) for x in ends)
        found.append({"programs": [ours.name, theirs.name], "mean": mean, "low": low, "high": high})
        print(f"{ours.name} - {theirs.name}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return found


def print_rows(rows: list[dict], floors: dict[str, float]) -> None:
    """Prints the table."""
    print(f"{'':26}{'lines':>6}{'seconds':>9}{'processor':>11}{'peak GB':>9}{'found':>8}")
    for row in rows:
        print(
            f"{row['program']:26}{row['lines']:6}{row['seconds']:9.1f}"
            f"{row['processor_seconds']:11.1f}{row['peak_gb']:9.2f}{row['found']:8.3f} "
            f"[{row['low']:.3f}, {row['high']:.3f}]"
        )
    for name, share in floors.items():
        print(f"{name:26}{share:43.3f}")


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="a prepared data set with times")
@click.option("--python", default=sys.executable, help="the python that has rectools")
@click.option(
    "--epochs",
    multiple=True,
    default=[0],
    type=click.IntRange(0),
    help="that both train; 0: as many as each does by itself; may be given several times",
)
@click.option(
    "--customers",
    default=1000,
    type=click.IntRange(1),
    help="whose last article is held out, at most",
)
@click.option("--repeats", default=1, type=click.IntRange(1), help="runs of each, in turns")
@click.option("--threads", default=1, type=click.IntRange(1), help="of each program")
def main(
    dataset: str, python: str, epochs: tuple[int, ...], customers: int, repeats: int, threads: int
) -> None:
    """A shop's short program with delrec and with RecTools, side by side."""
    data, theirs = load_data(dataset), installed(python)
    if theirs is None:
        click.echo(WITHOUT.format(python=python))
    asked_for = [p for n in epochs for p in programs(n, python if theirs else None)]
    print(f"{machine()}, {threads} thread(s); {theirs or 'no RecTools'}", flush=True)
    with tempfile.TemporaryDirectory() as room:
        shop = write_shop(Path(room) / "shop", data, customers)
        taken, runs = read_log(shop.folder), {program: [] for program in asked_for}
        for repeat in range(repeats):
            for n, program in enumerate(asked_for):
                run = measured(program, shop, Path(room) / f"{repeat}-{n}", threads)
                runs[program].append(run)
                print(f"{program.name}: {run.seconds:.1f} s, {run.hit_n.mean():.3f}", flush=True)
        by_popularity = hits(popular(taken, list(shop.last)), shop.last).mean()
        by_chance = chance(taken, list(shop.last))
        floors = {"popularity": round(float(by_popularity), 4), "chance": round(by_chance, 4)}
    rows = [row_of(program, some, shop) for program, some in runs.items()]
    print_rows(rows, floors)
    rest = {"floors": floors, "differences": differences(runs) if theirs else []}
    about = {"customers": len(shop.last), "repeats": repeats, "rectools": theirs}
    print(json.dumps(about | {"rows": rows} | rest))


if __name__ == "__main__":
    main()
