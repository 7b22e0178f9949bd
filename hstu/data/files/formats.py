"""Which reader reads a file, and what its first line suggests when that one cannot."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hstu.registry import Registry, T

FORMATS = ("csv", "tsv", "parquet", "jsonl", "json", "sequences")
CUSTOM_READERS = Registry("reader", FORMATS)


def register_reader(name: str) -> Callable[[T], T]:
    """Return a decorator for a reader of files of your own, chosen by ``--format name`` (``FileFormat(format=name)``).

    What it is put on is called with the path of one file, as often as the file is looked at, and returns a table of
    Polars or yields blocks of one, all with the same columns.

    Args:
        name: Of letters, digits and underscores.

    Raises:
        ValueError: for a name that is taken.
    """
    return CUSTOM_READERS.add(name)


_ENDINGS = {
    ".csv": "csv",
    **dict.fromkeys((".tsv", ".tab", ".inter", ".user", ".item"), "tsv"),  # the last three: atomic files
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SEPARATORS = (",", "\t", ";", "|", "::", " ")
_WORDS = {"tab": "\t", "\\t": "\t", "space": " ", "blank": " "}
_SHOWN = 80
OF_SETS = "what is between the members of sets in one column is --set_separator"


@dataclass(frozen=True, kw_only=True)
class FileFormat:
    """How a file is to be read; what is not given follows from its ending.

    Args:
        format: One of FORMATS; None: by the ending, before that of a compression.
        separator: Between the fields of csv, tsv and sequences; several characters are possible, as "::".
        quoting: "double" (a field may stand between double quotes) or "none"; None: double for csv with a separator
            of one character, else none.
        columns: Names of the columns of csv and tsv, separated by commas, for a file without a header.
        encoding: Of text; None: UTF-8, or UTF-16 where the first bytes show it.
        prefix: Of the flags that name these fields, for messages.
    """

    format: str | None = None
    separator: str | None = None
    quoting: str | None = None
    columns: str | None = None
    encoding: str | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        for name, choices in (("format", (*FORMATS, *CUSTOM_READERS.names)), ("quoting", ("double", "none"))):
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{self.flag(name)} is {getattr(self, name)!r}, must be one of {', '.join(choices)}")
        if self.separator is not None:
            object.__setattr__(self, "separator", _WORDS.get(self.separator, self.separator))
            if not self.separator or set(self.separator) & set('"\n\r'):
                raise ValueError(f"{self.flag('separator')} is {self.separator!r}; give one or more other characters")
            if self.quoting == "double" and len(self.separator.encode()) > 1:
                raise ValueError(f"{self.flag('quoting')} double needs a separator of one byte")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(f"{self.flag('encoding')} is {self.encoding!r}, which is none; utf-8, utf-16 "
                                 "and latin-1 are some") from None  # fmt: skip

    def flag(self, name: str) -> str:
        """The flag of a field."""
        return f"--{self.prefix}{name}"

    def of(self, path: Path) -> str:
        """The format of a file.

        Raises:
            ValueError: If neither its ending nor this tells, or fields are given that the format does not know.
        """
        suffixes = [suffix for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
        name = self.format or _ENDINGS.get(suffixes[-1].lower() if suffixes else "")
        if name is None:
            return ""
        known = {"csv": 4, "tsv": 4, "sequences": 2, "jsonl": 1, "json": 1}.get(name, 0)
        for field in ("encoding", "separator", "quoting", "columns")[known:]:
            if getattr(self, field) is not None:
                hint = f"; {OF_SETS}" if field == "separator" else ""
                raise ValueError(f"{path}: is read as {name}, to which {self.flag(field)} does not apply{hint}")
        return name

    def suggest(self, first_line: str, columns: list[str], otherwise: str | None = None) -> str:
        """What the first line of a file that did not fit looks like, and the flag to use (if it tells none, this)."""
        shown = shorten(first_line)
        line = first_line.lstrip("\ufeff").strip()
        choice = otherwise or f"say what it is with {self.flag('format')} ({', '.join(FORMATS)})"
        if line.startswith("{"):
            choice = f"{self.flag('format')} jsonl reads one object a line"
        elif line.startswith("["):
            choice = f"{self.flag('format')} json reads an array of objects"
        elif separator := _separator(line, columns):
            choice = f"{self.flag('format')} csv {self.flag('separator')} {_word(separator)} fits"
            choice += f"; {OF_SETS}" if self.separator is not None else ""
        elif not otherwise and (self.format in ("csv", "tsv") or (self.format is None and self.separator)):
            choice = f"name its columns with {self.flag('columns')} if it has no header"
        return f"its first line is {shown}; {choice}"


def _separator(line: str, columns: list[str]) -> str | None:
    for separator in SEPARATORS:
        fields = line.split(separator) if len(separator) > 1 else next(csv.reader([line], delimiter=separator), [])
        if columns and set(columns) <= {untyped(field) for field in fields}:
            return separator
    return None


def _word(separator: str) -> str:
    return {"\t": "tab", " ": "space"}.get(separator, f"'{separator}'")


TYPES = ("token", "token_seq", "float", "float_seq")  # of the columns of atomic files


def untyped(name: str) -> str:
    """The name of a column without blanks around it and without a type of atomic files."""
    name = name.strip()
    plain, colon, kind = name.rpartition(":")
    return plain if colon and kind in TYPES else name


def shorten(text: str) -> str:
    """The beginning of a line, escaped and quoted."""
    return repr(text[:_SHOWN] + ("..." if len(text) > _SHOWN else ""))


def printable(value: object) -> str:
    """A value as text that cannot steer a terminal: control characters escaped."""
    text = str(value)
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
