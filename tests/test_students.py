"""DROS and CL4SRec, which train_backbone.py adds to a loss (--dros, --contrast)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cycle import QUICK

from delrec.backbone import contrast, dros, models
from delrec.backbone.batches import Batch
from delrec.backbone.losses import list_loss
from delrec.processes import Ranks
from train_backbone import DEFAULTS

# ---------------------------------------------------------------- DROS


def plain_worst(x, item, bias, target, weight, p):
    """Sum over positions of weight log sum_i exp(p_i (s_i - y_i)^2), as it is written."""
    d = x @ item.T + bias - F.one_hot(target, len(item))
    return (weight * (p * d**2).exp().sum(1).log()).sum()


def test_the_worst_case_and_its_gradients_are_the_formulas():
    torch.manual_seed(0)
    # rows for several parts
    x, item, bias = 0.5 * torch.randn(2500, 6), torch.randn(4000, 6), torch.randn(4000)
    target, weight, p = torch.randint(0, 4000, (2500,)), torch.rand(2500), torch.rand(4000)
    one = [t.clone().requires_grad_() for t in (x, item, bias)]
    two = [t.double().requires_grad_() for t in (x, item, bias)]
    ours = dros.Worst.apply(*one, target[:, None], weight[:, None], p)
    wanted = plain_worst(*two, target, weight.double(), p.double())
    (ours / 7).backward()
    (wanted / 7).backward()
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)
    for a, b in zip(one, two):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_items", [6, 300])
def test_each_of_several_targets_is_one_time_the_target(n_items):
    torch.manual_seed(0)
    x, item, bias = torch.randn(50, 4), torch.randn(n_items, 4), torch.randn(n_items)
    target = torch.stack([torch.randperm(n_items)[:6] for _ in range(50)])
    weight, p = torch.rand(50, 6) * (torch.rand(50, 6) < 0.7), torch.rand(n_items)
    target[weight == 0] = 0  # padding, however often
    weight[0] = 0
    one = [t.clone().requires_grad_() for t in (x, item, bias)]
    two = [t.double().requires_grad_() for t in (x, item, bias)]
    ours = dros.Worst.apply(*one, target, weight, p)
    parts = [target[:, k] for k in range(6)], [weight[:, k].double() for k in range(6)]
    wanted = sum(plain_worst(*two, t, w, p.double()) for t, w in zip(*parts))
    ours.backward(), wanted.backward()
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=0)
    for a, b in zip(one, two):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-4)


def test_a_target_above_all_others_loses_no_digits():
    x, item = torch.full((1, 1), 40.0, requires_grad=True), torch.tensor([[1.0], [0.01], [0.0]])
    given = (torch.zeros(3), torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), torch.ones(3))
    loss = dros.Worst.apply(x, item, *given)
    loss.backward()
    assert loss.item() == pytest.approx(39**2, rel=1e-6)
    assert x.grad.item() == pytest.approx(2 * 39, rel=1e-5)


def test_scores_that_overflow_an_exponential_do_not_overflow_the_term():
    x, item = torch.full((1, 1), 40.0, requires_grad=True), torch.ones(3, 1)
    loss = dros.Worst.apply(
        x, item, torch.zeros(3), torch.tensor([[0]]), torch.ones(1, 1), torch.ones(3)
    )
    loss.backward()
    assert loss.item() == pytest.approx(1600 + np.log(2), rel=1e-5)
    assert torch.isfinite(x.grad).all()


def test_an_items_share_is_of_training_targets_alone(toy):
    p_I = dros.shares(toy)
    count_I = np.bincount(toy.items[toy.train], minlength=toy.n_items + 1)[1:] + 1
    assert p_I.shape == (toy.n_items,)
    np.testing.assert_allclose(p_I, (count_I / count_I.sum()) ** 0.05, rtol=1e-6)


def test_alpha_scales_the_term(toy):
    torch.manual_seed(0)
    cfg = SimpleNamespace(history=5, width=8, dropout=0.0, dros=0.5)
    model = models.build("sasrec", toy.n_items, cfg)
    x, target = torch.randn(4, 8), torch.tensor([1, 2, 3, 1])
    found = dros.Robust(cfg, toy, torch.device("cpu")).term(model, x, target[:, None])
    p = torch.from_numpy(dros.shares(toy))
    item, bias = model.item.weight[1:], model.bias[1:]
    wanted = 0.5 * plain_worst(x, item, bias, target - 1, torch.ones(4), p)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- CL4SRec

MASK = 100


@pytest.mark.parametrize("seed", range(5))
def test_the_changes_keep_what_they_say(seed):
    rng, items = np.random.default_rng(seed), np.arange(1, 11)
    kept = contrast.crop(items, rng, MASK)
    assert len(kept) == 6 and (np.diff(kept) == 1).all()
    hidden = contrast.hide(items, rng, MASK)
    assert (hidden == MASK).sum() == 3 and (hidden[hidden != MASK] == items[hidden != MASK]).all()
    mixed = contrast.reorder(items, rng, MASK)
    moved = np.flatnonzero(mixed != items)
    assert sorted(mixed) == list(items) and (len(moved) == 0 or np.ptp(moved) < 6)
    assert (items == np.arange(1, 11)).all()  # the history itself is not changed


def test_a_run_of_six_of_ten_is_shuffled():
    rng, items = np.random.default_rng(0), np.arange(10)
    moved = [np.flatnonzero(contrast.reorder(items, rng, MASK) != items) for _ in range(100)]
    assert max(np.ptp(places) for places in moved if len(places)) == 5
    assert {0, 9} < set(np.concatenate(moved))  # it stands anywhere


def test_views_end_where_histories_do_and_a_single_item_is_both():
    rng = np.random.default_rng(0)
    seq_BL = np.array([[0, 0, 0, 0, 7], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    views = contrast.views_of(seq_BL, MASK, rng)
    assert views.shape == (2, 3, 5)
    assert (views[:, 0] == seq_BL[0]).all()
    assert (views[:, :, -1] != 0).all()
    for row in range(3):
        allowed = {0, MASK, *seq_BL[row]}
        assert set(views[:, row].ravel()) <= allowed
    drawn = [contrast.views_of(seq_BL, MASK, np.random.default_rng(s)) for s in range(20)]
    assert all((v[0, 2] != v[1, 2]).any() for v in drawn)  # two different changes


def plain_info_nce(z, users, tau):
    """L_cl by two loops."""
    z = np.concatenate([z[0], z[1]])
    z, users = z / np.linalg.norm(z, axis=1, keepdims=True), [*users, *users]
    n, losses = len(users), []
    for i in range(n):
        pair = (i + n // 2) % n
        others = [j for j in range(n) if j == pair or users[j] != users[i]]
        e = np.exp([z[i] @ z[j] / tau for j in others])
        losses.append(-np.log(e[others.index(pair)] / e.sum()))
    return np.mean(losses)


def test_the_contrast_is_the_formula_and_a_users_own_windows_are_no_negatives():
    z = np.random.default_rng(0).normal(size=(2, 5, 8))
    users = [1, 2, 1, 3, 4]
    found = contrast.info_nce(torch.from_numpy(z), torch.tensor(users), 0.5)
    assert found.item() == pytest.approx(plain_info_nce(z, users, 0.5))
    assert found.item() != pytest.approx(plain_info_nce(z, range(5), 0.5))


@pytest.mark.parametrize("name", models.MODELS)
def test_the_mask_is_read_trains_and_leaves(name, toy):
    torch.manual_seed(0)
    cfg = dict(history=6, width=8, dropout=0.0, seed=0, contrast=0.1, contrast_tau=0.5)
    cfg = SimpleNamespace(**(DEFAULTS[name] | cfg))
    model = models.build(name, toy.n_items, cfg)
    kept = set(model.state_dict())
    contrast.add_mask(model, cfg)
    seq_BL = np.random.default_rng(0).integers(1, toy.n_items + 1, (4, 6))
    batch = Batch(seq_BL, seq_BL, None, np.asarray(toy.train)[[0, 40, 80, 120]])
    ranks = Ranks(rank=0, world=1, device=torch.device("cpu"))
    contrast.Contrast(cfg, toy).term(model, batch, (0, 0), ranks).backward()
    assert model.hidden.grad.abs().sum() > 0 and model.item.weight.grad.abs().sum() > 0
    assert model.item.weight.shape[0] == toy.n_items + 1
    contrast.drop_mask(model)
    assert set(model.state_dict()) == kept


# ---------------------------------------------------------------- in train_backbone.py


def test_a_run_with_both_terms_is_another_run_and_a_plain_model(train_on_cycle, tmp_path):
    quick = f"{QUICK} --epochs 4 --lr 1e-2 --dropout 0 --loss bce"
    for name, more in {"plain": "", "dros": "--dros 4", "contrast": "--contrast 0.5"}.items():
        train_on_cycle(tmp_path / name, f"{quick} {more}")
    plain, capped, alike = (models.load(tmp_path / n) for n in ("plain", "dros", "contrast"))
    assert set(plain.state_dict()) == set(alike.state_dict())
    assert not torch.equal(plain.item.weight, alike.item.weight)
    histories = torch.arange(1, 41).view(5, 8)
    with torch.no_grad():
        largest = [models.score(m, histories)[:, 1:].abs().max() for m in (plain, capped)]
    assert largest[1] < 0.8 * largest[0]  # a cap on the largest score


def test_a_teachers_list_has_the_term_of_each_listed_item(toy):
    torch.manual_seed(0)
    cfg = SimpleNamespace(history=5, width=8, dropout=0.0, dros=0.5)
    model = models.build("sasrec", toy.n_items, cfg)
    robust = dros.Robust(cfg, toy, torch.device("cpu"))
    x, item = torch.randn(2, 8), torch.tensor([[1, 2], [3, 0]])
    w, negative = torch.tensor([[0.7, 0.3], [1.0, 0.0]]), torch.tensor([9, 9])
    found = list_loss(model, x, item, w, negative, robust)
    wanted = list_loss(model, x, item, w, negative)
    for row, column in ((0, 0), (0, 1), (1, 0)):
        term = robust.term(model, x[row : row + 1], item[row : row + 1, [column]])
        wanted = wanted + w[row, column] * term
    torch.testing.assert_close(found, wanted)
