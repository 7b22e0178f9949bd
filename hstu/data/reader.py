"""Read a data set directory into flat columns and cut windows out of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.data.schema import DATA_DIR, VOCABULARY_DIR, Feature, Schema

_LENGTHS = ""  # key beside the features in a column dictionary: no feature can be called so


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A ragged selection of events.

    Args:
        users: Row of each sequence in the data set, int64 [B]; it is also the user's id.
        contexts: Context feature -> id of each sequence, int64 [B].
        lengths: Number of events of each sequence, int64 [B].
        items: Item ids, sequence after sequence, int64 [T].
        actions: Action ids, int64 [T], or None.
        times: Seconds, int64 [T], or None.
    """

    users: np.ndarray
    contexts: dict[str, np.ndarray]
    lengths: np.ndarray
    items: np.ndarray
    actions: np.ndarray | None
    times: np.ndarray | None


class SequenceDataset:
    """All sequences of a data set, as one flat array per feature and the offsets of the users."""

    def __init__(
        self,
        *,
        path: Path,
        schema: Schema,
        lengths: np.ndarray,
        contexts: dict[str, np.ndarray],
        events: dict[str, np.ndarray],
    ) -> None:
        self.path = path
        self.schema = schema
        self.lengths = lengths
        self._contexts = contexts
        self._events = events
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @classmethod
    def open(cls, path: str | Path) -> SequenceDataset:
        """Read the data set in directory ``path`` and check it against its schema.

        Raises:
            ValueError: If the schema or the parquet files are missing, a column is missing or of another
                type, items, actions and times of a user differ in number, times fall, ids are out of
                range, or the counts differ. The message names file, column, row and value.
        """
        path = Path(path)
        schema = Schema.load(path)
        files = sorted((path / DATA_DIR).glob("*.parquet"))
        if not files:
            raise ValueError(f"{path / DATA_DIR}: no parquet files; run the preprocessor again")
        parts: list[dict[str, np.ndarray]] = []
        first_row = 0
        for file in files:
            parts.append(_read_part(file, schema, first_row))
            first_row += len(parts[-1][schema.user.name])
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        dataset = cls(
            path=path,
            schema=schema,
            lengths=columns[_LENGTHS],
            contexts={feature.name: columns[feature.name] for feature in schema.contexts},
            events={feature.name: columns[feature.name] for feature in _event_features(schema)},
        )
        for key, found in (("users", dataset.num_users), ("events", dataset.num_events)):
            if found != schema.counts[key]:
                raise ValueError(
                    f"{path / DATA_DIR}: {found} {key}, the schema counts {schema.counts[key]}; "
                    "a file is missing or foreign, run the preprocessor again"
                )
        return dataset

    @property
    def num_users(self) -> int:
        """Number of users U."""
        return len(self.lengths)

    @property
    def num_events(self) -> int:
        """Number of events of all users."""
        return int(self._offsets[-1])

    def gather(self, users: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Sequences:
        """Events ``[start_b, stop_b)`` of each user, without a loop over users.

        Args:
            users: Rows, int64 [B]; any order, repeats allowed.
            start: First event of each window, int64 [B].
            stop: End of each window, int64 [B].

        Raises:
            ValueError: If a user or a window is out of range.
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
        shift = self._offsets[users] + start - (np.cumsum(lengths) - lengths)
        index = np.arange(lengths.sum()) + np.repeat(shift, lengths)
        schema = self.schema
        return Sequences(
            users=users,
            contexts={name: column[users] for name, column in self._contexts.items()},
            lengths=lengths,
            items=self._events[schema.item.name][index],
            actions=self._events[schema.action.name][index] if schema.action else None,
            times=self._events[schema.time.name][index] if schema.time else None,
        )

    def vocabulary(self, feature: str) -> np.ndarray:
        """Original values of a feature in the order of its ids, [vocab_size] (int64, float64 or object).

        Raises:
            ValueError: If the feature has no vocabulary (times and bit masks stand for themselves).
        """
        path = self.path / VOCABULARY_DIR / f"{feature}.parquet"
        if not path.is_file():
            present = ", ".join(sorted(file.stem for file in path.parent.glob("*.parquet")))
            raise ValueError(f"{path}: no vocabulary of {feature!r}; there are: {present}")
        table = pq.read_table(path, memory_map=True)
        originals = table.column("original").to_numpy(zero_copy_only=False)
        ordered = np.empty_like(originals)
        ordered[table.column("id").to_numpy()] = originals
        return ordered


def _event_features(schema: Schema) -> list[Feature]:
    return [feature for feature in (schema.item, schema.action, schema.time) if feature is not None]


def _read_part(file: Path, schema: Schema, first_row: int) -> dict[str, np.ndarray]:
    """Columns of one file: [users] for user, contexts and lengths, [events] for the rest."""
    events = _event_features(schema)
    names = [feature.name for feature in (schema.user, *schema.contexts, *events)]
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
        present = parquet.schema_arrow.names
        if missing := [name for name in names if name not in present]:
            raise ValueError(f"{file}: column {missing[0]!r} is missing; present: {', '.join(present)}")
        table = parquet.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as parquet ({error}); run the preprocessor again") from error
    columns: dict[str, np.ndarray] = {}
    for feature in (schema.user, *schema.contexts):
        columns[feature.name] = _scalars(file, feature.name, table.column(feature.name))
        _check_range(file, feature, columns[feature.name], None)
    users = columns[schema.user.name]
    strange = np.flatnonzero(users != np.arange(first_row, first_row + len(users)))
    if len(strange):
        row = strange[0]
        raise ValueError(
            f"{file}: column {schema.user.name!r}, row {row}: user {users[row]}, expected {first_row + row}; "
            "users must stand in the order of their ids, each once"
        )
    for feature in events:
        lengths, columns[feature.name] = _lists(file, feature.name, table.column(feature.name))
        differing = np.flatnonzero(lengths != columns.setdefault(_LENGTHS, lengths))
        if len(differing):
            row = differing[0]
            raise ValueError(
                f"{file}: column {feature.name!r}, row {row}: {lengths[row]} values, "
                f"but {columns[_LENGTHS][row]} in {schema.item.name!r}; they must be equal"
            )
        _check_range(file, feature, columns[feature.name], lengths)
    return columns


def _scalars(file: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    if column.type != pa.int64():
        raise ValueError(f"{file}: column {name!r} is {column.type}, expected int64")
    _check_nulls(file, name, column)
    return column.to_numpy()


def _lists(file: Path, name: str, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [rows] and flat values [events] of a list column."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type != pa.int64():
        raise ValueError(f"{file}: column {name!r} is {kind}, expected list<int64>")
    _check_nulls(file, name, column)
    lengths = [chunk.value_lengths().to_numpy().astype(np.int64) for chunk in column.chunks]
    flat = [chunk.flatten() for chunk in column.chunks]
    if any(chunk.null_count for chunk in flat):
        raise ValueError(f"{file}: column {name!r} has null values within its lists")
    empty = [np.empty(0, np.int64)]
    return np.concatenate(lengths or empty), np.concatenate([chunk.to_numpy() for chunk in flat] or empty)


def _check_nulls(file: Path, name: str, column: pa.ChunkedArray) -> None:
    if column.null_count:
        row = np.flatnonzero(column.is_null().to_numpy())[0]
        raise ValueError(f"{file}: column {name!r}, row {row}: null; every user needs a value")


def _check_range(file: Path, feature: Feature, values: np.ndarray, lengths: np.ndarray | None) -> None:
    """Ids must lie in [0, vocab_size), times must not fall within a user."""
    if feature.vocab_size is None:
        falls = np.zeros(len(values), bool)
        np.less(values[1:], values[:-1], out=falls[1:])
        if lengths is not None:
            falls[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        wrong, reason = np.flatnonzero(falls), "is before the event in front of it"
    elif len(values) == 0 or (values.min() >= 0 and values.max() < feature.vocab_size):
        return
    else:
        wrong = np.flatnonzero((values < 0) | (values >= feature.vocab_size))
        reason = f"is outside [0, {feature.vocab_size})"
    if len(wrong):
        position = wrong[0]
        row = position if lengths is None else np.searchsorted(np.cumsum(lengths), position, side="right")
        raise ValueError(f"{file}: column {feature.name!r}, row {row}: value {values[position]} {reason}")
