"""A backbone retrieves, an LM ranks what was retrieved: the two stages of LlamaRec (arXiv
2311.02089; its trainer/llm.py).

The pool of a sample is the backbone's best C items. The n_in samples whose truth is in it are
ranked by the LM, the n_out others stay where the backbone has them; so for every metric m

    overall = (n_in m_ranker + n_out m_backbone) / n.

No ranker brings a truth into the pool: recall@C of the backbone is the ceiling of the hit rates.
"""

from functools import partial
from pathlib import Path

import numpy as np

from delrec.data.prepared import users
from delrec.data.run_files import ranks_in
from delrec.evaluation.copying import copied
from delrec.evaluation.scores import Part, Scorer, alone_at, keep, opened, stored
from delrec.evaluation.stats import RowMetrics, ends_of, interval
from delrec.evaluation.wording import ends_text
from delrec.lm import hints, listed, residual
from delrec.lm.ragged import of_padded
from delrec.lm.ranker import penalty_of, score_listed, shown_histories
from delrec.metrics import compare, metrics
from delrec.runtime import Run, stop, write_npy

COLUMNS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")


def two_stages(runs: dict[str, Run], scorer: Scorer, test: Part, order: str) -> dict[str, dict]:
    """{row: what two_stage says of its run} of the LMs. runs: {row: run}; order: of the pool in a
    prompt, the backbone's (LlamaRec's in its tests) or shuffled."""
    lms = {name: run for name, run in runs.items() if run.stage in ("distill", "finetune")}
    if not lms:
        stop("--two-stage has an LM rank what its backbone retrieves; name a run of finetune.py")
    return {name: two_stage(run, scorer, test, order) for name, run in lms.items()}


def two_stage(run: Run, scorer: Scorer, test: Part, order: str) -> dict:
    """What a run makes of its backbone's lists: see combined; and how often it copies the first of
    them (see copying.copied)."""
    data, folder = scorer.data, Path(run.settings["backbone_run"])
    pool_nC = hints.pool_of(folder, data, "test", run.C, test.which)
    target_n = data.items[test.samples].astype(np.int64)
    inside_n = (pool_nC == target_n[:, None]).any(1)
    if not inside_n.any():
        stop(f"no sample has its truth among {folder}'s {run.C} best, so nothing can be ranked")
    full_n2 = ranks_in(folder / "full_test.npy", data, "test")[test.which]
    if full_n2.min() < 0:
        stop(
            f"{folder}/full_test.npy leaves samples out (-1), --two-stage needs all; write it again"
        )
    pool_mC, which = pool_nC[inside_n], test.which[inside_n]
    score_mC = pool_scores(scorer, run, which, pool_mC, order)
    ranker = metrics(*compare(score_mC, pool_mC == target_n[inside_n, None]))
    own_m = np.take_along_axis(pool_mC, score_mC.argmax(1)[:, None], 1)[:, 0]
    return {
        "backbone": folder.name,
        "pool": run.C,
        "order": order,
        **combined(metrics(*full_n2.T), ranker, inside_n, users(data, test.samples)),
        "copies": copied(own_m, pool_mC[:, 0], target_n[inside_n]),
    }


def combined(
    backbone: RowMetrics, ranker: RowMetrics, inside_n: np.ndarray, user_n: np.ndarray
) -> dict:
    """The metrics of the backbone over all n samples; of the ranker and of the backbone's own order
    (copy first) over the n_in inside the pool; overall; and overall minus the backbone with its 95
    % interval over users. backbone: {metric: (n,)}; ranker: {metric: (n_in,)}."""
    n, n_in = len(inside_n), int(inside_n.sum())
    rows = {
        "backbone": {m: float(backbone[m].mean()) for m in COLUMNS},
        "copy first, inside": {m: float(backbone[m][inside_n].mean()) for m in COLUMNS},
        "ranker, inside": {m: float(ranker[m].mean()) for m in COLUMNS},
    }
    outside = {m: float(backbone[m][~inside_n].sum()) for m in COLUMNS}
    inside = rows["ranker, inside"]
    rows["overall"] = {m: (n_in * inside[m] + outside[m]) / n for m in COLUMNS}
    gain_nm = np.zeros((n, len(COLUMNS)))
    gain_nm[inside_n] = np.stack([ranker[m] - backbone[m][inside_n] for m in COLUMNS], 1)
    ends = interval(gain_nm, user_n).T
    gains = {m: [float(gain_nm[:, j].mean()), *ends_of(ends[j])] for j, m in enumerate(COLUMNS)}
    return {"n": n, "n_in": n_in, "ceiling": n_in / n, "rows": rows, "gain": gains}


# ---------------------------------------------------------------- scores of pools


def pool_scores(
    scorer: Scorer, run: Run, which: np.ndarray, pool_mC: np.ndarray, order: str
) -> np.ndarray:
    """The run's scores (m, C) of the pools of some test samples, its calibration subtracted; what
    is not in its folder yet is computed and stored there."""
    name = f"scores_pool_{order}_{run.C}"
    path, now = run.folder / f"{name}.npy", listed.backbone_digest(run.settings["backbone_run"])
    with alone_at(run, scorer.ranks):
        empty = np.full((len(scorer.data.test), run.C), np.nan, np.float32)
        same = listed.noted(run).get(name) == now  # another backbone's pools are others
        score_nC = stored(path, empty) if same else empty
        missing_m = ~np.isfinite(score_nC[which]).all(1)
        if missing_m.any():
            found = scored(scorer, run, which[missing_m], pool_mC[missing_m], order)
            score_nC[which[missing_m]] = found
            if scorer.ranks.main:
                keep(run, partial(store, run, path, score_nC, now))
    return score_nC[which] - penalty_of(run, scorer.data)[pool_mC]


def store(run: Run, path: Path, score_nC: np.ndarray, digest: str | None) -> None:
    """Stores the scores of pools, and the backbone whose they are."""
    write_npy(path, score_nC)
    listed.note(run, path.stem, digest)


def scored(
    scorer: Scorer, run: Run, which: np.ndarray, pool_nC: np.ndarray, order: str
) -> np.ndarray:
    """The LM's scores (n, C) of the pools of some test samples."""
    r, _ = opened(scorer, run)
    hint_nh = hints.hints_of(r, "test", run.C, which, pool=True)
    place_nC = np.tile(np.arange(run.C), (len(which), 1))
    if order == "shuffled":
        place_nC = hints.anew(place_nC, 0, which)
    samples = np.asarray(r.data.test)[which]
    old = of_padded(shown_histories(r, samples))
    listed_nC = np.take_along_axis(pool_nC, place_nC, 1)
    name = f"{run.folder.name} pools"
    rows = np.zeros(pool_nC.shape, np.float32)
    olds = residual.histories_of(r.lm, r.data, samples, r.shuffled)
    found = score_listed(r, old, listed_nC, hint_nh, scorer.ranks, name, olds)
    np.put_along_axis(rows, place_nC, found, 1)
    return rows


# ---------------------------------------------------------------- as text


def two_stages_as_text(result: dict, wide: int) -> list[str]:
    """The rows of each run, and what bounds them."""
    lines = []
    for name, told in result.get("two_stage", {}).items():
        backbone, C, n_in = told["backbone"], told["pool"], told["n_in"]
        head = "".join(f"{m.upper():>9}" for m in COLUMNS)
        lines += [
            "",
            f"two stages: {backbone} retrieves {C} of all {result['items']} items, {name} ranks "
            f"them (listed in {told['order']} order); {n_in} of {told['n']} samples have the truth "
            f"in the pool, so {told['ceiling']:.4f} is the ceiling of every hit rate up to {C}",
            f"{'':<{wide}}{'n':>7}{head}",
        ]
        named = {"backbone": backbone, "ranker, inside": f"{name}, inside"}
        for row, values in told["rows"].items():
            n = n_in if row.endswith("inside") else told["n"]
            cells = "".join(f"{values[m]:>9.4f}" for m in COLUMNS)
            lines.append(f"{named.get(row, row):<{wide}}{n:>7}{cells}")
        gain, *ends = told["gain"]["ndcg@10"]
        lines.append(
            f"overall minus {backbone}: NDCG@10 {gain:+.4f} {ends_text(ends, '{:+.4f}'.format)}; "
            f"inside, the LM's first choice is {backbone}'s first in {told['copies']['copied']:.1%}"
        )
    return lines
