"""Readers of the files that publishers give: Steam, KuaiRec, Last.fm (data/movielens.py and
data/amazon.py read theirs).

A reader takes a folder (the files may lie anywhere below it, also inside the publisher's zip) and
what data/sources.py says of the data set, and returns its log.
"""

import csv
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl

from delrec.data.forms import stop_at_bad_byte
from delrec.data.log import Log, digests, rows_of
from delrec.data.movielens import csv_columns
from delrec.data.raw_files import (
    bytes_of,
    clock_in,
    find,
    records,
    split_lines,
    stop_at_missing,
    titles_from,
)
from delrec.data.times import MISSING, coarsest
from delrec.data.titles import one_line
from delrec.runtime import stop


def read_steam(folder: Path, _: None) -> Log:
    """steam_reviews.json.gz (username, product_id, date), steam_games.json.gz (id, app_name),
    Python literals; a day is as fine as time gets.
    """
    reviews = find(folder, "steam_reviews.json.gz", "steam_reviews.json")
    games = find(folder, "steam_games.json.gz", "steam_games.json")
    user, item, when = [], [], []
    left_out, notes = 0, []
    for _, r in records(reviews, notes):
        day = day_of(r)
        if day is None:
            left_out += 1
            continue
        user.append(sys.intern(one_line(str(r["username"])) or "?"))
        item.append(sys.intern(str(r["product_id"]).strip()))
        when.append(day * 86400)
    titles = dict.fromkeys(item, "")
    for _, r in records(games, notes):
        if str(r.get("id")) in titles:
            titles[str(r["id"])] = str(r.get("app_name") or r.get("title") or "")
    if left_out:
        notes.append(f"{left_out:,} reviews without a user, game or date are left out")
    return Log(
        rows=rows_of(user, item, when),
        titles=titles,
        source=f"Steam reviews, {reviews.name}, {games.name}",
        raw_sha256=digests(reviews, games),
        notes=notes,
    )


def day_of(r: dict) -> int | None:
    """The day since 1970 of a review of Steam's that names its user, its game and its day; else
    None.
    """
    if not str(r.get("username") or "").strip() or not str(r.get("product_id") or "").strip():
        return None
    try:
        day = date.fromisoformat(str(r.get("date") or ""))
    except ValueError:
        return None
    return (day - date(1970, 1, 1)).days


def read_kuairec(folder: Path, least: float) -> Log:
    """big_matrix.csv, else small_matrix.csv: what was watched for at least `least` times its
    length; captions (Chinese) as titles.
    """
    matrix = find(folder, "big_matrix.csv", "small_matrix.csv")
    captions = find(folder, "kuairec_caption_category.csv")
    columns = {"user": "user_id", "item": "video_id", "time": "timestamp", "ratio": "watch_ratio"}
    rows, place = csv_columns(matrix, columns)
    watched = rows["ratio"].cast(pl.Float64, strict=False).fill_null(-1) >= least
    kept = np.flatnonzero((watched & ~rows["time"].is_in(MISSING)).to_numpy())
    total, rows = len(rows), rows[kept]

    def place_of_kept(row: int) -> str:
        return place(int(kept[row]))

    stop_at_missing({"user": rows["user"], "video": rows["item"]}, place_of_kept)
    clock = clock_in(rows["time"], place_of_kept)
    titles = dict.fromkeys(rows["item"].unique().to_list(), "")
    for r in caption_rows(captions):
        item = str(r.get("video_id")).strip()
        if item in titles:
            titles[item] = caption_of(r)
    return Log(
        rows=rows_of(rows["user"], rows["item"], clock.when),
        titles=titles,
        source=f"KuaiRec, {matrix.name}, {captions.name}, watch_ratio >= {least}",
        raw_sha256=digests(matrix, captions),
        notes=[
            f"{total - len(rows):,} of {total:,} rows were watched for less than {least} times "
            "the video's length, or have no time",
            *clock.notes,
        ],
    )


def caption_rows(path: Path) -> Iterator[dict]:
    """The rows of a csv of captions, which may be long and hold line breaks of their own; one that
    is not UTF-8 is refused.
    """
    csv.field_size_limit(2**24)
    reader = None
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            lines = (line.rstrip("\r\n").replace("\r", " ").replace("\0", " ") + "\n" for line in f)
            reader = csv.DictReader(lines)
            yield from reader
    except UnicodeDecodeError:
        stop_at_bad_byte(path)
    except csv.Error as bad:
        stop(f"{path}, line {reader.line_num}: {bad}; download the file again")


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
    stop_unless_utf8(tags)
    notes = []
    rows, place = split_lines(tags, "\t", {"user": 0, "item": 1, "time": 3}, 4, notes)
    stop_at_missing({"user": rows["user"], "artist": rows["item"], "time": rows["time"]}, place)
    # some are of 1956; Last.fm's tags begin in 2005
    when = rows["time"].cast(pl.Int64, strict=False)
    if when.null_count():
        row = when.is_null().arg_max()
        stop(f"{place(row)}: the time {rows['time'][row]!r} is no number; download the file again")
    is_real = when >= 1104537600000
    if not is_real.all():
        notes.append(f"{(~is_real).sum()} rows dated before 2005 are left out")
    rows, when = rows.filter(is_real), when.filter(is_real)
    named, named_place = split_lines(artists, "\t", {"item": 0, "title": 1}, 2, notes)
    titles = dict.fromkeys(rows["item"].to_list(), "")
    titles |= titles_from(named["item"], named["title"], named_place)
    return Log(
        rows=rows_of(rows["user"], rows["item"], coarsest(when, 3)),
        titles=titles,
        source=f"HetRec 2011 Last.fm, {tags.name}, {artists.name}",
        raw_sha256=digests(tags, artists),
        notes=notes,
    )


def stop_unless_utf8(path: Path) -> None:
    """Stops at the first byte of a file that is not UTF-8."""
    try:
        bytes_of(path).decode()
    except UnicodeDecodeError:
        stop_at_bad_byte(path)
