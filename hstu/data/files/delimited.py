"""csv and tsv: fields between separators, with a header or names for the columns; every value stays a string."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import polars as pl

from hstu.data.files.blocks import Table
from hstu.data.files.formats import OF_SETS, TYPES, FileFormat, shorten
from hstu.data.files.source import Source

_STAND_IN = "\x1f"  # for a separator of several characters; the unit separator of ASCII
_QUOTE, _LINE_FEED, _RETURN = 34, 10, 13
# The columns of one published layout, `user_id, sequence_item_ids, sequence_ratings, sequence_timestamps`.
_COMMA_LISTS = ("sequence_item_ids", "sequence_ratings", "sequence_timestamps")


@dataclass(frozen=True)
class _Layout:
    """Names of the columns, what separates fields, whether a first row is a header, and columns that are lists."""

    names: list[str]
    separator: str
    quoted: bool
    has_header: bool
    lists: dict[str, str]  # column -> separator of its entries

    def reader(self, text: str) -> Any:
        """Rows as Python's own reader sees them."""
        lines = io.StringIO(text, newline="\n")
        if self.quoted:
            return csv.reader(lines, delimiter=self.separator)
        return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE)


def open_delimited(parts: list[Path], fmt: FileFormat, kind: str) -> Table:
    """Open files of one header.

    Raises:
        ValueError: For an empty file, columns of one name, or parts of different headers.
    """
    sources = [Source(part, fmt.encoding) for part in parts]
    given = fmt.separator or {"csv": ",", "tsv": "\t"}[kind]
    separator = given if len(given.encode()) == 1 else _STAND_IN
    quoted = fmt.quoting == "double" or (fmt.quoting is None and kind == "csv" and separator == given)
    layouts = []
    for source in sources:
        header = next(_rows(source, given, separator, quoted), None)
        if header is None:
            raise ValueError(f"{source.path}: is empty; give a file with at least one event")
        layouts.append(_layout(source.path, header[0], fmt, separator, quoted))
        if layouts[-1].names != layouts[0].names:
            raise ValueError(
                f"{source.path}: has the columns {layouts[-1].names}, {parts[0]} has {layouts[0].names}; "
                "give parts of one table"
            )
    layout = layouts[0]

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        for number, source in enumerate(sources):
            reading["now"] = number
            for content, line, first in _rows(source, given, separator, quoted):
                if first and layout.has_header:
                    end = _row_ends(content, quoted)[0] + 1
                    line, content = line + content.count(b"\n", 0, end), content[end:]
                if content:
                    frame = _parse(content, layout, columns, source.path, line)
                    if frame.height:
                        yield frame

    reading = {"now": 0}
    return Table(layout.names, read, lambda rows: (reading["now"] + sources[reading["now"]].share) / len(sources))


def _rows(source: Source, given: str, separator: str, quoted: bool) -> Iterator[tuple[bytes, int, bool]]:
    """Blocks of rows, the number of the first line of each, and whether it is the first that holds something."""
    first = True
    for content, line in source.rows(quoted):
        if first:
            blank = len(content) - len(content.lstrip(b"\r\n"))
            line, content = line + content.count(b"\n", 0, blank), content[blank:]
            if not content:
                continue
        if separator != given:
            if separator.encode() in content:
                raise ValueError(f"{source.path}: holds the character {separator!r}, which no log has; remove it")
            content = content.replace(given.encode(), separator.encode())
        yield content, line, first
        first = False


def _layout(path: Path, content: bytes, fmt: FileFormat, separator: str, quoted: bool) -> _Layout:
    end = _row_ends(content, quoted)[0]
    if _holds_bare_returns(content[: end + 1], quoted):
        raise ValueError(f"{path}: line 1 holds a carriage return alone; end lines with line feeds")
    text = content[:end].decode("utf-8", "replace").rstrip("\r")
    layout = _Layout([], separator, quoted, fmt.columns is None, {})
    try:
        first = [name.strip() for name in next(layout.reader(text), [""])]
    except csv.Error as error:
        raise ValueError(f"{path}: line 1 is no header ({error}): {shorten(text)}; name its format") from None
    names = first if fmt.columns is None else [name.strip() for name in fmt.columns.split(",")]
    if fmt.columns is not None and names == first:
        raise ValueError(f"{path}: has a header of its own; leave {fmt.flag('columns')} out")
    lists = {name: "," for name in _COMMA_LISTS if name in names}
    typed = [name.rpartition(":") for name in names]
    if all(colon and kind in TYPES for _, colon, kind in typed):
        names = [name.strip() for name, *_ in typed]
        lists = {name: " " for name, (*_, kind) in zip(names, typed, strict=True) if kind.endswith("_seq")}
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{path}: column {repeated[0]!r} appears twice; rename one")
    return _Layout(names, separator, quoted, fmt.columns is None, lists)


def _parse(content: bytes, layout: _Layout, columns: list[str] | None, path: Path, line: int) -> pl.DataFrame:
    """Read whole rows, and check that each has all its fields."""
    wanted = layout.names if columns is None else columns
    # The last field is read in any case: a row that is too short has a null there.
    read = sorted({*(layout.names.index(name) for name in wanted), len(layout.names) - 1})
    quotes = np.flatnonzero(np.frombuffer(content, np.uint8) == _QUOTE) if layout.quoted else np.empty(0, np.int64)
    _check_quotes(content, quotes, layout, path, line)
    full, rows = _without_blank_rows(content, _row_ends(content, layout.quoted, quotes))
    if not rows:
        return pl.DataFrame(schema=dict.fromkeys(wanted, pl.String))
    try:
        frame = pl.read_csv(
            full,
            has_header=False,
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
            schema=dict.fromkeys(layout.names, pl.String),
            columns=read,
        )
    except pl.exceptions.PolarsError as error:
        _explain(content, layout, path, line, str(error).strip().splitlines()[0])
    if frame.height != rows:
        _explain(content, layout, path, line, f"{rows} rows were read as {frame.height}")
    complete = not frame[:, -1].null_count() or _separators(full, layout) == rows * (len(layout.names) - 1)
    if not complete or _holds_bare_returns(content, layout.quoted):
        _explain(content, layout, path, line, "rows of different numbers of fields")
    lists = [pl.col(name).str.split(by) for name, by in layout.lists.items() if name in wanted]
    return frame.select(wanted).with_columns(lists)


def _row_ends(content: bytes, quoted: bool, quotes: np.ndarray | None = None) -> np.ndarray:
    """Positions of the line feeds that end rows."""
    values = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(values == _LINE_FEED)
    if quoted and b'"' in content:
        quotes = np.flatnonzero(values == _QUOTE) if quotes is None else quotes
        ends = ends[np.searchsorted(quotes, ends) % 2 == 0]
    return ends


def _without_blank_rows(content: bytes, ends: np.ndarray) -> tuple[bytes, int]:
    """The rows that hold something, and their number."""
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    short = np.flatnonzero(ends - starts <= 1)
    values = np.frombuffer(content, np.uint8)
    short = short[(ends[short] == starts[short]) | (values[starts[short]] == _RETURN)]
    if not len(short):
        return content, len(ends)
    keep = np.ones(len(values), bool)
    keep[starts[short]] = keep[ends[short]] = False
    return values[keep].tobytes(), len(ends) - len(short)


def _separators(content: bytes, layout: _Layout) -> int:
    """Number of separators that are not quoted."""
    separator = layout.separator.encode()
    if not layout.quoted or b'"' not in content:
        return content.count(separator)
    values = np.frombuffer(content, np.uint8)
    # Inside quotes is where an odd number of them stands before.
    inside = np.bitwise_xor.accumulate((values == _QUOTE).view(np.uint8)).view(bool)
    return int(np.count_nonzero((values == separator[0]) & ~inside))


def _holds_bare_returns(content: bytes, quoted: bool) -> bool:
    """Whether a carriage return that is not quoted ends no line."""
    if b"\r" not in content or content.count(b"\r") == content.count(b"\r\n"):
        return False
    values = np.frombuffer(content, np.uint8)
    bare = np.flatnonzero((values[:-1] == _RETURN) & (values[1:] != _LINE_FEED))
    if quoted and b'"' in content:
        bare = bare[np.searchsorted(np.flatnonzero(values == _QUOTE), bare) % 2 == 0]
    return len(bare) > 0


def _check_quotes(content: bytes, quotes: np.ndarray, layout: _Layout, path: Path, line: int) -> None:
    """Raise ValueError unless quotes enclose whole fields: what they mean elsewhere, nobody can tell."""
    values = np.frombuffer(content, np.uint8)
    opening, closing = quotes[0::2], quotes[1::2]
    edge = np.zeros(256, bool)
    edge[[ord(layout.separator[0]), _LINE_FEED, _QUOTE]] = True
    wrong = opening[(opening > 0) & ~edge[values[opening - 1]]]
    edge[_RETURN] = True
    wrong = np.concatenate([wrong, closing[~edge[values[closing + 1]]]])
    if len(wrong):
        place = int(wrong.min())
        shown = content[content.rfind(b"\n", 0, place) + 1 :].split(b"\n", 1)[0].decode("utf-8", "replace")
        line += content.count(b"\n", 0, place)
        raise ValueError(
            f"{path}: line {line}: a double quote within a field: {shorten(shown)}; quote whole fields and double the "
            "quotes in them, or read quotes as characters with --quoting none"
        )


def _explain(content: bytes, layout: _Layout, path: Path, line: int, reason: str) -> NoReturn:
    """Raise ValueError about the first wrong row."""
    for number, row in enumerate(content.split(b"\n"), line):
        try:
            row.decode()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: line {number}: {row[:80]!r} is not UTF-8; name its encoding with --encoding, "
                             "latin-1 for example") from None  # fmt: skip
    text, width = content.decode(), len(layout.names)
    reader = layout.reader(text)
    with suppress(csv.Error):  # which a carriage return alone raises, and a field of more than 128 KiB
        for fields in reader:
            if fields and len(fields) != width:
                header = "the header has" if layout.has_header else "there are names for"
                quote = " (quote values that hold the separator)" if layout.quoted else ""
                quote += f" ({OF_SETS})" if len(fields) == 1 else ""
                raise ValueError(
                    f"{path}: line {line + reader.line_num - 1} has {len(fields)} fields, {header} {width}; every line "
                    f"needs one per column{quote}: {shorten(layout.separator.join(fields))}"
                )
    if _holds_bare_returns(content, layout.quoted):
        line += max(0, reader.line_num - 1)
        raise ValueError(f"{path}: line {line} holds a carriage return alone; end lines with line feeds")
    raise ValueError(f"{path}: from line {line} on: {reason}; correct the file")
