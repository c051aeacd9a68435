"""Stage 2 that asks each batch twice, and wants both answers alike (finetune.py --input ids
--r-drop; R-Drop, arXiv 2106.14448, section 2.1).

    L = (L_1 + L_2) / 2 + a / 4 (KL(p_1 || p_2) + KL(p_2 || p_1))

1 and 2 are two passes of the same prompts. Dropout draws other numbers in each, so p_1 and p_2, the
LM's softmax over all items, differ by what single adapter inputs say alone. It is the paper's loss
halved: a step is as long as without. A step costs twice the passes.

Names: N reads, I items.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from delrec.lm.draws import drops
from delrec.lm.model import LM
from delrec.runtime import stop

Parts = dict[str, torch.Tensor]  # of a loss, as sums over the reads


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant by --r-drop: [(is it so?, sentence)]."""
    return [
        (
            cfg.r_drop and cfg.input != "ids",
            f"--r-drop compares the scores of all items, --input is {cfg.input}; use --input ids, "
            "or leave --r-drop out",
        ),
        (
            cfg.r_drop and (cfg.teacher or cfg.lambda_ms),
            "--r-drop makes two passes, and what --teacher and --lambda-ms ask of inner blocks is "
            "asked of one; leave one of them out",
        ),
    ]


def stop_without_dropout(cfg: SimpleNamespace, lm: LM) -> None:
    """Stops at --r-drop where two passes of the same prompts would be one and the same."""
    whole = cfg.adapt == "all"
    if not cfg.r_drop or (cfg.dropout and not whole) or cfg.residual_dropout or drops(lm.model):
        return
    none, mend = "--dropout 0", "raise --dropout"
    if whole:
        none, mend = "--adapt all, which has no adapters", "leave --adapt all out"
    stop(
        f"--r-drop compares two passes that differ by their dropout, and there is none ({none}; "
        f"{cfg.llm} has none of its own); {mend}, or leave --r-drop out"
    )


def losses(
    scores: Callable[[], torch.Tensor], parts: Callable[[torch.Tensor], Parts], a: float
) -> Parts:
    """L's parts. scores(): the scores (N, I) of a new pass; parts(s_NI): L_1's or L_2's."""
    one_NI, two_NI = scores(), scores()
    one, two = parts(one_NI), parts(two_NI)
    halved = {part: (one[part] + two[part]) / 2 for part in one}
    return halved | {"apart": a / 4 * divergence(one_NI, two_NI)}


def divergence(one_NI: torch.Tensor, two_NI: torch.Tensor) -> torch.Tensor:
    """KL(p_1 || p_2) + KL(p_2 || p_1), summed over the reads, from scores."""
    log_p_NI, log_q_NI = one_NI.log_softmax(1), two_NI.log_softmax(1)
    # sum_i p (log p - log q) + q (log q - log p) = sum_i (p - q) (log p - log q)
    return ((log_p_NI.exp() - log_q_NI.exp()) * (log_p_NI - log_q_NI)).sum()
