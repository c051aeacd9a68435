"""Data of users who walk one cycle through all items: what comes next is planted."""

import numpy as np
import pytest

N_ITEMS = 100
QUICK = "--epochs 2 --patience 9 --width 16 --batch 16 --history 8"


@pytest.fixture(scope="session")
def cycle(make_data, tmp_path_factory):
    """160 users who walk the cycle item -> 2 * item mod 101 through all 100 items, 20 steps each;
    one step in 50 goes anywhere.
    """
    rng, rows = np.random.default_rng(0), []
    for u in range(160):
        item, begin = int(rng.integers(1, N_ITEMS + 1)), int(rng.integers(0, 1000))
        for t in range(20):
            rows.append((u, item, begin + 10 * t))
            lost = rng.random() < 0.02
            item = int(rng.integers(1, N_ITEMS + 1)) if lost else item * 2 % (N_ITEMS + 1)
    titles = {i: f"Film {i}" for i in range(1, N_ITEMS + 1)}
    return make_data(tmp_path_factory.mktemp("cycle"), rows, titles)


@pytest.fixture(scope="session")
def train_on_cycle(cycle, run):
    """train_on_cycle(out, "--flag value ..") -> click's result of train_backbone.py."""
    import train_backbone

    def train(out, options):
        return run(train_backbone.main, f"--dataset {cycle.folder} --out {out} {options}")

    return train
