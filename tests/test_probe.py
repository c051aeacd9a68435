"""probe.py: what a soft prompt learnt."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import stages
from tiny_lms import KINDS

import evaluate
from delrec.data.prepared import candidates, subset
from delrec.evaluation import probe
from delrec.lm.model import load_lm
from delrec.lm.ranker import make_ranker, open_run, score_samples
from delrec.lm.soft_prompt import save_soft_prompt
from delrec.lm.text import random_soft_prompt
from delrec.runtime import load_run


def test_kendall_worked_by_hand():
    a = np.array([[1.0, 2, 3, 4]])
    assert probe.kendall(a, a * 7)[0] == 1 and probe.kendall(a, -a)[0] == -1
    # one of six pairs turned
    assert probe.kendall(a, np.array([[1.0, 2, 4, 3]]))[0] == pytest.approx(4 / 6)
    assert probe.kendall(a, np.array([[1.0, 1, 2, 3]]))[0] == pytest.approx(5 / np.sqrt(6 * 5))
    assert probe.kendall(a, np.zeros((1, 4)))[0] == 0


def test_agreement_counts_tied_first_places_by_their_share():
    a, b = (
        np.array([[3.0, 1, 2], [3, 1, 2], [1, 1, 0], [1, 1, 0]]),
        np.array([[9.0, 0, 0], [0, 9, 0], [5, 0, 0], [7, 7, 0]]),
    )
    assert probe.agreement(a, b).tolist() == [1, 0, 0.5, 1]
    assert probe.agreement(b, a).tolist() == [1, 0, 0.5, 1]


def test_a_token_s_own_vector_is_nearest_to_it(load):
    m = load("decoder")
    rows = m.model.get_input_embeddings().weight[[17, 300]].detach().float()
    near = probe.nearest_tokens(m, rows * 3, 2)
    assert [n[0] for n in near] == [(m.tok.decode([t]), 1.0) for t in (17, 300)] and near[0][1][
        1
    ] < 1
    g = probe.geometry(torch.tensor([[2.0, 0], [0, 4], [2, 0]]))
    assert (
        g["norm"] == pytest.approx(8 / 3)
        and g["cosine"] == pytest.approx(1 / 3)
        and g["cosine_max"] == pytest.approx(1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_lm_that_cannot_tell_tokens_apart_attends_to_all_alike(request, kind, toy, alone):
    m = load_lm(request.getfixturevalue(kind), torch.device("cpu"), torch.float32)
    with torch.no_grad():
        # queries of zero: every token gets the same weight
        for name, p in m.model.named_parameters():
            if name.split(".")[-2] in ("q_proj", "q", "query", "relative_attention_bias"):
                p.zero_()
    r = make_ranker(
        m,
        toy,
        {
            "verbalizer": "mean",
            "show": True,
            "history": 5,
            "max_title": 32,
            "max_tokens": 1000,
            "backbone": "SASRec",
            "order": "shuffled",
            "backbone_run": "",
        },
        random_soft_prompt(m, 6, 0),
    )
    samples, cand = np.asarray(toy.test)[:5], candidates(toy, "test", 15)[:5]
    before = score_samples(r, "test", np.arange(5), 15, alone)
    seen = probe.attention_shares(r, samples, cand, alone)
    assert sum(a for a, _ in seen.values()) == pytest.approx(1) and sum(
        t for _, t in seen.values()
    ) == pytest.approx(1)
    for part, (a, t) in seen.items():
        assert a == pytest.approx(t, abs=1e-5), part
    assert seen["the rest"][1] > 0.3 and seen["history"][1] > 0.05 and seen["soft prompt"][1] > 0.01
    # the LM attends as it did
    np.testing.assert_allclose(score_samples(r, "test", np.arange(5), 15, alone), before, atol=1e-5)


def test_the_probe_of_a_distilled_prompt(chain, toy, script, on_cpu, tmp_path):
    result = script(
        evaluate.main, "--ckpt", chain.prompt, "--probe", "--val-samples", 30, "--out", tmp_path
    )
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (
        found["k"] == 6
        and found["n"] == 30
        and len(found["nearest"]) == 6
        and found["moved"] > 0
        and (tmp_path / "probe.png").exists()
    )
    run = load_run(chain.prompt, toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    val = subset(len(toy.val), 30, 0)
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)
    backbone = np.load(Path(run.backbone_run) / "scores_val_15.npy")[val]
    tau = probe.kendall(score_samples(r, "val", val, 15, alone), backbone).mean()
    assert found["towards_the_backbone"]["trained"]["kendall"] == pytest.approx(tau, abs=1e-6)
    assert (
        found["towards_the_backbone"]["none"]["kendall"]
        != found["towards_the_backbone"]["untrained"]["kendall"]
    )
    assert "trained - untrained: tau" in result.output


def test_an_untrained_prompt_is_found_to_move_nothing(chain, toy, script, on_cpu, tmp_path):
    copy = shutil.copytree(chain.prompt, tmp_path / "same")
    run = load_run(copy)
    m = load_lm(run.llm, torch.device("cpu"), torch.float32)
    save_soft_prompt(copy, random_soft_prompt(m, run.k, run.seed))
    script(evaluate.main, "--ckpt", copy, "--probe", "--val-samples", 20)
    found = json.loads((copy / "probe.json").read_text())
    assert found["moved"] == 0 and found["tests"]["untrained"] == {
        "kendall": 0,
        "p_kendall": 1,
        "same_first": 0,
        "p_same_first": 1,
    }


def test_a_prompt_learnt_from_the_backbone_moves_the_lm_towards_it(
    toy, make_backbone, decoder, script, on_cpu, tmp_path
):
    # the backbone likes titles of one word; nothing but the soft prompt can tell the frozen LM
    import distill

    likes = np.array(["Velvet" in t for t in toy.titles]) * 10 + np.random.default_rng(0).random(61)
    backbone = make_backbone(
        tmp_path / "velvet", toy, lambda samples: np.broadcast_to(likes, (len(samples), 61))
    )
    args, _ = stages(toy, backbone, decoder, tmp_path / "prompt", "")
    script(
        distill.main,
        *args,
        "--tasks",
        "rps",
        "--samples",
        560,
        "--k",
        16,
        "--verbalizer",
        "mean",
        "--lr",
        0.1,
    )
    script(evaluate.main, "--ckpt", tmp_path / "prompt", "--probe", "--val-samples", 80)
    found = json.loads((tmp_path / "prompt" / "probe.json").read_text())
    near = {
        name: (m["kendall"], m["same_first"]) for name, m in found["towards_the_backbone"].items()
    }
    for other in ("untrained", "none"):
        assert (
            near["trained"][0] > near[other][0] + 0.08 and near["trained"][1] > near[other][1] + 0.1
        ), near
    assert found["tests"]["untrained"]["p_kendall"] < 0.01


def test_what_has_no_soft_prompt_is_refused(
    chain, sasrec, toy, decoder, backbone, script, on_cpu, tmp_path
):
    assert (
        "is a backbone, --probe is about an LM"
        in script(evaluate.main, "--ckpt", sasrec, "--probe", code=1).error
    )
    copy = shutil.copytree(chain.delrec, tmp_path / "none")
    (copy / "config.json").write_text(
        json.dumps(json.loads((copy / "config.json").read_text()) | {"soft_prompt": "none"})
    )
    assert "has no soft prompt" in script(evaluate.main, "--ckpt", copy, "--probe", code=1).error
