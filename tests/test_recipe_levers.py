"""recipes/levers.py: a lever's row differs in the lever alone, validation chooses, and the test
part is asked once, about what was planned.
"""

import json
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from recipe_runs import script_mains

from delrec.data.prepared import candidates, users
from delrec.evaluation.stats import difference
from delrec.runtime import load_run, read_json
from recipes import levers
from recipes import runs as table_runs
from recipes.levers_rows import BASE, ROWS
from recipes.levers_table import asked_by

BOTH = "co-occurrence+title-similarity"
BAR = f"sasrec-titles+bsarec-titles+{BOTH}"


def made(*args, code=0):
    """What the command prints, or the sentence with which it ends."""
    done = CliRunner().invoke(levers.main, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def commands(toy, decoder):
    """commands(flags..) -> {run: its command's words} of a dry run; the table's under ""."""

    def of(*flags, dataset=toy.folder):
        out = made("--dataset", dataset, "--llm", decoder, "--dry-run", *flags)
        lines = [shlex.split(line) for line in out.splitlines() if line.startswith("python ")]
        return {name_in(line): line[1:] for line in lines}

    return of


def name_in(words):
    """The name of the run that a command makes, "" of a table."""
    is_table = words[1] == "evaluate.py"
    return "" if is_table else words[words.index("--out") + 1].split("/")[-1].removesuffix("-s0")


def pairs_after(words, flag):
    """The pairs that a command gives to a flag."""
    return [tuple(words[i + 1 : i + 3]) for i, word in enumerate(words) if word == flag]


# ---------------------------------------------------------------- commands only


@pytest.mark.parametrize("carried", [(), ("--carry", "titles+residual", "--carry", "residual+kd")])
def test_every_command_is_one_that_its_script_takes(carried, commands):
    mains = script_mains()
    found = commands(*carried)
    assert len(found) > 15 and ("" in found) == bool(carried)
    for program, *args in found.values():
        with mains[program].make_context(program, args) as context:
            assert context.params


def test_the_screen_asks_nothing_about_the_test_part(commands):
    found = commands()
    assert set(ROWS) - {"residual-counts"} <= set(found)
    for program, *args in found.values():
        assert program != "evaluate.py" and not any("test" in x for x in args if x[:2] == "--")
    assert not any("--limit" in words for words in found.values())


def test_a_row_differs_from_what_it_is_compared_with_in_its_flags_alone(commands):
    found = commands()
    for name, row in ROWS.items():
        if row.script != "finetune.py" or name == BASE:
            continue
        own, other = set(found[name]), set(found[row.minus])
        lever = {*row.finetune.split(), *ROWS[row.minus].finetune.split()}
        lever |= {"{backbone}", "{gru4rec}", "toy/sasrec-s0", "toy/gru4rec-s0"}
        # of stage 2: the flags, and which soft prompt it has
        changed = {x for x in own ^ other if not x.endswith(("/" + name + "-s0", "-s0"))}
        allowed = lever | ({"--maps", "--backbone", "random"} if row.random_prompt else set())
        if row.random_lm:
            assert any(x.startswith("random-0:") for x in own)
            changed = {x for x in changed if "tiny-llama" not in x}
        assert changed <= allowed, (name, changed)


def test_a_lever_of_stage_1_changes_stage_1_alone(commands):
    found = commands("--prompt-budget", 64, "--budget", 320)
    real, all_made = found["prompt-x8"], found["prompt-augment-all-x8"]
    assert real[real.index("--samples") + 1] == all_made[all_made.index("--samples") + 1] == "512"
    assert set(all_made) - set(real) == {"--augment", "all", all_made[-1]}
    one, other = found["windows"], found["made"]
    assert {x for x in set(one) ^ set(other) if not x.endswith("-s0")} == set()
    # the maps of that stage 1 with vectors that nothing trained
    untrained = found["made-untrained"]
    assert untrained[untrained.index("--maps") + 1].endswith("/prompt-augment-all-x8-s0")
    assert untrained[untrained.index("--soft-prompt") + 1] == "random"


def test_every_lever_has_a_control_or_is_one_switch_against_its_row():
    for name, row in ROWS.items():
        assert {row.minus, *row.controls} - {""} <= set(ROWS), name
        assert row.minus or name == "sasrec"
    needing = ("residual", "kd", "made", "made-soft", "keep-rps", "user-states", "r-drop", BASE)
    assert all(ROWS[name].controls for name in needing)


def test_residual_with_counts_is_carried_and_its_control_has_neither(commands):
    assert "--residual-counts" in commands("--levers", "residual-counts")["residual-counts"]
    carried = commands("--carry", "titles+residual-counts")
    assert "--residual-counts" in carried["titles-and-residual-counts"]
    alone = carried["titles-and-residual-counts-alone"]
    assert not [word for word in alone if word.startswith("--residual")]


def test_a_lever_brings_what_it_is_compared_with(commands):
    rows = {name for name in commands("--levers", "keep-rps") if name in ROWS}
    assert rows == {"keep-rps", "keep-rps-permuted", BASE, "untrained-maps", "random-lm", "sasrec"}


@pytest.mark.parametrize("dataset, flag", [("beauty", "--primary"), ("games", "--compare")])
def test_the_primary_pair_is_fixed_and_only_on_beauty(dataset, flag, commands):
    carried = ["--carry", "titles+residual", "--carry", "residual+ema"]
    found = commands(*carried, dataset=dataset)
    table, first = found[""], "titles-and-residual"
    primary, secondary = (f"{first}+{BOTH}", BAR), pairs_after(table, "--compare")
    assert primary in pairs_after(table, flag)
    assert len(pairs_after(table, "--primary")) == (flag == "--primary")
    assert (primary in secondary) == (flag == "--compare")
    # as many models: an LM and its backbone, two backbones
    assert (f"{first}+{BOTH}", f"sasrec-titles+sasrec-titles+{BOTH}") in secondary
    assert (first, f"sasrec-titles+{first}-alone") in secondary
    controls = [f"{first}-random-lm", f"{first}-untrained", "mlp-sasrec-titles", BASE]
    assert {(first, other) for other in controls} <= set(secondary)
    assert ("residual-and-ema", first) in secondary
    titled = found["sasrec-titles"]
    assert ("--preset" in titled) == (dataset == "beauty")
    assert "--folds" in titled and titled[titled.index("--folds") + 1] == "5"


def test_what_is_compared_among_candidates_is_chosen_among_them(commands):
    def chosen(words):
        return words[words.index("--choose") + 1] if "--choose" in words else "full"

    trained = ("finetune.py", "recipes/mlp.py")
    for carried, by in (((), "full"), (("--carry", "titles+residual"), "candidates")):
        rows = [words for words in commands(*carried).values() if words[0] in trained]
        assert len(rows) > 5 and {chosen(words) for words in rows} == {by}


def test_the_screen_s_mlp_and_the_carried_one_are_two_runs(commands):
    screened, carried = (
        {
            words[words.index("--out") + 1]
            for words in found.values()
            if words[0] == "recipes/mlp.py"
        }
        for found in (commands(), commands("--carry", "residual+ema"))
    )
    assert screened and carried and not screened & carried  # they are chosen otherwise


def test_fused_rows_are_fused_before_they_are_compared(commands):
    table = commands("--carry", "titles+residual", "--seeds", 2)[""]
    known = {x.split("/")[-1] for x in table if x.endswith(("-s0", "-s1", "-s2", "-s3"))}
    known |= {"co-occurrence", "title-similarity"}
    for a, b in pairs_after(table, "--fuse"):
        assert {a, b} <= known, (a, b)
        known.add(f"{a}+{b}")
    # each mixture's second SASRec has a seed of its own
    seconds = [b for a, b in pairs_after(table, "--fuse") if b.startswith("sasrec-titles")]
    assert seconds == ["sasrec-titles-s2", "sasrec-titles-s3"]


def test_a_sasrec_with_titles_has_the_settings_that_a_search_found_there():
    assert table_runs.model_flags("sasrec-titles", "beauty") == ["--preset", "beauty"]
    assert "--text" in table_runs.model_flags("sasrec-titles", "toy")
    assert table_runs.model_flags("sasrec", "beauty") == ["--model", "sasrec"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--levers", "residul"], "--levers names residul; the rows are sasrec, delrec"),
        (["--carry", "kd-permuted"], "--carry names kd-permuted; the levers are residual"),
        (["--carry", "residual+titles-residual"], "has --residual twice"),
        (["--carry", "ema"], "name a combination with residual first"),
        (["--seeds", 2], "the screen has one seed"),
        (["--test-samples", 100], "the screen has one seed"),
        (["--carry", "residual", "--levers", "ema"], "leave one out"),
        (["--carry", "residual"] * 3, "two combinations at most, 3 were given"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(args, said, toy, decoder):
    assert said in made("--dataset", toy.folder, "--llm", decoder, "--dry-run", *args, code=1)


# ---------------------------------------------------------------- run


SMALL = ["--folds", 2, "--budget", 80, "--prompt-budget", 32, "--val-samples", 20, "--jobs", 1]


@pytest.fixture
def small(here, toy, decoder, monkeypatch):
    """The flags of a small log and LM, two folds, words of titles alone."""
    titled = {"sasrec-titles": "--model sasrec --text tfidf"}
    titled["bsarec-titles"] = "--model sasrec --text tfidf --ema .9"
    monkeypatch.setattr(table_runs, "TITLED", titled)
    return ["--dataset", toy.folder, "--llm", decoder, *SMALL]


def test_the_screen_s_figures_are_those_of_validation_at_the_chosen_step(here, toy, small):
    out = made(*small, "--levers", "residual,ema")
    home = here.root / "toy" / "tiny-llama-ids-80-32"
    assert not any(args[0] == "evaluate.py" for args in here.ran)
    assert not list(home.glob("*/scores_test_*.npy"))
    rows = read_json(home / "levers" / "levers.json")["rows"]
    assert {"sasrec", BASE, "residual", "residual-permuted", "mlp", "ema"} <= set(rows)
    which = asked_by(home / "residual-s0")
    assert len(which) == 20
    hits = {}
    for name in ("residual", BASE):
        folder = home / f"{name}-s0"
        run, log = load_run(folder, toy), (folder / "log.jsonl").read_text().splitlines()
        chosen = [x for x in map(json.loads, log) if x["step"] == run.best_step]
        [line] = [x for x in chosen if "val_hr@1" in x]
        assert rows[name]["chosen"] == run.best_step
        assert rows[name]["val_hr@1"] == pytest.approx(line["val_hr@1"])
        assert rows[name]["val_full_ndcg@10"] == pytest.approx(line["val_full_ndcg@10"])
        hits[name] = first_hits(folder, toy, which)
    least = difference(hits["residual"], hits[BASE], users(toy, toy.val[which]))["least"]
    said = next(x for x in out.splitlines() if x.startswith("residual "))
    gain = rows["residual"]["val_full_ndcg@10"] - rows[BASE]["val_full_ndcg@10"]
    assert f"{gain:+.4f}" in said and f"{least:.3f}".lstrip("0") in said
    assert (home / "levers" / "levers.txt").read_text().strip() in out
    # a lever that says no more than its backbone is not above its controls
    assert out.split("by NDCG@10 over all items: ")[1].split("\n")[0] in kept_of(rows)
    once = len(here.ran)
    made(*small, "--levers", "residual,ema")
    assert len(here.ran) == once  # finished runs are not repeated


def kept_of(rows):
    """The lists of rows that may stand as better, by what the table says of each."""
    value = {name: row["val_full_ndcg@10"] for name, row in rows.items()}
    lms = [name for name in ("delrec", "residual", "ema") if name in value]
    above = [
        name
        for name in lms
        if all(value[name] > value[other] for other in (ROWS[name].minus, *ROWS[name].controls))
    ]
    return [", ".join(above) or "no row"]


def first_hits(folder, data, which):
    """1 where the target of a validation sample is above all other candidates, else 0."""
    score_nC = np.load(folder / "scores_val_15.npy")[which]
    is_target_nC = candidates(data, "val", 15, which) == data.items[data.val[which]][:, None]
    others_n = np.where(is_target_nC, -np.inf, score_nC).max(1)
    return (score_nC[is_target_nC] > others_n).astype(float)


@pytest.mark.long
def test_what_is_carried_is_asked_once_and_the_primary_pair_stands_first(
    here, toy, small, monkeypatch
):
    monkeypatch.setattr(levers, "PRIMARY_ON", "toy")
    made(*small, "--carry", "titles+residual", "--seeds", 1, "--test-samples", 20)
    assert sum(args[0] == "evaluate.py" for args in here.ran) == 1
    folder = here.root / "toy" / "tiny-llama-ids-80-32" / "levers"
    table, first = read_json(folder / "metrics.json"), "titles-and-residual"
    assert table["primary"]["pair"] == f"{first}+{BOTH} - {BAR}"
    assert table["primary"]["pair"] not in table["planned"]
    test = table["primary"]["test"]
    assert test["p_adjusted"] == max(test["p"], test["p_t"])
    assert (folder / "table.txt").read_text().startswith("The primary comparison, HR@1 among 15")
    planned = set(table["planned"])
    assert {f"{first} - {first}-{x}" for x in ("random-lm", "untrained")} <= planned
    assert f"{first} - sasrec-titles+{first}-alone" in planned
