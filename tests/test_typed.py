"""delrec/evaluation/typed.py: the rows that --reference, --fuse, --compare, --primary name."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click import ClickException
from scripts import sentence

import evaluate
from delrec.evaluation.rows import distinct_names
from delrec.evaluation.typed import settle_names


def settle(*folders, reference=None, fuse=(), compare=(), primary=None, exploratory=False):
    """What settle_names makes of names beside the rows of some run folders."""
    paths = [Path("/runs") / folder for folder in folders]
    names = distinct_names(paths, ["popularity"])
    cfg = SimpleNamespace(reference=reference, fuse=fuse, compare=compare, primary=primary)
    cfg.exploratory = exploratory
    settle_names(cfg, [(names[f], SimpleNamespace(folder=f)) for f in paths], ["popularity"])
    return cfg


def test_a_folder_s_name_is_a_row_s_where_one_run_has_it():
    cfg = settle(
        *["a/lm", "a/lm-s0", "b/x-s0", "c/x-s1"],
        reference="lm",
        fuse=[("x-s0", "popularity"), ("lm", "lm-s0"), ("lm+lm-s0", "c/x-s1")],
        compare=[("lm, shuffled", "x-s1"), ("a/lm-s0", "popularity")],
    )
    assert cfg.reference == "a/lm"
    assert cfg.fuse == [
        ("b/x-s0", "popularity"),
        ("a/lm", "lm-s0"),
        ("a/lm+lm-s0", "c/x-s1"),
    ]
    assert cfg.compare == [("a/lm, shuffled", "c/x-s1"), ("lm-s0", "popularity")]
    # a row's or a mean's own name comes before a folder's
    cfg = settle("a/popularity", "a/lm", "a/lm-s0", "a/lm-s1", compare=[("popularity", "lm")])
    assert cfg.compare == [("popularity", "lm")]
    # a run alone is what it was: lm is not the mean of its one seed
    assert settle("a/lm", "a/lm-s0", compare=[("lm", "lm-s0")]).compare == [("a/lm", "lm-s0")]


@pytest.mark.parametrize(
    "typed, said",
    [
        ({"reference": "x"}, "--reference names the row x, but the rows are popularity, a/lm"),
        ({"fuse": [("popularity", "lm")]}, "--fuse names the row lm, but the rows are"),
        ({"compare": [("c/x-s0", "x-s1")]}, "it names x-s0 and x-s1; the rows are popularity"),
        ({"compare": [("x", "x-s0")]}, "it names x and x-s0"),
    ],
)
def test_a_name_of_no_row_or_of_two_is_refused(typed, said):
    with pytest.raises(ClickException, match=said):
        settle("a/lm", "b/lm", "c/x-s0", "c/x-s2", **typed)


def test_a_saved_command_names_the_same_run_when_a_seed_is_added(
    toy, make_backbone, script, on_cpu, tmp_path, monkeypatch
):
    names = ["ml/sasrec", "ml/sasrec-s0"]

    def score(name, samples):
        seed = np.random.default_rng(names.index(name)).random((len(samples), toy.n_items + 1))
        right = np.arange(toy.n_items + 1) == toy.items[np.asarray(samples)][:, None]
        return seed + 10 * right * (name == "ml/sasrec")

    folders = [make_backbone(tmp_path / n, toy, partial(score, n)) for n in names]
    ask = ["--ckpt", *folders, "--limit", 30, "--out", tmp_path / "out", "--fuse", "sasrec"]
    ask += ["popularity", "--compare", "sasrec", "popularity"]
    ask += ["--primary", "sasrec", "sasrec-s0", "--reference"]
    script(evaluate.main, *ask, "sasrec")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["reference"] == "ml/sasrec" and "ml/sasrec+popularity" in found["rows"]
    [planned] = found["planned"].values()
    rows = found["rows"]
    gain = rows["ml/sasrec"]["hr@1"] - rows["popularity"]["hr@1"]
    assert planned["hr@1"]["difference"] == pytest.approx(gain)
    assert rows["ml/sasrec"]["hr@1"] == 1 > rows["sasrec-s0"]["hr@1"]
    test, said = found["primary"]["test"], (tmp_path / "out" / "table.txt").read_text()
    assert found["primary"]["pair"] == "ml/sasrec - sasrec-s0"
    assert test["p_adjusted"] == max(test["p"], test["p_t"]) < 0.05
    assert test["interval"][0] < test["difference"] == 1 - rows["sasrec-s0"]["hr@1"]
    assert said.startswith("The primary comparison, HR@1 among 15 candidates, ml/sasrec - sasrec")
    # refused, and nothing scored before
    monkeypatch.setattr(evaluate, "add_run", lambda *_: pytest.fail("a run was scored"))
    assert "--reference names the row x" in script(evaluate.main, *ask, "x", code=1).error


def test_the_primary_pair_is_named_as_others_are_and_judged_alone():
    runs = ("a/lm-s0", "a/x-s0")
    assert settle(*runs, primary=("a/lm-s0", "lm-s0+x-s0")).primary == ("lm-s0", "lm-s0+x-s0")
    both = dict(primary=("lm", "x"), compare=[("lm", "x")])
    assert "the same pair among the others" in sentence(settle, *runs, **both)
    swept = dict(primary=("lm", "x"), exploratory=True)
    assert "--exploratory says nothing was" in sentence(settle, *runs, **swept)
    assert "--primary takes two rows" in sentence(settle, *runs, primary=("lm", "none"))
