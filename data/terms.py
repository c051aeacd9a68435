"""Under which terms the published data sets may be used, as far as it is known here."""

import re
from dataclasses import dataclass

UNKNOWN = "unknown, look before you share"
MOVIELENS = (
    "MovieLens, GroupLens: research use, no redistribution without permission; cite Harper and "
    "Konstan, TiiS 2015"
)
AMAZON_2014 = "Amazon reviews of 2014: research use; cite McAuley et al., SIGIR 2015"
# by the name that data/sources.py gives
TERMS = {
    "beauty": AMAZON_2014,
    "toys": AMAZON_2014,
    "games": AMAZON_2014,
    "sports": AMAZON_2014,
    "home-kitchen": "Amazon reviews of 2018: research use; cite Ni et al., EMNLP 2019",
    "steam": "no explicit licence, look before you share; cite Kang and McAuley, ICDM 2018",
    "kuairec": "CC BY-SA 4.0; cite Gao et al., CIKM 2022",
    "lastfm": "non-commercial use; cite Cantador et al., HetRec 2011",
}


@dataclass(frozen=True)
class Terms:
    """Under which terms data may be used."""

    said: str
    known: bool
    forbidden: bool  # to be redistributed without permission


def terms_of(meta: dict) -> Terms:
    """The terms of a data set, by its preparation's meta.json. Data that call themselves MovieLens
    are taken to be.
    """
    name, source = meta["name"], str(meta.get("source", "")).lower()
    if re.match(r"ml-(\d|latest)", name) or "movielens" in f"{name} {source}".lower():
        return Terms(MOVIELENS, known=True, forbidden=True)
    if name in TERMS:
        return Terms(TERMS[name], known="look before" not in TERMS[name], forbidden=False)
    if source.startswith("amazon reviews"):
        return Terms("Amazon reviews: research use; cite the authors of the release", True, False)
    return Terms(UNKNOWN, known=False, forbidden=False)
