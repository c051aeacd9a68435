"""recipes/tune.py: what is drawn, who goes on, and that it never does a training twice."""

import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import common
import train_backbone
from delrec.backbone.batches import steps_of_epoch
from delrec.backbone.models import MODELS
from recipes import tune
from recipes.tune import Search, Trial


def search(**changed):
    """A search of three epochs in its first round."""
    asked = dict(dataset="log", model="sasrec", trials=20, first=3, jobs=1, seed=0, flags="")
    return Search(**(asked | changed))


def drawn_of(model, n):
    """So many trials of a model."""
    return tune.draw(tune.grid_of(model, ""), n, 0)


def tuned(*args):
    """What the command prints."""
    done = CliRunner().invoke(tune.main, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_more_trials_begin_with_the_fewer_ones_and_the_defaults_are_first():
    few, many = drawn_of("sasrec", 5), drawn_of("sasrec", 30)
    assert many[:5] == few and few[0].settings == {}
    drawn = [tuple(trial.settings.values()) for trial in many[1:]]
    assert len(set(drawn)) == 29
    assert tune.draw(tune.GRID, 5, 1) != few


def test_what_a_model_may_have_is_its_own():
    assert {trial.settings["history"] for trial in drawn_of("caser", 60)[1:]} == {5, 10}


def test_with_text_a_trial_also_draws_how_it_enters():
    plain, text = (search(flags=flags) for flags in ("--loss ce", "--text=tfidf --loss ce"))
    assert not {"text-in", "text-whiten"} & set(plain.grid)
    ways = {trial.settings["text-in"] for trial in tune.draw(text.grid, 60, 0)[1:]}
    assert ways == {"fold", "adaptor", "alphafuse"}
    with pytest.raises(SystemExit, match="--text-in, which trials differ in"):
        tune.stop_if_said("--text tfidf --text-in fold")


@pytest.mark.parametrize(
    "model, flags",
    [
        ("kda", "--text tfidf"),
        ("sasrec", "--text tfidf --text-width 8"),
        ("sasrec", "--text tfidf --text-graph .5"),
        ("caser", "--text=tfidf --no-offset"),
        ("bert4rec", ""),
    ],
)
def test_no_setting_that_training_refuses_is_drawn(model, flags, run, monkeypatch):
    monkeypatch.setattr(common, "enter", lambda *_: sys.exit())  # it would begin
    asked = search(model=model, flags=flags)
    for trial in tune.draw(asked.grid, 40, 0):
        run(train_backbone.main, " ".join(map(str, asked.command(trial)[1:])))


@pytest.mark.parametrize(
    "options, says",
    [
        ("--model sasrecs", "Invalid value for '--model': 'sasrecs' is not one of"),
        ("--model seqsim", "--model seqsim is not trained"),
        ("--flags=--from=shop/old", "whose run has its width and history"),
    ],
)
def test_what_cannot_be_searched_is_refused_at_the_door(options, says):
    with pytest.raises(AssertionError) as refused:
        tuned(*options.split())
    assert says in str(refused.value)


def test_more_trials_than_settings_is_one_sentence():
    with pytest.raises(SystemExit, match="ask for fewer"):
        drawn_of("caser", 10**6)


@pytest.mark.parametrize(
    "n, wanted",
    [
        (24, [(24, 3), (8, 9), (3, 0)]),
        (4, [(4, 3), (2, 0)]),
        (3, [(3, 0)]),
        (1, [(1, 0)]),
    ],
)
def test_a_third_goes_on_three_times_as_long(n, wanted):
    assert tune.rounds(n, 3) == wanted


def test_the_best_setting_is_found_and_few_are_trained_long(monkeypatch):
    trained = []

    def train(self, trial, epochs, job):
        trained.append((trial.number, epochs))
        # learning rates far from 1e-3 and much dropout are bad, and longer is better
        lr, dropout = trial.settings.get("lr", 1e-2), trial.settings.get("dropout", 0.9)
        trial.found = 1 - abs(lr - 1e-3) * 100 - dropout + 0.01 * (epochs or 100)
        trial.epochs = epochs

    monkeypatch.setattr(Search, "train", train)
    ranked = search().run()
    assert len(ranked) == len({trial.number for trial in ranked}) == 20
    best = max(drawn_of("sasrec", 20)[1:], key=lambda t: value_of(t.settings))
    assert ranked[0].settings == best.settings and ranked[0].epochs == 0
    assert len([1 for _, epochs in trained if epochs == 3]) == 20
    assert len([1 for _, epochs in trained if epochs == 0]) == 3
    # the worst stand last: nobody who stopped early is above one who went on
    assert [trial.epochs for trial in ranked] == [0] * 3 + [9] * 4 + [3] * 13


def value_of(settings):
    """How good a setting was made, above."""
    return 1 - abs(settings["lr"] - 1e-3) * 100 - settings["dropout"]


def test_the_table_names_the_command_of_the_best():
    ranked = [Trial(4, {"lr": 0.002, "width": 64}, 0.2, 0, 3.0), Trial(0, {}, 0.1, 3, 1.0)]
    text = "\n".join(tune.table_lines(search(flags="--loss sampled"), ranked))
    wanted = "python train_backbone.py --dataset log --model sasrec --loss sampled --lr 0.002"
    assert f"{wanted} --width 64" in text
    assert "4.0 minutes of training" in text and "default" in text
    assert text.endswith("--width 64 --seed 0")
    assert tune.table_lines(search(seed=3), ranked)[-1].endswith("--width 64 --seed 3")


def test_a_search_runs_reads_validation_alone_and_repeats_nothing(here, toy, monkeypatch):
    monkeypatch.setitem(tune.OWN, "sasrec", {"width": (8, 16), "history": (6,), "batch": (64,)})
    args = ["--dataset", toy.folder, "--trials", 4, "--first", 1, "--jobs", 1]
    printed = tuned(*args)
    folder = here.root / toy.folder.name / "tune-sasrec"
    saved = json.loads((folder / "tune.json").read_text())["trials"]
    assert len(saved) == 4 and [t["epochs"] for t in saved] == [0, 0, 1, 1]
    assert len(here.ran) == 6 and "the best one: python train_backbone.py" in printed
    # the figures are the best epochs' of validation
    whole = folder / f"{saved[0]['number']:03}-whole"
    logged = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert saved[0]["found"] == max(line["val_ndcg@10"] for line in logged)
    tuned(*args)
    assert len(here.ran) == 6


@pytest.mark.parametrize("model", MODELS)
def test_a_first_round_is_long_enough_to_learn_in(model, toy, monkeypatch):
    # the largest batch and the longest history of the grid
    cfg = SimpleNamespace(model=model, batch=256, history=50, one_target=False)
    steps, epochs = steps_of_epoch(cfg, toy), tune.first_round(model, "", toy)
    assert epochs * steps >= 150 > (epochs - 1) * steps
    trained = []
    monkeypatch.setattr(Search, "train_all", lambda self, trials, epochs: trained.append(epochs))
    asked = ["--dataset", toy.folder, "--model", model, "--trials", 4, "--jobs", 1]
    for writer in ("write_text", "write_json"):
        monkeypatch.setattr(tune, writer, lambda *_: None)
    tuned(*asked)
    tuned(*asked, "--first", 2)
    assert trained == [epochs, 0, 2, 0]


def test_a_large_log_s_first_round_is_short(toy, monkeypatch):
    monkeypatch.setattr(tune, "steps_of_epoch", lambda cfg, data: 1000)
    assert tune.first_round("sasrec", "", toy) == 4


def test_searches_of_two_seeds_stand_side_by_side(here, toy):
    args = ["--dataset", toy.folder, "--trials", 1, "--jobs", 1]
    tuned(*args, "--seed", 1)
    tuned(*args)
    assert [line[line.index("--seed") + 1] for line in here.ran] == ["1", "0"]
    home = here.root / toy.folder.name
    (home / "tune-sasrec").rename(home / "other")
    (home / "tune-sasrec-s1").rename(home / "tune-sasrec")
    with pytest.raises(AssertionError) as refused:
        tuned(*args)
    assert "was made with --seed 1, here it is 0" in str(refused.value)


def test_runs_of_other_flags_are_not_taken_for_these():
    plain, text = search(), search(flags="--text tfidf")
    other = search(flags="--text tfidf --permute-text")
    assert plain.folder.name == "tune-sasrec"
    assert len({s.folder for s in (plain, text, other)}) == 3


@pytest.mark.parametrize("flags", ["--lr 1e-3", "--loss bce --width=32", "--seed 3", "--out x"])
def test_a_flag_that_a_trial_would_overrule_is_refused(flags):
    with pytest.raises(SystemExit, match="leave it out"):
        tune.stop_if_said(flags)
    tune.stop_if_said("--text tfidf --epochs 30")
