"""The language model at its mask, prompts as token arrays, and the verbalizers.

A prompt is an int array: token ids, SLOT where a soft-prompt vector goes, MASK where the filler is read, ITEM - i where item i stands as a
vector (--input ids | hybrid). They are negative, so no title and no tokenizer can produce them. Every prompt is prefix + tail: the prefix (instruction + soft prompt) is the same for
all samples, so a decoder-only LM computes its keys and values once.
"""
import hashlib
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from delrec.data.prepared import candidates, histories, shuffled, users
from delrec.kernels import verbalizer as kernels

from delrec.lm import vectors
from delrec.metrics import compare, metrics
from delrec.processes import gather_rows, max_over_ranks, shares
from delrec.runtime import CACHE, folder_of, load_run, read_npy, read_tensors, stop
from delrec.training.log import Log
from delrec.training.memory import extra_bytes, free_bytes

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")       # libraries talking to each other
warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*")  # of a reloaded AdaLoRA; a test shows its scores are the saved ones
warnings.filterwarnings("ignore", message="Adapter 'default'.*LoRA tensor.*invalid shape")      # of a layer that AdaLoRA pruned to rank 0
SLOT, MASK, ITEM = -1, -2, -100
CPU_TOKENS = 5000       # of a pass on a CPU: about what its caches hold
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---------------------------------------------------------------- the model

def kind_of(config):
    """decoder (Llama family), encoder-decoder (T5 family) or encoder (BERT family), from a transformers config."""
    masked = "MaskedLM" in (getattr(config, "architectures", None) or [""])[0] or config.model_type in ("bert", "roberta", "distilbert")
    return "encoder-decoder" if config.is_encoder_decoder else "encoder" if masked else "decoder"


def load_lm(name, device, dtype=None, shard=False):
    """Load an LM by Hugging Face id, folder, 'smollm2-135m' (embedded), or a run of finetune.py. Frozen, eval mode. shard: each process keeps a part of the layers.

    Returns a namespace: kind (decoder, encoder-decoder, encoder), model, tok, head_VD, bias_V, sep (tokens that end a title),
    start / end (special tokens around a text), mask_id, max_tokens, name. model(...).logits are what the head WOULD read: the head
    is replaced by the identity, so every architecture's own last norm, transform and scaling apply and no script makes B x V logits.
    """
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )
    from transformers.utils import logging
    logging.disable_progress_bar()
    if name == "smollm2-135m":
        folder = CACHE / name
        if not (folder / "config.json").exists():
            from delrec.data.raw import fetch_llm
            folder = fetch_llm()
    else:
        folder = name
    if (folder_of("runs", name) / "adapter").is_dir():               # a run of finetune.py: its LM, its adapter merged into the weights
        from peft import PeftModel
        run = load_run(name, stages=["distill", "finetune"])       # distill.py --lr-lm leaves an adapter too
        lm = load_lm(run.llm, device, dtype, shard)
        lm.model, lm.name = PeftModel.from_pretrained(lm.model, run.folder / "adapter").merge_and_unload().requires_grad_(False), str(run.folder)
        return lm
    local = {"local_files_only": True} if Path(folder).is_dir() else {}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
        tok = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError) as e:
        stop(f"no language model '{name}': expected smollm2-135m, a folder with a Hugging Face model and its tokenizer, a run of finetune.py, or an id that "
             f"can be downloaded ({str(e).splitlines()[0][:150]})")
    kind = kind_of(config)
    auto = {"encoder-decoder": AutoModelForSeq2SeqLM, "encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM}[kind]
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" or has_fast_bf16() else torch.float32
    try:
        model = auto.from_pretrained(folder, dtype=dtype, **local).eval().requires_grad_(False)
        model = (shard_layers(model, device) if shard else model).to(device)
    except (OSError, ValueError, RuntimeError) as e:
        stop(f"the weights of '{name}' could not be loaded ({str(e).splitlines()[0][:150]}); download or save them again")
    if getattr(config, "final_logit_softcapping", None):
        stop(f"{name} caps its logits after the head (final_logit_softcapping), which the verbalizer does not do; use another LM")
    head = model.get_output_embeddings()
    head.forward = lambda x: x
    mask = {"encoder-decoder": "<extra_id_0>", "encoder": tok.mask_token, "decoder": None}[kind]
    mask_id = tok.convert_tokens_to_ids(mask) if mask else None
    if kind != "decoder" and (mask_id is None or mask_id == tok.unk_token_id):
        stop(f"{name} is an {kind} LM but its tokenizer has no mask token ({mask or 'mask_token'}); a title cannot be read from it")
    around = tok("a")["input_ids"]
    body = tok("a", add_special_tokens=False)["input_ids"]
    at = around.index(body[0])
    lm = SimpleNamespace(name=str(name), folder=str(folder), kind=kind, model=model, tok=tok, head_VD=head.weight, bias_V=getattr(head, "bias", None),
                         mask_id=mask_id, start=around[:at], end=around[at + len(body):], device=device, dtype=dtype, attends=kind != "encoder" and own_attention(model), packs=False, fused=not shard and can_fuse(model), sharded=shard, items=None, tapped=None, taps=(),
                         special=set(tok.all_special_ids) - {tok.unk_token_id},
                         max_tokens=min(getattr(config, "max_position_embeddings", None) or 1024, 4096) - 2)   # RoBERTa's positions begin at 2
    lm.packs = kind == "decoder" and lm.attends and can_pack(model)
    lm.sep = encode(lm, "\n" if kind == "decoder" else ";")
    return lm


def decoder_layers(lm):
    """(module that holds them, its attribute, the layers) of a decoder-only LM's body."""
    if lm.kind != "decoder":
        stop(f"{lm.name} is an {lm.kind} LM; layers are cut and taught in decoder-only LMs only")
    return next((m, n, c) for m in lm.model.base_model.modules() for n, c in m.named_children()
                if isinstance(c, torch.nn.ModuleList) and len(c) == lm.model.config.num_hidden_layers)


def adapt_modules(lm, adapt="qv"):
    """Names of the linear layers an adapter is put on: the attention's q and v (DELRec), or every linear layer of the body."""
    qv = ("q_proj", "v_proj", "q", "v", "query", "value")
    head = lm.model.get_output_embeddings()
    names = [n for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
             and (adapt == "linear" or n.split(".")[-1] in qv)]
    if not names:
        stop(f"{lm.name} has no attention projections named {', '.join(qv)}; use --adapt linear")
    return names


def prune(lm, n):
    """Leave the first n layers; the final norm and the head stay (SLMRec: a depth-pruned student)."""
    holder, name, layers = decoder_layers(lm)
    if n > len(layers):
        stop(f"--layers {n}: {lm.name} has {len(layers)} layers; give at most so many")
    setattr(holder, name, layers[:n])
    lm.model.config.num_hidden_layers = n
    if getattr(lm.model.config, "layer_types", None):
        lm.model.config.layer_types = lm.model.config.layer_types[:n]


def tap(lm, blocks):
    """From now on every pass leaves in lm.tapped the states (N, D) at its reads after each of the blocks its layers are cut into; the last ones
    after the final norm, as the head reads them."""
    holder, _, layers = decoder_layers(lm)
    keep = lambda module, args, out: lm.tapped.append(out[0] if isinstance(out, tuple) else out)
    lm.taps = {j * len(layers) // blocks - 1 for j in range(1, blocks)}      # read by pass_fused, which calls no layer
    for i in lm.taps:
        layers[i].register_forward_hook(keep)
    norms = [m for n, m in holder.named_children() if "norm" in n or n == "ln_f"]
    norms[-1].register_forward_hook(keep)
    lm.tapped = []


def layers_of(model):
    from transformers.modeling_layers import GradientCheckpointingLayer
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def shard_layers(model, device):
    """torch's FSDP2 around each layer: a process keeps its part and fetches the rest while the layer computes. Adapters, which come later,
    and what is not in a layer (embeddings, head) stay whole on every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    if not torch.distributed.is_initialized():
        stop("--shard divides the LM among processes, but there is one; start them with torchrun --nproc_per_node=N, or leave --shard out")
    if not layers_of(model):
        stop(f"--shard: {type(model).__name__} has no layers that transformers can name; leave --shard out")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    if mesh.get_rank() == 0:
        here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
        print(f"the LM's layers are divided among {mesh.size()} processes: {here:,} of {sum(p.numel() for p in model.parameters()):,} parameters on this one", flush=True)
    return model


def digest(*tensors):
    """16 hex digits that tell tensors apart."""
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.detach().float().cpu().contiguous().numpy().data)
    return h.hexdigest()[:16]


def fingerprint(lm):
    """16 hex digits of an LM: its tokenizer's vocabulary, its size, a piece of every weight."""
    h = hashlib.sha256(json.dumps(sorted(lm.tok.get_vocab().items())).encode())
    for name, p in lm.model.named_parameters():
        p = p.full_tensor() if lm.sharded and hasattr(p, "full_tensor") else p
        h.update(f"{name} {tuple(p.shape)} {digest(p.flatten()[:64])}".encode())
    return h.hexdigest()[:16]


def own_attention(model):
    """Let the model attend by `attention` below. False, and nothing changed, for models that cannot be given an attention: they compute the
    prefix with every prompt, and an encoder's keys for every candidate."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    takes = model.config.model_type in ("t5", "mt5") if model.config.is_encoder_decoder else model._supports_attention_backend
    if not takes or not hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return False
    AttentionInterface.register("delrec", attention)
    AttentionMaskInterface.register("delrec", sdpa_mask)
    model.set_attn_implementation("delrec")
    for part in model.modules():                         # some releases of transformers leave out an encoder's and a decoder's copies of the config
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = "delrec"
    return True


def can_pack(model):
    """True where pass_packed computes what the model does: on a CPU (on a GPU one call per piece would cost more than the padding), and
    attention is no more than softmax(q k) v."""
    odd = ("sliding_window", "attn_logit_softcapping", "alibi", "attention_chunk_size")
    return model.device.type == "cpu" and not any(getattr(model.config, x, None) for x in odd)


def can_fuse(model):
    """True where pass_fused computes what the model does: Llama's layers on a CPU, in fp32 or bf16, and a C++ compiler at hand."""
    from delrec.kernels import cpu
    c = model.config
    return model.device.type == "cpu" and model.dtype in (torch.float32, torch.bfloat16) and c.model_type in ("llama", "mistral", "qwen2") and \
        c.hidden_act == "silu" and not getattr(c, "sliding_window", None) and cpu.library() is not None


def has_fast_bf16():
    """True on CPUs that multiply bf16 in hardware; elsewhere bf16 is emulated and slower than fp32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def encode(lm, text):
    """Plain text -> token ids; text that spells a special token stays text (titles are data)."""
    ids = lm.tok(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if lm.special & set(ids):      # a tokenizer that ignores split_special_tokens: break the spelling up
        for s in lm.tok.all_special_tokens:
            text = text.replace(s, s.strip("<>[]|"))
        ids = [t for t in lm.tok(text, add_special_tokens=False)["input_ids"] if t not in lm.special]
    return ids


def width(lm):
    return lm.head_VD.shape[1]


def embed(lm, ids_BQ, P_kD):
    """Token embeddings with the soft prompt spliced in at the slots, in order, and items' vectors at their places. Returns (B, Q, D) in the
    LM's dtype."""
    e_BQD = lm.model.get_input_embeddings()(ids_BQ.clamp(min=0)).to(lm.dtype)
    slot_BQ = ids_BQ == SLOT
    if P_kD is not None and slot_BQ.any():
        nth_BQ = (slot_BQ.long().cumsum(1) - 1).clamp(min=0)
        e_BQD = torch.where(slot_BQ[..., None], P_kD.to(lm.dtype)[nth_BQ.clamp(max=len(P_kD) - 1)], e_BQD)
    item_BQ = ids_BQ <= ITEM
    if lm.items is not None and item_BQ.any():
        vectors_ND = lm.items.maps["in"](lm.items.E[ITEM - ids_BQ[item_BQ]])
        e_BQD = e_BQD.masked_scatter(item_BQ[..., None], vectors_ND.to(lm.dtype))
    return e_BQD


def begin(lm, prefix, P_kD=None, cache=True):
    """Everything about the prefix that does not depend on the sample. Gradients flow to P and to adapters where enabled.

    A decoder-only LM computes the prefix's keys and values here, once for all prompts; cache=False leaves them to every prompt: the same
    numbers, slower (encoders see every token from every other, so they have nothing to keep). Nor is it kept while a sharded LM trains: FSDP
    fetches a layer's weights when a gradient reaches the layer's output, and the prefix's gradient enters at its keys and values."""
    if lm.kind != "decoder" or not lm.attends or not cache or lm.sharded and torch.is_grad_enabled():
        return SimpleNamespace(prefix=prefix, P=P_kD, kv=None)
    ids = torch.as_tensor(prefix, device=lm.device)[None]
    out = lm.model.base_model(inputs_embeds=embed(lm, ids, P_kD), use_cache=True)
    return SimpleNamespace(prefix=prefix, P=P_kD, kv=[(layer.keys, layer.values) for layer in out.past_key_values.layers])


def pad(rows, value=0):
    """Rows of different lengths -> one int64 array padded on the right."""
    out = np.full((len(rows), max(map(len, rows))), value, np.int64)
    for i, r in enumerate(rows):
        out[i, :len(r)] = r
    return out


def read(lm, start, tails, tok_BCT=None, n_BC=None, at=None):
    """One pass of the LM over prefix + tails[b].

    Returns x: the states the head would read, (B, D) at the mask; or with titles (tok_BCT, n_BC: numpy) (N, D), the states that
    predict each of their tokens in the order b, c, t < n[b, c], from a forced pass in which every title follows its own prompt; and
    with at (a list of index arrays into the tails, decoder-only) also (M, D), the states that predict those tail tokens.
    """
    return {"decoder": read_decoder, "encoder-decoder": read_encoder_decoder, "encoder": read_encoder}[lm.kind](
        lm, start, tails, tok_BCT, n_BC, at)


def read_examples(lm, start, batch):
    """The states at all reads of some training examples (tail, at, target), masks first: (N, D)."""
    several = any(len(e.target) > 1 for e in batch)
    x = read(lm, start, [e.tail for e in batch], at=[e.at for e in batch] if several else None)
    return torch.cat(x) if several else x


def read_decoder(lm, start, tails, tok_BCT, n_BC, at):
    """One row per sample: its tail, then its C titles, each of which sees the prefix, the tail and itself only."""
    ahead = start.prefix if start.kv is None else start.prefix[:0]   # what of the prefix stands in the rows, and what in the cache
    kept = len(start.prefix) - len(ahead)
    rows, segments, places, reads, past = [], [], [], [], []
    for b, tail in enumerate(tails):
        if tail[-1] != MASK:
            stop("a decoder-only LM reads the token after the prompt: the mask must stand last")
        m = len(ahead) + len(tail) - 1
        row, seg, pos, get = [ahead, tail[:-1]], [np.zeros(m, int)], [np.arange(m)], [] if tok_BCT is not None else [[m - 1]]
        q = m
        for c in range(0 if tok_BCT is None else tok_BCT.shape[1]):
            n = max(n_BC[b, c] - 1, 0)                               # the last token predicts nothing we need
            row.append(tok_BCT[b, c, :n])
            seg.append(np.full(n, c + 1))
            pos.append(np.arange(m, m + n))
            if n_BC[b, c]:                                           # token 0 of a title is predicted at the mask, token t by token t-1
                get += [[m - 1], np.arange(q, q + n)]
            q += n
        rows.append(np.concatenate(row)), segments.append(np.concatenate(seg)), places.append(np.concatenate(pos) + kept)
        reads.append(np.concatenate(get).astype(int) if get else np.zeros(0, int)), past.append(len(ahead) + at[b] - 1 if at is not None else [])
    P = start.P if len(ahead) else None
    go = pass_padded if not lm.packs else pass_packed if torch.is_grad_enabled() or not lm.fused else pass_fused
    x_ND = go(lm, start.kv, P, kept, rows, segments, places, reads if at is None else [*reads, *past])
    return x_ND if at is None else x_ND.split([sum(map(len, reads)), sum(map(len, past))])


def picked(first, index):
    """Places within each row, once or several times around the rows -> places in all of them, which begin at `first`."""
    return np.concatenate([first[b % len(first)] + i for b, i in enumerate(index)]).astype(int)


def pass_padded(lm, kv, P_kD, kept, rows, segments, places, index):
    """The LM's body over rows padded to one length, under a mask. Returns the states at `index` (an array for each row, or several
    for each, one round of the rows after the other): (N, D)."""
    B = len(rows)
    ids_BQ, seg_BQ, pos_BQ = (torch.as_tensor(pad(r, v)).to(lm.device) for r, v in ((rows, 0), (segments, -1), (places, 0)))
    Q = ids_BQ.shape[1]
    sees_QQ = torch.ones(Q, Q, dtype=torch.bool, device=lm.device).tril()
    own_BQQ = (seg_BQ[:, None, :] == 0) | (seg_BQ[:, None, :] == seg_BQ[:, :, None])
    mask_BQK = torch.cat([torch.ones(B, Q, kept, dtype=torch.bool, device=lm.device), own_BQQ & sees_QQ], 2)
    more = {"packed": SimpleNamespace(kv=kv, pieces=None)} if kv else {}
    lm.tapped = None if lm.tapped is None else []
    x_BQD = lm.model.base_model(inputs_embeds=embed(lm, ids_BQ, P_kD), attention_mask=mask_BQK[:, None], position_ids=pos_BQ, use_cache=False, **more).last_hidden_state
    return reads_of(lm, x_BQD, torch.as_tensor(picked(np.arange(B) * Q, index), device=lm.device))


def reads_of(lm, x_BQD, index_N):
    """The states at the reads (N, D), and in lm.tapped those of the blocks."""
    if lm.tapped:
        lm.tapped = [t.flatten(0, 1)[index_N] for t in lm.tapped]
    return x_BQD.flatten(0, 1)[index_N]


def pass_packed(lm, kv, P_kD, kept, rows, segments, places, index, block=256):
    """The same with all rows one behind the other, no padding: `attention` takes them apart again, in blocks of queries that see the
    prefix, what stands before the block in its row's tail, and what stands before them in the block."""
    pieces, masks, groups = [], {}, lm.model.config.num_attention_heads // lm.model.config.num_key_value_heads
    for seg in segments:
        m = int((seg == 0).sum())                                    # the tail; behind it whole titles, about `block` tokens at a time
        ends = np.flatnonzero(np.diff(seg, append=-1)) + 1           # where a segment ends
        edges, first = [*range(0, m, block), m], len(pieces)
        while edges[-1] < len(seg):
            after = ends[ends > edges[-1]]
            edges.append(int(max(after[0], *after[after <= edges[-1] + block], 0)))
        for i, j in zip(edges[:-1], edges[1:]):
            before = min(i, m)
            key = (kept + before, seg[i:j].tobytes())
            if key not in masks:
                sees = np.concatenate([np.ones((j - i, kept + before), bool), np.tril(seg[i:j, None] == seg[None, i:j])], 1)
                masks[key] = torch.zeros(sees.shape, dtype=lm.dtype).masked_fill(torch.as_tensor(~sees), -torch.inf).repeat(groups, 1)
            pieces.append(SimpleNamespace(length=j - i, before=range(first, first + sum(e < before for e in edges[:-1])), mask=masks[key]))
    ids_1M, pos_1M = (torch.as_tensor(np.concatenate(r))[None] for r in (rows, places))
    if P_kD is not None:                                             # every row holds all the slots
        P_kD = P_kD.repeat(len(rows), 1)
    lm.tapped = None if lm.tapped is None else []
    x_1MD = lm.model.base_model(inputs_embeds=embed(lm, ids_1M, P_kD), attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool), position_ids=pos_1M,
                                use_cache=False, packed=SimpleNamespace(kv=kv, pieces=pieces)).last_hidden_state
    return reads_of(lm, x_1MD, torch.as_tensor(picked(np.cumsum([0, *map(len, rows)])[:-1], index)))


def pass_fused(lm, kv, P_kD, kept, rows, segments, places, index):
    """The same without gradients, layer by layer, where the layers are Llama's: between the matrix products stand the loops of
    kernels/cpu.cpp, and the last layer is computed for the states read only."""
    from delrec.kernels import cpu
    body = lm.model.base_model
    ids_1M, pos_1M = (torch.as_tensor(np.concatenate(r))[None] for r in (rows, places))
    ptr, seg_M = np.cumsum([0, *map(len, rows)]), torch.as_tensor(np.concatenate(segments), dtype=torch.int32)
    read_N, ptr = torch.as_tensor(picked(ptr[:-1], index)), torch.as_tensor(ptr)
    x_MD = embed(lm, ids_1M, P_kD if P_kD is None else P_kD.repeat(len(rows), 1))[0]    # every row holds all the slots
    cos_Md, sin_Md = (t[0].contiguous() for t in body.rotary_emb(x_MD[None], pos_1M))
    more_MD, tapped = None, []                                       # more: what the residual connection adds next
    norm = lambda x, module: cpu.rms_norm(x, more_MD, module.weight, module.variance_epsilon)
    for i, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        d = attention.head_dim
        n_MD = norm(x_MD, layer.input_layernorm)
        q_MHd, k_MGd, v_MGd = (f(n_MD).view(len(n_MD), -1, d).contiguous() for f in (attention.q_proj, attention.k_proj, attention.v_proj))
        o_MHd = cpu.attention(q_MHd, k_MGd, v_MGd, cos_Md, sin_Md, kv[i] if kv else None, seg_M, ptr, attention.scaling)
        if i == len(body.layers) - 1:
            x_MD, o_MHd = x_MD[read_N], o_MHd[read_N]
        more_MD = attention.o_proj(o_MHd.flatten(1))
        n_MD = norm(x_MD, layer.post_attention_layernorm)
        more_MD = mlp.down_proj(cpu.silu_mul(mlp.gate_proj(n_MD), mlp.up_proj(n_MD)))
        if i in lm.taps:
            tapped.append(x_MD[read_N] + more_MD[read_N])
    x_ND = norm(x_MD, body.norm)
    lm.tapped = None if lm.tapped is None else [*tapped, x_ND]
    return x_ND


def attention(module, query, key, value, attention_mask, scaling=None, packed=None, **kwargs):
    """Attention as transformers asks for it, query (B, H, Q, d), key and value (B, G, K, d), with three things of ours: the kept prefix in
    front of the keys, the rows of pass_packed piece by piece, and candidates that share their prompt's encoder states."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if len(query) > len(key):                            # C candidates of a prompt stand under each other as if they were more queries
        C, Q = len(query) // len(key), query.shape[2]
        o = F.scaled_dot_product_attention(query.unflatten(0, (-1, C)).transpose(1, 2).flatten(2, 3), key, value, attn_mask=attention_mask, scale=scaling,
                                           dropout_p=kwargs.get("dropout", 0.0))
        return o.unflatten(2, (C, Q)).permute(0, 2, 3, 1, 4).flatten(0, 1), None
    if packed is None:
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if packed.pieces is None:
        key, value = (torch.cat([kept.expand(len(t), -1, -1, -1), t], 2) for kept, t in zip(packed.kv[module.layer_idx], (key, value)))
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # packed rows. The H / G query heads that share keys stand under each other too: the same sums, fewer and larger products
    (_, H, _, d), G, out = query.shape, key.shape[1], []
    query, key, value = (t.split([p.length for p in packed.pieces], 2) for t in (query, key, value))
    prefix = [[t] for t in packed.kv[module.layer_idx]] if packed.kv else [[], []]
    for n, piece in enumerate(packed.pieces):
        k, v = (torch.cat([*first, *(t[i] for i in piece.before), t[n]], 2) for first, t in zip(prefix, (key, value)))
        o = F.scaled_dot_product_attention(query[n].reshape(1, G, H // G * piece.length, d), k, v, attn_mask=piece.mask, scale=scaling,
                                           dropout_p=kwargs.get("dropout", 0.0))
        out.append(o.view(1, H, piece.length, d))
    return torch.cat(out, 2).transpose(1, 2), None


def checkpoint_layers(model):
    """Gradient checkpointing: each layer keeps its input only and is computed again in backward; the same numbers for a third more time."""
    from torch.utils.checkpoint import checkpoint

    def again(forward):
        def run(*args, **kwargs):
            if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:     # the prefix, whose keys and values are kept
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        return run

    if not layers_of(model):
        stop(f"--gradient-checkpointing: {type(model).__name__} has no layers that transformers can checkpoint; lower --micro instead")
    for layer in layers_of(model):
        layer.forward = again(layer.forward)


def fill(lm, start, tails, n=None):
    """Prefix + tail + the tokenizer's closing specials with the mask's own token(s): n[b] masks in row b (default 1)."""
    rows = []
    for b, tail in enumerate(tails):
        i = int(np.flatnonzero(np.asarray(tail) == MASK)[0])
        rows.append(np.concatenate([start.prefix, tail[:i], np.full(1 if n is None else n[b], lm.mask_id), tail[i + 1:], lm.end]).astype(np.int64))
    return rows


def read_encoder_decoder(lm, start, tails, tok_BCT, n_BC, at):
    """The mask is a sentinel in the encoder's text; its filler is the first thing the decoder says after that sentinel."""
    if at is not None:
        stop(f"{lm.name}: the loss on history titles needs a decoder-only LM; use --loss candidates")
    rows = fill(lm, start, tails)
    ids_BQ = torch.as_tensor(pad(rows, SLOT - 9)).to(lm.device)
    real_BQ = ids_BQ != SLOT - 9
    enc = lm.model.get_encoder()(inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=real_BQ.long()).last_hidden_state
    first = torch.tensor([lm.model.config.decoder_start_token_id, lm.mask_id], device=lm.device)
    if tok_BCT is None:
        return lm.model(encoder_outputs=(enc,), attention_mask=real_BQ.long(), decoder_input_ids=first.expand(len(tails), 2), use_cache=False).logits[:, 1]
    B, C, T = tok_BCT.shape
    tok = torch.as_tensor(tok_BCT.reshape(B * C, T)).long().to(lm.device)
    dec = torch.cat([first.expand(B * C, 2), tok[:, :-1]], 1)
    # the C decoder rows of a prompt share its encoder states, and so the keys and values made of them, where `attention` is asked
    shared = (enc, real_BQ[:, None, None]) if lm.attends else (enc.repeat_interleave(C, 0), real_BQ.long().repeat_interleave(C, 0))
    x = lm.model(encoder_outputs=(shared[0],), attention_mask=shared[1], decoder_input_ids=dec, use_cache=False).logits[:, 1:]
    return x[torch.arange(T, device=lm.device) < torch.as_tensor(n_BC.reshape(-1, 1)).to(lm.device)]


def read_encoder(lm, start, tails, tok_BCT, n_BC, at):
    """The LM's own mask token; a title of n tokens is read from n masks at once (each blind to the others: a pseudo-likelihood)."""
    if at is not None:
        stop(f"{lm.name}: the loss on history titles needs a decoder-only LM; use --loss candidates")
    if tok_BCT is None:
        n = np.ones(len(tails), int)
    else:
        n = n_BC.reshape(-1)
        tails = [t for t in tails for _ in range(n_BC.shape[1])]
    rows = fill(lm, start, tails, n)
    ids_BQ = torch.as_tensor(pad(rows, SLOT - 9)).to(lm.device)
    x_BQD = lm.model(inputs_embeds=embed(lm, ids_BQ, start.P), attention_mask=(ids_BQ != SLOT - 9).long()).logits
    mask_at = [np.flatnonzero(t == MASK)[0] + len(start.prefix) for t in tails]
    where = np.concatenate([b * ids_BQ.shape[1] + m + np.arange(k) for b, (m, k) in enumerate(zip(mask_at, n))])
    return x_BQD.flatten(0, 1)[torch.as_tensor(where, device=lm.device)]


# ---------------------------------------------------------------- titles and prompts

def tokenise_titles(lm, data, max_title=32):
    """All titles, tokenised once: CSR ptr int64 [I+2], tok int64 [M] (item i owns tok[ptr[i]:ptr[i+1]], at most max_title tokens), and
    the tokens that occur in titles: vocab (tensor), index int64 [V] (token -> place in vocab), head (their rows), bias."""
    ids = [encode(lm, t)[:max_title] for t in data.titles]
    ids = [t or list(lm.sep) for t in ids]
    ids[0] = []
    ptr = np.concatenate([[0], np.cumsum([len(t) for t in ids])]).astype(np.int64)
    tok = np.concatenate([np.asarray(t, np.int64) for t in ids])
    vocab = np.unique(np.concatenate([tok, lm.sep]))
    index = np.zeros(lm.head_VD.shape[0], np.int64)
    index[vocab] = np.arange(len(vocab))
    rows = torch.as_tensor(vocab, device=lm.device)
    return SimpleNamespace(ptr=ptr, tok=tok, vocab=vocab, index=index, head=lm.head_VD.detach()[rows].contiguous(),
                           bias=None if lm.bias_V is None else lm.bias_V.detach()[rows])


def title(titles, i):
    return titles.tok[titles.ptr[i]:titles.ptr[i + 1]]


def pad_titles(titles, items_BC, end=()):
    """Token ids (B, C, T) and lengths (B, C) of items, each followed by the tokens `end`."""
    n_BC = (titles.ptr[items_BC + 1] - titles.ptr[items_BC])
    T = int(n_BC.max())
    at = np.minimum(titles.ptr[items_BC][..., None] + np.arange(T), len(titles.tok) - 1)
    tok = np.where(np.arange(T) < n_BC[..., None], titles.tok[at], 0)
    tok = np.concatenate([tok, np.zeros((*n_BC.shape, len(end)), np.int64)], 2)
    for j, e in enumerate(end):
        np.put_along_axis(tok, (n_BC + j)[..., None], e, 2)
    return tok, n_BC + len(end)


# w MCP (DELRec, Table III): what a backbone does, in words where the soft prompt would stand; ours, as the paper does not print its own
PATTERN = {"SASRec": "{b} weighs all {n}s of the history by how much they say about the last one: {n}s liked by users with a similar recent history come next.",
           "GRU4Rec": "{b} reads the {n}s one after another and remembers what matters: the latest {n}s count most, older ones fade.",
           "Caser": "{b} looks for patterns among the last few {n}s, pairs and triples that follow one another, and adds the user's general taste."}


def prompter(lm, data, titles, backbone="SASRec", k=0, show=False, letters=False, max_tokens=None, shown="titles", words=False):
    """Returns prefix (int64 array) and three functions that make tails: history(...), temporal_analysis(...), pattern(...).

    k = 0 leaves out the soft prompt and the words about it; words: the backbone's pattern is told in words instead. show lists the candidates before the mask, with letters if asked. shown: a history
    item is its title, its vector (ids: E4SRec), or its title and its vector (hybrid: LLaRA, arXiv 2312.02445).
    Each tail comes as (tokens, at): at are the places of the tokens of history titles. Too long: the oldest history goes first.
    """
    noun, verb = data.meta["words"]["noun"], data.meta["words"]["verb"]
    sep, texts = np.asarray(lm.sep), {}
    longest = int(np.diff(titles.ptr).max()) + len(sep)     # room for the title that a forced pass appends, or for its masks
    budget = min(max_tokens or lm.max_tokens, lm.max_tokens)

    def text(s):
        if s not in texts:
            texts[s] = np.asarray(encode(lm, s) + list(lm.sep), np.int64)
        return texts[s]

    def line(i):
        return np.concatenate([title(titles, i), sep])

    prefix = [np.asarray(lm.start, np.int64)]
    if k:
        prefix += [np.asarray(encode(lm, f"How {backbone} recommends {noun}s:"), np.int64), np.full(k, SLOT), sep]
    elif words:
        prefix += [text(f"How {backbone} recommends {noun}s: " + PATTERN.get(backbone, PATTERN["SASRec"]).format(b=backbone, n=noun))]
    prefix = np.concatenate(prefix + [text(f"{noun.capitalize()}s the user {verb}, oldest first:")])
    # the last token of the prefix begins every tail, so that the first title's first token has a state that predicts it
    prefix, begins = prefix[:-1], prefix[-1:]

    def item(i):
        vector = np.array([ITEM - i], np.int64)
        return line(i) if shown == "titles" else vector if shown == "ids" else np.concatenate([title(titles, i), vector, sep])

    def listed(cand):
        if cand is None or not (show or letters):
            return []
        mark = [np.asarray(encode(lm, f"{x}. "), np.int64) for x in LETTERS[:len(cand)]] if letters else [np.zeros(0, np.int64)] * len(cand)
        return [text(f"Candidate {noun}s:")] + [np.concatenate([m, line(c)]) for m, c in zip(mark, cand)] + [text(f"The next {noun}:")]

    def tail(old, rest):
        """old: history items that may be dropped from the front; rest: pieces that must stay."""
        old = list(old)
        room = budget - len(prefix) - len(lm.end) - 2 - longest - sum(map(len, rest))
        lines = [item(i) for i in old]
        while lines and sum(map(len, lines)) > room:
            lines.pop(0)
        if room < 0:
            stop(f"a prompt needs {budget - room} tokens without any history, the limit is {budget}; use fewer candidates or slots, or shorter titles")
        start, at = len(begins), []
        for x in lines:
            at.append(np.arange(start, start + len(x)))
            start += len(x)
        return np.concatenate([begins, *lines, *rest, [MASK]]).astype(np.int64), np.concatenate(at) if at else np.zeros(0, np.int64)

    def history(items, cand=None):
        """Stage 2: what comes after these items? (DELRec, section IV-C)"""
        return tail(items, listed(cand))

    def temporal_analysis(items, a, cand=None):
        """Stage 1, TA (DELRec, section IV-B): items i_1..i_n; the example solves i_{a-1} from i_a, the question asks i_{n-1} given i_n."""
        example = [text(f"The next {noun} was:"), item(items[a - 1]), text(f"So the most recent {noun} was:"), item(items[a - 2]),
                   text(f"Later {noun}s:")] + [item(i) for i in items[a - 1:-2]]
        return tail(items[:a - 2], example + [text(f"The next {noun} was:"), item(items[-1])] + listed(cand)[:-1] +
                    [text(f"So the most recent {noun} was:")])

    def pattern(items, ranked, cand=None):
        """Stage 1, RPS (DELRec, section IV-B): the backbone ranked r_1..r_h after these items; told are r_2..r_h, asked is r_1. Of vectors the whole list is
        asked, so none of it is told."""
        if shown == "ids":
            return history(items)
        return tail(items, [text(f"{backbone}'s choices after its first:")] + [line(r) for r in ranked[1:]] + listed(cand)[:-1] +
                    [text(f"{backbone}'s first choice:")])

    return SimpleNamespace(prefix=prefix, history=history, temporal_analysis=temporal_analysis, pattern=pattern)


# ---------------------------------------------------------------- verbalizers

def letter_ids(lm, C):
    """One token per letter as it stands in front of a candidate; refused where they are not single and distinct."""
    if C > len(LETTERS):
        stop(f"--verbalizer letter has {len(LETTERS)} letters but there are {C} candidates; use at most {len(LETTERS)}")
    ids = [encode(lm, x) for x in LETTERS[:C]]
    if any(len(i) != 1 for i in ids) or len({i[0] for i in ids}) < C:
        stop(f"{lm.name}: its tokenizer does not keep the letters A..{LETTERS[C - 1]} as one token each; use another --verbalizer")
    return np.array([i[0] for i in ids])


def verbalise(lm, x_BD, cand_BC, titles, verbalizer):
    """Candidates' scores (B, C) from one state a prompt: the mean of the logits of a title's tokens, its first token's, its letter's, or the
    product of the state with the item's vector."""
    if verbalizer == "items":
        return (vectors.out(lm, x_BD)[:, None] * lm.items.E[torch.as_tensor(cand_BC, device=lm.device)]).sum(-1)
    if verbalizer == "letter":
        tok_BCT = np.broadcast_to(letter_ids(lm, cand_BC.shape[1])[None, :, None], (*cand_BC.shape, 1))
        n_BC = np.ones(cand_BC.shape, int)
    else:
        tok_BCT, n_BC = pad_titles(titles, cand_BC)
        n_BC = np.minimum(n_BC, 1) if verbalizer == "first" else n_BC
    tok_BCT, n_BC = (torch.as_tensor(np.ascontiguousarray(a, np.int32)).to(lm.device) for a in (tok_BCT, n_BC))
    return kernels.candidate_scores(x_BD, lm.head_VD, tok_BCT, n_BC, lm.bias_V)


def score(lm, start, tails, cand_BC, titles, verbalizer, at=None):
    """score_BC fp32: what the LM says at the mask of prompt b for candidate c. With `at` (see read) also the log
    probability of each of those tail tokens, (M,)."""
    if verbalizer == "likelihood":
        tok_BCT, n_BC = pad_titles(titles, cand_BC, lm.sep if lm.kind == "decoder" else ())
        x_ND = read(lm, start, tails, tok_BCT, n_BC, at)
        real = np.arange(tok_BCT.shape[2]) < n_BC[..., None]
        words = torch.as_tensor(titles.index[tok_BCT[real]], device=lm.device)
        ptr = torch.as_tensor(np.concatenate([[0], np.cumsum(n_BC.reshape(-1))]), device=lm.device)
        x_ND, past = x_ND if at is not None else (x_ND, None)
        # per token (ours): on ml-100k the sum over tokens gives the plain LM HR@1 .21 and a cross-entropy of 7.8, the mean .25 and 2.4
        score_BC = kernels.title_likelihood(x_ND, titles.head, words, ptr, titles.bias, normalise=True).view(cand_BC.shape)
    else:
        x_BD = read(lm, start, tails, at=at)
        x_BD, past = x_BD if at is not None else (x_BD, None)
        score_BC = verbalise(lm, x_BD, cand_BC, titles, verbalizer)
    if at is None:
        return score_BC
    words = np.concatenate([titles.index[t[a]] for t, a in zip(tails, at)])
    words = torch.as_tensor(words, device=lm.device)
    each = torch.arange(len(words) + 1, device=lm.device)
    return score_BC, kernels.title_likelihood(past, titles.head, words, each, titles.bias)


# ---------------------------------------------------------------- memory and time of a training run

def largest_micro(step, tails, most, device, ranks):
    """How many prompts of a forward and backward pass fit into memory: step(m) runs one on the m longest prompts. Two passes are measured, the
    rest is a line through them, with a fifth of what is free left over; on a CPU no more than fill its caches, where more is not faster."""
    if device.type == "cpu":
        most = min(most, max(1, CPU_TOKENS // max(map(len, tails))))
    step(1)                                              # the first pass also allocates what stays
    one, two = extra_bytes(lambda: step(1), device), extra_bytes(lambda: step(2), device) if most > 1 else 0
    if one is None:
        stop("--micro auto: this system does not tell how much memory a pass takes; give --micro a number")
    fits = 1 + int(max(0.8 * free_bytes(device) - one, 0) / max(two - one, 1)) if most > 1 else 1
    micro = max(1, min(fits, most))
    if ranks.world > 1:                                  # the least of all ranks
        micro = int(-max_over_ranks(-micro, ranks))
    if ranks.main:
        print(f"--micro auto: a prompt takes {one / 2 ** 20:.0f} MB, each further one {max(two - one, 0) / 2 ** 20:.0f} MB; {fits} would fit, {micro} at a time", flush=True)
    return micro


# ---------------------------------------------------------------- scoring whole splits

def ranker(lm, data, settings, P_kD=None):
    """An LM with everything that fixes how it ranks: titles, prompts, P. settings: verbalizer, show, order, history, max_title,
    max_tokens, backbone (its name in the prompt), backbone_run (its folder, for order); the soft prompt's length is P's."""
    titles = tokenise_titles(lm, data, settings["max_title"])
    shown = settings.get("input", "titles")
    make = lambda shown: prompter(lm, data, titles, settings["backbone"], 0 if P_kD is None else len(P_kD), settings["show"],
                                  settings["verbalizer"] == "letter", settings["max_tokens"], shown, settings.get("words", False))
    return SimpleNamespace(lm=lm, data=data, titles=titles, prompts=make(shown), plain=make("titles") if shown == "hybrid" else None, P=P_kD, verbalizer=settings["verbalizer"],
                           show=settings["show"] or settings["verbalizer"] == "letter", history=settings["history"],
                           order=settings["order"], backbone_run=settings["backbone_run"], cache=True, shuffled=False)


def windows(r, samples):
    """The histories that the prompts of some samples (indices into data.items) show, (n, L)."""
    old_nL = histories(r.data, samples, r.history)
    return shuffled(old_nL, samples) if r.shuffled else old_nL


def batches_of(cost, budget):
    """Indices in batches of like cost, the dearest first, each batch at most `budget` when all of it costs as much as its dearest."""
    batches = []
    for i in np.argsort(-np.asarray(cost), kind="stable"):
        if not batches or (len(batches[-1]) + 1) * cost[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(int(i))
    return [np.array(b) for b in batches]


def tokens_of(lm):
    """Tokens of a pass without gradients."""
    return 65536 if lm.device.type == "cuda" else CPU_TOKENS


@torch.no_grad()
def score_tails(r, tails, cand_nC, ranks, name="score", out=None, tokens=None):
    """Scores float32 (n, C) of candidates for prompts, on every rank; the prefix computed once.

    Batches of like length, at most `tokens` tokens each (tokens_of: on a CPU its caches shall hold them), are formed over
    all prompts and then shared among the ranks: a prompt meets the same neighbours (so bf16 rounds it the same way) however many
    processes there are.
    """
    r.lm.model.eval()
    start = begin(r.lm, r.prompts.prefix, r.P, r.cache)
    likelihood = r.verbalizer == "likelihood"
    cost = np.array([len(t) for t in tails], int) + (0 if r.lm.kind == "decoder" and r.cache else len(r.prompts.prefix))
    if likelihood:                                                   # an encoder reads every title in a prompt of its own
        cost = cost * (cand_nC.shape[1] if r.lm.kind == "encoder" else 1) + np.diff(r.titles.ptr)[cand_nC].sum(1)
    batches = batches_of(cost, tokens or tokens_of(r.lm))
    batches = shares(batches, ranks, r.lm.sharded)
    mine = np.concatenate([np.zeros(0, int), *(j for j, own in batches if own)])
    log, rows, done = Log(out, len(mine), name, ranks, "prompt"), np.zeros((len(mine), cand_nC.shape[1]), np.float32), 0
    for j, own in batches:
        scores = score(r.lm, start, [tails[x] for x in j], cand_nC[j], r.titles, r.verbalizer).float().cpu().numpy()
        if own:
            rows[done:done + len(j)] = scores
            log.step(done := done + len(j))
    log.close()
    return gather_rows(rows, mine, len(tails), ranks)


def reads_all(r):
    """True where one state says what every title of the catalogue scores."""
    return r.verbalizer in ("mean", "first", "items") and not r.show


@torch.no_grad()
def score_catalogue(r, start, tails):
    """Scores float32 (B, I+1) of every item of the catalogue after each prompt, -inf for the padding item, by one pass of the LM."""
    r.lm.model.eval()
    x_BD = read(r.lm, start, tails)
    ptr, tok = r.titles.ptr, r.titles.tok
    if r.verbalizer == "items":
        s_BI = vectors.out(r.lm, x_BD) @ r.lm.items.E.T
    else:
        if r.verbalizer == "first":
            tok, ptr = tok[ptr[1:-1]], np.concatenate([[0], np.arange(len(ptr) - 1)])
        s_BI = kernels.catalogue_scores(x_BD, r.lm.head_VD, *(torch.as_tensor(a).to(r.lm.device) for a in (ptr, tok)), r.lm.bias_V)
    s_BI = s_BI.float().cpu().numpy()
    s_BI[:, 0] = -np.inf
    return s_BI


@torch.no_grad()
def over_catalogue(r, tails, columns, f, ranks, name="rank", out=None):
    """f(j, s_BI) -> rows (len(j), columns) of the prompts j, from their scores of the whole catalogue; all rows fp32 (n, columns) on every rank.
    The scores themselves are never kept: n x I of them may not fit."""
    start, rows, mine, done = begin(r.lm, r.prompts.prefix, r.P, r.cache), np.zeros((len(tails), columns), np.float32), [np.zeros(0, int)], 0
    work = shares(batches_of([len(t) for t in tails], tokens_of(r.lm)), ranks, r.lm.sharded)
    log = Log(out, sum(len(j) for j, own in work if own), name, ranks, "prompt") if name else None
    for j, own in work:
        s_BI = score_catalogue(r, start, [tails[x] for x in j])
        if own:
            rows[j] = f(j, s_BI)
            mine.append(j)
            if log:
                log.step(done := done + len(j))
    if log:
        log.close()
    mine = np.concatenate(mine)
    return gather_rows(rows[mine], mine, len(tails), ranks)


def score_and_rank(r, split, which, C, ranks, penalty_I, name="rank"):
    """For an LM that reads the catalogue from one state: the scores (n, C) that score_samples gives, and full (n, 2), how many items score above
    and equal to the target once penalty_I is subtracted, the user's earlier items masked."""
    samples, cand_nC = np.asarray(getattr(r.data, split))[which], candidates(r.data, split, C, which)
    begins, target = r.data.ptr[users(r.data, samples)], r.data.items[samples].astype(np.int64)
    tails = [r.prompts.history(h[h > 0])[0] for h in windows(r, samples)]

    def f(j, s_BI):
        near = np.take_along_axis(s_BI, cand_nC[j], 1)
        s_BI = s_BI - penalty_I
        own = np.take_along_axis(s_BI, target[j][:, None], 1)
        for s_I, n in zip(s_BI, j):
            s_I[r.data.items[begins[n]:samples[n]]] = -np.inf
        np.put_along_axis(s_BI, target[j][:, None], own, 1)
        return np.concatenate([near, (s_BI > own).sum(1, keepdims=True), (s_BI == own).sum(1, keepdims=True) - 1], 1)
    rows = over_catalogue(r, tails, C + 2, f, ranks, name)
    return rows[:, :C], rows[:, C:]


def listing(r, split, C, which):
    """The order in which the prompt lists the candidates of some samples of a split, as places in the stored rows: int64 (n, C)."""
    if r.order == "shuffled" or not r.show:
        return np.broadcast_to(np.arange(C), (len(which), C))
    path = Path(r.backbone_run) / (f"scores_{split}_{C}" + "_shuffled" * r.shuffled + ".npy")
    if not path.exists():
        stop(f"--order backbone needs {path}; train the backbone with train_backbone.py, or use --order shuffled")
    if (Path(r.backbone_run) / "config.json").exists():
        load_run(r.backbone_run, r.data)                 # another preparation's scores are of other samples
    return np.argsort(-read_npy(path, (len(getattr(r.data, split)), C))[which], axis=1, kind="stable")


def score_samples(r, split, which, C, ranks, out=None, name="score"):
    """Scores (len(which), C) of the stored candidates of some samples of a split."""
    place_nC = listing(r, split, C, which)
    cand_nC = np.take_along_axis(candidates(r.data, split, C, which), place_nC, 1)
    old_nL = windows(r, np.asarray(getattr(r.data, split))[which])
    tails = [r.prompts.history(h[h > 0], c)[0] for h, c in zip(old_nL, cand_nC)]
    rows = np.zeros((len(which), C), np.float32)
    np.put_along_axis(rows, place_nC, score_tails(r, tails, cand_nC, ranks, name, out), 1)
    return rows


def neutral_scores(r, ranks, out=None, chunk=60):
    """Each title's score under the same prompt with no history and no candidates: float32 [I+1], which calibration subtracts."""
    if r.verbalizer == "letter":
        return np.zeros(r.data.n_items + 1, np.float32)             # a letter says nothing about an item
    items = np.arange(1, r.data.n_items + 1)
    blocks = np.resize(items, (-(-len(items) // chunk), chunk))     # np.resize repeats the first items in the last block
    scores = np.zeros(r.data.n_items + 1, np.float32)
    scores[blocks] = score_tails(r, [r.prompts.history([])[0]] * len(blocks), blocks, ranks, "neutral prompt", out)
    return scores


def calibrate(score_nC, cand_nC, neutral_I, target_n, weights=(0, .1, .2, .3, .5, .7, .85, 1)):
    """The weight w of the neutral score that is best on validation (HR@1, then NDCG@10): score - w * neutral."""
    def quality(w):
        m = metrics(*compare(score_nC - w * neutral_I[cand_nC], cand_nC == target_n[:, None]))
        return m["hr@1"].mean(), m["ndcg@10"].mean()
    return float(max(weights, key=quality))


# ---------------------------------------------------------------- soft prompts on disk

def save_soft_prompt(folder, P_kD):
    from safetensors.torch import save_file
    save_file({"prompt_embeddings": P_kD.detach().float().cpu().contiguous()}, folder / "soft_prompt.safetensors")


def load_soft_prompt(folder, lm):
    tensors = read_tensors(Path(folder) / "soft_prompt.safetensors")
    if "prompt_embeddings" not in tensors or tensors["prompt_embeddings"].dim() != 2:
        stop(f"{folder}/soft_prompt.safetensors holds no matrix prompt_embeddings; distil it again")
    P_kD = tensors["prompt_embeddings"].to(lm.device)
    if P_kD.shape[1] != width(lm):
        stop(f"{folder} holds a soft prompt of width {P_kD.shape[1]}, {lm.name} is {width(lm)} wide; distil it again with this LM")
    return P_kD


def random_soft_prompt(lm, k, seed):
    """k rows of the LM's embedding matrix drawn at random, which a soft prompt begins as: fp32 (k, D)."""
    rows = torch.randperm(lm.head_VD.shape[0], generator=torch.Generator().manual_seed(seed))[:k]
    return lm.model.get_input_embeddings().weight.detach()[rows.to(lm.device)].float().clone()


def open_run(run, data, device, shard=False):
    """A finished run of distill.py, finetune.py or evaluate.py --llm as a ranker, with its adapter and soft prompt, and the score it
    subtracts per item: (ranker, penalty float32 [I+1])."""
    lm = load_lm(run.llm, device, shard=shard)
    shown = run.settings.get("input", "titles")
    needed = (["adapter/adapter_model.safetensors"] if run.stage == "finetune" or getattr(run, "lr_lm", 0) else []) + (["items.safetensors"] if shown != "titles" else []) + \
        (["soft_prompt.safetensors"] if run.soft_prompt not in ("none", "words") else []) + (["neutral.npy"] if run.calibration else [])
    for part in needed:
        if not (run.folder / part).exists():
            stop(f"{run.folder} lacks {part}, which its config.json says it was trained with; train it again")
    P_kD = load_soft_prompt(run.folder, lm) if run.soft_prompt not in ("none", "words") else None
    if run.stage == "finetune" or getattr(run, "lr_lm", 0):
        from peft import PeftModel
        lm.adapter = PeftModel.from_pretrained(lm.model, run.folder / "adapter")     # wraps the layers of lm.model in place
    if shown != "titles":
        vectors.open_items(lm, run.folder, data.n_items)
    penalty_I = np.zeros(data.n_items + 1, np.float32)
    if run.calibration:
        penalty_I = run.calibration * read_npy(run.folder / "neutral.npy", (data.n_items + 1,))
    return ranker(lm, data, run.settings, P_kD), penalty_I
