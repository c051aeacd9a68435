"""What plain transformers says the candidates of a prompt score, and what the project says.

The reference is the untouched model as transformers loads it: a full pass for each title, all
logits, no batch, no padding, no kept prefix. Without a soft prompt it reads token ids; with one,
the vectors that it takes in place of the ids, the soft prompt's at the slots.
"""

from types import SimpleNamespace

import click
import numpy as np
import pytest
import torch
from families import AUTO

import common
from delrec.data.prepared import candidates, histories
from delrec.lm import passes
from delrec.lm.model import load_lm
from delrec.lm.prompts import LETTERS
from delrec.lm.ranker import make_ranker as make_ranker_of
from delrec.lm.ranker import score_tails
from delrec.lm.text import MASK, SLOT, encode

VERBALIZERS = tuple(common.verbalizers.choices)
TOLERANCE = 1e-4
SLOTS = 3
SETTINGS = {
    "show": False,
    "history": 10,
    "max_title": 32,
    "max_tokens": 1024,
    "backbone": "SASRec",
    "order": "shuffled",
    "backbone_run": "",
}
CPU = torch.device("cpu")
ALONE = SimpleNamespace(rank=0, world=1, device=CPU, main=True)


# ---------------------------------------------------------------- plain transformers


class Plain:
    """The model of a family's folder, nothing replaced; every weight must come from the folder."""

    def __init__(self, family, folder):
        auto = family.auto or AUTO[family.kind]
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"], sorted(info["missing_keys"])
        self.model = model.eval()
        self.kind = family.kind
        self.scale = self.find_scale()

    @torch.no_grad()
    def find_scale(self):
        """The factor by which the model multiplies the vectors of token ids but not those it is
        given; None if no vectors do what ids do, so that it can have no soft prompt."""
        tokens = list(range(40, 80)) * 4
        said = [0, 40, 41] if self.kind == "encoder-decoder" else None
        wanted = self.logits(tokens, said)
        assert torch.equal(wanted, self.logits(tokens, said)), "two passes over a prompt differ"
        for scale in (
            1,
            self.width() ** 0.5,
            getattr(self.model.config, "embedding_multiplier", 1),
        ):
            try:
                got = self.logits_of_vectors(self.vectors(tokens, scale), said)
            except (AttributeError, TypeError, ValueError, RuntimeError):  # it reads ids only
                return None
            if (got - wanted).abs().max() < TOLERANCE * max(1, wanted.std()):
                return scale
        return None

    def width(self):
        return self.model.get_input_embeddings().weight.shape[1]

    def vectors(self, tokens, scale):
        """The vectors (Q, D) of some token ids."""
        return scale * self.model.get_input_embeddings()(torch.tensor([tokens]))[0]

    def logits(self, tokens, said=None):
        """The logits (Q, V) of one pass over token ids; said: what the decoder has said."""
        decoder = {} if said is None else {"decoder_input_ids": torch.tensor([said])}
        return self.model(input_ids=torch.tensor([tokens]), **decoder).logits[0]

    def logits_of_vectors(self, vectors_QD, said=None):
        """The same of one pass over vectors."""
        decoder = {} if said is None else {"decoder_input_ids": torch.tensor([said])}
        return self.model(inputs_embeds=vectors_QD[None], **decoder).logits[0]

    def read(self, tokens, soft_kD, said=None):
        """The logits of a prompt whose SLOTs, if any, are the soft prompt's vectors."""
        if soft_kD is None:
            return self.logits(tokens, said)
        vectors_QD = self.vectors([max(token, 0) for token in tokens], self.scale)
        vectors_QD[torch.tensor(tokens) == SLOT] = soft_kD.to(vectors_QD.dtype)
        return self.logits_of_vectors(vectors_QD, said)

    @torch.no_grad()
    def soft_prompt(self):
        """Vectors (SLOTS, D) that look like those of tokens and are none."""
        vectors_kD = self.vectors(list(range(40, 40 + SLOTS)), self.scale)
        generator = torch.Generator().manual_seed(3)
        return vectors_kD + 0.3 * torch.randn(vectors_kD.shape, generator=generator)

    def at_mask(self, lm, prompt, soft_kD, forced=()):
        """The logits (1 + n, V) at the mask and after each of the n forced tokens of a title."""
        place = prompt.index(MASK)
        before, after, forced = prompt[:place], prompt[place + 1 :], list(forced)
        if self.kind == "decoder":
            return self.read(before + forced, soft_kD)[place - 1 :]
        if self.kind == "encoder":  # a title is read from a mask a token
            masks = [lm.tok.mask_token_id] * max(len(forced), 1)
            return self.read(before + masks + after + lm.end, soft_kD)[place:]
        sentinel = lm.tok.convert_tokens_to_ids("<extra_id_0>")
        said = [self.model.config.decoder_start_token_id, sentinel, *forced]
        return self.read(before + [sentinel] + after + lm.end, soft_kD, said)[1:]

    def likelihood(self, lm, titles, prompt, tokens, soft_kD):
        """The mean log probability of a title's tokens among the tokens that occur in titles."""
        if self.kind == "decoder":
            tokens = tokens + list(lm.sep)
        place = {token: n for n, token in enumerate(titles.vocab.tolist())}
        logits = self.at_mask(lm, prompt, soft_kD, tokens)[:, torch.as_tensor(titles.vocab)]
        logp = logits.log_softmax(1)
        told = [logp[n, place[token]].item() for n, token in enumerate(tokens)]
        return sum(told) / len(told)

    def must_be_causal(self, lm, prompt, title, soft_kD):
        """What the model says of a title must not change with a token that comes later."""
        short = self.at_mask(lm, prompt, soft_kD, title)
        for more in range(1, 6):
            long = self.at_mask(lm, prompt, soft_kD, title + (title * 5)[:more])[:-more]
            apart = (short - long).abs().max()
            assert apart < 0.002 * max(1, short.std()), "what comes later changes what was said"

    @torch.no_grad()
    def scores(self, ranker, tail, items):
        """{verbalizer: scores (C,)} of the candidates after one prompt."""
        lm, soft_kD = ranker.lm, ranker.P
        prompt = np.concatenate([ranker.prompts.prefix, tail]).tolist()
        titles = [ranker.titles.of(i).tolist() for i in items]
        letters = [encode(lm, letter) for letter in LETTERS[: len(items)]]
        logits = self.at_mask(lm, prompt, soft_kD)[0]
        if self.kind == "decoder":
            for t in titles:
                self.must_be_causal(lm, prompt, t, soft_kD)
        forced = [self.likelihood(lm, ranker.titles, prompt, t, soft_kD) for t in titles]
        return {
            "likelihood": forced,
            "mean": [logits[t].mean().item() for t in titles],
            "first": [logits[t[0]].item() for t in titles],
            "letter": [logits[t].item() for t in letters],
        }


# ---------------------------------------------------------------- the project


def load_here(folder, padded=False):
    """The project's LM of a folder, in fp32 on the CPU; padded: read as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if padded:
            patch.setattr(passes, "passes_to_try", lambda lm: ["padded"])
        return load_lm(folder, CPU, torch.float32)


def make_ranker(lm, data, verbalizer, soft_kD):
    return make_ranker_of(lm, data, SETTINGS | {"verbalizer": verbalizer}, soft_kD)


def make_prompts(lm, data, soft_kD):
    """Tails and candidates (n, C): a short history, a long one, and a long one with candidates."""
    samples = np.array([40, 3, 17])
    cand_nC = candidates(data, "val", 15)[samples][:, :3]
    plain = make_ranker(lm, data, "mean", soft_kD).prompts
    lettered = make_ranker(lm, data, "letter", soft_kD).prompts
    old = [h[h > 0] for h in histories(data, data.val[samples], 10)]
    tails = [plain.history(old[0][-1:])[0], plain.history(old[1])[0]]
    tails.append(lettered.history(old[2], cand_nC[2])[0])
    return tails, cand_nC


# ---------------------------------------------------------------- both


class Reference:
    """A family's folder, its plain model and the plain scores, each made once."""

    def __init__(self, family, folder, data):
        self.folder = folder
        self.data = data
        self.plain = Plain(family, folder)
        self.known = {}

    def scores(self, lm, soft):
        """(soft prompt, tails, candidates (n, C), {verbalizer: scores (n, C)})."""
        if soft not in self.known:
            soft_kD = self.plain.soft_prompt() if soft else None
            tails, cand_nC = make_prompts(lm, self.data, soft_kD)
            ranker = make_ranker(lm, self.data, "mean", soft_kD)
            rows = [self.plain.scores(ranker, t, c) for t, c in zip(tails, cand_nC)]
            wanted = {v: np.array([row[v] for row in rows]) for v in VERBALIZERS}
            assert all(scores.std() > 0.02 for scores in wanted.values())  # they say something
            self.known[soft] = soft_kD, tails, cand_nC, wanted
        return self.known[soft]

    def own_error(self, lm, soft):
        """{verbalizer: how far off the plain model's own scores are against fp64}."""
        soft_kD, tails, cand_nC, wanted = self.scores(lm, soft)
        ranker = make_ranker(lm, self.data, "mean", soft_kD)
        self.plain.model.double()
        try:
            rows = [self.plain.scores(ranker, t, c) for t, c in zip(tails, cand_nC)]
        finally:
            self.plain.model.float()
        exact = {v: np.array([row[v] for row in rows]) for v in VERBALIZERS}
        return {
            v: float(np.abs(exact[v] - wanted[v]).max() / max(1, wanted[v].std()))
            for v in VERBALIZERS
        }

    def differences(self, lm, soft):
        """{verbalizer: largest difference from the plain scores, over their spread if above 1}."""
        soft_kD, tails, cand_nC, wanted = self.scores(lm, soft)
        found = {}
        for verbalizer in VERBALIZERS:
            ranker = make_ranker(lm, self.data, verbalizer, soft_kD)
            got = score_tails(ranker, tails, cand_nC, ALONE)
            spread = max(1, wanted[verbalizer].std())
            found[verbalizer] = float(np.abs(got - wanted[verbalizer]).max() / spread)
        return found


def faults(reference, lm):
    """{verbalizer and prompt: difference} of all scores that are not the plain model's: over 1e-4
    of their spread, and over twice what the plain model is off itself against fp64."""
    assert lm.kind == reference.plain.kind
    assert reference.plain.scale is not None, "no vectors do here what ids do: to be refused"
    found = {}
    for soft in (False, True):
        for verbalizer, difference in reference.differences(lm, soft).items():
            if difference < TOLERANCE:
                continue
            own = max(reference.own_error(lm, soft).values())
            if not difference < 2 * own:  # true of nan too
                found[f"{verbalizer}, {'soft' if soft else 'plain'} prompt"] = difference
    return found


def refusal_or_faults(reference, padded):
    """The sentence with which a family is refused, or the faults of what it scores."""
    try:
        lm = load_here(reference.folder, padded)
    except click.ClickException as refusal:
        return refusal.message
    return faults(reference, lm)
