"""Keys and values of users who go on: what stands for their history is kept, and later events are run behind it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from hstu.data.reader import SequenceDataset
from hstu.data.requests import Requests
from hstu.data.values import Sets, Values, take
from hstu.inference.opened import Opened
from hstu.layers.cache import Cache
from hstu.models import RetrievalModel
from hstu.models.caching import can_go_on
from hstu.serving.questions import Asker, histories_of

_Event: TypeAlias = tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What is kept of a user: the cache and, where it does not depend on the request, what scores items.

    Attributes:
        events: What the later events were that are in it.
        start: The first event of the history that the model saw.
        cache: Of this user alone.
        query: [1, ..] float32.
    """

    events: tuple[_Event, ...]
    start: int
    cache: Cache
    query: Tensor


class UserCaches:
    """Caches of users of the data set who had events since, the least recently asked forgotten first.

    Args:
        opened: A retrieval run.
        limit: Bytes of keys and values.

    Attributes:
        hits: Requests that found a cache.
        misses: Requests that made one.
        num_bytes: Bytes of keys and values now.
    """

    def __init__(self, opened: Opened, limit: int) -> None:
        assert isinstance(opened.model, RetrievalModel)
        self.model, self.loader, self.dataset = opened.model, opened.loader, opened.dataset
        self.device, self.limit = opened.assembly.mesh.device, limit
        self.hits = self.misses = self.num_bytes = 0
        self._kept: OrderedDict[int, _Kept] = OrderedDict()
        collate = self.loader.collate
        self.works = (
            limit > 0 and can_go_on(self.model) and collate.history_start is None and collate.history_end is None
        )

    def __len__(self) -> int:
        return len(self._kept)

    def has_use(self, asker: Asker) -> bool:
        """Return whether a cache is kept of such a user."""
        return self.works and asker.row >= 0 and asker.later is not None

    @torch.no_grad()
    def queries(self, askers: Sequence[Asker]) -> Tensor:
        """Return what scores items for each of ``askers``, who all have later events, [Q, ..] float32."""
        features = self.loader.collate.event_features
        every = [_events(asker.later, features) for asker in askers if asker.later is not None]
        histories = histories_of(self.dataset, askers)
        every_asker, times = np.arange(len(askers)), np.array([asker.time for asker in askers])
        requests = Requests(histories, every_asker, time=times, asked=np.ones_like(every_asker))
        starts = np.maximum(histories.lengths - self.loader.collate.max_history, 0)
        kept = [self._find(askers[r].row, every[r], int(starts[r])) for r in range(len(askers))]
        asks_next = bool(getattr(self.model.backbone, "asks_next", False))
        out: list[Tensor | None] = [
            k.query if k is not None and k.events == events and not asks_next else None
            for k, events in zip(kept, every, strict=True)
        ]
        for has_cache in (False, True):
            rows = [r for r, query in enumerate(out) if query is None and (kept[r] is not None) == has_cache]
            if not rows:
                continue
            cache = Cache.joined([k.cache for r in rows if (k := kept[r]) is not None]) if has_cache else None
            some = np.array(rows)
            batch = self.loader.collate(requests, requests.split, some, some, 0)
            hidden, after = self.model.extend(cache, batch.to(self.device))
            for r, query, own in zip(rows, self.model.query_vectors(hidden).split(1), after.split(), strict=True):
                out[r] = query
                self._keep(askers[r].row, _Kept(events=every[r], start=int(starts[r]), cache=own, query=query.clone()))
        self.hits += sum(k is not None for k in kept)
        self.misses += sum(k is None for k in kept)
        return torch.cat([query for query in out if query is not None])

    def _find(self, row: int, events: tuple[_Event, ...], start: int) -> _Kept | None:
        kept = self._kept.get(row)
        if kept is None or kept.start != start or kept.events != events[: len(kept.events)]:
            return None
        self._kept.move_to_end(row)
        return kept

    def _keep(self, row: int, new: _Kept) -> None:
        if (old := self._kept.pop(row, None)) is not None:
            self.num_bytes -= old.cache.num_bytes
        self._kept[row] = new
        self.num_bytes += new.cache.num_bytes
        while self.num_bytes > self.limit:
            _, forgotten = self._kept.popitem(last=False)
            self.num_bytes -= forgotten.cache.num_bytes


def _events(later: SequenceDataset, features: tuple[str, ...]) -> tuple[_Event, ...]:
    """Return what each of the later events is, to tell whether a cache is of the same ones."""
    found = later.gather(np.zeros(1, np.int64), np.zeros(1, np.int64), later.lengths, features)
    columns = [found.items, found.actions, found.times, *found.of_events.values()]
    given = [values for values in columns if values is not None]
    return tuple(tuple(_bytes(values, place) for values in given) for place in range(later.num_events))


def _bytes(values: Values, place: int) -> bytes:
    one = take(values, np.array([place]))
    return one.ids.tobytes() if isinstance(one, Sets) else one.tobytes()
