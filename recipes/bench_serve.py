"""make bench-serve: what a request to a backbone costs, by torch and as an ONNX file, on one core.

    python recipes/bench_serve.py                          every backbone on ml-100k
    python recipes/bench_serve.py --items 1300000          and a catalogue of so many items
    python recipes/bench_serve.py --items 0                without it

The models are not trained: that does not change what a request costs. Histories are real ones of
the test part. torch and the file take turns, twenty requests each, alone and 64 at once. A large
catalogue is compared with what reading its item vectors once costs (their sum, by torch), also in
turns. The last line is one JSON object.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.backbone.models import build, score
from delrec.data.prepared import Data, histories, load_data, subset
from delrec.names import NAMES
from delrec.runtime import described, machine
from delrec.serving.onnx_file import file_of, serialised, session_of, stop_unless_installed
from train_backbone import DEFAULTS

TOP = np.array([10])
SHOWN = ("median", "fastest tenth")
TURN = 20  # requests one after another: a server that is busy with one thing


def in_turn(
    calls: dict[str, Callable], given: list, seconds: float, least: int = TURN
) -> dict[str, tuple[float, float]]:
    """{name: (median, fastest tenth)} of the ms of some calls, which take turns on the same
    input: a call on each of TURN inputs, at least `least` of them."""
    for call in calls.values():
        call(given[0])
    spent, began, at = {name: [] for name in calls}, time.time(), 0
    while at < least or time.time() - began < seconds:
        some = [given[i % len(given)] for i in range(at, at + min(TURN, least))]
        for name, call in calls.items():
            for one in some:
                start = time.perf_counter()
                call(one)
                spent[name].append(1000 * (time.perf_counter() - start))
        at += len(some)
    return {name: tuple(np.percentile(ms, [50, 10])) for name, ms in spent.items()}


def untrained(name: str, n_items: int) -> torch.nn.Module:
    """A model of the default size, ready to answer."""
    torch.manual_seed(0)
    model = build(name, n_items, SimpleNamespace(**DEFAULTS[name])).eval()
    torch.nn.init.normal_(model.bias)
    return model


def torch_answer(model: torch.nn.Module) -> Callable:
    """f(histories) -> the best items, by torch; those of the history left out."""

    @torch.no_grad()
    def answer(old_BT):
        score_BI = score(model, old_BT)
        score_BI.scatter_(1, torch.from_numpy(old_BT), -torch.inf)
        return score_BI.topk(10)

    return answer


def file_answer(session) -> Callable:
    """f(histories) -> the best items, by the file."""

    def answer(old_BT):
        return session.run(None, {"history": old_BT, "left_out": old_BT, "k": TOP})

    return answer


def rows_of_models(data: Data, seconds: float) -> list[dict]:
    """A row a backbone and batch size."""
    samples = np.asarray(data.test)[subset(len(data.test), 512, 0)]
    rows = []
    for name in DEFAULTS:
        model = untrained(name, data.n_items)
        run = SimpleNamespace(model=name, history=model.history)
        session = session_of(serialised(file_of(model, run, data)))
        old_BT = histories(data, samples, 50)
        calls = {"torch": torch_answer(model), "onnx": file_answer(session)}
        for batch in (1, 64):
            given = [old_BT[i : i + batch] for i in range(0, len(old_BT), batch)]
            ms = in_turn(calls, given, seconds)
            rows.append({"model": name, "batch": batch} | per_request(ms, batch))
            print_row(f"{NAMES[name]}, {batch} at once", rows[-1])
    return rows


def per_request(ms: dict[str, tuple[float, float]], batch: int) -> dict:
    """ms a request, with four digits."""
    return {name: [round(float(x) / batch, 4) for x in pair] for name, pair in ms.items()}


def print_row(what: str, row: dict) -> None:
    """Prints ms a request of both ways."""
    said = [f"{name} {row[name][0]:8.4f} ({row[name][1]:.4f})" for name in ("torch", "onnx")]
    print(f"{what:24}" + "   ".join(said) + f"   {row['torch'][0] / row['onnx'][0]:.1f} times")


def large_catalogue(data: Data, n_items: int, seconds: float) -> dict:
    """A SASRec with so many items: ms to read its item vectors once, and ms a request."""
    model = untrained("sasrec", n_items)
    run = SimpleNamespace(model="sasrec", history=model.history)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(serialised(file_of(model, run, data)))
        start = time.time()
        session = session_of(str(path))
        loaded = time.time() - start
    rng = np.random.default_rng(0)
    given = [rng.integers(1, n_items + 1, (1, 50)) for _ in range(20)]
    item_IE, answer = model.item.weight.detach(), file_answer(session)
    with torch.no_grad():
        ms = in_turn({"read": lambda _: item_IE.sum(), "onnx": answer}, given, seconds, 5)
    row = {"items": n_items, "bytes": item_IE.nbytes, "load_seconds": round(loaded, 1)}
    row |= per_request(ms, 1)
    row["times_reading"] = [round(a / b, 2) for a, b in zip(row["onnx"], row["read"])]
    print(
        f"{n_items:,} items ({item_IE.nbytes / 1e9:.2f} GB): reading them {row['read'][0]:.1f} "
        f"({row['read'][1]:.1f}), a request {row['onnx'][0]:.1f} ({row['onnx'][1]:.1f}): "
        f"{row['times_reading'][0]:.2f} times ({row['times_reading'][1]:.2f}); loaded in "
        f"{loaded:.1f} s"
    )
    return row


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="whose histories are asked")
@click.option("--items", default=1_300_000, help="items of the large catalogue; 0: without")
@click.option("--seconds", default=6.0, help="of each row")
def main(dataset: str, items: int, seconds: float) -> None:
    """What a request to a backbone costs, by torch and as an ONNX file, on one core."""
    stop_unless_installed()
    data = load_data(dataset)
    torch.set_num_threads(1)
    print(f"{machine()}, one thread; ms a request: median (fastest tenth)")
    rows = rows_of_models(data, seconds)
    large = large_catalogue(data, items, seconds) if items else None
    print(json.dumps({"shown": SHOWN, "rows": rows, "large": large}))


if __name__ == "__main__":
    main()
