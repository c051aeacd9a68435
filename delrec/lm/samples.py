"""The training and validation samples of stage 2: histories with their candidates, as prompts."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from delrec.data.prepared import (
    Data,
    candidates,
    halves_of_validation,
    histories,
    subset,
    users,
    with_lists,
)
from delrec.lm import hints
from delrec.lm.crossfit import may_learn_from
from delrec.lm.drop_items import without_items
from delrec.lm.items import in_tables, table_of
from delrec.lm.ragged import Ragged, below, of_padded
from delrec.lm.ranker import Ranker, reads_all, score_and_rank, score_samples
from delrec.lm.windows import WindowPrompt, Windows
from delrec.metrics import compare, metrics
from delrec.processes import Ranks


@dataclass
class Example:
    """A training sample as a prompt."""

    tail: np.ndarray  # tokens behind the prefix
    at: np.ndarray  # places in it of the history's title tokens
    cand: np.ndarray  # candidates (C,)
    truth: int  # the target's place among them
    n_truth: int  # tokens of its title, and in decoders of the separator behind it
    target: np.ndarray  # the item itself, (1,)
    place: np.ndarray  # where in data.items it stands, (1,)
    table: np.ndarray  # the table of item vectors it is looked up in (items.Folds), (1,)
    number: int  # the sample's, among the training samples


class Histories:
    """n training samples, one history each, in the order they are seen: of those that have a list
    where prompts hold what the backbone says. cfg: order, seed, C, loss, input, history, batch,
    curriculum, without_fold, from_run, hint, orders, pool, draw."""

    def __init__(self, cfg: SimpleNamespace, data: Data, backbone_run: Path | str, n: int):
        known = may_learn_from(cfg, data, backbone_run)
        if hints.reads_lists(cfg):
            known = np.intersect1d(known, with_lists(backbone_run, data))
        rng = np.random.default_rng([cfg.seed, 1])
        if cfg.draw == "importance":
            order = by_importance(data, known, rng)
        else:
            order = rng.permutation(known)
        self.cfg, self.which = cfg, np.resize(order, n)  # places in data.train
        self.places = data.train[self.which]  # in data.items
        self.n_reads = np.ones(n, int)

    def prompts(self, r: Ranker, number_n: np.ndarray) -> list[Example]:
        """The samples of some numbers as prompts of a ranker."""
        return examples(r, self.cfg, self.which[number_n], self.alone(number_n), number_n)

    def alone(self, number_n: np.ndarray) -> np.ndarray:
        """Which of the samples show titles alone, bool (n,): with --input hybrid those with a
        probability that falls over the training (LLaRA's curriculum, arXiv 2312.02445,
        section 3.3): the LM knows titles, and meets vectors step by step. It is drawn by the number
        of the step, for all of its samples (LLaRA), or by the sample; a run that goes on from one
        shows vectors always."""
        cfg = self.cfg
        if cfg.curriculum in (None, "off"):
            return np.zeros(len(number_n), bool)
        if cfg.curriculum == "batch":
            step = number_n // cfg.batch
            return draws(cfg.seed, 4, step) >= step / (len(self.which) // cfg.batch)
        return draws(cfg.seed, 2, self.which[number_n]) >= number_n / len(self.which)


def by_importance(data: Data, known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Some training samples (places in data.train) in the order of drawing, none twice: a user with
    the weight ln n_u, n_u the user's interactions in training, then one of the user's samples
    (RecRanker, arXiv 2312.16018; its make_train_prompt.py also draws by cluster, left out here)."""
    user_n = users(data, data.train)
    last_U = np.zeros(data.n_users, int)
    last_U[user_n] = data.train  # sorted, so the last one stays
    n_U = last_U - data.ptr[:-1] + 1
    user_k = user_n[known]
    weight_k = np.log(n_U[user_k]) / np.bincount(user_k)[user_k]
    with np.errstate(divide="ignore"):  # weight 0 comes last
        # by the largest of log w + Gumbel noise: drawing by weight, one after another
        return known[np.argsort(-(np.log(weight_k) + rng.gumbel(size=len(known))), kind="stable")]


def listed_by(
    r: Ranker, cfg: SimpleNamespace, which: np.ndarray, target_n: np.ndarray, number_n: np.ndarray
) -> np.ndarray:
    """The candidates (n, C) of training samples as their prompts list them. number: the samples',
    for what is shuffled whenever one is read."""
    if hints.pooled(cfg):
        pool_nC = hints.pool_of(r.backbone_run, r.data, "train", cfg.C, which)
        listed_nC = hints.with_truth(pool_nC, target_n)
    else:
        cand_nC = candidates(r.data, "train", cfg.C, which)
        place_nC = hints.listing(r, "train", cfg.C, which)
        listed_nC = np.take_along_axis(cand_nC, place_nC, 1)
    shifts = hints.pooled(cfg) or cfg.orders > 1
    return hints.anew(listed_nC, cfg.seed, number_n) if shifts else listed_nC


def examples(
    r: Ranker, cfg: SimpleNamespace, which: np.ndarray, alone_n: np.ndarray, number_n: np.ndarray
) -> list[Example]:
    """Training samples (places in data.train) as prompts. alone: which of them show titles without
    the vectors of --input hybrid; number: their numbers among the training samples.
    """
    places = r.data.train[which]
    target = r.data.items[places].astype(np.int64)
    listed_nC = listed_by(r, cfg, which, target, number_n)
    hint_nh = hints.hints_of(r, "train", cfg.C, which, hints.pooled(cfg))
    asked_nC = target[:, None] if cfg.loss == "titles" else listed_nC
    n_truth = r.titles.ptr[target + 1] - r.titles.ptr[target]
    n_truth = n_truth + len(r.lm.sep) * (r.lm.kind == "decoder")
    table_n = table_of(r.lm, users(r.data, places))
    old = of_padded(histories(r.data, places, cfg.history))
    if cfg.input == "hybrid":
        tails, ats = prompts_of_both(r, old, (listed_nC, hint_nh), alone_n)
    else:
        tails, ats = r.prompts.histories(old, listed_nC, hint_nh)
    batch = []
    for i, (tail, told) in enumerate(zip(in_tables(r.lm, tails, table_n), ats)):
        truth = int((asked_nC[i] == target[i]).argmax())
        n, number, own = int(n_truth[i]), int(number_n[i]), slice(i, i + 1)
        about = target[own], places[own], table_n[own]
        batch.append(Example(tail, told, asked_nC[i], truth, n, *about, number))
    return batch


def prompts_of_both(
    r: Ranker, old: Ragged, beside: tuple[np.ndarray | None, ...], alone_n: np.ndarray
) -> tuple[Ragged, Ragged]:
    """(tokens, at) of stage 2 with --input hybrid, some of titles alone. beside: the candidates and
    the hint, rows as old's."""
    parts = []
    for prompts, own_n in ((r.plain, alone_n), (r.prompts, ~alone_n)):
        own = np.flatnonzero(own_n)
        of_own = [None if rows is None else rows[own] for rows in beside]
        parts.append(prompts.histories(old.take(own), *of_own))
    back = np.argsort(np.argsort(~alone_n, kind="stable"))
    return tuple(below(*both).take(back) for both in zip(*parts))


def draws(seed: int, kind: int, number_n: np.ndarray) -> np.ndarray:
    """A number from 0 to 1 that belongs to each of these numbers (n,), whoever draws it."""
    return np.array([np.random.default_rng([seed, kind, int(x)]).random() for x in number_n])


@dataclass
class Batch:
    """The samples of one optimiser step."""

    examples: list[Example] | list[WindowPrompt]
    reads: int  # how many states are read in all
    tokens: int  # how many title tokens --loss titles and both ask for
    rests: bool  # does the map into the LM rest, because none of them shows a vector?

    def count(self, part: str) -> int:
        """The number that the sum of this part of the loss is divided by."""
        return max(self.tokens, 1) if part == "titles" else self.reads


def batch_of(
    samples: Histories | Windows, r: Ranker, cfg: SimpleNamespace, number_n: np.ndarray
) -> Batch:
    """The samples of some numbers as a batch of prompts of a ranker."""
    batch = samples.prompts(r, number_n)
    if cfg.drop_items:
        batch = without_items(batch, cfg.drop_items, cfg.seed)
    if not r.lm.packs:  # rows of one pass are padded to the longest: like lengths together
        batch.sort(key=lambda e: -len(e.tail))
    tokens = 0
    if cfg.loss in ("titles", "both"):
        own = cfg.verbalizer == "likelihood"
        tokens = sum(len(e.at) + e.n_truth * own for e in batch)
    rests = cfg.curriculum == "batch" and samples.alone(number_n).all()
    return Batch(batch, int(samples.n_reads[number_n].sum()), tokens, bool(rests))


class Validation:
    """The validation samples that choose the best step and the calibration, from the first half.
    cfg: C, val_samples, seed, choose."""

    def __init__(self, cfg: SimpleNamespace, data: Data):
        self.C, self.n_all, self.choose = cfg.C, len(data.val), cfg.choose
        first, _ = halves_of_validation(data)
        self.which = first[subset(len(first), cfg.val_samples, cfg.seed)]
        self.cand_nC = candidates(data, "val", cfg.C, self.which)
        self.target_n = data.items[data.val[self.which]]

    def ask(self, r: Ranker, ranks: Ranks) -> tuple[np.ndarray, dict[str, float]]:
        """(scores (n, C) of the candidates, what is logged of them): also the NDCG@10 over all
        items, where the LM ranks them all at once."""
        name = "validate"
        if not reads_all(r):
            score_nC = score_samples(r, "val", self.which, self.C, ranks, name=name)
            hit, gain = self.quality(score_nC)
            return score_nC, {"val_hr@1": hit, "val_ndcg@10": gain}
        no_penalty_1I = np.zeros((1, r.data.n_items + 1), np.float32)
        score_nC, full_1n2, _ = score_and_rank(
            r, "val", self.which, self.C, ranks, no_penalty_1I, name
        )
        hit, gain = self.quality(score_nC)
        over_all = float(metrics(*full_1n2[0].T)["ndcg@10"].mean())
        return score_nC, {"val_hr@1": hit, "val_ndcg@10": gain, "val_full_ndcg@10": over_all}

    def criterion(self, found: dict[str, float]) -> float:
        """What a step is chosen by, of what `ask` logs: NDCG@10 over all items where the LM ranks
        them all, else, and with --choose candidates, among the candidates."""
        near = found["val_ndcg@10"]
        return near if self.choose == "candidates" else found.get("val_full_ndcg@10", near)

    def quality(self, score_nC: np.ndarray) -> tuple[float, float]:
        """Mean HR@1 and NDCG@10 of scores."""
        m = metrics(*compare(score_nC, self.cand_nC == self.target_n[:, None]))
        return float(m["hr@1"].mean()), float(m["ndcg@10"].mean())

    def said(self, found: dict[str, float]) -> str:
        """What `ask` found with its protocol, as it is printed."""
        over_all = found.get("val_full_ndcg@10")
        return (
            f"validation HR@1 {found['val_hr@1']:.3f} NDCG@10 {found['val_ndcg@10']:.3f} "
            f"(n={len(self.which)}, {self.C} candidates, chance {1 / self.C:.3f})"
            + (f", NDCG@10 over all items {over_all:.4f}" if over_all is not None else "")
        )

    def among_all(self, score_nC: np.ndarray) -> np.ndarray:
        """The scores in rows of all validation samples; NaN where nobody asked."""
        full_nC = np.full((self.n_all, self.C), np.nan, np.float32)
        full_nC[self.which] = score_nC
        return full_nC
