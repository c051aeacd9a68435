"""Times in a format of strptime's: how they are read, and which format a refusal advises."""

from datetime import datetime

import polars as pl

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


def advised_format(column: pl.Series) -> str:
    """The --time-format that reads all of the times, both where two do, else how one looks."""
    fitting = fitting_formats(column)
    if fitting:
        return f"say how it is written: {' or '.join(f'--time-format {f!r}' for f in fitting)}"
    return (
        "say how it is written, such as --time-format '%d/%m/%Y %H:%M' (%m the month, %b its name, "
        "%S seconds, %I and %p for AM and PM)"
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
        read = column.str.to_datetime(time_format, time_unit="ns", strict=False)
    except pl.exceptions.PolarsError:
        read = None
    if read is None or read.null_count():  # a format without a time of day is one of dates
        read = column.str.to_date(time_format, strict=False).cast(pl.Datetime("ns"))
    return read
