"""Tiny LMs opened and used to rank, prompts taken apart again, and every score by the unmodified
Hugging Face model.
"""

import numpy as np
import pytest
import torch
from tiny_lms import KINDS

from delrec.data.prepared import candidates, histories
from delrec.lm import passes
from delrec.lm.model import load_lm
from delrec.lm.prompts import LETTERS
from delrec.lm.ragged import ragged
from delrec.lm.ranker import make_ranker
from delrec.lm.text import MASK, SLOT, encode, random_soft_prompt

CPU = torch.device("cpu")
ALL = pytest.mark.parametrize("kind", KINDS)
SETTINGS = {
    "verbalizer": "mean",
    "show": False,
    "history": 10,
    "max_title": 32,
    "max_tokens": 1024,
    "backbone": "SASRec",
    "order": "shuffled",
    "backbone_run": "",
}


def rank_with(load, kind, data, k=0, **settings):
    m = load(kind)
    P = random_soft_prompt(m, k, 3) + 0.1 if k else None
    return make_ranker(m, data, SETTINGS | settings, P)


def windows(data, n=6):
    """Samples with long and short histories, as (history, candidates)."""
    which = np.unique(np.linspace(0, len(data.val) - 1, n).astype(int))
    old = histories(data, data.val[which], 10)
    return [h[h > 0] for h in old], candidates(data, "val", 15)[which]


def temporal_analysis(r, items, a, cand=None):
    """The tail of one TA prompt."""
    cand_1C = None if cand is None else np.asarray(cand)[None]
    return r.prompts.temporal_analyses(ragged([items]), a, cand_1C)[0][0]


def pattern(r, items, ranked, cand=None):
    """The tail of one RPS prompt."""
    cand_1C = None if cand is None else np.asarray(cand)[None]
    return r.prompts.patterns(ragged([items]), np.asarray(ranked)[None], cand_1C)[0][0]


def lines(lm, data, titles, tokens, noun="movie"):
    """The items told in a prompt, in order: maximal runs between separators that are a title; 'X. '
    in front of one is cut off.
    """
    item_of = {tuple(titles.of(i)): i for i in range(1, data.n_items + 1)}
    tokens, sep = [int(t) for t in tokens], list(lm.sep)
    found, start = [], 0
    for i in range(len(tokens) - len(sep) + 1):
        if tokens[i : i + len(sep)] == sep:
            line = tuple(tokens[start:i])
            found += [item_of[line[j:]] for j in range(min(len(line), 4)) if line[j:] in item_of][
                :1
            ]
            start = i + len(sep)
    return found


def vectors(model, tokens, P):
    """Embeddings (1, Q, D) of a whole prompt, a row of P at each slot."""
    tokens = torch.tensor(tokens)
    e_QD = model.get_input_embeddings().weight[tokens.clamp(min=0)]
    return (
        e_QD[None]
        if P is None
        else torch.where((tokens == SLOT)[:, None], torch.zeros_like(e_QD), e_QD)[None].index_put(
            (torch.tensor(0), (tokens == SLOT).nonzero()[:, 0]), P
        )
    )


def naive(model, r, tail, items, P=None):
    """The scores (C,) of candidates by full passes with all logits: no cache, no batch, no packing;
    a pass per title if it is forced.
    """
    m, titles = r.lm, [r.titles.of(i).tolist() for i in items]
    tokens = np.concatenate([r.prompts.prefix, tail]).tolist()
    mask = tokens.index(MASK)

    def logits(forced=()):
        forced = list(forced)
        if m.kind == "decoder":
            return model(inputs_embeds=vectors(model, tokens[:mask] + forced, P)).logits[
                0, mask - 1 :
            ]
        if m.kind == "encoder-decoder":
            first = [
                model.config.decoder_start_token_id,
                m.tok.convert_tokens_to_ids("<extra_id_0>"),
            ]
            prompt = tokens[:mask] + [first[1]] + tokens[mask + 1 :] + m.end
            return model(
                inputs_embeds=vectors(model, prompt, P),
                decoder_input_ids=torch.tensor([first + forced]),
            ).logits[0, 1:]
        prompt = (
            tokens[:mask] + [m.tok.mask_token_id] * max(len(forced), 1) + tokens[mask + 1 :] + m.end
        )
        return model(inputs_embeds=vectors(model, prompt, P)).logits[0, mask:]

    if r.verbalizer == "likelihood":
        scores = []
        for forced in (t + list(m.sep) * (m.kind == "decoder") for t in titles):
            logp = logits(forced)[:, torch.as_tensor(r.titles.vocab)].log_softmax(1)
            scores.append(
                sum(logp[j, r.titles.vocab.tolist().index(t)] for j, t in enumerate(forced))
                / len(forced)
            )
        return torch.stack(scores)
    chosen = {
        "mean": titles,
        "first": [t[:1] for t in titles],
        "letter": [encode(m, x) for x in LETTERS[: len(titles)]],
    }[r.verbalizer]
    at_mask = logits()[0]
    return torch.stack([at_mask[t].mean() for t in chosen])


def opened(folder, dtype=torch.float32, **more):
    return load_lm(str(folder), CPU, dtype, **more)


def wrong_by(size):
    """A pass like pass_packed whose states are off by `size` times their own spread."""
    right = passes.pass_packed

    def run(*args):
        x_ND = right(*args)
        noise = torch.randn(x_ND.shape, generator=torch.Generator().manual_seed(0))
        return x_ND + (size * x_ND.float().std() * noise).to(x_ND.dtype)

    return run
