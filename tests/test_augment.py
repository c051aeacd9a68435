"""distill.py --augment: RPS on histories that nobody has; --soft: the backbone's softmax."""

from types import SimpleNamespace

import numpy as np
import pytest
import stopped_runs
import torch
from commands import same_run
from ruled import Rule
from safetensors.torch import load_file
from stopped_runs import same, stop_and_resume
from vector_runs import DISTIL, TUNE, ranker_settings

import distill
import finetune
from delrec.data.prepared import halves_of_validation, users
from delrec.lm import augment
from delrec.lm.augment import MadeWindows
from delrec.lm.ranker import make_ranker, open_run, score_samples
from delrec.lm.rps import soft_target
from delrec.lm.text import ITEM
from delrec.metrics import agreement, kendall
from delrec.runtime import load_run

SHORT = "--samples 32 --evals 1 --lr 0.01 --augment all --soft 2"


def made(data, way, backbone=None, **changes):
    """The windows that --augment makes of the toy data, of at most 8 items."""
    cfg = SimpleNamespace(**{"augment": way, "history": 8, "h": 5, "seed": 0} | changes)
    return MadeWindows(cfg, data, np.arange(len(data.train)), backbone)


def in_training(data) -> list[list[int]]:
    """What each user did up to the last training target."""
    user_n = users(data, data.train)
    return [
        data.items[data.ptr[u] : data.train[user_n == u].max() + 1].tolist()
        for u in np.unique(user_n)
    ]


def is_part(some, whole) -> bool:
    """Whether items follow one another in a history, one directly after another."""
    return any(whole[i : i + len(some)] == some for i in range(len(whole)))


def is_thinned(some, whole) -> bool:
    """Whether items stand in a history in this order."""
    rest = iter(whole)
    return all(item in rest for item in some)


# ---------------------------------------------------------------- what is made


def test_a_crop_is_a_part_of_what_a_user_did_in_training(toy):
    olds, known = made(toy, "crop").histories(np.arange(60)), in_training(toy)
    assert all(any(is_part(old.tolist(), whole) for whole in known) for old in olds)
    assert {len(old) for old in olds} == set(range(3, 9))
    assert min(map(len, known)) < 14  # which most users go on after
    windows = [-(-(len(whole) - 1) // 8) for whole in known if len(whole) > 2]
    assert len(made(toy, "crop").first_n) == sum(windows) > len(windows)


def test_drop_leaves_out_a_fifth_and_keeps_the_order(toy):
    olds, known = made(toy, "drop").histories(np.arange(60)), in_training(toy)
    assert all(any(is_thinned(old.tolist(), whole) for whole in known) for old in olds)
    assert not all(any(is_part(old.tolist(), whole) for whole in known) for old in olds)
    runs = [len(made(toy, "drop").stretch(np.random.default_rng([0, 7, i]))) for i in range(60)]
    assert 0.1 < 1 - np.sum([len(old) for old in olds]) / np.sum(runs) < 0.3
    assert min(map(len, olds)) >= 3


def test_splice_joins_halves_of_two_users(toy):
    olds, known = made(toy, "splice").histories(np.arange(60)), in_training(toy)
    of_one = 0
    for old in olds:
        parts = [(old[:n].tolist(), old[n:].tolist()) for n in range(1, len(old))]
        starts = [n for n, (first, _) in enumerate(parts) if any(is_part(first, w) for w in known)]
        assert any(is_thinned(parts[n][1], w) for n in starts for w in known)
        assert len(set(old.tolist())) == len(old) <= 8
        of_one += any(is_thinned(old.tolist(), whole) for whole in known)
    assert of_one < 10


def test_a_walk_goes_on_as_the_backbone_would(toy):
    class NextNumber(Rule):
        def scores(self, olds):
            last = torch.tensor([int(old[-1]) for old in olds])
            return -100.0 * ((torch.arange(61)[None] - last[:, None] - 1) % 60)

    walked = made(toy, "walk", NextNumber()).histories(np.arange(60))
    for old in walked:
        begun = old[: len(old) - len(old) // 2].tolist()
        assert any(is_part(begun, whole) for whole in in_training(toy))
        for item in old[len(begun) :].tolist():
            numbers = (n % 60 + 1 for n in range(begun[-1], begun[-1] + 60))
            assert item == next(n for n in numbers if n not in begun)
            begun.append(item)
    flat = SimpleNamespace(scores=lambda olds: torch.zeros(len(olds), 61))
    drawn = np.concatenate([old[5:] for old in made(toy, "walk", flat).histories(np.arange(300))])
    assert len(set(drawn.tolist())) == 60  # of a backbone that knows nothing any item may come


def test_a_history_belongs_to_its_number_and_seed(toy):
    all_ways = made(toy, "all", Rule61()).histories(np.arange(16))
    again = made(toy, "all", Rule61()).histories(np.array([9, 4, 11]))
    for number, old in zip((9, 4, 11), again):
        assert np.array_equal(all_ways[number], old)
    other = made(toy, "all", Rule61(), seed=1).histories(np.arange(16))
    assert not all(np.array_equal(a, b) for a, b in zip(all_ways, other))
    uniform = made(toy, "random").histories(np.arange(300))
    count = np.bincount(np.concatenate(uniform), minlength=61)[1:]
    assert count.min() > 0.4 * count.mean() and count.max() < 2 * count.mean()


class Rule61(Rule):
    """Scores of the toy data's items."""

    def scores(self, olds):
        return super().scores(olds)[:, :61]


# ---------------------------------------------------------------- what is learnt of them


def test_after_each_item_the_backbone_is_asked_about_what_was_shown_until_then(with_items, toy):
    r = make_ranker(with_items, toy, ranker_settings(history=8))
    windows, asked = made(toy, "crop").prompts(r, np.arange(5)), []

    class Listening(Rule61):
        def scores(self, olds):
            asked.extend(old.tolist() for old in olds)
            return super().scores(olds)

    def shown(tail):
        return (ITEM - tail[tail <= ITEM]).tolist()

    lesson = augment.Answered(r, Listening(), SimpleNamespace(h=5, soft=None))
    with torch.no_grad():
        whole = lesson.loss(windows)
    assert asked == [old.tolist() for old in augment.before_reads(windows)]
    assert lesson.reads(windows) == len(asked)
    inner = iter(asked[len(windows) :])
    for window, read_at_mask in zip(windows, asked):
        assert shown(window.tail) == read_at_mask == window.items.tolist()
        for place in window.at:  # read before the vector that stands here
            assert shown(window.tail[:place]) == next(inner)
    # each read learns its own list, whoever stands beside it
    with torch.no_grad():
        apart = sum(lesson.loss([window]) for window in windows)
    torch.testing.assert_close(whole, apart)
    y_NI = augment.scores_of_new(Rule61(), asked)
    ranked = y_NI.topk(5).indices + 1
    assert not any(set(old) & set(row) for old, row in zip(asked, ranked.tolist()))


def test_the_soft_target_is_a_kl_of_the_best_and_the_rest():
    draw = torch.Generator().manual_seed(0)
    s, y = (torch.randn(4, 130, generator=draw, dtype=torch.float64) for _ in range(2))
    y[:, :5] = -torch.inf  # what the history holds
    s.requires_grad_()
    found = soft_target(s, y, 2.0)
    for s_I, y_I, value in zip(s, y, found):
        p, q = (y_I / 2).softmax(0), s_I.softmax(0)
        best = y_I.argsort(descending=True)[:100].tolist()
        rest = [i for i in range(130) if i not in best]
        pairs = [(p[i], q[i]) for i in best] + [(p[rest].sum(), q[rest].sum())]
        want = sum(a * (a.log() - b.log()) for a, b in pairs if a > 0)
        torch.testing.assert_close(value, want)
    found.sum().backward()
    assert torch.isfinite(s.grad).all()
    few = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf]])  # fewer than may be listed
    assert soft_target(few.nan_to_num(neginf=-1e9), few, 1.0).abs() < 1e-5
    assert soft_target(torch.zeros(1, 4), few, 1.0) > 0.3


def test_made_histories_teach_what_the_few_real_ones_do_not(of_rule):
    # RPS of held-out users, who see items that nobody saw in training; chance .1
    plain, walks = of_rule(""), of_rule("--augment walk")
    uniform = of_rule("--augment random")
    assert walks["after"]["rps"] > plain["after"]["rps"] + 0.08
    assert uniform["after"]["rps"] < plain["after"]["rps"] - 0.1
    # a soft target tells more of the order than three items do
    soft = of_rule("--augment walk --soft 20 --samples 640")
    assert soft["agreement"]["kendall"] > walks["agreement"]["kendall"] + 0.05


def test_agreement_is_over_the_stored_candidates_of_validation(of_rule, half, ruled, alone, on_cpu):
    found = of_rule("")
    r, _ = open_run(load_run(found["folder"], half), half, torch.device("cpu"))
    which, _ = halves_of_validation(half)
    s_nC = score_samples(r, "val", which, 15, alone)
    y_nC = np.load(ruled / "scores_val_15.npy")[which]
    want = {"same_first": agreement(s_nC, y_nC).mean(), "kendall": kendall(s_nC, y_nC).mean()}
    said = {"n": len(which), "candidates": 15}
    assert found["agreement"] == pytest.approx(want | said, abs=1e-6)


# ---------------------------------------------------------------- what a run promises


@pytest.fixture
def to_made(toy, sasrec, decoder, on_cpu):
    """distill.py's options on made histories and a real backbone."""
    return f"--dataset {toy.folder} --backbone {sasrec} --llm {decoder} {DISTIL} {SHORT}"


def test_one_process_and_two_give_the_same(
    to_made, half, ruled, decoder, run, two_processes, tmp_path
):
    # stage 2 that keeps lists too: to start two processes takes longest
    where = f"--dataset {half.folder} --llm {decoder} --backbone {ruled}"
    keeps = f"{where} {TUNE} --history 10 --keep-rps .5 --samples 64"
    commands = {"made": (distill.main, to_made), "kept": (finetune.main, keeps)}
    for name, (main, options) in commands.items():
        run(main, f"{options} --out {tmp_path}/one-{name}")
    two_processes(
        [
            ("distill", [*to_made.split(), "--out", tmp_path / "two-made"]),
            ("finetune", [*keeps.split(), "--out", tmp_path / "two-kept"]),
        ]
    )
    for name in ("soft_prompt.safetensors", "items.safetensors"):
        one, two = (load_file(tmp_path / f"{n}-made" / name) for n in ("one", "two"))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5)
    same_run(tmp_path / "two-kept", tmp_path / "one-kept")


def test_a_killed_run_goes_on_to_the_last_bit(to_made, tmp_path, monkeypatch):
    def args(out, *more):
        return [*f"{to_made} --out {out} --checkpoint-every 1".split(), *map(str, more)]

    stopped_runs.run(distill.main, args(tmp_path / "whole"))
    jobs = {"on": (distill.main, args)}
    assert same(tmp_path / "whole", stop_and_resume(jobs, "on", tmp_path, monkeypatch, after=2))


def test_what_cannot_be_meant_is_one_sentence(to_made, refused, tmp_path):
    def says(options):
        return refused(distill.main, f"{to_made} --out {tmp_path}/x {options}")

    assert "--input is titles; use --input ids" in says("--input titles")
    assert "--tasks is ta" in says("--tasks ta")
    real = to_made.replace("--augment all", "")
    assert "--soft needs the backbone's scores" in refused(
        distill.main, f"{real} --out {tmp_path}/x"
    )
    assert "the catalogue has 60" in says("--h 20 --history 45")
    assert not (tmp_path / "x").exists()
