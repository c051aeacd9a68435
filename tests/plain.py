"""What plain transformers says the candidates of a prompt score, and what the project says.

The reference is the untouched model as transformers loads it: a full pass for each title, all
logits, no batch, no padding, no kept prefix. Without a soft prompt it reads token ids; with one,
the vectors that its own embedding makes of them, the soft prompt's at the slots.
"""
from types import SimpleNamespace

import numpy as np
import torch
from delrec.data.prepared import candidates, histories
from families import AUTO

from delrec.lm import core as L

VERBALIZERS = ("likelihood", "mean", "first", "letter")
TOLERANCE = 1e-4
SLOTS = 3
SETTINGS = {"show": False, "history": 10, "max_title": 32, "max_tokens": 1024,
            "backbone": "SASRec", "order": "shuffled", "backbone_run": ""}
CPU = torch.device("cpu")
ALONE = SimpleNamespace(rank=0, world=1, device=CPU, main=True)


# ---------------------------------------------------------------- plain transformers

def load_plain(folder, kind):
    """The model of a folder, nothing replaced; every weight must come from the folder."""
    model, info = AUTO[kind].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"], sorted(info["missing_keys"])
    return model.eval()


@torch.no_grad()
def soft_prompt(model):
    """Vectors (SLOTS, D) that look like those of tokens and are none."""
    generator = torch.Generator().manual_seed(3)
    vectors_kD = model.get_input_embeddings()(torch.arange(40, 40 + SLOTS)[None])[0]
    return vectors_kD + .3 * torch.randn(vectors_kD.shape, generator=generator)


def all_logits(model, tokens, soft_kD=None, **decoder):
    """The logits (Q, V) of one pass over a prompt."""
    ids = torch.tensor([tokens])
    if soft_kD is None:
        return model(input_ids=ids, **decoder).logits[0]
    vectors_BQD = model.get_input_embeddings()(ids.clamp(min=0)).clone()
    vectors_BQD[ids == L.SLOT] = soft_kD
    return model(inputs_embeds=vectors_BQD, **decoder).logits[0]


def logits_at_mask(model, lm, prompt, soft_kD, forced=()):
    """The logits (1 + n, V) at the mask and after each of the n forced tokens of a title."""
    at = prompt.index(L.MASK)
    before, after, forced = prompt[:at], prompt[at + 1:], list(forced)
    if lm.kind == "decoder":
        return all_logits(model, before + forced, soft_kD)[at - 1:]
    if lm.kind == "encoder":                             # a title is read from as many masks as it has tokens
        masks = [lm.tok.mask_token_id] * max(len(forced), 1)
        return all_logits(model, before + masks + after + lm.end, soft_kD)[at:]
    sentinel = lm.tok.convert_tokens_to_ids("<extra_id_0>")
    said = [model.config.decoder_start_token_id, sentinel, *forced]
    text = before + [sentinel] + after + lm.end
    return all_logits(model, text, soft_kD, decoder_input_ids=torch.tensor([said]))[1:]


def likelihood(model, lm, titles, prompt, tokens, soft_kD):
    """The mean log probability of a title's tokens among the tokens that occur in titles."""
    tokens = tokens + list(lm.sep) * (lm.kind == "decoder")
    place = {token: n for n, token in enumerate(titles.vocab.tolist())}
    logits = logits_at_mask(model, lm, prompt, soft_kD, tokens)[:, torch.as_tensor(titles.vocab)]
    logp = logits.log_softmax(1)
    return sum(logp[n, place[token]].item() for n, token in enumerate(tokens)) / len(tokens)


@torch.no_grad()
def plain_scores(model, ranker, tail, items):
    """{verbalizer: scores (C,)} of the candidates after one prompt."""
    lm, soft_kD = ranker.lm, ranker.P
    prompt = np.concatenate([ranker.prompts.prefix, tail]).tolist()
    titles = [L.title(ranker.titles, i).tolist() for i in items]
    at_mask = logits_at_mask(model, lm, prompt, soft_kD)[0]
    letters = [L.encode(lm, letter) for letter in L.LETTERS[:len(items)]]
    return {"likelihood": [likelihood(model, lm, ranker.titles, prompt, t, soft_kD) for t in titles],
            "mean": [at_mask[t].mean().item() for t in titles],
            "first": [at_mask[t[0]].item() for t in titles],
            "letter": [at_mask[t].item() for t in letters]}


# ---------------------------------------------------------------- the project

def force_padded(lm):
    """Let an LM read its prompts as on a GPU: padded to one length."""
    lm.packs = False


def load_here(folder, padded=False):
    """The project's LM of a folder, in fp32 on the CPU."""
    lm = L.load_lm(folder, CPU, torch.float32)
    if padded:
        force_padded(lm)
    return lm


def make_ranker(lm, data, verbalizer, soft_kD):
    return L.ranker(lm, data, SETTINGS | {"verbalizer": verbalizer}, soft_kD)


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

    def __init__(self, folder, kind, data):
        self.folder = folder
        self.kind = kind
        self.data = data
        self.model = load_plain(folder, kind)
        self.known = {}

    def scores(self, lm, soft):
        """(soft prompt, tails, candidates (n, C), {verbalizer: scores (n, C)})."""
        if soft not in self.known:
            soft_kD = soft_prompt(self.model) if soft else None
            tails, cand_nC = make_prompts(lm, self.data, soft_kD)
            ranker = make_ranker(lm, self.data, "mean", soft_kD)
            rows = [plain_scores(self.model, ranker, t, c) for t, c in zip(tails, cand_nC)]
            wanted = {v: np.array([row[v] for row in rows]) for v in VERBALIZERS}
            assert all(scores.std() > .02 for scores in wanted.values())     # they say something
            self.known[soft] = soft_kD, tails, cand_nC, wanted
        return self.known[soft]

    def differences(self, lm, soft):
        """{verbalizer: largest difference from the plain scores, over their spread if above 1}."""
        assert lm.kind == self.kind
        soft_kD, tails, cand_nC, wanted = self.scores(lm, soft)
        found = {}
        for verbalizer in VERBALIZERS:
            ranker = make_ranker(lm, self.data, verbalizer, soft_kD)
            got = L.score_tails(ranker, tails, cand_nC, ALONE)
            spread = max(1, wanted[verbalizer].std())
            found[verbalizer] = float(np.abs(got - wanted[verbalizer]).max() / spread)
        return found


def faults(reference, lm):
    """{verbalizer and prompt: difference} of all scores that are not the plain model's."""
    found = {}
    for soft in (False, True):
        for verbalizer, difference in reference.differences(lm, soft).items():
            if not difference < TOLERANCE:               # true of nan too
                found[f"{verbalizer}, {'soft' if soft else 'plain'} prompt"] = difference
    return found
