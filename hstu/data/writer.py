"""Write a data set directory, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.data.atomic_directory import DATA_DIR, VOCABULARY_DIR, replacing
from hstu.data.schema import ITEM_FEATURE, Schema
from hstu.data.vocabulary import identity_of

EVENTS_PER_PART = 1 << 22


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """A data set in memory, ready to be written: row b is user b.

    Args:
        schema: Its description.
        lengths: Number of events of each user, int64 [U].
        contexts: Context feature -> ids, int64 [U].
        events: Item, action and time feature -> values, user after user in time order, int64 [T].
        vocabularies: Feature -> original values in the order of the ids, [vocab_size].
        categories: Category feature -> id of each item, int64 [items].
    """

    schema: Schema
    lengths: np.ndarray
    contexts: dict[str, np.ndarray]
    events: dict[str, np.ndarray]
    vocabularies: dict[str, pa.Array]
    categories: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class DatasetWriter:
    """Writes the files of a data set that is being made, in any order.

    Args:
        work: The work directory of the run.
    """

    work: Path
    #: Column of a vocabulary -> hash of its values, see ``Schema.vocabularies``.
    identities: dict[str, str] = field(default_factory=dict)

    @property
    def _new(self) -> Path:
        return self.work / "new"

    def part(
        self,
        number: int,
        *,
        users: tuple[str, int],
        lengths: np.ndarray,
        contexts: dict[str, np.ndarray],
        events: dict[str, np.ndarray],
    ) -> None:
        """Write part ``number``.

        Args:
            number: Position among the parts.
            users: Name of the user feature and id of the part's first user.
            lengths: Number of events of each of its users, int64 [B].
            contexts: Context feature -> ids, int64 [B].
            events: Item, action and time feature -> values, int64 [T].
        """
        name, first = users
        bounds = pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)]))
        columns = {name: pa.array(np.arange(first, first + len(lengths), dtype=np.int64))}
        columns |= {feature: pa.array(ids) for feature, ids in contexts.items()}
        columns |= {feature: pa.ListArray.from_arrays(bounds, pa.array(values)) for feature, values in events.items()}
        _write(pa.table(columns), self._new / DATA_DIR / f"part-{number:05d}.parquet")

    def vocabulary(self, feature: str, originals: pa.Array, categories: dict[str, np.ndarray] | None = None) -> None:
        """Write the original values of a feature, in the order of the ids; of items, their ``categories`` beside."""
        columns = {ITEM_FEATURE + name: pa.array(ids) for name, ids in (categories or {}).items()}
        for name, values in {feature: originals, **columns}.items():
            self.identities[name] = identity_of([values])
        table = pa.table({"id": pa.array(np.arange(len(originals))), "original": originals, **columns})
        _write(table, self._new / VOCABULARY_DIR / f"{feature}.parquet")

    def schema(self, schema: Schema) -> Schema:
        """Write the schema, and what tells the vocabularies that were written from others; returns it."""
        complete = replace(schema, vocabularies=self.identities)
        complete.save(self._new)
        return complete


def _write(table: pa.Table, path: Path) -> None:
    """Write parquet with differences of integers packed: half the time of the defaults, to write and to read."""
    encodings = {}
    for column in table.schema:
        is_list = pa.types.is_list(column.type)
        if pa.types.is_int64(column.type.value_type if is_list else column.type):
            encodings[f"{column.name}.list.element" if is_list else column.name] = "DELTA_BINARY_PACKED"
    pq.write_table(table, path, compression="zstd", use_dictionary=False, column_encoding=encodings)


@contextmanager
def writing(directory: str | Path) -> Iterator[DatasetWriter]:
    """Yield a writer; on success its files replace the data set in ``directory``, other files there stay.

    Raises:
        ValueError: If the directory cannot be written or holds a foreign "data" or "vocabulary" entry.
    """
    with replacing(Path(directory)) as work:
        (work / "new" / DATA_DIR).mkdir()
        (work / "new" / VOCABULARY_DIR).mkdir()
        yield DatasetWriter(work)


def write_dataset(dataset: EncodedDataset, directory: str | Path, events_per_part: int = EVENTS_PER_PART) -> Schema:
    """Write ``dataset`` into ``directory``, replacing the data set that is there only when complete.

    Returns:
        The schema as it was written, with what tells the vocabularies from others.

    Raises:
        ValueError: If the directory cannot be written or holds a foreign "data" or "vocabulary" entry.
    """
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(dataset.lengths)])
    with writing(directory) as writer:
        for number, (start, stop) in enumerate(part_bounds(offsets, events_per_part)):
            events = slice(offsets[start], offsets[stop])
            writer.part(
                number,
                users=(dataset.schema.user.name, start),
                lengths=dataset.lengths[start:stop],
                contexts={name: ids[start:stop] for name, ids in dataset.contexts.items()},
                events={name: values[events] for name, values in dataset.events.items()},
            )
        for name, originals in dataset.vocabularies.items():
            writer.vocabulary(name, originals, dataset.categories if name == dataset.schema.item.name else None)
        return writer.schema(dataset.schema)


def part_bounds(offsets: np.ndarray, events_per_part: int = EVENTS_PER_PART) -> Iterator[tuple[int, int]]:
    """Users ``[start, stop)`` of each part: as many as ``events_per_part`` allows, at least one.

    Args:
        offsets: First event of each user and the number of all, int64 [U + 1].
        events_per_part: Most events of a part with more than one user.
    """
    start = 0
    while start < len(offsets) - 1:
        within = int(np.searchsorted(offsets, offsets[start] + events_per_part, side="right")) - 1
        stop = max(start + 1, within)
        yield start, stop
        start = stop
