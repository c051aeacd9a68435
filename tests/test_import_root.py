"""One import root: others own the names kernels, data and common, and the floors of the house
hold.
"""

import ast
import os
import subprocess
import sys

from scripts import ROOT

# what each floor may import of ours: itself and what stands under it
FLOORS = {
    "delrec/runtime.py": (),
    "delrec/metrics.py": ("runtime",),
    "delrec/processes.py": ("runtime",),
    "kernels": ("kernels", "runtime", "training"),
    "delrec/training": ("training", "processes", "runtime"),
    "data": ("data", "kernels", "metrics", "processes", "runtime", "training", "backbone"),
    "delrec/backbone": ("backbone", "data", "metrics", "processes", "runtime", "training"),
    "delrec/lm": ("lm", "data", "kernels", "metrics", "processes", "runtime", "training"),
    "delrec/evaluation": (
        "evaluation",
        "lm",
        "backbone",
        "data",
        "metrics",
        "processes",
        "runtime",
        "training",
    ),
    "delrec/serving": (
        "serving",
        "lm",
        "backbone",
        "data",
        "metrics",
        "processes",
        "runtime",
        "training",
    ),
}
BENCHES = ("data/bench.py",)  # programs: they run the scripts

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


def imports_of(path):
    """The dotted names of ours that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            continue
        elif isinstance(node, ast.ImportFrom) and node.module == "delrec":
            yield from (f"delrec.{a.name}" for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_floor_imports_from_above_itself():
    scripts = {p.stem for p in ROOT.glob("*.py")}
    seen = 0
    for floor, under in FLOORS.items():
        files = [ROOT / floor] if floor.endswith(".py") else sorted((ROOT / floor).glob("*.py"))
        assert files, floor
        for path in files:
            if str(path.relative_to(ROOT)) in BENCHES:
                continue
            for name in imports_of(path):
                assert name.split(".")[0] not in scripts, f"{path} imports the script {name}"
                if name.startswith("delrec."):
                    seen += 1
                    assert name.split(".")[1] in under, f"{path} imports {name}"
    assert seen > 60
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
