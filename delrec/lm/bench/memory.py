"""The memory account: every tensor that training and scoring hold.

On a machine without a GPU this is the evidence that an LM fits into a card of 24 GB: the list is
the same on both; temporaries differ with the kernels, so the measured peak on this machine stands
beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from delrec.kernels.bench import Row
from delrec.lm.bench.random_lms import LIMIT_GB, TOKENS, random_lm, random_prompts
from delrec.lm.bench.rival import add_adalora
from delrec.lm.bench.work import K
from delrec.lm.layers import adapt_modules, checkpoint_layers
from delrec.lm.reading import read_prefix
from delrec.lm.text import random_soft_prompt
from delrec.training.memory import extra_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GB = 2**30


@dataclass
class Held:
    """What training holds beside a pass."""

    name: str  # of the LM
    device: torch.device
    weights: int  # bytes of the LM
    tokens: int  # of the prompt
    rows: list[Row]

    def row(self, what: str, size: float | None, unit: str) -> None:
        """Adds a row in GB of a size in bytes; None: not measured."""
        value = None if size is None else size / GB
        self.rows.append(Row(f"account.{self.name}.{what}", value, unit, LIMIT_GB))


def account(
    rows: list[Row],
    device: torch.device,
    name: str,
    config: "PretrainedConfig",
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Prints and adds rows of what a pass over one prompt of so many tokens holds: scoring, both
    stages, and stage 2 with gradient checkpointing.
    """
    lm = random_lm(name, config, device, dtype)
    prompts = random_prompts(lm, 1, tokens)
    once = {id(p): p for p in lm.model.parameters()}.values()  # a tied head has no weights
    weights = sum(p.numel() * p.element_size() for p in once)
    held = Held(name, device, weights, tokens, rows)
    parameters = sum(p.numel() for p in lm.model.parameters()) / 1e9
    print(f"\n{name}: {parameters:.2f} B parameters, weights {weights / GB:.2f} GB")
    P = random_soft_prompt(lm, K, 0)

    def loss():
        score_BC = prompts.score(lm, read_prefix(lm, prompts.prefix, P))
        return F.cross_entropy(score_BC, torch.zeros(1, dtype=torch.long, device=device))

    def train():
        loss().backward()

    with torch.no_grad():
        peak = extra_bytes(loss, device)
    unit = "GB: weights, plus a pass's measured peak on this machine"
    held.row("scoring.measured_gb", None if peak is None else held.weights + peak, unit)
    P.requires_grad_()
    # P, its gradient, Lion's momentum
    account_of(held, "stage1", lm.model, 3 * P.numel() * 4, train)
    P.requires_grad_(False)
    adapter = add_adalora(lm.model, adapt_modules(lm, "qv")).train()
    trained = sum(p.numel() * p.element_size() for p in adapter.parameters() if p.requires_grad)
    # and AdaLoRA's two averages
    account_of(held, "stage2", adapter, 5 * trained, train)
    checkpoint_layers(lm.model)
    account_of(held, "stage2_gradient_checkpointing", adapter, 5 * trained, train)


def account_of(held: Held, what: str, model: torch.nn.Module, state: int, train: Callable) -> None:
    """Prints what autograd keeps while `train` runs, and adds rows of all that is held.

    state: bytes of what is trained, of its gradient and of the optimiser.
    """
    kinds = saved_tensors(train, model)
    kept = sum(size for _, size in kinds.values())
    prompt = f"one prompt of {held.tokens} tokens"
    print(f"{what}: kept for backward by {prompt}, {kept / GB:.2f} GB")
    largest = sorted(kinds.items(), key=lambda kind: -kind[1][1])[:12]
    for (shape, dtype), (n, size) in largest:
        print(f"  {n:4d} x {str(shape):28} {str(dtype)[6:]:9} {size / 2**20:9.1f} MB")
    train()
    peak = extra_bytes(train, held.device)
    fixed = held.weights + state
    of_it = f"(weights {held.weights / GB:.2f}, trained and its state {state / GB:.3f})"
    held.row(f"{what}.kept_gb", fixed + kept, f"GB in all {of_it}")
    unit = "GB: weights and state, plus a pass's measured peak on this machine"
    held.row(f"{what}.measured_gb", None if peak is None else fixed + peak, unit)


def saved_tensors(
    f: Callable, model: torch.nn.Module
) -> dict[tuple[tuple[int, ...], torch.dtype], tuple[int, int]]:
    """{(shape, dtype): (how many, bytes)} of what autograd keeps for backward while f runs, the
    model's own parameters left out. A view keeps what it is a view of, so bytes are of whole
    storages, each once.
    """
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # address: tensor; held, so that no later tensor gets its address
    kinds = {}

    def keep(t):
        storage = t.untyped_storage()
        address = storage.data_ptr()
        if t.device.type != "meta" and address not in weights and address not in kept:
            kept[address] = t
            n, size = kinds.get((tuple(t.shape), t.dtype), (0, 0))
            kinds[tuple(t.shape), t.dtype] = n + 1, size + storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        f()
    return kinds
