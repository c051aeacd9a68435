"""recipes/backbones.py: the commands it gives, and the table it makes of real runs of them."""

import csv
import json
import threading
from dataclasses import replace
from statistics import mean

import pytest
from click.testing import CliRunner
from recipe_runs import script_mains

from delrec.backbone.models import MODELS as NETWORKS
from delrec.runtime import load_run
from recipes import backbones, backbones_table, table2
from recipes.backbones import MODELS, Asked, Model
from recipes.backbones_table import Line

FUSED = "+co-occurrence+title-similarity"
THREE_AT_MOST = ("bsarec", "sasrec-titles", "sasrec-permuted")


def made(*args, code=0):
    """What the command prints, or the sentence that it ends with."""
    done = CliRunner().invoke(backbones.main, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def trained(output):
    """{run: its command} of what a dry run printed."""
    lines = [line.split() for line in output.splitlines()[:-1]]
    return {line[line.index("--out") + 1]: line for line in lines}


# ---------------------------------------------------------------- commands only


def test_a_dry_run_lists_every_run_and_one_table_of_all():
    out = made("--dataset", "beauty", "--seeds", 5, "--dry-run")
    seeds = {model: 3 if model in THREE_AT_MOST else 5 for model in MODELS}
    assert [*MODELS] == [*NETWORKS, "sasrec-titles", "sasrec-permuted"]
    runs = [f"beauty/backbones/{model}-s{s}" for model in MODELS for s in range(seeds[model])]
    lines, mains = out.splitlines(), script_mains()
    assert sorted(trained(out)) == sorted(runs) and len(lines) == len(runs) + 1
    for line in lines:  # every flag exists, and its values are of the right kind
        _, program, *args = line.split()
        with mains[program].make_context(program, args) as context:
            assert context.params
    table = lines[-1].split()
    assert table[1] == "evaluate.py" and set(runs) < set(table)
    assert all(
        f"--fuse {run.split('/')[-1]}+co-occurrence title-similarity" in lines[-1] for run in runs
    )
    assert "--reference sasrec-s0" in lines[-1]
    assert "--compare sasrec-titles sasrec-permuted" in lines[-1]
    assert f"--compare esasrec{FUSED} sasrec{FUSED}" in lines[-1]


def test_titles_and_their_control_differ_by_whose_titles_they_are():
    runs = trained(made("--dataset", "beauty", "--seeds", 1, "--dry-run"))
    name = "beauty/backbones/sasrec-{}-s0".format
    titles, permuted = (runs[name(x)][:-1] for x in ("titles", "permuted"))
    assert [x for x in permuted if x != "--permute-text"] == titles
    assert titles[titles.index("--text") + 1] == "tfidf+minilm"


@pytest.mark.parametrize(
    "named", [["--models", "caser, gru4rec"], ["--models", "caser", "--models", "gru4rec"]]
)
def test_some_rows_are_compared_with_their_first(named):
    out = made("--dataset", "log", "--seeds", 2, *named, "--dry-run")
    assert set(trained(out)) == {
        f"log/backbones/{m}-s{s}" for m in ("caser", "gru4rec") for s in (0, 1)
    }
    assert "--reference gru4rec-s0" in out and f"--compare caser{FUSED} gru4rec{FUSED}" in out
    assert "sasrec" not in out


def test_a_row_that_is_none_is_one_sentence():
    assert "the rows are sasrec, gru4rec" in made("--models", "sasrec,slime", code=1)


# ---------------------------------------------------------------- run


@pytest.fixture
def small_rows(monkeypatch):
    """Plain SASRec, and one with the words of titles beside its control."""
    flags = {"sasrec": "", "sasrec-titles": "--text tfidf"}
    flags["sasrec-permuted"] = "--text tfidf --permute-text"
    rows = {name: Model(f"--model sasrec {own}") for name, own in flags.items()}
    monkeypatch.setattr(backbones, "MODELS", rows)


def test_every_row_is_trained_once_and_stands_in_one_table(here, toy, small_rows):
    args = ["--dataset", toy.folder, "--jobs", 1, "--seeds"]
    out = made(*args, 2)
    folder = here.root / "toy" / "backbones"
    assert len(here.ran) == 3 * 2 + 1
    assert not load_run(folder / "sasrec-titles-s1", toy).permute_text
    assert load_run(folder / "sasrec-permuted-s1", toy).permute_text
    table = json.loads((folder / "metrics.json").read_text())
    with open(folder / "backbones.csv", newline="") as f:
        rows = {row["row"]: row for row in csv.DictReader(f)}
    for name in backbones.MODELS:
        figures_are_those_of_metrics(rows[name], folder, table, [f"{name}-s0", f"{name}-s1"])
        assert rows[name]["seeds"] == "2"
    assert float(rows["chance"]["hr@1"]) == pytest.approx(1 / 15, abs=1e-6)
    assert rows["chance"]["minutes"] == "" and "published" not in rows["sasrec"]
    last = {x["name"]: x["value"] for x in last_rows(out)}
    assert last["hr@20.sasrec"] == pytest.approx(float(rows["sasrec"]["hr@20"]), abs=1e-4)
    assert (folder / "backbones.txt").read_text() in out
    titles_are_told_apart(table, (folder / "backbones.md").read_text())
    out = made(*args, 1)
    assert len(here.ran) == 8 and here.ran[-1][0] == "evaluate.py"  # the table only
    one = json.loads((folder / "metrics.json").read_text())["rows"]["sasrec-s0"]["hr@1"]
    assert {x["name"]: x["value"] for x in last_rows(out)}["hr@1.sasrec"] == round(one, 4)


def last_rows(output):
    """The rows of the JSON object that is printed last."""
    return json.loads(output.splitlines()[-1])["rows"]


def figures_are_those_of_metrics(row, folder, table, runs):
    """A row of the csv holds the means over its runs of what evaluate.py wrote."""
    full, near = table["full"], table["rows"]
    wanted = {key: mean(full[run][key] for run in runs) for key in ("hr@10", "hr@20", "ndcg@10")}
    wanted["ndcg@20"] = mean(full[run]["ndcg@20"] for run in runs)
    wanted["hr@1"] = mean(near[run]["hr@1"] for run in runs)
    wanted["fused"] = mean(near[run + FUSED]["hr@1"] for run in runs)
    beyond = table["beyond"]["rows"]
    wanted["coverage"] = mean(beyond[run]["coverage"] for run in runs)
    wanted["debiased"] = mean(beyond[run]["hr@10_debiased"] for run in runs)
    assert {key: float(row[key]) for key in wanted} == pytest.approx(wanted, abs=1e-6)
    name = runs[0].removesuffix("-s0")
    assert float(row["hr@1 deviation"]) == pytest.approx(table["seeds"][name]["hr@1"][1], abs=1e-6)
    assert int(float(row["parameters"])) > 1000 and float(row["ms"]) > 0
    seconds = mean(load_run(folder / run).seconds for run in runs)  # 0 on a fast machine
    assert float(row["minutes"]) == pytest.approx(seconds / 60, abs=0.01)


def titles_are_told_apart(table, text):
    """The planned pair was tested, and is said under the table."""
    test = table["planned"]["sasrec-titles - sasrec-permuted"]["hr@1"]
    assert f"sasrec-titles minus sasrec-permuted: HR@1 {test['difference']:+.3f}" in text
    assert f"sasrec-titles{FUSED} - sasrec{FUSED}" in table["planned"]
    assert table["seeds"]["sasrec-titles"]["against"] == "sasrec"


def test_two_trainings_run_side_by_side_each_in_a_place_of_its_own(monkeypatch):
    meet, seen = threading.Barrier(2), []

    def stage(folder, *args, jobs, job):
        meet.wait(60)  # passes only when two are at it
        seen.append((folder.name, jobs, job))

    monkeypatch.setattr(backbones, "stage", stage)
    asked = Asked("log", 2, ["sasrec", "caser"], jobs=2)
    backbones.train_all(asked)
    assert sorted(name for name, *_ in seen) == ["caser-s0", "caser-s1", "sasrec-s0", "sasrec-s1"]
    assert {jobs for _, jobs, _ in seen} == {2}
    assert sorted(job for *_, job in seen) == [0, 0, 1, 1]


# ---------------------------------------------------------------- the table


def beauty(toy, **changed):
    """The toy log under the name and the size of Amazon Beauty."""
    meta = toy.meta | {"split": changed.pop("split", "leave-one-out")}
    return replace(toy, **({"name": "beauty", "n_items": 12101} | changed), meta=meta)


def test_published_figures_stand_beside_the_rows_of_their_log_alone(toy):
    said = backbones_table.published(beauty(toy), "bsarec")
    assert said.startswith("HR@10 .1008, HR@20 .1373, NDCG@10 .0611, NDCG@20 .0703 (")
    assert "history masked" in said and "2312.10325" in said
    for other in ({"split": "temporal"}, {"n_items": 12102}, {"name": "toys"}):
        assert backbones_table.published(beauty(toy, **other), "bsarec") == ""
    assert backbones_table.published(beauty(toy), "caser") == ""
    # on ml-1m two papers have SASRec
    both = backbones_table.published(beauty(toy, name="ml-1m"), "sasrec")
    assert both.count("HR@10") == 2 and "; HR@10" in both


def test_every_published_row_is_a_row_of_this_table_or_of_table2(toy):
    with open(backbones_table.PUBLISHED, newline="") as f:
        rows = list(csv.DictReader(f))
    own = [row for row in rows if row["split"] == "leave-one-out"]
    others = [row for row in rows if row not in own]
    assert {row["row"] for row in own} <= set(MODELS)
    assert {row["row"] for row in others} <= {*table2.CONVENTIONAL, *table2.OF_LMS}
    # one of another protocol never stands beside ours as a figure of the same
    for row in others:
        of_ours = [x for x in own if (x["dataset"], x["row"]) == (row["dataset"], row["row"])]
        said = backbones_table.published(beauty(toy, name=row["dataset"]), row["row"])
        assert said.count("arXiv") == len(of_ours)
    assert all(row["source"] and row["protocol"] for row in rows)


def test_the_column_of_published_figures_is_there_where_one_is(tmp_path):
    lines = [Line("chance", 0, {"hr@1": 0.0667}), Line("bsarec", 3, {"hr@1": 0.5, "ms": 1.25})]
    without = backbones_table.grid_of(lines)
    lines[1].published = "HR@10 .1008 (somebody)"
    grid = backbones_table.grid_of(lines)
    assert grid[0][-1] == "published" and [row[:-1] for row in grid] == without
    assert [row[-1] for row in grid[1:]] == ["", "HR@10 .1008 (somebody)"]
    text = backbones_table.as_text(grid)
    assert text[2].endswith("1.25  HR@10 .1008 (somebody)")
    assert text[1].index(".067") == text[2].index(".500")  # each number under the other
    backbones_table.write_csv(tmp_path / "x.csv", lines)
    last = (tmp_path / "x.csv").read_text().splitlines()[-1]
    assert last.endswith(",HR@10 .1008 (somebody)")


def test_marks_are_those_of_the_tests(toy):
    test = {"p_adjusted": 0.001, "p_equal": 0.9}
    tests = {"hr@1": test, "hr@20": {"p_adjusted": 0.5, "p_equal": 0.01}}
    line = Line("caser", 3, {"hr@1": 0.4, "hr@20": 0.1, "ndcg@10": 0.05}, tests=tests)
    found = [backbones_table.for_reader(line, key) for key in ("hr@1", "hr@20", "ndcg@10", "ms")]
    assert found == [".400**", ".1000=", ".0500", ""]


@pytest.mark.parametrize("seeds", [1, 2])
def test_marks_of_one_seed_are_said_to_hold_of_these_models_alone(seeds):
    means = {"sasrec": {"seeds": 2}} if seeds > 1 else {}
    table = {"items": 60, "candidates": 15, "planned": {}, "seeds": means}
    said = " ".join(backbones_table.legend(table, [Line("sasrec", seeds, {})]))
    assert ("hold of these trained models alone" in said) == (seeds == 1)
    assert ("means over seeds" in said) == (seeds > 1)
