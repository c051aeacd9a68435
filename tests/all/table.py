"""docs/lms.md's table: every family of LMs that transformers knows, and how it is read here.

    python tests/all/table.py > docs/lms.md        some five minutes on one core

Each is a tiny random model of two layers (tests/families.py, tests/shrink.py), loaded as any LM is.
"""

import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]
warnings.filterwarnings("ignore")

import click  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from families import EXACT, RIGHT_OR_REFUSED, write  # noqa: E402
from shrink import not_built, other_families  # noqa: E402

from delrec.lm import check  # noqa: E402
from delrec.lm.model import load_lm  # noqa: E402

TEXT = """# Which language models can be read

`--llm` takes a Hugging Face id or a folder: decoder-only (Llama and its like), encoder-decoder
(T5), encoder-only (BERT). The default, `smollm2-135m`, is fetched by itself. Both stages need the
same LM. Words are explained in the [glossary](glossary.md).

```
python distill.py --dataset ml-100k --llm google/flan-t5-xl
python finetune.py --dataset ml-100k --llm google/flan-t5-xl
python evaluate.py --llm google/flan-t5-xl --dataset ml-100k      # the LM without any training
```

- **An LM's scores are right, or it is refused.** When it is loaded, a few short prompts are scored
  by our way and by the untouched model. The fastest way that says the same is taken, and a line
  says so where that is not the fastest there is. This takes seconds, once for each LM: what was
  found is kept in `~/.cache/delrec`. `--no-check-llm` leaves the comparison out; an LM that the
  fastest way cannot read at all is refused then, too.
- **Also refused:** files that lack weights, and a tokenizer that does not know over a fifth of the
  titles' tokens (`--allow-unknown` goes on). No code of an LM's folder is ever run.
- **Decoder-only LMs alone** can do stage 1 on item vectors (`--input ids`), the loss on history
  titles (`--loss titles`), and be cut in half for `make table4`.
- **Numbers** are [bf16](glossary.md#bf16) on GPUs and on CPUs that multiply bf16 in hardware, fp32
  elsewhere. An LM that fails in bf16 computes in fp32, and a line says so.
- **Controls:** `--llm random:NAME` is the LM NAME with random weights (`random-3:NAME` with seed
  3). `--llm` also takes a run of finetune.py.

## Memory

- `--micro N`: N samples are computed at once. Fewer need less memory and give the same gradient;
  `auto` takes as many as fit.
- `--gradient-checkpointing`: a third more time, far less memory.
- `--shard`, under torchrun: the LM's layers are divided among the processes, for an LM that does
  not fit one card. The same numbers, slower
  ([how](results/speed.md#does-it-use-many-processes-and-machines)).
- After three steps a script says how long the rest will take and what memory is used.

One 24 GB card holds what an LM of Flan-T5-XL's size needs
([measured](results/speed.md#how-much-memory-does-it-take)). No LM above 135M parameters was trained
here.

```
torchrun --nproc_per_node=4 finetune.py --dataset beauty --llm google/flan-t5-xl --shard --micro 1
```

## How it is read

Any model that transformers knows by itself can be given. Its scores count as "the same" where
they are off by at most twice what the model itself is off, in its own number format, from fp32
(`delrec/lm/check.py`). The ways to read a decoder-only LM:

| way | what it is | rate |
|---|---|---|
| fused | Llama's layers in the loops of kernels/cpu.cpp, without gradients (CPU) | fastest |
| packed | rows one behind the other, no padding, titles share their prompt (CPU) | |
| padded | rows padded to one length, titles share their prompt | |
| rows | one row a title under the model's own mask and attention | slowest |

The layers of some LMs (Mistral, Gemma 3, Qwen 2) attend only within a number of tokens, their
window. A longer prompt is read as rows: "rows behind the window".
Logits that a model scales or caps behind its head are scaled too, or asked of the model itself.

Below: transformers {version}, tiny random models of every family it calls causal, seq2seq or
masked, fp32 on a CPU. `make test-all` compares all their scores with plain transformers, on a CPU
and padded as on a GPU; the families of the first table are in `make test` too. Real checkpoints of
most families were never loaded here: the code that reads them is the same.
"""


def how(lm):
    """How an LM is read, in a word or two."""
    if lm.kind != "decoder":
        shares = "titles share their prompt's states" if lm.attends else "right"
        return shares if lm.kind == "encoder-decoder" else "right"
    words = [lm.paths[0]]
    if lm.reach < float("inf"):
        words.append("rows behind the window")
    if lm.scale != 1:
        words.append("logits scaled")
    if lm.own_head:
        words.append("logits of its own")
    return ", ".join(words)


def row(family, folder):
    """A line of the table."""
    try:
        lm = load_lm(write(family, folder), torch.device("cpu"), torch.float32)
    except click.ClickException as refused:
        reason = refused.message.replace(str(folder), "it").split(": ", 1)[-1].split("; ")[0]
        return f"| {family} | {family.kind} | refused: {reason} |"
    return f"| {family} | {family.kind} | {how(lm)} |"


def main():
    check.say = lambda line: None
    head = ["| family | kind | read by |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as room:
        check.CACHE = Path(room) / "cache"
        print(TEXT.format(version=transformers.__version__))
        for title, families in (
            ("Families written down by hand", [*EXACT, *RIGHT_OR_REFUSED]),
            ("All others", other_families()),
        ):
            rows = [row(f, Path(room) / f"{n}-{len(families)}") for n, f in enumerate(families)]
            print("\n".join([f"## {title}", "", *head, *rows, ""]))
        print("## Not tried\n")
        print("\n".join(["| table, family | why |", "|---|---|"]))
        for (table, name), why in not_built().items():
            print(f"| {table}, {name} | {why} |")


if __name__ == "__main__":
    main()
