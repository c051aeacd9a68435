"""finetune.py --residual: what it adds, and what it reads of a backbone's folder."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import edit_config
from stopped_runs import stopped
from vector_runs import TUNE

import finetune
import train_backbone
from delrec.lm import residual
from recipes import mlp


def test_dropout_leaves_out_a_share_of_the_reads():
    states = residual.FoldStates(
        np.ones((9, 3), np.float16), np.arange(9), np.arange(9), torch.tensor([[2.0, 5.0]]), 0.25
    )
    torch.manual_seed(0)
    u_NE = states.u(np.zeros(4000, int), np.ones(4000, int))
    told = u_NE.any(1)
    assert 0.22 < 1 - told.float().mean() < 0.28
    assert torch.equal(u_NE[told][0], torch.tensor([2.0, 2.0, 2.0, 5.0]))


def test_candidates_get_the_share_of_the_backbone_s_scores_that_all_items_get():
    y_BI = torch.tensor([[-torch.inf, 2, 4, 6], [-torch.inf, 8, 0, 4]])
    own = SimpleNamespace(scores=lambda olds: y_BI[[len(old) for old in olds]], counts=None)
    maps = {residual.WEIGHT: SimpleNamespace(weight=torch.tensor(0.5))}
    lm = SimpleNamespace(items=SimpleNamespace(residual=own, maps=maps), offset=None)
    olds, cand_nC = [np.zeros(0, int), np.zeros(1, int)], np.array([[3, 1], [1, 2]])
    s_BI = torch.tensor([[0.0, 10, 20, 30], [0, 40, 50, 60]])
    whole_BI = residual.with_backbone_scores(lm, s_BI, olds)
    assert whole_BI[:, 1:].tolist() == [[11, 22, 33], [44, 50, 62]]
    s_nC = np.take_along_axis(s_BI.numpy(), cand_nC, 1)
    found = residual.with_backbone_scores_of_candidates(lm, s_nC, olds, cand_nC)
    assert found.tolist() == [[33, 11], [44, 50]]


# ---------------------------------------------------------------- refusals


def test_a_run_is_not_gone_on_with_once_its_backbone_lists_other_samples(
    toy, decoder, run, refused, on_cpu, tmp_path, monkeypatch
):
    backbone = tmp_path / "sasrec"
    quick = "--epochs 1 --width 16 --batch 16 --history 8 --folds 2"
    run(train_backbone.main, f"--dataset {toy.folder} --out {backbone} {quick}")
    options = f"--dataset {toy.folder} --llm {decoder} --backbone {backbone} {TUNE}"

    def args(out, *more):
        placed = f"{options} --residual backbone --out {out} --checkpoint-every 1"
        return [*placed.split(), *map(str, more)]

    assert stopped({"on": (finetune.main, args)}, "on", tmp_path / "on", monkeypatch)
    lists = np.load(backbone / "topk_train.npy")
    lists[::2] = 0  # as with another --lists: the windows have other targets
    np.save(backbone / "topk_train.npy", lists)
    says = refused(finetune.main, " ".join(args(tmp_path / "on", "--resume")))
    assert "lists-digest was" in says


@pytest.mark.parametrize(
    "model, learnt, so",
    [
        ("seqsim", "none", "is not trained, so it has none; name another backbone"),
        ("kda", "Adam", "is of a model without; name another"),
        ("sasrec", "Adam", "train the backbone with train_backbone.py --folds 5"),
    ],
)
def test_what_to_do_about_a_backbone_without_folds_is_what_it_can_have(
    model, learnt, so, toy, sasrec, decoder, refused, on_cpu, tmp_path
):
    backbone = shutil.copytree(sasrec, tmp_path / "backbone")
    edit_config(backbone, model=model, optimiser=learnt)
    of_toy = f"--dataset {toy.folder} --backbone {backbone} --out {tmp_path}/x"
    on_vectors = f"{of_toy} --llm {decoder} --input ids"
    assert so in refused(finetune.main, f"{on_vectors} --residual backbone")
    assert so in refused(mlp.main, of_toy)
    if model != "kda":  # it may have folds
        assert so in refused(finetune.main, f"{on_vectors} --without-fold 0")
