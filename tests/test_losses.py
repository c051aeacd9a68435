"""losses.py: what conventional models learn by, against torch and against plain loops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_cases import available

import train_backbone
from delrec.backbone import losses, models
from delrec.backbone.losses import (
    CrossEntropy,
    calibrated_loss,
    in_bf16,
    in_fp32,
    list_loss,
    list_weights,
)
from delrec.kernels import cpu

N_ITEMS = 30


def small(model, **more):
    """A model of width 8 with a window of 5, whose sums can be compared closely."""
    sizes = {"history": 5, "width": 8, "dropout": 0, "fp32": True}
    options = train_backbone.ALL[model] | sizes | more
    return models.build(model, N_ITEMS, SimpleNamespace(**options))


def same_gradients(loss, other, params, others):
    """Both losses and their gradients are the same."""
    (loss / 7).backward()
    (other / 7).backward()
    torch.testing.assert_close(loss, other)
    for p, q in zip(params, others):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-4)


def with_gradients(*tensors) -> list:
    return [t.clone().requires_grad_() for t in tensors]


def test_cross_entropy_equals_torch():
    torch.manual_seed(0)
    # rows for several parts
    x, item, bias = torch.randn(2500, 6), torch.randn(4000, 6), torch.randn(4000)
    target = torch.randint(0, 4000, (2500,))
    one, two = with_gradients(x, item, bias), with_gradients(x, item, bias)
    ours = CrossEntropy.apply(*one, target[:, None])
    torch_s = F.cross_entropy(two[0] @ two[1].T + two[2], target, reduction="sum")
    same_gradients(ours, torch_s, one, two)


def test_weighted_cross_entropy_equals_torch():
    torch.manual_seed(0)
    x, item, bias = torch.randn(500, 6), torch.randn(40, 6), torch.randn(40)
    weight, target = torch.rand(500, 3), torch.randint(0, 40, (500, 3))
    one, two = with_gradients(x, item, bias), with_gradients(x, item, bias)
    ours = CrossEntropy.apply(*one, target, weight)
    log_p = (two[0] @ two[1].T + two[2]).log_softmax(1)
    same_gradients(ours, -(log_p.gather(1, target) * weight).sum(), one, two)


@pytest.mark.parametrize("K", [1, 4])
def test_products_of_16_bit_numbers_give_the_loss_and_gradients_of_32(K):
    available("cpp")
    torch.manual_seed(0)
    x, item, bias = torch.randn(400, 30), torch.randn(900, 30) * 0.2, torch.randn(900)
    weight, target = torch.rand(400, K), torch.randint(1, 900, (400, K))
    bias[0] = -torch.inf  # barred: as a target it has no weight
    target[:9, 0], weight[:9, 0] = 0, 0
    given = (x, item, bias, target, weight)
    (loss, gradients), (true_loss, true_gradients) = in_bf16(*given), in_fp32(*given)
    torch.testing.assert_close(loss, true_loss, rtol=1e-4, atol=0)
    assert not gradients[1][0].any() and gradients[2][0] == 0
    across = (x.T.contiguous().T, item.T.contiguous().T)  # the same numbers, column by column
    assert torch.equal(in_bf16(*across, bias, target, weight)[1][1], gradients[1])
    for one, true in zip(gradients, true_gradients):
        # what 8 bits of each factor leave of a sum of hundreds
        assert (one - true).abs().max() < 4e-3 * true.abs().max()
        assert (one - true).norm() < 4e-3 * true.norm()


def test_16_bit_numbers_lose_nothing_where_the_model_is_sure():
    available("cpp")
    torch.manual_seed(0)
    item = torch.randn(500, 64)
    target = torch.randint(0, 500, (300, 1))
    x = item[target[:, 0]] * 0.25 + torch.randn(300, 64) * 0.02
    given = (x, item, torch.zeros(500), target, torch.ones(300, 1))
    (loss, gradients), (true_loss, true_gradients) = in_bf16(*given), in_fp32(*given)
    assert 0 < true_loss < 3 and loss.item() == pytest.approx(true_loss.item(), rel=0.03)
    for one, true in zip(gradients, true_gradients):
        assert (one - true).norm() < 0.03 * true.norm()


def test_a_cpu_that_multiplies_bf16_does_so_unless_told_otherwise(monkeypatch):
    available("cpp")
    used = []
    monkeypatch.setattr(losses, "in_bf16", lambda *given: used.append(0) or in_fp32(*given))
    cases = [(True, False, 30, 1), (True, True, 30, 0), (False, False, 30, 0), (True, False, 7, 0)]
    for fast, fp32, windows, wanted in cases:
        monkeypatch.setattr(cpu, "has_fast_bf16", lambda fast=fast: fast)
        used.clear()
        seq, target = torch.randint(1, 31, (2, windows, 5))
        train_backbone.loss_of(small("sasrec", fp32=fp32), seq, target)
        assert len(used) == wanted


@pytest.mark.parametrize("loss", ["ce", "bce", "gbce"])
@pytest.mark.parametrize("model", models.MODELS)
def test_the_losses_of_two_shares_sum_to_that_of_the_batch(model, loss):
    torch.manual_seed(0)
    net = small(model)
    seq, target, negative = torch.randint(1, 31, (3, 7, 5))
    # windows that own a different number of targets
    target[:3, :4] = 0
    rows = [seq, target, negative][: 3 if loss == "bce" else 2]
    shared = {"negative_BL": torch.tensor([3, 9, 9]), "gbce": True} if loss == "gbce" else {}
    shares = [train_backbone.loss_of(net, *[r[i::2] for r in rows], **shared) for i in (0, 1)]
    torch.testing.assert_close(sum(shares), train_backbone.loss_of(net, *rows, **shared))


# ---------------------------------------------------------------- the sampled softmax


@pytest.fixture
def asked():
    """(a SASRec of 100 items, windows (4, 8), a target at the end of each)."""
    torch.manual_seed(0)
    options = SimpleNamespace(history=8, width=16, dropout=0.0)
    model = models.build("sasrec", 100, options).eval()
    model.bias.data.normal_(0, 0.3)
    seq = torch.from_numpy(np.random.default_rng(0).integers(1, 101, (4, 8)))
    target = torch.zeros(4, 8, dtype=torch.long)
    target[:, -1] = torch.tensor([3, 14, 15, 92])
    return model, seq, target


def test_the_sampled_softmax_is_the_full_one_where_it_draws_everything(asked):
    full = train_backbone.loss_of(*asked)
    every = train_backbone.loss_of(*asked, torch.arange(1, 101))
    # I items stand for I - 1
    torch.testing.assert_close(every, full, rtol=0, atol=4 * 0.012)


def test_the_sampled_softmax_is_right_on_average(asked):
    # the sum below the fraction, not its logarithm, is right on average: compare e^(loss) for one
    # position
    model, seq, target = asked
    rng = np.random.default_rng(1)
    drawn = [torch.from_numpy(rng.integers(1, 101, 20)) for _ in range(1000)]
    losses = [train_backbone.loss_of(model, seq[:1], target[:1], items) for items in drawn]
    found = torch.stack(losses).exp()
    want = train_backbone.loss_of(model, seq[:1], target[:1]).exp()
    assert abs(found.mean() - want) < 4 * found.std() / 1000**0.5 + 0.01 * want


def test_the_sampled_softmax_is_its_formula(asked):
    model, seq, target = asked
    drawn, own = torch.tensor([7, 50, 81]), target[:, -1:]
    y = model(seq)[:, -1] @ model.item.weight.T + model.bias
    # each of three stands for 99 / 3
    want = torch.log(1 + 33 * (y[:, drawn] - y.gather(1, own)).exp().sum(1)).sum()
    torch.testing.assert_close(train_backbone.loss_of(model, seq, target, drawn), want)


# ---------------------------------------------------------------- one negative


def test_binary_cross_entropy_is_of_scores_with_their_biases(asked):
    model, seq, target = asked
    negative = torch.tensor([7, 50, 81, 14])
    y = model(seq)[:, -1] @ model.item.weight.T + model.bias
    logits = torch.stack([y[range(4), target[:, -1]], y[range(4), negative]])
    truth = torch.tensor([[1.0], [0.0]]).expand(2, 4)
    want = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    negative_BL = negative[:, None].expand(4, 8)
    torch.testing.assert_close(train_backbone.loss_of(model, seq, target, negative_BL), want)


# ---------------------------------------------------------------- gBCE


@pytest.mark.parametrize("t", [0, 0.75, 1])
def test_gbce_is_its_formula(t, asked):
    model, seq, target = asked
    negative = torch.tensor([7, 3, 50, 7, 81])  # the first target's own is no negative of it
    x = model(seq)[:, -1]
    y = x @ model.item.weight.T + model.bias
    alpha, want = 5 / 99, 0.0
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    for s in range(4):
        parts = [torch.log(1 - torch.sigmoid(y[s, i])) for i in negative if i != target[s, -1]]
        positive = torch.log(torch.sigmoid(y[s, target[s, -1]]) ** beta)
        want -= (positive + sum(parts)) / 6
    found = calibrated_loss(model, x, target[:, -1], negative, t)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_gbce_without_calibration_is_binary_cross_entropy_of_k_negatives(asked):
    model, seq, target = asked
    negative, x = torch.tensor([7, 50, 81]), model(seq)[:, -1]
    y = x @ model.item.weight.T + model.bias
    logits = torch.cat([y.gather(1, target[:, -1:]), y[:, negative]], 1)
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1
    want = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / 4
    torch.testing.assert_close(calibrated_loss(model, x, target[:, -1], negative, 0.0), want)


def test_gbce_that_draws_every_item_weighs_the_truth_as_one(asked):
    model, seq, target = asked
    every, x = torch.arange(1, 101).repeat(3), model(seq)[:, -1]
    found = calibrated_loss(model, x, target[:, -1], every, 1.0)
    torch.testing.assert_close(found, calibrated_loss(model, x, target[:, -1], every, 0.0))


# ---------------------------------------------------------------- the loss on a teacher's list


@pytest.mark.parametrize("w_o", [0, 0.4])
@pytest.mark.parametrize("how", ["sigmoid", "softmax"])
def test_the_list_loss_is_as_written(how, w_o):
    torch.manual_seed(0)
    net = small("sasrec")
    net.item.weight.data.mul_(30)  # scores as far apart as those of a trained model
    net.bias.data.normal_()
    x, item, w = torch.randn(4, 8), torch.randint(1, 31, (4, 3)), torch.rand(4, 3)
    item[2, 2] = 0  # a list of two
    trust = torch.tensor([0.5, 1.5, 0.0, 2.0])
    # the last is listed: it counts for nothing
    negative = torch.tensor([1, 2, 3, int(item[3, 0])])
    y = x @ net.item.weight.T + net.bias
    item[1, 0] = y[1, 1:].argsort(descending=True)[2] + 1  # the last of its own best three
    own = y[:, 1:].topk(3).values[:, -1]

    def weight(s, r):
        agrees = w_o if y[s, item[s, r]] >= own[s] else 0
        return w[s, r] + agrees if item[s, r] > 0 else 0.0

    def term(s, r):
        if how == "softmax":
            return -y[s, 1:].log_softmax(0)[item[s, r] - 1]
        unlisted = -torch.log(1 - torch.sigmoid(y[s, negative[s]]))
        return -F.logsigmoid(y[s, item[s, r]]) + unlisted * (s != 3)

    want = 0.0
    for s in range(4):
        weights = [weight(s, r) for r in range(3)]
        want += trust[s] * sum(weights[r] / sum(weights) * term(s, r) for r in range(3))
    counted = list_weights(net, x, item, w, trust, SimpleNamespace(w_consistency=w_o))
    found = list_loss(net, x, item, counted, negative if how == "sigmoid" else None)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_a_list_without_weights_counts_its_items_alike():
    torch.manual_seed(0)
    net, x = small("sasrec"), torch.randn(1, 8)
    item, none, one = torch.tensor([[4, 9, 0]]), torch.zeros(1, 3), torch.ones(1)
    counted = list_weights(net, x, item, none, one, SimpleNamespace(w_consistency=0))
    found = list_loss(net, x, item, counted)
    log_p = (x @ net.item.weight.T + net.bias)[0, 1:].log_softmax(0)
    torch.testing.assert_close(found, -(log_p[3] + log_p[8]) / 2)
