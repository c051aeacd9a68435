"""finetune.py end to end on tiny LMs: what it writes and gives back, that AdaLoRA runs and P does not move, and that it learns."""
import json
import shutil
from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import finetune
import lm as L
from conftest import KINDS, stages, title_of

SMALL = ["--no-show", "--history", 4, "--max-title", 32, "--max-tokens", 1024, "--adapt", "qv", "--init-r", 4, "--target-r", 2, "--alpha", 8,
         "--dropout", 0, "--orthogonal", .1, "--candidates", 15, "--batch", 8, "--micro", 8, "--weight-decay", 1e-6, "--warmup", .1, "--seed", 0,
         "--samples", 48, "--lr", .01, "--val-samples", 16, "--evals", 1]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def soft_prompt(folder):
    return load_file(folder / "soft_prompt.safetensors")["prompt_embeddings"]


def again(folder, data, alone):
    """The stored validation scores of a run, and those of the run opened anew."""
    run = common.load_run(folder, data, ["finetune"])
    ranker, penalty = L.open_run(run, data, torch.device("cpu"))
    stored, cand = np.load(folder / "scores_val_15.npy"), common.candidates(data, "val", 15)
    asked = np.flatnonzero(np.isfinite(stored).all(1))
    return stored[asked], L.score_samples(ranker, data.val[asked], cand[asked], alone), penalty, ranker


# ---------------------------------------------------------------- the pieces

def test_negatives_are_new_to_the_user_all_different_and_uniform(toy):
    data = SimpleNamespace(**vars(toy), train_items=finetune.items_by_user(toy))
    which = np.repeat(toy.train[[30]], 3000)
    rows = finetune.negatives(data, which, 8, np.random.default_rng(0))
    u = common.users(toy, which[0])
    known = set(toy.items[[s for s in toy.train if toy.ptr[u] <= s < toy.ptr[u + 1]]]) | {toy.items[toy.ptr[u]]}
    assert not set(rows.ravel()) & known and rows.min() >= 1 and rows.max() <= toy.n_items
    assert all(len(set(row)) == 8 for row in rows)
    free = toy.n_items - len(known)
    assert abs(np.bincount(rows.ravel(), minlength=61)[sorted(set(range(1, 61)) - known)] / 3000 - 8 / free).max() < .03
    assert finetune.negatives(data, which[:2], 0, np.random.default_rng(0)).shape == (2, 0)


@pytest.mark.xfail(strict=True, raises=TimeoutError, reason="draws for ever when a user has trained on nearly everything")
def test_a_user_who_leaves_too_few_items_is_not_drawn_for_for_ever():
    class Impatient:
        n, rng = 0, np.random.default_rng(0)

        def integers(self, *args):
            self.n += 1
            if self.n > 10000:
                raise TimeoutError
            return self.rng.integers(*args)
    data = SimpleNamespace(items=np.arange(1, 20), ptr=np.array([0, 19]), n_items=20, train_items=[np.arange(1, 20)])
    with pytest.raises(click.ClickException):
        finetune.negatives(data, np.array([18]), 4, Impatient())


def test_a_user_s_training_items_end_where_training_does(toy):
    for u, items in enumerate(finetune.items_by_user(toy)):
        mine = [s for s in toy.train if toy.ptr[u] <= s < toy.ptr[u + 1]]
        assert set(items) == {toy.items[toy.ptr[u]], *toy.items[mine]}


def fake(**params):
    return SimpleNamespace(named_parameters=lambda: params.items())


def test_orthogonality_by_hand():
    eye = torch.eye(4)
    assert finetune.orthogonality(fake(lora_A=eye[:3], lora_B=eye[:, :3])) == 0
    # 2I: A A^T - I = 3I of size 3, Frobenius norm 3 sqrt(3); the other matrix adds 0; E is not counted
    assert finetune.orthogonality(fake(x_lora_A=2 * eye[:3], x_lora_B=eye[:, :3], lora_E=eye)).item() == pytest.approx(3 * 3 ** .5 / 2)
    mixed = fake(a_lora_A=2 * eye[:3], b_lora_A=eye[:2], a_lora_B=eye[:, :3], b_lora_B=3 * torch.eye(5)[:, :2])
    assert finetune.orthogonality(mixed).item() == pytest.approx((3 * 3 ** .5 + 8 * 2 ** .5) / 4)
    assert finetune.active_rank(fake(a_lora_E=torch.tensor([[1.], [0], [-2]]), lora_A=eye, b_lora_E=torch.zeros(2, 1))) == 2


@pytest.mark.parametrize("kind, qv, linear", [("decoder", 4, 14), ("encoder_decoder", 12, 38), ("flan", 12, 38), ("encoder", 4, 13)])
def test_adapted_layers(load, kind, qv, linear):
    # two layers each; T5: q and v of the encoder, of the decoder and of the decoder's look at the encoder
    m = load(kind)
    names = finetune.adapt_modules(m, "qv")
    assert len(names) == qv and {n.split(".")[-1] for n in names} <= {"q_proj", "v_proj", "q", "v", "query", "value"}
    every = finetune.adapt_modules(m, "linear")
    head = m.model.get_output_embeddings()
    assert set(names) < set(every) and all(m.model.get_submodule(n) is not head for n in every)
    assert len(every) == sum(isinstance(x, torch.nn.Linear) for x in m.model.modules()) - 1


# ---------------------------------------------------------------- end to end

def test_what_a_run_leaves_behind(chain, toy, decoder):
    assert {"config.json", "log.jsonl", "adapter", "soft_prompt.safetensors", "scores_val_15.npy", "neutral.npy"} <= {p.name for p in chain.delrec.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (chain.delrec / "adapter").iterdir()}
    run = common.load_run(chain.delrec, toy, ["finetune"])
    assert (run.llm, run.backbone, run.settings["backbone"]) == (decoder, "SASRec", "SASRec") and run.soft_prompt == str(chain.prompt)
    scores = np.load(chain.delrec / "scores_val_15.npy")
    asked = np.isfinite(scores).all(1)
    assert scores.shape == (len(toy.val), 15) and asked.sum() == 30 and np.isnan(scores[~asked]).all()
    neutral = np.load(chain.delrec / "neutral.npy")
    assert neutral.shape == (toy.n_items + 1,) and np.isfinite(neutral).all() and len(set(neutral)) > 50
    log = log_of(chain.delrec)
    assert [line["step"] for line in log] == list(range(1, 11)) and sum("val_hr@1" in line for line in log) == 2
    assert all(line["loss"] == pytest.approx(line["titles"] + line["candidates"], rel=1e-5) for line in log)

    # the numbers of the last line are those of the stored files: score - calibration * neutral, the best validated step
    cand = common.candidates(toy, "val", 15)[asked]
    target = cand == toy.items[toy.val[asked]][:, None]
    m = common.metrics(*common.compare(scores[asked] - run.calibration * neutral[cand], target))
    assert chain.tuned.json["val_hr@1"] == round(m["hr@1"].mean(), 4) and chain.tuned.json["n_val"] == 30
    raw = common.metrics(*common.compare(scores[asked], target))["hr@1"].mean()
    assert [line["val_hr@1"] for line in log if line["step"] == run.best_step] == [raw] and m["hr@1"].mean() >= raw


def test_ranks_are_reallocated_to_the_budget(chain):
    run = common.load_run(chain.delrec)
    assert run.rank == [4 * 6, 4 * 3]                    # q and v of two layers, 6 each; 3 each on average
    weights = load_file(chain.delrec / "adapter" / "adapter_model.safetensors")
    kept = {n: w.shape[0] for n, w in weights.items() if "lora_E" in n}
    assert sum(kept.values()) == 12 and len(set(kept.values())) > 1         # some layers got more than others
    assert all(w.any() for n, w in weights.items() if "lora_E" in n)


def test_the_soft_prompt_is_bit_for_bit_the_distilled_one(chain):
    assert torch.equal(soft_prompt(chain.delrec), soft_prompt(chain.prompt))


def test_an_opened_run_gives_the_stored_scores(chain, toy, alone, on_cpu, load):
    stored, scores, penalty, ranker = again(chain.delrec, toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-5, atol=1e-4)
    run = common.load_run(chain.delrec)
    assert np.allclose(penalty, run.calibration * np.load(chain.delrec / "neutral.npy")) and (run.calibration == 0) == (not penalty.any())
    # and the adapter is what makes them: the LM without it says something else
    plain = L.ranker(load("decoder"), toy, run.settings, ranker.P)
    asked = np.flatnonzero(np.isfinite(np.load(chain.delrec / "scores_val_15.npy")).all(1))
    assert abs(L.score_samples(plain, toy.val[asked], common.candidates(toy, "val", 15)[asked], alone) - stored).mean() > .2


@pytest.mark.parametrize("loss, verbalizer", [("candidates", "mean"), ("candidates", "letter"), ("titles", "likelihood"), ("titles", "mean"), ("both", "first")])
def test_every_loss_runs_on_a_decoder(loss, verbalizer, toy, decoder, script, tmp_path):
    # in the LM's usual dtype on this machine
    result = script(finetune.main, "--dataset", toy.folder, "--soft-prompt", "none", "--out", tmp_path / "run", "--llm", decoder, *SMALL,
                    "--loss", loss, "--verbalizer", verbalizer, "--calibrate")
    assert 0 <= result.json["val_hr@1"] <= 1 and all(np.isfinite(line["loss"]) for line in log_of(tmp_path / "run"))
    assert not (tmp_path / "run" / "soft_prompt.safetensors").exists()
    assert not np.load(tmp_path / "run" / "neutral.npy").any() or verbalizer != "letter"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lm_trains_its_adapter_only_and_can_be_opened_again(request, kind, toy, script, on_cpu, alone, tmp_path, monkeypatch):
    opened, load_lm = [], L.load_lm
    monkeypatch.setattr(L, "load_lm", lambda *args: opened.append(load_lm(*args)) or opened[-1])
    llm = request.getfixturevalue(kind)
    script(finetune.main, "--dataset", toy.folder, "--soft-prompt", "random", "--k", 3, "--out", tmp_path / "run", "--llm", llm, *SMALL,
           "--adapt", "linear", "--loss", "candidates", "--verbalizer", "mean", "--no-calibrate", "--lr", .03)
    fresh = dict(load_lm(llm, torch.device("cpu"), torch.float32).model.named_parameters())
    after = {n.replace(".base_layer", ""): p for n, p in opened[0].model.named_parameters() if "lora_" not in n and "ranknum" not in n}
    assert after.keys() == fresh.keys() and all(torch.equal(after[n], fresh[n]) for n in fresh)
    stored, scores, penalty, ranker = again(tmp_path / "run", toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-5, atol=1e-4)
    assert not penalty.any() and ranker.P.shape == (3, 32)
    plain = L.ranker(load_lm(llm, torch.device("cpu"), torch.float32), toy, common.load_run(tmp_path / "run").settings, ranker.P)
    asked = common.subset(len(toy.val), 16, 0)
    assert abs(L.score_samples(plain, toy.val[asked], common.candidates(toy, "val", 15)[asked], alone) - stored).mean() > 1e-3


def test_where_the_soft_prompt_comes_from(chain, toy, decoder, script, on_cpu, load, tmp_path):
    args = ["--dataset", toy.folder, "--llm", decoder, *SMALL, "--loss", "candidates", "--verbalizer", "mean", "--no-calibrate"]
    script(finetune.main, *args, "--soft-prompt", "random", "--k", 5, "--out", tmp_path / "random")
    assert torch.equal(soft_prompt(tmp_path / "random"), L.random_soft_prompt(load("decoder"), 5, 0))
    script(finetune.main, *args, "--soft-prompt", chain.prompt, "--k", 5, "--out", tmp_path / "distilled")
    assert torch.equal(soft_prompt(tmp_path / "distilled"), soft_prompt(chain.prompt))
    script(finetune.main, *args, "--soft-prompt", "none", "--out", tmp_path / "none")
    assert not (tmp_path / "none" / "soft_prompt.safetensors").exists()
    runs = [common.load_run(tmp_path / name) for name in ("random", "distilled", "none")]
    assert [r.soft_prompt for r in runs] == ["random", str(chain.prompt), "none"]
    assert runs[1].backbone_run == common.load_run(chain.prompt).backbone_run and runs[0].backbone_run is None
    scores = [np.load(tmp_path / name / "scores_val_15.npy") for name in ("random", "distilled", "none")]
    assert not np.allclose(scores[0], scores[1], equal_nan=True) and not np.allclose(scores[1], scores[2], equal_nan=True)


def test_micro_batches_do_not_change_the_gradient(chain, toy, backbone, decoder, script, on_cpu, tmp_path):
    _, args = stages(toy, backbone, decoder, chain.prompt, tmp_path / "run")
    args[args.index("--micro") + 1] = 3
    script(finetune.main, *args)
    same_run(tmp_path / "run", chain.delrec)


def test_two_processes_give_the_adapter_and_the_scores_of_one(chain, twins):
    same_run(twins.delrec, chain.delrec)
    assert common.load_run(twins.delrec).world == 2
    assert common.load_run(twins.delrec).calibration == common.load_run(chain.delrec).calibration


def same_run(a, b):
    for x, y in zip(log_of(a), log_of(b)):
        assert [x["loss"], x["titles"], x["candidates"]] == pytest.approx([y["loss"], y["titles"], y["candidates"]], rel=1e-3)
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.load(a / "scores_val_15.npy"), np.load(b / "scores_val_15.npy"), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.load(a / "neutral.npy"), np.load(b / "neutral.npy"), rtol=1e-3, atol=1e-3)


def test_the_same_seed_gives_the_same_run(chain, toy, backbone, decoder, script, on_cpu, tmp_path):
    _, args = stages(toy, backbone, decoder, chain.prompt, tmp_path / "run")
    script(finetune.main, *args)
    assert (tmp_path / "run" / "scores_val_15.npy").read_bytes() == (chain.delrec / "scores_val_15.npy").read_bytes()
    script(finetune.main, *args, "--dropout", .5)
    assert (tmp_path / "run" / "scores_val_15.npy").read_bytes() != (chain.delrec / "scores_val_15.npy").read_bytes()


# ---------------------------------------------------------------- planted signal

@pytest.fixture(scope="module")
def markov(tmp_path_factory, make_data):
    """100 users walk 12 steps on one circle of 40 items: the next title is determined by the last one, and by nothing else."""
    rng = np.random.default_rng(0)
    circle = rng.permutation(40) + 1
    rows = []
    for u in range(100):
        start, times = rng.integers(40), np.sort(rng.choice(1000, 12, replace=False))
        rows += [(u, circle[(start + j) % 40], t) for j, t in enumerate(times)]
    return make_data(tmp_path_factory.mktemp("markov"), rows, {i: title_of(i) for i in range(1, 41)}, "markov")


@pytest.mark.parametrize("loss, verbalizer, history", [("candidates", "mean", 1), ("titles", "likelihood", 2)])
def test_the_lm_learns_which_title_follows_which(loss, verbalizer, history, markov, decoder, script, on_cpu, alone, tmp_path):
    args = ["--dataset", markov.folder, "--soft-prompt", "none", "--llm", decoder, *SMALL, "--history", history, "--adapt", "linear", "--init-r", 12,
            "--target-r", 8, "--alpha", 32, "--loss", loss, "--verbalizer", verbalizer, "--batch", 16, "--micro", 16, "--val-samples", 80, "--no-calibrate"]
    learnt = script(finetune.main, *args, "--out", tmp_path / "run", "--samples", 1600, "--lr", .01, "--evals", 2)
    assert learnt.json["val_hr@1"] > .6, learnt.output   # chance .067
    stored, scores, *_ = again(tmp_path / "run", markov, alone)     # also where a layer kept no rank at all
    np.testing.assert_allclose(scores, stored, rtol=1e-3, atol=1e-3)
    idle = script(finetune.main, *args, "--out", tmp_path / "idle", "--samples", 160, "--lr", 1e-9, "--evals", 1)
    assert idle.json["val_hr@1"] < .25


def test_paper_sets_the_paper_s_choices_unless_typed(toy, decoder, script, on_cpu, tmp_path):
    args = ["--dataset", toy.folder, "--soft-prompt", "none", "--llm", decoder, "--samples", 40, "--batch", 8, "--micro", 8, "--val-samples", 8,
            "--evals", 1, "--init-r", 3, "--target-r", 2, "--candidates", 15, "--paper"]
    script(finetune.main, *args, "--out", tmp_path / "a")
    run = common.load_run(tmp_path / "a")
    assert {k: getattr(run, k) for k in finetune.PAPER} == finetune.PAPER
    assert (run.loss, run.adapt, run.settings["verbalizer"], run.settings["show"], run.calibration) == ("candidates", "qv", "mean", True, 0)
    script(finetune.main, *args, "--out", tmp_path / "b", "--loss", "titles", "--lr", .5, "--no-show")
    run = common.load_run(tmp_path / "b")
    assert (run.loss, run.lr, run.show, run.verbalizer, run.adapt) == ("titles", .5, False, "mean", "qv")


# ---------------------------------------------------------------- refusals

def refused(script, *args):
    return script(finetune.main, *args, code=1).error


def test_a_missing_soft_prompt_says_how_to_make_it(toy, backbone, script, tmp_path, monkeypatch):
    says = refused(script, "--dataset", toy.folder, "--soft-prompt", tmp_path / "nothing")
    assert f"no soft prompt in {tmp_path / 'nothing'}" in says and f"python distill.py --dataset {toy.folder}" in says and "--soft-prompt none" in says
    assert "holds a train_backbone run, expected one of: distill" in refused(script, "--dataset", toy.folder, "--soft-prompt", backbone)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    assert f"no soft prompt in {tmp_path / 'runs' / 'toy' / 'prompt'}" in refused(script, "--dataset", toy.folder)


def test_a_soft_prompt_of_another_lm_is_refused(chain, toy, decoder, encoder, script, on_cpu, tmp_path):
    says = refused(script, "--dataset", toy.folder, "--soft-prompt", chain.prompt, "--llm", encoder, "--out", tmp_path / "x")
    assert f"was distilled for {decoder}, --llm is {encoder}" in says
    wide = shutil.copytree(chain.prompt, tmp_path / "wide")
    L.save_soft_prompt(wide, torch.zeros(3, 64))
    assert "of width 64" in refused(script, "--dataset", toy.folder, "--soft-prompt", wide, "--llm", decoder, "--out", tmp_path / "x")


@pytest.mark.parametrize("args, says", [
    (["--init-r", 8, "--target-r", 8], "--target-r 8 must be below --init-r 8"), (["--init-r", 4, "--target-r", 9], "--target-r 9 must be below"),
    (["--samples", 32, "--batch", 8], "is 4 steps; AdaLoRA needs at least 5"), (["--dataset", "nowhere"], "no prepared data set"),
    (["--candidates", 17], "holds no 17 candidates for val, it holds [15, 20]")])
def test_relations_that_cannot_hold_are_refused(args, says, toy, decoder, script, on_cpu, tmp_path):
    assert says in refused(script, "--dataset", toy.folder, "--soft-prompt", "none", "--llm", decoder, "--out", tmp_path / "x", *args)


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_the_loss_on_titles_needs_a_decoder(request, kind, toy, script, on_cpu, tmp_path):
    assert "use --loss candidates" in refused(script, "--dataset", toy.folder, "--soft-prompt", "none", "--llm", request.getfixturevalue(kind),
                                              "--out", tmp_path / "x", *SMALL, "--loss", "titles", "--verbalizer", "mean")


def test_a_loss_that_explodes_stops_the_run(toy, decoder, script, on_cpu, tmp_path):
    says = refused(script, "--dataset", toy.folder, "--soft-prompt", "none", "--llm", decoder, "--out", tmp_path / "x", *SMALL, "--loss", "candidates",
                   "--verbalizer", "mean", "--lr", .1, "--weight-decay", 1e20)
    assert "lower --lr" in says and not (tmp_path / "x" / "config.json").exists() and not (tmp_path / "x" / "adapter").exists()
