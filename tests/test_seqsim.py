"""seqsim.py: LLMSEQSIM, the items whose titles are most like those of a history."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import metrics_of
from safetensors.torch import load_file

import evaluate
import train_backbone
from delrec import Recommender
from delrec.backbone import models
from delrec.backbone.seqsim import DECAYS, set_to
from delrec.evaluation.rows import note_of
from delrec.lm.items import item_vectors
from delrec.lm.lists import has_learnt, said_of_folds
from delrec.runtime import load_run
from delrec.serving.commands import command_of
from delrec.serving.shared import stop_unless_shaped

KINDS, THINGS = 20, 6
RUN = "--model seqsim --text tfidf"


@pytest.fixture(scope="module")
def walks(make_data, tmp_path_factory):
    """60 users who go from kind to kind, and take two things of each, one after the other. A thing
    is taken three times, so only its title tells what it is like, and only the newest counts."""
    rng, rows = np.random.default_rng(4), []
    for u in range(60):
        t = 0
        for kind in rng.permutation(KINDS)[:6]:
            for thing in rng.permutation(THINGS)[:2]:
                rows.append((u, int(kind * THINGS + thing + 1), t := t + 1))
    titles = {i: f"kind{(i - 1) // THINGS} {i}" for i in range(1, KINDS * THINGS + 1)}
    split = ("--split", "leave-one-out")
    return make_data(tmp_path_factory.mktemp("walks"), rows, titles, "walks", *split)


@pytest.fixture(scope="module")
def real(made):
    """A run of the titles as they are, and what it printed."""
    return made("real")


@pytest.fixture(scope="module")
def made(walks, run, tmp_path_factory):
    """made(options) -> a run on these walks and what it printed."""
    place = tmp_path_factory.mktemp("made")

    def make(name, options=""):
        out = place / name
        said = run(train_backbone.main, f"--dataset {walks.folder} {RUN} --out {out} {options}")
        return out, said

    return make


def test_like_titles_come_next_and_with_other_titles_they_do_not(real, made):
    (out, said), (control, _) = real, made("control", "--permute-text")
    found = [metrics_of(folder)["test"]["full"]["hr@5"] for folder in (out, control)]
    assert found[0] > 0.9 and found[1] < 0.2, found
    config = json.loads((out / "config.json").read_text())
    # on these walks whoever weighs old items as the newest is lost
    assert config["decay"] in ("last", "1/a^2") and config["similarity"] == "cosine"
    assert len(config["tried"]) == 18
    assert config["tried"]["cosine, mean"] < config["tried"]["cosine, last"]
    assert f"chosen on validation among 18: cosine, w_a = {config['decay']}" in said.stdout


def test_the_state_is_the_weighted_mean_of_the_titles():
    model = models.build("seqsim", 9, SimpleNamespace(history=4, width=3, dropout=0))
    z_IE = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    z_IE[0] = 0
    with torch.no_grad():
        model.take_text(z_IE)
        set_to(model, z_IE, 2, DECAYS["1/a"](np.arange(1.0, 5)))
    unit_IE = torch.nn.functional.normalize(z_IE, dim=1)
    x_E = (unit_IE[7] + unit_IE[2] / 2 + unit_IE[5] / 3) / (1 + 1 / 2 + 1 / 3)
    score_I = models.score(model, [[0, 5, 2, 7]])[0]
    torch.testing.assert_close(score_I[1:], unit_IE[1:] @ x_E)
    # a longer history is read as far as the window goes, an empty one says nothing
    assert torch.equal(
        models.score(model, [[1, 1, 3, 5, 2, 7]]), models.score(model, [[3, 5, 2, 7]])
    )
    assert not models.score(model, [[0, 0, 0, 0]])[0, 1:].any()
    # nor does the padding beside a longer one
    beside = models.score(model, [[0, 0, 0, 7], [3, 5, 2, 7]])[0]
    torch.testing.assert_close(beside, models.score(model, [[7]])[0])
    # a state after each item is the last one of the history up to it
    every_BLE, seq_BL = model(torch.tensor([[3, 5, 2, 7]])), [[3, 5, 2]]
    torch.testing.assert_close(every_BLE[:, 2], models.state(model, seq_BL))


def test_a_run_is_as_every_backbone_s(real, walks, run):
    out, _ = real
    names = ["topk_train.npy", "topk_val.npy", "topk_test.npy", "full_val.npy", "full_test.npy"]
    names += [f"scores_{split}_15.npy" for split in ("train", "val", "test")]
    assert all((out / name).exists() for name in names)
    assert "no training, cosine, weights" in note_of(load_run(out))
    table = run(evaluate.main, f"--ckpt {out}")
    assert "title-similarity" in table.stdout
    last = walks.items[walks.test[0]]
    kind = walks.titles[last].split()[0]
    [answer] = [Recommender.load(out).recommend(ids=[[str(last)]], top=5)]
    assert all(kind in item.title for item in answer[0].items)
    assert "trained on none of them" in said_of_folds(out, 0, has_learnt(load_run(out)))
    # stages on vectors read the titles', and a shared copy would be opened
    assert item_vectors(out, walks.n_items).shape == (
        walks.n_items + 1,
        load_file(out / "model.safetensors")["item.weight"].shape[1] + 1,
    )
    stop_unless_shaped(load_run(out), walks)


def test_a_card_s_command_makes_the_same_run(made, run, walks):
    out, _ = made("reduced", "--text-width 12 --text-whiten .5 --history 7")
    words = command_of(load_run(out))
    assert "--lr" not in words and "--loss" not in words and "--text-whiten" in words
    flags = " ".join(words[4:-2])
    again = out.with_name("again")
    run(train_backbone.main, f"--dataset {walks.folder} {flags} --out {again}")
    one, two = (load_file(folder / "model.safetensors") for folder in (out, again))
    assert one["item.weight"].shape == (walks.n_items + 1, 12)
    assert all(torch.equal(one[key], two[key]) for key in one | two)


@pytest.mark.parametrize(
    "options, says",
    [
        ("--lr .1", "--lr means nothing with --model seqsim, which is not trained"),
        ("--ema .9", "--ema means nothing with --model seqsim"),
        ("--folds 2", "--folds means nothing with --model seqsim"),
        ("--teacher x", "--teacher means nothing with --model seqsim"),
        ("--text-in start", "--text-in means nothing with --model seqsim"),
        ("--text tfidf --width 9", "--width means nothing"),
        ("--text tfidf --loss bce", "--loss means nothing"),
        ("", "--model seqsim is made of titles' vectors, and was given none"),
        ("--permute-text", "--model seqsim is made of titles' vectors, and was given none"),
    ],
)
def test_what_means_nothing_is_refused(options, says, walks, refused, tmp_path):
    where = f"--dataset {walks.folder} --out {tmp_path}/x --model seqsim"
    assert says in refused(train_backbone.main, f"{where} {options}")


def test_nothing_goes_on_from_it(real, walks, refused, tmp_path):
    out, _ = real
    where = f"--dataset {walks.folder} --out {tmp_path}/x --from {out}"
    assert "--from means nothing with --model seqsim" in refused(train_backbone.main, where)
