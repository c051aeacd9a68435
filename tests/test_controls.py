"""Is it the language model? LMs with random weights, LMs trained whole, two layers on a backbone's
state.
"""

import json
import shutil

import numpy as np
import pytest
import stopped_runs
import torch
from commands import edit_config, log_of, metrics_of
from safetensors.torch import load_file
from scripts import sentence
from stopped_runs import same, stop_and_resume
from tuning import opens_as_stored
from vector_runs import SMALL, TUNE

import distill
import evaluate
import finetune
import train_backbone
from delrec.backbone import models, results
from delrec.evaluation.paper import paper_method
from delrec.lm.model import load_lm, load_unread, located
from delrec.runtime import load_run
from delrec.serving.latency import parameters
from recipes import mlp

pytest_plugins = ["lm_fixtures"]
CPU = torch.device("cpu")


def weights_of(name) -> dict:
    """The weights of an LM by name, none of it checked."""
    return dict(load_unread(name, CPU, torch.float32, False).model.named_parameters())


# ---------------------------------------------------------------- random weights


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "encoder"])
def test_random_weights_follow_the_seed_and_keep_each_matrix_s_scale(kind, request):
    llm = request.getfixturevalue(kind)
    trained, drawn = weights_of(llm), weights_of(f"random:{llm}")
    again, other = weights_of(f"random-0:{llm}"), weights_of(f"random-1:{llm}")
    matrices = [name for name, p in trained.items() if p.dim() > 1]
    assert len(matrices) > 10
    for name in matrices:
        assert torch.equal(drawn[name], again[name])
        for apart in (trained, other):
            a, b = drawn[name].flatten(), apart[name].flatten()
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2, name
        assert drawn[name].std() == pytest.approx(float(trained[name].std()), rel=0.15), name
    norms = [name for name in trained if "norm" in name.lower() and trained[name].dim() == 1]
    assert norms and all(torch.equal(drawn[name], trained[name]) for name in norms)


def test_random_weights_are_the_same_lm_in_every_dtype(decoder):
    name = f"random-7:{decoder}"
    half, whole = (load_unread(name, CPU, d, False) for d in (torch.bfloat16, torch.float32))
    assert (
        half.identity == whole.identity != load_unread(decoder, CPU, torch.float32, False).identity
    )
    w = half.model.lm_head.weight.float()
    assert torch.equal(w, whole.model.lm_head.weight.bfloat16().float())


def test_how_random_weights_are_read_is_measured_of_them(decoder, fresh):
    trained = load_lm(decoder, CPU, torch.float32)
    drawn = load_lm(f"random:{decoder}", CPU, torch.float32)
    assert len(list(fresh.glob("*.json"))) == 2  # a finding of its own
    assert (drawn.paths, drawn.attends) == (trained.paths, trained.attends)
    assert drawn.mask_id == trained.mask_id and drawn.sep == trained.sep


def test_a_random_lm_is_located_as_the_lm_it_is_drawn_from(decoder, monkeypatch):
    monkeypatch.chdir(f"{decoder}/..")
    assert located("random:tiny-llama") == located("random-0:tiny-llama") == f"random:{decoder}"
    assert located("random-12:tiny-llama") == f"random-12:{decoder}"
    assert located("random:of/the-hub") == "random:of/the-hub"


def test_random_weights_of_what_is_no_lm_are_one_sentence(refused, toy, sasrec, tmp_path):
    name = f"random:{tmp_path}"
    assert sentence(load_lm, name, CPU).startswith(f"no language model '{name}'")
    where = f"--dataset {toy.folder} --backbone {sasrec} --input ids --out {tmp_path}/x"
    assert f"no language model '{name}'" in refused(finetune.main, f"{where} --llm {name}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("main", [distill.main, finetune.main, evaluate.main])
def test_help_says_how_random_weights_are_asked_for(main, run):
    said = run(main, "--help").output
    assert "random:NAME" in said and "random weights" in " ".join(said.split())


@pytest.fixture(scope="module")
def on_random(toy, decoder, sasrec, run, fp32, tmp_path_factory):
    """The folder of a run of finetune.py on vectors, of an LM with random weights of seed 3."""
    out = tmp_path_factory.mktemp("random") / "random"
    where = f"--dataset {toy.folder} --backbone {sasrec} --llm random-3:{decoder}"
    with fp32():
        run(finetune.main, f"{where} {TUNE} --out {out}")
    return out


def test_a_run_on_random_weights_opens_again_and_scores_alike(on_random, toy, alone, run, on_cpu):
    opens_as_stored(on_random, toy, alone, 1e-4, 1e-4)
    before = np.load(on_random / "scores_val_15.npy")
    run(evaluate.main, f"--ckpt {on_random} --limit 20 --val-samples 20")
    table = metrics_of(on_random / "evaluation")
    assert "random weights, loss candidates, AdaLoRA on qv" in table["rows"]["random"]["note"]
    assert paper_method(load_run(on_random)) is None
    after = np.load(on_random / "scores_val_15.npy")
    np.testing.assert_allclose(after[np.isfinite(before)], before[np.isfinite(before)], atol=1e-4)


def test_a_run_on_random_weights_is_of_its_seed_alone(
    on_random, refused, decoder, tmp_path, on_cpu
):
    copy = shutil.copytree(on_random, tmp_path / "copy")
    edit_config(copy, llm=f"random-4:{decoder}")
    assert "was trained on another LM" in refused(evaluate.main, f"--ckpt {copy}")


def test_random_weights_have_as_many_parameters(on_random, decoder):
    own = sum(t.numel() for t in load_file(f"{decoder}/model.safetensors").values())
    added = [on_random / "items.safetensors", on_random / "adapter" / "adapter_model.safetensors"]
    more = sum(t.numel() for path in added for t in load_file(path).values())
    assert parameters(load_run(on_random)) == own + more


def test_both_stages_and_the_plain_lm_take_random_weights(
    toy, sasrec, decoder, run, refused, on_cpu, tmp_path
):
    llm, prompt = f"random:{decoder}", tmp_path / "prompt"
    small = "--batch 8 --micro 4 --samples 48 --val-samples 20 --evals 1 --input ids --history 6"
    where = f"--dataset {toy.folder} --llm {llm}"
    first = f"--backbone {sasrec} --k 4 --a 3 --h 3 --candidates 10 --out {prompt}"
    run(distill.main, f"{where} {small} {first}")
    assert load_run(prompt).llm == llm
    second = f"--soft-prompt {prompt} --init-r 4 --target-r 2 --out {tmp_path / 'tuned'}"
    run(finetune.main, f"{where} {small} {second}")
    says = refused(finetune.main, f"--dataset {toy.folder} --llm {decoder} {small} {second}x")
    assert f"was distilled for {llm}, --llm is {decoder}" in says
    plain = f"--llm-out {tmp_path / 'lm'} --limit 10 --val-samples 10 --out {tmp_path / 'table'}"
    run(evaluate.main, f"{where} {plain}")
    again = run(evaluate.main, f"{where} {plain}").output
    assert "was made the same way" in again and load_run(tmp_path / "lm").llm == llm


# ---------------------------------------------------------------- trained whole


@pytest.fixture
def whole(toy, deep, sasrec):
    """finetune.py's options that train two layers whole, from random weights."""
    where = f"--dataset {toy.folder} --backbone {sasrec} --llm random-2:{deep}"
    return f"{where} {TUNE} --layers 2 --adapt all --samples 160"


def test_an_lm_that_is_trained_whole_is_kept_whole(whole, deep, toy, alone, run, on_cpu, tmp_path):
    out = tmp_path / "whole"
    said = run(finetune.main, f"{whole} --out {out}").output
    assert "no adapters, the weights of its layers themselves" in said
    trained = load_run(out, toy)
    assert (trained.llm, trained.llm_from) == (str(out / "lm"), f"random-2:{deep}")
    assert trained.lr == 3e-4 and not (out / "adapter").exists()
    first, last = weights_of(f"random-2:{deep}"), load_file(out / "lm" / "model.safetensors")
    assert not any(".layers.2." in name for name in last)
    tokens = "model.embed_tokens.weight"
    assert torch.equal(first[tokens], last[tokens])
    moved = [name for name in last if name not in (tokens, "lm_head.weight")]
    assert len(moved) > 15
    assert all(not torch.equal(first[name], last[name]) for name in moved)
    opens_as_stored(out, toy, alone, 1e-4, 1e-4)
    run(evaluate.main, f"--ckpt {out} --limit 20 --val-samples 20")
    note = metrics_of(out / "evaluation")["rows"]["whole"]["note"]
    assert note.startswith("items as vectors") and "random weights, 2 layers, no teacher" in note
    assert "all weights trained, lr 0.0003" in note and paper_method(trained) is None


def test_training_whole_learns_what_little_moves_do_not(whole, run, on_cpu, tmp_path):
    """The maps hold still: what is learnt, the layers learn."""
    still, losses = "--lr-maps 1e-9 --samples 480", {}
    for rate in (1e-9, 3e-3):
        run(finetune.main, f"{whole} {still} --lr {rate} --out {tmp_path}/{rate}")
        losses[rate] = np.mean([line["loss"] for line in log_of(tmp_path / f"{rate}")[-10:]])
    assert losses[3e-3] < losses[1e-9] - 0.05, losses


def test_a_run_that_trains_whole_goes_on_where_it_was_stopped(whole, tmp_path, monkeypatch, on_cpu):
    def args(out, *more):
        options = f"{whole} --samples 48 --out {out} --checkpoint-every 1"
        return [*options.split(), *map(str, more)]

    jobs = {"whole": (finetune.main, args)}
    stopped_runs.run(finetune.main, args(tmp_path / "undisturbed"))
    cut = stop_and_resume(jobs, "whole", tmp_path, monkeypatch, after=3)
    assert same(tmp_path / "undisturbed", cut)


def test_one_that_is_trained_whole_has_no_ranks_to_wait_for(whole, run, on_cpu, tmp_path):
    few = "--samples 32 --batch 8 --evals 2 --init-r 4 --target-r 9"  # 4 steps
    run(finetune.main, f"{whole} {few} --out {tmp_path}/run")
    validated = [line["step"] for line in log_of(tmp_path / "run") if "val_hr@1" in line]
    assert validated == [2, 4]


@pytest.mark.parametrize("kind", ["encoder", "flan"])
def test_titles_are_read_by_an_lm_trained_whole_too(
    kind, toy, backbone, run, alone, on_cpu, tmp_path, request
):
    llm = request.getfixturevalue(kind)
    where = f"--dataset {toy.folder} --backbone {backbone} --llm {llm} --soft-prompt none"
    how = "--verbalizer mean --order shuffled --no-calibrate --adapt all --samples 40 --batch 8"
    run(finetune.main, f"{where} {how} --val-samples 10 --evals 1 --out {tmp_path}/run")
    opens_as_stored(tmp_path / "run", toy, alone, 1e-3, 1e-3)
    first, last = weights_of(llm), weights_of(str(tmp_path / "run" / "lm"))
    still = {name for name in first if torch.equal(first[name], last[name])}
    assert still == {name for name in first if name.startswith(STILL)} and len(still) > 1


# tokens' vectors, and what scores them
STILL = ("shared.", "lm_head.", "cls.", "bert.embeddings.word")


def test_one_that_was_trained_whole_teaches(whole, toy, run, on_cpu, tmp_path):
    run(finetune.main, f"{whole} --out {tmp_path}/teacher")
    llm = load_run(tmp_path / "teacher").llm
    student = f"--dataset {toy.folder} --llm {llm} --teacher {tmp_path}/teacher"
    one_block = f"{SMALL} --layers 1 --lambda-ms 0"
    run(finetune.main, f"{student} {one_block} --out {tmp_path}/student")
    assert {"cos", "norm"} <= set(log_of(tmp_path / "student")[0])


def test_weights_that_are_divided_are_not_trained_whole(whole, refused, tmp_path):
    says = refused(finetune.main, f"{whole} --shard --out {tmp_path}/x")
    assert "--adapt all trains weights that --shard divides" in says
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------- two layers on the state


@pytest.fixture(scope="module")
def young(cycle, run, fp32, tmp_path_factory):
    """A SASRec of one epoch that answers out of fold: its states know the last item, but hardly yet
    what follows it.
    """
    out = tmp_path_factory.mktemp("young") / "sasrec"
    few = "--epochs 1 --width 32 --batch 16 --history 8 --lr 1e-5 --dropout 0 --folds 2"
    with fp32():
        run(train_backbone.main, f"--dataset {cycle.folder} --out {out} {few}")
    return out


@pytest.fixture(scope="module")
def on_state(young, cycle, run, fp32, tmp_path_factory):
    """The run of recipes/mlp.py on it."""
    out = tmp_path_factory.mktemp("mlp") / "mlp"
    where = f"--dataset {cycle.folder} --backbone {young} --out {out}"
    with fp32():
        run(mlp.main, f"{where} --hidden 256 --dropout 0 --epochs 8 --batch 64")
    return out


def test_two_layers_find_what_follows_in_a_state_that_scores_badly(on_state, young):
    before, after = (metrics_of(folder)["test"]["full"]["ndcg@10"] for folder in (young, on_state))
    assert after > before + 0.2, (before, after)
    assert load_run(on_state).best_epoch > 0


def test_the_epoch_is_the_best_by_what_is_asked_for():
    seen = {"val_hr@1_of_15": 0.4, "val_ndcg@10": 0.1}
    assert mlp.quality_of(seen, "full") == 0.1
    assert mlp.quality_of(seen, "candidates") == 0.4


def test_two_layers_are_chosen_among_candidates_where_that_is_asked(young, cycle, run, tmp_path):
    where = f"--dataset {cycle.folder} --backbone {young} --out {tmp_path / 'mlp'}"
    said = run(mlp.main, f"{where} --hidden 8 --epochs 2 --batch 64 --choose candidates").output
    assert "by HR@1 among the stored candidates on validation" in said
    lines = log_of(tmp_path / "mlp")
    best = max(line["val_hr@1_of_15"] for line in lines)
    made = load_run(tmp_path / "mlp")
    chosen = [x for x in lines if x["name"] == f"lr {made.lr:g}" and x["step"] == made.best_epoch]
    assert chosen[0]["val_hr@1_of_15"] == best


def test_evaluate_takes_the_two_layers_as_a_backbone(on_state, young, cycle, run, on_cpu, tmp_path):
    run(evaluate.main, f"--ckpt {young} {on_state} --limit 50 --out {tmp_path}")
    table = metrics_of(tmp_path)
    assert table["reference"] == "sasrec"
    assert table["rows"]["mlp"]["note"] == "ce loss, an MLP on the state of sasrec"
    assert table["full"]["mlp"]["ndcg@10"] > table["full"]["sasrec"]["ndcg@10"]
    assert "mlp - sasrec" in table["tests"] and "mlp - sasrec" in table["full_tests"]
    assert not any(row["paper"] for row in table["rows"].values())


def test_untrained_they_are_the_backbone(young, cycle, alone):
    backbone = load_run(young, cycle)
    protocol = results.Protocol(backbone, cycle)
    model = mlp.OnState(models.load(young), 16, 0.5).eval()
    x_BL = torch.tensor([[3, 6, 12], [0, 0, 7]])
    own = models.score(model.backbone, x_BL)
    assert torch.equal(models.score(model, x_BL), own)
    # the loss of an epoch in which nothing moves: each sample by its own fold's vectors
    seen = mlp.samples_of(backbone, protocol, CPU)
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    found = mlp.learn(model, still, seen, 64, np.random.default_rng(0))
    want = []
    for x_E, y, f in zip(seen.x_nE, seen.target_n, seen.fold_n):
        s_I = seen.E_KIE[f] @ x_E + seen.b_KI[f]
        want.append(s_I[1:].logsumexp(0) - s_I[y])
    assert found == pytest.approx(float(torch.stack(want).mean()), rel=1e-4)
    assert len(want) == len(cycle.train) and set(seen.fold_n) == {0, 1}


def test_two_layers_weigh_popularity_by_the_history(young):
    """Two kinds of histories: what popular items follow, and what rare ones do."""
    backbone = models.load(young)
    torch.nn.init.zeros_(backbone.item.weight)
    backbone.bias.data = torch.linspace(-1, 1, len(backbone.bias))
    rng, n_items = np.random.default_rng(0), len(backbone.bias) - 1
    likes_n = np.repeat([1.0, -1.0], 100)
    p_I = np.exp(2 * backbone.bias[1:].detach().numpy().astype(np.float64))
    drawn_n = 1 + rng.choice(n_items, 200, p=p_I / p_I.sum())
    target_n = torch.from_numpy(np.where(likes_n > 0, drawn_n, n_items + 1 - drawn_n))
    x_nE = torch.from_numpy(likes_n).float()[:, None].repeat(1, backbone.item.embedding_dim)
    E_KIE, b_KI = backbone.item.weight.detach()[None], backbone.bias.detach()[None]
    seen = mlp.Samples(x_nE, target_n, np.zeros(200, int), E_KIE, b_KI)
    torch.manual_seed(0)
    model = mlp.OnState(backbone, 16, 0)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = [mlp.learn(model, optimiser, seen, 50, rng) for _ in range(30)]
    # what one weight of popularity for all reaches
    weights = torch.linspace(-3, 3, 61)[:, None]
    logp_WI = (weights * b_KI[0, 1:]).log_softmax(1)
    assert losses[-1] < -logp_WI[:, target_n - 1].mean(1).max() - 0.1
    # the ranks are of the same scores
    score_BI = models.score_from(model, model.pass_on(x_nE[[0, -1]]))[:, 1:]
    assert score_BI.argmax(1).tolist() == [n_items - 1, 0]


def test_two_layers_are_the_same_from_the_same_seed(on_state, young, cycle, run, on_cpu, tmp_path):
    where = f"--dataset {cycle.folder} --backbone {young} --out {tmp_path}/again"
    last = run(mlp.main, f"{where} --hidden 256 --dropout 0 --epochs 8 --batch 64").json
    assert last["lr"] == load_run(on_state).lr
    assert (
        np.load(tmp_path / "again" / "full_val.npy") == np.load(on_state / "full_val.npy")
    ).all()
    assert json.dumps(metrics_of(tmp_path / "again")) == json.dumps(metrics_of(on_state))


def test_a_backbone_without_folds_is_one_sentence(sasrec, toy, refused, on_cpu, tmp_path):
    says = refused(mlp.main, f"--dataset {toy.folder} --backbone {sasrec} --out {tmp_path}/x")
    assert "lacks folds.safetensors" in says and "train_backbone.py --folds 5" in says
    assert not (tmp_path / "x").exists()
