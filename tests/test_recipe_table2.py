"""make table2: commands that no script refuses, the small budget and the full one, controls, what
the table says of its rows.
"""

import shlex
from types import SimpleNamespace

import pytest
from click import ClickException
from recipe_runs import run_recipe, script_mains

import common
import finetune
import train_backbone
from delrec.backbone import options, presets, titled
from delrec.lm import items, slmrec, summaries
from delrec.lm.pretrained import EMBEDDED
from delrec.runtime import read_json
from recipes import minutes, papers, table2

FULL = ["--budget", 50000, "--val-samples", 1000, "--test-samples", 0, "--seeds", 3]


@pytest.fixture
def commands(toy, decoder):
    """commands(flags..) -> the words of each command that a dry run of table2 prints."""

    def printed(*flags, llm=decoder):
        args = ["table2", "--dataset", toy.folder, "--llm", llm, "--dry-run", *flags]
        lines = [line for line in run_recipe(*args).splitlines() if "python " in line]
        return [shlex.split(line) for line in lines]

    return printed


def value(words, flag):
    """What a command gives to a flag; None where it has none."""
    return words[words.index(flag) + 1] if flag in words else None


def row_of(words):
    """The row that a command trains, without its seed."""
    return value(words, "--out").split("/")[-1].rpartition("-s")[0]


def trained(lines, script="finetune.py"):
    """{row: the words of its command} of a script."""
    return {row_of(words): words for words in lines if words[1] == script}


# ---------------------------------------------------------------- commands


def refuse_what_cannot_be_meant(script, args):
    """A command's flags, read and checked as its script does before it opens anything."""
    main = script_mains()[script]
    with main.make_context(script, args) as ctx:
        if script == "finetune.py":
            cfg, typed = common.settled(ctx, ctx.params, finetune.PAPER)
            common.fill(cfg, summaries.defaults(cfg) | items.defaults(cfg))
            common.fill(cfg, finetune.VECTORS if cfg.input == "ids" else finetune.TITLES)
            common.fill(cfg, slmrec.ALONE | dict(lr=3e-3))
            vars(cfg).update(finetune.FIXED if cfg.input == "ids" else {})
            finetune.check(cfg, typed)
        if script == "train_backbone.py":
            cfg, moved = SimpleNamespace(**ctx.params), common.moved_of(ctx, ctx.params)
            found = options.half_registered(cfg, train_backbone.ALL) + presets.faults(cfg)
            common.refuse(found + titled.faults(cfg, moved) + options.idle(cfg, moved))
            common.fill(cfg, train_backbone.ALL[cfg.model])
            common.refuse(train_backbone.faults_of(cfg))


@pytest.mark.parametrize(
    "flags",
    [[], ["--controls"], ["--controls", *FULL], ["--controls", "--input", "titles", "--paper"]],
)
def test_no_command_is_one_that_its_script_refuses(flags, commands):
    lines = commands(*flags)
    assert len({words[1] for words in lines}) == 4
    for _, script, *args in lines:
        refuse_what_cannot_be_meant(script, args)


def test_what_the_check_of_commands_would_find():
    with pytest.raises(ClickException, match="--hint and --orders are about"):
        refuse_what_cannot_be_meant("finetune.py", ["--hint", "backbone"])
    with pytest.raises(ClickException, match="--text"):
        refuse_what_cannot_be_meant("train_backbone.py", ["--model", "seqsim"])


def test_an_encoder_decoder_has_the_controls_of_the_rows_that_it_has(commands, encoder_decoder):
    lines = commands("--controls", "--input", "titles", llm=encoder_decoder)
    rows = {*trained(lines)}
    assert {"llara-off", "recranker-no-hint", "trsr-empty"} <= rows
    assert not any(row.startswith(("llamarec", "trsr-recurrent", "llmseq")) for row in rows)
    assert not any("--free" in words or "--two-stage" in words for words in lines)
    for _, script, *args in lines:
        refuse_what_cannot_be_meant(script, args)


# ---------------------------------------------------------------- budgets


def test_the_small_budget_asks_few_and_all_rows_the_same(commands):
    lines = commands()
    tables = [words for words in lines if "--limit" in words]
    assert len(tables) == 3 and {value(words, "--limit") for words in tables} == {"300"}
    of_lms = [words for words in lines if words[1] in ("finetune.py", "distill.py", "evaluate.py")]
    assert {value(words, "--val-samples") for words in of_lms} == {"100"}
    for words in trained(lines).values():
        on_vectors = value(words, "--input") == "ids"
        assert (value(words, "--samples"), value(words, "--evals")) == (
            ("1024", "2") if on_vectors else ("256", "1")
        )
    told = trained(lines)["trsr-recurrent"]
    assert value(told, "--history") == "10"  # two blocks to summarise, not five
    assert value(trained(lines)["llara"], "--lr-maps") == "1e-2"
    assert value(trained(lines, "train_backbone.py")["kda"], "--epochs") == "3"


def test_flags_reach_the_full_budget(commands):
    lines = commands("--controls", *FULL)
    assert {row_of(w) for w in lines if w[1] == "finetune.py" and w[-1].endswith("-s2")} == {
        *trained(lines)
    }
    for words in lines:
        assert not {"--lr-maps", "--epochs", "--summarise"} & {*words}
        assert value(words, "--history") in (None, "20", "3")  # LlamaRec's, and the last 3 alone
    sizes = {value(words, "--samples") for words in trained(lines).values()}
    assert sizes == {"50000", "12500"}
    assert {value(words, "--evals") for words in trained(lines).values()} == {"6"}


def test_what_a_table_takes_is_printed_before_it_is_made(monkeypatch):
    monkeypatch.setattr(minutes.torch.cuda, "is_available", lambda: False)
    asked = ["table2", "--llm", EMBEDDED, "--dry-run"]
    small, controls, more = (
        run_recipe(*asked, *flags) for flags in ([], ["--controls"], ["--budget", 2048])
    )

    def hours(said):
        return float(next(x for x in said.splitlines() if x.startswith("# all")).split()[3])

    assert 1.5 < hours(small) < 2.5  # "two hours on two cores"
    assert hours(controls) > hours(small) and hours(more) > hours(small)
    lines = small.splitlines()
    n = sum(line.startswith("python ") for line in lines)
    assert sum(line.startswith("# ") and ".py " in line for line in lines) == n
    said = dict(line[2:].rsplit(maxsplit=1) for line in lines if line.startswith("# finetune.py"))
    # two orders are asked, a list is read; a summary is written first
    assert float(said["finetune.py recranker-s0"]) > float(said["finetune.py llmseqprompt-s0"])
    assert float(said["finetune.py trsr-recurrent-s0"]) > float(said["finetune.py trsr-words-s0"])


def test_minutes_are_those_of_samples_and_rates():
    words = shlex.split("python finetune.py --input ids --samples 6000 --val-samples 600 --evals 2")
    scored = (600 * 2 + 600 + 300) / minutes.VECTORS_SCORED
    assert minutes.minutes_of(words, 300) == pytest.approx(
        minutes.BEGUN + (6000 / minutes.WINDOWS + scored) / 60
    )
    words = ["python", "train_backbone.py", "--model", "caser", "--folds", "5"]
    folds = 1 + 5 * minutes.FOLD
    assert minutes.minutes_of(words, 300) == minutes.BEGUN + minutes.TRAINED["caser"] * folds


# ---------------------------------------------------------------- controls and pairs


def pairs_of(words):
    """The planned pairs of a table."""
    return [tuple(words[i + 1 : i + 3]) for i, word in enumerate(words) if word == "--compare"]


def test_titles_in_bert4rec_are_always_compared_with_none(commands):
    assert pairs_of(commands()[-1]) == [("llm2bert4rec-s0", "bert4rec-s0")]
    assert ("llm2bert4rec", "bert4rec") in pairs_of(commands("--controls", "--seeds", 2)[-1])


def test_each_control_is_its_row_but_for_what_it_takes_away(commands):
    lines = commands("--controls")
    made = trained(lines) | trained(lines, "train_backbone.py")
    taken = {
        "seqsim-permuted": {"--permute-text"},
        "llm2bert4rec-permuted": {"--permute-text"},
        "kda-permuted": {"--permute-text"},
        "kda-untold": {"--text", "minilm", "--latent-weight", "0"},
        "kda-single": {"--text", "minilm", "--latent", "0"},
        "llara-permuted": {"--permute-vectors"},
        "llara-off": {"off", "batch"},
        "llara-titles": {"--curriculum", "batch", "--lr-maps", "1e-2", "hybrid", "titles"},
        "llamarec-pool": {"--pool", "backbone", "lrurec-s0", "lrurec-folds-s0"},
        "recranker-permuted": {"backbone", "permuted"},
        "recranker-shuffled": {"backbone", "shuffled"},
        "recranker-no-hint": {"backbone", "none"},
        "trsr-words-permuted": {"words", "permuted-words"},
        "trsr-empty": {"words", "empty"},
        "trsr-last": {"--summary", "words", "--history", "3"},
        "trsr-recurrent-permuted": {"recurrent", "permuted-recurrent"},
    }
    assert taken.keys() == table2.EACH_CONTROL.keys()
    compared = pairs_of(lines[-1])
    for row, controls in table2.CONTROLS.items():
        for control in controls:
            own, other = ({w.rsplit("/")[-1] for w in made[x][:-1]} for x in (row, control))
            assert own ^ other <= taken[control] and own != other, control
            assert (f"{row}-s0", f"{control}-s0") in compared
            ranked = [word.split("/")[-1] for word in lines[-1]]
            assert ranked.index(f"{control}-s0") > ranked.index(f"{row}-s0")
    assert ("trsr-recurrent-s0", "trsr-empty-s0") in compared
    # the pool's order, and a history's
    assert [value(w, "--two-stage") for w in lines if "--two-stage" in w] == [
        "backbone",
        "shuffled",
    ]
    assert any("--shuffle-history" in w and "--neighbours" in w for w in lines)


def test_llara_lists_its_candidates_and_answers_once_of_its_own_accord(commands):
    lines = commands("--seeds", 2)
    assert "--show" in trained(lines)["llara"]
    [free] = [words for words in lines if "--free" in words]
    assert value(free, "--ckpt").endswith("/llara-s0")


def test_what_a_training_prompt_says_of_a_backbone_is_out_of_fold(commands):
    lines = commands("--controls")
    folds = {value(w, "--out"): value(w, "--folds") for w in lines if w[1] == "train_backbone.py"}
    for words in trained(lines).values():
        reads = {"--hint", "--pool"} & {*words} or value(words, "--input") != "titles"
        if reads and value(words, "--backbone"):
            assert folds[value(words, "--backbone")] == "5", words


# ---------------------------------------------------------------- what the table says


def test_every_row_says_what_differs_and_what_its_paper_prints():
    plan = SimpleNamespace(llm="a/tiny", input="ids", paper=False, controls=True, budget=1024)
    of_lms = [name for name in table2.OF_LMS if name not in ("e4srec", "trsr-recurrent")]
    notes = table2.notes_of(plan, of_lms)
    rows = {*table2.CONVENTIONAL, *of_lms, "no-prompt", "delrec", "delrec-caser"}
    assert rows <= {*notes["rows"]} and "recranker-no-hint" in notes["rows"]
    assert notes["rows"]["llara"].startswith("LLaRA-style, in kind: titles by their likelihood")
    assert notes["rows"]["delrec"] == "DELRec in kind"
    assert table2.notes_of(SimpleNamespace(**vars(plan) | dict(paper=True)), of_lms)["rows"][
        "delrec"
    ] == ("DELRec by its paper's choices")
    said = "\n".join(notes["below"])
    assert "another protocol: llara on ml-100k HR@1 .4526 (arXiv 2312.02445; " in said
    assert "seqsim on beauty HR@10 .0630, NDCG@10 .0440" in said
    assert "no figure of their own papers is kept here: recranker, trsr-words" in said
    assert "lrurec" not in notes["at_chance"] and "256" not in said
    assert {"llara", "llara-off", "no-prompt", "delrec"} <= {*notes["at_chance"]}


def test_figures_of_the_same_protocol_are_another_table_s():
    assert papers.printed_lines(["sasrec"]) == [
        "no figure of their own papers is kept here: sasrec"
    ]


@pytest.mark.long
def test_table2_runs_with_its_controls_and_ends_in_a_table(here, toy, decoder, monkeypatch):
    for group in (table2.CONVENTIONAL, table2.EACH_CONTROL):
        for method in group.values():
            monkeypatch.setattr(method, "flags", method.flags.replace("minilm", "tfidf"))
    monkeypatch.setattr(table2, "TITLES", "tfidf")
    args = ["table2", "--dataset", toy.folder, "--llm", decoder, "--budget", 80]
    args += ["--test-samples", 20, "--val-samples", 10, "--controls", "--seeds", 1]
    run_recipe(*args)
    folder = here.root / "toy" / "tiny-llama-ids-80" / "table2"
    rows = read_json(folder / "metrics.json")["rows"]
    own = {*table2.CONVENTIONAL, *table2.OF_LMS, *table2.EACH_CONTROL} - {"e4srec"}
    assert {f"{row}-s0" for row in own} <= {*rows}
    assert all(rows[f"{row}-s0"]["said"] for row in own)
    assert rows["llara-permuted-s0"]["paper"] is rows["seqsim-permuted-s0"]["paper"] is None
    text = (folder / "table.txt").read_text()
    assert "what differs from its paper" in text and "ten of them: " in text
    assert f"summaries by {decoder}" in text
    once = len(here.ran)
    run_recipe(*args)
    assert [line[0] for line in here.ran[once:]] == ["evaluate.py"] * 4  # tables alone
