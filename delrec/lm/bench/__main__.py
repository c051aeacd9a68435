"""The LM's part of the work, ours against what one would write with transformers alone.

    python -m delrec.lm.bench            make bench-llm; about fifteen minutes on 2 cores
    python -m delrec.lm.bench --quick    ratios only, without the curves
    python -m delrec.lm.bench --assembly what forming a prompt costs on one core; a minute

The other way: strings tokenised per batch, padded, all positions through the head
(model(...).logits), gather; the same LM, dtype, prompts and machine, in one run. The last line
is one JSON object.
"""

import click
import torch

from delrec.data.prepared import load_data
from delrec.kernels.bench import report
from delrec.lm.bench.against_rival import compare
from delrec.lm.bench.assembly import assembly
from delrec.lm.bench.curves import curves, two_processes, work_on_one_core
from delrec.lm.bench.memory import account
from delrec.lm.bench.random_lms import FLAN, shapes
from delrec.lm.model import load_lm


@click.command(context_settings={"show_default": True})
@click.option(
    "--account",
    "listing",
    is_flag=True,
    help="only the memory account of Flan-T5-XL's shape: every tensor training keeps, and "
    "measured peaks (16 GB)",
)
@click.option(
    "--quick", is_flag=True, help="the ratios only, without the curves and the two processes"
)
@click.option("--assembly", "forming", is_flag=True, help="only what forming a prompt costs")
@click.option("--threads", default=2, type=click.IntRange(1), help="threads on the CPU")
@click.option("--worker", "core", default=None, type=int, hidden=True)
def main(listing: bool, quick: bool, forming: bool, threads: int, core: int | None) -> None:
    """The LM's part of scoring and of both training stages against plain transformers."""
    if core is not None:
        work_on_one_core(core)
        return
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    if listing:
        account(rows, device, FLAN, shapes()[FLAN])
        report(rows, threads)
        return
    data = load_data("ml-100k")
    lm = load_lm("smollm2-135m", device)
    assembly(rows, lm, data)
    if forming:
        report(rows, threads)
        return
    if not quick:
        curves(rows, lm, data)
    compare(rows, lm, data)
    if device.type == "cpu" and not quick:
        del lm  # what follows needs the memory
        two_processes(rows)
    report(rows, threads)


if __name__ == "__main__":
    main()
