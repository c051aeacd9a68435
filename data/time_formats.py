"""Times in a format of strptime's: how they are read, and which format a refusal advises."""

import polars as pl

# what a refusal tries; day and month both ways
FORMATS = [
    *(
        f"{day}{clock}"
        for day in ("%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%m/%d/%y")
        for clock in (" %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p", "")
    ),
    *(
        "%Y-%m-%d %I:%M:%S %p",
        "%Y%m%d %H:%M:%S",
        "%a %b %d %H:%M:%S %z %Y",
        "%d %b %Y",
        "%b %d, %Y",
    ),
    *("%B %d, %Y", "%d-%b-%Y", "%d %B %Y", "%d/%b/%Y:%H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %z"),
]


def advised_format(column: pl.Series) -> str:
    """The --time-format that reads all of the times, both where two do, else how one looks."""
    fitting = []
    for time_format in FORMATS:
        if not read_format(column, time_format).null_count():
            fitting.append(f"--time-format '{time_format}'")
    if fitting:
        return f"say how it is written: {' or '.join(fitting)}"
    return (
        "say how it is written, such as --time-format '%d/%m/%Y %H:%M' (%m the month, %b its name, "
        "%S seconds, %I and %p for AM and PM)"
    )


def read_format(column: pl.Series, time_format: str) -> pl.Series:
    """The times in a format, null where one is not."""
    try:
        read = column.str.to_datetime(time_format, time_unit="ns", strict=False)
    except pl.exceptions.PolarsError:
        read = None
    if read is None or read.null_count():  # a format without a time of day is one of dates
        read = column.str.to_date(time_format, strict=False).cast(pl.Datetime("ns"))
    return read
