"""What a command line refuses, in the words of Python: there --keep-seen is keep_seen=True, and a
command of data/prepare.py or train_backbone.py a call of Recommender.fit.
"""

import json
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path

# a script and what stands behind it in the same part of a sentence: it is for the shell
OF_THE_SHELL = r"""[\w/]+\.py (?:(?! or | and )(?:'[^']*'|[^,;:()']))*"""
FLAG = r"(?<![\w-])--(?P<flag>[a-z][a-z0-9-]*)(?: (?P<value>-?\d[\d.]*(?![\w.]|-)|'[^']*'))?"
BARE = r"[\w@%+=:,./-]*[\w@%+=/-]"  # a word of a command that needs no quotes
QUOTED = r"""(?:'[^']*'|"[^"]*")+"""  # one that shlex.quote wrote
NUMBER = re.compile(r"-?\d+(\.\d+)?")
# what fit gives the two commands itself, and what a sentence calls it there: fit reads the folder
# of --raw where it has no items, and always prepares what it trains on
ITSELF = {
    "out": "name=",
    "raw": "interactions= and no items=",
    "dataset": "train_backbone.py --dataset",
}
# a path behind --out; a bare word there may be one of the sentence
PLACE = rf"""{QUOTED}|[^\s,;'"]*/[^\s,;'"]*"""


def in_keywords(said: str, switches: Collection[str]) -> str:
    """A sentence whose flags are keywords; a command for the shell stays. switches: the flags that
    have no value."""

    def word(found: re.Match) -> str:
        return found[0] if found["flag"] is None else keyword(found["flag"], found["value"])

    def keyword(flag: str, value: str | None) -> str:
        if flag in switches:
            return f"{key_of(flag)}=True{f' {value}' if value else ''}"
        if flag.startswith("no-") and flag[3:] in switches:
            return f"{key_of(flag[3:])}=False{f' {value}' if value else ''}"
        return f"{key_of(flag)}={value or ''}"

    return re.sub(rf"{OF_THE_SHELL}|{FLAG}", word, said)


def in_names_of_fit(said: str) -> str:
    """A sentence in which the flags that fit refuses are called what they are to fit; a command for
    the shell stays."""

    def word(found: re.Match) -> str:
        flag, place = found["flag"], found["place"]
        if flag is None:
            return found[0]
        if flag == "out" and place:  # the folder of a preparation has its name
            return f"name={json.dumps(Path(shlex.split(place)[0]).name, ensure_ascii=False)}"
        return ITSELF[flag] + (f" {place}" if place else "")

    flags = rf"(?<![\w-])--(?P<flag>{'|'.join(ITSELF)})(?![\w-])(?: (?P<place>{PLACE}))?"
    return re.sub(rf"{OF_THE_SHELL}|{flags}", word, said)


def in_calls(said: str, given: Mapping[str, str], switches: Collection[str]) -> str:
    """A sentence whose commands of data/prepare.py and train_backbone.py are calls of fit. given:
    {interactions, items: the path that fit passed on}, which need not be repeated."""
    alone = "|".join(map(re.escape, switches)) or "(?!)"
    value = rf"(?!--)(?:{BARE}|{QUOTED})"
    flags = rf"(?: --(?:{alone})(?![\w-])| --[a-z][a-z0-9-]* {value})*"
    command = rf"python (?:\S*/)?(?:prepare|train_backbone)\.py(?: (?!--){BARE})?({flags})"
    return re.sub(command, lambda found: call_of(shlex.split(found[1]), given, switches), said)


def call_of(words: list[str], given: Mapping[str, str], switches: Collection[str]) -> str:
    """The call of fit with the flags of a command."""
    parts, words = [".."], list(words)
    while words:
        flag = words.pop(0)[2:]
        if flag in switches:
            parts.append(f"{key_of(flag)}=True")
            continue
        value = words.pop(0)
        if flag not in ITSELF and given.get(flag) != value:
            number = NUMBER.fullmatch(value)
            parts.append(
                f"{key_of(flag)}={value if number else json.dumps(value, ensure_ascii=False)}"
            )
    return f"Recommender.fit({', '.join(parts)})"


def key_of(flag: str) -> str:
    """A flag, with its dashes or without, as a keyword of Python."""
    return flag.strip("-").replace("-", "_")
