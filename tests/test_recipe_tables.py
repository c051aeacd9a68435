"""recipes/tables.py: the commands it gives, run on a tiny LM in this process."""

import json
from pathlib import Path

import pytest
from recipe_runs import refused_recipe, run_recipe, script_mains

from delrec import runtime
from delrec.evaluation.paper import paper_method
from delrec.evaluation.stats import unseeded
from delrec.lm.pretrained import seed_and_name
from delrec.runtime import load_run, read_json
from recipes import runs as table_runs
from recipes import students, tables

SMALL = ["--input", "titles", "--budget", "80", "--test-samples", "20", "--jobs", "1"]
SMALL += ["--val-samples", "10"]
VARIANTS = ("no-prompt", "words", "untrained", "delrec")


@pytest.fixture
def on_decoder(toy, decoder):
    """The data set and the LM of a recipe."""
    return ["--dataset", toy.folder, "--llm", decoder]


@pytest.fixture
def small_shape(monkeypatch):
    """Any LM is a decoder of four layers."""
    for module in (tables, table_runs, students):
        monkeypatch.setattr(module, "kind_and_layers", lambda llm: ("decoder", 4))


# ---------------------------------------------------------------- run


def test_table3_runs_every_variant_once_and_ends_in_a_table(here, toy, on_decoder):
    args = ["table3", *on_decoder, "--seeds", 2, *SMALL]
    run_recipe(*args)
    home = here.root / "toy" / "tiny-llama-titles-80"
    for s in (0, 1):
        runs = {v: load_run(home / f"{v}-s{s}", toy) for v in VARIANTS}
        assert {v: paper_method(r) for v, r in runs.items()} == {
            "no-prompt": "w/o SP",
            "words": "w MCP",
            "untrained": "w USP",
            "delrec": "DELRec (SASRec)",
        }
        assert all(r.seed == s and r.samples == 80 for r in runs.values())
    found = json.loads((home / "table3" / "metrics.json").read_text())
    rows = {f"{name}-s{s}" for name in (*VARIANTS, "sasrec") for s in (0, 1)}
    assert rows <= set(found["rows"]) and found["reference"] == "delrec-s0"
    assert set(found["seeds"]) >= {*VARIANTS, "sasrec"}
    assert found["seeds"]["words"]["against"] == "delrec"
    means_stand_in_the_table(home / "table3", found["seeds"]["words"])
    once = len(here.ran)
    # a backbone, a prompt, four fine-tuned LMs a seed; one table
    assert once == 2 * (1 + 1 + 4) + 1
    run_recipe(*args)
    # finished runs are not repeated
    assert len(here.ran) == once + 1 and here.ran[-1][0] == "evaluate.py"


def means_stand_in_the_table(folder, words):
    """The means over the seeds of the row `words`, for a paper."""
    assert (folder / "table3.html").stat().st_size > 10000 and (folder / "seeds.png").exists()
    lines = (folder / "table.md").read_text().splitlines()
    line = next(x for x in lines if x.startswith("| words |"))
    assert f"{words['hr@1'][0]:.3f}"[1:] in line and "| 2 |" in line
    assert f"{words['test']['hr@1']['difference']:+.3f}" in line and "| delrec |" in line
    assert "$\\pm$" in (folder / "table.tex").read_text()
    assert "±" in (folder / "table3.html").read_text()


@pytest.mark.long
def test_table5_speaks_of_all_seeds(here, on_decoder):
    small = ["--seeds", "2", "--budget", "80", "--test-samples", "20", "--jobs", "1"]
    small += ["--val-samples", "10"]
    out = run_recipe("table5", *on_decoder, *small)
    folder = here.root / "toy" / "tiny-llama-ids-80" / "table5"
    found = json.loads((folder / "metrics.json").read_text())["seeds"]
    line = next(x for x in out.splitlines() if x.startswith("toy "))
    columns = ["name", "density", "sasrec", "delrec", "gain", "p", "fused"]
    said = dict(zip(columns, line.split(), strict=True))
    assert float(said["sasrec"]) == pytest.approx(found["sasrec"]["hr@1"][0], abs=6e-4)
    assert float(said["delrec"]) == pytest.approx(found["delrec"]["hr@1"][0], abs=6e-4)
    test = found["delrec"]["test"]["hr@1"]
    assert float(said["gain"]) == pytest.approx(test["difference"], abs=6e-4)
    assert float(said["p"]) == pytest.approx(test["p"], rel=0.01)


def test_the_control_s_table_compares_what_stands_in_for_the_lm_with_it(here, on_decoder):
    small = ["--budget", "320", "--test-samples", "20", "--jobs", "1", "--seeds", "2"]
    out = run_recipe("control", *on_decoder, *small)
    home = here.root / "toy" / "tiny-llama-ids-320"
    # a backbone, an MLP, the LM a seed; two controls, one at three rates, one at four; their seeds
    made = 2 * 3 + (3 + 4) + 2 * 2
    assert len(here.ran) == made + 1  # the table
    table = json.loads((home / "control" / "metrics.json").read_text())
    assert table["reference"] == "no-prompt-s0"
    chosen = {}
    for name in ("random", "two-layers"):
        said = next(x for x in out.splitlines() if x.startswith(f"=== {name}: learning rate"))
        chosen[name] = f"{name}-lr{said.split()[4]}"
        runs = [load_run(home / f"{chosen[name]}-s{s}") for s in (0, 1)]
        assert [seed_and_name(r.llm_from if name != "random" else r.llm)[0] for r in runs] == [0, 1]
        assert {r.lr for r in runs} == {float(said.split()[4])}
        tried = dict(x.rstrip(",").split(": ") for x in said.split("(")[1][:-1].split(", "))
        assert tried[said.split()[4]] == max(tried.values())
    rows = {"sasrec", "mlp", "no-prompt", *chosen.values()}
    assert {name for name in table["rows"] if "+" not in name} >= {
        f"{name}-s{s}" for name in rows for s in (0, 1)
    }
    others = rows - {"no-prompt"}
    assert all(table["seeds"][name]["against"] == "no-prompt" for name in others)
    tests = [table["seeds"][name]["test"]["ndcg@10"] for name in others]
    assert all(0 <= test["p"] <= 1 for test in tests)
    run_recipe("control", *on_decoder, *small)
    assert here.ran[-1][0] == "evaluate.py" and len(here.ran) == made + 2


def test_the_control_is_about_vectors(on_decoder):
    assert "leave --input out" in refused_recipe("control", *on_decoder, "--input", "titles")


def test_random_weights_have_a_home_of_their_own(toy, decoder):
    args = ["table3", "--dataset", toy.folder, "--llm", f"random-4:{decoder}", "--seeds", 1]
    out = run_recipe(*args, "--dry-run")
    assert "toy/tiny-llama-random4-ids-512/delrec-s0" in out
    assert f"--llm random-4:{decoder} " in out


# ---------------------------------------------------------------- commands only


def test_every_recipe_names_flags_that_exist(on_decoder, small_shape):
    mains = script_mains()
    for name in tables.RECIPES:
        more = ["--controls"] if name == "table2" else []
        out = run_recipe(name, *on_decoder, "--seeds", 1, "--dry-run", "--procs", 10, *more)
        lines = [x.split() for x in out.splitlines() if x]
        assert lines and all(x[:2] == ["torchrun", "--nproc_per_node=10"] for x in lines)
        assert len({" ".join(x) for x in lines}) == len(lines)
        for _, _, program, *args in lines:
            known = {o for p in mains[program].params for o in [*p.opts, *p.secondary_opts]}
            assert {a for a in args if a.startswith("--")} <= known, (name, program)
            # values too are of the right kind
            with mains[program].make_context(program, args) as context:
                assert context.params
        assert lines[-1][2] == "evaluate.py"


@pytest.mark.parametrize("name", ["table2", "table3", "table4"])
def test_item_vectors_are_distilled_in_the_form_they_are_read_in(name, on_decoder, small_shape):
    asked = ["--seeds", "1", "--dry-run", "--budget", "800"]
    out = run_recipe(name, *on_decoder, *asked).splitlines()
    assert all("--input ids" in x for x in out if "distill.py" in x)
    assert sum("/no-prompt-s0" in x and "finetune.py" in x for x in out) == 1
    from_maps = [x for x in out if "--maps toy/tiny-llama-ids-800/prompt-s0 " in x]
    # the distilled maps alone, and with vectors that nothing trained
    prompts = [x.split("--soft-prompt ")[1].split()[0] for x in from_maps]
    assert prompts == (["none", "random"] if name == "table3" else [])


def test_what_reads_titles_sees_a_quarter_of_the_windows(on_decoder, small_shape):
    # a title costs more than a vector
    asked = ["--seeds", "1", "--dry-run", "--budget", "800"]
    out = run_recipe("table2", *on_decoder, *asked).splitlines()
    assert all("--samples 200 " in x for x in out if "distill.py" in x)
    assert {
        x.split("--out ")[1].split("/")[-1]: x.split("--samples ")[1].split()[0]
        for x in out
        if "finetune.py" in x
    } == {
        "llara-s0": "200",
        "llamarec-s0": "200",
        "recranker-s0": "200",
        "trsr-words-s0": "200",
        "trsr-recurrent-s0": "200",
        "llmseqprompt-s0": "200",
        "no-prompt-s0": "800",
        "delrec-s0": "800",
        "delrec-gru4rec-s0": "800",
        "delrec-caser-s0": "800",
    }


def value_of(line, flag):
    """What a command gives to a flag."""
    return line.split(f"{flag} ")[1].split()[0]


@pytest.mark.parametrize(
    "name, models, seeds",
    [
        ("headline", ["sasrec", "gru4rec", "sasrec-titles"], 5),
        ("table2", ["sasrec", "gru4rec", "caser"], 1),
    ],
)
def test_backbones_get_more_seeds_where_they_are_what_is_beaten(name, models, seeds, on_decoder):
    out = run_recipe(name, *on_decoder, "--seeds", 1, "--dry-run").splitlines()
    trained = [value_of(x, "--out").split("/")[1] for x in out if "train_backbone.py" in x]
    once = ("seqsim", "bert4rec", "llm2bert4rec", "kda", "lrurec") if name == "table2" else ()
    expected = {f"{m}-s{s}" for m in models for s in range(seeds)} | {f"{m}-s0" for m in once}
    assert sorted(trained) == sorted(expected)
    assert all(f"toy/{m}-s{s} " in out[-1] for m in models for s in range(seeds))
    assert "delrec-s1" not in " ".join(out)
    if name == "headline":
        fused = [f"--fuse sasrec-s{s}+gru4rec-s{s} co-occurrence" for s in range(seeds)]
        assert all(x in out[-1] for x in fused)


def test_the_headline_has_five_seeds_of_backbones_and_three_of_lms_unless_asked(on_decoder):
    def made(*args):
        out = run_recipe("headline", *on_decoder, "--dry-run", *args).splitlines()
        names = [value_of(x, "--out").split("/")[-1] for x in out[:-1]]
        return [sum(name.startswith(f"{m}-s") for name in names) for m in ("sasrec", "delrec")]

    assert made() == [5, 3]
    assert made("--seeds", 1, "--backbone-seeds", 1) == [1, 1]
    assert made("--backbone-seeds", 1) == [3, 3]  # each LM has a backbone of its seed


def pairs_after(line, flag):
    """The pairs that a command gives to a flag."""
    words = line.split()
    return [tuple(words[i + 1 : i + 3]) for i, word in enumerate(words) if word == flag]


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_ensemble_with_an_lm_is_compared_with_as_many_members_without(seeds, on_decoder):
    line = run_recipe("headline", *on_decoder, "--seeds", seeds, "--dry-run").splitlines()[-1]
    rows = {f"{a}+{b}" for a, b in pairs_after(line, "--fuse")}
    models = ("sasrec", "gru4rec", "sasrec-titles", "delrec", "no-prompt")
    rows |= {f"{m}-s{s}" for m in models for s in range(seeds)}
    rows |= {f"sasrec-s{s}+delrec-s{s}" for s in range(seeds)}  # in every table
    means = {unseeded(row) for row in rows}
    compared = pairs_after(line, "--compare")
    for a, b in compared:
        assert a.count("+") == b.count("+") and {a, b} <= means
        assert "delrec" in a and "delrec" not in b
    ensembles = {row for row in means if "delrec" in row and "+" in row}
    assert ensembles == {a for a, _ in compared if "+" in a}


def test_rows_are_chosen_on_a_thousand_validation_samples(on_decoder, small_shape):
    for name in tables.RECIPES:
        out = run_recipe(name, *on_decoder, "--seeds", 1, "--dry-run").splitlines()
        # backbones and their MLP look at all, an export chooses nothing
        free = ("train_backbone.py", "mlp.py", "--export")
        choosing = [x for x in out if not any(part in x for part in free)]
        expected = "100" if name == "table2" else "1000"  # whose budget is two hours
        assert {value_of(x, "--val-samples") for x in choosing} == {expected}


@pytest.mark.parametrize(
    "name, without", [("table2", "llamarec, trsr-recurrent, llmseqprompt"), ("table4", "half-lm")]
)
def test_an_lm_that_is_no_decoder_gets_the_rows_that_it_can_have(
    name, without, toy, encoder_decoder
):
    args = ["--dataset", toy.folder, "--llm", encoder_decoder, "--seeds", 1, "--dry-run"]
    said, *lines = run_recipe(name, *args, "--input", "titles").splitlines()
    assert f"without {without}: " in said and "encoder-decoder" in said
    assert "delrec-s0" in lines[-1]
    assert not any(f"{row}-s0" in x for row in without.split(", ") for x in lines)
    assert not any("half" in x for x in lines)
    assert not any("--loss titles" in x or "--layers" in x for x in lines)
    assert "(--input ids) reads a state after every item" in refused_recipe("table3", *args)


def test_half_of_the_lm_has_a_prompt_that_was_distilled_for_it(on_decoder, small_shape):
    out = run_recipe("table4", *on_decoder, "--seeds", 1, "--dry-run").splitlines()
    made = {value_of(x, "--out").split("/")[-1]: x for x in out[:-1]}
    without, prompt, half = (
        made[f"{x}-s0"] for x in ("half-no-prompt", "prompt-half-lm", "half-lm")
    )
    assert value_of(without, "--layers") == "2" and value_of(without, "--soft-prompt") == "none"
    # stage 1 and stage 2 read what the row without stage 1 left of the LM
    left = str(Path("runs") / value_of(without, "--out") / "lm")
    assert value_of(prompt, "--llm") == value_of(half, "--llm")
    assert value_of(half, "--llm").endswith(left)
    assert value_of(half, "--soft-prompt") == value_of(prompt, "--out")
    assert "--layers" not in half and all(
        f"/{x}-s0 " in out[-1] for x in ("half-lm", "half-no-prompt")
    )


def test_half_of_an_lm_runs(here, toy, deep):
    asked = dict(
        dataset=str(toy.folder), also=(), llm=deep, input="ids", paper=False, dry_run=False
    )
    budgets = dict(budget=80, prompt_budget=0, test_samples=10, val_samples=10)
    plan = table_runs.Plan(**asked, **budgets, seeds=1, backbone_seeds=1, batch=0, procs=1, jobs=1)
    without, half = table_runs.Runs(plan, plan.dataset, 0).halves()
    run = load_run(half, toy)
    assert run.llm == str(here.root / without / "lm") and paper_method(run) is None
    assert read_json(Path(run.llm) / "config.json")["num_hidden_layers"] == 2
    assert run.soft_prompt.endswith("prompt-half-lm-s0")


def test_fig8_moves_one_number_at_a_time(on_decoder):
    out = run_recipe("fig8", *on_decoder, "--seeds", 1, "--dry-run").splitlines()
    prompts = [x for x in out if "distill.py" in x]
    of_k = [x for x in prompts if "--input ids" in x]
    # on titles a longer list is a longer prompt
    of_h = [x for x in prompts if "--input ids" not in x]
    assert sorted(int(value_of(x, "--k")) for x in of_k if "--k " in x) == [20, 40, 60, 100, 120]
    assert not any("--h " in x for x in of_k) and not any("--k " in x for x in of_h)
    assert sorted(int(value_of(x, "--h")) for x in of_h) == [5, 10, 15, 20, 25]
    tuned = [x for x in out if "finetune.py" in x]
    assert sum("--input titles" in x for x in tuned) == 5
    assert sum("--input ids" in x for x in tuned) == 6
    # a sweep has no stars
    assert "--exploratory" in out[-1]


def test_layers_teaches_each_depth_by_the_whole_lm(on_decoder, small_shape):
    out = run_recipe("layers", *on_decoder, "--seeds", 1, "--dry-run").splitlines()
    made = {x.split("--out ")[1].split("/")[-1]: x for x in out if "finetune.py" in x}
    rows = [f"{how}-{n}-s0" for n in (2, 4) for how in ("alone", "maps", "taught")]
    assert sorted(made) == sorted(rows)
    assert "--layers" not in made["alone-4-s0"]
    for n in (2, 4):
        # with the maps that the taught one begins with, too, so that they are not the teacher's
        begun = made[f"maps-{n}-s0"]
        assert f"--layers {n} --maps" in begun and "alone-4-s0" in begun
        assert "--teacher" not in begun
        flags = made[f"taught-{n}-s0"]
        assert f"--layers {n} --teacher" in flags and "alone-4-s0 --blocks 2" in flags
    assert "--teacher" not in made["alone-2-s0"]


def test_a_log_without_cold_users_is_refused_before_anything_trains(here, on_decoder):
    said = refused_recipe("coldstart", *on_decoder, "--seeds", 1, *SMALL)
    assert "has at most 2 earlier items" in said
    assert here.ran == []


def test_a_data_set_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    said = refused_recipe("table2", "--dataset", "nothing")
    assert "no prepared data set in" in said


def test_the_headline_s_bar_is_a_sasrec_with_titles_and_both_counts(on_decoder):
    *made, table = run_recipe("headline", *on_decoder, "--seeds", 2, "--dry-run").splitlines()
    titled = [x for x in made if "/sasrec-titles-s" in x]
    assert len(titled) == 5 and all("--text tfidf+minilm" in x for x in titled)
    both = "co-occurrence+title-similarity"
    for s in range(5):
        assert f"--fuse sasrec-titles-s{s}+co-occurrence title-similarity" in table
    assert f"--compare delrec+{both} sasrec-titles+{both}" in table
    assert f"--compare delrec+delrec+{both} sasrec-titles+sasrec-titles+{both}" in table
