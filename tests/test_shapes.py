"""The shapes of the house: functions that fit a screen, short modules, few parameters, one idea a
line. ruff holds the rest (pyproject.toml).
"""

import ast
import subprocess
from pathlib import Path

import pytest
from scripts import ROOT

LINES_OF_A_FUNCTION = 60
LINES_OF_A_COMMAND = 90  # a click command, whose options stand above it
LINES_OF_A_MODULE = 400
PARAMETERS = 7
PARAMETERS_OF_A_KERNEL = 9  # a tensor each
NAMES = 3  # that one assignment binds to a tuple written out
NAMES_OF_A_RESULT = 5  # that one assignment takes out of what a function returns


def tracked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    return [name for name in listed.stdout.split() if (ROOT / name).exists()]


def is_decorated(function, *words) -> bool:
    """Whether a decorator of the function has one of these words."""
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return any(word in decorators for word in words)


def faults_of_function(function, most):
    """What is wrong with a function's shape, in words. most: parameters."""
    is_command = is_decorated(function, "command")
    lines = function.end_lineno - function.lineno + 1  # without decorators
    if lines > (LINES_OF_A_COMMAND if is_command else LINES_OF_A_FUNCTION):
        yield f"{function.name} has {lines} lines"
    given = function.args
    n = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
    # options of a command, fixtures of a test, pointers and strides of a Triton kernel
    many = is_command or is_decorated(function, "fixture", "triton.jit")
    if n > most and not many and not function.name.startswith("test_"):
        yield f"{function.name} has {n} parameters"


def faults_of_assignment(assignment):
    """What is wrong with an assignment's shape, in words."""
    value = assignment.value
    most = NAMES if isinstance(value, ast.Tuple) else NAMES_OF_A_RESULT
    for target in assignment.targets:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        if len(names) > most:
            yield f"line {assignment.lineno} assigns {len(names)} names"
        if isinstance(target, ast.Name) and isinstance(value, ast.Lambda):
            yield f"line {assignment.lineno} gives a lambda a name"


def faults_of(path: Path):
    """What is wrong with a file's shape, in words."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > LINES_OF_A_MODULE:
        yield f"it has {lines} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            most = PARAMETERS_OF_A_KERNEL if "kernel" in str(path) else PARAMETERS
            yield from faults_of_function(node, most)
        if isinstance(node, ast.Assign):
            yield from faults_of_assignment(node)


@pytest.mark.parametrize("name", tracked_files())
def test_every_file_has_the_shapes_of_the_house(name):
    faults = list(faults_of(ROOT / name))
    assert not faults, f"{name}: {'; '.join(faults)}"


@pytest.mark.parametrize(
    "code, fault",
    [
        ("def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
        ("@click.command()\ndef main():\n" + "    x = 1\n" * 90, "main has 91 lines"),
        ("def f(a, b, c, d, e, *, g, h, i): pass", "f has 8 parameters"),
        ("a, b, c, d = 1, 2, 3, 4", "line 1 assigns 4 names"),
        ("a, b, c, d, e, g = f()", "line 1 assigns 6 names"),
        ("f = lambda: 1", "line 1 gives a lambda a name"),
        ("x = 1\n" * 401, "it has 401 lines"),
    ],
)
def test_a_fault_is_found(code, fault, tmp_path):
    (tmp_path / "x.py").write_text(code)
    assert list(faults_of(tmp_path / "x.py")) == [fault]


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n" + "    x = 1\n" * 59,
        "@click.command()\ndef main():\n" + "    x = 1\n" * 89,
        "def f(a, b, c, d, e, *, g, h): pass",
        "a, b, c = 1, 2, 3",
        "a, b, c, d = x.shape",
        "@triton.jit\ndef kernel(a, b, c, d, e, f, g, h): pass",
        "x = 1\n" * 400,
    ],
)
def test_the_shapes_of_the_house_have_no_faults(code, tmp_path):
    (tmp_path / "x.py").write_text(code)
    assert list(faults_of(tmp_path / "x.py")) == []


def test_no_two_plugins_define_a_fixture_of_one_name():
    conftest = ast.parse((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    [plugins] = [
        ast.literal_eval(x.value)
        for x in conftest.body
        if isinstance(x, ast.Assign) and x.targets[0].id == "pytest_plugins"
    ]
    trees = [ast.parse((ROOT / "tests" / f"{name}.py").read_text("utf-8")) for name in plugins]
    functions = [x for tree in trees for x in tree.body if isinstance(x, ast.FunctionDef)]
    names = [f.name for f in functions if is_decorated(f, "fixture")]
    assert len(names) > 40 and sorted(names) == sorted(set(names))
