"""A small log, and an LM of two layers with a tokenizer: what the rehearsal of make gpu reads in
place of ml-100k and SmolLM2. The log also serves the check of a resume on a card.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch

COLOURS = ["Silver", "Crimson", "Hidden", "Winter", "Broken", "Golden", "Silent", "Velvet"]
THINGS = ["River", "Machine", "Orchard", "Signal", "Harbour", "Letter", "Mountain", "Carnival"]


class Told(io.TextIOBase):
    """Keeps what is printed, and prints it."""

    def __init__(self) -> None:
        self.text, self.screen = "", sys.stdout

    def write(self, text: str) -> int:
        """Keeps and prints a text."""
        self.text += text
        return self.screen.write(text)

    def flush(self) -> None:
        """Prints what waits."""
        self.screen.flush()


def script(main: Callable, text: str) -> str:
    """What a script prints that is run in this process, with the arguments of a text; it raises
    RuntimeError with the script's own sentence where that refuses.
    """
    told = Told()
    print(f"=== {main.callback.__module__} {text}", flush=True)
    try:
        with contextlib.redirect_stdout(told):
            main.main(text.split(), standalone_mode=False)
    except click.ClickException as bad:
        raise RuntimeError(bad.format_message()) from bad
    return told.text


def last_json(text: str) -> dict:
    """The JSON object in the last line of what a script prints."""
    return json.loads([line for line in text.splitlines() if line.strip()][-1])


def titles() -> list[str]:
    """Sixty titles of two to four words."""
    ends = ["", " Returns", " of the North", " (1994)", " II"]
    return [f"{COLOURS[n % 8]} {THINGS[(n // 8 + n) % 8]}{ends[n % 5]}" for n in range(60)]


def log(folder: Path) -> Path:
    """The prepared folder of a log of 60 users with 14 interactions each."""
    from delrec.data import prepare

    rng, raw = np.random.default_rng(0), folder / "raw"
    if (folder / "toy" / "meta.json").exists():
        return folder / "toy"
    raw.mkdir(parents=True, exist_ok=True)
    rows = [(60 + item // 10, item, item) for item in range(60)]  # every item exists
    for user in range(60):
        items = rng.choice(60, 14, replace=False)
        rows += [(user, item, t) for t, item in enumerate(items)]
    lines = [f"{user},{item},{time}\n" for user, item, time in rows]
    (raw / "interactions.csv").write_text("user,item,timestamp\n" + "".join(lines))
    lines = [f"{item},{title}\n" for item, title in enumerate(titles())]
    (raw / "items.csv").write_text("item,title\n" + "".join(lines))
    words = "--core 1 --noun movie --verb watched"
    script(prepare.main, f"toy --raw {raw} --out {folder / 'toy'} {words}")
    return folder / "toy"


def tokenizer():
    """Byte-level BPE, trained on the titles."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    tok.train_from_iterator([*titles(), "Movies the user watched, oldest first:"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=special[0],
        eos_token=special[2],
        pad_token=special[0],
        additional_special_tokens=special[1:2],
    )


def llama_config(**more):
    """The configuration of a Llama of two layers."""
    from transformers import LlamaConfig

    sizes = dict(vocab_size=432, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048)
    return LlamaConfig(**sizes, pad_token_id=0, bos_token_id=0, eos_token_id=2, **more)


def lm(folder: Path) -> Path:
    """The folder of an LM of two layers, with random weights."""
    from transformers import LlamaForCausalLM

    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(initializer_range=0.2, tie_word_embeddings=True))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def backbone(data: Path, folder: Path) -> Path:
    """The run folder of a SASRec, trained for two epochs."""
    import train_backbone

    if not (folder / "config.json").exists():
        options = "--epochs 2 --width 16 --overwrite"
        script(train_backbone.main, f"--dataset {data} --out {folder} {options}")
    return folder
