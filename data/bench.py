"""How long preparing and training take at the size of Amazon Home & Kitchen 2018.

    python data/bench.py                     make bench-data; about half an hour on 2 cores, 24 GB,
                                             8 GB of disk
    python data/bench.py --quick             a tenth and a hundredth of the size only
    python data/bench.py --recbole PYTHON    and against RecBole: a python that has recbole 1.2.1,
        from: python3 -m venv /tmp/rb
              /tmp/rb/bin/pip install recbole==1.2.1 "numpy<2" "pandas<2.2"

Preparing runs as a process of its own: seconds are wall time from the files on disk to the prepared
folder, memory is that process's peak. The log is synthetic (data/synthetic.py). An epoch against
RecBole's: the same samples (every training target of ml-100k once), the same width and window
(RecBole's default of 50 items, Caser 5), about 2,048 targets a step (RecBole's default), both with
cross-entropy over all items, on the same machine, one after the other. Last line: one JSON object.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
from delrec.data.prepared import load_data  # noqa: E402
from delrec.kernels.bench import report  # noqa: E402

# run by the python that has RecBole: one epoch of each model over given samples; prints seconds an
# epoch and, if asked, scores of test samples
RECBOLE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import numpy as np, torch
torch.set_num_threads(int(sys.argv[3]))
from recbole.config import Config
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender import SASRec, GRU4Rec, Caser
from recbole.utils import init_seed
work = np.load(sys.argv[1])
name, L, n_items, epochs = sys.argv[2], int(work["L"]), int(work["n_items"]), int(work["epochs"])
E, dropout = int(work["width"]), float(work["dropout"])
settings = {"seed": 0, "loss_type": "CE", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": L, "data_path": sys.argv[4], "hidden_size": E, "inner_size": E,
            "n_layers": 2, "n_heads": 1, "hidden_dropout_prob": dropout, "attn_dropout_prob": dropout, "embedding_size": E, "dropout_prob": dropout,
            "num_layers": 1, "n_v": 4, "n_h": 16, "reg_weight": 0.0, "use_gpu": False, "show_progress": False,
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "state": "ERROR"}
argv, sys.argv = sys.argv, sys.argv[:1]
config = Config(model={"sasrec": "SASRec", "gru4rec": "GRU4Rec", "caser": "Caser"}[name], dataset="ours", config_dict=settings)
init_seed(0, True)
dataset = SequentialDataset(config)
model = {"sasrec": SASRec, "gru4rec": GRU4Rec, "caser": Caser}[name](config, dataset)
seq, length, user, target = (torch.from_numpy(work[k]) for k in ("seq", "length", "user", "target"))
opt = torch.optim.Adam(model.parameters(), lr=float(work["lr"]))
batch, best, kept, seconds = int(work["batch"]), -1, None, []
def scores(part):
    model.eval()
    with torch.no_grad():
        out = [model.full_sort_predict(Interaction({"item_id_list": s, "item_length": l, "user_id": u})).view(len(s), -1)[:, :n_items + 1]
               for s, l, u in zip(*(torch.from_numpy(work[f"{part}_{k}"]).split(256) for k in ("seq", "length", "user")))]
    return torch.cat(out)
for epoch in range(epochs):
    model.train()
    began = time.time()
    for at in torch.randperm(len(seq)).split(batch):
        opt.zero_grad()
        loss = model.calculate_loss(Interaction({"item_id_list": seq[at], "item_length": length[at], "user_id": user[at], "item_id": target[at]}))
        loss.backward()
        opt.step()
    seconds.append(time.time() - began)
    if epochs > 1:
        s = scores("val")
        rank = (s > s.gather(1, torch.from_numpy(work["val_target"])[:, None])).sum(1)
        quality = (1 / torch.log2(rank.float() + 2))[rank < 10].sum().item() / len(rank)
        print(f"epoch {epoch + 1}: {seconds[-1]:.1f} s, val NDCG@10 {quality:.4f}", file=sys.stderr, flush=True)
        if quality > best:
            best, kept, since = quality, {k: v.clone() for k, v in model.state_dict().items()}, 0
        else:
            since += 1
        if since >= int(work["patience"]):
            break
if kept:
    model.load_state_dict(kept)
    np.save(argv[5], scores("test").numpy())
print(json.dumps({"seconds": float(np.median(seconds))}))
"""


def measured(*args):
    """(seconds, peak GB, output) of a process."""
    began = time.time()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            text=True,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if process.returncode:
        sys.exit(f"bench: {' '.join(map(str, args))} failed:\n{text[-2000:]}")
    return time.time() - began, usage.ru_maxrss / 2**20, text


def home_kitchen(rows, room, divide):
    name, raw, out = (
        "home-kitchen" + (f"-{divide}" if divide > 1 else ""),
        room / f"raw-{divide}",
        room / f"prepared-{divide}",
    )
    measured("data/synthetic.py", raw, "--divide", divide)
    seconds, gb, said = measured(
        "data/prepare.py", "home-kitchen", "--raw", raw, "--out", out, "--max-eval", 20000
    )
    print(said, flush=True)
    shutil.rmtree(raw)
    began = time.time()
    data = load_data(str(out))
    rows.append((f"prepare.{name}.seconds", seconds, "s", 120 if divide == 1 else None))
    rows.append((f"prepare.{name}.peak_gb", gb, "GB", 6 if divide == 1 else None))
    rows.append((f"prepare.{name}.open_seconds", time.time() - began, "s", None))
    measured("data/prepare.py", "home-kitchen", "--out", out, "--check")
    if divide == 1:
        seconds, gb, said = measured(
            "train_backbone.py",
            "--dataset",
            out,
            "--out",
            room / "run",
            "--overwrite",
            "--loss",
            "sampled",
            "--epochs",
            1,
            "--lists",
            20000,
        )
        print(said, flush=True)
        last = json.loads(said.strip().split("\n")[-1])
        rows.append(
            ("train.sasrec.home-kitchen.s_per_million", 1e6 / last["samples_per_second"], "s", None)
        )
        rows.append(("train.sasrec.home-kitchen.peak_gb", gb, "GB", 24))
        rows.append(("train.sasrec.home-kitchen.samples", len(data.train), "samples", None))


# windows of a step, so that it has about 2,048 targets; and the window
STEP = {"sasrec": (128, 50), "gru4rec": (128, 50), "caser": (2048, 5)}


def against_recbole(rows, room, python, threads, models, epochs):
    """An epoch over the same samples; with epochs > 1 our defaults instead, the best of both by
    validation, test scores through our metrics.
    """
    import numpy as np
    import torch

    import train_backbone as T
    from delrec.data.prepared import candidates, histories, users
    from delrec.metrics import compare, metrics

    torch.set_num_threads(threads)
    data = load_data("ml-100k")
    samples = {s: np.asarray(getattr(data, s)) for s in ("train", "val", "test")}
    recbole = room / "recbole" / "ours"
    recbole.mkdir(parents=True)
    user = users(data, np.arange(len(data.items)))
    # only tells RecBole how many there are
    (recbole / "ours.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n"
        + "".join(
            f"{u}\t{i}\t{t}\n"
            for t, (u, i) in enumerate(
                zip([*user, *[0] * data.n_items], [*data.items, *range(1, data.n_items + 1)])
            )
        )
    )
    for model in models:
        if python is None:
            rows.append((f"epoch.{model}.ml-100k.vs_recbole", None, "x", 20))
            continue
        cfg, lr = T.SimpleNamespace(**T.DEFAULTS[model]), 1e-3
        if epochs == 1:
            cfg.history = STEP[model][1]
        parts = {}
        for s, index in samples.items():
            left = histories(data, index, cfg.history)  # RecBole pads on the right
            length = (left > 0).sum(1)
            at = (np.arange(cfg.history) + (cfg.history - length)[:, None]) % cfg.history
            prefix = "" if s == "train" else f"{s}_"
            parts |= {
                f"{prefix}seq": np.take_along_axis(left, at, 1),
                f"{prefix}length": length,
                f"{prefix}user": users(data, index) + 1,
                f"{prefix}target": data.items[index].astype(np.int64),
            }
        np.savez(
            room / "work.npz",
            **parts,
            L=cfg.history,
            width=cfg.width,
            dropout=cfg.dropout,
            lr=lr,
            batch=2048,
            n_items=data.n_items,
            epochs=epochs,
            patience=cfg.patience,
        )
        (room / "run_recbole.py").write_text(RECBOLE)
        said = subprocess.run(
            [
                python,
                str(room / "run_recbole.py"),
                str(room / "work.npz"),
                model,
                str(threads),
                str(room / "recbole"),
                str(room / "scores.npy"),
            ],
            capture_output=True,
            text=True,
            cwd=room,
        )
        if said.returncode:
            sys.exit(f"bench: RecBole failed:\n{said.stdout[-1000:]}{said.stderr[-3000:]}")
        print(said.stderr[-1500:], flush=True)
        theirs = json.loads(said.stdout.strip().split("\n")[-1])["seconds"]
        _, _, out = measured(
            "train_backbone.py",
            "--dataset",
            "ml-100k",
            "--model",
            model,
            "--out",
            room / f"run-{model}",
            "--overwrite",
            *(
                ["--epochs", 3, "--batch", STEP[model][0], "--history", cfg.history]
                if epochs == 1
                else []
            ),
        )
        ours = len(data.train) / json.loads(out.strip().split("\n")[-1])["samples_per_second"]
        if epochs == 1:
            rows.append((f"epoch.{model}.ml-100k.vs_recbole", theirs / ours, "x", 20))
            rows.append((f"epoch.{model}.ml-100k.seconds", ours, "s", None))
            rows.append((f"epoch.{model}.ml-100k.recbole_seconds", theirs, "s", None))
        else:
            scores, target = (
                np.load(room / "scores.npy"),
                data.items[samples["test"]].astype(np.int64),
            )
            own = np.take_along_axis(scores, target[:, None], 1)
            scores[:, 0] = -np.inf
            before = histories(data, samples["test"], int(np.diff(data.ptr).max()))
            np.put_along_axis(scores, before, -np.inf, 1)
            np.put_along_axis(scores, target[:, None], own, 1)
            full = metrics((scores > own).sum(1), (scores == own).sum(1) - 1)
            cand = candidates(data, "test", 15)
            near = metrics(
                *compare(
                    np.take_along_axis(np.where(np.isfinite(scores), scores, -1e9), cand, 1),
                    cand == target[:, None],
                )
            )
            mine = metrics(*np.load(room / f"run-{model}" / "full_test.npy").T)
            mine15 = metrics(
                *compare(
                    np.load(room / f"run-{model}" / "scores_test_15.npy"), cand == target[:, None]
                )
            )
            rng, owner = np.random.default_rng(0), users(data, samples["test"])
            for name, a, b in (
                ("full.ndcg@10", mine["ndcg@10"], full["ndcg@10"]),
                ("full.hr@10", mine["hr@10"], full["hr@10"]),
                ("candidates15.hr@1", mine15["hr@1"], near["hr@1"]),
            ):
                sums = np.bincount(owner, a - b), np.bincount(owner)
                held = np.flatnonzero(sums[1])
                draws = [
                    sums[0][d].sum() / sums[1][d].sum()
                    for d in (rng.choice(held, len(held)) for _ in range(2000))
                ]
                low, high = np.quantile(draws, (0.025, 0.975))
                print(
                    f"{model} {name}: ours {a.mean():.4f}, RecBole's {b.mean():.4f}, difference "
                    f"{(a - b).mean():+.4f} [{low:+.4f}, {high:+.4f}] (95 %, over users)",
                    flush=True,
                )
                rows.append((f"quality.{model}.ml-100k.{name}.ours", float(a.mean()), "", None))
                rows.append((f"quality.{model}.ml-100k.{name}.recbole", float(b.mean()), "", None))


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="a tenth and a hundredth of the size only")
@click.option("--only", type=click.Choice(["size", "recbole"]), help="one of the two parts")
@click.option(
    "--recbole",
    "python",
    default=None,
    type=str,
    help="a python that has recbole 1.2.1; without it those rows are null",
)
@click.option(
    "--epochs",
    default=1,
    type=click.IntRange(1),
    help="epochs of RecBole's models; above 1 also compares quality, with the same patience as "
    "ours",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    default=["sasrec", "gru4rec", "caser"],
    type=click.Choice(["sasrec", "gru4rec", "caser"]),
    help="which to compare",
)
@click.option("--threads", default=2, type=click.IntRange(1), help="threads on the CPU")
@click.option(
    "--room",
    default=None,
    type=click.Path(path_type=Path),
    help="folder for the files written meanwhile  [default: a temporary one]",
)
def main(quick, only, python, epochs, models, threads, room):
    """Preparing and training at the size of Home & Kitchen, and our backbones against RecBole's on
    ml-100k.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=room) as room:
        room = Path(room)
        if only != "recbole":
            for divide in (100, 10) if quick else (100, 10, 1):
                home_kitchen(rows, room, divide)
        if only != "size":
            against_recbole(rows, room, python, threads, models, epochs)
    report(rows, threads)


if __name__ == "__main__":
    main()
