"""Stage kernels of make gpu: the verbalizer against the card's own bandwidth, and against torch.

Candidate scores take microseconds on a card, less than the host needs to launch them: so several
calls are captured as one graph. Each reads tokens and a head of its own, so many in all that none
is found in the card's cache. The titles' likelihood and the catalogue are timed by
kernels/bench.py.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from delrec.kernels import bench, gpu
from delrec.kernels.bench import Candidates
from recipes.gpu_rows import CATALOGUES, GATHERS, LIKELIHOODS, Rows
from recipes.gpu_time import (
    as_fp8,
    cache_bytes,
    fp8_product,
    memory_bytes,
    seconds_each,
    seconds_of,
)

FEWEST = 3  # draws of each shape
TINY = {"gather": (1, 2, 3, 16, 50), "likelihood": (20, 16, 60), "catalogue": 300}


def measure(rows: Rows, rehearse: bool, quick: bool, out: Path) -> None:
    """Writes the rows of rates, candidate scores, likelihoods and the catalogue."""
    device = torch.device("cpu" if rehearse else "cuda")
    torch.manual_seed(0)
    copied = measure_rates(rows, device, rehearse)
    for label, sizes in GATHERS.items():
        sizes = TINY["gather"] if rehearse else sizes
        rows.attempt(f"gather.{label}.", gather, rows, label, sizes, (device, copied))
    for label, sizes in LIKELIHOODS.items():
        sizes = TINY["likelihood"] if rehearse else sizes
        rows.attempt(f"likelihood.{label}.", likelihood, rows, label, sizes, device)
    for n_items in CATALOGUES:
        size = TINY["catalogue"] if rehearse else n_items
        rows.attempt(f"catalogue.{n_items}.", catalogue, rows, f"catalogue.{n_items}", size, device)


def measure_rates(rows: Rows, device: torch.device, rehearse: bool) -> float:
    """Bytes a second that the device copies; writes this rate and those of its products."""
    size = 2**20 if rehearse else 2**30
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copied = 2 * size / seconds_of(lambda: b.copy_(a), device)
    rows.add("rates.copy", copied / 1e9)
    n = 64 if rehearse else 8192
    x, w = torch.randn(2, n, n, device=device).bfloat16()
    rows.add("rates.matmul.bf16", 2 * n**3 / seconds_each([lambda: x @ w] * 4, device) / 1e12)

    def fp8():
        x8, w8 = as_fp8(x), as_fp8(w)
        seconds = seconds_each([lambda: fp8_product(x8[0], w8[0], x8[1], w8[1])] * 4, device)
        rows.add("rates.matmul.fp8", 2 * n**3 / seconds / 1e12)

    rows.attempt("rates.matmul.fp8", fp8)
    return copied


def gather(rows: Rows, label: str, sizes: tuple, where: tuple[torch.device, float]) -> None:
    """Writes the rows of candidate scores of a shape (B, C, T, D, V). where: the device, and bytes
    a second that it copies.
    """
    device, copied = where
    B, C, T, D, V = sizes
    first = Candidates.draw(device, torch.bfloat16, (B, C, T), D, V)
    draws = draws_of(first)
    base, held = f"gather.{label}", sum(c.held() for c in draws) / len(draws)
    calls = [partial(gpu.scores, *four(c), False) for c in draws]
    ours = seconds_each(calls, device)
    rows.add(f"{base}.us", 1e6 * ours)
    rows.add(f"{base}.share_of_copy", held / copied / ours)
    g_BC = torch.randn(B, C, device=device)
    back = [partial(gpu.scores_dx, g_BC, None, *four(c)[1:]) for c in draws]
    backward = seconds_each(back, device)
    rows.add(f"{base}.backward_us", 1e6 * backward)
    rows.add(f"{base}.backward_share_of_copy", held / copied / backward)
    rows.add(f"{base}.call_us", 1e6 * seconds_of(lambda: first.ours(first.x_BD), device))
    for rival in ("full_logits", "eager_gather", "embedding_bag"):
        calls = [partial(getattr(c, rival), c.x_BD) for c in draws]
        rows.attempt(f"{base}.vs_{rival}", against, rows, f"{base}.vs_{rival}", calls, ours)
    rows.attempt(f"{base}.vs_compiled_bag", against_compiled, rows, base, draws, ours)


def draws_of(first: Candidates) -> list[Candidates]:
    """The candidates, and others of their shape: draws_needed of them."""
    device, head_VD = first.x_BD.device, first.head_VD
    sizes = (cache_bytes(device), memory_bytes(device))
    draws = [first]
    for _ in range(1, draws_needed(first.held(), head_VD.nbytes, *sizes)):
        tok_BCT = torch.randint_like(first.tok_BCT, len(head_VD))
        own_VD = torch.empty_like(head_VD).normal_()
        draws.append(Candidates(first.x_BD, own_VD, tok_BCT, first.n_BC, first.weight_BCT))
    return draws


def draws_needed(held: int, head: int, cache: int, memory: int) -> int:
    """How many draws, of `held` bytes each, are four times what the card's second-level cache
    holds: then a round through all leaves nothing of a draw there for the next round. Their heads
    shall take a quarter of the card's memory at most.
    """
    return max(FEWEST, min(-(-4 * cache // held), memory // 4 // head))


def against(rows: Rows, name: str, calls: list[Callable], ours: float) -> None:
    """Writes the row against another way, whose calls are given."""
    rows.add(name, seconds_each(calls, calls[0].args[0].device) / ours)


def four(c: Candidates) -> tuple:
    """What the kernels take of some candidates."""
    return c.x_BD, c.head_VD, c.tok_BCT, c.n_BC


def against_compiled(rows: Rows, base: str, draws: list[Candidates], ours: float) -> None:
    """Writes the row against torch.compile of the way by embedding_bag."""
    device = draws[0].x_BD.device
    torch._dynamo.reset()  # each shape is compiled for itself
    # inductor builds C++ on a CPU, which takes half a minute: there the traced graph is run
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(Candidates.embedding_bag, backend=backend)
    with torch.no_grad():
        seconds = seconds_each([partial(compiled, c, c.x_BD) for c in draws], device)
    rows.add(f"{base}.vs_compiled_bag", seconds / ours)


def likelihood(rows: Rows, label: str, sizes: tuple, device: torch.device) -> None:
    """Writes the rows of the likelihood of titles, (positions, D, V)."""
    found = bench.title_likelihood(device, torch.bfloat16, *sizes)
    write(rows, f"likelihood.{label}", found)


def catalogue(rows: Rows, base: str, n_items: int, device: torch.device) -> None:
    """Writes the rows of the 20 best of a catalogue for 32 users."""
    D, V = (16, 60) if device.type == "cpu" else bench.HEADS[0]
    users = 4 if device.type == "cpu" else 32
    write(rows, base, bench.catalogue(device, torch.bfloat16, n_items, D, V, users))


def write(rows: Rows, base: str, found: list[bench.Row]) -> None:
    """Writes rows of kernels/bench.py under the plan's names, those that the plan has."""
    for row in found:
        name = f"{base}.{row.name.rsplit('.', 1)[1]}"
        if name in rows.names:
            rows.add(name, row.value, "this system does not tell")
