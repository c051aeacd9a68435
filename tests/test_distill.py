"""distill.py end to end on tiny LMs: what it writes, that only P moves, and that P learns what the
backbone does and nothing else can.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_lms import KINDS

import common
import distill
from delrec import runtime
from delrec.data.prepared import users
from delrec.lm import model, prompt_training
from delrec.lm.ranker import make_ranker
from delrec.lm.text import random_soft_prompt
from delrec.runtime import load_run

SMALL = [
    "--no-show",
    "--history",
    5,
    "--max-title",
    32,
    "--max-tokens",
    1024,
    "--a",
    3,
    "--h",
    3,
    "--candidates",
    10,
    "--batch",
    8,
    "--micro",
    8,
    "--weight-decay",
    1e-5,
    "--warmup",
    0.1,
    "--seed",
    0,
    "--balance",
    "gradnorm",
]


NONE = 1e-20  # a learning rate that moves no fp32 number


def prompt_of(folder):
    return load_file(folder / "soft_prompt.safetensors")["prompt_embeddings"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the two tasks


@pytest.fixture(scope="module")
def ranker(load, toy):
    m = load("decoder")
    settings = {
        "verbalizer": "mean",
        "show": False,
        "history": 8,
        "max_title": 32,
        "max_tokens": 1024,
        "backbone": "SASRec",
        "order": "shuffled",
        "backbone_run": "",
    }
    return make_ranker(m, toy, settings, random_soft_prompt(m, 4, 0))


def test_samples_are_the_same_whoever_makes_them(ranker, toy, backbone):
    which, ranked = toy.train[5:25], np.load(backbone / "topk_train.npy")[5:25, :6]
    ta, rps = distill.tasks_of(ranker, which, ranked, 4, 9, 0)
    lengths = np.minimum(which - toy.ptr[users(toy, which)], 8)
    assert len(rps) == 20 and len(ta) == (lengths >= 6).sum() < 20
    again_ta, again_rps = distill.tasks_of(ranker, which, ranked, 4, 9, 0)
    for a, b in zip(ta + rps, again_ta + again_rps):
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) and a[2] == b[2]
    # no matter with whom
    alone = distill.tasks_of(ranker, which[7:8], ranked[7:8], 4, 9, 0)[1][0]
    assert np.array_equal(alone[1], rps[7][1])
    other = distill.tasks_of(ranker, which, ranked, 4, 9, 1)[1]
    assert any(not np.array_equal(a[1], b[1]) for a, b in zip(rps, other))


def test_the_answers_are_the_backbone_s_first_choice_and_the_item_before_the_last(
    ranker, toy, backbone
):
    which, ranked = toy.train[:60], np.load(backbone / "topk_train.npy")[:60, :6]
    ta, rps = distill.tasks_of(ranker, which, ranked, 4, 9, 0)
    for (_, cand, label), top in zip(rps, ranked):
        assert (
            cand[label] == top[0]
            and len(set(cand)) == 9
            and set(cand) & set(top) == {top[0]}
            and min(cand) >= 1
            and max(cand) <= toy.n_items
        )
    windows = [toy.items[max(s - 8, toy.ptr[u]) : s] for s, u in zip(which, users(toy, which))]
    for (_, cand, label), window in zip(ta, [w for w in windows if len(w) >= 6]):
        assert cand[label] == window[-2] and len(set(cand)) == 9 and (cand == window[-2]).sum() == 1
    assert len({label for *_, label in rps}) > 5  # the answer stands anywhere
    # the truth has no special place: it is an option as often as any item that is neither told nor
    # asked
    truth = np.mean(
        [
            toy.items[s] in cand
            for s, (_, cand, _), top in zip(which, rps, ranked)
            if toy.items[s] not in top
        ]
    )
    assert truth < 0.4  # by chance 8 of 54


def test_weights_of_the_two_losses():
    # norms 5 and 20: 5^-1/2 : 20^-1/2 = 2 : 1
    g_TA, g_RPS = torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([[0.0, 12], [16, 0]])
    zero = torch.zeros(2, requires_grad=True)
    assert distill.weights("gradnorm", g_TA, g_RPS, zero).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert distill.weights("gradnorm", g_TA, g_TA, zero).tolist() == pytest.approx([0.5, 0.5])
    assert distill.weights("fixed", g_TA, g_RPS, zero).tolist() == [0.5, 0.5]
    s = torch.tensor([np.log(2.0), np.log(0.5)], dtype=torch.float32, requires_grad=True)
    assert distill.weights("uncertainty", g_TA, g_RPS, s).tolist() == pytest.approx([0.5, 2])
    assert not distill.weights("uncertainty", g_TA, g_RPS, s).requires_grad
    # a batch without a TA sample leaves RPS its say
    assert distill.weights("gradnorm", torch.zeros(2, 2), g_RPS, zero).tolist() == [0, 1]
    assert distill.weights("gradnorm", torch.zeros(2, 2), torch.zeros(2, 2), zero).tolist() == [
        0,
        0,
    ]


# ---------------------------------------------------------------- end to end


def test_what_a_run_leaves_behind(chain, toy, decoder):
    files = {p.name for p in chain.prompt.iterdir()}
    assert {"config.json", "log.jsonl", "metrics.json", "soft_prompt.safetensors"} <= files
    result = json.loads((chain.prompt / "metrics.json").read_text())
    assert (
        set(result["before"]) == set(result["after"]) == {"ta", "rps", "ta_loss", "rps_loss"}
        and result["chance"] == 1 / 8
    )
    assert (
        all(np.isfinite(v) for when in ("before", "after") for v in result[when].values())
        and result["n_rps"] == 20
    )
    P = prompt_of(chain.prompt)
    assert P.shape == (6, 32) and P.dtype == torch.float32 and torch.isfinite(P).all()
    log = log_of(chain.prompt)
    assert [line["step"] for line in log] == list(range(1, 7)) and sum(
        "val_rps_loss" in line for line in log
    ) == 2
    # warm-up, then decay
    assert max(line["lr"] for line in log) <= 0.05 and log[-1]["lr"] < log[1]["lr"]
    assert all(0 < line["lam_ta"] < 1 for line in log) and len({line["lam_ta"] for line in log}) > 3
    run = load_run(chain.prompt, toy, ["distill"])
    assert (run.llm, run.k, run.backbone, run.settings["history"]) == (decoder, 6, "SASRec", 6)
    last = chain.distilled.json
    assert (
        last["stage"] == "distill"
        and last["rps_after"] == round(result["after"]["rps"], 4)
        and last["chance"] == 0.125
    )
    assert "prompts/s" in chain.distilled.output


def test_the_best_step_is_the_one_with_the_lowest_validation_loss(chain):
    log = [line for line in log_of(chain.prompt) if "val_rps_loss" in line]
    result = json.loads((chain.prompt / "metrics.json").read_text())
    best = min(log, key=lambda line: line["val_ta_loss"] + line["val_rps_loss"])
    assert (
        result["best_step"] == best["step"] and result["after"]["rps_loss"] == best["val_rps_loss"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_soft_prompt_moves(
    request, kind, toy, backbone, script, on_cpu, tmp_path, monkeypatch
):
    opened = []
    load_lm = model.load_lm
    monkeypatch.setattr(
        prompt_training,
        "load_lm",
        lambda *args, **more: opened.append(load_lm(*args, **more)) or opened[-1],
    )
    llm = request.getfixturevalue(kind)
    script(
        distill.main,
        "--dataset",
        toy.folder,
        "--backbone",
        backbone,
        "--out",
        tmp_path / "prompt",
        "--llm",
        llm,
        "--k",
        4,
        *SMALL,
        "--verbalizer",
        "mean",
        "--tasks",
        "both",
        "--samples",
        24,
        "--lr",
        0.05,
        "--val-samples",
        20,
        "--evals",
        1,
    )
    stored, fresh = (
        load_file(f"{llm}/model.safetensors"),
        load_lm(llm, torch.device("cpu"), torch.float32),
    )
    for (name, p), (_, want) in zip(
        opened[0].model.named_parameters(), fresh.model.named_parameters()
    ):
        assert torch.equal(p, want) and not p.requires_grad and p.grad is None, name
    assert all(
        torch.equal(stored[n], p) for n, p in opened[0].model.named_parameters() if n in stored
    )
    start = random_soft_prompt(fresh, 4, 0)
    moved = (prompt_of(tmp_path / "prompt") - start).abs()
    assert (moved > 0).float().mean() > 0.9  # every vector of P has a gradient


def teach(folder, data, make_backbone, first):
    """A backbone whose first choice is always first[i] for sample i; what follows is arbitrary."""

    def score(samples):
        s = np.random.default_rng(0).random((len(samples), data.n_items + 1))
        s[np.arange(len(samples)), first(len(samples))] = 10
        return s

    return make_backbone(folder, data, score)


@pytest.fixture(scope="module")
def learn(toy, decoder, make_backbone, script, fp32, tmp_path_factory):
    """learn(first, lr) -> metrics.json, the first and the last P: distil a backbone that always
    chooses first(n), with P of 16 vectors.
    """

    def run(first, lr):
        folder = tmp_path_factory.mktemp("learn")
        teacher = teach(folder / "teacher", toy, make_backbone, first)
        with fp32():
            script(
                distill.main,
                "--dataset",
                toy.folder,
                "--backbone",
                teacher,
                "--out",
                folder / "prompt",
                "--llm",
                decoder,
                "--k",
                16,
                *SMALL,
                "--verbalizer",
                "mean",
                "--tasks",
                "rps",
                "--samples",
                560 if lr > NONE else 40,
                "--lr",
                lr,
                "--val-samples",
                80,
                "--evals",
                3,
            )
        return json.loads((folder / "prompt" / "metrics.json").read_text()), prompt_of(
            folder / "prompt"
        )

    return run


def velvet(toy):
    return [i for i in range(1, toy.n_items + 1) if "Velvet" in toy.titles[i]][:3]


def test_the_soft_prompt_learns_what_only_the_backbone_knows(learn, toy):
    # it always chooses one of three titles of a word; nothing in the prompt says so, the LM is
    # frozen: only P can carry it
    kind = velvet(toy)
    result, _ = learn(lambda n: np.random.default_rng(1).choice(kind, n), 0.1)
    # chance .1, and the other two are often among the options
    assert result["before"]["rps"] < 0.2 and result["after"]["rps"] > 0.45
    assert result["after"]["rps_loss"] < result["before"]["rps_loss"] - 1
    # it was not asked to learn the other task
    assert abs(result["after"]["ta"] - result["before"]["ta"]) < 0.15


def test_without_learning_rate_or_without_a_pattern_nothing_is_learnt(learn, toy, load):
    kind = velvet(toy)
    result, P = learn(lambda n: np.random.default_rng(1).choice(kind, n), NONE)
    assert result["after"] == result["before"] and torch.equal(
        P, random_soft_prompt(load("decoder"), 16, 0)
    )
    result, _ = learn(lambda n: np.random.default_rng(1).integers(1, toy.n_items + 1, n), 0.1)
    assert result["after"]["rps"] < 0.25


def test_every_sample_is_taught_its_own_list(
    toy, backbone, decoder, script, on_cpu, tmp_path, monkeypatch
):
    tasks_of, lists, seen = (
        distill.tasks_of,
        {s: np.load(backbone / f"topk_{s}.npy") for s in ("train", "val")},
        [],
    )

    def checked(r, samples, ranked, *args):
        split = "train" if samples[0] in toy.train else "val"
        assert np.array_equal(
            ranked, lists[split][np.searchsorted(getattr(toy, split), samples), :3]
        )
        seen.append((split, len(samples)))
        return tasks_of(r, samples, ranked, *args)

    monkeypatch.setattr(distill, "tasks_of", checked)
    monkeypatch.setattr(prompt_training, "tasks_of", checked)
    script(
        distill.main,
        "--dataset",
        toy.folder,
        "--backbone",
        backbone,
        "--out",
        tmp_path / "p",
        "--llm",
        decoder,
        "--k",
        2,
        *SMALL,
        "--verbalizer",
        "mean",
        "--tasks",
        "both",
        "--samples",
        16,
        "--lr",
        0.01,
        "--val-samples",
        12,
        "--evals",
        1,
    )
    assert seen == [("val", 12), ("train", 8), ("train", 8)]


def test_the_same_seed_gives_the_same_prompt(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    from chain import stages

    args, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    script(distill.main, *args)
    assert torch.equal(prompt_of(tmp_path / "prompt"), prompt_of(chain.prompt))
    assert (tmp_path / "prompt" / "metrics.json").read_bytes() == (
        chain.prompt / "metrics.json"
    ).read_bytes()
    script(distill.main, *args, "--seed", 1, "--overwrite")
    assert not torch.equal(prompt_of(tmp_path / "prompt"), prompt_of(chain.prompt))


def test_micro_batches_do_not_change_the_gradient(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    from chain import stages

    args, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    args[args.index("--micro") + 1] = 3
    script(distill.main, *args)
    torch.testing.assert_close(
        prompt_of(tmp_path / "prompt"), prompt_of(chain.prompt), rtol=0, atol=1e-4
    )
    assert [line["loss_rps"] for line in log_of(tmp_path / "prompt")] == pytest.approx(
        [line["loss_rps"] for line in log_of(chain.prompt)], rel=1e-4
    )


def test_memory_options_do_not_change_the_prompt(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path
):
    from chain import stages

    args, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    args[args.index("--micro") + 1] = "auto"
    out = script(distill.main, *args, "--gradient-checkpointing").output
    torch.testing.assert_close(
        prompt_of(tmp_path / "prompt"), prompt_of(chain.prompt), rtol=0, atol=1e-4
    )
    assert (
        "--micro auto: a prompt takes" in out
        and "minutes to go" in out
        and load_run(tmp_path / "prompt").micro >= 1
    )
    args[args.index("--micro") + 1] = "many"
    assert "many" in script(distill.main, *args, code=2).error


def test_two_processes_give_the_prompt_and_the_metrics_of_one(chain, twins):
    torch.testing.assert_close(
        prompt_of(twins.prompt), prompt_of(chain.prompt), rtol=1e-5, atol=1e-5
    )
    one, two = (json.loads((c.prompt / "metrics.json").read_text()) for c in (chain, twins))
    assert two.pop("best_step") == one.pop("best_step")
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-5)
    for a, b in zip(log_of(chain.prompt), log_of(twins.prompt)):
        assert [b["loss_ta"], b["loss_rps"], b["lam_ta"]] == pytest.approx(
            [a["loss_ta"], a["loss_rps"], a["lam_ta"]], rel=1e-4
        )
    assert load_run(twins.prompt).world == 2 and twins.printed.count("distill: ") == 1


def test_two_agents_give_the_prompt_of_one_process(chain, toy, backbone, decoder, tmp_path):
    # what two machines run, on one over loopback
    from chain import stages
    from scripts import ROOT, TWO

    args, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    wrapper = tmp_path / "run.py"
    wrapper.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        + TWO.format(before="", jobs=json.dumps([("distill", [str(a) for a in args], True)]))
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    agents = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc_per_node=1",
                "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{port}",
                "--rdzv-id=two",
                str(wrapper),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=400)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    torch.testing.assert_close(
        prompt_of(tmp_path / "prompt"), prompt_of(chain.prompt), rtol=1e-5, atol=1e-5
    )
    assert load_run(tmp_path / "prompt").world == 2


@pytest.mark.parametrize(
    "extra",
    [
        ["--balance", "uncertainty"],
        ["--balance", "fixed", "--tasks", "ta"],
        ["--verbalizer", "letter"],
        ["--verbalizer", "first", "--show"],
        ["--verbalizer", "likelihood", "--show", "--val-samples", 0],
    ],
)
def test_every_choice_runs(extra, toy, backbone, decoder, script, tmp_path):
    # in the LM's usual dtype on this machine
    result = script(
        distill.main,
        "--dataset",
        toy.folder,
        "--backbone",
        backbone,
        "--out",
        tmp_path / "prompt",
        "--llm",
        decoder,
        "--k",
        3,
        "--verbalizer",
        "mean",
        "--tasks",
        "both",
        *SMALL,
        "--samples",
        16,
        "--lr",
        0.01,
        "--val-samples",
        12,
        "--evals",
        1,
        *extra,
    )
    log = log_of(tmp_path / "prompt")
    assert np.isfinite(result.json["rps_after"]) and all(
        np.isfinite([line["loss_ta"], line["loss_rps"]]).all() for line in log
    )


def test_paper_sets_the_paper_s_choices_unless_typed(
    toy, backbone, decoder, script, on_cpu, tmp_path
):
    args = [
        "--dataset",
        toy.folder,
        "--backbone",
        backbone,
        "--llm",
        decoder,
        "--k",
        3,
        "--a",
        3,
        "--h",
        3,
        "--candidates",
        8,
        "--samples",
        8,
        "--batch",
        8,
        "--val-samples",
        8,
        "--evals",
        1,
        "--paper",
    ]
    script(distill.main, *args, "--out", tmp_path / "a")
    run = load_run(tmp_path / "a")
    assert {k: getattr(run, k) for k in distill.PAPER} == distill.PAPER
    assert (
        run.settings["verbalizer"] == distill.PAPER["verbalizer"] == "mean"
        and run.settings["show"] is True
    )
    script(
        distill.main,
        *args,
        "--out",
        tmp_path / "b",
        "--verbalizer",
        "first",
        "--lr",
        0.5,
        "--no-show",
    )
    run = load_run(tmp_path / "b")
    assert (run.verbalizer, run.lr, run.show, run.history, run.balance) == (
        "first",
        0.5,
        False,
        10,
        "gradnorm",
    )


# ------------------------------------------ refusals: one sentence, before the LM is asked anything


def refused(script, *args):
    return script(distill.main, *args, code=1).error


def test_a_missing_backbone_says_how_to_train_it(toy, script, tmp_path, monkeypatch):
    says = refused(script, "--dataset", toy.folder, "--backbone", tmp_path / "nothing")
    assert (
        f"no backbone in {tmp_path / 'nothing'}" in says
        and f"python train_backbone.py --dataset {toy.folder}" in says
    )
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    assert f"no backbone in {tmp_path / 'runs' / 'toy' / 'sasrec'}" in refused(
        script, "--dataset", toy.folder
    )


def test_a_backbone_of_other_data_is_refused(toy, backbone, script, tmp_path):
    other = shutil.copytree(backbone, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"data_hash": "0123456789abcdef"}
    (other / "config.json").write_text(json.dumps(config))
    assert "was trained on another preparation" in refused(
        script, "--dataset", toy.folder, "--backbone", other
    )


def test_lists_that_are_too_short_are_refused(toy, backbone, script):
    says = refused(script, "--dataset", toy.folder, "--backbone", backbone, "--h", 13)
    assert "lists 12 items per sample, --h is 13" in says and "--top-h 13" in says


@pytest.mark.parametrize(
    "args, says",
    [
        (["--a", 9, "--history", 10], "--a 9 must be at least 3 and at most --history 10 minus 2"),
        (["--a", 2], "--a 2 must be at least 3"),
        (["--input", "ids", "--verbalizer", "mean"], "--verbalizer is about titles"),
        (["--input", "ids", "--paper"], "--paper is about titles"),
        (["--candidates", 55, "--h", 10], "need 65 items, the catalogue has 60"),
        (["--dataset", "nowhere"], "no prepared data set in"),
    ],
)
def test_relations_that_cannot_hold_are_refused(args, says, toy, backbone, script):
    assert says in refused(script, "--dataset", toy.folder, "--backbone", backbone, *args)


def test_histories_too_short_for_temporal_analysis_are_a_sentence(
    toy, backbone, decoder, script, on_cpu, tmp_path, monkeypatch
):
    few = toy.val - toy.ptr[users(toy, toy.val)] < 8
    short = SimpleNamespace(**vars(toy) | {"val": toy.val[few]})
    assert len(short.val)
    lists = shutil.copytree(backbone, tmp_path / "lists")
    np.save(lists / "topk_val.npy", np.load(backbone / "topk_val.npy")[few])
    monkeypatch.setattr(common, "load_data", lambda name: short)
    says = refused(
        script,
        "--dataset",
        toy.folder,
        "--backbone",
        lists,
        "--llm",
        decoder,
        "--out",
        tmp_path / "p",
        "--a",
        8,
        "--k",
        2,
        "--h",
        5,
    )
    assert (
        "no validation history has the 10 items Temporal Analysis needs" in says
        and "--tasks rps" in says
        and not (tmp_path / "p").exists()
    )
    script(
        distill.main,
        "--dataset",
        toy.folder,
        "--backbone",
        lists,
        "--llm",
        decoder,
        "--out",
        tmp_path / "p",
        "--a",
        8,
        "--k",
        2,
        "--h",
        5,
        "--tasks",
        "rps",
        "--verbalizer",
        "mean",
        "--samples",
        16,
        "--evals",
        1,
    )  # without that task they are enough
    result = json.loads((tmp_path / "p" / "metrics.json").read_text())
    assert set(result["after"]) == {"rps", "rps_loss"} and result["n_ta"] == 0


def test_a_loss_that_explodes_stops_the_run(toy, backbone, decoder, script, on_cpu, tmp_path):
    says = refused(
        script,
        "--dataset",
        toy.folder,
        "--backbone",
        backbone,
        "--llm",
        decoder,
        "--out",
        tmp_path / "p",
        "--k",
        3,
        "--verbalizer",
        "mean",
        *SMALL,
        "--samples",
        64,
        "--lr",
        0.1,
        "--weight-decay",
        1e20,
        "--val-samples",
        8,
        "--evals",
        1,
    )
    assert "lower --lr" in says and not (tmp_path / "p" / "config.json").exists()
