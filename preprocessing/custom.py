"""A person's own log: read it block by block from csv, tsv, parquet, jsonl or plain text.

How a file is read is decided by the file:

- ``.parquet`` or ``.pq``: parquet.
- ``.csv`` or ``.tsv``: separated by commas or tabs, with a header.
- ``.jsonl`` or ``.ndjson``: one object with the same keys per line.
- anything else: separated by comma, tab, semicolon, bar or blank with a header, if the first line split so
  holds the user and the item column; otherwise text without a header, fields separated by blanks. If every line
  has two fields, a line is an event ``user item``; otherwise a line is a user's sequence
  ``user item1 item2 ...``. In both the order of the lines is the order of the events.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import polars as pl

from hstu.data.interactions import InteractionSpec
from hstu.data.schema import Schema
from hstu.data.spill import Progress
from hstu.data.table import ROWS_AT_ONCE, Table, encode_table
from hstu.data.writer import DatasetWriter

logger = logging.getLogger("hstu.preprocessing")

_SEPARATORS = (",", "\t", ";", "|", " ")
_SAMPLE = 1 << 20  # bytes that tell how long lines are


def encode_custom(
    interactions: Path,
    spec: InteractionSpec,
    writer: DatasetWriter,
    progress: Progress,
    users: Path | None = None,
    items: Path | None = None,
) -> Schema:
    """Encode the interactions file and write it.

    Every other column of the users file becomes a context, every other one of the items file a category.

    Returns:
        The schema, still to be written.

    Raises:
        ValueError: For bad input, naming file, column, row, value and remedy.
    """
    source: dict[str, str] = {}
    for path in (interactions, users, items):
        if path is not None:
            source[path.name if path.name not in source else f"{path.parent.name}/{path.name}"] = _checksum(path)
    table = open_table(interactions, [spec.user_column, spec.item_column])
    schema = encode_table(
        table,
        spec,
        writer,
        users=lambda: _whole(users, spec.user_column),
        items=lambda: _whole(items, spec.item_column),
        progress=progress,
    )
    return replace(schema, source=source)


def _whole(path: Path | None, key: str) -> pl.DataFrame | None:
    if path is None:
        return None
    found = open_table(path, [key])
    empty = pl.DataFrame(schema=dict.fromkeys(found.columns, pl.String))
    return pl.concat([*found.read(None)] or [empty])


def open_table(path: Path, columns: list[str]) -> Table:
    """Open a file as the module's docstring says; ``columns`` are those that its header must hold.

    Returns:
        A table, of strings unless the file is parquet.

    Raises:
        ValueError: For a file that is empty, unreadable or has lines of unequal numbers of fields.
    """
    with _readable(path):
        if path.suffix in (".parquet", ".pq"):
            frame = pl.scan_parquet(path, glob=False)
            return _table(path, frame, rows=frame.select(pl.len()).collect().item())
        if path.suffix in (".jsonl", ".ndjson"):
            keys = pl.scan_ndjson(_literal(path), infer_schema_length=None).collect_schema().names()  # of every line
            return _table(path, pl.scan_ndjson(_literal(path), schema=dict.fromkeys(keys, pl.String)))
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip("\r\n")
        separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix) or _separator(first, columns)
        if separator is None:
            _refuse_half_a_header(path, first, columns)
            return _text(path, columns)
        _refuse_repeated_columns(path, first, separator)
        return _table(path, pl.scan_csv(path, separator=separator, infer_schema=False, glob=False), separator)


def _literal(path: Path) -> str:
    """The path, without a meaning for the characters of patterns."""
    return glob.escape(str(path))


def _refuse_half_a_header(path: Path, first_line: str, columns: list[str]) -> None:
    """Raise ValueError if the first line has one of the columns but not the other."""
    fields = re.split(r"[,\t;| ]", first_line)
    present, missing = ([name for name in columns if (name in fields) == has] for has in (True, False))
    if present and missing:
        raise ValueError(f"{path}: column {missing[0]!r} is missing; the first line has: {', '.join(fields)}")


def _refuse_repeated_columns(path: Path, first_line: str, separator: str) -> None:
    names = next(csv.reader([first_line], delimiter=separator), [])
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: column {repeated[0]!r} appears twice; rename one")


def _separator(first_line: str, columns: list[str]) -> str | None:
    return next((s for s in _SEPARATORS if set(columns) <= set(first_line.split(s))), None)


def _table(path: Path, frame: pl.LazyFrame, separator: str = "", rows: int = 0) -> Table:
    names = frame.collect_schema().names()

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        ragged = bool(separator)  # possibly: a line that is too short reads as nulls at its end
        with _readable(path, separator):
            for block in _blocks(frame if columns is None else frame.select(columns)):
                if ragged and columns is None and block[:, -1].null_count():
                    _refuse_ragged(path, separator)
                    ragged = False
                yield block

    return Table(names, read, rows or _estimate_rows(path))


def _blocks(frame: pl.LazyFrame, events_per_row: int = 1) -> Iterator[pl.DataFrame]:
    rows = max(1, ROWS_AT_ONCE // events_per_row)
    for block in frame.collect_batches(chunk_size=rows, maintain_order=True, lazy=True):
        if block.height:
            yield block


def _estimate_rows(path: Path) -> int:
    with path.open("rb") as file:
        sample = file.read(_SAMPLE)
    return path.stat().st_size * sample.count(b"\n") // max(1, len(sample))


@contextmanager
def _readable(path: Path, separator: str = "") -> Iterator[None]:
    """Turn what reading a file raises into a ValueError that names it."""
    try:
        yield
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{path}: is empty; give a file with at least one event") from error
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        if separator and isinstance(error, pl.exceptions.ComputeError):
            with _readable(path):
                _refuse_ragged(path, separator)
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read ({reason}); give csv, tsv, parquet, jsonl or text in UTF-8"
        ) from error


def _refuse_ragged(path: Path, separator: str) -> None:
    """Raise ValueError about the first line whose number of fields is not that of the header."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=separator)
        width = len(next(reader))
        for fields in reader:
            if fields and len(fields) != width:
                raise ValueError(
                    f"{path}: line {reader.line_num} has {len(fields)} fields, the header has {width}; "
                    "every line needs one per column (quote values that hold the separator)"
                )


def _text(path: Path, columns: list[str]) -> Table:
    """Events of text without a header: `user item` or `user item1 item2 ...` per line."""
    if len(columns) == 1:
        raise ValueError(f"{path}: the first line is no header with the column {columns[0]!r}; add one")
    user, item = columns
    lines = pl.scan_csv(
        path, separator="\x01", quote_char=None, has_header=False, infer_schema=False, new_columns=["line"], glob=False
    )
    fields = lines.with_row_index("number", offset=1).select(
        "number", pl.col("line").fill_null("").str.extract_all(r"\S+").alias("fields")
    )
    fields = fields.filter(pl.col("fields").list.len() > 0).with_columns(
        pl.col("fields").list.first().alias(user), pl.col("fields").list.slice(1).alias(item)
    )
    number_of_lines = rows = longest = 0
    for block in _blocks(fields):
        short = block.filter(pl.col(item).list.len() == 0)
        if short.height:
            number, name = short.select("number", user).row(0)
            raise ValueError(
                f"{path}: line {number} holds {name!r} alone; a line is `user item` or `user item1 item2 ...`, "
                f"or a header with the columns {user!r} and {item!r}"
            )
        lengths = block[item].list.len().to_numpy()
        number_of_lines, rows = number_of_lines + len(lengths), rows + int(lengths.sum())
        longest = max(longest, int(lengths.max()))
    if longest == 0:
        raise ValueError(f"{path}: is empty; give a file with at least one line")
    if longest == 1:
        logger.info("%s: read as text, one event `user item` per line", path)
    else:
        _refuse_repeated_users(path, fields, user, item)
        logger.info("%s: read as text, one user `user item1 item2 ...` per line", path)
    events_per_line = -(-rows // number_of_lines)

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        with _readable(path):
            for block in _blocks(fields.select(user, item), events_per_line):
                yield block.explode(item)

    return Table([user, item], read, rows)


def _refuse_repeated_users(path: Path, fields: pl.LazyFrame, user: str, item: str) -> None:
    lines = fields.select("number", user).collect()
    repeated = lines.filter(~pl.col(user).is_first_distinct())
    if repeated.height:
        number, name = repeated.row(0)
        raise ValueError(
            f"{path}: line {number}: user {name!r} has a line already; lines of more than two fields are "
            f"one user's items each (for a table, add a header with {user!r} and {item!r})"
        )


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a file") from error
