"""docs/differences.md and what --paper prints say the same."""

from scripts import ROOT

import distill
import finetune
from delrec.lm import differences


def bullets(heading):
    """The list under a heading of docs/differences.md."""
    text = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    part = text.split(f"## {heading}\n")[1].split("\n## ")[0].replace("\n  ", " ")
    return [line.removeprefix("- ") for line in part.splitlines() if line.startswith("- ")]


def test_the_page_lists_what_paper_prints():
    both = bullets("What stays different in both stages")
    assert (*both, *bullets("In stage 1")) == differences.STAGE_1
    assert (*both, *bullets("In stage 2")) == differences.STAGE_2


def test_the_page_tells_what_paper_sets():
    page = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    for stage in (distill.PAPER, finetune.PAPER):
        said = (f"{stage['samples']:,}", f"{stage['batch']}")
        assert all(value in page for value in said)
    assert (distill.PAPER["lr"], finetune.PAPER["lr"]) == (5e-3, 1e-4)
    assert "5e-3; 16,000; 20" in page and "1e-4; 28,000; 20" in page
