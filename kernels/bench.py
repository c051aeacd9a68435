"""The verbalizer against what one would otherwise write in torch: time and memory.

    python kernels/bench.py            make bench-kernels; about six minutes on 2 cores, 8 GB; on a
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
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from tqdm import tqdm

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.kernels import verbalizer as kernels  # noqa: E402
from delrec.runtime import commit, machine, versions
from delrec.training.memory import extra_bytes

SHAPES = [(16, 15, 12), (64, 20, 12), (256, 20, 16)]
HEADS = [(576, 49152), (2048, 32128), (4096, 128256)]
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def times(methods, device, seconds=2.0, most=15):
    """Median seconds of each method; they take turns after a first call each, at least three rounds
    (one where a round takes ten seconds), about `seconds` in all.
    """
    spent, began = {name: [] for name in methods}, now(device)
    for f in methods.values():
        f()
    rounds, began = 3 if now(device) - began < 10 else 1, now(device)
    while len(next(iter(spent.values()))) < rounds or (
        now(device) - began < seconds and len(next(iter(spent.values()))) < most
    ):
        for name, f in methods.items():
            start = now(device)
            f()
            spent[name].append(now(device) - start)
    return {name: statistics.median(s) for name, s in spent.items()}


def copy_rate(device):
    """Bytes a second this machine moves, reads plus writes, by copying 256 MB."""
    a = torch.empty(2**28, dtype=torch.uint8, device=device).fill_(1)
    b = torch.empty_like(a)
    return 2 * 2**28 / times({"copy": lambda: b.copy_(a)}, device, 1.0)["copy"]


def candidate_scores(rows, device, dtype, B, C, T, D, V, rate):
    g = torch.Generator().manual_seed(0)
    x, head = (
        torch.randn(B, D, generator=g).to(dtype).to(device),
        torch.empty(V, D, dtype=dtype, device=device).normal_(),
    )
    tok, n = (
        torch.randint(0, V, (B, C, T), generator=g, dtype=torch.int32).to(device),
        torch.randint(T // 2, T + 1, (B, C), generator=g, dtype=torch.int32).to(device),
    )
    real = torch.arange(T, device=device) < n[..., None]
    weight = (real / n[..., None]).to(dtype)
    flat, long = tok.view(B * C, T), tok.long()

    def full_logits():
        logit = F.linear(x, head)
        return (logit.gather(1, long.view(B, -1)).view(B, C, T) * weight).sum(2)

    def eager_gather():
        return (torch.einsum("bctd,bd->bct", head[long], x) * weight).sum(2)

    def bag():
        return torch.einsum(
            "bd,bcd->bc",
            x,
            F.embedding_bag(flat, head, mode="sum", per_sample_weights=weight.view(B * C, T)).view(
                B, C, D
            ),
        )

    def ours():
        return kernels.candidate_scores(x, head, tok, n)

    methods = {
        "ours": ours,
        "full_logits": full_logits,
        "eager_gather": eager_gather,
        "embedding_bag": bag,
    }
    if device.type == "cuda":
        methods["compiled_bag"] = torch.compile(bag)
    t = times(methods, device)
    base = f"candidate_scores.{device.type}.{NAMES[dtype]}.{B}x{C}x{T}x{D}"
    best = min(v for k, v in t.items() if k != "ours")
    rows.append(
        (
            f"{base}.vs_full_logits",
            t["full_logits"] / t["ours"],
            "x",
            4 if SHAPES[0] == (B, C, T) else None,
        )
    )
    rows.append((f"{base}.vs_best_torch", best / t["ours"], "x", 0.9))
    rows.append((f"{base}.ms", 1e3 * t["ours"], "ms", None))
    held = (
        (x.numel() + head[long.unique()].numel()) * x.element_size()
        + tok.numel() * 4
        + n.numel() * 4
        + B * C * 4
    )
    bytes_ = extra_bytes(ours, device)
    rows.append(
        (
            f"{base}.memory_vs_inputs_and_outputs",
            None if bytes_ is None else bytes_ / held,
            "share",
            2,
        )
    )
    floor = held / rate
    rows.append(
        (
            f"{base}.share_of_floor",
            floor / t["ours"],
            "share",
            0.7 if device.type == "cuda" and B >= 64 else None,
        )
    )

    xs = x.clone().requires_grad_()
    up = torch.randn(B, C, device=device)

    def pooled(x_):
        return torch.einsum(
            "bd,bcd->bc",
            x_,
            F.embedding_bag(flat, head, mode="sum", per_sample_weights=weight.view(B * C, T)).view(
                B, C, D
            ),
        )

    both = {"ours": lambda x_: kernels.candidate_scores(x_, head, tok, n), "embedding_bag": pooled}
    back = times(
        {
            name: (lambda f=f: torch.autograd.grad((f(xs).float() * up).sum(), xs))
            for name, f in both.items()
        },
        device,
    )
    rows.append(
        (
            f"{base}.forward_backward_vs_embedding_bag",
            back["embedding_bag"] / back["ours"],
            "x",
            None,
        )
    )


def title_likelihood(rows, device, dtype, N, D, V):
    x, head = (
        (torch.randn(N, D) * D**-0.5).to(dtype).to(device),
        torch.empty(V, D, dtype=dtype, device=device).normal_(),
    )
    tok, ptr = (
        torch.randint(0, V, (N,), dtype=torch.int32).to(device),
        torch.arange(0, N + 1, 10, device=device),
    )
    xs, base = x.clone().requires_grad_(), f"title_likelihood.{device.type}.{NAMES[dtype]}.{N}x{V}"

    def full_logits(x_):
        logp = F.log_softmax(F.linear(x_, head).float(), dim=1).gather(1, tok.long()[:, None])[:, 0]
        return logp.view(-1, 10).sum(1)

    def ours(x_):
        return kernels.title_likelihood(x_, head, tok, ptr)

    with torch.no_grad():
        t = times({"ours": lambda: ours(x), "full_logits": lambda: full_logits(x)}, device)
        memory = [extra_bytes(lambda f=f: f(x), device) for f in (ours, full_logits)]
    rows.append((f"{base}.time_vs_full_logits", t["full_logits"] / t["ours"], "x", 1))
    rows.append((f"{base}.ms", 1e3 * t["ours"], "ms", None))
    rows.append(
        (
            f"{base}.memory_vs_full_logits",
            None if None in memory or not memory[1] else memory[0] / memory[1],
            "share",
            0.125,
        )
    )
    if V > 2**16:
        # minutes on a CPU; the ratio is that of the other shapes
        return
    t = times(
        {
            name: (lambda f=f: torch.autograd.grad(f(xs).sum(), xs))
            for name, f in {"ours": ours, "full_logits": full_logits}.items()
        },
        device,
    )
    rows.append((f"{base}.forward_backward_vs_full_logits", t["full_logits"] / t["ours"], "x", 1))


def catalogue(rows, device, dtype, n_items, D, V, B=32, T=12, k=20):
    x, head = (
        torch.randn(B, D).to(dtype).to(device),
        torch.empty(V, D, dtype=dtype, device=device).normal_(),
    )
    tok, ptr = (
        torch.randint(0, V, (n_items * T,), dtype=torch.int32).to(device),
        torch.arange(0, n_items * T + 1, T, device=device),
    )
    seen = torch.randint(0, n_items, (B, 20)).to(device)
    base = f"catalogue.{device.type}.{n_items}.{NAMES[dtype]}"

    def in_torch():
        logit = F.linear(head, x).float()
        score = F.embedding_bag(tok, logit, ptr[:-1].int(), mode="mean").t().contiguous()
        score.scatter_(1, seen, -torch.inf)
        return score.topk(k, dim=1)

    def ours():
        return kernels.catalogue_topk(x, head, ptr, tok, k, seen)

    t = times({"ours": ours, "torch": in_torch}, device)
    bytes_ = extra_bytes(ours, device)
    rows.append(
        (
            f"{base}.ms_per_user",
            1e3 * t["ours"] / B,
            "ms",
            8 if n_items == 1_300_000 and device.type == "cpu" else None,
        )
    )
    rows.append((f"{base}.vs_torch", t["torch"] / t["ours"], "x", None))
    rows.append((f"{base}.ns_per_token_and_user", 1e9 * t["ours"] / (B * n_items * T), "ns", None))
    rows.append((f"{base}.memory_mb", None if bytes_ is None else bytes_ / 2**20, "MB", 512))


def report(rows, threads):
    """The table of what was measured, and as the last line all rows as one JSON object; a row is
    (name, value or None, unit, goal or None).
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


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="the smallest shapes only, under a minute")
@click.option("--threads", default=2, type=click.IntRange(1), help="threads on the CPU")
def main(quick, threads):
    """Time and memory of the verbalizer's three functions against plain torch."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, rows, jobs = copy_rate(device), [], []
    for dtype in NAMES:
        for D, V in HEADS[:1] if quick else HEADS:
            jobs += [
                (candidate_scores, (dtype, B, C, T, D, V, rate))
                for B, C, T in (SHAPES[:1] if quick else SHAPES)
            ]
            jobs += [(title_likelihood, (dtype, 200 if quick else 2000, D, V))]
        jobs += [
            (catalogue, (dtype, n_items, 576, 49152))
            for n_items in ((1_000, 10_000) if quick else (1_000, 10_000, 100_000, 1_300_000))
        ]
    for function, args in tqdm(jobs, unit="shape", disable=None):
        function(rows, device, *args)

    # never a guessed number: the same command on a machine with a GPU fills these
    if device.type == "cpu":
        rows += [
            (f"candidate_scores.gpu.{d}.{B}x{C}x{T}x{D}.{what}", None, unit, goal)
            for d in NAMES.values()
            for D, _ in HEADS
            for B, C, T in SHAPES
            for what, unit, goal in (
                ("vs_full_logits", "x", None),
                ("vs_best_torch", "x", None),
                ("share_of_floor", "share", 0.7 if B >= 64 else None),
            )
        ]
        rows += [
            (f"title_likelihood.gpu.{d}.2000x{V}.{what}", None, unit, goal)
            for d in NAMES.values()
            for _, V in HEADS
            for what, unit, goal in (
                ("time_vs_full_logits", "x", 1),
                ("memory_vs_full_logits", "share", 0.1),
            )
        ]
        rows += [
            (f"catalogue.gpu.{n_items}.{d}.ms_per_user", None, "ms", None)
            for d in NAMES.values()
            for n_items in (1_000, 10_000, 100_000, 1_300_000)
        ]
    rows = [(name.replace(".cuda.", ".gpu."), *rest) for name, *rest in rows]
    print(f"copies {rate / 1e9:.1f} GB/s")
    report(rows, threads)


if __name__ == "__main__":
    main()
