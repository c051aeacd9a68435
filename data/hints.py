"""What a refusal advises: the command that would work, with the columns guessed by their names."""

import re
import shlex
import unicodedata
from dataclasses import dataclass, field


@dataclass
class Columns:
    """What the columns are called in the user's files; None: as is usual in their format."""

    user: str | None = None
    item: str | None = None  # in both files
    timestamp: str | None = None
    position: str | None = None  # an order, where there is no time
    title: str | None = None

    def where_none(self, usual: "Columns") -> "Columns":
        """These names, and the usual ones where none is given."""
        return Columns(**{key: name or getattr(usual, key) for key, name in vars(self).items()})


@dataclass
class Request:
    """How the user's own files are to be read."""

    columns: Columns = field(default_factory=Columns)
    command: str = "python data/prepare.py NAME --raw FOLDER"  # as it was typed, without columns
    encoding: str | None = None  # of text; None: UTF-8, or what a byte order mark says
    time_format: str | None = None  # as in strptime
    drop_incomplete: bool = False  # leave out rows without a user, an item, a time or a title
    keep_parts: bool = False  # is the split that of the files?


# a word of a command as shlex.quote writes it: an apostrophe stands in '"' and '"'
WORD = r"""(?:'[^']*'|"[^"]*"|[^\s'"])+"""
FLAGS = {
    "user": "--user-column",
    "item": "--item-column",
    "timestamp": "--time-column",
    "position": "--position-column",
    "title": "--title-column",
}
# parts of names by which columns are guessed, the likeliest first; accents are left out
WORDS = {
    "user": "user customer kund client member reviewer visitor buyer account klant klient acheteur "
    "usuario utente session person mail",
    "item": "item product produ prodotto article articul articol artikel artigo movie book game "
    "asin isbn sku stockcode song track artist video anime business gmap referen",
    "timestamp": "timestamp datetime time date datum zeit fecha created paid when _dt _dat",
    "title": "title titel titre titulo titolo name bezeichnung description beschreibung libelle "
    "designation nombre descripcion descrizione descricao omschrijving nazwa",
}
# whole names that say a role as well as a first word does
EXACT = {
    "timestamp": ("ts", "at", "data", "tijd", "heure", "ora", "hora", "jour", "day"),
    "title": ("nom", "nome", "naam"),
}
IDS = ("id", "no", "no.", "nr", "nr.", "number", "nummer", "code", "key", "sku", "asin", "isbn")


# parts of the names of columns that are none of these
NEVER = (
    *("categor", "price", "preis", "count", "quantity", "menge", "type", "_list", "rating"),
    *("birth", "geburt", "geboort", "naissance", "nacimiento", "nascita"),
)


def plain(name: str) -> str:
    """A name in lower case and without accents."""
    text = unicodedata.normalize("NFKD", name.lower())
    return "".join(c for c in text if not unicodedata.combining(c))


def guessed(header: list[str], roles: list[str]) -> dict[str, str]:
    """Role -> the column of the header that is most likely it; without the roles nobody can
    guess.
    """
    found = {}
    for role in roles:
        free = [name for name in header if name and name not in found.values()]
        names = sorted(free, key=lambda name: -likeness(name, role))
        if names and likeness(names[0], role) > 0:
            found[role] = names[0]
    return found


def likeness(name: str, role: str) -> float:
    """How much a column's name sounds like a role: 0 is not at all."""
    low = plain(name)
    words = WORDS[role].split()
    is_item_s = any(word in low for word in WORDS["item"].split())
    at = next((n for n, word in enumerate(words) if word in low), None)
    ends_as_time = role == "timestamp" and at is None and re.search("[ _](at|ts)$", low)
    if low in EXACT.get(role, ()):
        at = 0
    elif ends_as_time:
        at = len(words)
    if at is None and not (role == "title" and is_item_s):
        return 0
    at = len(words) if at is None else at  # 'Artikel' beside 'Artikelnr' is its name
    if any(word in low for word in NEVER):
        return 0
    score = 2 - 1.5 * at / len(words)
    is_id = low.endswith(IDS)
    sounds_named = any(word in low for word in WORDS["title"].split())
    if role in ("user", "item"):
        return score + is_id - 1.5 * sounds_named
    if role == "title":
        is_user_s = any(word in low for word in WORDS["user"].split())
        return score + is_item_s / 2 - is_id - 1.5 * is_user_s
    return score


def command_for(request: Request, header: list[str], missing: list[str], more: str = "") -> str:
    """The command that names the columns: those that were given, and for the missing roles what
    the header seems to call them, else COLUMN. more: further flags.
    """
    given = {role: name for role, name in vars(request.columns).items() if name}
    named = {role: name for role, name in given.items() if role not in missing}
    free = [name for name in header if name not in named.values()]
    named |= {role: "COLUMN" for role in missing} | guessed(free, missing)
    flags = [f"{FLAGS[role]} {shlex.quote(named[role])}" for role in FLAGS if role in named]
    return " ".join([request.command, *filter(None, [more]), *flags])
