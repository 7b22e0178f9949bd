"""Make a data set of a table of interactions that comes in blocks: look at it once, then clean and encode it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import polars as pl

from hstu.data.cleaning import (
    MAX_BITS,
    Look,
    as_text,
    clean_ids,
    clean_masks,
    clean_times,
    clean_values,
    find_missing,
    look_at_times,
    mask_of,
    require_names,
    ticks_per_second,
)
from hstu.data.feature_cleaning import FeatureLook, clean_feature
from hstu.data.files import (
    FileFormat,
    Table,
    checksums,
    in_memory,
    one_event_a_row,
    open_table,
    printable,
    read_table,
)
from hstu.data.interactions import InteractionSpec
from hstu.data.log_encoder import EncodingOptions, encode_log
from hstu.data.schema import Level, Schema
from hstu.data.spill import FEATURE, ROW_HASH, Progress
from hstu.data.writer import DatasetWriter, writing

if TYPE_CHECKING:
    import pandas as pd

    Frame: TypeAlias = pl.DataFrame | pd.DataFrame | str | Path

logger = logging.getLogger(__name__)

MAX_CLASSES = 256  # more values of an action are no classes
FEW_CLASSES = 20  # classes enough for a short log; beyond, more than half as many as rows are measurements
_PLAIN = FileFormat()


def preprocess_interactions(
    interactions: Frame,
    *,
    data_dir: str | Path = "tmp_data",
    users: Frame | None = None,
    items: Frame | None = None,
    formats: dict[str, FileFormat] | None = None,
    **options: object,
) -> Schema:
    """Make the data set ``data_dir/name`` of a table with one row per event.

    Args:
        interactions: The events: a polars or pandas table, or the path of a file, a directory or a pattern.
        data_dir: Where data sets are.
        users: One row per user, with what ``user_features`` declares; without it, every column is a category.
        items: One row per item, with what ``item_features`` declares; without it, every column is a category.
        formats: How to read those that are files, under their names here; by default, as their endings say.
        **options: Fields of :class:`InteractionSpec`; ``name`` is required.

    Returns:
        The schema of the data set.

    Raises:
        ValueError: For bad input, naming file, column, row, value and remedy.
    """
    given = {"file": interactions, "users_file": users, "items_file": items}
    names = {name: str(table) for name, table in given.items() if isinstance(table, (str, Path))}
    spec = InteractionSpec(**names | options)  # type: ignore[arg-type]
    with writing(Path(data_dir) / spec.name) as writer:
        schema = encode(interactions, spec, writer, users=users, items=items, formats=formats)
        return writer.schema(schema)


def encode(
    interactions: Frame,
    spec: InteractionSpec,
    writer: DatasetWriter,
    *,
    users: Frame | None = None,
    items: Frame | None = None,
    formats: dict[str, FileFormat] | None = None,
    progress: Progress = lambda what, events, share: None,
) -> Schema:
    """Encode tables and files and write them; the schema is returned and still to be written.

    See :func:`preprocess_interactions`, and :func:`hstu.data.log_encoder.encode_log` for ids and order.
    """
    source: dict[str, str] = {}
    for path in (interactions, users, items):
        if isinstance(path, (str, Path)):
            for name, digest in checksums(path).items():
                base = Path(name).name
                source[base if base not in source else f"{Path(name).parent.name}/{base}"] = digest
    tables: dict[Level, Frame | None] = {"user": users, "item": items}
    for level, given in tables.items():
        if given is None and spec.declared(level):
            raise ValueError(f"--{level}_features needs --{level}s, the file with a row for each {level}")
    formats = formats or {}
    required = spec.column_names
    if isinstance(interactions, (str, Path)):
        table = open_table(interactions, required, formats.get("interactions", _PLAIN))
    else:
        table = in_memory(_to_polars(interactions))
    schema = encode_table(
        table,
        spec,
        writer,
        users=lambda: _whole(users, spec.user_column, formats.get("users", _PLAIN)),
        items=lambda: _whole(items, spec.item_column, formats.get("items", _PLAIN)),
        progress=progress,
    )
    return replace(schema, source=source)


def _whole(table: Frame | None, key: str, fmt: FileFormat) -> pl.DataFrame | None:
    return (
        read_table(table, [key], fmt)
        if isinstance(table, (str, Path))
        else table
        if table is None
        else _to_polars(table)
    )


def encode_table(
    table: Table,
    spec: InteractionSpec,
    writer: DatasetWriter,
    *,
    users: Callable[[], pl.DataFrame | None],
    items: Callable[[], pl.DataFrame | None] = lambda: None,
    progress: Progress = lambda what, events, share: None,
) -> Schema:
    """Encode a table with one row per event, or per list of events, and write it; the schema is returned.

    See :func:`hstu.data.log_encoder.encode_log` for ids and order, and for ``writer``, ``users``, ``items``
    and ``progress``. Every row of the table becomes an event or is refused for a reason that is counted.

    Raises:
        ValueError: For bad input, naming column, row, value and remedy.
    """
    cleaner = _Cleaner(table, spec, progress)
    options = EncodingOptions(
        ticks_per_second=cleaner.ticks_per_second,
        action_bits=cleaner.action_bits,
        bit_names=spec.action_columns if len(spec.action_columns) > 1 else None,
    )
    schema = encode_log(
        cleaner.blocks(),
        spec,
        options,
        writer,
        users=users,
        items=items,
        progress=progress,
        on_repeats=cleaner.on_repeats,
    )
    cleaner.account(int(schema.counts["events"]))
    return schema


def _to_polars(frame: pl.DataFrame | pd.DataFrame) -> pl.DataFrame:
    return frame if isinstance(frame, pl.DataFrame) else pl.from_pandas(frame)


class _Cleaner:
    """Looks at a table, then gives it block by block as :func:`encode_log` asks for it."""

    def __init__(self, table: Table, spec: InteractionSpec, progress: Progress) -> None:
        self._features = {told.name: (told, FeatureLook()) for told in spec.declared("event")}
        read = [*spec.column_names, *self._features]
        require_names(table.columns, read, spec.file)
        others = [column for column in read if column != spec.item_column]
        whole = [name for name, (told, _) in self._features.items() if told.may_hold_lists]
        self._table = one_event_a_row(table, spec.item_column, others, spec.file, whole)
        if ignored := [name for name in table.columns if name not in read]:
            logger.info("%s: columns that are not declared (--event_features) are left out: %s",
                        spec.file, ", ".join(map(printable, ignored)))  # fmt: skip
        self._spec, self._progress = spec, progress
        self._looks = {role: Look() for role, column in spec.columns.items() if column}
        self._rows = self._dropped = self._repeats = 0
        self._classes: set[object] = set()
        self.ticks_per_second = 1
        looked_at = {name: look for name, look in self._features.items() if look[0].needs_look}
        for block, _ in self._read([*spec.column_names, *looked_at]):
            for name, (told, feature_look) in looked_at.items():
                feature_look.add(block[name], told, spec.set_separator)
            for role, look in self._looks.items():
                column = block[spec.columns[role]]  # type: ignore[index]
                if role == "time":
                    kind = as_text(column).dtype
                    self.ticks_per_second = ticks_per_second(kind, look_at_times(column, look), spec.time_format)
                else:
                    look.add(column)
                if role == "action" and spec.action_type == "categorical":
                    self._count_classes(column)
            progress(f"looking at {spec.file}", self._rows, self._table.share(self._rows))
        if len(self._classes) > max(FEW_CLASSES, self._rows // 2):
            raise self._no_classes(f"{len(self._classes)} values in {self._rows:,} rows")

    def _read(self, columns: list[str] | None) -> Iterator[tuple[pl.DataFrame, int | np.ndarray]]:
        """Blocks without the rows that lack something, if those are dropped, and the places of their rows."""
        spec, self._rows = self._spec, 0
        reasons: Counter[str] = Counter()
        for block in self._table.read(columns):
            rows: int | np.ndarray = self._rows
            self._rows += block.height
            if len(spec.action_columns) > 1:
                bits = [block[name] for name in spec.action_columns]
                block = block.with_columns(mask_of(bits, spec.file, rows).alias(spec.action_column or ""))
            if spec.missing == "drop":
                lacking = np.zeros(block.height, bool)
                for role, column in spec.columns.items():
                    if column:
                        found = find_missing(block[column], role).to_numpy() & ~lacking
                        reasons[column] += int(found.sum())
                        lacking |= found
                rows = np.flatnonzero(~lacking) + rows
                block = block.filter(~lacking)
            yield block, rows
        self._dropped, self._reasons = reasons.total(), reasons

    @property
    def action_bits(self) -> int:
        """Bits of the largest action."""
        if len(self._spec.action_columns) > 1:
            return len(self._spec.action_columns)
        largest = self._looks["action"].largest if "action" in self._looks else 0
        return min(MAX_BITS, max(1, int(largest).bit_length()))

    def blocks(self) -> Iterator[tuple[int, pl.DataFrame]]:
        """The events, checked."""
        expected = self._rows
        for block, rows in self._read(None):
            yield 0, self._clean(block, rows)
            self._progress(f"reading {self._spec.file}", self._rows, self._rows / max(1, expected))
        if self._rows != expected:
            raise ValueError(f"{self._spec.file}: had {expected:,} rows, then {self._rows:,}; is it being written?")

    def _clean(self, block: pl.DataFrame, rows: int | np.ndarray) -> pl.DataFrame:
        spec, looks = self._spec, self._looks
        columns = [
            clean_ids(block[spec.user_column], spec.file, looks["user"], rows, spec.missing).alias("user"),
            clean_ids(block[spec.item_column], spec.file, looks["item"], rows, spec.missing).alias("item"),
        ]
        if spec.time_column:
            times, _ = clean_times(block[spec.time_column], spec.file, looks["time"], rows, spec.time_format)
            columns.append(times.alias("time"))
        if spec.action_column:
            clean = clean_masks if spec.action_type == "bitmask" else clean_values
            columns.append(clean(block[spec.action_column], spec.file, looks["action"], rows).alias("action"))
        for name, (told, look) in self._features.items():
            feature = clean_feature(block[name], told, spec.file, look, spec.set_separator, rows)
            columns.append(feature.alias(FEATURE + name))
        if spec.duplicates != "keep":
            columns.append(block.hash_rows().alias(ROW_HASH))
        return pl.DataFrame(columns)

    def _count_classes(self, column: pl.Series) -> None:
        self._classes.update(column.unique().to_list() if not column.dtype.is_nested() else ())
        if len(self._classes) > MAX_CLASSES:
            raise self._no_classes(f"more than {MAX_CLASSES} values")

    def _no_classes(self, found: str) -> ValueError:
        return ValueError(
            f"{self._spec.file}: column {self._spec.action_column!r} has {found}, an action is one of a few classes; "
            "cut it into classes (quantiles, say), make a yes or no of it (watched more than half, say), or leave "
            "--action_column out"
        )

    def on_repeats(self, hashes: np.ndarray) -> None:
        """Raise ValueError about the first row that repeats another, or count those that are dropped."""
        if self._spec.duplicates == "drop":
            self._repeats = len(hashes)
            return
        known = np.unique(hashes)
        seen = np.zeros(len(known), bool)
        for block, places in self._read(None):
            found = block.hash_rows().to_numpy().view(np.int64)
            rows = np.flatnonzero(np.isin(found, known))
            number = np.searchsorted(known, found[rows])
            repeated = seen[number] | ~pl.Series(number).is_first_distinct().to_numpy()
            if repeated.any():
                place = int(rows[repeated.argmax()])
                row = int(places[place]) if isinstance(places, np.ndarray) else places + place
                values = ", ".join(map(printable, block.row(place)))
                raise ValueError(
                    f"{self._spec.file}: {len(hashes)} rows repeat an earlier one in every column, the first is row "
                    f"{row + 1} ({values}); choose --duplicates drop or --duplicates keep"
                )
            seen[number] = True
        raise AssertionError("repeated rows were there a moment ago")

    def account(self, events: int) -> None:
        """Say where all rows went."""
        spec = self._spec
        filtered = self._rows - self._dropped - self._repeats - events
        has_filters = max(spec.min_user_events, spec.min_item_events) > 1 or spec.max_user_events
        has_filters = has_filters or spec.consecutive_repeats == "drop"
        assert filtered == 0 or (has_filters and filtered > 0)  # every row is an event, or refused for a reason
        lacking = ", ".join(f"{number:,} without {name!r}" for name, number in self._reasons.items() if number)
        parts = [(lacking, self._dropped), (f"{self._repeats:,} duplicates", self._repeats)]
        parts.append((f"{filtered:,} by the filters", filtered))
        refused = "; ".join(text for text, number in parts if number) or "none"
        logger.info("%s: %s rows in, %s events out, dropped: %s", spec.file, f"{self._rows:,}", f"{events:,}", refused)
