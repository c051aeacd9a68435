"""Tiny LMs of all other families that transformers knows, made from their own config classes.

A family is an entry of one of transformers' three tables: causal, seq2seq and masked language
models. Its default config is taken, and every attribute whose name is in TINY made small; what
more a family needs stands in MORE. Of the 285 entries of transformers 5.24 this builds 231, 33
are written down in tests/families.py, and 21 cannot be tested: not_built() says why.
"""

import itertools

from families import AUTO, SHORT, SPECIAL, Family
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

# a tiny value, and the names of what gets it
VALUES = [
    (
        32,
        "hidden_size d_model n_embd dim emb_dim d_embed embedding_size input_hidden_size "
        "pooler_hidden_size model_dim word_embed_proj_dim cross_attention_hidden_size lru_width "
        "out_hidden_size entity_emb_size rank indexer_budget",
    ),
    (
        64,
        "intermediate_size n_inner d_ff ffn_dim dff d_inner hidden_dim encoder_ffn_dim "
        "decoder_ffn_dim intermediate_size_mlp ffn_hidden_size dense_intermediate_size "
        "attention_hidden_size mamba_d_ssm",
    ),
    (
        16,
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_ffn_hidden_size expert_intermediate_size moe_shared_expert_intermediate_size "
        "shared_experts_intermediate_size kv_lora_rank q_lora_rank o_lora_rank qk_head_dim "
        "mamba_d_head mamba_head_dim mamba_headdim attention_head_dim router_hidden_size "
        "entity_vocab_size pronunciation_vocab_size shape_vocab_size num_position_embeddings",
    ),
    (
        8,
        "head_dim d_kv attention_head_size global_head_dim swa_head_dim qk_rope_head_dim "
        "qk_nope_head_dim v_head_dim index_head_dim index_topk state_size ssm_state_size "
        "mamba_d_state linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
        "num_mel_bins pronunciation_embed_dim shape_embed_dim floor_scale indexer_head_dim "
        "linear_head_dim index_n_heads indexer_n_heads",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads "
        "swa_num_attention_heads rotary_dim num_experts num_local_experts n_routed_experts "
        "moe_num_experts mamba_n_heads mamba_num_heads mamba_dt_rank time_step_rank "
        "linear_num_heads linear_num_value_heads laurel_rank adapter_rank lora_rank "
        "indexer_compress_ratio",
    ),
    (
        2,
        "num_hidden_layers num_layers n_layer n_layers num_blocks encoder_layers decoder_layers "
        "num_decoder_layers num_encoder_layers num_key_value_heads multi_query_group_num "
        "swa_num_key_value_heads num_global_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_k moe_topk top_k_experts o_groups "
        "linear_num_key_heads",
    ),
    (
        1,
        "speech_encoder_layers t2u_encoder_layers t2u_decoder_layers n_shared_experts "
        "num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace "
        "num_dense_layers zero_expert_num mamba_n_groups n_groups mamba_ngroups n_mamba_heads "
        "num_mem_blocks depth indexer_kv_heads",
    ),
    (0, "num_nextn_predict_layers num_mtp_layers mtp_num_hidden_layers num_kv_shared_layers"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (514, "max_encoder_position_embeddings max_decoder_position_embeddings"),
    (
        SHORT,
        "sliding_window attention_chunk_size local_attention attention_window window_size "
        "attention_window_size sliding_window_size local_radius",
    ),
    (28, "image_size"),
    (14, "patch_size"),
    (256, "expert_capacity"),
    (3.0, "embedding_multiplier"),
    (4.0, "logits_scaling"),
    (0.7, "residual_multiplier"),
    (0.2, "attention_multiplier"),
    (0.5, "lm_head_multiplier logit_scale"),
    (True, "scale_embedding"),
]
TINY = {name: value for value, names in VALUES for name in names.split()}
UNSET = {
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_experts_per_tok",
    "indexer_n_heads",
    "indexer_kv_heads",
    "indexer_head_dim",
    "indexer_budget",
    "indexer_compress_ratio",
}  # what is None by default and has to be set
VOCABULARIES = {
    "vocab_size",
    "vocab_size_per_layer_input",
    "unpadded_vocab_size",
    "src_vocab_size",
    "tgt_vocab_size",
}
# tokens that no title has: of rare bytes, sentinels, punctuation inside a word
SPARE = {"decoder": range(160, 200), "encoder-decoder": range(5, 13), "encoder": range(84, 91)}

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3}
MORE = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": ROPE,
            "full_attention": ROPE | {"mrope_section": [2, 1, 1]},
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "neomme": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
    "reformer": {"axial_pos_embds": False},
    "rwkv": {"attention_hidden_size": 32},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": HYBRID,
    "zamba2": HYBRID | {"hybrid_layer_ids": [1, 2], "n_mamba_heads": 4},
}
GAIN = {"zamba": 0.5, "zamba2": 0.5}  # rounding grows in their layers


def tiny(config, n_tokens, special, spare):
    """The keyword arguments that make a small config of the same class; spare: tokens to name."""
    known, values = vars(config), {}
    for name, value in known.items():
        if name in VOCABULARIES:
            values[name] = n_tokens
        elif name in special:
            values[name] = special[name]
        elif name in TINY and (value is not None or name in UNSET):
            values[name] = TINY[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[name] = next(spare)
    if known.get("kv_lora_rank"):  # its heads share no keys
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name in config.sub_configs:
        if getattr(config, name, None) is not None:
            part = getattr(config, name)
            values[name] = tiny(part, n_tokens, special, spare) | {"model_type": part.model_type}
    values |= one_layer_of_each_kind(known, values)
    return values | MORE.get(config.model_type, {})


def one_layer_of_each_kind(known, values):
    """The attributes of a config whose layers are of several kinds: each kind once."""
    for name in ("layer_types", "layers_block_type"):
        kinds = list(dict.fromkeys(known.get(name) or []))
        if len(kinds) > 1:
            counts = [n for n in ("num_hidden_layers", "num_layers", "n_layer") if n in values]
            return {name: kinds} | dict.fromkeys(counts, len(kinds))
    return {}


def model_of(kind, model_type, auto):
    """A function of the vocabulary's size: the tiny model of a family."""

    def model(n_tokens):
        make = CONFIG_MAPPING[model_type]
        special = SPECIAL[kind] | ({"is_decoder": True} if kind == "decoder" else {})
        config = make(**tiny(make(), n_tokens, special, itertools.cycle(SPARE[kind])))
        if kind == "encoder-decoder":  # every folder of a trained one says it
            config.decoder_start_token_id = special["decoder_start_token_id"]
        if model_type == "encoder-decoder":  # two BERTs, of which one has to decode
            config.decoder.is_decoder = config.decoder.add_cross_attention = True
        return auto.from_config(config)

    return model


# ---------------------------------------------------------------- transformers' tables

TABLES = {
    "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
HEARING = set(
    [
        "audioflamingo3",
        "glmasr",
        "granite_speech",
        "granite_speech_plus",
        "moss_transcribe_diarize",
        "musicflamingo",
        "nemo_speechlm",
        "omniasr",
        "qwen2_audio",
        "qwen3_asr",
        "vibevoice_asr",
        "voxtral",
        "voxtral_realtime",
    ]
)  # in the table of seq2seq, and decoders
NAMED = {
    "decoder": set(
        [
            "llama",
            "gpt2",
            "gpt_neox",
            "opt",
            "bloom",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "granite",
            "cohere",
            "cohere2",
            "qwen2",
            "qwen3",
            "phi3",
            "olmo2",
            "mistral",
            "gpt_oss",
            "qwen3_next",
            "qwen3_5",
            "qwen3_5_text",
            "falcon_h1",
            "lfm2",
            "mpt",
            "llama4",
            "llama4_text",
        ]
    ),
    "encoder-decoder": {"t5", "mt5"},
    "encoder": {"bert", "roberta", "modernbert", "deberta", "deberta-v2"},
}  # in tests/families.py
TWICE = "the same encoder-decoder stands in the table of seq2seq"
PART = "it is a draft for another model and reads that model's states"
SOUND = "it predicts codes of sound"
TIES = "of keys that tie it picks others when the prompt is longer, which changes what it said"
CHANCE = "its attention hashes at random: two passes over one prompt differ"
NOT_BUILT = {
    ("decoder", "blt"): "it reads bytes in patches and has no tokenizer",
    ("decoder", "deepseek_v32"): TIES,
    ("decoder", "dots3_note"): "its config names settings for each of its many layers",
    ("decoder", "emu3"): "its text part is saved as a config that AutoModelForCausalLM refuses",
    ("decoder", "gemma3n"): "it needs the package timm",
    ("decoder", "gemma4_assistant"): PART,
    ("decoder", "gemma4_unified_assistant"): PART,
    ("decoder", "glm_moe_dsa"): TIES,
    ("decoder", "mllama"): "its text part is saved as a config that AutoModelForCausalLM refuses",
    ("decoder", "musicgen"): SOUND,
    ("decoder", "musicgen_melody"): SOUND,
    ("decoder", "reformer"): CHANCE,
    ("decoder", "xlstm"): "transformers' own pass fails at a width that is not rounded up to 64",
    ("encoder-decoder", "nemo_speechlm"): "its head reads the states of an encoder of sound",
    ("encoder-decoder", "vibevoice_asr"): "its encoder of sound has 700 million weights",
    ("encoder-decoder", "voxtral_realtime"): "it cannot be run without sound",
    ("encoder", "bart"): TWICE,
    ("encoder", "mbart"): TWICE,
    ("encoder", "mvp"): TWICE,
    ("encoder", "perceiver"): "it has a state for each of its latents, not for each token",
    ("encoder", "reformer"): CHANCE,
}


def every_entry():
    """(kind of table, model type) of every language model that transformers knows."""
    return [(table, model_type) for table, names in TABLES.items() for model_type in names]


def not_built():
    """{(table, model type): why no tiny model of it can be tested}."""
    return NOT_BUILT


def other_families():
    """The families of transformers' tables that are neither named nor impossible."""
    found = []
    for table, model_type in every_entry():
        if model_type not in NAMED[table] and (table, model_type) not in NOT_BUILT:
            found.append(family_of(table, model_type))
    return found


def family_of(table, model_type):
    kind = "decoder" if model_type in HEARING else table
    auto = AUTO[table]
    name = f"{table} {model_type}"
    model = model_of(kind, model_type, auto)
    return Family(name, kind, model, False, auto, GAIN.get(model_type, 1.0))
