"""text.py: a title that training never saw changes nothing, permuted vectors, vectors that say
nothing or are large; flags that would be left out.
"""

import re
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch

import train_backbone
from delrec.backbone import folds, text
from delrec.data.counts import seen_in_training
from delrec.evaluation.rows import note_of
from delrec.serving.commands import said_value


def test_tfidf_knows_no_word_of_a_title_that_training_never_saw(toy):
    data = replace(toy, train=toy.train[:60])
    new = np.setdiff1d(np.arange(1, 61), seen_in_training(data))
    other = replace(data, titles=[*data.titles])
    other.titles[new[0]] = f"wholly other words beside {data.titles[new[1]]}"
    before, after = (text.tfidf_vectors(d) for d in (data, other))
    kept = np.arange(61) != new[0]
    assert np.array_equal(before[kept], after[kept])
    assert not np.allclose(before[new[0]], after[new[0]])


def test_tfidf_of_a_fold_is_that_of_its_own_items(toy):
    cfg = SimpleNamespace(text="tfidf", teacher=None, eta=1.0, text_width=None)
    found = text.read_text(cfg, toy, None, None)
    fold = replace(toy, train=toy.train[:60])
    assert np.array_equal(found.vectors(fold)[0], text.tfidf_vectors(fold))
    assert not np.array_equal(found.vectors(fold)[0], found.vectors(toy)[0])


def test_reading_titles_leaves_the_model_s_own_draws(toy):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    text.tfidf_vectors(toy)
    assert torch.equal(torch.rand(3), want)


def test_no_item_keeps_its_own_vector_and_folds_permute_as_the_whole_does(toy):
    Z = np.arange(61.0)[:, None]

    def given(trained):
        return text.permuted(Z, trained)[:, 0]

    whole = seen_in_training(toy)
    for n in (2, 3, 20, 60):
        assert (given(whole[:n])[1:] != np.arange(1, 61)).sum() >= 59  # one item of 60 is alone
    fold_U = folds.folds_of_users(toy.n_users, 5, 0)
    some = seen_in_training(folds.without(toy, fold_U, 0))
    few = np.setdiff1d(whole, whole[[3, 30]])
    assert (given(few) == given(whole)).mean() > 0.85 and len(some) <= len(whole)


@pytest.mark.parametrize("size", [1e25, 1e-30])
def test_the_size_of_vectors_is_nothing(size):
    Z = np.random.default_rng(0).normal(size=(61, 5)).astype(np.float32)
    trained = np.arange(1, 41)
    want = text.centred(Z, trained)
    np.testing.assert_allclose(text.centred(Z * np.float32(size), trained), want, atol=1e-5)


def test_like_vectors_are_refused_though_rounding_leaves_some_dust():
    Z = np.tile(np.arange(1, 9, dtype=np.float32) / 7, (61, 1))
    with pytest.raises(click.ClickException, match="the same vector"):
        text.centred(Z, np.arange(1, 38))


@pytest.mark.parametrize(
    "options, says",
    [
        ("--text tfidf --text-width 3000", "is more than the .* numbers that a title has"),
        ("--model bert4rec --history 1", "leaves BERT4Rec no item to read"),
        ("--model bsarec --one-target", "--one-target changes nothing with --model bsarec"),
        ("--model bert4rec --one-target", "--one-target is about models that predict the next"),
        ("--contrast-tau .1", "--contrast-tau changes nothing without --contrast"),
        ("--negatives 9", "--negatives changes nothing without --loss sampled or gbce"),
        ("--lam .1", "--lam changes nothing without --teacher"),
        ("--eta .3", "--eta changes nothing without --text"),
        ("--text tfidf --list-loss sigmoid", "--list-loss changes nothing without --teacher and"),
        ("--teacher a/b --text tfidf", "--teacher changes nothing .*; give --lam, or leave --tea"),
        ("--teacher a/b --text tfidf --lam 0", "--teacher changes nothing beside --text tfidf w"),
        ("--teacher a/b --preset beauty", "beside --text tfidf.minilm without --lam, .* give"),
        ("--teacher tfidf --text minilm", "vectors are that text's; leave --teacher out"),
        ("--teacher a/b --text tfidf --model bert4rec", "that text's; leave --teacher out"),
        ("--teacher a/b --eta 0", "--eta 0 and without --lam; raise --eta, give --lam, or leave"),
        ("--teacher a/b --eta 0 --lam 0", "--teacher changes nothing with --eta 0 and without"),
        (
            "--teacher tfidf --eta 0",
            "--teacher changes nothing with --eta 0; raise --eta, or leave",
        ),
        ("--teacher a/b --eta 0 --model bert4rec", "with --eta 0; raise --eta, or leave --teacher"),
        (
            "--text tfidf --eta 0",
            "--text tfidf changes nothing with --eta 0; raise --eta, or leave",
        ),
        ("--teacher a/b --lam 1 --text tfidf --eta 0", "--text tfidf changes nothing with --eta 0"),
    ],
)
def test_what_would_be_left_out_without_a_word_is_refused(options, says, toy, refused, tmp_path):
    where = f"--dataset {toy.folder} --out {tmp_path}/x --epochs 0"
    assert re.search(says, refused(train_backbone.main, f"{where} {options}"))


def test_a_table_says_what_a_backbone_learnt_by_and_of():
    made = dict(stage="train_backbone", loss="bce", dros=0.5, contrast=0.0, one_target=True)
    made |= dict(ema=0.9)
    made |= dict(
        text="tfidf+own/titles.npy", text_in="fold", text_whiten=0.5, eta=2.0, permute_text=True
    )
    note = note_of(SimpleNamespace(**made))
    begins = "bce loss, --dros 0.5, mean of the steps, 0.9, a window a target, titles' vectors: "
    assert note.startswith(begins)
    assert "tfidf+titles.npy (fold" in note
    assert note.endswith(", whiten 0.5, eta 2), permuted") and "contrast" not in note
    for tau, told in ((0.5, ""), (0.2, " (tau 0.2)")):
        note = note_of(SimpleNamespace(**made | dict(contrast=0.1, contrast_tau=tau)))
        assert f"--dros 0.5, --contrast 0.1{told}, mean of the steps" in note


def test_a_default_may_be_typed_as_a_card_s_command_does(toy, run, on_cpu, tmp_path):
    usual = "--contrast-tau .5 --negatives 1024 --lam 0 --eta 1 --list-loss softmax"
    where = f"--dataset {toy.folder} --out {tmp_path}/run --epochs 0 --width 8"
    run(train_backbone.main, f"{where} {usual}")


def test_a_card_s_command_names_every_source_of_the_text():
    for kept, said in (
        ("tfidf", "tfidf"),
        ("tfidf+/shop/runs/toy/slmrec", "tfidf+toy/slmrec"),
        ("minilm+own/titles.npy", "minilm+titles.npy"),
    ):
        assert said_value(SimpleNamespace(), "text", kept) == said
    assert said_value(SimpleNamespace(), "teacher", "/shop/runs/toy/slmrec") == "toy/slmrec"
