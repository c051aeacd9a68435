"""What a request costs by prompt length, number of candidates and batch size, and how much more two
processes do than one.
"""

import os
import subprocess
import sys
import time

import numpy as np
import torch

from delrec.data.prepared import Data, load_data
from delrec.kernels.bench import Row, times
from delrec.lm.bench.work import K, Prompts, our_ranker, place, prompts_of
from delrec.lm.model import LM, load_lm
from delrec.lm.reading import read_prefix
from delrec.lm.text import random_soft_prompt

# (items of history, candidates, prompts in a batch)
POINTS = {
    "mean": [
        *((history, 15, 16) for history in (5, 10, 20, 50)),
        *((10, n_candidates, 16) for n_candidates in (20, 50, 100)),
        *((10, 15, batch) for batch in (1, 2, 4, 8, 32)),
    ],
    "likelihood": [(10, n_candidates, 4) for n_candidates in (15, 20, 50, 100)],
}
SECONDS = 40  # that each of two processes works


def curves(rows: list[Row], lm: LM, data: Data) -> None:
    """Adds rows of every point: ms and tokens of a request."""
    P = random_soft_prompt(lm, K, 0)
    for verbalizer, points in POINTS.items():
        for history, n_candidates, batch in points:
            r = our_ranker(lm, data, P, verbalizer, history, show=verbalizer == "mean")
            prompts = prompts_of(r, data, batch, n_candidates)
            seconds = seconds_of(lm, P, prompts, verbalizer)
            name = f"curve.{verbalizer}.{place(lm.device)}"
            name += f".history{history}.C{n_candidates}.batch{batch}"
            rows.append(Row(f"{name}.ms_per_request", 1e3 * seconds / batch, "ms"))
            rows.append(Row(f"{name}.tokens", tokens_of(prompts, verbalizer), "tokens"))


@torch.no_grad()
def seconds_of(lm: LM, P_kD: torch.Tensor, prompts: Prompts, verbalizer: str) -> float:
    """Seconds of a batch; its prefix is computed before."""
    start = read_prefix(lm, prompts.prefix, P_kD)

    def ours():
        return prompts.score(lm, start, verbalizer)

    return times({"ours": ours}, lm.device, 4.0, 5)["ours"]


def tokens_of(prompts: Prompts, verbalizer: str) -> float:
    """Tokens of a request after the prefix, with its titles where each is read."""
    tokens = np.mean([len(tail) for tail in prompts.tails])
    if verbalizer == "likelihood":
        lengths_I = np.diff(prompts.titles.ptr)
        tokens += np.mean(lengths_I[prompts.cand_BC].sum(1))
    return tokens


def two_processes(rows: list[Row]) -> None:
    """Adds a row: two processes of one core each against one of one core, on the same work each."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        rows.append(Row("score.two_processes.cpu.speedup", None, "x", 1.8))
        return
    speedup = requests_per_second(2) / requests_per_second(1)
    rows.append(Row("score.two_processes.cpu.speedup", speedup, "x", 1.8))


def requests_per_second(n: int) -> float:
    """What n processes do together, each on a core of its own."""
    worker = [sys.executable, "-m", "delrec.lm.bench", "--worker"]
    workers = [
        subprocess.Popen([*worker, str(core)], stdout=subprocess.PIPE, text=True)
        for core in sorted(os.sched_getaffinity(0))[:n]
    ]
    return sum(float(w.communicate()[0].split()[-1]) for w in workers)


@torch.no_grad()
def work_on_one_core(core: int) -> None:
    """Prints the requests per second of this process on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    data = load_data("ml-100k")
    lm = load_lm("smollm2-135m", torch.device("cpu"))
    P = random_soft_prompt(lm, K, 0)
    prompts = prompts_of(our_ranker(lm, data, P, "mean"), data, 8)
    start = read_prefix(lm, prompts.prefix, P)
    spent = []
    began = time.time()
    while time.time() - began < SECONDS:
        t = time.perf_counter()
        prompts.score(lm, start)
        spent.append(time.perf_counter() - t)
    print(8 / float(np.median(spent[1:])))
