"""What finetune.py refuses, each in one sentence; and what it need not refuse."""

import pytest
from tuning import SMALL

import finetune


@pytest.mark.parametrize(
    "options, says",
    [
        ("--init-r 8 --target-r 8", "--target-r 8 must be below --init-r 8"),
        ("--init-r 4 --target-r 9", "--target-r 9 must be below"),
        ("--samples 32 --batch 8", "is 4 steps; AdaLoRA needs at least 5"),
        ("--dataset nowhere", "no prepared data set"),
        ("--loss catalogue --verbalizer letter", "from one state, --verbalizer letter cannot"),
        ("--candidates 17", "holds no 17 candidates for val, it holds [15, 20]"),
        (
            "--order backbone --show --backbone /nowhere",
            "in the backbone's order need /nowhere/scores_train_15.npy",
        ),
    ],
)
def test_relations_that_cannot_hold_are_refused(
    options, says, toy, decoder, refused, on_cpu, tmp_path
):
    where = f"--dataset {toy.folder} --soft-prompt none --llm {decoder} --out {tmp_path}/x"
    usual = "--order shuffled --candidates 15"
    assert says in refused(finetune.main, f"{where} {usual} {options}")


@pytest.mark.parametrize(
    "kind, loss", [("encoder", "titles"), ("encoder_decoder", "both"), ("encoder", "letter")]
)
def test_losses_that_need_a_decoder_refuse_others_before_anything_is_written(
    kind, loss, request, toy, refused, on_cpu, tmp_path
):
    llm = request.getfixturevalue(kind)
    where = f"--dataset {toy.folder} --soft-prompt none --llm {llm} --out {tmp_path}/x"
    verbalizer = "letter" if loss == "letter" else "mean"
    says = refused(finetune.main, f"{where} {SMALL} --loss {loss} --verbalizer {verbalizer}")
    assert f"but --loss {loss} asks" in says and "--loss candidates" in says
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_explodes_stops_the_run(to_tune, refused, on_cpu, tmp_path):
    out = tmp_path / "x"
    wild = "--loss candidates --verbalizer mean --lr 0.1 --weight-decay 1e20"
    says = refused(finetune.main, f"{to_tune} --soft-prompt none --out {out} {wild}")
    assert "lower --lr" in says
    assert not (out / "config.json").exists()
    assert not (out / "adapter").exists()
