"""finetune.py end to end on tiny LMs: what it writes and gives back, that AdaLoRA runs and P does
not move, and that it learns.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import stages
from safetensors.torch import load_file
from tiny_lms import KINDS
from toys import title_of

import distill
import evaluate
import finetune
from delrec import runtime
from delrec.data.prepared import candidates, subset
from delrec.lm import model, student
from delrec.lm.adalora import orthogonality
from delrec.lm.layers import adapt_modules
from delrec.lm.ranker import make_ranker, open_run, score_samples
from delrec.lm.soft_prompt import save_soft_prompt
from delrec.lm.text import random_soft_prompt
from delrec.metrics import compare, metrics
from delrec.runtime import load_run

SMALL = [
    "--no-show",
    "--order",
    "shuffled",
    "--history",
    4,
    "--max-title",
    32,
    "--max-tokens",
    1024,
    "--adapt",
    "qv",
    "--init-r",
    4,
    "--target-r",
    2,
    "--alpha",
    8,
    "--dropout",
    0,
    "--orthogonal",
    0.1,
    "--candidates",
    15,
    "--batch",
    8,
    "--micro",
    8,
    "--weight-decay",
    1e-6,
    "--warmup",
    0.1,
    "--seed",
    0,
    "--samples",
    48,
    "--lr",
    0.01,
    "--val-samples",
    16,
    "--evals",
    1,
]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def soft_prompt(folder):
    return load_file(folder / "soft_prompt.safetensors")["prompt_embeddings"]


def again(folder, data, alone):
    """The stored validation scores of a run, and those of the run opened anew."""
    run = load_run(folder, data, ["finetune"])
    ranker, penalty = open_run(run, data, torch.device("cpu"))
    stored = np.load(folder / "scores_val_15.npy")
    asked = np.flatnonzero(np.isfinite(stored).all(1))
    return stored[asked], score_samples(ranker, "val", asked, 15, alone), penalty, ranker


# ---------------------------------------------------------------- the pieces


def fake(**params):
    return SimpleNamespace(named_parameters=lambda: params.items())


def test_orthogonality_by_hand():
    eye = torch.eye(4)
    assert orthogonality(fake(lora_A=eye[:3], lora_B=eye[:, :3])) == 0
    # 2I: A A^T - I = 3I of size 3, Frobenius norm 3 sqrt(3); the other matrix adds 0; E is not
    # counted
    assert orthogonality(
        fake(x_lora_A=2 * eye[:3], x_lora_B=eye[:, :3], lora_E=eye)
    ).item() == pytest.approx(3 * 3**0.5 / 2)
    mixed = fake(
        a_lora_A=2 * eye[:3],
        b_lora_A=eye[:2],
        a_lora_B=eye[:, :3],
        b_lora_B=3 * torch.eye(5)[:, :2],
    )
    assert orthogonality(mixed).item() == pytest.approx((3 * 3**0.5 + 8 * 2**0.5) / 4)


@pytest.mark.parametrize(
    "kind, qv, linear",
    [("decoder", 4, 14), ("encoder_decoder", 12, 38), ("flan", 12, 38), ("encoder", 4, 13)],
)
def test_adapted_layers(load, kind, qv, linear):
    # two layers each; T5: q and v of the encoder, of the decoder and of the decoder's look at the
    # encoder
    m = load(kind)
    names = adapt_modules(m, "qv")
    assert len(names) == qv and {n.split(".")[-1] for n in names} <= {
        "q_proj",
        "v_proj",
        "q",
        "v",
        "query",
        "value",
    }
    every = adapt_modules(m, "linear")
    head = m.model.get_output_embeddings()
    assert set(names) < set(every) and all(m.model.get_submodule(n) is not head for n in every)
    assert len(every) == sum(isinstance(x, torch.nn.Linear) for x in m.model.modules()) - 1


# ---------------------------------------------------------------- end to end


def test_what_a_run_leaves_behind(chain, toy, backbone, decoder):
    assert {
        "config.json",
        "log.jsonl",
        "adapter",
        "soft_prompt.safetensors",
        "scores_val_15.npy",
        "neutral.npy",
    } <= {p.name for p in chain.delrec.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in (chain.delrec / "adapter").iterdir()
    }
    run = load_run(chain.delrec, toy, ["finetune"])
    assert (run.llm, run.settings["backbone"], run.backbone_run, run.soft_prompt) == (
        decoder,
        "SASRec",
        str(backbone),
        str(chain.prompt),
    )
    scores = np.load(chain.delrec / "scores_val_15.npy")
    asked = np.isfinite(scores).all(1)
    assert (
        scores.shape == (len(toy.val), 15) and asked.sum() == 30 and np.isnan(scores[~asked]).all()
    )
    neutral = np.load(chain.delrec / "neutral.npy")
    assert (
        neutral.shape == (toy.n_items + 1,)
        and np.isfinite(neutral).all()
        and len(set(neutral)) > 50
    )
    log = log_of(chain.delrec)
    assert [line["step"] for line in log] == list(range(1, 11)) and sum(
        "val_hr@1" in line for line in log
    ) == 2
    assert all(
        line["loss"] == pytest.approx(line["titles"] + line["candidates"], rel=1e-5) for line in log
    )

    # the numbers of the last line are those of the stored files: score - calibration * neutral, the
    # best validated step
    cand = candidates(toy, "val", 15)[asked]
    target = cand == toy.items[toy.val[asked]][:, None]
    m = metrics(*compare(scores[asked] - run.calibration * neutral[cand], target))
    assert (
        chain.tuned.json["val_hr@1"] == round(m["hr@1"].mean(), 4)
        and chain.tuned.json["n_val"] == 30
    )
    raw = metrics(*compare(scores[asked], target))["hr@1"].mean()
    assert [line["val_hr@1"] for line in log if line["step"] == run.best_step] == [raw] and m[
        "hr@1"
    ].mean() >= raw


def test_ranks_are_reallocated_to_the_budget(chain):
    run = load_run(chain.delrec)
    # q and v of two layers, 6 each; 3 each on average
    assert run.rank == [4 * 6, 4 * 3]
    weights = load_file(chain.delrec / "adapter" / "adapter_model.safetensors")
    kept = {n: w.shape[0] for n, w in weights.items() if "lora_E" in n}
    # some layers got more than others
    assert sum(kept.values()) == 12 and len(set(kept.values())) > 1
    assert all(w.any() for n, w in weights.items() if "lora_E" in n)


def test_a_kept_singular_value_may_be_zero(toy, decoder, script, on_cpu, tmp_path, monkeypatch):
    # Lion moves by multiples of the learning rate, so a kept value returns to exactly 0 now and
    # then
    class Lion(finetune.Lion):
        def step(self):
            super().step()
            value = max(
                (p for group in self.param_groups for p in group["params"] if p.shape[1] == 1),
                key=lambda p: p.abs().max(),
            )
            value.data[value.abs().argmax()] = 0

    monkeypatch.setattr(finetune, "Lion", Lion)
    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--out",
        tmp_path / "run",
        "--llm",
        decoder,
        *SMALL,
        "--loss",
        "candidates",
        "--verbalizer",
        "mean",
        "--no-calibrate",
    )
    assert load_run(tmp_path / "run").rank == [16, 8]


def test_the_soft_prompt_is_bit_for_bit_the_distilled_one(chain):
    assert torch.equal(soft_prompt(chain.delrec), soft_prompt(chain.prompt))


def test_an_opened_run_gives_the_stored_scores(chain, toy, alone, on_cpu, load):
    stored, scores, penalty, ranker = again(chain.delrec, toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-5, atol=1e-4)
    run = load_run(chain.delrec)
    assert np.allclose(penalty, run.calibration * np.load(chain.delrec / "neutral.npy")) and (
        run.calibration == 0
    ) == (not penalty.any())
    # and the adapter is what makes them: the LM without it says something else
    plain = make_ranker(load("decoder"), toy, run.settings, ranker.P)
    asked = np.flatnonzero(np.isfinite(np.load(chain.delrec / "scores_val_15.npy")).all(1))
    assert abs(score_samples(plain, "val", asked, 15, alone) - stored).mean() > 0.2


@pytest.mark.parametrize(
    "loss, verbalizer",
    [
        ("candidates", "mean"),
        ("candidates", "letter"),
        ("titles", "likelihood"),
        ("titles", "mean"),
        ("both", "first"),
    ],
)
def test_every_loss_runs_on_a_decoder(loss, verbalizer, toy, decoder, script, tmp_path):
    # in the LM's usual dtype on this machine
    result = script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--out",
        tmp_path / "run",
        "--llm",
        decoder,
        *SMALL,
        "--loss",
        loss,
        "--verbalizer",
        verbalizer,
        "--calibrate",
    )
    assert 0 <= result.json["val_hr@1"] <= 1 and all(
        np.isfinite(line["loss"]) for line in log_of(tmp_path / "run")
    )
    assert not (tmp_path / "run" / "soft_prompt.safetensors").exists()
    assert not np.load(tmp_path / "run" / "neutral.npy").any() or verbalizer != "letter"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lm_trains_its_adapter_only_and_can_be_opened_again(
    request, kind, toy, script, on_cpu, alone, tmp_path, monkeypatch
):
    opened, load_lm = [], model.load_lm
    monkeypatch.setattr(
        student,
        "load_lm",
        lambda *args, **more: opened.append(load_lm(*args, **more)) or opened[-1],
    )
    llm = request.getfixturevalue(kind)
    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "random",
        "--k",
        3,
        "--out",
        tmp_path / "run",
        "--llm",
        llm,
        *SMALL,
        "--adapt",
        "linear",
        "--loss",
        "candidates",
        "--verbalizer",
        "mean",
        "--no-calibrate",
        "--lr",
        0.03,
    )
    fresh = dict(load_lm(llm, torch.device("cpu"), torch.float32).model.named_parameters())
    after = {
        n.replace(".base_layer", ""): p
        for n, p in opened[0].model.named_parameters()
        if "lora_" not in n and "ranknum" not in n
    }
    assert after.keys() == fresh.keys() and all(torch.equal(after[n], fresh[n]) for n in fresh)
    stored, scores, penalty, ranker = again(tmp_path / "run", toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-5, atol=1e-4)
    assert not penalty.any() and ranker.P.shape == (3, 32)
    plain = make_ranker(
        load_lm(llm, torch.device("cpu"), torch.float32),
        toy,
        load_run(tmp_path / "run").settings,
        ranker.P,
    )
    asked = subset(len(toy.val), 16, 0)
    assert abs(score_samples(plain, "val", asked, 15, alone) - stored).mean() > 1e-3


def test_where_the_soft_prompt_comes_from(chain, toy, decoder, script, on_cpu, load, tmp_path):
    args = [
        "--dataset",
        toy.folder,
        "--llm",
        decoder,
        *SMALL,
        "--loss",
        "candidates",
        "--verbalizer",
        "mean",
        "--no-calibrate",
    ]
    script(finetune.main, *args, "--soft-prompt", "random", "--k", 5, "--out", tmp_path / "random")
    assert torch.equal(soft_prompt(tmp_path / "random"), random_soft_prompt(load("decoder"), 5, 0))
    script(
        finetune.main,
        *args,
        "--soft-prompt",
        chain.prompt,
        "--k",
        5,
        "--out",
        tmp_path / "distilled",
    )
    assert torch.equal(soft_prompt(tmp_path / "distilled"), soft_prompt(chain.prompt))
    script(finetune.main, *args, "--soft-prompt", "none", "--out", tmp_path / "none")
    assert not (tmp_path / "none" / "soft_prompt.safetensors").exists()
    runs = [load_run(tmp_path / name) for name in ("random", "distilled", "none")]
    assert [r.soft_prompt for r in runs] == ["random", str(chain.prompt), "none"]
    assert runs[1].backbone_run == load_run(chain.prompt).backbone_run
    scores = [
        np.load(tmp_path / name / "scores_val_15.npy") for name in ("random", "distilled", "none")
    ]
    assert not np.allclose(scores[0], scores[1], equal_nan=True) and not np.allclose(
        scores[1], scores[2], equal_nan=True
    )


def test_micro_batches_do_not_change_the_gradient(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    _, args = stages(toy, backbone, decoder, chain.prompt, tmp_path / "run")
    args[args.index("--micro") + 1] = 3
    script(finetune.main, *args)
    same_run(tmp_path / "run", chain.delrec)


def test_memory_options_do_not_change_the_run(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    _, args = stages(toy, backbone, decoder, chain.prompt, tmp_path / "run")
    args[args.index("--micro") + 1] = "auto"
    out = script(finetune.main, *args, "--gradient-checkpointing").output
    same_run(tmp_path / "run", chain.delrec)
    assert "--micro auto: a prompt takes" in out and "minutes to go" in out


def test_two_processes_give_the_adapter_and_the_scores_of_one(chain, twins):
    same_run(twins.delrec, chain.delrec)
    assert load_run(twins.delrec).world == 2
    assert load_run(twins.delrec).calibration == load_run(chain.delrec).calibration


def test_any_batch_is_shared_among_any_number_of_processes(
    chain, toy, backbone, decoder, script, on_cpu, two_processes, tmp_path
):
    # one sample leaves the second process idle, three leave it half of the work; dropout belongs to
    # the micro-batch, not to the process
    jobs = []
    for batch in (1, 3):
        for who in ("one", "two"):
            to_prompt, to_delrec = stages(
                toy,
                backbone,
                decoder,
                tmp_path / f"prompt-{who}-{batch}",
                tmp_path / f"delrec-{who}-{batch}",
            )
            to_delrec[to_delrec.index("--soft-prompt") + 1] = chain.prompt
            for name, args in (
                ("distill", to_prompt),
                ("finetune", [*to_delrec, "--dropout", 0.3]),
            ):
                args = [
                    *args,
                    "--batch",
                    batch,
                    "--micro",
                    -(-batch // 2),
                    "--samples",
                    6 * batch,
                    "--evals",
                    1,
                    "--val-samples",
                    8,
                ]
                jobs.append((who, name, args))
    for who, name, args in jobs:
        if who == "one":
            script({"distill": distill, "finetune": finetune}[name].main, *args)
    two_processes([(name, args) for who, name, args in jobs if who == "two"])
    for batch in (1, 3):
        same_run(tmp_path / f"delrec-two-{batch}", tmp_path / f"delrec-one-{batch}")
        torch.testing.assert_close(
            soft_prompt(tmp_path / f"prompt-two-{batch}"),
            soft_prompt(tmp_path / f"prompt-one-{batch}"),
            rtol=1e-5,
            atol=1e-5,
        )


def same_run(a, b):
    for x, y in zip(log_of(a), log_of(b)):
        assert x.keys() == y.keys() and [
            x[k] for k in x if k in ("loss", "titles", "candidates")
        ] == pytest.approx([y[k] for k in x if k in ("loss", "titles", "candidates")], rel=1e-3)
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        np.load(a / "scores_val_15.npy"), np.load(b / "scores_val_15.npy"), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(
        np.load(a / "neutral.npy"), np.load(b / "neutral.npy"), rtol=1e-3, atol=1e-3
    )


def test_the_same_seed_gives_the_same_run(chain, toy, backbone, decoder, script, on_cpu, tmp_path):
    _, args = stages(toy, backbone, decoder, chain.prompt, tmp_path / "run")
    script(finetune.main, *args)
    assert (tmp_path / "run" / "scores_val_15.npy").read_bytes() == (
        chain.delrec / "scores_val_15.npy"
    ).read_bytes()
    script(finetune.main, *args, "--dropout", 0.5, "--overwrite")
    assert (tmp_path / "run" / "scores_val_15.npy").read_bytes() != (
        chain.delrec / "scores_val_15.npy"
    ).read_bytes()


# ---------------------------------------------------------------- planted signal


@pytest.fixture(scope="module")
def markov(tmp_path_factory, make_data):
    """100 users walk 12 steps on one circle of 40 items: the next title is determined by the last
    one, and by nothing else.
    """
    rng = np.random.default_rng(0)
    circle = rng.permutation(40) + 1
    rows = []
    for u in range(100):
        start, times = rng.integers(40), np.sort(rng.choice(1000, 12, replace=False))
        rows += [(u, circle[(start + j) % 40], t) for j, t in enumerate(times)]
    return make_data(
        tmp_path_factory.mktemp("markov"), rows, {i: title_of(i) for i in range(1, 41)}, "markov"
    )


@pytest.mark.parametrize(
    "loss, verbalizer, history", [("candidates", "mean", 1), ("titles", "likelihood", 2)]
)
def test_the_lm_learns_which_title_follows_which(
    loss, verbalizer, history, markov, decoder, script, on_cpu, alone, tmp_path
):
    args = [
        "--dataset",
        markov.folder,
        "--soft-prompt",
        "none",
        "--llm",
        decoder,
        *SMALL,
        "--history",
        history,
        "--adapt",
        "linear",
        "--init-r",
        12,
        "--target-r",
        8,
        "--alpha",
        32,
        "--loss",
        loss,
        "--verbalizer",
        verbalizer,
        "--batch",
        16,
        "--micro",
        16,
        "--val-samples",
        80,
        "--no-calibrate",
    ]
    learnt = script(
        finetune.main,
        *args,
        "--out",
        tmp_path / "run",
        "--samples",
        2000,
        "--lr",
        0.01,
        "--evals",
        2,
    )
    assert learnt.json["val_hr@1"] > 0.6, learnt.output  # chance .067
    # also where a layer kept no rank at all
    stored, scores, *_ = again(tmp_path / "run", markov, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-3, atol=1e-3)
    idle = script(
        finetune.main,
        *args,
        "--out",
        tmp_path / "idle",
        "--samples",
        160,
        "--lr",
        1e-9,
        "--evals",
        1,
    )
    assert idle.json["val_hr@1"] < 0.25


@pytest.fixture(scope="module")
def oracle(toy, make_backbone, tmp_path_factory):
    """A backbone that knows the truth: in its order the right candidate always stands first."""

    def score(samples):
        s = np.random.default_rng(0).random((len(samples), toy.n_items + 1))
        s[np.arange(len(samples)), toy.items[samples]] = 10
        return s

    return make_backbone(tmp_path_factory.mktemp("oracle") / "sasrec", toy, score)


def test_the_lm_learns_where_the_backbone_lists_the_truth(
    toy, decoder, oracle, script, on_cpu, alone, tmp_path
):
    args = [
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--backbone",
        oracle,
        "--llm",
        decoder,
        *SMALL,
        "--history",
        2,
        "--adapt",
        "linear",
        "--batch",
        16,
        "--micro",
        16,
        "--loss",
        "candidates",
        "--verbalizer",
        "letter",
        "--val-samples",
        60,
        "--samples",
        480,
        "--no-calibrate",
    ]
    first = script(finetune.main, *args, "--order", "backbone", "--out", tmp_path / "first")
    assert first.json["val_hr@1"] > 0.9  # always the letter A
    stored, scores, *_ = again(tmp_path / "first", toy, alone)
    np.testing.assert_allclose(scores, stored, rtol=1e-3, atol=1e-3)
    assert load_run(tmp_path / "first").backbone_run == str(oracle)
    anywhere = script(finetune.main, *args, "--order", "shuffled", "--out", tmp_path / "anywhere")
    assert anywhere.json["val_hr@1"] < 0.3
    # the table ranks the stored candidates, whatever order the prompt listed them in
    script(
        evaluate.main,
        "--ckpt",
        tmp_path / "first",
        "--candidates",
        15,
        "--limit",
        20,
        "--val-samples",
        20,
    )
    rows = json.loads((tmp_path / "first" / "evaluation" / "metrics.json").read_text())["rows"]
    assert (
        rows["first"]["hr@1"] > 0.9
        and rows["sasrec"]["hr@1"] == 1
        and "backbone order" in rows["first"]["note"]
    )


def test_paper_sets_the_paper_s_choices_unless_typed(toy, decoder, script, on_cpu, tmp_path):
    args = [
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--llm",
        decoder,
        "--samples",
        40,
        "--batch",
        8,
        "--micro",
        8,
        "--val-samples",
        8,
        "--evals",
        1,
        "--init-r",
        3,
        "--target-r",
        2,
        "--candidates",
        15,
        "--paper",
    ]
    script(finetune.main, *args, "--out", tmp_path / "a")
    run = load_run(tmp_path / "a")
    assert {k: getattr(run, k) for k in finetune.PAPER} == finetune.PAPER
    assert (
        run.loss,
        run.adapt,
        run.settings["verbalizer"],
        run.settings["show"],
        run.calibration,
    ) == ("candidates", "qv", "mean", True, 0)
    script(
        finetune.main, *args, "--out", tmp_path / "b", "--loss", "titles", "--lr", 0.5, "--no-show"
    )
    run = load_run(tmp_path / "b")
    assert (run.loss, run.lr, run.show, run.verbalizer, run.adapt) == (
        "titles",
        0.5,
        False,
        "mean",
        "qv",
    )


# ---------------------------------------------------------------- refusals


def refused(script, *args):
    return script(finetune.main, *args, code=1).error


def test_a_missing_soft_prompt_says_how_to_make_it(toy, backbone, script, tmp_path, monkeypatch):
    says = refused(script, "--dataset", toy.folder, "--soft-prompt", tmp_path / "nothing")
    assert (
        f"no soft prompt in {tmp_path / 'nothing'}" in says
        and f"python distill.py --dataset {toy.folder}" in says
        and "--soft-prompt none" in says
    )
    assert "holds a train_backbone run, expected one of: distill" in refused(
        script, "--dataset", toy.folder, "--soft-prompt", backbone
    )
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    assert f"no soft prompt in {tmp_path / 'runs' / 'toy' / 'prompt'}" in refused(
        script, "--dataset", toy.folder
    )


def test_a_soft_prompt_of_another_lm_is_refused(
    chain, toy, decoder, encoder, script, on_cpu, tmp_path
):
    says = refused(
        script,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        chain.prompt,
        "--llm",
        encoder,
        "--out",
        tmp_path / "x",
    )
    assert f"was distilled for {decoder}, --llm is {encoder}" in says
    wide = shutil.copytree(chain.prompt, tmp_path / "wide")
    save_soft_prompt(wide, torch.zeros(3, 64))
    assert "of width 64" in refused(
        script,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        wide,
        "--llm",
        decoder,
        "--out",
        tmp_path / "x",
    )


@pytest.mark.parametrize(
    "args, says",
    [
        (["--init-r", 8, "--target-r", 8], "--target-r 8 must be below --init-r 8"),
        (["--init-r", 4, "--target-r", 9], "--target-r 9 must be below"),
        (["--samples", 32, "--batch", 8], "is 4 steps; AdaLoRA needs at least 5"),
        (["--dataset", "nowhere"], "no prepared data set"),
        (["--candidates", 17], "holds no 17 candidates for val, it holds [15, 20]"),
        (
            ["--order", "backbone", "--show", "--backbone", "/nowhere"],
            "--order backbone needs /nowhere/scores_train_15.npy",
        ),
    ],
)
def test_relations_that_cannot_hold_are_refused(args, says, toy, decoder, script, on_cpu, tmp_path):
    assert says in refused(
        script,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--llm",
        decoder,
        "--out",
        tmp_path / "x",
        "--order",
        "shuffled",
        "--candidates",
        15,
        *args,
    )


def test_a_prompt_that_lists_no_candidates_needs_no_backbone_for_their_order(
    toy, decoder, script, on_cpu, tmp_path
):
    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--backbone",
        tmp_path / "nowhere",
        "--llm",
        decoder,
        "--out",
        tmp_path / "x",
        *SMALL,
        "--order",
        "backbone",
        "--no-show",
        "--loss",
        "candidates",
        "--verbalizer",
        "mean",
        "--no-calibrate",
    )


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_the_loss_on_titles_needs_a_decoder(request, kind, toy, script, on_cpu, tmp_path):
    assert "use --loss candidates" in refused(
        script,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--llm",
        request.getfixturevalue(kind),
        "--out",
        tmp_path / "x",
        *SMALL,
        "--loss",
        "titles",
        "--verbalizer",
        "mean",
    )


def test_a_loss_that_explodes_stops_the_run(toy, decoder, script, on_cpu, tmp_path):
    says = refused(
        script,
        "--dataset",
        toy.folder,
        "--soft-prompt",
        "none",
        "--llm",
        decoder,
        "--out",
        tmp_path / "x",
        *SMALL,
        "--loss",
        "candidates",
        "--verbalizer",
        "mean",
        "--lr",
        0.1,
        "--weight-decay",
        1e20,
    )
    assert (
        "lower --lr" in says
        and not (tmp_path / "x" / "config.json").exists()
        and not (tmp_path / "x" / "adapter").exists()
    )


def test_nothing_of_an_earlier_run_passes_for_the_new_one_s(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    folder = shutil.copytree(chain.delrec, tmp_path / "delrec")
    # the evaluation of the earlier run
    np.save(folder / "scores_test_15.npy", np.ones((len(toy.test), 15), np.float32))
    np.save(folder / "ranks_test_15.npy", np.ones(len(toy.test), np.float32))
    _, tune = stages(toy, backbone, decoder, chain.prompt, folder)
    tune[tune.index("--soft-prompt") + 1] = "none"
    script(finetune.main, *tune, "--backbone", backbone, "--overwrite")
    assert not {"scores_test_15.npy", "ranks_test_15.npy", "soft_prompt.safetensors"} & {
        p.name for p in folder.iterdir()
    }
    assert (folder / "adapter").is_dir() and (folder / "scores_val_15.npy").exists()
