"""Epochs of one of RecBole's models over given samples, for data/bench.py.

    PYTHON recbole_epoch.py WORK.npz MODEL THREADS FOLDER SCORES.npy

PYTHON has recbole 1.2.1 and need not have anything of ours. WORK.npz holds the samples and the
settings (data/bench.py writes it), FOLDER the data set `ours`, which tells RecBole how many users
and items there are. With more than one epoch the best by validation is kept, and its scores of the
test samples, if WORK.npz has some, go to SCORES.npy, fp32 (n, I+1). WORK.npz without a width leaves
RecBole's own settings. Last line, as JSON: the median seconds of an epoch, and the processor's
seconds so far and the NDCG@10 of the validation samples after each.
"""

import json
import sys
import time
import warnings
from collections.abc import Mapping

warnings.filterwarnings("ignore")
import numpy as np  # noqa: E402 (after the filter: RecBole and what it imports warn a lot)
import torch  # noqa: E402

Work = Mapping[str, np.ndarray]  # what WORK.npz holds


def settings_of(work: Work, folder: str) -> dict:
    """RecBole's settings of the three models: cross-entropy over all items, on the CPU."""
    settings = {
        "seed": 0,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": int(work["L"]),
        "data_path": folder,
        "use_gpu": False,
        "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "state": "ERROR",
    }
    if "width" not in work:
        return settings
    width, dropout = int(work["width"]), float(work["dropout"])
    return settings | {
        "hidden_size": width,
        "inner_size": width,
        "n_layers": 2,
        "n_heads": 1,
        "hidden_dropout_prob": dropout,
        "attn_dropout_prob": dropout,
        "embedding_size": width,
        "dropout_prob": dropout,
        "num_layers": 1,
        "n_v": 4,
        "n_h": 16,
        "reg_weight": 0.0,
    }


def build(name: str, settings: dict) -> torch.nn.Module:
    """RecBole's model of that name, untrained."""
    from recbole.config import Config
    from recbole.data.dataset import SequentialDataset
    from recbole.model.sequential_recommender import Caser, GRU4Rec, SASRec
    from recbole.utils import init_seed

    kind = {"sasrec": SASRec, "gru4rec": GRU4Rec, "caser": Caser}[name]
    sys.argv = sys.argv[:1]  # Config reads the command line
    config = Config(model=kind.__name__, dataset="ours", config_dict=settings)
    init_seed(0, True)
    return kind(config, SequentialDataset(config))


def train_epoch(model: torch.nn.Module, work: Work, optimiser: torch.optim.Optimizer) -> float:
    """The seconds of one epoch over the training samples in random order."""
    from recbole.data.interaction import Interaction

    seq, length, user, target = (
        torch.from_numpy(work[key]) for key in ("seq", "length", "user", "target")
    )
    rows_a_step = int(work.get("batch", 2048))  # RecBole's own
    model.train()
    began = time.time()
    for rows in torch.randperm(len(seq)).split(rows_a_step):
        optimiser.zero_grad()
        batch = {
            "item_id_list": seq[rows],
            "item_length": length[rows],
            "user_id": user[rows],
            "item_id": target[rows],
        }
        loss = model.calculate_loss(Interaction(batch))
        loss.backward()
        optimiser.step()
    return time.time() - began


@torch.no_grad()
def scores_of(model: torch.nn.Module, work: Work, part: str) -> torch.Tensor:
    """The scores of all items for the samples of `val` or `test`: (n, I+1)."""
    from recbole.data.interaction import Interaction

    model.eval()
    blocks = (
        torch.from_numpy(work[f"{part}_{key}"]).split(256) for key in ("seq", "length", "user")
    )
    n_items = int(work["n_items"])
    scores = []
    for seq, length, user in zip(*blocks):
        batch = Interaction({"item_id_list": seq, "item_length": length, "user_id": user})
        block = model.full_sort_predict(batch).view(len(seq), -1)
        scores.append(block[:, : n_items + 1])
    return torch.cat(scores)


def validation_ndcg(model: torch.nn.Module, work: Work) -> float:
    """NDCG@10 of the validation samples among all items but those of their histories."""
    scores = scores_of(model, work, "val")
    target = torch.from_numpy(work["val_target"])[:, None]
    of_target = scores.gather(1, target)
    scores.scatter_(1, torch.from_numpy(work["val_had"]), -torch.inf)
    rank = (scores > of_target).sum(1)
    return (1 / torch.log2(rank.float() + 2))[rank < 10].sum().item() / len(rank)


def main(work_file: str, name: str, threads: str, folder: str, scores_file: str) -> None:
    """Trains the model and prints how long an epoch takes."""
    torch.set_num_threads(int(threads))
    work = np.load(work_file)
    model = build(name, settings_of(work, folder))
    # Adam at 1e-3 is RecBole's own
    optimiser = torch.optim.Adam(model.parameters(), lr=float(work.get("lr", 1e-3)))
    epochs, patience = int(work["epochs"]), int(work["patience"])
    seconds, curve, spent = [], [], 0.0
    best, best_weights, since_best = -1, None, 0
    for epoch in range(epochs):
        began = time.process_time()
        seconds.append(train_epoch(model, work, optimiser))
        spent += time.process_time() - began
        if epochs == 1:
            break
        quality = validation_ndcg(model, work)
        curve.append((spent, quality))
        print(
            f"epoch {epoch + 1}: {seconds[-1]:.1f} s, val NDCG@10 {quality:.4f}",
            file=sys.stderr,
            flush=True,
        )
        since_best += 1
        if quality > best:
            best, since_best = quality, 0
            best_weights = {key: value.clone() for key, value in model.state_dict().items()}
        if since_best >= patience or spent > work.get("seconds", np.inf):
            break
    if best_weights and "test_seq" in work:
        model.load_state_dict(best_weights)
        np.save(scores_file, scores_of(model, work, "test").numpy())
    print(json.dumps({"seconds": float(np.median(seconds)), "curve": curve}))


if __name__ == "__main__":
    main(*sys.argv[1:])
