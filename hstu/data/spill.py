"""What is spilled to disk of a log and counted on the way: ids, actions, rows that repeat others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import polars as pl

from hstu.data.external_sort import Runs
from hstu.data.feature_codes import FeatureColumn
from hstu.data.numbering import Ids, Numbering
from hstu.data.sessions import Sessions
from hstu.data.writer import part_bounds

FEATURE = "feature: "  # before the name of a feature of events, a column of a block
ROW_HASH = "row hash"  # column of a block: equal where rows are

Progress = Callable[[str, int, float], None]  # what is being done, events so far, share of the whole


class Actions:
    """The distinct actions; strings get codes as ids do, numbers stand for themselves."""

    def __init__(self) -> None:
        self._values: set[float] = set()
        self._strings: Ids | None = None

    def codes(self, column: pl.Series) -> np.ndarray:
        """Remember a block of actions and return them as numbers, [N]."""
        if column.dtype == pl.String:
            self._strings = self._strings or Ids()
            return self._strings.codes(column)
        self._values.update(column.unique())
        return column.to_numpy()

    def vocabulary(self) -> tuple[pl.Series, Callable[[np.ndarray], np.ndarray]]:
        """The distinct actions, ascending, and what turns codes into their places there."""
        if self._strings is None:
            values = pl.Series(sorted(self._values))
            known = values.to_numpy()
            return values, lambda codes: np.searchsorted(known, codes.astype(known.dtype)).astype(np.int64)
        codes, _ = self._strings.counts()
        originals = self._strings.originals(codes)
        order = originals.arg_sort().to_numpy()
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        return originals[order], Numbering(codes, places)


@dataclass
class Log:
    """A log on disk and what was counted on the way."""

    runs: Runs
    users: Ids | Sessions = field(default_factory=Ids)
    items: Ids = field(default_factory=Ids)
    actions: Actions = field(default_factory=Actions)
    features: dict[str, FeatureColumn] = field(default_factory=dict)

    def spill(self, source: int, block: pl.DataFrame) -> None:
        """Add events of a file; for the columns see :func:`hstu.data.log_encoder.encode_log`."""
        assert isinstance(self.users, Ids)  # sessions are cut when all is spilled
        columns = {"user": self.users.codes(block["user"]), "item": self.items.codes(block["item"])}
        if "action" in block.columns:
            columns["action"] = self.actions.codes(block["action"])
        if "time" in block.columns:
            columns["time"] = block["time"].to_numpy()
        for name, feature in self.features.items():
            columns[FEATURE + name] = feature.codes(block[FEATURE + name])
        if ROW_HASH in block.columns:
            columns[ROW_HASH] = block[ROW_HASH].to_numpy().view(np.int64)
        self.runs.append(columns, source)


def find_repeats(
    runs: Runs,
    user_counts: tuple[np.ndarray, np.ndarray],
    item_counts: tuple[np.ndarray, np.ndarray],
    events_per_part: int,
    progress: Progress,
) -> np.ndarray:
    """Take rows that repeat an earlier one off the counts of users and items; returns their hashes, int64."""
    if ROW_HASH not in runs.columns:
        return np.empty(0, np.int64)
    users, of_users = user_counts
    parts = np.array(list(part_bounds(np.concatenate([[0], np.cumsum(of_users)]), events_per_part)))
    starts, stops = runs.bounds(users[parts[:, 0]], users[parts[:, 1] - 1])
    found = [np.empty(0, np.int64)]
    for part in range(len(parts)):
        progress("looking for repeated rows", runs.rows * part // len(parts), part / len(parts))
        columns = runs.part(starts[:, part], stops[:, part], ("user", "item", ROW_HASH))
        repeated = ~first_of_equals(columns[ROW_HASH])
        if repeated.any():
            found.append(columns[ROW_HASH][repeated])
            for name, (values, counts) in (("user", user_counts), ("item", item_counts)):
                np.subtract.at(counts, np.searchsorted(values, columns[name][repeated]), 1)
    return np.concatenate(found)


def first_of_equals(hashes: np.ndarray) -> np.ndarray:
    """Which values are not there further in front, bool [N]."""
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():  # as nearly always, and quick
        return np.ones(len(hashes), bool)
    return pl.Series(hashes).is_first_distinct().to_numpy()
