"""From a log to a trained backbone in one call: data/prepare.py and train_backbone.py, run as the
command line runs them.

They write under data/ and runs/ of the current folder, or where they are told; never beside the
package.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delrec import runtime
from delrec.processes import run_to_its_end
from delrec.serving.keywords import ITSELF, in_calls, in_keywords, in_names_of_fit, key_of
from delrec.serving.results import Refused

if TYPE_CHECKING:
    import polars as pl

# flags that both scripts have: the seed is training's, and both replace what is there
OF_TRAINING, OF_BOTH = {"seed"}, {"overwrite"}
# the training command as far as it reads no data; argv: its folder, its flags
UP_TO_THE_DATA = """
import sys
sys.path[0] = sys.argv.pop(1)
import common, train_backbone
common.enter = lambda *_: sys.exit()
train_backbone.main()
"""
PLAIN = "sasrec"  # the model of fit() without flags, which training never refuses
USUAL = {"user_column": "user", "item_column": "item", "title_column": "title"}


def fit(
    interactions: Any,
    items: Any,
    name: str,
    model: str,
    said: bool,
    flags: dict[str, Any],
) -> Path:
    """The run folder of a backbone trained on a log: runs/<name>/<model> of the current folder, of
    the prepared data/<name>. See Recommender.fit.
    """
    scripts = [runtime.ROOT / script_of_prepare(), runtime.ROOT / "train_backbone.py"]
    for script in scripts:
        stop_without(script)
    data, run = Path.cwd() / "data" / name, Path.cwd() / "runs" / name / model
    to_prepare, to_train = divided(flags)
    stop_at_finished(run, flags)
    train = ["--dataset", str(data), "--model", model, "--out", str(run)]
    train += as_flags(to_train, scripts[1])
    with tempfile.TemporaryDirectory() as folder:
        log = as_file(interactions, Path(folder) / "interactions.parquet", "interactions")
        stop_unless_named(interactions, items, flags)
        source = ["--interactions", str(log)]
        if log.is_dir() and items is None:
            source = ["--raw", str(log)]
        elif items is not None:
            source += ["--items", str(as_file(items, Path(folder) / "items.parquet", "items"))]
        given = dict(zip((flag[2:] for flag in source[::2]), source[1::2]))
        prepare = [name, *source, "--out", str(data), *as_flags(to_prepare, scripts[0])]
        # before the data are replaced; it costs a start of torch, and these alone may be refused
        if to_train.keys() - OF_BOTH or model != PLAIN:
            with in_python(scripts[1]):
                stop_unless_trainable(scripts[1], train)
        with in_python(scripts[0], given, folder):
            run_script(scripts[0], prepare, said)
    with in_python(scripts[1]):
        run_script(scripts[1], train, said)
    return run


def stop_at_finished(run: Path, flags: dict[str, Any]) -> None:
    """Refuses a run that is there, before its data are touched: what was fitted once is loaded."""
    if runtime.is_run(run) and not (flags.get("overwrite") or flags.get("resume")):
        shown = run.relative_to(Path.cwd()).as_posix()
        raise Refused(
            f'{shown} is there already: Recommender.load("{shown}") answers from it; '
            "overwrite=True trains it again, name= makes another"
        )


@contextlib.contextmanager
def in_python(
    script: Path, given: Mapping[str, str] | None = None, folder: str = ""
) -> Iterator[None]:
    """What a script refuses is refused in the words of fit. given: the paths of the log and of the
    items that it was given; folder: where those are that frames have for a moment only."""
    try:
        yield
    except Refused as bad:
        given, said = given or {}, str(bad)
        if "--" in said:
            switches = switches_of(script)
            said = in_names_of_fit(in_calls(said, given, switches))
            said = in_keywords(said, switches)
        for what, path in given.items():
            said = said.replace(path, what) if folder and path.startswith(folder) else said
        raise Refused(said) from None


def divided(flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the flags of data/prepare.py, those of train_backbone.py) among keywords."""
    for key in ITSELF.keys() & set(flags):
        raise Refused(
            f"fit() was given {key}={flags[key]!r:.60}, but it writes data/NAME and "
            "runs/NAME/MODEL of the current folder; give name= and model=, or call the scripts"
        )
    prepare = import_module("delrec.data.prepare").main  # a script, which nobody else imports
    names = {key_of(opt) for param in prepare.params for opt in param.opts}
    of_prepare = names - OF_TRAINING
    to_prepare = {key: value for key, value in flags.items() if key in of_prepare}
    not_to_train = of_prepare - OF_BOTH
    return to_prepare, {key: value for key, value in flags.items() if key not in not_to_train}


def script_of_prepare() -> str:
    """Where prepare.py stands: in a clone in data/, in an installed package within it."""
    return next(
        (p for p in ("data/prepare.py", "delrec/data/prepare.py") if (runtime.ROOT / p).exists()),
        "data/prepare.py",
    )


def as_file(given: Any, path: Path, what: str) -> Path:
    """A path as it is, made whole; a frame as a parquet file at `path`."""
    if isinstance(given, str | os.PathLike):
        file = Path(given).expanduser().absolute()
        if not file.exists():
            raise Refused(f"{what}: there is no {file}; give a file, a folder or a frame")
        return file
    frame_of(given, what).write_parquet(path)
    return path


def frame_of(given: Any, what: str) -> "pl.DataFrame":
    """A frame of polars or pandas, or a dict of columns, as one of polars; no cell is NaN."""
    import polars as pl

    if isinstance(given, pl.LazyFrame):
        given = given.collect()
    if not isinstance(given, pl.DataFrame | Mapping) and hasattr(given, "to_dict"):
        given = {str(name): list(given[name]) for name in given.columns}  # pandas
    if isinstance(given, Mapping):
        given = {name: with_blanks(column) for name, column in given.items()}
    try:
        frame = pl.DataFrame(given)
    except (TypeError, ValueError, pl.exceptions.PolarsError) as bad:
        raise Refused(
            f"{what} cannot be read as a table ({str(bad).splitlines()[0][:100]}); give a path, a "
            "polars or pandas frame, or a dict of columns, each with values of one kind"
        ) from None
    if not len(frame):
        raise Refused(f"{what} has no rows")
    return frame.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))


def with_blanks(column: Any) -> Any:
    """The values of a column, None where pandas has NaN, NaT or NA; one with a type of its own, and
    a single value, as it is.
    """
    kind = getattr(getattr(column, "dtype", None), "kind", None)  # numpy's and pandas'
    is_listed = isinstance(column, list | tuple) or kind == "O"
    return [None if is_missing(value) else value for value in column] if is_listed else column


def is_missing(value: Any) -> bool:
    """Whether a cell is NaN, NaT or NA: what is missing does not say that it equals itself."""
    if value is None or hasattr(value, "__len__"):  # texts, lists
        return value is None
    try:
        return bool(value != value)
    except TypeError:  # pandas' NA has no truth
        return True


def stop_unless_named(interactions: Any, items: Any, flags: dict[str, Any]) -> None:
    """Refuses frames without the columns that are read of them."""
    user, item, title = (flags.get(key) or usual for key, usual in USUAL.items())
    times = [flags.get("time_column") or "timestamp", flags.get("position_column") or "position"]
    wanted = [(interactions, "interactions", [user, item], times)]
    wanted += [(items, "items", [item, title], [])]
    if items is None:
        wanted = [(interactions, "interactions", [user, item, title], times)]
    for given, what, names, one_of in wanted:
        if given is None or isinstance(given, str | os.PathLike):
            continue
        have = list(map(str, getattr(given, "columns", given)))
        lacking = [name for name in names if name not in have]
        if one_of and not set(one_of) & set(have):
            lacking.append(" or ".join(one_of))
        if lacking:
            raise Refused(
                f"{what} has the columns {', '.join(have)} and lacks {', '.join(lacking)}; name "
                "yours with user_column=, item_column=, time_column= and title_column="
            )


def as_flags(keywords: dict[str, Any], script: Path) -> list[str]:
    """Keywords as flags of a script's command line: core=1 is --core 1, overwrite=True is
    --overwrite, offset=False is --no-offset; False of a flag that has no such other side is none.
    """
    flags = []
    known = flags_of(script) if any(value is False for value in keywords.values()) else set()
    for key, value in keywords.items():
        name = key.replace("_", "-")
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            is_plain = f"--{name}" in known and f"--no-{name}" not in known
            flags += [] if is_plain else [f"--no-{name}"]  # the script refuses what it lacks
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags


def flags_of(script: Path) -> set[str]:
    """The flags that a script's --help tells."""
    told = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    return set(re.findall(r"--[a-z][\w-]*", told.stdout))


@functools.cache
def switches_of(script: Path) -> set[str]:
    """The flags without a value that a script's --help tells, without their dashes."""
    told = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True)
    found = re.findall(r"^  --([a-z][\w-]*)(?: / --\S+)?(?:  |$)", told.stdout, re.M)
    return set(found)


def stop_without(script: Path) -> None:
    """Refuses where a script is not there: an installed package has no train_backbone.py."""
    if not script.exists():
        raise Refused(
            f"this installation lacks {script.name}, which training needs; install from a clone: "
            "pip install -e ."
        )


def stop_unless_trainable(script: Path, args: list[str]) -> None:
    """Refuses what train_backbone.py refuses of its flags, whatever the data are. A process of its
    own looks: the library imports no script.
    """
    run_python(["-c", UP_TO_THE_DATA, str(script.parent), *args], script.name, False)


def run_script(script: Path, args: list[str], said: bool) -> None:
    """Runs a script to its end; its refusal is ours. said: it prints what it prints."""
    run_python([str(script), *args], script.name, said)


def run_python(args: list[str], name: str, said: bool) -> None:
    """Runs Python with arguments. name: of the script whose refusal is ours."""
    shown = None if said else subprocess.PIPE
    done = run_to_its_end(
        [sys.executable, *args],
        stdout=shown,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        refusals = [line for line in lines if line.startswith("Error: ")]
        raise Refused(f"{name}: {(refusals or lines)[-1].removeprefix('Error: ')}")
