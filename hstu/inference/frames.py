"""Tables of pandas or Polars in, and out again as the same kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import polars as pl
import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

    Frame: TypeAlias = pd.DataFrame | pl.DataFrame

Kind = Literal["pandas", "polars"]


def kind_of(table: Any) -> Kind | None:
    """Return whose table this is; None of anything else."""
    if isinstance(table, pl.DataFrame):
        return "polars"
    return "pandas" if type(table).__module__.split(".")[0] == "pandas" else None


def to_polars(table: Any, name: str) -> pl.DataFrame:
    """Return a table of pandas or Polars as one of Polars.

    Raises:
        ValueError: for anything else, which messages call ``name``.
    """
    kind = kind_of(table)
    if kind == "polars":
        return table
    if kind == "pandas" and type(table).__name__ == "DataFrame":
        return pl.from_pandas(table)
    raise ValueError(f"{name}: is a {type(table).__name__}; give a DataFrame of pandas or Polars")


def to_frame(parts: list[dict[str, pa.Array]], schema: dict[str, pa.DataType], kind: Kind) -> Frame:
    """Return blocks of columns as one table.

    Args:
        parts: Blocks, all of the same columns; may be none.
        schema: The columns of a table without rows.
        kind: Whose table it becomes.
    """
    tables = [pa.table(part) for part in parts]
    table = pa.concat_tables(tables) if tables else pa.schema(schema.items()).empty_table()
    if kind == "pandas":
        return table.to_pandas()
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame
