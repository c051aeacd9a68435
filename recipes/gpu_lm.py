"""Stage lms of make gpu: Flan-T5-XL's and an 8 B Llama's shape with random weights, prompts of 600
tokens: how long a request takes, and whether both stages train within 24 GB.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from delrec.kernels.bench import now
from delrec.lm.adalora import orthogonality
from delrec.lm.bench.random_lms import (
    LIMIT_GB,
    PAPER_SECONDS,
    TOKENS,
    random_lm,
    random_prompts,
    shapes,
    work_of,
)
from delrec.lm.bench.rival import add_adalora
from delrec.lm.bench.work import C, K, Prompts, matmul_rate
from delrec.lm.layers import adapt_modules, checkpoint_layers, layers_of
from delrec.lm.model import LM
from delrec.lm.reading import read_prefix
from delrec.lm.text import random_soft_prompt
from recipes import gpu_tiny
from recipes.gpu_rows import BATCHES, LMS, Rows
from recipes.gpu_time import cap_memory, forget_peak, peak_gb, seconds_of

SAMPLES = 8  # of a training step


@dataclass
class Subject:
    """A random LM under measurement."""

    lm: LM
    prompts: Prompts
    rate: float  # FLOP a second of this machine's matrix products
    work: float  # FLOP of a pass over one prompt


def tiny_shapes() -> dict:
    """The same names, with two layers each."""
    from transformers import T5Config

    sizes = dict(vocab_size=432, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    flan = T5Config(
        **sizes,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    return {"flan-t5-xl": flan, "llama-8b": gpu_tiny.llama_config()}


def measure(rows: Rows, rehearse: bool, quick: bool, out: Path) -> None:
    """Writes the rows of every LM: scoring at each batch size, then both stages' training."""
    device = torch.device("cpu" if rehearse else "cuda")
    configs = tiny_shapes() if rehearse else shapes()
    rate = matmul_rate(device, torch.bfloat16, 64 if rehearse else 8192)
    for name in LMS:
        rows.attempt(f"lm.{name}.", measure_lm, rows, name, configs[name], (device, rate))
        cap_memory(device, None)
        forget_peak(device)


def measure_lm(rows: Rows, name: str, config: object, where: tuple[torch.device, float]) -> None:
    """Writes the rows of one LM. where: the device, and FLOP a second of its products."""
    device, rate = where
    most = max(BATCHES) if device.type == "cuda" else 4
    tokens = TOKENS if device.type == "cuda" else 130
    forget_peak(device)
    lm = on_a_card(random_lm(name, config, device, torch.bfloat16))
    prompts = random_prompts(lm, most, tokens)
    subject = Subject(lm, prompts, rate, work_of(lm, prompts) / most)
    for n in BATCHES:
        rows.attempt(f"lm.{name}.batch{n}.", score, rows, subject, n)
    cap_memory(device, LIMIT_GB)
    for stage in ("stage1", "stage2"):
        rows.attempt(f"lm.{name}.{stage}.", train, rows, subject, stage)


@torch.no_grad()
def score(rows: Rows, subject: Subject, n: int) -> None:
    """Writes ms a request, MFU and peak memory of n prompts at once."""
    lm, base = subject.lm, f"lm.{subject.lm.name}"
    forget_peak(lm.device)
    part = subject.prompts.part(0, n)
    start = read_prefix(lm, part.prefix, random_soft_prompt(lm, K, 0))
    each = seconds_of(lambda: part.score(lm, start), lm.device) / len(part.tails)
    rows.add(f"{base}.batch{n}.ms_per_request", 1e3 * each)
    rows.add(f"{base}.batch{n}.mfu", subject.work / each / subject.rate)
    rows.add(f"{base}.batch{n}.peak_gb", peak_gb(lm.device), "a CPU has no memory of a card")
    if n == 32:
        rows.add(f"{base}.vs_paper_request", PAPER_SECONDS / each)


def on_a_card(lm: LM) -> LM:
    """The LM, read by the passes that a card has, also where this is a CPU."""
    if lm.kind == "decoder":
        lm.paths = ["padded"]
    return lm


# ---------------------------------------------------------------- training


def train(rows: Rows, subject: Subject, stage: str) -> None:
    """Writes the rows of a stage's step, with as many prompts a pass as fit; where one alone does
    not, with layers that are computed again in backward.
    """
    lm, base = subject.lm, f"lm.{subject.lm.name}.{stage}"
    step = Step(subject, stage)
    ways = [(micro, False) for micro in (8, 4, 2, 1)] + [(micro, True) for micro in (4, 1)]
    for micro, again in ways:
        forget_peak(lm.device)
        try:
            with computing_again(lm.model) if again else nullcontext():
                seconds = seconds_of(partial(step.run, micro, again), lm.device, rounds=3)
        except torch.OutOfMemoryError:
            step.forget()
            continue
        work = 2 * subject.work * len(step.prompts.tails)  # forward, and backward to the prompt
        values = {"samples_per_second": len(step.prompts.tails) / seconds, "micro": micro}
        values |= {"mfu": work / seconds / subject.rate, "computed_again": again}
        rows.add_all(base, values)
        rows.add(f"{base}.peak_gb", peak_gb(lm.device), "a CPU has no memory of a card")
        return
    rows.leave(f"{base}.", f"it did not fit into {LIMIT_GB} GB")


@contextmanager
def computing_again(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model's layers are computed again in backward."""
    layers = layers_of(model)
    own = [layer.forward for layer in layers]
    checkpoint_layers(model)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own):
            layer.forward = forward


class Step:
    """A step of stage 1, which trains the soft prompt, or of stage 2, which trains AdaLoRA."""

    def __init__(self, subject: Subject, stage: str) -> None:
        self.lm, self.prompts = subject.lm, subject.prompts.part(0, SAMPLES)
        self.P = random_soft_prompt(self.lm, K, 0).requires_grad_(stage == "stage1")
        n = len(self.prompts.tails)
        # what a card too small says is rehearsed on one of the LMs
        self.small = self.lm.device.type == "cpu" and (stage, self.lm.kind) == ("stage2", "decoder")
        self.truth_B = torch.arange(n, device=self.lm.device) % C
        self.adapter = None
        if stage == "stage2":
            self.adapter = add_adalora(self.lm.model, adapt_modules(self.lm, "qv")).train()

    def run(self, micro: int, again: bool) -> None:
        """Forward and backward of all samples, `micro` prompts a pass. again: are layers computed
        again in backward?
        """
        n = len(self.prompts.tails)
        self.forget()
        if self.small and not (again and micro == 1):
            raise torch.OutOfMemoryError("rehearsed")
        for i in range(0, n, micro):
            start = read_prefix(self.lm, self.prompts.prefix, self.P)
            score_BC = self.prompts.part(i, i + micro).score(self.lm, start)
            truth_B = self.truth_B[i : i + micro]
            (F.cross_entropy(score_BC, truth_B, reduction="sum") / n).backward()
        if self.adapter is not None:
            (0.5 * orthogonality(self.adapter)).backward()
            self.adapter.base_model.update_and_allocate(1)
        now(self.lm.device)

    def forget(self) -> None:
        """Lets go of all gradients."""
        self.P.grad = None
        for p in self.lm.model.parameters():
            p.grad = None
