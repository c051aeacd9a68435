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
the LM (DELRec's variant w UDPSM).

--input ids (ours) distils in the form in which finetune.py --input ids reads: history items are
vectors of the backbone (E4SRec), and the maps between them and the frozen LM are trained with P
(items.safetensors). RPS then asks for the whole list r_1..r_h after every item of a window.
"""

import json
import time

import click
import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion

from common import (
    claim,
    finish_run,
    forecast,
    going_on,
    memory_options,
    prompt_options,
    settled,
    start_run,
    stop_unless_finite,
)
from delrec.backbone.models import NAMES
from delrec.data.prepared import histories, load_data, subset, with_lists
from delrec.lm import items, windows
from delrec.lm.layers import adapt_modules, checkpoint_layers
from delrec.lm.listed import backbone_digest
from delrec.lm.model import load_lm, located
from delrec.lm.ranker import make_ranker, score_tails
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.soft_prompt import save_soft_prompt
from delrec.lm.text import digest, random_soft_prompt
from delrec.lm.verbalizers import score
from delrec.processes import (
    finish,
    restarted,
    setup,
    shares,
    sum_gradients,
    sum_over_ranks,
)
from delrec.runtime import (
    described,
    folder_of,
    load_run,
    read_npy,
    settle,
    stop,
    whole_or_auto,
    write_json,
)
from delrec.training import checkpoints
from delrec.training.log import Log, cut_log
from delrec.training.memory import largest_micro, peak_gb

# what --paper sets (section V); our defaults, chosen by validation on ml-100k, are in the options
# below
PAPER = dict(history=10, verbalizer="mean", show=True, balance="gradnorm", lr=5e-3)


def ta_sample(r, window, a, C, rng):
    """Temporal Analysis: (tail, candidates, place of i_{n-1} among them). window: i_1..i_n, n >= a
    + 2.
    """
    label = window[-2]
    cand = draw(r, C - 1, {label}, rng)
    cand = rng.permutation(np.append(cand, label))
    return r.prompts.temporal_analysis(window, a, cand)[0], cand, int((cand == label).argmax())


def rps_sample(r, window, ranked, C, rng):
    """Recommendation Pattern Simulating: (tail, candidates, place of r_1). ranked: the backbone's
    r_1..r_h after this window.
    """
    cand = draw(r, C - 1, set(ranked.tolist()), rng)
    cand = rng.permutation(np.append(cand, ranked[0]))
    return r.prompts.pattern(window, ranked, cand)[0], cand, int((cand == ranked[0]).argmax())


def draw(r, n, taken, rng):
    """n items, uniform without repetition, none of them taken."""
    taken, out = set(map(int, taken)), []
    while len(out) < n:
        i = int(rng.integers(1, r.data.n_items + 1))
        if i not in taken:
            taken.add(i)
            out.append(i)
    return np.array(out, np.int64)


def tasks_of(r, samples, ranked, a, C, seed):
    """The TA and the RPS prompts of samples (indices into data.items); the same for the same seed,
    whoever computes them.

    The window i_1..i_n ends with the item before the sample's target: TA learns from the history
    alone, RPS from what the backbone answered to it. Returns two lists of (tail, candidates,
    label); windows shorter than a + 2 give no TA prompt.
    """
    ta, rps = [], []
    for sample, old, top in zip(samples, histories(r.data, samples, r.history), ranked):
        window, rng = old[old > 0], np.random.default_rng([seed, int(sample)])
        if len(window) >= a + 2:
            ta.append(ta_sample(r, window, a, C, rng))
        rps.append(rps_sample(r, window, top, C, rng))
    return ta, rps


def accuracy(r, prompts, ranks, name):
    """Share of prompts whose label scores highest (a tie counts as its share), and the mean
    cross-entropy; all ranks share the work.
    """
    score_nC = score_tails(
        r, [p[0] for p in prompts], np.stack([p[1] for p in prompts]), ranks, name
    )
    label = np.array([p[2] for p in prompts])
    best = score_nC == score_nC.max(1, keepdims=True)
    loss = F.cross_entropy(torch.as_tensor(score_nC), torch.as_tensor(label)).item()
    return float((best[np.arange(len(label)), label] / best.sum(1)).mean()), loss


def listwise(s_NI, ranked_Nh):
    """Plackett-Luce: minus the mean log probability of drawing r_1..r_h in their order, each from
    the items that are not yet drawn: (N,). s_NI: scores of the items 1..I; ranked_Nh: int64, items.
    With h = 1 it is the cross-entropy of r_1 over the catalogue.
    """
    at = ranked_Nh - 1
    s_Nh = s_NI.gather(1, at)
    rest_N = s_NI.scatter(1, at, -torch.inf).logsumexp(1)
    # log sum over r_m..r_h and all that are not listed
    left_Nh = torch.logaddexp(rest_N[:, None], s_Nh.flip(1).logcumsumexp(1).flip(1))
    return (left_Nh - s_Nh).mean(1)


def weights(how, g_TA, g_RPS, log_var):
    """lam_TA, lam_RPS. gradnorm: lam proportional to ||g||^-1/2, sum 1. uncertainty: exp(-s) of
    learnt log-variances s. fixed: 1/2.
    """
    if how == "gradnorm":
        norm = torch.stack([g_TA.norm(), g_RPS.norm()])
        # a task without a sample in this batch has no say
        w = norm.clamp(min=1e-12) ** -0.5 * (norm > 0)
        return w / w.sum().clamp(min=1e-12)
    return torch.exp(-log_var.detach()) if how == "uncertainty" else torch.tensor([0.5, 0.5])


@click.command(**described(__doc__))
# data
@click.option(
    "--dataset", default="ml-100k", help="name under data/, or a folder written by data/prepare.py"
)
@click.option(
    "--backbone",
    default=None,
    type=str,
    help="run folder of the conventional model; runs/<dataset>/sasrec if not given",
)
@click.option(
    "--out",
    default=None,
    type=str,
    help="run folder to write; runs/<dataset>/prompt if not given, with --input ids prompt-ids",
)
# model
@click.option(
    "--llm",
    default="smollm2-135m",
    help="Hugging Face id or folder; smollm2-135m is fetched by itself",
)
@click.option("--k", default=80, type=click.IntRange(1), help="soft-prompt vectors")
@click.option(
    "--verbalizer",
    default="likelihood",
    type=click.Choice(["likelihood", "mean", "first", "letter"]),
    help="how the mask becomes a score per title",
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
@prompt_options
# the two tasks
@click.option(
    "--tasks", default="both", type=click.Choice(["both", "ta", "rps"]), help="which tasks to learn"
)
@click.option(
    "--a",
    default=4,
    help="length of TA's example inside the prompt (paper: 4 for ml-100k and beauty, 6 for "
    "steam and home-kitchen)",
)
@click.option(
    "--h",
    default=10,
    type=click.IntRange(1),
    help="length of the backbone's list in RPS; r_2..r_h are told, r_1 is asked (with --input "
    "ids all are asked)",
)
@click.option(
    "--candidates",
    "C",
    default=15,
    type=click.IntRange(2),
    help="candidates of a prompt, the label among them",
)
@click.option(
    "--balance",
    default="gradnorm",
    type=click.Choice(["gradnorm", "uncertainty", "fixed"]),
    help="weights of the two losses",
)
# training
@click.option(
    "--samples",
    default=None,
    type=click.IntRange(1),
    help="training samples to see; 640, each an RPS prompt, and a TA prompt where its history "
    "is long enough; with --input ids (windows of items) 2048",
)
@click.option(
    "--batch",
    default=None,
    type=click.IntRange(1),
    help="samples of an optimiser step, over all processes; 8, with --input ids 16",
)
@click.option(
    "--micro",
    default=None,
    callback=whole_or_auto,
    help="prompts of a forward pass, 4, with --input ids 16; smaller needs less memory and "
    "gives the same gradient; auto: as many as memory holds",
)
@memory_options
@click.option(
    "--lr",
    default=None,
    type=click.FloatRange(0, min_open=True),
    help="peak learning rate of Lion for the soft prompt; 2e-2, with --input ids 5e-4",
)
@click.option(
    "--lr-maps",
    default=1e-3,
    type=click.FloatRange(0, min_open=True),
    help="with --input ids: that of the maps between items' vectors and the LM",
)
@click.option(
    "--lr-lm",
    default=0.0,
    type=click.FloatRange(0),
    help="that of a LoRA adapter on the LM's q and v; 0: the LM is frozen (the paper; above 0: "
    "its variant w UDPSM)",
)
@click.option("--weight-decay", default=1e-5, help="weight decay of Lion")
@click.option("--warmup", default=0.1, help="share of the steps with rising learning rate")
@click.option("--seed", default=0, type=click.IntRange(0), help="seed of everything random")
# validation
@click.option(
    "--val-samples",
    default=64,
    type=click.IntRange(0),
    help="validation samples that choose the best step; 0 = all",
)
@click.option(
    "--evals",
    default=2,
    type=click.IntRange(1),
    help="validations during training, the last after the last step; one more before the first",
)
# going on
@going_on
@click.option(
    "--paper",
    is_flag=True,
    help="the paper's choices: " + ", ".join(f"{k}={v}" for k, v in PAPER.items()),
)
@click.pass_context
def main(ctx, **config):
    """Stage 1: learn the soft prompt from the backbone's lists (RPS) and from the sequences
    themselves (TA).
    """
    cfg, typed = settled(ctx, config, PAPER)
    ranks, cfg.resume = setup(cfg.seed), cfg.resume or restarted()
    cfg.llm = located(cfg.llm)
    ids = cfg.input == "ids"
    for name, titles, vectors in (
        ("history", 10, 20),
        ("samples", 640, 2048),
        ("batch", 8, 16),
        ("micro", 4, 16),
        ("lr", 2e-2, 5e-4),
    ):
        if getattr(cfg, name) is None:
            setattr(cfg, name, vectors if ids else titles)
    # every item is scored from one state, in the space of the vectors
    if ids:
        if given := sorted(typed & {"verbalizer", "show", "paper"}):
            stop(
                f"--{given[0]} is about titles, --input ids scores items by their vectors; leave "
                "one of them out"
            )
        cfg.verbalizer, cfg.show = "items", False
    if cfg.tasks != "rps" and (cfg.a < 3 or cfg.a + 2 > cfg.history):
        stop(f"--a {cfg.a} must be at least 3 and at most --history {cfg.history} minus 2")

    # data, backbone's lists, LM
    data = load_data(cfg.dataset)
    folder = folder_of("runs", cfg.out or f"{data.folder_name}/prompt" + ("-ids" if ids else ""))
    claim(folder, cfg, ranks)
    teacher_folder = folder_of("runs", cfg.backbone or f"{data.folder_name}/sasrec")
    settle(teacher_folder, "config.json")
    if not (teacher_folder / "config.json").exists():
        stop(
            f"no backbone in {teacher_folder}; train it with: python train_backbone.py --dataset "
            f"{cfg.dataset}" + (f" --out {cfg.backbone}" if cfg.backbone else "")
        )
    teacher = load_run(teacher_folder, data, stages=["train_backbone"])
    for s in ("train", "val"):
        if not (teacher_folder / f"topk_{s}.npy").exists():
            stop(
                f"{teacher_folder} lacks topk_{s}.npy, the backbone's lists; train it again with "
                "train_backbone.py"
            )
    ranked = {
        s: read_npy(teacher_folder / f"topk_{s}.npy", (len(getattr(data, s)), None))
        for s in ("train", "val")
    }
    if ranked["train"].shape[1] < cfg.h:
        stop(
            f"{teacher_folder} lists {ranked['train'].shape[1]} items per sample, --h is {cfg.h}; "
            f"train it with --top-h {cfg.h} or more"
        )
    if ids and (n := len(with_lists(teacher_folder, data))) < len(data.train):
        stop(
            f"--input ids asks for the backbone's list after every item; {teacher_folder} lists "
            f"{n} of {len(data.train)} training samples: train it again with --lists "
            f"{len(data.train)}"
        )
    if data.n_items < cfg.C + cfg.h:
        stop(
            f"{cfg.C} candidates outside a list of {cfg.h} need {cfg.C + cfg.h} items, the "
            f"catalogue has {data.n_items}; lower --candidates or --h"
        )
    lm = load_lm(cfg.llm, ranks.device, shard=cfg.shard, checked=cfg.check_llm)
    P = random_soft_prompt(lm, cfg.k, cfg.seed).requires_grad_()
    backbone = NAMES.get(
        getattr(teacher, "model", ""), getattr(teacher, "model", "the recommender")
    )
    settings = {
        "verbalizer": cfg.verbalizer,
        "show": cfg.show,
        "order": "shuffled",
        "history": cfg.history,
        "max_title": cfg.max_title,
        "max_tokens": cfg.max_tokens,
        "backbone": backbone,
        "backbone_run": str(teacher_folder),
        "input": cfg.input,
        "backbone_digest": backbone_digest(teacher_folder),
        "allow_unknown": cfg.allow_unknown,
    }
    maps = []
    if ids:
        if lm.kind != "decoder":
            stop(
                "--input ids reads a state after every item, which needs a decoder-only LM; "
                f"{cfg.llm} is an {lm.kind} LM"
            )
        torch.manual_seed(cfg.seed)
        items.load_items(lm, teacher_folder, data.n_items)
        maps = list(lm.items.maps.parameters())
    r = make_ranker(lm, data, settings, P, cfg.cache_prefix)
    if cfg.gradient_checkpointing:
        checkpoint_layers(lm.model)
    made_with = checkpoints.made_with(cfg, data, ranks, lm.identity) | {
        "backbone_lists": digest(torch.tensor(ranked["train"])),
        **({"item_vectors": digest(lm.items.E)} if ids else {}),
    }
    adapter, adapted = None, []
    if cfg.lr_lm:
        from peft import LoraConfig, get_peft_model

        adapter = get_peft_model(
            lm.model, LoraConfig(target_modules=adapt_modules(lm), r=8, lora_alpha=16)
        )
        adapted = [p for p in adapter.parameters() if p.requires_grad]
    moved = [P, *maps, *adapted]
    # fixed validation prompts
    val = subset(len(data.val), cfg.val_samples, cfg.seed)
    val_ta, val_rps = tasks_of(
        r, data.val[val], ranked["val"][val][:, : cfg.h], cfg.a, cfg.C, cfg.seed
    )
    if not val_ta and cfg.tasks != "rps":
        stop(
            f"no validation history has the {cfg.a + 2} items Temporal Analysis needs; lower --a "
            f"{cfg.a}, raise --val-samples {cfg.val_samples}, or leave it out with --tasks "
            "rps"
        )
    out, record = start_run(folder, "distill", cfg, data, ranks)
    record["llm_fingerprint"] = lm.identity
    saver = checkpoints.Saver(out, cfg.checkpoint_every, made_with, ranks)
    found = saver.load() if cfg.resume else None
    checkpoints.listen()

    tasks = {task: prompts for task, prompts in (("ta", val_ta), ("rps", val_rps)) if prompts}

    def validate(name):
        found = {}
        for task, prompts in tasks.items():
            found[task], found[f"{task}_loss"] = accuracy(
                r, prompts, ranks, f"{name} {task.upper()}"
            )
        if ranks.main:
            print(
                f"{name}: "
                + ", ".join(
                    f"{t.upper()} accuracy {found[t]:.3f} loss {found[f'{t}_loss']:.3f} "
                    f"(n={len(p)})"
                    for t, p in tasks.items()
                )
                + f", chance {1 / cfg.C:.3f}",
                flush=True,
            )
        return found

    def window_batch(batch, share):
        """Adds to the gradients what the backbone's lists after every item of these windows give,
        `share` of the loss for each; returns their part of the loss.
        """
        x_ND = read_examples(lm, read_prefix(lm, r.prompts.prefix, P, r.cache), batch)
        ranked_Nh = ranked["train"][row_of[windows.targets_of(batch, "place")]][:, : cfg.h].astype(
            np.int64
        )
        loss = (
            listwise(
                items.item_space(lm, x_ND) @ lm.items.E[1:].T,
                torch.as_tensor(ranked_Nh, device=ranks.device),
            ).sum()
            * share
        )
        loss.backward()
        return loss.item()

    def micro_batch(prompts, share):
        """Adds to the gradients what these prompts give, `share` of the loss each; returns their
        part of the loss.
        """
        s_BC = score(
            lm,
            read_prefix(lm, r.prompts.prefix, P, r.cache),
            [p[0] for p in prompts],
            np.stack([p[1] for p in prompts]),
            r.titles,
            cfg.verbalizer,
        )
        loss = (
            F.cross_entropy(
                s_BC, torch.tensor([p[2] for p in prompts], device=ranks.device), reduction="sum"
            )
            * share
        )
        loss.backward()
        return loss.item()

    t0 = time.time()
    before = found[2]["before"] if found else validate("before")
    validation_seconds = time.time() - t0
    steps = max(cfg.samples // cfg.batch, 1)
    order = np.random.default_rng([cfg.seed, 1]).permutation(with_lists(teacher_folder, data))
    # windows of items, each known by its last target
    if ids:
        row_of, is_target = np.zeros(len(data.items), int), np.zeros(len(data.items), bool)
        row_of[data.train[order]], is_target[data.train[order]] = order, True
        first_n, last_n = windows.draw_windows(data, cfg.history, steps * cfg.batch, cfg.seed)
        order = row_of[last_n]
    # whole micro-batches are shared among the ranks, each the same whoever has it
    most = -(-cfg.batch // ranks.world)
    if cfg.micro == "auto":
        ta, rps = tasks_of(
            r,
            data.train[order[:64]],
            ranked["train"][order[:64]][:, : cfg.h],
            cfg.a,
            cfg.C,
            cfg.seed,
        )
        titles = sorted(
            (ta if cfg.tasks != "rps" else []) + (rps if cfg.tasks != "ta" and not ids else []),
            key=lambda p: -len(p[0]),
        )
        in_windows = (
            sorted(
                windows.window_prompts(r, first_n[:64], last_n[:64], is_target),
                key=lambda e: -len(e.tail),
            )
            if ids and cfg.tasks != "ta"
            else []
        )
        cfg.micro = min(
            largest_micro(lambda m: learn(trial[:m], 1 / m), tails, most, ranks.device, ranks)
            for learn, trial, tails in (
                (micro_batch, titles, [p[0] for p in titles]),
                (window_batch, in_windows, [e.tail for e in in_windows]),
            )
            if trial
        )
    micro = record["micro"] = min(cfg.micro, most)
    log_var = torch.zeros(2, requires_grad=True)
    groups = [
        (params, lr)
        for params, lr in (([P], cfg.lr), (maps, cfg.lr_maps), (adapted, cfg.lr_lm))
        if params
    ]
    optimiser = Lion(
        [{"params": params, "lr": lr} for params, lr in groups],
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
    )
    balancer = torch.optim.Adam([log_var], lr=1e-2)
    eval_at = {round(steps * (i + 1) / cfg.evals) - 1 for i in range(cfg.evals)}
    names = [
        "P",
        *(f"maps.{i}" for i in range(len(maps))),
        *(f"lm.{i}" for i in range(len(adapted))),
    ]
    best, began, lm_seconds, prompts_seen, first, step_seconds = (
        None,
        time.time(),
        {"steps": 0.0, "validation": 0.0},
        0,
        0,
        [],
    )
    if found:
        first, tensors, state = found
        for name, p in zip(names, moved):
            p.data.copy_(tensors[name])
        log_var.data.copy_(tensors["log_var"])
        (
            checkpoints.restore_optimiser("lion", optimiser, tensors),
            checkpoints.restore_optimiser("adam", balancer, tensors),
        )
        best = (
            (
                *state["best"][:2],
                [tensors[f"best.{name}"].to(ranks.device) for name in names],
                state["best"][2],
            )
            if state["best"]
            else None
        )
        prompts_seen, lm_seconds, step_seconds = (
            state["prompts_seen"],
            state["lm_seconds"],
            state["step_seconds"],
        )
        began, record["started"] = began - state["seconds"], record["started"] - state["seconds"]
    cut_log(out, "distill", first, ranks)
    log = Log(out, steps, "distill", ranks, done=first)

    for step in range(first, steps):
        which = np.resize(order, (step + 1) * cfg.batch)[step * cfg.batch :]
        ta, rps = tasks_of(
            r,
            data.train[which],
            ranked["train"][which][:, : cfg.h],
            cfg.a,
            cfg.C,
            cfg.seed + 1 + step,
        )
        if ids:
            at = slice(step * cfg.batch, (step + 1) * cfg.batch)
            rps = windows.window_prompts(r, first_n[at], last_n[at], is_target)
        ta, rps = (ta if cfg.tasks != "rps" else []), (rps if cfg.tasks != "ta" else [])
        now = min((step + 1) / max(cfg.warmup * steps, 1), (steps - step) / steps)
        for group, (_, peak) in zip(optimiser.param_groups, groups):
            group["lr"] = peak * now

        grads, losses, t0 = [], [], time.time()
        # each task's own gradient: L_TA and L_RPS are means over the global batch
        for prompts, learn in ((ta, micro_batch), (rps, window_batch if ids else micro_batch)):
            total = torch.zeros(1)
            for p in moved:
                p.grad = torch.zeros_like(p)
            # rows of one pass are padded to the longest: like lengths together
            if not lm.packs and learn is micro_batch:
                prompts.sort(key=lambda p: -len(p[0]))
            reads = sum(len(e.target) for e in prompts) if learn is window_batch else len(prompts)
            for i, own in shares(range(0, len(prompts), micro), ranks, cfg.shard):
                total += learn(prompts[i : i + micro], own / reads)
            sum_gradients(moved, ranks)
            grads.append([p.grad for p in moved])
            losses.append(sum_over_ranks(total, ranks).item())
        step_seconds.append(time.time() - t0)
        prompts_seen += len(ta) + len(rps)
        lam = (
            weights(cfg.balance, grads[0][0], grads[1][0], log_var)
            if cfg.tasks == "both"
            else torch.tensor([1.0, 1.0])
        )
        # gradient of lam_TA L_TA + lam_RPS L_RPS, the weights detached
        for p, g_TA, g_RPS in zip(moved, *grads):
            p.grad = lam[0] * g_TA + lam[1] * g_RPS
        stop_unless_finite(moved, step + 1, data.train[which], data, losses)
        optimiser.step()
        if cfg.balance == "uncertainty":  # s follows L = exp(-s) loss + s
            log_var.grad = (1 - torch.exp(-log_var.detach()) * torch.tensor(losses)) * torch.tensor(
                [bool(ta), bool(rps)]
            )
            balancer.step()

        shown = {
            "loss_ta": losses[0],
            "loss_rps": losses[1],
            "lam_ta": lam[0].item(),
            "lr": cfg.lr * now,
        }
        if step in eval_at:
            t0 = time.time()
            after = validate(f"step {step + 1}")
            lm_seconds["validation"] += time.time() - t0
            shown |= {f"val_{k}": v for k, v in after.items()}
            quality = sum(after[f"{task}_loss"] for task in tasks if cfg.tasks in ("both", task))
            if best is None or quality < best[0]:
                best = (quality, step + 1, [p.detach().clone() for p in moved], after)
        log.step(step + 1, **shown)
        if step == 2 and steps > 3:
            forecast(step_seconds, steps, validation_seconds, sum(e > step for e in eval_at), ranks)
        if (asked := checkpoints.stop_asked(ranks)) or saver.due(step + 1):
            saver.save(
                step + 1,
                {
                    **dict(zip(names, moved)),
                    "log_var": log_var,
                    **checkpoints.optimiser_tensors("lion", optimiser),
                    **checkpoints.optimiser_tensors("adam", balancer),
                    **({f"best.{name}": p for name, p in zip(names, best[2])} if best else {}),
                },
                {
                    "before": before,
                    "best": [best[0], best[1], best[3]] if best else None,
                    "prompts_seen": prompts_seen,
                    "lm_seconds": lm_seconds,
                    "step_seconds": step_seconds,
                    "seconds": time.time() - began,
                },
            )
        if asked and step + 1 < steps:
            log.close()
            saver.end(step + 1)
    log.close()

    lm_seconds["steps"] = sum(step_seconds)
    seconds, (_, best_step, chosen, after) = time.time() - began, best
    if ranks.main:
        save_soft_prompt(out, chosen[0])
        with torch.no_grad():
            for p, x in zip(moved, chosen):
                p.copy_(x)
        if ids:
            items.save_items(lm, out)
        if adapter:
            adapter.save_pretrained(out / "adapter")
        result = {
            "chance": 1 / cfg.C,
            "n_ta": len(val_ta),
            "n_rps": len(val_rps),
            "before": before,
            "after": after,
            "best_step": best_step,
        }
        write_json(out / "metrics.json", result)
        record |= {
            "settings": settings,
            "backbone": backbone,
            "backbone_run": str(teacher_folder),
            "backbone_digest": settings["backbone_digest"],
            "lm_share": round(sum(lm_seconds.values()) / seconds, 3),
            "calibration": 0.0,
            "soft_prompt": str(folder),
        }
        finish_run(folder, record)
        print(
            f"\nStage 1, {backbone} -> {cfg.k} vectors of {cfg.llm}; accuracy on {len(val)} "
            f"validation samples, {cfg.C} candidates, chance {1 / cfg.C:.3f}"
        )
        for task, prompts in tasks.items():
            print(
                f"  {task.upper():4} before {before[task]:.3f}  after {after[task]:.3f}   "
                f"(n={len(prompts)})"
            )
        print(
            f"  {prompts_seen / lm_seconds['steps']:.2f} prompts/s in training, "
            f"{100 * record['lm_share']:.0f} % of the time in the LM"
        )
        print(
            json.dumps(
                {
                    "stage": "distill",
                    "out": str(folder),
                    "chance": round(1 / cfg.C, 4),
                    **{
                        f"{t}_{w}": round(d[t], 4)
                        for t in tasks
                        for w, d in (("before", before), ("after", after))
                    },
                    "samples_per_second": round(prompts_seen / lm_seconds["steps"], 2),
                    "lm_share": record["lm_share"],
                    "seconds": record["seconds"],
                    "peak_gb": round(peak_gb(), 2),
                }
            )
        )
    finish(ranks)


if __name__ == "__main__":
    main()
