"""Stage 0: train the conventional model on item ids, and write what the next stages read of it.

The model is SASRec, GRU4Rec or Caser.

    python train_backbone.py --dataset ml-100k                        SASRec, one process
    torchrun --nproc_per_node=4 train_backbone.py --dataset beauty    the same metrics, many GPUs
    python train_backbone.py --model caser --epochs 2                 a quick look
    python train_backbone.py --teacher ml-100k/slmrec                 taught by an LM, once
                                       evaluate.py --ckpt ml-100k/slmrec --export has been run

Reads data/<dataset>/ (data/prepare.py), writes runs/<dataset>/<model>/:

    model.safetensors, config.json    the model, and what load() needs to build it again
    topk_{train,val,test}.npy         int32 (n, h): the items it would show next, best first
    scores_{train,val,test}_{C}.npy   float32 (n, C): its scores of the stored candidates
    full_{val,test}.npy               int32 (n, 2): how many items score above and equal to the
                                      target, those of the history left out
    metrics.json, log.jsonl           the means with their protocol; one line an epoch

The papers train with one sampled negative (--loss bce). Ours is the softmax over the whole
catalogue (--loss ce), which is far stronger.

--teacher is DLLM2Rec (arXiv 2405.00338, section 4). The student also learns the teacher's list of
every training sample, weighted by place, confidence and agreement: L = L_student + lam L_d. Its
item vectors are e_i = b_i + eta (W z_i + c), where z_i is the LM's vector of the title. They are
plain vectors after training, so serving needs no LM.

Names: B sequences, L window, E width, I items (ids 1..I, 0 pads on the left), N training
positions, C candidates, h list length.
"""

import json
import time
from types import SimpleNamespace

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.utils import parametrize

from common import claim, finish_run, going_on, start_run, stop_unless_finite
from delrec.backbone import dllm2rec
from delrec.backbone.losses import binary_loss, catalogue_loss, list_loss, sampled_loss
from delrec.backbone.models import NAMES, build
from delrec.backbone.ranking import rank_all
from delrec.data.prepared import (
    batch_of,
    candidates,
    load_data,
    runs_of_targets,
    subset,
    users,
)
from delrec.metrics import chance, compare, metrics
from delrec.processes import (
    finish,
    restarted,
    setup,
    sum_gradients,
    sum_over_ranks,
)
from delrec.runtime import described, folder_of, stop, write_json, write_npy
from delrec.training import checkpoints
from delrec.training.log import Log, cut_log

# paper: width, dropout, lr and batch (DELRec, section V), GRU4Rec's optimiser excepted: Adagrad
# with 1e-2 there, Adam here (ml-100k, val HR@1 among
# 15 .574 and .605). Ours: window, most epochs and patience; tried for SASRec on ml-100k's val part.
DEFAULTS = {
    "sasrec": dict(history=20, width=100, dropout=0.5, lr=1e-3, batch=128, epochs=40, patience=5),
    "gru4rec": dict(history=20, width=64, dropout=0.3, lr=1e-3, batch=50, epochs=40, patience=5),
    "caser": dict(history=5, width=100, dropout=0.4, lr=1e-3, batch=128, epochs=20, patience=3),
}


# -------------------------------------------- training batches: every training target once an epoch


def negatives(data, first, target_BL, seen, rng):
    """One item per target, uniform over those the user has not in the training part.

    `seen`: sorted user * (I+1) + item.
    """
    user_BL = np.broadcast_to(users(data, first)[:, None], target_BL.shape)
    item_BL = rng.integers(1, data.n_items + 1, target_BL.shape)
    # a user who has nearly everything keeps what the last draw gave
    for _ in range(20):
        key_BL = user_BL * (data.n_items + 1) + item_BL
        bad_BL = seen[np.minimum(np.searchsorted(seen, key_BL), len(seen) - 1)] == key_BL
        if not bad_BL.any():
            break
        item_BL[bad_BL] = rng.integers(1, data.n_items + 1, int(bad_BL.sum()))
    return item_BL


def loss_of(model, seq_BL, target_BL, negative_BL=None, taught=None):
    """Sum of the losses of the positions that have a target.

    negative_BL: none, the softmax runs over all items; (n,) items shared by all positions, a
    sampled softmax; one a position (B, L), binary cross-entropy. taught: f(x_NE, at_NE, L) -> the
    teacher's part (taught_by, in main).
    """
    x_BLE = model(seq_BL)
    L = x_BLE.shape[1]
    at_NE = (target_BL[:, -L:] != 0).nonzero(as_tuple=True)
    x_NE, target_N = x_BLE[at_NE], target_BL[:, -L:][at_NE]
    if negative_BL is None:
        loss = catalogue_loss(model, x_NE, target_N)
    elif negative_BL.dim() == 1:
        loss = sampled_loss(model, x_NE, target_N, negative_BL)
    else:
        loss = binary_loss(model, x_NE, target_N, negative_BL[:, -L:][at_NE])
    return loss if taught is None else loss + taught(x_NE, at_NE, L)


def means(greater, equal):
    return {k: round(float(v.mean()), 5) for k, v in metrics(greater, equal).items()}


# ---------------------------------------------------------------- the script


@click.command(**described(__doc__))
# data
@click.option(
    "--dataset", default="ml-100k", help="name under data/, or a folder written by data/prepare.py"
)
@click.option(
    "--out",
    default=None,
    type=str,
    help="run folder to write; runs/<dataset>/<model>, with a teacher <model>-taught, if not given",
)
# model (paper's values per model: width 100/64/100, dropout .5/.3/.4)
@click.option(
    "--model",
    "--student",
    default="sasrec",
    type=click.Choice(list(DEFAULTS)),
    help="the conventional model",
)
@click.option(
    "--history", default=None, type=click.IntRange(1), help="items the model sees, L; 20, Caser 5"
)
@click.option(
    "--width",
    default=None,
    type=click.IntRange(1),
    help="width of the item vectors, E; 100, GRU4Rec 64",
)
@click.option(
    "--dropout",
    default=None,
    type=click.FloatRange(0, 0.95),
    help="share dropped in training; .5, GRU4Rec .3, Caser .4",
)
# training
@click.option(
    "--loss",
    default="ce",
    type=click.Choice(["ce", "sampled", "bce"]),
    help="ce: softmax over all items; sampled: over --negatives of them, for catalogues of "
    "100,000 and more; bce: the paper's one negative",
)
@click.option(
    "--negatives",
    default=1024,
    type=click.IntRange(1),
    help="items that --loss sampled draws for each batch",
)
@click.option(
    "--lr",
    default=None,
    type=click.FloatRange(0, min_open=True),
    help="learning rate of Adam; 1e-3",
)
@click.option(
    "--batch",
    default=None,
    type=click.IntRange(1),
    help="windows of an optimiser step, over all processes; 128, GRU4Rec 50",
)
@click.option("--epochs", default=None, type=click.IntRange(0), help="most epochs; 40, Caser 20")
@click.option(
    "--patience",
    default=None,
    type=click.IntRange(1),
    help="stop after so many epochs without a better validation; 5, Caser 3",
)
@click.option("--seed", default=0, type=click.IntRange(0), help="seed of everything random")
# a teacher (DLLM2Rec)
@click.option(
    "--teacher",
    default=None,
    type=str,
    help="run folder of an LM after evaluate.py --ckpt RUN --export; tfidf: no LM, the titles' "
    "vectors are bags of words (the control)",
)
@click.option(
    "--lam",
    default=0.0,
    type=click.FloatRange(0),
    help="weight of the teacher's lists, lambda (paper: .1 to 1); 0: without; they helped Caser "
    "(.1), not SASRec",
)
@click.option(
    "--list-loss",
    default="softmax",
    type=click.Choice(["softmax", "sigmoid"]),
    help="listed items against the catalogue, or against one unlisted item (the paper)",
)
@click.option(
    "--w-position", default=0.3, type=click.FloatRange(0), help="weight of a listed item's place"
)
@click.option(
    "--w-confidence",
    default=0.5,
    type=click.FloatRange(0),
    help="weight of the teacher's confidence",
)
@click.option(
    "--w-consistency",
    default=0.1,
    type=click.FloatRange(0),
    help="weight of being in the student's own best K",
)
@click.option(
    "--confidence",
    default="truth",
    type=click.Choice(["truth", "listed"]),
    help="the teacher's probability of the true item (paper's text), or of the listed one (its "
    "code)",
)
@click.option(
    "--eta",
    default=1.0,
    type=click.FloatRange(0),
    help="weight of the titles' vectors in the item vectors (paper: .1 to 1); 0: without",
)
@click.option(
    "--offset/--no-offset", default=True, help="learn a vector of each item beside its title's"
)
# what is written
@click.option("--top-h", default=20, type=click.IntRange(1), help="length of the stored lists, h")
@click.option(
    "--lists",
    default=200_000,
    type=click.IntRange(1),
    help="training samples that get a list and scores, drawn once; the next stages train on those",
)
# going on
@going_on
def main(**config):
    """Stage 0: train SASRec, GRU4Rec or Caser on item ids and write its lists and scores."""
    cfg = SimpleNamespace(
        **{k: DEFAULTS[config["model"]].get(k) if v is None else v for k, v in config.items()}
    )
    data = load_data(cfg.dataset)
    for split in ("train", "val", "test"):
        if not len(getattr(data, split)):
            stop(
                f"{data.folder} has no {split} samples; prepare it with another --split or a "
                "smaller --core"
            )
    if cfg.top_h > data.n_items:
        stop(
            f"--top-h {cfg.top_h} is more than the {data.n_items} items of the catalogue; lower it"
        )
    name = f"{data.folder_name}/{cfg.model}{'-taught' if cfg.teacher else ''}"
    folder = folder_of("runs", cfg.out or name)
    ranks, cfg.resume = setup(cfg.seed), cfg.resume or restarted()
    claim(folder, cfg, ranks)
    export = dllm2rec.read_export(cfg.teacher, data, cfg) if cfg.teacher else None
    if cfg.teacher and not (cfg.w_position + cfg.w_confidence > 0):
        stop(
            "--w-position and --w-confidence are both 0, so no listed item has a weight; give one "
            "of them a number above 0"
        )
    if not cfg.offset and not (cfg.teacher and cfg.eta):
        stop(
            "--no-offset leaves the titles' vectors only, but there are none: it needs --teacher "
            "and --eta above 0"
        )
    out, record = start_run(folder, "train_backbone", cfg, data, ranks)
    saver = checkpoints.Saver(
        out, cfg.checkpoint_every, checkpoints.made_with(cfg, data, ranks), ranks
    )
    sizes = [
        C
        for C in (15, 20, 100)
        if all((data.folder / f"candidates_{s}_{C}.npy").exists() for s in ("val", "test"))
    ]
    listed = subset(len(data.train), cfg.lists, cfg.seed)
    cand = {
        s: {
            C: candidates(data, s, C, listed if s == "train" else slice(None))
            for C in sizes
            if s != "train" or (data.folder / f"candidates_train_{C}.npy").exists()
        }
        for s in ("train", "val", "test")
    }
    own = {s: data.items[getattr(data, s)].astype(np.int64)[:, None] for s in ("val", "test")}

    def summary(s, got):
        return {
            f"candidates{C}": means(*compare(got[C], cand[s][C] == own[s]))
            for C in sizes
            if C in got
        } | {"full": means(*got["full"].T)}

    # model. The biases start at the log-odds of each item in the training part, where both losses
    # have their optimum without a history.
    model = build(cfg.model, data.n_items, cfg).to(ranks.device)
    count_I = np.bincount(data.items[data.train], minlength=data.n_items + 1) + 1.0
    model.bias.data = torch.tensor(
        np.log(count_I / count_I.sum() * data.n_items), dtype=torch.float32, device=ranks.device
    )
    if cfg.teacher and cfg.eta:
        if not cfg.offset:
            model.item.weight.requires_grad_(False).zero_()
        parametrize.register_parametrization(
            model.item, "weight", dllm2rec.Titles(export[2], cfg.width, cfg.eta).to(ranks.device)
        )
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.Adam(params, lr=cfg.lr, fused=True)
    # a process with no row in a small last batch adds zeros
    for p in params:
        p.grad = torch.zeros_like(p)
    # weights alike on all ranks, dropout not
    torch.manual_seed(1000 * cfg.seed + ranks.rank + 1)

    # what the batches read
    is_target = np.zeros(len(data.items), bool)
    is_target[data.train] = True
    # with a user's first item, which is input only
    have = np.union1d(data.train, np.asarray(data.ptr)[:-1])
    seen = np.unique(users(data, have) * (data.n_items + 1) + data.items[have])
    # Caser: one window a target, its architecture has one state
    span = 1 if cfg.model == "caser" else cfg.history

    # a target's row among the training samples
    row_of = np.full(len(data.items), -1)
    row_of[data.train] = np.arange(len(data.train))

    def taught_by(last_B, target_BL, rng):
        """lam L_d of this process' rows of a batch, as loss_of asks for it: a mean over the
        positions that have a list, times the batch's targets.
        """
        row_BL = np.where(
            target_BL > 0,
            row_of[np.maximum(last_B[:, None] - np.arange(cfg.history - 1, -1, -1), 0)],
            -1,
        )
        row_BL = np.where((row_BL >= 0) & (export[0][row_BL, 0] > 0), row_BL, -1)
        negative_BL = negatives(data, last_B, target_BL, seen, rng)
        scale = cfg.lam * np.count_nonzero(target_BL) / max(np.count_nonzero(row_BL >= 0), 1)

        def taught(x_NE, at_NE, L):
            row_N, negative_N = (
                a[ranks.rank :: ranks.world][:, -L:][tuple(i.cpu().numpy() for i in at_NE)]
                for a in (row_BL, negative_BL)
            )
            have = row_N >= 0
            if not have.any():
                return 0.0
            item_NK, weight_NK, negative_N = (
                torch.from_numpy(np.ascontiguousarray(a)).to(ranks.device)
                for a in (
                    export[0][row_N[have]].astype(np.int64),
                    export[1][row_N[have]],
                    negative_N[have],
                )
            )
            return scale * list_loss(
                model,
                x_NE[torch.from_numpy(have).to(ranks.device)],
                item_NK,
                weight_NK,
                negative_N,
                cfg,
            )

        return taught

    # loop: validate (epoch 0 is the untrained model), then stop or train one more epoch. Chosen by
    # NDCG@10 over all items, history masked
    shown = {C: cand["val"][C] for C in sizes[:1]}
    best, best_epoch, fields, training, kept, begin, total, done = (
        -1.0,
        0,
        {},
        0.0,
        {},
        (0, 0),
        torch.zeros((), device=ranks.device),
        0,
    )
    if found := saver.load() if cfg.resume else None:
        done, tensors, state = found
        begin, best, best_epoch, fields, training = (
            tuple(state["at"]),
            state["best"],
            state["best_epoch"],
            state["fields"],
            state["training"],
        )
        model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        kept = {k[5:]: v.to(ranks.device) for k, v in tensors.items() if k.startswith("kept.")}
        checkpoints.restore_optimiser("opt", opt, tensors)
        total = tensors["total"][ranks.rank].to(ranks.device)
        record["started"] -= state["seconds"]
    cut_log(out, NAMES[cfg.model], begin[0] - (begin[1] == 0), ranks)
    checkpoints.listen()

    def save(epoch, step):
        """All that the loop goes on from: `step` steps of an epoch done, 0 with the validation
        before it still to do.
        """
        totals = torch.stack(
            [
                sum_over_ranks(total if r == ranks.rank else torch.zeros_like(total), ranks)
                for r in range(ranks.world)
            ]
        )
        saver.save(
            done,
            {
                **{f"model.{k}": v for k, v in model.state_dict().items()},
                **{f"kept.{k}": v for k, v in kept.items()},
                **checkpoints.optimiser_tensors("opt", opt),
                "total": totals,
            },
            {
                "at": [epoch, step],
                "best": best,
                "best_epoch": best_epoch,
                "fields": fields,
                "training": training + (time.time() - began if step else 0),
                "seconds": time.time() - record["started"],
            },
        )

    log = Log(out, cfg.epochs, NAMES[cfg.model], ranks, unit="epoch", done=begin[0])
    for epoch in range(begin[0], cfg.epochs + 1):
        if begin[1] == 0 or epoch > begin[0]:
            with parametrize.cached():
                val = summary("val", rank_all(model, data, data.val, ranks, cand=shown))
            fields |= {f"val_hr@1_of_{C}": val[f"candidates{C}"]["hr@1"] for C in shown} | {
                "val_ndcg@10": val["full"]["ndcg@10"]
            }
            if val["full"]["ndcg@10"] > best:
                best, best_epoch = val["full"]["ndcg@10"], epoch
                kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
            log.step(epoch, **fields)
        if epoch == cfg.epochs or epoch - best_epoch >= cfg.patience:
            break

        began, skip = time.time(), begin[1] if epoch == begin[0] else 0
        model.train()
        rng = np.random.default_rng([cfg.seed, epoch])
        first, last = runs_of_targets(data, span, rng)
        order = rng.permutation(len(first))
        total = total if skip else torch.zeros((), device=ranks.device)
        for step, i in list(enumerate(range(0, len(order), cfg.batch)))[skip:]:
            at = order[i : i + cfg.batch]
            seq_BL, target_BL = batch_of(data, first[at], last[at], cfg.history, is_target)
            arrays = [seq_BL, target_BL]
            if cfg.loss == "bce":
                arrays.append(
                    negatives(
                        data,
                        first[at],
                        target_BL,
                        seen,
                        np.random.default_rng([cfg.seed, epoch, step]),
                    )
                )
            shared = (
                [
                    torch.from_numpy(
                        np.random.default_rng([cfg.seed, epoch, step]).integers(
                            1, data.n_items + 1, cfg.negatives
                        )
                    ).to(ranks.device)
                ]
                if cfg.loss == "sampled"
                else []
            )
            # columns of nothing but padding are cut off
            L = (seq_BL != 0).any(0).sum()
            mine = [
                torch.from_numpy(a[ranks.rank :: ranks.world, -L:]).to(ranks.device) for a in arrays
            ]
            taught = (
                taught_by(last[at], target_BL, np.random.default_rng([cfg.seed, epoch, step, 1]))
                if cfg.teacher and cfg.lam
                else None
            )
            opt.zero_grad(set_to_none=False)
            if len(mine[0]):
                # item vectors made of titles are computed once a step
                with parametrize.cached():
                    loss = loss_of(model, *mine, *shared, taught=taught) / np.count_nonzero(
                        target_BL
                    )
                    loss.backward()
                total += loss.detach() * np.count_nonzero(target_BL)
            sum_gradients(params, ranks)
            stop_unless_finite(params, f"{step + 1} of epoch {epoch + 1}", last[at], data)
            opt.step()
            done += 1
            if (asked := checkpoints.stop_asked(ranks)) or saver.due(done):
                save(epoch, step + 1)
            if asked:
                log.close()
                saver.end(done)
        loss = sum_over_ranks(total, ranks).item() / len(data.train)
        training += time.time() - began
        fields = {"loss": loss}
        save(epoch + 1, 0)
    log.close()
    model.load_state_dict(kept)
    # fold the titles in: from here on plain item vectors
    if cfg.teacher and cfg.eta:
        parametrize.remove_parametrizations(model.item, "weight", leave_parametrized=True)
        kept = {k: v.detach() for k, v in model.state_dict().items()}

    # the lists and scores of every sample, with the best weights; the only look at the test part
    got = {
        s: rank_all(
            model,
            data,
            data.train[listed] if s == "train" else getattr(data, s),
            ranks,
            cfg.top_h,
            cand[s],
        )
        for s in ("train", "val", "test")
    }
    # what has no list has zeros, and NaN for scores
    for k, rows in got["train"].items():
        got["train"][k] = np.full(
            (len(data.train), *rows.shape[1:]), np.nan if k in sizes else 0, rows.dtype
        )
        got["train"][k][listed] = rows
    if ranks.main:
        save_file({k: v.cpu().contiguous() for k, v in kept.items()}, out / "model.safetensors")
        for s in got:
            write_npy(out / f"topk_{s}.npy", got[s]["list"])
        for s in ("val", "test"):
            write_npy(out / f"full_{s}.npy", got[s]["full"])
        for s in got:
            for C in cand[s]:
                write_npy(out / f"scores_{s}_{C}.npy", got[s][C])
        results = {s: summary(s, got[s]) for s in ("val", "test")}
        protocol = (
            f"{data.meta.get('split', 'given')} split; candidatesC: the target among C-1 stored "
            "items the user never had; "
            f"full: all {data.n_items} items, the user's earlier ones masked; ties count as every "
            "order they could fall in; "
            "weights chosen by val full ndcg@10"
        )
        write_json(out / "metrics.json", {"protocol": protocol, **results})
        record = finish_run(
            folder,
            record
            | {
                "out": str(folder),
                "n_items": data.n_items,
                "parameters": sum(p.numel() for p in model.parameters()),
                "optimiser": type(opt).__name__,
                "epochs_run": epoch,
                "best_epoch": best_epoch,
                "samples_per_second": round(epoch * len(data.train) / max(training, 1e-9), 1),
            },
        )
        columns = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")
        print(
            f"\n{NAMES[cfg.model]} on {data.name}, {cfg.loss}, best of {epoch} epochs: "
            f"{best_epoch}\n{protocol}\n"
        )
        print(f"{'':22}" + "".join(f"{c:>9}" for c in columns))
        for s in results:
            for space, m in results[s].items():
                print(f"{s + ' ' + space:22}" + "".join(f"{m[c]:9.4f}" for c in columns))
        for space, C in [(f"candidates{C}", C) for C in sizes] + [("full", data.n_items)]:
            print(f"{'chance ' + space:22}" + "".join(f"{chance(C)[c]:9.4f}" for c in columns))
        print(
            json.dumps(
                {
                    "stage": "train_backbone",
                    "out": str(folder),
                    "candidates": min(sizes, default=0),
                    **{
                        f"{s}_{c}": round(results[s][f"candidates{C}"][c], 4)
                        for s in results
                        for c in ("hr@1", "ndcg@10")
                        for C in sizes[:1]
                    },
                    **{
                        f"{s}_full_ndcg@10": round(results[s]["full"]["ndcg@10"], 4)
                        for s in results
                    },
                    **{
                        k: record[k]
                        for k in (
                            "seconds",
                            "epochs_run",
                            "best_epoch",
                            "samples_per_second",
                            "peak_gb",
                        )
                    },
                }
            )
        )
    finish(ranks)


if __name__ == "__main__":
    main()
