"""Is an LM read right? Measured at load, not assumed.

A few short prompts (two lengths in one pass; with two titles and a soft prompt, and without; one
longer than any window that the configuration names) are scored by our ways and by the untouched
model, one row at a time. `settle` takes the fastest way that says the same: each read's logits may
be off by twice what the model itself is off in its dtype against fp32. Where none does, the LM is
refused with what differs. What was found is kept under the user's cache, by the LM's fingerprint,
so that it is measured once.
"""

import contextlib
import functools
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

from delrec.lm import passes
from delrec.lm.own_head import own_logits
from delrec.lm.reading import read, read_prefix
from delrec.lm.text import (
    MASK,
    SLOT,
    embed,
    encode,
    must_have_vectors,
    random_soft_prompt,
)
from delrec.runtime import CACHE, first_line, stop, write_json
from delrec.training.memory import free_bytes

WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "window_size",
    "local_attention",
    "local_radius",
    "index_topk",  # of the tokens that a sparse attention picks
)
SETTLED = ("attends", "paths", "reach", "factor", "scale", "own_head", "said")
TRUE_TO = 1e-4  # of a logit, times their spread: what counts as equal in fp32
TOLD = ("Silver River (1994), Hidden Letters, June", "So:")  # what the prompts tell, and begin with
COLUMNS = 48  # tokens whose logits are compared, besides those of the titles


class HalfFails(Exception):
    """The untouched model cannot be run, or gives no finite scores, in 16 bits."""


def say(line):
    """Prints one line, on the first of several processes."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line, flush=True)


@functools.cache
def say_once(line):
    """The same, but each line once a process."""
    say(line)


# ---------------------------------------------------------------- prompts to compare on


def bare_probe(lm) -> SimpleNamespace:
    """One prompt without a soft prompt, read at its mask."""
    told, word = (np.asarray(encode(lm, text), np.int64) for text in TOLD)
    others = [t for t in (lm.mask_id, lm.decoder_start, *lm.end) if t is not None]
    prefix = np.concatenate([lm.start, word[:1]]).astype(np.int64)
    must_have_vectors(lm, np.concatenate([prefix, told, others]))
    return probe(prefix, [np.append(told, MASK)], [], None)


def probes_of(lm) -> list:
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
    probes = [probe(prefix, tails, films, P_kD)]
    probes[0].n[1, 1] = 1  # read at the mask alone: what stands behind it must change nothing
    longest = len(prefix) + max(map(len, films)) + 1
    if lm.window and longest < lm.window + 8 < lm.max_tokens - longest:
        long = np.append(np.resize(told, lm.window + 8), MASK)
        probes.append(probe(prefix, [long], films, P_kD, long=True))
    return probes


def probe(prefix, tails, films, P_kD, long=False) -> SimpleNamespace:
    """One prefix with some tails, each with the same titles, or with none: read at the mask."""
    tok_BCT = n_BC = None
    if films:
        tok_BCT = np.stack([passes.pad(films)] * len(tails))
        n_BC = np.array([[len(t) for t in films]] * len(tails))
    return SimpleNamespace(
        prefix=prefix, tails=tails, films=films, tok=tok_BCT, n=n_BC, P=P_kD, long=long, begun={}
    )


def window_of(lm) -> int | None:
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


def named(config, name):
    """What a configuration says under a name; None where it does not, or says it layer by layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has one of its own for what differs from layer to layer
        return None


def columns_of(lm, probes) -> torch.Tensor:
    """The tokens whose logits are compared: the titles' own, and some spread over the
    vocabulary."""
    own = np.concatenate([title for p in probes for title in p.films])
    spread = np.linspace(0, min(len(lm.tok), len(lm.head_VD)) - 1, COLUMNS).astype(np.int64)
    return torch.as_tensor(np.unique(np.concatenate([own, spread])), device=lm.device)


# ---------------------------------------------------------------- the untouched model


def plain_logits(lm, p, columns) -> torch.Tensor:
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


def plain_row(lm, p, tail, title, as_tokens=False) -> torch.Tensor:
    """The untouched model's logits (n, V) that predict each of a title's n tokens; of none, those
    at the mask (1, V). as_tokens: it is given tokens, not their vectors."""
    title = np.asarray(title, np.int64)
    before, after = tail[: list(tail).index(MASK)], tail[list(tail).index(MASK) + 1 :]
    row, n = np.concatenate([p.prefix, before]).astype(np.int64), max(len(title), 1)

    def ask(ids, **more):
        ids_1Q = torch.as_tensor(ids, device=lm.device)[None]
        if as_tokens:
            return lm.model(input_ids=ids_1Q, **more).logits[0]
        return lm.model(inputs_embeds=embed(lm, ids_1Q, p.P), **more).logits[0]

    if lm.kind == "decoder":
        return ask(np.concatenate([row, title[:-1]]))[len(row) - 1 :]
    masks = np.full(n if lm.kind == "encoder" else 1, lm.mask_id)
    row = np.concatenate([row, masks, after, lm.end]).astype(np.int64)
    if lm.kind == "encoder":
        m = len(p.prefix) + len(before)
        return ask(row)[m : m + n]
    begins = np.array([lm.decoder_start, lm.mask_id, *title[:-1]], np.int64)
    return ask(row, decoder_input_ids=torch.as_tensor(begins, device=lm.device)[None])[1:]


@contextlib.contextmanager
def in_fp32(lm):
    """With it the model computes in fp32; behind it every weight is bit for bit what it was."""
    was = {
        p: p.dtype for p in [*lm.model.parameters(), *lm.model.buffers()] if p.is_floating_point()
    }
    dtype, lm.dtype = lm.dtype, torch.float32
    for p in was:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, t in was.items():
            p.data = p.data.to(t)
        lm.dtype = dtype


def reference_of(lm, probes, columns, first_1V) -> list:
    """For each probe the logits (N, K) to meet and how far each read (N,) may be off. first_1V: the
    logits of the first probe, which are known."""
    first_NK = first_1V[:, columns].float()
    others = runs_at_all(lm, lambda: [plain_logits(lm, p, columns) for p in probes[1:]])
    plain = [first_NK, *others]
    if not all(torch.isfinite(x).all() for x in plain):
        if lm.dtype.itemsize < 4:
            raise HalfFails("its scores are not finite")
        stop(f"{lm.name} gives scores that are not finite in {lm.dtype}; use another LM")
    exact = plain
    half = lm.dtype.itemsize < 4
    if half and not lm.sharded:
        needs = 4 * sum(p.numel() for p in lm.model.parameters())
        if free_bytes(lm.device) > 1.2 * needs:
            with in_fp32(lm):
                exact = [plain_logits(lm, p, columns) for p in probes]
    spread = max(float(x.std()) for x in exact)
    floor = max(1.0, spread) * (TRUE_TO * 10 if half else TRUE_TO)
    if exact is plain and half:  # no room to measure its own error
        floor = 4 * torch.finfo(lm.dtype).eps * max(float(x.abs().max()) for x in plain)
    return [
        SimpleNamespace(
            logits=e,
            may=2 * together(off(x, e)) + floor,
            may_one=4 * float(off(x, e).max()) + floor,
            long=p.long,
        )
        for p, x, e in zip(probes, plain, exact)
    ]


def together(off_N) -> float:
    """Of how far off each read is, the root mean square: the largest alone is a matter of luck."""
    return float(off_N.pow(2).mean().sqrt())


def runs_at_all(lm, ask):
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


def off(a_NK, b_NK) -> torch.Tensor:
    """How far apart the logits of each read are, root mean square (N,)."""
    return (a_NK - b_NK).pow(2).mean(1).sqrt()


def settle_factor(lm, bare) -> torch.Tensor:
    """Finds the factor by which the model multiplies the vectors of tokens, but not those it is
    given (Falcon-H1). Returns the logits (1, V) that the bare probe's vectors give; raises where
    no vectors give what tokens do: a second table of vectors that only tokens reach would not be
    there for a soft prompt."""
    (tail,) = bare.tails
    as_tokens = plain_row(lm, bare, tail, [], as_tokens=True).float()
    may = 0.05 * max(float(as_tokens.std()), 1e-6) + 0.05 * (lm.dtype.itemsize < 4)
    root = lm.model.get_input_embeddings().weight.shape[1] ** 0.5
    for factor in (1.0, named(lm.model.config, "embedding_multiplier"), root):
        if isinstance(factor, (int, float)):
            lm.factor = float(factor)
            as_vectors = plain_row(lm, bare, tail, [])
            apart = float((as_tokens - as_vectors.float()).abs().max())
            if apart <= may:
                return as_vectors
    raise ValueError(f"its logits are {apart:.2g} apart for tokens and for their vectors")


# ---------------------------------------------------------------- our ways, against it


def our_logits(lm, p, columns) -> torch.Tensor:
    """The same logits (N, K) by the way that lm.paths names first."""
    keeps = lm.attends, lm.paths[:1] == ["rows"]  # what `begin` goes by
    if keeps not in p.begun:
        p.begun[keeps] = read_prefix(lm, p.prefix, p.P, cache=bool(p.films))
    x_ND = read(lm, p.begun[keeps], p.tails, p.tok, p.n)
    if lm.own_head:
        return own_logits(lm, x_ND)[:, columns].float()
    logits_NK = x_ND.float() @ lm.head_VD[columns].float().T
    if lm.bias_V is not None:
        logits_NK = logits_NK + lm.bias_V[columns].float()
    return lm.scale * logits_NK


def measured(lm, c, long=None) -> float:
    """How far off our way is, in units of what it may be: at most 1 is right. inf where it cannot
    be gone at all. long: only the probes beyond (True) or within (False) the windows."""
    worst = 0.0
    for p, want in zip(c.probes, c.reference):
        if long is not None and p.long != long:
            continue
        try:
            got = our_logits(lm, p, c.columns)
        except Exception as bad:  # a way that this model cannot go: its code is somebody else's
            c.trouble = first_line(bad, 100)
            return float("inf")
        if got.shape != want.logits.shape or not torch.isfinite(got).all():
            return float("inf")
        each_N = off(got, want.logits)
        worst = max(worst, together(each_N) / want.may, float(each_N.max()) / want.may_one)
    return worst


@torch.no_grad()
def settle(lm, checked=True):
    """Settles how the LM is read (attends, paths, reach, scale, own_head), or refuses it."""
    lm.window = window_of(lm)
    if not checked:
        return on_trust(lm)
    key = key_of(lm)  # before anything of the model is changed
    found = remembered(key)
    if found:
        apply(lm, found)
        return
    bare = bare_probe(lm)
    first_1V = runs_at_all(lm, lambda: settle_factor(lm, bare))
    probes = [bare, *probes_of(lm)]
    columns = columns_of(lm, probes)
    reference = reference_of(lm, probes, columns, first_1V)
    compare = SimpleNamespace(
        probes=probes, reference=reference, columns=columns, trouble="another shape, or not finite"
    )
    said = settle_decoder(lm, compare) if lm.kind == "decoder" else settle_encoder(lm, compare)
    if said:
        say(f"{lm.name}: {said}")
    remember(lm, key, said)


def settle_encoder(lm, c):
    """Takes an encoder, or an encoder-decoder whose candidates share their prompt's encoder
    states, if they say the same. Returns what the user should know."""
    bare_head(lm)
    put_back = passes.own_attention(lm.model) if lm.kind == "encoder-decoder" else None
    if put_back:
        lm.attends = True
        if measured(lm, c) <= 1:
            return ""
        put_back()
        lm.attends = False
    apart = measured(lm, c)
    if apart > 1:
        refuse(lm, c, apart)
    return "" if put_back is None else "candidates do not share encoder states; slower, the same"


def settle_decoder(lm, c):
    """Finds the fastest way that says the same. Returns what the user should know of it."""
    text = lm.model.config.get_text_config()
    lm.own_head = bool(getattr(text, "final_logit_softcapping", None))  # unseen in small logits
    put_back, wrong = climb(lm, c)
    if lm.paths == ["rows"]:  # is it the passes that differ, or what follows the head?
        settle_head(lm, c)
        if lm.own_head or lm.scale != 1:
            put_back, wrong = climb(lm, c)
    if lm.paths[0] != "rows" and any(p.long for p in c.probes):
        settle_reach(lm, c, put_back)
    elif lm.paths[0] != "rows" and (lm.window or lm.max_tokens) < lm.max_tokens:
        lm.reach = lm.window  # too near to the longest prompt to be measured
    return about(lm, wrong)


def climb(lm, c):
    """Fills lm.paths with the ways that say the same, best first, down to the first that can also
    train. Returns a function that puts the model's own attention back, and how far off the other
    ways are."""
    put_back = passes.own_attention(lm.model)
    lm.attends, right, wrong = put_back is not None, [], {}
    for path in passes.candidates_of(lm) if lm.attends else ["padded"]:
        lm.paths = [path]
        apart = measured(lm, c, long=False)
        if apart > 1:
            wrong[path] = apart
            continue
        right.append(path)
        if path != "fused":
            break
    if lm.attends and not set(right) - {"fused"}:
        put_back()
        lm.attends, lm.paths = False, ["padded"]
        apart = measured(lm, c, long=False)
        right = ["padded"] if apart <= 1 else []
    lm.paths = [*right, "rows"]
    return put_back, wrong


def settle_reach(lm, c, put_back):
    """Finds whether the best way is also right beyond the windows that the configuration names;
    where it is not, longer prompts are read one row a title."""
    if measured(lm, c, long=True) <= 1:
        return
    lm.reach = lm.window
    if measured(lm, c, long=True) <= 1:
        return
    if put_back and lm.attends:  # rows say the same under the model's own attention
        put_back()
    lm.attends, lm.paths, lm.reach = False, ["rows"], float("inf")
    apart = measured(lm, c)
    if apart > 1:
        refuse(lm, c, apart)


def settle_head(lm, c):
    """Finds how the model's logits follow from its states: by the head, times a number, or only by
    asking the model itself; refuses it where not even that is so."""
    lm.own_head = False
    apart = measured(lm, c)
    if apart <= 1:
        return
    with contextlib.suppress(Exception):
        ours = torch.cat([our_logits(lm, p, c.columns) for p in c.probes])
        theirs = torch.cat([r.logits for r in c.reference])
        lm.scale = float((ours * theirs).sum() / (ours * ours).sum())
    if lm.bias_V is None and measured(lm, c) <= 1:
        return
    lm.scale, lm.own_head = 1.0, True
    if measured(lm, c) > 1:
        refuse(lm, c, apart)


def about(lm, wrong) -> str:
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


def refuse(lm, c, apart):
    """Stops: no way of ours says what the model says."""
    how = f"fails, {c.trouble}" if apart == float("inf") else f"is {apart:.3g} times too far off"
    stop(
        f"{lm.name} ({type(lm.model).__name__}): no way of reading it here gives the scores that "
        f"transformers gives (the plainest one {how}); use another LM, or --no-check-llm "
        "to take it on trust"
    )


def on_trust(lm):
    """Takes the fastest way whose shape fits, unmeasured."""
    if lm.kind != "decoder":
        bare_head(lm)
        lm.attends = lm.kind == "encoder-decoder" and passes.own_attention(lm.model) is not None
        return
    lm.attends = passes.own_attention(lm.model) is not None
    ways = passes.candidates_of(lm) if lm.attends else ["padded"]
    lm.paths = [*ways, "rows"]
    lm.reach = lm.window or float("inf")


def bare_head(lm):
    """The model's logits become the states its head would read: no script makes B x V of them, and
    every architecture's own last norm, transform and scaling still apply."""
    lm.model.get_output_embeddings().forward = lambda x: x


# ---------------------------------------------------------------- found once


def key_of(lm) -> str:
    """What a finding holds for: the LM, how it computes, and the code that reads it."""
    import transformers

    here = Path(__file__).parent
    code = [p.read_text() for p in (here / "check.py", here / "reading.py", here / "passes.py")]
    config = lm.model.config.to_dict() | {"_name_or_path": ""}  # wherever the files are
    known = [
        lm.identity,
        json.dumps(config, sort_keys=True, default=str),
        str(lm.dtype),
        lm.device.type,
        str(lm.sharded),
        str(lm.kind == "decoder" and passes.candidates_of(lm)),
        str(lm.model.config._attn_implementation),
        torch.__version__,
        transformers.__version__,
        sys.version,
        *code,
    ]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:24]


def remembered(key) -> dict | None:
    """What was found for this LM before, if it can be read."""
    try:
        found = json.loads((CACHE / "checked" / f"{key}.json").read_text(encoding="utf-8"))
        return found if set(SETTLED) <= set(found) else None
    except (OSError, ValueError, TypeError):
        return None


def remember(lm, key, said):
    """Keeps what was found; a cache that cannot be written is no reason to stop."""
    reach = None if lm.reach == float("inf") else lm.reach
    values = (lm.attends, lm.paths, reach, lm.factor, lm.scale, lm.own_head, said)
    with contextlib.suppress(OSError):
        (CACHE / "checked").mkdir(parents=True, exist_ok=True)
        write_json(CACHE / "checked" / f"{key}.json", dict(zip(SETTLED, values)))


def apply(lm, found):
    """Reads the LM as was found before, and says again what the user should know."""
    if found["attends"]:
        passes.own_attention(lm.model)
    if lm.kind != "decoder":
        bare_head(lm)
    lm.attends, lm.paths, lm.scale = found["attends"], found["paths"], found["scale"]
    lm.own_head, lm.factor = found["own_head"], found["factor"]
    lm.reach = float("inf") if found["reach"] is None else found["reach"]
    if found["said"]:
        say(f"{lm.name}: {found['said']}")
