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

`--llm` takes any model that transformers knows by itself. What no list can promise is measured:
when an LM is loaded, a few short prompts are scored by our way and by the untouched model, and
the fastest way that says the same is taken; where none does, the LM is refused with a sentence
(`delrec/lm/check.py`; `--no-check-llm` takes it on trust). "The same" is twice what the model
itself is off in its own dtype against fp32.

| way | what it is | rate |
|---|---|---|
| fused | Llama's layers in the loops of kernels/cpu.cpp, without gradients (CPU) | fastest |
| packed | rows one behind the other, no padding, titles share their prompt (CPU) | |
| padded | rows padded to one length, titles share their prompt | |
| rows | one row a title under the model's own mask and attention | slowest |

Behind a window that its layers attend in (Mistral, Gemma 3, Qwen 2) a prompt is read as rows.
Logits that a model scales or caps behind its head are scaled too, or asked of the model itself.

Below: transformers {version}, tiny random models of every family it calls causal, seq2seq or
masked, fp32 on a CPU. `make test-all` compares all their scores with plain transformers, on a CPU
and padded as on a GPU; the families of the first table are in `make test` too. Real checkpoints
of most families were never loaded here: the code that reads them is the same.
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
