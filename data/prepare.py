"""Any raw log -> a prepared folder (formats and rules: data/README.md).

    python data/prepare.py ml-100k                  MovieLens 100K, fetched by itself
    python data/prepare.py beauty                   a published data set, fetched where its host
                                                    answers, else --raw FOLDER
    python data/prepare.py my-shop --raw FOLDER --noun product --verb bought
    python data/prepare.py my-shop --interactions orders.csv --user-column customer
                                                    one table, its titles in a column
    python data/prepare.py my-shop --check          is it what it says, and free of leaks?
    python data/prepare.py ml-100k --audit          what may be said of models on this log?
    python data/prepare.py smollm2-135m             the embedded LM, converted once into the cache
    python data/prepare.py minilm                   MiniLM, which gives titles vectors

NAME is a data set known by name (ml-100k, ml-1m, ml-latest-small, steam, beauty, toys, games,
sports, home-kitchen, kuairec, lastfm), or your own with --raw or --interactions; with --raw also
another category of Amazon's or another release of MovieLens. With --check it may be a folder.
smollm2-135m fetches the embedded language model, minilm all-MiniLM-L6-v2.

M interactions, U users, I items (ids 1..I, 0 pads), C candidates, n samples of a split.
"""

import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import click

# run as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from delrec import runtime
from delrec.data.audit import audit_folder
from delrec.data.check import check_folder
from delrec.data.earlier import place_of_earlier, stop_unless_replaceable
from delrec.data.fetch import fetch_llm
from delrec.data.hints import Columns, Request
from delrec.data.log import Log
from delrec.data.minilm import fetch_minilm
from delrec.data.pictures import draw_pictures
from delrec.data.prepared import COLUMNS, load_data
from delrec.data.reading import Place, command_as_typed, read_log
from delrec.data.rules import Preparation, Rules, apply_rules, split_of
from delrec.data.sources import SOURCES, Source
from delrec.data.summary import meta_of, summary
from delrec.data.title_faults import faults_of_folder
from delrec.data.titles import one_line
from delrec.ranges import ABOVE_0
from delrec.runtime import (
    beside,
    complete_renames,
    described,
    empty,
    lock,
    put_in_place,
    read_json,
    stop,
    unlock,
    write_json,
    write_npy,
)

MODELS = {"smollm2-135m": fetch_llm, "minilm": fetch_minilm}  # what else NAME may fetch

# ---------------------------------------------------------------- a log becomes a folder


def prepare(
    log: Log, name: str, out: Path, rules: Rules, words: dict[str, str], overwrite: bool
) -> dict:
    """The meta of the prepared folder `out` of a log, once the folder is written. words: noun and
    verb of the prompts.
    """
    complete_renames(out, "meta.json")
    stop_unless_replaceable(out)
    rules = replace(rules, split=split_of(rules.split, log.rows.timed))
    made = apply_rules(log, rules)
    meta = meta_of(name, log, rules, words, made)
    keep = None
    if out.is_dir() and any(out.iterdir()):
        differences = differences_from(out, meta, made)
        if not differences:
            print(
                f"{out} holds this preparation already (hash {meta['hash']}): nothing was replaced"
            )
            return meta
        keep = place_of_earlier(out, meta, differences, overwrite)
        stays = f"; the earlier one stays as {keep}" if keep else ""
        print(f"{out} is replaced ({', '.join(differences)}){stays}")
    write_prepared(out, made, meta, keep)
    return meta


def text_files(made: Preparation) -> dict[str, bytes]:
    """Name of a text file of a prepared folder -> what it holds, a line an item or user."""
    lines = {
        "titles.txt": made.titles.text,
        "raw_items.txt": made.left.item_ids,
        "raw_users.txt": made.left.user_ids,
    }
    files = {name: "".join(f"{line}\n" for line in text).encode() for name, text in lines.items()}
    if made.columns is not None:
        files[COLUMNS] = made.columns.write_csv().encode()
    return files


def differences_from(out: Path, meta: dict, made: Preparation) -> list[str]:
    """In what the preparation in `out` differs from a new one."""
    old = read_json(out / "meta.json")
    found = [key for key in ("hash", "name", "words") if old.get(key) != meta[key]]
    text = text_files(made)
    for kind in ("items", "users"):
        path = out / f"raw_{kind}.txt"
        if not path.exists() or path.read_bytes() != text[path.name]:
            found.append(f"raw ids of {kind}")
    columns = out / COLUMNS
    if (columns.read_bytes() if columns.exists() else None) != text.get(COLUMNS):
        found.append("columns of items")
    return found


def write_prepared(out: Path, made: Preparation, meta: dict, keep: Path | None) -> None:
    """Writes a prepared folder beside `out` and puts it there when it is whole; what stood there
    goes, or to `keep`.
    """
    new = beside(out, "unfinished")
    lock(new)
    try:
        empty(new)  # of a run that was killed
        for name, array in made.arrays.items():
            write_npy(new / f"{name}.npy", array)
        for name, text in text_files(made).items():
            (new / name).write_bytes(text)
        write_json(new / "meta.json", meta)
        put_in_place(out, keep)
    except OSError as bad:
        stop(f"could not write {out}: {bad}; free the space or give another --out")
    finally:
        if out.exists() or not (new / "meta.json").exists():
            shutil.rmtree(new, ignore_errors=True)  # else the next command puts it in its place
        unlock(new)


# ---------------------------------------------------------------- the command


@click.command(**described(__doc__))
@click.argument("name")
@click.option(
    "--raw",
    type=click.Path(path_type=Path),
    help="folder with the raw files: a published data set's, or your own interactions and items "
    "(.csv, .tsv, .csv.gz, .parquet), or RecBole's .inter and .item",
)
@click.option(
    "--interactions",
    type=click.Path(path_type=Path),
    help="one file instead of a folder: a table of your own, its titles in a column of it",
)
@click.option(
    "--items",
    type=click.Path(path_type=Path),
    help="the titles of --interactions, where they are in a file of their own",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="the prepared folder  [default: data/NAME]"
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="replace another preparation in --out, once the new one is whole; while runs use the "
    "earlier one it stays, as NAME@HASH",
)
@click.option(
    "--check",
    "checking",
    is_flag=True,
    help="prepare nothing: check the prepared folder for leaks and wrong candidates; exit code "
    "1 if there are any",
)
@click.option(
    "--audit",
    "auditing",
    is_flag=True,
    help="also print and draw one page about the log: ties, order, gaps, leaks, popularity",
)
@click.option(
    "--core",
    default=5,
    type=click.IntRange(min=1),
    help="every user and item keeps at least so many interactions",
)
@click.option(
    "--split",
    type=click.Choice(["temporal", "leave-one-out", "files"]),
    help="files: as the log's own files .train, .valid and .test have it  [default: temporal where "
    "times exist, else leave-one-out]",
)
@click.option(
    "--ties",
    default="shuffled",
    type=click.Choice(["shuffled", "item", "file"]),
    help="order of a user's interactions of equal time: drawn once, by item id (which tells "
    "a model of ids the answer), or as the rows of the file stand",
)
@click.option("--seed", default=0, type=click.IntRange(min=0), help="of the candidates")
@click.option(
    "--max-eval",
    type=click.IntRange(min=1),
    help="at most so many validation and test samples each, drawn once; the part they are drawn "
    "from stays what it is",
)
@click.option(
    "--noun",
    help="what an item is called in prompts, singular  [default: the data set's own, else item]",
)
@click.option(
    "--verb",
    help="what a user did with it, past tense  [default: the data set's own, else interacted with]",
)
@click.option(
    "--min-watch",
    type=ABOVE_0,
    help="kuairec: times its length that a video must be watched to count  [default: 2]",
)
@click.option("--user-column", "user", help="name of the column in your file  [default: user]")
@click.option("--item-column", "item", help="the same, in both files  [default: item]")
@click.option("--time-column", "timestamp", help="the same  [default: timestamp]")
@click.option("--position-column", "position", help="the same  [default: position]")
@click.option("--title-column", "title", help="the same  [default: title]")
@click.option(
    "--time-format",
    help="how your times are written, as strptime has it: '%d/%m/%Y %H:%M'; numbers and dates "
    "like 2014-01-31 need none",
)
@click.option(
    "--encoding",
    help="of those of your text files that are not UTF-8, such as windows-1252  [default: utf-8]",
)
@click.option(
    "--drop-incomplete",
    is_flag=True,
    help="leave out your rows without a user, an item or a time, and those of items without a row "
    "in the table of titles",
)
def main(
    name: str,
    raw: Path | None,
    interactions: Path | None,
    items: Path | None,
    out: Path | None,
    overwrite: bool,
    checking: bool,
    auditing: bool,
    core: int,
    split: str | None,
    ties: str,
    seed: int,
    max_eval: int | None,
    noun: str | None,
    verb: str | None,
    min_watch: float | None,
    time_format: str | None,
    encoding: str | None,
    drop_incomplete: bool,
    **columns: str | None,
) -> None:
    """Prepare the data set NAME."""
    start = time.time()
    if checking:
        check_folder(out or runtime.folder_of("data", name.rstrip("/") or "."))
        return
    stop_unless_a_name(name)
    place = Place(raw, interactions, items)
    if place == Place(None, None, None) and name in MODELS:
        print(MODELS[name]())
        return
    request = Request(
        columns=Columns(**columns),
        encoding=encoding,
        time_format=time_format,
        drop_incomplete=drop_incomplete,
        keep_parts=split == "files",
    )
    request.command = command_as_typed(click.get_current_context())
    out = out or runtime.ROOT / "data" / name
    stop_unless_readable(name, place, out)
    found = read_log(name, place, request, min_watch)
    words = {
        "noun": one_line(noun or "") or found.words["noun"],
        "verb": one_line(verb or "") or found.words["verb"],
    }
    rules = Rules(split, core, ties, seed, max_eval)
    meta = prepare(found.log, name, out, rules, words, overwrite)
    print(summary(meta, out))
    notes = found.log.notes
    if found.source and core == 5:
        notes += notes_on_counts(meta, found.source)
    for note in notes:
        print(f"note: {note}")
    data = load_data(str(out))
    for line in faults_of_folder(data, found.log.titles):
        print(line)
    draw_pictures(data, out / "pictures.png")
    print(f"prepared in {time.time() - start:.1f} s; pictures in {out / 'pictures.png'}")
    if auditing:
        audit_folder(found.log, replace(rules, split=meta["split"]), data)


def stop_unless_a_name(name: str) -> None:
    """Stops unless the name can name a folder."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        stop(
            f"the name {name!r} cannot name a folder; use letters, digits, '.', '_' and '-', and "
            "no dot in front"
        )


def stop_unless_readable(name: str, place: Place, out: Path) -> None:
    """Stops if nothing is known of the name, or if the raw files stand where `out` is written."""
    known = ["ml-100k", *SOURCES]
    if place.raw is None and place.interactions is None and name not in known:
        stop(
            f"there is no data set {name!r}, only {', '.join(known)} (and the models "
            f"{' and '.join(MODELS)}); "
            f"for your own data: python data/prepare.py {name} --raw FOLDER with interactions.csv "
            f"and items.csv, or python data/prepare.py {name} --interactions FILE"
        )
    for path in filter(None, (place.raw, place.interactions, place.items)):
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            stop(
                f"the raw files {path} lie in the folder to be written, {out}, which would "
                "replace it; give another --out"
            )


def notes_on_counts(meta: dict, source: Source) -> list[str]:
    """A line where the 5-core of a published data set is not the well-known one."""
    if not source.after or (meta["users"], meta["items"], meta["interactions"]) == source.after:
        return []
    users, items, interactions = source.after
    return [
        f"after the 5-core this data set usually has {users:,} users, {items:,} items, "
        f"{interactions:,} interactions"
    ]


if __name__ == "__main__":
    main()
