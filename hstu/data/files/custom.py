"""Files that a registered reader reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl

from hstu.data.files.blocks import ROWS_AT_ONCE, Table


def open_custom(parts: list[Path], kind: str, read: Callable[[Path], Any]) -> Table:
    """Return the table that a registered reader makes of some files.

    Args:
        parts: The files.
        kind: The reader's name.
        read: The reader.

    Raises:
        ValueError: if it fails, or gives something else than tables of Polars with the same columns.
    """
    first = next(_blocks(parts[0], kind, read), None)
    columns = [] if first is None else first.columns
    share = [0.0]

    def blocks(wanted: list[str] | None) -> Iterator[pl.DataFrame]:
        for number, part in enumerate(parts, 1):
            for block in _blocks(part, kind, read):
                if block.columns != columns:
                    raise ValueError(f"{part}: --format {kind} gave columns {block.columns}, before {columns}")
                yield from (block if wanted is None else block.select(wanted)).iter_slices(ROWS_AT_ONCE)
            share[0] = number / len(parts)

    return Table(columns, blocks, lambda rows: share[0])


def _blocks(part: Path, kind: str, read: Callable[[Path], Any]) -> Iterator[pl.DataFrame]:
    try:
        found = read(part)
        for block in [found] if isinstance(found, pl.DataFrame) else found:
            if not isinstance(block, pl.DataFrame):
                raise TypeError(f"gave a {type(block).__name__}, not a polars.DataFrame")
            yield block
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{part}: --format {kind} fails with {type(error).__name__}: {reason}") from error
