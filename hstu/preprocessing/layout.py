"""Read files of separated fields in a published layout, block by block; every error names the line."""

from __future__ import annotations

import csv
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, Protocol

import numpy as np
import polars as pl

from hstu.preprocessing.raw_files import readable

_CHUNK = 1 << 24  # bytes; blocks of less than 32 MiB are given back to the allocator, not to the system
_LONGEST_LINE = 1 << 20  # bytes
_REMEDY = "replace the file by the published one"


@dataclass(frozen=True)
class Field:
    """One field of a line.

    Args:
        name: Its name.
        kind: Type to read it as; None leaves it out.
        bounds: Least and largest value, None for any.
        meaning: What the bounds stand for, for messages.
        optional: Whether it may be empty.
    """

    name: str
    kind: type[pl.DataType] | None = None
    bounds: tuple[float, float] | None = None
    meaning: str = "number"
    optional: bool = False


SECONDS = (631_152_000, 4_102_444_800)  # 1990 to 2100


def seconds(name: str) -> Field:
    """A time in seconds."""
    return Field(name, pl.Int64, SECONDS, "time in seconds between 1990 and 2100")


def milliseconds(name: str) -> Field:
    """A time in milliseconds."""
    return Field(name, pl.Int64, (1000 * SECONDS[0], 1000 * SECONDS[1]), "time in milliseconds between 1990 and 2100")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Lines of separated fields.

    Args:
        fields: All fields of a line, in order.
        separator: Between the fields; a repeated character.
        header: Whether the first line names the fields.
        quoted: Whether a field may be quoted; otherwise a quote is refused.
    """

    fields: tuple[Field, ...]
    separator: str = ","
    header: bool = False
    quoted: bool = False

    def check_header(self, line: bytes, place: str) -> None:
        """Raise ValueError unless ``line`` names the fields."""
        expected = self.separator.join(field.name for field in self.fields)
        if line.decode("utf-8", "replace").removesuffix("\r") != expected:
            raise ValueError(f"{place}: the first line is {line[:80]!r}, expected {expected!r}; {_REMEDY}")

    def parse(self, content: bytes, place: str, first_line: int = 1) -> pl.DataFrame:
        """Read whole lines.

        Args:
            content: The lines.
            place: What messages call the file.
            first_line: Number of the first one, for messages.

        Returns:
            One column for each field that has a kind, within its bounds, and without nulls unless optional.

        Raises:
            ValueError: Naming the first line that is not in this layout.
        """
        wanted = [field for field in self.fields if field.kind]
        if content.startswith(BOM_UTF8):  # which Polars would pass over
            raise ValueError(f"{place}: line {first_line} begins with a byte order mark; {_REMEDY}")
        # Polars knows separators of one character: '::' is ':' with an empty field in between.
        step = len(self.separator)
        kinds: dict[str, type[pl.DataType]] = {}
        for position, field in enumerate(self.fields):
            kinds |= {f"gap {position}.{gap}": pl.String for gap in range(step - 1) if position}
            kinds[field.name] = field.kind or pl.String
        # The last field is read in any case: a line that is too short has a null there.
        read = sorted({*(self.fields.index(field) for field in wanted), len(self.fields) - 1})
        try:
            frame = pl.read_csv(
                content,
                has_header=False,
                separator=self.separator[0],
                quote_char='"' if self.quoted else None,
                schema=kinds,
                columns=[position * step for position in read],
            )
        except pl.exceptions.PolarsError as error:
            self._explain(content, place, first_line, str(error))
        if not self._all_fields(content, frame.height):
            self._explain(content, place, first_line, "lines of different numbers of fields")
        if content.count(b"\r") != content.count(b"\r\n"):
            self._explain(content, place, first_line, "carriage returns within lines")
        required = [self.fields[position].name for position in read if not self.fields[position].optional]
        if sum(frame.select(required).null_count().row(0)) or (b'"' in content and not self.quoted):
            self._explain(content, place, first_line, "empty or quoted fields")
        for field in wanted:
            if field.bounds and not frame[field.name].is_between(*field.bounds).all():
                self._explain(content, place, first_line, f"{field.name} is no {field.meaning}")
        return frame.select(field.name for field in wanted)

    def _all_fields(self, content: bytes, lines: int) -> bool:
        """Whether no line has too many fields; one that has too few has a null at its end."""
        if self.quoted:
            rows = csv.reader(content.decode(errors="replace").splitlines(), delimiter=self.separator)
            return all(len(row) == len(self.fields) for row in rows)
        wanted = lines * (len(self.fields) - 1)
        separators = np.count_nonzero(np.frombuffer(content, np.uint8) == ord(self.separator[0]))
        # Of '::', nothing may stand between the two.
        return separators == wanted * len(self.separator) and (
            len(self.separator) == 1 or content.count(self.separator.encode()) == wanted
        )

    def _explain(self, content: bytes, place: str, first_line: int, reason: str) -> NoReturn:
        """Raise ValueError about the first wrong line."""
        for number, line in enumerate(content.split(b"\n"), first_line):
            if line or number == first_line:
                self._refuse(line.removesuffix(b"\r"), f"{place}: line {number}")
            elif number - first_line < content.count(b"\n"):
                raise ValueError(f"{place}: line {number} is empty; {_REMEDY}")
        raise ValueError(f"{place}: from line {first_line} on: {' '.join(reason.split())[:200]}; {_REMEDY}")

    def _refuse(self, line: bytes, place: str) -> None:
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: {line[:80]!r} is not UTF-8; {_REMEDY}") from error
        values = next(csv.reader([text], delimiter=self.separator)) if self.quoted else text.split(self.separator)
        if len(values) != len(self.fields):
            raise ValueError(f"{place} has {len(values)} fields, not {len(self.fields)}: {text[:80]!r}; {_REMEDY}")
        if "\r" in text:
            raise ValueError(f"{place} holds a carriage return: {text[:80]!r}; {_REMEDY}")
        if '"' in text and not self.quoted:
            raise ValueError(f"{place} holds a quote, which the layout does not know: {text[:80]!r}; {_REMEDY}")
        if values[-1] == "" and not self.fields[-1].optional:
            raise ValueError(f"{place}, field {self.fields[-1].name!r} is empty: {text[:80]!r}; {_REMEDY}")
        for field, value in zip(self.fields, values, strict=True):
            if field.kind and not (value == "" and field.optional) and not _is_valid(value, field):
                what = field.meaning if field.bounds else "text" if field.kind == pl.String else "number"
                raise ValueError(f"{place}, field {field.name!r}: {value[:40]!r} is no {what}; {_REMEDY}")


def _is_valid(value: str, field: Field) -> bool:
    if field.kind == pl.String:
        return value != ""
    pattern = r" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?" if field.kind == pl.Float64 else r" *[+-]?\d+"
    if not re.fullmatch(pattern, value):
        return False
    low, high = field.bounds or (-(2**63), 2**63 - 1)
    return low <= (float(value) if field.kind == pl.Float64 else int(value)) <= high


class Digest(Protocol):
    """A checksum that is fed piece by piece."""

    def update(self, data: bytes, /) -> Any:
        """Feed bytes."""


def whole_lines(stream: BinaryIO, place: str, digest: Digest) -> Iterator[bytes]:
    """Cut a stream into blocks of whole lines, feeding every byte to ``digest`` on the way.

    Raises:
        ValueError: If it cannot be read or holds a line of more than a MiB.
    """
    while True:
        with readable(place):
            chunk = stream.read(_CHUNK)
            rest = stream.readline(_LONGEST_LINE) if chunk else b""
        if not chunk:
            return
        if len(rest) == _LONGEST_LINE and not rest.endswith(b"\n"):
            raise ValueError(f"{place}: holds a line of more than {_LONGEST_LINE:,} bytes; {_REMEDY}")
        chunk += rest
        digest.update(chunk)
        yield chunk if chunk.endswith(b"\n") else chunk + b"\n"
