"""Tiny random LMs of the families that a user is likely to bring, as Hugging Face folders.

A family is a name, a kind and a function that makes its model: two layers, width 32, the toy
tokenizers of conftest. Where a family has windows they are 16 or 40 tokens, far below the longest
prompt of the tests; where it scales or caps anything, the factor is not 1. tests/shrink.py makes
the families that nobody wrote down here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from tiny_lms import bpe_tokenizer, save, unigram_tokenizer, wordpiece_tokenizer

TOKENIZERS = {
    "decoder": bpe_tokenizer,
    "encoder-decoder": unigram_tokenizer,
    "encoder": wordpiece_tokenizer,
}
AUTO = {
    "decoder": transformers.AutoModelForCausalLM,
    "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
    "encoder": transformers.AutoModelForMaskedLM,
}
SHORT, WIDE = 16, 40  # windows, in tokens
TURNS = 60  # where LongRoPE turns: no title of the tests crosses it, which could not be ranked
BODY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
T5_BODY = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
SPECIAL = {
    "decoder": {"bos_token_id": 3, "eos_token_id": 2, "pad_token_id": 0},
    "encoder-decoder": {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0},
    "encoder": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
}
LAYERS_SWITCH = ["sliding_attention", "full_attention"]
SHORT_AND_FULL = {"head_dim": 8, "sliding_window": SHORT, "layer_types": LAYERS_SWITCH}
WIDE_AND_FULL = {"head_dim": 8, "sliding_window": WIDE, "layer_types": LAYERS_SWITCH}
GPT2_BODY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OPT_BODY = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA4_EXPERTS = {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}


class Family(NamedTuple):
    """model(n): an untrained model with n tokens; exact: to refuse it is a fault; auto: what loads
    its folder, if that is not the class of its kind; gain: how large its weights are."""

    name: str
    kind: str
    model: Callable
    exact: bool = True
    auto: type | None = None
    gain: float = 1.0

    def __str__(self):
        return self.name


# ---------------------------------------------------------------- models and folders


def from_config(kind, config, sizes, **more):
    """A function of the vocabulary's size: the model that transformers makes of a config."""

    def model(n_tokens):
        values = sizes | SPECIAL[kind] | {"vocab_size": n_tokens} | more
        return AUTO[kind].from_config(getattr(transformers, f"{config}Config")(**values))

    return model


def llama_like(name, config, exact=True, **more):
    """A decoder whose config calls its sizes as Llama's does."""
    sizes = BODY | {"num_key_value_heads": 2}
    return Family(name, "decoder", from_config("decoder", config, sizes, **more), exact)


def old_decoder(name, config, exact=True, **sizes):
    """A decoder whose config has names of its own for its sizes."""
    return Family(name, "decoder", from_config("decoder", config, sizes), exact)


def bert_like(name, config, exact=True, **more):
    return Family(name, "encoder", from_config("encoder", config, BODY, **more), exact)


def t5_like(name, config, exact=True, **more):
    make = from_config("encoder-decoder", config, T5_BODY, **more)
    return Family(name, "encoder-decoder", make, exact)


def vision_and_text(name, architecture, vision, **text):
    """A decoder inside a model that also sees: its sizes stand in config.text_config."""

    def model(n_tokens):
        architecture_class = getattr(transformers, architecture)
        sizes = BODY | {"num_key_value_heads": 2, "vocab_size": n_tokens} | SPECIAL["decoder"]
        config = architecture_class.config_class(text_config=sizes | text, vision_config=vision)
        return architecture_class(config)

    return Family(name, "decoder", model, exact=False)


def deviation_of(name, weight, gain):
    """The standard deviation that a weight of more than one dimension is drawn with."""
    if any(part in name for part in ("emb", "shared", "wte", "wpe")):
        return 0.7
    fan_in = weight[0].numel() if "conv" in name else weight.shape[-1]
    return gain * fan_in**-0.5


def randomise(model, seed, gain):
    """The model with weights so large that everything it reads moves what it says, and so small
    that fp32 still says what fp64 would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(deviation_of(name, weight, gain) * noise)
            elif "bias" in name:
                weight.copy_(0.5 * noise)
            else:  # norms, gates, state-space parameters
                weight.add_(0.2 * noise)
    return model.eval()


def write(family, folder):
    """The family's model and tokenizer in a folder."""
    tok = TOKENIZERS[family.kind]()
    model = family.model(len(tok))
    return save(folder, randomise(model, seed=5, gain=family.gain), tok)


# ---------------------------------------------------------------- the named families

LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": TURNS,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}

DECODERS = [
    llama_like("llama", "Llama", tie_word_embeddings=True),
    old_decoder("gpt2", "GPT2", **GPT2_BODY),
    old_decoder(
        "gpt2-scaled",
        "GPT2",
        **GPT2_BODY,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
    ),
    old_decoder("gpt-neox", "GPTNeoX", **BODY),
    old_decoder("gpt-neox-serial", "GPTNeoX", **BODY, use_parallel_residual=False),
    old_decoder("opt", "OPT", **OPT_BODY),
    old_decoder(
        "opt-narrow", "OPT", **OPT_BODY, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    old_decoder("bloom", "Bloom", hidden_size=32, n_layer=2, n_head=4),
    llama_like("gemma", "Gemma", head_dim=8),
    llama_like(
        "gemma2",
        "Gemma2",
        **SHORT_AND_FULL,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=None,
        query_pre_attn_scalar=16,
    ),
    llama_like(
        "gemma2-capped",
        "Gemma2",
        **WIDE_AND_FULL,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
    llama_like("gemma3", "Gemma3Text", **SHORT_AND_FULL, query_pre_attn_scalar=16),
    llama_like("gemma3-wide", "Gemma3Text", **WIDE_AND_FULL, query_pre_attn_scalar=8),
    llama_like(
        "granite",
        "Granite",
        logits_scaling=4.0,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
    ),
    llama_like("cohere", "Cohere", logit_scale=0.25, use_qk_norm=True),
    llama_like("cohere2", "Cohere2", logit_scale=0.25, **SHORT_AND_FULL),
    llama_like("qwen3", "Qwen3", head_dim=8),
    llama_like(
        "qwen3-window",
        "Qwen3",
        head_dim=8,
        use_sliding_window=True,
        sliding_window=WIDE,
        max_window_layers=1,
    ),
    llama_like("phi3", "Phi3"),
    llama_like("phi3-window", "Phi3", sliding_window=SHORT),
    llama_like("olmo2", "Olmo2"),
]
ENCODER_DECODERS = [
    t5_like("t5-v1.0", "T5", feed_forward_proj="relu"),
    t5_like("t5-v1.1", "T5", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    t5_like(
        "mt5",
        "MT5",
        tie_word_embeddings=False,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=32,
    ),
]
ENCODERS = [
    bert_like("bert", "Bert"),
    bert_like("roberta", "Roberta", max_position_embeddings=514, type_vocab_size=1),
    bert_like(
        "modernbert",
        "ModernBert",
        local_attention=SHORT,
        cls_token_id=2,
        sep_token_id=3,
        layer_types=LAYERS_SWITCH,
    ),
    bert_like(
        "modernbert-wide",
        "ModernBert",
        local_attention=WIDE,
        cls_token_id=2,
        sep_token_id=3,
        layer_types=LAYERS_SWITCH,
    ),
    bert_like(
        "deberta",
        "Deberta",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_biased_input=False,
    ),
    bert_like(
        "deberta-v2",
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        position_buckets=16,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
    ),
]
RIGHT_OR_REFUSED = [
    llama_like("mistral-short", "Mistral", exact=False, head_dim=8, sliding_window=SHORT),
    llama_like("mistral-wide", "Mistral", exact=False, head_dim=8, sliding_window=WIDE),
    llama_like(
        "qwen2-short",
        "Qwen2",
        exact=False,
        use_sliding_window=True,
        sliding_window=SHORT,
        max_window_layers=0,
    ),
    llama_like(
        "qwen2-wide",
        "Qwen2",
        exact=False,
        use_sliding_window=True,
        sliding_window=WIDE,
        max_window_layers=1,
    ),
    llama_like(
        "phi3-long-rope",
        "Phi3",
        exact=False,
        rope_parameters=LONG_ROPE,
        original_max_position_embeddings=TURNS,
    ),
    llama_like(
        "gpt-oss-short",
        "GptOss",
        exact=False,
        head_dim=8,
        sliding_window=SHORT,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=LAYERS_SWITCH,
    ),
    llama_like(
        "gpt-oss-wide",
        "GptOss",
        exact=False,
        head_dim=8,
        sliding_window=WIDE,
        num_local_experts=2,
        num_experts_per_tok=2,
        layer_types=LAYERS_SWITCH,
    ),
    llama_like(
        "qwen3-next",
        "Qwen3Next",
        exact=False,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        **LINEAR,
    ),
    llama_like("qwen3.5", "Qwen3_5Text", exact=False, head_dim=8, **LINEAR),
    llama_like(
        "falcon-h1",
        "FalconH1",
        exact=False,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        lm_head_multiplier=0.5,
        embedding_multiplier=2.0,
        key_multiplier=0.7,
        attention_out_multiplier=0.8,
        ssm_out_multiplier=0.9,
    ),
    llama_like("lfm2", "Lfm2", exact=False, layer_types=["conv", "full_attention"]),
    old_decoder("mpt", "Mpt", exact=False, d_model=32, n_layers=2, n_heads=4, max_seq_len=512),
    llama_like(
        "llama4-short",
        "Llama4Text",
        exact=False,
        **LLAMA4_EXPERTS,
        attention_chunk_size=SHORT,
        floor_scale=8,
    ),
    llama_like(
        "llama4-wide",
        "Llama4Text",
        exact=False,
        **LLAMA4_EXPERTS,
        attention_chunk_size=WIDE,
        floor_scale=8,
        attn_scale=2.0,
        no_rope_layers=[1, 0],
    ),
    vision_and_text("gemma3-vision", "Gemma3ForConditionalGeneration", VISION, **SHORT_AND_FULL),
    vision_and_text(
        "llama4-vision",
        "Llama4ForConditionalGeneration",
        VISION | {"pixel_shuffle_ratio": 0.5},
        **LLAMA4_EXPERTS,
        attention_chunk_size=WIDE,
    ),
    vision_and_text(
        "qwen3.5-vision", "Qwen3_5ForConditionalGeneration", QWEN_VISION, head_dim=8, **LINEAR
    ),
]
EXACT = DECODERS + ENCODER_DECODERS + ENCODERS
