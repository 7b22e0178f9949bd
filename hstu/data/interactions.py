"""Turn a table of interactions (one row per event) into a data set: filter, number the ids, sort, encode."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa

from hstu.data.columns import clean_ids, clean_masks, clean_times, clean_values, require_columns
from hstu.data.schema import ActionType, Feature, Schema, count_statistics, require_plain_name
from hstu.data.splits import MIN_EVENTS
from hstu.data.writer import EncodedDataset, write_dataset

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

Duplicates = Literal["error", "drop", "keep"]
USER, ITEM, TIME = "user_id", "item_id", "timestamp"


@dataclass(frozen=True, kw_only=True)
class InteractionSpec:
    """How to read a table of interactions.

    Args:
        name: Name of the data set, also of its directory.
        user_column: Column of user ids, integers or strings; also in the users table.
        item_column: Column of item ids.
        time_column: Column of times; without one, a user's events are in the order of the rows.
        action_column: Column of actions.
        action_type: "categorical" (any value) or "bitmask" (a whole number, one bit per kind of action).
        action_name: Name of the action feature in the data set.
        min_user_events: Users with fewer events are dropped (0 or 1: none) ...
        min_item_events: ... and items with fewer events, repeated until neither is left.
        max_user_events: Of each user the most recent ones are kept (0: all); the catalogue stays that of all.
        duplicates: What to do with rows equal in all columns: "error", "drop" all but the first, or "keep".
        file: What messages call the interactions.
        users_file: What messages call the users table.
    """

    name: str
    user_column: str = USER
    item_column: str = ITEM
    time_column: str | None = None
    action_column: str | None = None
    action_type: ActionType = "categorical"
    action_name: str = "action"
    min_user_events: int = 0
    min_item_events: int = 0
    max_user_events: int = 0
    duplicates: Duplicates = "error"
    file: str = "interactions"
    users_file: str = "users"

    def __post_init__(self) -> None:
        require_plain_name("data set", self.name)
        for option, choices in (("action_type", get_args(ActionType)), ("duplicates", get_args(Duplicates))):
            if getattr(self, option) not in choices:
                value = getattr(self, option)
                raise ValueError(f"{option} is {value!r}, must be one of {', '.join(choices)}")
        for option in ("min_user_events", "min_item_events", "max_user_events"):
            if getattr(self, option) < 0:
                raise ValueError(f"{option} is {getattr(self, option)}, must be 0 (no filter) or more")
        if 0 < self.max_user_events < self.min_user_events:
            raise ValueError(
                f"max_user_events is {self.max_user_events}, less than min_user_events {self.min_user_events}"
            )
        columns = [column for column in self.columns.values() if column is not None]
        if repeated := [column for column in columns if columns.count(column) > 1]:
            raise ValueError(f"column {repeated[0]!r} is named for two roles; each role needs its own")

    @property
    def columns(self) -> dict[str, str | None]:
        """Role -> column of the table."""
        return {
            "user": self.user_column,
            "item": self.item_column,
            "time": self.time_column,
            "action": self.action_column,
        }


def preprocess_interactions(
    interactions: pl.DataFrame | pd.DataFrame,
    *,
    data_dir: str | Path = "tmp_data",
    users: pl.DataFrame | pd.DataFrame | None = None,
    **options: object,
) -> Schema:
    """Make the data set ``data_dir/name`` of a polars or pandas table with one row per event.

    Args:
        interactions: The events.
        data_dir: Where data sets are.
        users: One row per user; every column but the user column becomes a context feature.
        **options: Fields of :class:`InteractionSpec`; ``name`` is required.

    Returns:
        The schema of the data set.

    Raises:
        ValueError: For bad input, naming column, row, value and remedy.
    """
    spec = InteractionSpec(**options)  # type: ignore[arg-type]
    dataset = encode_interactions(_to_polars(interactions), spec, users=None if users is None else _to_polars(users))
    write_dataset(dataset, Path(data_dir) / spec.name)
    return dataset.schema


def encode_interactions(
    frame: pl.DataFrame,
    spec: InteractionSpec,
    *,
    users: pl.DataFrame | None = None,
    source: dict[str, str] | None = None,
) -> EncodedDataset:
    """Encode a table with one row per event as a data set in memory; see :func:`preprocess_interactions`.

    Ids are the ranks of the original values in sorted order. A user's events are sorted by time, stably: ties
    stay in the order of the rows.
    """
    events = _filter(_drop_duplicates(frame, _clean(frame, spec), spec), spec)
    vocabularies = {USER: _distinct(events["user"]), ITEM: _distinct(events["item"])}
    columns = [
        _number(events["user"], vocabularies[USER]).alias(USER),
        _number(events["item"], vocabularies[ITEM]).alias(ITEM),
    ]
    features = [_category(USER, "user", vocabularies[USER])]
    contexts = {}
    for column in context_columns(users, vocabularies[USER], spec) if users is not None else ():
        contexts[column.name], vocabularies[column.name] = encode_category(column)
        features.append(_category(column.name, "context", vocabularies[column.name]))
    features.append(_category(ITEM, "item", vocabularies[ITEM]))
    if spec.action_column:
        feature, column, vocabulary = _actions(events["action"], spec)
        features.append(feature)
        columns.append(column)
        vocabularies |= vocabulary
    if spec.time_column:
        features.append(Feature(name=TIME, role="time"))
        columns += [events["seconds"].alias(TIME), events["exact"]]
    ordered = _sort(pl.DataFrame(columns))
    lengths = np.bincount(ordered[USER].to_numpy(), minlength=len(vocabularies[USER]))
    if spec.max_user_events:
        recent, lengths = most_recent(lengths, spec.max_user_events)
        ordered = ordered.filter(recent)
    schema = Schema(
        name=spec.name,
        features=tuple(features),
        counts=count_statistics(lengths, len(vocabularies[ITEM])),
        source=source or {},
    )
    values = {name: ordered[name].to_numpy() for name in ordered.columns if name != USER}
    return EncodedDataset(
        schema=schema,
        lengths=lengths,
        contexts=contexts,
        events=values,
        vocabularies={name: to_arrow(column) for name, column in vocabularies.items()},
    )


def most_recent(lengths: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Which events are among the last ``most`` of their user, bool [T], and how many that leaves, int64 [U].

    Args:
        lengths: Number of events of each user, int64 [U].
        most: Events to keep of each.
    """
    events_after = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    return events_after <= most, np.minimum(lengths, most)


def to_arrow(column: pl.Series) -> pa.Array:
    """An array of plain types, which every reader of parquet knows."""
    return column.to_arrow(compat_level=pl.CompatLevel.oldest())


def _to_polars(frame: pl.DataFrame | pd.DataFrame) -> pl.DataFrame:
    return frame if isinstance(frame, pl.DataFrame) else pl.from_pandas(frame)


def _clean(frame: pl.DataFrame, spec: InteractionSpec) -> pl.DataFrame:
    """Columns user, item and, where there are any, exact (to sort by), seconds and action."""
    require_columns(frame, [column for column in spec.columns.values() if column], spec.file)
    columns = [
        clean_ids(frame[spec.user_column], spec.file).alias("user"),
        clean_ids(frame[spec.item_column], spec.file).alias("item"),
    ]
    if spec.time_column:
        exact, seconds = clean_times(frame[spec.time_column], spec.file)
        columns += [exact.alias("exact"), seconds.alias("seconds")]
    if spec.action_column:
        clean = clean_masks if spec.action_type == "bitmask" else clean_values
        columns.append(clean(frame[spec.action_column], spec.file).alias("action"))
    return pl.DataFrame(columns)


def _drop_duplicates(frame: pl.DataFrame, events: pl.DataFrame, spec: InteractionSpec) -> pl.DataFrame:
    """Treat rows that are equal in all columns of the original ``frame`` as the spec says."""
    if spec.duplicates == "keep":
        return events
    if frame.hash_rows().n_unique() == frame.height:  # quick, and no equal rows can differ in it
        return events
    first = frame.select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
    number = int((~first).sum())
    if number and spec.duplicates == "error":
        row = int(first.argmin())
        values = ", ".join(map(str, frame.row(row)))
        raise ValueError(
            f"{spec.file}: {number} rows repeat an earlier one in every column, the first is row {row + 1} "
            f"({values}); choose --duplicates drop or --duplicates keep"
        )
    if number:
        logger.info("%s: dropped %d duplicate rows", spec.file, number)
    return events.filter(first)


def _sort(events: pl.DataFrame) -> pl.DataFrame:
    """Sort by user and "exact" time, stably, and drop the latter."""
    if "exact" not in events.columns:
        return events.sort(USER, maintain_order=True)
    exact = events["exact"].to_numpy()
    if exact.dtype == np.int64:
        earliest, latest = int(exact.min()), int(exact.max())
        span = latest - earliest + 1
        if span * (int(events[USER].to_numpy().max()) + 1) < 2**63:
            # One key in place of two sorts several times faster.
            key = pl.col(USER) * span + (pl.col("exact") - earliest)
            return events.with_columns(key.alias("exact")).sort("exact", maintain_order=True).drop("exact")
    return events.sort(USER, "exact", maintain_order=True).drop("exact")


def _filter(events: pl.DataFrame, spec: InteractionSpec) -> pl.DataFrame:
    """Drop users and items with too few events until all that are left have enough."""
    before = events.height
    while spec.min_user_events > 1 or spec.min_item_events > 1:
        kept = events.filter(
            (pl.len().over("user") >= spec.min_user_events) & (pl.len().over("item") >= spec.min_item_events)
        )
        settled = kept.height == events.height
        events = kept
        if settled:
            break
    if before > events.height:
        logger.info("%s: the filters dropped %d of %d events", spec.file, before - events.height, before)
    if events.is_empty():
        raise ValueError(
            f"{spec.file}: no event passes --min_user_events {spec.min_user_events} "
            f"--min_item_events {spec.min_item_events}; lower them"
        )
    counts = events.group_by("user").len()
    short = counts.filter(pl.col("len") < MIN_EVENTS).sort("user")
    if short.height:
        user, number = short.row(0)
        raise ValueError(
            f"{spec.file}: {short.height} of {counts.height} users have fewer than {MIN_EVENTS} events "
            f"(for example {user!r} with {number}); drop them with --min_user_events {MIN_EVENTS}"
        )
    return events


def context_columns(
    users: pl.DataFrame, known: pl.Series, spec: InteractionSpec, absent: str | None = None
) -> list[pl.Series]:
    """The columns of the users table, one value for each of the ``known`` users.

    Args:
        users: One row per user.
        known: Ids of the users of the log.
        spec: Names of columns and files.
        absent: Value for users who are not in the table; without one they are refused.
    """
    file = spec.users_file
    require_columns(users, [spec.user_column], file)
    ids = clean_ids(users[spec.user_column], file)
    first = ids.is_first_distinct().to_numpy()
    if not first.all():
        row = int(first.argmin())
        raise ValueError(f"{file}: row {row + 1}: user {ids[row]!r} appears twice; keep one row per user")
    if ids.dtype != known.dtype:
        ids, known = ids.cast(pl.String), known.cast(pl.String)
    row_of = pl.DataFrame({"user": ids, "row": np.arange(len(ids))})
    rows = known.to_frame("user").join(row_of, on="user", how="left", maintain_order="left")["row"]
    missing = known.filter(rows.is_null())
    if len(missing) and absent is not None:
        logger.info("%s: %d users of %s are missing; they get %r", file, len(missing), spec.file, absent)
    elif len(missing):
        raise ValueError(
            f"{file}: {len(missing)} of {len(known)} users of {spec.file} are missing "
            f"(for example {missing[0]!r}); add them or leave the users file out"
        )
    idle = len(ids) - (len(known) - len(missing))
    if idle:
        logger.info("%s: %d users without events are left out", file, idle)
    others = [clean_values(column, file) for column in users.get_columns() if column.name != spec.user_column]
    if len(missing):
        return [column.cast(pl.String).gather(rows).fill_null(absent) for column in others]
    return [column.gather(rows) for column in others]


def encode_category(column: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Ids of the values, int64, and the vocabulary, ascending."""
    vocabulary = _distinct(column)
    return _number(column, vocabulary).to_numpy(), vocabulary


def _actions(column: pl.Series, spec: InteractionSpec) -> tuple[Feature, pl.Series, dict[str, pl.Series]]:
    """The action feature, its ids and its vocabulary; a bit mask is its own id and has none."""
    name = spec.action_name
    if spec.action_type == "bitmask":
        size = 2 ** max(1, int(column.max()).bit_length())  # type: ignore[arg-type]
        return (
            Feature(name=name, role="action", vocab_size=size, action_type="bitmask"),
            column.alias(name),
            {},
        )
    vocabulary = _distinct(column)
    feature = Feature(name=name, role="action", vocab_size=len(vocabulary), action_type="categorical")
    return feature, _number(column, vocabulary).alias(name), {name: vocabulary}


def _category(name: str, role: Literal["user", "item", "context"], vocabulary: pl.Series) -> Feature:
    return Feature(name=name, role=role, vocab_size=len(vocabulary))


def _distinct(column: pl.Series) -> pl.Series:
    return column.unique().sort()


def _number(column: pl.Series, vocabulary: pl.Series) -> pl.Series:
    """Position of each value in the vocabulary, Int64."""
    table = pl.DataFrame({"value": vocabulary, "id": np.arange(len(vocabulary))})
    return column.to_frame("value").join(table, on="value", how="left", maintain_order="left")["id"]
