"""A synthetic log of the size and shape of Amazon Home & Kitchen 2018, to see how prepare.py and
train_backbone.py take it.

    python data/synthetic.py FOLDER                   # 9,767,606 users, 1,286,050 items,
                                                      # 21,928,568 ratings
    python data/synthetic.py FOLDER --divide 100      # a hundredth of each

Writes FOLDER/Home_and_Kitchen.csv (item,user,rating,time, ordered by item, times whole days) and
FOLDER/meta_Home_and_Kitchen.json.gz, as the publisher's files are laid out; prepare them with:

    python data/prepare.py home-kitchen --raw FOLDER

What is random: how often a user rates (a power law), which items (Zipf's law, and each item at
least once; every fourth step goes to an item next to the one before, so that there is an order to
learn), when (more each year), and titles of 3 to 25 words.

U users, I items, M interactions.
"""

import gzip
import json
from pathlib import Path

import click
import numpy as np
import polars as pl

USERS = 9_767_606
ITEMS = 1_286_050
INTERACTIONS = 21_928_568
VOCABULARY = """
stainless steel kitchen set piece cotton pillow case queen king size sheet bamboo cutting
board knife glass storage container lid vacuum cleaner filter replacement coffee maker cup
mug tea kettle ceramic non stick frying pan wall art canvas print curtain blackout panel
rug bath towel shower hook organizer closet hanger velvet memory foam mattress topper
protector waterproof blanket throw soft fleece lamp shade clock digital measuring spoon
silicone mold baking tray rack wine bottle opener holder basket laundry hamper foldable
portable mini large small white black grey blue red green gold silver vintage modern
classic premium deluxe professional home office garden gift pack
"""
WORDS = VOCABULARY.split()


def codes(n: int, prefix: bytes, length: int) -> pl.Series:
    """n distinct ids of `length` characters, in no particular order of their numbers: Strings."""
    alphabet = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
    value = np.arange(n, dtype=np.int64) * 1_000_003 + 7  # spread over the digits
    digits = np.empty((n, length), np.uint8)
    digits[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    for i in range(length - 1, len(prefix) - 1, -1):
        digits[:, i] = alphabet[value % 36]
        value //= 36
    return pl.Series(
        digits.view(f"S{length}").ravel().astype(f"U{length}").tolist(), dtype=pl.String
    )


def ratings_per_user(U: int, M: int, rng: np.random.Generator) -> np.ndarray:
    """How often each user rates: int64 (U,), at least once, M in all. P(more than n) = n^-1.75."""
    often = np.minimum((rng.random(U) ** (-1 / 1.75)).astype(np.int64), 2000)
    while (gap := M - int(often.sum())) != 0:
        pick = rng.integers(0, U, min(abs(gap), U))
        if gap > 0:  # who rates much rates more
            np.add.at(often, pick[rng.random(len(pick)) < often[pick] / (often[pick] + 3)][:gap], 1)
        else:
            pick = np.unique(pick[often[pick] > 1])[:-gap]
            often[pick] -= 1
    return often


def items_of(user: np.ndarray, n_items: int, rng: np.random.Generator) -> np.ndarray:
    """The item of each rating: int64 (M,), 0..I-1, P(rank) about 1 / (rank + 1).

    user: (M,), equal ones side by side.
    """
    M = len(user)
    rank = (n_items ** rng.random(M) - 1).astype(np.int64) * n_items // max(n_items - 1, 1)
    item = np.minimum(rank, n_items - 1)
    follows = np.zeros(M, bool)
    follows[1:] = (user[1:] == user[:-1]) & (rng.random(M - 1) < 0.25)
    item[follows] = (item[np.flatnonzero(follows) - 1] + 1) % n_items
    place = rng.permutation(M)[:n_items]
    item[place] = np.arange(n_items)  # each at least once
    return rng.permutation(n_items)[item]  # popularity says nothing about the id


def interactions(
    U: int, n_items: int, M: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(user, item, time), int64 (M,) each, ordered by item."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(U), ratings_per_user(U, M, rng))
    item = items_of(user, n_items, rng)
    day = 10_000 + (7_800 * rng.random(M) ** 0.25).astype(np.int64)
    day = day[np.lexsort((day, user))]  # a user's items follow each other in time
    order = np.argsort(item, kind="stable")
    return user[order], item[order], day[order] * 86400


def write_meta(path: Path, items: pl.Series, seed: int) -> None:
    """Writes a record with a title for every item."""
    n_items, rng = len(items), np.random.default_rng([seed, 1])
    words = rng.choice(len(WORDS), 14 * n_items)
    ends = np.cumsum(rng.integers(3, 26, n_items))
    words = np.resize(words, ends[-1])
    with gzip.open(path, "wt", compresslevel=1) as f:
        for code, start, end in zip(items, np.concatenate([[0], ends[:-1]]), ends):
            record = {
                "category": ["Home & Kitchen"],
                "description": ["A description of what it is, what it does and how to clean it."],
                "title": " ".join(WORDS[w].capitalize() for w in words[start:end]),
                "brand": "Brand",
                "price": "$9.99",
                "asin": code,
            }
            f.write(json.dumps(record) + "\n")


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--divide", default=1, type=click.IntRange(1), help="a log so many times smaller")
@click.option("--seed", default=0, type=click.IntRange(0), help="of everything random")
def main(folder: Path, divide: int, seed: int) -> None:
    """Write a synthetic log of Home & Kitchen's size into FOLDER."""
    U, n_items, M = USERS // divide, ITEMS // divide, INTERACTIONS // divide
    folder.mkdir(parents=True, exist_ok=True)
    user, item, time = interactions(U, n_items, M, seed)
    users, items = codes(U, b"A", 14), codes(n_items, b"B0", 10)
    pl.DataFrame(
        {"item": items[item], "user": users[user], "rating": np.full(M, "5.0"), "time": time}
    ).write_csv(folder / "Home_and_Kitchen.csv", include_header=False)
    write_meta(folder / "meta_Home_and_Kitchen.json.gz", items, seed)
    print(f"{folder}: {U:,} users, {n_items:,} items, {M:,} interactions")


if __name__ == "__main__":
    main()
