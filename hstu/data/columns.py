"""Clean single columns of an interaction table; every error names file, column, row, value and remedy.

Rows are counted from 1, without the header. Strings that are all whole numbers as a program would write them
("7", not "007") become integers, so that a text file and a typed one give the same data set.
"""

from __future__ import annotations

import logging

import numpy as np
import polars as pl

logger = logging.getLogger(__name__)

_MAX_EXACT_FLOAT = 2**53
_MAX_BITS = 20
_UNITS = ((10**11, 1, "seconds"), (10**14, 10**3, "milliseconds"), (10**17, 10**6, "microseconds"))
_NANOSECONDS = (10**9, "nanoseconds")
_ISO_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")


def require_columns(frame: pl.DataFrame, names: list[str], file: str) -> None:
    """Raise ValueError unless ``frame`` has rows and the columns ``names``."""
    for name in names:
        if name not in frame.columns:
            raise ValueError(f"{file}: column {name!r} is missing; present: {', '.join(frame.columns)}")
    if frame.is_empty():
        raise ValueError(f"{file}: has no rows; give a file with at least one")


def clean_ids(column: pl.Series, file: str) -> pl.Series:
    """Ids as Int64 or String, without nulls.

    Raises:
        ValueError: For a missing or empty id, a fractional or non-finite number, or another type.
    """
    column = _present(column, file, "give every row an id or remove the row")
    if column.dtype == pl.String:
        _refuse(column, column.str.strip_chars() == "", file, "is empty; give every row an id")
        return _integers_if_plain(column)
    if column.dtype.is_float():
        _refuse(column, ~column.is_finite(), file, "is not finite; ids are whole numbers or strings")
        inexact = (column != column.floor()) | (column.abs() > _MAX_EXACT_FLOAT)
        _refuse(column, inexact, file, "is no exact whole number; give ids as integers or strings")
        return column.cast(pl.Int64)
    if not column.dtype.is_integer():
        raise ValueError(f"{file}: column {column.name!r} is {column.dtype}; ids are integers or strings")
    return _to_int64(column, file)


def clean_values(column: pl.Series, file: str) -> pl.Series:
    """Values of a category (actions, contexts) as Int64, Float64, Boolean or String, without nulls.

    Raises:
        ValueError: For a missing or non-finite value.
    """
    column = _present(column, file, "fill it (with 'unknown', say) or remove the row")
    if column.dtype == pl.String:
        column = _integers_if_plain(column)
        if column.dtype == pl.String:
            numbers = column.cast(pl.Float64, strict=False)
            column = column if numbers.null_count() else numbers
    if column.dtype.is_float():
        _refuse(column, ~column.is_finite(), file, "is not finite; remove or replace it")
        return column.cast(pl.Float64)
    if column.dtype.is_integer():
        return _to_int64(column, file)
    return column if column.dtype == pl.Boolean else column.cast(pl.String)


def clean_masks(column: pl.Series, file: str) -> pl.Series:
    """Bit masks as Int64.

    Raises:
        ValueError: For a missing, negative or fractional value, or one of more than 20 bits.
    """
    column = clean_values(column, file)
    remedy = f"is no bit mask of 1 to {_MAX_BITS} bits; use whole numbers or --action_type categorical"
    if not column.dtype.is_numeric():
        raise ValueError(f"{file}: column {column.name!r}, row 1: value {column[0]!r} {remedy}")
    _refuse(column, (column < 0) | (column >= 2**_MAX_BITS) | (column != column.floor()), file, remedy)
    return column.cast(pl.Int64)


def clean_times(column: pl.Series, file: str) -> tuple[pl.Series, pl.Series]:
    """Times of full precision (to sort by) and whole seconds, rounded down.

    Numbers are seconds, milli-, micro- or nanoseconds, judged by the largest; strings are numbers or ISO 8601
    dates, UTC unless they name a zone.

    Raises:
        ValueError: For a missing, non-finite or unparsable value, values of several units, or another type.
    """
    column = _present(column, file, "give every row a time or remove the row")
    if column.dtype == pl.String:
        column = _parse_time_strings(column, file)
    if column.dtype == pl.Date:
        column = column.cast(pl.Datetime("us"))
    if isinstance(column.dtype, pl.Datetime):
        exact = column.to_physical()
        return exact, exact // {"ms": 10**3, "us": 10**6, "ns": 10**9}[column.dtype.time_unit]
    if column.dtype.is_integer():
        column = _to_int64(column, file)
    elif column.dtype.is_float():
        _refuse(column, ~column.is_finite(), file, "is not finite; remove or replace it")
    else:
        raise ValueError(f"{file}: column {column.name!r} is {column.dtype}; times are numbers, dates or ISO strings")
    largest = np.abs(column.to_numpy()).max()
    factor, unit = next(((factor, unit) for bound, factor, unit in _UNITS if largest < bound), _NANOSECONDS)
    if factor > 1:
        # Seconds among milliseconds, say: no date after 1970-04-26 is so small in the unit of the largest.
        small = (column != 0) & (column.abs() < 10**7 * factor)
        _refuse(column, small, file, f"is no time in {unit}, as the largest is; give all rows one unit")
        logger.info("%s: column %r is taken as %s, judged by its size", file, column.name, unit)
    seconds = column // factor if column.dtype == pl.Int64 else (column / factor).floor()
    return column, seconds.cast(pl.Int64)


def _parse_time_strings(column: pl.Series, file: str) -> pl.Series:
    text = column.str.strip_chars()
    integers = _integers_if_plain(text)
    if integers.dtype == pl.Int64:
        return integers
    numbers = text.cast(pl.Float64, strict=False)
    remedy = "is no time; use seconds or ISO dates such as 2024-05-31T12:30:00"
    if 2 * numbers.null_count() < len(text):
        _refuse(column, numbers.is_null(), file, remedy)
        return numbers
    iso = text.str.replace(" ", "T").str.replace(r"[zZ]$", "+00:00")
    parsed = pl.Series([None] * len(text), dtype=pl.Datetime("us"))
    for pattern in _ISO_FORMATS:
        naive = iso.str.to_datetime(pattern, time_unit="us", strict=False)
        zoned = iso.str.to_datetime(pattern + "%z", time_unit="us", strict=False).dt.replace_time_zone(None)
        parsed = parsed.fill_null(naive).fill_null(zoned)
    _refuse(column, parsed.is_null(), file, remedy)
    return parsed.alias(column.name)


def _integers_if_plain(column: pl.Series) -> pl.Series:
    """Strings as Int64 when writing the numbers again gives the same strings, else unchanged."""
    numbers = column.cast(pl.Int64, strict=False)
    if numbers.null_count() or not (numbers.cast(pl.String) == column).all():
        return column
    return numbers


def _to_int64(column: pl.Series, file: str) -> pl.Series:
    numbers = column.cast(pl.Int64, strict=False)
    _refuse(column, numbers.is_null(), file, "is too large; numbers go up to 2**63 - 1, or use strings")
    return numbers


def _present(column: pl.Series, file: str, remedy: str) -> pl.Series:
    _refuse(column, column.is_null(), file, f"is missing; {remedy}")
    is_text = isinstance(column.dtype, (pl.Categorical, pl.Enum))
    return column.cast(pl.String) if is_text else column


def _refuse(column: pl.Series, wrong: pl.Series, file: str, reason: str) -> None:
    """Raise ValueError about the first row that is ``wrong``."""
    row = wrong.arg_max() if wrong.any() else None
    if row is not None:
        raise ValueError(f"{file}: column {column.name!r}, row {row + 1}: value {column[row]!r} {reason}")
