"""Text without a header, a user and then the user's items in the order of time on each line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import polars as pl

from hstu.data.files.blocks import POSITION, ROWS_AT_ONCE, Table
from hstu.data.files.formats import FileFormat
from hstu.data.files.source import Source


def open_sequences(parts: list[Path], fmt: FileFormat, names: tuple[str, str]) -> Table:
    """Open files of lines `user item1 item2 ...`, separated by blanks unless the format names a separator.

    If every line has one item, a line is an event and users may come back; otherwise each has one line.

    Args:
        parts: The files.
        fmt: How to read them.
        names: Columns of users and items of the table.

    Raises:
        ValueError: For an empty file, a line with a user alone, a header, or a user's second line.
    """
    sources = [Source(part, fmt.encoding) for part in parts]
    user, item = names
    longest, number_of_lines, events = 0, 0, 0
    for source in sources:
        for lines, line in _blocks(source, fmt):
            fields = lines["fields"]
            if number_of_lines == 0 and len(lines) and fields[0][0] == user:
                raise ValueError(f"{source.path}: line {line} is a header, which sequences lack: read it as a table, "
                                 f"{fmt.suggest(source.first_line(), list(names))}")  # fmt: skip
            lengths = fields.list.len().to_numpy()
            short = lines.filter(lengths < 2)
            if short.height:
                raise ValueError(f"{source.path}: line {short['number'][0]} holds {short['fields'][0][0]!r} alone; a "
                                 "line is `user item` or `user item1 item2 ...`")  # fmt: skip
            number_of_lines, events = number_of_lines + len(lines), events + int(lengths.sum()) - len(lines)
            longest = max(longest, int(lengths.max(initial=1)) - 1)
        if not number_of_lines:
            raise ValueError(f"{source.path}: is empty; give a file with at least one line")
    if longest > 1:
        _refuse_repeated_users(sources, fmt)

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        at_once = max(1, ROWS_AT_ONCE // -(-events // number_of_lines))
        found = 0
        for number, source in enumerate(sources):
            reading["now"] = number
            for lines, _ in _blocks(source, fmt):
                table = lines.select(
                    pl.col("fields").list.first().alias(user), pl.col("fields").list.slice(1).alias(item)
                )
                table = table.with_columns(pl.int_ranges(pl.col(item).list.len()).alias(POSITION))
                for block in table.iter_slices(at_once):
                    block = block.explode(item, POSITION)
                    found += block.height
                    yield block if columns is None else block.select(columns)
        if found != events:
            raise ValueError(f"{parts[0]}: {events:,} events were read as {found:,}; is the file being written?")

    reading = {"now": 0}
    return Table([user, item], read, lambda rows: (reading["now"] + sources[reading["now"]].share) / len(sources))


def _blocks(source: Source, fmt: FileFormat) -> Iterator[tuple[pl.DataFrame, int]]:
    """Tables of lines that hold something: their numbers and their fields, a list."""
    for content, line in source.rows(quoted=False):
        try:
            text = pl.Series("text", content.decode().split("\n")[:-1])
        except UnicodeDecodeError as error:
            line += content.count(b"\n", 0, error.start)
            raise ValueError(f"{source.path}: line {line} is not UTF-8; name its encoding with --encoding") from None
        lines = pl.DataFrame({"number": pl.int_range(line, line + len(text), eager=True), "text": text})
        lines = lines.filter(pl.col("text").str.strip_chars() != "")
        separated = pl.col("text").str.strip_chars("\r").str.split(fmt.separator or "")
        fields = separated if fmt.separator else pl.col("text").str.extract_all(r"\S+")
        yield lines.select("number", fields.alias("fields")), line


def _refuse_repeated_users(sources: list[Source], fmt: FileFormat) -> None:
    seen: set[str] = set()
    for source in sources:
        for lines, _ in _blocks(source, fmt):
            for number, name in zip(lines["number"], lines["fields"].list.first(), strict=True):
                if name in seen:
                    raise ValueError(
                        f"{source.path}: line {number}: user {name!r} has a line already; lines of more than two "
                        "fields are one user's items each (a table is --format csv with --separator and --columns)"
                    )
                seen.add(name)
