"""parquet: one file, or parts of one table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from hstu.data.files.blocks import ROWS_AT_ONCE, Table


@contextmanager
def _readable(part: Path) -> Iterator[None]:
    """Turn what reading a file raises into a ValueError that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{part}: cannot be read as parquet ({reason}); give a whole file, or its --format") from error


def open_parquet(parts: list[Path]) -> Table:
    """Open parquet files of one schema.

    Raises:
        ValueError: For a file that cannot be read, two columns of one name, or parts of different schemas.
    """
    names, rows = None, 0
    for part in parts:
        with _readable(part):
            frame = pl.scan_parquet(part, glob=False)
            schema = {name.strip(): dtype for name, dtype in frame.collect_schema().items()}
            if len(schema) < len(frame.collect_schema()):
                raise ValueError(f"{part}: two columns have one name without the blanks around them; rename one")
            rows += frame.select(pl.len()).collect().item()
        names = names or schema
        if schema != names:
            name = min(name for name, _ in [*schema.items(), *names.items()] if schema.get(name) != names.get(name))
            raise ValueError(
                f"{part}: column {name!r} is {schema.get(name)}, in {parts[0]} it is {names.get(name)}; "
                "give parts of one table"
            )
    assert names is not None

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        found = 0
        for part in parts:
            with _readable(part):
                frame = pl.scan_parquet(part, glob=False).rename(str.strip)
                frame = frame if columns is None else frame.select(columns)
                for block in frame.collect_batches(chunk_size=ROWS_AT_ONCE, maintain_order=True, lazy=True):
                    if block.height:
                        found += block.height
                        yield block
        if found != rows:
            raise ValueError(f"{parts[0]}: {rows:,} rows were read as {found:,}; is a part being written?")

    return Table(list(names), read, lambda done: min(1.0, done / max(1, rows)))
