"""Histories that go on after a data set was made: those of its users with later events, and those of others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hstu.data.reader import SequenceDataset, Sequences
from hstu.data.values import concatenate, take


class Continued:
    """A view in which row r is the history of row ``rows[r]`` of a data set and, after it, other events.

    Args:
        dataset: The data set.
        rows: Rows of it, int64 [R], repeats allowed; -1: none, the other events are the whole history.
        later: The other events of each row, of one user each, in the ids of ``dataset``; None: there are none, which
            only a row of the data set may have. Of its rows only the events of ``later`` are looked at.
    """

    def __init__(self, dataset: SequenceDataset, rows: np.ndarray, later: list[SequenceDataset | None]) -> None:
        self.schema, self._dataset, self._rows = dataset.schema, dataset, rows
        given = [part for part in later if part is not None]
        assert all(row >= 0 or part is not None for row, part in zip(rows, later, strict=True))
        self._later = SequenceDataset.joined(given) if given else None
        self._place = np.cumsum([part is not None for part in later], dtype=np.int64) - 1
        self._place[[part is None for part in later]] = -1
        #: Number of events before the later ones, int64 [R].
        self.before = np.where(rows >= 0, dataset.lengths[np.maximum(rows, 0)], 0)
        more = 0 if self._later is None else np.where(self._place >= 0, self._later.lengths[self._place], 0)
        #: Number of events of each row, int64 [R].
        self.lengths = self.before + more

    def gather(
        self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...] = ()
    ) -> Sequences:
        """Events ``[start_b, stop_b)`` of each row; see ``SequenceDataset.gather``."""
        before, rows, place = self.before[users], self._rows[users], self._place[users]
        old = self._dataset.gather(np.maximum(rows, 0), np.minimum(start, before), np.minimum(stop, before), features)
        if self._later is None:
            return replace(old, users=users)
        has = place >= 0
        first, end = (np.where(has, np.maximum(edge - before, 0), 0) for edge in (start, stop))
        new = self._later.gather(np.maximum(place, 0), first, end, features)
        owners = [np.repeat(np.arange(len(users)), part.lengths) for part in (old, new)]
        order = np.argsort(np.concatenate(owners), kind="stable")
        known, each = rows >= 0, np.arange(len(users))

        def events(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
            return None if first is None or second is None else np.concatenate([first, second])[order]

        items = events(old.items, new.items)
        assert items is not None
        return Sequences(
            users=users,
            contexts={name: np.where(known, ids, new.contexts[name]) for name, ids in old.contexts.items()},
            lengths=old.lengths + new.lengths,
            items=items,
            actions=events(old.actions, new.actions),
            times=events(old.times, new.times),
            of_users={
                name: take(concatenate([values, new.of_users[name]]), np.where(known, each, len(users) + each))
                for name, values in old.of_users.items()
            },
            of_events={
                name: take(concatenate([values, new.of_events[name]]), order) for name, values in old.of_events.items()
            },
        )
