"""A control: the backbone's state through a small network instead of an LM.

    python recipes/mlp.py --backbone ml-100k/sasrec --out ml-100k/mlp

Where an LM that reads a backbone's item vectors is better than the backbone, is it the language
model, or any network that is trained once more? Here it is two layers on the state x that the
backbone scores with:

    (d, w) = W_2 gelu(W_1 x + c_1) + c_2,    s = E (x + d) + (1 + w) b,

with the backbone's own E and b, frozen, W_2 and c_2 zero at the beginning (so s is the backbone's),
and cross-entropy over all items, which is what finetune.py --input ids learns from. w lets the
history say how much popularity (b) counts, as an LM's map of what it says can (delrec/lm/items.py).

Reads the run of train_backbone.py --folds K. What it trains on are states_train.npy and
folds.safetensors: the state of a training sample comes from a model that has not seen its user, and
is scored by that model's item vectors, both rotated onto the full model's. Validation and test are
the full model's. Learning rate and epoch are chosen on validation, by NDCG@10 over all items or
--choose.

Writes a run folder that evaluate.py takes as a backbone's: topk_{val,test}.npy, scores, full,
metrics.json, log.jsonl, config.json; and mlp.safetensors. It has no model of its own, so it answers
no new history.

Names: n samples, B of a batch, E width, X = E + 1, I items, K folds.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.nn.functional as F

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import common
from delrec.backbone import results
from delrec.backbone.models import load
from delrec.backbone.ranking import rank_all
from delrec.data.prepared import users
from delrec.lm.listed import backbone_digest
from delrec.lm.residual import stop_without_folds
from delrec.processes import Ranks, finish
from delrec.ranges import WHOLE, Number
from delrec.runtime import (
    Run,
    described,
    load_run,
    read_npy,
    read_tensors,
    usual_run,
    write_tensors,
)
from delrec.training.log import Log
from delrec.training.loop import Best

RATES = (1e-4, 3e-4, 1e-3)  # of AdamW; validation chooses
# what it chooses by
BY = {"full": "NDCG@10 over all items", "candidates": "HR@1 among the stored candidates"}


class OnState(torch.nn.Module):
    """A frozen backbone whose states pass two layers more."""

    def __init__(self, backbone: torch.nn.Module, hidden: int, dropout: float):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.item, self.bias, self.history = backbone.item, backbone.bias, backbone.history
        E = backbone.item.embedding_dim
        # behind the state's E numbers one that says how much an item's bias counts
        self.inner, self.outer = torch.nn.Linear(E, hidden), torch.nn.Linear(hidden, E + 1)
        self.drop = torch.nn.Dropout(dropout)
        torch.nn.init.zeros_(self.outer.weight)
        torch.nn.init.zeros_(self.outer.bias)

    def added(self) -> dict[str, torch.Tensor]:
        """The weights of the two layers by name."""
        layers = {"inner": self.inner, "outer": self.outer}
        return {f"{n}.{k}": v for n, m in layers.items() for k, v in m.state_dict().items()}

    def pass_on(self, x_BE: torch.Tensor) -> torch.Tensor:
        """(x + d, w) with (d, w) = W_2 gelu(W_1 x + c_1) + c_2, of any shape (.., E+1)."""
        return F.pad(x_BE, (0, 1)) + self.outer(self.drop(F.gelu(self.inner(x_BE))))

    def scores(
        self, h_BX: torch.Tensor, item_CE: torch.Tensor, bias_C: torch.Tensor
    ) -> torch.Tensor:
        """s = E (x + d) + (1 + w) b (B, C) of what pass_on says, by items' vectors and biases."""
        # where w is 0, the backbone's own scores to the last bit (a view may be added otherwise)
        h_BE, w_B1 = h_BX[:, :-1].contiguous(), h_BX[:, -1:]
        return torch.addmm(bias_C, h_BE, item_CE.T) + w_B1 * bias_C

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states after the items seq_BL, passed on; with `last` only the last one's."""
        return self.pass_on(self.backbone(seq_BL, last))


@dataclass
class Samples:
    """The training samples, each as a model says that has not seen its user."""

    x_nE: torch.Tensor  # states
    target_n: torch.Tensor  # the items that followed
    fold_n: np.ndarray
    E_KIE: torch.Tensor  # item vectors of the folds' models
    b_KI: torch.Tensor  # and their biases

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[int, torch.Tensor]]:
        """Pairs (fold, samples) that go once through all samples, a batch of one fold each."""
        parts = []
        for fold in np.unique(self.fold_n):
            own = rng.permutation(np.flatnonzero(self.fold_n == fold))
            parts += [(fold, rows) for rows in np.array_split(own, -(-len(own) // size))]
        for i in rng.permutation(len(parts)):
            yield parts[i][0], torch.from_numpy(parts[i][1]).to(self.x_nE.device)


def samples_of(backbone: Run, protocol: results.Protocol, device: torch.device) -> Samples:
    """The training samples of a backbone that answered out of fold."""
    data = protocol.data
    t = read_tensors(backbone.folder / "folds.safetensors")
    state_nE = read_npy(backbone.folder / "states_train.npy", (len(data.train), None))
    listed = data.train[protocol.listed]  # the others have no state
    return Samples(
        torch.from_numpy(state_nE[protocol.listed].astype(np.float32)).to(device),
        torch.from_numpy(data.items[listed].astype(np.int64)).to(device),
        t["fold"].numpy()[users(data, listed)],
        t["item.weight"].to(device),
        t["bias"].to(device),
    )


def learn(
    model: OnState,
    optimiser: torch.optim.Optimizer,
    seen: Samples,
    size: int,
    rng: np.random.Generator,
) -> float:
    """The mean loss of an epoch of training in batches of `size`."""
    model.train()
    total = 0.0
    for fold, at in seen.batches(size, rng):
        h_BX = model.pass_on(seen.x_nE[at])
        # over the items 1..I, by the vectors of the samples' own fold
        s_BI = model.scores(h_BX, seen.E_KIE[fold, 1:], seen.b_KI[fold, 1:])
        loss = F.cross_entropy(s_BI, seen.target_n[at] - 1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        total += loss.item() * len(at)
    return total / len(seen.x_nE)


def fit(
    cfg: SimpleNamespace, backbone: Run, protocol: results.Protocol, out: Path, ranks: Ranks
) -> tuple[OnState, Best]:
    """The model with the weights that are best on validation, and what was chosen: the epoch, and
    the learning rate as found["rate"]. Every process trains alike; they share the ranking."""
    seen = samples_of(backbone, protocol, ranks.device)
    chosen = Best(ranks.device)
    for rate in RATES:
        torch.manual_seed(cfg.seed)
        model = OnState(load(backbone.folder), cfg.hidden, cfg.dropout).to(ranks.device)
        params = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(params, lr=rate)
        log = Log(out, cfg.epochs, f"lr {rate:g}", ranks, "epoch")
        best, more = Best(ranks.device), {}
        for epoch in range(cfg.epochs + 1):  # 0 is the backbone itself
            if epoch:
                rng = np.random.default_rng([cfg.seed, epoch])
                more = {"loss": learn(model, optimiser, seen, cfg.batch, rng)}
            found = protocol.validate(model, ranks)
            quality = quality_of(found, cfg.choose)
            best.offer(quality, epoch, model.added())
            chosen.offer(quality, epoch, model.added(), rate=rate)
            log.step(epoch, **more, **found)
            if epoch - best.step >= cfg.patience:
                break
        log.close()
    model.load_state_dict(chosen.weights, strict=False)
    return model, chosen


def quality_of(found: dict[str, float], choose: str) -> float:
    """What an epoch and a rate are chosen by. found: Protocol.validate; choose: --choose."""
    if choose == "full":
        return found["val_ndcg@10"]
    return next(value for name, value in found.items() if name.startswith("val_hr@1_of_"))


# ---------------------------------------------------------------- the script


@click.command(**described(__doc__))
@common.dataset_option
@click.option(
    "--backbone", help="run of train_backbone.py --folds; runs/<dataset>/sasrec if not given"
)
@click.option("--out", help="run folder to write; runs/<dataset>/mlp if not given")
@click.option("--hidden", default=512, type=WHOLE, help="width between the two layers")
@click.option("--dropout", default=0.5, type=Number(0, 0.95), help="between them too")
@click.option("--batch", default=256, type=WHOLE, help="samples of a step")
@click.option("--epochs", default=40, type=WHOLE, help="most epochs at each learning rate")
@click.option("--patience", default=5, type=WHOLE, help="epochs without a better validation")
@click.option(
    "--choose",
    default="full",
    type=click.Choice(list(BY)),
    help="what epoch and rate are chosen by on validation: NDCG@10 over all items, as everywhere; "
    "HR@1 among the stored candidates, where what is gained there is lost over all items",
)
@common.seed_option
@click.option("--overwrite", is_flag=True, help="replace the finished run in --out")
def main(**config) -> None:
    """Train two layers on the backbone's state and write their ranks as a backbone's run."""
    cfg = SimpleNamespace(**config, resume=False)
    ranks, data, folder = common.enter(cfg, "mlp")
    backbone = load_run(cfg.backbone or usual_run(data, "sasrec"), data, ["train_backbone"])
    stop_without_folds(backbone.folder, "recipes/mlp.py")
    protocol = results.Protocol(backbone, data)
    out, record = common.start_run(folder, "train_backbone", cfg, data, ranks)
    model, chosen = fit(cfg, backbone, protocol, out, ranks)
    got = {}
    for split in ("val", "test"):  # the only look at the test part
        samples, cand = getattr(data, split), protocol.cand[split]
        got[split] = rank_all(model, data, samples, ranks, backbone.top_h, cand)
    if ranks.main:
        found = results.write_answers(out, protocol, got)
        added = {k: t.cpu().contiguous() for k, t in model.added().items()}
        write_tensors(out / "mlp.safetensors", added)
        record |= {
            "model": "mlp",
            "loss": "ce",
            "history": backbone.history,
            "backbone_run": str(backbone.folder),
            "backbone_digest": backbone_digest(backbone.folder),
            "parameters": sum(p.numel() for p in model.parameters()),
            "lr": chosen.found["rate"],
            "best_epoch": chosen.step,
        }
        record = common.finish_run(folder, record)
        print_result(folder, record, found)
    finish(ranks)


def print_result(folder: Path, record: dict, found: dict[str, dict]) -> None:
    """Prints what was chosen and what came of it, its last line as JSON."""
    print(
        f"\nlearning rate {record['lr']:g} of {', '.join(f'{x:g}' for x in RATES)}, epoch "
        f"{record['best_epoch']} (0: the backbone itself), by {BY[record['choose']]} on validation"
    )
    result = {"stage": "mlp", "out": str(folder), "best_epoch": record["best_epoch"]}
    for split, spaces in found.items():
        for space, m in spaces.items():
            result[f"{split}_{space}_ndcg@10"] = round(m["ndcg@10"], 4)
    print(json.dumps(result | {"lr": record["lr"], "seconds": record["seconds"]}))


if __name__ == "__main__":
    main()
