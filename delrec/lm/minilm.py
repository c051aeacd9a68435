"""all-MiniLM-L6-v2: a small BERT that was trained to give texts of like meaning like vectors. What
train_backbone.py --text minilm reads of it.

A title's vector is the mean of the last states over its pieces ([CLS] and [SEP] too), of norm 1, as
the model was trained to be read.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from delrec.data.fetch import one_at_a_time
from delrec.data.minilm import fetch_minilm
from delrec.data.prepared import Data
from delrec.lm.pretrained import quietly
from delrec.processes import Ranks
from delrec.runtime import must_be_writable, read_npy, write_npy
from delrec.training.log import Log

PIECES = 256  # of a title at most: what it was trained on
BATCH = 128  # titles of a pass


def title_vectors(data: Data, ranks: Ranks) -> np.ndarray:
    """MiniLM's vectors of the titles, float32 (I+1, D), padding 0. They are made once and kept in
    the prepared folder."""
    folder = fetch_minilm()
    path = data.folder / f"minilm-{digest_of(folder, data.titles)}.npy"
    if not path.exists():
        must_be_writable(data.folder)
        with one_at_a_time("minilm-titles"):
            if not path.exists():
                write_npy(path, encoded(folder, data.titles, ranks))
    return np.array(read_npy(path, (data.n_items + 1, None)))


def digest_of(folder: Path, titles: list[str]) -> str:
    """16 hex digits that tell weights and titles apart."""
    with open(folder / "model.safetensors", "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256("\n".join([weights, *titles]).encode()).hexdigest()[:16]


@torch.no_grad()
def encoded(folder: Path, titles: list[str], ranks: Ranks) -> np.ndarray:
    """The vectors of titles[1:], float32 (I+1, D), of norm 1; row 0 is 0."""
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    here = {"local_files_only": True}
    with quietly():
        tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **here)
        body = BertModel.from_pretrained(
            folder, add_pooling_layer=False, dtype=torch.float32, **here
        )
    body = body.eval().to(ranks.device)
    order = sorted(range(1, len(titles)), key=lambda i: -len(titles[i]))
    vectors_ID = np.zeros((len(titles), body.config.hidden_size), np.float32)
    log = Log(None, len(order), "MiniLM reads the titles", ranks, "title")
    for i in range(0, len(order), BATCH):
        some = order[i : i + BATCH]
        vectors_ID[some] = of_texts(tok, body, [titles[j] for j in some])
        log.step(i + len(some))
    log.close()
    return vectors_ID


def of_texts(tok: object, body: torch.nn.Module, texts: list[str]) -> np.ndarray:
    """The vectors (B, D) of some texts."""
    read = tok(texts, padding=True, truncation=True, max_length=PIECES, return_tensors="pt")
    ids_BT, real_BT = (read[key].to(body.device) for key in ("input_ids", "attention_mask"))
    x_BTD = body(input_ids=ids_BT, attention_mask=real_BT).last_hidden_state
    mean_BD = (x_BTD * real_BT[..., None]).sum(1) / real_BT.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean_BD, dim=1).cpu().numpy()
