"""finetune.py --residual where titles are scored: they are added to the backbone's scores."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import log_of
from safetensors.torch import load_file, save_file
from shared_runs import uploaded
from stopped_runs import goes_on_to_the_last_bit

import evaluate
import finetune
import train_backbone
from delrec import Recommender
from delrec.backbone import models
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import candidates, histories, raw_item_ids
from delrec.lm import offsets
from delrec.lm.ranker import open_run, score_samples
from delrec.lm.samples import Example
from delrec.runtime import load_run

CPU = torch.device("cpu")
N = 40
SMALL = "--history 6 --batch 16 --micro 16 --val-samples 0 --init-r 4 --target-r 2 --dropout 0"
SMALL += " --soft-prompt none --no-calibrate"
STILL = "--samples 80 --evals 1 --lr 1e-9 --lr-residual 1e-9 --weight-decay 0"
LEARN = "--samples 1920 --evals 3 --lr 1e-2"


@pytest.fixture(scope="module")
def shop(make_data, tmp_path_factory):
    """90 users of 10 steps among 40 items, whose titles are of two words; mostly the first word
    stays, and which item of that word comes next is chance."""
    rng, rows = np.random.default_rng(0), []
    for u in range(90):
        kind = int(rng.integers(4))
        for t in range(10):
            if rng.random() < 0.1:
                kind = int(rng.integers(4))
            rows.append((u, 10 * kind + int(rng.integers(10)) + 1, u + 10 * t))
    words = ("red", "blue", "green", "black")
    titles = {i: f"{words[(i - 1) // 10]} {i}" for i in range(1, N + 1)}
    return make_data(tmp_path_factory.mktemp("shop"), rows, titles, "shop")


@pytest.fixture(scope="module")
def young(shop, run, tmp_path_factory):
    """A backbone that was trained too little, with folds; its window is longer than the LM's."""
    out = tmp_path_factory.mktemp("young") / "sasrec"
    flags = "--epochs 2 --patience 9 --width 16 --batch 16 --history 8 --folds 3"
    run(train_backbone.main, f"--dataset {shop.folder} --out {out} {flags}")
    return out


@pytest.fixture(scope="module")
def command(shop, young, decoder):
    """command(options) -> finetune.py's options on titles, without --out."""
    return lambda options: (
        f"--dataset {shop.folder} --llm {decoder} --backbone {young} {SMALL} {options}"
    )


def best_of(folder) -> float:
    """The best NDCG@10 that a run found on validation."""
    return max(line["val_ndcg@10"] for line in log_of(folder) if "val_ndcg@10" in line)


# ---------------------------------------------------------------- what it begins as


@pytest.mark.parametrize("more", ["", "--input hybrid", "--verbalizer mean", "--show --orders 2"])
def test_it_begins_as_its_backbone(more, tune, young, shop, alone, on_cpu):
    folder = tune(f"still {more}".replace(" ", ""), f"--residual backbone {STILL} {more}")
    r, _ = open_run(load_run(folder, shop), shop, CPU, scores_of=history_scorer)
    own_nC = np.load(young / "scores_test_15.npy")
    score_nC = score_samples(r, "test", np.arange(len(own_nC)), 15, alone)
    np.testing.assert_allclose(score_nC, own_nC, atol=1e-3)
    assert load_run(folder).best_step == 0
    assert load_run(folder).verbalizer_weight == 0 and load_run(folder).residual_weight == 1


@pytest.mark.parametrize("kind", ["backbone", "permuted"])
def test_training_samples_are_told_what_their_fold_s_model_says(kind, young, shop, load):
    lm = load("decoder")
    cfg = SimpleNamespace(input="titles", residual=kind, residual_dropout=0, seed=0)
    cand_nC = candidates(shop, "train", 15).astype(np.int64)
    none = np.zeros(1, int)
    batch = [
        Example(none, none, cand_C, 0, 1, none, np.array([place]), none, 0)
        for cand_C, place in zip(cand_nC, shop.train)
    ]
    v_nC = torch.randn(cand_nC.shape)
    try:
        assert offsets.beside(lm, v_nC, cand_nC, batch) is v_nC
        offsets.add_backbone(lm, cfg, shop, (young, history_scorer), torch.nn.ModuleDict())
        with torch.no_grad():
            lm.offset.maps["verbalizer"].weight.fill_(0.5)
            y_nC = (offsets.beside(lm, v_nC, cand_nC, batch) - 0.5 * v_nC).numpy()
    finally:
        lm.offset = None
    apart_nC = y_nC - np.load(young / "scores_train_15.npy")
    apart_n = np.abs(apart_nC - apart_nC.mean(1, keepdims=True)).max(1)
    # the same but for one number a row; the states are fp16
    assert apart_n.max() < 1e-3 if kind == "backbone" else np.median(apart_n) > 0.1


# ---------------------------------------------------------------- what it learns


def test_an_lm_on_top_of_its_backbone_beats_both(tune):
    on, alone = (tune(name, f"{LEARN} {flags}") for name, flags in (
        ("on", "--residual backbone"), ("alone", "")
    ))  # fmt: skip
    backbone = log_of(on)[0]["val_ndcg@10"]
    assert best_of(on) > max(backbone, best_of(alone)) + 0.02
    run, kept = load_run(on), load_file(on / offsets.FILE)
    assert run.verbalizer_weight == pytest.approx(float(kept["verbalizer.weight"]), abs=1e-4)
    assert abs(run.verbalizer_weight) > 0.05  # an untrained LM may take either sign


# ---------------------------------------------------------------- killed, served, refused


def test_a_killed_run_goes_on_to_the_last_bit(command, on_cpu, tmp_path, monkeypatch):
    options = "--residual backbone --residual-dropout .3 --samples 160 --evals 1"
    goes_on_to_the_last_bit(finetune.main, command(options), tmp_path, monkeypatch, after=6)


def test_its_answers_are_those_of_the_table_and_new_items_leave_them_alone(
    tune, shop, run, fp32, on_cpu
):
    folder = tune("on", f"{LEARN} --residual backbone")
    with fp32():
        run(evaluate.main, f"--ckpt {folder} --val-samples 10")
    assert "added to its backbone's scores" in (folder / "evaluation" / "table.txt").read_text()
    stored = np.load(folder / "scores_test_15.npy")
    rec, ids = Recommender.load(folder, pool=0), raw_item_ids(shop)
    old = histories(shop, shop.test[[3]], 20)[0]
    asked = [ids[i] for i in old[old > 0]]
    score = {x.id: x.score for x in rec.recommend(ids=asked, top=N - len(set(asked))).items}
    of_cand = {ids[i]: s for i, s in zip(candidates(shop, "test", 15)[3], stored[3])}
    both = sorted(set(score) & set(of_cand))
    assert len(both) > 5
    assert sorted(both, key=score.get) == sorted(both, key=of_cand.get)
    rec.add_items({"new": "red 77"})
    after = {x.id: x.score for x in rec.recommend(ids=asked, top=N).items}
    assert "new" in after and {i: after[i] for i in score} == pytest.approx(score, abs=1e-5)


def test_its_export_ranks_its_backbone_s_lists_as_the_backbone_does(
    tune, young, shop, run, alone, on_cpu
):
    folder = tune("still", f"--residual backbone {STILL}")
    run(evaluate.main, f"--ckpt {folder} --export --export-k 5")
    lists, found = np.load(young / "topk_train.npy"), np.load(folder / "export" / "topk.npy")
    old_nL = np.stack(list(histories(shop, shop.train, 20)))
    y_nI = models.score(models.load(young), old_nL).detach().numpy()
    for list_K, found_k, y_I, old_L in zip(lists, found, y_nI, old_nL):
        new = [i for i in list_K[:14] if i not in old_L]  # as many as it was trained to rank
        assert list(found_k) == sorted(new, key=lambda i: -y_I[i])[:5]


def test_what_cannot_be_meant_is_one_sentence(command, tune, refused, on_cpu, tmp_path):
    def says(options):
        return refused(finetune.main, f"{command(options)} --samples 96 --out {tmp_path}/x")

    text = says("--residual backbone --loss catalogue --verbalizer mean")
    assert "--loss catalogue asks for others" in text
    assert "--input is titles" in says("--residual backbone --residual-counts")
    folder = tune("still", f"--residual backbone {STILL}")
    save_file({"residual.weight": torch.ones(1, 1)}, folder / offsets.FILE)
    assert "does not hold two weights" in refused(evaluate.main, f"--ckpt {folder}")
    (folder / offsets.FILE).unlink()
    assert "lacks offset.safetensors" in refused(evaluate.main, f"--ckpt {folder}")


def test_a_shared_run_answers_as_before(tune, decoder, run, on_cpu, tmp_path):
    folder = tune("on", f"{LEARN} --residual backbone")
    home = shutil.copytree(folder, tmp_path / "home")
    run(evaluate.main, f"--ckpt {home} --card")
    uploaded(home, tmp_path / "on")
    here, away = (Recommender.load(x, llm=decoder) for x in (home, tmp_path / "on"))
    asked = ["red 3", "red 10", "blue 11"]
    assert away.recommend(asked, top=10).items == here.recommend(asked, top=10).items
