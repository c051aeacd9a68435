"""text.py, text_ways.py: vectors of titles, what is fitted to them, and how they enter a
conventional model (train_backbone.py --text).
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stopped_runs import same, stop_and_resume, stopped

import train_backbone
from delrec.backbone import models, text, text_ways
from delrec.data.counts import seen_in_training
from delrec.evaluation.rows import note_of
from delrec.runtime import load_run

SHORT = "--epochs 2 --width 16 --batch 16"
USUAL = {"text_in": "fold", "text_whiten": None, "text_width": None, "permute_text": False}
USUAL |= {"text_graph": 0.0, "cold_out": False, "loss": "ce"}
USUAL |= {"text": "some", "teacher": None, "eta": 1.0, "offset": True, "width": 16, "folds": 0}


@pytest.fixture
def train(toy, run, on_cpu, tmp_path):
    """train(name, options) -> the folder of a short training on the toy data."""

    def short(name, options=""):
        out = tmp_path / name
        run(train_backbone.main, f"--dataset {toy.folder} --out {out} {SHORT} {options}")
        return out

    return short


def settings(**changes) -> SimpleNamespace:
    """The flags that are about text."""
    return SimpleNamespace(**USUAL | changes)


def skewed(n=61, D=12, seed=0) -> np.ndarray:
    """n vectors, the padding's 0 first, that mostly point in one direction."""
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(n, D)) * 0.85 ** np.arange(D) + 3
    Z[0] = 0
    return (Z @ np.linalg.qr(rng.normal(size=(D, D)))[0]).astype(np.float32)


def half_trained(data):
    """The data with the training samples of a few users: many items occur in none of them."""
    return replace(data, train=data.train[:60])


# ---------------------------------------------------------------- what is fitted


@pytest.mark.parametrize("whiten, width", [(None, None), (0.5, None), (1.0, None), (0.0, 5)])
def test_an_item_that_training_never_saw_changes_nothing_of_the_others(toy, whiten, width):
    data, cfg = half_trained(toy), settings(text_whiten=whiten, text_width=width)
    trained = seen_in_training(data)
    new = np.setdiff1d(np.arange(1, 61), trained)
    assert 10 < len(trained) < 50
    Z = skewed()
    moved = Z.copy()
    moved[new[0]] += 100
    before, after = (text.Text("some", [part], {}).fitted(data, cfg) for part in (Z, moved))
    others = np.arange(61) != new[0]
    assert np.array_equal(before[others], after[others])
    assert not np.allclose(before[new[0]], after[new[0]])
    # fitted on all items it would
    assert not np.allclose(before, text.Text("some", [Z], {}).fitted(toy, cfg), atol=1e-3)


def test_without_whitening_vectors_are_centred_and_of_norm_1(toy):
    data = half_trained(toy)
    trained = seen_in_training(data)
    Z = skewed()
    found = text.Text("some", [Z], {}).fitted(data, settings())
    want = Z - Z[trained].mean(0)
    want /= np.linalg.norm(want[trained], axis=1).mean()
    np.testing.assert_allclose(found[1:], want[1:], atol=1e-6)
    assert not found[0].any() and found.dtype == np.float32
    same_again = text.turned(found, trained, 0.0)
    assert same_again is found


def test_whitening_makes_the_trained_items_covariance_the_identity_softly():
    trained = np.arange(1, 41)
    Z = text.centred(skewed(), trained)

    def spread(whiten):
        """The largest variance of a direction over the smallest."""
        new = text.turned(Z, trained, whiten)[trained]
        s = np.linalg.eigvalsh(new.T @ new)
        return s[-1] / s[0]

    new = text.turned(Z, trained, 1.0)
    cov = new[trained].T @ new[trained] / 40
    np.testing.assert_allclose(cov / cov[0, 0], np.eye(12), atol=0.05)
    # ZCA: no direction is turned into another
    assert np.diag(Z[trained].T @ new[trained]).min() > 0
    np.testing.assert_allclose(spread(0.5), spread(0.0) ** 0.5, rtol=0.1)
    assert spread(1.0) < 1.1 < 3 < spread(0.5)
    norms = [np.linalg.norm(a[trained], axis=1).mean() for a in (Z, new)]
    assert norms == pytest.approx([1, 1], rel=1e-4)


def test_a_direction_that_no_trained_item_has_is_not_blown_up():
    Z = skewed()
    Z[:, 3] = 0
    Z[50, 3] = 1  # an item of the others
    trained = np.arange(1, 41)
    new = text.turned(text.centred(Z, trained), trained, 1.0)
    assert np.isfinite(new).all()
    assert np.linalg.norm(new[50]) < 20 * np.linalg.norm(new[trained], axis=1).mean()


def test_leading_directions_hold_the_most_of_the_vectors():
    trained = np.arange(1, 61)
    Z = text.centred(skewed(), trained)
    few = text.turned(Z, trained, 0.0, 4)
    s = np.linalg.svd(Z[trained], compute_uv=False)
    own = np.linalg.norm(few[trained], axis=0)
    assert few.shape == (61, 4)
    np.testing.assert_allclose(own / own[0], s[:4] / s[0], rtol=1e-4)
    assert text.turned(Z[:, :3], trained, 0.0, 8).shape == (61, 3)  # there are no more


def test_permuted_vectors_keep_their_spectrum_and_lose_their_meaning(toy):
    data = half_trained(toy)
    trained = seen_in_training(data)
    some = text.Text("some", [skewed()], {})
    real, control = (some.fitted(data, settings(permute_text=p)) for p in (False, True))
    spectra = [np.linalg.svd(Z[trained], compute_uv=False) for Z in (real, control)]
    np.testing.assert_allclose(*spectra, rtol=1e-5)
    assert (real != control).any(1).mean() > 0.8 and not control[0].any()
    for group in (trained, np.setdiff1d(np.arange(61), trained)):
        assert np.array_equal(np.sort(real[group], 0), np.sort(control[group], 0))
    assert np.array_equal(control, some.fitted(data, settings(permute_text=True)))


def test_sources_stand_side_by_side_each_of_norm_1(toy, tmp_path):
    own = tmp_path / "c++" / "own.npy"
    own.parent.mkdir()
    np.save(own, 50 * skewed()[1:])
    cfg = settings(text=f"tfidf+{own}")
    found = text.read_text(cfg, toy, None, None)
    Z = found.fitted(toy, cfg)
    trained = seen_in_training(toy)
    wide = text.tfidf_vectors(toy).shape[1]
    assert Z.shape == (61, wide + 12)
    for half in (Z[:, :wide], Z[:, wide:]):
        assert np.linalg.norm(half[trained], axis=1).mean() == pytest.approx(1, rel=1e-4)
    # a row an item, or one more for the padding: the same
    np.save(own, 50 * skewed())
    assert np.array_equal(text.read_text(cfg, toy, None, None).parts[1], found.parts[1])


def test_how_alike_vectors_point_is_said():
    Z = np.array([[1.0, 0], [0, 2], [3, 3]])
    # cosines 0, .707, .707
    assert text.mean_cosine(Z) == pytest.approx(2 * 0.5**0.5 / 3)
    about = {"text_numbers": 2, "text_cosine": 0.9}
    assert "try --text-whiten .5" in text.said(about, settings())
    for other in (dict(text_whiten=0.5), dict(text_in="alphafuse"), dict(text_graph=1.0)):
        assert "try" not in text.said(about, settings(**other))


# ---------------------------------------------------------------- how they enter


def built(E=16):
    torch.manual_seed(0)
    return models.build("sasrec", 60, SimpleNamespace(history=8, width=E, dropout=0))


def entered(data, alone, **changes):
    """(a model with text in its item vectors, the vectors)."""
    cfg, some = settings(**changes), text.Text("some", [skewed(D=24)], {})
    model = built(cfg.width)
    text_ways.enter(model, some, cfg, data, alone)
    return model, torch.from_numpy(some.fitted(data, cfg))


@pytest.mark.parametrize(
    "way, offset",
    [(way, offset) for way in ("fold", "adaptor", "alphafuse") for offset in (True, False)]
    + [("start", True)],
)
def test_folding_leaves_a_plain_table_with_the_same_vectors(toy, alone, way, offset):
    model, _ = entered(toy, alone, text_in=way, offset=offset)
    before = model.item.weight.detach().clone()
    seq = torch.arange(1, 9)[None]
    score = models.score(model, seq)
    text_ways.fold(model)
    assert model.state_dict().keys() == built().state_dict().keys()
    assert torch.equal(model.item.weight, before) and torch.equal(models.score(model, seq), score)
    assert not before[0].any() and before[1:].norm(dim=1).min() > 0
    text_ways.fold(model)  # there is nothing left to do
    assert torch.equal(model.item.weight, before)


def test_each_way_is_its_equation(toy, alone):
    model, Z = entered(toy, alone, text_in="fold", eta=0.5)
    table = built().item.weight[1:]
    made = model.item.parametrizations.weight[0]
    torch.testing.assert_close(model.item.weight[1:], table + 0.5 * Z[1:] @ made.W.T)

    model, Z = entered(toy, alone, text_in="adaptor", eta=2.0)
    made = model.item.parametrizations.weight[0]
    network = torch.nn.functional.relu(Z[1:] @ made.W.T) @ made.V.T
    torch.testing.assert_close(model.item.weight[1:], table + 2 * network)
    # the text's part begins as large as an item's own
    assert network.std().item() == pytest.approx(0.02, rel=0.4)

    # as large as the vectors that begin without text, and as far from each other as the text says
    model, Z = entered(toy, alone, text_in="start", eta=2.0)
    torch.testing.assert_close(model.item.weight[1:], 2 * 0.02 * 16**0.5 * Z[1:])
    assert model.item.weight[1:].std().item() == pytest.approx(2 * 0.02, rel=0.1)

    model, Z = entered(toy, alone, text_in="alphafuse", eta=3.0)
    torch.testing.assert_close(model.item.weight[1:], 3 * Z[1:])
    cov = Z[1:].T @ Z[1:]
    torch.testing.assert_close(cov / cov[0, 0], torch.eye(16), atol=0.02, rtol=0)
    model.item.weight.sum().backward()
    own = model.item.parametrizations.weight.original.grad
    assert not own[1:, :8].any() and (own[1:, 8:] == 1).all()  # ids learn in the last half


def test_a_table_that_begins_as_text_trains_and_the_hidden_item_begins_as_ever(toy, alone):
    cfg = settings(text_in="start", history=8, dropout=0.0)
    both = []
    for some in (text.Text("some", [skewed(D=24)], {}), None):
        torch.manual_seed(0)
        both.append(models.build("bert4rec", 60, cfg))
        text_ways.enter(both[-1], some, cfg, toy, alone)
    model, plain = both
    assert torch.equal(model.mask, plain.mask) and model.mask.abs().max() > 0
    assert not torch.allclose(model.item.weight[1:], plain.item.weight[1:])
    models.score(model, torch.arange(1, 9)[None])[0, 1:].logsumexp(0).backward()
    assert model.item.weight.grad[1:].any(1).all() and model.mask.grad.any()
    assert not model.item.weight[0].any()


def test_few_directions_are_filled_up_with_zeros(toy, alone):
    for way in ("start", "alphafuse"):
        model, Z = entered(toy, alone, text_in=way, width=40)
        assert Z.shape[1] == 24 and model.item.weight.shape == (61, 40)
        assert not model.item.weight[:, 24:].any()


@pytest.mark.parametrize("way", ["fold", "adaptor", "start", "alphafuse"])
def test_every_way_trains_and_leaves_a_run_that_needs_no_text(way, train, toy):
    out = train(way, f"--text tfidf --text-in {way}")
    config = json.loads((out / "config.json").read_text())
    assert (config["text"], config["text_in"]) == ("tfidf", way)
    assert config["text_numbers"] > 20 and 0 < config["text_cosine"] < 0.8
    assert f"titles' vectors: tfidf ({way})" in note_of(load_run(out))
    model = models.load(out)
    assert model.state_dict().keys() == built().state_dict().keys()
    assert not model.item.weight[0].any()


def test_folds_are_fitted_on_their_own_items(train, toy, monkeypatch):
    seen, fitted = [], text.Text.fitted
    monkeypatch.setattr(
        text.Text, "fitted", lambda self, data, cfg: seen.append(data) or fitted(self, data, cfg)
    )
    out = train("folds", "--text tfidf --folds 2")
    assert len(seen) == 3
    assert sum(len(data.train) for data in seen[1:]) == len(seen[0].train)
    assert len(load_file(out / "folds.safetensors")["item.weight"]) == 2


def test_two_processes_are_as_one(toy, train, two_processes, tmp_path):
    options = "--text tfidf --text-in adaptor --text-whiten .5 --dropout 0"
    one = load_file(train("one", options) / "model.safetensors")
    args = f"--dataset {toy.folder} --out {tmp_path}/two {SHORT} {options}"
    two_processes([("train_backbone", args.split())])
    two = load_file(tmp_path / "two" / "model.safetensors")
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_a_stopped_run_goes_on_bit_for_bit_and_not_with_other_vectors(
    toy, run, on_cpu, tmp_path, monkeypatch
):
    own = tmp_path / "own.npy"
    np.save(own, skewed())
    options = f"--text tfidf+{own} --text-in adaptor --seed 4 --checkpoint-every 1"
    typed = f"--dataset {toy.folder} {SHORT} {options}".split()

    def args(out, *more):
        return [*typed, "--out", str(out), *map(str, more)]

    run(train_backbone.main, " ".join(args(tmp_path / "whole")))
    jobs = {"net": (train_backbone.main, args)}
    again = stop_and_resume(jobs, "net", tmp_path, monkeypatch, 3)
    assert same(tmp_path / "whole", again)
    # the file is another one when the run goes on
    assert stopped(jobs, "net", tmp_path / "other", monkeypatch, 3)
    np.save(own, skewed(seed=1))
    said = run(train_backbone.main, " ".join(args(tmp_path / "other", "--resume")), code=1).error
    assert "cannot resume" in said and "vectors of " in said


# ---------------------------------------------------------------- planted knowledge

THINGS, TAKEN = 16, 7  # of a kind, and of a user
LLM2BERT4REC = "start --eta 5 --model bert4rec --history 8 --epochs 16"


@pytest.fixture(scope="module")
def kinds(make_data, tmp_path_factory):
    """90 users who take seven things of one kind each, of 30 kinds: three users a kind, so that an
    item occurs once or twice, and what belongs together stands in the titles only."""
    rng, rows = np.random.default_rng(3), []
    for u in range(90):
        some = u % 30 * THINGS + rng.permutation(THINGS)[:TAKEN] + 1
        rows += [(u, int(i), 10 * t + u % 7) for t, i in enumerate(some)]
    titles = {i: f"kind{(i - 1) // THINGS} {i}" for i in range(1, 30 * THINGS + 1)}
    split = ("--split", "leave-one-out")
    return make_data(tmp_path_factory.mktemp("kinds"), rows, titles, "kinds", *split)


@pytest.mark.parametrize("way", ["fold --eta 20", "adaptor", "start", "alphafuse", LLM2BERT4REC])
def test_what_only_titles_tell_is_learnt_with_them_and_not_with_others(
    way, kinds, run, on_cpu, tmp_path
):
    base = f"--dataset {kinds.folder} --width 32 --batch 32 --dropout 0.1 --lr 5e-3 --epochs 10"
    found = {}
    for name, options in (("real", ""), ("control", "--permute-text")):
        more = f"--text tfidf --text-in {way} {options} --out {tmp_path}/{name}"
        found[name] = run(train_backbone.main, f"{base} {more}").json["test_full_ndcg@10"]
    assert found["real"] > 0.2 and found["real"] > 1.8 * found["control"], found


# ---------------------------------------------------------------- refusals


def with_a_hole() -> np.ndarray:
    Z = skewed()
    Z[7, 2] = np.nan
    return Z


@pytest.mark.parametrize(
    "array, says",
    [
        (skewed()[:50], "has shape (50, 12), expected 60 rows"),
        (skewed(n=120), "it belongs to other data"),
        (skewed()[:, 0], "has shape (61,)"),
        (with_a_hole(), "holds numbers that are not finite"),
        (np.full((60, 4), 1e300), "holds numbers that are not finite"),
        (np.array([["a"]] * 60), "holds no numbers"),
        (np.ones((60, 4)), "the same vector"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(array, says, toy, refused, tmp_path):
    np.save(tmp_path / "own.npy", array)
    where = f"--dataset {toy.folder} --out {tmp_path}/x"
    assert says in refused(train_backbone.main, f"{where} --text {tmp_path}/own.npy")


@pytest.mark.parametrize(
    "options, says",
    [
        ("--text-in start", "--text-in is about titles' vectors, but there are none"),
        ("--text-whiten .5", "--text-whiten is about titles' vectors"),
        ("--permute-text", "--permute-text is about titles' vectors"),
        ("--teacher a/b --lam 1 --eta 0 --text-width 4", "--text-width is about"),
        ("--no-offset", "--no-offset leaves the titles' vectors only"),
        ("--text tfidf --text-in start --no-offset", "--no-offset has nothing to leave out"),
        ("--text tfidf --text-in alphafuse --text-width 4", "leave --text-width 4 out"),
        ("--text nothing/here", "nothing/here is no run folder"),
        ("--text tfidf --text-graph 1 --text-whiten .5", "leave one of the two out"),
        ("--cold-out", "--cold-out ranks items that training never saw by their text"),
        ("--text tfidf --cold-out --loss bce", "--loss is bce; use --loss ce"),
        ("--text tfidf --cold-out --dros .5", "--dros keeps the scores of all items small"),
        ("--text tfidf+", "--text has a + with nothing beside it"),
        ("--text nothing/here --folds 2", "the LM of nothing/here has learnt from all"),
        ("--text /no/such.npy", "/no/such.npy cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(options, says, toy, refused, tmp_path):
    where = f"--dataset {toy.folder} --out {tmp_path}/x"
    assert says in refused(train_backbone.main, f"{where} {options}")
