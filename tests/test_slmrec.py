"""slmrec.py: a small LM learns from the blocks of a larger one (SLMRec)."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from commands import adapter_of, edit_config, log_of, prompt_of
from safetensors.torch import load_file
from scripts import sentence
from vector_runs import SMALL

import finetune
from delrec.lm import slmrec, windows
from delrec.lm.items import item_space
from delrec.lm.layers import decoder_layers, tap
from delrec.lm.ranker import open_run
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.text import embed
from delrec.runtime import load_run, read_json, write_json
from delrec.training import checkpoints

CPU = torch.device("cpu")


# ---------------------------------------------------------------- the student


def test_a_student_is_a_real_small_model_on_disk(student, teacher, deep, toy):
    trained = load_run(student, toy)
    weights = load_file(f"{trained.llm}/model.safetensors")
    whole = load_file(f"{deep}/model.safetensors")
    assert trained.llm == str(student / "lm")
    assert json.loads((student / "lm" / "config.json").read_text())["num_hidden_layers"] == 2
    assert all(torch.equal(weights[k], whole[k]) for k in weights)
    assert not any(".layers.2." in k or ".layers.3." in k for k in weights)
    size = (student / "lm" / "model.safetensors").stat().st_size
    assert size < 0.8 * sum(t.numel() * 4 for t in whole.values())
    r, _ = open_run(trained, toy, CPU)
    assert len(decoder_layers(r.lm)[2]) == 2
    assert not (student / "teacher_states.npy").exists()


def test_a_student_reads_its_teacher_s_prompts_and_logs_each_term(student, teacher, toy):
    trained = load_run(student, toy)
    assert trained.history == 6
    assert trained.settings["input"] == "ids"
    assert trained.teacher == str(teacher)
    assert {"loss", "candidates", "cos", "norm", "ms"} <= set(log_of(student)[0])


def test_a_student_comes_nearer_to_its_teacher(to_student, run, on_cpu, tmp_path):
    long = "--samples 800 --lr 0.03 --lr-maps 0.02 --adapt linear --lambda-ms 0 --lambda-cos 10"
    run(finetune.main, f"{to_student} {long} --out {tmp_path}/run")
    terms = [line["cos"] for line in log_of(tmp_path / "run") if "cos" in line]
    assert np.mean(terms[-5:]) < 0.9 * np.mean(terms[:5])


# ---------------------------------------------------------------- its states and terms


@pytest.fixture
def seen(toy):
    """40 windows that teacher and student read."""
    return windows.Windows(toy, 6, 40, 0)


@pytest.fixture
def tapped(teacher, toy, on_cpu):
    """The teacher as a ranker whose LM keeps the states after each of two blocks."""
    r, _ = open_run(load_run(teacher, toy), toy, CPU)
    tap(r.lm, 2)
    return r


@pytest.fixture
def states(tapped, seen, alone, tmp_path):
    """The teacher's states at the reads of those windows."""
    saver = checkpoints.Saver(tmp_path, 0, {}, alone)
    return slmrec.teacher_states(tapped, seen, SimpleNamespace(micro=7), saver)


def test_the_teacher_s_states_are_those_of_its_body(tapped, seen, states):
    n_reads = np.array([len(e.target) for e in seen.prompts(tapped, np.arange(40))])
    assert states.bits.shape == (n_reads.sum(), 2, 32)
    # against the body itself with all its hidden states, sample by sample
    r = tapped
    for i in (0, 7, 39):
        e = seen.prompts(r, np.array([i]))[0]
        row = np.append(r.prompts.prefix, e.tail[:-1])
        with torch.no_grad():
            out = r.lm.model.base_model(
                inputs_embeds=embed(r.lm, torch.from_numpy(row)[None], None),
                output_hidden_states=True,
            )
        places = [len(row) - 1, *(len(r.prompts.prefix) + e.at - 1)]
        for block, hidden in enumerate((out.hidden_states[2], out.last_hidden_state)):
            bits = np.array(states.bits[states.ptr[i] : states.ptr[i + 1], block])
            got = torch.from_numpy(bits).view(torch.bfloat16).float()
            torch.testing.assert_close(got, hidden[0, places], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how, power", [("l2", 1), ("squared", 2)])
def test_the_distillation_terms_are_as_written(
    how, power, states, seen, toy, deep, teacher, run, on_cpu, tmp_path
):
    # the first step's terms, before anything moved: a student with all the layers and the teacher's
    # own start differs by the adapter only
    run(
        finetune.main,
        f"--dataset {toy.folder} --llm {deep} --teacher {teacher} --blocks 2 --out {tmp_path}/run "
        f"{SMALL} --lr 1e-9 --lr-maps 1e-9 --lambda-cos 2 --lambda-norm 0.5 --norm {how} "
        "--lambda-logits 3 --lambda-ms 0",
    )
    line = log_of(tmp_path / "run")[0]
    s, _ = open_run(load_run(tmp_path / "run"), toy, CPU)
    tap(s.lm, 2)
    with torch.no_grad():
        start = read_prefix(s.lm, s.prompts.prefix, s.P)
        read_examples(s.lm, start, seen.prompts(s, np.arange(8)))
    x = torch.stack(s.lm.tapped, 1)
    rows = np.concatenate(slmrec.places(states.ptr, np.arange(8)))
    t = torch.from_numpy(np.array(states.bits[rows])).view(torch.bfloat16).float()
    cos = 2 * (1 - F.cosine_similarity(x, t, dim=2)).mean().item()
    norm = 0.5 * (x - t).norm(dim=2).pow(power).mean().item()
    # both read their last states by the teacher's map
    with torch.no_grad():
        p_t, p_s = ((item_space(s.lm, z[:, -1]) @ s.lm.items.E[1:].T).softmax(1) for z in (t, x))
    logits = 3 * (p_t * (p_t / p_s).log()).sum(1).mean().item()
    assert line["cos"] == pytest.approx(cos, rel=2e-2)
    assert line["norm"] == pytest.approx(norm, rel=2e-2)
    assert line["logits"] == pytest.approx(logits, rel=5e-2)
    parts = [line[name] for name in ("candidates", "cos", "norm", "logits")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-4)
    assert "ms" not in line


def terms_of(x_s, x_t, **cfg):
    """The terms of one read after one block, and the gradient of D_norm."""
    x_s = torch.tensor([x_s], requires_grad=True)
    lm = SimpleNamespace(taps=(), tapped=[x_s])
    usual = {"input": "titles", "lambda_cos": 1, "lambda_norm": 1, "lambda_ms": 0, "norm": "l2"}
    cfg = SimpleNamespace(**usual | {"lambda_logits": 0} | cfg)
    told = SimpleNamespace(of=lambda batch: torch.tensor([[x_t]]))
    task = SimpleNamespace(scores_from=lambda x, batch: x)
    blocks = slmrec.BlockLosses(lm, torch.nn.ModuleDict(), cfg, told)
    found = blocks.losses(task, [None])
    found["norm"].backward(retain_graph=True)
    return {name: term.item() for name, term in found.items()}, x_s.grad


def test_the_terms_by_hand():
    # a distance of 5 in the direction (.6, .8), at cos 24 / 25
    found, grad = terms_of([6.0, 8.0], [3.0, 4.0])
    assert found == pytest.approx({"cos": 0, "norm": 5}, abs=1e-6)
    torch.testing.assert_close(grad, torch.tensor([[0.6, 0.8]]))
    found, grad = terms_of([6.0, 8.0], [3.0, 4.0], norm="squared")
    assert found["norm"] == pytest.approx(25)
    torch.testing.assert_close(grad, torch.tensor([[6.0, 8.0]]))
    assert terms_of([4.0, 3.0], [3.0, 4.0])[0]["cos"] == pytest.approx(1 - 24 / 25)
    # p_t = (.25, .75), p_s = (.5, .5): .25 log .5 + .75 log 1.5
    found, _ = terms_of([0.0, 0.0], [0.0, float(np.log(3))], lambda_logits=2)
    assert found["logits"] == pytest.approx(2 * 0.130812, rel=1e-4)


def test_the_inner_blocks_term_is_a_mean_over_them_and_leaves_out_the_last():
    lm = SimpleNamespace(tapped=[torch.tensor([row]) for row in ([1.0, 2], [3, 4], [50, 60])])
    maps = torch.nn.ModuleDict({f"block{j}": torch.nn.Identity() for j in (1, 2)})
    cfg = SimpleNamespace(input="titles", lambda_ms=2)
    blocks = slmrec.BlockLosses(lm, maps, cfg, None)
    found = blocks.losses(SimpleNamespace(loss_from=lambda x, batch: x.sum()), [])
    assert found["ms"].item() == 2 * (3 + 7) / 2


def test_a_student_that_is_where_its_teacher_is_stays_there():
    found, grad = terms_of([3.0, 4.0], [3.0, 4.0])
    assert found["norm"] == 0
    assert not grad.any()  # not NaN, as the square root's slope at 0 would make it


def test_a_student_s_scores_come_nearer_to_its_teacher_s(to_student, run, on_cpu, tmp_path):
    alone = "--lambda-cos 0 --lambda-norm 0 --lambda-ms 0 --samples 800 --lr 0.03 --adapt mlp"
    run(finetune.main, f"{to_student} {alone} --lambda-logits 3 --out {tmp_path}/run")
    terms = [line["logits"] for line in log_of(tmp_path / "run")]
    assert np.mean(terms[-5:]) < 0.9 * np.mean(terms[:5])
    assert not any(name in log_of(tmp_path / "run")[0] for name in ("cos", "norm", "ms"))


# ---------------------------------------------------------------- controls and other teachers


def test_a_pruned_lm_learns_without_a_teacher_and_with_deep_supervision(
    to_teacher, run, on_cpu, tmp_path
):
    pruned = f"{to_teacher} --samples 40 --layers 2"
    run(finetune.main, f"{pruned} --out {tmp_path}/alone")
    run(finetune.main, f"{pruned} --lambda-ms 0.1 --blocks 2 --out {tmp_path}/deep")
    first = log_of(tmp_path / "deep")[0]
    assert "ms" in first
    assert "cos" not in first
    assert "ms" not in log_of(tmp_path / "alone")[0]
    assert load_run(tmp_path / "deep").blocks == 2
    assert load_run(tmp_path / "alone").blocks is None


def test_a_student_can_teach(toy, deep, sasrec, student, run, on_cpu, tmp_path):
    run(
        finetune.main,
        f"--dataset {toy.folder} --llm {deep} --backbone {sasrec} {SMALL} --history 6 "
        f"--samples 40 --teacher {student} --layers 1 --lambda-ms 0 --out {tmp_path}/smaller",
    )
    r, _ = open_run(load_run(tmp_path / "smaller"), toy, CPU)
    assert len(decoder_layers(r.lm)[2]) == 1


def test_a_student_s_lm_is_an_lm_its_adapter_merged(toy, sasrec, student, run, on_cpu, tmp_path):
    run(
        finetune.main,
        f"--dataset {toy.folder} --llm {student} --backbone {sasrec} {SMALL} --history 6 "
        f"--samples 40 --input ids --out {tmp_path}/again",
    )
    r, _ = open_run(load_run(tmp_path / "again"), toy, CPU)
    assert len(decoder_layers(r.lm)[2]) == 2


@pytest.mark.parametrize("verbalizer", ["mean", "letter"])
def test_a_delrec_teacher_teaches_a_small_delrec(
    verbalizer, toy, deep, backbone, run, on_cpu, tmp_path
):
    small = f"--dataset {toy.folder} --llm {deep} {SMALL} --samples 40"
    run(
        finetune.main,
        f"{small} --backbone {backbone} --soft-prompt random --verbalizer {verbalizer} "
        f"--order shuffled --out {tmp_path}/t",
    )
    run(finetune.main, f"{small} --teacher {tmp_path}/t --layers 2 --out {tmp_path}/s")
    trained = load_run(tmp_path / "s")
    assert trained.verbalizer == verbalizer
    assert trained.settings["order"] == "shuffled"
    assert torch.equal(prompt_of(tmp_path / "t"), prompt_of(tmp_path / "s"))
    assert {"cos", "norm", "ms"} <= set(log_of(tmp_path / "s")[0])


# ---------------------------------------------------------------- what a run promises


def tensors_of(folder) -> dict:
    """What a student learnt: its adapter and its maps."""
    return adapter_of(folder) | load_file(folder / "items.safetensors")


def test_a_killed_student_goes_on_as_if_nothing_had_happened(
    to_student, student, run, on_cpu, tmp_path, monkeypatch
):
    again = f"{to_student} --out {tmp_path}/run"
    asked = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "stop_asked", lambda ranks: next(asked))
        assert CliRunner().invoke(finetune.main, again.split()).exit_code == checkpoints.STOPPED
    path = tmp_path / "run.unfinished" / "teacher_states.json"
    assert path.with_suffix(".npy").exists() and 0 < read_json(path)["seconds"] < 1e3
    write_json(path, {"seconds": 1e4})
    # states of another shape
    for flag, was, now, beside in (("samples", 48, 80, ""), ("blocks", 2, 1, "--lambda-ms 0")):
        typed = f"{again} --{flag} {now} {beside} --resume".split()
        said = CliRunner().invoke(finetune.main, typed).output
        assert f"{flag} was {was}, now it is {now}" in said
    run(finetune.main, f"{again} --resume")
    a, b = tensors_of(student), tensors_of(tmp_path / "run")
    assert all(torch.equal(a[k], b[k]) for k in a)
    # the teacher's pass of the killed process counts, once
    trained = load_run(tmp_path / "run")
    assert trained.states_seconds == 1e4 < trained.seconds < 1.9e4
    assert not list((tmp_path / "run").glob("teacher_states*"))


def test_two_processes_teach_as_one(to_student, student, two_processes, tmp_path):
    two_processes([("finetune", f"{to_student} --out {tmp_path}/run".split())])
    for x, y in zip(log_of(student), log_of(tmp_path / "run")):
        terms = [k for k in ("loss", "cos", "norm", "ms") if k in x]
        assert [y[k] for k in terms] == pytest.approx([x[k] for k in terms], rel=1e-3)
    a, b = (load_file(f / "items.safetensors") for f in (student, tmp_path / "run"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=2e-3)


# ---------------------------------------------------------------- refusals


@pytest.fixture
def says(toy, refused, on_cpu, tmp_path):
    """says(options) -> how finetune.py refuses them; nothing is half-written."""

    def sentence(options):
        where = f"--dataset {toy.folder} --out {tmp_path}/x"
        said = refused(finetune.main, f"{where} {options} {SMALL}")
        assert not (tmp_path / "x").exists()
        return said

    return sentence


def test_layers_and_blocks_that_do_not_fit_are_sentences(says, deep, encoder, teacher, sasrec):
    wrong = says(f"--llm {deep} --teacher {teacher} --layers 2 --blocks 3")
    assert "--blocks 3 does not divide 4 and 2 layers; use one of 1, 2" in wrong
    vectors = f"--input ids --backbone {sasrec}"
    assert "has 4 layers" in says(f"--llm {deep} {vectors} --layers 5")
    assert "decoder-only" in says(f"--llm {encoder} {vectors} --layers 1")


ONE_BLOCK = [  # layers, what is advised, and layers of the student and --blocks by that
    ([30, 5], "use --blocks 5, or --lambda-ms 0", (5, 5)),
    ([30, 7], "use --layers 6, or --layers 8, or --lambda-ms 0", (6, None)),
    ([5], "use --blocks 5, or --lambda-ms 0", (5, 5)),
    ([2, 1], "use --layers 2, or --lambda-ms 0", (2, None)),
    ([1], "use --lambda-ms 0", None),
]


@pytest.mark.parametrize("layers, remedy, mended", ONE_BLOCK)
def test_inner_predictions_of_one_block_are_refused(layers, remedy, mended, monkeypatch):
    tapped = []
    monkeypatch.setattr(slmrec, "decoder_layers", lambda n: (None, "", range(n)))
    monkeypatch.setattr(slmrec, "tap", lambda lm, b: tapped.append(b))
    *teachers, n = layers
    teacher = SimpleNamespace(lm=teachers[0]) if teachers else None

    def tap_with(n, blocks, weight):
        return slmrec.tap_blocks(n, teacher, SimpleNamespace(blocks=blocks, lambda_ms=weight))

    said = sentence(tap_with, n, None, 0.1)
    assert "--lambda-ms 0.1" in said and f"{' and '.join(map(str, layers))} layers" in said
    assert said.endswith(remedy) and not tapped
    tap_with(n, None, 0)
    assert set(tapped) == {1}
    tapped.clear()
    if mended:
        tap_with(*mended, 0.1)
        assert min(tapped) > 1


def test_what_shard_does_beside_layers_is_said(
    says, deep, teacher, toy, sasrec, alone, capsys, monkeypatch
):
    alone_it = f"--llm {deep} --input ids --backbone {sasrec} --layers 2 --shard"
    assert "so --shard would divide nothing; leave --shard out" in says(alone_it)
    asked = []
    monkeypatch.setattr(slmrec, "open_run", lambda *args, **_: asked.append(args) or (None, None))
    for layers in (2, None):
        cfg = SimpleNamespace(shard=True, layers=layers)
        with pytest.raises(AttributeError):  # there is no teacher to compare with
            slmrec.open_teacher(load_run(teacher), None, cfg, toy, alone)
        assert ("whole on every process" in capsys.readouterr().out) == bool(layers)
    assert [args[3] for args in asked] == [True, True]


def test_a_teacher_that_reads_other_prompts_is_refused(says, deep, decoder, teacher, chain):
    wrong = says(f"--llm {deep} --teacher {teacher} --history 9")
    assert "must read the same prompts" in wrong
    wrong = says(f"--llm {decoder} --teacher {chain.delrec}")
    assert "likelihood reads a state per title token" in wrong
    assert "no --teacher" in says(f"--llm {deep} --lambda-cos 1")


def test_a_teacher_of_other_data_is_refused(says, deep, teacher, make_data, tmp_path):
    rows = [(u, 1 + (u + i) % 60, u * 20 + i) for u in range(60) for i in range(12)]
    other = make_data(tmp_path, rows, {i: f"film {i}" for i in range(1, 61)}, "other")
    wrong = says(f"--dataset {other.folder} --llm {deep} --teacher {teacher}")
    assert "another preparation" in wrong


def another_tokenizer(llm, folder):
    """A copy of an LM whose last two tokens have each other's number."""
    shutil.copytree(llm, folder)
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    vocab = words["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(words))
    return folder


def test_a_teacher_with_another_tokenizer_is_refused(says, deep, teacher, tmp_path):
    llm = another_tokenizer(deep, tmp_path / "lm")
    # as if it had been trained on that
    taught = shutil.copytree(teacher, tmp_path / "words")
    edit_config(taught, llm=str(llm), llm_fingerprint=None)
    wrong = says(f"--llm {deep} --teacher {taught} --layers 2")
    assert "another tokenizer" in wrong
