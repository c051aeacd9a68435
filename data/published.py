"""Readers of the files that publishers give: MovieLens, Amazon, Steam, KuaiRec, Last.fm.

A reader takes a folder (the files may lie anywhere below it, also inside the publisher's zip) and
what data/sources.py says of the data set, and returns its log.
"""

import ast
import csv
import gzip
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

from delrec.data.log import Log, Rows, digests, rows_of
from delrec.data.own import read_titles, stop_at_bad_byte
from delrec.data.titles import one_line, plain_title
from delrec.runtime import CACHE, stop

# ---------------------------------------------------------------- files as they lie there


def find(folder: Path, *names: str, needed: bool = True) -> Path | None:
    """The first file of one of these names (or patterns) in a folder, below it, or in a zip in it,
    which is unpacked into the cache. None where there is none and it is not needed.
    """
    for name in names:
        found = sorted(p for p in folder.rglob(name) if p.is_file())
        if found:
            return found[0]
    for archive in sorted(folder.glob("*.zip")):
        path = unpack(archive, names)
        if path:
            return path
    if needed:
        stop(
            f"{folder} holds no {' or '.join(names)}; put it there (data/README.md says where it "
            "comes from)"
        )
    return None


def unpack(archive: Path, names: tuple[str, ...]) -> Path | None:
    """The first member of a zip that has one of these names, as a file in the cache."""
    try:
        with zipfile.ZipFile(archive) as z:
            for member in z.infolist():
                if not any(Path(member.filename).match(name) for name in names):
                    continue
                path = CACHE / "raw" / archive.stem / Path(member.filename).name
                if not path.exists() or path.stat().st_size != member.file_size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with z.open(member) as source, open(f"{path}.part", "wb") as target:
                        shutil.copyfileobj(source, target, 2**20)
                    os.replace(f"{path}.part", path)
                return path
    except (zipfile.BadZipFile, zlib.error) as bad:
        stop(f"{archive} is not a whole zip file ({bad}); download it again")
    return None


def records(path: Path) -> Iterator[dict]:
    """The records of a file of JSON or Python literals, one a line (.gz or not), with a progress
    bar. Literals are parsed, never run.
    """
    bar = tqdm(
        total=path.stat().st_size,
        unit="B",
        unit_scale=True,
        desc=path.name,
        leave=False,
        disable=None,
    )
    with open(path, "rb") as raw, bar:
        lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            for n, line in enumerate(lines, 1):
                if n % 20000 == 0:
                    bar.update(raw.tell() - bar.n)
                if line.strip():
                    yield record_of(line, path, n)
        except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
            stop(f"{path} is not a whole gzip file ({bad}); download it again")


def record_of(line: bytes, path: Path, n: int) -> dict:
    """The record of line n."""
    try:
        return json.loads(line)
    except ValueError:
        pass
    try:
        return ast.literal_eval(line.decode())
    except (ValueError, SyntaxError, UnicodeDecodeError):
        stop(f"{path}, line {n}: neither JSON nor a Python literal; download the file again")


def delimited(path: Path, columns: dict, header: bool = False) -> pl.DataFrame:
    """Columns {our name: place or name in the file} of a large csv by polars, all Strings."""
    try:
        rows = pl.read_csv(
            path, has_header=header, columns=list(columns.values()), infer_schema=False
        )
    except (OSError, pl.exceptions.PolarsError) as bad:
        if "utf-8" in str(bad):
            stop_at_bad_byte(path)
        stop(f"{path} cannot be read ({str(bad).splitlines()[0][:150]}); download it again")
    # the columns come in the file's order, whatever they are called
    if not header:
        return rows.rename(dict(zip(rows.columns, sorted(columns, key=columns.get))))
    return rows.select(pl.col(theirs).alias(ours) for ours, theirs in columns.items())


def seconds(rows: pl.DataFrame, path: Path) -> np.ndarray:
    """The column `time` of Strings as whole numbers, int64; '1593878903.4' is cut."""
    when = rows["time"].str.replace(r"\.[0-9]*$", "").cast(pl.Int64, strict=False)
    if when.null_count():
        stop(
            f"{path}: the time {rows['time'].filter(when.is_null())[0]!r} is not a number; "
            "download the file again"
        )
    return when.to_numpy()


# ---------------------------------------------------------------- the readers


def read_movielens(folder: Path, _: None) -> Log:
    """ml-1m: ratings.dat, movies.dat (latin-1, '::'); ml-latest-small and its larger sisters:
    ratings.csv, movies.csv.
    """
    ratings = find(folder, "ratings.dat", "ratings.csv")
    movies = find(folder, "movies" + ratings.suffix)
    if ratings.suffix == ".dat":
        cells = [line.split("::") for line in ratings.read_text(encoding="latin-1").splitlines()]
        rows = rows_of([c[0] for c in cells], [c[1] for c in cells], [int(c[3]) for c in cells])
        cells = [line.split("::") for line in movies.read_text(encoding="latin-1").splitlines()]
        titles = {c[0]: c[1] for c in cells}
    else:
        columns = {"user": "userId", "item": "movieId", "time": "timestamp"}
        table = delimited(ratings, columns, header=True)
        rows = rows_of(table["user"], table["item"], seconds(table, ratings))
        titles = read_titles(movies, "movieId", "title")
    return Log(
        rows=rows,
        titles={item: plain_title(" ".join(title.split())) for item, title in titles.items()},
        source=f"MovieLens, {ratings.name}, {movies.name}",
        raw_sha256=digests(ratings, movies),
    )


def read_amazon(folder: Path, category: str) -> Log:
    """Ratings of a category, 2014 or 2018, as csv, else its reviews as JSON or Python literals;
    titles from meta_X.json.gz. Products without a title in it get none.
    """
    ratings = find(
        folder,
        f"ratings_{category}.csv",
        f"{category}.csv",
        f"ratings_{category}.csv.gz",
        f"{category}.csv.gz",
        needed=False,
    )
    meta = find(folder, f"meta_{category}.json.gz", f"meta_{category}.json")
    if ratings:
        rows = amazon_ratings(ratings)
    else:
        stems = (f"reviews_{category}", category, f"reviews_{category}_5", f"{category}_5")
        reviews = find(folder, *(f"{stem}.json{gz}" for stem in stems for gz in (".gz", "")))
        rows = amazon_reviews(reviews)
    titles = dict.fromkeys(rows.item.unique().to_list(), "")
    for r in records(meta):
        if r.get("asin") in titles and not titles[r["asin"]]:
            titles[r["asin"]] = str(r.get("title") or "")
    read = ratings or reviews
    return Log(
        rows=rows,
        titles=titles,
        source=f"Amazon reviews, {read.name}, {meta.name}",
        raw_sha256=digests(read, meta),
    )


def amazon_ratings(path: Path) -> Rows:
    """The rows of ratings_X.csv (2014: user, item, rating, time) or X.csv (2018: item first)."""
    first, second = ("user", "item") if path.name.startswith("ratings_") else ("item", "user")
    table = delimited(path, {first: 0, second: 1, "time": 3})
    return rows_of(table["user"], table["item"], seconds(table, path))


def amazon_reviews(path: Path) -> Rows:
    """The rows of reviews_X.json.gz, X.json.gz, and the same with _5 behind X."""
    user, item, when = [], [], []
    for r in records(path):
        user.append(sys.intern(r["reviewerID"]))
        item.append(sys.intern(r["asin"]))
        when.append(int(r["unixReviewTime"]))
    return rows_of(user, item, when)


def read_steam(folder: Path, _: None) -> Log:
    """steam_reviews.json.gz (username, product_id, date), steam_games.json.gz (id, app_name),
    Python literals; a day is as fine as time gets.
    """
    reviews = find(folder, "steam_reviews.json.gz", "steam_reviews.json")
    games = find(folder, "steam_games.json.gz", "steam_games.json")
    user, item, when = [], [], []
    left_out = 0
    for r in records(reviews):
        if not is_whole_review(r):
            left_out += 1
            continue
        user.append(sys.intern(one_line(str(r["username"])) or "?"))
        item.append(sys.intern(str(r["product_id"]).strip()))
        when.append(int(np.datetime64(r["date"], "D").astype(int)) * 86400)
    titles = dict.fromkeys(item, "")
    for r in records(games):
        if str(r.get("id")) in titles:
            titles[str(r["id"])] = str(r.get("app_name") or r.get("title") or "")
    notes = []
    if left_out:
        notes.append(f"{left_out:,} reviews without a user, game or date are left out")
    return Log(
        rows=rows_of(user, item, when),
        titles=titles,
        source=f"Steam reviews, {reviews.name}, {games.name}",
        raw_sha256=digests(reviews, games),
        notes=notes,
    )


def is_whole_review(r: dict) -> bool:
    """True for a review of Steam's that names its user, its game and its day."""
    has_user = str(r.get("username") or "").strip()
    has_day = re.fullmatch(r"\d{4}-\d\d-\d\d", str(r.get("date") or ""))
    return bool(has_user and r.get("product_id") and has_day)


def read_kuairec(folder: Path, least: float) -> Log:
    """big_matrix.csv, else small_matrix.csv: what was watched for at least `least` times its
    length; captions (Chinese) as titles.
    """
    matrix = find(folder, "big_matrix.csv", "small_matrix.csv")
    captions = find(folder, "kuairec_caption_category.csv")
    columns = {"user": "user_id", "item": "video_id", "time": "timestamp", "ratio": "watch_ratio"}
    watched = delimited(matrix, columns, header=True)
    total = len(watched)
    watched = watched.filter(
        pl.col("ratio").cast(pl.Float64, strict=False) >= least,
        pl.col("time").is_not_null() & (pl.col("time") != ""),
    )
    titles = dict.fromkeys(watched["item"].unique().to_list(), "")
    for r in caption_rows(captions):
        if str(r.get("video_id")) in titles:
            titles[str(r["video_id"])] = caption_of(r)
    return Log(
        rows=rows_of(watched["user"], watched["item"], seconds(watched, matrix)),
        titles=titles,
        source=f"KuaiRec, {matrix.name}, {captions.name}, watch_ratio >= {least}",
        raw_sha256=digests(matrix, captions),
        notes=[
            f"{total - len(watched):,} of {total:,} rows were watched for less than {least} times "
            "the video's length, or have no time"
        ],
    )


def caption_rows(path: Path) -> Iterator[dict]:
    """The rows of a csv of captions, which may be long; one that is not UTF-8 is refused."""
    csv.field_size_limit(2**24)
    try:
        with open(path, encoding="utf-8-sig", newline="") as f:
            yield from csv.DictReader(f)
    except UnicodeDecodeError:
        stop_at_bad_byte(path)


def caption_of(r: dict) -> str:
    """A video's caption, else the text on its cover, else its topics, else nothing."""
    for column in ("caption", "manual_cover_text", "topic_tag"):
        said = str(r.get(column) or "").strip()
        if said not in ("", "UNKNOWN", "[]"):
            return said
    return ""


def read_lastfm(folder: Path, _: None) -> Log:
    """HetRec 2011 Last.fm 2k: a user's tagging of an artist with its time (plays have none);
    several tags given at once are one interaction.
    """
    tags = find(folder, "user_taggedartists-timestamps.dat")
    artists = find(folder, "artists.dat")
    try:
        lines = tags.read_text(encoding="utf-8").splitlines()[1:]
    except UnicodeDecodeError:
        stop_at_bad_byte(tags)
    cells = [line.split("\t") for line in lines]
    # some are of 1956; Last.fm's tags begin in 2005
    real = [c for c in cells if int(c[3]) >= 1104537600000]
    notes = []
    if len(real) < len(cells):
        notes.append(f"{len(cells) - len(real)} rows dated before 2005 are left out")
    lines = artists.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    titles = {line.split("\t")[0]: line.split("\t")[1] for line in lines}
    for c in real:
        titles.setdefault(c[1], "")
    when = [int(c[3]) // 1000 for c in real]
    return Log(
        rows=rows_of([c[0] for c in real], [c[1] for c in real], when),
        titles=titles,
        source=f"HetRec 2011 Last.fm, {tags.name}, {artists.name}",
        raw_sha256=digests(tags, artists),
        notes=notes,
    )
