"""finetune.py --residual-counts: a run that begins as its backbone fused with co-occurrence and
title similarity.
"""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import edit_config, log_of, metrics_of, same_run
from safetensors.torch import load_file
from shared_runs import uploaded
from stopped_runs import goes_on_to_the_last_bit

import evaluate
import finetune
import train_backbone
from delrec import Recommender
from delrec.backbone.ranking import history_scorer
from delrec.data.counts import LAST, cooccurrence
from delrec.data.floors import fused, similarity_to, standard
from delrec.data.prepared import batch_of, candidates, histories, raw_item_ids, users
from delrec.lm import counted, items, residual, windows
from delrec.lm.ranker import open_run, score_and_rank, score_samples
from delrec.metrics import compare, metrics
from delrec.runtime import load_run
from delrec.serving.ranking import UNSEEN

CPU = torch.device("cpu")
N, KINDS = 40, ["Harbour", "Winter", "Signal", "Velvet", "Orchard", "Letter", "Carnival", "River"]
USERS = 520
ODD = (17, 33)  # two items that nobody has one behind the other but the last user
YOUNG = "--model sasrec --epochs 2 --patience 9 --width 16 --batch 32 --history 8 --folds 2"
SMALL = (
    "--input ids --history 6 --batch 16 --micro 16 --val-samples 120 --init-r 4 --target-r 2 "
    "--dropout 0 --soft-prompt none --residual backbone"
)
STILL = "--samples 80 --evals 1 --lr 1e-9 --lr-maps 1e-9 --lr-residual 1e-9 --weight-decay 0"
LEARN = "--samples 320 --evals 1 --lr 3e-3 --lr-maps 3e-3 --lr-residual 1e-4"


def title_similarity(data, samples, cand_nC):
    """The floor of the tables."""
    return similarity_to(data, histories(data, samples, LAST), cand_nC)


@pytest.fixture(scope="module")
def pairs(make_data, tmp_path_factory):
    """520 users of 8 steps: items go in pairs, and the first of the next pair is mostly of the kind
    that the titles of an earlier one name.
    """
    rng, rows = np.random.default_rng(0), []
    ring = rng.permutation(N) + 1
    ring = ring[~np.isin(ring, ODD)]
    other = {a: b for two in ring.reshape(-1, 2) for a, b in (two, two[::-1])}
    for u in range(USERS):
        a, steps = int(rng.choice(ring)), []
        while len(steps) < 10:
            steps += [a, int(other[a])]
            alike = [i for i in ring if i % 8 == a % 8]
            a = int(rng.choice(alike if rng.random() < 0.7 else ring))
        begin = u % 2  # the last item is the second of a pair, or the first
        rows += [(u, i, u + 10 * t) for t, i in enumerate(steps[begin : begin + 8])]
    odd = [*ODD, 1, 2, 3, 4]
    rows += [(USERS, i, USERS + 10 * t) for t, i in enumerate(odd)]
    titles = {i: f"{KINDS[i % 8]} {i}" for i in range(1, N + 1)}
    folder = tmp_path_factory.mktemp("pairs")
    return make_data(folder, rows, titles, "pairs", "--split", "leave-one-out")


@pytest.fixture(scope="module")
def young(pairs, run, tmp_path_factory):
    """A SASRec that was trained too little, with folds; its window is longer than the LM's, and
    shorter than what counts read.
    """
    out = tmp_path_factory.mktemp("young") / "sasrec"
    run(train_backbone.main, f"--dataset {pairs.folder} --out {out} {YOUNG}")
    return out


@pytest.fixture(scope="module")
def command(pairs, young, decoder):
    """command(options) -> finetune.py's options on the young backbone, without --out."""
    where = f"--dataset {pairs.folder} --llm {decoder} --backbone {young} {SMALL}"
    return lambda options: f"{where} {options}"


@pytest.fixture(scope="module")
def still(tune):
    """A run in which nothing moved."""
    return tune("still", f"--residual-counts {STILL}")


@pytest.fixture(scope="module")
def learnt(tune):
    return tune("learnt", f"--residual-counts {LEARN}")


def opened(folder, data):
    """A run as a ranker."""
    return open_run(load_run(folder, data), data, CPU, scores_of=history_scorer)[0]


def weights_of(folder) -> np.ndarray:
    """The weights of late fusion that a run's numbers are."""
    g_2 = load_file(folder / "items.safetensors")["counts.weight"][0].numpy()
    return g_2 / (1 + g_2)


def late_fusion(data, young, split, which, w_2) -> np.ndarray:
    """The scores (n, 15) of backbone + co-occurrence + title similarity, as tables fuse rows."""
    samples, cand_nC = getattr(data, split)[which], candidates(data, split, 15, which)
    f_nC = np.load(young / f"scores_{split}_15.npy")[which]
    for floor, w in zip((cooccurrence, title_similarity), w_2):
        f_nC = fused(f_nC, floor(data, samples, cand_nC), w)
    return f_nC


def quality(score_nC, data, split, which) -> float:
    """NDCG@10 among the candidates."""
    cand_nC = candidates(data, split, 15, which)
    is_target_nC = cand_nC == data.items[getattr(data, split)[which]][:, None]
    return metrics(*compare(score_nC, is_target_nC))["ndcg@10"].mean()


# ---------------------------------------------------------------- what it begins as


def test_it_begins_as_the_late_fusion_of_tables(still, young, pairs, alone, run, on_cpu, tmp_path):
    which, w_2 = np.arange(500), weights_of(still)
    assert len(pairs.test) > 500 and (w_2 > 0).all()
    # the weights are those that evaluate.py chooses on as many samples
    copies = [shutil.copytree(young, tmp_path / "sasrec"), shutil.copytree(still, tmp_path / "on")]
    both = "--fuse sasrec co-occurrence --fuse sasrec+co-occurrence title-similarity"
    run(evaluate.main, f"--ckpt {copies[0]} {copies[1]} --limit 500 --val-samples 120 {both}")
    rows = metrics_of(tmp_path / "on" / "evaluation")["rows"]
    name = "sasrec+co-occurrence+title-similarity"
    assert f"co-occurrence {w_2[0]:.2f}, chosen" in rows["sasrec+co-occurrence"]["note"]
    assert f"title-similarity {w_2[1]:.2f}, chosen" in rows[name]["note"]
    for metric in ("hr@1", "ndcg@10", "mrr"):
        assert rows["on"][metric] == pytest.approx(rows[name][metric], abs=1e-6)
    # sample by sample: the target's rank, and the scores but for a row's length and middle
    fused_nC = late_fusion(pairs, young, "test", which, w_2)
    is_target_nC = candidates(pairs, "test", 15, which) == pairs.items[pairs.test[which]][:, None]
    r, none_1I = opened(still, pairs), np.zeros((1, N + 1), np.float32)
    for score_nC in (
        score_samples(r, "test", which, 15, alone),
        score_and_rank(r, "test", which, 15, alone, none_1I)[0],
    ):
        np.testing.assert_allclose(standard(score_nC), standard(fused_nC), atol=1e-4)
        ranks = [compare(x, is_target_nC) for x in (score_nC, fused_nC)]
        assert np.array_equal(*ranks)
    assert load_run(still).best_step == 0


def test_all_items_are_fused_by_the_same_equation(still, young, pairs, alone, on_cpu):
    which = np.arange(40)
    samples, all_nI = pairs.test[which], np.tile(np.arange(1, N + 1), (40, 1))
    olds = [old[old > 0] for old in histories(pairs, samples, 10)]
    y_nI = history_scorer(load_run(young))([old[-8:] for old in olds])[:, 1:]
    g_2 = load_file(still / "items.safetensors")["counts.weight"][0].numpy()
    for floor, g in zip((cooccurrence, title_similarity), g_2):
        x_nI = floor(pairs, samples, all_nI)
        z_nI = (x_nI - x_nI.mean(1, keepdims=True)) / x_nI.std(1, keepdims=True).clip(1e-9)
        assert z_nI.max() > 4
        y_nI = y_nI + g * y_nI.std(1, keepdims=True) * z_nI.clip(max=4)
    found_nI = Recommender.load(still).now.open()(olds, UNSEEN)[:, 1:]
    np.testing.assert_allclose(found_nI, y_nI, atol=1e-3)


def test_among_20_candidates_they_are_as_in_a_fused_row(pairs):
    samples, cand_nC = pairs.test[:60], candidates(pairs, "test", 20, np.arange(60))
    olds = [old[old > 0] for old in histories(pairs, samples, 8)]
    y_nC = np.random.default_rng(0).normal(size=cand_nC.shape).astype(np.float32)
    counts, g_2 = counted.counts_of(pairs, CPU), torch.tensor([1, 1 / 3])
    found_nC = counts.beside_candidates(torch.from_numpy(y_nC), olds, cand_nC, g_2).numpy()
    count_nC = cooccurrence(pairs, samples, cand_nC)
    assert standard(count_nC).max() > 4  # a bound would be seen
    wanted_nC = fused(y_nC, count_nC, 0.5)
    wanted_nC = fused(wanted_nC, title_similarity(pairs, samples, cand_nC), 0.25)
    np.testing.assert_allclose(standard(found_nC), standard(wanted_nC), atol=1e-4)


def test_training_begins_at_the_loss_of_the_fusion_out_of_fold(still, young, pairs):
    t = load_file(young / "folds.safetensors")
    fold_U, user_n = t["fold"].numpy(), users(pairs, pairs.train)
    x_nE = torch.from_numpy(np.load(young / "states_train.npy")).float()
    is_target = np.zeros(len(pairs.items), bool)
    is_target[pairs.train] = True
    first, last = windows.draw_windows(pairs, 6, 16, 0)
    target_BL = batch_of(pairs, first, last, 6, is_target)[1]
    places = [end + 1 - 6 + np.flatnonzero(row) for end, row in zip(last, target_BL)]
    g_2, losses = load_file(still / "items.safetensors")["counts.weight"][0], []
    for place in np.concatenate(places):
        fold = fold_U[users(pairs, [place])[0]]
        y_I = t["item.weight"][fold] @ x_nE[np.searchsorted(pairs.train, place)] + t["bias"][fold]
        y_I, others = y_I[1:], replace(pairs, train=pairs.train[fold_U[user_n] != fold])
        all_1I = np.arange(1, N + 1)[None]
        for data, floor, g in zip((others, pairs), (cooccurrence, title_similarity), g_2):
            x_I = torch.from_numpy(floor(data, np.array([place]), all_1I)[0])
            sd = x_I.std(correction=0).clamp(1e-9)
            z_I = ((x_I - x_I.mean()) / sd).clamp(max=4)
            y_I = y_I + g * y_I.std(correction=0) * z_I
        losses.append(F.cross_entropy(y_I, torch.tensor(pairs.items[place] - 1).long()))
    assert log_of(still)[1]["loss"] == pytest.approx(float(torch.stack(losses).mean()), 1e-3)


def test_counts_of_a_training_sample_never_hold_its_own_user(young, pairs):
    fold_U = load_file(young / "folds.safetensors")["fold"].numpy()
    counts = counted.counts_of(pairs, CPU, fold_U)
    own = pairs.ptr[USERS] + 1
    assert pairs.items[own - 1 : own + 1].tolist() == list(ODD) and own in pairs.train
    # the pair tells the target to whoever counts it
    whole_I = counts.of_all([np.array([ODD[0]])])[0][0]
    assert whole_I.argmax() + 1 == ODD[1] and whole_I.max() == 4
    told_I = counts.of_reads(np.array([own]))[0][0]
    assert not told_I.any()
    # and of nobody else's pairs is anything lost
    someone = pairs.train[:1]
    assert counts.of_reads(someone)[0].max() > 2


# ---------------------------------------------------------------- what it learns


def test_it_keeps_what_counts_know_and_the_others_do_not(tune, learnt, still, young, pairs, alone):
    which = np.arange(len(pairs.test))
    backbone = quality(np.load(young / "scores_test_15.npy"), pairs, "test", which)

    def asked(folder):
        score_nC = score_samples(opened(folder, pairs), "test", which, 15, alone)
        return quality(score_nC, pairs, "test", which)

    without = asked(tune("without", LEARN))
    assert asked(still) > backbone + 0.2
    assert asked(learnt) > max(without + 0.2, asked(still) - 0.02)
    # the last step too, whichever was kept
    first, *_, last = [line for line in log_of(learnt) if "val_ndcg@10" in line]
    assert first["step"] == 0 and last["val_ndcg@10"] > first["val_ndcg@10"] - 0.02
    kept = load_file(learnt / "items.safetensors")["counts.weight"][0]
    assert load_run(learnt).counts_weights == pytest.approx(kept.tolist(), abs=1e-4)


def test_its_numbers_find_what_counts_are_worth_also_where_reads_are_told_nothing(
    young, pairs, load
):
    lm, place_n = load("decoder"), pairs.train[::3]
    flags = {"residual_dropout": 0.3, "residual_counts": True, "val_samples": 120, "C": 15}
    cfg = SimpleNamespace(residual="backbone", seed=0, **flags)
    try:
        items.load_items(lm, young, N)
        residual.add_backbone(lm, cfg, pairs, young, history_scorer)
        table_n = items.table_of(lm, users(pairs, place_n))
        reads = SimpleNamespace(place=place_n, table=table_n, target=pairs.items[place_n])
        task = windows.ByVectors(SimpleNamespace(lm=lm), None, None)
        e_nE, own = torch.zeros(len(place_n), lm.items.E.shape[1]), lm.items.maps["counts"]
        torch.nn.init.zeros_(own.weight)
        optimiser, losses = torch.optim.Adam(own.parameters(), 0.1), []
        torch.manual_seed(0)
        for _ in range(20):
            optimiser.zero_grad()
            losses.append(task.loss_from(e_nE, [reads]) / len(place_n))
            losses[-1].backward()
            optimiser.step()
    finally:
        lm.items = None
    assert torch.isfinite(own.weight).all() and own.weight[0, 0] > 0.5
    assert losses[-1] < losses[0] - 0.1


# ---------------------------------------------------------------- killed, several, moved, served


def test_a_killed_run_goes_on_to_the_last_bit(command, on_cpu, tmp_path, monkeypatch):
    options = "--residual-counts --residual-dropout .3 --samples 160 --evals 1"

    goes_on_to_the_last_bit(finetune.main, command(options), tmp_path, monkeypatch, after=6)


def test_two_processes_train_and_score_it_as_one_does(
    command, run, two_processes, on_cpu, tmp_path
):
    options = command("--residual-counts --samples 96 --evals 1 --micro 4")
    run(finetune.main, f"{options} --out {tmp_path}/one")
    two_processes([("finetune", [*options.split(), "--out", tmp_path / "two"])])
    same_run(tmp_path / "two", tmp_path / "one")


def test_a_run_that_was_moved_scores_and_answers_as_before(
    learnt, pairs, alone, run, on_cpu, tmp_path
):
    copy, gone = shutil.copytree(learnt, tmp_path / "on"), "no/backbone/here"
    edit_config(copy, backbone_run=gone, settings=load_run(copy).settings | {"backbone_run": gone})
    run(evaluate.main, f"--ckpt {copy} --val-samples 10")
    stored = np.load(copy / "scores_test_15.npy")
    again = score_samples(opened(learnt, pairs), "test", np.arange(len(stored)), 15, alone)
    np.testing.assert_allclose(stored, again, rtol=1e-4, atol=1e-4)
    table = (copy / "evaluation" / "table.txt").read_text()
    assert "added to its backbone's scores and to counts and titles" in table
    rec, ids = Recommender.load(copy), raw_item_ids(pairs)
    for n in (0, 5, 17):
        old = histories(pairs, pairs.test[[n]], 20)[0]
        answer = rec.recommend(ids=[ids[i] for i in old[old > 0]], top=10)
        assert answer.ids == [ids[i] for i in np.load(copy / "topk_test.npy")[n] if i]
    # what is explained is what counts see, too
    assert len(rec.explain(ids=[str(i) for i in range(1, 12)], item="20").reasons) == 10


def test_added_items_are_found_by_their_titles_and_move_nobody(learnt, on_cpu):
    rec, olds = Recommender.load(learnt), [np.array([3, 10, 31])]
    first = rec.now.open()(olds, UNSEEN)
    rec.add_items({"A": "Signal 44", "B": "Nothing alike"})
    grown = rec.now.open()
    again = grown(olds, UNSEEN)
    assert np.array_equal(again[:, : N + 1], first)
    near_1I, alike_1I = grown.ranker.lm.items.residual.counts.of_all([np.array([2, N + 1])])
    assert alike_1I[0, N] > alike_1I[0, N + 1] and torch.isfinite(near_1I).all()


def test_a_shared_run_says_that_it_counts_in_the_log(
    learnt, pairs, decoder, run, refused, on_cpu, tmp_path
):
    home = shutil.copytree(learnt, tmp_path / "home")
    said = run(evaluate.main, f"--ckpt {home} --card")
    assert "whoever loads it needs the prepared data" in said.output
    uploaded(home, tmp_path / "on")
    with pytest.raises(Exception, match="counts in the log"):
        Recommender.load(tmp_path / "on", llm=decoder).recommend(["Signal 2"], top=3)


def test_counts_without_a_residual_are_one_sentence(command, refused, on_cpu, tmp_path):
    options = command("--residual-counts --samples 96").replace("--residual backbone", "")
    text = refused(finetune.main, f"{options} --out {tmp_path}/x")
    assert "add --residual backbone" in text and not (tmp_path / "x").exists()
