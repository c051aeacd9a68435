"""recipes/demo.py: its stages, which are only recorded here, and what it says at the end."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from recipe_runs import script_mains

from delrec import runtime
from delrec.data.prepared import users
from delrec.evaluation.scores import part_of
from recipes import demo

TABLES = {
    "titles": ["hr@1.sasrec", "hr@1.titles", "hr@1.sasrec+titles"],
    "delrec": ["hr@1.sasrec", "hr@1.delrec"],
}


def is_target(data):
    """Which of the stored candidates of the test part is the next item (n, 15)."""
    places = np.arange(len(data.test))
    return part_of(data, "test", places, 15).is_target_nC


def write_scores(folder, data, first):
    """A finished run whose target stands first in the samples `first`, and third in the others."""
    folder.mkdir(parents=True, exist_ok=True)
    above = np.where(first, 0, 2)
    target_nC = is_target(data)
    # the others have -1, -2, ..
    score_nC = np.where(target_nC, np.where(first, 0, -2.5)[:, None], -(~target_nC).cumsum(1))
    np.save(folder / "scores_test_15.npy", score_nC.astype(np.float32))
    np.save(folder / "full_test.npy", np.stack([10 * above, 0 * above], 1).astype(np.int32))
    write_config(folder, data)


def write_config(folder, data):
    """What makes a folder a finished run."""
    config = {"stage": "lm", "dataset": "toy", "data_hash": data.meta["hash"]}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def recorded(toy, tmp_path, monkeypatch):
    """The command lines of the demo's stages, which leave scores of their runs."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "load_data", lambda name: toy)
    mains, seen = script_mains(), []
    first_every = {f"{demo.HOME}/sasrec": 4, f"{demo.HOME}/delrec": 2}

    class Stage:
        def __init__(self, line, **_):
            seen.append(line[2:])
            which = "delrec" if f"{demo.HOME}/delrec" in line else "titles"
            rows = [{"name": name, "value": 0} for name in TABLES[which]]
            self.stdout = [json.dumps({"rows": rows}) + "\n"]
            out = line[line.index("--out") + 1] if "--out" in line else None
            if out in first_every:
                first = np.arange(len(toy.test)) % first_every[out] == 0
                write_scores(tmp_path / "runs" / out, toy, first)
            if line[2] in mains:  # every flag exists
                mains[line[2]].make_context(line[2], list(line[3:]))
                assert "--overwrite" in line or line[2] == "evaluate.py"

        def wait(self):
            return 0

    monkeypatch.setattr(demo.subprocess, "Popen", Stage)
    return seen


def run_demo():
    return CliRunner().invoke(demo.main, [], catch_exceptions=False).output


def test_the_demo_replaces_its_own_runs_only_and_says_so(recorded):
    assert "is replaced" not in run_demo() and len(recorded) == len(demo.STAGES)
    outs = [line[line.index("--out") + 1] for line in recorded if "--out" in line]
    assert outs == [f"ml-100k/demo/{name}" for name in ("sasrec", "prompt", "delrec", "titles")]
    said = run_demo()
    assert said.count("is replaced once the new one is") == 2 and "demo/sasrec, finished 20" in said


def test_both_stages_of_the_demo_read_vectors_and_all_test_samples_are_ranked(recorded):
    run_demo()
    made = {line[line.index("--out") + 1]: line for line in recorded if "--out" in line}
    for stage in ("prompt", "delrec"):
        line = made[f"{demo.HOME}/{stage}"]
        assert line[line.index("--input") + 1] == "ids"
    assert not {"--epochs", "--patience"} & set(made[f"{demo.HOME}/sasrec"])
    assert "--limit" not in recorded[-1] and recorded[-1][0] == "evaluate.py"
    assert not any("--seed" in line for line in recorded)  # 0, the default


def test_the_demo_says_how_far_it_is_from_its_backbone_with_the_interval(recorded, toy):
    out = run_demo()
    said = next(line for line in out.splitlines() if line.startswith("  hr@1 of 15"))
    rows = {row["name"]: row["value"] for row in json.loads(out.splitlines()[-1])["rows"]}
    places = np.arange(len(toy.test))
    gain_n = (places % 2 == 0).astype(float) - (places % 4 == 0)
    assert rows["demo.minus_backbone.hr@1 of 15"] == pytest.approx(gain_n.mean(), abs=1e-4)
    low, high = (rows[f"demo.minus_backbone_{end}.hr@1 of 15"] for end in ("low", "high"))
    assert low < gain_n.mean() < high
    assert said.split()[3:] == [f"{gain_n.mean():+.4f}", f"[{low:+.4f},", f"{high:+.4f}]"]
    # a third place among 15 is worth 1/2; rank 21 of all items is no hit among 20
    ndcg = rows["demo.minus_backbone.ndcg@10 of 15"]
    assert ndcg == pytest.approx(gain_n.mean() / 2, abs=1e-4)
    assert rows["demo.minus_backbone.hr@20 of all"] == pytest.approx(gain_n.mean(), abs=1e-4)
    assert f"of {len(np.unique(users(toy, toy.test)))} users" in out
    # the shorter table gives its own row only
    names = [name for name in rows if not name.startswith("demo.")]
    assert names == ["hr@1.sasrec", "hr@1.delrec", "hr@1.titles"]


def test_the_demo_writes_the_page_and_its_last_printed_line_says_where(recorded, tmp_path):
    *_, said, last = run_demo().splitlines()
    line = recorded[-1]
    page = tmp_path / line[line.index("--report") + 1]
    assert line[0] == "evaluate.py" and str(page) in said and page.suffix == ".html"
    assert json.loads(last)["rows"]


def test_a_loss_is_said_as_a_gain_is(toy, tmp_path):
    places = np.arange(len(toy.test))
    write_scores(tmp_path / "sasrec", toy, places % 2 == 0)
    write_scores(tmp_path / "delrec", toy, places % 4 == 0)
    mean, low, high = demo.minus_backbone(toy, tmp_path)["hr@1 of 15"]
    assert low < mean < high and mean < -0.2


def test_a_tie_counts_as_the_mean_of_its_orders_as_in_the_table(toy, tmp_path):
    """Two candidates share the first place, the target is one of them: the mean rank is 1.5."""
    write_scores(tmp_path / "delrec", toy, np.arange(len(toy.test)) >= 0)
    score_nC = np.load(tmp_path / "delrec" / "scores_test_15.npy")
    score_nC[score_nC == -1] = 0
    np.save(tmp_path / "delrec" / "scores_test_15.npy", score_nC)
    np.save(tmp_path / "delrec" / "ranks_test_15.npy", np.full(len(toy.test), 1.5, np.float32))
    found = demo.values(tmp_path / "delrec", toy)
    assert (found["hr@1 of 15"] == 0.5).all()
    assert found["ndcg@10 of 15"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
