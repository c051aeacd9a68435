"""A wheel and an editable install: ours is imported, whoever else owns the names kernels, data and
common.
"""

import ast
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from golden import copy_of_working_tree
from scripts import ROOT
from test_import_root import dummies

PROBE = """
import kernels, data, common
assert kernels.MARK == data.MARK == common.MARK == "somebody else's"
import delrec, delrec.kernels.verbalizer, delrec.data.prepared, delrec.lm.model
from delrec.kernels import cpu
cpp = [p.name for p in __import__("pathlib").Path(cpu.__file__).parent.glob("*.cpp")]
assert cpp, "no C++ source beside kernels/cpu.py"
print(delrec.__file__, delrec.kernels.verbalizer.__file__, delrec.data.prepared.__file__)
"""


def pip(*args, python=sys.executable):
    """Runs pip for a Python; what it needs to build is here already."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    done = subprocess.run([*command, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_pip_leaves_in_a_clone_is_no_change_to_it():
    for left in ("delrec.egg-info/PKG-INFO", "build/lib/delrec/__init__.py"):
        done = subprocess.run(["git", "check-ignore", "-q", left], cwd=ROOT)
        assert done.returncode == 0, f"git would show {left}"


def environment(folder):
    """The Python of a new environment that sees what is installed here, and beside it the packages
    of somebody else.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    dummies(site)
    return folder / "bin" / "python"


def imported_by(python, cwd) -> list[Path]:
    """The files of delrec, its verbalizer and its reader, as a process elsewhere finds them."""
    cwd.mkdir()
    done = subprocess.run([python, "-c", PROBE], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Path(file) for file in done.stdout.split()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the working tree, in which building may leave what it likes."""
    return copy_of_working_tree(tmp_path_factory.mktemp("clone"))


def sources_of(clone) -> set[str]:
    """Where a wheel has to hold each file of the library: code, C++ sources, tables, pages."""
    found = []
    for folder in ("delrec", "kernels", "data"):
        found += [p.relative_to(clone) for p in (clone / folder).rglob("*.*") if p.is_file()]
    kept = [p for p in found if p.suffix not in (".md", ".pyc")]
    return {(p if p.parts[0] == "delrec" else "delrec" / p).as_posix() for p in kept}


def required_by(wheel) -> set[str]:
    """The names of the packages that a wheel installs with itself."""
    with zipfile.ZipFile(wheel) as z:
        (name,) = [name for name in z.namelist() if name.endswith(".dist-info/METADATA")]
        lines = message_from_bytes(z.read(name)).get_all("Requires-Dist")
    return {re.match(r"[\w-]+", line)[0] for line in lines if "extra ==" not in line}


def without_comments(text) -> list[str]:
    """The requirements of a requirements.txt, one a line."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [line.replace('"', "'") for line in lines if line]


def packages_imported() -> set[str]:
    """The names that the library imports and that are neither ours nor Python's."""
    files = [p for folder in ("delrec", "kernels", "data") for p in (ROOT / folder).rglob("*.py")]
    names = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"delrec", "common", "recipes"}


def test_make_installs_what_the_library_and_its_developers_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert without_comments((ROOT / "requirements.txt").read_text()) == wanted


def test_the_library_requires_what_it_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["onnx"]
    required = {re.match(r"[\w-]+", line)[0] for line in lines}
    # the benches' rival has a Python of its own; a bench that runs a script
    imported = packages_imported() - {"recbole", "train_backbone"}
    assert {name.replace("_", "-") for name in imported} <= required


def test_a_wheel_holds_all_that_is_imported_and_is_imported(clone, tmp_path):
    pip("wheel", clone, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not {"pytest", "ruff", "hypothesis"} & required_by(wheel) and "torch" in required_by(
        wheel
    )
    wanted = sources_of(clone)
    assert "delrec/data/paper.csv" in wanted and any(name.endswith(".cpp") for name in wanted)
    assert wanted - names == set()
    assert all(name.startswith(("delrec/", "delrec-")) for name in names)
    python = environment(tmp_path / "env")
    pip("install", wheel, "--no-deps", "--no-index", python=python)
    found = imported_by(python, tmp_path / "elsewhere")
    assert all(path.is_relative_to(tmp_path / "env") for path in found), found


def test_an_editable_install_imports_the_clone(clone, tmp_path):
    python = environment(tmp_path / "env")
    pip("install", "-e", clone, "--no-deps", "--no-build-isolation", "--no-index", python=python)
    found = imported_by(python, tmp_path / "elsewhere")
    assert found == [
        clone / "delrec" / "__init__.py",
        clone / "kernels" / "verbalizer.py",
        clone / "data" / "prepared.py",
    ]
