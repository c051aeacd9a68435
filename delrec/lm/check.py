"""Is an LM read right? Measured at load, not assumed.

A few short prompts (two lengths in one pass; with two titles and a soft prompt, and without; one
longer than any window that the configuration names) are scored by our ways and by the untouched
model, one row at a time (probes.py). `find` takes the fastest way that says the same: each read's
logits may be off by twice what the model itself is off in its dtype against fp32. Where none does,
the LM is refused with what differs. What was found is kept under the user's cache, by the LM's
fingerprint, so that it is measured once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from delrec.lm import passes
from delrec.lm.own_head import own_logits
from delrec.lm.probes import (
    Probe,
    Wanted,
    bare_probe,
    columns_of,
    named,
    off,
    plain_row,
    probes_of,
    runs_at_all,
    together,
    wanted_of,
    window_of,
)
from delrec.lm.reading import read, read_prefix
from delrec.runtime import CACHE, first_line, stop, write_json

if TYPE_CHECKING:
    from delrec.lm.model import LM

# files whose code says how an LM is read: what was found holds for these only
CODE = ("check.py", "probes.py", "reading.py", "passes.py", "ragged.py", "own_head.py", "text.py")


@dataclass
class Found:
    """How an LM is read right; LM (model.py) says more of each field."""

    attends: bool = False
    paths: tuple[str, ...] = ()
    reach: float = float("inf")
    factor: float = 1.0
    scale: float = 1.0
    own_head: bool = False
    said: str = ""  # what the user should know of it
    window: int | None = None  # told by the configuration, so it is not kept


@dataclass
class Comparison:
    """What our ways are measured against, and why the last of them failed."""

    probes: list[Probe]
    wanted: list[Wanted]  # of each probe
    columns: torch.Tensor  # the tokens whose logits are compared (K,)
    trouble: str = "another shape, or not finite"


def say(line: str) -> None:
    """Prints one line, on the first of several processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


@functools.cache
def say_once(line: str) -> None:
    """Prints one line, on the first of several processes, and once only."""
    say(line)


@torch.no_grad()
def find(lm: LM, checked: bool = True) -> Found:
    """How the LM is read right; one that cannot be is refused. The model is left ready to be read
    so (its attention, its head). checked=False: the fastest way, on trust."""
    lm = replace(lm, window=window_of(lm))
    if not checked:
        return on_trust(lm)
    key = key_of(lm)  # before anything of the model is changed
    found = remembered(key)
    if found is None:
        found = measure(lm)
        remember(key, found)
    else:
        prepare(lm, found)
    if found.said:
        say(f"{lm.name}: {found.said}")
    found.window = lm.window
    return found


def measure(lm: LM) -> Found:
    """The fastest way that says what the untouched model says."""
    bare = bare_probe(lm)
    lm, first_1V = runs_at_all(lm, lambda: with_factor(lm, bare))
    probes = [bare, *probes_of(lm)]
    columns = columns_of(lm, probes)
    compare = Comparison(probes, wanted_of(lm, probes, columns, first_1V), columns)
    if lm.kind == "decoder":
        right, said = find_decoder(lm, compare)
    else:
        right, said = find_encoder(lm, compare)
    return Found(
        attends=right.attends,
        paths=tuple(right.paths),
        reach=right.reach,
        factor=right.factor,
        scale=right.scale,
        own_head=right.own_head,
        said=said,
    )


# ---------------------------------------------------------------- our ways, against it


def with_factor(lm: LM, bare: Probe) -> tuple[LM, torch.Tensor]:
    """The LM with the factor by which the model multiplies the vectors of tokens, but not those it
    is given (Falcon-H1), and the logits (1, V) that the bare probe's vectors give; raises where
    no vectors give what tokens do: a second table of vectors that only tokens reach would not be
    there for a soft prompt."""
    (tail,) = bare.tails
    as_tokens = plain_row(lm, bare, tail, [], as_tokens=True).float()
    may = 0.05 * max(float(as_tokens.std()), 1e-6) + 0.05 * (lm.dtype.itemsize < 4)
    root = lm.model.get_input_embeddings().weight.shape[1] ** 0.5
    for factor in (1.0, named(lm.model.config, "embedding_multiplier"), root):
        if isinstance(factor, (int, float)):
            lm = replace(lm, factor=float(factor))
            as_vectors = plain_row(lm, bare, tail, [])
            apart = float((as_tokens - as_vectors.float()).abs().max())
            if apart <= may:
                return lm, as_vectors
    raise ValueError(f"its logits are {apart:.2g} apart for tokens and for their vectors")


def our_logits(lm: LM, p: Probe, columns: torch.Tensor) -> torch.Tensor:
    """The logits (N, K) at all reads of a probe by the way that lm.paths names first."""
    keeps = lm.attends, lm.paths[:1] == ["rows"]  # what read_prefix goes by
    if keeps not in p.begun:
        p.begun[keeps] = read_prefix(lm, p.prefix, p.P, cache=bool(p.films))
    x_ND = read(lm, p.begun[keeps], p.tails, p.tok, p.n)
    if lm.own_head:
        return own_logits(lm, x_ND)[:, columns].float()
    logits_NK = x_ND.float() @ lm.head_VD[columns].float().T
    if lm.bias_V is not None:
        logits_NK = logits_NK + lm.bias_V[columns].float()
    return lm.scale * logits_NK


def measured(lm: LM, compare: Comparison, long: bool | None = None) -> float:
    """How far off our way is, in units of what it may be: at most 1 is right, inf where it fails.
    long: only the probes beyond (True) or within (False) the windows."""
    worst = 0.0
    for p, want in zip(compare.probes, compare.wanted):
        if long is not None and p.long != long:
            continue
        try:
            got = our_logits(lm, p, compare.columns)
        except Exception as bad:  # a way that this model cannot go: its code is somebody else's
            compare.trouble = first_line(bad, 100)
            return float("inf")
        if got.shape != want.logits_NK.shape or not torch.isfinite(got).all():
            return float("inf")
        each_N = off(got, want.logits_NK)
        worst = max(worst, together(each_N) / want.may, float(each_N.max()) / want.may_one)
    return worst


def must_be_right(lm: LM, compare: Comparison) -> None:
    """Stops where the plainest way is not right either."""
    apart = measured(lm, compare)
    if apart > 1:
        refuse(lm, compare, apart)


def refuse(lm: LM, compare: Comparison, apart: float) -> None:
    """Stops: no way of ours says what the model says."""
    how = f"is {apart:.3g} times too far off"
    if apart == float("inf"):
        how = f"fails, {compare.trouble}"
    stop(
        f"{lm.name} ({type(lm.model).__name__}): no way of reading it here gives the scores that "
        f"transformers gives (the plainest one {how}); use another LM, or --no-check-llm "
        "to take it on trust"
    )


# ---------------------------------------------------------------- encoders


def find_encoder(lm: LM, compare: Comparison) -> tuple[LM, str]:
    """An encoder, or an encoder-decoder whose candidates share their prompt's encoder states if
    they say the same; and what the user should know."""
    bare_head(lm)
    put_back = passes.attend_by_ours(lm.model) if lm.kind == "encoder-decoder" else None
    if put_back is None:
        must_be_right(lm, compare)
        return lm, ""
    shares = replace(lm, attends=True)
    if measured(shares, compare) <= 1:
        return shares, ""
    put_back()
    must_be_right(lm, compare)
    return lm, "candidates do not share encoder states; slower, the same"


def bare_head(lm: LM) -> None:
    """Makes the model's logits the states its head would read: no script makes B x V of them, and
    every architecture's own last norm, transform and scaling still apply."""
    lm.model.get_output_embeddings().forward = lambda x: x


# ---------------------------------------------------------------- decoders


def find_decoder(lm: LM, compare: Comparison) -> tuple[LM, str]:
    """The decoder by the fastest way that says the same, and what the user should know of it."""
    text = lm.model.config.get_text_config()
    capped = bool(getattr(text, "final_logit_softcapping", None))  # unseen in small logits
    lm, put_back, wrong = by_fastest(replace(lm, own_head=capped), compare)
    if lm.paths == ["rows"]:  # is it the passes that differ, or what follows the head?
        lm = with_head(lm, compare)
        if lm.own_head or lm.scale != 1:
            lm, put_back, wrong = by_fastest(lm, compare)
    if lm.paths[0] != "rows" and any(p.long for p in compare.probes):
        lm = within_reach(lm, compare, put_back)
    elif lm.paths[0] != "rows" and (lm.window or lm.max_tokens) < lm.max_tokens:
        lm = replace(lm, reach=lm.window)  # too near to the longest prompt to be measured
    return lm, about(lm, wrong)


def by_fastest(lm: LM, compare: Comparison) -> tuple[LM, Callable | None, list[str]]:
    """The LM with the paths that say the same, best first, down to the first that can also train; a
    function that puts the model's own attention back, or None; and the paths that are wrong."""
    put_back = passes.attend_by_ours(lm.model)
    lm = replace(lm, attends=put_back is not None)
    right, wrong = [], []
    for path in passes.passes_to_try(lm) if lm.attends else ["padded"]:
        if measured(replace(lm, paths=[path]), compare, long=False) > 1:
            wrong.append(path)
            continue
        right.append(path)
        if path != "fused":
            break
    if lm.attends and not set(right) - {"fused"}:
        put_back()
        lm = replace(lm, attends=False)
        says_the_same = measured(replace(lm, paths=["padded"]), compare, long=False) <= 1
        right = ["padded"] if says_the_same else []
    return replace(lm, paths=[*right, "rows"]), put_back, wrong


def within_reach(lm: LM, compare: Comparison, put_back: Callable | None) -> LM:
    """The LM as it is right beyond the windows that the configuration names: by its best path, or
    longer prompts, or all, one row a title."""
    if measured(lm, compare, long=True) <= 1:
        return lm
    near = replace(lm, reach=lm.window)
    if measured(near, compare, long=True) <= 1:
        return near
    if put_back and lm.attends:  # rows say the same under the model's own attention
        put_back()
    lm = replace(lm, attends=False, paths=["rows"])
    must_be_right(lm, compare)
    return lm


def with_head(lm: LM, compare: Comparison) -> LM:
    """The LM as its logits follow from its states: by the head, times a number, or only by asking
    the model itself; refused where not even that is so."""
    lm = replace(lm, own_head=False)
    apart = measured(lm, compare)
    if apart <= 1:
        return lm
    scaled = lm
    with contextlib.suppress(Exception):
        ours = torch.cat([our_logits(lm, p, compare.columns) for p in compare.probes])
        theirs = torch.cat([want.logits_NK for want in compare.wanted])
        scaled = replace(lm, scale=float((ours * theirs).sum() / (ours * ours).sum()))
    if lm.bias_V is None and measured(scaled, compare) <= 1:
        return scaled
    asked = replace(lm, own_head=True)
    if measured(asked, compare) > 1:
        refuse(lm, compare, apart)
    return asked


def about(lm: LM, wrong: list[str]) -> str:
    """What the user should know of the way found; nothing where it is the fastest there is."""
    parts = []
    if lm.paths[0] == "rows":
        parts.append(
            "one row a title, because the fast ways give other scores than the model itself"
        )
    elif "padded" in lm.paths and wrong:
        parts.append("padded rows, because packed ones give other scores than the model itself")
    if lm.reach < float("inf"):
        parts.append(f"one row a title in prompts of over {lm.reach} tokens, its layers' window")
    if lm.own_head:
        parts.append("by logits of the model itself, which it changes behind its head")
    return ("read " + "; ".join(parts) + " (slower, the same scores)") if parts else ""


# ---------------------------------------------------------------- unmeasured


@torch.no_grad()
def on_trust(lm: LM) -> Found:
    """The fastest way whose shape fits, not compared; refused where it does not run at all."""
    if lm.kind != "decoder":
        bare_head(lm)
        attends = lm.kind == "encoder-decoder" and passes.attend_by_ours(lm.model) is not None
        found = Found(attends=attends, window=lm.window)
    else:
        attends = passes.attend_by_ours(lm.model) is not None
        ways = passes.passes_to_try(lm) if attends else ["padded"]
        reach = lm.window or float("inf")
        found = Found(attends=attends, paths=(*ways, "rows"), reach=reach, window=lm.window)
    lm = replace(lm, attends=found.attends, paths=[*found.paths], reach=found.reach)
    try:
        for probe in probes_of(lm) if lm.tok else ():  # a bench's random LM has no words to try
            our_logits(lm, probe, torch.zeros(1, dtype=torch.long, device=lm.device))
    except Exception as bad:  # a way that this model cannot go: its code is somebody else's
        stop(
            f"{lm.name} ({type(lm.model).__name__}): the fastest way of reading it fails "
            f"({first_line(bad, 100)}); leave out --no-check-llm, so that another way is looked for"
        )
    return found


# ---------------------------------------------------------------- found once


def key_of(lm: LM) -> str:
    """What a finding holds for: the LM, how it computes, and the code that reads it."""
    import transformers

    config = lm.model.config.to_dict() | {"_name_or_path": ""}  # wherever the files are
    ways = passes.passes_to_try(lm) if lm.kind == "decoder" else []
    known = [
        lm.identity,
        json.dumps(config, sort_keys=True, default=str),
        f"{lm.dtype} {lm.device.type} {lm.sharded} {ways}",
        passes.made_of(ways),
        str(lm.model.config._attn_implementation),
        torch.__version__,
        transformers.__version__,
        sys.version,
        *(Path(__file__).with_name(name).read_text() for name in CODE),
    ]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:24]


def remembered(key: str) -> Found | None:
    """What was found for this LM before, if it can be read."""
    try:
        kept = json.loads((CACHE / "checked" / f"{key}.json").read_text(encoding="utf-8"))
        kept["reach"] = float("inf") if kept["reach"] is None else kept["reach"]
        return Found(**kept) if set(as_kept(Found())) <= set(kept) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remember(key: str, found: Found) -> None:
    """Keeps what was found; a cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        (CACHE / "checked").mkdir(parents=True, exist_ok=True)
        write_json(CACHE / "checked" / f"{key}.json", as_kept(found))


def as_kept(found: Found) -> dict:
    """What is kept of a finding, as JSON can say it."""
    kept = asdict(found)
    kept.pop("window")
    return kept | {"reach": None if found.reach == float("inf") else found.reach}


def prepare(lm: LM, found: Found) -> None:
    """Makes the model ready to be read as was found before."""
    if found.attends:
        passes.attend_by_ours(lm.model)
    if lm.kind != "decoder":
        bare_head(lm)
