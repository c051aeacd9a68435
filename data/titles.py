"""Titles as plain text: what a publisher's file or a web page left in them is taken out."""

import html
import re
from collections import Counter

LONGEST = 250  # characters of a title

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->")
# what never closes: a comment, or a tag of HTML's with an attribute or at the very end
NAMES = (
    "a|b|body|br|div|em|font|form|h[1-6]|head|html|i|iframe|img|input|li|link|meta|ol|p|script|"
    "span|strong|style|table|td|th|tr|u|ul"
)
LONG = "|".join(name for name in NAMES.split("|") if len(name) > 1)
OPEN = re.compile(
    rf"<!--.*$|<(?:{NAMES})(?:\s[^<>]*[=\"'][^<>]*)$|<(?:{LONG})\s*/?\s*$|</(?:{NAMES})\s*$",
    re.I | re.S,
)
CODE = re.compile(r"<(script|style)\b[^<>]*>.*?(</\1\s*>|$)", re.I | re.S)
# Amazon's pages of 2018 gave a script in place of some titles
SCRIPT = re.compile(r"^\s*(var \w+ ?=|\(?function ?\w*\(|if ?\(window)|\.getTime\(\)")
ENTITY = re.compile(r"&(#[0-9]{1,7}|#x[0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
ARTICLE = re.compile(r"(^|\()([^()]+?), (The|An?|L[ae]|Les|L'|Il|Der|Die|Das|Det)(?=\)| \(|$)")
# what programs write for no title; and what people do, which may be a title if one item has it
NOTHING = {"nan", "null", "\\n", "<na>", "#n/a", "n/a", "undefined", "(null)", "[null]"}
PLACEHOLDERS = {
    *("unknown", "untitled", "none", "title", "no title", "no name", "noname", "not available"),
    *("tba", "tbd", "to be announced", "test", "dummy", "deleted", "removed", "[deleted]"),
    *("deleted video", "private video", "page not found", "404 not found", "amazon.com"),
    *("unbekannt", "ohne titel", "kein titel", "sans titre", "sin título", "[unknown]", "na"),
}

ARTICLE_IN_ANY_CASE = re.compile(ARTICLE.pattern, re.IGNORECASE)


def one_line(text: str) -> str:
    """The text without control characters, its words one blank apart."""
    return " ".join(CONTROL.sub(" ", text).split())


def clean_title(text: str) -> tuple[str, bool]:
    """The title without HTML's entities and tags, on one line, of at most LONGEST characters; and
    whether it was cut, which happens behind a word. Code and what stands for no title are blank.
    """
    for _ in range(2):  # '&amp;quot;' is common
        text = ENTITY.sub(lambda m: html.unescape(m[0]), text)
    if SCRIPT.search(text):
        return "", False
    if "<" in text:
        text = OPEN.sub(" ", TAG.sub(" ", CODE.sub(" ", text)))
    text = one_line(text)
    if text.lower() in NOTHING:
        return "", False
    if len(text) <= LONGEST:
        return text, False
    return text[: LONGEST + 1].rsplit(" ", 1)[0][:LONGEST], True


def without_placeholders(titles: list[str]) -> list[str]:
    """The titles, blank where several items have one that is no title, such as 'unknown' or '-'.
    One item alone may be called so.
    """
    many = Counter(title.lower() for title in titles)

    def is_placeholder(title: str) -> bool:
        low = title.lower()
        bare = low in PLACEHOLDERS or not any(c.isalnum() for c in low)
        return bare and many[low] > 1

    return ["" if is_placeholder(title) else title for title in titles]


def plain_title(title: str, article: re.Pattern = ARTICLE) -> str:
    """The title with its article in front, for the name itself and for names in parentheses.

    MovieLens files "The Usual Suspects" under "Usual Suspects, The (1995)". English, French,
    German, Italian and Scandinavian articles.
    """
    return article.sub(lambda m: m[1] + m[3] + ("" if m[3][1:] == "'" else " ") + m[2], title)
