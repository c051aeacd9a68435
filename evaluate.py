"""The reported metrics: any runs rank the stored candidates of the test part.

    python evaluate.py --ckpt ml-100k/delrec                         one run and the floors
    python evaluate.py --ckpt ml-100k/sasrec ml-100k/delrec --limit 400
                                                                     several, compared, 400 samples
    python evaluate.py --llm smollm2-135m --dataset ml-100k          the plain LM, a run of its own
    torchrun --nproc_per_node=10 evaluate.py --ckpt beauty/delrec    many GPUs, the same table
    python evaluate.py --ckpt ml-100k/delrec --report out.html       also a page with figures
    python evaluate.py --ckpt ml-100k/delrec --history "Toy Story (1995) | Aladdin (1992)"
                                                                     ranked titles for a history
    python evaluate.py --ckpt ml-100k/delrec --serve histories.jsonl for a file of them
    python evaluate.py --ckpt ml-100k/slmrec --export                for train_backbone.py --teacher
    python evaluate.py --ckpt ml-100k/prompt --probe                 what the soft prompt learnt

The table has intervals, paired tests, and floors that need no training. An LM run is scored once
and its scores are stored in its folder (scores_test_15.npy, NaN where not asked); backbones bring
theirs. So runs are compared without loading a model. Everything chosen (steps, weights of fusion
and calibration) is chosen on validation. Runs named X-s0, X-s1, .. are the seeds of X: the table
also holds their mean and deviation, and tests of the means.
"""

import json
import shlex
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

from common import claim, finish_run, start_run
from delrec.backbone.models import NAMES
from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import (
    candidates,
    histories,
    load_data,
    load_data_of,
    shuffled,
    subset,
    users,
)
from delrec.evaluation import probe, report
from delrec.evaluation.floors import (
    cooccurrence,
    full_ranking_of,
    fuse,
    popularity,
    standard,
    title_similarity,
)
from delrec.evaluation.report import FULL, SHOWN
from delrec.evaluation.stats import difference, interval, over_seeds, unseeded
from delrec.lm import export, listed
from delrec.lm.model import load_lm, located
from delrec.lm.ranker import (
    calibrate,
    make_ranker,
    neutral_scores,
    open_run,
    reads_all,
    score_and_rank,
    score_samples,
)
from delrec.metrics import chance, compare, metrics
from delrec.processes import finish, setup
from delrec.runtime import (
    commit,
    described,
    folder_of,
    is_run,
    load_run,
    machine,
    read_json,
    read_npy,
    settle,
    stop,
    stop_if_replaced,
    versions,
    when,
    write_json,
    write_npy,
)
from delrec.serving.answers import answer_file, answer_history
from delrec.serving.latency import latencies, parameters
from delrec.serving.ranking import ranking

# ---------------------------------------------------------------- scores of runs


def stored(path, empty):
    """What an earlier evaluation wrote, or `empty` where there was none; the shape must be that of
    empty.
    """
    return np.array(read_npy(path, empty.shape)) if path.exists() else empty


def scores_of(run, data, split, which, C, ranks, opened, spent, shard=False, shuffle=False):
    """The run's scores (n, C) of the samples `which` of a split; what is not in its folder yet is
    computed and stored there, its prompts and seconds added to spent. shuffle: as if each history
    had another order.
    """
    path, cand = (
        run.folder / (f"scores_{split}_{C}" + "_shuffled" * shuffle + ".npy"),
        candidates(data, split, C),
    )
    have = stored(path, np.full(cand.shape, np.nan, np.float32))
    missing = which[~np.isfinite(have[which]).all(1)]
    now = listed.digest_now(run) if len(missing) and path.exists() else None
    if now and listed.noted(run).get(path.stem, now) != now:
        if ranks.main:
            print(
                f"{path} was made with another backbone, so it is made again as far as it is asked "
                "for",
                flush=True,
            )
        have[:], missing = np.nan, which
    if len(missing):
        # its stored scores are of the real order; a backbone is quick to ask again
        if run.stage == "train_backbone" and shuffle:
            score = history_scorer(run)
            for i in range(0, len(missing), 256):
                part = missing[i : i + 256]
                samples = np.asarray(getattr(data, split))[part]
                s_BI = score(
                    [h[h > 0] for h in shuffled(histories(data, samples, run.history), samples)]
                )
                have[part] = np.take_along_axis(s_BI, cand[part], 1)
            if ranks.main:
                write_npy(path, have)
            if ranks.world > 1:  # LMs that list by it read it next
                torch.distributed.barrier()
            return have[which]
        if run.stage == "train_backbone":
            stop(
                f"{path} lacks {len(missing)} samples; train the backbone again: its scores are "
                "written at the end of train_backbone.py"
            )
        if run.folder not in opened:
            opened.clear()  # one LM in memory at a time
            opened[run.folder] = open_run(run, data, ranks.device, shard)
        r, penalty_I = opened[run.folder]
        r = replace(r, shuffled=shuffle)
        began, name = time.time(), f"{run.folder.name} {split}"
        # the whole catalogue comes with it
        if split == "test" and reads_all(r) and not shuffle:
            have[missing], full = score_and_rank(r, split, missing, C, ranks, penalty_I, name)
            if ranks.main:
                stop_if_replaced(run)
            keep_full(run.folder / "full_test.npy", len(cand), missing, full, ranks)
        else:
            have[missing] = score_samples(r, split, missing, C, ranks, name=name)
        spent += np.array([len(missing), time.time() - began])
        if ranks.main:
            stop_if_replaced(run)
            write_npy(path, have)
            if now := listed.digest_now(run):
                listed.note(run, path.stem, now)
    penalty = 0.0
    if getattr(run, "calibration", 0):
        if not (run.folder / "neutral.npy").exists():
            stop(
                f"{run.folder} lacks neutral.npy, which its config.json says it was calibrated "
                "with; train it again"
            )
        penalty = (
            run.calibration * read_npy(run.folder / "neutral.npy", (data.n_items + 1,))[cand[which]]
        )
    return have[which] - penalty


def keep_full(path, n, which, full, ranks):
    """Store ranks over the catalogue (greater, equal) beside those there already; -1 where nobody
    asked.
    """
    if ranks.main:
        whole = stored(path, np.full((n, 2), -1, np.int32))
        whole[which] = full
        write_npy(path, whole)


def plain_lm(cfg, data, ranks, spent):
    """--llm: the LM without any training, as a run folder (calibration chosen on validation).

    One that was made the same way is used again, with what was scored by it.
    """
    folder = folder_of("runs", cfg.llm_out or f"{data.folder_name}/lm")
    lm = load_lm(cfg.llm, ranks.device, shard=cfg.shard, checked=cfg.check_llm)
    settings = {
        "verbalizer": cfg.verbalizer,
        "show": cfg.show,
        "order": "shuffled",
        "backbone_run": "",
        "history": cfg.prompt_history,
        "max_title": 32,
        "max_tokens": 1024,
        "backbone": "",
        "allow_unknown": cfg.allow_unknown,
    }
    made = {
        "llm": cfg.llm,
        "llm_fingerprint": lm.identity,
        "C": cfg.C,
        "val_samples": cfg.val_samples,
        "calibrate": cfg.calibrate,
        "settings": settings,
        "data_hash": data.meta["hash"],
    }
    r = make_ranker(lm, data, settings)
    if not made_the_same_way(folder, made, cfg, ranks):
        rank_plainly(r, folder, made, cfg, data, ranks, spent)
    run = load_run(folder, data)
    penalty_I = np.zeros(data.n_items + 1, np.float32)
    if run.calibration:
        penalty_I = run.calibration * read_npy(folder / "neutral.npy", (data.n_items + 1,))
    return run, (r, penalty_I)


def made_the_same_way(folder, made, cfg, ranks):
    """True, and a line, if `folder` holds the plain LM's run of these settings; one of others is
    refused. With --overwrite neither counts."""
    settle(folder, "config.json")
    if cfg.overwrite or not is_run(folder):
        return False
    have = read_json(folder / "config.json")
    for key in made:
        if have.get(key) != made[key]:
            stop(
                f"{folder} holds a {have['stage']} run whose {key.replace('_', ' ')} was "
                f"{have.get(key)}, "
                f"now it is {made[key]}; --overwrite replaces it, --llm-out names another folder"
            )
    if ranks.main:
        print(
            f"{folder} was made the same way ({when(load_run(folder))}): its scores are used again",
            flush=True,
        )
    return True


def rank_plainly(r, folder, made, cfg, data, ranks, spent):
    """Writes the run folder of an LM without any training: its validation scores and its
    calibration.
    """
    asked = SimpleNamespace(
        llm=cfg.llm,
        C=cfg.C,
        val_samples=cfg.val_samples,
        calibrate=cfg.calibrate,
        resume=False,
        overwrite=cfg.overwrite,
    )
    claim(folder, asked, ranks)
    out, record = start_run(folder, "lm", asked, data, ranks)
    neutral = neutral_scores(r, ranks) if cfg.calibrate else np.zeros(data.n_items + 1, np.float32)
    val, cand = subset(len(data.val), cfg.val_samples, 0), candidates(data, "val", cfg.C)
    full = np.full(cand.shape, np.nan, np.float32)
    began = time.time()
    full[val] = score_samples(r, "val", val, cfg.C, ranks, name="lm val")
    spent += np.array([len(val), time.time() - began])
    weight = (
        calibrate(full[val], cand[val], neutral, data.items[data.val[val]])
        if cfg.calibrate
        else 0.0
    )
    if ranks.main:
        write_npy(out / "neutral.npy", neutral)
        write_npy(out / f"scores_val_{cfg.C}.npy", full)
        finish_run(folder, record | made | {"calibration": weight, "soft_prompt": "none"})
    if ranks.world > 1:
        torch.distributed.barrier()


def notes(run):
    """What a row's run chose, where it differs from the paper."""
    if run.stage == "train_backbone":
        return f"{getattr(run, 'loss', 'unknown')} loss" + (
            f", taught by {Path(run.teacher).name} (lam {run.lam}, eta {run.eta})"
            if getattr(run, "teacher", None)
            else ""
        )
    s = run.settings
    if s.get("input") == "ids":
        parts = ["items as vectors, all scored at once", f"L={s['history']}"]
    else:
        parts = [
            s["verbalizer"],
            f"candidates listed in {s['order']} order"
            if s["show"] or s["verbalizer"] == "letter"
            else "candidates not listed",
            f"L={s['history']}",
        ]
    if s.get("input") == "hybrid":
        parts.insert(0, "titles and vectors")
    if run.stage == "finetune":
        if getattr(run, "layers", None):
            parts.append(
                f"{run.layers} layers"
                + (f", taught by {Path(run.teacher).name}" if run.teacher else ", no teacher")
            )
        parts += [
            f"loss {run.loss}",
            f"AdaLoRA on {run.adapt}",
            f"{run.samples} samples",
            f"soft prompt {Path(run.soft_prompt).name if run.soft_prompt else 'none'}",
        ]
    if getattr(run, "calibration", 0):
        parts.append(f"calibration {run.calibration}")
    return ", ".join(parts)


# -------------------------------------------------------- groups, seeds, what the paper calls a run


def groups_of(data, samples, split):
    """{kind: {group: mask (n,)}}: by the length of the history, by how often the target occurs in
    training, by time.
    """
    earlier = samples - data.ptr[users(data, samples)]
    seen = popularity(data)[data.items[samples]]

    def cuts(x, names, edges):
        return {
            n: (x >= low) & (x < high) for n, low, high in zip(names, edges, [*edges[1:], np.inf])
        }

    out = {
        "items in the history": cuts(earlier, ("1-2, cold", "3-9", "10-49", "50+"), (0, 3, 10, 50)),
        "interactions of the target in training": cuts(
            seen, ("0, unseen", "1-9", "10-99", "100+"), (0, 1, 10, 100)
        ),
    }
    if data.times is not None and split == "temporal":
        order = (
            np.argsort(np.argsort(data.times[samples], kind="stable"), kind="stable")
            * 3
            // max(len(samples), 1)
        )
        out["time within the test part"] = {
            n: order == i for i, n in enumerate(("first third", "second third", "last third"))
        }
    return {kind: {g: m for g, m in groups.items() if m.any()} for kind, groups in out.items()}


def by_group(value, data, samples, user):
    """HR@1 of every row in every group, with its interval."""
    out = {}
    for kind, groups in groups_of(data, samples, data.meta["split"]).items():
        out[kind] = {}
        for group, m in groups.items():
            ends = interval(
                np.stack([v["hr@1"][m] for v in value.values()], 1), user[m], draws=500
            ).T
            out[kind][group] = {
                "n": int(m.sum()),
                "rows": {
                    name: {
                        "hr@1": float(v["hr@1"][m].mean()),
                        "ndcg@10": float(v["ndcg@10"][m].mean()),
                        "low": float(low),
                        "high": float(high),
                    }
                    for (name, v), (low, high) in zip(value.items(), ends)
                },
            }
    return out


def stage_1(run):
    """The configuration of the distillation a fine-tuned run took its soft prompt from; {} if there
    was none.
    """
    prompt = Path(run.soft_prompt) / "config.json"
    return read_json(prompt) if prompt.exists() else {}


def paper_method(run):
    """What DELRec's tables call a run like this one, by what it is."""
    if run.stage == "train_backbone":
        return NAMES.get(run.model)
    if run.stage == "lm":
        return {"google/flan-t5-xl": "Flan-T5-XL", "google/flan-t5-large": "Flan-T5-Large"}.get(
            run.llm, "Bert-Large" if "bert-large" in run.llm.lower() else None
        )
    if run.stage == "distill":
        return "w/o LSR"
    if run.teacher or run.layers or run.soft_prompt == "none" and getattr(run, "maps", None):
        return None
    # the same flags as a variant of DELRec's: told by the recipe's name
    others = {
        "llara": "LLaRA",
        "llamarec": "LlamaRec",
        "llmseqprompt": "LLMSEQPROMPT",
        "e4srec": None,
    }
    if unseeded(run.folder.name) in others:
        return others[unseeded(run.folder.name)]
    if run.soft_prompt in ("none", "words", "random"):
        return {"none": "w/o SP", "words": "w MCP", "random": "w USP"}[run.soft_prompt]
    made = stage_1(run)
    if getattr(run, "lr_prompt", 0):
        return "w ULSR"
    return {"rps": "w/o TA", "ta": "w/o RPS"}.get(
        made.get("tasks"),
        "w UDPSM" if made.get("lr_lm") else f"DELRec ({run.settings['backbone']})",
    )


def sweeps_of(rows_runs, value, low_high):
    """Points of Figure 8: runs whose soft prompts differ in k or in h only, {k: {"80": {hr@1, low,
    high}}}.
    """
    made = {}
    for name, run in rows_runs.items():
        config = stage_1(run) if run.stage == "finetune" else {}
        if "k" in config and "h" in config:
            made[name] = config["k"], config["h"]
    out = {}
    for i, (key, other) in enumerate((("k", 1), ("h", 0))):
        levels = [v[other] for v in made.values()]
        # the other one stays at its usual value
        common = max(set(levels), key=levels.count) if levels else None
        points = {}
        for name, v in made.items():
            if v[other] == common:
                points.setdefault(str(v[i]), []).append(name)
        if len(points) > 2:
            out[key] = {
                level: {
                    "hr@1": float(np.mean([value[n]["hr@1"].mean() for n in names])),
                    "low": float(np.mean([low_high[n]["hr@1"][0] for n in names])),
                    "high": float(np.mean([low_high[n]["hr@1"][1] for n in names])),
                }
                for level, names in points.items()
            }
    return out


def told_apart(run_of, reference, most=8):
    """The runs that the case study shows side by side: the reference, the plain LM, what has a
    distilled prompt, other LMs, backbones; one seed of each.
    """

    def place(name):
        run = run_of[name]
        return (
            name != reference,
            ["lm", "finetune", "distill", "train_backbone"].index(run.stage),
            run.stage == "finetune" and not stage_1(run),
        )

    seeds = {}
    for name in sorted(run_of, key=place):
        seeds.setdefault(unseeded(name), name)
    return list(seeds.values())[:most]


def cases_of(data, samples, cand, rows, value, names, n=60, seed=0):
    """The case study: test histories with each run's ranking of the stored candidates, drawn once;
    half of them where the runs disagree on the first place.
    """
    first = np.stack([rows[name].argmax(1) for name in names])
    differ = np.flatnonzero((first != first[0]).any(0))
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(differ)[: n // 2]
    rest = np.setdiff1d(np.arange(len(samples)), chosen)
    out = []
    for i in [*chosen, *rng.permutation(rest)[: n - len(chosen)]]:
        old = histories(data, samples[i : i + 1], 10)[0]
        order = {name: np.argsort(-rows[name][i], kind="stable")[:5] for name in names}
        truth = int(data.items[samples[i]])
        out.append(
            {
                "history": [data.titles[x] for x in old if x],
                "truth": data.titles[truth],
                "place": {name: float(value[name]["rank"][i]) for name in names},
                "answers": {
                    name: [(data.titles[int(cand[i][c])], int(cand[i][c]) == truth) for c in o]
                    for name, o in order.items()
                },
            }
        )
    return out


def command_line(context):
    """What was typed, as one line: what makes this table again."""

    def typed(p):
        return context.get_parameter_source(p.name).name == "COMMANDLINE"

    line = ["python", "evaluate.py"]
    # the runs first
    for p in sorted(
        filter(typed, context.command.params), key=lambda p: p.name not in ("ckpt", "more")
    ):
        value = context.params[p.name]
        if getattr(p, "is_flag", False):
            line.append(p.opts[0] if value else p.secondary_opts[0])
        elif p.param_type_name == "argument":
            line += map(str, value)
        else:
            line += [
                str(x)
                for one in (value if p.multiple else [value])
                for x in (p.opts[0], *(one if isinstance(one, tuple) else [one]))
            ]
    return shlex.join(line)


# ---------------------------------------------------------------- the command


@click.command(**described(__doc__))
@click.option(
    "--ckpt", multiple=True, help="run folder, or its name under runs/; more may follow it"
)
@click.argument("more", nargs=-1)
@click.option(
    "--dataset", default=None, type=str, help="needed with --llm alone; else the runs' own"
)
@click.option("--candidates", "C", default=15, help="which stored candidates to rank")
@click.option(
    "--limit",
    default=0,
    type=click.IntRange(0),
    help="test samples, the same ones for every run (with --export: training samples); 0 = all",
)
@click.option(
    "--max-history",
    default=0,
    type=click.IntRange(0),
    help="only test samples with at most so many earlier items (2: DELRec's cold users); 0 = all",
)
@click.option(
    "--out",
    default=None,
    type=str,
    help="folder of metrics.json, table.txt .md .tex .csv .png and figures; evaluation/ in the "
    "last run's if not given",
)
@click.option(
    "--shard",
    is_flag=True,
    help="divide the LM's layers among the processes of torchrun (FSDP2), for an LM that does "
    "not fit one card; the same numbers, slower",
)
# more rows, more to see
@click.option(
    "--reference",
    default=None,
    type=str,
    help="row that the others are tested against (* and **); the first backbone if not given",
)
@click.option(
    "--fuse",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="adds the row A+B: standardised scores of two rows, the weight chosen on validation",
)
@click.option(
    "--shuffle-history",
    is_flag=True,
    help="adds a row of every run that sees its histories in a random order: does it use the "
    "order at all?",
)
@click.option(
    "--latency",
    is_flag=True,
    help="also measure the time of a request, alone on one core, and count parameters",
)
@click.option(
    "--report",
    "page",
    default=None,
    type=str,
    metavar="FILE.html",
    help="also write one page, no network needed: tables, figures, configurations, searchable "
    "histories with every run's answer",
)
@click.option(
    "--probe",
    is_flag=True,
    help="instead of a table: what the soft prompt of one run learnt (nearest tokens, "
    "attention, how far it moves the LM towards the backbone)",
)
# the plain LM
@click.option("--llm", default=None, type=str, help="adds the row of this LM without any training")
@click.option(
    "--llm-out",
    default=None,
    type=str,
    help="run folder of the plain LM, used again if it was made the same way; runs/<dataset>/lm",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="make the plain LM's run, or the export, anew and replace the one that is there once "
    "it is finished",
)
@click.option(
    "--check-llm/--no-check-llm",
    default=True,
    help="plain LM: compare the LM's scores with plain transformers' before the work (seconds, "
    "once for each LM), and take the fastest way that says the same",
)
@click.option(
    "--allow-unknown",
    is_flag=True,
    help="plain LM: go on with a tokenizer that does not know over a fifth of the titles' tokens",
)
@click.option(
    "--verbalizer",
    default="likelihood",
    type=click.Choice(["likelihood", "mean", "first", "letter"]),
    help="of the plain LM",
)
@click.option("--show/--no-show", default=False, help="plain LM: list the candidates in the prompt")
@click.option(
    "--prompt-history",
    default=10,
    type=click.IntRange(1),
    help="plain LM: titles of history in the prompt",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=True,
    help="plain LM: subtract w times the title's score under an empty history",
)
@click.option(
    "--val-samples",
    default=200,
    type=click.IntRange(0),
    help="validation samples for the weights of the plain LM and of fusion, and of --probe; 0 = "
    "all",
)
# one history
@click.option(
    "--history",
    default=None,
    type=str,
    help="titles with ' | ' between them, oldest first: print ranked titles instead of a table",
)
@click.option(
    "--top", default=10, type=click.IntRange(1), help="with --history and --serve: how many titles"
)
@click.option(
    "--serve",
    "file",
    default=None,
    type=str,
    help='a file of histories, one JSON object a line: {"history": ["title", ..]}; answers go '
    "to --out, or beside the file",
)
@click.option(
    "--pool",
    default=100,
    type=click.IntRange(0),
    help="with --history and --serve: an LM that cannot score the catalogue in one pass ranks "
    "the backbone's best so many items; 0 = all",
)
# a teacher
@click.option(
    "--export",
    is_flag=True,
    help="write RUN/export/ for train_backbone.py --teacher: best items of every training "
    "sample (or --limit), confidence, title vectors",
)
@click.option(
    "--export-k",
    default=10,
    type=click.IntRange(1),
    help="with --export: items listed for a sample, K",
)
def main(**config):
    """Metrics with intervals, paired tests and floors for any runs; or ranked titles for one
    history.
    """
    cfg = SimpleNamespace(**config)
    cfg.llm = cfg.llm and located(cfg.llm)
    names = [*cfg.ckpt, *cfg.more]
    if not names and not cfg.llm:
        stop("nothing to evaluate; give --ckpt RUN (a run folder) or --llm NAME --dataset NAME")
    ranks = setup(0)
    runs = [load_run(n, stages=["train_backbone", "distill", "finetune", "lm"]) for n in names]
    data = (
        load_data_of(runs[0]) if runs and not cfg.dataset else load_data(cfg.dataset or "ml-100k")
    )
    if (
        runs
        and ranks.main
        and str(data.folder) != getattr(runs[0], "data_folder", str(data.folder))
    ):
        print(
            f"{runs[0].folder} was trained on the preparation that stands in {data.folder} now "
            f"(hash {data.meta['hash']}): that one is used",
            flush=True,
        )
    for run in runs:
        load_run(run.folder, data)  # refuses another data set's run
        listed.say_if_another(run, ranks)
    asked = [
        flag
        for flag, given in (
            ("--history", cfg.history is not None),
            ("--serve", cfg.file),
            ("--export", cfg.export),
            ("--probe", cfg.probe),
        )
        if given
    ]
    if asked:
        if len(runs) != 1:
            stop(f"{asked[0]} is answered by one run, {len(runs)} were given; pass one --ckpt")
        if asked[0] in ("--export", "--probe") and runs[0].stage == "train_backbone":
            stop(
                f"{runs[0].folder} is a backbone, {asked[0]} is about an LM; pass a run of "
                "finetune.py" + (" or distill.py" if cfg.probe else "")
            )
        open_ranking = partial(ranking, runs[0], data, ranks, cfg.pool, cfg.shard)
        if cfg.history is not None:
            answer_history(cfg.history, data, cfg.top, open_ranking, ranks)
        elif cfg.file:
            answer_file(cfg.file, cfg.out, data, cfg.top, open_ranking, ranks)
        elif cfg.export:
            export.export(
                runs[0], data, ranks, cfg.export_k, cfg.limit, cfg.shard, overwrite=cfg.overwrite
            )
        else:
            probe.probe(
                runs[0],
                data,
                cfg.val_samples,
                cfg.C,
                ranks,
                Path(cfg.out) if cfg.out else runs[0].folder,
            )
        return finish(ranks)

    if cfg.page:
        Path(cfg.page).parent.mkdir(parents=True, exist_ok=True)
    # prompts an LM scored, and the seconds that took
    began, spent = time.time(), np.zeros(2)
    which = np.arange(len(data.test))
    if cfg.max_history:
        which = which[(np.asarray(data.test) - data.ptr[users(data, data.test)]) <= cfg.max_history]
        if not len(which):
            stop(
                f"no test sample of {data.name} has at most {cfg.max_history} earlier items "
                "(--max-history); raise it or leave it out"
            )
    which = which[subset(len(which), cfg.limit, 0)]
    val = subset(len(data.val), cfg.val_samples, 0)
    cand = {
        "val": candidates(data, "val", cfg.C)[val],
        "test": candidates(data, "test", cfg.C)[which],
    }
    target = {
        "val": cand["val"] == data.items[data.val[val]][:, None],
        "test": cand["test"] == data.items[data.test[which]][:, None],
    }
    samples = {"val": data.val[val], "test": data.test[which]}
    user = users(data, samples["test"])

    # rows: name -> (scores on validation, scores on test), each (n, C); the floors first
    rows, note, opened = {}, {}, {}
    # what they count is counted once
    in_both, cand_both = (
        np.concatenate([samples["val"], samples["test"]]),
        np.concatenate([cand["val"], cand["test"]]),
    )
    for name, about, score in (
        ("chance", "constant scores", np.zeros(cand_both.shape)),
        ("popularity", "training interactions of the item", popularity(data)[cand_both]),
        (
            "co-occurrence",
            "within 5 steps in training, over the root of both counts, L=10, decay .8",
            cooccurrence(data, in_both, cand_both),
        ),
        (
            "title-similarity",
            "TF-IDF cosine to the history, L=10, decay .8",
            title_similarity(data, in_both, cand_both),
        ),
    ):
        rows[name], note[name] = (score[: len(val)], score[len(val) :]), about
    if cfg.llm:
        plain, opened_plain = plain_lm(cfg, data, ranks, spent)
        opened[plain.folder] = opened_plain
        runs.insert(0, plain)
    # rows of runs, for the paired tests; run folder -> row; row -> run
    chosen, row_of, run_of = [], {}, {}

    def add(run):
        name = row_of[run.folder] = (
            run.folder.name if run.folder.name not in rows else str(run.folder)
        )
        parts = ("val", val), ("test", which)
        rows[name], note[name], run_of[name] = (
            tuple(
                scores_of(run, data, s, w, cfg.C, ranks, opened, spent, cfg.shard) for s, w in parts
            ),
            notes(run),
            run,
        )
        chosen.append(name)
        if cfg.shuffle_history:
            # its list of candidates must not tell the real order
            if run.stage in ("distill", "finetune") and run.settings["order"] == "backbone":
                scores_of(
                    load_run(run.settings["backbone_run"], data),
                    data,
                    "test",
                    which,
                    cfg.C,
                    ranks,
                    opened,
                    spent,
                    shuffle=True,
                )
            other = scores_of(
                run, data, "test", which, cfg.C, ranks, opened, spent, cfg.shard, shuffle=True
            )
            rows[f"{name}, shuffled"], note[f"{name}, shuffled"] = (
                (rows[name][0], other),
                "its history in a random order",
            )
            chosen.append(f"{name}, shuffled")

    for run in sorted(
        runs, key=lambda x: ["lm", "train_backbone", "distill", "finetune"].index(x.stage)
    ):
        add(run)

    # the backbone fused with what counts pairs, and with what knows the titles: the floors an LM
    # row, alone or fused, has to beat
    backbones = [r for r in runs if r.stage == "train_backbone"]
    from_runs = [Path(r.backbone_run) for r in runs if getattr(r, "backbone_run", None)]
    for folder in from_runs + [folder_of("runs", f"{data.folder_name}/sasrec")]:
        settle(folder, "config.json")
        if not backbones and (folder / "config.json").exists():
            backbone = load_run(folder)
            if backbone.data_hash == data.meta["hash"]:
                backbones = [backbone]
                add(backbone)
            elif ranks.main:
                print(
                    f"{folder} was trained on another preparation (hash {backbone.data_hash}), so "
                    "it is no row here",
                    flush=True,
                )
    pairs = list(cfg.fuse)
    if backbones:
        base = row_of[backbones[0].folder]
        own = {
            r.folder: row_of.get(folder_of("runs", r.backbone_run), base)
            for r in runs
            if getattr(r, "backbone_run", None)
        }
        pairs = (
            [(base, "co-occurrence"), (base, "title-similarity")]
            + [
                (own.get(r.folder, base), row_of[r.folder])
                for r in runs
                if r.stage in ("finetune", "lm")
            ]
            + pairs
        )
    for a, b in dict.fromkeys(pairs):
        for x in (a, b):
            if x not in rows:
                stop(f"--fuse names the row {x}, but the rows are {', '.join(rows)}")
        scores, w = fuse(rows[a], rows[b], target["val"])
        # a fused row may be fused again
        rows[f"{a}+{b}"] = ((1 - w) * standard(rows[a][0]) + w * standard(rows[b][0]), scores)
        note[f"{a}+{b}"] = f"weight of {b} {w:.2f}, chosen on validation"
        chosen.append(f"{a}+{b}")
    reference = cfg.reference or (row_of[backbones[0].folder] if backbones else chosen[0])
    if reference not in rows:
        stop(f"--reference names the row {reference}, but the rows are {', '.join(rows)}")

    # metrics, intervals, tests
    rows = {name: test for name, (_, test) in rows.items()}
    value = {name: metrics(*compare(s, target["test"])) for name, s in rows.items()}
    if not ranks.main:
        return finish(ranks)
    ends = {
        m: interval(np.stack([v[m] for v in value.values()], 1), user).T
        for m in ("hr@1", "ndcg@10")
    }
    low_high = {name: {m: ends[m][i] for m in ends} for i, name in enumerate(value)}
    tests = {
        f"{b} - {a}": difference(value[b], value[a], user)
        for i, a in enumerate(chosen)
        for b in chosen[i + 1 :]
    }
    full, full_tests, full_seeds = full_ranking(row_of, data, which, user, reference)
    result = {
        "protocol": f"{data.name} (hash {data.meta['hash']}), {data.meta['split']} split, "
        "test part, "
        f"{len(which)} of {len(data.test)} samples of "
        f"{len(np.unique(user))} users"
        + (f", those with at most {cfg.max_history} earlier items" if cfg.max_history else "")
        + f", {cfg.C} stored candidates (target + {cfg.C - 1} uniform from items the user "
        "never touched); "
        "ties count as the mean over their orders; [95 % bootstrap interval over users]",
        "dataset": data.name,
        "n": len(which),
        "items": data.n_items,
        "candidates": cfg.C,
        "hash": data.meta["hash"],
        "chance": chance(cfg.C),
        "reference": reference,
        "rows": {},
        "seeds": over_seeds(value, user, reference),
        "tests": tests,
        "full": full,
        "full_tests": full_tests,
        "full_seeds": full_seeds,
        "groups": by_group(value, data, samples["test"], user),
        "sweeps": sweeps_of(run_of, value, low_high),
    }
    for name, v in value.items():
        row = result["rows"][name] = {
            "note": note[name],
            **{m: float(v[m].mean()) for m in SHOWN},
            **{f"{m}_interval": list(map(float, low_high[name][m])) for m in low_high[name]},
        }
        if name not in (reference, "chance"):
            against = difference(value[name], value[reference], user)
            row |= {
                "p_hr@1": max(against["p_mcnemar_hr@1"], against["p_t_hr@1"]),
                "p_ndcg@10": against["p_t_ndcg@10"],
            }
        row["paper"] = (
            report.of_paper(data.name, paper_method(run_of[name])) if name in run_of else None
        )
        if cfg.latency and name in run_of:
            print(f"timing {name}", flush=True)
            row["ms"] = latencies(run_of[name], data)
            row["parameters"] = parameters(run_of[name])

    # written down
    print("\n" + "\n".join(report.text(result)) + "\n")
    out = (
        Path(cfg.out)
        if cfg.out
        else (runs[-1].folder if runs else folder_of("runs", data.folder_name)) / "evaluation"
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", result)
    report.write_tables(out, result)
    for folder, name in row_of.items():
        if name in run_of:
            stop_if_replaced(run_of[name])
        path = folder / f"ranks_test_{cfg.C}.npy"
        ranks_n = stored(path, np.full(len(data.test), np.nan, np.float32))
        ranks_n[which] = value[name]["rank"]
        write_npy(path, ranks_n)
    made = report.figures(result, row_of)
    if cfg.page:
        configs = {name: read_json(run.folder / "config.json") for name, run in run_of.items()}
        report.page(
            Path(cfg.page),
            result,
            made,
            cases_of(
                data, samples["test"], cand["test"], rows, value, told_apart(run_of, reference)
            ),
            configs,
            command_line(click.get_current_context()),
        )
    report.write_figures(out, made)
    if spent[0]:
        print(
            f"{spent[0] / spent[1]:.2f} samples/s scored by LMs ({spent[0]:.0f} prompts of {cfg.C} "
            f"candidates), {100 * spent[1] / (time.time() - began):.0f} % of the time"
        )
    print(
        f"written: {out / 'metrics.json'}, table.txt .md .tex .csv, "
        f"{', '.join(f'{n}.png' for n in made)}"
        + (f"; {cfg.page}" if cfg.page else "")
        + "; per-sample ranks in each run folder"
    )
    print(
        json.dumps(
            {
                "machine": machine(),
                "versions": versions(),
                "commit": commit(),
                "rows": [
                    {
                        "name": f"{m}.{n}",
                        "value": round(float(v[m].mean()), 4),
                        "unit": "",
                        "goal": None,
                    }
                    for n, v in value.items()
                    for m in ("hr@1", "ndcg@10")
                ],
            }
        )
    )
    finish(ranks)


def full_ranking(row_of, data, which, user, reference):
    """Metrics over the whole catalogue, for runs that ranked it (full_test.npy: greater, equal, -1:
    not asked) behind chance and popularity, and the paired tests between them, and means over
    seeds.
    """

    def mean(v):
        return {m: float(v[m].mean()) for m in FULL}

    ks, value = (1, 5, 10, 20), {}
    for folder, name in row_of.items():
        if (folder / "full_test.npy").exists():
            greater, equal = read_npy(folder / "full_test.npy", (len(data.test), 2))[which].T
            if greater.min() >= 0:
                value[name] = metrics(greater, equal, ks)
    if not value:
        return {}, {}, {}
    samples = np.asarray(data.test)[which]
    floors = {
        name: mean(metrics(*full_ranking_of(score_I, data, samples), ks))
        for name, score_I in (
            ("chance", np.zeros(data.n_items + 1)),
            ("popularity", popularity(data)),
        )
    }
    tests = {
        f"{b} - {a}": difference(value[b], value[a], user, 20, 20)
        for i, a in enumerate(value)
        for b in list(value)[i + 1 :]
    }
    return (
        floors | {name: mean(v) for name, v in value.items()},
        tests,
        over_seeds(value, user, reference, ("hr@20", "ndcg@20")),
    )


if __name__ == "__main__":
    main()
