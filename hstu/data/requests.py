"""Questions to a trained model: a history and, after it, the event that is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hstu.data.reader import Histories, Sequences
from hstu.data.splits import Split
from hstu.data.values import Values, insert, missing, take

LAST = -(2**63)  # of a time of a request: that of the last event


@dataclass(frozen=True, kw_only=True)
class Slates:
    """Requests for many items at once, by user.

    Attributes:
        requests: First the slates of each user, one user after the other, then one of each without an item.
        pairs: What each item of ``requests`` is among the requests for one item, [R] int64.
        number: Slates of each user, [U] int64.
        asking: A request for one item of each user, [U] int64.
    """

    requests: Requests
    pairs: np.ndarray
    number: np.ndarray
    asking: np.ndarray

    def rows(self, users: np.ndarray, slate: int) -> np.ndarray:
        """Return the row in ``requests`` of slate ``slate`` of ``users`` [u]; the empty one where there is none."""
        first = np.cumsum(self.number) - self.number
        return np.where(slate < self.number[users], first[users] + slate, self.number.sum() + users)

    def pairs_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the pairs of ``rows``, one after the other, int64."""
        split = self.requests.split
        assert split.asked is not None
        first, count = (np.cumsum(split.asked) - split.asked)[rows], split.asked[rows]
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return self.pairs[np.repeat(first, count) + within]


class Requests:
    """A view of a data set in which row r is the whole history of ``users[r]`` and what is asked about after it.

    That is what evaluation holds out, one event: a retrieval model does not look at its item, a ranking model scores
    it; neither looks at its action, which is 0. Or it is any number of items, as candidates of one request.

    Args:
        dataset: The histories.
        users: Rows of ``dataset``, int64 [R]; repeats allowed.
        items: Item asked about, int64 [R]; None where the item is what is asked for.
        time: Time of the request in seconds, of all or of each, int64 [R]; None, or ``LAST``: the time of the last
            event of the history.
        features: Features of events -> their R values for what is asked about; of others they are missing.
        asked: Items that row r asks about, int64 [R]; ``items`` then has those of all rows, one after the other. None:
            one each.

    Raises:
        ValueError: if ``time`` lies before an event.
    """

    def __init__(
        self,
        dataset: Histories,
        users: np.ndarray,
        items: np.ndarray | None = None,
        time: int | np.ndarray | None = None,
        features: dict[str, Values] | None = None,
        asked: np.ndarray | None = None,
    ) -> None:
        self.schema, self._dataset, self._users = dataset.schema, dataset, users
        self._items = np.zeros_like(users) if items is None else items
        self._features = features or {}
        self._history = dataset.lengths[users]
        self._asked, self._time = asked, time
        count = np.ones_like(users) if asked is None else asked
        self._first_item, self.lengths = np.cumsum(count) - count, self._history + count
        self._times = np.zeros_like(users)
        if dataset.schema.time is not None and len(users):
            last = dataset.gather(users, np.maximum(self._history - 1, 0), self._history)
            assert last.times is not None
            self._times[self._history > 0] = last.times
            asked_at = np.full_like(users, LAST) if time is None else np.broadcast_to(time, users.shape)
            given = asked_at != LAST
            early = given & (self._history > 0) & (self._times > asked_at)
            if early.any():
                raise ValueError(
                    f"the request time {asked_at[early][0]} lies before the last event of some users, the latest is of "
                    f"{self._times[early].max()}; give a later one (seconds), or none to ask right after each user's "
                    "last event"
                )
            self._times[given] = asked_at[given]

    @property
    def split(self) -> Split:
        """All requests, in order; what is asked for stands where a test target stands."""
        return Split(name="test", users=np.arange(len(self.lengths)), stop=self.lengths, asked=self._asked)

    def slates(self, size: int) -> Slates:
        """Return the same requests, one item each, as slates of at most ``size`` items of one user."""
        assert self._asked is None, "requests for one item each"
        order = np.argsort(self._users, kind="stable")
        users, asking, counts = np.unique(self._users, return_index=True, return_counts=True)
        number = -(-counts // size)
        place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
        asked = np.minimum(np.repeat(counts, number) - place * size, size)
        times = None if self._time is None else np.broadcast_to(self._time, self._users.shape)[asking]
        requests = Requests(
            self._dataset,
            np.concatenate([np.repeat(users, number), users]),
            self._items[order],
            None if times is None else np.concatenate([np.repeat(times, number), times]),
            {name: take(values, order) for name, values in self._features.items()},
            asked=np.concatenate([asked, np.zeros_like(users)]),
        )
        return Slates(requests=requests, pairs=order, number=number, asking=asking)

    def gather(
        self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...] = ()
    ) -> Sequences:
        """Events ``[start_b, stop_b)`` of each request; see ``SequenceDataset.gather``."""
        history = self._history[users]
        found = self._dataset.gather(
            self._users[users], np.minimum(start, history), np.minimum(stop, history), features
        )
        count = np.maximum(stop - np.maximum(start, history), 0)  # of what is asked about
        place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        ends = np.repeat(np.cumsum(found.lengths), count)
        requests = np.repeat(users, count)
        rows = self._first_item[requests] + np.repeat(np.maximum(start - history, 0), count) + place

        def with_request(values: np.ndarray, asked: np.ndarray) -> np.ndarray:
            return np.insert(values, ends, asked)

        def feature_of_request(name: str, values: Values) -> Values:
            feature = next(feature for feature in self.schema.stored("event") if feature.name == name)
            asked = take(self._features[name], rows) if name in self._features else missing(feature, len(rows))
            return insert(values, ends + np.arange(len(ends)), asked)

        return replace(
            found,
            users=users,
            lengths=found.lengths + count,
            items=with_request(found.items, self._items[rows]),
            actions=None if found.actions is None else with_request(found.actions, np.zeros_like(rows)),
            times=None if found.times is None else with_request(found.times, self._times[requests]),
            of_events={name: feature_of_request(name, values) for name, values in found.of_events.items()},
        )
