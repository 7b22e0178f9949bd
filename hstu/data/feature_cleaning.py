"""Clean the columns of declared features by their kinds; every error names file, column, row, value and remedy.

A column that comes in blocks is read twice, as in :mod:`hstu.data.cleaning`: a look at all of it tells its type, and
with it each block is cleaned as the whole would be. A value is missing where it is null or blank.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from hstu.data.cleaning import Place, Rows, as_text
from hstu.data.declarations import Declaration

MEMBER = "\x1f"  # between the members of a set that is written as one string; the unit separator of ASCII
_LARGEST = 3.4028235e38  # of float32


@dataclass
class FeatureLook:
    """What the values of a declared column are.

    Attributes:
        integers: Whether the column is of whole numbers.
        width: Numbers of a vector; 0 until one is seen.
    """

    integers: bool = True
    width: int = 0

    def add(self, column: pl.Series, declaration: Declaration, separator: str) -> FeatureLook:
        """Look at a block of the column."""
        self.integers &= column.dtype.is_integer() or column.dtype == pl.Null
        if declaration.kind == "vector" and not self.width and (column.dtype.is_nested() or column.dtype == pl.String):
            lengths = as_lists(column, separator).list.len().drop_nulls()
            lengths = lengths.filter(lengths > 0)
            self.width = int(lengths[0]) if len(lengths) else 0
        return self


def clean_feature(
    column: pl.Series, declaration: Declaration, file: str, look: FeatureLook, separator: str, rows: Rows = 0
) -> pl.Series:
    """Values of a declared feature, null where they are missing.

    Args:
        column: The values, or a block of them.
        declaration: What they are.
        file: What messages call the file.
        look: At the whole column.
        separator: Between the members of sets and the numbers of vectors that are strings.
        rows: Number of rows before the block, or the place of each of its rows.

    Returns:
        Int64 or String; Float32; sets as String, their members joined by ``MEMBER``, not yet each once; vectors as
        Array of Float32.

    Raises:
        ValueError: For a value that its kind does not have.
    """
    column, place = as_text(column), Place(file, rows)
    if declaration.kind == "multi":
        return _sets(column, separator, place)
    if declaration.kind == "vector":
        return _vectors(column, look.width, separator, place)
    if column.dtype.is_nested():
        raise ValueError(f"{file}: column {column.name!r} holds lists; declare it {column.name}:multi or :vector, or "
                         "give one value a row")  # fmt: skip
    if declaration.kind == "numeric":
        return _numbers(column, place)
    if look.integers:
        return column.cast(pl.Int64)
    if column.dtype.is_float():
        place.refuse(column, column.is_nan() | column.is_infinite(), "is no finite number; leave it empty where there "
                     "is no value")  # fmt: skip
        # Whole numbers that stand beside missing ones often come as floats.
        whole = column == column.floor()
        return pl.select(pl.when(whole).then(column.cast(pl.Int64, strict=False).cast(pl.String))
                         .otherwise(column.cast(pl.String)).alias(column.name)).to_series()  # fmt: skip
    text = column.cast(pl.String)
    return text.set(text.str.strip_chars() == "", None)


def _numbers(column: pl.Series, place: Place) -> pl.Series:
    if column.dtype == pl.String:
        column = _none_if_blank(column)
        numbers = column.str.strip_chars().cast(pl.Float64, strict=False)
        place.refuse(column, numbers.is_null() & column.is_not_null(), "is no number; correct it, leave it empty where "
                     f"there is none, or declare {column.name}:categorical")  # fmt: skip
    elif column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null):
        numbers = column.cast(pl.Float64)
    else:
        raise ValueError(f"{place.file}: column {column.name!r} is {column.dtype}, no number; give numbers")
    _require_finite(column, numbers, place)
    return numbers.cast(pl.Float32)


def _require_finite(column: pl.Series, numbers: pl.Series, place: Place) -> None:
    place.refuse(column, numbers.is_nan() | (numbers.abs() > _LARGEST), "is no finite number of 32 bits; leave it "
                 "empty where there is none")  # fmt: skip


def _none_if_blank(column: pl.Series) -> pl.Series:
    return column.set(column.str.strip_chars() == "", None)


def as_lists(column: pl.Series, separator: str) -> pl.Series:
    """A column of lists, or of strings of values between separators, as lists; null where there is none."""
    if column.dtype == pl.String:
        return _none_if_blank(column).str.split(separator)
    return column.cast(pl.List(column.dtype.inner)) if isinstance(column.dtype, pl.Array) else column


def _vectors(column: pl.Series, width: int, separator: str, place: Place) -> pl.Series:
    lists = as_lists(column, separator)
    if lists.dtype == pl.Null:
        return lists.cast(pl.Array(pl.Float32, width))
    if not isinstance(lists.dtype, pl.List) or lists.dtype.inner.is_nested():
        raise ValueError(f"{place.file}: column {column.name!r} is {column.dtype}, no vector; give lists of numbers, "
                         f"or numbers between {separator!r}")  # fmt: skip
    lengths = lists.list.len()
    differs = f"has another length than the others, {width}; give all one length"
    place.refuse(column, (lengths != width) & (lengths > 0), differs)
    if lists.dtype.inner == pl.String:
        lists = lists.list.eval(pl.element().str.strip_chars())
    numbers = lists.cast(pl.List(pl.Float64), strict=False)
    value = pl.element()
    wrong = numbers.list.eval(value.is_null() | value.is_nan() | (value.abs() > _LARGEST)).list.any()
    remedy = "holds what is no finite number of 32 bits; correct it, or leave the vector out"
    place.refuse(column, wrong.fill_null(False), remedy)
    present = pl.select(pl.when(lengths > 0).then(numbers).alias(column.name)).to_series()
    return present.list.to_array(width).cast(pl.Array(pl.Float32, width))


def _sets(column: pl.Series, separator: str, place: Place) -> pl.Series:
    """Sets as strings: the members in their order, of strings what is between the separators, without blanks."""
    if column.dtype == pl.String:
        joined = _none_if_blank(column).str.replace_all(separator, MEMBER, literal=True)
        if column.str.contains(r"\s").any():
            joined = joined.str.strip_chars().str.replace_all(rf"\s*{MEMBER}\s*", MEMBER)
    elif column.dtype == pl.Null:
        return column.cast(pl.String)
    elif isinstance(column.dtype, (pl.List, pl.Array)) and not column.dtype.inner.is_nested():
        whole = as_lists(column, separator)
        if whole.dtype.inner.is_float():  # type: ignore[attr-defined]
            raise ValueError(f"{place.file}: column {column.name!r} holds lists of fractions; declare it "
                             f"{column.name}:vector, or give sets of strings or whole numbers")  # fmt: skip
        whole = whole.cast(pl.List(pl.String)).list.eval(pl.element().str.strip_chars().fill_null(""))
        # A set of one member that is empty is one of which something is wrong; none at all is an empty set.
        joined = whole.list.join(MEMBER).set(whole.list.len() == 0, None)
    else:
        raise ValueError(f"{place.file}: column {column.name!r} is {column.dtype}, no set; give strings with members "
                         f"between {separator!r}, or lists")  # fmt: skip
    empty = joined.str.contains(MEMBER + MEMBER, literal=True) | (joined == "")
    empty |= joined.str.starts_with(MEMBER) | joined.str.ends_with(MEMBER)
    place.refuse(column, empty.fill_null(False), f"has an empty member; remove it, or say what is between members with "
                 f"--set_separator (it is {separator!r})")  # fmt: skip
    return joined.alias(column.name)
