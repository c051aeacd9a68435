"""A conventional model that is added to the others: what it lacks is said in a sentence."""

from types import SimpleNamespace

import pytest
import torch
from scripts import sentence

import train_backbone
from delrec.backbone import models
from delrec.backbone.models import SASRec

CFG = SimpleNamespace(history=5, width=8, dropout=0.5)


class Wide(SASRec):
    def forward(self, seq_BL, last=False):
        return super().forward(seq_BL, last).repeat(1, 1, 2)


class OneAnyway(SASRec):
    def forward(self, seq_BL, last=False):
        return super().forward(seq_BL, last=True)


class AllAnyway(SASRec):
    def forward(self, seq_BL, last=False):
        return super().forward(seq_BL)


@pytest.mark.parametrize(
    "model, says",
    [
        (Wide, "mine: forward(seq_BL, last=False) gives states of the shape (1, 2, 16) for a window"
        " (1, 2), expected (1, 2, 8)"),
        (OneAnyway, "last=False) gives states of the shape (1, 1, 8)"),
        (AllAnyway, "last=True) gives states of the shape (1, 2, 8)"),
    ],
)  # fmt: skip
def test_states_of_another_shape_are_named_when_the_model_is_built(model, says, monkeypatch):
    monkeypatch.setitem(models.ALL, "mine", model)
    assert says in sentence(models.build, "mine", 30, CFG)


@pytest.mark.parametrize("name", models.ALL)
def test_a_look_at_the_states_draws_nothing_and_leaves_the_model_in_training(name, monkeypatch):
    cfg = SimpleNamespace(**(train_backbone.ALL[name] | vars(CFG)))

    def drawn():
        torch.manual_seed(0)
        model = models.build(name, 30, cfg)
        assert all(part.training for part in model.modules())
        return torch.rand(3)

    after = drawn()
    monkeypatch.setattr(models, "must_give_states", lambda *_: None)
    assert torch.equal(after, drawn())
