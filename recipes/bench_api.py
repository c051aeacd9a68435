"""make bench-serve: what delrec.Recommender adds to its model, and what loading it takes.

    python recipes/bench_api.py ml-100k/sasrec                       one thread
    python recipes/bench_api.py ml-100k/sasrec --lm ml-100k/delrec   also an LM's run
    python recipes/bench_api.py beauty/sasrec --users 100000 --threads 2

The plain way is what one would write in torch with the run's model: numbers in, the ten best
numbers out, without those of the history. The API is given raw ids, or titles, and gives ids and
titles. All answer the same real histories in turns. Loading is timed behind `import torch`, in the
fastest of five new processes. The last line is one JSON object.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import Recommender
from delrec.backbone.models import load
from delrec.data.prepared import histories, raw_item_ids, subset
from delrec.runtime import ROOT, described, load_run, machine, stop
from recipes.bench_serve import in_turn, torch_answer

LOADS = 5  # processes
LOADING = """
import sys, time
sys.path.insert(0, {root!r})
import torch
began = time.time()
from delrec import Recommender
Recommender.load({run!r}, dataset={dataset!r})
print(time.time() - began)
"""
ALL_USERS = """
import sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads({threads})
from delrec import Recommender
from delrec.training.memory import peak_gb
rec = Recommender.load({run!r}, dataset={dataset!r})
users = list(rec.now.catalogue.user_of)
asked = [users[i % len(users)] for i in range({n})]
began = time.time()
answers = rec.recommend(users=asked, top=10)
seconds = time.time() - began
assert len(answers) == {n} and all(len(answer.items) == 10 for answer in answers)
print(seconds, peak_gb())
"""


def printed_by(code: str) -> list[float]:
    """The numbers of the last line that a new process prints."""
    command = [sys.executable, "-P", "-c", code]  # here, where the names mean what they do to us
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        stop(f"a process of this bench ended: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return [float(word) for word in done.stdout.strip().splitlines()[-1].split()]


def loading(run: str, dataset: str | None) -> float:
    """Seconds from `import torch` to a loaded recommender, in the fastest of five processes."""
    code = LOADING.format(root=str(ROOT), run=run, dataset=dataset)
    return min(printed_by(code)[0] for _ in tqdm(range(LOADS), desc=f"loading {run}", leave=False))


def asking(rec: Recommender, seconds: float) -> list[dict]:
    """A row a batch size: ms a request of the plain way, and what the API adds to it."""
    data, model = rec.now.catalogue.data, load(rec.run.folder)
    samples = np.asarray(data.test)[subset(len(data.test), 512, 0)]
    old_NT = histories(data, samples, model.history)
    raw = raw_item_ids(data)
    titles = [[data.titles[i] for i in old_T if i] for old_T in old_NT.tolist()]
    ids = [[raw[i] for i in old_T if i] for old_T in old_NT.tolist()]
    plain, rows = torch_answer(model), []
    for batch in (1, 64):
        calls = {
            "torch": lambda at, n=batch: plain(old_NT[at : at + n]),
            "ids": lambda at, n=batch: rec.recommend(ids=ids[at : at + n], top=10),
            "titles": lambda at, n=batch: rec.recommend(titles[at : at + n], top=10),
        }
        ms = in_turn(calls, list(range(0, len(titles), batch)), seconds)
        row = {"batch": batch} | {name: round(x[0] / batch, 4) for name, x in ms.items()}
        added = [f"{name} {row[name] - row['torch']:+.4f}" for name in ("ids", "titles")]
        print(f"{batch} at once: torch {row['torch']:.4f} ms a request; {', '.join(added)}")
        rows.append(row)
    return rows


@click.command(**described(__doc__))
@click.argument("run", default="ml-100k/sasrec")
@click.option("--dataset", help="the prepared data, where they are not where the run says")
@click.option("--lm", help="an LM's run, whose loading is timed too")
@click.option("--users", default=0, help="also answer so many users of the log, in a process")
@click.option("--threads", default=1, help="threads of torch")
@click.option("--seconds", default=6.0, help="of each row")
def main(
    run: str, dataset: str | None, lm: str | None, users: int, threads: int, seconds: float
) -> None:
    """What delrec.Recommender adds to its model, and what loading it takes."""
    torch.set_num_threads(threads)
    if load_run(run).stage != "train_backbone":
        stop(f"{run} is no backbone; give a backbone, and an LM's run by --lm")
    print(f"{machine()}, {threads} thread(s)")
    result = {"asking": asking(Recommender.load(run, dataset=dataset), seconds)}
    for name, each in (("backbone", run), ("lm", lm)):
        if each:
            result[f"load_{name}_seconds"] = round(loading(each, dataset), 2)
            print(f"loading {each}: {result[f'load_{name}_seconds']} s beyond import torch")
    if users:
        began = time.time()
        told = {"root": str(ROOT), "run": run, "dataset": dataset, "threads": threads, "n": users}
        took, gb = printed_by(ALL_USERS.format(**told))
        result["users"] = {"n": users, "seconds": round(took, 1), "peak_gb": round(gb, 2)}
        print(f"{users:,} users: {took:.1f} s, {gb:.2f} GB ({time.time() - began:.0f} s in all)")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
