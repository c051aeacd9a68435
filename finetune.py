"""Stage 2 of DELRec: fine-tune the LM with AdaLoRA, the soft prompt fixed, to rank titles.

    python finetune.py --dataset ml-100k                             one process, CPU or GPU
    torchrun --nproc_per_node=10 finetune.py --dataset beauty        many GPUs, the same answer
    python finetune.py --samples 64 --val-samples 32                 minutes on a CPU, to see it run
    python finetune.py --paper                                       the paper's own choices
    python finetune.py --input ids --soft-prompt ml-100k/prompt-ids  items as vectors, stage 1 too
    python finetune.py --input ids --out ml-100k/e4srec              items as vectors, no stage 1
    python finetune.py --teacher ml-100k/e4srec --layers 6 --out ml-100k/slmrec
                                                                     a small LM taught by it
    python finetune.py --dataset shop --from shop/old                go on, the log has grown

Paper: arXiv 2406.11156, section IV-C.

Reads data/<dataset>/ and runs/<dataset>/prompt/. Writes runs/<dataset>/delrec/: adapter/,
soft_prompt.safetensors, scores_val_15.npy, neutral.npy, log.jsonl, config.json; with --input ids or
hybrid items.safetensors; lm/: with --layers what is left of the LM, with --adapt all what it is.
evaluate.py --ckpt runs/<dataset>/delrec then scores the test part.

--input ids is E4SRec (arXiv 2312.02443), hybrid LLaRA (arXiv 2312.02445). --teacher is SLMRec
(arXiv 2405.17890, section 4): L = L_ce + l1 D_cos + l2 D_norm + l3 L_ms, see delrec/lm/slmrec.py.
"""

from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion

import common
from common import fill, refuse
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import Data
from delrec.lm import (
    adalora,
    calibration,
    crossfit,
    differences,
    draws,
    drop_items,
    ensemble,
    hints,
    items,
    kept,
    layers,
    offsets,
    options,
    residual,
    samples,
    slmrec,
    soft_prompt,
    student,
    summaries,
    twice,
    user_states,
    warm_start,
)
from delrec.lm.model import located
from delrec.lm.ranker import Ranker
from delrec.lm.reading import read, read_prefix
from delrec.lm.verbalizers import (
    SCORES_ALL,
    letter_and_end,
    loss_over_all,
    score,
    score_and_past,
    stop_unless_lm_can,
    verbalise,
)
from delrec.lm.windows import ByVectors, targets_of
from delrec.processes import Ranks, finish, sum_gradients
from delrec.ranges import ABOVE_0, FROM_0, WHOLE, Number
from delrec.runtime import described
from delrec.training import checkpoints, steps
from delrec.training.loop import Best, Loop, OptimiserState, Weights

# what --paper sets (DELRec, section V); ours, chosen on ml-100k, are the defaults of the options
PAPER = dict(history=10, verbalizer="mean", show=True, instruct=True, order="shuffled")
PAPER |= dict(loss="catalogue", adapt="qv", lr=1e-4, calibrate=False)
PAPER |= dict(samples=28000, batch=20)  # told by its release alone: 1,400 steps of 20
# what is set where nobody typed it, by the form of the input, and with a teacher or without
TITLES = dict(history=10, samples=1600, val_samples=200, evals=4, micro=8)
VECTORS = dict(history=20, samples=12288, val_samples=1000, evals=8, micro=16, soft_prompt="none")
# with --input ids every item is scored from one state, in the space of the vectors
FIXED = dict(verbalizer="items", show=False, order="shuffled", loss="candidates", calibrate=False)
FIXED |= dict(hint="none", orders=1, pool="stored", draw="uniform")

# ---------------------------------------------------------------- the flags and what they mean


def settle(cfg: SimpleNamespace, typed: set[str], data: Data, ranks: Ranks) -> student.Origins:
    """The runs that this one begins with. Gives every flag its final value."""
    cfg.llm = located(cfg.llm)
    start = warm_start.settle(cfg, typed, data, ranks) if cfg.from_run else None
    teacher_run = slmrec.settle_by_teacher(cfg, typed, data) if cfg.teacher else None
    fill(cfg, summaries.defaults(cfg) | items.defaults(cfg))
    fill(cfg, VECTORS if cfg.input == "ids" else TITLES)
    fill(cfg, slmrec.TAUGHT[cfg.norm] if cfg.teacher else slmrec.ALONE)
    fill(cfg, dict(lr=3e-4 if cfg.adapt == "all" else 3e-3))
    fill(cfg, residual.defaults(cfg))
    fill(cfg, ensemble.DEFAULTS if cfg.kd else {})
    if cfg.input == "ids":
        vars(cfg).update(FIXED)
    check(cfg, typed)
    prompt_run = None if start else soft_prompt.prompt_run_of(cfg, data)
    user_states.settle(cfg, prompt_run)
    cfg.llm = soft_prompt.lm_of(cfg, prompt_run)
    cfg.maps = items.maps_folder(cfg, data, prompt_run)
    crossfit.settle_folds(cfg, data, prompt_run, teacher_run)
    return student.Origins(teacher_run, prompt_run, start)


def check(cfg: SimpleNamespace, typed: set[str]) -> None:
    """Stops at what cannot be meant."""
    n_steps = max(cfg.samples // cfg.batch, 1)
    about_titles = sorted(typed & {"paper", *FIXED})
    faults = [
        (
            cfg.adapt != "all" and cfg.target_r >= cfg.init_r,
            f"--target-r {cfg.target_r} must be below --init-r {cfg.init_r}: AdaLoRA has nothing "
            "to reallocate otherwise",
        ),
        (
            cfg.adapt == "all" and cfg.shard,
            "--adapt all trains weights that --shard divides; leave one of them out",
        ),
        (
            n_steps < 5 and not cfg.from_run and cfg.adapt != "all",
            f"--samples {cfg.samples} with --batch {cfg.batch} is {n_steps} steps; AdaLoRA needs "
            "at least 5 to reallocate its ranks",
        ),
        common.less_than_a_step(cfg),
        (
            cfg.input == "ids" and about_titles,
            f"--{(about_titles or [''])[0]} is about titles, --input ids scores all items by their "
            "vectors; leave one of them out",
        ),
        (
            cfg.loss == "catalogue" and cfg.verbalizer not in SCORES_ALL,
            f"--loss catalogue scores all items from one state, --verbalizer {cfg.verbalizer} "
            "cannot; use mean or first, or --loss candidates",
        ),
    ]
    faults += [*items.faults(cfg), *soft_prompt.faults(cfg), *slmrec.faults(cfg)]
    faults += [*ensemble.faults(cfg), *drop_items.faults(cfg), *twice.faults(cfg)]
    faults += [*kept.faults(cfg), *summaries.faults(cfg), *hints.faults(cfg)]
    refuse([*faults, *residual.faults(cfg)])


# ---------------------------------------------------------------- what a sample asks


class ByTitles:
    """The truth among C candidates, or among all items, each scored by its title."""

    def __init__(self, r: Ranker, cfg: SimpleNamespace):
        self.r, self.loss = r, cfg.loss
        stop_unless_lm_can(r.lm, cfg.loss)

    def losses(self, batch: list[samples.Example]) -> dict[str, torch.Tensor]:
        """The parts of the loss as sums over the examples of a batch."""
        r, losses = self.r, {}
        start = read_prefix(r.lm, r.prompts.prefix, r.P, r.cache)
        tails, at = [e.tail for e in batch], [e.at for e in batch]
        if self.loss == "catalogue":
            return {"candidates": self.loss_from(read(r.lm, start, tails), batch)}
        cand_BC, truth_B = self.asked(batch)
        if self.loss == "letter":
            place_B, C = np.array([e.truth for e in batch]), cand_BC.shape[1]
            return {"letter": -letter_and_end(r.lm, start, tails, place_B, C).sum()}
        scored = (r.lm, start, tails, cand_BC, r.titles, r.verbalizer)
        if self.loss == "candidates":
            score_BC = offsets.beside(r.lm, score(*scored), cand_BC, batch)
        else:
            score_BC, past_M = score_and_past(*scored, at)
            # L_titles = - mean log P(token) over the tokens of history titles and of the truth
            losses["titles"] = -(past_M.sum() + self.log_likelihood(score_BC, truth_B, batch))
        if self.loss != "titles":
            # L = - log softmax over the C candidates' scores (section IV-C)
            losses["candidates"] = F.cross_entropy(score_BC, truth_B, reduction="sum")
        return losses

    def loss_from(self, x_BD: torch.Tensor, batch: list[samples.Example]) -> torch.Tensor:
        """L from states at the mask: those of an inner block too."""
        if self.loss == "catalogue":
            # L = - log softmax over the scores of all items: the paper's
            r, item_B = self.r, torch.as_tensor(targets_of(batch), device=x_BD.device)
            return loss_over_all(r.lm, x_BD.to(r.lm.dtype), item_B, r.titles, r.verbalizer)
        truth_B = self.asked(batch)[1]
        return F.cross_entropy(self.scores_from(x_BD, batch), truth_B, reduction="sum")

    def scores_from(self, x_BD: torch.Tensor, batch: list[samples.Example]) -> torch.Tensor:
        """The candidates' scores (B, C) from states."""
        r, (cand_BC, _) = self.r, self.asked(batch)
        return verbalise(r.lm, x_BD.to(r.lm.dtype), cand_BC, r.titles, r.verbalizer)

    def log_likelihood(
        self, score_BC: torch.Tensor, truth_B: torch.Tensor, batch: list[samples.Example]
    ) -> torch.Tensor | float:
        """log P of the truths' titles, where a score is the mean log P of a title's tokens."""
        if self.r.verbalizer != "likelihood":
            return 0.0
        n_B = torch.tensor([e.n_truth for e in batch], device=truth_B.device)
        return (score_BC[torch.arange(len(batch)), truth_B] * n_B).sum()

    def asked(self, batch: list[samples.Example]) -> tuple[np.ndarray, torch.Tensor]:
        """The candidates (B, C) and the places (B,) of the truths among them."""
        truth_B = torch.tensor([e.truth for e in batch], device=self.r.lm.device)
        return np.stack([e.cand for e in batch]), truth_B


# ---------------------------------------------------------------- the script


@click.command(**described(__doc__))
# data
@common.dataset_option
@click.option("--out", help="run folder to write; runs/<dataset>/delrec if not given")
@click.option("--backbone", help="its run folder; the soft prompt's own, or runs/<dataset>/sasrec")
# model
@common.llm_option
@click.option(
    "--soft-prompt",
    help="run folder of distill.py; 'none', 'random' (untrained vectors) or 'words' (the "
    "backbone's pattern in words); runs/<dataset>/prompt if not given, with --input ids none",
)
@click.option("--k", default=80, type=WHOLE, help="vectors of --soft-prompt random")
@click.option(
    "--verbalizer", default="likelihood", type=common.verbalizers, help="how a title gets its score"
)
@click.option(
    "--show/--no-show", default=False, help="list the candidates in the prompt (letter always does)"
)
@common.options(*options.listing)
@click.option(
    "--input",
    default="titles",
    type=click.Choice(["titles", "ids", "hybrid"]),
    help="a history item in the prompt: its title; ids: its vector from the backbone, and no "
    "verbalizer but a second map into their space (E4SRec); hybrid: title and vector (LLaRA)",
)
@click.option(
    "--maps",
    help="with --input ids or hybrid: run whose maps between items' vectors and the LM these begin "
    "as; those of --soft-prompt, if it was distilled with --input ids",
)
@common.options(*options.vectors)
@common.prompt_options
@common.options(*options.summary, *options.slmrec, *options.adalora, *options.residual)
@common.options(*options.ensemble, *options.averaged, *options.kept)
# training
@click.option(
    "--from",
    "from_run",
    help="go on from this run, made when the log had fewer items and users; same raw ids",
)
@click.option(
    "--loss",
    default="candidates",
    type=click.Choice(["titles", "candidates", "both", "catalogue", "letter"]),
    help="candidates: cross-entropy over C scores; catalogue: over all items' (the paper; by mean "
    "or first); titles: next-title language modelling on every title in the prompt; both: "
    "candidates and titles; letter: the letter and the end token among all tokens (LlamaRec)",
)
@click.option("--samples", type=WHOLE, help="training samples to see; 1600, ids (windows) 12288")
@common.fold_option
@common.candidates_option
@click.option("--batch", default=16, type=WHOLE, help="samples of a step, over all processes")
@common.micro_option("8, with --input ids 16")
@common.memory_options
@click.option("--lr", type=ABOVE_0, help="peak learning rate of Lion; 3e-3, --adapt all 3e-4")
@click.option(
    "--lr-maps", default=1e-3, type=ABOVE_0, help="that of item vectors' and blocks' maps"
)
@click.option(
    "--lr-prompt", default=0.0, type=FROM_0, help="that of the soft prompt; above 0: variant w ULSR"
)
@click.option("--weight-decay", default=1e-6, type=FROM_0, help="weight decay of Lion")
@click.option(
    "--warmup", default=0.05, type=Number(0, 1), help="share of the steps with rising learning rate"
)
@common.seed_option
# validation
@click.option(
    "--val-samples",
    type=click.IntRange(0),
    help="validation samples (of its first half) for step and calibration; 200, ids 1000; 0: all",
)
@click.option(
    "--evals",
    type=WHOLE,
    help="validations, evenly from --prune-end (an early peak shall be found; --adapt all prunes "
    "nothing) to the last step; 4, with --input ids, where they cost little, 8",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    help="subtract w times the title's score under an empty history, w chosen on validation",
)
@common.going_on
@common.paper_option(PAPER)
@click.pass_context
def main(ctx: click.Context, **config) -> None:
    """Stage 2: AdaLoRA on the LM with the soft prompt fixed."""
    cfg, typed = common.settled(ctx, config, PAPER)
    ranks, data, folder = common.enter(cfg, "delrec")
    origins = settle(cfg, typed, data, ranks)
    common.say_paper(cfg, differences.STAGE_2, ranks)
    n_steps = cfg.samples // cfg.batch
    r, teacher, maps = student.open_student(cfg, data, ranks, origins, history_scorer)
    lists = kept.opened(cfg, r, origins.prompt, n_steps)
    by_vectors = ByVectors(r, ensemble.opened(cfg, r), lists, cfg.r_drop)
    task = by_vectors if cfg.input == "ids" else ByTitles(r, cfg)
    seen, valid = student.samples_of(cfg, r, n_steps * cfg.batch), samples.Validation(cfg, data)
    modules = layers.adapt_modules(r.lm, cfg.adapt)  # refused before anything is begun
    made = student.made_with(cfg, ranks, r, origins, lists)
    out, record = common.start_run(folder, "finetune", cfg, data, ranks)
    record |= student.write_pruned(cfg, r.lm, out, ranks)
    saver = checkpoints.Saver(out, cfg.checkpoint_every, made, ranks)
    states = slmrec.teacher_states(teacher, seen, cfg, saver) if teacher else None
    del teacher
    record |= states.in_record(record) if states else {}
    blocks = slmrec.BlockLosses(r.lm, maps, cfg, states) if states or cfg.lambda_ms else None

    # AdaLoRA begins at full rank, is pruned to its budget, goes on at the ranks that were found
    moving = student.Moving(cfg, r, maps, modules, n_steps, origins.start)
    adapter, params = moving.adapter, moving.params
    optimiser = Lion(moving.groups, lr=cfg.lr, weight_decay=cfg.weight_decay)
    moved, best = Weights(params), Best(ranks.device)
    validations = student.validations(cfg, adapter, n_steps, len(valid.which))
    loop = Loop(saver, "finetune", n_steps, cfg.resume, validations)
    common.say(ranks, moving.said())

    def losses_of(examples):
        """The parts of the loss as sums over the reads."""
        losses = task.losses(examples)
        return losses | blocks.losses(task, examples) if blocks else losses

    def validated(done: int) -> dict[str, float]:
        """What validation says after so many steps. With final ranks they may be the best."""
        with moving.mean.shown(), loop.elsewhere_than_steps("validation"):
            score_nC, found = valid.ask(r, ranks)
            if not done or adalora.ranks_are_final(adapter, done):
                best.offer(valid.criterion(found), done, moved.state_dict(), scores=score_nC)
        common.say(ranks, f"step {done}: {valid.said(found)}; rank {adalora.active_rank(adapter)}")
        return found

    micro = record["micro"] = common.settle_micro(cfg, 1, student.trials(r, seen, losses_of), ranks)
    loop.keep(draws=draws.Draws(cfg, adapter, micro), param=moved, best=best, mean=moving.mean)
    loop.keep(lion=OptimiserState(optimiser), adalora=adalora.Importances(adapter, ranks.device))

    if (cfg.from_run or cfg.residual) and loop.step == 0:  # what it begins as may stay the best
        loop.log(0, **validated(0))
    for step, number_n in loop.over(np.arange(n_steps * cfg.batch).reshape(n_steps, -1)):
        with loop.elsewhere_than_steps():
            batch = samples.batch_of(seen, r, cfg, number_n)
        share = steps.warm_then_fall(step, n_steps, cfg.warmup)
        steps.set_learning_rates(optimiser, share)
        adapter.train()
        steps.zero_gradients(params)
        totals = steps.Totals(student.parts_told(cfg))
        for rows, weight in steps.micro_batches(cfg.batch, micro, ranks, cfg.shard):
            steps.seed_dropout(cfg.seed, step, rows.start)
            losses = losses_of(batch.examples[rows])
            means = {part: total * (weight / batch.count(part)) for part, total in losses.items()}
            loss = sum(means.values())
            loss.backward()
            totals.add(loss, means)
        if cfg.orthogonal and moving.layers:
            (cfg.orthogonal * adalora.orthogonality(adapter) / ranks.world).backward()
        sum_gradients(params, ranks)
        moving.let_maps_rest(batch.rests)
        fields = totals.over(ranks)
        steps.stop_unless_finite(params, step + 1, seen.places[number_n], data, fields["loss"])
        optimiser.step()
        moving.reallocate(step + 1)  # reads the gradients; --ema takes the step
        fields |= validated(step + 1) if step in loop.validations else {}
        loop.log(step + 1, **fields, lr=cfg.lr * share)
    loop.close()

    moving.must_hold()
    moved.load_state_dict(best.weights)
    score_nC = best.found["scores"]
    neutral_I, w = calibration.settled(cfg, r, valid.which, score_nC, ranks)
    if ranks.main:
        record |= student.write_parts(out, r, adapter, neutral_I, valid.among_all(score_nC))
        record |= {"settings": r.settings, "calibration": w, "best_step": best.step}
        record["rank"] = [moving.lora_ranks[0], adalora.active_rank(adapter)]
        record["soft_prompt"] = str(origins.prompt.folder) if origins.prompt else cfg.soft_prompt
        quality = valid.quality(score_nC - w * neutral_I[valid.cand_nC])
        student.close_run(folder, record, loop, quality, len(valid.which))
    finish(ranks)


if __name__ == "__main__":
    main()
