"""evaluate.py: the table of a fine-tuned run, from one process and from two, and what it
refuses.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chain import evaluation
from pictures import drawing

import evaluate
from delrec.data import counts
from delrec.data.prepared import candidates, subset, users
from delrec.evaluation import plain, stats
from delrec.evaluation import scores as scores_of_runs
from delrec.evaluation.wording import FULL, SHOWN, mark
from delrec.lm import ranker as ranking
from delrec.metrics import chance, compare, metrics
from delrec.runtime import load_run


@pytest.fixture(scope="module")
def table(chain, script, fp32, tmp_path_factory):
    """A copy of the fine-tuned run, evaluated once by one process: .folder, .result."""
    folder = shutil.copytree(chain.delrec, tmp_path_factory.mktemp("table") / "evaluated")
    with fp32(), drawing():
        return SimpleNamespace(folder=folder, result=script(evaluate.main, *evaluation(folder)))


def metrics_of(folder):
    """The table in an --out folder, or in that of a run which was evaluated without --out."""
    return json.loads(
        (
            (folder / "evaluation" if (folder / "evaluation").is_dir() else folder) / "metrics.json"
        ).read_text()
    )


def without_lm(monkeypatch):
    def refuse(*_):
        raise AssertionError("the LM was loaded")

    monkeypatch.setattr(ranking, "load_lm", refuse)
    monkeypatch.setattr(plain, "load_lm", refuse)


def test_the_table_has_the_floors_the_run_and_its_backbone(table, toy):
    rows = metrics_of(table.folder)["rows"]
    assert set(rows) == {
        "chance",
        "popularity",
        "co-occurrence",
        "title-similarity",
        "evaluated",
        "sasrec",
        "sasrec+co-occurrence",
        "sasrec+title-similarity",
        "sasrec+evaluated",
    }
    assert rows["chance"]["hr@1"] == pytest.approx(1 / 15) and rows["chance"][
        "hr@5"
    ] == pytest.approx(1 / 3)
    assert rows["chance"]["hr@1_interval"] == pytest.approx([1 / 15, 1 / 15])
    for row in rows.values():
        assert (
            0 <= row["hr@1"] <= row["hr@5"] <= row["hr@10"] <= 1
            and row["hr@1_interval"][0] <= row["hr@1"] <= row["hr@1_interval"][1]
        )
        assert row["ndcg@10_interval"][0] <= row["ndcg@10"] <= row["ndcg@10_interval"][1]
    text = (table.folder / "evaluation" / "table.txt").read_text()
    assert (
        all(name in text for name in rows)
        and toy.meta["hash"] in text
        and "40 of 85 samples" in text
        and "15 stored candidates" in text
    )
    assert (
        text.strip() in table.result.output
        and (table.folder / "evaluation" / "table.png").read_bytes()[:4] == b"\x89PNG"
    )
    last = {row["name"]: row["value"] for row in table.result.json["rows"]}
    assert last == {
        f"{m}.{name}": round(rows[name][m], 4) for name in rows for m in ("hr@1", "ndcg@10")
    }
    assert {"machine", "versions", "commit"} <= set(table.result.json)


def test_the_rows_are_the_metrics_of_their_scores(table, toy, backbone, alone, on_cpu):
    which = subset(len(toy.test), 40, 0)
    cand = candidates(toy, "test", 15)[which]
    target = cand == toy.items[toy.test[which]][:, None]
    run = load_run(table.folder, toy)
    ranker, penalty = ranking.open_run(run, toy, torch.device("cpu"))
    scores = ranking.score_samples(ranker, "test", which, 15, alone)
    rows = metrics_of(table.folder)["rows"]
    for name, score in (
        ("evaluated", scores - penalty[cand]),
        ("sasrec", np.load(backbone / "scores_test_15.npy")[which]),
        ("popularity", counts.popularity(toy)[cand]),
    ):
        m = metrics(*compare(score, target))
        assert {k: rows[name][k] for k in SHOWN} == pytest.approx(
            {k: m[k].mean() for k in SHOWN}, abs=1e-6
        ), name
    stored = np.load(table.folder / "scores_test_15.npy")
    asked = np.isfinite(stored).all(1)
    assert np.flatnonzero(asked).tolist() == which.tolist()
    np.testing.assert_allclose(stored[which], scores, rtol=1e-5, atol=1e-4)
    ranks = np.load(table.folder / "ranks_test_15.npy")
    m = metrics(*compare(scores - penalty[cand], target))
    assert np.array_equal(ranks[which], m["rank"]) and np.isnan(ranks[~asked]).all()


def test_the_whole_catalogue_comes_from_the_backbone_s_counts(table, toy, backbone):
    which = subset(len(toy.test), 40, 0)
    m = metrics(*np.load(backbone / "full_test.npy")[which].T, (1, 5, 10, 20))
    full = metrics_of(table.folder)["full"]
    assert full.keys() == {"chance", "popularity", "sasrec"} and full["sasrec"] == pytest.approx(
        {k: m[k].mean() for k in FULL}
    )
    # the history is masked for chance too
    left = [
        60 - len(set(toy.items[toy.ptr[u] : s]) - {toy.items[s]})
        for s, u in zip(toy.test[which], users(toy, toy.test[which]))
    ]
    each = [chance(n, (1, 5, 10, 20)) for n in left]
    assert (
        full["chance"] == pytest.approx({k: np.mean([e[k] for e in each]) for k in FULL})
        and full["chance"]["hr@10"] > 10 / 60
    )


def test_a_second_evaluation_reads_the_stored_scores_and_loads_no_lm(
    table, script, monkeypatch, tmp_path
):
    without_lm(monkeypatch)
    script(evaluate.main, *evaluation(table.folder), "--out", tmp_path / "again")
    assert metrics_of(tmp_path / "again") == metrics_of(table.folder)


def test_a_smaller_limit_asks_nothing_new_and_a_larger_one_only_the_rest(
    table, toy, script, monkeypatch, tmp_path, on_cpu
):
    folder = shutil.copytree(table.folder, tmp_path / "evaluated")
    asked, score_samples = [], ranking.score_samples
    monkeypatch.setattr(
        scores_of_runs,
        "score_samples",
        lambda r, split, which, *args, **kwargs: (
            asked.append((split, len(which))) or score_samples(r, split, which, *args, **kwargs)
        ),
    )
    before = np.load(folder / "scores_test_15.npy")
    script(evaluate.main, *evaluation(folder), "--limit", 55)
    assert asked == [("test", 15)]
    after = np.load(folder / "scores_test_15.npy")
    known = np.isfinite(before).all(1)
    assert np.array_equal(after[known], before[known]) and np.isfinite(after).all(1).sum() == 55
    larger = metrics_of(folder)["rows"]["evaluated"]
    script(evaluate.main, *evaluation(folder))
    assert (
        len(asked) == 1
        and metrics_of(folder) == metrics_of(table.folder)
        and metrics_of(folder)["rows"]["evaluated"] != larger
    )
    script(evaluate.main, *evaluation(folder), "--limit", 0)
    assert asked[1:] == [("test", len(toy.test) - 55)] and metrics_of(folder)["n"] == len(toy.test)


def test_a_backbone_alone_needs_no_lm(toy, backbone, script, tmp_path, monkeypatch):
    without_lm(monkeypatch)
    lone = shutil.copytree(backbone, tmp_path / "gru4rec")
    result = script(evaluate.main, "--ckpt", lone, "--candidates", 15, "--limit", 0)
    rows = metrics_of(lone)["rows"]
    assert set(rows) == {
        "chance",
        "popularity",
        "co-occurrence",
        "title-similarity",
        "gru4rec",
        "gru4rec+co-occurrence",
        "gru4rec+title-similarity",
    }
    # it is popularity
    assert (
        rows["gru4rec"]["hr@1"] == pytest.approx(rows["popularity"]["hr@1"], abs=0.05)
        and rows["popularity"]["hr@1"] > 0.1
    )
    assert result.json["rows"][0] == {
        "name": "hr@1.chance",
        "value": 0.0667,
        "unit": "",
        "goal": None,
    }


def test_two_processes_give_the_metrics_of_one(table, twins):
    one, two = metrics_of(table.folder), metrics_of(twins.evaluated)
    assert (
        one.keys() == two.keys()
        and one["protocol"] == two["protocol"]
        and list(one["rows"]) == list(two["rows"])
    )
    for name in one["rows"]:
        for key, value in one["rows"][name].items():
            if key == "test":
                continue
            assert two["rows"][name][key] == (
                value if isinstance(value, str) else pytest.approx(value, abs=1e-9)
            ), (name, key)
    for name in one["tests"]:
        for m, test in one["tests"][name].items():
            assert two["tests"][name][m] == pytest.approx(test, abs=1e-9)
    np.testing.assert_allclose(
        np.load(twins.evaluated / "scores_test_15.npy"),
        np.load(table.folder / "scores_test_15.npy"),
        rtol=1e-5,
        atol=1e-4,
    )
    assert twins.printed.count("paired tests") == 1  # only one process prints


def test_runs_are_compared_pairwise_with_backbones_first(
    chain, table, toy, backbone, script, on_cpu, tmp_path
):
    soft = shutil.copytree(chain.prompt, tmp_path / "soft")
    result = script(
        evaluate.main,
        "--ckpt",
        table.folder,
        soft,
        "--ckpt",
        backbone,
        "--limit",
        40,
        "--val-samples",
        30,
        "--candidates",
        15,
        "--out",
        tmp_path / "out",
    )
    found = metrics_of(tmp_path / "out")
    assert (
        {"evaluated", "soft", "sasrec"} <= set(found["rows"])
        and "evaluated - sasrec" in found["tests"]
        and "soft - sasrec" in found["tests"]
    )
    rows, test = found["rows"], found["tests"]["evaluated - sasrec"]
    ranks = [np.load(folder / "ranks_test_15.npy") for folder in (table.folder, backbone)]
    asked = np.isfinite(ranks[0])
    hit = [(r[asked] == 1).astype(float) for r in ranks]
    of_samples = stats.difference(*hit, users(toy, toy.test[asked]))
    assert test["hr@1"]["p"] == of_samples["p"] and test["hr@1"]["p_t"] == of_samples["p_t"]
    for m in ("hr@1", "ndcg@10"):
        gain = rows["evaluated"][m] - rows["sasrec"][m]
        assert test[m]["difference"] == pytest.approx(gain)
        assert test[m]["p_adjusted"] is None
        # the same comparison stands in the row, adjusted for all rows
        assert rows["evaluated"]["test"][m] | {"p_adjusted": None} == test[m]
        assert rows["evaluated"]["test"][m]["p_adjusted"] >= test[m]["p"]
    assert rows["sasrec"]["test"] is None and rows["chance"]["test"] is None
    # printed: rows against the reference, the other pairs
    assert "paired tests, row minus sasrec" in result.output
    lines = result.output.splitlines()
    assert any(x.startswith("evaluated - soft ") for x in lines)
    assert not any(x.startswith("evaluated - sasrec ") for x in lines)
    assert (tmp_path / "out" / "table.txt").exists()


def test_what_is_compared_is_said_before_and_marked_so(
    chain, table, backbone, script, on_cpu, tmp_path
):
    ask = ["--ckpt", table.folder, backbone, "--limit", 40, "--val-samples", 30]
    planned = ["--compare", "evaluated", "popularity", "--margin", 0.9, 0.9]
    output = script(evaluate.main, *ask, *planned, "--out", tmp_path / "planned").output
    found = metrics_of(tmp_path / "planned")
    assert list(found["planned"]) == ["evaluated - popularity"]
    assert "planned pairs" in output and "which nobody planned" not in output
    # with a margin of .9 whatever is not the same is equal
    assert found["margin"] == found["margin_full"] == 0.9
    marks = {mark(row["test"]["hr@1"]) for row in found["rows"].values() if row["test"]}
    assert marks <= {"=", "*=", "**="}
    assert f"as much as {found['users_worth']:.3g} users" in found["protocol"]
    assert f"of {found['users']} users" in found["protocol"]
    script(evaluate.main, *ask, "--exploratory", "--out", tmp_path / "swept")
    swept = metrics_of(tmp_path / "swept")
    assert {mark(r["test"]["hr@1"]) for r in swept["rows"].values() if r["test"]} == {""}
    assert "a sweep" in (tmp_path / "swept" / "table.txt").read_text()
    says = script(evaluate.main, *ask, "--compare", "evaluated", "nothing", code=1).error
    assert "it names evaluated and nothing" in says


def test_fusion_chooses_on_users_that_no_run_has_chosen_on(table, chain, toy):
    chosen_on = np.isfinite(np.load(chain.delrec / "scores_val_15.npy")).all(1)
    now = np.isfinite(np.load(table.folder / "scores_val_15.npy")).all(1)
    for_fusion = np.flatnonzero(now & ~chosen_on)
    assert chosen_on.sum() == len(for_fusion) == 30
    users_of = [set(users(toy, toy.val[w])) for w in (np.flatnonzero(chosen_on), for_fusion)]
    assert not set.intersection(*users_of)


def test_two_runs_whose_folders_have_one_name_are_two_rows(
    table, toy, backbone, script, on_cpu, tmp_path
):
    # another run, called the same: it has the backbone's scores
    other = shutil.copytree(table.folder, tmp_path / "evaluated")
    for split in ("val", "test"):
        shutil.copy(backbone / f"scores_{split}_15.npy", other / f"scores_{split}_15.npy")
    config = json.loads((other / "config.json").read_text()) | {"calibration": 0.0}
    (other / "config.json").write_text(json.dumps(config))
    script(
        evaluate.main,
        "--ckpt",
        table.folder,
        other,
        "--limit",
        40,
        "--val-samples",
        30,
        "--candidates",
        15,
        "--out",
        tmp_path / "out",
    )
    rows = metrics_of(tmp_path / "out")["rows"]
    first, second = (f"{folder.parent.name}/evaluated" for folder in (table.folder, other))
    assert rows[first]["mrr"] == metrics_of(table.folder)["rows"]["evaluated"]["mrr"]
    assert rows[second]["mrr"] == rows["sasrec"]["mrr"]
    fused = [
        rows[name]
        for name in rows
        if name.startswith("sasrec+")
        and name.split("+")[1] not in ("title-similarity", "co-occurrence")
    ]
    assert len(fused) == 2 and fused[1]["mrr"] == rows["sasrec"]["mrr"]
    tests = metrics_of(tmp_path / "out")["tests"]
    assert all(a != b for a, b in (name.split(" - ") for name in tests))
    ranks = [np.load(folder / "ranks_test_15.npy") for folder in (table.folder, other)]
    assert np.nanmean(1 / ranks[1]) == pytest.approx(
        rows["sasrec"]["mrr"], abs=0.05
    ) and not np.array_equal(*ranks, equal_nan=True)


# ---------------------------------------------------------------- refusals


def refused(script, *args):
    return script(evaluate.main, *args, code=1).error


def test_what_cannot_be_evaluated_is_one_sentence(chain, toy, backbone, script, tmp_path):
    assert "nothing to evaluate" in refused(script)
    assert "is no run folder" in refused(script, "--ckpt", tmp_path / "nothing")
    open_run = shutil.copytree(chain.delrec, tmp_path / "unfinished")
    (open_run / "config.json").unlink()
    assert "is an unfinished run (no config.json)" in refused(script, "--ckpt", open_run)
    other = shutil.copytree(toy.folder, tmp_path / "other")
    (other / "meta.json").write_text(json.dumps(toy.meta | {"hash": "0123456789abcdef"}))
    assert "was trained on another preparation of toy" in refused(
        script, "--ckpt", chain.delrec, "--dataset", other
    )
    assert "holds no 16 candidates" in refused(script, "--ckpt", backbone, "--candidates", 16)


@pytest.mark.parametrize("missing", ["adapter", "soft_prompt.safetensors", "neutral.npy"])
def test_a_run_with_a_part_missing_is_refused_not_half_loaded(
    chain, script, on_cpu, tmp_path, missing
):
    folder = shutil.copytree(chain.delrec, tmp_path / "delrec")
    shutil.rmtree(folder / missing) if missing == "adapter" else (folder / missing).unlink()
    config = json.loads((folder / "config.json").read_text()) | {"calibration": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    assert missing in refused(script, *evaluation(folder))


def test_a_backbone_without_scores_is_refused(toy, backbone, script, tmp_path):
    bare = shutil.copytree(backbone, tmp_path / "bare")
    (bare / "scores_test_15.npy").unlink()
    says = refused(script, "--ckpt", bare, "--candidates", 15)
    assert "scores_test_15.npy, scores of 15 candidates, is not there; write the file" in says
    np.save(bare / "scores_test_15.npy", np.zeros((3, 15), np.float32))
    assert "has shape (3, 15), expected (85, 15)" in refused(
        script, "--ckpt", bare, "--candidates", 15
    )


def test_scores_that_are_not_finite_are_not_ranked(toy, backbone, script, tmp_path):
    broken = shutil.copytree(backbone, tmp_path / "broken")
    scores = np.load(broken / "scores_test_15.npy")
    scores[4, 3] = np.inf
    np.save(broken / "scores_test_15.npy", scores)
    assert "holds inf in row 4, for candidate 3, expected" in refused(
        script, "--ckpt", broken, "--candidates", 15
    )
