"""The rows of a table: backbones, the plain LM, histories in a random order, what is fused."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_lms import KINDS

import evaluate
from delrec import runtime
from delrec.data.prepared import candidates, histories, shuffled, subset, users
from delrec.evaluation.rows import Row, distinct_names, pairs_with_backbone
from delrec.lm import ranker as ranking
from delrec.lm.calibration import neutral_scores
from delrec.lm.hints import listing
from delrec.lm.ranker import make_ranker, open_run, score_tails
from delrec.metrics import compare, metrics
from delrec.runtime import load_run, read_json, write_json


def metrics_of(folder):
    """The table in an --out folder."""
    return json.loads((folder / "metrics.json").read_text())


def test_a_backbone_of_somebody_else_needs_no_more_than_the_readme_says(
    toy, backbone, script, on_cpu, tmp_path
):
    mine = shutil.copytree(backbone, tmp_path / "mine")
    for path in mine.glob("full_*.npy"):
        path.unlink()
    write_json(
        mine / "config.json",
        {
            "stage": "train_backbone",
            "model": "sasrec",
            "dataset": str(toy.folder),
            "data_hash": toy.meta["hash"],
        },
    )
    script(evaluate.main, "--ckpt", mine, "--out", tmp_path / "out")
    script(evaluate.main, "--ckpt", backbone, "--out", tmp_path / "own")
    assert (
        metrics_of(tmp_path / "out")["rows"]["mine"]["hr@1"]
        == metrics_of(tmp_path / "own")["rows"]["sasrec"]["hr@1"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_lm_is_a_row_of_its_own(
    request, kind, toy, backbone, script, on_cpu, alone, load, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    ask = "--verbalizer mean --no-show --prompt-history 4 --calibrate --candidates 15 --limit 12"
    llm = ["--llm", request.getfixturevalue(kind), "--dataset", toy.folder, "--ckpt", backbone]
    more = ["--val-samples", 10, "--out", tmp_path / "out"]
    script(evaluate.main, *llm, *ask.split(), *more)
    folder = tmp_path / "runs" / "toy" / "lm"
    run, found = load_run(folder, toy, ["lm"]), metrics_of(tmp_path / "out")
    assert {"lm", "sasrec", "sasrec+lm"} <= set(found["rows"])
    which, m = subset(len(toy.test), 12, 0), load(kind)
    cand = candidates(toy, "test", 15)[which]
    r = make_ranker(m, toy, run.settings)
    want = (
        ranking.score_samples(r, "test", which, 15, alone)
        - run.calibration * neutral_scores(r, alone)[cand]
    )
    hr = metrics(*compare(want, cand == toy.items[toy.test[which]][:, None]))
    assert found["rows"]["lm"]["mrr"] == pytest.approx(hr["mrr"].mean(), abs=1e-6)
    assert (
        r.P is None
        and len(r.prompts.prefix)
        and run.settings["verbalizer"] == "mean"
        and run.settings["history"] == 4
    )
    history = " | ".join(toy.titles[i] for i in (12, 3))
    ask = ["--history", history, "--top", 5, "--pool", 0]
    result = script(evaluate.main, "--ckpt", folder, *ask)
    items = np.setdiff1d(np.arange(1, 61), [12, 3])
    score = (
        score_tails(r, [r.prompts.history([12, 3])[0]], items[None], alone)[0]
        - run.calibration * neutral_scores(r, alone)[items]
    )
    assert [t["item"] for t in result.json["top"]] == items[np.argsort(-score, kind="stable")][
        :5
    ].tolist()


# ---------------------------------------------------------------- their names


def names_of(*folders, taken=()):
    """The names of the rows of some run folders."""
    return list(distinct_names([Path("/runs") / folder for folder in folders], taken).values())


def test_runs_of_one_name_get_as_many_parents_as_tell_them_apart():
    assert names_of("a/delrec-s0", "a/delrec-s1", "b/sasrec") == [
        "delrec-s0",
        "delrec-s1",
        "sasrec",
    ]
    # the other folder's seed 2 is no third seed of the first one's
    runs = ["a/delrec-s0", "b/delrec-s0", "b/delrec-s2", "a/delrec-s1"]
    assert names_of(*runs) == runs
    assert names_of("a/delrec-s0", "b/delrec-s1") == ["a/delrec-s0", "b/delrec-s1"]
    assert names_of("c/a/lm", "d/a/lm") == ["c/a/lm", "d/a/lm"]
    # a run without a seed is none of them
    assert names_of("a/lm", "a/lm-s0", "a/lm-s1") == ["a/lm", "lm-s0", "lm-s1"]
    runs = ["a/lm", "a/lm-s0", "a/lm-s1", "b/lm-s0"]
    assert names_of(*runs) == ["runs/a/lm", *runs[1:]]
    assert names_of("a/chance", taken=["chance"]) == ["a/chance"]


def test_seeds_of_two_folders_are_two_means(toy, make_backbone, script, on_cpu, tmp_path):
    """The models of a and of b differ much, so a mean of both is neither's."""
    names = ["a/lm-s0", "b/lm-s0", "b/lm-s1", "a/lm-s1", "b/lm-s2", "b/lm"]

    def score(name, samples):
        seed = np.random.default_rng(names.index(name)).random((len(samples), toy.n_items + 1))
        right = np.arange(toy.n_items + 1) == toy.items[np.asarray(samples)][:, None]
        return seed + 10 * right * (name[0] == "a")

    folders = [make_backbone(tmp_path / n, toy, partial(score, n)) for n in names]
    script(evaluate.main, "--ckpt", *folders, "--out", tmp_path / "out")
    found = metrics_of(tmp_path / "out")
    of_runs = {name: v for name, v in found["seeds"].items() if "+" not in name}
    assert {name: v["seeds"] for name, v in of_runs.items()} == {"a/lm": 2, "b/lm": 3}
    assert of_runs["a/lm"]["hr@1"][0] == 1 > 0.3 > of_runs["b/lm"]["hr@1"][0]
    assert found["reference"] == "a/lm-s0" and of_runs["b/lm"]["against"] == "a/lm"


# ---------------------------------------------------------------- the options


def test_reference_fuse_cold_users_and_latency(toy, sasrec, script, on_cpu, tmp_path):
    script(
        evaluate.main,
        "--ckpt",
        sasrec,
        "--out",
        tmp_path,
        "--max-history",
        11,
        "--fuse",
        "popularity",
        "co-occurrence",
        "--reference",
        "popularity",
        "--latency",
    )
    found, earlier = metrics_of(tmp_path), np.asarray(toy.test) - toy.ptr[users(toy, toy.test)]
    assert (
        0 < found["n"] == (earlier <= 11).sum() < len(toy.test)
        and "at most 11 earlier items" in found["protocol"]
    )
    rows = found["rows"]
    assert (
        "popularity+co-occurrence" in rows
        and found["reference"] == "popularity"
        and rows["popularity"]["test"] is None
    )
    assert 0 <= rows["sasrec"]["test"]["hr@1"]["p"] <= 1
    assert 0 <= rows["popularity+co-occurrence"]["test"]["ndcg@10"]["p"] <= 1
    ms, parameters = rows["sasrec"]["ms"], rows["sasrec"]["parameters"]
    assert (
        len(ms) == 3 and all(0 < x < 1000 for x in ms) and parameters == load_run(sasrec).parameters
    )
    assert "ms" not in rows["popularity"] and rows["sasrec"]["ms_on"] == "one core"
    assert "(median), on one core" in (tmp_path / "table.txt").read_text()

    def refused(*args):
        return script(evaluate.main, "--ckpt", sasrec, *args, code=1).error

    assert "--fuse names the row delrec" in refused("--fuse", "sasrec", "delrec")
    assert "--reference names the row x" in refused("--reference", "x")
    assert "at most 1 earlier items" in refused("--max-history", 1)


def test_a_table_of_one_user_s_sample_says_that_it_has_no_interval(
    backbone, script, on_cpu, tmp_path
):
    page = tmp_path / "page.html"
    args = ["--ckpt", backbone, "--limit", 1, "--out", tmp_path, "--report", page]
    script(evaluate.main, *args)

    def refused(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "metrics.json").read_text()
    found = json.loads(text, parse_constant=refused)
    assert found["rows"]["sasrec"]["hr@1_interval"] == [None, None]
    [group] = found["groups"]["items in the history"].values()
    assert group["rows"]["sasrec"]["low"] is None and group["users"] == group["n"] == 1
    for text in ((tmp_path / "table.txt").read_text(), (tmp_path / "table.md").read_text()):
        assert "[one user]" in text and "nan" not in text and "None" not in text
    assert "(1 of 1 users)" in page.read_text() and "[one user]" in page.read_text()
    assert (tmp_path / "table.png").exists() and (tmp_path / "by-items.png").exists()


def test_shuffled_histories_change_what_reads_the_order_only(
    toy, sasrec, chain, script, on_cpu, tmp_path
):
    copies = [
        shutil.copytree(sasrec, tmp_path / "sasrec"),
        shutil.copytree(chain.delrec, tmp_path / "delrec"),
    ]
    script(
        evaluate.main,
        "--ckpt",
        *copies,
        "--limit",
        30,
        "--val-samples",
        10,
        "--shuffle-history",
        "--latency",
        "--out",
        tmp_path / "out",
    )
    which = subset(len(toy.test), 30, 0)
    for folder in copies:
        a, b = (np.load(folder / f"scores_test_15{x}.npy")[which] for x in ("", "_shuffled"))
        assert np.isfinite(b).all() and np.abs(a - b).max(1).mean() > 1e-3, folder
        assert f"{folder.name}, shuffled" in metrics_of(tmp_path / "out")["rows"]
    lm = open_run(load_run(copies[1]), toy, torch.device("cpu"))[0]
    # an LM that reads titles has no items.safetensors
    counted = metrics_of(tmp_path / "out")["rows"]["delrec"]["parameters"]
    assert counted == pytest.approx(
        sum(p.numel() for p in lm.lm.model.parameters()) + lm.P.numel(), rel=0.01
    )
    samples = np.asarray(toy.test)[which]
    old = histories(toy, samples, 10)
    again = shuffled(old, samples)
    assert (
        np.array_equal(np.sort(old), np.sort(again))
        and not np.array_equal(old, again)
        and np.array_equal(again, shuffled(old, samples))
    )
    assert np.array_equal(again == 0, old == 0)  # padding stays in front
    one = np.array([[0, 0, 7]])
    assert np.array_equal(shuffled(one, [3]), one)


def test_a_list_in_the_backbone_s_order_does_not_tell_the_real_order(
    toy, sasrec, chain, script, on_cpu, tmp_path
):
    mine, lm = (
        shutil.copytree(sasrec, tmp_path / "sasrec"),
        shutil.copytree(chain.delrec, tmp_path / "delrec"),
    )
    config = read_json(lm / "config.json")
    settings = config["settings"] | {"order": "backbone", "show": True, "backbone_run": str(mine)}
    del settings["wording"]  # as if it were trained on such prompts
    write_json(lm / "config.json", config | {"settings": settings, "backbone_run": str(mine)})
    script(
        evaluate.main,
        "--ckpt",
        lm,
        "--limit",
        12,
        "--val-samples",
        10,
        "--shuffle-history",
        "--out",
        tmp_path / "out",
    )
    which = subset(len(toy.test), 12, 0)
    r = open_run(load_run(lm), toy, torch.device("cpu"))[0]
    real, r.shuffled = listing(r, "test", 15, which), True
    shown = listing(r, "test", 15, which)
    assert (
        np.array_equal(
            shown,
            np.argsort(
                -np.load(mine / "scores_test_15_shuffled.npy")[which], axis=1, kind="stable"
            ),
        )
        and (shown != real).any(1).mean() > 0.5
    )


def test_an_lm_is_fused_with_its_own_backbone(sasrec, backbone, chain, script, on_cpu, tmp_path):
    # distilled from `backbone`
    first, lm = (
        shutil.copytree(sasrec, tmp_path / "first"),
        shutil.copytree(chain.delrec, tmp_path / "delrec"),
    )
    script(
        evaluate.main,
        "--ckpt",
        first,
        backbone,
        lm,
        "--limit",
        20,
        "--val-samples",
        10,
        "--out",
        tmp_path / "out",
    )
    rows = metrics_of(tmp_path / "out")["rows"]
    assert "sasrec+delrec" in rows and "first+delrec" not in rows and "first+co-occurrence" in rows


def test_an_lm_whose_backbone_is_no_row_is_not_fused_with_another(tmp_path):
    rows, score_nC = {}, np.zeros((1, 2))
    weights = {"sasrec": "a", "gru4rec": "b", "gru4rec-folds": "b", "lrurec": "c"}
    for name, text in weights.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(text)

    def add(name, stage, **more):
        run = SimpleNamespace(stage=stage, folder=tmp_path / name, **more)
        rows[name] = Row(score_nC, score_nC, "", run)
        return run

    sasrec, gru4rec = (add(name, "train_backbone") for name in ("sasrec", "gru4rec"))
    runs = [
        add(f"of-{name}", "finetune", backbone_run=str(tmp_path / name))
        for name in ("gru4rec", "gru4rec-folds", "lrurec", "gone")
    ]
    runs.append(add("plain", "lm"))
    pairs = pairs_with_backbone(rows, [sasrec, gru4rec, *runs], sasrec)
    assert pairs[2:] == [
        ("gru4rec", "of-gru4rec"),
        ("gru4rec", "of-gru4rec-folds"),
        ("sasrec", "plain"),
    ]


def test_what_an_earlier_table_left_is_not_taken_for_this_one_s(
    toy, sasrec, script, on_cpu, tmp_path
):
    mine = shutil.copytree(sasrec, tmp_path / "sasrec")
    (mine / "ranks_test_15.npy").unlink(missing_ok=True)
    script(evaluate.main, "--ckpt", mine, "--out", tmp_path / "out", "--limit", 20)
    for name in ("latency", "seeds", "against-k", "by-nothing"):
        shutil.copy(tmp_path / "out" / "table.png", tmp_path / "out" / f"{name}.png")
    script(evaluate.main, "--ckpt", mine, "--out", tmp_path / "out", "--limit", 10)
    assert (
        not {"latency", "seeds", "against-k", "by-nothing"}
        & {p.stem for p in (tmp_path / "out").glob("*.png")}
        and (tmp_path / "out" / "table.png").exists()
    )
    ranks = np.load(mine / "ranks_test_15.npy")
    # a smaller table takes no rank away
    assert np.flatnonzero(np.isfinite(ranks)).tolist() == sorted(
        subset(len(toy.test), 20, 0).tolist()
    )
