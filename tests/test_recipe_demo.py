"""recipes/demo.py: its stages, which are only recorded here, and what it says at the end."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from recipe_runs import script_mains

from delrec import runtime
from delrec.data.prepared import users
from recipes import demo

TABLES = {
    "titles": ["hr@1.sasrec", "hr@1.titles", "hr@1.sasrec+titles"],
    "delrec": ["hr@1.sasrec", "hr@1.delrec"],
}


def write_ranks(folder, data, first):
    """What evaluate.py stores of a run whose target stands first in the samples `first`, and third
    in the others."""
    folder.mkdir(parents=True, exist_ok=True)
    above = np.where(first, 0, 2)
    np.save(folder / "ranks_test_15.npy", (above + 1).astype(np.float32))
    np.save(folder / "full_test.npy", np.stack([10 * above, 0 * above], 1).astype(np.int32))


@pytest.fixture
def recorded(toy, tmp_path, monkeypatch):
    """The command lines of the demo's stages; their runs' ranks are there."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "load_data", lambda name: toy)
    mains, seen = script_mains(), []
    places = np.arange(len(toy.test))
    write_ranks(tmp_path / "runs" / demo.HOME / "sasrec", toy, places % 4 == 0)
    write_ranks(tmp_path / "runs" / demo.HOME / "delrec", toy, places % 2 == 0)

    class Stage:
        def __init__(self, line, **_):
            seen.append(line[2:])
            which = "delrec" if f"{demo.HOME}/delrec" in line else "titles"
            rows = [{"name": name, "value": 0} for name in TABLES[which]]
            self.stdout = [json.dumps({"rows": rows}) + "\n"]
            if line[2] in mains:  # every flag exists
                mains[line[2]].make_context(line[2], list(line[3:]))
                assert "--overwrite" in line or line[2] == "evaluate.py"

        def wait(self):
            return 0

    monkeypatch.setattr(demo.subprocess, "Popen", Stage)
    return seen


def run_demo():
    return CliRunner().invoke(demo.main, [], catch_exceptions=False).output


def test_the_demo_replaces_its_own_runs_only_and_says_so(recorded, backbone, tmp_path):
    assert "is replaced" not in run_demo() and len(recorded) == len(demo.STAGES)
    outs = [line[line.index("--out") + 1] for line in recorded if "--out" in line]
    assert outs == [f"ml-100k/demo/{name}" for name in ("sasrec", "prompt", "delrec", "titles")]
    shutil.copytree(backbone, tmp_path / "runs" / demo.HOME / "sasrec", dirs_exist_ok=True)
    said = run_demo()
    assert said.count("is replaced once the new one is") == 1 and "demo/sasrec, finished 20" in said


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
    write_ranks(tmp_path / "sasrec", toy, places % 2 == 0)
    write_ranks(tmp_path / "delrec", toy, places % 4 == 0)
    mean, low, high = demo.minus_backbone(toy, tmp_path)["hr@1 of 15"]
    assert low < mean < high and mean < -0.2
