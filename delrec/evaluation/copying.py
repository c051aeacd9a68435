"""How often an LM's first choice is what its prompt names first: of a hint (RecRanker, arXiv
2312.16018), or of candidates in the backbone's order. An LM that only copies is its backbone again.
"""

from pathlib import Path

import numpy as np

from delrec.data.prepared import Data
from delrec.evaluation.rows import Row
from delrec.evaluation.scores import Part
from delrec.lm import hints
from delrec.lm.listed import shows_backbone


def copies_of(rows: dict[str, Row], data: Data, test: Part) -> dict[str, dict]:
    """{row: see copied} of the rows whose prompts name something first."""
    found, scores = {}, f"scores_test_{test.cand_nC.shape[1]}.npy"
    for name, row in rows.items():
        if not row.run or not shows_backbone(row.run):
            continue
        shown = hints.of_run(row.run, data)
        if (Path(shown.backbone_run) / scores).exists():
            first_n = named_first(shown, test)
            own_n = np.take_along_axis(test.cand_nC, row.test_nC.argmax(1)[:, None], 1)[:, 0]
            found[name] = copied(own_n, first_n, data.items[test.samples])
    return found


def named_first(r: hints.Shown, test: Part) -> np.ndarray:
    """The item (n,) that the prompt of each test sample names first."""
    C = test.cand_nC.shape[1]
    hint_nh = hints.hints_of(r, "test", C, test.which)
    if hint_nh is not None:
        return hint_nh[:, 0]
    place_nC = hints.listing(r, "test", C, test.which)
    return np.take_along_axis(test.cand_nC, place_nC[:, :1], 1)[:, 0]


def copied(own_n: np.ndarray, first_n: np.ndarray, target_n: np.ndarray) -> dict:
    """Of the LM's first choices own_n: how often they are what was named first (copied), how often
    that is the truth (named_right), and how often they are right where they were copied and where
    not; None where there is no such sample."""
    copied_n, right_n = own_n == first_n, own_n == target_n

    def rate(of_n):
        return float(right_n[of_n].mean()) if of_n.any() else None

    return {
        "copied": float(copied_n.mean()),
        "named_right": float((first_n == target_n).mean()),
        "right_where_copied": rate(copied_n),
        "right_elsewhere": rate(~copied_n),
    }


def copies_as_text(result: dict) -> list[str]:
    """A line for each row that may copy."""
    lines = []
    for name, told in result.get("copies", {}).items():
        own = f", which is right in {told['right_where_copied']:.1%}" if told["copied"] else ""
        other = told["right_elsewhere"]
        lines.append(
            f"{name}: its first choice is what the prompt names first in {told['copied']:.1%} of "
            f"the samples{own}; "
            + (f"another one is right in {other:.1%}; " if other is not None else "")
            + f"what the prompt names first is right in {told['named_right']:.1%}"
        )
    return ["", *lines] if lines else []
