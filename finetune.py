"""Stage 2 of DELRec: fine-tune the LM with AdaLoRA, the soft prompt fixed, to rank titles.

    python finetune.py --dataset ml-100k                             one process, CPU or GPU
    torchrun --nproc_per_node=10 finetune.py --dataset beauty        many GPUs, the same answer
    python finetune.py --samples 64 --val-samples 32                 minutes on a CPU, to see it run
    python finetune.py --paper                                       the paper's own choices
    python finetune.py --input ids --soft-prompt ml-100k/prompt-ids  items as vectors, stage 1 too
    python finetune.py --input ids --out ml-100k/e4srec              items as vectors, no stage 1
    python finetune.py --teacher ml-100k/e4srec --layers 6 --out ml-100k/slmrec
                                                                     a small LM taught by it

Paper: arXiv 2406.11156, section IV-C.

Reads data/<dataset>/ and runs/<dataset>/prompt/. Writes runs/<dataset>/delrec/: adapter/,
soft_prompt.safetensors, scores_val_15.npy, neutral.npy, log.jsonl, config.json; with --input ids or
hybrid items.safetensors; with --layers lm/, what is left of the LM. evaluate.py --ckpt
runs/<dataset>/delrec then scores the test part.

--input ids is E4SRec (arXiv 2312.02443), hybrid LLaRA (arXiv 2312.02445). --teacher is SLMRec
(arXiv 2405.17890, section 4): student and teacher are cut into b blocks each. With x_t^j, x_s^j
their states after block j where the LM is read,

    L = L_ce + l1 (1 - mean_j cos(x_t^j, x_s^j)) + l2 mean_j ||x_t^j - x_s^j||^2
        + l3 mean_{j<b} CE(y, softmax(E W_j x_s^j)).
"""

import hashlib
import json
import time
from types import SimpleNamespace

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
from delrec.data.prepared import (
    batch_of,
    candidates,
    histories,
    load_data,
    subset,
    with_lists,
)
from delrec.lm import items, slmrec, windows
from delrec.lm.layers import adapt_modules, checkpoint_layers, decoder_layers, prune, tap
from delrec.lm.listed import backbone_digest, say_if_another
from delrec.lm.model import load_lm, located
from delrec.lm.ranker import (
    calibrate,
    listing,
    make_ranker,
    neutral_scores,
    open_run,
    score_samples,
)
from delrec.lm.reading import read_examples, read_prefix
from delrec.lm.soft_prompt import load_soft_prompt, save_soft_prompt
from delrec.lm.text import digest, fingerprint, random_soft_prompt, width
from delrec.lm.verbalizers import score, verbalise
from delrec.metrics import chance, compare, metrics
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
    settle,
    stop,
    whole_or_auto,
    write_npy,
)
from delrec.training import checkpoints
from delrec.training.log import Log, cut_log
from delrec.training.memory import largest_micro, peak_gb

PARTS = ("candidates", "titles", "cos", "norm", "ms")  # of the loss
# what --paper sets: DELRec's own choices (section V); our defaults, chosen by validation on
# ml-100k, are in the options below
PAPER = dict(
    history=10,
    verbalizer="mean",
    show=True,
    order="shuffled",
    loss="candidates",
    adapt="qv",
    lr=1e-4,
    calibrate=False,
)


def orthogonality(adapter):
    """AdaLoRA's penalty: mean over all A and B of ||A A^T - I||_F (arXiv 2303.10512, eq. 4),
    same-shaped matrices in one batch.
    """
    by_shape = {}
    for name, p in adapter.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            w_rd = p if "lora_A" in name else p.T
            by_shape.setdefault(w_rd.shape, []).append(w_rd)
    norms = []
    for group in by_shape.values():
        w_Nrd = torch.stack(group)
        norms.append(
            (w_Nrd @ w_Nrd.mT - torch.eye(w_Nrd.shape[1], device=w_Nrd.device))
            .flatten(1)
            .norm(dim=1)
        )
    return torch.cat(norms).mean()


def active_rank(adapter):
    """Singular values that AdaLoRA keeps, over all adapted layers.

    Not those that differ from zero: Lion moves by multiples of the learning rate, so a kept one
    stands at exactly 0 now and then.
    """
    kept = adapter.peft_config["default"].rank_pattern
    return (
        sum(map(sum, kept.values()))
        if kept
        else sum(len(p) for n, p in adapter.named_parameters() if "lora_E" in n)
    )


# ---------------------------------------------------------------- training samples


def examples(r, cfg, which, done):
    """Training samples (places in data.train) as prompts: tail, at (places of history tokens), cand
    (C,), truth (place among them), n_truth (its tokens), target (its item). done: the share of the
    training before each. With --input hybrid a sample shows vectors beside the titles with that
    probability (LLaRA's curriculum, section 3.3): the LM knows titles, and meets vectors step by
    step.
    """
    batch = r.data.train[which]
    listed = np.take_along_axis(
        candidates(r.data, "train", cfg.C, which), listing(r, "train", cfg.C, which), 1
    )
    target = r.data.items[batch].astype(np.int64)
    cand = target[:, None] if cfg.loss == "titles" else listed
    n_truth = r.titles.ptr[target + 1] - r.titles.ptr[target] + (r.lm.kind == "decoder")
    out = []
    for i, h in enumerate(histories(r.data, batch, cfg.history)):
        mixed = (
            cfg.input != "hybrid"
            or np.random.default_rng([cfg.seed, 2, int(which[i])]).random() < done[i]
        )
        tail, at = (r.prompts if mixed else r.plain).history(h[h > 0], listed[i])
        out.append(
            SimpleNamespace(
                tail=tail,
                at=at,
                cand=cand[i],
                truth=int((cand[i] == target[i]).argmax()),
                n_truth=int(n_truth[i]),
                target=target[i : i + 1],
            )
        )
    return out


@click.command(**described(__doc__))
# data
@click.option(
    "--dataset", default="ml-100k", help="name under data/, or a folder written by data/prepare.py"
)
@click.option(
    "--out", default=None, type=str, help="run folder to write; runs/<dataset>/delrec if not given"
)
@click.option(
    "--backbone",
    default=None,
    type=str,
    help="run folder of the conventional model; the soft prompt's own, or runs/<dataset>/sasrec",
)
# model
@click.option(
    "--llm",
    default="smollm2-135m",
    help="Hugging Face id or folder; smollm2-135m is fetched by itself",
)
@click.option(
    "--soft-prompt",
    default=None,
    type=str,
    help="run folder of distill.py; 'none', 'random' (untrained vectors) or 'words' (the "
    "backbone's pattern in words); runs/<dataset>/prompt if not given, with --input ids "
    "none",
)
@click.option(
    "--k",
    default=80,
    type=click.IntRange(1),
    help="vectors of the soft prompt with --soft-prompt random",
)
@click.option(
    "--verbalizer",
    default="letter",
    type=click.Choice(["likelihood", "mean", "first", "letter"]),
    help="how the mask becomes a score per title",
)
@click.option(
    "--show/--no-show",
    default=False,
    help="list the candidates in the prompt (the paper does; --verbalizer letter always)",
)
@click.option(
    "--order",
    default="backbone",
    type=click.Choice(["shuffled", "backbone"]),
    help="order of the listed candidates: as stored, or the backbone's best first",
)
@click.option(
    "--input",
    default="titles",
    type=click.Choice(["titles", "ids", "hybrid"]),
    help="a history item in the prompt: its title; ids: its vector from the backbone, and no "
    "verbalizer but a second map into their space (E4SRec); hybrid: title and vector "
    "(LLaRA)",
)
@click.option(
    "--maps",
    default=None,
    type=str,
    help="with --input ids or hybrid: run whose maps between items' vectors and the LM these "
    "begin as; those of --soft-prompt, if it was distilled with --input ids",
)
@prompt_options
# a small LM
@click.option(
    "--layers",
    default=None,
    type=click.IntRange(1),
    help="leave only the first so many layers of the LM; the run's lm/ holds what is left",
)
@click.option(
    "--teacher",
    default=None,
    type=str,
    help="run of finetune.py that teaches this LM (SLMRec); its prompts are used",
)
@click.option(
    "--blocks",
    default=None,
    type=click.IntRange(1),
    help="blocks that teacher and student are cut into, b; the most up to 4 that divide both",
)
@click.option(
    "--lambda-cos",
    default=None,
    type=click.FloatRange(0),
    help="weight l1 of the states' direction; 1 with a teacher (the paper's)",
)
@click.option(
    "--lambda-norm",
    default=None,
    type=click.FloatRange(0),
    help="weight l2 of the states' squared distance; 1e-4 with a teacher (paper: .1)",
)
@click.option(
    "--lambda-ms",
    default=None,
    type=click.FloatRange(0),
    help="weight l3 of the inner blocks' own predictions; .1 with a teacher (paper: .01 to 1); "
    "needs none",
)
# AdaLoRA
@click.option(
    "--adapt",
    default="qv",
    type=click.Choice(["qv", "linear"]),
    help="adapt the attention's q and v (the paper), or every linear layer",
)
@click.option("--init-r", default=12, type=click.IntRange(2), help="rank each layer starts with")
@click.option(
    "--target-r", default=8, type=click.IntRange(1), help="mean rank left after reallocation"
)
@click.option("--alpha", default=32, type=click.IntRange(1), help="scale of the adapters")
@click.option(
    "--dropout",
    default=0.05,
    type=click.FloatRange(0, 0.95),
    help="dropout in front of the adapters",
)
@click.option("--orthogonal", default=0.5, help="weight of AdaLoRA's orthogonality term")
# training
@click.option(
    "--loss",
    default="candidates",
    type=click.Choice(["titles", "candidates", "both"]),
    help="candidates: cross-entropy over C scores (the paper); titles: next-title language "
    "modelling on every title in the prompt",
)
@click.option(
    "--samples",
    default=None,
    type=click.IntRange(1),
    help="training samples to see; 1600, with --input ids (a sample is a window of items, each "
    "of which is predicted) 12288",
)
@click.option(
    "--candidates",
    "C",
    default=15,
    type=click.IntRange(2),
    help="candidates of a prompt, the truth among them",
)
@click.option(
    "--batch",
    default=16,
    type=click.IntRange(1),
    help="samples of an optimiser step, over all processes",
)
@click.option(
    "--micro",
    default=None,
    callback=whole_or_auto,
    help="samples of a forward pass, 8, with --input ids 16; smaller needs less memory and "
    "gives the same gradient; auto: as many as memory holds",
)
@memory_options
@click.option(
    "--lr", default=3e-3, type=click.FloatRange(0, min_open=True), help="peak learning rate of Lion"
)
@click.option(
    "--lr-maps",
    default=1e-3,
    type=click.FloatRange(0, min_open=True),
    help="that of the maps between items' vectors and the LM, and of --lambda-ms",
)
@click.option(
    "--lr-prompt",
    default=0.0,
    type=click.FloatRange(0),
    help="that of the soft prompt; 0: it stays as distill.py left it (the paper; above 0: its "
    "variant w ULSR)",
)
@click.option("--weight-decay", default=1e-6, help="weight decay of Lion")
@click.option("--warmup", default=0.05, help="share of the steps with rising learning rate")
@click.option("--seed", default=0, type=click.IntRange(0), help="seed of everything random")
# validation
@click.option(
    "--val-samples",
    default=None,
    type=click.IntRange(0),
    help="validation samples that choose the best step and the calibration; 200, with --input "
    "ids 1000; 0 = all",
)
@click.option(
    "--evals",
    default=3,
    type=click.IntRange(1),
    help="validations during training, the last after the last step",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    help="subtract w times the title's score under an empty history, w chosen on validation "
    "(nothing to subtract from letters)",
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
    """Stage 2: AdaLoRA on the LM with the soft prompt fixed."""
    cfg, typed = settled(ctx, config, PAPER)
    if cfg.target_r >= cfg.init_r:
        stop(
            f"--target-r {cfg.target_r} must be below --init-r {cfg.init_r}: AdaLoRA has nothing "
            "to reallocate otherwise"
        )
    if cfg.maps and cfg.teacher:
        stop("--maps and --teacher both say what the maps begin as; leave one of them out")
    ranks, cfg.resume = setup(cfg.seed), cfg.resume or restarted()
    cfg.llm = located(cfg.llm)
    data = load_data(cfg.dataset)
    folder = folder_of("runs", cfg.out or f"{data.folder_name}/delrec")
    claim(folder, cfg, ranks)

    # what the input and the teacher settle
    teacher_run = slmrec.teacher_of(cfg, typed, data) if cfg.teacher else None
    for name, titles, ids in (
        ("history", 10, 20),
        ("samples", 1600, 12288),
        ("val_samples", 200, 1000),
        ("micro", 8, 16),
    ):
        if getattr(cfg, name) is None:
            setattr(cfg, name, ids if cfg.input == "ids" else titles)
    steps = max(cfg.samples // cfg.batch, 1)
    if steps < 5:
        stop(
            f"--samples {cfg.samples} with --batch {cfg.batch} is {steps} steps; AdaLoRA needs at "
            "least 5 to reallocate its ranks"
        )
    for name, value in (("lambda_cos", 1.0), ("lambda_norm", 1e-4), ("lambda_ms", 0.1)):
        if getattr(cfg, name) is None:
            setattr(cfg, name, value if cfg.teacher else 0.0)
    if (cfg.lambda_cos or cfg.lambda_norm) and not cfg.teacher:
        stop(
            "--lambda-cos and --lambda-norm compare with a teacher, but there is no --teacher; "
            "name one or leave them out"
        )
    # every item is scored from one state, in the space of the vectors
    if cfg.input == "ids":
        if given := sorted(typed & {"verbalizer", "show", "order", "calibrate", "loss", "paper"}):
            stop(
                f"--{given[0]} is about titles, --input ids scores all items by their vectors; "
                "leave one of them out"
            )
        cfg.verbalizer, cfg.show, cfg.order, cfg.calibrate, cfg.loss, cfg.soft_prompt = (
            "items",
            False,
            "shuffled",
            False,
            "candidates",
            cfg.soft_prompt or "none",
        )
    if cfg.loss != "candidates" and (cfg.input == "hybrid" or cfg.teacher or cfg.lambda_ms):
        stop(
            f"--loss {cfg.loss} reads every title token of the history; --input hybrid, --teacher "
            "and --lambda-ms need --loss candidates"
        )
    if cfg.verbalizer == "likelihood" and (cfg.teacher or cfg.lambda_ms):
        stop(
            "--verbalizer likelihood reads a state per title token, teacher and student are "
            "compared at one: use --verbalizer mean, first or letter"
        )

    # LM, soft prompt, samples
    prompt_run = load_prompt_run(cfg, data)
    if (
        prompt_run
        and prompt_run.stage == "distill"
        and getattr(prompt_run, "lr_lm", 0)
        and cfg.llm == located(prompt_run.llm)
    ):
        cfg.llm = str(prompt_run.folder)  # w UDPSM: the LM that stage 1 moved
    lm = load_lm(cfg.llm, ranks.device, shard=cfg.shard and not cfg.layers, checked=cfg.check_llm)
    if prompt_run:
        if cfg.input == "titles" and prompt_run.settings.get("input") == "ids":
            stop(
                f"{prompt_run.folder} was distilled on item vectors, --input is titles; name one "
                "that was distilled on titles, or use --input ids"
            )
        if cfg.backbone and folder_of("runs", cfg.backbone) != folder_of(
            "runs", prompt_run.backbone_run
        ):
            stop(
                f"{prompt_run.folder} was distilled from {prompt_run.backbone_run}, --backbone is "
                f"{cfg.backbone}; leave --backbone out, or distil from it"
            )
        P = load_soft_prompt(prompt_run.folder, lm)
        if prompt_run.stage == "distill" and cfg.llm not in (
            located(prompt_run.llm),
            str(prompt_run.folder.resolve()),
        ):
            stop(
                f"{prompt_run.folder} was distilled for {prompt_run.llm}, --llm is {cfg.llm}; "
                "distil it again with this LM"
            )
    else:
        P = random_soft_prompt(lm, cfg.k, cfg.seed) if cfg.soft_prompt == "random" else None
    if (
        cfg.maps is None
        and cfg.input != "titles"
        and prompt_run
        and prompt_run.stage == "distill"
        and prompt_run.settings.get("input") == "ids"
    ):
        cfg.maps = str(prompt_run.folder)
    elif cfg.maps:
        if cfg.input == "titles":
            stop(
                "--maps begins the maps of item vectors, but --input is titles; use --input ids or "
                "hybrid, or leave --maps out"
            )
        cfg.maps = str(load_run(cfg.maps, data, stages=["distill", "finetune"]).folder)
    if cfg.lr_prompt and P is None:
        stop(
            f"--lr-prompt {cfg.lr_prompt} trains the soft prompt, but --soft-prompt is "
            f"{cfg.soft_prompt}; name one, or leave --lr-prompt out"
        )
    P_before = None if P is None else P.clone()
    # of the LM as it was loaded: the adapters come later
    made_with = checkpoints.made_with(cfg, data, ranks, lm.identity) | (
        {"soft_prompt": digest(P)} if P is not None else {}
    )
    backbone_run = cfg.backbone or (
        prompt_run.backbone_run if prompt_run else folder_of("runs", f"{data.folder_name}/sasrec")
    )
    settings = {
        k: getattr(cfg, k)
        for k in ("verbalizer", "show", "order", "history", "max_title", "max_tokens")
    }
    settings |= {
        "backbone": prompt_run.settings["backbone"]
        if prompt_run
        else backbone_name(backbone_run, data),
        "backbone_run": str(folder_of("runs", backbone_run)),
        "input": cfg.input,
        "words": cfg.soft_prompt == "words",
        "allow_unknown": cfg.allow_unknown,
        "backbone_digest": backbone_digest(folder_of("runs", backbone_run)),
    }
    if settings["backbone_digest"]:
        made_with["backbone_digest"] = settings["backbone_digest"]
    for run in filter(None, (prompt_run, teacher_run)):
        say_if_another(run, ranks)
    # windows of items, each of which predicts the one after it
    if cfg.input == "ids" and lm.kind == "decoder":
        first_n, last_n = windows.draw_windows(data, cfg.history, steps * cfg.batch, cfg.seed)
        sample_of = last_n  # places in data.items
        is_target = np.zeros(len(data.items), bool)
        is_target[data.train] = True

        def examples_of(r, at):
            return windows.window_prompts(r, first_n[at], last_n[at], is_target)

        n_reads = (batch_of(data, first_n, last_n, cfg.history, is_target)[1] != 0).sum(1)
    else:
        order = np.random.default_rng([cfg.seed, 1]).permutation(
            with_lists(settings["backbone_run"], data)
            if cfg.order == "backbone"
            else len(data.train)
        )
        order = np.resize(order, steps * cfg.batch)
        sample_of = data.train[order]

        def examples_of(r, at):
            return examples(r, cfg, order[at], at / len(order))

        n_reads = np.ones(len(order), int)

    # the small LM, its teacher, the items' vectors
    if cfg.layers:
        prune(lm, cfg.layers)
    teacher, blocks = None, 0
    if cfg.teacher:
        teacher, _ = open_run(teacher_run, data, ranks.device, cfg.shard)
        if teacher.lm.tok.get_vocab() != lm.tok.get_vocab() or width(teacher.lm) != width(lm):
            stop(
                f"the teacher {teacher_run.folder} has another tokenizer or width "
                f"({teacher_run.llm}, {width(teacher.lm)}) than {cfg.llm} "
                f"({width(lm)}); "
                "teacher and student must come from the same LM"
            )
        made_with["teacher"] = hashlib.sha256(
            (teacher_run.folder / "adapter" / "adapter_model.safetensors").read_bytes()
        ).hexdigest()[:16]
    if cfg.teacher or cfg.lambda_ms:
        blocks = slmrec.blocks_of(
            [len(decoder_layers(m)[2]) for m in ([teacher.lm, lm] if teacher else [lm])],
            cfg.blocks,
        )
        tap(lm, blocks)
    maps = torch.nn.ModuleDict()
    if cfg.input != "titles":
        torch.manual_seed(cfg.seed)
        items.load_items(
            lm, settings["backbone_run"], data.n_items, blocks - 1 if cfg.lambda_ms else 0
        )
        maps = lm.items.maps
        if cfg.maps:  # what stage 1 distilled into them
            items.load_maps(lm, cfg.maps, data.n_items)
        # ours: the maps begin as the teacher's, whose states the student is to meet
        if teacher:
            maps.load_state_dict({**maps.state_dict(), **teacher.lm.items.maps.state_dict()})
            lm.items.E = teacher.lm.items.E
    elif cfg.lambda_ms:
        # W_j: into the states the head reads; begins as the identity
        maps = torch.nn.ModuleDict(
            {f"block{j}": torch.nn.Linear(width(lm), width(lm)) for j in range(1, blocks)}
        ).to(ranks.device)
        for W_j in maps.values():
            torch.nn.init.eye_(W_j.weight), torch.nn.init.zeros_(W_j.bias)

    # of a backbone, which may have been trained again meanwhile
    if lm.items is not None:
        made_with["item_vectors"] = digest(lm.items.E)

    modules = adapt_modules(lm, cfg.adapt)  # refused before anything is begun
    out, record = start_run(folder, "finetune", cfg, data, ranks)
    record["llm_fingerprint"] = lm.identity
    if cfg.layers:
        # of what is left of it
        record["llm"], record["llm_fingerprint"] = str(folder / "lm"), fingerprint(lm)
        if ranks.main:
            lm.model.save_pretrained(out / "lm"), lm.tok.save_pretrained(out / "lm")
    if teacher:
        tap(teacher.lm, blocks)
        path, t0 = out / "teacher_states.npy", time.time()
        if ranks.main and not cfg.resume:
            path.unlink(missing_ok=True)
        if ranks.world > 1:
            torch.distributed.barrier()
        states, ptr = slmrec.teacher_states(
            teacher,
            blocks,
            n_reads,
            examples_of,
            16 if cfg.micro == "auto" else cfg.micro,
            path,
            ranks,
        )
        record["states_seconds"], teacher = round(time.time() - t0, 3), None
    r = make_ranker(lm, data, settings, P, cfg.cache_prefix)

    # AdaLoRA: warm at full rank, prune to the budget between tinit and tfinal, go on at the found
    # ranks
    from peft import AdaLoraConfig, get_peft_model

    tinit, tfinal = max(steps // 10, 1), max(steps // 3, 1)
    adapter = get_peft_model(
        lm.model,
        AdaLoraConfig(
            target_modules=modules,
            init_r=cfg.init_r,
            target_r=cfg.target_r,
            lora_alpha=cfg.alpha,
            lora_dropout=cfg.dropout,
            total_step=steps,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=1,
            orth_reg_weight=0.0,
        ),
    )
    if cfg.gradient_checkpointing:
        checkpoint_layers(lm.model)
    adapted = [p for p in adapter.parameters() if p.requires_grad]
    params = adapted + list(maps.parameters()) + ([P.requires_grad_()] if cfg.lr_prompt else [])
    layers = sum("lora_E" in n for n, _ in adapter.named_parameters())
    budget = layers * cfg.target_r
    saver = checkpoints.Saver(out, cfg.checkpoint_every, made_with, ranks)
    found = saver.load() if cfg.resume else None
    checkpoints.listen()
    if ranks.main:
        print(
            f"LM {cfg.llm} ({lm.kind}, {lm.dtype}): {sum(p.numel() for p in params):,} of "
            f"{sum(p.numel() for p in [*lm.model.parameters(), *maps.parameters()]):,} "
            f"parameters train; {layers} layers adapted; ranks {layers * cfg.init_r} -> {budget} "
            f"between step {tinit} and {steps - tfinal} of {steps}"
        )
    groups = [
        (adapted, cfg.lr),
        (list(maps.parameters()), cfg.lr_maps),
        ([P] if cfg.lr_prompt else [], cfg.lr_prompt),
    ]
    optimiser = Lion(
        [{"params": group, "lr": lr} for group, lr in groups if group],
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
    )
    val = subset(len(data.val), cfg.val_samples, cfg.seed)
    val_cand, val_target = candidates(data, "val", cfg.C, val), data.items[data.val[val]]
    best, lm_seconds, began, first, step_seconds = (
        None,
        {"steps": 0.0, "validation": 0.0},
        time.time(),
        0,
        [],
    )
    eval_at = {round(steps * (i + 1) / cfg.evals) - 1 for i in range(cfg.evals)}

    def micro_batch(batch, share, token_share, taught=None):
        """Adds to the gradients what these samples give, `share` of the loss for each read and
        `token_share` for each title token; returns the loss and its parts. taught: the teacher's
        states (N, b, D) at the reads.
        """
        start, parts = read_prefix(lm, r.prompts.prefix, P, r.cache), {}
        # L_ce = - log softmax over all items of E W_out x
        if cfg.input == "ids":
            x_ND = read_examples(lm, start, batch)
            target = torch.as_tensor(windows.targets_of(batch), device=ranks.device)

            def predict(W, x):
                return F.cross_entropy(W(x.float()) @ lm.items.E[1:].T, target - 1, reduction="sum")

            parts["candidates"] = predict(maps["out"], x_ND) * share
        else:
            cand, truth = (
                np.stack([e.cand for e in batch]),
                torch.tensor([e.truth for e in batch], device=ranks.device),
            )
            s_BC = score(
                lm,
                start,
                [e.tail for e in batch],
                cand,
                r.titles,
                cfg.verbalizer,
                [e.at for e in batch] if cfg.loss != "candidates" else None,
            )

            def predict(W, x):
                return F.cross_entropy(
                    verbalise(lm, W(x.float()).to(lm.dtype), cand, r.titles, cfg.verbalizer),
                    truth,
                    reduction="sum",
                )

            # L_titles = - mean log P(token) over the tokens of history titles and of the truth
            if cfg.loss != "candidates":
                s_BC, past_M = s_BC
                n_truth = torch.tensor([e.n_truth for e in batch], device=ranks.device)
                own = (
                    (s_BC[torch.arange(len(batch)), truth] * n_truth).sum()
                    if cfg.verbalizer == "likelihood"
                    else 0.0
                )
                parts["titles"] = -(past_M.sum() + own) * token_share
            # L = - log softmax over the C candidates' scores (section IV-C)
            if cfg.loss != "titles":
                parts["candidates"] = F.cross_entropy(s_BC, truth, reduction="sum") * share
        if taught is not None:  # D_cos and D_norm, means over the blocks
            x_bND, t_bND = (
                torch.stack(lm.tapped).float(),
                taught.to(ranks.device).float().transpose(0, 1),
            )
            parts["cos"] = (
                cfg.lambda_cos
                * (1 - F.cosine_similarity(x_bND, t_bND, dim=2).mean(0)).sum()
                * share
            )
            parts["norm"] = cfg.lambda_norm * (x_bND - t_bND).pow(2).sum(2).mean(0).sum() * share
        if cfg.lambda_ms and blocks > 1:  # L_ms, the mean over the inner blocks
            parts["ms"] = (
                cfg.lambda_ms
                * sum(predict(maps[f"block{j + 1}"], lm.tapped[j]) for j in range(blocks - 1))
                / (blocks - 1)
                * share
            )
        loss = sum(parts.values())
        loss.backward()
        return torch.tensor(
            [loss.item()] + [float(parts[k].detach()) if k in parts else 0.0 for k in PARTS]
        )

    # whole micro-batches are shared among the ranks, each the same whoever has it
    most = -(-cfg.batch // ranks.world)
    if cfg.micro == "auto":
        adapter.train()
        trial = sorted(examples_of(r, np.arange(len(n_reads))[-64:]), key=lambda e: -len(e.tail))
        cfg.micro = largest_micro(
            lambda m: micro_batch(trial[:m], 1 / m, 1),
            [e.tail for e in trial],
            most,
            ranks.device,
            ranks,
        )
    micro = record["micro"] = min(cfg.micro, most)
    start_values, allocator = [p.detach().clone() for p in params], adapter.base_model.rankallocator
    if found:
        first, tensors, state = found
        for i, p in enumerate(params):
            p.data.copy_(tensors[f"param.{i}"])
        checkpoints.restore_optimiser("lion", optimiser, tensors)
        # AdaLoRA's importances, which no state_dict holds
        for name in ("exp_avg_ipt", "exp_avg_unc"):
            setattr(
                allocator,
                name,
                {
                    k.split("/", 1)[1]: t.to(ranks.device)
                    for k, t in tensors.items()
                    if k.startswith(f"{name}/")
                },
            )
        # its keys say that the averages have begun; its values are made anew
        allocator.ipt = dict(allocator.exp_avg_ipt)
        adapter.peft_config["default"].rank_pattern = state["rank_pattern"]
        if state["best"]:
            best = (
                tuple(state["best"][0]),
                state["best"][1],
                [tensors[f"best.{i}"].to(ranks.device) for i in range(len(params))],
                tensors["best.scores"].numpy(),
            )
        lm_seconds, step_seconds = state["lm_seconds"], state["step_seconds"]
        began, record["started"] = began - state["seconds"], record["started"] - state["seconds"]
    cut_log(out, "finetune", first, ranks)
    log = Log(out, steps, "finetune", ranks, done=first)

    for step in range(first, steps):
        at = np.arange(step * cfg.batch, (step + 1) * cfg.batch)
        batch = examples_of(r, at)
        # rows of one pass are padded to the longest: like lengths together
        if not lm.packs:
            long = np.argsort([-len(e.tail) for e in batch], kind="stable")
            batch, at = [batch[x] for x in long], at[long]
        reads = int(n_reads[at].sum())
        tokens = (
            0
            if cfg.loss == "candidates"
            else sum(len(e.at) + e.n_truth * (cfg.verbalizer == "likelihood") for e in batch)
        )

        now = min((step + 1) / max(cfg.warmup * steps, 1), (steps - step) / steps)
        for group, peak in zip(optimiser.param_groups, [lr for group, lr in groups if group]):
            group["lr"] = peak * now
        adapter.train()
        total = torch.zeros(1 + len(PARTS))
        for p in params:
            p.grad = torch.zeros_like(p)  # a rank without work adds zeros
        t0 = time.time()
        for i, own in shares(range(0, cfg.batch, micro), ranks, cfg.shard):
            j = slice(i, i + micro)
            # the same dropout whichever rank draws it
            torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, i]).generate_state(1)[0]))
            taught = (
                torch.from_numpy(states[np.concatenate(slmrec.places(ptr, at[j]))]).view(
                    torch.bfloat16
                )
                if cfg.teacher
                else None
            )
            total += micro_batch(batch[j], own / reads, own / max(tokens, 1), taught)
        if cfg.orthogonal:
            (cfg.orthogonal * orthogonality(adapter) / ranks.world).backward()
        sum_gradients(params, ranks)
        total = sum_over_ranks(total, ranks).tolist()
        stop_unless_finite(params, step + 1, sample_of[at], data, total[0])
        optimiser.step()
        adapter.base_model.update_and_allocate(step + 1)  # reads the gradients
        step_seconds.append(time.time() - t0)

        several = cfg.loss == "both" or cfg.teacher or cfg.lambda_ms
        shown = {"loss": total[0]} | (
            {k: x for k, x in zip(PARTS, total[1:]) if x} if several else {}
        )
        if step in eval_at:
            t0 = time.time()
            score_nC = score_samples(r, "val", val, cfg.C, ranks, name="validate")
            lm_seconds["validation"] += time.time() - t0
            m = metrics(*compare(score_nC, val_cand == val_target[:, None]))
            shown |= {
                "val_hr@1": float(m["hr@1"].mean()),
                "val_ndcg@10": float(m["ndcg@10"].mean()),
            }
            if ranks.main:
                print(
                    f"step {step + 1}: validation HR@1 {shown['val_hr@1']:.3f} NDCG@10 "
                    f"{shown['val_ndcg@10']:.3f} "
                    f"(n={len(val)}, {cfg.C} candidates, chance {1 / cfg.C:.3f}); rank "
                    f"{active_rank(adapter)}",
                    flush=True,
                )
            # the ranks are final once pruning is over; only then is a step a candidate for the best
            if step + 1 >= steps - tfinal and (
                best is None or (shown["val_hr@1"], shown["val_ndcg@10"]) > best[0]
            ):
                best = (
                    (shown["val_hr@1"], shown["val_ndcg@10"]),
                    step + 1,
                    [p.detach().clone() for p in params],
                    score_nC,
                )
        log.step(step + 1, **shown, lr=cfg.lr * now)
        # a forward pass alone is about a third of a step
        if step == 2 and steps > 3:
            forecast(
                step_seconds,
                steps,
                np.median(step_seconds) / cfg.batch * len(val) / 3,
                sum(e > step for e in eval_at),
                ranks,
            )
        if (asked := checkpoints.stop_asked(ranks)) or saver.due(step + 1):
            saver.save(
                step + 1,
                {
                    **{f"param.{i}": p for i, p in enumerate(params)},
                    **checkpoints.optimiser_tensors("lion", optimiser),
                    **{
                        f"{name}/{k}": t
                        for name in ("exp_avg_ipt", "exp_avg_unc")
                        for k, t in getattr(allocator, name).items()
                    },
                    **(
                        {f"best.{i}": p for i, p in enumerate(best[2])}
                        | {"best.scores": torch.as_tensor(best[3])}
                        if best
                        else {}
                    ),
                },
                {
                    "rank_pattern": adapter.peft_config["default"].rank_pattern,
                    "best": best and [best[0], best[1]],
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

    # what must hold: AdaLoRA reallocated its ranks to the budget, the adapter moved, P did not
    if all(torch.equal(p, q) for p, q in zip(adapted, start_values)):
        stop(
            "the adapter did not move from where it began; nothing is saved; raise --lr or "
            "--samples"
        )
    if active_rank(adapter) != budget:
        stop(
            f"AdaLoRA kept rank {active_rank(adapter)} in all, its budget is {budget}; the adapter "
            "is not saved"
        )
    if P is not None and not cfg.lr_prompt and not torch.equal(P, P_before):
        stop(
            "the soft prompt moved during fine-tuning, it must stay as distill.py left it; nothing "
            "is saved"
        )
    _, best_step, weights, score_nC = best
    with torch.no_grad():
        for p, w in zip(params, weights):
            p.copy_(w)
    per_second, lm_share = (
        cfg.batch * steps / lm_seconds["steps"],
        round(sum(lm_seconds.values()) / (time.time() - began), 3),
    )

    # calibration, then the run folder; config.json last
    neutral = (
        neutral_scores(r, ranks, out) if cfg.calibrate else np.zeros(data.n_items + 1, np.float32)
    )
    w = calibrate(score_nC, val_cand, neutral, val_target) if cfg.calibrate else 0.0
    m = metrics(*compare(score_nC - w * neutral[val_cand], val_cand == val_target[:, None]))
    if ranks.main:
        adapter.save_pretrained(out / "adapter")
        if P is not None:
            save_soft_prompt(out, P)
        if cfg.input != "titles":
            items.save_items(lm, out)
        (out / "teacher_states.npy").unlink(missing_ok=True)
        write_npy(out / "neutral.npy", neutral)
        # as the LM said them; NaN where nobody asked
        full_nC = np.full((len(data.val), cfg.C), np.nan, np.float32)
        full_nC[val] = score_nC
        write_npy(out / f"scores_val_{cfg.C}.npy", full_nC)
        record |= {
            "settings": settings,
            "calibration": w,
            "best_step": best_step,
            "rank": [layers * cfg.init_r, active_rank(adapter)],
            "soft_prompt": str(prompt_run.folder) if prompt_run else cfg.soft_prompt,
            "backbone_run": settings["backbone_run"],
            "backbone_digest": settings["backbone_digest"],
            "lm_share": lm_share,
            "samples_per_second": round(per_second, 3),
            "train_seconds": round(lm_seconds["steps"], 3),
        }
        finish_run(folder, record)
        print(
            f"best step {best_step}; ranks reallocated {layers * cfg.init_r} -> "
            f"{active_rank(adapter)}; calibration weight {w}; "
            f"{per_second:.2f} samples/s in training, {100 * record['lm_share']:.0f} % of the time "
            "in the LM"
        )
        print(
            json.dumps(
                {
                    "stage": "finetune",
                    "out": str(folder),
                    "val_hr@1": round(float(m["hr@1"].mean()), 4),
                    "val_ndcg@10": round(float(m["ndcg@10"].mean()), 4),
                    "chance_hr@1": round(chance(cfg.C)["hr@1"], 4),
                    "n_val": len(val),
                    "samples_per_second": round(per_second, 2),
                    "lm_share": record["lm_share"],
                    "seconds": record["seconds"],
                    "peak_gb": round(peak_gb(), 2),
                }
            )
        )
    finish(ranks)


def backbone_name(folder, data):
    """What the prompt calls the conventional model in a run folder, which must be of the same data:
    its split says what it has seen.
    """
    folder = folder_of("runs", folder)
    model = (
        getattr(load_run(folder, data, stages=["train_backbone"]), "model", "sasrec")
        if (folder / "config.json").exists()
        else "sasrec"
    )
    return NAMES.get(model, model)


def load_prompt_run(cfg, data):
    """The distil run whose soft prompt is used, or None for 'none', 'random' and 'words'."""
    if cfg.soft_prompt in ("none", "random", "words"):
        return None
    folder = folder_of("runs", cfg.soft_prompt or f"{data.folder_name}/prompt")
    settle(folder, "config.json")
    if not (folder / "config.json").exists():
        stop(
            f"no soft prompt in {folder}; make it with: python distill.py --dataset {cfg.dataset}"
            + (f" --out {cfg.soft_prompt}" if cfg.soft_prompt else "")
            + "  (or pass --soft-prompt none)"
        )
    return load_run(folder, data, stages=["distill", "finetune"])


if __name__ == "__main__":
    main()
