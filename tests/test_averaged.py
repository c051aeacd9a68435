"""--ema of finetune.py and train_backbone.py, the mean of the steps, and --drop-items, prompts that
lack items.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from commands import log_of
from safetensors.torch import load_file
from stopped_runs import same, stop_and_resume
from tuning import opens_as_stored
from vector_runs import TUNE

import finetune
import train_backbone
from delrec.lm import drop_items
from delrec.lm.items import Folds, permute
from delrec.lm.text import ITEM, MASK, embed
from delrec.lm.windows import WindowPrompt
from delrec.runtime import load_run
from delrec.training.averaged import Averaged
from delrec.training.loop import Best


@pytest.fixture(scope="module")
def to_ids(toy, sasrec, decoder):
    """finetune.py's options that train the tiny decoder for six steps on vectors."""
    return f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} {TUNE} --soft-prompt none"


# ---------------------------------------------------------------- the mean


def mean_of(steps: list, d: float) -> torch.Tensor:
    """sum_s d^(t-s) w_s / sum_s d^(t-s) in fp64, t the last step."""
    weights = [d ** (len(steps) - 1 - s) for s in range(len(steps))]
    return sum(w * x.double() for w, x in zip(weights, steps)) / sum(weights)


def test_the_mean_is_that_of_the_steps_that_count():
    torch.manual_seed(0)
    p = torch.randn(4, 3)
    mean, seen = Averaged([p], 0.8), []
    for step in range(12):
        p.add_(torch.randn(4, 3))
        mean.take(counts=step >= 5)
        if step < 5:
            assert torch.equal(mean.means[0], p)
        else:
            seen.append(p.clone())
            torch.testing.assert_close(mean.means[0].double(), mean_of(seen, 0.8))


def test_what_trains_has_the_mean_s_values_only_while_it_is_asked():
    p = torch.zeros(3)
    mean = Averaged([p], 0.5)
    p += 4
    with pytest.raises(RuntimeError), mean.shown():
        assert torch.equal(p, torch.zeros(3))
        raise RuntimeError
    assert torch.equal(p, torch.full((3,), 4.0))
    mean.take(counts=True)
    again = Averaged([torch.zeros(3)], 0.5)
    again.load_state_dict(mean.state_dict())
    p += 4
    for each in (mean, again):
        each.params = [p]
        each.take(counts=True)
        torch.testing.assert_close(each.means[0], torch.full((3,), (8 + 0.5 * 4) / 1.5))


def test_a_run_keeps_the_mean_of_its_steps_and_is_chosen_by_it(
    to_ids, toy, run, alone, on_cpu, tmp_path, monkeypatch
):
    seen, take = [], Averaged.take

    def take_and_note(self, counts):
        take(self, counts)
        seen.append((counts, [p.detach().clone() for p in self.params]))

    monkeypatch.setattr(Averaged, "take", take_and_note)
    run(finetune.main, f"{to_ids} --ema .7 --lr-maps 1e-2 --out {tmp_path}/run")
    steps = [params for counts, params in seen if counts]
    assert len(seen) == 6 and 2 < len(steps) < 6 and load_run(tmp_path / "run").best_step == 6
    kept = load_file(tmp_path / "run" / "items.safetensors")["in.weight"]
    (place,) = [i for i, p in enumerate(steps[-1]) if p.shape == kept.shape]
    last = [params[place] for params in steps]
    torch.testing.assert_close(kept.double(), mean_of(last, 0.7), rtol=1e-5, atol=1e-7)
    assert (kept - last[-1]).abs().max() > 1e-3
    # what was validated is what was kept
    opens_as_stored(tmp_path / "run", toy, alone, 1e-3, 1e-3)


# ---------------------------------------------------------------- a conventional model's


NOISY = "--width 16 --batch 8 --history 8 --dropout 0 --lr .03 --epochs 3 --patience 9"


def test_a_backbone_and_its_folds_are_the_means_of_their_steps(
    cycle, train_on_cycle, tmp_path, monkeypatch
):
    steps, ends = {}, []  # {training: its parameters after each step}; where an epoch ended
    step, offer = torch.optim.Adam.step, Best.offer

    def step_and_note(self):
        step(self)
        params = self.param_groups[0]["params"]
        steps.setdefault(self, []).append([p.detach().clone() for p in params])

    def offer_and_note(self, *quality_and_weights):
        offer(self, *quality_and_weights)
        ends.append(len(list(steps.values())[-1]) if steps else 0)

    monkeypatch.setattr(torch.optim.Adam, "step", step_and_note)
    monkeypatch.setattr(Best, "offer", offer_and_note)
    train_on_cycle(tmp_path / "run", f"{NOISY} --ema .9 --folds 2")
    whole, *folds = steps.values()
    whole = whole[: ends[load_run(tmp_path / "run").best_epoch]]
    assert len(whole) > 30 and len(folds) == 2
    kept = load_file(tmp_path / "run" / "model.safetensors")
    for values in zip(*whole, strict=True):
        mean = mean_of(list(values), 0.9)
        assert any(
            t.shape == mean.shape and torch.allclose(t.double(), mean, rtol=1e-5, atol=1e-6)
            for t in kept.values()
        )
    assert (kept["bias"] - whole[-1][0]).abs().max() > 1e-3
    # of a fold's model its item vectors are turned, and its biases are not
    bias_FI = load_file(tmp_path / "run" / "folds.safetensors")["bias"]
    for part, bias_I in zip(folds, bias_FI, strict=True):
        mean_I = mean_of([values[0] for values in part], 0.9)
        torch.testing.assert_close(bias_I.double(), mean_I, rtol=1e-5, atol=1e-6)


def test_where_steps_are_noisy_their_mean_ranks_better(cycle, train_on_cycle, tmp_path):
    train_on_cycle(tmp_path / "step", NOISY)
    train_on_cycle(tmp_path / "mean", f"{NOISY} --ema .98")
    step, mean = (log_of(tmp_path / name) for name in ("step", "mean"))
    # the same steps are taken, and only the mean of them is looked at
    assert [line.get("loss") for line in step] == [line.get("loss") for line in mean]
    for one, other in zip(step[1:], mean[1:], strict=True):
        assert 1 - other["val_ndcg@10"] < 0.6 * (1 - one["val_ndcg@10"])


def test_a_stopped_backbone_goes_on_with_its_mean(cycle, train_on_cycle, tmp_path, monkeypatch):
    options = f"{NOISY} --ema .98 --folds 2 --checkpoint-every 1000"
    train_on_cycle(tmp_path / "whole", options)

    def args(out, *more):
        return ["--dataset", str(cycle.folder), "--out", str(out), *options.split(), *more]

    def forget(tensors):
        means = [key for key in tensors if key.startswith("mean.")]
        assert means
        for key in means:
            tensors[key] = torch.zeros_like(tensors[key])

    jobs = {"job": (train_backbone.main, args)}
    for spoil, alike in ((None, True), (forget, False)):
        again = stop_and_resume(jobs, "job", tmp_path / str(alike), monkeypatch, 30, spoil)
        assert same(again, tmp_path / "whole") == alike


# ---------------------------------------------------------------- lacking items


@pytest.fixture
def prompts():
    """400 prompts of 12 items between two tokens and a mask."""
    tail = np.r_[5, 6, ITEM - np.arange(1, 13), MASK]
    where = np.arange(3)
    return [WindowPrompt(tail, where, where, where, where, n) for n in range(400)]


def test_a_share_of_the_items_is_lacking_and_nothing_else(prompts):
    found = drop_items.without_items(prompts, 0.3, 0)
    tails = np.stack([e.tail for e in found])
    old = prompts[0].tail
    assert np.array_equal(old, np.r_[5, 6, ITEM - np.arange(1, 13), MASK])  # as it was
    gone = tails != old
    assert 0.27 < gone[:, 2:-1].mean() < 0.33 and not gone[:, [0, 1, -1]].any()
    assert (tails[gone] == ITEM).all() and (gone.sum(0)[2:-1] > 60).all()
    assert all(replace(e, tail=old) == replace(p, tail=old) for e, p in zip(found[:3], prompts))


def test_which_are_lacking_belongs_to_the_prompt_s_number(prompts):
    found = drop_items.without_items(prompts[:50], 0.3, 0)
    apart = drop_items.without_items([prompts[49], prompts[7]], 0.3, 0)
    assert [a.tail.tolist() for a in apart] == [found[i].tail.tolist() for i in (49, 7)]
    other = drop_items.without_items(prompts[:50], 0.3, 1)
    assert any((a.tail != b.tail).any() for a, b in zip(found, other))


def test_the_lm_reads_nothing_of_a_lacking_item(with_items):
    lm = with_items
    lm.items.folds = Folds(torch.cat([lm.items.E, lm.items.E * 2]), np.zeros(3), None)
    with torch.no_grad():
        lm.items.maps["in"].bias.normal_()
    ids_1Q = np.array([[5, ITEM, ITEM - 3]])
    for change in (lambda lm: None, permute):
        change(lm)
        x_QD = embed(lm, ids_1Q, None)[0]
        torch.testing.assert_close(x_QD[1], lm.items.maps["in"].bias.to(lm.dtype))
        assert (x_QD[2] - x_QD[1]).abs().max() > 0.01


def test_training_lacks_items_and_validation_has_them_all(
    to_ids, toy, run, alone, on_cpu, tmp_path, monkeypatch
):
    run(finetune.main, f"{to_ids} --out {tmp_path}/whole")
    drop, seen = drop_items.without_items, []

    def drop_and_note(batch, p, seed):
        seen.extend(e.number for e in batch)
        return drop(batch, p, seed)

    monkeypatch.setattr("delrec.lm.samples.without_items", drop_and_note)
    run(finetune.main, f"{to_ids} --drop-items .5 --out {tmp_path}/run")
    assert seen == list(range(48))
    assert log_of(tmp_path / "run")[1]["loss"] != log_of(tmp_path / "whole")[1]["loss"]
    opens_as_stored(tmp_path / "run", toy, alone, 1e-3, 1e-3)
