"""Where the place at which an LM is read looks: the attention it pays to each part of a prompt."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from delrec.lm.ranker import Ranker
from delrec.lm.text import MASK, SLOT, embed
from delrec.lm.user_states import told

PARTS = ("instruction", "soft prompt", "history", "the rest")  # of a prompt


@contextlib.contextmanager
def telling(model: torch.nn.Module) -> Iterator[None]:
    """Within it a model tells its attention's weights."""
    model.eval()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the one that does
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass
class LabelledPrompt:
    """A prompt's tokens, and of which part each is."""

    id_Q: np.ndarray  # what the LM is given
    part_Q: np.ndarray  # a place in PARTS
    read_at: int  # the token whose state is read
    old: np.ndarray  # the whole history


def labelled_prompt(r: Ranker, old: np.ndarray, cand_C: np.ndarray | None = None) -> LabelledPrompt:
    """The prompt of one history (all of it), as the LM is given it."""
    tail, at = r.prompts.history(old[-r.history :], cand_C)
    prefix = r.prompts.prefix
    ids = np.concatenate([prefix, tail])
    part = np.full(len(ids), PARTS.index("the rest"))
    # the prefix's last token begins the tail
    part[: len(prefix) + 1] = PARTS.index("instruction")
    part[np.flatnonzero(ids == SLOT)] = PARTS.index("soft prompt")
    part[len(prefix) + at] = PARTS.index("history")
    mask = int(np.flatnonzero(ids == MASK)[0])
    if r.lm.kind == "decoder":  # what is read is the state before the mask
        return LabelledPrompt(ids[:-1], part[:-1], mask - 1, old)
    ids = np.concatenate([np.where(ids == MASK, r.lm.mask_id, ids), r.lm.end]).astype(np.int64)
    end = np.full(len(r.lm.end), PARTS.index("the rest"))
    return LabelledPrompt(ids, np.concatenate([part, end]), mask, old)


def attention_from(r: Ranker, prompt: LabelledPrompt) -> np.ndarray:
    """The attention (Q,) that the place where the LM is read pays to each token: the mean over
    heads, then over layers."""
    lm = r.lm
    body = lm.model.get_encoder() if lm.kind == "encoder-decoder" else lm.body
    more = {"use_cache": False} if lm.kind == "decoder" else {}
    with told(lm, [prompt.id_Q], [prompt.old]) as ids:
        embedded = embed(lm, ids[0][None], r.P)
    out = body(inputs_embeds=embedded, output_attentions=True, **more)
    layers = [a[0, :, prompt.read_at].float().mean(0) for a in out.attentions]
    return torch.stack(layers).mean(0).cpu().numpy()


@torch.no_grad()
def shares_of_history(r: Ranker, old: np.ndarray) -> dict[int, float]:
    """{item: share of all attention} that the place where the LM is read pays to each item of a
    history (all of it); those that the prompt does not show are left out.
    """
    prompt = labelled_prompt(r, old)
    with telling(r.lm.model):
        w_Q = attention_from(r, prompt)
    w_H = (w_Q / w_Q.sum())[np.flatnonzero(prompt.part_Q == PARTS.index("history"))]
    pieces, shares, end = r.prompts.pieces, {}, len(w_H)
    shown_H = old[-r.history :].tolist()
    for item in reversed(shown_H):  # the oldest are dropped where a prompt is too long
        begin = end - int(pieces.tokens.lengths[item + pieces.first_shown])
        if begin < 0:
            break
        shares[item] = shares.get(item, 0.0) + float(w_H[begin:end].sum())
        end = begin
    return shares
