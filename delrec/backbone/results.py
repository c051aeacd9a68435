"""What a conventional model's run folder says of it: the protocol, lists and scores of every
sample, the table.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils import parametrize

from delrec.backbone import by_title, contrast, kda, text_ways
from delrec.backbone.losses import power_of_truth
from delrec.backbone.ranking import rank_all
from delrec.data.counts import chance_over_all
from delrec.data.prepared import Data, candidates, halves_of_validation, subset
from delrec.metrics import chance, compare, metrics
from delrec.names import NAMES
from delrec.processes import Ranks
from delrec.runtime import write_json, write_npy, write_tensors

COLUMNS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")


def begin_at_popularity(model: torch.nn.Module, data: Data, cfg: SimpleNamespace) -> None:
    """Sets the biases to the log-odds of each item in the training part, where all losses have
    their optimum without a history. That of gBCE is lower: an item is drawn k times as often, and
    its truth has the power beta. From elsewhere the item vectors all go one way, and stay there."""
    count_I = np.bincount(data.items[data.train], minlength=data.n_items + 1) + 1.0
    odds_I = np.log(count_I / count_I.sum() * data.n_items)
    if cfg.loss == "gbce":
        odds_I += np.log(power_of_truth(cfg.negatives, data.n_items) / cfg.negatives)
    model.bias.data = torch.tensor(odds_I, dtype=torch.float32, device=model.bias.device)


def leave_plain(model: torch.nn.Module, cfg: SimpleNamespace, data: Data, ranks: Ranks) -> None:
    """Takes off what only training needs: from here on item vectors are plain ones, also those of
    items that it never saw (--cold-out)."""
    cold_out = model.titles_ID is not None
    text_IE = text_ways.text_part(model) if cold_out else None
    text_ways.fold(model)
    if cfg.contrast:
        contrast.drop_mask(model)
    if cold_out:
        by_title.give_rows(model, model.titles_ID, text_IE, data)
        model.item.weight.data = text_ways.of_first(model.item.weight.data, ranks)
        model.bias.data = text_ways.of_first(model.bias.data, ranks)
        model.titles_ID = None


def means(greater: np.ndarray, equal: np.ndarray) -> dict[str, float]:
    """Mean metrics of (greater, equal), each (n,)."""
    return {k: round(float(v.mean()), 5) for k, v in metrics(greater, equal).items()}


class Protocol:
    """The stored candidates of every split: which, how many, and what is ranked among them."""

    def __init__(self, cfg: SimpleNamespace, data: Data):
        self.data = data
        self.sizes = [C for C in (15, 20, 100) if self.stored("val", C) and self.stored("test", C)]
        # the training samples that get a list
        self.listed = subset(len(data.train), cfg.lists, cfg.seed)
        self.cand = {split: self.candidates_of(split) for split in ("train", "val", "test")}
        first, _ = halves_of_validation(data)
        part = "the first half"
        if cfg.model == "kda" and len(first) > kda.CHOOSING:  # whose scores cost far more
            first = first[subset(len(first), kda.CHOOSING, cfg.seed)]
            part = f"{kda.CHOOSING} samples of the first half"
        self.choosing = data.val[first]  # the samples that choose the epoch
        self.shown = {C: self.cand["val"][C][first] for C in self.sizes[:1]}  # in the log
        self.text = (
            f"{data.meta.get('split', 'given')} split; candidatesC: the target among C-1 stored "
            f"items the user never had; full: all {data.n_items} items, the user's earlier ones "
            "masked; ties count as every order they could fall in; weights chosen by full ndcg@10 "
            f"on {part} of val"
        )

    def stored(self, split: str, C: int) -> bool:
        """True if the prepared folder holds C candidates for a split."""
        return (self.data.folder / f"candidates_{split}_{C}.npy").exists()

    def candidates_of(self, split: str) -> dict[int, np.ndarray]:
        """{C: candidates (n, C)} of the samples of a split that are ranked."""
        which = self.listed if split == "train" else slice(None)
        sizes = [C for C in self.sizes if split != "train" or self.stored(split, C)]
        return {C: candidates(self.data, split, C, which) for C in sizes}

    def summary(self, split: str, got: dict) -> dict[str, dict]:
        """The mean metrics of what rank_all found, among each number of candidates and all."""
        target_n = self.data.items[getattr(self.data, split)].astype(np.int64)
        among = {}
        for C in (C for C in self.sizes if C in got):
            right_nC = self.cand[split][C] == target_n[:, None]
            among[f"candidates{C}"] = means(*compare(got[C], right_nC))
        return among | {"full": means(*got["full"].T)}

    def validate(self, model: torch.nn.Module, ranks: Ranks) -> dict[str, float]:
        """What of a validation stands in the log: of the samples that choose the epoch."""
        with parametrize.cached():  # item vectors made of titles are computed once
            got = rank_all(model, self.data, self.choosing, ranks, cand=self.shown)
        target_n, among = self.data.items[self.choosing], {}
        for C, cand_nC in self.shown.items():
            right_nC = cand_nC == target_n[:, None]
            among[f"val_hr@1_of_{C}"] = means(*compare(got[C], right_nC))["hr@1"]
        return among | {"val_ndcg@10": means(*got["full"].T)["ndcg@10"]}

    def rank_splits(
        self, model: torch.nn.Module, ranks: Ranks, top_h: int, states: bool = False
    ) -> dict[str, dict]:
        """Lists, scores and ranks of all samples of all splits, and with `states` the states. A
        training sample without a list has zeros, and NaN for scores."""
        data, got = self.data, {}
        for split in ("train", "val", "test"):
            samples = getattr(data, split)
            samples = samples[self.listed] if split == "train" else samples
            got[split] = rank_all(model, data, samples, ranks, top_h, self.cand[split], states)
        for key, rows in got["train"].items():
            empty = np.nan if key in self.sizes else 0
            whole = np.full((len(data.train), *rows.shape[1:]), empty, rows.dtype)
            whole[self.listed] = rows
            got["train"][key] = whole
        return got


def write_results(
    out: Path, model: torch.nn.Module, protocol: Protocol, got: dict[str, dict]
) -> dict[str, dict]:
    """The mean metrics of the validation and test part. Writes the model, its lists, its scores and
    the metrics into a run folder."""
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_tensors(out / "model.safetensors", weights)
    return write_answers(out, protocol, got)


def write_answers(out: Path, protocol: Protocol, got: dict[str, dict]) -> dict[str, dict]:
    """The mean metrics of the validation and test part. Writes what Protocol.rank_splits found of
    some splits, and the metrics, into a run folder."""
    for split, found in got.items():
        write_npy(out / f"topk_{split}.npy", found["list"])
        if split != "train":
            write_npy(out / f"full_{split}.npy", found["full"])
        for C in protocol.cand[split]:
            write_npy(out / f"scores_{split}_{C}.npy", found[C])
    results = {split: protocol.summary(split, got[split]) for split in ("val", "test")}
    write_json(out / "metrics.json", {"protocol": protocol.text, **results})
    return results


def print_results(record: dict, protocol: Protocol, results: dict[str, dict]) -> None:
    """Prints the table of a finished run, chance beside it, and its result as a line of JSON."""
    data, sizes = protocol.data, protocol.sizes
    print(
        f"\n{NAMES[record['model']]} on {data.name}, {record['loss']}, best of "
        f"{record['epochs_run']} epochs: {record['best_epoch']}\n{protocol.text}\n"
    )
    print(f"{'':22}" + "".join(f"{c:>9}" for c in COLUMNS))
    for split, spaces in results.items():
        for space, m in spaces.items():
            print(f"{split + ' ' + space:22}" + "".join(f"{m[c]:9.4f}" for c in COLUMNS))
    level = {f"candidates{C}": chance(C) for C in sizes}
    level |= {f"{split} full": chance_over_all(data, getattr(data, split)) for split in results}
    for space, m in level.items():
        print(f"{'chance ' + space:22}" + "".join(f"{m[c]:9.4f}" for c in COLUMNS))
    result = {
        "stage": "train_backbone",
        "out": record["out"],
        "candidates": min(sizes, default=0),
    }
    for split in results:
        for metric in ("hr@1", "ndcg@10"):
            for C in sizes[:1]:
                result[f"{split}_{metric}"] = round(results[split][f"candidates{C}"][metric], 4)
    for split in results:
        result[f"{split}_full_ndcg@10"] = round(results[split]["full"]["ndcg@10"], 4)
    for key in ("seconds", "epochs_run", "best_epoch", "samples_per_second", "peak_gb"):
        result[key] = record[key]
    print(json.dumps(result))
