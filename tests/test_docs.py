"""What README and docs/ say is there: every link, script, flag and make target."""

import importlib
import re
from functools import cache
from inspect import signature
from pathlib import Path

import click
import pytest
from scripts import ROOT

from delrec.backbone.kda import CHOOSING
from delrec.evaluation.stats import interval
from delrec.significance import DRAWS, DRAWS_A_ROW, EXACT
from recipes import demo

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [ROOT / "data" / "README.md", ROOT / "kernels" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
CLICK = {  # script -> module whose `main` is its command
    "train_backbone.py": "train_backbone",
    "distill.py": "distill",
    "finetune.py": "finetune",
    "evaluate.py": "evaluate",
    "data/prepare.py": "delrec.data.prepare",
    "recipes/tables.py": "recipes.tables",
    "recipes/backbones.py": "recipes.backbones",
    "recipes/levers.py": "recipes.levers",
    "recipes/circle.py": "recipes.circle",
    "recipes/demo.py": "recipes.demo",
    "recipes/mlp.py": "recipes.mlp",
    "recipes/retrain.py": "recipes.retrain",
    "recipes/tune.py": "recipes.tune",
    "recipes/bench_serve.py": "recipes.bench_serve",
    "recipes/bench_rectools.py": "recipes.bench_rectools",
}
OTHERS = {"--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
OTHERS |= {
    "--max-restarts",
    "--shutdown-timeout",
    "--standalone",
    "--index-url",
    "--no-deps",
    "--fix",
}  # of torchrun, pip, ruff


def code_of(page: Path) -> list[str]:
    """The lines of a page's code blocks and its `code` between words."""
    blocks = page.read_text(encoding="utf-8").split("```")
    lines = [line for block in blocks[1::2] for line in block.replace("\\\n", " ").splitlines()]
    return lines + [code for text in blocks[::2] for code in re.findall(r"`([^`\n]+)`", text)]


def prose_of(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", "".join(page.read_text(encoding="utf-8").split("```")[::2]))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[`*]|\[|\]\([^)]*\)", "", head).lower() for head in heads]
    return {re.sub(r"[^\w\- ]", "", head).strip().replace(" ", "-") for head in plain}


@cache
def flags_of(script: str) -> set[str]:
    """The flags that a script knows; of one that is no click command those in its text."""
    if script not in CLICK:
        return set(re.findall(r"--[\w-]+", (ROOT / script).read_text(encoding="utf-8")))
    options = importlib.import_module(CLICK[script]).main.params
    known = [o.opts + o.secondary_opts for o in options if isinstance(o, click.Option)]
    return {"--help", *(flag for names in known for flag in names)}


@cache
def make_targets() -> set[str]:
    """What the Makefile can make."""
    heads = re.findall(r"^([a-z][\w \-]*):", (ROOT / "Makefile").read_text(), re.M)
    return {name for head in heads for name in head.split()}


def file_of(module: str) -> str:
    """The file that `python -m delrec.MODULE` runs."""
    path = f"delrec/{module.replace('.', '/')}"
    return f"{path}/__main__.py" if (ROOT / path).is_dir() else f"{path}.py"


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """(script, its arguments) of every command of a page."""
    found = []
    for line in code_of(page):
        line = re.sub('"[^"]*"', '""', line)  # --flags "--text tfidf" is about another script
        for part in re.split(r"&&|;|\|(?= )", line.split(" # ")[0].split("  #")[0]):
            if match := re.search(r"(?:^|[ /])(?:python|torchrun)3? (.*?)([\w/]+\.py)\b(.*)", part):
                found.append((match[2], match[3].split()))
            elif match := re.search(r"python -m delrec\.([\w.]+)(.*)", part):
                found.append((file_of(match[1]), match[2].split()))
            elif match := re.match(r"([\w/]+\.py) (--.*)", part.strip()):
                found.append((match[1], match[2].split()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for name in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if name.startswith(("http://", "https://")):
            continue
        path, _, anchor = name.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {name}"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name} links to {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_flag_that_a_page_names_is_there(page):
    known = set().union(OTHERS, *map(flags_of, CLICK))
    for script, args in commands_of(page):
        path = script if (ROOT / script).exists() else f"data/{script}"  # said in data/README.md
        assert (ROOT / path).exists(), f"{page.name} runs {script}"
        for flag in (arg.split("=")[0] for arg in args if arg.startswith("--")):
            assert flag in flags_of(path), f"{page.name}: {script} has no {flag}"
    for code in code_of(page):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            elsewhere = any(flag in flags_of(s) for s, _ in commands_of(page))
            assert flag in known or elsewhere, f"{page.name} names {flag}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_make_target_that_a_page_names_is_there(page):
    for code in code_of(page):
        if match := re.match(r"make ((?:[a-z][\w-]* ?)+)", code):
            assert set(match[1].split()) <= make_targets(), f"{page.name}: {code}"


def test_the_readme_is_short_and_its_lines_are_not_long():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert sum(len(line.split()) for line in lines) < 1100
    long = [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))]
    assert not long


def without_numbers(text: str) -> list[str]:
    """The words of a text, its numbers as #."""
    return re.sub(r"[+-]?\d+(\.\d+)?", "#", text).split()


def test_what_the_readme_quotes_of_the_demo_is_what_it_prints(toy, capsys, monkeypatch):
    monkeypatch.setattr(demo.runtime, "ROOT", Path())
    names = ("hr@1 of 15", "ndcg@10 of 15", "hr@20 of all", "ndcg@10 of all")
    commands = [command.split()[0] for _, command in demo.STAGES]
    demo.print_end(dict.fromkeys(names, [0.1, -0.1, 0.2]), toy, [f"{c} 0.1" for c in commands])
    printed = without_numbers(capsys.readouterr().out)
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    [quoted] = [block for block in blocks if "DELRec minus its backbone" in block]
    assert without_numbers(quoted) == printed


def test_the_protocol_says_the_numbers_of_the_code():
    said = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
    draws = signature(interval).parameters["draws"].default
    for number in (draws, DRAWS, DRAWS_A_ROW, EXACT, CHOOSING):
        assert re.search(rf"\b{number:,}\b", said), number


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_paragraph_is_longer_than_five_lines(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("a list of changes")
    blocks = "\n".join(page.read_text(encoding="utf-8").split("```")[::2]).split("\n\n")
    for block in blocks:
        for part in re.split(r"\n(?= *[-|#] | *\d+\. |\|)", block):
            if not part.startswith("|"):
                assert len(part) <= 5 * 100 + 5, f"{page.name}: {part[:80]}"
