"""jsonl (an object a line) and json (an array of objects); numbers become strings as they are written."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from hstu.data.files import source as bytes_of
from hstu.data.files.blocks import Table
from hstu.data.files.formats import FileFormat, shorten
from hstu.data.files.source import Source

_WAITING = re.compile(r"[\s,]*")
_NESTED = re.compile(rb":\s*[\[{]")  # where the value of a key is a list or an object (or a text looks so)
_Kind = Literal["null", "bool", "text", "list", "object"]


def open_objects(parts: list[Path], fmt: FileFormat, kind: str) -> Table:
    """Open files of objects, and look at all of them for their keys and for what is no JSON.

    Raises:
        ValueError: For an empty file, a line that is no object, repeated keys, numbers that are none, or lists and
            single values under one key; names the line (of json: the element).
    """
    sources = [Source(part, fmt.encoding) for part in parts]
    kinds: dict[str, _Kind] = {}
    for source in sources:
        empty = True
        for content, line in _lines(source, kind, fmt):
            empty = _look(content, line, kind, source.path, kinds) == 0 and empty
        if empty:
            raise ValueError(f"{source.path}: is empty; give a file with at least one event")
    types = {"list": pl.List(pl.String()), "bool": pl.Boolean()}
    schema = {name: types.get(kind, pl.String()) for name, kind in kinds.items()}
    names = {name: name.strip() for name in schema}
    if repeated := [name for name in names.values() if list(names.values()).count(name) > 1]:
        raise ValueError(f"{parts[0]}: key {repeated[0]!r} appears with and without blanks around it; rename one")

    def read(columns: list[str] | None) -> Iterator[pl.DataFrame]:
        for name in columns or ():
            if name in kinds and kinds[name] == "object":
                raise ValueError(f"{parts[0]}: key {name!r} holds objects; give a number or a string")
        wanted = {name: kind for name, kind in schema.items() if columns is None or names[name] in columns}
        for number, source in enumerate(sources):
            reading["now"] = number
            for content, _ in _lines(source, kind, fmt):
                if not (rows := _count(content)):
                    continue
                frame = pl.read_ndjson(content, schema=wanted).rename(names, strict=False)
                if frame.height != rows:
                    raise ValueError(f"{source.path}: {rows} lines were read as {frame.height}; correct the file")
                yield frame.select(columns or list(names.values()))

    reading = {"now": 0}
    return Table(
        list(names.values()), read, lambda rows: (reading["now"] + sources[reading["now"]].share) / len(sources)
    )


def _lines(source: Source, kind: str, fmt: FileFormat) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole objects, one a line, and the number of the first."""
    found = source.rows(quoted=False) if kind == "jsonl" else _elements(source, fmt)
    first = True
    for content, line in found:
        if first and kind == "jsonl" and content.lstrip()[:1] not in (b"{", b""):
            raise ValueError(f"{source.path}: is no jsonl, an object a line; {fmt.suggest(source.first_line(), [])}")
        first = first and not content.strip()
        yield content, line


def _elements(source: Source, fmt: FileFormat) -> Iterator[tuple[bytes, int]]:
    """The elements of an array, as lines."""
    decoder, decode = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")().decode
    text, place, element, inside, ready, size = "", 0, 0, False, list[str](), 0
    for chunk in source.chunks():
        if len(text) - place > bytes_of.LONGEST_ROW:
            break
        text, place = text[place:] + decode(chunk), 0
        if not inside and text.strip():
            if not text.lstrip().startswith("["):
                raise ValueError(f"{source.path}: is no json array of objects; {fmt.suggest(source.first_line(), [])}")
            inside, place = True, text.index("[") + 1
        while inside:
            start = _WAITING.match(text, place).end()  # type: ignore[union-attr]
            if text[start : start + 1] in ("", "]"):
                break
            try:
                _, stop = decoder.raw_decode(text, start)
            except (ValueError, RecursionError):
                break  # cut by the end of the chunk, or wrong: what follows tells
            ready.append(text[start:stop].replace("\n", " ").replace("\r", " "))
            place, size = stop, size + stop - start
            if size > bytes_of.CHUNK:
                yield ("\n".join(ready) + "\n").encode(), element + 1
                element, ready, size = element + len(ready), [], 0
    if ready:
        yield ("\n".join(ready) + "\n").encode(), element + 1
    rest = _WAITING.sub("", text[place:], count=1).strip()
    if inside and rest != "]":
        raise ValueError(
            f"{source.path}: after element {element + len(ready)} comes {shorten(rest)}, which is no JSON; correct it"
        )


def _count(content: bytes) -> int:
    return sum(1 for line in content.split(b"\n") if line.strip())


def _look(content: bytes, line: int, kind: str, path: Path, kinds: dict[str, _Kind]) -> int:
    """Add the keys of a block; returns its number of objects."""
    rows = _count(content)
    if not rows:
        return 0
    try:
        frame = pl.read_ndjson(content, infer_schema_length=None)
        found: dict[str, _Kind] = {name: _kind(dtype) for name, dtype in frame.schema.items()}
        # As many keys as there must be, and none is missing: then none is repeated either. And as many lists and
        # objects: Polars makes text of those that stand among single values.
        plain = frame.height == rows and not sum(frame.null_count().row(0)) and _keys(content) == rows * frame.width
        nested = sum(dtype.is_nested() for dtype in frame.dtypes)
        plain = plain and sum(1 for _ in _NESTED.finditer(content)) == rows * nested
    except pl.exceptions.PolarsError:
        found, plain = {}, False
    if not plain:
        found = _by_hand(content, line, kind, path)
    for name, one in found.items():
        known = kinds.setdefault(name, one)
        if known == "null":
            kinds[name] = one
        elif one not in (known, "null"):
            if {"list", "object"} & {one, known}:
                raise ValueError(
                    f"{path}: key {name!r} holds {_WHAT[known]} above line {line}, {_WHAT[one]} after; give one kind"
                )
            kinds[name] = "text"
    return rows


_WHAT = {"null": "null", "bool": "a truth value", "text": "single values", "list": "lists", "object": "objects"}


def _kind(dtype: pl.DataType) -> _Kind:
    if isinstance(dtype, pl.List):
        return "object" if isinstance(dtype.inner, (pl.List, pl.Struct)) else "list"
    plain: dict[Any, _Kind] = {pl.Struct: "object", pl.Boolean: "bool", pl.Null: "null"}
    return plain.get(dtype.base_type(), "text")


def _keys(content: bytes) -> int:
    """At least the number of keys: colons after a quote or a blank."""
    values = np.frombuffer(content, np.uint8)
    colons = np.flatnonzero(values[1:] == ord(":"))
    return int(np.count_nonzero((values[colons] == ord('"')) | (values[colons] <= ord(" "))))


def _by_hand(content: bytes, line: int, kind: str, path: Path) -> dict[str, _Kind]:
    """The kinds of all keys, by a slow reader that sees what is wrong."""
    found: dict[str, _Kind] = {}
    word = "line" if kind == "jsonl" else "element"
    for number, text in enumerate(content.split(b"\n"), line):
        if not text.strip():
            continue
        try:
            row = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse_constant)
        except UnicodeDecodeError:
            raise ValueError(f"{path}: {word} {number} is not UTF-8; name its encoding with --encoding") from None
        except (ValueError, RecursionError) as error:
            reason = str(error) if isinstance(error, _Refused) else "is no JSON"
            shown = shorten(text.decode("utf-8", "replace"))
            raise ValueError(f"{path}: {word} {number} {reason}: {shown}; correct it") from None
        if not isinstance(row, dict):
            shown = shorten(text.decode())
            raise ValueError(
                f"{path}: {word} {number} is no object: {shown}; give an object with the same keys in each"
            )
        for name, value in row.items():
            one, known = _kind_of(value), found.get(name, "null")
            if {known, one} & {"list", "object"} and "null" not in (known, one) and known != one:
                raise ValueError(
                    f"{path}: {word} {number}: key {name!r} holds {_WHAT[one]}, before {_WHAT[known]}; give one kind"
                )
            found[name] = one if known == "null" else known if one in ("null", known) else "text"
    return found


class _Refused(ValueError):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Refused(f"has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"holds {name}, which is no JSON (write null, or leave the row out)")


def _kind_of(value: Any) -> _Kind:
    if value is None:
        return "null"
    if isinstance(value, list):
        return "object" if any(isinstance(one, (list, dict)) for one in value) else "list"
    return "object" if isinstance(value, dict) else "bool" if isinstance(value, bool) else "text"
