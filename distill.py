"""Stage 1 of DELRec: distil a conventional recommender into soft-prompt vectors of a frozen LM.

    python distill.py --dataset ml-100k                              one process, CPU or GPU
    torchrun --nproc_per_node=10 distill.py --dataset beauty         many GPUs, the same answer
    python distill.py --samples 64 --val-samples 16                  minutes on a CPU, to see it run
    python distill.py --paper                                        the paper's own choices
    python distill.py --input ids                                    items as vectors

Paper: arXiv 2406.11156, section IV-B.

Reads data/<dataset>/ and a backbone's run folder (topk_{train,val}.npy, from train_backbone.py or
anybody else's model). Writes runs/<dataset>/prompt/: soft_prompt.safetensors, log.jsonl,
metrics.json, config.json. Only the k x D numbers of P are trained; with --lr-lm also an adapter of
the LM (DELRec's variant w UDPSM). --batch is a step of all processes together, whatever their
number; what a step holds, and which --batch would fill them, is said at the start.

--input ids (ours) distils in the form in which finetune.py --input ids reads: history items are
vectors of the backbone (E4SRec), and the maps between them and the frozen LM are trained with P
(items.safetensors). RPS then asks for the whole list r_1..r_h after every item of a window, with
--augment of a history that nobody has (delrec/lm/augment.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion

import common
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import with_lists
from delrec.lm import augment, crossfit, differences, items, options, prompt_training
from delrec.lm.balance import Balance
from delrec.lm.lists import Lists, read_lists, said_of_folds
from delrec.lm.model import located
from delrec.lm.questions import TASKS, Question, in_training, tasks_of
from delrec.lm.ranker import Ranker, asking
from delrec.lm.reading import read, read_examples, read_prefix
from delrec.lm.rps import listwise
from delrec.lm.verbalizers import SCORES_ALL, loss_over_all, score
from delrec.lm.windows import WindowPrompt, Windows, targets_of
from delrec.processes import finish, sum_gradients, sum_over_ranks
from delrec.ranges import ABOVE_0, FROM_0, WHOLE, Number
from delrec.runtime import described, load_run, stop, write_json
from delrec.training import checkpoints, steps
from delrec.training.loop import Best, Loop, OptimiserState, Weights

# what --paper sets (section V); ours, chosen on ml-100k, are the defaults of the options
PAPER = dict(history=10, verbalizer="mean", show=True, instruct=True, loss="catalogue")
PAPER |= dict(balance="gradnorm", lr=5e-3)
PAPER |= dict(samples=16000, batch=20)  # told by its release alone: 800 steps of 20
# --a of the paper, by the data set's name; elsewhere 4
PAPER_A = {"ml-100k": 4, "beauty": 4, "steam": 6, "home-kitchen": 6}
# what is set where nobody typed it, by the form of the input
TITLES = dict(history=10, samples=640, batch=8, micro=4, lr=2e-2)
VECTORS = dict(history=20, samples=2048, batch=16, micro=16, lr=5e-4)


def settle(cfg: SimpleNamespace, typed: set[str], dataset: str) -> None:
    """Gives every flag its final value; stops at what cannot be meant. dataset: its name."""
    about_titles = sorted(typed & {"verbalizer", "show", "paper"})
    common.fill(cfg, VECTORS if cfg.input == "ids" else TITLES)
    common.fill(cfg, {"a": PAPER_A.get(dataset, 4) if cfg.paper else 4})
    if cfg.input == "ids":
        if about_titles:
            stop(
                f"--{about_titles[0]} is about titles, --input ids scores items by their vectors; "
                "leave one of them out"
            )
        # every item is scored from one state, in the space of the vectors
        cfg.verbalizer, cfg.show = "items", False
    common.refuse([*prompt_training.faults(cfg), common.less_than_a_step(cfg)])
    if cfg.tasks != "rps" and (cfg.a < 3 or cfg.a + 2 > cfg.history):
        stop(f"--a {cfg.a} must be at least 3 and at most --history {cfg.history} minus 2")
    if cfg.loss == "catalogue" and cfg.verbalizer not in SCORES_ALL:
        stop(
            f"--loss catalogue scores all items from one state, --verbalizer {cfg.verbalizer} "
            "cannot; use mean or first, or --loss candidates"
        )
    if cfg.rps_candidates == "release" and cfg.h > cfg.C:
        stop(
            f"--rps-candidates release puts the backbone's {cfg.h} items (--h) among --candidates "
            f"{cfg.C}; raise it"
        )


# ---------------------------------------------------------------- what a sample asks


class Asked:
    """TA or RPS on titles: one item among C candidates, or among all (section IV-B)."""

    def __init__(self, r: Ranker, task: str, over: str):
        self.r, self.over = asking(r, task), over  # over: --loss

    def reads(self, questions: list[Question]) -> int:
        """The number that the sum of the losses is divided by."""
        return len(questions)

    def loss(self, questions: list[Question]) -> torch.Tensor:
        """L_TA or L_RPS as a sum: - log softmax over the scores of the candidates (or with --loss
        catalogue of all items), of the label's."""
        r, tails = self.r, [q.tail for q in questions]
        start = read_prefix(r.lm, r.prompts.prefix, r.P, r.cache)
        table_B = np.array([q.table for q in questions])
        if self.over == "catalogue":
            item_B = torch.tensor([int(q.cand[q.label]) for q in questions], device=r.lm.device)
            x_BD = read(r.lm, start, tails)
            if r.verbalizer == "items":
                s_BI = items.scores_in_tables(r.lm, items.item_space(r.lm, x_BD), table_B)
                return F.cross_entropy(s_BI, item_B - 1, reduction="sum")
            return loss_over_all(r.lm, x_BD, item_B, r.titles, r.verbalizer)
        cand_BC = np.stack([q.cand for q in questions]) + table_B[:, None] * (r.data.n_items + 1)
        label_B = torch.tensor([q.label for q in questions], device=r.lm.device)
        score_BC = score(r.lm, start, tails, cand_BC, r.titles, r.verbalizer)
        return F.cross_entropy(score_BC, label_B, reduction="sum")


class Listed:
    """RPS on vectors (ours): the backbone's whole list after every item of a window."""

    def __init__(self, r: Ranker, ranked_nh: np.ndarray, row_of: np.ndarray):
        self.r, self.ranked_nh, self.row_of = asking(r, "rps"), ranked_nh, row_of

    def reads(self, windows: list[WindowPrompt]) -> int:
        """The number that the sum of the losses is divided by."""
        return sum(len(w.target) for w in windows)

    def loss(self, windows: list[WindowPrompt]) -> torch.Tensor:
        """L_RPS as a sum: Plackett-Luce of the lists, from E W_out x."""
        r = self.r
        x_ND = read_examples(r.lm, read_prefix(r.lm, r.prompts.prefix, r.P, r.cache), windows)
        ranked_Nh = self.ranked_nh[self.row_of[targets_of(windows, "place")]].astype(np.int64)
        ranked_Nh = torch.as_tensor(ranked_Nh, device=r.lm.device)
        e_NE = items.item_space(r.lm, x_ND)
        s_NI = items.scores_in_tables(r.lm, e_NE, targets_of(windows, "table"))
        return listwise(s_NI, ranked_Nh).sum()


class Lessons:
    """What each step asks: two batches, of TA and of RPS, from the same samples."""

    def __init__(self, cfg: SimpleNamespace, r: Ranker, lists: Lists, n: int):
        self.cfg, self.r, self.lists = cfg, r, lists
        train, have_lists = r.data.train, with_lists(lists.folder, r.data)
        have_lists = np.intersect1d(have_lists, crossfit.may_learn_from(cfg, r.data, lists.folder))
        taught_n = np.random.default_rng([cfg.seed, 1]).permutation(have_lists)
        self.ta = Asked(r, "ta", cfg.loss)
        if cfg.input == "ids":  # windows of items, each known by its last target
            row_of = np.zeros(len(r.data.items), int)
            row_of[train[taught_n]] = taught_n
            taught = replace(r.data, train=train[have_lists])
            self.windows = Windows(taught, cfg.history, n, cfg.seed)
            self.order = row_of[self.windows.places]
            self.asked_about = self.windows
            self.rps = Listed(r, lists.train[:, : cfg.h], row_of)
        else:
            self.windows, self.order = None, taught_n
            self.rps = Asked(r, "rps", cfg.loss)
        if cfg.augment:  # RPS asks about other histories, TA about those of people
            backbone = history_scorer(load_run(lists.folder, r.data)).on(r.lm.device)
            self.asked_about = augment.MadeWindows(cfg, r.data, have_lists, backbone)
            self.rps = augment.Answered(r, backbone, cfg)
        # the tasks that are asked in titles' prompts; windows ask RPS in their own
        tasks = TASKS if cfg.tasks == "both" else (cfg.tasks,)
        self.asked = tuple(task for task in tasks if task == "ta" or not self.windows)

    def samples(self, at: np.ndarray) -> np.ndarray:
        """Places in data.train of the samples number `at`."""
        return self.order[at % len(self.order)]

    def batches(self, at: np.ndarray, seed: int) -> list[tuple[Asked | Listed, list]]:
        """[(lesson, batch)] of TA, then of RPS, for the samples number `at`."""
        cfg, r, which = self.cfg, self.r, self.samples(at)
        top_nh = self.lists.top("train", which, cfg.h)
        ta, rps = tasks_of(r, r.data.train[which], top_nh, cfg, seed, self.asked)
        ta = in_training(r, ta)
        if not r.lm.packs:  # rows of one pass are padded to the longest: like lengths together
            ta.sort(key=lambda q: -len(q.tail))
            rps.sort(key=lambda q: -len(q.tail))
        if self.windows and cfg.tasks != "ta":
            rps = self.asked_about.prompts(r, at)
        return [(self.ta, ta), (self.rps, rps)]

    def trials(self) -> Iterator[tuple]:
        """Pairs (lesson's loss, prompts) that --micro auto tries; made when they are asked for."""
        batches = self.batches(np.arange(min(64, len(self.order))), self.cfg.seed)
        yield from ((lesson.loss, batch) for lesson, batch in batches if batch)


# ---------------------------------------------------------------- the script


@click.command(**described(__doc__))
# data
@common.dataset_option
@click.option(
    "--backbone", help="run of the conventional model; runs/<dataset>/sasrec if not given"
)
@click.option(
    "--out", help="run folder to write; runs/<dataset>/prompt, with --input ids .../prompt-ids"
)
# model
@common.llm_option
@click.option("--k", default=80, type=WHOLE, help="soft-prompt vectors")
@click.option(
    "--verbalizer", default="likelihood", type=common.verbalizers, help="how a title gets its score"
)
@click.option(
    "--show/--no-show", default=False, help="list the candidates in the prompt (the paper does)"
)
@click.option(
    "--input",
    default="titles",
    type=click.Choice(["titles", "ids"]),
    help="a history item in the prompt: its title, or its vector from the backbone (then no "
    "verbalizer but a map into their space)",
)
@common.prompt_options
# the two tasks
@click.option(
    "--tasks", default="both", type=click.Choice(["both", "ta", "rps"]), help="which tasks to learn"
)
@click.option(
    "--a",
    type=WHOLE,
    help="length of TA's example inside the prompt; 4 (--paper: 6 for steam and home-kitchen)",
)
@click.option(
    "--h",
    default=10,
    type=WHOLE,
    help="length of the backbone's list in RPS; r_2..r_h are told, r_1 is asked (with --input "
    "ids all are asked)",
)
@common.candidates_option
@click.option(
    "--rps-candidates",
    default="random",
    type=click.Choice(["random", "release"]),
    help="beside r_1 in RPS: items outside of the backbone's list (the paper's text), or r_2..r_h "
    "and as many of those as are left (its release; as r_2..r_h are told, r_1 is then what is "
    "listed and not told)",
)
@click.option(
    "--loss",
    default="candidates",
    type=click.Choice(["candidates", "catalogue"]),
    help="cross-entropy over the candidates, or over all items (the paper; --verbalizer mean or "
    "first)",
)
@common.options(*options.augment, *options.user_states)
@click.option(
    "--balance",
    default="gradnorm",
    type=click.Choice(["gradnorm", "uncertainty", "fixed"]),
    help="weights of the two losses",
)
# training
@click.option(
    "--samples",
    type=WHOLE,
    help="training samples to see; 640, each an RPS prompt, and a TA prompt where its history "
    "is long enough; with --input ids (windows of items) 2048",
)
@common.fold_option
@click.option(
    "--batch", type=WHOLE, help="samples of a step, over all processes; 8, with --input ids 16"
)
@common.micro_option("4, with --input ids 16")
@common.memory_options
@click.option(
    "--lr", type=ABOVE_0, help="peak learning rate of Lion for P; 2e-2, with --input ids 5e-4"
)
@click.option("--lr-maps", default=1e-3, type=ABOVE_0, help="that of item vectors' maps")
@click.option(
    "--lr-lm",
    default=0.0,
    type=FROM_0,
    help="that of a LoRA adapter on the LM's q and v; 0: the LM is frozen (the paper; above 0: "
    "its variant w UDPSM)",
)
@click.option("--weight-decay", default=1e-5, type=FROM_0, help="weight decay of Lion")
@click.option(
    "--warmup", default=0.1, type=Number(0, 1), help="share of the steps with rising learning rate"
)
@common.seed_option
# validation
@click.option(
    "--val-samples",
    default=64,
    type=click.IntRange(0),
    help="validation samples that choose the best step; 0 = all",
)
@click.option(
    "--evals", default=2, type=WHOLE, help="validations during training, beside the first"
)
@common.going_on
@common.paper_option(PAPER)
@click.pass_context
def main(ctx: click.Context, **config) -> None:
    """Stage 1: learn the soft prompt from the backbone's lists (RPS) and the sequences (TA)."""
    cfg, typed = common.settled(ctx, config, PAPER)
    ranks, data, folder = common.enter(cfg, "prompt-ids" if cfg.input == "ids" else "prompt")
    settle(cfg, typed, data.name)
    common.say_paper(cfg, differences.STAGE_1, ranks)
    cfg.llm = located(cfg.llm)
    lists = read_lists(cfg.backbone, data, f"--dataset {cfg.dataset}")
    common.say(ranks, said_of_folds(lists.folder, lists.folds, lists.learnt))
    if cfg.augment:
        common.say(ranks, augment.said(cfg, lists.folder))
    crossfit.settle_folds(cfg, data)
    r = prompt_training.open_frozen(cfg, data, ranks, lists, history_scorer)
    made = prompt_training.made_with(cfg, ranks, r, lists)
    moving = prompt_training.Moving(cfg, r)
    params, quiz = moving.params, prompt_training.quiz_of(cfg, r, lists)
    nearness = prompt_training.Nearness(cfg, data, lists.folder)
    out, record = common.start_run(folder, "distill", cfg, data, ranks)
    record["llm_fingerprint"] = r.lm.identity

    n_steps, n_tasks = cfg.samples // cfg.batch, 1 + (cfg.tasks == "both")
    saver = checkpoints.Saver(out, cfg.checkpoint_every, made, ranks)
    cost = sum(map(len, quiz.prompts.values())) / (2 * cfg.batch) / 3
    validations = dict.fromkeys(steps.ends_of_parts(cfg.evals, n_steps), cost)
    loop = Loop(saver, "distill", n_steps, cfg.resume, validations)
    loop.keep(quiz=quiz)
    if quiz.before is None:
        quiz.before = quiz.ask(r, ranks, "before")
    lessons = Lessons(cfg, r, lists, n_steps * cfg.batch)
    micro = record["micro"] = common.settle_micro(cfg, n_tasks, lessons.trials(), ranks)
    balance = Balance(cfg)
    optimiser = Lion(moving.groups, lr=cfg.lr, weight_decay=cfg.weight_decay)
    moved, best = Weights(params), Best(ranks.device)
    loop.keep(param=moved, lion=OptimiserState(optimiser), balance=balance, best=best)

    for step, at in loop.over(np.arange(n_steps * cfg.batch).reshape(n_steps, -1)):
        with loop.elsewhere_than_steps():
            batches = lessons.batches(at, cfg.seed + 1 + step)
        share = steps.warm_then_fall(step, n_steps, cfg.warmup)
        steps.set_learning_rates(optimiser, share)
        grads, totals, before = [], torch.zeros(2), 0
        for task, (lesson, batch) in enumerate(batches):  # each task's own gradient
            steps.zero_gradients(params)
            for rows, weight in steps.micro_batches(len(batch), micro, ranks, cfg.shard, before):
                loss = lesson.loss(batch[rows]) * (weight / lesson.reads(batch))
                loss.backward()
                totals[task] += loss.item()
            before += len(batch)
            grads.append([p.grad for p in params])
        # once both are computed: a process without a prompt of one task begins with the other
        for own in grads:
            steps.set_gradients(params, own)
            sum_gradients(params, ranks)
        losses = sum_over_ranks(totals, ranks).tolist()
        lam_TA, lam_RPS = balance.weights(grads[0][0], grads[1][0])  # of the soft prompt
        # the gradient of lam_TA L_TA + lam_RPS L_RPS, the weights held fixed
        for p, g_TA, g_RPS in zip(params, *grads):
            p.grad = lam_TA * g_TA + lam_RPS * g_RPS
        steps.stop_unless_finite(params, step + 1, data.train[lessons.samples(at)], data, losses)
        optimiser.step()
        balance.learn(losses, [bool(batch) for _, batch in batches])
        loop.counts["prompts"] += sum(len(batch) for _, batch in batches)

        found = {}
        if step in loop.validations:
            with loop.elsewhere_than_steps("validation"):
                found = quiz.ask(r, ranks, f"step {step + 1}")
            best.offer(quiz.quality(found, cfg.tasks), step + 1, moved.state_dict(), after=found)
        told = {"loss_ta": losses[0], "loss_rps": losses[1], "lam_ta": lam_TA.item()}
        validated = {f"val_{name}": value for name, value in found.items()}
        loop.log(step + 1, **told, lr=cfg.lr * share, **validated)
    loop.close()

    moved.load_state_dict(best.weights)
    near = nearness.ask(r, ranks)
    if ranks.main:
        moving.write(out)
        result = {"n_ta": len(quiz.prompts.get("ta", [])), "n_rps": len(quiz.prompts["rps"])}
        result |= {"before": quiz.before, "after": best.found["after"], "best_step": best.step}
        result |= {"agreement": near}
        write_json(out / "metrics.json", {"chance": 1 / cfg.C, **result})
        known = {key: r.settings[key] for key in ("backbone", "backbone_run", "backbone_digest")}
        record |= {"settings": r.settings, **known, "lm_share": loop.lm_share()}
        record |= {"calibration": 0.0, "soft_prompt": str(folder)}
        common.finish_run(folder, record, loop.earlier)
        rate = loop.counts["prompts"] / loop.spent["steps"]
        prompt_training.print_result(folder, record, quiz, (best.found["after"], near), rate)
    finish(ranks)


if __name__ == "__main__":
    main()
