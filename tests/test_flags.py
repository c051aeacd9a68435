"""A flag that a sentence suggests is a flag of the script that says it, or of the one it names."""

import importlib

import click
import pytest
from sentences import SCRIPTS, Sources, flags_said, options_of, sentences_of

from delrec.ranges import Number


@pytest.fixture(scope="module")
def sources():
    return Sources()


# they choose their words by whether the script has --resume: see the test below
CHOOSE = ("delrec.no_run", "delrec.training.claims", "delrec.training.run_folders")


def wrong_flags(sources, script):
    """[(where, flag, sentence)] of the flags that do not exist where a sentence suggests them."""
    own, seen = options_of(script), 0
    options = {name: options_of(name) for name in SCRIPTS}
    for module, name in sorted(sources.reached_from((SCRIPTS[script], "main"))):
        for tree in sources.code[module, name]:
            for text in sentences_of(tree):
                for flag, named in flags_said(text):
                    seen += 1
                    chosen = flag == "--resume" and module in CHOOSE
                    if not chosen and flag not in (options[named] if named else own):
                        yield f"{module}.{name}", flag, text
    assert seen > 3, f"hardly a flag was found in what {script} says"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_flag_that_a_sentence_suggests_exists_in_that_script(sources, script):
    wrong = list(wrong_flags(sources, script))
    assert not wrong, "\n".join(f"{where} suggests {flag}: {text}" for where, flag, text in wrong)


def test_the_sentences_of_what_a_script_calls_are_found(sources):
    reached = sources.reached_from(("evaluate", "main"))
    assert ("delrec.training.claims", "in_the_way") in reached  # by common.enter of other scripts
    assert ("delrec.serving.ranking", "pool_chooser") in reached
    assert ("delrec.lm.slmrec", "settle_by_teacher") not in reached


@pytest.mark.parametrize(
    "text, found",
    [
        ("raise --lr", [("--lr", None)]),
        ("python train_backbone.py --folds 5", [("--folds", "train_backbone.py")]),
        ("train it with distill.py, or leave --k out", [("--k", None)]),
        ("finetune.py (--out {})", [("--out", None)]),
    ],
)
def test_a_flag_belongs_to_the_command_it_stands_in(text, found):
    assert list(flags_said(text)) == found


COMMANDS = ["train_backbone", "distill", "finetune", "evaluate", "delrec.data.prepare"]
COMMANDS += ["recipes.new_items", "recipes.mlp", "recipes.tune"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_number_of_the_command_line_is_finite_and_has_a_range(name):
    main = importlib.import_module(name).main
    for param in main.params:
        if isinstance(param.type, click.types.FloatParamType):
            assert isinstance(param.type, Number), param.name
            for value in ("nan", "inf"):
                with pytest.raises(click.BadParameter, match="is no number|not in the range"):
                    param.type.convert(value, param, click.Context(main))
