"""What the benches of the LM share: a ranker, its prompts and candidates, and the rate of a
machine's matrix products.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from delrec.data.prepared import Data, candidates, histories
from delrec.kernels.bench import times
from delrec.lm.model import LM
from delrec.lm.prompts import DEFAULTS
from delrec.lm.ragged import ragged
from delrec.lm.ranker import Ranker, make_ranker
from delrec.lm.reading import Start
from delrec.lm.titles import Titles
from delrec.lm.verbalizers import score

K = 80  # vectors of the soft prompt
C = 15  # candidates


@dataclass
class Prompts:
    """Prompts, and what is scored behind each."""

    prefix: np.ndarray  # token ids that all begin with, soft prompt included
    tails: list[np.ndarray]  # token ids of each after the prefix
    cand_BC: np.ndarray  # item ids of its candidates
    titles: Titles
    olds: list[np.ndarray]  # item ids of each history; of random prompts none

    def part(self, begin: int, end: int) -> "Prompts":
        """The prompts begin .. end - 1."""
        at = slice(begin, end)
        return Prompts(self.prefix, self.tails[at], self.cand_BC[at], self.titles, self.olds[at])

    def score(self, lm: LM, start: Start, verbalizer: str = "mean") -> torch.Tensor:
        """score_BC by our way; start: what read_prefix returns."""
        return score(lm, start, self.tails, self.cand_BC, self.titles, verbalizer)


def our_ranker(
    lm: LM,
    data: Data,
    P_kD: torch.Tensor | None,
    verbalizer: str,
    history: int = 10,
    show: bool = True,
) -> Ranker:
    """The ranker of a run with these settings."""
    return make_ranker(lm, data, settings_of(verbalizer, show, history), P_kD)


def settings_of(verbalizer: str, show: bool, history: int) -> dict[str, Any]:
    """A run's settings."""
    return DEFAULTS | {
        "verbalizer": verbalizer,
        "show": show,
        "history": history,
        "max_tokens": 4000,
        "backbone": "SASRec",
        "backbone_run": "",
    }


def prompts_of(r: Ranker, data: Data, n: int, n_candidates: int = C, seed: int = 0) -> Prompts:
    """n prompts of the test part."""
    which = np.random.default_rng(seed).permutation(len(data.test))[:n]
    olds = [h[h > 0] for h in histories(data, data.test[which], r.history)]
    stored = next(c for c in (15, 20, 100) if c >= n_candidates)
    cand_BC = candidates(data, "test", stored)[which][:, :n_candidates]
    tails, _ = r.prompts.histories(ragged(olds), cand_BC)
    return Prompts(r.prompts.prefix, list(tails), cand_BC, r.titles, olds)


def place(device: torch.device) -> str:
    """cpu or gpu, as rows are named."""
    return "gpu" if device.type == "cuda" else "cpu"


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP a second of a product of two n x n matrices."""
    a = torch.randn(n, n, dtype=dtype, device=device)
    b = torch.randn(n, n, dtype=dtype, device=device)
    return 2 * n**3 / times({"mm": lambda: a @ b}, device, 1.0)["mm"]


def flops(body: torch.nn.Module, tokens: int) -> int:
    """2 x parameters of the body x tokens: what a pass over so many tokens costs without
    attention.
    """
    outside = ("embed", "lm_head", "lora_")
    named = body.named_parameters()
    weights = sum(p.numel() for name, p in named if not any(part in name for part in outside))
    return 2 * weights * tokens
