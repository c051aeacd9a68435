"""Times in a format of strptime's: how they are read, and which format a refusal advises."""

import re
from collections.abc import Callable
from datetime import datetime

import numpy as np
import polars as pl

from delrec.runtime import stop

Where = Callable[[int], str]  # the place of a row in its file, in words

# what a refusal tries: every day, day and month both ways, with every time of day
DAYS = [
    *("%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%y"),
    *("%m-%d-%y", "%d-%m-%y", "%Y.%m.%d", "%Y-%m-%d", "%Y/%m/%d", "%Y%m%d"),
    *("%d %b %Y", "%b %d, %Y", "%b %d %Y", "%d-%b-%Y", "%d-%b-%y", "%d/%b/%Y", "%B %d, %Y"),
    *("%d %B %Y", "%d. %B %Y", "%a, %d %b %Y", "%A, %B %d, %Y", "%G-W%V-%u", "%GW%V%u"),
]
CLOCKS = ["", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p", " %H:%M:%S%.f"]
WHOLE = [
    *("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y", "%d/%b/%Y:%H:%M:%S %z"),
    *("%a, %d %b %Y %H:%M:%S %z", "%Y%m%dT%H%M%S", "%Y%m%dT%H%M%SZ", "%m/%d/%Y, %I:%M:%S %p"),
    *("%b %d, %Y, %I:%M %p", "%b %d, %Y, %I:%M:%S %p", "%b %d, %Y at %I:%M %p"),
]
FORMATS = [*(f"{day}{clock}" for day in DAYS for clock in CLOCKS), *WHOLE]
LOOKED_AT = 1000  # times by which a format that does not fit is told at once
EARLIEST, LATEST = datetime(1970, 1, 1), datetime(2100, 1, 1)  # else a year '14' is that of Nero
FINER = r"[.,][0-9]{7}"  # a fraction of a second that microseconds do not hold
BARE_FRACTION = r"(?<![.,])%[0-9]?f"  # in a format: no sign stands before the fraction
FARTHEST = (2**63 - 1) // 1000  # microseconds before and after 1970 that nanoseconds reach


def advised_format(column: pl.Series) -> str:
    """The --time-format that reads all of the times, both where two do, else how one looks."""
    fitting = fitting_formats(column)
    if fitting:
        return f"say how it is written: {' or '.join(f'--time-format {f!r}' for f in fitting)}"
    return (
        "say how it is written, such as --time-format '%d/%m/%Y %H:%M' (%m the month, %b its name, "
        "%S seconds, %I and %p for AM and PM), or is another column the time? (--time-column)"
    )


def fitting_formats(column: pl.Series) -> list[str]:
    """The formats that read all of the times, the first of those that read the same."""
    fitting, readings = [], []
    for time_format in FORMATS:
        if not reads(column.head(LOOKED_AT), time_format) or not reads(column, time_format):
            continue
        reading = read_format(column, time_format)
        if not any(reading.dtype == r.dtype and reading.equals(r) for r in readings):
            fitting.append(time_format)
            readings.append(reading)
    return fitting


def reads(column: pl.Series, time_format: str) -> bool:
    """True if the format reads all of the times, as those of 1970 to 2100."""
    read = read_format(column, time_format)
    if read.null_count() or not len(read):
        return False
    read = read.dt.replace_time_zone(None)
    return read.min() >= EARLIEST and read.max() < LATEST


def read_format(column: pl.Series, time_format: str) -> pl.Series:
    """The times in a format, null where one is not."""
    try:
        read = read_times(column, time_format)
    except pl.exceptions.PolarsError:
        read = None
    if read is None or read.null_count():  # a format without a time of day is one of dates
        read = column.str.to_date(time_format, strict=False).cast(pl.Datetime("us"))
    return read


def read_times(column: pl.Series, time_format: str) -> pl.Series:
    """The times in a format with a time of day, null where one is not: in microseconds, in
    nanoseconds where some have them and all lie between 1678 and 2262. Beyond, polars counts on
    from the other end.
    """
    read = column.str.to_datetime(time_format, time_unit="us", strict=False)
    reach = read.to_physical().abs().max() or 0
    if reach > FARTHEST or not is_finer(column, time_format):
        return read
    return column.str.to_datetime(time_format, time_unit="ns", strict=False)


def is_finer(column: pl.Series, time_format: str) -> bool:
    """True if some of the times may have more than microseconds."""
    return bool(re.search(BARE_FRACTION, time_format)) or column.str.contains(FINER).any()


# ---------------------------------------------------------------- as whole numbers


def when_of(
    read: pl.Series, column: pl.Series, time_format: str, what: str, where: Where
) -> np.ndarray:
    """What read_times or read_format made of a column without nulls, int64; a stop where it holds
    nanoseconds and a time that these do not reach.
    """
    when = read.to_physical()
    is_far = read.dtype.time_unit == "us" and (when.max() or 0) > FARTHEST
    if is_far and is_finer(column, time_format):
        stop_at_far(column, when.arg_max(), what, where)
    return when_in(read)


def when_in(read: pl.Series) -> np.ndarray:
    """What polars holds as times, in any of its units, int64."""
    return coarsest(read.to_physical(), {"ms": 3, "us": 6, "ns": 9}[read.dtype.time_unit])


def coarsest(value: pl.Series, decimals: int) -> np.ndarray:
    """Times in units of 10**-decimals seconds as seconds, milli- or microseconds where nothing is
    lost by it.
    """
    for drop in (9, 6, 3):
        if drop <= decimals and not (value % 10**drop != 0).any():
            return (value // 10**drop).cast(pl.Int64).to_numpy()
    return value.cast(pl.Int64).to_numpy()


def stop_at_far(column: pl.Series, row: int, what: str, where: Where) -> None:
    """Stops at a row beyond 2262, of a column that has nanoseconds."""
    stop(
        f"{where(row)}: {what} {column[row]!r} is beyond the year 2262, where nanoseconds end; "
        "write all with at most six decimals, or correct or leave out the row"
    )
