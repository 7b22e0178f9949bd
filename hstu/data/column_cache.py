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
import pyarrow.parquet as pq

from hstu.data.checksums import SummedFile, find_damage
from hstu.data.schema import DATA_DIR, SCHEMA_FILE, Feature, Schema

logger = logging.getLogger(__name__)

OFFSETS = ".offsets"  # key beside the features, none of which can begin with a dot
_PREFIX, _PARTIAL = ".columns-", ".partial-columns-"
_EVENTS_AT_ONCE = 1 << 21
_FORMAT = b"2"
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
        ``OFFSETS`` -> [users + 1] int64, context feature -> [users], event feature -> [events]; ids in the
        smallest unsigned type that holds them.

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


def event_features(schema: Schema) -> list[Feature]:
    """Return the features that have one value an event."""
    return [feature for feature in (schema.item, schema.action, schema.time) if feature is not None]


def _fingerprint(path: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(_FORMAT + (path / SCHEMA_FILE).read_bytes())
    for file in files:
        status = file.stat()
        digest.update(f"\n{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _load(folder: Path, schema: Schema, check: Check) -> dict[str, np.ndarray]:
    names = [OFFSETS, *(feature.name for feature in (*schema.contexts, *event_features(schema)))]
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
    columns = {OFFSETS: _Column(folder, OFFSETS, np.dtype(np.int64), users + 1)}
    for feature in schema.contexts:
        columns[feature.name] = _Column(folder, feature.name, _storage(feature), users)
    for feature in event_features(schema):
        columns[feature.name] = _Column(folder, feature.name, _storage(feature), events)
    found = np.zeros(1, np.int64)  # events so far
    columns[OFFSETS].append(found)
    for file in files:
        for chunk in _read_chunks(file, schema, columns[OFFSETS].size - 1):
            lengths = chunk.pop(OFFSETS)
            if not lengths.size:
                continue
            offsets = found[-1] + np.cumsum(lengths)
            found = offsets[-1:]
            columns[OFFSETS].append(offsets)
            for name, values in chunk.items():
                columns[name].append(values)
    sums = {f"{name}.npy": column.file.finish() for name, column in columns.items()}
    (folder / _SUMS_FILE).write_text(json.dumps(sums))
    for key, stated, read in (("users", users, columns[OFFSETS].size - 1), ("events", events, int(found[0]))):
        if stated != read:
            raise ValueError(
                f"{files[0].parent}: {read} {key}, the schema counts {stated}; "
                "a file is missing or foreign, run the preprocessor again"
            )


def _storage(feature: Feature) -> np.dtype:
    return np.dtype(np.int64) if feature.vocab_size is None else np.min_scalar_type(feature.vocab_size - 1)


class _Column:
    """A .npy file that grows to its announced size."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, size: int) -> None:
        self.dtype, self.size = dtype, 0
        self.file, head = SummedFile(folder / f"{name}.npy"), io.BytesIO()
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
        np.lib.format.write_array_header_1_0(head, header)
        self.file.write(head.getvalue())

    def append(self, values: np.ndarray) -> None:
        if values.size:
            self.file.write(np.ascontiguousarray(values, self.dtype).data)
            self.size += values.size


def _read_chunks(file: Path, schema: Schema, first_row: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the checked columns of some users after the other: ``OFFSETS`` -> their lengths."""
    names = [feature.name for feature in (*schema.contexts, *event_features(schema))]
    rows = int(_EVENTS_AT_ONCE / max(1.0, schema.counts["seqlen_mean"])) + 1
    try:
        parquet = pq.ParquetFile(file, memory_map=True)
        present = parquet.schema_arrow.names
        if missing := [name for name in (schema.user.name, *names) if name not in present]:
            raise ValueError(f"{file}: column {missing[0]!r} is missing; present: {', '.join(present)}")
        row = 0
        for batch in parquet.iter_batches(batch_size=rows, columns=[schema.user.name, *names]):
            yield _Chunk(file, row).columns(batch, schema, first_row)
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as parquet ({error}); run the preprocessor again") from error


class _Chunk:
    """Rows ``row``, ``row + 1``, ... of ``file``; its errors name file, column, row and value."""

    def __init__(self, file: Path, row: int) -> None:
        self.file, self.row = file, row

    def columns(self, batch: pa.RecordBatch, schema: Schema, first_row: int) -> dict[str, np.ndarray]:
        """Return the columns of ``batch``, whose first row is user ``first_row + self.row``."""
        users = self._scalars(schema.user.name, batch.column(schema.user.name))
        strange = np.flatnonzero(users != np.arange(users.size) + first_row + self.row)
        if len(strange):
            row = strange[0] + self.row
            raise self._error(
                schema.user.name, row, f"user {users[strange[0]]}, expected {first_row + row}; "
                "users must stand in the order of their ids, each once"
            )  # fmt: skip
        columns = {}
        for feature in schema.contexts:
            columns[feature.name] = self._scalars(feature.name, batch.column(feature.name))
            self._check_values(feature, columns[feature.name], np.ones(users.size, np.int64))
        for feature in event_features(schema):
            lengths, columns[feature.name] = self._lists(feature.name, batch.column(feature.name))
            differing = np.flatnonzero(lengths != columns.setdefault(OFFSETS, lengths))
            if len(differing):
                b = differing[0]
                raise self._error(
                    feature.name, b + self.row, f"{lengths[b]} values, but {columns[OFFSETS][b]} in "
                    f"{schema.item.name!r}; they must be equal"
                )  # fmt: skip
            self._check_values(feature, columns[feature.name], lengths)
        return columns

    def _error(self, name: str, row: int, message: str) -> ValueError:
        return ValueError(f"{self.file}: column {name!r}, row {row}: {message}")

    def _scalars(self, name: str, column: pa.Array) -> np.ndarray:
        if column.type != pa.int64():
            raise ValueError(f"{self.file}: column {name!r} is {column.type}, expected int64")
        self._check_nulls(name, column)
        return column.to_numpy()

    def _lists(self, name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Return lengths [rows] and flat values [events] of a list column."""
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or kind.value_type != pa.int64():
            raise ValueError(f"{self.file}: column {name!r} is {kind}, expected list<int64>")
        self._check_nulls(name, column)
        values = column.flatten()
        if values.null_count:
            raise ValueError(f"{self.file}: column {name!r} has null values within its lists")
        return column.value_lengths().to_numpy().astype(np.int64), values.to_numpy()

    def _check_nulls(self, name: str, column: pa.Array) -> None:
        if column.null_count:
            row = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0] + self.row
            raise self._error(name, row, "null; every user needs a value")

    def _check_values(self, feature: Feature, values: np.ndarray, lengths: np.ndarray) -> None:
        """Ids must lie in [0, vocab_size), times must not fall within a user."""
        if feature.vocab_size is None:
            falls = np.zeros(len(values), bool)
            np.less(values[1:], values[:-1], out=falls[1:])
            falls[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
            wrong, reason = np.flatnonzero(falls), "is before the event in front of it"
        elif len(values) == 0 or (values.min() >= 0 and values.max() < feature.vocab_size):
            return
        else:
            wrong = np.flatnonzero((values < 0) | (values >= feature.vocab_size))
            reason = f"is outside [0, {feature.vocab_size})"
        if len(wrong):
            row = int(np.searchsorted(np.cumsum(lengths), wrong[0], side="right")) + self.row
            raise self._error(feature.name, row, f"value {values[wrong[0]]} {reason}")
