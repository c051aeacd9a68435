"""Whose histories a question is about: titles, ids, or users of the log; one or many."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from delrec.serving.catalogue import Catalogue, listed
from delrec.serving.lookup import Asked, Found, Unknown
from delrec.serving.requests import found_in
from delrec.serving.results import Refused


@dataclass(frozen=True)
class Question:
    """One history that something is asked about."""

    found: Found
    user: str | None = None  # whose it is


def questions(
    catalogue: Catalogue, history: Any = None, ids: Any = None, user: Any = None, users: Any = None
) -> tuple[list[Question], bool]:
    """(the histories that are asked about, whether there may be several): the one of the four that
    is given.
    """
    given = {"history": history, "ids": ids, "user": user, "users": users}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        told = " and ".join(named) or "none"
        raise Refused(
            f"of a history, ids=, user= and users= {told} were given; give one: titles, "
            "ids=[..] or user=.."
        )
    if user is not None:
        return [question_of_user(catalogue, user)], False
    if users is not None:
        some = listed(users)
        if some is None:
            raise Refused(f"users is {users!r:.60}; give a list of users, or one as user=..")
        return [question_of_user(catalogue, one) for one in some], True
    asked, kind = (history, "either") if ids is None else (ids, "id")
    asked = read_once(asked)
    many = several(asked)
    if many is None:
        return [Question(found_of(catalogue, asked, kind))], False
    return [Question(found_of(catalogue, one, kind)) for one in many], True


def read_once(given: Any) -> Any:
    """What is given, as a list where it holds several: a generator can be read only once."""
    values = listed(given)
    return given if values is None else values


def several(asked: Any) -> list | None:
    """The histories of a list of them; None for one history."""
    if not isinstance(asked, list) or not asked:
        return None
    first = read_once(asked[0])
    if isinstance(first, list):
        return [first, *map(read_once, asked[1:])]
    return None


def found_of(catalogue: Catalogue, history: Any, kind: str) -> Found:
    """The items of one history. kind: what its names are, "id" or "either"."""
    if not isinstance(history, str):
        some = listed(history)
        if some is None:
            raise Refused(f"a history is {history!r:.60}, expected a list of titles or ids")
        items = catalogue.lookup.at_once(some, kind)
        if items is not None:
            return Found(items, [], [])
        history = [name.item() if isinstance(name, np.generic) else name for name in some]
    elif kind == "id":
        history = [history]
    try:
        if kind == "id":
            return catalogue.lookup.find([id_asked(name) for name in history])
        return found_in(history, catalogue.lookup)
    except (TypeError, ValueError) as bad:
        raise Refused(str(bad)) from None


def id_asked(name: Any) -> Asked:
    """A raw id; a text or a whole number."""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise Refused(f"ids holds {name!r:.60}, expected ids as text or whole numbers")
    return Asked(str(name), "id")


def question_of_user(catalogue: Catalogue, user: Any) -> Question:
    """The history of a user of the log; of one it does not know an empty one, which says so."""
    if isinstance(user, bool) or not isinstance(user, str | int | np.integer):
        raise Refused(f"a user is {user!r:.60}, expected an id as text or a whole number")
    items = catalogue.history_of(str(user))
    unknown = [] if items is not None else [Unknown(Asked(str(user), "user"), [])]
    return Question(Found(items or [], unknown, []), str(user))
