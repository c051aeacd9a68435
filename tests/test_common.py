"""common.py: metrics with ties worked by hand, histories, candidates, run folders, and the
sentences of everything it refuses.
"""

import itertools
import json
import shutil
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch

from common import finish_run, start_run
from delrec import processes, runtime
from delrec.data.prepared import candidates, histories, load_data, subset, users
from delrec.metrics import chance, compare, metrics
from delrec.processes import gather_rows, setup, sum_gradients
from delrec.runtime import folder_of, load_run, write_json, write_npy
from delrec.training.log import Log


def sentence(call, *args, **kwargs):
    with pytest.raises(click.ClickException) as e:
        call(*args, **kwargs)
    assert "\n" not in e.value.message
    return e.value.message


# ---------------------------------------------------------------- metrics


def test_metrics_of_hand_worked_rows():
    # the target first; fourth; first with two equals (ranks 1..3); fifth or sixth; eleventh
    m = metrics([0, 3, 0, 4, 10], [0, 0, 2, 1, 0])
    log2 = np.log2
    assert m["hr@1"] == pytest.approx([1, 0, 1 / 3, 0, 0])
    assert m["hr@5"] == pytest.approx([1, 1, 1, 1 / 2, 0])
    assert m["hr@10"] == pytest.approx([1, 1, 1, 1, 0])
    assert m["ndcg@5"] == pytest.approx(
        [1, 1 / log2(5), (1 + 1 / log2(3) + 1 / 2) / 3, 1 / log2(6) / 2, 0]
    )
    assert m["ndcg@10"] == pytest.approx(
        [1, 1 / log2(5), (1 + 1 / log2(3) + 1 / 2) / 3, (1 / log2(6) + 1 / log2(7)) / 2, 0]
    )
    assert m["mrr"] == pytest.approx(
        [1, 1 / 4, (1 + 1 / 2 + 1 / 3) / 3, (1 / 5 + 1 / 6) / 2, 1 / 11]
    )
    assert m["rank"].tolist() == [1, 4, 2, 5.5, 11]
    assert "ndcg@1" not in m


def test_a_tie_counts_as_the_mean_over_every_order_it_could_fall_in():
    score, place = np.array([2, 1, 1, 1, 0, 3]), 2  # the target ties with two others
    m = metrics(*compare(score[None], np.eye(6)[[place]]), ks=(1, 2, 3))
    values = []
    # stable sort of every permutation: every way of breaking the ties
    for order in itertools.permutations(range(6)):
        rank = [order[i] for i in np.argsort(-score[list(order)], kind="stable")].index(place) + 1
        values.append([rank <= 2, rank <= 3, (rank <= 3) / np.log2(rank + 1), 1 / rank, rank])
    assert [m[k][0] for k in ("hr@2", "hr@3", "ndcg@3", "mrr", "rank")] == pytest.approx(
        np.mean(values, 0)
    )


@pytest.mark.parametrize("C", [2, 15, 20, 100])
def test_constant_scores_are_chance_not_success(C):
    target = np.eye(C)[[0, C - 1, C // 2]]
    greater, equal = compare(np.full((3, C), 7.5), target)
    assert greater.tolist() == [0] * 3 and equal.tolist() == [C - 1] * 3
    m = metrics(greater, equal)
    assert (
        m["hr@1"] == pytest.approx(1 / C)
        and m["hr@5"] == pytest.approx(min(5 / C, 1))
        and (m["rank"] == (C + 1) / 2).all()
    )
    assert chance(C) == pytest.approx({k: v[0] for k, v in m.items()})


def test_compare_reads_the_target_from_its_mask():
    score = np.array([[0.1, 0.5, 0.3], [-2.0, -1.0, -3.0], [0.0, 0.0, 1.0]])
    greater, equal = compare(score, np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0]], bool))
    assert greater.tolist() == [1, 0, 1] and equal.tolist() == [0, 0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    assert "not finite" in sentence(compare, np.array([[1, bad, 0.0]]), np.array([[1, 0, 0]]))


# ---------------------------------------------------------------- prepared data


def two_users():
    """User 0 owns items 5 6 7, user 1 owns 1 2, user 2 owns 9."""
    return SimpleNamespace(items=np.array([5, 6, 7, 1, 2, 9], np.int32), ptr=np.array([0, 3, 5, 6]))


def test_histories_are_left_padded_and_never_cross_users():
    rows = histories(two_users(), np.array([0, 2, 3, 4, 5]), 3)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[0, 0, 0], [0, 5, 6], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    # the last L, the oldest dropped
    assert histories(two_users(), [2], 1).tolist() == [[6]]
    assert users(two_users(), np.arange(6)).tolist() == [0, 0, 0, 1, 1, 2]


def test_histories_of_the_toy_data_are_the_users_own_items(toy):
    samples = np.concatenate([toy.train, toy.val, toy.test])
    for sample, row in zip(samples, histories(toy, samples, 10)):
        u = next(u for u in range(toy.n_users) if toy.ptr[u] <= sample < toy.ptr[u + 1])
        before = toy.items[toy.ptr[u] : sample][-10:]
        assert row.tolist() == [0] * (10 - len(before)) + before.tolist()


def test_candidates_that_do_not_exist_name_those_that_do(toy):
    assert candidates(toy, "val", 15).shape == (len(toy.val), 15)
    says = sentence(candidates, toy, "val", 16)
    assert "no 16 candidates for val" in says and "[15, 20]" in says and str(toy.n_items) in says


def test_a_subset_is_sorted_stable_and_grows_by_adding():
    a, b = subset(1000, 50, 0), subset(1000, 60, 0)
    assert len(set(a)) == 50 and (np.diff(a) > 0).all() and set(a) < set(b)
    assert np.array_equal(a, subset(1000, 50, 0)) and not np.array_equal(a, subset(1000, 50, 1))
    for limit in (0, None, 7, 8):
        assert subset(7, limit, 0).tolist() == list(range(7))


def test_unknown_data_set_says_what_to_type(tmp_path, monkeypatch, toy):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    shutil.copytree(toy.folder, tmp_path / "data" / "games")
    says = sentence(load_data, "netflix")
    assert "prepared here: games" in says and "python data/prepare.py netflix --raw FOLDER" in says
    assert sentence(load_data, "ml-100k").endswith("python data/prepare.py ml-100k")
    assert load_data("games").n_items == toy.n_items
    assert "prepared here: games" in sentence(load_data, str(tmp_path / "elsewhere"))


def test_items_without_a_title_are_refused(tmp_path, toy):
    shutil.copytree(toy.folder, tmp_path / "toy")
    lines = (tmp_path / "toy" / "titles.txt").read_text().split("\n")
    (tmp_path / "toy" / "titles.txt").write_text("\n".join(lines[:-2]) + "\n")
    assert f"item id {toy.n_items} but only {toy.n_items - 1} titles" in sentence(
        load_data, str(tmp_path / "toy")
    )


# ---------------------------------------------------------------- ranks


def test_rows_of_all_ranks_meet_at_their_places(alone, monkeypatch):
    assert np.isnan(gather_rows(np.ones((1, 2), np.float32), np.array([1]), 3, alone)).sum() == 4

    def all_gather(parts, own):  # what the other process would send
        (
            parts[0].copy_(own),
            parts[1].copy_(
                torch.tensor([[10.0], [12.0]]) if own.dim() == 2 else torch.tensor([0, 2])
            ),
        )
        assert own.tolist() in ([1, -1], [[11.0], [0.0]])

    monkeypatch.setattr(processes.dist, "all_gather", all_gather)
    monkeypatch.setattr(processes, "max_over_ranks", lambda x, ranks: 2.0)
    rows = gather_rows(
        np.array([[11.0]], np.float32),
        np.array([1]),
        4,
        SimpleNamespace(world=2, device=torch.device("cpu")),
    )
    assert (
        rows.dtype == np.float32 and rows[:3, 0].tolist() == [10, 11, 12] and np.isnan(rows[3, 0])
    )


def test_gradients_are_summed_not_averaged(alone, monkeypatch):
    params = [
        torch.zeros(3, 2, requires_grad=True),
        torch.zeros(2, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(1, requires_grad=True),
    ]
    params[0].grad, params[1].grad = (
        torch.arange(6.0).view(3, 2),
        torch.tensor([1, 2.0], dtype=torch.bfloat16),
    )
    # as if the other rank had the same
    monkeypatch.setattr(processes.dist, "all_reduce", lambda y: y.mul_(2))
    sum_gradients(params, alone)
    assert params[0].grad.tolist() == [[0, 1], [2, 3], [4, 5]]
    sum_gradients(params, SimpleNamespace(world=2, device=torch.device("cpu")))
    assert (
        params[0].grad.tolist() == [[0, 2], [4, 6], [8, 10]]
        and params[1].grad.tolist() == [2, 4]
        and params[2].grad is None
    )
    assert params[1].grad.dtype == torch.bfloat16


def test_more_processes_than_gpus_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "--nproc_per_node asks for more than the 1 GPUs" in sentence(setup, 0)


def test_setup_seeds_everything(on_cpu):
    draws = [(setup(5), np.random.rand(), torch.rand(1).item())[1:] for _ in range(2)]
    assert draws[0] == draws[1] and (setup(6), np.random.rand())[1] != draws[0][0]


# ---------------------------------------------------------------- run folders


def test_a_name_means_a_folder_under_runs_unless_it_is_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path / "root")
    monkeypatch.chdir(tmp_path)
    # the default of distill.py
    assert folder_of("runs", "toy/prompt") == tmp_path / "root" / "runs" / "toy" / "prompt"
    assert folder_of("data", "beauty") == tmp_path / "root" / "data" / "beauty"
    assert folder_of("runs", tmp_path / "new") == tmp_path / "new"
    assert folder_of("runs", "runs/toy/new").resolve() == tmp_path / "runs" / "toy" / "new"
    assert folder_of("runs", "../new").resolve() == tmp_path.parent / "new"
    (tmp_path / "toy" / "mine").mkdir(parents=True)
    assert folder_of("runs", "toy/mine").resolve() == tmp_path / "toy" / "mine"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"title": "Les Misérables"})
    write_npy(tmp_path / "a.npy", np.arange(3))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "title": "Les Misérables"
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.npy"]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runtime.os, "fsync", full)
    for path, write, value in (
        (tmp_path / "a.json", write_json, {}),
        (tmp_path / "a.npy", write_npy, np.zeros(9)),
        (tmp_path / "new.npy", write_npy, np.zeros(9)),
    ):
        with pytest.raises(OSError):
            write(path, value)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {
        "title": "Les Misérables"
    }
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2] and not (tmp_path / "new.npy").exists()


def test_a_run_is_complete_when_its_config_is_there(tmp_path, toy, alone):
    out, cfg = tmp_path / "run", SimpleNamespace(lr=0.1, C=15)
    # the second is built beside the first, which stays whole
    for n in range(2):
        new, record = start_run(out, "finetune", cfg, toy, alone)
        (new / "which").write_text(str(n))
        assert not (new / "config.json").exists()
        if n:
            assert load_run(out).stage == "finetune" and (out / "which").read_text() == "0"
        else:
            assert f"{out} is an unfinished run" in sentence(load_run, out)
        finish_run(out, record)
        assert (out / "which").read_text() == str(n) and sorted(
            p.name for p in tmp_path.iterdir()
        ) == ["run"]
    run = load_run(str(out), toy, stages=["finetune"])
    assert (run.stage, run.lr, run.C, run.folder, run.data_hash) == (
        "finetune",
        0.1,
        15,
        out,
        toy.meta["hash"],
    )
    assert (
        run.seconds >= 0
        and run.peak_gb > 0
        and run.dataset == "toy"
        and {"torch", "peft"} <= set(run.versions)
    )


def test_refused_runs_say_why(tmp_path, toy, backbone, monkeypatch):
    assert "is no run folder" in sentence(load_run, tmp_path / "nothing")
    assert "holds a train_backbone run, expected one of: distill, finetune" in sentence(
        load_run, backbone, toy, ["distill", "finetune"]
    )
    other = SimpleNamespace(meta=toy.meta | {"hash": "0123"})
    says = sentence(load_run, backbone, other)
    assert toy.meta["hash"] in says and "0123" in says and "train it again" in says
    monkeypatch.setattr(runtime, "ROOT", tmp_path)  # a name is looked for under runs/
    shutil.copytree(backbone, tmp_path / "runs" / "toy" / "sasrec")
    assert load_run("toy/sasrec", toy).folder == tmp_path / "runs" / "toy" / "sasrec"


def test_the_log_is_one_object_a_line_and_only_the_main_process_writes(tmp_path, alone, capsys):
    log = Log(tmp_path, 3, "train", alone)
    for step in (1, 2, 3):
        log.step(step, loss=1 / step)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (
        [line["step"] for line in lines] == [1, 2, 3]
        and lines[1]["loss"] == 0.5
        and lines[0]["name"] == "train"
    )
    assert "train 3/3 | loss 0.3333" in capsys.readouterr().out
    silent = Log(tmp_path / "other", 3, "train", SimpleNamespace(main=False))
    silent.step(3, loss=1.0)
    silent.close()
    assert not (tmp_path / "other").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "script",
    [
        "train_backbone",
        "distill",
        "finetune",
        "evaluate",
        "recipes/tables",
        "recipes/circle",
        "recipes/demo",
        "data/prepare",
    ],
)
def test_help_shows_the_examples_and_every_option_says_what_it_does(script):
    import importlib

    from click.testing import CliRunner

    module = script.replace("/", ".")
    command = importlib.import_module(
        f"delrec.{module}" if script.startswith("data") else module
    ).main
    shown = CliRunner().invoke(command, ["--help"], terminal_width=100)
    assert shown.exit_code == 0
    lines = [line.strip() for line in shown.output.splitlines()]
    # examples stand on lines of their own
    assert sum(line.startswith((f"python {script}.py ", "torchrun ")) for line in lines) >= (
        1 if script == "recipes/demo" else 2
    )
    assert not [
        p.name
        for p in command.params
        if getattr(p, "param_type_name", "") == "option" and not p.help and p.name != "help"
    ]
