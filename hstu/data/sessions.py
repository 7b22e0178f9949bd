"""Sessions of users: logs cut at gaps of time, and samples that know where the last session begins."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from hstu.config.dataset import seconds_of
from hstu.data.external_sort import Runs
from hstu.data.schema import unknown_id
from hstu.data.writer import part_bounds

if TYPE_CHECKING:
    from hstu.data.interactions import InteractionSpec
    from hstu.data.numbering import Ids
    from hstu.data.reader import Sequences
    from hstu.data.schema import Schema
    from hstu.data.spill import Log, Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sessions:
    """The sequences that the users of a log are cut into, numbered in the order of the users and of their times.

    Attributes:
        users: Ids of the users.
        owner: Code of the user of each session, ascending, int64 [S].
        lengths: Number of its events, int64 [S].
    """

    users: Ids
    owner: np.ndarray
    lengths: np.ndarray

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """The sessions, ascending, and their numbers of events, int64 [S] each."""
        return np.arange(len(self.owner)), self.lengths

    def owners(self, codes: np.ndarray) -> pl.Series:
        """The users of sessions ``codes``."""
        return self.users.originals(self.owner[codes])

    def originals(self, codes: np.ndarray) -> pl.Series:
        """The names of sessions ``codes``: the id of the user, and after a # which of the user's sessions, from 1."""
        first = np.searchsorted(self.owner, self.owner[codes])
        return self.owners(codes).cast(pl.String) + "#" + pl.Series(codes - first + 1).cast(pl.String)


def cut_at_gaps(
    log: Log, spec: InteractionSpec, ticks: int, events_per_part: int, runs: Runs, progress: Progress
) -> Log:
    """Spill a log again with a session in place of each user.

    Args:
        log: With times.
        spec: With a gap.
        ticks: Units of the times in a second.
        events_per_part: Most events of more than one user in memory.
        runs: Where the events go.
        progress: Told how far it is.
    """
    assert not isinstance(log.users, Sessions)
    users, counts = log.users.counts()
    parts = np.array(list(part_bounds(np.concatenate([[0], np.cumsum(counts)]), events_per_part)))
    starts, stops = log.runs.bounds(users[parts[:, 0]], users[parts[:, 1] - 1])
    gap = (seconds_of(spec.session_gap or "") or 0) * ticks
    owners, lengths, begun = [], [], 0
    for part in range(len(parts)):
        progress("cutting sessions", log.runs.rows * part // len(parts), part / len(parts))
        columns = log.runs.part(starts[:, part], stops[:, part], log.runs.columns)
        order = order_of(np.searchsorted(users, columns["user"]), columns["time"])
        columns = {name: values[order] for name, values in columns.items()}
        begins = _begins(columns["user"], columns["time"], gap)
        owners.append(columns["user"][begins].astype(np.int64))
        session = np.cumsum(begins) - 1
        lengths.append(np.bincount(session))
        runs.append(columns | {"user": session + begun})
        begun += len(owners[-1])
    runs.close()
    log.runs.remove()
    sessions = Sessions(users=log.users, owner=np.concatenate(owners), lengths=np.concatenate(lengths))
    logger.info("%s: --session_gap %s makes %s sessions of %s users",
                spec.file, spec.session_gap, f"{begun:,}", f"{len(users):,}")  # fmt: skip
    return replace(log, runs=runs, users=sessions)


def order_of(user: np.ndarray, time: np.ndarray | None) -> np.ndarray:
    """Positions that sort by user, then time, then position.

    Args:
        user: Numbers from 0, int64 [N].
        time: Integers or floats [N]; None: there are none.
    """
    if time is None or len(time) == 0:
        return np.argsort(user, kind="stable")
    if np.issubdtype(time.dtype, np.floating):
        return np.lexsort((time, user))
    time = time.astype(np.int64)
    earliest, latest = int(time.min()), int(time.max())
    span = latest - earliest + 1
    if span * (int(user.max()) + 1) >= 2**63:
        return np.lexsort((time, user))
    # One key in place of two sorts faster.
    return np.argsort(user * span + (time - earliest), kind="stable")


def _begins(user: np.ndarray, time: np.ndarray, gap: int) -> np.ndarray:
    """Which events, in order, are the first of a session, bool [N]."""
    if not np.issubdtype(time.dtype, np.floating):
        time = time.astype(np.int64)  # files hold them in as few bytes as they take
    begins = np.ones(len(user), bool)
    begins[1:] = (user[1:] != user[:-1]) | (time[1:] - time[:-1] > gap)
    return begins


def session_column(sessions: str | None, schema: Schema) -> tuple[str, ...]:
    """Return the column that ``DatasetArgs.sessions`` names, if it names one.

    Raises:
        ValueError: If there is no such column, it holds no ids, or there are no times where it is a length of time.
    """
    if sessions is None:
        return ()
    given = f"DatasetArgs.sessions = {sessions!r}"
    if seconds_of(sessions) is not None:
        if schema.time is None:
            raise ValueError(f"{given}: data set {schema.name!r} has no times; name a column of events")
        return ()
    columns = [feature.name for feature in schema.stored("event") if feature.has_ids and feature.kind != "multi"]
    if sessions not in columns:
        raise ValueError(
            f"{given}: is no length of time, as '30m', and no column of events with one id each; there are: "
            f"{', '.join(columns) or 'none'} (--event_features {sessions}:control keeps one)"
        )
    return (sessions,)


def session_begins(events: Sequences, sessions: str, schema: Schema) -> np.ndarray:
    """Return which events are the first of a session, or of their sequence, [T] bool.

    Args:
        events: With times, or the column of sessions.
        sessions: ``DatasetArgs.sessions``. Where the column has no value, the session goes on.
        schema: Of the events.
    """
    begins = np.zeros(len(events.items), bool)
    seconds, column = seconds_of(sessions), events.of_events.get(sessions)
    if seconds is not None:
        assert events.times is not None
        begins[1:] = np.diff(events.times) > seconds
    else:
        assert isinstance(column, np.ndarray)
        known = np.flatnonzero(column != unknown_id(schema, sessions))
        ids, owner = column[known], np.repeat(np.arange(len(events.lengths)), events.lengths)[known]
        begins[known[1:]] = (ids[1:] != ids[:-1]) & (owner[1:] == owner[:-1])
    ends = np.cumsum(events.lengths)
    begins[(ends - events.lengths)[events.lengths > 0]] = True
    return begins


def of_last_session(events: Sequences, sessions: str, schema: Schema) -> np.ndarray:
    """Return how many events at the end of each sequence are of its last session, int64 [B]; see ``session_begins``."""
    place = np.where(session_begins(events, sessions, schema), np.arange(len(events.items)), 0)
    ends = np.cumsum(events.lengths)
    latest = np.maximum.accumulate(place) if len(place) else np.zeros(1, np.int64)
    return np.where(events.lengths > 0, ends - latest[np.maximum(ends - 1, 0)], 0)
