"""Random LMs of the shapes that papers use, random prompts for them, and their FLOP."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from delrec.lm import check
from delrec.lm.bench.work import C, K, Prompts, flops
from delrec.lm.model import LM
from delrec.lm.text import MASK, SLOT
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


def random_prompts(lm: LM, n: int, tokens: int) -> Prompts:
    """n prompts of so many tokens and candidates of a catalogue of 1,000 items of 10 tokens."""
    rng = np.random.default_rng(0)
    n_words, items = lm.head_VD.shape[0] - 200, 1000
    titles = Titles(
        ptr=np.concatenate([[0], np.arange(items + 1) * 10]),
        tok=rng.integers(10, n_words, items * 10),
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


def work_of(lm: LM, prompts: Prompts) -> float:
    """FLOP of a pass over the prompts; a decoder has read their prefix before."""
    tokens = sum(map(len, prompts.tails))
    if lm.kind == "decoder":
        return flops(lm.model, tokens)
    return flops(lm.model.encoder, tokens + len(prompts.prefix) * len(prompts.tails))
