"""What clients ask, cleaned and in the ids of the data set: who, after which events, about which items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from hstu.data.cleaning import clean_ids
from hstu.data.continued import Continued
from hstu.data.files import FileFormat
from hstu.data.reader import SequenceDataset
from hstu.data.request_files import HistoryColumns, read_frame, read_histories
from hstu.data.requests import LAST
from hstu.data.values import Values
from hstu.data.vocabulary import Index
from hstu.inference.opened import Opened
from hstu.inference.prediction_requests import RequestSpec, history_columns, parse_time, read_candidates
from hstu.serving.bodies import Asking, Event, Id, Recommend, Score, Similar

_USERS = 1 << 16  # whose rows are known without looking for them
_ALONE = Index(pl.Series(["user"]).to_arrow())


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Whose history an answer goes by.

    Attributes:
        row: The user's row of the data set; -1: another user.
        later: Events after those of the data set; None: there are none.
        time: Of the request in seconds, or ``LAST``.
    """

    row: int
    later: SequenceDataset | None
    time: int

    @property
    def has_history(self) -> bool:
        """Whether there is somebody to answer."""
        return self.row >= 0 or self.later is not None


@dataclass(frozen=True, kw_only=True)
class BestItems:
    """The ``k`` best of some items for ``asker``.

    Attributes:
        filter_seen: Leave out what the user has met.
        items: Ids of the items that may be returned, [n] int64; None: all.
    """

    asker: Asker
    k: int
    filter_seen: bool
    items: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of ``items`` [n] int64 for ``asker``; ``features`` are those of what is asked about, n values each."""

    asker: Asker
    items: np.ndarray
    features: dict[str, Values]


@dataclass(frozen=True, kw_only=True)
class SimilarItems:
    """The ``k`` items closest to each of ``items`` [n] int64."""

    items: Tensor
    k: int


Question = BestItems | Scores | SimilarItems


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a client may ask at once.

    Attributes:
        k: Items returned.
        events: Events given.
        items: Candidates, and items whose neighbours are asked for.
    """

    k: int = 1000
    events: int = 10_000
    items: int = 10_000

    def check(self, name: str, found: int, most: int, of: str = "") -> None:
        """Raise ``ValueError`` if ``found`` is more than ``most``."""
        if found > most:
            raise ValueError(f"{name}: {found:,} {of}where this server takes at most {most:,}; ask for less at once")


class Questions:
    """Reads what clients ask a run.

    Args:
        opened: The run.
        limits: Of a request.
    """

    def __init__(self, opened: Opened, limits: Limits) -> None:
        self.opened, self.limits, self.dataset = opened, limits, opened.dataset
        self.columns = history_columns(RequestSpec(), opened)
        schema = self.dataset.schema
        self.users, self.items = self.dataset.index(schema.user.name), self.dataset.index(schema.item.name)
        events = {feature.name for feature in schema.of("event")}
        # What the data set says of its users need not be said again.
        known = tuple(name for name in self.columns.features if name in events)
        self._of_known = replace(self.columns, contexts=(), features=known)
        self._row = lru_cache(_USERS, typed=True)(self._find_user)  # a table of one row takes milliseconds

    def recommend(self, body: Recommend) -> BestItems:
        """Return the question of ``POST /recommend``.

        Raises:
            ValueError: in one line, for what cannot be asked.
        """
        if self.opened.config.retrieval is None:
            raise ValueError("/recommend: needs a retrieval run; this is a ranking run, use /score")
        self.limits.check("k", body.k, self.limits.k)
        items = None
        if body.candidates is not None:
            self.limits.check("candidates", len(body.candidates), self.limits.items)
            items = self._item_ids(body.candidates, "candidates")
        seen = self.opened.config.retrieval.filter_seen if body.filter_seen is None else body.filter_seen
        return BestItems(asker=self._asker(body), k=body.k, filter_seen=bool(seen), items=items)

    def score(self, body: Score) -> Scores:
        """Return the question of ``POST /score``; see :meth:`recommend`."""
        self.limits.check("candidates", len(body.candidates), self.limits.items)
        asker = self._asker(body)
        columns = replace(self.columns, missing_features=body.missing_features)
        frame = _frame("candidates", body.candidates, columns.item).with_columns(pl.lit("user").alias(columns.user))
        _, items, features = read_candidates(frame, columns, _ALONE, self.dataset, FileFormat())
        return Scores(asker=asker, items=items, features=features)

    def similar(self, body: Similar) -> SimilarItems:
        """Return the question of ``POST /similar``; see :meth:`recommend`."""
        if self.opened.config.retrieval is None:
            raise ValueError("/similar: needs a retrieval run; this is a ranking run, use /score")
        self.limits.check("items", len(body.items), self.limits.items)
        self.limits.check("k", body.k * len(body.items), self.limits.items, "neighbours of all items together ")
        return SimilarItems(items=self._item_ids(body.items, "items"), k=body.k)

    def _item_ids(self, items: Sequence[Id], name: str) -> Tensor:
        given = _column("item", items, name)
        ids = self.items.places(given)
        if ids.null_count():
            raise ValueError(f"{name}: {items[int(ids.is_null().arg_max() or 0)]!r} is not in the catalogue")
        return torch.from_numpy(ids.to_numpy().copy())

    def _asker(self, body: Asking) -> Asker:
        if (body.user is None) == (body.history is None):
            raise ValueError("user, history: give one of them: a user of the data set, or the events of another one")
        asked_at = parse_time(body.request_time)
        time = LAST if asked_at is None else asked_at
        if body.history is not None:
            if body.events:
                raise ValueError("events: go on from the history of a user of the data set; put them into history")
            later = self._read("history", body.history, self.columns, body)
            self._check_time(-1, later, time)
            return Asker(row=-1, later=later, time=time)
        if body.features:
            raise ValueError("features: are those of the data set for its users; give them with a history alone")
        row = self._row(body.user)
        later = self._read("events", body.events, self._of_known, body) if body.events else None
        if later is not None:
            self._check_order(row, later)
        self._check_time(row, later, time)
        return Asker(row=row, later=later, time=time)

    def _find_user(self, user: Id) -> int:
        row = self.users.places(clean_ids(pl.Series(self.columns.user, [user]), "user"))[0]
        if row is None:
            raise ValueError(f"user: {user!r} is not in the data set; give the user's events as history")
        return int(row)

    def _read(self, name: str, events: list[Event], columns: HistoryColumns, body: Asking) -> SequenceDataset | None:
        """Return the events of one user."""
        self.limits.check(name, len(events), self.limits.events, "events ")
        if not events:
            return None
        frame = _frame(name, events, columns.item)
        told = {key: [value] * frame.height for key, value in body.features.items()}
        frame = frame.with_columns(
            pl.lit("user").alias(columns.user), *(_column(key, values, "features") for key, values in told.items())
        )
        columns = replace(columns, missing_features=body.missing_features)
        frame = read_frame(frame, columns, FileFormat(), ("user", "item"), name=name)
        found, _ = read_histories(name, frame, self.dataset, columns, body.unknown_items)
        return found

    def _check_order(self, row: int, later: SequenceDataset) -> None:
        first, last = _time(later, 0), _time(self.dataset, -1, row)
        if first is not None and last is not None and first < last:
            raise ValueError(f"events: the first one, at {first}, lies before the last one of the user in the data "
                             f"set, at {last}; give later events alone")  # fmt: skip

    def _check_time(self, row: int, later: SequenceDataset | None, time: int) -> None:
        if time == LAST:
            return
        last = _time(later, -1) if later is not None else _time(self.dataset, -1, row) if row >= 0 else None
        if last is not None and time < last:
            raise ValueError(f"request_time = {time}: lies before the last event, at {last}; give a later one, or none")


def histories_of(dataset: SequenceDataset, askers: Sequence[Asker]) -> Continued:
    """Return the histories of ``askers``, each of which has one."""
    return Continued(dataset, np.array([asker.row for asker in askers], np.int64), [asker.later for asker in askers])


def _time(dataset: SequenceDataset, place: int, row: int = 0) -> int | None:
    """Return the time of the first (0) or last (-1) event of a row; None where there is none."""
    length = int(dataset.lengths[row])
    if dataset.schema.time is None or not length:
        return None
    start = np.array([0 if place == 0 else length - 1])
    times = dataset.gather(np.array([row]), start, start + 1).times
    assert times is not None
    return int(times[0])


def _frame(name: str, rows: Sequence[Event], item: str) -> pl.DataFrame:
    """Return events as a table, one row each; of those that are ids alone the only column is that of the item."""
    told = [row if isinstance(row, dict) else {item: row} for row in rows]
    names = dict.fromkeys(key for row in told for key in row)
    return pl.DataFrame([_column(key, [row.get(key) for row in told], name) for key in names])


def _column(key: str, values: Sequence[Any], name: str) -> pl.Series:
    """Return values of JSON as a column.

    Raises:
        ValueError: if they are of several types.
    """
    numbers = [value for value in values if value is not None]
    if all(type(value) in (int, float) for value in numbers) and any(type(value) is float for value in numbers):
        values = [None if value is None else float(value) for value in values]
    try:
        return pl.Series(key, values, strict=True)
    except (TypeError, ValueError, OverflowError, pl.exceptions.PolarsError):
        raise ValueError(f"{name}: the values of {key!r} are of several types; give one type in all rows") from None
