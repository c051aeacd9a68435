"""The soft prompt on disk: prompt_embeddings fp32 (k, D) in soft_prompt.safetensors."""

from pathlib import Path

import torch

from delrec.lm.text import tokens_width
from delrec.runtime import read_tensors, stop


def save_soft_prompt(folder, P_kD):
    """Writes P into a run folder."""
    from safetensors.torch import save_file

    P_kD = P_kD.detach().float().cpu().contiguous()
    save_file({"prompt_embeddings": P_kD}, folder / "soft_prompt.safetensors")


def load_soft_prompt(folder, lm) -> torch.Tensor:
    """P (k, D) of a run folder, on the LM's device; refused where it is not as wide as the LM."""
    tensors = read_tensors(Path(folder) / "soft_prompt.safetensors")
    if "prompt_embeddings" not in tensors or tensors["prompt_embeddings"].dim() != 2:
        stop(f"{folder}/soft_prompt.safetensors holds no matrix prompt_embeddings; distil it again")
    P_kD = tensors["prompt_embeddings"].to(lm.device)
    if P_kD.shape[1] != tokens_width(lm):
        stop(
            f"{folder} holds a soft prompt of width {P_kD.shape[1]}, {lm.name} is "
            f"{tokens_width(lm)} wide; distil it again with this LM"
        )
    return P_kD
