"""Vocabularies: the original value of each id of a feature, and a hash by which one is told from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from hstu.data.checksums import open_parquet
from hstu.data.schema import ITEM_FEATURE, SCHEMA_FILE, VOCABULARY_DIR, Schema
from hstu.data.values import Values, count, from_arrow, take

BITS = "bits: "  # begins the identity of bit masks
_BLOCK = 1 << 20  # values hashed at once


def identity_of(blocks: Iterable[pa.Array]) -> str:
    """Return the sha256 of values in the order of their ids: the same for the same values, however they are stored.

    Args:
        blocks: The values of a column, in any number of blocks.
    """
    kind, number, digests = "", 0, (hashlib.sha256(), hashlib.sha256())
    for block in blocks:
        kind, parts = _plain(block)
        number += len(block)
        for digest, part in zip(digests, parts, strict=True):
            digest.update(np.ascontiguousarray(part).data)
    return hashlib.sha256(f"{kind} {number} ".encode() + b"".join(d.digest() for d in digests)).hexdigest()


def _plain(block: pa.Array) -> tuple[str, tuple[np.ndarray, np.ndarray]]:
    """Return the kind of the values and two arrays that say all of them."""
    if pa.types.is_list(block.type):
        kind, (values, _) = _plain(block.flatten())
        return f"sets of {kind}", (values, block.value_lengths().to_numpy(zero_copy_only=False))
    if pa.types.is_fixed_size_list(block.type):
        kind, parts = _plain(block.flatten())
        return f"{block.type.list_size} {kind}", parts
    if pa.types.is_integer(block.type) or pa.types.is_boolean(block.type):
        values = block.cast(pa.int64(), safe=False)
        return "whole", (values.fill_null(0).to_numpy(zero_copy_only=False), _validity(values))
    if pa.types.is_floating(block.type):
        values = block.cast(pa.float64())
        return "real", (values.fill_null(0).to_numpy(zero_copy_only=False), _validity(values))
    kind = "bytes" if pa.types.is_binary(block.type) or pa.types.is_large_binary(block.type) else "text"
    if not (pa.types.is_large_string(block.type) or pa.types.is_string(block.type)):
        block = block.cast(pa.large_string())
    lengths = pc.fill_null(pc.binary_length(block).cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    text = block.cast(pa.large_binary())
    if not len(text):
        return kind, (lengths, np.zeros(0, np.uint8))
    offsets = np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]
    letters = np.frombuffer(text.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return kind, (lengths, letters)


def _validity(values: pa.Array) -> np.ndarray:
    return values.is_valid().to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies in a directory with a schema: of a data set, or those that a run keeps.

    Args:
        path: The directory.
        schema: Its schema.
    """

    path: Path
    schema: Schema

    def table(self, feature: str) -> str:
        """Return the vocabulary of ``feature``, which may be the name of one itself."""
        return next((known.table or feature for known in self.schema.features if known.name == feature), feature)

    def file(self, feature: str) -> Path:
        """Return where the vocabulary of ``feature`` is."""
        return self.path / VOCABULARY_DIR / f"{self.table(feature)}.parquet"

    def size(self, feature: str) -> int | None:
        """Return how many ids ``feature``, or the vocabulary of that name, has; None if there is none."""
        return next((known.vocab_size for known in self.schema.features if feature in (known.name, known.table)), None)

    def stands_for_itself(self, feature: str) -> bool:
        """Return whether the ids of ``feature`` are its values: of bit masks."""
        action = self.schema.action
        return action is not None and action.name == feature and action.action_type == "bitmask"

    def identity(self, feature: str) -> str | None:
        """Return what tells the vocabulary of ``feature`` from others.

        Ids that are bit masks stand for themselves: it says the names of the bits, and is None if they have none.

        Data sets of versions that kept none have their files read.

        Raises:
            ValueError: If there is no vocabulary, or it cannot be read.
        """
        action = self.schema.action
        if action is not None and self.stands_for_itself(feature):
            return None if action.bits is None else f"{BITS}{', '.join(action.bits)}"
        known = self.schema.vocabularies.get(self.table(feature))
        return identity_of(self._blocks(feature)) if known is None else known

    def check(self, feature: str) -> None:
        """Raise ValueError if the vocabulary of ``feature`` is damaged; in memory that does not grow with it."""
        known = self.schema.vocabularies.get(self.table(feature))
        if known is not None and identity_of(self._blocks(feature)) != known:
            raise self._damaged(feature, "original")

    def originals(self, feature: str) -> pa.Array:
        """Return the original values of ``feature`` in the order of its ids, [vocab_size].

        Raises:
            ValueError: If there are none (times and bit masks stand for themselves), or they are damaged.
        """
        return self._column(feature, "original", self.table(feature))

    def item_features(self, name: str) -> Values:
        """Return the values of a feature of items, in the order of the items' ids: ids, numbers or sets.

        Raises:
            ValueError: If they are missing, damaged or out of range.
        """
        item = self.schema.item
        feature = next(feature for feature in self.schema.stored("item") if feature.name == name)
        column = self._column(item.name, ITEM_FEATURE + name, ITEM_FEATURE + name)
        try:
            found = from_arrow(column, feature)
        except ValueError as error:
            raise ValueError(f"{self.file(item.name)}: feature {name!r} {error}; run the preprocessor again") from None
        if count(found) != item.vocab_size:
            raise ValueError(
                f"{self.file(item.name)}: feature {name!r} has {count(found)} values, not {item.vocab_size}; run the "
                "preprocessor again"
            )
        return take(found, np.arange(count(found)))  # a copy that may be written to, as arrow's memory may not

    def category_ids(self, category: str) -> np.ndarray:
        """Return the id of each item's value of a categorical feature, in the order of the items' ids, int64 [items].

        Raises:
            ValueError: If they are missing, damaged or out of range.
        """
        found = self.item_features(category)
        assert isinstance(found, np.ndarray)
        return found

    def _column(self, feature: str, column: str, key: str) -> pa.Array:
        values = pa.concat_arrays(list(self._blocks(feature, column)))
        known = self.schema.vocabularies.get(key)
        if known is not None and identity_of([values]) != known:
            raise self._damaged(feature, column)
        return values

    def _damaged(self, feature: str, column: str) -> ValueError:
        return ValueError(
            f"{self.file(feature)}: column {column!r} is damaged, it is not what {self.path / SCHEMA_FILE} "
            "describes; run the preprocessor again"
        )

    def _blocks(self, feature: str, column: str = "original") -> Iterator[pa.Array]:
        """Yield the values of ``column`` in the order of the ids, block by block."""
        path = self.file(feature)
        if not path.is_file():
            present = ", ".join(sorted(file.stem for file in path.parent.glob("*.parquet")))
            raise ValueError(f"{path}: no vocabulary of {feature!r}; there are: {present}")
        with open_parquet(path) as file:
            for name in ("id", column):
                if name not in file.schema_arrow.names:
                    raise ValueError(f"{path}: column {name!r} is missing; run the preprocessor again")
            number = 0
            for block in file.iter_batches(batch_size=_BLOCK, columns=["id", column]):
                ids = block.column("id").to_numpy(zero_copy_only=False)
                if not np.array_equal(ids, np.arange(number, number + len(ids))):
                    raise ValueError(f"{path}: is damaged, its ids are not 0, 1, 2, ...; run the preprocessor again")
                number += len(ids)
                yield block.column(column)
            if number != self.size(feature):
                raise ValueError(
                    f"{path}: has {number} values, {self.path / SCHEMA_FILE} says {self.size(feature)}; "
                    "run the preprocessor again"
                )


def places_of(values: pl.Series, known: pl.Series) -> pl.Series:
    """Return the position of each of ``values`` among ``known``, Int64; null where it is not there.

    Numbers compare as numbers, anything else as it is written.
    """
    if values.dtype != known.dtype:
        kind = pl.Float64() if values.dtype.is_numeric() and known.dtype.is_numeric() else pl.String()
        values, known = values.cast(kind), known.cast(kind)
    table = pl.DataFrame({"value": known, "id": np.arange(len(known))})
    return values.rename("value").to_frame().join(table, on="value", how="left", maintain_order="left")["id"]


class Index:
    """Where values stand among the values of a vocabulary, for who asks often: what is sorted is sorted once.

    Args:
        originals: Original values in the order of their ids, distinct.

    Attributes:
        originals: The same, of a plain type.
        values: The same.
    """

    def __init__(self, originals: pa.Array) -> None:
        values = originals.to_pylist()
        self.originals, self.values = pa.array(values), pl.Series(values)
        self._sorted: dict[pl.DataType, tuple[pl.Series, pl.Series]] = {}

    def places(self, values: pl.Series) -> pl.Series:
        """Return the id of each of ``values``, Int64, null where it has none; they compare as in ``places_of``."""
        kind: pl.DataType = self.values.dtype
        if values.dtype != kind:
            kind = pl.Float64() if values.dtype.is_numeric() and kind.is_numeric() else pl.String()
        if kind not in self._sorted:
            known = self.values.cast(kind)
            order = known.arg_sort()
            self._sorted[kind] = known[order], order.cast(pl.Int64)
        (known, order), values = self._sorted[kind], values.cast(kind)
        if not len(known) or not len(values):
            return pl.repeat(None, len(values), dtype=pl.Int64, eager=True)
        place = known.search_sorted(values.fill_null(known[0]), "left").clip(upper_bound=len(known) - 1)
        return order[place].set(~(known[place] == values).fill_null(False), None)
