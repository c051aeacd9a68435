"""The language model: an `LM` with all that reading it needs, loaded from an id, a folder or a
run.

Nothing that a folder brings is ever run: a model whose own code it would take is refused
(`trust_remote_code` is False everywhere).
"""

import hashlib
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from delrec.lm import check, layers
from delrec.lm.text import encode, fingerprint
from delrec.runtime import CACHE, first_line, folder_of, is_folder, is_run, load_run, stop

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
    identity: str = ""  # 16 hex digits: weights, tokenizer, and the adapter merged into it
    sharded: bool = False  # are its layers divided among processes?
    attends: bool = False  # does it attend by passes.attention?
    paths: list = field(default_factory=list)  # usable ways through a decoder, best first: check.py
    reach: float = float("inf")  # tokens up to which the first path is right; "rows" beyond
    window: int | None = None  # tokens behind which a layer sees less, or turns in another way
    factor: float = 1.0  # of a token's vector, which the model applies to tokens but not to vectors
    scale: float = 1.0  # what the model multiplies its logits by after the head
    own_head: bool = False  # are logits asked of the model itself, because they are no product?
    sep: list = field(default_factory=list)  # tokens that end a title
    items: Any = None  # items as vectors: items.py
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
    if "CausalLM" in first:
        return "decoder"
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "encoder" if masked and not getattr(config, "is_decoder", False) else "decoder"


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
    if is_lm_run(name):
        return load_merged(name, device, dtype, shard, checked)
    folder = embedded() if name == EMBEDDED else name
    config, tok = config_and_tokenizer(name, folder)
    kind = kind_of(config)
    asked = dtype
    if dtype is None:
        fast = device.type == "cuda" or has_fast_bf16()
        dtype = torch.bfloat16 if fast else torch.float32
    model = weights(name, folder, kind, config, dtype)
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
        max_tokens=min(positions_of(text), 4096) - 2,  # RoBERTa's begin at 2
        special=set(tok.all_special_ids) - {tok.unk_token_id},
        sharded=shard,
    )
    lm.identity = fingerprint(lm)
    lm.sep = encode(lm, "\n" if kind == "decoder" else ";")
    if kind == "encoder-decoder" and lm.decoder_start is None:
        stop(f"{name} does not say which token its decoder begins with; use another LM")
    try:
        check.settle(lm, checked)
    except check.HalfFails as bad:
        if asked is not None:
            stop(f"{name} cannot be read in {dtype} ({bad}); use another LM")
        check.say(f"{name} computes in fp32: in {dtype} the model itself fails ({bad})")
        return load_lm(name, device, torch.float32, shard, checked)
    return lm


def located(name) -> str:
    """The name under which an LM is stored in a run: a folder's is its whole path, so that it means
    the same from everywhere."""
    return str(Path(name).resolve()) if is_folder(name) else name


def is_lm_run(name) -> bool:
    """True for a run of these scripts that holds an adapter."""
    folder = folder_of("runs", name)
    return is_folder(folder / "adapter") and is_run(folder)


def positions_of(text) -> int:
    """How many tokens an LM has positions for."""
    for name in ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "seq_length"):
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > 0:
            return getattr(text, name)
    return 1024


def embedded() -> Path:
    """The folder of the embedded LM, made at the first call."""
    folder = CACHE / EMBEDDED
    if not (folder / "config.json").exists():
        from delrec.data.fetch import fetch_llm

        folder = fetch_llm()
    return folder


def load_merged(name, device, dtype, shard, checked) -> LM:
    """The LM of a run of finetune.py (or distill.py --lr-lm), its adapter merged into it."""
    run = load_run(name, stages=["distill", "finetune"])
    lm = load_lm(run.llm, device, dtype, shard, checked)
    must_be_of(lm, run)
    lm.model = adapted(lm, run).merge_and_unload()
    lm.model.requires_grad_(False)
    lm.name = str(run.folder)
    weights = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    lm.identity = hashlib.sha256(lm.identity.encode() + weights).hexdigest()[:16]
    return lm


def adapted(lm, run):
    """peft's model: the LM with a run's adapter around its layers, not merged."""
    from peft import PeftModel

    adapter = run.folder / "adapter"
    if not (adapter / "adapter_model.safetensors").exists():
        stop(f"{adapter} lacks adapter_model.safetensors; train the run again")
    try:
        return PeftModel.from_pretrained(lm.model, adapter)
    except Exception as bad:  # of whatever kind: peft's own and torch's
        stop(
            f"the adapter of {run.folder} does not fit {run.llm} ({first_line(bad)}): that is not "
            "the LM it was trained on; bring that one back, or train again"
        )


def must_be_of(lm, run):
    """Stops where a run was trained on another LM than the one that is loaded now."""
    trained = getattr(run, "llm_fingerprint", None)
    if trained and trained != lm.identity:
        stop(
            f"{run.folder} was trained on another LM than the one in {run.llm} now "
            f"(its fingerprint was {trained}, now it is {lm.identity}); bring that one back, or "
            "train again"
        )


def config_and_tokenizer(name, folder):
    """transformers' configuration and tokenizer of a folder or an id; what cannot be read is
    refused."""
    from transformers import AutoTokenizer

    config = config_of(name, folder)
    try:
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


def config_of(name, folder=None):
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
        config = AutoConfig.from_pretrained(folder, **without_code(folder))
    except Exception as bad:  # of whatever kind: the files are somebody else's
        unknown(name, None, bad)
    refuse_fetched_code(name, config)
    return config


def without_code(folder) -> dict:
    """How transformers is asked: no code of the folder, and no network for what is here."""
    return {"trust_remote_code": False, "local_files_only": is_folder(folder)}


def unknown(name, config, bad, where=""):
    """Stops: there is no such LM, or it is none, or it needs code of its own."""
    if brings_code(config) or "trust_remote_code" in str(bad) or "auto_map" in str(bad):
        stop(
            f"'{name}' needs code of its own (auto_map in its configuration), and nothing that an "
            "LM's folder brings is run here; use an LM that transformers knows by itself"
        )
    stop(
        f"no language model '{name}': expected {EMBEDDED}, a folder with a Hugging Face model and "
        "its tokenizer, a run of finetune.py, or an id that can be downloaded "
        f"({where}{first_line(bad)})"
    )


def brings_code(config) -> bool:
    """True where a configuration names code of its folder (auto_map)."""
    return bool(getattr(config, "auto_map", None))


def refuse_fetched_code(name, config):
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


def weights(name, folder, kind, config, dtype):
    """transformers' model with every weight from the files: one that misses some, or has more than
    the model reads in its layers, is refused."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    auto = {
        "encoder-decoder": AutoModelForSeq2SeqLM,
        "encoder": AutoModelForMaskedLM,
        "decoder": AutoModelForCausalLM,
    }[kind]
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # its table of missing weights is our sentence
    try:
        model, told = auto.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told, and refused below
            **without_code(folder),
        )
    except Exception as bad:  # of whatever kind: the files are somebody else's
        if brings_code(config) and "trust_remote_code" in str(bad):
            unknown(name, config, bad)
        stop(
            f"the weights of '{name}' could not be loaded ({first_line(bad)}); "
            "download or save them again, or install what they need"
        )
    finally:
        logging.set_verbosity(loud)
    must_be_whole(name, config, model, told)
    if quantised := getattr(config, "quantization_config", None):
        method = dict(quantised).get("quant_method", "a method without a name")
        check.say(f"{name} was quantised by {method}: its scores are those of the coarser weights")
    return model.eval().requires_grad_(False)


def must_be_whole(name, config, model, told):
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


BUFFERS = re.compile(r"(inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")


def of_a_layer(model, key) -> bool:
    """True for a weight in the files that would belong to one of the model's layers."""
    found = re.match(r"(.+?)\.\d+\.", key)
    if not found or BUFFERS.search(key):
        return False
    lists = {n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    prefix = model.base_model_prefix
    return bool({found[1], f"{prefix}.{found[1]}", found[1].removeprefix(f"{prefix}.")} & lists)


def refuse_pointers(name, folder):
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


def mask_of(name, kind, tok):
    """The token that stands for the mask in an encoder's text; None for a decoder."""
    mask = {"encoder-decoder": SENTINEL, "encoder": tok.mask_token, "decoder": None}[kind]
    if kind == "encoder-decoder" and f"\u2581{SENTINEL}" in tok.get_vocab():
        mask = f"\u2581{SENTINEL}"  # as mT5 spells it
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
