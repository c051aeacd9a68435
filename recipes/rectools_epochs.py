"""Epochs of RecTools' SASRec over a prepared log, for recipes/bench_race.py.

    PYTHON rectools_epochs.py WORK.npz WINDOW THREADS

PYTHON has rectools with torch and need not have anything of ours. WORK.npz holds the interactions
and the samples that are ranked (recipes/bench_race.py writes it). A WINDOW of 0 is RecTools' own.
Last line: the processor seconds of training and the NDCG@10 so far after each epoch, as JSON.
"""

import json
import logging
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import numpy as np  # noqa: E402 (after the filter: what RecTools imports warns a lot)
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from pytorch_lightning import Callback, LightningModule, Trainer  # noqa: E402
from rectools.dataset import Dataset  # noqa: E402
from rectools.models import SASRecModel  # noqa: E402

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Watch(Callback):
    """Ranks after each epoch, and stops the training in time. Seconds are the processor's."""

    def __init__(self, asked: Dataset, work: dict):
        self.asked, self.work = asked, work
        self.model = None  # RecTools', once it is made
        self.curve, self.seconds, self.began = [], 0.0, 0.0

    def __deepcopy__(self, memo: dict) -> "Watch":
        """Itself: RecTools trains with a copy of its trainer."""
        return self

    def on_train_epoch_start(self, *_: object) -> None:
        """Starts the watch."""
        self.began = time.process_time()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Notes how good the model is, and whether to go on."""
        self.seconds += time.process_time() - self.began
        self.model.is_fitted = True  # it answers only when it says so
        module.eval()
        self.curve.append((self.seconds, ndcg(self.model, self.asked, self.work["val_target"])))
        module.train()
        quality = [found for _, found in self.curve]
        waited = len(quality) - 1 - int(np.argmax(quality))
        late = self.seconds > self.work["seconds"]
        trainer.should_stop = late or waited >= self.work["patience"]
        print(f"epoch {len(quality)}: {self.seconds:.0f} s, {quality[-1]:.4f}", file=sys.stderr)


def trainer_with(watch: Watch) -> Trainer:
    """Lightning's trainer on the CPU, which prints and keeps nothing."""
    return Trainer(
        accelerator="cpu",
        max_epochs=10**6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )


def dataset_of(user_n: np.ndarray, item_n: np.ndarray) -> Dataset:
    """Interactions in the order of time as RecTools takes them."""
    order = np.arange(len(user_n))
    when = pd.Timestamp("2020-01-01") + pd.to_timedelta(order, unit="s")
    table = pd.DataFrame({"user_id": user_n, "item_id": item_n, "weight": 1.0, "datetime": when})
    return Dataset.construct(table)


def ndcg(model: SASRecModel, asked: Dataset, target_n: np.ndarray) -> float:
    """NDCG@10 of samples 0, 1, .. among all items but those of their histories."""
    best = model.recommend(
        np.arange(len(target_n)), asked, k=10, filter_viewed=True, on_unsupported_targets="ignore"
    )
    rank = best["rank"].to_numpy()
    found = best["item_id"].to_numpy() == target_n[best["user_id"].to_numpy()]
    return float((1 / np.log2(rank[found] + 1)).sum() / len(target_n))


def main(work_file: str, window: int, threads: int) -> None:
    """Trains the model and prints what it knew after each epoch."""
    torch.set_num_threads(threads)
    work = np.load(work_file)
    train = dataset_of(work["train_user"], work["train_item"])
    asked = dataset_of(work["asked_sample"], work["asked_item"])
    own = {"session_max_len": window} if window else {}
    torch.manual_seed(0)
    watch = Watch(asked, work)
    watch.model = SASRecModel(**own, get_trainer_func=lambda: trainer_with(watch))
    watch.model.fit(train)
    print(json.dumps({"curve": watch.curve}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
