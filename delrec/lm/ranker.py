"""An LM with all that fixes how it ranks, and its scores of whole splits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from delrec import places
from delrec.data.prepared import Data, candidates, histories, shuffled, users
from delrec.lm import hints, items, offsets, residual, user_states
from delrec.lm.batches import batches_of, costs_of, tokens_of
from delrec.lm.listed import backbone_digest
from delrec.lm.model import LM, adapted, load_lm, must_be_of
from delrec.lm.prompts import DEFAULTS, Prompts, lists_candidates, must_have_words, settings_of_run
from delrec.lm.ragged import Ragged, of_padded, ragged
from delrec.lm.reading import Start, read, read_prefix
from delrec.lm.residual import Olds, ScoresOf
from delrec.lm.soft_prompt import load_soft_prompt
from delrec.lm.summaries import author_of
from delrec.lm.titles import Titles, tokenise_titles
from delrec.lm.transfer import fetched_later, one_behind
from delrec.lm.verbalizers import SCORES_ALL, score, verbalise, verbalise_all
from delrec.lm.wording import wording_of
from delrec.processes import Ranks, gather_rows, shares
from delrec.runtime import Run, read_npy, read_tensors, stop
from delrec.training.log import Log

# of a run's folder
ADAPTER, ITEMS = "adapter/adapter_model.safetensors", "items.safetensors"
PROMPT, BACKBONE = "soft_prompt.safetensors", f"{places.BACKBONE}/model.safetensors"
LISTED = 10  # items of a list that is stored beside the ranks over the catalogue


@dataclass
class Ranker:
    """An LM with everything that fixes how it ranks."""

    lm: LM
    data: Data
    titles: Titles
    prompts: Prompts
    plain: Prompts | None  # with --input hybrid: prompts of titles alone
    P: torch.Tensor | None  # the soft prompt (k, D)
    verbalizer: str
    show: bool  # are candidates listed in the prompt?
    history: int  # items of a history in a prompt, L
    order: str  # of listed candidates: shuffled or backbone
    backbone_run: str  # the folder of the backbone, for the order
    cache: bool = True  # is the prefix computed once?
    shuffled: bool = False  # are histories shown in a random order?
    settings: dict = field(default_factory=dict)  # all of it as a run's config.json stores it
    trained: Titles | None = None  # with added items (new_items.py): the titles without them


def settings_of(cfg: SimpleNamespace, backbone: str, backbone_run: Path | str) -> dict[str, Any]:
    """What of a run's flags fixes how it ranks, as its config.json stores it and make_ranker reads
    it. backbone: its name in the prompt; backbone_run: its folder."""
    settings = {
        **{key: getattr(cfg, key, usual) for key, usual in DEFAULTS.items()},
        "backbone": backbone,
        "backbone_run": str(backbone_run),
        "backbone_digest": backbone_digest(backbone_run),
        "allow_unknown": cfg.allow_unknown,
        "summaries": getattr(cfg, "summaries", None),
        "words": getattr(cfg, "soft_prompt", None) == "words",
    }
    return settings | {"wording": wording_of(settings)}


def make_ranker(
    lm: LM, data: Data, settings: dict, P_kD: torch.Tensor | None = None, cache: bool = True
) -> Ranker:
    """A ranker by a run's settings: DEFAULTS where they say nothing, backbone (its name in the
    prompt), backbone_run (its folder); the soft prompt is as long as P."""
    settings = DEFAULTS | settings
    titles = tokenise_titles(lm, data, settings["max_title"], settings.get("allow_unknown", True))
    shown = settings["input"]
    k = 0 if P_kD is None else len(P_kD)
    plain = Prompts(lm, data, titles, settings, k) if shown == "hybrid" else None
    return Ranker(
        lm=lm,
        data=data,
        titles=titles,
        prompts=Prompts(lm, data, titles, settings, k, shown),
        plain=plain,
        P=P_kD,
        verbalizer=settings["verbalizer"],
        show=lists_candidates(settings),
        history=settings["history"],
        order=settings["order"],
        backbone_run=settings["backbone_run"],
        cache=cache,
        settings=settings,
    )


def asking(r: Ranker, task: str) -> Ranker:
    """The same ranker with the prompts of a task: history (stage 2), ta or rps (stage 1)."""
    return replace(r, prompts=r.prompts.asking(task))


def open_run(
    run: Run,
    data: Data,
    device: torch.device,
    shard: bool = False,
    scores_of: ScoresOf | None = None,
    ranks: Ranks | None = None,
) -> tuple[Ranker, np.ndarray]:
    """A finished run of distill.py, finetune.py or evaluate.py --llm as a ranker, with its adapter
    and soft prompt, and the score it subtracts per item: (ranker, penalty float32 (I+1,)).
    scores_of: its backbone's, if that is asked. ranks: who ask the same; None: one, silently."""
    must_have_words(run, data)
    lm = load_lm(run.llm, device, shard=shard, checked=getattr(run, "check_llm", True))
    must_be_of(lm, run)
    own = own_files(run)
    P_kD = load_soft_prompt(run.folder, lm) if PROMPT in own else None
    if ADAPTER in own:
        lm.set_adapter(adapted(lm, run))  # wraps the layers of lm.model in place
    if ITEMS in own:
        items.open_items(lm, run.folder, data.n_items)
    if BACKBONE in own:
        offsets.open_backbone(lm, run, data, scores_of)
        user_states.open_states(lm, run, data, scores_of)
    lm.set_author(author_of(run, lm, data, ranks))
    return make_ranker(lm, data, run.settings, P_kD), penalty_of(run, data)


def own_files(run: Run) -> list[str]:
    """The files of its folder with which a run ranks. Stops where one is missing."""
    whole = getattr(run, "adapt", "qv") == "all"  # the LM's own weights were trained
    needed = {
        ADAPTER: run.stage == "finetune" and not whole or getattr(run, "lr_lm", 0),
        ITEMS: settings_of_run(run)["input"] != "titles",
        PROMPT: run.soft_prompt not in ("none", "words"),
        BACKBONE: getattr(run, "residual", None) or getattr(run, "user_states", None),
        offsets.FILE: getattr(run, "residual", None) and settings_of_run(run)["input"] != "ids",
    }
    own = [part for part in needed if needed[part]]
    for part in own:
        if not (run.folder / part).exists():
            stop(
                f"{run.folder} lacks {part}, which its config.json says it was trained with; train "
                "it again"
            )
    return own


def penalty_of(run: Run, data: Data) -> np.ndarray:
    """What a run's calibration subtracts from each item's score, float32 (I+1,); zeros where it
    was not calibrated."""
    penalty_I = np.zeros(data.n_items + 1, np.float32)
    if not getattr(run, "calibration", 0):
        return penalty_I
    shared = run.folder / "neutral.safetensors"  # as evaluate.py --card writes it
    if (run.folder / "neutral.npy").exists():
        neutral_I = read_npy(run.folder / "neutral.npy", penalty_I.shape)
    elif shared.exists():
        neutral_I = read_tensors(shared).get("neutral", torch.zeros(0)).float().numpy()
    else:
        stop(
            f"{run.folder} lacks neutral.npy, which its config.json says it was calibrated "
            "with; train it again"
        )
    if neutral_I.shape != penalty_I.shape:
        stop(f"{shared} does not hold the neutral scores of {data.n_items} items; fetch it again")
    return run.calibration * neutral_I


# ---------------------------------------------------------------- scores of candidates


def shown_histories(r: Ranker, samples: np.ndarray) -> np.ndarray:
    """The histories that the prompts of some samples (indices into data.items) show, (n, L)."""
    old_nL = histories(r.data, samples, r.history)
    return shuffled(old_nL, samples) if r.shuffled else old_nL


@torch.no_grad()
def score_tails(
    r: Ranker,
    tails: Sequence[np.ndarray],
    cand_nC: np.ndarray,
    ranks: Ranks,
    name: str | None = "score",
    tokens: int | None = None,
    olds: Olds = None,
) -> np.ndarray:
    """Scores float32 (n, C) of candidates for prompts, on every rank; the prefix computed once.
    name: of the progress that is shown; None: none is. olds: the whole histories, as
    user_states.told takes them.

    Batches of like length, at most `tokens` tokens each (tokens_of: on a CPU its caches shall hold
    them), are formed over all prompts and then shared among the ranks: a prompt meets the same
    neighbours (so bf16 rounds it the same way) however many processes there are.
    """
    r.lm.model.eval()
    tails = ragged(tails)
    start = read_prefix(r.lm, r.prompts.prefix, r.P, r.cache)
    batches = batches_of(costs_of(r, tails, cand_nC), tokens or tokens_of(r.lm))
    scores, mine = [], [np.zeros(0, int)]  # scores stay on the device until all are on their way
    for j, counts in shared_batches(batches, r, ranks, name):
        with user_states.told(r.lm, tails.take(j), olds and [olds[i] for i in j]) as own:
            score_BC = score(r.lm, start, own, cand_nC[j], r.titles, r.verbalizer)
        if counts:
            scores.append(score_BC.float())
            mine.append(j)
    rows = np.zeros((0, cand_nC.shape[1]), np.float32)
    if scores:
        rows = torch.cat(scores).cpu().numpy()
    return gather_rows(rows, np.concatenate(mine), len(tails), ranks)


def shared_batches(
    batches: list[np.ndarray], r: Ranker, ranks: Ranks, name: str | None
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields this rank's batches of prompts, each with 0 where its result counts for nothing (see
    shares), and shows as `name` how many prompts are on their way; None: shows nothing."""
    work, done = shares(batches, ranks, r.lm.sharded), 0
    total = sum(len(j) for j, counts in work if counts)
    log = Log(None, total, name, ranks, "prompt") if name else None
    for j, counts in work:
        yield j, counts
        if log and counts:
            log.step(done := done + len(j))
    if log:
        log.close()


def score_listed(
    r: Ranker,
    old: Ragged,
    cand_nC: np.ndarray,
    hint_nh: np.ndarray | None,
    ranks: Ranks,
    name: str | None = "score",
    olds: Olds = None,
) -> np.ndarray:
    """Scores (n, C) of candidates after histories, listed as they are given and, with --orders, in
    further orders: the mean. olds: whole, as score_tails takes them and --residual asks."""
    orders = hints.moved(cand_nC.shape[1], r.settings["orders"])
    total_nC = np.zeros(cand_nC.shape, np.float32)
    for place_C in orders:
        tails, _ = r.prompts.histories(old, cand_nC[:, place_C], hint_nh)
        total_nC[:, place_C] += score_tails(r, tails, cand_nC[:, place_C], ranks, name, olds=olds)
    mean_nC = total_nC / np.float32(len(orders))
    return residual.with_backbone_scores_of_candidates(r.lm, mean_nC, olds, cand_nC)


def candidates_shown(
    r: Ranker, split: str, which: np.ndarray, C: int
) -> tuple[np.ndarray, np.ndarray]:
    """The stored candidates of some samples of a split as prompts list them: their places among the
    stored ones, and the items, both (n, C)."""
    place_nC = hints.listing(r, split, C, which)
    return place_nC, np.take_along_axis(candidates(r.data, split, C, which), place_nC, 1)


def score_samples(
    r: Ranker,
    split: str,
    which: np.ndarray,
    C: int,
    ranks: Ranks,
    name: str = "score",
) -> np.ndarray:
    """Scores (len(which), C) of the stored candidates of some samples of a split."""
    place_nC, cand_nC = candidates_shown(r, split, which, C)
    samples = np.asarray(getattr(r.data, split))[which]
    old, hint_nh = of_padded(shown_histories(r, samples)), hints.hints_of(r, split, C, which)
    rows = np.zeros((len(which), C), np.float32)
    olds = residual.histories_of(r.lm, r.data, samples, r.shuffled)
    score_nC = score_listed(r, old, cand_nC, hint_nh, ranks, name, olds)
    np.put_along_axis(rows, place_nC, score_nC, 1)
    return rows


# ---------------------------------------------------------------- scores of the whole catalogue


def reads_all(r: Ranker | SimpleNamespace) -> bool:
    """True where one state says what every title of the catalogue scores. r: a ranker, or what has
    its verbalizer and show."""
    return r.verbalizer in SCORES_ALL and not r.show


@torch.no_grad()
def score_catalogue(
    r: Ranker, start: Start, tails: Sequence[np.ndarray], olds: Olds = None
) -> np.ndarray:
    """Scores float32 (B, I+1) of every item of the catalogue after each prompt, -inf for the
    padding item, by one pass of the LM. olds: the whole histories, which a run of --residual or
    --user-states asks its backbone about."""
    return catalogue_later(r, start, tails, olds)()


@torch.no_grad()
def catalogue_later(
    r: Ranker, start: Start, tails: Sequence[np.ndarray], olds: Olds = None
) -> Callable[[], np.ndarray]:
    """A function that gives what score_catalogue does; a GPU begins now."""
    r.lm.model.eval()
    with user_states.told(r.lm, tails, olds) as tails:
        x_BD = read(r.lm, start, tails)
    s_BI = verbalise_all(r.lm, x_BD, r.trained or r.titles, r.verbalizer).float()
    if r.trained:
        new_A = np.arange(s_BI.shape[1], r.data.n_items + 1)
        new_BA = np.tile(new_A, (len(x_BD), 1))
        s_BA = verbalise(r.lm, x_BD, new_BA, r.titles, r.verbalizer).float()
        s_BI = torch.cat([s_BI, s_BA], 1)
    s_BI = residual.with_backbone_scores(r.lm, s_BI, olds)
    s_BI[:, 0] = -torch.inf
    return fetched_later(s_BI)


@torch.no_grad()
def over_catalogue(
    r: Ranker,
    tails: Sequence[np.ndarray],
    columns: int,
    f: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ranks: Ranks,
    name: str | None = "rank",
    olds: Olds = None,
) -> np.ndarray:
    """All rows fp32 (n, columns), on every rank, of f(j, s_BI): rows (len(j), columns) of the
    prompts j from their scores of the whole catalogue. The scores themselves are never kept: n x I
    of them may not fit. olds: as score_catalogue takes them."""
    tails = ragged(tails)
    start = read_prefix(r.lm, r.prompts.prefix, r.P, r.cache)
    rows, mine = np.zeros((len(tails), columns), np.float32), [np.zeros(0, int)]
    batches = batches_of(tails.lengths, tokens_of(r.lm))

    def begun():
        for j, counts in shared_batches(batches, r, ranks, name):
            scores = catalogue_later(r, start, tails.take(j), olds and [olds[i] for i in j])
            if counts:
                yield j, scores

    for j, scores in one_behind(begun(), r.lm.device):
        rows[j] = f(j, scores())
        mine.append(j)
    mine = np.concatenate(mine)
    return gather_rows(rows[mine], mine, len(tails), ranks)


def score_and_rank(
    r: Ranker,
    split: str,
    which: np.ndarray,
    C: int,
    ranks: Ranks,
    penalty_WI: np.ndarray,
    name: str = "rank",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For an LM that reads the catalogue from one state: score_samples' scores (n, C); full
    (W, n, 2), how many items score above and equal to the target less each of the penalties, the
    user's earlier items masked; the best items by the first penalty (n, LISTED), then 0."""
    samples = np.asarray(getattr(r.data, split))[which]
    cand_nC = candidates(r.data, split, C, which)
    begins = r.data.ptr[users(r.data, samples)]
    target = r.data.items[samples].astype(np.int64)
    tails, _ = r.prompts.histories(of_padded(shown_histories(r, samples)))

    def near_and_ranks(j, s_BI):
        columns, best = [np.take_along_axis(s_BI, cand_nC[j], 1)], None
        for penalty_I in penalty_WI:
            left_BI = s_BI - penalty_I
            own = np.take_along_axis(left_BI, target[j][:, None], 1)
            for s_I, n in zip(left_BI, j):
                s_I[r.data.items[begins[n] : samples[n]]] = -np.inf
            best = best_items(left_BI) if best is None else best
            np.put_along_axis(left_BI, target[j][:, None], own, 1)
            columns.append((left_BI > own).sum(1, keepdims=True))
            columns.append((left_BI == own).sum(1, keepdims=True) - 1)
        return np.concatenate([*columns, best], 1)  # fp32 holds ids up to 2^24

    end = C + 2 * len(penalty_WI)
    olds = residual.histories_of(r.lm, r.data, samples, r.shuffled)
    rows = over_catalogue(r, tails, end + LISTED, near_and_ranks, ranks, name, olds)
    full_Wn2 = rows[:, C:end].reshape(len(rows), -1, 2).swapaxes(0, 1)
    score_nC = residual.with_backbone_scores_of_candidates(
        r.lm, rows[:, :C], olds, cand_nC, among_all=True
    )
    return score_nC, full_Wn2, rows[:, end:]


def best_items(score_BI: np.ndarray) -> np.ndarray:
    """Each row's LISTED best items, ties by the smaller id, then 0: int64 (B, LISTED)."""
    some = min(LISTED, score_BI.shape[1])
    top_BK = np.sort(np.argpartition(-score_BI, some - 1, axis=1)[:, :some], 1)
    own_BK = np.take_along_axis(score_BI, top_BK, 1)
    order_BK = np.argsort(-own_BK, axis=1, kind="stable")
    best_BK = np.zeros((len(score_BI), LISTED), np.int64)
    best_BK[:, :some] = np.take_along_axis(np.where(own_BK > -np.inf, top_BK, 0), order_BK, 1)
    return best_BK
