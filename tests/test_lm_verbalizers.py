"""Scores of titles by every verbalizer against the unmodified Hugging Face model."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_cases import ALL, SETTINGS, naive, opened, rank_with, windows
from scripts import sentence

import finetune
from delrec.lm import samples, verbalizers
from delrec.lm.ranker import (
    make_ranker,
    score_catalogue,
    score_tails,
)
from delrec.lm.reading import read_prefix
from delrec.lm.text import encode
from delrec.lm.verbalizers import letter_ids, loss_over_all, verbalise

pytest_plugins = ["lm_fixtures"]


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "first"])
def test_one_pass_scores_the_catalogue_as_its_candidates(load, kind, toy, alone, verbalizer):
    r = rank_with(load, kind, toy, k=3, verbalizer=verbalizer)
    tail = r.prompts.history(np.array([4, 9, 2]))[0]
    other = r.prompts.history(np.array([7]))[0]
    got = score_catalogue(r, read_prefix(r.lm, r.prompts.prefix, r.P), [tail, other])
    assert got.shape == (2, 61) and (got[:, 0] == -np.inf).all()
    np.testing.assert_allclose(
        got[:, 1:],
        score_tails(r, [tail, other], np.tile(np.arange(1, 61), (2, 1)), alone),
        rtol=1e-5,
        atol=1e-5,
    )


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "first"])
@pytest.mark.parametrize("cells", [2**24, 1])  # all rows at once, one at a time
def test_the_loss_over_all_items_is_the_cross_entropy_of_every_item_s_score(
    load, kind, toy, verbalizer, cells, monkeypatch
):
    monkeypatch.setattr(verbalizers, "CELLS", cells)
    r = rank_with(load, kind, toy, verbalizer=verbalizer)
    torch.manual_seed(0)
    x = torch.randn(5, r.lm.head_VD.shape[1], requires_grad=True)
    target = torch.tensor([1, 7, toy.n_items, 7, 33])
    every = np.tile(np.arange(1, toy.n_items + 1), (5, 1))
    want = F.cross_entropy(
        verbalise(r.lm, x, every, r.titles, verbalizer), target - 1, reduction="sum"
    )
    got = loss_over_all(r.lm, x, target, r.titles, verbalizer)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got, x), torch.autograd.grad(want, x), rtol=1e-4, atol=1e-5
    )


@ALL
@pytest.mark.parametrize(
    "verbalizer, show, k",
    [
        ("mean", True, 4),
        ("mean", False, 0),
        ("first", False, 3),
        ("letter", True, 3),
        ("likelihood", False, 4),
        ("likelihood", True, 0),
    ],
)
def test_scores_equal_the_unmodified_model(load, plain, kind, toy, verbalizer, show, k, alone):
    r = rank_with(load, kind, toy, k=k, show=show, verbalizer=verbalizer)
    old, cand = windows(toy, 3)
    cand = cand[:, :4]
    tails = [r.prompts.history(h, c)[0] for h, c in zip(old, cand)]
    got = score_tails(r, tails, cand, alone, tokens=250)
    with torch.no_grad():
        want = np.stack([naive(plain(kind), r, t, c, r.P).numpy() for t, c in zip(tails, cand)])
    assert want.std() > 0.05  # the scores say something
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("call", [verbalise, verbalizers.verbalise_all, loss_over_all])
def test_a_verbalizer_without_a_score_of_its_own_does_not_score_as_another(load, toy, call):
    r = rank_with(load, "decoder", toy)
    x_BD, cand_BC = torch.randn(2, r.lm.head_VD.shape[1]), np.array([[1, 2], [3, 4]])
    given = {verbalise: [cand_BC], loss_over_all: [torch.tensor([1, 3])]}.get(call, [])
    assert "median has no score here" in sentence(call, r.lm, x_BD, *given, r.titles, "median")


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "likelihood"])
def test_a_score_does_not_depend_on_the_other_candidates_unless_they_are_shown(
    load, kind, toy, verbalizer, alone
):
    r = rank_with(load, kind, toy, verbalizer=verbalizer)
    (h, *_), (c, *_) = windows(toy)
    tail = r.prompts.history(h, c)[0]
    whole = score_tails(r, [tail], c[None], alone)[0]
    one = [score_tails(r, [tail], np.array([[i]]), alone)[0, 0] for i in c]
    np.testing.assert_allclose(whole, one, rtol=1e-5, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(c))
    np.testing.assert_allclose(
        score_tails(r, [tail], c[None, order], alone)[0], whole[order], rtol=1e-5, atol=1e-5
    )


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "likelihood"])
def test_a_prompt_at_the_lm_s_limit_can_still_be_scored(load, kind, toy, verbalizer, alone):
    # a title read from n masks, or after the prompt, takes more places than the prompt itself
    limit = min(load(kind).max_tokens, 1022)  # T5 has none of its own
    r = rank_with(load, kind, toy, verbalizer=verbalizer, max_tokens=limit)
    longest = int(np.diff(r.titles.ptr).argmax())
    fits = [r.prompts.history(np.resize(np.arange(first, 61), 400))[0] for first in range(1, 20)]
    tail = max(fits, key=len)
    room = int(np.diff(r.titles.ptr).max()) + len(r.lm.sep)  # kept free for that title
    assert limit - 4 <= len(r.prompts.prefix) + len(tail) + len(r.lm.end) + room <= limit
    assert np.isfinite(score_tails(r, [tail], np.array([[longest, longest]]), alone)).all()


def test_more_candidates_than_letters_are_refused(load):
    assert len(letter_ids(load("decoder"), 26)) == 26
    says = sentence(letter_ids, load("decoder"), 27)
    assert "26 letters" in says and "27 candidates" in says
    broken = SimpleNamespace(name="odd", tok=lambda text, **_: {"input_ids": [1, 2]}, special=set())
    assert "does not keep the letters" in sentence(letter_ids, broken, 5)


# ---------------------------------------------------------------- the loss over all titles


@pytest.mark.parametrize("n_sep", [1, 3])
def test_every_token_of_the_history_and_the_truth_counts_alike(n_sep, decoder, plain, toy):
    m = opened(decoder, checked=False)
    m.sep = encode(m, "\n") * n_sep  # of several tokens, as Llama 2 has it
    r = make_ranker(m, toy, SETTINGS | {"verbalizer": "likelihood"}, None)
    cfg = SimpleNamespace(loss="titles", verbalizer="likelihood", input="titles", curriculum=None)
    vars(cfg).update(C=15, history=10, seed=0, pool="stored", orders=1, drop_items=0)
    seen = SimpleNamespace(n_reads=np.ones(3, int))
    seen.prompts = lambda r, numbers: samples.examples(r, cfg, numbers, numbers < 0, numbers)
    batch, wanted, n_tokens = samples.batch_of(seen, r, cfg, np.arange(3)), 0.0, 0
    for e in batch.examples:
        behind = np.append(r.titles.of(e.target[0]), m.sep)
        told = np.concatenate([r.prompts.prefix, e.tail[:-1], behind])
        places = np.append(len(r.prompts.prefix) + e.at, np.arange(-len(behind), 0))
        with torch.no_grad():
            logits = plain("decoder")(torch.from_numpy(told)[None]).logits[0]
        log_p = logits[places - 1][:, r.titles.vocab].log_softmax(1)
        wanted -= log_p[np.arange(len(places)), r.titles.index[told[places]]].sum()
        n_tokens += len(places)
    losses = finetune.ByTitles(r, cfg).losses(batch.examples)
    assert losses["titles"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert batch.tokens == n_tokens
