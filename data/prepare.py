"""Any raw log -> a prepared folder (formats and rules: data/README.md).

    python data/prepare.py ml-100k                  MovieLens 100K, fetched by itself
    python data/prepare.py beauty                   a published data set, fetched where its host
                                                    answers, else --raw FOLDER
    python data/prepare.py my-shop --raw FOLDER --noun product --verb bought
    python data/prepare.py my-shop --check          is it what it says, and free of leaks?
    python data/prepare.py smollm2-135m             the embedded LM, converted once into the cache

NAME is a data set known by name (ml-100k, ml-1m, ml-latest-small, steam, beauty, toys, games,
sports, home-kitchen, kuairec, lastfm), or your own with --raw; smollm2-135m fetches the embedded
language model.

M interactions, U users, I items (ids 1..I, 0 pads), C candidates, n samples of a split.
"""

import hashlib
import html
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import polars as pl

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data import raw as R
from delrec.data.prepared import histories, kept_as, load_data, subset
from delrec.data.raw import CONTROL
from delrec.runtime import (
    beside,
    described,
    empty,
    lock,
    put_in_place,
    read_json,
    read_npy,
    settle,
    stop,
    unlock,
    write_json,
    write_npy,
)

CANDIDATES = (15, 20, 100)
LONGEST = 250  # characters of a title
TAG, ENTITY = (
    re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->"),
    re.compile(r"&(#[0-9]{1,7}|#x[0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});"),
)


# ---------------------------------------------------------------- the protocol


def number(raw):
    """Raw ids -> the sorted distinct ids, and each row's index among them.

    The order is numeric if every id is an integer, else that of the strings' bytes; so it depends
    neither on the order of the rows nor on a hash seed.
    """
    raw = pl.Series("id", raw, dtype=pl.String)
    ids = raw.unique()
    bad = ids.filter(ids.str.contains(r"[\x00-\x1f\x7f-\x{9f}\x{2028}\x{2029}]"))
    if len(bad):
        stop(
            f"the id {bad.sort()[0]!r} holds a line break or control character, expected plain "
            "text; change it in both files"
        )
    if ids.str.contains("^-?[0-9]{1,18}$").all():
        ids = pl.DataFrame([ids, ids.cast(pl.Int64).alias("n")]).sort("n", "id")["id"]
    else:
        ids = ids.sort()
    code = pl.DataFrame([ids]).with_row_index("code")
    return ids, raw.to_frame().join(code, on="id", how="left", maintain_order="left")[
        "code"
    ].to_numpy().astype(np.int64)


def clean_title(text):
    """(title, was it cut): HTML's entities and tags, control characters, runs of blanks; at most
    LONGEST characters, cut behind a word.
    """
    for _ in range(2):  # '&amp;quot;' is common
        text = ENTITY.sub(lambda m: html.unescape(m[0]), text)
    text = " ".join(CONTROL.sub(" ", TAG.sub(" ", text)).split())
    if len(text) <= LONGEST:
        return text, False
    return text[: LONGEST + 1].rsplit(" ", 1)[0][:LONGEST], True


def k_core(user, item, core):
    """Mask (M,) of the interactions left when users and items with fewer than `core` of them are
    dropped until none is left to drop.
    """
    left = np.arange(len(user))
    while len(left):
        u, i = user[left], item[left]
        enough = (np.bincount(u)[u] >= core) & (np.bincount(i)[i] >= core)
        if enough.all():
            break
        left = left[enough]
    keep = np.zeros(len(user), bool)
    keep[left] = True
    return keep


def parts(split, ptr, when):
    """The part 0, 1, 2 (train, val, test) of every interaction (M,), and the cut points of a split
    by time.
    """
    if split == "leave-one-out":
        part = np.zeros(ptr[-1], np.int8)
        long = np.diff(ptr) > 1
        part[ptr[1:][long] - 2] = 1
        part[ptr[1:] - 1] = 2
        return part, None
    # equal times fall into the same part, so no model sees in training what happened when the first
    # validation target did
    M, clock = len(when), np.sort(when)
    cuts = [int(clock[M * 8 // 10]), int(clock[M * 9 // 10])]
    return np.searchsorted(cuts, when, side="right").astype(np.int8), cuts


def draw_candidates(target, user, touched, n_items, C, rng):
    """Candidates int32 (n, C): each row its target and C-1 items drawn uniformly without repetition
    from those its user never touched. touched: sorted user * (n_items + 1) + item. What is touched
    already or there twice is drawn again until nothing is.
    """
    out, M = np.empty((len(target), C), np.int32), len(touched)
    # most keys are not there: one look into a table of one byte a slot says so
    bits = max(int(M).bit_length() + 3, 10)

    def slot(key):
        return (key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)

    maybe = np.zeros(2**bits, bool)
    maybe[slot(touched)] = True
    for start in range(0, len(target), 65536):  # in blocks, so that memory stays small
        own = user[start : start + 65536, None] * (n_items + 1)
        others = rng.integers(1, n_items + 1, (len(own), C - 1))
        todo = np.arange(len(own))
        while len(todo):
            block = others[todo]
            key = own[todo] + block
            again = maybe[slot(key)]
            again[again] = (
                touched[np.minimum(np.searchsorted(touched, key[again]), M - 1)] == key[again]
            )
            in_order = np.sort(block, axis=1)
            double = (in_order[:, 1:] == in_order[:, :-1]).any(1)
            order = np.argsort(block[double], axis=1, kind="stable")
            in_order = np.take_along_axis(block[double], order, 1)
            twice = np.zeros(in_order.shape, bool)
            np.put_along_axis(twice, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], 1)
            again[double] |= twice
            block[again] = rng.integers(1, n_items + 1, again.sum())
            others[todo] = block
            todo = todo[again.any(1)]
        out[start : start + 65536] = rng.permuted(
            np.concatenate([target[start : start + 65536, None], others], 1), axis=1
        )
    return out


def prepare(
    log,
    name,
    out,
    split=None,
    core=5,
    seed=0,
    noun="item",
    verb="interacted with",
    ties="shuffled",
    most=None,
    overwrite=False,
):
    """Write the prepared folder `out` of a log and return its meta. log: user, item (raw ids, one
    per row), when int64 (time or position), timed (is it a time?), titles {raw item: title},
    source, raw_sha256, as data/raw.py makes it.
    """
    settle(out, "meta.json")
    # only what this script wrote, or an empty folder, is ever replaced
    if (
        out.exists()
        and not (out / "meta.json").exists()
        and (not out.is_dir() or any(out.iterdir()))
    ):
        stop(
            f"{out} exists and is no prepared folder (it has no meta.json), so it is not replaced; "
            "give another --out or remove it"
        )
    split = split or ("temporal" if log.timed else "leave-one-out")
    if split == "temporal" and not log.timed:
        stop(
            "a temporal split needs a timestamp on every row and this log has positions only; use "
            "--split leave-one-out"
        )

    # duplicates, k-core, numbering
    user_ids, user = number(log.user)
    item_ids, item = number(log.item)
    raw = {"users": len(user_ids), "items": len(item_ids), "interactions": len(user)}
    order = np.lexsort((item, log.when, user))
    user, item, when = user[order], item[order], log.when[order]
    first = np.ones(len(user), bool)
    first[1:] = (np.diff(user) != 0) | (np.diff(item) != 0) | (np.diff(when) != 0)
    user, item, when = user[first], item[first], when[first]
    # by item id, a model of ids could read the target off the id of the item before it
    if ties == "shuffled":
        order = np.lexsort((np.random.default_rng(0).random(len(user)), when, user))
        item, when = item[order], when[order]
    keep = k_core(user, item, core)
    if not keep.any():
        stop(
            f"nothing is left of {raw['interactions']:,} interactions when every user and item "
            f"must have {core}; "
            "give a larger log or a smaller --core"
        )
    left_users, user = np.unique(user[keep], return_inverse=True)
    left_items, item = np.unique(item[keep], return_inverse=True)
    user_ids, item_ids = user_ids[left_users].to_list(), item_ids[left_items].to_list()
    item, when = item + 1, when[keep]  # 0 is the padding
    M, U, n_items = len(user), len(user_ids), len(item_ids)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=U))]).astype(np.int64)

    # titles
    unknown = [i for i in item_ids if i not in log.titles]
    if unknown:
        stop(
            f"{len(unknown):,} of {n_items:,} items have no row in the item table, the first is "
            f"{unknown[0]!r}; "
            "add them, or leave out their interactions"
        )
    titles, cut = zip(*(clean_title(log.titles[i]) for i in item_ids))
    changed = sum(title != " ".join(log.titles[i].split()) for title, i in zip(titles, item_ids))
    blank = sum(not title for title in titles)
    titles = [title or f"item {i}" for title, i in zip(titles, item_ids)]

    # samples: every interaction of a part that has an earlier one of the same user
    part, cuts = parts(split, ptr, when)
    has_history = np.arange(M) != ptr[user]
    samples = {
        s: np.flatnonzero((part == n) & has_history) for n, s in enumerate(("train", "val", "test"))
    }
    for n, s in enumerate(("val", "test") if most else ()):
        samples[s] = samples[s][subset(len(samples[s]), most, [0, n])]
    for s, index in samples.items():
        if not len(index):
            stop(
                f"the {split} split leaves no {s} sample of {M:,} interactions of {U:,} users; "
                "give a larger log, a smaller --core or another --split"
            )
    trained = np.zeros(n_items + 1, bool)
    trained[item[part == 0]] = True

    # candidates
    touched = np.unique(user * (n_items + 1) + item)
    free = n_items - np.bincount(touched // (n_items + 1))
    arrays = (
        {"items": item.astype(np.int32), "ptr": ptr}
        | ({"times": when} if log.timed else {})
        | samples
    )
    # training negatives must not tell what a user will touch later
    known = np.unique((user * (n_items + 1) + item)[part == 0])
    for C in CANDIDATES:
        fewest = min(int(free[user[samples[s]]].min()) for s in samples)
        if fewest < C - 1:
            line = (
                f"{C} candidates need {C - 1} items a user never touched, and of {n_items:,} items "
                f"one user leaves only {fewest}"
            )
            if min(CANDIDATES) == C:
                stop(f"{line}; give a log with more items")
            print(f"{line}; candidates_*_{C}.npy are not written")
            continue
        for n, s in enumerate(("val", "test") if C > 20 else ("val", "test", "train")):
            rng = np.random.default_rng([seed, n, C])
            arrays[f"candidates_{s}_{C}"] = draw_candidates(
                item[samples[s]],
                user[samples[s]],
                known if s == "train" else touched,
                n_items,
                C,
                rng,
            )

    text = {"titles": titles, "raw_items": item_ids, "raw_users": user_ids}
    # of what a model can see; not of the raw ids nor of where the log came from
    digest = hashlib.sha256()
    for key in sorted(arrays):
        digest.update(f"{key} {arrays[key].dtype.str} {arrays[key].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[key]).data)
    digest.update("\n".join(titles).encode())
    meta = {
        "name": name,
        "source": log.source,
        "raw_sha256": log.raw_sha256,
        "raw": raw,
        "duplicates": int((~first).sum()),
        "users": U,
        "items": n_items,
        "interactions": M,
        "sparsity": round(1 - len(touched) / (U * n_items), 6),
        "core": core,
        "seed": seed,
        "max_eval": most,
        "ties_by": ties,
        "split": split,
        "cuts": cuts,
        "order": "timestamp" if log.timed else "position",
        "samples": {s: len(index) for s, index in samples.items()},
        "cold": {"items": int((~trained[1:]).sum())}
        | {s: int((~trained[item[samples[s]]]).sum()) for s in ("val", "test")},
        "repeats": round(1 - len(touched) / M, 6),
        "ties": int(((np.diff(when) == 0) & (np.diff(user) == 0)).sum()),
        "titles": {
            "blank": blank,
            "duplicate": n_items - len(set(titles)),
            "cleaned": changed,
            "cut": sum(cut),
            "words": round(sum(len(t.split()) for t in titles) / n_items, 2),
            "characters": round(sum(map(len, titles)) / n_items, 1),
        },
        "candidates": [C for C in CANDIDATES if f"candidates_test_{C}" in arrays],
        "words": {"noun": noun, "verb": verb},
        "hash": digest.hexdigest()[:16],
    }

    if out.is_dir() and any(out.iterdir()):
        other, keep = another(meta, text, out, overwrite)
        if not other:
            print(
                f"{out} holds this preparation already (hash {meta['hash']}): nothing was replaced"
            )
            return meta
        print(
            f"{out} is replaced ({', '.join(other)})"
            + (f"; the earlier one stays as {keep}" if keep else "")
        )
    else:
        keep = None
    write_prepared(out, arrays, text, meta, keep)
    return meta


def another(meta, text, out, overwrite):
    """(in what the preparation in `out` differs from a new one, where to keep it: None if no run
    uses it). One that differs is refused without `overwrite`.
    """
    old = read_json(out / "meta.json")
    other = [key for key in ("hash", "name", "words") if old.get(key) != meta[key]]
    for key in ("raw_items", "raw_users"):
        lines = "".join(f"{line}\n" for line in text[key])
        if not (out / f"{key}.txt").exists() or (out / f"{key}.txt").read_bytes() != lines.encode():
            other.append(key.replace("_", " ids of "))
    runs = runs_on(old["hash"]) if "hash" in other else []
    keep = kept_as(out, old["hash"]) if runs else None
    if other and not overwrite:
        differs = (
            f"hash {old['hash']}, this one {meta['hash']}"
            if "hash" in other
            else f"other {', '.join(other)}"
        )
        stop(
            f"{out} holds another preparation ({differs}); --overwrite replaces it"
            + (
                f" and keeps the earlier one as {keep} for the {len(runs)} runs that use it"
                if keep
                else ""
            )
            + ", --out names another folder"
        )
    return other, None if keep is None or keep.exists() else keep


def runs_on(digest):
    """The folders under runs/ of what was trained on the preparation of that hash, finished or
    not.
    """
    found, said = set(), f'"data_hash": "{digest}"'
    for folder, _, names in os.walk(runtime.ROOT / "runs", followlinks=True):
        for name in {"config.json", "started.json", "meta.json"} & set(names):
            if said in (Path(folder) / name).read_text(encoding="utf-8", errors="replace"):
                found.add(folder)
    return sorted(found)


def write_prepared(out, arrays, text, meta, keep):
    """Writes a prepared folder beside `out` and puts it there when it is whole; what stood there
    goes, or to `keep`.
    """
    new = beside(out, "unfinished")
    lock(new)
    try:
        empty(new)  # of a run that was killed
        for key, array in arrays.items():
            write_npy(new / f"{key}.npy", array)
        for key, lines in text.items():
            (new / f"{key}.txt").write_text(
                "".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n"
            )
        write_json(new / "meta.json", meta)
        put_in_place(out, keep)
    except OSError as bad:
        stop(f"could not write {out}: {bad}; free the space or give another --out")
    finally:
        if out.exists() or not (new / "meta.json").exists():
            shutil.rmtree(new, ignore_errors=True)  # else the next command puts it in its place
        unlock(new)


def summary(meta, out):
    """The table at the end."""
    m = SimpleNamespace(**meta)

    def share(n, of):
        return f"{n:,} ({n / of:.1%})"

    def counts(users, items, interactions):
        return f"{users:,} users, {items:,} items, {interactions:,} interactions"

    cold = [f"{s} targets {share(m.cold[s], m.samples[s])}" for s in ("val", "test")]
    rows = [
        ("name", m.name),
        ("source", m.source),
        ("raw", f"{counts(**m.raw)}, {m.duplicates:,} of them duplicates"),
        (
            f"after the {m.core}-core",
            f"{counts(m.users, m.items, m.interactions)}, sparsity {m.sparsity:.4%}",
        ),
        (
            "split",
            f"{m.split}, cut at times {m.cuts[0]} and {m.cuts[1]}"
            if m.cuts
            else f"{m.split}, by {m.order}",
        ),
        ("samples", ", ".join(f"{s} {n:,}" for s, n in m.samples.items())),
        ("unseen in training", ", ".join([f"items {share(m.cold['items'], m.items)}", *cold])),
        ("repeats", f"{m.repeats:.2%} of the interactions are with an item the user had before"),
        (
            "ties",
            f"{share(m.ties, m.interactions)} share their {m.order} with the user's previous one",
        ),
        (
            "titles",
            f"{m.titles['words']:.1f} words, {m.titles['characters']:.0f} characters on average; "
            f"{m.titles['blank']:,} blank (now 'item ID'), "
            f"{m.titles['duplicate']:,} duplicate, {m.titles['cleaned']:,} cleaned, "
            f"{m.titles['cut']:,} cut to {LONGEST} characters",
        ),
        ("candidates", ", ".join(map(str, m.candidates))),
        ("hash", m.hash),
        ("folder", out),
    ]
    return "\n".join(f"{key:<20}{value}" for key, value in rows)


def check(data):
    """What must hold of a prepared folder, as lines (what, how many break it, of how many): leaks,
    candidates, order. None may break.
    """
    n_items, own = data.n_items, np.repeat(np.arange(data.n_users), np.diff(data.ptr))
    out, items = [], np.asarray(data.items, np.int64)

    def rule(what, broken):
        return out.append((what, int(np.count_nonzero(broken)), int(np.size(broken))))

    same_user = own[1:] == own[:-1]
    if data.times is not None:
        rule(
            "interactions stand in time order within their user",
            (np.diff(data.times) < 0) & same_user,
        )
    rule("items are numbered 1..I and each has a title", (items < 1) | (items > n_items))
    samples = {s: np.asarray(getattr(data, s)) for s in ("train", "val", "test")}
    everything = np.concatenate(list(samples.values()))
    rule("a sample belongs to one part only", np.bincount(everything, minlength=len(items)) > 1)
    rule("a sample has a history", everything == data.ptr[own[everything]])
    for s, index in samples.items():
        h = histories(data, index[:20000], 50)
        at = index[:20000, None] - np.arange(50, 0, -1)
        rule(
            f"{s}: a history holds what came before its target, of the same user, and nothing else",
            (h > 0) & ((at < data.ptr[own[index[:20000]]][:, None]) | (at >= index[:20000, None])),
        )
    if data.meta["split"] == "temporal":
        low, high = data.meta["cuts"]
        times = np.asarray(data.times)
        for s, wrong in (
            ("train", times[samples["train"]] >= low),
            ("val", (times[samples["val"]] < low) | (times[samples["val"]] >= high)),
            ("test", times[samples["test"]] < high),
        ):
            rule(f"{s}: every target falls into its part of time", wrong)
    else:
        last = data.ptr[own + 1] - 1
        rule(
            "test holds last items, val second last ones",
            np.concatenate(
                [
                    samples["test"] != last[samples["test"]],
                    samples["val"] != last[samples["val"]] - 1,
                ]
            ),
        )
    touched = np.unique(own * (n_items + 1) + items)
    known = (
        np.unique((own * (n_items + 1) + items)[samples["train"]])
        if len(samples["train"])
        else touched[:0]
    )
    titles = np.unique(data.titles, return_inverse=True)[1]
    for path in sorted(data.folder.glob("candidates_*.npy")):
        s, C = path.stem.split("_")[1:]
        cand, target = read_npy(path), items[samples[s]]
        rule(
            f"{path.name}: a row for every sample, of the right width",
            np.array([cand.shape != (len(target), int(C))]),
        )
        cand = np.asarray(cand[:100000], np.int64)
        rule(f"{path.name}: its items are 1..I", (cand < 1) | (cand > n_items))
        cand = np.clip(cand, 1, n_items)
        target, user = target[: len(cand)], own[samples[s]][: len(cand)]
        rule(
            f"{path.name}: the target stands in its row exactly once",
            (cand == target[:, None]).sum(1) != 1,
        )
        rule(
            f"{path.name}: no item stands in a row twice",
            (np.diff(np.sort(cand, 1), axis=1) == 0).any(1),
        )
        have = known if s == "train" else touched
        key = user[:, None] * (n_items + 1) + cand
        there = have[np.minimum(np.searchsorted(have, key), len(have) - 1)] == key
        rule(
            f"{path.name}: nothing "
            f"{'the user touched in training' if s == 'train' else 'the user ever touched'} "
            "but "
            "the target",
            (there & (cand != target[:, None])).any(1),
        )
        twin = ((titles[cand] == titles[target][:, None]) & (cand != target[:, None])).any(1)
        out.append(
            (
                f"{path.name}: rows with another item of the target's title (counted, not an "
                "error)",
                -int(twin.sum()),
                len(twin),
            )
        )
    return out


def pictures(data, path):
    """One page of histograms: history lengths, popularity, words of titles, interactions over
    time.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    m, (figure, axes) = data.meta, plt.subplots(2, 2, figsize=(11, 8))
    lengths, counts = (
        np.diff(data.ptr),
        np.sort(np.bincount(data.items, minlength=data.n_items + 1)[1:])[::-1],
    )
    axes[0, 0].hist(
        lengths, np.unique(np.geomspace(1, lengths.max() + 1, 40).astype(int)), color="#4477aa"
    )
    axes[0, 0].set(
        title="interactions of a user",
        xscale="log",
        yscale="log",
        xlabel=f"median {int(np.median(lengths))}, most {lengths.max():,}",
        ylabel="users",
    )
    axes[0, 1].plot(np.arange(1, len(counts) + 1), counts, color="#4477aa")
    axes[0, 1].set(
        title="popularity",
        xscale="log",
        yscale="log",
        ylabel="interactions",
        xlabel="items, most popular first; the first tenth has "
        f"{counts[: max(len(counts) // 10, 1)].sum() / counts.sum():.0%}",
    )
    words = np.array([len(re.findall(r"\w+|[^\w\s]", t)) for t in data.titles[1:]])
    axes[1, 0].hist(words, np.arange(words.max() + 2) - 0.5, color="#4477aa")
    axes[1, 0].set(
        title="words and marks of a title",
        ylabel="items",
        xlabel=f"median {int(np.median(words))}, most {words.max()}",
    )
    if data.times is not None:
        axes[1, 1].hist(np.asarray(data.times), 60, color="#4477aa")
        for cut in m["cuts"] or []:
            axes[1, 1].axvline(cut, color="#cc3311")
        axes[1, 1].set(
            title="interactions over time"
            + (" (red: where validation and test begin)" if m["cuts"] else ""),
            xlabel="time",
            ylabel="interactions",
        )
    else:
        axes[1, 1].axis("off")
        axes[1, 1].text(0.5, 0.5, "no times, only an order", ha="center")
    figure.suptitle(
        f"{m['name']}: {m['users']:,} users, {m['items']:,} items, {m['interactions']:,} "
        f"interactions, sparsity {m['sparsity']:.2%}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@click.command(**described(__doc__))
@click.argument("name")
@click.option(
    "--raw",
    type=click.Path(path_type=Path),
    help="folder with the raw files: a published data set's, or your own "
    "interactions.csv[.gz|.parquet] and items.csv[.gz], or RecBole's .inter and .item",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="the prepared folder  [default: data/NAME]"
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="replace another preparation in --out, once the new one is whole; while runs use the "
    "earlier one it stays, as NAME@HASH",
)
@click.option(
    "--check",
    "checking",
    is_flag=True,
    help="prepare nothing: check the prepared folder for leaks and wrong candidates; exit code "
    "1 if there are any",
)
@click.option(
    "--core",
    default=5,
    type=click.IntRange(min=1),
    help="every user and item keeps at least so many interactions",
)
@click.option(
    "--split",
    type=click.Choice(["temporal", "leave-one-out"]),
    help="[default: temporal where times exist, else leave-one-out]",
)
@click.option(
    "--ties",
    default="shuffled",
    type=click.Choice(["shuffled", "item"]),
    help="order of a user's interactions of equal time: drawn once, or by item id (which tells "
    "a model of ids the answer)",
)
@click.option("--seed", default=0, type=click.IntRange(min=0), help="of the candidates")
@click.option(
    "--max-eval",
    "most",
    type=click.IntRange(min=1),
    help="at most so many validation and test samples each, drawn once; the part they are drawn "
    "from stays what it is",
)
@click.option(
    "--noun",
    help="what an item is called in prompts, singular  [default: the data set's own, else item]",
)
@click.option(
    "--verb",
    help="what a user did with it, past tense  [default: the data set's own, else interacted with]",
)
@click.option(
    "--min-watch",
    type=click.FloatRange(0, min_open=True),
    help="kuairec: times its length that a video must be watched to count  [default: 2]",
)
@click.option("--user-column", default="user", help="name of the column in your file")
@click.option("--item-column", default="item", help="the same, in both files")
@click.option("--time-column", default="timestamp", help="the same")
@click.option("--position-column", default="position", help="the same")
@click.option("--title-column", default="title", help="the same")
def main(
    name,
    raw,
    out,
    overwrite,
    checking,
    core,
    split,
    ties,
    seed,
    most,
    noun,
    verb,
    min_watch,
    user_column,
    item_column,
    time_column,
    position_column,
    title_column,
):
    """Prepare the data set NAME."""
    start = time.time()
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*" + r"(@[0-9a-f]+)*" * checking, name):
        stop(
            f"the name {name!r} cannot name a folder; use letters, digits, '.', '_' and '-', and "
            "no dot in front"
        )
    out = out or runtime.ROOT / "data" / name
    if checking:
        data = load_data(str(out))
        lines = check(data)
        for what, broken, n in lines:
            print(f"{'ok  ' if broken <= 0 else 'BAD '} {what}: {abs(broken):,} of {n:,}")
        bad = sum(broken > 0 for _, broken, _ in lines)
        if bad:
            stop(f"{out}: {bad} of {len(lines)} checks failed; prepare it again")
        print(f"{out}: all {len(lines)} checks hold")
        return
    if raw is None and name == "smollm2-135m":
        print(R.fetch_llm())
        return
    known = R.SOURCES.get(name)
    own = raw and any(
        raw.glob(pattern) and sorted(raw.glob(pattern)) for pattern in ("interactions.*", "*.inter")
    )
    if raw is None and known is None and name != "ml-100k":
        stop(
            f"there is no data set {name!r}, only {', '.join(['ml-100k', *R.SOURCES])} (and the "
            "language model smollm2-135m); "
            "for your own data give --raw FOLDER with interactions.csv and items.csv"
        )
    if raw and out.resolve() in (raw.resolve(), *raw.resolve().parents):
        stop(
            f"the raw folder {raw} lies in the folder to be written, {out}, which would replace "
            "it; give another --out"
        )
    columns = {
        "user": user_column,
        "item": item_column,
        "timestamp": time_column,
        "position": position_column,
        "title": title_column,
    }
    log = (
        R.read_source(name, raw, min_watch)
        if known and not own
        else R.read_log(raw, columns)
        if raw
        else R.fetch_ml100k()
    )
    default = (
        (known.noun, known.verb)
        if known
        else ("movie", "watched")
        if raw is None
        else ("item", "interacted with")
    )
    words = [
        " ".join(CONTROL.sub(" ", word or usual).split()) or usual
        for word, usual in zip((noun, verb), default)
    ]
    meta = prepare(log, name, out, split, core, seed, *words, ties, most, overwrite)
    print(summary(meta, out))
    after = (meta["users"], meta["items"], meta["interactions"])
    if known and not own and known.after and core == 5 and after != known.after:
        log.notes.append(
            "after the 5-core this data set usually has {:,} users, {:,} items, {:,} "
            "interactions".format(*known.after)
        )
    for note in log.notes:
        print(f"note: {note}")
    pictures(load_data(str(out)), out / "pictures.png")
    print(f"prepared in {time.time() - start:.1f} s; pictures in {out / 'pictures.png'}")


if __name__ == "__main__":
    main()
