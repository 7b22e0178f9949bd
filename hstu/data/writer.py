"""Write a data set directory, all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.data.schema import DATA_DIR, SCHEMA_FILE, VOCABULARY_DIR, Schema

EVENTS_PER_PART = 1 << 24
# The schema comes last: a directory without it is no data set.
ENTRIES = (VOCABULARY_DIR, DATA_DIR, SCHEMA_FILE)


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """A data set in memory, ready to be written: row b is user b.

    Args:
        schema: Its description.
        lengths: Number of events of each user, int64 [U].
        contexts: Context feature -> ids, int64 [U].
        events: Item, action and time feature -> values, user after user in time order, int64 [T].
        vocabularies: Feature -> original values in the order of the ids, [vocab_size].
    """

    schema: Schema
    lengths: np.ndarray
    contexts: dict[str, np.ndarray]
    events: dict[str, np.ndarray]
    vocabularies: dict[str, pa.Array]


def write_dataset(dataset: EncodedDataset, directory: str | Path, events_per_part: int = EVENTS_PER_PART) -> None:
    """Write ``dataset`` into ``directory``, replacing the data set that is there only when complete.

    Other files in the directory (raw files, say) stay.

    Raises:
        ValueError: If the directory cannot be written or holds a foreign "data" or "vocabulary" entry.
    """
    with _replacing(Path(directory)) as staging:
        (staging / DATA_DIR).mkdir()
        (staging / VOCABULARY_DIR).mkdir()
        _write_parts(dataset, staging / DATA_DIR, events_per_part)
        for name, originals in dataset.vocabularies.items():
            table = pa.table({"id": pa.array(np.arange(len(originals))), "original": originals})
            pq.write_table(table, staging / VOCABULARY_DIR / f"{name}.parquet", compression="zstd")
        dataset.schema.save(staging)


def _write_parts(dataset: EncodedDataset, folder: Path, events_per_part: int) -> None:
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(dataset.lengths)])
    start = part = 0
    while start < len(dataset.lengths):
        within = int(np.searchsorted(offsets, offsets[start] + events_per_part, side="right")) - 1
        stop = max(start + 1, within)
        first, last = offsets[start], offsets[stop]
        columns = {dataset.schema.user.name: pa.array(np.arange(start, stop, dtype=np.int64))}
        columns |= {name: pa.array(ids[start:stop]) for name, ids in dataset.contexts.items()}
        bounds = pa.array((offsets[start : stop + 1] - first).astype(np.int32))
        columns |= {
            name: pa.ListArray.from_arrays(bounds, pa.array(values[first:last]))
            for name, values in dataset.events.items()
        }
        pq.write_table(pa.table(columns), folder / f"part-{part:05d}.parquet", compression="zstd")
        start, part = stop, part + 1


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield an empty sibling directory whose entries replace those of ``target`` on success."""
    for entry in (DATA_DIR, VOCABULARY_DIR):
        if (target / entry).exists() and not (target / SCHEMA_FILE).is_file():
            raise ValueError(
                f"{target / entry}: exists, but {target} is no data set; move it or choose another --data_dir"
            )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        new, old = staging / "new", staging / "old"
        new.mkdir()
        old.mkdir()
        yield new
        _swap(target, new, old)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def require_writable(directory: str | Path) -> None:
    """Raise ValueError unless ``directory`` can be created and written, as far as permissions tell."""
    path = Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise _unwritable(path, NotADirectoryError(0, f"{existing} is a file"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _unwritable(path, PermissionError(0, f"no permission in {existing}"))


def _unwritable(target: Path, error: OSError) -> ValueError:
    return ValueError(f"{target}: cannot be written ({error.strerror or error}); choose another --data_dir")


def _swap(target: Path, new: Path, old: Path) -> None:
    """Move the entries of ``target`` to ``old`` and those of ``new`` to ``target``, or change nothing."""
    created = not target.exists()
    target.mkdir(exist_ok=True)
    try:
        for entry in reversed(ENTRIES):
            if (target / entry).exists():
                (target / entry).rename(old / entry)
        for entry in ENTRIES:
            (new / entry).rename(target / entry)
    except BaseException:
        for entry in ENTRIES:
            if not (new / entry).exists():
                (target / entry).rename(new / entry)
            if (old / entry).exists():
                (old / entry).rename(target / entry)
        if created:
            with suppress(OSError):
                target.rmdir()
        raise
