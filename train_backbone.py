"""Stage 0: train the conventional model on item ids, and write what the next stages read of it.

The model is SASRec, GRU4Rec, Caser or a newer one (docs/commands.md lists them).

    python train_backbone.py --dataset ml-100k                        SASRec, one process
    torchrun --nproc_per_node=4 train_backbone.py --dataset beauty    the same metrics, many GPUs
    python train_backbone.py --model caser --epochs 2                 a quick look
    python train_backbone.py --dataset shop --from shop/old           go on, the log has grown
    python train_backbone.py --teacher ml-100k/slmrec --lam .1        taught by an LM's --export
    python train_backbone.py --text tfidf                             titles in the item vectors

Reads data/<dataset>/ (data/prepare.py), writes runs/<dataset>/<model>/:

    model.safetensors, config.json    the model, and what load() needs to build it again
    topk_{train,val,test}.npy         int32 (n, h): the items it would show next, best first
    scores_{train,val,test}_{C}.npy   float32 (n, C): its scores of the stored candidates
    full_{val,test}.npy               int32 (n, 2): how many items score above and equal to the
                                      target, those of the history left out
    metrics.json, log.jsonl           the means with their protocol; one line an epoch

The papers train with one sampled negative (--loss bce). Ours is the softmax over the whole
catalogue (--loss ce), which is far stronger.

--teacher is DLLM2Rec (arXiv 2405.00338, section 4). With --lam the student also learns the
teacher's list of every training sample, weighted by place, confidence and agreement: L = L_student
+ lam L_d. Its item vectors are e_i = b_i + eta (W z_i + c), where z_i is the LM's vector of the
title. --text takes z_i from elsewhere, --text-in makes e_i otherwise (docs/text.md). They are plain
vectors after training, so serving needs no LM.

Names: B sequences, L window, E width, I items (ids 1..I, 0 pads on the left), N training
positions, C candidates, h list length.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import torch
from torch.nn.utils import parametrize

import common
from delrec.backbone import (
    bert4rec,
    contrast,
    dllm2rec,
    dros,
    folds,
    models,
    options,
    presets,
    results,
    text,
    text_ways,
    titled,
    warm_start,
)
from delrec.backbone.batches import Targets, lengthen
from delrec.backbone.epoch_loss import EpochLoss
from delrec.backbone.losses import binary_loss, calibrated_loss, catalogue_loss, sampled_loss
from delrec.backbone.text_options import text_options
from delrec.data.prepared import Data
from delrec.names import NAMES
from delrec.processes import Ranks, finish, sum_gradients
from delrec.ranges import ABOVE_0, WHOLE, Number
from delrec.runtime import described, stop
from delrec.training import checkpoints, steps
from delrec.training.averaged import Averaged
from delrec.training.loop import Best, Loop, OptimiserState

# paper: width, dropout, lr and batch (DELRec, section V), but not GRU4Rec's optimiser: Adam here,
# Adagrad with 1e-2 there. Ours: window, most epochs, patience (docs/results/backbones.md).
DEFAULTS = {
    "sasrec": dict(history=20, width=100, dropout=0.5, lr=1e-3, batch=128, epochs=100, patience=10),
    "gru4rec": dict(history=20, width=64, dropout=0.3, lr=1e-3, batch=50, epochs=100, patience=20),
    "caser": dict(history=5, width=100, dropout=0.4, lr=1e-3, batch=128, epochs=20, patience=3),
    # Their own papers', for Amazon's logs; BERT4Rec's: arXiv 2309.07602 (docs/differences.md).
    "esasrec": dict(history=50, width=64, dropout=0.2, lr=1e-3, batch=128, epochs=200, patience=50),
    "bsarec": dict(history=50, width=64, dropout=0.5, lr=5e-4, batch=256, epochs=200, patience=10),
    "lrurec": dict(history=50, width=64, dropout=0.2, lr=1e-3, batch=128, epochs=100, patience=10),
    "bert4rec": dict(
        history=50, width=64, dropout=0.1, lr=1e-3, batch=128, epochs=200, patience=20
    ),
}
ALL = DEFAULTS | titled.DEFAULTS


def loss_of(
    model: torch.nn.Module,
    seq_BL: torch.Tensor,
    target_BL: torch.Tensor,
    negative_BL: torch.Tensor | None = None,
    taught: Callable | None = None,
    robust: dros.Robust | None = None,
    gbce: bool = False,
) -> torch.Tensor:
    """Sum of the losses of the positions that have a target.

    negative_BL: none, the softmax runs over all items; (n,) items shared by all positions, a
    sampled softmax, or gBCE; one a position (B, L), binary cross-entropy.
    taught(model, x_NE, at_N, L): the teacher's part (DLLM2Rec), from the states and their places
    in the last L columns. robust: the term of DROS.
    """
    if hasattr(model, "loss"):  # it has no states
        return model.loss(seq_BL, target_BL[:, -1], negative_BL)
    x_BLE = models.states(model, seq_BL)
    target_BL = target_BL[:, -x_BLE.shape[1] :]  # Caser and BSARec have one state, the last
    at_N = (target_BL != 0).nonzero(as_tuple=True)
    x_NE, target_N = x_BLE[at_N], target_BL[at_N]
    if negative_BL is None:
        loss = catalogue_loss(model, x_NE, target_N)
    elif negative_BL.dim() == 1:
        shared_loss = calibrated_loss if gbce else sampled_loss
        loss = shared_loss(model, x_NE, target_N, negative_BL)
    else:
        loss = binary_loss(model, x_NE, target_N, negative_BL[:, -x_BLE.shape[1] :][at_N])
    if robust:
        loss = loss + robust.term(model, x_NE, target_N[:, None])
    # L = L_student + lam L_d
    return loss if taught is None else loss + taught(model, x_NE, at_N, x_BLE.shape[1])


def faults_of(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    """What cannot be meant, whatever the data are: (is it so?, a sentence)."""
    found = dllm2rec.faults(cfg) + folds.faults(cfg)
    return found + text_ways.faults_of(cfg) + bert4rec.faults(cfg)


def check(cfg: SimpleNamespace, data: Data) -> None:
    """Stops at what cannot be meant on these data."""
    for split in ("train", "val", "test"):
        if not len(getattr(data, split)):
            stop(
                f"{data.folder} has no {split} samples; prepare it with another split or a smaller "
                "core (data/prepare.py --split S --core N)"
            )
    too_long = (
        cfg.top_h > data.n_items,
        f"--top-h {cfg.top_h} is more than the {data.n_items} items of the catalogue; lower it",
    )
    common.refuse([too_long, folds.too_many(cfg, data)])


# ---------------------------------------------------------------- the script


@click.command(**described(__doc__))
# data
@common.dataset_option
@click.option(
    "--out",
    help="run folder to write; runs/<dataset>/<model> if not given, with --teacher <model>-taught, "
    "with --text <model>-text",
)
# model (paper's values per model: width 100/64/100, dropout .5/.3/.4)
@presets.preset_option
@click.option(
    "--model",
    default="sasrec",
    # one that stands in MODELS or DEFAULTS alone is told what it lacks
    type=click.Choice(list(models.ALL | ALL)),
    help="the conventional model; docs/commands.md has the defaults of the newer ones",
)
@click.option("--history", type=WHOLE, help="items the model sees, L; 20, Caser 5")
@click.option("--width", type=WHOLE, help="width of the item vectors, E; 100, GRU4Rec 64")
@click.option(
    "--dropout",
    type=Number(0, 0.95),
    help="share dropped in training; .5, GRU4Rec .3, Caser .4",
)
@common.options(*text_options)
# training
@click.option(
    "--from",
    "from_run",
    help="go on from this run, made when the log had fewer items and users; same raw ids",
)
@click.option(
    "--loss",
    default="ce",
    type=click.Choice(["ce", "sampled", "gbce", "bce"]),
    help="ce: softmax over all items; sampled: over --negatives of them, for catalogues of "
    "100,000 and more; gbce: gSASRec's, over as many; bce: the paper's one negative",
)
@click.option(
    "--negatives", default=1024, type=WHOLE, help="items that sampled and gbce draw for each batch"
)
@click.option("--lr", type=ABOVE_0, help="learning rate of Adam; 1e-3")
@click.option(
    "--batch", type=WHOLE, help="windows of an optimiser step, over all processes; 128, GRU4Rec 50"
)
@click.option(
    "--epochs",
    type=click.IntRange(0),
    help="most epochs; 100, Caser 20, on a small log as many as make 1,000 steps",
)
@click.option(
    "--patience",
    type=WHOLE,
    help="stop after so many epochs without a better validation; 10, GRU4Rec 20, Caser 3, on a "
    "small log as many as make 150 steps",
)
@common.seed_option
@common.options(*options.dllm2rec_options)
@common.options(*options.added_options)
@common.options(*options.kda_options)
# what is written
@click.option("--top-h", default=20, type=WHOLE, help="length of the stored lists, h")
@click.option(
    "--lists",
    default=200_000,
    type=WHOLE,
    help="training samples that get a list and scores, drawn once; the next stages train on those",
)
@click.option(
    "--folds",
    default=0,
    type=click.IntRange(0),
    help="out of fold: divide the users into so many folds, train a model without each, and write "
    "what it says of those users' training samples (so many times as long again); 0: what the "
    "model itself says",
)
@common.going_on
def main(**config) -> None:
    """Stage 0: train a conventional model on item ids and write its lists and scores."""
    cfg = SimpleNamespace(**config)
    asked = {key: getattr(cfg, key) for key in ("epochs", "patience")}
    ctx = click.get_current_context()
    common.refuse(options.half_registered(cfg, ALL) + presets.faults(cfg))
    if cfg.resume and warm_start.is_gone(cfg):
        common.enter(cfg, cfg.model)  # a finished run, which needs that one no more, ends here
    if cfg.from_run:
        warm_start.settle(cfg, common.typed_of(ctx, config))
    moved = common.moved_of(ctx, config)
    common.refuse(titled.faults(cfg, moved) + options.idle(cfg, moved))
    common.fill(cfg, ALL[cfg.model])
    common.refuse(faults_of(cfg))
    text.must_be_there(cfg)  # before the data: fit() asks up to here
    ranks, data, folder = common.enter(cfg, f"{cfg.model}{text.ending_of(cfg)}")
    lengthen(cfg, asked, data)
    check(cfg, data)
    given = dllm2rec.read_given(cfg, data, ranks, common.minilm)
    titled.settle(cfg, given, data)
    out, record = common.start_run(folder, "train_backbone", cfg, data, ranks)
    if cfg.epochs:
        common.say(ranks, common.held(cfg.batch, cfg.batch, ranks.world, "windows"))
    if cfg.lam and cfg.teacher:
        common.say(ranks, given.said())
        record["teacher_out_of_fold"] = given.out_of_fold
    if given.text:
        about = given.text.about(data)
        record |= about
        common.say(ranks, text.said(about, cfg))

    protocol = results.Protocol(cfg, data)
    full = fit(cfg, data, ranks, out, given, protocol)
    # the lists and scores of every sample, with the best weights; the only look at the test part
    got = protocol.rank_splits(full.model, ranks, cfg.top_h, states=cfg.folds > 0)
    if cfg.folds:
        record["out_of_fold"] = answer_out_of_fold(cfg, ranks, out, protocol, given, full, got)
    if ranks.main:
        found = results.write_results(out, full.model, protocol, got)
        seconds = max(full.loop.spent["steps"], 1e-9)
        record |= {
            "out": str(folder),
            "n_items": data.n_items,
            "parameters": sum(p.numel() for p in full.model.parameters()),
            "optimiser": "Adam",
            "epochs_run": full.epochs,
            "best_epoch": full.best_epoch,
            "samples_per_second": round(full.epochs * len(data.train) / seconds, 1),
            **getattr(full.model, "chosen", {}),
        }
        record = common.finish_run(folder, record, full.loop.earlier)
        results.print_results(record, protocol, found)
    finish(ranks)


@dataclass
class Fitted:
    """A trained model."""

    model: torch.nn.Module
    epochs: int  # that it was trained for
    best_epoch: int  # whose weights these are
    loop: Loop


def begin(
    cfg: SimpleNamespace, data: Data, ranks: Ranks, given: dllm2rec.Given
) -> tuple[torch.nn.Module, list[torch.nn.Parameter], torch.optim.Optimizer]:
    """(a model before its first step, its parameters that train, their optimiser)."""
    model = models.build(cfg.model, data.n_items, cfg).to(ranks.device)
    results.begin_at_popularity(model, data, cfg)
    if cfg.from_run:
        common.say(ranks, warm_start.carry_over(model, cfg.from_run, data))
    text_ways.enter(model, given.text, cfg, data, ranks)
    if cfg.contrast:
        contrast.add_mask(model, cfg)
    params = [p for p in model.parameters() if p.requires_grad]
    return model, params, torch.optim.Adam(params, lr=cfg.lr, fused=True)


def fit(
    cfg: SimpleNamespace,
    data: Data,
    ranks: Ranks,
    out: Path,
    given: dllm2rec.Given,
    protocol: results.Protocol | None = None,
    epochs: int | None = None,
) -> Fitted:
    """A model of data.train: its best epoch by validation, or with `epochs` the last of so many."""
    model, params, optimiser = begin(cfg, data, ranks, given)
    titled.choose(model, protocol, ranks)
    steps.zero_gradients(params)  # a process with no row in a small last batch adds zeros
    torch.manual_seed(1000 * cfg.seed + ranks.rank + 1)  # weights alike on all ranks, dropout not

    targets, most = Targets(cfg, data), epochs or cfg.epochs
    robust = dros.Robust(cfg, data, ranks.device) if cfg.dros else None
    views = contrast.Contrast(cfg, data) if cfg.contrast else None
    teacher = dllm2rec.Teacher(cfg, data, given, robust) if cfg.teacher and cfg.lam else None
    best, mean, epoch_loss = Best(ranks.device), Averaged(params, cfg.ema), EpochLoss(ranks)
    made = checkpoints.made_with(cfg, data, ranks) | given.made
    saver = checkpoints.Saver(out, cfg.checkpoint_every, made, ranks)
    loop = Loop(saver, NAMES[cfg.model], most, cfg.resume, unit="epoch")
    loop.keep(model=model, opt=OptimiserState(optimiser), best=best, mean=mean, loss=epoch_loss)

    while True:
        epoch = loop.epoch  # 0 is the untrained model
        if loop.step == 0:
            with mean.shown():
                found = protocol.validate(model, ranks) if protocol else {}
                best.offer(found.get("val_ndcg@10", epoch), epoch, model.state_dict())
            loop.log(epoch, **epoch_loss.fields(), **found)
        if epoch == most or epoch - best.step >= cfg.patience:
            break
        model.train()
        for step, (first, last) in loop.over(targets.epoch(epoch)):
            batch = targets.batch(first, last, epoch, step)
            mine = batch.of(ranks)
            taught = teacher and targets.taught_by(teacher, batch, epoch, step, ranks)
            optimiser.zero_grad(set_to_none=False)
            if len(mine[0]):
                with parametrize.cached():  # item vectors made of titles are computed once a step
                    terms = dict(taught=taught, robust=robust, gbce=cfg.loss == "gbce")
                    loss = loss_of(model, *mine, **terms) / batch.n_targets
                    loss.backward()
                epoch_loss.add(loss * batch.n_targets)
            if views:
                views.term(model, batch, (epoch, step), ranks).backward()
            epoch_loss.count(batch.n_targets)
            sum_gradients(params, ranks)
            steps.stop_unless_finite(params, f"{step + 1} of epoch {epoch + 1}", batch.last_B, data)
            optimiser.step()
            mean.take()
        epoch_loss.close()
        loop.next_epoch()
    loop.close()

    model.load_state_dict(best.weights)
    results.leave_plain(model, cfg, data, ranks)
    return Fitted(model, epoch, best.step, loop)


def answer_out_of_fold(
    cfg: SimpleNamespace,
    ranks: Ranks,
    out: Path,
    protocol: results.Protocol,
    given: dllm2rec.Given,
    full: Fitted,
    got: dict[str, dict],
) -> dict:
    """How far the training samples' rates come towards validation's. Replaces what the full model
    says of them in got["train"], and writes states and the folds' item vectors."""
    data = protocol.data
    inside = {key: rows.copy() for key, rows in got["train"].items()}
    fold_U = folds.folds_of_users(data.n_users, cfg.folds, cfg.seed)
    answers = folds.Answers(data, protocol, fold_U, full.model, got["train"])
    for fold in range(cfg.folds):
        common.say(ranks, f"fold {fold + 1} of {cfg.folds}: a model without its users")
        place = out / "checkpoints" / f"fold-{fold}"
        place.mkdir(parents=True, exist_ok=True)
        epochs = max(full.best_epoch, 1)
        torch.manual_seed(cfg.seed)  # a fold begins with the full model's weights
        part = fit(cfg, folds.without(data, fold_U, fold), ranks, place, given, epochs=epochs)
        answers.add(fold, part.model, ranks, cfg.top_h)
        full.loop.earlier += part.loop.earlier  # of a killed run: they count as its seconds too
    tables = folds.gaps(protocol, cfg.history, inside, got["train"], got["val"])
    if ranks.main:
        answers.write(out)
        folds.write_states(out, got)
        folds.print_gaps(tables, cfg.folds, answers.cosine)
    return {"folds": cfg.folds, "cosine": answers.cosine, "rates": tables}


if __name__ == "__main__":
    main()
