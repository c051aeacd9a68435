"""train_backbone.py --cold-out: items that training never saw are ranked by their text."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_backbone
from delrec.backbone import models, text_ways
from delrec.backbone.by_title import PENALTIES, best_penalty, give_rows
from delrec.backbone.losses import catalogue_loss, list_loss, list_weights
from delrec.backbone.results import leave_plain
from delrec.backbone.text import Text
from delrec.data.counts import seen_in_training

KINDS, SEEN, COLD = 30, 8, 3  # kinds of things, things of a kind that are taken, and that come last


@pytest.fixture(scope="module")
def news(make_data, tmp_path_factory):
    """90 users who take six things of one kind each, and last one that nobody took before."""
    rng, rows, each = np.random.default_rng(5), [], SEEN + COLD
    for u in range(90):
        kind, nth = u % KINDS, u // KINDS
        old = kind * each + rng.permutation(SEEN)[:6] + 1
        rows += [(u, int(i), 10 * t + u % 7) for t, i in enumerate(old)]
        rows.append((u, kind * each + SEEN + nth + 1, 1000))
    titles = {i: f"kind{(i - 1) // each} {i}" for i in range(1, KINDS * each + 1)}
    split = ("--split", "leave-one-out")
    return make_data(tmp_path_factory.mktemp("news"), rows, titles, "news", *split)


def test_what_nobody_took_is_found_by_its_title(news, run, on_cpu, tmp_path):
    assert not np.isin(news.items[news.test], seen_in_training(news)).any()
    base = f"--dataset {news.folder} --width 32 --batch 32 --dropout 0.1 --lr 5e-3 --epochs 10"
    found = {}
    asked = {"out": "--cold-out", "in": "", "permuted": "--cold-out --permute-text"}
    for name, options in asked.items():
        more = f"--text tfidf --eta 20 {options} --out {tmp_path}/{name}"
        found[name] = run(train_backbone.main, f"{base} {more}").json["test_full_ndcg@10"]
    assert found["out"] > 0.2 and found["out"] > 1.2 * found["in"], found
    assert found["permuted"] < 0.1


def test_an_item_that_nobody_took_is_scored_as_those_of_its_kind(toy):
    kinds, rng = 4, np.random.default_rng(0)
    data = replace(toy, train=toy.train[:150])
    seen = torch.as_tensor(seen_in_training(data))
    cold = torch.as_tensor(np.setdiff1d(np.arange(1, toy.n_items + 1), seen))
    assert len(cold) >= kinds
    kind_I = torch.arange(toy.n_items + 1) % kinds
    torch.manual_seed(0)
    model = models.build("sasrec", toy.n_items, SimpleNamespace(history=8, width=16, dropout=0))
    own = 0.1 * torch.as_tensor(rng.normal(size=(toy.n_items + 1, 16))).float()
    model.item.weight.data[seen] = (torch.eye(16)[:kinds][kind_I] * 3 + own)[seen]
    model.bias.data[seen], model.bias.data[cold] = 5.0, -9.0  # learnt, and as it began
    trained = [model.item.weight[seen].clone(), model.bias[seen].clone()]
    nothing = torch.zeros_like(model.item.weight)
    give_rows(model, 5 * F.one_hot(kind_I, kinds).float(), nothing, data)
    assert torch.equal(model.item.weight[seen], trained[0])
    assert torch.equal(model.bias[seen], trained[1])
    near = torch.cdist(model.item.weight[cold], torch.eye(16)[:kinds] * 3).argmin(1)
    assert torch.equal(near, kind_I[cold])
    # what is not known of it lifts it above the mean of its kind, by little here
    assert (model.bias[cold] > 5).all() and (model.bias[cold] < 6).all()


def test_text_that_tells_nothing_of_items_gives_them_the_mean():
    """As many numbers as items fit anything, unless they are held down."""
    draw = torch.Generator().manual_seed(0)
    X, W = torch.randn(80, 60, generator=draw) / 60**0.5, torch.randn(60, 3, generator=draw)
    assert best_penalty(X, 20 * X @ W) == min(PENALTIES)
    assert best_penalty(X, torch.randn(80, 3, generator=draw)) == max(PENALTIES)


@pytest.mark.parametrize("way", ["fold", "adaptor", "alphafuse"])
def test_a_vector_that_is_the_text_s_alone_stays_so(way, toy, alone):
    model, seen, cold = barring(toy, alone, way, offset=False)
    model.bias.data[seen], model.bias.data[cold] = 5.0, -9.0
    before = model.item.weight.detach().clone()
    data = replace(toy, train=toy.train[:60])
    leave_plain(model, SimpleNamespace(contrast=0), data, alone)
    assert before[cold].abs().max() > 0 and torch.equal(model.item.weight, before)
    torch.testing.assert_close(model.bias[cold], torch.full((len(cold),), 5.0))


def barring(toy, alone, way="fold", offset=True):
    """(a model of the toy data's first samples, the items that these have, the others)."""
    data = replace(toy, train=toy.train[:60])
    seen = seen_in_training(data)
    cfg = SimpleNamespace(history=8, width=16, dropout=0, text_in=way, text_whiten=None, eta=1.0)
    vars(cfg).update(
        text_width=None, text_graph=0.0, permute_text=False, offset=offset, cold_out=True, fp32=True
    )
    torch.manual_seed(0)
    model = models.build("sasrec", toy.n_items, cfg)
    Z = np.random.default_rng(0).normal(size=(toy.n_items + 1, 24)).astype(np.float32)
    text_ways.enter(model, Text("some", [Z], {}), cfg, data, alone)
    return model, torch.as_tensor(seen), np.setdiff1d(np.arange(1, toy.n_items + 1), seen)


@pytest.mark.parametrize("way", ["fold", "adaptor", "start", "alphafuse"])
def test_barred_items_have_their_text_alone_and_no_part_in_the_softmax(way, toy, alone):
    model, seen, cold = barring(toy, alone, way)
    x, target = torch.randn(5, 16), seen[:5]
    loss = catalogue_loss(model, x, target)
    loss.backward()
    score = x @ model.item.weight.T + model.bias
    score[:, [0, *cold]] = -torch.inf
    torch.testing.assert_close(loss, F.cross_entropy(score, target, reduction="sum"))
    assert not model.bias.grad[cold].any() and model.bias.grad[target].all()
    if way in ("fold", "adaptor"):  # nothing of their own
        own = model.item.parametrizations.weight.original
        assert not own[cold].any() and not own.grad[cold].any()


@pytest.mark.parametrize("how", ["softmax", "sigmoid"])
def test_barred_items_have_no_part_in_what_a_teacher_lists(how, toy, alone):
    model, seen, cold = barring(toy, alone)
    x, a, b = torch.randn(3, 16), int(cold[0]), int(cold[1])
    item = torch.tensor([[int(seen[0]), a], [int(seen[1]), int(seen[2])], [a, b]])
    drawn = torch.tensor([int(seen[5]), b, int(seen[6])])
    weight, cfg = torch.tensor([[0.3, 0.7]] * 3), SimpleNamespace(w_consistency=0)
    w = list_weights(model, x, item, weight, torch.ones(3), cfg)
    loss = list_loss(model, x, item, w, drawn if how == "sigmoid" else None)
    loss.backward()
    assert not model.bias.grad[cold].any() and model.bias.grad[item[1]].all()
    assert not model.item.parametrizations.weight.original.grad[cold].any()
    score = x @ model.item.weight.T + model.bias
    if how == "softmax":
        score[:, [0, *cold]] = -torch.inf
        log_p = score.log_softmax(1)
        wanted = -log_p[0, item[0, 0]] - (weight[1] * log_p[1, item[1]]).sum()
    else:  # what is drawn for the second is barred, all that the third lists is
        one = F.softplus(-score[0, item[0, 0]]) + F.softplus(score[0, drawn[0]])
        wanted = one + (weight[1] * F.softplus(-score[1, item[1]])).sum()
    torch.testing.assert_close(loss, wanted)
