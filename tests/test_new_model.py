"""A conventional model that is added to the others: what it lacks is said in a sentence."""

import re
from types import SimpleNamespace

import pytest
import torch
from scripts import ROOT, sentence

import train_backbone
from delrec.backbone import models
from delrec.backbone.models import SASRec
from delrec.backbone.options import OWN
from delrec.names import NAMES

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


# ---------------------------------------------------------------- the tables that name each model


ROW = train_backbone.ALL["caser"]


@pytest.mark.parametrize(
    "table, row, says",
    [
        (models.ALL, None, "stands in no table of delrec/backbone/models.py"),
        (train_backbone.ALL, None, "has no row in DEFAULTS of train_backbone.py; add one"),
        (train_backbone.ALL, {"patience": None}, "lacks patience; add what is missing"),
        (train_backbone.ALL, {"heads": 2}, "names heads, which is no flag"),
        (NAMES, None, "has no name for people; add one to NAMES in delrec/names.py"),
    ],
)
def test_half_a_registration_is_named_before_the_data_are_read(
    table, row, says, refused, monkeypatch
):
    if row:
        whole = {key: value for key, value in (ROW | row).items() if value is not None}
        monkeypatch.setitem(table, "caser", whole)
    else:
        monkeypatch.delitem(table, "caser")
    assert says in refused(train_backbone.main, "--model caser --dataset nowhere")


@pytest.mark.parametrize("name", train_backbone.DEFAULTS)
def test_the_page_of_commands_has_each_model_s_defaults(name):
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \|.*\|$", text, re.M)
    assert row, f"docs/commands.md has no row of {name} under Conventional models"
    *cells, epochs_and_patience = row[0].strip("| ").split(" | ")[2:]
    told = [float(cell) for cell in (*cells, *epochs_and_patience.split(", "))]
    assert told == [train_backbone.DEFAULTS[name][key] for key in OWN]
