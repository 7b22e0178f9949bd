"""Count distinct values block by block and number them, in memory that grows with their number, not with the log."""

from __future__ import annotations

import numpy as np
import polars as pl

# Below this, a value indexes a table: 2**26 counts take 256 MiB, and the 32 million items of KuaiRand fit in.
_TABLE = 1 << 26
_NO_INTEGER = -(2**63)


class ValueCounts:
    """Distinct integers of a column and how often each was seen."""

    def __init__(self) -> None:
        self._table = np.zeros(0, np.int64)
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []  # values outside the table, ascending, and counts

    def add(self, values: np.ndarray) -> None:
        """Count a block of integers [N]."""
        if len(values) == 0:
            return
        if values.min() < 0 or values.max() >= _TABLE:
            inside = (values >= 0) & (values < _TABLE)
            self._add_sorted(*np.unique(values[~inside].astype(np.int64), return_counts=True))
            values = values[inside]
        if len(values) and values.max() >= len(self._table):
            grown = np.zeros(1 << int(values.max()).bit_length(), np.int64)
            grown[: len(self._table)] = self._table
            self._table = grown
        np.add.at(self._table, values, 1)

    def _add_sorted(self, values: np.ndarray, counts: np.ndarray) -> None:
        # Merging equals with equals only: every value is moved a logarithmic number of times.
        while self._sorted and len(self._sorted[-1][0]) <= 2 * len(values):
            values, counts = _merge((values, counts), self._sorted.pop())
        self._sorted.append((values, counts))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct values, ascending, and their counts, int64 [V]."""
        values = np.flatnonzero(self._table)
        found = values, self._table[values]
        for pair in reversed(self._sorted):
            found = _merge(found, pair)
        return found


def _merge(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.concatenate([left[0], right[0]]), np.concatenate([left[1], right[1]])
    order = np.argsort(values, kind="stable")
    values, counts = values[order], counts[order]
    first = np.flatnonzero(np.concatenate([np.ones(len(values[:1]), bool), values[1:] != values[:-1]]))
    return values[first], np.add.reduceat(counts, first) if len(first) else counts


class Numbering:
    """Ids of known values.

    Args:
        values: The values, ascending, int64 [V]; other values get the id -1.
        ids: Id of each, int64 [V]; by default its position.
    """

    def __init__(self, values: np.ndarray, ids: np.ndarray | None = None) -> None:
        self._values = values
        self._ids = np.arange(len(values)) if ids is None else ids
        self._table: np.ndarray | None = None
        if len(values) and values[0] >= 0 and values[-1] < _TABLE and len(values) < 2**31:
            self._table = np.full(int(values[-1]) + 1, -1, np.int32)
            self._table[values] = self._ids

    def __call__(self, column: np.ndarray) -> np.ndarray:
        """Id of each value of a column [N], int64, -1 where there is none."""
        if self._table is not None:
            known = (column >= 0) & (column < len(self._table))
            ids = self._table[np.where(known, column, 0)].astype(np.int64)
            return ids if known.all() else np.where(known, ids, -1)
        # Looking up ascending values keeps to the cache, whatever the size of the vocabulary.
        distinct, inverse = np.unique(column, return_inverse=True)
        position = np.searchsorted(self._values, distinct)
        found = position < len(self._values)
        found[found] = self._values[position[found]] == distinct[found]
        ids = np.full(len(distinct), -1, np.int64)
        ids[found] = self._ids[position[found]]
        return ids[inverse]


class Ids:
    """The distinct ids of a column; strings get codes in the order of their first appearance."""

    def __init__(self) -> None:
        self._counts = ValueCounts()
        self._known: pl.Series | None = None  # empty, of the type that holds the strings seen so far

    def codes(self, column: pl.Series) -> np.ndarray:
        """Count a block of ids and return them as integers, [N]; of nulls one that no id has."""
        missing = _NO_INTEGER if column.dtype.is_integer() else -1
        if column.dtype == pl.String:
            kind = pl.Categorical(pl.Categories.random()) if self._known is None else self._known.dtype
            category = column.cast(kind)
            # The strings are forgotten with the last column that has their type.
            self._known = category.clear()
            column = category.to_physical()
        if column.null_count():
            self._counts.add(column.drop_nulls().to_numpy())
            return column.cast(pl.Int64).fill_null(missing).to_numpy()
        codes = column.to_numpy()
        self._counts.add(codes)
        return codes

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The distinct codes, ascending, and how often each was seen; they are not kept."""
        counts, self._counts = self._counts, ValueCounts()
        return counts.result()

    def owners(self, codes: np.ndarray) -> pl.Series:
        """The users that the codes stand for: :meth:`originals`, where a sequence is a user."""
        return self.originals(codes)

    def originals(self, codes: np.ndarray) -> pl.Series:
        """The ids that the codes stand for."""
        if self._known is None:
            return pl.Series(codes)
        return pl.Series(codes.astype(np.uint32)).cat.to(self._known.dtype).cast(pl.String)
