"""MovieLens in any of its releases: the ratings and the movies, as .dat, .csv or GroupLens' first
files.
"""

from pathlib import Path

import polars as pl

from delrec.data.log import Log, digests, rows_of
from delrec.data.raw_files import (
    RawFile,
    are_copies,
    clock_in,
    files_below,
    files_in_zips,
    find,
    listed,
    on_disk,
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
NAMES = [*PAIRS, *PAIRS.values()]


def is_movielens(folder: Path) -> bool:
    """True for a folder that holds, also in a zip, the two files of a release."""
    found = files_below(folder, *NAMES) + files_in_zips(folder, *NAMES)
    names = {file.path.name for file in found}
    return any({ratings, movies} <= names for ratings, movies in PAIRS.items())


def release_in(folder: Path, name: str) -> tuple[Path, Path]:
    """The ratings and the movies in a folder, also in a zip in it: of several releases those of
    the one whose folder or zip is called `name`.
    """
    found = files_below(folder, *NAMES)
    if not any(is_called(file, folder, name) for file in found):
        found += files_in_zips(folder, *NAMES)
    pairs = pairs_of(found)
    if not pairs:  # the two lie in folders of their own
        ratings = find(folder, *PAIRS)
        return ratings, find(folder, PAIRS[ratings.name])
    pairs = [pair for pair in pairs if is_called(pair[0], folder, name)] or pairs
    found = [ratings for ratings, _ in pairs]
    if not are_copies(found):
        stop(
            f"{folder} holds several releases of MovieLens, {listed(found, folder)}, and not one "
            f"of them in a folder or zip called {name}; call it that, or move the others out of "
            f"{folder}"
        )
    ratings, movies = pairs[0]
    return on_disk(ratings), on_disk(movies)


def pairs_of(found: list[RawFile]) -> list[tuple[RawFile, RawFile]]:
    """The ratings with the movies that lie beside them, one pair a folder."""
    by_path = {file.path: file for file in found}
    pairs = {}
    for ratings, movies in PAIRS.items():
        for path, file in by_path.items():
            if path.name == ratings and path.with_name(movies) in by_path:
                pairs.setdefault(path.parent, (file, by_path[path.with_name(movies)]))
    return list(pairs.values())


def is_called(file: RawFile, folder: Path, name: str) -> bool:
    """True for a file whose folder or zip has this name."""
    places = file.path.relative_to(folder).parts[:-1] or (folder.name,)
    return name.lower() in (place.removesuffix(".zip").lower() for place in places)


def read_movielens(folder: Path, name: str) -> Log:
    """The log of a release: ratings.dat and movies.dat ('::'), ratings.csv and movies.csv, or
    u.data (tabs) and u.item ('|').
    """
    ratings, movies = release_in(folder, name)
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
