"""A backbone retrieves, an LM ranks what was retrieved: --pool backbone, --loss letter, and
evaluate.py --two-stage (LlamaRec).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import edit_config, metrics_of
from copiers import scores_with_truth
from lm_cases import SETTINGS, opened, rank_with, vectors, windows
from stopped_runs import same, stop_and_resume
from tuning import SMALL

import evaluate
import finetune
from delrec.evaluation import two_stage
from delrec.evaluation.scores import Scorer, part_of
from delrec.lm import hints, samples
from delrec.lm.prompts import LETTERS
from delrec.lm.ranker import make_ranker
from delrec.lm.reading import read_prefix
from delrec.lm.text import MASK, encode
from delrec.lm.verbalizers import letter_and_end
from delrec.metrics import metrics
from delrec.runtime import load_run, read_json, write_json

pytest_plugins = ["lm_fixtures"]
C = 15


# ---------------------------------------------------------------- overall, and its ceiling


def test_overall_is_the_mean_over_who_ranked_which_sample():
    # the backbone has the truth at 1, 3, 4, 9 and 21; the pool is its best four
    greater = np.array([0, 2, 3, 8, 20])
    inside = greater < 4
    backbone, ranker = metrics(greater, 0 * greater), metrics([1, 0, 0], [0, 0, 0])
    told = two_stage.combined(backbone, ranker, inside, np.arange(5))
    assert (told["n"], told["n_in"], told["ceiling"]) == (5, 3, 0.6)
    merged = metrics([1, 0, 0, 8, 20], [0] * 5)
    for m in two_stage.COLUMNS:
        assert told["rows"]["overall"][m] == pytest.approx(merged[m].mean())
        gain = merged[m].mean() - backbone[m].mean()
        assert told["gain"][m][0] == pytest.approx(gain)
        assert told["gain"][m][1] <= gain <= told["gain"][m][2]
    assert told["rows"]["ranker, inside"]["hr@1"] == pytest.approx(2 / 3)
    assert told["rows"]["copy first, inside"]["hr@1"] == pytest.approx(1 / 3)
    assert told["rows"]["backbone"]["hr@1"] == pytest.approx(0.2)
    assert told["rows"]["overall"]["hr@1"] == pytest.approx(0.4)


def half_known(data):
    """score(samples): the truth of every other one is the best, of the others the last."""
    first, last = scores_with_truth(data), scores_with_truth(data, -1.0)

    def score(sample_n):
        is_first_n1 = np.arange(len(sample_n))[:, None] % 2 == 0
        return np.where(is_first_n1, first(sample_n), last(sample_n))

    return score


@pytest.fixture
def ranked(noise, make_backbone, tmp_path):
    """A run whose backbone knows half of the truths, and whose pools are scored: the truth best
    wherever it is in the pool. No LM is there to score anything else.
    """
    backbone = make_backbone(tmp_path / "sasrec", noise, half_known(noise), h=C)
    run = tmp_path / "run"
    run.mkdir()
    shown = SETTINGS | {"show": True, "backbone_run": str(backbone)}
    config = {"stage": "finetune", "C": C, "settings": shown, "calibration": 0, "llm": "none"}
    config |= {k: read_json(backbone / "config.json")[k] for k in ("dataset", "data_hash")}
    write_json(run / "config.json", config | {"data_folder": str(noise.folder)})
    pool_nC = hints.pool_of(backbone, noise, "test", C, np.arange(len(noise.test)))
    best_nC = (pool_nC == noise.items[noise.test][:, None]).astype(np.float32)
    digest = two_stage.listed.backbone_digest(backbone)
    two_stage.store(load_run(run), run / f"scores_pool_backbone_{C}.npy", best_nC, digest)
    return load_run(run)


def test_the_best_ranker_comes_to_the_recall_of_the_backbone_and_no_further(noise, ranked, alone):
    test = part_of(noise, "test", np.arange(len(noise.test)), C)
    told = two_stage.two_stage(ranked, Scorer(noise, C, alone), test, "backbone")
    rows = told["rows"]
    half = -(-len(noise.test) // 2) / len(noise.test)
    assert told["ceiling"] == half == rows["overall"]["hr@1"] == rows["overall"]["hr@10"]
    assert rows["ranker, inside"]["hr@1"] == 1 and rows["backbone"]["hr@1"] == half
    assert told["copies"]["copied"] == told["copies"]["named_right"] == 1


def test_what_calibration_subtracts_counts_in_pools_too(noise, ranked, alone):
    test = part_of(noise, "test", np.arange(10), C)
    neutral_I = np.zeros(noise.n_items + 1, np.float32)
    neutral_I[noise.items[test.samples]] = 9
    np.save(edit_config(ranked.folder, calibration=1) / "neutral.npy", neutral_I)
    run = load_run(ranked.folder)
    told = two_stage.two_stage(run, Scorer(noise, C, alone), test, "backbone")
    assert told["rows"]["ranker, inside"]["hr@1"] == 0


def test_pools_of_another_backbone_are_scored_again(noise, ranked, alone, monkeypatch):
    test, scorer = part_of(noise, "test", np.arange(10), C), Scorer(noise, C, alone)

    def worst(scorer, run, which, pool_nC, order):
        return -(pool_nC == noise.items[noise.test[which]][:, None]).astype(np.float32)

    monkeypatch.setattr(two_stage, "scored", worst)
    told = two_stage.two_stage(ranked, scorer, test, "backbone")
    assert told["rows"]["ranker, inside"]["hr@1"] == 1  # as they were stored
    path = ranked.folder.parent / "sasrec" / "topk_train.npy"
    np.save(path, np.load(path)[:, ::-1])
    for _ in range(2):
        told = two_stage.two_stage(ranked, scorer, test, "backbone")
        assert told["rows"]["ranker, inside"]["hr@1"] == 0


# ---------------------------------------------------------------- training pools


def test_a_training_pool_is_the_backbones_list_of_the_sample_and_the_truth(
    noise, knower, counts, make_backbone, tmp_path
):
    backbone = make_backbone(tmp_path / "sasrec", noise, half_known(noise), h=C)
    cfg = SimpleNamespace(C=C, seed=0, loss="candidates", history=3, input="titles")
    cfg.pool, cfg.order = "backbone", "shuffled"
    settings = SETTINGS | {"show": True, "backbone_run": str(backbone), "hint": "backbone"}
    r = make_ranker(opened(counts), noise, settings)
    which = np.arange(30, 60)
    list_nC = np.load(backbone / "topk_train.npy")[which]
    target_n = noise.items[noise.train[which]]
    places = []
    for row, target, example in zip(
        list_nC, target_n, samples.examples(r, cfg, which, np.zeros(30, bool), which)
    ):
        assert example.cand[example.truth] == target == example.target[0]
        lacks = target not in row
        assert set(example.cand) == set(row[:-1] if lacks else row) | {target}
        places.append(example.truth)
    assert len(set(places)) > 5  # and not always last
    assert (list_nC == target_n[:, None]).any(1).sum() == 15  # of 30
    hint_nh = hints.hints_of(r, "train", C, which, pool=True)
    np.testing.assert_array_equal(hint_nh, list_nC[:, :5])


def test_what_is_too_short_for_a_pool_is_said(noise, backbone, toy):
    with pytest.raises(Exception, match="lists 12 items a sample, a pool of 15 needs more.*top-h"):
        hints.pool_of(backbone, toy, "test", C, np.arange(3))


# ---------------------------------------------------------------- the letter and the end


def test_the_loss_on_letters_is_that_of_the_letter_and_the_end_token(toy, load, plain):
    r = rank_with(load, "decoder", toy, k=3, verbalizer="letter")
    old, cand = windows(toy)
    place = np.arange(len(old)) % C
    tails = [r.prompts.history(h, c)[0] for h, c in zip(old, cand)]
    start = read_prefix(r.lm, r.prompts.prefix, r.P)
    found = letter_and_end(r.lm, start, tails, place, C)
    for tail, p, log_p in zip(tails, place, found.tolist()):
        letter = encode(r.lm, LETTERS[p])[0]
        said = logits_behind(plain("decoder"), r, tail, letter).log_softmax(1)
        want = (said[0, letter] + said[1, r.lm.tok.eos_token_id]) / 2
        assert log_p == pytest.approx(float(want), abs=1e-4)


@torch.no_grad()
def logits_behind(model, r, tail, letter):
    """The logits (2, V) by plain transformers where the letter is asked, and behind it."""
    tokens = np.concatenate([r.prompts.prefix, tail]).tolist()
    mask = tokens.index(MASK)
    return model(inputs_embeds=vectors(model, tokens[:mask] + [letter], r.P)).logits[0, mask - 1 :]


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def letters(toy, decoder, make_backbone, tmp_path_factory):
    """finetune.py's arguments for letters over a backbone's lists, but for --out."""
    from toys import popular

    backbone = make_backbone(tmp_path_factory.mktemp("pools") / "lrurec", toy, popular(toy), h=C)
    return (
        f"--dataset {toy.folder} --llm {decoder} --backbone {backbone} --soft-prompt none {SMALL} "
        "--verbalizer letter --loss letter --pool backbone --no-calibrate --checkpoint-every 1"
    )


def test_two_stages_from_the_command_line(letters, toy, run, on_cpu, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run(finetune.main, f"{letters} --out {whole}")
    jobs = {"finetune": (finetune.main, lambda out, *more: [*letters.split(), "--out", out, *more])}
    assert same(stop_and_resume(jobs, "finetune", tmp_path, monkeypatch, 3), whole)
    asked = f"--ckpt {whole} --limit 40 --val-samples 10"
    told = {}
    for order in ("backbone", "shuffled"):
        said = run(evaluate.main, f"{asked} --two-stage {order}").output
        told[order] = metrics_of(whole / "evaluation")["two_stage"]["whole"]
        assert "two stages: lrurec retrieves 15 of all 60 items, whole ranks them" in said
        assert "is the ceiling of every hit rate up to 15" in said
    a, b = told["backbone"], told["shuffled"]
    assert a["n_in"] == b["n_in"] < a["n"] == 40
    assert a["rows"]["backbone"] == b["rows"]["backbone"]
    assert a["rows"]["ranker, inside"] != b["rows"]["ranker, inside"]
    assert a["rows"]["overall"]["hr@10"] <= a["ceiling"]
    scored = np.isfinite(np.load(whole / f"scores_pool_backbone_{C}.npy")).all(1)
    assert scored.sum() == a["n_in"]  # nobody asks where the truth is not
    monkeypatch.setattr(two_stage, "scored", None)  # and nobody asks twice
    run(evaluate.main, f"{asked} --two-stage backbone")
    assert metrics_of(whole / "evaluation")["two_stage"]["whole"] == a


@pytest.mark.parametrize(
    "more, says",
    [
        ("--verbalizer mean --loss letter", "--loss letter trains letters, --verbalizer mean"),
        ("--lambda-ms .1", "--loss letter reads two states a prompt"),
    ],
)
def test_what_cannot_be_meant_is_refused(more, says, letters, refused, tmp_path):
    assert says in refused(finetune.main, f"{letters} {more} --out {tmp_path}/x")


def test_a_backbone_alone_has_no_second_stage(letters, script):
    backbone = letters.split()[letters.split().index("--backbone") + 1]
    says = script(evaluate.main, "--ckpt", backbone, "--two-stage", "backbone", code=1).error
    assert "--two-stage has an LM rank what its backbone retrieves" in says
