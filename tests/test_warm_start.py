"""train_backbone.py --from: a backbone goes on where the log has grown."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from commands import edit_config, log_of
from cycle import N_ITEMS
from stopped_runs import same, stop_and_resume

import evaluate
import train_backbone
from delrec.backbone.models import MODELS, load
from delrec.data.prepared import raw_item_ids
from delrec.runtime import load_run

SMALL = "--width 16 --batch 16 --history 8 --lr 5e-3 --dropout .1"


def walks(n_users, begin, known, rng):
    """Rows of users who walk the cycle of tests/cycle.py; `known(item)`: does the shop have it?"""
    rows = []
    for user in range(n_users):
        item, at = int(rng.integers(1, N_ITEMS + 1)), begin + int(rng.integers(0, 1000))
        for t in range(20):
            if known(item):
                rows.append((f"u{user}", f"a{item}", at + 10 * t))
            item = item * 2 % (N_ITEMS + 1)
    return rows


def titles_of(rows):
    return {item: f"Film {item[1:]}" for _, item, _ in rows}


@pytest.fixture(scope="module")
def logs(make_data, tmp_path_factory):
    """(the log of last week, without every eleventh item; today's, with them and more users)."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("shop")
    last = walks(160, 0, lambda item: item % 11, rng)
    now = last + [(f"n{u}", i, t) for u, i, t in walks(80, 600, lambda item: True, rng)]
    return [
        make_data(place / str(n), rows, titles_of(rows), f"shop{n}")
        for n, rows in enumerate((last, now))
    ]


@pytest.fixture(scope="module")
def last_week(logs, run, tmp_path_factory):
    """A trained SASRec's run folder on last week's log."""
    out = tmp_path_factory.mktemp("runs") / "sasrec"
    options = f"--epochs 12 --patience 9 {SMALL}"
    run(train_backbone.main, f"--dataset {logs[0].folder} --out {out} {options}")
    return out


@pytest.fixture
def go_on(logs, last_week, run, tmp_path):
    """go_on("--flag value ..", name) -> (the new run's folder, click's result)."""

    def train(options="", name="on", start=last_week):
        out = tmp_path / name
        flags = f"--dataset {logs[1].folder} --out {out} --from {start} {options}"
        return out, run(train_backbone.main, flags)

    return train


def test_known_items_keep_what_they_learnt_whatever_their_number_and_new_ones_are_the_mean(
    logs, last_week, go_on
):
    out, said = go_on("--epochs 0")
    old, new = load(last_week), load(out)
    was, now = (raw_item_ids(data) for data in logs)
    assert len(was) < len(now) and was[5:9] != now[5:9]
    at = [now.index(raw) for raw in was[1:]]
    assert torch.equal(new.item.weight[at], old.item.weight[1:])
    assert torch.equal(new.bias[at], old.bias[1:])
    unseen = [i for i, raw in enumerate(now) if raw and raw not in was]
    mean_E = old.item.weight[1:].mean(0).expand(len(unseen), -1)
    torch.testing.assert_close(new.item.weight[unseen], mean_E)
    for name, weight in old.state_dict().items():
        if name not in ("item.weight", "bias"):
            assert torch.equal(new.state_dict()[name], weight)
    assert f"91 of {len(now) - 1} items keep what they learnt, 9 are new" in said.stdout


def test_going_on_begins_where_the_run_was_and_learns_what_is_new(go_on, logs, run, tmp_path):
    log = log_of(go_on("--epochs 6 --patience 6")[0])
    flags = f"--dataset {logs[1].folder} --out {tmp_path}/scratch --epochs 0 {SMALL}"
    run(train_backbone.main, flags)
    scratch = log_of(tmp_path / "scratch")
    assert log[0]["val_ndcg@10"] > 3 * scratch[0]["val_ndcg@10"]
    assert max(line["val_ndcg@10"] for line in log) > log[0]["val_ndcg@10"] + 0.05


def test_settings_come_from_the_run_unless_something_else_is_typed(go_on, last_week):
    on = load_run(go_on("--epochs 1 --dropout .3 --loss bce")[0])
    assert (on.model, on.width, on.history, on.batch, on.lr) == ("sasrec", 16, 8, 16, 5e-3)
    assert (on.dropout, on.loss) == (0.3, "bce")
    assert on.from_run == str(last_week)


def test_what_a_run_learnt_by_beside_its_loss_goes_on_too(logs, go_on, run, tmp_path):
    start = tmp_path / "start"
    terms = "--loss bce --dros .5 --contrast .2 --one-target --ema .9 --fp32"
    flags = f"--dataset {logs[0].folder} --out {start} --epochs 0 {SMALL} {terms}"
    run(train_backbone.main, flags)
    on = load_run(go_on("--epochs 0 --contrast .3", "on", start)[0])
    assert (on.dros, on.contrast, on.one_target, on.ema) == (0.5, 0.3, True, 0.9)
    assert on.fp32


def test_a_run_older_than_a_flag_goes_on_with_its_default(go_on, last_week, tmp_path):
    start = tmp_path / "old"
    shutil.copytree(last_week, start)
    path, younger = start / "config.json", ("ema", "fp32", "one_target")
    says = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in says.items() if k not in younger}))
    on = load_run(go_on("--epochs 0", "on", start)[0])
    assert (on.ema, on.fp32, on.one_target) == (0, False, False)


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"sasrec"}))
def test_every_model_goes_on(model, logs, go_on, run, tmp_path):
    start = tmp_path / "start"
    flags = (
        f"--dataset {logs[0].folder} --out {start} --model {model} --epochs 1 {SMALL} --batch 64"
    )
    run(train_backbone.main, flags)
    out, _ = go_on("--epochs 1", "on", start)
    answer = run(evaluate.main, f'--ckpt {out} --history-json ["a12"]')
    assert load_run(out).model == model and len(answer.json["top"]) == 10


def test_a_run_is_replaced_by_what_goes_on_from_it(logs, last_week, run, tmp_path):
    out = tmp_path / "sasrec"
    shutil.copytree(last_week, out)
    flags = f"--dataset {logs[1].folder} --out {out} --from {out} --epochs 1"
    run(train_backbone.main, f"{flags} --overwrite")
    assert load_run(out).data_hash == logs[1].meta["hash"]


@pytest.mark.parametrize(
    "options, says",
    [
        (
            "--model caser",
            "--model caser was given, but .* has --model sasrec, which --from cannot change",
        ),
        ("--width 32", "--width 32 was given, but .* has --width 16"),
        ("--history 9", "--history 9 was given, but .* has --history 8"),
        ("--teacher tfidf", "--teacher and --from were given"),
        ("--text tfidf", "--text and --from were given"),
        ("--folds 3", "--folds and --from were given"),
        ("--cold-out", "--cold-out and --from were given, .*; leave --cold-out out, or train"),
        ("--text-whiten 0", "--text-whiten and --from were given"),
        ("--no-offset", "--no-offset and --from were given"),
        ("--from nothing/here", "nothing/here is no run folder"),
    ],
)
def test_what_going_on_cannot_change_is_one_sentence(
    options, says, logs, last_week, refused, tmp_path
):
    flags = f"--dataset {logs[1].folder} --out {tmp_path}/x --from {last_week} {options}"
    assert re.search(says, refused(train_backbone.main, flags))
    assert not list(tmp_path.glob("x*"))


def test_the_log_of_another_shop_is_refused(logs, last_week, make_data, refused, tmp_path):
    for name, id_of, says in (
        ("tea", "a{}", "so this is another log"),  # the same ids, other titles
        ("far", "z{}", "nothing to go on from"),
    ):
        rows = [(u, id_of.format((u + t) % 40), 10 * t) for u in range(40) for t in range(15)]
        shop = make_data(tmp_path / name, rows, {i: f"Tea {i}" for _, i, _ in rows}, name)
        flags = f"--dataset {shop.folder} --out {tmp_path}/x --from {last_week}"
        assert says in refused(train_backbone.main, flags)
        assert not list(tmp_path.glob("x*"))


def test_a_run_without_its_model_is_refused(logs, backbone, refused, tmp_path):
    flags = f"--dataset {logs[1].folder} --out {tmp_path}/x --from {backbone}"
    assert "holds lists but no model.safetensors" in refused(train_backbone.main, flags)


def test_a_run_whose_data_are_gone_is_refused(logs, last_week, refused, tmp_path):
    start = tmp_path / "old"
    shutil.copytree(last_week, start)
    edit_config(start, data_hash="0123456789abcdef")
    flags = f"--dataset {logs[1].folder} --out {tmp_path}/x --from {start}"
    assert "another preparation" in refused(train_backbone.main, flags)


def test_a_stopped_run_that_goes_on_is_continued_as_if_nothing_had_happened(
    go_on, logs, last_week, tmp_path, monkeypatch
):
    options = ["--epochs", "3", "--patience", "9", "--checkpoint-every", "1"]

    def args(out, *more):
        places = ["--dataset", logs[1].folder, "--out", out, "--from", last_week]
        return [*map(str, places), *options, *more]

    whole, _ = go_on(" ".join(options), "whole")
    jobs = {"train_backbone": (train_backbone.main, args)}
    assert same(stop_and_resume(jobs, "train_backbone", tmp_path, monkeypatch, 30), whole)
