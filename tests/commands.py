"""Commands of the training scripts as text, and what a run left in its folder."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def run(script):
    """run(main, "--flag value ..") runs a script in this process; see script."""
    return lambda main, text, code=0: script(main, *text.split(), code=code)


@pytest.fixture(scope="session")
def refused(run):
    """refused(main, "--flag value ..") -> the sentence with which the script stops."""
    return lambda main, text: run(main, text, code=1).error


def log_of(folder) -> list[dict]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def metrics_of(folder) -> dict:
    """What metrics.json holds."""
    return json.loads((folder / "metrics.json").read_text())


def prompt_of(folder) -> torch.Tensor:
    """A run's soft prompt P."""
    return load_file(folder / "soft_prompt.safetensors")["prompt_embeddings"]


def adapter_of(folder) -> dict:
    """The tensors of a run's adapter."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def edit_config(folder, **changes):
    """Changes entries of a run's config.json; the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def same_run(a, b):
    """Two runs of finetune.py are the same but for the order of sums."""
    for x, y in zip(log_of(a), log_of(b)):
        assert x.keys() == y.keys()
        losses = [k for k in x if k in ("loss", "titles", "candidates")]
        assert [x[k] for k in losses] == pytest.approx([y[k] for k in losses], rel=1e-3)
    one, two = adapter_of(a), adapter_of(b)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    for name in ("scores_val_15.npy", "neutral.npy"):
        np.testing.assert_allclose(np.load(a / name), np.load(b / name), rtol=1e-3, atol=1e-3)
