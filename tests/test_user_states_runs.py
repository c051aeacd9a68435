"""Runs whose items carry user states (distill.py --user-states): stage 2, answers, refusals."""

import shutil
from types import SimpleNamespace

import click
import numpy as np
import pytest
import stopped_runs
import torch
from commands import edit_config, prompt_of, same_run
from safetensors.torch import load_file, save_file
from stopped_runs import same, stop_and_resume
from vector_runs import DISTIL, TUNE

import distill
import evaluate
import finetune
import train_backbone
from delrec import Recommender
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import histories, raw_item_ids
from delrec.lm import user_states
from delrec.lm.ranker import open_run, score_and_rank, score_samples
from delrec.lm.residual import histories_of
from delrec.runtime import load_run

CPU = torch.device("cpu")
CARRY = "--user-states backbone --samples 96 --evals 1 --lr-maps 0.01"


@pytest.fixture(scope="module")
def young(toy, run, fp32, tmp_path_factory):
    """A real backbone of the toy data with folds; its window is longer than the LM's."""
    folder = tmp_path_factory.mktemp("young") / "sasrec"
    quick = "--epochs 1 --width 16 --batch 16 --history 8 --folds 2"
    with fp32():
        run(train_backbone.main, f"--dataset {toy.folder} --out {folder} {quick}")
    return folder


@pytest.fixture(scope="module")
def to_chain(toy, young, decoder):
    """Options of either stage on the real backbone, without --out."""
    return f"--dataset {toy.folder} --backbone {young} --llm {decoder}"


@pytest.fixture(scope="module")
def chain(to_chain, run, fp32, tmp_path_factory):
    """The two stages on the real backbone: (run of distill.py, run of finetune.py)."""
    home = tmp_path_factory.mktemp("chain")
    with fp32():
        run(distill.main, f"{to_chain} --out {home}/prompt {DISTIL} {CARRY}")
        tune = f"{to_chain} --out {home}/lm {TUNE} --lr-maps 0.01"
        run(finetune.main, f"{tune} --soft-prompt {home}/prompt")
    return home / "prompt", home / "lm"


def test_stage_2_keeps_the_map_as_it_keeps_the_soft_prompt(chain):
    prompt, lm = (load_file(folder / "items.safetensors") for folder in chain)
    assert prompt["user.weight"].any()
    for name in ("user.weight", "user.length"):
        assert torch.equal(prompt[name], lm[name])
    assert not torch.equal(prompt["in.weight"], lm["in.weight"])
    assert torch.equal(prompt_of(chain[0]), prompt_of(chain[1]))
    assert load_run(chain[1]).user_states == "backbone"
    assert (chain[1] / "backbone" / "model.safetensors").exists()


def test_the_states_of_whole_histories_are_those_of_the_backbone_s_folder(chain, toy, young):
    r = open_run(load_run(chain[1], toy), toy, CPU, scores_of=history_scorer)[0]
    own = r.lm.items.users
    u_nE = own.after(histories_of(r.lm, toy, toy.test, mixed=False))
    x_nE = torch.from_numpy(np.load(young / "states_test.npy")).float()
    torch.testing.assert_close(u_nE[:, :-1], own.scale_2[0] * x_nE, rtol=1e-2, atol=1e-2)


def test_a_moved_run_answers_as_its_table_ranks_and_takes_new_items(
    chain, toy, alone, on_cpu, tmp_path
):
    copy, gone = shutil.copytree(chain[1], tmp_path / "lm"), "no/backbone/here"
    edit_config(copy, backbone_run=gone, settings=load_run(copy).settings | {"backbone_run": gone})
    r = open_run(load_run(copy, toy), toy, CPU, scores_of=history_scorer)[0]
    which, none_1I = np.arange(6), np.zeros((1, toy.n_items + 1), np.float32)
    score_nC, _, list_nK = score_and_rank(r, "test", which, 15, alone, none_1I)
    np.testing.assert_allclose(score_samples(r, "test", which, 15, alone), score_nC, atol=1e-4)
    rec, ids = Recommender.load(copy), raw_item_ids(toy)
    old_nL = histories(toy, toy.test[which], 20)
    for old, listed in zip(old_nL, list_nK):
        assert (old > 0).sum() > 8  # more than either window
        asked = [ids[i] for i in old[old > 0]]
        assert rec.recommend(ids=asked, top=10).ids == [ids[int(i)] for i in listed]
    explained = rec.explain(ids=asked, item=ids[int(listed[0])], attention=True)
    # 6 are shown; of the first of them the backbone sees 7 more
    assert len(explained.reasons) == 13
    assert sum(reason.attention or 0 for reason in explained.reasons) > 0
    rec.add_items({"new": "Film"})
    assert rec.recommend(ids=[*asked, "new"], top=60).items
    assert "new" in rec.recommend(ids=asked, top=60).new


# ---------------------------------------------------------------- what a run promises


@pytest.fixture
def jobs(to_chain, chain, on_cpu):
    """{stage: (its main, a function of its folder and more options: its arguments)}"""
    few = "--samples 48 --checkpoint-every 1"
    begun = f"{TUNE} {few} --soft-prompt {chain[0]} --val-samples 10"

    def job(main, options):
        def args(out, *more):
            return [*f"{to_chain} {options} --out {out}".split(), *map(str, more)]

        return main, args

    carried = job(distill.main, f"{DISTIL} {CARRY} {few}")
    return {"distill": carried, "finetune": job(finetune.main, begun)}


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_a_killed_run_goes_on_to_the_last_bit(stage, jobs, tmp_path, monkeypatch):
    main, args = jobs[stage]
    stopped_runs.run(main, args(tmp_path / "whole"))
    assert same(tmp_path / "whole", stop_and_resume(jobs, stage, tmp_path, monkeypatch, after=3))


def test_two_processes_do_as_one_does(jobs, two_processes, tmp_path):
    for stage, (main, args) in jobs.items():
        stopped_runs.run(main, args(tmp_path / f"one-{stage}"))
    two_processes([(stage, args(tmp_path / f"two-{stage}")) for stage, (_, args) in jobs.items()])
    same_run(tmp_path / "two-finetune", tmp_path / "one-finetune")
    two, one = (load_file(tmp_path / f"{n}-distill/items.safetensors") for n in ("two", "one"))
    torch.testing.assert_close(two["user.weight"], one["user.weight"], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_meant_is_one_sentence(to_chain, chain, toy, refused, on_cpu, tmp_path):
    prompt, lm = chain

    def says(main, options):
        return refused(main, f"{options} --out {tmp_path}/x")

    first, second = (f"{to_chain} {options}" for options in (DISTIL, TUNE))
    carry = "--user-states backbone"
    bare = shutil.copytree(load_run(prompt).backbone_run, tmp_path / "bare")
    (bare / "folds.safetensors").unlink()
    text = says(distill.main, f"{first} {carry} --backbone {bare}")
    assert "--user-states needs a backbone" in text and "train_backbone.py --folds 5" in text
    assert "--input is titles" in says(distill.main, f"{first} {carry} --input titles")
    assert "--tasks is ta" in says(distill.main, f"{first} {carry} --tasks ta")
    assert "histories of --augment" in says(distill.main, f"{first} {carry} --augment walk")
    of_prompt = f"{second} --soft-prompt {prompt}"
    assert "--input is hybrid" in says(finetune.main, f"{of_prompt} --input hybrid")
    with pytest.raises(click.ClickException, match="no teacher was told"):
        user_states.settle(SimpleNamespace(input="ids", teacher="e4srec"), load_run(prompt))
    assert "carry user states" in says(finetune.main, f"{to_chain} --teacher {lm}")
    assert "has no folds for them" in says(finetune.main, f"--dataset {toy.folder} --from {lm}")
    text = refused(evaluate.main, f"--ckpt {lm} --export --folds {lm}")
    assert "carry the states of its full backbone" in text
    text = refused(evaluate.main, f"--ckpt {lm} --shuffle-history --limit 4 --val-samples 4")
    assert "in an order that it never had" in text
    begun = edit_config(shutil.copytree(prompt, tmp_path / "prompt"), backbone_run=str(bare))
    text = says(finetune.main, f"{second} --soft-prompt {begun} --backbone {bare}")
    assert "distill.py --user-states needs a backbone" in text and "lacks folds" in text
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda t: [t.pop(f"user.{x}") for x in ("weight", "length")], "lacks the map of its user"),
        (lambda t: t.pop("user.weight"), "does not hold"),
        (lambda t: t.update({"user.weight": torch.zeros(3, 3)}), "does not hold"),
    ],
)
def test_a_run_that_lost_its_map_is_one_sentence(spoil, says, chain, refused, on_cpu, tmp_path):
    copy = shutil.copytree(chain[1], tmp_path / "lm")
    tensors = load_file(copy / "items.safetensors")
    spoil(tensors)
    save_file(tensors, copy / "items.safetensors")
    assert says in refused(evaluate.main, f"--ckpt {copy} --limit 4")
