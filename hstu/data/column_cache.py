"""Flat columns of a data set: made once from its parquet files, mapped into memory from then on."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from hstu.data.checksums import SummedFile, find_damage, open_parquet
from hstu.data.schema import DATA_DIR, SCHEMA_FILE, Feature, Schema
from hstu.data.values import MisfitError, Sets, Values, arrow_type, from_arrow

logger = logging.getLogger(__name__)

OFFSETS = ".offsets"  # key beside the features, none of which can begin with a dot
_PREFIX, _PARTIAL = ".columns-", ".partial-columns-"
_EVENTS_AT_ONCE = 1 << 21
_FORMAT = b"3"
_SUMS_FILE = "checksums.json"
Check = Literal["none", "some", "all"]


class DamageError(ValueError):
    """A column is not what was written."""


def map_columns(path: Path, schema: Schema, check: Check = "some") -> dict[str, np.ndarray]:
    """Return the columns of the data set in ``path``; only the pages that are touched occupy memory.

    The first time they are written to ``.columns-<fingerprint>`` beside the parquet files, and checked. The
    fingerprint changes with the schema and with name, size and time of the files. Columns that are not what was
    written are made again, and the log says so. Where ``path`` cannot be written, the columns live in a temporary file
    for as long as this process.

    Args:
        path: The data set.
        schema: Its description.
        check: "some": the sizes and a sample of the contents of columns that were written before; "all": everything;
            "none": another process of this job has checked them.

    Returns:
        ``OFFSETS`` -> [users + 1] int64, feature of users -> [users], of events -> [events]; ids in the smallest
        unsigned type that holds them, numbers float32, [.., width]. Of a feature whose values are sets, all members,
        and where each begins under ``set_offsets``.

    Raises:
        ValueError: If files are missing or contradict the schema; it names file, column, row and value.
    """
    files = sorted((path / DATA_DIR).glob("*.parquet"))
    if not files:
        raise ValueError(f"{path / DATA_DIR}: no parquet files; run the preprocessor again")
    folder = path / f"{_PREFIX}{_fingerprint(path, files)}"
    try:
        if folder.is_dir():
            try:
                return _load(folder, schema, check)
            except DamageError as damage:
                logger.warning("%s; the columns are made again from the parquet files", damage)
                shutil.rmtree(folder)
        _publish(folder, files, schema)
    except OSError as error:
        logger.warning("%s cannot be written (%s): its columns are made again for each run", path, error.strerror)
        with tempfile.TemporaryDirectory(prefix="hstu-columns-") as temporary:
            _write_columns(Path(temporary), files, schema)
            return _load(Path(temporary), schema, "none")  # a mapping outlives the name of its file
    return _load(folder, schema, "none")


def set_offsets(name: str) -> str:
    """Return the name of the column that says where the sets of feature ``name`` begin."""
    return f".sets-{name}"


def user_features(schema: Schema) -> tuple[Feature, ...]:
    """Return the features that have one value a user."""
    return schema.stored("user")


def event_features(schema: Schema) -> tuple[Feature, ...]:
    """Return the features that have one value an event."""
    special = (schema.item, schema.action, schema.time)
    return *(feature for feature in special if feature is not None), *schema.stored("event")


def _columns(schema: Schema) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return type and shape of each column."""
    users, events = int(schema.counts["users"]), int(schema.counts["events"])
    columns: dict[str, tuple[np.dtype, tuple[int, ...]]] = {OFFSETS: (np.dtype(np.int64), (users + 1,))}
    for features, number in ((user_features(schema), users), (event_features(schema), events)):
        for feature in features:
            shape: tuple[int, ...] = (number,)
            if feature.kind == "multi":
                columns[set_offsets(feature.name)] = np.dtype(np.int64), (number + 1,)
                shape = (feature.num_ids or 0,)
            elif not feature.has_ids and feature.role != "time":
                shape = (number, feature.width or 1)
            columns[feature.name] = _storage(feature), shape
    return columns


def _storage(feature: Feature) -> np.dtype:
    if feature.vocab_size is not None:  # the id after the last stands for a missing value of a declared feature
        return np.min_scalar_type(feature.vocab_size - (feature.role not in ("feature", "control")))
    return np.dtype(np.int64 if feature.role == "time" else np.float32)


def _fingerprint(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(_FORMAT + (path / SCHEMA_FILE).read_bytes())
    for file in files:
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _load(folder: Path, schema: Schema, check: Check) -> dict[str, np.ndarray]:
    names = list(_columns(schema))
    try:
        sums = json.loads((folder / _SUMS_FILE).read_bytes())
        for name in names if check != "none" else ():
            problem = find_damage(folder / f"{name}.npy", sums[f"{name}.npy"], whole=check == "all")
            if problem is not None:
                raise DamageError(f"{folder / name}.npy {problem}")
        columns = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
        offsets, events = columns[OFFSETS], columns[schema.item.name].size
        if offsets[0] != 0 or offsets[-1] != events or (offsets[1:] < offsets[:-1]).any():
            raise DamageError(f"{folder / OFFSETS}.npy does not divide {events} events among users")
        for name in names:
            starts = columns.get(set_offsets(name))
            if starts is not None and (starts[0] != 0 or starts[-1] != columns[name].size):
                raise DamageError(f"{folder / set_offsets(name)}.npy does not divide {columns[name].size} ids")
        return columns
    except DamageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DamageError(f"{folder} is damaged ({str(error) or type(error).__name__})") from error


def _publish(folder: Path, files: list[Path], schema: Schema) -> None:
    """Write the columns beside ``folder`` and rename them to it; several processes may do so at once."""
    logger.info("%s: writing columns of %s events, once", folder.parent, f"{schema.counts['events']:,}")
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder.parent))
    try:
        _write_columns(partial, files, schema)
        partial.chmod(0o755)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same columns
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for stale in folder.parent.glob(f"{_PREFIX}*"):
        if stale != folder:
            shutil.rmtree(stale, ignore_errors=True)


def _write_columns(folder: Path, files: list[Path], schema: Schema) -> None:
    users, events = int(schema.counts["users"]), int(schema.counts["events"])
    columns = {name: _Column(folder, name, *kind) for name, kind in _columns(schema).items()}
    for name in (OFFSETS, *(name for name in columns if set_offsets(name) in columns)):
        columns[name if name == OFFSETS else set_offsets(name)].append(np.zeros(1, np.int64))
    found = 0  # events so far
    for file in files:
        for chunk in _read_chunks(file, schema, columns[OFFSETS].rows - 1):
            lengths = chunk.pop(OFFSETS)
            assert isinstance(lengths, np.ndarray)
            if not lengths.size:
                continue
            offsets = found + np.cumsum(lengths)
            found = int(offsets[-1])
            columns[OFFSETS].append(offsets)
            for name, values in chunk.items():
                if isinstance(values, Sets):
                    columns[set_offsets(name)].append(values.offsets[1:] + columns[name].rows)
                    values = values.ids
                columns[name].append(values)
    sums = {f"{name}.npy": column.file.finish() for name, column in columns.items()}
    (folder / _SUMS_FILE).write_text(json.dumps(sums))
    stated_and_read = [("users", users, columns[OFFSETS].rows - 1), ("events", events, found)]
    for name, column in columns.items():
        if set_offsets(name) in columns:
            stated_and_read.append((f"ids of {name!r}", column.shape[0], column.rows))
    for key, stated, read in stated_and_read:
        if stated != read:
            raise ValueError(
                f"{files[0].parent}: {read} {key}, the schema counts {stated}; "
                "a file is missing or foreign, run the preprocessor again"
            )


class _Column:
    """A .npy file that grows to its announced size."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.rows = dtype, shape, 0
        self.file, head = SummedFile(folder / f"{name}.npy"), io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, header)
        self.file.write(head.getvalue())

    def append(self, values: np.ndarray) -> None:
        if values.size:
            self.file.write(np.ascontiguousarray(values, self.dtype).data)
            self.rows += len(values)


def _read_chunks(file: Path, schema: Schema, first_row: int) -> Iterator[dict[str, Values]]:
    """Yield the checked columns of some users after the other: ``OFFSETS`` -> their lengths."""
    names = [feature.name for feature in (*user_features(schema), *event_features(schema))]
    rows = int(_EVENTS_AT_ONCE / max(1.0, schema.counts["seqlen_mean"])) + 1
    with open_parquet(file) as parquet:
        present = parquet.schema_arrow.names
        if missing := [name for name in (schema.user.name, *names) if name not in present]:
            raise ValueError(f"{file}: column {missing[0]!r} is missing; present: {', '.join(present)}")
        row = 0
        for batch in parquet.iter_batches(batch_size=rows, columns=[schema.user.name, *names]):
            yield _Chunk(file, row).columns(batch, schema, first_row)
            row += batch.num_rows


class _Chunk:
    """Rows ``row``, ``row + 1``, ... of ``file``; its errors name file, column, row and value."""

    def __init__(self, file: Path, row: int) -> None:
        self.file, self.row = file, row

    def columns(self, batch: pa.RecordBatch, schema: Schema, first_row: int) -> dict[str, Values]:
        """Return the columns of ``batch``, whose first row is user ``first_row + self.row``."""
        users = self._scalars(schema.user, batch)
        assert isinstance(users, np.ndarray)
        columns: dict[str, Values] = {feature.name: self._scalars(feature, batch) for feature in user_features(schema)}
        strange = np.flatnonzero(users != np.arange(users.size) + first_row + self.row)
        if len(strange):
            row = strange[0] + self.row
            raise self._error(
                schema.user.name, row, f"user {users[strange[0]]}, expected {first_row + row}; "
                "users must stand in the order of their ids, each once"
            )  # fmt: skip
        expected: np.ndarray | None = None
        for feature in event_features(schema):
            lengths, columns[feature.name] = self._lists(feature, batch)
            expected = lengths if expected is None else expected
            differing = np.flatnonzero(lengths != expected)
            if len(differing):
                b = differing[0]
                raise self._error(
                    feature.name, b + self.row, f"{lengths[b]} values, but {expected[b]} in "
                    f"{schema.item.name!r}; they must be equal"
                )  # fmt: skip
        assert expected is not None
        return columns | {OFFSETS: expected}

    def _error(self, name: str, row: int, message: str) -> ValueError:
        return ValueError(f"{self.file}: column {name!r}, row {row}: {message}")

    def _scalars(self, feature: Feature, batch: pa.RecordBatch) -> Values:
        column, wanted = batch.column(feature.name), arrow_type(feature)
        if column.type != wanted:
            raise ValueError(f"{self.file}: column {feature.name!r} is {column.type}, expected {wanted}")
        return self._values(feature, column, np.ones(len(column), np.int64))

    def _lists(self, feature: Feature, batch: pa.RecordBatch) -> tuple[np.ndarray, Values]:
        """Return lengths [rows] and values [events] of a list column."""
        name, column = feature.name, batch.column(feature.name)
        kind, wanted = column.type, arrow_type(feature)
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type != wanted:
            raise ValueError(f"{self.file}: column {name!r} is {kind}, expected list<{wanted}>")
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0] + self.row
            raise self._error(name, row, "null; every user needs a value")
        lengths = column.value_lengths().to_numpy().astype(np.int64)
        values = self._values(feature, column.flatten(), lengths)
        if feature.role == "time" and isinstance(values, np.ndarray):
            self._require_order(feature, values, lengths)
        return lengths, values

    def _values(self, feature: Feature, column: pa.Array, lengths: np.ndarray) -> Values:
        try:
            return from_arrow(column, feature)
        except MisfitError as error:
            row = int(np.searchsorted(np.cumsum(lengths), error.place, side="right")) + self.row
            raise self._error(feature.name, row, error.reason) from None

    def _require_order(self, feature: Feature, times: np.ndarray, lengths: np.ndarray) -> None:
        """Times must not fall within a user."""
        falls = np.zeros(len(times), bool)
        np.less(times[1:], times[:-1], out=falls[1:])
        falls[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
        if falls.any():
            wrong = int(falls.argmax())
            row = int(np.searchsorted(np.cumsum(lengths), wrong, side="right")) + self.row
            raise self._error(feature.name, row, f"value {times[wrong]} is before the event in front of it")
