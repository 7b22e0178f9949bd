"""Questions to a trained model: a history and, after it, the event that is asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hstu.data.reader import Histories, Sequences
from hstu.data.splits import Split
from hstu.data.values import Values, insert, missing, take


class Requests:
    """A view of a data set in which row r is the whole history of ``users[r]`` and one event more.

    That event is what evaluation holds out: a retrieval model does not look at its item, a ranking model scores
    it; neither looks at its action, which is 0.

    Args:
        dataset: The histories.
        users: Rows of ``dataset``, int64 [R]; repeats allowed.
        items: Item asked about, int64 [R]; None where the item is what is asked for.
        time: Time of the request in seconds; None: the time of each user's last event.
        features: Features of events -> their R values for what is asked about; of others they are missing.

    Raises:
        ValueError: if ``time`` lies before an event.
    """

    def __init__(
        self,
        dataset: Histories,
        users: np.ndarray,
        items: np.ndarray | None = None,
        time: int | None = None,
        features: dict[str, Values] | None = None,
    ) -> None:
        self.schema, self._dataset, self._users = dataset.schema, dataset, users
        self._items = np.zeros_like(users) if items is None else items
        self._features = features or {}
        self._history = dataset.lengths[users]
        self.lengths = self._history + 1
        self._times = np.zeros_like(users)
        if dataset.schema.time is not None and len(users):
            last = dataset.gather(users, np.maximum(self._history - 1, 0), self._history)
            assert last.times is not None
            self._times[self._history > 0] = last.times
            if time is not None and len(last.times) and last.times.max() > time:
                raise ValueError(
                    f"the request time {time} lies before the last event of some users, the latest is of "
                    f"{last.times.max()}; give a later one (seconds), or none to ask right after each user's last event"
                )
            if time is not None:
                self._times[:] = time

    @property
    def split(self) -> Split:
        """All requests, in order; what is asked for stands where a test target stands."""
        return Split(name="test", users=np.arange(len(self.lengths)), stop=self.lengths)

    def gather(
        self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...] = ()
    ) -> Sequences:
        """Events ``[start_b, stop_b)`` of each request; see ``SequenceDataset.gather``."""
        history = self._history[users]
        found = self._dataset.gather(
            self._users[users], np.minimum(start, history), np.minimum(stop, history), features
        )
        asking = (start <= history) & (stop > history)
        ends, rows = np.cumsum(found.lengths)[asking], users[asking]

        def with_request(values: np.ndarray, asked: np.ndarray) -> np.ndarray:
            return np.insert(values, ends, asked)

        def feature_of_request(name: str, values: Values) -> Values:
            feature = next(feature for feature in self.schema.stored("event") if feature.name == name)
            asked = take(self._features[name], rows) if name in self._features else missing(feature, len(rows))
            return insert(values, ends + np.arange(len(ends)), asked)

        return replace(
            found,
            users=users,
            lengths=found.lengths + asking,
            items=with_request(found.items, self._items[rows]),
            actions=None if found.actions is None else with_request(found.actions, np.zeros_like(rows)),
            times=None if found.times is None else with_request(found.times, self._times[rows]),
            of_events={name: feature_of_request(name, values) for name, values in found.of_events.items()},
        )
