"""data/titles.py: titles become plain text, and what was done to them is counted."""

import pytest
from logs import prepared, toy

from delrec.data.titles import LONGEST, clean_title, plain_title


def test_titles_are_cleaned_and_counted(tmp_path):
    titles = {str(i): f"Title {i}" for i in range(1, 41)}
    titles |= {
        "1": "  two\nlines\tand\x07 a bell ",
        "2": " ",
        "3": "Title 4",
        "5": 'a ""quoted"" one, with a comma',
    }
    data, output = prepared(tmp_path, toy(), titles=titles)
    assert data.titles[1:6] == [
        "two lines and a bell",
        "item 2",
        "Title 4",
        "Title 4",
        'a "quoted" one, with a comma',
    ]
    assert (
        data.meta["titles"] | {"words": 0, "characters": 0}
        == {"blank": 1, "duplicate": 1, "cleaned": 1, "cut": 0, "words": 0, "characters": 0}
        and "1 blank" in output
        and len(data.titles) == 41
    )


@pytest.mark.parametrize(
    "filed, plain",
    [
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Tin Drum, The (Blechtrommel, Die) (1979)", "The Tin Drum (Die Blechtrommel) (1979)"),
        ("unknown", "unknown"),
        (
            "Maybe, Maybe Not (Bewegte Mann, Der) (1994)",
            "Maybe, Maybe Not (Der Bewegte Mann) (1994)",
        ),
        ("I, The Jury (1982)", "I, The Jury (1982)"),
        ("Affair to Remember, An (1957)", "An Affair to Remember (1957)"),
    ],
)
def test_articles_stand_in_front(filed, plain):
    assert plain_title(filed) == plain


@pytest.mark.parametrize(
    "text, clean",
    [
        ("Salt &amp; Pepper &quot;Set&quot;", 'Salt & Pepper "Set"'),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("R&D, AT&T; x", "R&D, AT&T; x"),
        ("&#39;til &#x4e2d;", "'til 中"),
        ("<b>Bold</b> <span class='x'>move</span><br/>now", "Bold move now"),
        ("I <3 you, 2 > 1", "I <3 you, 2 > 1"),
        ("a\x00b\u2028c\td", "a b c d"),
        ("国王 – Король", "国王 – Король"),
    ],
)
def test_a_title_is_plain_text(text, clean):
    assert clean_title(text) == (clean, False)


def test_a_title_too_long_is_cut_behind_a_word():
    title, cut = clean_title("word " * 400)
    assert cut and title == " ".join(["word"] * 50) and len(title) == 249
    assert clean_title("x" * 10_000) == ("x" * LONGEST, True)
    assert clean_title("y" * LONGEST) == ("y" * LONGEST, False)
