"""docs/equations.md names functions: each is where the page says."""

import ast
import re

import pytest
from scripts import ROOT

PAGE = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")


def names_in(path):
    """Functions, classes, and Class.method of a file, as a set."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    defined = [x for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    inner = {
        f"{outer.name}.{x.name}"
        for outer in defined
        for x in outer.body
        if isinstance(outer, ast.ClassDef) and isinstance(x, ast.FunctionDef)
    }
    return inner | {x.name for x in defined}


def named():
    """Pairs (function, file) of the page's tables."""
    together = re.findall(r"((?:`[\w.]+`(?:, )?)+) in ([\w/]+\.py)", PAGE)
    return sorted(
        {(name, path) for names, path in together for name in re.findall(r"`(.*?)`", names)}
    )


@pytest.mark.parametrize(("name", "path"), named())
def test_a_function_that_the_page_names_is_there(name, path):
    assert name in names_in(path)


def test_every_paper_has_functions():
    papers = PAGE.split("\n## ")[1:]
    assert len(papers) == 8 and all(".py" in paper for paper in papers)
