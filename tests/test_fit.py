"""Recommender.fit: from frames or paths to a recommender, written under the current folder."""

from datetime import datetime
from functools import partial

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

import common
import train_backbone
from delrec import Recommender
from delrec.data import prepare
from delrec.runtime import ROOT
from delrec.serving import fitting

ROWS = [(f"c{u}", f"a{(u * 7 + n) % 30:02d}", 10 * n + u) for u in range(20) for n in range(10)]
ITEMS = [(f"a{i:02d}", f"Article {i}", "tea" if i % 2 else "cup") for i in range(30)]
LOG = pl.DataFrame(ROWS, ["user", "item", "timestamp"], orient="row")
ARTICLES = pl.DataFrame(ITEMS, ["item", "title", "category"], orient="row")


class Pandas:
    """What fit uses of a pandas frame; pandas itself is no dependency."""

    def __init__(self, frame):
        """frame: of polars, or a dict of columns."""
        self.frame, self.columns = frame, list(getattr(frame, "columns", frame))

    def __getitem__(self, name):
        return list(self.frame[name])

    def to_dict(self, orient="dict"):
        raise AssertionError("columns are read one by one")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_frame_becomes_a_recommender_under_the_current_folder(here, monkeypatch):
    small = dict(core=1, epochs=1, width=8)
    rec = Recommender.fit(LOG, Pandas(ARTICLES), name="shop", **small)
    assert sorted(p.name for p in here.iterdir()) == ["data", "runs"]
    assert rec.run.folder == here / "runs" / "shop" / "sasrec"
    assert not (ROOT / "runs" / "shop").exists() and not (ROOT / "data" / "shop").exists()
    answer = rec.recommend(user="c3", where={"category": "tea"}, keep_seen=True)
    assert set(answer.ids) <= {f"a{i:02d}" for i in range(1, 30, 2)} and len(answer.ids) == 10
    again = Recommender.load("runs/shop/sasrec").recommend(user="c3", keep_seen=True)
    assert again == rec.recommend(user="c3", keep_seen=True)
    with pytest.raises(ValueError) as refused:  # the script, started a second time
        Recommender.fit(LOG, ARTICLES, name="shop", **small)
    assert str(refused.value) == (
        'runs/shop/sasrec is there already: Recommender.load("runs/shop/sasrec") answers from it; '
        "overwrite=True trains it again, name= makes another"
    )
    more = LOG.vstack(LOG.head(1).with_columns(timestamp=pl.lit(500, pl.Int64)))
    monkeypatch.setattr(fitting, "run_script", without_training)
    monkeypatch.setattr(fitting, "stop_unless_trainable", lambda *args: None)
    with pytest.raises(ValueError, match="killed"):
        Recommender.fit(more, ARTICLES, name="shop", overwrite=True, **small)
    assert len(list((here / "data").iterdir())) == 2  # the run's own preparation stays
    assert Recommender.load("runs/shop/sasrec").recommend(user="c3", keep_seen=True) == again


def without_training(path, args, said):
    """Runs a script that prepares; one that trains is killed."""
    if path.name == "train_backbone.py":
        raise fitting.Refused("killed")
    done = CliRunner().invoke(prepare.main, args)
    assert done.exit_code == 0, done.output


def test_frames_of_every_kind_are_the_same_table():
    want = fitting.frame_of(LOG, "x")
    for given in (LOG.lazy(), LOG.to_dict(as_series=False), Pandas(LOG)):
        assert fitting.frame_of(given, "x").equals(want)
    gap = fitting.frame_of({"user": ["a", "b"], "timestamp": [1.0, float("nan")]}, "x")
    assert gap["timestamp"].null_count() == 1


class NA:
    """pandas' mark of a missing cell, which compares as missing and has no truth."""

    def __ne__(self, other):
        return self

    def __bool__(self):
        raise TypeError("boolean value of NA is ambiguous")


@pytest.mark.parametrize(
    "missing", [float("nan"), NA(), np.datetime64("NaT"), np.float64("nan"), None]
)
def test_a_missing_cell_of_any_column_is_blank(missing):
    columns = {"item": ["a1", "a2", missing], "kind": [missing, "tea", "cup"]}
    columns |= {"day": [datetime(2024, 1, 1), missing, None], "price": [1.5, 2.0, missing]}
    columns |= {"old": [missing, True, False], "stock": [3, missing, 4]}
    want = pl.DataFrame({k: [None if v is missing else v for v in c] for k, c in columns.items()})
    arrays = {name: np.array(column, object) for name, column in columns.items()}
    for given in (Pandas(columns), columns, arrays):
        assert fitting.frame_of(given, "x").equals(want)
    with pytest.raises(ValueError, match="cannot be read as a table.*each with values of one kind"):
        fitting.frame_of(Pandas({"item": ["a1", 2]}), "x")


@pytest.mark.parametrize(
    "model, flags, is_asked",
    [
        ("sasrec", {}, False),
        ("sasrec", {"user_column": "user", "overwrite": True}, False),
        ("sasrec", {"epoch": 3}, True),
        ("sasrecs", {}, True),
    ],
)
def test_training_is_asked_first_where_it_may_refuse(here, monkeypatch, model, flags, is_asked):
    asked = []
    monkeypatch.setattr(fitting, "run_script", lambda *args: None)
    monkeypatch.setattr(fitting, "as_flags", lambda flags, script: [])
    monkeypatch.setattr(fitting, "stop_unless_trainable", lambda *args: asked.append(args))
    (here / "orders.csv").write_text("user,item,timestamp,title\n")
    fitting.fit("orders.csv", None, "shop", model, False, flags)
    assert bool(asked) == is_asked


def test_keywords_are_the_flags_of_the_two_commands(here, monkeypatch):
    commands = []
    monkeypatch.setattr(fitting, "run_script", lambda *args: commands.append(args))
    monkeypatch.setattr(fitting, "stop_unless_trainable", lambda *args: None)
    (here / "orders.csv").write_text("customer,article,day,name\n")
    columns = dict(user_column="customer", item_column="article", time_column="day")
    fitting.fit("orders.csv", None, "shop", "gru4rec", False, columns | {"epochs": 3, "seed": None})
    (first, to_prepare, _), (second, to_train, _) = commands
    assert (first.name, second.name) == ("prepare.py", "train_backbone.py")
    assert to_prepare[:3] == ["shop", "--interactions", str(here / "orders.csv")]
    assert to_prepare[5:] == [
        *("--user-column", "customer", "--item-column", "article", "--time-column", "day")
    ]
    assert to_train == [
        *("--dataset", str(here / "data" / "shop"), "--model", "gru4rec"),
        *("--out", str(here / "runs" / "shop" / "gru4rec"), "--epochs", "3"),
    ]
    to_prepare, to_train = fitting.divided({"min_watch": 3, "seed": 1, "overwrite": True, "lr": 1})
    assert to_prepare == {"min_watch": 3, "overwrite": True}
    assert to_train == {"seed": 1, "overwrite": True, "lr": 1}


def test_what_is_switched_off_is_off_in_the_command():
    train, preparing = ROOT / "train_backbone.py", ROOT / "data" / "prepare.py"
    off = {"offset": False, "overwrite": False, "text_width": None}
    assert fitting.as_flags(off, train) == ["--no-offset"]
    assert fitting.as_flags({"offset": True}, train) == ["--offset"]
    some = {"overwrite": True, "drop_incomplete": False}
    assert fitting.as_flags(some, preparing) == ["--overwrite"]
    assert fitting.as_flags({"ofset": False}, train) == ["--no-ofset"]  # refused there


BAD = {
    "no such file": (("nowhere.csv", None), "there is no"),
    "no rows": ((LOG.head(0), ARTICLES), "interactions has no rows"),
    "no table": ((3, None), "interactions cannot be read as a table"),
    "no time": ((LOG.drop("timestamp"), ARTICLES), "lacks timestamp or position"),
    "no user": ((LOG.rename({"user": "who"}), ARTICLES), "lacks user; name yours with user_column"),
    "no titles": (
        (LOG, None),
        "interactions has the columns user, item, timestamp and lacks title",
    ),
    "a folder of its own": ((LOG, ARTICLES), "fit() was given out='here'", ("out", "here")),
    "no such flag": ((LOG, ARTICLES), "No such option 'epoch='", ("epoch", 1)),
    "no such value": ((LOG, ARTICLES), "'few' is not a valid integer", ("epochs", "few")),
    "an idle flag": ((LOG, ARTICLES), "lam= changes nothing without teacher=", ("lam", 0.1)),
    "no text for new items": ((LOG, ARTICLES), "cold_out=True ranks items", ("cold_out", True)),
    "no title in items": ((LOG, ARTICLES.drop("title")), "items has the columns item, category"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_fitted_is_a_sentence_and_writes_nothing(case, here):
    given, says, *flags = BAD[case]
    with pytest.raises(ValueError) as refused:
        Recommender.fit(*given, **dict(flags))
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        "--cold-out",
        "--model bert4rec --history 1",
        "--text tfidf --text-graph 1 --text-whiten .5",
        "--folds 1",
        "--teacher tfidf --lam .5",
        "--teacher a/b --lam 1 --w-confidence 1.5",
        "--teacher a/b --lam 1",
        "--text mini-lm",
        "--text tfidf+",
        "--text tfidf+nowhere.npy",
    ],
)
def test_flags_that_no_data_could_bear_are_refused_before_these_are_read(
    flags, refused, monkeypatch
):
    """fit() asks training so far before it replaces the preparation."""
    monkeypatch.setattr(common, "enter", lambda *_: pytest.fail("the data are read"))
    assert refused(train_backbone.main, flags)


def test_a_mistyped_column_is_corrected_as_a_keyword(here):
    LOG.rename({"user": "customer", "item": "article"}).write_csv(here / "orders.csv")
    ARTICLES.rename({"item": "article"}).write_csv(here / "articles.csv")
    columns = dict(user_column="customer", item_column="articel", core=1)
    with pytest.raises(ValueError) as refused:
        Recommender.fit("orders.csv", "articles.csv", name="shop", **columns)
    assert str(refused.value).endswith(
        'name yours: Recommender.fit(.., core=1, user_column="customer", item_column="article")'
    )
    assert f"prepare.py: {here / 'orders.csv'}: the header names" in str(refused.value)
    assert not (here / "data").exists()


def test_what_is_wrong_in_a_frame_names_no_file(here):
    late = LOG.with_columns(timestamp=pl.lit("soon"))
    with pytest.raises(ValueError, match="^prepare.py: interactions, row 1: timestamp 'soon'"):
        Recommender.fit(late, ARTICLES, name="shop")


def test_a_refusal_of_fit_names_what_fit_takes(here, monkeypatch):
    def only_prepared(path, args, said):
        if path.name == "prepare.py":
            done = CliRunner().invoke(prepare.main, args)
            if done.exit_code:
                raise fitting.Refused(done.stderr.strip().splitlines()[-1])

    monkeypatch.setattr(fitting, "run_script", only_prepared)
    fit = partial(fitting.fit, model="sasrec", said=False)
    fit(LOG, ARTICLES, "shop", flags={"core": 1})
    other = {"core": 1, "split": "leave-one-out"}
    with pytest.raises(ValueError, match=', name="shop-leave-one-out" puts this') as refused:
        fit(LOG, ARTICLES, "shop", flags=other)
    assert "out=" not in str(refused.value)
    fit(LOG, ARTICLES, "shop-leave-one-out", flags=other)
    with pytest.raises(ValueError, match="overwrite=True replaces it, name= names another folder"):
        fit(LOG, ARTICLES, "shop", flags={"core": 1, "max_eval": 5})
    (here / "a").mkdir()
    LOG.write_csv(here / "a" / "a.inter", separator="\t")
    ARTICLES.write_csv(here / "a" / "a.item", separator="\t")
    with pytest.raises(ValueError, match="give it with interactions= and no items= instead"):
        fit("a", ARTICLES, "atomic", flags={})


def test_an_installation_without_the_scripts_says_what_to_do(here, monkeypatch):
    monkeypatch.setattr(fitting.runtime, "ROOT", here)
    with pytest.raises(ValueError, match="lacks prepare.py.*pip install -e"):
        Recommender.fit(LOG, ARTICLES)
    assert not list(here.iterdir())
