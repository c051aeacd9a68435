"""The reported metrics: ranks the stored candidates of the test part by any runs, with intervals, paired tests and floors.

    python evaluate.py --ckpt runs/ml-100k/delrec                                        one run and the floors
    python evaluate.py --ckpt runs/ml-100k/sasrec runs/ml-100k/delrec --limit 400        several, compared pairwise, on 400 samples
    python evaluate.py --llm smollm2-135m --dataset ml-100k --limit 400                  the plain LM, as a run of its own
    torchrun --nproc_per_node=10 evaluate.py --ckpt runs/beauty/delrec                   many GPUs, the same table
    python evaluate.py --ckpt runs/ml-100k/delrec --history "Toy Story (1995) | Aladdin (1992)"     ranked titles for a history
    python evaluate.py --ckpt runs/ml-100k/delrec --serve histories.jsonl                for a file of them
    python evaluate.py --ckpt runs/ml-100k/slmrec --export                               what train_backbone.py --teacher reads

An LM run is scored once and its scores are stored in its folder (scores_test_15.npy, NaN where not asked); backbones bring theirs. So
runs are compared without loading a model. Everything chosen (steps, weights of fusion and calibration) is chosen on validation.
"""
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

from common import (candidates, chance, commit, compare, finish, finish_run, folder_of, histories, load_data, load_run, machine, metrics, read_npy,
                    setup, start_run, stop, subset, users, versions, write_json, write_npy)

SHOWN = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
FULL = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")       # over all items


# ---------------------------------------------------------------- floors (spec section 8)

def popularity(data):
    """Training interactions per item: float32 [I+1]."""
    return np.bincount(data.items[data.train], minlength=data.n_items + 1).astype(np.float32)


def title_similarity(data, samples, cand_nC, L=10, decay=0.8, chunk=1000):
    """TF-IDF cosine of each candidate's title to the history, item j steps ago weighing decay^j: float32 (n, C)."""
    words = [re.findall(r"\w+", t.lower()) for t in data.titles]
    vocab = {w: i for i, w in enumerate(sorted({w for t in words for w in t}))}
    df = np.bincount([vocab[w] for t in words for w in set(t)], minlength=len(vocab))
    T = max(max(map(len, words)), 1)
    id_IT, weight_IT = np.zeros((len(words), T), np.int64), np.zeros((len(words), T), np.float32)
    for i, t in enumerate(words):
        counts = {vocab[w]: t.count(w) for w in t}
        id_IT[i, :len(counts)] = list(counts)
        weight_IT[i, :len(counts)] = [n * math.log((1 + data.n_items) / (1 + df[w])) for w, n in counts.items()]
    weight_IT /= np.maximum(np.linalg.norm(weight_IT, axis=1, keepdims=True), 1e-9)
    out = np.zeros(cand_nC.shape, np.float32)
    for i in range(0, len(samples), chunk):
        old_nL = histories(data, samples[i:i + chunk], L)
        profile = np.zeros((len(old_nL), len(vocab)), np.float32)
        row = np.arange(len(old_nL))[:, None, None]
        np.add.at(profile, (row, id_IT[old_nL]), weight_IT[old_nL] * (decay ** np.arange(L - 1, -1, -1))[None, :, None])
        profile /= np.maximum(np.linalg.norm(profile, axis=1, keepdims=True), 1e-9)
        c = cand_nC[i:i + chunk]
        out[i:i + chunk] = (profile[row, id_IT[c]] * weight_IT[c]).sum(2)
    return out


def standard(x_nC):
    """Each row to mean 0 and deviation 1, so that scores of different kinds can be added."""
    return (x_nC - x_nC.mean(1, keepdims=True)) / np.maximum(x_nC.std(1, keepdims=True), 1e-9)


def fuse(a, b, is_target_val, weights=np.linspace(0, 1, 21)):
    """(1-w) a + w b of two rows' standardised scores with the w that is best on validation (NDCG@10). a, b: (val, test) pairs."""
    def quality(w):
        return metrics(*compare((1 - w) * standard(a[0]) + w * standard(b[0]), is_target_val))["ndcg@10"].mean()
    w = float(max(weights, key=quality))
    return (1 - w) * standard(a[1]) + w * standard(b[1]), w


# ---------------------------------------------------------------- intervals and tests

def interval(value_n, user_n, draws=2000, seed=0):
    """95 % bootstrap interval of the mean, resampling users (a user's samples are not independent)."""
    _, row = np.unique(user_n, return_inverse=True)
    total, count = np.bincount(row, value_n), np.bincount(row)
    rng, means = np.random.default_rng(seed), []
    for _ in range(0, draws, 50):                            # 50 draws at a time: draws x users would not fit for large data
        times = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), 50)
        means.append((times @ total) / (times @ count))
    return np.percentile(np.concatenate(means), [2.5, 97.5])


def paired_t(a_n, b_n, user_n):
    """p of the paired t-test of mean(a) = mean(b), users as clusters (with one sample a user, the ordinary test)."""
    d = np.asarray(a_n - b_n, float)
    _, row = np.unique(user_n, return_inverse=True)
    per_user = np.bincount(row, d - d.mean())
    G = len(per_user)
    se = math.sqrt((per_user ** 2).sum() * G / max(G - 1, 1)) / len(d)
    if G < 2 or se == 0:
        return 1.0 if d.mean() == 0 else 0.0
    t, df = abs(d.mean()) / se, G - 1
    x = np.linspace(0, math.atan(t / math.sqrt(df)), 4001)      # with x = tan(angle) sqrt(df) the density of t is cos(angle)^(df-1)
    y = np.linspace(0, math.pi / 2, 4001)
    return float(max(0.0, 1 - np.trapezoid(np.cos(x) ** (df - 1), x) / np.trapezoid(np.cos(y) ** (df - 1), y)))


def mcnemar(hit_a, hit_b):
    """p of the exact McNemar test of two 0/1 columns: the binomial test of the samples on which only one of them is right."""
    only_a, only_b = int((hit_a & ~hit_b).sum()), int((~hit_a & hit_b).sum())
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    log_p = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)]
    return min(1.0, 2 * sum(map(math.exp, log_p)))


# ---------------------------------------------------------------- scores of runs

def scores_of(run, data, split, which, C, ranks, opened, spent, shard=False):
    """The run's scores (n, C) of the samples `which` of a split; what is not in its folder yet is computed and stored there, its
    prompts and seconds added to spent."""
    path, cand = run.folder / f"scores_{split}_{C}.npy", candidates(data, split, C)
    have = np.array(read_npy(path, cand.shape)) if path.exists() else np.full(cand.shape, np.nan, np.float32)
    missing = which[~np.isfinite(have[which]).all(1)]
    if len(missing):
        if run.stage == "train_backbone":
            stop(f"{path} lacks {len(missing)} samples; train the backbone again: its scores are written at the end of train_backbone.py")
        import lm as L
        if run.folder not in opened:
            opened.clear()                                   # one LM in memory at a time
            opened[run.folder] = L.open_run(run, data, ranks.device, shard)
        r, penalty_I = opened[run.folder]
        began, name = time.time(), f"{run.folder.name} {split}"
        if split == "test" and L.reads_all(r):               # the whole catalogue comes with it
            have[missing], full = L.score_and_rank(r, split, missing, C, ranks, penalty_I, name)
            keep_full(run.folder / "full_test.npy", len(cand), missing, full, ranks)
        else:
            have[missing] = L.score_samples(r, split, missing, C, ranks, name=name)
        spent += np.array([len(missing), time.time() - began])
        if ranks.main:
            write_npy(path, have)
    penalty = 0.0
    if getattr(run, "calibration", 0):
        if not (run.folder / "neutral.npy").exists():
            stop(f"{run.folder} lacks neutral.npy, which its config.json says it was calibrated with; train it again")
        penalty = run.calibration * read_npy(run.folder / "neutral.npy", (data.n_items + 1,))[cand[which]]
    return have[which] - penalty


def keep_full(path, n, which, full, ranks):
    """Store ranks over the catalogue (greater, equal) beside those there already; -1 where nobody asked."""
    if ranks.main:
        whole = np.array(read_npy(path, (n, 2))) if path.exists() else np.full((n, 2), -1, np.int32)
        whole[which] = full
        write_npy(path, whole)


def plain_lm(cfg, data, ranks, spent):
    """--llm: the LM without any training, as a run folder runs/<dataset>/lm (calibration chosen on validation)."""
    import lm as L
    out = folder_of("runs", f"{data.name}/lm")
    lm = L.load_lm(cfg.llm, ranks.device, shard=cfg.shard)
    settings = {"verbalizer": cfg.verbalizer, "show": cfg.show, "order": "shuffled", "backbone_run": "", "history": cfg.prompt_history, "max_title": 32, "max_tokens": 1024, "backbone": ""}
    r = L.ranker(lm, data, settings)
    record = start_run(out, "lm", SimpleNamespace(llm=cfg.llm, C=cfg.C, val_samples=cfg.val_samples), data, ranks)
    neutral = L.neutral_scores(r, ranks) if cfg.calibrate else np.zeros(data.n_items + 1, np.float32)
    val, cand = subset(len(data.val), cfg.val_samples, 0), candidates(data, "val", cfg.C)
    full = np.full(cand.shape, np.nan, np.float32)
    began = time.time()
    full[val] = L.score_samples(r, "val", val, cfg.C, ranks, name="lm val")
    spent += np.array([len(val), time.time() - began])
    weight = L.calibrate(full[val], cand[val], neutral, data.items[data.val[val]]) if cfg.calibrate else 0.0
    if ranks.main:
        for old in (*out.glob("scores_*.npy"), *out.glob("full_*.npy")):
            old.unlink()
        write_npy(out / "neutral.npy", neutral)
        write_npy(out / f"scores_val_{cfg.C}.npy", full)
        finish_run(out, record | {"settings": settings, "calibration": weight, "soft_prompt": "none"})
    if ranks.world > 1:
        torch.distributed.barrier()
    return load_run(out, data), (r, weight * neutral)


def notes(run):
    """What a row's run chose, where it differs from the paper."""
    if run.stage == "train_backbone":
        return f"{run.loss} loss" + (f", taught by {Path(run.teacher).name} (lam {run.lam}, eta {run.eta})" if getattr(run, "teacher", None) else "")
    s = run.settings
    if s.get("input") == "ids":
        parts = ["items as vectors, all scored at once", f"L={s['history']}"]
    else:
        parts = [s["verbalizer"], f"candidates listed in {s['order']} order" if s["show"] or s["verbalizer"] == "letter" else "candidates not listed", f"L={s['history']}"]
    if s.get("input") == "hybrid":
        parts.insert(0, "titles and vectors")
    if run.stage == "finetune":
        if getattr(run, "layers", None):
            parts.append(f"{run.layers} layers" + (f", taught by {Path(run.teacher).name}" if run.teacher else ", no teacher"))
        parts += [f"loss {run.loss}", f"AdaLoRA on {run.adapt}", f"{run.samples} samples",
                  f"soft prompt {Path(run.soft_prompt).name if run.soft_prompt else 'none'}"]
    if getattr(run, "calibration", 0):
        parts.append(f"calibration {run.calibration}")
    return ", ".join(parts)


# ---------------------------------------------------------------- the table

@click.command(context_settings={"show_default": True})
@click.option("--ckpt", multiple=True, help="run folder, or its name under runs/; more may follow it")
@click.argument("more", nargs=-1)
@click.option("--dataset", default=None, type=str, help="needed with --llm alone; else the runs' own")
@click.option("--candidates", "C", default=15, help="which stored candidates to rank")
@click.option("--limit", default=0, type=click.IntRange(0), help="test samples, the same ones for every run (with --export: training samples); 0 = all")
@click.option("--out", default=None, type=str, help="folder of metrics.json, table.txt, table.png; the last run's if not given")
@click.option("--shard", is_flag=True, help="divide the LM's layers among the processes of torchrun (FSDP2), for an LM that does not fit one card; the same numbers, slower")
# the plain LM
@click.option("--llm", default=None, type=str, help="adds the row of this LM without any training")
@click.option("--verbalizer", default="likelihood", type=click.Choice(["likelihood", "mean", "first", "letter"]), help="of the plain LM")
@click.option("--show/--no-show", default=False, help="plain LM: list the candidates in the prompt")
@click.option("--prompt-history", default=10, type=click.IntRange(1), help="plain LM: titles of history in the prompt")
@click.option("--calibrate/--no-calibrate", default=True, help="plain LM: subtract w times the title's score under an empty history")
@click.option("--val-samples", default=200, type=click.IntRange(0), help="validation samples for the weights of the plain LM and of fusion; 0 = all")
# one history
@click.option("--history", default=None, type=str, help="titles with ' | ' between them, oldest first: print ranked titles instead of a table")
@click.option("--top", default=10, type=click.IntRange(1), help="with --history and --serve: how many titles")
@click.option("--serve", "file", default=None, type=str, help="a file of histories, one JSON object a line: {\"history\": [\"title\", ..]}; answers go to --out, or beside the file")
@click.option("--pool", default=100, type=click.IntRange(0), help="with --history and --serve: an LM that cannot score the catalogue in one pass ranks the backbone's best so many items; 0 = all")
# a teacher
@click.option("--export", is_flag=True, help="write RUN/export/ for train_backbone.py --teacher: best items of every training sample (or --limit), confidence, title vectors")
@click.option("--export-k", default=10, type=click.IntRange(1), help="with --export: items listed for a sample, K")
def main(**config):
    """Metrics with intervals, paired tests and floors for any runs; or ranked titles for one history."""
    cfg = SimpleNamespace(**config)
    names = [*cfg.ckpt, *cfg.more]
    if not names and not cfg.llm:
        stop("nothing to evaluate; give --ckpt RUN (a run folder) or --llm NAME --dataset NAME")
    ranks = setup(0)
    runs = [load_run(n, stages=["train_backbone", "distill", "finetune", "lm"]) for n in names]
    data = load_data(cfg.dataset or (runs[0].data_folder if runs else "ml-100k"))
    for run in runs:
        load_run(run.folder, data)                           # refuses another data set's run
    if cfg.history is not None or cfg.file or cfg.export:
        import serve
        asked = "--history" if cfg.history is not None else "--serve" if cfg.file else "--export"
        if len(runs) != 1:
            stop(f"{asked} is answered by one run, {len(runs)} were given; pass one --ckpt")
        if cfg.history is not None:
            serve.answer(runs[0], data, cfg.history, cfg.top, cfg.pool, ranks, cfg.shard)
        elif cfg.file:
            serve.serve(runs[0], data, cfg.file, cfg.out, cfg.top, cfg.pool, ranks, cfg.shard)
        elif runs[0].stage == "train_backbone":
            stop(f"{runs[0].folder} is a backbone, --export writes what an LM teaches; pass a run of finetune.py")
        else:
            serve.export(runs[0], data, ranks, cfg.export_k, cfg.limit, cfg.shard)
        return finish(ranks)

    began, spent = time.time(), np.zeros(2)                  # prompts an LM scored, and the seconds that took
    which = subset(len(data.test), cfg.limit, 0)
    val = subset(len(data.val), cfg.val_samples, 0)
    cand = {"val": candidates(data, "val", cfg.C)[val], "test": candidates(data, "test", cfg.C)[which]}
    target = {"val": cand["val"] == data.items[data.val[val]][:, None], "test": cand["test"] == data.items[data.test[which]][:, None]}
    samples = {"val": data.val[val], "test": data.test[which]}
    user = users(data, samples["test"])

    # rows: name -> scores (n, C) on test; the floors first
    rows, note, opened = {}, {}, {}
    rows["chance"], note["chance"] = np.zeros(cand["test"].shape), "constant scores"
    rows["popularity"], note["popularity"] = popularity(data)[cand["test"]], "training interactions of the item"
    similar = tuple(title_similarity(data, samples[s], cand[s]) for s in ("val", "test"))
    rows["title-similarity"], note["title-similarity"] = similar[1], "TF-IDF cosine to the history, L=10, decay .8"
    if cfg.llm:
        plain, opened_plain = plain_lm(cfg, data, ranks, spent)
        opened[plain.folder] = opened_plain
        runs.insert(0, plain)
    chosen, pair, row_of = [], {}, {}                        # rows of runs, for the paired tests; (val, test) scores; run folder -> row

    def add(run):
        name = row_of[run.folder] = run.folder.name if run.folder.name not in rows else str(run.folder)
        pair[name] = tuple(scores_of(run, data, s, w, cfg.C, ranks, opened, spent, cfg.shard) for s, w in (("val", val), ("test", which)))
        rows[name], note[name] = pair[name][1], notes(run)
        chosen.append(name)

    for run in sorted(runs, key=lambda x: ["lm", "train_backbone", "distill", "finetune"].index(x.stage)):
        add(run)

    # the backbone fused with what knows the titles: the last two floors an LM row has to beat
    backbones = [r for r in runs if r.stage == "train_backbone"]
    from_runs = [Path(r.backbone_run) for r in runs if getattr(r, "backbone_run", None)]
    for folder in from_runs + [folder_of("runs", f"{data.name}/sasrec")]:
        if not backbones and (folder / "config.json").exists():
            backbones = [load_run(folder, data)]
            add(backbones[0])
    if backbones:
        base = row_of[backbones[0].folder]
        for other, scores in [("title-similarity", similar)] + [(row_of[r.folder], pair[row_of[r.folder]]) for r in runs if r.stage in ("finetune", "lm")]:
            name = f"{base}+{other}"
            rows[name], w = fuse(pair[base], scores, target["val"])
            note[name] = f"weight of {other} {w:.2f}, chosen on validation"
            chosen.append(name)

    # metrics, intervals, tests
    value = {name: metrics(*compare(s, target["test"])) for name, s in rows.items()}
    low_high = {name: {m: interval(v[m], user) for m in ("hr@1", "ndcg@10")} for name, v in value.items()}
    tests = {}
    for i, a in enumerate(chosen):
        for b in chosen[i + 1:]:
            tests[f"{b} - {a}"] = {"hr@1": float((value[b]["hr@1"] - value[a]["hr@1"]).mean()),
                                   "p_mcnemar_hr@1": mcnemar(value[b]["hr@1"] == 1, value[a]["hr@1"] == 1),
                                   "ndcg@10": float((value[b]["ndcg@10"] - value[a]["ndcg@10"]).mean()),
                                   "p_t_ndcg@10": paired_t(value[b]["ndcg@10"], value[a]["ndcg@10"], user)}
    if not ranks.main:
        return finish(ranks)

    protocol = (f"{data.name} (hash {data.meta['hash']}), {data.meta['split']} split, test part, {len(which)} of {len(data.test)} samples of "
                f"{len(np.unique(user))} users, {cfg.C} stored candidates (target + {cfg.C - 1} uniform from items the user never touched); "
                "ties count as the mean over their orders; [95 % bootstrap interval over users]")
    lines = [protocol, "", f"{'row':<28}{'HR@1':>7} {'':<15}{'HR@5':>7}{'HR@10':>7}{'NDCG@5':>8}{'NDCG@10':>9} {'':<15}{'MRR':>6}  chosen"]
    for name, v in value.items():
        mean, (a, b), (c, d) = {m: float(v[m].mean()) for m in SHOWN}, low_high[name]["hr@1"], low_high[name]["ndcg@10"]
        lines.append(f"{name:<28}{mean['hr@1']:>7.3f} [{a:.3f}, {b:.3f}] {mean['hr@5']:>7.3f}{mean['hr@10']:>7.3f}{mean['ndcg@5']:>8.3f}"
                     f"{mean['ndcg@10']:>9.3f} [{c:.3f}, {d:.3f}]{mean['mrr']:>6.3f}  {note[name]}")
    star = lambda p: (f"p={p:.3g}" if p >= 1e-15 else "p<1e-15") + ("**" if p < .01 else "*" if p < .05 else "")      # no finer: 1 - (1 - p) in fp64
    if tests:
        lines += ["", "paired tests (first minus second): HR@1 by exact McNemar, NDCG@10 by paired t, users as clusters; * p < .05, ** p < .01"]
        lines += [f"{n:<48} HR@1 {t['hr@1']:+.3f} {star(t['p_mcnemar_hr@1']):<12} "
                  f"NDCG@10 {t['ndcg@10']:+.3f} {star(t['p_t_ndcg@10'])}" for n, t in tests.items()]
    full, full_tests = full_ranking(row_of, data, which, user)
    if full:
        lines += ["", f"all {data.n_items} items, history masked, the same samples (chance HR@10 {10 / data.n_items:.4f}):"]
        lines += [f"{name:<28}" + "  ".join(f"{m.upper()} {v[m]:.4f}" for m in FULL) for name, v in full.items()]
    if full_tests:
        lines += ["", "paired tests over all items:"]
        lines += [f"{n:<48} HR@20 {t['hr@20']:+.4f} {star(t['p_mcnemar_hr@20']):<12} NDCG@20 {t['ndcg@20']:+.4f} {star(t['p_t_ndcg@20'])}" for n, t in full_tests.items()]
    print("\n" + "\n".join(lines) + "\n")

    out = Path(cfg.out) if cfg.out else (runs[-1].folder if runs else folder_of("runs", data.name))
    out.mkdir(parents=True, exist_ok=True)
    result = {"protocol": protocol, "n": len(which), "candidates": cfg.C, "hash": data.meta["hash"], "chance": chance(cfg.C), "tests": tests, "full": full, "full_tests": full_tests,
              "rows": {n: {"note": note[n], **{m: float(v[m].mean()) for m in SHOWN}, **{f"{m}_interval": list(map(float, low_high[n][m])) for m in low_high[n]}}
                       for n, v in value.items()}}
    write_json(out / "metrics.json", result)
    (out / "table.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for folder, name in row_of.items():
        ranks_n = np.full(len(data.test), np.nan, np.float32)
        ranks_n[which] = value[name]["rank"]
        write_npy(folder / f"ranks_test_{cfg.C}.npy", ranks_n)
    plot(out / "table.png", value, low_high, cfg.C, len(which), data.name)
    if spent[0]:
        print(f"{spent[0] / spent[1]:.2f} samples/s scored by LMs ({spent[0]:.0f} prompts of {cfg.C} candidates), {100 * spent[1] / (time.time() - began):.0f} % of the time")
    print(f"written: {out / 'metrics.json'}, table.txt, table.png; per-sample ranks in each run folder")
    print(json.dumps({"machine": machine(), "versions": versions(), "commit": commit(), "rows": [
        {"name": f"{m}.{n}", "value": round(float(v[m].mean()), 4), "unit": "", "goal": None} for n, v in value.items() for m in ("hr@1", "ndcg@10")]}))
    finish(ranks)


def popularity_full(data, samples):
    """(greater, equal) of each sample's target in the catalogue by popularity, the user's earlier items masked as for the backbones."""
    count_I, target_n = popularity(data), data.items[samples]
    ranked, own_n = np.sort(count_I[1:]), count_I[target_n]
    above = len(ranked) - np.searchsorted(ranked, own_n, "right")
    level = np.searchsorted(ranked, own_n, "right") - np.searchsorted(ranked, own_n, "left") - 1
    for n, (sample, begin) in enumerate(zip(samples, data.ptr[users(data, samples)])):
        old = np.unique(data.items[begin:sample])
        old = count_I[old[old != target_n[n]]]
        above[n] -= (old > own_n[n]).sum()
        level[n] -= (old == own_n[n]).sum()
    return above, level


def full_ranking(row_of, data, which, user):
    """Metrics over the whole catalogue, for runs that ranked it (full_test.npy: greater, equal, -1: not asked) behind chance and popularity, and
    the paired tests between them."""
    mean = lambda v: {m: float(v[m].mean()) for m in FULL}
    ks, value = (1, 5, 10, 20), {}
    for folder, name in row_of.items():
        if (folder / "full_test.npy").exists():
            greater, equal = read_npy(folder / "full_test.npy", (len(data.test), 2))[which].T
            if greater.min() >= 0:
                value[name] = metrics(greater, equal, ks)
    if not value:
        return {}, {}
    whole = {m: v for m, v in chance(data.n_items, ks).items() if m in FULL}
    tests = {f"{b} - {a}": {"hr@20": float((value[b]["hr@20"] - value[a]["hr@20"]).mean()), "p_mcnemar_hr@20": mcnemar(value[b]["hr@20"] == 1, value[a]["hr@20"] == 1),
                            "ndcg@20": float((value[b]["ndcg@20"] - value[a]["ndcg@20"]).mean()), "p_t_ndcg@20": paired_t(value[b]["ndcg@20"], value[a]["ndcg@20"], user)}
             for i, a in enumerate(value) for b in list(value)[i + 1:]}
    return {"chance": whole, "popularity": mean(metrics(*popularity_full(data, np.asarray(data.test)[which]), ks))} | {name: mean(v) for name, v in value.items()}, tests


def plot(path, value, low_high, C, n, name):
    """HR@1 of every row with its interval, chance as a line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [r for r in value if r != "chance"][::-1]
    mean = np.array([value[r]["hr@1"].mean() for r in rows])
    ends = np.array([low_high[r]["hr@1"] for r in rows])
    fig, ax = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    ax.errorbar(mean, range(len(rows)), xerr=np.abs(ends.T - mean), fmt="o", capsize=3, color="#1f5fa8")
    ax.axvline(1 / C, color="gray", linestyle="--", label=f"chance 1/{C}")
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlim(0, None)
    ax.set_xlabel(f"HR@1 among {C} candidates, {name}, n = {n}, 95 % interval over users")
    fig.legend(loc="outside upper right")
    ax.grid(axis="x", alpha=0.3)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    main()
