"""Make a data set of the published raw files of one that is known."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import polars as pl

from hstu.data.interactions import InteractionSpec
from hstu.data.log_encoder import EncodingOptions, encode_log
from hstu.data.schema import Schema
from hstu.data.writer import writing
from hstu.preprocessing.layout import Layout, ahead, whole_lines
from hstu.preprocessing.progress import Progress
from hstu.preprocessing.raw_files import Archive, OpenFile, RawFiles, obtain

logger = logging.getLogger("hstu.preprocessing")

Counts = dict[str, int]
Known = Mapping[str, int | tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class UsersFile:
    """The published file of users.

    Args:
        name: Its name.
        layout: Its fields.
        columns: Makes the user column and the contexts of them.
        rows: Published number of users in it, None where it is that of the log.
    """

    name: str
    layout: Layout
    columns: tuple[pl.Expr, ...]
    rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published data set.

    Args:
        archive: What it is downloaded as.
        logs: Files of events, in the order of their events.
        layout: Fields of these files.
        columns: Makes user, item, action and time of the fields.
        users: File of users; without it there are no contexts.
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
    users: UsersFile | None = None
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
    users = known.users
    chosen: dict[str, Any] = known.filters | (filters or {})
    spec = InteractionSpec(
        name=name,
        time_column="time",
        action_column="action",
        action_type="bitmask" if known.action_bits else "categorical",
        action_name=known.action_name,
        users_file=users.name if users else "users",
        **chosen,
    )
    names = known.logs + ((users.name,) if users else ())
    optional = frozenset({users.name} if users else ())
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
            users=reader.users_table,
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


class _Reader:
    """Reads the raw files once, and remembers their checksums and the file of users."""

    def __init__(self, name: str, known: Published, raw: RawFiles, progress: Progress, check: bool) -> None:
        self._name = name
        self._known = known
        self._raw = raw
        self._progress = progress
        self._check = check
        self._digests: dict[str, Any] = {}
        self._users: tuple[bytes, str] | None = None
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
        """Whole lines of the logs; the file of users is kept aside."""
        for file in self._raw.open():
            digest = self._digests[file.name] = hashlib.sha256()
            blocks = whole_lines(file.stream, file.place, digest)
            if file.name not in self._known.logs:
                self._users = b"".join(blocks), file.place
                continue
            empty = True
            for content in blocks:
                yield file, content, file.share()
                empty = False
            if empty:
                raise ValueError(f"{file.place}: is empty; replace it by the published file")

    def users_table(self) -> pl.DataFrame | None:
        """The file of users, if there is one."""
        users = self._known.users
        if users is None:
            return None
        if self._users is None:
            logger.info("%s: there is no %s, so the data set gets no user contexts", self._name, users.name)
            return None
        content, place = self._users
        if users.layout.header:
            header, _, content = content.partition(b"\n")
            users.layout.check_header(header, place)
        if not content.strip():
            raise ValueError(f"{place}: has no rows; replace it by the published file")
        table = users.layout.parse(content, place, 1 + users.layout.header).select(users.columns)
        if self._check and users.rows not in (None, table.height):
            raise ValueError(
                f"{place}: {table.height:,} users, the published file has {users.rows:,}; replace the file, "
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
