"""What the four scripts share: options, and how a run begins and ends."""

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np

from delrec.data.prepared import Data, load_data
from delrec.processes import Ranks, setup
from delrec.ranges import WHOLE
from delrec.runtime import place_of_new, stop, whole_or_auto
from delrec.training.claims import begun_by_this_job, claim, stay_stopped
from delrec.training.memory import micro_of
from delrec.training.run_folders import finish_run, start_run

__all__ = ["finish_run", "start_run"]  # a script calls them by this module's name

# ------------------------------------------------ options that several scripts share


def options(*group: Callable) -> Callable:
    """One decorator of several options, which --help shows in this order."""

    def add(command):
        for option in reversed(group):
            command = option(command)
        return command

    return add


dataset_option = click.option(
    "--dataset", default="ml-100k", help="name under data/, or a folder written by data/prepare.py"
)
seed_option = click.option(
    "--seed", default=0, type=click.IntRange(0), help="seed of everything random"
)
llm_option = click.option(
    "--llm",
    default="smollm2-135m",
    help="Hugging Face id or folder; smollm2-135m is fetched by itself; random:NAME (with seed 3 "
    "random-3:NAME) is the LM NAME with random weights of the same scale, a control",
)
# a killed run
going_on = options(
    click.option(
        "--resume",
        is_flag=True,
        help="continue a killed run from its newest checkpoint, as if it had never stopped",
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="replace the finished run in --out, once this one is finished; begin a killed one "
        "anew",
    ),
    click.option(
        "--checkpoint-every",
        default=0,
        type=click.IntRange(0),
        help="steps between checkpoints; 0: as often as costs under 5 % of the time",
    ),
)
fold_option = click.option(
    "--without-fold",
    multiple=True,
    type=click.IntRange(0),
    callback=lambda ctx, param, value: list(value) or None,
    metavar="F",
    help="leave out the training samples of a fold's users; may be repeated; needs a backbone of "
    "train_backbone.py --folds. Validation stays",
)
verbalizers = click.Choice(["likelihood", "mean", "first", "letter"])
candidates_option = click.option(
    "--candidates",
    "C",
    default=15,
    type=click.IntRange(2),
    help="candidates of a prompt, the truth among them",
)


def checks_of(whose: str) -> Callable:
    """The options about an LM that is looked at before the work. whose: what their help begins
    with."""
    return options(
        click.option(
            "--check-llm/--no-check-llm",
            default=True,
            help=f"{whose}compare the LM's scores with plain transformers' before the work "
            "(seconds, once for each LM), and take the fastest way that says the same",
        ),
        click.option(
            "--allow-unknown",
            is_flag=True,
            help=f"{whose}go on with a tokenizer that does not know over a fifth of the titles' "
            "tokens",
        ),
    )


# what a prompt holds, and how the LM is read
prompt_options = options(
    click.option(
        "--history", type=WHOLE, help="items of history in a prompt, L; 10, with --input ids 20"
    ),
    click.option(
        "--instruct/--no-instruct",
        default=False,
        help="begin each task's prompts with an instruction of its own (the paper does)",
    ),
    click.option(
        "--max-title", default=32, type=WHOLE, help="tokens of a title, longer ones are cut"
    ),
    click.option(
        "--max-tokens",
        default=1024,
        type=WHOLE,
        help="tokens of a prompt; the oldest history is dropped to fit",
    ),
    checks_of(""),
)
shard_option = click.option(
    "--shard",
    is_flag=True,
    help="divide the LM's layers among the processes of torchrun (FSDP2), for an LM that does "
    "not fit one card; the same numbers (but for stage 2's dropout), slower",
)
# what a pass keeps in memory; the numbers stay, but those that stage 2's dropout draws
memory_options = options(
    click.option(
        "--gradient-checkpointing",
        is_flag=True,
        help="keep each layer's input only and compute it again in backward: a third more time, "
        "far less memory",
    ),
    shard_option,
    click.option(
        "--cache-prefix/--no-cache-prefix",
        default=True,
        help="decoder-only LMs: compute the prompt's constant part once per forward pass "
        "instead of once per prompt; the same numbers (but for stage 2's dropout)",
    ),
)


def paper_option(values: dict[str, Any]) -> Callable:
    """The option --paper, which sets `values` where nothing was typed."""
    named = ", ".join(f"{k}={v}" for k, v in values.items())
    return click.option("--paper", is_flag=True, help=f"the paper's choices: {named}")


def say_paper(cfg: SimpleNamespace, differences: tuple[str, ...], ranks: Ranks) -> None:
    """With --paper, prints what is different from the paper all the same."""
    if cfg.paper:
        lines = "".join(f"\n  - {line}" for line in differences)
        say(ranks, f"--paper: this stays different from the paper (docs/differences.md):{lines}")


def micro_option(default: str) -> Callable:
    """The option --micro. default: as its help says it."""
    return click.option(
        "--micro",
        callback=whole_or_auto,
        help=f"samples of a forward pass, {default}; smaller needs less memory and gives the same "
        "gradient, but stage 2's dropout draws other numbers; auto: as many as memory holds",
    )


def settled(
    ctx: click.Context, config: dict[str, Any], paper: dict[str, Any]
) -> tuple[SimpleNamespace, set[str]]:
    """(the flags as a namespace, the names of those typed): with --paper, the paper's value of each
    that was not typed."""
    typed = typed_of(ctx, config)
    chosen = {k: v for k, v in paper.items() if config["paper"] and k not in typed}
    return SimpleNamespace(**{k: chosen.get(k, v) for k, v in config.items()}), typed


def typed_of(ctx: click.Context, config: dict[str, Any]) -> set[str]:
    """The names of the flags that were typed."""
    return {k for k in config if ctx.get_parameter_source(k).name == "COMMANDLINE"}


def moved_of(ctx: click.Context, config: dict[str, Any]) -> set[str]:
    """The names of the flags that were typed with another value than their default."""
    usual = {param.name: param.default for param in ctx.command.params}
    return {key for key in typed_of(ctx, config) if config[key] != usual[key]}


def fill(cfg: SimpleNamespace, values: dict[str, Any]) -> None:
    """Gives each flag that nobody set its value."""
    for name, value in values.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)


def less_than_a_step(cfg: SimpleNamespace) -> tuple[bool, str]:
    """The fault of a run whose samples are not one step: (is it so?, a sentence)."""
    return (
        cfg.samples < cfg.batch,
        f"--samples {cfg.samples} are not a step of --batch {cfg.batch}; raise --samples",
    )


def refuse(faults: list[tuple[Any, str]]) -> None:
    """Stops with the sentence of the first fault that is one. faults: (is it one?, sentence)."""
    for wrong, sentence in faults:
        if wrong:
            stop(sentence)


# ------------------------------------------------ a run, from the door to its place


def settle_micro(cfg: SimpleNamespace, tasks: int, trials: Iterable[tuple], ranks: Ranks) -> int:
    """How many samples a pass takes; also says what a step holds. tasks: prompts of a sample.
    cfg: batch, micro, samples, lr. trials: see memory.micro_of."""
    micro, could = micro_of(cfg.micro, cfg.batch, trials, ranks)
    said = held(cfg.batch, tasks * cfg.batch, ranks.world)
    say(ranks, f"{said}, in passes of at most {micro}")
    if line := unused(cfg, could, ranks.world):
        say(ranks, line)
    return micro


def held(batch: int, prompts: int, world: int, samples: str = "samples") -> str:
    """What a step of the optimiser holds, as a sentence. samples: their name."""
    said = f"a step holds {batch} {samples} (--batch)"
    said += f", at most {prompts} prompts of two tasks" if prompts > batch else ""
    if world > 1:
        said += f": at most {-(-prompts // world)} for each of {world} processes"
        said += f", none for {world - prompts} of them" if prompts < world else ""
    return said


def unused(cfg: SimpleNamespace, could: int, world: int) -> str | None:
    """What would fill the processes, and what that changes, as a sentence; None where a step fills
    them, or one process is alone. could: samples that a pass of each could take."""
    full = could * world
    if world == 1 or cfg.batch >= full:
        return None
    now, then = (max(cfg.samples // batch, 1) for batch in (cfg.batch, full))
    return (
        f"passes of {could} (--micro) on every process are --batch {full}. That is another "
        f"training, again the same on any number of processes: {then} steps instead of {now} (as "
        f"many with --samples {now * full}); --lr stays {cfg.lr:g} and may want another value"
    )


def say(ranks: Ranks, line: str) -> None:
    """Prints a line, once for all processes."""
    if ranks.main:
        print(line, flush=True)


def minilm(data: Data, ranks: Ranks) -> np.ndarray:
    """MiniLM's vectors of the titles, float32 (I+1, 384). Who asks for none imports no LM."""
    from delrec.lm.minilm import title_vectors

    return title_vectors(data, ranks)


def enter(cfg: SimpleNamespace, name: str) -> tuple[Ranks, Data, Path]:
    """(ranks, data, folder): the processes joined and every generator seeded, the prepared data,
    and the run folder, in which a run may be written. name: its default under runs/<dataset>/."""
    ranks = setup(cfg.seed)
    stay_stopped(ranks)
    data = load_data(cfg.dataset)
    folder = place_of_new("runs", cfg.out or f"{data.folder_name}/{name}")
    cfg.resume = begun_by_this_job(folder, ranks) or cfg.resume
    claim(folder, cfg, ranks)
    return ranks, data, folder
