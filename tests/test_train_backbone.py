"""Stage 0: a planted rule each model must find, the files it leaves, no look at later items, and
two processes that equal one.
"""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_backbone as B
from delrec.backbone import models
from delrec.backbone.losses import CrossEntropy
from delrec.backbone.ranking import best_items
from delrec.data.prepared import (
    batch_of,
    candidates,
    histories,
    load_data,
    runs_of_targets,
    users,
    with_lists,
)
from delrec.runtime import ROOT, load_run

n_items = 100


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def planted(make_data, tmp_path_factory):
    """160 users who walk the cycle item -> 2 * item mod 101 through all 100 items, 20 steps each;
    one step in 50 goes anywhere.
    """
    rng = np.random.default_rng(0)
    rows = []
    for u in range(160):
        item, begin = int(rng.integers(1, n_items + 1)), int(rng.integers(0, 1000))
        for t in range(20):
            rows.append((u, item, begin + 10 * t))
            item = (
                int(rng.integers(1, n_items + 1))
                if rng.random() < 0.02
                else item * 2 % (n_items + 1)
            )
    return make_data(
        tmp_path_factory.mktemp("planted"), rows, {i: f"Film {i}" for i in range(1, n_items + 1)}
    )


def train(script, data, out, *args, code=0):
    return script(B.main, "--dataset", data.folder, "--out", out, *args, code=code)


QUICK = ("--epochs", 2, "--patience", 9, "--width", 16, "--batch", 16, "--history", 8)


@pytest.fixture(scope="module")
def run(planted, script, tmp_path_factory):
    """A short SASRec run, dropout 0."""
    out = tmp_path_factory.mktemp("runs") / "sasrec"
    return SimpleNamespace(out=out, json=train(script, planted, out, *QUICK, "--dropout", 0).json)


# ---------------------------------------------------------------- it learns


@pytest.mark.parametrize(
    "model, least, args",
    [
        ("sasrec", 0.9, ("--lr", 5e-3, "--epochs", 12, "--dropout", 0.1)),
        ("gru4rec", 0.9, ("--lr", 0.1, "--epochs", 20, "--dropout", 0)),
        ("caser", 0.8, ("--lr", 5e-3, "--epochs", 6, "--dropout", 0.1)),
    ],
)
def test_each_model_finds_the_planted_rule(planted, script, tmp_path, model, least, args):
    got = train(
        script,
        planted,
        tmp_path / model,
        "--model",
        model,
        "--width",
        32,
        "--batch",
        32,
        "--patience",
        9,
        *args,
    ).json
    assert got["test_hr@1"] > least, got


def test_bce_learns_too(planted, script, tmp_path):
    train(
        script,
        planted,
        tmp_path / "bce",
        "--loss",
        "bce",
        "--width",
        32,
        "--batch",
        32,
        "--lr",
        5e-3,
        "--epochs",
        6,
        "--dropout",
        0.1,
    )
    lines = [json.loads(line) for line in (tmp_path / "bce" / "log.jsonl").read_text().splitlines()]
    assert (
        lines[-1]["loss"] < lines[1]["loss"]
        and lines[-1]["val_ndcg@10"] > 2 * lines[0]["val_ndcg@10"]
    ), lines


def test_the_sampled_softmax_learns_too(planted, script, tmp_path):
    got = train(
        script,
        planted,
        tmp_path / "sampled",
        "--loss",
        "sampled",
        "--negatives",
        40,
        "--width",
        32,
        "--batch",
        32,
        "--lr",
        5e-3,
        "--epochs",
        12,
        "--patience",
        9,
        "--dropout",
        0.1,
    ).json
    assert got["test_hr@1"] > 0.9, got


def test_the_sampled_softmax_is_the_full_one_where_it_draws_everything_and_right_on_average(
    planted,
):
    torch.manual_seed(0)
    model = models.build(
        "sasrec", n_items, SimpleNamespace(history=8, width=16, dropout=0.0)
    ).eval()
    model.bias.data.normal_(0, 0.3)
    rng = np.random.default_rng(0)
    seq, target = (
        torch.from_numpy(rng.integers(1, n_items + 1, (4, 8))),
        torch.zeros(4, 8, dtype=torch.long),
    )
    target[:, -1] = torch.tensor([3, 14, 15, 92])
    full = B.loss_of(model, seq, target)
    # I items stand for I - 1
    torch.testing.assert_close(
        B.loss_of(model, seq, target, torch.arange(1, n_items + 1)),
        full + 4 * 0,
        rtol=0,
        atol=4 * 0.012,
    )
    # the sum below the fraction, not its logarithm, is right on average: compare e^(loss) for one
    # position
    one, where = seq[:1], target[:1]
    draws = torch.stack(
        [
            B.loss_of(model, one, where, torch.from_numpy(rng.integers(1, n_items + 1, 20))).exp()
            for _ in range(3000)
        ]
    )
    want = B.loss_of(model, one, where).exp()
    assert abs(draws.mean() - want) < 4 * draws.std() / 3000**0.5 + 0.01 * want


def test_lists_for_some_training_samples_only(planted, script, tmp_path):
    train(script, planted, tmp_path / "all", *QUICK, "--dropout", 0)
    train(script, planted, tmp_path / "some", *QUICK, "--dropout", 0, "--lists", 50)
    some, whole = (np.load(tmp_path / name / "topk_train.npy") for name in ("some", "all"))
    has = with_lists(tmp_path / "some", planted)
    assert len(has) == 50 and len(with_lists(tmp_path / "all", planted)) == len(
        planted.train
    ) == len(some)
    assert (some[has] == whole[has]).all() and not np.delete(some, has, 0).any()
    scores = np.load(tmp_path / "some" / "scores_train_15.npy")
    assert np.isfinite(scores[has]).all() and np.isnan(np.delete(scores, has, 0)).all()
    for name in ("scores_test_15", "full_val", "topk_test"):
        assert (
            np.load(tmp_path / "some" / f"{name}.npy") == np.load(tmp_path / "all" / f"{name}.npy")
        ).all()


# ---------------------------------------------------------------- what it leaves


def test_files_have_their_shapes(planted, run):
    n = {s: len(getattr(planted, s)) for s in ("train", "val", "test")}
    for s in n:
        top = np.load(run.out / f"topk_{s}.npy")
        assert top.shape == (n[s], 20) and top.dtype == np.int32
    for s in ("val", "test"):
        full = np.load(run.out / f"full_{s}.npy")
        assert full.shape == (n[s], 2) and full.dtype == np.int32 and (full >= 0).all()
        for C in planted.meta["candidates"]:
            scores = np.load(run.out / f"scores_{s}_{C}.npy")
            assert (
                scores.shape == (n[s], C)
                and scores.dtype == np.float32
                and np.isfinite(scores).all()
            )
    written = json.loads((run.out / "metrics.json").read_text())
    assert (
        written["protocol"]
        and {"candidates15", "full"} <= set(written["val"])
        and {"candidates15", "full"} <= set(written["test"])
    )
    config = load_run(str(run.out), planted, ["train_backbone"])
    assert (config.model, config.lr, config.history, config.n_items) == ("sasrec", 1e-3, 8, n_items)
    assert {
        "stage",
        "out",
        "val_hr@1",
        "val_ndcg@10",
        "test_hr@1",
        "test_ndcg@10",
        "test_full_ndcg@10",
        "seconds",
        "epochs_run",
        "samples_per_second",
        "peak_gb",
    } <= set(run.json)
    # the untrained model
    assert json.loads((run.out / "log.jsonl").read_text().splitlines()[0])["step"] == 0


def test_lists_hold_no_history_no_padding_no_item_twice(planted, run):
    for s in ("train", "val", "test"):
        samples = getattr(planted, s)
        for row, n, begin in zip(
            np.load(run.out / f"topk_{s}.npy"), samples, planted.ptr[users(planted, samples)]
        ):
            assert (
                len(set(row)) == 20
                and row.min() >= 1
                and not set(row) & set(planted.items[begin:n].tolist())
            )


def test_a_loaded_run_gives_what_was_stored(planted, run):
    model = models.load(str(run.out))
    with torch.no_grad():
        # longer than its window
        score = models.score(model, histories(planted, planted.test, 30)).numpy()
    picked = np.take_along_axis(score, candidates(planted, "test", 15), 1)
    np.testing.assert_allclose(picked, np.load(run.out / "scores_test_15.npy"), atol=1e-5)
    begin = planted.ptr[users(planted, planted.test)]
    own = score[np.arange(len(score)), planted.items[planted.test]].copy()
    for row, n, b in zip(score, planted.test, begin):
        row[planted.items[b:n]] = -np.inf
    # a repeated target stays in the ranking
    score[np.arange(len(score)), planted.items[planted.test]] = own
    greater = (score > own[:, None]).sum(1)
    stored = np.load(run.out / "full_test.npy")
    assert np.abs(stored[:, 0] - greater).max() <= 1 and (stored[:, 0] == greater).mean() > 0.99


def test_best_items_orders_ties_by_id_and_fills_with_0():
    score = torch.tensor(
        [
            [-torch.inf, -1.0, 2.0, -0.0, 0.0, 2.0, -3.0],
            [-torch.inf, -torch.inf, 5.0, -torch.inf, -torch.inf, -torch.inf, -9.0],
        ]
    )
    assert best_items(score, 5).tolist() == [[2, 5, 3, 4, 1], [2, 6, 0, 0, 0]]


# ---------------------------------------------------------------- the pieces


@pytest.mark.parametrize("model", list(B.DEFAULTS))
def test_padding_changes_no_score(model):
    torch.manual_seed(0)
    net = models.build(model, 30, SimpleNamespace(history=5, width=8, dropout=0.5)).eval()
    for p in net.parameters():
        # large enough that a difference shows
        p.data.mul_(5 if p.dim() > 1 else 1)
    with torch.no_grad():
        alone = models.score(net, [[3, 7]])
        batch = models.score(net, [[0, 0, 0, 3, 7], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    assert torch.isfinite(batch[:, 1:]).all() and (batch[:, 0] == -torch.inf).all()
    torch.testing.assert_close(alone[0], batch[0])


def test_cross_entropy_equals_torch():
    torch.manual_seed(0)
    # rows for several parts
    x, item, bias = torch.randn(2500, 6), torch.randn(4000, 6), torch.randn(4000)
    target = torch.randint(0, 4000, (2500,))
    one, two = [[t.clone().requires_grad_() for t in (x, item, bias)] for _ in range(2)]
    a, b = (
        CrossEntropy.apply(*one, target[:, None]),
        F.cross_entropy(two[0] @ two[1].T + two[2], target, reduction="sum"),
    )
    (a / 7).backward(), (b / 7).backward()
    torch.testing.assert_close(a, b)
    for p, q in zip(one, two):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)


def test_weighted_cross_entropy_equals_torch():
    torch.manual_seed(0)
    x, item, bias, weight = (
        torch.randn(500, 6),
        torch.randn(40, 6),
        torch.randn(40),
        torch.rand(500, 3),
    )
    target = torch.randint(0, 40, (500, 3))
    one, two = [[t.clone().requires_grad_() for t in (x, item, bias)] for _ in range(2)]
    a, b = (
        CrossEntropy.apply(*one, target, weight),
        -((two[0] @ two[1].T + two[2]).log_softmax(1).gather(1, target) * weight).sum(),
    )
    (a / 7).backward(), (b / 7).backward()
    torch.testing.assert_close(a, b)
    for p, q in zip(one, two):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("model", list(B.DEFAULTS))
def test_the_losses_of_two_shares_sum_to_that_of_the_batch(model, loss):
    torch.manual_seed(0)
    net = models.build(model, 30, SimpleNamespace(history=5, width=8, dropout=0))
    seq, target, negative = torch.randint(1, 31, (3, 7, 5))
    # windows that own a different number of targets
    target[:3, :4] = 0
    rows = [seq, target, negative][: 3 if loss == "bce" else 2]
    torch.testing.assert_close(
        sum(B.loss_of(net, *[r[i::2] for r in rows]) for i in (0, 1)), B.loss_of(net, *rows)
    )


@pytest.mark.parametrize("span, L", [(8, 8), (1, 5), (3, 8)])
def test_every_training_target_once_and_nothing_later(planted, span, L):
    is_target = np.zeros(len(planted.items), bool)
    is_target[planted.train] = True
    allowed = is_target.copy()
    allowed[planted.ptr[:-1]] = True  # a first item is input only
    for epoch in range(3):
        first, last = runs_of_targets(planted, span, np.random.default_rng(epoch))
        seq, target = batch_of(planted, first, last, L, is_target)
        at = last[:, None] - np.arange(L - 1, -1, -1)
        assert sorted(at[target > 0]) == sorted(planted.train)
        assert (target[target > 0] == planted.items[at[target > 0]]).all()
        assert (
            allowed[at[seq > 0] - 1].all()
            and (seq[seq > 0] == planted.items[at[seq > 0] - 1]).all()
        )
        assert (seq[target > 0] > 0).all()  # and each has a history


def test_negatives_are_not_the_users_own(planted):
    have = np.union1d(planted.train, planted.ptr[:-1])
    seen = np.unique(users(planted, have) * (n_items + 1) + planted.items[have])
    first, _ = runs_of_targets(planted, 8, np.random.default_rng(0))
    drawn = B.negatives(planted, first, np.ones((len(first), 8)), seen, np.random.default_rng(0))
    assert drawn.min() >= 1 and drawn.max() <= n_items
    assert not np.isin(users(planted, first)[:, None] * (n_items + 1) + drawn, seen).any()


# ---------------------------------------------------------------- what a run promises


def test_later_items_do_not_touch_training(planted, script, tmp_path):
    """The same log with every val and test item replaced: the losses of all epochs, and so the
    weights, stay bit for bit.
    """
    shutil.copytree(planted.folder, tmp_path / "other")
    items, next_item = np.array(planted.items), np.r_[0, np.arange(2, n_items + 1), 1]
    later = np.r_[planted.val, planted.test]
    items[later] = next_item[items[later]]
    np.save(tmp_path / "other" / "items.npy", items)
    for s in ("val", "test"):
        for C in planted.meta["candidates"]:
            np.save(
                tmp_path / "other" / f"candidates_{s}_{C}.npy",
                next_item[candidates(planted, s, C)].astype(np.int32),
            )
    logs = []
    for data in (planted, load_data(str(tmp_path / "other"))):
        train(script, data, tmp_path / "run", *QUICK, "--overwrite")
        logs.append(
            [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        )
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


def test_what_needs_no_lm_imports_none(planted, tmp_path):
    args = [sys.executable, "-c", WITHOUT_LM, planted.folder, tmp_path / "run", *QUICK]
    done = subprocess.run([str(a) for a in args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")


def test_same_seed_same_bits_other_seed_other_bits(planted, script, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(script, planted, tmp_path / name, *QUICK, "--seed", seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b and a != c
    assert (
        np.load(tmp_path / "a" / "topk_test.npy") == np.load(tmp_path / "b" / "topk_test.npy")
    ).all()


def test_two_processes_equal_one(planted, script, on_cpu, two_processes, tmp_path):
    def args(name):
        return (
            "--dataset",
            planted.folder,
            "--out",
            tmp_path / name,
            *QUICK,
            "--dropout",
            0,
        )

    script(B.main, *args("one"))
    said = two_processes([("train_backbone", args("two"))])
    assert json.loads(said.strip().split("\n")[-1])["stage"] == "train_backbone"
    one, two = tmp_path / "one", tmp_path / "two"
    assert load_run(str(two), planted).world == 2
    for s in ("val", "test"):
        np.testing.assert_allclose(
            np.load(two / f"scores_{s}_15.npy"), np.load(one / f"scores_{s}_15.npy"), atol=1e-4
        )
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    for s in ("val", "test"):
        for space in one[s]:
            for m in one[s][space]:
                assert two[s][space][m] == pytest.approx(one[s][space][m], abs=0.003, rel=0.003), (
                    s,
                    space,
                    m,
                )


@pytest.mark.parametrize(
    "args, says",
    [
        (("--top-h", 101), "--top-h 101 is more than the 100 items"),
        (("--dataset", "nothing-here"), "no prepared data set in .*nothing-here"),
    ],
)
def test_refusals_are_one_sentence(planted, script, tmp_path, args, says):
    assert re.search(says, train(script, planted, tmp_path / "x", *args, code=1).error)


@pytest.mark.parametrize(
    "args",
    [
        ("--model", "bert4rec"),
        ("--dropout", 1.5),
        ("--history", 0),
        ("--loss", "hinge"),
        ("--widht", 8),
    ],
)
def test_bad_flags_stop(planted, script, tmp_path, args):
    assert train(script, planted, tmp_path / "x", *args, code=2).error
