"""Cut windows out of the columns of a data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from hstu.data.column_cache import OFFSETS, Check, DamageError, map_columns, set_offsets
from hstu.data.schema import Feature, Schema
from hstu.data.values import Sets, Values, concatenate, runs
from hstu.data.vocabulary import Index, Vocabularies


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A ragged selection of events.

    Args:
        users: Row of each sequence in the data set, int64 [B]; it is also the user's id.
        contexts: Categorical feature of users -> id of each sequence, int64 [B].
        lengths: Number of events of each sequence, int64 [B].
        items: Item ids, sequence after sequence, int64 [T].
        actions: Action ids, int64 [T], or None.
        times: Seconds, int64 [T], or None.
        of_users: Other features of users that were asked for -> B values; ids in the type of their column.
        of_events: Features of events that were asked for -> T values, likewise.
    """

    users: np.ndarray
    contexts: dict[str, np.ndarray]
    lengths: np.ndarray
    items: np.ndarray
    actions: np.ndarray | None
    times: np.ndarray | None
    of_users: dict[str, Values] = field(default_factory=dict)
    of_events: dict[str, Values] = field(default_factory=dict)


class Histories(Protocol):
    """What samples are read from: a data set, or requests to one.

    Attributes:
        schema: Its features.
        lengths: Number of events of each row, int64 [U].
    """

    schema: Schema
    lengths: np.ndarray

    def gather(
        self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...] = ()
    ) -> Sequences:
        """Events ``[start_b, stop_b)`` of each row; see ``SequenceDataset.gather``."""


class SequenceDataset:
    """All sequences of a data set, as one flat array per feature on disk and the offsets of the users."""

    def __init__(self, path: Path, schema: Schema, columns: dict[str, np.ndarray]) -> None:
        self.path = path
        self.schema = schema
        self._offsets = columns[OFFSETS]
        self._columns = columns
        self._indices: dict[str, Index] = {}
        #: Number of events of each user, int64 [U].
        self.lengths = np.diff(self._offsets)

    @classmethod
    def open(cls, path: str | Path, check: Check = "some") -> SequenceDataset:
        """Map the data set in directory ``path`` into memory; the first time, check it against its schema.

        Args:
            path: The directory.
            check: How much of what was written the first time is checked for damage, see ``map_columns``.

        Raises:
            ValueError: If the schema or the parquet files are missing, a column is missing or of another
                type, items, actions and times of a user differ in number, times fall, ids are out of
                range, or the counts differ. The message names file, column, row and value.
        """
        path = Path(path)
        schema = Schema.load(path)
        return cls(path, schema, map_columns(path, schema, check))

    @classmethod
    def joined(cls, parts: list[SequenceDataset]) -> SequenceDataset:
        """Return the users of all ``parts``, one after the other; at least one part, all of the same columns."""
        first = parts[0]
        sets = {name for name in first._columns if set_offsets(name) in first._columns}
        lengths = np.concatenate([part.lengths for part in parts])
        columns = {OFFSETS: np.append(0, np.cumsum(lengths))}
        for name in first._columns.keys() - {OFFSETS, *map(set_offsets, sets)}:
            if name in sets:
                every = [Sets(part._columns[set_offsets(name)], part._columns[name]) for part in parts]
                columns[set_offsets(name)], columns[name] = concatenate(list(every))
            else:
                columns[name] = np.concatenate([part._columns[name] for part in parts])
        return cls(first.path, first.schema, columns)

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.lengths)

    @property
    def num_events(self) -> int:
        """Number of events of all users."""
        return int(self._offsets[-1])

    def gather(
        self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...] = ()
    ) -> Sequences:
        """Events ``[start_b, stop_b)`` of each user, without a loop over users.

        Args:
            users: Rows, int64 [B]; any order, repeats allowed.
            start: First event of each window, int64 [B].
            stop: End of each window, int64 [B].
            features: Declared features and control columns of users and events to read besides.

        Raises:
            ValueError: If a user or a window is out of range, or the columns hold an id that cannot be.
        """
        users, start, stop = (np.asarray(array, dtype=np.int64) for array in (users, start, stop))
        if not users.shape == start.shape == stop.shape or users.ndim != 1:
            shapes = f"users {users.shape}, start {start.shape}, stop {stop.shape}"
            raise ValueError(f"{shapes}: expected three arrays [B]")
        if len(users) and (users.min() < 0 or users.max() >= self.num_users):
            raise ValueError(f"user row out of range [0, {self.num_users}): {users.min()} .. {users.max()}")
        wrong = np.flatnonzero((start < 0) | (start > stop) | (stop > self.lengths[users]))
        if len(wrong):
            b = wrong[0]
            window = f"window [{start[b]}, {stop[b]}) of user row {users[b]}"
            raise ValueError(f"{window} lies outside its {self.lengths[users[b]]} events")
        lengths = stop - start
        # Position in the flat column = first position of the window + place within the window.
        first = self._offsets[users] + start
        index = runs(first, lengths)
        schema = self.schema
        return Sequences(
            users=users,
            contexts={feature.name: self._ids(feature, users) for feature in schema.contexts},
            lengths=lengths,
            items=self._ids(schema.item, index),
            actions=self._ids(schema.action, index) if schema.action else None,
            times=self._ids(schema.time, index) if schema.time else None,
            of_users={f.name: self._take(f, users) for f in schema.stored("user") if f.name in features},
            of_events={
                f.name: self._sets(f, first, lengths, index) if f.kind == "multi" else self._take(f, index)
                for f in schema.stored("event")
                if f.name in features
            },
        )

    def _take(self, feature: Feature, index: np.ndarray) -> Values:
        if feature.kind == "multi":
            return self._sets(feature, index, np.ones_like(index), index)
        if feature.has_ids:
            return self._checked(feature, self._columns[feature.name].take(index))
        column = self._columns[feature.name]
        # Single numbers are taken faster than rows of one.
        return column.reshape(-1).take(index)[:, None] if column.shape[1] == 1 else column.take(index, axis=0)

    def _sets(self, feature: Feature, first: np.ndarray, lengths: np.ndarray, index: np.ndarray) -> Sets:
        """Sets of runs of ``lengths`` [B] rows that begin at ``first`` [B], which are the rows ``index`` [T]."""
        starts = self._columns[set_offsets(feature.name)]
        begin, sizes = starts[first], starts[first + lengths] - starts[first]
        ends = np.cumsum(sizes)
        offsets = np.empty(len(index) + 1, np.int64)
        # Within a run, sets lie as in the column.
        np.add(starts.take(index), np.repeat(ends - sizes - begin, lengths), out=offsets[:-1])
        offsets[-1] = ends[-1] if len(ends) else 0
        ids = self._columns[feature.name].take(runs(begin, sizes))
        return Sets(offsets, self._checked(feature, ids))

    def _ids(self, feature: Feature, index: np.ndarray) -> np.ndarray:
        # `take` is a third faster than indexing.
        return self._checked(feature, self._columns[feature.name].take(index)).astype(np.int64, copy=False)

    def _checked(self, feature: Feature, ids: np.ndarray) -> np.ndarray:
        # One more than the vocabulary's stands for what is missing, and in requests for what training never met.
        most = (feature.vocab_size or 0) - (feature.role in ("user", "item") or feature.kind == "multi")
        if feature.vocab_size is not None and ids.size and ids.max() > most:
            raise DamageError(
                f"{self.path}: the column of {feature.name!r} is damaged: it holds {ids.max()} of "
                f"{feature.vocab_size} ids; python -m hstu.cli.inspect {self.path} makes it again"
            )
        return ids

    def count_before(self, time: int) -> np.ndarray:
        """Return the number of events of each user before ``time``, int64 [U].

        Raises:
            ValueError: If the data set has no times.
        """
        times = self._columns[self._time_name()]
        low, high = self._offsets[:-1].copy(), self._offsets[1:].copy()
        while len(open_rows := np.flatnonzero(low < high)):  # all users at once, each by bisection
            middle = (low[open_rows] + high[open_rows]) // 2
            before = times[middle] < time
            low[open_rows[before]] = middle[before] + 1
            high[open_rows[~before]] = middle[~before]
        return low - self._offsets[:-1]

    def time_range(self) -> tuple[int, int]:
        """Return the times of the first and the last event of all.

        Raises:
            ValueError: If the data set has no times or no events.
        """
        times, some = self._columns[self._time_name()], self.lengths > 0
        if not some.any():
            raise ValueError(f"{self.path}: data set {self.schema.name!r} has no events")
        return int(times[self._offsets[:-1][some]].min()), int(times[self._offsets[1:][some] - 1].max())

    def _time_name(self) -> str:
        if self.schema.time is None:
            raise ValueError(f"{self.path}: data set {self.schema.name!r} has no times; use DatasetArgs.protocol = "
                             "'leave_one_out'")  # fmt: skip
        return self.schema.time.name

    def action_ids(self, originals: tuple[float | str, ...]) -> tuple[int, ...]:
        """Return the ids of actions given by original values, ascending.

        Of a bit mask, the ids of all masks that contain one of ``originals``; 0 stands for itself alone.

        Raises:
            ValueError: If the data set has no such action, with those it has.
        """
        action = self.schema.action
        if not originals:
            return ()
        if action is None:
            raise ValueError(f"DatasetArgs.actions_without_loss = {originals!r}: {self.schema.name!r} has no actions")
        bitmask = action.action_type == "bitmask"
        known = np.arange(action.vocab_size or 0) if bitmask else self.vocabulary(action.name)
        found = np.zeros(known.size, bool)
        for value in originals:
            same = known == value
            if not same.any():
                some = ", ".join(repr(original) for original in known[:20].tolist())
                raise ValueError(
                    f"DatasetArgs.actions_without_loss = {originals!r}: no action {value!r} in {self.schema.name!r}; "
                    f"there are: {some}"
                )
            found |= known & known[same] == value if bitmask and value != 0 else same
        return tuple(np.flatnonzero(found).tolist())

    def vocabulary(self, feature: str) -> np.ndarray:
        """Original values of a feature in the order of its ids, [vocab_size] (int64, float64 or object).

        Raises:
            ValueError: If the feature has no vocabulary (times and bit masks stand for themselves), or it is damaged.
        """
        return self.vocabularies.originals(feature).to_numpy(zero_copy_only=False)

    def index(self, feature: str) -> Index:
        """Where original values of a feature stand in its vocabulary; read once, and kept.

        Raises:
            ValueError: If the feature has no vocabulary, or it is damaged.
        """
        if feature not in self._indices:
            self._indices[feature] = Index(self.vocabularies.originals(feature))
        return self._indices[feature]

    def item_features(self, name: str) -> Values:
        """Values of a feature of items in the order of the items' ids: ids [items] int64, numbers [items, w] or sets.

        Raises:
            ValueError: If they are missing, damaged or out of range.
        """
        return self.vocabularies.item_features(name)

    def category_ids(self, category: str) -> np.ndarray:
        """Id of each item's value of a category feature, in the order of the items' ids, int64 [items].

        Raises:
            ValueError: If they are missing, damaged or out of range.
        """
        return self.vocabularies.category_ids(category)

    @property
    def vocabularies(self) -> Vocabularies:
        """The original values behind the ids."""
        return Vocabularies(self.path, self.schema)
