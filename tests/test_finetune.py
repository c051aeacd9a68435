"""finetune.py end to end on tiny LMs: what it writes and gives back, and that nothing but the
adapter moves.
"""

import shutil

import numpy as np
import pytest
import torch
from chain import stages
from commands import log_of, prompt_of, same_run
from tiny_lms import KINDS
from tuning import BY_MEAN, SMALL, scores_again, stored_scores

import distill
import finetune
from delrec.data.prepared import candidates, halves_of_validation, subset
from delrec.lm import differences, model, student
from delrec.lm.ranker import make_ranker, score_samples
from delrec.metrics import compare, metrics
from delrec.runtime import load_run

CPU = torch.device("cpu")


@pytest.fixture
def tune_again(chain, toy, backbone, decoder, script, on_cpu, tmp_path):
    """tune_again(options) -> (the folder of the chain's stage 2, made once more, what it said)."""

    def tune(options=""):
        _, args = stages(toy, backbone, decoder, chain.prompt, tmp_path / "run")
        return tmp_path / "run", script(finetune.main, *args, *options.split()).output

    return tune


# ---------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves_behind(chain, toy, backbone, decoder):
    files = {p.name for p in chain.delrec.iterdir()}
    assert {"config.json", "log.jsonl", "adapter", "soft_prompt.safetensors"} <= files
    assert {"scores_val_15.npy", "neutral.npy"} <= files
    in_adapter = {p.name for p in (chain.delrec / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= in_adapter
    run = load_run(chain.delrec, toy, ["finetune"])
    assert run.llm == decoder
    assert run.settings["backbone"] == "SASRec"
    assert run.backbone_run == str(backbone)
    assert run.soft_prompt == str(chain.prompt)
    scores = np.load(chain.delrec / "scores_val_15.npy")
    asked = np.isfinite(scores).all(1)
    assert scores.shape == (len(toy.val), 15)
    assert asked.sum() == 30
    assert np.isnan(scores[~asked]).all()
    neutral = np.load(chain.delrec / "neutral.npy")
    assert neutral.shape == (toy.n_items + 1,)
    assert np.isfinite(neutral).all()
    assert len(set(neutral)) > 50


def test_the_log_holds_each_step_and_the_parts_of_its_loss(chain):
    log = log_of(chain.delrec)
    assert [line["step"] for line in log] == list(range(1, 11))
    assert sum("val_hr@1" in line for line in log) == 2
    for line in log:
        assert line["loss"] == pytest.approx(line["titles"] + line["candidates"], rel=1e-5)


def test_the_last_line_tells_the_calibrated_metrics_of_the_best_step(chain, toy):
    run, log = load_run(chain.delrec, toy), log_of(chain.delrec)
    asked, scores = stored_scores(chain.delrec)
    neutral = np.load(chain.delrec / "neutral.npy")
    cand = candidates(toy, "val", 15)[asked]
    target = cand == toy.items[toy.val[asked]][:, None]
    m = metrics(*compare(scores - run.calibration * neutral[cand], target))
    assert chain.tuned.json["val_hr@1"] == round(m["hr@1"].mean(), 4)
    assert chain.tuned.json["n_val"] == 30
    raw = metrics(*compare(scores, target))["hr@1"].mean()
    assert [line["val_hr@1"] for line in log if line["step"] == run.best_step] == [raw]
    # calibration is chosen by NDCG@10, and 0 is among its weights
    assert m["ndcg@10"].mean() >= metrics(*compare(scores, target))["ndcg@10"].mean()


def test_an_opened_run_gives_the_stored_scores(chain, toy, alone, on_cpu, load):
    asked, stored = stored_scores(chain.delrec)
    scores, ranker, penalty = scores_again(chain.delrec, toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-5, atol=1e-4)
    run = load_run(chain.delrec)
    assert np.allclose(penalty, run.calibration * np.load(chain.delrec / "neutral.npy"))
    assert (run.calibration == 0) == (not penalty.any())
    # and the adapter is what makes them: the LM without it says something else
    plain = make_ranker(load("decoder"), toy, run.settings, ranker.P)
    assert abs(score_samples(plain, "val", asked, 15, alone) - stored).mean() > 0.2


# ---------------------------------------------------------------- losses and LMs


@pytest.mark.parametrize(
    "loss, verbalizer",
    [
        ("candidates", "mean"),
        ("candidates", "letter"),
        ("catalogue", "first"),
        ("titles", "likelihood"),
        ("titles", "mean"),
        ("both", "first"),
    ],
)
def test_every_loss_runs_on_a_decoder(loss, verbalizer, to_tune, run, tmp_path):
    # in the LM's usual dtype on this machine
    out = tmp_path / "run"
    choices = f"--soft-prompt none --loss {loss} --verbalizer {verbalizer} --calibrate"
    result = run(finetune.main, f"{to_tune} --out {out} {choices}")
    assert 0 <= result.json["val_hr@1"] <= 1
    assert all(np.isfinite(line["loss"]) for line in log_of(out))
    assert not (out / "soft_prompt.safetensors").exists()
    assert not np.load(out / "neutral.npy").any() or verbalizer != "letter"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lm_trains_its_adapter_only_and_can_be_opened_again(
    request, kind, toy, run, on_cpu, alone, tmp_path, monkeypatch
):
    opened, load_lm = [], model.load_lm

    def load_and_keep(*args, **more):
        opened.append(load_lm(*args, **more))
        return opened[-1]

    monkeypatch.setattr(student, "load_lm", load_and_keep)
    llm, out = request.getfixturevalue(kind), tmp_path / "run"
    choices = f"--soft-prompt random --k 3 --adapt linear {BY_MEAN} --lr 0.03"
    run(finetune.main, f"--dataset {toy.folder} --llm {llm} {SMALL} --out {out} {choices}")
    fresh = load_lm(llm, CPU, torch.float32)
    before = dict(fresh.model.named_parameters())
    after = {
        n.replace(".base_layer", ""): p
        for n, p in opened[0].model.named_parameters()
        if "lora_" not in n and "ranknum" not in n
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    asked, stored = stored_scores(out)
    scores, ranker, penalty = scores_again(out, toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-5, atol=1e-4)
    assert not penalty.any()
    assert ranker.P.shape == (3, 32)
    first, _ = halves_of_validation(toy)
    assert asked.tolist() == first[subset(len(first), 16, 0)].tolist()
    plain = make_ranker(fresh, toy, load_run(out).settings, ranker.P)
    assert abs(score_samples(plain, "val", asked, 15, alone) - stored).mean() > 1e-3


# ---------------------------------------------------------------- what a run promises


def test_micro_batches_do_not_change_the_gradient(tune_again, chain):
    folder, _ = tune_again("--micro 3")
    same_run(folder, chain.delrec)


def test_memory_options_do_not_change_the_run(tune_again, chain):
    folder, said = tune_again("--micro auto --gradient-checkpointing")
    same_run(folder, chain.delrec)
    assert "--micro auto: a prompt takes" in said
    assert "minutes to go" in said


def test_two_processes_give_the_adapter_and_the_scores_of_one(chain, twins):
    same_run(twins.delrec, chain.delrec)
    assert load_run(twins.delrec).world == 2
    assert load_run(twins.delrec).calibration == load_run(chain.delrec).calibration


def test_any_batch_is_shared_among_any_number_of_processes(
    chain, toy, backbone, decoder, script, on_cpu, two_processes, tmp_path
):
    # one sample leaves the second process idle, three leave it half of the work; dropout belongs to
    # the micro-batch, not to the process
    def jobs(who):
        for batch in (1, 3):
            prompt, delrec = (tmp_path / f"{name}-{who}-{batch}" for name in ("prompt", "delrec"))
            to_prompt, to_delrec = stages(toy, backbone, decoder, prompt, delrec)
            micro = -(-batch // 2)
            few = f"--batch {batch} --micro {micro} --samples {6 * batch} --evals 1 --val-samples 8"
            yield "distill", [*to_prompt, *few.split()]
            from_chain = ["--soft-prompt", chain.prompt, "--dropout", 0.3]
            yield "finetune", [*to_delrec, *from_chain, *few.split()]

    mains = {"distill": distill.main, "finetune": finetune.main}
    for name, args in jobs("one"):
        script(mains[name], *args)
    two_processes(list(jobs("two")))
    for batch in (1, 3):
        same_run(tmp_path / f"delrec-two-{batch}", tmp_path / f"delrec-one-{batch}")
        prompts = [prompt_of(tmp_path / f"prompt-{who}-{batch}") for who in ("two", "one")]
        torch.testing.assert_close(*prompts, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_run(tune_again, chain):
    folder, _ = tune_again()
    bits = (chain.delrec / "scores_val_15.npy").read_bytes()
    assert (folder / "scores_val_15.npy").read_bytes() == bits
    folder, _ = tune_again("--dropout 0.5 --overwrite")
    assert (folder / "scores_val_15.npy").read_bytes() != bits


def test_nothing_of_an_earlier_run_passes_for_the_new_one_s(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    folder = shutil.copytree(chain.delrec, tmp_path / "delrec")
    # the evaluation of the earlier run
    np.save(folder / "scores_test_15.npy", np.ones((len(toy.test), 15), np.float32))
    np.save(folder / "ranks_test_15.npy", np.ones(len(toy.test), np.float32))
    _, args = stages(toy, backbone, decoder, "none", folder)
    script(finetune.main, *args, "--backbone", backbone, "--overwrite")
    files = {p.name for p in folder.iterdir()}
    assert not {"scores_test_15.npy", "ranks_test_15.npy", "soft_prompt.safetensors"} & files
    assert (folder / "adapter").is_dir()
    assert (folder / "scores_val_15.npy").exists()


def test_paper_sets_the_paper_s_choices_unless_typed(toy, decoder, run, on_cpu, tmp_path):
    few = (
        "--samples 40 --batch 8 --micro 8 --val-samples 8 --evals 1 --init-r 3 --target-r 2 "
        "--candidates 15 --soft-prompt none"
    )
    paper = f"--dataset {toy.folder} --llm {decoder} {few} --paper"
    said = run(finetune.main, f"{paper} --out {tmp_path}/a").output
    a = load_run(tmp_path / "a")
    typed = {"samples": 40, "batch": 8}
    assert {k: getattr(a, k) for k in finetune.PAPER} == finetune.PAPER | typed
    assert (a.loss, a.adapt, a.calibration) == ("catalogue", "qv", 0)
    assert (a.settings["verbalizer"], a.settings["show"]) == ("mean", True)
    # what stays different is said, once
    assert all(said.count(f"  - {line}\n") == 1 for line in differences.STAGE_2)
    run(finetune.main, f"{paper} --out {tmp_path}/b --loss titles --lr 0.5 --no-show")
    b = load_run(tmp_path / "b")
    assert (b.loss, b.lr, b.show) == ("titles", 0.5, False)
    assert (b.verbalizer, b.adapt) == ("mean", "qv")


def test_both_stages_read_the_same_prompts_unless_told_otherwise():
    shape = ("verbalizer", "show", "instruct", "history", "max_title", "input")
    stages = [
        {option.name: option.default for option in main.params if option.name in shape}
        for main in (distill.main, finetune.main)
    ]
    assert stages[0] == stages[1] and len(stages[0]) == len(shape)
    order = next(option for option in finetune.main.params if option.name == "order")
    assert order.default == "shuffled"
    assert distill.TITLES["history"] == finetune.TITLES["history"]
    assert distill.VECTORS["history"] == finetune.VECTORS["history"]
