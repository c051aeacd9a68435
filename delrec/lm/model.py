"""The language model: an `LM` with all that reading it needs, loaded from an id, a folder or a
run.

Nothing that a folder brings is ever run: a model whose own code it would take is refused
(`trust_remote_code` is False everywhere).
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from delrec.lm import check, layers
from delrec.lm.text import encode
from delrec.runtime import CACHE, folder_of, load_run, stop

# libraries talking to each other
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
# of a reloaded AdaLoRA; a test shows that its scores are the saved ones
warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*")
# of a layer that AdaLoRA pruned to rank 0
warnings.filterwarnings("ignore", message="Adapter 'default'.*LoRA tensor.*invalid shape")

SENTINEL = "<extra_id_0>"  # the mask of the T5 family
LFS = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched
EMBEDDED = "smollm2-135m"


@dataclass
class LM:
    """A frozen language model and how it is read."""

    name: str  # as the user gave it
    folder: str  # where its files are, or its id
    kind: str  # decoder (Llama family), encoder-decoder (T5 family), encoder (BERT family)
    model: torch.nn.Module  # transformers' own, in eval mode, no parameter trains
    tok: Any  # transformers' tokenizer
    device: torch.device
    dtype: torch.dtype
    head_VD: torch.Tensor  # rows of the output layer, one a token
    bias_V: torch.Tensor | None  # its bias
    mask_id: int | None  # the token that stands for the mask; None for a decoder
    start: list  # special tokens in front of a text
    end: list  # special tokens behind it
    max_tokens: int  # of a prompt with a title
    special: set  # tokens that no title may become
    sharded: bool = False  # are its layers divided among processes?
    attends: bool = False  # does it attend by passes.attention?
    paths: list = field(default_factory=list)  # usable ways through a decoder, best first: check.py
    reach: float = float("inf")  # tokens up to which the first path is right; "rows" beyond
    scale: float = 1.0  # what the model multiplies its logits by after the head
    own_head: bool = False  # are logits asked of the model itself, because they are no product?
    sep: list = field(default_factory=list)  # tokens that end a title
    items: Any = None  # items as vectors: vectors.py
    adapter: Any = None  # of a run of finetune.py that was opened
    taps: tuple = ()  # layers whose states are kept: layers.tap
    tapped: list | None = None  # those states of the last pass

    @property
    def body(self):
        """The model without its head."""
        base = self.model.base_model
        return self.model.model if base is self.model else base  # Llama 4 names one it has not

    @property
    def decoder_start(self) -> int | None:
        """The token that an encoder-decoder's decoder begins with."""
        for config in (self.model.config, getattr(self.model, "generation_config", None)):
            if getattr(config, "decoder_start_token_id", None) is not None:
                return config.decoder_start_token_id
        return None

    @property
    def packs(self) -> bool:
        """True where rows of one pass stand one behind the other, without padding."""
        return "packed" in self.paths


# ---------------------------------------------------------------- loading


def kind_of(config) -> str:
    """decoder (Llama family), encoder-decoder (T5 family) or encoder (BERT family)."""
    from transformers.models.auto import modeling_auto as auto

    first = (getattr(config, "architectures", None) or [""])[0]
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if "MaskedLM" in first:
        return "encoder"
    if "CausalLM" in first or "LMHead" in first and "Masked" not in first:
        return "decoder"
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked else "decoder"


def text_config(config):
    """The part of a configuration that is about text (models that also see or hear nest it)."""
    if config.is_encoder_decoder:
        return config
    return config.get_text_config()


def load_lm(name, device, dtype=None, shard=False, checked=True) -> LM:
    """A frozen LM by Hugging Face id, folder, 'smollm2-135m' (embedded), or run of finetune.py.

    shard: each process keeps a part of the layers. checked: how it is read is chosen by comparing
    scores with the untouched model (check.py); False takes the fastest way on trust.
    """
    if (folder_of("runs", name) / "adapter").is_dir():
        return load_merged(name, device, dtype, shard, checked)
    folder = embedded() if name == EMBEDDED else name
    config, tok = config_and_tokenizer(name, folder)
    kind = kind_of(config)
    if dtype is None:
        fast = device.type == "cuda" or has_fast_bf16()
        dtype = torch.bfloat16 if fast else torch.float32
    model = weights(name, folder, kind, dtype)
    model = (layers.shard_layers(model, device) if shard else model).to(device)
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        stop(f"{name} ({type(model).__name__}) has no output layer with a row a token; use another")
    around = tok("a")["input_ids"]
    body = tok("a", add_special_tokens=False)["input_ids"]
    at = around.index(body[0])
    text = text_config(config)
    lm = LM(
        name=str(name),
        folder=str(folder),
        kind=kind,
        model=model,
        tok=tok,
        device=device,
        dtype=dtype,
        head_VD=head.weight,
        bias_V=getattr(head, "bias", None),
        mask_id=mask_of(name, kind, tok),
        start=around[:at],
        end=around[at + len(body) :],
        # RoBERTa's positions begin at 2
        max_tokens=min(getattr(text, "max_position_embeddings", None) or 1024, 4096) - 2,
        special=set(tok.all_special_ids) - {tok.unk_token_id},
        sharded=shard,
    )
    lm.sep = encode(lm, "\n" if kind == "decoder" else ";")
    if kind == "encoder-decoder" and lm.decoder_start is None:
        stop(f"{name} does not say which token its decoder begins with; use another LM")
    check.settle(lm, checked)
    return lm


def embedded() -> Path:
    """The folder of the embedded LM, made at the first call."""
    folder = CACHE / EMBEDDED
    if not (folder / "config.json").exists():
        from delrec.data.raw import fetch_llm

        folder = fetch_llm()
    return folder


def load_merged(name, device, dtype, shard, checked) -> LM:
    """The LM of a run of finetune.py (or distill.py --lr-lm), its adapter merged into it."""
    from peft import PeftModel

    run = load_run(name, stages=["distill", "finetune"])
    lm = load_lm(run.llm, device, dtype, shard, checked)
    adapter = run.folder / "adapter"
    if not (adapter / "adapter_model.safetensors").exists():
        stop(f"{adapter} lacks adapter_model.safetensors; train the run again")
    lm.model = PeftModel.from_pretrained(lm.model, adapter).merge_and_unload()
    lm.model.requires_grad_(False)
    lm.name = str(run.folder)
    return lm


def config_and_tokenizer(name, folder):
    """transformers' configuration and tokenizer of a folder or an id; what cannot be read is
    refused."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    refuse_pointers(name, folder)
    local = {"trust_remote_code": False, "local_files_only": Path(folder).is_dir()}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
    except Exception as bad:  # of whatever kind: the files are somebody else's
        about_own_code(name, folder, bad)
        stop(
            f"no language model '{name}': expected {EMBEDDED}, a folder with a Hugging Face model "
            "and its tokenizer, a run of finetune.py, or an id that can be downloaded "
            f"({first_line(bad)})"
        )
    try:
        tok = AutoTokenizer.from_pretrained(folder, **local)
        tok("a")
    except Exception as bad:
        about_own_code(name, folder, bad)
        stop(
            f"no language model '{name}': expected {EMBEDDED}, a folder with a Hugging Face model "
            "and its tokenizer, a run of finetune.py, or an id that can be downloaded "
            f"(its tokenizer: {first_line(bad)})"
        )
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "a method without a name")
        check.say(f"{name} was quantised by {method}: its scores are those of the coarser weights")
    if own_code(folder):
        check.say(
            f"{name} brings code of its own (auto_map), which is not run: transformers' own "
            f"{config.model_type} reads its weights"
        )
    return config, tok


def weights(name, folder, kind, dtype):
    """transformers' model with every weight from the files: one that misses some is refused."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    auto = {
        "encoder-decoder": AutoModelForSeq2SeqLM,
        "encoder": AutoModelForMaskedLM,
        "decoder": AutoModelForCausalLM,
    }[kind]
    local = {"trust_remote_code": False, "local_files_only": Path(folder).is_dir()}
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights is our sentence
    try:
        model, told = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **local)
    except Exception as bad:  # of whatever kind: the files are somebody else's
        about_own_code(name, folder, bad)
        stop(
            f"the weights of '{name}' could not be loaded ({first_line(bad)}); "
            "download or save them again, or install what they need"
        )
    finally:
        logging.set_verbosity(loud)
    missing = sorted(told["missing_keys"])
    unread = sorted(told["unexpected_keys"])
    if missing:
        stop(
            f"the files of '{name}' lack {len(missing)} weights of {type(model).__name__}, "
            f"{missing[0]} the first, and random numbers are no model; "
            "take a checkpoint that was saved with its language-model head, or download it again"
        )
    if unread and own_code(folder):
        stop(
            f"'{name}' brings code of its own, which is not run, and transformers' own "
            f"{type(model).__name__} does not know {len(unread)} of its weights "
            f"({unread[0]} the first); use an LM that transformers knows"
        )
    return model.eval().requires_grad_(False)


def first_line(bad, most=150):
    """The first line of an exception's words."""
    return f"{type(bad).__name__}: {(str(bad).strip().splitlines() or ['no message'])[0][:most]}"


def refuse_pointers(name, folder):
    """Stops at a file that git-lfs has not fetched: a pointer of three lines instead of the
    thing."""
    if not Path(folder).is_dir():
        return
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(LFS):
            stop(
                f"{path} is a pointer that git-lfs left, not the file itself; run git lfs pull "
                f"in the repository that '{name}' comes from, or download the file"
            )


def own_code(folder) -> bool:
    """True where a configuration names code of the folder (auto_map)."""
    for name in ("config.json", "tokenizer_config.json"):
        try:
            told = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and told.get("auto_map"):
            return True
    return False


def about_own_code(name, folder, bad):
    """Stops with the reason where a model cannot be read because it needs code of its folder."""
    if own_code(folder) or "trust_remote_code" in str(bad):
        stop(
            f"'{name}' needs code of its own (auto_map in its configuration), and nothing that an "
            "LM's folder brings is run here; use an LM that transformers knows by itself"
        )


def mask_of(name, kind, tok):
    """The token that stands for the mask in an encoder's text; None for a decoder."""
    mask = {"encoder-decoder": SENTINEL, "encoder": tok.mask_token, "decoder": None}[kind]
    mask_id = tok.convert_tokens_to_ids(mask) if mask else None
    if kind != "decoder" and (mask_id is None or mask_id == tok.unk_token_id):
        stop(
            f"{name} is an {kind} LM but its tokenizer has no mask token ({mask or 'mask_token'}); "
            "a title cannot be read from it"
        )
    return mask_id


def has_fast_bf16() -> bool:
    """True on CPUs that multiply bf16 in hardware; elsewhere it is emulated, slower than fp32."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
