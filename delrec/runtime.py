"""What stands under everything: how a command refuses, files read and written whole, run folders
found, what this machine is.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

try:
    import fcntl  # locks that die with their owner
except ImportError:  # not on Windows: there nobody is refused
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
# the conventional models as prompts and tables call them
NAMES = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "caser": "Caser"}


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delrec"


def stop(sentence):
    """The one way a script refuses: a sentence with what was found, what was expected and what to
    do; exit code 1.
    """
    raise click.ClickException(sentence)


def first_line(bad, most=150):
    """The first line of an exception's words."""
    return f"{type(bad).__name__}: {(str(bad).strip().splitlines() or ['no message'])[0][:most]}"


def described(doc):
    """click's settings for a script whose --help is its file's docstring: lines that are indented
    (examples) stay as they are, others are wrapped.
    """
    paragraphs = [
        "\b\n" + p if any(line.startswith("    ") for line in p.splitlines()) else p
        for p in doc.strip().split("\n\n")
    ]
    return {
        "help": "\n\n".join(paragraphs),
        "context_settings": {"show_default": True, "max_content_width": 140},
    }


def whole_or_auto(ctx, param, value):
    """click's callback for an option that is a number above 0, 'auto', or not given."""
    return value if value in ("auto", None) else click.IntRange(1).convert(value, param, ctx)


def read_npy(path, shape=None):
    """An .npy file, memory-mapped, never unpickled. shape: what it must have, None where anything
    goes.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as bad:
        stop(f"{path} cannot be read as an array ({str(bad).splitlines()[0][:120]}); make it again")
    if shape is not None and (
        array.ndim != len(shape)
        or any(want is not None and have != want for have, want in zip(array.shape, shape))
    ):
        stop(
            f"{path} has shape {array.shape}, expected "
            f"({', '.join('any' if n is None else str(n) for n in shape)}); it belongs to "
            "other "
            "data, make it again"
        )
    return array


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as bad:
        stop(f"{path} cannot be read as JSON ({str(bad).splitlines()[0][:120]}); make it again")


def read_tensors(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as bad:
        stop(
            f"{path} cannot be read as safetensors ({str(bad).splitlines()[0][:120]}); train it "
            "again"
        )


def is_folder(name):
    """True for the name of a folder; one that is too long to be one is none."""
    try:
        return Path(name).is_dir()
    except OSError:
        return False


def folder_of(kind, name):
    """`name` is a folder (absolute, there already, or beginning with '.' or the kind itself), or a
    name under data/ or runs/.
    """
    path = Path(name)
    return (
        path
        if path.is_absolute()
        or is_folder(path)
        or path.parts[0] == kind
        or str(name).startswith(".")
        else ROOT / kind / name
    )


def write_json(path, value):
    """Whole or not at all: a temporary name, flushed, renamed."""
    tmp = Path(f"{path}.tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_npy(path, array):
    tmp = Path(f"{path}.tmp")
    with open(tmp, "wb") as f:
        np.save(f, array)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


# ------------------------------------------------ folders that are whole at every moment
#
# A run, an export or a prepared folder is built in <folder>.unfinished and put in its place by
# renames. Its mark (config.json, meta.json) is written last: a folder that holds it is whole.


def beside(folder, ending):
    """The folder <folder>.<ending>; where `folder` is a link, beside what it links to."""
    folder = Path(folder)
    if folder.is_symlink() or folder.name in ("", ".."):
        folder = folder.resolve()
    return Path(f"{folder}.{ending}")


def put_in_place(folder, keep=None):
    """Makes <folder>.unfinished, which is whole, the new `folder`. The old one goes, or to `keep`.

    Whoever is ended between two of the renames leaves what `settle` completes.
    """
    new, old = beside(folder, "unfinished"), keep or beside(folder, "replaced")
    place = Path(str(new).removesuffix(".unfinished"))
    shutil.rmtree(new / "checkpoints", ignore_errors=True)
    (new / "started.json").unlink(missing_ok=True)
    if place.exists():
        if keep is None:
            shutil.rmtree(old, ignore_errors=True)  # of a process that was ended while removing it
        os.replace(place, old)
    os.replace(new, place)
    (place / "lock").unlink(missing_ok=True)
    if keep is None:
        shutil.rmtree(old, ignore_errors=True)


def between_renames(folder, mark) -> bool:
    """True while what is in place of `folder` is not there yet, or not any more."""
    whole = (beside(folder, "unfinished") / mark).exists()
    return not folder.exists() and (whole or beside(folder, "replaced").exists())


def settle(folder, mark):
    """Completes what a process began that was ended between two renames of put_in_place."""
    new, old = beside(folder, "unfinished"), beside(folder, "replaced")
    if not new.exists() and not old.exists():
        return
    until = time.time() + 10
    while between_renames(folder, mark) and owner(new) and time.time() < until:
        time.sleep(0.02)  # its owner is at it
    if owner(new):
        return
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif (new / mark).exists():
            put_in_place(folder)
        elif old.exists():
            os.replace(old, folder)
    except FileNotFoundError:  # another process completed it just now
        pass


HELD = {}  # what this process builds: folder -> its open lock


def owner(folder):
    """The number of another live process that builds in `folder`, as text, or None."""
    if fcntl is None or folder in HELD:
        return None
    try:
        with open(folder / "lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "unknown"
    except OSError:  # no such file, or a file system without locks
        return None
    return None


def locked(file):
    """True if the lock of an open file is now ours, and the file still stands in its place."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    there = os.path.exists(file.name)
    return there and os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))


def lock(folder):
    """Makes `folder`, if it is not there, and marks it as this process's until it ends."""
    unlock(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return
    until = time.time() + 1  # whoever only looks at the lock holds it for a moment
    file = open(folder / "lock", "a+")  # noqa: SIM115 (held open as long as the lock is)
    while not locked(file):
        file.close()
        if time.time() > until:
            stop(in_use(folder, owner(folder)))
        time.sleep(0.02)
        folder.mkdir(parents=True, exist_ok=True)  # its owner may have taken it away
        file = open(folder / "lock", "a+")  # noqa: SIM115
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    HELD[folder] = file


def unlock(folder):
    """Takes this process's mark from a folder."""
    if folder in HELD:
        HELD.pop(folder).close()


def empty(new):
    """Takes everything out of a folder that is built in, but its lock."""
    for path in new.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def in_use(folder, number):
    """The sentence about a folder in which another process is at work."""
    return (
        f"{folder} is being written by process {number}; "
        "wait until that is finished, end it, or name another folder"
    )


def machine():
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else "cpu"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(gpus) or f"{cpu}, {os.cpu_count()} cores"


def versions() -> dict:
    """The versions a result may depend on; nothing is imported to learn them."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "numpy": np.__version__,
    }


def commit():
    try:
        return (
            subprocess.run(
                ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
                capture_output=True,
                text=True,
            ).stdout.strip()
            or None
        )
    except OSError:
        return None


def is_run(folder):
    """True for a finished run of these scripts."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"stage", "dataset", "data_hash"} <= set(config)


def when(run):
    """When a run was finished, as text. run: what load_run returns."""
    at = getattr(run, "finished", None) or (run.folder / "config.json").stat().st_mtime
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def stop_if_replaced(run):
    """Ends the process if another run stands in the folder by now: nothing may be added to it."""
    config = read_json(run.folder / "config.json")
    if config.get("finished") != getattr(run, "finished", None):
        stop(
            f"{run.folder} was replaced by another run while this command read the earlier one; "
            "nothing was written, run it again"
        )


class Run(SimpleNamespace):
    """A finished run: what its config.json holds, as attributes; more than these by stage."""

    folder: Path  # where it stands
    stage: str  # train_backbone, distill, finetune or lm (evaluate.py --llm)
    dataset: str  # the name of its data
    data_hash: str  # of their preparation


def load_run(name, data=None, stages=None) -> Run:
    """The run in a finished run folder (or a name under runs/). stages: those that are expected.

    Another data set's run is refused."""
    folder = folder_of("runs", name)
    settle(folder, "config.json")
    if not (folder / "config.json").exists():
        begun = folder.exists() or beside(folder, "unfinished").exists()
        stop(
            f"{folder} is {'an unfinished run (no config.json)' if begun else 'no run folder'}; "
            "train it first (train_backbone.py, distill.py, finetune.py), or name a finished one"
        )
    config = read_json(folder / "config.json")
    if not is_run(folder):
        stop(
            f"{folder}/config.json does not name stage, dataset and data_hash, "
            "so it is no run of these scripts; train it again"
        )
    run = Run(**config, folder=folder)
    if stages and run.stage not in stages:
        stop(f"{folder} holds a {run.stage} run, expected one of: {', '.join(stages)}")
    if data is not None and run.data_hash != data.meta["hash"]:
        kept = Path(f"{getattr(data, 'folder', '')}@{run.data_hash}")
        stop(
            f"{folder} was trained on another preparation of {run.dataset} "
            f"(hash {run.data_hash}, data folder has {data.meta['hash']}); "
            + (f"that one is kept, use --dataset {kept}" if kept.is_dir() else "train it again")
        )
    return run
