"""Make a data set of the published raw files of one that is known."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from hstu.data.files.source import ahead
from hstu.data.interactions import InteractionSpec
from hstu.data.log_encoder import EncodingOptions, encode_log
from hstu.data.schema import Schema
from hstu.data.writer import writing
from hstu.preprocessing.layout import Layout, whole_lines
from hstu.preprocessing.progress import Progress
from hstu.preprocessing.raw_files import Archive, OpenFile, RawFiles, obtain, readable

logger = logging.getLogger("hstu.preprocessing")

Counts = dict[str, int]
Known = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class TableFile:
    """The published file of users or of items, which may be missing.

    Args:
        name: Its name.
        layout: Its fields; None: ``parse`` knows them.
        columns: Makes the column of ids and the features of them.
        features: What these are, as in ``InteractionSpec``; None: categories.
        rows: Published number of rows in it, None where it is not checked.
        parse: Makes a table of the content of a file without a layout, and of what messages call it.
    """

    name: str
    layout: Layout | None = None
    columns: tuple[pl.Expr, ...]
    features: str | None = None
    rows: int | None = None
    parse: Callable[[bytes, str], pl.DataFrame] | None = None

    def table(self, content: bytes, place: str) -> pl.DataFrame:
        """The table in the content of the file.

        Raises:
            ValueError: If there is none.
        """
        if self.parse is not None:
            return self.parse(content, place).select(self.columns)
        assert self.layout is not None
        if self.layout.header:
            header, _, content = content.partition(b"\n")
            self.layout.check_header(header, place)
        if not content.strip():
            raise ValueError(f"{place}: has no rows; replace it by the published file")
        return self.layout.parse(content, place, 1 + self.layout.header).select(self.columns)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published data set.

    Args:
        archive: What it is downloaded as.
        logs: Files of events, in the order of their events.
        layout: Fields of these files.
        columns: Makes user, item, action and time of the fields.
        users: File of users.
        items: File of items; an item that it lacks has no features.
        action_name: Name of the action feature.
        action_bits: Bits of an action that is a mask, 0 for one that is a category.
        options: How to encode it.
        filters: Minimum counts of the published data set.
        log_counts: Known users, items and events of the log; several where public figures disagree.
        counts: Known numbers after ``filters``, where they are other ones.
        lengths: Published statistics of the sequences, by name in ``Schema.counts``; others are warned of.
    """

    archive: Archive
    logs: tuple[str, ...]
    layout: Layout
    columns: tuple[pl.Expr, ...]
    users: TableFile | None = None
    items: TableFile | None = None
    action_name: str = "rating"
    action_bits: int = 0
    options: EncodingOptions = EncodingOptions()
    filters: Counts = field(default_factory=dict)
    log_counts: Known
    counts: Known = field(default_factory=dict)
    lengths: Counts = field(default_factory=dict)


def make_published(
    name: str,
    known: Published,
    *,
    directories: list[Path],
    download_to: Path,
    directory: Path,
    progress: Progress,
    filters: Counts | None = None,
    check_counts: bool = True,
) -> Schema:
    """Read the raw files of a published data set (or download them) and write the data set.

    Args:
        name: Name of the data set.
        known: What is known of it.
        directories: Where raw files may be, in order.
        download_to: Where the archive goes when there are none.
        directory: The data set directory.
        progress: Told how far it is.
        filters: Filters of ``InteractionSpec`` to use in place of the published ones.
        check_counts: Whether users, items and events must be those of the published data set.

    Raises:
        ValueError: For missing or malformed raw files, or other counts than the known ones.
    """
    present = _tables(known)
    spec = _spec(name, known, filters or {})
    optional = frozenset(table.name for table in present.values())
    names = known.logs + tuple(table.name for table in present.values())
    raw = obtain(names, optional, known.archive, directories, download_to, check=check_counts)
    spec = replace(spec, file=str(raw))
    reader = _Reader(name, known, raw, progress, check_counts)
    with writing(directory) as writer:
        progress.work = writer.work
        schema = encode_log(
            reader.blocks(),
            spec,
            replace(known.options, action_bits=known.action_bits or 1),
            writer,
            users=lambda: reader.table(known.users, "user"),
            items=lambda: reader.table(known.items, "item"),
            progress=progress,
            check_counts=lambda counts: _check(counts, known.log_counts, raw) if check_counts else None,
        )
        if check_counts and not filters:
            _check(schema.counts, known.counts, raw)
            _compare_lengths(schema.counts, known.lengths, raw)
        writer.schema(replace(schema, source=reader.source))
        progress("replacing the data set", int(schema.counts["events"]), 1.0)
    progress.finish(reader.events)
    return schema


def _tables(known: Published) -> dict[str, TableFile]:
    """Return the files of users and items that are published, by level."""
    tables = {"user": known.users, "item": known.items}
    return {level: table for level, table in tables.items() if table is not None}


def _spec(name: str, known: Published, filters: Counts) -> InteractionSpec:
    present = _tables(known)
    chosen: dict[str, Any] = known.filters | filters
    chosen |= {f"{level}s_file": table.name for level, table in present.items()}
    chosen |= {f"{level}_features": table.features for level, table in present.items()}
    return InteractionSpec(
        name=name,
        time_column="time",
        action_column="action",
        action_type="bitmask" if known.action_bits else "categorical",
        action_name=known.action_name,
        **chosen,
    )


class _Reader:
    """Reads the raw files once, and remembers their checksums and the files of users and items."""

    def __init__(self, name: str, known: Published, raw: RawFiles, progress: Progress, check: bool) -> None:
        self._name = name
        self._known = known
        self._raw = raw
        self._progress = progress
        self._check = check
        self._digests: dict[str, Any] = {}
        self._tables: dict[str, tuple[bytes, str]] = {}
        self.events = 0

    @property
    def source(self) -> dict[str, str]:
        """Name of each file and its sha256."""
        return {name: self._digests[name].hexdigest() for name in sorted(self._digests)}

    def blocks(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """The events, with the position of their file among the logs."""
        layout, line, current = self._known.layout, 1, ""
        for file, content, share in ahead(self._contents()):
            if file.name != current:
                current, line = file.name, 1
            if line == 1 and layout.header:
                header, _, content = content.partition(b"\n")
                layout.check_header(header, file.place)
                line = 2
            if content:
                block = layout.parse(content, file.place, line)
                line += block.height
                self.events += block.height
                yield self._known.logs.index(file.name), block.select(self._known.columns)
            self._progress(f"reading {file.name}", self.events, share)

    def _contents(self) -> Iterator[tuple[OpenFile, bytes, float]]:
        """Whole lines of the logs; the files of users and items are kept aside."""
        for file in self._raw.open():
            digest = self._digests[file.name] = hashlib.sha256()
            if file.name not in self._known.logs:
                with readable(file.place):
                    content = file.stream.read()
                digest.update(content)
                self._tables[file.name] = content, file.place
                continue
            blocks = whole_lines(file.stream, file.place, digest)
            empty = True
            for content in blocks:
                yield file, content, file.share()
                empty = False
            if empty:
                raise ValueError(f"{file.place}: is empty; replace it by the published file")

    def table(self, known: TableFile | None, level: str) -> pl.DataFrame | None:
        """The file of users or items, if there is one."""
        if known is None:
            return None
        if known.name not in self._tables:
            logger.info("%s: there is no %s, so the data set gets no features of %ss", self._name, known.name, level)
            return None
        content, place = self._tables.pop(known.name)
        table = known.table(content, place)
        if self._check and known.rows not in (None, table.height):
            raise ValueError(
                f"{place}: {table.height:,} lines, the published file has {known.rows:,}; replace the file, "
                "or use it as it is with --check_counts=false"
            )
        return table


def _check(counts: Mapping[str, float | int], known: Known, raw: RawFiles) -> None:
    for key, numbers in known.items():
        numbers = numbers if isinstance(numbers, tuple) else (numbers,)
        if counts[key] not in numbers:
            published = " or ".join(f"{number:,}" for number in numbers)
            raise ValueError(
                f"{raw}: {counts[key]:,} {key}, the published data set has {published}; replace the file, "
                "or use it as it is with --check_counts=false"
            )


def _compare_lengths(counts: Mapping[str, float | int], published: Counts, raw: RawFiles) -> None:
    """Warn of statistics that are more than 1% away from the published ones, which are rounded."""
    for key, number in published.items():
        if abs(counts[key] - number) > 0.01 * number:
            logger.warning("%s: %s is %s, published is %s: compare the files with the published ones",
                           raw, key, f"{counts[key]:,.0f}", f"{number:,}")  # fmt: skip
