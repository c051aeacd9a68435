"""The items that can be named and ranked, and which of them a question allows."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from delrec.data.counts import Near, near_in_training
from delrec.data.prepared import Data, item_columns, raw_user_ids
from delrec.data.titles import clean_title
from delrec.serving.lookup import Asked, Lookup, Unknown
from delrec.serving.new_items import TitleMap
from delrec.serving.results import Refused

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Filters:
    """Which items may be in an answer; what is not given allows every item."""

    only: Any = None  # ids (or titles)
    exclude: Any = None  # ids (or titles)
    where: Mapping[str, Any] | None = None  # {a further column of items.csv: value or values}


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The items of a prepared folder, and added ones behind them. It never changes."""

    data: Data
    added: dict[str, str] = field(default_factory=dict)  # {raw id: title}
    before: "Catalogue | None" = None  # of the folder's items alone, where there are added ones

    @cached_property
    def lookup(self) -> Lookup:
        """The items by title and raw id."""
        known = None if self.before is None else self.before.lookup.ids
        return Lookup(self.data, self.added, known)

    def read(self) -> None:
        """Reads now what is else read when a question first needs it: a service goes on answering
        for the log that it was trained on, whatever becomes of the prepared folder.
        """
        for part in ("lookup", "user_of", "columns"):
            getattr(self, part)

    @property
    def n_items(self) -> int:
        """How many items there are, I: the folder's and the added ones."""
        return self.data.n_items + len(self.added)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The further columns of items.csv: {name: text (I+1,)}, blank for added items."""
        if self.before is not None:
            blank_A = np.full(len(self.added), "", object)
            known = self.before.columns.items()
            return {name: np.concatenate([cell_I, blank_A]) for name, cell_I in known}
        found = item_columns(self.data)
        return {name: np.array(["", *cells], object) for name, cells in found.items()}

    @cached_property
    def meant_columns(self) -> dict[str, np.ndarray]:
        """The columns that were asked for by what they mean: {name: see `meant` (I+1,)}."""
        return {}

    @cached_property
    def title_map(self) -> TitleMap:
        """From titles to item vectors, fitted on the trained items; made once."""
        return TitleMap(self.data) if self.before is None else self.before.title_map

    @cached_property
    def near(self) -> Near | None:
        """How often two items stood within a few steps of each other in training; None where
        nobody's interactions are here (of a shared run).
        """
        if self.data.shared is not None:
            return None
        return near_in_training(self.data) if self.before is None else self.before.near

    def with_items(self, items: Mapping[str, str]) -> "Catalogue":
        """The catalogue with more items, {raw id: title}."""
        added = self.added | self.new_titles(items)
        return Catalogue(self.data, added, self.before or self)

    @cached_property
    def user_of(self) -> dict[str, int]:
        """{raw id: number} of the log's users."""
        if self.before is not None:
            return self.before.user_of
        return {raw: n for n, raw in enumerate(raw_user_ids(self.data))}

    @cached_property
    def count_I(self) -> np.ndarray:
        """How often each item was taken, in the whole log: float32 (I+1,). Of a shared run, which
        knows the order alone: minus the place in it, added items last.
        """
        if (shared := self.data.shared) is not None:
            place_I = np.full(self.n_items + 1, -self.data.n_items - 1, np.float32)
            place_I[shared.popular] = -np.arange(1, self.data.n_items + 1)
            return place_I
        count_I = np.bincount(self.data.items, minlength=self.n_items + 1)
        return count_I.astype(np.float32)

    def history_of(self, user: str) -> list[int] | None:
        """All items of a user of the log, oldest first; None for one it does not know."""
        if self.data.shared is not None:
            raise Refused(
                f"{self.data.folder} was shared without anybody's history, so the user "
                f"'{user:.60}' is not known; give titles or ids=[..], or the prepared data as "
                "dataset=.."
            )
        n = self.user_of.get(user)
        if n is None:
            return None
        return self.data.items[self.data.ptr[n] : self.data.ptr[n + 1]].tolist()

    def mask_of(self, items: list[int]) -> np.ndarray:
        """Bool (I+1,): true for some items."""
        mask_I = np.zeros(self.n_items + 1, bool)
        mask_I[items] = True
        return mask_I

    def new_titles(self, items: Any) -> dict[str, str]:
        """{raw id: clean title} of items that are to be added; what cannot be is refused."""
        if not isinstance(items, Mapping) or not items:
            raise Refused(
                f'add_items was given {items!r:.60}; expected {{id: title}}, as {{"sku-99": "A '
                'title"}'
            )
        found = {}
        for raw, title in items.items():
            (name,) = (text.strip() for text in texts_of(raw, "add_items"))
            if name in self.lookup.by_id or name in found:
                raise Refused(
                    f"the item {name!r} is there already; add items under ids of their own"
                )
            text = clean_title(title)[0] if isinstance(title, str) else ""
            if not text or not name:
                raise Refused(
                    f"the item {name!r} has the title {title!r:.60}; a new item is known by its "
                    "title, give it one in words"
                )
            found[name] = text
        return found

    # ------------------------------------------------ what a question allows

    def allowed(self, filters: Filters) -> tuple[np.ndarray | None, list[Unknown]]:
        """(bool (I+1,): which items may be in an answer, None for all; names that nobody has)."""
        allowed_I, unknown = None, []
        if filters.only is not None:
            items, unknown = self.named(filters.only, "only")
            allowed_I = self.mask_of(items)
        if filters.where is not None:
            in_column_I = self.holding(filters.where)
            allowed_I = in_column_I if allowed_I is None else allowed_I & in_column_I
        if filters.exclude is not None:
            items, more = self.named(filters.exclude, "exclude")
            allowed_I = np.ones(self.n_items + 1, bool) if allowed_I is None else allowed_I
            allowed_I[items] = False
            unknown += more
        if allowed_I is not None and not allowed_I[1:].any():
            raise Refused(nothing_left(filters, unknown))
        return allowed_I, unknown

    def named(self, names: Any, what: str) -> tuple[list[int], list[Unknown]]:
        """(items, names that nobody has) of raw ids; what is no id may be a title."""
        items, unknown = [], []
        for name in texts_of(names, what):
            found = self.items_called(name)
            items += found
            if not found:
                unknown.append(Unknown(Asked(name, "id"), []))
        return items, unknown

    def candidates(self, names: Any) -> tuple[list[int], list[Unknown], list[str]]:
        """(the item of each name in their order, names that nobody has, remarks): of several items
        that have a title the first.
        """
        items, unknown, remarks = [], [], []
        for name in texts_of(names, "candidates"):
            found = self.items_called(name)
            items += found[:1]
            if not found:
                unknown.append(Unknown(Asked(name, "id"), []))
            elif len(found) > 1:
                remarks += self.lookup.remarks_on(Asked(name, "title"), found)
        return items, unknown, list(dict.fromkeys(remarks))

    def items_called(self, name: str) -> list[int]:
        """The item of a raw id; else those that have it as their title."""
        item = self.lookup.by_id.get(name)
        return [item] if item else self.lookup.exact.items(name)

    def holding(self, where: Mapping[str, Any]) -> np.ndarray:
        """Bool (I+1,): the items whose columns hold the values."""
        if not isinstance(where, Mapping) or not where:
            raise Refused(
                f"where is {where!r:.60}; give a column of items.csv and what it must hold, as "
                '{"category": "tea"}'
            )
        held_I = np.ones(self.n_items + 1, bool)
        for column, wanted in where.items():
            if column not in self.columns:
                raise Refused(no_column(self, column))
            held_I &= self.holding_any(column, values_of(wanted, column))
        return held_I

    def holding_any(self, column: str, values: list) -> np.ndarray:
        """Bool (I+1,): the items whose column holds one of the values. A text is looked for to the
        letter; where no cell is that, and for a number or a truth value, what cells mean counts.
        """
        cell_I, meanings = self.columns[column], []
        held_I = np.zeros(len(cell_I), bool)
        for value in values:
            same_I = cell_I == str(value)
            held_I |= same_I
            if not (isinstance(value, str) and same_I.any()):
                meanings.append(meant(str(value)))
        if meanings:
            if column not in self.meant_columns:
                self.meant_columns[column] = np.array([meant(cell) for cell in cell_I], object)
            held_I |= np.isin(self.meant_columns[column], np.array(meanings, object))
        return held_I


def texts_of(given: Any, what: str) -> list[str]:
    """One value or several (a list, a set, an array, a column of a frame) as texts."""
    if isinstance(given, str | int | np.integer):
        given = [given]
    values = listed(given)
    if values is None:
        raise Refused(f"{what} is {given!r:.60}; give ids as a list, a set or a column of a frame")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
            raise Refused(f"{what} holds {value!r:.60}, expected ids as text or whole numbers")
    return [str(value) for value in values]


def values_of(given: Any, column: str) -> list[str | int | float | Decimal]:
    """The values that a column may hold: one, or several (a list, a set, an array, a column of a
    frame).
    """
    values = [given] if isinstance(given, str | int | float | Decimal | np.generic) else None
    values = listed(given) if values is None else values
    if values is None:
        raise Refused(
            f"where {column} is {given!r:.60}; give a value, or several as a list, a set or a "
            "column of a frame"
        )
    for value in values:
        is_number = isinstance(value, int | float | Decimal | np.number | np.bool_)
        if not isinstance(value, str) and not (is_number and value == value):
            raise Refused(
                f"where {column} holds {value!r:.60}, expected values as text, numbers, or True "
                "and False"
            )
    return values


def meant(text: str) -> str | Decimal:
    """What a cell or a value means: a number however it is written, true, false, or its text."""
    if NUMBER.fullmatch(text):
        return Decimal(text)
    word = text.lower()
    return word if word in ("true", "false") else text


def listed(given: Any) -> list | None:
    """The values of a list, a set, an array or a column of a frame; None for what is no such."""
    if type(given) is list:
        return given
    for name in ("tolist", "to_list"):  # numpy and pandas; polars
        if hasattr(given, name):
            given = getattr(given, name)()
            break
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        return None
    return list(given)


def no_column(catalogue: Catalogue, column: str) -> str:
    """Why items cannot be chosen by a column, as a sentence."""
    folder, have = catalogue.data.folder, ", ".join(catalogue.columns)
    if have:
        return (
            f"{folder} keeps no column {column!r} of items.csv, it keeps: {have}; name one of "
            "those, or prepare the data again with that column"
        )
    return (
        f"{folder} keeps no column {column!r}, nor any other beside the titles; those of a table "
        "of orders are not kept: give articles and their columns in a file of their own with "
        "data/prepare.py --items articles.csv"
    )


def nothing_left(filters: Filters, unknown: list[Unknown]) -> str:
    """Why no item is allowed, as a sentence."""
    given = [name for name in ("only", "where", "exclude") if getattr(filters, name) is not None]
    near = ""
    if unknown:
        some = ", ".join(repr(u.asked.text) for u in unknown[:3])
        near = f" ({len(unknown)} names are of no item, such as {some})"
    return f"no item is left by {' and '.join(given)}{near}; allow at least one known item"
