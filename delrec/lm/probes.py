"""A few short prompts, and what the untouched model says of them, one row at a time: what our ways
of reading an LM are measured against (check.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import torch

from delrec.lm.ragged import pad
from delrec.lm.reading import Start
from delrec.lm.text import MASK, SLOT, embed, encode, must_have_vectors, random_soft_prompt
from delrec.runtime import first_line, stop
from delrec.training.memory import free_bytes

if TYPE_CHECKING:
    from delrec.lm.model import LM

WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "local_radius",
    "index_topk",  # of the tokens that a sparse attention picks
)
TRUE_TO = 1e-4  # of a logit, times their spread: what counts as equal in fp32
TOLD = ("Silver River (1994), Hidden Letters, June", "So:")  # what the prompts tell, and begin with
COLUMNS = 48  # tokens whose logits are compared, besides those of the titles


class HalfFails(Exception):
    """The untouched model cannot be run, or gives no finite scores, in 16 bits."""


@dataclass
class Probe:
    """One prefix with some tails, each with the same titles, or with none: read at the mask."""

    prefix: np.ndarray  # its tokens
    tails: list[np.ndarray]  # each ends with the mask
    films: list[np.ndarray]  # the tokens of the titles; none: only the mask is read
    P: torch.Tensor | None  # the soft prompt (k, D)
    long: bool = False  # is it longer than the windows that the configuration names?
    tok: np.ndarray | None = None  # the titles' tokens behind each tail (B, C, T)
    n: np.ndarray | None = None  # how many of them are read (B, C)
    begun: dict[tuple, Start] = field(default_factory=dict)  # the prefix, by how it was read

    def __post_init__(self):
        if self.films:
            self.tok = np.stack([pad(self.films)] * len(self.tails))
            self.n = np.array([[len(t) for t in self.films]] * len(self.tails))


@dataclass
class Wanted:
    """What the reads of a probe must say."""

    logits_NK: torch.Tensor
    may: float  # how far off the reads may be together: root mean square
    may_one: float  # how far off one of them may be


# ---------------------------------------------------------------- the prompts


def bare_probe(lm: LM) -> Probe:
    """One prompt without a soft prompt, read at its mask."""
    told, word = (np.asarray(encode(lm, text), np.int64) for text in TOLD)
    others = [t for t in (lm.mask_id, lm.decoder_start, *lm.end) if t is not None]
    prefix = np.concatenate([lm.start, word[:1]]).astype(np.int64)
    must_have_vectors(lm, np.concatenate([prefix, told, others]))
    return Probe(prefix, [np.append(told, MASK)], [], None)


def probes_of(lm: LM) -> list[Probe]:
    """The other prompts, as short as they can be and still differ in what matters: two lengths in
    one pass, several titles of several tokens, a soft prompt; one behind the window."""
    told, word = (np.asarray(encode(lm, text), np.int64) for text in TOLD)
    films = [np.asarray(encode(lm, t), np.int64) for t in ("Golden Harbour", "Machine")]
    # several tokens each: behind the first title a state of its own would show
    films = [t if len(t) > 2 else np.concatenate([t, told[:3]]) for t in films]
    films[0] = films[0][:-1] if len(films[0]) == len(films[1]) else films[0]
    prefix = np.concatenate([lm.start, word, np.full(3, SLOT), lm.sep]).astype(np.int64)
    tails = [np.append(t, MASK) for t in (told, told[: len(told) // 3 + 1])]
    P_kD = random_soft_prompt(lm, 3, 1)
    P_kD += 0.1 * P_kD.std() * torch.ones_like(P_kD)
    must_have_vectors(lm, np.concatenate([prefix.clip(0), *films]))
    probes = [Probe(prefix, tails, films, P_kD)]
    probes[0].n[1, 1] = 1  # read at the mask alone: what stands behind it must change nothing
    longest = len(prefix) + max(map(len, films)) + 1
    if lm.window and longest < lm.window + 8 < lm.max_tokens - longest:
        long = np.append(np.resize(told, lm.window + 8), MASK)
        probes.append(Probe(prefix, [long], films, P_kD, long=True))
    return probes


def columns_of(lm: LM, probes: list[Probe]) -> torch.Tensor:
    """The tokens whose logits are compared: the titles' own, and some spread over the
    vocabulary."""
    own = np.concatenate([title for p in probes for title in p.films])
    spread = np.linspace(0, min(len(lm.tok), len(lm.head_VD)) - 1, COLUMNS).astype(np.int64)
    return torch.as_tensor(np.unique(np.concatenate([own, spread])), device=lm.device)


# ---------------------------------------------------------------- what the configuration says


def window_of(lm: LM) -> int | None:
    """The smallest window that any part of the configuration names: tokens behind which a layer
    sees less, or turns its positions in another way (LongRoPE)."""
    configs = [lm.model.config, *(getattr(m, "config", None) for m in lm.model.modules())]
    sizes = [named(c, name) for c in configs for name in WINDOWS]
    for config in configs:
        rope = named(config, "rope_parameters") or named(config, "rope_scaling")
        if isinstance(rope, dict) and "longrope" in (rope.get("rope_type"), rope.get("type")):
            sizes.append(rope.get("original_max_position_embeddings"))
            sizes.append(named(config, "original_max_position_embeddings"))
    return min((n for n in sizes if isinstance(n, int) and n > 0), default=None)


def named(config: Any, name: str) -> Any:
    """What a configuration says under a name; None where it does not, or says it layer by layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has one of its own for what differs from layer to layer
        return None


# ---------------------------------------------------------------- the untouched model


def plain_logits(lm: LM, p: Probe, columns: torch.Tensor) -> torch.Tensor:
    """The untouched model's logits (N, K) at all reads of a probe, one row a pass: behind each tail
    the tokens of its titles, or what stands at the mask."""
    rows = []
    for b, tail in enumerate(p.tails):
        titles = [title[:n] for title, n in zip(p.films, p.n[b])] if p.films else [[]]
        for title in titles:
            if rows and len(title) == 1 and lm.kind != "encoder":  # said in the row before
                rows.append(rows[-1][:1])
            else:
                rows.append(plain_row(lm, p, tail, title)[:, columns].float())
    return torch.cat(rows)


def plain_row(
    lm: LM, p: Probe, tail: np.ndarray, title: np.ndarray | list[int], as_tokens: bool = False
) -> torch.Tensor:
    """The untouched model's logits (n, V) that predict each of a title's n tokens; of none, those
    at the mask (1, V). as_tokens: it is given tokens, not their vectors."""
    title = np.asarray(title, np.int64)
    mask_at = list(tail).index(MASK)
    before = np.concatenate([p.prefix, tail[:mask_at]]).astype(np.int64)
    after = [*tail[mask_at + 1 :], *lm.end]
    n = max(len(title), 1)
    if lm.kind == "decoder":
        row = np.concatenate([before, title[:-1]])
        return plain_pass(lm, row, p.P, as_tokens)[len(before) - 1 :]
    masks = np.full(n if lm.kind == "encoder" else 1, lm.mask_id)
    row = np.concatenate([before, masks, after]).astype(np.int64)
    if lm.kind == "encoder":
        return plain_pass(lm, row, p.P, as_tokens)[len(before) : len(before) + n]
    begins = np.array([lm.decoder_start, lm.mask_id, *title[:-1]], np.int64)
    said = {"decoder_input_ids": torch.as_tensor(begins, device=lm.device)[None]}
    return plain_pass(lm, row, p.P, as_tokens, **said)[1:]


def plain_pass(
    lm: LM, row: np.ndarray, P_kD: torch.Tensor | None, as_tokens: bool, **more: torch.Tensor
) -> torch.Tensor:
    """The untouched model's logits (Q, V) at all places of one row of tokens, or of their
    vectors."""
    if as_tokens:
        ids_1Q = torch.as_tensor(row, device=lm.device)[None]
        return lm.model(input_ids=ids_1Q, **more).logits[0]
    return lm.model(inputs_embeds=embed(lm, row[None], P_kD), **more).logits[0]


@contextlib.contextmanager
def in_fp32(lm: LM) -> Iterator[LM]:
    """With it the LM that it gives computes in fp32; behind it every weight is bit for bit what it
    was."""
    was = {
        p: p.dtype for p in [*lm.model.parameters(), *lm.model.buffers()] if p.is_floating_point()
    }
    for p in was:
        p.data = p.data.float()
    try:
        yield replace(lm, dtype=torch.float32)
    finally:
        for p, t in was.items():
            p.data = p.data.to(t)


# ---------------------------------------------------------------- what must be met


def wanted_of(
    lm: LM, probes: list[Probe], columns: torch.Tensor, first_1V: torch.Tensor
) -> list[Wanted]:
    """For each probe the logits to meet and how far off they may be. first_1V: the logits of the
    first probe, which are known."""
    first_NK = first_1V[:, columns].float()
    others = runs_at_all(lm, lambda: [plain_logits(lm, p, columns) for p in probes[1:]])
    plain = [first_NK, *others]
    half = lm.dtype.itemsize < 4
    if not all(torch.isfinite(x).all() for x in plain):
        if half:
            raise HalfFails("its scores are not finite")
        stop(f"{lm.name} gives scores that are not finite in {lm.dtype}; use another LM")
    exact = exact_logits(lm, probes, columns) if half else plain
    spread = max(float(x.std()) for x in (exact or plain))
    floor = max(1.0, spread) * (TRUE_TO * 10 if half else TRUE_TO)
    if exact is None:  # no room to measure its own error
        floor = 4 * torch.finfo(lm.dtype).eps * max(float(x.abs().max()) for x in plain)
        exact = plain
    return [
        Wanted(
            logits_NK=e,
            may=2 * together(off(x, e)) + floor,
            may_one=4 * float(off(x, e).max()) + floor,
        )
        for x, e in zip(plain, exact)
    ]


def exact_logits(lm: LM, probes: list[Probe], columns: torch.Tensor) -> list[torch.Tensor] | None:
    """The logits of the probes by the untouched model in fp32; None where memory does not hold
    it."""
    needs = 4 * sum(p.numel() for p in lm.model.parameters())
    if lm.sharded or free_bytes(lm.device) <= 1.2 * needs:
        return None
    with in_fp32(lm) as exact_lm:
        return [plain_logits(exact_lm, p, columns) for p in probes]


def runs_at_all(lm: LM, ask: Callable[[], Any]) -> Any:
    """What `ask` gets of the untouched model; one that fails is refused with its reason."""
    try:
        return ask()
    except click.ClickException:
        raise
    except Exception as bad:  # of whatever kind: the model is somebody else's
        why = first_line(bad)
        if lm.dtype.itemsize < 4:
            raise HalfFails(why) from bad
        stop(
            f"{lm.name} ({type(lm.model).__name__}) cannot be read from vectors in place of "
            f"tokens, which a soft prompt is ({why}); use another LM"
        )


def off(a_NK: torch.Tensor, b_NK: torch.Tensor) -> torch.Tensor:
    """How far apart the logits of each read are, root mean square (N,)."""
    return (a_NK - b_NK).pow(2).mean(1).sqrt()


def together(off_N: torch.Tensor) -> float:
    """Of how far off each read is, the root mean square: the largest alone is a matter of luck."""
    return float(off_N.pow(2).mean().sqrt())
