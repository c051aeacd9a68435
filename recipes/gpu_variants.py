"""Stage variants of make gpu: ways to compute the same scores, each switched on here alone.

What the product does stays as it is; its defaults follow only what was measured. Every way scores
the same 32 prompts of different lengths, and says by how much its scores differ from the first
way's: the mean distance, in standard deviations of a prompt's scores.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from delrec.lm.bench.random_lms import TOKENS, random_lm, random_prompts, shapes
from delrec.lm.bench.work import K, Prompts
from delrec.lm.layers import layers_of
from delrec.lm.model import LM
from delrec.lm.reading import Start, read_prefix
from delrec.lm.text import random_soft_prompt
from recipes import gpu_tiny
from recipes.gpu_attention import by_mask, by_nothing, ways_of
from recipes.gpu_fp8 import compare_hits, with_fp8
from recipes.gpu_lm import on_a_card, tiny_shapes
from recipes.gpu_rows import VARIED, Rows, backends_of
from recipes.gpu_time import forget_peak, graph_of, seconds_of

KINDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def smollm2_config():
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig

    sizes = dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30)
    sizes |= dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192)
    return LlamaConfig(**sizes, tie_word_embeddings=True)


def measure(rows: Rows, rehearse: bool, quick: bool, out: Path) -> None:
    """Writes the rows of every shape, smallest first, then fp8 on real weights."""
    device = torch.device("cpu" if rehearse else "cuda")
    configs = tiny_shapes() | {"smollm2-135m": gpu_tiny.llama_config()}
    if not rehearse:
        configs = shapes() | {"smollm2-135m": smollm2_config()}
    hits = partial(compare_hits, rows, rehearse, out)
    for name in VARIED:
        rows.attempt(f"variant.{name}.", measure_shape, rows, name, configs[name], device)
        forget_peak(device)
        if name == VARIED[0]:
            rows.attempt(f"variant.{name}.fp8.hr1", hits)


class Bench:
    """An LM with prompts of different lengths, and what its first way scores."""

    def __init__(self, rows: Rows, name: str, config: object, device: torch.device) -> None:
        n, tokens = (32, TOKENS) if device.type == "cuda" else (3, 130)
        self.rows, self.name, self.device = rows, name, device
        self.lm = on_a_card(random_lm(name, config, device, torch.bfloat16))
        self.prompts = random_prompts(self.lm, n, tokens)
        cut = np.random.default_rng(0).integers(0, tokens - 115, n)
        self.prompts.tails = [tail[k:] for tail, k in zip(self.prompts.tails, cut)]
        P_kD = random_soft_prompt(self.lm, K, 0)
        self.start = read_prefix(self.lm, self.prompts.prefix, P_kD)
        self.score_BC = by_mask(self.lm, self.prompts, self.start).float()

    def time(self, way: str, score: Callable) -> None:
        """Writes the rows of a way, a function of (lm, prompts, start)."""
        base = f"variant.{self.name}.{way}"
        call = partial(score, self.lm, self.prompts, self.start)
        score_BC = call().float()
        change = (score_BC - self.score_BC).abs().mean() / self.score_BC.std(1).mean()
        each = seconds_of(call, self.device) / len(self.prompts.tails)
        self.rows.add(f"{base}.ms_per_request", 1e3 * each)
        self.rows.add(f"{base}.score_change", change)

    def attempt(self, way: str, score: Callable) -> None:
        """The same; where it fails its rows say why."""
        self.rows.attempt(f"variant.{self.name}.{way}.", self.time, way, score)


@torch.no_grad()
def measure_shape(rows: Rows, name: str, config: object, device: torch.device) -> None:
    """Writes the rows of one shape."""
    bench = Bench(rows, name, config, device)
    for way, score in ways_of(bench.lm).items():
        bench.attempt(way, score)
    plain = by_nothing if bench.lm.kind == "decoder" else by_mask
    for backend in backends_of(name):
        bench.attempt(f"sdpa_{backend}", by_backend(backend))
    rows.attempt(f"variant.{name}.alone", alone, bench)
    with with_fp8(bench.lm.model):
        rows.attempt(f"variant.{name}.fp8.", fp8, bench)
    rows.attempt(f"variant.{name}.compiled.", compiled, bench, plain)


def by_backend(backend: str) -> Callable:
    """The way that attends by one back end only: under the product's mask, or, as flash takes none,
    by whole prompts without.
    """
    return partial(with_backend, KINDS[backend], by_nothing if backend == "flash" else by_mask)


def with_backend(
    backend: SDPBackend, score: Callable, lm: LM, prompts: Prompts, start: Start
) -> torch.Tensor:
    """score_BC where torch's attention may use one back end only."""
    with sdpa_kernel([backend]):
        return score(lm, prompts, start)


def fp8(bench: Bench) -> None:
    """Writes the rows of fp8 products, and how often the first candidate stays the first."""
    bench.time("fp8", by_mask)
    score_BC = by_mask(bench.lm, bench.prompts, bench.start)
    same = (score_BC.argmax(1) == bench.score_BC.argmax(1)).float().mean()
    bench.rows.add(f"variant.{bench.name}.fp8.same_first", same)


def compiled(bench: Bench, score: Callable) -> None:
    """Writes the rows of layers that torch.compile made, each layer by the same code, and what the
    first call took.
    """
    torch._dynamo.reset()
    # inductor builds C++ on a CPU, which takes minutes: there the traced graph is run
    backend = "inductor" if bench.device.type == "cuda" else "aot_eager"
    layers = layers_of(bench.lm.model)
    for layer in layers:
        layer.compile(backend=backend)
    began = time.perf_counter()
    try:
        score(bench.lm, bench.prompts, bench.start)
        warm_up = time.perf_counter() - began
        bench.rows.add(f"variant.{bench.name}.compiled.warm_up_s", warm_up)
        bench.time("compiled", score)
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


# ---------------------------------------------------------------- one request


def alone(bench: Bench) -> None:
    """Writes the rows of one prompt: the whole request, and the LM's body alone, launched as always
    and replayed as a CUDA graph, whose inputs lie where they lay.
    """
    lm, one, base = bench.lm, bench.prompts.part(0, 1), f"variant.{bench.name}"
    seconds = seconds_of(lambda: by_mask(lm, one, bench.start), bench.device)
    rows = bench.rows
    rows.add(f"{base}.alone.ms", 1e3 * seconds)
    Q = len(one.prefix) + len(one.tails[0])
    x_1QD = torch.randn(1, Q, lm.head_VD.shape[1], device=bench.device).to(lm.dtype)
    if lm.kind == "decoder":
        # without a mask transformers would make one while a graph is captured, and else none
        sees_QQ = torch.ones(Q, Q, dtype=torch.bool, device=bench.device).tril()
        more = {"attention_mask": sees_QQ[None, None], "use_cache": False}
        body = partial(lm.body, inputs_embeds=x_1QD, **more)
    else:
        body = partial(lm.model.get_encoder(), inputs_embeds=x_1QD)
    rows.add(f"{base}.alone_body.ms", 1e3 * seconds_of(body, bench.device))
    replay = graph_of([body], bench.device)
    rows.add(f"{base}.alone_graph.ms", 1e3 * seconds_of(replay, bench.device))
