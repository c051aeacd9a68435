"""The language model: an `LM` with all that reading it needs, loaded from an id, a folder or a
run.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from delrec.kernels import cpu
from delrec.lm import check, layers
from delrec.lm.pretrained import (
    EMBEDDED,
    config_and_tokenizer,
    kind_of,
    randomise,
    seed_and_name,
    text_config,
    weights,
)
from delrec.lm.probes import HalfFails
from delrec.lm.reading import reader_of
from delrec.lm.text import encode, fingerprint
from delrec.runtime import (
    CACHE,
    Run,
    first_line,
    folder_of,
    is_folder,
    is_run,
    load_run,
    read_tensors,
    stop,
)

if TYPE_CHECKING:
    from delrec.lm.items import Items
    from delrec.lm.offsets import Offset
    from delrec.lm.written import Author

# libraries talking to each other
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
# of a reloaded AdaLoRA; a test shows that its scores are the saved ones
warnings.filterwarnings("ignore", message=".*rank_pattern keys did not match.*")
# of a layer that AdaLoRA pruned to rank 0
warnings.filterwarnings("ignore", message="Adapter 'default'.*LoRA tensor.*invalid shape")

SENTINEL = "<extra_id_0>"  # the mask of the T5 family
WAY = "the way the LM is read (--check-llm)"  # in what a checkpoint was made with
LONGEST = 4096  # tokens of a prompt, whatever the LM has positions for


@dataclass
class LM:
    """A frozen language model and how it is read. Only its own methods write into it."""

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
    start: list[int]  # special tokens in front of a text
    end: list[int]  # special tokens behind it
    max_tokens: int  # of a prompt with a title
    special: set[int]  # tokens that no title may become
    sep: list[int] = field(default_factory=list)  # tokens that end a title
    identity: str = ""  # 16 hex digits: weights, tokenizer, and the adapter merged into it
    sharded: bool = False  # are its layers divided among processes?
    reader: Callable = field(init=False, repr=False)  # what reads its kind: reading.py
    # how it is read right: measured at load (check.py), set by read_as
    attends: bool = False  # does it attend by passes.attention?
    paths: list[str] = field(default_factory=list)  # usable ways through a decoder, best first
    reach: float = float("inf")  # tokens up to which the first path is right; "rows" beyond
    window: int | None = None  # tokens behind which a layer sees less, or turns in another way
    factor: float = 1.0  # of a token's vector, which the model applies to tokens but not to vectors
    scale: float = 1.0  # what the model multiplies its logits by after the head
    own_head: bool = False  # are logits asked of the model itself, because they are no product?
    # what a run adds
    items: Any = None  # items as vectors (items.py): set_items
    offset: Any = None  # what the scores of titles are added to (offsets.py): set_offset
    adapter: Any = None  # of a run of finetune.py that was opened: set_adapter
    author: Any = None  # who writes the summaries of its prompts (written.py): set_author
    taps: frozenset[int] = frozenset()  # layers whose states every pass keeps: tap
    tapped: list[torch.Tensor] | None = None  # those states of the last pass, and the last layer's

    def __post_init__(self):
        self.reader = reader_of(self.kind)

    @property
    def body(self) -> torch.nn.Module:
        """The model without its head; with it where that stands among the layers (T5)."""
        base = self.model.base_model
        if base is self.model:  # Llama 4 names one it lacks
            return getattr(self.model, "model", self.model)
        return base

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

    @property
    def way(self) -> str:
        """How it is read, in words: another way may give other scores. The fastest passes that can
        train have that name on every device; fused ones, which cannot, are left out."""
        path = next((path for path in self.paths if path != "fused"), "whole prompts")
        fastest = "packed" if self.device.type == "cpu" and self.attends else "padded"
        parts = ["the fastest" if path == fastest else path]
        parts += ["our attention"] if self.attends else []
        parts += [f"{self.reach} tokens"] if self.reach < float("inf") else []
        parts += [f"tokens times {self.factor:.3g}"] if self.factor != 1 else []
        parts += [f"logits times {self.scale:.3g}"] if self.scale != 1 else []
        return ", ".join([*parts, "its own head"] if self.own_head else parts)

    def read_as(self, found: check.Found) -> None:
        """From now on the LM is read as the check found it right."""
        self.attends = found.attends
        self.paths = list(found.paths)
        self.reach = found.reach
        self.window = found.window
        self.factor = found.factor
        self.scale = found.scale
        self.own_head = found.own_head

    def set_items(self, items: Items) -> None:
        """Gives the LM items as vectors."""
        self.items = items

    def set_offset(self, offset: Offset | None) -> None:
        """Gives the LM what the scores of its titles are added to."""
        self.offset = offset

    def set_adapter(self, adapter: torch.nn.Module) -> None:
        """Gives the LM the adapter that is around its layers."""
        self.adapter = adapter

    def set_author(self, author: Author | None) -> None:
        """Gives the LM the one who writes the summaries that its prompts tell."""
        self.author = author

    # what layers.tap and the passes do with states of inner layers

    def tap(self, layers: Iterable[int]) -> None:
        """From now on every pass keeps the states after these layers in `tapped`."""
        self.taps = frozenset(layers)
        self.tapped = []

    def forget_tapped(self) -> None:
        """Before a pass: the states of the one before are no more."""
        self.keep_tapped([])

    def add_tapped(self, x: torch.Tensor) -> None:
        """During a pass: the states after one more of the layers."""
        self.tapped.append(x)

    def keep_tapped(self, states: list[torch.Tensor]) -> None:
        """After a pass: what of the layers' states stays; nothing where no layer is tapped."""
        if self.tapped is not None:
            self.tapped = states


# ---------------------------------------------------------------- loading


def load_lm(
    name: Path | str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    shard: bool = False,
    checked: bool = True,
) -> LM:
    """A frozen LM by Hugging Face id, folder, 'smollm2-135m' (embedded), or run of finetune.py;
    random:NAME is the LM NAME with random weights (pretrained.randomise).

    shard: each process keeps a part of the layers. checked: how it is read is chosen by comparing
    scores with the untouched model (check.py); False takes the fastest way on trust.
    """
    if is_lm_run(name):
        return load_merged(name, device, dtype, shard, checked)
    lm = load_unread(name, device, dtype or best_dtype(device), shard)
    try:
        lm.read_as(check.find(lm, checked))
    except HalfFails as bad:
        if dtype is not None:
            stop(f"{name} cannot be read in {dtype} ({bad}); use another LM")
        check.say(f"{name} computes in fp32: in {lm.dtype} the model itself fails ({bad})")
        return load_lm(name, device, torch.float32, shard, checked)
    return lm


def load_unread(name: Path | str, device: torch.device, dtype: torch.dtype, shard: bool) -> LM:
    """A frozen LM; how it is read right is not known yet."""
    seed, plain = seed_and_name(name)
    folder = embedded() if plain == EMBEDDED else plain
    config, tok = config_and_tokenizer(name, folder)
    kind = kind_of(config)
    model = weights(name, folder, kind, config, dtype)
    if seed is not None:
        randomise(name, model, seed)
    model = (layers.shard_layers(model, device) if shard else model).to(device)
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        stop(f"{name} ({type(model).__name__}) has no output layer with a row a token; use another")
    start, end = specials_around(tok)
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
        start=start,
        end=end,
        # RoBERTa's positions begin at 2
        max_tokens=min(positions_of(text_config(config)), LONGEST) - 2,
        special=set(tok.all_special_ids) - {tok.unk_token_id},
        sharded=shard,
    )
    lm.identity = fingerprint(lm)
    lm.sep = separator_of(lm)
    if kind == "encoder-decoder" and lm.decoder_start is None:
        stop(f"{name} does not say which token its decoder begins with; use another LM")
    return lm


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where it is computed in hardware, else fp32."""
    fast = device.type == "cuda" or cpu.has_fast_bf16()
    return torch.bfloat16 if fast else torch.float32


def specials_around(tok: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts in front of a text and behind it."""
    around = tok("a")["input_ids"]
    text = tok("a", add_special_tokens=False)["input_ids"]
    at = around.index(text[0])
    return around[:at], around[at + len(text) :]


def located(name: Path | str) -> str:
    """The name under which an LM is stored in a run: a folder's, and a run's, is its whole path, so
    that it means the same from everywhere."""
    seed, plain = seed_and_name(name)
    folder = folder_of("runs", plain) if is_lm_run(plain) else Path(plain)
    place = str(folder.resolve()) if is_folder(folder) else plain
    return place if seed is None else f"random{f'-{seed}' if seed else ''}:{place}"


def is_lm_run(name: Path | str) -> bool:
    """True for a run of these scripts that holds an adapter."""
    folder = folder_of("runs", name)
    return is_folder(folder / "adapter") and is_run(folder)


def positions_of(text: Any) -> int:
    """How many tokens an LM has positions for; LONGEST where T5's relative ones never end."""
    # n_positions of a T5 is the length it was trained at, not a limit
    relative = hasattr(text, "relative_attention_num_buckets")
    limits = () if relative else ("n_positions", "n_ctx", "seq_length")
    for name in ("max_position_embeddings", "max_seq_len", *limits):
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > 0:
            return getattr(text, name)
    return LONGEST if relative else 1024


def embedded() -> Path:
    """The folder of the embedded LM, made at the first call."""
    folder = CACHE / EMBEDDED
    if not (folder / "config.json").exists():
        from delrec.data.fetch import fetch_llm

        folder = fetch_llm()
    return folder


def load_merged(
    name: Path | str, device: torch.device, dtype: torch.dtype | None, shard: bool, checked: bool
) -> LM:
    """The LM of a run of finetune.py (or distill.py --lr-lm), its adapter merged into it."""
    run = load_run(name, stages=["distill", "finetune"])
    lm = load_lm(run.llm, device, dtype, shard, checked)
    must_be_of(lm, run)
    lm.model = adapted(lm, run).merge_and_unload()
    lm.model.requires_grad_(False)
    lm.name = str(run.folder)
    adapter = (run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
    lm.identity = hashlib.sha256(lm.identity.encode() + adapter).hexdigest()[:16]
    return lm


def adapted(lm: LM, run: Run, dropout: float | None = None) -> torch.nn.Module:
    """peft's model: the LM with a run's adapter around its layers, not merged. With a dropout the
    adapter trains on."""
    from peft import PeftConfig, PeftModel

    adapter = run.folder / "adapter"
    saved = adapter / "adapter_model.safetensors"
    if not saved.exists():
        stop(f"{adapter} lacks adapter_model.safetensors; train the run again")
    try:
        config, trains = PeftConfig.from_pretrained(adapter), dropout is not None
        if trains:
            config.lora_dropout = dropout
        model = PeftModel.from_pretrained(lm.model, adapter, is_trainable=trains, config=config)
        set_exactly(model, read_tensors(saved))
        return model
    except Exception as bad:  # of whatever kind: peft's own and torch's
        stop(
            f"the adapter of {run.folder} does not fit {run.llm} ({first_line(bad)}): that is not "
            "the LM it was trained on; bring that one back, or train again"
        )


@torch.no_grad()
def set_exactly(adapter: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Gives the weights of an adapter the values that were saved. peft makes those of pruned ranks
    anew in the dtype of the LM, so that they came rounded to bf16."""
    for name, p in adapter.named_parameters():
        if (own := saved.get(name.replace(".default", ""))) is not None:
            p.copy_(own)


def must_be_of(lm: LM, run: Run) -> None:
    """Stops where a run was trained on another LM than the one that is loaded now."""
    trained = getattr(run, "llm_fingerprint", None)
    if trained and trained != lm.identity:
        stop(
            f"{run.folder} was trained on another LM than the one in {run.llm} now "
            f"(its fingerprint was {trained}, now it is {lm.identity}); bring that one back, or "
            "train again"
        )


def mask_of(name: Path | str, kind: str, tok: Any) -> int | None:
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


def separator_of(lm: LM) -> list[int]:
    """The tokens that end a title: a new line, and where the tokenizer has none of it, or the LM
    fills masks, a semicolon."""
    for text in ("\n", ";") if lm.kind == "decoder" else (";",):
        if ids := encode(lm, text):
            return ids
    stop(
        f"the tokenizer of {lm.name} has no token for a new line or a semicolon, so titles cannot "
        "be told apart; use another LM"
    )
