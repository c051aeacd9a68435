"""What a preparation says of itself: meta.json and the table that prepare.py prints."""

import hashlib
from pathlib import Path

import numpy as np

from delrec.data.log import Log
from delrec.data.rules import CANDIDATES, Preparation, Rules
from delrec.data.titles import LONGEST


def meta_of(
    name: str, log: Log, rules: Rules, words: dict[str, str], made: Preparation
) -> dict[str, object]:
    """The entries of meta.json (their meaning: data/README.md). words: noun and verb of the
    prompts.
    """
    left, samples = made.left, made.samples
    M, U, n_items = len(left.item), len(left.user_ids), left.n_items
    trained = np.zeros(n_items + 1, bool)
    trained[left.item[samples.part == 0]] = True
    cold = {"items": int((~trained[1:]).sum())}
    for s in ("val", "test"):
        cold[s] = int((~trained[left.item[samples.of[s]]]).sum())
    return {
        "name": name,
        "source": log.source,
        "raw_sha256": log.raw_sha256,
        "raw": left.raw,
        "duplicates": left.duplicates,
        "users": U,
        "items": n_items,
        "interactions": M,
        "sparsity": round(1 - len(left.pairs) / (U * n_items), 6),
        "core": rules.core,
        "seed": rules.seed,
        "max_eval": rules.max_eval,
        "ties_by": rules.ties,
        "split": rules.split,
        "cuts": samples.cuts,
        "order": "timestamp" if log.rows.timed else "position",
        "samples": {s: len(index) for s, index in samples.of.items()},
        "cold": cold,
        "repeats": round(1 - len(left.pairs) / M, 6),
        "ties": int(((np.diff(left.when) == 0) & (np.diff(left.user) == 0)).sum()),
        "titles": title_counts(made),
        "columns": [] if made.columns is None else made.columns.columns,
        "candidates": [C for C in CANDIDATES if f"candidates_test_{C}" in made.arrays],
        "words": words,
        "hash": digest_of(made)[:16],
    }


def title_counts(made: Preparation) -> dict[str, float]:
    """How many titles are blank, duplicate, cleaned and cut, and their mean length."""
    titles = made.titles
    count = len(titles.text)
    return {
        "blank": titles.blank,
        "duplicate": count - len(set(titles.text)),
        "cleaned": titles.cleaned,
        "cut": titles.cut,
        "words": round(sum(len(title.split()) for title in titles.text) / count, 2),
        "characters": round(sum(map(len, titles.text)) / count, 1),
    }


def digest_of(made: Preparation) -> str:
    """The sha256 of what a model can see; not of the raw ids nor of where the log came from."""
    digest = hashlib.sha256()
    for key in sorted(made.arrays):
        array = made.arrays[key]
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    digest.update("\n".join(made.titles.text).encode())
    return digest.hexdigest()


def summary(meta: dict, out: Path) -> str:
    """The table that prepare.py prints at the end."""
    samples, cold, titles = meta["samples"], meta["cold"], meta["titles"]
    split = f"{meta['split']}, by {meta['order']}"
    if meta["cuts"]:
        split = f"{meta['split']}, cut at times {meta['cuts'][0]} and {meta['cuts'][1]}"
    unseen = [f"items {share(cold['items'], meta['items'])}"]
    unseen += [f"{s} targets {share(cold[s], samples[s])}" for s in ("val", "test")]
    rows = [
        ("name", meta["name"]),
        ("source", meta["source"]),
        ("raw", f"{counts(meta['raw'])}, {meta['duplicates']:,} of them duplicates"),
        (f"after the {meta['core']}-core", f"{counts(meta)}, sparsity {meta['sparsity']:.4%}"),
        ("split", split),
        ("samples", ", ".join(f"{s} {n:,}" for s, n in samples.items())),
        ("unseen in training", ", ".join(unseen)),
        (
            "repeats",
            f"{meta['repeats']:.2%} of the interactions are with an item the user had before",
        ),
        (
            "ties",
            f"{share(meta['ties'], meta['interactions'])} share their {meta['order']} with the "
            "user's previous one",
        ),
        (
            "titles",
            f"{titles['words']:.1f} words, {titles['characters']:.0f} characters on average; "
            f"{titles['blank']:,} blank (now 'item ID'), "
            f"{titles['duplicate']:,} duplicate, {titles['cleaned']:,} cleaned, "
            f"{titles['cut']:,} cut to {LONGEST} characters",
        ),
        *([("item columns", ", ".join(meta["columns"]))] if meta["columns"] else []),
        ("candidates", ", ".join(map(str, meta["candidates"]))),
        ("hash", meta["hash"]),
        ("folder", out),
    ]
    return "\n".join(f"{key:<20}{value}" for key, value in rows)


def share(n: int, of: int) -> str:
    """A count and what part of the whole it is."""
    return f"{n:,} ({n / of:.1%})"


def counts(of: dict) -> str:
    """How many users, items and interactions."""
    return f"{of['users']:,} users, {of['items']:,} items, {of['interactions']:,} interactions"
