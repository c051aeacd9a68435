"""make circle: from the backbone to the LM, to a small LM, and back to a backbone.

    python recipes/circle.py                                   about 40 minutes on 2 cores
    python recipes/circle.py --dataset beauty --windows 8000   other data, prepared before

The backbone at the end serves in a millisecond. Every stage is one of the README's commands; a
finished one is not repeated, so a circle that was killed goes on where it stood.

The table: HR@1 and NDCG@10 among 15 candidates with intervals, HR@20 and NDCG@20 over all items,
parameters, time a request takes at batch 1 and 64 (one history to the ranked catalogue, on one core
and on all), time of training. The last line is one JSON object.
"""

import os
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.prepared import load_data, subset, users
from delrec.evaluation.stats import interval
from delrec.kernels.bench import report
from delrec.runtime import described, load_run, read_json, read_npy
from delrec.serving.latency import latencies, parameters
from recipes.stage import stage

ROWS = {
    "sasrec": "backbone",
    "e4srec": "LM, items as vectors, distilled soft prompt",
    "small": "{n} layers, no teacher",
    "slmrec": "{n} layers, taught by the LM",
    "sasrec-taught": "backbone, taught by the small LM",
    "caser": "a weaker backbone",
    "caser-taught": "the same, taught by the small LM (lists and titles)",
}


@click.command(**described(__doc__))
@click.option("--dataset", default="ml-100k", help="name under data/; ml-100k is prepared here")
@click.option("--llm", default="smollm2-135m", help="the LM; Hugging Face id or folder")
@click.option("--layers", default=6, type=click.IntRange(1), help="layers of the small LM")
@click.option(
    "--windows",
    default=4096,
    type=click.IntRange(80),
    help="windows of history that the LM is trained on",
)
@click.option(
    "--small-windows",
    default=8192,
    type=click.IntRange(80),
    help="windows that the small LMs are trained on, with and without teacher",
)
@click.option(
    "--val-samples",
    default=1000,
    type=click.IntRange(1),
    help="validation samples that choose the step of each LM",
)
@click.option(
    "--procs",
    default=0,
    type=click.IntRange(0),
    help="processes that share the LM's work, by torchrun; 0: one for each GPU, without a GPU "
    "two (1.4 times as fast as one with two threads)",
)
@click.option(
    "--test-samples", default=0, type=click.IntRange(0), help="test samples of the table; 0 = all"
)
def main(dataset, llm, layers, windows, small_windows, val_samples, procs, test_samples):
    """Backbone, LM, small LM, backbone again: every stage, then one table."""
    began, procs = time.time(), procs or torch.cuda.device_count() or min(os.cpu_count(), 2)
    # its own runs: those of the README's commands have seen other samples
    home = f"{Path(dataset).name}/circle"
    runs = runtime.ROOT / "runs" / home
    if dataset == "ml-100k" and not (runtime.ROOT / "data" / "ml-100k" / "meta.json").exists():
        stage(None, "data/prepare.py", "ml-100k")
    if llm == "smollm2-135m":
        stage(None, "data/prepare.py", llm)
    lm = [
        "finetune.py",
        "--dataset",
        dataset,
        "--llm",
        llm,
        "--val-samples",
        val_samples,
        "--evals",
        4,
    ]
    ids = ["--input", "ids", "--soft-prompt", f"{home}/prompt"]
    stage(runs / "sasrec", "train_backbone.py", "--dataset", dataset, "--out", f"{home}/sasrec")
    stage(
        runs / "prompt",
        "distill.py",
        "--dataset",
        dataset,
        "--llm",
        llm,
        "--backbone",
        f"{home}/sasrec",
        "--samples",
        64,
        "--val-samples",
        48,
        "--evals",
        1,
        "--out",
        f"{home}/prompt",
        procs=procs,
    )
    stage(runs / "e4srec", *lm, *ids, "--samples", windows, "--out", f"{home}/e4srec", procs=procs)
    stage(
        runs / "small",
        *lm,
        *ids,
        "--samples",
        small_windows,
        "--layers",
        layers,
        "--out",
        f"{home}/small",
        procs=procs,
    )
    stage(
        runs / "slmrec",
        *lm,
        "--teacher",
        f"{home}/e4srec",
        "--samples",
        small_windows,
        "--layers",
        layers,
        "--out",
        f"{home}/slmrec",
        procs=procs,
    )
    stage(
        runs / "slmrec" / "export",
        "evaluate.py",
        "--ckpt",
        f"{home}/slmrec",
        "--export",
        procs=procs,
    )
    stage(
        runs / "sasrec-taught",
        "train_backbone.py",
        "--dataset",
        dataset,
        "--teacher",
        f"{home}/slmrec",
        "--out",
        f"{home}/sasrec-taught",
    )
    stage(
        runs / "caser",
        "train_backbone.py",
        "--dataset",
        dataset,
        "--model",
        "caser",
        "--out",
        f"{home}/caser",
    )
    stage(
        runs / "caser-taught",
        "train_backbone.py",
        "--dataset",
        dataset,
        "--student",
        "caser",
        "--teacher",
        f"{home}/slmrec",
        "--lam",
        0.1,
        "--eta",
        0.3,
        "--out",
        f"{home}/caser-taught",
    )
    stage(
        None,
        "evaluate.py",
        "--ckpt",
        *(f"{home}/{name}" for name in ROWS),
        "--limit",
        test_samples,
        "--val-samples",
        val_samples,
        "--out",
        runs,
        procs=procs,
    )

    # the table
    data = load_data(dataset)
    table = read_json(runs / "metrics.json")
    which = subset(len(data.test), test_samples, 0)
    user = users(data, np.asarray(data.test)[which])
    ms_of, lines = {}, [table["protocol"], ""]
    lines.append(
        f"{'':14} {'HR@1':>6} {'':14} {'NDCG@10':>8} {'':14} {'HR@20':>6} {'NDCG@20':>8} "
        f"{'parameters':>12} {'ms, 1 core':>10} {'ms':>8} {'ms of 64':>9} {'minutes':>8}"
    )
    for name, what in ROWS.items():
        run, row, full = load_run(runs / name), table["rows"][name], table["full"][name]
        print(f"timing {name}", flush=True)
        ms = ms_of[name] = latencies(run, data)
        a, b = row["hr@1_interval"], row["ndcg@10_interval"]
        lines.append(
            f"{name:14} {row['hr@1']:6.3f} [{a[0]:.3f}, {a[1]:.3f}] {row['ndcg@10']:8.3f} "
            f"[{b[0]:.3f}, {b[1]:.3f}] {full['hr@20']:6.4f} {full['ndcg@20']:8.4f} "
            f"{parameters(run):12,} {ms[0]:10.2f} {ms[1]:8.2f} {ms[2]:9.2f} "
            f"{run.seconds / 60:8.1f}   {what.format(n=layers)}"
        )
    hits = {
        name: (np.asarray(read_npy(runs / name / "ranks_test_15.npy"))[which] == 1).astype(float)
        for name in ("e4srec", "slmrec")
    }
    low, high = interval(hits["slmrec"] - hits["e4srec"], user)
    teacher, student = (load_run(runs / name) for name in ("e4srec", "slmrec"))
    alone, taught, weaker = (
        table["tests"]["slmrec - small"],
        table["full_tests"]["sasrec-taught - sasrec"],
        table["full_tests"]["caser-taught - caser"],
    )
    lines += [
        "",
        f"taught minus not, {layers} layers: HR@1 {alone['hr@1']:+.4f} (p = "
        f"{alone['p_mcnemar_hr@1']:.2g}), NDCG@10 {alone['ndcg@10']:+.4f} (p = "
        f"{alone['p_t_ndcg@10']:.2g})",
        *(
            f"taught {name} minus {name}, all items: HR@20 {t['hr@20']:+.4f} (p = "
            f"{t['p_mcnemar_hr@20']:.2g}), NDCG@20 {t['ndcg@20']:+.4f} (p = "
            f"{t['p_t_ndcg@20']:.2g})"
            for name, t in (("sasrec", taught), ("caser", weaker))
        ),
        f"{(time.time() - began) / 60:.1f} minutes",
    ]
    print("\n" + "\n".join(lines) + "\n")
    (runs / "circle.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(
        [
            ("slmrec.speedup.inference", ms_of["e4srec"][2] / ms_of["slmrec"][2], "x", 3),
            (
                "slmrec.speedup.training",
                student.samples_per_second / teacher.samples_per_second,
                "x",
                3,
            ),
            (
                "slmrec.speedup.training_with_states",
                teacher.train_seconds / (student.train_seconds + student.states_seconds),
                "x",
                None,
            ),
            ("slmrec.hr@1_vs_teacher", float((hits["slmrec"] - hits["e4srec"]).mean()), "", None),
            ("slmrec.hr@1_vs_teacher_low", float(low), "", None),
            ("slmrec.hr@1_vs_teacher_high", float(high), "", None),
            ("slmrec.hr@1_vs_untaught", alone["hr@1"], "", None),
            ("slmrec.vs_untaught_p", alone["p_mcnemar_hr@1"], "", None),
            ("dllm2rec.latency_ms", ms_of["sasrec-taught"][0], "ms", 2),
            (
                "dllm2rec.times_faster_than_teacher",
                ms_of["e4srec"][0] / ms_of["sasrec-taught"][0],
                "x",
                100,
            ),
            ("dllm2rec.hr20_gain", taught["hr@20"] / table["full"]["sasrec"]["hr@20"], "", None),
            ("dllm2rec.p_value", taught["p_mcnemar_hr@20"], "", None),
            (
                "dllm2rec.caser.hr20_gain",
                weaker["hr@20"] / table["full"]["caser"]["hr@20"],
                "",
                None,
            ),
            ("dllm2rec.caser.p_value", weaker["p_mcnemar_hr@20"], "", None),
            ("circle.minutes", (time.time() - began) / 60, "min", 45),
        ],
        torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
