"""Is it the language model? LMs with random weights, LMs trained whole, two layers on a backbone's
state.
"""

import shutil

import numpy as np
import pytest
import torch
from commands import edit_config, metrics_of
from lm_cases import sentence
from safetensors.torch import load_file
from tuning import opens_as_stored
from vector_runs import TUNE

import distill
import evaluate
import finetune
from delrec.evaluation.paper import paper_method
from delrec.lm.model import load_lm, load_unread, located
from delrec.runtime import load_run
from delrec.serving.latency import parameters

pytest_plugins = ["lm_fixtures"]
CPU = torch.device("cpu")


def weights_of(name) -> dict:
    """The weights of an LM by name, none of it checked."""
    return dict(load_unread(name, CPU, torch.float32, False).model.named_parameters())


# ---------------------------------------------------------------- random weights


@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder", "encoder"])
def test_random_weights_follow_the_seed_and_keep_each_matrix_s_scale(kind, request):
    llm = request.getfixturevalue(kind)
    trained, drawn = weights_of(llm), weights_of(f"random:{llm}")
    again, other = weights_of(f"random-0:{llm}"), weights_of(f"random-1:{llm}")
    matrices = [name for name, p in trained.items() if p.dim() > 1]
    assert len(matrices) > 10
    for name in matrices:
        assert torch.equal(drawn[name], again[name])
        for apart in (trained, other):
            a, b = drawn[name].flatten(), apart[name].flatten()
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.2, name
        assert drawn[name].std() == pytest.approx(float(trained[name].std()), rel=0.15), name
    norms = [name for name in trained if "norm" in name.lower() and trained[name].dim() == 1]
    assert norms and all(torch.equal(drawn[name], trained[name]) for name in norms)


def test_random_weights_are_the_same_lm_in_every_dtype(decoder):
    name = f"random-7:{decoder}"
    half, whole = (load_unread(name, CPU, d, False) for d in (torch.bfloat16, torch.float32))
    assert (
        half.identity == whole.identity != load_unread(decoder, CPU, torch.float32, False).identity
    )
    w = half.model.lm_head.weight.float()
    assert torch.equal(w, whole.model.lm_head.weight.bfloat16().float())


def test_how_random_weights_are_read_is_measured_of_them(decoder, fresh):
    trained = load_lm(decoder, CPU, torch.float32)
    drawn = load_lm(f"random:{decoder}", CPU, torch.float32)
    assert len(list(fresh.glob("*.json"))) == 2  # a finding of its own
    assert (drawn.paths, drawn.attends) == (trained.paths, trained.attends)
    assert drawn.mask_id == trained.mask_id and drawn.sep == trained.sep


def test_a_random_lm_is_located_as_the_lm_it_is_drawn_from(decoder, monkeypatch):
    monkeypatch.chdir(f"{decoder}/..")
    assert located("random:tiny-llama") == located("random-0:tiny-llama") == f"random:{decoder}"
    assert located("random-12:tiny-llama") == f"random-12:{decoder}"
    assert located("random:of/the-hub") == "random:of/the-hub"


def test_random_weights_of_what_is_no_lm_are_one_sentence(refused, toy, sasrec, tmp_path):
    name = f"random:{tmp_path}"
    assert sentence(load_lm, name, CPU).startswith(f"no language model '{name}'")
    where = f"--dataset {toy.folder} --backbone {sasrec} --input ids --out {tmp_path}/x"
    assert f"no language model '{name}'" in refused(finetune.main, f"{where} --llm {name}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("main", [distill.main, finetune.main, evaluate.main])
def test_help_says_how_random_weights_are_asked_for(main, run):
    said = run(main, "--help").output
    assert "random:NAME" in said and "random weights" in " ".join(said.split())


@pytest.fixture(scope="module")
def on_random(toy, decoder, sasrec, run, fp32, tmp_path_factory):
    """The folder of a run of finetune.py on vectors, of an LM with random weights of seed 3."""
    out = tmp_path_factory.mktemp("random") / "random"
    where = f"--dataset {toy.folder} --backbone {sasrec} --llm random-3:{decoder}"
    with fp32():
        run(finetune.main, f"{where} {TUNE} --out {out}")
    return out


def test_a_run_on_random_weights_opens_again_and_scores_alike(on_random, toy, alone, run, on_cpu):
    opens_as_stored(on_random, toy, alone, 1e-4, 1e-4)
    before = np.load(on_random / "scores_val_15.npy")
    run(evaluate.main, f"--ckpt {on_random} --limit 20 --val-samples 20")
    table = metrics_of(on_random / "evaluation")
    assert "random weights, loss candidates, AdaLoRA on qv" in table["rows"]["random"]["note"]
    assert paper_method(load_run(on_random)) is None
    after = np.load(on_random / "scores_val_15.npy")
    np.testing.assert_allclose(after[np.isfinite(before)], before[np.isfinite(before)], atol=1e-4)


def test_a_run_on_random_weights_is_of_its_seed_alone(
    on_random, refused, decoder, tmp_path, on_cpu
):
    copy = shutil.copytree(on_random, tmp_path / "copy")
    edit_config(copy, llm=f"random-4:{decoder}")
    assert "was trained on another LM" in refused(evaluate.main, f"--ckpt {copy}")


def test_random_weights_have_as_many_parameters(on_random, decoder):
    own = sum(t.numel() for t in load_file(f"{decoder}/model.safetensors").values())
    added = [on_random / "items.safetensors", on_random / "adapter" / "adapter_model.safetensors"]
    more = sum(t.numel() for path in added for t in load_file(path).values())
    assert parameters(load_run(on_random)) == own + more


def test_both_stages_and_the_plain_lm_take_random_weights(
    toy, sasrec, decoder, run, refused, on_cpu, tmp_path
):
    llm, prompt = f"random:{decoder}", tmp_path / "prompt"
    small = "--batch 8 --micro 4 --samples 48 --val-samples 20 --evals 1 --input ids --history 6"
    where = f"--dataset {toy.folder} --llm {llm}"
    first = f"--backbone {sasrec} --k 4 --a 3 --h 3 --candidates 10 --out {prompt}"
    run(distill.main, f"{where} {small} {first}")
    assert load_run(prompt).llm == llm
    second = f"--soft-prompt {prompt} --init-r 4 --target-r 2 --out {tmp_path / 'tuned'}"
    run(finetune.main, f"{where} {small} {second}")
    says = refused(finetune.main, f"--dataset {toy.folder} --llm {decoder} {small} {second}x")
    assert f"was distilled for {llm}, --llm is {decoder}" in says
    plain = f"--llm-out {tmp_path / 'lm'} --limit 10 --val-samples 10 --out {tmp_path / 'table'}"
    run(evaluate.main, f"{where} {plain}")
    again = run(evaluate.main, f"{where} {plain}").output
    assert "was made the same way" in again and load_run(tmp_path / "lm").llm == llm
