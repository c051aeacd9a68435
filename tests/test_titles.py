"""data/titles.py: titles become plain text, and what was done to them is counted."""

import pytest
from logs import prepared, random_log, run, toy

from delrec.data.titles import LONGEST, clean_title, plain_title, without_placeholders


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
        ('<span class="a-size-medium a-color-secondary', ""),
        ('Vogue <span id="productTitle" class="a', "Vogue"),
        ("Vogue <!-- price", "Vogue"),
        ("Vogue (1 year) <br", "Vogue (1 year)"),
        ("<a href=foo>Vogue</a", "Vogue"),
        ("Vogue<script>var x = 1;</script> Paris", "Vogue Paris"),
        ("&lt;b&gt;Vogue&lt;/b&gt;", "Vogue"),
        ("var aPageStart = (new Date()).getTime();", ""),
        ("function go() { return 1; }", ""),
        ("Love <me now, a <b", "Love <me now, a <b"),
        ("Function Junction, function", "Function Junction, function"),
        ("nan", ""),
        ("N/A", ""),
        ("\\N", ""),
        ("unknown", "unknown"),
    ],
)
def test_a_title_is_plain_text(text, clean):
    assert clean_title(text) == (clean, False)


def test_a_title_too_long_is_cut_behind_a_word():
    title, cut = clean_title("word " * 400)
    assert cut and title == " ".join(["word"] * 50) and len(title) == 249
    assert clean_title("x" * 10_000) == ("x" * LONGEST, True)
    assert clean_title("y" * LONGEST) == ("y" * LONGEST, False)


def test_a_placeholder_is_no_title_where_several_items_have_it():
    titles = ["unknown", "Untitled", "untitled", "-", "?", "-", "Vogue", "Vogue"]
    assert without_placeholders(titles) == ["unknown", "", "", "", "?", "", "Vogue", "Vogue"]


def warnings_of(output):
    return [line for line in output.splitlines() if line.startswith("WARNING")]


def test_titles_that_are_none_are_said_loudly_when_prepared_and_when_checked(tmp_path):
    titles = {str(i): "<span class=a-size" if i > 10 else f"Vogue {i}" for i in range(300)}
    _, output = prepared(tmp_path, random_log(), titles=titles)
    said = warnings_of(output)
    assert len(said) == 1 and "have no title and are called by their id" in said[0]
    assert "289 of 300 items (96%, targets of 95% of the test rows)" in said[0]
    assert "'item 11' (was '<span class=a-size')" in said[0]
    again = warnings_of(run("toy", "--out", tmp_path / "out", "--check").output)
    assert len(again) == 1 and "'item 11'" in again[0]


def test_one_title_on_many_items_is_said_with_the_rows_it_touches(tmp_path):
    titles = {str(i): "Gift card" if i % 3 == 0 else f"Vogue {i}" for i in range(300)}
    said = warnings_of(prepared(tmp_path, random_log(), titles=titles)[1])
    assert len(said) == 2 and "100 of 300 items (33%" in said[0]
    assert "share their title with another item: 'Gift card'" in said[0]
    assert (
        "of the test rows hold another candidate with the target's title ('Gift card')" in said[1]
    )
    assert "the right ones?" not in said[0]  # of a third of the items it is a fault of titles


def test_users_for_items_are_asked_about(tmp_path):
    rows = [(u, i, t, f"Tea {int(i[1:]) % 9}") for u, i, t in random_log(prefix="c")]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "log.csv").write_text(f"customer,article,timestamp,name\n{text}")
    log = ["toy", "--interactions", tmp_path / "log.csv", "--out", tmp_path / "out", "--core", 1]
    columns = ["--user-column", "article", "--item-column", "customer", "--title-column", "name"]
    said = warnings_of(run(*log, *columns).output)[0]
    assert "share their title" in said and said.endswith(
        "; are --user-column, --item-column and --title-column the right ones?"
    )


def test_markup_and_numbers_in_place_of_titles_are_said(tmp_path):
    titles = {
        str(i): f"https://shop.example/{i}" if i < 100 else str(i) if i < 200 else f"Vogue {i}"
        for i in range(300)
    }
    said = warnings_of(prepared(tmp_path, random_log(), titles=titles)[1])
    assert len(said) == 2 and "have markup or an address in their title" in said[0]
    assert "have a title without a letter: '100'" in said[1]


def test_a_few_bad_titles_are_not_said(tmp_path):
    titles = {str(i): "" if i < 5 else "1984" if i < 7 else f"Vogue {i}" for i in range(300)}
    assert not warnings_of(prepared(tmp_path, random_log(), titles=titles)[1])
