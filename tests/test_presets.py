"""--preset: the settings that a search found are what a run is made with."""

import click
import pytest

import train_backbone
from delrec.backbone.presets import PRESETS
from delrec.runtime import load_run

OPTIONS = {param.name: param for param in train_backbone.main.params}
NAMES = sorted(PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_holds_flags_of_the_script_with_values_that_may_be_typed(name):
    ctx = click.Context(train_backbone.main)
    for flag, value in PRESETS[name].items():
        typed = OPTIONS[flag].type_cast_value(ctx, str(value))
        assert typed == value and type(typed) is type(value), flag


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_made_with_them_but_for_what_is_typed(name, cycle, train_on_cycle, tmp_path):
    wanted = PRESETS[name] | {"width": 16, "epochs": 1}
    typed = "--width 16 --epochs 1"
    if "text" in wanted:
        wanted, typed = wanted | {"text": "tfidf"}, typed + " --text tfidf"
    train_on_cycle(tmp_path / "run", f"--preset {name} {typed}")
    run = load_run(tmp_path / "run")
    assert {flag: getattr(run, flag) for flag in wanted} == wanted
    assert run.preset == name


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--model caser", "--preset beauty has the settings of --model sasrec, not of caser"),
        ("--text-graph .5", "leave one of the two out, or give --text-whiten 0"),
        ("--from somewhere", "leave --preset beauty out, or train from scratch without --from"),
    ],
)
def test_what_would_not_be_the_preset_is_refused(flags, sentence, cycle, refused, tmp_path):
    said = refused(
        train_backbone.main,
        f"--dataset {cycle.folder} --out {tmp_path / 'run'} --preset beauty {flags}",
    )
    assert sentence in said and not (tmp_path / "run").exists()
