"""Histories of users that no data set holds, from a file, in the ids of the data set that a model was trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl

from hstu.data.cleaning import (
    Missing,
    clean_ids,
    clean_masks,
    clean_times,
    clean_values,
    find_missing,
    mask_of,
    require_columns,
    whole_seconds,
)
from hstu.data.column_cache import OFFSETS, set_offsets
from hstu.data.files import FileFormat, in_memory, one_event_a_row, open_table
from hstu.data.reader import SequenceDataset
from hstu.data.request_features import MissingFeatures, one_per_user, read_features
from hstu.data.schema import Feature, Level, unknown_id
from hstu.data.values import Sets, Values, missing, take

logger = logging.getLogger(__name__)

_LEVELS: tuple[Level, ...] = ("user", "event")


@dataclass(frozen=True, kw_only=True)
class HistoryColumns:
    """Columns of a file of histories, what of them the model needs, and how its values are read."""

    user: str
    item: str
    time: str
    action: str
    contexts: tuple[str, ...]
    use_actions: bool
    has_unknown: bool  # whether contexts and actions that the data set lacks can be read as unknown
    features: tuple[str, ...] = ()  # other features of users and events
    missing_features: MissingFeatures = "error"
    set_separator: str = "|"
    time_format: str | None = None
    missing: Missing = "error"


def read_frame(
    path: Path | pl.DataFrame,
    columns: HistoryColumns,
    fmt: FileFormat,
    required: tuple[str, ...] = ("user",),
    *,
    name: str,
) -> pl.DataFrame:
    """Read events, pairs or users, one row for each.

    Args:
        path: A file, a directory of parts or a pattern; or a table that is there already.
        columns: Where things are, and what to do with rows that lack one.
        fmt: How to read a file.
        required: Roles that it must have.
        name: What messages call it.

    Raises:
        ValueError: if it cannot be read; see :func:`hstu.data.files.open_table`.
    """
    roles = ("user", "item") if fmt.format == "sequences" else required
    wanted = [getattr(columns, role) for role in roles]
    if isinstance(path, pl.DataFrame):
        require_columns(path, wanted, name)
        table = in_memory(path)
    else:
        table = open_table(path, wanted, fmt)
    others = [columns.time, columns.action, *columns.features]
    table = one_event_a_row(table, columns.item, others, name, columns.features)
    blocks = list(table.read(None))
    frame = pl.concat(blocks) if blocks else pl.DataFrame(schema=dict.fromkeys(table.columns, pl.String))
    if columns.missing != "drop":
        return frame
    kinds = {columns.user: "user", columns.item: "item", columns.time: "time"}
    lacking = [find_missing(frame[name], kind) for name, kind in kinds.items() if name in frame.columns]
    kept = frame.filter(~pl.any_horizontal(lacking)) if frame.height else frame
    logger.info(
        "%s: %d rows in, %d without an id or a time are left out", name, frame.height, frame.height - kept.height
    )
    return kept


def read_histories(
    file: str, frame: pl.DataFrame, known: SequenceDataset, columns: HistoryColumns, unknown_items: str = "error"
) -> tuple[SequenceDataset, pl.Series]:
    """Return the histories in ``frame``, one row per event, and the original id of each user.

    Users stand in the order of their first row, events in that of time, ties and all of a data set without
    times in that of the rows.

    Args:
        file: What messages call the file.
        frame: The events.
        known: The data set whose ids apply.
        columns: Where things are.
        unknown_items: What to do with events of items that ``known`` lacks: "error", or "drop".

    Raises:
        ValueError: for a missing column, or a value that is unknown or malformed.
    """
    schema = known.schema
    if columns.use_actions:
        frame = _with_mask(frame, known, columns.action, file)
    wanted = [columns.user, columns.item]
    wanted += [] if columns.has_unknown and columns.missing_features == "allow" else columns.contexts
    wanted += [columns.time] if schema.time else []
    wanted += [columns.action] if columns.use_actions else []
    require_columns(frame, wanted, file)
    parts = [clean_ids(frame[columns.user], file, missing=columns.missing).alias("user")]
    items = clean_ids(frame[columns.item], file, missing=columns.missing)
    parts.append(known.index(schema.item.name).places(items).alias("item"))
    if schema.time:
        exact, ticks = clean_times(frame[columns.time], file, time_format=columns.time_format)
        parts += [exact.alias("exact"), whole_seconds(exact, ticks).alias("seconds")]
    if columns.use_actions:
        assert schema.action is not None
        parts.append(_actions(frame[columns.action], known, columns, file).alias("action"))
    contexts = [_contexts(frame, name, known, columns, file) for name in columns.contexts]
    parts += [ids.alias(f"context {name}") for name, ids in zip(columns.contexts, contexts, strict=True)]
    read = tuple(f for level in _LEVELS for f in schema.of(level) if f.name in columns.features)
    features = features_of(frame, read, known, columns, file)
    parts.append(pl.int_range(frame.height, eager=True).alias("place"))
    events = _known_items(pl.DataFrame(parts), frame[columns.item], file, unknown_items)
    users = events["user"].unique(maintain_order=True)
    numbers = pl.DataFrame({"user": users, "row": np.arange(len(users))})
    events = events.join(numbers, on="user", how="left", maintain_order="left")
    events = events.sort("row", *(["exact"] if schema.time else []), maintain_order=True)
    flat = _flat(events, schema.features, columns, file)
    for feature in read:
        values = take(features[feature.name], events["place"].to_numpy())
        if feature.level == "user":
            values = one_per_user(values, events["row"].to_numpy(), feature.name, users, file)
        if isinstance(values, Sets):
            flat[set_offsets(feature.name)], values = values
        flat[feature.name] = values
    return SequenceDataset(known.path, schema, flat), users


def features_of(
    frame: pl.DataFrame, features: tuple[Feature, ...], known: SequenceDataset, columns: HistoryColumns, file: str
) -> dict[str, Values]:
    """Return the values of ``features`` in each row of ``frame``; see :func:`read_features`."""
    return read_features(frame, features, known, file, absent=columns.missing_features, separator=columns.set_separator)


def _with_mask(frame: pl.DataFrame, known: SequenceDataset, name: str, file: str) -> pl.DataFrame:
    """The frame with the column ``name``, made of those of the bits that it or the data set names, if it lacks it."""
    assert known.schema.action is not None
    bits = tuple(bit.strip() for bit in name.split(",")) if "," in name else known.schema.action.bits
    if name in frame.columns or bits is None or not set(bits) <= set(frame.columns):
        return frame
    if known.schema.action.bits not in (None, bits):
        names = ",".join(known.schema.action.bits or ())
        raise ValueError(f"{file}: --action_column = {name}: the bits of the data set are {names}; name those, so")
    return frame.with_columns(mask_of([frame[bit] for bit in bits], file).alias(name))


def find_users(file: str, frame: pl.DataFrame, known: SequenceDataset, columns: HistoryColumns) -> np.ndarray:
    """Return the rows of the users that ``frame`` names, each once, int64 [S].

    Raises:
        ValueError: for a user that ``known`` lacks.
    """
    require_columns(frame, [columns.user], file)
    users = clean_ids(frame[columns.user], file, missing=columns.missing).unique(maintain_order=True)
    return _require(users, known.index(known.schema.user.name).places(users), file).to_numpy()


def _find(column: pl.Series, known: SequenceDataset, feature: str, file: str) -> pl.Series:
    return known.index(feature).places(clean_values(column, file))


def _contexts(frame: pl.DataFrame, name: str, known: SequenceDataset, columns: HistoryColumns, file: str) -> pl.Series:
    unknown = unknown_id(known.schema, name)
    if not columns.has_unknown:
        return _require(frame[name], _find(frame[name], known, name, file), file)
    if name not in frame.columns:
        logger.info("%s: column %r is missing: all its values are read as unknown", file, name)
        return pl.repeat(unknown, frame.height, dtype=pl.Int64, eager=True)
    column = frame[name]
    ids = np.full(frame.height, unknown, np.int64)
    ids[column.is_not_null().to_numpy()] = _find(column.drop_nulls(), known, name, file).fill_null(unknown).to_numpy()
    return pl.Series(ids)


def _actions(column: pl.Series, known: SequenceDataset, columns: HistoryColumns, file: str) -> pl.Series:
    action = known.schema.action
    assert action is not None
    if action.action_type == "categorical":
        ids = _find(column, known, action.name, file)
    else:
        masks = clean_masks(column, file)
        ids = masks.set(masks >= (action.vocab_size or 0), None)
    if not columns.has_unknown or not ids.null_count():
        return _require(column, ids, file)
    strange = column.filter(ids.is_null())
    values = strange.unique(maintain_order=True)
    named = ", ".join(repr(value) for value in values[:3].to_list()) + (", ..." if len(values) > 3 else "")
    logger.info(
        "%s: column %r: %d of %d events have actions that the data set lacks (%s), which are read as unknown",
        file, column.name, len(strange), len(column), named,
    )  # fmt: skip
    return ids.fill_null(unknown_id(known.schema, action.name))


def _require(column: pl.Series, ids: pl.Series, file: str) -> pl.Series:
    """Return ``ids``, or raise ValueError about the first that is null."""
    if ids.null_count():
        row = int(ids.is_null().arg_max() or 0)
        raise ValueError(
            f"{file}: column {column.name!r}, row {row + 1}: value {column[row]!r} is not in the data set that the "
            "model was trained on; correct or remove it"
        )
    return ids


def _known_items(
    events: pl.DataFrame, originals: pl.Series, file: str, unknown: str | Literal["error"]
) -> pl.DataFrame:
    missing = events["item"].is_null()
    if not missing.any():
        return events
    items = originals.filter(missing).unique(maintain_order=True)
    named = ", ".join(repr(item) for item in items[:3].to_list()) + (", ..." if len(items) > 3 else "")
    if unknown == "error":
        raise ValueError(
            f"{file}: column {originals.name!r}: {len(items)} items are not in the catalogue that the model was "
            f"trained on ({named}); correct them, or leave their events out with --unknown_items drop"
        )
    kept = events.filter(~missing)
    users = events["user"].n_unique() - kept["user"].n_unique()
    if kept.is_empty():
        raise ValueError(f"{file}: column {originals.name!r}: no item is in the catalogue, {named} for example")
    logger.info("%s: dropped %d events of %d unknown items (%s)", file, int(missing.sum()), len(items), named)
    if users:
        logger.info("%s: %d users have no known item and get no answer", file, users)
    return kept


def _flat(
    events: pl.DataFrame, features: tuple[Feature, ...], columns: HistoryColumns, file: str
) -> dict[str, np.ndarray]:
    """The columns of a ``SequenceDataset`` of events sorted by "row"; what the model does not read is 0."""
    row = events["row"].to_numpy()
    lengths = np.bincount(row)
    first = np.cumsum(lengths) - lengths
    flat: dict[str, np.ndarray] = {OFFSETS: np.append(first, len(row))}
    for feature in features:
        if feature.role in ("item", "action", "time"):
            name = {"item": "item", "action": "action", "time": "seconds"}[feature.role]
            flat[feature.name] = events[name].to_numpy() if name in events.columns else np.zeros(len(row), np.int64)
        elif feature.name in columns.contexts:
            ids = events[f"context {feature.name}"].to_numpy()
            values = one_per_user(ids, row, feature.name, events["user"].unique(maintain_order=True), file)
            assert isinstance(values, np.ndarray)
            flat[feature.name] = values
        elif feature.level == "user" and feature.role == "feature":
            unread = missing(feature, len(lengths))
            if isinstance(unread, Sets):
                flat[set_offsets(feature.name)], unread = unread
            flat[feature.name] = np.zeros(len(lengths), np.int64) if feature.kind == "categorical" else unread
    return flat
