"""LLMSEQPROMPT's second half (dh-r/LLM-Sequential-Recommendation, genitem): a title that an LM
writes counts for itself, and for the titles that mean nearly the same.

There, titles are sampled, and one that was written c times stands for itself and for its c - 1
nearest by embedding. Here the same is asked for in expectation, among the candidates:

    s'(i) = sum_j P(j) max(cos(z_i, z_j), 0),    P = softmax(s / T),

s the mean log P of a title's tokens, calibrated; T chosen on validation.
"""

import numpy as np

from delrec.backbone.text import permuted, tfidf_vectors
from delrec.data.counts import seen_in_training
from delrec.data.prepared import Data
from delrec.evaluation.rows import Row
from delrec.evaluation.scores import Part
from delrec.lm.minilm import title_vectors
from delrec.metrics import compare, metrics
from delrec.processes import Ranks
from delrec.runtime import stop

TEMPERATURES = (0.05, 0.1, 0.25, 0.5, 1.0)  # that are tried


def add_neighbours(
    rows: dict[str, Row], source: str, data: Data, val: Part, test: Part, ranks: Ranks
) -> None:
    """Adds two rows for each LM that scores titles by their likelihood: with neighbours by the
    titles' vectors (source: tfidf or minilm), and the control, with those of other titles.
    """
    written = [name for name, row in rows.items() if writes(row)]
    if not written:
        stop(
            "--neighbours is about titles that an LM writes, but none of the runs scores by "
            "likelihood; give a run of finetune.py --verbalizer likelihood, or leave it out"
        )
    Z_ID = tfidf_vectors(data) if source == "tfidf" else title_vectors(data, ranks)
    others_ID = permuted(Z_ID, seen_in_training(data))
    for name in written:
        with_neighbours(rows, name, f"{source} neighbours", Z_ID, (val, test))
        with_neighbours(rows, name, f"others' {source} neighbours", others_ID, (val, test))


def writes(row: Row) -> bool:
    """True for the row of an LM that scores titles by their likelihood."""
    settings = getattr(row.run, "settings", None) or {}
    return settings.get("verbalizer") == "likelihood"


def with_neighbours(
    rows: dict[str, Row], name: str, ending: str, Z_ID: np.ndarray, parts: tuple[Part, Part]
) -> None:
    """Adds the row of a run with neighbours by some vectors, T chosen on validation."""
    (val, test), row = parts, rows[name]

    def quality(T):
        score_nC = counted(row.val_nC, val.cand_nC, Z_ID, T)
        return metrics(*compare(score_nC, val.is_target_nC))["ndcg@10"].mean()

    T = max(TEMPERATURES, key=quality)
    rows[f"{name}, {ending}"] = Row(
        counted(row.val_nC, val.cand_nC, Z_ID, T),
        counted(row.test_nC, test.cand_nC, Z_ID, T),
        f"a written title counts for titles like it ({ending}, temperature {T:g})",
    )


def counted(
    score_nC: np.ndarray, cand_nC: np.ndarray, Z_ID: np.ndarray, T: float, chunk: int = 1024
) -> np.ndarray:
    """s'(i) of every candidate, float32 (n, C), some rows at a time. Z_ID: the titles' vectors."""
    Z_ID = Z_ID / np.maximum(np.linalg.norm(Z_ID, axis=1, keepdims=True), 1e-12)
    found = np.zeros(score_nC.shape, np.float32)
    for i in range(0, len(score_nC), chunk):
        p_nC = np.exp((score_nC[i : i + chunk] - score_nC[i : i + chunk].max(1, keepdims=True)) / T)
        p_nC /= p_nC.sum(1, keepdims=True)
        z_nCD = Z_ID[cand_nC[i : i + chunk]]
        cos_nCC = np.maximum(z_nCD @ z_nCD.swapaxes(1, 2), 0)
        found[i : i + chunk] = (cos_nCC @ p_nC[..., None])[..., 0]
    return found
