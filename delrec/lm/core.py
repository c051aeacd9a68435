"""Prompts as token arrays, the verbalizers, scores of whole splits, soft prompts on disk.

Every prompt is prefix + tail: the prefix (instruction + soft prompt) is the same for all samples,
so a decoder-only LM computes its keys and values once (reading.py). How an LM is loaded: model.py.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from delrec.data.prepared import candidates, histories, shuffled, users
from delrec.kernels import verbalizer as kernels
from delrec.lm import check, own_head, vectors
from delrec.lm.layers import adapt_modules, checkpoint_layers, decoder_layers, prune, tap
from delrec.lm.model import (
    LM,
    adapted,
    config_of,
    has_fast_bf16,
    kind_of,
    load_lm,
    located,
    must_be_of,
    text_config,
)
from delrec.lm.reading import begin, read, read_examples
from delrec.lm.text import (
    ITEM,
    MASK,
    SLOT,
    digest,
    embed,
    encode,
    fingerprint,
    must_have_vectors,
    random_soft_prompt,
    token_scale,
    tokens_width,
    width,
)
from delrec.metrics import compare, metrics
from delrec.processes import gather_rows, max_over_ranks, shares
from delrec.runtime import load_run, read_npy, read_tensors, stop
from delrec.training.log import Log
from delrec.training.memory import extra_bytes, free_bytes

MOST_UNKNOWN = 0.2  # share of unknown tokens in titles that is still gone on with
CPU_TOKENS = 5000  # of a pass on a CPU: about what its caches hold
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---------------------------------------------------------------- titles and prompts


def tokenise_titles(lm, data, max_title=32, allow_unknown=True):
    """All titles, tokenised once: CSR ptr int64 [I+2], tok int64 [M] (item i owns
    tok[ptr[i]:ptr[i+1]], at most max_title tokens), and the tokens that occur in titles: vocab
    (tensor), index int64 [V] (token -> place in vocab), head (their rows), bias.
    """
    ids = [encode(lm, t)[:max_title] for t in data.titles]
    ids = [t or list(lm.sep) for t in ids]
    ids[0] = []
    ptr = np.concatenate([[0], np.cumsum([len(t) for t in ids])]).astype(np.int64)
    tok = np.concatenate([np.asarray(t, np.int64) for t in ids])
    vocab = np.unique(np.concatenate([tok, lm.sep]))
    must_have_vectors(lm, vocab)
    tell_unknown(lm, data.titles, ids, allow_unknown)
    index = np.zeros(lm.head_VD.shape[0], np.int64)
    index[vocab] = np.arange(len(vocab))
    rows = torch.as_tensor(vocab, device=lm.device)
    return SimpleNamespace(
        ptr=ptr,
        tok=tok,
        vocab=vocab,
        index=index,
        head=lm.head_VD.detach()[rows].contiguous(),
        bias=None if lm.bias_V is None else lm.bias_V.detach()[rows],
    )


def tell_unknown(lm, titles, ids, allowed):
    """Says which share of the titles' tokens the tokenizer does not know, and how many titles it
    cannot tell apart; refuses over a fifth unless allowed.
    """
    tokens, texts = [t for row in ids for t in row], {}
    unknown = tokens.count(lm.tok.unk_token_id) / max(len(tokens), 1)
    for text, row in zip(titles[1:], ids[1:]):
        texts.setdefault(tuple(row), set()).add(text)
    alike = sum(len(same) for same in texts.values() if len(same) > 1)
    if unknown or alike:
        line = (
            f"the tokenizer of {lm.name}: {unknown:.1%} of the titles' tokens are unknown to "
            f"it, and it cannot tell {alike} of {len(titles) - 1} titles apart"
        )
        if unknown > MOST_UNKNOWN and not allowed:
            stop(f"{line}; take an LM of these titles' language, or go on with --allow-unknown")
        check.say_once(line)


def title(titles, i):
    return titles.tok[titles.ptr[i] : titles.ptr[i + 1]]


def pad_titles(titles, items_BC, end=()):
    """Token ids (B, C, T) and lengths (B, C) of items, each followed by the tokens `end`."""
    n_BC = titles.ptr[items_BC + 1] - titles.ptr[items_BC]
    T = int(n_BC.max())
    at = np.minimum(titles.ptr[items_BC][..., None] + np.arange(T), len(titles.tok) - 1)
    tok = np.where(np.arange(T) < n_BC[..., None], titles.tok[at], 0)
    tok = np.concatenate([tok, np.zeros((*n_BC.shape, len(end)), np.int64)], 2)
    for j, e in enumerate(end):
        np.put_along_axis(tok, (n_BC + j)[..., None], e, 2)
    return tok, n_BC + len(end)


# w MCP (DELRec, Table III): what a backbone does, in words where the soft prompt would stand; ours,
# as the paper does not print its own
PATTERN = {
    "SASRec": "{b} weighs all {n}s of the history by how much they say about the last one: {n}s "
    "liked by users with a similar recent history come next.",
    "GRU4Rec": "{b} reads the {n}s one after another and remembers what matters: the latest {n}s "
    "count most, older ones fade.",
    "Caser": "{b} looks for patterns among the last few {n}s, pairs and triples that follow one "
    "another, and adds the user's general taste.",
}


def prompter(
    lm,
    data,
    titles,
    backbone="SASRec",
    k=0,
    show=False,
    letters=False,
    max_tokens=None,
    shown="titles",
    words=False,
):
    """Returns prefix (int64 array) and three functions that make tails: history(...),
    temporal_analysis(...), pattern(...).

    k = 0 leaves out the soft prompt and the words about it; words: the backbone's pattern is told
    in words instead. show lists the candidates before the mask, with letters if asked. shown: a
    history item is its title, its vector (ids: E4SRec), or its title and its vector (hybrid: LLaRA,
    arXiv 2312.02445). Each tail comes as (tokens, at): at are the places of the tokens of history
    titles. Too long: the oldest history goes first.
    """
    noun, verb = data.meta["words"]["noun"], data.meta["words"]["verb"]
    sep, texts = np.asarray(lm.sep), {}
    # room for the title that a forced pass appends, or for its masks
    longest = int(np.diff(titles.ptr).max()) + len(sep)
    budget = min(max_tokens or lm.max_tokens, lm.max_tokens)

    def text(s):
        if s not in texts:
            texts[s] = np.asarray(encode(lm, s) + list(lm.sep), np.int64)
            must_have_vectors(lm, texts[s])
        return texts[s]

    def line(i):
        return np.concatenate([title(titles, i), sep])

    prefix = [np.asarray(lm.start, np.int64)]
    if k:
        prefix += [
            np.asarray(encode(lm, f"How {backbone} recommends {noun}s:"), np.int64),
            np.full(k, SLOT),
            sep,
        ]
    elif words:
        prefix += [
            text(
                f"How {backbone} recommends {noun}s: "
                + PATTERN.get(backbone, PATTERN["SASRec"]).format(b=backbone, n=noun)
            )
        ]
    prefix = np.concatenate(prefix + [text(f"{noun.capitalize()}s the user {verb}, oldest first:")])
    # the last token of the prefix begins every tail, so that the first title's first token has a
    # state that predicts it
    prefix, begins = prefix[:-1], prefix[-1:]

    def item(i):
        vector = np.array([ITEM - i], np.int64)
        return (
            line(i)
            if shown == "titles"
            else vector
            if shown == "ids"
            else np.concatenate([title(titles, i), vector, sep])
        )

    def listed(cand):
        if cand is None or not (show or letters):
            return []
        mark = (
            [np.asarray(encode(lm, f"{x}. "), np.int64) for x in LETTERS[: len(cand)]]
            if letters
            else [np.zeros(0, np.int64)] * len(cand)
        )
        return (
            [text(f"Candidate {noun}s:")]
            + [np.concatenate([m, line(c)]) for m, c in zip(mark, cand)]
            + [text(f"The next {noun}:")]
        )

    def tail(old, rest):
        """old: history items that may be dropped from the front; rest: pieces that must stay."""
        old = list(old)
        room = budget - len(prefix) - len(lm.end) - 2 - longest - sum(map(len, rest))
        lines = [item(i) for i in old]
        while lines and sum(map(len, lines)) > room:
            lines.pop(0)
        if room < 0:
            stop(
                f"a prompt needs {budget - room} tokens without any history, the limit is "
                f"{budget}; use fewer candidates or slots, or shorter titles"
            )
        start, at = len(begins), []
        for x in lines:
            at.append(np.arange(start, start + len(x)))
            start += len(x)
        return np.concatenate([begins, *lines, *rest, [MASK]]).astype(np.int64), np.concatenate(
            at
        ) if at else np.zeros(0, np.int64)

    def history(items, cand=None):
        """Stage 2: what comes after these items? (DELRec, section IV-C)"""
        return tail(items, listed(cand))

    def temporal_analysis(items, a, cand=None):
        """Stage 1, TA (DELRec, section IV-B): items i_1..i_n; the example solves i_{a-1} from i_a,
        the question asks i_{n-1} given i_n.
        """
        example = [
            text(f"The next {noun} was:"),
            item(items[a - 1]),
            text(f"So the most recent {noun} was:"),
            item(items[a - 2]),
            text(f"Later {noun}s:"),
        ] + [item(i) for i in items[a - 1 : -2]]
        return tail(
            items[: a - 2],
            example
            + [text(f"The next {noun} was:"), item(items[-1])]
            + listed(cand)[:-1]
            + [text(f"So the most recent {noun} was:")],
        )

    def pattern(items, ranked, cand=None):
        """Stage 1, RPS (DELRec, section IV-B): the backbone ranked r_1..r_h after these items; told
        are r_2..r_h, asked is r_1. Of vectors the whole list is asked, so none of it is told.
        """
        if shown == "ids":
            return history(items)
        return tail(
            items,
            [text(f"{backbone}'s choices after its first:")]
            + [line(r) for r in ranked[1:]]
            + listed(cand)[:-1]
            + [text(f"{backbone}'s first choice:")],
        )

    return SimpleNamespace(
        prefix=prefix, history=history, temporal_analysis=temporal_analysis, pattern=pattern
    )


# ---------------------------------------------------------------- verbalizers


def letter_ids(lm, C):
    """One token per letter as it stands in front of a candidate; refused where they are not single
    and distinct.
    """
    if C > len(LETTERS):
        stop(
            f"--verbalizer letter has {len(LETTERS)} letters but there are {C} candidates; use at "
            f"most {len(LETTERS)}"
        )
    ids = [encode(lm, x) for x in LETTERS[:C]]
    if any(len(i) != 1 for i in ids) or len({i[0] for i in ids}) < C:
        stop(
            f"{lm.name}: its tokenizer does not keep the letters A..{LETTERS[C - 1]} as one token "
            "each; use another --verbalizer"
        )
    return np.array([i[0] for i in ids])


def verbalise(lm, x_BD, cand_BC, titles, verbalizer):
    """Candidates' scores (B, C) from one state a prompt: the mean of the logits of a title's
    tokens, its first token's, its letter's, or the product of the state with the item's vector.
    """
    if verbalizer == "items":
        return (
            vectors.out(lm, x_BD)[:, None] * lm.items.E[torch.as_tensor(cand_BC, device=lm.device)]
        ).sum(-1)
    if verbalizer == "letter":
        tok_BCT = np.broadcast_to(
            letter_ids(lm, cand_BC.shape[1])[None, :, None], (*cand_BC.shape, 1)
        )
        n_BC = np.ones(cand_BC.shape, int)
    else:
        tok_BCT, n_BC = pad_titles(titles, cand_BC)
        n_BC = np.minimum(n_BC, 1) if verbalizer == "first" else n_BC
    tok_BCT, n_BC = (
        torch.as_tensor(np.ascontiguousarray(a, np.int32)).to(lm.device) for a in (tok_BCT, n_BC)
    )
    if lm.own_head:
        return own_head.candidate_scores(lm, x_BD, tok_BCT, n_BC)
    return kernels.candidate_scores(scaled(lm, x_BD), lm.head_VD, tok_BCT, n_BC, lm.bias_V)


def scaled(lm, x_ND):
    """States times what the LM multiplies its logits by after the head (Granite, Cohere)."""
    return x_ND if lm.scale == 1 else x_ND * lm.scale


def log_likelihood(lm, x_ND, titles, words, ptr, normalise=False):
    """log P of titles, each the sum of its tokens' (or their mean), among the tokens that occur in
    titles: see kernels.title_likelihood.
    """
    if not lm.own_head:
        return kernels.title_likelihood(
            scaled(lm, x_ND), titles.head, words, ptr, titles.bias, normalise=normalise
        )
    return own_head.title_likelihood(
        lm, x_ND, torch.as_tensor(titles.vocab, device=lm.device), words, ptr, normalise
    )


def score(lm, start, tails, cand_BC, titles, verbalizer, at=None):
    """score_BC fp32: what the LM says at the mask of prompt b for candidate c. With `at` (see read)
    also the log probability of each of those tail tokens, (M,).
    """
    if verbalizer == "likelihood":
        tok_BCT, n_BC = pad_titles(titles, cand_BC, lm.sep if lm.kind == "decoder" else ())
        x_ND = read(lm, start, tails, tok_BCT, n_BC, at)
        real = np.arange(tok_BCT.shape[2]) < n_BC[..., None]
        words = torch.as_tensor(titles.index[tok_BCT[real]], device=lm.device)
        ptr = torch.as_tensor(np.concatenate([[0], np.cumsum(n_BC.reshape(-1))]), device=lm.device)
        x_ND, past = x_ND if at is not None else (x_ND, None)
        # per token (ours): on ml-100k the sum over tokens gives the plain LM HR@1 .21 and a
        # cross-entropy of 7.8, the mean .25 and 2.4
        score_BC = log_likelihood(lm, x_ND, titles, words, ptr, normalise=True).view(cand_BC.shape)
    else:
        x_BD = read(lm, start, tails, at=at)
        x_BD, past = x_BD if at is not None else (x_BD, None)
        score_BC = verbalise(lm, x_BD, cand_BC, titles, verbalizer)
    if at is None:
        return score_BC
    words = np.concatenate([titles.index[t[a]] for t, a in zip(tails, at)])
    words = torch.as_tensor(words, device=lm.device)
    each = torch.arange(len(words) + 1, device=lm.device)
    return score_BC, log_likelihood(lm, past, titles, words, each)


# ---------------------------------------------------------------- memory and time of a training run


def largest_micro(step, tails, most, device, ranks):
    """How many prompts of a forward and backward pass fit into memory: step(m) runs one on the m
    longest prompts. Two passes are measured, the rest is a line through them, with a fifth of what
    is free left over; on a CPU no more than fill its caches, where more is not faster.
    """
    if device.type == "cpu":
        most = min(most, max(1, CPU_TOKENS // max(map(len, tails))))
    step(1)  # the first pass also allocates what stays
    one, two = (
        extra_bytes(lambda: step(1), device),
        extra_bytes(lambda: step(2), device) if most > 1 else 0,
    )
    if one is None:
        stop(
            "--micro auto: this system does not tell how much memory a pass takes; give --micro a "
            "number"
        )
    fits = 1 + int(max(0.8 * free_bytes(device) - one, 0) / max(two - one, 1)) if most > 1 else 1
    micro = max(1, min(fits, most))
    if ranks.world > 1:  # the least of all ranks
        micro = int(-max_over_ranks(-micro, ranks))
    if ranks.main:
        print(
            f"--micro auto: a prompt takes {one / 2**20:.0f} MB, each further one "
            f"{max(two - one, 0) / 2**20:.0f} MB; {fits} would fit, {micro} at a time",
            flush=True,
        )
    return micro


# ---------------------------------------------------------------- scoring whole splits


def ranker(lm, data, settings, P_kD=None):
    """An LM with everything that fixes how it ranks: titles, prompts, P. settings: verbalizer,
    show, order, history, max_title, max_tokens, backbone (its name in the prompt), backbone_run
    (its folder, for order); the soft prompt's length is P's.
    """
    titles = tokenise_titles(lm, data, settings["max_title"], settings.get("allow_unknown", True))
    shown = settings.get("input", "titles")
    make = lambda shown: prompter(
        lm,
        data,
        titles,
        settings["backbone"],
        0 if P_kD is None else len(P_kD),
        settings["show"],
        settings["verbalizer"] == "letter",
        settings["max_tokens"],
        shown,
        settings.get("words", False),
    )
    return SimpleNamespace(
        lm=lm,
        data=data,
        titles=titles,
        prompts=make(shown),
        plain=make("titles") if shown == "hybrid" else None,
        P=P_kD,
        verbalizer=settings["verbalizer"],
        show=settings["show"] or settings["verbalizer"] == "letter",
        history=settings["history"],
        order=settings["order"],
        backbone_run=settings["backbone_run"],
        cache=True,
        shuffled=False,
    )


def windows(r, samples):
    """The histories that the prompts of some samples (indices into data.items) show, (n, L)."""
    old_nL = histories(r.data, samples, r.history)
    return shuffled(old_nL, samples) if r.shuffled else old_nL


def batches_of(cost, budget):
    """Indices in batches of like cost, the dearest first, each batch at most `budget` when all of
    it costs as much as its dearest.
    """
    batches = []
    for i in np.argsort(-np.asarray(cost), kind="stable"):
        if not batches or (len(batches[-1]) + 1) * cost[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(int(i))
    return [np.array(b) for b in batches]


def tokens_of(lm):
    """Tokens of a pass without gradients."""
    return 65536 if lm.device.type == "cuda" else CPU_TOKENS


@torch.no_grad()
def score_tails(r, tails, cand_nC, ranks, name="score", out=None, tokens=None):
    """Scores float32 (n, C) of candidates for prompts, on every rank; the prefix computed once.

    Batches of like length, at most `tokens` tokens each (tokens_of: on a CPU its caches shall hold
    them), are formed over all prompts and then shared among the ranks: a prompt meets the same
    neighbours (so bf16 rounds it the same way) however many processes there are.
    """
    r.lm.model.eval()
    start = begin(r.lm, r.prompts.prefix, r.P, r.cache)
    likelihood = r.verbalizer == "likelihood"
    cost = np.array([len(t) for t in tails], int) + (
        0 if r.lm.kind == "decoder" and r.cache else len(r.prompts.prefix)
    )
    # every title is read in a prompt of its own
    alone = r.lm.kind == "encoder" or r.lm.paths[:1] == ["rows"]
    if alone and r.lm.kind == "decoder" and r.cache:
        cost = cost + len(r.prompts.prefix)
    if likelihood:
        cost = cost * (cand_nC.shape[1] if alone else 1) + np.diff(r.titles.ptr)[cand_nC].sum(1)
    batches = batches_of(cost, tokens or tokens_of(r.lm))
    batches = shares(batches, ranks, r.lm.sharded)
    mine = np.concatenate([np.zeros(0, int), *(j for j, own in batches if own)])
    log, rows, done = (
        Log(out, len(mine), name, ranks, "prompt"),
        np.zeros((len(mine), cand_nC.shape[1]), np.float32),
        0,
    )
    for j, own in batches:
        scores = (
            score(r.lm, start, [tails[x] for x in j], cand_nC[j], r.titles, r.verbalizer)
            .float()
            .cpu()
            .numpy()
        )
        if own:
            rows[done : done + len(j)] = scores
            log.step(done := done + len(j))
    log.close()
    return gather_rows(rows, mine, len(tails), ranks)


def reads_all(r):
    """True where one state says what every title of the catalogue scores."""
    return r.verbalizer in ("mean", "first", "items") and not r.show


@torch.no_grad()
def score_catalogue(r, start, tails):
    """Scores float32 (B, I+1) of every item of the catalogue after each prompt, -inf for the
    padding item, by one pass of the LM.
    """
    r.lm.model.eval()
    x_BD = read(r.lm, start, tails)
    ptr, tok = r.titles.ptr, r.titles.tok
    if r.verbalizer == "items":
        s_BI = vectors.out(r.lm, x_BD) @ r.lm.items.E.T
    else:
        if r.verbalizer == "first":
            tok, ptr = tok[ptr[1:-1]], np.concatenate([[0], np.arange(len(ptr) - 1)])
        ptr, tok = (torch.as_tensor(a).to(r.lm.device) for a in (ptr, tok))
        s_BI = (
            own_head.catalogue_scores(r.lm, x_BD, ptr, tok)
            if r.lm.own_head
            else kernels.catalogue_scores(scaled(r.lm, x_BD), r.lm.head_VD, ptr, tok, r.lm.bias_V)
        )
    s_BI = s_BI.float().cpu().numpy()
    s_BI[:, 0] = -np.inf
    return s_BI


@torch.no_grad()
def over_catalogue(r, tails, columns, f, ranks, name="rank", out=None):
    """f(j, s_BI) -> rows (len(j), columns) of the prompts j, from their scores of the whole
    catalogue; all rows fp32 (n, columns) on every rank. The scores themselves are never kept: n x I
    of them may not fit.
    """
    start, rows, mine, done = (
        begin(r.lm, r.prompts.prefix, r.P, r.cache),
        np.zeros((len(tails), columns), np.float32),
        [np.zeros(0, int)],
        0,
    )
    work = shares(batches_of([len(t) for t in tails], tokens_of(r.lm)), ranks, r.lm.sharded)
    log = Log(out, sum(len(j) for j, own in work if own), name, ranks, "prompt") if name else None
    for j, own in work:
        s_BI = score_catalogue(r, start, [tails[x] for x in j])
        if own:
            rows[j] = f(j, s_BI)
            mine.append(j)
            if log:
                log.step(done := done + len(j))
    if log:
        log.close()
    mine = np.concatenate(mine)
    return gather_rows(rows[mine], mine, len(tails), ranks)


def score_and_rank(r, split, which, C, ranks, penalty_I, name="rank"):
    """For an LM that reads the catalogue from one state: the scores (n, C) that score_samples
    gives, and full (n, 2), how many items score above and equal to the target once penalty_I is
    subtracted, the user's earlier items masked.
    """
    samples, cand_nC = (
        np.asarray(getattr(r.data, split))[which],
        candidates(r.data, split, C, which),
    )
    begins, target = r.data.ptr[users(r.data, samples)], r.data.items[samples].astype(np.int64)
    tails = [r.prompts.history(h[h > 0])[0] for h in windows(r, samples)]

    def f(j, s_BI):
        near = np.take_along_axis(s_BI, cand_nC[j], 1)
        s_BI = s_BI - penalty_I
        own = np.take_along_axis(s_BI, target[j][:, None], 1)
        for s_I, n in zip(s_BI, j):
            s_I[r.data.items[begins[n] : samples[n]]] = -np.inf
        np.put_along_axis(s_BI, target[j][:, None], own, 1)
        return np.concatenate(
            [near, (s_BI > own).sum(1, keepdims=True), (s_BI == own).sum(1, keepdims=True) - 1], 1
        )

    rows = over_catalogue(r, tails, C + 2, f, ranks, name)
    return rows[:, :C], rows[:, C:]


def listing(r, split, C, which):
    """The order in which the prompt lists the candidates of some samples of a split, as places in
    the stored rows: int64 (n, C).
    """
    if r.order == "shuffled" or not r.show:
        return np.broadcast_to(np.arange(C), (len(which), C))
    path = Path(r.backbone_run) / (f"scores_{split}_{C}" + "_shuffled" * r.shuffled + ".npy")
    if not path.exists():
        stop(
            f"--order backbone needs {path}; train the backbone with train_backbone.py, or use "
            "--order shuffled"
        )
    if (Path(r.backbone_run) / "config.json").exists():
        # another preparation's scores are of other samples
        load_run(r.backbone_run, r.data)
    return np.argsort(
        -read_npy(path, (len(getattr(r.data, split)), C))[which], axis=1, kind="stable"
    )


def score_samples(r, split, which, C, ranks, out=None, name="score"):
    """Scores (len(which), C) of the stored candidates of some samples of a split."""
    place_nC = listing(r, split, C, which)
    cand_nC = np.take_along_axis(candidates(r.data, split, C, which), place_nC, 1)
    old_nL = windows(r, np.asarray(getattr(r.data, split))[which])
    tails = [r.prompts.history(h[h > 0], c)[0] for h, c in zip(old_nL, cand_nC)]
    rows = np.zeros((len(which), C), np.float32)
    np.put_along_axis(rows, place_nC, score_tails(r, tails, cand_nC, ranks, name, out), 1)
    return rows


def neutral_scores(r, ranks, out=None, chunk=60):
    """Each title's score under the same prompt with no history and no candidates: float32 [I+1],
    which calibration subtracts.
    """
    if r.verbalizer == "letter":
        # a letter says nothing about an item
        return np.zeros(r.data.n_items + 1, np.float32)
    items = np.arange(1, r.data.n_items + 1)
    # np.resize repeats the first items in the last block
    blocks = np.resize(items, (-(-len(items) // chunk), chunk))
    scores = np.zeros(r.data.n_items + 1, np.float32)
    scores[blocks] = score_tails(
        r, [r.prompts.history([])[0]] * len(blocks), blocks, ranks, "neutral prompt", out
    )
    return scores


def calibrate(
    score_nC, cand_nC, neutral_I, target_n, weights=(0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1)
):
    """The weight w of the neutral score that is best on validation (HR@1, then NDCG@10): score - w
    * neutral.
    """

    def quality(w):
        m = metrics(*compare(score_nC - w * neutral_I[cand_nC], cand_nC == target_n[:, None]))
        return m["hr@1"].mean(), m["ndcg@10"].mean()

    return float(max(weights, key=quality))


# ---------------------------------------------------------------- soft prompts on disk


def save_soft_prompt(folder, P_kD):
    from safetensors.torch import save_file

    save_file(
        {"prompt_embeddings": P_kD.detach().float().cpu().contiguous()},
        folder / "soft_prompt.safetensors",
    )


def load_soft_prompt(folder, lm):
    tensors = read_tensors(Path(folder) / "soft_prompt.safetensors")
    if "prompt_embeddings" not in tensors or tensors["prompt_embeddings"].dim() != 2:
        stop(f"{folder}/soft_prompt.safetensors holds no matrix prompt_embeddings; distil it again")
    P_kD = tensors["prompt_embeddings"].to(lm.device)
    if P_kD.shape[1] != tokens_width(lm):
        stop(
            f"{folder} holds a soft prompt of width {P_kD.shape[1]}, {lm.name} is "
            f"{tokens_width(lm)} wide; distil it again with this LM"
        )
    return P_kD


def open_run(run, data, device, shard=False):
    """A finished run of distill.py, finetune.py or evaluate.py --llm as a ranker, with its adapter
    and soft prompt, and the score it subtracts per item: (ranker, penalty float32 [I+1]).
    """
    lm = load_lm(run.llm, device, shard=shard, checked=getattr(run, "check_llm", True))
    must_be_of(lm, run)
    shown = run.settings.get("input", "titles")
    needed = (
        (
            ["adapter/adapter_model.safetensors"]
            if run.stage == "finetune" or getattr(run, "lr_lm", 0)
            else []
        )
        + (["items.safetensors"] if shown != "titles" else [])
        + (["soft_prompt.safetensors"] if run.soft_prompt not in ("none", "words") else [])
        + (["neutral.npy"] if run.calibration else [])
    )
    for part in needed:
        if not (run.folder / part).exists():
            stop(
                f"{run.folder} lacks {part}, which its config.json says it was trained with; train "
                "it again"
            )
    P_kD = load_soft_prompt(run.folder, lm) if run.soft_prompt not in ("none", "words") else None
    if run.stage == "finetune" or getattr(run, "lr_lm", 0):
        lm.adapter = adapted(lm, run)  # wraps the layers of lm.model in place
    if shown != "titles":
        vectors.open_items(lm, run.folder, data.n_items)
    penalty_I = np.zeros(data.n_items + 1, np.float32)
    if run.calibration:
        penalty_I = run.calibration * read_npy(run.folder / "neutral.npy", (data.n_items + 1,))
    return ranker(lm, data, run.settings, P_kD), penalty_I
