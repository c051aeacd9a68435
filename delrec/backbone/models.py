"""The conventional models, seq_BL -> x_BLE, the state after each position; building, scoring,
loading them. The papers' three stand here, each other one in a file of its own.

What a class must have: it is made by (n_items, cfg), has its item vectors as `item` (row 0 is the
padding's), which build() draws anew, and says the same when columns of padding are cut off.
forward(seq_BL, last=False) gives the states x_BLE, with `last` only the last one's, x_B1E. A state
is as wide as `item`, and must not see later items: training asks each for the one that follows.
one_state = True: there is only the last state of a window, which may see all of it. cloze = True:
it learns items that are hidden in its window. Most have False in both.

build() adds a bias an item, and how long a history is. A model that is made of titles has
take_text, which is given their vectors. One that reads a history through each candidate has no
state, and says itself what a history's `scores` and the `loss` are; its "state" is the history.

Names: B sequences, L window, E width, I items (ids 1..I, 0 pads on the left).
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from delrec.backbone.bert4rec import BERT4Rec
from delrec.backbone.bsarec import BSARec
from delrec.backbone.kda import KDA
from delrec.backbone.layers import Dropout, seen
from delrec.backbone.ligr import ESASRec
from delrec.backbone.lru import LRURec
from delrec.backbone.seqsim import SeqSim
from delrec.runtime import Run, load_run, read_tensors, stop


class SASRec(nn.Module):
    """Two causal self-attention blocks of one head.

    Positions are counted from the end of the window, so the most recent item has the same position
    however long the history is, and columns of padding can be cut off without changing anything.
    """

    one_state, cloze = False, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        E = cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.position = nn.Embedding(cfg.history, E)
        self.blocks = nn.ModuleList(Block(E, cfg.dropout) for _ in range(2))
        self.norm = nn.LayerNorm(E)
        self.drop = Dropout(cfg.dropout)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states x_BLE after the items seq_BL; with `last` only the last one's, x_B1E."""
        L = seq_BL.shape[1]
        # times sqrt(E), as the paper's own code: item vectors small enough for the softmax drown in
        # the positions
        x_BLE = self.drop(
            self.item(seq_BL) * self.item.embedding_dim**0.5 + self.position.weight[:L].flip(0)
        )
        see_BLL = seen(seq_BL)
        x_BLE = self.blocks[0](x_BLE, see_BLL, L)
        x_BLE = self.blocks[1](x_BLE, see_BLL, 1 if last else L)
        return self.norm(x_BLE)


class Block(nn.Module):
    """Attention and a position-wise layer, each added to its input.

    Computes the last `rows` positions only.
    """

    def __init__(self, E: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.q, self.kv, self.out = nn.Linear(E, E), nn.Linear(E, 2 * E), nn.Linear(E, E)
        self.inner, self.outer = nn.Linear(E, E), nn.Linear(E, E)
        self.drop = Dropout(dropout)

    def forward(self, x_BLE: torch.Tensor, see_BLL: torch.Tensor, rows: int) -> torch.Tensor:
        """x_BRE at the last R = `rows` positions. see_BLL: does a position (row) see another?"""
        y_BLE = self.norm1(x_BLE)
        k_BLE, v_BLE = self.kv(y_BLE).chunk(2, -1)
        q_BRE = self.q(y_BLE[:, -rows:])
        a_BRL = (q_BRE @ k_BLE.transpose(1, 2) * k_BLE.shape[-1] ** -0.5).masked_fill(
            ~see_BLL[:, -rows:], -torch.inf
        )
        x_BRE = x_BLE[:, -rows:] + self.out(self.drop(a_BRL.softmax(-1)) @ v_BLE)
        return x_BRE + self.drop(self.outer(self.drop(F.relu(self.inner(self.norm2(x_BRE))))))


class GRU4Rec(nn.Module):
    """One GRU layer as wide as the item vectors.

    Padding on the left leaves the state at zero: see forward.
    """

    one_state, cloze = False, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        E = cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.gru = nn.GRU(E, E, batch_first=True)
        self.out = nn.Linear(E, E)
        self.drop = Dropout(cfg.dropout)

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The states x_BLE after the items seq_BL; with `last` only the last one's, x_B1E."""
        L = seq_BL.shape[1]
        length_B = (seq_BL != 0).sum(1).clamp(min=1)  # of nothing: the padding item, once
        # Rows are moved to start at column 0 for the GRU and back afterwards: no padding is ever
        # read, a short history scores the same in any batch.
        at_BL = (torch.arange(L, device=seq_BL.device) + (L - length_B)[:, None]) % L
        x_BLE, _ = self.gru(self.drop(self.item(seq_BL.gather(1, at_BL))))
        back_BL = (torch.arange(L, device=seq_BL.device) - (L - length_B)[:, None]) % L
        back_BL = back_BL[:, -1:] if last else back_BL
        x_BLE = x_BLE.gather(1, back_BL[..., None].expand(-1, -1, x_BLE.shape[-1]))
        return self.out(self.drop(x_BLE))


class Caser(nn.Module):
    """Convolutions over the window seen as an L x E picture: 16 filters of each height 1..L, and 4
    that weigh the L rows. paper: also a vector per user; ours has none, so that any history of item
    ids can be scored.
    """

    one_state, cloze = True, False

    def __init__(self, n_items: int, cfg: SimpleNamespace):
        super().__init__()
        L, E = cfg.history, cfg.width
        self.item = nn.Embedding(n_items + 1, E, padding_idx=0)
        self.across = nn.ModuleList(nn.Conv1d(E, 16, height) for height in range(1, L + 1))
        self.down = nn.Linear(L, 4, bias=False)
        self.out = nn.Linear(16 * L + 4 * E, E)
        self.drop = Dropout(cfg.dropout)
        self.history = L

    def forward(self, seq_BL: torch.Tensor, last: bool = False) -> torch.Tensor:
        """x_B1E: the state after the last item of seq_BL, with `last` and without."""
        seq_BL = F.pad(seq_BL, (self.history - seq_BL.shape[1], 0))
        x_BLE = self.item(seq_BL)
        # a convolution of height h as one product over the windows of h rows: on a CPU torch's own
        # takes several times as long in backward
        across = [
            F.relu(
                F.linear(
                    x_BLE.unfold(1, conv.kernel_size[0], 1).flatten(2),
                    conv.weight.flatten(1),
                    conv.bias,
                )
            ).amax(1)
            for conv in self.across
        ]
        x_BX = torch.cat(across + [self.down(x_BLE.transpose(1, 2)).flatten(1)], 1)
        # one state a window: its last position
        return F.relu(self.out(self.drop(x_BX)))[:, None]


class Grown(nn.Module):
    """A trained table of item vectors, and those of items that were added behind it."""

    def __init__(self, trained: nn.Embedding, new_AE: torch.Tensor):
        super().__init__()
        self.weight, self.new_AE = trained.weight, new_AE
        self.embedding_dim = trained.embedding_dim

    def forward(self, seq_BL: torch.Tensor) -> torch.Tensor:
        """The vectors of items, x_BLE."""
        is_new_BL = seq_BL >= len(self.weight)
        # the padding's vector has no gradient, as in nn.Embedding: it stays 0
        x_BLE = F.embedding(seq_BL.masked_fill(is_new_BL, 0), self.weight, padding_idx=0)
        if is_new_BL.any():
            x_BLE[is_new_BL] = self.new_AE[seq_BL[is_new_BL] - len(self.weight)]
        return x_BLE


# by the name that train_backbone.py --model gives; delrec/names.py says how prompts call them
MODELS = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "esasrec": ESASRec,
    "bsarec": BSARec,
    "lrurec": LRURec,
    "bert4rec": BERT4Rec,
}
# those that cannot be without titles (--text)
TITLED = {"seqsim": SeqSim, "kda": KDA}
ALL = MODELS | TITLED
# A step's windows are computed in so many parts, by their length, where that leaves out so many
# columns a window; each part costs a gradient of the whole table of items
PARTS, WORTH = 4, 20


def build(name: str, n_items: int, cfg: SimpleNamespace) -> nn.Module:
    """An untrained model; cfg has history, width and dropout, and what else the model's defaults
    name. An item's score is its input vector . state + its bias.
    """
    model = ALL[name](n_items, cfg)
    nn.init.normal_(model.item.weight, std=0.02)
    model.item.weight.data[0] = 0
    model.bias = nn.Parameter(torch.zeros(n_items + 1))
    model.history = cfg.history
    model.fp32 = getattr(cfg, "fp32", False)  # no bf16 in its loss
    # of --cold-out: (I,) -inf at items 1..I that the softmax of a training leaves out, else 0; and
    # the titles' vectors (I+1, D), by which these items are ranked in the end
    model.barred_I = model.titles_ID = None
    must_give_states(name, model)
    return model


@torch.no_grad()
def must_give_states(name: str, model: nn.Module) -> None:
    """Stops unless the states of a short window have the shapes that all else counts on."""
    if hasattr(model, "scores") or model.bias.is_meta:
        return
    L, E = min(2, model.history), model.item.embedding_dim
    seq_BL = torch.ones(1, L, dtype=torch.long)
    model.eval()  # dropout would draw: what is built next would begin with other weights
    for last in (False, True):
        found = tuple(model(seq_BL, last=last).shape)
        wanted = (1, 1 if last or model.one_state else L, E)
        if found != wanted:
            stop(
                f"{name}: forward(seq_BL, last={last}) gives states of the shape {found} for a "
                f"window (1, {L}), expected {wanted}, the last the width of `item`; the head of "
                "delrec/backbone/models.py says what a model must have"
            )
    model.train()


def score(model: nn.Module, seq_BL: torch.Tensor | np.ndarray | list) -> torch.Tensor:
    """The next item's scores (B, I+1) after histories of any length, item ids padded on the left
    with 0; column 0 (padding) is -inf.
    """
    return score_from(model, state(model, seq_BL))


def state(model: nn.Module, seq_BL: torch.Tensor | np.ndarray | list) -> torch.Tensor:
    """The states x_BE after such histories, which an item's vector is multiplied with."""
    seq_BL = torch.as_tensor(seq_BL, device=model.bias.device)[:, -model.history :]
    # columns of nothing but padding are cut off
    L = max(1, int((seq_BL != 0).any(0).sum()))
    return model(seq_BL[:, -L:], last=True)[:, -1]


def states(model: nn.Module, seq_BL: torch.Tensor) -> torch.Tensor:
    """The states x_BLE after each item of a step's windows.

    On a CPU windows of like length are computed together where that pays: after few purchases most
    of a window of 50 is padding. A GPU would have to wait for the lengths.
    """
    B, L = seq_BL.shape
    if model.one_state or seq_BL.device.type != "cpu":
        return model(seq_BL)
    length_B = (seq_BL != 0).sum(1).clamp(min=1)
    parts = length_B.argsort(stable=True).chunk(PARTS)
    longest = [int(length_B[part[-1]]) for part in parts]
    saved = B * L - sum(len(part) * most for part, most in zip(parts, longest))
    if saved < WORTH * B:
        return model(seq_BL)
    of_parts = [model(seq_BL[part, -most:]) for part, most in zip(parts, longest)]
    x_BLE = torch.cat([F.pad(x, (0, 0, L - x.shape[1], 0)) for x in of_parts])
    return x_BLE[torch.cat(parts).argsort()]


def score_from(model: nn.Module, x_BE: torch.Tensor) -> torch.Tensor:
    """The scores (B, I+1) that states give."""
    score_BI = scores_of(model, x_BE, model.item.weight, model.bias)
    score_BI[:, 0] = -torch.inf
    return score_BI


def scores_of(
    model: nn.Module, x_BE: torch.Tensor, item_CE: torch.Tensor, bias_C: torch.Tensor
) -> torch.Tensor:
    """The scores (B, C) that states give items, by their vectors and biases."""
    if hasattr(model, "scores"):
        return model.scores(x_BE, item_CE, bias_C)
    return torch.addmm(bias_C, x_BE, item_CE.T)


def load(run: Path | str) -> nn.Module:
    """The model of a finished run folder (or a name under runs/), ready for score()."""
    trained = load_run(run, stages=["train_backbone"])
    must_be_ours(trained)
    model = build(trained.model, trained.n_items, trained)
    model.load_state_dict(read_tensors(trained.folder / "model.safetensors"))
    return model.eval()


def is_ours(run: Run) -> bool:
    """True for a backbone that train_backbone.py trained; somebody else's may share a model's name,
    but its configuration says nothing of a network (docs/run_folder.md)."""
    return getattr(run, "model", None) in ALL and hasattr(run, "n_items")


def must_be_ours(run: Run) -> None:
    """Stops at a backbone of somebody else's: its weights are there, but not what reads them."""
    if not is_ours(run):
        stop(
            f"{run.folder} is a model of your own, {getattr(run, 'model', None)!r:.40}, whose code "
            "is not here, so it cannot score a new history; train one with train_backbone.py"
        )
