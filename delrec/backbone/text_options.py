"""The options of train_backbone.py that put titles into item vectors (docs/text.md)."""

import click

from delrec.ranges import FROM_0, Number

text_options = (
    click.option(
        "--text",
        help="titles' vectors to put into the item vectors: tfidf, minilm, the run of an LM after "
        "evaluate.py --ckpt RUN --export, or an .npy file with a row an item; a + joins several "
        "(tfidf+minilm)",
    ),
    click.option(
        "--text-in",
        default="fold",
        type=click.Choice(["fold", "adaptor", "start", "alphafuse"]),
        help="fold: a linear map of them is added (DLLM2Rec); adaptor: two layers; start: item "
        "vectors begin as they are; alphafuse: they stay, an item learns in the directions that "
        "vary least",
    ),
    click.option(
        "--text-whiten",
        type=Number(0, 1),
        help="how evenly the directions vary: 0 as they come, 1 whitened, .5 between; 0, with "
        "--text-in alphafuse 1",
    ),
    click.option(
        "--text-width",
        type=click.IntRange(1),
        help="leave so many leading directions of the vectors (PCA); all if not given",
    ),
    click.option(
        "--text-graph",
        default=0.0,
        type=FROM_0,
        help="choose the directions (--text-width; --width of them if not given) by their variance "
        "less so many times their variation among items that were taken together (Rec-PCA); "
        "0: without",
    ),
    click.option(
        "--permute-text", is_flag=True, help="give each item another item's vector (the control)"
    ),
    click.option(
        "--cold-out",
        is_flag=True,
        help="items that training never saw are no negatives, and get the vectors and biases that "
        "their text makes likely; without, every step pushes them down",
    ),
)
