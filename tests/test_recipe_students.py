"""recipes/students.py: small LMs of each depth, and what conventional models learn from them."""

import json
from types import SimpleNamespace

import pytest
from click import ClickException
from pictures import drawing
from recipe_runs import run_recipe

from delrec.runtime import load_run
from recipes import students


@pytest.fixture
def on_decoder(toy, decoder):
    """The data set and the LM of a recipe."""
    return ["--dataset", toy.folder, "--llm", decoder]


@pytest.mark.long
def test_layers_is_a_table_and_a_figure_of_each_depth(here, on_decoder):
    args = ["--seeds", 1, "--budget", "80", "--test-samples", "20", "--jobs", "1"]
    with drawing():
        out = run_recipe("layers", *on_decoder, *args)
    folder = here.root / "toy" / "tiny-llama-ids-80" / "layers"
    rows = json.loads((folder / "metrics.json").read_text())["rows"]
    line = next(x for x in out.splitlines() if x.startswith("2  "))
    alone, maps, taught = (rows[f"{how}-2-s0"]["hr@1"] for how in ("alone", "maps", "taught"))
    shown = [f"{alone:.4f}", f"{maps:.4f}", f"{taught:.4f}{taught - maps:+.4f}"]
    assert line.split()[1:4] == shown
    assert (folder / "layers.txt").read_text().strip() in out
    assert (folder / "layers.png").stat().st_size > 5000


@pytest.mark.parametrize("found", [("decoder", 5), ("encoder", 4)])
def test_layers_of_an_lm_that_cannot_be_cut_in_two_are_refused_at_once(found, monkeypatch):
    monkeypatch.setattr(students, "kind_and_layers", lambda _: found)
    monkeypatch.setattr(students, "each_seed", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(ClickException, match="an even number"):
        students.layers(SimpleNamespace(llm="some-lm"))


@pytest.mark.long
def test_students_learn_out_of_fold_and_each_is_compared_with_itself(here, toy, on_decoder):
    args = ["--seeds", 1, "--budget", "80", "--test-samples", "20", "--jobs", "1", "--folds", 2]
    run_recipe("students", *on_decoder, *args)
    home = here.root / "toy" / "tiny-llama-ids-80"
    found = json.loads((home / "students" / "metrics.json").read_text())
    for student in ("gru4rec", "sasrec", "dros"):
        assert load_run(home / f"{student}-taught-s0", toy).teacher_out_of_fold
        taught, alone, bags = (f"{student}{end}-s0" for end in ("-taught", "", "-bags"))
        assert {f"{taught} - {alone}", f"{taught} - {bags}"} <= set(found["planned"])
    dros = load_run(here.root / "toy" / "dros-s0", toy)
    assert dros.dros == 0.5 and dros.loss == "bce" and not dros.folds


def test_parts_teaches_both_students_out_of_fold(here, toy, on_decoder, monkeypatch):
    kept = {row: students.PARTS[row] for row in ("lists", "permuted", "both")}
    monkeypatch.setattr(students, "PARTS", kept)
    args = ["--seeds", 1, "--budget", "80", "--test-samples", "20", "--jobs", "1", "--folds", 2]
    run_recipe("parts", *on_decoder, *args)
    home = here.root / "toy" / "tiny-llama-ids-80"
    for student in ("sasrec", "caser"):
        rows = json.loads((home / f"parts-{student}" / "metrics.json").read_text())["rows"]
        wanted = [student, *(f"{student}-{row}" for row in (*kept, "in-sample"))]
        assert {f"{name}-s0" for name in wanted} <= set(rows)
        assert load_run(home / f"{student}-lists-s0", toy).teacher_out_of_fold
        assert not load_run(home / f"{student}-in-sample-s0", toy).teacher_out_of_fold
    assert [load_run(home / f"small-f{f}-s0").without_fold for f in (0, 1)] == [[0], [1]]
