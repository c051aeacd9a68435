"""What people name, as items: a title however it is written, or an item's id in the raw log.

A title is looked for as it stands in titles.txt; then without case, spaces and the way its letters
are composed; then as data/prepare.py would have cleaned it. Cleaning is a function of the title
alone, so a title is found as it stood in the raw file without keeping that file's titles.
"""

import difflib
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from delrec.data.prepared import Data, raw_item_ids
from delrec.data.titles import ARTICLE_IN_ANY_CASE, LONGEST, clean_title, plain_title

# a keyboard's and a typesetter's form of the same sign
ALIKE = str.maketrans("‘’‚‛ʼ´`“”„‟‐‑‒–—―−", "'''''''\"\"\"\"-------")
PAIRS = 128  # kinds of pairs of letters that titles are compared by
LONGEST_RAW = 20_000  # characters of a name that are read
MOST_KEPT = 100_000  # names whose items are remembered
LONGEST_KEPT = 500  # characters of a name that is remembered: a question may hold a megabyte
SHORTEST_CUT = 60  # characters; a title that is cut has more, however its letters are composed

# ---------------------------------------------------------------- forms of a text


def folded(text: str) -> str:
    """The text in small letters, composed, its words one blank apart."""
    text = " ".join(text.split()).casefold()
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def loosened(text: str) -> str:
    """The folded text with plain quotes, dashes and widths of letters, without what is not seen."""
    if text.isascii() and "`" not in text:
        return folded(text)
    text = unicodedata.normalize("NFKC", text.translate(ALIKE)).translate(ALIKE)
    seen = (c for c in text if unicodedata.category(c) != "Cf" and c not in "\ufe0e\ufe0f")
    return folded("".join(seen))


def cleaned_forms(text: str) -> list[str]:
    """The loosened text as data/prepare.py cleans it, with its article where it is and in front."""
    text = text[:LONGEST_RAW]
    clean, moved = clean_title(text)[0], article_in_front(" ".join(text.split()))
    forms = (clean, article_in_front(clean), clean_title(moved)[0])
    return list(dict.fromkeys(filter(None, map(loosened, forms))))


def article_in_front(title: str) -> str:
    """The title with its article in front, written as it may be."""
    return plain_title(title, ARTICLE_IN_ANY_CASE)


def pair_counts(keys: list[str]) -> np.ndarray:
    """How often each kind of pair of letters stands in each text: uint8 (n, PAIRS)."""
    count_nP = np.zeros((len(keys), PAIRS), np.uint8)
    for at in range(0, len(keys), 4096):
        part = keys[at : at + 4096]
        text = "".join("\0" + key.replace("\0", "") for key in part) + "\0"
        letter = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        owner = np.cumsum(letter == 0)[:-1] - 1
        kind = (letter[:-1] * 31 + letter[1:]) % PAIRS
        count = np.bincount(owner * PAIRS + kind, minlength=len(part) * PAIRS)
        count_nP[at : at + 4096] = count.clip(max=255).reshape(len(part), PAIRS)
    return count_nP


# ---------------------------------------------------------------- the lookup


class Names:
    """Which items have a name. An item may have several names, and a name several items."""

    def __init__(self, names: list[str], items: Sequence[int]):
        # the first item of a name is written last
        self.first = dict(zip(reversed(names), reversed(items)))
        self.several: dict[str, list[int]] = {}  # of a name that more than one item has
        if len(self.first) == len(names):
            return
        for name, item in zip(names, items):
            if item != self.first[name]:
                others = self.several.setdefault(name, [self.first[name]])
                others += [item] if item not in others else []

    def items(self, name: str) -> list[int]:
        """The items of that name, none if there is none."""
        if name in self.several:
            return self.several[name]
        return [self.first[name]] if name in self.first else []


class Asked(NamedTuple):
    """An item as somebody names it."""

    text: str
    kind: str = "either"  # "title", "id", or "either"; of what is no item "user"


@dataclass(frozen=True)
class Unknown:
    """A name that no item of the catalogue has, or no user of the log."""

    asked: Asked
    nearest: list[str]  # titles

    def __str__(self) -> str:
        if self.asked.kind == "user":
            return f"no user '{self.asked.text}'"
        if self.asked.kind == "id":
            return f"no item with the id '{self.asked.text}'"
        near = f", nearest: {' | '.join(self.nearest)}" if self.nearest else ""
        return f"no title '{self.asked.text}'{near}"


def told(unknown: Sequence[Unknown], most: int = 10) -> str:
    """What is said of unknown names: of some thousands (a stock list's) only of the first."""
    more = f" and {len(unknown) - most} more" if len(unknown) > most else ""
    return "; ".join(map(str, unknown[:most])) + more


@dataclass
class Found:
    """The items of a history."""

    items: list[int]  # oldest first
    unknown: list[Unknown]
    remarks: list[str]  # sentences about names that several items have


class Lookup:
    """The items of a prepared folder by their titles and raw ids. Made once and asked often; what
    looser readings need is made when the first name needs it.
    """

    def __init__(
        self, data: Data, added: dict[str, str] | None = None, ids: list[str] | None = None
    ):
        """added: {raw id: title} of items behind the folder's own. ids: the raw ids (I+1,) of the
        folder's own, where they were read before.
        """
        added = added or {}
        self.titles = [*data.titles, *added.values()]
        self.ids = [*(ids or raw_item_ids(data)), *added]
        self.items = range(1, len(self.titles))
        self.exact = Names(self.titles[1:], self.items)
        self.by_id = dict(zip(self.ids[1:], self.items))
        # at most so many in a title
        self.bars = max((title.count("|") for title in self.titles if "|" in title), default=0)
        self.found: dict[Asked, Found] = {}  # what was asked before
        self.sure: dict[str, int] = {}  # of it the texts that mean one item, with nothing to say

    @cached_property
    def by_folded(self) -> Names:
        """The items by folded title."""
        return Names([folded(title) for title in self.titles[1:]], self.items)

    @cached_property
    def by_cleaned(self) -> Names:
        """The items by loosened title, with its article where it is and in front."""
        filed = [i for i in self.items if ", " in self.titles[i]]
        titles = self.titles[1:] + [article_in_front(self.titles[i]) for i in filed]
        return Names([loosened(title) for title in titles], [*self.items, *filed])

    @cached_property
    def by_folded_id(self) -> Names:
        """The items by folded raw id."""
        return Names([folded(raw) for raw in self.ids[1:]], self.items)

    @cached_property
    def cut(self) -> set[str]:
        """The loosened titles that may have been cut."""
        near = LONGEST - SHORTEST_CUT
        return {
            key
            for key, item in self.by_cleaned.first.items()
            if len(key) >= SHORTEST_CUT and len(self.titles[item]) > near
        }

    @cached_property
    def keys(self) -> list[str]:
        """The names of by_cleaned, sorted."""
        return sorted(self.by_cleaned.first)

    @cached_property
    def pairs(self) -> np.ndarray:
        """The pair_counts of the keys."""
        return pair_counts(self.keys)

    # ------------------------------------------------------------ names

    def readings(self, asked: Asked, whole: bool = False) -> Iterator[list[int]]:
        """Yields the items that a name means, from the strictest reading to the loosest. whole: a
        beginning is no name.
        """
        text, forms = asked.text, []
        if asked.kind != "id":
            yield self.exact.items(text)
        if asked.kind != "title" and text in self.by_id:
            yield [self.by_id[text]]
        if asked.kind != "id":
            yield self.by_folded.items(folded(text))
            forms = cleaned_forms(text)
            yield from (self.by_cleaned.items(form) for form in forms)
        if asked.kind != "title":
            yield self.by_folded_id.items(folded(text))
        yield from (self.whole_of(form) for form in forms)
        if not whole:
            yield from (self.beginning_with(form) for form in forms)

    def whole_of(self, form: str) -> list[int]:
        """The items whose cut title the text begins with."""
        if len(form) < SHORTEST_CUT or not self.cut:
            return []
        longest = min(len(form), 4 * LONGEST)
        beginnings = (form[:n].rstrip() for n in range(longest, SHORTEST_CUT - 1, -1))
        return self.by_cleaned.items(next((b for b in beginnings if b in self.cut), ""))

    def starts(self, form: str, most: int) -> list[str]:
        """The first `most` keys that begin with a text."""
        at = bisect_left(self.keys, form)
        return [key for key in self.keys[at : at + most] if form and key.startswith(form)]

    def beginning_with(self, form: str) -> list[int]:
        """The items of the only title that begins with the text."""
        found = [self.by_cleaned.items(key) for key in self.starts(form, 3)]
        # an article in front is a second key of the same title
        return found[0] if found and all(items == found[0] for items in found) else []

    def nearest(self, text: str) -> list[str]:
        """At most three titles: those that begin with the text, else those that are spelt alike."""
        form = next(iter(cleaned_forms(text)), "")
        near = self.starts(form, 3) or self.spelt_like(form)
        return list(dict.fromkeys(self.titles[self.by_cleaned.first[key]] for key in near))

    def spelt_like(self, form: str) -> list[str]:
        """At most three keys that a text is spelt like: of the fifty that share most pairs of
        letters with it, for their length.
        """
        form = form[: 2 * LONGEST]
        count_P = pair_counts([form])[0]
        shared_n = np.minimum(self.pairs, count_P).sum(1, dtype=np.int64)
        size_n = self.pairs.sum(1, dtype=np.int64) + count_P.sum(dtype=np.int64)
        order = np.argsort(-shared_n / size_n, kind="stable")[:50]
        return difflib.get_close_matches(form, [self.keys[i] for i in order], 3, 0.5)

    # ------------------------------------------------------------ histories

    def at_once(self, names: list, kind: str) -> list[int] | None:
        """The items of names that are all known by heart: the usual question. None: they must be
        read one by one. kind: what the names are, "id" or "either".
        """
        try:
            items = list(map((self.by_id if kind == "id" else self.sure).get, names))
        except TypeError:  # a name is no text
            return None
        return None if None in items else items

    def find(self, names: list[Asked]) -> Found:
        """The items of some names, blank ones left out; of several that have a name the first."""
        whole = Found([], [], [])
        for asked in names:
            if not asked.text.strip():
                continue
            one = self.found.get(asked)
            if one is None:
                one = self.find_one(Asked(asked.text.strip(), asked.kind))
                self.remember(asked, one)
            whole.items += one.items
            whole.unknown += one.unknown
            whole.remarks += [said for said in one.remarks if said not in whole.remarks]
        return whole

    def remember(self, asked: Asked, one: Found) -> None:
        """Keeps what a name was found to mean, for the next question that holds it."""
        if len(asked.text) > LONGEST_KEPT:
            return
        if len(self.found) >= MOST_KEPT:
            self.found.clear()
            self.sure.clear()
        self.found[asked] = one
        if asked.kind == "either" and one.items and not one.remarks:
            self.sure[asked.text] = one.items[0]

    def find_one(self, asked: Asked) -> Found:
        """The item of a name."""
        items = next(filter(None, self.readings(asked)), [])
        if items:
            return Found(items[:1], [], list(self.remarks_on(asked, items)))
        near = [] if asked.kind == "id" else self.nearest(asked.text)
        return Found([], [Unknown(asked, near)], [])

    def remarks_on(self, asked: Asked, items: list[int]) -> Iterator[str]:
        """Yields what must be said of a name: several items have it, or it is the title of one item
        and the id of another.
        """
        text, first = asked.text, items[0]
        if len(items) > 1:
            ids = ", ".join(self.ids[i] for i in items[:5]) + (", .." if len(items) > 5 else "")
            yield (
                f"'{text}' is the title of {len(items)} items (ids {ids}); {self.ids[first]} was "
                "taken, give the id of the one you mean"
            )
        if asked.kind != "either" or text not in self.by_id:
            return
        of_id, is_title = self.by_id[text], text in self.exact.first
        if is_title and of_id not in items:
            yield (
                f"'{text}' is a title and also the id of '{self.titles[of_id]}'; the title was "
                f'taken, {{"id": "{text}"}} in JSON means the other'
            )
        titled = next(filter(None, self.readings(Asked(text, "title"))), [of_id])
        if not is_title and of_id not in titled:
            yield (
                f"'{text}' was taken as the id of '{self.titles[of_id]}', not as "
                f"'{self.titles[titled[0]]}'; write more of the title if you mean that"
            )

    def is_title(self, text: str) -> bool:
        """Is it the title of an item, by any reading but a beginning?"""
        return any(self.readings(Asked(text.strip(), "title"), whole=True))

    def split(self, text: str) -> tuple[list[Asked], list[str]]:
        """(the names of 'title | title', what must be said of it). Where a title holds the
        separator, its pieces are put together again, unless each is a title of its own.
        """
        pieces = text.split("|")
        names, remarks, at = [], [], 0
        while at < len(pieces):
            last = min(len(pieces), at + self.bars + 1)
            joined = ("|".join(pieces[at:end]) for end in range(last, at + 1, -1))
            title = next(filter(self.is_title, joined), pieces[at])
            end = at + 1 + title.count("|")
            if end > at + 1 and all(map(self.is_title, pieces[at:end])):
                remarks.append(
                    f"'{title.strip()}' was taken as {end - at} titles and is also one; "
                    "--history-json or its id means the one"
                )
                title, end = pieces[at], at + 1
            names.append(Asked(title))
            at = end
        return names, remarks
