"""DLLM2Rec (arXiv 2405.00338): what train_backbone.py --teacher reads of an LM's export, and the
teacher's part of the loss.

The list loss L_d itself is list_loss in losses.py, item vectors made of titles are Titles in
text_ways.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from delrec.backbone.dros import Robust
from delrec.backbone.exports import export_folder
from delrec.backbone.losses import list_loss, list_weights
from delrec.backbone.text import Text, read_text, sha256_of
from delrec.data.prepared import Data
from delrec.processes import Ranks
from delrec.runtime import load_run, read_json, read_npy, stop


@dataclass
class Given:
    """What a model is given beside the log: its titles' vectors (--text, or the teacher's), and the
    lists that evaluate.py --export wrote of a teacher."""

    text: Text | None = None
    topk: np.ndarray | None = None  # its list of every training sample, int32 (n, K)
    weight: np.ndarray | None = None  # fp32 (n, K): the fixed part of an item's weight in its list
    trust: np.ndarray | None = None  # m fp32 (n,): how much each list counts
    out_of_fold: bool = False  # was each list made by an LM that has not seen the sample's user?
    sha256: str = ""  # of what the teacher's export says

    @property
    def made(self) -> dict[str, str]:
        """What tells read files apart, for a run that goes on."""
        lists = {"what the teacher's export says": self.sha256} if self.sha256 else {}
        return lists | (self.text.made if self.text else {})

    def said(self) -> str:
        """What kind of lists the student reads, in a line."""
        if self.out_of_fold:
            return "the teacher's lists are out of fold: no LM answers for users it was trained on"
        return (
            "the teacher's lists are in sample: it was trained on the samples that it answers, so "
            "they are better than it will ever be again (see finetune.py --without-fold)"
        )


def read_given(
    cfg: SimpleNamespace, data: Data, ranks: Ranks, minilm: Callable[[Data, Ranks], np.ndarray]
) -> Given:
    """What --text and --teacher name, read. minilm: see read_text."""
    given = read_export(cfg.teacher, data, cfg) if cfg.teacher else Given()
    given.text = read_text(cfg, data, ranks, minilm)
    return given


def read_export(name: str, data: Data, cfg: SimpleNamespace) -> Given:
    """The lists that a teacher's run folder holds for its student. name: the run, or tfidf for
    titles without an LM (the control), which has none."""
    if name == "tfidf":
        return Given()
    run = load_run(name, data)
    folder = export_folder(run, name)
    meta = read_json(folder / "meta.json")
    n, K = len(data.train), meta["K"]
    topk = read_npy(folder / "topk.npy", (n, K))
    truth = read_npy(folder / "truth.npy", (n,))
    listed = read_npy(folder / "listed.npy", (n, K))
    asked = topk[:, 0] > 0
    if not asked.any() or topk.max() > data.n_items:
        stop(f"{folder}/topk.npy lists no item of this catalogue; make the export again")
    # position: w_p(r) = exp(-r) / sum_r' exp(-r')
    w_p = np.exp(-np.arange(1, K + 1.0))
    weight = np.broadcast_to(cfg.w_position * w_p / w_p.sum(), (n, K))
    trust = np.ones(n)
    if cfg.confidence == "listed":
        # w_c(r) = exp(-d_r) / sum_r' exp(-d_r'), d_r = (1 - p(item r)) / T
        c = np.exp(-(1 - np.asarray(listed, np.float64)) / cfg.temperature)
        weight = weight + cfg.w_confidence * c / c.sum(1, keepdims=True)
    else:
        trust = trust_in(np.asarray(truth, np.float64), asked, cfg)
    return Given(
        topk=np.asarray(topk),
        weight=weight.astype(np.float32),
        trust=trust.astype(np.float32),
        out_of_fold=bool(meta.get("out_of_fold")),
        sha256=sha256_of(topk, truth, listed),
    )


def faults(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    """What cannot be meant by --teacher: (is it so?, a sentence)."""
    return [
        (
            cfg.teacher == "tfidf" and cfg.lam,
            f"--teacher tfidf has titles' vectors but no lists, --lam is {cfg.lam}; leave --lam "
            "out",
        ),
        (
            cfg.teacher and cfg.confidence != "listed" and cfg.w_confidence > 1,
            f"--w-confidence {cfg.w_confidence} would let a list count less than nothing; it is a "
            "share, at most 1, unless --confidence is listed",
        ),
    ]


def trust_in(truth: np.ndarray, asked: np.ndarray, cfg: SimpleNamespace) -> np.ndarray:
    """How much each list counts (n,), 1 on average over those `asked`: an unreliable teacher counts
    less.

    m_s = 1 + g (c_s / mean c - 1), c_s = exp(-(1 - p(truth)) / T). Within a list one
    number for all would cancel (ours; the released code takes each listed item's probability).
    """
    c = np.exp(-(1 - truth) / cfg.temperature)
    if cfg.confidence == "permuted":
        c[asked] = np.random.default_rng([cfg.seed, 6]).permutation(c[asked])
    return 1 + cfg.w_confidence * (c / c[asked].mean() - 1)


class Teacher:
    """lam L_d: what the student learns from the teacher's lists (section 4)."""

    def __init__(
        self, cfg: SimpleNamespace, data: Data, given: Given, robust: Robust | None = None
    ):
        self.cfg, self.given, self.robust = cfg, given, robust
        self.row_of = np.full(len(data.items), -1)  # a target's row among the training samples
        self.row_of[data.train] = np.arange(len(data.train))

    def term(
        self, last_B: np.ndarray, target_BL: np.ndarray, unlisted_BL: np.ndarray, ranks: Ranks
    ) -> Callable:
        """f(model, x_NE, at_N, L) that loss_of adds: lam L_d of this process' rows, a mean over the
        positions that have a list, times the number of the batch's targets. unlisted_BL: one item a
        position, for the sigmoid loss."""
        cfg, row_BL = self.cfg, self.rows(last_B, target_BL)
        n_lists = max(np.count_nonzero(row_BL >= 0), 1)
        scale = cfg.lam * np.count_nonzero(target_BL) / n_lists

        def taught(model, x_NE, at_N, L):
            places = tuple(i.cpu().numpy() for i in at_N)
            mine = (a[ranks.rank :: ranks.world][:, -L:] for a in (row_BL, unlisted_BL))
            row_N, unlisted_N = (a[places] for a in mine)
            have = row_N >= 0
            if not have.any():
                return 0.0
            item_NK = self.given.topk[row_N[have]].astype(np.int64)
            weight_NK, trust_N = (a[row_N[have]] for a in (self.given.weight, self.given.trust))
            have, item_NK, weight_NK, trust_N, unlisted_N = (
                torch.from_numpy(np.ascontiguousarray(a)).to(ranks.device)
                for a in (have, item_NK, weight_NK, trust_N, unlisted_N[have])
            )
            x_NE = x_NE[have]
            w_NK = list_weights(model, x_NE, item_NK, weight_NK, trust_N, cfg)
            against = (unlisted_N, self.robust) if cfg.list_loss == "sigmoid" else ()
            return scale * list_loss(model, x_NE, item_NK, w_NK, *against)

        return taught

    def rows(self, last_B: np.ndarray, target_BL: np.ndarray) -> np.ndarray:
        """The row of the list of each position (B, L), -1 where there is none."""
        L = target_BL.shape[1]
        place_BL = np.maximum(last_B[:, None] - np.arange(L - 1, -1, -1), 0)
        row_BL = np.where(target_BL > 0, self.row_of[place_BL], -1)
        return np.where((row_BL >= 0) & (self.given.topk[row_BL, 0] > 0), row_BL, -1)
