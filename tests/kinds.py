"""Items of kinds, whose word is in their titles, and whether a run knows which kind comes next; and
items of users, each of whom has his own.
"""

import numpy as np
import pytest
from tuning import SMALL, stored_scores

import finetune
from delrec.data.prepared import candidates, users
from delrec.lm import prompts

KINDS = ["user", "oldest", "choices", "recent"]  # the tiny decoder has a token of each
OF_A_KIND = 10
NEUTRAL = ["Amber", "Copper", "Distant", "Early", "Frozen", "Gentle", "Hollow", "Iron", "Jade"]
# options of finetune.py with which the tiny decoder learns a kind in 75 steps
CAPABLE = (
    f"--soft-prompt none {SMALL} --adapt linear --init-r 12 --target-r 8 --alpha 32 --batch 16 "
    "--micro 16 --lr 0.03 --verbalizer mean --loss catalogue --no-calibrate --val-samples 60 "
    "--samples 1200"
)


def kind_titles() -> list[str]:
    """The titles of ten items of each kind, kind after kind."""
    n = OF_A_KIND
    return [f"{word} {word} {n * k + j}" for k, word in enumerate(KINDS) for j in range(n)]


def kind_known(data, folder) -> float:
    """How often the truth stands before a candidate of another kind, among a run's validation
    samples; 1/2 by chance.
    """
    asked, score_nC = stored_scores(folder)
    names = np.array([title.split()[0] if title else "" for title in data.titles])
    cand_nC, target_n = candidates(data, "val", 15)[asked], data.items[data.val[asked]]
    of_nC, own_n1 = names[cand_nC], names[target_n][:, None]
    assert np.isin(own_n1, KINDS).all()
    truth_n1 = score_nC[cand_nC == target_n[:, None]][:, None]
    return (truth_n1 > score_nC)[np.isin(of_nC, KINDS) & (of_nC != own_n1)].mean()


@pytest.fixture(scope="session")
def fans(tmp_path_factory, make_data):
    """120 users who each like one kind of item, whose word is in its titles. Between two of them
    stands one of no kind, so that the last item says nothing of the kind that comes next.
    """
    rng, rows = np.random.default_rng(0), []
    for u in range(120):
        own = 10 * (u % 4) + rng.permutation(10)[:5] + 1
        other = 41 + rng.permutation(len(NEUTRAL))[:5]
        items = np.stack([own, other], 1).reshape(-1)
        rows += [(u, i, t) for t, i in enumerate(items)]
    titles = dict(enumerate([*kind_titles(), *NEUTRAL], 1))
    return make_data(tmp_path_factory.mktemp("fans"), rows, titles, "fans")


@pytest.fixture(scope="session")
def tuned(fans, decoder, fp32, run, tmp_path_factory):
    """tuned(options) -> the folder of a run of finetune.py that shows one item behind a summary."""
    args = f"--dataset {fans.folder} --llm {decoder} {CAPABLE} --history 25"

    def tune(options):
        out = tmp_path_factory.mktemp("summaries") / "run"
        with fp32(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompts, "SHOWN", 1)
            run(finetune.main, f"{args} --out {out} {options}")
        return out

    return tune


# ---------------------------------------------------------------- a shelf of items a user


@pytest.fixture(scope="session")
def shelves(tmp_path_factory, make_data):
    """Three users, each of whom takes items of a shelf of his own, so an item tells whose it is."""
    rows = [(u, 20 * u + t, 100 * u + t) for u in range(3) for t in range(1, 20)]
    titles = {item: f"Film {item}" for _, item, _ in rows}
    return make_data(tmp_path_factory.mktemp("shelves"), rows, titles, "shelves")


def owner(data, items) -> int:
    """The user whose shelf some items are of."""
    (user,) = {int(users(data, [np.flatnonzero(data.items == item)[0]])[0]) for item in items}
    return user
