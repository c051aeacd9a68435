"""Settings that a search on a log's validation part found: --preset NAME of train_backbone.py.

Each was found by recipes/tune.py; docs/results/backbones.md has the searches' tables, and what the
test part said of them.
"""

from types import SimpleNamespace
from typing import Any

import click

PRESETS = {
    # python recipes/tune.py --dataset beauty --trials 12 --flags "--text tfidf+minilm"; the mean of
    # the steps in one more training, whose validation is the best of all
    "beauty": dict(
        model="sasrec",
        text="tfidf+minilm",
        text_in="fold",
        text_whiten=1.0,
        width=64,
        dropout=0.2,
        lr=5e-4,
        batch=64,
        history=20,
        ema=0.998,
    ),
}


def take(ctx: click.Context, param: click.Parameter, name: str | None) -> str | None:
    """The callback of --preset: its values are the defaults of flags that nobody typed."""
    if name:
        ctx.default_map = {"preset": name, **PRESETS[name]}
    return name


preset_option = click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    is_eager=True,  # before the flags whose defaults it sets
    callback=take,
    help="the model and settings that a search found best on this log, for this or one like it; "
    "what you type beside it counts more",
)


def faults(cfg: SimpleNamespace) -> list[tuple[Any, str]]:
    """What cannot be meant with a preset: (is it so?, a sentence)."""
    if not cfg.preset:
        return []
    model = PRESETS[cfg.preset]["model"]
    return [
        (
            cfg.model != model,
            f"--preset {cfg.preset} has the settings of --model {model}, not of {cfg.model}; leave "
            "--model out, or --preset",
        ),
        (
            cfg.from_run,
            f"--from goes on with the settings of the run that it names; leave --preset "
            f"{cfg.preset} out, or train from scratch without --from",
        ),
    ]
