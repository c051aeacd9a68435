"""What stands under everything: how a command refuses, files read and written whole, run folders found, what this machine is."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delrec"


def stop(sentence):
    """The one way a script refuses: a sentence with what was found, what was expected and what to do; exit code 1."""
    raise click.ClickException(sentence)


def described(doc):
    """click's settings for a script whose --help is its file's docstring: lines that are indented (examples) stay as they are, others are wrapped."""
    paragraphs = ["\b\n" + p if any(line.startswith("    ") for line in p.splitlines()) else p for p in doc.strip().split("\n\n")]
    return {"help": "\n\n".join(paragraphs), "context_settings": {"show_default": True, "max_content_width": 140}}


def whole_or_auto(ctx, param, value):
    """click's callback for an option that is a number above 0, 'auto', or not given."""
    return value if value in ("auto", None) else click.IntRange(1).convert(value, param, ctx)


def read_npy(path, shape=None):
    """An .npy file, memory-mapped, never unpickled. shape: what it must have, None where anything goes."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as bad:
        stop(f"{path} cannot be read as an array ({str(bad).splitlines()[0][:120]}); make it again")
    if shape is not None and (array.ndim != len(shape) or any(want is not None and have != want for have, want in zip(array.shape, shape))):
        stop(f"{path} has shape {array.shape}, expected ({', '.join('any' if n is None else str(n) for n in shape)}); it belongs to other data, make it again")
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
        stop(f"{path} cannot be read as safetensors ({str(bad).splitlines()[0][:120]}); train it again")


def folder_of(kind, name):
    """`name` is a folder (absolute, there already, or beginning with '.' or the kind itself), or a name under data/ or runs/."""
    path = Path(name)
    return path if path.is_absolute() or path.is_dir() or path.parts[0] == kind or str(name).startswith(".") else ROOT / kind / name


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


def machine():
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "cpu") \
        if Path("/proc/cpuinfo").exists() else "cpu"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(gpus) or f"{cpu}, {os.cpu_count()} cores"


def versions():
    import peft
    import transformers
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
            "peft": peft.__version__, "numpy": np.__version__}


def commit():
    try:
        return subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


def load_run(name, data=None, stages=None):
    """The config of a finished run folder (or a name under runs/), as a namespace with .folder; refuses another data set's run."""
    folder = folder_of("runs", name)
    if not (folder / "config.json").exists():
        stop(f"{folder} is {'an unfinished run (no config.json)' if folder.exists() else 'no run folder'}; "
             "train it first (train_backbone.py, distill.py, finetune.py), or name a finished one")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not {"stage", "dataset", "data_hash"} <= set(config):
        stop(f"{folder}/config.json does not name stage, dataset and data_hash, so it is no run of these scripts; train it again")
    run = SimpleNamespace(**config, folder=folder)
    if stages and run.stage not in stages:
        stop(f"{folder} holds a {run.stage} run, expected one of: {', '.join(stages)}")
    if data is not None and run.data_hash != data.meta["hash"]:
        stop(f"{folder} was trained on another preparation of {run.dataset} (hash {run.data_hash}, data folder has {data.meta['hash']}); train it again")
    return run
