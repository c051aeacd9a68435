"""The newer conventional models in the scripts: killed and resumed, out of fold, asked."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cycle import N_ITEMS
from stopped_runs import same, stop_and_resume
from vector_runs import DISTIL

import distill
import evaluate
import train_backbone
from delrec.backbone.batches import Targets
from delrec.backbone.models import MODELS, build
from delrec.names import NAMES
from delrec.runtime import load_run
from delrec.serving.shared import stop_unless_shaped

NEWER = sorted(set(MODELS) - {"sasrec", "gru4rec", "caser"})
# without a state after each position
OTHERWISE = [name for name, model in MODELS.items() if model.one_state or model.cloze]
SMALL = "--epochs 2 --patience 9 --width 16 --batch 64 --history 8 --folds 2"


@pytest.mark.parametrize("model", NEWER)
def test_a_stopped_run_goes_on_bit_for_bit_and_answers(
    model, cycle, train_on_cycle, run, tmp_path, monkeypatch
):
    options = f"--model {model} {SMALL} --checkpoint-every 1000"

    def args(out, *more):
        return ["--dataset", str(cycle.folder), "--out", str(out), *options.split(), *more]

    train_on_cycle(tmp_path / "whole", options)
    jobs = {"again": (train_backbone.main, args)}
    again = stop_and_resume(jobs, "again", tmp_path, monkeypatch, 11)
    assert same(again, tmp_path / "whole")
    # what the next stages read: lists of every training sample, states and the folds' vectors
    lists = np.load(again / "topk_train.npy")
    assert lists.shape == (len(cycle.train), 20) and 0 < lists.min() <= lists.max() <= N_ITEMS
    assert np.load(again / "states_test.npy").shape == (len(cycle.test), 16)
    stop_unless_shaped(load_run(again), cycle)  # a shared copy of it would be opened
    top = run(evaluate.main, f"--ckpt {again} --history-json [3,6,12]").json["top"]
    assert len({x["id"] for x in top} - {"3", "6", "12"}) == 10


@pytest.mark.parametrize("loss", ["ce", "gbce"])
@pytest.mark.parametrize("model", NEWER)
def test_three_processes_add_up_to_the_loss_of_one(model, loss, cycle):
    cfg = dict(model=model, history=8, width=16, dropout=0, batch=20, seed=0, loss=loss)
    cfg |= dict(negatives=30, one_target=False)
    cfg = SimpleNamespace(**(train_backbone.ALL[model] | cfg))
    torch.manual_seed(0)
    net, targets = build(model, N_ITEMS, cfg), Targets(cfg, cycle)
    batch = targets.batch(*targets.epoch(0)[0], 0, 0)

    def loss_of(rank, world):
        ranks = SimpleNamespace(rank=rank, world=world, device=torch.device("cpu"))
        return train_backbone.loss_of(net, *batch.of(ranks), gbce=loss == "gbce")

    torch.testing.assert_close(sum(loss_of(rank, 3) for rank in range(3)), loss_of(0, 1))


@pytest.mark.parametrize("model", OTHERWISE)
def test_stage_1_reads_models_without_a_state_after_each_position(
    model, toy, decoder, run, on_cpu, tmp_path
):
    backbone, prompt = tmp_path / model, tmp_path / "prompt"
    small = f"--model {model} --out {backbone} --epochs 1 --width 16 --history 8"
    run(train_backbone.main, f"--dataset {toy.folder} {small}")
    where = f"--dataset {toy.folder} --backbone {backbone} --llm {decoder} --out {prompt}"
    run(distill.main, f"{where} {DISTIL} --samples 16")
    assert load_run(prompt).settings["backbone"] == NAMES[model]
