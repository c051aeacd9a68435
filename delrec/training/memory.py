"""Memory: what this process holds, what a call takes, what is free."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from delrec.processes import Ranks, max_over_ranks
from delrec.runtime import stop

try:
    import resource  # what a process has held
except ImportError:  # not on Windows
    resource = None

CPU_TOKENS = 5000  # of a pass on a CPU: about what its caches hold


def peak_gb(children: bool = False) -> float:
    """Most memory this process has held so far, GB (host; plus the GPU's where there is one); or
    any of its children. 0 for the host where the system does not tell (Windows)."""
    host = None if children else own_peak()
    if host is None:
        host = counted_peak(children)
    own_gpu = torch.cuda.is_available() and not children
    return host + (torch.cuda.max_memory_allocated() / 2**30 if own_gpu else 0)


def own_peak() -> float | None:
    """The most that Linux has seen of this process' own memory, GB; None on other systems."""
    try:
        return of_status("VmHWM") / 2**30
    except (OSError, StopIteration):
        return None


def counted_peak(children: bool) -> float:
    """The most memory that this process, or any of its children, has held, as every Unix counts it,
    GB: it begins with the memory of the starting process."""
    if resource is None:
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux kilobytes
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss / unit


def of_status(key: str) -> int:
    """Bytes that a line of this process' status tells (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def extra_bytes(f: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one call beyond what is held before it (None where this system does not
    tell).
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    # what torch freed before counts as free; glibc alone has it
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)

    try:
        with open("/proc/self/clear_refs", "w") as mark:  # 5: forget the high-water mark
            mark.write("5")
        before = of_status("VmRSS")
    except (OSError, StopIteration):
        return None
    f()
    return max(of_status("VmHWM") - before, 0)


def total_bytes(device: torch.device) -> int | None:
    """Memory of the GPU, or of this machine (None where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take; on a GPU also what its allocator holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return total_bytes(device)
    lines = meminfo.read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


def micro_of(
    micro: int | str, batch: int, trials: Iterable[tuple], ranks: Ranks
) -> tuple[int, int]:
    """(how many samples a pass takes, how many it could take): `micro`, or with "auto" as many of
    the longest as memory holds. A pass takes at most this process' part of a batch.

    trials: pairs (loss, samples) that are tried; loss(samples) is a tensor. They are tried with
    "auto", and where several GPUs share a batch, to say what each has room for."""
    most = -(-batch // ranks.world)
    if micro != "auto" and (ranks.device.type != "cuda" or ranks.world == 1):
        return min(micro, most), micro
    room = []
    for loss, samples in trials:
        longest = sorted(samples, key=lambda sample: -len(sample.tail))

        def a_pass(m, loss=loss, longest=longest):
            loss(longest[:m]).backward()

        tails = [sample.tail for sample in longest]
        room.append(largest_micro(a_pass, tails, ranks.device, ranks))
    if micro == "auto":
        could = min(room, default=most)
        return min(could, most), could
    return min(micro, most), min(micro, *room)


def largest_micro(
    step: Callable[[int], Any], tails: list[np.ndarray], device: torch.device, ranks: Ranks
) -> int:
    """How many prompts of a forward and backward pass fit into memory.

    step(m) runs one on the m longest prompts. Two passes are measured, the rest is a line through
    them, with a fifth of what is free left over; a second prompt is tried only where twice the
    first fits. On a CPU no more than fill its caches, where more is not faster.
    """
    most = max(1, CPU_TOKENS // max(map(len, tails))) if device.type == "cpu" else None
    step(1)  # the first pass also allocates what stays
    one = extra_bytes(lambda: step(1), device)
    if one is None:
        stop(
            "--micro auto: this system does not tell how much memory a pass takes; give --micro a "
            "number"
        )
    said, fits = f"--micro auto: a prompt takes {one / 2**20:.0f} MB", 1
    if most != 1 and len(tails) > 1 and least(2 * one <= free_bytes(device), ranks):
        each = max(extra_bytes(lambda: step(2), device) - one, 0)
        fits += int(max(0.8 * free_bytes(device) - one, 0) / max(each, 1))
        said += f", each further one {each / 2**20:.0f} MB"
    fits = least(fits, ranks)
    if ranks.main:
        caches = f", {most} fill the caches" if most else ""
        print(f"{said}; {fits} would fit{caches}", flush=True)
    return min(fits, most or fits)


def least(x: int, ranks: Ranks) -> int:
    """The smallest of a number over all processes, which all go on with."""
    return x if ranks.world == 1 else int(-max_over_ranks(-x, ranks))
