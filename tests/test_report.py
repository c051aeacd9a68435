"""report.py and what evaluate.py adds to the table: groups, seeds, floors, formats, and the page,
looked at in Chromium where there is one.
"""

import csv
import html
import json
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import drawing

import evaluate
from delrec.data.prepared import candidates, histories, shuffled, subset, users
from delrec.evaluation import floors, report, stats
from delrec.lm.ranker import listing, open_run
from delrec.metrics import compare, metrics
from delrec.runtime import load_run, read_json, write_json


@pytest.fixture(scope="module", autouse=True)
def pictures():
    with drawing():
        yield


# ---------------------------------------------------------------- co-occurrence, groups, seeds


def test_cooccurrence_worked_by_hand():
    # two users; training: a b c | b c d, each user's last item is the test target
    data = SimpleNamespace(
        items=np.array([1, 2, 3, 9, 2, 3, 4, 8]),
        ptr=np.array([0, 4, 8]),
        train=np.array([1, 2, 5, 6]),
        n_items=9,
        n_users=2,
    )
    cand = np.array([[1, 2, 3, 4, 9, 8]] * 2)
    s = floors.cooccurrence(data, np.array([3, 7]), cand, decay=0.5)

    def pair(n, a, b):
        return n / np.sqrt(a * b)

    # counts in training: 1: 1, 2: 2, 3: 2, 4: 1; user 0's history is 1 2 3, the oldest weighs .25
    assert s[0] == pytest.approx(
        [
            0.5 * pair(1, 2, 1) + pair(1, 2, 1),
            0.25 * pair(1, 1, 2) + pair(2, 2, 2),
            0.25 * pair(1, 1, 2) + 0.5 * pair(2, 2, 2),
            0.5 * pair(1, 2, 1) + pair(1, 2, 1),
            0,
            0,
        ]
    )
    # the test targets 9 and 8 never stood beside anything in training
    assert not s[:, 4:].any()


def test_cooccurrence_finds_planted_pairs(make_data, tmp_path):
    rng, rows = np.random.default_rng(0), []
    # items come in pairs 2i-1, 2i; which pair comes next is random
    for u in range(120):
        items = np.concatenate(
            [[2 * i - 1, 2 * i] for i in rng.choice(np.arange(1, 31), 8, replace=False)]
        )
        rows += [(u, i, 100 * u + t) for t, i in enumerate(items)]
    data = make_data(
        tmp_path, rows, {i: f"title {i}" for i in range(1, 61)}, "pairs", "--split", "leave-one-out"
    )
    samples, cand = np.asarray(data.test), candidates(data, "test", 15)
    m = metrics(
        *compare(floors.cooccurrence(data, samples, cand), cand == data.items[samples][:, None])
    )
    assert m["hr@1"].mean() > 0.9  # the last item is the second of a pair


def test_groups_cover_every_sample_once(toy):
    samples = np.asarray(toy.test)
    groups = evaluate.groups_of(toy, samples, "temporal")
    assert len(groups) == 3
    for kind, masks in groups.items():
        assert (np.sum(list(masks.values()), 0) == 1).all(), kind
    cold = groups["items in the history"].get("1-2, cold", np.zeros(len(samples), bool))
    earlier = samples - toy.ptr[users(toy, samples)]
    assert np.array_equal(cold, earlier < 3)
    first = toy.times[samples[groups["time within the test part"]["first third"]]]
    last = toy.times[samples[groups["time within the test part"]["last third"]]]
    assert first.max() <= last.min() and len(evaluate.groups_of(toy, samples, "leave-one-out")) == 2


def test_seeds_are_averaged_and_tested_together():
    rng = np.random.default_rng(0)
    user, base = np.arange(600) // 2, rng.random(600)

    def row(gain):
        return {
            "hr@1": (base + gain + 0.3 * rng.normal(size=600) > 0.5).astype(float),
            "ndcg@10": base + gain + 0.1 * rng.normal(size=600),
        }

    value = {
        "base-s0": row(0),
        "base-s1": row(0),
        "better-s0": row(0.1),
        "better-s1": row(0.1),
        "alone": row(0),
    }
    found = stats.over_seeds(value, user, "base-s0")
    assert (
        set(found) == {"base", "better"}
        and found["base"]["against"] is None
        and found["better"]["against"] == "base"
    )
    both = [value[f"better-s{s}"]["hr@1"].mean() for s in (0, 1)]
    assert found["better"]["hr@1"] == pytest.approx(
        [np.mean(both), abs(both[0] - both[1]) / np.sqrt(2)]
    )
    low, high = found["better"]["hr@1_interval"]
    assert low < found["better"]["hr@1"][0] < high and (low, high) == pytest.approx(
        stats.interval(np.mean([value[f"better-s{s}"]["hr@1"] for s in (0, 1)], 0), user)
    )
    assert found["better"]["hr@1_each"] == pytest.approx(both)
    assert (
        found["better"]["ndcg@10_gain"] == pytest.approx(0.1, abs=0.02)
        and found["better"]["p_ndcg@10"] < 1e-6
    )
    assert stats.over_seeds({"a": row(0), "b-s0": row(0)}, user, "a") == {}
    assert [
        stats.unseeded(x)
        for x in ("sasrec-s0+delrec-s12", "my-shop", "delrec-s1, shuffled", "small-s")
    ] == ["sasrec+delrec", "my-shop", "delrec, shuffled", "small-s"]


# ---------------------------------------------------------------- the options


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


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
        and "p_hr@1" not in rows["popularity"]
    )
    assert (
        0 <= rows["sasrec"]["p_hr@1"] <= 1
        and 0 <= rows["popularity+co-occurrence"]["p_ndcg@10"] <= 1
    )
    ms, parameters = rows["sasrec"]["ms"], rows["sasrec"]["parameters"]
    assert (
        len(ms) == 3 and all(0 < x < 1000 for x in ms) and parameters == load_run(sasrec).parameters
    )
    assert "ms" not in rows["popularity"]

    def refused(*args):
        return script(evaluate.main, "--ckpt", sasrec, *args, code=1).error

    assert "--fuse names the row delrec" in refused("--fuse", "sasrec", "delrec")
    assert "--reference names the row x" in refused("--reference", "x")
    assert "at most 1 earlier items" in refused("--max-history", 1)


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


def test_the_case_study_shows_what_is_compared(chain):
    def run(name, stage, soft_prompt="none"):
        return SimpleNamespace(
            stage=stage, soft_prompt=soft_prompt, folder=SimpleNamespace(name=name)
        )

    runs = [
        run(f"{m}-s{s}", "train_backbone") for m in ("sasrec", "gru4rec", "caser") for s in range(3)
    ] + [run("lm", "lm")]
    runs += [
        run(f"{m}-s{s}", "finetune") for m in ("llara", "words", "no-prompt") for s in range(2)
    ] + [run(f"delrec-s{s}", "finetune", str(chain.prompt)) for s in range(2)]
    assert evaluate.told_apart({r.folder.name: r for r in runs}, "sasrec-s1") == [
        "sasrec-s1",
        "lm",
        "delrec-s0",
        "llara-s0",
        "words-s0",
        "no-prompt-s0",
        "gru4rec-s0",
        "caser-s0",
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


def test_the_page_says_what_was_typed(toy, sasrec, script, on_cpu, tmp_path):
    page = tmp_path / "not" / "there" / "x.html"
    args = [
        "--ckpt",
        sasrec,
        "--limit",
        20,
        "--no-show",
        "--fuse",
        "popularity",
        "co-occurrence",
        "--fuse",
        "sasrec",
        "popularity",
        "--out",
        tmp_path / "a b",
        "--report",
        page,
    ]
    script(evaluate.main, *args)
    said = html.unescape(re.search(r"Written by <code>(.*?)</code>", page.read_text()).group(1))
    program, *typed = shlex.split(said)[1:]
    # it asks for the same once more
    with (
        evaluate.main.make_context(program, typed) as again,
        evaluate.main.make_context(program, [str(a) for a in args]) as first,
    ):
        assert again.params == first.params


# ---------------------------------------------------------------- formats


@pytest.fixture(scope="module")
def written(toy, sasrec, backbone, script, fp32, tmp_path_factory):
    """Two backbones evaluated on a catalogue with titles that look like markup: .folder, .page,
    .result.
    """
    folder = tmp_path_factory.mktemp("written")
    data = shutil.copytree(toy.folder, folder / "toy")
    titles = (data / "titles.txt").read_text().split("\n")
    titles[:3] = [
        "</script><script>alert(1)</script>",
        "A & B | C_1 50% <i>x</i>",
        "日本 \"quoted\" 'title'",
    ]
    (data / "titles.txt").write_text("\n".join(titles), encoding="utf-8")
    copy = shutil.copytree(sasrec, folder / "a_b&c%")
    with fp32():
        result = script(
            evaluate.main,
            "--ckpt",
            copy,
            backbone,
            "--dataset",
            data,
            "--out",
            folder / "out",
            "--report",
            folder / "out.html",
        )
    return SimpleNamespace(
        folder=folder / "out",
        page=folder / "out.html",
        result=result,
        found=metrics_of(folder / "out"),
    )


def test_csv_holds_the_numbers_of_the_table(written):
    with open(written.folder / "table.csv", encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    rows = written.found["rows"]
    assert [x["row"] for x in lines] == list(rows)
    for line in lines:
        for column, key in (
            ("HR@1", "hr@1"),
            ("NDCG@10", "ndcg@10"),
            ("MRR", "mrr"),
            ("p HR@1", "p_hr@1"),
        ):
            assert (float(line[column]) if line[column] else None) == (
                pytest.approx(rows[line["row"]][key], abs=1e-6)
                if key in rows[line["row"]]
                else None
            )


def test_markdown_and_latex_have_whole_rows(written):
    lines = [x for x in (written.folder / "table.md").read_text().splitlines() if x.startswith("|")]

    def count(x):
        return len(re.findall(r"(?<!\\)\|", x))

    assert len(lines) == 2 + len(written.found["rows"]) and len({count(x) for x in lines}) == 1
    tex = (written.folder / "table.tex").read_text()
    body = [x for x in tex.splitlines() if x.endswith("\\\\")]
    assert (
        len(body) == 1 + len(written.found["rows"])
        and len({len(re.findall(r"(?<!\\)&", x)) for x in body}) == 1
    )
    assert "a\\_b\\&c\\%" in tex and "a_b&c%" not in tex.replace("% ", "")
    best = written.found["rows"]["a_b&c%"]
    assert (
        report.short(best["hr@1"]) in tex
        and report.short(0.5714) == ".571"
        and report.short(1.0) == "1.000"
        and report.short(0) == ".000"
    )


def test_marks_say_what_the_tests_say(written):
    for name, row in written.found["rows"].items():
        line = next(
            x
            for x in (written.folder / "table.txt").read_text().splitlines()
            if x.startswith(f"{name} ")
        )
        stars = re.search(r"\d\.\d{3}(\**)", line).group(1)
        assert stars == report.mark(row.get("p_hr@1")), line
    assert [report.mark(p) for p in (None, 0.2, 0.05, 0.04, 0.01, 0.009)] == [
        "",
        "",
        "",
        "*",
        "*",
        "**",
    ]


def test_the_paper_s_numbers_stand_beside_what_they_belong_to():
    assert (
        report.of_paper("beauty", "DELRec (SASRec)")["hr@1"] == 0.3177
        and report.of_paper("ml-100k", "w/o TA")["ndcg@10"] == 0.5797
    )
    assert report.of_paper("steam-au", "SASRec") is None and report.of_paper("beauty", None) is None


def test_figures_are_pictures(written):
    names = {p.name for p in written.folder.glob("*.png")}
    assert {
        "table.png",
        "by-items.png",
        "by-interactions.png",
        "by-time.png",
        "training.png",
    } <= names
    assert all((written.folder / n).read_bytes()[:4] == b"\x89PNG" for n in names)


def test_a_sweep_is_a_curve(tmp_path, chain):
    runs, value, low_high = {}, {}, {}
    for k, h in ((20, 10), (40, 10), (80, 10), (80, 5), (80, 20)):
        folder = tmp_path / f"p{k}-{h}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"k": k, "h": h}))
        runs[folder.name] = SimpleNamespace(stage="finetune", soft_prompt=str(folder))
        value[folder.name], low_high[folder.name] = (
            {"hr@1": np.array([k / 100, h / 100])},
            {"hr@1": (0, 1)},
        )
    found = evaluate.sweeps_of(runs, value, low_high)
    assert set(found["k"]) == {"20", "40", "80"} and set(found["h"]) == {"5", "10", "20"}
    assert found["k"]["40"]["hr@1"] == pytest.approx(0.25)
    fig = report.sweep_figure(
        {
            "sweeps": found,
            "reference": "sasrec",
            "rows": {"sasrec": {"hr@1": 0.5}},
            "candidates": 15,
        },
        "k",
    )
    assert list(fig.axes[0].lines[0].get_xdata()) == [20, 40, 80]


# ---------------------------------------------------------------- the page


def test_the_page_needs_no_network_and_titles_stay_text(written):
    page = written.page.read_text(encoding="utf-8")
    assert (
        page.count("<script>") == 1
        and "alert(1)</script>" not in page
        and "&lt;/script&gt;&lt;script&gt;alert(1)" in page
    )
    assert (
        not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page)
        and "@import" not in page
        and "fetch(" not in page
    )
    assert (
        written.found["protocol"] in page
        and "a_b&amp;c%" in page
        and "HR@1 by items in the history" in page
    )
    cases = re.findall(r"<details><summary>.*?&middot; (.*?)</summary>", page)
    assert len(cases) == 60 and all("a_b&amp;c%" in c and "sasrec" in c for c in cases)
    assert page.count('class="true"') + page.count("class=true") > 60


def test_the_case_study_shows_stored_scores(written, toy, backbone):
    found = re.search(
        r"<details><summary>(.*?)</summary>", written.page.read_text(encoding="utf-8")
    ).group(1)
    assert re.search(r"sasrec \d+(\.5)?\.", found)  # the place of the truth


CHROMIUM = next(
    (
        p
        for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))
        if p
    ),
    None,
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(written, tmp_path, width):
    """At phone and desktop width: nothing on the console, nothing sticks out at the side, the
    search finds.
    """
    look = """<script>
    window.addEventListener("load", () => {
      const box = document.getElementById("search"), shown = () => [...document.querySelectorAll("#cases details")].filter(x => x.offsetParent).length;
      const all = shown(), root = document.documentElement;
      box.value = document.querySelector("#cases details .true").textContent; box.dispatchEvent(new Event("input"));
      const some = shown();
      box.value = "no such words at all"; box.dispatchEvent(new Event("input"));
      const none = shown();
      root.dataset.seen = JSON.stringify({width: innerWidth, sticks: root.scrollWidth - root.clientWidth, all, some, none, images: [...document.images].filter(x => x.naturalWidth > 0).length, of: document.images.length});
    });</script>"""
    copy = tmp_path / "page.html"
    copy.write_text(
        '<iframe src="inner.html" id="f" '
        f'style="width:{width}px;height:900px;border:0"></iframe><script>'
        'addEventListener("message", e => document.documentElement.dataset.seen = e.data);</script>',
        encoding="utf-8",
    )
    inner = look.replace("root.dataset.seen = ", "parent.postMessage(").replace(
        "of: document.images.length});", 'of: document.images.length}), "*");'
    )
    (tmp_path / "inner.html").write_text(
        written.page.read_text(encoding="utf-8").replace("</body>", inner + "</body>"),
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}/profile",
            "--enable-logging=stderr",
            "--window-size=1400,1000",
            "--virtual-time-budget=8000",
            "--dump-dom",
            f"file://{copy}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert seen, done.stdout[-500:] + done.stderr[-2000:]
    seen = json.loads(seen.group(1).replace("&quot;", '"'))
    assert seen["width"] == width and seen["sticks"] <= 0
    assert (
        seen["all"] == 60
        and 0 < seen["some"] < 60
        and seen["none"] == 0
        and seen["images"] == seen["of"] > 3
    )
    assert "CONSOLE" not in done.stderr, [x for x in done.stderr.splitlines() if "CONSOLE" in x]
