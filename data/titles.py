"""Titles as plain text: what a publisher's file or a web page left in them is taken out."""

import html
import re

LONGEST = 250  # characters of a title

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->")
ENTITY = re.compile(r"&(#[0-9]{1,7}|#x[0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});")
ARTICLE = re.compile(r"(^|\()([^()]+?), (The|An?|L[ae]|Les|L'|Il|Der|Die|Das|Det)(?=\)| \(|$)")

ARTICLE_IN_ANY_CASE = re.compile(ARTICLE.pattern, re.IGNORECASE)


def one_line(text: str) -> str:
    """The text without control characters, its words one blank apart."""
    return " ".join(CONTROL.sub(" ", text).split())


def clean_title(text: str) -> tuple[str, bool]:
    """The title without HTML's entities and tags, on one line, of at most LONGEST characters; and
    whether it was cut, which happens behind a word.
    """
    for _ in range(2):  # '&amp;quot;' is common
        text = ENTITY.sub(lambda m: html.unescape(m[0]), text)
    text = one_line(TAG.sub(" ", text))
    if len(text) <= LONGEST:
        return text, False
    return text[: LONGEST + 1].rsplit(" ", 1)[0][:LONGEST], True


def plain_title(title: str, article: re.Pattern = ARTICLE) -> str:
    """The title with its article in front, for the name itself and for names in parentheses.

    MovieLens files "The Usual Suspects" under "Usual Suspects, The (1995)". English, French,
    German, Italian and Scandinavian articles.
    """
    return article.sub(lambda m: m[1] + m[3] + ("" if m[3][1:] == "'" else " ") + m[2], title)
