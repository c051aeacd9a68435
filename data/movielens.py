"""MovieLens in any of its releases: the ratings and the movies, as .dat, .csv or GroupLens' first
files.
"""

from pathlib import Path

import polars as pl

from delrec.data.log import Log, digests, rows_of
from delrec.data.raw_files import (
    clock_in,
    find,
    split_lines,
    stop_at_missing,
    titles_from,
)
from delrec.data.tables import read_table
from delrec.data.times import Where
from delrec.data.titles import plain_title
from delrec.runtime import stop

# the two files of a release, the ratings first; Kaggle calls some of them in the singular
PAIRS = {
    "ratings.dat": "movies.dat",
    "ratings.csv": "movies.csv",
    "u.data": "u.item",
    "rating.csv": "movie.csv",
}


def is_movielens(folder: Path) -> bool:
    """True for a folder that holds, also in a zip, the two files of a release."""
    return any(
        find(folder, ratings, needed=False) and find(folder, movies, needed=False)
        for ratings, movies in PAIRS.items()
    )


def read_movielens(folder: Path, _: None = None) -> Log:
    """The log of a release: ratings.dat and movies.dat ('::'), ratings.csv and movies.csv, or
    u.data (tabs) and u.item ('|').
    """
    ratings = find(folder, *PAIRS)
    movies = find(folder, PAIRS[ratings.name])
    notes = []
    if ratings.suffix == ".csv":
        rows, place = csv_columns(
            ratings, {"user": "userId", "item": "movieId", "time": "timestamp"}
        )
        films, film_place = csv_columns(movies, {"item": "movieId", "title": "title"})
    else:
        separators = {".dat": ("::", "::"), ".data": ("\t", "|")}[ratings.suffix]
        columns = {"user": 0, "item": 1, "time": 3}
        rows, place = split_lines(ratings, separators[0], columns, 4, notes)
        films, film_place = split_lines(movies, separators[1], {"item": 0, "title": 1}, 2, notes)
    stop_at_missing({"user": rows["user"], "movie": rows["item"], "time": rows["time"]}, place)
    clock = clock_in(rows["time"], place)
    titles = titles_from(films["item"], films["title"], film_place)
    return Log(
        rows=rows_of(rows["user"], rows["item"], clock.when),
        titles={item: plain_title(" ".join(title.split())) for item, title in titles.items()},
        source=f"MovieLens, {ratings.name}, {movies.name}",
        raw_sha256=digests(ratings, movies),
        notes=notes + clock.notes,
    )


def csv_columns(path: Path, columns: dict[str, str]) -> tuple[pl.DataFrame, Where]:
    """Columns {our name: theirs} of a csv, and where each row stands."""
    table = read_table(path, list(columns.values()))
    missing = [name for name in columns.values() if name not in table.header]
    if missing:
        stop(
            f"{path}: the header names {', '.join(table.header)}; expected "
            f"{', '.join(columns.values())}; for a log of your own use --interactions {path}"
        )
    return table.rows.select(pl.col(theirs).alias(ours) for ours, theirs in columns.items()), (
        table.place
    )
