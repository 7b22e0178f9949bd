"""Write a data set directory, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hstu.data.atomic_directory import DATA_DIR, VOCABULARY_DIR, replacing
from hstu.data.schema import ITEM_FEATURE, Schema
from hstu.data.values import Values, arrow_of, take
from hstu.data.vocabulary import identity_of

EVENTS_PER_PART = 1 << 22


@dataclass(frozen=True, kw_only=True)
class EncodedDataset:
    """A data set in memory, ready to be written: row b is user b.

    Args:
        schema: Its description.
        lengths: Number of events of each user, int64 [U].
        contexts: Feature of users -> its values, U of them.
        events: Item, action, time and feature of events -> values, T of them, user after user in time order.
        vocabularies: Table of a feature -> original values in the order of the ids, [vocab_size].
        categories: Feature of items -> its values, as many as items.
    """

    schema: Schema
    lengths: np.ndarray
    contexts: Mapping[str, Values]
    events: Mapping[str, Values]
    vocabularies: dict[str, pa.Array]
    categories: Mapping[str, Values] = field(default_factory=dict)


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
        contexts: Mapping[str, Values],
        events: Mapping[str, Values],
    ) -> None:
        """Write part ``number``.

        Args:
            number: Position among the parts.
            users: Name of the user feature and id of the part's first user.
            lengths: Number of events of each of its users, int64 [B].
            contexts: Feature of users -> its values, B of them.
            events: Item, action, time and feature of events -> values, T of them.
        """
        name, first = users
        bounds = pa.array(np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)]))
        columns = {name: pa.array(np.arange(first, first + len(lengths), dtype=np.int64))}
        columns |= {feature: arrow_of(values) for feature, values in contexts.items()}
        columns |= {feature: pa.ListArray.from_arrays(bounds, arrow_of(values)) for feature, values in events.items()}
        _write(pa.table(columns), self._new / DATA_DIR / f"part-{number:05d}.parquet")

    def vocabulary(self, name: str, originals: pa.Array, features: Mapping[str, Values] | None = None) -> None:
        """Write the original values of a table, in the order of the ids; of items, their ``features`` beside."""
        columns = {ITEM_FEATURE + feature: arrow_of(values) for feature, values in (features or {}).items()}
        for column, values in {name: originals, **columns}.items():
            self.identities[column] = identity_of([values])
        table = pa.table({"id": pa.array(np.arange(len(originals))), "original": originals, **columns})
        _write(table, self._new / VOCABULARY_DIR / f"{name}.parquet")

    def schema(self, schema: Schema) -> Schema:
        """Write the schema, and what tells the vocabularies that were written from others; returns it."""
        complete = replace(schema, vocabularies=self.identities)
        complete.save(self._new)
        return complete


def _write(table: pa.Table, path: Path) -> None:
    """Write parquet with sums of its pages, and differences of integers packed: half the time of the defaults."""
    encodings = {}
    for column in table.schema:
        name, kind = column.name, column.type
        while pa.types.is_list(kind):
            name, kind = f"{name}.list.element", kind.value_type
        if pa.types.is_int64(kind):
            encodings[name] = "DELTA_BINARY_PACKED"
    options = dict(compression="zstd", use_dictionary=False, write_page_checksum=True)
    pq.write_table(table, path, column_encoding=encodings, **options)


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
            events = np.arange(offsets[start], offsets[stop])
            writer.part(
                number,
                users=(dataset.schema.user.name, start),
                lengths=dataset.lengths[start:stop],
                contexts={name: take(values, np.arange(start, stop)) for name, values in dataset.contexts.items()},
                events={name: take(values, events) for name, values in dataset.events.items()},
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
