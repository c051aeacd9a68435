"""One import root: others own the names kernels, data and common, and the floors of the house
hold.
"""

import ast
import os
import subprocess
import sys

import pytest
from scripts import ROOT

# bottom up: a part imports itself and what stands on the floors under it, never its neighbours
FLOORS = [
    ["files", "places", "names", "ranges"],
    ["no_run"],
    ["runtime"],
    ["metrics", "processes", "significance"],
    ["training"],
    ["kernels"],  # beside training, but for its bench, which measures memory
    ["data"],
    ["backbone", "lm"],
    ["evaluation", "serving"],
    ["common"],
    ["train_backbone", "distill", "finetune", "evaluate"],
    ["recipes"],
]
# benches that still run a script; nothing is added here
REACH_UP = {("data/bench.py", "train_backbone")}

DUMMY = """
import sys
MARK = "somebody else's"
class Anything(type):
    def __getattr__(cls, name):
        return cls
class Thing(metaclass=Anything):
    def __init__(self, *args, **kwargs):
        pass
    def __call__(self, *args, **kwargs):
        return args[0] if args else self
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Thing
"""

PROBE = """
import sys
sys.path[:0] = {path!r}
import kernels, data
assert kernels.MARK == data.MARK == "somebody else's", (kernels, data)
from delrec.kernels import verbalizer
from delrec.data import prepared
from delrec.lm.model import load_lm
import torch
lm = load_lm({llm!r}, torch.device("cpu"), torch.float32)
assert len(lm.head_VD) and "delrec" in verbalizer.__name__
import transformers.utils
assert transformers.utils.is_kernels_available(), "transformers does not see the dummy package"
print("loaded", lm.kind)
"""


def part_of(path) -> str:
    """The part of the house that a file (relative to the root) belongs to."""
    parts = path.with_suffix("").parts
    return parts[1] if parts[0] == "delrec" else parts[0]


def parts_imported(path):
    """The parts that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            root, *below = name.split(".")
            yield below[0] if root == "delrec" and below else root


def test_no_floor_imports_from_above_itself_or_from_beside():
    height = {part: n for n, floor in enumerate(FLOORS) for part in floor}
    files = [ROOT / f"{part}.py" for part in height if (ROOT / f"{part}.py").exists()]
    for folder in ("delrec", "kernels", "data", "recipes"):
        files += sorted((ROOT / folder).rglob("*.py"))
    files.remove(ROOT / "delrec" / "__init__.py")
    seen = 0
    for path in files:
        name, part = path.relative_to(ROOT).as_posix(), part_of(path.relative_to(ROOT))
        assert part in height, f"{name} stands on no floor"
        for other in parts_imported(path):
            if other == part or other not in height or (name, other) in REACH_UP:
                continue
            seen += 1
            assert height[other] < height[part], f"{name} imports {other}"
    assert seen > 150


def test_kernels_and_data_are_no_packages_of_their_own():
    assert not [p for p in ("kernels", "data") if (ROOT / p / "__init__.py").exists()]


def dummies(folder):
    """A site folder with packages kernels, data and common of somebody else."""
    from transformers.utils import import_utils

    for name in ("kernels", "data", "common"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(DUMMY)
        version = import_utils.KERNELS_MIN_VERSION if name == "kernels" else "1.0"
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n")
    return str(folder)


def run(args, site, **more):
    """A python process that finds the dummy packages as if they were installed."""
    env = os.environ | {"PYTHONPATH": site, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, **more)


@pytest.mark.long
def test_an_lm_loads_beside_packages_named_kernels_data_and_common(decoder, tmp_path):
    site = dummies(tmp_path / "site")
    code = PROBE.format(path=[str(ROOT), site], llm=decoder)
    done = run(["-c", code], site, cwd=tmp_path)
    assert done.returncode == 0 and "loaded decoder" in done.stdout, done.stdout + done.stderr


def test_scripts_start_beside_packages_named_kernels_data_and_common(tmp_path):
    site = dummies(tmp_path / "site")
    for script in ("evaluate.py", "data/prepare.py", "kernels/bench.py"):
        done = run([str(ROOT / script), "--help"], site, cwd=tmp_path)
        assert done.returncode == 0 and "Usage" in done.stdout, done.stdout + done.stderr
