"""What the compiler made of the Triton kernels, for four generations of GPUs; no GPU is needed.

    python kernels/compiled.py            a table; three minutes on a CPU
    python kernels/compiled.py --quick    one kernel of each kind on one card

The launchers of gpu.py are called on tensors without memory (torch's device "meta"). A launch only
compiles, so block sizes, warps, grids and alignments are those of a real call. Then:

registers   of a thread, and the stack it spills to, as cuobjdump -res-usage says
loads       128-bit loads of global memory among all loads of it, in the machine code
barriers    in the kernel's loops: at each of them the fastest warp waits for the slowest
blocks      that one SM holds: the least of what its warps, registers, shared memory and its limit
            of blocks allow. Registers are given to a warp in steps of 256, out of four parts of
            the SM; a block takes 1 KB of shared memory for itself
in flight   bytes that an SM asked for and did not get yet: warps that it holds x 32 threads x the
            most bytes that a thread has asked for before the first instruction that needs one of
            them. An upper bound: masked threads ask for nothing. A card whose memory gives R
            bytes a second after L seconds needs R x L bytes in flight on all SMs
waves       blocks of the launch / (blocks on an SM x SMs of the card), at B = 1, 32 and 256

A table, and one JSON line at the end.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import click
import torch
from tqdm import tqdm

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec.runtime import commit, stop, versions  # noqa: E402

BATCHES = (1, 32, 256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CANDIDATES, TOKENS = 20, 12
WIDTH, VOCABULARY = 2048, 32128  # of Flan-T5-XL's head
TITLES = 12_101  # Beauty's catalogue


class Card(NamedTuple):
    """A card, and the published limits of one of its SMs."""

    name: str
    sm: int  # compute capability times ten
    count: int  # SMs
    warps: int  # of an SM, at most
    blocks: int  # of an SM, at most
    shared_kb: int  # of an SM


CARDS = (
    Card("A100", 80, 108, 64, 32, 164),
    Card("RTX 3090", 86, 82, 48, 16, 100),
    Card("RTX 4090", 89, 128, 48, 24, 100),
    Card("H200", 90, 132, 64, 32, 228),
)


class Usage(NamedTuple):
    """What a compiled kernel needs and does."""

    registers: int  # of a thread
    stack: int  # bytes of a thread in slow memory: spilled registers
    shared: int  # bytes of a block
    warps: int  # of a block
    loads: int  # of global memory, in the machine code
    wide: int  # those of 128 bits
    barriers: int  # in loops
    asked: int  # bytes that a thread asks for before it needs the first of them


class Launch(NamedTuple):
    """A kernel as it was launched."""

    blocks: int
    usage: Usage


# ---------------------------------------------------------------- compiling


class NoCard:
    """Triton's driver of a card that is not there: it only says which card to compile for."""

    def __init__(self, sm: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", sm, 32)

    def get_current_target(self) -> object:
        """The card to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """A number of the card, under which Triton keeps what it compiled."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        """A stream's number: nothing is launched on it."""
        return 0


def launches(sm: int, call: Callable) -> list[Launch]:
    """What a call of a launcher would launch on a card of compute capability sm / 10."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compile_only, found = JITFunction.run, {}

    def run(kernel, *args, grid, warmup, **kwargs):
        built = compile_only(kernel, *args, grid=grid, warmup=True, **kwargs)
        # a launcher that goes in pieces: the first one counts, the last may be smaller
        if kernel not in found:
            found[kernel] = Launch(math.prod(grid), usage_of(built))

    with patch.object(driver, "_active", NoCard(sm)), patch.object(JITFunction, "run", run):
        call()
    return list(found.values())


def calls_of(B: int, dtype: torch.dtype) -> dict[str, Callable]:
    """A call of each launcher for B prompts, on tensors without memory."""
    from delrec.kernels import gpu

    def empty(*shape, dtype=torch.int32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    C, T = CANDIDATES, TOKENS
    D, V = WIDTH, VOCABULARY
    x_BD, head_VD = empty(B, D, dtype=dtype), empty(V, D, dtype=dtype)
    tok_BCT, n_BC, g_BC = empty(B, C, T), empty(B, C), empty(B, C, dtype=torch.float32)
    tok_N, x_ND = empty(B * T), empty(B * T, D, dtype=dtype)
    ptr, tok_M = empty(TITLES + 1, dtype=torch.int64), empty(TITLES * T)
    seen_BS = empty(B, 20, dtype=torch.int64)
    likelihood = partial(gpu.log_probs, x_ND, head_VD, tok_N, None)
    return {
        "scores": partial(gpu.scores, x_BD, head_VD, tok_BCT, n_BC, False),
        "scores, backward": partial(gpu.scores_dx, g_BC, None, head_VD, tok_BCT, n_BC),
        "likelihood": partial(likelihood, False),
        "likelihood + gradient": partial(likelihood, True),
        "catalogue": partial(gpu.catalogue_topk, x_BD, head_VD, ptr, tok_M, 20, seen_BS, None),
    }


# ---------------------------------------------------------------- reading what was compiled


@functools.cache
def usage_of(built: object) -> Usage:
    """What Triton's compiled kernel needs and does, by its machine code."""
    import triton

    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    number = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said[0])}
    code = instructions(said[1])
    loads = [bytes_of(name) for _, name, _ in code if name.startswith("LDG")]
    return Usage(
        registers=number["REG"],
        stack=number["STACK"] + number["LOCAL"],
        shared=built.metadata.shared,
        warps=built.metadata.num_warps,
        loads=len(loads),
        wide=loads.count(16),
        barriers=barriers_in_loops(code),
        asked=most_asked(code),
    )


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, name, operands) of each instruction of a listing."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", sass)
    return [(int(address, 16), name, operands) for address, name, operands in found]


def bytes_of(load: str) -> int:
    """Bytes that a load instruction fetches for a thread."""
    for part, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if part in load.split("."):
            return size
    return 4


def barriers_in_loops(code: list[tuple[int, str, str]]) -> int:
    """Barriers that stand between a jump back and where it leads."""
    inside = set()
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            begin = int(target[1], 16)
            inside |= {a for a, n, _ in code if n.startswith("BAR") and begin <= a < address}
    return len(inside)


def most_asked(code: list[tuple[int, str, str]]) -> int:
    """The most bytes that a thread has asked for before an instruction needs one of them."""
    under_way, most = {}, 0  # {number of a register: the load that fills it}
    for at, (_, name, operands) in enumerate(code):
        touched = {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}
        touched |= {int(n) + 1 for n in re.findall(r"\bR(\d+)\.64\b", operands)}
        arrived = {under_way[n] for n in touched if n in under_way}
        under_way = {n: load for n, load in under_way.items() if load not in arrived}
        if name.startswith("LDG"):
            first, size = int(re.search(r"\bR(\d+)\b", operands)[1]), bytes_of(name)
            under_way |= {first + i: (at, size) for i in range(max(1, size // 4))}
            most = max(most, sum(size for _, size in set(under_way.values())))
    return most


# ---------------------------------------------------------------- what a card makes of it


def blocks_held(card: Card, usage: Usage) -> int:
    """Blocks that one SM of the card holds at a time."""
    of_a_warp = -(-usage.registers * 32 // 256) * 256
    warps = 4 * (16384 // of_a_warp)
    shared = card.shared_kb * 1024 // (usage.shared + 1024)
    return min(card.blocks, min(card.warps, warps) // usage.warps, shared)


def row_of(card: Card, dtype: str, what: str, at: dict[int, Launch]) -> dict:
    """A row of the table: launches {B: launch} on a card; lists hold a value for each B."""
    held = [blocks_held(card, launch.usage) for launch in at.values()]
    kb = [n * a.usage.warps * 32 * a.usage.asked / 1024 for n, a in zip(held, at.values())]
    waves = [a.blocks / (n * card.count) for n, a in zip(held, at.values())]
    row = {"kernel": what, "dtype": dtype, "card": card.name, "sm": card.sm}
    row |= {name: [getattr(a.usage, name) for a in at.values()] for name in Usage._fields}
    row |= {"blocks": [a.blocks for a in at.values()], "blocks_held": held}
    return row | {"kb_in_flight": kb, "waves": [round(n, 3) for n in waves]}


def rows_of(card: Card, dtype: str, batches: tuple[int, ...] = BATCHES) -> list[dict]:
    """The rows of all kernels on a card, for inputs of a dtype."""
    calls, found = {B: calls_of(B, DTYPES[dtype]) for B in batches}, []
    for what in calls[batches[0]]:
        at = {B: launches(card.sm, calls[B][what]) for B in batches}
        for i in range(len(at[batches[0]])):
            found.append(row_of(card, dtype, what, {B: at[B][i] for B in batches}))
    return found


def shortest(values: list, form: str = "{}") -> str:
    """The values for each B as text; one where all are alike."""
    texts = [form.format(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def table(rows: list[dict]) -> str:
    """The rows as a table in markdown; a / b / c stand for B = 1, 32 and 256."""
    head = ("kernel", "card", "warps", "registers", "spilled bytes", "128-bit loads")
    head += ("barriers in loops", "blocks an SM", "KB in flight", "waves at B = 1, 32, 256")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        wide = [f"{wide} of {loads}" for wide, loads in zip(row["wide"], row["loads"])]
        cells = [f"{row['kernel']}, {row['dtype']}", row["card"], shortest(row["warps"])]
        cells += [shortest(row["registers"]), shortest(row["stack"]), shortest(wide)]
        cells += [shortest(row["barriers"]), shortest(row["blocks_held"])]
        cells += [
            shortest(row["kb_in_flight"], "{:.0f}"),
            re.sub(r"\b0\.", ".", shortest(row["waves"], "{:.2f}")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@click.command(context_settings={"show_default": True})
@click.option("--quick", is_flag=True, help="one card and bf16 only")
def main(quick: bool) -> None:
    """Registers, loads, bytes in flight and waves of the Triton kernels, without a GPU."""
    if "TRITON_INTERPRET" in os.environ:
        stop(
            "TRITON_INTERPRET is set, so Triton interprets kernels and compiles none; it must be "
            "unset: env -u TRITON_INTERPRET python kernels/compiled.py"
        )
    cards, dtypes = (CARDS[-1:], ["bf16"]) if quick else (CARDS, list(DTYPES))
    jobs = [(card, dtype) for dtype in dtypes for card in cards]
    rows = [row for job in tqdm(jobs, unit="card", disable=None) for row in rows_of(*job)]
    rows.sort(key=lambda row: list(DTYPES).index(row["dtype"]))
    print(table(rows))
    print(json.dumps({"versions": versions(), "commit": commit(), "rows": rows}))


if __name__ == "__main__":
    main()
