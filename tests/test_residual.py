"""finetune.py --residual: an LM whose scores are added to its backbone's."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import edit_config, log_of, same_run
from safetensors.torch import load_file
from shared_runs import uploaded
from stopped_runs import goes_on_to_the_last_bit

import evaluate
import finetune
import train_backbone
from delrec import Recommender
from delrec.backbone.models import load as load_backbone
from delrec.backbone.ranking import history_scorer, rank_all
from delrec.data.prepared import batch_of, candidates, histories, raw_item_ids, users
from delrec.evaluation import two_stage
from delrec.evaluation.paper import paper_method
from delrec.evaluation.scores import Scorer, part_of
from delrec.lm import items, residual, windows
from delrec.lm.ranker import open_run, score_and_rank, score_samples
from delrec.lm.student import samples_of
from delrec.runtime import load_run
from delrec.serving.ranking import UNSEEN

CPU = torch.device("cpu")
N = 40
YOUNG = "--epochs 3 --patience 9 --width 16 --batch 16 --history 8 --folds 3"
SMALL = (
    "--input ids --history 6 --batch 16 --micro 16 --val-samples 0 --init-r 4 --target-r 2 "
    "--dropout 0 --soft-prompt none"
)
ALONE = "--samples 1200 --evals 2 --lr 3e-3 --lr-maps 3e-3"
LEARN = f"{ALONE} --lr-residual 3e-3"
STILL = "--samples 80 --evals 1 --lr 1e-9 --lr-maps 1e-9 --lr-residual 1e-9 --weight-decay 0"


@pytest.fixture(scope="module")
def walks(make_data, tmp_path_factory):
    """90 users of 14 steps among 40 items: a fixed item follows each, one step in ten goes
    anywhere.
    """
    rng, rows = np.random.default_rng(0), []
    for u in range(90):
        item = int(rng.integers(N))
        for t in range(14):
            rows.append((u, item + 1, u + 10 * t))
            lost = rng.random() < 0.1
            item = int(rng.integers(N)) if lost else (item * 3 + 1) % 41 % N
    titles = {i: f"Film {i}" for i in range(1, N + 1)}
    return make_data(tmp_path_factory.mktemp("walks"), rows, titles, "walks")


@pytest.fixture(scope="module")
def young(walks, run, tmp_path_factory):
    """young(model) -> a backbone that was trained too little, with folds; its window is longer than
    the LM's.
    """
    home, made = tmp_path_factory.mktemp("young"), {}

    def get(model):
        if model not in made:
            made[model] = home / model
            where = f"--dataset {walks.folder} --model {model} --out {made[model]}"
            run(train_backbone.main, f"{where} {YOUNG}")
        return made[model]

    return get


@pytest.fixture(scope="module")
def command(walks, young, decoder):
    """command(options, model) -> finetune.py's options on a young backbone, without --out."""

    def of(options, model="sasrec"):
        return (
            f"--dataset {walks.folder} --llm {decoder} --backbone {young(model)} {SMALL} {options}"
        )

    return of


@pytest.fixture(scope="module")
def tune(command, run, fp32, tmp_path_factory):
    """tune(name, options, model) -> the run of finetune.py, made once."""
    home, made = tmp_path_factory.mktemp("tuned"), {}

    def get(name, options, model="sasrec"):
        if name not in made:
            made[name] = home / name
            with fp32():
                run(finetune.main, f"{command(options, model)} --out {made[name]}")
        return made[name]

    return get


@pytest.fixture(scope="module")
def still(tune):
    """still(model) -> a run of --residual in which nothing moved."""
    return lambda model: tune(f"still-{model}", f"--residual backbone {STILL}", model)


@pytest.fixture(scope="module")
def learnt(tune):
    """A run of --residual that has learnt something."""
    return tune("on", f"--residual backbone {LEARN}")


def opened(folder, data):
    """A run as a ranker."""
    return open_run(load_run(folder, data), data, CPU, scores_of=history_scorer)[0]


def best_of(folder) -> float:
    """The best NDCG@10 over all items that a run found on validation."""
    return max(line["val_full_ndcg@10"] for line in log_of(folder) if "val_full_ndcg@10" in line)


# ---------------------------------------------------------------- what it begins as


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_it_begins_as_its_backbone(model, still, young, walks, alone, on_cpu):
    r, which = opened(still(model), walks), np.arange(len(walks.test))
    none_1I = np.zeros((1, N + 1), np.float32)
    score_nC, full_1n2, list_nK = score_and_rank(r, "test", which, 15, alone, none_1I)
    np.testing.assert_allclose(score_nC, np.load(young(model) / "scores_test_15.npy"), atol=1e-3)
    assert np.array_equal(full_1n2[0], np.load(young(model) / "full_test.npy"))
    assert np.array_equal(list_nK, np.load(young(model) / "topk_test.npy")[:, :10])
    np.testing.assert_allclose(score_samples(r, "test", which, 15, alone), score_nC, atol=1e-3)
    run, test = load_run(still(model), walks), part_of(walks, "test", which, 15)
    assert run.best_step == 0
    rows = two_stage.two_stage(run, Scorer(walks, 15, alone), test, "shuffled")["rows"]
    assert rows["ranker, inside"] == pytest.approx(rows["copy first, inside"])


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_each_training_read_begins_with_what_its_fold_s_model_says(model, still, young, walks):
    t = load_file(young(model) / "folds.safetensors")
    x_nE = torch.from_numpy(np.load(young(model) / "states_train.npy")).float()
    is_target = np.zeros(len(walks.items), bool)
    is_target[walks.train] = True
    first, last = windows.draw_windows(walks, 6, 16, 0)
    target_BL = batch_of(walks, first, last, 6, is_target)[1]
    places = [end + 1 - 6 + np.flatnonzero(row) for end, row in zip(last, target_BL)]
    losses = []
    for place in np.concatenate(places):
        (user,), n = users(walks, [place]), np.searchsorted(walks.train, place)
        fold = t["fold"][user]
        y_I = t["item.weight"][fold] @ x_nE[n] + t["bias"][fold]
        losses.append(F.cross_entropy(y_I[1:], torch.tensor(walks.items[place] - 1).long()))
    assert log_of(still(model))[1]["loss"] == pytest.approx(float(torch.stack(losses).mean()), 1e-4)


@pytest.mark.parametrize("model", ["sasrec", "gru4rec"])
def test_training_reads_rank_as_the_model_that_has_not_seen_their_user(model, young, walks, load):
    lm, place = load("decoder"), young(model)
    cfg = SimpleNamespace(residual="backbone", residual_dropout=0, residual_counts=False, seed=0)
    try:
        items.load_items(lm, place, N)
        residual.add_backbone(lm, cfg, walks, place, history_scorer)
        table_n = items.table_of(lm, users(walks, walks.train))
        e_nE = torch.zeros(len(walks.train), lm.items.E.shape[1])
        with torch.no_grad():
            e_nE = residual.with_backbone_state(lm, e_nE, residual.told(lm, walks.train, table_n))
            s_nI = F.pad(items.scores_in_tables(lm, e_nE, table_n), (1, 0), value=-torch.inf)
    finally:
        lm.items = None
    assert set(table_n) == {1, 2, 3}
    cand_nC = torch.from_numpy(candidates(walks, "train", 15).astype(int))
    apart_nC = s_nI.gather(1, cand_nC) - torch.from_numpy(np.load(place / "scores_train_15.npy"))
    # the same but for one number a row; the states are fp16
    assert (apart_nC - apart_nC.mean(1, keepdim=True)).abs().max() < 1e-3
    for s_I, old_L in zip(s_nI, histories(walks, walks.train, 20)):
        s_I[old_L] = -torch.inf
    lists = np.load(place / "topk_train.npy")[:, :10]
    assert (s_nI.topk(10).indices.numpy() == lists).mean() > 0.995


def test_in_a_random_order_it_begins_as_its_backbone_in_that_order(
    still, young, run, on_cpu, tmp_path
):
    copy, backbone = tmp_path / "still", tmp_path / "sasrec"
    shutil.copytree(still("sasrec"), copy)
    shutil.copytree(young("sasrec"), backbone)
    run(evaluate.main, f"--ckpt {copy} {backbone} --limit 40 --val-samples 10 --shuffle-history")
    mixed, own = (np.load(f / "scores_test_15_shuffled.npy") for f in (copy, backbone))
    asked = np.isfinite(mixed).all(1)
    assert asked.sum() == 40
    np.testing.assert_allclose(mixed[asked], own[asked], atol=1e-3)
    assert np.abs(mixed - np.load(copy / "scores_test_15.npy"))[asked].max() > 0.1


def test_the_map_of_what_is_read_is_kept_and_that_of_what_is_said_begins_at_0(
    learnt, command, run, on_cpu, tmp_path
):
    begin = command(f"--residual backbone {STILL} --maps {learnt}")
    run(finetune.main, f"{begin} --out {tmp_path}/r")
    given, begun = (load_file(f / "items.safetensors") for f in (learnt, tmp_path / "r"))
    torch.testing.assert_close(begun["in.weight"], given["in.weight"], rtol=0, atol=1e-6)
    assert begun["out.weight"].abs().max() < 1e-6 < given["out.weight"].abs().max()
    assert float(begun["residual.weight"]) == pytest.approx(1)


# ---------------------------------------------------------------- what it learns


def test_an_lm_on_top_of_its_backbone_beats_both_and_another_s_state_does_not_help(
    tune, learnt, still
):
    backbone, alone = best_of(still("sasrec")), best_of(tune("alone", ALONE))
    permuted = best_of(tune("permuted", f"--residual permuted {LEARN}"))
    assert best_of(learnt) > max(backbone, alone) + 0.05
    assert best_of(learnt) > permuted + 0.02
    weight = load_run(learnt).residual_weight
    kept = load_file(learnt / "items.safetensors")["residual.weight"]
    assert weight == pytest.approx(float(kept), abs=1e-4)
    assert 0.8 < weight < 1.3 and weight != 1
    assert paper_method(load_run(learnt)) is None


def test_the_control_answers_by_somebody_else_s_history(tune, walks, young, alone, on_cpu):
    r = opened(tune("permuted-still", f"--residual permuted {STILL}"), walks)
    own = np.load(young("sasrec") / "scores_test_15.npy")
    which = np.arange(len(own))
    score_nC = score_samples(r, "test", which, 15, alone)
    assert np.median(np.abs(score_nC - own).max(1)) > 0.1
    # the same for a sample, whoever stands beside it
    np.testing.assert_allclose(
        score_samples(r, "test", which[7:9], 15, alone), score_nC[7:9], atol=1e-5
    )
    r.lm.items.residual.data = replace(walks, train=walks.train[:0])
    with pytest.raises(click.ClickException, match="histories of the log, which is not here"):
        score_samples(r, "test", which[:1], 15, alone)


def test_permuted_states_are_of_other_users_of_the_same_fold(walks, young):
    folds = SimpleNamespace(fold_U=load_file(young("sasrec") / "folds.safetensors")["fold"].numpy(),
                            scale_K2=None)  # fmt: skip
    cfg = SimpleNamespace(residual="permuted", residual_dropout=0, seed=0)
    row_n = residual.fold_states(cfg, walks, young("sasrec"), folds).row_n
    fold_n = folds.fold_U[users(walks, walks.train)]
    assert sorted(row_n) == list(range(len(row_n)))
    assert np.array_equal(fold_n[row_n], fold_n)
    user_n = users(walks, walks.train)
    assert (user_n[row_n] != user_n).all()


def test_a_training_sample_without_a_state_is_no_target(young, walks, tmp_path):
    few = shutil.copytree(young("sasrec"), tmp_path / "few")
    lists = np.load(few / "topk_train.npy")
    lists[::2] = 0
    np.save(few / "topk_train.npy", lists)
    cfg = SimpleNamespace(without_fold=None, input="ids", history=6, seed=0, residual="backbone")
    lm = SimpleNamespace(kind="decoder")
    found = samples_of(cfg, SimpleNamespace(data=walks, lm=lm, backbone_run=few), 300)
    assert np.array_equal(np.flatnonzero(found.is_target), walks.train[1::2])


def test_the_step_is_chosen_among_the_candidates_if_that_is_asked(tune):
    run = load_run(tune("near", f"--residual backbone {LEARN} --choose candidates"))
    near = {x["step"]: x["val_ndcg@10"] for x in log_of(run.folder) if "val_ndcg@10" in x}
    assert near[run.best_step] == max(near.values())


# ---------------------------------------------------------------- killed, several, moved, served


def test_a_killed_run_goes_on_to_the_last_bit(command, on_cpu, tmp_path, monkeypatch):
    options = "--residual backbone --residual-dropout .3 --samples 160 --evals 1"

    goes_on_to_the_last_bit(finetune.main, command(options), tmp_path, monkeypatch, after=6)


def test_two_processes_train_and_score_it_as_one_does(
    command, run, two_processes, on_cpu, tmp_path
):
    options = command("--residual backbone --residual-dropout .3 --samples 96 --evals 1 --micro 4")
    run(finetune.main, f"{options} --out {tmp_path}/one")
    two_processes([("finetune", [*options.split(), "--out", tmp_path / "two"])])
    same_run(tmp_path / "two", tmp_path / "one")


@pytest.fixture(scope="module")
def moved(learnt, young, walks, run, fp32, tmp_path_factory):
    """The run in another folder, scored there; it names a backbone that is not there."""
    copy = shutil.copytree(learnt, tmp_path_factory.mktemp("moved") / "on")
    gone = "no/backbone/here"
    settings = load_run(copy).settings | {"backbone_run": gone}
    edit_config(copy, backbone_run=gone, settings=settings)
    with fp32():
        run(evaluate.main, f"--ckpt {copy} --val-samples 10")
    return copy


def test_a_run_that_was_moved_scores_as_before_and_its_answers_are_those_of_the_table(
    moved, learnt, walks, alone, on_cpu
):
    stored = np.load(moved / "scores_test_15.npy")
    again = score_samples(opened(learnt, walks), "test", np.arange(len(stored)), 15, alone)
    np.testing.assert_allclose(stored, again, rtol=1e-4, atol=1e-4)
    assert "added to its backbone's scores" in (moved / "evaluation" / "table.txt").read_text()
    rec, ids = Recommender.load(moved), raw_item_ids(walks)
    for n in (0, 5, 17):
        old = histories(walks, walks.test[[n]], 20)[0]
        assert (old > 0).sum() > 8  # more than either window
        answer = rec.recommend(ids=[ids[i] for i in old[old > 0]], top=10)
        listed = np.load(moved / "topk_test.npy")[n]
        assert answer.ids == [ids[i] for i in listed if i]
    # what is explained is what the backbone sees, too
    assert len(rec.explain(ids=[str(i) for i in range(1, 12)], item="20").reasons) == 8


def test_adding_items_leaves_alone_who_is_still_asking(learnt, on_cpu):
    rec, olds = Recommender.load(learnt), [np.array([3, 10, 31])]
    before = rec.now.open()
    first = before(olds, UNSEEN)
    rec.add_items({"A": "Film 13"})
    assert np.array_equal(before(olds, UNSEEN), first)


def test_a_shared_run_answers_without_the_data_and_takes_new_items(
    learnt, walks, decoder, run, on_cpu, tmp_path
):
    home = shutil.copytree(learnt, tmp_path / "home")
    run(evaluate.main, f"--ckpt {home} --card")
    uploaded(home, tmp_path / "on")
    here, away = (Recommender.load(folder, llm=decoder) for folder in (home, tmp_path / "on"))
    assert (tmp_path / "on" / "backbone" / "model.safetensors").exists()
    asked = ["Film 3", "Film 10", "Film 31"]
    before = away.recommend(asked, top=30)
    assert before.items == here.recommend(asked, top=30).items
    away.add_items({"new": "Film 7"})
    after = away.recommend(asked, top=41)
    assert [x for x in after.items if not x.is_new][:30] == list(before.items)
    assert after.new == ["new"] and np.isfinite([x.score for x in after.items]).all()


def test_its_export_lists_what_the_run_would_show(
    still, young, walks, run, alone, on_cpu, tmp_path
):
    copy = shutil.copytree(still("sasrec"), tmp_path / "still")
    run(evaluate.main, f"--ckpt {copy} --export --export-k 5")
    got = rank_all(load_backbone(young("sasrec")), walks, walks.train, alone, 5)
    assert np.array_equal(np.load(copy / "export" / "topk.npy"), got["list"])


def test_an_encoder_is_added_to_its_backbone_too(walks, young, encoder, run, on_cpu, tmp_path):
    options = (
        f"--dataset {walks.folder} --llm {encoder} --backbone {young('sasrec')} {SMALL} {STILL}"
    )
    run(finetune.main, f"{options} --residual backbone --out {tmp_path}/run")
    said = np.load(tmp_path / "run" / "scores_val_15.npy")
    known = np.isfinite(said).all(1)
    np.testing.assert_allclose(
        said[known], np.load(young("sasrec") / "scores_val_15.npy")[known], atol=1e-3
    )


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_meant_is_one_sentence(
    command, tune, learnt, sasrec, toy, decoder, refused, on_cpu, tmp_path
):
    def says(options):
        return refused(finetune.main, f"{options} --out {tmp_path}/x")

    few = "--samples 96"
    of_toy = f"--dataset {toy.folder} --llm {decoder} --backbone {sasrec} {SMALL} {few}"
    text = says(f"{of_toy} --residual backbone")
    assert "lacks folds.safetensors" in text and "train_backbone.py --folds 5" in text
    text = says(command(f"{few} --residual backbone --residual-counts").replace("ids", "hybrid"))
    assert "--input is hybrid" in text
    alone = tune("alone", ALONE)
    assert "leave one of them" in says(command(f"{few} --residual backbone --teacher {alone}"))
    assert "adds to its backbone's scores" in says(command(f"{few} --teacher {learnt}"))
    for ckpt, folds in ((alone, learnt), (learnt, alone)):
        text = refused(evaluate.main, f"--ckpt {ckpt} --export --folds {folds}")
        assert f"{learnt} adds to the scores of its full backbone" in text
    text = says(command(f"{few} --residual backbone --permute-vectors"))
    assert "use --residual permuted" in text
    assert "inner blocks" in says(command(f"{few} --residual backbone --lambda-ms .1 --blocks 2"))
    assert "add --residual backbone" in says(command(f"{few} --residual-dropout .1"))
    assert not (tmp_path / "x").exists()


def test_a_run_that_lost_its_backbone_is_one_sentence(learnt, refused, on_cpu, tmp_path):
    copy = shutil.copytree(learnt, tmp_path / "on")
    shutil.rmtree(copy / "backbone")
    assert "lacks backbone/model.safetensors" in refused(evaluate.main, f"--ckpt {copy}")
