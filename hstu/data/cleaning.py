"""Clean single columns of an interaction table; every error names file, column, row, value and remedy.

Rows are counted from 1, without the header. Strings that are all whole numbers as a program would write them
("7", not "007") become integers, so that a text file and a typed one give the same data set.

A column that comes in blocks is read twice: a :class:`Look` at all of it tells what its strings are and which unit its
times have, and with it each block is cleaned as the whole would be.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
import polars as pl

from hstu.data.files import printable

logger = logging.getLogger(__name__)

_MAX_EXACT_FLOAT = 2**53
MAX_BITS = 20
_UNITS = {1: "seconds", 10**3: "milliseconds", 10**6: "microseconds", 10**9: "nanoseconds"}  # by ticks per second
_EPOCH, _EARLIEST = datetime(1970, 1, 1), -62_135_596_800  # what a date can show, in seconds
Missing = Literal["error", "drop", "keep"]
_NO_IDS = ("", "na", "n/a", "<na>", "nan", "null", "none")  # what programs write where there is none, in any case
Rows = int | np.ndarray  # number of rows before a block, or the place of each of its rows from 0
_ISO_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")


@dataclass
class Look:
    """What the values of a column are.

    Attributes:
        plain: Whether all strings are whole numbers as a program would write them.
        rows: Strings seen, without nulls ...
        numbers: ... and how many of them are numbers.
        largest: Magnitude of the largest number.
    """

    plain: bool = True
    rows: int = 0
    numbers: int = 0
    largest: float = 0

    @property
    def are_numbers(self) -> bool:
        """Whether most strings are numbers, so that the others are mistakes."""
        return self.plain or 2 * self.numbers > self.rows

    def add(self, column: pl.Series) -> Look:
        """Look at a block of the column."""
        column = as_text(column).drop_nulls()
        if column.dtype == pl.String:
            self.rows += len(column)
            if self.plain:
                integers = column.cast(pl.Int64, strict=False)
                self.plain = not integers.null_count() and bool((integers.cast(pl.String) == column).all())
            column = integers if self.plain else column.cast(pl.Float64, strict=False).drop_nulls()
            self.numbers += len(column)
        if column.dtype.is_float():
            column = column.filter(column.is_finite())
        if column.dtype.is_numeric() and len(column):
            low, high = column.min(), column.max()
            self.largest = max(self.largest, -low, high)  # type: ignore
        return self


@dataclass(frozen=True)
class Place:
    """Where values are: a file and the number of rows before them, or the place of each of their rows."""

    file: str
    rows: Rows

    def refuse(self, column: pl.Series, wrong: pl.Series, reason: str) -> None:
        """Raise ValueError about the first row that is ``wrong``."""
        row = wrong.arg_max() if wrong.any() else None
        if row is not None:
            number = int(self.rows[row]) if isinstance(self.rows, np.ndarray) else self.rows + row
            place = f"{self.file}: column {column.name!r}, row {number + 1}"
            value = column[row].to_list() if column.dtype.is_nested() else column[row]
            raise ValueError(f"{place}: value {value!r} {reason}")


def as_text(column: pl.Series) -> pl.Series:
    """The column, as strings if it is a categorical or an enum."""
    return column.cast(pl.String) if isinstance(column.dtype, (pl.Categorical, pl.Enum)) else column


def require_names(present: list[str], names: list[str], file: str) -> None:
    """Raise ValueError unless the columns ``names`` are among those ``present``."""
    for name in names:
        if name not in present:
            known = ", ".join(map(printable, present))
            raise ValueError(f"{file}: column {name!r} is missing; present: {known}; name one of them, or leave it out")


def require_columns(frame: pl.DataFrame, names: list[str], file: str) -> None:
    """Raise ValueError unless ``frame`` has rows and the columns ``names``."""
    require_names(frame.columns, names, file)
    if frame.is_empty():
        raise ValueError(f"{file}: has no rows; give a file with at least one")


def find_missing(column: pl.Series, role: str) -> pl.Series:
    """Which rows lack a value, bool: null or no number, of ids also blank or a word that stands for none.

    Args:
        column: Values.
        role: "user" or "item", "time", "action".
    """
    column = as_text(column)
    if column.dtype.is_float():
        return column.is_null() | column.is_nan().fill_null(True)
    if column.dtype != pl.String or role == "action":
        return column.is_null()
    missing = column.is_null() | (column.str.strip_chars() == "").fill_null(True)
    return missing if role == "time" else missing | _stands_for_none(column)


def _stands_for_none(column: pl.Series) -> pl.Series:
    short = (column.str.len_bytes() <= max(map(len, _NO_IDS))).fill_null(False)
    words = short.to_numpy().copy()
    words[words] = column.filter(short).str.to_lowercase().is_in(_NO_IDS).to_numpy()
    return pl.Series(words)


def clean_ids(
    column: pl.Series, file: str, look: Look | None = None, rows: Rows = 0, missing: Missing = "error"
) -> pl.Series:
    """Ids as Int64 or String, without nulls.

    Args:
        column: The ids, or a block of them.
        file: What messages call the file.
        look: At the whole column, if this is a block of it.
        rows: Number of rows before the block, or the place of each of its rows.
        missing: "keep" takes NA, NULL, NaN and None for ids.

    Raises:
        ValueError: For a missing, empty or padded id, a fractional or non-finite number, or another type.
    """
    place = Place(file, rows)
    column = _present(column, place, "give every row an id, or leave such rows out with --missing drop")
    if column.dtype == pl.String:
        if (look or Look().add(column)).plain:
            return column.cast(pl.Int64)
        stripped = column.str.strip_chars()
        place.refuse(column, stripped == "", "is empty; give it an id, or leave such rows out with --missing drop")
        place.refuse(column, stripped != column, "is padded with blanks; remove them")
        if missing != "keep":
            place.refuse(column, _stands_for_none(column), "stands for a missing id; leave such rows out with "
                         "--missing drop, or take it for an id with --missing keep")  # fmt: skip
        return column
    if column.dtype.is_float():
        place.refuse(column, ~column.is_finite(), "is not finite; ids are whole numbers or strings")
        inexact = (column != column.floor()) | (column.abs() > _MAX_EXACT_FLOAT)
        place.refuse(column, inexact, "is no exact whole number; give ids as integers or strings")
        return column.cast(pl.Int64)
    if not column.dtype.is_integer():
        raise ValueError(f"{file}: column {column.name!r} is {column.dtype}; ids are integers or strings")
    return _to_int64(column, place)


def clean_values(column: pl.Series, file: str, look: Look | None = None, rows: Rows = 0) -> pl.Series:
    """Values of a category (actions, contexts) as Int64, Float64, Boolean or String, without nulls.

    For the arguments see :func:`clean_ids`.

    Raises:
        ValueError: For a missing or non-finite value.
    """
    place = Place(file, rows)
    column = _present(column, place, "fill it (with 'unknown', say) or remove the row")
    if column.dtype == pl.String:
        look = look or Look().add(column)
        if look.plain:
            return column.cast(pl.Int64)
        if look.numbers == look.rows:
            column = column.cast(pl.Float64)
    if column.dtype.is_float():
        place.refuse(column, ~column.is_finite(), "is not finite; remove or replace it")
        return column.cast(pl.Float64)
    if column.dtype.is_integer():
        return _to_int64(column, place)
    if column.dtype.is_nested():
        raise ValueError(f"{file}: column {column.name!r} is {column.dtype}; give one value a row")
    return column if column.dtype == pl.Boolean else column.cast(pl.String)


def clean_masks(column: pl.Series, file: str, look: Look | None = None, rows: Rows = 0) -> pl.Series:
    """Bit masks as Int64.

    For the arguments see :func:`clean_ids`.

    Raises:
        ValueError: For a missing, negative or fractional value, or one of more than 20 bits.
    """
    column = clean_values(column, file, look, rows)
    remedy = f"is no bit mask of 1 to {MAX_BITS} bits; use whole numbers or --action_type categorical"
    # Words become nulls; a block of a column that has them elsewhere may hold numbers alone.
    masks = column.cast(pl.Float64, strict=False)
    fits = masks.is_between(0, 2**MAX_BITS - 1) & (masks == masks.floor())
    Place(file, rows).refuse(column, ~fits.fill_null(False), remedy)
    return masks.cast(pl.Int64)


def mask_of(columns: list[pl.Series], file: str, rows: Rows = 0) -> pl.Series:
    """The bit mask of columns of yes and no, Int64: bit k is set where column k is true or above 0.

    A row that lacks one of the values has none. For ``file`` and ``rows`` see :func:`clean_ids`.

    Raises:
        ValueError: For a value that is no truth value, 0, 1 or a count.
    """
    place, mask = Place(file, rows), pl.repeat(0, len(columns[0]), dtype=pl.Int64, eager=True)
    for bit, column in enumerate(columns):
        words = as_text(column)
        if words.dtype == pl.String:
            words = words.str.strip_chars().str.to_lowercase().replace({"true": "1", "false": "0", "": None})
        elif not (words.dtype.is_numeric() or words.dtype == pl.Boolean):
            raise ValueError(f"{file}: column {column.name!r} is {column.dtype}; a column of a bit mask says yes or no")
        numbers = words.cast(pl.Float64, strict=False)
        wrong = words.is_not_null() & ~(numbers.is_nan() | (numbers >= 0)).fill_null(False)
        place.refuse(column, wrong, "is no truth value, 0, 1 or count; a column of a bit mask says yes or no")
        mask = mask + (numbers.fill_nan(None) > 0).cast(pl.Int64) * (1 << bit)
    return mask


def clean_times(
    column: pl.Series, file: str, look: Look | None = None, rows: Rows = 0, time_format: str | None = None
) -> tuple[pl.Series, int]:
    """Times of full precision, Int64 or Float64, and how many of their units are a second.

    Numbers are seconds, milli-, micro- or nanoseconds, judged by the largest; strings are numbers or ISO 8601
    dates, UTC unless they name a zone. For the arguments see :func:`clean_ids`; ``look`` is that of
    :func:`look_at_times`. ``time_format`` is a pattern of strptime that all of them follow, as "%d.%m.%Y %H:%M".

    Raises:
        ValueError: For a missing, non-finite or unparsable value, values of several units, or another type.
    """
    place = Place(file, rows)
    column = _present(column, place, "give every row a time or remove the row")
    look = look or look_at_times(column)
    if time_format is not None:
        column = _parse_formatted(column, time_format, place)
    elif column.dtype == pl.String:
        column = _parse_time_strings(column, look, place)
    if column.dtype == pl.Date:
        column = column.cast(pl.Datetime("us"))
    ticks = ticks_per_second(column.dtype, look)  # of what a format gave, that of dates
    if isinstance(column.dtype, pl.Datetime):
        return column.to_physical(), ticks
    if column.dtype.is_integer():
        column = _to_int64(column, place)
    elif column.dtype.is_float():
        place.refuse(column, ~column.is_finite(), "is not finite; remove or replace it")
        place.refuse(column, column.abs() >= 2.0**63, "is too large for a time, even in nanoseconds; correct it")
    else:
        raise ValueError(f"{file}: column {column.name!r} is {column.dtype}; times are numbers, dates or ISO strings")
    if ticks > 1:
        # Seconds among milliseconds, say: no date after 1970-04-26 is so small in the unit of the largest.
        small = (column != 0) & (column.abs() < 10**7 * ticks)
        unit = _UNITS[ticks]
        place.refuse(column, small, f"is no time in {unit}, as the largest is; give all rows one unit")
    if (rows[:1] == 0 if isinstance(rows, np.ndarray) else rows == 0) and column.dtype.is_numeric() and len(column):
        logger.info("%s: column %r is taken as %s, judged by its size: %s is %s", file, column.name, _UNITS[ticks],
                    column[0], _EPOCH + timedelta(seconds=max(_EARLIEST, float(column[0]) / ticks)))  # fmt: skip
    return column, ticks


def ticks_per_second(kind: pl.DataType, look: Look, time_format: str | None = None) -> int:
    """How many units of :func:`clean_times` are a second, for a column of type ``kind`` that looks so."""
    if time_format is not None:
        return 10**6
    if isinstance(kind, pl.Datetime):
        return {"ms": 10**3, "us": 10**6, "ns": 10**9}[kind.time_unit]
    if kind == pl.Date or (kind == pl.String and not look.are_numbers):
        return 10**6
    return next((ticks for ticks in _UNITS if look.largest < ticks * 10**11), 10**9)


def look_at_times(column: pl.Series, look: Look | None = None) -> Look:
    """Look at times, or a block more of them: blanks around numbers do not matter."""
    column = as_text(column)
    return (look or Look()).add(column.str.strip_chars() if column.dtype == pl.String else column)


def whole_seconds(times: pl.Series, ticks_per_second: int) -> pl.Series:
    """Times in seconds, rounded down, Int64."""
    if times.dtype.is_float():
        times = (times / ticks_per_second).floor()
        return times.cast(pl.Int64)
    return times // ticks_per_second


def _parse_time_strings(column: pl.Series, look: Look, place: Place) -> pl.Series:
    text = column.str.strip_chars()
    if look.plain:
        return text.cast(pl.Int64)
    remedy = "is no time; use seconds or ISO dates such as 2024-05-31T12:30:00, or say --time_format"
    if look.are_numbers:
        numbers = text.cast(pl.Float64, strict=False)
        place.refuse(column, numbers.is_null(), remedy)
        return numbers
    iso = (
        text.str.replace(r"\s*([zZ]|UTC|GMT)$", "+00:00")
        .str.replace(r"\s+([+-]\d\d:?\d\d)$", "$1")
        .str.replace(" ", "T")
    )
    parsed = pl.Series([None] * len(text), dtype=pl.Datetime("us"))
    for pattern in _ISO_FORMATS:
        naive = iso.str.to_datetime(pattern, time_unit="us", strict=False)
        zoned = iso.str.to_datetime(pattern + "%z", time_unit="us", strict=False).dt.replace_time_zone(None)
        parsed = parsed.fill_null(naive).fill_null(zoned)
    place.refuse(column, parsed.is_null() | (parsed.dt.year() < 1000), remedy)  # 24-05-31 is no year 24
    return parsed.alias(column.name)


def _parse_formatted(column: pl.Series, time_format: str, place: Place) -> pl.Series:
    if not (column.dtype == pl.String or column.dtype.is_integer()):
        raise ValueError(f"{place.file}: column {column.name!r} is {column.dtype}; --time_format is for strings")
    text = column.cast(pl.String).str.strip_chars()
    try:
        parsed = text.str.to_datetime(time_format, time_unit="us", strict=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--time_format = {time_format!r}: {reason}") from None
    place.refuse(column, parsed.is_null(), f"does not follow --time_format {time_format!r}; correct one of them")
    return parsed.dt.replace_time_zone(None).alias(column.name)


def _to_int64(column: pl.Series, place: Place) -> pl.Series:
    numbers = column.cast(pl.Int64, strict=False)
    place.refuse(column, numbers.is_null(), "is too large; numbers go up to 2**63 - 1, or use strings")
    return numbers


def _present(column: pl.Series, place: Place, remedy: str) -> pl.Series:
    place.refuse(column, column.is_null(), f"is missing; {remedy}")
    return as_text(column)
