"""rec_pca.py: directions of titles' vectors that follow who was taken with whom."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import train_backbone
from delrec.backbone import rec_pca, text
from delrec.runtime import read_tensors


@pytest.fixture
def pairs():
    """20 users who take two items of one of two halves each (1..10, 11..20): a graph of two parts.
    Items 21 and 22 occur in no training."""
    rng = np.random.default_rng(0)
    items = np.concatenate([u % 2 * 10 + rng.permutation(10)[:6] + 1 for u in range(20)])
    ptr = np.arange(0, 121, 6)
    train = np.flatnonzero(np.arange(120) % 6 > 0)
    return SimpleNamespace(
        items=items, ptr=ptr, train=train, n_items=22, n_users=20, shared=None, titles=[""] * 23
    )


def vectors():
    """Column 0 says which half an item is of; column 1 says nothing, and varies more."""
    rng = np.random.default_rng(1)
    Z = rng.normal(size=(23, 5)) * 0.1
    Z[1:11, 0], Z[11:21, 0] = 1, -1
    Z[1:, 1] = 1.5 * np.tile([1, -1], 11)
    Z[21:] = 9
    Z[0] = 0
    return Z.astype(np.float32)


def test_without_the_graph_s_weight_directions_are_those_of_the_variance(pairs):
    trained = np.arange(1, 21)
    Z = text.centred(vectors(), trained)
    found = rec_pca.turned_by_graph(Z, pairs, 0.0, 3)
    want = text.turned(Z, trained, 0.0, 3)
    want /= np.maximum(np.linalg.norm(want, axis=1, keepdims=True), 1e-12)
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_the_direction_that_items_taken_together_share_comes_first(pairs):
    Z = text.centred(vectors(), np.arange(1, 21))
    half = np.repeat([1, -1], 10)
    first = {lam: rec_pca.turned_by_graph(Z, pairs, lam, 2)[1:21, 0] for lam in (0.0, 1.0)}
    alike = {lam: abs(np.corrcoef(x, half)[0, 1]) for lam, x in first.items()}
    assert alike[0.0] < 0.3 and alike[1.0] > 0.9, alike


def test_rows_have_norm_1_and_items_that_nobody_took_change_nothing(pairs):
    trained = np.arange(1, 21)
    Z = vectors()
    found = rec_pca.turned_by_graph(text.centred(Z, trained), pairs, 0.5, 3)
    assert np.linalg.norm(found[1:], axis=1) == pytest.approx(np.ones(22), abs=1e-5)
    assert not found[0].any()
    Z[21] = -50
    moved = rec_pca.turned_by_graph(text.centred(Z, trained), pairs, 0.5, 3)
    assert np.array_equal(moved[:21], found[:21]) and not np.allclose(moved[21], found[21])


def test_an_item_that_stood_near_no_other_is_its_own_neighbour(pairs):
    pairs.items, pairs.ptr = np.r_[pairs.items, 21, 21], np.r_[pairs.ptr, 122]
    pairs.train, pairs.n_users = np.r_[pairs.train, 121], 21
    Z = vectors().astype(np.float64)
    around, is_in = rec_pca.smoothed(Z, pairs)
    np.testing.assert_allclose(around[21], Z[21])
    assert is_in[21] and not is_in[22] and not is_in[0]
    # an even graph: the mean of the neighbours, where all are alike it is that
    ones = np.ones((23, 1))
    degree = rec_pca.smoothed(ones, pairs)[0][1:11, 0]
    assert 0.9 < degree.mean() < 1.1


def test_the_script_takes_them(toy, run, on_cpu, tmp_path):
    where = f"--dataset {toy.folder} --width 16 --epochs 1 --text tfidf --text-in alphafuse"
    tables = []
    for name, lam in (("plain", 0), ("graph", 2)):
        out = tmp_path / name
        run(train_backbone.main, f"{where} --no-offset --text-graph {lam} --out {out}")
        assert json.loads((out / "config.json").read_text())["text_graph"] == lam
        tables.append(read_tensors(out / "model.safetensors")["item.weight"])
    assert (tables[1][1:].norm(dim=1) - 1).abs().max() < 1e-5
    assert (tables[0][1:].norm(dim=1) - 1).abs().max() > 1e-2
