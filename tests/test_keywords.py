"""keywords.py: what a command line says, in the words of Python."""

import pytest

from delrec.serving.keywords import in_calls, in_keywords, in_names_of_fit

SWITCHES = {"overwrite", "offset", "keep-seen"}


@pytest.mark.parametrize(
    "said, python",
    [
        (
            "--overwrite begins anew, --seed another",
            "overwrite=True begins anew, seed= another",
        ),
        ("or leave it out with --no-offset", "or leave it out with offset=False"),
        (
            "--batch 96 is odd; or give --pool 0 (slower)",
            "batch=96 is odd; or give pool=0 (slower)",
        ),
        ("say it: --time-format '%d/%m/%Y'", "say it: time_format='%d/%m/%Y'"),
        ("train_backbone.py: --lam does nothing", "train_backbone.py: lam= does nothing"),
        ("not shown (--keep-seen shows them)", "not shown (keep_seen=True shows them)"),
        # what the shell is to run stays
        ("(evaluate.py --card), or --dataset", "(evaluate.py --card), or dataset="),
        (
            "train it: python train_backbone.py --dataset a",
            "train it: python train_backbone.py --dataset a",
        ),
        ("a - b -- c, well-known--so", "a - b -- c, well-known--so"),
    ],
)
def test_flags_are_keywords(said, python):
    assert in_keywords(said, SWITCHES) == python


@pytest.mark.parametrize(
    "said, python",
    [
        ("--out names another folder", "name= names another folder"),
        ("remove it or give another --out", "remove it or give another name="),
        ("--out /a/data/shop-files puts this beside", 'name="shop-files" puts this beside'),
        (
            """--out '/a b/data/it'"'"'s-files' puts this beside""",
            'name="it\'s-files" puts this beside',
        ),
        ("give it with --raw instead", "give it with interactions= and no items= instead"),
        ("use --dataset data/shop@1a", "use train_backbone.py --dataset data/shop@1a"),
        (
            "train it: python train_backbone.py --out a",
            "train it: python train_backbone.py --out a",
        ),
        ("--outer --raw-x a--out", "--outer --raw-x a--out"),
    ],
)
def test_what_fit_gives_itself_is_called_as_fit_calls_it(said, python):
    assert in_names_of_fit(said) == python
    assert not {"out=", "raw=", "dataset="} & set(in_keywords(python, SWITCHES).split())


@pytest.mark.parametrize(
    "command, call",
    [
        ("shop --interactions a.csv --out data/shop --core 1", "core=1"),
        ("shop --interactions b.csv --items i.csv", 'interactions="b.csv", items="i.csv"'),
        (
            "shop --interactions a.csv --item-column 'article no' --overwrite",
            'item_column="article no", overwrite=True',
        ),
        ("""shop --interactions a.csv --title-column 'it'"'"'s'""", 'title_column="it\'s"'),
        ("shop --interactions a.csv --time-column COLUMN", 'time_column="COLUMN"'),
    ],
)
def test_a_command_is_a_call(command, call):
    said = f"name yours: python data/prepare.py {command}; or, if not, --core 2 and more"
    called = f"name yours: Recommender.fit(.., {call}); or, if not, --core 2 and more"
    assert in_calls(said, {"interactions": "a.csv"}, SWITCHES) == called


def test_a_command_ends_where_its_sentence_goes_on():
    said = "replace it with python train_backbone.py --dataset a --overwrite and its other flags"
    assert in_calls(said, {}, SWITCHES) == (
        "replace it with Recommender.fit(.., overwrite=True) and its other flags"
    )
