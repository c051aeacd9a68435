"""From the LM to a small LM to a backbone: items as vectors (E4SRec, LLaRA), SLMRec, the export,
DLLM2Rec.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import evaluate
import finetune
import train_backbone as B
from delrec.backbone import dllm2rec, models
from delrec.backbone.losses import list_loss
from delrec.data.prepared import batch_of, candidates, histories, subset, tfidf, users
from delrec.lm import export, samples, slmrec, windows
from delrec.lm.layers import decoder_layers, tap
from delrec.lm.model import load_lm
from delrec.lm.ranker import make_ranker, open_run, score_catalogue, score_samples
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.text import ITEM, embed, encode
from delrec.metrics import metrics
from delrec.runtime import load_run
from delrec.serving.ranking import ranking

BASE = [
    "--k",
    4,
    "--batch",
    8,
    "--micro",
    4,
    "--samples",
    48,
    "--evals",
    1,
    "--val-samples",
    20,
    "--init-r",
    4,
    "--target-r",
    2,
    "--dropout",
    0,
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory, decoder):
    """A decoder of 4 layers with the tiny decoder's tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(3)
    config = AutoConfig.from_pretrained(decoder)
    config.num_hidden_layers, config.layer_types = 4, None
    folder = tmp_path_factory.mktemp("deep") / "deep"
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(decoder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def teacher(toy, sasrec, deep, script, fp32, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "e4srec"
    with fp32():
        script(
            finetune.main,
            "--dataset",
            toy.folder,
            "--llm",
            deep,
            "--backbone",
            sasrec,
            "--input",
            "ids",
            "--out",
            folder,
            *BASE,
            "--history",
            6,
        )
    return folder


@pytest.fixture(scope="module")
def student(toy, sasrec, deep, teacher, script, fp32, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student") / "slmrec"
    with fp32():
        script(
            finetune.main,
            "--dataset",
            toy.folder,
            "--llm",
            deep,
            "--teacher",
            teacher,
            "--layers",
            2,
            "--blocks",
            2,
            "--out",
            folder,
            *BASE,
        )
        script(evaluate.main, "--ckpt", folder, "--export", "--export-k", 5)
    return folder


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ------------------------------------- items as vectors: the loss (tests/test_vectors.py: the rest)


def test_the_loss_on_item_vectors_is_cross_entropy_over_all_items(
    teacher, toy, deep, sasrec, script, on_cpu, tmp_path
):
    # the first logged loss, before anything moved, against a plain computation with transformers
    # alone
    from transformers import AutoModelForCausalLM

    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--llm",
        deep,
        "--backbone",
        sasrec,
        "--input",
        "ids",
        "--out",
        tmp_path / "run",
        *BASE,
        "--history",
        6,
        "--lr",
        1e-9,
        "--lr-maps",
        1e-9,
    )
    found = log_of(tmp_path / "run")[0]["loss"]
    run = load_run(tmp_path / "run", toy)
    t = load_file(tmp_path / "run" / "items.safetensors")
    model = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32)
    r, _ = open_run(run, toy, torch.device("cpu"))
    first, last = windows.draw_windows(toy, 6, 8, 0)
    is_target = np.zeros(len(toy.items), bool)
    is_target[toy.train] = True
    total = n = 0
    for seq, target in zip(*batch_of(toy, first, last, 6, is_target)):
        seq, target = seq[seq > 0], target[seq > 0]
        head = model.get_input_embeddings()(
            torch.from_numpy(np.append(r.prompts.prefix, r.prompts.history([])[0][0]))
        )
        x = torch.cat([head, F.linear(t["E"][seq], t["in.weight"], t["in.bias"])])
        with torch.no_grad():
            states = model.model(inputs_embeds=x[None]).last_hidden_state[0, len(head) :]
        for s, y in zip(states, target):
            if y:
                total, n = (
                    total
                    - (F.linear(s, t["out.weight"], t["out.bias"]) @ t["E"][1:].T)
                    .log_softmax(0)[y - 1]
                    .item(),
                    n + 1,
                )
    assert found == pytest.approx(total / n, rel=1e-3)


def test_an_lm_on_item_vectors_is_stored_opened_and_scored_alike(teacher, toy, script, on_cpu):
    run = load_run(teacher, toy)
    r, penalty = open_run(run, toy, torch.device("cpu"))
    stored = np.load(teacher / "scores_val_15.npy")
    which = subset(len(toy.val), 20, 0)
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)
    np.testing.assert_allclose(
        score_samples(r, "val", which, 15, alone), stored[which], rtol=1e-4, atol=1e-4
    )
    assert (
        run.settings["input"] == "ids"
        and not penalty.any()
        and not (teacher / "soft_prompt.safetensors").exists()
    )
    cand = candidates(toy, "val", 15)[which]
    olds = [h[h > 0] for h in histories(toy, toy.val[which], 6)]
    s = ranking(run, toy, alone)(olds)
    for row, c, own, old in zip(s, cand, stored[which], olds):
        free = ~np.isin(c, old)
        np.testing.assert_allclose(row[c[free]], own[free], rtol=1e-4, atol=1e-4)
        assert (row[old] == -np.inf).all() and np.isfinite(row).sum() == 60 - len(old)


def test_the_table_ranks_the_whole_catalogue_by_an_lm_that_reads_it_at_once(
    teacher, sasrec, toy, script, on_cpu, tmp_path
):
    copy = shutil.copytree(teacher, tmp_path / "e4srec")
    script(evaluate.main, "--ckpt", copy, sasrec, "--limit", 30, "--out", tmp_path / "out")
    which = subset(len(toy.test), 30, 0)
    full = np.load(copy / "full_test.npy")
    assert (full[np.setdiff1d(np.arange(len(toy.test)), which)] == -1).all()
    r, _ = open_run(load_run(copy, toy), toy, torch.device("cpu"))
    start = read_prefix(r.lm, r.prompts.prefix, None)
    for n in which[:6]:
        sample = toy.test[n]
        old = toy.items[toy.ptr[users(toy, np.array([sample]))[0]] : sample]
        s = score_catalogue(r, start, [r.prompts.history(old[-6:])[0]])[0]
        own = s[toy.items[sample]]
        s[old] = -np.inf
        assert full[n, 0] == (s > own).sum()
    stored, cand = np.load(copy / "scores_test_15.npy")[which], candidates(toy, "test", 15)[which]
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)
    np.testing.assert_allclose(
        stored, score_samples(r, "test", which, 15, alone), rtol=1e-4, atol=1e-4
    )
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (
        table["full"]["e4srec"]["hr@20"]
        == pytest.approx(metrics(*full[which].T, (20,))["hr@20"].mean())
        and len(table["full_tests"]) == 1
    )
    assert (
        "paired tests over all items" in (tmp_path / "out" / "table.txt").read_text()
        and cand.shape == stored.shape
    )


@pytest.mark.parametrize("kind", ["encoder_decoder", "encoder"])
def test_other_lms_read_item_vectors_too(kind, toy, sasrec, request, script, tmp_path):
    result = script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--llm",
        request.getfixturevalue(kind),
        "--backbone",
        sasrec,
        "--input",
        "ids",
        "--out",
        tmp_path / "run",
        *BASE,
    )
    assert np.isfinite(result.json["val_hr@1"])


def test_hybrid_learns_with_titles_first_and_vectors_later(
    toy, sasrec, decoder, load, script, on_cpu, tmp_path
):
    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--llm",
        decoder,
        "--backbone",
        sasrec,
        "--input",
        "hybrid",
        "--soft-prompt",
        "random",
        "--verbalizer",
        "mean",
        "--out",
        tmp_path / "run",
        *BASE,
    )
    assert (tmp_path / "run" / "items.safetensors").exists() and load_run(
        tmp_path / "run"
    ).settings["input"] == "hybrid"
    m = load("decoder")
    r = make_ranker(m, toy, load_run(tmp_path / "run").settings)
    cfg = SimpleNamespace(input="hybrid", C=15, loss="candidates", history=10, seed=0)
    share = [
        np.mean(
            [
                (e.tail <= ITEM).any()
                for e in samples.examples(r, cfg, np.arange(100), np.full(100, done))
            ]
        )
        for done in (0, 0.3, 0.7, 1)
    ]
    assert (
        share[0] == 0
        and share[3] == 1
        and abs(share[1] - 0.3) < 0.15
        and abs(share[2] - 0.7) < 0.15
    )


# ---------------------------------------------------------------- SLMRec


def test_a_student_is_a_real_small_model_on_disk(student, teacher, deep, toy):
    run = load_run(student, toy)
    weights, whole = (
        load_file(f"{run.llm}/model.safetensors"),
        load_file(f"{deep}/model.safetensors"),
    )
    assert (
        run.llm == str(student / "lm")
        and json.loads((student / "lm" / "config.json").read_text())["num_hidden_layers"] == 2
    )
    assert all(torch.equal(weights[k], whole[k]) for k in weights) and not any(
        ".layers.2." in k or ".layers.3." in k for k in weights
    )
    assert (student / "lm" / "model.safetensors").stat().st_size < 0.8 * sum(
        t.numel() * 4 for t in whole.values()
    )
    r, _ = open_run(run, toy, torch.device("cpu"))
    assert len(decoder_layers(r.lm)[2]) == 2 and not (student / "teacher_states.npy").exists()
    # the teacher's prompts
    assert run.history == 6 and run.settings["input"] == "ids" and run.teacher == str(teacher)
    assert {"loss", "candidates", "cos", "norm", "ms"} <= set(log_of(student)[0])


def test_the_teacher_s_states_and_the_distillation_terms_are_as_written(
    teacher, toy, deep, sasrec, script, on_cpu, tmp_path
):
    run = load_run(teacher, toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    tap(r.lm, 2)
    first, last = windows.draw_windows(toy, 6, 40, 0)
    is_target = np.zeros(len(toy.items), bool)
    is_target[toy.train] = True

    def of(r, at):
        return windows.window_prompts(r, first[at], last[at], is_target)

    n_reads = np.array([len(e.target) for e in of(r, np.arange(40))])
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)
    seen = SimpleNamespace(n_reads=n_reads, prompts=of)
    states = slmrec.teacher_states(r, seen, 7, tmp_path / "states.npy", alone)
    assert states.bits.shape == (n_reads.sum(), 2, 32)
    # against the body itself with all its hidden states, sample by sample
    for i in (0, 7, 39):
        e = of(r, np.array([i]))[0]
        row = np.append(r.prompts.prefix, e.tail[:-1])
        with torch.no_grad():
            out = r.lm.model.base_model(
                inputs_embeds=embed(r.lm, torch.from_numpy(row)[None], None),
                output_hidden_states=True,
            )
        places = [len(row) - 1, *(len(r.prompts.prefix) + e.at - 1)]
        for j, hidden in ((0, out.hidden_states[2]), (1, out.last_hidden_state)):
            got = (
                torch.from_numpy(np.array(states.bits[states.ptr[i] : states.ptr[i + 1], j]))
                .view(torch.bfloat16)
                .float()
            )
            torch.testing.assert_close(got, hidden[0, places], rtol=1e-2, atol=1e-2)
    # the first step's terms, before anything moved: a student with all the layers and the teacher's
    # own start differs by the adapter only
    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--llm",
        deep,
        "--teacher",
        teacher,
        "--blocks",
        2,
        "--out",
        tmp_path / "run",
        *BASE,
        "--lr",
        1e-9,
        "--lr-maps",
        1e-9,
        "--lambda-cos",
        2,
        "--lambda-norm",
        0.5,
        "--lambda-ms",
        0,
    )
    line = log_of(tmp_path / "run")[0]
    s, _ = open_run(load_run(tmp_path / "run"), toy, torch.device("cpu"))
    tap(s.lm, 2)
    with torch.no_grad():
        batch = of(s, np.arange(8))
        read_examples(s.lm, read_prefix(s.lm, s.prompts.prefix, s.P), batch)
    x = torch.stack(s.lm.tapped, 1)
    t = (
        torch.from_numpy(
            np.array(states.bits[np.concatenate(slmrec.places(states.ptr, np.arange(8)))])
        )
        .view(torch.bfloat16)
        .float()
    )
    assert line["cos"] == pytest.approx(
        2 * (1 - F.cosine_similarity(x, t, dim=2)).mean().item(), rel=2e-2
    )
    assert line["norm"] == pytest.approx(0.5 * (x - t).pow(2).sum(2).mean().item(), rel=2e-2)
    assert (
        line["loss"] == pytest.approx(line["candidates"] + line["cos"] + line["norm"], rel=1e-4)
        and "ms" not in line
    )


def test_a_student_comes_nearer_to_its_teacher(
    toy, deep, teacher, student, script, on_cpu, tmp_path
):
    long = [
        *BASE,
        "--samples",
        800,
        "--lr",
        0.03,
        "--lr-maps",
        0.02,
        "--adapt",
        "linear",
        "--lambda-ms",
        0,
        "--lambda-cos",
        10,
    ]
    script(
        finetune.main,
        "--dataset",
        toy.folder,
        "--llm",
        deep,
        "--teacher",
        teacher,
        "--layers",
        2,
        "--blocks",
        2,
        "--out",
        tmp_path / "run",
        *long,
    )
    terms = [line["cos"] for line in log_of(tmp_path / "run") if "cos" in line]
    assert np.mean(terms[-5:]) < 0.9 * np.mean(terms[:5])


def test_every_control_runs_and_a_student_can_teach(
    toy, deep, sasrec, teacher, student, script, on_cpu, tmp_path
):
    args = [
        "--dataset",
        toy.folder,
        "--llm",
        deep,
        "--backbone",
        sasrec,
        *BASE,
        "--history",
        6,
        "--samples",
        40,
    ]
    # pruned, no teacher
    script(finetune.main, *args, "--input", "ids", "--layers", 2, "--out", tmp_path / "alone")
    # deep supervision
    script(
        finetune.main,
        *args,
        "--input",
        "ids",
        "--layers",
        2,
        "--lambda-ms",
        0.1,
        "--blocks",
        2,
        "--out",
        tmp_path / "deep",
    )
    assert (
        "ms" in log_of(tmp_path / "deep")[0]
        and "cos" not in log_of(tmp_path / "deep")[0]
        and "ms" not in log_of(tmp_path / "alone")[0]
    )
    script(finetune.main, *args, "--teacher", student, "--layers", 1, "--out", tmp_path / "smaller")
    # the student's LM, its adapter merged
    script(
        finetune.main,
        *[*args[:2], "--llm", student, *args[4:]],
        "--input",
        "ids",
        "--out",
        tmp_path / "again",
    )
    r, _ = open_run(load_run(tmp_path / "again"), toy, torch.device("cpu"))
    assert len(decoder_layers(r.lm)[2]) == 2


@pytest.mark.parametrize("verbalizer", ["mean", "letter"])
def test_a_delrec_teacher_teaches_a_small_delrec(
    verbalizer, toy, deep, backbone, script, on_cpu, tmp_path
):
    args = ["--dataset", toy.folder, "--llm", deep, *BASE, "--samples", 40]
    script(
        finetune.main,
        *args,
        "--backbone",
        backbone,
        "--soft-prompt",
        "random",
        "--verbalizer",
        verbalizer,
        "--order",
        "shuffled",
        "--out",
        tmp_path / "t",
    )
    script(
        finetune.main, *args, "--teacher", tmp_path / "t", "--layers", 2, "--out", tmp_path / "s"
    )
    run = load_run(tmp_path / "s")
    assert run.verbalizer == verbalizer and run.settings["order"] == "shuffled"
    assert torch.equal(
        *(load_file(tmp_path / x / "soft_prompt.safetensors")["prompt_embeddings"] for x in "ts")
    )
    assert {"cos", "norm", "ms"} <= set(log_of(tmp_path / "s")[0])


def test_a_killed_student_goes_on_as_if_nothing_had_happened(
    toy, deep, teacher, student, script, on_cpu, tmp_path, monkeypatch
):
    from delrec.training import checkpoints

    args = [
        "--dataset",
        toy.folder,
        "--llm",
        deep,
        "--teacher",
        teacher,
        "--layers",
        2,
        "--blocks",
        2,
        "--out",
        tmp_path / "run",
        *BASE,
    ]
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stop_asked", lambda ranks: next(asked))
        assert CliRunner().invoke(finetune.main, [str(a) for a in args]).exit_code == 75
    assert (tmp_path / "run.unfinished" / "teacher_states.npy").exists()
    script(finetune.main, *args, "--resume")
    a, b = (
        load_file(f / "adapter" / "adapter_model.safetensors") | load_file(f / "items.safetensors")
        for f in (student, tmp_path / "run")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_processes_teach_as_one(toy, deep, teacher, student, two_processes, tmp_path):
    two_processes(
        [
            (
                "finetune",
                [
                    "--dataset",
                    toy.folder,
                    "--llm",
                    deep,
                    "--teacher",
                    teacher,
                    "--layers",
                    2,
                    "--blocks",
                    2,
                    "--out",
                    tmp_path / "run",
                    *BASE,
                ],
            )
        ]
    )
    for x, y in zip(log_of(student), log_of(tmp_path / "run")):
        assert all(
            y[k] == pytest.approx(x[k], rel=1e-3) for k in ("loss", "cos", "norm", "ms") if k in x
        )
    a, b = (load_file(f / "items.safetensors") for f in (student, tmp_path / "run"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-3)


# ---------------------------------------------------------------- the export


def test_an_export_holds_the_best_items_and_what_the_teacher_thinks_of_the_truth(
    student, toy, on_cpu
):
    export = student / "export"
    topk, truth, listed = (np.load(export / f"{x}.npy") for x in ("topk", "truth", "listed"))
    assert topk.shape == listed.shape == (len(toy.train), 5) and truth.shape == (len(toy.train),)
    run = load_run(student, toy)
    r, _ = open_run(run, toy, torch.device("cpu"))
    for n in (0, 17, len(toy.train) - 1):
        old = histories(toy, toy.train[[n]], 50)[0]
        old = old[old > 0]
        s = score_catalogue(
            r, read_prefix(r.lm, r.prompts.prefix, None), [r.prompts.history(old[-6:])[0]]
        )[0]
        p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
        assert truth[n] == pytest.approx(p[toy.items[toy.train[n]]], rel=1e-3)
        s[old] = -np.inf
        assert topk[n].tolist() == np.argsort(-s, kind="stable")[:5].tolist() and listed[
            n
        ] == pytest.approx(p[topk[n]], rel=1e-3)
    Z = np.load(export / "titles.npy")
    lm = load_lm(run.llm, torch.device("cpu"), torch.float32)
    ids = torch.tensor([lm.start + encode(lm, toy.titles[7])])
    with torch.no_grad():
        want = lm.model.base_model(input_ids=ids).last_hidden_state[0, len(lm.start) :].mean(0)
    np.testing.assert_allclose(Z[7], want, rtol=1e-3, atol=1e-3)
    assert not Z[0].any()


def test_a_killed_export_goes_on_and_two_processes_write_the_same(
    student, toy, script, on_cpu, two_processes, monkeypatch, tmp_path
):
    whole = {f.name: np.load(f) for f in (student / "export").glob("*.npy")}
    run = load_run(student, toy)
    alone = SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)
    copy = load_run(shutil.copytree(student, tmp_path / "student"), toy)
    shutil.rmtree(copy.folder / "export")
    real, calls = export.write_json, []
    monkeypatch.setattr(export, "CHUNK", 100)

    def dies(path, value):
        real(path, value)
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            export.export(copy, toy, alone, 5)
    assert not (copy.folder / "export").exists()
    says = script(B.main, "--dataset", toy.folder, "--teacher", copy.folder, code=1).error
    assert "no complete export" in says and "--export" in says
    export.export(copy, toy, alone, 5)
    for name, want in whole.items():
        np.testing.assert_allclose(
            np.load(copy.folder / "export" / name), want, rtol=1e-4, atol=1e-5
        )
    shutil.rmtree(copy.folder / "export")
    two_processes([("evaluate", ["--ckpt", copy.folder, "--export", "--export-k", 5])])
    for name, want in whole.items():
        np.testing.assert_allclose(
            np.load(copy.folder / "export" / name), want, rtol=1e-4, atol=1e-5
        )
    assert run.folder == student


def test_an_lm_that_ranks_title_by_title_exports_its_backbone_s_list_in_its_own_order(
    chain, toy, backbone, script, on_cpu, tmp_path
):
    copy = shutil.copytree(chain.delrec, tmp_path / "delrec")
    config = json.loads((copy / "config.json").read_text()) | {"C": 8}
    (copy / "config.json").write_text(json.dumps(config))
    script(evaluate.main, "--ckpt", copy, "--export", "--export-k", 5, "--limit", 30)
    topk, asked = np.load(copy / "export" / "topk.npy"), subset(len(toy.train), 30, 0)
    assert (np.flatnonzero(topk[:, 0]) == asked).all()
    lists = np.load(backbone / "topk_train.npy")[:, :7]
    assert all(set(topk[n]) <= set(lists[n]) for n in asked) and any(
        topk[n].tolist() != lists[n][:5].tolist() for n in asked
    )


# ---------------------------------------------------------------- DLLM2Rec

TRAIN = ["--epochs", 2, "--width", 16]


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model", ["sasrec", "gru4rec", "caser"])
def test_without_lists_and_titles_the_student_is_the_plain_backbone_bit_for_bit(
    model, toy, student, script, on_cpu, tmp_path
):
    script(B.main, "--dataset", toy.folder, "--model", model, "--out", tmp_path / "plain", *TRAIN)
    script(
        B.main,
        "--dataset",
        toy.folder,
        "--student",
        model,
        "--out",
        tmp_path / "taught",
        *TRAIN,
        "--teacher",
        student,
        "--lam",
        0,
        "--eta",
        0,
    )
    script(
        B.main,
        "--dataset",
        toy.folder,
        "--student",
        model,
        "--out",
        tmp_path / "really",
        *TRAIN,
        "--teacher",
        student,
    )
    a, b, c = (weights(tmp_path / x) for x in ("plain", "taught", "really"))
    assert (
        all(torch.equal(a[k], b[k]) for k in a)
        and a.keys() == b.keys() == c.keys()
        and not torch.equal(a["item.weight"], c["item.weight"])
    )
    assert np.array_equal(
        np.load(tmp_path / "plain" / "scores_test_15.npy"),
        np.load(tmp_path / "taught" / "scores_test_15.npy"),
    )


def test_the_titles_are_folded_into_plain_item_vectors(toy, student, script, on_cpu, tmp_path):
    script(
        B.main,
        "--dataset",
        toy.folder,
        "--out",
        tmp_path / "run",
        *TRAIN,
        "--teacher",
        student,
        "--eta",
        0.5,
        "--lam",
        0,
    )
    model = models.load(tmp_path / "run")
    assert not model.item.weight[0].any() and weights(tmp_path / "run").keys() == weights_of_plain(
        toy
    )
    seq = torch.as_tensor(histories(toy, toy.test, 20))
    with torch.no_grad():
        s = models.score(model, seq)
    got = s.gather(1, torch.as_tensor(candidates(toy, "test", 15)))
    np.testing.assert_allclose(
        got, np.load(tmp_path / "run" / "scores_test_15.npy"), rtol=1e-4, atol=1e-4
    )
    # without the offset every vector is a linear map of its title's: rank at most that of W
    script(
        B.main,
        "--dataset",
        toy.folder,
        "--out",
        tmp_path / "bare",
        *TRAIN,
        "--teacher",
        student,
        "--eta",
        0.5,
        "--no-offset",
    )
    Z = np.load(student / "export" / "titles.npy")[1:]
    e = weights(tmp_path / "bare")["item.weight"][1:].numpy()
    A = np.c_[Z, np.ones(len(Z))]
    assert (
        np.abs(A @ np.linalg.lstsq(A, e, rcond=None)[0] - e).max() < 1e-3 * np.abs(e).max() + 1e-4
    )


def weights_of_plain(toy):
    return (
        models.build("sasrec", 60, SimpleNamespace(history=20, width=16, dropout=0))
        .state_dict()
        .keys()
    )


def test_the_list_loss_is_as_written():
    torch.manual_seed(0)
    net = models.build("sasrec", 30, SimpleNamespace(history=5, width=8, dropout=0))
    x, item, w = torch.randn(4, 8), torch.randint(1, 31, (4, 3)), torch.rand(4, 3)
    w[2, 2] = 0  # a list of two
    # the last is listed: it counts for nothing
    negative = torch.tensor([1, 2, 3, int(item[3, 0])])
    y = x @ net.item.weight.T + net.bias
    own = y[:, 1:].topk(3).values[:, -1]
    for how in ("sigmoid", "softmax"):
        for w_o in (0, 0.4):
            cfg = SimpleNamespace(list_loss=how, w_consistency=w_o)
            want = 0.0
            for s in range(4):
                weight = [
                    w[s, r] + (w_o if y[s, item[s, r]] >= own[s] else 0) if w[s, r] > 0 else 0.0
                    for r in range(3)
                ]
                for r in range(3):
                    term = (
                        -F.logsigmoid(y[s, item[s, r]])
                        - torch.log(1 - torch.sigmoid(y[s, negative[s]])) * (s != 3)
                        if how == "sigmoid"
                        else -y[s, 1:].log_softmax(0)[item[s, r] - 1]
                    )
                    want = want + weight[r] / sum(weight) * term
            torch.testing.assert_close(
                list_loss(net, x, item, w, negative, cfg), want, rtol=1e-4, atol=1e-4
            )


def test_weights_follow_place_and_confidence(student, toy):
    def cfg(**k):
        return SimpleNamespace(
            **{"confidence": "truth", "w_position": 0.3, "w_confidence": 0.5} | k
        )

    by_place = dllm2rec.read_export(student, toy, cfg(w_confidence=0))
    place, Z = by_place.weight, by_place.titles
    assert np.allclose(
        place, 0.3 * np.exp(-np.arange(1, 6)) / np.exp(-np.arange(1, 6)).sum(), rtol=1e-5
    )
    sure = dllm2rec.read_export(student, toy, cfg(w_position=0)).weight
    truth = np.load(student / "export" / "truth.npy")
    # one number a sample, higher where the teacher is right
    assert (np.diff(sure[np.argsort(truth), 0]) >= -1e-7).all() and np.ptp(
        sure, axis=1
    ).max() < 1e-6
    listed = dllm2rec.read_export(student, toy, cfg(w_position=0, confidence="listed")).weight
    assert (np.diff(listed, axis=1) <= 1e-7).all() and np.ptp(listed, axis=1).max() > 0
    assert (
        abs(Z[1:].mean(0)).max() < 1e-5
        and not Z[0].any()
        and Z[1:].norm(dim=1).mean() == pytest.approx(1, rel=1e-4)
    )


@pytest.fixture(scope="module")
def noisy(make_data, student, tmp_path_factory):
    """Data whose next item is 7 i mod 61 three times in ten and anything else otherwise, and an
    export that always lists that item first: what the teacher knows stands in its lists only.
    Returns (data, the run folder).
    """
    rng, rows = np.random.default_rng(5), []
    for u in range(90):
        i = int(rng.integers(1, 61))
        for t in range(14):
            rows.append((u, i, 20 * t + u % 20))
            i = 7 * i % 61 if rng.random() < 0.3 else int(rng.integers(1, 61))
    folder = tmp_path_factory.mktemp("noisy")
    data = make_data(folder, rows, {i: f"film {i}" for i in range(1, 61)}, "noisy")
    # item -> its number in the rule, and back
    ids = np.array([int(t.split()[1]) for t in data.titles[1:]])
    item_of = {n: i for i, n in enumerate(ids, 1)}
    run = edited(
        student,
        folder / "wise",
        dataset="noisy",
        data_folder=str(data.folder),
        data_hash=data.meta["hash"],
    )
    last = histories(data, data.train, 1)[:, 0]
    knows = np.array([item_of[7 * ids[i - 1] % 61] for i in last])
    topk = np.stack([knows, *(rng.integers(1, 61, (4, len(knows))))], 1)
    for name, array in (
        ("topk", topk.astype(np.int32)),
        ("truth", rng.random(len(knows)).astype(np.float32)),
        ("listed", np.tile([0.8, 0.05, 0.05, 0.05, 0.05], (len(knows), 1)).astype(np.float32)),
    ):
        np.save(run / "export" / f"{name}.npy", array)
    return data, run


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--confidence", "listed", "--w-consistency", 0],
        ["--list-loss", "sigmoid"],
        ["--loss", "bce"],
        ["--loss", "sampled", "--negatives", 20],
    ],
)
def test_a_teacher_who_knows_more_than_the_targets_makes_a_better_student(
    extra, noisy, script, on_cpu, tmp_path
):
    data, wise = noisy
    args = [
        "--dataset",
        data.folder,
        "--width",
        32,
        "--epochs",
        12,
        "--dropout",
        0.1,
        "--lr",
        3e-3,
        "--batch",
        16,
    ]
    loss = extra if "--loss" in extra else []
    plain = script(B.main, *args, "--out", tmp_path / "plain", *loss).json
    taught = script(
        B.main,
        *args,
        "--out",
        tmp_path / "taught",
        "--teacher",
        wise,
        "--lam",
        1,
        "--eta",
        0,
        *extra,
    ).json
    assert taught["val_full_ndcg@10"] > 1.04 * plain["val_full_ndcg@10"]


def test_bags_of_words_are_a_teacher_without_an_lm(toy, script, on_cpu, tmp_path):
    Z = dllm2rec.tfidf_vectors(toy)
    id_IT, weight_IT, V = tfidf(toy.titles)
    dense = np.zeros((61, V), np.float32)
    np.add.at(dense, (np.arange(61)[:, None], id_IT), weight_IT)
    # all directions are kept here: the cosines are those of the words
    np.testing.assert_allclose(Z @ Z.T, dense @ dense.T, atol=1e-4)
    script(
        B.main, "--dataset", toy.folder, "--out", tmp_path / "words", *TRAIN, "--teacher", "tfidf"
    )
    script(B.main, "--dataset", toy.folder, "--out", tmp_path / "plain", *TRAIN)
    taught, plain = (
        load_file(tmp_path / x / "model.safetensors")["item.weight"] for x in ("words", "plain")
    )
    assert (
        taught.shape == plain.shape and (taught - plain).abs().max() > 0.01 and not taught[0].any()
    )
    assert (
        "has titles' vectors but no lists"
        in script(B.main, "--dataset", toy.folder, "--teacher", "tfidf", "--lam", 0.5, code=1).error
    )


def test_two_processes_learn_from_a_teacher_as_one(
    toy, student, script, on_cpu, two_processes, tmp_path
):
    args = ["--dataset", toy.folder, *TRAIN, "--dropout", 0, "--teacher", student, "--lam", 0.5]
    script(B.main, *args, "--out", tmp_path / "one")
    two_processes([("train_backbone", [*args, "--out", tmp_path / "two"])])
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- refusals


def test_teachers_that_do_not_fit_are_sentences(
    toy,
    deep,
    decoder,
    encoder,
    teacher,
    student,
    sasrec,
    chain,
    make_data,
    script,
    on_cpu,
    tmp_path,
):
    def says(main, *args):
        return script(main, "--dataset", toy.folder, *args, code=1).error

    other = make_data(
        tmp_path,
        [(u, 1 + (u + i) % 60, u * 20 + i) for u in range(60) for i in range(12)],
        {i: f"film {i}" for i in range(1, 61)},
        "other",
        "--core",
        "1",
    )
    assert (
        "another preparation"
        in script(
            finetune.main,
            "--dataset",
            other.folder,
            "--llm",
            deep,
            "--teacher",
            teacher,
            *BASE,
            code=1,
        ).error
    )
    assert (
        "another preparation"
        in script(B.main, "--dataset", other.folder, "--teacher", student, code=1).error
    )
    assert "--blocks 3 does not divide 4 and 2 layers; use one of 1, 2" in says(
        finetune.main,
        "--llm",
        deep,
        "--teacher",
        teacher,
        "--layers",
        2,
        "--blocks",
        3,
        "--out",
        tmp_path / "x",
        *BASE,
    )
    assert "has 4 layers" in says(
        finetune.main,
        "--llm",
        deep,
        "--input",
        "ids",
        "--backbone",
        sasrec,
        "--layers",
        5,
        "--out",
        tmp_path / "x",
        *BASE,
    )
    assert "must read the same prompts" in says(
        finetune.main, "--llm", deep, "--teacher", teacher, "--history", 9, *BASE
    )
    assert "decoder-only" in says(
        finetune.main,
        "--llm",
        encoder,
        "--input",
        "ids",
        "--backbone",
        sasrec,
        "--layers",
        1,
        "--out",
        tmp_path / "x",
        *BASE,
    )
    assert "no --teacher" in says(finetune.main, "--llm", deep, "--lambda-cos", 1, *BASE)
    assert "likelihood reads a state per title token" in says(
        finetune.main, "--llm", decoder, "--teacher", chain.delrec, *BASE
    )
    assert "--input hybrid" in says(
        finetune.main, "--llm", decoder, "--input", "hybrid", "--loss", "both", *BASE
    )
    assert "no export" in says(B.main, "--teacher", teacher)
    assert "--no-offset" in says(B.main, "--no-offset")
    assert "earlier training" in says(
        B.main, "--teacher", edited(student, tmp_path / "late", seconds=-1)
    )
    assert "is a backbone" in script(evaluate.main, "--ckpt", sasrec, "--export", code=1).error
    # as if it had been trained on that
    vocabulary = edited(
        teacher,
        tmp_path / "words",
        llm=str(another_tokenizer(deep, tmp_path / "lm")),
        llm_fingerprint=None,
    )
    assert "another tokenizer" in says(
        finetune.main,
        "--llm",
        deep,
        "--teacher",
        vocabulary,
        "--layers",
        2,
        "--out",
        tmp_path / "x",
        *BASE,
    )
    assert not (tmp_path / "x").exists()  # nothing half-written
    broken = shutil.copytree(teacher, tmp_path / "broken")
    save_file({"E": torch.zeros(3, 17)}, broken / "items.safetensors")
    assert "items.safetensors" in script(evaluate.main, "--ckpt", broken, code=1).error


def edited(run, folder, **changes):
    shutil.copytree(run, folder)
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )
    return folder


def another_tokenizer(llm, folder):
    shutil.copytree(llm, folder)
    text = (folder / "tokenizer.json").read_text()
    words = json.loads(text)
    a, b = list(words["model"]["vocab"])[-2:]
    words["model"]["vocab"][a], words["model"]["vocab"][b] = (
        words["model"]["vocab"][b],
        words["model"]["vocab"][a],
    )
    (folder / "tokenizer.json").write_text(json.dumps(words))
    return folder
