"""Declared features as numbers: codes while a log is read, ids, sets and numbers when all of it is known.

A column of ids is coded by its distinct values, a column of sets by its distinct sets, so that memory grows with
these and not with the log. Features that share a table share a vocabulary, whatever their levels: its values ascend,
as numbers if all of them are whole ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from hstu.data.declarations import Declaration
from hstu.data.feature_cleaning import MEMBER
from hstu.data.numbering import Ids, Numbering
from hstu.data.schema import NUM_QUANTILES, Feature, Statistics
from hstu.data.values import Sets, Values, count, take
from hstu.data.vocabulary import places_of

_SAMPLE = 1 << 18  # numbers that quantiles are taken of; of more, a random sample


class FeatureColumn:
    """A declared feature while its values are read.

    Args:
        declaration: What it is.
        file: What messages call its file.
        judge: Whether categories of nearly as many values as rows are refused.
    """

    def __init__(self, declaration: Declaration, file: str, *, judge: bool = True) -> None:
        self.declaration, self.file, self._judge = declaration, file, judge
        self.vocabulary: pl.Series | None = None
        self._ids = Ids()
        self._rows = 0
        self._values: Values = np.empty(0, np.int64)
        self._numbering: Numbering | None = None
        self._summary = Summary()

    def codes(self, column: pl.Series) -> np.ndarray:
        """Return a block of clean values as codes [n], or as float32 [n, w] with NaN where one is missing."""
        self._rows += len(column)
        if self.declaration.has_ids:
            return self._ids.codes(column)
        return numbers_of(column)

    def close(self) -> pl.Series:
        """Return the distinct values, or members of sets, once all are read; for a feature with a vocabulary.

        Raises:
            ValueError: If the values are none of the kind.
        """
        codes, _ = self._ids.counts()
        originals, name = self._ids.originals(codes), self.declaration.name
        if not len(codes):
            remedy = "leave it out" if self._judge else "is the log whole, or the file of another data set?"
            raise ValueError(f"{self.file}: column {name!r} has no value in any row; {remedy}")
        self._numbering = Numbering(codes)
        members, sets = originals, None
        if self.declaration.kind == "multi":
            split = originals.cast(pl.String).str.split(MEMBER).list.unique(maintain_order=True)
            members, sets = split.explode(), split.list.len().to_numpy().astype(np.int64)
        self._members, self._lengths = members, sets
        distinct = members.unique()
        if not self._judge or 2 * len(distinct) <= self._rows:
            return distinct
        if self.declaration.kind == "categorical":
            raise ValueError(
                f"{self.file}: column {name!r} has {len(distinct):,} values in {self._rows:,} rows, so it is no "
                f"category; declare it {name}:control to keep it, :text or :numeric, or leave it out"
            )
        if sets is not None and sets.max() == 1:
            raise ValueError(
                f"{self.file}: column {name!r} has no set of two or more, and {len(distinct):,} values in "
                f"{self._rows:,} rows; say what is between members with --set_separator, or declare it {name}:control"
            )
        return distinct

    def number(self, vocabulary: pl.Series) -> None:
        """Take the vocabulary of the table, so that values can be made of codes."""
        self.vocabulary = vocabulary
        ids = places_of(self._members, vocabulary).to_numpy()
        if self._lengths is None:
            self._values = np.append(ids, len(vocabulary))
        else:
            offsets = np.concatenate([[0], np.cumsum(self._lengths), [len(ids)]])
            self._values = Sets(offsets, ids)
        del self._members

    def values(self, codes: np.ndarray) -> Values:
        """Return ids [n], sets or numbers [n, w] of codes; the last of the known ones stands for what is missing."""
        if self._numbering is None:
            return codes
        places = self._numbering(codes)
        return take(self._values, np.where(places < 0, count(self._values) - 1, places))

    def add(self, summary: Summary) -> None:
        """Take account of values that are written."""
        self._summary.add(summary)

    def feature(self) -> Feature:
        """Return the feature, once all its values are accounted for.

        Raises:
            ValueError: If none has a value.
        """
        told, summary = self.declaration, self._summary
        common = {"name": told.name, "role": told.role, "level": told.level, "known_at_request": told.known_at_request}
        if told.has_ids:
            size = len(self.vocabulary) if self.vocabulary is not None else 0
            ids = summary.ids if told.kind == "multi" else None
            kind = told.kind or "categorical"
            return Feature(**common, kind=kind, vocab_size=size, table=told.table, num_ids=ids)  # type: ignore[arg-type]
        if not summary.number:
            raise ValueError(f"{self.file}: column {told.name!r} has no value in any row; leave it out")
        if told.kind == "vector":
            return Feature(**common, kind="vector", width=summary.width)  # type: ignore[arg-type]
        return Feature(**common, kind="numeric", statistics=summary.statistics())  # type: ignore[arg-type]


def numbers_of(column: pl.Series) -> np.ndarray:
    """Return clean numbers or vectors as float32 [n, w], NaN where one is missing."""
    if not isinstance(column.dtype, pl.Array):
        return column.to_numpy().astype(np.float32, copy=False).reshape(-1, 1)
    numbers = np.full((len(column), column.dtype.size), np.nan, np.float32)
    numbers[column.is_not_null().to_numpy()] = column.drop_nulls().to_numpy()
    return numbers


@dataclass
class Summary:
    """What is known of some values: how many ids, or how the numbers lie."""

    ids: int = 0
    number: int = 0
    width: int = 0
    mean: float = 0.0
    squares: float = 0.0  # of the distances from the mean
    sample: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    keys: np.ndarray = field(default_factory=lambda: np.empty(0))
    ends: tuple[float, float] = (np.inf, -np.inf)

    def add(self, other: Summary) -> None:
        """Join with the summary of other values (Chan et al. 1979; the sample is of those with the least keys)."""
        self.ids += other.ids
        self.width = max(self.width, other.width)
        if not other.number:
            return
        total, apart = self.number + other.number, other.mean - self.mean
        self.squares += other.squares + apart**2 * self.number * other.number / total
        self.mean += apart * other.number / total
        self.number = total
        self.ends = min(self.ends[0], other.ends[0]), max(self.ends[1], other.ends[1])
        self.sample, self.keys = _least(
            np.concatenate([self.sample, other.sample]), np.concatenate([self.keys, other.keys])
        )

    def statistics(self) -> Statistics:
        """Return mean, deviation and quantiles of the numbers."""
        quantiles = np.quantile(self.sample.astype(np.float64), np.linspace(0, 1, NUM_QUANTILES))
        quantiles[[0, -1]] = self.ends
        return Statistics(mean=self.mean, std=float(np.sqrt(self.squares / self.number)),
                          quantiles=tuple(quantiles.tolist()))  # fmt: skip


def summarize(values: Values, seed: int = 0) -> Summary:
    """Return what is known of some values of a feature; ``seed`` decides which numbers a sample takes."""
    if isinstance(values, Sets):
        return Summary(ids=len(values.ids))
    if values.ndim == 1:
        return Summary()
    present = values[~np.isnan(values).any(axis=1)]
    if values.shape[1] > 1 or not len(present):
        return Summary(number=len(present), width=values.shape[1])
    numbers = present[:, 0].astype(np.float64)
    mean = float(numbers.mean())
    sample, keys = _least(present[:, 0], np.random.default_rng(seed).random(len(present)))
    return Summary(
        number=len(present),
        width=1,
        mean=mean,
        squares=float(((numbers - mean) ** 2).sum()),
        sample=sample,
        keys=keys,
        ends=(float(numbers.min()), float(numbers.max())),
    )


def _least(values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(keys) <= _SAMPLE:
        return values, keys
    chosen = np.argpartition(keys, _SAMPLE)[:_SAMPLE]
    return values[chosen], keys[chosen]


def make_vocabularies(columns: Iterable[FeatureColumn]) -> dict[str, pl.Series]:
    """Give each of the columns the vocabulary of its table; returns table -> vocabulary.

    Raises:
        ValueError: If the values of a column are none of its kind.
    """
    with_ids = [column for column in columns if column.declaration.has_ids]
    tables: dict[str, list[pl.Series]] = {}
    for column in with_ids:
        tables.setdefault(column.declaration.table, []).append(column.close())
    found = {table: _ascending(parts) for table, parts in tables.items()}
    for column in with_ids:
        column.number(found[column.declaration.table])
    return found


def _ascending(parts: list[pl.Series]) -> pl.Series:
    if any(part.dtype == pl.String for part in parts):
        text = pl.concat([part.cast(pl.String) for part in parts]).unique()
        integers = text.cast(pl.Int64, strict=False)
        if integers.null_count() or (integers.cast(pl.String) != text).any():
            return text.sort()
        return integers.sort()
    return pl.concat(parts).unique().sort()
