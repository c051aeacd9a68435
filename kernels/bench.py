"""The verbalizer against what one would otherwise write in torch: time and memory.

    python kernels/bench.py            make bench-kernels; about ten minutes on 2 cores, 8 GB; on a
                                       GPU where there is one
    python kernels/bench.py --quick    the smallest shapes only

Ratios come from one run: the methods take turns on the same inputs, medians count. vs_X is X's time
over ours, above 1 we are faster. Memory is the peak beyond what was held before (host: the kernel's
high-water mark of this process; GPU: the allocator's). A table, and one JSON line at the end.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from tqdm import tqdm

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.kernels import cpu  # noqa: E402
from delrec.kernels import verbalizer as kernels  # noqa: E402
from delrec.runtime import commit, machine, versions
from delrec.training.memory import extra_bytes

SHAPES = [(16, 15, 12), (64, 20, 12), (256, 20, 16)]  # B, C, T
HEADS = [(576, 49152), (2048, 32128), (4096, 128256)]  # D, V
POSITIONS = [64, 256, 1024, 2000]  # of titles' tokens
CATALOGUES = [1_000, 10_000, 100_000, 1_300_000]  # titles
SOFTMAXES = [(700, 100, 12_101), (5_000, 100, 1_682), (300, 256, 5_000)]  # N, D, items
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class Row(NamedTuple):
    """One measurement."""

    name: str
    value: float | None  # None: not measured here
    unit: str
    goal: float | None = None


# ---------------------------------------------------------------- measuring


def now(device: torch.device) -> float:
    """Seconds, once the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def times(
    methods: dict[str, Callable], device: torch.device, seconds: float = 2.0, most: int = 15
) -> dict[str, float]:
    """Median seconds of each method; they take turns after a first call each, at least three rounds
    (one where a round takes ten seconds), about `seconds` in all.
    """
    spent = {name: [] for name in methods}
    began = now(device)
    for f in methods.values():
        f()
    rounds = 3 if now(device) - began < 10 else 1
    began = now(device)
    while len(next(iter(spent.values()))) < rounds or (
        now(device) - began < seconds and len(next(iter(spent.values()))) < most
    ):
        for name, f in methods.items():
            start = now(device)
            f()
            spent[name].append(now(device) - start)
    return {name: statistics.median(s) for name, s in spent.items()}


def times_with_backward(
    methods: dict[str, Callable], x: torch.Tensor, device: torch.device
) -> dict[str, float]:
    """The same of each method's value at x and its gradient with respect to x."""

    def both(method):
        return lambda: torch.autograd.grad(method(x), x)

    return times({name: both(method) for name, method in methods.items()}, device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second this machine moves, reads plus writes, by copying 256 MB."""
    a = torch.empty(2**28, dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2 * 2**28 / times({"copy": lambda: b.copy_(a)}, device, 1.0)["copy"]


# ---------------------------------------------------------------- candidate scores


@dataclass
class Candidates:
    """Random titles of candidates, and the states that score them."""

    x_BD: torch.Tensor
    head_VD: torch.Tensor
    tok_BCT: torch.Tensor  # int32
    n_BC: torch.Tensor  # int32
    weight_BCT: torch.Tensor  # 1/n for a title's tokens, 0 behind them

    @classmethod
    def draw(
        cls, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], D: int, V: int
    ) -> "Candidates":
        """Candidates of a shape (B, C, T)."""
        B, C, T = shape
        g = torch.Generator().manual_seed(0)
        x_BD = torch.randn(B, D, generator=g).to(dtype).to(device)
        head_VD = torch.empty(V, D, dtype=dtype, device=device).normal_()
        tok_BCT = torch.randint(0, V, shape, generator=g, dtype=torch.int32).to(device)
        n_BC = torch.randint(T // 2, T + 1, (B, C), generator=g, dtype=torch.int32).to(device)
        inside_BCT = torch.arange(T, device=device) < n_BC[..., None]
        weight_BCT = (inside_BCT / n_BC[..., None]).to(dtype)
        return cls(x_BD, head_VD, tok_BCT, n_BC, weight_BCT)

    def ours(self, x_BD: torch.Tensor) -> torch.Tensor:
        """The scores by our kernels, as the LM's verbalizers call them: nothing is looked at."""
        return kernels.candidate_scores(x_BD, self.head_VD, self.tok_BCT, self.n_BC, known=True)

    def full_logits(self, x_BD: torch.Tensor) -> torch.Tensor:
        """The scores by way of all V logits."""
        logit_BV = F.linear(x_BD, self.head_VD)
        tok_BX = self.tok_BCT.long().flatten(1)
        logit_BCT = logit_BV.gather(1, tok_BX).view(self.tok_BCT.shape)
        return (logit_BCT * self.weight_BCT).sum(2)

    def eager_gather(self, x_BD: torch.Tensor) -> torch.Tensor:
        """The scores by way of the rows of all tokens (B, C, T, D)."""
        rows_BCTD = self.head_VD[self.tok_BCT.long()]
        return (torch.einsum("bctd,bd->bct", rows_BCTD, x_BD) * self.weight_BCT).sum(2)

    def embedding_bag(self, x_BD: torch.Tensor) -> torch.Tensor:
        """The scores by way of the mean rows (B, C, D)."""
        B, C, T = self.tok_BCT.shape
        tok_NT, weight_NT = self.tok_BCT.view(B * C, T), self.weight_BCT.view(B * C, T)
        row_ND = F.embedding_bag(tok_NT, self.head_VD, mode="sum", per_sample_weights=weight_NT)
        return torch.einsum("bd,bcd->bc", x_BD, row_ND.view(B, C, -1))

    def held(self) -> int:
        """Bytes of what must be read and written: of the head the different rows of titles' own
        tokens, not of those behind a title's end.
        """
        inside_BCT = self.weight_BCT > 0
        rows = len(self.tok_BCT[inside_BCT].unique()) * self.x_BD.shape[1]
        read = (self.x_BD.numel() + rows) * self.x_BD.element_size()
        return read + self.tok_BCT.numel() * 4 + 2 * self.n_BC.numel() * 4


def candidate_scores(
    device: torch.device, dtype: torch.dtype, shape: tuple, D: int, V: int, rate: float
) -> list[Row]:
    """Rows of candidates of a shape (B, C, T); rate: bytes a second that the device copies."""
    c = Candidates.draw(device, dtype, shape, D, V)
    names = ("ours", "full_logits", "eager_gather", "embedding_bag")
    methods = {name: partial(getattr(c, name), c.x_BD) for name in names}
    if device.type == "cuda":
        methods["compiled_bag"] = torch.compile(methods["embedding_bag"])
    t = times(methods, device)
    ours = t["ours"]
    best = min(v for k, v in t.items() if k != "ours")
    held = c.held()
    extra = extra_bytes(methods["ours"], device)
    share = None if extra is None else extra / held
    xs_BD = c.x_BD.clone().requires_grad_()
    up_BC = torch.randn(shape[:2], device=device)
    back = times_with_backward(
        {
            "ours": lambda x_BD: (c.ours(x_BD).float() * up_BC).sum(),
            "embedding_bag": lambda x_BD: (c.embedding_bag(x_BD).float() * up_BC).sum(),
        },
        xs_BD,
        device,
    )
    sizes = "x".join(map(str, (*shape, D)))
    base = f"candidate_scores.{device.type}.{NAMES[dtype]}.{sizes}"
    first = shape == SHAPES[0]
    rows = [
        Row(f"{base}.vs_full_logits", t["full_logits"] / ours, "x", 4 if first else None),
        Row(f"{base}.vs_best_torch", best / ours, "x", 0.9),
        Row(f"{base}.ms", 1e3 * ours, "ms"),
        Row(f"{base}.memory_vs_inputs_and_outputs", share, "share", 2),
        Row(
            f"{base}.forward_backward_vs_embedding_bag",
            back["embedding_bag"] / back["ours"],
            "x",
            0.95 if device.type == "cpu" else None,
        ),
    ]
    if device.type == "cpu":
        # a card's cache would hold these few inputs: make gpu reads past it
        rows.append(Row(f"{base}.share_of_floor", held / rate / ours, "share"))
    return rows


# ---------------------------------------------------------------- title likelihood


def title_likelihood(device: torch.device, dtype: torch.dtype, N: int, D: int, V: int) -> list[Row]:
    """Rows of the likelihood of titles of four tokens, N in all."""
    x_ND = (torch.randn(N, D) * D**-0.5).to(dtype).to(device)
    head_VD = torch.empty(V, D, dtype=dtype, device=device).normal_()
    tok_N = torch.randint(0, V, (N,), dtype=torch.int32).to(device)
    ptr = torch.arange(0, N + 1, 4, device=device)

    def full_logits(x):
        logp_NV = F.log_softmax(F.linear(x, head_VD).float(), dim=1)
        return logp_NV.gather(1, tok_N.long()[:, None])[:, 0].view(-1, 4).sum(1)

    def ours(x):
        return kernels.title_likelihood(x, head_VD, tok_N, ptr, known=True)

    with torch.no_grad():
        methods = {"ours": partial(ours, x_ND), "full_logits": partial(full_logits, x_ND)}
        t = times(methods, device)
        memory, full_memory = (extra_bytes(f, device) for f in methods.values())
    share = memory / full_memory if memory is not None and full_memory else None
    base = f"title_likelihood.{device.type}.{NAMES[dtype]}.{N}x{V}"
    rows = [
        Row(f"{base}.time_vs_full_logits", t["full_logits"] / t["ours"], "x", 1),
        Row(f"{base}.ms", 1e3 * t["ours"], "ms"),
        # few rows: either is little
        Row(f"{base}.memory_vs_full_logits", share, "share", 0.13 if N >= 2000 else None),
    ]
    if V > 2**16:
        # minutes on a CPU; the ratio is that of the other shapes
        return rows
    t = times_with_backward(
        {"ours": lambda x: ours(x).sum(), "full_logits": lambda x: full_logits(x).sum()},
        x_ND.clone().requires_grad_(),
        device,
    )
    ratio = t["full_logits"] / t["ours"]
    return [*rows, Row(f"{base}.forward_backward_vs_full_logits", ratio, "x", 1)]


# ---------------------------------------------------------------- the catalogue


def catalogue(
    device: torch.device, dtype: torch.dtype, n_items: int, D: int, V: int, B: int = 32
) -> list[Row]:
    """Rows of the 20 best of n_items titles of 12 tokens, for B users."""
    T, k = 12, 20
    x_BD = torch.randn(B, D).to(dtype).to(device)
    head_VD = torch.empty(V, D, dtype=dtype, device=device).normal_()
    tok_M = torch.randint(0, V, (n_items * T,), dtype=torch.int32).to(device)
    ptr = torch.arange(0, n_items * T + 1, T, device=device)
    seen_BS = torch.randint(0, n_items, (B, 20)).to(device)

    def in_torch():
        logit_VB = F.linear(head_VD, x_BD).float()
        score_IB = F.embedding_bag(tok_M, logit_VB, ptr[:-1].int(), mode="mean")
        score_BI = score_IB.t().contiguous()
        score_BI.scatter_(1, seen_BS, -torch.inf)
        return score_BI.topk(k, dim=1)

    def ours():
        return kernels.catalogue_topk(x_BD, head_VD, ptr, tok_M, k, seen_BS, known=True)

    t = times({"ours": ours, "torch": in_torch}, device)
    memory = extra_bytes(ours, device)
    base = f"catalogue.{device.type}.{n_items}.{NAMES[dtype]}"
    goal = 8 if n_items == CATALOGUES[-1] and device.type == "cpu" else None
    return [
        Row(f"{base}.ms_per_user", 1e3 * t["ours"] / B, "ms", goal),
        Row(f"{base}.vs_torch", t["torch"] / t["ours"], "x"),
        Row(f"{base}.ns_per_token_and_user", 1e9 * t["ours"] / (B * n_items * T), "ns"),
        Row(f"{base}.memory_mb", None if memory is None else memory / 2**20, "MB", 512),
    ]


# ---------------------------------------------------------------- a backbone's softmax


def softmax(N: int, D: int, n_items: int) -> list[Row]:
    """Rows of the softmax over all items and its gradients on a CPU, in bf16; torch's in fp32."""
    inputs = torch.randn(N, D), torch.randn(n_items, D) * 0.1, torch.zeros(n_items)
    x_ND, head_ID, bias_I = (t.requires_grad_() for t in inputs)
    tok_N1, one_N1 = torch.randint(0, n_items, (N, 1)), torch.ones(N, 1)

    def ours():
        return cpu.softmax_sums(x_ND.bfloat16(), head_ID.bfloat16(), bias_I, tok_N1, one_N1)

    def in_torch():
        log_sum = torch.addmm(bias_I, x_ND, head_ID.T).logsumexp(1).sum()
        return torch.autograd.grad(log_sum, (x_ND, head_ID, bias_I))

    t = times({"ours": ours, "torch": in_torch}, x_ND.device)
    base = f"softmax.cpu.bf16.{N}x{D}x{n_items}"
    vs_torch = Row(f"{base}.vs_torch_fp32", t["torch"] / t["ours"], "x", 2)
    return [vs_torch, Row(f"{base}.ms", 1e3 * t["ours"], "ms")]


# ---------------------------------------------------------------- all of it


def report(rows: list[tuple], threads: int) -> None:
    """Prints the table of what was measured, and as the last line all rows as one JSON object; each
    is a Row, or such a tuple of four.
    """
    print(f"\n{machine()}; {threads} threads")
    for name, value, unit, goal in rows:
        if value is not None:
            print(
                f"{name:<78}{value:>10.3f} {unit:<8}"
                + (f" goal {goal}" if goal is not None else "")
            )
    if any(value is None for _, value, *_ in rows):
        print(
            f"not measured here: {sum(value is None for _, value, *_ in rows)} rows, those of a "
            "GPU; the same command on a machine with one fills them"
        )
    print(
        json.dumps(
            {
                "machine": machine(),
                "versions": versions() | {"threads": threads},
                "commit": commit(),
                "rows": [
                    {"name": n, "value": None if v is None else round(v, 4), "unit": u, "goal": g}
                    for n, v, u, g in rows
                ],
            }
        )
    )


def jobs_of(device: torch.device, rate: float, quick: bool) -> list[Callable]:
    """What is measured, one call a shape; quick: the smallest shapes only."""
    shapes = SHAPES[:1] if quick else SHAPES
    positions = [200] if quick else POSITIONS
    jobs = []
    for dtype in NAMES:
        for D, V in HEADS[:1] if quick else HEADS:
            jobs += [partial(candidate_scores, device, dtype, s, D, V, rate) for s in shapes]
            jobs += [partial(title_likelihood, device, dtype, n, D, V) for n in positions]
        sizes = CATALOGUES[:2] if quick else CATALOGUES
        jobs += [partial(catalogue, device, dtype, n_items, *HEADS[0]) for n_items in sizes]
    if device.type == "cpu" and cpu.has_fast_bf16():  # elsewhere it is not used
        jobs += [partial(softmax, *shape) for shape in SOFTMAXES[: 1 if quick else None]]
    return jobs


def rows_of_a_gpu() -> list[Row]:
    """The rows that only a GPU fills; never a guessed number."""
    rows = []
    for d in NAMES.values():
        for D, _ in HEADS:
            for B, C, T in SHAPES:
                base = f"candidate_scores.gpu.{d}.{B}x{C}x{T}x{D}"
                rows.append(Row(f"{base}.vs_full_logits", None, "x"))
                rows.append(Row(f"{base}.vs_best_torch", None, "x"))
    for d in NAMES.values():
        for V, n in product((V for _, V in HEADS), POSITIONS):
            base = f"title_likelihood.gpu.{d}.{n}x{V}"
            rows.append(Row(f"{base}.time_vs_full_logits", None, "x", 1))
            goal = 0.13 if n >= 2000 else None
            rows.append(Row(f"{base}.memory_vs_full_logits", None, "share", goal))
    for d in NAMES.values():
        for n_items in CATALOGUES:
            rows.append(Row(f"catalogue.gpu.{n_items}.{d}.ms_per_user", None, "ms"))
    return rows


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="the smallest shapes only, under a minute")
@click.option("--threads", default=2, type=click.IntRange(1), help="threads on the CPU")
def main(quick: bool, threads: int) -> None:
    """Time and memory of the kernels against plain torch."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = copy_rate(device)
    rows = []
    for job in tqdm(jobs_of(device, rate, quick), unit="shape", disable=None):
        rows += job()
    if device.type == "cpu":
        rows += rows_of_a_gpu()
    rows = [row._replace(name=row.name.replace(".cuda.", ".gpu.")) for row in rows]
    print(f"copies {rate / 1e9:.1f} GB/s")
    report(rows, threads)


if __name__ == "__main__":
    main()
