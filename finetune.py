"""Stage 2 of DELRec: fine-tune the LM with AdaLoRA, the soft prompt fixed, to rank candidate titles.   (arXiv 2406.11156, section IV-C)

    python finetune.py --dataset ml-100k                                  one process, CPU or GPU
    torchrun --nproc_per_node=10 finetune.py --dataset beauty             many GPUs, the same answer
    python finetune.py --dataset ml-100k --samples 64 --val-samples 32    half a minute, to see it run
    python finetune.py --dataset ml-100k --paper                          the paper's choices where ours differ

Reads data/<dataset>/ and runs/<dataset>/prompt/; writes runs/<dataset>/delrec/ (adapter/, soft_prompt.safetensors, scores_val_15.npy,
neutral.npy, log.jsonl, config.json). evaluate.py --ckpt runs/<dataset>/delrec then scores the test part.
"""
import json
import time
from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.nn.functional as F
from lion_pytorch import Lion

import checkpoints
import lm as L
from common import (Log, candidates, compare, cut_log, finish, finish_run, folder_of, forecast, load_data, load_run, metrics, peak_gb, restarted, setup, shares, start_run, stop,
                    stop_unless_finite, subset, sum_gradients, sum_over_ranks, histories, whole_or_auto, with_lists, write_npy, chance)

# what --paper sets: DELRec's own choices (spec sections 2 and 5); our defaults, chosen by validation on ml-100k, are in the options below
PAPER = dict(history=10, verbalizer="mean", show=True, order="shuffled", loss="candidates", adapt="qv", lr=1e-4, calibrate=False)


def adapt_modules(lm, adapt):
    """Names of the linear layers AdaLoRA adapts: the attention's q and v (paper), or every linear layer of the body."""
    qv = ("q_proj", "v_proj", "q", "v", "query", "value")
    head = lm.model.get_output_embeddings()
    names = [n for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
             and (adapt == "linear" or n.split(".")[-1] in qv)]
    if not names:
        stop(f"{lm.name} has no attention projections named {', '.join(qv)}; use --adapt linear")
    return names


def orthogonality(adapter):
    """AdaLoRA's penalty: mean over all A and B of ||A A^T - I||_F (arXiv 2303.10512, eq. 4), same-shaped matrices in one batch."""
    by_shape = {}
    for name, p in adapter.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            w_rd = p if "lora_A" in name else p.T
            by_shape.setdefault(w_rd.shape, []).append(w_rd)
    norms = []
    for group in by_shape.values():
        w_Nrd = torch.stack(group)
        norms.append((w_Nrd @ w_Nrd.mT - torch.eye(w_Nrd.shape[1], device=w_Nrd.device)).flatten(1).norm(dim=1))
    return torch.cat(norms).mean()


def active_rank(adapter):
    """Singular values that AdaLoRA keeps, over all adapted layers. Not those that differ from zero: Lion moves by multiples of the
    learning rate, so a kept one stands at exactly 0 now and then."""
    kept = adapter.peft_config["default"].rank_pattern
    return sum(map(sum, kept.values())) if kept else sum(len(p) for n, p in adapter.named_parameters() if "lora_E" in n)


@click.command(context_settings={"show_default": True})
# data
@click.option("--dataset", default="ml-100k", help="name under data/, or a folder written by data/prepare.py")
@click.option("--out", default=None, type=str, help="run folder to write; runs/<dataset>/delrec if not given")
@click.option("--backbone", default=None, type=str, help="run folder of the conventional model; the soft prompt's own, or runs/<dataset>/sasrec")
# model
@click.option("--llm", default="smollm2-135m", help="Hugging Face id or folder; smollm2-135m is fetched by itself")
@click.option("--soft-prompt", default=None, type=str, help="run folder of distill.py, 'none' or 'random'; runs/<dataset>/prompt if not given")
@click.option("--k", default=80, type=click.IntRange(1), help="vectors of the soft prompt with --soft-prompt random")
@click.option("--verbalizer", default="letter", type=click.Choice(["likelihood", "mean", "first", "letter"]), help="how the mask becomes a score per title")
@click.option("--show/--no-show", default=False, help="list the candidates in the prompt (the paper does)")
@click.option("--order", default="backbone", type=click.Choice(["shuffled", "backbone"]), help="order of the listed candidates: as stored, or the backbone's best first")
@click.option("--history", default=10, type=click.IntRange(1), help="titles of history in a prompt, L")
@click.option("--max-title", default=32, type=click.IntRange(1), help="tokens of a title, longer ones are cut")
@click.option("--max-tokens", default=1024, type=click.IntRange(1), help="tokens of a prompt; the oldest history is dropped to fit")
# AdaLoRA
@click.option("--adapt", default="qv", type=click.Choice(["qv", "linear"]), help="adapt the attention's q and v (the paper), or every linear layer")
@click.option("--init-r", default=12, type=click.IntRange(2), help="rank each layer starts with")
@click.option("--target-r", default=8, type=click.IntRange(1), help="mean rank left after reallocation")
@click.option("--alpha", default=32, type=click.IntRange(1), help="scale of the adapters")
@click.option("--dropout", default=0.05, type=click.FloatRange(0, 0.95), help="dropout in front of the adapters")
@click.option("--orthogonal", default=0.5, help="weight of AdaLoRA's orthogonality term")
# training
@click.option("--loss", default="candidates", type=click.Choice(["titles", "candidates", "both"]),
              help="candidates: cross-entropy over C scores (the paper); titles: next-title language modelling on every title in the prompt")
@click.option("--samples", default=1600, type=click.IntRange(1), help="training samples to see")
@click.option("--candidates", "C", default=15, type=click.IntRange(2), help="candidates of a prompt, the truth among them")
@click.option("--batch", default=16, type=click.IntRange(1), help="samples of an optimiser step, over all processes")
@click.option("--micro", default="8", callback=whole_or_auto, help="samples of a forward pass; smaller needs less memory and gives the same gradient; auto: as many as memory holds")
@click.option("--gradient-checkpointing", is_flag=True, help="keep each layer's input only and compute it again in backward: a third more time, far less memory")
@click.option("--shard", is_flag=True, help="divide the LM's layers among the processes of torchrun (FSDP2), for an LM that does not fit one card; the same numbers, slower")
@click.option("--cache-prefix/--no-cache-prefix", default=True, help="decoder-only LMs: compute the prompt's constant part once per forward pass instead of once per prompt; the same numbers")
@click.option("--lr", default=3e-3, type=click.FloatRange(0, min_open=True), help="peak learning rate of Lion")
@click.option("--weight-decay", default=1e-6, help="weight decay of Lion")
@click.option("--warmup", default=0.05, help="share of the steps with rising learning rate")
@click.option("--seed", default=0, type=click.IntRange(0), help="seed of everything random")
# validation
@click.option("--val-samples", default=200, type=click.IntRange(0), help="validation samples that choose the best step and the calibration; 0 = all")
@click.option("--evals", default=3, type=click.IntRange(1), help="validations during training, the last after the last step")
@click.option("--calibrate/--no-calibrate", default=True, help="subtract w times the title's score under an empty history, w chosen on validation")
# going on
@click.option("--resume", is_flag=True, help="continue from the newest checkpoint of the run folder, as if it had never stopped")
@click.option("--checkpoint-every", default=0, type=click.IntRange(0), help="steps between checkpoints; 0: as often as costs under 5 % of the time")
@click.option("--paper", is_flag=True, help="the paper's choices: " + ", ".join(f"{k}={v}" for k, v in PAPER.items()))
@click.pass_context
def main(ctx, **config):
    """Stage 2: AdaLoRA on the LM with the soft prompt fixed."""
    typed = {k for k in config if ctx.get_parameter_source(k).name == "COMMANDLINE"}
    cfg = SimpleNamespace(**{k: PAPER[k] if config["paper"] and k in PAPER and k not in typed else v for k, v in config.items()})
    if cfg.target_r >= cfg.init_r:
        stop(f"--target-r {cfg.target_r} must be below --init-r {cfg.init_r}: AdaLoRA has nothing to reallocate otherwise")
    ranks, cfg.resume = setup(cfg.seed), cfg.resume or restarted()

    # data, LM, soft prompt
    data = load_data(cfg.dataset)
    out = folder_of("runs", cfg.out or f"{data.name}/delrec")
    prompt_run = load_prompt_run(cfg, data)
    lm = L.load_lm(cfg.llm, ranks.device, shard=cfg.shard)
    if prompt_run:
        P = L.load_soft_prompt(prompt_run.folder, lm)
        if prompt_run.llm != cfg.llm:
            stop(f"{prompt_run.folder} was distilled for {prompt_run.llm}, --llm is {cfg.llm}; distil it again with this LM")
    else:
        P = L.random_soft_prompt(lm, cfg.k, cfg.seed) if cfg.soft_prompt == "random" else None
    P_before = None if P is None else P.clone()
    # of the LM as it was loaded: the adapters come later
    made_with = checkpoints.made_with(cfg, data, ranks, L.fingerprint(lm)) | ({"soft_prompt": L.digest(P)} if P is not None else {})
    backbone_run = cfg.backbone or (prompt_run.backbone_run if prompt_run else folder_of("runs", f"{data.name}/sasrec"))
    settings = {k: getattr(cfg, k) for k in ("verbalizer", "show", "order", "history", "max_title", "max_tokens")}
    settings |= {"backbone": prompt_run.settings["backbone"] if prompt_run else "SASRec", "backbone_run": str(folder_of("runs", backbone_run))}
    r = L.ranker(lm, data, settings, P)
    r.cache = cfg.cache_prefix

    # AdaLoRA: warm at full rank, prune to the budget between tinit and tfinal, go on at the found ranks
    from peft import AdaLoraConfig, get_peft_model
    steps = max(cfg.samples // cfg.batch, 1)
    tinit, tfinal = max(steps // 10, 1), max(steps // 3, 1)
    if steps < 5:
        stop(f"--samples {cfg.samples} with --batch {cfg.batch} is {steps} steps; AdaLoRA needs at least 5 to reallocate its ranks")
    adapter = get_peft_model(lm.model, AdaLoraConfig(
        target_modules=adapt_modules(lm, cfg.adapt), init_r=cfg.init_r, target_r=cfg.target_r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout,
        total_step=steps, tinit=tinit, tfinal=tfinal, deltaT=1, orth_reg_weight=0.0))
    if cfg.gradient_checkpointing:
        L.checkpoint_layers(lm.model)
    params = [p for p in adapter.parameters() if p.requires_grad]
    layers = sum("lora_E" in n for n, _ in adapter.named_parameters())
    budget = layers * cfg.target_r
    record = start_run(out, "finetune", cfg, data, ranks)
    saver = checkpoints.Saver(out, cfg.checkpoint_every, made_with, ranks)
    found = saver.load() if cfg.resume else None
    checkpoints.listen()
    if ranks.main:
        print(f"LM {cfg.llm} ({lm.kind}, {lm.dtype}): {sum(p.numel() for p in params):,} of {sum(p.numel() for p in lm.model.parameters()):,} "
              f"parameters train; {layers} layers adapted; ranks {layers * cfg.init_r} -> {budget} between step {tinit} and {steps - tfinal} of {steps}")
    optimiser = Lion(params, lr=cfg.lr, weight_decay=cfg.weight_decay)

    # the samples, the same on every rank
    order = np.random.default_rng([cfg.seed, 1]).permutation(with_lists(settings["backbone_run"], data) if cfg.order == "backbone" else len(data.train))
    val = subset(len(data.val), cfg.val_samples, cfg.seed)
    val_cand, val_target = candidates(data, "val", cfg.C, val), data.items[data.val[val]]
    best, lm_seconds, began, first, step_seconds = None, {"steps": 0.0, "validation": 0.0}, time.time(), 0, []
    eval_at = {round(steps * (i + 1) / cfg.evals) - 1 for i in range(cfg.evals)}

    def samples_of(which):
        """Training samples as prompts [(tail, places of history tokens)], candidates (n, C), the truth's place among them and its tokens."""
        batch = data.train[which]
        listed = np.take_along_axis(candidates(data, "train", cfg.C, which), L.listing(r, "train", cfg.C, which), 1)
        cand = data.items[batch][:, None].astype(np.int64) if cfg.loss == "titles" else listed
        truth = (cand == data.items[batch][:, None]).argmax(1)
        pairs = [r.prompts.history(h[h > 0], c) for h, c in zip(histories(data, batch, cfg.history), listed)]
        n_truth = r.titles.ptr[data.items[batch] + 1] - r.titles.ptr[data.items[batch]] + (lm.kind == "decoder")
        return pairs, cand, truth, n_truth

    def micro_batch(pairs, cand, truth, n_truth, share, token_share):
        """Adds to the gradients what these samples give, `share` of the loss each and `token_share` each title token; returns the loss and its parts."""
        at = [a for _, a in pairs] if cfg.loss != "candidates" else None
        s_BC = L.score(lm, L.begin(lm, r.prompts.prefix, P, r.cache), [t for t, _ in pairs], cand, r.titles, cfg.verbalizer, at)
        truth, titles_loss, cand_loss = torch.as_tensor(truth, device=ranks.device), torch.zeros(()), torch.zeros(())
        if cfg.loss != "candidates":                      # L_titles = - mean log P(token) over the tokens of history titles and of the truth
            s_BC, past_M = s_BC
            own = (s_BC[torch.arange(len(pairs)), truth] * torch.as_tensor(n_truth, device=ranks.device)).sum() if cfg.verbalizer == "likelihood" else 0.0
            titles_loss = -(past_M.sum() + own) * token_share
        if cfg.loss != "titles":                          # L = - log softmax over the C candidates' scores (spec section 5)
            cand_loss = F.cross_entropy(s_BC, truth, reduction="sum") * share
        loss = titles_loss + cand_loss
        loss.backward()
        return torch.tensor([loss.item(), cand_loss.item(), titles_loss.item()])

    most = -(-cfg.batch // ranks.world)                  # whole micro-batches are shared among the ranks, each the same whoever has it
    if cfg.micro == "auto":
        adapter.train()
        trial = samples_of(order[:64])
        longest = sorted(range(len(trial[0])), key=lambda x: -len(trial[0][x][0]))
        cfg.micro = L.largest_micro(lambda m: micro_batch([trial[0][x] for x in longest[:m]], *(part[longest[:m]] for part in trial[1:]), 1 / m, 1),
                                    [t for t, _ in trial[0]], most, ranks.device, ranks)
    micro = record["micro"] = min(cfg.micro, most)
    start_values, allocator = [p.detach().clone() for p in params], adapter.base_model.rankallocator
    if found:
        first, tensors, state = found
        for i, p in enumerate(params):
            p.data.copy_(tensors[f"param.{i}"])
        checkpoints.restore_optimiser("lion", optimiser, tensors)
        for name in ("exp_avg_ipt", "exp_avg_unc"):           # AdaLoRA's importances, which no state_dict holds
            setattr(allocator, name, {k.split("/", 1)[1]: t.to(ranks.device) for k, t in tensors.items() if k.startswith(f"{name}/")})
        allocator.ipt = dict(allocator.exp_avg_ipt)           # its keys say that the averages have begun; its values are made anew
        adapter.peft_config["default"].rank_pattern = state["rank_pattern"]
        if state["best"]:
            best = (tuple(state["best"][0]), state["best"][1], [tensors[f"best.{i}"].to(ranks.device) for i in range(len(params))], tensors["best.scores"].numpy())
        lm_seconds, step_seconds = state["lm_seconds"], state["step_seconds"]
        began -= state["seconds"]
    cut_log(out, "finetune", first, ranks)
    log = Log(out, steps, "finetune", ranks, done=first)

    for step in range(first, steps):
        which = np.resize(order, (step + 1) * cfg.batch)[step * cfg.batch:]
        pairs, cand, truth, n_truth = samples_of(which)
        if not lm.packs:                                      # rows of one pass are padded to the longest: like lengths together
            long = np.argsort([-len(tail) for tail, _ in pairs], kind="stable")
            pairs, cand, truth, n_truth = [pairs[x] for x in long], cand[long], truth[long], n_truth[long]
        tokens = sum(len(at) for _, at in pairs) + int(n_truth.sum()) * (cfg.verbalizer == "likelihood")

        lr = cfg.lr * min((step + 1) / max(cfg.warmup * steps, 1), (steps - step) / steps)
        for group in optimiser.param_groups:
            group["lr"] = lr
        adapter.train()
        total = torch.zeros(3)
        for p in params:
            p.grad = torch.zeros_like(p)                      # a rank without work adds zeros
        t0 = time.time()
        for i, own in shares(range(0, cfg.batch, micro), ranks, cfg.shard):
            j = slice(i, i + micro)
            torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, i]).generate_state(1)[0]))   # the same dropout whichever rank draws it
            total += micro_batch(pairs[j], cand[j], truth[j], n_truth[j], own / cfg.batch, own / max(tokens, 1))
        if cfg.orthogonal:
            (cfg.orthogonal * orthogonality(adapter) / ranks.world).backward()
        sum_gradients(params, ranks)
        total = sum_over_ranks(total, ranks).tolist()
        stop_unless_finite(params, step + 1, data.train[which], data, total[0])
        optimiser.step()
        adapter.base_model.update_and_allocate(step + 1)  # reads the gradients
        step_seconds.append(time.time() - t0)

        shown = {"loss": total[0]} | ({"candidates": total[1], "titles": total[2]} if cfg.loss == "both" else {})
        if step in eval_at:
            t0 = time.time()
            score_nC = L.score_samples(r, "val", val, cfg.C, ranks, name="validate")
            lm_seconds["validation"] += time.time() - t0
            m = metrics(*compare(score_nC, val_cand == val_target[:, None]))
            shown |= {"val_hr@1": float(m["hr@1"].mean()), "val_ndcg@10": float(m["ndcg@10"].mean())}
            if ranks.main:
                print(f"step {step + 1}: validation HR@1 {shown['val_hr@1']:.3f} NDCG@10 {shown['val_ndcg@10']:.3f} "
                      f"(n={len(val)}, {cfg.C} candidates, chance {1 / cfg.C:.3f}); rank {active_rank(adapter)}", flush=True)
            # the ranks are final once pruning is over; only then is a step a candidate for the best
            if step + 1 >= steps - tfinal and (best is None or (shown["val_hr@1"], shown["val_ndcg@10"]) > best[0]):
                best = ((shown["val_hr@1"], shown["val_ndcg@10"]), step + 1, [p.detach().clone() for p in params], score_nC)
        log.step(step + 1, **shown, lr=lr)
        if step == 2 and steps > 3:                           # a forward pass alone is about a third of a step
            forecast(step_seconds, steps, np.median(step_seconds) / cfg.batch * len(val) / 3, sum(e > step for e in eval_at), ranks)
        if (asked := checkpoints.stop_asked(ranks)) or saver.due(step + 1):
            saver.save(step + 1, {**{f"param.{i}": p for i, p in enumerate(params)}, **checkpoints.optimiser_tensors("lion", optimiser),
                                  **{f"{name}/{k}": t for name in ("exp_avg_ipt", "exp_avg_unc") for k, t in getattr(allocator, name).items()},
                                  **({f"best.{i}": p for i, p in enumerate(best[2])} | {"best.scores": torch.as_tensor(best[3])} if best else {})},
                       {"rank_pattern": adapter.peft_config["default"].rank_pattern, "best": best and [best[0], best[1]], "lm_seconds": lm_seconds,
                        "step_seconds": step_seconds, "seconds": time.time() - began})
        if asked and step + 1 < steps:
            log.close()
            saver.end(True, step + 1)
    log.close()
    lm_seconds["steps"] = sum(step_seconds)

    # what must hold: AdaLoRA reallocated its ranks to the budget, the adapter moved, P did not
    if all(torch.equal(p, q) for p, q in zip(params, start_values)):
        stop("the adapter did not move from where it began; nothing is saved; raise --lr or --samples")
    if active_rank(adapter) != budget:
        stop(f"AdaLoRA kept rank {active_rank(adapter)} in all, its budget is {budget}; the adapter is not saved")
    if P is not None and not torch.equal(P, P_before):
        stop("the soft prompt moved during fine-tuning, it must stay as distill.py left it; nothing is saved")
    _, best_step, weights, score_nC = best
    with torch.no_grad():
        for p, w in zip(params, weights):
            p.copy_(w)
    per_second, lm_share = cfg.batch * steps / lm_seconds["steps"], round(sum(lm_seconds.values()) / (time.time() - began), 3)

    # calibration, then the run folder; config.json last
    neutral = L.neutral_scores(r, ranks, out) if cfg.calibrate else np.zeros(data.n_items + 1, np.float32)
    w = L.calibrate(score_nC, val_cand, neutral, val_target) if cfg.calibrate else 0.0
    m = metrics(*compare(score_nC - w * neutral[val_cand], val_cand == val_target[:, None]))
    if ranks.main:
        adapter.save_pretrained(out / "adapter")
        if P is not None:
            L.save_soft_prompt(out, P)
        write_npy(out / "neutral.npy", neutral)
        full_nC = np.full((len(data.val), cfg.C), np.nan, np.float32)      # as the LM said them; NaN where nobody asked
        full_nC[val] = score_nC
        write_npy(out / f"scores_val_{cfg.C}.npy", full_nC)
        record |= {"settings": settings, "calibration": w, "best_step": best_step, "rank": [layers * cfg.init_r, active_rank(adapter)],
                   "soft_prompt": str(prompt_run.folder) if prompt_run else cfg.soft_prompt,
                   "backbone_run": settings["backbone_run"], "lm_share": lm_share}
        finish_run(out, record)
        saver.end(False, steps)
        print(f"best step {best_step}; ranks reallocated {layers * cfg.init_r} -> {active_rank(adapter)}; calibration weight {w}; "
              f"{per_second:.2f} samples/s in training, {100 * record['lm_share']:.0f} % of the time in the LM")
        print(json.dumps({"stage": "finetune", "out": str(out), "val_hr@1": round(float(m["hr@1"].mean()), 4),
                          "val_ndcg@10": round(float(m["ndcg@10"].mean()), 4), "chance_hr@1": round(chance(cfg.C)["hr@1"], 4), "n_val": len(val),
                          "samples_per_second": round(per_second, 2), "lm_share": record["lm_share"], "seconds": record["seconds"],
                          "peak_gb": round(peak_gb(), 2)}))
    finish(ranks)


def load_prompt_run(cfg, data):
    """The distil run whose soft prompt is used, or None for 'none' and 'random'."""
    if cfg.soft_prompt in ("none", "random"):
        return None
    folder = folder_of("runs", cfg.soft_prompt or f"{data.name}/prompt")
    if not (folder / "config.json").exists():
        stop(f"no soft prompt in {folder}; make it with: python distill.py --dataset {cfg.dataset}  (or pass --soft-prompt none)")
    return load_run(folder, data, stages=["distill"])


if __name__ == "__main__":
    main()
