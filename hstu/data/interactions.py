"""How a table of interactions (one row per event) becomes a data set, and what its users are like."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa

from hstu.config.dataset import seconds_of
from hstu.data.cleaning import MAX_BITS, Missing
from hstu.data.declarations import Declaration, parse_declarations
from hstu.data.schema import ActionType, Level, require_plain_name

logger = logging.getLogger(__name__)

Duplicates = Literal["error", "drop", "keep"]
ConsecutiveRepeats = Literal["keep", "drop"]
USER, ITEM, TIME = "user_id", "item_id", "timestamp"


@dataclass(frozen=True, kw_only=True)
class InteractionSpec:
    """How to read a table of interactions.

    Args:
        name: Name of the data set, also of its directory.
        user_column: Column of user ids, integers or strings; also in the users table.
        item_column: Column of item ids.
        time_column: Column of times; without one, a user's events are in the order of the rows.
        time_format: Pattern of strptime that the times follow, as "%d.%m.%Y %H:%M"; None: numbers or ISO dates.
        action_column: Column of actions; several, separated by commas, each say yes or no and become the bits of a
            mask, the first the lowest.
        action_type: "categorical" (any value) or "bitmask" (a whole number, one bit per kind of action).
        action_name: Name of the action feature in the data set.
        min_user_events: Users with fewer events are dropped (0 or 1: none) ...
        min_item_events: ... and items with fewer events, repeated until neither is left.
        max_user_events: Of each user the most recent ones are kept (0: all); the catalogue stays that of all.
        session_column: Column of session ids in place of users: each session is a sequence of its own.
        session_gap: A length of time, as "30m" (of w, d, h, m, s): a user's events are cut wherever more than that lies
            between two of them, and session 2 of user "ann" becomes a sequence of its own, "ann#2".
        consecutive_repeats: "drop" leaves out events of the item that the event before them is of, after the filters
            have counted; "keep" does not.
        duplicates: What to do with rows equal in all columns: "error", "drop" all but the first, or "keep".
        missing: What to do with rows that lack a user, an item, the time or the action: "error" or "drop" them; "keep"
            takes NA, NULL, NaN and None for ids, and refuses what is empty.
        event_features: Declarations of other columns of the interactions, see :mod:`hstu.data.declarations`.
        user_features: Declarations of columns of the users table; None takes all of them for categories.
        item_features: Declarations of columns of the items table, likewise.
        set_separator: Between the members of sets, and the numbers of vectors, that are written as strings.
        file: What messages call the interactions.
        users_file: What messages call the users table.
        items_file: What messages call the items table.
    """

    name: str
    user_column: str = USER
    item_column: str = ITEM
    time_column: str | None = None
    time_format: str | None = None
    action_column: str | None = None
    action_type: ActionType = "categorical"
    action_name: str = "action"
    min_user_events: int = 0
    min_item_events: int = 0
    max_user_events: int = 0
    session_column: str | None = None
    session_gap: str | None = None
    consecutive_repeats: ConsecutiveRepeats = "keep"
    duplicates: Duplicates = "error"
    missing: Missing = "error"
    event_features: str = ""
    user_features: str | None = None
    item_features: str | None = None
    set_separator: str = "|"
    file: str = "interactions"
    users_file: str = "users"
    items_file: str = "items"

    def __post_init__(self) -> None:
        require_plain_name("data set", self.name)
        if len(self.action_columns) > 1:
            object.__setattr__(self, "action_type", "bitmask")
        if len(self.action_columns) > MAX_BITS:
            raise ValueError(
                f"action_column names {len(self.action_columns)} columns, a mask has up to {MAX_BITS} bits"
            )
        if self.session_gap is not None:
            self._check_gap(self.session_gap)
        if self.session_column is not None:
            if self.user_column not in (USER, self.session_column):
                raise ValueError(
                    f"--session_column {self.session_column} beside --user_column {self.user_column}: a sequence is "
                    "of one of them; give that, and the other as an event feature, name:control"
                )
            object.__setattr__(self, "user_column", self.session_column)
        kinds = {"action_type": ActionType, "duplicates": Duplicates, "missing": Missing}
        for option, known in (kinds | {"consecutive_repeats": ConsecutiveRepeats}).items():
            choices = get_args(known)
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
        columns = [*self.column_names, *(declared.name for declared in self.declared("event"))]
        if repeated := [column for column in columns if columns.count(column) > 1]:
            raise ValueError(f"column {repeated[0]!r} is named for two roles; each role needs its own")
        self._check_declarations()

    def _check_gap(self, gap: str) -> None:
        if seconds_of(gap) is None:
            raise ValueError(f"--session_gap {gap!r} is no length of time; give one such as 30m, 12h or 1d")
        if self.time_column is None:
            raise ValueError(f"--session_gap {gap} needs the times of events; name their column with --time_column")
        if self.session_column is not None:
            raise ValueError(
                f"--session_gap {gap} beside --session_column {self.session_column}: leave one of them out"
            )

    def _check_declarations(self) -> None:
        declared = [*self.declared("event"), *self.declared("user"), *self.declared("item")]
        taken = {USER, ITEM, *([TIME] if self.time_column else []), *([self.action_name] if self.action_column else [])}
        for number, one in enumerate(declared):
            flag = f"--{one.level}_features"
            if one.name in taken or one.name in {other.name for other in declared[:number]}:
                raise ValueError(f"{flag}: the data set has another feature {one.name!r}; rename the column")
            if one.table in taken:
                raise ValueError(f"{flag}: {one.name!r}: table={one.table} is none of features; choose another name")
        own = {one.name for one in declared if one.has_ids and one.table != one.name}
        if clash := own & {one.table for one in declared if one.has_ids}:
            raise ValueError(f"table={min(clash)} is the name of a feature of another table; choose another name")
        if not self.set_separator:
            raise ValueError("--set_separator is empty; say what stands between the members of a set, as '|'")

    def declared(self, level: Level) -> tuple[Declaration, ...]:
        """The declared features of a level."""
        text = {"event": self.event_features, "user": self.user_features, "item": self.item_features}[level]
        return parse_declarations(text or "", level)

    @property
    def action_columns(self) -> tuple[str, ...]:
        """The columns of actions: none, one, or those of a mask's bits."""
        return tuple(name.strip() for name in self.action_column.split(",")) if self.action_column else ()

    @property
    def column_names(self) -> list[str]:
        """The columns of the table that have roles."""
        single = [column for role, column in self.columns.items() if column and role != "action"]
        return [*single, *self.action_columns]

    @property
    def columns(self) -> dict[str, str | None]:
        """Role -> column of the table; of several columns of actions, the one that they become."""
        return {
            "user": self.user_column,
            "item": self.item_column,
            "time": self.time_column,
            "action": self.action_column,
        }


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
