"""A table that comes in blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import polars as pl

ROWS_AT_ONCE = 1 << 18
POSITION = "position in the list"  # column of what was a list: equal rows of one list are no repeats of each other


@dataclass(frozen=True)
class Table:
    """A table that can be read more than once.

    Args:
        columns: Names of its columns.
        read: Yields blocks of it, of the given columns or of all (None), in order.
        share: How much of it has been read, in [0, 1], after so many rows.
    """

    columns: list[str]
    read: Callable[[list[str] | None], Iterator[pl.DataFrame]]
    share: Callable[[int], float]


def in_memory(frame: pl.DataFrame) -> Table:
    """A table that is there already."""

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        yield from (frame if columns is None else frame.select(columns)).iter_slices(ROWS_AT_ONCE)

    return Table(frame.columns, read, lambda rows: min(1.0, rows / max(1, frame.height)))


def one_event_a_row(
    table: Table, item: str, others: list[str], file: str, may_hold_lists: Collection[str] = ()
) -> Table:
    """A table in which a list of items, and the lists of ``others`` beside it, become a row for each entry.

    Columns that are no lists are repeated. A table without a list of items stays as it is.

    Args:
        table: One row per event, or per list of events.
        item: Column of the items.
        others: Columns that may hold lists of the same lengths.
        file: What messages call it.
        may_hold_lists: Those of ``others`` of which one value may be a list.

    Raises:
        ValueError: When it is read, for lists of unequal lengths, or a list beside an item that is none.
    """

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        row = 0
        for block in table.read(columns):
            rows = block.height
            if item in block.columns:
                present = [name for name in others if name in block.columns]
                if not _holds_lists(block[item]):
                    present = [name for name in present if name not in may_hold_lists]
                block = _exploded(block, item, present, (file, row))
            row += rows
            if block.height:
                yield block

    return Table(table.columns, read, table.share)


def _exploded(block: pl.DataFrame, item: str, others: list[str], place: tuple[str, int]) -> pl.DataFrame:
    lists = [name for name in others if _holds_lists(block[name])]
    if not _holds_lists(block[item]):
        if lists:
            raise ValueError(f"{place[0]}: column {lists[0]!r} holds lists, the item column {item!r} does not; "
                             "give one value a row, or lists in both")  # fmt: skip
        return block
    block = block.with_columns(pl.col(name).cast(pl.List(block[name].dtype.inner)) for name in [item, *lists])  # type: ignore[attr-defined]
    lengths = block[item].list.len().fill_null(0)
    for name in lists:
        differ = block[name].list.len().fill_null(0) != lengths
        if differ.any():
            row = int(differ.arg_max() or 0)
            raise ValueError(f"{place[0]}: row {place[1] + row + 1}: {block[name].list.len()[row]} values in column "
                             f"{name!r}, {lengths[row]} in {item!r}; give one for each item")  # fmt: skip
    block = block.filter(lengths > 0)
    position = pl.int_ranges(pl.col(item).list.len()).alias(POSITION)
    return block.with_columns(position).explode(item, *lists, POSITION)


def _holds_lists(column: pl.Series) -> bool:
    return isinstance(column.dtype, (pl.List, pl.Array))
