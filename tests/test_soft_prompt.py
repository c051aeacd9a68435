"""soft_prompt.py: where stage 2 takes its soft prompt from, and what does not fit it."""

import shutil

import numpy as np
import pytest
import torch
from commands import edit_config, prompt_of
from tuning import BY_MEAN

import finetune
from delrec import runtime
from delrec.lm.soft_prompt import save_soft_prompt
from delrec.lm.text import random_soft_prompt
from delrec.runtime import load_run


def test_the_soft_prompt_is_bit_for_bit_the_distilled_one(chain):
    assert torch.equal(prompt_of(chain.delrec), prompt_of(chain.prompt))


def test_where_the_soft_prompt_comes_from(chain, to_tune, run, on_cpu, load, tmp_path):
    def tune(name, options):
        out = tmp_path / name
        run(finetune.main, f"{to_tune} {BY_MEAN} --soft-prompt {options} --out {out}")
        return out

    random = tune("random", "random --k 5")
    assert torch.equal(prompt_of(random), random_soft_prompt(load("decoder"), 5, 0))
    distilled = tune("distilled", f"{chain.prompt} --k 5")
    assert torch.equal(prompt_of(distilled), prompt_of(chain.prompt))
    none = tune("none", "none")
    assert not (none / "soft_prompt.safetensors").exists()
    runs = [load_run(folder) for folder in (random, distilled, none)]
    assert [r.soft_prompt for r in runs] == ["random", str(chain.prompt), "none"]
    assert runs[1].backbone_run == load_run(chain.prompt).backbone_run
    scores = [np.load(folder / "scores_val_15.npy") for folder in (random, distilled, none)]
    assert not np.allclose(scores[0], scores[1], equal_nan=True)
    assert not np.allclose(scores[1], scores[2], equal_nan=True)


def test_a_missing_soft_prompt_says_how_to_make_it(toy, refused, tmp_path, monkeypatch):
    nothing = tmp_path / "nothing"
    says = refused(finetune.main, f"--dataset {toy.folder} --soft-prompt {nothing}")
    assert f"no soft prompt in {nothing}" in says
    assert f"python distill.py --dataset {toy.folder}" in says
    assert "--soft-prompt none" in says
    monkeypatch.setattr(runtime, "ROOT", tmp_path)
    usual = tmp_path / "runs" / "toy" / "prompt"
    assert f"no soft prompt in {usual}" in refused(finetune.main, f"--dataset {toy.folder}")


@pytest.mark.parametrize("read, made", [("ids", " --input ids"), ("hybrid", ""), ("titles", "")])
def test_the_command_for_a_missing_soft_prompt_has_the_flags_of_the_run(
    toy, decoder, backbone, refused, tmp_path, read, made
):
    on = f"--llm {decoder} --backbone {backbone}"
    missing = f"--soft-prompt {tmp_path}/prompt"
    says = refused(finetune.main, f"--dataset {toy.folder} {on} {missing} --input {read}")
    command = f"python distill.py --dataset {toy.folder}{made} {on} --out {tmp_path}/prompt"
    assert f"{command}  (or pass --soft-prompt none)" in says


def test_a_run_of_another_stage_is_no_soft_prompt(toy, backbone, refused):
    says = refused(finetune.main, f"--dataset {toy.folder} --soft-prompt {backbone}")
    assert "holds a train_backbone run, expected one of: distill" in says


def test_a_soft_prompt_of_another_lm_is_refused(
    chain, toy, decoder, encoder, refused, on_cpu, tmp_path
):
    where = f"--dataset {toy.folder} --out {tmp_path}/x"
    says = refused(finetune.main, f"{where} --soft-prompt {chain.prompt} --llm {encoder}")
    assert f"was distilled for {decoder}, --llm is {encoder}" in says
    wide = shutil.copytree(chain.prompt, tmp_path / "wide")
    save_soft_prompt(wide, torch.zeros(3, 64))
    says = refused(finetune.main, f"{where} --soft-prompt {wide} --llm {decoder}")
    assert "of width 64" in says


def test_a_prompt_of_another_format_is_used_and_its_differences_are_said(
    chain, to_tune, run, on_cpu, tmp_path
):
    # the chain's prompt was distilled by likelihood from six items, in prompts without candidates
    one = run(
        finetune.main,
        f"{to_tune} {BY_MEAN} --show --soft-prompt {chain.prompt} --out {tmp_path}/other",
    )
    notes = [line for line in one.output.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: {chain.prompt} was distilled in prompts of another format: --verbalizer was "
        "likelihood, is mean, --show was False, is True, --history was 6, is 4"
    ]
    like = f"{to_tune} --loss candidates --verbalizer likelihood --history 6 --no-calibrate"
    same = run(finetune.main, f"{like} --soft-prompt {chain.prompt} --out {tmp_path}/same")
    assert "another format" not in same.output
    # an order that no prompt shows is no difference
    sorted_by = shutil.copytree(chain.prompt, tmp_path / "sorted")
    edit_config(sorted_by, settings=load_run(sorted_by).settings | {"order": "backbone"})
    order = f"--soft-prompt {sorted_by} --out {tmp_path}/order"
    assert "another format" not in run(finetune.main, f"{like} {order}").output
    listed = f"--order backbone --show --soft-prompt {chain.prompt} --out {tmp_path}/listed"
    assert "--order was shuffled, is backbone" in run(finetune.main, f"{like} {listed}").output
