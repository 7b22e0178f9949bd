"""Make a data set of a table of interactions that comes in blocks: look at it once, then clean and stream it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from hstu.data.cleaning import (
    MAX_BITS,
    Look,
    as_text,
    clean_ids,
    clean_masks,
    clean_times,
    clean_values,
    look_at_times,
    require_names,
    ticks_per_second,
)
from hstu.data.interactions import InteractionSpec
from hstu.data.schema import Schema
from hstu.data.spill import ROW_HASH, Progress
from hstu.data.stream import StreamOptions, encode_stream
from hstu.data.writer import DatasetWriter, writing

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class Table:
    """A table that can be read more than once.

    Args:
        columns: Names of its columns.
        read: Yields blocks of it, of the given columns or of all (None), in order.
        rows: About how many it has.
    """

    columns: list[str]
    read: Callable[[list[str] | None], Iterator[pl.DataFrame]]
    rows: int


def preprocess_interactions(
    interactions: pl.DataFrame | pd.DataFrame,
    *,
    data_dir: str | Path = "tmp_data",
    users: pl.DataFrame | pd.DataFrame | None = None,
    items: pl.DataFrame | pd.DataFrame | None = None,
    **options: object,
) -> Schema:
    """Make the data set ``data_dir/name`` of a polars or pandas table with one row per event.

    Args:
        interactions: The events.
        data_dir: Where data sets are.
        users: One row per user; every column but the user column becomes a context feature.
        items: One row per item; every column but the item column becomes a category feature.
        **options: Fields of :class:`InteractionSpec`; ``name`` is required.

    Returns:
        The schema of the data set.

    Raises:
        ValueError: For bad input, naming column, row, value and remedy.
    """
    spec = InteractionSpec(**options)  # type: ignore[arg-type]
    frame = _to_polars(interactions)
    user_table, item_table = (None if table is None else _to_polars(table) for table in (users, items))
    with writing(Path(data_dir) / spec.name) as writer:
        schema = encode_table(in_memory(frame), spec, writer, users=lambda: user_table, items=lambda: item_table)
        return writer.schema(schema)


def in_memory(frame: pl.DataFrame) -> Table:
    """A table that is there already."""

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        yield from (frame if columns is None else frame.select(columns)).iter_slices(ROWS_AT_ONCE)

    return Table(frame.columns, read, frame.height)


def encode_table(
    table: Table,
    spec: InteractionSpec,
    writer: DatasetWriter,
    *,
    users: Callable[[], pl.DataFrame | None],
    items: Callable[[], pl.DataFrame | None] = lambda: None,
    progress: Progress = lambda what, events, share: None,
) -> Schema:
    """Encode a table with one row per event and write it; the schema is returned and still to be written.

    See :func:`hstu.data.stream.encode_stream` for ids and order, and for ``writer``, ``users``, ``items``
    and ``progress``.

    Raises:
        ValueError: For bad input, naming column, row, value and remedy.
    """
    cleaner = _Cleaner(table, spec, progress)
    options = StreamOptions(ticks_per_second=cleaner.ticks_per_second, action_bits=cleaner.action_bits)
    return encode_stream(
        cleaner.blocks(),
        spec,
        options,
        writer,
        users=users,
        items=items,
        progress=progress,
        on_repeats=cleaner.on_repeats,
    )


def _to_polars(frame: pl.DataFrame | pd.DataFrame) -> pl.DataFrame:
    return frame if isinstance(frame, pl.DataFrame) else pl.from_pandas(frame)


class _Cleaner:
    """Looks at a table, then gives it block by block as :func:`encode_stream` asks for it."""

    def __init__(self, table: Table, spec: InteractionSpec, progress: Progress) -> None:
        self._table, self._spec, self._progress = table, spec, progress
        self._looks = {role: Look() for role, column in spec.columns.items() if column}
        self._rows = 0
        self.ticks_per_second = 1
        names = [column for column in spec.columns.values() if column]
        require_names(table.columns, names, spec.file)
        for block in table.read(names):
            for role, look in self._looks.items():
                column = block[spec.columns[role]]  # type: ignore[index]
                if role == "time":
                    self.ticks_per_second = ticks_per_second(as_text(column).dtype, look_at_times(column, look))
                else:
                    look.add(column)
            self._rows += block.height
            progress(f"looking at {spec.file}", self._rows, min(1.0, self._rows / max(1, table.rows)))

    @property
    def action_bits(self) -> int:
        """Bits of the largest action."""
        largest = self._looks["action"].largest if "action" in self._looks else 0
        return min(MAX_BITS, max(1, int(largest).bit_length()))

    def blocks(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """The events, checked."""
        row = 0
        for block in self._table.read(None):
            yield 0, self._clean(block, row)
            row += block.height
            self._progress(f"reading {self._spec.file}", row, row / self._rows)

    def _clean(self, block: pl.DataFrame, row: int) -> pl.DataFrame:
        spec, looks = self._spec, self._looks
        columns = [
            clean_ids(block[spec.user_column], spec.file, looks["user"], row).alias("user"),
            clean_ids(block[spec.item_column], spec.file, looks["item"], row).alias("item"),
        ]
        if spec.time_column:
            times, _ = clean_times(block[spec.time_column], spec.file, looks["time"], row)
            columns.append(times.alias("time"))
        if spec.action_column:
            clean = clean_masks if spec.action_type == "bitmask" else clean_values
            columns.append(clean(block[spec.action_column], spec.file, looks["action"], row).alias("action"))
        if spec.duplicates != "keep":
            columns.append(block.hash_rows().alias(ROW_HASH))
        return pl.DataFrame(columns)

    def on_repeats(self, hashes: np.ndarray) -> None:
        """Raise ValueError about the first row that repeats another, or tell how many are dropped."""
        if self._spec.duplicates == "drop":
            logger.info("%s: dropped %d duplicate rows", self._spec.file, len(hashes))
            return
        known = np.unique(hashes)
        seen, row = np.zeros(len(known), bool), 0
        for block in self._table.read(None):
            found = block.hash_rows().to_numpy().view(np.int64)
            rows = np.flatnonzero(np.isin(found, known))
            number = np.searchsorted(known, found[rows])
            repeated = seen[number] | ~pl.Series(number).is_first_distinct().to_numpy()
            if repeated.any():
                place = int(rows[repeated.argmax()])
                values = ", ".join(map(str, block.row(place)))
                raise ValueError(
                    f"{self._spec.file}: {len(hashes)} rows repeat an earlier one in every column, the first is row "
                    f"{row + place + 1} ({values}); choose --duplicates drop or --duplicates keep"
                )
            seen[number] = True
            row += block.height
        raise AssertionError("repeated rows were there a moment ago")
