"""Figures are drawn where a test looks at them, and nowhere else."""

import contextlib
from pathlib import Path

import pytest

DRAWN = []  # not empty: pictures are drawn


@contextlib.contextmanager
def drawing():
    """With it figures are drawn. Elsewhere they are built, and an empty file is written: nobody
    looks at most of them, and to draw them takes longer than the rest of evaluate.py."""
    DRAWN.append(True)
    try:
        yield
    finally:
        DRAWN.pop()


@pytest.fixture(scope="session", autouse=True)
def drawn_where_looked_at():
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(self, file, **how):
        if DRAWN:
            draw(self, file, **how)
        elif not hasattr(file, "write"):
            Path(file).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield
