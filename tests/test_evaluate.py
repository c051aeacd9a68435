"""evaluate.py: statistics worked by hand, floors, fusion, and the command on a backbone and on runs
of tiny LMs.
"""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KINDS, drawing, evaluation

import evaluate
from delrec import runtime
from delrec.data.prepared import candidates, subset, users
from delrec.evaluation import floors, stats
from delrec.lm import ranker as ranking
from delrec.lm.ranker import make_ranker, neutral_scores, score_tails
from delrec.metrics import chance, compare, metrics
from delrec.runtime import load_run, write_json

# ---------------------------------------------------------------- intervals and tests


def test_the_interval_covers_the_truth_as_often_as_it_says(alone):
    # 60 users with 1 to 8 samples each; half of what varies is the user's own
    rng, covered, wide, narrow = np.random.default_rng(1), 0, [], []
    for trial in range(400):
        count = rng.integers(1, 9, 60)
        user = np.repeat(np.arange(60), count)
        value = 3 + rng.normal(size=60)[user] + rng.normal(size=len(user))
        low, high = stats.interval(value, user, draws=300, seed=trial)
        covered += low <= 3 <= high
        wide.append(high - low)
        alone = stats.interval(value, np.arange(len(user)), draws=300, seed=trial)
        narrow.append(alone[1] - alone[0])
    assert 0.90 < covered / 400 < 0.97
    # samples of one user are not independent: ignoring that is too bold
    assert np.mean(wide) > 1.3 * np.mean(narrow)


def test_the_interval_of_a_constant_is_the_constant_and_repeats():
    assert stats.interval(np.full(9, 0.25), np.arange(9)).tolist() == [0.25, 0.25]
    value, user = np.random.default_rng(0).random(50), np.arange(50) // 3
    assert np.array_equal(stats.interval(value, user), stats.interval(value, user))
    assert stats.interval(value[::-1], user[::-1]) == pytest.approx(stats.interval(value, user))


def sample_with_t(t, n):
    """n differences whose ordinary t statistic is t."""
    z = np.random.default_rng(n).normal(size=n)
    z = (z - z.mean()) / z.std(ddof=1)
    return z + t / math.sqrt(n)


@pytest.mark.parametrize(
    "df, t, p",
    [
        (10, 2.228, 0.05),
        (10, 3.169, 0.01),
        (1, 12.706, 0.05),
        (2, 4.303, 0.05),
        (30, 2.042, 0.05),
        (30, 2.750, 0.01),
        (100, 1.984, 0.05),
        (5, 0.727, 0.5),
        (20000, 1.960, 0.05),
        (10, 0, 1),
    ],
)
def test_paired_t_equals_the_table_when_every_user_has_one_sample(df, t, p):
    a = sample_with_t(t, df + 1)
    assert stats.paired_t(a, np.zeros(df + 1), np.arange(df + 1)) == pytest.approx(p, abs=2e-4)
    assert stats.paired_t(np.zeros(df + 1), a, np.arange(df + 1)[::-1] * 7) == pytest.approx(
        p, abs=2e-4
    )


def test_a_user_s_samples_count_as_one():
    d = sample_with_t(2.228, 11)
    # the same difference seen again and again proves nothing new
    for times in (2, 5):
        assert stats.paired_t(
            np.repeat(d, times), np.zeros(11 * times), np.repeat(np.arange(11), times)
        ) == pytest.approx(0.05, abs=2e-4)
    # counted as 55 users it would
    assert stats.paired_t(np.repeat(d, 5), np.zeros(55), np.arange(55)) < 0.001


def test_paired_t_at_its_edges():
    x = np.random.default_rng(0).random(20)
    assert stats.paired_t(x, x, np.arange(20)) == 1
    # one user: nothing can be said by t
    assert stats.paired_t(x + x, x, np.zeros(20)) == stats.paired_t(x + 1, x, np.zeros(20)) == 1
    assert stats.paired_t(np.ones(20), np.zeros(20), np.arange(20)) == 0
    rejected = np.mean(
        [
            stats.paired_t(r.normal(size=40), r.normal(size=40), np.arange(40) // 2) < 0.05
            for r in map(np.random.default_rng, range(400))
        ]
    )
    assert 0.02 < rejected < 0.09  # of true nulls


def hits(only_a, only_b, both=5, none=7):
    a = [1] * only_a + [0] * only_b + [1] * both + [0] * none
    b = [0] * only_a + [1] * only_b + [1] * both + [0] * none
    return np.array(a, bool), np.array(b, bool)


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (1, 8, 2 * (1 + 9) / 2**9),
        (8, 1, 2 * (1 + 9) / 2**9),
        (0, 6, 2 / 2**6),
        (5, 5, 1),
        (0, 0, 1),
        (2, 3, 1),
        (3, 12, 2 * (1 + 15 + 105 + 455) / 2**15),
        (0, 2000, 0),
    ],
)
def test_mcnemar_by_hand(only_a, only_b, p):
    assert stats.mcnemar(*hits(only_a, only_b)) == pytest.approx(p, rel=1e-6, abs=1e-12)
    assert stats.mcnemar(*hits(only_a, only_b, both=300, none=900)) == stats.mcnemar(
        *hits(only_a, only_b)
    )


def test_mcnemar_leaves_ties_out():
    # a row of ties is right half the time, as the other
    half, right = np.full(200, 0.5), np.tile([0.0, 1.0], 100)

    def row(hr):
        return {"hr@1": hr, "ndcg@10": hr}

    assert stats.difference(row(right), row(half), np.arange(200))["p_mcnemar_hr@1"] == 1
    a, b = (x.astype(float) for x in hits(1, 8))
    with_ties = stats.difference(
        row(np.append(a, half)), row(np.append(b, np.ones(200))), np.arange(len(a) + 200)
    )
    assert with_ties["p_mcnemar_hr@1"] == pytest.approx(stats.mcnemar(*hits(1, 8)))


# ---------------------------------------------------------------- floors and fusion


def three_titles(history):
    titles = ["", "Red car", "RED boat!", "blue sky", "car, car"]
    items = np.array([*history, 1], np.int32)
    return SimpleNamespace(titles=titles, n_items=4, items=items, ptr=np.array([0, len(items)]))


def test_title_similarity_by_hand():
    # document frequency: red 2, car 2, boat 1, blue 1, sky 1 of 4 titles; idf = log(5 / (1 + df))
    two, one = math.log(5 / 3), math.log(5 / 2)
    cand = np.array([[1, 2, 3, 4]])
    red_boat = two * two / (math.hypot(two, two) * math.hypot(two, one))
    score = floors.title_similarity(three_titles([1]), [1], cand)
    # 'car, car' points where 'car' does
    assert score[0].tolist() == pytest.approx([1, red_boat, 0, math.sqrt(0.5)], abs=1e-6)
    # 'blue sky' then 'Red car': the older one weighs .8, the profile's length is hypot(.8, 1)
    score = floors.title_similarity(three_titles([3, 1]), [2], cand)
    assert score[0].tolist() == pytest.approx(
        [
            1 / math.hypot(0.8, 1),
            red_boat / math.hypot(0.8, 1),
            0.8 / math.hypot(0.8, 1),
            math.sqrt(0.5) / math.hypot(0.8, 1),
        ],
        abs=1e-6,
    )
    assert floors.title_similarity(three_titles([3, 1]), [2], cand, L=1)[
        0
    ].tolist() == pytest.approx([1, red_boat, 0, math.sqrt(0.5)], abs=1e-6)
    # no history, no similarity
    assert not floors.title_similarity(three_titles([3, 1]), [0], cand).any()


def test_title_similarity_goes_in_chunks(toy):
    samples, cand = toy.test[:30], candidates(toy, "test", 15)[:30]
    whole = floors.title_similarity(toy, samples, cand)
    np.testing.assert_allclose(
        floors.title_similarity(toy, samples, cand, chunk=7), whole, atol=1e-6
    )
    assert whole.min() >= 0 and whole.max() <= 1 + 1e-6 and whole.std() > 0.05


def test_popularity_counts_training_only(toy):
    counts = floors.popularity(toy)
    # targets stand in order: the last one of each user remains
    last = {u: s for u, s in zip(users(toy, toy.train), toy.train)}
    # a user's first item is no target, but training all the same
    read = [toy.items[s] for u in last for s in range(toy.ptr[u], last[u] + 1)]
    assert counts[0] == 0 and counts.sum() == len(read) > len(toy.train)
    assert all(counts[i] == read.count(i) for i in (1, 7, 30, 60))


def test_standardised_scores_and_a_constant_row():
    x = floors.standard(np.array([[1.0, 2, 3], [5, 5, 5]]))
    assert (
        x.mean(1).tolist() == pytest.approx([0, 0])
        and x[0].std() == pytest.approx(1)
        and not x[1].any()
    )


def planted(rng, n, knows, signal):
    """Scores of n x 15 candidates, target first, for which the signal is there on the samples that
    `knows` says.
    """
    score = rng.normal(size=(n, 15))
    score[knows, 0] += signal
    return score


def test_fusion_finds_what_each_knows_alone_and_keeps_out_what_knows_nothing(alone):
    rng, n = np.random.default_rng(0), 400
    target = np.zeros((n, 15), bool)
    target[:, 0] = True
    # validation and test: one knows these, the other the rest
    half = [rng.random(n) < 0.5 for _ in range(2)]
    a, b = [[planted(rng, n, h ^ flip, 8) for h in half] for flip in (False, True)]
    noise = [rng.normal(size=(n, 15)) * 1000 for _ in range(2)]

    def hr(score):
        return metrics(*compare(score, target))["hr@1"].mean()

    fused, w = floors.fuse(a, b, target)
    assert hr(fused) > max(hr(a[1]), hr(b[1])) + 0.1 and 0.2 < w < 0.8
    a = [planted(rng, n, slice(None), 2) for _ in range(2)]
    fused, w = floors.fuse(a, noise, target)
    assert w <= 0.15 and hr(fused) > hr(a[1]) - 0.05 and floors.fuse(noise, a, target)[1] >= 0.85
    # the weight comes from validation alone: a test part that says the opposite does not change it
    assert floors.fuse((a[0], noise[1]), (noise[0], a[1]), target)[1] == w


# ---------------------------------------------------------------- the command


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
    monkeypatch.setattr(evaluate, "load_lm", refuse)


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
        ("popularity", floors.popularity(toy)[cand]),
    ):
        m = metrics(*compare(score, target))
        assert {k: rows[name][k] for k in evaluate.SHOWN} == pytest.approx(
            {k: m[k].mean() for k in evaluate.SHOWN}, abs=1e-6
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
        {k: m[k].mean() for k in evaluate.FULL}
    )
    # the history is masked for chance too
    left = [
        60 - len(set(toy.items[toy.ptr[u] : s]) - {toy.items[s]})
        for s, u in zip(toy.test[which], users(toy, toy.test[which]))
    ]
    each = [chance(n, (1, 5, 10, 20)) for n in left]
    assert (
        full["chance"] == pytest.approx({k: np.mean([e[k] for e in each]) for k in evaluate.FULL})
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
        evaluate,
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


def test_two_processes_give_the_metrics_of_one(table, twins):
    one, two = metrics_of(table.folder), metrics_of(twins.evaluated)
    assert (
        one.keys() == two.keys()
        and one["protocol"] == two["protocol"]
        and list(one["rows"]) == list(two["rows"])
    )
    for name in one["rows"]:
        for key, value in one["rows"][name].items():
            assert two["rows"][name][key] == (
                value if isinstance(value, str) else pytest.approx(value, abs=1e-9)
            ), (name, key)
    for name in one["tests"]:
        assert two["tests"][name] == pytest.approx(one["tests"][name], abs=1e-9)
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
    assert test["hr@1"] == pytest.approx(rows["evaluated"]["hr@1"] - rows["sasrec"]["hr@1"])
    assert test["ndcg@10"] == pytest.approx(
        rows["evaluated"]["ndcg@10"] - rows["sasrec"]["ndcg@10"]
    )
    ranks = [np.load(folder / "ranks_test_15.npy") for folder in (table.folder, backbone)]
    asked = np.isfinite(ranks[0])
    hit = [r[asked] == 1 for r in ranks]
    assert test["p_mcnemar_hr@1"] == pytest.approx(stats.mcnemar(*hit))
    assert "evaluated - sasrec" in result.output and (tmp_path / "out" / "table.txt").exists()


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
    assert (
        rows["evaluated"]["mrr"] == metrics_of(table.folder)["rows"]["evaluated"]["mrr"]
        and rows[str(other)]["mrr"] == rows["sasrec"]["mrr"]
    )
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_lm_is_a_row_of_its_own(
    request, kind, toy, backbone, script, on_cpu, alone, load, tmp_path, monkeypatch
):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    script(
        evaluate.main,
        "--llm",
        request.getfixturevalue(kind),
        "--dataset",
        toy.folder,
        "--ckpt",
        backbone,
        "--verbalizer",
        "mean",
        "--no-show",
        "--prompt-history",
        4,
        "--calibrate",
        "--candidates",
        15,
        "--limit",
        12,
        "--val-samples",
        10,
        "--out",
        tmp_path / "out",
    )
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
    result = script(
        evaluate.main,
        "--ckpt",
        folder,
        "--history",
        " | ".join(toy.titles[i] for i in (12, 3)),
        "--top",
        5,
        "--pool",
        0,
    )
    items = np.setdiff1d(np.arange(1, 61), [12, 3])
    score = (
        score_tails(r, [r.prompts.history([12, 3])[0]], items[None], alone)[0]
        - run.calibration * neutral_scores(r, alone)[items]
    )
    assert [t["item"] for t in result.json["top"]] == items[np.argsort(-score, kind="stable")][
        :5
    ].tolist()


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


def test_a_backbone_without_scores_is_told_to_train_again(toy, backbone, script, tmp_path):
    bare = shutil.copytree(backbone, tmp_path / "bare")
    (bare / "scores_test_15.npy").unlink()
    says = refused(script, "--ckpt", bare, "--candidates", 15)
    assert "lacks 85 samples; train the backbone again" in says
    np.save(bare / "scores_test_15.npy", np.zeros((3, 15), np.float32))
    assert "has shape (3, 15), expected (85, 15)" in refused(
        script, "--ckpt", bare, "--candidates", 15
    )


def test_scores_that_are_not_finite_are_not_ranked(toy, backbone, script, tmp_path):
    broken = shutil.copytree(backbone, tmp_path / "broken")
    scores = np.load(broken / "scores_test_15.npy")
    scores[4, 3] = np.inf
    np.save(broken / "scores_test_15.npy", scores)
    assert "lacks 1 samples" in refused(script, "--ckpt", broken, "--candidates", 15)


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


def test_popularity_over_the_catalogue_masks_the_history_once(toy):
    count = np.bincount(toy.items[toy.train], minlength=toy.n_items + 1)
    greater, equal = floors.full_ranking_of(count, toy, np.asarray(toy.test))
    for n, sample in enumerate(toy.test):
        target = toy.items[sample]
        others = (
            set(range(1, toy.n_items + 1))
            - set(toy.items[toy.ptr[users(toy, [sample])[0]] : sample].tolist())
            - {target}
        )
        assert greater[n] == sum(count[i] > count[target] for i in others) and equal[n] == sum(
            count[i] == count[target] for i in others
        )


def test_fifty_samples_of_a_user_are_not_fifty_users():
    user = np.repeat(np.arange(10), 50)
    # six users' samples are all won, four users' all lost
    won = np.where(user < 6, 1.0, 0.0)
    rows = [{m: x for m in ("hr@1", "ndcg@10")} for x in (won, 1 - won)]
    d = stats.difference(*rows, user)
    assert d["p_mcnemar_hr@1"] < 1e-4 and d["p_t_hr@1"] > 0.4 and d["hr@1"] == pytest.approx(0.2)
