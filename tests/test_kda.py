"""kda.py: KDA_LRD-style, a history read through each candidate, relations that titles tell."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import COMMON, STAGE_1
from cycle import N_ITEMS
from safetensors.torch import load_file
from stopped_runs import same, stop_and_resume

import distill
import evaluate
import train_backbone
from delrec.backbone import kda, models, results
from delrec.backbone.ranking import HistoryScorer
from delrec.evaluation.rows import note_of
from delrec.runtime import load_run
from delrec.serving.commands import command_of
from delrec.serving.shared import stop_unless_shaped

SMALL = "--model kda --text tfidf --epochs 2 --patience 9 --width 16 --batch 64 --history 8"


def shape(E, latent=8, latent_weight=10.0):
    """What a model is built by."""
    more = dict(latent=latent, latent_weight=latent_weight)
    return SimpleNamespace(history=6, width=E, dropout=0, **more)


def small(n_items=30, E=8):
    """An untrained model whose relations differ, with titles of 5 numbers."""
    torch.manual_seed(0)
    model = models.build("kda", n_items, shape(E))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
        model.item.weight[0] = 0
        model.take_text(torch.randn(n_items + 1, 5))
        for p in model.latent.parameters():
            p.normal_(std=0.5)
    return model.eval()


# ---------------------------------------------------------------- its equations


def test_a_score_is_its_equations():
    model, history = small(), [4, 9, 2]
    e, r = model.item.weight, model.relation
    found = models.score(model, [history, [0, 0, 7]])
    for i in (3, 9, 30):
        m_R = []
        for r_E in r:
            a_L = torch.stack([e[j] @ (r_E * e[i]) for j in history]).softmax(0)
            m_R.append(sum(a * e[j] for a, j in zip(a_L, history)))
        m_RE = torch.stack(m_R)
        q, k, v = model.qkv(m_RE).chunk(3, -1)
        z_RE = (q @ k.T / 8**0.5).softmax(-1) @ v
        out_RE = model.norm(m_RE + model.outer(model.inner(z_RE).relu()))
        torch.testing.assert_close(found[0, i], out_RE.mean(0) @ e[i] + model.bias[i])


def test_items_in_passes_score_as_all_at_once(monkeypatch):
    model, seq = (
        small(),
        torch.randint(0, 31, (70, 6), generator=torch.manual_seed(1)).sort().values,
    )
    want = models.score(model, seq)
    assert torch.isfinite(want[:, 1:]).all()
    monkeypatch.setattr(kda, "MOST", 9 * 8 * 5)  # five pairs
    torch.testing.assert_close(models.score(model, seq), want)


def test_the_loss_is_its_equations():
    model, seq_BL = small(), torch.tensor([[0, 4, 9], [5, 6, 7]])
    target_B, other_BL = torch.tensor([3, 8]), torch.tensor([[11, 12, 13], [14, 15, 16]])
    e, r, text = model.item.weight, model.relation, model.latent
    want = 0
    for seq, target, other in zip(seq_BL, target_B, other_BL):
        s_I = models.score(model, seq[None])[0]
        w_n = s_I[other].softmax(0)
        want -= (w_n * (s_I[target] - s_I[other]).sigmoid()).sum().log()
        real = [(int(j), int(n)) for j, n in zip(seq, other) if j]
        g = text.g(text.z_ID)
        pi = [(text.old(g[j]) + text.new(g[target])).softmax(0) for j, _ in real]

        def phi(j, r_E, i=target):
            return (e[j] * r_E) @ e[i] + e[j] @ r_E + e[i] @ r_E

        told = 0
        for at, r_E in enumerate(r[1:], 1):
            apart = [p[at] * (phi(j, r_E) - phi(n, r_E)) for p, (j, n) in zip(pi, real)]
            told -= torch.stack(apart).sigmoid().mean().log() / (len(r) - 1)
        entropy = torch.stack([-(p * p.log()).mean() for p in pi]).mean()
        want += 10 * (told + 0.1 * entropy)
    torch.testing.assert_close(model.loss(seq_BL, target_B, other_BL), want)
    # of two processes
    parts = [model.loss(seq_BL[i::2], target_B[i::2], other_BL[i::2]) for i in (0, 1)]
    torch.testing.assert_close(sum(parts), want)


def test_added_items_are_read_through_too_and_change_nobody_s_score():
    model, olds = small(60), [np.array([3, 9]), np.array([12]), np.arange(20, 60)]
    before = HistoryScorer(model)
    unseen = SimpleNamespace(
        rows=lambda table: table[[5, 7]], doubt=lambda table: np.eye(table.shape[1], dtype="f")
    )
    grown = before.with_items(unseen)  # it has no state, so doubt changes nothing
    want = before(olds)
    assert np.array_equal(grown(olds)[:, :61], want)
    np.testing.assert_allclose(grown(olds)[:, 61:], want[:, [5, 7]], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(grown([np.array([3, 61])]), grown([np.array([3])]))


# ---------------------------------------------------------------- it learns


def test_it_finds_the_planted_rule(train_on_cycle, tmp_path):
    options = "--model kda --text tfidf --width 32 --batch 32 --lr 5e-3 --epochs 5 --history 3"
    got = train_on_cycle(tmp_path / "kda", options).json
    assert got["test_hr@1"] > 0.8, got


def relations_found(permute: bool) -> float:
    """How well the relations of pairs with items that training never saw are told apart: the share
    of them that have the relation of their kind.

    Items 1..40 are of two kinds, which their titles' first number tells. A pair's vectors agree
    in one half of their numbers where the history's item is of kind 0, in the other half where it
    is of kind 1. Vectors are given: which relation joins a pair is what there is to learn."""
    gen = torch.manual_seed(3)
    n, E = 80, 16
    kind_I = torch.arange(n + 1) % 2
    z_ID = torch.randn(n + 1, 6, generator=gen) * 0.3
    z_ID[:, 0] = 2.0 * kind_I - 1
    if permute:
        z_ID = z_ID[
            torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(n, generator=gen)])
        ]
    model = models.build("kda", n, shape(E))
    half_2E = torch.stack([torch.arange(E) < E // 2, torch.arange(E) >= E // 2]).float()
    with torch.no_grad():
        model.take_text(z_ID)
        model.relation[1:3] = half_2E
    params = list(model.latent.parameters())
    optimiser = torch.optim.Adam(params, lr=0.02)
    for _ in range(150):
        seq_BL = torch.randint(1, 41, (32, 6), generator=gen)  # the first half of the items
        target_B = torch.randint(1, 41, (32,), generator=gen)
        target_BE = torch.randn(32, E, generator=gen)
        y_BLE = torch.randn(32, 6, E, generator=gen)
        y_BLE += 2 * half_2E[kind_I[seq_BL]] * target_BE[:, None]
        apart_BLE = y_BLE - torch.randn(32, 6, E, generator=gen)
        pi_BLR = model.latent(seq_BL, target_B)
        loss = model.discovery(pi_BLR, apart_BLE, target_BE, torch.ones(32, 6) > 0).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    new_n = torch.arange(41, n + 1)
    with torch.no_grad():
        pi_nR = model.latent(new_n[:, None], new_n.roll(1))[:, 0]
    return ((pi_nR[:, 2] > pi_nR[:, 1]).long() == kind_I[new_n]).float().mean().item()


def test_titles_tell_the_relation_of_items_without_a_history_and_other_titles_do_not():
    assert relations_found(permute=False) > 0.95
    assert relations_found(permute=True) < 0.75


def test_without_latent_relations_it_learns_by_ranking_alone(monkeypatch):
    monkeypatch.setattr(kda.KDA, "discovery", lambda *_: pytest.fail("titles were asked"))
    seq_BL, target_B = torch.tensor([[3, 4, 9]]), torch.tensor([7])
    other_BL = torch.tensor([[1, 2, 5]])
    for latent, weight, relations in ((0, 10.0, 1), (8, 0.0, 9)):
        model = models.build("kda", 30, shape(8, latent, weight))
        loss = model.loss(seq_BL, target_B, other_BL)
        s_BC = models.score(model, seq_BL)[:, [7, 1, 2, 5]]
        torch.testing.assert_close(loss, kda.ranking_loss(s_BC).sum())
        assert len(model.relation) == relations


# ---------------------------------------------------------------- in the scripts


@pytest.mark.parametrize(
    "control, said", [("--latent 0", "relation 0 alone"), ("--latent-weight 0", "do not tell")]
)
def test_its_controls_are_trained_without_titles(control, said, cycle, train_on_cycle, tmp_path):
    train_on_cycle(tmp_path / "kda", f"{SMALL.replace('--text tfidf', control)} --epochs 1")
    run = load_run(tmp_path / "kda")
    assert said in note_of(run) and not hasattr(run, "relations")
    assert np.isfinite(HistoryScorer(models.load(run.folder))([np.array([3, 6])])[0, 1:]).all()


@pytest.fixture(scope="module")
def trained(cycle, train_on_cycle, tmp_path_factory):
    """A finished run, out of fold too."""
    out = tmp_path_factory.mktemp("kda") / "kda"
    train_on_cycle(out, f"{SMALL} --folds 2 --checkpoint-every 1000")
    return out


def test_a_stopped_run_goes_on_bit_for_bit(trained, cycle, tmp_path, monkeypatch):
    def args(out, *more):
        flags = f"{SMALL} --folds 2 --checkpoint-every 1000"
        return ["--dataset", str(cycle.folder), "--out", str(out), *flags.split(), *more]

    jobs = {"again": (train_backbone.main, args)}
    assert same(stop_and_resume(jobs, "again", tmp_path, monkeypatch, 11), trained)


def test_a_run_holds_lists_of_every_sample_and_no_states(trained, cycle, run):
    lists = np.load(trained / "topk_train.npy")
    assert lists.shape == (len(cycle.train), 20) and 0 < lists.min() <= lists.max() <= N_ITEMS
    assert np.isfinite(np.load(trained / "scores_train_15.npy")).all()
    assert not list(trained.glob("states_*"))
    assert set(load_file(trained / "folds.safetensors")) == {"fold"}
    assert not any("latent" in key for key in load_file(trained / "model.safetensors"))
    config = json.loads((trained / "config.json").read_text())
    assert config["loss"] == "bpr" and sum(config["relations"]) == pytest.approx(1, abs=0.01)
    assert note_of(load_run(trained)).startswith("KDA_LRD-style: 8 latent relations, no times")
    stop_unless_shaped(load_run(trained), cycle)
    words = command_of(load_run(trained))
    assert "--loss" not in words and "--folds" in words
    top = run(evaluate.main, f"--ckpt {trained} --history-json [3,6,12]").json["top"]
    assert len({x["id"] for x in top} - {"3", "6", "12"}) == 10
    # what it stored is what it says again
    [sample] = cycle.test[:1]
    old = cycle.items[cycle.ptr[np.searchsorted(cycle.ptr, sample, "right") - 1] : sample]
    [again_I] = HistoryScorer(models.load(trained))([old])
    stored = np.load(trained / "topk_test.npy")[0]
    again_I[[0, *old]] = -np.inf
    assert stored[0] == again_I.argmax()


def test_stage_1_on_titles_reads_its_lists_and_stages_on_vectors_refuse(
    toy, decoder, run, refused, on_cpu, tmp_path
):
    backbone = tmp_path / "kda"
    run(train_backbone.main, f"--dataset {toy.folder} --out {backbone} {SMALL} --epochs 1")
    where = f"--dataset {toy.folder} --backbone {backbone} --llm {decoder} --out {tmp_path}/prompt"
    run(distill.main, f"{where} {COMMON} {STAGE_1} --samples 16")
    assert load_run(tmp_path / "prompt").settings["backbone"] == "KDA_LRD"
    says = refused(distill.main, f"{where}-ids --input ids --samples 16")
    assert "reads a history through each candidate" in says and "--input titles" in says


def test_the_epoch_is_chosen_on_some_samples_of_a_large_validation(cycle, monkeypatch):
    asked = SimpleNamespace(model="kda", seed=0, lists=10)
    whole = results.Protocol(asked, cycle)
    monkeypatch.setattr(kda, "CHOOSING", 7)
    some = results.Protocol(asked, cycle)
    assert len(some.choosing) == 7 == len(some.shown[15]) < len(whole.choosing)
    assert set(some.choosing) < set(whole.choosing)
    assert "7 samples of the first half of val" in some.text


@pytest.mark.parametrize(
    "options, says",
    [
        ("--text tfidf --loss bce", "--loss means nothing with --model kda"),
        ("--text tfidf --teacher x --lam 1", "--lam means nothing with --model kda"),
        ("--text tfidf --contrast .1", "--contrast means nothing with --model kda"),
        ("--text tfidf --cold-out", "--cold-out means nothing"),
        ("--text tfidf --text-in start", "through each candidate; leave --text-in out"),
        ("", "--model kda is made of titles' vectors, and was given none"),
        ("--text tfidf --latent 0", "--text tfidf changes nothing with --latent 0"),
        ("--text tfidf --latent-weight 0", "changes nothing with --latent-weight 0"),
        ("--latent 0 --latent-weight 3", "changes nothing without --model kda and --latent"),
    ],
)
def test_what_needs_states_is_refused(options, says, cycle, refused, tmp_path):
    where = f"--dataset {cycle.folder} --out {tmp_path}/x --model kda"
    assert says in refused(train_backbone.main, f"{where} {options}")


def test_a_model_without_a_state_is_no_onnx_file(trained, refused):
    says = refused(evaluate.main, f"--ckpt {trained} --export-onnx")
    assert "holds a model 'kda'" in says
