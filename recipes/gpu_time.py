"""What the stages of make gpu measure with: seconds of work that the host launches, and rates.

The calls that exist on CUDA alone stand here, each alone in its function, so that the rehearsal
runs everything around them: graph_of, cap_memory, peak_gb, cache_bytes, memory_bytes.
"""

import statistics
import time
from collections.abc import Callable

import torch

from delrec.kernels.bench import now

GB = 2**30


def graph_of(calls: list[Callable], device: torch.device) -> Callable:
    """A function that makes all the calls: on CUDA one replay of a graph that was captured after
    the calls ran twice, so that launching costs the host nothing.
    """

    def one_by_one():
        for call in calls:
            call()

    one_by_one()
    if device.type != "cuda":
        return one_by_one
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        one_by_one()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        one_by_one()
    return graph.replay


def seconds_of(call: Callable, device: torch.device, rounds: int = 7, most: float = 2.0) -> float:
    """Median seconds of a call, after a first one; fewer rounds (at least 2) than asked for where
    they would take longer than `most` seconds, and on a CPU, where no number counts.
    """
    rounds = rounds if device.type == "cuda" else 2
    call()
    began, spent = now(device), []
    while len(spent) < rounds and (len(spent) < 2 or time.perf_counter() - began < most):
        start = now(device)
        call()
        spent.append(now(device) - start)
    return statistics.median(spent)


def seconds_each(calls: list[Callable], device: torch.device) -> float:
    """Median seconds of one of several calls of the same work on different inputs, launched as one
    graph.
    """
    return seconds_of(graph_of(calls, device), device) / len(calls)


def forget_peak(device: torch.device) -> None:
    """From now on peak_gb counts anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: torch.device) -> float | None:
    """Most GB of the card's memory that were held since forget_peak; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GB if device.type == "cuda" else None


def cache_bytes(device: torch.device) -> int:
    """Bytes of the card's second-level cache; 0 on a CPU, where no number counts."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def memory_bytes(device: torch.device) -> int:
    """Bytes of the card's memory; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).total_memory


def cap_memory(device: torch.device, limit_gb: float | None) -> None:
    """From now on this process gets at most so many GB of the card; None: all of it."""
    if device.type == "cuda":
        total = memory_bytes(device) / GB
        torch.cuda.set_per_process_memory_fraction(min((limit_gb or total) / total, 1.0))


def fp8_product(
    x_ND: torch.Tensor, w_MD: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor
) -> torch.Tensor:
    """(N, M) in bf16: the product of fp8 rows, each with a scale of its own."""
    return torch._scaled_mm(
        x_ND, w_MD.t(), scale_a=x_scale, scale_b=w_scale.t(), out_dtype=torch.bfloat16
    )


def as_fp8(x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows in fp8 e4m3, the scale of each (N, 1)): the largest of a row becomes 448."""
    scale_N1 = x_ND.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    return (x_ND / scale_N1).to(torch.float8_e4m3fn), scale_N1
