"""The reported metrics: any runs rank the stored candidates of the test part.

    python evaluate.py --ckpt ml-100k/delrec                         one run and the floors
    python evaluate.py --ckpt ml-100k/sasrec ml-100k/delrec --limit 400
                                                                     several, compared, 400 samples
    python evaluate.py --llm smollm2-135m --dataset ml-100k          the plain LM, a run of its own
    torchrun --nproc_per_node=10 evaluate.py --ckpt beauty/delrec    many GPUs, the same table
    python evaluate.py --ckpt ml-100k/delrec --report out.html       also a page with figures
    python evaluate.py --ckpt ml-100k/delrec --history "Toy Story (1995) | Aladdin (1992)"
                                                                     ranked titles for a history
    python evaluate.py --ckpt ml-100k/delrec --history-json '["Toy Story (1995)", {"id": "95"}]'
    python evaluate.py --ckpt ml-100k/delrec --user 196 --only stock.txt      for a user of the log
    python evaluate.py --ckpt ml-100k/delrec --serve histories.jsonl for a file of them
    python evaluate.py --ckpt ml-100k/slmrec --export                for train_backbone.py --teacher
    python evaluate.py --ckpt RUN --export --folds RUN-a RUN-b       the same, out of fold
    python evaluate.py --ckpt ml-100k/sasrec --export-onnx           a file to serve without torch
    python evaluate.py --ckpt ml-100k/prompt --probe                 what the soft prompt learnt
    python evaluate.py --ckpt my-shop/delrec --card                  a folder for the Hub

The table has intervals, paired tests, and floors that need no training. An LM run is scored once
and its scores are stored in its folder (scores_test_15.npy, NaN where not asked); backbones bring
theirs. So runs are compared without loading a model. Everything chosen (steps, weights of fusion
and calibration) is chosen on validation: runs on one half of it, weights of fusion on the other.
Runs named X-s0, X-s1, .. in one folder are the seeds of X: the table also holds their mean and
deviation, and tests of the means.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

from common import checks_of, options, shard_option, typed_of, verbalizers
from delrec.backbone.ranking import history_scorer
from delrec.data.floors import places_for_fusion
from delrec.data.prepared import Data
from delrec.evaluation import plain
from delrec.evaluation.cases import cases_of, told_apart
from delrec.evaluation.comparisons import Planned
from delrec.evaluation.figures import figures_of, write_figures
from delrec.evaluation.free import free
from delrec.evaluation.lines import last_line, table_lines
from delrec.evaluation.measure import measured, metrics_of
from delrec.evaluation.neighbours import add_neighbours
from delrec.evaluation.notes import read_notes, with_notes
from delrec.evaluation.page import command_line, write_page
from delrec.evaluation.probe import probe
from delrec.evaluation.rows import (
    add_fused,
    add_run,
    find_backbone,
    floor_rows,
    in_order,
    names_of,
    open_runs,
    pairs_with_backbone,
    reference_of,
    runs_of,
)
from delrec.evaluation.scores import (
    Scorer,
    part_of,
    places_in_test,
    store_ranks,
)
from delrec.evaluation.tables import table_folder, write_tables
from delrec.evaluation.two_stage import two_stages
from delrec.evaluation.typed import settle_names
from delrec.lm import export
from delrec.lm.model import located
from delrec.processes import Ranks, finish, setup
from delrec.ranges import FROM_0
from delrec.runtime import Run, described, must_be_writable, read_json, stop, write_json
from delrec.serving.answers import answer_file, answer_history, answer_similar
from delrec.serving.card import write_card
from delrec.serving.catalogue import Catalogue
from delrec.serving.latency import add_latency
from delrec.serving.onnx_file import export_onnx
from delrec.serving.options import answer_options, asks_one_run, options_of
from delrec.serving.recommender import Recommender
from delrec.serving.requests import history_of_json


def names_given(cfg: SimpleNamespace) -> list[str]:
    """The runs to evaluate; behind --folds, the names that follow the options are of those."""
    if cfg.folds and not cfg.export:
        stop("--folds says which runs answer in an export; add --export, or leave it out")
    if cfg.folds:
        cfg.folds, cfg.more = (*cfg.folds, *cfg.more), ()
    return [*cfg.ckpt, *cfg.more]


def ask_one_run(flag: str, runs: list[Run], data: Data, cfg: SimpleNamespace, ranks: Ranks) -> None:
    """Answers, writes or shows what a flag asks of one run."""
    if len(runs) != 1:
        stop(f"{flag} is answered by one run, {len(runs)} were given; pass one --ckpt")
    run = runs[0]
    if flag in ("--export", "--probe", "--free") and run.stage == "train_backbone":
        lms = "finetune.py" if cfg.export else "finetune.py or distill.py"
        stop(f"{run.folder} is a backbone, {flag} is about an LM; pass a run of {lms}")
    if flag == "--card":
        if ranks.main:
            write_card(run, data, Path(cfg.out or run.folder / "evaluation"), cfg.overwrite)
    elif flag == "--export":
        export.export(run, data, ranks, cfg, history_scorer)
    elif flag == "--export-onnx":
        export_onnx(run, data, cfg.out, ranks)
    elif flag in ("--probe", "--free"):
        out = Path(cfg.out or run.folder)
        if ranks.main:
            must_be_writable(out)
        look = probe if cfg.probe else free
        look(run, data, cfg.val_samples, cfg.C, ranks, out)
    else:
        answer(flag, run, data, cfg, ranks)


def answer(flag: str, run: Run, data: Data, cfg: SimpleNamespace, ranks: Ranks) -> None:
    """Answers the histories, the user or the item that a flag names."""
    recommender = Recommender.of_run(run, Catalogue(data), ranks, cfg.pool, cfg.shard, said=True)
    asked = recommender.now, ranks, options_of(cfg)
    if flag == "--serve":
        answer_file(*asked, cfg.serve, cfg.out)
    elif flag == "--similar":
        answer_similar(*asked, cfg.similar)
    elif flag == "--user":
        answer_history(*asked, user=cfg.user)
    else:
        history = cfg.history if flag == "--history" else history_of_json(cfg.history_json)
        answer_history(*asked, history=history)


# ---------------------------------------------------------------- the command


@click.command(**described(__doc__))
@click.option(
    "--ckpt", multiple=True, help="run folder, or its name under runs/; more may follow it"
)
@click.argument("more", nargs=-1)
@click.option("--dataset", help="needed with --llm alone; else the runs' own")
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
    help="folder of metrics.json, table.txt .md .tex .csv .png and figures; evaluation/ in the "
    "last run's if not given",
)
@shard_option
# more rows, more to see
@click.option(
    "--reference",
    help="row that the others are tested against (*, ** and =); the first backbone if not given",
)
@click.option(
    "--compare",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="also test A minus B: two rows, or two means over seeds (rows without their -s0, -s1, "
    "..); say it before you have seen the table",
)
@click.option(
    "--primary",
    nargs=2,
    metavar="A B",
    help="the one comparison that the table was made for, named as in --compare: HR@1 of A minus "
    "B, printed first, with its interval and not adjusted; everything else is secondary",
)
@click.option(
    "--margin",
    nargs=2,
    type=FROM_0,
    default=(0.01, 0.003),
    metavar="NEAR ALL",
    help="rows that differ by less count as equal: in HR@1 and NDCG@10 among candidates, in HR@20 "
    "and NDCG@20 over all items",
)
@click.option(
    "--exploratory",
    is_flag=True,
    help="a sweep, or a table that was not planned: no row is marked",
)
@click.option(
    "--fuse",
    nargs=2,
    multiple=True,
    metavar="A B",
    help="adds the row A+B: standardised scores of two rows, the weight chosen on validation",
)
@click.option(
    "--neighbours",
    type=click.Choice(["tfidf", "minilm"]),
    help="for each LM that scores titles by their likelihood, adds a row in which a title counts "
    "for titles like it too (LLMSEQPROMPT), and a control with other titles' vectors",
)
@click.option(
    "--shuffle-history",
    is_flag=True,
    help="adds a row of every run that sees its histories in a random order: does it use the "
    "order at all?",
)
@click.option(
    "--two-stage",
    type=click.Choice(["backbone", "shuffled"]),
    help="each LM also ranks the items that its backbone retrieves, as many as the run had "
    "--candidates, listed in this order (LlamaRec); prints backbone, LM, both together, ceiling",
)
@click.option(
    "--notes",
    metavar="FILE",
    help="a JSON file of what the table's last column says: head, rows {row: text}, below [line]",
)
@click.option(
    "--latency",
    is_flag=True,
    help="also measure the time of a request, alone on one core (an LM's on the GPU where there is "
    "one), and count parameters",
)
@click.option(
    "--report",
    "page",
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
@click.option(
    "--free",
    is_flag=True,
    help="instead of a table: what an LM writes of its own accord, and how often that is one "
    "candidate's title (LLaRA's valid ratio), on --val-samples",
)
@click.option(
    "--card",
    is_flag=True,
    help="instead of a table: write README.md and what answering needs beside the weights into the "
    "run's folder, so that it can be shared (the table of --out stands in it)",
)
# the plain LM
@click.option(
    "--llm", help="adds the row of this LM without any training; random:NAME: with random weights"
)
@click.option(
    "--llm-out",
    help="run folder of the plain LM, used again if it was made the same way; runs/<dataset>/lm",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="make the plain LM's run, the export, or the card, anew and replace the one that is there "
    "once it is finished",
)
@checks_of("plain LM: ")
@click.option("--verbalizer", default="likelihood", type=verbalizers, help="of the plain LM")
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
    help="validation samples for the weights of fusion (of the half that no run was chosen on, "
    "which is scored where it is not yet), for the plain LM's weight (of the other half), and for "
    "--probe; 0 = all",
)
# answers
@options(*answer_options)
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
@click.option(
    "--folds",
    multiple=True,
    help="with --export: a run of finetune.py --without-fold, which answers for the users it has "
    "not seen; more may follow it",
)
@click.option(
    "--export-onnx",
    is_flag=True,
    help="write a backbone as one file that answers without torch: RUN/model.onnx, or --out",
)
def main(**config: Any) -> None:
    """Metrics with intervals, paired tests and floors for any runs; or what one run answers."""
    cfg = SimpleNamespace(**config)
    cfg.llm = cfg.llm and located(cfg.llm)
    names = names_given(cfg)
    if not names and not cfg.llm:
        stop("nothing to evaluate; give --ckpt RUN (a run folder) or --llm NAME --dataset NAME")
    ranks = setup(0)
    runs, data = open_runs(names, cfg.dataset, ranks)
    if flag := asks_one_run(cfg, typed_of(click.get_current_context(), config)):
        ask_one_run(flag, runs, data, cfg, ranks)
        return finish(ranks)
    notes = read_notes(cfg.notes)
    out = table_folder(cfg, runs, data) if ranks.main else None

    # which samples, and the rows: floors, runs, what is fused of them
    began = time.time()
    val = part_of(data, "val", places_for_fusion(data, cfg.val_samples), cfg.C)
    test = part_of(data, "test", places_in_test(data, cfg.limit, cfg.max_history), cfg.C)
    scorer = Scorer(data, cfg.C, ranks, cfg.shard)
    rows = floor_rows(data, val, test)
    if cfg.llm:
        runs.insert(0, plain.plain_lm(cfg, data, scorer))
    backbone = find_backbone(runs, data, ranks)
    named = in_order(runs, backbone, rows)
    settle_names(cfg, named, rows)
    for name, run in named:
        add_run(rows, name, run, scorer, val, test, cfg.shuffle_history)
    pairs = pairs_with_backbone(rows, runs, backbone) if backbone else []
    if cfg.neighbours:
        add_neighbours(rows, cfg.neighbours, data, val, test, ranks)
    add_fused(rows, [*pairs, *cfg.fuse], val.is_target_nC)
    reference = reference_of(rows, backbone, cfg.reference)
    pools = two_stages(runs_of(rows), scorer, test, cfg.two_stage) if cfg.two_stage else {}

    # metrics, intervals, tests
    value = metrics_of(rows, test)
    if not ranks.main:
        return finish(ranks)
    planned = Planned(reference, cfg.compare, *cfg.margin, cfg.exploratory, cfg.primary)
    result = measured(rows, value, data, test, planned, cfg.max_history) | {"two_stage": pools}
    result = with_notes(result, notes)
    if cfg.latency:
        add_latency(result, runs_of(rows), data, cfg.pool)

    # written down
    print("\n" + "\n".join(table_lines(result)) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", result)
    write_tables(out, result)
    store_ranks(runs_of(rows), value, test, len(data.test))
    drawn = figures_of(result, names_of(rows))
    if cfg.page:
        shown = {name: rows[name].test_nC for name in told_apart(runs_of(rows), reference)}
        cases = cases_of(data, test, shown, value)
        configs = {n: read_json(run.folder / "config.json") for n, run in runs_of(rows).items()}
        line = command_line(click.get_current_context())
        write_page(Path(cfg.page), result, drawn, cases, configs, line)
    write_figures(out, drawn)
    if scorer.prompts:
        share = 100 * scorer.seconds / (time.time() - began)
        print(
            f"{scorer.prompts / scorer.seconds:.2f} samples/s scored by LMs ({scorer.prompts} "
            f"prompts of {cfg.C} candidates), {share:.0f} % of the time"
        )
    print(
        f"written: {out / 'metrics.json'}, table.txt .md .tex .csv, "
        f"{', '.join(f'{name}.png' for name in drawn)}"
        + (f"; {cfg.page}" if cfg.page else "")
        + "; per-sample ranks in each run folder"
    )
    print(last_line(value))
    finish(ranks)


if __name__ == "__main__":
    main()
