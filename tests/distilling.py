"""Small runs of distill.py on titles."""

import pytest

SMALL = (
    "--no-show --history 5 --max-title 32 --max-tokens 1024 --a 3 --h 3 --candidates 10 --batch 8 "
    "--micro 8 --weight-decay 1e-5 --warmup 0.1 --seed 0 --balance gradnorm"
)


@pytest.fixture(scope="session")
def to_distil(toy, backbone, decoder):
    """distill.py's options for the tiny decoder, the popular backbone and the toy data."""
    where = f"--dataset {toy.folder} --backbone {backbone} --llm {decoder}"
    return f"{where} {SMALL} --verbalizer mean"
