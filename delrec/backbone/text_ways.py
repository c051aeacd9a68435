"""How titles' vectors enter a model's item vectors (train_backbone.py --text-in).

Each way makes item.weight while the model trains; afterwards it is a plain table again, and serving
needs no text. With --eta 0, which leaves a teacher's lists alone, nothing is made.

    fold       e_i = b_i + eta (W z_i + c)          DLLM2Rec (arXiv 2405.00338), section 4.2
    adaptor    e_i = b_i + eta f(z_i)               f of two layers, as WhitenRec's (2402.10602)
    start      e_i begins as eta z_i, as large as   LLM2BERT4Rec
               other vectors begin, and trains
    alphafuse  e_i = eta [p_i, q_i] + [0, b_i]      AlphaFuse (2504.19218); [p_i, q_i] = z_i stays

Names: I items (ids 1..I, 0 pads), D width of the vectors z, E width of the item vectors.
"""

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.utils import parametrize

from delrec.backbone.text import FIRST_WIDE, WORDS, Text, names_of
from delrec.data.counts import seen_in_training
from delrec.data.prepared import Data
from delrec.processes import Ranks

START = 0.02  # the deviation of an item vector's numbers at the start (models.build)


class Titles(nn.Module):
    """e_i = b_i + eta (W z_i + c), padding zero (collaborative embedding distillation, section
    4.2).
    """

    def __init__(self, Z: torch.Tensor, E: int, eta: float):
        super().__init__()
        self.register_buffer("Z", Z, persistent=False)
        self.eta, self.c = eta, nn.Parameter(torch.zeros(E))
        self.W = nn.Parameter(START * drawn(E, Z.shape[1]))

    def forward(self, b_IE: torch.Tensor) -> torch.Tensor:
        """The item vectors e (I+1, E), made of b_IE (I+1, E)."""
        return without_padding(b_IE + self.eta * (self.Z @ self.W.T + self.c))


class Adaptor(nn.Module):
    """e_i = b_i + eta (V relu(W z_i + c) + d), padding zero: the text's part is a network of two
    layers.
    """

    def __init__(self, Z: torch.Tensor, E: int, eta: float):
        super().__init__()
        self.register_buffer("Z", Z, persistent=False)
        self.eta = eta
        # z has norm 1, so W z has deviation 1, relu of it a mean square of 1/2, and V relu(W z)
        # the deviation that other item vectors begin with
        self.W, self.c = nn.Parameter(drawn(E, Z.shape[1])), nn.Parameter(torch.zeros(E))
        self.V = nn.Parameter(START * (2 / E) ** 0.5 * drawn(E, E, seed=1))
        self.d = nn.Parameter(torch.zeros(E))

    def forward(self, b_IE: torch.Tensor) -> torch.Tensor:
        """The item vectors e (I+1, E), made of b_IE (I+1, E)."""
        inner_IE = (self.Z @ self.W.T + self.c).relu()
        return without_padding(b_IE + self.eta * (inner_IE @ self.V.T + self.d))


class AlphaFuse(nn.Module):
    """e_i = [p_i, q_i + b_i]: the text's E leading directions, those with the least variance (the
    last half) beside what is learnt of an item; padding zero.

    The text stays as it is. Its directions are standardised (--text-whiten 1 if not given), and its
    vectors have the norm eta: ours, because our scores are no cosines.
    """

    def __init__(self, Z: torch.Tensor, E: int, eta: float):
        super().__init__()
        self.register_buffer("text_IE", eta * widened(Z, E), persistent=False)
        self.register_buffer("learnt_E", torch.arange(E) >= E - E // 2, persistent=False)

    def forward(self, b_IE: torch.Tensor) -> torch.Tensor:
        """The item vectors e (I+1, E), made of b_IE (I+1, E)."""
        return without_padding(self.text_IE + b_IE * self.learnt_E)


WAYS = {"fold": Titles, "adaptor": Adaptor, "alphafuse": AlphaFuse}


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers (rows, columns); no other draw changes by it."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def without_padding(e_IE: torch.Tensor) -> torch.Tensor:
    """Item vectors (I+1, E) with a row 0 of zeros, which also has no gradient."""
    return torch.cat([torch.zeros_like(e_IE[:1]), e_IE[1:]])


def widened(Z: torch.Tensor, E: int) -> torch.Tensor:
    """Z (I+1, D) with zeros behind its D <= E columns: (I+1, E)."""
    return nn.functional.pad(Z, (0, E - Z.shape[1]))


# ---------------------------------------------------------------- entering, folding


@torch.no_grad()
def enter(
    model: nn.Module, text: Text | None, cfg: SimpleNamespace, data: Data, ranks: Ranks
) -> None:
    """Has the titles' vectors, if there are any, in the model's item vectors from here on."""
    if text is None:
        return
    Z = of_first(torch.from_numpy(text.fitted(data, cfg)).to(ranks.device), ranks)
    table_IE = model.item.weight
    E = table_IE.shape[1]
    if hasattr(model, "take_text"):  # it is made of them
        model.take_text(Z)
        return
    if cfg.cold_out:
        model.titles_ID = Z
        is_cold_I = torch.ones(len(table_IE), dtype=torch.bool, device=ranks.device)
        is_cold_I[seen_in_training(data)] = False
        model.barred_I = torch.where(is_cold_I[1:], -torch.inf, 0.0)
    if cfg.text_in == "start":
        # z has norm 1 (n joined sources: the root of n): its E numbers get the deviation that
        # other item vectors begin with
        table_IE.copy_(cfg.eta * START * E**0.5 * widened(Z, E))
        return
    if not cfg.offset:
        table_IE.requires_grad_(False)
    if not cfg.offset or cfg.text_in == "alphafuse":
        table_IE.zero_()
    if cfg.cold_out:
        table_IE[is_cold_I] = 0
    way = WAYS[cfg.text_in](Z, E, cfg.eta).to(ranks.device)
    parametrize.register_parametrization(model.item, "weight", way)


def of_first(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The first process's tensor on all of them: another machine may fit with other last bits."""
    if ranks.world > 1:
        x = x.contiguous()
        dist.broadcast(x, 0)
    return x


@torch.no_grad()
def text_part(model: nn.Module) -> torch.Tensor:
    """What the text says of the item vectors (I+1, E), without what is learnt of each item: zeros
    where it only began them."""
    if not parametrize.is_parametrized(model.item, "weight"):
        return torch.zeros_like(model.item.weight)
    made = model.item.parametrizations.weight
    return made[0](torch.zeros_like(made.original))


def fold(model: nn.Module) -> None:
    """Makes the item vectors plain ones again, as they are now; those that are stay so. What tells
    relations by titles goes."""
    if hasattr(model, "drop_text"):
        model.drop_text()
    if parametrize.is_parametrized(model.item, "weight"):
        parametrize.remove_parametrizations(model.item, "weight", leave_parametrized=True)


# ---------------------------------------------------------------- what cannot be meant


def flags_of_text(cfg: SimpleNamespace) -> dict[str, bool]:
    """{flag about titles' vectors: was it given?}"""
    return {
        "--text-in": cfg.text_in != "fold",
        "--text-whiten": cfg.text_whiten is not None,
        "--text-width": cfg.text_width is not None,
        "--text-graph": bool(cfg.text_graph),
        "--permute-text": cfg.permute_text,
    }


def faults_of(cfg: SimpleNamespace) -> list[tuple[bool, str]]:
    """(is it one?, sentence) of what was asked of titles' vectors and cannot be meant."""
    has_text = bool((cfg.text or cfg.teacher) and cfg.eta)
    first = next((flag for flag, is_given in flags_of_text(cfg).items() if is_given), None)
    runs = [name for name in names_of(cfg.text or "tfidf") if name not in WORDS]
    runs = [name for name in runs if name and not name.endswith(".npy")]
    return [
        (
            not cfg.offset and not has_text,
            "--no-offset leaves the titles' vectors only, but there are none: it needs --teacher "
            "or --text, and --eta above 0",
        ),
        (
            first and not has_text,
            f"{first} is about titles' vectors, but there are none: it needs --text or --teacher, "
            "and --eta above 0",
        ),
        (
            not cfg.offset and cfg.text_in == "start",
            "--no-offset has nothing to leave out with --text-in start, where item vectors only "
            "begin as the titles'; use --text-in alphafuse for vectors that stay as they are",
        ),
        (
            cfg.text_width is not None and cfg.text_in in FIRST_WIDE,
            f"--text-in {cfg.text_in} takes as many directions as an item vector has (--width); "
            f"leave --text-width {cfg.text_width} out",
        ),
        (
            cfg.text_graph and cfg.text_whiten,
            "--text-graph chooses directions and --text-whiten scales those of the variance; leave "
            "one of the two out, or give --text-whiten 0",
        ),
        (
            cfg.cold_out and not has_text,
            "--cold-out ranks items that training never saw by their text, but there is none: it "
            "needs --text or --teacher, and --eta above 0",
        ),
        (
            cfg.cold_out and cfg.loss != "ce",
            f"--cold-out leaves items out of the softmax over all items, but --loss is {cfg.loss}; "
            "use --loss ce",
        ),
        (
            cfg.cold_out and cfg.dros,
            "--cold-out leaves items out of the loss, but --dros keeps the scores of all items "
            "small; leave one of the two out",
        ),
        (
            cfg.folds and runs,
            f"--folds trains without a fold's users, but the LM of {' '.join(runs)} has learnt "
            "from all of them; use --text tfidf or minilm, or leave --folds out",
        ),
    ]
