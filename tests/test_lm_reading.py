"""Neither a kept prefix, nor packing, nor sharing changes a score or a gradient."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from lm_cases import ALL, naive, rank_with, vectors, windows

from delrec.lm import passes, verbalizers
from delrec.lm.model import load_lm
from delrec.lm.ranker import score_tails
from delrec.lm.reading import read_prefix

pytest_plugins = ["lm_fixtures"]


@pytest.mark.parametrize(
    "verbalizer, show, at",
    [
        ("mean", True, False),
        ("letter", True, False),
        ("likelihood", False, False),
        ("likelihood", False, True),
    ],
)
def test_neither_the_kept_prefix_nor_packing_changes_a_score_or_a_gradient(
    decoder, toy, verbalizer, show, at
):
    from peft import LoraConfig, get_peft_model

    r = rank_with(
        lambda _: load_lm(decoder, torch.device("cpu"), torch.float64),
        "decoder",
        toy,
        k=4,
        show=show,
        verbalizer=verbalizer,
    )
    assert r.lm.packs  # what a CPU does; a GPU pads
    adapter = get_peft_model(
        r.lm.model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    )
    params = [p for p in adapter.parameters() if p.requires_grad]
    old, cand = windows(toy, 4)
    pairs = [r.prompts.history(h, c) for h, c in zip(old, cand)]
    results = []
    for cache, path in itertools.product((True, False), ("packed", "padded", "rows")):
        P = r.P.clone().requires_grad_()
        lm = replace(r.lm, paths=[path])
        start = read_prefix(lm, r.prompts.prefix, P, cache)
        assert (start.kv is not None) == (cache and path != "rows")
        asked = (lm, start, [t for t, _ in pairs], cand, r.titles, verbalizer)
        if at:
            score, past = verbalizers.score_and_past(*asked, [a for _, a in pairs])
        else:
            score, past = verbalizers.score(*asked), torch.zeros(1)
        (score.log_softmax(1)[:, 2].sum() + past.sum()).backward()
        results.append([score.detach(), past.detach(), P.grad] + [p.grad.clone() for p in params])
        for p in params:
            p.grad = None
    assert results[0][2].abs().max() > 1e-4 and all(g.abs().max() > 0 for g in results[0][3:])
    for n, other in enumerate(results[1:], 1):
        # one row a title adds up in another order
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4 if n % 3 == 2 else 1e-5, atol=1e-5)


def test_candidates_share_their_prompt_s_encoder_states(load, toy):
    r = rank_with(load, "encoder_decoder", toy, k=3, verbalizer="likelihood")
    old, cand = windows(toy, 3)
    tails, scores, sizes = [r.prompts.history(h)[0] for h in old], [], []
    assert r.lm.attends
    from delrec.lm.bench.memory import saved_tensors

    for attends in (True, False):
        lm = replace(r.lm, attends=attends)
        P = r.P.clone().requires_grad_()

        def run(lm=lm, P=P):
            start = read_prefix(lm, r.prompts.prefix, P)
            return verbalizers.score(lm, start, tails, cand, r.titles, "likelihood")

        sizes.append(sum(size for _, size in saved_tensors(run, r.lm.model).values()))
        scores.append(run())
        scores[-1].log_softmax(1)[:, 0].sum().backward()
        scores.append(P.grad)
    torch.testing.assert_close(scores[0], scores[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[1], scores[3], rtol=1e-4, atol=1e-6)
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("block", [1, 3, 7])
def test_the_blocks_of_packed_rows_change_nothing(load, toy, block, monkeypatch):
    r = rank_with(load, "decoder", toy, k=4, verbalizer="likelihood")
    old, cand = windows(toy, 4)
    start, tails = read_prefix(r.lm, r.prompts.prefix, r.P), [r.prompts.history(h)[0] for h in old]
    want = verbalizers.score(r.lm, start, tails, cand, r.titles, "likelihood")
    monkeypatch.setattr(passes, "BLOCK", block)
    torch.testing.assert_close(
        verbalizers.score(r.lm, start, tails, cand, r.titles, "likelihood"),
        want,
        rtol=1e-5,
        atol=1e-5,
    )


@ALL
@pytest.mark.parametrize("verbalizer", ["mean", "likelihood"])
def test_the_gradient_of_the_soft_prompt_equals_the_full_prompt_s(
    load, plain, kind, toy, verbalizer
):
    r = rank_with(load, kind, toy, k=4, verbalizer=verbalizer)
    old, cand = windows(toy, 3)
    cand, label = cand[:, :4], torch.tensor([0, 2, 1])[: len(old)]
    tails = [r.prompts.history(h)[0] for h in old]
    grads = []
    for way in ("batch", "naive"):
        P = r.P.clone().requires_grad_()
        score = (
            verbalizers.score(
                r.lm, read_prefix(r.lm, r.prompts.prefix, P), tails, cand, r.titles, verbalizer
            )
            if way == "batch"
            else torch.stack([naive(plain(kind), r, t, c, P) for t, c in zip(tails, cand)])
        )
        torch.nn.functional.cross_entropy(score, label).backward()
        grads.append(P.grad)
    assert (grads[1].norm(dim=1) > 1e-4).all()  # every vector of P matters
    torch.testing.assert_close(
        grads[0], grads[1], rtol=1e-4, atol=1e-5 * grads[1].abs().max().item()
    )


@pytest.mark.parametrize("verbalizer", ["mean", "likelihood"])
def test_log_probabilities_of_history_titles_equal_the_full_prompt_s(
    load, plain, toy, verbalizer, alone
):
    r = rank_with(load, "decoder", toy, k=3, verbalizer=verbalizer)
    old, cand = windows(toy, 4)
    pairs = [r.prompts.history(h) for h in old]
    with torch.no_grad():
        scores, past = verbalizers.score_and_past(
            r.lm,
            read_prefix(r.lm, r.prompts.prefix, r.P),
            [t for t, _ in pairs],
            cand,
            r.titles,
            verbalizer,
            [at for _, at in pairs],
        )
        want = []
        for tail, at in pairs:
            tokens = np.concatenate([r.prompts.prefix, tail[:-1]])
            logp = (
                plain("decoder")(inputs_embeds=vectors(plain("decoder"), tokens, r.P))
                .logits[0][:, torch.as_tensor(r.titles.vocab)]
                .log_softmax(1)
            )
            want += [
                logp[len(r.prompts.prefix) + a - 1, r.titles.vocab.tolist().index(tail[a])].item()
                for a in at
            ]
    np.testing.assert_allclose(past.numpy(), want, rtol=1e-5, atol=1e-5 * max(map(abs, want)))
    np.testing.assert_allclose(
        scores.numpy(), score_tails(r, [t for t, _ in pairs], cand, alone), rtol=1e-5, atol=1e-4
    )
