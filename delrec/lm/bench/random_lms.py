"""Random LMs of the shapes that papers use, and random prompts for them: what fits into a GPU, and
how much of it is used.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from delrec.kernels.bench import Row, times
from delrec.lm import check
from delrec.lm.bench.work import C, K, Prompts, flops, matmul_rate, place
from delrec.lm.model import LM
from delrec.lm.reading import read_prefix
from delrec.lm.text import MASK, SLOT, random_soft_prompt
from delrec.lm.titles import Titles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FLAN = "flan-t5-xl"  # the paper's LM: the goals are its own
LIMIT_GB = 24  # of the card that both stages shall fit into
TOKENS = 600  # of a prompt
PAPER_SECONDS = 0.182  # per request, DELRec's figure 9, ten RTX 3090 together


def shapes() -> dict[str, "PretrainedConfig"]:
    """{name: config} of Flan-T5-XL and of an 8 B Llama."""
    from transformers import LlamaConfig, T5Config

    flan = T5Config(
        vocab_size=32128,
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    )
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )
    return {FLAN: flan, "llama-8b": llama}


def random_lm(
    name: str, config: "PretrainedConfig", device: torch.device, dtype: torch.dtype
) -> LM:
    """An LM of this shape with random weights; it has no tokenizer, prompts are made of random
    tokens.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto, kind = AutoModelForCausalLM, "decoder"
    if config.is_encoder_decoder:
        auto, kind = AutoModelForSeq2SeqLM, "encoder-decoder"
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = auto.from_config(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    head = model.get_output_embeddings()
    # Flan-T5 has a head of its own
    if head.weight is model.get_input_embeddings().weight and name.startswith("flan"):
        head.weight = torch.nn.Parameter(head.weight.clone(), requires_grad=False)
    lm = LM(
        name=name,
        folder="",
        kind=kind,
        model=model,
        tok=None,
        device=device,
        dtype=dtype,
        head_VD=head.weight,
        bias_V=None,
        mask_id=config.vocab_size - 1,
        start=[],
        end=[1],
        max_tokens=4000,
        special=set(),
        sep=[5],
    )
    lm.read_as(check.find(lm, checked=False))
    return lm


def random_prompts(lm: LM, n: int, tokens: int, title_tokens: int = 10, seed: int = 0) -> Prompts:
    """n prompts of so many tokens and candidates of a catalogue of 1,000 items."""
    rng = np.random.default_rng(seed)
    n_words, items = lm.head_VD.shape[0] - 200, 1000
    titles = Titles(
        ptr=np.concatenate([[0], np.arange(items + 1) * title_tokens]),
        tok=rng.integers(10, n_words, items * title_tokens),
        vocab=np.arange(n_words + 200),
        index=np.arange(n_words + 200),
        head=lm.head_VD.detach(),
        bias=None,
    )
    before, after = rng.integers(10, n_words, 10), rng.integers(10, n_words, 10)
    prefix = np.concatenate([before, np.full(K, SLOT), after])
    length = tokens - len(prefix) - 1
    tails = [np.append(rng.integers(10, n_words, length), MASK) for _ in range(n)]
    return Prompts(prefix, tails, rng.integers(1, items + 1, (n, C)), titles, olds=[])


# ---------------------------------------------------------------- how fast, and whether it fits


@dataclass
class Subject:
    """A random LM under measurement."""

    lm: LM
    prompts: Prompts
    rate: float  # FLOP a second of this machine's matrix products
    work: float  # FLOP of a pass over all prompts
    rows: list[Row]

    def named(self, what: str, row: str) -> str:
        """The whole name of a row: what was done, with which LM, where."""
        return f"{what}.{self.lm.name}.{place(self.lm.device)}.{row}"


def big_shapes(
    rows: list[Row],
    device: torch.device,
    configs: dict[str, "PretrainedConfig"],
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Adds rows of every LM: ms per request in batch and alone, FLOP utilisation, and training
    within LIMIT_GB of the GPU's memory.
    """
    rate = matmul_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    for name, config in configs.items():
        lm = random_lm(name, config, device, dtype)
        prompts = random_prompts(lm, 32, tokens)
        subject = Subject(lm, prompts, rate, work_of(lm, prompts), rows)
        time_scoring(subject)
        time_training(subject)
        del lm, subject  # before the next one comes


def work_of(lm: LM, prompts: Prompts) -> float:
    """FLOP of a pass over the prompts; a decoder has read their prefix before."""
    tokens = sum(map(len, prompts.tails))
    if lm.kind == "decoder":
        return flops(lm.model, tokens)
    return flops(lm.model.encoder, tokens + len(prompts.prefix) * len(prompts.tails))


@torch.no_grad()
def time_scoring(subject: Subject) -> None:
    """Adds rows of scoring: ms per request in batch and alone, FLOP use, the paper's time."""
    lm, prompts, rows = subject.lm, subject.prompts, subject.rows
    start = read_prefix(lm, prompts.prefix, random_soft_prompt(lm, K, 0))
    one = prompts.part(0, 1)
    batch = times({"ours": lambda: prompts.score(lm, start)}, lm.device, 5.0)["ours"]
    alone = times({"ours": lambda: one.score(lm, start)}, lm.device, 2.0)["ours"]
    request = batch / len(prompts.tails)
    goal = 4 if lm.name == FLAN else None
    share = "share of the measured matmul rate"
    rows.append(Row(subject.named("score", "ms_per_request"), 1e3 * request, "ms", goal))
    rows.append(Row(subject.named("score", "ms_alone"), 1e3 * alone, "ms"))
    rows.append(Row(subject.named("score", "mfu"), subject.work / batch / subject.rate, share, 0.5))
    rows.append(Row(subject.named("score", "vs_paper_request"), PAPER_SECONDS / request, "x"))


def time_training(subject: Subject, n: int = 8, micro: int = 4) -> None:
    """Adds rows of stage 1's step of n samples: how many a second, FLOP utilisation, memory."""
    lm, rows, prompts = subject.lm, subject.rows, subject.prompts.part(0, n)
    on_gpu = lm.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    P = random_soft_prompt(lm, K, 0).requires_grad_()
    truth_B = torch.arange(n, device=lm.device) % C

    def step():
        P.grad = None
        for i in range(0, n, micro):
            start = read_prefix(lm, prompts.prefix, P)
            score_BC = prompts.part(i, i + micro).score(lm, start)
            (F.cross_entropy(score_BC, truth_B[i : i + micro], reduction="sum") / n).backward()

    peak = subject.named("train", "peak_gb")
    try:
        seconds = times({"step": step}, lm.device, 5.0)["step"]
    except torch.OutOfMemoryError:
        rows.append(Row(peak, None, "GB, did not fit", LIMIT_GB))
        return
    work = 2 * subject.work * n / len(subject.prompts.tails)  # forward, and backward to the prompt
    share = "share of the measured matmul rate"
    rows.append(Row(subject.named("train", "stage1_samples_per_second"), n / seconds, "1/s"))
    rows.append(Row(subject.named("train", "mfu"), work / seconds / subject.rate, share, 0.4))
    held_gb = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    rows.append(Row(peak, held_gb, "GB", LIMIT_GB if lm.name == FLAN else None))


def rows_of_a_gpu() -> list[Row]:
    """The rows of big_shapes without values, for a machine without a GPU: never a guessed number,
    the same command on a GPU fills them.
    """
    rows = []
    for name in shapes():
        is_flan = name == FLAN
        rows.append(Row(f"score.{name}.gpu.ms_per_request", None, "ms", 4 if is_flan else None))
        rows.append(Row(f"score.{name}.gpu.mfu", None, "share", 0.5))
        rows.append(Row(f"train.{name}.gpu.mfu", None, "share", 0.4))
        rows.append(Row(f"train.{name}.gpu.peak_gb", None, "GB", LIMIT_GB if is_flan else None))
    return rows
