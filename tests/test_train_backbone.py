"""Stage 0: a planted rule each model must find, no look at later items, and two processes that
equal one.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from commands import log_of, metrics_of
from cycle import N_ITEMS, QUICK
from safetensors.torch import load_file

import train_backbone
from delrec.backbone import batches
from delrec.backbone.models import MODELS
from delrec.data.prepared import (
    batch_of,
    candidates,
    halves_of_validation,
    load_data,
    runs_of_targets,
    users,
)
from delrec.metrics import metrics
from delrec.runtime import ROOT, load_run

WIDE = "--width 32 --batch 32"


# ---------------------------------------------------------------- it learns


# by which settings a model finds the planted rule, and how often at least
PLANTED = {
    "sasrec": (0.9, "--lr 5e-3 --epochs 12 --dropout 0.1"),
    "gru4rec": (0.9, "--lr 0.1 --epochs 20 --dropout 0"),
    "caser": (0.8, "--lr 5e-3 --epochs 6 --dropout 0.1"),
    "bsarec": (0.9, "--history 5 --lr 5e-3 --epochs 3 --dropout 0.1"),
    "bert4rec": (0.7, "--history 4 --lr 5e-3 --epochs 10 --dropout 0.1"),
    "lrurec": (0.9, "--history 20 --lr 5e-3 --epochs 8 --dropout 0.1"),
    "esasrec": (0.9, "--history 20 --lr 5e-3 --epochs 8 --dropout 0.1"),
}


@pytest.mark.parametrize("model", MODELS)
def test_each_model_finds_the_planted_rule(model, train_on_cycle, tmp_path):
    assert model in PLANTED, "add its line there"
    least, options = PLANTED[model]
    got = train_on_cycle(tmp_path / model, f"--model {model} {WIDE} --patience 9 {options}").json
    assert got["test_hr@1"] > least, got


def test_a_small_log_has_steps_enough(cycle):
    asked = dict(model="gru4rec", history=20, batch=50, epochs=40, patience=5, loss="ce", seed=0)
    asked["one_target"] = False
    cfg = SimpleNamespace(**asked)
    a_epoch = batches.steps_of_epoch(cfg, cycle)
    assert 40 * a_epoch < 1000 and a_epoch == len(batches.Targets(cfg, cycle).epoch(0))
    batches.lengthen(cfg, {"epochs": None, "patience": None}, cycle)
    assert 1000 <= cfg.epochs * a_epoch < 1000 + a_epoch
    assert 150 <= cfg.patience * a_epoch < 150 + a_epoch
    typed = SimpleNamespace(**asked)
    batches.lengthen(typed, {"epochs": 40, "patience": 5}, cycle)
    assert vars(typed) == asked
    long = SimpleNamespace(**asked | dict(batch=1))
    batches.lengthen(long, {"epochs": None, "patience": None}, cycle)
    assert (long.epochs, long.patience) == (40, 5)


def test_bce_learns_too(train_on_cycle, tmp_path):
    train_on_cycle(tmp_path / "bce", f"--loss bce {WIDE} --lr 5e-3 --epochs 6 --dropout 0.1")
    lines = log_of(tmp_path / "bce")
    assert lines[-1]["loss"] < lines[1]["loss"], lines
    assert lines[-1]["val_ndcg@10"] > 2 * lines[0]["val_ndcg@10"], lines


@pytest.mark.parametrize("loss", ["sampled", "gbce"])
def test_drawn_items_teach_too(loss, train_on_cycle, tmp_path):
    options = f"--loss {loss} --negatives 40 --lr 5e-3 --epochs 12 --patience 9 --dropout 0.1"
    got = train_on_cycle(tmp_path / loss, f"{WIDE} {options}").json
    assert got["test_hr@1"] > 0.9, got


# ---------------------------------------------------------------- the batches


def test_one_target_gives_each_training_target_a_window_of_its_own(cycle):
    cfg = SimpleNamespace(model="sasrec", history=8, batch=32, loss="ce", seed=0, one_target=True)
    targets, asked = batches.Targets(cfg, cycle), []
    for step, (first, last) in enumerate(targets.epoch(0)):
        batch = targets.batch(first, last, 0, step)
        assert (batch.target_BL[:, :-1] == 0).all() and (batch.target_BL[:, -1] > 0).all()
        asked += batch.last_B.tolist()
    assert sorted(asked) == sorted(np.asarray(cycle.train).tolist())


@pytest.mark.parametrize("span, L", [(8, 8), (1, 5), (3, 8)])
def test_every_training_target_once_and_nothing_later(cycle, span, L):
    is_target = np.zeros(len(cycle.items), bool)
    is_target[cycle.train] = True
    allowed = is_target.copy()
    allowed[cycle.ptr[:-1]] = True  # a first item is input only
    for epoch in range(3):
        first, last = runs_of_targets(cycle, span, np.random.default_rng(epoch))
        seq, target = batch_of(cycle, first, last, L, is_target)
        at = last[:, None] - np.arange(L - 1, -1, -1)
        assert sorted(at[target > 0]) == sorted(cycle.train)
        assert (target[target > 0] == cycle.items[at[target > 0]]).all()
        assert allowed[at[seq > 0] - 1].all()
        assert (seq[seq > 0] == cycle.items[at[seq > 0] - 1]).all()
        assert (seq[target > 0] > 0).all()  # and each has a history


def test_negatives_are_not_the_users_own(cycle):
    have = np.union1d(cycle.train, cycle.ptr[:-1])  # a first item is had, but no target
    had = np.unique(users(cycle, have) * (N_ITEMS + 1) + cycle.items[have])
    first, last = runs_of_targets(cycle, 8, np.random.default_rng(0))
    rng, asked = np.random.default_rng(0), np.ones((len(first), 8))
    cfg = SimpleNamespace(model="sasrec", history=8, batch=32, seed=0, one_target=False)
    targets = batches.Targets(cfg, cycle)
    drawn = batches.negatives(cycle, first, asked, targets.seen, rng)
    assert not np.isin(users(cycle, first)[:, None] * (N_ITEMS + 1) + drawn, had).any()
    # from the first item to the last; those that all positions share, too
    cfg.loss, cfg.negatives = "sampled", 2000
    shared = targets.batch(first, last, 0, 0).negative
    for items in (drawn, shared):
        assert (items.min(), items.max()) == (1, N_ITEMS)


# ---------------------------------------------------------------- what a run promises


def with_other_later_items(data, folder):
    """A copy of the data in which every val and test item is another one."""
    shutil.copytree(data.folder, folder)
    items, next_item = np.array(data.items), np.r_[0, np.arange(2, N_ITEMS + 1), 1]
    later = np.r_[data.val, data.test]
    items[later] = next_item[items[later]]
    np.save(folder / "items.npy", items)
    for s in ("val", "test"):
        for C in data.meta["candidates"]:
            others = next_item[candidates(data, s, C)].astype(np.int32)
            np.save(folder / f"candidates_{s}_{C}.npy", others)
    return load_data(str(folder))


def test_the_epoch_is_chosen_on_the_first_half_of_validation(cycle, run, tmp_path):
    out = tmp_path / "run"
    run(train_backbone.main, f"--dataset {cycle.folder} --out {out} {QUICK}")
    first, second = halves_of_validation(cycle)
    full = np.load(out / "full_val.npy")
    gain = [metrics(*full[half].T)["ndcg@10"].mean() for half in (first, second)]
    best = max(line["val_ndcg@10"] for line in log_of(out))
    assert best == pytest.approx(gain[0], abs=2e-5)
    assert best != pytest.approx(gain[1], abs=2e-5)


def test_later_items_do_not_touch_training(cycle, run, tmp_path):
    # the losses of all epochs, and so the weights, stay bit for bit
    logs = []
    for data in (cycle, with_other_later_items(cycle, tmp_path / "other")):
        where = f"--dataset {data.folder} --out {tmp_path}/run"
        run(train_backbone.main, f"{where} {QUICK} --overwrite")
        logs.append(log_of(tmp_path / "run"))
    assert [line.get("loss") for line in logs[0]] == [line.get("loss") for line in logs[1]]
    assert logs[0][-1]["val_ndcg@10"] != logs[1][-1]["val_ndcg@10"]


WITHOUT_LM = """
import sys
import evaluate, train_backbone
data, run, *flags = sys.argv[1:]
train_backbone.main(["--dataset", data, "--out", run, *flags], standalone_mode=False)
evaluate.main(["--ckpt", run, "--history", "Film 3"], standalone_mode=False)
print(sorted({"transformers", "peft"} & set(sys.modules)))
"""


def test_what_needs_no_lm_imports_none(cycle, tmp_path):
    flags = [str(cycle.folder), str(tmp_path / "run"), *QUICK.split(), "--text", "tfidf"]
    args = [sys.executable, "-c", WITHOUT_LM, *flags]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_same_seed_same_bits_other_seed_other_bits(train_on_cycle, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_on_cycle(tmp_path / name, f"{QUICK} --seed {seed}")
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b
    assert a != c
    lists = [np.load(tmp_path / name / "topk_test.npy") for name in "ab"]
    assert (lists[0] == lists[1]).all()


TERMS = "--loss bce --dros 0.5 --contrast 0.5"


def test_two_processes_equal_one(cycle, train_on_cycle, on_cpu, two_processes, tmp_path):
    asked = {"plain": "", "terms": TERMS}
    jobs = []
    for name, more in asked.items():
        options = f"{QUICK} --dropout 0 {more}"
        train_on_cycle(tmp_path / name, options)
        args = f"--dataset {cycle.folder} --out {tmp_path / name}-two {options}"
        jobs.append(("train_backbone", args.split()))
    said = two_processes(jobs)
    assert json.loads(said.strip().split("\n")[-1])["stage"] == "train_backbone"
    for name in asked:
        must_be_alike(tmp_path / name, tmp_path / f"{name}-two", cycle)


def test_padding_learns_nothing_of_changed_histories(cycle, train_on_cycle, tmp_path):
    # BSARec hears its padding
    train_on_cycle(tmp_path / "run", f"--model bsarec {QUICK} --history 6 --contrast 1 --width 16")
    weight_IE = load_file(tmp_path / "run" / "model.safetensors")["item.weight"]
    assert not weight_IE[0].any() and weight_IE[1:].any(1).all()


def must_be_alike(one, two, cycle):
    """Two processes' run has one's scores and metrics."""
    assert load_run(str(two), cycle).world == 2
    for s in ("val", "test"):
        scores = [np.load(folder / f"scores_{s}_15.npy") for folder in (two, one)]
        np.testing.assert_allclose(*scores, atol=1e-4)
        want, found = metrics_of(one)[s], metrics_of(two)[s]
        for space in want:
            for m, value in want[space].items():
                near = pytest.approx(value, abs=0.003, rel=0.003)
                assert found[space][m] == near, (s, space, m)


def agents_of(n, *command) -> list:
    """n agents of torchrun with a process each: what n machines run, on one over loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    meet = f"--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{port} --rdzv-id=together"
    shape = f"--nnodes={n} --nproc_per_node=1"
    return [
        subprocess.Popen(
            [*torchrun, *shape.split(), *meet.split(), *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        for _ in range(n)
    ]


@pytest.mark.long
def test_two_agents_train_as_one_process(cycle, train_on_cycle, on_cpu, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train_on_cycle(one, f"{QUICK} --dropout 0")
    args = f"--dataset {cycle.folder} --out {two} {QUICK} --dropout 0"
    agents = agents_of(2, ROOT / "train_backbone.py", *args.split())
    said = [agent.communicate(timeout=400)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert load_run(str(two), cycle).world == 2
    scores = [np.load(folder / "scores_test_15.npy") for folder in (two, one)]
    np.testing.assert_allclose(*scores, atol=1e-4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "options, says",
    [
        ("--top-h 101", "--top-h 101 is more than the 100 items"),
        ("--model bert4rec --width 15", "15 cannot be dealt out to BERT4Rec's 2 heads"),
        ("--model bert4rec --teacher x --lam .5", "BERT4Rec learns items in the midst of one"),
        ("--dataset nothing-here", "no prepared data set in .*nothing-here"),
    ],
)
def test_refusals_are_one_sentence(options, says, cycle, refused, tmp_path):
    where = f"--dataset {cycle.folder} --out {tmp_path}/x"
    assert re.search(says, refused(train_backbone.main, f"{where} {options}"))


@pytest.mark.parametrize(
    "options",
    ["--model bert5rec", "--dropout 1.5", "--history 0", "--loss hinge", "--widht 8"],
)
def test_bad_flags_stop(options, cycle, run, tmp_path):
    where = f"--dataset {cycle.folder} --out {tmp_path}/x"
    assert run(train_backbone.main, f"{where} {options}", code=2).error
