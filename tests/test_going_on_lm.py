"""finetune.py --from: stage 2 goes on from a run where the log has grown."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import adapter_of, edit_config, log_of, prompt_of
from safetensors.torch import load_file, save_file
from stopped_runs import same, stop_and_resume, stopped
from test_adalora import best_at
from toys import title_of
from tuning import stored_scores

import evaluate
import finetune
import train_backbone
from delrec import Recommender
from delrec.data.prepared import raw_item_ids
from delrec.evaluation.paper import paper_method
from delrec.lm import items, samples, warm_start
from delrec.lm.items import item_vectors
from delrec.runtime import load_run

SMALL = (
    "--history 5 --k 3 --batch 8 --micro 8 --samples 48 --evals 1 --val-samples 16 --init-r 4 "
    "--target-r 2 --prune-end .9 --alpha 8 --dropout 0 --lr .02 --warmup .1"
)
FORMS = {"titles": "--verbalizer mean --soft-prompt random --no-calibrate", "ids": "--input ids"}
STILL = "--lr 1e-7 --lr-maps 1e-7"
LAST, NOW = 36, 44  # items of last week, and with those of this week


def purchases(users, n_items, rng, begin=0):
    """Rows of 12 purchases each, by users whose names and items have raw ids of their own."""
    for user in users:
        for t, item in enumerate(rng.choice(n_items, 12, replace=False)):
            yield f"u{user}", f"sku-{7 * item % 100:02d}", begin + t


@pytest.fixture(scope="module")
def logs(make_data, tmp_path_factory):
    """(the log of last week, today's with more users and items)."""
    rng, place = np.random.default_rng(0), tmp_path_factory.mktemp("shop")
    last = list(purchases(range(30), LAST, rng))
    now = [*last, *purchases(range(30, 50), NOW, rng, 100)]
    titles = {f"sku-{7 * item % 100:02d}": title_of(item) for item in range(NOW)}
    made = []
    for n, rows in enumerate((last, now)):
        known = {item: titles[item] for _, item, _ in rows}
        made.append(make_data(place / str(n), rows, known, f"shop{n}"))
    return made


@pytest.fixture(scope="module")
def backbones(logs, run, tmp_path_factory):
    """(last week's SASRec, the one of today that went on from it)."""
    place = tmp_path_factory.mktemp("backbones")
    last, now = place / "last", place / "now"
    small = "--epochs 2 --patience 9 --batch 16"
    run(train_backbone.main, f"--dataset {logs[0].folder} --out {last} {small} --width 8")
    run(train_backbone.main, f"--dataset {logs[1].folder} --out {now} {small} --from {last}")
    return last, now


@pytest.fixture(scope="module")
def last_week(logs, backbones, decoder, run, fp32, tmp_path_factory):
    """{form of the input: the LM's run on last week's log}."""
    place, found = tmp_path_factory.mktemp("last"), {}
    for form, options in FORMS.items():
        found[form] = place / form
        flags = f"--dataset {logs[0].folder} --backbone {backbones[0]} --llm {decoder} {SMALL}"
        with fp32():
            run(finetune.main, f"{flags} {options} --out {found[form]}")
    return found


@pytest.fixture(scope="module")
def go_on(logs, backbones, last_week, run, fp32, tmp_path_factory):
    """go_on(form, "--flag value ..", week) -> (the new run's folder, click's result). week: whose
    data and backbone, 0 is last week's."""

    def tune(form, options="", week=1):
        out = tmp_path_factory.mktemp("on") / form
        flags = f"--dataset {logs[week].folder} --backbone {backbones[week]} --out {out}"
        with fp32():
            return out, run(finetune.main, f"{flags} --from {last_week[form]} {options}")

    return tune


@pytest.fixture(scope="module")
def today(go_on):
    """{form: (the run that went on today, click's result)}."""
    return {form: go_on(form) for form in FORMS}


@pytest.fixture
def refused_on(logs, backbones, last_week, refused, tmp_path):
    """refused_on("--flag value ..", ..) -> the sentence with which going on stops; nothing is left
    of it."""

    def refuse(options="", form="titles", start=None, week=1):
        flags = f"--dataset {logs[week].folder} --backbone {backbones[week]} --out {tmp_path}/x"
        says = refused(finetune.main, f"{flags} --from {start or last_week[form]} {options}")
        assert not list(tmp_path.glob("x*"))
        return says

    return refuse


def maps_of(folder):
    """The maps of item vectors that a run holds."""
    tensors = load_file(folder / "items.safetensors")
    return {name: t for name, t in tensors.items() if name != "E"}


def equal(tensors, others):
    return tensors.keys() == others.keys() and all(
        torch.equal(tensors[k], others[k]) for k in others
    )


# ---------------------------------------------------------------- where it begins


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_step_it_scores_as_the_run_does(form, go_on, last_week):
    start = last_week[form]
    out, said = go_on(form, STILL, week=0)
    asked, scores = stored_scores(start)
    asked_now, scores_now = stored_scores(out)
    assert load_run(out).best_step == 0 and len(asked) and (asked == asked_now).all()
    np.testing.assert_allclose(scores_now, scores, rtol=1e-4, atol=1e-5)
    assert np.ptp(scores) > 0.01
    assert equal(adapter_of(out), adapter_of(start))
    if form == "titles":
        assert torch.equal(prompt_of(out), prompt_of(start))
    else:
        assert equal(maps_of(out), maps_of(start))
    assert "note: the backbone" not in said.output  # it is the run's own


@pytest.mark.parametrize("form", FORMS)
def test_a_grown_log_has_more_items_under_other_numbers_and_the_adapter_learns_of_them(
    form, today, logs, last_week, backbones
):
    out, said = today[form]
    was, now = (raw_item_ids(data) for data in logs)
    assert len(was) < len(now) and was[1:9] != now[1:9]
    assert f"{len(was) - 1} of {len(now) - 1} items were there when it was trained" in said.output
    assert f"{len(now) - len(was)} are new" in said.output
    shapes = {name: w.shape for name, w in adapter_of(last_week[form]).items()}
    assert {name: w.shape for name, w in adapter_of(out).items()} == shapes
    assert load_run(out).rank == [8, 8] and "ranks stay 8" in said.output
    assert [line["step"] for line in log_of(out) if "val_hr@1" in line] == [0, 6]
    if form == "ids":
        E = load_file(out / "items.safetensors")["E"]
        assert torch.equal(E, item_vectors(backbones[1], len(now) - 1))
    else:
        assert torch.equal(prompt_of(out), prompt_of(last_week[form]))


@pytest.mark.parametrize("form", FORMS)
def test_what_went_on_answers_for_new_items_and_stands_in_a_table(
    form, today, logs, run, on_cpu, tmp_path
):
    out = shutil.copytree(today[form][0], tmp_path / form)
    raw = raw_item_ids(logs[1])
    new = next(i for i, name in enumerate(raw) if name and name not in raw_item_ids(logs[0]))
    assert len(Recommender.load(out).recommend(ids=[raw[new]], top=5).items) == 5
    run(evaluate.main, f"--ckpt {out} --limit 10 --val-samples 10")
    assert f"went on from {form}" in (out / "evaluation" / "table.txt").read_text()
    assert paper_method(load_run(out)) is None  # DELRec's tables have nothing like it


@pytest.mark.parametrize("form", FORMS)
def test_its_card_says_the_commands_of_both_logs(form, today, logs, run, on_cpu, tmp_path):
    out = shutil.copytree(today[form][0], tmp_path / form)
    run(evaluate.main, f"--ckpt {out} --card")
    text = (out / "README.md").read_text().split("## Commands that made it\n\n```\n")[1]
    lines = text.split("```")[0].replace("\\\n", " ").splitlines()
    earlier = f"# on an earlier log, whose preparation has the hash {logs[0].meta['hash']}:"
    assert [line.split()[1] for line in lines] == [
        *("on", "train_backbone.py", "finetune.py", "data/prepare.py", "train_backbone.py"),
        *("finetune.py", "evaluate.py"),
    ]
    assert lines[0] == earlier and "--from last" in lines[4]
    params = finetune.main.make_context("finetune.py", lines[5].split()[2:]).params
    config = json.loads((out / "config.json").read_text())
    unlike = {key for key, value in params.items() if config[key] != value}
    fixed = {"verbalizer", "calibrate"} if form == "ids" else set()
    assert unlike <= {"dataset", "out", "llm", "backbone", "from_run", "soft_prompt"} | fixed
    assert params["from_run"] == form and params["soft_prompt"] is None


# ---------------------------------------------------------------- what it learns


def test_every_validation_may_be_the_best_and_training_moves_all_that_trains(
    go_on, last_week, monkeypatch
):
    monkeypatch.setattr(samples.Validation, "ask", best_at(2))
    out, _ = go_on("ids", "--evals 4")
    assert [line["step"] for line in log_of(out) if "val_hr@1" in line] == [0, 2, 4, 6]
    assert load_run(out).best_step == 2  # the run's own ranks were final after step 5
    then, now = adapter_of(last_week["ids"]), adapter_of(out)
    assert all(not torch.equal(then[name], now[name]) for name in then if then[name].numel())
    assert not equal(maps_of(last_week["ids"]), maps_of(out))


def test_settings_come_from_the_run_unless_something_else_is_typed(
    go_on, today, last_week, tmp_path
):
    on, start = load_run(today["titles"][0]), load_run(last_week["titles"])
    of_prompts, of_training = ["history", "verbalizer", "k"], ["init_r", "alpha", "batch", "lr"]
    for flag in (*of_prompts, *of_training, "warmup", "samples"):
        assert getattr(on, flag) == getattr(start, flag)
    assert on.calibrate is False and on.soft_prompt == "random"
    assert on.from_run == str(last_week["titles"]) and on.llm == start.llm
    # a prompt that stage 1 made stays where it is; the run's own copy of it is what counts
    start = shutil.copytree(today["titles"][0], tmp_path / "start")  # which went on itself
    edit_config(start, soft_prompt="/not/here/any/more")
    typed = f"--batch 16 --lr .001 --dropout .2 --calibrate --evals 2 --from {start}"
    other = load_run(go_on("titles", typed)[0])
    assert other.soft_prompt == "/not/here/any/more"
    assert torch.equal(prompt_of(other.folder), prompt_of(start))
    assert (other.batch, other.lr, other.dropout, other.calibrate) == (16, 0.001, 0.2, True)
    config = (other.folder / "adapter" / "adapter_config.json").read_text()
    assert '"lora_dropout": 0.2' in config


# ---------------------------------------------------------------- resume


@pytest.fixture
def job(logs, backbones, last_week, tmp_path, on_cpu):
    """Going on from a copy of last week's run, as stopped_runs stops it: .jobs, and the copy."""
    start = shutil.copytree(last_week["titles"], tmp_path / "start")

    def args(out, *more):
        places = ["--dataset", logs[1].folder, "--backbone", backbones[1], "--from", start]
        return [*map(str, [*places, "--out", out, "--checkpoint-every", 1]), *more]

    return SimpleNamespace(jobs={"finetune": (finetune.main, args)}, start=start, args=args)


def test_a_stopped_run_that_goes_on_is_continued_as_if_nothing_had_happened(
    job, today, tmp_path, monkeypatch
):
    assert same(stop_and_resume(job.jobs, "finetune", tmp_path, monkeypatch, 3), today["titles"][0])


def test_a_stopped_run_is_not_continued_from_another_adapter(job, tmp_path, monkeypatch, script):
    assert stopped(job.jobs, "finetune", tmp_path / "x", monkeypatch)
    path = job.start / "adapter" / "adapter_model.safetensors"
    save_file({name: w + 1 for name, w in load_file(path).items()}, path)
    says = script(finetune.main, *job.args(tmp_path / "x", "--resume"), code=1).error
    assert "adapter was" in says


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, says",
    [
        ("--llm smollm2-135m", "--llm smollm2-135m was given, but .* has --llm .*tiny-llama"),
        ("--input hybrid", "--input hybrid was given, but .* has --input titles, which --from"),
        ("--history 9", "--history 9 was given, but .* has --history 5"),
        ("--verbalizer first", "--verbalizer first was given, but .* has --verbalizer mean"),
        ("--show", "--show was given, but .* has --no-show, .* leave --show out"),
        ("--target-r 3", "--target-r 3 was given, but .* has --target-r 2"),
        ("--adapt all", "--adapt all was given, but .* has --adapt qv"),
        ("--soft-prompt none", "--soft-prompt and --from were given.*its own soft prompt stays"),
        ("--maps some/run", "--maps and --from were given.*its own maps train on"),
        ("--teacher some/run", "--teacher and --from were given"),
        ("--kd some/run", "--kd and --from were given.*no teachers help it"),
        ("--layers 1", "--layers and --from were given"),
        ("--lambda-ms .1", "--lambda-ms and --from were given"),
        ("--without-fold 0", "--without-fold and --from were given.*learnt of all users"),
        ("--residual backbone", "--residual and --from were given.*a backbone that went on has no"),
        ("--keep-rps .3", "--keep-rps and --from were given.*went on has no folds"),
        ("--paper", "--paper and --from were given.*its own choices stay"),
        ("--samples 4", "--samples 4 are not a step of --batch 8"),
        ("--from nothing/here", "nothing/here is no run folder"),
        ("--backbone nothing/here --from {backbone}", "train_backbone run, expected one of: fine"),
        ("--backbone {backbone}", "trained on another preparation .*train_backbone.py .*--from"),
    ],
)
def test_what_going_on_cannot_change_is_one_sentence(options, says, refused_on, backbones):
    assert re.search(says, refused_on(options.format(backbone=backbones[0])))


def test_a_run_older_than_a_flag_was_made_with_its_default(refused_on, last_week, tmp_path):
    start = shutil.copytree(last_week["titles"], tmp_path / "old")
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({k: config[k] for k in config if k != "orders"}))
    assert re.search(
        "--orders 2 was given, .* has --orders 1", refused_on("--orders 2", "titles", start)
    )


@pytest.mark.parametrize(
    "made, says",
    [
        ({"teacher": "some/run"}, "was trained with --teacher, and --from cannot"),
        ({"layers": 1}, "was trained with --layers"),
        ({"adapt": "all"}, "was trained with --adapt all"),
        ({"lambda_ms": 0.1}, "was trained with --lambda-ms"),
        ({"without_fold": [1]}, "was trained with --without-fold"),
        ({"residual": "backbone"}, "was trained with --residual"),
        ({"data_hash": "0123456789abcdef"}, "another preparation"),
        ({"prompt_words": {"noun": "tea", "verb": "drank"}}, "prompts of 'tea' and 'drank'"),
        ({"llm_fingerprint": "0123456789abcdef"}, "was trained on another LM"),
    ],
)
def test_a_run_that_cannot_be_gone_on_from_is_one_sentence(
    made, says, last_week, refused_on, tmp_path, on_cpu
):
    start = shutil.copytree(last_week["titles"], tmp_path / "start")
    assert says in refused_on(start=edit_config(start, **made))


def test_a_run_that_lacks_a_part_is_refused(last_week, refused_on, tmp_path):
    for form, part in (
        ("titles", "adapter/adapter_model.safetensors"),
        ("titles", "soft_prompt.safetensors"),
        ("ids", "items.safetensors"),
        ("ids", "config.json"),
    ):
        start = shutil.copytree(last_week[form], tmp_path / f"start-{part[:4]}")
        (start / part).unlink()
        says = "is an unfinished run" if part == "config.json" else f"lacks {part}"
        assert says in refused_on(start=start)


def test_the_log_of_another_shop_is_refused(logs, make_data, refused_on, tmp_path):
    rows = list(purchases(range(30), LAST, np.random.default_rng(1)))
    titles = {item: f"Tea {item}" for _, item, _ in rows}
    tea = make_data(tmp_path / "tea", rows, titles, "tea")
    options = f"--dataset {tea.folder} --backbone nothing/here"
    assert "so this is another log" in refused_on(options)


# ---------------------------------------------------------------- the backbone's vectors


@pytest.fixture
def backbone_now(backbones, tmp_path):
    """backbone_now(name, **changes): a copy of today's backbone that says something else of itself
    in its config.json."""
    return lambda name, **changes: edit_config(
        shutil.copytree(backbones[1], tmp_path / name), **changes
    )


def test_a_backbone_that_went_on_from_another_one_is_said_where_its_vectors_are_read(
    today, last_week, logs, backbones, backbone_now, tmp_path
):
    assert "note: the backbone" not in today["ids"][1].output
    loop, run = tmp_path / "loop", load_run(last_week["ids"])
    for folder, is_said in (
        (backbone_now("scratch", from_run=None), True),
        (backbone_now("of-scratch", from_run=str(tmp_path / "scratch")), True),
        (backbone_now("loop", from_run=str(loop)), True),  # it has taken that one's place
        (backbone_now("again", from_run=str(backbones[1])), False),
        (backbone_now("gone", from_run="/not/here/any/more"), False),
    ):
        cfg = SimpleNamespace(backbone=folder, input="ids", dataset="shop1")
        note = warm_start.note_on_backbone(run, cfg, logs[1])
        assert (f"{folder} did not go on from {backbones[0]}" in note) == is_said
        cfg.input = "titles"
        assert warm_start.note_on_backbone(run, cfg, logs[1]) == ""


def test_a_backbone_of_another_kind_or_width_is_refused(backbone_now, refused_on, on_cpu):
    says = refused_on(f"--backbone {backbone_now('caser', model='caser')}")
    assert "was trained with SASRec, the backbone" in says and "is Caser; make another" in says
    wide = backbone_now("wide")
    tensors = load_file(wide / "model.safetensors")
    tensors["item.weight"] = torch.cat([tensors["item.weight"]] * 2, 1)
    save_file(tensors, wide / "model.safetensors")
    says = refused_on(f"--backbone {wide}", "ids")
    assert "reads item vectors of width 9, those of the backbone now are 17 wide" in says


def test_vectors_beside_titles_are_shown_from_the_first_step_to_a_run_that_has_met_them(logs):
    cfg = SimpleNamespace(without_fold=None, order="shuffled", seed=0, input="hybrid")
    vars(cfg).update(hint="none", pool="stored", draw="uniform")
    for from_run, alone in ((None, True), ("some/run", False)):
        cfg.from_run = from_run
        cfg.curriculum = items.defaults(cfg).get("curriculum")
        assert samples.Histories(cfg, logs[0], "", 4).alone(np.array([0]))[0] == alone
