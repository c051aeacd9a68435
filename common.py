"""What the four scripts share: data, metrics, run folders, ranks (the LM and its prompts are in lm.py).

Names carry their shape. B users in a batch, L history length, I items (ids 1..I, 0 pads), C candidates, T tokens in a title,
V vocabulary, D LM width, k soft-prompt vectors, h length of the backbone's list, n samples of a split.
"""
import ctypes
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
NAMES = {"sasrec": "SASRec", "gru4rec": "GRU4Rec", "caser": "Caser"}      # of the backbones, as prompts and the paper's tables say them
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


# ---------------------------------------------------------------- ranks

def setup(seed):
    """Join torchrun's process group if there is one. Returns rank, world, device; seeds every generator alike on all ranks."""
    rank, world, local = (int(os.environ.get(v, d)) for v, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            stop(f"process {local} has no GPU: --nproc_per_node asks for more than the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
    else:
        device = torch.device("cpu")
    if world > 1 and not dist.is_initialized():
        more = {}
        if restarted() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # the launcher's store still holds the addresses of the processes before; each attempt gets a corner of its own
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            more = {"store": dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store), "rank": rank, "world_size": world}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **more)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return SimpleNamespace(rank=rank, world=world, device=device, main=rank == 0)


def restarted():
    """True in a process that torchrun --max-restarts started again: it continues as with --resume."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def finish(ranks):
    if ranks.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(x, ranks):
    """Sum a tensor over all processes, in fp32 (gloo has no bf16 sum)."""
    if ranks.world == 1:
        return x
    y = x.detach().to(ranks.device, torch.float32)
    dist.all_reduce(y)
    return y.to(x.device, x.dtype)


def max_over_ranks(x, ranks):
    """The largest of a number over all processes."""
    y = torch.tensor(float(x), device=ranks.device)
    dist.all_reduce(y, dist.ReduceOp.MAX)
    return y.item()


def sum_gradients(params, ranks):
    """Every rank's loss is already divided by the global batch, so the sum of the gradients is the gradient of one process."""
    if ranks.world > 1:
        grads = [p.grad for p in params if p.grad is not None]
        flat = sum_over_ranks(torch.cat([g.flatten().float() for g in grads]), ranks)
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))


def shares(pieces, ranks, even=False):
    """This rank's pieces of work, every world-th, as pairs (piece, 1). even: as many passes on every rank, because the passes of a sharded LM
    are made together; a rank that has nothing left repeats the first piece as (piece, 0), whose result counts for nothing."""
    mine = [(piece, 1) for piece in pieces[ranks.rank::ranks.world]]
    return mine + [(pieces[0], 0)] * (-(-len(pieces) // ranks.world) - len(mine)) if even and len(pieces) else mine


def gather_rows(rows, index, n, ranks):
    """Rows (m, ...) computed by this rank for samples `index` -> the full float32 array (n, ...), NaN where nobody has one."""
    full = np.full((n, *rows.shape[1:]), np.nan, np.float32)
    parts = [(index, rows)]
    if ranks.world > 1:
        most = int(max_over_ranks(len(index), ranks))             # all ranks send blocks of one size, rows without a place at the end
        block, place = np.zeros((most, *rows.shape[1:]), np.float32), np.full(most, -1)
        block[:len(index)], place[:len(index)] = rows, index
        gathered = []
        for x in (place, block):
            x = torch.as_tensor(x, device=ranks.device)
            gathered.append([torch.empty_like(x) for _ in range(ranks.world)])
            dist.all_gather(gathered[-1], x)
        parts = [(i.cpu().numpy()[i.cpu().numpy() >= 0], r.cpu().numpy()[i.cpu().numpy() >= 0]) for i, r in zip(*gathered)]
    for i, r in parts:
        full[i] = r
    return full


# ---------------------------------------------------------------- reading files that may be broken, or somebody else's

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


# ---------------------------------------------------------------- prepared data

def folder_of(kind, name):
    """`name` is a folder (absolute, there already, or beginning with '.' or the kind itself), or a name under data/ or runs/."""
    path = Path(name)
    return path if path.is_absolute() or path.is_dir() or path.parts[0] == kind or str(name).startswith(".") else ROOT / kind / name


def load_data(name):
    """A folder written by data/prepare.py, memory-mapped.

    items int32 [M] (users one after another, in time order), ptr int64 [U+1], times int64 [M] or None, titles [I+1] (titles[0] is
    the padding item), train/val/test int64 (index into items of each sample's target), meta (see data/README.md).
    """
    folder = folder_of("data", name)
    if not (folder / "meta.json").exists():
        known = sorted(p.parent.name for p in (ROOT / "data").glob("*/meta.json"))
        stop(f"no prepared data set in {folder}; prepared here: {', '.join(known) or 'none'}. "
             f"Prepare it with: python data/prepare.py {folder.name}" + ("" if folder.name == "ml-100k" else " --raw FOLDER"))
    meta = read_json(folder / "meta.json")
    load = lambda part: read_npy(folder / f"{part}.npy", (None,))
    if not {"name", "hash", "words", "split"} <= set(meta) or not (folder / "titles.txt").exists():
        stop(f"{folder} is no prepared folder (titles.txt or an entry of meta.json is missing); prepare it again with data/prepare.py")
    data = SimpleNamespace(name=meta["name"], folder=folder, meta=meta, items=load("items"), ptr=load("ptr"),
                           times=load("times") if (folder / "times.npy").exists() else None,
                           titles=[""] + (folder / "titles.txt").read_text(encoding="utf-8").split("\n")[:-1],
                           train=load("train"), val=load("val"), test=load("test"))
    data.n_items, data.n_users = len(data.titles) - 1, len(data.ptr) - 1
    if int(data.items.max(initial=0)) > data.n_items or int(data.items.min(initial=1)) < 1:
        stop(f"{folder}: item id {int(data.items.max())} but only {data.n_items} titles (ids begin at 1); prepare it again")
    last = max(int(part.max(initial=0)) for part in (data.train, data.val, data.test))
    if last >= len(data.items) or int(data.ptr[-1]) != len(data.items) or (np.diff(data.ptr) < 0).any():
        stop(f"{folder}: its arrays do not fit each other ({len(data.items)} interactions, users up to {int(data.ptr[-1])}, samples up to {last}); prepare it again")
    return data


def users(data, samples):
    """The user (0..U-1) each sample belongs to."""
    return np.searchsorted(data.ptr, samples, side="right") - 1


def histories(data, samples, L):
    """The last L items before each sample's target, padded on the left with 0: int64 (n, L)."""
    samples = np.asarray(samples)
    at = samples[:, None] - np.arange(L, 0, -1)[None, :]
    inside = at >= data.ptr[users(data, samples)][:, None]
    return np.where(inside, data.items[np.maximum(at, 0)], 0).astype(np.int64)


def tfidf(titles):
    """Bags of words of titles, TF-IDF, each of norm 1: word numbers (I, T), weights fp32 (I, T), 0 where a title has fewer, number of words."""
    words = [re.findall(r"\w+", t.lower()) for t in titles]
    vocab = {w: i for i, w in enumerate(sorted({w for t in words for w in t}))}
    df = np.bincount([vocab[w] for t in words for w in set(t)], minlength=len(vocab))
    T = max(max(map(len, words)), 1)
    id_IT, weight_IT = np.zeros((len(words), T), np.int64), np.zeros((len(words), T), np.float32)
    for i, t in enumerate(words):
        counts = {vocab[w]: t.count(w) for w in t}
        id_IT[i, :len(counts)] = list(counts)
        weight_IT[i, :len(counts)] = [n * math.log(len(titles) / (1 + df[w])) for w, n in counts.items()]
    return id_IT, weight_IT / np.maximum(np.linalg.norm(weight_IT, axis=1, keepdims=True), 1e-9), len(vocab)


def shuffled(old_nL, samples):
    """Histories in another order, drawn once for each sample; padding stays where it is."""
    out = old_nL.copy()
    for row, sample in zip(out, samples):
        row[row > 0] = np.random.default_rng([7, int(sample)]).permutation(row[row > 0])
    return out


def runs_of_targets(data, span, rng):
    """Cut every user's training targets into runs of at most `span` interactions: the first and last index into data.items of each.
    Where a user needs several, the cuts move from epoch to epoch, so a target is met with longer and shorter histories."""
    target = np.sort(np.asarray(data.train))
    user = users(data, target)
    end = target[np.searchsorted(user, user, side="right") - 1]      # the user's last training target
    start = target[np.searchsorted(user, user, side="left")]
    shift = rng.integers(0, span, data.n_users)[user] * (end - start >= span)
    run = (end - target + shift) // span
    new = np.flatnonzero((np.diff(user) != 0) | (np.diff(run) != 0))
    return target[np.r_[0, new + 1]], target[np.r_[new, len(target) - 1]]


def batch_of(data, first, last, L, is_target):
    """Windows that end at each run's last target: inputs seq_BL, and target_BL with 0 where a position is not of the run. The places of
    the window before the run hold the history that fits, as input only. All inputs come before a training target of the same user."""
    at_BL = last[:, None] - np.arange(L - 1, -1, -1)
    own_BL = (at_BL >= first[:, None]) & is_target[np.maximum(at_BL, 0)]
    return histories(data, last, L), np.where(own_BL, data.items[np.maximum(at_BL, 0)], 0).astype(np.int64)


def candidates(data, split, C, which=slice(None)):
    """The stored candidates of a split, or of some of its samples: int64 (n, C), each row holding its target exactly once."""
    path = data.folder / f"candidates_{split}_{C}.npy"
    if not path.exists():
        have = sorted(int(p.stem.split("_")[2]) for p in data.folder.glob(f"candidates_{split}_*.npy"))
        stop(f"{data.folder} holds no {C} candidates for {split}, it holds {have} (the catalogue has {data.n_items} items); "
             "choose one of those, or prepare the data again")
    return read_npy(path, (len(getattr(data, split)), C))[which].astype(np.int64)


def with_lists(backbone_run, data):
    """The training samples (indices) that a backbone wrote a list for: all, or those of its --lists."""
    path = Path(backbone_run) / "topk_train.npy"
    return np.flatnonzero(read_npy(path, (len(data.train), None))[:, 0]) if path.exists() else np.arange(len(data.train))


def subset(n, limit, seed):
    """At most `limit` of n samples, the same ones for every run: sorted int64 indices."""
    return np.arange(n) if not limit or limit >= n else np.sort(np.random.default_rng(seed).permutation(n)[:limit])


# ---------------------------------------------------------------- metrics (ties count as every order they could fall in)

def compare(score_BC, target_BC):
    """How many others score above (greater) and exactly as the target (equal). target_BC is a 0/1 mask with one 1 a row."""
    if not np.isfinite(score_BC).all():
        stop("scores hold a value that is not finite; nothing can be ranked by them")
    own = (score_BC * target_BC).sum(1, keepdims=True)
    return (score_BC > own).sum(1), (score_BC == own).sum(1) - 1


def metrics(greater, equal, ks=(1, 5, 10)):
    """Per-sample HR@k, NDCG@k, MRR and rank. A tie of e+1 items fills the ranks greater+1 .. greater+e+1; the value is the mean
    over those ranks, so constant scores give HR@1 = 1/C. rank = 1 + greater + equal/2, the mean of the same ranks."""
    greater, equal = np.asarray(greater, np.int64), np.asarray(equal, np.int64)
    top = int((greater + equal).max(initial=0)) + 2
    place = np.arange(1, top + 1)
    mean = lambda gain: (np.concatenate([[0], np.cumsum(gain)])[greater + equal + 1] -
                         np.concatenate([[0], np.cumsum(gain)])[greater]) / (equal + 1)
    out = {f"hr@{k}": mean((place <= k).astype(float)) for k in ks}
    out |= {f"ndcg@{k}": mean((place <= k) / np.log2(place + 1)) for k in ks if k > 1}
    return out | {"mrr": mean(1 / place), "rank": 1 + greater + equal / 2}


def chance(C, ks=(1, 5, 10)):
    """The metrics of constant scores over C candidates."""
    return {m: float(v[0]) for m, v in metrics([0], [C - 1], ks).items()}


# ---------------------------------------------------------------- run folders

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


def peak_gb():
    """Most memory this process has held so far, GB (host; plus the GPU's where there is one)."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform != "darwin" else 2 ** 30)
    return host + (torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else 0)


def extra_bytes(f, device):
    """Peak memory of one call beyond what is held before it (None where this system does not tell)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)                           # what torch freed before counts as free
    status = lambda key: next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))
    try:
        with open("/proc/self/clear_refs", "w") as mark:       # 5: forget the high-water mark
            mark.write("5")
        before = status("VmRSS")
    except (OSError, StopIteration):
        return None
    f()
    return max(status("VmHWM") - before, 0)


def total_bytes(device):
    """Memory of the GPU, or of this machine (None where it does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None


def free_bytes(device):
    """What a process may still take of it: on a GPU also what its allocator holds unused."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    meminfo = Path("/proc/meminfo")
    return next(int(x.split()[1]) * 1024 for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable")) if meminfo.exists() else total_bytes(device)


def forecast(step_seconds, steps, validation_seconds, validations, ranks):
    """One line after the first measured steps: the time and the memory that the run will take."""
    if not ranks.main:
        return
    left = np.median(step_seconds) * (steps - len(step_seconds)) + validation_seconds * validations
    gpu, total = ranks.device.type == "cuda", total_bytes(ranks.device)
    used = torch.cuda.max_memory_allocated() / 2 ** 30 if gpu else peak_gb()
    print(f"{len(step_seconds)} steps took {np.median(step_seconds):.2f} s each: about {left / 60:.1f} minutes to go for {steps - len(step_seconds)} steps and {validations} "
          f"validations; {used:.1f} GB of {'the GPU' if gpu else 'memory'} at the peak so far" + (f", it has {total / 2 ** 30:.0f}" if total else ""), flush=True)


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


def start_run(out, stage, cfg, data, ranks):
    """Make the run folder and take away its completion mark and what an earlier run left. Returns the record that finish_run writes to
    config.json. With cfg.resume a finished run ends here, and log and checkpoints stay."""
    resume = getattr(cfg, "resume", False)
    if resume and (out / "config.json").exists():
        if ranks.main:
            print(f"{out} is finished, there is nothing to resume; run without --resume to do it again", flush=True)
        finish(ranks)
        raise SystemExit(0)
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)
        if not resume:                                   # no weights, scores or ranks of an earlier run may pass for this one's
            for old in (p for name in ("log.jsonl", "metrics.json", "neutral.npy", "*.safetensors", "scores_*.npy", "full_*.npy", "ranks_*.npy", "topk_*.npy", "probe.*") for p in out.glob(name)):
                old.unlink()
            for old in ("checkpoints", "adapter", "lm", "evaluation"):
                shutil.rmtree(out / old, ignore_errors=True)
        print(f"{stage}: " + " ".join(f"{k}={v}" for k, v in vars(cfg).items() if v is not None), flush=True)
    return {"stage": stage, **vars(cfg), "dataset": data.name, "data_folder": str(data.folder), "data_hash": data.meta["hash"],
            "world": ranks.world, "versions": versions(), "commit": commit(), "machine": machine(), "started": time.time()}


def finish_run(out, record):
    """config.json is written last: a run folder with it is complete."""
    record["seconds"] = round(time.time() - record.pop("started"), 1)
    record["peak_gb"] = round(peak_gb(), 2)
    write_json(out / "config.json", record)
    return record


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


def cut_log(out, name, step, ranks):
    """Take the lines after `step` out of log.jsonl: a resumed run writes them again."""
    path = out / "log.jsonl"
    if ranks.main and path.exists():
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:                            # the line in writing when the run was killed
                continue
            if entry.get("name") != name or entry["step"] <= step:
                lines.append(line)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def stop_unless_finite(params, step, samples, data, losses=0.0):
    """Ends the run, before anything is updated, if a gradient (or a loss) is not finite. Both are sums over all processes, so all end."""
    grads = torch.stack(torch._foreach_norm([p.grad for p in params if p.grad is not None]))
    if not np.isfinite(losses).all() or not torch.isfinite(grads).all():
        shown = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
        stop(f"step {step}: {int((~torch.isfinite(grads)).sum())} of {len(grads)} gradients are not finite" + (f", the loss is {losses}" if losses else "") + f" (samples {shown} of {data.name}); nothing was "
             "updated and the last checkpoint is good; lower --lr and run again, or look at those samples")


class Log:
    """One line per step to log.jsonl, and on screen a progress bar with time left (a line now and then where there is no terminal)."""

    def __init__(self, out, total, name, ranks, unit="step", done=0):
        self.main, self.total, self.name, self.first, self.start, self.said = ranks.main, total, name, done, time.time(), time.time()
        self.file = open(out / "log.jsonl", "a", encoding="utf-8") if self.main and out else None
        self.bar = tqdm(total=total, initial=done, desc=name, unit=unit, disable=None if self.main else True, dynamic_ncols=True, leave=False)

    def step(self, done, **fields):
        if not self.main:
            return
        if self.file and fields:
            self.file.write(json.dumps({"name": self.name, "step": done, "time": round(time.time() - self.start, 2), **fields}) + "\n")
            self.file.flush()
        text = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.bar.disable and (time.time() - self.said > 15 or done == self.total):
            spent = time.time() - self.start
            left = f"{spent / max(done - self.first, 1) * (self.total - done):.0f} s left" if done < self.total else f"{spent:.0f} s"
            print(f"{self.name} {done}/{self.total} | {text} | {left}", flush=True)
            self.said = time.time()
        if self.bar.disable:
            self.bar.n = done

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()
