"""Open a file with the reader of its format."""

from __future__ import annotations

import hashlib
from pathlib import Path

import polars as pl

from hstu.data.files.blocks import POSITION, Table
from hstu.data.files.custom import open_custom
from hstu.data.files.delimited import open_delimited
from hstu.data.files.formats import CUSTOM_READERS, FileFormat, printable
from hstu.data.files.objects import open_objects
from hstu.data.files.parquet import open_parquet
from hstu.data.files.sequences import open_sequences
from hstu.data.files.source import Source, find_parts, readable

PLAIN = FileFormat()


def open_table(path: str | Path, columns: list[str], fmt: FileFormat = PLAIN) -> Table:
    """Open a file, a directory of parts or a pattern of them.

    Args:
        path: Where it is.
        columns: Columns that it must hold; those of `sequences` get the names of the first two.
        fmt: How to read it.

    Returns:
        A table, of strings unless it is parquet or holds truth values, and of lists where it holds them.

    Raises:
        ValueError: For what is no such file; shows its first line and the flag to use.
    """
    parts = find_parts(path)
    kinds = {part: fmt.of(part) for part in parts}
    kind = kinds[parts[0]]
    for part, other in kinds.items():
        if not other:
            raise ValueError(f"{part}: its ending tells no format; {_suggestion(part, columns, fmt)}")
        if other != kind:
            raise ValueError(f"{part}: is {other}, {parts[0]} is {kind}; give parts of one format")
    if kind == "parquet":
        table = open_parquet(parts)
    elif kind in ("jsonl", "json"):
        table = open_objects(parts, fmt, kind)
    elif (custom := CUSTOM_READERS.get(kind)) is not None:
        table = open_custom(parts, kind, custom.make)
    elif kind == "sequences":
        if len(columns) < 2:
            raise ValueError(f"{path}: sequences hold users and items alone; give a table with column {columns[0]!r}")
        table = open_sequences(parts, fmt, (columns[0], columns[1]))
    else:
        table = open_delimited(parts, fmt, kind)
    for name in columns:
        if name not in table.columns:
            present = ", ".join(map(printable, table.columns))
            hint = "say which of them it is with --user_column, --item_column and so on"
            if kind in ("csv", "tsv") and not set(columns) & set(table.columns):
                header = f"{hint}, or name all with {fmt.flag('columns')} if it has no header"
                hint = _suggestion(parts[0], columns, fmt, header if len(table.columns) > 1 else None)
            raise ValueError(f"{path}: column {name!r} is missing; present: {present}; {hint}")
    return table


def read_table(path: str | Path, columns: list[str], fmt: FileFormat = PLAIN) -> pl.DataFrame:
    """Read a whole file that fits into memory; for the arguments see :func:`open_table`."""
    table = open_table(path, columns, fmt)
    blocks = [block.drop(POSITION, strict=False) for block in table.read(None)]
    return pl.concat(blocks) if blocks else pl.DataFrame(schema=dict.fromkeys(table.columns, pl.String))


def checksums(path: str | Path) -> dict[str, str]:
    """Name and sha256 of a file; of several parts, of the list of theirs."""
    parts = find_parts(path)
    found = {}
    for part in parts:
        with readable(part), part.open("rb") as file:
            found[str(part)] = hashlib.file_digest(file, "sha256").hexdigest()
    if parts == [Path(path)]:
        return found
    lines = "".join(f"{digest}  {name}\n" for name, digest in found.items())
    return {str(path): hashlib.sha256(lines.encode()).hexdigest()}


def _suggestion(path: Path, columns: list[str], fmt: FileFormat, otherwise: str | None = None) -> str:
    return fmt.suggest(Source(path, fmt.encoding).first_line(), columns, otherwise)
