"""delrec/places.py: a project that is copied, moved or mounted reads and writes only itself."""

import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from scripts import ROOT, sentence
from toys import popular, write_backbone

import evaluate
from delrec import places, runtime
from delrec.backbone.text import names_of
from delrec.data.prepared import load_data, load_data_of
from delrec.evaluation.rows import find_backbone
from delrec.lm.listed import backbone_of
from delrec.lm.lists import read_lists
from delrec.lm.model import located
from delrec.lm.soft_prompt import prompt_run_of
from delrec.processes import Ranks
from delrec.runtime import (
    as_kept,
    config_of_run,
    folder_of,
    load_run,
    place_of_new,
    read_json,
    write_json,
)
from delrec.training import checkpoints
from delrec.training.run_folders import finish_run, start_run

RUN = {"stage": "finetune", "dataset": "toy", "data_hash": "0"}


@pytest.fixture
def project(toy, tmp_path, monkeypatch):
    """The root of a project with data, an LM and finished runs; the program stands elsewhere."""
    monkeypatch.setattr(runtime, "ROOT", tmp_path / "program")
    root = tmp_path / "A+1"  # the sign that joins sources of text
    shutil.copytree(toy.folder, root / "data" / "toy")
    (root / "models" / "llama").mkdir(parents=True)
    data = load_data(str(root / "data" / "toy"))
    for name in ("sasrec", "prompt", "teacher"):
        write_backbone(root / "runs" / "toy" / name, data, popular(data))
    return root


def record_in(root, **more):
    """What a run of stage 2 in a project notes about itself."""
    runs = root / "runs" / "toy"
    return RUN | {
        "data_folder": str(root / "data" / "toy"),
        "data_hash": read_json(root / "data" / "toy" / "meta.json")["hash"],
        "soft_prompt": str(runs / "prompt"),
        "teacher": str(runs / "teacher"),
        "kd": [str(runs / "teacher"), "co-occurrence"],
        "maps": str(runs / "prompt"),
        "text": f"tfidf+{runs / 'teacher'}",
        "llm": str(root / "models" / "llama"),
        "llm_from": f"random-3:{root / 'models' / 'llama'}",
        "out": str(runs / "delrec"),
        "settings": {"backbone": "SASRec", "backbone_run": str(runs / "sasrec")},
        "backbone_run": str(runs / "sasrec"),
        **more,
    }


def written(root, record):
    """The folder of the run runs/toy/delrec of a project, with a configuration as it is."""
    folder = root / "runs" / "toy" / "delrec"
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", record)
    return folder


def test_a_configuration_keeps_what_is_inside_the_root_relative_to_it(project):
    folder = project / "runs" / "toy" / "delrec"
    record = record_in(project, llm="google/flan-t5-xl", soft_prompt="none", seed=3)
    kept = as_kept(record, folder)
    assert list(kept) == list(record)  # the order of the keys stays
    assert kept == record | {
        "data_folder": "data/toy",
        "teacher": "runs/toy/teacher",
        "kd": ["runs/toy/teacher", "co-occurrence"],
        "maps": "runs/toy/prompt",
        "text": "tfidf+runs/toy/teacher",
        "llm_from": "random-3:./models/llama",
        "out": "runs/toy/delrec",
        "settings": {"backbone": "SASRec", "backbone_run": "runs/toy/sasrec"},
        "backbone_run": "runs/toy/sasrec",
    }
    assert record["data_folder"] == str(project / "data" / "toy")  # what the command goes on with


def test_what_is_outside_of_the_root_is_kept_by_its_whole_path(project, tmp_path):
    record = {"llm": str(tmp_path / "models" / "llama"), "backbone_run": str(tmp_path / "sasrec")}
    assert as_kept(record, project / "runs" / "toy" / "delrec") == record


def test_a_run_s_name_means_the_run_that_it_meant_when_it_was_typed(project, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", project)
    typed = {"teacher": "toy/teacher", "soft_prompt": "random", "llm": "gpt2", "backbone": "SASRec"}
    kept = as_kept(typed, project / "runs" / "toy" / "delrec")
    assert kept == typed | {"teacher": "runs/toy/teacher"}


def test_a_name_with_a_plus_that_stands_is_one_source_of_text(project, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", project)
    (project / "runs" / "toy" / "teacher").rename(project / "runs" / "toy" / "a+b")
    assert names_of("tfidf+toy/a+b+toy/sasrec") == ["tfidf", "toy/a+b", "toy/sasrec"]
    assert names_of("toy/a+toy/b") == ["toy/a", "toy/b"] and names_of("tfidf+") == ["tfidf", ""]
    folder = project / "runs" / "toy" / "delrec"
    kept = as_kept({"text": "tfidf+toy/a+b"}, folder)
    assert kept == {"text": "tfidf+runs/toy/a+b"}
    found = load_run(written(project, RUN | kept)).text
    assert names_of(found) == ["tfidf", str(project / "runs" / "toy" / "a+b")]


@pytest.mark.parametrize("gone", [True, False], ids=["moved", "copied"])
def test_a_moved_or_copied_run_finds_everything_in_its_own_root(project, tmp_path, gone):
    record = record_in(project)
    folder = written(project, as_kept(record, project / "runs/toy/delrec"))
    copy = tmp_path / "B" / "inner"
    (shutil.move if gone else shutil.copytree)(project, copy)
    run = load_run(copy / folder.relative_to(project))
    assert vars(run) == record_in(copy, folder=run.folder)
    assert load_data_of(run).folder == copy / "data" / "toy"


def test_the_nearest_runs_folder_names_the_root(tmp_path):
    own = tmp_path / "runs" / "program"
    assert places.root_of(own / "runs" / "toy" / "x", own) == own
    assert places.root_of(own / "elsewhere" / "x", own) == own  # below a folder called runs
    assert places.root_of(tmp_path / "b" / "runs" / "toy" / "x", own) == tmp_path / "b"
    assert places.root_of("/tmp/x", own) == own


def test_a_run_that_was_killed_goes_on_in_another_place(project, tmp_path):
    data, ranks = load_data(str(project / "data" / "toy")), Ranks(0, 1, None)

    def saver(root, lm="abcd", name="llama"):
        cfg = SimpleNamespace(llm=str(root / "models" / name), seed=0, k=3)
        made = checkpoints.made_with(cfg, data, ranks, lm)
        return checkpoints.Saver(root / "runs" / "toy" / "x.unfinished", 0, made, ranks)

    first, copy = saver(project), tmp_path / "B"
    assert first.made["llm"] == "./models/llama"
    was = {"form": checkpoints.FORM, "made_with": first.made}
    saver(copy).must_continue(was)
    assert "llm was" in sentence(saver(copy, name="gpt2").must_continue, was)
    assert "lm was abcd" in sentence(saver(copy, lm="another").must_continue, was)


def test_a_finished_run_says_where_it_stands_and_its_record_stays_whole(project, alone):
    data, folder = load_data(str(project / "data" / "toy")), project / "runs" / "toy" / "new"
    cfg = SimpleNamespace(seed=1, out=None, resume=False, lr=0.1)
    new, record = start_run(folder, "train_backbone", cfg, data, alone)
    assert read_json(new / "started.json")["data_folder"] == "data/toy"
    assert finish_run(folder, record)["data_folder"] == str(data.folder)
    config = read_json(folder / "config.json")
    assert config["out"] == "runs/toy/new" and config["data_folder"] == "data/toy"
    assert list(config)[:6] == ["stage", "seed", "out", "resume", "lr", "dataset"]
    assert config_of_run(folder)["out"] == str(folder)


def test_an_lm_that_is_a_run_is_stored_by_its_whole_path(project, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "ROOT", project)
    run = project / "runs" / "toy" / "teacher"
    (run / "adapter").mkdir()
    assert located("toy/teacher") == str(run.resolve())
    assert located("gpt2") == "gpt2"
    monkeypatch.chdir(tmp_path)
    assert folder_of("runs", "A+1/runs/toy/sasrec") == project / "runs" / "toy" / "sasrec"


def test_a_run_that_nobody_named_is_of_the_project_that_is_asked(
    project, toy, alone, tmp_path, monkeypatch
):
    """Copies of a project as the program and as the current folder, too: none is refused."""
    program, here = runtime.ROOT, tmp_path / "here"
    for copy in (program, here):
        shutil.copytree(project, copy)
    monkeypatch.chdir(here)
    own, data = project / "runs" / "toy", load_data(str(project / "data" / "toy"))
    assert read_lists(None, data, "").folder == own / "sasrec"
    assert backbone_of(None, data) == ("SASRec", own / "sasrec")
    cfg = SimpleNamespace(soft_prompt=None)
    assert sentence(prompt_run_of, cfg, data).startswith(f"{own / 'prompt'} holds a train_backbone")
    lm = SimpleNamespace(stage="lm", folder=own / "lm")  # a plain one, which has no backbone
    for of_run in (data, toy):  # toy stands in no root
        assert find_backbone([lm], of_run, alone).folder == own / "sasrec"
    for root in (program, here):
        assert read_lists(None, toy, "").folder == root / "runs" / "toy" / "sasrec"
        shutil.rmtree(root / "runs")
    assert f"no backbone in {program / 'runs' / 'toy' / 'sasrec'}; train" in sentence(
        read_lists, None, toy, ""
    )


def test_a_folder_of_something_else_hides_no_data_and_no_run(project, monkeypatch, tmp_path):
    """Raw files in ./toy and ./shop, a table in ./toy/sasrec: what the commands made is meant."""
    monkeypatch.setattr(runtime, "ROOT", project)
    raw = tmp_path / "work"
    for name in ("toy/sasrec", "toy/plots", "shop", "lone"):
        (raw / name).mkdir(parents=True)
    monkeypatch.chdir(raw)
    run = project / "runs" / "toy" / "sasrec"
    shutil.copytree(run, project / "runs" / "lone")
    assert load_data("toy").folder == project / "data" / "toy"
    assert load_run("toy/sasrec").folder == run
    assert load_run("lone").folder == project / "runs" / "lone"
    assert place_of_new("runs", "toy/sasrec") == run
    assert place_of_new("runs", "lone") == project / "runs" / "lone"
    # nothing was made under that name: a name with a slash is the folder, a bare one is not
    assert place_of_new("runs", "toy/plots") == folder_of("runs", "toy/plots") == raw / "toy/plots"
    assert f"no prepared data set in {project / 'data' / 'shop'}" in sentence(load_data, "shop")
    # what was made in the current folder is meant first
    shutil.copytree(run, raw / "mine")
    shutil.copytree(project / "data" / "toy", raw / "shop", dirs_exist_ok=True)
    assert load_run("mine").folder == raw / "mine" == place_of_new("runs", "mine")
    assert load_data("shop").folder == raw / "shop"


def test_the_evaluation_of_a_copy_changes_nothing_of_the_original(project, tmp_path, on_cpu):
    """By the script itself, from another place."""
    copy = tmp_path / "B"
    shutil.copytree(project, copy)
    before = {p: p.stat().st_mtime_ns for p in project.rglob("*")}
    args = ["--ckpt", str(copy / "runs" / "toy" / "sasrec"), "--limit", "9"]
    done = CliRunner().invoke(evaluate.main, args)
    assert done.exit_code == 0, done.output
    assert (copy / "runs" / "toy" / "sasrec" / "evaluation" / "metrics.json").exists()
    assert {p: p.stat().st_mtime_ns for p in project.rglob("*")} == before
    assert ROOT != runtime.ROOT  # the program stands elsewhere
