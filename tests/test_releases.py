"""data/reading.py, amazon.py, movielens.py: any category of Amazon's, any release of MovieLens, in
the layouts of every year, and one sentence for a line that is broken.
"""

import json
import zipfile

import pytest
from click import ClickException
from logs import packed

from delrec.data import raw_files
from delrec.data.hints import Columns, Request
from delrec.data.reading import Place, read_log

ROWS = [(f"A{u}", f"B{i}", 1_500_000_000 + 10 * i + u) for u in range(3) for i in range(5)]
ITEMS = [f"B{i}" for i in range(5)]


def log_of(folder, name="shop", **more):
    request = Request(command=f"python data/prepare.py {name} --raw {folder}", **more)
    return read_log(name, Place(folder, None, None), request, None)


def refusal(folder, name="shop", **more):
    with pytest.raises(ClickException) as refused:
        log_of(folder, name, **more)
    assert "\n" not in refused.value.message
    return refused.value.message


def is_the_log(found, rows=ROWS, scale=1):
    read = zip(found.log.rows.user, found.log.rows.item, found.log.rows.when.tolist())
    assert sorted(read) == sorted((u, i, t * scale) for u, i, t in rows)
    return True


# ---------------------------------------------------------------- Amazon


def meta(folder, category, key="asin", ending="json.gz"):
    titles = {i: f"Tea {i}" for i in ITEMS} | {"B4": ["Tea B4"]}
    records = [{key: i, "title": titles[i], "details": "{}"} for i in ITEMS]
    packed(folder / f"meta_{category}.{ending}", ["null", *map(json.dumps, records)])


def reviews_of_2018(rows=ROWS):
    return [json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": t}) for u, i, t in rows]


def layout_2018(folder, category):
    packed(folder / f"{category}_5.json.gz", [*reviews_of_2018(), "null"])
    meta(folder, category)
    return 1


def layout_2023_reviews(folder, category):
    packed(
        folder / f"{category}.jsonl.gz",
        [
            json.dumps({"user_id": u, "asin": "v", "parent_asin": i, "timestamp": 1000 * t})
            for u, i, t in ROWS
        ],
    )
    meta(folder, category, "parent_asin", "jsonl.gz")
    return 1000


def layout_2023_csv(folder, category):
    packed(
        folder / f"{category}.csv.gz",
        ["user_id,parent_asin,rating,timestamp", *(f"{u},{i},5.0,{1000 * t}" for u, i, t in ROWS)],
    )
    meta(folder, category, "parent_asin", "jsonl.gz")
    return 1000


def layout_2023_split(folder, category):
    head = "user_id,parent_asin,rating,timestamp,history"
    for part, rows in (("train", ROWS[:9]), ("valid", ROWS[9:12]), ("test", ROWS[12:])):
        lines = [head, *(f"{u},{i},5.0,{t},B1 B2" for u, i, t in rows)]
        packed(folder / f"{category}.{part}.csv.gz", lines)
    meta(folder, category, "parent_asin", "jsonl.gz")
    return 1


def layout_of_kaggle(folder, category):
    lines = ["UserId,ProductId,Rating,Timestamp", *(f"{u},{i},5.0,{t}" for u, i, t in ROWS)]
    (folder / f"ratings_{category}.csv").write_text("\n".join(lines))
    meta(folder, category)
    return 1


LAYOUTS = [
    layout_2018,
    layout_2023_reviews,
    layout_2023_csv,
    layout_2023_split,
    layout_of_kaggle,
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name, category", [("magazines", "Magazine_Subscriptions"), ("beauty", "All_Beauty")]
)
def test_any_category_of_amazon_s_is_read_by_its_files(tmp_path, layout, name, category):
    scale = layout(tmp_path, category)
    found = log_of(tmp_path, name)
    assert is_the_log(found, scale=scale) and found.words == {"noun": "product", "verb": "bought"}
    assert found.log.titles == {i: f"Tea {i}" for i in ITEMS}
    assert any("hold null" in note for note in found.log.notes)


def test_amazon_s_own_split_is_kept_on_request(tmp_path):
    layout_2023_split(tmp_path, "Software")
    part = log_of(tmp_path, keep_parts=True).log.rows.part
    assert part.tolist() == [0] * 9 + [1] * 3 + [2] * 3


def test_one_of_several_categories_is_named_by_the_data_set_s_name(tmp_path):
    layout_2018(tmp_path, "Magazine_Subscriptions")
    layout_2018(tmp_path, "Software")
    assert is_the_log(log_of(tmp_path, "magazine-subscriptions"))
    said = refusal(tmp_path, "mags")
    assert f"python data/prepare.py Magazine_Subscriptions --raw {tmp_path}" in said


def test_one_of_the_two_files_alone_says_which_is_missing(tmp_path):
    packed(tmp_path / "Software_5.json.gz", reviews_of_2018())
    assert "put meta_Software.json.gz beside it" in refusal(tmp_path)
    (tmp_path / "Software_5.json.gz").unlink()
    meta(tmp_path, "Software")
    assert "holds meta_Software.json.gz and no interactions of Software" in refusal(tmp_path)


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"asin": "B1", "unixReviewTime": 5}', "line 16: the record has no reviewerID or user_id"),
        ('{"reviewerID": "", "asin": "B1", "unixReviewTime": 5}', "line 16: the record has no rev"),
        ('{"reviewerID": "A", "asin": "B1"}', "line 16: the record has no unixReviewTime or time"),
        ('["A", "B1", 5]', "line 16: a list where a record was expected"),
        ('{"reviewerID": "A", "as', "line 16: neither JSON nor a Python literal"),
        (
            '{"reviewerID": "A", "asin": "B1", "unixReviewTime": "soon"}',
            "line 16: timestamp 'soon'",
        ),
    ],
)
def test_a_broken_review_is_named_by_its_line(tmp_path, line, says):
    packed(tmp_path / "Software_5.json.gz", [*reviews_of_2018(), line])
    meta(tmp_path, "Software")
    assert f"{tmp_path}/Software_5.json.gz, {says}" in refusal(tmp_path)


@pytest.mark.parametrize(
    "line, says",
    [(",B1,5.0,1500000000", "line 16: no user"), ("A1,B1,5.0,", "line 16: timestamp is blank")],
)
def test_a_rating_without_a_user_or_time_is_named_by_its_line(tmp_path, line, says):
    lines = [f"{u},{i},5.0,{t}" for u, i, t in ROWS]
    (tmp_path / "ratings_Software.csv").write_text("\n".join([*lines, line]) + "\n")
    meta(tmp_path, "Software")
    assert f"{tmp_path}/ratings_Software.csv, {says}" in refusal(tmp_path)


def test_flags_of_one_s_own_files_are_named_where_they_cannot_count(tmp_path):
    layout_2018(tmp_path, "Software")
    said = refusal(tmp_path, columns=Columns(user="u", title="t"), encoding="latin-1")
    assert said.startswith("--user-column, --title-column, --encoding: for files of your own")


# ---------------------------------------------------------------- MovieLens

FILMS = [(i, f"Misérables {i}, Les (1995)") for i in range(5)]
SEEN = [(str(u), str(i), 1_500_000_000 + 10 * i + u) for u in range(3) for i in range(5)]


def release(folder, kind, encoding="latin-1"):
    if kind == "dat":
        files = {
            "ratings.dat": [f"{u}::{i}::5::{t}" for u, i, t in SEEN],
            "movies.dat": [f"{i}::{title}::Drama" for i, title in FILMS],
        }
    elif kind == "first":
        files = {
            "u.data": [f"{u}\t{i}\t5\t{t}" for u, i, t in SEEN],
            "u.item": [f"{i}|{title}|01-Jan-1995||x|0" for i, title in FILMS],
        }
    else:
        one = "" if kind == "singular" else "s"
        encoding = "utf-8"
        files = {
            f"rating{one}.csv": [
                "userId,movieId,rating,timestamp",
                *(f"{u},{i},5,{t}" for u, i, t in SEEN),
            ],
            f"movie{one}.csv": ["movieId,title", *(f'{i},"{title}"' for i, title in FILMS)],
        }
    for name, lines in files.items():
        (folder / name).write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return list(files)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", ["dat", "first", "csv", "singular"])
def test_any_release_of_movielens_is_read_by_its_two_files(tmp_path, kind, encoding):
    (tmp_path / "ml-25m").mkdir()
    release(tmp_path / "ml-25m", kind, encoding)
    found = log_of(tmp_path, "ml-25m")
    assert is_the_log(found, SEEN) and found.words == {"noun": "movie", "verb": "watched"}
    assert found.log.titles == {str(i): f"Les Misérables {i} (1995)" for i in range(5)}


@pytest.mark.parametrize(
    "kind, name, old, new, says",
    [
        ("dat", "ratings.dat", "0::1::5::1500000010", "0::1::5", "line 2: 3 cells between '::'"),
        ("dat", "ratings.dat", "0::1::5::1500000010", "::1::5::15", "line 2: no user"),
        ("dat", "movies.dat", "1::Mis", "0::Mis", "line 2: item '0' is there twice"),
        ("dat", "movies.dat", "4::Misérables 4, Les (1995)::Drama", "4", "the file was cut"),
        ("first", "u.data", "0\t1\t5\t1500000010", "0\t1\t5\tx", "line 2: timestamp 'x' is not"),
        ("csv", "ratings.csv", "0,1,5,1500000010", "0,,5,1500000010", "line 3: no movie"),
        ("csv", "movies.csv", "movieId,title", "id,title", "the header names id, title"),
    ],
)
def test_a_broken_line_of_movielens_is_one_sentence(tmp_path, kind, name, old, new, says):
    release(tmp_path, kind)
    encoding = "utf-8" if kind == "csv" else "latin-1"
    text = (tmp_path / name).read_text(encoding=encoding)
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1), encoding=encoding)
    said = refusal(tmp_path)
    assert f"{tmp_path}/{name}" in said and says in said


def test_blank_lines_at_the_end_are_no_ratings(tmp_path):
    for name in release(tmp_path, "dat"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")
    assert is_the_log(log_of(tmp_path), SEEN)


def two_releases(folder, packed):
    """ml-1m as .dat and ml-25m, in which user 2 is called 7, as .csv."""
    for name, kind in (("ml-1m", "dat"), ("ml-25m", "csv")):
        (folder / name).mkdir(parents=True)
        for file in release(folder / name, kind):
            path = folder / name / file
            if name == "ml-25m":
                path.write_text(path.read_text().replace("\n2,", "\n7,"))
            if packed:
                with zipfile.ZipFile(folder / f"{name}.zip", "a") as z:
                    z.write(path, f"{name}/{file}")
                path.unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_of_two_releases_the_one_that_is_named_is_read(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(raw_files, "CACHE", tmp_path / "cache")
    raw = tmp_path / "raw"
    two_releases(raw, packed)
    renamed = [("7" if u == "2" else u, i, t) for u, i, t in SEEN]
    assert is_the_log(log_of(raw, "ml-25m"), renamed)
    assert is_the_log(log_of(raw, "ml-1m"), SEEN)
    said = refusal(raw, "films")
    assert "several releases of MovieLens" in said and "ratings.dat" in said
    assert "ml-25m/ratings.csv" in said and "called films" in said


def test_a_release_beside_its_own_zip_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "CACHE", tmp_path / "cache")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as z:
        for name in release(tmp_path, "csv"):
            z.write(tmp_path / name, name)
    assert is_the_log(log_of(tmp_path, "films"), SEEN)


def test_two_zips_of_one_name_are_two_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_files, "CACHE", tmp_path / "cache")
    for user in "27":  # of one size
        raw = tmp_path / user
        raw.mkdir()
        with zipfile.ZipFile(raw / "archive.zip", "w") as z:
            for name in release(raw, "csv"):
                z.writestr(name, (raw / name).read_text().replace("\n2,", f"\n{user},"))
                (raw / name).unlink()
    for user in "27":
        rows = [(user if u == "2" else u, i, t) for u, i, t in SEEN]
        assert is_the_log(log_of(tmp_path / user, "films"), rows)


def test_two_files_of_one_name_that_differ_are_refused(tmp_path):
    for year, rows in (("2014", ROWS), ("2015", [*ROWS[1:], ROWS[1]])):
        (tmp_path / year).mkdir()
        lines = [f"{u},{i},5.0,{t}\n" for u, i, t in rows]
        (tmp_path / year / "ratings_Beauty.csv").write_text("".join(lines))
    meta(tmp_path, "Beauty")
    said = refusal(tmp_path, "beauty")
    assert "2014/ratings_Beauty.csv and 2015/ratings_Beauty.csv, which differ" in said


# ---------------------------------------------------------------- the others


def test_last_fm_s_lines_without_a_cell_are_one_sentence(tmp_path):
    tags = tmp_path / "user_taggedartists-timestamps.dat"
    tags.write_text("userID\tartistID\ttagID\ttimestamp\n2\t52\t13\t1238536800000\n2\t52\t13\n")
    artists = tmp_path / "artists.dat"
    artists.write_text("id\tname\turl\tpictureURL\n52\tMorcheeba\n53\n")
    assert f"{tags}, line 3: 3 cells" in refusal(tmp_path, "lastfm")
    tags.write_text(tags.read_text().rpartition("2\t52")[0])
    assert f"{artists}, line 3: 1 cells" in refusal(tmp_path, "lastfm")
    artists.write_bytes(b"id\tname\n52\tMorcheeba\n53\tBj\xf6rk\n54\tBj\xc3\xb6rk\n")
    titles = log_of(tmp_path, "lastfm").log.titles
    assert titles == {"52": "Morcheeba", "53": "Björk", "54": "Björk"}


def test_steam_s_reviews_of_no_day_of_the_calendar_are_left_out(tmp_path):
    good = {"username": "u", "product_id": "1", "date": "2017-02-28"}
    packed(
        tmp_path / "steam_reviews.json.gz",
        [repr(good), repr(good | {"date": "2017-02-30"}), "None", repr({"username": "u"})],
    )
    packed(tmp_path / "steam_games.json.gz", [repr({"id": "1", "app_name": "Tea"})])
    log = log_of(tmp_path, "steam").log
    assert log.rows.when.tolist() == [1488240000] and log.titles == {"1": "Tea"}
    assert "2 reviews without a user, game or date are left out" in log.notes


def test_halves_of_a_character_in_published_records_are_joined_or_replaced(tmp_path):
    good = {"username": "u", "product_id": "1", "date": "2017-02-28"}
    packed(tmp_path / "steam_reviews.json.gz", [repr(good)])
    tea = r"{u'id': u'1', u'app_name': u'Tea \ud83d\ude00 \ud83d'}"
    packed(tmp_path / "steam_games.json.gz", [tea])
    assert log_of(tmp_path, "steam").log.titles == {"1": "Tea 😀 \ufffd"}
    layout_2018(tmp_path, "Software")
    titles = [f'{{"asin": "{i}", "title": "Tea \\ud83d"}}' for i in ITEMS]
    packed(tmp_path / "meta_Software.json.gz", titles)
    assert set(log_of(tmp_path).log.titles.values()) == {"Tea \ufffd"}


def test_kuairec_s_times_keep_their_milliseconds_and_captions_their_line_breaks(tmp_path):
    (tmp_path / "small_matrix.csv").write_text(
        "user_id,video_id,timestamp,watch_ratio\n1,1,1593878903.438,3\n1,2,1593878903.25,3\n1,1,,3\n"
    )
    (tmp_path / "kuairec_caption_category.csv").write_bytes(
        "video_id,manual_cover_text,caption,topic_tag\n1,UNKNOWN,国王\r国王,[]\n2,a\0b,,[]\n".encode()
    )
    log = log_of(tmp_path, "kuairec").log
    assert log.rows.when.tolist() == [1593878903438, 1593878903250]
    assert log.titles == {"1": "国王 国王", "2": "a b"}


# ---------------------------------------------------------------- places


@pytest.mark.parametrize(
    "raw, interactions, items, says",
    [
        ("{}/shop.csv", None, None, "is a file; give it so: X --interactions {}/shop.csv"),
        ("{}/nothing", None, None, "there is no folder {}/nothing"),
        ("{}/ml.zip", None, None, "give the folder it lies in: --raw {}"),
        ("{}", "{}/shop.csv", None, "give one of them"),
        ("{}", None, "{}/shop.csv", "--items is the table of titles of --interactions"),
        (None, "{}/nothing.csv", None, "there is no file {}/nothing.csv"),
        ("{}", None, None, "no interactions.csv but shop.csv"),
        ("{}", None, None, "Or name the file: X --interactions {}/shop.csv"),
    ],
)
def test_a_place_that_cannot_be_meant_is_one_sentence(tmp_path, raw, interactions, items, says):
    for name in ("shop.csv", "shop.jsonl"):
        (tmp_path / name).write_text("user,item\n")
    zipfile.ZipFile(tmp_path / "ml.zip", "w").close()
    paths = [type(tmp_path)(p.format(tmp_path)) if p else None for p in (raw, interactions, items)]
    command = f"X --raw {raw.format(tmp_path)}" if raw else "X"
    with pytest.raises(ClickException) as refused:
        read_log("shop", Place(*paths), Request(command=command), None)
    assert says.format(tmp_path) in refused.value.message
