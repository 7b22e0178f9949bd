"""Planted features of events: a number and a brand that lead to the next cluster, a price that decides on the action.

The number is standard normal; its quarter (below -0.67, 0, 0.67 or above) and the brand, which is one of a few, point
to a cell of a table of clusters. With probability ``feature_weight`` the next item is of the cluster in the cell of the
event before it. The price, standard normal as well, takes ``price_scale`` times itself off the logit of the action.
All are drawn for each event alike, so that who does not see them knows the mean over them alone.

Popularity drifts: the logarithm of each item's takes a normal step of ``popularity_drift`` from each of ten equal spans
of time to the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hstu.data.feature_codes import Summary, summarize
from hstu.data.planted import PlantedModel
from hstu.data.schema import Feature
from hstu.data.values import Values

PLANTED = ("number", "brand", "price")
NUM_SPANS = 10
_QUARTERS = (-0.6744897501960817, 0.0, 0.6744897501960817)


@dataclass(frozen=True)
class EventFeatures:
    """The planted features of T events.

    Attributes:
        values: Feature -> its values, T of them; empty without features.
        lead: Cluster to which an event's number and brand lead, [T]; -1 where there are none.
        share: How often a cluster is led to, [K].
    """

    values: dict[str, Values]
    lead: np.ndarray
    share: np.ndarray

    def price(self, scale: float) -> np.ndarray | None:
        """Return what the price takes off the logit of the action, [T]; None without a price."""
        price = self.values.get("price")
        return scale * price[:, 0].astype(np.float64) if isinstance(price, np.ndarray) else None

    def features(self, num_brands: int) -> tuple[Feature, ...]:
        """Return the features, in the order of the schema."""
        found = []
        for name, values in self.values.items():
            if name == "brand":
                found.append(Feature(name=name, level="event", kind="categorical", vocab_size=num_brands))
            else:
                summary = Summary()
                summary.add(summarize(values))
                found.append(Feature(name=name, level="event", kind="numeric", statistics=summary.statistics()))
        return tuple(found)


def draw_features(
    names: tuple[str, ...], events: int, num_brands: int, num_clusters: int, seed: np.random.SeedSequence
) -> EventFeatures:
    """Draw the features ``names`` of so many events."""
    table_rng, *streams = (np.random.default_rng(child) for child in seed.spawn(1 + len(PLANTED)))
    values: dict[str, Values] = {}
    cell = np.zeros((2, events), np.int64)
    for name, rng in zip(PLANTED, streams, strict=True):
        if name not in names:
            continue
        if name == "brand":
            values[name] = cell[0] = rng.integers(num_brands, size=events)
        else:
            numbers = rng.standard_normal(events).astype(np.float32)
            values[name] = numbers[:, None]
            if name == "number":
                cell[1] = np.searchsorted(np.array(_QUARTERS, np.float32), numbers)
    brands, quarters = num_brands if "brand" in names else 1, len(_QUARTERS) + 1 if "number" in names else 1
    if brands * quarters == 1:
        return EventFeatures(values, np.full(events, -1), np.zeros(num_clusters))
    cells = np.arange(brands * quarters) % num_clusters
    table = table_rng.permutation(num_clusters)[cells][table_rng.permutation(len(cells))].reshape(brands, quarters)
    return EventFeatures(values, table[*cell], np.bincount(table.ravel(), minlength=num_clusters) / table.size)


def spans_of(times: np.ndarray) -> np.ndarray:
    """Return in which of ``NUM_SPANS`` equal spans of time each event is, [T]."""
    first, last = int(times.min()), int(times.max())
    return (times - first) * NUM_SPANS // (last - first + 1)


def drifting(model: PlantedModel, drift: float, seed: np.random.SeedSequence) -> list[PlantedModel]:
    """Return the model of each span of time: the popularity of items within their cluster takes a walk."""
    steps = drift * np.random.default_rng(seed).standard_normal((NUM_SPANS, len(model.choice)))
    found = []
    for walk in np.cumsum(steps, axis=0) - steps[0]:
        popularity = model.choice * np.exp(walk)
        found.append(replace(model, choice=popularity / np.bincount(model.cluster, popularity)[model.cluster]))
    return found
