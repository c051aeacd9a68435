"""delrec/serving/lookup.py: what people name, as items of a catalogue."""

import html
import time
import unicodedata
from types import SimpleNamespace

import pytest
from logs import prepared, run, toy
from scripts import sentence

from delrec.data.prepared import load_data
from delrec.serving.lookup import Asked, Lookup

FILMS = [
    "The Usual Suspects (1995)",  # 1, id m1
    "Amélie (Le Fabuleux destin) (2001)",  # 2
    "Straße nach Łódź",  # 3
    "Sabrina (1954)",  # 4
    "Sabrina (1995)",  # 5
    "Tom & Jerry",  # 6
    "ABC",  # 7
    "Abc",  # 8
    "Mug",  # 9
    "Mug",  # 10
    "Mug | blue | 300 ml",  # 11
    "m4",  # 12, its title is the id of another
    "Don't Look Now",  # 13
    "Affair to Remember, An (1957)",  # 14, a log of one's own: nothing was moved
]


def folder_of_titles(folder, titles):
    """What a lookup reads of the data in a folder."""
    return SimpleNamespace(
        folder=folder,
        titles=["", *titles],
        n_items=len(titles),
        shared=None,
        meta={"hash": None},
    )


@pytest.fixture
def lookup_of(tmp_path):
    """lookup_of(titles) -> their Lookup; the raw id of item i is m<i>."""

    def make(titles):
        lines = "".join(f"m{i}\n" for i in range(1, len(titles) + 1))
        (tmp_path / "raw_items.txt").write_text(lines)
        return Lookup(folder_of_titles(tmp_path, titles))

    return make


@pytest.fixture
def films(lookup_of):
    return lookup_of(FILMS)


def items(lookup, *texts):
    return lookup.find([Asked(text) for text in texts]).items


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        str.swapcase,
        html.escape,
        lambda title: unicodedata.normalize("NFC", title),
        lambda title: unicodedata.normalize("NFD", title),
        lambda title: unicodedata.normalize("NFD", title).upper(),
        lambda title: f"\u00a0 {title.replace(' ', '  ')}\t",
        lambda title: "\u200b".join(title),
        lambda title: title.replace("'", "’").replace(" ", "\u3000"),
        lambda title: html.escape(html.escape(f"<b>{title}</b>")),
        lambda title: "".join(f"&#{ord(letter)};" for letter in title),
    ],
)
def test_a_title_is_found_however_it_is_written(films, change):
    for n in (1, 2, 3, 4, 5, 6, 13, 14):
        assert items(films, change(FILMS[n - 1])) == [n]


def test_a_title_that_was_stored_decomposed_is_found_composed(lookup_of):
    stored = lookup_of([unicodedata.normalize("NFD", "Amélie"), "한국어".encode().decode()])
    assert items(stored, "Amélie", "AMÉLIE", unicodedata.normalize("NFD", "한국어")) == [1, 1, 2]


def test_exact_titles_stay_exact(films):
    assert items(films, *FILMS[6:8]) == [7, 8]
    assert films.find([Asked("ABC"), Asked("Abc")]).remarks == []


@pytest.mark.parametrize(
    "filed, number",
    [
        ("Usual Suspects, The (1995)", 1),
        ("usual suspects, the (1995)", 1),
        ("Usual Suspects, The", 1),
        ("Amélie (Fabuleux destin, Le) (2001)", 2),
        ("An Affair to Remember (1957)", 14),
    ],
)
def test_an_article_may_stand_in_front_or_behind(films, filed, number):
    assert items(films, filed) == [number]


RAW = {
    1: "Salt &amp;amp; Pepper <b>Set</b>",
    2: "two   words,\tone blank",
    3: "word " * 80 + "end",
    4: unicodedata.normalize("NFD", "ü" * 60 + " Ä" * 60),
    5: '<span class="x">Green</span> tea',
    6: "Title 6, The",
}


def test_the_titles_of_one_s_own_raw_file_are_found(tmp_path):
    titles = {i: f"Title {i}" for i in range(1, 41)} | RAW
    quoted = {i: title.replace('"', '""') for i, title in titles.items()}
    data, _ = prepared(tmp_path, toy(), titles=quoted)
    assert len(data.titles[3]) < 250 and len(data.titles[4]) < 250  # they were cut
    lookup = Lookup(data)
    for i, raw in titles.items():
        for typed in (raw, unicodedata.normalize("NFC", raw), raw.upper()):
            found = lookup.find([Asked(typed)])
            assert found.items == [i] and not found.unknown, typed


def test_the_titles_of_movielens_own_file_are_found(tmp_path):
    filed = ["Usual Suspects, The (1995)", "Enfer, L' (1994)", "Tin Drum, The (Blechtrommel, Die)"]
    filed += [f"Film {i}, A (199{i % 10})" for i in range(4, 31)]
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "movies.dat").write_text(
        "".join(f"{100 + n}::{title}::Drama\n" for n, title in enumerate(filed)), "latin-1"
    )
    seen = [(user, user % 3 * 10 + n) for user in range(6) for n in range(10)]
    times = [f"{user}::{100 + n}::5::{100 * user + n}\n" for user, n in seen]
    (raw / "ratings.dat").write_text("".join(times))
    said = run("ml-1m", "--raw", raw, "--out", tmp_path / "ml", "--core", 1)
    assert said.exit_code == 0, said.output
    data = load_data(str(tmp_path / "ml"))
    assert data.titles[1] == "The Usual Suspects (1995)"
    assert items(Lookup(data), *filed) == list(range(1, 31))
    assert items(Lookup(data), *data.titles[1:]) == list(range(1, 31))


def test_only_names_of_a_title_s_length_are_remembered(films):
    long = [f"Mug {'x' * 1000} {n}" for n in range(5)]
    want = films.find([Asked("ABC"), Asked(long[0]), Asked("Mug")])
    assert {asked.text for asked in films.found} == {"ABC", "Mug"}
    assert films.find([Asked("ABC"), Asked(long[0]), Asked("Mug")]) == want
    assert films.at_once(["ABC"], "either") == [7] and films.at_once(long, "either") is None


def test_raw_ids_are_names_too(films):
    assert items(films, "m3", " m11 ", "M2") == [3, 11, 2]
    assert items(films, "m14", "m0", "m15") == [14]


def test_a_title_comes_before_an_id_and_that_is_said(films):
    found = films.find([Asked("m4")])
    assert found.items == [12]
    assert "'m4' is a title and also the id of 'Sabrina (1954)'" in found.remarks[0]
    assert films.find([Asked("m4", "id")]).items == [4]
    assert films.find([Asked("m4", "title")]).items == [12]
    assert not films.find([Asked("m4", "id"), Asked("m4", "title")]).remarks


def test_an_id_comes_before_a_beginning_and_that_is_said(lookup_of):
    found = lookup_of(["Alien", "Nikita", "m1, the movie"]).find([Asked("m1")])
    assert found.items == [1]
    assert found.remarks == [
        "'m1' was taken as the id of 'Alien', not as 'm1, the movie'; write more of the title if "
        "you mean that"
    ]


def test_twin_titles_are_said_and_told_apart_by_id(films):
    found = films.find([Asked("Mug"), Asked("mug ")])
    assert found.items == [9, 9]
    assert "'Mug' is the title of 2 items (ids m9, m10); m9 was taken" in found.remarks[0]
    assert films.find([Asked("m9"), Asked("m10")]).items == [9, 10]
    assert films.find([Asked("m9"), Asked("m10")]).remarks == []
    assert "(ids m7, m8); m7 was taken" in films.find([Asked("aBC")]).remarks[0]


def test_a_beginning_that_one_title_has_is_that_title(films):
    assert items(films, "don’t l", "TOM &amp;") == [13, 6]
    unknown = films.find([Asked("Sabrina")]).unknown
    assert unknown[0].nearest == ["Sabrina (1954)", "Sabrina (1995)"]


def test_an_unknown_title_names_the_nearest(films):
    unknown = films.find(
        [Asked("Strasse nach Lodz"), Asked("zzzz qqqq"), Asked("m99", "id")]
    ).unknown
    assert [u.nearest for u in unknown] == [["Straße nach Łódź"], [], []]
    assert str(unknown[0]) == "no title 'Strasse nach Lodz', nearest: Straße nach Łódź"
    assert str(unknown[2]) == "no item with the id 'm99'"


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("Mug | blue | 300 ml", [11]),
        ("Sabrina (1954) | mug | BLUE | 300 ml | ABC", [4, 11, 7]),
        ("ABC|Abc", [7, 8]),
        ("Mug | Mug", [9, 9]),
        (" | ABC | | ", [7]),
    ],
)
def test_a_title_that_holds_the_separator_is_put_together_again(films, text, numbers):
    names, remarks = films.split(text)
    found = films.find(names)
    assert found.items == numbers and not found.unknown and not remarks


def test_where_pieces_are_titles_and_their_whole_is_one_the_pieces_count_and_it_is_said(lookup_of):
    lookup = lookup_of(["A", "B", "A | B"])
    names, remarks = lookup.split("A | B")
    assert lookup.find(names).items == [1, 2]
    assert "'A | B' was taken as 2 titles and is also one" in remarks[0]
    assert items(lookup, "A | B") == [3]


def test_a_hundred_unknown_titles_do_not_compare_the_whole_catalogue_each(lookup_of):
    # difflib alone needs half a second for each
    lookup = lookup_of([f"The story of number {n} and {n * n}" for n in range(5000)])
    began = time.process_time()
    for n in range(100):
        near = lookup.find([Asked(f"The storz of number {n} und {n * n}")]).unknown[0].nearest
        assert near[0] == f"The story of number {n} and {n * n}"
    assert time.process_time() - began < 10


def test_a_folder_whose_ids_do_not_fit_its_titles_is_a_sentence(lookup_of, tmp_path):
    data = folder_of_titles(tmp_path, ["a", "b"])
    assert "raw_items.txt cannot be read" in sentence(Lookup, data)
    (tmp_path / "raw_items.txt").write_text("1\n2\n3\n")
    assert "holds 3 ids but there are 2 items" in sentence(Lookup, data)
