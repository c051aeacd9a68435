"""The layers of an LM: cut to a few, tapped, adapted, divided among processes, computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from delrec.runtime import stop

if TYPE_CHECKING:
    from delrec.lm.model import LM

QV = ("q_proj", "v_proj", "q", "v", "query", "value", "q_lin", "v_lin", "query_proj", "value_proj")
# where one layer makes q, k and v together: GPT-2; NeoX, Bloom, Falcon; Phi-3; MPT, ModernBERT
QKV = ("c_attn", "query_key_value", "qkv_proj", "Wqkv", "in_proj_qkv")
# what holds a layer's MLP, or is a part of it: most; T5; MPT; OPT; BERT
MLP = {"mlp", "DenseReluDense", "ffn", "feed_forward", "fc1", "fc2", "intermediate", "output"}


def decoder_layers(lm: LM) -> tuple[torch.nn.Module, str, torch.nn.ModuleList]:
    """(module that holds them, its attribute, the layers) of a decoder-only LM's body."""
    if lm.kind != "decoder":
        stop(f"{lm.name} is an {lm.kind} LM; layers are cut and taught in decoder-only LMs only")
    n = lm.model.config.get_text_config().num_hidden_layers
    for module in lm.body.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == n:
                return module, name, child
    stop(f"{lm.name}: its {n} layers do not stand in one list, so they cannot be cut or taught")


def adapt_modules(lm: LM, adapt: str = "qv") -> list[str]:
    """Names of the layers an adapter is put on: the attention's q and v (DELRec), the MLP's
    (SLMRec's release: gate, up and down), or all linear ones of the body; none where the weights
    themselves train ("all")."""
    from transformers.pytorch_utils import Conv1D

    if adapt == "all":
        return []
    head = lm.model.get_output_embeddings()
    names = [
        n
        for n, m in lm.model.named_modules()
        if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head and reads_text(lm, n)
    ]
    if adapt == "linear":
        return names
    if adapt == "mlp":
        found = [n for n in names if MLP & set(n.split(".")) and "attention" not in n]
        return found or stop(
            f"{lm.name} has no MLP whose name is known; use finetune.py --adapt linear"
        )
    for parts in (QV, QKV):
        found = [n for n in names if n.split(".")[-1] in parts]
        if found:
            return found
    stop(
        f"{lm.name} has no attention projections named {', '.join(QV + QKV)}; use "
        "finetune.py --adapt linear"
    )


def train_whole(lm: LM) -> list[torch.nn.Parameter]:
    """All weights of the LM's body but the vectors of its tokens; from now on they train."""
    ends = (lm.model.get_input_embeddings(), lm.model.get_output_embeddings())
    kept = {id(p) for end in ends for p in end.parameters()}
    params = [p for p in lm.body.parameters() if id(p) not in kept]
    for p in params:
        p.requires_grad_(True)
    return params


def reads_text(lm: LM, name: str) -> bool:
    """False for a layer of what a decoder-only LM sees or hears with: no text passes it."""
    if lm.kind != "decoder":
        return True
    text = lm.model.get_decoder()
    inside = next((n for n, m in lm.model.named_modules() if m is text), "")
    return not inside or name.startswith(f"{inside}.")


def prune(lm: LM, n: int) -> None:
    """Leaves the first n layers; the final norm and the head stay (SLMRec: a depth-pruned
    student)."""
    holder, name, layers = decoder_layers(lm)
    if n > len(layers):
        stop(f"--layers {n}: {lm.name} has {len(layers)} layers; give at most so many")
    setattr(holder, name, layers[:n])
    config, whole = lm.model.config.get_text_config(), len(layers)
    kinds = list(getattr(config, "attention_layers", None) or [])
    for key, value in list(vars(config).items()):  # what it says layer by layer
        if isinstance(value, list) and len(value) == whole:
            setattr(config, key, value[:n])
    if kinds and hasattr(config, "attention_types"):  # GPT-Neo's way to say it
        config.attention_types = [[kinds[:n], 1]]
    config.num_hidden_layers = n
    try:
        config.validate()
    except AttributeError:  # older transformers have none
        pass
    except Exception as bad:  # transformers has several kinds of its own
        stop(
            f"--layers {n}: the configuration of {lm.name} does not hold for {n} layers "
            f"({str(bad).strip().splitlines()[-1][:150]}); leave --layers out"
        )


def tap(lm: LM, blocks: int) -> None:
    """From now on every pass leaves in lm.tapped the states (N, D) at its reads after each of the
    blocks its layers are cut into; the last ones after the final norm, as the head reads them."""
    holder, _, layers = decoder_layers(lm)

    def keep(module, args, out):
        lm.add_tapped(out[0] if isinstance(out, tuple) else out)

    # pass_fused, which calls no layer, reads lm.taps
    lm.tap(j * len(layers) // blocks - 1 for j in range(1, blocks))
    for i in lm.taps:
        layers[i].register_forward_hook(keep)
    norms = [m for n, m in holder.named_children() if "norm" in n or n == "ln_f"]
    if not norms:
        stop(f"{lm.name}: the norm behind its layers has no name that is known; use another LM")
    norms[-1].register_forward_hook(keep)


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that transformers can compute again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def shard_layers(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model with torch's FSDP2 around each layer: a process keeps its part and fetches the rest
    while the layer computes. Adapters, which come later, and what is not in a layer (embeddings,
    head) stay whole on every process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        stop(
            "--shard divides the LM among processes, but there is one; "
            "start them with torchrun --nproc_per_node=N, or leave --shard out"
        )
    if not layers_of(model):
        stop(
            f"--shard: {type(model).__name__} has no layers that transformers can name; "
            "leave --shard out"
        )
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    if mesh.get_rank() == 0:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
        here, whole = (sum(p.numel() for p in ps) for ps in (local, model.parameters()))
        print(
            f"the LM's layers are divided among {mesh.size()} processes: "
            f"{here:,} of {whole:,} parameters on this one",
            flush=True,
        )
    return model


def computed_again(forward: Callable) -> Callable:
    """A layer's forward that keeps its input only, and is computed again in backward."""
    from torch.utils.checkpoint import checkpoint

    def run(*args, **kwargs):
        # the prefix keeps its keys and values, so it is not computed again
        keeps = any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if not torch.is_grad_enabled() or keeps:
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Gradient checkpointing: each layer keeps its input only and is computed again in backward;
    the same numbers for a third more time."""
    if not layers_of(model):
        stop(
            f"--gradient-checkpointing: {type(model).__name__} has no layers that transformers can "
            "checkpoint; lower --micro instead"
        )
    for layer in layers_of(model):
        layer.forward = computed_again(layer.forward)
