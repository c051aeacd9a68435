"""transformers' own model, configuration and tokenizer of a folder or an id; what is not whole, or
would need code of its own, is refused.

Nothing that a folder brings is ever run: a model whose own code it would take is refused
(`trust_remote_code` is False everywhere).
"""

import contextlib
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from delrec.lm import check
from delrec.runtime import first_line, is_folder, stop

EMBEDDED = "smollm2-135m"
LFS = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched
BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
RANDOM = re.compile(r"random(?:-(\d+))?:(.+)")  # random:NAME (seed 0), random-3:NAME


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What libraries say to their own developers (deprecated names of other people's files, hints)
    is not printed above an answer; what is wrong becomes a sentence of ours."""
    from transformers.utils import logging

    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", kind)
            yield
    finally:
        logging.set_verbosity(loud)


# ---------------------------------------------------------------- configuration and tokenizer


def kind_of(config: Any) -> str:
    """decoder (Llama family), encoder-decoder (T5 family) or encoder (BERT family)."""
    from transformers.models.auto import modeling_auto as auto

    first = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if "MaskedLM" in first:
        return "encoder"
    if "CausalLM" in first:
        return "decoder"
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked and not getattr(config, "is_decoder", False) else "decoder"


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text (models that also see or hear nest it)."""
    if config.is_encoder_decoder:
        return config
    return config.get_text_config()


def config_and_tokenizer(name: Path | str, folder: Path | str) -> tuple[Any, Any]:
    """transformers' configuration and tokenizer of a folder or an id; what cannot be read is
    refused."""
    from transformers import AutoTokenizer

    config = config_of(name, folder)
    try:
        with quietly():
            tok = AutoTokenizer.from_pretrained(folder, **without_code(folder))
            tok("a")
    except Exception as bad:  # of whatever kind: the files are somebody else's
        unknown(name, config, bad, "its tokenizer: ")
    code = brings_code(config) or tok.init_kwargs.get("auto_map")
    if code:
        check.say(
            f"{name} brings code of its own (auto_map), which is not run: transformers' own "
            f"{config.model_type} reads its weights"
        )
    return config, tok


def config_of(name: Path | str, folder: Path | str | None = None) -> Any:
    """transformers' configuration of a folder or an id, which names no code to be run."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = name if folder is None else folder
    refuse_pointers(name, folder)
    if is_folder(folder) and (Path(folder) / "adapter_config.json").is_file():
        stop(
            f"{folder} holds an adapter of peft that is not merged into its model; merge it "
            "(merge_and_unload), save the model, and give that folder"
        )
    try:
        with quietly():
            config = AutoConfig.from_pretrained(folder, **without_code(folder))
    except Exception as bad:  # of whatever kind: the files are somebody else's
        unknown(name, None, bad)
    refuse_fetched_code(name, config)
    return config


def without_code(folder: Path | str) -> dict[str, bool]:
    """How transformers is asked: no code of the folder, and no network for what is here."""
    return {"trust_remote_code": False, "local_files_only": is_folder(folder)}


def unknown(name: Path | str, config: Any, bad: Exception, where: str = "") -> NoReturn:
    """Stops: there is no such LM, or it is none, or it needs code of its own."""
    if brings_code(config) or "trust_remote_code" in str(bad) or "auto_map" in str(bad):
        stop(
            f"'{name}' needs code of its own (auto_map in its configuration), and nothing that an "
            "LM's folder brings is run here; use an LM that transformers knows by itself"
        )
    stop(
        f"no language model '{name}': expected {EMBEDDED}, a folder with a Hugging Face model and "
        "its tokenizer, a run of finetune.py, or an id that can be downloaded; random: in front of "
        "any but a run draws its weights anew "
        f"({where}{first_line(bad)})"
    )


def brings_code(config: Any) -> bool:
    """True where a configuration names code of its folder (auto_map)."""
    return bool(getattr(config, "auto_map", None))


def refuse_fetched_code(name: Path | str, config: Any) -> None:
    """Stops at a configuration that names a kernel of the hub: code that would be fetched and
    run."""
    parts = [config, *(getattr(config, part, None) for part in getattr(config, "sub_configs", ()))]
    for part in parts:
        for key in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, key, None)
            if isinstance(value, str) and ("/" in value or ":" in value):
                stop(
                    f"the configuration of '{name}' asks for the kernel {value!r}, which would be "
                    f"fetched and run; take {key.removeprefix('_')} out of its config.json"
                )


def refuse_pointers(name: Path | str, folder: Path | str) -> None:
    """Stops at a file that git-lfs has not fetched: a pointer of three lines instead of the
    thing."""
    if not is_folder(folder):
        return
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            stop(
                f"{path} is a pointer that git-lfs left, not the file itself; run git lfs pull "
                f"in the repository that '{name}' comes from, or download the file"
            )


# ---------------------------------------------------------------- weights


def weights(
    name: Path | str, folder: Path | str, kind: str, config: Any, dtype: torch.dtype
) -> torch.nn.Module:
    """transformers' model with every weight from the files: one that misses some, or has more than
    the model reads in its layers, is refused."""
    try:
        with quietly():  # transformers' table of missing weights is our sentence
            model, told = class_of(kind).from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused below
                **without_code(folder),
            )
    except Exception as bad:  # of whatever kind: the files are somebody else's
        if brings_code(config) and "trust_remote_code" in str(bad):
            unknown(name, config, bad)
        stop(
            f"the weights of '{name}' could not be loaded ({first_line(bad)}); "
            "download or save them again, or install what they need"
        )
    must_be_whole(name, config, model, told)
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "a method without a name")
        check.say(f"{name} was quantised by {method}: its scores are those of the coarser weights")
    return model.eval().requires_grad_(False)


def class_of(kind: str) -> Any:
    """transformers' class that reads the weights of a kind of LM."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    return {
        "encoder-decoder": AutoModelForSeq2SeqLM,
        "encoder": AutoModelForMaskedLM,
        "decoder": AutoModelForCausalLM,
    }[kind]


def numbers_of(name: Path | str, folder: Path | str) -> int:
    """How many parameters an LM has, by its configuration; no weight is read."""
    config = config_of(name, folder)
    with quietly(), torch.device("meta"):
        model = class_of(kind_of(config)).from_config(config)
    return sum(p.numel() for p in model.parameters())


def must_be_whole(name: Path | str, config: Any, model: torch.nn.Module, told: dict) -> None:
    """Stops where files and model do not hold the same weights: what a model has and its files have
    not would be random, what its layers do not read would be left out of every score."""
    kind = type(model).__name__
    mismatched, missing = sorted(told["mismatched_keys"]), sorted(told["missing_keys"])
    if mismatched:
        key, stored, wanted = mismatched[0]
        stop(
            f"'{name}': {key} has the shape {tuple(stored)} in the files and {tuple(wanted)} by "
            f"config.json ({len(mismatched)} weights differ so); these files belong to different "
            "models, download or save them again"
        )
    if missing:
        stop(
            f"the files of '{name}' lack {len(missing)} weights of {kind}, {missing[0]} the first, "
            "and random numbers are no model; take a checkpoint that was saved with its "
            "language-model head, or download it again"
        )
    unread = sorted(told["unexpected_keys"])
    if not unread:
        return
    lost = [key for key in unread if of_a_layer(model, key)]
    if lost or brings_code(config):
        stop(
            f"transformers' own {kind} does not read {len(unread)} of the weights of '{name}', "
            f"{(lost or unread)[0]} the first, so its scores would not be those of this model; "
            "its config.json belongs to another one, or it needs code of its own"
        )
    check.say(f"{name}: {len(unread)} weights are not part of {kind} ({unread[0]} the first)")


def of_a_layer(model: torch.nn.Module, key: str) -> bool:
    """True for a weight in the files that would belong to one of the model's layers."""
    found = re.match(r"(.+?)\.\d+\.", key)
    if not found or BUFFERS.search(key):
        return False
    lists = {n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    prefix = model.base_model_prefix
    return bool({found[1], f"{prefix}.{found[1]}", found[1].removeprefix(f"{prefix}.")} & lists)


# ---------------------------------------------------------------- random weights (a control)


def seed_and_name(name: Path | str) -> tuple[int | None, Path | str]:
    """(seed, NAME) of random:NAME and random-SEED:NAME, the LM NAME with random weights; (None,
    name) of every other name."""
    found = RANDOM.fullmatch(str(name))
    return (int(found[1] or 0), found[2]) if found else (None, name)


@torch.no_grad()
def randomise(name: Path | str, model: torch.nn.Module, seed: int) -> None:
    """Draws all weights anew but those of norms: normal numbers with the mean and the standard
    deviation that each tensor has now, so that the states keep a sane scale.

    Each tensor has a generator of its own, by its name, and its deviation is that of its values in
    bf16, summed in fp64: the same LM in every dtype and on every machine.
    """
    if getattr(model.config, "quantization_config", None):
        stop(f"'{name}' is quantised, so its weights cannot be drawn; take one that is not")
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
    kept = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    for key, p in model.named_parameters():
        if id(p) in kept:
            continue
        std, mean = torch.std_mean(p.bfloat16().double(), correction=0)
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        drawn = torch.from_numpy(rng.standard_normal(p.numel(), np.float32)).view(p.shape)
        p.copy_(drawn * std.float() + mean.float())
