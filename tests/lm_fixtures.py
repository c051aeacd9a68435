"""Fixtures of the LM's tests: the folders of tiny LMs, copied, known to nobody, or read by plain
transformers.
"""

import shutil

import pytest
import torch

from delrec.lm import check


@pytest.fixture(scope="module")
def plain(request):
    """plain(kind) -> the same folder by plain transformers, nothing replaced."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    auto = {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM}
    models = {}

    def get(kind):
        if kind not in models:
            models[kind] = (
                auto.get(kind, AutoModelForSeq2SeqLM)
                .from_pretrained(request.getfixturevalue(kind), dtype=torch.float32)
                .eval()
            )
        return models[kind]

    return get


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is known of any LM."""
    monkeypatch.setattr(check, "CACHE", tmp_path / "fresh")
    return tmp_path / "fresh" / "checked"


@pytest.fixture
def copy(decoder, tmp_path):
    return lambda name="copy": shutil.copytree(decoder, tmp_path / name)
