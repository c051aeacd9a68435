"""The soft prompt: on disk, as prompt_embeddings fp32 (k, D) in soft_prompt.safetensors; and which
one a run of finetune.py begins with.
"""

from pathlib import Path
from types import SimpleNamespace

import torch

from delrec.data.prepared import Data
from delrec.lm.listed import backbone_of
from delrec.lm.model import LM, located
from delrec.lm.pretrained import EMBEDDED
from delrec.lm.prompts import DEFAULTS, lists_candidates, must_have_words, settings_of_run
from delrec.lm.text import random_soft_prompt, tokens_width
from delrec.lm.wording import must_have_pattern
from delrec.no_run import must_open
from delrec.processes import Ranks
from delrec.runtime import (
    Run,
    complete_renames,
    folder_of,
    is_another_meant,
    load_run,
    read_tensors,
    stop,
    usual_run,
    write_tensors,
)

WITHOUT_A_RUN = ("none", "random", "words")
# of what shapes a prompt: what stage 1 never has
OF_STAGE_2 = ("summary", "permute_vectors", "hint", "orders")


def save_soft_prompt(folder: Path, P_kD: torch.Tensor) -> None:
    """Writes P into a run folder."""
    P_kD = P_kD.detach().float().cpu().contiguous()
    write_tensors(folder / "soft_prompt.safetensors", {"prompt_embeddings": P_kD})


def load_soft_prompt(folder: Path | str, lm: LM) -> torch.Tensor:
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


# ---------------------------------------------------------------- which one a run begins with


def faults(cfg: SimpleNamespace) -> list[tuple]:
    """What cannot be meant in stage 2: [(is it so?, sentence)]."""
    return [
        (
            cfg.lr_prompt and cfg.soft_prompt in ("none", "words"),
            f"--lr-prompt {cfg.lr_prompt} trains the soft prompt, but --soft-prompt is "
            f"{cfg.soft_prompt}; name one, or leave --lr-prompt out",
        )
    ]


def prompt_run_of(cfg: SimpleNamespace, data: Data) -> Run | None:
    """The run whose soft prompt --soft-prompt names, or None for 'none', 'random' and 'words'."""
    if cfg.soft_prompt in WITHOUT_A_RUN:
        if cfg.soft_prompt == "words":
            must_have_pattern(backbone_of(cfg.backbone, data)[0])
        return None
    named = cfg.soft_prompt
    folder = folder_of("runs", named) if named else usual_run(data, "prompt")
    complete_renames(folder, "config.json")
    if not (folder / "config.json").exists():
        other = is_another_meant(cfg.soft_prompt) if cfg.soft_prompt else ""
        stop(
            f"no soft prompt in {folder}{other}; make it with: {distilled_by(cfg)}  "
            "(or pass --soft-prompt none)"
        )
    run = load_run(folder, data, stages=["distill", "finetune"])
    must_open(run)
    must_have_words(run, data)
    must_fit(run, cfg)
    return run


def distilled_by(cfg: SimpleNamespace) -> str:
    """The command of stage 1 that makes the soft prompt a run of stage 2 asks for: for the same
    items, LM and backbone, in the folder where it is looked for."""
    flags = [
        ("--dataset", cfg.dataset),
        ("--input", "ids" if cfg.input == "ids" else None),
        ("--llm", cfg.llm if cfg.llm != EMBEDDED else None),
        ("--backbone", cfg.backbone),
        ("--out", cfg.soft_prompt),
    ]
    return " ".join(["python distill.py", *(f"{flag} {value}" for flag, value in flags if value)])


def must_fit(run: Run, cfg: SimpleNamespace) -> None:
    """Stops if a soft prompt was distilled for other inputs or from another backbone than --input
    and --backbone say."""
    if cfg.input == "titles" and settings_of_run(run)["input"] == "ids":
        stop(
            f"{run.folder} was distilled on item vectors, --input is titles; name one that was "
            "distilled on titles, or use --input ids"
        )
    named = cfg.backbone and folder_of("runs", cfg.backbone).resolve()
    if named and named != folder_of("runs", run.backbone_run).resolve():
        stop(
            f"{run.folder} was distilled from {run.backbone_run}, --backbone is {cfg.backbone}; "
            "leave --backbone out, or distil from it"
        )


def lm_of(cfg: SimpleNamespace, run: Run | None) -> str:
    """The LM to load: --llm, or the one that stage 1 moved together with its soft prompt (DELRec's
    variant w UDPSM). Stops if the soft prompt was distilled for another one."""
    if not run or run.stage != "distill":
        return cfg.llm
    own = located(run.llm)
    if cfg.llm not in (own, str(run.folder.resolve())):
        stop(
            f"{run.folder} was distilled for {run.llm}, --llm is {cfg.llm}; distil it again with "
            "this LM"
        )
    return str(run.folder) if getattr(run, "lr_lm", 0) and cfg.llm == own else cfg.llm


def say_if_of_another_format(run: Run, cfg: SimpleNamespace, ranks: Ranks) -> None:
    """Prints one line if a soft prompt was distilled in prompts of another format than stage 2's:
    it may be used all the same, but was not made for them."""
    made = settings_of_run(run)
    listed = lists_candidates(made) or lists_candidates(vars(cfg))
    others = [
        f"--{key.replace('_', '-')} was {made[key]}, is {getattr(cfg, key)}"
        for key in DEFAULTS
        if made[key] != getattr(cfg, key) and key not in OF_STAGE_2 and (listed or key != "order")
    ]
    if others and ranks.main:
        about = f"note: {run.folder} was distilled in prompts of another format"
        print(f"{about}: {', '.join(others)}", flush=True)


def first_soft_prompt(cfg: SimpleNamespace, run: Run | None, lm: LM) -> torch.Tensor | None:
    """P (k, D) that stage 2 begins with: of a run, random, or none. A run gone on from may have
    none."""
    if run and cfg.soft_prompt not in ("none", "words"):
        return load_soft_prompt(run.folder, lm)
    return random_soft_prompt(lm, cfg.k, cfg.seed) if cfg.soft_prompt == "random" else None
