"""The published data sets known by name: where they come from, what they must count (their terms
stand in data/terms.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from delrec.data.amazon import read_amazon
from delrec.data.fetch import download
from delrec.data.log import Log
from delrec.data.movielens import read_movielens
from delrec.data.published import read_kuairec, read_lastfm, read_steam
from delrec.runtime import CACHE

SNAP = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
UCSD = "https://mcauleylab.ucsd.edu/public_datasets"
MOVIELENS = "https://files.grouplens.org/datasets"


@dataclass
class Source:
    """A published data set."""

    read: Callable[[Path, object], Log]  # read(folder, what) makes the log
    what: object  # the reader's second argument: a category, a release, a bound, or None
    urls: list[str]  # the files to fetch
    page: str  # where a person finds them
    noun: str  # what an item is called in prompts
    verb: str  # what a user did with it
    interactions: int | None = None  # rows of the published log, where we know them
    after: tuple[int, int, int] | None = None  # users, items, interactions of its known 5-core


def amazon(category: str | tuple[str, ...]) -> Source:
    """A category of Amazon's reviews, of any year, from files the user has."""
    return Source(
        read=read_amazon,
        what=category,
        urls=[],
        page="https://amazon-reviews-2023.github.io",
        noun="product",
        verb="bought",
    )


def amazon_2014(
    category: str, interactions: int, after: tuple[int, int, int], *later: str
) -> Source:
    """A category of Amazon's reviews as published in 2014. later: what later releases call it."""
    return replace(
        amazon((category, *later)),
        urls=[f"{SNAP}/ratings_{category}.csv", f"{SNAP}/meta_{category}.json.gz"],
        page="https://cseweb.ucsd.edu/~jmcauley/datasets/amazon/links.html",
        interactions=interactions,
        after=after,
    )


def movielens(name: str, interactions: int | None) -> Source:
    """A release of MovieLens."""
    return Source(
        read=read_movielens,
        what=name,
        urls=[f"{MOVIELENS}/movielens/{name}.zip"],
        page="https://grouplens.org/datasets/movielens/",
        noun="movie",
        verb="watched",
        interactions=interactions,
    )


SOURCES = {
    "ml-1m": movielens("ml-1m", 1_000_209),
    "ml-latest-small": movielens("ml-latest-small", 100_836),
    "steam": Source(
        read=read_steam,
        what=None,
        urls=[
            f"{UCSD}/data/steam/steam_reviews.json.gz",
            f"{UCSD}/data/steam/steam_games.json.gz",
        ],
        page="https://cseweb.ucsd.edu/~jmcauley/datasets.html#steam_data",
        noun="game",
        verb="played",
        interactions=7_793_069,
    ),
    "beauty": amazon_2014(
        "Beauty",
        2_023_070,
        (22_363, 12_101, 198_502),
        "All_Beauty",
        "Beauty_and_Personal_Care",
    ),
    "toys": amazon_2014("Toys_and_Games", 2_252_771, (19_412, 11_924, 167_597)),
    "games": amazon_2014("Video_Games", 1_324_753, (24_303, 10_672, 231_780)),
    "sports": amazon_2014("Sports_and_Outdoors", 3_268_695, (35_598, 18_357, 296_337)),
    "home-kitchen": Source(
        read=read_amazon,
        what="Home_and_Kitchen",
        urls=[
            f"{UCSD}/data/amazon_v2/categoryFilesSmall/Home_and_Kitchen.csv",
            f"{UCSD}/data/amazon_v2/metaFiles2/meta_Home_and_Kitchen.json.gz",
        ],
        page="https://nijianmo.github.io/amazon/",
        noun="product",
        verb="bought",
        interactions=21_928_568,
    ),
    "kuairec": Source(
        read=read_kuairec,
        what=2.0,
        urls=["https://zenodo.org/records/18164998/files/KuaiRec.zip"],
        page="https://kuairec.com",
        noun="video",
        verb="watched",
    ),
    "lastfm": Source(
        read=read_lastfm,
        what=None,
        urls=[f"{MOVIELENS}/hetrec2011/hetrec2011-lastfm-2k.zip"],
        page="https://grouplens.org/datasets/hetrec-2011/",
        noun="artist",
        verb="tagged",
    ),
}


def read_source(name: str, source: Source, folder: Path | None, min_watch: float | None) -> Log:
    """The log of a published data set from a folder, or fetched where there is none. min_watch:
    of kuairec, how many times its length a video must be watched; None: as often as usual.
    """
    if folder is None:
        folder = CACHE / "raw" / name
        for url in source.urls:
            if not (folder / Path(url).name).exists():
                download(url, folder / Path(url).name, source.page)
    log = source.read(folder, source.what if min_watch is None else min_watch)
    found = len(log.rows.when)
    if source.interactions and found != source.interactions:
        log.notes.append(
            f"the log has {found:,} interactions, as published it had {source.interactions:,}: "
            "another release, or another file"
        )
    return log
