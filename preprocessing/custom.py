"""A person's own log: read it from csv, tsv, parquet or plain text.

How a file is read is decided by the file:

- ``.parquet`` or ``.pq``: parquet.
- ``.csv`` or ``.tsv``: separated by commas or tabs, with a header.
- anything else: separated by comma, tab, semicolon, bar or blank with a header, if the first line split so
  holds the user and the item column; otherwise text without a header, fields separated by blanks. If every line
  has two fields, a line is an event ``user item``; otherwise a line is a user's sequence
  ``user item1 item2 ...``. In both the order of the lines is the order of the events.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from pathlib import Path

import polars as pl

from hstu.data.interactions import InteractionSpec, encode_interactions
from hstu.data.writer import EncodedDataset

logger = logging.getLogger("hstu.preprocessing")

_SEPARATORS = (",", "\t", ";", "|", " ")


def encode_custom(interactions: Path, spec: InteractionSpec, users: Path | None = None) -> EncodedDataset:
    """Encode the interactions file as a data set; every other column of the users file becomes a context.

    Raises:
        ValueError: For bad input, naming file, column, row, value and remedy.
    """
    source = {path.name: _checksum(path) for path in (interactions, users) if path is not None}
    frame = read_table(interactions, [spec.user_column, spec.item_column])
    users_frame = None if users is None else read_table(users, [spec.user_column])
    return encode_interactions(frame, spec, users=users_frame, source=source)


def read_table(path: Path, columns: list[str]) -> pl.DataFrame:
    """Read a file as the module's docstring says; ``columns`` are those that its header must hold.

    Returns:
        A table, of strings unless the file is parquet.

    Raises:
        ValueError: For a file that is empty, unreadable or has lines of unequal numbers of fields.
    """
    try:
        if path.suffix in (".parquet", ".pq"):
            return pl.read_parquet(path)
        with path.open(encoding="utf-8-sig") as file:
            first = file.readline().strip("\r\n")
        separator = {".csv": ",", ".tsv": "\t"}.get(path.suffix) or _separator(first, columns)
        return _read_separated(path, separator) if separator else _read_text(path, columns)
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{path}: is empty; give a file with at least one event") from error
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read ({reason}); give csv, tsv, parquet or text in UTF-8") from error


def _separator(first_line: str, columns: list[str]) -> str | None:
    return next((s for s in _SEPARATORS if set(columns) <= set(first_line.split(s))), None)


def _read_separated(path: Path, separator: str) -> pl.DataFrame:
    try:
        frame = pl.read_csv(path, separator=separator, infer_schema=False)
    except pl.exceptions.ComputeError:
        _refuse_ragged(path, separator)
        raise
    # A line that is too short reads as nulls at its end.
    if frame.width and frame[:, -1].null_count():
        _refuse_ragged(path, separator)
    return frame


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


def _read_text(path: Path, columns: list[str]) -> pl.DataFrame:
    """Events of text without a header: `user item` or `user item1 item2 ...` per line."""
    if len(columns) == 1:
        raise ValueError(f"{path}: the first line is no header with the column {columns[0]!r}; add one")
    lines = pl.read_csv(
        path, separator="\x01", quote_char=None, has_header=False, infer_schema=False, new_columns=["line"]
    )
    table = lines.with_row_index("number", offset=1).select(
        "number", pl.col("line").fill_null("").str.extract_all(r"\S+").alias("fields")
    )
    table = table.filter(pl.col("fields").list.len() > 0).with_columns(
        pl.col("fields").list.first().alias("user"), pl.col("fields").list.slice(1).alias("items")
    )
    if table.is_empty():
        raise ValueError(f"{path}: is empty; give a file with at least one line")
    short = table.filter(pl.col("items").list.len() == 0)
    if short.height:
        number, user = short.select("number", "user").row(0)
        raise ValueError(
            f"{path}: line {number} holds {user!r} alone; a line is `user item` or `user item1 item2 ...`, "
            f"or a header with the columns {columns[0]!r} and {columns[1]!r}"
        )
    longest = table["items"].list.len().to_numpy().max()
    if longest == 1:
        logger.info("%s: read as text, one event `user item` per line", path)
    else:
        repeated = table.filter(~pl.col("user").is_first_distinct())
        if repeated.height:
            number, user = repeated.select("number", "user").row(0)
            raise ValueError(
                f"{path}: line {number}: user {user!r} has a line already; lines of more than two fields are "
                f"one user's items each (for a table, add a header with {columns[0]!r} and {columns[1]!r})"
            )
        logger.info("%s: read as text, one user `user item1 item2 ...` per line", path)
    events = table.select("user", "items").explode("items")
    return events.rename({"user": columns[0], "items": columns[1]})


def _checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a file") from error
