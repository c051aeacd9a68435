"""recipes/: the commands they give, run on a tiny LM in this process; and the
variants of DELRec they are made of.
"""

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from chain import stages
from click.testing import CliRunner
from safetensors.torch import load_file

import distill
import evaluate
import finetune
import train_backbone
from delrec import runtime
from delrec.data.prepared import subset
from delrec.evaluation.paper import paper_method
from delrec.lm.model import load_lm
from delrec.lm.prompts import PATTERN
from delrec.lm.ranker import make_ranker, open_run, score_samples
from delrec.lm.text import SLOT
from delrec.runtime import NAMES, folder_of, load_run, write_json
from recipes import circle, tables
from recipes import stage as one_stage

MAINS = {
    "train_backbone.py": train_backbone.main,
    "distill.py": distill.main,
    "finetune.py": finetune.main,
    "evaluate.py": evaluate.main,
}


@pytest.fixture
def here(toy, script, on_cpu, tmp_path, monkeypatch):
    """The root of the runs is tmp_path, and stages run in this process, small: .ran lists their
    command lines.
    """
    ran, real = [], one_stage.subprocess.run
    small = {
        "train_backbone.py": ["--epochs", 1, "--width", 16],
        "distill.py": ["--k", 4, "--val-samples", 10, "--history", 8, "--verbalizer", "mean"],
        "finetune.py": ["--val-samples", 10, "--init-r", 4, "--target-r", 2],
        "evaluate.py": [],
    }

    def run(line, **kwargs):
        if line[0] == "git":  # whoever writes down the commit
            return real(line, **kwargs)
        assert line[0] == sys.executable
        args = line[2:] if line[1] == "-u" else line[4:]
        ran.append(args)
        if "ids" in args:  # vectors have no verbalizer
            small["distill.py"] = ["--k", 4, "--val-samples", 10, "--history", 8]
        more = [
            x
            for pair in zip(small[args[0]][::2], small[args[0]][1::2])
            if pair[0] not in args
            for x in pair
        ]
        script(MAINS[args[0]], *args[1:], *more)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    monkeypatch.setattr(one_stage.subprocess, "run", run)
    run.ran, run.root = ran, tmp_path / "runs"
    return run


def recipe(*args):
    done = CliRunner().invoke(tables.main, [str(a) for a in args])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_table3_runs_every_variant_once_and_ends_in_a_table(here, toy, decoder):
    args = [
        "table3",
        "--dataset",
        toy.folder,
        "--llm",
        decoder,
        "--seeds",
        2,
        "--input",
        "titles",
        "--budget",
        80,
        "--test-samples",
        20,
        "--jobs",
        1,
    ]
    recipe(*args)
    home = here.root / "toy" / "tiny-llama-titles-80"
    for s in (0, 1):
        runs = {
            v: load_run(home / f"{v}-s{s}", toy)
            for v in ("no-prompt", "words", "untrained", "delrec")
        }
        assert {v: paper_method(r) for v, r in runs.items()} == {
            "no-prompt": "w/o SP",
            "words": "w MCP",
            "untrained": "w USP",
            "delrec": "DELRec (SASRec)",
        }
        assert all(r.seed == s and r.samples == 80 for r in runs.values())
    found = json.loads((home / "table3" / "metrics.json").read_text())
    assert {
        f"{v}-s{s}" for v in ("no-prompt", "words", "untrained", "delrec", "sasrec") for s in (0, 1)
    } <= set(found["rows"]) and found["reference"] == "delrec-s0"
    assert (
        set(found["seeds"]) >= {"no-prompt", "words", "untrained", "delrec", "sasrec"}
        and found["seeds"]["words"]["against"] == "delrec"
    )
    assert (home / "table3" / "table3.html").stat().st_size > 10000 and (
        home / "table3" / "seeds.png"
    ).exists()
    words = found["seeds"]["words"]
    # the means, for a paper
    line = next(
        x
        for x in (home / "table3" / "table.md").read_text().splitlines()
        if x.startswith("| words |")
    )
    assert (
        f"{words['hr@1'][0]:.3f}"[1:] in line
        and "| 2 |" in line
        and f"{words['hr@1_gain']:+.3f}" in line
        and "| delrec |" in line
    )
    assert (
        "$\\pm$" in (home / "table3" / "table.tex").read_text()
        and "±" in (home / "table3" / "table3.html").read_text()
    )
    once = len(here.ran)
    # a backbone, a prompt, four fine-tuned LMs a seed; one table
    assert once == 2 * (1 + 1 + 4) + 1
    recipe(*args)
    # finished runs are not repeated
    assert len(here.ran) == once + 1 and here.ran[-1][0] == "evaluate.py"


def test_a_finished_run_of_another_budget_is_not_taken_for_this_one(here, toy, decoder):
    args = [
        "table3",
        "--dataset",
        toy.folder,
        "--llm",
        decoder,
        "--seeds",
        1,
        "--input",
        "titles",
        "--budget",
        80,
    ]
    folder = here.root / "toy" / "tiny-llama-titles-80" / "no-prompt-s0"
    folder.mkdir(parents=True)
    write_json(
        folder / "config.json", {"stage": "finetune", "input": "titles", "samples": 640, "seed": 0}
    )
    done = CliRunner().invoke(tables.main, [str(a) for a in args])
    assert (
        done.exit_code == 1
        and "was made with --samples 640, here it is 80" in str(done.exc_info[1]) + done.output
    )
    write_json(
        folder / "config.json",
        {
            "stage": "finetune",
            "input": "titles",
            "samples": 80,
            "seed": 0,
            "backbone_run": "/elsewhere/runs/toy/gru4rec-s0",
        },
    )
    done = CliRunner().invoke(tables.main, [str(a) for a in args])
    assert (
        done.exit_code == 1
        and "gru4rec-s0, here it is toy/sasrec-s0" in str(done.exc_info[1]) + done.output
    )


def test_table5_speaks_of_all_seeds(here, toy, decoder):
    out = recipe(
        "table5",
        "--dataset",
        toy.folder,
        "--llm",
        decoder,
        "--seeds",
        2,
        "--budget",
        80,
        "--test-samples",
        20,
        "--jobs",
        1,
    )
    found = json.loads(
        (here.root / "toy" / "tiny-llama-ids-80" / "table5" / "metrics.json").read_text()
    )
    density, base, delrec, gain, p, fused = next(
        x.split()[1:] for x in out.splitlines() if x.startswith("toy ")
    )
    assert float(base) == pytest.approx(found["seeds"]["sasrec"]["hr@1"][0], abs=6e-4) and float(
        delrec
    ) == pytest.approx(found["seeds"]["delrec"]["hr@1"][0], abs=6e-4)
    assert float(gain) == pytest.approx(found["seeds"]["delrec"]["hr@1_gain"], abs=6e-4) and float(
        p
    ) == pytest.approx(found["seeds"]["delrec"]["p_hr@1"], rel=0.01)


def test_two_seeds_run_side_by_side_each_in_its_order(here, toy, decoder, monkeypatch):
    meet, ran, lock = threading.Barrier(2), [], threading.Lock()

    def run(line, env, stdout, **_):
        # the table, by as many processes as stood side by side
        args = line[2:] if line[1] == "-u" else line[4:]
        seed = args[args.index("--seed") + 1] if "--seed" in args else None
        with lock:
            ran.append((args[0], seed, env.get("OMP_NUM_THREADS"), getattr(stdout, "name", None)))
        if args[0] == "train_backbone.py":
            meet.wait(60)  # passes only when both seeds are at it
        if seed is not None:
            folder = folder_of("runs", args[args.index("--out") + 1])
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            stdout.write("said\n")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(one_stage.subprocess, "run", run)
    monkeypatch.setattr(one_stage.os, "cpu_count", lambda: 8)
    # two is what a machine without GPUs gets
    out = recipe(
        "table3",
        "--dataset",
        toy.folder,
        "--llm",
        decoder,
        "--seeds",
        2,
        "--input",
        "titles",
        "--budget",
        80,
    )
    for seed in "01":
        own = [x for x in ran if x[1] == seed]
        assert [x[0] for x in own] == [
            "train_backbone.py",
            *["finetune.py"] * 3,
            "distill.py",
            "finetune.py",
        ] and {x[2] for x in own} == {"4"}
        assert (
            own[-1][3].endswith(f"delrec-s{seed}.out") and Path(own[-1][3]).read_text() == "said\n"
        )
    assert out.count(" took ") == len(ran) - 1 and [
        x[:2] for x in ran if x[0] == "evaluate.py"
    ] == [("evaluate.py", None)]


def test_every_recipe_names_flags_that_exist(toy, decoder, monkeypatch):
    monkeypatch.setattr(tables, "shape", lambda llm: ("decoder", 4))
    for name in tables.RECIPES:
        lines = [
            x.split()
            for x in recipe(
                name,
                "--dataset",
                toy.folder,
                "--llm",
                decoder,
                "--seeds",
                1,
                "--dry-run",
                "--procs",
                10,
            ).splitlines()
            if x
        ]
        one_stage.SHOWN.clear()
        assert (
            lines
            and all(x[:2] == ["torchrun", "--nproc_per_node=10"] for x in lines)
            and len({" ".join(x) for x in lines}) == len(lines)
        )
        for _, _, program, *args in lines:
            known = {o for p in MAINS[program].params for o in getattr(p, "opts", [])}
            assert {a for a in args if a.startswith("--")} <= known, (name, program)
            # values too are of the right kind
            with MAINS[program].make_context(program, args) as context:
                assert context.params
        assert lines[-1][2] == "evaluate.py"


def test_item_vectors_are_distilled_in_the_form_they_are_read_in(toy, decoder, monkeypatch):
    monkeypatch.setattr(tables, "shape", lambda llm: ("decoder", 4))
    for name in ("table2", "table3", "table4"):
        out = recipe(
            name,
            "--dataset",
            toy.folder,
            "--llm",
            decoder,
            "--seeds",
            1,
            "--dry-run",
            "--budget",
            800,
        ).splitlines()
        one_stage.SHOWN.clear()
        assert (
            all("--input ids" in x for x in out if "distill.py" in x)
            and sum("no-prompt-s0" in x and "finetune.py" in x for x in out) == 1
        )
        assert ("--maps toy/tiny-llama-ids-800/prompt-s0 " in " ".join(out)) == (name == "table3")
        # a title costs more than a vector: what reads titles sees a quarter
        if name == "table2":
            of = {
                x.split("--out ")[1].split("/")[-1]: x.split("--samples ")[1].split()[0]
                for x in out
                if "finetune.py" in x
            }
            assert all("--samples 200 " in x for x in out if "distill.py" in x)
            assert of == {
                "llara-s0": "200",
                "llamarec-s0": "200",
                "llmseqprompt-s0": "200",
                "no-prompt-s0": "800",
                "delrec-s0": "800",
                "delrec-gru4rec-s0": "800",
                "delrec-caser-s0": "800",
            }


@pytest.mark.parametrize(
    "name, models",
    [("headline", ["sasrec", "gru4rec"]), ("table2", ["sasrec", "gru4rec", "caser"])],
)
def test_backbones_get_three_seeds_where_they_are_what_is_beaten(name, models, toy, decoder):
    out = recipe(
        name, "--dataset", toy.folder, "--llm", decoder, "--seeds", 1, "--dry-run"
    ).splitlines()
    one_stage.SHOWN.clear()
    assert sorted(
        x.split("--out ")[1].split("/")[1] for x in out if "train_backbone.py" in x
    ) == sorted(f"{m}-s{s}" for m in models for s in range(3))
    assert all(
        f"toy/{m}-s{s} " in out[-1] for m in models for s in range(3)
    ) and "delrec-s1" not in " ".join(out)
    if name == "headline":
        assert all(f"--fuse sasrec-s{s}+gru4rec-s{s} co-occurrence" in out[-1] for s in range(3))


def test_an_lm_that_is_no_decoder_gets_the_rows_that_it_can_have(toy, encoder_decoder):
    args = ["--dataset", toy.folder, "--llm", encoder_decoder, "--seeds", 1, "--dry-run"]
    for name, without in (("table2", ["llmseqprompt"]), ("table4", ["half-lm"])):
        said, *lines = recipe(name, *args, "--input", "titles").splitlines()
        one_stage.SHOWN.clear()
        assert f"without {', '.join(without)}: " in said and "encoder-decoder" in said
        assert (
            "delrec-s0" in lines[-1]
            and not any(f"{n}-s0" in x for x in lines for n in without)
            and not any("--loss titles" in x or "--layers" in x for x in lines)
        )
    done = CliRunner().invoke(tables.main, [str(a) for a in ["table3", *args]])
    assert (
        done.exit_code == 1
        and "(--input ids) reads a state after every item" in str(done.exc_info[1]) + done.output
    )


def test_fig8_moves_one_number_at_a_time(toy, decoder):
    out = recipe("fig8", "--dataset", toy.folder, "--llm", decoder, "--seeds", 1, "--dry-run")
    one_stage.SHOWN.clear()
    prompts = [x for x in out.splitlines() if "distill.py" in x]
    assert len(prompts) == 1 + 5 + 4
    assert sorted(int(x.split("--k ")[1].split()[0]) for x in prompts if "--k " in x) == [
        20,
        40,
        60,
        100,
        120,
    ]
    assert sorted(int(x.split("--h ")[1].split()[0]) for x in prompts if "--h " in x) == [
        5,
        15,
        20,
        25,
    ]


def test_a_stage_that_fails_ends_the_recipe(here, toy, decoder, monkeypatch):
    monkeypatch.setattr(
        one_stage.subprocess, "run", lambda line, **_: type("Done", (), {"returncode": 75})
    )
    done = CliRunner().invoke(
        tables.main, ["table3", "--dataset", str(toy.folder), "--llm", decoder]
    )
    assert done.exit_code == 1 and "stopped with exit code 75" in str(
        done.exception
    ) + done.output + str(done.exc_info[1])


def test_a_data_set_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    done = CliRunner().invoke(tables.main, ["table2", "--dataset", "nothing"])
    assert done.exit_code == 1 and "no prepared data set in" in done.output


# ---------------------------------------------------------------- the variants


def test_the_pattern_in_words_stands_where_the_vectors_stood(load, toy):
    m = load("decoder")
    settings = {
        "verbalizer": "mean",
        "show": False,
        "history": 5,
        "max_title": 32,
        "max_tokens": 1000,
        "backbone": "GRU4Rec",
        "order": "shuffled",
        "backbone_run": "",
        "words": True,
    }
    said = m.tok.decode(make_ranker(m, toy, settings).prompts.prefix)
    assert (
        "GRU4Rec reads the movies one after another" in said and "Movies the user watched" in said
    )
    plain = make_ranker(m, toy, settings | {"words": False}).prompts.prefix
    assert SLOT not in plain and "GRU4Rec" not in m.tok.decode(plain)
    assert len({PATTERN[x] for x in NAMES.values()}) == 3


def test_words_are_scored_as_they_were_trained(
    toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    _, tune = stages(toy, backbone, decoder, "words", tmp_path / "words")
    script(finetune.main, *tune, "--backbone", backbone)
    run = load_run(tmp_path / "words", toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    assert (
        r.P is None
        and "SASRec weighs all movies" in r.lm.tok.decode(r.prompts.prefix)
        and paper_method(run) == "w MCP"
    )
    val = subset(len(toy.val), 30, 0)
    np.testing.assert_allclose(
        score_samples(r, "val", val, 15, alone),
        np.load(tmp_path / "words" / "scores_val_15.npy")[val],
        atol=1e-4,
    )


def test_stage_2_moves_the_prompt_only_if_asked(
    chain, toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    _, tune = stages(toy, backbone, decoder, chain.prompt, tmp_path / "moved")
    script(finetune.main, *tune, "--lr-prompt", 0.01)
    before, after = (
        load_file(f / "soft_prompt.safetensors")["prompt_embeddings"]
        for f in (chain.prompt, tmp_path / "moved")
    )
    assert (before - after).abs().max() > 0.005
    run = load_run(tmp_path / "moved", toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    val = subset(len(toy.val), 30, 0)
    np.testing.assert_allclose(
        score_samples(r, "val", val, 15, alone),
        np.load(tmp_path / "moved" / "scores_val_15.npy")[val],
        atol=1e-4,
    )
    assert paper_method(run) == "w ULSR"
    assert (
        "--soft-prompt is none"
        in script(
            finetune.main,
            *tune,
            "--lr-prompt",
            0.01,
            "--soft-prompt",
            "none",
            "--overwrite",
            code=1,
        ).error
    )


def test_stage_1_moves_the_lm_only_if_asked_and_stage_2_goes_on_from_it(
    toy, backbone, decoder, script, on_cpu, tmp_path, alone
):
    distil, tune = stages(toy, backbone, decoder, tmp_path / "prompt", tmp_path / "delrec")
    script(distill.main, *distil, "--lr-lm", 0.003)
    weights = load_file(tmp_path / "prompt" / "adapter" / "adapter_model.safetensors")
    assert weights and all(p.abs().max() > 0 for p in weights.values())
    moved, plain = (
        load_lm(str(tmp_path / "prompt"), torch.device("cpu"), torch.float32),
        load_lm(decoder, torch.device("cpu"), torch.float32),
    )
    changed = [
        n
        for (n, a), b in zip(moved.model.named_parameters(), plain.model.parameters())
        if not torch.equal(a, b)
    ]
    assert changed and all("q_proj" in n or "v_proj" in n for n in changed)
    script(finetune.main, *tune)
    run = load_run(tmp_path / "delrec", toy)
    assert run.llm == str(tmp_path / "prompt") and paper_method(run) == "w UDPSM"
    r, _ = open_run(run, toy, torch.device("cpu"))
    val = subset(len(toy.val), 30, 0)
    np.testing.assert_allclose(
        score_samples(r, "val", val, 15, alone),
        np.load(tmp_path / "delrec" / "scores_val_15.npy")[val],
        atol=1e-4,
    )
    # again, without: nothing of the adapter stays
    script(distill.main, *distil, "--overwrite")
    assert not (tmp_path / "prompt" / "adapter").exists()


def test_a_killed_stage_1_with_an_adapter_goes_on_exactly(
    toy, backbone, decoder, script, on_cpu, tmp_path
):
    from delrec.training import checkpoints

    for name, stop_at in (("whole", None), ("cut", 3)):
        args, _ = stages(toy, backbone, decoder, tmp_path / name, "")
        args += ["--lr-lm", 0.003, "--checkpoint-every", 1]
        if stop_at:
            with pytest.MonkeyPatch.context() as patch:
                save = checkpoints.Saver.save

                def save_and_die(self, step, *rest):
                    save(self, step, *rest)
                    if step == stop_at:
                        raise KeyboardInterrupt

                patch.setattr(checkpoints.Saver, "save", save_and_die)
                CliRunner().invoke(distill.main, [str(a) for a in args])
            assert not (tmp_path / name / "config.json").exists()
            args += ["--resume"]
        script(distill.main, *args)
    for part in ("soft_prompt.safetensors", "adapter/adapter_model.safetensors"):
        a, b = (load_file(tmp_path / n / part) for n in ("whole", "cut"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), part


# ---------------------------------------------------------------- the circle


def test_the_circle_closes(here, toy, decoder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    m = AutoModelForCausalLM.from_pretrained(decoder)
    (
        m.save_pretrained(tmp_path / "lm"),
        AutoTokenizer.from_pretrained(decoder).save_pretrained(tmp_path / "lm"),
    )
    args = [
        "--dataset",
        toy.folder,
        "--llm",
        tmp_path / "lm",
        "--layers",
        1,
        "--windows",
        80,
        "--small-windows",
        80,
        "--val-samples",
        10,
        "--test-samples",
        30,
        "--procs",
        1,
    ]
    done = CliRunner().invoke(circle.main, [str(a) for a in args])
    if done.exception:
        raise done.exception
    rows = {x["name"]: x["value"] for x in json.loads(done.output.strip().splitlines()[-1])["rows"]}
    assert {
        "slmrec.speedup.inference",
        "slmrec.speedup.training",
        "slmrec.hr@1_vs_teacher",
        "slmrec.hr@1_vs_teacher_low",
        "slmrec.hr@1_vs_teacher_high",
        "dllm2rec.latency_ms",
        "dllm2rec.hr20_gain",
        "dllm2rec.p_value",
    } <= set(rows)
    table = json.loads((here.root / "toy" / "circle" / "metrics.json").read_text())["rows"]
    assert rows["slmrec.hr@1_vs_teacher"] == pytest.approx(
        table["slmrec"]["hr@1"] - table["e4srec"]["hr@1"], abs=1e-4
    )
    assert (
        rows["slmrec.hr@1_vs_teacher_low"]
        <= rows["slmrec.hr@1_vs_teacher"]
        <= rows["slmrec.hr@1_vs_teacher_high"]
        and rows["dllm2rec.latency_ms"] > 0
    )
    taught = load_run(here.root / "toy" / "circle" / "sasrec-taught")
    assert taught.teacher == "toy/circle/slmrec" and len(here.ran) == 10
    again = CliRunner().invoke(circle.main, [str(a) for a in args])
    assert not again.exception and len(here.ran) == 11  # the table only
