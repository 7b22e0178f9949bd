"""Values of a feature: an id each, some numbers each, or a set of ids each; taken, blanked and inserted alike."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa

from hstu.data.schema import Feature


class Sets(NamedTuple):
    """Sets of ids, one after the other.

    Attributes:
        offsets: Where each begins and the last ends, int64 [n + 1].
        ids: Their members, integers [offsets[n]].
    """

    offsets: np.ndarray
    ids: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Members of each, int64 [n]."""
        return np.diff(self.offsets)


Values: TypeAlias = np.ndarray | Sets
"""Ids [n], integers, numbers [n, w] float32, or n sets."""


def count(values: Values) -> int:
    """Return n."""
    return len(values.offsets) - 1 if isinstance(values, Sets) else len(values)


def take(values: Values, index: np.ndarray) -> Values:
    """Return the values at ``index`` [m] int64, any order, repeats allowed."""
    if not isinstance(values, Sets):
        return values[index]
    start, lengths = values.offsets[index], values.offsets[index + 1] - values.offsets[index]
    return Sets(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), values.ids[runs(start, lengths)])


def runs(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return ``first_b``, ``first_b + 1``, ... of runs of ``lengths`` [B], one after the other, int64 [sum]."""
    shift = first - (np.cumsum(lengths) - lengths)
    places = np.repeat(shift, lengths)
    places += np.arange(len(places))
    return places


def missing(feature: Feature, number: int) -> Values:
    """Return what ``number`` of ``feature`` hold where it has no value."""
    if feature.kind == "multi":
        return Sets(np.zeros(number + 1, np.int64), np.empty(0, np.int64))
    if not feature.has_ids:
        return np.full((number, feature.width or 1), np.nan, np.float32)
    return np.full(number, feature.vocab_size, np.int64)


def without(values: Values, lost: np.ndarray, feature: Feature) -> Values:
    """Return ``values`` of ``feature`` with none where ``lost`` [n] bool is true."""
    return insert(take(values, np.flatnonzero(~lost)), np.flatnonzero(lost), missing(feature, int(lost.sum())))


def only(values: Values, known: np.ndarray, instead: int) -> Values:
    """Return ids or sets of them with those alone that are ``known`` [ids] bool.

    Others become ``instead``; of sets they are left out.
    """
    if not isinstance(values, Sets):
        return np.where(known[values], values, instead)
    kept = known[values.ids]
    return Sets(np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])[values.offsets], values.ids[kept])


def insert(values: Values, places: np.ndarray, new: Values) -> Values:
    """Return ``values`` with ``new`` among them, which stand at ``places``, ascending, of the result."""
    total = count(values) + len(places)
    is_new = np.zeros(total, bool)
    is_new[places] = True
    source = np.empty(total, np.int64)
    source[~is_new], source[is_new] = np.arange(count(values)), count(values) + np.arange(len(places))
    return take(concatenate([values, new]), source)


def concatenate(parts: list[Values]) -> Values:
    """Return the values of all parts, one after the other; at least one part."""
    if not isinstance(parts[0], Sets):
        return np.concatenate(parts)
    lengths = np.concatenate([part.lengths for part in parts if isinstance(part, Sets)])
    ids = np.concatenate([part.ids for part in parts if isinstance(part, Sets)])
    return Sets(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]), ids)


def arrow_of(values: Values) -> pa.Array:
    """Return ids and sets of them as int64, numbers as float32, as lists of a fixed size where they are several."""
    if isinstance(values, Sets):
        return pa.ListArray.from_arrays(pa.array(values.offsets.astype(np.int32)), pa.array(values.ids, pa.int64()))
    if values.ndim == 2 and values.shape[1] > 1:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.array(values.reshape(-1), pa.int64() if values.ndim == 1 else pa.float32())


class MisfitError(ValueError):
    """A value that its feature cannot have.

    Args:
        place: Which one.
        reason: What is wrong with it.
    """

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(f"value {place}: {reason}")
        self.place, self.reason = place, reason


def arrow_type(feature: Feature) -> pa.DataType:
    """Return what ``arrow_of`` makes of the values of ``feature``."""
    if feature.kind == "multi":
        return pa.list_(pa.int64())
    if feature.has_ids or feature.role == "time":
        return pa.int64()
    return pa.list_(pa.float32(), feature.width) if (feature.width or 1) > 1 else pa.float32()


def from_arrow(column: pa.Array, feature: Feature) -> Values:
    """Return the values of ``feature`` in ``column``, which is of its ``arrow_type``: the reverse of ``arrow_of``.

    Raises:
        MisfitError: For a null, an id out of range, or an infinite number.
    """
    if column.null_count:
        raise MisfitError(int(column.is_null().to_numpy(zero_copy_only=False).argmax()), "null")
    if feature.kind == "multi":
        lengths, ids = column.value_lengths().to_numpy(zero_copy_only=False), column.flatten()
        sets = Sets(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]), _flat(ids))
        if (wrong := _out_of_range(sets.ids, feature)) is not None:
            place = int(np.searchsorted(sets.offsets, wrong, side="right")) - 1
            raise MisfitError(place, f"value {sets.ids[wrong]} is outside [0, {feature.vocab_size})")
        return sets
    if feature.has_ids:
        values = column.to_numpy()
        if (wrong := _out_of_range(values, feature)) is not None:
            raise MisfitError(wrong, f"value {values[wrong]} is outside [0, {feature.vocab_size})")
        return values
    if feature.role == "time":
        return column.to_numpy()
    numbers = _flat(column.flatten() if (feature.width or 1) > 1 else column).reshape(len(column), -1)
    if np.isinf(numbers).any():
        place = int(np.isinf(numbers).any(axis=1).argmax())
        raise MisfitError(place, f"value {numbers[place].tolist()} is not finite")
    return numbers


def _flat(column: pa.Array) -> np.ndarray:
    if column.null_count:
        raise MisfitError(0, "null within a list")
    return column.to_numpy()


def _out_of_range(ids: np.ndarray, feature: Feature) -> int | None:
    """Return the place of the first id that is none of ``feature``; a declared one may be that of what is missing."""
    may_lack = feature.role in ("feature", "control") and feature.kind != "multi"
    most = (feature.vocab_size or 0) - (not may_lack)
    if not ids.size or (ids.min() >= 0 and ids.max() <= most):
        return None
    return int(((ids < 0) | (ids > most)).argmax())
