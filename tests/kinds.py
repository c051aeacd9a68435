"""Items of kinds, whose word is in their titles, and whether a run knows which kind comes next."""

import numpy as np
from tuning import SMALL, stored_scores

from delrec.data.prepared import candidates

KINDS = ["user", "oldest", "choices", "recent"]  # the tiny decoder has a token of each
OF_A_KIND = 10
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
