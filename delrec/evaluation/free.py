"""What an LM writes of its own accord (evaluate.py --free): the answer that LLaRA's own paper
measures (arXiv 2312.02445).

The LM goes on greedily behind its own prompt. An answer is valid if the titles of exactly one
candidate stand in it, as in LLaRA's released code; so "Alien" beside "Aliens" makes one invalid.
Nothing is ranked: this says whether a run would answer at all, not how well it recommends.
"""

import json
from pathlib import Path

import numpy as np

from delrec.backbone.ranking import history_scorer
from delrec.data.prepared import Data, candidates, subset
from delrec.lm import hints, written
from delrec.lm.ragged import of_padded
from delrec.lm.ranker import Ranker, candidates_shown, open_run, shown_histories
from delrec.processes import Ranks
from delrec.runtime import Run, stop, write_json

SHOWN = 10  # answers that are printed
MORE = 8  # tokens that an answer may have beyond the longest title


def free(run: Run, data: Data, n: int, C: int, ranks: Ranks, out: Path) -> None:
    """Prints and writes free.json: what a run writes for n samples of validation (0: all), how many
    answers are valid, how many right. out: the folder."""
    ranker, _ = open_run(run, data, ranks.device, scores_of=history_scorer, ranks=ranks)
    must_write(ranker, run)
    val = subset(len(data.val), n, 0)
    samples = np.asarray(data.val)[val]
    cand_nC = candidates(data, "val", C, val)
    said, titles = answers(ranker, "val", val, C, ranks), titles_as_read(ranker)
    named = [named_in(text, cand_C, titles) for text, cand_C in zip(said, cand_nC)]
    target_n = data.items[samples].astype(int).tolist()
    result = {"run": str(run.folder), "n": len(val), "candidates": C, **shares(named, target_n)}
    if not ranks.main:
        return
    out.mkdir(parents=True, exist_ok=True)
    told = [dict(said=text, candidates_named=some) for text, some in zip(said, named)]
    write_json(out / "free.json", result | {"answers": told})
    print("\n".join(lines_of(result, said, named, data.titles)))
    print(json.dumps({"stage": "free", "out": str(out), **result}))


def must_write(r: Ranker, run: Run) -> None:
    """Ends the process if the LM writes no titles."""
    if r.lm.kind != "decoder":
        stop(
            f"{r.lm.name} is an {r.lm.kind} LM, but --free asks an LM to write on; name a run of a "
            "decoder-only LM"
        )
    if r.verbalizer in ("items", "letter"):
        answered = "item vectors" if r.verbalizer == "items" else "letters"
        stop(f"{run.folder} answers by {answered}; --free is about a run that scores titles")


def answers(r: Ranker, split: str, which: np.ndarray, C: int, ranks: Ranks) -> list[str]:
    """What the LM writes behind the prompts of some samples of a split, its first line each."""
    _, cand_nC = candidates_shown(r, split, which, C)
    samples = np.asarray(getattr(r.data, split))[which]
    old, hint_nh = of_padded(shown_histories(r, samples)), hints.hints_of(r, split, C, which)
    tails, _ = r.prompts.histories(old, cand_nC, hint_nh)
    before = np.asarray(r.prompts.prefix)
    r.lm.model.eval()
    # the mask, which stands last, is where the answer begins
    prompts = [np.concatenate([before, tails[i][:-1]]) for i in range(len(tails))]
    most = int(np.diff(r.titles.ptr).max()) + MORE
    return written.continued(r.lm, prompts, ranks, r.P, most)


def titles_as_read(r: Ranker) -> list[str]:
    """The titles as the LM learnt them: cut at --max-title tokens, in the spaces of a line."""
    texts = [
        r.lm.tok.decode(r.titles.of(i), skip_special_tokens=True) for i in range(r.data.n_items + 1)
    ]
    return [" ".join(text.split()) for text in texts]


def named_in(text: str, cand_C: np.ndarray, titles: list[str]) -> list[int]:
    """The candidates whose titles stand in a text, whatever the case."""
    text = text.casefold()
    return [int(i) for i in cand_C if titles[i].casefold() in text]


def shares(named: list[list[int]], target_n: list[int]) -> dict[str, float]:
    """valid: the share of answers with exactly one candidate; hr@1: of those with the true one and
    no other; hr@1_of_valid: the same among the valid ones, which flatters who seldom answers."""
    valid = [len(some) == 1 for some in named]
    right = [some == [target] for some, target in zip(named, target_n)]
    of_valid = sum(right) / sum(valid) if any(valid) else 0.0
    return {
        "valid": float(np.mean(valid)),
        "hr@1": float(np.mean(right)),
        "hr@1_of_valid": of_valid,
    }


def lines_of(result: dict, said: list[str], named: list[list[int]], titles: list[str]) -> list[str]:
    """What is printed: the shares, and some answers."""
    lines = [
        f"\n{result['run']}: what it writes for {result['n']} validation samples, greedy, "
        f"{result['candidates']} candidates (chance {1 / result['candidates']:.3f})",
        f"valid {result['valid']:.3f} (one candidate named), HR@1 {result['hr@1']:.3f} of all, "
        f"{result['hr@1_of_valid']:.3f} of the valid ones",
    ]
    for text, some in list(zip(said, named))[:SHOWN]:
        lines.append(f"  {text!r}: {', '.join(titles[i] for i in some) or 'no candidate'}")
    return lines
