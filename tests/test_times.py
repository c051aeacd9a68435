"""data/times.py: times in every form that files have are the times they are, in their order."""

import datetime

import numpy as np
import polars as pl
import pytest
from click import ClickException

from delrec.data.drift import seconds_of
from delrec.data.times import clock_of, position_of


def read(values, time_format=None, dtype=None):
    column = pl.Series(values, dtype=dtype)
    return clock_of(column, "timestamp", lambda row: f"log.csv, line {row + 2}", time_format)


def refusal(values, time_format=None, dtype=None):
    with pytest.raises(ClickException) as refused:
        read(values, time_format, dtype)
    return refused.value.message


@pytest.mark.parametrize(
    "values, when",
    [
        (["1500000000", "1500000001.0"], [1500000000, 1500000001]),
        (["9.99e+08", "1.5e9", "1E9"], [999000000, 1500000000, 1000000000]),
        (["1500000000.25", "1500000000"], [1500000000250, 1500000000000]),
        (["1500000000.1234567", "1"], [1500000000123456700, 1000000000]),
        (["1700000000000000000", "1700000000000000001"], [17 * 10**17, 17 * 10**17 + 1]),
        (["1.2345678901234567e-05", "0.0", "0.3", "1.0"], [1, 0, 2, 3]),
        (["45292.3541666667", "45292.3541666666"], [1, 0]),  # days, as a sheet counts them
        (["200000.5", "300000.25", "200000"], [1, 2, 0]),  # since the log began, in seconds
        (["99999.5", "2"], [99999500, 2000]),
        (["1500000000,5", "1500000000"], [1500000000500, 1500000000000]),  # a decimal comma
        (["0.5", "0.123456"], [500000, 123456]),
        (["1970-01-02", "1970-1-3"], [86400, 172800]),
        (["1970-01-02 03:04:05", "1970/01/02 03:04"], [97445, 97440]),
        (["1970-01-02T03:04:05Z", "1970-01-02 03:04:05 UTC"], [97445, 97445]),
        (["1970-01-02T03:04:05+02:00", "1970-01-02T03:04:05-0030"], [90245, 99245]),
        (["1970-01-02T00:00:00.5", "1970-01-02T00:00:00.25"], [86400500, 86400250]),
        (["1970-01-02T00:00:00.000001Z"], [86400000001]),
        (["1970-01-02", "1970-01-02 00:00:01"], [86400, 86401]),
        (["2.1.1970", "03.01.1970 00:01"], [86400, 172860]),
        (["20140131", "20140201"], [1391126400, 1391212800]),
        (["20140131000001", "20140131000000"], [1391126401, 1391126400]),
        ([1500000000, 7], [1500000000, 7]),
        ([1500000000.0, 1500000000.5], [1500000000000, 1500000000500]),
        ([datetime.date(1970, 1, 2)], [86400]),
        ([datetime.datetime(1970, 1, 2)], [86400]),
        ([datetime.datetime(1970, 1, 2, 0, 0, 0, 5000)], [86400005]),
    ],
)
def test_a_time_is_what_it_says(values, when):
    assert read(values).when.tolist() == when


@pytest.mark.parametrize(
    "values, time_format, when",
    [
        (["01/02/1970 00:01"], "%m/%d/%Y %H:%M", [86460]),
        (["02/01/1970"], "%d/%m/%Y", [86400]),
        (["1/2/1970 1:00:00 PM"], "%m/%d/%Y %I:%M:%S %p", [86400 + 13 * 3600]),
    ],
)
def test_a_format_says_how_a_time_is_written(values, time_format, when):
    assert read(values, time_format).when.tolist() == when


@pytest.mark.parametrize(
    "values, says",
    [
        (["5", "2014-01-02", "6"], "line 3: timestamp '2014-01-02' is not a number"),
        (["5", "", "6"], "line 3: timestamp is blank; give the row a time, or leave out"),
        (["5", "nan"], "line 3: timestamp is 'nan'"),
        (["-5", "6"], "line 2: timestamp '-5' is negative"),
        (["1969-12-31"], "line 2: timestamp '1969-12-31' is before 1970"),
        (["2014-02-30"], "line 2: timestamp '2014-02-30' is no day or time of the calendar"),
        (["2014-02-28 25:00"], "no day or time of the calendar"),
        (["01/02/2014"], "--time-format '%m/%d/%Y' or --time-format '%d/%m/%Y'"),
        (["1/13/2014 8:26", "2/1/2014 9:00"], "written: --time-format '%m/%d/%Y %H:%M'"),
        (["Tue Apr 03 18:00:09 +0000 2012"], "written: --time-format '%a %b %d %H:%M:%S %z %Y'"),
        (["2014-01-02 03:00:00 PM"], "written: --time-format '%Y-%m-%d %I:%M:%S %p'"),
        (["13.05.14 16:53"], "written: --time-format '%d.%m.%y %H:%M'"),
        (["05/13/14"], "written: --time-format '%m/%d/%y'"),
        (["2014-W20-2"], "written: --time-format '%G-W%V-%u'"),
        (["May 13, 2014 4:53 PM"], "written: --time-format '%b %d, %Y %I:%M %p'"),
        (["20140513T165320Z"], "written: --time-format '%Y%m%dT%H%M%SZ'"),
        (["in the spring"], "such as --time-format '%d/%m/%Y %H:%M' (%m the month"),
        (["39,46", "12,50"], "or is another column the time? (--time-column)"),
        (["5", None], "line 3: timestamp is blank"),
        (["1,500,000,000"], "neither a number nor a date"),
        (
            ["2014-01-01T00:00:00Z", "2014-01-01T00:00:00"],
            "line 3: timestamp '2014-01-01T00:00:00'",
        ),
        (["1500000000", "1500000000000"], "line 3: timestamp '1500000000000' is in milliseconds"),
        (["9" * 20], "does not fit a whole number of 64 bits"),
        (["1e400"], "does not fit a whole number of 64 bits"),
        (["0.1234567890123456789012", "0.1234567890123456789013"], "more digits than 64 bits"),
        ([float("nan")], "is 'NaN', no value"),
        ([True], "is Boolean, expected numbers, dates or text"),
    ],
)
def test_what_is_no_time_or_could_be_two_is_refused(values, says):
    assert says in refusal(values)


def test_a_wrong_format_is_refused_with_its_line():
    assert "line 3: timestamp '31/12/2014' is not written as" in refusal(
        ["01/12/2014", "31/12/2014"], "%m/%d/%Y"
    )


def test_a_wrong_format_is_told_the_one_that_reads_all():
    said = refusal(["31/12/2014", "01/12/2014"], "%m/%d/%Y")
    assert said.endswith("says; '%d/%m/%Y' reads all")


@pytest.mark.parametrize("written", ["{}", "{:.9e}", "{:.3f}", "{:.6f}"])
def test_the_order_is_the_same_however_the_numbers_are_written(written):
    times = np.random.default_rng(0).permutation(np.arange(999_999_900, 1_000_000_100)) * 1.0
    if written == "{}":
        times = times.astype(int)
    when = read([written.format(t) for t in times]).when
    assert np.argsort(when).tolist() == np.argsort(times).tolist()


FAR = [datetime.datetime(*day, tzinfo=datetime.UTC) for day in [(9999, 12, 31), (2610, 5, 1)]]


@pytest.mark.parametrize("behind", ["", " 00:00:00", "T00:00:00", " 00:00:00.000000", "T00:00Z"])
def test_a_date_far_ahead_is_the_date_it_says(behind):
    values = ["2024-05-01" + behind, *(f"{day:%Y-%m-%d}{behind}" for day in FAR)]
    assert read(values).when.tolist() == [1714521600, *(day.timestamp() for day in FAR)]


@pytest.mark.parametrize("time_format", ["%d/%m/%Y", "%d/%m/%Y %H:%M", "%d.%m.%Y %H:%M:%S%.f"])
def test_a_format_reads_dates_far_ahead(time_format):
    values = [day.strftime(time_format.replace("%.f", ".0")) for day in FAR]
    assert read(values, time_format).when.tolist() == [day.timestamp() for day in FAR]


@pytest.mark.parametrize("behind", ["", "Z"])
def test_nanoseconds_are_kept_up_to_2262_and_beyond_it_refused(behind):
    near = [f"2024-05-01 00:00:00.123456{n}{behind}" for n in (7, 8)]
    assert read(near).when.tolist() == [1714521600123456700, 1714521600123456800]
    far = f"9999-12-31 23:59:59.9999999{behind}"
    said = refusal([*near, far])
    assert f"line 4: timestamp {far!r} is beyond the year 2262" in said
    given = "%Y-%m-%d %H:%M:%S%.f" + behind
    assert refusal([*near, far], given) == said
    assert read(near, given).when.tolist() == read(near).when.tolist()


def test_what_was_read_into_times_is_said():
    assert "kept as whole numbers, in milliseconds" in read(["1.5", "2"]).notes[0]
    assert "20140131 is read as a date, 2014-01-31" in read(["20140131"]).notes[0]
    assert "at most 3 digits, so times nearer than 10,000,000" in read(["1.41e9", "1.2e9"]).notes[0]
    assert "1 of 2 timestamps are dates alone" in read(["1970-01-02", "1970-01-02 00:01"]).notes[0]
    assert "are they missing ones?" in read(["1500000000"] * 200 + ["0"]).notes[0]
    assert not read(["1500000000", "1400000000"]).notes


def test_a_position_is_never_a_date():
    where = str
    assert position_of(pl.Series(["20140131", "20140132"]), "position", where).when.tolist() == [
        20140131,
        20140132,
    ]
    assert position_of(pl.Series(["0", "1.0"]), "position", where).when.tolist() == [0, 1]


def test_the_unit_of_times_is_known_down_to_nanoseconds():
    for decimals in (0, 3, 6, 9):
        assert seconds_of(np.array([1_500_000_000 * 10**decimals])) == 10.0**-decimals


@pytest.mark.parametrize("written", ["{:.2f}", "{:.5f}"])
def test_times_since_a_log_began_never_seem_to_be_seconds_since_1970(written):
    times = [written.format(t) for t in np.linspace(2e5, 9e5, 50) + 0.25]
    clock = read(times)
    assert seconds_of(clock.when) is None and "only their order is kept" in clock.notes[0]
    assert clock.when.tolist() == list(range(50))
