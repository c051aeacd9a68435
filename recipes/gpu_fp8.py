"""fp8 products of the frozen layers, for stage variants of make gpu: how the scores change, and
whether HR@1 does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data import prepare
from delrec.data.prepared import Data, candidates, load_data
from delrec.evaluation.scores import gain_over
from delrec.lm.bench.work import K, our_ranker, prompts_of
from delrec.lm.model import load_lm
from delrec.lm.ranker import score_tails
from delrec.lm.text import random_soft_prompt
from recipes import gpu_tiny
from recipes.gpu_lm import on_a_card
from recipes.gpu_rows import Rows
from recipes.gpu_time import as_fp8, fp8_product

REQUESTS = 2000  # test samples whose hits are compared


class Fp8Linear(torch.nn.Module):
    """A frozen linear layer whose product is made of fp8 rows, each with its own scale."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight8, self.scale = as_fp8(linear.weight.detach())
        self.weight, self.bias = linear.weight, linear.bias  # some layers look at its dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product of the last dimension, in bf16."""
        x8_ND, scale_N1 = as_fp8(x.flatten(0, -2))
        y_NM = fp8_product(x8_ND, self.weight8, scale_N1, self.scale)
        y_NM = y_NM if self.bias is None else y_NM + self.bias
        return y_NM.view(*x.shape[:-1], -1)


@contextmanager
def with_fp8(model: torch.nn.Module) -> Iterator[None]:
    """Within it the linear layers of a model compute in fp8; its head stays, and so do those whose
    sizes are no multiples of 16, which the product asks for.
    """
    head = model.get_output_embeddings()
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, torch.nn.Linear)
        and child is not head
        and not any(n % 16 for n in child.weight.shape)
    ]
    for module, name, child in found:
        setattr(module, name, Fp8Linear(child))
    try:
        yield
    finally:
        for module, name, child in found:
            setattr(module, name, child)


@torch.no_grad()
def compare_hits(rows: Rows, rehearse: bool, out: Path) -> None:
    """Writes HR@1 of the plain LM by bf16 and by fp8 on the same test samples, and the ends of the
    paired difference's interval over users.
    """
    device = torch.device("cpu" if rehearse else "cuda")
    name = gpu_tiny.lm(out / "toy" / "lm") if rehearse else "smollm2-135m"
    if not rehearse:
        gpu_tiny.script(prepare.main, "ml-100k")
    data = load_data(str(gpu_tiny.log(out / "toy")) if rehearse else "ml-100k")
    lm = load_lm(name, device, torch.bfloat16, checked=False)
    on_a_card(lm)
    ranker = our_ranker(lm, data, random_soft_prompt(lm, K, 0), "mean")
    n = min(REQUESTS if not rehearse else 8, len(data.test))
    prompts = prompts_of(ranker, data, n)
    alone = SimpleNamespace(rank=0, world=1, device=device, main=False)
    which, truth_n = chosen(data, n)
    hits = []
    for inside in (False, True):
        with with_fp8(lm.model) if inside else torch.no_grad():
            score_nC = score_tails(ranker, prompts.tails, prompts.cand_BC, alone)
        best_n = prompts.cand_BC[np.arange(n), score_nC.argmax(1)]
        hits.append((best_n == truth_n).astype(float))
    base = "variant.smollm2-135m.fp8.hr1"
    rows.add(base, hits[1].mean())
    rows.add(f"{base}_of_bf16", hits[0].mean())
    _, *ends = gain_over(hits[1], hits[0], data, which)
    for end, value in zip(("low", "high"), ends):
        rows.add(f"{base}_change_{end}", value)


def chosen(data: Data, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(places in the test part, the next item of each): those that prompts_of draws."""
    which = np.random.default_rng(0).permutation(len(data.test))[:n]
    truth_n = np.asarray(data.items)[np.asarray(data.test)[which]]
    assert (candidates(data, "test", 15)[which] == truth_n[:, None]).any(1).all()
    return which, truth_n
