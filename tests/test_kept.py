"""finetune.py --keep-rps: stage 1's loss on the backbone's lists beside stage 2's."""

import shutil

import numpy as np
import pytest
import stopped_runs
import torch
from commands import log_of
from stopped_runs import same, stop_and_resume
from vector_runs import TUNE

import finetune
from delrec.data.others import rows_of_others
from delrec.data.prepared import users
from delrec.evaluation.paper import paper_method
from delrec.evaluation.rows import note_of
from delrec.lm import kept
from delrec.lm.ranker import open_run, score_and_rank
from delrec.lm.windows import WindowPrompt
from delrec.runtime import load_run

CPU = torch.device("cpu")
LONG = "--samples 640 --batch 16 --micro 16 --evals 1 --lr-maps 0.01"  # 30 steps


@pytest.fixture(scope="module")
def command(half, ruled, decoder):
    """finetune.py's options on item vectors, without --out."""
    return f"--dataset {half.folder} --llm {decoder} --backbone {ruled} {TUNE} --history 10"


@pytest.fixture(scope="module")
def tune(command, of_rule, run, fp32, tmp_path_factory):
    """tune(options) -> the run of finetune.py that begins as an LM that was of_rule, made once."""
    home, made = tmp_path_factory.mktemp("tuned"), {}

    def get(options):
        if options not in made:
            made[options] = home / f"run{len(made)}"
            with fp32():
                begun = of_rule("--augment walk")["folder"]
                where = f"{command} --soft-prompt {begun} --out {made[options]}"
                run(finetune.main, f"{where} {LONG} {options}")
        return made[options]

    return get


@pytest.fixture
def near(half, ruled, alone, on_cpu):
    """near(run) -> how often the backbone's first of all items is among its first five, on
    validation."""
    first_n, none_1I = np.load(ruled / "topk_val.npy")[:, 0], np.zeros((1, 121), np.float32)

    def of(folder):
        r, _ = open_run(load_run(folder, half), half, CPU)
        list_nK = score_and_rank(r, "val", np.arange(len(half.val)), 15, alone, none_1I)[2]
        return (list_nK[:, :5] == first_n[:, None]).any(1).mean()

    return of


def lists_of(weight=0.5, n_steps=30, h=4) -> kept.KeptLists:
    """Lists of 20 samples of 12 items, whose targets stand at 100, 103, .."""
    rng = np.random.default_rng(0)
    ranked_nh = np.stack([rng.permutation(12)[:h] + 1 for _ in range(20)])
    return kept.KeptLists(ranked_nh, 100 + 3 * np.arange(20), weight, 8, n_steps, "")


def window(*rows, number=0) -> WindowPrompt:
    """A window whose reads have the targets of these samples, the one at the mask first."""
    at, place = np.zeros(0, int), 100 + 3 * np.array(rows)
    return WindowPrompt(at, at, place, np.ones(len(rows), int), np.zeros(len(rows), int), number)


# ---------------------------------------------------------------- the term


def test_each_read_is_held_to_the_list_of_its_own_sample():
    lists, samples = lists_of(), [(7, 5, 6), (19,), (2, 0)]
    reads = [7, 19, 2, 5, 6, 0]  # masks first
    s = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = 0.0
    for row, read in zip(s, reads):
        left = list(range(12))
        for item in (lists.ranked_nh[read] - 1).tolist():  # draw one, put it aside, draw the next
            want += (row[left].logsumexp(0) - row[item]) / 4
            left.remove(item)
    for numbers, share in ((range(80, 83), 0.25), ((0, 3, 7), 0.5), (range(160, 163), 0)):
        batch = [window(*rows, number=n) for rows, n in zip(samples, numbers)]
        torch.testing.assert_close(lists.losses(s, batch), {"rps": share * want})


def test_it_falls_to_0_at_two_thirds_of_the_steps():
    shares = [lists_of(0.6, 30).share(step) for step in range(30)]
    assert shares[:21] == pytest.approx(np.linspace(0.6, 0, 21))
    assert shares[20:] == [0] * 10


def test_the_control_reads_another_user_s_list(half):
    user_n = users(half, half.train)
    row_n = rows_of_others(user_n, 0)
    assert sorted(row_n) == list(range(len(user_n)))
    assert (user_n[row_n] != user_n).all()
    assert not np.array_equal(row_n, rows_of_others(user_n, 1))


# ---------------------------------------------------------------- what it keeps


def test_stage_2_stays_near_the_backbone_by_its_lists_and_not_by_another_s(tune, near, of_rule):
    taught, gone = near(of_rule("--augment walk")["folder"]), near(tune(""))
    by_lists = near(tune("--keep-rps 3"))
    by_others = near(tune("--keep-rps 3 --keep-rps-permuted"))
    assert taught > 0.7
    assert by_lists > max(gone, by_others) + 0.15


def test_the_log_tells_what_is_kept(tune):
    log = log_of(tune("--keep-rps 3"))
    kept_n = [line.get("rps", 0.0) for line in log]
    assert kept_n[0] > 4 and all(x > 0 for x in kept_n[:27]) and not any(kept_n[27:])
    assert all(line["loss"] == pytest.approx(line["candidates"] + x, 1e-4) for line, x in
               zip(log, kept_n))  # fmt: skip
    plain = log_of(tune(""))
    assert plain[0]["loss"] == pytest.approx(log[0]["candidates"], 1e-5)
    assert "rps" not in plain[0]


def test_a_table_says_what_was_kept_and_counts_none_of_it_as_the_paper_s(tune, of_rule):
    runs = [load_run(tune(f"--keep-rps 3{more}")) for more in ("", " --keep-rps-permuted")]
    assert "kept near its backbone's lists (W 3)" in note_of(runs[0])
    assert "kept near another user's lists (W 3)" in note_of(runs[1])
    made = load_run(of_rule("--augment walk")["folder"])
    assert "made histories (walk)" in note_of(made)
    assert [paper_method(run) for run in (*runs, made, load_run(tune("")))] == [None] * 4


# ---------------------------------------------------------------- what a run promises


def test_a_weight_of_0_is_none_to_the_last_bit(command, on_cpu, tmp_path):
    few = f"{command} --soft-prompt none --samples 48"
    for name, more in (("none", ""), ("zero", " --keep-rps 0")):
        stopped_runs.run(finetune.main, f"{few}{more} --out {tmp_path}/{name}".split())
    assert same(tmp_path / "none", tmp_path / "zero")


def test_a_killed_run_goes_on_to_the_last_bit(command, on_cpu, tmp_path, monkeypatch):
    few = f"{command} --soft-prompt none --samples 64 --keep-rps .5 --keep-rps-permuted"

    def args(out, *more):
        return [*f"{few} --out {out} --checkpoint-every 1".split(), *map(str, more)]

    stopped_runs.run(finetune.main, args(tmp_path / "whole"))
    jobs = {"on": (finetune.main, args)}
    assert same(tmp_path / "whole", stop_and_resume(jobs, "on", tmp_path, monkeypatch, after=3))


def test_what_cannot_be_meant_is_one_sentence(
    command, ruled, toy, sasrec, decoder, refused, on_cpu, tmp_path
):
    def says(options):
        return refused(finetune.main, f"{options} --out {tmp_path}/x")

    in_sample = f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} {TUNE} --keep-rps .3"
    text = says(in_sample)
    assert "was trained on them" in text and "train_backbone.py --folds 5" in text
    command = f"{command} --soft-prompt none"
    assert "--input is titles" in says(f"{command} --keep-rps .3 --input titles")
    assert "add --keep-rps .3" in says(f"{command} --keep-rps-permuted")
    left_out = f"{command} --keep-rps .3 --keep-rps-permuted --without-fold 0"
    assert "a user that --without-fold leaves out" in says(left_out)
    few = shutil.copytree(ruled, tmp_path / "few")
    lists = np.load(few / "topk_train.npy")
    lists[::2] = 0
    np.save(few / "topk_train.npy", lists)
    assert "lists 443 of 886 training" in says(f"{command} --backbone {few} --keep-rps .3")
    lists = np.load(ruled / "topk_train.npy")
    lists[7, 2:] = 0  # its user took all others
    np.save(few / "topk_train.npy", lists)
    text = says(f"{command} --backbone {few} --keep-rps .3")
    assert "items for 1 samples" in text and "begin with a run of distill.py --h 2" in text
    assert not (tmp_path / "x").exists()
