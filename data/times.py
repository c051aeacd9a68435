"""Times as files write them -> whole numbers that keep their order: numbers of any form, dates and
times of day by ISO 8601, with dots (day.month.year) or by a format that is given.
"""

import re
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from delrec.data.time_formats import (
    Where,
    advised_format,
    coarsest,
    fitting_formats,
    read_format,
    read_times,
    stop_at_far,
    when_in,
    when_of,
)
from delrec.runtime import stop

NUMBER = r"^\+?([0-9]*)\.?([0-9]*)(?:[eE]([+-]?[0-9]{1,3}))?$"
IS_NUMBER = r"^\+?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?$"
WHOLE = r"^[0-9]{1,18}(\.0)?$"
DECIMAL_COMMA = r"^[0-9]{4,}(,[0-9]+)?$"  # thousands have commas behind one to three digits
CLOCK = r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]{1,9}))?)?"
ZONE = r" ?(Z|UTC|GMT|[+-][0-9]{2}(?::?[0-9]{2})?)?"
ISO = rf"^([0-9]{{4}})[-/]([0-9]{{1,2}})[-/]([0-9]{{1,2}})(?:[T ]{CLOCK}{ZONE})?$"
DOTTED = rf"^([0-9]{{1,2}})\.([0-9]{{1,2}})\.([0-9]{{4}})(?:,? +{CLOCK}{ZONE})?$"
# what polars reads at once, and numbers that floats hold exactly
PLAIN_DATES = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d")
PLAIN_DECIMAL = r"^[0-9]{1,11}(\.[0-9]{1,3})?$"
COMPACT = (8, 12, 14)  # digits of a date: of its day, minute or second
# what programs write where a cell has no value
MISSING = ["", "null", "NULL", "nan", "NaN", "None", "<NA>", "NaT", "NA", "\\N"]
UNITS = {0: "seconds", 3: "milliseconds", 6: "microseconds", 9: "nanoseconds"}
# what seconds since 1970 are between 1979 and 2103
EARLIEST, LATEST = 3 * 10**8, 42 * 10**8
LARGEST = 2**63 - 1

ISO_HEAD = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass
class Clock:
    """A column of times as it orders the log."""

    when: np.ndarray  # int64
    notes: list[str] = field(default_factory=list)  # what is said of how they were read
    decimals: int = 0  # numbers were made 10**decimals times larger


def clock_of(column: pl.Series, what: str, where: Where, time_format: str | None = None) -> Clock:
    """A column of times of any type. what: the column's name; time_format: as in strptime, of
    times that are text.
    """
    kind = column.dtype
    if column.null_count():
        stop_at_odd_time(column, what, where, column.is_null().arg_max(), "", column.is_null())
    if kind == pl.Date:
        clock = Clock((column.to_physical().cast(pl.Int64) * 86_400).to_numpy())
    elif kind == pl.Datetime:
        clock = Clock(when_in(column))
    elif kind.is_integer():
        clock = clock_of_integers(column, what, where)
    elif kind.is_float() or kind.is_decimal():
        clock = clock_of_floats(column, what, where)
    elif kind == pl.String:
        clock = clock_of_text(column, what, where, time_format)
    else:
        stop(f"{where(0)}: the column {what} is {kind}, expected numbers, dates or text")
    lowest = int(clock.when.min()) if len(clock.when) else 0
    if lowest < 0:
        row = int(clock.when.argmin())
        stop(
            f"{where(row)}: {what} {str(column[row])!r} is before 1970, expected 0 or more; "
            "correct or leave out the row"
        )
    return clock


def position_of(column: pl.Series, what: str, where: Where) -> Clock:
    """A column of positions: numbers, never dates."""
    return clock_of_numbers(column.cast(pl.String), what, where, is_time=False)


# ---------------------------------------------------------------- text


def clock_of_text(column: pl.Series, what: str, where: Where, time_format: str | None) -> Clock:
    """Times written as text: by the given format, else by the form that most of them have."""
    if time_format:
        return clock_by_format(column, what, where, time_format)
    if clock := clock_of_whole(column):
        return as_dates(clock, column, what, where) if len(column) else clock
    if column.str.contains(DECIMAL_COMMA).all():
        return clock_of_numbers(column.str.replace(",", ".", literal=True), what, where)
    for plain in PLAIN_DATES if ISO_HEAD.match(column[0] or "") else ():
        read = read_times(column, plain)
        if not read.null_count():
            return Clock(when_of(read, column, plain, what, where))
    forms = {IS_NUMBER: "a number", ISO: "a date like 2014-01-31", DOTTED: "a date like 31.1.2014"}
    fits = {form: column.str.contains(form) for form in forms}
    form = max(fits, key=lambda form: fits[form].sum())
    if not fits[form].all():
        stop_at_odd_time(column, what, where, (~fits[form]).arg_max(), forms[form], fits[form])
    if form == IS_NUMBER:
        return clock_of_numbers(column, what, where)
    order = (1, 2, 3) if form == ISO else (3, 2, 1)
    clock = clock_of_dates(column, what, where, form, order)
    if form == DOTTED:
        clock.notes.append(f"{what}: {column[0]!r} is read as day.month.year")
    return clock


def stop_at_odd_time(
    column: pl.Series, what: str, where: Where, row: int, form: str, fits: pl.Series
) -> None:
    """Stops at the first time that does not have the form of the others."""
    value = str(column[row] if column[row] is not None else "")
    if value in MISSING:
        said = f"{what} is {value!r}, no value" if value else f"{what} is blank"
        advice = "give the row a time, or leave out such rows with --drop-incomplete"
    elif value.startswith("-") and value[1:2].isdigit():
        said = f"{what} {value!r} is negative"
        advice = "expected 0 or more; correct or leave out the row"
    elif fits.any():
        said = f"{what} {value!r} is not {form}, as other rows have it"
        advice = "write all in one form"
    else:
        said = f"{what} {value!r} is neither a number nor a date like 2014-01-31 23:59:00"
        advice = advised_format(column)
    stop(f"{where(row)}: {said}; {advice}")


def clock_by_format(column: pl.Series, what: str, where: Where, time_format: str) -> Clock:
    """Times in a format that is given, as strptime knows it."""
    read = read_format(column, time_format)
    if read.null_count():
        row = read.is_null().arg_max()
        fitting = " or ".join(map(repr, fitting_formats(column)))
        advice = f"{fitting} reads all" if fitting else "correct the format or the row"
        stop(
            f"{where(row)}: {what} {column[row]!r} is not written as --time-format "
            f"{time_format!r} says; {advice}"
        )
    if read.dtype.time_zone:
        read = read.dt.convert_time_zone("UTC")
    return Clock(when_of(read, column, time_format, what, where))


def clock_of_dates(
    column: pl.Series, what: str, where: Where, form: str, order: tuple[int, int, int]
) -> Clock:
    """Dates with or without a time of day; their order is year, month, day as groups of `form`."""
    part = column.str.extract_groups(form).struct
    year, month, day = (part.field(str(n)).cast(pl.Int32) for n in order)
    text = pl.select(
        pl.format(
            "{}-{}-{}",
            *(pl.lit(p.cast(pl.String).str.zfill(n)) for p, n in ((year, 4), (month, 2), (day, 2))),
        )
    ).to_series()
    days = text.str.to_date("%Y-%m-%d", strict=False)
    hour, minute, second = (
        part.field(str(n)).cast(pl.Int64).fill_null(0).rename(str(n)) for n in (4, 5, 6)
    )
    wrong = days.is_null() | (hour > 23) | (minute > 59) | (second > 59)
    if wrong.any():
        row = wrong.arg_max()
        stop(f"{where(row)}: {what} {column[row]!r} is no day or time of the calendar; correct it")
    seconds = days.to_physical().cast(pl.Int64) * 86_400 + hour * 3600 + minute * 60 + second
    zone = part.field("8").fill_null("")
    seconds = seconds - offsets_of(column, zone, what, where)
    fraction = part.field("7").fill_null("").str.pad_end(9, "0").cast(pl.Int64)
    notes = []
    bare = part.field("4").null_count()
    if 0 < bare < len(column):
        notes.append(f"{bare:,} of {len(column):,} {what}s are dates alone and count as 00:00")
    if not (fraction != 0).any():
        return Clock(seconds.to_numpy(), notes)
    decimals = next(d for d in (3, 6, 9) if not (fraction % 10 ** (9 - d) != 0).any())
    if int(seconds.max()) * 10**decimals > LARGEST:
        stop_at_far(column, seconds.arg_max(), what, where)
    return Clock((seconds * 10**decimals + fraction // 10 ** (9 - decimals)).to_numpy(), notes)


def offsets_of(column: pl.Series, zone: pl.Series, what: str, where: Where) -> pl.Series:
    """How many seconds each time's zone is ahead of UTC; times without one are all of one zone."""
    named = zone != ""
    if not named.any():
        return pl.Series([0]).new_from_index(0, len(zone))
    clocked = column.str.contains(":", literal=True)
    if not (named | ~clocked).all():
        row = (~named & clocked).arg_max()
        stop(
            f"{where(row)}: {what} {column[row]!r} names no time zone and other rows do "
            f"({column[named.arg_max()]!r}); give all of them one"
        )
    hours = zone.str.extract(r"^[+-]([0-9]{2})").cast(pl.Int64).fill_null(0)
    minutes = zone.str.extract(r"^[+-][0-9]{2}:?([0-9]{2})").cast(pl.Int64).fill_null(0)
    sign = pl.Series(np.where(zone.str.starts_with("-").to_numpy(), -1, 1))
    return sign * (hours * 3600 + minutes * 60)


# ---------------------------------------------------------------- numbers


def clock_of_integers(column: pl.Series, what: str, where: Where) -> Clock:
    """A column of integers as it stands."""
    when = column.cast(pl.Int64, strict=False)
    if when.null_count():
        row = when.is_null().arg_max()
        stop(f"{where(row)}: {what} {column[row]} does not fit a whole number of 64 bits")
    return as_dates(Clock(when.to_numpy()), column, what, where) if len(when) else Clock(when)


def clock_of_floats(column: pl.Series, what: str, where: Where) -> Clock:
    """Floats and decimals, by the digits that tell each from its neighbours."""
    clock = clock_of_numbers(column.cast(pl.String), what, where)
    if column.dtype == pl.Float32 and column.max() > 2**24:
        clock.notes.append(
            f"{what} is Float32, which keeps seven digits: times near each other are one; where "
            "you can, write it as whole numbers"
        )
    return clock


def clock_of_numbers(column: pl.Series, what: str, where: Where, is_time: bool = True) -> Clock:
    """Numbers in any form, exactly: '1500000000', '1.5e9', '1500000000.25'. Fractions make all of
    them a thousand, a million .. times larger.
    """
    clock = clock_of_whole(column)
    if clock is None:
        is_number = column.str.contains(IS_NUMBER)
        if not is_number.all():
            row = (~is_number).arg_max()
            stop_at_odd_time(column, what, where, row, "a number", is_number)
        clock = thousandths(column, what) or exact(column, what, where)
    if is_time and len(clock.when):
        return as_dates(clock, column, what, where)
    return clock


def thousandths(column: pl.Series, what: str) -> Clock | None:
    """Numbers of at most three decimals as thousandths, None where some are of another form or
    would seem to be seconds since 1970.
    """
    if not column.str.contains(PLAIN_DECIMAL).all():
        return None
    value = (column.cast(pl.Float64) * 1000).round().cast(pl.Int64)
    if not (value % 1000 != 0).any():
        return Clock((value // 1000).to_numpy())
    if value.max() // 1000 < EARLIEST // 3 <= value.max():
        return None
    return Clock(value.to_numpy(), [note_on_fractions(what, 3)], 3)


def note_on_fractions(what: str, decimals: int) -> str:
    """The line about times that became 10**decimals times larger."""
    unit = f"times 10^{decimals}"
    if decimals in UNITS:
        unit = f"in {UNITS[decimals]} if they are seconds"
    return f"{what}s have fractions and are kept as whole numbers, {unit}"


def clock_of_whole(column: pl.Series) -> Clock | None:
    """Whole numbers as they stand; None where some are none."""
    if not column.str.contains(WHOLE).all():
        return None
    return Clock(column.str.strip_suffix(".0").cast(pl.Int64).to_numpy())


def exact(column: pl.Series, what: str, where: Where) -> Clock:
    """Decimal numbers as whole ones: each is digits * 10**shift."""
    part = column.str.extract_groups(NUMBER).struct
    whole, fraction, power = (part.field(str(n)).fill_null("") for n in (1, 2, 3))
    digits = (whole + fraction).str.strip_chars_start("0")
    short = digits.str.strip_chars_end("0")
    shift = (
        power.replace("", "0").cast(pl.Int64)
        - fraction.str.len_bytes().cast(pl.Int64)
        + (digits.str.len_bytes().cast(pl.Int64) - short.str.len_bytes().cast(pl.Int64))
    )
    is_zero = short == ""
    shift = shift.zip_with(~is_zero, pl.Series([0]).new_from_index(0, len(shift)))
    decimals = max(0, -int(shift.min()))
    notes = note_on_digits(power, short, shift, what)
    largest, most = column.cast(pl.Float64).max(), int(short.str.len_bytes().max())
    # thousandths, millionths .. where they fit: a unit of time that has a name
    for k in dict.fromkeys((-(-decimals // 3) * 3, decimals)):
        if most <= 18 and largest * 10.0**k < LARGEST - 2**12:
            value = short.replace("", "0").cast(pl.Int64).to_numpy()
            when = value * 10 ** (shift.to_numpy() + k).clip(0)
            if k and largest < EARLIEST // 3 <= when.max():  # no seconds, and none shall they seem
                when = np.unique(when, return_inverse=True)[1]
                return Clock(when, [*notes, by_rank(what)], k)
            if k:
                notes.append(note_on_fractions(what, k))
            return Clock(when, notes, k)
    if decimals == 0:
        return Clock(nineteen_digits(column, short, shift, what, where), notes)
    return Clock(ranks_of(column, short, shift, what, where), [*notes, by_rank(what)])


def by_rank(what: str) -> str:
    """The line about times of which only the order is kept."""
    return f"{what}s have fractions and are no seconds since 1970: only their order is kept"


def nineteen_digits(
    column: pl.Series, short: pl.Series, shift: pl.Series, what: str, where: Where
) -> np.ndarray:
    """Whole numbers of up to 19 digits (nanoseconds), or a stop at one that is too large."""
    found = [int(d or 0) * 10**s if s < 20 else LARGEST + 1 for d, s in zip(short, shift)]
    row = max(range(len(found)), key=found.__getitem__)
    if found[row] > LARGEST:
        stop(
            f"{where(row)}: {what} {column[row]!r} does not fit a whole number of 64 bits; give "
            "seconds, milli-, micro- or nanoseconds since 1970"
        )
    return np.array(found, np.int64)


def ranks_of(
    column: pl.Series, short: pl.Series, shift: pl.Series, what: str, where: Where
) -> np.ndarray:
    """The place of each number among the different ones, where floats tell them apart."""
    value = column.cast(pl.Float64)
    different = pl.DataFrame({"digits": short, "shift": shift}).n_unique()
    if value.n_unique() != different or not value.is_finite().all():
        stop(
            f"{where(0)}: the column {what} has numbers of more digits than 64 bits hold; give "
            "whole seconds, milli-, micro- or nanoseconds"
        )
    return value.rank("dense").cast(pl.Int64).to_numpy() - 1


def note_on_digits(power: pl.Series, short: pl.Series, shift: pl.Series, what: str) -> list[str]:
    """A line where scientific notation keeps so few digits that near times became one."""
    if not (power != "").any() or int(shift.min()) < 3:
        return []
    return [
        f"{what}s are written with at most {int(short.str.len_bytes().max())} digits, so times "
        f"nearer than {10 ** min(int(shift.min()), 18):,} are one; write them out where you can"
    ]


def as_dates(clock: Clock, column: pl.Series, what: str, where: Where) -> Clock:
    """Numbers like 20140131 as the dates they are; other numbers as they stand, unless some are in
    another unit than the rest.
    """
    when = clock.when // 10**clock.decimals
    low, high = int(when.min()), int(when.max())
    digits = len(str(low))
    if (
        not clock.decimals
        and digits in COMPACT
        and digits == len(str(high))
        and str(low) >= "1970"
        and str(high) < "2101"
    ):
        text = pl.Series(when).cast(pl.String)
        read = text.str.to_datetime("%Y%m%d%H%M%S", strict=False)
        if digits < 14:
            read = (text + "000000"[: 14 - digits]).str.to_datetime("%Y%m%d%H%M%S", strict=False)
        if not read.null_count():
            note = f"{what}: {low} is read as a date, {read.min()}"
            return Clock(coarsest(read.to_physical(), 6), [*clock.notes, note])
    stop_at_two_units(when, column, what, where)
    early = int((when < EARLIEST // 3).sum())
    if 0 < early < len(when) / 100 and EARLIEST < np.median(when) < LATEST * 10**9:
        row = int(when.argmin())
        clock.notes.append(
            f"{early:,} {what}s are of 1970 to 1973 and others of today, the first is "
            f"{column[row]!r} ({where(row)}): are they missing ones?"
        )
    return clock


def stop_at_two_units(when: np.ndarray, column: pl.Series, what: str, where: Where) -> None:
    """Stops if every time is one of 1979 to 2103, but in more than one unit."""
    counted, rows = 0, {}
    for decimals in UNITS:
        inside = (when >= EARLIEST * 10**decimals) & (when <= LATEST * 10**decimals)
        if inside.any():
            counted += int(inside.sum())
            rows[decimals] = int(inside.argmax())
    if len(rows) < 2 or counted + int((when == 0).sum()) < len(when):
        return
    a, b = list(rows.items())[:2]
    stop(
        f"{where(b[1])}: {what} {column[b[1]]!r} is in {UNITS[b[0]]} and that of {where(a[1])}, "
        f"{column[a[1]]!r}, in {UNITS[a[0]]}; write all in one unit"
    )
